"""What one call of `sagsae features` is about: the autoencoder, the rows, and the identity of the result."""

import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from shared.config import EvalConfig
from shared.device import pick_device
from shared.errors import UserError
from shared.gate import BadData
from shared.schemas.features import FeaturesConfig
from shared.store.opened import Store
from train.autoencoder import Autoencoder, settings_of
from train.data.norm_filter import left_out
from train.data.order import SplitSettings
from train.data.rows import to_tensor
from train.data.snapshot import content_of
from train.evaluate import diverged_of, load_checked
from train.evaluate_saved import asked_rows, described
from train.exchange.fitting import check_fits
from train.exchange.saved import find_saes
from train.features.code import WINDOW
from train.features.cofire import MOST_PAIRS
from train.features.encode import VALUES, BlockEncoder
from train.features.poles import BINS
from train.features.shard_rows import RowSource
from train.features.tally import TallyShape
from train.report.choice import choose
from train.runs.folder import INSIDE, read_sealed
from train.runs.owner import owner_of
from train.runs.rows import trained_rows
from train.sae.families import family

COFIRE_EVERY: Final = 8
COFIRE_FIRINGS: Final = 4_000_000
"""Maximum number of firings among which co-firing is counted."""
SLOT_BYTES: Final = 4 + 8 + 2 * WINDOW
BASE_BYTES: Final = 560_000_000
"""The program itself with its libraries."""
BLOCK_BYTES: Final = 24 * VALUES
"""What a thread needs for the latents of a block: six temporaries in float32."""
FIRING_BYTES: Final = 150
"""What a thread needs for a firing of the block of latents at hand."""
ROWS_SAMPLED: Final = 512
SECONDS_PER_FIRING: Final = 6e-7


