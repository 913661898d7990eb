"""Real architectures with random weights: under farlight they compute what they compute with transformers' own attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import farlight as fl
from farlight.hf import use_pattern
from farlight.hf.layers import attention_layers

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # far from uniform attention, so that a link more or less shows
    "pad_token_id": 0,
}
CAUSAL = SMALL | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
HEADS = CAUSAL | {"head_dim": 8, "tie_word_embeddings": False}
SLIDING = HEADS | {"sliding_window": 5}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
DEEPSEEK = CAUSAL | EXPERTS | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_n_heads": 16, "index_head_dim": 8, "index_topk": 12, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "n_shared_experts": 1,
}  # fmt: skip
MINIMAX = HEADS | EXPERTS | {
    "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 3, "rotary_dim": 4,
    "dense_intermediate_size": 48, "shared_intermediate_size": 16, "layer_types": ["full_attention", "minimax_m3_sparse"],
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 512} | {
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODERN = SMALL | {"num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model class by name, its configuration, and transformers' own implementation that it is held against."""

    name: str
    options: dict[str, Any]
    witness: str = "sdpa"

    @property
    def causal(self) -> bool:
        return self.name.endswith("ForCausalLM") or self.name == "GPT2LMHeadModel"

    def keeps(self, pattern: fl.Pattern | None) -> bool:
        """Whether the model is the same under this pattern: an encoder that only looks back is another model."""
        return self.causal or pattern != fl.causal()

    def make(self, **more: Any) -> Any:
        torch.manual_seed(0)
        kind = getattr(hf, self.name)
        model = kind(kind.config_class(**self.options | more)).eval()
        for name, weights in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(weights, std=2.0)
        model.set_attn_implementation(self.witness)
        return model


# sdpa of DeepSeek-V3.2 in transformers 5.16 adds a bool mask to the scores of its indexer: it is not causal there.
CASES = {
    "BERT": Case("BertModel", SMALL),
    "RoBERTa": Case("RobertaModel", SMALL),
    "ModernBERT": Case("ModernBertModel", MODERN),
    "GPT-2": Case("GPT2LMHeadModel", GPT2),
    "Llama": Case("LlamaForCausalLM", CAUSAL),
    "Mistral": Case("MistralForCausalLM", SLIDING),
    "Qwen2": Case("Qwen2ForCausalLM", SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3": Case("Qwen3ForCausalLM", HEADS),
    "Gemma": Case("GemmaForCausalLM", HEADS),
    "Gemma 2": Case("Gemma2ForCausalLM", MIXED | {"attn_logit_softcapping": 2.0}, "eager"),
    "Gemma 3": Case("Gemma3ForCausalLM", MIXED),
    "GPT-OSS": Case("GptOssForCausalLM", MIXED | EXPERTS | {"rope_parameters": ROPE}, "eager"),
    "DeepSeek-V3.2": Case("DeepseekV32ForCausalLM", DEEPSEEK, "eager"),
    "DeepSeek-V3.2, wide values": Case("DeepseekV32ForCausalLM", DEEPSEEK | {"v_head_dim": 16}, "eager"),
}  # fmt: skip
# Its indexer does not know padding, so that with padding on the left it is another model in a batch than alone.
MORE = CASES | {"MiniMax-M3": Case("MiniMaxM3VLTextModel", MINIMAX)}
DECODERS = {name: case for name, case in CASES.items() if case.causal}


def ids(batch: int = 2, n: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (batch, n), generator=torch.Generator().manual_seed(seed))


def first(model: Any, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, **options)[0]
    return out


def close(a: Tensor, b: Tensor, relative: float = 1e-5) -> None:
    assert a.isfinite().all()
    assert (a - b).abs().max() <= relative * b.abs().max()


# ---- parity ----------------------------------------------------------------------------------------------------------
# Models whose queries choose key blocks, those of the padding too: what else a tile of rows visits decides in which order the
# sums of its real rows are formed, so that their last bits may change with the padding.
CHOOSING = {"MiniMax-M3"}


@pytest.mark.parametrize(
    "name, pattern, side",
    [
        (name, pattern, side)
        for name, case in MORE.items()
        for pattern in (None, fl.full(), fl.causal())
        for side in ("none", "left", "right")
        if case.keeps(pattern) and (name in CASES or side != "left")
    ],
)
def test_a_model_computes_what_it_always_did(name: str, pattern: fl.Pattern | None, side: str) -> None:
    model, tokens = MORE[name].make(), ids()
    real = torch.ones(2, 24, dtype=torch.bool)
    if side != "none":
        real[1, slice(0, 7) if side == "left" else slice(17, 24)] = False
    expected = first(model, tokens, real.long())
    with use_pattern(model, pattern):
        actual = first(model, tokens, real.long())
        close(actual[real], expected[real])
        tokens[~real] = 7
        changed = first(model, tokens, real.long())
    if name in CHOOSING:
        close(changed[real], actual[real])
    else:
        assert torch.equal(changed[real], actual[real])


@pytest.mark.parametrize("name", MORE)
def test_gradients_are_those_of_the_model(name: str) -> None:
    """Every parameter, the sinks included, against transformers' eager attention."""
    model, tokens = MORE[name].make(), ids()
    weights = torch.randn(*first(model, tokens).shape, generator=torch.Generator().manual_seed(1))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        (model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0] * weights).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.set_attn_implementation("eager")
    expected = gradients()
    with use_pattern(model, None):
        actual = gradients()
    assert actual.keys() == expected.keys()
    for which, gradient in expected.items():
        # Summed over many tokens, a bias of the keys has the gradient zero but for rounding.
        size = max(float(gradient.abs().max()), 1e-2 * max(float(g.abs().max()) for g in expected.values()))
        assert float((actual[which] - gradient).abs().max()) <= 1e-4 * size, which


