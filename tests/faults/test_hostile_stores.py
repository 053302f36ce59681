"""A store is hostile until it is checked: names, sizes, bytes and JSON whose checksums all match, because who altered
them made them again. Each is refused in one message, at once, and nothing outside is read or written."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import hostile
from support.hostile import joined, nest, refile, relines, remeta, respec

from harvest.recode import recode
from shared.errors import DamagedError, UserError
from shared.gate import BadData, parse_json, quoted, safe_path
from shared.store.listing import describe_store, list_stores
from shared.store.manifest import INDEX
from shared.store.opened import Store
from shared.store.reader import open_reader, read_shard
from shared.store.shard import crc32, encode_chunk, with_crc
from shared.store.spec import rows_that_count, seal
from shared.store.verify import verify

HOOK = "layer_00/mlp_out"


class Make(Protocol):
    """Gives a store of a codec."""

    def __call__(self, codec: str = "zstd") -> Path: ...


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A small store of each codec. Read only."""
    folder, found = tmp_path_factory.mktemp("made"), dict[str, Path]()

    def get(codec: str = "zstd") -> Path:
        if codec not in found:
            found[codec] = hostile.make(folder / codec, codec)
        return found[codec]

    return get


@pytest.fixture
def copy(made: Make, tmp_path: Path) -> Make:
    """A store to damage."""

    def get(codec: str = "zstd") -> Path:
        return Path(shutil.copytree(made(codec), tmp_path / "here" / codec))

    return get


def lines(root: Path) -> str:
    """What `verify --full` says, or the refusal to open the store at all."""
    try:
        return "\n".join(verify(Store.open(root, lenient=True), full=True).lines)
    except (UserError, DamagedError) as error:
        return str(error)


def refused(root: Path, act: Callable[[Path], Any] = Store.open) -> str:
    with pytest.raises((UserError, DamagedError)) as info:
        act(root)
    assert len(str(info.value)) < 1500, "a message repeats a file"
    return str(info.value)


def to_none(root: Path) -> None:
    recode(str(root), str(root.parent / "target"), "none")


def used_by_training(root: Path) -> None:
    from train.data.rows import HookRows, KeptRows

    store = Store.open(root)
    kept = KeptRows(HookRows.of(store, HOOK), rows_that_count(store.tokens(), store.spec))
    for shard in store.commits:
        kept.values(shard, 0)
    store.statistics(HOOK)


# Names


ESCAPES = ("/tmp/abs", "../mine", "layer_00/../../x", "layer_00", "layer_00/", "layer_00/a\x00", "layer_00//a",
           "tokens/x", "layer_00/zarr.json", "layer_00/x.tmp", "layer_00\\a", "stats/x", "layer_00/é", "layer_00/a b",
           "", ".", "layer_00/" + "a" * 300, "layer_0/a", "layer_00/a/b", "layer_00/.a", "layer_00/a..b")  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
def test_a_hookpoint_has_a_path_that_a_writer_gives(copy: Make, path: str) -> None:
    """The fault: a store whose hookpoint was called `../mine` or `/abs` made recode write there."""
    root = copy()
    respec(root, lambda about: about.update(hookpoints={path: {"name": "blocks.0.0", "d_in": 12}}))

    def renamed(bodies: list[dict[str, Any]]) -> None:
        for body in bodies:
            body["files"] = {name.replace(HOOK, path): entry for name, entry in body["files"].items()}

    relines(root, renamed)
    assert "zarr.json does not describe a store" in refused(root)
    refused(root, to_none)
    assert sorted(p.name for p in root.parent.iterdir()) == ["zstd"]


