"""Progress for a person, all of it on stderr: a live bar on a terminal, else a line every 30 s.

rich is imported when something is printed: it takes a tenth of the start of a command that prints nothing here.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from shared.gate import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS_BETWEEN_LINES: Final = 30.0


hushed = False


@contextmanager
def hush() -> Iterator[None]:
    """Prints nothing inside the block, for measurements that run a command many times."""
    global hushed
    before, hushed = hushed, True
    try:
        yield
    finally:
        hushed = before


def say(message: str) -> None:
    """Prints one plain line of information."""
    if hushed:
        return
    from rich.console import Console

    with contextlib.suppress(OSError):  # work continues where its log cannot be written, on a full disk
        Console(stderr=True, highlight=False, soft_wrap=True).print(printable(message), markup=False)


@contextmanager
def progress(
    title: str, total: int, unit: str, *, shown: bool = True, below: "RenderableType | None" = None
) -> Iterator[Callable[[int, str], None]]:
    """Yields `advance(n, note)`: call it when n more units of `total` are done, with a short note. `below` is shown
    under the bar on a terminal, and redrawn as it changes."""
    if hushed or not shown:
        yield lambda n, note: None  # noqa: ARG005
    elif sys.stderr.isatty():
        with live_bar(title, total, below) as advance:
            yield advance
    else:
        yield line_writer(title, total, unit)


@contextmanager
def live_bar(title: str, total: int, below: "RenderableType | None") -> Iterator[Callable[[int, str], None]]:
    from rich import progress as parts
    from rich.console import Console

    class BarAbove(parts.Progress):
        """A progress bar with another renderable below it."""

        def get_renderables(self) -> Iterable["RenderableType"]:
            yield from super().get_renderables()
            if below is not None:
                yield below

    with BarAbove(
        parts.TextColumn("{task.description}"),
        parts.BarColumn(),
        parts.TaskProgressColumn(),
        parts.TextColumn("{task.fields[note]}", markup=False),
        parts.TimeElapsedColumn(),
        parts.TextColumn("left"),
        parts.TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda n, note: bar.update(task, advance=n, note=note)


def line_writer(title: str, total: int, unit: str) -> Callable[[int, str], None]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int, note: str) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) * (total - done) / max(1, done)
            say(f"{title}: {done:,} of {total:,} {unit} ({done / total:.0%}), {left:.0f} s left; {note}")

    return advance


def gigabytes(size: int) -> str:
    """A count of bytes in words."""
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e12:,.1f} TB"


def duration(seconds: float) -> str:
    """A time in words: `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
