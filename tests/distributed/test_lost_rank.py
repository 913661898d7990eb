"""A rank killed at random moments: every other one raises DistributedError within the time-out; none hangs."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
from lost_ranks import train_until_lost

SECONDS = 20.0


def kill_one(folder: Path, seed: int) -> list[tuple[int, str, float]]:
    """What the survivors of 3 ranks report after one of them was killed."""
    context, moment = multiprocessing.get_context("forkserver"), random.Random(seed)
    context.set_forkserver_preload(["farlight"])
    queue = context.Queue()
    store = (folder / f"store{seed}").as_uri()
    ranks = [context.Process(target=train_until_lost, args=(rank, 3, store, SECONDS, queue)) for rank in range(3)]
    for process in ranks:
        process.start()
    for _ in ranks:
        assert queue.get(timeout=120)[1] == "ready"
    time.sleep(moment.random() * 0.5)
    victim = moment.randrange(3)
    ranks[victim].kill()
    reports = [queue.get(timeout=3 * SECONDS) for _ in range(2)]
    for process in ranks:
        process.join()
    assert victim not in {rank for rank, *_ in reports}
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_survivors_of_a_killed_rank_raise_within_the_time_out(tmp_path: Path, seed: int) -> None:
    for rank, error, seconds in kill_one(tmp_path, seed):
        assert error == "DistributedError", f"rank {rank}: {error}"
        assert seconds < 2 * SECONDS
