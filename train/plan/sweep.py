"""Assigns a run's autoencoders to ranks in a sweep, where each rank trains its own autoencoders on whole batches."""

from collections.abc import Sequence

from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import SAEConfig

UNEVEN = 1.25
"""`parallel = auto` sweeps when the largest rank's latents are at most this many times the mean."""


def shared_out(config: TrainConfig, ranks: int) -> list[list[SAEConfig]] | None:
    """Returns each rank's autoencoders in a sweep, or None when every rank trains all of them on its share of each
    batch. Raises UserError when a sweep has fewer autoencoders than ranks, or when the batch does not divide evenly."""
    shares = deal_out(config.saes, ranks)
    even = latents(max(shares, key=latents)) * ranks <= UNEVEN * sum(map(latents, shares))
    if config.parallel == "sweep" and not all(shares):
        raise UserError(
            f"--parallel sweep: {ranks} processes have only {len(config.saes)} autoencoders to share out. Start fewer, "
            "or share each batch: --parallel data"
        )
    parts = config.parts or 1
    if config.batch % parts:
        raise UserError(
            f"parts = {parts}: a --batch of {config.batch} does not divide into {parts} equal micro-batches. Choose a "
            "divisor of it"
        )
    if config.parallel == "sweep" or (config.parallel == "auto" and ranks > 1 and even):
        return shares
    if config.parts and config.parts % ranks:
        raise UserError(
            f"parts = {config.parts}: {ranks} processes cannot share {config.parts} micro-batches evenly. Choose a "
            f"multiple of {ranks}"
        )
    if config.batch % ranks:
        raise UserError(
            f"{ranks} processes cannot share a batch of {config.batch} evenly. Choose a --batch that is a multiple of "
            f"{ranks}"
        )
    return None


def deal_out(saes: Sequence[SAEConfig], ranks: int) -> list[list[SAEConfig]]:
    """Deals autoencoders to ranks: the widest first, each to the rank with the fewest latents so far. A rank gets none
    when there are fewer autoencoders than ranks."""
    shares: list[list[SAEConfig]] = [[] for _ in range(ranks)]
    for sae in sorted(saes, key=lambda sae: -sae.d_sae):
        min(shares, key=latents).append(sae)
    return shares


def latents(saes: list[SAEConfig]) -> int:
    return sum(sae.d_sae for sae in saes)
