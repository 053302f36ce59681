"""Lists stores and describes their content, for `sagsae store ls` and `info`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.errors import DamagedError, UserError
from shared.files.base import Files
from shared.files.local import LocalFiles
from shared.files.open import open_files
from shared.hub.place import is_hub
from shared.progress import say
from shared.store.norms import norms, outlying
from shared.store.opened import Store, is_store
from shared.store.spec import DTYPES


def list_stores(location: str | Path) -> list[dict[str, Any]]:
    """One row per hookpoint of every store in a folder (or of the folder itself, when it is a store)."""
    files = open_files(location)
    if isinstance(files, LocalFiles) and not files.root.is_dir():
        raise UserError(f"{location}: there is no such folder. Stores are made with: sagsae harvest")
    rows: list[dict[str, Any]] = []
    for place in [files] if is_store(files) else [files.at(name) for name in files.folders()]:
        try:
            if is_store(place):
                rows += store_rows(Store.open(place))
        except (UserError, DamagedError) as error:
            say(f"{place.name}: left out. {error}")
    return rows


def store_rows(store: Store) -> list[dict[str, Any]]:
    rows = []
    for hook, spec in store.spec.hookpoints.items():
        size = store.stored_bytes(hook)
        raw = store.n_rows * spec.d_in * DTYPES[store.spec.dtype][0].itemsize
        layer, _, name = hook.partition("/")
        row = {
            "store": folder_name(store.files),
            "model": store.spec.model["name"],
            "layer": layer.removeprefix("layer_"),
            "hook": name or hook,
            "tokens": store.n_rows,
            "d_in": spec.d_in,
            "dtype": store.spec.dtype,
            "codec": store.spec.codec,
            "ratio": round(raw / size, 3) if size else None,
            "MB": round(size / 1e6, 1),
            "state": store.state if store.state == "final" else f"{len(store.commits)}/{store.spec.n_shards} shards",
        }
        rows.append(row)
    return rows


def folder_name(files: Files) -> str:
    """The last part of a location; without the revision of a dataset on the hub."""
    if isinstance(files, LocalFiles):
        return files.root.resolve().name
    last = files.name.rstrip("/").rsplit("/", 1)[-1]
    return last.partition("@")[0] if is_hub(files.name) else last


def describe_store(location: str | Path) -> dict[str, Any]:
    """The whole spec, and for every hookpoint its moments, norms and outlying dimensions."""
    store = Store.open(location)
    with store.files.reading():
        return described(store, location)


def described(store: Store, location: str | Path) -> dict[str, Any]:
    about: dict[str, Any] = {"store": str(location), "state": store.state, "tokens": store.n_rows}
    about |= {"shards": f"{len(store.commits)} of {store.spec.n_shards}", "spec": store.spec.model_dump(mode="json")}
    about["hookpoints"] = store_rows(store)
    for row, hook in zip(about["hookpoints"], store.spec.hookpoints, strict=True):
        row["counted"] = store.kept(hook)
        if row["counted"] < 2:
            continue
        statistics, cost = store.statistics(hook), store.quantisation(hook)
        row["scale"] = statistics.scale
        row["norm_of_mean"] = float((statistics.mean**2).sum() ** 0.5)
        row["mean_square"] = float((statistics.variance + statistics.mean**2).sum())
        row["variance"] = float(statistics.variance.sum())
        row["outlying_dimensions"] = outlying(statistics)
        row["norms"] = asdict(measured) if (measured := norms(store, hook)) else None
        if measured and measured.massive.text:
            say(f"{hook}: {measured.massive.text}")
        if cost:
            row |= {"snr_db": round(cost.snr_db, 2), "fvu_added": cost.fvu}
    return about
