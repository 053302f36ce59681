"""Small real stores, damaged with every checksum made to match: for tests/faults/test_fuzz_stores.py.

As a script (`python hostile.py CODEC SEED CASES`) it damages a store so often, asks `verify --full` and every reader
what they say, and prints as JSON what it counted. It runs in a process of its own: a crash or a hang is its end.
"""

import copy
import faulthandler
import hashlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harvest.recode import recode
from harvest.writer import ShardRows, ShardWriter
from shared.errors import DamagedError, Interrupted, UserError
from shared.files.local import LocalFiles
from shared.store.create import building, create_store, finish_store, place_tokens, write_tokens
from shared.store.listing import describe_store
from shared.store.manifest import INDEX, METADATA, sealed
from shared.store.opened import Store
from shared.store.quantise import dequantise
from shared.store.reader import open_reader, read_shard
from shared.store.shard import (
    MISSING,
    ShardLayout,
    as_float32,
    crc32,
    encode_chunk,
    with_crc,
)
from shared.store.spec import HookSpec, StoreSpec, as_bytes, rows_that_count, seal, token_layout
from shared.store.verify import verify

CONTEXT, VOCABULARY, ROWS = 16, 500, 150
SECONDS = 20
"""A case that takes longer hangs."""
MEMORY = 3 << 30
"""Bytes of address space beyond what the process has at the start."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
KINDS = ("zstd", "lz4", "none", "int8")


def make(root: Path, codec: str, hooks: tuple[str, ...] = ("layer_00/mlp_out", "layer_01/attn.hook_z")) -> Path:
    """Three shards, the last one short, written by the product's own writer."""
    files, rng = LocalFiles(root), np.random.default_rng(0)
    root.mkdir(parents=True)
    ids = (np.arange(-(-ROWS // CONTEXT) * CONTEXT).reshape(-1, CONTEXT) * 7919 % VOCABULARY).astype("<u2")
    ids[:, 0] = 1
    with building(files) as folder:
        tokens = write_tokens(folder, [ids], CONTEXT, VOCABULARY)
        place_tokens(files, tokens)
    spec = StoreSpec.model_validate({
        "model": {"name": "made", "commit": "0" * 32, "local": True, "dtype": "float32", "attention": "sdpa"},
        "tokenizer": {}, "corpus": {"ids_blake2b": tokens.digest, "vocab_size": VOCABULARY}, "context": CONTEXT,
        "bos_id": 1, "special_ids": (0, 3), "n_tokens": ROWS, "token_dtype": tokens.dtype,
        "hookpoints": {hook: HookSpec(name=f"blocks.0.{n}", d_in=12) for n, hook in enumerate(hooks)},
        "dtype": "bfloat16", "codec": codec, "chunk_rows": 16, "shard_rows": 64, "seed": 5,
    })  # fmt: skip
    create_store(files, spec, tokens.files, {"command": "none"})
    keep = rows_that_count(ids, spec)
    writer = ShardWriter(files, spec, keep, threads=1)
    for shard in range(spec.n_shards):
        start, stop = spec.shard_range(shard)
        rows = {}
        for hook in hooks:
            bits = (rng.standard_normal((stop - start, 12)).astype("<f4").view("<u4") >> 16).astype("<u2")
            x = as_float32(bits, "bfloat16").astype("f8")
            counted = x[keep.reshape(-1)[start:stop]]
            norms = np.sqrt(np.square(x).sum(axis=1)).astype("f4")
            rows[hook] = ShardRows(bits, norms, counted.sum(axis=0), np.square(counted).sum(axis=0))
        writer.commit(shard, rows)
    writer.close()
    finish_store(files, spec)
    return root


# Sealing again


def respec(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the store's zarr.json by `change(attributes.sagsae)` and seals it."""
    document = json.loads((root / "zarr.json").read_bytes())
    about = document["attributes"]["sagsae"]
    about.pop("crc32c")
    new = changed(about, change)
    document["attributes"]["sagsae"] = seal(new) if isinstance(new, dict) else new
    (root / "zarr.json").write_bytes(as_bytes(document))


def relines(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Changes the commits by `change(list)` and seals each."""
    bodies = [json.loads(line) for line in (root / INDEX).read_bytes().splitlines()]
    for body in bodies:
        del body["c"]
    (root / INDEX).write_text("".join(sealed(body) for body in changed(bodies, change)))


def remeta(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the entries of metadata.json by `change(files)` and seals it."""
    body = json.loads((root / METADATA).read_bytes())
    del body["c"]
    body["files"] = changed(body["files"], change)
    (root / METADATA).write_text(sealed(body))


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    found = change(value)
    return value if found is None else found


def refile(root: Path, path: str, data: bytes) -> None:
    """Other bytes in a file of a shard or of metadata.json, and their checksums."""
    (root / path).write_bytes(data)
    entry = {"bytes": len(data), "crc32": crc32(data)}
    array, chunk, place = path.rpartition("/c/")
    shard = int(place.split("/")[0]) if chunk else -1

    def of_commit(bodies: list[dict[str, Any]]) -> None:
        for body in bodies:
            if body["k"] == shard:
                body["files"][array] = entry

    if chunk and not path.startswith("tokens/"):
        relines(root, of_commit)
    else:
        remeta(root, lambda files: files.update({path: entry}))


# Damages


def wrong_value(rng: random.Random, value: Any) -> Any:
    """Another value, of any type and size."""
    choices: list[Any] = [
        None, True, False, 0, 1, -1, 2**31, 2**62, 2**64, 10**400, 1e308, 0.5, 4096.0, "", "x" * 300, "../../x", "/etc",
        "\x00", "\ud800", "4096", [], {}, [1, 2], {"a": {}}, nest(30), nest(5000), "zstd", "int8", "uint32", "float16",
    ]  # fmt: skip
    if isinstance(value, int) and not isinstance(value, bool):
        choices += [value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)] * 3
    if isinstance(value, str):
        choices += [value[:-1], value + "x", value.upper(), value.swapcase(), f"{value}/.."] * 2
    if isinstance(value, list):
        choices += [value[:-1], value * 2, value[::-1], [value]] * 3
    return rng.choice(choices)


def nest(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def damage_json(rng: random.Random, value: Any) -> Any:
    """A copy with one member replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value or rng.random() < 0.02:
        return wrong_value(rng, value)
    place = value
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inside = place[key]
        if isinstance(inside, dict | list) and inside and rng.random() < 0.85:
            place = inside
            continue
        break
    how = rng.random()
    if how < 0.6:
        place[key] = wrong_value(rng, inside)
    elif how < 0.8:
        del place[key]
    elif isinstance(place, dict):
        name = rng.choice(["extra", "", "../x", "layer_09/x", "c", str(key) + "/..", str(key).upper()])
        place[name] = wrong_value(rng, inside) if rng.random() < 0.5 else inside
    else:
        place.insert(rng.randrange(len(place) + 1), wrong_value(rng, inside))
    return value


def dumped(value: Any) -> str:
    """JSON of any depth."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        return json.dumps(value, separators=(",", ":"))
    finally:
        sys.setrecursionlimit(limit)


def damage_document(rng: random.Random, root: Path) -> str:
    """One of the JSON files."""
    documents = sorted(path.relative_to(root).as_posix() for path in root.rglob("zarr.json"))
    path = rng.choice(["zarr.json"] * 12 + [INDEX] * 8 + [METADATA] * 4 + ["record.json"] * 2 + documents)
    data = (root / path).read_bytes()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        if path == "zarr.json":
            respec(root, lambda about: damage_json(rng, about))
        elif path == INDEX:
            relines(root, lambda bodies: [damage_json(rng, body) if not n else body for n, body in enumerate(bodies)])
        elif path == METADATA:
            remeta(root, lambda files: damage_json(rng, files))
        elif path == "record.json":
            (root / path).write_text(dumped(damage_json(rng, json.loads(data))))
        else:
            refile(root, path, dumped(damage_json(rng, json.loads(data))).encode())
    finally:
        sys.setrecursionlimit(limit)
    return path


def damage_bytes(rng: random.Random, root: Path) -> str:
    """A chunk, an index or the header of a blosc buffer, with right checksums around it."""
    path = rng.choice(binary_files(root))
    data = bytearray((root / path).read_bytes())
    store = Store.open(root)
    layout = store.spec.layouts().get(path.rpartition("/c/")[0])
    if layout is None:  # one chunk, and its crc32c
        refile(root, path, with_crc(damage_buffer(rng, bytes(data[:-4]))))
        return path
    end = len(data) - layout.index_bytes
    index = np.frombuffer(data[end:-4], "<u8").reshape(-1, 2).copy()
    if rng.random() < 0.25:
        index[rng.randrange(len(index)), rng.randrange(2)] = rng.choice(
            [0, 1, 4, end, end - 1, end + 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, rng.randrange(end + 40)]
        )
        refile(root, path, bytes(data[:end]) + with_crc(index.tobytes()))
        return path
    number = rng.choice(np.flatnonzero(index[:, 0] != MISSING).tolist())
    chunks = [bytes(data[o : o + n - 4]) for o, n in index[index[:, 0] != MISSING].tolist()]
    chunks[number] = damage_buffer(rng, chunks[number])
    refile(root, path, joined(chunks, layout))
    return path


def joined(chunks: list[bytes], layout: ShardLayout) -> bytes:
    """The file of a shard of encoded chunks."""
    index, parts, at = np.full((layout.chunks_per_shard, 2), MISSING, "<u8"), [], 0
    for number, chunk in enumerate(chunks):
        parts.append(with_crc(chunk))
        index[number] = at, len(parts[-1])
        at += len(parts[-1])
    return b"".join(parts) + with_crc(index.tobytes())


def damage_buffer(rng: random.Random, data: bytes) -> bytes:
    """Encoded values: flipped, cut, longer, or with another word in the header or where blocks begin."""
    changed_data, how = bytearray(data), rng.random()
    if how < 0.3 and len(data):
        changed_data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how < 0.7 and len(data) >= 24:
        at = rng.choice([0, 1, 2, 3, 4, 8, 12, 16, 20, rng.randrange(len(data) - 4)])
        word = rng.choice([0, 1, 16, 20, len(data), len(data) - 16, 2**31 - 1, 2**31, 2**32 - 1, rng.getrandbits(32)])
        size = 1 if at < 4 else 4
        changed_data[at : at + size] = word.to_bytes(4, "little")[:size]
    elif how < 0.85:
        del changed_data[rng.randrange(len(data) + 1) :]
    else:
        changed_data += rng.randbytes(rng.choice([1, 4, 16, 100]))
    return bytes(changed_data)


def damage_value(rng: random.Random, root: Path) -> str:
    """One number of an array, which is encoded anew."""
    store = Store.open(root)
    path = rng.choice([path for path in binary_files(root) if not path.startswith("tokens/")])
    array, _, place = path.rpartition("/c/")
    shard = int(place.split("/")[0])
    layout = store.spec.layouts().get(array)
    if layout is None:
        row = store.row_of_shard(array, shard)
        at = rng.randrange(row.size)
        row[at] = rng.choice([0, np.nan, np.inf, -row[at], row[at] * 2, row[at] + 1, row[at] * 1.001, 1e300])
        refile(root, path, with_crc(row.tobytes()))
        return path
    rows = read_shard(open_reader(store, array), shard)
    whole = np.full((layout.shard_rows, *layout.row_shape), layout.fill, layout.dtype)
    whole[: len(rows)] = rows
    flat = whole[: len(rows)].reshape(-1)
    at = rng.randrange(flat.size)
    if layout.dtype.kind == "f":
        flat[at] = rng.choice([0, np.nan, np.inf, -flat[at], flat[at] * 2, flat[at] * 1.01])
    else:
        bits = 8 * layout.dtype.itemsize
        flat[at] ^= layout.dtype.type(rng.choice([1 << rng.randrange(bits - 1), (1 << bits - 1) - 1]))
    count = -(-len(rows) // layout.chunk_rows)
    parts = [whole[n * layout.chunk_rows : (n + 1) * layout.chunk_rows] for n in range(count)]
    refile(root, path, joined([encode_chunk(np.ascontiguousarray(part), layout.codec) for part in parts], layout))
    return path


def damage_tokens(rng: random.Random, root: Path) -> str:
    """One token id, with the digest of them all."""
    store = Store.open(root)
    ids, layout = store.tokens().copy(), token_layout(store.spec.context, store.spec.token_dtype)
    ids.reshape(-1)[rng.randrange(ids.size)] = rng.choice([0, 3, 1, VOCABULARY, 65535, rng.randrange(VOCABULARY)])
    whole = np.zeros((layout.chunk_rows, store.spec.context), layout.dtype)
    whole[: len(ids)] = ids
    refile(root, "tokens/c/0/0", with_crc(encode_chunk(whole, layout.codec)))
    if rng.random() < 0.8:
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
        respec(root, lambda about: about["corpus"].update(ids_blake2b=digest))
    return "tokens"


def swap_files(rng: random.Random, root: Path) -> str:
    """The files of two shards in one another's place."""
    path = rng.choice([path for path in binary_files(root) if "/c/0" in path and not path.startswith("tokens/")])
    other = path.replace("/c/0", "/c/1")
    first, second = (root / path).read_bytes(), (root / other).read_bytes()
    refile(root, path, second)
    refile(root, other, first)
    return path


def binary_files(root: Path) -> list[str]:
    files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(path for path in files if "/c/" in path)


DAMAGES = [damage_document] * 5 + [damage_bytes] * 3 + [damage_value] * 3 + [damage_tokens, swap_files]


# What they say


UNPROTECTED = ("model", "tokenizer", "corpus", "chunk_rows", "special_ids")
"""Members of the spec that nothing else in a store tells (docs/explanation/threat-model.md); special ids as far
as they do not change which rows count, which is compared."""


def values(store: Store) -> dict[str, Any]:
    """All that a store's readers use, in the order of the token stream."""
    spec = store.spec
    found: dict[str, Any] = {"spec": {k: v for k, v in spec.model_dump().items() if k not in UNPROTECTED}}
    tokens = store.tokens()
    found["tokens"] = tokens
    found["counts"] = rows_that_count(tokens, spec).reshape(-1)[: spec.n_tokens]
    found["commits"] = [(c.shard, c.rows, c.kept, c.nonfinite) for c in store.commits.values()]
    index = [concatenated(store, f"index/{name}").astype("i8") for name in ("context", "position")]
    found["stream"] = index[0] * spec.context + index[1]
    for hook in spec.hookpoints:
        found[f"stats/{hook}/norm"] = concatenated(store, f"stats/{hook}/norm")
        rows = concatenated(store, hook)
        if spec.quantised:
            dim = np.repeat([store.dim_scale(hook, k) for k in store.commits], shard_rows(store), axis=0)
            found[hook] = dequantise(rows, concatenated(store, f"scale/{hook}/row"), dim)
        else:
            found[hook] = as_float32(rows, spec.dtype)
    for array in store.row_kinds:
        found[array] = np.stack([store.row_of_shard(array, shard) for shard in store.commits])
    return found


def shard_rows(store: Store) -> list[int]:
    return [commit.rows for commit in store.commits.values()]


def concatenated(store: Store, array: str) -> np.ndarray:
    return np.concatenate([read_shard(open_reader(store, array), shard) for shard in store.commits])


def differences(found: dict[str, Any], right: dict[str, Any], quantised: bool) -> list[str]:
    """What is not as it was written, beyond the bounds that docs/explanation/threat-model.md states."""
    if found.keys() != right.keys():
        return ["arrays"]
    names = [f"spec: {n}" for n, value in right["spec"].items() if found["spec"][n] != value]
    names += ["commits"] if found["commits"] != right["commits"] else []
    names += [n for n in ("counts", "stream") if not np.array_equal(found[n], right[n])]
    counted = right["counts"][right["stream"]]
    for name, expected in right.items():
        if name in ("spec", "commits", "counts", "stream", "tokens"):
            continue
        if found[name].shape != expected.shape:
            names.append(name)
            continue
        with np.errstate(all="ignore"):
            scale = np.sqrt(np.square(right[hook_of(name)][counted].astype("f8")).sum(axis=0) * len(counted))
            if name.endswith("/norm"):
                bound = (0.3 if quantised else 1e-6) * expected
            elif name.startswith("stats/"):
                bound = (0.05 if quantised and not name.endswith("_squares") else 3e-6) * (scale + np.abs(expected))
            elif name.startswith("scale/"):
                bound = 3e-7 * expected
            else:
                bound = np.where(counted[:, None], (0.5 if quantised else 1e-6) * scale, np.inf)
            if not (np.abs(found[name].astype("f8") - expected) <= bound).all():
                names.append(name)
    return names


def hook_of(array: str) -> str:
    return "/".join(array.split("/")[1:3]) if array.startswith(("stats/", "scale/")) else array


def outcome(root: Path, right: dict[str, Any], everything: bool) -> str:
    """`found`, `same` or `silent: …`; anything else that is raised is a fault."""
    try:
        lines = verify(Store.open(root, lenient=True), full=True).lines
        assert all(len(line) < 2000 for line in lines), "a message repeats a file"
    except (UserError, DamagedError):
        lines = ["refused"]
    said = "found" if lines else "same"
    try:
        store = Store.open(root)
        wrong = differences(values(store), right, store.spec.quantised)
    except (UserError, DamagedError):
        wrong = []
        if not lines:
            return "silent: verify says nothing of what readers refuse"
    if everything:
        use(root)
    return said if lines or not wrong else f"silent: {', '.join(wrong)}"


def use(root: Path) -> None:
    """What a person may do with a store. Refusals are fine."""
    for act in (describe_store, recoded, rows_for_training):
        try:
            act(root)
        except (UserError, DamagedError, Interrupted):
            continue


def recoded(root: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        before = set(root.parent.iterdir())
        try:
            recode(str(root), str(Path(folder) / "target"), "none")
        finally:
            assert {path.name for path in Path(folder).iterdir()} <= {"target"}, "written outside the destination"
            assert set(root.parent.iterdir()) == before


def rows_for_training(root: Path) -> None:
    from train.data.rows import HookRows, KeptRows

    store = Store.open(root)
    for hook in store.spec.hookpoints:
        kept = KeptRows(HookRows.of(store, hook), rows_that_count(store.tokens(), store.spec))
        for shard in store.commits:
            kept.values(shard, 0)
        store.statistics(hook)


def fuzz(codec: str, seed: int, cases: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder) / "s", codec)
        pristine = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        right = values(Store.open(root))
        assert outcome(root, right, True) == "same"
        counts: dict[str, int] = {}
        faults = []
        for case in range(cases):
            rng = random.Random(seed * 1_000_003 + case)
            damage = rng.choice(DAMAGES)
            with np.errstate(all="ignore"):
                where = damage(rng, root)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                said = outcome(root, right, case % 4 == 0)
            except BaseException:
                said = f"fault: {traceback.format_exc()[-1500:]}"
            signal.setitimer(signal.ITIMER_REAL, 0)
            kind = said.split(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            if kind not in ("found", "same"):
                faults.append(f"case {case}, {damage.__name__}, {where}: {said}")
            restore(root, pristine)
        return {"counts": counts, "faults": faults[:20]}


def restore(root: Path, pristine: dict[Path, bytes]) -> None:
    for path in list(root.rglob("*")):
        if path.is_file() and path not in pristine:
            path.unlink()
    for path, data in pristine.items():
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def hang(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def not_synced(fd: object) -> None:
    """What is deleted in a moment needs no fsync."""


def main(codec: str, seed: str, cases: str) -> None:
    faulthandler.enable()
    os.fsync = not_synced
    signal.signal(signal.SIGALRM, hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.stdout.write(json.dumps(fuzz(codec, int(seed), int(cases))))


if __name__ == "__main__":
    import train.data.rows  # noqa: F401 (before the memory is bounded)

    main(*sys.argv[1:])
