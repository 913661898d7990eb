"""Hugging Face's own sparse attention, Longformer's and BigBird's, beside farlight on the same links."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farlight import presets
from farlight.bench.contenders import DENSE, best_backend, inputs, ours
from farlight.bench.settings import Box, Settings
from farlight.bench.timing import Contender, interleaved
from farlight.patterns.base import Pattern

__all__ = ["model_rows"]

Row = dict[str, Any]
_HEADS, _DIM = 12, 64


def model_rows(settings: Settings, box: Box) -> Iterator[Row]:
    """One layer at each length in float32: the module, its linear projections alone (timed apart and subtracted), farlight with
    the same links, dense attention.
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
                yield {"model": make.__name__.strip("_"), "tokens": n, "skipped": why}
                continue
            row = _row(*make(n), n, settings, expected)
            last, expected = n, row.get("module_seconds", 0.0)
            yield row


def _row(
    model: str,
    module: Callable[[], Any],
    projections: Callable[[], Any],
    pattern: Pattern,
    n: int,
    settings: Settings,
    expected: float,
) -> Row:
    qkv = inputs(n, _HEADS, _DIM, torch.float32)
    backend = best_backend(pattern, n, _HEADS, _DIM, torch.float32)
    long = expected > 10
    most = max(1, int(30 / expected)) if long else settings.repeats
    contenders = [
        Contender("module", module, most=most, warm=not long),
        Contender("projections", projections),
        ours(backend, pattern, *qkv, name="farlight"),
        Contender(DENSE, lambda: scaled_dot_product_attention(*qkv), most=1 if n > 8192 else settings.repeats, warm=n <= 8192),
    ]
    with torch.no_grad():
        timings = interleaved(contenders, repeats=settings.repeats, budget=25.0)
    row: Row = {"model": model, "tokens": n, "dtype": "float32", "backend": backend, "pattern": repr(pattern)}
    errors = [f"{name}: {timing.error}" for name, timing in timings.items() if timing.error]
    if errors:
        return {**row, "error": "; ".join(errors)}
    mine, theirs = timings["farlight"], timings["module"].seconds - timings["projections"].seconds
    row |= {"module_seconds": timings["module"].seconds, "module_repeats": timings["module"].repeats}
    row |= {"projection_seconds": timings["projections"].seconds, "theirs_seconds": theirs, **mine.row()}
    row |= {"dense_seconds": timings[DENSE].seconds}
    row |= {"times_theirs": theirs / mine.seconds, "times_dense": timings[DENSE].seconds / mine.seconds}
    return row


Made = tuple[str, Callable[[], Any], Callable[[], Any], Pattern]


def _longformer(n: int) -> Made:
    """Window 512 and 64 global tokens. Its layer projects five times (six with the global queries): all are subtracted."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    window, count = (512, 64) if n >= 1024 else (n // 4, 8)
    config = LongformerConfig(attention_window=[window], num_hidden_layers=1, hidden_size=768, num_attention_heads=_HEADS)
    layer = LongformerSelfAttention(config, 0).eval()
    hidden = torch.randn(1, n, 768)
    is_global = (torch.arange(n) < count)[None]
    mask = torch.where(is_global, 10_000.0, 0.0)
    nowhere = torch.zeros_like(is_global)

    def module() -> Any:
        return layer(hidden, attention_mask=mask, is_index_masked=nowhere, is_index_global_attn=is_global, is_global_attn=True)

    def projections() -> list[Tensor]:
        linear = (layer.query, layer.key, layer.value, layer.key_global, layer.value_global)
        return [f(hidden) for f in linear] + [layer.query_global(hidden[:, :count])]

    return f"Longformer, window {window}, {count} global", module, projections, presets.longformer(window, range(count))


def _bigbird(n: int) -> Made:
    """Blocks of 64, three random ones. In evaluation mode it draws nothing and reads block 0 three times: the same work,
    without the cost of drawing.
    """
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    block = 64 if n >= 1024 else 16
    config = BigBirdConfig(
        block_size=block, num_random_blocks=3, hidden_size=768, num_attention_heads=_HEADS, max_position_embeddings=n
    )
    layer = BigBirdBlockSparseAttention(config, seed=0).eval()
    hidden = torch.randn(1, n, 768)
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, n), block)

    def module() -> Any:
        return layer(hidden, band, rows, keys, blocked, blocked)

    def projections() -> list[Tensor]:
        return [f(hidden) for f in (layer.query, layer.key, layer.value)]

    return f"BigBird, block {block}, 3 random", module, projections, presets.bigbird(block, 3)
