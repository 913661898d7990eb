"""Notation, JSON and the registry: anything but a pattern raises PatternError, and nothing is ever evaluated."""

from __future__ import annotations

import base64
import builtins
import contextlib
import json
import os
import time
import tracemalloc
import zlib
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import farlight as fl
from farlight.errors import PatternError
from farlight.patterns import CONSTRUCTORS, Pattern, Sizes, parse
from farlight.patterns.expression import Atom
from farlight.patterns.registry import constructors, register
from farlight.testing.strategies import problems

# (text, what the error must say)
REFUSED = [
    ("", r"the pattern expression is empty; write for example window\(256\) \| global_tokens\(\[0\]\)\."),
    ("   \n", "the pattern expression is empty"),
    ("window(", r"cannot read the pattern 'window\(': the \( at column 7 is never closed; write \) where it ends."),
    ("window(3) |", "it is not an expression"),
    ("window(3); causal()", "it is not an expression"),
    ("x = window(3)", "it is not an expression"),
    ("import os", "it is not an expression"),
    ("\0", "cannot read the pattern"),
    ("window", r"at column 1: window must be called, as in window\(…\)\."),
    ("window | causal()", "window must be called"),
    ("windw(3)", r"at column 1: there is no pattern 'windw'; did you mean window\? known are blocked_window, "),
    ("nothing_like_it(3)", "there is no pattern 'nothing_like_it'; known are "),
    ("causal() & windo(3)", "at column 12: there is no pattern 'windo'"),
    ("3", r"'3' is int, not a pattern; write for example window\(256\)\."),
    ("'window(3)'", "is str, not a pattern"),
    ("[window(3)]", "is list, not a pattern"),
    ("range(3)", "is range, not a pattern"),
    ("window(3) | 3", "at column 13: a pattern is needed here, not int"),
    ("~5", "at column 2: a pattern is needed here, not int"),
    ("-window(3)", "a minus sign may only stand before a number"),
    ("window(-'3')", "a minus sign may only stand before a number"),
    ("window(-True)", "a minus sign may only stand before a number"),
    ("window(3) + causal()", "only pattern names, presets, "),
    ("window(3) ^ causal()", "only pattern names, presets, "),
    ("window(2**9999999)", "only pattern names, presets, "),
    ("window(3 + 4)", "only pattern names, presets, "),
    ("window(not 3)", "only pattern names, presets, "),
    ("window(3) if True else causal()", "only pattern names, presets, "),
    ("window(3) < causal()", "only pattern names, presets, "),
    ("window(3) and causal()", "only pattern names, presets, "),
    ("(w := window(3))", "only pattern names, presets, "),
    ("window(x)", "only pattern names, presets, "),
    ("$0", "it is not an expression"),
    ("_table_0", "only pattern names, presets, "),
    ("window(b'3')", "only pattern names, presets, "),
    ("window(3j)", "only pattern names, presets, "),
    ("window(...)", "only pattern names, presets, "),
    ("global_tokens({0, 1})", "only pattern names, presets, "),
    ("global_tokens({0: 1})", "only pattern names, presets, "),
    ("window(*[3])", r"\* and \*\* are not part of the notation"),
    ("window(**{'left': 3})", r"\* and \*\* are not part of the notation"),
    ("global_tokens([*range(3)])", "only pattern names, presets, "),
    ("window()", "at column 1: window cannot take these arguments"),
    ("window(1, 2, 3, 4)", "window cannot take these arguments"),
    ("window(3, lefft=2)", "window cannot take these arguments"),
    ("window(left=1, left=2)", "an argument is given twice"),
    ("window(1.5)", "window: left = 1.5: a whole number is needed, not float"),
    ("window('3')", "window: left = '3': a whole number is needed, not str"),
    ("window(None)", "window: left = None: a whole number is needed, not NoneType"),
    ("window(True)", "window: left = True: it must be a whole number >= 0"),
    ("range()", "range needs one to three whole numbers, the third not 0"),
    ("global_tokens(range(1, 2, 0))", "range needs one to three whole numbers, the third not 0"),
    ("global_tokens(range('a'))", "range needs one to three whole numbers"),
    ("global_tokens(range(stop=3))", "range needs one to three whole numbers"),
    ("global_tokens(range(True))", "range needs one to three whole numbers"),
    ("table('bool', [1])", "table needs a dtype, a shape and data"),
    ("table('float32', [1], '')", r"table: dtype 'float32' is not one of \['bool', 'int64'\]"),
    ("table('bool', 3, '')", "table: shape 3 is not a list of sizes"),
    ("table('bool', [-1], '')", r"table: shape \[-1\] is not a list of sizes"),
    ("table('bool', [True], '')", r"table: shape \[True\] is not a list of sizes"),
    ("table('bool', [1], 3)", "table: data is int, not base64 text"),
    ("table('bool', [1], '!')", "table: the data cannot be read"),
    ("table('bool', [1], 'AAAA')", "table: the data cannot be read .*; it must be base64 of zlib"),
    ("pairs([[True], [True, False]])", "pairs: the mask cannot be read as a table"),
    ("pairs([[True, 'x']])", "pairs: the mask cannot be read as a table"),
    ("per_head([3])", "int is not a pattern; combine patterns with patterns"),
    ("per_head(window(3))", "per_head needs a list with one pattern for each head"),
    ("per_head([])", "per_head needs a list with one pattern for each head"),
    ("clusters([[1], [2, 3]])", "clusters: query_labels: cannot be read as a tensor"),
    ("documents(lengths=3)", "documents"),
    ("padding(None)", "padding"),
    ("offsets(3)", "offsets"),
    ("longnet(4, 2)", "longnet"),
    ("longformer(8, 0)", "longformer"),
]  # fmt: skip

