"""farlight inside Longformer and LED: the numbers of Hugging Face's own modules, and the modes that they lack."""

from __future__ import annotations

import copy
import doctest
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_parity import Largest, answer, compare, errors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDModel,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForMultipleChoice,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
    LongformerModel,
)
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import farlight as fl
from farlight.hf import longformer
from farlight.hf.longformer import LongformerAttention, replaces, restore, sparsify
from farlight.plan.cache import plans

# Weights far from 0, so that a link more or less shows.
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40, "initializer_range": 0.4}
SMALL |= {"max_position_embeddings": 160, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL_LED: dict[str, Any] = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40, "init_std": 0.4}
SMALL_LED |= {"decoder_layers": 1, "decoder_attention_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
SMALL_LED |= {"max_encoder_position_embeddings": 160, "max_decoder_position_embeddings": 64}


def config(**options: Any) -> LongformerConfig:
    return LongformerConfig(**SMALL | {"num_hidden_layers": 2, "num_attention_heads": 2, "attention_window": 8} | options)


def led(**options: Any) -> LEDConfig:
    return LEDConfig(**SMALL_LED | {"encoder_layers": 2, "encoder_attention_heads": 2, "attention_window": 8} | options)


def masks(kind: str, batch: int, n: int, draw: torch.Generator) -> Tensor:
    """Where tokens are real."""
    real = torch.ones(batch, n, dtype=torch.long)
    for item in real:
        length = int(torch.randint(1, n + 1, (), generator=draw))
        if kind == "right":
            item[length:] = 0
        elif kind == "left":
            item[: n - length] = 0
        elif kind == "holes":
            item[torch.rand(n, generator=draw) < 0.3] = 0
    if kind == "nothing":
        real[0] = 0
    return real


def globals_of(kind: str, batch: int, n: int, draw: torch.Generator) -> Tensor | None:
    chosen = torch.zeros(batch, n, dtype=torch.long)
    if kind == "first":
        chosen[:, :1] = 1
    elif kind == "some":
        chosen[torch.rand(batch, n, generator=draw) < 0.1] = 1
    elif kind == "one item":
        chosen[0, torch.randperm(n, generator=draw)[:3]] = 1
    elif kind == "all":
        chosen[:] = 1
    return None if kind == "no mask" else chosen


PADDINGS = ("none", "right", "left", "holes", "nothing")
GLOBALS = ("first", "some", "one item", "none", "no mask", "all", "some")


def example(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the configuration, inputs) number `seed`: every padding with every choice of globals in 35."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    layers, batch, n = pick(1, 2), pick(1, 2, 3), int(torch.randint(1, 90, (), generator=draw))
    options = {"layers": layers, "heads": pick(1, 2, 4), "window": [pick(4, 8, 16) for _ in range(layers)]}
    inputs = {
        "input_ids": torch.randint(3, 40, (batch, n), generator=draw),
        "attention_mask": masks(PADDINGS[seed % 5], batch, n, draw),
        "global_attention_mask": globals_of(GLOBALS[seed % 7], batch, n, draw),
    }
    return options, inputs


@pytest.mark.parametrize("seed", range(60))
def test_longformer_is_hugging_faces(seed: int) -> None:
    torch.manual_seed(seed)
    options, inputs = example(seed)
    made = config(num_hidden_layers=options["layers"], num_attention_heads=options["heads"], attention_window=options["window"])
    model = LongformerModel(made).train(seed % 2 == 0)
    actual = compare(model, inputs, sparsify)
    assert actual.fine, actual


@pytest.mark.parametrize("seed", range(50))
def test_leds_encoder_is_hugging_faces(seed: int) -> None:
    torch.manual_seed(seed)
    options, inputs = example(seed + 100)
    made = led(encoder_layers=options["layers"], encoder_attention_heads=options["heads"], attention_window=options["window"])
    model = LEDModel(made).get_encoder().train(seed % 2 == 0)
    actual = compare(model, inputs, sparsify)
    assert actual.fine, actual


def _twice(self: LongformerAttention, q: Tensor, k: Tensor, v: Tensor, pattern: fl.Pattern) -> Tensor:
    """Global tokens inside the window counted a second time."""
    roles = self._roles._last[2]  # type: ignore[index]
    if pattern != roles.local(self.window_pattern, False):
        return fl.attention(q, k, v, pattern)
    again = self.window_pattern & fl.seen_by_all(roles.is_global) - fl.sees_all(roles.is_global)
    pieces = [fl.attention(q, k, v, p, return_lse=True) for p in (pattern, again)]
    return fl.merge(pieces)[0]


def _not_blanked(self: Any, near: fl.Pattern, autoregressive: bool) -> fl.Pattern:
    """Global rows get their local result as well."""
    return near | fl.seen_by_all(self.is_global)


def _narrower(modules: Any, dilation: Any) -> list[fl.Pattern]:
    return [fl.window(module.one_sided_attn_window_size - 1) for module in modules]


def _wider(modules: Any, dilation: Any) -> list[fl.Pattern]:
    return [fl.window(module.one_sided_attn_window_size, module.one_sided_attn_window_size + 1) for module in modules]


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (LongformerAttention, "_attend", _twice),
        (longformer._TokenRoles, "local", _not_blanked),
        (longformer, "_windows", _narrower),
        (longformer, "_windows", _wider),
        (longformer._TokenRoles, "real", lambda self: fl.window(30)),
    ],
    ids=["globals twice", "not overwritten", "narrower", "wider", "globals see less"],
)
def test_the_comparison_can_fail(owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LongformerModel(config())
    chosen = torch.zeros(2, 40, dtype=torch.long)
    chosen[:, [0, 17]] = 1
    inputs = {"input_ids": torch.randint(3, 40, (2, 40)), "global_attention_mask": chosen}
    assert compare(model, inputs, sparsify).fine
    restore(model)
    monkeypatch.setattr(owner, name, wrong)
    actual = compare(model, inputs, sparsify)
    assert actual.output > 1e-3
    assert actual.gradient > 1e-3


HEADS = {
    LongformerForMaskedLM: {"labels": (2, 29)},
    LongformerForSequenceClassification: {"labels": (2,)},
    LongformerForTokenClassification: {"labels": (2, 29)},
    LongformerForQuestionAnswering: {"start_positions": (2,), "end_positions": (2,)},
}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_task_heads(head: Any, training: bool) -> None:
    model = head(config(num_labels=2, sep_token_id=2)).train(training)
    ids = torch.randint(3, 40, (2, 29))
    ids[:, [5, 11, 12]] = 2  # question answering finds its question by the separators, and makes it global
    real = torch.ones(2, 29, dtype=torch.long)
    real[1, 21:] = 0
    labels = {name: torch.randint(0, 2, shape) for name, shape in HEADS[head].items()}
    actual = compare(model, {"input_ids": ids, "attention_mask": real, **labels}, sparsify)
    assert actual.fine, actual


def test_multiple_choice() -> None:
    model = LongformerForMultipleChoice(config())
    ids = torch.randint(3, 40, (2, 3, 29))
    real = torch.ones_like(ids)
    real[0, 1, 20:] = 0
    chosen = torch.zeros_like(ids)
    chosen[:, :, 0] = 1
    inputs = {"input_ids": ids, "attention_mask": real, "global_attention_mask": chosen, "labels": torch.tensor([0, 2])}
    actual = compare(model, inputs, sparsify)
    assert actual.fine, actual


@pytest.mark.parametrize("head", [LEDForConditionalGeneration, LEDForQuestionAnswering])
def test_leds_heads(head: Any) -> None:
    model = head(led())
    ids = torch.randint(3, 40, (2, 29))
    chosen = torch.zeros_like(ids)
    chosen[0, 0] = chosen[1, :2] = 1
    labels: dict[str, Tensor] = {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([4, 9])}
    if head is LEDForConditionalGeneration:
        labels = {"labels": torch.randint(3, 40, (2, 7))}
    actual = compare(model, {"input_ids": ids, "global_attention_mask": chosen, **labels}, sparsify)
    assert actual.fine, actual


def test_led_generates_the_same_tokens() -> None:
    model = LEDForConditionalGeneration(led()).eval()
    ids = torch.randint(3, 40, (2, 29))
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(theirs, sparsify(model).generate(ids, max_new_tokens=12, do_sample=False))


def dense(module: LongformerAttention, x: Tensor, local: Tensor, rows: Tensor) -> Tensor:
    """The layer written out: `local` `(H, N, N)` links of local tokens, `rows` `(N, N)` those of global ones."""

    def attend(names: tuple[str, str, str], allowed: Tensor) -> Tensor:
        q, k, v = (getattr(module, name)(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for name in names)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
        return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2)

    return attend(("query", "key", "value"), local) + attend(("query_global", "key_global", "value_global"), rows)


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("dilation", [1, 3, (2, 5)])
def test_dilated_and_autoregressive(autoregressive: bool, dilation: Any) -> None:
    made = config(num_hidden_layers=1, attention_window=[6])
    model = LongformerModel(made).double()
    sparsify(model, autoregressive=autoregressive, dilation=dilation if isinstance(dilation, int) else [dilation])
    module = model.encoder.layer[0].attention.self
    n = 41
    mask = torch.zeros(1, n)
    mask[0, [4, 30]], mask[0, 36:] = 1.0, -1.0
    is_global, masked = mask[0] > 0, mask[0] < 0
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    gaps = [dilation, dilation] if isinstance(dilation, int) else dilation
    near = torch.stack([((i - j).abs() <= 3 * d) & ((i - j) % d == 0) for d in gaps])
    past = (j <= i) | (not autoregressive)
    local = (near | is_global) & past & ~masked & ~(is_global | masked)[:, None]
    x = torch.randn(1, n, 16, dtype=torch.float64)
    actual = module(x, mask)[0]
    torch.testing.assert_close(actual, dense(module, x, local, past & ~masked & is_global[:, None]), rtol=0, atol=1e-12)
    assert (actual[0, 36:] == 0).all()


def test_autoregressive_models_do_not_see_the_future() -> None:
    model = sparsify(LongformerModel(config(), add_pooling_layer=False).eval(), autoregressive=True)
    ids = torch.randint(3, 40, (1, 50))
    chosen = torch.zeros_like(ids)
    chosen[0, [0, 20, 45]] = 1
    other = ids.clone()
    other[0, 33:] = torch.randint(3, 40, (17,))
    one, two = (model(x, global_attention_mask=chosen).last_hidden_state for x in (ids, other))
    assert torch.equal(one[:, :33], two[:, :33])
    assert not torch.equal(one[:, 33:], two[:, 33:])


def test_one_dilation_for_each_layer() -> None:
    model = sparsify(LongformerModel(config()), dilation=[2, (1, 3)])
    near = [layer.attention.self.window_pattern for layer in model.encoder.layer]
    assert near == [fl.window(4, dilation=2), fl.per_head([fl.window(4), fl.window(4, dilation=3)])]


def test_windows_that_hugging_faces_chunks_cannot_serve() -> None:
    """Two tokens wide, and widths of which the widest is no multiple."""
    ids = torch.randint(3, 40, (1, 30))
    for width in ([2, 2], [6, 16]):
        model = LongformerModel(config(attention_window=width), add_pooling_layer=False).eval()
        with pytest.raises((RuntimeError, AssertionError)):
            model(ids)
        sparsify(model)
        other = ids.clone()
        other[0, 20] = 39 - ids[0, 20]
        moved = (model(ids).last_hidden_state - model(other).last_hidden_state)[0].abs().amax(-1) > 0
        reach = sum(width) // 2
        assert moved.nonzero().flatten().tolist() == list(range(max(0, 20 - reach), min(30, 20 + reach + 1)))


def test_dropout_is_that_of_attention() -> None:
    model = sparsify(LongformerModel(config(attention_probs_dropout_prob=0.5)), backend="reference")
    ids = torch.randint(3, 40, (1, 30))

    def run() -> Tensor:
        torch.manual_seed(3)
        return model(ids).last_hidden_state

    dropped = run()
    assert not torch.equal(dropped, model(ids).last_hidden_state)
    sparsify(model, backend="torch")  # where a link's fate is the same
    torch.testing.assert_close(run(), dropped, rtol=0, atol=1e-4)
    model.eval()
    assert torch.equal(run(), model(ids).last_hidden_state)


def test_parameters_and_their_names_stay(tmp_path: Path) -> None:
    model = LongformerForMaskedLM(config()).eval()
    ids = torch.randint(3, 40, (1, 20))
    before = model(ids).logits
    names, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    sparsify(model)
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == parameters
    model.save_pretrained(tmp_path)
    loaded = LongformerForMaskedLM.from_pretrained(tmp_path).eval()
    assert not any(isinstance(m, LongformerAttention) for m in loaded.modules())
    assert torch.equal(loaded(ids).logits, before)
    other = sparsify(LongformerForMaskedLM(config()).eval())
    other.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(other(ids).logits, before, rtol=0, atol=1e-4)


def test_restore_puts_everything_back() -> None:
    model = LongformerModel(config())
    inputs = {"input_ids": torch.randint(3, 40, (1, 20))}
    before, state = answer(model, inputs), {name: dict(vars(m)) for name, m in model.named_modules()}
    made, written = model.config, copy.deepcopy(model.config)
    assert replaces(model)
    assert sparsify(model) is model
    assert replaces(model)
    assert model.config is made
    assert model.config == written
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0)
    assert restore(model) is model
    assert model.config is made
    assert model.config == written
    assert all(type(layer.attention.self) is LongformerSelfAttention for layer in model.encoder.layer)
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {name: held.keys() for name, held in state.items()}
    actual = errors(before, answer(model, inputs))
    assert actual.output == actual.gradient == 0


