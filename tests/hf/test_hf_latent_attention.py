"""Multi-head latent attention (DeepSeek-V2 and V3): values narrower than keys, computed without padding; parity, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import farlight as fl
from farlight.hf import attention_function

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip


def model_of(name: str, implementation: str) -> Any:
    kind = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES)).eval()
    model.set_attn_implementation(implementation)
    return model


def results(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(tokens).logits
    logits.sin().sum().backward()
    return logits.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_outputs_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fl.hf.register()
    widths = set()

    def spied(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.add((q.shape[3], k.shape[3], v.shape[3]))
        return fl.attention(q, k, v, *args, **kwargs)

    monkeypatch.setattr(attention_function, "attention", spied)
    tokens = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    eager, sparse = model_of(name, "eager"), model_of(name, "farlight")
    (expected, wanted), (actual, found) = results(eager, tokens), results(sparse, tokens)
    assert widths == {(24, 24, 16)}
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.keys() == wanted.keys()
    for parameter, grad in wanted.items():
        assert (found[parameter] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp(min=1e-6), parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_generation(name: str) -> None:
    fl.hf.register()
    tokens = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}
    expected, actual = (model_of(name, implementation).generate(tokens, **options) for implementation in ("eager", "farlight"))
    assert actual.shape == (2, 136)
    assert torch.equal(actual, expected)
