"""`fl.nn.sparsify` and the stand-in for torch's `scaled_dot_product_attention`, against torch under the same mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import farlight as fl

PATTERN = fl.window(3) | fl.global_tokens([0])


def dense_mask(n: int) -> torch.Tensor:
    """Torch's layers take True as forbidden."""
    return ~PATTERN.dense(n)[0, 0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 12, "vdim": 20}], ids=["plain", "no bias", "other widths"])
def test_a_layer_is_torchs_under_the_mask(batch_first: bool, options: dict[str, Any]) -> None:
    dense = nn.MultiheadAttention(32, 4, batch_first=batch_first, **options).eval()
    sparse = fl.nn.sparsify(dense, PATTERN)
    assert dict(sparse.named_parameters()).keys() == dict(dense.named_parameters()).keys()
    assert all(parameter is dense.get_parameter(name) for name, parameter in sparse.named_parameters())
    widths = (32, options.get("kdim", 32), options.get("vdim", 32))
    q, k, v = (torch.randn((2, 30, w) if batch_first else (30, 2, w)) for w in widths)
    ignored = torch.arange(30) >= torch.tensor([[30], [21]])
    expected, weights = dense(q, k, v, key_padding_mask=ignored, attn_mask=dense_mask(30))
    actual, none = sparse(q, k, v, key_padding_mask=ignored)
    assert none is None
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    actual, shares = sparse(q, k, v, key_padding_mask=ignored, need_weights=True)
    torch.testing.assert_close(shares, weights, atol=1e-5, rtol=1e-4)
    one = tuple(x[0] if batch_first else x[:, 0] for x in (q, k, v))
    torch.testing.assert_close(sparse(*one)[0], dense(*one, attn_mask=dense_mask(30))[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_is_torchs_under_the_mask(batch_first: bool, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).train(training)
    x = torch.randn((2, 30, 32) if batch_first else (30, 2, 32))
    ignored = torch.arange(30) >= torch.tensor([[30], [21]])
    expected = encoder(x, mask=dense_mask(30), src_key_padding_mask=ignored)
    assert fl.nn.sparsify(encoder, PATTERN) is encoder
    actual = encoder(x, src_key_padding_mask=ignored)
    real = ~ignored if batch_first else ~ignored.T
    torch.testing.assert_close(actual[real], expected[real], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_sparsified_is_left_as_it_is() -> None:
    with pytest.raises(fl.ArgumentError, match="Linear holds no nn.MultiheadAttention; for a Hugging"):
        fl.nn.sparsify(nn.Linear(3, 3), PATTERN)
    with pytest.raises(fl.UnsupportedError, match="cross-attention of nn.TransformerDecoderLayer relates two texts"):
        fl.nn.sparsify(nn.TransformerDecoderLayer(32, 4), PATTERN)
    mixed = nn.ModuleList([nn.MultiheadAttention(32, 4), nn.MultiheadAttention(32, 4, add_zero_attn=True)])
    with pytest.raises(fl.UnsupportedError, match="add_zero_attn"):
        fl.nn.sparsify(mixed, PATTERN)
    assert isinstance(mixed[0], nn.MultiheadAttention)


# ---- scaled_dot_product_attention ------------------------------------------------------------------------------------
def masks(n_q: int, n_k: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n_q)
    mask = torch.rand(2, 4, n_q, n_k, generator=generator) < 0.5
    mask[..., 0] = True
    keys = torch.arange(n_k) < torch.tensor([n_k, n_k - 5])[:, None]
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "bool, all heads": {"attn_mask": mask[:, :1]},
        "bool, two dimensions": {"attn_mask": mask[0, 0]},
        "keys": {"attn_mask": keys[:, None, None]},
        "additive": {"attn_mask": torch.zeros(2, 4, n_q, n_k).masked_fill(~mask, float("-inf"))},
    }


@pytest.mark.parametrize("sizes", [(20, 20), (9, 30), (30, 9)])
@pytest.mark.parametrize("name", masks(2, 9))
def test_it_is_torchs(name: str, sizes: tuple[int, int]) -> None:
    options = masks(*sizes)[name]
    q, k, v = (torch.randn(2, 4, n, 8) for n in (sizes[0], sizes[1], sizes[1]))
    expected = torch_attention(q, k, v, scale=0.3, **options)
    actual = fl.nn.scaled_dot_product_attention(q, k, v, scale=0.3, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    if name not in ("bool", "additive", "bool, all heads", "keys"):
        one = fl.nn.scaled_dot_product_attention(q[0], k[0], v[0], scale=0.3, **options)
        torch.testing.assert_close(one, expected[0], atol=1e-5, rtol=1e-4)


def test_a_pattern_narrows_the_mask() -> None:
    q = torch.randn(1, 4, 20, 8)
    k = torch.randn(1, 2, 20, 8)
    allowed = PATTERN.dense(20) & torch.ones(20, 20, dtype=torch.bool).tril()
    expected = torch_attention(q, k, k, attn_mask=allowed, enable_gqa=True)
    for options in ({"is_causal": True, "pattern": PATTERN}, {"attn_mask": PATTERN & fl.causal()}):
        actual = fl.nn.scaled_dot_product_attention(q, k, k, enable_gqa=True, **options)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"attn_mask": torch.zeros(20, 20), "is_causal": True}, "not both"),
        ({"attn_mask": torch.zeros(20, 20, dtype=torch.int64)}, "attn_mask is of torch.int64; pass bool"),
        ({"attn_mask": torch.zeros(19, 20, dtype=torch.bool)}, r"has shape \(19, 20\), which does not broadcast"),
        ({"attn_mask": torch.full((20, 20), 0.5)}, "a bias, which a pattern cannot express"),
    ],
)
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    q = torch.randn(1, 4, 20, 8)
    with pytest.raises((fl.ArgumentError, fl.UnsupportedError), match=says):
        fl.nn.scaled_dot_product_attention(q, q, q, **options)
    with pytest.raises(fl.ArgumentError, match="enable_gqa=True"):
        fl.nn.scaled_dot_product_attention(q, q[:, :2], q[:, :2])
