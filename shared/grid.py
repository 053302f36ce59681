"""The autoencoders that a command line asks for: every combination of what its options name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared.errors import UserError
from shared.saes import sae_grid
from shared.schema import build
from shared.settings import GRID, architectures
from shared.store.opened import find_hookpoint


def asked_saes(typed: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The configurations, by what was typed: `arch` and the axes of the grid are lists. None where no option named an
    autoencoder. Raises UserError naming the option with the wrong value."""
    axes = {key: list(typed[key]) for key in GRID if key in typed}
    options = {key: value for key, value in typed.items() if key not in (*GRID, "arch")}
    if not axes and "arch" not in typed:
        for key in options:
            raise UserError(f"--{key.replace('_', '-')}: is of autoencoders that the options name. Give --arch, too")
        return None
    grid = sae_grid(list(typed.get("arch", ())), axes, options)
    for sae in grid:
        build(architectures()[sae["arch"]], sae, {key: f"--{key.replace('_', '-')}" for key in sae})
    return grid


def multiples_of_d_in(store: str | None, hook: str | None, expansion: Sequence[float]) -> list[int]:
    """Widths that are multiples of the activations' width. Reads the store's zarr.json. Raises UserError."""
    if store is None:
        raise UserError("--expansion: is a multiple of the activations' width; say which with --store")
    for times in expansion:
        if not (math.isfinite(times) and times > 0):
            raise UserError(f"--expansion: must be a number above 0, such as 8 (got {times})")
    found, path = find_hookpoint(store, hook)
    return [round(times * found.spec.hookpoints[path].d_in) for times in expansion]
