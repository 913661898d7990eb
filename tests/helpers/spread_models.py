"""Tiny Hugging Face decoders with their sequence over ranks, against the same model in one process; run by `ranks.in_ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import farlight as fl
from farlight.distributed import Layout

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
N = 48


def models() -> dict[str, Any]:
    """Llama, Mistral and Gemma-3 (sliding layers) and GPT-OSS (sliding layers and sinks), equal on every rank."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GptOssConfig,
        GptOssForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )  # fmt: skip

    sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    torch.manual_seed(0)
    return {
        "Llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "Mistral": MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
        "Gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **sliding)),
        "GptOss": GptOssForCausalLM(GptOssConfig(**SIZES, **sliding, num_local_experts=2, num_experts_per_tok=1)),
    }


def losses_and_gradients_are_those_of_one_process(rank: int, world: int) -> int:
    """The mean over ranks of loss and gradients, as DDP and FSDP take it, equals the whole model's. Returns the models
    checked.
    """
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    tokens = torch.randint(0, 50, (1, N), generator=torch.Generator().manual_seed(1))
    layout = Layout([0, *(N * r // world - 3 for r in range(1, world)), N])
    batch = fl.hf.sequence_collator(layout, rank)({"input_ids": tokens})
    count = 0
    for model in models().values():
        for pattern in (None, fl.window(8, 0) | fl.seen_by_all([0])):
            fl.hf.sparsify(model, pattern)
            model.zero_grad()
            whole = model(tokens, labels=tokens, use_cache=False).loss
            whole.backward()
            expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            fl.hf.sparsify(model, pattern, mesh=mesh, layout=layout)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            fl.hf.restore(model)
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / world, whole.detach(), rtol=1e-4, atol=1e-5)
            for n, p in model.named_parameters():
                if n in expected:
                    grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    dist.all_reduce(grad)
                    torch.testing.assert_close(grad / world, expected[n], rtol=2e-3, atol=2e-5)
            count += 1
    return count
