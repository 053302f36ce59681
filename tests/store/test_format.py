"""The format of a store (docs/reference/store-format.md): its bytes stay what they are, a reader written from the
specification alone and four libraries read the same values, other codecs are read too, and a recode is what a harvest
would be.

golden/ holds one small store for each codec, in format 2. Its bytes may change only together with FORMAT_VERSION: a
store that somebody has written must not stop being readable. `pack_golden()` writes it anew.
"""

import io
import json
import random
import re
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.command import ROOT, Sagsae
from support.folders import contents
from support.spec_reader import crc32c, read_store
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import MemoryStore

import harvest.recode
from harvest.recode import recode
from harvest.run import harvest as run_harvest
from harvest.writer import ShardRows, ShardWriter
from shared.config import HarvestConfig
from shared.errors import DamagedError, Interrupted, UserError
from shared.files.local import LocalFiles
from shared.store.commits import Commits
from shared.store.create import building, create_store, finish_store, place_tokens, write_tokens
from shared.store.foreign import ZarrReader
from shared.store.manifest import Commit, parse_commit, read_metadata, write_index, write_metadata
from shared.store.opened import Store, write_state
from shared.store.quantise import LEVELS, dequantise, dim_scale, quantise
from shared.store.reader import ArrayReader, open_reader, read_shard
from shared.store.shard import CODECS, ShardLayout, as_float32, crc32, encode_shard
from shared.store.shard import crc32c as fast_crc32c
from shared.store.spec import DTYPES, HookSpec, StoreSpec, rows_that_count, shard_file, token_layout
from shared.store.verify import verify
from train.data.rows import HookRows, KeptRows

HOOK = "layer_01/mlp_out"
CODEC_NAMES = ("zstd", "lz4", "none", "int8")
Config = Callable[..., HarvestConfig]


@pytest.fixture(scope="session")
def harvested(store: Store, tmp_path_factory: pytest.TempPathFactory, harvest_config: Config) -> Callable[[str], Store]:
    """The session's store as a harvest with another codec writes it."""
    found = {"zstd": store}

    def get(codec: str) -> Store:
        if codec not in found:
            found[codec] = Store.open(run_harvest(harvest_config(tmp_path_factory.mktemp(codec), codec=codec)).store)
        return found[codec]

    return get


@pytest.fixture(scope="session")
def recoded(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Store]:
    """The session's store, written anew with another codec."""
    found = {"zstd": store}

    def get(codec: Any) -> Store:
        if codec not in found:
            found[codec] = Store.open(recode(str(store.root), str(tmp_path_factory.mktemp("re") / codec), codec).store)
        return found[codec]

    return get


def stored(store: Store, array: str) -> NDArray[Any]:
    """All rows of a sharded array, in stored order."""
    return np.concatenate([read_shard(open_reader(store, array), shard) for shard in store.commits])


