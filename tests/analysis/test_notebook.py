"""What notebooks show (`_repr_html_`), and the one-line texts of results that hold many tensors."""

from __future__ import annotations

import base64
import re
import struct
import zlib

import numpy as np
import pages
import pytest
import torch

import farlight as fl
from farlight.analysis.notebook import grid

PATTERNS = [
    fl.window(8) | fl.global_tokens([0, -1]),
    fl.clusters(torch.arange(40) % 3),
    fl.blocks(torch.eye(6, dtype=torch.bool), 5),
    fl.pairs(torch.eye(30, dtype=torch.bool)),
    fl.per_head([fl.window(1), fl.random_keys(2)]),
]


def images(page: str) -> list[np.ndarray]:
    """The palette numbers of each PNG in a page, `(height, width)`."""
    found = []
    for data in re.findall(r"base64,([^\"]+)", page):
        png = base64.b64decode(data)
        width, height = struct.unpack(">II", png[16:24])
        start = png.index(b"IDAT") + 4
        size = struct.unpack(">I", png[start - 8 : start - 4])[0]
        rows = np.frombuffer(zlib.decompress(png[start : start + size]), np.uint8)
        found.append(rows.reshape(height, width + 1)[:, 1:])
    return found


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_pattern_shows_its_matrix(pattern: fl.Pattern) -> None:
    """Of as many tokens as its tables are made for."""
    page = pattern._repr_html_()
    drawn = images(page)
    n = drawn[0].shape[0]
    want = pattern.dense(n, heads=2)[0].numpy()
    assert len(drawn) == (2 if pattern.varies_over_heads else 1)
    for head, picture in enumerate(drawn):
        assert np.array_equal(picture == 255, want[head])
    assert f"{want[0].sum():,} of {n * n:,} links" in page


def test_a_pattern_that_fits_no_size_shows_its_text() -> None:
    both = fl.clusters(torch.arange(40)) & fl.clusters(torch.arange(50))
    assert both._repr_html_().count("<img") == 0
    assert "clusters" in both._repr_html_()


def test_markup_in_a_name_stays_text() -> None:
    assert "<b>" not in grid("<b>", ["<b>"], [["<b>"]], "<b>")


def test_results_are_short_and_have_a_table() -> None:
    q = k = torch.randn(2, 6, 40, 8)
    for value, rows in (
        (fl.retention(q, k, fl.window(3)), 6),
        (fl.fit(q, k, density=0.2), None),
        (fl.smallworld(fl.window(3), 60), 8),
        (fl.reach(fl.window(3), 60, 3), 4),
    ):
        text, page = str(value), value._repr_html_()
        assert "tensor(" not in text + repr(value)
        assert len(text) < 1500
        assert rows is None or page.count("<tr>") - page.count("<thead>") == rows
    alike = fl.fit(q, k, density=0.2, candidates=["window"])
    assert len(str(alike).split("\n")) - 1 == len({repr(head) for head in alike.heads})
    assert len(repr(alike)) < 120


def test_an_audit_has_a_row_for_each_pattern() -> None:
    result, _, _ = pages.audited([fl.window(3)])
    page = result._repr_html_()
    assert "<img" not in page  # the hostile name of its text
    assert f"{result.patterns[0].mass:.1%}" in page
    assert page.count("<tr>") == 2
    assert repr(result).startswith("<Audit of small: 1 patterns, 3 passages")
