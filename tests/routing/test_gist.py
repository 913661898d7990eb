"""`gist_attention` against its definition: a dense float64 softmax over tokens and summaries, outputs and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.routing import TopBlocks, gist_attention

G = torch.Generator().manual_seed(5)
CHOSEN = fl.chosen_blocks(torch.randint(-1, 8, (2, 4, 8, 2), generator=G), block=4)
PATTERNS = {
    "blocks": CHOSEN,
    "blocks and window": (CHOSEN | fl.window(3, 0)) & fl.causal(),
    "nothing": fl.window(1) - fl.full(),
    "everything": fl.full(),
}
HOLES = torch.rand(2, 29, generator=G) < 0.7
HOLES[1, 8:16] = False


def tensors(n_q: int = 19, n_k: int = 29, dtype: torch.dtype = torch.float64, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(11)
    return tuple(torch.randn(2, h, n, dim, generator=g, dtype=dtype) for h, n in ((4, n_q), (2, n_k), (2, n_k)))  # type: ignore[return-value]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: fl.Pattern,
    block: int,
    levels: int,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Row by row: the allowed tokens, then uncovered blocks in the coarsest cells that are free, each weighted by its size."""
    batch, heads, n_q, dim = q.shape
    n_k, group = k.shape[2], heads // k.shape[1]
    seen = pattern.dense(n_q, n_k, batch=batch, heads=heads).expand(batch, heads, n_q, n_k)
    outs, lses = [], []
    for b in range(batch):
        real = [True] * n_k if mask is None else mask[b].tolist()
        for h in range(heads):
            keys, values = k[b, h // group], v[b, h // group]
            for r in range(n_q):
                i = r + n_k - n_q
                allowed = [j for j in range(n_k) if seen[b, h, r, j] and real[j]]
                logits = [scale * q[b, h, r] @ keys[j] for j in allowed]
                summed_values = [values[j] for j in allowed]

                def is_free(level: int, cell: int, i: int = i, allowed: list[int] = allowed) -> bool:
                    size = block * 2**level
                    if any(cell * size <= j < (cell + 1) * size for j in allowed) or (causal and (cell + 1) * size > i + 1):
                        return False
                    return level == 0 or abs(i // size - cell) > 1

                for level in range(levels):
                    size = block * 2**level
                    for cell in range(-(-n_k // size)):
                        if not is_free(level, cell) or (level + 1 < levels and is_free(level + 1, cell // 2)):
                            continue
                        inside = [j for j in range(cell * size, min(n_k, (cell + 1) * size)) if real[j]]
                        if inside:
                            logits.append(scale * q[b, h, r] @ keys[inside].mean(0) + math.log(len(inside)))
                            summed_values.append(values[inside].mean(0))
                if logits:
                    row_logits = torch.stack(logits)
                    outs.append(row_logits.softmax(0) @ torch.stack(summed_values))
                    lses.append(row_logits.logsumexp(0))
                else:
                    outs.append(torch.zeros(dim, dtype=q.dtype))
                    lses.append(torch.tensor(-torch.inf, dtype=q.dtype))
    return torch.stack(outs).view(batch, heads, n_q, dim), torch.stack(lses).view(batch, heads, n_q)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "block, levels, causal", [(4, 1, False), (4, 1, True), (4, 3, False), (2, 3, True), (29, 1, False), (1, 4, True)]
)
@pytest.mark.parametrize("name", PATTERNS)
def test_matches_the_float64_reference(name: str, block: int, levels: int, causal: bool, masked: bool) -> None:
    q, k, v = tensors()
    mask = HOLES if masked else None
    expected = reference(q, k, v, PATTERNS[name], block, levels, causal, mask, 0.4)
    actual = gist_attention(
        q, k, v, PATTERNS[name], block=block, levels=levels, causal=causal, key_mask=mask, scale=0.4, return_lse=True
    )
    for actual_part, expected_part in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_part, expected_part)


@pytest.mark.parametrize("n_k, levels, masked", [(12, 1, False), (13, 2, False), (13, 2, True)])
def test_gradients(n_k: int, levels: int, masked: bool) -> None:
    """Through the allowed pairs, the means, the sizes and the merge; equal cells (12 = 4 · 3) and a short last one."""
    q, k, v = (x.requires_grad_() for x in tensors(5, n_k, dim=2))
    pattern = fl.window(1) & fl.blocked_window(0, block=2)
    mask = torch.arange(n_k) % 5 != 1 if masked else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return gist_attention(
            q, k, v, pattern, block=3, levels=levels, key_mask=None if mask is None else mask[None], return_lse=True
        )  # type: ignore[return-value]

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_equal_keys_give_full_attention() -> None:
    q, _, v = tensors(32, 32)
    k = torch.randn(2, 2, 8, 3, dtype=torch.float64).repeat_interleave(4, 2)
    full, full_lse = fl.attention(q, k, v, fl.full(), return_lse=True)
    near = TopBlocks(2, 4)(q, k) | fl.blocked_window(0, block=4)
    out, lse = gist_attention(q, k, v, near, block=4, return_lse=True)
    torch.testing.assert_close(out, full)
    torch.testing.assert_close(lse, full_lse)


def test_summaries_reduce_the_error_to_full_attention() -> None:
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(1, 2, 256, 8, generator=g).cumsum(2) / 8
    q, k, v = walk, walk + 0.2 * torch.randn(1, 2, 256, 8, generator=g), torch.randn(1, 2, 256, 8, generator=g).cumsum(2) / 8
    full, near = fl.attention(q, k, v, fl.full()), TopBlocks(share=0.1, block=8)(q, k)
    sparse_error = float((fl.attention(q, k, v, near) - full).norm() / full.norm())
    for levels in (1, None):
        gist_error = float((gist_attention(q, k, v, near, block=8, levels=levels) - full).norm() / full.norm())
        assert gist_error < 0.5 * sparse_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = tensors()
    expected = gist_attention(q, k, v, CHOSEN, block=4, levels=2)
    out = gist_attention(*(x.to(dtype) for x in (q, k, v)), CHOSEN, block=4, levels=2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_autocast_does_not_round_log_sizes() -> None:
    q, k, v = (x.float() for x in tensors())
    expected = gist_attention(q, k, v, CHOSEN, block=4, levels=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gist_attention(q, k, v, CHOSEN, block=4, levels=2)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)


def test_no_keys() -> None:
    q, k, v = tensors(5, 0)
    out, lse = gist_attention(q, k, v, fl.full(), return_lse=True)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
