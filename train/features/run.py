"""`sagsae features`: reads the store once, counts, and writes RUN/features/NAME/, or the folder of --out.

The pass keeps what it has counted in NAME.work/ beside it, one file for each process, and resumes from there. The
result is put together in it, too, and takes its name when it is complete: it is there as a whole or not at all.
"""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shared.device import pick_device, reuse_memory
from shared.errors import DamagedError, Interrupted, UserError
from shared.files.local import explained, remove_tree, sync
from shared.files.locks import LOCK_FILE, folder_lock
from shared.gate import BadData
from shared.launch import begun_by_this_command
from shared.memory import host_memory
from shared.progress import duration, gigabytes, progress, say
from shared.record import provenance, version
from shared.schemas.features import FeaturesConfig
from shared.stop import stop_requests
from shared.store.spec import StoreSpec
from train.data.snapshot import SnapshotWatch
from train.exchange.about import known_model
from train.features.arrays import read_arrays
from train.features.cofire import PARTNERS, cofiring
from train.features.encode import BlockEncoder
from train.features.job import FeaturesJob, make_job
from train.features.lens import LensTokens, NoLens, find_unembedding, logit_lens
from train.features.readers.folder import CALLS
from train.features.site.build import PAGE, is_current, write_site
from train.features.site.words import Vocabulary
from train.features.tables import FILES, FeatureTables, Neighbours
from train.features.tally import Tally, done_in
from train.measure.directions import neighbours
from train.ranks import Ranks
from train.runs.folder import read_sealed, write_sealed

FORMAT: Final = 1
SAVE_SECONDS: Final = 60.0
"""Seconds between saves of what was counted, at least."""
SAVE_SHARE: Final = 10.0
"""The time between saves over the time that a save takes, at least."""
SLOW_SECONDS: Final = 900.0
ROWS_COMPARED: Final = 256
"""Rows of the decoder that one thread compares with all others at a time."""


@dataclass(frozen=True)
class FeaturesSummary:
    """What a call wrote or found."""

    folder: Path
    sae: str
    rows: int
    l0: float
    lens: bool
    seconds: float
    complete: bool
    """Whether it was there before the call."""

    @property
    def page(self) -> Path:
        return self.folder / PAGE


def features(config: FeaturesConfig) -> FeaturesSummary:
    """Counts what every latent of an autoencoder fires on. Raises UserError for unusable input, Interrupted after a
    signal."""
    ranks = Ranks(torch.device(pick_device(config.device)))
    with ranks.raising_lost_error():
        job = make_job(config)
        overwrite = config.overwrite and not ranks.gather(begun(job))[0]
        if not overwrite and (job.out / "about.json").exists():
            return complete(job, ranks.leads)
        with ExitStack() as held, explained(job.work):
            held.enter_context(job.store.files.reading())
            with ranks.failing_together():
                if ranks.leads:
                    held.enter_context(prepared(job, overwrite))
            return count_together(job, ranks)


def begun(job: FeaturesJob) -> bool:
    """Whether this very command began the pass before its processes were started again."""
    for path in (job.work / "job.json", job.out / "about.json"):
        try:
            return begun_by_this_command(read_sealed(path))
        except (FileNotFoundError, BadData):
            continue
    return False


def complete(job: FeaturesJob, leads: bool) -> FeaturesSummary:
    """Describes a result that is there. The leading process writes its page where that is missing or older than a dial
    test. Raises UserError when it was made of something else, DamagedError when it was altered."""
    about = about_of(job.out / "about.json")
    check_same(job, about, f"{job.out}: was made")
    if job.config.model is not None and about.get("lens") is None:
        raise UserError(f"{job.out}: was made without a logit lens. Add --overwrite to make it with --model")
    gone = [name for name in FILES if not (job.out / name).is_file()]
    if gone:
        raise DamagedError(f"{job.out / gone[0]}: is missing. Make it again with --overwrite")
    if leads and not is_current(job.out):
        with explained(job.out):
            write_site(job.out)
    say(f"{job.out} is complete. Nothing to do (--overwrite starts again).")
    return FeaturesSummary(
        job.out, job.name, int(about["rows"]), float(about["l0"]), about.get("lens") is not None, 0.0, True
    )


def about_of(path: Path) -> dict[str, Any]:
    """Raises DamagedError when the file was altered."""
    try:
        about = read_sealed(path)
        if not isinstance(about.get("rows", 0), int) or not isinstance(about.get("identity"), dict):
            raise BadData("does not say what it was made from")
        return about
    except BadData as error:
        raise DamagedError(f"{path}: {error}. Make it again with --overwrite") from error


