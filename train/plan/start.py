"""Warm starts: the weights of one autoencoder are the first weights of others (`sagsae train --from`).

The source may be one that was trained here or an imported one. What it computes is kept exactly: its architecture and
width are those of the new autoencoder, or follow from it by `split` or `join`. Optimisers begin from nothing.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import Gated, SAEConfig, SaGsae
from shared.store.opened import Store
from train.autoencoder import Autoencoder, settings_of
from train.exchange.fitting import Origin, check_fits
from train.exchange.saved import SavedSAE, find_saes
from train.sae.base import Weights
from train.sae.families import family

UNIT: Final = 1e-5
"""How far from one the norm of a decoder row may be that training then holds at one."""


@dataclass(frozen=True)
class StartPoint:
    """The autoencoder that a run's autoencoders start from."""

    saved: SavedSAE
    digest: str
    """SHA-256 of its weights."""
    source: Autoencoder

    def weights(self, sae: SAEConfig, scale: float) -> Weights:
        """Returns the first weights of `sae`, for activations that are divided by `scale`. Raises UserError when they
        cannot be had from the source."""
        found = self.in_form_of(sae).times(1 / scale)
        return replace(found, **{name: tensor.clone() for name, tensor in found.named().items()})

    def in_form_of(self, sae: SAEConfig) -> Weights:
        """Returns the source's weights in the form of another configuration that computes the same."""
        what = f"--from {self.saved.folder}"
        try:
            source = converted(self.source, sae)
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
        weights = untied(source.weights, sae)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.named().items()}
        wanted = family(sae).shapes(source.d_in)
        one_sided = getattr(sae, "one_sided", False) != getattr(source.config, "one_sided", False)
        if source.config.arch != sae.arch or shapes != wanted or one_sided:
            raise UserError(
                f"{what}: is {self.source.config.name}, whose weights {sae.name} cannot have. Give its architecture, "
                "width and tie; a gated of width 2H can also start from an sa-gsae of width H, and back"
            )
        check_constraints(weights, sae, what)
        return weights


def converted(source: Autoencoder, sae: SAEConfig) -> Autoencoder:
    """Returns the source, or its split or join where `sae` has that architecture. Raises UserError when it has none."""
    if isinstance(source.config, SaGsae) and isinstance(sae, Gated):
        return source.split()
    if isinstance(source.config, Gated) and isinstance(sae, SaGsae):
        return source.join()
    return source


def untied(weights: Weights, sae: SAEConfig) -> Weights:
    """Returns weights in which scalars that both poles share are there for each pole, where `sae` does not tie them."""
    poles = family(sae).poles
    tied = [name for name, tensor in weights.named().items() if poles.get(name) == 2 and len(tensor) == 1]
    return replace(weights, **{name: getattr(weights, name).repeat(2, 1) for name in tied})


def check_constraints(weights: Weights, sae: SAEConfig, what: str) -> None:
    """Raises UserError for weights that the first step of training would change: decoder rows of other norms than one,
    and values out of their range."""
    norms = weights.W_dec.norm(dim=1)
    if family(sae).unit_decoder and ((norms - 1).abs() > UNIT).any():
        raise UserError(
            f"{what}: its decoder rows have norms from {norms.min():.4g} to {norms.max():.4g}, and {sae.name} holds "
            "them at one. Scale each row and its latent, or train with decoder = free"
        )
    held = replace(weights, **{name: tensor.clone() for name, tensor in weights.named().items()})
    family(sae).constrain_(held)
    for name, tensor in weights.named().items():
        if not torch.equal(tensor, getattr(held, name)):
            raise UserError(f"{what}: has values of {name} that training would change at once in {sae.name}")


def with_start(config: TrainConfig) -> tuple[TrainConfig, StartPoint | None]:
    """Returns the configuration with the digest of the weights that its autoencoders start from, and these. Raises
    UserError when there are none, or others than the configuration names."""
    if config.warm_start is None:
        for sae in config.saes:
            if sae.start is not None:
                raise UserError(f"saes: {sae.name} starts from weights of another autoencoder. Name it with --from")
        return config, None
    saved = only_one(config.warm_start)
    _, _, _, digest = settings_of(saved.folder)
    for sae in config.saes:
        if sae.start not in (None, digest):
            raise UserError(
                f"--from {saved.folder}: has the weights {digest[:12]}, and {sae.name} starts from others. Restore them"
            )
    saes = tuple(sae.model_copy(update={"start": digest}) for sae in config.saes)
    return config.model_copy(update={"saes": saes}), StartPoint(saved, digest, saved.load())


def only_one(place: Path) -> SavedSAE:
    """Returns the autoencoder of a folder or RUN/NAME. Raises UserError when there are none, or several."""
    found = find_saes(place)
    if len(found) > 1:
        names = ", ".join(saved.name for saved in found[:8])
        raise UserError(f"--from {place}: holds {len(found)} autoencoders. Name one, RUN/NAME: {names}")
    return found[0]


def check_start(start: StartPoint, config: TrainConfig, store: Store, hook: str) -> None:
    """Raises UserError when an autoencoder of the run cannot start from it. Another model or hookpoint than the store's
    is allowed, and said."""
    origin = Origin.of(start.saved.about(), f"--from {start.saved.folder}")
    check_fits(origin, start.source.d_in, store, hook, f"--from {start.saved.folder}", transfer=True)
    for sae in config.saes:
        start.in_form_of(sae)
