"""What the page asks of the language model: a text that is continued with a latent held, and the latents of a text."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.model.source import model_info, read_config
from shared.model.tokenizer import Encoder
from shared.schemas.steer import SteerConfig
from shared.schemas.view import EncodeQuestion, SteerQuestion, ViewConfig
from train.features.encode import VALUES, gathered, nonzero
from train.features.site.build import VocabularyTable, read_tokens, word
from train.steer.generate import Continuations, TextWriter
from train.steer.intervene import Intervention
from train.steer.steer import next_token_table, prompt_ids, prompt_marks, prompt_rows, trained_positions
from train.steer.subject import SteeringSubject, make_subject
from train.steer.wording import encoder_of

MOST_TOKENS: Final = 512
"""Tokens of a prompt, or of a text to encode."""

Answer = dict[str, Any]


@dataclass
class SentWords:
    """The text of tokens as the page's data hold it, each sent once in an answer."""

    table: VocabularyTable
    sent: set[int]

    def of(self, tokens: Sequence[int]) -> list[list[Any]]:
        """Returns [id, text, whether it is special] of the tokens that were not sent before."""
        new = sorted(set(tokens) - self.sent)
        self.sent.update(new)
        known = len(self.table.text)
        return [
            [token, word(self.table.text[token]), bool(self.table.special[token])]
            if token < known
            else [token, None, False]
            for token in new
        ]


@dataclass(frozen=True)
class LiveModel:
    """A language model in memory, and an autoencoder of it. One thread at a time."""

    subject: SteeringSubject
    model: LanguageModel
    encoder: Encoder
    vocabulary: VocabularyTable
    longest: int
    """Tokens that the model was made for."""

    @classmethod
    def load(cls, config: ViewConfig, folder: Path) -> "LiveModel":
        """Loads what a run's record names. `folder`: RUN/features/NAME. Raises UserError when a part is missing or is
        another one, DamagedError when one was altered."""
        subject = make_subject(config)
        encoder = encoder_of(subject.source, subject.store)
        if encoder.tokenizer is None:
            raise UserError(f"--model {subject.source.name}: comes with no tokenizer, so it cannot read a text")
        longest = model_info(read_config(subject.source)).max_context
        return cls(subject, subject.language_model(), encoder, read_tokens(folder), longest)

    def steer(self, asked: SteerQuestion) -> Generator[Answer, None, None]:
        """Yields what the page shows of one question, line by line; see docs/reference/features.md. Raises UserError
        before the first line when the question cannot be answered."""
        started, subject = time.monotonic(), self.subject
        subject.check_latent(asked.latent)
        config = config_of(asked)
        prompt = self.ids(asked.prompt, asked.new_tokens)
        unit = float(subject.counts.units[asked.latent])
        value = unit * config.values[0]
        change = Intervention.on_latent(subject.sae, asked.latent, torch.tensor([value]), asked.mode == "add")
        marks = prompt_marks(config, subject, prompt)
        changed = int(marks(torch.tensor([prompt])).sum())
        words = SentWords(self.vocabulary, set())
        rms = unit * float(change.direction.norm()) / subject.sae.scale
        yield {"unit": unit, "unit_rms": rms, "value": value, "prompt_tokens": len(prompt), "changed": changed}
        writer = TextWriter(self.model, subject.hook_name, change, marks, self.encoder.eos_id)
        ended, written = [False, False], 0
        for logits, tokens in writer.steps(prompt, asked.new_tokens, asked.temperature, asked.seed):
            if not written:
                found = Continuations([[token] for token in tokens], logits.log_softmax(-1))
                yield self.next_token(config, found, words)
            ended = [past or token == self.encoder.eos_id for past, token in zip(ended, tokens, strict=True)]
            new = [None if past else token for past, token in zip(ended, tokens, strict=True)]
            written += 1
            yield {"new": new, "words": words.of([token for token in new if token is not None])}
        yield {"steps": written, "ended": ended, "seconds": time.monotonic() - started}

    def next_token(self, config: SteerConfig, found: Continuations, words: SentWords) -> Answer:
        """The table of the next token: [id, unsteered probability, steered probability], and the KL between them."""
        table = next_token_table(found)
        _, steered = prompt_rows(config, [0.0], found, self.encoder)
        rows = [[token, *shares] for token, shares in table.items()]
        return {"next": rows, "kl": steered.kl, "words": words.of(list(table))}

    def encode(self, asked: EncodeQuestion) -> Answer:
        """Returns the tokens of a text and the latents that fire on each: [position, latent, value], the largest
        magnitudes of each token first. A position that the run does not train on has none. Raises UserError for a text
        that is too long."""
        ids = self.ids(asked.text)
        tokens = torch.tensor([ids])
        counted = trained_positions(self.subject, tokens)[0].numpy()
        row, latent, value = gathered(lambda x: nonzero(self.codes(x)), self.activations(tokens), self.rows_at_once)
        kept = counted[row]
        row, latent, value = row[kept], latent[kept], value[kept]
        order = np.lexsort((-np.abs(value), row))
        row, latent, value = row[order], latent[order], value[order]
        active = np.bincount(row, minlength=len(ids))
        rank = np.arange(len(row)) - np.repeat(np.cumsum(active) - active, active)
        first = rank < asked.top
        return {
            "tokens": ids,
            "counted": counted.tolist(),
            "active": active.tolist(),
            "firings": [
                list(each) for each in zip(*(part[first].tolist() for part in (row, latent, value)), strict=True)
            ],
            "words": SentWords(self.vocabulary, set()).of(ids),
        }

    @property
    def rows_at_once(self) -> int:
        return max(1, VALUES // self.subject.sae.config.d_sae)

    def codes(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_sae"]:
        with torch.inference_mode():
            return self.subject.sae.encode(x)

    def activations(self, tokens: Tensor) -> Float[Tensor, "rows d_in"]:
        """What the autoencoder reads of a text."""
        found: list[Tensor] = []
        widths = {self.subject.hook_name: self.subject.sae.weights.W_dec.shape[1]}
        with self.model.capturing({self.subject.hook_name: lambda x: found.append(x.float())}, widths) as run:
            run(tokens)
        return found[0]

    def ids(self, text: str, new: int = 0) -> list[int]:
        """The token ids of a text. Raises UserError when they and `new` more are too many."""
        ids, most = prompt_ids(self.subject, self.encoder, text), min(MOST_TOKENS, self.longest - new)
        if len(ids) > most:
            room = f", because {new} are to be written" if most < MOST_TOKENS and new else ""
            raise UserError(f"the text has {len(ids):,} tokens; it may have {max(0, most):,} here{room}. Shorten it")
        return ids


def config_of(asked: SteerQuestion) -> SteerConfig:
    """The same question as `sagsae steer` takes it."""
    dial = {} if asked.mode == "ablate" else {"dial": f"{asked.dial:.17g}"}
    return SteerConfig(run=Path(), latent=asked.latent, mode=asked.mode, at=asked.at, prompt=asked.prompt, **dial)
