"""Attention over ranks on slow links, against an all-gather of keys and values on the same links, in one run.

    sudo python benchmarks/ranks_on_links.py        # Linux, root: network namespaces and TUN devices

Each rank runs in a network namespace whose only way out is a TUN device. This process relays the packets: each leaves its rank
at `--gigabits`, one after another, and arrives `--latency` milliseconds later (what netem does, which many kernels lack).
Both sides compute with the same backend, forward passes, in turn; beside them what the exchange and the computation of each
side take alone.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import itertools
import json
import os
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import farlight as fl
from farlight.distributed import Layout

HEADS, DIM = 12, 64
# HEADER: bytes of `virtio_net_hdr` before each packet.
MTU, QUEUE, HEADER = 65_000, 1_000, 10
PATTERNS = {
    "window(64)": fl.window(64),
    "window(256)": fl.window(256),
    "longformer(512) and 64 global tokens": fl.presets.longformer(512, range(64)),
}


# ---- links ----------------------------------------------------------------------------------------------------------------
def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def namespaces(ranks: int) -> Iterator[list[int]]:
    """Network namespaces `farlight0`, …, each with the device `wire` at 10.77.0.(rank + 1): the file descriptors of these."""
    files: list[int] = []
    try:
        for rank in range(ranks):
            name, device = f"farlight{rank}", f"fl{rank}"
            files.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            # TUNSETIFF with IFF_TUN, IFF_NO_PI, IFF_VNET_HDR; TUNSETOFFLOAD with TUN_F_CSUM: no checksum is computed.
            fcntl.ioctl(files[-1], 0x400454CA, struct.pack("16sH", device.encode(), 0x0001 | 0x1000 | 0x4000))
            fcntl.ioctl(files[-1], 0x400454D0, 1)
            ip("netns", "add", name)
            ip("link", "set", device, "netns", name)
            inside = ("-n", name)
            ip(*inside, "link", "set", device, "name", "wire")
            ip(*inside, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "wire")
            ip(*inside, "link", "set", "wire", "mtu", str(MTU), "up")
            ip(*inside, "link", "set", "lo", "up")
        yield files
    finally:
        for rank, file in enumerate(files):
            subprocess.run(["ip", "netns", "delete", f"farlight{rank}"], check=False)
            os.close(file)


def relay(files: list[int], seconds: float, bytes_per_second: float, stop: threading.Event) -> None:
    """Carry packets between the devices: one after another at the rate of their source, then the latency."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -15)  # of this thread: computing ranks must not hold up the wire
    free = [0.0] * len(files)
    queued = [0] * len(files)
    arrivals: list[tuple[float, int, int, int, bytes]] = []
    order = itertools.count()
    while not stop.is_set():
        now = time.perf_counter()
        while arrivals and arrivals[0][0] <= now:
            _, _, source, target, packet = heapq.heappop(arrivals)
            queued[source] -= 1
            with contextlib.suppress(BlockingIOError):
                os.write(files[target], packet)
        wait = min(0.05, max(0.0, arrivals[0][0] - time.perf_counter())) if arrivals else 0.05
        ready, _, _ = select.select(files, [], [], wait)
        now = time.perf_counter()
        for source in (files.index(file) for file in ready):
            packet = os.read(files[source], MTU + 64)
            target = packet[HEADER + 19] - 1 if packet[HEADER] >> 4 == 4 else -1
            if not 0 <= target < len(files) or queued[source] >= QUEUE:
                continue
            free[source] = max(free[source], now) + (len(packet) - HEADER) / bytes_per_second
            queued[source] += 1
            heapq.heappush(arrivals, (free[source] + seconds, next(order), source, target, packet))


