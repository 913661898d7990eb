"""Measured rates: what is measured, that it is kept, and that a file that cannot be read costs no more than measuring again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from farlight.kernels import calibrate, cpu
from farlight.kernels.cost import DEFAULT_RATES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Calibration as users have it, with a cache folder of its own."""
    monkeypatch.setenv("FARLIGHT_CALIBRATE", "1")
    monkeypatch.setenv("FARLIGHT_CACHE", str(tmp_path))
    calibrate._calibrated.cache_clear()
    yield tmp_path
    calibrate._calibrated.cache_clear()


def test_rates_are_measured_on_the_cpu_whatever_the_default_device() -> None:
    torch.set_default_device("meta")
    try:
        rates = calibrate.measure()
    finally:
        torch.set_default_device(None)
    assert rates.keys() == DEFAULT_RATES.keys()
    measured = {key for key in rates if key[0] != "cpu" or cpu.unavailable() is None}
    for key in measured:
        rate, fixed = rates[key]
        assert rate > 0, key
        assert 0 < fixed < 1, key
        assert rates[key] != DEFAULT_RATES[key], key


def test_rates_are_measured_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure() -> calibrate.Rates:
        calls.append(1)
        return {**DEFAULT_RATES, ("torch", torch.bfloat16): (1.5, 0.25)}

    monkeypatch.setattr(calibrate, "measure", measure)
    wanted = calibrate.calibrated()
    assert wanted["torch", torch.bfloat16] == (1.5, 0.25)
    calibrate._calibrated.cache_clear()  # as another process
    assert calibrate.calibrated() == wanted
    assert len(calls) == 1
    (file,) = folder.glob("rates-*.json")
    file.write_text('{"torch bfloat16": "fast"}', encoding="utf-8")
    calibrate._calibrated.cache_clear()
    assert calibrate.calibrated() == wanted
    assert len(calls) == 2


def test_calibration_can_be_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARLIGHT_CALIBRATE", "0")
    assert calibrate.calibrated() == DEFAULT_RATES
    assert not list(folder.iterdir())
