"""Which rank trains which autoencoders of a run, where each has some to itself."""

from collections.abc import Sequence

from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import SAEConfig

UNEVEN = 1.25
"""How many times the mean a rank's share of the latents may be, for `auto` to share autoencoders out."""


def shared_out(config: TrainConfig, ranks: int) -> list[list[SAEConfig]] | None:
    """Each rank's autoencoders. None where every rank trains all of them on its part of each batch. Raises UserError
    when a sweep has fewer autoencoders than ranks, or when parts of a batch would not be equal."""
    shares = dealt(config.saes, ranks)
    even = latents(max(shares, key=latents)) * ranks <= UNEVEN * sum(map(latents, shares))
    if config.parallel == "sweep" and not all(shares):
        raise UserError(
            f"--parallel sweep: {ranks} processes have only {len(config.saes)} autoencoders to share out. Start fewer, "
            "or share each batch: --parallel data"
        )
    parts = config.parts or 1
    if config.batch % parts:
        raise UserError(
            f"parts = {parts}: a --batch of {config.batch} does not divide into so many equal parts. Choose a divisor "
            "of it"
        )
    if config.parallel == "sweep" or (config.parallel == "auto" and ranks > 1 and even):
        return shares
    if config.parts and config.parts % ranks:
        raise UserError(
            f"parts = {config.parts}: {ranks} processes cannot share out so many parts of a batch evenly. Choose a "
            "multiple of their number"
        )
    if config.batch % ranks:
        raise UserError(
            f"{ranks} processes cannot share a batch of {config.batch} evenly. Choose a --batch that is a multiple of "
            "their number"
        )
    return None


def dealt(saes: Sequence[SAEConfig], ranks: int) -> list[list[SAEConfig]]:
    """The widest first, each to the rank with the fewest latents so far; none to some where there are too few."""
    shares: list[list[SAEConfig]] = [[] for _ in range(ranks)]
    for sae in sorted(saes, key=lambda sae: -sae.d_sae):
        min(shares, key=latents).append(sae)
    return shares


def latents(saes: list[SAEConfig]) -> int:
    return sum(sae.d_sae for sae in saes)
