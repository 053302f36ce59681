"""Faults of corpora that were found from outside, by kind: what is read, how much memory it takes, what is lost."""

import contextlib
import functools
import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import ROOT
from support.folders import contents
from support.models import save_corpus, sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harvest.corpus.documents import BadDocument, Corpus, DocumentField, JoinedIds, LongText
from harvest.corpus.open import open_corpus
from harvest.corpus.pack import PackCounts, cut, pack, shuffled
from harvest.corpus.raw_bytes import RECORD_BYTES
from harvest.corpus.readers import _rows_at_a_time
from harvest.corpus.split_text import LONGEST, pieces, tokenise_texts
from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig
from shared.errors import Interrupted, UserError
from shared.files.local import LocalFiles
from shared.store.opened import Store, is_store
from shared.store.verify import verify

MakeConfig = Callable[..., HarvestConfig]
LARGE: dict[str, Any] = {"chunk_rows": 1024, "shard_rows": 4096, "batch_tokens": 2048, "hooks": ("mlp_out",)}


def opened(corpus: Path, **settings: object) -> Corpus | JoinedIds:
    return open_corpus(HarvestConfig(model="tiny", corpus=str(corpus), **settings), None, 300)


def texts_of(corpus: Path, **settings: object) -> list[Any]:
    found = opened(corpus, **settings)
    assert isinstance(found, Corpus)
    return [each if isinstance(each, str | LongText) else each.tolist() for each in found.documents()]


def refused(corpus: Path, *parts: str, **settings: object) -> None:
    """Opening or reading raises UserError, in one line that holds all parts."""

    def read() -> None:
        found = opened(corpus, **settings)
        list(found.documents() if isinstance(found, Corpus) else found.blocks())

    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# --- what is in a folder is not what was meant


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder as a clone and an editor leave it."""
    root = tmp_path / "clone"
    for name in ("data", ".ipynb_checkpoints", ".git"):
        (root / name).mkdir(parents=True)
    for name in ("data/a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".hidden.jsonl", "data/.a.jsonl"):
        save_corpus(root / name, ["of a"])
    for name in (
        "README.md",
        "LICENSE.md",
        "LICENSE-MIT.txt",
        "Notice.txt",
        "readme_fr.md",
        "CITATION.md",
        "COPYING.txt",
    ):
        (root / name).write_text("about the data")
    (root / ".git" / "config.txt").write_text("none")
    (root / "picture.png").write_bytes(b"none")
    (root / "Makefile").write_text("none")
    (root / "dataset_infos.json").write_text("{}")
    return root


def test_hidden_files_and_cards_are_left_out_and_counted(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Public report: .ipynb_checkpoints doubled a corpus; README.md and LICENSE.md of a clone became documents."""
    assert texts_of(clone) == ["of a"]
    said = " ".join(capsys.readouterr().err.split())
    assert "read 1 file, left out 14" in said
    for reason in ("4 hidden", "8 cards or licences", "2 of other formats: .png, no extension"):
        assert reason in said


def test_data_that_is_named_like_a_card_is_read(tmp_path: Path) -> None:
    for name in ("notices.txt", "licensed.md", "readmes.txt", "notice.jsonl"):
        (tmp_path / name).write_text('{"text": "a text"}')
    assert len(texts_of(tmp_path)) == 4


def test_a_card_or_hidden_file_that_is_asked_for_is_read(clone: Path) -> None:
    assert texts_of(clone / "README.md") == ["about the data"]
    assert texts_of(clone / ".hidden.jsonl") == ["of a"]
    assert len(texts_of(clone / ".ipynb_checkpoints")) == 1


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Public report: a folder that is a link was left out without a word."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    (elsewhere / "deep").mkdir(parents=True)
    save_corpus(root / "a.jsonl", ["of a"])
    save_corpus(elsewhere / "deep" / "b.jsonl", ["of b"])
    (root / "more").symlink_to(elsewhere)
    (elsewhere / "deep" / "up").symlink_to(root)
    (root / "self").symlink_to(root)
    (root / "z").symlink_to(elsewhere / "deep")
    corpus = opened(root)
    assert [file["name"] for file in corpus.description["files"]] == ["a.jsonl", "more/deep/b.jsonl"]
    assert texts_of(root) == ["of a", "of b"]
    assert "left out 3 (3 folders that are read already by another name)" in " ".join(capsys.readouterr().err.split())


