"""The store on disk: what is where and what was committed. The one door to Zarr.

docs/store-format.md is the specification. Three rules carry the weight. The manifest, never the file system or an
array's shape, says what exists: in Zarr a missing shard silently reads as fill values. A shard counts once its files
are complete, synced and renamed and its manifest line is synced. Every chunk read is checked against its crc32c.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.config import Frozen
from shared.errors import DamagedError, UserError
from shared.manifest import LOCK_FILE, Commit, read_manifest, read_range, sync_folder, write_file, writer_lock
from shared.shard import CODECS, Layout, crc32c, without_crc

FORMAT_VERSION: Final = 1
STATE_FILE: Final = "zarr.json"
BUILDING: Final = "tokens.building"
OURS: Final = {LOCK_FILE, STATE_FILE, BUILDING, "tokens", "index", "stats", "manifest", "record.json"}

# bf16 has no Zarr v3 data type that zarr-python knows: its bit pattern is stored as uint16. The fill values are NaN,
# so that reading what was never written is loud.
DTYPES: Final[dict[str, tuple[np.dtype[Any], float | int]]] = {
    "bfloat16": (np.dtype("<u2"), 0x7FC0),
    "float16": (np.dtype("<f2"), float("nan")),
    "float32": (np.dtype("<f4"), float("nan")),
}


class HookSpec(Frozen):
    name: str
    """TransformerLens name, such as `blocks.8.hook_mlp_out`."""
    d_in: int


class StoreSpec(Frozen):
    """What a store is: everything that decides its bytes. Two harvests with equal specs write equal stores."""

    format_version: int = FORMAT_VERSION
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    corpus: dict[str, Any]
    context: int
    bos_id: int | None
    special_ids: tuple[int, ...]
    n_tokens: int
    hookpoints: dict[str, HookSpec]
    """By path inside the store, such as `layer_08/mlp_out`."""
    dtype: Literal["bfloat16", "float16", "float32"]
    codec: Literal["zstd", "lz4", "none"]
    chunk_rows: int
    shard_rows: int
    seed: int

    @property
    def n_shards(self) -> int:
        return -(-self.n_tokens // self.shard_rows)

    @property
    def n_contexts(self) -> int:
        return -(-self.n_tokens // self.context)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The slice of the token stream that a shard holds (in permuted order)."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.n_tokens)

    def layouts(self) -> dict[str, Layout]:
        """Every sharded array: hookpoints, their row norms, and where each row came from."""
        per_shard = self.shard_rows // self.chunk_rows
        dtype, fill = DTYPES[self.dtype]
        layouts = {}
        for path, hook in self.hookpoints.items():
            layouts[path] = Layout(self.chunk_rows, per_shard, (hook.d_in,), dtype, self.codec, fill)
            layouts[f"stats/{path}/norm"] = Layout(
                self.chunk_rows, per_shard, (), np.dtype("<f4"), "zstd", float("nan")
            )
        for name, index_dtype in (("context", "<u4"), ("position", "<u2")):
            dtype = np.dtype(index_dtype)
            layouts[f"index/{name}"] = Layout(self.chunk_rows, per_shard, (), dtype, "zstd", int(np.iinfo(dtype).max))
        return layouts

    def sums(self) -> dict[str, int]:
        """The per-shard partial statistics, [n_shards, d_in] float64, one file a shard: path -> d_in."""
        return {
            f"stats/{path}/{name}": hook.d_in
            for path, hook in self.hookpoints.items()
            for name in ("sum", "sum_of_squares")
        }


def shard_file(root: Path, array: str, shard: int, ndim: int) -> Path:
    """`c/<shard>/0` for a matrix, `c/<shard>` for a vector: Zarr's default chunk keys."""
    folder = root / array / "c" / str(shard)
    return folder / "0" if ndim == 2 else folder