@pytest.mark.parametrize(
    "path", ["tokens/c/../../../payload.sh", "/dev/zero", "tokens/c/1/0", "payload", "record.json"]
)
def test_metadata_names_files_of_the_store_alone(copy: Make, path: str) -> None:
    """The fault: `tokens/c/../../../payload.sh` in metadata.json was copied beside the destination of a recode."""
    root = copy()
    (root.parent / "payload.sh").write_text("echo hi\n")
    remeta(root, lambda files: files.update({path: {"bytes": 8, "crc32": crc32(b"echo hi\n")}}))
    assert "metadata.json" in refused(root, to_none)
    assert "metadata.json" in lines(root)
    assert not list((root.parent / "target").rglob("payload*"))


def test_metadata_that_lacks_a_file(copy: Make) -> None:
    root = copy()
    remeta(root, lambda files: files.pop("index/zarr.json") and files)
    assert "does not name index/zarr.json" in lines(root)


def test_names_of_hookpoints_that_are_harvested() -> None:
    from shared.store.spec import hookpoint_path

    names = ("layer_08/mlp_out", "layer_00/attn.hook_z", "layer_123/ln2.hook_scale", "layer_00/synthetic")
    assert [hookpoint_path(name) for name in names] == list(names)


# Sizes


SIZES = {
    "n_tokens": (0, -1, 2**62, 2**41, "4096", 4096.0, True, None, 10**400),
    "shard_rows": (0, -64, 1 << 40, 65, "64", 64.0),
    "chunk_rows": (0, -1, 7, 1 << 40, False),
    "context": (0, -16, 65537, 16.0),
    "skip_positions": (-1, 17, 10**9),
    "special_ids": ([-1], [2**32], ["0"], [0.0], "0", 0),
    "bos_id": (-1, 2**32, "0", 1.0),
    "seed": (-1, 2**63, "0", 0.5),
    "token_dtype": ("uint64", "uint8", None, 2),
    "dtype": ("float64", "int8", None),
    "codec": ("blosclz", "ZSTD", None, ["zstd"]),
    "hookpoints": ({}, [], None, {HOOK: {"name": "x", "d_in": 0}}, {HOOK: {"name": "x", "d_in": 2**60}},
                   {HOOK: {"name": "x", "d_in": "12"}}, {HOOK: {"name": "\x1b[2J", "d_in": 12}}),
    "model": ({}, None, {"name": 3}, {"name": "x" * 5000}, {"name": "\x1b]0;title\x07"}),
    "corpus": ({}, {"ids_blake2b": 4}, {"ids_blake2b": "xyz"}, {"ids_blake2b": "0" * 32, "vocab_size": -1}),
    "state": ("weird", None, 1, ["final"]),
    "format_version": (2.5, "2", None, 10**400, True),
    "extra": (1,),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SIZES.items() for value in values], ids=quoted
)
def test_a_spec_is_bounded_strict_and_consistent(copy: Make, name: str, value: Any) -> None:
    """The faults: 2^62 tokens hung verify, recode and train; "4096" and true passed for numbers, "weird" for a state;
    what was missing was a KeyError."""
    root = copy()
    respec(root, lambda about: about.update({name: value}))
    for act in (Store.open, describe_store, to_none):
        refused(root, act)
    assert list_stores(root.parent) == []


def test_a_spec_of_four_million_shards_is_the_largest(copy: Make) -> None:
    root = copy()
    respec(root, lambda about: about.update(n_tokens=2**40, shard_rows=16))
    assert "shards" in refused(root)


def test_chunks_that_no_memory_could_hold(copy: Make) -> None:
    root = copy()
    size = {"chunk_rows": 1 << 28, "shard_rows": 1 << 28, "hookpoints": {HOOK: {"name": "x", "d_in": 1 << 24}}}
    respec(root, lambda about: about.update(size))
    assert "2 GiB per chunk" in refused(root)


# Bytes


def put_chunk(root: Path, chunk: bytes, array: str = HOOK) -> None:
    """These encoded bytes as every chunk of shard 0."""
    layout = Store.open(root).spec.layouts()[array]
    path = f"{array}/c/0" + "/0" * len(layout.row_shape)
    refile(root, path, joined([chunk] * layout.chunks_per_shard, layout))