def test_a_link_beside_the_folder_that_it_means_doubles_nothing(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    save_corpus(tmp_path / "real" / "a.jsonl", ["of a"])
    (tmp_path / "alias").symlink_to("real")
    assert [file["name"] for file in opened(tmp_path).description["files"]] == ["real/a.jsonl"]


# --- special files


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to a device"])
def test_special_files_are_refused_and_not_waited_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public report: a FIFO hung the harvest, /dev/zero took all memory."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    for name in ("a.txt", "a.npy", "a.parquet", "folder/a.jsonl", "set/data.arrow"):
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(name)
        else:
            path.symlink_to("/dev/zero")
        if name.startswith("set"):
            (path.parent / "state.json").write_text("{}")
            (path.parent / "dataset_info.json").write_text("{}")
        target = path if path.parent == Path() else path.parent
        refused(target, "is neither a regular file nor a folder", "save the text to a file")
    refused(Path("/dev/zero"), "is neither a regular file nor a folder")


# --- formats that people have

RECORDS = [{"id": 1, "text": "one\ntwo"}, {"id": 2, "text": 'naïve, "quoted" 😀'}, {"id": 3, "text": ""}]
TEXTS = [str(record["text"]) for record in RECORDS]


def packed(data: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return bytes(pa.compress(data, codec="zstd", asbytes=True)) if name.endswith(".zst") else data


JSONS = {
    "array": json.dumps(RECORDS),
    "indented array": json.dumps(RECORDS, indent=1),
    "array of texts": json.dumps(TEXTS, ensure_ascii=False),
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "indented objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "after spaces and a mark": "\ufeff \n\n " + json.dumps(RECORDS) + "\n",
}


@pytest.mark.parametrize("shape", JSONS)
@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_json_of_every_shape(tmp_path: Path, shape: str, end: str) -> None:
    """Public report: an array in a .json file was refused."""
    path = tmp_path / f"a.json{end}"
    path.write_bytes(packed(JSONS[shape].encode(), path.name))
    assert texts_of(path) == TEXTS


def test_one_object_and_arrays_of_ids(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[0], indent=2))
    assert texts_of(tmp_path) == TEXTS[:1]
    (tmp_path / "a.json").write_text("[[1, 2], [], [299]]")
    assert texts_of(tmp_path) == [[1, 2], [], [299]]
    (tmp_path / "a.json").write_text("[]")
    assert texts_of(tmp_path) == []


value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(value, max_size=8), indent=st.sampled_from([None, 1]), block=st.integers(1, 40), raw=st.booleans()
)
def test_values_do_not_depend_on_the_blocks(values: list[Any], indent: int | None, block: int, raw: bool) -> None:
    from harvest.corpus.json_values import JsonCursor, members

    text = json.dumps(values, indent=indent, ensure_ascii=raw)
    blocks = (text[start : start + block] for start in range(0, len(text), block))
    assert [found for _, found in members(JsonCursor(blocks, "a.json"))] == values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[{"text": "a"},\n {"text": "b"\n', ["a.json:2: is not JSON"]),
        ('[{"text": "a"}\n{"text": "b"}]', ["a.json:2: is not JSON", "',' or ']' is expected"]),
        ('[{"text": "a"}]\n[1]', ["a.json:2: has more text after the array"]),
        ('[{"text": "a"},\n 7]', ["a.json:2: is a int; an object, a text or a list of ids"]),
        ('[{"text": "a"},\n {"body": "b"}]', ["a.json:2: has no field 'text'; there are: body."]),
        ("[" * 100_000, ["a.json:1: is not JSON that can be read"]),
        ('[{"text": "' + "a" * 50 + "\n" + "b" * 100 + '"}]', ["a.json:1: is not JSON", "control character"]),
        ("[" + "1" * 5000 + "]", ["a.json:1: is not JSON that can be read"]),
        ('[{"text": "a', ["a.json:1: is not JSON"]),
        ("[", ["a.json:1: is not JSON"]),
    ],
)
def test_json_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "a.json").write_text(text)
    refused(tmp_path / "a.json", *parts)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.zst", "a.ndjson", "a.ndjson.gz", "a.jsonl"])
