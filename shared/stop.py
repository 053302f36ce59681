"""Turns SIGINT and SIGTERM into a question that a loop asks between steps, so that it stops in a good state."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

ECHO: Final = 5.0
"""Seconds in which another signal to one of several processes counts as the first one again: a job manager signals all
of them, and then their launcher passes its own signal on."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether to stop. A second signal has its usual, immediate effect."""
    asked, first = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals belong to the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signal module's signature)
        nonlocal first
        if not asked.is_set():
            first = time.monotonic()
            asked.set()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print is not safe here
        elif "RANK" not in os.environ or time.monotonic() - first > ECHO:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
