"""The oracle: dense softmax attention in plain torch, differentiated by autograd.

Independent of every backend: no plan, no reference backend, no backward formulas. `solve` evaluates it twice, in float64 (the
truth) and at the inputs' dtype (the baseline, whose error is the rounding that the dtype makes unavoidable), and computes for
each element the magnitude of the terms summed there. Time and memory are O(n_q · n_k).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns import Sizes
from farlight.patterns.hashing import dropout_keep
from farlight.testing.cases import Case, Inputs

__all__ = ["Answer", "Solution", "attend", "dropout_mask", "magnitudes", "solve"]


@dataclass(frozen=True)
class Answer:
    """The results of attention: output `(B, H, n_q, D)`, log-sum-exp `(B, H, n_q)`, gradients of q, k and v."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class Solution:
    """The float64 truth, the baseline (the same formula at the inputs' dtype), and the magnitude of each element's terms."""

    truth: Answer
    baseline: Answer
    magnitude: Answer


def dropout_mask(sizes: Sizes, seed: int, dropout: float) -> Tensor | None:
    """`(batch, heads, n_q, n_k)` bool, True where a link survives dropout; None without dropout."""
    if dropout == 0.0:
        return None
    b = torch.arange(sizes.batch).view(-1, 1, 1, 1)
    h = torch.arange(sizes.heads).view(1, -1, 1, 1)
    i = (torch.arange(sizes.n_q) + sizes.q_offset).view(1, 1, -1, 1)
    j = torch.arange(sizes.n_k).view(1, 1, 1, -1)
    return dropout_keep(seed, dropout, b, h, i, j)


def attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, scale: float, keep: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(output, lse) of softmax(scale · q·kᵀ) · v over the `allowed` links; 0 and -inf for a row without allowed links.

    With dropout, probabilities where `keep` is True are divided by 1 - dropout and the others are 0; the lse is before dropout.
    """
    group = q.shape[1] // max(1, k.shape[1])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.transpose(2, 3)) * scale
    accumulation = torch.float64 if q.dtype == torch.float64 else torch.float32
    score = score.to(accumulation).masked_fill(~allowed, -torch.inf)
    top = score.detach().amax(3, keepdim=True) if score.shape[3] else score.new_zeros((*score.shape[:3], 1))
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = torch.exp(score - top)
    total = weight.sum(3, keepdim=True)
    nonempty = total > 0
    total = torch.where(nonempty, total, 1.0)
    probability = weight / total
    if keep is not None:
        probability = torch.where(keep, probability / (1 - dropout or 1.0), 0.0)
    lse = torch.where(nonempty, top + torch.log(total), -torch.inf).squeeze(3)
    return probability.to(q.dtype) @ v, lse


def solve(
    case: Case,
    tensors: Inputs,
    *,
    dropout_seed: int = 0,
    with_grad_lse: bool = False,
    allowed: Tensor | None = None,
) -> Solution:
    """Truth, baseline and magnitudes of a case for the given inputs.

    Gradients are those of Σ out · grad_out, with `with_grad_lse` plus Σ lse · grad_lse over the rows with a finite lse.
    `allowed` replaces the pattern's dense mask.
    """
    sizes = case.sizes
    if allowed is None:
        allowed = case.pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    keep = dropout_mask(sizes, dropout_seed, case.dropout)
    dtype = tensors.q.dtype
    cpu = [x.detach().cpu() for x in (tensors.q, tensors.k, tensors.v, tensors.grad_out, tensors.grad_lse)]

    def answer(dtype: torch.dtype, reverse_keys: bool) -> Answer:
        q, k, v, grad_out, grad_lse = (x.to(dtype) for x in cpu)
        # The baseline sums over keys in reverse order, so that in float64 too it differs from the truth by a sample of
        # rounding.
        order = (lambda x, dim: x.flip(dim)) if reverse_keys else (lambda x, dim: x)
        q, k, v = (x.clone().requires_grad_() for x in (q, order(k, 2), order(v, 2)))
        mask, kept = order(allowed, 3), None if keep is None else order(keep, 3)
        out, lse = attend(q, k, v, mask, scale=case.scale_value, keep=kept, dropout=case.dropout)
        loss = (out * grad_out).sum()
        if with_grad_lse:
            loss = loss + torch.where(lse == -torch.inf, 0.0, lse * grad_lse.to(lse.dtype)).sum()
        dq, dk, dv = torch.autograd.grad(loss, (q, k, v), materialize_grads=True)
        return Answer(out.detach(), lse.detach(), dq, order(dk, 2), order(dv, 2))

    q, k, v, grad_out, grad_lse = (x.double() for x in cpu)
    lse_unit = torch.finfo(tensors.grad_lse.dtype).eps / torch.finfo(dtype).eps
    size = magnitudes(case, q, k, v, grad_out, grad_lse, allowed, keep=keep, with_grad_lse=with_grad_lse, lse_unit=lse_unit)
    return Solution(answer(torch.float64, False), answer(dtype, True), size)


def magnitudes(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    allowed: Tensor,
    *,
    keep: Tensor | None = None,
    with_grad_lse: bool = False,
    lse_unit: float = 1.0,
) -> Answer:
    """For each element of the answer, the root of the sum of squares of the terms that are summed to it, in float64.

    A sum of independently rounded terms has an error of about this times the machine epsilon, also where the terms cancel: dq
    of a row with a single link is exactly 0, as the difference of two equal numbers.

    Probabilities computed as exp(score - lse) share the rounding of the lse, which is `lse_unit` times that of the inputs. Its
    effect is common to all terms of a sum and is added to the root.
    """
    scale, dropout, group = case.scale_value, case.dropout, case.heads // case.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.transpose(2, 3) * scale).masked_fill(~allowed, -torch.inf)
    probability = torch.softmax(score, 3).nan_to_num(0.0) if score.shape[3] else score
    dropped = probability if keep is None else torch.where(keep, probability / (1 - dropout or 1.0), 0.0)
    score_size = torch.where(allowed, (q.square() @ k.square().transpose(2, 3)).sqrt() * abs(scale), 0.0)
    count = allowed.expand(score.shape).sum(3).clamp(min=1).double()
    finite = torch.where(allowed, score, 0.0).abs()
    lse = (finite.amax(3) if score.shape[3] else score.sum(3)) + (score_size.square() * probability).sum(3).sqrt()
    # log of the sum of exponentials, and the rounding of adding its terms one after another.
    lse = lse + count.log() + count.sqrt() / 8
    common = 1 + lse_unit * lse[..., None]
    out = (dropped.square() @ v.square()).sqrt() + common * (dropped @ v).abs()

    # ds = P · (dp - delta), with dp = dO · vᵀ and delta = Σ_d dO · O.
    dp = (grad_out.square() @ v.square().transpose(2, 3)).sqrt()
    if keep is not None:
        dp = torch.where(keep, dp / (1 - dropout or 1.0), 0.0)
    delta = (grad_out.square() * (dropped @ v).square()).sum(3).sqrt()
    if with_grad_lse:
        delta = delta + grad_lse.abs()
    recomputed = common + score_size
    ds = probability * (dp + delta[..., None]) * recomputed
    dq = (ds.square() @ k.square()).sqrt() + delta[..., None] * (probability @ k).abs()
    dk = (ds.square().transpose(2, 3) @ q.square()).sqrt()
    dv = ((dropped * recomputed).square().transpose(2, 3) @ grad_out.square()).sqrt()

    def by_key_head(x: Tensor) -> Tensor:
        squares: Tensor = x.square().unflatten(1, (-1, group))
        return squares.sum(2).sqrt()

    return Answer(out, lse, dq * abs(scale), by_key_head(dk) * abs(scale), by_key_head(dv))
