"""`fl.hf.fit` on whole models: budgets over layers, saved fits, gists; audits of routers and mappings; the command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel

import farlight as fl
from farlight.analysis.audit import audit
from farlight.analysis.candidates_by_layer import Subject, subjects
from farlight.analysis.cost import AttentionShape, cost_in_passages, mean_cost
from farlight.analysis.fit.model_profile import profile_model
from farlight.analysis.fit.whole_model import fit_profile
from farlight.analysis.loss.fidelity import measure_fidelity
from farlight.analysis.loss.top_losses import LostLink, top_losses
from farlight.analysis.passages import Passages
from farlight.analysis.plot import plot_frontier, plot_heads
from farlight.cli import main
from farlight.hf import use_pattern
from farlight.routing import Gist, PerHeadRouter, TopBlocks, TopKeys, gist_attention, read_router

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def decoder() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def ids(count: int = 6, length: int = 48) -> Tensor:
    return torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(1))


def states(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]
    return hidden


# ---- whole-model fits ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("candidates", [None, ["pairs"], ["window", "topkeys(2)", "topkeys(6)"]])
def test_a_fit_is_saved_loaded_and_run(make: Any, candidates: Any, tmp_path: Path) -> None:
    model = make()
    result = fl.hf.fit(model, ids(), density=0.2, candidates=candidates)
    assert result.density <= 0.2 + 1e-9
    assert result.passages == (3, 3)
    assert result.kept_by_head.shape == result.density_by_head.shape == (2, 4)
    path = tmp_path / "fit.json"
    text = result.save(path)
    assert json.loads(text)["format"] == "farlight.fit"
    assert json.loads(path.read_text())["model"]["passage_tokens"] == 48
    loaded = fl.hf.read_layers(path)
    assert sorted(loaded) == [0, 1]
    with use_pattern(model, result.patterns):
        expected = states(model, ids())
    fl.hf.sparsify(model, path)
    torch.testing.assert_close(states(model, ids()), expected, rtol=0, atol=0)
    fl.hf.restore(model)
    assert (states(model, ids()) - expected).abs().max() > 1e-3, "a fit that changes nothing was not applied"


def test_reported_shares_of_the_fitted_texts_are_measured() -> None:
    model = encoder()
    result = fl.hf.fit(model, ids(), keep=0.6, held_out=0.5)
    torch.testing.assert_close(result.trained.mass, result.kept_by_head, rtol=0, atol=0.05)
    assert result.kept_by_head.mean() >= 0.6 - 1e-9
    again = measure_fidelity(model, ids()[:3], [result.patterns]).patterns[0]
    torch.testing.assert_close(again.mass, result.kept_by_head, rtol=0, atol=1e-5)


def test_pairs_overfit_and_the_report_shows_the_gap() -> None:
    result = fl.hf.fit(encoder(), ids(8), density=0.15, candidates="pairs")
    assert result.held_out is not None
    assert result.trained.mass.mean() > result.held_out.mass.mean() + 0.1
    assert re.search(r"held out .*\n.*difference +-\d", str(result))
    data = result.to_dict()
    assert data["trained"]["kept"] > data["held_out"]["kept"]
    assert json.loads(json.dumps(data))["passages"] == [4, 4]


def flattened(model: BertModel) -> BertModel:
    """Layer 0 gets uniform attention."""
    with torch.no_grad():
        query = model.encoder.layer[0].attention.self.query
        query.weight.zero_()
        query.bias.zero_()
    return model


def test_a_local_layer_leaves_its_budget_to_a_flat_one() -> None:
    """Layer 1 attends to the diagonal alone (queries equal keys, of one norm) and gets it; the uniform layer gets the rest."""
    torch.manual_seed(0)
    model = flattened(BertModel(BertConfig(**SIZES | {"num_attention_heads": 1})).eval())
    with torch.no_grad():
        attention = model.encoder.layer[1].attention.self
        for projection in (attention.query, attention.key):
            projection.weight.copy_(torch.eye(32) * 40)
            projection.bias.zero_()
    result = fl.hf.fit(model, ids(), density=0.3, even=False)
    flat, local = result.layers[0], result.layers[1]
    assert local.heads == (fl.window(0),)
    assert local.mass > 0.999
    budget = 0.3 * 2 * 48 * 48 - 48
    assert budget - 48 < float(flat.links[0]) <= budget
    assert flat.mass == pytest.approx(flat.density, abs=1e-6)


@pytest.mark.parametrize("density", [0.05, 0.15, 0.3, 0.6])
def test_layers_share_one_budget(density: float) -> None:
    """The kept share over all heads of all layers is within one step of one head of the optimal allocation."""
    result = fl.hf.fit(flattened(encoder()), ids(), density=density, even=False)
    frontiers = [frontier for fit in result.fits for frontier in fit.frontiers]
    budget = density * sum(float(fit.base_links.sum()) for fit in result.fits)
    kept = sum(float(fit.kept.sum()) for fit in result.fits)
    assert sum(float(fit.links.sum()) for fit in result.fits) <= budget * (1 + 1e-9)
    # The fractional relaxation takes the steepest steps first and bounds every choice of whole steps.
    best, left, worth = sum(float(frontier[0, 1]) for frontier in frontiers), budget, 0.0
    left -= sum(float(frontier[0, 0]) for frontier in frontiers)
    steps = torch.cat([frontier.diff(dim=0) for frontier in frontiers]).tolist()
    for links, gain in sorted(steps, key=lambda step: step[1] / step[0], reverse=True):
        if links > left:
            best, worth = best + gain * left / links, gain
            break
        best, left = best + gain, left - links
    assert best - worth - 1e-9 <= kept <= best + 1e-9


def test_weights_move_links_between_layers() -> None:
    model = encoder()
    profile = profile_model(model, ids())
    plain = fit_profile(profile, None, density=0.2)
    weighed = fit_profile(profile, None, density=0.2, weigh=True)
    assert plain.weights == (1.0, 1.0)
    assert sum(weighed.weights) == pytest.approx(2.0)
    heavy = int(weighed.weights[1] > weighed.weights[0])
    assert weighed.layers[heavy].density > plain.layers[heavy].density
    assert plain.held_out is None
    assert plain.passages == (6, 0)


def test_texts_are_read_and_cut() -> None:
    from test_audit import tokenizer, words

    result = fl.hf.fit(encoder(), words(300), tokenizer=tokenizer(), length=48, density=0.2)
    assert result.passage_tokens == 48
    assert sum(result.passages) == 300 // 46


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"texts": "some words"}, "texts are words, but there is no tokenizer to read them; pass tokenizer="),
    ({"texts": torch.zeros(3, 4)}, r"texts is a tensor \(3, 4\) of torch.float32; token ids"),
    ({"held_out": 1.0}, r"held_out = 1.0: it is the share of passages to judge on"),
    ({"keep": 0.9, "density": 0.1}, "give one of them"),
    ({"density": 0.05, "gist": 16}, r"density = 0.05 with gist = 16: the summaries alone may take 1/16 of all links"),
]


@pytest.mark.parametrize("options, text", ERRORS)
def test_bad_fits_say_what_is_wrong(options: dict[str, Any], text: str) -> None:
    with pytest.raises(fl.ArgumentError, match=text):
        fl.hf.fit(encoder(), **({"texts": ids()} | options))


# ---- routers by head, and gists -------------------------------------------------------------------
def test_per_head_routers_choose_for_their_own_head() -> None:
    q, k = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
    router = read_router("per_head([topkeys(2), window(1), topblocks(1, 4) | window(0), topkeys(3) & causal()])")
    assert isinstance(router, PerHeadRouter)
    result = router(q, k).dense(20, batch=2, heads=4)
    each = [TopKeys(2), None, TopBlocks(1, 4) | fl.window(0), TopKeys(3) & fl.causal()]
    for head, router_or_pattern in enumerate(each):
        pattern = fl.window(1) if router_or_pattern is None else router_or_pattern(q, k)
        assert torch.equal(result[:, head], pattern.dense(20, batch=2, heads=4).expand(2, 4, -1, -1)[:, head])
    with pytest.raises(fl.ArgumentError, match="per_head was given 4 routers and patterns, but there are 2 heads"):
        router(q[:, :2], k)
    with pytest.raises(fl.ArgumentError, match="per_head: int is neither a router nor a pattern"):
        PerHeadRouter([3])  # type: ignore[list-item]


@pytest.mark.parametrize("make", [encoder, decoder])
def test_a_gist_runs_in_the_model(make: Any) -> None:
    """The first layer's output is that of `gist_attention`; its summaries count as links."""
    model, causal = make(), make is decoder
    flag = ", causal=True" if causal else ""
    expression = f"gist(topblocks(2, block=4, query_block=1{flag}) | window(1), block=8)"
    router = read_router(expression)
    assert isinstance(router, Gist)
    seen: list[Any] = []
    with use_pattern(model, None, observer=seen.append):
        plain = states(model, ids())
    module = seen[0].module
    outputs: list[Tensor] = []
    last = module.o_proj if causal else model.encoder.layer[0].attention.output.dense
    handle = last.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
    with use_pattern(model, {0: router}):
        heard = states(model, ids())
    handle.remove()
    q, k, v = seen[0].q, seen[0].k, seen[0].v
    pattern = router(q, k) & fl.causal() if causal else router(q, k)
    expected = gist_attention(q, k, v, pattern, block=8, causal=causal)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(outputs[0], expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)
    assert (plain - heard).abs().max() > 1e-4

    result = measure_fidelity(model, ids(), [{0: router}, {0: read_router(expression[5:-10])}]).patterns
    dense = pattern.dense(48, batch=6, heads=4).expand(6, 4, -1, -1)
    free = ~dense.unflatten(-1, (-1, 8)).any(-1)
    if causal:
        free &= (torch.arange(6) + 1) * 8 <= torch.arange(48)[:, None] + 1
    assert (result[0].links - result[1].links) * 2 == pytest.approx(free.sum((-1, -2)).double().mean().item())


