"""What one call of `sagsae features` is about: the autoencoder, the rows, and the identity of the result."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from shared.device import pick_device
from shared.errors import UserError
from shared.schemas.features import FeaturesConfig
from shared.store.opened import Store
from train.autoencoder import Autoencoder, settings_of
from train.data.norm_filter import left_out
from train.data.snapshot import content_of
from train.evaluate import diverged_of, load_checked
from train.features.code import WINDOW
from train.features.cofire import MOST_PAIRS
from train.features.encode import VALUES, BlockEncoder
from train.features.poles import BINS
from train.features.shard_rows import RowSource
from train.features.tally import TallyShape
from train.report.choice import choose
from train.runs.folder import RunFolder
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
SECONDS_PER_FIRING: Final = 6e-7


@dataclass(frozen=True)
class FeaturesJob:
    """One autoencoder, the rows that it is run on, and where the result goes."""

    config: FeaturesConfig
    folder: RunFolder
    store: Store
    hook: str
    sae: Autoencoder
    source: RowSource
    shape: TallyShape
    l0: float
    """Latents per row as evaluated, for estimates."""
    identity: dict[str, Any]
    """What decides the Parquet files: equal identities have equal files."""

    @property
    def name(self) -> str:
        return self.sae.config.name

    @property
    def out(self) -> Path:
        return self.folder.path / "features" / self.name

    @property
    def work(self) -> Path:
        """Where the pass keeps what it has counted until it is complete."""
        return self.folder.path / "features" / f"{self.name}.work"

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
    """Opens the run, its store and the autoencoder. Raises UserError when the run is not finished or not evaluated, its
    store changed, or it is not clear which autoencoder is meant."""
    run = trained_rows(config.run, config.store)
    folder, trained, store, hook = run.folder, run.config, run.store, run.hook
    diverged = diverged_of(folder)
    sae_config, measured = choose(config.run, [sae for sae in trained.saes if sae.name not in diverged], config.sae)
    device = pick_device(config.device)
    place = folder.sae(sae_config.name)
    sae = load_checked(place, sae_config, device, store.spec.hookpoints[hook].d_in, f"{store.name}/{hook}")
    source = RowSource.of(store, hook, trained, left_out(store, hook, run.limit), config.tokens)
    rows, l0 = source.count(), measured.l0 or 0.0
    if not rows:
        raise UserError(f"{store.name}: none of its rows that were read counts. Raise --tokens, or harvest more")
    if rows >= 1 << 32:
        raise UserError(f"{store.name}: {rows:,} rows are more than can be counted. Give --tokens below 4,294,967,296")
    every = config.cofire_every or usual_sampling(rows, l0)
    spec, signed = store.spec, sae.signed
    shape = TallyShape(sae_config.d_sae, 2 if signed else 1, spec.context, sae.scale, config.top, config.drawn, every)
    identity = {
        "sae": sae_config.name,
        "sha256": settings_of(place)[3],
        "hook": hook,
        "snapshot": content_of(store, hook),
        "norm_limit": run.limit,
        "exclude_positions": trained.exclude_positions,
        "exclude_special": trained.exclude_special,
        "tokens": config.tokens,
        "top": config.top,
        "drawn": config.drawn,
        "cofire_every": every,
    }
    return FeaturesJob(config, folder, store, hook, sae, source, shape, l0, identity)


def usual_sampling(rows: int, l0: float) -> int:
    """Returns n, where co-firing is counted on every n-th token by default."""
    return max(COFIRE_EVERY, math.ceil(rows * l0**2 / MOST_PAIRS), math.ceil(rows * l0 / COFIRE_FIRINGS))
