"""What grows with a store: its manifest, its token ids, its order, and what is looked at again and again.

Measured in bytes and requests where that can be, else against the plain implementation that was there before.
"""

import json
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import servers
from support.command import Sagsae
from support.servers import Server

import shared.store.opened
import shared.store.spec
import train.data.follow
from harvest.bench.scale import LARGE_SHARDS, harvest_the_rest, make_manifest, make_store
from shared.bench.scale import ScaleMeasurement, ScalePoint, exponent, measured, report
from shared.config import TrainConfig
from shared.errors import DamagedError, Interrupted, UserError
from shared.files.local import LocalFiles
from shared.files.remote import RemoteFiles
from shared.permute import EPOCH_CHUNKS, HELDOUT, permutation
from shared.saes import sae_config
from shared.store.commits import CommitColumns, Commits, parse_lines
from shared.store.create import clean_up, create_store, write_tokens
from shared.store.manifest import INDEX, Commit, append_commit, parse_commit, read_manifest, remove_logs, sealed
from shared.store.opened import GrowingStore, Store, state_document, write_state
from shared.store.shard import crc32c, with_crc
from shared.store.spec import HookSpec, StoreSpec, rows_that_count, shard_file
from shared.store.tail import watch_store
from shared.store.tokens import CountedMask, TokenRows
from shared.store.verify import verify
from train.bench.scale import READING
from train.data.follow import Segments, waiting_text
from train.data.order import ChunkRun, ReadOrder, heldout_contexts, rows_in_shards, runs, split, split_rows
from train.data.row_mask import RowMask

moto, front, s3, alone = (getattr(servers, n) for n in ("moto", "front", "s3", "alone"))
LOG = "manifest/rank-00000.jsonl"


def spec_of(shards: int, hooks: int = 3, rows: int = 64, **changes: Any) -> StoreSpec:
    """Of a store with hookpoints of width 2, and 14 files a shard where it has three."""
    values: dict[str, Any] = {
        "model": {"name": "none", "commit": "0" * 32}, "tokenizer": {}, "corpus": {"ids_blake2b": "0" * 32},
        "context": 16,
        "bos_id": None, "special_ids": (), "n_tokens": shards * rows, "token_dtype": "uint16", "dtype": "bfloat16",
        "hookpoints": {f"layer_00/hook_{n}": HookSpec(name=f"blocks.0.{n}", d_in=2) for n in range(hooks)},
        "codec": "zstd", "chunk_rows": 16, "shard_rows": rows, "seed": 0, **changes,
    }  # fmt: skip
    return StoreSpec.model_validate(values)


def commit_of(spec: StoreSpec, shard: int, seed: int = 0, nonfinite: dict[str, int] | None = None) -> Commit:
    rng = np.random.default_rng([shard, seed])
    start, stop = spec.shard_range(shard)
    rows = spec.rows_of_shards()
    files = {
        array: (8 * 2 + 4 if array in rows else int(rng.integers(0, 3000)), int(rng.integers(0, 1 << 32)))
        for array in spec.arrays()
    }
    return Commit(shard, stop - start, start, stop, int(rng.integers(0, stop - start + 1)), files, nonfinite or {})


def manifest_only(root: Path, spec: StoreSpec, lines: list[str], state: Any = "final") -> Store:
    """A store of which nothing but the manifest is there."""
    (root / "manifest").mkdir(parents=True)
    (root / (INDEX if state == "final" else LOG)).write_text("".join(lines))
    write_state(LocalFiles(root), spec, state)
    return Store.open(root)


# The manifest


def test_a_manifest_takes_less_than_2_kb_a_shard(tmp_path: Path) -> None:
    """A store of 100,000 shards of fourteen files took half a gigabyte in every process that opened it."""
    spec, n = spec_of(2000), 2000
    manifest_only(tmp_path / "s", spec, [commit_of(spec, shard).line() for shard in range(n)])
    tracemalloc.start()
    store = Store.open(tmp_path / "s")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store.commits) == n
    assert held < 2000 * n
    assert peak < 5000 * n


