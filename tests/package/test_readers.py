"""Every reader of text or files, fed with damaged input: a value comes back, or an error of farlight's own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import HOSTILE, damaged, replaced
from hypothesis import given
from hypothesis import strategies as st

import farlight as fl
from farlight.cli import inputs
from farlight.embedding.chapters import split_chapters
from farlight.errors import FarlightError
from farlight.hf.fit_file import read_layers, write_layers
from farlight.kernels import calibrate
from farlight.kernels.cost import DEFAULT_RATES, rates_by_threads
from farlight.kernels.triton import autotune as tuning
from farlight.kernels.triton.configs import Config
from farlight.measurements import read_measurements
from farlight.routing.notation import is_router, read_router

# A regular expression of the user may draw a warning of Python's own.
pytestmark = pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")

CPU = torch.device("cpu")
EXPRESSIONS = [
    b"window(3) | global_tokens([0, -1])",
    b"causal() & (window(64, dilation=2) - strided(4))",
    b"per_head([window(2), random_keys(3, seed=1)]) | blocks([[True, False], [False, True]], 4)",
]
ROUTERS = [
    b"topblocks(share=0.1, block=8) | window(2)",
    b"gist(per_head([topkeys(3), lsh(4, 2, seed=3)]) | causal(), block=16)",
    b"~kmeans(4, seed=1, shared=True) & window(left=5, right=0)",
]
PATTERNS = [fl.parse(text.decode()).to_json().encode() for text in EXPRESSIONS]
FITS = [write_layers({0: fl.window(64), 2: "topblocks(8) | window(16)"}, model={"name": "a"}).encode()]
RATES = [json.dumps({calibrate._name(*key): pair for key, pair in DEFAULT_RATES.items()}).encode()]
CONFIGS = [b'{"fwd bfloat16 64": [128, 64, 4, 3], "dkdv float16 128": [32, 64, 8, 2]}']
TEXTS = ["CHAPTER I\n\nIt began in July. “Why?”\n".encode()]


def as_text(data: bytes) -> str:
    """Text of any bytes: what is not UTF-8 arrives as lone surrogates, as on a command line."""
    return data.decode("utf-8", "surrogateescape")


def in_a_file(data: bytes, folder: Path) -> Path:
    path = folder / "input"
    path.write_bytes(data)
    return path


@dataclass(frozen=True)
class Reader:
    """A reader under test: `read` takes bytes and a folder to write them in; `seeds` are inputs that it accepts."""

    read: Callable[[bytes, Path], Any]
    seeds: list[bytes]
    is_json: bool = False


READERS = {
    "expression": Reader(lambda data, folder: fl.parse(as_text(data)), EXPRESSIONS),
    "pattern JSON": Reader(lambda data, folder: fl.Pattern.from_json(as_text(data)), PATTERNS, True),
    "router": Reader(lambda data, folder: read_router(as_text(data)), ROUTERS + EXPRESSIONS),
    "is router": Reader(lambda data, folder: is_router(as_text(data)), ROUTERS),
    "--pattern": Reader(lambda data, folder: inputs.read_subjects([as_text(data)]), ROUTERS + EXPRESSIONS),
    "fit file": Reader(lambda data, folder: read_layers(in_a_file(data, folder)), FITS, True),
    "fit text": Reader(lambda data, folder: read_layers("{" + as_text(data)[1:]), FITS, True),
    "text file": Reader(lambda data, folder: inputs.read_text(in_a_file(data, folder)), TEXTS),
    "--heading": Reader(lambda data, folder: split_chapters("CHAPTER I\n\nIt.", as_text(data)), [b"(?m)^CHAPTER .{1,9}$"]),
    "rates": Reader(lambda data, folder: read_measurements(in_a_file(data, folder), 2), RATES, True),
    "configurations": Reader(lambda data, folder: read_measurements(in_a_file(data, folder), 4, int), CONFIGS, True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.mark.parametrize("name", READERS)
def test_what_it_should_read_is_read(name: str, folder: Path) -> None:
    for seed in READERS[name].seeds:
        assert READERS[name].read(seed, folder) is not None


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", READERS)
def test_hostile_input(name: str, hostile: str, folder: Path) -> None:
    with contextlib.suppress(FarlightError):
        READERS[name].read(HOSTILE[hostile], folder)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_damaged_bytes(name: str, folder: Path, data: st.DataObject) -> None:
    with contextlib.suppress(FarlightError):
        READERS[name].read(data.draw(damaged(READERS[name].seeds)), folder)


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.is_json])
@given(data=st.data())
def test_json_of_another_structure(name: str, folder: Path, data: st.DataObject) -> None:
    with contextlib.suppress(FarlightError):
        READERS[name].read(data.draw(replaced(READERS[name].seeds)), folder)


# ---- measurements: what cannot be read is measured again ------------------------------------------------------------
STRUCTURES = [
    "[]",
    "null",
    "3",
    "{}",
    '{"cpu floatx": [1, 1]}',
    '{"cpu float32": [0, 0]}',
    "[" * 100_000,
    "\0",
    '{"a b c": [1, 2]}',
]
NOT_RATES = ["9" * 400, "9" * 5000, "true", '"1"', "null", "NaN", "-1", "1e999", "5e-324"]
STRUCTURES += [f'{{"cpu float32": [{value}, 1]}}' for value in NOT_RATES]
STRUCTURES += [
    '{"cpu float32": [1, 1, 1]}',
    '{"cpu float32": {"0": 1, "1": 2}}',
    '{"cpu float32": ' + "[" * 900 + "]" * 900 + "}",
]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Calibration with a cache folder of its own and no timing; a list that grows with each measurement."""
    calls: list[int] = []
    monkeypatch.setenv("FARLIGHT_CALIBRATE", "1")
    monkeypatch.setenv("FARLIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda: calls.append(1) or dict(DEFAULT_RATES))
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()
    yield calls
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()


@pytest.mark.parametrize("text", STRUCTURES, ids=lambda text: text[:40])
def test_rates_of_another_structure_are_measured_again(text: str, measured: list[int], tmp_path: Path) -> None:
    calibrate.calibrated()
    (path,) = tmp_path.glob("rates-*.json")
    written = path.read_bytes()
    path.write_text(text, encoding="utf-8")
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()
    q = torch.randn(1, 4, 300, 64)
    fl.attention(q, q, q, fl.window(60))
    assert calibrate.calibrated() == DEFAULT_RATES
    assert len(measured) == 2
    assert path.read_bytes() == written, "what was measured again is kept again"


def test_rates_that_are_no_file(measured: list[int], tmp_path: Path) -> None:
    calibrate.calibrated()
    (path,) = tmp_path.glob("rates-*.json")
    path.unlink()
    path.mkdir()
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()
    assert calibrate.calibrated() == DEFAULT_RATES
    assert len(measured) == 2
    assert read_measurements(tmp_path / ("a" * 5000), 2) is None
    assert read_measurements(Path("a\0b"), 2) is None


@given(data=st.data())
def test_rates_are_positive_numbers_or_none(folder: Path, data: st.DataObject) -> None:
    rows = read_measurements(in_a_file(data.draw(damaged(RATES) | replaced(RATES)), folder), 2)
    for rate, fixed in (rows or {}).values():
        assert type(rate) is type(fixed) is float
        assert 1e-12 <= min(rate, fixed) <= max(rate, fixed) <= 1e15


@pytest.mark.parametrize("row", ["[128.0, 64, 4, 3]", "[128, 64, 4]", "[true, 64, 4, 3]", "[[128], 64, 4, 3]", "null"])
def test_configurations_of_another_structure_are_not_used(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "triton.json"
    monkeypatch.setattr(tuning, "_path", lambda device: path)
    path.write_text('{"fwd bfloat16 64": [128, 64, 4, 3]}')
    assert tuning._stored(CPU) == {"fwd bfloat16 64": Config(128, 64, 4, 3)}
    path.write_text(f'{{"fwd bfloat16 64": {row}}}')
    assert tuning._stored(CPU) == {}
    tuning._store(CPU, "dkdv bfloat16 64", Config(32, 64, 4, 2))
    assert tuning._stored(CPU) == {"dkdv bfloat16 64": Config(32, 64, 4, 2)}


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from farlight.caching import cache_folder

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FARLIGHT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder().name == "farlight"
