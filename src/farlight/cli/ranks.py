"""Processes of one `torchrun` that share a list of work: each piece is claimed by one of them, from a counter in its store."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from typing import Any

from farlight.errors import DistributedError, UnsupportedError

__all__ = ["Ranks"]

# How long a process waits for the others, which may have hours to read. A process that dies is noticed by torchrun at once.
_TIMEOUT = datetime.timedelta(days=30)


class Ranks:
    """This process among those that torchrun started. store: a `torch.distributed.Store` that all of them use."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world

    @classmethod
    def of_torchrun(cls) -> Ranks | None:
        """The processes of this torchrun; None for a process of its own. Raises UnsupportedError without torch.distributed."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        import torch.distributed

        dist: Any = torch.distributed  # stubs do not export its stores
        if not dist.is_available():
            raise UnsupportedError("this torch has no torch.distributed; start farlight without torchrun.")
        store, rank, world = next(dist.rendezvous("env://"))
        # A restart counts afresh: what the last start had claimed and not written is claimed again.
        return cls(dist.PrefixStore(f"farlight, start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store), rank, world)

    def claims(self) -> Callable[[int], bool]:
        """A function that says of each number 0, 1, 2, …, asked in this order, whether it is this process's. Each is one's."""
        claimed = -1

        def is_claimed(number: int) -> bool:
            nonlocal claimed
            if claimed < number:
                claimed = self.store.add("claimed", 1) - 1
            return claimed == number

        return is_claimed

    def publish(self, name: str, value: Any) -> None:
        """Make a value of plain types known to the others."""
        self.store.set(f"{name} {self.rank}", json.dumps(value))

    def wait_for(self, name: str, rank: int) -> Any:
        """The value of this name that a rank publishes, waited for. Raises DistributedError where the store is lost."""
        key = f"{name} {rank}"
        try:
            self.store.wait([key], _TIMEOUT)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise DistributedError(f"rank {self.rank} of {self.world}: rank {rank} does not answer ({error}).") from error