def test_mode_and_projections_survive_restoring() -> None:
    model = sparsify(LongformerModel(config()).eval())
    module = model.encoder.layer[0].attention.self
    module.query = torch.nn.Linear(16, 16)  # as an adapter would
    query = module.query
    model.train()
    restore(model)
    assert model.encoder.layer[0].attention.self.query is query
    assert model.encoder.layer[0].attention.self.training


def test_copies_and_pickles_are_sparse_too() -> None:
    model = sparsify(LongformerModel(config()).eval())
    ids = torch.randint(3, 40, (1, 20))
    before = model(ids).last_hidden_state
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for other in (copy.deepcopy(model), torch.load(held, weights_only=False)):
        assert torch.equal(other(ids).last_hidden_state, before)
        assert replaces(restore(other))
        assert not any(isinstance(m, LongformerAttention) for m in other.modules())
        torch.testing.assert_close(other(ids).last_hidden_state, before, rtol=0, atol=1e-5)
    assert isinstance(model.encoder.layer[0].attention.self, LongformerAttention)


def test_gradient_checkpointing() -> None:
    model = sparsify(LongformerModel(config()))
    inputs = {"input_ids": torch.randint(3, 40, (2, 20))}
    before = answer(model, inputs)
    model.activation_checkpointing_enable()
    assert errors(before, answer(model, inputs)).fine


