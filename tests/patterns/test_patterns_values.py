"""Value semantics of patterns: equality, hash, immutability, and round trips by repr, JSON, pickle and copy."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from definitions import DEFINED
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import farlight as fl
from farlight.patterns import Pattern, Sizes, parse
from farlight.testing import CASES
from farlight.testing.strategies import problems

PATTERNS = list(dict.fromkeys([d.pattern for d in DEFINED] + [case.pattern for case in CASES]))


def short(pattern: Pattern) -> str:
    return pattern.text if len(pattern.text) < 60 else pattern.text[:57] + "..."


@pytest.mark.parametrize("pattern", PATTERNS, ids=short)
def test_round_trips(pattern: Pattern) -> None:
    for again in (
        parse(repr(pattern)),
        Pattern.from_json(pattern.to_json()),
        pickle.loads(pickle.dumps(pattern)),
        copy.copy(pattern),
        copy.deepcopy(pattern),
        parse(pattern.text, pattern.tables),
    ):
        assert again == pattern
        assert hash(again) == hash(pattern)
        assert repr(again) == repr(pattern)
        assert again.text == pattern.text
        assert type(again) is type(pattern)
        assert len(again.tables) == len(pattern.tables)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again.tables, pattern.tables, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pattern_read_back_has_the_same_pairs(case: object) -> None:
    s: Sizes = case.sizes  # type: ignore[attr-defined]
    pattern: Pattern = case.pattern  # type: ignore[attr-defined]
    shape = {"batch": s.batch, "heads": s.heads, "q_offset": s.q_offset}
    again = parse(repr(pattern))
    assert torch.equal(again.dense(s.n_q, s.n_k, **shape), pattern.dense(s.n_q, s.n_k, **shape))


@given(problems())
def test_random_expressions_round_trip(problem: tuple[Pattern, Sizes]) -> None:
    pattern, _ = problem
    assert parse(repr(pattern)) == pattern
    assert Pattern.from_json(pattern.to_json()) == pattern
    assert repr(parse(repr(pattern))) == repr(pattern)


@given(problems())
def test_brackets_are_written_only_where_they_are_needed(problem: tuple[Pattern, Sizes]) -> None:
    """Taking away any one pair of brackets around an operand either changes the pattern or is not possible."""
    pattern, _ = problem
    text = pattern.text
    for start, mark in enumerate(text):
        if mark != "(" or (start and (text[start - 1].isalnum() or text[start - 1] == "_")):
            continue
        depth, end = 1, start
        while depth:
            end += 1
            depth += {"(": 1, ")": -1}.get(text[end], 0)
        bare = text[:start] + text[start + 1 : end] + text[end + 1 :]
        assert parse(bare, pattern.tables).text != text


EXPRESSIONS = [
    "window(256)",
    "window(3, 0)",
    "window(1, dilation=4)",
    "causal() & (window(127, 0) | strided(128))",
    "window(4) - window(2) - window(1)",
    "window(4) - (window(2) - window(1))",
    "~(window(4) | full())",
    "~window(4) & ~full()",
    "global_tokens(range(64))",
    "global_tokens(range(-64, 64))",
    "global_tokens([0, 7, -1])",
    "random_keys(3, seed=7, causal=True)",
    "random_blocks(3, block=32, seed=1)",
    "strided(4, phase='head')",
    "documents(lengths=[3, 4])",
    "documents(lengths=[[3, 4], [7]])",
    "padding([3, 0])",
    "per_head([window(1), causal() - window(2)])",
    "blocked_window(1, 0, block=16) | landmarks(16, 2) | offsets([-4, 0])",
    "sees_all([0]) | seen_by_all([1])",
    "clusters([[[0, 1, -1]]]) | chosen_keys([[[[0, 1]]]])",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_repr_is_the_expression_that_was_written(text: str) -> None:
    names = {name: getattr(fl, name) for name in fl.patterns.CONSTRUCTORS}
    written = eval(text, {**names, "range": range})
    assert repr(written) == text
    assert parse(text) == written
    assert eval(repr(written), {**names, "range": range}) == written


def test_str_names_the_tables_that_are_too_long_to_read() -> None:
    mask = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    assert str(fl.window(2) | fl.pairs(mask)) == "window(2) | pairs(bool 1 × 1 × 32 × 32)"
    assert parse(repr(fl.window(2) | fl.pairs(mask))) == fl.window(2) | fl.pairs(mask)
    small = fl.clusters([0, 1]) | fl.global_tokens(range(5))
    assert str(small) == repr(small)
    assert "bool 1 × 1 × 32 × 32" in str(fl.smallworld(fl.pairs(mask), 32))
    assert max(map(len, str(fl.reach(fl.pairs(mask), 32, 1)).splitlines())) < 200


def test_equal_patterns_are_written_the_same_way() -> None:
    assert fl.window(4, 4) == fl.window(4)
    assert fl.window(4, dilation=1) == fl.window(4)
    assert fl.global_tokens([3, 1, 3]) == fl.global_tokens((1, 3)) == fl.global_tokens(torch.tensor([1, 3]))
    assert fl.global_tokens(iter([1, 3])) == fl.global_tokens({3, 1})
    assert fl.offsets([2, -1, 2]) == fl.offsets([-1, 2])
    assert fl.documents(lengths=torch.tensor([2, 3])) == fl.documents(lengths=[2, 3])
    assert fl.padding(torch.tensor([2])) == fl.padding([2]) == fl.padding(2)
    assert fl.clusters(torch.tensor([0, 1], dtype=torch.int32)) == fl.clusters([0, 1])
    assert fl.chosen_blocks([[0]], block=4, query_block=4) == fl.chosen_blocks([[0]], block=4)
    assert fl.strided(4, phase=7) == fl.strided(4, phase=3)
    assert fl.window(3) != fl.window(4)
    assert fl.window(3) != "window(3)"
    assert fl.clusters([0, 1]) != fl.clusters([1, 0])
    assert fl.clusters([0, 1]) != fl.chosen_keys([[0, 1]])
    assert fl.pairs(torch.ones(2, 2) > 0) != fl.pairs(torch.ones(1, 2, 2, 2)[:, :1, :1] > 0)
    assert len({fl.window(3), fl.window(3, 3), fl.window(4)}) == 2


def test_patterns_are_immutable() -> None:
    for pattern in (fl.window(3), fl.window(3) | fl.causal(), fl.clusters([0, 1])):
        with pytest.raises(AttributeError, match=r"a pattern is immutable: text cannot be set on .*; build a new pattern"):
            pattern.text = "full()"
        with pytest.raises(AttributeError, match="a pattern is immutable: tables cannot be deleted; build a new pattern"):
            del pattern.tables
    with pytest.raises(AttributeError, match="left cannot be set on window"):
        fl.window(3).left = 5


def test_constructor_arguments_are_copied() -> None:
    labels, mask, positions = torch.tensor([0, 1, 0]), torch.tensor([True, False, False]), [0]
    made = fl.clusters(labels), fl.global_tokens(mask), fl.global_tokens(positions), fl.padding(mask), fl.pairs(mask[None])
    before = [repr(p) for p in made]
    hashes = [hash(p) for p in made]
    labels.fill_(7)
    mask.fill_(True)
    positions.append(2)
    assert [repr(p) for p in made] == before
    assert [hash(p) for p in made] == hashes


def test_strides_of_a_table_do_not_matter() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    for lying in (mask, mask.t().contiguous().t(), torch.zeros(8, 8, dtype=torch.bool)[::2, ::2].logical_or(mask)):
        assert fl.pairs(lying) == fl.pairs(mask)
    assert Pattern.from_json(fl.pairs(mask.t()).to_json()) == fl.pairs(mask.t().contiguous())


def test_hashes_and_reprs_agree_between_processes() -> None:
    """A pattern's text is its identity in a stored plan or a compiled graph: it must not depend on the process."""
    code = "import farlight as fl; p = fl.presets.bigbird(8) | fl.global_tokens({5, 1, 9}); print(repr(p)); print(p.to_json())"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(found) == 1
    assert found.pop().splitlines()[0] == repr(fl.presets.bigbird(8) | fl.global_tokens([1, 5, 9]))


@given(st.lists(st.integers(-(10**6), 10**6), max_size=12))
def test_positions_are_spelled_so_that_they_read_back(positions: list[int]) -> None:
    p = fl.global_tokens(positions)
    assert parse(repr(p)) == p
    assert p.positions is not None
    assert sorted(p.positions) == sorted(set(positions))


def test_a_large_table_is_written_packed_and_reads_back() -> None:
    big = fl.clusters(torch.arange(3000) % 7)
    assert len(repr(big)) < 3000
    assert parse(repr(big)) == big
    both = fl.pairs(torch.eye(40, dtype=torch.bool)) | big | fl.pairs(torch.ones(1, 1, dtype=torch.bool))
    assert parse(repr(both)) == both
    assert len(both.tables) == 3


def test_fake_tensors_of_a_traced_program_are_not_cached() -> None:
    """What a pattern derives from its arguments under a FakeTensorMode must not be used after it."""
    pattern = fl.documents(lengths=[2, 3])
    with FakeTensorMode():
        pattern.dense(5)
    assert pattern.dense(5).sum() == 2 * 2 + 3 * 3