@dataclass(frozen=True)
class FeaturesJob:
    """One autoencoder, the rows that it is run on, and where the result goes."""

    config: FeaturesConfig
    out: Path
    """The folder of the result."""
    store: Store
    hook: str
    sae: Autoencoder
    source: RowSource
    shape: TallyShape
    l0: float
    """Latents per row as evaluated or sampled, for estimates."""
    identity: dict[str, Any]
    """What decides the Parquet files: equal identities have equal files."""

    @property
    def name(self) -> str:
        return self.sae.config.name

    @property
    def work(self) -> Path:
        """Where the pass keeps what it has counted until it is complete."""
        return work_of(self.out)

    def memory(self, threads: int) -> int:
        """Estimates the bytes of memory that one process takes."""
        shape, spec = self.shape, self.store.spec
        pole = 8 + 32 + 4 * BINS + (shape.top + shape.drawn) * SLOT_BYTES
        weights = sum(math.prod(each) for each in family(self.sae.config).shapes(self.sae.d_in).values())
        rows = min(spec.shard_rows, spec.n_tokens)
        itemsize = 4 if spec.quantised else self.source.rows.activations.layout.dtype.itemsize
        firings = int(rows * self.l0)
        blocks = len(BlockEncoder(self.sae).firsts)
        at_once = firings * min(threads, blocks) // blocks
        code = FIRING_BYTES * at_once + 36 * firings
        fixed = BASE_BYTES + pole * shape.poles + 4 * weights + threads * BLOCK_BYTES
        return fixed + rows * self.sae.d_in * itemsize + code

    def seconds(self, device: torch.device, threads: int, processes: int) -> float:
        """Estimates the time of the whole pass from encoding one block of random rows."""
        encoder = BlockEncoder(self.sae)
        rows = max(1, VALUES // 4 // (self.shape.d_sae if encoder.whole else min(encoder.width, self.shape.d_sae)))
        x = torch.randn(rows, self.sae.d_in, device=device) * (self.sae.scale / self.sae.d_in**0.5)
        x += self.sae.weights.b_dec
        took = []
        for _ in range(2):  # the first call allocates
            started = time.process_time()
            _ = list(encoder.blocks(x)) if encoder.whole else encoder.block(0, x)
            took.append(time.process_time() - started)
        blocks = 1 if encoder.whole else len(encoder.firsts)
        per_row = min(took) / rows * blocks + self.l0 * SECONDS_PER_FIRING
        return self.source.count() * per_row / (threads * processes)


def make_job(config: FeaturesConfig) -> FeaturesJob:
    """Opens the autoencoder and its store. Raises UserError where there are none, or they do not fit each other."""
    found = of_folder(config) if config.run is None else of_run(config, config.run)
    store, hook, sae = found.store, found.hook, found.sae
    source = RowSource.of(store, hook, found.settings, left_out(store, hook, found.limit), config.tokens)
    rows = source.count()
    if not rows:
        raise UserError(f"{store.name}: none of its rows that were read counts. Raise --tokens, or harvest more")
    if rows >= 1 << 32:
        raise UserError(f"{store.name}: {rows:,} rows are more than can be counted. Give --tokens below 4,294,967,296")
    l0 = sampled_l0(sae, source) if found.l0 is None else found.l0
    every = config.cofire_every or usual_sampling(rows, l0)
    sides, context = 2 if sae.signed else 1, store.spec.context
    shape = TallyShape(sae.config.d_sae, sides, context, sae.scale, config.top, config.drawn, every)
    identity = {
        "sae": sae.config.name,
        "sha256": settings_of(found.place)[3],
        "hook": hook,
        "snapshot": content_of(store, hook),
        "norm_limit": found.limit,
        "exclude_positions": found.settings.exclude_positions,
        "exclude_special": found.settings.exclude_special,
        "tokens": config.tokens,
        "top": config.top,
        "drawn": config.drawn,
        "cofire_every": every,
    }
    return FeaturesJob(config, found.out, store, hook, sae, source, shape, l0, identity)


@dataclass(frozen=True)
class ChosenSAE:
    """The autoencoder to look at, and the rows to look at it on."""

    place: Path
    sae: Autoencoder
    store: Store
    hook: str
    settings: SplitSettings
    limit: float | None
    """Rows with a larger norm do not count."""
    l0: float | None
    """As evaluated; None without an evaluation."""
    out: Path


def of_run(config: FeaturesConfig, run: Path) -> ChosenSAE:
    """Returns an autoencoder of a run with the rows that the run read. Raises UserError when the run is not finished or
    not evaluated, its store changed, or it is not clear which autoencoder is meant."""
    found = trained_rows(run, config.store)
    store, hook, diverged = found.store, found.hook, diverged_of(found.folder)
    chosen, measured = choose(run, [sae for sae in found.config.saes if sae.name not in diverged], config.sae)
    place, d_in = found.folder.sae(chosen.name), store.spec.hookpoints[hook].d_in
    sae = load_checked(place, chosen, pick_device(config.device), d_in, f"{store.name}/{hook}")
    out = run / "features" / chosen.name
    return ChosenSAE(place, sae, store, hook, found.config, found.limit, measured.l0 or 0.0, out)


def of_folder(config: FeaturesConfig) -> ChosenSAE:
    """Returns an autoencoder that stands alone with the rows that `sagsae eval --sae` would find. Raises UserError when
    it does not fit them, and for an `out` that holds something else."""
    assert config.sae is not None, "FeaturesConfig checks it"
    assert config.out is not None, "FeaturesConfig checks it"
    place = Path(os.path.expanduser(config.sae))
    saes = find_saes(place)
    if len(saes) > 1:
        raise UserError(f"--sae {place}: holds {len(saes)} autoencoders. Name one of them, such as {saes[0].folder}")
    rows = asked_rows(EvalConfig(sae=place, store=config.store, hook=config.hook))
    (about,) = map(described, saes)
    sae = about.saved.load(pick_device(config.device))
    check_fits(about.origin, sae.d_in, rows.store, rows.hook, f"{about.saved.folder}", config.transfer)
    check_out(config.out)
    return ChosenSAE(about.saved.folder, sae, rows.store, rows.hook, rows.settings, rows.limit, None, config.out)


def check_out(out: Path) -> None:
    """Raises UserError when the folder, or the one beside it in which the pass works, is in a run, a store or an
    autoencoder, or holds what no pass wrote."""
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: names no new folder. Give the folder that shall hold the result")
    owner = owner_of(out / "any")
    if owner:
        raise UserError(f"--out {out}: is in {owner}. Choose another --out")
    for top in (out, work_of(out)):
        if top.is_symlink() or (top.exists() and not top.is_dir()):
            raise UserError(f"--out {out}: {top} is a file or a link. Choose another --out")
        for folder, folders, files in os.walk(top):
            inside = Path(top.name, os.path.relpath(folder, top))
            other = [name for name in (*folders, *files) if not re.fullmatch(INSIDE["features"], f"{inside / name}")]
            if other:
                raise UserError(
                    f"--out {out}: {Path(folder, other[0])} is not of sagsae features. Choose another --out"
                )
    if out.is_dir() and any(out.iterdir()) and not is_ours(out):  # a page of anybody has an index.html
        raise UserError(f"--out {out}: holds files, and no about.json of sagsae features. Choose another --out")


def is_ours(out: Path) -> bool:
    """Whether a pass wrote this folder."""
    try:
        return "identity" in read_sealed(out / "about.json")
    except (FileNotFoundError, BadData):
        return False


def work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.work")


def sampled_l0(sae: Autoencoder, source: RowSource) -> float:
    """Returns latents per row over the first rows of the store, for an autoencoder without an evaluation."""
    dtype = source.rows.store.spec.dtype
    chunks = source.rows.activations.layout.chunk_rows
    for shard in source.shards:
        start, stop = source.rows.store.spec.shard_range(shard)
        for chunk in range(-(-(stop - start) // chunks)):
            x = to_tensor(source.kept.values(shard, chunk)[:ROWS_SAMPLED], dtype)
            if len(x):
                f = sae.encode(x.to(sae.weights.W_enc.device).float())
                return float((f != 0).sum()) / len(x)
    return 0.0


def usual_sampling(rows: int, l0: float) -> int:
    """Returns n, where co-firing is counted on every n-th token by default."""
    return max(COFIRE_EVERY, math.ceil(rows * l0**2 / MOST_PAIRS), math.ceil(rows * l0 / COFIRE_FIRINGS))
