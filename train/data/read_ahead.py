"""Decides which window is read next and how far reading may run ahead of training.

All decoding threads work on one window at a time: of the windows that wait, the one that training needs first.

On CUDA, reading is paced. The thread that launches the GPU's kernels needs a core and, between any two launches, the
GIL, which every decoding thread holds now and then. Without a limit, all next windows would be decoded at once as soon
as the last ones are in use: on a machine with sixteen cores, steps then took three times as long for half of the time
(docs/records/benchmarks.md). So the rows that are read and not yet used are limited to 9/8 of one window per stream.
"""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Final

SPARE: Final = 0.125
"""The share of the next windows that may be read before it would have to be."""

Priority = tuple[int, int]
"""When a window is needed: the rows that its stream gives out before it, counted from where the run began; then the
stream's number."""


class ReadAhead:
    """Counts the rows that are read and not yet used, and gives windows their turn to be read, the most urgent first.
    The limit is lifted while training waits for a window, or while a more urgent window waits for its turn."""

    def __init__(self) -> None:
        self.rows = 0
        """Rows that are read and not yet given out."""
        self.limit_rows = math.inf
        """The limit on `rows`."""
        self.lifted = False
        """Whether the limit is lifted."""
        self.closed = False
        self.waiting: list[Priority] = []
        """The windows that wait for their turn, as a heap."""
        self.reading: Priority | None = None
        """The window that is being read."""
        self.changed = threading.Condition()

    def limit(self, rows: int) -> None:
        """Sets the limit to 9/8 of `rows`, the rows in one window of every stream. Each next window is then read as
        fast as the one before is used up, and is complete before it is needed."""
        with self.changed:
            self.limit_rows = int((1 + SPARE) * rows)

    @contextmanager
    def turn(self, priority: Priority) -> Iterator[None]:
        """Waits for a window's turn to be read; the next turn begins when the block ends. Raises CancelledError after
        `close`."""
        with self.changed:
            heappush(self.waiting, priority)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or (self.reading is None and self.waiting[0] == priority))
            if self.closed:
                raise CancelledError
            self.reading = heappop(self.waiting)
        try:
            yield
        finally:
            with self.changed:
                self.reading = None
                self.changed.notify_all()

    def wait_for_rows(self, done: int, wanted: int) -> int:
        """Waits until the limit allows more rows of the window being read, and returns how many of the `wanted` ones.
        `done`: rows of it that are read. Raises CancelledError after `close`."""
        with self.changed:
            self.changed.wait_for(lambda: self.unlimited() or self.rows + done < self.limit_rows)
            if self.closed:
                raise CancelledError
            return wanted if self.unlimited() else int(min(wanted, self.limit_rows - self.rows - done))

    def unlimited(self) -> bool:
        sooner = self.reading is not None and bool(self.waiting) and self.waiting[0] < self.reading
        return self.lifted or self.closed or sooner

    def add(self, rows: int) -> None:
        """Counts the rows of a window that is complete."""
        with self.changed:
            self.rows += rows

    def take(self, rows: int) -> None:
        """Counts rows that were given out or skipped."""
        with self.changed:
            self.rows -= rows
            self.changed.notify_all()

    def lift(self, lifted: bool) -> None:
        with self.changed:
            self.lifted = lifted
            self.changed.notify_all()

    @contextmanager
    def lifted_while_waiting(self) -> Iterator[None]:
        """Lifts the limit while training waits for a window."""
        self.lift(True)
        try:
            yield
        finally:
            self.lift(False)

    def close(self) -> None:
        """Ends every wait."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