# ---- a rank ---------------------------------------------------------------------------------------------------------------
def gather(k: Tensor, v: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """All keys and values, on every rank."""
    chunk = torch.stack((k, v)).view(torch.uint8)
    parts = [torch.empty_like(chunk) for _ in range(world)]
    dist.all_gather(parts, chunk)
    keys, values = torch.cat([part.view(k.dtype) for part in parts], 3)
    return keys, values


def own_rows(q: Tensor, keys: Tensor, values: Tensor, pattern: fl.Pattern, rank: int) -> Tensor:
    """What this rank computes after an all-gather."""
    out = fl.attention(q, keys, values, pattern, q_offset=rank * q.shape[2])
    assert isinstance(out, Tensor)
    return out


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of the slowest rank in each repetition."""
    out = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        call()
        spent = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        out.append(float(spent))
    return out


def torch_context_parallel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What torch's context parallelism says of plain causal attention on this device; it takes no other mask."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    except Exception as error:  # whatever it raises is the finding
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return "served"


def measure(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=args.store, rank=rank, world_size=args.ranks)
    layout = Layout.even(args.tokens, args.ranks)
    generator = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, HEADS, layout.lengths[rank], DIM, generator=generator).bfloat16() for _ in range(3))
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name, pattern in PATTERNS.items():
            whole = gather(k, v, args.ranks)
            sides: dict[str, Callable[[], Any]] = {
                "farlight": lambda p=pattern: fl.distributed.attention(q, k, v, p, layout=layout),
                "all-gather": lambda p=pattern: own_rows(q, *gather(k, v, args.ranks), p, rank),
                "gather": lambda: gather(k, v, args.ranks),
                "computation": lambda p=pattern, of=whole: own_rows(q, *of, p, rank),
            }
            answers = [call() for call in sides.values()]  # also plans and connections
            torch.testing.assert_close(*answers[:2], rtol=0.02, atol=0.02)
            times: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side, call in sides.items():
                    times[side] += timed(call, 1)
            predicted = layout.communication(pattern, heads=HEADS, head_dim=DIM)
            rows.append({"pattern": name, "received": int(predicted.received.max()), "seconds": times})
    refusal = torch_context_parallel(*(x[:, :, :256].clone() for x in (q, k, v)))
    if rank == 0:
        Path(args.answer).write_text(json.dumps({"rows": rows, "torch": refusal}))
    dist.barrier()
    dist.destroy_process_group()


# ---- all --------------------------------------------------------------------------------------------------------------------
def run_ranks(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start the ranks in their namespaces; what rank 0 has written."""
    answer = folder / "answer.json"
    options = [*sys.argv[1:], "--store", (folder / "store").as_uri(), "--answer", str(answer)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"farlight{rank}", sys.executable, __file__, *options, "--rank", str(rank)], env=environment
        )
        for rank in range(args.ranks)
    ]
    try:
        while any(process.poll() is None for process in ranks):
            if any(process.poll() for process in ranks):
                raise SystemExit("a rank failed; its error is above")
            time.sleep(0.2)
        if any(process.returncode for process in ranks):
            raise SystemExit("a rank failed; its error is above")
    finally:
        for process in ranks:  # those that still wait for a lost one
            process.kill()
    answers: dict[str, Any] = json.loads(answer.read_text())
    return answers


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2**16)
    parser.add_argument("--latency", type=float, default=1.0, help="milliseconds one way")
    parser.add_argument("--gigabits", type=float, default=1.0, help="a second, out of each rank")
    parser.add_argument("--repeats", type=int, default=5)
    for internal in ("--rank", "--store", "--answer"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    return parser.parse_args()


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A table; the wire's time is what the links would need for the bytes alone."""
    wire = 2 * (args.ranks - 1) * args.tokens // args.ranks * HEADS * DIM * 2 / (args.gigabits * 125e6)
    print(
        f"{args.ranks} ranks, {args.tokens} tokens, {HEADS} heads of {DIM}, bfloat16, {args.gigabits} Gbit/s, "
        f"{args.latency} ms\n"
        f"an all-gather at the rate of the links: {wire:.3f} s\n"
        "| pattern | a rank receives, at most | farlight, s | all-gather and own rows, s | ratio | all-gather alone, s "
        "| own rows alone, s |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        ours, theirs, gathered, computed = (
            statistics.median(row["seconds"][side]) for side in ("farlight", "all-gather", "gather", "computation")
        )
        print(
            f"| {row['pattern']} | {row['received'] / 1e6:.2f} MB | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} x "
            f"| {gathered:.3f} | {computed:.3f} |"
        )


def main() -> None:
    args = options()
    if args.rank is not None:
        measure(int(args.rank), args)
        return
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder, namespaces(args.ranks) as files:
        carrier = threading.Thread(target=relay, args=(files, args.latency / 1e3, args.gigabits * 125e6, stop))
        carrier.start()
        try:
            found = run_ranks(args, Path(folder))
        finally:
            stop.set()
            carrier.join()
    show(found["rows"], args)
    print(f"torch's context_parallel: {found['torch']}")


if __name__ == "__main__":
    main()
