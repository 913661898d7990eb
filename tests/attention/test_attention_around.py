"""Dropout, which must drop the same links everywhere, and what surrounds a call: autocast, threads, memory, `explain`."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.memory import peak_memory
from farlight.kernels import registry
from farlight.plan.cache import plans
from farlight.testing import CASES, Case, case, dropout_mask, inputs
from parity import BACKENDS, SEED, dense, every_backend, outputs, request_of, same, skip_unless_supported

WITH_DROPOUT = [one for one in CASES if one.dropout]


@pytest.mark.parametrize("of", WITH_DROPOUT, ids=str)
@every_backend
def test_every_backend_drops_the_same_links(backend: str, of: Case) -> None:
    """With values that name their key, the output shows which links were kept."""
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    of = dataclasses.replace(of, head_dim=1, layout="contiguous")
    keep = dropout_mask(of.sizes, SEED, of.dropout)
    assert keep is not None
    given, allowed = inputs(of), dense(of)
    for key in {0, 7, of.n_k - 1}:
        shown = dataclasses.replace(given, v=torch.zeros_like(given.v))
        shown.v[:, :, key] = 1.0
        (out, *_) = outputs(of, backend, shown)
        assert torch.equal(out[..., 0] != 0, (keep & allowed)[..., key])


@every_backend
def test_dropout_follows_its_seed(backend: str) -> None:
    of = case("dropout")
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    q, k, v = torch.randn(3, 1, 2, 60, 8).unbind(0)

    def run(seed: Any = None) -> Tensor:
        out = fl.attention(q, k, v, fl.window(9), dropout=0.4, seed=seed, backend=backend)
        assert isinstance(out, Tensor)
        return out

    same(run(7), run(7), "one seed")
    same(run(7), run(torch.tensor(7)), "a seed in a tensor")
    assert not torch.equal(run(7), run(8))
    assert not torch.equal(run(7), run(7 + 2**32)), "both halves of a seed count"
    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second), "without a seed each call draws its own"
    torch.manual_seed(3)
    same(run(), first, "and torch's generator reproduces it")
    assert not torch.equal(first, run(0)), "no seed is not seed 0"


@every_backend
def test_dropout_does_not_move_the_lse_and_none_draws_nothing(backend: str) -> None:
    of = case("dropout")
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=True))
    with_it, without = outputs(of, backend), outputs(of, backend, dropout=0.0)
    same(with_it[1], without[1], "lse")
    assert not torch.equal(with_it[0], without[0])
    state = torch.get_rng_state()
    outputs(of, backend, dropout=0.0)
    assert torch.equal(torch.get_rng_state(), state), "without dropout no random number is taken"


@every_backend
def test_dropout_in_chunks_drops_what_the_whole_drops(backend: str) -> None:
    of = case("dropout")
    skip_unless_supported(backend, request_of(of, torch.float32, return_lse=False))
    given = inputs(of)
    (whole, *_) = outputs(of, backend)
    tail = dataclasses.replace(given, q=given.q[:, :, 50:])
    (part, *_) = outputs(of, backend, tail, n_q=30, q_offset=50)
    torch.testing.assert_close(part, whole[:, :, 50:], atol=2e-6, rtol=2e-6)


# ---- autocast, threads, memory, explain ---------------------------------------------------------------------------------
@every_backend
def test_autocast_casts_as_for_torch_attention(backend: str) -> None:
    q, k, v = (x.clone().requires_grad_() for x in torch.randn(3, 1, 2, 50, 16))
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = fl.attention(q, k, v, fl.window(5), backend=backend)
        mixed = fl.attention(low[0], k, v, fl.window(5), backend=backend)
    assert isinstance(out, Tensor)
    assert out.dtype == torch.bfloat16
    wanted = fl.attention(low[0], low[1], low[2], fl.window(5), backend=backend)
    assert isinstance(wanted, Tensor)
    same(out.detach(), wanted.detach(), "out")
    same(mixed.detach(), wanted.detach(), "mixed types meet under autocast")  # type: ignore[union-attr]
    out.sum().backward()
    wanted.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    same(q.grad, low[0].grad.float(), "dq")  # type: ignore[union-attr]


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = fl.attention(q, k, v, fl.window(5))
    assert isinstance(out, Tensor)
    assert out.dtype == torch.float64
    same(out, fl.attention(q, k, v, fl.window(5)), "float64")  # type: ignore[arg-type]


@every_backend
def test_results_are_where_the_queries_are(backend: str, cold_cache: None) -> None:
    """Not on the default device, where nothing may be made on the way either."""
    of = case("skim")
    given = inputs(of)
    wanted = outputs(of, backend, given)
    plans.clear()
    torch.set_default_device("meta")
    try:
        found = outputs(of, backend, given)
    finally:
        torch.set_default_device(None)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@every_backend
def test_many_threads_at_once(backend: str, cold_cache: None) -> None:
    cases = [case(name) for name in ("skim", "strided", "clusters", "a mask with holes")]
    wanted = {of.name: outputs(of, backend) for of in cases}
    wrong: list[str] = []

    def work(first: int) -> None:
        for step in range(6):
            of = cases[(first + step) % len(cases)]
            found = outputs(of, backend)
            if not all(torch.equal(a, b) for a, b in zip(found, wanted[of.name], strict=True)):
                wrong.append(of.name)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_memory_is_linear_in_the_text(backend: str) -> None:
    """Forward and backward over 24 576 tokens: one n² mask alone would take 576 MiB, one n² of scores 2.25 GiB."""
    n, pattern = 24_576, fl.window(32) | fl.global_tokens([0])
    q, k, v = (x.clone().requires_grad_() for x in torch.randn(3, 1, 1, n, 16))
    skip_unless_supported(backend, request_of(case("skim"), torch.float32, return_lse=False))
    fl.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], pattern, backend=backend).sum().backward()  # type: ignore[union-attr]
    with peak_memory() as peak:
        fl.attention(q, k, v, pattern, backend=backend).sum().backward()  # type: ignore[union-attr]
    assert peak.method in ("VmHWM", "sampled"), peak
    assert peak.bytes < 120 * 2**20, f"{peak.bytes / 2**20:.0f} MiB"


def test_explain_tells_what_auto_takes_and_why_others_cannot() -> None:
    q = torch.randn(1, 4, 100, 16)
    k = torch.randn(1, 2, 100, 16)
    text = fl.explain(q, k, k, fl.window(4), dropout=0.1, return_lse=True)
    lines = text.splitlines()
    assert lines[0] == (
        "window(4) on batch 1, 4 query heads on 2 key heads, 100 queries, 100 keys, head_dim 16, float32 on cpu, "
        "dropout 0.1, returning lse"
    )
    of = Case("explained", fl.window(4), 100, heads=4, kv_heads=2, dropout=0.1)
    request = request_of(of, torch.float32, return_lse=True)._replace(needs_grad=False)
    assert lines[1] == f"auto takes {registry.select(request).backend.name!r}"
    for name in BACKENDS:
        why = registry.reasons(name, request)
        assert f"  {name}: {'cannot: ' + '; '.join(why) if why else 'can'}" in lines
    assert any("does not give the lse" in line and "its dropout draws other links" in line for line in lines)
    assert any(line.startswith("full attention computes 40,000 pairs") for line in lines)
    assert len(fl.explain(q, k, k, fl.clusters(torch.arange(100) % 9)).splitlines()[0]) < 400


def test_explain_takes_what_attention_takes() -> None:
    q = torch.randn(1, 2, 30, 8)
    plan = fl.plan(fl.window(3), 30, heads=2)
    assert fl.explain(q, q, q, plan) == fl.explain(q, q, q, fl.window(3))
    with pytest.raises(fl.PatternError, match="global_tokens: the mask has 31 tokens, but there are 30 keys"):
        fl.explain(q, q, q, fl.global_tokens(torch.arange(31) < 1))
    with pytest.raises(fl.ArgumentError, match="q is list, not a torch tensor"):
        fl.explain([], q, q, fl.window(3))  # type: ignore[arg-type]
