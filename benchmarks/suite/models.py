"""Hugging Face's Longformer and BigBird beside themselves with farlight's attention inside: one layer, and a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from farlight.analysis.memory import peak_memory
from farlight.patterns import window
from suite.contenders import DENSE, best_backend, inputs
from suite.fresh import FreshError, fresh_rows
from suite.settings import Box, Settings
from suite.timing import Contender, Timing, interleaved

__all__ = ["model_rows", "whole_model"]

Row = dict[str, Any]
_HEADS, _DIM = 12, 64
_LAYERS = 4
# Seconds that both sides of a whole model take at 4096 tokens, memory included.
_WHOLE_SECONDS = 25.0
# Relative to the largest number; what is faster but other is not worth a row.
_SAME = 1e-4


def model_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """One layer at each length in float32: the module, the same with farlight's attention inside, and the linear projections
    that both compute (timed apart and subtracted); dense attention. Then whole models, time and memory.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        yield {"model": "Longformer, BigBird", "skipped": f"transformers cannot be imported: {error}"}
        return
    for make in (_longformer, _bigbird):
        last, expected = 0, 0.0
        for n in settings.model_lengths:
            expected *= (n / last) ** 2 if last else 1.0
            why = box.refusal(expected)
            if why is not None:
                yield {"measure": "layer", "model": make.__name__.strip("_"), "tokens": n, "skipped": why}
                continue
            row = _row(make(n), n, settings, expected)
            last, expected = n, row.get("module_seconds", 0.0)
            yield row
    for name in ("longformer", "bigbird") if settings.memory else ():
        yield _whole(name, settings, box)


@dataclass(frozen=True)
class _Layer:
    name: str
    theirs: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    projections: Callable[[], Any]


def _row(layer: _Layer, n: int, settings: Settings, expected: float) -> Row:
    qkv = inputs(n, _HEADS, _DIM, torch.float32)
    long = expected > 10
    most = max(1, int(30 / expected)) if long else settings.repeats
    contenders = [
        Contender("module", layer.theirs, most=most, warm=not long),
        Contender("projections", layer.projections),
        Contender("farlight", layer.ours),
        Contender(DENSE, lambda: scaled_dot_product_attention(*qkv), most=1 if n > 8192 else settings.repeats, warm=n <= 8192),
    ]
    with torch.no_grad():
        difference = _difference(layer.theirs(), layer.ours()) if not long else None
        timings = interleaved(contenders, repeats=settings.repeats, budget=25.0)
    row: Row = {"measure": "layer", "model": layer.name, "tokens": n, "dtype": "float32", "backend": _backend(n)}
    errors = [f"{name}: {timing.error}" for name, timing in timings.items() if timing.error]
    if difference is not None:
        row["difference"] = difference
        if difference > _SAME:
            errors.append(f"the outputs differ by {difference:.1e} of the largest")
    if errors:
        return {**row, "error": "; ".join(errors)}
    module, projections, inside = timings["module"], timings["projections"].seconds, timings["farlight"]
    low, middle, high = (max(1e-9, s - projections) for s in (inside.low, inside.seconds, inside.high))
    mine = Timing(middle, low, high, inside.repeats, inside.first)
    theirs = module.seconds - projections
    row |= {"module_seconds": module.seconds, "module_repeats": module.repeats, "inside_seconds": inside.seconds}
    row |= {"projection_seconds": projections, "theirs_seconds": theirs, **mine.row()}
    row |= {"dense_seconds": timings[DENSE].seconds}
    row |= {"times_theirs": theirs / mine.seconds, "times_dense": timings[DENSE].seconds / mine.seconds}
    return row


def _backend(n: int) -> str:
    return best_backend(window(256), n, _HEADS, _DIM, torch.float32)


def _difference(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max() / theirs.abs().max())


