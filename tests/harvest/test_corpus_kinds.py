"""Kinds of corpora beyond plain files: packed files, datasets in folders, ids, arrays; bad documents; the hub.

Everything is read from real files; ids have to give the rows that tokenising the same texts gives."""

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from huggingface_hub import errors as hub_errors
from support.command import ROOT
from support.models import CONTEXT, save_model, sentences
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

import cli
from harvest.corpus.documents import BadDocument, Corpus, JoinedIds
from harvest.corpus.open import open_corpus
from harvest.corpus.pack import PackCounts, cut, pack
from harvest.run import harvest
from shared.config import HarvestConfig
from shared.errors import UserError
from shared.request import RATES
from shared.store.opened import Store

TEXTS = ["the cat sat on the mat\n", "naïve café, 12 €", "", "if then else return"]
EOS, VOCABULARY = 0, 300
COMMIT = "0123456789abcdef0123456789abcdef01234567"

LARGE = {"chunk_rows": 1024, "shard_rows": 4096, "batch_tokens": 2048}  # few shards: harvests that take no time

MakeConfig = Callable[..., HarvestConfig]


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every socket is refused, with the libraries in the belief that they are online; an empty cache."""

    def refuse(*address: object, **_options: object) -> None:
        raise AssertionError(f"a connection was asked for: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def opened(corpus: Path | str, **settings: object) -> Corpus | JoinedIds:
    return open_corpus(HarvestConfig(model="tiny", corpus=str(corpus), **settings), None, VOCABULARY)


def corpus_of_documents(corpus: Path | str) -> Corpus:
    """One that is made of documents."""
    found = opened(corpus)
    assert isinstance(found, Corpus)
    return found


def documents_of(corpus: Path | str, **settings: object) -> list[Any]:
    """Every document, ids as a list; twice, because a second pass is a fresh one."""
    found = opened(corpus, **settings)
    passes = [list(found.documents() if isinstance(found, Corpus) else found.blocks()) for _ in range(2)]
    plain = [
        [document if isinstance(document, str) else np.asarray(document).tolist() for document in one] for one in passes
    ]
    assert plain[0] == plain[1]
    return plain[0]


def fails(corpus: Path | str, *parts: str, **settings: object) -> None:
    """Opening or reading raises UserError with one line that holds every one of `parts`."""
    with pytest.raises(UserError) as caught:
        documents_of(corpus, **settings)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def json_lines(documents: list[Any], field: str = "text") -> bytes:
    return "".join(json.dumps({"n": n, field: each}) + "\n" for n, each in enumerate(documents)).encode()


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


# --- packed files


@pytest.mark.parametrize(
    ("name", "packed"), [("a.jsonl.zst", zstd), ("A.JSONL.ZST", zstd), ("a.jsonl.gz", gzip.compress)]
)
def test_packed_lines(tmp_path: Path, name: str, packed: Callable[[bytes], bytes]) -> None:
    data, half = json_lines(TEXTS), 40
    (tmp_path / name).write_bytes(packed(data))
    assert documents_of(tmp_path / name) == TEXTS
    (tmp_path / name).write_bytes(packed(data[:half]) + packed(data[half:]))
    assert documents_of(tmp_path / name) == TEXTS, "of several frames"


@pytest.mark.parametrize(("name", "packed"), [("a.txt.zst", zstd), ("a.txt.gz", gzip.compress)])
def test_packed_text_is_one_document(tmp_path: Path, name: str, packed: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(packed("\ufeffnaïve\r\n\n€".encode()))
    assert documents_of(tmp_path) == ["naïve\r\n\n€"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.txt.gz"])
def test_damage_is_refused_whatever_is_done_with_bad_documents(tmp_path: Path, name: str) -> None:
    whole = (zstd if name.endswith("zst") else gzip.compress)(json_lines([os.urandom(3000).hex() for _ in range(20)]))
    path = tmp_path / name
    for data in (whole[: len(whole) // 2], whole[:40] + b"\xff" * 400 + whole[440:]):
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=rf"corpus .*{name}: is damaged or cut short \(.*\); fetch or write it again"
        ):
            list(corpus_of_documents(path).documents(lambda _error: None))
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    fails(tmp_path, f"{name}: cannot be read (No such file or directory)")


# --- datasets in folders


def data_set(documents: list[Any] = TEXTS, field: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({"n": list(range(len(documents))), field: documents})


def test_a_saved_data_set(tmp_path: Path) -> None:
    data_set().with_format("numpy").save_to_disk(tmp_path / "set", num_shards=2)
    corpus = opened(tmp_path / "set")
    assert documents_of(tmp_path / "set") == TEXTS
    files = corpus.description["files"]
    assert [file["name"] for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert str(tmp_path) not in json.dumps(corpus.description)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert opened(tmp_path / "moved").description == corpus.description
    fails(tmp_path / "moved", "has no field 'body'; there are: n, text.", text_field="body")
    fails(tmp_path / "moved", "example 1: 'n' is of type int, not a string", text_field="n")


def test_a_saved_data_set_of_one_split(tmp_path: Path) -> None:
    validation = datasets.Dataset.from_dict({"text": TEXTS}, split="validation")
    validation.save_to_disk(tmp_path / "set")
    assert documents_of(tmp_path / "set") == documents_of(tmp_path / "set", corpus_split="validation") == TEXTS
    assert opened(tmp_path / "set").description["split"] == "validation"
    fails(tmp_path / "set", "has no split 'test'; there are: validation.", corpus_split="test")


def test_saved_splits(tmp_path: Path) -> None:
    splits = {"train": data_set(), "test": data_set(["one", "two"])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert documents_of(tmp_path / "set") == TEXTS
    assert documents_of(tmp_path / "set", corpus_split="test") == ["one", "two"]
    descriptions = [opened(tmp_path / "set", corpus_split=split).description for split in splits]
    assert [each["files"][0]["name"].split("/")[0] for each in descriptions] == ["train", "test"]
    fails(tmp_path / "set", "has no split 'nope'; there are: train, test.", "--set corpus_split", corpus_split="nope")
    datasets.DatasetDict({"only": data_set()}).save_to_disk(tmp_path / "only")
    fails(tmp_path / "only", "has no split 'train'; there are: only.")


def test_a_damaged_saved_data_set(tmp_path: Path) -> None:
    data_set().save_to_disk(tmp_path / "set")
    next((tmp_path / "set").glob("*.arrow")).write_bytes(b"not arrow at all")
    fails(tmp_path / "set", "is not readable as a Hugging Face dataset", "another file or folder")
    (tmp_path / "set" / "state.json").write_text("{")
    fails(tmp_path / "set", "is not readable as a Hugging Face dataset")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A dataset repository with two configurations, as a clone leaves it."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.jsonl").write_bytes(json_lines(TEXTS))
    (folder / "data" / "b.jsonl").write_bytes(json_lines(["one", "two"]))
    (folder / "notes.txt").write_text("no part of the data")
    (folder / "README.md").write_text(
        """---
