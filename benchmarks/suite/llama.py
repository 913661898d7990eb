"""A whole Llama-shaped model with random weights, dense and sparse: seconds of one pass, both sides timed in turn.

The projections and the MLP are in every figure and are not made faster by sparse attention: a model gains less than its
attention alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import farlight as fl
from suite.settings import Box, Settings
from suite.timing import Contender, interleaved

__all__ = ["llama_rows"]

_DENSE = "sdpa"
_LAYERS = 4
# Seconds of one dense pass at 8192 tokens, forward and backward, on two cores.
_DENSE_SECONDS = 12.0


def llama_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """4 layers of width 512, 8 query heads of 64 on 4 key heads, MLP 1376, float32: under SDPA, under the model's own causal
    mask, and under two streaming patterns; forward (prefill), then forward and backward (a training step).
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        yield {"model": "Llama", "skipped": f"transformers cannot be imported: {error}"}
        return
    n = settings.model_lengths[0] * 2
    patterns: dict[str, fl.Pattern | None] = {_DENSE: None, "causal()": fl.causal()}
    patterns |= {f"streaming(4, {near})": fl.presets.streaming(4, near) for near in (n // 8, n // 32)}
    models = {name: _model(pattern) for name, pattern in patterns.items()}
    ids = torch.randint(1000, (1, n))
    for train in (False, True):
        about = {"model": "Llama", "layers": _LAYERS, "tokens": n, "dtype": "float32"}
        about["pass"] = "forward + backward" if train else "forward"
        why = box.refusal(8 * _DENSE_SECONDS * (n / 8192) ** 2 * (1.0 if train else 0.3))
        if why is not None:
            yield {**about, "skipped": why}
            continue
        contenders = [Contender(name, _pass(model, ids, train)) for name, model in models.items()]
        timings = interleaved(contenders, repeats=3, budget=60.0)
        for name, timing in timings.items():
            row = {**about, "pattern": name, **timing.row()}
            yield row if timing.error else row | {"times_dense": timings[_DENSE].seconds / timing.seconds}


def _model(pattern: fl.Pattern | None) -> Any:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape: dict[str, int] = {"hidden_size": 512, "num_hidden_layers": _LAYERS, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "intermediate_size": 1376, "vocab_size": 1000, "max_position_embeddings": 1 << 20}
    model = LlamaModel(LlamaConfig(**shape))
    model.set_attn_implementation("sdpa")
    return model if pattern is None else fl.hf.sparsify(model, pattern)


def _pass(model: Any, ids: torch.Tensor, train: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(train):
            out = model(input_ids=ids, use_cache=False).last_hidden_state
        if train:
            out.square().mean().backward()

    return run
