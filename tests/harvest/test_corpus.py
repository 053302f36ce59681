"""Every kind of corpus, the shuffle's order, packing against its six-line definition, and each error's message."""

import gzip
import json
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harvest.corpus.documents import Corpus
from harvest.corpus.open import open_corpus
from harvest.corpus.pack import PackCounts, pack, shuffled
from shared.config import HarvestConfig
from shared.errors import UserError

TEXTS = ["the cat sat on the mat\n", "naïve café, 12 €", "  leading and trailing  ", "line one\r\nline two", "ends"]
EOS = 0


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    def refuse(*address: object, **_options: object) -> None:
        raise AssertionError(f"a connection was asked for: {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like Pythia's: EOS and BOS are id 0. It believes in a context of 8, and adds BOS."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS * 4, trainer)
    model.enable_truncation(8)  # as some tokenizer.json files do: packing must not obey it
    model.enable_padding(length=32)
    name = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=name, bos_token=name, pad_token=name, model_max_length=8, add_bos_token=True
    )


def opened(corpus: Path | str, **settings: object) -> Corpus:
    corpus_of_texts = open_corpus(HarvestConfig(model="tiny", corpus=str(corpus), **settings), None, 300)
    assert isinstance(corpus_of_texts, Corpus)
    return corpus_of_texts


def texts_of(corpus: Path | str, **settings: object) -> list[Any]:
    return list(opened(corpus, **settings).documents())


def write_jsonl(path: Path, texts: list[str] = TEXTS, field: str = "text") -> Path:
    data = "".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, texts: Sequence[str | None] = TEXTS, field: str = "text") -> Path:
    pq.write_table(pa.table({"id": range(len(texts)), field: texts}), path, row_group_size=2)
    return path


# --- packing


def naive_pack(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, context: int, bos_id: int | None
) -> list[list[int]]:
    ids: list[int] = []
    for text in texts:
        if text.strip():
            ids += [*tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)), EOS]
    width = context - (bos_id is not None)
    starts = range(0, len(ids) - width + 1, width)
    return [([] if bos_id is None else [bos_id]) + ids[start : start + width] for start in starts]


documents = st.lists(st.one_of(st.text(max_size=30), st.sampled_from([*TEXTS, "", " \n\t\u2003"])), max_size=150)


@settings(deadline=None)
@given(texts=documents, context=st.integers(2, 40), bos_id=st.sampled_from([None, 0, 7]))
def test_rows_are_the_joined_ids_cut(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int, bos_id: int | None
) -> None:
    texts = [*texts, "never empty"]
    counts = PackCounts()
    blocks = list(pack(iter(texts), tokenizer, context=context, eos_id=EOS, bos_id=bos_id, counts=counts))
    rows = [row for block in blocks for row in block.tolist()]
    assert rows == naive_pack(texts, tokenizer, context, bos_id)
    assert all(block.dtype == np.int64 and block.shape[1] == context and len(block) for block in blocks)
    assert counts.rows == len(rows)
    assert counts.documents + counts.empty == len(texts)
    assert counts.empty == sum(not text.strip() for text in texts)
    assert counts.tokens == counts.dropped + len(rows) * (context - (bos_id is not None))
    assert counts.dropped < context


def test_packing_reads_one_batch_ahead_at_most(tokenizer: PreTrainedTokenizerFast) -> None:
    read = Counter[str]()

    def endless() -> Iterator[str]:
        while True:
            read["documents"] += 1
            yield "the cat sat on the mat"

    counts = PackCounts()
    blocks = pack(endless(), tokenizer, context=5, eos_id=EOS, bos_id=0, counts=counts)
    for batch in range(1, 4):
        assert (next(blocks)[:, 0] == 0).all()
        assert read["documents"] == counts.documents == 64 * batch


def test_long_documents_are_neither_cut_nor_warned_about(tokenizer: PreTrainedTokenizerFast) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logger = logging.getLogger("transformers")  # does not propagate, so caplog would see nothing
    logger.addHandler(handler)
    tokenizer.deprecation_warnings.clear()  # it warns once
    try:
        blocks = list(pack(iter(["x" * 5000]), tokenizer, context=100, eos_id=EOS, bos_id=None, counts=PackCounts()))
    finally:
        logger.removeHandler(handler)
    assert np.concatenate(blocks).shape == (50, 100)
    assert not records


def test_less_than_one_row_gives_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    counts = PackCounts()
    assert not list(pack(iter(["ends"]), tokenizer, context=1000, eos_id=EOS, bos_id=None, counts=counts))
    assert counts.rows == 0
    assert counts.dropped == counts.tokens > 1


