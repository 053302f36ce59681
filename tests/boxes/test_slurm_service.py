"""`sagsae serve --launch slurm` on a real Slurm of two virtual nodes: whatever ends early, the job is done, and its
store is that of an undisturbed harvest."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.boxes.service import ServiceProcess
from support.boxes.slurm import SlurmCluster, slurm
from support.command import Sagsae
from support.folders import contents
from support.processes import kill, wait_for

from shared.store.opened import Store

__all__ = ["slurm"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
REQUEST = ("--model", "tiny", "--hook", "mlp_out", "--layer", "1", "--tokens", "130000", "--context", "64")
LONG = (*REQUEST, "--tokens", "520000")
"""One that cannot end while a job is cancelled."""
SOME = 30_000
"""Rows after which something happens."""


@pytest.fixture(scope="module")
def whole(sagsae: Sagsae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of an undisturbed harvest in one process."""
    root = tmp_path_factory.mktemp("whole")
    done = sagsae("request", *REQUEST, "--root", root, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    (store,) = [path for path in root.iterdir() if (path / "zarr.json").exists()]
    return contents(store)


@pytest.fixture
def service(slurm: SlurmCluster, tmp_path: Path) -> Iterator[ServiceProcess]:
    served = ServiceProcess(tmp_path, slurm.environment)
    try:
        start(served)
        yield served
    finally:
        served.end()
        slurm.run("scancel", "--me")
        wait_for(lambda: not slurm.run("squeue", "--noheader"), 60)


def start(service: ServiceProcess, *options: str) -> None:
    """Starts, or starts again, the server. The nodes are this machine, so its loopback address will do."""
    service.start("--launch=slurm", f"--url={service.url}", "--slurm=partition=main", *options)


def rows(store: Path) -> int:
    return Store.open(store).n_rows if (store / "zarr.json").exists() else 0


def begin(service: ServiceProcess, *request: str) -> tuple[int, Path, int]:
    """Asks, and waits until some rows are there. Returns the job, its store and Slurm's job."""
    job, store = service.ask(*(request or REQUEST))
    wait_for(lambda: rows(store) >= SOME, 400, service.all_logs)
    assert rows(store) < 130_000
    return job, store, slurm_jobs(service, job)[-1]


def slurm_jobs(service: ServiceProcess, job: int) -> list[int]:
    """The Slurm jobs that were submitted for a job, by its log."""
    log = (service.root / ".jobs" / f"{job}.log").read_text()
    return [int(number) for number in re.findall(r"submitted as Slurm job (\d+)", log)]


def test_a_request_becomes_a_slurm_job(service: ServiceProcess, slurm: SlurmCluster, whole: dict[str, bytes]) -> None:
    job, store = service.ask(*REQUEST)
    done = service.wait_until_done(job)
    assert contents(store) == whole
    (number,) = slurm_jobs(service, job)
    shown = slurm.run("scontrol", "show", "job", str(number))
    assert "JobState=COMPLETED" in shown
    assert done["attempt"] == 1
    token = (service.root / ".jobs/slurm.token").read_text()
    assert token not in json.dumps(service.all_logs())
    assert token not in shown


def test_scancel_in_the_middle(service: ServiceProcess, slurm: SlurmCluster, whole: dict[str, bytes]) -> None:
    job, store, number = begin(service)
    slurm.run("scancel", str(number))
    done = service.wait_until_done(job)
    assert contents(store) == whole
    assert len(slurm_jobs(service, job)) == 2, "submitted again"
    assert done["attempt"] == 2
    assert "CANCELLED" in (service.root / ".jobs" / f"{job}.log").read_text()


def test_a_node_fails_in_the_middle(service: ServiceProcess, slurm: SlurmCluster, whole: dict[str, bytes]) -> None:
    job, store, number = begin(service)
    node = slurm.job_node(number)
    slurm.node_fails(node)
    try:
        service.wait_until_done(job)
    finally:
        slurm.start_node(node)
        slurm.wait("idle", (node,))
    assert contents(store) == whole
    assert slurm_jobs(service, job) == [number], "Slurm itself started it again"
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", str(number))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_service_restarts_in_the_middle(
    service: ServiceProcess, whole: dict[str, bytes], how: signal.Signals
) -> None:
    """The Slurm job stays, finds the service again, and is not submitted twice."""
    job, store, number = begin(service)
    assert service.server is not None
    service.server.send_signal(how)
    service.server.wait(60)
    before = rows(store)
    start(service)
    done = service.wait_until_done(job)
    assert contents(store) == whole
    assert slurm_jobs(service, job) == [number]
    assert before < 130_000
    assert done["attempt"] == 1


def test_a_worker_is_killed_in_the_middle(
    service: ServiceProcess, slurm: SlurmCluster, whole: dict[str, bytes]
) -> None:
    """Its harvest dies with it; Slurm's job has failed, and another is submitted."""
    job, store, number = begin(service)
    (worker,) = [
        pid for pid in slurm.processes() if f"--job={job}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    kill(worker)
    service.wait_until_done(job)
    assert contents(store) == whole
    assert slurm_jobs(service, job)[0] == number
    assert len(slurm_jobs(service, job)) == 2


def test_a_job_of_two_nodes(service: ServiceProcess, slurm: SlurmCluster, whole: dict[str, bytes]) -> None:
    assert service.server is not None
    service.server.terminate()
    service.server.wait(60)
    start(service, "--slurm=nodes=2")
    job, store = service.ask(*REQUEST)
    service.wait_until_done(job, 800)
    assert contents(store) == whole
    (number,) = slurm_jobs(service, job)
    assert "NumNodes=2" in slurm.run("scontrol", "show", "job", str(number))
    assert json.loads((store / "record.json").read_text())


def test_a_cancelled_job_ends_its_slurm_job(service: ServiceProcess, slurm: SlurmCluster) -> None:
    job, store, number = begin(service, *LONG)
    service.client("jobs", "cancel", str(job))
    wait_for(lambda: number not in map(int, slurm.run("squeue", "--noheader", "--format=%i").split()), 90)
    assert service.job(job)["state"] == "cancelled"
    assert 0 < rows(store) < 520_000
