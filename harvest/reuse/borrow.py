"""Takes over shards that other stores in the same folder hold already, before anything is captured.

A shard of a store with the same key is linked: the two stores share its bytes on disk, and each is deleted or repaired
without the other, because no file of a store is changed in place. Other shards (a last, partial one; those of another
codec or shape) are made from the rows of lossless stores, which are put back into the order of the tokens and written
as if they had just been captured. Every byte is compared with its checksum first, so damage is never taken over.

A store can be killed at any moment: files without a manifest line do not count, and the next attempt makes them again.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from harvest import background
from harvest.moments import MomentsPart, moments_on_host
from harvest.recode import copy
from harvest.reuse.key import rows_key, store_key
from harvest.reuse.match import CatalogStore
from harvest.reuse.scan import scan_stores
from harvest.writer import ShardRows, ShardWriter
from shared.config import HarvestConfig
from shared.device import usable_cores
from shared.errors import DamagedError, UserError
from shared.files.base import Files
from shared.files.handles import retry_interrupted
from shared.files.local import LocalFiles, make_folders, sync
from shared.progress import progress, say
from shared.store.manifest import Commit, append_commits
from shared.store.opened import Store
from shared.store.reader import open_reader, read_places, read_shard
from shared.store.shard import file_crc
from shared.store.spec import HookSpec, StoreSpec, shard_file
from shared.store.tokens import CountedMask

NO_LINKS: Final = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system that has no hard links, or not to this file: then the file is copied."""
SHARDS_TOGETHER: Final = 64
"""Shards that are committed together: their folders are synced once."""


@dataclass(frozen=True)
class Donor:
    """Another store that is open for reading."""

    store: Store
    common: int
    """Rows of the token stream with which both stores begin."""
    alike: bool
    """Whether it has the other store's key: then its shards can be linked."""

    def has_shard(self, hook: str, about: HookSpec, shard: int, rows: range) -> bool:
        """Whether it has a shard of exactly these rows of a hookpoint, in the other store's format."""
        same = self.alike and self.store.spec.hookpoints.get(hook) == about
        there = same and rows.stop <= self.common and shard in self.store.commits
        return there and self.store.commits[shard].rows == len(rows)

    def has_rows(self, hook: str, about: HookSpec, rows: range) -> bool:
        """Whether these rows of a hookpoint can be read from it."""
        spec = self.store.spec
        same = spec.hookpoints.get(hook) == about and not spec.quantised and rows.stop <= self.common
        return same and all(shard in self.store.commits for shard in shards_with(spec, rows))


