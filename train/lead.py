"""How far the reading of windows is ahead of training, so that for a GPU it goes on evenly.

The thread that gives the GPU its work needs a core, and Python's interpreter between any two orders, which every thread
that decodes takes now and then. The next windows can all be read at once when the last have been entered: on one
machine with sixteen cores steps then took three times as long for half of the time (docs/benchmarks.md). So what is
read is kept a little ahead of what is needed, and no more.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

SPARE: Final = 0.125
"""Part of the next windows that is read before it would have to be."""


class Lead:
    """Rows that are read and not yet given out. Nobody waits here while training waits for a window."""

    def __init__(self) -> None:
        self.rows = 0
        self.most = 0
        self.lifted = False
        """Whether there is no limit now."""
        self.changed = threading.Condition()

    def limit(self, rows: int) -> None:
        """`rows` are in one window of every stream. The windows in use are read, and the next ones as far as those are
        used up: they are whole before they are entered."""
        with self.changed:
            self.most = int((1 + SPARE) * rows)

    def room(self, reading: int, wanted: int) -> int:
        """Waits until more may be read of a window of which `reading` rows are; gives for how many of the `wanted`
        ones there is room."""
        with self.changed:
            self.changed.wait_for(lambda: self.lifted or self.rows + reading < self.most)
            return wanted if self.lifted else min(wanted, self.most - self.rows - reading)

    def read(self, rows: int) -> None:
        """A window is complete."""
        with self.changed:
            self.rows += rows

    def take(self, rows: int) -> None:
        """Rows are given out, or left out."""
        with self.changed:
            self.rows -= rows
            self.changed.notify_all()

    def lift(self, lifted: bool = True) -> None:
        with self.changed:
            self.lifted = lifted
            self.changed.notify_all()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Training waits for a window."""
        self.lift()
        try:
            yield
        finally:
            self.lift(False)
