"""`--launch slurm`: one Slurm job for each job of the queue.

A Slurm job runs `sagsae work` for this one job, so it takes, beats and ends like any other worker. Slurm itself is the
record of what was submitted: a Slurm job's name holds the folder of stores, the job and how many attempts it had had.
A service that starts again finds its jobs by their names and submits none twice.
"""

import hashlib
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harvest.serve.slurm import commands
from harvest.serve.slurm.commands import SlurmJob
from harvest.serve.state import State
from shared.errors import BusyError, UserError
from shared.progress import say
from shared.refusals import RefusedError
from shared.request import Job, WorkerInfo

CLI: Final = Path(__file__).resolve().parents[3] / "cli.py"
TRIES: Final = 5
"""Slurm jobs in a row that end before a worker took the job; then the job fails."""
BACKOFF_S: Final = 10.0
"""Seconds before the second try; doubled for each further one."""
LOOK_S: Final = 10.0
"""Seconds between two looks at Slurm while nothing has to be submitted."""
GRACE_S: Final = 60.0
"""Seconds in which a worker ends by itself when its job was cancelled."""
VIEW_GRACE_S: Final = 15.0
"""Seconds for which a job that loads no model is left to the service's own planner."""
TAIL: Final = 1500
"""Bytes of a job's log that its error repeats."""


@dataclass(frozen=True)
class Submission:
    """A Slurm job of this service."""

    slurm: SlurmJob
    job: int
    attempt: int
    """Attempts that the job had had when this was submitted."""


@dataclass
class SlurmTries:
    """What was tried for one attempt of a job, and came to nothing."""

    ended: dict[int, SlurmJob] = field(default_factory=dict)
    """Slurm jobs that ended before a worker took the job, by id."""
    refused: list[str] = field(default_factory=list)
    """What sbatch said instead of taking the job."""
    next: float = 0.0
    """When to try again, by the monotonic clock."""

    @property
    def count(self) -> int:
        return len(self.ended) + len(self.refused)

    def last_words(self) -> str:
        return self.refused[-1] if self.refused else str(self.ended[max(self.ended)])


def prefix_of(root: Path) -> str:
    """What the names of all Slurm jobs for a folder of stores begin with."""
    return f"sagsae-{hashlib.blake2b(str(root).encode(), digest_size=4).hexdigest()}-"


def submissions_in(found: Iterable[SlurmJob], prefix: str) -> list[Submission]:
    """The Slurm jobs of one folder of stores, out of all of a user's."""
    named = [(job, re.fullmatch(rf"{re.escape(prefix)}(\d{{1,15}})-(\d{{1,9}})", job.name)) for job in found]
    return [Submission(job, int(match[1]), int(match[2])) for job, match in named if match]


def worker_command(url: str, job: int, more: Sequence[str] = ()) -> list[str]:
    """What a Slurm job runs. No token is in it: SAGSAE_TOKEN_FILE says where it is."""
    return [sys.executable, str(CLI), "work", f"--service={url}", f"--job={job}", *more]


