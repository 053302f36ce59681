"""Trained autoencoders on disk, with what their folders say about them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Int64
from torch import Tensor

from shared.errors import DamagedError, UserError
from shared.gate import BadData, integer, text
from train.autoencoder import SETTINGS, Autoencoder, settings_of
from train.exchange.tensors import TensorFile, read_safetensors
from train.runs.folder import RunFolder, read_sealed

SAES: Final = "saes"


@dataclass(frozen=True)
class FiringCounts:
    """On how many held-out tokens each latent of an autoencoder was above and below zero."""

    positive: Int64[Tensor, " d_sae"]
    negative: Int64[Tensor, " d_sae"]
    tokens: int
    """All held-out tokens."""


@dataclass(frozen=True)
class SavedSAE:
    """One autoencoder's folder."""

    folder: Path
    run: Path | None
    """The run that it belongs to; None for a folder that stands alone."""

    @property
    def name(self) -> str:
        return self.folder.name

    def load(self, device: str = "cpu") -> Autoencoder:
        """Raises UserError or DamagedError as `Autoencoder.load` does."""
        return Autoencoder.load(self.folder, device)

    def about(self) -> dict[str, Any]:
        """What cfg.json says: the settings, `model`, `hook_name`, `context` and the rest. Check each value before use:
        the folder may come from anybody."""
        try:
            return read_sealed(self.folder / SETTINGS)
        except (BadData, FileNotFoundError) as error:
            raise UserError(f"{self.folder}: does not hold a trained autoencoder ({SETTINGS}: {error})") from error

    def measured(self) -> dict[str, Any]:
        """Its entry in its run's evaluation.json; empty where nothing was measured. Raises DamagedError when the file
        was altered."""
        entries = self.evaluation().get("saes")
        entries = entries if isinstance(entries, list) else []
        return next((each for each in entries if isinstance(each, dict) and each.get("name") == self.name), {})

    def evaluation(self) -> dict[str, Any]:
        """Its run's evaluation.json; empty where there is none. Raises DamagedError when the file was altered."""
        if self.run is None:
            return {}
        try:
            return read_sealed(RunFolder(self.run).evaluation)
        except FileNotFoundError:
            return {}
        except BadData as error:
            raise DamagedError(f"{RunFolder(self.run).evaluation}: {error}. Write it again: sagsae eval") from error

    def firings(self) -> FiringCounts | None:
        """How often its latents fired, as its run's evaluation counted; None where nothing was counted. Raises
        DamagedError when the counts are not those of the evaluation or of this autoencoder."""
        found, entry = self.evaluation(), self.measured()
        if self.run is None or not entry or found.get("firings") is None:
            return None
        path = RunFolder(self.run).firings
        if not path.exists():
            return None
        file = read_safetensors(path)
        try:
            if file.sha256 != text(found["firings"], "firings", 64):
                raise BadData("is not the file that evaluation.json describes (its SHA-256 differs)")
            d_sae = settings_of(self.folder)[0].d_sae
            return firings_in(file, self.name, d_sae, integer(entry.get("tokens"), "tokens", 1))
        except BadData as error:
            raise DamagedError(f"{path}: {error}. Write it again: sagsae eval {self.run}") from error


def firings_in(file: TensorFile, name: str, d_sae: int, tokens: int) -> FiringCounts:
    """Returns the counts of one autoencoder. Raises BadData where they cannot be its own."""
    positive, negative = (file.tensors.get(f"{name}/{sign}") for sign in ("positive", "negative"))
    if positive is None or negative is None:
        raise BadData(f"does not count {name}")
    for counts in (positive, negative):
        if counts.dtype != torch.int64 or counts.shape != (d_sae,):
            raise BadData(f"has no {d_sae:,} whole numbers for {name}")
    if bool(((positive < 0) | (negative < 0) | (positive > tokens - negative)).any()):  # a sum could overflow
        raise BadData(f"counts fewer than 0 or more than all {tokens:,} held-out tokens for a latent of {name}")
    return FiringCounts(positive, negative, tokens)


def find_saes(place: Path) -> list[SavedSAE]:
    """Returns the autoencoders that `RUN`, `RUN/NAME`, `RUN/saes/NAME` or a folder with one autoencoder names, by name.
    Raises UserError when there is none."""
    if (place / SETTINGS).is_file():
        return [SavedSAE(place, run_of(place))]
    if RunFolder(place).holds(SAES):
        found = [path for path in sorted((place / SAES).iterdir()) if (path / SETTINGS).is_file()]
        if found:
            return [SavedSAE(path, place) for path in found]
        raise UserError(f"{place}: its training has saved no autoencoder yet. Run the same sagsae train command again")
    inside = place.parent / SAES
    if (inside / place.name / SETTINGS).is_file():
        return [SavedSAE(inside / place.name, place.parent)]
    if inside.is_dir():
        names = ", ".join(sorted(path.name for path in inside.iterdir())[:8])
        raise UserError(f"{place.parent}: has no autoencoder {place.name}. It has {names}")
    raise UserError(f"{place}: is neither a run nor the folder of an autoencoder. Give RUN or RUN/NAME")


def run_of(folder: Path) -> Path | None:
    """The run whose saes/ holds this folder."""
    run = folder.absolute().parent.parent
    is_run = folder.absolute().parent.name == SAES and (run / "config.json").is_file()
    return folder.parent.parent if is_run else None
