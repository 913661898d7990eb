"""`torch.jit.trace` is refused wherever a traced program would keep an example's padding, and counters count the pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import farlight as fl
import farlight.nn
from farlight.routing import TopBlocks, gated_attention, gist_attention
from parity import BACKENDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # by transformers, which trace reads
]


def traced(f: Callable[..., object], *given: Tensor) -> None:
    torch.jit.trace(f, given, check_trace=False)  # type: ignore[no-untyped-call]


# ---- torch.jit.trace ----------------------------------------------------------------------------------------------------
X = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
REAL = torch.ones(1, 6, dtype=torch.bool)
layer = fl.nn.SparseAttention(8, 2, fl.window(1)).requires_grad_(False)
TRACED: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    **{
        backend: (lambda x, backend=backend: fl.attention(x, x, x, fl.window(1), backend=backend), (X,))
        for backend in ("auto", *BACKENDS)
    },
    "padding": (lambda x, real: fl.attention(x, x, x, fl.padding(real)), (X, REAL)),
    "padding by lengths": (lambda n: fl.padding(n).dense(6), (torch.tensor([3]),)),
    "documents by lengths": (lambda n: fl.documents(lengths=n).dense(6), (torch.tensor([2, 4]),)),
    "global tokens": (lambda n: fl.global_tokens(n).dense(6), (torch.tensor([0, 3]),)),
    "a router": (lambda x: fl.attention(x, x, x, TopBlocks(1, 2)(x, x)), (X,)),
    "gated": (lambda x: gated_attention(x, x, x, fl.window(1), x, x), (X,)),
    "gist": (lambda x: gist_attention(x, x, x, fl.window(1), block=2), (X,)),
    "a layer": (lambda x, real: layer(x, x, x, key_padding_mask=~real)[0], (torch.ones(1, 6, 8), REAL)),
    "decoding": (lambda x: fl.KVCache(fl.causal()).append(x, x), (X,)),
}


@pytest.mark.parametrize("name", TRACED)
def test_jit_trace_is_refused(name: str) -> None:
    f, given = TRACED[name]
    with pytest.raises(fl.UnsupportedError, match=r"torch.jit.trace keeps what is read .* Use torch.export.export"):
        traced(f, *given)


class Sentence(nn.Module):
    """A model's states for a text and its mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return found


def tiny(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 20}
    more = {"Longformer": {"attention_window": 4}, "BigBird": {"block_size": 2, "num_random_blocks": 1}}.get(name, {})
    model: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, **more)).eval()
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["Bert", "Longformer", "BigBird", "Llama"])
def test_jit_trace_of_a_model_is_refused(name: str, padded: bool) -> None:
    model = fl.hf.sparsify(tiny(name), None)
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 5:] = 0 if padded else 1
    with torch.no_grad(), pytest.raises(fl.UnsupportedError, match="torch.jit.trace (keeps|would record)"):
        traced(Sentence(model), torch.arange(3, 11)[None], mask)


# ---- FlopCounterMode ----------------------------------------------------------------------------------------------------
def counted(f: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


PATTERNS = {"fixed": fl.window(2) | fl.random_keys(1), "a table": fl.clusters(torch.arange(16) % 3)}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_flops_are_those_of_the_allowed_pairs(backend: str, name: str) -> None:
    pattern = PATTERNS[name]
    q, k = torch.randn(2, 4, 16, 8, requires_grad=True), torch.randn(2, 2, 16, 8)
    pairs = pattern.count(16, batch=2, heads=4)
    outs = []
    assert counted(lambda: outs.append(fl.attention(q, k, k, pattern, backend=backend))) == 4 * pairs * 8
    assert counted(lambda: outs[0].sum().backward()) == 10 * pairs * 8
    plain = fl.attention(q, k, k, pattern, backend=backend)  # forward outside the counter: by the kernels directly
    assert isinstance(plain, Tensor)
    if backend != "auto":  # which may have taken SDPA
        assert counted(plain.sum().backward) == 10 * pairs * 8


def test_flops_of_a_layer_under_fake_tensors() -> None:
    layer, pairs = fl.nn.SparseAttention(8, 2, fl.window(1)), fl.window(1).count(10)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 10, 8)
        assert counted(lambda: layer(x, x, x)) == 2 * 10 * 8 * (3 * 8 + 8) + 4 * pairs * 8
        labels = torch.zeros(10, dtype=torch.int64)
        q = torch.empty(1, 1, 10, 8)
        with pytest.raises(fl.UnsupportedError, match="fake tensors hold no numbers"):
            counted(lambda: fl.attention(q, q, q, fl.clusters(labels)))