def blosc_header(values: int, block: int, size: int, flags: int = 0x22, typesize: int = 2) -> bytes:
    return struct.pack("<BBBBIII", 2, 1, flags, typesize, values, block, size)


CHUNK = 16 * 12 * 2
BUFFERS = {
    "stored, twenty bytes": blosc_header(CHUNK, CHUNK, CHUNK + 16) + b"abcd",
    "stored, cut": blosc_header(CHUNK, CHUNK, 20) + b"abcd",
    "fewer rows": encode_chunk(np.zeros((1, 12), "<u2"), "zstd"),
    "more rows": encode_chunk(np.zeros((32, 12), "<u2"), "zstd"),
    "nothing": b"",
    "a header alone": blosc_header(0, 0, 16),
    "blocks beyond": blosc_header(CHUNK, CHUNK, 40, 0x91) + struct.pack("<i", 2**30) + b"x" * 20,
    "blocks before": blosc_header(CHUNK, CHUNK, 40, 0x91) + struct.pack("<i", -16) + b"x" * 20,
    "blocks of no whole values": blosc_header(CHUNK, CHUNK - 1, CHUNK + 16) + b"x" * CHUNK,
    "another compressor": blosc_header(CHUNK, CHUNK, 40, 0x01) + struct.pack("<i", 20) + b"x" * 20,
    "lz4 in zstd": encode_chunk(np.arange(16 * 12, dtype="<u2").reshape(16, 12), "lz4"),
    "values of another size": encode_chunk(np.zeros((16, 6), "<u4"), "zstd"),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_a_blosc_buffer_is_what_its_place_needs(copy: Make, case: str) -> None:
    """The faults: blosc reads as far as its header says (this process's memory came out of a recode, or it crashed),
    and rows that a buffer lacks were whatever was in memory (numcodecs issue 228)."""
    root = copy()
    put_chunk(root, BUFFERS[case])
    assert f"{HOOK}/c/0/0" in lines(root)
    assert "do not decode" in refused(root, to_none)
    refused(root, lambda root: read_shard(open_reader(Store.open(root), HOOK), 0))


INDEXES = {
    "beyond": [[0, 2**62], [4, 4], [8, 4], [12, 4]],
    "one after another, but not from 0": [[4, 100], [104, 100], [204, 100], [304, 100]],
    "missing": [[2**64 - 1, 2**64 - 1]] * 4,
    "twice the same": [[0, 20]] * 4,
    "wraps around": [[2**63, 2**63], [0, 4], [4, 4], [8, 4]],
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_is_of_the_chunks_in_the_file(copy: Make, case: str) -> None:
    root = copy()
    data = (root / HOOK / "c/0/0").read_bytes()
    index = np.array(INDEXES[case], "<u8")
    refile(root, f"{HOOK}/c/0/0", data[: -index.nbytes - 4] + with_crc(index.tobytes()))
    assert f"{HOOK}/c/0/0: its index" in lines(root)
    assert "index" in refused(root, to_none)


BAD_LINE = "manifest/index.jsonl: line 1 is torn or damaged"


@pytest.mark.parametrize("size", [0, 3, 4, 12, 92, 100, 108])
def test_sums_of_another_length(copy: Make, size: int) -> None:
    """The fault: sums of another length gave wrong moments or a traceback."""
    root = copy()
    refile(root, f"stats/{HOOK}/sum/c/0/0", with_crc(bytes(max(0, size - 4))) if size >= 4 else bytes(size))
    if size == 100:
        assert "stats/layer_00/mlp_out/sum/c/0/0: dimension 0" in lines(root)
        return
    assert BAD_LINE in lines(root)
    refused(root, describe_store)


def put_vector(root: Path, array: str, change: Callable[[np.ndarray], Any]) -> None:
    """Changes the numbers of shard 0 of an array with one number a row."""
    store = Store.open(root)
    layout = store.spec.layouts()[array]
    whole = np.full(layout.shard_rows, layout.fill, layout.dtype)
    rows = read_shard(open_reader(store, array), 0)
    whole[: len(rows)] = rows
    change(whole)
    parts = whole.reshape(-1, layout.chunk_rows)
    refile(root, f"{array}/c/0", joined([encode_chunk(np.ascontiguousarray(p), layout.codec) for p in parts], layout))


def assign(at: Any, value: Any) -> Callable[[np.ndarray], Any]:
    return lambda whole: whole.__setitem__(at, value)


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("index/context", assign(3, 2**31)),
        ("index/context", assign(slice(None), 0)),
        ("index/position", assign(3, 60_000)),
    ],
)
def test_rows_come_from_the_shards_own_tokens(copy: Make, array: str, change: Any) -> None:
    """The fault: index arrays out of range were an IndexError in training and in a recode."""
    root = copy()
    put_vector(root, array, change)
    assert f"{array}/c/0: row" in lines(root)
    for act in (to_none, describe_store, used_by_training):
        assert "names other tokens than its own" in refused(root, act)


