"""A reader of store format 2 written from docs/reference/store-format.md alone: without the product and Zarr libraries.

It stands for a reader in another language: where it agrees with the product's, the specification says enough. It is
slow and strict: every checksum is compared and every byte of a shard accounted for.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

TABLE = list(range(256))
for _ in range(8):
    TABLE = [word >> 1 ^ (0x82F63B78 if word & 1 else 0) for word in TABLE]
INDEX = {"context": "<u4", "position": "<u2"}
DTYPES = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}


def check(holds: Any, what: object) -> None:
    if not holds:
        raise ValueError(f"not as it was written: {what}")


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[crc & 255 ^ byte] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def payload(data: bytes, what: object) -> bytes:
    check(len(data) >= 4 and crc32c(data[:-4]) == int.from_bytes(data[-4:], "little"), what)
    return data[:-4]


def unsealed(value: dict[str, Any], what: object) -> dict[str, Any]:
    body = {key: member for key, member in value.items() if key != "crc32c"}
    check(crc32c(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()) == value.get("crc32c"), what)
    return body


def sealed_lines(data: bytes) -> list[dict[str, Any]]:
    """A line that is torn or altered is empty."""
    *lines, rest = data.split(b"\n")
    parts = [line.rpartition(b',"c":') for line in lines] + [(b"", b"", b"")] * bool(rest)
    return [json.loads(t + b"}") if t and crc == b"%d}" % crc32c(t + b"}") else {} for t, _, crc in parts]


class Reader:
    def __init__(self, root: Path) -> None:
        self.root, document = root, json.loads((root / "zarr.json").read_bytes())
        spec = self.spec = unsealed(document["attributes"]["sagsae"], "zarr.json")
        unsealed(json.loads((root / "record.json").read_bytes()), "record.json")
        metadata, *rest = sealed_lines((root / "manifest/metadata.json").read_bytes())
        versions = document["zarr_format"], document["node_type"], spec["format_version"], metadata.get("v"), *rest
        check(versions == (3, "group", 2, 1), "zarr.json or metadata.json")
        for path, entry in metadata["files"].items():
            self.file(path, entry)
        self.commits, self.shard_rows, self.n = self.manifest(), spec["shard_rows"], spec["n_tokens"]
        check(spec["state"] == "writing" or len(self.commits) == -(-self.n // self.shard_rows), "manifest: shards")

    def manifest(self) -> dict[int, dict[str, Any]]:
        folder, final = self.root / "manifest", self.spec["state"] == "final"
        commits: dict[int, dict[str, Any]] = {}
        index = folder / "index.jsonl"
        for log in [index] * (final or index.exists()) + ([] if final else sorted(folder.glob("rank-*.jsonl"))):
            bodies = sealed_lines(log.read_bytes())
            bodies = bodies[:-1] if log != index and bodies[-1:] == [{}] else bodies
            check(all(body.get("v") == 1 for body in bodies), log)
            commits |= {body["k"]: body for body in bodies}
        return dict(sorted(commits.items()))

    def file(self, path: str, entry: dict[str, int]) -> bytes:
        data = (self.root / path).read_bytes() if (self.root / path).is_file() else b""
        check(len(data) == entry["bytes"] and zlib.crc32(data) == entry["crc32"], path)
        return data

    def rows(self, array: str, kind: Any, chunk_rows: int, packed: bool = True) -> np.ndarray:
        """Of every committed shard, as stored. `kind` is the data type of a row."""
        kind, shards = np.dtype(kind), []
        for shard, commit in self.commits.items():
            path = f"{array}/c/{shard}" + "/0" * len(kind.shape)
            data, used = self.file(path, commit["files"][array]), -(-commit["rows"] // chunk_rows)
            chunks = self.chunks(data, path, used, self.shard_rows // chunk_rows)
            parts = [np.frombuffer(blosc.decompress(chunk) if packed else chunk, kind) for chunk in chunks]
            check({len(part) for part in parts} == {chunk_rows}, path)
            shards.append(np.concatenate(parts)[: commit["rows"]])
        return np.concatenate(shards)

    def chunks(self, data: bytes, path: str, used: int, entries: int) -> Iterator[bytes]:
        at, end = 0, len(data) - 16 * entries - 4
        index = np.frombuffer(payload(data[end:], path), "<u8").reshape(entries, 2)
        for offset, length in index[:used].tolist():
            check(offset == at, path)
            at += length
            yield payload(data[offset:at], path)
        check(at == end and (index[used:] == 2**64 - 1).all(), path)

    def row_of_shard(self, array: str, kind: str) -> np.ndarray:
        """[committed shards, d_in] of an array with one row a shard."""
        data = [self.file(f"{array}/c/{shard}/0", c["files"][array]) for shard, c in self.commits.items()]
        return np.stack([np.frombuffer(payload(row, array), kind) for row in data])

    def stream(self) -> NDArray[Any]:
        """The place in the token stream of each row."""
        contexts, positions = (self.rows(f"index/{n}", t, self.shard_rows) for n, t in INDEX.items())
        rows: NDArray[Any] = contexts.astype("<i8") * self.spec["context"] + positions
        orders = []
        for shard, commit in self.commits.items():
            start, stop = shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.n)
            check(commit["in"] == [start, stop], commit)
            words = np.random.Philox(np.random.SeedSequence(self.spec["seed"], spawn_key=(1, shard))).random_raw
            orders.append(start + np.argsort(words(stop - start), kind="stable"))
        check((rows == np.concatenate(orders)).all(), "the rows are in another order than the specified one")
        return rows

    def activations(self, hook: str) -> NDArray[Any]:
        d_in, chunk_rows, codec = self.spec["hookpoints"][hook]["d_in"], self.spec["chunk_rows"], self.spec["codec"]
        if codec == "int8":
            q = self.rows(hook, ("i1", (d_in,)), chunk_rows, False).astype("<f4")
            row = self.rows(f"scale/{hook}/row", "<f4", chunk_rows)[:, None]
            dim = self.row_of_shard(f"scale/{hook}/dim", "<f4")
            values: NDArray[Any] = (
                q * row * np.repeat(dim, [commit["rows"] for commit in self.commits.values()], axis=0)
            )
            return values
        x = self.rows(hook, (DTYPES[self.spec["dtype"]], (d_in,)), chunk_rows, codec != "none")
        return (x.astype("<u4") << 16).view("<f4") if self.spec["dtype"] == "bfloat16" else x.astype("<f4")

    def tokens(self) -> np.ndarray:
        context, dtype = self.spec["context"], np.dtype(self.spec["token_dtype"]).newbyteorder("<")
        rows, chunk_rows = -(-self.n // context), max(1, 2**20 // context)
        files = [self.root / f"tokens/c/{chunk}/0" for chunk in range(-(-rows // chunk_rows))]
        data = b"".join(blosc.decompress(payload(file.read_bytes(), file)) for file in files)
        ids = np.frombuffer(data, dtype)[: rows * context].reshape(rows, context)
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
        check(digest == self.spec["corpus"]["ids_blake2b"], "tokens")
        return ids


def read_store(root: Path) -> dict[str, np.ndarray]:
    """All that is committed. What has a row a token is in token order, activations as float32."""
    store = Reader(root)
    stream = store.stream()
    order, found = np.argsort(stream), {"tokens": store.tokens()}
    for hook in store.spec["hookpoints"]:
        found[hook] = store.activations(hook)[order]
        found[f"stats/{hook}/norm"] = store.rows(f"stats/{hook}/norm", "<f4", store.shard_rows)[order]
        for name in ["sum", "sum_of_squares"] + ["sum_of_squared_error"] * (store.spec["codec"] == "int8"):
            found[f"stats/{hook}/{name}"] = store.row_of_shard(f"stats/{hook}/{name}", "<f8")
    return {**found, "stream": stream[order]}
