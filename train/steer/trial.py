"""The dial test of some latents on a language model, from their token sets to p. Reads and writes no files.

The control directions are measured once for all latents: with both signs, at no more than three lengths that span the
latents' own. The slope at another length is interpolated, as the response is nearly linear in it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.progress import progress
from shared.schemas.steer import FALSE_DISCOVERIES, FEWEST_CONTROLS, GRID, DialLatent
from train.autoencoder import Autoencoder
from train.steer.contrast import TokenSets
from train.steer.controls import at_size, control_sizes, discoveries, p_value
from train.steer.intervene import Intervention
from train.steer.probe import CausalModel, Probe, ProbeResponse, SteeredContexts, TokenContrasts

BOOTSTRAPS: Final = 2000
AT_ONCE: Final = 8
"""Latents, or control directions, that are measured between two unsteered passes."""

Item = TypeVar("Item")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DialSubject:
    """One latent with all that its test needs."""

    latent: int
    firings: tuple[int, int]
    """Below and above zero."""
    energy: float
    """The weaker pole's share of Σf²."""
    unit: float
    sets: TokenSets
    shuffled: tuple[TokenSets, ...] = ()

    @property
    def pairs(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Its own token sets, then those from shuffled signs."""
        return [(each.plus, each.minus) for each in (self.sets, *self.shuffled)]


@dataclass(frozen=True)
class DialTest:
    """What the latents and the control directions are tested on."""

    model: CausalModel
    hook: str
    """The hookpoint's name in the model."""
    sae: Autoencoder
    contexts: SteeredContexts
    subjects: Sequence[DialSubject]
    controls: Float[Tensor, "controls d_in"]
    """Unit vectors."""

    def run(self, seed: int, stop_asked: Callable[[], bool] = lambda: False) -> tuple[list[DialLatent], list[float]]:
        """Returns what was found of each latent, and the lengths at which the control directions were measured. Raises
        Interrupted when `stop_asked` says so."""
        sizes, batches = control_sizes([self.size(each) for each in self.subjects]), self.probe([]).batch_count
        total = batches * (len(GRID) * len(self.subjects) + 2 * len(sizes) * len(self.controls))
        with progress("dial", total, "passes") as advance:
            slopes = self.control_slopes(sizes, lambda n: advance(n, "control directions"), stop_asked)
            responses = list(self.responses(lambda n: advance(n, "latents"), stop_asked))
        found, column = [], 0
        rng = np.random.default_rng(seed)
        for subject, mine in zip(self.subjects, responses, strict=True):
            mine_of_all = range(column, column + len(subject.pairs))
            column = mine_of_all.stop
            around = [at_size(slopes[:, :, each], sizes, self.size(subject)) for each in mine_of_all]
            found.append(self.judged(subject, mine, around, rng))
        return with_verdicts(found, len(self.controls)), sizes

    def size(self, subject: DialSubject) -> float:
        """How far a dial unit moves an activation."""
        return subject.unit * float(self.sae.weights.W_dec[subject.latent].norm())

    def probe(self, subjects: Sequence[DialSubject]) -> Probe:
        pairs = [pair for subject in subjects for pair in subject.pairs]
        return Probe(self.model, self.hook, self.contexts, TokenContrasts.of(pairs))

    def control_slopes(
        self, sizes: Sequence[float], advance: Callable[[int], None], stop_asked: Callable[[], bool]
    ) -> Floats:
        """Returns the slope of every control direction at every size by every contrast: [sizes, controls,
        contrasts]."""
        probe, found = self.probe(self.subjects), []
        for some in grouped(list(self.controls), AT_ONCE):
            ends = [(row, sign * size) for row in some for size in sizes for sign in (-1, 1)]
            changes = [Intervention(row, torch.tensor([amount]).to(row)) for row, amount in ends]
            _, *responses = probe.measure(changes, advance, stop_asked)
            y = np.stack([self.contexts.mean(response.contrast) for response in responses])
            found.append((y[1::2] - y[::2]).reshape(len(some), len(sizes), -1) / 2)
        whole = np.concatenate([np.zeros((0, len(sizes), len(probe.weights.T))), *found])
        return whole.transpose(1, 0, 2)

    def responses(
        self, advance: Callable[[int], None], stop_asked: Callable[[], bool]
    ) -> Iterator[list[ProbeResponse]]:
        """Yields, for each latent, the response without an intervention and at each dial value, with its own contrasts
        alone."""
        for some in grouped(self.subjects, AT_ONCE):
            changes = [
                Intervention.on_latent(self.sae, each.latent, torch.tensor([value * each.unit]), added=False)
                for each in some
                for value in GRID
            ]
            clean, *found = self.probe(some).measure(changes, advance, stop_asked)
            column = 0
            for number, each in enumerate(some):
                columns = slice(column, column + len(each.pairs))
                column = columns.stop
                mine = [clean, *found[number * len(GRID) : (number + 1) * len(GRID)]]
                yield [ProbeResponse(one.contrast[:, columns], one.kl, one.ce) for one in mine]

    def judged(
        self,
        subject: DialSubject,
        responses: Sequence[ProbeResponse],
        controls: Sequence[Floats],
        rng: np.random.Generator,
    ) -> DialLatent:
        """Sets a latent against the control directions. `controls`: their slopes by its own contrast, then by those
        from shuffled signs."""
        clean, *steered = responses
        mean = self.contexts.mean
        y = np.stack([mean(each.contrast) for each in steered])
        per_context = (steered[GRID.index(1)].contrast - steered[GRID.index(-1)].contrast) / 2
        slopes = mean(per_context)
        p = [p_value(float(slope), around) for slope, around in zip(slopes, controls, strict=True)]
        return DialLatent(
            latent=subject.latent,
            firings=subject.firings,
            energy=subject.energy,
            unit=subject.unit,
            unit_rms=self.size(subject) / self.sae.scale,
            plus=subject.sets.plus,
            minus=subject.sets.minus,
            clean=float(mean(clean.contrast)[0]),
            y=tuple(y[:, 0].tolist()),
            kl=tuple(float(mean(each.kl)) for each in steered),
            ce=tuple(float(mean(each.ce) - mean(clean.ce)) for each in steered),
            slope=float(slopes[0]),
            interval=bootstrap(per_context[:, 0], self.contexts.predictions, rng),
            controls=tuple(controls[0].tolist()),
            shuffled=tuple(slopes[1:].tolist()),
            shuffled_p=tuple(each for each in p[1:] if each is not None),
            p=p[0],
            passes=None,
        )


def with_verdicts(latents: Sequence[DialLatent], controls: int) -> list[DialLatent]:
    """Marks which latents pass; none is marked with fewer control directions than a verdict needs."""
    known = [latent.p for latent in latents if latent.p is not None]
    if controls < FEWEST_CONTROLS or len(known) < len(latents):
        return list(latents)
    passed = discoveries(known, FALSE_DISCOVERIES)
    return [latent.model_copy(update={"passes": each}) for latent, each in zip(latents, passed, strict=True)]


def bootstrap(values: Floats, weights: NDArray[np.int64], rng: np.random.Generator) -> tuple[float, float]:
    """Returns the 95 % interval of the weighted mean of `values` [n], with contexts drawn again."""
    drawn = rng.integers(0, len(values), (BOOTSTRAPS, len(values)))
    means = (values[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def grouped(items: Sequence[Item], many: int) -> Iterator[Sequence[Item]]:
    """Yields `many` items at a time."""
    for start in range(0, len(items), many):
        yield items[start : start + many]
