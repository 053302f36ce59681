"""A command on every node of a Slurm job: `python -m harvest.serve.slurm.nodes PROCESSES SCRIPT ARGUMENT...`.

srun starts torchrun on each node, and torchrun starts the script's processes. SIGTERM does not go to srun, which would
kill them: Slurm passes it to the processes themselves, which commit and end.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from shared.errors import Interrupted

PACKAGES: Final = str(Path(__file__).resolve().parents[3])
PR_SET_PDEATHSIG: Final = 1
PORTS: Final = range(20_000, 30_000)
"""Where the processes meet. Slurm's number of the job decides which port, so that two jobs of a node seldom collide."""


def is_spread(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of a Slurm job that has several nodes."""
    nodes = environment.get("SLURM_JOB_NUM_NODES", "")
    return nodes.isdecimal() and int(nodes) > 1 and environment.get("SLURM_JOB_ID", "").isdecimal()


def on_all_nodes(processes: int, script: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a script in so many processes on each node."""
    return [sys.executable, "-P", "-m", "harvest.serve.slurm.nodes", str(processes), script, *arguments]


def srun_command(environment: Mapping[str, str], host: str, processes: int, script: Sequence[str]) -> list[str]:
    """srun, torchrun and the script. `host` is this node, the first one, where all processes meet."""
    job = environment["SLURM_JOB_ID"]
    meeting = f"--rdzv-endpoint={host}:{PORTS[int(job) % len(PORTS)]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", meeting, f"--rdzv-id={job}"]
    sizes = [f"--nnodes={environment['SLURM_JOB_NUM_NODES']}", f"--nproc-per-node={processes}"]
    return ["srun", "--ntasks-per-node=1", *torchrun, *sizes, *script]


def main(words: Sequence[str]) -> int:
    """Returns the script's exit code; 130 when it was stopped by a signal."""
    job = os.environ["SLURM_JOB_ID"]
    command = srun_command(os.environ, os.uname().nodename, int(words[0]), words[1:])
    paths = [PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signal module's signature)
        nonlocal stopped
        if not stopped:
            stopped = True
            subprocess.Popen(["scancel", "--quiet", "--signal=TERM", job])

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = subprocess.Popen(command, env=environment, preexec_fn=end_with_parent).wait()
    return Interrupted.exit_code if stopped and code else code


def end_with_parent() -> None:
    """Run in srun's process before srun: it ends when this process does, and Slurm then ends the step."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