configs:
- {config_name: default, data_files: [{split: train, path: data/a.jsonl}]}
- {config_name: other, data_files: "data/b*.jsonl"}
---
About the data.
"""
    )
    return folder


def test_a_repository(repository: Path) -> None:
    assert documents_of(repository) == TEXTS
    assert documents_of(repository, corpus_config="other") == ["one", "two"]
    description = opened(repository).description
    assert [file["name"] for file in description["files"]] == ["data/a.jsonl"]
    assert str(repository.parent) not in json.dumps(description)
    moved = repository.rename(repository.parent / "elsewhere")
    assert opened(moved).description == description
    fails(moved, "(Bad split: nope. Available splits: ['train'])", corpus_split="nope")
    fails(moved, "(BuilderConfig 'nope' not found", corpus_config="nope")
    fails(moved, "has no field 'body'", text_field="body")


def test_a_repository_by_its_dataset_info(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("plain")  # the library takes a folder test_… above the data for the test split
    (folder / "train.jsonl").write_bytes(json_lines(TEXTS))
    (folder / "README.md").write_text("---\ndataset_info:\n  splits: [{name: train}]\n---\n")
    assert documents_of(folder) == TEXTS
    assert opened(folder).description["kind"] == "huggingface-repository"


def test_a_readme_alone_makes_no_repository(tmp_path: Path) -> None:
    for text in ("---\nlicense: mit\n---\nwords", "---\n[: {\n---\nwords", "words"):
        (tmp_path / "README.md").write_text(text)
        (tmp_path / "a.txt").write_text("one")
        assert documents_of(tmp_path) == ["one"]
        assert documents_of(tmp_path / "README.md") == [text], "asked for by its name"


def test_what_a_repository_may_not_name(repository: Path, tmp_path: Path) -> None:
    readme = repository / "README.md"
    card = readme.read_text()
    readme.write_text(card.replace("data/b*.jsonl", "https://example.com/b.jsonl"))
    fails(repository, "README.md names https://example.com/b.jsonl, which is not on this machine")
    (tmp_path / "secret.jsonl").write_bytes(json_lines(["secret"]))
    readme.write_text(card.replace("data/a.jsonl", str(tmp_path / "secret.jsonl")))
    fails(repository, "secret.jsonl, which is not below it")
    readme.write_text(card)
    (repository / ".huggingface.yaml").write_text("configs: []")
    fails(repository, "its .huggingface.yaml is not read", "README.md")


def test_a_repository_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<a>text</a>")
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: default, data_files: a.xml}]\n---\n")
    fails(tmp_path, "is stored as xml; arrow, csv, json, parquet, text can be read")


# --- documents that are ids


def packed(
    corpus: Corpus | JoinedIds, tokenizer: PreTrainedTokenizerBase, bos_id: int | None
) -> tuple[list[list[int]], PackCounts]:
    counts = PackCounts()
    if isinstance(corpus, JoinedIds):
        blocks = cut(corpus.blocks(), 5, bos_id, counts)
    else:
        blocks = pack(corpus.documents(), tokenizer, context=5, eos_id=EOS, bos_id=bos_id, counts=counts)
    return [row for block in blocks for row in block.tolist()], counts


def write_ids(path: Path, ids: list[list[int]], kind: str) -> Path:
    if kind == "jsonl":
        path = path / "a.jsonl"
        path.write_bytes(json_lines(ids, "input_ids"))
    elif kind == "parquet":
        path = path / "a.parquet"
        pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.uint16()))}), path, row_group_size=3)
    else:
        data_set(ids, "input_ids").save_to_disk(path / "set")
        path = path / "set"
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("bos_id", [None, 7])
def test_ids_give_the_rows_of_their_texts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str, bos_id: int | None
) -> None:
    texts = [*sentences(151), "", "", *TEXTS, "a text that spells <|endoftext|>"]
    (tmp_path / "texts.jsonl").write_bytes(json_lines(texts))
    expected, counted = packed(opened(tmp_path / "texts.jsonl"), tokenizer, bos_id)
    (tmp_path / "ids").mkdir()
    ids = ids_of(tokenizer, texts[:-1])
    ids[1::3] = [[*each, EOS] for each in ids[1::3]]  # some end in EOS already, one is nothing else
    assert [EOS] in ids
    assert [] in ids
    ids.append([*ids_of(tokenizer, texts[-1:])[0], EOS])
    corpus = opened(write_ids(tmp_path / "ids", ids, kind), text_field="input_ids")

    def refuse(*_names: object, **_options: object) -> None:
        raise AssertionError("ids need no tokenizer")

    rows, counts = packed(corpus, refuse, bos_id)
    assert rows == expected
    assert counts == counted


def test_texts_and_ids_may_be_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = sentences(100)
    mixed = [text if place % 3 else ids_of(tokenizer, [text])[0] for place, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "b.jsonl").write_bytes(json_lines(mixed))
    expected = packed(opened(tmp_path / "a.jsonl"), tokenizer, None)
    assert packed(opened(tmp_path / "b.jsonl"), tokenizer, None) == expected


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ([1, 300], ["'text'[1]: is id 300, outside 0 to 299", "does not match the model's vocabulary", "its text"]),
        ([-1], ["'text'[0]: is id -1, outside 0 to 299"]),
        ([0, 2**70], [f"is id {2**70}, outside"]),
        ([1, 2.0], ["'text' is a list of float; a text or a list of ids is expected"]),
        ([1, True], ["'text' is a list of bool"]),
        ([[1], [2]], ["'text' is a list of list"]),
        (["a", None], ["'text' is a list of NoneType and str"]),
    ],
)
def test_lists_that_are_no_ids(tmp_path: Path, value: list[Any], parts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([[299], value, []]))
    fails(tmp_path, "a.jsonl:2: ", *parts)
    bad: list[BadDocument] = []
    assert [np.asarray(ids).tolist() for ids in corpus_of_documents(tmp_path).documents(bad.append)] == [[299], []]
    assert len(bad) == 1


# --- arrays of ids


def write_array(folder: Path, ids: np.ndarray, kind: str, chunk: int = 7) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "npy":
        np.save(folder / "a.npy", ids)
        return folder / "a.npy"
    array = zarr.create_array(folder / "a.zarr", data=ids, chunks=(chunk, *ids.shape[1:]), compressors=None)
    assert array.metadata.zarr_format == 3
    return folder / "a.zarr"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harvest.corpus.arrays.BLOCK_IDS", 15)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["npy", "zarr"])
@pytest.mark.parametrize("dtype", ["<u2", ">i4", "int64", "uint64"])
@pytest.mark.parametrize("bos_id", [None, 7])
def test_one_stream(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str, dtype: str, bos_id: int | None
) -> None:
    (tmp_path / "texts.jsonl").write_bytes(json_lines([text for text in TEXTS if text]))
    joined = [number for text in TEXTS if text for number in (*ids_of(tokenizer, [text])[0], EOS)]
    path = write_array(tmp_path, np.array(joined, dtype), kind)
    corpus = opened(path)
    assert isinstance(corpus, JoinedIds)
    assert len(documents_of(path)) > 2, "several blocks"
    rows, counts = packed(corpus, tokenizer, bos_id)
    expected, counted = packed(opened(tmp_path / "texts.jsonl"), tokenizer, bos_id)
    assert rows == expected
    assert (counts.tokens, counts.rows, counts.dropped) == (counted.tokens, counted.rows, counted.dropped)
    description = corpus.description
    assert (description["kind"], description["name"], description["shape"]) == ("ids", path.name, [len(joined)])
    assert str(tmp_path) not in json.dumps(description)
    changed = np.array([*joined[:-1], 1], dtype)
    assert opened(write_array(tmp_path / "changed", changed, kind)).description != description


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_rows_are_taken_as_they_are(tmp_path: Path, harvest_config: MakeConfig, kind: str) -> None:
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (40, CONTEXT), dtype=np.uint16)
    path = write_array(tmp_path, np.asfortranarray(rows), kind)
    config = harvest_config(tmp_path / "out", corpus=str(path), tokens=None, hooks=("mlp_out",))
    store = Store.open(harvest(config).store)
    assert np.array_equal(store.tokens(), rows)
    assert store.spec.bos_id is None
    assert store.spec.corpus["shuffled"] is False
    with pytest.raises(UserError, match=r"^--context 8: .* rows of 16 ids.*Use --context 16, or give .* one stream"):
        harvest(config.model_copy(update={"context": 8, "name": "t"}))
    with pytest.raises(UserError, match=r"^bos: .* so no BOS can be added"):
        harvest(config.model_copy(update={"bos": "true", "name": "t"}))
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"s", RATES}


def test_the_tokens_of_a_store_are_a_corpus(tmp_path: Path, store: Store, harvest_config: MakeConfig) -> None:
    config = harvest_config(tmp_path, corpus=f"{store.root}/tokens", tokens=1000, hooks=("mlp_out",), **LARGE)
    again = Store.open(harvest(config).store)
    assert np.array_equal(again.tokens(), store.tokens()[:63])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_ids_that_the_model_does_not_know(tmp_path: Path, kind: str) -> None:
    stream = np.zeros(100, np.int32)
    stream[[57, 60]] = 300, -5
    fails(write_array(tmp_path, stream, kind), "position 57: is id 300, outside 0 to 299", "vocabulary")
    rows = np.zeros((30, 4), np.int64)
    rows[11, 2] = -1
    fails(write_array(tmp_path / "rows", rows, kind), "position 11, 2: is id -1, outside 0 to 299")


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_arrays_that_are_no_ids(tmp_path: Path, kind: str) -> None:
    for number, array in enumerate([np.zeros(3), np.zeros((2, 2, 2), int), np.array(3), np.zeros(3, bool)]):
        if not array.ndim and kind == "zarr":
            continue
        words = "dimensions; [ids] (one stream) or [rows, context]" if array.dtype == int else "whole numbers"
        fails(write_array(tmp_path / str(number), array, kind), words)


def test_arrays_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_array(tmp_path, np.zeros(1000, np.int32), "npy")
    path.write_bytes(path.read_bytes()[:500])
    fails(path, "a.npy: is not a .npy file of numbers (", "numpy.save")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    fails(path, "a.npy: is not a .npy file of numbers (")
    path.write_bytes(b"plain")
    fails(path, "a.npy: is not a .npy file of numbers (")
    zarr.create_group(tmp_path / "group").create_array("ids", data=np.zeros(3, int))
    fails(tmp_path / "group", "group: is not a Zarr array that can be read (", "the folder of one array of ids")
    torn = write_array(tmp_path, np.arange(100) % 3, "zarr", chunk=50)
    (torn / "c" / "1").write_bytes(b"torn")
    fails(torn, "a.zarr: cannot be read at 0 (", "write it again")
    fails("nope.npy", "there is no such file or folder")


# --- bad documents

BAD_LINES = b'{"text": "one"}\n{"text": "\xe9"}\nnot json\n{"body": 1}\n{"text": 3}\n{"text": [900]}\n{"text": "two"}\n'


def test_every_bad_line_is_told_and_the_next_is_read(tmp_path: Path) -> None:
    for name, data in (
        ("a.jsonl", BAD_LINES),
        ("a.jsonl.gz", gzip.compress(BAD_LINES)),
        ("a.jsonl.zst", zstd(BAD_LINES)),
    ):
        (tmp_path / name).write_bytes(data)
        bad: list[BadDocument] = []
        assert list(corpus_of_documents(tmp_path / name).documents(bad.append)) == ["one", "two"]
        assert [str(error).split(": ")[0] for error in bad] == [f"{tmp_path / name}:{line}" for line in range(2, 7)]
        words = ["not UTF-8", "not JSON", "no field 'text'", "of type int", "is id 900"]
        assert all(word in str(error) for word, error in zip(words, bad, strict=True))


def test_bad_documents_of_other_kinds(tmp_path: Path) -> None:
    def told(path: Path) -> tuple[list[Any], list[str]]:
        bad: list[BadDocument] = []
        return list(corpus_of_documents(path).documents(bad.append)), [
            str(error).removeprefix(f"{tmp_path}/") for error in bad
        ]

    (tmp_path / "a.txt").write_bytes(b"one\n\xe9")
    assert told(tmp_path / "a.txt") == (
        [],
        ["a.txt:2: is not UTF-8 (unexpected end of data); convert the file to UTF-8"],
    )
    column = pa.array([b"one", b"\xe9", None, b"two"]).buffers()
    latin = pa.Array.from_buffers(pa.string(), 4, column)
    pq.write_table(pa.table({"text": latin}), tmp_path / "a.parquet")
    texts, errors = told(tmp_path / "a.parquet")
    assert texts == ["one", "two"]
    assert errors[0].startswith("a.parquet, row 2: 'text' is not UTF-8")
    assert errors[1].startswith("a.parquet, row 3: 'text' is of type NoneType")
    data_set(["one", None, "two"]).save_to_disk(tmp_path / "set")
    texts, errors = told(tmp_path / "set")
    assert texts == ["one", "two"]
    assert "example 2: 'text' is of type NoneType" in errors[0]


@pytest.fixture
def bad_corpus(tmp_path: Path) -> Path:
    """120 documents, of which every tenth is empty and every twelfth is bad."""
    lines = json_lines([text if n % 10 else " " for n, text in enumerate(sentences(120))]).splitlines()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(b"broken" if n % 12 == 11 else line for n, line in enumerate(lines)))
    return path


def test_a_harvest_refuses_or_skips_and_counts(
    tmp_path: Path, bad_corpus: Path, harvest_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harvest_config(tmp_path / "out", corpus=str(bad_corpus), tokens=None, hooks=("mlp_out",), **LARGE)
    with pytest.raises(UserError, match=r"bad\.jsonl:12: is not JSON"):
        harvest(config)
    assert not (tmp_path / "out" / "s").exists()
    skip = config.model_copy(update={"on_bad_document": "skip"})
    store = Store.open(harvest(skip).store)
    said = capsys.readouterr().err
    assert said.count("is not JSON") == 1
    assert f"skipped: {bad_corpus}:12: is not JSON" in said
    assert "10 bad documents were skipped" in said
    corpus = store.spec.corpus
    assert (corpus["documents"], corpus["empty_documents"], corpus["bad_documents"]) == (98, 12, 10)
    assert corpus["on_bad_document"] == "skip"
    harvest(skip)
    assert "is complete" in capsys.readouterr().err
    with pytest.raises(UserError, match="on_bad_document: the store has skip, this asks for refuse"):
        harvest(config)


def test_nothing_but_bad_documents(tmp_path: Path, harvest_config: MakeConfig) -> None:
    (tmp_path / "a.jsonl").write_text('3\n4\n{"text": ""}\n')
    config = harvest_config(tmp_path / "out", corpus=str(tmp_path / "a.jsonl"), on_bad_document="skip")
    with pytest.raises(UserError, match=r"no document with text \(1 empty ones, 2 bad ones\)"):
        harvest(config)


def test_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[HarvestConfig] = []

    def keep(config: HarvestConfig) -> None:
        configs.append(config)
        raise UserError("kept")

    monkeypatch.setattr("harvest.run.harvest", keep)
    for options in ([], ["--on-bad-document", "skip", "--set", "corpus_revision=v2"], ["--on-bad-document", "ask"]):
        result = CliRunner().invoke(cli.app, ["harvest", "--model", "tiny", *options])
    assert [config.on_bad_document for config in configs] == ["refuse", "skip"]
    assert [config.corpus_revision for config in configs] == [None, "v2"]
    assert "--on-bad-document: must be refuse or skip (got 'ask')" in str(result.exception)


# --- what a harvest gives


def test_tokens_are_exact(tmp_path: Path, harvest_config: MakeConfig) -> None:
    asked = random.Random(1).sample(range(1, 600), 10)
    for tokens in asked:
        config = harvest_config(tmp_path, tokens=tokens, hooks=("mlp_out",), name=f"t{tokens}", **LARGE)
        done = harvest(config)
        store = Store.open(done.store)
        assert done.tokens == store.spec.n_tokens == store.n_rows == tokens
        assert store.tokens().shape == (-(-tokens // CONTEXT), CONTEXT)


PACK = """
import sys, numpy as np, hashlib
from pathlib import Path
from tokenizers import Tokenizer  # alone: it holds the threads, transformers only the seconds to import it
from harvest.corpus.pack import PackCounts, pack
texts = Path(sys.argv[2]).read_text().split("|")
fast = Tokenizer.from_file(f"{sys.argv[1]}/tokenizer.json")
def tokenizer(texts, **_options):
    return {"input_ids": [each.ids for each in fast.encode_batch(texts, add_special_tokens=False)]}
