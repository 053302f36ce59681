"""A worker: takes jobs from the service, runs the command of each, says how far it is and how it ended.

It may die at any moment. Its command dies with it, the service hears nothing more and gives the job to another worker,
whose command resumes the store. When it was only stopped for a while and wakes, the service refuses its next beat; then
it ends its command, and the store is as whole as after any interruption.
"""

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, Protocol, runtime_checkable

from harvest.serve.slurm.nodes import is_spread, on_all_nodes
from harvest.serve.work.machine import look
from harvest.serve.work.process import PROGRAM, Command, JobFiles, StoreGrowth
from shared.config import WorkConfig
from shared.errors import BusyError, Interrupted, UserError
from shared.progress import say
from shared.refusals import NotYoursError
from shared.request import Job, TakenJob, WorkerInfo
from shared.service import Client

WAIT_S: Final = 25.0
"""Seconds for which the service holds a request for a job back."""
AGAIN_S: Final = 2.0
"""Seconds between two tries while the service is away."""
LOOK_S: Final = 0.5
"""Seconds between two looks at a running command."""
STOPPED: Final = 130
DAMAGED: Final = 3
PASSING: Final = 75
PATIENCE_S: Final = 300.0
"""Seconds that a worker for one job waits for it: until an earlier attempt has lapsed, or the service is back."""
OPEN: Final = ("queued", "running", "verifying")


@runtime_checkable
class WorkSource(Protocol):
    """Who gives jobs: the client of a service, or, in tests, its state."""

    def take(self, worker: WorkerInfo, wait: float, job: int | None = None) -> TakenJob | None:
        """The next job, or only this one; None when there was none for `wait` seconds. Raises BusyError while the
        service is away."""
        ...

    def job(self, job: int) -> Job:
        """A job as it is now. Raises BusyError while the service is away."""
        ...

    def beat(self, job: int, attempt: int, rows: int, rate: float | None, note: str, verifying: bool) -> bool:
        """Returns whether to continue. Raises NotYoursError when the attempt is another worker's."""
        ...

    def end(self, job: int, attempt: int, code: int, words: str) -> object:
        """Raises NotYoursError when the attempt is another worker's."""
        ...


