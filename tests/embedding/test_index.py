"""The index on disk and the documents of `farlight embed`: each file once, the same vectors after every interruption."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_audit import encoder, tokenizer, words

import farlight as fl
from farlight.cli import main
from farlight.embedding import Embedder, Index
from farlight.embedding.book import encode_document
from farlight.errors import UnsupportedError

NEAR = "window(4) | global_tokens([0, -1])"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index")
    encoder().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    return root


@pytest.fixture
def embedder(place: Path) -> Embedder:
    return Embedder.load(str(place / "model"), fl.parse(NEAR), positions=64)


def texts(count: int) -> list[tuple[str, str]]:
    return [(f"n{k}.txt", " ".join(words(900).split()[k % 800 : k % 800 + 20 + k % 37])) for k in range(count)]


class Killed(BaseException):
    """Stands for SIGKILL: what was not written is lost."""


def test_each_document_once_and_the_same_vectors_after_two_kills(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farlight.embedding.index._PIECE_DOCUMENTS", 7)
    whole = Index(tmp_path / "whole", embedder)
    documents = texts(40)
    assert whole.add(documents) == 40
    encoded: list[str] = []

    def counted(*args: Any, **options: Any) -> Any:
        encoded.append(args[1])
        return encode_document(*args, **options)

    monkeypatch.setattr("farlight.embedding.index.encode_document", counted)
    for last in (11, 29):
        index = Index(tmp_path / "index", embedder)

        def step(name: str, index: Index = index, last: int = last) -> None:
            if name == f"n{last}.txt":
                index._open = []
                raise Killed

        with pytest.raises(Killed):
            index.add(documents, step=step)
        (tmp_path / "index" / "000009-dead.half").write_bytes(b"half a piece")
    index = Index(tmp_path / "index", embedder)
    kept = len(index)
    assert kept == 28
    assert index.add(documents) == 40 - kept
    assert len(encoded) == 40 + 4 + 1  # the unwritten ones of each kill, again
    assert sorted(index.documents) == sorted(name for name, _ in documents)
    assert index.add(documents) == 0
    for name, (chapters, passages) in whole.vectors().items():
        assert torch.equal(index.vectors()[name][0], chapters)
        assert torch.equal(index.vectors()[name][1], passages)
    assert Index(tmp_path / "index", embedder).vectors().keys() == whole.vectors().keys()


def test_a_search_is_that_of_the_vectors(embedder: Embedder, tmp_path: Path) -> None:
    index, documents = Index(tmp_path / "index", embedder, passage=9), texts(12)
    index.add(documents)
    (query,) = embedder.embed(["w3 w7 the"])
    hits = Index(tmp_path / "index", embedder).search("w3 w7 the", 6)
    scores = torch.cat([passages @ query for _, passages in index.vectors().values()])
    assert [hit.score for hit in hits] == pytest.approx(scores.topk(6).values.tolist())
    for hit in hits:
        assert dict(documents)[hit.document][hit.start : hit.stop] == hit.text
    assert Index(tmp_path / "new", embedder).search("the") == []


def test_a_changed_text_replaces_the_older(embedder: Embedder, tmp_path: Path) -> None:
    index = Index(tmp_path / "index", embedder)
    index.add([("a", words(30)), ("b", words(40))])
    assert index.add([("a", "w1 w2 w3"), ("b", words(40))]) == 1
    for opened in (index, Index(tmp_path / "index", embedder)):
        assert opened.documents == ["a", "b"]
        assert {hit.text for hit in opened.search("w1", 99) if hit.document == "a"} == {"w1 w2 w3"}
        assert len(opened.vectors()["a"][1]) == 1
        passages = sum(len(rows) for _, rows in opened.vectors().values())
        assert f": 2 documents in {passages} passages, " in repr(opened)


def test_what_does_not_belong_to_an_index(embedder: Embedder, place: Path, tmp_path: Path) -> None:
    index = Index(tmp_path / "index", embedder, passage=9)
    index.add(texts(3))
    for make, says in (
        (lambda: Index(tmp_path / "index", embedder, passage=10), "was made with passage = 9, not 10"),
        (
            lambda: Index(tmp_path / "index", Embedder(embedder.model, embedder.tokenizer, fl.window(2), positions=64)),
            "was made with pattern = ",
        ),
        (lambda: Index(place, embedder), "is something else than an index"),
        (lambda: Index(tmp_path / "index2", embedder, passage=0), "passages of 0 tokens"),
    ):
        with pytest.raises(fl.ArgumentError, match=says):
            make()
    torch.manual_seed(5)
    other = type(embedder.model)(embedder.model.config).eval()
    with pytest.raises(fl.ArgumentError, match="which gives other vectors than"):
        Index(tmp_path / "index", Embedder(other, embedder.tokenizer, embedder.pattern, positions=64))
    piece = next((tmp_path / "index").glob("*.npz"))
    piece.write_bytes(piece.read_bytes()[:-100])
    with pytest.raises(fl.FarlightError, match="is damaged .*; delete it"):
        Index(tmp_path / "index", embedder)
    (tmp_path / "index" / "settings.json").write_text("{}")
    with pytest.raises(fl.ArgumentError, match=r"settings\.json cannot be read"):
        Index(tmp_path / "index", embedder)


def test_a_document_without_words_is_skipped_or_raises(embedder: Embedder, tmp_path: Path) -> None:
    index, skipped = Index(tmp_path / "index", embedder), []
    with pytest.raises(fl.ArgumentError, match="holds no chapter with words"):
        index.add([("a", words(30)), ("empty", " ")])
    assert index.documents == ["a"]
    assert index.add([("empty", " "), ("b", words(30))], skip=lambda name, error: skipped.append(name)) == 1
    assert skipped == ["empty"]


# ---- the command -----------------------------------------------------------------------------------------------------
def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any, str]:
    with pytest.raises(SystemExit) as ended:
        main(["embed", *map(str, arguments)])
    printed = capsys.readouterr()
    code = int(ended.value.code or 0)
    return code, json.loads(printed.out) if not code and "--json" in arguments else printed.out, printed.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "notes"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text(words(40))
    (root / "deep" / "b.md").write_text(words(50))
    (root / "bad.txt").write_bytes(b"\xff\xfe")
    (root / "picture.png").write_bytes(b"\x89PNG")
    lines = [json.dumps({"id": "first", "text": words(20)}), "{", json.dumps({"body": "x"}), json.dumps({"text": words(25)})]
    (root / "c.jsonl").write_text("\n".join(lines))
    return root


def test_folders_globs_and_json_lines(folder: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", place / "model", "--positions", "64", "--query", "the w3", "--json")
    code, report, err = run(capsys, folder, *options)
    assert code == 0
    books = {chapter["book"].removeprefix(f"{folder}/") for chapter in report["chapters"]}
    assert books == {"a.txt", "deep/b.md", "c.jsonl:first", "c.jsonl:4"}
    assert len(report["skipped"]) == err.count("farlight: skipped: ") == 3
    assert "is not UTF-8" in err
    assert "c.jsonl:2 is not JSON" in err
    assert "c.jsonl:3 has no text in 'text' (it has: body); name the field with --field." in err
    code, report, _ = run(capsys, folder / "**" / "*.md", folder / "a.txt", folder / "." / "a.txt", *options)
    assert [Path(chapter["book"]).name for chapter in report["chapters"]] == ["b.md", "a.txt"]
    code, report, err = run(capsys, folder / "c.jsonl", "--field", "body", *options)
    assert (code, [chapter["book"].rpartition(":")[2] for chapter in report["chapters"]]) == (0, ["3"])


def test_standard_input(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for data, names in (
        (words(40), ["standard input"]),
        (json.dumps({"text": words(30), "title": "t"}) + "\n" + json.dumps({"text": words(30)}), ["t", "2"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        options = ("--model", place / "model", "--positions", "64", "--query", "the w3", "--json")
        code, report, _ = run(capsys, "-", *options)
        assert code == 0
        assert [chapter["book"].rpartition(":")[2] for chapter in report["chapters"]] == names


def test_an_index_by_the_command(folder: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "made.index"
    options = ("--model", place / "model", "--positions", "64", "--index", index, "--json")
    code, report, err = run(capsys, folder, *options)
    assert (code, report["documents"], report["added"], len(report["skipped"])) == (0, 4, 4, 3)
    code, report, err = run(capsys, folder, *options)
    assert (code, report["documents"], report["added"]) == (0, 4, 0)
    code, report, err = run(capsys, "--index", index, "--query", "the w3", "--positions", "64", "--json")
    assert (code, err) == (0, "")
    assert report["pattern"] == "window(128) | global_tokens([0, -1])"
    hits = report["queries"][0]["passages"]
    assert hits[0]["score"] >= hits[-1]["score"]
    code, out, err = run(capsys, "--index", index, "--query", "the w3", "--positions", "64")
    assert code == 0
    assert "4 documents, 0 of them read now" in out
    assert f"1. {hits[0]['score']:.3f}" in out
    code, out, err = run(capsys, folder / "a.text", *options)  # a mistyped name is no success, whatever the index holds
    assert (code, out) == (2, "")
    assert "none of the documents can be read; the first: text " in err
    many = folder / "d.jsonl"
    many.write_text('{"body": "x"}\n' * 30)
    code, report, err = run(capsys, many, folder / "a.txt", *options)
    assert (code, len(report["skipped"]), len(err.splitlines())) == (0, 30, 11)
    assert err.endswith("more documents, which are counted below; --json lists them all.\n")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "no text was given"),
        (("--index", "{t}/i"), "nothing was asked: give texts to read into the index"),
        (("{t}", "--query", "x"), "holds no text (.txt"),
        (("{t}/*.txt", "--query", "x"), "no file fits"),
        (("{t}/i", "--index", "{t}/i", "--save", "{t}/a.npy"), "--index keeps the vectors already"),
        (("{t}/i", "--index", "{t}/i", "--words", "3", "--query", "x"), "--words reads the chapter again"),
        (("{t}/i", "--save", "{t}/a.csv"), "vectors are written as .npz, .npy, .jsonl, .parquet"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *(argument.format(t=tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_forms_of_vectors(suffix: str, folder: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"vectors{suffix}"
    options = ("--model", place / "model", "--positions", "64", "--passage", "16", "--json")
    code, report, _ = run(capsys, folder / "a.txt", folder / "deep", *options, "--save", file)
    assert code == 0
    run(capsys, folder / "a.txt", folder / "deep", *options, "--save", tmp_path / "v.npz")
    with np.load(tmp_path / "v.npz") as archive:
        stored = dict(archive)
    if suffix == ".npy":
        vectors = np.load(file)
    else:
        if suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        else:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(file).to_pylist()
        vectors = np.array([row["vector"] for row in rows], dtype=np.float32)
        assert [row["start"] for row in rows] == stored["passage_start"].tolist()
        for row in rows:
            assert Path(row["document"]).read_text()[row["start"] : row["stop"]] == row["text"]
    assert vectors.shape == (report["passages"], 32)
    np.testing.assert_array_equal(vectors, stored["passages"])


def test_documents_of_a_parquet_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [words(30), None, words(20)], "id": ["x", "y", None], "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "t.parquet")
    options = ("--model", place / "model", "--positions", "64", "--query", "the", "--json")
    code, report, err = run(capsys, tmp_path / "t.parquet", *options)
    assert code == 0
    assert [chapter["book"].rpartition(":")[2] for chapter in report["chapters"]] == ["x", "3"]
    assert "has no text in 'text'" in err


@pytest.mark.slow
def test_a_thousand_files_killed_twice(place: Path, tmp_path: Path) -> None:
    """By SIGKILL, as a shell would: each file once, the vectors of an undisturbed run."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for name, text in texts(1000):
        (notes / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(fl.__file__).parents[1])}

    def command(index: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "farlight", "embed", str(notes), "--index", str(index), "--json"),
            *("--model", str(place / "model"), "--positions", "64"),
        ]

    index = tmp_path / "killed"
    for _ in range(2):
        process = subprocess.Popen(command(index), env=environment, stdout=subprocess.DEVNULL)
        pieces = len(list(index.glob("*.npz")))
        while len(list(index.glob("*.npz"))) == pieces and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(index), env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["documents"] == 1000
    assert report["added"] < 1000
    plain = subprocess.run(command(tmp_path / "plain"), env=environment, capture_output=True, text=True, check=True)
    assert json.loads(plain.stdout)["added"] == 1000
    embedder = Embedder.load(str(place / "model"), positions=64)
    first, second = (Index(tmp_path / name, embedder).vectors() for name in ("killed", "plain"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name][1], second[name][1]) for name in second)