def test_tables_and_ndjson(tmp_path: Path, name: str) -> None:
    """Public report: .csv and .ndjson were refused, and left out of folders without a word."""
    import csv
    import io

    text = io.StringIO(newline="")
    if "json" in name:
        text.write(JSONS["lines"])
    else:
        table = csv.DictWriter(text, ["id", "text"], delimiter="\t" if "tsv" in name else ",")
        table.writeheader()
        table.writerows(RECORDS)
    (tmp_path / name).write_bytes(packed(("\ufeff" + text.getvalue()).encode(), name))
    assert texts_of(tmp_path / name) == texts_of(tmp_path) == TEXTS


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"id,body\n1,a\n", ["a.csv:1: has no field 'text'; there are: id, body.", "--set text_field"]),
        (b"text,text\na,b\n", ["a.csv:1: has more than one column 'text'"]),
        (b"id,text\n1,a\n2,b,c\n", ["a.csv:3: has 3 columns, the first row 2", "quotation marks"]),
        (b"id,text\n1\n", ["a.csv:2: has 1 columns, the first row 2"]),
        (b'id,text\n1,a\n2,"b\n3,c\n', ["a.csv:3: is not a table that can be read (unexpected end of data)"]),
        (b'id,text\n1,"a"b\n', ["a.csv:2: is not a table that can be read"]),
        (b"id,text\n1,a\xe9\n", ["a.csv:2: 'text' is not Unicode text"]),
    ],
)
def test_tables_that_cannot_be_read_are_named_with_their_line(tmp_path: Path, data: bytes, parts: list[str]) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    refused(tmp_path / "a.csv", *parts)


def test_large_fields_and_zeros_in_a_table(tmp_path: Path) -> None:
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'text\n"{long}\n{long}"\na\0b\n')
    assert texts_of(tmp_path) == [f"{long}\n{long}", "a\0b"]


def test_fields_in_fields_and_bytes(tmp_path: Path) -> None:
    """Public report: nested fields and columns of bytes were refused."""
    nested = [{"data": {"text": text, "n": 1}} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, nested)))
    pq.write_table(pa.table({"data": [each["data"] for each in nested]}), tmp_path / "b.parquet")
    assert texts_of(tmp_path, text_field="data.text") == TEXTS * 2
    refused(
        tmp_path / "a.jsonl",
        "a.jsonl:1: has no field 'data.body'; there are: data.text, data.n.",
        text_field="data.body",
    )
    refused(tmp_path / "b.parquet", "has no field 'data.body'", text_field="data.body")
    pq.write_table(pa.table({"text": [text.encode() for text in TEXTS]}), tmp_path / "c.parquet")
    assert texts_of(tmp_path / "c.parquet") == TEXTS
    pq.write_table(pa.table({"text": [b"\xe9"]}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", "c.parquet, row 1: 'text' is not UTF-8")
    (tmp_path / "d.jsonl").write_text('{"data.text": "a name with a dot"}')
    assert texts_of(tmp_path / "d.jsonl", text_field="data.text") == ["a name with a dot"]


def hostile_headers() -> list[bytes]:
    heads = [
        "{'descr': '<u2', 'fortran_order': False, 'shape': (3,",
        "(" * 5000,
        "[" * 300,
        "{'descr': 'O', ",
        "\0",
        "}",
    ]
    heads += [f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**62},), }}", "{'shape': (-1,), 'descr': '<u2'}"]
    heads += ["{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (1,)}", "{'descr': {}, 'shape': 1}"]
    return [b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(6) for head in heads]


@pytest.mark.parametrize("data", hostile_headers())
def test_headers_of_npy_files(tmp_path: Path, data: bytes) -> None:
    """Public report: a header with an open bracket ended in a traceback of Python's tokeniser."""
    (tmp_path / "a.npy").write_bytes(data)
    refused(tmp_path / "a.npy", "a.npy: is")


def test_a_zarr_array_of_one_huge_chunk(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(1 << 40,), chunks=(1 << 40,), dtype="u2")
    refused(tmp_path / "a", "its chunks have 1,099,511,627,776 ids each", "smaller chunks")


# --- memory is bounded by bytes

END = "<|endoftext|>"


def trained(model: Any, trainer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(sentences(60), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def of_bytes(prefix: bool) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix))