ATTACKS = [
    "__import__('os').system('touch /tmp/farlight-was-here')",
    "__import__('os')",
    "window.__class__",
    "window.__init__.__globals__['os']",
    "window(3).to_json()",
    "window(3).__class__.__mro__[1].__subclasses__()",
    "fl.Pattern.from_json('{}')",
    "presets.__all__",
    "presets.bigbird.__globals__",
    "(lambda: window(3))()",
    "lambda: window(3)",
    "[window(x) for x in [1]][0]",
    "{window(3)}",
    "(window(x) for x in [1])",
    "f'{window(3)}'",
    "f\"{__import__('os').getcwd()}\"",
    "eval('window(3)')",
    "exec('import os')",
    "open('/etc/passwd')",
    "getattr(window, 'x')",
    "window(__import__('os'))",
    "window(left=__import__('os').getpid())",
    "window(open('/etc/passwd').read())",
    "print('x')",
    "breakpoint()",
    "await window(3)",
    "(yield)",
    "torch.ones(3)",
    "parse('window(3)')",
    "Pattern()",
    "HeadsOf([0])",
    "_heads([0])",
    "base.Pattern",
    "farlight.os.getcwd()",
    "fl.fl.window(3)",
    "window (3)[0]",
    "window[3]",
    "globals()",
]


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_is_not_a_pattern_is_refused(text: str, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        parse(text)


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_is_evaluated(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def caught(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the parser reached out: {args}")

    # What the texts try to reach is booby-trapped while they are read.
    for name in ("eval", "exec", "open", "print", "breakpoint"):
        monkeypatch.setattr(builtins, name, caught)
    monkeypatch.setattr(os, "system", caught)
    monkeypatch.setattr(os, "getpid", caught)
    monkeypatch.setattr(os, "getcwd", caught)
    with pytest.raises(PatternError, match="cannot read the pattern"):
        parse(text)


@pytest.mark.parametrize("value", [None, 3, b"window(3)", ["window(3)"], fl.window(3)], ids=repr)
def test_only_text_is_parsed(value: Any) -> None:
    with pytest.raises(PatternError, match="the pattern expression is empty"):
        parse(value)


TOO_MUCH = [
    "~" * 100_000 + "full()",
    "(" * 5_000 + "full()" + ")" * 5_000,
    "[" * 90 + "]" * 90 + "x",
    "-" * 50_000 + "1",
    "full()" + "()" * 20_000,
    "window(" * 3_000 + ")" * 3_000,
    "|".join(["full()"] * 20_000),
    "a." * 30_000 + "b",
    "per_head([" * 300 + "full()" + "])" * 300,
    "window(" + "9" * 10_000 + ")",
    "[" + "1," * 300_000 + "]",
    "window(1)" + " " * 5_000_000,
]


@pytest.mark.parametrize("text", TOO_MUCH, ids=lambda text: f"{text[:12]} and on to {len(text)}")
def test_depth_and_length_are_bounded(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(PatternError) as caught:
        parse(text)
    assert time.monotonic() - started < 10
    assert len(str(caught.value)) < 1000, "the message must not repeat the whole text"


WITH_A_NUMBER = [
    *("window({})", "window(0, {})", "window(1, dilation={})", "window({0}, {0}, dilation={0})", "longformer(2, dilation={})"),
    *("strided({})", "strided(3, phase={})", "landmarks({})", "offsets([{0}, -{0}])", "streaming(2, {})"),
    *("blocked_window({}, block=2)", "blocked_window(1, block={})", "random_keys(1, seed={})", "random_blocks(1, block={})"),
    *("global_tokens([{}])", "documents(lengths=[{}])", "padding([{}])", "clusters([{}, 0, 0, 0])"),
    *("chosen_blocks([[0]], block={})", "chosen_keys([[{}]])", "blocks([[True]], {})"),
]


@pytest.mark.parametrize("number", [10**12, 2**31, 2**62, 2**63, 10**30])
@pytest.mark.parametrize("text", WITH_A_NUMBER)
def test_huge_numbers_give_a_pattern_or_a_pattern_error(text: str, number: int) -> None:
    """Never an overflow, and never silently another pattern: what is accepted means what it says on a short text."""
    try:
        pattern = parse(text.format(number))
        found = pattern.dense(4)
        count = pattern.count(4)
        rows = pattern._spans(
            Sizes.of(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.arange(4)
        )
    except PatternError:
        return
    assert count == int(found.sum())
    assert torch.equal(rows.mask(), found[0, 0])
    if text == "window({})":
        assert bool(found.all())
    assert parse(repr(pattern)) == pattern


def test_a_union_of_many_reads_back() -> None:
    pattern = fl.window(0)
    for offset in range(150):
        pattern = pattern | fl.offsets([offset])
    assert parse(repr(pattern)) == pattern
    assert Pattern.from_json(pattern.to_json()) == pattern


def test_a_pattern_that_can_be_written_can_be_read() -> None:
    """Whatever depth the parser refuses, what the algebra builds of ordinary size must survive its own text."""
    pattern = fl.window(0)
    for offset in range(400):
        pattern = pattern | fl.offsets([offset])
    assert parse(repr(pattern)) == pattern


def test_names_may_carry_the_module() -> None:
    assert parse("fl.window(3) | farlight.causal()") == fl.window(3) | fl.causal()
    assert parse("fl.presets.star()") == parse("presets.star()") == parse("star()") == fl.presets.star()
    assert parse("  ( window( 3 )\n| causal() )  ") == fl.window(3) | fl.causal()
    assert parse("global_tokens((0, -1))") == fl.global_tokens([0, -1])
    assert parse("window(left=3, right=0)") == fl.window(3, 0)


# ---- JSON ------------------------------------------------------------------------------------------------------------
def as_json(**fields: object) -> str:
    return json.dumps({"farlight": 1, "pattern": "pairs($0)", **fields})


def packed(raw: bytes, shape: list[int], dtype: str = "bool") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data": base64.b64encode(zlib.compress(raw)).decode()}


REFUSED_JSON = [
    ("", r"this is not JSON \(.*\); pass the text that Pattern\.to_json\(\) wrote"),
    ("{", "this is not JSON"),
    ("[" * 100_000, "this is not JSON"),
    ("[]", 'this JSON is not a pattern: an object with "farlight", "pattern"'),
    ("null", "this JSON is not a pattern"),
    ('"window(3)"', "this JSON is not a pattern"),
    ("{}", "this JSON is not a pattern"),
    ('{"farlight": 1, "pattern": 3}', "this JSON is not a pattern"),
    ('{"pattern": "window(3)"}', "this pattern has format None; this version of farlight reads format 1"),
    ('{"farlight": 2, "pattern": "window(3)"}', "this pattern has format 2"),
    ('{"farlight": "1", "pattern": "window(3)"}', "this pattern has format '1'"),
    ('{"farlight": 1, "pattern": "window(3)", "x": 1, "a": 2}', "this JSON pattern has unknown fields: a, x"),
    ('{"farlight": 1, "pattern": "windo(3)"}', "there is no pattern 'windo'"),
    ('{"farlight": 1, "pattern": ""}', "the pattern expression is empty"),
    ('{"farlight": 1, "pattern": "window(3)", "tables": {}}', '"tables" must be a list of objects with dtype, shape and data'),
    ('{"farlight": 1, "pattern": "window(3)", "tables": [3]}', '"tables" must be a list'),
    (as_json(tables=[{"dtype": "bool"}]), '"tables" must be a list'),
    (as_json(), "it is not an expression"),
    (as_json(tables=[packed(b"\1", [1, 1])] * 2), r"does not use each of its 2 tables"),
    (as_json(tables=[packed(b"\1", [1, 1])], pattern="pairs($1)"), "only pattern names, presets"),
    (as_json(tables=[packed(b"\1", [1, 2])]), r"table: the data do not hold the 2 bytes of bool \(1, 2\)"),
    (as_json(tables=[packed(b"\1\1\1", [1, 2])]), "table: the data do not hold the 2 bytes"),
    (as_json(tables=[packed(b"\2", [1, 1])]), "table: a bool table holds bytes other than 0 and 1"),
    (as_json(tables=[packed(bytes(8), [1, 1], "int64")]), r"a bool tensor is needed, but this is a \(1, 1\) int64"),
    (as_json(tables=[packed(b"\1", [1, 1], "uint8")]), "table: dtype 'uint8' is not one of"),
    (as_json(tables=[packed(b"\1", [1, 1]) | {"dtype": ["bool"]}]), "table: dtype"),
    (as_json(tables=[packed(b"\1", [1, 1]) | {"shape": "1"}]), "table: shape '1' is not a list of sizes"),
    (as_json(tables=[packed(b"\1", [1, 1]) | {"data": "???"}]), "table: the data cannot be read"),
    (as_json(tables=[packed(b"\1", [1, 1]) | {"data": base64.b64encode(b"raw").decode()}]), "table: the data cannot be read"),
    (as_json(tables=[packed(b"", [0, 2**62, 2**62])]), "is not that of a tensor"),
    (as_json(tables=[packed(b"", [2**40, 2**40])]), "is not that of a tensor"),
    (as_json(tables=[packed(b"", [1] * 9)]), "is not that of a tensor"),
    (as_json(tables=[packed(b"", [2**40])]), r"needs more than 268,435,456 .*a table of 1,099,511,627,776 bytes.* limit="),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED_JSON, ids=[text[:60] for text, _ in REFUSED_JSON])
def test_json_that_is_not_a_pattern_is_refused(text: str, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        Pattern.from_json(text)


@pytest.mark.parametrize("value", [None, 3, {"farlight": 1}, fl.window(3)], ids=repr)
def test_only_text_is_read_as_json(value: Any) -> None:
    with pytest.raises(PatternError, match="this is not JSON"):
        Pattern.from_json(value)


GREEDY = [
    "offsets(range(100000000000))",
    "documents(lengths=range(100000000000000000000000))",
    "longformer(8, range(1000000000))",
    "window(3) | offsets(range(-9000000000, 5))",
    "global_tokens(range(-1000000000, 1000000000))",
    "presets.bigbird(1000000000)",
    "global_tokens([" + "1," * 1_900_000 + "])",
    "|" * 1_500_000,
]


@pytest.mark.parametrize("text", GREEDY, ids=lambda text: text[:40])
def test_short_texts_do_not_allocate_gigabytes(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PatternError, match="needs more than 268,435,456 bytes of memory|a list of more than 1,048,576"):
            parse(text)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_long_ranges_of_tokens_stay_ranges() -> None:
    tracemalloc.start()
    try:
        for text in (
            "global_tokens(range(1000000000))",
            "presets.streaming(1000000000, 4)",
            "sees_all(range(-900000000, -3, 4))",
        ):
            pattern = parse(text)
            assert parse(repr(pattern)) == pattern == Pattern.from_json(pattern.to_json())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    long = fl.seen_by_all(range(15000, 0, -3))
    assert repr(long) == "seen_by_all(range(3, 15001, 3))"
    assert fl.plan(long, 1, 15001).dense().nonzero()[:, 3].tolist() == list(long.positions or ())
    assert fl.seen_by_all(range(4)).positions == (0, 1, 2, 3)


def test_the_limit_is_of_all_parts_together_and_can_be_raised() -> None:
    mask = torch.arange(4096).view(64, 64) % 3 == 0
    pattern = fl.pairs(mask) | fl.pairs(~mask)
    text = pattern.to_json()
    with pytest.raises(
        PatternError, match=r"more than 8,000 bytes of memory \(a table of 4,096 bytes\).* pass limit=…, a larger"
    ):
        Pattern.from_json(text, limit=8000)
    assert Pattern.from_json(text, limit=16_000) == Pattern.from_json(text, limit=None) == pattern
    with pytest.raises(PatternError, match="offsets of 3,000 numbers"):
        parse("offsets(range(3000))", limit=10_000)
    assert parse("offsets(range(3000))", limit=400_000) == parse("offsets(range(3000))", limit=None) == fl.offsets(range(3000))
    for limit in (-1, 1.5, True, "8"):
        with pytest.raises(PatternError, match="it is a number of bytes"):
            parse("window(3)", limit=limit)  # type: ignore[arg-type]


def test_a_bomb_of_half_a_gigabyte_is_refused_before_it_is_unpacked() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(2**29), 9)).decode()
    text = as_json(tables=[{"dtype": "bool", "shape": [2**14, 2**15], "data": bomb}])
    assert len(text) < 800_000
    tracemalloc.start()
    try:
        with pytest.raises(PatternError, match="needs more than 268,435,456 bytes"):
            Pattern.from_json(text)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_bomb_of_zeros_is_not_unpacked() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(2**28), 9)).decode()
    assert len(bomb) < 2**20
    for shape in ([1, 1], [4, 4], [2**20]):
        started = time.monotonic()
        with pytest.raises(PatternError, match="table: the data do not hold"):
            Pattern.from_json(as_json(tables=[{"dtype": "bool", "shape": shape, "data": bomb}]))
        assert time.monotonic() - started < 1.0


def only_patterns_come_out(text: str) -> Pattern | None:
    try:
        found = Pattern.from_json(text)
    except PatternError:
        return None
    assert isinstance(found, Pattern)
    assert Pattern.from_json(found.to_json()) == found
    return found


FIELDS = st.sampled_from(["farlight", "pattern", "tables", "dtype", "shape", "data"])
WORDS = st.sampled_from(["window(3)", "pairs($0)", "$0", "bool", "int64"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS | st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)


@given(ANYTHING)
def test_random_json(data: object) -> None:
    only_patterns_come_out(json.dumps(data))


@given(
    st.fixed_dictionaries({"farlight": st.just(1), "pattern": ANYTHING}, optional={"tables": st.lists(ANYTHING, max_size=3)})
)
def test_random_json_in_the_right_frame(data: object) -> None:
    only_patterns_come_out(json.dumps(data))


@given(problems(), st.data())
@example((fl.pairs(torch.eye(3) > 0), Sizes.of(3)), None)
def test_damaged_json_gives_an_error_or_a_pattern(problem: tuple[Pattern, Sizes], data: st.DataObject | None) -> None:
    text = problem[0].to_json()
    assert only_patterns_come_out(text) == problem[0]
    if data is None:
        return
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = data.draw(
        st.sampled_from(
            [
                text[:at],
                text[at:],
                text[:at] + text[at + 1 :],
                text[:at] + text[at] + text[at:],
                text[:at] + data.draw(st.characters()) + text[at + 1 :],
            ]
        )
    )
    only_patterns_come_out(damaged)


@given(problems(), st.data())
def test_damaged_tables_give_an_error_or_a_pattern(problem: tuple[Pattern, Sizes], data: st.DataObject) -> None:
    fields = json.loads(problem[0].to_json())
    for table in fields.get("tables", []):
        name = data.draw(st.sampled_from(["dtype", "shape", "data"]))
        table[name] = data.draw(
            {
                "dtype": st.sampled_from(["bool", "int64", "x"]),
                "shape": st.lists(st.integers(-1, 5), max_size=5),
                "data": st.text(max_size=9),
            }[name]
            | ANYTHING
        )
    only_patterns_come_out(json.dumps(fields))


@given(st.text(alphabet="windofulca()[]|&-~,. 0123456789=*'\"$:{}\n\\", max_size=40))
def test_random_text(text: str) -> None:
    with contextlib.suppress(PatternError):
        assert isinstance(parse(text), Pattern)


# ---- the registry ----------------------------------------------------------------------------------------------------
def primitives(kind: type[Atom] = Atom) -> set[str]:
    """The names of the primitive classes of farlight.patterns that are constructors: lower case."""
    names = {kind.__name__} if kind.__module__.startswith("farlight.patterns") and kind.__name__.islower() else set()
    return names.union(*map(primitives, kind.__subclasses__()))


def test_every_primitive_and_preset_is_registered() -> None:
    known = set(constructors())
    assert primitives() | set(CONSTRUCTORS) <= known
    assert {name for preset in fl.presets.__all__ for name in (preset, f"presets.{preset}")} <= known
    assert {"between", "meets", "rooms", "unseen"} <= known


def test_the_registry_refuses_a_second_constructor_of_a_name_and_is_read_only() -> None:
    register(fl.window)  # once more is no contradiction
    with pytest.raises(ValueError, match="another constructor of the name 'window'"):
        register(fl.full, "window")
    with pytest.raises(TypeError):
        constructors()["evil"] = fl.full  # type: ignore[index]
