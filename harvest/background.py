"""Threads that work behind the model: they write what it has computed, and come second where cores are scarce."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

NICENESS: Final = 5


def pool(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=come_second)


def come_second() -> None:
    """A matrix product on every core waits for its slowest thread: one that has to share its core holds up all. On
    Linux each thread has a priority of its own; elsewhere nothing is done."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