def test_masks_are_read_once_and_plans_are_found_again(cold_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    read = longformer._TokenRoles.__init__
    monkeypatch.setattr(longformer._TokenRoles, "__init__", lambda self, *args: (made.append(1), read(self, *args))[1])
    model = sparsify(LongformerModel(config(num_hidden_layers=3)).eval(), backend="torch")
    ids, real, chosen = torch.randint(3, 40, (2, 30)), torch.ones(2, 30), torch.zeros(2, 30, dtype=torch.long)
    real[1, 25:], chosen[:, 0] = 0, 1
    before = plans.info().misses
    with torch.no_grad():
        for turn in range(3):
            model(ids, attention_mask=real.clone(), global_attention_mask=chosen.clone())
            assert len(made) == turn + 1
            assert plans.info().misses == before + 2  # local and global rows, one window for all layers


@pytest.mark.parametrize("kind", ["longformer", "led"])
def test_nothing_grows_with_the_square_of_the_text(kind: str) -> None:
    n = 2048
    model: Any = LongformerModel(config(num_hidden_layers=1, max_position_embeddings=n + 2)).eval()
    if kind == "led":
        model = LEDModel(led(encoder_layers=1, max_encoder_position_embeddings=n)).get_encoder().eval()
    ids = torch.randint(3, 40, (1, n))
    with torch.no_grad():
        with Largest() as theirs:
            model(ids)
        with Largest() as ours:
            sparsify(model, backend="torch")(ids)
    assert theirs.elements >= n * n  # its mask, before the rows but the first are thrown away
    assert ours.elements < n * n / 8


def test_a_mask_that_is_written_to_is_read_again() -> None:
    module = sparsify(LongformerModel(config())).encoder.layer[0].attention.self
    x, mask = torch.randn(1, 20, 16), torch.zeros(1, 20)
    masked, is_global = mask < 0, mask > 0
    before = module(x, mask, masked, is_global)[0]
    masked[0, 15:] = True
    after = module(x, mask, masked, is_global)[0]
    assert (after[0, 15:] == 0).all()
    assert (before[0, 15:] != 0).all()


def test_autocast() -> None:
    """Rounded no more than Hugging Face's own module is, within a factor of two."""
    model = LongformerModel(config(), add_pooling_layer=False).eval()
    ids, chosen = torch.randint(3, 40, (2, 40)), torch.zeros(2, 40, dtype=torch.long)
    chosen[:, 0], chosen[1, 9] = 1, 1

    def error() -> float:
        exact = model(ids, global_attention_mask=chosen).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(ids, global_attention_mask=chosen).last_hidden_state
        return (rough - exact).abs().mean().item()

    theirs = error()
    for autoregressive in (False, True):
        sparsify(model, autoregressive=autoregressive)
        assert 0 < error() < 2 * theirs


@torch.no_grad()
def test_compiled() -> None:
    """LED's encoder reads a number in its forward pass, which breaks the graph."""
    model = sparsify(LongformerModel(config()).eval())
    ids, chosen = torch.randint(3, 40, (2, 40)), torch.zeros(2, 40, dtype=torch.long)
    chosen[:, 0], chosen[1, 9] = 1, 1
    expected = model(ids, global_attention_mask=chosen).last_hidden_state
    actual = torch.compile(model, backend="eager")(ids, global_attention_mask=chosen).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_what_cannot_be() -> None:
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
    assert not replaces(bert)
    with pytest.raises(fl.UnsupportedError, match=r"BertModel holds no self-attention of Longformer or of LED's encoder"):
        sparsify(bert)
    model = LongformerModel(config())
    with pytest.raises(fl.ArgumentError, match=r"dilation has 3 entries, but the model has 2 layers .*; give one number"):
        sparsify(model, dilation=[1, 2, 3])
    with pytest.raises(fl.ArgumentError, match=r"dilation: layer 1 has 3 entries for 2 heads; give one number"):
        sparsify(model, dilation=[1, (1, 2, 3)])
    assert not any(isinstance(m, LongformerAttention) for m in model.modules())


def test_the_document_says_what_happens() -> None:
    document = Path(__file__).parents[2] / "docs" / "models.md"
    done = doctest.testfile(str(document), module_relative=False)
    assert done.attempted >= 15
    assert not done.failed
