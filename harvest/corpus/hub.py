"""Hugging Face datasets: by name, streamed; or in a folder, as `save_to_disk` or a cloned repository leaves them.

A name opens connections: first one request, which pins the commit or fails at once, then the stream. A folder opens
none. The library's usage counter, a request of its own, is switched off.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from harvest.corpus.documents import (
    BadDocument,
    Corpus,
    Document,
    DocumentField,
    OnBad,
    StopCheck,
    cause,
    missing_field,
)
from harvest.corpus.folder import check_files, file_identities
from shared.config import HarvestConfig
from shared.errors import Interrupted, LostError, UserError
from shared.model.source import hub_error
from shared.progress import say

SECONDS_TO_ANSWER: Final = 2
"""Timeout of one attempt; the client makes two before it gives up."""
BUILDERS: Final = ("arrow", "csv", "json", "parquet", "text")
"""The storage kinds of a local repository that are read. None of them unpickles or runs anything."""


def hub_dataset(name: str, config: HarvestConfig, field: DocumentField) -> Corpus:
    """A dataset of the hub, streamed at the commit that its revision means now; or of the local cache when the hub
    cannot be reached. Raises UserError within seconds when there is neither, BusyError when the hub may come back."""
    commit = _hub_commit(name, config.corpus_revision)
    try:
        if isinstance(commit, Exception):
            commit, dataset = _cached(name, config, commit)
        else:
            dataset = _library().load_dataset(
                name, config.corpus_config, split=config.corpus_split, streaming=True, revision=commit
            )
    except UserError:
        raise
    except Exception as error:  # builder, hub, HTTP and file system errors share no other base
        raise _unreadable(name, error) from error
    description = {
        "kind": "huggingface",
        "name": name,
        "config": config.corpus_config,
        "split": config.corpus_split,
        "commit": commit,
    }
    return _corpus(dataset, name, field, description)


def _hub_commit(name: str, revision: str | None) -> str | Exception:
    """The commit that a dataset's revision means now; the reason when the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=SECONDS_TO_ANSWER).sha)
    except GatedRepoError as error:
        raise UserError(f"corpus {name}: needs permission; accept its terms and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise UserError(f"corpus_revision {revision}: {name} has no such branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"corpus {name}: no file or folder here, and Hugging Face has no dataset of that name (or a private one: "
            "log in with `hf auth login`). Check the name, or give a local file or folder"
        ) from error
    except Exception as error:  # offline mode, DNS, proxies and time-outs arrive as many types
        return error


def _cached(name: str, config: HarvestConfig, unreachable: Exception) -> tuple[str, Any]:
    """The commit and the documents that an earlier `datasets.load_dataset` left in the local cache, without network."""
    from datasets.packaged_modules.cache.cache import Cache

    subset = config.corpus_config
    away = f"Hugging Face cannot be reached ({type(unreachable).__name__})"
    place = f"corpus {name}: no file or folder here, and {away}"
    try:
        builder = Cache(dataset_name=name.split("/")[-1], repo_id=name, config_name=subset, version="auto", hash="auto")
    except ValueError as error:
        raise hub_error(unreachable)(
            f"{place}; it is not in the local cache either ({cause(error)}). Check the network, or give a local file "
            "or folder"
        ) from error
    commit, found = str(builder.hash), str(builder.config.name)
    if subset is None and found != "default":
        raise UserError(f"{place}; the local cache has {found}. Ask for it: --set corpus_config={found}")
    if config.corpus_revision not in (None, commit):
        raise UserError(f"{place}; the local cache has commit {commit}, not corpus_revision {config.corpus_revision}")
    say(f"corpus {name}: {away}; commit {commit} is in the local cache")
    return commit, builder.as_streaming_dataset(split=config.corpus_split)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def saved_dataset(folder: Path, config: HarvestConfig, field: DocumentField) -> Corpus:
    """The dataset that `save_to_disk` wrote; of several splits, the configured one."""
    check_files(folder)
    library, split = _library(), config.corpus_split
    try:
        dataset = library.load_from_disk(str(folder))
    except Exception as error:  # arrow, JSON and file system errors
        raise _unreadable(str(folder), error) from error
    there = list(dataset) if isinstance(dataset, dict) else [str(dataset.split)] if dataset.split else [split]
    if split not in there and (isinstance(dataset, dict) or "corpus_split" in config.model_fields_set):
        raise UserError(
            f"corpus {folder}: has no split {split!r}; there are: {', '.join(there)}. Choose one: "
            "--set corpus_split=NAME"
        )
    chosen = dataset[split] if isinstance(dataset, dict) else dataset
    read = split if isinstance(dataset, dict) else there[0]
    files = [Path(file["filename"]) for file in chosen.cache_files]
    description = {"kind": "huggingface-saved", "split": read, "files": file_identities(files, folder)}
    return _corpus(chosen.with_format(None), str(folder), field, description)


