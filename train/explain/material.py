"""Chooses the latents to explain, and gathers the examples that questions about them show."""

from collections.abc import Iterator, Sequence

from shared.errors import UserError
from train.explain.interview import LatentMaterial
from train.explain.windows import FEWEST_HELD, FEWEST_SHOWN, chance, split_examples
from train.features.readers.folder import FeatureFolder, WrittenExample

BLOCK = 256
"""Latents whose examples are in memory together. Windows without a firing are from the same block."""


def choose_latents(folder: FeatureFolder, only: Sequence[int], many: int, seed: int) -> list[int]:
    """Returns the latents to explain, rising: `only` those, or `many` drawn at random among those with a pole that
    fires often enough. Raises UserError for a latent that the autoencoder does not have, and when none is left."""
    if wrong := [latent for latent in only if latent >= folder.d_sae]:
        raise UserError(f"--only {wrong[0]}: this autoencoder has latents 0 to {folder.d_sae - 1}")
    if only:
        return sorted(set(only))
    least = FEWEST_SHOWN + FEWEST_HELD
    fit = {pole.latent for pole in folder.poles(0, folder.d_sae, ("firings",)) if pole.firings >= least}
    if not fit:
        raise UserError(f"{folder.path}: no latent fires {least} times. Make features of more tokens, or train longer")
    return sorted(sorted(fit, key=lambda latent: chance(seed, latent))[:many])


def materials(folder: FeatureFolder, latents: Sequence[int]) -> Iterator[LatentMaterial]:
    """Yields what is known of each of some latents, which rise."""
    for block in sorted({latent // BLOCK for latent in latents}):
        first, last = block * BLOCK, min(folder.d_sae, (block + 1) * BLOCK)
        poles = folder.poles(first, last, ("firings", "rule", "cofire"))
        examples = folder.examples(first, last)
        by_latent: dict[int, list[WrittenExample]] = {}
        for each in examples:
            by_latent.setdefault(each.latent, []).append(each)
        for latent in latents:
            if latent // BLOCK != block:
                continue
            own = by_latent.get(latent, [])
            some = sorted((pole for pole in poles if pole.latent == latent), key=lambda pole: -pole.sign)
            yield LatentMaterial(latent, split_examples(some, own), own, examples, folder.rows)
