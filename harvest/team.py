"""The processes of one harvest: who they are, what each has to do, and when all of it is done.

Started by `sagsae harvest --processes N`, torchrun, accelerate launch or anything else that sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. They meet twice, at the beginning and at the end, through the launcher's key-value store.
In between nobody waits for anybody: each has its own shards and its own log in the manifest.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from shared.device import local_cores, pick_device
from shared.errors import UserError
from shared.launch import meeting, settle

SECONDS_BETWEEN_LOOKS: Final = 0.2


@dataclass(frozen=True)
class RankWork:
    """What rank 0 tells the others when the store is there."""

    store: str
    todo: tuple[int, ...]
    """Shards that are not committed."""


@dataclass(frozen=True)
class Team:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    keys: Any = None
    """The key-value store that all of them reach; None: alone."""

    @classmethod
    def join(cls) -> "Team":
        """From the environment. Raises UserError when it says that there are others and they cannot be reached."""
        place = settle()
        if place.size == 1:
            return cls()
        from torch.distributed.rendezvous import rendezvous

        with meeting(place):
            keys, _, _ = next(rendezvous("env://"))
        return cls(place.rank, place.size, place.local_rank, place.local_size, keys)

    def mine(self, work: RankWork) -> list[int]:
        return list(work.todo[self.rank :: self.size])

    @property
    def threads(self) -> int:
        """Cores for this process."""
        return local_cores(self.local_size)

    def device(self, name: str) -> str:
        """Each process of a machine has a GPU of its own. Raises UserError where there are not enough."""
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

    def begin(self, work: RankWork) -> None:
        """Rank 0: the store is there."""
        if self.keys is not None:
            self.keys.set("work", json.dumps([work.store, work.todo]))

    def await_work(self, look: Callable[[], None]) -> RankWork:
        """The others: waits for rank 0. `look` is called now and then and may raise."""
        self.await_key("work", look)
        store, todo = json.loads(self.reach(lambda keys: keys.get("work")))
        return RankWork(store, tuple(todo))

    def done(self) -> None:
        """The others: all my shards are committed."""
        self.reach(lambda keys: keys.set(f"done {self.rank}", ""))

    def fail(self) -> None:
        """The others: I cannot go on, and have said why."""
        with suppress(RuntimeError):
            self.keys.set("failed", "")

    def look(self) -> None:
        """Raises UserError when the launcher is gone: what goes on without it would write beside the next harvest."""
        if self.keys is not None:
            self.reach(lambda keys: keys.check(["work"]))

    def reach(self, ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(self.keys)
        except RuntimeError as error:
            raise UserError(
                "the launcher, or rank 0, is gone; what it said before tells why. Run the same command again"
            ) from error

    def await_others(self, look: Callable[[], None]) -> None:
        """Rank 0: waits until all are done."""
        for rank in range(1, self.size):
            self.await_key(f"done {rank}", look)

    def await_key(self, key: str, look: Callable[[], None]) -> None:
        while not self.reach(lambda keys: keys.check([key])):
            look()
            if self.reach(lambda keys: keys.check(["failed"])):
                raise UserError("another process of this harvest has failed, and said why. Run the same command again")
            time.sleep(SECONDS_BETWEEN_LOOKS)
