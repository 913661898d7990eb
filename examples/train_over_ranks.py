"""Training with the sequence spread over ranks: a small language model on a book, with checkpoints that survive a lost rank.

    torchrun --standalone --nproc-per-node 4 --max-restarts 3 examples/train_over_ranks.py book.txt

Each text of 4096 bytes is cut over the ranks; attention exchanges only what its pattern needs. `--data-parallel 2` makes 2
groups of 2 ranks, each with texts of its own: gradients are averaged over all ranks, by DDP, or by FSDP2 with `--fsdp`.
Every 10 steps the state is saved by torch.distributed.checkpoint. When a rank dies, every other one hears of it and ends;
torchrun starts all again, and they go on from the last checkpoint: the losses in OUT/loss.jsonl are those of a run without
interruption, bit by bit. `--kill STEP` shows it: rank 1 kills itself at that step, once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import farlight as fl
from farlight.distributed import Layout

TIMEOUT = datetime.timedelta(minutes=10)
PATTERN = fl.window(255, 0) | fl.seen_by_all([0]) & fl.causal()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("book", type=Path, help="a text file; its bytes are the tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/train_over_ranks"), help="checkpoints and losses")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=4096, help="bytes of a text")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--data-parallel", type=int, default=1, help="groups of ranks with texts of their own")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights by FSDP2 instead of DDP")
    parser.add_argument("--kill", type=int, default=None, metavar="STEP", help="rank 1 kills itself at this step, once")
    return parser.parse_args()


def model_over(mesh: DeviceMesh, layout: Layout, width: int, fsdp: bool) -> Any:
    """A Llama-shaped model whose sequence is spread over `mesh["cp"]` and whose gradients are averaged over all ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=layout.n,
    )  # fmt: skip
    model = fl.hf.sparsify(LlamaForCausalLM(sizes), PATTERN, mesh=mesh["cp"], layout=layout)
    everyone = mesh["dp", "cp"]._flatten("everyone")
    if not fsdp:
        # The only buffers are rotary frequencies, equal on all ranks.
        parallel = DistributedDataParallel(model, process_group=everyone.get_group(), broadcast_buffers=False)
        # A lambda, since torch refuses annotations that are strings.
        parallel.register_comm_hook(everyone.get_group(), lambda group, bucket: mean_in_rank_order(group, bucket))
        return parallel
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    return fully_shard(model, mesh=everyone)


def mean_in_rank_order(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket of gradients over the ranks. The order in which an all-reduce adds depends on the place within the
    bucket, and DDP orders its buckets again after the first step of a process: a resumed run would differ by rounding. (At the
    price of a gather: for many ranks drop this hook, and the last bits.)
    """
    parts = [torch.empty_like(bucket.buffer()) for _ in range(group.size())]
    gathered = dist.all_gather(parts, bucket.buffer(), group=group, async_op=True).get_future()

    def mean(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        done.value()  # raises where a rank is lost
        for part in parts[1:]:
            parts[0] += part
        return parts[0] / len(parts)

    return gathered.then(mean)


def text_of(book: Tensor, step: int, group: int, groups: int, length: int) -> Tensor:
    """`(1, length)`: the text of a step and group, a function of both, so that a resumed run reads what it would have read."""
    generator = torch.Generator().manual_seed(step * groups + group)
    first = int(torch.randint(0, len(book) - length, (), generator=generator))
    return book[first : first + length].long()[None]


def newest(folder: Path) -> int:
    """The step of the last checkpoint that was written to its end, 0 without any."""
    done = [int(path.parent.name.removeprefix("step")) for path in folder.glob("step*/.metadata")]
    return max(done, default=0)


def save(folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """All ranks write their share; `.metadata` is written last. Collective."""
    target = folder / f"step{step}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)  # what a run that died has left
    dist.barrier()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=target)


def load(folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    checkpoint.load(found, checkpoint_id=folder / f"step{step}")
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])


def record(path: Path, step: int, loss: float) -> None:
    """Append the loss of a step."""
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def forget(path: Path, step: int) -> None:
    """Keep the losses of the steps before this one; the line that a killed rank has not finished goes too."""
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] < step))
    part.replace(path)


def train(args: argparse.Namespace) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (args.data_parallel, world // args.data_parallel), mesh_dim_names=("dp", "cp"))
    layout = Layout.balanced(PATTERN, args.length, mesh["cp"].size())
    collate = fl.hf.sequence_collator(layout, mesh["cp"].get_local_rank())
    book = torch.frombuffer(bytearray(args.book.read_bytes()), dtype=torch.uint8)
    model = model_over(mesh, layout, args.width, args.fsdp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first, losses, killed = newest(args.out), args.out / "loss.jsonl", args.out / "killed"
    if first:
        load(args.out, first, model, optimizer)
    if rank == 0:
        forget(losses, first)
    for step in range(first, args.steps):
        if step == args.kill and rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        tokens = text_of(book, step, mesh["dp"].get_local_rank(), args.data_parallel, args.length)
        loss = model(**collate({"input_ids": tokens}), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0:
            record(losses, step, float(mean) / world)
            print(f"step {step}  loss {float(mean) / world:.4f}", flush=True)
        if (step + 1) % args.every == 0:
            save(args.out, step + 1, model, optimizer)


def join() -> None:
    """Start the default process group. Collective.

    torchrun keeps one store over its restarts, in which the addresses of the last start's processes still stand: each start
    reads and writes names of its own. (On several machines the counts of restarts may differ;
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin with an empty store instead.)
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group("gloo", timeout=TIMEOUT)
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    names = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=names, rank=rank, world_size=world, timeout=TIMEOUT)


def main() -> None:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    join()
    rank = dist.get_rank()
    try:
        train(args)
    except (
        RuntimeError,
        checkpoint.CheckpointException,
    ) as error:  # DistributedError, or that of a collective of DDP, FSDP or the checkpoint
        print(f"rank {rank} ends: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the end of a process group would wait for the lost rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
