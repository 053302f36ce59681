"""Decides what a corpus name means: a file, a folder, an array of ids or a Hugging Face dataset.

Every pass over a corpus yields the same documents in the same order. Opening a local corpus reads its files once, to
hash them. Only the name of a dataset opens a connection.
"""

import os
from pathlib import Path

from harvest.corpus.arrays import numpy_stream, zarr_stream
from harvest.corpus.documents import Corpus, DocumentField, JoinedIds, StopCheck, never_stop
from harvest.corpus.hub import hub_dataset, is_saved_dataset, repository_card, repository_dataset, saved_dataset
from harvest.corpus.raw_bytes import reading
from harvest.corpus.readers import extension, files_corpus
from shared.config import HarvestConfig
from shared.errors import UserError


def open_corpus(
    config: HarvestConfig, default: Path | None, vocab_size: int, check_stop: StopCheck = never_stop
) -> Corpus | JoinedIds:
    """The corpus that `config.corpus` names, or else the file `default` (a `corpus.jsonl` beside a local model).

    A file or folder that exists here wins over a dataset of the same name. A local corpus is read once, to hash it;
    `check_stop` is called meanwhile. Raises UserError when there is nothing to read. Ids outside 0 to vocab_size - 1
    are refused.
    """
    field = DocumentField(config.text_field, vocab_size)
    if config.corpus is None:
        if default is None or not default.is_file():
            raise UserError("this model comes with no corpus: pass --corpus FILE, FOLDER or the name of a dataset")
        return _local(default, config, field, check_stop)
    if not config.corpus.strip():
        raise UserError("--corpus is empty: give a file, a folder or the name of a Hugging Face dataset")
    path = Path(os.path.expanduser(config.corpus))  # unlike Path.expanduser, leaves an unknown ~user alone
    with reading(path):
        exists = path.exists()
    if exists:
        return _local(path, config, field, check_stop)
    if _means_a_path(config.corpus):
        raise UserError(
            f"corpus {config.corpus}: there is no such file or folder. Check the path; "
            "a Hugging Face dataset is named NAME or OWNER/NAME"
        )
    return hub_dataset(config.corpus, config, field)


def _means_a_path(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path. A version (`owner/corpus-v1.5`) is no extension."""
    has_extension = bool(extension(Path(name))) or name.lower().endswith(".npy")
    shape = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return shape or has_extension or ("/" in name and Path(name).suffix[1:].isalpha())


def _local(path: Path, config: HarvestConfig, field: DocumentField, check_stop: StopCheck) -> Corpus | JoinedIds:
    """The corpus in a file or a folder, whose kind follows from the content."""
    if config.corpus_revision is not None:
        raise UserError(
            f"corpus_revision {config.corpus_revision}: {path} is on this machine; revisions belong to datasets of the "
            "hub"
        )
    with reading(path):
        if path.is_file() and path.suffix.lower() == ".npy":
            return numpy_stream(path, field.vocab_size, check_stop)
        if is_saved_dataset(path):
            return saved_dataset(path, config, field)
        if (path / "zarr.json").is_file():
            return zarr_stream(path, field.vocab_size, check_stop)
        card = repository_card(path)
        if card is not None:
            return repository_dataset(path, card, config, field)
        if config.corpus_config is not None or config.corpus_split != "train":
            raise UserError(
                f"corpus {path}: holds no Hugging Face data set, and so no split or configuration. Leave out "
                "corpus_split and corpus_config"
            )
        return files_corpus(path, field, check_stop)
