"""What the commands print at 60, 80 and 120 columns and into a pipe: every number whole, whatever is dropped is named."""

from __future__ import annotations

import csv
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_audit import decoder, encoder, tokenizer, words
from transformers import MistralConfig, MistralModel

import farlight as fl
from farlight.analysis.audit import Audit, audit
from farlight.analysis.passages import cut_passages
from farlight.cli import audit_tables, main
from farlight.cli.screen import wrapped
from farlight.cli.tables import Column, Table, as_csv, as_markdown, as_text

PATTERNS = [
    *(fl.window(3), fl.window(3) | fl.global_tokens([0, -1]), fl.window(2) | fl.global_tokens([0, -1]) | fl.random_keys(3)),
    fl.parse("window(8) | global_tokens([0, 5, 9, 13, 17, -1]) | random_keys(2, seed=3)"),
]


def windowed() -> MistralModel:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**sizes, intermediate_size=48, vocab_size=50, sliding_window=24, max_position_embeddings=64)
    return MistralModel(config).eval()


@pytest.fixture(scope="module", params=[encoder, decoder, windowed])
def result(request: pytest.FixtureRequest) -> Audit:
    cut = cut_passages(words(700), tokenizer(), 64, 2)
    return audit(request.param(), cut, PATTERNS, tokenizer=tokenizer(), model_name="m", text_name="t")


def tables(result: Audit) -> list[Table]:
    return audit_tables._tables(result)


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_every_number_of_an_audit_is_whole(result: Audit, width: int | None) -> None:
    lines = audit_tables.audit_lines(result, width)
    assert width is None or max(map(len, lines)) <= width
    for table in tables(result):
        start = next(k for k, line in enumerate(lines) if table.title in " ".join(lines[k : k + 2]))
        body = lines[start:]
        end = next((k for k, line in enumerate(body) if line.startswith("not shown at")), None)
        rule = next(k for k, line in enumerate(body) if "──" in line)
        stop = next(k for k in range(rule + 1, len(body)) if not body[k].strip() or body[k].startswith("not shown"))
        named = " ".join(" ".join(body[end : end + 4]).split()) if end is not None and end == stop else ""
        hidden = [column for column in table.columns if re.search(rf"[:,] {re.escape(column.heading)}[,;]", named)]
        text = "\n".join(body[rule + 1 : stop])
        for row in table.rows:
            for column in table.columns:
                cell = column.text(row)
                assert column in hidden or re.search(rf"(?<![\w.]){re.escape(cell)}(?![\w.%])", text), (column.key, cell, width)
        if width is None:
            assert not hidden
        assert table.columns[[c.priority for c in table.columns].index(100)] not in hidden


def test_columns_go_in_the_order_of_their_priorities(result: Audit) -> None:
    def shown(width: int) -> set[str]:
        text = "\n".join(as_text(tables(result)[:1], width))
        match = re.search(r"not shown at \d+ columns: (.*?); --wide", " ".join(text.split()))
        dropped = set() if match is None else set(match[1].split(", "))
        return {column.heading for column in audit_tables.FIDELITY} - dropped

    order = [column.heading for column in sorted(audit_tables.FIDELITY, key=lambda column: -column.priority)]
    widths = [20, 40, 60, 80, 100, 120, 160]
    for narrow, wide in pairwise(widths):
        assert shown(narrow) <= shown(wide)
        assert shown(narrow) == set(order[: len(shown(narrow))])
    assert len(shown(160)) == len(order)


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_lost_links_are_printed_once_with_the_patterns_that_lose_them(result: Audit, width: int | None) -> None:
    lines = [line for line in audit_tables.audit_lines(result, None) if "no longer sees" in line]
    ends = [line.partition(":")[0] for line in lines]
    assert len(set(ends)) == len(ends) > 2
    assert len(result.shared_losses) >= len(lines)
    for loss in result.shared_losses:
        link = loss.link
        for number, pattern in enumerate(PATTERNS):
            assert (number in loss.patterns) == (not pattern.allows(link.query, link.key, 64, head=link.head))


def test_csv_and_markdown_hold_every_column(result: Audit) -> None:
    rows = list(csv.DictReader(io.StringIO(audit_tables.audit_csv(result))))
    assert [row["pattern"] for row in rows] == [repr(pattern) for pattern in PATTERNS]
    for row, figures in zip(rows, result.patterns, strict=True):
        assert float(row["mass"]) == figures.mass
        assert int(row["long_text_links"]) == figures.long_text.links
        assert float(row["spread_seconds"]) == figures.spread
    markdown = audit_tables.audit_markdown(result)
    for table in tables(result):
        for name, row in zip(table.names, table.rows, strict=True):
            cells = [f"`{name}`".replace("|", "\\|"), *(column.text(row) for column in table.columns)]
            assert "| " + " | ".join(cells) + " |" in markdown


