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


def models_with_terms() -> dict[str, Any]:
    """Gemma 2 (softcap), BLOOM and MPT (ALiBi) and DeepSeek-V3 (values narrower than keys), equal on every rank."""
    import transformers as hf

    latent = {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    }  # fmt: skip
    few = {"vocab_size": 50, "initializer_range": 0.3}
    torch.manual_seed(0)
    return {
        "Gemma2": hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES | few, attn_logit_softcapping=2.0, sliding_window=6)),
        "BLOOM": hf.BloomForCausalLM(hf.BloomConfig(**few, hidden_size=48, n_layer=2, n_head=6)),
        "MPT": hf.MptForCausalLM(hf.MptConfig(**few, d_model=48, n_layers=2, n_heads=6, max_seq_len=N)),
        "DeepSeek": hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**SIZES, **latent, "head_dim": 8})),
    }


def decoder(**changed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changed}))


def routers_choose_as_in_one_process(rank: int, world: int) -> int:
    """A Llama under routers, joined with its causality: loss and gradients. Returns the routers checked."""
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    layout = Layout.even(N, world, multiple=8)
    tokens = torch.randint(0, 50, (1, N), generator=torch.Generator().manual_seed(2))
    batch, model = fl.hf.sequence_collator(layout, rank)({"input_ids": tokens}), decoder()
    generator = torch.Generator().manual_seed(3)
    centroids = torch.randn(4, 3, 8, generator=generator)
    routers = {
        "TopBlocks": fl.routing.TopBlocks(2, 8, causal=True),
        "LSH": fl.routing.LSH(4, rounds=2) | fl.window(3, 0),
        "KMeans": fl.routing.KMeans(4, 8, 3).eval(),
    }
    with torch.no_grad():
        routers["KMeans"].centroids.copy_(centroids)
    for name, router in routers.items():
        results = []
        for spread in (False, True):
            fl.hf.sparsify(model, router, **({"mesh": mesh, "layout": layout} if spread else {}))
            model.zero_grad()
            loss = model(**(batch if spread else {"input_ids": tokens, "labels": tokens}), use_cache=False).loss
            loss.backward()
            fl.hf.restore(model)
            values = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            for x in values if spread else []:
                dist.all_reduce(x)
                x /= world
            results.append(values)
        for x, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    return len(routers)


def gradients_beside_data_parallelism(rank: int, world: int, kind: str) -> int:
    """Two groups of ranks with texts of their own: the mean over all ranks, by DDP or FSDP2, is the gradient of the mean loss
    of both texts. The mesh is torch's, or that of accelerate's ParallelismConfig. Returns the weights checked.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    if kind == "accelerate":
        from accelerate.parallelism_config import ParallelismConfig

        mesh = ParallelismConfig(dp_shard_size=2, cp_size=world // 2).build_device_mesh("cpu")
        groups, group, everyone = 2, mesh["dp_shard"].get_local_rank(), mesh["dp_shard_cp"]
    else:
        mesh = dist.init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "cp"))
        groups, group = 2, mesh["dp"].get_local_rank()
        everyone = mesh["dp", "cp"]._flatten("everyone")
    pattern = fl.window(8, 0) | fl.seen_by_all([0])
    layout = Layout.even(N, world // 2)
    texts = torch.randint(0, 50, (groups, N), generator=torch.Generator().manual_seed(4))
    whole = fl.hf.sparsify(decoder(), pattern)
    for text in texts:
        (whole(text[None], labels=text[None], use_cache=False).loss / groups).backward()
    model = fl.hf.sparsify(decoder(), pattern, mesh=mesh["cp"], layout=layout)
    if kind != "DDP":
        for layer in model.model.layers:
            fully_shard(layer, mesh=everyone)
        trained = fully_shard(model, mesh=everyone)
    else:
        trained = DistributedDataParallel(model, process_group=everyone.get_group())
    batch = fl.hf.sequence_collator(layout, mesh["cp"].get_local_rank())({"input_ids": texts[group : group + 1]})
    trained(**batch, use_cache=False).loss.backward()
    expected = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        torch.testing.assert_close(grad, expected[name].grad, rtol=2e-3, atol=2e-5)
    return len(expected)


def losses_and_gradients_are_those_of_one_process(rank: int, world: int) -> int:
    """The mean over ranks of loss and gradients, as DDP and FSDP take it, equals the whole model's. Returns the models
    checked.
    """
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    tokens = torch.randint(0, 50, (1, N), generator=torch.Generator().manual_seed(1))
    layout = Layout([0, *(N * r // world - 3 for r in range(1, world)), N])
    batch = fl.hf.sequence_collator(layout, rank)({"input_ids": tokens})
    count = 0
    for model in (models() | models_with_terms()).values():
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
