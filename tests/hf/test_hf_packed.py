"""Lengths of packed sequences, `cu_seq_lens_q` and `cu_seq_lens_k`, through transformers: each text as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import farlight as fl

ENDS = [0, 5, 12]


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **sizes)).eval()


def lengths(ends: list[int]) -> dict[str, Any]:
    packed = torch.tensor(ends, dtype=torch.int32)
    longest = int(packed.diff().max())
    return {"cu_seq_lens_q": packed, "cu_seq_lens_k": packed, "max_length_q": longest, "max_length_k": longest}


def texts() -> Tensor:
    return torch.randint(3, 50, (1, ENDS[-1]), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", [fl.causal(), fl.window(2, 0) | fl.offsets([-4])], ids=str)
def test_packed_texts_are_read_as_if_alone(pattern: fl.Pattern) -> None:
    """Positions run on over both texts, so that the lengths alone tell them apart; rotary distances stay the same."""
    model, ids = llama(), texts()
    fl.hf.sparsify(model, pattern)
    positions = torch.arange(ENDS[-1])[None]
    packed = model(ids, use_cache=False, position_ids=positions, **lengths(ENDS)).logits
    apart = torch.cat([model(part, use_cache=False).logits for part in ids.split([5, 7], 1)], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    weight = model.model.embed_tokens.weight
    of_packed, of_apart = (torch.autograd.grad(x.square().sum(), weight)[0] for x in (packed, apart))
    torch.testing.assert_close(of_packed, of_apart, rtol=1e-4, atol=1e-5)
    seen_by_all = model(ids, use_cache=False, position_ids=positions).logits
    assert not torch.allclose(seen_by_all[:, 5:], apart[:, 5:], atol=1e-4)


def test_lengths_that_cannot_be_honoured_are_refused() -> None:
    model, ids = llama(), texts()
    fl.hf.sparsify(model, fl.causal())
    with pytest.raises(fl.UnsupportedError, match="farlight reads equal lengths of all tokens of one row"):
        model(ids, use_cache=False, **lengths([0, 5, 11]))
    with pytest.raises(fl.UnsupportedError, match="farlight reads equal lengths of all tokens of one row"):
        model(ids.repeat(2, 1), use_cache=False, **lengths(ENDS))
    cache = fl.hf.SparseCache(model, fl.causal())
    with pytest.raises(fl.UnsupportedError, match="packed sequences, which a SparseCache, ranks and a gist do not read"):
        model(ids, past_key_values=cache, **lengths(ENDS))