def values(store: Store, hook: str) -> NDArray[np.float32]:
    """The numbers of a hookpoint, in stored order."""
    rows = HookRows.of(store, hook)
    chunks = {shard: -(-commit.rows // store.spec.chunk_rows) for shard, commit in store.commits.items()}
    parts = [rows.values(shard, chunk) for shard, n in chunks.items() for chunk in range(n)]
    return as_float32(np.concatenate(parts), "float32" if store.spec.quantised else store.spec.dtype)


def stream(store: Store) -> NDArray[np.int64]:
    """Where in the token stream each row comes from."""
    contexts, positions = (stored(store, f"index/{name}").astype(np.int64) for name in ("context", "position"))
    return np.asarray(contexts * store.spec.context + positions)


def as_read_by_the_product(store: Store) -> dict[str, NDArray[Any]]:
    """What `spec_reader.read_store` gives."""
    order = np.argsort(stream(store))
    found = {"tokens": store.tokens(), "stream": stream(store)[order]}
    for hook in store.spec.hookpoints:
        found[hook] = values(store, hook)[order]
        found[f"stats/{hook}/norm"] = stored(store, f"stats/{hook}/norm")[order]
    for array in store.spec.rows_of_shards():
        if array.startswith("stats/"):
            found[array] = np.stack([store.row_of_shard(array, shard) for shard in store.commits])
    return found


def assert_equal(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


# The golden stores


GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_RECORD = {"command": "none: written by tests/test_format.py", "naïve": [1.5, None, True]}


def golden_spec(codec: Any) -> StoreSpec:
    """Three shards of 4 chunks; the last is short, and so is the last of its two chunks. Blosc compresses nothing
    below 128 bytes, so that chunks are larger where it is used."""
    rows = 32 if codec in ("zstd", "lz4") else 4
    return StoreSpec(
        model={"name": "golden", "commit": None, "local": True, "dtype": "bfloat16"},
        tokenizer={"blake2b": "0" * 32, "eos_id": 0},
        corpus={"source": {"kind": "naïve"}, "shuffled": False, "documents": 3},
        context=8, bos_id=None, special_ids=(0,), n_tokens=8 * rows + rows * 3 // 2, token_dtype="uint16",
        hookpoints={
            "layer_00/attn_out": HookSpec(name="blocks.0.hook_attn_out", d_in=3),
            "layer_00/mlp_post": HookSpec(name="blocks.0.mlp.hook_post", d_in=5),
        },
        dtype="bfloat16", codec=codec, chunk_rows=rows, shard_rows=4 * rows, seed=7,
    )  # fmt: skip


def golden_ids(spec: StoreSpec) -> NDArray[np.uint16]:
    return (np.arange(spec.n_contexts * 8, dtype="<u2") * 7 % 11).reshape(-1, 8)


def golden_values(rows: int, d_in: int) -> NDArray[np.float32]:
    """[rows, d_in] in token order: eighths of small integers, so that bfloat16 holds them and their sums are exact; a
    dimension that is always zero, and outliers in one dimension and at position 0."""
    row, dim = np.arange(rows)[:, None], np.arange(d_in)
    x = ((37 * row + 101 * dim) % 97 - 48) / 8 * np.where(row % 8 == 0, 256, 1) * np.where(dim == 1, 64, 1)
    return np.where(dim == 2, 0, x).astype("<f4")


def write_golden(root: Path, codec: str) -> Path:
    """The golden store, with the product's own writer."""
    files, spec = LocalFiles(root), golden_spec(codec)
    root.mkdir()
    with building(files) as folder:
        tokens = write_tokens(folder, [golden_ids(spec)], 8, vocab_size=11)
        place_tokens(files, tokens)
    spec = spec.model_copy(update={"corpus": {**spec.corpus, "ids_blake2b": tokens.digest}})
    create_store(files, spec, tokens.files, GOLDEN_RECORD)
    keep = rows_that_count(golden_ids(spec), spec)
    with closing(ShardWriter(files, spec, keep, threads=1)) as writer:
        for shard in range(spec.n_shards):
            part = slice(*spec.shard_range(shard))
            x = {path: golden_values(spec.n_tokens, hook.d_in)[part] for path, hook in spec.hookpoints.items()}
            kept = keep.reshape(-1)[part]
            writer.commit(shard, {path: with_moments(rows, kept) for path, rows in x.items()})
    finish_store(files, spec)
    return root


def with_moments(x: NDArray[np.float32], kept: NDArray[np.bool_]) -> ShardRows:
    bits, exact = (x.view("<u4") >> 16).astype("<u2"), x.astype("<f8")
    assert np.array_equal(as_float32(bits, "bfloat16"), x)
    norms = np.sqrt(np.square(exact).sum(axis=1)).astype("<f4")
    return ShardRows(bits, norms, exact[kept].sum(axis=0), np.square(exact[kept]).sum(axis=0))


def pack_golden() -> None:
    """Writes golden/ anew: for a new format version, and for nothing else."""
    for codec in CODEC_NAMES:
        root = write_golden(GOLDEN / codec, codec)
        with tarfile.open(GOLDEN / f"{codec}.tar.xz", "w:xz") as packed:
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                entry = tarfile.TarInfo(f"{codec}/{path.relative_to(root)}")
                entry.size = path.stat().st_size
                packed.addfile(entry, io.BytesIO(path.read_bytes()))
        shutil.rmtree(root)


def golden(folder: Path, codec: str) -> Path:
    with tarfile.open(GOLDEN / f"{codec}.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return folder / codec


def is_compressed(path: str, codec: str) -> bool:
    """Whether zstd or lz4 made a file, or its line holds checksums of such files: another version may write others."""
    always = r"(tokens/c|index/.*/c|stats/.*/norm/c|scale/.*/row/c|manifest)/"
    return bool(re.match(always if codec in ("none", "int8") else f"{always}|layer_00/.*/c/", path))


def comparable(line: str, codec: str) -> tuple[Any, ...]:
    """All that a commit says, but for the sizes and checksums of compressed files."""
    commit = parse_commit(line)
    assert commit is not None
    files = {array: entry for array, entry in commit.files.items() if not is_compressed(f"{array}/c/", codec)}
    return {**vars(commit), "files": files}, sorted(commit.files)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_writer_still_writes_the_golden_bytes(tmp_path: Path, codec: str) -> None:
    root, ours = golden(tmp_path, codec), write_golden(tmp_path / "ours", codec)
    expected, found = contents(root), contents(ours)
    assert found.keys() == expected.keys()
    same = [path for path in expected if not is_compressed(path, codec)]
    assert len(same) > len(expected) / 2
    assert {path: found[path] for path in same} == {path: expected[path] for path in same}
    assert (ours / "record.json").read_bytes() == (root / "record.json").read_bytes()
    lines = [(path / "manifest" / "index.jsonl").read_text().splitlines(keepends=True) for path in (ours, root)]
    assert len(lines[0]) == 3
    assert [comparable(line, codec) for line in lines[0]] == [comparable(line, codec) for line in lines[1]]
    assert read_metadata(LocalFiles(ours)).keys() == read_metadata(LocalFiles(root)).keys()
    assert_equal(read_store(ours), read_store(root))


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_golden_stores_are_read(tmp_path: Path, codec: str) -> None:
    store = Store.open(golden(tmp_path, codec))
    assert verify(store, full=True).lines == []
    assert store.state == "final"
    found = as_read_by_the_product(store)
    assert_equal(read_store(store.root), found)
    assert np.array_equal(found["tokens"], golden_ids(store.spec))
    assert np.array_equal(found["stream"], np.arange(store.spec.n_tokens))
    for hook, about in store.spec.hookpoints.items():
        x = golden_values(store.spec.n_tokens, about.d_in)
        if codec == "int8":
            assert np.abs(found[hook] - x).max() <= np.abs(x).max() / 254
            assert np.array_equal(found[hook][:, 2], x[:, 2]), "always zero"
        else:
            assert np.array_equal(found[hook], x)
        assert np.array_equal(store.total(f"stats/{hook}/sum"), x[counted(store)].sum(axis=0))
        assert np.array_equal(store.total(f"stats/{hook}/sum_of_squares"), np.square(x[counted(store)]).sum(axis=0))


def counted(store: Store) -> NDArray[np.bool_]:
    """Which tokens of the stream count in the moments."""
    return rows_that_count(store.tokens(), store.spec).reshape(-1)[: store.spec.n_tokens]


@pytest.mark.parametrize("array", ["layer_00/attn_out", "stats/layer_00/attn_out/sum", "scale/layer_00/attn_out/dim"])
def test_a_file_in_the_place_of_another_is_seen(tmp_path: Path, array: str) -> None:
    """Its own checksums are right, and its length is. The committed one has to tell it from the file that belongs."""
    root = golden(tmp_path, "int8")
    first, second = (root / array / "c" / shard / "0" for shard in "01")
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    assert verify(Store.open(root), full=False).shards == [0]


def test_a_manifest_line_is_written_as_it_is_read(tmp_path: Path) -> None:
    for line in (golden(tmp_path, "int8") / "manifest" / "index.jsonl").read_text().splitlines(keepends=True):
        commit = parse_commit(line)
        assert commit is not None
        assert commit.line() == line


def test_the_worked_example_of_the_specification(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "reference" / "store-format.md").read_text()
    root = golden(tmp_path, "none")
    data = (root / "layer_00" / "attn_out" / "c" / "2" / "0").read_bytes()
    parts = re.findall(r"^ *(\d+)  ((?:[0-9a-f]{2} +)+)", text, re.MULTILINE)
    shown = {int(at): bytes.fromhex(hexed) for at, hexed in parts}
    assert list(shown) == [0, 24, 28, 52, 56, 72, 88, 120]
    for at, part in shown.items():
        assert data[at : at + len(part)] == part
    line = (root / "manifest" / "index.jsonl").read_text().splitlines()[2]
    example = next(found for found in text.splitlines() if found.startswith('{"v":1,"k":2,'))
    assert re.fullmatch(".*".join(map(re.escape, re.split(",?…,?", example))), line)


def test_any_flipped_bit_is_seen_by_both_readers(tmp_path: Path) -> None:
    """One in every file: in no file is there a byte that nobody looks at."""
    root, rng = golden(tmp_path, "int8"), random.Random(0)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        before = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises((ValueError, KeyError)):
            read_store(root)
        with suppress(DamagedError, UserError):
            assert verify(Store.open(root), full=False).lines, f"bit {bit} of {path}"
        path.write_bytes(before)
    assert verify(Store.open(root), full=True).lines == []


# Other readers


def test_the_crc_of_the_specification() -> None:
    assert crc32c(b"123456789") == fast_crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_reader_written_from_the_specification(recoded: Callable[[str], Store], codec: str) -> None:
    store = recoded(codec)
    found = read_store(store.root)
    assert_equal(found, as_read_by_the_product(store))
    assert np.array_equal(found["stream"], np.arange(5000))


@pytest.mark.parametrize(
    "torn", [lambda line: line[:-9], lambda line: line[:-1], lambda line: line.replace("16", "17")]
)
def test_a_store_being_written_is_read_alike(tmp_path: Path, torn: Callable[[str], str]) -> None:
    """Two writers' logs, one of which ends in a torn line, beside an index that a repair left."""
    root = golden(tmp_path, "zstd")
    lines = (root / "manifest" / "index.jsonl").read_text().splitlines(keepends=True)
    write_state(LocalFiles(root), Store.open(root).spec, "writing")
    (root / "manifest" / "index.jsonl").write_text(lines[2])
    (root / "manifest" / "rank-00000.jsonl").write_text(torn(lines[1]))
    (root / "manifest" / "rank-00001.jsonl").write_text(lines[0])
    store = Store.open(root)
    assert store.missing == [1]
    assert_equal(read_store(root), as_read_by_the_product(store))


def with_zarr_python(path: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(path, mode="r")[:])


def with_zarrs(path: Path) -> NDArray[Any]:
    """Its pipeline is chosen when the array is opened; strict, it has no Python to fall back on."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        array = zarr.open_array(path, mode="r")
        pipeline: Any = array.async_array.codec_pipeline
        assert type(pipeline).__name__ == "ZarrsCodecPipeline"
        assert pipeline.impl is not None
        assert pipeline.python_impl is None
        return np.asarray(array[:])


def with_tensorstore(path: Path) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, read=True, open=True).result().read().result())


def with_xarray(path: Path) -> NDArray[Any]:
    """The group that an array is in; the store itself holds files that are not Zarr's, of which zarr-python warns."""
    group = xarray.open_zarr(path.parent, consolidated=False, mask_and_scale=False, chunks=None)
    return np.asarray(group[path.name].values)


READERS = {"zarr": with_zarr_python, "zarrs": with_zarrs, "tensorstore": with_tensorstore, "xarray": with_xarray}


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("library", READERS)
def test_other_libraries_read_the_same_bytes(recoded: Callable[[str], Store], library: str, codec: str) -> None:
    store, read = recoded(codec), READERS[library]
    expected = {array: stored(store, array) for array in store.spec.layouts()}
    expected |= {
        array: np.stack([store.row_of_shard(array, k) for k in store.commits]) for array in store.spec.rows_of_shards()
    }
    if library != "xarray":
        expected["tokens"] = store.tokens()
    assert_equal({array: read(store.root / array) for array in expected}, expected)


def test_xarray_gives_the_numbers_by_the_documented_recipe(recoded: Callable[[str], Store]) -> None:
    """docs/reference/store-format.md, "With other libraries"."""
    settings: dict[str, Any] = {"consolidated": False, "mask_and_scale": False, "chunks": None}
    store = recoded("zstd")
    layer = xarray.open_zarr(store.root / "layer_01", **settings)
    assert layer["mlp_out"].dims == ("token", "d_model")
    u = layer["mlp_out"].values
    x = (u.astype("<u4") << 16).view("<f4")
    assert np.array_equal(x, values(store, HOOK))
    assert np.array_equal(torch.from_numpy(u).view(torch.bfloat16).float().numpy(), x)
    index = xarray.open_zarr(store.root / "index", **settings)
    assert np.array_equal(index["context"].values * 16 + index["position"].values, stream(store))

    store = recoded("int8")
    layer = xarray.open_zarr(store.root / "layer_01", **settings)
    scale = xarray.open_zarr(store.root / "scale" / HOOK, **settings)
    q = layer["mlp_out"].astype("f4")
    dim = scale["dim"][np.arange(len(q)) // store.spec.shard_rows].rename(shard="token")
    assert np.array_equal((q * scale["row"] * dim).values, values(store, HOOK))


def as_zarr_python_describes(shape: tuple[int, ...], layout: ShardLayout, sharded: bool, like: dict[str, Any]) -> Any:
    parameters = CODECS[layout.codec].blosc
    blosc = [] if parameters is None else [BloscCodec(typesize=layout.dtype.itemsize, **vars(parameters))]
    memory = MemoryStore()
    zarr.create_array(
        memory, shape=shape, dtype=layout.dtype, chunks=layout.chunk_shape,
        shards=(layout.shard_rows, *layout.row_shape) if sharded else None, compressors=[*blosc, Crc32cCodec()],
        filters=None, fill_value=layout.fill, dimension_names=like["dimension_names"], attributes=like["attributes"],
    )  # fmt: skip
    return json.loads(memory._store_dict["zarr.json"].to_bytes())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_arrays_are_described_as_zarr_python_describes_them(codec: str, dtype: Any) -> None:
    spec = golden_spec(codec).model_copy(update={"dtype": dtype})
    documents = {path.removesuffix("/zarr.json"): json.loads(data) for path, data in spec.documents().items()}
    plain = {a: ShardLayout(1, 1, (d_in,), kind, "none", np.nan) for a, (d_in, kind) in spec.rows_of_shards().items()}
    plain["tokens"] = token_layout(spec.context, spec.token_dtype)
    arrays = {path for path, document in documents.items() if document["node_type"] == "array"}
    assert arrays == {*spec.layouts(), *plain}
    for path in arrays:
        ours, layout = documents[path], (spec.layouts() | plain)[path]
        assert ours == as_zarr_python_describes(tuple(ours["shape"]), layout, path not in plain, ours), path
    fill = -128 if codec == "int8" else {"bfloat16": 0x7FC0}.get(dtype, "NaN")
    assert documents["layer_00/mlp_post"]["fill_value"] == fill
    for path in documents.keys() - arrays:
        assert documents[path] == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


# Arrays that another tool encoded anew


def random_store(root: Path, spec: StoreSpec, seed: int) -> Store:
    """The sharded arrays of a store, of random bits."""
    files, rng, commits = LocalFiles(root), np.random.default_rng(seed), {}
    for path, data in spec.documents().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    for shard in range(spec.n_shards):
        start, stop = spec.shard_range(shard)
        sizes = {}
        for array, layout in spec.layouts().items():
            shape = (stop - start, *layout.row_shape, layout.dtype.itemsize)
            rows = rng.integers(0, 256, shape, dtype=np.uint8).view(layout.dtype)[..., 0]
            data = b"".join(encode_shard(rows, layout))
            file = root / shard_file(array, shard, bool(layout.row_shape))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            sizes[array] = len(data), crc32(data)
        commits[shard] = Commit(shard, stop - start, start, stop, 0, sizes)
    return Store(files, spec, "final", Commits.from_mapping(commits))


@settings(max_examples=25, deadline=None)
@given(
    codec=st.sampled_from(CODEC_NAMES), dtype=st.sampled_from(sorted(DTYPES)), chunk_rows=st.integers(1, 9),
    chunks=st.integers(1, 5), width=st.integers(1, 7), shards=st.floats(0.01, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_fast_reader_and_zarr_python_give_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, codec: str, dtype: str, chunk_rows: int, chunks: int, width: int,
    shards: float, seed: int,
) -> None:  # fmt: skip
    shape = {"chunk_rows": chunk_rows, "shard_rows": chunk_rows * chunks}
    shape["n_tokens"] = max(1, round(shards * shape["shard_rows"]))
    hooks = {"layer_00/attn_out": HookSpec(name="blocks.0.hook_attn_out", d_in=width)}
    spec = golden_spec(codec).model_copy(update={"dtype": dtype, "hookpoints": hooks, **shape})
    store = random_store(tmp_path_factory.mktemp("random"), spec, seed)
    for array, layout in spec.layouts().items():
        fast, slow = open_reader(store, array), ZarrReader(store, array)
        assert isinstance(fast, ArrayReader)
        for shard, commit in store.commits.items():
            count = -(-commit.rows // layout.chunk_rows)
            for chunk in range(count):
                assert fast.read(shard, chunk).tobytes() == slow.read(shard, chunk).tobytes()
            runs = [np.empty((count * layout.chunk_rows, *layout.row_shape), layout.dtype) for _ in range(2)]
            found = [fast.read_run(shard, 0, count, runs[0]), slow.read_run(shard, 0, count, runs[1])]
            assert found[0].tobytes() == found[1].tobytes()
            assert len(found[0]) == len(found[1]) == commit.rows


def encode_anew(root: Path, array: str, **how: Any) -> Store:
    """Rewrites an array in place with zarr-python, then the checksums that the store has of it."""
    store = Store.open(root)
    layout = store.spec.layouts()[array]
    rows = with_zarr_python(root / array)
    whole = {"chunks": layout.chunk_shape, "shards": (layout.shard_rows, *layout.row_shape), **how}
    zarr.create_array(
        root / array, shape=rows.shape, dtype=layout.dtype, fill_value=layout.fill, filters=None, overwrite=True,
        config={"write_empty_chunks": True}, **whole,
    )[:] = rows  # fmt: skip
    sizes = {}
    for shard in store.commits:
        path = root / shard_file(array, shard, bool(layout.row_shape))
        sizes[shard] = checksum(path) if path.exists() else store.commits[shard].files[array]
    commits = [
        Commit(c.shard, c.rows, c.start, c.stop, c.kept, {**c.files, array: sizes[c.shard]})
        for c in store.commits.values()
    ]
    write_index(store.files, Commits.from_mapping({commit.shard: commit for commit in commits}))
    document = f"{array}/zarr.json"
    write_metadata(store.files, {**read_metadata(store.files), document: checksum(root / document)})
    return Store.open(root)


def checksum(path: Path) -> tuple[int, int]:
    return len(path.read_bytes()), crc32(path.read_bytes())


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "gzip in shards": (HOOK, {"compressors": GzipCodec()}),
    "zstd in shards, of int8": (f"scale/{HOOK}/row", {"compressors": ZstdCodec(level=3)}),
    "one zstd chunk a shard": (HOOK, {"chunks": (512, 32), "shards": None, "compressors": ZstdCodec()}),
    "an index without a codec": ("index/context", {"compressors": None}),
    "larger chunks": (HOOK, {"chunks": (256, 32), "compressors": [BloscCodec(typesize=2), Crc32cCodec()]}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_array_encoded_by_another_tool_is_read(recoded: Callable[[str], Store], tmp_path: Path, case: str) -> None:
    array, how = FOREIGN[case]
    before = recoded("int8" if "scale" in array else "zstd")
    store = encode_anew(Path(shutil.copytree(before.root, tmp_path / "s")), array, **how)
    assert isinstance(open_reader(store, array), ZarrReader)
    assert verify(store, full=True).lines == []
    assert_equal(as_read_by_the_product(store), as_read_by_the_product(before))

    rows = [HookRows.of(s, HOOK) for s in (before, store)]
    assert rows[0].units(3) == rows[1].units(3)
    mask = np.random.default_rng(0).random(store.tokens().shape) < 0.3
    for shard in (0, 9):
        expected, found = (KeptRows(r, mask).values(shard, 2) for r in rows)
        assert 0 < len(found) < 64
        assert found.tobytes() == expected.tobytes()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damage_in_an_array_of_another_tool_is_seen(store: Store, tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    """zarr-python takes a missing file for fill values, and its codecs check nothing."""
    copy = encode_anew(Path(shutil.copytree(store.root, tmp_path / "s")), HOOK, compressors=None)
    harm(copy.root / HOOK / "c" / "4" / "0")
    with pytest.raises(DamagedError, match=r"mlp_out/c/4/0"):
        open_reader(copy, HOOK).read(4, 2)
    assert len(open_reader(copy, HOOK).read(5, 2)) == 64
    for full in (False, True):
        damage = verify(copy, full)
        assert len(damage.lines) == 1
        assert damage.shards == [4]


OTHER_FILES: dict[str, dict[str, Any]] = {
    "larger shards": {"shards": (1024, 32)},
    "larger shards, our codecs": {
        "shards": (1024, 32),
        "compressors": [BloscCodec(typesize=2, **vars(CODECS["zstd"].blosc)), Crc32cCodec()],
    },
    "no shards": {"chunks": (64, 32), "shards": None},
    "other names": {"chunk_key_encoding": {"name": "default", "separator": "."}},
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_an_array_with_other_files_than_one_a_shard_is_refused(store: Store, tmp_path: Path, case: str) -> None:
    """The manifest covers one file per shard; no reader would check others."""
    how = {"compressors": GzipCodec(), **OTHER_FILES[case]}
    copy = encode_anew(Path(shutil.copytree(store.root, tmp_path / "s")), HOOK, **how)
    with pytest.raises(DamagedError, match="not have one file per shard"):
        open_reader(copy, HOOK)


# Recode


@pytest.mark.parametrize("codec", ["lz4", "none", "int8"])
def test_a_recode_is_what_a_harvest_would_be(
    recoded: Callable[[str], Store], harvested: Callable[[str], Store], codec: str
) -> None:
    found, expected = contents(recoded(codec).root), contents(harvested(codec).root)
    assert found.keys() == expected.keys()
    assert found == expected


@pytest.mark.parametrize("source", ["lz4", "none"])
def test_a_lossless_recode_can_be_taken_back(
    store: Store, recoded: Callable[[str], Store], tmp_path: Path, source: str
) -> None:
    back = recode(str(recoded(source).root), str(tmp_path / "back"), "zstd")
    assert contents(Path(back.store)) == contents(store.root)


@pytest.mark.parametrize("array", [HOOK, "index/context"])
def test_what_another_tool_encoded_is_recoded_as_ours(
    store: Store, recoded: Callable[[str], Store], tmp_path: Path, array: str
) -> None:
    copy = encode_anew(Path(shutil.copytree(store.root, tmp_path / "s")), array, compressors=GzipCodec())
    done = recode(str(copy.root), str(tmp_path / "t"), "lz4")
    assert contents(Path(done.store)) == contents(recoded("lz4").root)


def test_an_interrupted_recode_goes_on(
    store: Store, recoded: Callable[[str], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, answers = tmp_path / "t", iter([False, False, True])

    @contextmanager
    def stop_after_three() -> Iterator[Callable[[], bool]]:
        yield lambda: next(answers)

    with monkeypatch.context() as patch:
        patch.setattr(harvest.recode, "stop_requests", stop_after_three)
        with pytest.raises(Interrupted, match="run the same command again"):
            recode(str(store.root), str(target), "int8")
    assert sorted(Store.open(target).commits) == [0, 1, 2]
    assert Store.open(target).state == "writing"
    with pytest.raises(UserError, match="recoded differently"):
        recode(str(store.root), str(target), "lz4")
    recode(str(store.root), str(target), "int8")
    assert contents(target) == contents(recoded("int8").root)


def test_a_killed_recode_goes_on(store: Store, recoded: Callable[[str], Store], tmp_path: Path, sagsae: Sagsae) -> None:
    target = tmp_path / "t"
    log = target / "manifest" / "rank-00000.jsonl"
    killed = sagsae(
        "store", "recode", store.root, target, "--codec", "lz4", stop=(signal.SIGKILL, lambda: log.exists())
    )
    assert killed.returncode == -signal.SIGKILL
    assert Store.open(target).missing
    recode(str(store.root), str(target), "lz4")
    assert contents(target) == contents(recoded("lz4").root)


def test_what_cannot_be_recoded_is_refused(recoded: Callable[[str], Store], tmp_path: Path) -> None:
    quantised, target = recoded("int8"), tmp_path / "t"
    with pytest.raises(UserError, match="is quantised to int8, which lost what other codecs would keep"):
        recode(str(quantised.root), str(target), "zstd")
    unfinished = golden(tmp_path, "zstd")
    write_state(LocalFiles(unfinished), Store.open(unfinished).spec, "writing")
    with pytest.raises(UserError, match=r"is unfinished\. Run sagsae harvest to its end first"):
        recode(str(unfinished), str(target), "lz4")
    assert not target.exists()
    with pytest.raises(UserError, match="is another store"):
        recode(str(recoded("zstd").root), str(unfinished), "lz4")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a store"):
        recode(str(recoded("zstd").root), str(tmp_path / "thesis"), "lz4")


@pytest.mark.parametrize("array", [HOOK, f"stats/{HOOK}/norm", "index/position"])
def test_a_damaged_store_is_not_recoded(store: Store, tmp_path: Path, array: str) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "s"))
    flip(copy / shard_file(array, 4, array == HOOK))
    with pytest.raises(DamagedError, match=f"{array}/c/4"):
        recode(str(copy), str(tmp_path / "t"), "lz4")
    assert sorted(Store.open(tmp_path / "t").commits) == [0, 1, 2, 3]


# int8


def test_int8_keeps_38_decibels(store: Store, recoded: Callable[[str], Store]) -> None:
    quantised, counts = recoded("int8"), counted(store)[stream(store)]
    for hook in store.spec.hookpoints:
        x, found = values(store, hook), values(quantised, hook)
        dim = np.repeat([quantised.dim_scale(hook, k) for k in quantised.commits], 512, axis=0)[:5000]
        step = stored(quantised, f"scale/{hook}/row")[:, None] * dim
        assert (np.abs(x - found) <= 0.5001 * step).all()
        exact = x[counts].astype("f8")
        error = np.square(exact - found[counts]).sum()
        cost = quantised.quantisation(hook)
        assert cost is not None
        assert cost.snr_db > 38
        assert cost.snr_db == pytest.approx(10 * np.log10(np.square(exact).sum() / error), rel=1e-6)
        assert cost.fvu == pytest.approx(error / np.square(exact - exact.mean(axis=0)).sum(), rel=1e-6)
        assert store.quantisation(hook) is None


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 999), rows=st.integers(-20, 20),
    dims=st.integers(-20, 20), zeros=st.floats(0, 1),
)  # fmt: skip
def test_int8_is_right_to_half_a_step(n: int, d: int, seed: int, rows: int, dims: int, zeros: float) -> None:
    """With outlier rows and dimensions, with rows and dimensions that are all zero, in any scale."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal((n, d)) * 2.0 ** (rows * rng.random((n, 1))) * 2.0 ** (dims * rng.random(d))
    x = (wide * (rng.random((n, 1)) >= zeros) * (rng.random(d) >= zeros)).astype(np.float32)
    dim = dim_scale(np.square(x.astype("f8")).sum(axis=0), n)
    assert np.array_equal(dim == 1, ~x.any(axis=0)) or (x == 1).any()
    q, row = quantise(x, dim)
    assert [array.dtype.name for array in (q, row, dim)] == ["int8", "float32", "float32"]
    assert np.abs(q.astype(int)).max() <= LEVELS
    assert np.array_equal(np.abs(q.astype(int)).max(axis=1) == LEVELS, x.any(axis=1)), "all levels are used"
    assert (q[:, ~x.any(axis=0)] == 0).all()
    assert np.array_equal(row == 1, ~x.any(axis=1)) or n * d == 1
    found = dequantise(q, row, dim)
    assert (np.abs(found.astype("f8") - x) <= 0.5001 * (row[:, None].astype("f8") * dim)).all()
    assert np.array_equal(found[~x.any(axis=1)], x[~x.any(axis=1)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_lost_to_int8_and_no_other(bad: float) -> None:
    """Only rows that do not count may be so: the harvest refuses others."""
    x = np.random.default_rng(0).standard_normal((4, 5)).astype("<f4")
    dim = dim_scale(np.square(x.astype("f8")).sum(axis=0), 4)
    expected = dequantise(*quantise(x, dim), dim)
    x[2, 3] = bad
    q, row = quantise(x, dim)
    assert (q[2] == 0).all()
    found = dequantise(q, row, dim)
    assert np.isnan(found[2]).all()
    assert np.array_equal(np.delete(found, 2, axis=0), np.delete(expected, 2, axis=0))
