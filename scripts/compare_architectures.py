"""Comparison of farlight with the own attention of every model type of the installed transformers.

    python scripts/compare_architectures.py [--store FILE] [model_type …]

Models are tiny, with random weights (small_models.py); inputs are texts, padded on the left, images or sounds. The first output
and the gradients of all weights are compared, under the model's own mask and, where farlight takes it, under `full()`, alone or
for each part or layer. Prints one line for each type:

same            relative difference of the output below 2e-5, of the gradient of every weight below 1e-4; or both below
                1e-7 in float64, where a deep model enlarges the rounding of float32
refused         by farlight, with its reason
not pluggable   none of its attention uses AttentionInterface, which farlight says
DIFFERENT       from its own attention; FAILED: another error than a refusal
not tried       it does not shrink, does not run, lacks a package or needs inputs of another kind

Each runs in a process of its own, within SECONDS of CPU time and GIGABYTES. `--store` appends the results to a file of JSON
lines and skips those that it has, unless they are named: an interrupted run goes on. Exits with 1 when one differs or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import small_models
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

import farlight as fl
from farlight.hf.layers import attention_layers, attention_modules

OF_OUTPUT, OF_GRADIENT, OF_FLOAT64 = 2e-5, 1e-4, 1e-7
SECONDS, GIGABYTES = 120, 4


class Result(NamedTuple):
    """The first output of a model, its real rows where it has one for each token, and the gradients of the weights."""

    out: Tensor
    grads: dict[str, Tensor]


def run(model: Any, given: dict[str, Any]) -> Result:
    """Output and gradients of a random weighting of it. Raises ValueError where the output is not finite."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.enable_grad():
        result = model(**given)
        tensors = result.values() if hasattr(result, "values") else result if isinstance(result, tuple) else (result,)
        out = next(x for x in tensors if isinstance(x, Tensor) and x.is_floating_point())
        out = out if out.dtype == torch.float64 else out.float()
        real = given.get("attention_mask")
        out = out[real.bool()] if real is not None and out.shape[:2] == real.shape else out
        if not bool(out.isfinite().all()):
            raise ValueError("the model's own output is not finite")
        if out.requires_grad:
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
            (out * weights).sum().backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None and x.numel()}
    return Result(out.detach(), grads)


def differences(ours: Result, theirs: Result) -> tuple[float, float]:
    """The largest difference of the output, relative to its largest entry, and of the gradient of any weight, in norm.

    A gradient below a thousandth of the largest (a key's bias has none but rounding) is held to that.
    """
    of_out = float((ours.out - theirs.out).abs().max() / theirs.out.abs().max())
    norms = {name: float(x.double().norm()) for name, x in theirs.grads.items()}
    floor = 1e-3 * max(norms.values(), default=0.0)
    if ours.grads.keys() != theirs.grads.keys():
        return of_out, float("inf")
    pairs = ((float((ours.grads[name] - x).double().norm()), max(norms[name], floor)) for name, x in theirs.grads.items())
    return of_out, max((diff / norm if norm else diff for diff, norm in pairs), default=0.0)


def runnable(name: str) -> tuple[Any, dict[str, Any], Result]:
    """(model, inputs, results of its own attention) of one model type. Raises the error of the first model that was built."""
    errors: dict[str, Exception] = {}
    rejections: list[Exception] = []
    model_class = small_models.class_of(name)
    for config in small_models.configurations(CONFIG_MAPPING[name], rejections):
        try:
            model = small_models.build(model_class, config)
        except Exception as error:
            errors.setdefault("build", error)
            continue
        if not attention_modules(model) and small_models.uses_interface(model_class):  # a hybrid's few layers have none
            rejections.append(LookupError("none of the small models has an attention layer"))
            continue
        try:
            for given in small_models.inputs(model):
                try:
                    return model, given, run(model, given)
                except Exception as error:
                    errors.setdefault("run", error)
        except LookupError as error:
            errors.setdefault("inputs", error)
    raise (*(errors[stage] for stage in ("inputs", "run", "build") if stage in errors), *rejections, LookupError("?"))[0]


