"""Real writers for test_crash.py and test_damage.py: processes that write a store, that are killed, that read along.

Every row is a function of its token position, so whatever is committed can be checked by anybody at any time. As a
script it imports no torch, and forks its writers from a process that has started no thread: a writer lives within
milliseconds. `python crash_writer.py COMMAND FOLDER SIZE …` prints what it counted as JSON.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvest.writer import ShardRows, ShardWriter
from shared.errors import DamagedError, UserError
from shared.files.base import Files
from shared.files.local import LocalFiles
from shared.files.locks import LOCK_FILE
from shared.store.create import building, clean_up, clear_store, create_store, finish_store, place_tokens, write_tokens
from shared.store.manifest import INDEX
from shared.store.opened import STATE_FILE, Store, is_store, write_state
from shared.store.reader import open_reader, read_shard
from shared.store.shard import as_float32
from shared.store.spec import HookSpec, StoreSpec, rows_that_count, shard_file
from shared.store.verify import verify

CONTEXT, VOCABULARY = 32, 500
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Size:
    """How large a store is, and its codec."""

    tokens: int
    chunk_rows: int
    shard_rows: int
    widths: tuple[int, ...]
    """d_in of each hookpoint."""
    codec: str = "zstd"


def bits(hook: str, positions: np.ndarray, d_in: int) -> np.ndarray:
    """The rows [n, d_in] that belong at these token positions, as bfloat16 bit patterns."""
    start = positions.astype("<u4")[:, None] * np.uint32(2654435761) + np.uint32(zlib.crc32(hook.encode()))
    mixed: NDArray[np.uint32] = (start + np.arange(d_in, dtype=np.uint32) * np.uint32(2246822519)) * np.uint32(
        3266489917
    )
    mixed ^= mixed >> np.uint32(15)
    return np.asarray((mixed.view("<i4").astype("<f4") * np.float32(2**-31)).view("<u4") >> 16).astype("<u2")


def token_ids(n_contexts: int) -> np.ndarray:
    positions = np.arange(n_contexts * CONTEXT).reshape(n_contexts, CONTEXT)
    return (positions * 7919 % VOCABULARY).astype("<u2")


def rows_of(spec: StoreSpec, hook: str, shard: int, keep: np.ndarray) -> ShardRows:
    """What a harvest captures of one shard."""
    positions = np.arange(*spec.shard_range(shard))
    rows = bits(hook, positions, spec.hookpoints[hook].d_in)
    x = as_float32(rows, spec.dtype).astype("<f8")
    counted = x[keep.reshape(-1)[positions]]
    norms = np.sqrt(np.square(x).sum(axis=1)).astype("<f4")
    return ShardRows(rows, norms, counted.sum(axis=0), np.square(counted).sum(axis=0))


def begin(files: LocalFiles, size: Size) -> None:
    """An empty store, in the order that harvest.run.begin keeps."""
    n_contexts = -(-size.tokens // CONTEXT)
    with building(files) as folder:
        tokens = write_tokens(folder, [token_ids(n_contexts)], CONTEXT, VOCABULARY)
        files.remove(STATE_FILE)
        clear_store(files, keep=(LOCK_FILE, folder.name))
        place_tokens(files, tokens)
    hooks = {f"layer_0{n}/mlp_out": HookSpec(name=f"blocks.{n}.x", d_in=width) for n, width in enumerate(size.widths)}
    spec = StoreSpec.model_validate({
        "model": {"name": "arithmetic"}, "tokenizer": {}, "corpus": {"ids_blake2b": tokens.digest}, "context": CONTEXT,
        "bos_id": None, "special_ids": (0,), "n_tokens": size.tokens, "token_dtype": tokens.dtype, "hookpoints": hooks,
        "dtype": "bfloat16", "codec": size.codec, "chunk_rows": size.chunk_rows, "shard_rows": size.shard_rows,
        "seed": 0,
    })  # fmt: skip
    create_store(files, spec, tokens.files, {"command": "none"})


def fill(files: Files, shards: Container[int] = range(1 << 30), number: int = 0) -> None:
    """Writer `number` commits those of `shards` that are missing."""
    store = Store.open(files)
    keep = rows_that_count(token_ids(store.spec.n_contexts), store.spec)
    writer = ShardWriter(files, store.spec, keep, writer=number, threads=2)
    for shard in store.missing:
        if shard in shards:
            writer.commit(shard, {hook: rows_of(store.spec, hook, shard, keep) for hook in store.spec.hookpoints})
    writer.close()


def write(root: Path, size: Size, begun: Callable[[], Any] = lambda: None) -> None:
    """All of a store, or all that is missing of it: what harvest.run.harvest does, step by step."""
    files = LocalFiles(root)
    if is_store(files) and not (store := Store.open(files)).missing and store.state == "final":
        begun()
        return
    root.mkdir(parents=True, exist_ok=True)
    with files.lock():
        begun()
        if not is_store(files):
            begin(files, size)
        clean_up(files)
        fill(files)
        finish_store(files, Store.open(files).spec)


def wrong_rows(store: Store, shard: int) -> int:
    """How many rows of a committed shard are not what the source says (of int8: not within half a step)."""
    contexts, positions = (read_shard(open_reader(store, f"index/{name}"), shard) for name in ("context", "position"))
    at = contexts.astype("<i8") * CONTEXT + positions
    wrong = np.sort(at) != np.arange(*store.spec.shard_range(shard))
    if wrong.any():
        return int(wrong.sum())
    keep = rows_that_count(token_ids(store.spec.n_contexts), store.spec)
    for hook, spec in store.spec.hookpoints.items():
        rows, truth = read_shard(open_reader(store, hook), shard), rows_of(store.spec, hook, shard, keep)
        expected = bits(hook, at, spec.d_in)
        if store.spec.quantised:
            scale, dim = read_shard(open_reader(store, f"scale/{hook}/row"), shard), store.dim_scale(hook, shard)
            step = scale[:, None] * dim
            wrong |= (np.abs(rows * step - as_float32(expected, "bfloat16")) > 0.501 * step).any(axis=1)
        else:
            wrong |= (rows != expected).any(axis=1)
        norms = read_shard(open_reader(store, f"stats/{hook}/norm"), shard)
        wrong |= norms != truth.norms[at - store.spec.shard_range(shard)[0]]
        wrong |= (store.row_of_shard(f"stats/{hook}/sum", shard) != truth.total).any()
        wrong |= (store.row_of_shard(f"stats/{hook}/sum_of_squares", shard) != truth.squares).any()
    return int(wrong.sum())


def follow(root: Path) -> dict[str, Any]:
    """Opens the store again and again until it is final, and checks every row that was committed since. It says on
    its first line that it has begun."""
    counts, errors, seen, final = Counter[str](rows=0, bad=0, looks=0, growing=0), [], set[int](), False
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    while not final:
        counts["looks"] += 1
        time.sleep(0.005)  # leaves the processor to the writers
        try:
            store = Store.open(root)
            if lost := seen - set(store.commits):
                errors.append(f"shards {sorted(lost)} were committed and are not any more")
            counts["growing"] += bool(store.commits) and not seen.issuperset(store.commits)
            for shard in sorted(set(store.commits) - seen):
                counts["bad"] += wrong_rows(store, shard)
                counts["rows"] += store.commits[shard].rows
                seen.add(shard)
            final = store.state == "final"
        except (UserError, DamagedError, OSError) as error:
            errors.append(repr(error))
    return {**counts, "errors": errors}


def start(work: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    """Forks a process; gives its id, and a pipe that has something to read once it is at work."""
    reading, writing = os.pipe()
    if process := os.fork():
        os.close(writing)
        return process, reading
    try:
        work(*arguments, lambda: os.write(writing, b"."))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def end(process: int, reading: int, after: float | None, enough: Callable[[], bool] = lambda: False) -> bool:
    """Kills a process so many seconds after now, or once it has done `enough`; None waits for its end. Whether it was
    at work when it was killed. Raises when it failed."""
    if after is not None:
        late = time.monotonic() + after
        while time.monotonic() < late and not enough():
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    at_work = bool(os.read(reading, 1))
    os.close(reading)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a writer failed")
    return os.WIFSIGNALED(status) and at_work


def kill_again_and_again(root: Path, size: Size, kills: int, longest: float) -> dict[str, int]:
    """Writers of one store, each killed within `longest` seconds, `kills` times; then one that is left alone."""
    rng, counts = random.Random(0), Counter[str](kills=0, half_files=0, lives=0)
    while not (is_store(LocalFiles(root)) and Store.open(root).state == "final"):
        counts["lives"] += 1
        left_alone = counts["kills"] >= kills
        counts["kills"] += end(*start(write, root, size), None if left_alone else rng.uniform(0, longest))
        counts["half_files"] += len(list(root.rglob("*.tmp")))
    return counts


def pair(root: Path, kills: int, longest: float) -> dict[str, int]:
    """Two writers at once, odd and even shards, into a store that was begun. The odd one is killed `kills` times, each
    time before it has committed a tenth of its shards, however fast the machine is."""
    files, rng, counts = LocalFiles(root), random.Random(0), Counter[str](kills=0)

    def share(number: int, begun: Callable[[], Any]) -> None:
        begun()
        fill(files, range(number, 1 << 30, 2), number)

    with files.lock():
        clean_up(files)
        log, few = root / "manifest" / "rank-00001.jsonl", Store.open(root).spec.n_shards // 20
        even = start(share, 0)
        while counts["kills"] < kills and any(shard % 2 for shard in Store.open(root).missing):
            enough = partial(has_lines, log, lines_in(log) + few - 1)
            counts["kills"] += end(*start(share, 1), rng.uniform(0, longest), enough)
        for process in (start(share, 1), even):
            end(*process, None)
        counts["logs"] = len(list(root.glob("manifest/rank-*.jsonl")))
        finish_store(files, Store.open(root).spec)
    return counts


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def has_lines(path: Path, count: int) -> bool:
    return lines_in(path) >= count


def die_at(step: int) -> None:
    """Makes this process kill itself in front of its n-th change of the file system."""
    left = step

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def dying(root: Path, size: Size, step: int, begun: Callable[[], Any]) -> None:
    begun()
    die_at(step)
    write(root, size)


def not_synced(fd: object) -> None:
    """The processes die, the machine does not."""


def kill_at_every_step(folder: Path, size: Size) -> dict[str, Any]:
    """For every change that a writer makes to the file system: one that is killed in front of it. What is committed
    then must be right, and a second writer must complete the store to the bytes of one that nobody killed."""
    os.fsync = not_synced
    root, wrong, counts, before = folder / "killed", [], Counter[str](kills=0, stores=0, rows=0), 0
    write(folder / "whole", size)
    whole = contents(folder / "whole")
    while end(*start(dying, root, size, counts["kills"]), None):
        when = f"killed at step {counts['kills']}"
        counts["kills"] += 1
        if is_store(LocalFiles(root)):
            store = Store.open(root)
            bad = sum(wrong_rows(store, shard) for shard in store.commits)
            damage = verify(store, full=True).lines
            if bad or damage or store.n_rows < before:
                wrong.append(f"{when}: {bad} bad rows of {store.n_rows}, {before} were there; {damage}")
            before = store.n_rows
            counts["stores"] += 1
            counts["rows"] += before
        end(*start(write, root, size), None)
        if contents(root) != whole:
            wrong.append(f"{when}: the second writer left {sorted(contents(root))}")
        shutil.rmtree(root)
    return {**counts, "wrong": wrong}


def seen_by_verify(root: Path) -> bool:
    """As `sagsae store verify --full` looks."""
    try:
        return bool(verify(Store.open(root, lenient=True), full=True).lines)
    except (DamagedError, UserError):
        return True


def read_everything(root: Path) -> str:
    """What comes of reading all that a store holds without verifying it first."""
    try:
        store = Store.open(root)
        store.tokens()
        wrong = sum(wrong_rows(store, shard) for shard in store.commits)
    except (DamagedError, UserError):
        return "error"
    return "wrong" if wrong else "right"


def damage(root: Path, size: Size, shards: int, hits: int, more: int) -> dict[str, Any]:
    """Alters one random byte of one file after another and puts it back: `hits` times in each file, then `more` times
    in those that say what the store is. A store with fewer `shards` than it should have is unfinished."""
    files, rng, silent = LocalFiles(root), random.Random(0), []
    root.mkdir()
    begin(files, size)
    fill(files, range(shards))
    if not Store.open(root).missing:
        finish_store(files, Store.open(root).spec)
    counts = Counter(error=0, wrong=0, right=0)
    if seen_by_verify(root) or read_everything(root) != "right":
        silent.append("was damaged from the beginning")
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    top = [path for path in paths if path.parent in (root, root / "manifest")]
    for number in range(hits * len(paths) + more):
        path = paths[number % len(paths)] if number < hits * len(paths) else rng.choice(top)
        before = path.read_bytes()
        at = rng.randrange(len(before))
        after = before[:at] + bytes([(before[at] + rng.randint(1, 255)) % 256]) + before[at + 1 :]
        path.write_bytes(after)
        outcome = read_everything(root)
        counts[outcome] += 1
        if not seen_by_verify(root) or outcome == "wrong":
            silent.append(f"{path.relative_to(root)}: byte {at} is {after[at]}, was {before[at]}; read: {outcome}")
        path.write_bytes(before)
    return {**counts, "paths": [path.relative_to(root).as_posix() for path in paths], "silent": silent}


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a store but its lock."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def main(command: str, folder: str, size: str, *rest: str) -> Any:
    root, how_large, numbers = Path(folder), Size(**json.loads(size)), [float(text) for text in rest]
    if command == "write":
        started = time.monotonic()
        write(root, how_large)
        return time.monotonic() - started
    if command == "kill":
        return kill_again_and_again(root, how_large, int(numbers[0]), numbers[1])
    if command == "pair":
        return pair(root, int(numbers[0]), numbers[1])
    if command == "damage":
        return damage(root, how_large, int(numbers[0]), int(numbers[1]), int(numbers[2]))
    return follow(root) if command == "follow" else kill_at_every_step(root, how_large)


def unfinish(root: Path, shards: int) -> Path:
    """Takes a final store back to the moment after so many commits. Gives the writer's log."""
    lines = read_lines(root)
    write_state(LocalFiles(root), Store.open(root).spec, "writing")
    log = root / "manifest" / "rank-00000.jsonl"
    log.write_bytes(b"".join(lines[:shards]))
    (root / INDEX).unlink()
    return log


