"""The texts of a store's contexts, decoded with the tokenizer that made their ids.

This runs in the planner's process. It asks the network for nothing, and a tokenizer is used only when its digest is the
one in the store's spec: another one would show words that were never there.
"""

from pathlib import Path
from typing import Any

from harvest.serve.page.sites import source_here
from shared.errors import UserError
from shared.gate import BadData, parse_json
from shared.model.source import ModelSource
from shared.model.tokenizer import Encoder, load_from_source
from shared.store.opened import Store

RECORD_BYTES = 1 << 20


def stored_texts(folder: Path, contexts: int) -> list[dict[str, Any]]:
    """The first contexts of a store: `context` (its number), `ids`, and `text`, which is None where the tokenizer is not
    on this machine. Raises DamagedError."""
    store = Store.open(folder)
    rows = store.token_rows(check=False)[: min(contexts, store.spec.n_contexts)].tolist()
    encoder = encoder_of(store, folder)
    return [
        {"context": number, "ids": ids, "text": None if encoder is None else encoder.tokenizer.decode(ids)}
        for number, ids in enumerate(rows)
    ]


def encoder_of(store: Store, folder: Path) -> Encoder | None:
    """The store's tokenizer; None where it is not on this machine, or has changed since."""
    digest = store.spec.tokenizer.get("blake2b")
    for name in names_of(store, folder) if digest else ():
        try:
            source = tokenizer_here(name)
            encoder = Encoder(source, load_from_source(source)) if source else None
            if encoder is not None and encoder.digest == digest:
                return encoder
        except UserError:  # moved away, or no tokenizer of a kind that is known here
            continue
    return None


def names_of(store: Store, folder: Path) -> list[str]:
    """Where the tokenizer may be: what the harvest was given, else the model."""
    try:
        with (folder / "record.json").open("rb") as file:
            record = parse_json(file.read(RECORD_BYTES))
    except (OSError, BadData):
        record = {}
    config = record.get("config") if isinstance(record, dict) else None
    given = config.get("tokenizer") if isinstance(config, dict) else None
    return [name for name in (given, store.spec.model["name"]) if isinstance(name, str) and name]


def tokenizer_here(name: str) -> ModelSource | None:
    """A folder, or what the hub's cache holds."""
    place = Path(name).expanduser()
    return ModelSource(name, str(place), True, "") if place.is_dir() else source_here(name)