@pytest.mark.parametrize("name", CASES)
def test_a_pattern_for_each_layer_and_head(name: str) -> None:
    """The witness: transformers' attention with each layer's mask intersected by hand with the dense pattern."""
    case = CASES[name]
    model, tokens = case.make(), ids()
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, :7] = False
    wide = 9 if case.name.startswith("Deepseek") else 2  # a row of which nothing is left is uniform there and zero here
    patterns = {
        0: fl.window(wide) | fl.global_tokens([1]),
        1: fl.per_head([fl.window(wide), fl.random_keys(9) | fl.window(1)] * 2),
    }
    model.set_attn_implementation("eager")
    hooks = []
    # Token 1 of the text that is padded on the left stands at 8.
    named = torch.tensor([[j == 1 for j in range(24)], [j == 8 for j in range(24)]])
    in_slots = patterns | {0: fl.window(wide) | fl.global_tokens(named)}
    for number, module in attention_layers(model).items():
        allowed = in_slots.get(number, fl.full()).dense(24, batch=2, heads=4)
        hooks.append(module.register_forward_pre_hook(_narrowed(allowed), with_kwargs=True))
        if hasattr(module, "indexer"):
            hooks.append(module.indexer.register_forward_pre_hook(_own_mask_of(module), with_kwargs=True))
    expected = first(model, tokens, real.long())
    for hook in hooks:
        hook.remove()
    plain = first(model, tokens, real.long())
    assert not torch.allclose(plain[real], expected[real], rtol=0, atol=1e-2 * float(plain.abs().max()))
    with use_pattern(model, patterns):
        close(first(model, tokens, real.long())[real], expected[real])


def _narrowed(allowed: Tensor) -> Callable[..., Any]:
    """A hook that puts minus infinity into a layer's additive mask where `allowed` is False."""

    def narrow(module: Any, args: Any, kwargs: Any) -> Any:
        places = [n for n, x in enumerate(args) if isinstance(x, Tensor) and x.shape[-2:] == (24, 24)]
        mask = args[places[0]] if places else kwargs.get("attention_mask")
        module.own_mask = mask
        mask = torch.zeros(2, 1, 24, 24) if mask is None else mask
        narrowed = mask.expand(2, 4, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)
        if places:
            return (*args[: places[0]], narrowed, *args[places[0] + 1 :]), kwargs
        return args, kwargs | {"attention_mask": narrowed}

    return narrow


def _own_mask_of(module: Any) -> Callable[..., Any]:
    """A hook that lets an indexer choose under the model's own mask: a pattern narrows what has been chosen."""
    return lambda indexer, args, kwargs: ((*args[:3], module.own_mask[:, 0], *args[4:]), kwargs)


# ---- generation ------------------------------------------------------------------------------------------------------
def generated(model: Any, prompt: Tensor, mask: Tensor, new: int, **options: Any) -> Tensor:
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    actual: Tensor = model.generate(prompt, attention_mask=mask, **settings, **options)
    return actual


