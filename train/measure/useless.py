"""Runs that ended without a use say so: what is finite and complete may still be worth nothing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shared.store.norms import share
from train.fit.control import MISSED

MOSTLY_DEAD: Final = 0.9
AT_MOST: Final = 8
"""Autoencoders that are named one by one."""


def useless(saes: Sequence[Mapping[str, Any]], steered: bool = True) -> list[str]:
    """A line for each autoencoder of evaluation.json that something is wrong with. `steered`: a missed L0 target, too,
    which training says by itself."""
    said = [f"{sae['name']}: {', '.join(found)}" for sae in saes if (found := list(faults(sae, steered)))]
    rest = len(said) - AT_MOST
    return said if rest <= 0 else [*said[:AT_MOST], f"{rest} more autoencoders ended like these"]


def faults(sae: Mapping[str, Any], steered: bool = True) -> Iterator[str]:
    r2, l0, dead = sae.get("r2"), sae.get("l0"), sae.get("dead_fraction")
    if r2 is None:
        yield "its R² is no number"
    elif r2 < 0:
        yield f"its R² is {r2:.4g}, worse than the mean of the activations. Lower --lr or λ"
    if dead is not None and dead > MOSTLY_DEAD:
        yield f"{share(dead)} of its latents are dead"
    for name, wanted in (("k", sae.get("k")), ("l0_target", sae.get("l0_target") if steered else None)):
        if wanted and l0 is not None and abs(l0 - wanted) > MISSED * wanted:
            yield f"its L0 is {l0:.3g}, {name} {wanted:g} was asked for"
