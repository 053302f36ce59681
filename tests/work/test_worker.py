"""Workers that are stopped, killed and woken too late; the store is that of an undisturbed harvest."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from support.serving.boxes import SHARD, TOKENS, Boxes, differences, harvests, plans, undisturbed, until

from shared.service import Client


@pytest.fixture(scope="session")
def documents() -> dict[str, Any]:
    return plans(TOKENS)


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, documents: dict[str, Any]) -> Path:
    """The store that every job here should make."""
    return undisturbed(documents[str(TOKENS)], tmp_path_factory.mktemp("expected"))


@pytest.mark.slow
def test_server_worker_and_harvest_are_killed(tmp_path: Path, documents: dict[str, Any], expected: Path) -> None:
    with Boxes(tmp_path / "stores", documents) as boxes:
        job = boxes.ask().job
        worker = boxes.start_worker()
        boxes.until_rows(job, 2 * SHARD)
        for pid in harvests(boxes.root):
            os.kill(pid, signal.SIGKILL)
        boxes.until_rows(job, 20 * SHARD)
        boxes.kill_server()
        boxes.start_server()
        boxes.until_rows(job, 40 * SHARD)
        worker.kill()
        worker.wait()
        until(lambda: not harvests(boxes.root), 10)  # its harvest died with it
        boxes.start_worker()
        ended = boxes.until_done(job)
        assert (ended.state, ended.rows) == ("done", TOKENS), ended
        assert ended.attempt >= 3
        assert differences(boxes.root / ended.store, expected) == []


@pytest.mark.slow
def test_a_worker_that_wakes_too_late_ends_its_harvest(
    tmp_path: Path, documents: dict[str, Any], expected: Path
) -> None:
    """The whole box is stopped for longer than its lease. Another worker meets the store's lock and waits; when the
    first one wakes, the server answers that the job belongs to another attempt."""
    with Boxes(tmp_path / "stores", documents) as boxes:
        job = boxes.ask().job
        first = boxes.start_worker()
        boxes.until_rows(job, 2 * SHARD)
        box = [first.pid, *harvests(boxes.root)]
        assert len(box) == 2
        for pid in box:
            os.kill(pid, signal.SIGSTOP)
        second = boxes.start_worker()
        until(lambda: "is writing here" in boxes.job(job).note, 60)
        assert boxes.job(job).state in ("queued", "running")
        for pid in reversed(box):
            os.kill(pid, signal.SIGCONT)
        until(lambda: box[1] not in harvests(boxes.root), 60)
        ended = boxes.until_done(job)
        assert ended.state == "done", ended
        assert first.poll() is None
        assert second.poll() is None
        assert differences(boxes.root / ended.store, expected) == []


def test_a_worker_that_is_stopped_gives_its_job_back(tmp_path: Path, documents: dict[str, Any], expected: Path) -> None:
    with Boxes(tmp_path / "stores", documents, lease_s=60.0) as boxes:
        job = boxes.ask().job
        worker = boxes.start_worker()
        boxes.until_rows(job, 2 * SHARD)
        worker.terminate()
        assert worker.wait(60) == 130
        given = boxes.job(job)
        assert (given.state, given.worker, given.note) == ("queued", None, "its worker was stopped")
        assert harvests(boxes.root) == []
        idle = boxes.start_worker()
        ended = boxes.until_done(job)
        assert (ended.state, ended.attempt) == ("done", 2)
        assert differences(boxes.root / ended.store, expected) == []
        assert boxes.ask().state == "ready"
        idle.terminate()  # it waits for a job: it ends at once
        assert idle.wait(5) == 130


@pytest.mark.slow
def test_a_cancelled_job_ends_its_command_and_keeps_its_store(tmp_path: Path, documents: dict[str, Any]) -> None:
    with Boxes(tmp_path / "stores", documents) as boxes, Client(boxes.url) as client:
        job = boxes.ask().job
        assert job is not None
        boxes.start_worker()
        boxes.until_rows(job, 2 * SHARD)
        client.cancel(job)
        until(lambda: boxes.job(job).worker is None, 60)
        assert harvests(boxes.root) == []
        assert boxes.job(job).state == "cancelled"
        before = next(row for row in client.stores() if row.id == boxes.job(job).store)
        assert before.rows >= 2 * SHARD
        client.retry(job)
        ended = boxes.until_done(job)
        assert (ended.state, ended.rows) == ("done", TOKENS)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_at_random(tmp_path: Path, documents: dict[str, Any], expected: Path) -> None:
    """SIGKILL hits the server, the worker, the harvest, or all three."""
    draw = random.Random(20)
    with Boxes(tmp_path / "stores", documents) as boxes:
        job = boxes.ask().job
        kills, worker = 0, boxes.start_worker()
        while kills < 20:
            if boxes.job(job).state == "done":  # each kill costs it a shard at most, so it ends before the twentieth
                made = boxes.root / boxes.job(job).store
                assert differences(made, expected) == []
                made.rename(tmp_path / f"made-{kills}")
                job = boxes.ask().job
            rows = boxes.job(job).rows
            until(lambda: boxes.job(job).rows > rows or boxes.job(job).state == "done", 120)  # noqa: B023
            victim = draw.choice(["server", "worker", "harvest", "all"])
            if victim in ("harvest", "all"):
                for pid in harvests(boxes.root):
                    os.kill(pid, signal.SIGKILL)
            if victim in ("worker", "all"):
                worker.kill()
                worker.wait()
            if victim in ("server", "all"):
                boxes.kill_server()
                boxes.start_server()
            if worker.poll() is not None:
                worker = boxes.start_worker()
            kills += 1
        ended = boxes.until_done(job)
        assert (ended.state, ended.rows) == ("done", TOKENS), ended
        assert differences(boxes.root / ended.store, expected) == []
