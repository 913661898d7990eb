"""Damaged inputs for readers: bytes changed at random, and JSON values that are valid but of the wrong structure."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

__all__ = ["HOSTILE", "JSON_VALUES", "damaged", "replaced"]

# Inputs that exhaust a recursion limit, a number's range or an encoding.
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\t",
    "a zero byte": b"\0",
    "not UTF-8": b"\xff\xfe\x80",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a lone surrogate": b'{"pattern": "\\ud800", "farlight": 1}',
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "a number": b"3",
    "a huge integer": b"9" * 4000,
    "an integer of too many digits": b"9" * 100_000,
    "an infinite number": b"1e999",
    "NaN": b"NaN",
    "brackets": b"[" * 100_000,
    "closed brackets": b"[" * 900 + b"]" * 900,
    "nested objects": b'{"a":' * 100_000,
    "closed nested objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "parentheses": b"(" * 100_000,
    "signs": b"~" * 100_000 + b"full()",
    "calls": b"window(" * 3_000 + b")" * 3_000,
    "a long sum": b"|".join([b"topkeys(3)"] * 3_000),
}

_EDGES = [0, -1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 5e-324, 1e308, float("inf"), float("nan")]
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.sampled_from(_EDGES) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds after up to four edits: bytes removed, repeated, inserted, changed, or the end cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(1, 12))
        match draw(st.sampled_from(["remove", "repeat", "insert", "change", "cut"])):
            case "remove":
                del data[at : at + size]
            case "repeat":
                data[at:at] = data[at : at + size] * 3
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"-", b"9" * 25, b"null", b"[", b"}"]))
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at:]
    return bytes(data)


@st.composite
def replaced(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds, which are JSON, with a value or an entry somewhere in it replaced by any other JSON value."""
    root = [json.loads(draw(st.sampled_from(seeds)))]
    owner: Any = root
    key: Any = 0
    while isinstance(owner[key], dict | list) and owner[key] and draw(st.booleans()):
        owner = owner[key]
        key = draw(st.sampled_from(sorted(owner) if isinstance(owner, dict) else range(len(owner))))
    owner[key] = draw(JSON_VALUES)
    return json.dumps(root[0]).encode()