def old_lines(data: bytes) -> tuple[list[Commit], list[int]]:
    """Line by line, as it was read before; a line that is no commit of the store is bad."""
    parsed = [parse_commit(line.decode(errors="replace")) for line in data.splitlines(keepends=True)]
    return [c for c in parsed if c is not None], [n for n, c in enumerate(parsed, 1) if c is None]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_lines_are_read_at_once_as_one_by_one(data: st.DataObject) -> None:
    """The lines that our writer makes are matched as a whole. Whatever else is JSON of the same meaning gives the same
    commit, whatever was altered is a bad line."""
    spec = spec_of(5, hooks=data.draw(st.integers(1, 2)))
    lines = []
    for shard in data.draw(st.lists(st.integers(0, 4), max_size=8)):
        bad = {hook: 0 for hook in spec.hookpoints if data.draw(st.booleans())}
        line = commit_of(spec, shard, data.draw(st.integers(0, 9)), bad).line()
        how = data.draw(st.sampled_from(["as it is", "as it is", "spaced", "turned round", "altered", "cut"]))
        body = json.loads(line)
        body.pop("c")
        if how == "spaced":
            text = json.dumps(body)
            line = f'{text[:-1]},"c":{crc32c(text.encode())}}}\n'
        elif how == "turned round":
            line = sealed(dict(reversed(body.items())))
        elif how == "altered":
            at = data.draw(st.integers(0, len(line) - 2))
            line = line[:at] + chr(ord(line[at]) ^ data.draw(st.sampled_from([1, 2, 4, 8, 16]))) + line[at + 1 :]
        elif how == "cut":
            line = line[: data.draw(st.integers(1, len(line) - 2))] + "\n"
        lines.append(line)
    whole, cut_short = "".join(lines).encode(), data.draw(st.booleans())
    if lines and cut_short:
        whole = whole[:-1]
    expected, bad_lines = old_lines(whole)
    found = parse_lines(whole, spec)
    assert list(found.commits) == expected
    assert list(found.bad) == bad_lines
    assert found.torn == bool(bad_lines and bad_lines[-1] == len(lines))
    assert "".join(found.commits.lines()) == "".join(commit.line() for commit in expected)
    by_shard = {commit.shard: commit for commit in expected}
    commits = Commits(found.commits)
    assert commits == {shard: by_shard[shard] for shard in sorted(by_shard)}
    assert list(commits) == sorted(by_shard)
    assert commits.n_rows == sum(commit.rows for commit in by_shard.values())
    assert commits.n_bytes == sum(n for commit in by_shard.values() for n, _ in commit.files.values())
    for hook in spec.hookpoints:
        assert commits.kept(hook) == sum(c.kept - c.nonfinite.get(hook, 0) for c in by_shard.values())
        assert commits.bytes_of(hook) == sum(c.files[hook][0] for c in by_shard.values())
    part = [shard for shard in by_shard if shard % 2]
    assert commits.only(part) == {shard: by_shard[shard] for shard in sorted(part)}
    assert commits.fresh(commits.only(part)).tolist() == sorted(set(by_shard) - set(part))
    cut = data.draw(st.integers(0, len(whole)))
    at = whole.rfind(b"\n", 0, cut) + 1
    first = parse_lines(whole[:at], spec)
    rest = parse_lines(whole[at:], spec, first.lines)
    assert [*first.commits, *rest.commits] == expected
    assert [*first.bad, *rest.bad] == bad_lines


FILE = "index/context"
HOSTILE: dict[str, dict[str, Any]] = {
    "a shard that is not planned": {"k": 4},
    "a negative shard": {"k": -1},
    "true for 1": {"k": True},
    "a shard with a fraction": {"k": 1.0},
    "a shard in words": {"k": "1"},
    "a number of hundreds of digits": {"k": 10**300},
    "other rows than the shard has": {"in": [0, 64]},
    "a range of three": {"in": [64, 128, 192]},
    "more rows than its range": {"rows": 65},
    "more rows that count than rows": {"kept": 10**12},
    "fewer than none that count": {"kept": -1},
    "no files": {"files": {}},
    "files that are none": {"files": 7},
    "one file more": {"files": {"../outside": {"bytes": 1, "crc32": 1}}},
    "a negative length": {"files": {FILE: {"bytes": -1, "crc32": 0}}},
    "a length of exabytes": {"files": {FILE: {"bytes": 1 << 62, "crc32": 0}}},
    "a checksum of five bytes": {"files": {FILE: {"bytes": 1, "crc32": 1 << 32}}},
    "a file without checksum": {"files": {FILE: {"bytes": 1}}},
    "sums of another length": {"files": {"stats/layer_00/hook_0/sum": {"bytes": 28, "crc32": 0}}},
    "an unknown hookpoint": {"nonfinite": {"layer_09/other": 1}},
    "more NaN than rows that count": {"nonfinite": {"layer_00/hook_0": 65}},
    "version 0": {"v": 0},
    "a version in words": {"v": "1"},
    "deep": {"kept": json.loads("[" * 100 + "]" * 100)},
    "not all members": {"rows": None},
}