def shards_with(spec: StoreSpec, rows: range) -> range:
    """The shards in which these rows of the token stream are."""
    return range(rows.start // spec.shard_rows, -(-rows.stop // spec.shard_rows))


Sources = Mapping[str, Donor]
"""The donor of each hookpoint."""


def find_donors(files: Files, spec: StoreSpec, config: HarvestConfig, environment: str) -> list[CatalogStore]:
    """The stores beside a store that may give it shards, or the rows for them: those of its key first, and the largest
    of them. `environment` is the store's own."""
    if config.reuse == "none" or not isinstance(files, LocalFiles):
        return []
    key, rows, own = store_key(spec), rows_key(spec), str(files.root.resolve())
    there = [each for each in scan_stores(config.out, tell=False) if each.folder != own]
    beside = [each for each in there if each.key == key or (each.rows_key == rows and not each.spec.quantised)]
    able = [each for each in beside if config.reuse == "any" or each.environment == environment]
    return sorted(able, key=lambda each: (each.key != key, -each.rows))


def borrow_shards(
    store: Store, config: HarvestConfig, catalog: Sequence[CatalogStore], check_stop: Callable[[], None]
) -> int:
    """Takes over every missing shard that the stores of the `catalog` hold, and returns the number of rows. The caller
    holds the store's lock. `check_stop` is called now and then and may raise."""
    if not isinstance(store.files, LocalFiles) or not catalog or not store.missing:
        return 0
    with ExitStack() as held:
        donors = [donor for each in catalog if (donor := open_donor(store, each, held))]
        lending = Lending(store, donors, config.allow_nonfinite)
        try:
            return lending.link_whole(check_stop) + lending.remake_rest(check_stop)
        finally:
            lending.tell()


def open_donor(store: Store, listed: CatalogStore, held: ExitStack) -> Donor | None:
    """Opens a donor, which cannot be deleted until `held` is left; None where it cannot be read."""
    files = LocalFiles(Path(listed.folder))
    try:
        held.enter_context(files.reading())
        donor = Store.open(files)
        if donor.spec.context != store.spec.context or not donor.spec.hookpoints.keys() & store.spec.hookpoints.keys():
            return None
        common = min(common_rows(store, donor), donor.spec.n_tokens)
        return Donor(donor, common, listed.key == store_key(store.spec))
    except (UserError, DamagedError, OSError) as error:
        say(f"{listed.store}: lends nothing. {error}")
        return None


def common_rows(store: Store, donor: Store) -> int:
    """The number of rows with which both token streams begin. All ids are compared."""
    ours, theirs = store.token_rows(check=False), donor.token_rows(check=False)
    contexts = 0
    for number in range(min(ours.n_chunks, theirs.n_chunks)):
        one, other = ours.chunk(number), theirs.chunk(number)
        n = min(len(one), len(other))
        differ = np.flatnonzero((one[:n] != other[:n]).any(axis=1))
        contexts += int(differ[0]) if len(differ) else n
        if len(differ):
            break
    return contexts * store.spec.context


class Lending:
    """The shards that one store takes over from others."""

    def __init__(self, store: Store, donors: Sequence[Donor], allow_nonfinite: bool) -> None:
        assert isinstance(store.files, LocalFiles)
        self.store, self.spec, self.files = store, store.spec, store.files
        self.donors, self.allow_nonfinite = donors, allow_nonfinite
        self.keep = CountedMask(store.token_rows(check=False))
        self.hook_of = hooks_of_arrays(store.spec)
        self.matrices = {array for array, layout in store.spec.layouts().items() if layout.row_shape}
        self.matrices |= store.row_kinds.keys()
        self.done: set[int] = set()
        self.folders: set[Path] = set()
        """Folders with new names that are not synced yet."""
        self.linked, self.made = Counter[str](), Counter[str]()
        self.copied = False
        self.ordered: dict[str, tuple[Donor, int, NDArray[Any]]] = {}
        """The shard of a donor that was read last, by hookpoint."""

    def tell(self) -> None:
        """Prints what was taken over."""
        how = "copied, because they cannot be linked here" if self.copied else "linked, which takes no disk space"
        for name, count in sorted(self.linked.items()):
            say(f"{self.store.name}: took over {count:,} shards of {name} ({how})")
        for name, count in sorted(self.made.items()):
            say(f"{self.store.name}: made {count:,} shards from the rows of {name}")

    def sources(self, shard: int, *, whole: bool) -> Iterator[Sources]:
        """The ways to take a shard over: a donor for every hookpoint that has the shard (`whole`), or its rows."""
        rows = range(*self.spec.shard_range(shard))
        fitting = {
            hook: [
                donor
                for donor in self.donors
                if (donor.has_shard(hook, about, shard, rows) if whole else donor.has_rows(hook, about, rows))
            ]
            for hook, about in self.spec.hookpoints.items()
        }
        if all(fitting.values()):
            for number in range(max(map(len, fitting.values()))):
                yield {hook: donors[min(number, len(donors) - 1)] for hook, donors in fitting.items()}

    def first_that_works(self, shard: int, take: Callable[[Sources], Commit], *, whole: bool) -> Commit | None:
        """The shard, from the first donors that are not damaged; None where there are none."""
        for sources in self.sources(shard, whole=whole):
            try:
                commit = take(sources)
            except (DamagedError, FileNotFoundError) as error:
                say(f"{self.store.name}: shard {shard} is not taken over. {error}")
                continue
            self.done.add(shard)
            counter = self.linked if whole else self.made
            counter.update({donor.store.name for donor in sources.values()})
            return commit
        return None

    # whole shards

    def link_whole(self, check_stop: Callable[[], None]) -> int:
        """Links every missing shard of which donors have exactly the rows. Returns the number of rows."""
        todo = [shard for shard in self.store.missing if any(self.sources(shard, whole=True))]
        total, rows = sum(stop - start for start, stop in map(self.spec.shard_range, todo)), 0
        if not todo:
            return 0
        with ThreadPoolExecutor(usable_cores()) as pool, progress(f"reuse {self.store.name}", total, "rows") as advance:
            for at in range(0, len(todo), SHARDS_TOGETHER):
                commits = []
                for shard in todo[at : at + SHARDS_TOGETHER]:
                    check_stop()
                    link = partial(self.link_shard, shard, pool)
                    if commit := self.first_that_works(shard, link, whole=True):
                        commits.append(commit)
                        advance(commit.rows, "")
                self.commit(commits)
                rows += sum(commit.rows for commit in commits)
        return rows

    def commit(self, commits: Sequence[Commit]) -> None:
        """Commits shards whose files are in place."""
        for folder in sorted(self.folders):
            sync(folder)
        self.folders.clear()
        if commits:
            append_commits(self.files, 0, commits)

    def link_shard(self, shard: int, pool: Executor, sources: Sources) -> Commit:
        """Puts the files of a shard into their places. Raises DamagedError where a donor is damaged."""
        start, stop = self.spec.shard_range(shard)
        kept = int(self.keep[start:stop].sum())
        nonfinite = {}
        for hook, donor in sources.items():
            commit = donor.store.commits[shard]
            if commit.kept != kept:
                raise DamagedError(f"{donor.store.name}: counts {commit.kept:,} rows of it instead of {kept:,}")
            if hook in commit.nonfinite and not self.allow_nonfinite:
                raise DamagedError(f"{donor.store.name}: has rows with NaN or infinities")
            if hook in commit.nonfinite:
                nonfinite[hook] = commit.nonfinite[hook]
        first = next(iter(sources.values()))
        wanted = [(array, sources[hook] if hook else first) for array, hook in self.hook_of.items()]
        sizes = pool.map(lambda each: self.take(each[1], each[0], shard), wanted)
        files = {array: size for (array, _), size in zip(wanted, sizes, strict=True)}
        return Commit(shard, stop - start, start, stop, kept, files, nonfinite)

    def take(self, donor: Donor, array: str, shard: int) -> tuple[int, int]:
        """Links or copies one file whose bytes are those that were committed. Returns its length and crc32."""
        size, crc = donor.store.commits[shard].files[array]
        path = shard_file(array, shard, array in self.matrices)
        if file_crc(donor.store.files.open(path, size), size) != crc:
            raise DamagedError(f"{donor.store.name}/{path}: its checksum is not the committed one")
        target = self.files.place(path)
        self.folders.update(make_folders(target.parent), (target.parent,))
        if not link(donor.store.root / path, target, size):
            self.copied = True
            copy(donor.store.files, self.files.write, path, size, crc)
        return size, crc

    # shards from rows

    def remake_rest(self, check_stop: Callable[[], None]) -> int:
        """Makes every other missing shard of which donors have the rows, in another shard or format. Returns the number
        of rows."""
        left = [shard for shard in self.store.missing if shard not in self.done]
        todo = [shard for shard in left if any(self.sources(shard, whole=False))]
        if not todo:
            return 0
        rows = 0
        writer = ShardWriter(self.files, self.spec, self.keep, allow_nonfinite=self.allow_nonfinite)
        with closing(writer), background.pool(usable_cores(), "moments") as pool:
            for shard in todo:
                check_stop()
                remake = partial(self.remake_shard, shard, writer, pool)
                if commit := self.first_that_works(shard, remake, whole=False):
                    rows += commit.rows
        return rows

    def remake_shard(self, shard: int, writer: ShardWriter, pool: Executor, sources: Sources) -> Commit:
        """Writes and commits a shard as if its rows had just been captured. Raises DamagedError where a donor is
        damaged."""
        rows, found = range(*self.spec.shard_range(shard)), {}
        kept = self.keep[rows.start : rows.stop]
        for hook, donor in sources.items():
            taken = self.rows_of(donor, hook, rows)
            norms = np.empty(len(taken), np.float32)
            ((total, squares),) = moments_on_host(pool, [MomentsPart(taken, kept, norms)])
            found[hook] = ShardRows(taken, norms, total, squares)
        writer.commit(shard, found)
        return writer.commits[-1]

    def rows_of(self, donor: Donor, hook: str, rows: range) -> NDArray[Any]:
        """[n, d_in]: rows of a hookpoint in the order of the tokens."""
        spec = donor.store.spec
        parts = []
        for shard in shards_with(spec, rows):
            if self.ordered.get(hook, (None, 0, None))[:2] != (donor, shard):
                self.ordered[hook] = (donor, shard, in_token_order(donor.store, hook, shard))
            start = shard * spec.shard_rows
            parts.append(self.ordered[hook][2][max(0, rows.start - start) : rows.stop - start])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def hooks_of_arrays(spec: StoreSpec) -> dict[str, str | None]:
    """The hookpoint that each array belongs to; None for those that say where rows came from."""
    found: dict[str, str | None] = dict.fromkeys(sorted(spec.arrays()))
    for hook, about in spec.hookpoints.items():
        alone = spec.model_copy(update={"hookpoints": {hook: about}}).arrays()
        found |= {array: hook for array in alone if not array.startswith("index/")}
    return found


def link(source: Path, target: Path, size: int) -> bool:
    """Gives a file a second name, in place of what is at `target`. Returns False where the file system cannot."""
    retry_interrupted(target.unlink, missing_ok=True)
    try:
        retry_interrupted(os.link, os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    about = os.lstat(target)
    if stat.S_ISREG(about.st_mode) and about.st_size == size:
        return True
    target.unlink()
    raise DamagedError(f"{source}: was replaced while it was being linked")


def in_token_order(store: Store, hook: str, shard: int) -> NDArray[Any]:
    """[n, d_in]: all rows of a shard, in the order of the tokens."""
    contexts, positions = (open_reader(store, f"index/{name}") for name in ("context", "position"))
    places = read_places(contexts, positions, shard)
    stored = read_shard(open_reader(store, hook), shard)
    rows = np.empty_like(stored)
    rows[places] = stored
    return rows