def test_a_gist_ignores_padding() -> None:
    model, router = encoder(), Gist(fl.window(1), 4)
    tokens = ids(2)
    mask = torch.ones_like(tokens)
    mask[1, 30:] = 0
    with use_pattern(model, router), torch.no_grad():
        padded = model(input_ids=tokens, attention_mask=mask)[0]
        tokens[1, 30:] = 7
        other = model(input_ids=tokens, attention_mask=mask)[0]
        alone = model(input_ids=tokens[1:, :30], attention_mask=mask[1:, :30])[0]
    torch.testing.assert_close(padded[1, :30], other[1, :30], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1, :28], alone[0, :28], rtol=1e-4, atol=1e-4)


def test_unsupported_gists_are_refused() -> None:
    with pytest.raises(fl.PatternError, match=r"gist\(…\) stands around the whole expression; move it outwards"):
        read_router("window(1) | gist(topblocks(2), block=8)")
    with pytest.raises(fl.PatternError, match="gist: .*block"):
        read_router("gist(topblocks(2), block=0)")
    with pytest.raises(fl.ArgumentError, match="the inner router is a gist already"):
        Gist(Gist(TopBlocks(1), 4), 4)
    with pytest.raises(fl.ArgumentError, match="gist: int is neither a router nor a pattern"):
        Gist(3, 4)  # type: ignore[arg-type]
    joined = Gist(fl.window(1), 4) | fl.window(2)
    assert isinstance(joined, Gist), "joined to a pattern, the summaries must not be forgotten"
    x = torch.randn(1, 1, 8, 4)
    assert joined(x, x).count(8) == fl.window(2).count(8)
    windowed = MistralModel(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)).eval()
    with pytest.raises(fl.UnsupportedError, match="or a mask of its own"), use_pattern(windowed, Gist(fl.window(1), 4)):
        states(windowed, ids())
    model = encoder().train()
    with pytest.raises(fl.UnsupportedError, match="a gist of what is not seen knows full and causal attention"):  # noqa: SIM117
        with use_pattern(model, Gist(fl.window(1), 4)):
            model(ids())


