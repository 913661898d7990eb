"""Arguments of constructors: masks, positions, lengths; patterns with Python's `and`, `or`, `not`; errors of bounded length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_patterns_values import PATTERNS, short

import farlight as fl
from farlight.errors import FarlightError, OperandError, PatternError, shorten, show
from farlight.patterns import CONSTRUCTORS, Pattern
from farlight.routing import TopBlocks, TopKeys

NAMED: dict[str, Callable[[Any], Pattern]] = {
    "global_tokens": fl.global_tokens,
    "sees_all": fl.sees_all,
    "seen_by_all": fl.seen_by_all,
    "longformer": lambda p: fl.presets.longformer(2, p),
}
MASKED = NAMED | {"padding": fl.padding}
BITS = [0, 1, 0, 0, 1, 1, 0, 0]


# ---- masks and positions ---------------------------------------------------------------------------------------------
INTEGERS: dict[str, Callable[[list[int]], Any]] = {
    "int64": torch.tensor,
    "int32": lambda x: torch.tensor(x, dtype=torch.int32),
    "uint8": lambda x: torch.tensor(x, dtype=torch.uint8),
    "numpy": np.array,
    "numpy uint8": lambda x: np.array(x, dtype=np.uint8),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("make", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("bits", [BITS, [0] * 8, [1] * 8, [0, 1, 1]], ids=str)
def test_an_integer_mask_is_not_read_as_positions(name: str, make: Callable[[list[int]], Any], bits: list[int]) -> None:
    with pytest.raises(
        PatternError, match=r"cannot be told apart. For a mask pass \.bool\(\) .+ a list: \.tolist\(\)"
    ) as caught:
        MASKED[name](make(bits))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("make", INTEGERS.values(), ids=INTEGERS)
def test_an_integer_mask_of_two_dimensions_is_refused(name: str, make: Callable[[Any], Any]) -> None:
    with pytest.raises(PatternError, match=r"a 1-D array of whole numbers, the .+, or a mask: \.bool\(\)"):
        MASKED[name](make([BITS, BITS]))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("mask", [torch.tensor(BITS).float(), np.array(BITS, dtype=np.float64)], ids=["torch", "numpy"])
def test_a_mask_of_floats_is_refused_with_a_remedy(name: str, mask: Any) -> None:
    with pytest.raises(PatternError, match=r"\.bool\(\), in numpy \.astype\(bool\)"):
        MASKED[name](mask)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    "make",
    [
        lambda mask: mask,
        lambda mask: mask.numpy(),
        lambda mask: mask.tolist(),
        lambda mask: tuple(mask.tolist()),
        lambda mask: list(mask),
        lambda mask: list(mask.numpy()),
    ],
    ids=["tensor", "array", "list", "tuple", "list of tensors", "list of numpy's"],
)
def test_a_mask_of_booleans_is_a_mask(name: str, make: Callable[[torch.Tensor], Any]) -> None:
    mask = torch.tensor(BITS, dtype=torch.bool)
    for given in (mask, torch.stack((mask, ~mask))):
        if name == "longformer" and given.dim() > 1:
            continue
        wanted = MASKED[name](given)
        assert MASKED[name](make(given)) == wanted
        assert wanted.tables, "read as a mask"
    where = MASKED[name](mask).dense(8)
    positions = [p for p, bit in enumerate(BITS) if bit]
    if name != "padding":
        assert torch.equal(where, MASKED[name](positions).dense(8))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("positions", [[5, 0, -1], [0, 1], [1], [3, 3, 0], [0, 1, 2]], ids=str)
def test_arrays_of_positions_are_positions(name: str, positions: list[int]) -> None:
    wanted = NAMED[name](positions)
    for given in (torch.tensor(positions), np.array(positions), tuple(positions), iter(positions), map(np.int64, positions)):
        if name == "longformer" and not hasattr(given, "__len__"):
            continue
        assert NAMED[name](given) == wanted


def test_a_list_of_integers_is_positions_or_lengths() -> None:
    assert fl.global_tokens([0, 0, 1, 0]) == fl.global_tokens([0, 1])
    assert fl.padding([1, 1, 1, 0]).dense(3, batch=4).sum((1, 2, 3)).tolist() == [3, 3, 3, 0]
    assert fl.padding(torch.tensor([3, 1, 0])) == fl.padding([3, 1, 0])
    assert fl.padding(torch.tensor([1, 0])) == fl.padding([1, 0])
    assert fl.padding(torch.tensor(3)) == fl.padding(np.int64(3)) == fl.padding(3) == fl.padding([3])


# ---- Python's words --------------------------------------------------------------------------------------------------
WORDS: dict[str, Callable[[Any, Any], object]] = {
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a, b: not a,
    "if": lambda a, b: a if a else b,
    "bool": lambda a, b: bool(a),
    "any": lambda a, b: any([a, b]),
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=short)
def test_no_word_of_python_drops_an_operand(pattern: Pattern, word: str) -> None:
    with pytest.raises(OperandError, match=r"neither true nor false .+ Write `&`, `\|` and `~`") as caught:
        WORDS[word](pattern, fl.full())
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, FarlightError)
    assert len(str(caught.value)) < 320


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("router", [TopKeys(2), TopBlocks(2, block=4) | fl.window(1)], ids=["router", "joined"])
def test_no_word_of_python_drops_a_router(router: Any, word: str) -> None:
    with pytest.raises(OperandError, match="a router is neither true nor false"):
        WORDS[word](router, fl.full())


@pytest.mark.parametrize("other", [3, None, "full()", torch.ones(1000)], ids=["int", "None", "str", "tensor"])
def test_only_patterns_are_combined_with_patterns(other: Any) -> None:
    for combine in (lambda p: p | other, lambda p: p & other, lambda p: p - other, lambda p: fl.per_head([p, other])):
        with pytest.raises(OperandError, match="is not a pattern; combine patterns with patterns") as caught:
            combine(fl.causal())
        assert isinstance(caught.value, TypeError)
        assert len(str(caught.value)) < 300


def test_patterns_support_equality_and_identity() -> None:
    patterns = [fl.window(1), fl.full()]
    assert fl.full() in patterns
    assert patterns.index(fl.full()) == 1
    assert {fl.window(1): 3}[copy.copy(patterns[0])] == 3


# ---- errors stay short -----------------------------------------------------------------------------------------------
HUGE: dict[str, Any] = {
    "bool": torch.zeros(3, 9000) > 0,
    "int": torch.arange(18_000).view(2, 9000),
    "bits": torch.zeros(9000, dtype=torch.int64),
    "float": torch.rand(9000),
    "complex": torch.rand(9000) * 1j,
    "five": torch.zeros(1, 2, 3, 4, 5, dtype=torch.int64),
    "array": np.zeros((5, 9000)),
    "objects": np.array([object()] * 5000),
    "list": [[0.5] * 9000] * 2,
    "ragged": [[1] * 9000, [2] * 8000],
    "nested": [[[[[[1]]]]]] * 9000,
    "text": "x" * 9000,
    "texts": ["x" * 9000] * 3,
    "number": 10**9000,
    "negative": -(10**4000),
    "dict": dict.fromkeys(range(900), "y" * 900),
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_no_error_prints_a_whole_value(value: Any) -> None:
    texts: list[tuple[str, str]] = []
    for name in CONSTRUCTORS:
        make = getattr(fl, name)
        for call in (lambda m=make: m(value), lambda m=make: m(value, value), lambda m=make: m(value, block=value)):
            try:
                call()
            except FarlightError as error:
                texts.append((name, str(error)))
            except TypeError as error:  # Python's own: the constructor has no such argument
                if "argument" not in str(error):
                    raise
    assert len(texts) > 10
    assert [(name, len(text), text) for name, text in texts if len(text) > 320] == []


@pytest.mark.parametrize(
    "text", ["x" * 9000, "window(" + "1" * 4000 + ")", "pairs([" + "0.5, " * 9000 + "])", "f" * 9000 + "(1)"]
)
def test_no_error_prints_a_whole_expression(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        fl.parse(text)
    assert len(str(caught.value)) <= 600  # one of them lists the patterns that are known


def test_values_are_shown_shortly() -> None:
    assert show(torch.arange(3)) == "a (3,) int64 tensor [0, 1, 2]"
    assert show(torch.nn.Parameter(torch.zeros(2, 9))) == "a (2, 9) float32 tensor [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, …]"
    assert show(np.arange(8)) == "a (8,) int64 array [0, 1, 2, 3, 4, 5, …]"
    assert show(torch.zeros(4, device="meta")) == "a (4,) float32 tensor"
    assert show("two\nlines") == r"'two\nlines'"
    assert len(show(fl.clusters(torch.arange(9000)))) <= 120
    assert shorten("a  b\n c") == "a b c"
    assert shorten("x" * 10**6, 10) == "x" * 9 + "…"
