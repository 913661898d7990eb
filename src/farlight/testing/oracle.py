"""The answer by the book: dense softmax attention in plain torch, differentiated by plain autograd.

Shares nothing with any backend: not the plan, not the reference backend, not its backward formulas. In float64 it is the
truth; at a lower dtype, the same lines are the yardstick by which errors are measured. Costs n_q · n_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farlight.patterns import Sizes
from farlight.patterns.hashing import dropout_keep
from farlight.testing.cases import Case, Inputs

__all__ = ["Answer", "Solution", "attend", "kept_links", "magnitudes", "solve"]


@dataclass(frozen=True)
class Answer:
    """What attention gives: the output, the log-sum-exp, and the gradients of q, k and v."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class Solution:
    """The exact answer, the same maths at the dtype asked for, and the size of what is added up in each element."""

    truth: Answer
    yardstick: Answer
    magnitude: Answer


def kept_links(sizes: Sizes, seed: int, dropout: float) -> Tensor | None:
    """The links that survive dropout as `(batch, heads, n_q, n_k)`, or None without dropout."""
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
    """Output and log-sum-exp of softmax(scale · q kᵀ) v over the allowed links; 0 and -inf for a row that sees nothing.

    With dropout the surviving probabilities (`keep`) are divided by 1 - dropout; the log-sum-exp knows nothing of it.
    """
    group = q.shape[1] // max(1, k.shape[1])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.transpose(2, 3)) * scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    score = score.to(wide).masked_fill(~allowed, -torch.inf)
    top = score.detach().amax(3, keepdim=True) if score.shape[3] else score.new_zeros((*score.shape[:3], 1))
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = torch.exp(score - top)
    total = weight.sum(3, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    probability = weight / total
    if keep is not None:
        probability = torch.where(keep, probability / (1 - dropout or 1.0), 0.0)
    lse = torch.where(seen, top + torch.log(total), -torch.inf).squeeze(3)
    return probability.to(q.dtype) @ v, lse


def solve(
    case: Case,
    given: Inputs,
    *,
    dropout_seed: int = 0,
    with_grad_lse: bool = False,
    allowed: Tensor | None = None,
) -> Solution:
    """Truth, yardstick and magnitudes for a case and its inputs.

    The gradients are those of `(out · grad_out).sum()`, with `with_grad_lse` also of `(lse · grad_lse).sum()` over the rows
    that see something. `allowed` replaces the pattern's own dense mask.
    """
    sizes = case.sizes
    if allowed is None:
        allowed = case.pattern.dense(sizes.n_q, sizes.n_k, batch=sizes.batch, heads=sizes.heads, q_offset=sizes.q_offset)
    keep = kept_links(sizes, dropout_seed, case.dropout)
    dtype = given.q.dtype
    cpu = [x.detach().cpu() for x in (given.q, given.k, given.v, given.grad_out, given.grad_lse)]

    def answer(at: torch.dtype, flip: bool) -> Answer:
        q, k, v, grad_out, grad_lse = (x.to(at) for x in cpu)
        # The yardstick adds up in the opposite order: at float64 too it is a sample of what rounding does.
        turn = (lambda x, dim: x.flip(dim)) if flip else (lambda x, dim: x)
        q, k, v = (x.clone().requires_grad_() for x in (q, turn(k, 2), turn(v, 2)))
        mask, kept = turn(allowed, 3), None if keep is None else turn(keep, 3)
        out, lse = attend(q, k, v, mask, scale=case.scale_value, keep=kept, dropout=case.dropout)
        loss = (out * grad_out).sum()
        if with_grad_lse:
            loss = loss + torch.where(lse == -torch.inf, 0.0, lse * grad_lse.to(lse.dtype)).sum()
        dq, dk, dv = torch.autograd.grad(loss, (q, k, v), materialize_grads=True)
        return Answer(out.detach(), lse.detach(), dq, turn(dk, 2), turn(dv, 2))

    q, k, v, grad_out, grad_lse = (x.double() for x in cpu)
    lse_unit = torch.finfo(given.grad_lse.dtype).eps / torch.finfo(dtype).eps
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
    """For each element of the answer the root of the sum of squares of the terms that make it up.

    A sum of terms that are each rounded on their own is off by about this times the unit of rounding, also where the terms
    cancel: the gradient of q of a row with a single link is exactly 0, yet it is the difference of two like numbers.

    Probabilities computed as exp(score - lse) share the rounding of the lse, `lse_unit` times that of the inputs: what it
    does to all terms alike is added to the root.
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
    # The sum of exponentials: its logarithm, and what is lost when its terms are added one after another.
    lse = lse + count.log() + count.sqrt() / 8
    common = 1 + lse_unit * lse[..., None]
    out = (dropped.square() @ v.square()).sqrt() + common * (dropped @ v).abs()

    # dP and delta, whose difference times P is the gradient of the scores.
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
