"""Properties of attention over ranks beside its numbers: the same bits, layouts from lengths, agreement, and errors.

Functions here run inside the processes of `ranks.in_ranks`; each returns or asserts on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from spread_cases import broadcasting
from torch import Tensor

import farlight as fl
from farlight.distributed import Layout, attention

N, HEADS, DIM = 60, 2, 8


def tensors(n: int = N, *, seed: int = 0, heads: int = HEADS) -> list[Tensor]:
    """q, k, v and the gradient of the output, for the whole sequence; equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, DIM, generator=generator) for _ in range(4)]


def sharded(layout: Layout, rank: int, whole: list[Tensor]) -> list[Tensor]:
    return [layout.shard(x, 2, rank).detach().clone() for x in whole]


def the_same_bits_in_every_run(rank: int, world: int) -> list[Tensor]:
    """Results of one attention twice, in bfloat16 with broadcasts, bit for bit. Returns them."""
    layout, pattern = Layout.even(N, world), fl.window(3) | fl.global_tokens([0, 31]) | fl.random_keys(1)
    runs = []
    for _ in range(2):
        with broadcasting(0):
            q, k, v, dout = (x.bfloat16() for x in sharded(layout, rank, tensors()))
            out, lse = attention(
                q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), pattern, layout=layout, return_lse=True
            )
            out.backward(dout)
            runs.append([out.detach(), lse.detach(), q.grad, k.grad, v.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return [x.float() for x in runs[0]]


def lengths_say_the_layout(rank: int, world: int) -> None:
    """Without a layout: uneven shards in rank order, one of them empty, as one process computes them."""
    pattern = fl.window(6) | fl.global_tokens([0])
    whole = tensors()
    layout = Layout([0, 0, *(10 * r for r in range(1, world - 1)), N])
    q, k, v, _ = sharded(layout, rank, whole)
    expected = layout.shard(fl.attention(*whole[:3], pattern), 2, rank)
    torch.testing.assert_close(attention(q, k, v, pattern), expected, rtol=1e-5, atol=1e-6)
    group = dist.new_group(list(range(world)))
    torch.testing.assert_close(attention(q, k, v, pattern, group=group), expected, rtol=1e-5, atol=1e-6)
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    torch.testing.assert_close(attention(q, k, v, pattern, mesh=mesh["cp"]), expected, rtol=1e-5, atol=1e-6)


def dtensors_in_and_out(rank: int, world: int) -> None:
    """DTensors `Shard(2)`, evenly divided or not, with gradients."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (world,))
    for n in (N, N + 1):
        q, k, v, dout = tensors(n)
        spread = [distribute_tensor(x, mesh, [Shard(2)]).requires_grad_() for x in (q, k, v)]
        out, lse = attention(*spread, fl.window(3), return_lse=True)
        assert isinstance(out, DTensor)
        assert out.placements == (Shard(2),)
        assert lse.shape == (1, HEADS, n)
        out.backward(distribute_tensor(dout, mesh, [Shard(2)]))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = fl.attention(*leaves, fl.window(3))
        expected.backward(dout)
        torch.testing.assert_close(out.full_tensor(), expected, rtol=1e-5, atol=1e-6)
        for x, leaf in zip(spread, leaves, strict=True):
            torch.testing.assert_close(x.grad.full_tensor(), leaf.grad, rtol=1e-4, atol=1e-5)
    refuses(lambda: attention(*(distribute_tensor(x, mesh, [Replicate()]) for x in (q, k, v)), fl.full()), r"takes Shard\(2\)")


def refuses(call: Callable[[], object], text: str) -> None:
    """Assert that the call raises an error of farlight with this text."""
    with pytest.raises(fl.FarlightError, match=text):
        call()


def ranks_that_disagree_all_raise(rank: int, world: int) -> None:
    """One rank asks for something else: every rank raises, and names it."""
    layout = Layout.even(N, world)
    q, k, v, _ = sharded(layout, rank, tensors())
    last = world - 1
    odd = rank == last

    def call(**changed: object) -> object:
        options = {"layout": layout, "pattern": fl.window(17), **(changed if odd else {})}
        return attention(q, k, v, **options)  # type: ignore[arg-type]

    name = rf"rank {last} of {world} differ" if world > 2 else rf"rank 1 of {world} differ"
    refuses(lambda: call(pattern=fl.window(18)), rf"{name} from the others in the pattern")
    refuses(lambda: call(scale=0.5), rf"{name} from the others in the scale")
    refuses(lambda: call(move="keys"), rf"{name} from the others in the choice of what moves")
    refuses(lambda: attention(*((x.double() if odd else x) for x in (q, k, v)), fl.window(17), layout=layout), "in the dtype")
    other = Layout([0, *(N * r // world for r in range(1, world)), N], [*reversed(range(world))]) if N % world == 0 else None
    if other is not None:
        refuses(lambda: call(layout=other), rf"{name} from the others in the layout")
    short = Layout.even(N + world, world)
    refuses(
        lambda: call(layout=short), r"pass the shard of layout.shard" if odd else rf"rank {last} of {world} cannot take part"
    )
    refuses(lambda: call(backend="dense"), r"gives no partial results" if odd else rf"rank {last} of {world} cannot take part")
    # After all that, the group still works.
    assert attention(q, k, v, fl.window(17), layout=layout).shape == q.shape


def sinks_join_every_row(rank: int, world: int) -> None:
    """Sinks, one of them on a row that sees nothing else, with gradients."""
    layout, pattern = Layout.even(N, world), fl.window(5) - fl.sees_all([7])
    whole = [x.requires_grad_() for x in tensors()]
    sinks = torch.tensor([0.3, -1.0], requires_grad=True)
    out, lse = fl.attention(*whole[:3], pattern, sinks=sinks, return_lse=True)
    torch.autograd.backward((out, lse), (whole[3].detach(), lse.detach()))
    q, k, v, dout = (x.requires_grad_() for x in sharded(layout, rank, whole))
    local = sinks.detach().clone().requires_grad_()
    found, found_lse = attention(q, k, v, pattern, layout=layout, sinks=local, return_lse=True)
    torch.autograd.backward((found, found_lse), (dout.detach(), layout.shard(lse.detach(), 2, rank)))
    for x, y in ((found, out), (found_lse, lse), (q.grad, whole[0].grad), (k.grad, whole[1].grad), (v.grad, whole[2].grad)):
        assert y is not None
        torch.testing.assert_close(x, layout.shard(y.detach(), 2, rank), rtol=1e-4, atol=1e-5)
    assert local.grad is not None
    assert sinks.grad is not None
    dist.all_reduce(local.grad)
    torch.testing.assert_close(local.grad, sinks.grad, rtol=1e-4, atol=1e-5)


def refusals(rank: int, world: int) -> None:
    """What is not served is said on all ranks."""
    layout = Layout.even(N, world)
    q, k, v, _ = sharded(layout, rank, tensors())
    refuses(
        lambda: attention(q, k, v, fl.full(), layout=Layout.even(N, world + 1)), rf"for {world + 1} ranks, but the group has"
    )
    refuses(lambda: attention(q, k, v, "window", layout=layout), "the pattern is str")
    refuses(lambda: attention(q, k, v, fl.full(), layout=layout, move="all"), "use 'cheapest' or 'keys'")
    refuses(lambda: attention(q, k, v, fl.full(), layout=layout, score="alibi"), "score is str")
    relative = fl.score.relative(torch.zeros(HEADS, 3))
    for options in ({"dropout": 0.1}, {"score": relative}):
        refuses(lambda o=options: attention(q, k, v, fl.full(), layout=layout, backend="cpu", **o), "own positions only")
    refuses(lambda: attention(q, k, v, fl.full(), layout=layout, sinks=torch.zeros(3)), "one logit for each of the 2 heads")
    plan = fl.plan(fl.full(), N, heads=HEADS)
    refuses(lambda: attention(q, k, v, plan, layout=layout), "the pattern is Plan")
    router = fl.routing.TopBlocks(1, 8)
    refuses(lambda: attention(q, k, v, router, layout=layout), r"inside a block of 8, .*Layout.even\(n, world, multiple=8\)")
    refuses(lambda: attention(q, k, v, router, layout=layout, q_offset=0), "q_offset was given with a router")
    refuses(lambda: attention(q, k, v, fl.routing.TopKeys(1), layout=layout), "TopKeys over ranks is not served")
    refuses(lambda: attention(q[:0], k[:0], v[:0], fl.full(), layout=layout), "a batch of no items")
    refuses(lambda: layout.unshard(q[:, :, :-1], 2), "but the layout gives it")
    refuses(lambda: layout.unshard(q.requires_grad_(), 2), "pass x.detach")
