"""Keeps one Slurm job submitted for each job of the service's queue.

A Slurm job runs `sagsae work` for its one job, so it takes, beats and ends like any other worker. Slurm itself is the
record of what was submitted: the name of a Slurm job holds the folder of stores, the job and the number of its earlier
attempts. A service that starts again finds its Slurm jobs by their names and submits none twice.
"""

import hashlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harvest.serve.slurm import commands
from harvest.serve.slurm.commands import SlurmJob
from harvest.serve.state import State
from shared.errors import BusyError, UserError
from shared.progress import say
from shared.refusals import UnknownError
from shared.request import Job

TRIES: Final = 5
"""Slurm jobs in a row that end before their worker took the job; then the job fails."""
BACKOFF_S: Final = 10.0
"""Seconds before the second try; doubled for each further one."""
LOOK_S: Final = 10.0
"""Seconds between two looks at Slurm's queue while there is nothing to submit."""
STEP_S: Final = 1.0
"""Seconds between two looks at the service's queue."""
GRACE_S: Final = 60.0
"""Seconds in which a worker stops by itself when its job was cancelled."""
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
class FailedTries:
    """What was tried for a job's next attempt, and came to nothing."""

    words: list[str] = field(default_factory=list)
    """How each of them ended."""
    refused: bool = False
    """Whether sbatch refused the last one."""
    next: float = 0.0
    """When to try again, by the monotonic clock."""


def prefix_of(root: Path) -> str:
    """What the names of all Slurm jobs for a folder of stores begin with."""
    return f"sagsae-{hashlib.blake2b(str(root).encode(), digest_size=4).hexdigest()}-"


def submissions_in(listed: Iterable[SlurmJob], prefix: str) -> dict[int, Submission]:
    """The Slurm jobs of one folder of stores, out of all of a user's, by id."""
    names = re.compile(rf"{re.escape(prefix)}(\d{{1,15}})-(\d{{1,9}})", re.ASCII)
    named = ((job, names.fullmatch(job.name)) for job in listed)
    return {job.id: Submission(job, int(match[1]), int(match[2])) for job, match in named if match}


