"""Lets a language model continue a text, without and with an intervention, side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.measure.metrics import replaced_at
from train.steer.intervene import Intervention
from train.steer.probe import CausalModel

LOGITS_AT_ONCE: Final = 1 << 26

Marks = Callable[[Int[Tensor, "n length"]], Bool[Tensor, "n length"]]
"""Token ids -> the positions that are changed."""


@dataclass(frozen=True)
class Continuations:
    """What the model wrote after one prompt: without an intervention first, then with each amount."""

    tokens: list[list[int]]
    """The new tokens of each, to the end of the text."""
    first: Float[Tensor, "n vocab"]
    """Log-probabilities of the first new token."""


@dataclass(frozen=True)
class TextWriter:
    """Continues a prompt with several amounts of one intervention at once."""

    model: CausalModel
    hook: str
    """The hookpoint's name in the model."""
    change: Intervention
    """Its amounts are those of the continuations after the first, which is left as it is."""
    marks: Marks
    end: int | None
    """The token that ends a text."""

    def write(self, prompt: list[int], many: int, temperature: float, seed: int) -> Continuations:
        """Returns `many` new tokens each; see `steps`."""
        first, chosen = None, []
        for logits, tokens in self.steps(prompt, many, temperature, seed):
            first = logits.log_softmax(-1) if first is None else first
            chosen.append(tokens)
        assert first is not None, "at least one token is asked for"
        return Continuations([self.ended(list(row)) for row in zip(*chosen, strict=True)], first)

    def steps(
        self, prompt: list[int], many: int, temperature: float, seed: int
    ) -> Iterator[tuple[Float[Tensor, "n vocab"], list[int]]]:
        """Yields the logits of the next token, and the token of each continuation, `many` times or until all texts have
        ended. With temperature 0 each is the most probable one; else it is drawn, with the same random numbers for
        all."""
        ids = torch.tensor([prompt] * (1 + len(self.change.amount)), device=self.model.device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for random in np.random.default_rng(seed).random(many).tolist():
            logits = self.last_logits(ids)
            tokens = next_tokens_of(logits, temperature, random)
            yield logits, tokens.tolist()
            ids = torch.cat([ids, tokens[:, None]], 1)
            ended |= tokens == (-1 if self.end is None else self.end)
            if bool(ended.all()):
                return

    def ended(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self.end)] if self.end in tokens else tokens

    def last_logits(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n vocab"]:
        """Logits of the next token."""
        here, found = self.marks(ids), []
        here[0] = False
        amounts = torch.cat([torch.zeros_like(self.change.amount[:1]), self.change.amount])
        step = max(1, LOGITS_AT_ONCE // (ids.shape[1] * self.model.vocab_size))
        for start in range(0, len(ids), step):
            some = slice(start, start + step)
            change = Intervention(self.change.direction, amounts[some], self.change.latent)
            found.append(self.model.logits(ids[some], (self.hook, replaced_at(here[some], change)))[:, -1].float())
        return torch.cat(found)


def next_tokens_of(logits: Float[Tensor, "n vocab"], temperature: float, random: float) -> Int[Tensor, " n"]:
    """Returns the most probable tokens at temperature 0, else the quantiles `random` of their distributions."""
    if not temperature:
        return logits.argmax(-1)
    shares = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return (shares <= random * shares[:, -1:]).sum(-1).clamp_max(logits.shape[1] - 1)
