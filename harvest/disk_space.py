"""The disk space and time of a harvest: estimated beforehand, measured as soon as a shard is committed."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from harvest.plan import HarvestPlan
from shared.config import HarvestConfig
from shared.errors import BusyError, DamagedError, UserError
from shared.files.base import Files
from shared.files.local import LocalFiles
from shared.files.open import open_files
from shared.progress import gigabytes, say
from shared.store.manifest import Commit
from shared.store.opened import Store, is_store
from shared.store.shard import CODECS, CodecName
from shared.store.spec import DTYPES

INDEX_BYTES: Final = 8
"""Bytes per token: its id, and where its row came from."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a harvest needs."""

    hookpoints: dict[str, int]
    """Bytes of the whole store, by hookpoint path."""
    rest: int
    """Bytes of tokens and indexes."""
    stored: int
    """Bytes that are committed already."""
    free: int | None
    """Free bytes on the disk; None for an object store, which reports no such number."""

    @property
    def to_write(self) -> int:
        return max(0, sum(self.hookpoints.values()) + self.rest - self.stored)

    @property
    def fits(self) -> bool:
        return self.free is None or self.to_write <= self.free


def raw_bytes(config: HarvestConfig, d_in: int) -> int:
    """Bytes of one row before the codec."""
    return d_in * DTYPES[config.store_dtype][0].itemsize


def estimate(plan: HarvestPlan, tokens: int, ratios: dict[str, float] | None = None) -> DiskNeed:
    """Estimates the space by the codec's usual ratio, or by measured `ratios` (raw bytes over stored bytes, by
    path)."""
    usual = usual_ratio(plan.config.codec, plan.config.store_dtype)
    found = ratios or dict.fromkeys(plan.hooks, usual)
    each = {
        path: int(tokens * (raw_bytes(plan.config, hook.d_in) / found[path] + 4)) for path, hook in plan.hooks.items()
    }
    stored, free = stored_size(plan.files), free_bytes(plan.files)
    if plan.config.overwrite and free is not None:  # the old store is deleted first
        free, stored = free + stored, 0
    return DiskNeed(each, tokens * INDEX_BYTES, 0 if plan.config.overwrite else stored, free)


def usual_ratio(codec: CodecName, dtype: str) -> float:
    """The usual ratio of raw bytes to stored bytes."""
    return CODECS[codec].expected_ratio(dtype, DTYPES[dtype][0].itemsize)


def check_space(plan: HarvestPlan, tokens: int | None, lent: int = 0) -> None:
    """Prints what the harvest will write, and raises BusyError when too little disk space is free. The first `lent`
    rows are linked from other stores, which takes no space."""
    if tokens is None:
        return
    need = estimate(plan, tokens)
    linked = int(sum(need.hookpoints.values()) * lent / tokens)
    need = replace(need, stored=max(need.stored, linked))
    hookpoints = f"{len(plan.hooks)} hookpoint{'s' if len(plan.hooks) > 1 else ''}"
    say(f"{plan.config.model}: {tokens:,} tokens of {hookpoints} into {plan.name}")
    for path, size in need.hookpoints.items():
        say(f"  {path}: d_in {plan.hooks[path].d_in}, about {gigabytes(size)}")
    reused = f"{lent:,} tokens are in other stores already, " if lent else ""
    say(f"  {reused}about {gigabytes(need.to_write)} to write{free_text(need)}")
    check_fits(plan.config.out, need)


def check_progress(store: Store, commits: Iterable[Commit], out: str) -> str:
    """Returns a message with what is still to be written, estimated from the first committed shards. Raises BusyError
    when it does not fit."""
    commits = list(commits)
    rows = sum(commit.rows for commit in commits)
    left = max(0, store.spec.n_tokens - store.n_rows - rows)  # other processes' commits are not read
    size = sum(size for commit in commits for size, _ in commit.files.values()) / rows
    itemsize = DTYPES[store.spec.dtype][0].itemsize
    ratios = [
        f"{path} {rows * hook.d_in * itemsize / sum(commit.files[path][0] for commit in commits):.2f}"
        for path, hook in store.spec.hookpoints.items()
    ]
    need = DiskNeed({"all": int(size * left)}, 0, 0, free_bytes(store.files))
    check_fits(out, need)
    return f"compression {', '.join(ratios)}; {gigabytes(need.to_write)} still to write{free_text(need)}"


def check_fits(out: str, need: DiskNeed) -> None:
    """Raises BusyError when the free disk space is too small, UserError when the whole disk is."""
    if not need.fits:
        usage = disk_usage(open_files(out))
        needed = f"--out {out}: about {gigabytes(need.to_write)} are needed"
        otherwise = "ask for fewer --tokens or hookpoints, or choose another --out"
        if usage is not None and need.to_write > usage.total:
            raise UserError(f"{needed}, the whole disk has {gigabytes(usage.total)}. {otherwise.capitalize()}")
        raise BusyError(
            f"{needed}, {gigabytes(need.free or 0)} are free. Free space and run the same command again, {otherwise}"
        )


def free_text(need: DiskNeed) -> str:
    return "" if need.free is None else f", {gigabytes(need.free)} are free"


def free_bytes(files: Files) -> int | None:
    """Free bytes on the store's disk; None for an object store."""
    usage = disk_usage(files)
    return None if usage is None else usage.free


def disk_usage(files: Files) -> Any:
    """Total, used and free bytes of the disk, as shutil.disk_usage returns them; None for an object store."""
    if not isinstance(files, LocalFiles):
        return None
    folder = next(p for p in (files.root, *files.root.absolute().parents) if p.exists())
    return shutil.disk_usage(folder)


def stored_size(files: Files) -> int:
    """Committed bytes of an existing store; 0 when there is none, or none that can be read."""
    try:
        if not is_store(files):
            return 0
    except DamagedError:
        return 0
    return Store.open(files, lenient=True).commits.n_bytes
