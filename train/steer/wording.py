"""What `sagsae steer` and `sagsae dial` print."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from shared.command.tables import print_lines, print_table
from shared.model.source import ModelSource
from shared.model.tokenizer import Encoder, open_encoder
from shared.schemas.steer import DialFile, SteerConfig
from shared.store.opened import Store
from train.steer.verdict import rows_of

SEEN: Final = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200b": "∅"}
"""Characters that cannot be seen, and what stands for them."""


def visible(text: str) -> str:
    """A token's text with every character visible."""
    return "".join(SEEN.get(each, each if each.isprintable() else f"⟨{ord(each):x}⟩") for each in text)


def on_one_line(text: str) -> str:
    """A text whose spaces stay as they are."""
    return "".join(each if each == " " else visible(each) for each in text)


def encoder_of(source: ModelSource, store: Store) -> Encoder:
    """The model's tokenizer, used as the harvest used it."""
    return open_encoder(source, split_special=bool(store.spec.tokenizer.get("split_special_tokens")))


def text_of(encoder: Encoder, tokens: Sequence[int]) -> str:
    """The text of some tokens; their ids where the model has no tokenizer."""
    if encoder.tokenizer is None:
        return " ".join(map(str, tokens))
    found: str = encoder.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    return found


@dataclass(frozen=True)
class MovedToken:
    """A token, and by how much its probability changed."""

    token: int
    text: str
    change: float


@dataclass(frozen=True)
class SteeredRow:
    """What one dial value did."""

    dial: float | None
    """None: unsteered."""
    value: float | None
    """The value that the latent took, or that was added."""
    kl: float
    """KL(unsteered ‖ steered) in nats: of the next token after a prompt, or per prediction."""
    ce: float | None = None
    """Change of the next-token loss, on held-out contexts."""
    text: str | None = None
    """The continuation of a prompt."""
    tokens: tuple[int, ...] = ()
    rise: list[MovedToken] = field(default_factory=list)
    fall: list[MovedToken] = field(default_factory=list)


@dataclass(frozen=True)
class SteerResult:
    """What `sagsae steer` found."""

    config: SteerConfig
    many: int
    """Tokens of the prompt, or predictions that counted."""
    rows: list[SteeredRow]
    next_tokens: dict[int, list[float]] = field(default_factory=dict)
    """Probabilities after a prompt: token id -> unsteered, then with each value."""
    unit: float = 0.0
    unit_rms: float = 0.0
    encoder: Encoder | None = None

    def document(self) -> dict[str, Any]:
        """Returns the object that `--json` prints."""
        config = self.config
        what = "prompt_tokens" if config.prompt is not None else "predictions"
        return {
            "latent": config.latent,
            "mode": config.mode,
            "at": config.at,
            "unit": self.unit,
            "unit_rms": self.unit_rms,
            what: self.many,
            "rows": [asdict(row) for row in self.rows],
            "next_tokens": {str(token): shares for token, shares in self.next_tokens.items()},
        }

    def title(self) -> str:
        config = self.config
        where = {"all": "at all positions", "last": "at the prompt's last token"}
        return (
            f"latent {config.latent}, {config.mode} {where.get(config.at, f'at position {config.at}')}; dial 1 is "
            f"{self.unit:.4g}, {self.unit_rms:.2f} of rms(x - mean)"
        )

    def print(self) -> None:
        """Prints tables for people."""
        if self.config.prompt is None:
            print_table(f"{self.title()}; {self.many:,} predictions", [context_row(row) for row in self.rows])
            return
        lines = (f"{head(row):>9}  {on_one_line(row.text or '')}" for row in self.rows)
        print_lines([self.title(), *lines, ""])
        print_table("the next token", self.token_rows())

    def token_rows(self) -> list[dict[str, Any]]:
        """The table of next tokens, and the KL below it."""
        heads = [head(row) for row in self.rows]
        found = [
            {"token": self.shown(token), **{name: f"{share:.2%}" for name, share in zip(heads, shares, strict=True)}}
            for token, shares in self.next_tokens.items()
        ]
        kl = {name: f"{row.kl:.4f}" for name, row in zip(heads, self.rows, strict=True)}
        return [*found, {"token": "KL, nats", **kl}]

    def shown(self, token: int) -> str:
        return visible(text_of(self.encoder, [token])) if self.encoder is not None else str(token)


def head(row: SteeredRow) -> str:
    return "unsteered" if row.dial is None else f"{row.dial:+g}" if row.dial else "0"


def context_row(row: SteeredRow) -> dict[str, Any]:
    return {
        "dial": head(row),
        "value": f"{row.value:.3g}",
        "KL": f"{row.kl:.4f}",
        "ΔCE": f"{row.ce:+.4f}",
        "rise most": " ".join(visible(each.text) for each in row.rise),
        "fall most": " ".join(visible(each.text) for each in row.fall),
    }


def print_dial(file: Path, found: DialFile, encoder: Encoder | None) -> None:
    """Prints the table of a dial test, and its verdict."""

    def text(token: int) -> str:
        return visible(text_of(encoder, [token])) if encoder is not None else str(token)

    where = f"{len(found.contexts):,} held-out contexts, {found.predictions:,} predictions"
    print_table(f"{file}: {where}, {len(found.controls)} control directions", rows_of(found.latents, text))
    print_lines(["", *textwrap.wrap(found.verdict, 100)])
