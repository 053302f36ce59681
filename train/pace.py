"""How many threads decode windows for a GPU: as few as keep up with training.

The thread that gives the GPU its work needs a core, and the interpreter between any two orders. Sixteen threads that
decoded on sixteen cores took it as long again or more for a step (docs/benchmarks.md), and for nothing: they were done
long before their windows were needed.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TOO_BUSY, TOO_IDLE = 0.9, 0.7
"""Shares of the time that reading may take of a round before there are more threads, or fewer."""
GROWTH = 1.5
START = 2
"""Rounds at the beginning that say nothing: all windows are wanted at once."""


class Pace:
    """Looks at a round of windows, one of every stream, after another."""

    def __init__(self, most: int, streams: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.streams, self.clock = most, streams, clock
        self.threads = -(-most // 2)
        self.rounds = self.windows = 0
        self.busy, self.since = 0.0, clock()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A window is being read."""
        began = self.clock()
        yield
        now = self.clock()
        self.busy += now - began
        self.windows += 1
        if self.windows == self.streams:
            if self.rounds >= START:
                self.threads = self.after(self.busy / (now - self.since))
            self.rounds, self.windows, self.busy, self.since = self.rounds + 1, 0, 0.0, now

    def after(self, share: float) -> int:
        """The number of threads after a round that was spent reading for this share of its time: who waits for a window
        has it read all the time."""
        if share > TOO_BUSY:
            return min(self.most, math.ceil(GROWTH * self.threads))
        return max(1, self.threads - 1) if share < TOO_IDLE else self.threads
