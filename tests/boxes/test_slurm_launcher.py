"""The launcher between the service's queue and a real Slurm, with commands that stand for workers."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.boxes.slurm import SlurmCluster, slurm
from support.processes import wait_for
from support.serving.cache import SHARD, planned, spec_of

import harvest.serve.slurm.commands
from harvest.serve.slurm import launcher as module
from harvest.serve.slurm.commands import SlurmJob, list_jobs
from harvest.serve.slurm.launcher import SlurmLauncher, prefix_of, submissions_in
from harvest.serve.state import State
from shared.request import WorkerInfo

__all__ = ["slurm"]
IDLE = ["sleep", "300"]


def ask(state: State, shards: int = 4) -> int:
    """Asks for a store that nothing makes. Returns the job."""
    job = state.ask(planned(spec_of(shards * SHARD)), "a test").job
    assert job is not None
    return job


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    (tmp_path / "stores").mkdir()
    opened = State.open(tmp_path / "stores")
    yield opened
    opened.close()


@pytest.fixture
def launcher(
    slurm: SlurmCluster, state: State, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., SlurmLauncher]]:
    """Makes launchers whose Slurm jobs end with the test."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)

    def make(command: list[str], *options: str, most: int = 100) -> SlurmLauncher:
        return SlurmLauncher(state, lambda job: [*command, str(job)], options, most, {}, 0.2, 0.1)

    yield make
    harvest.serve.slurm.commands.cancel([job.id for job in list_jobs() if job.live])
    wait_for(lambda: not any(job.live for job in list_jobs()), 60)


def ours(state: State) -> list[SlurmJob]:
    return [each.slurm for each in submissions_in(list_jobs(), prefix_of(state.root)).values()]


def live(state: State) -> list[SlurmJob]:
    return [job for job in ours(state) if job.live]


def test_a_job_is_submitted_once_even_by_a_service_that_starts_again(
    state: State, launcher: Callable[..., SlurmLauncher]
) -> None:
    job = ask(state)
    first = launcher(IDLE)
    for _ in range(3):
        first.step()
    (only,) = live(state)
    assert only.name.endswith(f"-{job}-0")
    again = launcher(["sleep", "300"])
    for _ in range(3):
        again.step()
    assert [each.id for each in live(state)] == [only.id]
    assert f"submitted as Slurm job {only.id}" in state.log_path(job).read_text()
    assert state.job(job).note.startswith(f"Slurm job {only.id}: ")


def test_a_job_that_no_worker_begins_fails_with_the_last_words(
    state: State, launcher: Callable[..., SlurmLauncher]
) -> None:
    job = ask(state)
    broken = launcher([sys.executable, "-c", "import sys; sys.exit('no such module: ' + sys.argv[1])"])

    def failed() -> bool:
        broken.step()
        return state.job(job).state == "failed"

    wait_for(failed, 90)
    error = state.job(job).error or ""
    assert error.startswith("given up after 5 tries in which no worker began. The last: Slurm job ")
    assert "failed (NonZeroExitCode)" in error
    assert f"no such module: {job}" in error
    assert len(ours(state)) == 5
    state.retry(job)
    broken.step()
    assert len(ours(state)) == 6, "tried again when asked to"


def test_what_sbatch_refuses_fails_with_its_sentence(state: State, launcher: Callable[..., SlurmLauncher]) -> None:
    job = ask(state)
    refused = launcher(IDLE, "--partition=none")

    def failed() -> bool:
        refused.step()
        return state.job(job).state == "failed"

    wait_for(failed, 30)
    assert "invalid partition" in (state.job(job).error or "")
    assert ours(state) == []


def test_a_cancelled_job_leaves_slurm(
    state: State, launcher: Callable[..., SlurmLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ask(state, n) for n in (1, 2)]
    assert len(state.due()) == 1, "both write the same hookpoint, so the second waits for the first"
    waiting = launcher(["sleep", "300"], "--begin=now+1hour")
    waiting.step()
    (only,) = live(state)
    assert only.waiting
    state.cancel(jobs[0])
    waiting.step()
    wait_for(lambda: only.id not in [job.id for job in live(state)], 30)
    assert live(state)[0].name.endswith(f"-{jobs[1]}-0"), "now the second is due"
    state.cancel(jobs[1])
    waiting.step()
    wait_for(lambda: not live(state), 30)

    running = launcher(["sleep", "300"])
    job = ask(state, 5)
    running.step()
    wait_for(lambda: [each.state for each in live(state)] == ["RUNNING"], 30)
    state.cancel(job)
    running.looked = None
    running.step()
    assert len(live(state)) == 1, "its worker learns of it and stops by itself"
    monkeypatch.setattr(module, "GRACE_S", 0.0)
    running.step()
    wait_for(lambda: not live(state), 60)


def test_a_job_that_another_worker_took_is_not_submitted(state: State, launcher: Callable[..., SlurmLauncher]) -> None:
    job = ask(state)
    taken = state.take(WorkerInfo(name="other"))
    assert taken is not None
    assert taken.job == job
    launcher(IDLE).step()
    assert ours(state) == []


def test_so_many_slurm_jobs_at_a_time(state: State, launcher: Callable[..., SlurmLauncher]) -> None:
    ask(state)
    launcher(IDLE, most=0).step()
    assert ours(state) == []


def test_slurm_out_of_reach_is_said_once(
    state: State, launcher: Callable[..., SlurmLauncher], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], tmp_path: Path, slurm: SlurmCluster,
) -> None:  # fmt: skip
    job = ask(state)
    monkeypatch.setattr(module, "STEP_S", 0.01)
    monkeypatch.setattr(harvest.serve.slurm.commands, "PATIENCE", 0.3)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none"))
    away, stop = launcher(["sleep", "300"]), threading.Event()
    thread = threading.Thread(target=away.run, args=(stop,))
    thread.start()
    wait_for(lambda: away.looked is not None, 30)
    stop.wait(2)
    stop.set()
    thread.join()
    assert capfd.readouterr().err.count("--launch slurm: squeue ") == 1
    assert state.job(job).state == "queued"
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setattr(harvest.serve.slurm.commands, "PATIENCE", 60.0)


def test_names() -> None:
    prefix = prefix_of(Path("/stores"))
    listed = [
        SlurmJob(1, "RUNNING", "None", f"{prefix}12-3"), SlurmJob(2, "RUNNING", "None", f"{prefix}12-"),
        SlurmJob(3, "RUNNING", "None", f"x{prefix}1-0"), SlurmJob(4, "RUNNING", "None", f"{prefix_of(Path('/b'))}1-0"),
    ]  # fmt: skip
    (found,) = submissions_in(listed, prefix).values()
    assert (found.slurm.id, found.job, found.attempt) == (1, 12, 3)