@pytest.mark.parametrize("place", ["first", "last of a log that is written"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_line_that_is_sealed_and_wrong_is_damage(tmp_path: Path, what: str, place: str) -> None:
    """Commits of a downloaded store were taken as they came: tracebacks, wrong moments, index errors in training."""
    spec = spec_of(4, hooks=1)
    lines = [commit_of(spec, shard).line() for shard in range(4)]
    body = json.loads(lines[1])
    body.pop("c")
    change = HOSTILE[what]
    files = {**body["files"], **change["files"]} if isinstance(change.get("files"), dict) else body["files"]
    body |= {**change, "files": files if change.get("files") not in ({}, 7) else change["files"]}
    lines[1] = sealed(body)
    state = "final"
    if place != "first":
        lines, state = lines[:2], "writing"
    with pytest.raises(DamagedError, match=r"manifest/(index|rank-00000).jsonl: line 2 of the manifest is damaged"):
        manifest_only(tmp_path / "s", spec, lines, state)
    assert list(Store.open(tmp_path / "s", lenient=True).commits) == ([0, 2, 3] if state == "final" else [0])


def test_a_manifest_of_a_later_version_is_said(tmp_path: Path) -> None:
    spec = spec_of(1, hooks=1)
    body = json.loads(commit_of(spec, 0).line())
    with pytest.raises(UserError, match="in version 2, this sagsae reads version 1"):
        manifest_only(tmp_path / "s", spec, [sealed({**{k: v for k, v in body.items() if k != "c"}, "v": 2})])


def test_a_snapshot_is_named_as_before(tmp_path: Path) -> None:
    """Runs that were trained before have these names in their configuration."""
    spec = spec_of(5)
    commits = [commit_of(spec, shard, nonfinite={"layer_00/hook_1": 0} if shard == 2 else None) for shard in range(5)]
    store = manifest_only(tmp_path / "s", spec, [commit.line() for commit in commits])
    text = "".join(commit.line() for commit in commits)
    assert store.snapshot_id == f"{crc32c(text.encode()):08x}-5"
    assert store.only([1, 2]).snapshot_id == f"{crc32c((commits[1].line() + commits[2].line()).encode()):08x}-2"
    with pytest.raises(KeyError):
        store.only([1, 5])


@settings(max_examples=30, deadline=None)
@given(shards=st.integers(1, 40), width=st.integers(1, 4), seed=st.integers(0, 5), at_once=st.integers(1, 7))
def test_sums_over_shards_are_added_as_before(shards: int, width: int, seed: int, at_once: int) -> None:
    """The sum keeps its bits, however many rows are added at once."""
    rows = np.random.default_rng(seed).standard_normal((shards, width)) * 1e3
    spec = spec_of(shards, hooks=1)
    spec = spec.model_copy(update={"hookpoints": {"layer_00/hook_0": HookSpec(name="x", d_in=width)}})
    array = "stats/layer_00/hook_0/sum"
    commits = {k: Commit(k, 64, 64 * k, 64 * k + 64, 64, {array: (8 * width + 4, 0)}) for k in range(shards)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.store.opened, "ROWS_ADDED", at_once)
        patch.setattr(Store, "row_of_shard", lambda _self, _path, shard: rows[shard])
        store = Store(LocalFiles(Path("nowhere")), spec, "final", Commits.from_mapping(commits))
        assert store.total(array).tobytes() == np.sum(list(rows), axis=0).tobytes()


def test_a_sum_over_shards_holds_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of each of 100,000 shards was in memory at once."""
    spec, n = spec_of(3000, hooks=1), 3000
    manifest_only(tmp_path / "s", spec, [commit_of(spec, shard).line() for shard in range(n)])
    store = Store.open(tmp_path / "s")
    monkeypatch.setattr(Store, "row_of_shard", lambda *_: np.ones(1024))
    tracemalloc.start()
    total = store.total("stats/layer_00/hook_0/sum")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total.tolist() == [n] * 1024
    assert peak < 8192 * n, "they were there twice"


# What is looked at again and again


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_tail_reads_only_what_is_new(tmp_path: Path) -> None:
    """`store tail` opened the whole store again every two seconds: 12 s of work at 100,000 shards."""
    spec = spec_of(3000)
    lines = [commit_of(spec, shard).line() for shard in range(3000)]
    store = manifest_only(tmp_path / "s", spec, lines[:2900], "writing")
    watched = watch_store(store.files, 0.01)
    assert next(watched).new == []
    for shard in range(2900, 2905):
        append_commit(store.files, 0, commit_of(spec, shard))
        before = bytes_read()
        look = next(watched)
        assert look.new == [shard]
        assert bytes_read() - before < 100_000
    assert look.store.commits == Store.open(tmp_path / "s").commits


def test_follow_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train --follow` opened the whole store again every second."""
    spec = spec_of(3000)
    store = manifest_only(tmp_path / "s", spec, [commit_of(spec, k).line() for k in range(2900)], "writing")
    looks = 0
    fields: dict[str, Any] = {"store": store, "folder": tmp_path, "leads": False, "make_pass": str, "least": 10}
    fields |= {name: str for name in ("content",) if name in Segments.__dataclass_fields__}
    segments = Segments(**fields)

    def said(now: Store) -> str:
        nonlocal looks
        looks += 1
        if looks == 20:
            segments.closed.set()
        return waiting_text(now)

    monkeypatch.setattr(train.data.follow, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(train.data.follow, "SAY_SECONDS", -100)
    monkeypatch.setattr(train.data.follow, "waiting_text", said)
    before = bytes_read()
    with pytest.raises(Interrupted):
        segments.next_segment()
    assert looks == 20
    assert bytes_read() - before < 3 * 2900 * 1100, "once, not twenty times; modules may be imported meanwhile"


def test_what_is_known_is_right_whatever_happens_to_the_logs(tmp_path: Path) -> None:
    """Torn lines that are completed, two writers, a repair that takes lines away, the end of a harvest."""
    spec = spec_of(12, hooks=1)
    store = manifest_only(tmp_path / "s", spec, [], "writing")
    growing, files, root = GrowingStore(store.files), store.files, tmp_path / "s"
    lines = [commit_of(spec, shard).line() for shard in range(12)]

    def check() -> Store:
        now = growing.open()
        assert now.commits == Store.open(root).commits
        assert now.state == "final" or growing.open().commits is now.commits, "nothing is new"
        return now

    check()
    log, other = root / LOG, root / "manifest" / "rank-00001.jsonl"
    log.write_text(lines[0] + lines[1][:100])
    assert list(check().commits) == [0]
    with log.open("a") as file:
        file.write(lines[1][100:])
    assert list(check().commits) == [0, 1]
    other.write_text(lines[5])
    with log.open("a") as file:
        file.write(lines[2][:-1])
    assert list(check().commits) == [0, 1, 5]
    append_commit(files, 0, commit_of(spec, 7))
    assert list(check().commits) == [0, 1, 5, 7]
    again = commit_of(spec, 0, seed=9)
    append_commit(files, 1, again)
    assert check().commits[0] == again, "the later one counts"
    files.write(LOG, [lines[7].encode()])
    assert list(check().commits) == [0, 5, 7]
    for shard in sorted(set(range(12)) - {0, 5, 7}):
        append_commit(files, 1, commit_of(spec, shard))
    assert check().complete
    files.write(INDEX, [line.encode() for line in read_manifest(files, spec, final=False).lines()])
    check()
    remove_logs(files)
    check()
    write_state(files, spec, "final")
    assert check().state == "final"


def test_a_commit_as_long_as_the_torn_line_that_it_replaces_is_seen(tmp_path: Path) -> None:
    """By its size alone the log has not changed."""
    spec = spec_of(12, hooks=1)
    store = manifest_only(tmp_path / "s", spec, [commit_of(spec, 0).line()], "writing")
    growing, log, line = GrowingStore(store.files), tmp_path / "s" / LOG, commit_of(spec, 7).line()
    whole = log.read_text()
    log.write_text(whole + "{" * len(line))
    first = growing.open().commits
    assert list(first) == [0]
    assert growing.open().commits is first, "nothing is new"
    append_commit(store.files, 0, commit_of(spec, 7))
    assert log.stat().st_size == len(whole) + len(line)
    assert list(growing.open().commits) == [0, 7]


# A bucket


def remote_store(files: RemoteFiles, spec: StoreSpec) -> RemoteFiles:
    files.write("zarr.json", [state_document(spec, "writing")])
    return files


def requests(front: Server, command: str) -> list[str]:
    return [line for line in front.requests if line.startswith(command)]


def test_a_writing_store_in_a_bucket_opens_in_few_requests(
    s3: RemoteFiles, front: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every commit was an object: to open a store of 150,000 shards took as many requests, and to finish it as many
    deletions, one after another."""
    spec = spec_of(300, hooks=1)
    files = remote_store(s3, spec)
    for shard in range(290):
        append_commit(files, shard % 2, commit_of(spec, shard))
    front.requests.clear()
    store = Store.open(s3.name)
    assert list(store.commits) == list(range(290))
    assert store.commits[77] == commit_of(spec, 77)
    assert len(front.requests) <= 290 / 64 + 2 * 64 + 6
    growing = GrowingStore(files)
    growing.open()
    append_commit(files, 0, commit_of(spec, 290))
    front.requests.clear()
    assert len(growing.open().commits) == 291
    assert len(requests(front, "GET")) <= 6, "the state twice, two listings, and what is new"
    front.requests.clear()
    deletions, delete = [0], files.client.delete

    def counted(keys: list[str], name: str) -> None:
        deletions[0] += 1
        delete(keys, name)

    monkeypatch.setattr(files.client, "delete", counted)
    remove_logs(files)
    assert deletions == [1], "side by side"
    assert len(front.requests) <= 290 / 64 + 2 * 64
    assert files.logs("manifest", "rank-") == []


class PulledPlugError(Exception):
    pass


@pytest.mark.parametrize("moment", ["before the joined log", "before the deletion", "half deleted"])
def test_lines_that_are_being_joined_are_never_lost(
    s3: RemoteFiles, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whatever the writer's end came between; and what it left is joined when the harvest goes on."""
    spec = spec_of(200, hooks=1)
    files = remote_store(s3, spec)
    put, remove_all = files.client.put, RemoteFiles.remove_all

    def pulled(*arguments: Any, **options: Any) -> None:
        if ".part." in arguments[0] and moment == "before the joined log":
            raise PulledPlugError
        put(*arguments, **options)

    def deleting(here: RemoteFiles, paths: list[str]) -> None:
        if moment == "half deleted":
            remove_all(here, paths[::2])
        raise PulledPlugError

    with monkeypatch.context() as patch:
        patch.setattr(files.client, "put", pulled)
        patch.setattr(RemoteFiles, "remove_all", deleting)
        for shard in range(63):
            append_commit(files, 0, commit_of(spec, shard))
        with pytest.raises(PulledPlugError):
            append_commit(files, 0, commit_of(spec, 63))
    files = RemoteFiles.connect(s3.name)
    assert list(Store.open(files).commits) == list(range(64))
    clean_up(files)
    clean_up(files)
    assert list(Store.open(files).commits) == list(range(64))
    assert len(files.logs("manifest", "rank-")) <= 33
    for shard in range(64, 140):
        append_commit(files, 0, commit_of(spec, shard))
    assert Store.open(files).commits == {shard: commit_of(spec, shard) for shard in range(140)}


def test_a_reader_beside_a_writer_in_a_bucket_misses_nothing(s3: RemoteFiles) -> None:
    """Logs that were listed are gone when they are read: joined, or in the index."""
    spec = spec_of(300, hooks=1)
    files, reader = remote_store(s3, spec), GrowingStore(RemoteFiles.connect(s3.name))
    done = [0]

    def write() -> None:
        for shard in range(200):
            append_commit(files, 0, commit_of(spec, shard))
            done[0] = shard + 1

    thread = threading.Thread(target=write)
    thread.start()
    while done[0] < 200:
        before = done[0]
        found = reader.open().commits
        assert list(found)[:before] == list(range(before))
    thread.join()
    assert reader.open().commits == {shard: commit_of(spec, shard) for shard in range(200)}


# Token ids


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.store.spec, "TOKENS_PER_CHUNK", 64)


def token_store(root: Path, n_tokens: int, context: int, special: tuple[int, ...] = (3, 7), **changes: Any) -> Store:
    """A store with tokens and no commits."""
    n_contexts = -(-n_tokens // context)
    tokens = write_tokens(root / "tokens", token_blocks(n_contexts, context), context, 500)
    corpus = {"ids_blake2b": tokens.digest}
    spec = spec_of(1, hooks=1, n_tokens=n_tokens, context=context, special_ids=special, corpus=corpus, **changes)
    create_store(LocalFiles(root), spec, tokens.files, {})
    return Store.open(root)


def token_blocks(n_contexts: int, context: int) -> Iterator[NDArray[Any]]:
    rng = np.random.default_rng(0)
    step = max(1, (1 << 20) // context)
    for at in range(0, n_contexts, step):
        yield rng.integers(0, 12, (min(step, n_contexts - at), context), dtype=np.uint16)


def config_of(**changes: Any) -> TrainConfig:
    return TrainConfig(store="s", saes=(sae_config(arch="gated", d_sae=8, sparsity=0.1),), **changes)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("n_tokens", "context"), [(1000, 3), (1000, 16), (64, 64), (640, 7), (5, 8)])
def test_tokens_by_the_chunk_are_all_tokens(tmp_path: Path, n_tokens: int, context: int) -> None:
    store = token_store(tmp_path, n_tokens, context)
    ids, rows = store.tokens(), store.token_rows()
    assert rows.shape == ids.shape
    keep = rows_that_count(ids, store.spec).reshape(-1)
    counting, rng = CountedMask(rows), np.random.default_rng(0)
    for _ in range(50):
        first, last = sorted(rng.integers(0, len(ids) + 1, 2).tolist())
        assert np.array_equal(rows[first:last], ids[first:last])
        start, stop = sorted(rng.integers(0, ids.size + 1, 2).tolist())
        assert np.array_equal(counting[start:stop], keep[start:stop])
        some = np.flatnonzero(rng.random(len(ids)) < 0.3)
        assert np.array_equal(rows.take(some), ids[some])


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_masks_in_bits_are_the_masks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Which rows are trained on and which are held out does not change with how they are worked out."""
    context, n_tokens = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 900))
    special = tuple(data.draw(st.lists(st.integers(0, 70_000), max_size=10)))
    store = token_store(tmp_path_factory.mktemp("s"), n_tokens, context, special, shard_rows=data.draw(
        st.sampled_from([16, 48, 64])))  # fmt: skip
    config = config_of(
        heldout_tokens=data.draw(st.integers(1, 2000)), seed=data.draw(st.integers(0, 5)),
        exclude_special=data.draw(st.booleans()), exclude_positions=data.draw(st.sampled_from([None, (), (0, 2, 90)])),
    )  # fmt: skip
    spec = store.spec
    whole, bits = split(spec, store.tokens(), config), split_rows(store.token_rows(check=False), config)
    shards = np.flatnonzero(np.random.default_rng(0).random(spec.n_shards) < 0.6)
    there = np.zeros(n_tokens, bool)
    for shard in shards.tolist():
        there[slice(*spec.shard_range(shard))] = True
    for mask, marks in ((whole.train, bits.train), (whole.heldout, bits.heldout)):
        assert isinstance(mask, np.ndarray)
        assert isinstance(marks, RowMask)
        flat = mask.reshape(-1)
        assert np.array_equal(marks[0 : flat.size], flat)
        assert np.array_equal(marks.bits, RowMask.of(mask).bits)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, flat.size)] * 2)))
        assert np.array_equal(marks[start:stop], flat[start:stop])
        assert marks.count(start, stop) == flat[start:stop].sum()
        assert np.array_equal(marks.contexts(), np.flatnonzero(mask.any(axis=1)))
        assert np.array_equal(marks.places(), np.flatnonzero(flat))
        assert np.array_equal(marks.of_contexts(marks.contexts()), mask[mask.any(axis=1)])
        assert marks.shards(spec.shard_rows, n_tokens) == np.unique(
            np.flatnonzero(flat[:n_tokens]) // spec.shard_rows).tolist()  # fmt: skip
        assert rows_in_shards(marks, spec, shards) == (flat[:n_tokens] & there).sum()
        some = marks.places()[::3]
        anywhere = np.arange(0, flat.size, 3)
        assert np.array_equal(marks.marked_at(anywhere), flat[anywhere])
        without = flat.copy()
        without[some] = False
        assert np.array_equal(marks.without(some)[0 : flat.size], without)


def old_heldout(spec: StoreSpec, tokens: int, seed: int) -> NDArray[np.int64]:
    wanted = max(1, min(-(-tokens // spec.context), spec.n_contexts // 10))
    first = np.arange(spec.n_contexts) * spec.context
    shards = first // spec.shard_rows
    pool = np.empty(0, np.int64)
    for shard in permutation(spec.n_shards, seed, HELDOUT, 0):
        pool = np.append(pool, np.flatnonzero(shards == shard))
        if len(pool) >= 4 * wanted:
            break
    return np.sort(pool[permutation(len(pool), seed, HELDOUT, 1)[:wanted]])


@settings(max_examples=200, deadline=None)
@given(
    n_tokens=st.integers(1, 3000), context=st.integers(1, 70), shard_rows=st.integers(1, 50),
    wanted=st.integers(1, 999), seed=st.integers(0, 3),
)  # fmt: skip
def test_the_same_contexts_are_held_out(n_tokens: int, context: int, shard_rows: int, wanted: int, seed: int) -> None:
    spec = spec_of(1, n_tokens=n_tokens, context=context, shard_rows=16 * shard_rows)
    assert np.array_equal(heldout_contexts(spec, wanted, seed), old_heldout(spec, wanted, seed))


def test_what_is_held_out_does_not_take_a_number_for_every_context() -> None:
    """All contexts were numbered, and looked at again for every shard that was drawn."""
    spec = spec_of(1 << 15, hooks=1, rows=1 << 16, context=128, chunk_rows=1 << 12)
    tracemalloc.start()
    chosen = heldout_contexts(spec, 100_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(chosen) == -(-100_000 // 128)
    assert peak < spec.n_contexts


def test_no_process_holds_all_tokens(tmp_path: Path) -> None:
    """Each held 4.5 bytes a token: the ids, a second copy of them while their digest was taken, and masks. 10^9 tokens
    times four processes did not fit into 16 GB."""
    n = 24 << 20
    store = token_store(tmp_path, n, 128, shard_rows=1 << 16, chunk_rows=1 << 12)
    tracemalloc.start()
    config = config_of(heldout_tokens=100_000)
    parts = split_rows(store.token_rows(check=False), config)
    keep = CountedMask(store.token_rows())
    assert keep[5 << 16 : 6 << 16].sum() > 0
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows_in_shards(parts.train, store.spec, np.arange(store.spec.n_shards)) > n // 2
    assert peak < n
    assert held < n // 4 + (10 << 20), "a bit a row twice, and four chunks"


@pytest.mark.usefixtures("small_chunks")
def test_a_harvesting_process_reads_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of `--processes N` read and kept all of them."""
    store = token_store(tmp_path, 6400, 16)
    seen, read_chunk = list[int](), TokenRows.read_chunk

    def noted(rows: TokenRows, number: int) -> NDArray[Any]:
        seen.append(number)
        return read_chunk(rows, number)

    monkeypatch.setattr(TokenRows, "read_chunk", noted)
    keep = CountedMask(store.token_rows(check=False))
    assert len(keep[640:704]) == 64
    assert seen == [10]


@pytest.mark.usefixtures("small_chunks")
def test_tokens_that_are_replaced_meanwhile_are_noticed(tmp_path: Path) -> None:
    store = token_store(tmp_path, 6400, 16)
    rows = store.token_rows()
    (tmp_path / shard_file("tokens", 3, True)).write_bytes((tmp_path / shard_file("tokens", 4, True)).read_bytes())
    with pytest.raises(DamagedError, match=r"tokens/c/3/0: changed since it was first read"):
        rows[12:16]
    with pytest.raises(DamagedError, match="the token ids are not the ones that were written"):
        store.token_rows()
    with pytest.raises(DamagedError, match="the token ids are not the ones that were written"):
        store.tokens()


# Order


def old_runs(rows_per_shard: dict[int, int], chunk_rows: int, run_chunks: int) -> list[ChunkRun]:
    return [
        ChunkRun(shard, first, min(run_chunks, n_chunks - first))
        for shard, n_chunks in sorted((shard, -(-rows // chunk_rows)) for shard, rows in rows_per_shard.items())
        for first in range(0, n_chunks, run_chunks)
    ]


@settings(deadline=None)
@given(
    rows_per_shard=st.dictionaries(st.integers(0, 10**6), st.integers(0, 100), max_size=9),
    chunk_rows=st.integers(1, 20), run_chunks=st.integers(1, 12),
)  # fmt: skip
def test_runs_in_numbers_are_the_list_of_runs(rows_per_shard: dict[int, int], chunk_rows: int, run_chunks: int) -> None:
    found, expected = runs(rows_per_shard, chunk_rows, run_chunks), old_runs(rows_per_shard, chunk_rows, run_chunks)
    assert found == expected
    assert len(found) == len(expected)
    assert [found[number] for number in range(len(expected))] == expected
    assert found[1:-1] == expected[1:-1]
    with pytest.raises(IndexError):
        found[len(expected)]


def test_the_runs_of_a_store_are_no_objects() -> None:
    """A list of an object a run took 4 GB for 10^10 rows."""
    rows_per_shard = dict.fromkeys(range(20_000), 4096)
    tracemalloc.start()
    found = runs(rows_per_shard, 64, 8)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(found) == 160_000
    assert held < 160_000 * 16


def old_windows(order: ReadOrder, epoch: int, stream: int) -> list[NDArray[np.int64]]:
    units = permutation(order.n_units, order.seed, EPOCH_CHUNKS, epoch)
    units = units[(stream + epoch) % order.streams :: order.streams]
    parts = order.windows_full * order.streams
    edges = [len(units) * part // parts for part in range(stream + 1, parts, order.streams)]
    return [window for window in np.split(units, edges) if len(window)]


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(0, 300), streams=st.integers(1, 9), window=st.integers(1, 9), seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_windows_are_those_that_they_were(n: int, streams: int, window: int, seed: int, epoch: int) -> None:
    order = ReadOrder(n, streams, window, seed)
    for stream in range(streams):
        found, expected = order.windows(epoch, stream), old_windows(order, epoch, stream)
        assert len(found) == len(expected)
        assert [w.tolist() for w in found] == [w.tolist() for w in expected]
        assert all(np.array_equal(found[k], expected[k]) for k in range(len(expected)))


def test_the_windows_of_an_epoch_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were cut anew, all of a stream's, each time that one of them was asked for: hours over a long epoch."""
    cuts = [0]
    real = np.split, np.unique

    def counted(which: int, *arguments: Any, **options: Any) -> Any:
        cuts[0] += 1
        return real[which](*arguments, **options)

    monkeypatch.setattr(np, "split", lambda *a, **o: counted(0, *a, **o))
    monkeypatch.setattr(np, "unique", lambda *a, **o: counted(1, *a, **o))
    order = ReadOrder(8000, 8, 4, seed=3)
    seen = [unit for v in range(8) for k in range(len(order.windows(0, v))) for unit in order.windows(0, v)[k].tolist()]
    assert sorted(seen) == list(range(8000))
    assert cuts[0] <= 8


def test_a_row_of_a_shard_of_two_columns_has_one_length() -> None:
    """So that nothing of another length is read for it."""
    spec = spec_of(1, hooks=1)
    assert len(with_crc(np.zeros(2).tobytes())) == commit_of(spec, 0).files["stats/layer_00/hook_0/sum"][0]
    columns = CommitColumns.from_commits([commit_of(spec, 0)], spec.arrays(), spec.hookpoints)
    assert [replace(c, files=dict(c.files)) for c in columns] == [commit_of(spec, 0)]


# The benchmark of all this


def test_a_store_of_the_benchmark_is_a_store(tmp_path: Path) -> None:
    """What is measured is the real code on a store without damage, and a harvest goes on with it."""
    make_store(tmp_path / "s", 3, replace(LARGE_SHARDS, shard_rows=1024, chunk_rows=256, left=128))
    store = Store.open(tmp_path / "s")
    assert (len(store.commits), store.missing) == (3, [3])
    assert verify(store, full=False).lines == []
    assert measured(lambda: READING["train"](str(tmp_path / "s"))).anonymous > 0
    harvest_the_rest(str(tmp_path / "s"))
    assert verify(Store.open(tmp_path / "s"), full=False).lines == []
    assert Store.open(tmp_path / "s").complete
    make_manifest(tmp_path / "m", 50)
    assert len(Store.open(tmp_path / "m").commits) == 50


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
def test_the_exponent_of_what_grows(power: float) -> None:
    sizes = [10, 100, 1000, 10_000, 100_000]
    values = [2.0 + 1e-4 * n**power for n in sizes]
    found = exponent(sizes, values, 0.05)
    assert found is None if power < 1.0 else found == pytest.approx(power, abs=0.05)
    assert exponent(sizes, [2.0, 2.01, 1.99, 2.0, 2.02], 0.05) is None


def test_what_grows_too_fast_is_said() -> None:
    def points(power: float) -> list[ScalePoint]:
        sizes = [10, 100, 1000, 10_000, 100_000]
        return [
            ScalePoint("shards", "open", n, ScaleMeasurement(1e-5 * n**power, 1e-5 * n**power, 200 * n)) for n in sizes
        ]

    assert report(points(1.0))["holds"]
    assert [line.split(":")[0] for line in report(points(1.5))["failed"]] == ["open against shards"] * 2


@pytest.mark.slow
def test_bench_scale(sagsae: Sagsae, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    folder.mkdir()
    done = sagsae("bench", "scale", "--quick", "--folder", folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {(row["against"], row["what"]) for row in found["growth"]} == {
        ("shards", "open"), ("shards", "info"), ("shards", "verify"), ("shards", "train"), ("rows", "open"),
        ("rows", "info"), ("rows", "verify"), ("rows", "train"), ("rows", "harvest"),
    }  # fmt: skip
    assert len(found["table"]) == 3 * 4 + 2 * 5
    assert (found["holds"], found["failed"]) == (True, []), (
        "what is promised of large stores is not asked of small ones"
    )
    assert list(folder.iterdir()) == []