def test_one_length_for_links_and_times(result: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.cost._TIMED_BYTES", 300 * 4 * 4 * 8 * 4)
    short = audit(encoder(), cut_passages(words(700), tokenizer(), 64, 1), PATTERNS[:1])
    assert short.patterns[0].long_text.tokens == 256
    assert short.patterns[0].long_text.links == fl.window(3).count(256) * 8
    assert "Over 256 tokens (of 700, the longest that is timed)" in "\n".join(audit_tables.audit_lines(short, 80))
    assert all(row.long_text.tokens == 700 for row in result.patterns)


def test_a_table_without_room_shows_its_first_number_whole() -> None:
    columns = (Column("a", "a", lambda row: row, "{:,}".format, 1), Column("b", "b", lambda row: row, "{:.9f}".format, 0))
    lines = as_text([Table("wide numbers", columns, ("window(3)", "full()"), (123_456_789_012, 5))], 10)
    assert "123,456,789,012" in "\n".join(lines)
    assert "not shown" in "\n".join(lines)


def test_a_missing_value_is_a_dash_and_an_empty_column_is_left_out() -> None:
    columns = (Column("a", "a", lambda row: row, priority=1), Column("b", "b", lambda row: None))
    table = Table("t", columns, ("x", "y"), (None, 4))
    assert [line.split() for line in as_text([table], None)[-2:]] == [["1", "x", "-"], ["2", "y", "4"]]
    assert as_csv([table]) == "pattern,a,b\nx,,\ny,4,\n"
    assert "| `x` | - |" in as_markdown([table])


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("text", [str(fl.smallworld(PATTERNS[3], 5000)), str(fl.reach(PATTERNS[3], 5000, 3)), "7 " * 99])
def test_wrapping_breaks_at_spaces_only(text: str, width: int) -> None:
    lines = [part for line in text.split("\n") for part in wrapped(line, width)]
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert max(map(len, lines)) <= max(width, max(map(len, text.split())) + 34)


# ---- the commands ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    for name, model in (("encoder", encoder()), ("decoder", decoder())):
        model.save_pretrained(root / name)
        tokenizer(name == "encoder").save_pretrained(root / name)
    (root / "text.txt").write_text(words(300))
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_piped_output_honours_columns(
    columns: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    audited = ("audit", str(place / "text.txt"), "--model", str(place / "encoder"), "--pattern", repr(PATTERNS[3]))
    code, out, _ = run(capsys, *audited)
    assert code == 0
    # Only a path, a single word, may be longer than the screen.
    assert all(len(line) <= int(columns) or len(line.split()) <= 2 or str(place) in line for line in out.splitlines())
    assert ("not shown at" in out) == (columns != "120")
    code, out, _ = run(capsys, *audited, "--wide")
    assert "not shown" not in out
    code, out, _ = run(capsys, "map", repr(PATTERNS[3]), "-n", "2k", "--from", "3", "--to", "-1")
    assert (code, max(map(len, out.splitlines())) <= int(columns)) == (0, True)
    code, out, _ = run(capsys, "bench", repr(PATTERNS[3]), "-n", "128", "-n", "0.25k", "--seconds", "0.01", "--heads", "2")
    assert code == 0
    assert re.search(r"\b128\b", out)
    assert re.search(r"\b250\b", out)
    assert max(map(len, out.splitlines()[:-3])) <= int(columns)


def test_forms_of_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited = ("audit", str(place / "text.txt"), "--model", str(place / "encoder"), "--pattern", "window(3)")
    code, out, _ = run(capsys, *audited, "--csv")
    assert (code, len(list(csv.DictReader(io.StringIO(out))))) == (0, 1)
    code, out, _ = run(capsys, *audited, "--markdown")
    assert (code, out.count("| `window(3)` |")) == (0, 2)
    code, out, err = run(capsys, *audited, "--csv", "--json")
    assert (code, out) == (2, "")
    assert "--json and --csv: one form of output at a time" in err
    code, out, _ = run(capsys, "bench", "window(3)", "-n", "64", "--seconds", "0.01", "--csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert float(row["seconds"]) > 0


def test_a_causal_model_is_asked_about_causal_patterns(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from farlight.cli.audit import CAUSAL_PATTERNS, DEFAULT_PATTERNS

    for name, patterns in (("decoder", CAUSAL_PATTERNS), ("encoder", DEFAULT_PATTERNS)):
        arguments = ("audit", str(place / "text.txt"), "--model", str(place / name), "--passages", "1", "--json")
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        asked = [row["pattern"] for row in json.loads(out)["patterns"]]
        assert asked == [text if "topblocks" in text else repr(fl.parse(text)) for text in patterns]