def create_store(root: Path, spec: StoreSpec) -> None:
    """Group and array metadata for an empty store. The group's own file comes last: with it, the store exists."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    def compressors(codec: str, itemsize: int) -> list[Any]:
        blosc = CODECS[codec]
        if blosc is None:
            return [Crc32cCodec()]
        return [BloscCodec(typesize=itemsize, **vars(blosc)), Crc32cCodec()]

    files = zarr.storage.LocalStore(root)
    rows = spec.shard_rows // spec.chunk_rows * spec.chunk_rows
    for path, layout in spec.layouts().items():
        hook = spec.hookpoints.get(path)
        zarr.create_array(
            files,
            name=path,
            shape=(spec.n_tokens, *layout.row_shape),
            dtype=layout.dtype,
            chunks=layout.chunk_shape,
            shards=(rows, *layout.row_shape),
            compressors=compressors(layout.codec, layout.dtype.itemsize),
            filters=None,
            fill_value=layout.fill,
            dimension_names=("token", "d_model")[: 1 + len(layout.row_shape)],
            attributes={"sagsae": {"logical_dtype": spec.dtype, "hook": hook.name}} if hook else {},
        )
    for path, d_in in spec.sums().items():
        zarr.create_array(
            files,
            name=path,
            shape=(spec.n_shards, d_in),
            dtype="<f8",
            chunks=(1, d_in),
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=float("nan"),
            dimension_names=("shard", "d_model"),
        )
    (root / "manifest").mkdir(exist_ok=True)
    write_state(root, spec, "writing")


def write_tokens(root: Path, blocks: Iterable[NDArray[Any]], context: int, vocab_size: int) -> tuple[int, str]:
    """Writes rows [n, context] beside whatever is in the folder; `place_tokens` puts them in their place. Gives the
    number of rows and a digest of the ids."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    building = root / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    array = zarr.create_array(
        building,
        shape=(0, context),
        dtype=dtype,
        chunks=(max(1, (1 << 20) // context), context),
        compressors=[BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
        filters=None,
        dimension_names=("context", "position"),
    )
    digest, rows = hashlib.blake2b(digest_size=16), 0
    for block in rebatched(blocks, array.chunks[0]):
        ids = block.astype(dtype)
        array.append(ids)
        digest.update(ids.tobytes())
        rows += len(ids)
    for file in building.rglob("*"):
        sync_folder(file)
    return rows, digest.hexdigest()


def place_tokens(root: Path) -> None:
    """Gives the rows that `write_tokens` wrote their final name."""
    (root / BUILDING).rename(root / "tokens")
    sync_folder(root)


def rebatched(blocks: Iterable[NDArray[Any]], rows: int) -> Iterator[NDArray[Any]]:
    """The same rows in blocks of `rows`, the last one shorter."""
    held: list[NDArray[Any]] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= rows:
            joined = np.concatenate(held)
            whole = len(joined) // rows * rows
            yield from np.split(joined[:whole], whole // rows)
            held = [joined[whole:]]
    if held and sum(map(len, held)):
        yield np.concatenate(held)


def write_state(root: Path, spec: StoreSpec, state: Literal["writing", "final"]) -> None:
    attributes = {"sagsae": {**spec.model_dump(mode="json"), "state": state}}
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    write_file(root / STATE_FILE, json.dumps(document, indent=2).encode() + b"\n")


def read_state(root: Path) -> tuple[StoreSpec, str]:
    """The spec and the state ("writing" or "final"). Raises UserError when `root` is not a store of ours."""
    try:
        attributes = json.loads((root / STATE_FILE).read_text(encoding="utf-8"))["attributes"]["sagsae"]
        state = attributes.pop("state")
        version = attributes["format_version"]
    except FileNotFoundError as error:
        what = "does not exist" if not root.exists() else "holds no store (there is no zarr.json in it)"
        raise UserError(f"{root}: {what}. Make a store with: sagsae harvest") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root}: is not a store written by sagsae harvest ({error!r} in zarr.json)") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{root}: is in store format {version}; this sagsae reads format {FORMAT_VERSION}. Install a newer sagsae"
        )
    try:
        return StoreSpec.model_validate(attributes), state
    except ValidationError as error:
        raise UserError(f"{root}: zarr.json does not describe a store ({error.errors()[0]['msg']})") from error


@dataclass(frozen=True)
class Statistics:
    """Exact moments of one hookpoint over the rows that count, accumulated in float64."""

    n: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    @property
    def scale(self) -> float:
        """sqrt(E|x - mean|^2): dividing by it makes the total variance one."""
        return float(np.sqrt(self.variance.sum()))


@dataclass(frozen=True)
class Store:
    """A store opened for reading: a frozen snapshot of what was committed when it was opened."""

    root: Path
    spec: StoreSpec
    state: str
    commits: dict[int, Commit]

    @classmethod
    def open(cls, root: Path) -> "Store":
        spec, state = read_state(root)
        return cls(root, spec, state, read_manifest(root))

    @property
    def missing(self) -> list[int]:
        """Shards that are planned but not committed."""
        return [shard for shard in range(self.spec.n_shards) if shard not in self.commits]

    @property
    def n_rows(self) -> int:
        return sum(commit.rows for commit in self.commits.values())

    @cached_property
    def snapshot_id(self) -> str:
        """Names this set of committed shards: equal ids mean equal bytes."""
        return f"{crc32c(''.join(commit.line() for commit in self.commits.values()).encode()):08x}-{len(self.commits)}"

    def tokens(self) -> NDArray[Any]:
        """Token ids [n_contexts, context], in corpus order. Raises DamagedError when they are not what was written."""
        import zarr

        try:
            ids = np.asarray(zarr.open_array(self.root / "tokens", mode="r")[:])
        except Exception as error:  # whatever a codec or a missing file raises
            raise DamagedError(f"{self.root / 'tokens'}: cannot be read ({error})") from error
        if hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest() != self.spec.corpus["ids_blake2b"]:
            raise DamagedError(f"{self.root / 'tokens'}: the token ids are not the ones that were written")
        return ids

    def statistics(self, hook: str) -> Statistics:
        """Of one hookpoint, over the committed shards. Raises UserError when too few rows count."""
        n = sum(commit.kept for commit in self.commits.values())
        if n < 2:
            raise UserError(f"{self.root}: {n} rows are committed; at least 2 are needed. Harvest more tokens")
        total, squares = (
            np.sum([self.sums(f"stats/{hook}/{name}", shard) for shard in self.commits], axis=0)
            for name in ("sum", "sum_of_squares")
        )
        mean = total / n
        return Statistics(n, mean, np.maximum(squares / n - mean**2, 0.0))

    def sums(self, path: str, shard: int) -> NDArray[np.float64]:
        file = shard_file(self.root, path, shard, 2)
        data = read_range(file, 0, None, self.commits[shard].files[path][0])
        return np.frombuffer(without_crc(data, str(file)), "<f8")


def find_hookpoint(path: Path, hook: str | None) -> tuple[Store, str]:
    """The store and the hookpoint that `--store PATH [--hook NAME]` means: PATH is a store, or an array in one."""
    path = Path(os.path.normpath(path))
    root = next((p for p in (path, *list(path.parents)[:3]) if is_store(p)), path)
    store = Store.open(root)
    names = list(store.spec.hookpoints)
    inside = path.relative_to(root).as_posix()
    wanted = hook if inside == "." else inside
    if inside != "." and hook not in (None, inside, inside.split("/")[-1]):
        raise UserError(f"--hook {hook}: --store {path} already says {inside}. Give one of the two")
    matches = [
        n for n in names if wanted is None or n == wanted or n.split("/")[-1] == wanted or n.startswith(f"{wanted}/")
    ]
    if len(matches) == 1:
        return store, matches[0]
    said = f"has no hookpoint {wanted!r}" if not matches else "holds several hookpoints"
    raise UserError(f"{root}: {said}. Say which one with --hook: {', '.join(matches or names)}")


def is_store(path: Path) -> bool:
    """Whether a harvest was begun here. Raises DamagedError when a zarr.json is there but cannot be read: a store that
    is out of reach for a moment must not be taken for an empty folder."""
    try:
        document = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path / STATE_FILE}: cannot be read ({error}). Restore it from a copy") from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    ours = attributes.get("sagsae") if isinstance(attributes, dict) else None
    return isinstance(ours, dict) and "state" in ours


def is_ours(name: str) -> bool:
    """Whether a store puts something of this name into its folder. Nothing else is ever deleted there."""
    return name in OURS or name.startswith("layer_") or name.endswith(".tmp")


def stored_bytes(store: Store, hook: str) -> int:
    return sum(commit.files[hook][0] for commit in store.commits.values())


def remove_store(root: Path) -> None:
    """Deletes a store that nobody is writing to. Its zarr.json goes first, so that a rest is never taken for one, and
    its lock last; the folder stays when it holds anything else."""
    read_state(root)
    with writer_lock(root):
        (root / STATE_FILE).unlink()
        clear_folder(root)
    (root / LOCK_FILE).unlink()
    if not any(root.iterdir()):
        root.rmdir()


def clear_folder(root: Path, keep: tuple[str, ...] = (LOCK_FILE,)) -> None:
    """Deletes all that a store puts into its folder, but for `keep`."""
    for path in root.iterdir():
        if is_ours(path.name) and path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