blocks = pack(iter(texts), tokenizer, context=16, eos_id=0, bos_id=None, counts=PackCounts())
print(hashlib.sha256(np.concatenate(list(blocks)).tobytes()).hexdigest())
"""


def test_packing_does_not_depend_on_the_tokenizers_threads(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "texts").write_text("|".join(sentences(1000)))
    settings: list[dict[str, str]] = [
        {"TOKENIZERS_PARALLELISM": "false"},
        {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"},
        {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "5"},
    ]
    command = [sys.executable, "-c", PACK, str(model_folder), str(tmp_path / "texts")]
    running = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **each}, stdout=subprocess.PIPE, text=True)
        for each in settings
    ]
    digests = [process.communicate(timeout=120)[0] for process in running]
    assert len(digests[0]) == 65
    assert len(set(digests)) == 1


# --- the hub


@pytest.fixture
def hub_says(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[object]]:
    """Sets the hub's answer about every dataset, an error or COMMIT; returns the questions."""
    questions: list[object] = []

    def say(error: Exception | None) -> list[object]:
        def answer(_api: object, name: str, revision: str | None, timeout: float) -> SimpleNamespace:
            questions.append((name, revision, timeout))
            if error:
                raise error
            return SimpleNamespace(sha=COMMIT)

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", answer)
        return questions

    return say


