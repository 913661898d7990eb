"""Inputs of report tests: a small model, a hostile text full of markup, its audit, and the data of the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import farlight as fl
from farlight import report
from farlight.analysis.audit import Audit, audit
from farlight.analysis.candidates_by_layer import Judged
from farlight.analysis.passages import Passages, cut_passages

HOSTILE = '</script><img src=x onerror="alert(1)"> & <!-- "\' \u2028 <b>'
PATTERNS = [
    fl.window(3),
    fl.window(2) | fl.global_tokens([0, -1]) | fl.random_keys(1),
    fl.causal() & (fl.strided(5) | fl.window(2)),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer; most words are unknown, which does not affect the page."""
    backend_tokenizer = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "the": 4, "war": 5}, unk_token="[UNK]")
    )
    backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=48
    )


def text() -> str:
    words = [f"word{k}" if k % 7 else "the war" for k in range(120)]
    return " ".join([*words[:20], HOSTILE, "naïve 战争 😀 peace", *words[20:]])


def model() -> BertModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return BertModel(BertConfig(**sizes, initializer_range=0.3, vocab_size=8, max_position_embeddings=64)).eval()


def audited(patterns: Sequence[Judged] = PATTERNS) -> tuple[Audit, Passages, dict[str, Any]]:
    """(audit, passages, data of its page)."""
    encoder, text_tokenizer, content = model(), tokenizer(), text()
    passages = cut_passages(content, text_tokenizer, 48, 3)
    result = audit(encoder, passages, patterns, model_name="small", text_name=HOSTILE)
    data = report.audit_data(result, patterns, passages, report.words_of(content, text_tokenizer))
    return result, passages, data | {"weights": report.weights(encoder, result, patterns, passages)}


def mapped(pattern: fl.Pattern, n: int, layers: int = 3) -> dict[str, Any]:
    """The data of the page of `farlight map`."""
    return report.map_data(pattern, n, fl.smallworld(pattern, n), fl.reach(pattern, n, layers))