def of_pieces(trainer: str) -> PreTrainedTokenizerFast:
    """As sentencepiece has it: a mark in front of every word, the first one too."""
    words = [END, "<unk>"]
    if trainer == "unigram":
        options = trainers.UnigramTrainer(vocab_size=120, special_tokens=words, unk_token="<unk>", show_progress=False)
        return trained(models.Unigram(), options, pre_tokenizer=pre_tokenizers.Metaspace())
    mark = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe = trainers.BpeTrainer(vocab_size=300, special_tokens=words, show_progress=False)
    made = trained(models.BPE(unk_token="<unk>"), bpe, pre_tokenizer=pre_tokenizers.Metaspace())
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])  # as Llama 2: the whole text is one word
    made.backend_tokenizer.normalizer = mark
    return made


TOKENIZERS = {
    "bytes": lambda: of_bytes(False),
    "bytes, a space in front": lambda: of_bytes(True),
    "unigram": lambda: of_pieces("unigram"),
    "BPE without words": lambda: of_pieces("bpe"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_give_the_ids_of_the_whole(kind: str) -> None:
    """Public report: a text of 20 MB took 3.3 GB. Long ones are tokenised in pieces, whose ids are the same."""
    tokenizer = TOKENIZERS[kind]()

    def ids_of(texts: list[str]) -> Any:
        return tokenise_texts(texts, tokenizer)

    prose = " ".join(sentences(40)) + "\n\n" + "  indented\n\tcode ( ) ;\r\n".join(sentences(20))
    for longest, block in ((200, 50), (333, 10_000)):
        blocks = (prose[start : start + block] for start in range(0, len(prose), block))
        rough: list[int] = []
        cut_up = list(pieces(blocks, ids_of, functools.partial(rough.append, 1), longest=longest, near=64))
        assert len(cut_up) > 20
        assert max(map(len, cut_up)) <= longest + 64
        assert [one for ids in ids_of(cut_up) for one in ids] == ids_of([prose])[0]
        assert not rough


def test_what_cannot_be_cut_well_is_cut_and_counted() -> None:
    one_word = pre_tokenizers.Whitespace()
    vocabulary = models.WordLevel({END: 0, "<unk>": 1}, unk_token="<unk>")
    made = Tokenizer(vocabulary)
    made.pre_tokenizer = one_word
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    rough: list[int] = []
    found = list(pieces(["x" * 1000], lambda texts: tokenise_texts(texts, tokenizer), lambda: rough.append(1), 200, 16))
    assert "".join(found) == "x" * 1000
    assert len(rough) == len(found) - 1


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=400), st.integers(1, 60))
def test_pieces_do_not_depend_on_the_blocks(text: str, block: int) -> None:
    letters = lambda texts: [list(map(ord, each)) for each in texts]  # noqa: E731
    blocks = (text[start : start + block] for start in range(0, len(text), block))
    found = list(pieces(blocks, letters, lambda: None, longest=40, near=8))
    assert found == list(pieces([text], letters, lambda: None, longest=40, near=8))
    assert "".join(found) == text


def test_the_shuffle_holds_bytes_and_not_documents() -> None:
    """Public report: the buffer held 100,000 whole documents, books too."""
    read, most = [0], 0
    texts = [f"{number:4}" + "é" * (number % 7 * 48) for number in range(2000)]

    def source() -> Any:
        for text in texts:
            read[0] += len(text.encode())
            yield text

    given_out, found = 0, list[Any]()
    for text in shuffled(source(), 3, size=10_000):
        given_out += len(text.encode())  # type: ignore[union-attr]
        most = max(most, read[0] - given_out)
        found.append(text)
    assert sorted(found) == sorted(texts)
    assert found != texts
    assert most < 11_000
    assert found == list(shuffled(iter(texts), 3, size=10_000))


def test_a_call_of_the_tokenizer_is_bounded(tmp_path: Path) -> None:
    largest = 0

    def tokenizer(texts: list[str], **_options: Any) -> dict[str, list[list[int]]]:
        nonlocal largest
        largest = max(largest, sum(map(len, texts)))
        return {"input_ids": [[len(text)] for text in texts]}

    long = "word " * 1_200_000
    (tmp_path / "a.txt").write_text(long)
    (document,) = texts_of(tmp_path / "a.txt")
    assert isinstance(document, LongText)
    several: list[list[str | LongText]] = [[document], [long], ["word " * 20_000] * 64]
    for documents in several:
        list(pack(iter(documents), tokenizer, context=8, eos_id=0, bos_id=None, counts=PackCounts()))
    assert largest <= 1 << 19


