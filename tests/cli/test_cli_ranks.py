"""`farlight embed` in the processes of torchrun: each document by one of them, into one index."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_audit import encoder, tokenizer, words
from torch.distributed import HashStore

from farlight.cli import main
from farlight.cli.documents import read_documents
from farlight.cli.ranks import Ranks
from farlight.embedding.index import Index
from farlight.embedding.reading import Embedder


def documents(folder: Path) -> list[Path]:
    """Four texts and five JSON lines, the last without a text."""
    for number in range(4):
        (folder / f"text {number}.txt").write_text(words(40 + 30 * number))
    lines = [{"id": str(number), "text": words(20 + number)} for number in range(4)]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"id": "empty"}])))
    return sorted(folder.iterdir())


def test_each_document_is_claimed_once_in_any_interleaving(tmp_path: Path) -> None:
    paths, store, turns = documents(tmp_path), HashStore(), random.Random(0)
    whole = [document.name for document in read_documents(paths)]
    assert len(whole) == 9
    readers = [read_documents(paths, is_claimed=Ranks(store, rank, 3).claims()) for rank in range(3)]
    names: list[str] = []
    while readers:
        reader = turns.choice(readers)
        document = next(reader, None)
        if document is None:
            readers.remove(reader)
        else:
            names.append(document.name)
    assert sorted(names) == sorted(whole)


def test_documents_of_one_name_are_told_apart_by_every_process(tmp_path: Path) -> None:
    """Also where a later document has the very name that an earlier one was given."""
    ids, file = ["a", "a", "a (2)", "b", "a"], tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps({"id": name, "text": f"text {n}"}) for n, name in enumerate(ids)))
    store = HashStore()
    shares = [list(read_documents([file], is_claimed=Ranks(store, rank, 2).claims())) for rank in range(2)]
    whole = {document.name.removeprefix(f"{file}:"): document.text for document in read_documents([file])}
    assert whole == {"a": "text 0", "a (2)": "text 1", "a (2) (3)": "text 2", "b": "text 3", "a (5)": "text 4"}
    assert sorted(d.text for share in shares for d in share) == sorted(whole.values())
    assert {d.name: d.text for share in shares for d in share} == {f"{file}:{name}": text for name, text in whole.items()}


def test_what_processes_cannot_do_together_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ranks, "of_torchrun", lambda: Ranks(HashStore(), 0, 2))
    for arguments, text in ((["a.txt", "--query", "x"], "give --index"), (["-", "--index", "i"], "goes to one process")):
        with pytest.raises(SystemExit):
            main(["embed", *arguments])
        assert text in capsys.readouterr().err


@pytest.mark.slow
def test_three_processes_write_the_index_of_one(tmp_path: Path) -> None:
    """Of nine documents three are there already; one has no text. A second run encodes nothing."""
    (tmp_path / "texts").mkdir()
    paths = documents(tmp_path / "texts")
    encoder().save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    embedder = Embedder.load(str(tmp_path / "encoder"), positions=400)
    texts = [document for document in read_documents(paths) if document.error is None]
    one, shared = Index(tmp_path / "one", embedder), tmp_path / "shared"
    one.add((document.name, document.text) for document in texts)
    Index(shared, embedder).add((document.name, document.text) for document in texts[:3])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    farlight = ["-m", "farlight", "embed", str(tmp_path / "texts"), "--index", str(shared)]
    options = ["--model", str(tmp_path / "encoder"), "--positions", "400", "--query", words(5), "--json"]
    for expected in (5, 0):
        done = subprocess.run([*torchrun, *farlight, *options], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        answer = json.loads(done.stdout)
        assert (answer["added"], answer["documents"]) == (expected, 8)
        assert len(answer["skipped"]) == 1
    both = one.vectors(), Index(shared, embedder).vectors()
    assert both[0].keys() == both[1].keys()
    for name in both[0]:
        for a, b in zip(both[0][name], both[1][name], strict=True):
            torch.testing.assert_close(a, b)