@pytest.mark.parametrize("texts", [[], ["", " \n"] * 40])
def test_a_corpus_without_text_is_an_error(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    blocks = pack(iter(texts), tokenizer, context=8, eos_id=EOS, bos_id=None, counts=PackCounts())
    with pytest.raises(UserError, match=rf"no document with text \({len(texts)} empty ones\).*--corpus"):
        next(blocks)


# --- shuffling


def order(n: int, seed: int, buffer: int) -> list[int]:
    return [int(str(text)) for text in shuffled(map(str, range(n)), seed, buffer)]


def test_golden_order() -> None:
    """May change only with a new version of the store's format: a resumed harvest would mix two orders."""
    assert order(10, seed=0, buffer=100) == [4, 8, 6, 2, 1, 5, 7, 9, 3, 0]
    assert order(10, seed=0, buffer=4) == [0, 3, 2, 5, 1, 7, 6, 8, 9, 4]


@pytest.mark.parametrize("buffer", [1, 7, 199, 200, 100_000])
def test_shuffle_gives_every_document_once(buffer: int) -> None:
    assert sorted(order(200, 3, buffer)) == list(range(200))
    assert order(200, 3, buffer) == order(200, 3, buffer)
    if buffer > 1:
        assert order(200, 3, buffer) != order(200, 4, buffer)
        assert order(200, 3, buffer) != list(range(200))


def test_shuffle_of_nothing() -> None:
    assert order(0, 0, 10) == []


def test_a_document_waits_for_the_buffer_to_fill() -> None:
    assert all(document < place + 7 for place, document in enumerate(order(200, 3, 7)))


def test_a_small_corpus_is_permuted_uniformly() -> None:
    seen = Counter(tuple(order(3, seed, 3)) for seed in range(1200))
    assert len(seen) == 6
    assert all(150 < count < 250 for count in seen.values())


# --- local files


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines_round_trip(tmp_path: Path, name: str, field: str) -> None:
    corpus = opened(write_jsonl(tmp_path / name, field=field), text_field=field)
    assert list(corpus.documents()) == TEXTS
    assert list(corpus.documents()) == TEXTS, "a second pass is a fresh one"


def test_json_lines_may_have_blank_lines_a_bom_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two\\u00e9"}')
    assert texts_of(path) == ["one", "twoé"]


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("\ufeffnaïve\r\n\n€".encode())
    assert texts_of(path) == ["naïve\r\n\n€"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_round_trip(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"n": list(range(len(TEXTS))), "body": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts_of(tmp_path / "a.parquet", text_field="body") == TEXTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two levels, every kind, and a file that is none."""
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / "b.txt").write_text("of b.txt")
    (root / "b" / "z.md").write_text("of b/z.md")
    (root / "notes.xml").write_text("not read")
    write_jsonl(root / "a.jsonl", ["of a.jsonl"])
    write_jsonl(root / "b" / "c.jsonl.gz", ["of b/c.jsonl.gz"])
    write_parquet(root / "d.parquet", ["of d.parquet"])
    return root


def test_a_folder_is_its_files_by_relative_path(folder: Path) -> None:
    corpus = opened(folder)
    names = ["a.jsonl", "b.txt", "b/c.jsonl.gz", "b/z.md", "d.parquet"]
    assert [file["name"] for file in corpus.description["files"]] == names
    assert list(corpus.documents()) == [f"of {name}" for name in names]


def test_the_description_follows_the_bytes_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    before = opened(folder).description
    assert json.loads(json.dumps(before)) == before
    assert str(tmp_path) not in json.dumps(before)
    moved = folder.rename(tmp_path / "elsewhere")
    assert opened(moved).description == before
    assert opened(moved, text_field="body").description != before
    (moved / "b.txt").write_text("of B.txt")
    changed = opened(moved).description
    differing = [new["name"] for old, new in zip(before["files"], changed["files"], strict=True) if old != new]
    assert differing == ["b.txt"]
    (moved / "b.txt").rename(moved / "b2.txt")
    assert opened(moved).description not in (before, changed)


def test_description_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    digest = "cf4ab791c62b8d2b2109c90275287816"  # b2sum -l 128
    files = [{"name": "a.txt", "bytes": 3, "blake2b": digest}]
    assert opened(tmp_path / "a.txt").description == {"kind": "files", "files": files, "text_field": "text"}


def test_the_default_is_the_file_beside_the_model(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "corpus.jsonl")
    beside = open_corpus(HarvestConfig(model="tiny"), path, 300)
    assert isinstance(beside, Corpus)
    assert list(beside.documents()) == TEXTS
    for none in (None, tmp_path / "absent.jsonl"):
        with pytest.raises(UserError, match="no corpus: pass --corpus FILE"):
            open_corpus(HarvestConfig(model="tiny"), none, 300)


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "corpus.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/corpus.jsonl", "corpus.jsonl", "./corpus.jsonl", "."):
        assert texts_of(name) == TEXTS


# --- what a user can get wrong


def fails(corpus: Path | str, *parts: str, **settings: object) -> None:
    """Opening or reading `corpus` raises UserError with one line that holds every one of `parts`; ^ is its start."""
    with pytest.raises(UserError) as caught:
        texts_of(corpus, **settings)
    message = f"^{caught.value}"
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "name", ["./nope", "/nope", "~/nope", "~nobody/nope", "data/nope.csv", "nope.jsonl", "a/b/c", "nope/", "a\\b"]
)
def test_a_missing_path_is_not_looked_up(name: str) -> None:
    fails(name, f"corpus {name}: there is no such file or folder", "OWNER/NAME")


def test_an_empty_name() -> None:
    fails(" ", "--corpus is empty", "file, a folder or")


def test_a_file_of_unknown_extension(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("x")
    kinds = ".jsonl, .ndjson, .json, .csv, .tsv, .txt, .md, each also with .gz or .zst behind it; .parquet; .npy"
    fails(tmp_path / "a.xml", "a.xml", "not known", kinds)


def test_a_folder_without_usable_files(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("x")
    fails(
        tmp_path,
        str(tmp_path),
        "no file that can be read",
        ".jsonl",
        ".parquet",
        "left out 1 (1 of other formats: .xml)",
    )


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    fails(tmp_path / "pipe.jsonl", "neither a regular file nor a folder", "save the text")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    fails(tmp_path, "gone.txt: cannot be read (No such file or directory)")
    fails("x" * 5000, "cannot be read (File name too long)")


def test_a_file_removed_after_it_was_opened(tmp_path: Path) -> None:
    for path in (write_jsonl(tmp_path / "a.jsonl"), write_parquet(tmp_path / "a.parquet"), tmp_path / "a.txt"):
        path.touch()
        corpus = opened(path)
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read \(No such file"):
            list(corpus.documents())


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_top: object, onerror: Callable[[OSError], None]) -> list[object]:
        onerror(PermissionError(13, "Permission denied"))
        return []

    monkeypatch.setattr(os, "walk", refused)  # a superuser may list every real folder
    fails(tmp_path, str(tmp_path), "cannot be read (Permission denied)")


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xc3\xa9\nlatin \xe9 here\n")
    fails(tmp_path / "a.txt", "a.txt:3: is not UTF-8", "convert")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    fails(tmp_path / "a.jsonl", "a.jsonl:2: is not UTF-8", "convert")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "a"', ["is not JSON", "one object per line"]),
        ("[" * 100_000, ["is not JSON", "one object per line"]),
        ("1" * 5000, ["is not JSON", "one object per line"]),
        ('["text"]', ["is a list", 'one object per line, {"text": ...}']),
        ('{"body": "b", "n": 1}', ["no field 'text'", "there are: body, n.", "--set text_field=NAME"]),
        ("{}", ["no field 'text'", "there are: none."]),
        ('{"text": 3}', ["'text' is of type int, not a string or a list of ids", "--set text_field=NAME"]),
        ('{"text": null}', ["'text' is of type NoneType, not a string"]),
        ('{"text": "\\ud800"}', ["'text' is not Unicode text (surrogates not allowed)", "correct or remove it"]),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path: Path, name: str, line: str, parts: list[str]) -> None:
    data = f'{{"text": "a"}}\n\n{line}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    fails(tmp_path / name, f"{name}:3: ", *parts)


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"plain")
    fails(path, "a.jsonl.gz: cannot be read (Not a gzipped file")
    whole = gzip.compress(os.urandom(4000).hex().encode(), mtime=0)
    path.write_bytes(whole[:2000])
    fails(path, "a.jsonl.gz: is damaged or cut short", "write it again")
    path.write_bytes(whole[:12] + b"\xff" * 40 + whole[52:])
    fails(path, "a.jsonl.gz: is damaged or cut short", "write it again")


def test_bad_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, field="body")
    fails(path, "a.parquet: has no field 'text'", "there are: id, body.", "--set text_field=NAME")
    fails(path, "a.parquet, row 1: 'id' is of type int, not a string or a list of ids", text_field="id")
    write_parquet(path, ["a", "b", None])
    fails(path, "a.parquet, row 3: 'text' is of type NoneType")
    path.write_bytes(path.read_bytes()[:-9])
    fails(path, "a.parquet: is not a readable parquet file", "write it again")
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9"]).buffers())
    pq.write_table(pa.table({"text": latin}), path)
    fails(path, "a.parquet, row 1: 'text' is not UTF-8", "write it again")


# --- Hugging Face datasets

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def examples(files: list[str]) -> Iterator[dict[str, object]]:
    for number, text in enumerate(TEXTS):
        yield {"text": text, "n": number, "file": files[0]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The hub's one answer: whatever the dataset and the revision, they are at COMMIT. Returns the questions."""
    questions: list[object] = []

    def answer(_api: object, name: str, revision: str | None, timeout: float) -> SimpleNamespace:
        questions.append((name, revision, timeout))
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", answer)
    return questions


@pytest.fixture
def asked(hub: list[object], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """`datasets.load_dataset` gives a real streamed dataset of unknown columns; returns its calls, after the hub's."""
    calls = hub

    def load(*names: object, **options: object) -> datasets.IterableDataset:
        calls.append((names, options))
        files = [f"hf://datasets/owner/name@{COMMIT}/train.parquet"]
        return datasets.IterableDataset.from_generator(examples, gen_kwargs={"files": files})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize("name", ["owner/name", "name", "owner/name-v1.5"])
def test_a_streamed_data_set(asked: list[object], name: str) -> None:
    corpus = opened(name, corpus_config="sub", corpus_split="test", corpus_revision="v2")
    assert list(corpus.documents()) == TEXTS
    assert list(corpus.documents()) == TEXTS, "a second pass is a fresh one"
    assert asked == [(name, "v2", 2), ((name, "sub"), {"split": "test", "streaming": True, "revision": COMMIT})]
    assert corpus.description == {
        "kind": "huggingface",
        "name": name,
        "config": "sub",
        "split": "test",
        "commit": COMMIT,
        "text_field": "text",
    }


@pytest.mark.usefixtures("asked")
def test_fields_of_a_data_set_of_unknown_columns() -> None:
    fails(
        "owner/name",
        "^corpus owner/name, example 1: has no field 'body'",
        "there are: text, n, file.",
        text_field="body",
    )
    fails(
        "owner/name", "^corpus owner/name, example 1: 'n' is of type int, not a string or a list of ids", text_field="n"
    )


@pytest.fixture
def local_set(hub: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the real loader makes of a folder on this machine, under the name owner/name."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    load, cache = datasets.load_dataset, str(tmp_path / "cache")
    assert not hub

    def from_folder(_name: str, *names: object, revision: str, **options: object) -> datasets.IterableDataset:
        assert revision == COMMIT
        return load(str(folder), *names, cache_dir=cache, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return folder


def test_the_real_loader(local_set: Path) -> None:
    corpus = opened("owner/name")
    assert list(corpus.documents()) == TEXTS
    assert corpus.description["commit"] == COMMIT
    assert str(local_set) not in json.dumps(corpus.description)


@pytest.mark.usefixtures("local_set")
def test_what_the_real_loader_refuses() -> None:
    fails("owner/name", "corpus owner/name: has no field 'body'; there are: id, text.", text_field="body")
    fails("owner/name", "(Bad split: nope. Available splits: ['train'])", "corpus_split", corpus_split="nope")
    fails("owner/name", "(BuilderConfig 'x' not found", "corpus_config", corpus_config="x")


def test_the_hub_cannot_be_reached() -> None:
    fails("owner/name", "corpus owner/name: no file or folder here", "OfflineModeIsEnabled", "the network", "local")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("error", [OSError("lost\nlong story"), RuntimeError("lost"), KeyError("lost")])
def test_the_connection_breaks_half_way(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(raised: list[Exception]) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise raised[0]

    dataset = datasets.IterableDataset.from_generator(broken, gen_kwargs={"raised": [error]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_names, **_options: dataset)
    stream = opened("owner/name").documents()
    assert next(stream) == "one"
    with pytest.raises(UserError, match=r"corpus owner/name: .*\('?lost'?\).*the network") as caught:
        next(stream)
    assert "story" not in str(caught.value)


@pytest.mark.usefixtures("hub")
def test_an_error_without_words_is_named_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_names: object, **_options: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    fails("owner/name", "(TimeoutError)")


def test_importing_the_module_is_light() -> None:
    code = "import sys, harvest.corpus.open; print({'datasets', 'pyarrow', 'torch', 'transformers'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
