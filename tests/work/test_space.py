"""The cache's disk space: what counts, what is reserved, and which stores go."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving.cache import (
    SHARD,
    WORKER,
    FakeHarvest,
    TestClock,
    disk_bytes,
    fake_store,
    planned,
    spec_of,
)  # fmt: skip

from harvest.serve.records import Limits
from harvest.serve.state import State
from shared.errors import UserError
from shared.files.locks import folder_lock, held_for_reading
from shared.refusals import HeldError, QuotaError

NEED = 200_000
LIMITS = Limits(free_share=0.0)


@pytest.fixture
def clock() -> TestClock:
    return TestClock(wall=4_000_000_000.0)  # long after the files were made


@pytest.fixture
def state(tmp_path: Path, clock: TestClock) -> Iterator[State]:
    """Three stores of about 100,000 bytes each, used in order of their names, and room for one more."""
    for number in range(3):
        fake_store(tmp_path, f"s{number}", spec_of(seed=number), shard_bytes=25_000)
        os.utime(tmp_path / f"s{number}" / "zarr.json", (1000 + number, 1000 + number))
    opened = State.open(tmp_path, 480_000, clock=clock.clock, limits=LIMITS)
    yield opened
    opened.close()


def left(state: State) -> list[str]:
    return sorted(path.name for path in state.root.iterdir() if path.is_dir() and path.name != ".jobs")


def test_linked_bytes_count_once(tmp_path: Path) -> None:
    state = State.open(tmp_path)
    large = fake_store(tmp_path, "large", spec_of(8 * SHARD))
    state.scan()
    assert state.usage().used == disk_bytes(tmp_path)
    view = fake_store(tmp_path, "view", spec_of(4 * SHARD), linked=(large,))
    fake_store(tmp_path, "view2", spec_of(2 * SHARD), linked=(view,))
    state.scan()
    assert state.usage().used == disk_bytes(tmp_path)
    assert state.store("view").bytes is not None
    assert (state.store("view").bytes or 0) > 4 * 10_000
    freed = state.remove("large")
    assert 40_000 <= freed < 50_000  # its last four shards; the first four are the view's, too
    assert state.usage().used == disk_bytes(tmp_path)
    state.remove("view")
    assert state.usage().used == disk_bytes(tmp_path)
    state.close()


def test_linked_bytes_count_once_while_their_first_store_grows(tmp_path: Path) -> None:
    first = FakeHarvest(tmp_path, "first", spec_of(4 * SHARD)).begin()
    first.shard(0)
    state = State.open(tmp_path)
    assert state.usage().used == disk_bytes(tmp_path)
    second = FakeHarvest(tmp_path, "second", spec_of(8 * SHARD), linked=(first.files.root,)).begin()
    second.shard(0)
    state.scan()
    assert state.usage().used == disk_bytes(tmp_path)
    first.shard(1)
    state.scan()
    assert state.usage().used == disk_bytes(tmp_path)
    state.close()


def test_a_backup_by_links_elsewhere_counts_all_the_same(tmp_path: Path) -> None:
    root = tmp_path / "stores"
    root.mkdir()
    store = fake_store(root, "a")
    shutil.copytree(store, tmp_path / "backup", copy_function=os.link)
    state = State.open(root)
    assert state.usage().used == disk_bytes(root)
    state.close()


def test_the_least_recently_used_go_down_to_nine_tenths(state: State) -> None:
    state.touch("s0")
    asked = state.ask(planned(spec_of(seed=8)), "ann")
    assert left(state) == ["s0", "s1", "s2"]
    assert state.usage().reserved > 0
    assert asked.state == "queued"
    preview = state.preview(planned(spec_of(3 * SHARD, seed=9)))
    assert preview.evicts == ("s1",)
    assert "s1 would be deleted" in preview.text
    assert left(state) == ["s0", "s1", "s2"]
    state.ask(planned(spec_of(3 * SHARD, seed=9)), "ann")
    assert left(state) == ["s0", "s2"]
    now = state.usage()
    assert now.quota is not None
    assert now.used + now.reserved <= 0.9 * now.quota
    assert not list(state.root.glob(".gone-*"))


def test_what_is_held_never_goes(state: State) -> None:
    state.pin("s0", "paper")
    state.lease("s1", "train", 600.0)
    with held_for_reading(state.root / "s2"), pytest.raises(QuotaError) as refused:
        state.evict(NEED)
    assert left(state) == ["s0", "s1", "s2"]
    holders = {each["store"]: (each["why"], each["name"]) for each in refused.value.held_by}
    assert holders == {"s0": ("pin", "paper"), "s1": ("lease", "train"), "s2": ("read", "")}
    assert "raise --quota" in str(refused.value)
    assert state.evict(NEED) == ["s2"]
    state.unpin("s0", "paper")
    assert state.evict(300_000) == ["s0"]


def test_what_was_used_lately_stays(state: State, clock: TestClock) -> None:
    for name in ("s0", "s1", "s2"):
        state.touch(name)
    clock.move(3599)
    with pytest.raises(QuotaError) as refused:
        state.evict(NEED)
    assert {each["why"] for each in refused.value.held_by} == {"used lately"}
    clock.move(2)
    assert state.evict(NEED) == ["s0"]


def test_donors_and_stores_of_open_jobs_stay(state: State) -> None:
    asked = state.ask(planned(spec_of(8 * SHARD, seed=0)), "ann")
    assert asked.plan is not None
    assert asked.plan.from_stores == ("s0",)
    with pytest.raises(HeldError, match="needed by job"):
        state.remove("s0", force=True)
    assert "s0" not in state.evict(NEED)
    assert asked.job is not None
    state.cancel(asked.job)
    assert state.evict(400_000) == ["s0"]


def test_a_refused_request_queues_nothing(state: State) -> None:
    for name in ("s0", "s1", "s2"):
        state.pin(name, "paper")
    with pytest.raises(QuotaError, match=r"of the quota of 0\.00048 GB are used"):
        state.ask(planned(spec_of(16 * SHARD, seed=9)), "ann")
    assert not state.jobs().jobs
    assert left(state) == ["s0", "s1", "s2"]


def test_a_quota_of_nothing(tmp_path: Path) -> None:
    state = State.open(tmp_path, 0)
    with pytest.raises(QuotaError, match="of the quota of 0 GB are used and 0 GB reserved"):
        state.ask(planned(spec_of()), "ann")
    state.close()


def test_a_disk_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State.open(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=usage.total // 20 + 100))
    with pytest.raises(QuotaError, match="of the disk are used"):
        state.ask(planned(spec_of()), "ann")
    state.close()


def test_a_store_that_outgrows_its_estimate_takes_more_room_or_fails(state: State, clock: TestClock) -> None:
    state.ask(planned(spec_of(seed=8)), "ann")
    taken = state.take(WORKER)
    assert taken is not None
    store = FakeHarvest(state.root, taken.store, spec_of(seed=8), shard_bytes=60_000).begin()
    store.shard(0)
    assert state.beat(taken.job, taken.attempt, SHARD)
    assert left(state) == ["s2", taken.store]  # by its first shard it will have 240,000 bytes
    state.pin("s2", "paper")
    clock.move(29)
    assert state.beat(taken.job, taken.attempt, SHARD)
    for number in range(1, 4):
        store.shard(number)
    (store.files.root / "layer_01" / "more").write_bytes(b"\0" * 150_000)
    clock.move(2)
    assert not state.beat(taken.job, taken.attempt, 4 * SHARD)
    job = state.job(taken.job)
    assert job.state == "failed"
    assert "do not fit" in (job.error or "")
    assert not state.beat(taken.job, taken.attempt, 4 * SHARD)
    assert state.end(taken.job, taken.attempt, 130).worker is None
    assert left(state) == ["s2", taken.store]


def test_a_resumed_store_keeps_the_space_for_what_it_lacks(state: State, clock: TestClock) -> None:
    state.ask(planned(spec_of(seed=8)), "ann")
    whole = state.usage().reserved
    taken = state.take(WORKER)
    assert taken is not None
    store = FakeHarvest(state.root, taken.store, spec_of(seed=8), shard_bytes=25_000).begin()
    store.shard(0)
    store.shard(1)
    clock.move(31)  # its worker is not heard of
    state.sweep()
    clock.move(11)
    assert state.take(WORKER) is not None
    assert state.usage().reserved >= whole // 2


def test_no_job_begins_before_the_evicted_bytes_are_gone(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a slow disk
        state.ask(planned(spec_of(16 * SHARD, seed=9)), "ann")
        assert state.usage().leaving > 0
        assert state.take(WORKER) is None
    state.sweep()
    assert state.usage().leaving == 0
    assert state.take(WORKER) is not None


def test_what_was_linked_from_an_evicted_store_counts_before_the_next_job_begins(
    tmp_path: Path, clock: TestClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = fake_store(tmp_path, "large", spec_of(8 * SHARD), shard_bytes=25_000)
    os.utime(large / "zarr.json", (1000, 1000))
    fake_store(tmp_path, "small", spec_of(6 * SHARD), shard_bytes=25_000, linked=(large,))
    state = State.open(tmp_path, 310_000, clock=clock.clock, limits=LIMITS)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a slow disk
    state.ask(planned(spec_of(4 * SHARD, seed=9)), "ann")
    assert left(state) == [".gone-large", "small"]
    assert state.take(WORKER) is None
    state.close()


def test_no_job_begins_before_the_bytes_are_gone_that_it_evicts_itself(
    state: State, clock: TestClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = state.ask(planned(spec_of(8 * SHARD, seed=0)), "ann").job
    assert job is not None
    state.cancel(job)
    state.remove("s0")  # it was to lend half of the shards
    fake_store(state.root, "s3", spec_of(seed=3), shard_bytes=25_000)
    state.scan()
    state.retry(job)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a slow disk
        assert state.take(WORKER) is None
        assert state.usage().leaving > 0
        assert state.take(WORKER) is None
        assert state.usage().reserved > 8 * 25_000
        clock.move(3600)
        state.sweep()
        assert left(state) == [".gone-s1", ".gone-s2", "s3"]
    state.sweep()
    assert state.take(WORKER) is not None


def test_the_rest_of_an_interrupted_deletion_is_deleted_at_the_start(state: State, tmp_path: Path) -> None:
    (tmp_path / "s0").rename(tmp_path / ".gone-s0")
    state.close()
    state = State.open(tmp_path, 480_000)
    assert left(state) == ["s1", "s2"]
    state.close()


def test_what_an_earlier_server_could_not_delete_still_counts(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s0").rename(tmp_path / ".gone-s0")
    state.close()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a file of it is still open on a network's disk
        state = State.open(tmp_path, 480_000)
        assert state.usage().used + state.usage().leaving == disk_bytes(tmp_path)
    state.sweep()
    assert state.usage().leaving == 0
    state.close()


def test_what_two_deleted_stores_share_leaves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lender = fake_store(tmp_path, ".gone-a")
    fake_store(tmp_path, ".gone-b", spec_of(6 * SHARD), linked=(lender,))
    delete = shutil.rmtree
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    state = State.open(tmp_path, 480_000)
    assert state.usage().leaving == disk_bytes(tmp_path)
    delete(lender)
    state.sweep()
    assert state.usage().leaving == disk_bytes(tmp_path) > 60_000
    state.close()


def test_what_is_held_is_not_removed(state: State) -> None:
    state.pin("s0", "paper")
    state.lease("s0", "train", 600.0)
    with pytest.raises(HeldError, match=r"pinned as paper and it is read by train\. Unpin it and wait for its readers"):
        state.remove("s0")
    with held_for_reading(state.root / "s1"), pytest.raises(HeldError, match="reads or writes it"):
        state.remove("s1", force=True)
    with folder_lock(state.root / "s1"), pytest.raises(HeldError, match="reads or writes it"):
        state.remove("s1", force=True)
    assert state.remove("s0", force=True) > 100_000
    assert state.holds.pins("s0") == []
    assert left(state) == ["s1", "s2"]


def test_who_reads_an_evicted_store_keeps_its_open_files(state: State) -> None:
    path = state.root / "s0" / "layer_01" / "mlp_out" / "c" / "0" / "0"
    with path.open("rb") as reader:
        state.remove("s0")
        assert len(reader.read()) == 25_000


def test_nothing_is_lost_where_a_store_cannot_be_renamed(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="nothing was deleted"):
        state.ask(planned(spec_of(16 * SHARD, seed=9)), "ann")
    assert not state.jobs().jobs
    assert [row.id for row in state.stores(sort="id").stores] == ["s0", "s1", "s2"]


def test_many_ask_while_others_look(state: State) -> None:
    """Threads that list, measure and ask at once see whole states."""
    errors: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(20):
                usage = state.usage()
                assert usage.quota is not None
                assert usage.used + usage.reserved <= usage.quota
                state.stores()
                state.queue()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    refused = 0
    for seed in range(10, 30):
        try:
            state.ask(planned(spec_of(8 * SHARD, seed=seed)), f"{seed}")
        except QuotaError:
            refused += 1
    for thread in threads:
        thread.join()
    assert not errors
    assert 0 < refused < 20
