"""farlight inside BigBird and BigBird-Pegasus: Hugging Face's numbers in evaluation and training, or the paper's pattern."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_parity import Largest, answer, compare, errors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdForMaskedLM,
    BigBirdForMultipleChoice,
    BigBirdForPreTraining,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
    BigBirdModel,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    BigBirdPegasusModel,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

import farlight as fl
from farlight.hf.bigbird import BigBirdAttention, replaces, restore, sparsify
from farlight.plan.cache import plans

# Weights far from 0, so that a link more or less shows.
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "initializer_range": 0.4}
SMALL |= {"max_position_embeddings": 160, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PEGASUS: dict[str, Any] = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40, "init_std": 0.4}
PEGASUS |= {"decoder_layers": 1, "decoder_attention_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
PEGASUS |= {"max_position_embeddings": 160}


def config(**options: Any) -> BigBirdConfig:
    few = {"num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 4, "num_random_blocks": 2}
    return BigBirdConfig(**SMALL | few | options)


def pegasus(**options: Any) -> BigBirdPegasusConfig:
    few = {"encoder_layers": 2, "encoder_attention_heads": 2, "block_size": 4, "num_random_blocks": 2}
    return BigBirdPegasusConfig(**PEGASUS | few | options)


def padded(kind: str, batch: int, n: int, draw: torch.Generator) -> Tensor | None:
    """Where tokens are real; every item has one that is (in a text of none, Hugging Face's short form means over padding)."""
    if kind == "no mask":
        return None
    real = torch.ones(batch, n, dtype=torch.long)
    for item in real:
        length = int(torch.randint(1, n + 1, (), generator=draw))
        if kind == "right":
            item[length:] = 0
        elif kind == "left":
            item[: n - length] = 0
        elif kind == "holes":
            item[torch.rand(n, generator=draw) < 0.3] = 0
            item[n // 2] = 1
    return real


def example(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the configuration, inputs) number `seed`; about one in five is short enough for full attention."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    block, count, batch = pick(2, 4, 5), pick(1, 2, 3), pick(1, 2, 3)
    limit = (5 + 2 * count) * block
    n = int(torch.randint(1, limit, (), generator=draw)) if seed % 5 == 4 else limit + pick(1, block, 7, 3 * block, 30, 60)
    options = {"layers": pick(1, 2), "heads": pick(1, 2, 4), "block": block, "random": count}
    kind = ("none", "right", "left", "holes", "no mask")[seed % 4 if seed % 8 else 4]
    inputs = {"input_ids": torch.randint(3, 40, (batch, n), generator=draw), "attention_mask": padded(kind, batch, n, draw)}
    return options, inputs


@pytest.mark.parametrize("seed", range(60))
def test_bigbird_is_hugging_faces(seed: int) -> None:
    torch.manual_seed(seed)
    options, inputs = example(seed)
    made = config(
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        block_size=options["block"],
        num_random_blocks=options["random"],
    )
    actual = compare(BigBirdModel(made).train(seed % 2 == 0), inputs, sparsify)
    assert actual.fine, actual


@pytest.mark.parametrize("seed", range(50))
def test_bigbird_pegasus_encoder_is_hugging_faces(seed: int) -> None:
    torch.manual_seed(seed)
    options, inputs = example(seed + 100)
    made = pegasus(
        encoder_layers=options["layers"],
        encoder_attention_heads=options["heads"],
        block_size=options["block"],
        num_random_blocks=options["random"],
    )
    actual = compare(BigBirdPegasusModel(made).get_encoder().train(seed % 2 == 0), inputs, sparsify)
    assert actual.fine, actual


def test_in_training_at_the_papers_lengths_a_block_may_count_twice() -> None:
    """1024, 3072 and 4096 tokens have draws of their own, which do not avoid the blocks that are seen anyway."""
    made = config(block_size=64, num_random_blocks=3, max_position_embeddings=1024)
    model = BigBirdModel(made)
    inputs = {"input_ids": torch.randint(3, 40, (1, 1000))}
    actual = compare(model, inputs, sparsify)
    assert actual.fine, actual
    weights = [w for layer in model.encoder.layer for _, w in layer.attention.self._training(1000)]
    assert 2.0 in weights


def _once(self: BigBirdAttention, tokens: int) -> list[Any]:
    """The plain set of blocks."""
    near, first, outer = self._fixed_links(tokens)
    return [(near | first | outer, 1.0)]


def _outer_too(self: BigBirdAttention, tokens: int) -> list[Any]:
    """Block 0 counted 1 + r times by the rows that see all, too."""
    near, first, outer = self._fixed_links(tokens)
    return [(near | (outer - first), 1.0), (first, 1.0 + self.random)]


@pytest.mark.parametrize("wrong", [_once, _outer_too], ids=["a set", "outer rows too"])
def test_the_comparison_can_fail(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BigBirdModel(config()).eval()
    inputs = {"input_ids": torch.randint(3, 40, (2, 50))}
    assert compare(model, inputs, sparsify).fine
    restore(model)
    monkeypatch.setattr(BigBirdAttention, "_evaluation", wrong)
    actual = compare(model, inputs, sparsify)
    assert actual.output > 1e-3
    assert actual.gradient > 1e-3


def test_training_and_evaluation_differ() -> None:
    """So that the two halves of the parity test are two tests."""
    model = sparsify(BigBirdModel(config()))
    inputs = {"input_ids": torch.randint(3, 40, (2, 60))}
    assert errors(answer(model.train(), inputs), answer(model.eval(), inputs)).output > 1e-3


HEADS = {
    BigBirdForMaskedLM: {"labels": (2, 53)},
    BigBirdForSequenceClassification: {"labels": (2,)},
    BigBirdForTokenClassification: {"labels": (2, 53)},
    BigBirdForQuestionAnswering: {"start_positions": (2,), "end_positions": (2,)},
    BigBirdForPreTraining: {"labels": (2, 53), "next_sentence_label": (2,)},
}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_task_heads(head: Any, training: bool) -> None:
    model = head(config(num_labels=2, classifier_dropout=0.0, sep_token_id=2)).train(training)
    ids = torch.randint(3, 40, (2, 53))
    ids[:, [5, 12]] = 2
    real = torch.ones(2, 53, dtype=torch.long)
    real[1, 41:] = 0
    labels = {name: torch.randint(0, 2, shape) for name, shape in HEADS[head].items()}
    actual = compare(model, {"input_ids": ids, "attention_mask": real, **labels}, sparsify)
    assert actual.fine, actual


def test_multiple_choice() -> None:
    ids = torch.randint(3, 40, (2, 3, 50))
    actual = compare(BigBirdForMultipleChoice(config()), {"input_ids": ids, "labels": torch.tensor([0, 2])}, sparsify)
    assert actual.fine, actual


def test_pegasus_with_its_decoder() -> None:
    model = BigBirdPegasusForConditionalGeneration(pegasus())
    ids = torch.randint(3, 40, (2, 50))
    actual = compare(model, {"input_ids": ids, "labels": torch.randint(3, 40, (2, 7))}, sparsify)
    assert actual.fine, actual
    theirs = restore(model.eval()).generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(theirs, sparsify(model).generate(ids, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("kind", ["model", "encoder"])
def test_a_short_text_changes_nothing_for_the_next_one(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = BigBirdModel(config()).eval() if kind == "model" else BigBirdPegasusModel(pegasus()).get_encoder().eval()
    short, long = torch.randint(3, 40, (1, 12)), torch.randint(3, 40, (1, 60))
    theirs = [model(x).last_hidden_state for x in (long, short, long)]
    assert not torch.equal(theirs[0], theirs[2])  # Hugging Face's model has switched to full attention
    assert replaces(model)
    sparsify(model)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ours = [model(x).last_hidden_state for x in (long, short, long)]
    assert not caplog.records
    assert torch.equal(ours[0], ours[2])
    for a, b in zip(theirs[:2], ours, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    restore(model)
    torch.testing.assert_close(model(long).last_hidden_state, theirs[0], rtol=0, atol=0)


def test_attention_dropout_is_that_of_short_texts_only() -> None:
    model = sparsify(BigBirdModel(config(attention_probs_dropout_prob=0.5)))
    for n, same in ((12, False), (60, True)):
        ids = torch.randint(3, 40, (1, n))
        assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state) is same


def test_training_leaves_numpys_random_state_alone() -> None:
    model = sparsify(BigBirdModel(config()))
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    model(torch.randint(3, 40, (1, 60)))
    assert (np.random.get_state()[1] == before).all()


def test_draws_differ_by_layer_and_head() -> None:
    model = sparsify(BigBirdModel(config(block_size=2, num_random_blocks=3)))
    model(torch.randint(3, 40, (1, 60)))
    one, two = (layer.attention.self._drawn[30][0] for layer in model.encoder.layer)
    assert not torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert one[:, 1:-1].min() >= 1
    assert one.max() <= 2 * 3 + 3


@pytest.mark.parametrize("n", [3, 8, 9, 50, 61])
def test_the_papers_pattern(n: int) -> None:
    model = sparsify(BigBirdModel(config()).double(), semantics="paper", seed=7)
    real = torch.ones(2, n, dtype=torch.long)
    real[1, max(1, n - 5) :] = 0
    text = real.bool()[:, None, None, :]
    for layer, module in enumerate(layer.attention.self for layer in model.encoder.layer):
        x = torch.randn(2, n, 16, dtype=torch.float64)
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (module.query, module.key, module.value))
        pattern = fl.presets.bigbird(4, 2, 7 + layer) if n > 8 else fl.full()
        allowed = pattern.dense(n, heads=2) & real.bool()[:, None, None, :]
        scores = (q @ k.mT / 8**0.5).masked_fill(~allowed, float("-inf"))
        expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) * real[:, :, None]
        torch.testing.assert_close(module(x, text)[0], expected, rtol=0, atol=1e-12)


def test_the_papers_pattern_reaches_the_whole_text() -> None:
    """Which Hugging Face's draws do not: a token in the middle hears of every part of the text."""
    model = BigBirdModel(config(num_hidden_layers=1, max_position_embeddings=400, num_attention_heads=4)).eval()
    ids = torch.randint(3, 40, (1, 400))
    other = ids.clone()
    other[0, 240:280] = torch.randint(3, 40, (40,))

    def moved() -> Tensor:
        difference = model(ids).last_hidden_state - model(other).last_hidden_state
        return (difference[0, 8:200].abs().amax(-1) > 1e-4).float().mean()

    assert moved() == 0
    assert sparsify(model, semantics="hf_eval")
    assert moved() == 0
    sparsify(model, semantics="paper")
    assert moved() > 0.2


def test_parameters_and_their_names_stay(tmp_path: Path) -> None:
    model = BigBirdForMaskedLM(config()).eval()
    ids = torch.randint(3, 40, (1, 50))
    before = model(ids).logits
    names, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    sparsify(model)
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == parameters
    model.save_pretrained(tmp_path)
    loaded = BigBirdForMaskedLM.from_pretrained(tmp_path).eval()
    assert not any(isinstance(m, BigBirdAttention) for m in loaded.modules())
    assert torch.equal(loaded(ids).logits, before)
    other = sparsify(BigBirdForMaskedLM(config()).eval())
    other.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(other(ids).logits, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["model", "encoder"])
def test_restore_puts_everything_back(kind: str) -> None:
    model = BigBirdModel(config()) if kind == "model" else BigBirdPegasusModel(pegasus()).get_encoder()
    inputs = {"input_ids": torch.randint(3, 40, (1, 50))}
    before, held, made = answer(model, inputs), {name: vars(m).keys() for name, m in model.named_modules()}, model.config
    assert replaces(model)
    assert sparsify(model) is model
    assert replaces(model)
    sparsify(model, semantics="paper")
    assert restore(model) is model
    assert {name: vars(m).keys() for name, m in model.named_modules()} == held
    assert model.config is made
    assert model.attention_type == "block_sparse"
    actual = errors(before, answer(model, inputs))
    assert actual.output == actual.gradient == 0


def test_copies_and_pickles_are_sparse_too() -> None:
    model = sparsify(BigBirdModel(config()).eval())
    ids = torch.randint(3, 40, (1, 50))
    before = model(ids).last_hidden_state
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for other in (copy.deepcopy(model), torch.load(held, weights_only=False)):
        assert torch.equal(other(ids).last_hidden_state, before)
        assert isinstance(restore(other).encoder.layer[0].attention.self, BigBirdBlockSparseAttention)
        torch.testing.assert_close(other(ids).last_hidden_state, before, rtol=0, atol=1e-4)
    assert isinstance(model.encoder.layer[0].attention.self, BigBirdAttention)


def test_gradient_checkpointing() -> None:
    model = sparsify(BigBirdModel(config()))
    inputs = {"input_ids": torch.randint(3, 40, (2, 50))}
    before = answer(model, inputs)
    model.activation_checkpointing_enable()
    assert errors(before, answer(model, inputs)).fine


def test_plans_are_found_again(cold_cache: None) -> None:
    model = sparsify(BigBirdModel(config()).eval(), backend="torch")
    ids, real = torch.randint(3, 40, (2, 50)), torch.ones(2, 50)
    real[1, 45:] = 0
    before = plans.info().misses
    with torch.no_grad():
        for _ in range(3):
            model(ids, attention_mask=real.clone())
            assert plans.info().misses == before + 2  # the set, and block 0 once more


def test_nothing_grows_with_the_square_of_the_text() -> None:
    n = 2048
    model = BigBirdModel(config(num_hidden_layers=1, block_size=16, max_position_embeddings=n)).eval()
    ids = torch.randint(3, 40, (1, n))
    with torch.no_grad():
        with Largest() as theirs:
            model(ids)
        with Largest() as ours:
            sparsify(model, backend="torch")(ids)
    assert theirs.elements >= 2 * n * n  # the probabilities of 2 heads
    assert ours.elements < n * n / 4


@torch.no_grad()
def test_compiled() -> None:
    model = sparsify(BigBirdModel(config()).eval())
    ids, real = torch.randint(3, 40, (2, 50)), torch.ones(2, 50)
    real[1, 45:] = 0
    expected = model(ids, attention_mask=real).last_hidden_state
    actual = torch.compile(model, backend="eager")(ids, attention_mask=real).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_what_cannot_be() -> None:
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
    full = BigBirdModel(config(attention_type="original_full"))
    for model in (bert, full):
        assert not replaces(model)
        with pytest.raises(fl.UnsupportedError, match=r'holds no block-sparse attention .*attention_type="block_sparse"'):
            sparsify(model)
    with pytest.raises(fl.UnsupportedError, match=r"BigBirdModel is a decoder, .* sees the future .*; load it with"):
        sparsify(BigBirdModel(config(is_decoder=True)))
    with pytest.raises(fl.ArgumentError, match=r"semantics = 'hf' is unknown; use \"hf_eval\" .* or \"paper\""):
        sparsify(bert, semantics="hf")
    model, ids = sparsify(BigBirdModel(config())), torch.randint(3, 40, (1, 50))
    with pytest.raises(fl.UnsupportedError, match=r"cannot be set to 'original_full' while .*; call restore\(model\) first"):
        model.set_attention_type("original_full")
    with pytest.raises(fl.UnsupportedError, match=r"BigBirdModel was given an attention mask of shape \(1, 1, 50, 50\).* 2-D"):
        model(ids, attention_mask=torch.ones(1, 1, 50, 50))
    with pytest.raises(fl.UnsupportedError, match=r"encoder_hidden_states or past_key_values, .*; call restore\(model\)"):
        model.encoder.layer[0].attention.self(torch.randn(1, 50, 16), torch.ones(1, 1, 1, 50), torch.randn(1, 50, 16))
