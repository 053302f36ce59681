"""The commands of a worker: their settings, logs and ends; and children that end with their parent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT
from support.processes import until
from support.serving.cache import SHARD, FakeHarvest, spec_of

from harvest.serve.work import process as processes
from harvest.serve.work import worker as workers
from harvest.serve.work.process import Command, JobFiles, StoreGrowth, as_toml, last_line
from harvest.serve.work.worker import Worker, describe_worker, gpu_environment
from shared.command.parent import parent_variable
from shared.config import HarvestConfig, WorkConfig
from shared.errors import BusyError, Interrupted, UserError
from shared.refusals import NotYoursError
from shared.request import Job, JobState, TakenJob, WorkerInfo


class Script:
    """Gives out jobs, and keeps what is said of them."""

    def __init__(self, *jobs: TakenJob) -> None:
        self.jobs = list(jobs)
        self.beats: list[tuple[Any, ...]] = []
        self.ends: list[tuple[int, int, int, str]] = []
        self.answers: Callable[[], bool] = lambda: True
        self.asked: list[int | None] = []
        self.states: list[JobState] = []
        """What `job` says, one after another."""

    def job(self, job: int) -> Job:
        about: dict[str, Any] = {"action": "harvest", "key": "k", "store": "s", "request": {}, "asked": 1}
        return Job(id=job, state=self.states.pop(0), attempt=3, priority="normal", **about)

    def take(self, worker: WorkerInfo, wait: float, job: int | None = None) -> TakenJob | None:  # noqa: ARG002
        self.asked.append(job)
        if not self.jobs:
            if job is not None:
                return None
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return None
        return self.jobs.pop(0)

    def beat(self, *said: Any) -> bool:
        self.beats.append(said)
        return self.answers()

    def end(self, job: int, attempt: int, code: int, words: str) -> None:
        self.ends.append((job, attempt, code, words))


def taken(**changes: Any) -> TakenJob:
    values: dict[str, Any] = {
        "job": 7, "attempt": 3, "action": "harvest", "store": "s", "command": "harvest", "settings": {"model": "tiny"},
        "lease_s": 30.0, "beat_s": 0.05, **changes,
    }  # fmt: skip
    return TakenJob(**values)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".jobs").mkdir()
    (tmp_path / ".jobs" / "7.log").touch()
    return tmp_path


Play = Callable[..., list[list[str]]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs short scripts in the place of commands, one after another. Returns the commands that they stand for."""

    def of(*scripts: str) -> list[list[str]]:
        left, asked = list(scripts), list[list[str]]()
        real = subprocess.Popen

        def popen(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
            asked.append(command[4:])
            return real([sys.executable, "-c", left.pop(0)], **options)

        monkeypatch.setattr(subprocess, "Popen", popen)
        return asked

    return of


def worked(script: Script, root: Path, **config: Any) -> None:
    asked = WorkConfig(root=root, device="cpu", name="w", **config)
    with pytest.raises(Interrupted):
        Worker(script, asked, describe_worker(asked)).run()


def test_a_job_is_made_and_checked(root: Path, play: Play) -> None:
    asked = play("import sys, time; print('at 5 %', file=sys.stderr, flush=True); time.sleep(1.5)", "pass")
    script = Script(taken(settings={"model": "tiny", "hooks": ['a"b'], "tokens": 5}))
    worked(script, root)
    assert script.ends == [(7, 3, 0, "")]
    settings = root / ".jobs" / "7.toml"
    assert asked == [["harvest", f"--config={settings}"], ["store", "verify", str(root / "s"), "--quick"]]
    assert tomllib.loads(settings.read_text()) == {
        "model": "tiny", "hooks": ["a\"b"], "tokens": 5, "out": str(root), "name": "s", "device": "cpu",
    }  # fmt: skip
    assert {beat[4] for beat in script.beats} >= {"", "at 5 %"}
    assert [beat[5] for beat in script.beats][0 :: len(script.beats) - 1] == [False, True]
    assert (root / ".jobs" / "7.log").read_text() == "at 5 %\n"


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("import sys; sys.exit('error: no such model')", 1, "no such model"),
        ("import sys; print('error: s: is locked', file=sys.stderr); sys.exit(75)", 75, "s: is locked"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("raise ValueError('of ours')", 1, "ValueError: of ours"),
    ],
)
def test_how_a_command_ended_is_said(root: Path, play: Play, script: str, code: int, words: str) -> None:
    asked = play(script)
    source = Script(taken())
    worked(source, root)
    assert source.ends == [(7, 3, code, words)]
    assert len(asked) == 1


