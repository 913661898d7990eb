"""The passages of several texts, one of each in turn: first halves are fitted to, second halves are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farlight.analysis.passages import cut_passages
from farlight.cli.inputs import read_text
from farlight.errors import ArgumentError

__all__ = ["half_passages", "passages"]

_PLACES = 4


def passages(files: Sequence[Path | None], tokenizer: Any, tokens: int, count: int) -> list[tuple[str, Tensor]]:
    """`count` passages of `tokens` tokens as (name, ids `(1, tokens)`), of each text in turn; None: Python's manual.

    Of each text `_PLACES` places are taken evenly from its second half, whatever `count` is: the first half is left to fits.
    Raises ArgumentError for more passages than places.
    """
    if count > _PLACES * len(files):
        raise ArgumentError(f"passages = {count}: {len(files)} texts have {_PLACES} each; name more texts.")
    by_text: list[tuple[str, Tensor]] = []
    for file in files:
        name, text = read_text(file)
        name = name.split()[0].lower() if file is None else file.stem
        by_text.append((name, cut_passages(text[len(text) // 2 :], tokenizer, tokens, _PLACES, spread=True).ids))
    rows = [
        (f"{name} {number}", ids[number : number + 1])
        for number in range(_PLACES)
        for name, ids in by_text
        if number < len(ids)
    ]
    return [(name, torch.as_tensor(ids)) for name, ids in rows[:count]]


def half_passages(files: Sequence[Path | None], tokenizer: Any, tokens: int, count: int, half: int) -> Tensor:
    """Ids `(count, tokens)` of passages taken evenly from half 0 or 1 of each text, of each text in turn.

    Raises ArgumentError for a count that the texts cannot share evenly.
    """
    if count % len(files):
        raise ArgumentError(f"passages = {count}: {len(files)} texts share them evenly; give a multiple.")
    cut = []
    for _, text in map(read_text, files):
        middle = len(text) // 2
        part = text[middle:] if half else text[:middle]
        cut.append(cut_passages(part, tokenizer, tokens, count // len(files), spread=True).ids)
    return torch.stack(cut, 1).flatten(0, 1)