def runs(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(words, pattern, backend): the model's own mask, then all pairs, said at once, by parts or by layers."""
    yield "own mask", None, "auto"
    yield "own mask natively", None, "cpu"
    yield "full()", fl.full(), "cpu"
    yield "full() by parts", dict.fromkeys(("encoder", "decoder", "cross"), fl.full()), "cpu"
    with contextlib.suppress(fl.UnsupportedError):
        yield "full() by layers", dict.fromkeys(attention_layers(model), fl.full()), "cpu"
    yield "full(), not natively", fl.full(), "auto"


def results_of(model: Any, given: dict[str, Any]) -> tuple[dict[str, Result], int]:
    """Results by the words of `runs`, and how many layers ran. Raises UnsupportedError of the first run only."""
    results: dict[str, Result] = {}
    layers = 0
    for words, pattern, backend in runs(model):
        calls: list[Any] = []
        try:
            with fl.hf.use_pattern(model, pattern, backend=backend, observer=calls.append):
                results[words] = run(model, given)
        except (fl.UnsupportedError, fl.ArgumentError):
            if not results:
                raise
        layers = max(layers, len({id(call.module) for call in calls}))
        if any(words.startswith("full") for words in results):
            break
    return results, layers


def compare(name: str) -> tuple[str, str]:
    """(verdict, detail) for one model type."""
    try:
        model, given, expected = runnable(name)
    except Exception as error:
        return "not tried", f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:120]}"
    where = f"{type(model).__name__}, {'+'.join(given)}"
    witness, modules = model.config._attn_implementation, len(attention_modules(model))
    try:
        results, layers = results_of(model, given)
    except fl.UnsupportedError as error:
        text = " ".join(str(error).split())
        return ("not pluggable", where) if "does not take its attention from" in text else ("refused", text)
    except Exception as error:
        return "FAILED", f"{type(error).__name__}: {str(error)[:120]}; {where}"
    if not layers:
        return "not tried", f"no attention layer runs on {where}"
    worst = differences_of(results, expected)
    for explanation in () if is_same(worst) else (eager, in_float64, without_padding):
        with contextlib.suppress(Exception):
            again, words = explanation(model, given, results)
            if is_same(again):
                worst, witness = again, f"{witness}, {words}, where {worst[0]:.1e} and {worst[1]:.1e} become these"
                break
    gradient = f"{worst[1]:.1e}" if expected.grads else "none"
    said = f"{worst[0]:.1e}, gradient {gradient}, from {witness}; {layers} of {modules or layers} layers under "
    return "same" if is_same(worst) else "DIFFERENT", said + f"{', '.join(results)}; {where}"


Explained = tuple[tuple[float, float], str]


def eager(model: Any, given: dict[str, Any], results: dict[str, Result]) -> Explained:
    """Differences from the model's eager attention, which may differ from the other in rows that see nothing."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = run(model, given)
    model.set_attn_implementation(before)
    return differences_of(results, expected), "eager"


def without_padding(model: Any, given: dict[str, Any], results: dict[str, Result]) -> Explained:
    """Differences without padding, whose unspecified rows an output may hold that has no row for each token."""
    unpadded = {name: x for name, x in given.items() if name != "attention_mask"}
    return differences_of(results_of(model, unpadded)[0], run(model, unpadded)), "without padding"


def in_float64(model: Any, given: dict[str, Any], results: dict[str, Result]) -> Explained:
    """Differences in float64, infinite above OF_FLOAT64: a deep model enlarges the rounding of float32."""
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    model.double()
    given = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    exactly = differences_of(results_of(model, given)[0], run(model, given))
    return exactly if max(exactly) < OF_FLOAT64 else (math.inf, math.inf), "in float64"


def differences_of(results: dict[str, Result], expected: Result) -> tuple[float, float]:
    """The largest of the differences of several results."""
    pairs = [differences(result, expected) for result in results.values()]
    return max(x for x, _ in pairs), max(x for _, x in pairs)


def is_same(worst: tuple[float, float]) -> bool:
    """Whether output and gradient are within the tolerances; not where one is not a number."""
    return worst[0] < OF_OUTPUT and worst[1] < OF_GRADIENT


def _in_child(name: str, results: Connection) -> None:
    """`compare` within the limits; a process that exceeds them dies or says so."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30, GIGABYTES << 30))
    results.send(compare(name))


def in_bounds(name: str) -> tuple[str, str]:
    """`compare` in a process of its own."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        result: tuple[str, str] = ours.recv()
    except EOFError:
        result = "not tried", f"takes more than {SECONDS} s of CPU time or {GIGABYTES} GB"
    process.join()
    return result


def main() -> int:
    """The exit status: 1 when a model type differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a file of JSON lines to go on from")
    parser.add_argument("names", nargs="*", help="model types; all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # no threads, so that processes can be forked
    stored = options.store.read_text().splitlines() if options.store and options.store.exists() else []
    results = {row["name"]: (row["verdict"], row["detail"]) for row in map(json.loads, stored)}
    for name in options.names or [name for name in sorted(CONFIG_MAPPING_NAMES) if name not in results]:
        verdict, detail = results[name] = in_bounds(name)
        print(f"{name:28} {verdict:14} {detail}", flush=True)
        if options.store:
            with options.store.open("a") as file:
                file.write(json.dumps({"name": name, "verdict": verdict, "detail": detail}) + "\n")
    verdicts = Counter(verdict for verdict, _ in results.values())
    print(f"transformers {transformers.__version__}: {', '.join(f'{n} {v}' for v, n in verdicts.most_common())}")
    return int(verdicts["DIFFERENT"] + verdicts["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