# ---- sentence-transformers -------------------------------------------------------------------------------------------
def test_a_sentence_transformer_is_made_sparse_and_longer(place: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    holder = Transformer(str(place / "model"))
    model = sentence_transformers.SentenceTransformer(modules=[holder, Pooling(32)], device="cpu")
    before = model.encode([words(40)], normalize_embeddings=True)
    assert fl.hf.lengthen(model, 200) is model
    assert model.max_seq_length == 200
    assert np.allclose(model.encode([words(40)], normalize_embeddings=True), before, atol=1e-6)
    assert fl.hf.sparsify(model, fl.parse(NEAR)) is model
    embedder = Embedder(holder.auto_model, holder.tokenizer, fl.parse(NEAR), positions=200)
    for text in (words(40), words(150)):
        assert np.allclose(model.encode([text], normalize_embeddings=True), embedder.embed([text]).numpy(), atol=1e-5)
    assert fl.hf.restore(model) is model
    assert np.allclose(model.encode([words(40)], normalize_embeddings=True), before, atol=1e-6)


def test_a_module_of_sentence_transformers_keeps_its_pattern(place: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling

    module = fl.embedding.SparseTransformer(str(place / "model"), pattern=NEAR, positions=200)
    model = sentence_transformers.SentenceTransformer(modules=[module, Pooling(32)], device="cpu")
    embedder = Embedder.load(str(place / "model"), fl.parse(NEAR), positions=200)
    texts = [words(40), words(150)]
    vectors = model.encode(texts, normalize_embeddings=True)
    assert np.allclose(vectors, embedder.embed(texts).numpy(), atol=1e-5)
    model.save(str(tmp_path / "long"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "long"), device="cpu", trust_remote_code=True)
    assert (again[0].pattern, again[0].positions, again.max_seq_length) == (repr(fl.parse(NEAR)), 200, 200)
    assert np.allclose(again.encode(texts, normalize_embeddings=True), vectors, atol=1e-6)


def test_without_sentence_transformers_the_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers.sentence_transformer.modules", None)
    monkeypatch.delitem(sys.modules, "farlight.embedding.sentence_module", raising=False)
    with pytest.raises(UnsupportedError, match="pip install 'sentence-transformers>=6'"):
        _ = fl.embedding.SparseTransformer
