"""Takes over shards that other stores in the same folder hold already, before anything is captured.

A whole shard is linked: the two stores share its bytes on disk, and each is deleted or repaired without the other,
because no file of a store is changed in place. The last, partial shard is made from a larger lossless shard: its rows
are put back into the order of the tokens, cut, and written as if they had just been captured. Every byte is compared
with its committed checksum first, so damage is never taken over.

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
from harvest.reuse.key import store_key
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

    def has(self, hook: str, about: HookSpec, shard: int, stop: int) -> bool:
        """Whether it has rows of a hookpoint in a shard, all rows up to `stop` being of the same tokens."""
        same = self.store.spec.hookpoints.get(hook) == about
        return same and stop <= self.common and shard in self.store.commits


Sources = Mapping[str, Donor]
"""The donor of each hookpoint."""


def find_donors(files: Files, spec: StoreSpec, config: HarvestConfig, environment: str) -> list[CatalogStore]:
    """The stores beside a store, of the same key, that may give it shards, the largest first. `environment` is the
    store's own."""
    if config.reuse == "none" or not isinstance(files, LocalFiles):
        return []
    key, own = store_key(spec), str(files.root.resolve())
    beside = [each for each in scan_stores(config.out, tell=False) if each.key == key and each.folder != own]
    able = [each for each in beside if config.reuse == "any" or each.environment == environment]
    return sorted(able, key=lambda each: -each.rows)


def borrow_shards(
    store: Store, config: HarvestConfig, catalog: Sequence[CatalogStore], check_stop: Callable[[], None]
) -> int:
    """Takes over every missing shard that the stores of the `catalog` hold, and returns the number of rows. They must
    have the store's key. `check_stop` is called now and then and may raise. The caller holds the store's lock."""
    if not isinstance(store.files, LocalFiles) or not catalog or not store.missing:
        return 0
    with ExitStack() as held:
        donors = [donor for each in catalog if (donor := open_donor(store, each, held))]
        lending = Lending(store, donors, config.allow_nonfinite)
        try:
            return lending.link_whole(check_stop) + lending.cut_last()
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
        return Donor(donor, common_rows(store, donor))
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

    def tell(self) -> None:
        """Prints what was taken over."""
        how = "copied, because they cannot be linked here" if self.copied else "linked, which takes no disk space"
        for name, count in sorted(self.linked.items()):
            say(f"{self.store.name}: took over {count:,} shards of {name} ({how})")
        for name in sorted(self.made):
            say(f"{self.store.name}: made its last shard from the rows of {name}")

    def sources(self, shard: int, *, whole: bool) -> Iterator[Sources]:
        """The ways to take a shard over: a donor for every hookpoint that has exactly its rows (`whole`), or more."""
        start, stop = self.spec.shard_range(shard)
        fitting: dict[str, list[Donor]] = {}
        for hook, about in self.spec.hookpoints.items():
            able = [donor for donor in self.donors if donor.has(hook, about, shard, stop)]
            fitting[hook] = [donor for donor in able if (donor.store.commits[shard].rows == stop - start) == whole]
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

    # the last shard

    def cut_last(self) -> int:
        """Makes the last shard, where it is missing, from lossless shards with more rows. Returns its rows."""
        last = self.spec.n_shards - 1
        if self.spec.quantised or last in self.done or last in self.store.commits:
            return 0
        commit = self.first_that_works(last, partial(self.cut_shard, last), whole=False)
        return commit.rows if commit else 0

    def cut_shard(self, shard: int, sources: Sources) -> Commit:
        """Writes and commits the first rows of a larger shard, as if they had just been captured."""
        start, stop = self.spec.shard_range(shard)
        kept, found = self.keep[start:stop], {}
        with background.pool(usable_cores(), "moments") as pool:
            for hook, donor in sources.items():
                rows = first_rows(donor.store, hook, shard, stop - start)
                norms = np.empty(len(rows), np.float32)
                ((total, squares),) = moments_on_host(pool, [MomentsPart(rows, kept, norms)])
                found[hook] = ShardRows(rows, norms, total, squares)
        writer = ShardWriter(self.files, self.spec, self.keep, allow_nonfinite=self.allow_nonfinite)
        with closing(writer):
            writer.commit(shard, found)
        return writer.commits[-1]


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


def first_rows(store: Store, hook: str, shard: int, n: int) -> NDArray[Any]:
    """[n, d_in]: the first rows of a shard in the order of the tokens."""
    contexts, positions = (open_reader(store, f"index/{name}") for name in ("context", "position"))
    places = read_places(contexts, positions, shard)
    stored = read_shard(open_reader(store, hook), shard)
    wanted = np.flatnonzero(places < n)
    rows = np.empty((n, stored.shape[1]), stored.dtype)
    rows[places[wanted]] = stored[wanted]
    return rows