# What a store says twice


def swapped(whole: np.ndarray) -> None:
    whole[[3, 4]] = whole[[4, 3]]


def one_row(root: Path, array: str, at: int, value: float) -> None:
    store = Store.open(root)
    row = store.row_of_shard(array, 0)
    row[at] = row[at] * value if value else 0
    refile(root, f"{array}/c/0/0", with_crc(row.tobytes()))


def of_commit(name: str, value: Any) -> Callable[[Path], None]:
    return lambda root: relines(root, lambda bodies: bodies[0].update({name: value}))


def reversed_rows(root: Path) -> None:
    """The rows of a chunk in another order: every sum is right, every norm is of another row."""
    store = Store.open(root)
    layout = store.spec.layouts()[HOOK]
    rows = read_shard(open_reader(store, HOOK), 0).copy()
    rows[:16] = rows[15::-1]
    parts = [np.ascontiguousarray(rows[at : at + 16]) for at in range(0, 64, 16)]
    refile(root, f"{HOOK}/c/0/0", joined([encode_chunk(part, layout.codec) for part in parts], layout))


def other_document(name: str, value: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = f"{HOOK}/zarr.json"
        document = json.loads((root / path).read_bytes())
        refile(root, path, json.dumps({**document, name: value}).encode())

    return change


STAT, ERROR = f"stats/{HOOK}", f"stats/{HOOK}/sum_of_squared_error"


def of_spec(**changes: Any) -> Callable[[Path], None]:
    return lambda root: respec(root, lambda about: about.update(changes))


def of_corpus(**changes: Any) -> Callable[[Path], None]:
    return lambda root: respec(root, lambda about: about["corpus"].update(changes))


TWICE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "kept": ("zstd", of_commit("kept", 3), "shard 0 counts 3 rows, its tokens give"),
    "more kept than rows": ("zstd", of_commit("kept", 10**12), BAD_LINE),
    "nonfinite": ("zstd", of_commit("nonfinite", {HOOK: 2}), "infinities: none; the manifest says some, 2"),
    "nonfinite of no hookpoint": ("zstd", of_commit("nonfinite", {"layer_07/x": 1}), BAD_LINE),
    "rows of another shard": ("zstd", of_commit("in", [64, 128]), BAD_LINE),
    "more rows": ("zstd", of_commit("rows", 4 * 10**9), BAD_LINE),
    "a shard too many": ("zstd", of_commit("k", 77), BAD_LINE),
    "sum": ("zstd", lambda root: one_row(root, f"{STAT}/sum", 5, 1.00001), f"{STAT}/sum/c/0/0: dimension 5 has"),
    "sum of squares": ("lz4", lambda root: one_row(root, f"{STAT}/sum_of_squares", 5, 1.00001), "dimension 5 has"),
    "norm": ("none", lambda root: put_vector(root, f"{STAT}/norm", assign(7, 9.0)), "norm/c/0: row 7 has norm 9"),
    "norm NaN": ("none", lambda root: put_vector(root, f"{STAT}/norm", assign(7, np.nan)), f"{STAT}/norm/c/0"),
    "order": ("zstd", lambda root: put_vector(root, "index/position", swapped), "index/position/c/0: row"),
    "rows": ("zstd", reversed_rows, f"{HOOK}/c/0/0 have"),
    "int8 dim": ("int8", lambda root: one_row(root, f"scale/{HOOK}/dim", 2, 1.0001), "dim/c/0/0: dimension 2"),
    "int8 row": ("int8", lambda root: put_vector(root, f"scale/{HOOK}/row", assign(3, -1.0)), "row 3 has scale -1"),
    "int8 row of another size": ("int8", lambda root: put_vector(root, f"scale/{HOOK}/row", assign(3, 1e3)), "/c/0"),
    "int8 sum": ("int8", lambda root: one_row(root, f"{STAT}/sum", 2, 1e3), f"{STAT}/sum/c/0/0: dimension 2"),
    "int8 squares": ("int8", lambda root: one_row(root, f"{STAT}/sum_of_squares", 2, 1.001), "dimension 2"),
    "int8 error": ("int8", lambda root: one_row(root, ERROR, 2, 1e4), "_error/c/0/0"),
    "int8 error below zero": ("int8", lambda root: one_row(root, ERROR, 2, -1.0), "dimension 2"),
    "int8 norm": ("int8", lambda root: put_vector(root, f"{STAT}/norm", assign(7, 99.0)), f"{STAT}/norm/c/0"),
    "a document's hookpoint": ("zstd", other_document("attributes", {}), f"{HOOK}/zarr.json: does not say"),
    "a document's fill value": ("zstd", other_document("fill_value", 0), f"{HOOK}/zarr.json: does not say"),
    "a document's shape": ("zstd", other_document("shape", [150, 13]), f"{HOOK}"),
    "special ids": ("zstd", of_spec(special_ids=[0, 3, 5, 6, 7, 8, 9, 412]), "its tokens give"),
    "skipped positions": ("zstd", of_spec(skip_positions=2), "its tokens give"),
    "begin of rows": ("zstd", of_spec(bos_id=2), "begins with the id 2"),
    "vocabulary": ("zstd", of_corpus(vocab_size=100), "the vocabulary"),
    "seed": ("zstd", of_spec(seed=6), "index/context/c/0: row"),
    "digest": ("zstd", of_corpus(ids_blake2b="0" * 32), "tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
def test_verify_compares_what_a_store_says_twice(copy: Make, case: str) -> None:
    """The fault: `verify --full` compared checksums with bytes, and no value with another."""
    codec, harm, expected = TWICE[case]
    root = copy(codec)
    assert lines(root) == ""
    harm(root)
    assert expected in lines(root)


@pytest.mark.parametrize("codec", hostile.KINDS)
def test_verify_is_silent_of_an_honest_store(made: Make, codec: str) -> None:
    assert lines(made(codec)) == ""


def test_every_file_gets_a_line_of_its_own(copy: Make) -> None:
    root = copy("int8")
    for shard in range(3):
        refile(root, f"{STAT}/sum/c/{shard}/0", with_crc(np.full(12, 1e9).tobytes()))
    found = lines(root).splitlines()
    assert [line.split(": ")[0] for line in found] == [f"{root}/{STAT}/sum/c/{shard}/0" for shard in range(3)]


# JSON


def nested(root: Path, path: str) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    if path == "zarr.json":
        (root / path).write_text(f'{{"attributes": {{"sagsae": {deep}}}}}')
    elif path in (INDEX, "manifest/metadata.json"):
        text = f'{{"v":1,"k":{deep}'
        (root / path).write_text(f'{text},"c":{seal({})["crc32c"]}}}\n')
        from shared.store.shard import crc32c

        (root / path).write_text(f'{text},"c":{crc32c((text + "}").encode())}}}\n')
    elif path == "record.json":
        (root / path).write_text(deep)
    else:
        refile(root, path, deep.encode())


@pytest.mark.parametrize("path", ["zarr.json", INDEX, "manifest/metadata.json", "record.json", f"{HOOK}/zarr.json",
                                  "index/context/zarr.json"])  # fmt: skip
def test_json_of_a_hundred_thousand_brackets(copy: Make, path: str) -> None:
    """The fault: JSON nested so deep was a RecursionError in every file of a store."""
    root = copy()
    nested(root, path)
    assert path.split("/")[-1] in lines(root) or "manifest" in lines(root)
    assert len(lines(root)) < 3000


def test_json_passes_one_gate() -> None:
    for bad in ("NaN", "[1e999]", '{"a": 1, "a": 2}', "9" * 5000, "[" * 70 + "]" * 70, b"\xff", b"", b"\xef\xbb\xbf{}"):
        with pytest.raises(BadData):
            parse_json(bad)
    with pytest.raises(BadData, match="more than 10"):
        parse_json(b" " * 11, limit=10)
    assert parse_json(json.dumps({"a": [1.5, None, "é", 2**64]})) == {"a": [1.5, None, "é", 2**64]}


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200), st.text('[]{}",:0123456789eE.-tfn\\u', max_size=60)))
def test_nothing_but_json_passes_the_gate(data: bytes | str) -> None:
    try:
        value = parse_json(data)
    except BadData as error:
        value = str(error)
    else:
        assert json.loads(data) == value
    assert len(quoted(value)) < 500


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab./\\:\x00\n~ é"), max_size=12) | st.text(max_size=30))
def test_a_safe_path_stays_in_its_folder(path: str) -> None:
    try:
        assert safe_path(path) == path
    except BadData:
        return
    inside = (Path("/folder") / path).resolve()
    assert inside.is_relative_to("/folder")
    assert inside != Path("/folder")


