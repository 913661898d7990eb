"""The command line's files: odd names, odd contents, damaged models and places that cannot be written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
from damage import HOSTILE, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_audit import encoder, tokenizer, words

from farlight.cli import main
from farlight.errors import FarlightError
from farlight.hf.loading import load_model

ODD_NAME = os.fsdecode(b"caf\xe9.txt")
ODD_NAME_SHOWN = r"caf\xe9.txt"
needs_byte_names = pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode here")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a text, and the same text under a name that is not UTF-8."""
    root = tmp_path_factory.mktemp("files")
    encoder().save_pretrained(root / "encoder")
    tokenizer().save_pretrained(root / "encoder")
    (root / "text.txt").write_text(words(300))
    if sys.platform == "linux":
        (root / ODD_NAME).write_text(words(300))
    return root


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return 0 if caught.value.code is None else int(caught.value.code)


# ---- names that are not UTF-8 ----------------------------------------------------------------------------------------
@needs_byte_names
def test_an_audit_of_such_a_file_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = place / os.fsdecode(b"\xe9.html")
    audit = ("audit", place / ODD_NAME, "--model", place / "encoder", "--pattern", "window(3)")
    assert run(*audit, "--html", page) == 0
    out = capsys.readouterr().out
    assert f"{ODD_NAME_SHOWN}: 300 tokens" in out
    assert r"report: " in out
    assert "caf\\\\xe9.txt" in page.read_text("utf-8")
    assert run(*audit, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"].endswith(ODD_NAME_SHOWN)


@needs_byte_names
def test_passages_of_such_a_file_are_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed = (
        "embed",
        place / ODD_NAME,
        "--model",
        place / "encoder",
        "--positions",
        "128",
        "--passage",
        "16",
        "--query",
        "the w3",
    )
    for options in ((), ("--json",), ("--save", place / os.fsdecode(b"\xe9.npz"))):
        assert run(*embed, *options) == 0
        capsys.readouterr().out.encode("utf-8")
    assert (place / os.fsdecode(b"\xe9.npz")).exists()


@needs_byte_names
@pytest.mark.parametrize("option", ["--query", "--pattern", "--model", "--backend", "--heading"])
def test_an_argument_that_is_not_utf_8(option: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--model": str(place / "encoder"), "--query": "the w3", option: os.fsdecode(b"\xe9")}
    given_options = [text for pair in options.items() for text in pair]
    code = run("embed", place / "text.txt", "--positions", "128", *given_options)
    assert code == (0 if option == "--heading" else 2)
    assert "Traceback" not in capsys.readouterr().err


def test_an_output_of_fewer_characters(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal cannot show is escaped."""
    (place / "文.txt").write_text(words(300))
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("audit", place / "文.txt", "--model", place / "encoder", "--pattern", "window(3)") == 0
    stream.flush()
    assert rb"\u6587.txt: 300 tokens" in stream.buffer.getvalue()  # type: ignore[attr-defined]


# ---- inputs that cannot be used --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, says",
    [
        (["audit", "a" * 5000], "cannot be read: "),
        (["audit", "{place}/text.txt/inside"], "cannot be read: Not a directory"),
        (["audit", "{place}/text.txt", "--passages", "9" * 5000], "at least one passage is needed"),
        (["audit", "{place}/text.txt", "--passages", "²"], "at least one passage is needed"),
        (["audit", "{place}/text.txt", "--pattern", "{place}/no.json"], "no.json' cannot be read: No such file"),
        (["recall", "--pattern", "{place}/no.json"], "no.json' cannot be read: No such file"),
        (["audit", "{place}/text.txt", "--html", "{place}"], "is a directory; give the name of a file in it."),
        (["audit", "{place}/text.txt", "--keep", "0.9", "--save", "{place}"], "is a directory; give the name of a file in it."),
        (["audit", "{place}/text.txt", "--html", "{place}/text.txt/a.html"], "there is no folder "),
        (["embed", "{place}/text.txt", "--heading", "a{{99999999999999999999}}", "--query", "a"], "not a regular expression"),
        (["embed", "{place}/text.txt", "--heading", "(" * 5000, "--query", "a"], "is not a regular expression"),
        (["map", "window(3)", "-n", "9", "--png", "{place}"], "is a directory; give the name of a file in it."),
        (["map", "window(3)", "-n", "9", "--layers", "-1"], "layers = -1"),
        (["map", "window(3)", "-n", "9" * 30], "n is larger than 2147483648"),
        (["map", "window(3)", "-n", "9", "--head", "-1"], "head = -1"),
        (["map", "(" * 100_000, "-n", "9"], "cannot read the pattern"),
    ],
)  # fmt: skip
def test_one_message_and_exit_code_2(arguments: list[str], says: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*(argument.format(place=place) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("map", "window(3)", "-n", "9", "--html", "/dev/full") == 2
    assert "--html '/dev/full' cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_model_folder(file: str, data: st.DataObject, place: Path) -> None:
    path = place / "encoder" / file
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(st.sampled_from(list(HOSTILE.values())) | damaged([whole])))
        with contextlib.suppress(FarlightError):
            load_model(str(place / "encoder"))
    finally:
        path.write_bytes(whole)
