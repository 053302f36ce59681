"""What makes two stores the same, how wide their shards are, and how fast a folder of them is read."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvest.reuse.key import environment_in, environment_of, rows_key, store_folder, store_key, token_key
from harvest.reuse.scan import scan_stores
from harvest.reuse.shape import FEW_TOKENS, SHARD_BYTES, fixed_shape
from shared.config import store_name
from shared.files.local import LocalFiles
from shared.store.opened import Store, state_document, write_state
from shared.store.spec import HookSpec, StoreSpec

CORPUS = {
    "source": {"kind": "files", "files": [{"name": "a.txt", "blake2b": "00", "bytes": 3}], "text_field": "text"},
    "shuffled": True, "on_bad_document": "refuse", "whole": False, "vocab_size": 300, "documents": 7,
    "ids_blake2b": "0" * 32,
}  # fmt: skip
SPEC = StoreSpec(
    model={"name": "tiny", "commit": "c" * 64, "local": True, "dtype": "float32", "attention": "sdpa",
           "weight_processing": "none"},
    tokenizer={"blake2b": "t" * 64, "eos_id": 0}, corpus=CORPUS, context=16, bos_id=None, special_ids=(0,),
    n_tokens=5000, token_dtype="uint16", hookpoints={"layer_01/mlp_out": HookSpec(name="x", d_in=8)},
    dtype="bfloat16", codec="zstd", chunk_rows=64, shard_rows=512, seed=0,
)  # fmt: skip


def changed(**changes: Any) -> StoreSpec:
    """The spec with other fields; those of the model and the corpus by `model__name`."""
    about = SPEC.model_dump()
    for key, value in changes.items():
        inside, _, name = key.partition("__")
        if name:
            about[inside] = {**about[inside], name: value}
        else:
            about[key] = value
    return StoreSpec.model_validate(about)


SAME: dict[str, Any] = {
    "model__name": st.text(max_size=30), "model__local": st.booleans(), "n_tokens": st.integers(1, 10**9),
    "token_dtype": st.sampled_from(["uint16", "uint32"]), "corpus__documents": st.integers(0, 10**6),
    "corpus__empty_documents": st.integers(0, 9), "corpus__bad_documents": st.integers(0, 9),
    "corpus__whole": st.booleans(), "corpus__ids_blake2b": st.just("f" * 32),
    "hookpoints": st.just({"layer_02/attn_out": HookSpec(name="blocks.2.hook_attn_out", d_in=4)}),
}  # fmt: skip
"""What never counts."""
OTHER: dict[str, Any] = {
    "model__commit": "d" * 64, "model__dtype": "bfloat16", "model__attention": "eager",
    "model__weight_processing": "folded", "tokenizer": {"blake2b": "u" * 64, "eos_id": 0}, "special_ids": (0, 5),
    "bos_id": 0, "context": 32, "skip_positions": 2, "seed": 1, "dtype": "float32", "codec": "lz4", "chunk_rows": 32,
    "shard_rows": 1024, "corpus__shuffled": False, "corpus__on_bad_document": "skip",
    "corpus__source": {**CORPUS["source"], "files": [{"name": "a.txt", "blake2b": "01", "bytes": 3}]},
}  # fmt: skip
"""What each makes another store."""
OF_THE_TOKENS = {"tokenizer", "special_ids", "bos_id", "context", "seed"}


@given(st.fixed_dictionaries({}, optional=SAME), st.sampled_from([None, *OTHER]))
def test_the_key_is_of_content_alone(same: dict[str, Any], other: str | None) -> None:
    difference = {} if other is None else {other: OTHER[other]}
    spec = changed(**same, **difference)
    assert (store_key(spec) == store_key(SPEC)) == (other is None)
    of_rows = other is not None and other not in ("codec", "chunk_rows", "shard_rows")
    assert (rows_key(spec) == rows_key(SPEC)) == (not of_rows)
    of_tokens = other is not None and (other in OF_THE_TOKENS or other.startswith("corpus__"))
    assert (token_key(spec) == token_key(SPEC)) == (not of_tokens)


def test_every_difference_makes_another_key() -> None:
    keys = {store_key(changed(**{name: value})) for name, value in OTHER.items()}
    assert len(keys | {store_key(SPEC)}) == len(OTHER) + 1


def test_the_key_survives_the_disk_and_older_stores(tmp_path: Path) -> None:
    write_state(LocalFiles(tmp_path), SPEC, "writing")
    document = json.loads((tmp_path / "zarr.json").read_text())["attributes"]["sagsae"]
    document.pop("crc32c")
    document.pop("state")
    assert store_key(StoreSpec.model_validate(document)) == store_key(SPEC)
    older = {key: value for key, value in CORPUS.items() if key != "on_bad_document"}
    assert store_key(SPEC.model_copy(update={"corpus": older})) == store_key(SPEC), "older stores refused"
    odd = SPEC.model_copy(update={"model": {"name": "x", "commit": None}, "corpus": {"ids_blake2b": "0" * 32}})
    assert store_key(odd) != store_key(SPEC)


def test_the_environment_is_of_versions_and_the_device() -> None:
    versions = {"torch": "2.9", "transformers": "5", "transformer-lens": "3", "zarr": "3"}
    record = {"versions": versions, "device": "cpu"}
    same = {**record, "versions": {**versions, "zarr": "4"}, "command": "sagsae"}
    assert environment_of(record) == environment_of(same)
    for other in ({**record, "device": "NVIDIA H200"}, {**record, "versions": {"torch": "2.8"}}, {}):
        assert environment_of(record) != environment_of(other)
    for data in (b"", b"[1]", b"{", b'{"versions": 3}'):
        assert environment_in(data) == environment_of({})


# the shape


@given(
    width=st.integers(1, 1 << 15), itemsize=st.sampled_from([2, 4]), tokens=st.integers(1, 10**10),
    more=st.integers(1, 10**10), hooks=st.integers(1, 200),
)  # fmt: skip
def test_the_shape_follows_from_the_width(width: int, itemsize: int, tokens: int, more: int, hooks: int) -> None:
    row = width * itemsize
    chunk, shard = fixed_shape(row, row, tokens)
    assert chunk * row <= 2 << 20 < 2 * chunk * row
    assert chunk & (chunk - 1) == 0
    assert shard // chunk <= (16 if tokens < FEW_TOKENS else 128)
    if (tokens < FEW_TOKENS) == (more < FEW_TOKENS):
        assert fixed_shape(row, row, more) == (chunk, shard)
    together = fixed_shape(row, hooks * row, tokens)
    assert together[0] == chunk
    assert together[1] * hooks * row <= max(SHARD_BYTES, chunk * hooks * row)
    if shard * hooks * row <= SHARD_BYTES:
        assert together == (chunk, shard), "hookpoints do not change it as long as memory suffices"


@pytest.mark.parametrize(
    ("width", "tokens", "shape"),
    [(768, 100_000, (1024, 16_384)), (768, 1 << 20, (1024, 131_072)), (2048, 20_000_000, (512, 65_536)),
     (2048, 100_000, (512, 8192)), (256, 20_000_000, (4096, 524_288)), (4096, 20_000_000, (256, 32_768))],
)  # fmt: skip
def test_shapes_of_known_models(width: int, tokens: int, shape: tuple[int, int]) -> None:
    assert fixed_shape(2 * width, 2 * width, tokens) == shape


# folders


@given(
    st.text(max_size=80),
    st.lists(
        st.sampled_from([f"layer_{n:02d}/{h}" for n in (0, 8, 12) for h in ("mlp_out", "attn.hook_z")]), min_size=1
    ),
    st.none() | st.integers(1, 10**12),
)
def test_a_folder_has_a_name_that_a_harvest_takes(label: str, hooks: list[str], tokens: int | None) -> None:
    name = store_folder(label, hooks, tokens, "k")
    assert store_name(name) == name
    assert len(name) < 160
    assert name == store_folder(label, hooks, tokens, "k")
    assert name != store_folder(label, hooks, (tokens or 0) + 1, "k")


def test_a_folder_says_what_it_holds() -> None:
    assert store_folder("pythia-1b", ["layer_08/mlp_out"], 20_000_000, "k").startswith("pythia-1b-l8-mlp_out-20M-")
    assert store_folder("gpt2", ["layer_00/a", "layer_00/b"], 250_000, "k").startswith("gpt2-l0-2hooks-250k-")
    assert store_folder("gpt2", ["layer_00/a", "layer_01/b"], None, "k").startswith("gpt2-2hooks-all-")


def test_a_thousand_stores_are_read_in_a_second(store: Store, tmp_path: Path) -> None:
    for number in range(1000):
        folder = tmp_path / f"s{number:04d}"
        folder.mkdir()
        (folder / "zarr.json").write_bytes(state_document(store.spec, "final"))
        (folder / "record.json").write_bytes((store.root / "record.json").read_bytes())
    started = time.process_time()
    found = scan_stores(tmp_path)
    seconds = time.process_time() - started
    assert len(found) == 1000
    assert {(each.key, each.rows, each.complete) for each in found} == {(store_key(store.spec), 5000, True)}
    assert seconds < 3.0, "0.2 without the type checks of the tests"


def test_what_is_no_store_is_left_out(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan_stores(tmp_path / "nothing") == []
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "zarr.json").write_text("{")
    (tmp_path / "good").symlink_to(store.root)
    assert [each.store for each in scan_stores(tmp_path, sizes=True)] == ["good"]
    assert "left out" in capsys.readouterr().err
    assert scan_stores(tmp_path, sizes=True)[0].bytes == store.commits.n_bytes
