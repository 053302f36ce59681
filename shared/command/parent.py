"""A child process that ends when its parent does, however the parent ended.

The parent puts its process id, and perhaps a signal (`123/9`), into SAGSAE_PARENT. On Linux the kernel sends the signal
when the parent's thread that made the child is gone; elsewhere a thread looks for it.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from typing import Final

PARENT: Final = "SAGSAE_PARENT"
LOOK_S: Final = 1.0
PR_SET_PDEATHSIG: Final = 1


def parent_variable(number: int = signal.SIGTERM) -> dict[str, str]:
    """The variable for the environment of a child of this process."""
    return {PARENT: f"{os.getpid()}/{int(number)}"}


def end_with_parent() -> None:
    """Called at the start of a command: arranges that it ends with the parent that SAGSAE_PARENT names. Its children do
    not inherit that."""
    pid, _, number = os.environ.pop(PARENT, "").partition("/")
    if not (pid.isascii() and pid.isdecimal()):
        return
    death = int(number) if number in ("9", "15") else int(signal.SIGTERM)
    watched = False
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            watched = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death) == 0
    if os.getppid() != int(pid):  # it ended before
        os.kill(os.getpid(), death)
    if not watched:
        threading.Thread(target=watch, args=(int(pid), death), daemon=True).start()


def watch(parent: int, death: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), death)
