"""What a request may name. A request never carries a path: it names a model or a corpus by an alias, by its id on
Hugging Face, or by a name that the server was started with."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harvest.serve.rest.endpoint import HttpError
from shared.config import ServeConfig
from shared.errors import UserError
from shared.gate import quoted
from shared.model.source import ALIASES
from shared.request import StoreRequest

ALLOWED_KEYS: Final = tuple(
    "model revision tokenizer eos special_ids split_special_tokens dtype store_dtype attention layers hooks corpus "
    "corpus_config corpus_split corpus_revision text_field on_bad_document shuffle_documents context bos "
    "skip_positions tokens seed codec accept environment priority pin refresh".split()
)
"""What a request may say. A new setting of the harvest is not among them until it is added here on purpose."""
PART: Final = r"[A-Za-z0-9_-][\w.-]{0,95}"
HUB_ID: Final = re.compile(rf"{PART}(/{PART})?", re.ASCII)
PLAIN: Final = re.compile(r"[\w-][\w.\- ]{0,199}", re.ASCII)
"""Names of subsets, splits, fields and revisions. Slashes are for revisions alone."""
PLAIN_KEYS: Final = ("corpus_config", "corpus_split", "text_field")
REVISION: Final = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95}){0,3}", re.ASCII)
FILE_ENDINGS: Final = (".gguf", ".json", ".jsonl", ".txt", ".parquet", ".npy", ".zst", ".gz")
NOT_THE_NUMBERS: Final = frozenset({"priority", "pin", "refresh"})
"""Keys that do not change what a request means."""
MOST_FILES: Final = 4096
"""Files of an allowed folder whose dates are looked at for every request; a larger one is planned each time."""


@dataclass(frozen=True)
class AllowedNames:
    """The names of --allow-model and --allow-corpus."""

    models: Mapping[str, Path]
    corpora: Mapping[str, Path]

    @classmethod
    def of(cls, config: ServeConfig) -> "AllowedNames":
        """Raises UserError where an option is not NAME=PATH, or nothing is at the path."""
        return cls(parse_names("--allow-model", config.allow_model), parse_names("--allow-corpus", config.allow_corpus))


@dataclass(frozen=True)
class Admitted:
    """A request whose names are known, with places in the place of names."""

    asked: StoreRequest
    """As it came, with names."""
    request: StoreRequest
    """As the planner takes it."""
    hash: str | None
    """Equal for requests that mean the same while the files of local models and corpora stay as they are; None where
    there are too many of them to look at."""


def parse_names(option: str, entries: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        if not equals or not HUB_ID.fullmatch(name) or not place:
            raise UserError(f"{option} {quoted(entry)}: expected NAME=PATH, such as mine=/data/mine")
        path = Path(os.path.expanduser(place)).absolute()
        if not path.exists():
            raise UserError(f"{option} {name}: {path} does not exist")
        if name in found:
            raise UserError(f"{option} {name}: is given twice")
        found[name] = path
    return found


def admit(request: StoreRequest, names: AllowedNames, config: ServeConfig) -> Admitted:
    """The request as the planner takes it. Raises HttpError (403) for a name that is not allowed, UserError for more
    tokens than --max-tokens."""
    if strange := sorted(request.model_fields_set.difference(ALLOWED_KEYS)):
        raise HttpError(403, "not_allowed", f"{strange[0]}: is no setting of requests: {', '.join(ALLOWED_KEYS)}")
    check_plain(request)
    model = named_place("model", request.model, names.models, "--allow-model", "an alias (sagsae models)")
    corpus = named_place("corpus", request.corpus, names.corpora, "--allow-corpus", "a dataset")
    tokenizer = named_place("tokenizer", request.tokenizer, names.models, "--allow-model", "")
    check_tokens(request, names, config)
    changes: dict[str, Any] = {"model": model, "corpus": corpus, "tokenizer": tokenizer}
    if request.dtype == "auto":
        changes["dtype"] = config.dtype
    places = [places_of(model, request.model, names.models), places_of(corpus, request.corpus, names.corpora)]
    places.append(places_of(tokenizer, request.tokenizer, names.models))
    found = request.model_copy(update={key: value for key, value in changes.items() if value is not None})
    return Admitted(request, found, request_hash(found, [place for place in places if place is not None], config))


def named_place(key: str, name: str | None, allowed: Mapping[str, Path], option: str, kind: str) -> str | None:
    """A name as the planner takes it: the path of an allowed one, else the name itself. Raises HttpError (403)."""
    if name is None:
        return None
    if name in allowed:
        return str(allowed[name])
    if HUB_ID.fullmatch(name) and ".." not in name and not name.lower().endswith(FILE_ENDINGS):
        return name
    known = f" ({', '.join(sorted(allowed))})" if allowed else ""
    kinds = f"{kind}, an id" if kind else "an id"
    raise HttpError(
        403,
        "not_allowed",
        f"{key} {quoted(name, 60)}: a request names no path. Give {kinds} of Hugging Face (owner/name), or a name "
        f"that the server was started with, {option} NAME=PATH{known}",
    )


def check_plain(request: StoreRequest) -> None:
    """Raises HttpError (403) where a further name could be taken for a path or a URL."""
    for key in PLAIN_KEYS:
        value = getattr(request, key)
        if value is not None and not PLAIN.fullmatch(value):
            raise HttpError(
                403, "not_allowed", f"{key} {quoted(value, 60)}: expected a plain name, as the dataset has it"
            )
    for key in ("revision", "corpus_revision"):
        value = getattr(request, key)
        if value is not None and not (REVISION.fullmatch(value) and ".." not in value):
            raise HttpError(403, "not_allowed", f"{key} {quoted(value, 60)}: expected a branch, a tag or a commit")


def check_tokens(request: StoreRequest, names: AllowedNames, config: ServeConfig) -> None:
    if request.tokens is not None and request.tokens > config.max_tokens:
        raise UserError(
            f"tokens: this server harvests at most {config.max_tokens:,} for a request (got {request.tokens:,}). Ask "
            "for fewer; --max-tokens sets the limit"
        )
    if request.tokens is None and request.corpus is not None and request.corpus not in names.corpora:
        raise UserError(
            f"tokens: is needed for a dataset of Hugging Face, which may be of any length. Give at most "
            f"{config.max_tokens:,}"
        )


def places_of(place: str | None, name: str | None, allowed: Mapping[str, Path]) -> Path | None:
    """The local files that a name stands for; None for what is on the hub."""
    if place is None or name is None:
        return None
    if name in allowed:
        return Path(place)
    alias = ALIASES.get(name, "")
    return Path(alias) if os.path.isabs(alias) else None


def request_hash(request: StoreRequest, places: list[Path], config: ServeConfig) -> str | None:
    marks = [file_marks(place) for place in places]
    if None in marks:
        return None
    wanted = request.model_dump(mode="json", exclude=set(NOT_THE_NUMBERS))
    text = json.dumps([wanted, marks, config.device], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_marks(place: Path) -> list[list[Any]] | None:
    """Name, size, date and inode of every file at a place; None where there are too many to look at."""
    found: list[list[Any]] = []
    waiting = [place]
    while waiting:
        path = waiting.pop()
        if path.is_dir():
            waiting += sorted(path.iterdir())
        else:
            about = path.stat()
            found.append([str(path), about.st_size, about.st_mtime_ns, about.st_ino])
        if len(found) + len(waiting) > MOST_FILES:
            return None
    return found