def check_same(job: FeaturesJob, about: dict[str, Any], what: str) -> None:
    """Raises UserError, which says where it differs, unless a result or an unfinished pass has this job's identity."""
    there = about["identity"]
    differ = [key for key in job.identity if there.get(key) != plain(job.identity[key])]
    reasons = {"sha256": "from another autoencoder", "snapshot": "from other rows of the store"}
    if differ:
        key = next((each for each in reasons if each in differ), differ[0])
        why = reasons.get(key, f"with {key} = {there.get(key)}, and this asks for {job.identity[key]}")
        raise UserError(f"{what} {why}. Ask for the same again, or start again with --overwrite")


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def prepared(job: FeaturesJob, overwrite: bool) -> Iterator[None]:
    """Makes the folder in which the pass works, and locks it. Raises UserError when it holds another pass."""
    if job.out.exists() and any(job.out.iterdir()) and not overwrite:
        raise DamagedError(f"{job.out}: has no about.json. Move it away, or start again with --overwrite")
    job.work.mkdir(parents=True, exist_ok=True)
    with folder_lock(job.work):
        if overwrite:
            if (job.out / CALLS).exists():
                (job.out / CALLS).rename(job.work / CALLS)
            kept = (LOCK_FILE, CALLS)
            for path in (job.out, *(path for path in job.work.iterdir() if not path.name.startswith(kept))):
                if path.exists() or path.is_symlink():
                    remove_tree(path)
        described = job.work / "job.json"
        if described.exists():
            check_same(job, about_of(described), f"{job.work}: holds a pass that was begun")
        else:
            write_sealed(described, {**provenance(), "identity": job.identity})
        yield


def count_together(job: FeaturesJob, ranks: Ranks) -> FeaturesSummary:
    """This rank's part of the pass; rank 0 writes the result."""
    started = time.monotonic()
    threads = max(1, torch.get_num_threads())
    reuse_memory(ranks.device)
    tally = Tally(job.shape, job.work, f"rank-{ranks.index:05d}")
    with ranks.failing_together():
        done = {shard for path in job.work.glob("*.tally") for shard in done_in(read_arrays(path))}
        if tally.file.exists():
            tally.load()
    todo = [shard for shard in job.source.shards if shard not in done]
    if ranks.leads:
        introduce(job, ranks, threads, len(todo))
    ranks.wait()  # every rank has read which shards are done
    with one_thread_each(threads) as pool:
        with ranks.failing_together():
            count(job, tally, todo[ranks.index :: ranks.count], pool, ranks)
        summary = None
        with ranks.failing_together():
            if ranks.leads:
                summary = write(job, tally, pool, started)
    ranks.end()
    return summary or FeaturesSummary(job.out, job.name, 0, 0.0, False, 0.0, False)


def introduce(job: FeaturesJob, ranks: Ranks, threads: int, shards: int) -> None:
    """Says what the pass will take. Raises UserError when there is too little memory."""
    rows, needed = job.source.count(), job.memory(threads)
    free = host_memory()
    seconds = job.seconds(ranks.device, threads, ranks.count)
    say(
        f"features of {job.name}: {rows:,} rows, about {duration(seconds)} and {gigabytes(needed)} of memory"
        + (f" in each of {ranks.count} processes" if ranks.count > 1 else "")
    )
    if shards < len(job.source.shards):
        say(f"resuming: {len(job.source.shards) - shards} of {len(job.source.shards)} shards are done")
    if free is not None and needed * ranks.count > free:
        say(f"only {gigabytes(free)} of memory are free. Start fewer --processes, or lower --top and --drawn")
    if seconds > SLOW_SECONDS and job.config.tokens is None:
        fits = int(rows * SLOW_SECONDS / seconds / 1000) * 1000
        say(f"--tokens {max(job.shape.context, fits)} would take about {duration(SLOW_SECONDS)}")


