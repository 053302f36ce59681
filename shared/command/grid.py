"""The autoencoders that a command line asks for: every combination of what its options name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared.command.settings import GRID, architectures
from shared.errors import UserError
from shared.progress import say
from shared.saes import sae_grid, shared_sparsity
from shared.schema import build
from shared.store.opened import find_hookpoint


def asked_saes(typed: Mapping[str, Any], place: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The configurations, by what was typed: `arch`, `expansion` and the axes of the grid are lists. `place` has the
    store and the hook whose width `expansion` multiplies. None where no option named an autoencoder. Raises UserError
    naming the option with the wrong value."""
    widths = list(typed.get("d_sae", []))
    if "expansion" in typed:
        widths += multiples_of_d_in(place.get("store"), place.get("hook"), typed["expansion"])
    given = {**typed, "d_sae": widths}
    axes = {key: list(given[key]) for key in GRID if given.get(key)}  # the order of GRID is the autoencoders' order
    options = {key: value for key, value in typed.items() if key not in (*GRID, "arch", "expansion")}
    if not axes and "arch" not in typed:
        for key in options:
            raise UserError(
                f"--{key.replace('_', '-')}: belongs to autoencoders that the options name. Give --arch, too"
            )
        return None
    grid = sae_grid(list(typed.get("arch", ())), axes, options)
    for sae in grid:
        build(architectures()[sae["arch"]], sae, {key: f"--{key.replace('_', '-')}" for key in sae})
    return grid


def check_listed_saes(saes: Any, label: str) -> None:
    """Autoencoders of a --config file or of --set, each by the name of its place. Raises UserError."""
    for number, sae in enumerate(saes if isinstance(saes, list) else []):
        if isinstance(sae, dict) and sae.get("arch") in architectures():
            schema = architectures()[sae["arch"]]
            build(schema, sae, {str(key): f"{label}.{number}.{key}" for key in {*schema.model_fields, *sae}})


def warn_of_shared_sparsity(typed: Mapping[str, Any]) -> None:
    """Says so where one list of λ goes to architectures for which λ means different things."""
    warning = shared_sparsity(typed.get("arch", []), typed.get("sparsity", []))
    if warning:
        say(warning)


def multiples_of_d_in(store: str | None, hook: str | None, expansion: Sequence[float]) -> list[int]:
    """Widths that are multiples of the activations' width. Reads the store's zarr.json. Raises UserError."""
    if store is None:
        raise UserError("--expansion: is a multiple of the activations' width; say which with --store")
    for times in expansion:
        if not (math.isfinite(times) and times > 0):
            raise UserError(f"--expansion: must be a number above 0, such as 8 (got {times})")
    found, path = find_hookpoint(store, hook)
    return [round(times * found.spec.hookpoints[path].d_in) for times in expansion]
