"""Error messages of malformed patterns: the value, the rule, and what to do. One table row per `raise`."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_notation import ATTACKS, REFUSED, REFUSED_JSON

import farlight as fl
from farlight.errors import FarlightError, PatternError
from farlight.patterns import Pattern, parse

BITS = torch.eye(4, dtype=torch.bool)


def dense(pattern: Pattern, n: int = 8, **more: int) -> Callable[[], object]:
    return lambda: pattern.dense(n, **more)


# (bad call, the whole text of the error)
TABLE: list[tuple[Callable[[], object], str]] = [
    # numbers
    (lambda: fl.window(-1), "window: left = -1: it must be a whole number >= 0."),
    (lambda: fl.window(2, -3), "window: right = -3: it must be a whole number >= 0."),
    (lambda: fl.window(2, dilation=0), "window: dilation = 0: it must be a whole number >= 1."),
    (lambda: fl.window(2.0), "window: left = 2.0: a whole number is needed, not float."),
    (lambda: fl.window("2"), "window: left = '2': a whole number is needed, not str."),
    (lambda: fl.window(True), "window: left = True: it must be a whole number >= 0."),
    (
        lambda: fl.window(2**31 + 1),
        "window: left is larger than 2147483648, the largest number possible here; no text is so long.",
    ),
    (
        lambda: fl.offsets(range(2**40)),
        "offsets: a list of more than 1,048,576 entries; pass a tensor, such as a mask or ids.",
    ),
    (
        lambda: fl.seen_by_all(range(2**40)),
        "seen_by_all: a position lies beyond 2147483648; no text is so long.",
    ),
    (
        lambda: parse("full()", limit=-1),
        "limit = -1: it is a number of bytes, a whole number >= 0, or None for no limit.",
    ),
    (
        lambda: parse("offsets(range(1000000000))"),
        "this pattern needs more than 268,435,456 bytes of memory (offsets of 1,000,000,000 numbers); where it comes from a "
        "source that you trust pass limit=…, a larger number of bytes, or None.",
    ),
    (
        lambda: functools.reduce(lambda one, _: ~one, range(201), fl.full()),
        "this pattern is nested 201 deep, more than 200; write a | b | c, whose parts stand side by side, in place of "
        "a | (b | (c | …)).",
    ),
    (
        lambda: functools.reduce(operator.and_, [fl.full()] * 1025),
        "this pattern joins 1025 parts by '&', more than 1024; name many tokens or distances in one part, as in offsets([…]) "
        "or global_tokens([…]).",
    ),
    (lambda: fl.strided(0), "strided: stride = 0: it must be a whole number >= 1."),
    (lambda: fl.strided(3, phase=-1), "strided: phase = -1: it must be a whole number >= 0."),
    (lambda: fl.strided(3, phase="tail"), "strided: phase = 'tail': a whole number is needed, not str."),
    (lambda: fl.blocked_window(1, block=0), "blocked_window: block = 0: it must be a whole number >= 1."),
    (lambda: fl.blocked_window(-1), "blocked_window: left = -1: it must be a whole number >= 0."),
    (lambda: fl.landmarks(0), "landmarks: every = 0: it must be a whole number >= 1."),
    (lambda: fl.landmarks(3, 0), "landmarks: count = 0: it must be a whole number >= 1."),
    (lambda: fl.landmarks(3, 4), "landmarks: count = 4 exceeds every = 3; at most every token can be a landmark."),
    (lambda: fl.offsets([1.5]), "offsets: value = 1.5: a whole number is needed, not float."),
    (lambda: fl.random_keys(-1), "random_keys: count = -1: it must be a whole number >= 0."),
    (lambda: fl.random_keys(3, seed=-1), "random_keys: seed = -1: it must be a whole number >= 0."),
    (lambda: fl.random_blocks(3, block=0), "random_blocks: block = 0: it must be a whole number >= 1."),
    (lambda: fl.blocks(BITS, 0), "blocks: block = 0: it must be a whole number >= 1."),
    (lambda: fl.chosen_blocks([[0]], block=0), "chosen_blocks: block = 0: it must be a whole number >= 1."),
    (
        lambda: fl.chosen_blocks([[0]], block=1, query_block=0),
        "chosen_blocks: query_block = 0: it must be a whole number >= 1.",
    ),
    # positions
    (lambda: fl.global_tokens(3), "global_tokens(3): give a list of positions such as [0, -1], a range, or a bool mask."),
    (lambda: fl.sees_all("3"), "sees_all('3'): give a list of positions such as [0, -1], a range, or a bool mask."),
    (lambda: fl.seen_by_all([0.5]), "seen_by_all: position 0.5 is not a whole number; give integers or a bool mask."),
    (
        lambda: fl.global_tokens(torch.tensor([0.5])),
        "global_tokens(a (1,) float32 tensor [0.5]): give a 1-D array of whole numbers, the positions, or a mask: .bool(), "
        "in numpy .astype(bool).",
    ),
    (lambda: fl.global_tokens([2**40]), "global_tokens: a position lies beyond 2147483648; no text is so long."),
    (
        lambda: fl.sees_all(torch.tensor([0, 0, 1])),
        "sees_all(a (3,) int64 tensor [0, 0, 1]): zeros and ones are a mask or positions, which cannot be told apart. For a "
        "mask pass .bool() (numpy: .astype(bool)), for positions a list: .tolist().",
    ),
    (dense(fl.seen_by_all(torch.ones(7) > 0)), "seen_by_all: the mask has 7 tokens, but there are 8 keys; they must agree."),
    (
        dense(fl.sees_all(torch.ones(7) > 0), 9, n_k=8),
        "sees_all: mask: it has 7 rows, but there are 9 queries and 8 positions; give 9 rows, one for each query, or 8, "
        "one for each position.",
    ),
    (
        dense(fl.global_tokens(torch.ones(3, 8) > 0), batch=2),
        "global_tokens: mask: its batch dimension is 3, but the batch is 2; use 1 or 2.",
    ),
    # documents and padding
    (lambda: fl.documents(cu_seqlens=[1, 2]), "documents: cu_seqlens = [1, 2] must begin with 0 and never fall."),
    (lambda: fl.documents(), "documents: give one of ids (one for each token), lengths=[…] and cu_seqlens=[0, …]."),
    (
        lambda: fl.documents([0], lengths=[1]),
        "documents: give one of ids (one for each token), lengths=[…] and cu_seqlens=[0, …].",
    ),
    (lambda: fl.documents(lengths=[3, -1]), "documents: length = -1: it must be a whole number >= 0."),
    (dense(fl.documents([0] * 7)), "documents: 7 ids for 8 tokens; give one for each token."),
    (dense(fl.documents(lengths=[5, 4])), "documents: the lengths add up to 9, more than the 8 tokens of the text."),
    (
        dense(fl.documents(lengths=[[5], [4]]), batch=3),
        "documents: 2 lists of lengths for a batch of 3; give one, or one for each.",
    ),
    (
        dense(fl.documents(torch.zeros(2, 8, dtype=torch.int64)), batch=3),
        "documents: ids: its batch dimension is 2, but the batch is 3; use 1 or 3.",
    ),
    (lambda: fl.padding([]), "padding: no length was given; give one for each batch item."),
    (lambda: fl.padding([-1]), "padding: length = -1: it must be a whole number >= 0."),
    (dense(fl.padding([3, 4]), batch=3), "padding: 2 lengths for a batch of 3; give one for each batch item."),
    (dense(fl.padding([9])), "padding: a length of 9 exceeds the 8 keys that there are."),
    (dense(fl.padding(torch.ones(1, 7) > 0)), "padding: the mask has 7 keys, but there are 8; they must agree."),
    # tables
    (
        lambda: fl.pairs(torch.ones(4, 4)),
        "pairs: mask: a bool tensor is needed, but this is a (4, 4) float32 tensor [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, …]; pass "
        ".bool() of it.",
    ),
    (
        lambda: fl.clusters([0.5]),
        "clusters: query_labels: an integer tensor is needed, but this is a (1,) float32 tensor [0.5]; pass .long() of it.",
    ),
    (
        lambda: fl.clusters([True]),
        "clusters: query_labels: an integer tensor is needed, but this is a (1,) bool tensor [True]; pass .long() of it.",
    ),
    (
        lambda: fl.pairs(BITS.view(1, 1, 1, 4, 4)),
        "pairs: mask: shape (1, 1, 1, 4, 4) has 5 dimensions, at most 4 are possible.",
    ),
    (lambda: fl.clusters(3), "clusters: query_labels: shape () has 0 dimensions, at most 3 are possible."),
    (dense(fl.pairs(BITS), 4, n_k=5), "pairs: the mask has 4 columns, but there are 5 keys; they must agree."),
    (
        dense(fl.pairs(BITS[:3]), 4),
        "pairs: mask: it has 3 rows, but there are 4 queries and 4 positions; "
        "give 4 rows, one for each query, or 4, one for each position.",
    ),
    (
        dense(fl.pairs(BITS.expand(3, 4, 4)), 4, heads=2),
        "pairs: mask: its head dimension is 3, but there are 2 heads; use 1 or 2.",
    ),
    (dense(fl.blocks(BITS[:, :3], 2)), "blocks: the layout has 3 columns, but 8 keys make 4 blocks of 2."),
    (
        dense(fl.blocks(BITS[:3], 2), 8, n_k=8),
        "blocks: layout: it has 3 rows (blocks of 2), but there are 8 queries and 8 positions; "
        "give 4 rows, one for each query, or 4, one for each position.",
    ),
    (dense(fl.clusters([0] * 4), 4, n_k=9), "clusters: 4 key labels for 9 keys; give key_labels with one for each key."),
    (
        dense(fl.chosen_blocks([[0], [4]], block=4)),
        "chosen_blocks: indices: 4 is not one of the 2 key blocks; use 0 … 1, or -1 for none.",
    ),
    (
        dense(fl.chosen_keys([[0]] * 7 + [[-2]])),
        "chosen_keys: indices: -2 is not one of the 8 keys; use 0 … 7, or -1 for none.",
    ),
    # heads and sizes
    (lambda: fl.per_head([]), "per_head needs a list with one pattern for each head; it was given none."),
    (lambda: fl.per_head(fl.full()), "per_head needs a list with one pattern for each head; it was given none."),  # type: ignore[arg-type]
    (
        dense(fl.per_head([fl.full()] * 3), heads=2),
        "per_head was given 3 patterns, but there are 2 heads; give one pattern for each.",
    ),
    (dense(fl.full(), -1), "n_q = -1: a number of tokens cannot be negative; pass n_q >= 0."),
    (dense(fl.full(), 3, n_k=-2), "n_k = -2: a number of tokens cannot be negative; pass n_k >= 0."),
    (dense(fl.full(), 3, batch=0), "batch = 0: there must be at least one; pass batch >= 1."),
    (lambda: fl.full().count(3, heads=0), "heads = 0: there must be at least one; pass heads >= 1."),
    (lambda: fl.full().allows(3, 0, 3), "i = 3 is not a position in a text of n = 3 tokens; use 0 … 2."),
    (lambda: fl.full().allows(0, -1, 3), "j = -1 is not a position in a text of n = 3 tokens; use 0 … 2."),
    # presets
    (lambda: fl.presets.longformer(511), "longformer: window = 511 is odd; it is the total of both sides, so make it even."),
    (lambda: fl.presets.longformer(-2), "longformer: window = -2: it must be a whole number >= 0."),
    (lambda: fl.presets.bigbird(0), "bigbird: block = 0: it must be a whole number >= 1."),
    (lambda: fl.presets.etc(3, -1), "etc: global_count = -1: it must be a whole number >= 0."),
    (lambda: fl.presets.sparse_transformer(0), "sparse_transformer: stride = 0: it must be a whole number >= 1."),
    (
        lambda: fl.presets.sparse_transformer(8, "both"),
        'sparse_transformer: kind = \'both\' is unknown; use "strided" or "fixed".',
    ),
    (
        lambda: fl.presets.sparse_transformer(8, "fixed", 9),
        "landmarks: count = 9 exceeds every = 8; at most every token can be a landmark.",
    ),
    (lambda: fl.presets.longnet([4, 8], [1]), "longnet: 2 segment lengths and 1 dilations; give one dilation for each length."),
    (lambda: fl.presets.longnet([], []), "longnet: 0 segment lengths and 0 dilations; give one dilation for each length."),
    (lambda: fl.presets.streaming(4, 0), "streaming: window = 0: it must be a whole number >= 1."),
    (lambda: fl.presets.streaming(-1, 4), "streaming: sinks = -1: it must be a whole number >= 0."),
]


@pytest.mark.parametrize(("call", "text"), TABLE, ids=[text[:60] for _, text in TABLE])
def test_the_whole_text(call: Callable[[], object], text: str) -> None:
    with pytest.raises(PatternError, match=f"^{re.escape(text)}$") as caught:
        call()
    assert isinstance(caught.value, FarlightError)
    assert isinstance(caught.value, ValueError)


# The rest of the message is the words of another library.
ALSO: list[tuple[Callable[[], object], str]] = [
    (lambda: fl.seen_by_all(range(0, 10**9, 2)).count(10**9), r"500,000,000 separate positions .+ pass a bool mask"),
    (lambda: fl.padding(torch.empty(1, dtype=torch.int64, device="meta")).count(4), r"^padding was made from a tensor without"),
    (lambda: fl.clusters([[1], [2, 3]]), r"^clusters: query_labels: cannot be read as a tensor \(.+\); pass a torch tensor\.$"),
    (lambda: fl.pairs(object()), r"^pairs: mask: cannot be read as a tensor \(.+\); pass a torch tensor\.$"),
    (lambda: fl.KVCache(fl.global_tokens([-1])), r", but this text has no known length: .+ Give max_length=…, "),
]


@pytest.mark.parametrize(("call", "text"), ALSO)
def test_the_text_around_a_cause(call: Callable[[], object], text: str) -> None:
    with pytest.raises(PatternError, match=text):
        call()


WRONG_KIND: list[tuple[Callable[[], object], str]] = [
    (lambda: fl.offsets(3), "offsets"),
    (lambda: fl.documents(lengths=3), "documents"),
    (lambda: fl.documents(lengths=[1, [2]]), "documents"),
    (lambda: fl.padding(None), "padding"),
    (lambda: fl.padding(2.5), "padding"),
    (lambda: fl.per_head(None), "per_head"),
    (lambda: fl.presets.longnet(4, 2), "longnet"),
    (lambda: fl.presets.longformer(8, 0), "longformer"),
]


@pytest.mark.parametrize(
    ("call", "name"),
    WRONG_KIND,
    ids=["offsets", "documents", "documents, mixed", "padding", "padding, float", "per_head", "longnet", "longformer"],
)
def test_an_argument_of_the_wrong_kind_names_the_pattern(call: Callable[[], object], name: str) -> None:
    with pytest.raises(PatternError, match=f"^{name}"):
        call()


def test_a_list_of_booleans_is_a_mask_or_an_error_but_not_positions() -> None:
    """`[True, False, True]` must not silently mean the positions 0 and 1."""
    for mask in ([True, False, True, False], np.array([True, False, True, False])):
        try:
            found = fl.global_tokens(mask).dense(4)
        except PatternError:
            continue
        assert torch.equal(found, fl.global_tokens(torch.tensor(mask)).dense(4))
    assert torch.equal(parse("sees_all([True, False, True])").dense(3), fl.sees_all([0, 2]).dense(3))


# ---- every place that raises is in a table ---------------------------------------------------------------------------
# The primitives of routers have their tables in tests/routing/test_routing_errors.py, converters, intervals and grids in
# test_converters.py and test_grid.py.
_ELSEWHERE = ("membership.py", "multi_label.py", "uncovered.py", "converters.py", "intervals.py", "grid.py")
SOURCES = [path for path in Path(inspect.getfile(Pattern)).parent.glob("*.py") if path.name not in _ELSEWHERE]


def raising_lines() -> set[tuple[str, int, int]]:
    """(file, first line, last line) of each `raise PatternError(…)`."""
    out = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and getattr(node.exc.func, "id", "") == "PatternError"
            ):
                out.add((path.name, node.lineno, node.end_lineno or node.lineno))
    return out


def test_every_raise_has_a_row() -> None:
    deep = ["[" * 90 + "]" * 90, "per_head([" * 150 + "full()" + "])" * 150, "full()" + "()" * 400]
    texts = [text for text, _ in REFUSED] + ATTACKS + deep + [" " * 5_000_000 + "x"]
    calls = [call for call, _ in TABLE + ALSO]
    calls += [lambda text=text: parse(text) for text in texts]  # type: ignore[misc]
    calls += [lambda text=text: Pattern.from_json(text) for text, _ in REFUSED_JSON]  # type: ignore[misc]
    hit = set()
    for call in calls:
        try:
            call()
        except PatternError as error:
            trace = error.__traceback__
            while trace is not None:
                hit.add((Path(trace.tb_frame.f_code.co_filename).name, trace.tb_lineno))
                trace = trace.tb_next
    missed = [
        f"{name}:{first}"
        for name, first, last in sorted(raising_lines())
        if not any((name, line) in hit for line in range(first, last + 1))
    ]
    assert not missed, f"raised by no row of the tables: {missed}"
