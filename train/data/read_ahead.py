"""Which window is read next, and how far reading is ahead of training.

One window is read at a time, by all threads that decode: of those that wait for it the one that training needs first.

For a GPU, reading goes on evenly. The thread that gives the GPU its work needs a core, and Python's interpreter between
any two orders, which every thread that decodes takes now and then. The next windows can all be read at once when the
last have been entered: on one machine with sixteen cores steps then took three times as long for half of the time
(docs/benchmarks.md). So what is read is kept a little ahead of what is needed, and no more.
"""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Final

SPARE: Final = 0.125
"""Part of the next windows that is read before it would have to be."""

Needed = tuple[int, int]
"""When a window is: after how many rows that a stream gives out, from where the run began; the stream's number."""


class ReadAhead:
    """Rows that are read and not yet given out, and whose turn it is. Nobody keeps pace while training waits for a
    window, or another window is needed sooner."""

    def __init__(self) -> None:
        self.rows = 0
        self.most = math.inf
        self.lifted = False
        """Whether there is no limit now."""
        self.closed = False
        self.waiting: list[Needed] = []
        """A heap."""
        self.now: Needed | None = None
        """Whose turn it is."""
        self.changed = threading.Condition()

    def limit(self, rows: int) -> None:
        """`rows` are in one window of every stream. The windows in use are read, and the next ones as far as those are
        used up: they are whole before they are entered."""
        with self.changed:
            self.most = int((1 + SPARE) * rows)

    @contextmanager
    def turn(self, needed: Needed) -> Iterator[None]:
        """Waits for the turn to read a window. Raises CancelledError when nothing is read any more."""
        with self.changed:
            heappush(self.waiting, needed)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or (self.now is None and self.waiting[0] == needed))
            if self.closed:
                raise CancelledError
            self.now = heappop(self.waiting)
        try:
            yield
        finally:
            with self.changed:
                self.now = None
                self.changed.notify_all()

    def room(self, reading: int, wanted: int) -> int:
        """Waits until more may be read of a window of which `reading` rows are; gives for how many of the `wanted`
        ones there is room. Raises CancelledError when nothing is read any more."""
        with self.changed:
            self.changed.wait_for(lambda: self.hurries() or self.rows + reading < self.most)
            if self.closed:
                raise CancelledError
            return wanted if self.hurries() else int(min(wanted, self.most - self.rows - reading))

    def hurries(self) -> bool:
        sooner = self.now is not None and bool(self.waiting) and self.waiting[0] < self.now
        return self.lifted or self.closed or sooner

    def read(self, rows: int) -> None:
        """A window is complete."""
        with self.changed:
            self.rows += rows

    def take(self, rows: int) -> None:
        """Rows are given out, or left out."""
        with self.changed:
            self.rows -= rows
            self.changed.notify_all()

    def lift(self, lifted: bool) -> None:
        with self.changed:
            self.lifted = lifted
            self.changed.notify_all()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Training waits for a window."""
        self.lift(True)
        try:
            yield
        finally:
            self.lift(False)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
