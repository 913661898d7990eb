"""Fitting a whole model: one budget of links over all heads of all layers, with fidelity on held-out text.

1. `profile_model` runs the model on passages with full attention and profiles every head.
2. `frontier.allocate` walks the frontiers of all heads of all layers together; with `weigh`, twice: the first fit is used to
   measure how far sparsity in each layer alone moves the output, and those weights scale the values of the second.
   For causal language models the frontiers are those of predicted loss (`loss_fit`).
3. The model runs under the fit on passages it was fitted to and on held-out ones. The gap between the two is the overfit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from farlight.analysis.candidates_by_layer import Subject
from farlight.analysis.fit.fit import Fit, layer_fit, read_target
from farlight.analysis.fit.frontier import allocate
from farlight.analysis.fit.loss_fit import LossFit, loss_expressions, profile_loss, profile_steps
from farlight.analysis.fit.model_fit import ModelFit, layer_patterns
from farlight.analysis.fit.model_profile import ModelProfile, profile_model
from farlight.analysis.fit.profile import MAX_DENSE_TOKENS
from farlight.analysis.loss.fidelity import last_hidden_states, measure_fidelity, token_cosine
from farlight.analysis.loss.language import is_language_model
from farlight.analysis.passages import cut_passages
from farlight.errors import ArgumentError, show
from farlight.hf.interface import use_pattern
from farlight.patterns.expression import Pattern
from farlight.routing.base import Router

__all__ = ["check_time", "fit_model", "fit_profile", "fit_to_loss", "fits_by_loss", "loss_fit_steps"]

# Passages on which the weights of layers are measured.
_WEIGHT_PASSAGES = 4
_JUDGED_FITTED, _JUDGED_OTHER = "judged on what it was fitted to", "judged on other text"


def fit_model(
    model: Any,
    texts: str | Sequence[str] | Tensor,
    *,
    tokenizer: Any = None,
    keep: float | None = None,
    density: float | None = None,
    time: float | None = None,
    candidates: Sequence[str | Pattern] | None = None,
    held_out: float = 0.5,
    length: int | None = None,
    passages: int | None = None,
    even: bool | None = None,
    weigh: bool = False,
    gist: int | None = None,
    by: str | None = None,
    step: Callable[[str], None] = lambda label: None,
) -> ModelFit:
    """For each layer and head the cheapest candidate such that `keep` of full attention is kept, or the most within `density`
    of the links or `time` of the seconds.

    As `farlight.fit`, with one budget over the heads of all layers. The last passages are held out: the fit is measured on them
    and on those it was fitted to, and both are reported.

    Args:
        model: an encoder or causal language model in evaluation mode.
        texts: token ids `(passages, tokens)` int64; or a text or texts, which `tokenizer` encodes and which are cut into
            passages of `length` tokens (default: 512, or the model's maximum), at most `passages` of them.
        keep, density, candidates: as in `farlight.fit`.
        time: in their place, for causal language models by loss: the share of full attention's seconds that attention may take,
            choosing and planning included. Candidates are timed on this machine, on the first passage.
        held_out: share of the passages, the last ones, that are held out.
        even: value a row's share as 1 - (1 - share)², so that no row is left with little; None: with `density`.
        weigh: scale the values of each layer by how far losses in that layer move the model's output (see `_layer_weights`).
        gist: attend every block of this many tokens of which a query sees no key through one summary (`gist_attention`). The
            summaries, at most 1 / gist of all links, are part of `density`.
        by: what a candidate is valued by. "attention": the share that it keeps. "loss": the next-token loss that it is
            predicted to cost (`analysis.fit.loss_fit`), for causal language models with `density` or `time`; candidates are
            patterns and expressions. None: "loss" with `time`, and with `density` where candidates, even, weigh and gist are
            left out.
        step: called with a label before each piece of work.

    Raises:
        ArgumentError: texts, targets or candidates that cannot be used. UnsupportedError: the model's attention cannot be
        replaced, or passages are padded.

    >>> import torch, farlight as fl
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes)).eval()
    >>> result = fl.hf.fit(model, torch.randint(0, 99, (4, 40)), density=0.2)
    >>> result.density <= 0.2, sorted(result.patterns)
    (True, [0, 1])
    >>> model = fl.hf.sparsify(model, result.patterns)
    """
    if time is None:
        read_target(keep, density, bool(even))
    else:
        check_time(time, keep, density, by)
    ids = _token_ids(model, texts, tokenizer, length, passages)
    if not 0.0 <= held_out < 1.0:
        raise ArgumentError(f"held_out = {held_out}: it is the share of passages to judge on, 0 <= held_out < 1.")
    num_held_out = min(round(ids.shape[0] * held_out), ids.shape[0] - 1)
    num_fitted = ids.shape[0] - num_held_out
    held_out_ids = ids[num_fitted:] if num_held_out else None
    has_options = even is not None or weigh or gist is not None
    if time is not None or fits_by_loss(model, by, density, candidates, has_options):
        if even or weigh or gist is not None:
            raise ArgumentError("by='loss' with even, weigh or gist: these belong to shares of attention; leave them out.")
        return fit_to_loss(model, ids[:num_fitted], held_out_ids, density, candidates, time=time, step=step)
    profile = profile_model(model, ids[:num_fitted], candidates, step=step)
    return fit_profile(profile, held_out_ids, keep=keep, density=density, even=even, weigh=weigh, gist=gist, step=step)


def check_time(time: float, keep: float | None, density: float | None, by: str | None = None) -> None:
    """Raise ArgumentError where `time` cannot be the budget of a fit."""
    if keep is not None or density is not None:
        raise ArgumentError("fit: time was given beside keep or density; give one of the three.")
    if by not in (None, "loss"):
        raise ArgumentError(f"fit: time with by = {show(by)}: only candidates of a fit by loss are timed; leave by out.")
    if not 0.0 < time < float("inf"):
        raise ArgumentError(f"fit: time = {time}: it is a share of the seconds of full attention, above 0.")


def fits_by_loss(
    model: Any, by: str | None, density: float | None, candidates: Sequence[str | Pattern] | None, has_options: bool = False
) -> bool:
    """Whether a fit with these arguments is one by predicted loss (see `fit_model`). Raises ArgumentError for a bad `by`."""
    if by not in (None, "attention", "loss"):
        raise ArgumentError(f"by = {show(by)} is unknown; use 'attention' or 'loss'.")
    if by == "loss" and density is None:
        raise ArgumentError("by='loss' needs density or time, a budget of links or seconds: keep says nothing of the loss.")
    return by == "loss" or (
        by is None and density is not None and candidates is None and not has_options and is_language_model(model)
    )


def loss_fit_steps(passages: int) -> list[str]:
    """The labels that `fit_to_loss` passes to its `step`."""
    return [*profile_steps(passages), _JUDGED_FITTED, _JUDGED_OTHER]


def fit_to_loss(
    model: Any,
    ids: Tensor,
    held_out: Tensor | None,
    density: float | None,
    candidates: Sequence[str | Pattern] | None,
    *,
    time: float | None = None,
    step: Callable[[str], None] = lambda label: None,
) -> ModelFit:
    """The candidates of least predicted loss within `density` or `time`, judged on the passages `ids` and `held_out`."""
    is_timed = time is not None
    profile = profile_loss(model, ids, loss_expressions(candidates, fast=is_timed), timed=is_timed, step=step)
    result = profile.fit(density, time=time)
    return _judged(model, ids, held_out, result.layers, [1.0] * len(result.layers), None, step=step, loss=result)


def _token_ids(
    model: Any, texts: str | Sequence[str] | Tensor, tokenizer: Any, length: int | None, passages: int | None
) -> Tensor:
    """`(passages, tokens)` int64 from the arguments of `fit_model`."""
    if isinstance(texts, Tensor):
        if texts.dim() != 2 or texts.dtype.is_floating_point or not texts.numel():
            raise ArgumentError(
                f"texts is a tensor {tuple(texts.shape)} of {texts.dtype}; token ids (passages, tokens), int64, are needed."
            )
        return texts
    if tokenizer is None:
        raise ArgumentError("texts are words, but there is no tokenizer to read them; pass tokenizer=, or token ids.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512
    text = texts if isinstance(texts, str) else "\n\n".join(texts)
    return cut_passages(text, tokenizer, length or min(512, limit), passages or 1_000_000).ids


def fit_profile(
    profile: ModelProfile,
    held_out: Tensor | None,
    *,
    keep: float | None = None,
    density: float | None = None,
    families: Sequence[str] | None = None,
    even: bool | None = None,
    weigh: bool = False,
    gist: int | None = None,
    max_judged: int = 16,
    step: Callable[[str], None] = lambda label: None,
) -> ModelFit:
    """Fit a profiled model to a target and measure its fidelity.

    Args:
        profile: from `profile_model`.
        held_out: token ids `(passages, tokens)` of held-out passages, or None.
        families: fixed families to choose from; None: those of the profile.
        max_judged: fidelity is measured on at most this many held-out passages, and on half as many of the profile's.
        keep, density, even, weigh, gist, step: as in `fit_model`.
    """
    model, ids, numbers = profile.model, profile.ids, profile.numbers
    if even is None:
        even = density is not None
    keep, density = read_target(keep, density, even)
    step("frontiers of all heads")
    options, base_links = profile.options(families, even)
    heads = [head for layer in options for head in layer]
    budget = _link_budget(density, gist, base_links)

    def allocated(weights: Sequence[float]) -> dict[int, Fit]:
        head_weights = [weight for weight, layer in zip(weights, options, strict=True) for _ in layer]
        chosen = iter(allocate(heads, keep=keep, links=budget, weights=head_weights))
        fits = [
            layer_fit(layer, [next(chosen) for _ in layer], links) for layer, links in zip(options, base_links, strict=True)
        ]
        return dict(zip(numbers, fits, strict=True))

    weights = [1.0] * len(options)
    layers = allocated(weights)
    if weigh:
        weights = _layer_weights(model, ids, layers, even, step)
        layers = allocated(weights)
    return _judged(model, ids, held_out, layers, weights, gist, max_judged=max_judged, step=step)


def _judged(
    model: Any,
    ids: Tensor,
    held_out: Tensor | None,
    layers: dict[int, Fit],
    weights: Sequence[float],
    gist: int | None,
    *,
    max_judged: int = 16,
    step: Callable[[str], None],
    loss: LossFit | None = None,
) -> ModelFit:
    """The fit `layers` with its fidelity on passages that it was fitted to, `ids`, and on others."""
    subject = Subject("fitted", layer_patterns(layers, gist))
    # A fit by loss is judged by the kernels that it was fitted with.
    options: dict[str, Any] = {"best": False} if loss is not None else {"backend": _backend(model, ids, gist is not None)}
    step(_JUDGED_FITTED)
    trained = measure_fidelity(model, _spread(ids, -(-max_judged // 2)), [subject], **options).patterns[0]
    on_held_out = None
    if held_out is not None:
        step(_JUDGED_OTHER)
        on_held_out = measure_fidelity(model, _spread(held_out, max_judged), [subject], **options).patterns[0]
    about_model = {
        "class": type(model).__name__,
        "type": getattr(model.config, "model_type", None),
        "layers": len(layers),
        "heads": len(next(iter(layers.values())).heads) if layers else 0,
    }
    num_passages = (ids.shape[0], 0 if held_out is None else held_out.shape[0])
    return ModelFit(layers, tuple(weights), trained, on_held_out, num_passages, ids.shape[1], about_model, gist, loss)


def _link_budget(density: float | None, gist: int | None, base_links: Sequence[Tensor]) -> float | None:
    """Links of all layers and heads within `density`, the largest possible number of summaries subtracted; None without it."""
    if density is None:
        return None
    if gist is not None and density <= 1 / gist:
        raise ArgumentError(
            f"density = {density} with gist = {gist}: the summaries alone may take 1/{gist} of all links; allow more, or "
            "take larger blocks."
        )
    return (density - (0.0 if gist is None else 1 / gist)) * float(sum(links.sum() for links in base_links))


def _layer_weights(model: Any, ids: Tensor, layers: dict[int, Fit], even: bool, step: Callable[[str], None]) -> list[float]:
    """The weight of a lost share in each layer, mean 1: √((1 - token cosine) / mean loss), with that layer alone sparse.

    The mean loss is that of attention share over heads, squared with `even`. The square root is the geometric mean of equal
    weights
    and of the measured ratio: the latter, taken one layer at a time, does not see how errors of early layers add up.
    """
    sample = _spread(ids, _WEIGHT_PASSAGES)
    reference = _run(model, sample, None)
    ratios = []
    for number, layer in layers.items():
        step(f"weighing: layer {number}")
        output_loss = 1 - token_cosine(reference, _run(model, sample, {number: layer.pattern}))
        attention_loss = layer.lost.square() if even else layer.lost
        ratios.append((max(output_loss, 0.0) / max(float(attention_loss.mean()), 1e-6)) ** 0.5)
    mean = sum(ratios) / len(ratios)
    return [ratio / mean if mean else 1.0 for ratio in ratios]


def _run(model: Any, ids: Tensor, patterns: Mapping[int, Pattern | Router] | None) -> Tensor:
    """Last hidden states under `patterns` by layer; None: full attention."""
    with use_pattern(model, patterns, backend=_backend(model, ids)):
        return last_hidden_states(model, ids)


def _backend(model: Any, ids: Tensor, has_summaries: bool = False) -> str:
    """A dense backend for short passages, where planning a pattern per head would cost more than it saves.

    Summaries are merged by their lse, which "reference" returns and "dense" (torch's SDPA) does not; nor does it cap scores.
    """
    if ids.shape[1] > MAX_DENSE_TOKENS:
        return "auto"
    is_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "reference" if has_summaries or is_capped else "dense"


def _spread(ids: Tensor, count: int) -> Tensor:
    """At most `count` passages, evenly spaced."""
    count = min(count, ids.shape[0])
    return ids[[index * ids.shape[0] // count for index in range(count)]]
