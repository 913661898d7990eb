"""`fl.retention` against dense float64 arithmetic, and its `best` against sorting every probability."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.loss import probabilities as module
from farlight.analysis.loss.histogram import BINS, HistogramBuilder
from farlight.analysis.loss.retention import Retention, retention, retentions
from farlight.analysis.memory import peak_memory

PATTERNS = {
    "window": fl.window(3),
    "nothing": fl.window(3) - fl.full(),
    "everything": fl.full(),
    "some rows empty": fl.window(2) & fl.sees_all([0, 3, -1]),
    "union": fl.window(2) | fl.global_tokens([0, -1]) | fl.random_keys(2, seed=5),
    "future only": ~fl.causal(),
}


def tensors(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, n_q: int = 37, n_k: int = 41, dim: int = 8, seed: int = 0
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n_q, dim), (batch, kv_heads, n_k, dim), (batch, kv_heads, n_k, dim + 1)]
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) * 1.7 for s in shapes)


def brute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: fl.Pattern,
    base: fl.Pattern | None,
    scale: float | None,
    q_offset: int | None,
) -> dict[str, Tensor]:
    """Every field by the dense formula: repeated heads, a dense mask, float64, and a sort."""
    q, k, v = (t.double() for t in (q, k, v))
    batch, heads, n_q, dim = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    shape = {"batch": batch, "heads": heads, "q_offset": q_offset}
    whole = torch.ones(batch, heads, n_q, k.shape[2], dtype=torch.bool)
    seen = whole if base is None else whole & base.dense(n_q, k.shape[2], **shape)
    allowed = seen & pattern.dense(n_q, k.shape[2], **shape)
    scores = q @ k.mT * (dim**-0.5 if scale is None else scale)
    full = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    sparse = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    links = allowed.sum((-1, -2))
    ordered = full.flatten(2).sort(-1, descending=True).values.cumsum(-1)
    ordered = torch.cat([torch.zeros_like(ordered[..., :1]), ordered], -1) / n_q
    return {
        "kept": (full * allowed).sum(-1),
        "links": links,
        "base_links": seen.sum((-1, -2)),
        "best": ordered.gather(-1, links.unsqueeze(-1)).squeeze(-1),
        "curve": ordered,
        "error": (sparse @ v - full @ v).flatten(2).norm(dim=-1) / (full @ v).flatten(2).norm(dim=-1),
        "lost_output": ((full * ~allowed) @ v).flatten(2).norm(dim=-1) / (full @ v).flatten(2).norm(dim=-1),
        "without_sink": (full * allowed)[..., 1:].sum((-1, -2)) / full[..., 1:].sum((-1, -2)),
    }


def check(found: Retention, true: dict[str, Tensor], tolerance: float) -> None:
    assert found.kept.isfinite().all()
    assert torch.equal(found.links, true["links"])
    assert torch.equal(found.base_links, true["base_links"])
    torch.testing.assert_close(found.kept.double(), true["kept"], rtol=0, atol=tolerance)
    torch.testing.assert_close(found.mass.double(), true["kept"].mean(-1), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.density, true["links"] / true["base_links"].double(), rtol=0, atol=1e-12)
    assert (found.best <= true["best"] + tolerance).all(), "best is promised never to lie above the truth"
    assert (true["best"] <= found.best + found.best_slack + tolerance).all(), "best is promised to lie within its slack"
    if found.mass_without_sink is not None:
        torch.testing.assert_close(found.mass_without_sink.double(), true["without_sink"], rtol=0, atol=tolerance)
    if found.lost_output is not None:
        torch.testing.assert_close(found.lost_output.double(), true["lost_output"], rtol=0, atol=10 * tolerance)
    if found.error is not None:
        torch.testing.assert_close(found.error.double(), true["error"], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("base", [None, fl.causal()], ids=["full", "causal"])
@pytest.mark.parametrize("name", PATTERNS)
def test_agrees_with_dense_float64(name: str, base: fl.Pattern | None) -> None:
    q, k, v = tensors()
    result = retention(q, k, PATTERNS[name], v, base=base)
    assert result.kept.dtype == torch.float64
    check(result, brute(q, k, v, PATTERNS[name], base, None, None), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_judged_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in tensors())
    result = retention(q, k, PATTERNS["union"], v)
    assert result.kept.dtype == torch.float32
    check(result, brute(q, k, v, PATTERNS["union"], None, None, None), 2e-6)


@pytest.mark.parametrize("scale", [None, 0.0, 3.0])
@pytest.mark.parametrize("q_offset", [None, 0, 50, -7])
def test_scale_and_offset(scale: float | None, q_offset: int | None) -> None:
    q, k, v = tensors()
    result = retention(q, k, fl.window(5), v, base=fl.causal(), scale=scale, q_offset=q_offset)
    check(result, brute(q, k, v, fl.window(5), fl.causal(), scale, q_offset), 1e-12)


@pytest.mark.parametrize("few", [1, 10**9])
@pytest.mark.parametrize("name", ["window", "nothing", "some rows empty", "union", "future only"])
@pytest.mark.parametrize("base", [None, fl.causal()])
def test_gathered_pairs_agree_with_a_mask(
    few: int, name: str, base: fl.Pattern | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered whenever spans are cheap, or never."""
    monkeypatch.setattr(module, "_GATHER_RATIO", few)
    monkeypatch.setattr(module, "_TILE_SCORES", 3000)
    q, k, v = tensors()
    check(retention(q, k, PATTERNS[name], base=base), brute(q, k, v, PATTERNS[name], base, None, None), 1e-12)


