"""Whole router steps on the device: choose, plan, attend; beside attention under a known choice, and full attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import farlight as fl
from farlight.patterns import Pattern
from farlight.routing import KMeans, Router, TopBlocks
from suite.settings import Box, Settings
from suite.timing import Contender, interleaved

__all__ = ["router_rows"]

# tokens, heads, head_dim
SETTINGS, REHEARSAL_SETTINGS = (65_536, 16, 64), (160, 2, 16)
ROW_SECONDS = 20.0


def routers(n: int, heads: int, dim: int, device: str) -> dict[str, tuple[Router, Pattern | None]]:
    """Routers by name, each alone and in union with a window: (router, fixed pattern)."""
    num_clusters, block, radius = max(2, n // 1024), 64 if n >= 1024 else 16, min(128, n // 8)
    count = min(16, n // block)
    kmeans_name, top_blocks_name = f"KMeans({num_clusters} clusters)", f"TopBlocks(count={count}, block={block})"
    return {
        kmeans_name: (KMeans(heads, dim, num_clusters).to(device), None),
        f"window({radius}) with {kmeans_name}": (KMeans(heads, dim, num_clusters).to(device), fl.window(radius)),
        top_blocks_name: (TopBlocks(count=count, block=block), None),
        f"window({radius}) with {top_blocks_name}": (TopBlocks(count=count, block=block), fl.window(radius)),
    }


def router_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """For each router, forward and forward + backward: seconds to choose, of the whole step, of attention under a known choice,
    and of full attention; `waits` counts the synchronisations of one step.
    """
    rehearsal = settings.rehearsal
    n, heads, dim = REHEARSAL_SETTINGS if rehearsal else SETTINGS
    device, dtype = ("cpu", torch.float32) if rehearsal else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    for name, (router, fixed) in routers(n, heads, dim, device).items():
        about = {"router": name, "tokens": n, "heads": heads, "head_dim": dim}
        why = None if rehearsal else box.refusal(ROW_SECONDS)
        if why is not None:
            yield {**about, "skipped": why}
            continue
        try:
            if isinstance(router, KMeans):
                router = router.fit(q.detach(), k.detach()).eval()
            yield {**about, **_row(router, fixed, (q, k, v), rehearsal)}
        except Exception as error:  # out of memory, or what a compiler raises: a row with its reason
            yield {**about, "wrong": f"{type(error).__name__}: {error}"[:400]}


def _row(router: Router, fixed: Pattern | None, qkv: tuple[Tensor, Tensor, Tensor], rehearsal: bool) -> dict[str, Any]:
    q, k, v = qkv
    grad = torch.randn_like(q)

    def choose() -> Pattern:
        choice: Pattern = router(q, k)
        return choice if fixed is None else fixed | choice

    known_choice = choose()

    def attend(pattern: Pattern) -> Tensor:
        out = fl.attention(q, k, v, pattern, backend="triton")
        assert isinstance(out, Tensor)
        return out

    def full() -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    row: dict[str, Any] = {"waits": _synchronisations(choose, q, k, v), "passes": {}}
    for name in ("forward", "forward + backward"):

        def pass_of(call: Callable[[], Tensor], backward: bool = name != "forward") -> Callable[[], Any]:
            def run() -> Any:
                if backward:
                    return torch.autograd.grad(call(), (q, k, v), grad)
                with torch.no_grad():
                    return call()

            return run

        contenders = [
            Contender("choose", choose),
            Contender("step", pass_of(lambda: attend(choose()))),
            Contender("attend", pass_of(lambda: attend(known_choice))),
            Contender("full", pass_of(full)),
        ]
        timings = interleaved(contenders, repeats=1 if rehearsal else 7, budget=8)
        row["passes"][name] = {contender: timing.row() for contender, timing in timings.items()}
    return row


def _synchronisations(choose: Callable[[], Pattern], q: Tensor, k: Tensor, v: Tensor) -> int | None:
    """Synchronisations of choosing, planning and attending, in a second call: the first one plans the fixed part.

    None on the CPU.
    """
    if not q.is_cuda:
        return None
    import warnings

    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        fl.attention(q, k, v, choose(), backend="triton")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fl.attention(q, k, v, choose(), backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
