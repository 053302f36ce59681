"""The shipped model's stores of 4,096 rows a shard, and what was captured for them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import harvest.run
from harvest.capture import Capture
from shared.config import HarvestConfig

SHARD = 4096


def tiny(out: Path, name: str, shards: float, **changes: Any) -> HarvestConfig:
    """A harvest of the shipped model."""
    values: dict[str, Any] = {
        "model": "tiny", "layers": (1,), "hooks": ("mlp_out",), "tokens": int(shards * SHARD), "chunk_rows": 1024,
        "shard_rows": SHARD, "batch_tokens": 2048, "device": "cpu", "dtype": "float32", "out": str(out), "name": name,
        **changes,
    }  # fmt: skip
    return HarvestConfig(**values)


@contextmanager
def counted_shards() -> Iterator[list[int]]:
    """The numbers of the shards that are captured inside the block."""
    captured: list[int] = []
    real = Capture.shard
    with pytest.MonkeyPatch.context() as patch:

        def shard(self: Capture, number: int, *rest: Any) -> Any:
            captured.append(number)
            return real(self, number, *rest)

        patch.setattr(Capture, "shard", shard)
        yield captured


@contextmanager
def no_model() -> Iterator[None]:
    """No weights may be loaded inside the block."""

    def load(*_: Any) -> Any:
        raise AssertionError("weights were loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest.run, "load_weights", load)
        patch.setattr("harvest.fill.side_by_side", load)
        yield


def comparable(root: Path) -> dict[str, Any]:
    """Every byte of a store, but its record, its lock, and how many documents were read for it."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if name not in ("record.json", ".lock"):
            found[name] = path.read_bytes()
    document = json.loads(found["zarr.json"])
    about = document["attributes"]["sagsae"]
    about.pop("crc32c")
    for key in ("documents", "empty_documents", "bad_documents"):
        about["corpus"].pop(key, None)
    return {**found, "zarr.json": document}


def own_bytes(root: Path) -> int:
    """Bytes on disk that no other store shares."""
    return sum(at.stat().st_blocks * 512 for at in root.rglob("*") if at.is_file() and at.stat().st_nlink == 1)
