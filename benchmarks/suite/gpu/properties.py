"""Properties that need a device: bit-identical runs, CUDA graph capture, decoding against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import farlight as fl
from farlight import testing
from farlight.kernels.triton.decode import decode
from suite.settings import Box, Settings

__all__ = ["property_rows"]


def _tensors(n: int, heads: int, dim: int, rehearsal: bool) -> list[Tensor]:
    device, dtype = ("cpu", torch.float32) if rehearsal else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def _gradients(tensors: list[Tensor], pattern: fl.Pattern, dropout: float) -> list[Tensor]:
    q, k, v = tensors
    out = fl.attention(q, k, v, pattern, dropout=dropout, seed=7, backend="triton")
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


def determinism(rehearsal: bool) -> str:
    """Outputs and gradients of two runs are equal to the bit, with dropout."""
    n = 150 if rehearsal else 16_384
    tensors = _tensors(n, 2 if rehearsal else 12, 32 if rehearsal else 64, rehearsal)
    pattern = fl.window(64) | fl.global_tokens(range(16)) | fl.random_keys(3)
    first, second = _gradients(tensors, pattern, 0.1), _gradients(tensors, pattern, 0.1)
    for name, a, b in zip(("out", "dq", "dk", "dv"), first, second, strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"{name} differs between two runs")
    return f"out, dq, dk, dv equal to the bit in two runs, {n} tokens, dropout 0.1"


def graph_capture(rehearsal: bool) -> str:
    """Forward and backward of a fixed plan inside one CUDA graph, replayed on new tensors."""
    if rehearsal:
        return "not run: there are no CUDA graphs under the interpreter"
    pattern = fl.window(64) | fl.global_tokens([0, -1]) | fl.random_keys(2)
    tensors = _tensors(4096, 8, 64, rehearsal)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _gradients(tensors, pattern, 0.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _gradients(tensors, pattern, 0.0)
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for name, a, b in zip(("out", "dq", "dk", "dv"), outputs, _gradients(tensors, pattern, 0.0), strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"{name} of the replayed graph differs")
    return "forward and backward captured once, replayed on new tensors: equal to the bit"


def decoding(rehearsal: bool) -> str:
    """One query over a long cache with lengths, against float64."""
    n, heads, kv_heads = (300, 4, 2) if rehearsal else (65_536, 32, 8)
    device, dtype = ("cpu", torch.float32) if rehearsal else ("cuda", torch.bfloat16)
    torch.manual_seed(1)
    q = torch.randn(2, heads, 1, 64, device=device, dtype=dtype)
    k, v = (torch.randn(2, kv_heads, n, 64, device=device, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([n, n // 3], device=device)
    out, _ = decode(q, k, v, lengths=lengths)
    is_real = torch.arange(n, device=device) < lengths.view(-1, 1, 1, 1)
    expected, _ = testing.attend(q.double(), k.double(), v.double(), is_real, scale=0.125)
    error = float((out.double() - expected).abs().max())
    if error > (1e-5 if rehearsal else 2e-3):
        raise AssertionError(f"decoding is off by {error:.2g}")
    return f"one query, {heads} heads on {kv_heads}, {n} keys: largest error {error:.1e} against float64"


def property_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """A row for each property: `found` describes the result; `wrong`, why the property does not hold."""
    checks: dict[str, Callable[[bool], str]] = {"determinism": determinism, "CUDA graph": graph_capture, "decoding": decoding}
    for name, check in checks.items():
        try:
            yield {"check": name, "found": check(settings.rehearsal)}
        except Exception as error:  # a driver's error is a result too
            yield {"check": name, "wrong": f"{type(error).__name__}: {error}"[:600]}
