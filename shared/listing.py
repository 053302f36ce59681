"""What stores there are and what is in them, for `sagsae store ls` and `info`."""

from pathlib import Path
from typing import Any

from shared.errors import DamagedError, UserError
from shared.progress import say
from shared.store import DTYPES, STATE_FILE, Store, is_store, stored_bytes


def list_stores(root: Path) -> list[dict[str, Any]]:
    """One row a hookpoint of every store in `root` (or of `root` itself, when it is a store)."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder. Stores are made with: sagsae harvest")
    found = [root] if is_store(root) else [path for path in sorted(root.iterdir()) if (path / STATE_FILE).exists()]
    rows: list[dict[str, Any]] = []
    for path in found:
        try:
            rows += store_rows(Store.open(path))
        except (UserError, DamagedError) as error:
            say(f"{path}: left out. {error}")
    return rows


def store_rows(store: Store) -> list[dict[str, Any]]:
    rows = []
    for hook, spec in store.spec.hookpoints.items():
        size = stored_bytes(store, hook)
        raw = store.n_rows * spec.d_in * DTYPES[store.spec.dtype][0].itemsize
        rows.append({
            "store": store.root.name,
            "model": store.spec.model["name"],
            "hook": hook,
            "tokens": store.n_rows,
            "d_in": spec.d_in,
            "dtype": store.spec.dtype,
            "codec": store.spec.codec,
            "ratio": round(raw / size, 3) if size else None,
            "MB": round(size / 1e6, 1),
            "state": store.state if store.state == "final" else f"{len(store.commits)}/{store.spec.n_shards} shards",
        })  # fmt: skip
    return rows


def describe_store(path: Path) -> dict[str, Any]:
    """The whole specification, and the moments of every hookpoint."""
    store = Store.open(path)
    about: dict[str, Any] = {"store": str(path), "state": store.state, "tokens": store.n_rows}
    about |= {"shards": f"{len(store.commits)} of {store.spec.n_shards}", "spec": store.spec.model_dump(mode="json")}
    about["hookpoints"] = store_rows(store)
    if store.commits:
        for row in about["hookpoints"]:
            statistics = store.statistics(row["hook"])
            row["scale"] = statistics.scale
            row["mean_norm"] = float((statistics.mean**2).sum() ** 0.5)
            row["counted"] = statistics.n
    return about
