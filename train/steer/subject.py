"""Opens what steering needs: an autoencoder of a finished run, its counts by `sagsae features`, the language model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.device import pick_device
from shared.errors import DamagedError, UserError
from shared.gate import BadData
from shared.model.language_model import LanguageModel
from shared.model.source import ModelSource
from shared.schemas.steer import DialConfig, SteerConfig
from shared.schemas.view import ViewConfig
from shared.store.opened import Store
from train.autoencoder import Autoencoder, settings_of
from train.data.norm_filter import FilteredRows, left_out, without
from train.data.order import Split, split_rows
from train.data.row_mask import RowMask
from train.data.snapshot import content_of
from train.evaluate import diverged_of, load_checked
from train.measure.census import BIPOLAR_MINORITY
from train.measure.heldout import find_model
from train.report.choice import choose
from train.runs.folder import read_sealed
from train.runs.rows import TrainedRows, trained_rows
from train.steer.probe import SteeredContexts

COLUMNS: Final = ("latent", "sign", "firings", "energy", "q95")


@dataclass(frozen=True)
class LatentCounts:
    """Counts of every latent: [d_sae, 2], above and below zero. The second column is zero where latents have no
    sign."""

    firings: NDArray[np.int64]
    energy: NDArray[np.float64]
    q95: NDArray[np.float64]
    """95 % quantile of |f| over the firings."""

    @property
    def two_sided(self) -> NDArray[np.bool_]:
        """[d_sae] whether the rarer pole has more than a tenth of the firings, as in the census."""
        rarer: NDArray[np.bool_] = self.firings.min(1) > BIPOLAR_MINORITY * self.firings.sum(1)
        return rarer

    @property
    def units(self) -> NDArray[np.float64]:
        """[d_sae] the dial unit: the quantile of the weaker pole where a latent uses both, else of the one that it
        uses; 0 for a latent that never fires."""
        used = self.q95[np.arange(len(self.q95)), self.firings.argmax(1)]
        return np.asarray(np.where(self.two_sided, self.q95.min(1), used), np.float64)

    @property
    def weaker_energy(self) -> NDArray[np.float64]:
        """[d_sae] the weaker pole's share of the latent's energy Σf²."""
        whole = self.energy.sum(1)
        return np.asarray(self.energy.min(1) / np.where(whole > 0, whole, 1.0), np.float64)

    def poles(self, latent: int) -> tuple[bool, bool]:
        """Whether a latent uses the pole above zero, and the one below."""
        above, below = self.firings[latent].tolist()
        both = bool(self.two_sided[latent])
        return both or above >= below, both or below > above


@dataclass(frozen=True)
class SteeringSubject:
    """An autoencoder that can be steered."""

    rows: TrainedRows
    sae: Autoencoder
    counts: LatentCounts
    folder: Path
    """RUN/features/NAME."""
    sha256: str
    source: ModelSource
    device: str

    @property
    def store(self) -> Store:
        return self.rows.store

    @property
    def hook_name(self) -> str:
        """The hookpoint's name in the model."""
        return self.store.spec.hookpoints[self.rows.hook].name

    @property
    def left(self) -> FilteredRows | None:
        """The rows beyond the run's max_norm."""
        return left_out(self.store, self.rows.hook, self.rows.limit)

    def split(self) -> Split:
        """The rows that the run trained on, and those that it held out. Reads all token ids."""
        return without(split_rows(self.store.token_rows(check=False), self.rows.config), self.left)

    def check_latent(self, latent: int) -> None:
        """Raises UserError for a latent that does not exist or never fires."""
        d_sae, name = self.sae.config.d_sae, self.sae.config.name
        if latent >= d_sae:
            raise UserError(f"--latent {latent}: {name} has {d_sae:,} latents, 0 to {d_sae - 1}")
        if not self.counts.units[latent] > 0:
            raise UserError(f"--latent {latent}: never fires on the rows that `sagsae features` read. Choose another")

    def language_model(self) -> LanguageModel:
        """Loads the model as the store was harvested with."""
        spec = self.store.spec
        return LanguageModel(self.source, self.device, spec.model["dtype"], spec.model["attention"])

    def contexts(self, heldout: RowMask, many: int, seed: int) -> tuple[NDArray[np.int64], SteeredContexts]:
        """Returns the numbers of `many` held-out contexts, drawn at random, and the contexts. Raises UserError when
        there are fewer, or none of their predictions counts."""
        there = heldout.contexts()
        if len(there) < many:
            raise UserError(f"--contexts {many:,}: the run held out {len(there):,} contexts. Give at most so many")
        chosen = np.sort(np.random.default_rng(seed).permutation(there)[:many])
        tokens, spec = self.store.token_rows(check=False).take(chosen), self.store.spec
        found = SteeredContexts.of(tokens, heldout.of_contexts(chosen), spec.special_ids)
        if not len(found.tokens):
            raise UserError("no prediction of these held-out contexts counts. Give more --contexts")
        return chosen, found


