"""The rows of a store that a finished run was trained and measured on, found again."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.config import TrainConfig
from shared.errors import UserError
from shared.files.base import is_remote
from shared.store.opened import Store, find_hookpoint
from train.data.follow import check_segments
from train.data.norm_filter import recorded_limit
from train.data.snapshot import as_recorded, content_of
from train.runs.folder import RunFolder


@dataclass(frozen=True)
class TrainedRows:
    """A finished run, with its store restricted to the shards that it read."""

    folder: RunFolder
    config: TrainConfig
    store: Store
    hook: str
    limit: float | None
    """Rows with a larger norm do not count (setting `max_norm`)."""


def trained_rows(run: Path, place: str | None) -> TrainedRows:
    """Returns the rows of a finished run. `place`: where its store is now; None: where it was. Raises UserError when
    the run is not finished, or the store is gone or has other rows."""
    folder = RunFolder(run)
    config = folder.config()
    if not folder.exists() or "finished" not in folder.read("record.json"):
        raise UserError(f"{run}: its training is not finished. Run the same sagsae train command again first")
    if place is None and not (is_remote(config.store) or Path(config.store).exists()):
        raise UserError(f"{run}: its store {config.store} does not exist. Name its new place with --store")
    store, hook = find_hookpoint(place or config.store, config.hook)
    identity = folder.read("config.json")
    store = as_recorded(store, hook, identity, f"{run}")
    if config.follow:
        check_segments(store, run, partial(content_of, hook=hook))
    return TrainedRows(folder, config, store, hook, recorded_limit(identity, f"{run}"))