def test_a_long_file_is_the_same_as_the_same_text_in_a_record(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "naïve\u00a0€ " + "\n".join(sentences(12_000))
    assert len(text) > 5 * LONGEST
    (tmp_path / "a.txt").write_text("\ufeff" + text)
    save_corpus(tmp_path / "a.jsonl", [text])
    rows = []
    for name in ("a.txt", "a.jsonl"):
        corpus = opened(tmp_path / name)
        assert isinstance(corpus, Corpus)
        documents = corpus.documents()
        rows.append(list(pack(documents, tokenizer, context=64, eos_id=0, bos_id=None, counts=PackCounts())))
    assert all((one == other).all() for one, other in zip(*rows, strict=True))


def test_only_the_text_that_is_needed_is_tokenised(
    tmp_path: Path, harvest_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(33_000)))
    watched = Watched(monkeypatch)
    run_harvest(harvest_config(tmp_path / "out", corpus=str(tmp_path / "a.txt"), tokens=500, **LARGE))
    assert watched.characters < 1_100_000


BOMBS = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pyarrow  # before the limit: it maps a lot
from harvest.corpus.open import open_corpus
from shared.config import HarvestConfig
from shared.errors import UserError
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1200 << 20), -1))
try:
    for document in open_corpus(HarvestConfig(model="tiny", corpus=sys.argv[2]), None, 300).documents():
        print(type(document).__name__)
except UserError as error:
    print(error)
"""


def bomb(name: str, path: Path) -> None:
    """A file that unpacks to 1.5 GB."""
    zeros = b" " * (1 << 20)
    if name.endswith(".parquet"):
        pq.write_table(
            pa.table({"text": pa.array(["x" * (1 << 20)]).take(pa.array([0] * 1500))}), path, row_group_size=1500
        )
        return
    start = b'{"text": "' if "json" in name else b'text\n"' if "csv" in name else b"x"
    with gzip.open(path, "wb", 1) if name.endswith(".gz") else pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(b"[" + start if name == "a.json.gz" else start)
        for _ in range(1500):
            stream.write(zeros)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.txt.gz", "LongText"),
        ("a.txt.zst", "LongText"),
        ("a.jsonl.gz", "a.jsonl.gz:1: is longer than 256 MiB; split it"),
        ("a.jsonl.zst", "a.jsonl.zst:1: is longer than 256 MiB; split it"),
        ("a.json.gz", "a.json.gz:1: is longer than 256 MiB; split it"),
        ("a.csv.gz", "a.csv.gz:2: is longer than 256 MiB; split it"),
        ("a.parquet", "str"),
    ],
)
def test_what_unpacks_to_more_than_memory(tmp_path: Path, name: str, says: str) -> None:
    """Public report: a .txt.gz of 8 MB that unpacks to 8 GB was read whole, and ended in a MemoryError."""
    bomb(name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(ROOT), str(tmp_path / name)],
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},  # the other one reserves addresses by the gigabyte
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert says in done.stdout
    assert done.stderr == ""


def test_a_line_that_is_too_long_can_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harvest.corpus.raw_bytes.RECORD_BYTES", 1000)
    save_corpus(tmp_path / "a.jsonl", ["a", "b" * 5000, "c"])
    refused(tmp_path / "a.jsonl", "a.jsonl:2: is longer than")
    bad: list[BadDocument] = []
    corpus = opened(tmp_path / "a.jsonl")
    assert isinstance(corpus, Corpus)
    assert list(corpus.documents(bad.append)) == ["a", "c"]
    assert [str(error).split(": ")[0] for error in bad] == [f"{tmp_path / 'a.jsonl'}:2"]
    assert RECORD_BYTES == 1 << 28


def test_one_value_with_too_many_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harvest.corpus.json_values.MAX_MEMBERS", 1000)
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(
            "[" * (name == "a.json") + json.dumps({"text": [[]] * 2000}) + "]" * (name == "a.json")
        )
        refused(tmp_path / name, f"{name}:1: is not JSON", "million values in one", ".npy")
    (tmp_path / "a.csv").write_text("text" + "," * 2000)
    monkeypatch.setattr("harvest.corpus.readers.MAX_MEMBERS", 1000)
    refused(tmp_path / "a.csv", "a.csv:1: has more than", "columns")


def test_a_text_in_which_no_character_ends_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harvest.corpus.raw_bytes.BLOCK_BYTES", 7)
    text = "naïve 😀😀😀 日本語 " * 20
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt") == [text]
    (tmp_path / "a.txt").write_bytes(("line\n" * 9 + text).encode() + b"\n\xf0\x9f\x98")
    refused(tmp_path / "a.txt", "a.txt:11: is not UTF-8 (unexpected end of data)")
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 8 + b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\n")
    refused(tmp_path / "a.txt", "a.txt:9: is not UTF-8 (invalid start byte)")


# --- ids that the model does not have, and models without a tokenizer


def test_ids_beyond_the_embedding_are_refused_where_they_are_met() -> None:
    """Public report: Gemma 3's tokenizer has one token more than its embedding, which no text spells."""

    def tokenizer(texts: list[str], **_options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(one) for one in text] for text in texts]}

    def rows(text: str) -> list[Any]:
        options: dict[str, Any] = {"context": 2, "eos_id": 0, "bos_id": None, "vocab_size": 128}
        return list(pack(iter([text]), tokenizer, counts=PackCounts(), **options))

    assert len(rows("plain")) == 1
    with pytest.raises(UserError, match=r"text that begins 'naïve': the tokenizer returns id 239, .* 0 to 127"):
        rows("naïve")


