"""Pictures: what a pixel holds against the dense pattern, every plot drawn, and `farlight map`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import farlight as fl
from farlight.analysis.graph import path, reach, smallworld
from farlight.analysis.plot import densities, plot_hops, plot_path, plot_pattern, plot_reach
from farlight.cli import main
from farlight.errors import ArgumentError, PatternError
from farlight.patterns import Sizes
from farlight.testing.strategies import patterns

ALL_THREE = fl.window(4) | fl.global_tokens([0]) | fl.random_keys(2)


@pytest.fixture(autouse=True)
def _no_open_figures() -> Iterator[None]:
    yield
    plt.close("all")


def by_blocks(dense: np.ndarray, pixels: int) -> np.ndarray:
    """The mean of the dense pattern over each pixel, one pixel at a time."""
    n = dense.shape[0]
    size = min(n, pixels)
    edge = [r * n // size for r in range(size + 1)]
    return np.array([[dense[edge[r] : edge[r + 1], edge[c] : edge[c + 1]].mean() for c in range(size)] for r in range(size)])


@st.composite
def problems(draw: st.DrawFn) -> tuple[fl.Pattern, Sizes, int, int, int]:
    n = draw(st.integers(1, 60))
    at = Sizes.of(n, batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)))
    pixels = draw(st.integers(1, 70))
    return draw(patterns(at, 4)), at, draw(st.integers(0, at.batch - 1)), draw(st.integers(0, at.heads - 1)), pixels


@given(problems())
@settings(max_examples=60)
def test_a_pixel_is_the_share_of_its_pairs(problem: tuple[fl.Pattern, Sizes, int, int, int]) -> None:
    pattern, at, batch, head, pixels = problem
    dense = pattern.dense(at.n_k, batch=at.batch, heads=at.heads)
    dense = dense[min(batch, dense.shape[0] - 1), min(head, dense.shape[1] - 1)].numpy()
    drawn = densities(pattern, at.n_k, batch=batch, head=head, pixels=pixels)
    assert drawn == pytest.approx(by_blocks(dense, pixels), abs=1e-12)


def test_a_long_text_is_not_squared() -> None:
    """A quarter of a million tokens: 7e10 pairs, of which the picture counts each one."""
    n = 250_000
    pattern = fl.window(100) | fl.global_tokens([0, n // 2]) | fl.random_keys(1)
    drawn = densities(pattern, n, pixels=100)
    assert drawn.shape == (100, 100)
    assert drawn.mean() == pytest.approx(pattern.count(n) / n**2, rel=1e-9)


@pytest.mark.parametrize("n, pixels", [(1, 512), (37, 512), (300, 64)])
def test_pattern_plot(n: int, pixels: int) -> None:
    pattern = fl.window(2) | fl.global_tokens([0])
    ax = pattern.plot(n, pixels=pixels)
    image = ax.images[0]
    want = by_blocks(pattern.dense(n)[0, 0].numpy(), pixels)
    assert np.asarray(image.get_array()) == pytest.approx(want if n <= pixels else want**0.25, abs=1e-12)
    assert image.get_extent() == [-0.5, n - 0.5, n - 0.5, -0.5]
    assert ax.get_ylabel() == "query"
    assert ax.get_title() == "window(2) | global_tokens([0])"
    ax.figure.canvas.draw()


def test_an_axis_that_is_given_is_used() -> None:
    figure, axes = plt.subplots(2, 2)
    world, far = smallworld(ALL_THREE, 200), reach(ALL_THREE, 200, 4)
    assert plot_pattern(ALL_THREE, 200, ax=axes[0, 0]) is axes[0, 0]
    assert world.plot(axes[0, 1]) is axes[0, 1]
    assert far.plot(axes[1, 0]) is axes[1, 0]
    assert path(ALL_THREE, 200, 0, 99).plot(axes[1, 1]) is axes[1, 1]
    figure.canvas.draw()


def test_hops_rise_to_the_share_that_can_be_reached() -> None:
    causal = smallworld(fl.presets.streaming(2, 8), 300)
    ax = plot_hops(causal)
    line = ax.lines[0].get_ydata()
    assert line[0] == 0
    assert line[-1] == pytest.approx(0.5)
    assert "over 300 tokens" in ax.get_title()
    plot_hops(smallworld(fl.window(1), 300)).figure.canvas.draw()
    plot_hops(smallworld(fl.window(0) - fl.full(), 5)).figure.canvas.draw()


def test_reach_shows_mean_and_worst() -> None:
    result = reach(fl.window(5), 300, 8)
    ax = plot_reach(result)
    assert ax.lines[0].get_ydata() == pytest.approx(result.mean)
    assert ax.lines[1].get_ydata() == pytest.approx(result.worst)
    assert ax.get_xlim() == (0, 8)
    plot_reach(reach(fl.window(5), 300, 0)).figure.canvas.draw()


def test_a_path_is_arcs() -> None:
    result = path(ALL_THREE, 1000, 500, 999)
    ax = plot_path(result)
    assert len(ax.patches) == result.layers
    assert {text.get_text() for text in ax.texts} >= {"500", "999", *(hop.rules[0] for hop in result.hops)}
    assert ax.get_title() == f"999 hears of 500 after {result.layers} layers"
    assert plot_path(path(fl.causal(), 9, 8, 0)).get_title() == "0 never hears of 8"
    assert plot_path(path(fl.window(1), 9, 8, 7)).get_title() == "7 hears of 8 after 1 layer"
    assert len(plot_path(path(fl.window(1), 99, 0, 98)).texts) == 2, "of many relays only the ends are named"
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (
            lambda: densities(fl.full(), 9, pixels=0),
            ArgumentError,
            "pixels = 0: a picture needs at least one; the default is 512",
        ),
        (lambda: fl.full().plot(0), ArgumentError, "n = 0: it must be a whole number >= 1"),
        (lambda: fl.padding([9]).plot(3), PatternError, "a length of 9 exceeds the 3 keys"),
        (lambda: fl.full().plot(4, head=-1), ArgumentError, "head = -1: it must be a whole number >= 0"),
    ],
)
def test_errors(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_nothing_optional_is_loaded_until_a_picture_is_drawn() -> None:
    program = (
        "import sys, farlight as fl, farlight.analysis.graph as g, farlight.analysis.plot\n"
        "str(g.smallworld(fl.window(1), 50)), g.path(fl.window(1), 50, 0, 9), g.reach(fl.window(1), 50, 2)\n"
        "print([name for name in ('matplotlib', 'networkx', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(fl.UnsupportedError, match=r"a picture needs matplotlib \(.*\); pip install 'farlight\[plot\]'"):
        fl.full().plot(4)


# ---- farlight map ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["map", *arguments])
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


def test_map_prints_numbers_reach_and_a_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    expression = "window(4) | global_tokens([0])"
    code, out, err = run(capsys, expression, "--tokens", "500", "--from", "250", "--to", "-1", "--png", str(picture))
    assert code == 0, err
    assert out.startswith("window(4) | global_tokens([0]) over 500 tokens (every token)\n")
    assert "average hops" in out
    assert "layer   mean heard of   worst" in out
    path = "499 hears of 250 after 2 layers: 0 hears 250 by global token 0, 499 hears 0 by global token 0."
    assert path in " ".join(out.split())  # lines are wrapped at the width of the screen
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, expression, "--tokens", "500")
    assert code == 0
    assert "hears of" not in out.replace("heard of", "")


def test_map_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "causal() & window(3)", "--tokens", "90", "--json", "--layers", "2", "--from", "9", "--to", "3")
    read = json.loads(out)
    assert code == 0
    assert read["smallworld"]["diameter"] == smallworld(fl.causal() & fl.window(3), 90).diameter
    assert len(read["reach"]["mean"]) == 3
    assert read["path"]["layers"] is None
    assert "path" not in json.loads(run(capsys, "full()", "--tokens", "9", "--json")[1])


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["window(4)", "--tokens", "9", "--from", "2"], "--from and --to belong together: give both positions, or neither."),
        (
            ["window(4)", "--tokens", "9", "--png", "/no/such/folder/a.png"],
            "--png '/no/such/folder/a.png': there is no folder '/no/such/folder'.",
        ),
        (["window(4", "--tokens", "9"], "farlight: "),
        (["window(4)", "--tokens", "9", "--from", "2", "--to", "9"], "target = 9 is not a position in a text of n = 9 tokens"),
        (["window(4)", "--tokens", "0"], "n = 0: it must be a whole number >= 1"),
    ],
)
def test_map_says_what_is_wrong(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert text in err
    assert not out


def test_map_refuses_a_picture_of_an_unknown_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "window(4)", "--tokens", "9", "--png", str(tmp_path / "a.nonsense"))
    assert code == 2
    assert "a.nonsense' cannot be written: Format 'nonsense' is not supported" in err