@pytest.mark.parametrize("budget", [1, 100, 1000, 10**9])
def test_results_are_independent_of_the_tile_size(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    pattern = fl.per_head([fl.window(1), fl.full(), fl.causal(), fl.random_keys(3)]) & fl.padding([30, 41])
    monkeypatch.setattr(module, "_TILE_SCORES", budget)
    check(retention(q, k, pattern, v), brute(q, k, v, pattern, None, None, None), 1e-12)


def test_many_patterns_in_one_pass_are_as_one_by_one() -> None:
    q, k, v = tensors()
    together = retentions(q, k, list(PATTERNS.values()), v)
    for pattern, result in zip(PATTERNS.values(), together, strict=True):
        alone = retention(q, k, pattern, v)
        assert torch.equal(result.kept, alone.kept)
        assert torch.equal(result.best, alone.best)


@pytest.mark.parametrize("n_q, n_k", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 9)])
def test_tiny_and_empty(n_q: int, n_k: int) -> None:
    q, k, v = tensors(n_q=n_q, n_k=n_k)
    result = retention(q, k, fl.window(1), v)
    assert result.kept.shape == (2, 4, n_q)
    assert result.mass.isfinite().all()
    assert result.best.isfinite().all()
    assert result.density.isfinite().all()
    assert result.error is not None
    assert result.error.isfinite().all()


def test_row_that_sees_nothing_keeps_nothing() -> None:
    q, k, _ = tensors()
    result = retention(q, k, fl.sees_all([4]))
    # Row 0 stands at position n_k - n_q = 4.
    torch.testing.assert_close(result.kept[..., 0], torch.ones(2, 4, dtype=torch.float64))
    assert (result.kept[..., 1:] == 0).all()


def test_frontier_runs_from_nothing_to_everything_below_the_truth() -> None:
    q, k, v = tensors()
    true = brute(q, k, v, fl.full(), None, None, None)["curve"]
    result = retention(q, k, fl.window(1))
    density, share = result.frontier()
    assert (density.diff() >= 0).all()
    assert (share.diff() >= 0).all()
    torch.testing.assert_close(share[..., -1], torch.ones(2, 4, dtype=torch.float64))
    at = (density * result.base_links.unsqueeze(-1)).round().long()
    torch.testing.assert_close(share, true.gather(-1, at), rtol=0, atol=1e-9)
    for part in (0.0, 0.1, 0.5, 1.0):
        links = round(part * 37 * 41)
        assert (result.at(part) <= true[..., links] + 1e-9).all()
        torch.testing.assert_close(result.at(part), true[..., links], rtol=0, atol=2e-3)