def padded_left() -> tuple[Tensor, Tensor]:
    prompt, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    prompt[1, :4], mask[1, :4] = 0, 0
    return prompt, mask


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pattern", [None, fl.full(), fl.causal()], ids=["own", "full", "causal"])
@pytest.mark.parametrize("name", DECODERS)
def test_256_generated_tokens_are_identical(name: str, pattern: fl.Pattern | None, cache: str) -> None:
    check_generation(DECODERS[name], pattern, 256, cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generated_tokens_are_identical(name: str, cache: str) -> None:
    """Past the sliding windows (5) and with padding on the left, so that caches drop keys and rows differ."""
    check_generation(DECODERS[name], fl.causal(), 16, cache)


def check_generation(case: Case, pattern: fl.Pattern | None, new: int, cache: str) -> None:
    model, (prompt, mask) = case.make(), padded_left()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    expected = generated(model, prompt, mask, new, **options)
    with use_pattern(model, pattern):
        assert torch.equal(generated(model, prompt, mask, new, **options), expected)
    assert len(expected[0, 9:].unique()) > 3


@pytest.mark.parametrize("pattern", [fl.window(4, 0), fl.global_tokens([0, 5]) | fl.window(3) | fl.random_keys(4, causal=True)])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_under_a_sparse_pattern_does_not_depend_on_the_cache(name: str, cache: str, pattern: fl.Pattern) -> None:
    """Each new token is the one that the whole text so far gives without a cache, though sliding caches drop keys."""
    model, (prompt, mask) = DECODERS[name].make(), padded_left()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with use_pattern(model, pattern):
        actual = generated(model, prompt, mask, 12, **options)
        for row in range(2):
            start = int((mask[row] == 0).sum())
            real = torch.nn.functional.pad(mask[row : row + 1], (0, 11), value=1)
            positions = (torch.arange(20) - start).clamp(min=0)[None]
            logits = first(model, actual[row : row + 1, :-1], real, position_ids=positions, use_cache=False)
            logits[..., 2] = -torch.inf  # the end may not come yet
            assert torch.equal(logits[0, 8:].argmax(-1), actual[row, 9:])


# ---- torch.compile ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "Mistral", "GPT-OSS"])
def test_a_compiled_model_computes_the_same(name: str) -> None:
    model, tokens = CASES[name].make(), ids()
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, :7] = False
    with use_pattern(model, fl.window(3) | fl.global_tokens([0])):
        expected = first(model, tokens, real.long())
        torch._dynamo.reset()
        close(first(torch.compile(model, backend="eager"), tokens, real.long())[real], expected[real])


# ---- what cannot be honoured -----------------------------------------------------------------------------------------
def test_a_cross_attending_model_without_a_pattern_computes_what_it_always_did() -> None:
    """Its decoder looks at another text, which is the model's own affair."""
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = hf.BartModel(hf.BartConfig(**sizes, init_std=0.3)).eval()
    tokens, real = ids(), torch.ones(2, 24, dtype=torch.long)
    real[1, 17:] = 0
    expected = first(model, tokens, real, decoder_input_ids=tokens[:, :9])
    with use_pattern(model, None):
        close(first(model, tokens, real, decoder_input_ids=tokens[:, :9]), expected)
    with pytest.raises(fl.UnsupportedError, match="BartModel has cross-attention"), use_pattern(model, fl.window(3)):
        pass
    encoder = model.get_encoder()
    dense = first(encoder, tokens, real)
    with use_pattern(encoder, fl.window(3)):
        assert not torch.allclose(first(encoder, tokens, real), dense, atol=1e-3)
    with use_pattern(encoder, fl.window(23)):
        close(first(encoder, tokens, real)[real.bool()], dense[real.bool()])


def test_a_model_that_rewrites_its_mask_is_refused() -> None:
    """DeepSeek-V4 appends compressed keys to its additive mask; a bool mask would mean the opposite there."""
    kind = hf.DeepseekV4ForCausalLM
    torch.manual_seed(0)
    config = kind.config_class(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, head_dim=16, q_lora_rank=16, o_lora_rank=16,
        o_groups=2, moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1, index_n_heads=2,
        index_head_dim=8, index_topk=4, sliding_window=8, max_position_embeddings=512,
    )  # fmt: skip
    model = kind(config).eval()
    with pytest.raises(fl.UnsupportedError, match="computes with its own attention mask"), use_pattern(model, None):
        first(model, ids(1, 200))