def repository_card(folder: Path) -> dict[str, Any] | None:
    """The front matter of a dataset repository's README.md; None for a folder that is no such repository."""
    from huggingface_hub import metadata_load

    readme = folder / "README.md"
    try:
        card = metadata_load(readme) if readme.is_file() else None
    except Exception:  # an ordinary README: in another encoding, or with dashes that begin no YAML
        return None
    return card if card and ("configs" in card or "dataset_info" in card) else None


def repository_dataset(folder: Path, card: dict[str, Any], config: HarvestConfig, field: DocumentField) -> Corpus:
    """A dataset repository on this machine, read where it is. Raises UserError when it names files elsewhere."""
    if (folder / ".huggingface.yaml").exists():
        raise UserError(f"corpus {folder}: its .huggingface.yaml is not read; write what it says into README.md")
    elsewhere = next((text for text in _strings(card.get("configs")) if "://" in text), None)
    if elsewhere is not None:
        raise UserError(
            f"corpus {folder}: its README.md names {elsewhere}, which is not on this machine; fetch it first"
        )
    check_files(folder)
    root = folder.resolve()  # an absolute path cannot be the name of a format or a dataset
    try:
        builder = _library().load_dataset_builder(str(root), config.corpus_config)
        kind = type(builder).__module__.split(".")[-1]
        if kind not in BUILDERS:
            raise UserError(f"corpus {folder}: is stored as {kind}; {', '.join(BUILDERS)} can be read")
        dataset = builder.as_streaming_dataset(split=config.corpus_split)
        files = [Path(file) for files in builder.config.data_files.values() for file in files]
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(str(folder), error) from error
    outside = next((file for file in files if not file.is_relative_to(root)), None)
    if outside is not None:
        raise UserError(f"corpus {folder}: its README.md names {outside}, which is not below it; move it there")
    description = {
        "kind": "huggingface-repository",
        "config": config.corpus_config,
        "split": config.corpus_split,
        "files": file_identities(files, root),
    }
    return _corpus(dataset, str(folder), field, description)


def _strings(value: Any) -> Iterator[str]:
    """Every string in lists and tables, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _library() -> Any:
    """`datasets`, without progress bars and without its usage counter."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def _corpus(dataset: Any, name: str, field: DocumentField, description: dict[str, Any]) -> Corpus:
    if dataset.column_names is not None and not field.is_among(dataset.column_names):
        raise UserError(missing_field(field.name, dataset.column_names, f"corpus {name}"))
    return Corpus({**description, "text_field": field.name}, functools.partial(_documents, dataset, name, field))


def _documents(
    dataset: Iterable[dict[str, Any]], name: str, field: DocumentField, on_bad: OnBad, check_stop: StopCheck
) -> Iterator[Document]:
    try:
        for number, example in enumerate(dataset, 1):
            check_stop()
            try:
                document = field.document(example, f"corpus {name}, example {number}")
            except BadDocument as error:
                on_bad(error)
            else:
                yield document
    except (UserError, Interrupted, LostError):
        raise
    except Exception as error:  # the connection may also fail half-way, with the same types
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    return hub_error(error)(
        f"corpus {name}: is not readable as a Hugging Face dataset ({cause(error)}). "
        "Check the name, corpus_config, corpus_split and the network, or give another file or folder"
    )