class Worker:
    """Runs one job after another, in the main thread of its process."""

    def __init__(self, source: WorkSource, config: WorkConfig, about: WorkerInfo) -> None:
        self.source, self.config, self.about = source, config, about
        self.root = config.root.resolve()
        self.spread = is_spread(os.environ)
        """Whether a harvest runs on every node of a Slurm job, of which this is the first."""
        self.stopping = False
        self.idle = False
        self.away = False
        self.failed = False
        """Whether the last command failed."""
        self.since = time.monotonic()
        """When this worker last had a job."""

    def run(self) -> None:
        """Works until SIGTERM or SIGINT; then the running command commits what it has, and the job is given back. A
        worker for one job ends with that. Raises Interrupted, and UserError when the service refuses this worker."""
        with self.signals():
            while not self.stopping:
                taken = self.next()
                if taken is not None:
                    self.do(taken)
                if self.config.job is not None and self.is_over(self.config.job, taken is not None):
                    return
        raise Interrupted("the worker was stopped; its job, if it had one, was given back")

    def is_over(self, job: int, worked: bool) -> bool:
        """Whether a worker for one job has nothing more to do: the job was closed, or it failed here and had better be
        tried elsewhere, or it could not be taken for a while."""
        now = time.monotonic()
        if worked and self.failed:
            return True
        try:
            if self.source.job(job).state not in OPEN:
                return True
        except BusyError as error:
            self.say_away(error)
        self.since = now if worked else self.since
        return now - self.since > PATIENCE_S

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While it waits for a job, a signal ends the worker at once; while a command runs, when that has ended."""

        def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signal module's signature)
            self.stopping = True
            if self.idle:
                raise Interrupted("the worker was stopped")

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def next(self) -> TakenJob | None:
        """Waits for a job; None when there is none yet, or the service is away."""
        try:
            self.idle = True
            if self.stopping:
                return None
            only = {} if self.config.job is None else {"job": self.config.job}
            taken = self.source.take(self.about, WAIT_S, **only)
            self.idle = self.away = False
        except BusyError as error:
            self.say_away(error)
            time.sleep(AGAIN_S)
            return None
        finally:
            self.idle = False
        return taken

    def say_away(self, error: Exception) -> None:
        if not self.away:
            say(f"{error}. The worker waits until the service is back")
        self.away = True

    # one job
    def do(self, taken: TakenJob) -> None:
        """Runs the commands of a job, and says how they ended."""
        files = JobFiles(self.root, taken.job)
        say(f"job {taken.job}, attempt {taken.attempt}: {taken.action} of {taken.store}")
        try:
            code, words = self.commands(taken, files)
        except NotYoursError:
            self.failed = True
            say(f"job {taken.job}: is another worker's by now. Its command was ended; the store stays as it is")
            return
        except (UserError, OSError) as error:  # of this machine: a full disk, or another folder than the service's
            code, words = getattr(error, "exit_code", PASSING), str(error)
            say(f"job {taken.job}: {words}")
        self.failed = code != 0
        self.give_back(taken, STOPPED if self.stopping and code < 0 else code, words)

    def commands(self, taken: TakenJob, files: JobFiles) -> tuple[int, str]:
        """Repairs where that was asked, makes the store, checks it. Returns the exit code of the first that failed, and
        its last words."""
        if not files.log.exists():
            raise UserError(
                f"--root {self.root}: is not the folder in which the service works (it has no {files.log.name}). Start "
                "this worker with the service's --root, on a disk that both see"
            )
        folder = str(self.root / taken.store)
        check = ["store", "verify", folder, "--quick"]
        if taken.repair:
            code, words = self.command(taken, files, [*check, "--repair"], verifying=True)
            if code not in (0, DAMAGED):
                return code, words
        code, words = self.command(taken, files, self.making(taken, files), verifying=False)
        return (code, words) if code else self.command(taken, files, check, verifying=True)

    def making(self, taken: TakenJob, files: JobFiles) -> list[str]:
        """The command that makes a store. Its values stand in a file, not in the command."""
        if taken.command == "store recode":
            source, codec = (str(taken.settings[name]) for name in ("source", "codec"))
            return ["store", "recode", str(self.root / source), str(self.root / taken.store), f"--codec={codec}"]
        asked = taken.settings.get("device")
        device = self.config.device if asked in (None, "auto") else str(asked)
        values = {**taken.settings, "out": str(self.root), "name": taken.store, "device": device}
        command = ["harvest", f"--config={files.write_settings(values)}"]
        return [*command, f"--processes={self.processes}"] if self.processes > 1 and not self.spread else command

    @property
    def processes(self) -> int:
        return self.config.processes or (self.config.gpus or "").count(",") + 1

    def command(self, taken: TakenJob, files: JobFiles, words: list[str], verifying: bool) -> tuple[int, str]:
        """Runs a command of the job, beating meanwhile. Returns its exit code and last words. Raises NotYoursError
        after it was ended."""
        growth = StoreGrowth(self.root / taken.store)
        self.beat(taken, growth, "", verifying)
        spread = self.spread and words[0] == "harvest"
        program = on_all_nodes(self.processes) if spread else PROGRAM
        killed = self.processes == 1 and not spread
        command = Command(words, files, gpu_environment(self.config), killed, program)
        try:
            self.watch(taken, command, growth, verifying)
        except BaseException:
            self.finish(command)
            raise
        growth.look()
        return command.code or 0, command.words()

    def watch(self, taken: TakenJob, command: Command, growth: StoreGrowth, verifying: bool) -> None:
        """Beats until the command has ended. It is ended when this worker or its job was stopped."""
        goes_on, last = True, time.monotonic()
        while command.wait(LOOK_S) is None:
            if self.stopping or not goes_on:
                command.stop()
            if time.monotonic() - last >= taken.beat_s:
                last = time.monotonic()
                command.files.rotate()
                growth.look()
                goes_on = self.beat(taken, growth, command.words(), verifying) and goes_on

    def beat(self, taken: TakenJob, growth: StoreGrowth, note: str, verifying: bool) -> bool:
        """Returns whether to continue. Work continues while the service is away."""
        try:
            going = self.source.beat(taken.job, taken.attempt, growth.rows, growth.rate, note[:500], verifying)
        except BusyError as error:
            self.say_away(error)
            return True
        self.away = False
        return going

    def finish(self, command: Command) -> None:
        """Ends a command that has lost its job: it commits what it has, or is killed."""
        while command.code is None:
            command.stop()
            command.wait(LOOK_S)

    def give_back(self, taken: TakenJob, code: int, words: str) -> None:
        """Says how an attempt ended, as soon as the service is there."""
        while True:
            try:
                self.source.end(taken.job, taken.attempt, max(-256, min(code, 255)), words[-4000:])
            except NotYoursError:
                say(f"job {taken.job}: is another worker's by now, or was ended")
            except BusyError as error:
                self.say_away(error)
                if not self.stopping:
                    time.sleep(AGAIN_S)
                    continue
            return


def gpu_environment(config: WorkConfig) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": config.gpus} if config.gpus else {}


def describe_worker(config: WorkConfig) -> WorkerInfo:
    """What this worker says of itself. Raises UserError when its device is not here."""
    name = config.name or f"{socket.gethostname()[:40]}:{os.getpid()}:{secrets.token_hex(3)}"
    if config.device == "cpu":  # nothing to find out, and nothing to import
        return WorkerInfo(name=name, memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    found: Mapping[str, Any] = look(config.device, gpu_environment(config))
    return WorkerInfo(name=name, **found)


def work(config: WorkConfig, started: Callable[[dict[str, Any]], None]) -> None:
    """Works for a service until it is stopped, or its only job is over. `started` is called with the worker's name, the
    service and the folder. Raises Interrupted when it was stopped; UserError when the service refuses it."""
    if not config.root.is_dir():
        raise UserError(f"--root {config.root}: no such folder. Give the folder in which the service works")
    with Client(config.service) as client:
        jobs = "jobs" if config.job is None else f"job {config.job}"
        say(f"worker: waits for {jobs} of {client.url}, in {config.root.resolve()}")
        about = describe_worker(config)
        started({"worker": about.name, "service": client.url, "root": str(config.root.resolve())})
        Worker(client, config, about).run()