def test_best_is_close_on_a_text_of_some_length() -> None:
    """The promise is the slack; here it must also be small."""
    q, k, _ = tensors(1, 2, 2, 700, 700, 16, seed=3)
    result = retention(q, k, fl.window(20))
    assert result.best_slack.max() < 2e-4
    assert (result.best > result.mass + 0.1).all()


def test_causal_base_leaves_out_pairs_that_full_attention_never_sees() -> None:
    q, k, _ = tensors(n_q=41)
    result = retention(q, k, fl.full(), base=fl.causal())
    assert (result.density == 1).all()
    torch.testing.assert_close(result.mass, torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(result.best, torch.ones(2, 4, dtype=torch.float64))
    assert (result.frontier()[0][..., -1] == 1).all()


def test_error_is_zero_for_everything_and_one_for_nothing() -> None:
    q, k, v = tensors()
    assert (retention(q, k, fl.full(), v).error == 0).all()
    torch.testing.assert_close(retention(q, k, PATTERNS["nothing"], v).error, torch.ones(2, 4, dtype=torch.float64))
    assert retention(q, k, fl.full()).error is None


def test_error_survives_rows_that_keep_next_to_nothing() -> None:
    """Dividing the kept part by its mass would give nan where it underflows; the answer is v of the only key left."""
    q = torch.full((1, 1, 2, 1), 40.0)
    k = torch.tensor([[[[0.0], [40.0]]]])
    v = torch.tensor([[[[1.0], [2.0]]]])
    result = retention(q, k, fl.seen_by_all([0]), v, scale=1.0)
    assert (result.kept == 0).all()
    torch.testing.assert_close(result.error, torch.tensor([[0.5]]))


def test_inputs_that_require_grad_and_odd_strides() -> None:
    q, k, v = tensors()
    strided = [t.mT.contiguous().mT.requires_grad_() for t in (q, k, v)]
    result = retention(strided[0], strided[1], fl.window(2), strided[2])
    assert not result.kept.requires_grad
    check(result, brute(q, k, v, fl.window(2), None, None, None), 1e-12)


def test_is_a_value() -> None:
    q, k, _ = tensors()
    result = retention(q, k, fl.window(2))
    with pytest.raises(AttributeError):
        result.links = result.links  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again.at(0.3), result.at(0.3))
    assert "_histogram" not in repr(result)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"q": torch.zeros(3, 4, 5)}, r"q has shape \(3, 4, 5\): four dimensions .* q\.unsqueeze"),
        ({"k": torch.zeros(2, 2, 41, 7)}, "k has head_dim 7, but q has 8"),
        ({"k": torch.zeros(2, 3, 41, 8)}, "q has 4 heads and k has 3; q's must be a multiple"),
        ({"k": torch.zeros(2, 0, 41, 8)}, "q has 4 heads and k has 0"),
        ({"k": torch.zeros(1, 2, 41, 8)}, "k has batch 1, but q has 2"),
        ({"v": torch.zeros(2, 2, 40, 8)}, r"v has \(heads, tokens\) = \(2, 40\), but k has \(2, 41\)"),
        (
            {"v": torch.zeros(2, 2, 41, 8).double()},
            r"v is torch.float64 on cpu, but q is torch.float32 on cpu; pass v.to\(q\)",
        ),
        ({"q": torch.zeros(2, 4, 37, 8).long()}, r"q has dtype torch.int64: a floating dtype .* q.float\(\)"),
        ({"scale": float("nan")}, "scale = nan"),
    ],
)
def test_bad_calls_say_what_is_wrong(change: dict[str, object], text: str) -> None:
    q, k, v = (t.float() for t in tensors())
    call = {"q": q, "k": k, "v": v, "scale": None} | change
    with pytest.raises(fl.ArgumentError, match=text):
        retention(call["q"], call["k"], fl.full(), call["v"], scale=call["scale"])  # type: ignore[arg-type]