class SlurmLauncher:
    """Keeps Slurm's queue in step with the service's. Used by one thread."""

    def __init__(
        self,
        state: State,
        command: Callable[[int], Sequence[str]],
        options: Sequence[str] = (),
        most: int = 100,
        variables: Mapping[str, str] = commands.NONE,
        look_s: float = LOOK_S,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        """`command` returns the words that a Slurm job runs for a job, `options` are further ones of sbatch, `most` is
        the largest number of Slurm jobs at a time, and `variables` are added to their environment."""
        self.state, self.command, self.options, self.most = state, command, options, most
        self.variables = variables
        self.look_s, self.backoff_s = look_s, backoff_s
        self.prefix = prefix_of(state.root)
        self.submitted: dict[int, Submission] = {}
        """What Slurm said at the last look, and what was submitted since, by Slurm's id."""
        self.failed: defaultdict[tuple[int, int], FailedTries] = defaultdict(FailedTries)
        """By job and attempt."""
        self.closed: dict[int, float] = {}
        """Since when a live Slurm job's job is no longer open, by Slurm's id."""
        self.looked: float | None = None

    def run(self, stop: threading.Event) -> None:
        """Works until `stop`. The Slurm jobs stay, and their workers find the service when it is back."""
        trouble = ""
        while not stop.wait(STEP_S):
            try:
                self.step()
                trouble = ""
            except (BusyError, UserError, OSError) as error:
                if str(error) != trouble:
                    say(f"--launch slurm: {error}. It is tried again every second")
                trouble = str(error)

    def step(self) -> None:
        """One look at both queues, and what follows from it. Raises BusyError when Slurm cannot be reached."""
        now = time.monotonic()
        if self.looked is None or now - self.looked >= self.look_s or self.to_submit(now):
            self.look(now)
        commands.cancel(self.to_cancel(now))
        for job in self.to_submit(now):
            tries = self.failed[job.id, job.attempt]
            if len(tries.words) >= TRIES:
                self.give_up(job, tries)
            else:
                self.submit(job, tries, now)

    def live(self) -> list[Submission]:
        return [each for each in self.submitted.values() if each.slurm.live]

    def to_submit(self, now: float) -> list[Job]:
        """The due jobs for which no Slurm job runs or waits, as far as is known, and whose next try has come."""
        live = self.live()
        handled = {each.job for each in live}
        due = (job for job in self.state.due() if job.id not in handled)
        return [job for job in due if now >= self.failed[job.id, job.attempt].next][: max(0, self.most - len(live))]

    def look(self, now: float) -> None:
        """Learns from Slurm how its jobs are, and shows it beside the jobs of the queue. A Slurm job that has ended
        counts as a failed try: when its worker took the job, that has another attempt by now, or none."""
        before, self.looked = self.live(), now
        self.submitted = submissions_in(commands.list_jobs(), self.prefix)
        queue = {job.id: job for job in self.state.queue()}
        for each in before:
            after = self.submitted.get(each.slurm.id)
            if each.job in queue and (after is None or not after.slurm.live):
                ended = str(after.slurm if after else SlurmJob(each.slurm.id, "UNKNOWN"))
                self.note_failure(self.failed[each.job, each.attempt], ended, now)
                if queue[each.job].attempt == each.attempt:
                    self.note(queue[each.job], f"{ended} before its worker began")
        for each in self.live():
            if each.job in queue:
                self.state.remark(each.job, str(each.slurm))
        kept = {key: tries for key, tries in self.failed.items() if key[0] in queue and key[1] == queue[key[0]].attempt}
        self.failed = defaultdict(FailedTries, kept)

    def note_failure(self, tries: FailedTries, words: str, now: float) -> None:
        tries.words.append(words)
        tries.next = now + self.backoff_s * 2.0 ** (len(tries.words) - 1)

    def to_cancel(self, now: float) -> list[int]:
        """Slurm jobs whose job is no longer open: those that wait at once, those that run after a grace period."""
        open_jobs = {job.id for job in self.state.queue()}
        left = [each.slurm for each in self.live() if each.job not in open_jobs]
        self.closed = {job.id: self.closed.get(job.id, now) for job in left}
        return [job.id for job in left if job.waiting or now - self.closed[job.id] >= GRACE_S]

    def submit(self, job: Job, tries: FailedTries, now: float) -> None:
        """Submits one job. A refusal counts as a failed try."""
        log = self.state.log_path(job.id)
        log.parent.mkdir(exist_ok=True)
        name = f"{self.prefix}{job.id}-{job.attempt}"
        try:
            number = commands.submit(self.command(job.id), name, log, self.state.root, self.options, self.variables)
        except BusyError:
            raise
        except UserError as error:
            tries.refused = True
            self.note_failure(tries, str(error), now)
            self.note(job, str(error))
            return
        tries.refused = False
        self.submitted[number] = Submission(SlurmJob(number, "PENDING", name=name), job.id, job.attempt)
        self.note(job, f"submitted as Slurm job {number}")

    def give_up(self, job: Job, tries: FailedTries) -> None:
        """Has a job fail that no Slurm job began to work on."""
        words = f"given up after {len(tries.words)} tries in which no worker began. The last: {tries.words[-1]}"
        if not tries.refused and (tail := tail_of(self.state.log_path(job.id))):
            words = f"{words}. The job's log ends: {tail}"
        self.state.give_up(job.id, words)
        del self.failed[job.id, job.attempt]

    def note(self, job: Job, words: str) -> None:
        """Adds a line to a job's log, and shows it beside the job."""
        try:
            self.state.remark(job.id, words)
            with self.state.log_path(job.id).open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n")
        except UnknownError:
            return


def tail_of(path: Path) -> str:
    """The last lines of a log; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
