"""What models pass beyond queries, keys and values: sinks, chosen keys, masks as tensors, head sizes that differ."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farlight as fl
from farlight.hf import attention_function
from farlight.hf.attention_function import attention_forward
from farlight.hf.lazy_mask import LazyMask, ModelMask
from farlight.hf.masks import model_mask
from farlight.hf.setting import SETTING, Setting
from farlight.routing.gist_router import Gist

Module = nn.Identity


def inputs(batch: int = 2, heads: int = 4, kv: int = 2, n: int = 9, d: int = 8, dv: int | None = None) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, n, d), (batch, kv, n, d), (batch, kv, n, d if dv is None else dv)]
    return [torch.randn(*shape, generator=make, dtype=torch.float64) for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, sinks: Tensor | None = None, scale: float = 8**-0.5) -> Tensor:
    """Softmax over the allowed keys and one sink a head, written out; a row that sees nothing is 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


# ---- sinks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinks_are_one_more_key_of_value_zero(dtype: torch.dtype) -> None:
    q, k, v = inputs()
    sinks = torch.tensor([-1.0, 0.0, 3.0, 60.0], dtype=torch.float64)
    pattern = fl.window(2) - fl.sees_all([4])  # row 4 sees nothing
    given = [x.to(dtype) for x in (q, k, v, sinks)]
    actual, _ = attention_forward(Module(), *given[:3], ModelMask(pattern, 0), s_aux=given[3])
    assert actual.dtype == dtype
    expected = dense(*(x.double() for x in given[:3]), pattern.dense(9), given[3].double())
    assert (actual.double() - expected).abs().max() < {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert not actual[:, 4].any()


def test_gradients_of_sinks() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(batch=1, heads=2, kv=1, n=5, d=4))
    sinks = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    pattern = fl.window(1) - fl.sees_all([2])

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return attention_forward(Module(), q, k, v, ModelMask(pattern, 0), s_aux=sinks)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, sinks))
    weights = torch.randn(1, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((run(q, k, v, sinks) * weights).sum(), (q, k, v, sinks))
    expected = torch.autograd.grad(
        (dense(q, k, v, pattern.dense(5), sinks, 0.5)[:, [0, 1, 3, 4]] * weights[:, [0, 1, 3, 4]]).sum(), (q, k, v, sinks)
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_number_of_sinks_that_does_not_fit_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(fl.UnsupportedError, match="passes 3 attention sinks for 4 heads"):
        attention_forward(Module(), q, k, v, ModelMask(fl.full(), 0), s_aux=torch.zeros(3))


# ---- keys chosen by the model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [9, 2])
def test_indices_restrict_each_query(rows: int) -> None:
    q, k, v = inputs()
    q = q[:, :, 9 - rows :]
    indices = torch.rand(2, rows, 9, generator=torch.Generator().manual_seed(2)).argsort(-1)[..., :4].int()
    chosen = torch.zeros(2, 1, rows, 9, dtype=torch.bool)
    chosen.scatter_(-1, indices[:, None].long(), True)
    allowed = chosen & fl.causal().dense(rows, 9)
    actual, _ = attention_forward(Module(), q, k, v, ModelMask(fl.causal(), 9 - rows), indices=indices)
    torch.testing.assert_close(actual, dense(q, k, v, allowed))
    module = Module()
    module.__dict__[SETTING] = Setting(fl.window(3))
    actual, _ = attention_forward(module, q, k, v, ModelMask(fl.causal(), 9 - rows), indices=indices)
    torch.testing.assert_close(actual, dense(q, k, v, allowed & fl.window(3).dense(rows, 9)))


def test_indices_of_empty_slots_are_left_out() -> None:
    q, k, v = inputs()
    indices = torch.tensor([0, 8]).expand(2, 3, 2)  # slot 8 of a static cache holds nothing yet
    own = model_mask(2, 3, 9, q_offset=4)
    actual, _ = attention_forward(Module(), q[:, :, :3], k, v, own, indices=indices)
    torch.testing.assert_close(actual, v[:, :, :1].repeat_interleave(2, 1).transpose(1, 2).expand(2, 3, 4, 8))


def test_indices_of_another_shape_are_refused() -> None:
    q, k, v = inputs()
    for wrong, shape in ((torch.zeros(2, 4, 9, 3), r"\(2, 4, 9, 3\)"), (3, "int")):
        with pytest.raises(fl.UnsupportedError, match=rf"passes indices of shape {shape}; farlight reads \(2, 9, count\)"):
            attention_forward(Module(), q, k, v, ModelMask(fl.full(), 0), indices=wrong)


class Indexed(nn.Identity):
    """An attention module that says how long its blocks are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.indexer = nn.Identity()
        self.indexer.block_size = size  # type: ignore[assignment]


@pytest.mark.parametrize("rows", [9, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_block_indices_restrict_each_query(rows: int, groups: int) -> None:
    q, k, v = inputs()
    q = q[:, :, 9 - rows :]
    blocks = torch.rand(2, groups, rows, 3, generator=torch.Generator().manual_seed(2)).argsort(-1)[..., :2]
    blocks[..., 0, 1] = -1  # a list that is shorter than the others
    chosen = (blocks[..., None] == torch.arange(9) // 4).any(-2).repeat_interleave(4 // groups, 1)
    actual, _ = attention_forward(Indexed(4), q, k, v, ModelMask(fl.causal(), 9 - rows), block_indices=blocks)
    torch.testing.assert_close(actual, dense(q, k, v, chosen & fl.causal().dense(rows, 9)))


def test_blocks_that_cannot_be_read_are_refused() -> None:
    q, k, v = inputs()
    blocks = torch.zeros(2, 3, 9, 1, dtype=torch.int64)
    for module, given, text in (
        (Module(), blocks, r"passes block_indices, but has no indexer\.block_size"),
        (Indexed(4), blocks, r"of shape \(2, 3, 9, 1\); farlight reads \(2, groups of heads, 9, count\)"),
        (Indexed(4), 3, "of shape int; farlight reads"),
    ):
        with pytest.raises(fl.UnsupportedError, match=text):
            attention_forward(module, q, k, v, ModelMask(fl.full(), 0), block_indices=given)


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_chosen_keys_are_not_lost_where_others_attend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets, and a summary of what is not seen, do not know what a model's own indexer chose."""
    q, k, v = inputs()
    given = {name: torch.zeros((2, 9, 1) if name == "indices" else (2, 1, 9, 1), dtype=torch.int64)}
    seen: list[Any] = []
    layer = SimpleNamespace(attend=lambda *args, **more: seen.append(more["indices"]))
    with monkeypatch.context() as cached:
        cached.setattr(attention_function, "cache_layer_of", lambda *args: layer)
        attention_forward(Indexed(4), q, k, v, ModelMask(fl.causal(), 0), **given)
    assert seen == [given[name]]
    module = Indexed(4)
    module.__dict__[SETTING] = Setting(Gist(fl.window(1), 3))
    for more in (given, {"s_aux": torch.zeros(4)}):
        with pytest.raises(fl.UnsupportedError, match="a gist of what is not seen .* keys chosen by the model"):
            attention_forward(module, q, k, v, ModelMask(fl.causal(), 0), **more)


# ---- head sizes that differ ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dv", [3, 8, 12])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_may_be_narrower_or_wider_than_keys(dv: int, scale: float | None) -> None:
    q, k, v = inputs(dv=dv)
    sinks = torch.zeros(4, dtype=torch.float64)
    expected = dense(q, k, v, fl.causal().dense(9), sinks, 8**-0.5 if scale is None else scale)
    actual, _ = attention_forward(Module(), q, k, v, ModelMask(fl.causal(), 0), scaling=scale, s_aux=sinks)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous()


# ---- caches that have dropped keys -----------------------------------------------------------------------------------
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "pattern", [fl.window(3, 0), fl.strided(2), fl.global_tokens([2, 7]) | fl.window(1), fl.random_keys(5)]
)
def test_positions_stay_what_they_were(pattern: fl.Pattern, rows: int, padded: bool) -> None:
    """12 tokens, a window of 5: a sliding cache holds the last 4 + rows, and the answer is that of the whole text."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    q, k, v = inputs(n=12)
    kept = 4 + rows
    real = torch.ones(2, 12, dtype=torch.bool)
    if padded:
        real[1, :9] = False
    own = model_mask(
        2, rows, kept, q_offset=12 - rows, kv_offset=12 - kept, attention_mask=real if padded else None,
        mask_function=sliding_window_causal_mask_function(5),
    )  # fmt: skip
    module = Module()
    module.__dict__[SETTING] = Setting(pattern)
    actual, _ = attention_forward(module, q[:, :, -rows:], k[:, :, -kept:], v[:, :, -kept:], own)
    if padded and "global_tokens" in pattern.text:  # token 2 of the short text stands at 11, and it has no token 7
        named = torch.tensor([[j in (2, 7) for j in range(12)], [j == 11 for j in range(12)]])
        pattern = fl.global_tokens(named) | fl.window(1)
    allowed = (fl.window(4, 0) & pattern & fl.padding(real)).dense(12, batch=2, heads=4)
    torch.testing.assert_close(actual, dense(q, k, v, allowed)[:, -rows:])


# ---- masks as tensors ------------------------------------------------------------------------------------------------
def test_a_mask_looks_like_the_dense_one() -> None:
    mask = model_mask(2, 4, 9, q_offset=3)
    assert isinstance(mask, Tensor)
    assert (mask.shape, mask.ndim, mask.dtype, mask.device.type) == ((2, 1, 4, 9), 4, torch.bool, "cpu")
    assert mask.contiguous() is mask
    for same in (mask.detach(), mask.clone(), mask[:], mask[:, :, :, :], mask[:, :, :, :9], copy.copy(mask)):
        assert isinstance(same, LazyMask)
        assert same.model_mask is mask.model_mask
    elsewhere = mask.to("meta")
    assert isinstance(elsewhere, LazyMask)
    assert (elsewhere.model_mask, elsewhere.device.type, elsewhere.shape) == (mask.model_mask, "meta", mask.shape)
    assert repr(mask) == "LazyMask(causal(), shape=(2, 1, 4, 9))"
    assert torch.equal(mask[:, 0], (torch.arange(9) <= torch.arange(3, 7)[:, None]).expand(2, 4, 9))
    assert torch.equal(mask[:, 0, :, :], mask[:, 0])


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: ~mask,
        lambda mask: mask.float(),
        lambda mask: mask & mask,
        lambda mask: mask[:, :, :2],
        lambda mask: mask[..., :5],
        lambda mask: mask[0],
        lambda mask: torch.cat([mask, mask]),
        lambda mask: torch.nn.functional.pad(mask, (0, 1)),
        lambda mask: torch.zeros(2, 1, 4, 9) + mask,
        lambda mask: torch.zeros(2, 1, 4, 9).masked_fill(mask, 1.0),
        lambda mask: torch.where(mask, 1.0, 0.0),
        lambda mask: mask.all(),
        lambda mask: bool(mask[..., 0].any()),
    ],
)
def test_arithmetic_with_a_mask_is_refused(use: Any) -> None:
    with pytest.raises(fl.UnsupportedError, match=r"computes with its own attention mask \(aten\."):
        use(model_mask(2, 4, 9, q_offset=3))


def test_a_mask_for_other_sizes_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(fl.UnsupportedError, match="attends with 9 queries to 9 keys under a mask made for 9 and 7"):
        attention_forward(Module(), q, k, v, model_mask(2, 9, 7))
