"""What a training run will do, worked out before anything is written."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shared.config import TrainConfig
from shared.errors import DamagedError, UserError
from shared.files.base import is_remote
from shared.progress import say
from shared.saes import SAEConfig, Thresholded, TopK
from shared.store.listing import folder_name
from shared.store.opened import Statistics, Store, find_hookpoint
from train.autoencoder import matmul_dtype
from train.data.follow import Segments
from train.data.loader import FixedSnapshot, PassSource, StorePass
from train.data.norm_filter import FilteredRows, left_out, norm_limit, recorded_limit, statistics, without
from train.data.order import ReadOrder, Split, make_order, rows_in_shards, rows_together, split_rows
from train.data.row_mask import RowMask
from train.data.rows import HookRows, KeptRows
from train.data.snapshot import SnapshotWatch, as_ranges, as_recorded, content_of, content_of_spec, follows, is_earlier
from train.fit.optim import usual_warmup
from train.plan.idle import idle
from train.runs.folder import FREE, RunFolder

ROWS_PER_RUN_CHUNK: Final = 262_144
"""So many rows of a window allow one chunk more in a run: then the variance of a batch's mean stays near 1.15 times
that of independent rows (tests/train/test_shuffle.py)."""

SCALARS: Final = {"theta0", "bandwidth", "sparsity", "lr"}
"""Settings of an autoencoder that become numbers of float32."""
LARGEST: Final = {"batch": 1 << 24, "streams": 1 << 16}
LARGEST_SCALAR: Final = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class TrainJob:
    """A configuration with every question answered, before anything is written."""

    config: TrainConfig
    store: Store
    hook: str
    parts: Split
    passes: PassSource
    streams: int
    steps: int
    epoch_rows: int
    heldout_rows: int
    matmul: torch.dtype
    folder: RunFolder
    identity: dict[str, Any]
    on_cpu: bool
    waves: tuple[tuple[SAEConfig, ...], ...]
    """Which autoencoders are trained together, one wave after another (train/plan/waves.py)."""
    asked: TrainConfig
    """What was asked for. In `config`, what was left to be decided is as the run that is here began with."""
    watch: SnapshotWatch
    wave: int = 1
    """Whose turn it is."""
    left_out: FilteredRows | None = None
    """What `max_norm` leaves out. `parts.train` is without it, `parts.heldout` is not: both are measured."""
    rows_left_out: int = 0
    """Of those that would count."""

    @property
    def saes(self) -> tuple[SAEConfig, ...]:
        """Of this wave."""
        return self.waves[self.wave - 1]

    @property
    def title(self) -> str:
        """What this part of the run is called."""
        return f"{self.folder.path}" + (f", wave {self.wave} of {len(self.waves)}" if len(self.waves) > 1 else "")

    def in_waves(self, waves: tuple[tuple[SAEConfig, ...], ...]) -> "TrainJob":
        return replace(self, waves=waves)

    def turn(self, wave: int) -> "TrainJob":
        return replace(self, wave=wave)

    @cached_property
    def statistics(self) -> Statistics:
        """What the activations are normalised with: of the store, or of the first segment of one that grows. Waits for
        that segment, and writes it into the run's folder."""
        found = statistics(self.passes.get(0).rows.store, self.hook, self.left_out)
        if not found.scale > 0:
            raise UserError(
                f"{self.store.name}/{self.hook}: all activations are equal, as far as {self.store.spec.dtype} tells "
                "them apart; there is nothing to learn. Where they differ a little about a large mean, harvest with "
                "--set store_dtype=float32"
            )
        return found

    def check_unchanged(self, thorough: bool = False) -> None:
        """Raises DamagedError when the store was replaced while rows of it were read (train/data/snapshot.py)."""
        passes = self.passes.frozen if isinstance(self.passes, Segments) else [self.passes.get(0)]
        self.watch.check([part.rows.store for part in passes], thorough)

    @property
    def longest_window(self) -> int:
        """Rows."""
        unit_rows: int = self.identity["run_chunks"] * self.store.spec.layouts()[self.hook].chunk_rows
        if isinstance(self.passes, FixedSnapshot):
            return self.passes.whole.order.longest * unit_rows
        return max(1, self.config.window_rows // (self.streams * unit_rows)) * unit_rows

    @property
    def most_windows(self) -> int:
        """In an epoch of a stream."""
        if isinstance(self.passes, FixedSnapshot):
            return self.passes.whole.order.windows_full + 1
        return self.store.spec.n_tokens

    def heldout_store(self, stop_asked: Callable[[], bool]) -> Store:
        """The store with every held-out row that it will have."""
        if not isinstance(self.passes, Segments):
            return self.store
        spec = self.store.spec
        shards = RowMask.of(self.parts.heldout).shards(spec.shard_rows, spec.n_tokens)
        return self.passes.complete(set(shards), stop_asked)


def make_job(
    config: TrainConfig,
    device: torch.device,
    leads: bool = True,
    gather: Callable[[list[int]], list[list[int]]] = lambda mine: [mine],
) -> TrainJob:
    """Raises UserError for a store that does not fit the configuration. `leads`: whether this process decides what is
    read next from a store that grows. `gather` gives every rank's value on every rank."""
    store, hook = find_hookpoint(config.store, config.hook)
    folder = RunFolder(config.out or default_folder(store, hook, config))
    here = None if config.overwrite else folder.identity()  # before any rank can have begun the run
    asked, config = config, config if here is None else taken_over(config, folder, device)
    matmul = matmul_dtype(config.precision, device)
    run_chunks = config.run_chunks or (
        max(1, config.window_rows // ROWS_PER_RUN_CHUNK) if is_remote(config.store) else 1
    )
    identity = {
        **config.model_dump(mode="json"),
        "store": store.location,
        "hook": hook,
        "precision": "tf32" if config.precision == "tf32" else str(matmul).removeprefix("torch."),
        "run_chunks": run_chunks,
    }
    check_store(store, config, here is None)
    check_settings(config, store)
    if here is None:
        check_saes(config.saes)
    if here is not None and folder.differs(
        {**identity, "warmup_steps": kept_or(config.warmup_steps, here.get("warmup_steps"))}
    ):
        here = None  # another run: `train` says so
    if here is not None:
        store = of_the_run(store, hook, here, folder, config.follow)
    if not config.follow:
        store = store.only(seen_by_all(gather(list(store.commits))))
    limit = norm_limit(store, hook, config) if here is None else recorded_limit(here, f"{folder.path}")
    massive = left_out(store, hook, limit)
    every = split_rows(store.token_rows(check=False), config)
    parts = without(every, massive)
    heldout_rows, epoch_rows, steps = amounts(store, parts, config)
    check_compiler(config, device)
    config = config.model_copy(update={"warmup_steps": warmup(config, steps, here)})
    rows = {"snapshot": follows(store, hook)} if config.follow else snapshot_of(store, hook)
    if here is not None:
        rows = {key: here[key] for key in ("snapshot", "shards") if key in here}
    identity |= {**rows, "norm_limit": limit, "warmup_steps": here.get("warmup_steps") if here else config.warmup_steps}
    passes, streams = make_passes(config, store, hook, parts, run_chunks, folder.path, leads)
    if leads:
        say_what_is_less(asked, store, hook, streams, run_chunks)
        for sentence in idle(asked, steps):
            say(sentence)
    job = TrainJob(
        config, store, hook, Split(parts.train, every.heldout), passes, streams, steps, epoch_rows, heldout_rows,
        matmul, folder, identity, device.type == "cpu", (config.saes,), asked, SnapshotWatch(store, hook),
        left_out=massive, rows_left_out=marked(every) - marked(parts),
    )  # fmt: skip
    if not config.follow:
        _ = job.statistics  # raises where there is nothing to learn
    return job


def amounts(store: Store, parts: Split, config: TrainConfig) -> tuple[int, int, int]:
    """Held-out rows, training rows of an epoch, and steps of the run. Raises UserError where there are too few."""
    there = np.arange(store.spec.n_shards) if config.follow else store.commits.shards
    heldout_rows, epoch_rows = (rows_in_shards(marks, store.spec, there) for marks in (parts.heldout, parts.train))
    if not heldout_rows:
        raise UserError(f"{store.name}: no held-out context is committed yet. Let sagsae harvest go on, then train")
    steps = (config.tokens or epoch_rows) // config.batch
    if steps < 1:
        raise UserError(
            f"{config.tokens or epoch_rows:,} training tokens are less than one batch of {config.batch:,}. "
            "Harvest or ask for more tokens, or lower --batch"
        )
    return heldout_rows, epoch_rows, steps


def check_compiler(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError where steps are to be compiled and nothing can do it."""
    needed = config.compile and device.type == "cpu"
    if needed and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("compile = true: there is no C++ compiler here. Install g++, or leave compile off")


def snapshot_of(store: Store, hook: str) -> dict[str, str]:
    """What a run records of the rows that it reads."""
    return {"snapshot": content_of(store, hook), "shards": as_ranges(store.commits)}


def of_the_run(store: Store, hook: str, here: dict[str, Any], folder: RunFolder, follow: bool) -> Store:
    """The shards that the run which is here reads. Says it where the store has more by now."""
    found = as_recorded(store, hook, here, f"{folder.path}")
    if not follow and len(found.commits) < len(store.commits):
        say(
            f"{folder.path}: reads the {len(found.commits):,} shards that {store.name} had when it began; there are "
            f"{len(store.commits):,} now. To train on all of them, choose another --out, or --overwrite"
        )
    return found


def taken_over(config: TrainConfig, folder: RunFolder, device: torch.device) -> TrainConfig:
    """What the configuration leaves open, as the run that is here has it: the precision, whatever this machine would
    take; what is read together; the warm-up. And its autoencoders in the run's order."""
    run = folder.config()
    found: dict[str, Any] = {}
    if config.precision == "auto":
        here = str(matmul_dtype("auto", device)).removeprefix("torch.")
        found["precision"] = run.precision
        if run.precision not in ("auto", here):
            say(f"{folder.path}: goes on with {run.precision} products, as it began; precision = auto would be {here}")
    if config.run_chunks is None:
        found["run_chunks"] = run.run_chunks
    by_name = {sae.name: sae for sae in config.saes}
    names = [sae.name for sae in run.saes]
    if by_name.keys() == set(names):
        found["saes"] = tuple(by_name[name] for name in names)
    return config.model_copy(update=found)


def check_settings(config: TrainConfig, store: Store) -> None:
    """Raises UserError for a setting that could not be kept."""
    context = store.spec.context
    for key, most in LARGEST.items():
        if getattr(config, key) > most:
            raise UserError(f"{key}: {getattr(config, key):,} at once fit into no machine. At most {most:,} are taken")
    for key in ("lr", "clip_norm"):
        if (getattr(config, key) or 0.0) > LARGEST_SCALAR:
            raise UserError(f"{key}: {getattr(config, key):g} is too large for float32")
    for position in config.exclude_positions or ():
        if not 0 <= position < context:
            raise UserError(
                f"exclude_positions: {position} is no position of a context of {context}; the last one is {context - 1}"
            )
    gated = [sae for sae in config.saes if isinstance(sae, Thresholded)]
    if config.step == "sparse" and all(getattr(sae, "decoder", "unit") == "free" for sae in gated):
        raise UserError(
            "step = sparse: is a way to compute gated architectures (sa-gsae, and gated with decoder = unit), and none "
            "is asked for. Leave it out"
        )


def check_saes(saes: tuple[SAEConfig, ...]) -> None:
    """Raises UserError for a setting of an autoencoder that could not be kept. Those of earlier versions may have one:
    they cut it."""
    for sae in saes:
        if isinstance(sae, TopK) and (sae.aux_k or 0) > sae.d_sae:
            raise UserError(f"aux_k: {sae.aux_k:,} of {sae.d_sae:,} latents cannot be active ({sae.name})")
        for key in SCALARS & dict(sae).keys():
            if (getattr(sae, key) or 0.0) > LARGEST_SCALAR:
                raise UserError(f"{key}: {getattr(sae, key):g} is too large for float32 ({sae.name})")


def say_what_is_less(asked: TrainConfig, store: Store, hook: str, streams: int, run_chunks: int) -> None:
    """In a line each: settings that were given, are upper bounds, and are not reached on this store."""
    given, spec = asked.model_fields_set, store.spec
    tenth = max(1, spec.n_contexts // 10)
    if "heldout_tokens" in given and -(-asked.heldout_tokens // spec.context) > tenth:
        say(
            f"heldout_tokens = {asked.heldout_tokens:,}: at most a tenth of the store is held out, here "
            f"{tenth * spec.context:,}"
        )
    if "streams" in given and streams < asked.streams:
        say(f"streams = {asked.streams}: the store is small and is read in {streams}")
    layout = store.spec.layouts()[hook]
    per_shard = layout.shard_rows // layout.chunk_rows
    if "run_chunks" in given and run_chunks > per_shard:
        say(f"run_chunks = {run_chunks}: a shard has {per_shard} chunks, and runs do not cross shards")
    least = run_chunks * layout.chunk_rows
    if "window_rows" in given and asked.window_rows < least:
        say(f"window_rows = {asked.window_rows:,}: a window of a stream has at least one run, here {least:,} rows")


def kept_or(asked: Any, recorded: Any) -> Any:
    return recorded if asked is None else asked


def warmup(config: TrainConfig, steps: int, here: dict[str, Any] | None) -> int:
    """Steps of the warm-up: as many as were asked for, as the run that is here has, or the usual number. Raises
    UserError for more than the run has."""
    if here is not None and is_earlier(here):  # which cut what was asked for
        return min(int(here.get("warmup_steps") or 0), steps // 20)
    asked: int | None = kept_or(config.warmup_steps, here.get("warmup_steps") if here else None)
    if asked is None:
        return usual_warmup(steps)
    if asked > steps:
        raise UserError(
            f"warmup_steps = {asked:,}: the run has {steps:,} steps. Lower it, leave it out, or train on more --tokens"
        )
    return asked


def marked(parts: Split) -> int:
    return sum(every.count(0, len(every)) for every in map(RowMask.of, (parts.train, parts.heldout)))


def seen_by_all(shards: list[list[int]]) -> list[int]:
    """Of the shards that each rank found committed. A harvest may commit one while the ranks open its store."""
    everywhere = set.intersection(*map(set, shards))
    return [shard for shard in shards[0] if shard in everywhere]


def check_store(store: Store, config: TrainConfig, new: bool) -> None:
    """Raises where there is nothing to train on. `new`: whether the run begins."""
    if store.state == "final" and store.missing:
        raise DamagedError(f"{store.name}: is final, but shards {store.missing} are not in its manifest")
    if config.follow:
        return
    if not store.commits:
        raise UserError(f"{store.name}: no shard is committed yet. Run sagsae harvest to its end first, or --follow it")
    if store.state != "final" and new:
        say(f"{store.name} is unfinished: training on the {store.n_rows:,} tokens committed so far")


def make_passes(
    config: TrainConfig, store: Store, hook: str, parts: Split, run_chunks: int, folder: Path, leads: bool
) -> tuple[PassSource, int]:
    """What is read in each epoch, and in how many streams."""
    layout = store.spec.layouts()[hook]
    unit_rows = run_chunks * layout.chunk_rows
    block_rows = rows_together(layout.dtype.itemsize * layout.row_shape[0], layout.chunk_rows)
    if not config.follow:
        rows = HookRows.of(store, hook)
        units = rows.units(run_chunks)
        order = make_order(len(units), unit_rows, config.streams, config.window_rows, config.seed, block_rows)
        return FixedSnapshot(StorePass(rows, KeptRows(rows, parts.train), units, unit_rows, order)), order.streams
    window_units = max(1, config.window_rows // (config.streams * unit_rows))

    known: dict[int, NDArray[np.uint8]] = {}  # a shard's rows are marked alike in every pass

    def make_pass(part: Store) -> StorePass:
        rows = HookRows.of(part, hook)
        units = rows.units(run_chunks)
        order = ReadOrder(len(units), config.streams, window_units, config.seed, block_rows)
        return StorePass(rows, KeptRows(rows, parts.train, known), units, unit_rows, order)

    def enough(part: Store) -> bool:
        return part.n_rows >= config.streams * window_units * unit_rows

    return Segments(store, folder, leads, make_pass, enough, partial(content_of, hook=hook)), config.streams


def default_folder(store: Store, hook: str, config: TrainConfig) -> Path:
    """By its name; or the one in which an earlier sagsae, which named runs otherwise, began what is asked for."""
    usual = Path("runs") / run_name(store, hook, config)
    if usual.exists() or config.overwrite:
        return usual
    for path in sorted(usual.parent.glob(f"{usual.name.rpartition('-')[0]}-????????")):
        try:
            here = RunFolder(path).identity()
        except DamagedError:
            continue
        if here and is_earlier(here) and here["snapshot"] == store.snapshot_id and asks_for(config, hook, here):
            say(f"{path}: was begun by an earlier sagsae with these settings; it is taken")
            return path
    return usual


def asks_for(config: TrainConfig, hook: str, here: dict[str, Any]) -> bool:
    """Whether a configuration asks for an earlier sagsae's run, as far as it says."""
    asked = config.model_dump(mode="json", exclude=FREE | {"hook", "saes"})
    left_open = {"precision": "auto", "run_chunks": None, "warmup_steps": None}
    said = {key: value for key, value in asked.items() if key not in left_open or value != left_open[key]}
    saes = config.model_dump(mode="json")["saes"]
    same = here.get("hook") == hook and all(here.get(key) == value for key, value in said.items())
    return same and len(saes) == len(here["saes"]) and all(sae in here["saes"] for sae in saes)


def run_name(store: Store, hook: str, config: TrainConfig) -> str:
    """The same command gives the same name; any setting that matters changes it. What only this machine decides does
    not, nor how many shards there are: a run that is here goes on with what it began with."""
    asked = config.model_dump(mode="json", exclude=FREE | {"hook", "saes"}, exclude_defaults=True)
    saes = sorted(json.dumps(sae.model_dump(mode="json"), sort_keys=True) for sae in config.saes)
    rows = content_of_spec(store, hook), str(store.spec.model.get("commit"))
    decides = json.dumps([asked, hook, saes, rows], sort_keys=True)
    digest = hashlib.blake2b(decides.encode(), digest_size=4).hexdigest()
    return f"{folder_name(store.files)}-{hook.replace('/', '-')}-{digest}"