def test_lists_of_ids_need_no_tokenizer_and_no_end() -> None:
    """Public report: a model without a tokenizer could not be harvested, not even from ids."""
    ids = [np.array(each, dtype=np.int64) for each in ([1, 2, 3], [4], [5, 6, 7, 8])]
    rows = list(pack(iter(ids), None, context=2, eos_id=None, bos_id=None, counts=PackCounts()))
    assert np.concatenate(rows).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    with pytest.raises(UserError, match="the corpus has texts, and the model has no tokenizer"):
        list(pack(iter(["a text"]), None, context=2, eos_id=0, bos_id=None, counts=PackCounts()))


def test_a_tokenizer_that_breaks_down_is_said_in_words() -> None:
    """Public report: a pattern that backtracks ended in a PanicException, which is no Exception."""
    panic = type("PanicException", (BaseException,), {})

    def tokenizer(_texts: list[str], **_options: Any) -> Any:
        raise panic("backtracked")

    with pytest.raises(UserError, match=r"tokenizer fails on the text that begins 'a text' \(backtracked\)"):
        list(pack(iter(["a text"]), tokenizer, context=2, eos_id=0, bos_id=None, counts=PackCounts()))


# --- nothing that was tokenised is lost


class Watched:
    """Counts the calls of the tokenizer, stops a harvest at the n-th, and lets it save all the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("harvest.corpus.tokenise.SECONDS_BETWEEN_SAVES", -1.0)
        monkeypatch.setattr("harvest.corpus.pack.BATCH_DOCUMENTS", 8)
        monkeypatch.setattr("harvest.corpus.split_text.LONGEST", 4000)
        monkeypatch.setattr("shared.store.spec.TOKENS_PER_CHUNK", 1 << 10)
        self.calls, self.characters, self.stop_at = 0, 0, -1
        real = PreTrainedTokenizerFast.__call__

        def call(tokenizer: Any, texts: Any, *rest: Any, **options: Any) -> Any:
            corpus = options.get("return_attention_mask") is False  # else a look at what the tokenizer can do
            self.calls += corpus
            self.characters += corpus * sum(map(len, texts))
            if corpus and self.calls == self.stop_at:
                raise Interrupted("stopped. To continue, run the same command again")
            return real(tokenizer, texts, *rest, **options)

        monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", call)


@pytest.mark.parametrize("tokens", [None, 9000])
def test_a_tokenisation_that_was_interrupted_goes_on(
    tmp_path: Path, harvest_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tokens: int | None
) -> None:
    """Public report: an interrupted tokenisation started again from nothing."""
    texts = sentences(150)
    texts[70] = " ".join(sentences(60))
    corpus = save_corpus(tmp_path / "a.jsonl", [*texts, " ", *texts[:20]])
    watched = Watched(monkeypatch)

    def config(name: str) -> HarvestConfig:
        return harvest_config(tmp_path / name[0], corpus=str(corpus), tokens=tokens, name=name, **LARGE)

    run_harvest(config("a-whole"))
    whole, needed = contents(tmp_path / "a" / "a-whole"), watched.calls
    assert needed > 10
    watched.calls, stops = 0, 0
    for stop in range(4, 3 * needed, 5):
        watched.stop_at = stop
        with contextlib.suppress(Interrupted):
            run_harvest(config("b-stopped"))
        if is_store(LocalFiles(tmp_path / "b" / "b-stopped")):
            break
        stops += 1
    assert stops > 1
    assert contents(tmp_path / "b" / "b-stopped") == whole
    assert watched.calls < needed + 12 * stops, "what was tokenised is not tokenised again"


def test_what_was_left_by_another_harvest_is_not_used(
    tmp_path: Path, harvest_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = save_corpus(tmp_path / "a.jsonl", sentences(150))
    watched = Watched(monkeypatch)
    watched.stop_at = 12
    config = harvest_config(tmp_path, corpus=str(corpus), tokens=None, **LARGE)
    with pytest.raises(Interrupted):
        run_harvest(config)
    other = save_corpus(tmp_path / "b.jsonl", sentences(150, seed=1))
    for name, changes in (("corpus", {"corpus": str(other)}), ("seed", {"seed": 5})):
        watched.stop_at = watched.calls + 12
        changed = config.model_copy(update=changes)
        with pytest.raises(Interrupted, match="To continue, run the same command again"):
            run_harvest(changed)
        assert "or with other settings, is discarded" in " ".join(capsys.readouterr().err.split())
        apart = run_harvest(changed.model_copy(update={"out": str(tmp_path / name)}))
        assert (tmp_path / "s" / "tokens.building" / "progress.json").is_file()
    progress = tmp_path / "s" / "tokens.building" / "progress.json"
    progress.write_bytes(progress.read_bytes().replace(b"1", b"2"))
    watched.stop_at = -1
    run_harvest(changed)
    assert "cannot be read" in capsys.readouterr().err
    assert contents(tmp_path / "s") == contents(Path(apart.store))


def test_overwriting_goes_on_too(tmp_path: Path, harvest_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store that is to be overwritten stays until the tokens of the new one are there."""
    watched = Watched(monkeypatch)
    config = harvest_config(tmp_path, tokens=2000, **LARGE)
    run_harvest(config)
    watched.stop_at = watched.calls + 12
    again = harvest_config(tmp_path, tokens=None, seed=9, overwrite=True, **LARGE)
    with pytest.raises(Interrupted, match="To continue, repeat it, with --overwrite"):
        run_harvest(again)
    assert Store.open(tmp_path / "s").n_rows == 2000
    before, watched.stop_at = watched.calls, -1
    run_harvest(again)
    assert Store.open(tmp_path / "s").spec.seed == 9
    called = watched.calls - before
    run_harvest(again.model_copy(update={"out": str(tmp_path / "apart")}))
    assert called < watched.calls - before - called
    assert contents(tmp_path / "s") == contents(tmp_path / "apart" / "s")


