"""What else a model or its caller says: losses' keywords, attention probabilities, masks of one row, hybrids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from hf_parity import CACHE
from torch import Tensor

import farlight as fl
from farlight.hf import lengthen, register, sparsify, use_pattern
from farlight.hf.attention_function import attention_forward
from farlight.hf.layers import other_mixers
from farlight.hf.masks import model_mask, tensor_mask
from farlight.hf.probabilities import MAX_TOKENS
from farlight.hf.setting import SETTING, Setting

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CAUSAL = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL | options)).eval()


# ---- keywords of losses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given",
    [
        {"num_items_in_batch": torch.tensor(22)},
        {"shift_labels": torch.nn.functional.pad(IDS, (0, 1), value=-100)[:, 1:].contiguous()},
        {"ignore_index": 5},
    ],
    ids=lambda given: next(iter(given)),
)
def test_keywords_of_a_loss_reach_the_loss_only(given: dict[str, Any]) -> None:
    model = llama()
    expected = model(input_ids=IDS, labels=IDS, **given).loss
    register()
    model.set_attn_implementation("farlight")
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS, **given).loss, expected)


# ---- attention probabilities -------------------------------------------------------------------------------------------
def bert() -> Any:
    torch.manual_seed(0)
    return hf.BertModel(hf.BertConfig(**SMALL)).eval()


def gpt_oss() -> Any:
    torch.manual_seed(0)
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**CAUSAL | more)).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_()
    return model


@pytest.mark.parametrize("make", [bert, llama, gpt_oss])
@torch.no_grad()
def test_probabilities_are_those_of_the_eager_model(make: Callable[[], Any]) -> None:
    model, mask = make(), torch.ones_like(IDS)
    mask[1, :4] = 0
    model.set_attn_implementation("eager")
    theirs = model(input_ids=IDS, attention_mask=mask, output_attentions=True).attentions
    with use_pattern(model, None):
        ours = model(input_ids=IDS, attention_mask=mask, output_attentions=True).attentions
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        rows = mask.bool()[:, None, :].expand(-1, 4, -1)
        torch.testing.assert_close(a[rows], b[rows], rtol=0, atol=1e-5)


@torch.no_grad()
def test_probabilities_under_a_pattern_and_with_caches() -> None:
    model, pattern = sparsify(llama(), fl.window(3)), fl.window(3, 0)
    whole = model(input_ids=IDS, output_attentions=True).attentions
    for weights in whole:
        assert torch.equal(weights > 0, pattern.dense(12).expand(2, 4, -1, -1))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
    for cache in (hf.DynamicCache(config=model.config), hf.StaticCache(config=model.config, max_cache_len=16)):
        for part in IDS.split([7, 5], 1):
            actual = model(input_ids=part, output_attentions=True, **{CACHE: cache}).attentions
        for a, b in zip(actual, whole, strict=True):
            torch.testing.assert_close(a[..., :12], b[:, :, 7:], rtol=0, atol=1e-6)
            assert not a[..., 12:].any()


def test_probabilities_of_a_long_text_are_refused() -> None:
    model = sparsify(lengthen(bert(), MAX_TOKENS + 1), fl.window(2))
    with pytest.raises(fl.UnsupportedError, match=rf"for {MAX_TOKENS + 1} queries .* up to {MAX_TOKENS} tokens only"):
        model(input_ids=torch.ones(1, MAX_TOKENS + 1, dtype=torch.long), output_attentions=True)


# ---- one row for a batch -----------------------------------------------------------------------------------------------
def masked(model: Any, mask: Tensor) -> None:
    model(input_ids=IDS, attention_mask=mask)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sparsify(bert(), fl.window(2)),
        lambda: sparsify(llama(), fl.window(2)),
        lambda: sparsify(hf.LongformerModel(hf.LongformerConfig(attention_window=4, **SMALL))),
        lambda: sparsify(hf.BigBirdModel(hf.BigBirdConfig(block_size=4, num_random_blocks=1, **SMALL))),
    ],
    ids=["BERT", "Llama", "Longformer", "BigBird"],
)
def test_a_mask_of_one_text_for_two_is_refused(make: Callable[[], Any]) -> None:
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 8:] = 0
    with pytest.raises(fl.UnsupportedError, match=r"one row for each text|\(2, 12\)"):
        masked(make(), mask)


def test_masks_of_transformers_are_for_the_whole_batch() -> None:
    with pytest.raises(fl.UnsupportedError, match="the attention_mask of 1 texts for a batch of 2; pass one row"):
        model_mask(2, 5, 5, attention_mask=torch.ones(1, 5))
    own = tensor_mask(torch.ones(1, 1, 5, 7, dtype=torch.bool), 5, 7, batch=3)
    assert own.key_real is not None
    assert own.key_real.shape == (3, 7)
    assert own.query_real is not None
    assert own.query_real.shape == (3, 5)


def test_a_written_mask_with_empty_slots_at_its_end_is_refused_under_a_pattern() -> None:
    mask = fl.causal().dense(3, 8, q_offset=2).expand(2, 1, -1, -1)
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 8, 4)
    module = torch.nn.Identity()
    attention_forward(module, q, k, k, mask)
    module.__dict__[SETTING] = Setting(fl.window(1))
    with pytest.raises(fl.UnsupportedError, match="hides the last of 8 keys from all 3 queries, as a static cache does"):
        attention_forward(module, q, k, k, mask)
    attention_forward(module, q, k, k, fl.causal().dense(3, 8).expand(2, 1, -1, -1))


# ---- hybrids -----------------------------------------------------------------------------------------------------------
TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20,
    "num_hidden_layers": 4,
}  # fmt: skip
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
KINDS = ["linear_attention", "full_attention"] * 2
HYBRIDS: dict[str, tuple[dict[str, Any], set[int], list[int]]] = {
    # options, layers that do not (only) attend, layers of which a mapping may speak
    "Qwen3Next": ({**LINEAR, **EXPERTS, "head_dim": 8}, {0, 1, 2}, [3]),
    "MiniMax": ({"num_local_experts": 2, "head_dim": 8, "layer_types": KINDS}, {0, 2}, [1, 3]),
    "Jamba": ({"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels":
               False, "mamba_d_state": 4}, {0, 2}, [1, 3]),
    "Bamba": ({**MAMBA, "attn_layer_indices": [1, 3]}, {0, 2}, [1, 3]),
    "FalconH1": ({**MAMBA, "mamba_d_ssm": 32, "head_dim": 8}, {0, 1, 2, 3}, [0, 1, 2, 3]),
    "Lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, {0, 2}, [1, 3]),
    "GraniteMoeHybrid": ({**MAMBA, "layer_types": KINDS, "num_local_experts": 2, "num_experts_per_tok": 1,
                          "shared_intermediate_size": 16}, {0, 2}, [1, 3]),
}  # fmt: skip


def hybrid(name: str) -> Any:
    kind = getattr(hf, f"{name}ForCausalLM")
    return kind(kind.config_class(**TINY | HYBRIDS[name][0])).eval()


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_takes_a_mapping_and_no_single_pattern(name: str) -> None:
    model, (_, others, attending) = hybrid(name), HYBRIDS[name]
    assert {int(place.rpartition(".")[2]) for place in other_mixers(model)} == others
    shown = ", ".join(map(str, sorted(others)))
    with pytest.raises(fl.UnsupportedError, match=rf"is a hybrid: in layers {shown} tokens .* for n in .*{attending[-1]}\]"):
        sparsify(model, fl.window(4))
    with pytest.raises(fl.UnsupportedError, match="is a hybrid"), use_pattern(model, fl.routing.TopBlocks(2)):
        pass
    sparsify(model, {number: fl.window(2) for number in attending})
    sparsify(model, None)


@pytest.mark.parametrize("make", [bert, llama, gpt_oss])
def test_models_that_only_attend_are_no_hybrids(make: Callable[[], Any]) -> None:
    assert other_mixers(make()) == {}
