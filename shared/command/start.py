"""Starting a command: quickly, or in several processes on this machine, as `--processes` asks."""

import gc
import logging
import os
import sys
import uuid
from typing import NoReturn

from shared.device import share_cores
from shared.errors import Interrupted
from shared.launch import launched


def start_light() -> None:
    """Called first by a command that may be over in less than a second and multiplies no large matrices. OpenBLAS
    starts no threads, which would wait for work at full speed, and pydantic does not search the installed packages for
    plugins; what the user set stays. Garbage is collected a fourteenth as often, because imports make hardly any."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.set_threshold(10_000)


def in_processes(processes: int, script: str) -> None:
    """Continues where this is one process alone or one of several; else starts `script` with this command's arguments
    in several processes and exits with the code of the first that failed. Raises Interrupted and UserError."""
    if processes > 1 and not launched(processes):
        launch(processes, script)


def launch(processes: int, script: str) -> NoReturn:
    """Runs this same command in several processes and exits with the code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    share_cores(processes)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in after a signal
    for name in (name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes speak for themselves
    try:
        torchrun([*on_this_machine(), f"--nproc-per-node={processes}", script, *sys.argv[1:]])
    except ChildFailedError as error:
        sys.exit(max(1, error.get_first_failure()[1].exitcode))
    except SignalException as error:
        raise Interrupted("stopped. To continue, run the same command again") from error
    sys.exit(0)


def on_this_machine() -> list[str]:
    """torchrun's --standalone, without asking for the machine's own name: it need not resolve."""
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid.uuid4()}"]
    return ["--nnodes=1", *meeting, "--local-addr=127.0.0.1"]
