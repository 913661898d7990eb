"""Scores as JSON: `{"farlight.score": 1, "terms": [{"term": name, field: value, …}, …]}`.

A tensor is its dtype, shape and values.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farlight.errors import ArgumentError, show
from farlight.score.terms import NAMES, Score, Term, alibi, key_bias, relative, softcap, t5

__all__ = ["from_json", "to_json"]

_MAKERS: dict[str, Callable[..., Score]] = {maker.__name__: maker for maker in (alibi, relative, t5, key_bias, softcap)}
_FIELDS = {NAMES[kind]: {field.name for field in dataclasses.fields(kind)} for kind in NAMES}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def to_json(score: Score) -> str:
    """The score as JSON text."""
    return json.dumps({"farlight.score": 1, "terms": [_packed(term) for term in score.terms]})


def from_json(text: str) -> Score:
    """The score that `to_json` wrote. Raises ArgumentError for anything else."""
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"this is not JSON ({error}); pass the text that Score.to_json() wrote.") from None
    if not isinstance(data, dict) or data.get("farlight.score") != 1 or not isinstance(data.get("terms"), list):
        raise ArgumentError('this JSON is not a score of format 1: an object with "farlight.score": 1 and "terms" is needed.')
    made = [_made(term) for term in data["terms"]]
    if not made:
        raise ArgumentError("this JSON score has no terms.")
    total = made[0]
    for score in made[1:]:
        total = total + score
    return total


def _packed(term: Term) -> dict[str, Any]:
    values = {field.name: getattr(term, field.name) for field in dataclasses.fields(term)}
    packed = {name: _packed_tensor(x) if isinstance(x, Tensor) else x for name, x in values.items()}
    return {"term": NAMES[type(term)], **packed}


def _packed_tensor(x: Tensor) -> dict[str, Any]:
    values = x.detach().double().cpu().reshape(-1).tolist()
    return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "values": values}


def _made(data: Any) -> Score:
    name = data.get("term") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in _MAKERS or set(data) != {"term", *_FIELDS[name]}:
        raise ArgumentError(f"{show(data)} is not a term of a score: one of {', '.join(_MAKERS)} with its fields is needed.")
    fields = {key: _made_tensor(x) if isinstance(x, dict) else x for key, x in data.items() if key != "term"}
    return _MAKERS[name](**fields)


def _made_tensor(data: dict[str, Any]) -> Tensor:
    dtype, shape, values = data.get("dtype"), data.get("shape"), data.get("values")
    if (
        dtype not in _DTYPES
        or not isinstance(shape, list)
        or not all(type(n) is int and n >= 0 for n in shape)
        or not isinstance(values, list)
        or len(values) != math.prod(shape)
        or not all(type(x) in (int, float) for x in values)
    ):
        raise ArgumentError(f"{show(data)} is not a tensor: dtype, shape and as many values as the shape has are needed.")
    return torch.tensor(values, dtype=torch.float64).to(_DTYPES[dtype]).reshape(shape)
