"""Top losses: the streamed top-k of pairs outside a pattern against sorting all pairs; the words at their ends."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import farlight as fl
from farlight.analysis.loss.retention import retention, retentions
from farlight.analysis.loss.top_losses import LostLink, heaviest_per_head, top_losses, words_of


def tensors(n_q: int = 37, n_k: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, n_q, 8, generator=g, dtype=torch.float64) * 2
    return q, torch.randn(2, 2, n_k, 8, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("budget", [1, 500, 1 << 21])
@pytest.mark.parametrize("base", [None, fl.causal()])
def test_the_heaviest_lost_links_are_those_of_a_sort(
    budget: int, base: fl.Pattern | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farlight.analysis.loss.probabilities._TILE_SCORES", budget)
    q, k = tensors()
    pattern = fl.per_head([fl.window(2), fl.global_tokens([0]), fl.random_keys(3), fl.full()])
    result = retention(q, k, pattern, base=base, lost=25).lost
    assert result is not None
    shape = {"batch": 2, "heads": 4}
    seen = (fl.full() if base is None else base).dense(37, 41, **shape)
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    full = scores.softmax(-1).masked_fill(pattern.dense(37, 41, **shape), 0.0)
    best = full.flatten().sort(descending=True)
    torch.testing.assert_close(result.probability, best.values[:25], rtol=0, atol=1e-12)
    place = ((result.text * 4 + result.head) * 37 + result.query - 4) * 41 + result.key
    torch.testing.assert_close(full.flatten()[place], result.probability, rtol=0, atol=1e-12)
    assert place.unique().numel() == 25
    assert (result.head != 3).all(), "a head that sees everything loses nothing"
    assert len(result) == 25


def test_nothing_is_lost_where_everything_is_seen() -> None:
    q, k = tensors()
    result = retention(q, k, fl.full(), lost=5).lost
    assert result is not None
    assert len(result) == 0
    assert result.links() == ()
    assert retention(q, k, fl.window(1)).lost is None


def test_fewer_links_than_requested() -> None:
    q, k = tensors(3, 3)
    result = retention(q[:1, :1], k[:1, :1], fl.window(0), lost=100).lost
    assert result is not None
    assert len(result) == 6


@pytest.mark.parametrize("lost", [-1, 2.5, True])
def test_a_bad_number(lost: object) -> None:
    with pytest.raises(fl.ArgumentError, match=r"lost = .*: the number of lost links to list is a whole number >= 0"):
        retention(*tensors(), fl.full(), lost=lost)  # type: ignore[arg-type]


def test_links_as_values_with_words() -> None:
    q, k = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    q[0, 0, 2, 0], k[0, 0, 0, 0] = 9.0, 9.0
    result = retention(q, k, fl.window(0), lost=1).lost
    assert result is not None
    (link,) = result.links(layer=4, words=[["Harry", "met", "Voldemort"]])
    assert (link.layer, link.head, link.query, link.key, link.text) == (4, 0, 2, 0, 0)
    assert str(link) == "'Voldemort' (2) no longer sees 'Harry' (0): 100.0% of its attention in layer 4 head 0"
    assert str(result.links()[0]).startswith("2 no longer sees 0: 100.0% of its attention in head 0")


def test_a_query_before_the_text_has_no_word() -> None:
    q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 2, 2)
    result = retention(q, k, fl.window(0) - fl.full(), lost=8, q_offset=-2).lost
    assert result is not None
    links = result.links(words=[["a", "b"]])
    assert {link.query: link.query_word for link in links} == {-2: None, -1: None, 0: "a", 1: "b"}


@pytest.mark.parametrize("budget", [1, 500, 1 << 21])
def test_the_heaviest_of_each_head(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.analysis.loss.probabilities._TILE_SCORES", budget)
    q, k = tensors()
    pattern = fl.per_head([fl.window(2), fl.global_tokens([0]), fl.random_keys(3), fl.full()])
    result = retentions(q, k, [pattern], lost=6, by_head=True)[0].lost
    assert result is not None
    full = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).softmax(-1)
    full = full.masked_fill(pattern.dense(37, 41, batch=2, heads=4), 0.0)
    assert len(result) == 18, "a head that sees everything loses nothing"
    assert result.probability.tolist() == sorted(result.probability.tolist(), reverse=True)
    for head in range(3):
        best = full[:, head].flatten().sort(descending=True).values[:6]
        torch.testing.assert_close(result.probability[result.head == head], best, rtol=0, atol=1e-12)
    place = full[result.text, result.head, result.query - 4, result.key]
    torch.testing.assert_close(place, result.probability, rtol=0, atol=1e-12)


def test_heaviest_per_head() -> None:
    links = [LostLink(p, head, 0, 0, layer=layer) for p, layer, head in ((0.1, 0, 0), (0.5, 0, 0), (0.3, 1, 0), (0.2, 0, 0))]
    assert [link.probability for link in heaviest_per_head(links, 1)] == [0.5, 0.3]
    assert [link.probability for link in heaviest_per_head(links, 2)] == [0.5, 0.3, 0.2]


def test_a_pair_lost_by_many_heads_is_listed_once() -> None:
    links = [LostLink(p, head, 4, 2, text=1) for head, p in enumerate((0.1, 0.5, 0.3))]
    others = [LostLink(p, 1, query, 2) for query, p in ((7, 0.4), (8, 0.35), (4, 0.2))]
    result = top_losses([*links, *others], 9)
    assert [(link.probability, link.head, link.query, link.heads) for link in result] == [(0.5, 1, 4, 3), (0.4, 1, 7, 1)]
    assert len(top_losses([*links, *others], 1)) == 1


def test_pieces_become_words() -> None:
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "far": 3, "##light": 4, "##s": 5, "on": 6, ".": 7}
    backend_tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend_tokenizer.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend_tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    assert words_of([1, 3, 4, 5, 6, 7, 2], tokenizer) == ["[CLS]", *["farlights"] * 3, "on", ".", "[SEP]"]


def test_pieces_with_marks_for_spaces() -> None:
    vocabulary = {"<s>": 0, "▁far": 1, "light": 2, "▁on": 3, ".": 4, "<unk>": 5}
    backend_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend_tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend_tokenizer, unk_token="<unk>", bos_token="<s>")
    assert words_of([0, 1, 2, 3, 4], tokenizer) == ["<s>", "farlight", "farlight", "on", "."]


def test_pieces_of_bytes_that_are_no_letters() -> None:
    """A dash and a closing quotation mark are spelled in letters by byte-level tokenizers, and are none."""
    vocabulary = {"10": 0, "âĢĶ": 1, "Ann": 2, "ette": 3, ".": 4, "âĢĿ": 5, "ĠP": 6, "Ã¡": 7, "v": 8, "<unk>": 9}
    backend_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend_tokenizer, unk_token="<unk>")
    words = words_of([0, 1, 2, 3, 4, 5, 6, 7, 8], tokenizer)
    assert words[:4] == ["10", "—", "Annette", "Annette"]
    assert words[5] == "”"
    assert words[6:] == ["Páv"] * 3