def run_one(script: Script, root: Path) -> None:
    """A worker for job 7 alone. It ends by itself."""
    asked = WorkConfig(root=root, device="cpu", name="w", job=7)
    Worker(script, asked, describe_worker(asked)).run()


def test_a_worker_for_one_job_ends_with_it(root: Path, play: Play) -> None:
    """A job may take several stores: it stays open until the last one is made."""
    play("pass", "pass", "pass", "pass")
    source = Script(taken(), taken(store="t", attempt=4))
    source.states = ["queued", "done"]
    run_one(source, root)
    assert [end[:3] for end in source.ends] == [(7, 3, 0), (7, 4, 0)]
    assert source.asked == [7, 7]


def test_a_worker_for_one_job_tries_it_once(root: Path, play: Play) -> None:
    """The next try is for another machine."""
    play("import sys; sys.exit(75)")
    source = Script(taken(), taken(attempt=4))
    run_one(source, root)
    assert [end[:3] for end in source.ends] == [(7, 3, 75)]


def test_a_worker_for_one_job_waits_for_it(root: Path, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as the attempt of a lost worker may last, but not for ever."""
    play("pass", "pass")
    source = Script()
    source.states = ["running", "cancelled"]
    run_one(source, root)
    assert source.asked == [7, 7], "somebody cancelled it"
    monkeypatch.setattr(workers, "PATIENCE_S", 0.0)
    source.states = ["running"]
    run_one(source, root)
    assert source.asked == [7, 7, 7]
    assert source.ends == []


def test_a_damaged_store_is_repaired_first(root: Path, play: Play) -> None:
    asked = play(
        "import sys; sys.exit(3)", "pass", "import sys; print('2 shards are damaged', file=sys.stderr); sys.exit(3)"
    )
    source = Script(taken(repair=True))
    worked(source, root)
    assert [command[-1] for command in asked] == ["--repair", f"--config={root / '.jobs' / '7.toml'}", "--quick"]
    assert source.ends == [(7, 3, 3, "2 shards are damaged")]


def test_a_store_is_recoded(root: Path, play: Play) -> None:
    asked = play("pass", "pass")
    worked(Script(taken(action="recode", command="store recode", settings={"source": "a", "codec": "lz4"})), root)
    assert asked[0] == ["store", "recode", str(root / "a"), str(root / "s"), "--codec=lz4"]


def test_gpus_and_processes(root: Path, play: Play) -> None:
    asked = play("pass", "pass")
    worked(Script(taken(settings={"model": "tiny", "device": "cuda"})), root, gpus="2,5")
    assert asked[0][-1] == "--processes=2"
    assert 'device = "cuda"' in (root / ".jobs" / "7.toml").read_text()
    assert gpu_environment(WorkConfig(gpus="2,5")) == {"CUDA_VISIBLE_DEVICES": "2,5"}
    assert gpu_environment(WorkConfig()) == {}
    for wrong in ("", "a", "1,", "1,,2", "-1"):
        with pytest.raises(ValueError, match="numbers of GPUs"):
            WorkConfig(gpus=wrong)


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("committed", file=sys.stderr), sys.exit(130)))
print("begun", file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_a_cancelled_job_is_stopped(root: Path, play: Play) -> None:
    play(PATIENT)
    source = Script(taken())
    source.answers = lambda: not any(beat[4] == "begun" for beat in source.beats)
    worked(source, root)
    assert source.ends == [(7, 3, 130, "committed")]


def test_a_lost_job_is_stopped_and_nothing_is_said_of_it(root: Path, play: Play) -> None:
    play(PATIENT)
    source = Script(taken())

    def lost() -> bool:
        if any(beat[4] == "begun" for beat in source.beats):
            raise NotYoursError("job 7, attempt 3: is over")
        return True

    source.answers = lost
    worked(source, root)
    assert source.ends == []
    assert (root / ".jobs" / "7.log").read_text() == "begun\ncommitted\n"


def test_a_command_that_does_not_stop_is_killed(root: Path, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_S", 0.5)
    play(PATIENT.replace("sys.exit(130)", "time.sleep(60)"))
    source = Script(taken())
    source.answers = lambda: not any(beat[4] == "begun" for beat in source.beats)
    worked(source, root)
    assert source.ends[0][2] == -9


def test_work_goes_on_while_the_service_is_away(root: Path, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "AGAIN_S", 0.01)
    play("import time; time.sleep(1)", "pass")
    source = Script(taken())

    def away() -> bool:
        raise BusyError("the service is away")

    source.answers = away
    said, tries = source.end, list[int]()

    def end(*words: Any) -> None:
        tries.append(1)
        if len(tries) < 4:
            raise BusyError("the service is away")
        said(*words)

    monkeypatch.setattr(source, "end", end)
    worked(source, root)
    assert source.ends == [(7, 3, 0, "")]


def test_another_folder_than_the_service_s_is_named(tmp_path: Path) -> None:
    source = Script(taken())
    worked(source, tmp_path)
    assert source.ends[0][2] == 2
    assert "is not the folder in which the service works" in source.ends[0][3]
    assert not list(tmp_path.iterdir())


def test_a_log_that_is_a_link_is_not_written(root: Path, tmp_path: Path) -> None:
    (root / ".jobs" / "7.log").unlink()
    target = tmp_path / "precious"
    target.write_text("precious")
    (root / ".jobs" / "7.log").symlink_to(target)
    source = Script(taken())
    worked(source, root)
    assert source.ends[0][2] != 0
    assert target.read_text() == "precious"


def test_settings_are_written_as_toml() -> None:
    values = {
        "a": 'say "hi"\n\\ \x7f\x01 ü😀', "b": True, "c": 5, "d": 1e-3, "e": None, "f": ["x"], "g": [1, 2], "h": [],
    }  # fmt: skip
    assert tomllib.loads(as_toml(values)) == {name: value for name, value in values.items() if value is not None}
    config = HarvestConfig(model="tiny", eos="</s>").model_dump(mode="json")
    assert HarvestConfig.model_validate(tomllib.loads(as_toml(config))).model_dump(mode="json") == config
    with pytest.raises(UserError, match="dict"):
        as_toml({"a": {}})


def test_the_last_line_is_that_which_says_something() -> None:
    assert last_line(b"one\ntwo\r 50 %\r 60 %\r\n  \n") == "60 %"
    assert last_line(b"error: no such model\n") == "no such model"
    assert last_line(b"\xff\x1b[31mred\n") == "\ufffd\\x1b[31mred"
    assert last_line(b"") == ""


def test_a_long_log_is_moved_aside_while_it_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 1000)
    files = JobFiles(root, 7)
    handle = files.open_log()
    for number in range(300):
        os.write(handle, f"line {number:05d}\n".encode())
        files.rotate()
        assert files.size() <= 1011
    os.close(handle)
    assert last_line(files.tail()) == "line 00299"
    assert 0 < (root / ".jobs" / "7.log.1").stat().st_size <= 1000
    assert files.tail(start=10**9).endswith(b"line 00299\n")


def test_growth_is_counted_from_the_manifest(tmp_path: Path) -> None:
    growth = StoreGrowth(tmp_path / "s")
    growth.look()
    assert (growth.rows, growth.rate) == (0, None)
    store = FakeHarvest(tmp_path, "s", spec_of()).begin()
    store.shard(0)
    growth.look()
    assert (growth.rows, growth.rate) == (SHARD, None)  # what was there before says nothing of the speed
    store.shard(1)
    growth.look()
    assert growth.rows == 2 * SHARD
    assert growth.rate is not None
    (tmp_path / "s" / "zarr.json").write_text("{")
    growth.look()
    assert growth.rows == 2 * SHARD


PARENT = """
import os, subprocess, sys, time
from shared.command.parent import parent_variable
code = (
    "import sys, time; from shared.command import parent; %s; parent.end_with_parent();"
    "print('up', flush=True); time.sleep(60)"
)
child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **parent_variable(int(sys.argv[1]))})
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("elsewhere", ["pass", "sys.platform = 'darwin'; parent.LOOK_S = 0.05"])
def test_a_child_ends_with_its_parent(number: signal.Signals, elsewhere: str) -> None:
    command = [sys.executable, "-c", PARENT.replace("%s", elsewhere), str(int(number))]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not is_running(child))


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_child_whose_parent_has_ended_before_ends_at_once() -> None:
    code = "from shared.command.parent import end_with_parent; end_with_parent(); print('still here')"
    environment = {**os.environ, **parent_variable(signal.SIGKILL), "SAGSAE_PARENT": "1/9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9
    assert done.stdout == b""


def test_the_command_of_a_worker_is_this_program(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = Command(["store", "verify", str(root / "none")], JobFiles(root, 7), {}, killed=True)
    while command.wait(1.0) is None:
        pass
    assert command.code == 2
    assert command.words().startswith(f"{root / 'none'}: does not exist")
