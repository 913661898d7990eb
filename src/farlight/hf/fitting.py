"""`farlight.hf.fit`: the cheapest pattern for every head of a model. The work is done where analysis lives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from farlight.patterns.base import Pattern

if TYPE_CHECKING:
    from farlight.understanding.fitting.model import ModelFit

__all__ = ["fit"]


def fit(
    model: Any,
    texts: str | Sequence[str] | Tensor,
    *,
    tokenizer: Any = None,
    keep: float | None = None,
    density: float | None = None,
    candidates: Sequence[str | Pattern] | None = None,
    held_out: float = 0.5,
    length: int | None = None,
    passages: int | None = None,
    even: bool | None = None,
    weigh: bool = False,
    gist: int | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> ModelFit:
    """For each layer and head the cheapest candidate such that `keep` of full attention is kept, or the most within `density`.

    As `farlight.fit`, over all heads of all layers at once: the budget goes where a link keeps most. The first texts are fitted
    to, the last ones only judged on; both results and their difference are reported.

    Args:
        model: an encoder or causal language model in evaluation mode.
        texts: token ids `(passages, tokens)`, or a text or texts, which `tokenizer` reads and which are cut into passages of
            `length` tokens (default: 512, or what the model reads), at most `passages` of them.
        keep, density, candidates: as in `farlight.fit`.
        held_out: share of the passages, the last ones, that is not fitted to.
        even: count a row's share as 1 - (1 - share)², so that no row is left with little; None = with `density`, where it is
            possible.
        weigh: count what is lost in a layer by how far it moves the model's output, measured layer by layer.
        gist: let every block of so many tokens of which a query sees nothing be heard in summary (`gist_attention`). The
            summaries, 1 / gist of all links at most, are part of `density`.
        step: called with a few words before each piece of work.

    Raises:
        ArgumentError: texts, targets or candidates that cannot be used. UnsupportedError: the model's attention cannot be
        replaced, or passages are padded.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes)).eval()
    >>> found = fl.hf.fit(model, torch.randint(0, 99, (4, 40)), density=0.2)
    >>> found.density <= 0.2, sorted(found.patterns)
    (True, [0, 1])
    >>> model = fl.hf.sparsify(model, found.patterns)
    """
    from farlight.understanding.fitting.model import fit_model

    return fit_model(
        model,
        texts,
        tokenizer=tokenizer,
        keep=keep,
        density=density,
        candidates=candidates,
        held_out=held_out,
        length=length,
        passages=passages,
        even=even,
        weigh=weigh,
        gist=gist,
        step=step,
    )