def test_a_fit_with_a_gist_stays_within_its_density() -> None:
    model = encoder()
    result = fl.hf.fit(model, ids(), density=0.4, candidates=["topkeys(1)", "topkeys(4)", "topkeys(8)"], gist=8)
    assert result.trained.links / result.trained.base_links <= 0.4
    assert all(isinstance(router, Gist) for router in result.patterns.values())
    assert all(isinstance(router, Gist) for router in fl.hf.read_layers(result.save()).values())


# ---- audits ----------------------------------------------------------------------------------------------------------
def test_a_router_is_audited_like_a_pattern() -> None:
    """A router's mass and links are those of its choice; a router with a constant choice equals that pattern."""
    model = encoder()
    router = TopKeys(3) | fl.window(1)
    result = measure_fidelity(model, ids(), [router, read_router("window(2)"), fl.window(2)], lost=4).patterns
    seen: list[Any] = []
    with use_pattern(model, None, observer=seen.append):
        states(model, ids())
    for layer, call in enumerate(seen):
        retention = fl.retention(call.q, call.k, router(call.q, call.k))
        torch.testing.assert_close(result[0].mass[layer], retention.mass.double().mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(result[1].mass, result[2].mass)
    assert result[1].token_cosine == pytest.approx(result[2].token_cosine, abs=1e-6)
    assert result[1].lost == result[2].lost


def test_layer_mappings_are_measured_by_layer_number() -> None:
    model = encoder()
    result = measure_fidelity(model, ids(), [{1: fl.window(1)}, fl.window(1), {}]).patterns
    torch.testing.assert_close(result[0].mass[1], result[1].mass[1])
    torch.testing.assert_close(result[0].mass[0], torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-5)
    assert result[2].token_cosine == pytest.approx(1.0, abs=1e-6)
    assert result[1].token_cosine < result[0].token_cosine < 1.0


def test_lost_links_of_an_audit_are_the_top_losses() -> None:
    """Eight links per head are collected; each pair is listed once, and at most two of one head."""
    model, tokens = encoder(), ids(5)
    result = measure_fidelity(model, tokens, [fl.window(2)], lost=7, words=[[str(t) for t in row] for row in tokens.tolist()])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        full = torch.stack(model(input_ids=tokens, output_attentions=True).attentions)
    full = full.masked_fill(fl.window(2).dense(48), 0.0)
    every = [
        LostLink(share, head, place // 48 % 48, place % 48, place // 48**2, layer)
        for layer in range(2)
        for head in range(4)
        for share, place in zip(*(x.tolist() for x in full[layer, :, head].flatten().topk(8)), strict=True)
    ]
    best = top_losses(every, 7)
    links = result.patterns[0].lost
    assert [replace(link, probability=0.0, query_word=None, key_word=None) for link in links] == [
        replace(link, probability=0.0) for link in best
    ]
    assert links[0].probability == pytest.approx(full.max().item(), rel=1e-3)
    for link in links:
        assert link.layer is not None
        place = full[link.layer, link.text, link.head, link.query, link.key].item()
        assert place == pytest.approx(link.probability, abs=1e-5)
        assert link.query_word == str(tokens[link.text, link.query].item())
        assert link.key_word == str(tokens[link.text, link.key].item())


def test_an_audit_has_figures_by_head() -> None:
    result = audit(encoder(), Passages(ids(2), 300), [fl.window(2), TopBlocks(2, 8) | fl.window(1), {0: fl.window(2)}], lost=3)
    for row in result.patterns:
        assert len(row.mass_by_head) == 2
        mean = sum(map(sum, row.mass_by_head)) / 8
        assert mean == pytest.approx(row.mass)
        assert len(row.lost) == 3
        assert row.long_text.why_not is None
        assert min(row.measured_speedup, row.long_text.seconds) > 0
    data = json.loads(json.dumps(result.to_dict()))
    assert data["patterns"][0]["lost"][0]["probability"] == pytest.approx(result.patterns[0].lost[0].probability)
    assert [row.pattern for row in result.patterns][::2] == ["window(2)", "1 layers' own"]
    assert result.patterns[2].long_text.links < result.patterns[2].long_text.full_links


def test_what_cannot_be_judged() -> None:
    with pytest.raises(fl.ArgumentError, match="int cannot be judged; give a pattern, a router, or a mapping"):
        subjects([3])  # type: ignore[list-item]
    assert subjects([Subject("mine", fl.window(1))])[0].name == "mine"
    assert subjects([read_router("topkeys(3)")])[0].name == "topkeys(3)"


def test_a_router_that_cannot_run_is_reported() -> None:
    layer = AttentionShape(2, 2, 8, 8, torch.float32, torch.device("cpu"), fl.full())
    cost = cost_in_passages(layer, read_router("per_head([topkeys(1)])"), layer.random(32), least=0.01)
    assert "per_head was given 1" in str(cost.why_not)
    good = cost_in_passages(layer, TopKeys(4), layer.random(32), least=0.01)
    assert good.links == 4 * 32
    both = mean_cost([good, cost_in_passages(layer, fl.full(), layer.random(32), least=0.01)])
    assert both.links == (4 * 32 + 32 * 32) / 2
    assert mean_cost([good, cost]).why_not == cost.why_not


def test_a_small_world_of_one_example() -> None:
    q = torch.randn(1, 1, 60, 8)
    chosen = TopBlocks(2, 4)(q, q) | fl.window(1)
    world = fl.smallworld(chosen, 60)
    assert world.links == chosen.count(60) == int(chosen.dense(60).sum())
    assert fl.path(chosen, 60, 0, 59).layers <= 59


# ---- the command line ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_audit import tokenizer, words

    root = tmp_path_factory.mktemp("fit")
    encoder().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(words(700))
    (root / "short.txt").write_text(words(70))
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_audit_fits_saves_and_judges_on_other_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["audit", str(place / "text.txt"), "--model", str(place / "model"), "--passages", "3", "--length", "48"]
    file = place / "fit.json"
    code, out, _ = run(capsys, *common, "--density", "0.2", "--candidate", "window", "--save", str(file), "--json")
    assert code == 0
    result = json.loads(out)
    assert [row["pattern"] for row in result["patterns"]] == ["fitted, density 0.2"]
    assert result["patterns"][0]["density"] <= 0.2
    assert result["fit"]["passages"] == [3, 3]
    assert result["patterns"][0]["mass"] == pytest.approx(result["fit"]["held_out"]["kept"], abs=1e-6)
    assert sorted(fl.hf.read_layers(file)) == [0, 1]
    code, out, _ = run(capsys, *common, "--keep", "0.5", "--pattern", "topblocks(share=0.1, block=4)")
    assert code == 0
    assert "topblocks(share=0.1, block=4)" in out
    assert "no longer sees" in out
    assert re.search(r"held out +\d", out)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["text.txt", "--keep", "2"], "keep = 2.0: it must be a share"),
        (["text.txt", "--keep", "0.5", "--density", "0.5"], "give one of them"),
        (
            ["text.txt", "--save", "x.json"],
            "--candidate and --save belong to a fit: add --keep 0.95, --density 0.1",
        ),
        (["text.txt", "--keep", "0.5", "--save", "nowhere/x.json"], "there is no folder"),
        (["text.txt", "--keep", "0.5", "--candidate", "doors"], "there is no family 'doors'"),
        (["short.txt", "--keep", "0.5"], "the text makes 1 passage of 64 tokens; a fit needs one to fit to and another"),
        (["text.txt", "--pattern", "topblocks(share=7)"], "topblocks"),
    ],
)
def test_errors_are_one_message(arguments: list[str], text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "audit", str(place / arguments[0]), "--model", str(place / "model"), *arguments[1:])
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


# ---- pictures --------------------------------------------------------------------------------------------------------
def test_pictures() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = torch.tensor([[0.1, 0.9], [0.5, 0.25]])
    ax = plot_heads(values)
    assert sorted(text.get_text() for text in ax.texts) == ["10", "25", "50", "90"]
    q = torch.randn(1, 2, 30, 8)
    fitted = fl.fit(q, q, density=0.2)
    ax = plot_frontier(fl.retention(q, q, fl.window(2)), fitted)
    assert len(ax.lines) == 5  # two heads, their mean, the pattern, the fit
    plt.close("all")
    with pytest.raises(fl.ArgumentError, match=r"values have shape \(3,\); \(layers, heads\) are needed"):
        plot_heads(torch.zeros(3))