def test_bad_density() -> None:
    q, k, _ = tensors()
    with pytest.raises(fl.ArgumentError, match=r"density = 1\.5: a share .* between 0 and 1"):
        retention(q, k, fl.full()).at(1.5)


def test_pattern_that_does_not_fit() -> None:
    q, k, _ = tensors()
    with pytest.raises(fl.PatternError, match="5 columns, but there are 41 keys"):
        retention(q, k, fl.pairs(torch.ones(37, 5, dtype=torch.bool)))


def test_the_histogram_puts_values_where_they_belong() -> None:
    """Every value lies between the edges of its bin; without this, slack would promise too much."""
    values = torch.cat([torch.rand(1000), torch.rand(1000) ** 20, torch.tensor([1.0, 0.0, 1e-30, 1.0 + 1e-6])])
    builder = HistogramBuilder(1, 1, torch.device("cpu"))
    builder.add(values.view(1, 1, -1), slice(0, 1), slice(0, 1))
    result = builder.finish(1, torch.tensor([[values.numel()]]))
    assert result.count.sum() == values.numel()
    assert result.count.shape[-1] == BINS
    ordered = values.double().sort(descending=True).values.cumsum(0)
    for links in (1, 5, 77, 1000, values.numel()):
        share, slack = result.best(torch.tensor([[links]]))
        assert share - 1e-5 <= ordered[links - 1] <= share + slack + 1e-5


def test_a_wrong_mass_would_be_noticed() -> None:
    """The comparison itself can fail: one row off, one link off."""
    q, k, v = tensors()
    true = brute(q, k, v, fl.window(3), None, None, None)
    result = retention(q, k, fl.window(3), v)
    true["kept"][0, 0, 5] += 1e-9
    with pytest.raises(AssertionError):
        check(result, true, 1e-12)
    with pytest.raises(AssertionError):
        check(result, brute(q, k, v, fl.window(3, 2), None, None, None), 1e-12)


def test_memory_grows_with_the_length_not_its_square() -> None:
    def peak(n: int) -> int:
        q, k, _ = (t.float() for t in tensors(1, 2, 2, 256, n, 8))
        with peak_memory() as result:
            retention(q, k, fl.window(8) | fl.global_tokens([0]))
        return result.bytes

    peak(1024)
    # 256 x 65 536 x 2 heads would be 128 MiB of scores, several times over.
    assert peak(65_536) < 120 * 2**20


@pytest.mark.parametrize("with_values", [False, True], ids=["gathered", "masked"])
def test_a_sink_of_no_value_counts_for_the_plain_share_alone(with_values: bool) -> None:
    """Every query gives nine tenths to a first key whose value is zero; the pattern keeps that key and nothing else."""
    n = 200
    q = torch.ones(1, 1, n, 1, dtype=torch.float64)
    k, v = torch.zeros_like(q), torch.ones_like(q)
    k[:, :, 0], v[:, :, 0] = torch.tensor(9.0 * (n - 1)).log(), 0.0
    result = retention(q, k, fl.seen_by_all([0]), v if with_values else None, scale=1.0)
    assert result.mass.item() == pytest.approx(0.9)
    assert result.mass_without_sink is not None
    assert result.mass_without_sink.item() == 0.0
    assert result.lost_output is None or result.lost_output.item() == pytest.approx(1.0)
    assert (result.lost_output is None) == (not with_values)
    plain = retention(q, k, fl.seen_by_all([0]), scale=1.0, sinks=0)
    assert plain.mass_without_sink is not None
    assert plain.mass_without_sink.item() == pytest.approx(0.9)
