"""output_attentions=True on Longformer, LED, BigBird and BigBird-Pegasus: the probabilities of Hugging Face's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hf_bigbird import config as bigbird_config
from test_hf_bigbird import padded, pegasus
from test_hf_longformer import config, globals_of, led, masks
from torch import Tensor
from transformers import BigBirdModel, BigBirdPegasusModel, LEDModel, LongformerModel

import farlight as fl
from farlight.hf import bigbird, longformer
from farlight.hf.probabilities import MAX_TOKENS

CLOSE = {"rtol": 0, "atol": 2e-6}


def longformer_model(name: str) -> Any:
    model = LongformerModel(config()) if name == "Longformer" else LEDModel(led()).get_encoder()
    return model.eval()


@pytest.mark.parametrize("chosen", ["first", "some", "one item", "none", "all", "no mask"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "nothing"])
@pytest.mark.parametrize("name", ["Longformer", "LED"])
@torch.no_grad()
def test_longformer_and_led(name: str, padding: str, chosen: str) -> None:
    draw = torch.Generator().manual_seed(7)
    n = 21
    inputs = {
        "input_ids": torch.randint(3, 40, (2, n), generator=draw),
        "attention_mask": masks(padding, 2, n, draw),
        "global_attention_mask": globals_of(chosen, 2, n, draw),
    }
    model = longformer_model(name)
    expected = model(**inputs, output_attentions=True)
    actual = longformer.sparsify(model)(**inputs, output_attentions=True)
    torch.testing.assert_close(actual.last_hidden_state, model(**inputs).last_hidden_state)
    assert len(actual.attentions) == len(expected.attentions) == 2
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    if expected.global_attentions is None:
        assert actual.global_attentions is None
        return
    is_global = inputs["attention_mask"].bool() & inputs["global_attention_mask"].bool()
    for ours, theirs in zip(actual.global_attentions, expected.global_attentions, strict=True):
        # Hugging Face's matrix has rows of padding to a whole window, and in texts with fewer global tokens 1 / N in the rest.
        for text, count in enumerate(is_global.sum(1).tolist()):
            torch.testing.assert_close(ours[text, :, :, :count], theirs[text, :, :n, :count], **CLOSE)
            assert not ours[text, :, :, count:].any()
            torch.testing.assert_close(ours[text, :, :, :count].sum(1), torch.ones(2, count))


@pytest.mark.parametrize("dilation", [1, 3, [1, (2, 3)]], ids=str)
@pytest.mark.parametrize("autoregressive", [False, True])
@torch.no_grad()
def test_longformers_columns_are_keys(autoregressive: bool, dilation: Any) -> None:
    """Written back by position, the rows multiply the values to the module's own output."""
    model = longformer.sparsify(LongformerModel(config()).eval(), autoregressive=autoregressive, dilation=dilation)
    layer = model.encoder.layer[1].attention.self
    x, mask = torch.randn(2, 30, 16), torch.zeros(2, 30)
    mask[0, [0, 13]], mask[1, 20], mask[1, 25:] = 1.0, 1.0, -1.0
    out, local, by_global = layer(x, mask, output_attentions=True)
    by_head = [dilation, dilation] if isinstance(dilation, int) else dilation[1]
    places = torch.tensor([[0, 13], [20, -1]])
    weights = torch.zeros(2, 2, 30, 30)
    for text, head, row in torch.cartesian_prod(*map(torch.arange, (2, 2, 30))).tolist():
        for column, weight in enumerate(local[text, row, head].tolist()):
            key = int(places[text, column]) if column < 2 else row + by_head[head] * (column - 2 - 4)
            if 0 <= key < 30:
                weights[text, head, row, key] += weight
            else:
                assert weight == 0
    value, value_global = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (layer.value, layer.value_global))
    expected = weights @ value
    for text, place in (0, 0), (0, 1), (1, 0):
        expected[text, :, places[text, place]] = (by_global[text, :, place, None] @ value_global[text])[:, 0]
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-5)


def bigbird_model(name: str) -> Any:
    return BigBirdModel(bigbird_config()) if name == "BigBird" else BigBirdPegasusModel(pegasus()).get_encoder()


