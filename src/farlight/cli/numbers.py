"""Numbers as people write and read them: `10k` and `1M` as arguments, and counts, times and sizes as short text."""

from __future__ import annotations

import re

from farlight.errors import FarlightError

__all__ = ["bytes_text", "count", "count_text", "factor_text", "seconds_text"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def count(text: str | int) -> int:
    """A whole number: `16384`, `16_384`, `16,384`, `10k`, `1.5M`, `64Ki` (k = 1,000; Ki = 1,024).

    Raises FarlightError: typer, whose `parser` this is, would replace the message of a ValueError.

    >>> [count(text) for text in ("10k", "1.5M", "64Ki", "16_384", "-1")]
    [10000, 1500000, 65536, 16384, -1]
    """
    if isinstance(text, int):
        return text
    plain = text.strip().replace(",", "").replace("_", "")
    match = re.fullmatch(r"([+-]?\d{1,40}(?:\.\d{1,12})?)\s*([kmgKMG]?i?)", plain, re.ASCII)
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise FarlightError(f"{text!r} is not a whole number; write for example 16384, 10k, 1M or 64Ki.")
    whole, _, fraction = match[1].partition(".")
    scaled, size = int(whole + fraction) * unit, int(10 ** len(fraction))
    if scaled % size:
        raise FarlightError(f"{text!r} is not a whole number of anything; write for example 16384, 10k, 1M or 64Ki.")
    return scaled // size


def count_text(number: float) -> str:
    """Three digits and a unit: `2.39 M`.

    >>> count_text(2_390_000), count_text(17)
    ('2.39 M', '17')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def seconds_text(seconds: float) -> str:
    """`3.21 ms`, `1.42 s`, `12.0 min` or `3.5 h`."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.2f} s"


def bytes_text(size: int) -> str:
    """MiB, or GiB with one digit."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def factor_text(factor: float) -> str:
    """`12x` or `1.3x`."""
    return f"{factor:.0f}x" if factor >= 10 else f"{factor:.1f}x"
