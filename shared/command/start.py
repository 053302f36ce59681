"""Starting a command: quickly, or in several processes on this machine, as `--processes` asks. When one of them is
killed, all are started again: a harvest continues from its committed shards, a training run from its newest
checkpoint."""

import gc
import logging
import os
import signal
import sys
import uuid
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from shared.device import share_cores
from shared.errors import BusyError, Interrupted, LostError
from shared.launch import RESTARTED, launched

MAX_RESTARTS: Final = 3
"""How often the processes are started again in one command."""
KILLED: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
"""Signals that end a process from outside, or by a fault of a library. Whatever else ends one would do so again."""
AFTERWARDS: Final = (LostError.exit_code, Interrupted.exit_code, -signal.SIGTERM)
"""How processes end because another one did."""


def start_light() -> None:
    """Called first by a command that may be over in less than a second and multiplies no large matrices. OpenBLAS
    starts no threads, which would wait for work at full speed, and pydantic does not search the installed packages for
    plugins; what the user set stays. Garbage is collected a fourteenth as often, because imports make hardly any."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.set_threshold(10_000)


def in_processes(processes: int, script: str) -> None:
    """Continues where this is one process alone or one of several; else starts `script` with this command's arguments
    in several processes and exits with the code of the first that failed. Raises Interrupted and UserError, BusyError
    when a process was killed again and again."""
    if processes > 1 and not launched(processes):
        launch(processes, script)


def launch(processes: int, script: str) -> NoReturn:
    """Runs this same command in several processes and exits with the code of the first that failed. After a process was
    killed, all are started again, at most MAX_RESTARTS times."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from shared.progress import say

    share_cores(processes)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in after a signal
    began = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        for restarts in range(MAX_RESTARTS + 1):
            code = run_processes(processes, script)
            if -code not in KILLED:
                sys.exit(code if code >= 0 else 128 - code)
            what = f"one of the {processes} processes was killed ({signal.Signals(-code).name})"
            if restarts < MAX_RESTARTS:
                say(f"{what}: all are started again and continue ({restarts + 1} of at most {MAX_RESTARTS} times)")
                os.environ[RESTARTED] = began
    except SignalException as error:
        raise Interrupted("stopped. To continue, run the same command again") from error
    raise BusyError(
        f"{what}, {MAX_RESTARTS + 1} times in all. Often there is too little memory: look at the system's log, or "
        "start fewer --processes. To continue, run the same command again"
    )


def run_processes(processes: int, script: str) -> int:
    """Runs this command's arguments in several processes, and ends all when one fails. Returns the exit code of the one
    that failed for a reason of its own, a negative one for a signal; 0 when all succeeded."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in (name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes speak for themselves
    try:
        torchrun([*on_this_machine(), f"--nproc-per-node={processes}", script, *sys.argv[1:]])
    except ChildFailedError as error:
        return reason(error.failures)
    return 0


def reason(failures: dict[int, Any]) -> int:
    """The exit code that explains the others: of the process that failed first, among those that did not end because
    of another one."""
    first = min(failures.values(), key=lambda failure: (failure.exitcode in AFTERWARDS, failure.timestamp))
    return int(first.exitcode)


def on_this_machine() -> list[str]:
    """torchrun's --standalone, without asking for the machine's own name: it need not resolve."""
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid.uuid4()}"]
    return ["--nnodes=1", *meeting, "--local-addr=127.0.0.1"]
