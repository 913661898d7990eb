"""Measured rates: what is measured, that it is kept, and that a file that cannot be read costs no more than measuring again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from farlight import measurements
from farlight.kernels import calibrate, cpu
from farlight.kernels.cost import DEFAULT_RATES, rates_by_threads


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Calibration as users have it, with a cache folder of its own."""
    monkeypatch.setenv("FARLIGHT_CALIBRATE", "1")
    monkeypatch.setenv("FARLIGHT_CACHE", str(tmp_path))
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()
    yield tmp_path
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()


def test_rates_are_measured_on_the_cpu_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_BUDGET", 100.0)  # however busy the machine
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
    rates_by_threads.clear()
    assert calibrate.calibrated() == wanted
    assert len(calls) == 1
    (file,) = folder.glob("rates-*.json")
    file.write_text('{"torch bfloat16": "fast"}', encoding="utf-8")
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()
    assert calibrate.calibrated() == wanted
    assert len(calls) == 2


def test_calibration_can_be_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARLIGHT_CALIBRATE", "0")
    assert calibrate.calibrated() == DEFAULT_RATES
    assert not list(folder.iterdir())


class Clock:
    """Time that passes by calls alone: `by_call(large or tiny)` seconds each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, by_call: Callable[[str, torch.dtype, int], float]) -> None:
        self.now, self.calls = 100.0, 0
        monkeypatch.setattr(calibrate.time, "perf_counter", lambda: self.now)

        def pretend(name: str, dtype: torch.dtype, n: int) -> tuple[Callable[[], None], int]:
            def call() -> None:
                self.calls += 1
                self.now += by_call(name, dtype, n)

            return call, n * n

        monkeypatch.setattr(calibrate, "_sparse", lambda kernel, near, dtype, n: pretend(kernel.__name__, dtype, n))
        monkeypatch.setattr(calibrate, "_dense", lambda dtype, n: pretend("dense", dtype, n))


@pytest.mark.parametrize("seconds", [1e-5, 1e-3, 0.02, 0.3, 45.0])
def test_measuring_ends_with_the_call_in_which_its_time_is_over(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    clock = Clock(monkeypatch, lambda name, dtype, n: seconds if n > 8 else seconds / 100)
    rates = calibrate.measure()
    assert clock.now - 100.0 <= calibrate._BUDGET + seconds
    assert clock.calls
    assert rates.keys() == DEFAULT_RATES.keys()
    if seconds <= 1e-3:
        assert all(rates[key] != DEFAULT_RATES[key] for key in rates if key[0] != "cpu" or cpu.unavailable() is None)
    if seconds >= 0.3:
        assert rates == DEFAULT_RATES


def test_rates_that_are_compared_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, lambda name, dtype, n: 5.0 if (name, dtype) == ("dense", torch.bfloat16) else n * 1e-6)
    rates = calibrate.measure()
    assert all(rates[key] != DEFAULT_RATES[key] for key in rates if key == ("dense", torch.float32))
    assert all(rates[key] == DEFAULT_RATES[key] for key in rates if key[1] == torch.bfloat16)


def test_a_large_call_that_is_no_slower_than_a_tiny_one_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, lambda name, dtype, n: 1e-3)
    assert calibrate.measure() == DEFAULT_RATES


def test_measuring_leaves_the_random_numbers_of_a_program_alone() -> None:
    before = torch.get_rng_state()
    calibrate.measure()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("failing", ["json.dump", "os.replace"])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_no_temporary_file_stays_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    module, name = failing.split(".")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(calibrate, "measure", lambda: dict(DEFAULT_RATES))
    monkeypatch.setattr(getattr(measurements, module), name, fail)
    if isinstance(error, OSError):
        assert calibrate.calibrated() == DEFAULT_RATES
    else:
        with pytest.raises(KeyboardInterrupt):
            calibrate.calibrated()
    assert not list(folder.iterdir())


DAMAGED = {
    "list": "[]",
    "null": "null",
    "number": "3",
    "no dtype": '{"cpu floatx": [1, 1]}',
    "no backend": '{"gpu float32": [1, 1]}',
    "zero": '{"cpu float32": [0, 0]}',
    "negative": '{"cpu float32": [-1, 1]}',
    "not finite": '{"cpu float32": [NaN, 1]}',
    "huge": '{"cpu float32": [' + "9" * 400 + ", 1]}",
    "deep": "[" * 100_000,
    "cut off": '{"cpu float32": [1,',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    wanted = {**DEFAULT_RATES, ("torch", torch.bfloat16): (1.5, 0.25)}
    monkeypatch.setattr(calibrate, "measure", lambda: wanted)
    calibrate.calibrated()
    (file,) = folder.iterdir()
    file.write_text(text, encoding="utf-8")
    calibrate._calibrated.cache_clear()
    rates_by_threads.clear()
    assert calibrate.calibrated() == wanted
    assert calibrate._read(file) == wanted