def refusal(kind: Callable[..., Exception]) -> Exception:
    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (hub_errors.GatedRepoError, ["corpus owner/name: needs permission", "hf auth login"]),
        (hub_errors.RevisionNotFoundError, ["corpus_revision v2: owner/name has no such branch, tag or commit"]),
        (hub_errors.RepositoryNotFoundError, ["has no dataset of that name", "local file or folder"]),
    ],
)
def test_what_the_hub_refuses(
    hub_says: Callable[[Exception | None], list[object]], kind: type[Exception], parts: list[str]
) -> None:
    questions = hub_says(refusal(kind))
    fails("owner/name", *parts, corpus_revision="v2")
    assert questions == [("owner/name", "v2", 2)]


def test_names_that_the_hub_cannot_have() -> None:
    fails("owner/na me", "Hugging Face has no dataset of that name")


def test_out_of_reach_and_not_in_the_cache(
    hub_says: Callable[[Exception | None], list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_names: object, **_options: object) -> None:
        raise AssertionError("would try for half a minute")

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub_says(httpx.ConnectTimeout("slow"))
    fails("owner/name", "cannot be reached (ConnectTimeout)", "not in the local cache either", "the network")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("owner/name", "cannot be reached (OfflineModeIsEnabled)")


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """What `datasets.load_dataset("owner/name")` leaves in the library's cache."""
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines(TEXTS))
    place = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / COMMIT
    datasets.load_dataset_builder(str(folder)).download_and_prepare(output_dir=str(place))
    return place


