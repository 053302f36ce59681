"""The processes of one harvest: their ranks, the shards of each, and when all are done.

They are started by `sagsae harvest --processes N`, torchrun, accelerate launch or anything else that sets RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT. They meet twice, at the beginning and at the end, through the launcher's
key-value store. In between no process waits for another: each has its own shards and its own log in the manifest.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from shared.device import local_cores, pick_device
from shared.errors import BusyError, LostError, UserError
from shared.launch import meeting, settle

SECONDS_BETWEEN_CHECKS: Final = 0.2


@dataclass(frozen=True)
class RankWork:
    """What rank 0 sends to the other ranks when the store exists."""

    store: str
    todo: tuple[int, ...]
    """Numbers of the shards that are not committed."""


@dataclass(frozen=True)
class Team:
    """This process and its place among all processes of the harvest."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    keys: Any = None
    """The key-value store that all processes share; None: there is only one process."""

    @classmethod
    def join(cls) -> "Team":
        """Reads this process's place from the environment. Raises UserError when the environment contradicts
        itself, BusyError when it names other processes and they cannot be reached."""
        place = settle()
        if place.size == 1:
            return cls()
        from torch.distributed.rendezvous import rendezvous

        with meeting(place):
            keys, _, _ = next(rendezvous("env://"))
        return cls(place.rank, place.size, place.local_rank, place.local_size, keys)

    def shards_of_rank(self, work: RankWork) -> list[int]:
        return list(work.todo[self.rank :: self.size])

    @property
    def threads(self) -> int:
        """Cores for this process."""
        return local_cores(self.local_size)

    def device(self, name: str) -> str:
        """The device of this process: each process of a machine has its own GPU. Raises UserError when there are too
        few."""
        chosen = pick_device(name, spread=True)
        if chosen == "map" and self.local_size > 1:
            raise UserError("--device map: spreads one model over all GPUs, which leaves none for other --processes")
        if self.local_size == 1 or chosen.split(":")[0] != "cuda":
            return chosen
        if ":" in chosen:
            raise UserError(f"--device {name}: is one GPU for {self.local_size} processes. Use --device cuda")
        import torch

        if self.local_size > torch.cuda.device_count():
            raise UserError(f"--processes {self.local_size}: this machine has {torch.cuda.device_count()} GPUs")
        return f"cuda:{self.local_rank}"

    def announce(self, work: RankWork) -> None:
        """Rank 0: sends the store's location and the missing shards to the other ranks."""
        if self.keys is not None:
            self.keys.set("work", json.dumps([work.store, work.todo]))

    def await_work(self, check_stop: Callable[[], None]) -> RankWork:
        """Ranks 1 and up: waits for rank 0. `check_stop` is called now and then and may raise."""
        self.await_key("work", check_stop)
        store, todo = json.loads(self.reach(lambda keys: keys.get("work")))
        return RankWork(store, tuple(todo))

    def done(self) -> None:
        """Ranks 1 and up: reports that all shards of this rank are committed."""
        self.reach(lambda keys: keys.set(f"done {self.rank}", ""))

    def fail(self) -> None:
        """Ranks 1 and up: reports that this rank failed; its own message says why."""
        with suppress(RuntimeError):
            self.keys.set("failed", "")

    def check_launcher(self) -> None:
        """Raises BusyError when the launcher is gone. A rank that continued without it would write into the next
        harvest's store."""
        if self.keys is not None:
            self.reach(lambda keys: keys.check(["work"]))

    def reach(self, ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(self.keys)
        except RuntimeError as error:
            raise BusyError(
                "the launcher, or rank 0, is gone; its own message says why. Run the same command again"
            ) from error

    def await_others(self, check_stop: Callable[[], None]) -> None:
        """Rank 0: waits until all other ranks are done."""
        for rank in range(1, self.size):
            self.await_key(f"done {rank}", check_stop)

    def await_key(self, key: str, check_stop: Callable[[], None]) -> None:
        while not self.reach(lambda keys: keys.check([key])):
            check_stop()
            if self.reach(lambda keys: keys.check(["failed"])):
                raise LostError(
                    "another process of this harvest failed; its message says why. Run the same command again"
                )
            time.sleep(SECONDS_BETWEEN_CHECKS)
