"""Slurm's own commands: the only place that runs sbatch, squeue and scancel.

What a Slurm job runs is a list of words that a script of one line hands over unchanged. Nothing is ever written into
the text of a script, so no value can become a command.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import BusyError, UserError

SCRIPT: Final = '#!/bin/sh\nexec "$@"\n'
PATIENCE: Final = 60.0
"""Seconds that one of Slurm's commands may take."""
OVER: Final = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
"""States that a job never leaves."""
PASSING: Final = re.compile(
    "unable to contact slurm controller|connect failure|timed out|standby mode|temporarily|try again|"
    "connection refused|job submit limit|unable to resolve",
    re.IGNORECASE,
)
"""What Slurm says where the same command can succeed later."""
OWN: Final = frozenset(
    "array chdir clusters error export export-file help input job-name no-requeue open-mode output parsable quiet "
    "requeue signal test-only usage version wait wrap".split()
)
"""Options of sbatch that the service sets itself, or that would keep it from following its jobs."""
NONE: Final[Mapping[str, str]] = {}
SECRETS: Final = ("SAGSAE_TOKEN",)
"""Variables that no job gets: Slurm keeps a job's environment in files. A worker reads the token from its file."""


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says of one of its jobs."""

    id: int
    state: str
    """As squeue names it: PENDING, RUNNING, COMPLETED, …"""
    reason: str = ""
    """Why it is pending, or how it ended."""
    name: str = ""

    @property
    def live(self) -> bool:
        """Whether it runs, or may still run."""
        return self.state not in OVER

    @property
    def waiting(self) -> bool:
        return self.state == "PENDING"

    def __str__(self) -> str:
        shown = f"Slurm job {self.id}: {self.state.lower().replace('_', ' ')}"
        return f"{shown} ({self.reason})" if self.reason not in ("", "None") else shown


def check_slurm(options: Sequence[str]) -> None:
    """Raises UserError when Slurm's commands are missing, or an option of sbatch is none that can be used."""
    missing = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--launch slurm: {missing[0]} is not on the PATH. Start the service where you can submit jobs to Slurm"
        )
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        if any(own.startswith(name) for own in OWN):  # sbatch takes the beginning of a name, too
            raise UserError(f"--slurm {option[:100]}: the service sets this option of sbatch itself. Leave it out")


def submit(
    command: Sequence[str],
    name: str,
    log: Path,
    folder: Path,
    options: Sequence[str] = (),
    variables: Mapping[str, str] = NONE,
) -> int:
    """Submits a command and returns Slurm's id of the job. `variables` are added to its environment.

    Slurm starts it again after a preemption and when its node fails, sends it SIGTERM 2 minutes before its time is
    over, and appends its output to `log`. The log and the folder that it begins in have to be on a disk that the
    nodes share. Raises BusyError when Slurm cannot be reached, UserError when it refuses the job."""
    pattern = str(log).replace("%", "%%")  # Slurm replaces %j and its like
    own = {"job-name": name, "chdir": str(folder), "output": pattern, "open-mode": "append", "signal": "B:TERM@120"}
    words = [*(f"--{option.removeprefix('--')}" for option in options), "--requeue", "--parsable"]
    words += [f"--{key}={value}" for key, value in own.items()]
    said = run(["sbatch", *words, "/dev/stdin", *command], SCRIPT, variables)
    number = re.match(r"\d+", said.strip())
    if number is None:
        raise UserError(f"sbatch answered {said.strip()[:200]!r}: expected the number of a job")
    return int(number[0])


def list_jobs() -> list[SlurmJob]:
    """All jobs of this user that Slurm still knows, also those that ended in the last minutes. Raises BusyError when
    Slurm cannot be reached."""
    said = run(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%j"])
    rows = [line.strip().split("|", 3) for line in said.splitlines()]
    return [SlurmJob(int(row[0]), *row[1:]) for row in rows if len(row) == 4 and row[0].isdigit()]


def cancel(ids: Collection[int]) -> None:
    """Cancels jobs; one that has ended is no error. Raises BusyError when Slurm cannot be reached."""
    if ids:
        run(["scancel", "--quiet", *map(str, sorted(ids))])


def run(command: Sequence[str], text: str = "", variables: Mapping[str, str] = NONE) -> str:
    """The output of one of Slurm's commands. Raises BusyError where it can succeed later, else UserError."""
    try:
        done = subprocess.run(
            command, input=text, env={**environment(os.environ), **variables}, capture_output=True, text=True,
            errors="replace", timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BusyError(f"{command[0]} did not answer in {PATIENCE:.0f} s. Is Slurm's controller running?") from error
    except OSError as error:
        raise BusyError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode == 0:
        return done.stdout
    said = "; ".join(line.removeprefix(f"{command[0]}: error: ") for line in done.stderr.splitlines() if line.strip())
    if PASSING.search(said):
        raise BusyError(f"{command[0]}: {said[:400]}. Is Slurm's controller running?")
    raise UserError(f"{command[0]}: {said[:400] or f'ended with {done.returncode}'}")


def environment(whole: Mapping[str, str]) -> dict[str, str]:
    """What a job gets of the service's environment: nothing of a Slurm job that the service itself runs in."""
    return {
        name: value
        for name, value in whole.items()
        if name not in SECRETS and (not name.startswith("SLURM_") or name == "SLURM_CONF")
    }