def _sizes(layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": _HEADS * _DIM, "num_attention_heads": _HEADS, "num_hidden_layers": layers}
    return {**sizes, "vocab_size": 1000}


def _longformer_config(n: int, layers: int) -> Any:
    from transformers import LongformerConfig

    width = 512 if n >= 1024 else n // 4
    return LongformerConfig(attention_window=[width] * layers, max_position_embeddings=n + 2, **_sizes(layers))


def _longformer(n: int) -> _Layer:
    """Window 512 and 64 global tokens. Its layer projects five times (six with the global queries): all are subtracted."""
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    from farlight.hf.longformer import LongformerAttention

    count = 64 if n >= 1024 else 8
    config = _longformer_config(n, 1)
    layer = LongformerSelfAttention(config, 0).eval()
    inside = LongformerAttention(layer, window(layer.one_sided_attn_window_size), backend=_backend(n))
    hidden = torch.randn(1, n, config.hidden_size)
    is_global = (torch.arange(n) < count)[None]
    mask = torch.where(is_global, 10_000.0, 0.0)
    arguments = {"attention_mask": mask, "is_index_masked": mask < 0, "is_index_global_attn": is_global, "is_global_attn": True}

    def projections() -> list[Tensor]:
        linear = (layer.query, layer.key, layer.value, layer.key_global, layer.value_global)
        return [f(hidden) for f in linear] + [layer.query_global(hidden[:, :count])]

    name = f"Longformer, window {config.attention_window[0]}, {count} global"
    return _Layer(name, lambda: layer(hidden, **arguments)[0], lambda: inside(hidden, **arguments)[0], projections)


def _bigbird_config(n: int, layers: int) -> Any:
    from transformers import BigBirdConfig

    return BigBirdConfig(block_size=64 if n >= 1024 else 16, num_random_blocks=3, max_position_embeddings=n, **_sizes(layers))


def _bigbird(n: int) -> _Layer:
    """Blocks of 64, three random ones. In evaluation mode it draws nothing and reads block 0 three times more."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    from farlight.hf.bigbird import BigBirdAttention

    config = _bigbird_config(n, 1)
    layer = BigBirdBlockSparseAttention(config, seed=0).eval()
    inside = BigBirdAttention(layer, config, backend=_backend(n))
    hidden = torch.randn(1, n, config.hidden_size)
    mask = torch.ones(1, 1, 1, n)
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, n), config.block_size)

    def projections() -> list[Tensor]:
        return [f(hidden) for f in (layer.query, layer.key, layer.value)]

    name = f"BigBird, block {config.block_size}, 3 random"
    return _Layer(
        name, lambda: layer(hidden, band, rows, keys, blocked, blocked)[0], lambda: inside(hidden, mask)[0], projections
    )


def _whole(name: str, settings: Settings, box: Box) -> Row:
    n = settings.model_lengths[0]
    row = {"measure": "whole model", "model": name, "tokens": n, "dtype": "float32"}
    why = box.refusal(_WHOLE_SECONDS * (n / 4096) ** 2)
    if why is not None:
        return {**row, "skipped": why}
    arguments = {"name": name, "tokens": n, "layers": _LAYERS, "repeats": min(3, settings.repeats)}
    try:
        return row | next(fresh_rows("suite.models:whole_model", arguments, limit=max(60.0, box.left)), {})
    except FreshError as error:
        return {**row, "error": str(error)}


def whole_model(name: str, tokens: int, layers: int, repeats: int) -> Iterator[Row]:
    """Seconds of a forward pass and its peak memory (growth of the resident set, bytes), without and with farlight inside."""
    from transformers import BigBirdModel, LongformerModel

    from farlight.hf import bigbird, longformer

    torch.manual_seed(0)
    swap: Any = longformer if name == "longformer" else bigbird
    made: list[nn.Module] = []
    for inside in (False, True):
        torch.manual_seed(0)  # the same weights
        whole: Any = LongformerModel if name == "longformer" else BigBirdModel
        config = _longformer_config(tokens, layers) if name == "longformer" else _bigbird_config(tokens, layers)
        model = whole(config).eval()
        made.append(swap.sparsify(model) if inside else model)
    given: dict[str, Tensor] = {"input_ids": torch.randint(3, 1000, (1, tokens))}
    if name == "longformer":
        given["global_attention_mask"] = (torch.arange(tokens) < 64).long()[None]

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(**given).last_hidden_state
        return out

    outputs, peaks = [], []
    for model in reversed(made):
        run(model)
        with peak_memory() as peak:
            outputs.append(run(model))
        peaks.append(peak)
    timings = interleaved(
        [Contender("farlight", lambda: run(made[1])), Contender("theirs", lambda: run(made[0]))], repeats=repeats
    )
    theirs, ours = timings["theirs"].seconds, timings["farlight"]
    row = {"layers": layers, "difference": _difference(outputs[1], outputs[0]), "theirs_seconds": theirs, **ours.row()}
    row |= {"times_theirs": theirs / ours.seconds, "memory_method": peaks[0].method}
    row |= {"peak_bytes": peaks[0].bytes, "theirs_peak_bytes": peaks[1].bytes}
    if row["difference"] > _SAME * layers:
        row["error"] = f"the outputs differ by {row['difference']:.1e} of the largest"
    yield row
