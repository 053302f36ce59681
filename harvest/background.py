"""Threads that write in the background what the model has computed; the model has priority where cores are scarce."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

NICENESS: Final = 5


def pool(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=lower_priority)


def lower_priority() -> None:
    """Lowers this thread's priority. A matrix product on every core waits for its slowest thread, so one thread that
    shares its core delays all. Linux has a priority per thread; other systems are left alone."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