KILLED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import harvest.corpus.tokenise, harvest.corpus.pack, shared.store.spec
harvest.corpus.tokenise.SECONDS_BETWEEN_SAVES = 0.0
shared.store.spec.TOKENS_PER_CHUNK = 1 << 14
import cli
cli.main()
"""


@pytest.mark.slow
def test_a_tokenisation_that_is_killed_goes_on(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment, the store is the same in the end."""
    corpus = save_corpus(tmp_path / "a.jsonl", sentences(6_000))
    command = [sys.executable, "-c", KILLED, str(ROOT), "harvest", "--model", str(model_folder)]
    command += ["--corpus", str(corpus), "--context", "16", "--tokens", "200000", "--hook", "mlp_out"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    whole, root = (tmp_path / name / model_folder.name for name in ("whole", "s"))
    progress = root / "tokens.building" / "progress.json"
    sizes: list[int] = []
    for _ in range(5):
        before = progress.read_bytes() if progress.exists() else b""
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while process.poll() is None and (not progress.exists() or progress.read_bytes() == before):
            time.sleep(0.002)
        time.sleep(0.01 * len(sizes))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        sizes.append(json.loads(progress.read_bytes())["calls"] if progress.exists() else -1)
    assert len(set(sizes)) > 2
    subprocess.run([*command, "--out", str(tmp_path / "s")], check=True, capture_output=True)
    assert contents(root) == contents(whole)
    monkeypatch.setattr("shared.store.spec.TOKENS_PER_CHUNK", 1 << 14)  # as they were written with
    assert verify(Store.open(root), full=True).lines == []


def test_a_signal_is_heard_between_calls_of_the_tokenizer(
    tmp_path: Path, harvest_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public report: SIGTERM was not heard while a corpus was tokenised. All documents are read by then."""
    watched = Watched(monkeypatch)
    heard: list[int] = []

    def stop_asked() -> bool:
        heard.append(watched.calls)
        return watched.calls > 5

    @contextlib.contextmanager
    def requests() -> Any:
        yield stop_asked

    monkeypatch.setattr("harvest.run.stop_requests", requests)
    with pytest.raises(Interrupted, match=r"stopped after [\d,]+ tokens\. To continue, run the same command again"):
        run_harvest(harvest_config(tmp_path, tokens=None, **LARGE))
    assert max(heard) == 6
    assert (tmp_path / "s" / "tokens.building" / "progress.json").is_file()


def test_arrays_go_on_too(tmp_path: Path, harvest_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harvest.corpus.tokenise.SECONDS_BETWEEN_SAVES", -1.0)
    ids = (np.arange(40_000) * 7 % 300).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    counts, whole = (
        PackCounts(),
        list(cut([ids[:101].astype(np.int64), ids[101:300].astype(np.int64)], 16, 5, PackCounts())),
    )
    first = list(cut([ids[:101].astype(np.int64)], 16, 5, counts))
    rest = list(cut([ids[101:300].astype(np.int64)], 16, 5, counts))
    assert np.concatenate([*first, *rest]).tolist() == np.concatenate(whole).tolist()
    config = harvest_config(tmp_path / "out", corpus=str(tmp_path / "a.npy"), tokens=None, **LARGE)
    assert run_harvest(config).tokens == 40_000


def test_columns_of_parquet_that_are_not_what_they_seem(tmp_path: Path) -> None:
    """Cold review: of two columns of one name the first was taken without a word, where a CSV file is refused; a date
    that no calendar has was a traceback."""
    both = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(both, tmp_path / "two.parquet")
    refused(tmp_path / "two.parquet", "has more than one column 'text'; rename all but one")
    pq.write_table(pa.table({"text": pa.array([2**62], pa.timestamp("us"))}), tmp_path / "date.parquet")
    refused(tmp_path / "date.parquet", "date.parquet, row 1: 'text' is a timestamp[us] that cannot be read")


@pytest.mark.parametrize("setting", ["corpus_split", "corpus_config"])
def test_settings_of_a_data_set_for_a_file(tmp_path: Path, setting: str) -> None:
    """Cold review: they were taken without a word, and had no effect."""
    (tmp_path / "a.txt").write_text("text")
    refused(tmp_path / "a.txt", "holds no Hugging Face dataset", **{setting: "validation"})


def test_pages_of_parquet_that_are_damaged(tmp_path: Path) -> None:
    """Cold review: of some pages pyarrow's message had several lines."""
    chosen, texts = random.Random(0), [f"{number} text" * 9 for number in range(900)]
    for compression in ("none", "snappy", "gzip", "zstd"):
        pq.write_table(pa.table({"text": texts}), tmp_path / "whole.parquet", compression=compression)
        whole = (tmp_path / "whole.parquet").read_bytes()
        refusals = []
        for _ in range(25):
            at, data = chosen.randrange(4, len(whole) // 2), bytearray(whole)
            data[at : at + 20] = chosen.randbytes(20)
            (tmp_path / "bad.parquet").write_bytes(data)
            try:
                texts_of(tmp_path / "bad.parquet")
            except UserError as error:
                refusals.append(str(error))
        assert len(refusals) > 5
        assert not [message for message in refusals if "\n" in message or "bad.parquet" not in message]


def test_one_long_text_in_every_row_of_parquet(tmp_path: Path) -> None:
    """Cold review: a file of a kilobyte says the same 16 MB in each row; 64 rows, 1 GB, were made whole at once."""
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["x" * (1 << 24)]))
    for name, table, expected in (("a", rows, 15), ("b", ["x" * 100] * 200, 64)):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": table}), path, store_schema=False, compression="zstd")
        with path.open("rb") as source:
            assert _rows_at_a_time(pq.ParquetFile(source), source, DocumentField("text", 9)) == expected
    assert len(texts_of(tmp_path / "b.parquet")) == 200