def test_out_of_reach_but_in_the_cache(
    cached: Path, hub_says: Callable[[Exception | None], list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    hub_says(httpx.ConnectError("none"))
    assert documents_of("owner/name") == TEXTS
    assert opened("owner/name", corpus_revision=COMMIT).description["commit"] == COMMIT
    assert f"cannot be reached (ConnectError); commit {COMMIT} is in the local cache" in capsys.readouterr().err
    fails("owner/name", f"has commit {COMMIT}, not corpus_revision v2", corpus_revision="v2")
    fails("owner/name", "Bad split: nope", corpus_split="nope")
    fails("owner/name", "not in the local cache either", corpus_config="nope")
    renamed = cached.parents[1].rename(cached.parents[2] / "sub")
    info = renamed / "0.0.0" / COMMIT / "dataset_info.json"
    info.write_text(info.read_text().replace('"config_name": "default"', '"config_name": "sub"'))
    fails("owner/name", "the local cache has sub", "--set corpus_config=sub")
    assert documents_of("owner/name", corpus_config="sub") == TEXTS


def test_a_revision_of_something_local(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    fails(tmp_path / "a.txt", "corpus_revision v2: ", "is on this machine", corpus_revision="v2")


def test_ids_are_checked_against_the_model(tmp_path: Path, harvest_config: MakeConfig) -> None:
    """The model's own vocabulary, which is wider than its tokenizer's."""
    model = save_model(tmp_path / "wide", vocab_size=320)
    for number, last in enumerate((319, 320)):
        ids = np.append(np.zeros(100, int), last)
        np.save(tmp_path / "a.npy", ids)
        config = harvest_config(
            tmp_path,
            model=str(model),
            corpus=str(tmp_path / "a.npy"),
            tokens=None,
            hooks=("mlp_out",),
            name=f"s{number}",
        )
        if last < 320:
            assert harvest(config).tokens == 96
        else:
            with pytest.raises(UserError, match="position 100: is id 320, outside 0 to 319"):
                harvest(config)


def test_reading_corpora_is_lazy() -> None:
    code = (
        "import sys, harvest.corpus.open; print({'datasets', 'zarr', 'huggingface_hub', 'pyarrow'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_count_of_uses_is_switched_off(hub_says: Callable[[Exception | None], list[object]]) -> None:
    """Reading a named dataset asks the hub for it, and nothing else."""
    hub_says(None)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = True
    seen: list[object] = []

    def load(*_names: object, **options: object) -> datasets.IterableDataset:
        seen.append((datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, options["revision"]))
        return data_set().to_iterable_dataset()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        assert documents_of("owner/name") == TEXTS
    assert seen == [(False, COMMIT)]
