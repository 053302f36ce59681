"""Works out what a training run will do (rows, steps, precision, folder) before anything is written."""

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
from shared.files.base import is_remote, is_served
from shared.hub.place import is_hub
from shared.progress import say
from shared.saes import ARCHITECTURES, FixedL0, SAEConfig
from shared.store.listing import folder_name
from shared.store.opened import Statistics, Store, find_hookpoint
from train.autoencoder import matmul_dtype
from train.data.follow import Segments
from train.data.loader import FixedSnapshot, PassSource, StorePass
from train.data.norm_filter import FilteredRows, left_out, norm_limit, recorded_limit, statistics, without
from train.data.order import ReadOrder, Split, make_order, rows_in_shards, rows_together, split_rows
from train.data.row_mask import RowMask
from train.data.rows import HookRows, KeptRows
from train.data.snapshot import (
    SnapshotWatch,
    as_ranges,
    as_recorded,
    content_of,
    content_of_spec,
    followed_snapshot,
    is_earlier,
)
from train.fit.optim import usual_warmup
from train.plan.idle import idle
from train.plan.start import StartPoint, check_start, with_start
from train.runs.folder import FREE, RunFolder

ROWS_PER_RUN_CHUNK: Final = 262_144
"""A run may have one chunk per this many `window_rows`: the variance of a batch's mean then stays near 1.15 times that
of independent rows (tests/train/test_shuffle.py)."""