@contextmanager
def one_thread_each(threads: int) -> Iterator[Executor]:
    """Threads that each compute on one core: a matrix product that is shared out could differ in its last bits."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool, torch.no_grad():
        try:
            yield pool
        finally:
            torch.set_num_threads(before)


def count(job: FeaturesJob, tally: Tally, shards: list[int], pool: Executor, ranks: Ranks) -> None:
    """Counts some shards. Saves now and then, and at the end. Raises Interrupted after a signal."""
    encoder, watch = BlockEncoder(job.sae), SnapshotWatch(job.store, job.hook)
    saver = Saver(tally)
    sizes = {shard: job.source.mask.count(*job.store.spec.shard_range(shard)) for shard in shards}
    with stop_requests() as stop_asked, progress("features", sum(sizes.values()), "rows", shown=ranks.leads) as advance:
        for shard in shards:
            rows = job.source.read(shard)
            tally.take(shard, rows.on(ranks.device), encoder, pool)
            advance(sizes[shard], f"{tally.rows:,} rows counted")
            if stop_asked() and shard != shards[-1]:
                tally.save()
                raise Interrupted(f"{job.work}: stopped. To continue, run the same command again")
            saver.save_now_and_then()
    watch.check([job.store], thorough=True)
    if shards:
        tally.save()


@dataclass
class Saver:
    """Saves a tally so often that little is lost, and so rarely that little time is spent."""

    tally: Tally
    last: float = 0.0
    took: float = 0.0

    def __post_init__(self) -> None:
        self.last = time.monotonic()

    def save_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self.last >= max(SAVE_SECONDS, SAVE_SHARE * self.took):
            self.tally.save()
            self.last = time.monotonic()
            self.took = self.last - now


def write(job: FeaturesJob, tally: Tally, pool: Executor, started: float) -> FeaturesSummary:
    """Merges the counts of all processes, computes the rest and writes the result."""
    for path in sorted(job.work.glob("*.tally")):
        if path != tally.file:
            tally.merge(path)
    if sorted(tally.done) != job.source.shards:
        raise DamagedError(f"{job.work}: its files do not hold every shard once. Start again with --overwrite")
    lens, model = lens_of(job, pool)
    words = Vocabulary.of(job.store, job.config.model)
    shape = job.shape
    together = cofiring(*tally.all_firings(), shape.sides, shape.poles, tally.sampled)
    tables = FeatureTables(tally, job.source.tokens, neighbours_of(job, pool), together, lens, words)
    out = job.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tables.write(out)
    firings = int(tally.table.firings.sum())
    about = {
        "format": FORMAT,
        **provenance(),
        "pyarrow": version("pyarrow"),
        "identity": job.identity,
        "store": {"path": job.store.name, "snapshot": job.store.snapshot_id, "model": model_name(job.store.spec)},
        "hook_name": job.store.spec.hookpoints[job.hook].name,
        "d_in": job.sae.d_in,
        "d_sae": shape.d_sae,
        "signed": shape.sides == 2,
        "scale": shape.scale,
        "context": shape.context,
        "rows": tally.rows,
        "firings": firings,
        "l0": firings / max(1, tally.rows),
        "sampled": tally.sampled,
        "lens": model,
        "seconds": round(time.monotonic() - started, 2),
    }
    write_sealed(out / "about.json", about)
    write_site(out)
    for name in FILES:
        sync(out / name)
    out.rename(job.out)
    if (job.work / CALLS).exists():
        (job.work / CALLS).rename(job.out / CALLS)
    sync(job.out.parent)
    shutil.rmtree(job.work, ignore_errors=True)
    return FeaturesSummary(job.out, job.name, tally.rows, about["l0"], model is not None, about["seconds"], False)


def lens_of(job: FeaturesJob, pool: Executor) -> tuple[LensTokens | None, str | None]:
    """The logit lens and the commit of the model it is from; nothing, with a message, where there is none."""
    try:
        found = find_unembedding(job.store, job.hook, job.config.model)
        return logit_lens(found, job.sae.weights.W_dec.cpu(), job.shape.sides, pool), found.commit
    except NoLens as error:
        say(f"no logit lens: {error}")
        return None, None


def model_name(spec: StoreSpec) -> str | None:
    """The model's name as others know it."""
    model = known_model(spec.model)
    return None if model is None else str(model["name"])


def neighbours_of(job: FeaturesJob, pool: Executor) -> Neighbours:
    """The decoder rows most alike and most opposite to each."""
    W_dec = job.sae.weights.W_dec.cpu()
    unit = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    count = min(PARTNERS, len(unit) - 1)
    blocks = [slice(start, min(len(unit), start + ROWS_COMPARED)) for start in range(0, len(unit), ROWS_COMPARED)]

    def compare(some: slice) -> list[NDArray[Any]]:
        return [each.numpy() for each in neighbours(unit, some, count)]

    near_cosine, near, far_cosine, far = (
        np.concatenate(parts) for parts in zip(*pool.map(compare, blocks), strict=True)
    )
    return Neighbours(near, near_cosine, far, far_cosine)
