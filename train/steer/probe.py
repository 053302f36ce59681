"""Measures what interventions do to the next-token predictions of a language model on given contexts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import Interrupted
from train.measure.metrics import replaced_at

LOGITS_AT_ONCE: Final = 1 << 23
"""Logits of a batch: 32 MiB, of which about six copies are alive at a time."""

Change = Callable[[Tensor], Tensor]
"""Activations [n, context, ...] -> changed ones."""


@runtime_checkable
class CausalModel(Protocol):
    """A language model as the dial test uses it."""

    device: torch.device
    vocab_size: int

    def logits(self, tokens: Tensor, splice: tuple[str, Change] | None = None) -> Tensor:
        """Returns logits [n, context, vocab_size]; see `LanguageModel.logits`."""
        ...


@dataclass(frozen=True)
class SteeredContexts:
    """Contexts, and the positions at which they are changed and judged."""

    tokens: NDArray[Any]
    """[n, context] token ids."""
    counted: NDArray[np.bool_]
    """[n, context] positions that an intervention changes."""
    predicted: NDArray[np.bool_]
    """[n, context - 1] predictions that count."""

    @classmethod
    def of(cls, tokens: NDArray[Any], counted: NDArray[np.bool_], special: Sequence[int]) -> "SteeredContexts":
        """Returns contexts whose predictions count as in `sagsae eval`: at positions that are changed, and with a next
        token that is not special. Contexts without such a prediction are left out."""
        predicted = counted[:, :-1] & ~np.isin(tokens[:, 1:], list(special))
        some = predicted.any(axis=1)
        return cls(tokens[some], counted[some], predicted[some])

    @property
    def predictions(self) -> NDArray[np.int64]:
        """[n] predictions that count in each context."""
        return np.asarray(self.predicted.sum(axis=1), np.int64)

    def mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean over all predictions of means over those of each context, [n, ...]."""
        return np.asarray(np.average(values, axis=0, weights=self.predictions), np.float64)


@dataclass(frozen=True)
class TokenContrasts:
    """Weighted sums of log-probabilities: mean log p(T+) - mean log p(T-) for pairs of token sets."""

    tokens: NDArray[np.int64]
    """[tokens] ids, rising."""
    weights: NDArray[np.float64]
    """[tokens, contrasts]"""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> "TokenContrasts":
        """Returns the contrasts of pairs (T+, T-)."""
        tokens = np.unique([token for pair in pairs for part in pair for token in part]).astype(np.int64)
        weights = np.zeros((len(tokens), len(pairs)))
        for column, (plus, minus) in enumerate(pairs):
            weights[np.searchsorted(tokens, plus), column] += 1 / len(plus)
            weights[np.searchsorted(tokens, minus), column] -= 1 / len(minus)
        return cls(tokens, weights)


@dataclass(frozen=True)
class ProbeResponse:
    """What one intervention did: means over the predictions of each context."""

    contrast: NDArray[np.float64]
    """[n, contrasts]"""
    kl: NDArray[np.float64]
    """[n] KL(unsteered ‖ steered) in nats."""
    ce: NDArray[np.float64]
    """[n] next-token loss in nats."""
    mean: NDArray[np.float64] | None = None
    """[vocab_size] mean probability of every token over all predictions, where it was asked for."""

    @classmethod
    def joined(cls, parts: Sequence["ProbeResponse"]) -> "ProbeResponse":
        contrast, kl, ce = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("contrast", "kl", "ce")
        )
        means = [part.mean for part in parts if part.mean is not None]
        return cls(contrast, kl, ce, np.sum(means, axis=0) if means else None)


@dataclass(frozen=True)
class ProbeBatch:
    """Some contexts on the model's device."""

    ids: Int[Tensor, "n context"]
    here: Bool[Tensor, "n context"]
    """Positions that are changed."""
    weights: Float[Tensor, "n predictions"]
    """1 over the predictions of the context where one counts, else 0."""
    share: Float[Tensor, "n predictions"]
    """1 over the predictions of all contexts where one counts, else 0."""


class Probe:
    """Runs a model on contexts, unsteered and with interventions."""

    def __init__(
        self,
        model: CausalModel,
        hook: str,
        contexts: SteeredContexts,
        contrasts: TokenContrasts,
        with_means: bool = False,
    ) -> None:
        """`hook`: the hookpoint's name in the model. `with_means`: whether to return the mean probability of every
        token."""
        self.model, self.hook, self.contexts, self.with_means = model, hook, contexts, with_means
        self.tokens = torch.from_numpy(contrasts.tokens).to(model.device)
        self.weights = contrasts.weights

    def measure(
        self,
        changes: Sequence[Change],
        advance: Callable[[int], None] = lambda _: None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> list[ProbeResponse]:
        """Returns the responses without a change and, after it, with each change. `advance` is called with the passes
        that were made. Raises Interrupted when `stop_asked` says so."""
        found: list[list[ProbeResponse]] = [[] for _ in range(1 + len(changes))]
        for batch in self.batches():
            clean = self.log_probabilities(batch, None)
            found[0].append(self.judged(clean, clean, batch))
            for number, change in enumerate(changes, 1):
                if stop_asked():
                    raise Interrupted("stopped before the end: nothing was written. Run the same command again")
                found[number].append(self.judged(self.log_probabilities(batch, change), clean, batch))
                advance(1)
        return [ProbeResponse.joined(parts) for parts in found]

    @property
    def batch_contexts(self) -> int:
        """Contexts in a batch."""
        return max(1, LOGITS_AT_ONCE // (int(self.contexts.tokens.shape[1]) * self.model.vocab_size))

    @property
    def batch_count(self) -> int:
        return -(-len(self.contexts.tokens) // self.batch_contexts)

    def batches(self) -> Iterator[ProbeBatch]:
        whole = self.contexts.predictions.sum()
        for start in range(0, len(self.contexts.tokens), self.batch_contexts):
            some = slice(start, start + self.batch_contexts)
            arrays = (self.contexts.tokens[some].astype("int64"), self.contexts.counted[some])
            ids, here = (torch.from_numpy(array).to(self.model.device) for array in arrays)
            predicted = torch.from_numpy(self.contexts.predicted[some]).to(self.model.device).float()
            yield ProbeBatch(ids, here, predicted / predicted.sum(1, keepdim=True), predicted / int(whole))

    def log_probabilities(self, batch: ProbeBatch, change: Change | None) -> Float[Tensor, "n predictions vocab"]:
        splice = None if change is None else (self.hook, replaced_at(batch.here, change))
        return self.model.logits(batch.ids, splice)[:, :-1].float().log_softmax(-1)

    def judged(
        self,
        steered: Float[Tensor, "n predictions vocab"],
        clean: Float[Tensor, "n predictions vocab"],
        batch: ProbeBatch,
    ) -> ProbeResponse:
        """Means over each context's predictions."""
        weights = batch.weights
        level = torch.bmm(weights[:, None], steered)[:, 0, self.tokens].double().cpu().numpy()
        distance = torch.nn.functional.kl_div(steered, clean, log_target=True, reduction="none").sum(-1)
        loss = -steered.gather(-1, batch.ids[:, 1:, None])[..., 0]
        means = torch.einsum("npv,np->v", steered.exp(), batch.share) if self.with_means else None
        kl, ce = ((value.double() * weights).sum(1).cpu().numpy() for value in (distance, loss))
        return ProbeResponse(level @ self.weights, kl, ce, None if means is None else means.double().cpu().numpy())
