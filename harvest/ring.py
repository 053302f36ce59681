"""Memory slots that circulate: the model fills them, the writer empties them and gives them back."""

import queue
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Slot = TypeVar("Slot")


class Ring(Generic[Slot]):
    """A fixed number of slots, each made at its first use. `take` waits for the writer, and is the only place where the
    writer holds the model up."""

    def __init__(self, make: Callable[[], Slot], slots: int, work: Callable[[], None] = lambda: None) -> None:
        """`work` returns when the model has finished its queued work; that time does not count as waiting."""
        self.make, self.work = make, work
        self.waited = 0.0
        """Seconds in which no slot was free."""
        self.free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        for _ in range(slots):
            self.free.put(None)

    def take(self, check_stop: Callable[[], None]) -> Slot:
        """Returns a free slot. `check_stop` is called now and then while none is free, and may raise."""
        if self.free.empty():
            self.work()
        while True:
            check_stop()
            started = time.monotonic()
            try:
                slot = self.free.get(timeout=0.2)
            except queue.Empty:
                continue
            finally:
                self.waited += time.monotonic() - started
            return self.make() if slot is None else slot

    def give_back(self, slot: Slot) -> None:
        self.free.put(slot)
