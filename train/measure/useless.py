"""Warns about autoencoders that are finished and finite but useless: negative R², dead latents, or a missed L0."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shared.store.norms import share
from train.fit.control import MISSED

MOSTLY_DEAD: Final = 0.9
AT_MOST: Final = 8
"""Maximum number of autoencoders that are named one by one."""


def useless(saes: Sequence[Mapping[str, Any]], steered: bool = True) -> list[str]:
    """Returns a warning for each autoencoder of evaluation.json with a fault. `steered`: warn about a missed L0 target
    too (training warns about it by itself)."""
    warnings = [f"{sae['name']}: {', '.join(found)}" for sae in saes if (found := list(faults(sae, steered)))]
    rest = len(warnings) - AT_MOST
    plural = "autoencoder" if rest == 1 else "autoencoders"
    return warnings if rest <= 0 else [*warnings[:AT_MOST], f"{rest} more {plural} ended like these"]


def faults(sae: Mapping[str, Any], steered: bool = True) -> Iterator[str]:
    """Yields what is wrong with one autoencoder, in words."""
    r2, l0, dead = sae.get("r2"), sae.get("l0"), sae.get("dead_fraction")
    if r2 is None:
        yield "its R² is NaN or infinite"
    elif r2 < 0:
        yield f"its R² is {r2:.4g}, worse than the mean of the activations. Lower --lr or λ"
    if dead is not None and dead > MOSTLY_DEAD:
        yield f"{share(dead)} of its latents are dead"
    for name, wanted in (("k", sae.get("k")), ("l0_target", sae.get("l0_target") if steered else None)):
        if wanted and l0 is not None and abs(l0 - wanted) > MISSED * wanted:
            yield f"its L0 is {l0:.3g}, but {name} is {wanted:g}"
