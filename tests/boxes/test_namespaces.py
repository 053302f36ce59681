"""Workers on several boxes: network namespaces with host names of their own, which reach the service over a network."""

import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.boxes.namespaces import Box, boxes, ip, why_not
from support.boxes.service import ServiceProcess
from support.command import Sagsae
from support.folders import contents
from support.processes import wait_for

from shared.store.opened import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REQUEST = ("--model", "tiny", "--hook", "mlp_out", "--layer", "1", "--tokens", "130000", "--context", "64")


@pytest.fixture(scope="module")
def whole(sagsae: Sagsae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of an undisturbed harvest in this process."""
    root = tmp_path_factory.mktemp("whole")
    done = sagsae("request", *REQUEST, "--root", root, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    (store,) = [path for path in root.iterdir() if (path / "zarr.json").exists()]
    return contents(store)


@pytest.fixture
def three() -> Iterator[list[Box]]:
    """The server's box and those of two workers."""
    if reason := why_not():
        pytest.skip(reason)
    with boxes(2) as made:
        yield made


@pytest.fixture
def service(three: list[Box], tmp_path: Path) -> Iterator[ServiceProcess]:
    served = ServiceProcess(tmp_path, {}, three[0].command)
    try:
        served.start("--host=0.0.0.0", "--launch=none")
        yield served
    finally:
        served.end()


def rows(store: Path) -> int:
    return Store.open(store).n_rows if (store / "zarr.json").exists() else 0


@pytest.fixture
def workers(service: ServiceProcess, three: list[Box]) -> dict[str, "subprocess.Popen[bytes]"]:
    """A worker in each of the other two boxes, by the box's name."""
    started = {}
    for box in three[1:]:
        url = f"http://{box.server}:{service.port}"
        words = ("work", f"--service={url}", f"--root={service.root}", "--device=cpu")
        started[box.name] = service.process(*words, inside=box.command, log=f"{box.name}.log", url=url)
    return started


def begin(service: ServiceProcess, workers: Mapping[str, object]) -> tuple[int, Path, str]:
    """Asks, and waits until some rows are there. Returns the job, its store and the box that works on it."""
    job, store = service.ask(*REQUEST)
    wait_for(lambda: rows(store) > 20_000, 300, service.all_logs)
    found = service.job(job)
    assert found["state"] == "running"
    assert rows(store) < 130_000
    (busy,) = [name for name in workers if found["worker"].startswith(f"{name}:")]
    return job, store, busy


def test_the_box_of_a_worker_dies(
    service: ServiceProcess, workers: dict[str, "subprocess.Popen[bytes]"], whole: dict[str, bytes]
) -> None:
    job, store, busy = begin(service, workers)
    workers[busy].send_signal(signal.SIGKILL)
    done = service.wait_until_done(job)
    assert done["attempt"] == 2
    assert contents(store) == whole


def test_the_cable_of_a_worker_is_cut(
    service: ServiceProcess, workers: dict[str, "subprocess.Popen[bytes]"], whole: dict[str, bytes]
) -> None:
    """Its harvest continues alone. Until it ends, the store's lock keeps out a worker that is given the job; then the
    service finds the finished store. The worker cannot say so, and waits for the service."""
    job, store, busy = begin(service, workers)
    ip("-n", busy, "link", "set", "eth0", "down")
    service.wait_until_done(job)
    assert contents(store) == whole
    assert workers[busy].poll() is None
    assert "the service cannot be reached" in service.log(f"{busy}.log")