class SlurmLauncher:
    """Keeps Slurm's queue in step with the service's. Used by one thread."""

    def __init__(
        self,
        state: State,
        root: Path,
        command: Callable[[int], Sequence[str]],
        options: Sequence[str] = (),
        most: int = 100,
        *,
        look_s: float = LOOK_S,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        """`command` gives the words that a Slurm job runs for a job; `most` is the largest number of Slurm jobs at a
        time."""
        self.state, self.root, self.command, self.options, self.most = state, root, command, options, most
        self.look_s, self.backoff_s = look_s, backoff_s
        self.prefix = prefix_of(root)
        self.tries: defaultdict[tuple[int, int], SlurmTries] = defaultdict(SlurmTries)
        """By job and attempt."""
        self.found: list[Submission] = []
        self.looked = -1e9
        self.closed: dict[int, float] = {}
        """Since when the job of a running Slurm job is no longer open, by the Slurm job's id."""
        self.trouble = ""

    def run(self, stop: threading.Event, every: float = 1.0) -> None:
        """Works until `stop`. Slurm jobs stay: their workers find the service when it is back."""
        while not stop.wait(every):
            try:
                self.step()
                self.trouble = ""
            except (BusyError, UserError) as error:
                if str(error) != self.trouble:
                    say(f"{error}. Trying again")
                self.trouble = str(error)

    def step(self) -> None:
        """One look at both queues, and what follows from it. Raises BusyError when Slurm cannot be reached."""
        now = time.monotonic()
        queue = self.state.queue()
        if self.waiting(queue) or now - self.looked >= self.look_s:
            self.look(now)
        open_jobs = {job.id for job in queue}
        commands.cancel(self.to_cancel(open_jobs, now))
        for job in self.waiting(queue):
            tries = self.tries[job.id, job.attempt]
            if tries.count >= TRIES:
                self.give_up(job, tries)
            elif now >= tries.next and sum(each.slurm.live for each in self.found) < self.most:
                self.submit(job, tries, now)
        self.tries = defaultdict(SlurmTries, {key: it for key, it in self.tries.items() if key[0] in open_jobs})

    def waiting(self, queue: Sequence[Job]) -> list[Job]:
        """Queued jobs that no Slurm job works or waits for, as far as is known."""
        live = {each.job for each in self.found if each.slurm.live}
        return [job for job in queue if job.state == "queued" and job.id not in live and not is_left_to_planner(job)]

    def look(self, now: float) -> None:
        """Learns from Slurm which of its jobs are ours, and which ended for nothing."""
        self.found = submissions_in(commands.list_jobs(), self.prefix)
        self.looked = now
        for each in self.found:
            tries = self.tries[each.job, each.attempt]
            if not each.slurm.live and each.slurm.id not in tries.ended:
                tries.ended[each.slurm.id] = each.slurm
                tries.next = now + self.backoff_s * 2 ** (tries.count - 1)

    def to_cancel(self, open_jobs: set[int], now: float) -> list[int]:
        """Slurm jobs whose job is no longer open: those that wait at once, those that run after a grace period."""
        left = [each.slurm for each in self.found if each.slurm.live and each.job not in open_jobs]
        self.closed = {job.id: self.closed.get(job.id, now) for job in left}
        return [job.id for job in left if job.waiting or now - self.closed[job.id] > GRACE_S]

    def submit(self, job: Job, tries: SlurmTries, now: float) -> None:
        """Submits one job. A refusal counts as a try."""
        log = self.state.log_path(job.id)
        log.parent.mkdir(parents=True, exist_ok=True)
        name = f"{self.prefix}{job.id}-{job.attempt}"
        try:
            number = commands.submit(self.command(job.id), name, log, self.root, self.options)
        except BusyError:
            raise
        except UserError as error:
            tries.refused.append(str(error))
            tries.next = now + self.backoff_s * 2 ** (tries.count - 1)
            self.note(job, str(error))
            return
        self.found.append(Submission(SlurmJob(number, "PENDING", name=name), job.id, job.attempt))
        self.note(job, f"submitted as Slurm job {number}")

    def give_up(self, job: Job, tries: SlurmTries) -> None:
        """Has a job fail that no Slurm job began to work on."""
        words = f"no worker began in {tries.count} Slurm jobs. The last: {tries.last_words()}"
        if not tries.refused and (tail := tail_of(self.state.log_path(job.id))):
            words = f"{words}. The job's log ends: {tail}"
        taken = self.state.take(WorkerInfo(name="slurm"), job.id)
        if taken is not None:
            try:
                self.state.end(taken.job, taken.attempt, UserError.exit_code, words)
            except RefusedError:
                return  # cancelled meanwhile

    def note(self, job: Job, words: str) -> None:
        """Adds a line to a job's log."""
        with self.state.log_path(job.id).open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n")


def is_left_to_planner(job: Job) -> bool:
    """Whether the service itself makes this store, without a model."""
    return job.action == "view" and time.time() - job.created < VIEW_GRACE_S


def tail_of(path: Path) -> str:
    """The last lines of a log; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