def read_lines(root: Path) -> list[bytes]:
    """Of a final store's manifest."""
    return (root / INDEX).read_bytes().splitlines(keepends=True)


def files_of(store: Store, shard: int) -> list[str]:
    """Every file of a shard, sorted."""
    layouts = store.spec.layouts()
    matrix = {path: path not in layouts or bool(layouts[path].row_shape) for path in store.spec.arrays()}
    return sorted(shard_file(path, shard, matrix[path]) for path in matrix)


def alter(path: Path, at: int = 20) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def harvest_again(model: Path) -> list[str]:
    """The command that makes the store which conftest.py has as a fixture, but for --out and --name."""
    return ["harvest", "--model", str(model), "--context", "16", "--tokens", "5000", "--device", "cpu", "--set",
            "chunk_rows=64", "--set", "shard_rows=512", "--set", "batch_tokens=128"]  # fmt: skip


def job(command: str, root: Path, size: Size, *numbers: float) -> subprocess.Popen[str]:
    """For a test: this script in a process of its own, in which nothing starts a thread."""
    words = [sys.executable, __file__, command, str(root), json.dumps(asdict(size)), *map(str, numbers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> Any:
    """What the script counted, in words for the log too."""
    output, _ = process.communicate(timeout=200)
    sys.stdout.write(f"{output}\n")
    if process.returncode:
        raise AssertionError(f"{process.args!r} failed")
    return json.loads(output)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