SCALARS: Final = {"theta0", "bandwidth", "sparsity", "lr"}
"""Settings of an autoencoder that become numbers of float32."""
LARGEST: Final = {"batch": 1 << 24, "streams": 1 << 16}
LARGEST_SCALAR: Final = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class TrainJob:
    """A training run with every setting resolved."""

    config: TrainConfig
    """The configuration; settings that the user left open are as the resumed run recorded them."""
    store: Store
    """The store, restricted to the shards that the run reads."""
    hook: str
    parts: Split
    passes: PassSource
    streams: int
    steps: int
    """Steps of each wave."""
    epoch_rows: int
    """Training rows in an epoch."""
    heldout_rows: int
    matmul: torch.dtype
    folder: RunFolder
    identity: dict[str, Any]
    """The content of config.json: everything that decides the result."""
    on_cpu: bool
    waves: tuple[tuple[SAEConfig, ...], ...]
    """The autoencoders of each wave. Those of one wave are trained together (train/plan/waves.py)."""
    asked: TrainConfig
    """The configuration as the user gave it."""
    watch: SnapshotWatch
    wave: int = 1
    """The wave that is trained, counted from 1."""
    left_out: FilteredRows | None = None
    """The rows that `max_norm` leaves out. `parts.train` excludes them. `parts.heldout` includes them, because R² is
    measured with and without them."""
    rows_left_out: int = 0
    """How many of the rows that would count are left out."""
    start: StartPoint | None = None
    """What the autoencoders start from; None: random weights."""

    @property
    def saes(self) -> tuple[SAEConfig, ...]:
        """The autoencoders of this wave."""
        return self.waves[self.wave - 1]

    @property
    def title(self) -> str:
        """The run's folder and, if it has several, the wave: a prefix for messages."""
        return f"{self.folder.path}" + (f", wave {self.wave} of {len(self.waves)}" if len(self.waves) > 1 else "")

    def in_waves(self, waves: tuple[tuple[SAEConfig, ...], ...]) -> "TrainJob":
        return replace(self, waves=waves)

    def for_wave(self, wave: int) -> "TrainJob":
        return replace(self, wave=wave)

    @cached_property
    def statistics(self) -> Statistics:
        """The mean and scale that activations are normalised with: those of the store or, with `follow`, of the first
        segment. Then it waits for that segment, which is recorded in the run's folder. Raises UserError when all
        activations are equal."""
        found = statistics(self.passes.get(0).rows.store, self.hook, self.left_out)
        if not found.scale > 0:
            raise UserError(
                f"{self.store.name}/{self.hook}: all activations are equal in {self.store.spec.dtype}, so there is "
                "nothing to learn. If they differ a little around a large mean, harvest with --set store_dtype=float32"
            )
        return found

    def check_unchanged(self, thorough: bool = False) -> None:
        """Raises DamagedError when the store was replaced while rows of it were read (train/data/snapshot.py)."""
        passes = self.passes.frozen if isinstance(self.passes, Segments) else [self.passes.get(0)]
        self.watch.check([part.rows.store for part in passes], thorough)

    @property
    def longest_window(self) -> int:
        """The number of rows in the longest window."""
        unit_rows: int = self.identity["run_chunks"] * self.store.spec.layouts()[self.hook].chunk_rows
        if isinstance(self.passes, FixedSnapshot):
            return self.passes.whole.order.longest * unit_rows
        return max(1, self.config.window_rows // (self.streams * unit_rows)) * unit_rows

    @property
    def most_windows(self) -> int:
        """The maximum number of windows in an epoch of one stream."""
        if isinstance(self.passes, FixedSnapshot):
            return self.passes.whole.order.windows_full + 1
        return self.store.spec.n_tokens

    def heldout_store(self, stop_asked: Callable[[], bool]) -> Store:
        """Returns the store with all held-out rows; with `follow` it waits until they are committed."""
        if not isinstance(self.passes, Segments):
            return self.store
        spec = self.store.spec
        shards = RowMask.of(self.parts.heldout).shards(spec.shard_rows, spec.n_tokens)
        return self.passes.wait_for_shards(set(shards), stop_asked)


def make_job(
    config: TrainConfig,
    device: torch.device,
    leads: bool = True,
    gather: Callable[[list[int]], list[list[int]]] = lambda mine: [mine],
) -> TrainJob:
    """Resolves a configuration. Raises UserError when the store does not fit it. `leads`: whether this process decides
    what is read next from a growing store. `gather` returns every rank's value on every rank."""
    asked, (config, start) = config, with_start(config)
    store, hook = find_hookpoint(config.store, config.hook)
    if start is not None:
        check_start(start, config, store, hook)
    folder = RunFolder(config.out or default_folder(store, hook, config))
    recorded = None if config.overwrite else folder.identity()  # before any rank can have begun the run
    config = config if recorded is None else with_recorded_settings(config, folder)
    matmul = matmul_dtype(config.precision, device)
    identity = identity_of(config, store, hook, matmul)
    check_store(store, config, recorded is None)
    check_settings(config, store, new=recorded is None)
    recorded = same_run(folder, recorded, identity, config)
    if recorded is not None:
        say_recorded_precision(asked, config, folder, device)
        store = recorded_shards(store, hook, recorded, folder, config.follow)
    if not config.follow:
        store = store.only(committed_on_all_ranks(gather(list(store.commits))))
    limit = norm_limit(store, hook, config) if recorded is None else recorded_limit(recorded, f"{folder.path}")
    massive = left_out(store, hook, limit)
    every = split_rows(store.token_rows(check=False), config)
    parts = without(every, massive)
    heldout_rows, epoch_rows, steps = count_rows_and_steps(store, parts, config)
    check_compiler(config, device)
    config = config.model_copy(update={"warmup_steps": warmup(config, steps, recorded, folder)})
    identity |= rows_identity(store, hook, config, limit, recorded)
    passes, streams = make_passes(config, store, hook, parts, identity["run_chunks"], folder.path, leads)
    if leads:
        say_unused_settings(asked, store, hook, streams, identity["run_chunks"], steps)
    job = TrainJob(
        config=config,
        store=store,
        hook=hook,
        parts=Split(parts.train, every.heldout),
        passes=passes,
        streams=streams,
        steps=steps,
        epoch_rows=epoch_rows,
        heldout_rows=heldout_rows,
        matmul=matmul,
        folder=folder,
        identity=identity,
        on_cpu=device.type == "cpu",
        waves=(config.saes,),
        asked=asked,
        watch=SnapshotWatch(store, hook),
        left_out=massive,
        rows_left_out=count_marked(every) - count_marked(parts),
        start=start,
    )
    if not config.follow:
        _ = job.statistics  # raises UserError when all activations are equal
    return job


def same_run(
    folder: RunFolder, recorded: dict[str, Any] | None, identity: dict[str, Any], config: TrainConfig
) -> dict[str, Any] | None:
    """Returns the record of the run that is to be resumed; None where the folder holds none, or one of other settings,
    which `train` refuses."""
    if recorded is None:
        return None
    warmup_steps = asked_or_recorded(config.warmup_steps, recorded.get("warmup_steps"))
    return None if folder.differs({**identity, "warmup_steps": warmup_steps}) else recorded


def identity_of(config: TrainConfig, store: Store, hook: str, matmul: torch.dtype) -> dict[str, Any]:
    """Returns what decides a run's result, as far as the configuration and the store decide it."""
    same_as_folder = is_served(config.store) or is_hub(config.store)  # what the URL holds may be in a folder as well
    far = is_remote(config.store) and not same_as_folder
    usual_chunks = max(1, config.window_rows // ROWS_PER_RUN_CHUNK) if far else 1
    return {
        **config.model_dump(mode="json"),
        "store": store.location,
        "hook": hook,
        "precision": "tf32" if config.precision == "tf32" else str(matmul).removeprefix("torch."),
        "run_chunks": config.run_chunks or usual_chunks,
    }


def rows_identity(
    store: Store, hook: str, config: TrainConfig, limit: float | None, recorded: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the rest of it: which rows are read, the norm limit and the warm-up. A resumed run keeps what it
    recorded."""
    if recorded is not None:
        rows: dict[str, Any] = {key: recorded[key] for key in ("snapshot", "shards") if key in recorded}
        return {**rows, "norm_limit": limit, "warmup_steps": recorded.get("warmup_steps")}
    read = {"snapshot": followed_snapshot(store, hook)} if config.follow else snapshot_of(store, hook)
    return {**read, "norm_limit": limit, "warmup_steps": config.warmup_steps}


def count_rows_and_steps(store: Store, parts: Split, config: TrainConfig) -> tuple[int, int, int]:
    """Returns the number of held-out rows, of training rows in an epoch, and of the run's steps. Raises UserError when
    there are too few of any."""
    shards = np.arange(store.spec.n_shards) if config.follow else store.commits.shards
    heldout_rows, epoch_rows = (rows_in_shards(marks, store.spec, shards) for marks in (parts.heldout, parts.train))
    if not heldout_rows:
        raise UserError(f"{store.name}: no held-out context is committed yet. Let sagsae harvest continue, then train")
    steps = (config.tokens or epoch_rows) // config.batch
    if steps < 1:
        raise UserError(
            f"{config.tokens or epoch_rows:,} training tokens are less than one batch of {config.batch:,}. "
            "Harvest or ask for more tokens, or lower --batch"
        )
    return heldout_rows, epoch_rows, steps


def check_compiler(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError when steps are to be compiled on a CPU and there is no C++ compiler."""
    needed = config.compile and device.type == "cpu"
    if needed and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("compile = true: there is no C++ compiler here. Install g++, or leave compile off")


def snapshot_of(store: Store, hook: str) -> dict[str, str]:
    """Returns what a run records of the rows that it reads."""
    return {"snapshot": content_of(store, hook), "shards": as_ranges(store.commits)}


def recorded_shards(store: Store, hook: str, recorded: dict[str, Any], folder: RunFolder, follow: bool) -> Store:
    """Returns the store restricted to the shards that the resumed run reads, and says so when it has more by now."""
    found = as_recorded(store, hook, recorded, f"{folder.path}")
    if not follow and len(found.commits) < len(store.commits):
        say(
            f"{folder.path}: reads the {len(found.commits):,} shards that {store.name} had when it began; there are "
            f"{len(store.commits):,} now. To train on all of them, choose another --out, or --overwrite"
        )
    return found


def with_recorded_settings(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """Returns the configuration with the recorded values of what it leaves open (`precision = auto`, `run_chunks`, and
    `longest_row` of a run of an earlier version), and with its autoencoders in the recorded order."""
    run = folder.config()
    found: dict[str, Any] = {}
    if config.precision == "auto":
        found["precision"] = run.precision
    if config.run_chunks is None:
        found["run_chunks"] = run.run_chunks
    if "longest_row" not in config.model_fields_set and "longest_row" not in folder.read("config.json"):
        found["longest_row"] = run.longest_row
    by_name = {sae.name: sae for sae in config.saes}
    names = [sae.name for sae in run.saes]
    if by_name.keys() == set(names):
        found["saes"] = tuple(by_name[name] for name in names)
    return config.model_copy(update=found)


def say_recorded_precision(asked: TrainConfig, config: TrainConfig, folder: RunFolder, device: torch.device) -> None:
    """Says so when a resumed run keeps another precision than `precision = auto` means on this device."""
    automatic = str(matmul_dtype("auto", device)).removeprefix("torch.")
    if asked.precision == "auto" and config.precision not in ("auto", automatic):
        say(
            f"{folder.path}: resumes with {config.precision} products, as it began; precision = auto would be "
            f"{automatic}"
        )


def check_settings(config: TrainConfig, store: Store, new: bool) -> None:
    """Raises UserError for a setting that cannot be applied. `new`: whether the run begins here; one of an earlier
    version may have autoencoders with such a setting."""
    context = store.spec.context
    if new:
        check_saes(config.saes)
    for key, most in LARGEST.items():
        if getattr(config, key) > most:
            raise UserError(f"{key}: {getattr(config, key):,} at once fit into no machine. At most {most:,} are taken")
    for key in ("lr", "clip_norm"):
        if (getattr(config, key) or 0.0) > LARGEST_SCALAR:
            raise UserError(f"{key}: {getattr(config, key):g} is too large for float32")
    for position in config.exclude_positions or ():
        if not 0 <= position < context:
            raise UserError(
                f"exclude_positions: a context of {context} has no position {position}; the last one is {context - 1}"
            )
    sparse = [name for name, architecture in ARCHITECTURES.items() if architecture.sparse_step]
    fitting = [sae for sae in config.saes if sae.arch in sparse and getattr(sae, "decoder", "unit") == "unit"]
    if config.step == "sparse" and not fitting:
        raise UserError(
            f"step = sparse: works for gated architectures with unit decoders only ({', '.join(sparse)}), and none is "
            "asked for. Leave it out"
        )


def check_saes(saes: tuple[SAEConfig, ...]) -> None:
    """Raises UserError for a setting of an autoencoder that cannot be kept. Earlier versions of sagsae cut it."""
    for sae in saes:
        if isinstance(sae, FixedL0) and (sae.aux_k or 0) > sae.d_sae:
            raise UserError(f"aux_k: {sae.aux_k:,} of {sae.d_sae:,} latents cannot be active ({sae.name})")
        for key in SCALARS & dict(sae).keys():
            if (getattr(sae, key) or 0.0) > LARGEST_SCALAR:
                raise UserError(f"{key}: {getattr(sae, key):g} is too large for float32 ({sae.name})")


def say_unused_settings(asked: TrainConfig, store: Store, hook: str, streams: int, run_chunks: int, steps: int) -> None:
    """Prints a line for each setting that the user gave and that has no effect in this run, or less than its value says
    because the store is small."""
    for sentence in idle(asked, steps):
        say(sentence)
    given, spec = asked.model_fields_set, store.spec
    tenth = max(1, spec.n_contexts // 10)
    if "heldout_tokens" in given and -(-asked.heldout_tokens // spec.context) > tenth:
        say(
            f"heldout_tokens = {asked.heldout_tokens:,}: at most a tenth of the store is held out, here "
            f"{tenth * spec.context:,}"
        )
    if "streams" in given and streams < asked.streams:
        say(f"streams = {asked.streams}: the store is small, so it is read in {streams}")
    layout = store.spec.layouts()[hook]
    per_shard = layout.shard_rows // layout.chunk_rows
    if "run_chunks" in given and run_chunks > per_shard:
        say(f"run_chunks = {run_chunks}: a shard has {per_shard} chunks, and runs do not cross shards")
    least = run_chunks * layout.chunk_rows
    if "window_rows" in given and asked.window_rows < least:
        say(f"window_rows = {asked.window_rows:,}: a window of a stream has at least one run, here {least:,} rows")


def asked_or_recorded(asked: Any, recorded: Any) -> Any:
    return recorded if asked is None else asked


def warmup(config: TrainConfig, steps: int, recorded: dict[str, Any] | None, folder: RunFolder) -> int:
    """Returns the number of warm-up steps: the user's, else what the resumed run recorded, else the usual number.
    Raises UserError when it is more than the run has."""
    kept = None if recorded is None else folder.config().warmup_steps
    if recorded is not None and is_earlier(recorded):  # earlier versions cut long warm-ups
        return min(kept or 0, steps // 20)
    asked: int | None = asked_or_recorded(config.warmup_steps, kept)
    if asked is None:
        return usual_warmup(steps)
    if asked > steps:
        raise UserError(
            f"warmup_steps = {asked:,}: the run has {steps:,} steps. Lower it, leave it out, or train on more --tokens"
        )
    return asked


def count_marked(parts: Split) -> int:
    return sum(every.count(0, len(every)) for every in map(RowMask.of, (parts.train, parts.heldout)))


def committed_on_all_ranks(shards: list[list[int]]) -> list[int]:
    """Returns the shards that every rank found committed. A harvest may commit one while the ranks open its store."""
    everywhere = set.intersection(*map(set, shards))
    return [shard for shard in shards[0] if shard in everywhere]


def check_store(store: Store, config: TrainConfig, new: bool) -> None:
    """Raises UserError or DamagedError when there is nothing to train on. `new`: whether the run is new."""
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
    """Returns the source of passes, and the number of streams they are read in."""
    layout = store.spec.layouts()[hook]
    unit_rows = run_chunks * layout.chunk_rows
    block_rows = rows_together(layout.dtype.itemsize * layout.row_shape[0], layout.chunk_rows)
    if not config.follow:
        rows = HookRows.of(store, hook)
        units = rows.units(run_chunks)
        order = make_order(len(units), unit_rows, config.streams, config.window_rows, config.seed, block_rows)
        return FixedSnapshot(StorePass(rows, KeptRows(rows, parts.train), units, unit_rows, order)), order.streams
    window_units = max(1, config.window_rows // (config.streams * unit_rows))

    known: dict[int, NDArray[np.uint8]] = {}  # a shard has the same marks in every pass

    def make_pass(part: Store) -> StorePass:
        rows = HookRows.of(part, hook)
        units = rows.units(run_chunks)
        order = ReadOrder(len(units), config.streams, window_units, config.seed, block_rows)
        return StorePass(rows, KeptRows(rows, parts.train, known), units, unit_rows, order)

    least = -(-config.streams * window_units * unit_rows // store.spec.shard_rows)
    return Segments(store, folder, leads, make_pass, least, partial(content_of, hook=hook)), config.streams


def default_folder(store: Store, hook: str, config: TrainConfig) -> Path:
    """Returns the folder `runs/NAME`, or the folder in which an earlier version of sagsae, which named runs
    differently, began the same run."""
    usual = Path("runs") / run_name(store, hook, config)
    if usual.exists() or config.overwrite:
        return usual
    for path in sorted(usual.parent.glob(f"{usual.name.rpartition('-')[0]}-????????")):
        try:
            recorded = RunFolder(path).identity()
        except DamagedError:
            continue
        if not recorded or not is_earlier(recorded) or recorded["snapshot"] != store.snapshot_id:
            continue
        if matches_run(config, hook, recorded):
            say(f"{path}: was begun by an earlier version of sagsae with these settings, and is resumed")
            return path
    return usual


def matches_run(config: TrainConfig, hook: str, recorded: dict[str, Any]) -> bool:
    """Whether every setting that a configuration fixes is as in a run of an earlier version."""
    asked = config.model_dump(mode="json", exclude=FREE | {"hook", "saes"})
    left_open = {"precision": "auto", "run_chunks": None, "warmup_steps": None}
    said = {key: value for key, value in asked.items() if key not in left_open or value != left_open[key]}
    saes = config.model_dump(mode="json")["saes"]
    same = recorded.get("hook") == hook and all(recorded.get(key) == value for key, value in said.items())
    return same and len(saes) == len(recorded["saes"]) and all(sae in recorded["saes"] for sae in saes)


def run_name(store: Store, hook: str, config: TrainConfig) -> str:
    """Returns a run's default name. Every setting that decides the result changes it; settings that depend on the
    machine, and the number of committed shards, do not, because a resumed run keeps what it recorded."""
    asked = config.model_dump(mode="json", exclude=FREE | {"hook", "saes"}, exclude_defaults=True)
    saes = sorted(json.dumps(sae.model_dump(mode="json"), sort_keys=True) for sae in config.saes)
    rows = content_of_spec(store, hook), str(store.spec.model.get("commit"))
    decides = json.dumps([asked, hook, saes, rows], sort_keys=True)
    digest = hashlib.blake2b(decides.encode(), digest_size=4).hexdigest()
    return f"{folder_name(store.files)}-{hook.replace('/', '-')}-{digest}"
