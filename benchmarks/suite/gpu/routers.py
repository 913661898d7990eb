"""A router's whole step on the device: choosing, planning where the choice lies, attending; beside attention under a choice
that is planned already, and full attention.
"""

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
SETTINGS, REHEARSED = (65_536, 16, 64), (160, 2, 16)
ROW_SECONDS = 20.0


def routers(n: int, heads: int, dim: int, device: str) -> dict[str, tuple[Router, Pattern | None]]:
    """Each alone and with a window beside it."""
    rooms, block, near = max(2, n // 1024), 64 if n >= 1024 else 16, min(128, n // 8)
    count = min(16, n // block)
    rooms_of, blocks_of = f"KMeans({rooms} clusters)", f"TopBlocks(count={count}, block={block})"
    return {
        rooms_of: (KMeans(heads, dim, rooms).to(device), None),
        f"window({near}) with {rooms_of}": (KMeans(heads, dim, rooms).to(device), fl.window(near)),
        blocks_of: (TopBlocks(count=count, block=block), None),
        f"window({near}) with {blocks_of}": (TopBlocks(count=count, block=block), fl.window(near)),
    }


def router_rows(settings: Settings, box: Box) -> Iterator[dict[str, Any]]:
    """For each router, forward and forward + backward: seconds to choose, of the whole step, of attention under a known choice,
    and of full attention; `waits` counts the synchronisations of one step.
    """
    rehearsal = settings.rehearsal
    n, heads, dim = REHEARSED if rehearsal else SETTINGS
    device, dtype = ("cpu", torch.float32) if rehearsal else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    for name, (router, beside) in routers(n, heads, dim, device).items():
        about = {"router": name, "tokens": n, "heads": heads, "head_dim": dim}
        why = None if rehearsal else box.refusal(ROW_SECONDS)
        if why is not None:
            yield {**about, "skipped": why}
            continue
        try:
            if isinstance(router, KMeans):
                router = router.fit(q.detach(), k.detach()).eval()
            yield {**about, **_row(router, beside, (q, k, v), rehearsal)}
        except Exception as error:  # out of memory, or what a compiler raises: a row with its reason
            yield {**about, "wrong": f"{type(error).__name__}: {error}"[:400]}


def _row(router: Router, beside: Pattern | None, qkv: tuple[Tensor, Tensor, Tensor], rehearsal: bool) -> dict[str, Any]:
    q, k, v = qkv
    grad = torch.randn_like(q)

    def choose() -> Pattern:
        chosen: Pattern = router(q, k)
        return chosen if beside is None else beside | chosen

    known = choose()

    def attend(pattern: Pattern) -> Tensor:
        out = fl.attention(q, k, v, pattern, backend="triton")
        assert isinstance(out, Tensor)
        return out

    def full() -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    row: dict[str, Any] = {"waits": _waits(choose, q, k, v), "passes": {}}
    for what in ("forward", "forward + backward"):

        def whole(call: Callable[[], Tensor], backward: bool = what != "forward") -> Callable[[], Any]:
            def quiet() -> Any:
                if backward:
                    return torch.autograd.grad(call(), (q, k, v), grad)
                with torch.no_grad():
                    return call()

            return quiet

        contenders = [
            Contender("choose", choose),
            Contender("step", whole(lambda: attend(choose()))),
            Contender("attend", whole(lambda: attend(known))),
            Contender("full", whole(full)),
        ]
        found = interleaved(contenders, repeats=1 if rehearsal else 7, budget=8)
        row["passes"][what] = {one: timing.row() for one, timing in found.items()}
    return row


def _waits(choose: Callable[[], Pattern], q: Tensor, k: Tensor, v: Tensor) -> int | None:
    """How often choosing, planning and attending wait for the device, in a second call: the first one plans the fixed part.

    None where there is no device to wait for.
    """
    if not q.is_cuda:
        return None
    import warnings

    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        fl.attention(q, k, v, choose(), backend="triton")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fl.attention(q, k, v, choose(), backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)
