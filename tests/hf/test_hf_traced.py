"""Models under farlight as one graph: torch.compile(fullgraph=True) and torch.export, equal to eager at every padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from hf_parity import CACHE
from torch import Tensor, nn

import farlight as fl
from farlight.hf import register, sparsify

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CAUSAL = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "BERT": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL)),
    "Mistral": lambda: hf.MistralModel(hf.MistralConfig(**CAUSAL | {"sliding_window": 5, "head_dim": 8})),
}
PATTERNS: dict[str, fl.Pattern | None] = {"registered": None, "sparse": fl.window(3) | fl.global_tokens([0])}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def made(name: str, way: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if way == "sparse":
        return sparsify(model, PATTERNS[way])
    register()
    model.set_attn_implementation("farlight")
    return model


def inputs(name: str, padded: slice | None) -> dict[str, Any]:
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded is not None:
        mask[1, padded] = 0
    return {"input_ids": ids, "attention_mask": mask} | ({} if name == "BERT" else {"use_cache": False})


def real_rows(actual: Any, given: dict[str, Any]) -> Tensor:
    mask = given.get("attention_mask")
    rows: Tensor = actual[0]
    return rows if mask is None else rows[mask.bool()]


def hold_against_eager(traced: Any, model: Any, given: dict[str, Any]) -> None:
    torch.testing.assert_close(real_rows(traced(**given), given), real_rows(model(**given), given), rtol=0, atol=2e-5)


@pytest.mark.parametrize("way", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_compiled_graph_serves_every_padding(name: str, way: str) -> None:
    model = made(name, way)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hold_against_eager(compiled, model, inputs(name, slice(8, 12)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for padded in (slice(0, 5), slice(11, 12), None):
            hold_against_eager(compiled, model, inputs(name, padded))


@pytest.mark.parametrize("way", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_exported_program_serves_every_padding(name: str, way: str) -> None:
    model = made(name, way)
    program = torch.export.export(model, (), inputs(name, None)).module()
    for padded in (slice(8, 12), slice(0, 5), None):
        hold_against_eager(program, model, inputs(name, padded))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@torch.no_grad()
def test_without_a_mask(name: str, options: dict[str, Any]) -> None:
    model = made(name, "sparse")
    given = {"input_ids": inputs(name, None)["input_ids"]} | options
    hold_against_eager(torch.compile(model, fullgraph=True, backend="aot_eager"), model, given)


def test_gradients_of_a_compiled_model() -> None:
    model = made("Llama", "sparse")
    given = inputs("Llama", slice(0, 5))
    grads = []
    for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        real_rows(f(**given), given).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3 * float(a.abs().max()))


@torch.no_grad()
def test_packed_texts_stay_apart_in_a_compiled_model() -> None:
    model = sparsify(MODELS["Llama"]().eval(), fl.window(3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = inputs("Llama", None)["input_ids"]
    for cut in (5, 9):
        positions = torch.cat((torch.arange(cut), torch.arange(12 - cut)))[None].expand(2, -1)
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        hold_against_eager(compiled, model, given)
        apart = [model(input_ids=part, use_cache=False)[0] for part in ids.split([cut, 12 - cut], 1)]
        torch.testing.assert_close(compiled(**given)[0], torch.cat(apart, 1), rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_static_cache_leaves_the_graph_and_computes_the_same() -> None:
    model = made("Llama", "sparse")
    ids = inputs("Llama", None)["input_ids"]
    expected = model(input_ids=ids, use_cache=False)[0]
    compiled = torch.compile(model, backend="eager")
    cache = hf.StaticCache(config=model.config, max_cache_len=16)
    pieces = [compiled(input_ids=part, **{CACHE: cache})[0] for part in ids.split([7, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=2e-5)


LONGFORMER = {"attention_window": 4}
BIGBIRD = {"block_size": 2, "num_random_blocks": 1}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50, "init_std": 0.3, "use_cache": False,
}  # fmt: skip
REPLACED: dict[str, Callable[[], Any]] = {
    "Longformer": lambda: hf.LongformerModel(hf.LongformerConfig(**SMALL | LONGFORMER)),
    "LED": lambda: hf.LEDModel(hf.LEDConfig(**SEQ2SEQ | LONGFORMER)),
    "BigBird": lambda: hf.BigBirdModel(hf.BigBirdConfig(**SMALL | BIGBIRD)),
    "BigBird-Pegasus": lambda: hf.BigBirdPegasusModel(hf.BigBirdPegasusConfig(**SEQ2SEQ | BIGBIRD)),
}


def replaced(name: str) -> Any:
    torch.manual_seed(0)
    return sparsify(REPLACED[name]().eval())


def texts(name: str, padded: slice | None, chosen: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A batch of 24 tokens, where BigBird is block-sparse; `chosen` are the global tokens of the second text."""
    ids = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded is not None:
        given["attention_mask"][1, padded] = 0
    if name in ("LED", "BigBird-Pegasus"):
        given["decoder_input_ids"] = ids[:, :5]
    if name in ("LED", "Longformer"):
        given["global_attention_mask"] = torch.zeros_like(ids)
        given["global_attention_mask"][1, list(chosen)] = 1
    return given


@pytest.mark.parametrize("traced", ["compiled", "exported"])
@pytest.mark.parametrize("name", REPLACED)
@torch.no_grad()
def test_one_program_of_a_replaced_attention_serves_every_mask(name: str, traced: str) -> None:
    """Padding and global tokens are inputs of the program, none at all included."""
    model, first = replaced(name), texts(name, slice(20, 24))
    program = (
        torch.compile(model, fullgraph=True, backend="aot_eager")
        if traced == "compiled"
        else torch.export.export(model, (), first).module()
    )
    for given in (first, texts(name, None, (0, 9)), texts(name, slice(3, 24)), texts(name, slice(0, 5), ())):
        actual, expected = program(**given)[0], model(**given)[0]
        rows = given["attention_mask"].bool() if actual.shape[1] == 24 else slice(None)
        torch.testing.assert_close(actual[rows], expected[rows], rtol=0, atol=2e-5)


def test_gradients_of_a_compiled_longformer() -> None:
    model, grads = replaced("Longformer"), []
    for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        f(**texts("Longformer", slice(15, 24), (0, 9)))[0].square().sum().backward()
        # The graph gives the unused pooler a gradient of 0.
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert grads[0].keys() == grads[1].keys()
    for name, a in grads[0].items():
        torch.testing.assert_close(grads[1][name], a, rtol=1e-4, atol=1e-3 * float(a.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: sparsify(MODELS["BERT"](), fl.window(2)),
        lambda: made("BERT", "registered"),
        lambda: sparsify(hf.LongformerModel(hf.LongformerConfig(**SMALL | LONGFORMER))),
        lambda: sparsify(hf.BigBirdModel(hf.BigBirdConfig(**SMALL | BIGBIRD))),
    ],
    ids=["sparse", "registered", "Longformer", "BigBird"],
)
def test_jit_trace_is_refused(make: Callable[[], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            return self.model(input_ids=ids, attention_mask=mask)[0]

    given = inputs("BERT", None)
    with pytest.raises(fl.UnsupportedError, match=r"torch\.jit\.trace keeps .*torch\.export\.export"):
        torch.jit.trace(Wrapped(make().eval()), (given["input_ids"], given["attention_mask"]), check_trace=False)
