"""A command on every node of a Slurm job: `python -m harvest.serve.slurm.nodes PROCESSES COMMAND ARGUMENT...`.

srun starts torchrun on each node, and torchrun starts the command's processes. SIGTERM does not go to srun, which would
kill them: Slurm passes it to the processes themselves, which commit and end.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from shared.command.parent import end_with_parent
from shared.errors import Interrupted

CLI: Final = str(Path(__file__).resolve().parents[3] / "cli.py")
PACKAGES: Final = str(Path(__file__).resolve().parents[3])
PORTS: Final = range(20_000, 30_000)
"""Where the processes meet. Slurm's number of the job decides which port, so that two jobs of a node seldom collide."""


def is_spread(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of a Slurm job that has several nodes."""
    nodes = environment.get("SLURM_JOB_NUM_NODES", "")
    return nodes.isdecimal() and int(nodes) > 1 and environment.get("SLURM_JOB_ID", "").isdecimal()


def on_all_nodes(processes: int) -> list[str]:
    """What runs a command of ours in so many processes on each node, when the command's words follow it."""
    return [sys.executable, "-P", "-m", "harvest.serve.slurm.nodes", str(processes)]


def srun_command(environment: Mapping[str, str], host: str, processes: int, words: Sequence[str]) -> list[str]:
    """srun, torchrun and a command of ours. `host` is this node, the first one, where all processes meet."""
    job = environment["SLURM_JOB_ID"]
    meeting = f"--rdzv-endpoint={host}:{PORTS[int(job) % len(PORTS)]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", meeting, f"--rdzv-id={job}"]
    sizes = [f"--nnodes={environment['SLURM_JOB_NUM_NODES']}", f"--nproc-per-node={processes}"]
    return ["srun", "--ntasks-per-node=1", *torchrun, *sizes, CLI, *words]


def main(words: Sequence[str]) -> int:
    """Returns the command's exit code; 130 when it was stopped by a signal."""
    end_with_parent()
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
    code = subprocess.Popen(command, env=environment).wait()
    return Interrupted.exit_code if stopped and code else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