@pytest.mark.parametrize("padding", ["no mask", "right", "left", "holes"])
@pytest.mark.parametrize("n", [30, 52, 60])
@pytest.mark.parametrize("name", ["BigBird", "BigBird-Pegasus"])
@torch.no_grad()
def test_bigbird(name: str, n: int, padding: str) -> None:
    """Block 0 counts 1 + r times in evaluation, which Hugging Face's matrix shows once."""
    draw = torch.Generator().manual_seed(3)
    ids, real = torch.randint(3, 40, (2, n), generator=draw), padded(padding, 2, n, draw)
    model = bigbird_model(name).eval()
    if n <= (5 + 2 * 2) * 4:
        # Hugging Face's model switches by itself, but to modules that its recording of outputs has not seen.
        model.set_attention_type("original_full")
    expected = model(ids, attention_mask=real, output_attentions=True).attentions
    if n > (5 + 2 * 2) * 4:
        for weights in expected:
            weights[:, :, 4 : (n - 1) // 4 * 4, :4] *= 3
    model.set_attention_type("block_sparse")
    actual = bigbird.sparsify(model)(ids, attention_mask=real, output_attentions=True).attentions
    rows = torch.ones(2, n, dtype=torch.bool) if real is None else real.bool()
    assert len(actual) == len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == (2, 2, n, n)
        ours, theirs = (x[..., :n, :n].transpose(1, 2)[rows] for x in (ours, theirs))
        torch.testing.assert_close(ours, theirs, **CLOSE)
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:-1]))


@pytest.mark.parametrize("semantics", ["hf_eval", "paper"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["BigBird", "BigBird-Pegasus"])
@torch.no_grad()
def test_bigbirds_probabilities_multiply_the_values(name: str, training: bool, semantics: str) -> None:
    model = bigbird_model(name)
    bigbird.sparsify(model.train(training), semantics=semantics)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, bigbird.BigBirdAttention):
            values = module.value
            module.register_forward_hook(lambda _, args, out, f=values: seen.append((f(args[0]), *out)))
    model(torch.randint(3, 40, (2, 50)), output_attentions=True)
    assert len(seen) == 2
    for value, out, weights in seen:
        expected = weights @ value.unflatten(2, (2, -1)).transpose(1, 2)
        torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Longformer", "LED", "BigBird", "BigBird-Pegasus"])
def test_the_configuration_may_ask_and_gradients_flow(name: str) -> None:
    model = longformer_model(name) if name in ("Longformer", "LED") else bigbird_model(name).eval()
    fl.hf.sparsify(model)
    ids = torch.randint(3, 40, (1, 50))
    model.config.output_attentions = True
    attentions = model(ids).attentions
    assert len(attentions) == 2
    attentions[1].square().sum().backward()
    query = next(p for name, p in model.named_parameters() if "1." in name and "query" in name and name.endswith("weight"))
    assert query.grad is not None
    assert query.grad.abs().max() > 0
    model.config.output_attentions = False
    assert not model(ids).attentions


@torch.no_grad()
def test_long_texts_and_traced_programs_are_refused() -> None:
    n = MAX_TOKENS + 1
    x, mask = torch.zeros(1, n, 16), torch.ones(1, 1, 1, n)
    layer = longformer.sparsify(LongformerModel(config())).encoder.layer[0].attention.self
    with pytest.raises(fl.UnsupportedError, match=rf"LongformerAttention for {n} queries .* up to {MAX_TOKENS} tokens only"):
        layer(x, torch.zeros(1, n), output_attentions=True)
    layer = bigbird.sparsify(BigBirdModel(bigbird_config())).encoder.layer[0].attention.self
    with pytest.raises(fl.UnsupportedError, match=rf"BigBirdAttention for {n} queries .* up to {MAX_TOKENS} tokens only"):
        layer(x, mask, output_attentions=True)
    layer = longformer.sparsify(LongformerModel(config()).eval()).encoder.layer[0].attention.self
    with pytest.raises(fl.UnsupportedError, match=r"in a compiled or exported program: the number of columns"):
        torch.export.export(layer, (x[:, :8], mask[0, 0, :, :8]), {"output_attentions": True})