def make_subject(config: SteerConfig | DialConfig | ViewConfig) -> SteeringSubject:
    """Finds all parts, and loads the autoencoder. Raises UserError when one is missing or another one than before,
    DamagedError when one was altered."""
    rows = trained_rows(config.run, config.store)
    diverged = diverged_of(rows.folder)
    good = [sae for sae in rows.config.saes if sae.name not in diverged]
    chosen, _ = choose(config.run, good, config.sae)
    device, store = pick_device(config.device), rows.store
    place = rows.folder.sae(chosen.name)
    sae = load_checked(place, chosen, device, store.spec.hookpoints[rows.hook].d_in, f"{store.name}/{rows.hook}")
    folder, sha256 = rows.folder.path / "features" / chosen.name, settings_of(place)[3]
    counts = read_counts(folder, sae, {"sha256": sha256, "snapshot": content_of(store, rows.hook)}, config.run)
    return SteeringSubject(rows, sae, counts, folder, sha256, find_model(store, config.model, ""), device)


def read_counts(folder: Path, sae: Autoencoder, identity: dict[str, Any], run: Path) -> LatentCounts:
    """Returns what `sagsae features` counted. Raises UserError when it did not, or counted something else."""
    again = f"sagsae features {run} --sae {sae.config.name}"
    try:
        about = read_sealed(folder / "about.json")
        there = about.get("identity")
        if not isinstance(there, dict):
            raise BadData("does not say what it was made from")
    except FileNotFoundError:
        raise UserError(f"{folder}: is not there, and holds what a dial unit is. Run: {again}") from None
    except BadData as error:
        raise DamagedError(f"{folder / 'about.json'}: {error}. Make it again: {again} --overwrite") from error
    differ = [key for key, value in identity.items() if there.get(key) != value]
    if differ:
        what = {"sha256": "another autoencoder of this name", "snapshot": "other rows of the store"}[differ[0]]
        raise UserError(f"{folder}: was made from {what}. Make it again: {again} --overwrite")
    return read_poles(folder / "latents.parquet", sae.config.d_sae, 2 if sae.signed else 1, f"{again} --overwrite")


def read_poles(path: Path, d_sae: int, sides: int, again: str) -> LatentCounts:
    """Returns the columns of latents.parquet that are needed. Raises DamagedError when it is not as it was written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != d_sae * sides:
                raise ValueError(f"has {file.metadata.num_rows:,} poles instead of {d_sae * sides:,}")
            table = file.read(columns=list(COLUMNS))
        columns = {name: table.column(name).to_numpy().reshape(d_sae, sides) for name in COLUMNS}
        if not (columns["latent"] == np.arange(d_sae)[:, None]).all() or not (columns["sign"] == [1, -1][:sides]).all():
            raise ValueError("is not sorted by latent and sign")
        numbers = [np.asarray(columns[name], kind) for name, kind in (("energy", "f8"), ("q95", "f8"))]
        if not all(np.isfinite(each).all() and (each >= 0).all() for each in numbers):
            raise ValueError("holds a negative number, or one that is not finite")
        padded = [np.pad(each, ((0, 0), (0, 2 - sides))) for each in (columns["firings"].astype(np.int64), *numbers)]
        return LatentCounts(*padded)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DamagedError(f"{path}: {str(error).splitlines()[0][:200]}. Make it again: {again}") from error