# Arrays of other tools


def foreign_blosc(inner: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "bytes", "configuration": {"endian": "little"}}, inner]


HOW = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": 2, "blocksize": 0}
BLOSC = {"name": "blosc", "configuration": HOW}
FIRST = struct.pack("<i", 20)
FOREIGN: dict[str, tuple[list[Any], bytes]] = {
    "blosc, stored, twenty bytes": (foreign_blosc(BLOSC), blosc_header(64 * 24, 64 * 24, 64 * 24 + 16) + b"abcd"),
    "blosc, other compressor": (foreign_blosc(BLOSC), blosc_header(64 * 24, 64 * 24, 40, 0x01) + FIRST + b"x" * 20),
    "blosc of 2 GiB": (foreign_blosc(BLOSC), blosc_header(2**31 - 32, 2**20, 40, 0x91) + FIRST + b"x" * 20),
    "a codec that runs what it is told": (foreign_blosc({"name": "numcodecs.pickle", "configuration": {}}), b"x" * 99),
    "a codec of another package": (foreign_blosc({"name": "numcodecs.lzma", "configuration": {}}), b"x" * 99),
    "no codec": (["gzip", 7], b"x" * 99),
    "a codec of no name": ([{"configuration": {}}], b"x"),
    "chunks of nothing": ([{"name": "sharding_indexed", "configuration": {
        "chunk_shape": [0, 12], "codecs": [{"name": "bytes"}], "index_codecs": [{"name": "bytes"}]}}], b"x" * 99),
    "shards in shards": ([{"name": "sharding_indexed", "configuration": {"chunk_shape": [16, 12], "codecs": [
        {"name": "sharding_indexed", "configuration": {}}], "index_codecs": [{"name": "bytes"}]}}], b"x" * 99),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_an_array_of_another_tool_is_bounded_too(copy: Make, case: str) -> None:
    """The kind: zarr-python hands a chunk to blosc as it is, and loads any codec that is installed."""
    root = copy()
    codecs, data = FOREIGN[case]
    document = json.loads((root / HOOK / "zarr.json").read_bytes())
    refile(root, f"{HOOK}/zarr.json", json.dumps({**document, "codecs": codecs}).encode())
    refile(root, f"{HOOK}/c/0/0", data)
    assert HOOK in lines(root)
    assert HOOK in refused(root, to_none)


def test_gzip_of_another_tool_does_not_unpack_to_gigabytes(copy: Make) -> None:
    root = copy()
    document = json.loads((root / HOOK / "zarr.json").read_bytes())
    codecs = foreign_blosc({"name": "gzip", "configuration": {"level": 1}})
    refile(root, f"{HOOK}/zarr.json", json.dumps({**document, "codecs": codecs}).encode())
    packer = zlib.compressobj(wbits=31)
    refile(root, f"{HOOK}/c/0/0", b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush())
    assert "holds more than" in lines(root)


# Settings


def test_numbers_of_thousands_of_digits(tmp_path: Path) -> None:
    """The fault: Python refuses to read them with a ValueError, which was a traceback."""
    from shared.schema import parse_set, read_toml

    with pytest.raises(UserError, match="--set 'tokens'"):
        parse_set([f"tokens={'9' * 5000}"])
    with pytest.raises(UserError, match="--set 'tokens'"):
        parse_set([f"tokens={'[' * 100_000}"])
    config = tmp_path / "c.toml"
    config.write_text(f"tokens = {'9' * 5000}\n")
    with pytest.raises(UserError, match="is not valid TOML"):
        read_toml(config)
    config.write_text(f"tokens = {'[' * 100_000}\n")
    with pytest.raises(UserError, match="is not valid TOML"):
        read_toml(config)


def test_a_message_repeats_a_line_of_what_was_wrong() -> None:
    """The fault: a wrong string of 2 MB came back whole on stderr."""
    from shared.config import TrainConfig
    from shared.schema import build, parse_set

    long = "x" * 2_000_000
    for values in ({"store": "s", "saes": [], "batch": long}, {long: 1}, {"store": "s", "saes": [], "device": [long]}):
        with pytest.raises(UserError) as info:
            build(TrainConfig, values)
        assert len(str(info.value)) < 2000
    with pytest.raises(UserError) as info:
        parse_set([long])
    assert len(str(info.value)) < 300


@pytest.mark.parametrize("values", [{"noise": 1e300}, {"coefficients": (1e300, 1e301)}, {"noise": float("inf")}])
def test_synthetic_rows_are_numbers(values: dict[str, Any]) -> None:
    """The fault: `synth --noise 1e300` was an OverflowError."""
    from shared.config import SynthConfig
    from shared.schema import build

    with pytest.raises(UserError):
        build(SynthConfig, values)


def test_deep_values_are_quoted_briefly() -> None:
    deep: Any = nest(100_000)
    for value in (deep, 10**10_000, "x" * 10**7, list(range(10**6)), {"a": 10**5000}, "\x1b[2J\ud800"):
        assert len(quoted(value)) < 200
        assert quoted(value).isprintable()
    while deep:
        deep = deep.pop()


def test_billions_of_tokens_that_are_not_there(copy: Make) -> None:
    """The kind: sizes that are allowed, and that this store does not have."""
    root = copy()
    sizes = {"n_tokens": 2**36, "shard_rows": 2**28, "chunk_rows": 2**23, "context": 2**16, "skip_positions": 1}
    respec(root, lambda about: about.update(sizes))
    (root / INDEX).write_text("")
    for act in (to_none, lambda root: Store.open(root).tokens()):
        refused(root, act)
    assert "metadata.json: does not name" in lines(root)
