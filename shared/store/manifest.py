"""The manifest says what exists in a store: the commits, one line each, and the checksums of files that no commit
covers.

A shard is committed by one line in its writer's log, appended and synced after all its files are in place. The line
carries the length and crc32 of every file and ends in its own crc32c, so a torn line is recognised. When a store is
complete, its lines are sorted into one index; then nothing in it shows how many writers there were.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final

from shared.errors import DamagedError
from shared.files.base import Files, LogMark
from shared.gate import file_entry, members, passed, safe_path
from shared.store.commits import (
    MANIFEST_VERSION,
    CommitColumns,
    Commits,
    as_json,
    check_version,
    concatenate_columns,
    parse_lines,
    under_seal,
)
from shared.store.commits import Commit as Commit
from shared.store.commits import Sizes as Sizes
from shared.store.commits import parse_commit as parse_commit
from shared.store.commits import sealed as sealed
from shared.store.commits import unsealed as unsealed
from shared.store.spec import StoreSpec

INDEX: Final = "manifest/index.jsonl"
METADATA: Final = "manifest/metadata.json"
AT_ONCE: Final = 16
"""Small files read in parallel: from an object store each takes a round trip."""
LISTINGS: Final = 100
"""Tries of reading all logs, when one of them disappears each time: writers join logs, and delete them at the end."""
WRITTEN_AT_ONCE: Final = 4096
"""Lines per write."""


@dataclass(frozen=True)
class ManifestLog:
    """The present content of one file of the manifest."""

    path: str
    commits: CommitColumns
    """Commits in the order of the file's lines."""
    bad: dict[int, str]
    """Lines that are no commits: line number, and what is wrong."""
    lines: int
    torn: bool
    """Whether only the last line is bad, and is unterminated or altered: still being written, or torn by a crash."""
    mark: LogMark | None = None
    """The state of the file when it was read."""
    whole: int = 0
    """Bytes before a torn last line."""


class Manifest:
    """The manifest of one store, read as it grows: every read fetches only what is new."""

    def __init__(self, files: Files, spec: StoreSpec) -> None:
        self.files, self.spec = files, spec
        self.known: dict[str, ManifestLog] = {}
        self.found: Commits | None = None

    def logs(self, final: bool) -> list[ManifestLog]:
        """The whole manifest, the index first. The manifest of a final store is one file, which can be read where files
        cannot be listed. Otherwise the index is read last, because a harvest that ends meanwhile writes it before it
        deletes the logs."""
        if final:
            self.known = {INDEX: self.read(INDEX, None)}
            return list(self.known.values())
        for _ in range(LISTINGS):
            try:
                logs = self.read_changed(self.files.marks("manifest", "rank-"))
                self.known = self.read_changed(self.files.marks("manifest", "index")) | logs
            except FileNotFoundError:  # since the listing it was joined with others, or moved into the index
                continue
            return list(self.known.values())
        raise DamagedError(f"{self.files.name}/manifest: the listed logs cannot be read")

    def read_changed(self, marks: dict[str, LogMark]) -> dict[str, ManifestLog]:
        new = [path for path, mark in marks.items() if not self.is_unchanged(path, mark)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            read = dict(zip(new, pool.map(lambda path: self.read(path, marks[path]), new), strict=True))
        return {path: self.newer(path, read.get(path)) for path in marks}

    def is_unchanged(self, path: str, mark: LogMark) -> bool:
        """Whether a log need not be read again. A torn one must be: the line that replaces the torn one may end at the
        same byte."""
        before = self.known.get(path)
        return before is not None and before.mark == mark and not before.torn

    def newer(self, path: str, read: ManifestLog | None) -> ManifestLog:
        """Returns the log as it was known, if what was read says the same."""
        before = self.known.get(path)
        if before is None or read is None:
            return read or self.known[path]
        same = (before.mark, before.whole, before.torn) == (read.mark, read.whole, read.torn)
        return before if same else read

    def read(self, path: str, mark: LogMark | None) -> ManifestLog:
        """Reads a log, or only what was appended to it. Raises FileNotFoundError; for the index of a final store
        DamagedError."""
        before = self.known.get(path)
        if before is not None and before.mark is not None and mark is not None and mark.continues(before.mark):
            more = parse_lines(self.files.read_from(path, before.whole), self.spec, before.lines - before.torn)
            bad = ({} if before.torn else before.bad) | more.bad
            commits, whole = concatenate_columns([before.commits, more.commits]), before.whole + more.whole
            return ManifestLog(path, commits, bad, more.lines, is_torn(path, bad, more.lines, more.torn), mark, whole)
        try:
            data = self.files.read(path)
        except FileNotFoundError:
            if mark is None:
                raise DamagedError(f"{self.files.name}/{path}: is missing; restore it from a copy") from None
            raise
        found = parse_lines(data, self.spec)
        whole = found.whole
        return ManifestLog(
            path, found.commits, found.bad, found.lines, is_torn(path, found.bad, found.lines, found.torn), mark, whole
        )

    def commits(self, final: bool, lenient: bool = False) -> Commits:
        """Every committed shard; the same object when nothing is new. A torn last line is not a commit. Raises
        DamagedError for any other bad line (unless `lenient`), because no crash makes one."""
        before = self.known
        logs = self.logs(final)
        for log in logs:
            if log.bad and not log.torn and not lenient:
                number, what = next(iter(log.bad.items()))
                raise DamagedError(
                    f"{self.files.name}/{log.path}: line {number} of the manifest is damaged ({what}). Restore it from "
                    "a copy, or drop its shard with: sagsae store verify --repair"
                )
        if (
            self.found is None
            or before.keys() != self.known.keys()
            or any(before[path] is not log for path, log in self.known.items())
        ):
            self.found = Commits(
                concatenate_columns([log.commits for log in logs]) if logs else CommitColumns.empty(self.spec)
            )
        return self.found


def is_torn(path: str, bad: dict[int, str], lines: int, last: bool) -> bool:
    return last and list(bad) == [lines] and path != INDEX


def read_logs(files: Files, spec: StoreSpec, final: bool) -> list[ManifestLog]:
    """The whole manifest, unchecked."""
    return Manifest(files, spec).logs(final)


def read_manifest(files: Files, spec: StoreSpec, final: bool) -> Commits:
    """Every committed shard: see `Manifest.commits`."""
    return Manifest(files, spec).commits(final)


def append_commit(files: Files, writer: int, commit: Commit) -> None:
    """Commits a shard: after this returns the shard exists, whatever happens next."""
    files.append(f"manifest/rank-{writer:05d}.jsonl", commit.line().encode(), commit.shard)


def append_commits(files: Files, writer: int, commits: Sequence[Commit]) -> None:
    """Commits several shards of a store on a disk with one write, in order: a crash in the middle commits the first
    ones."""
    lines = "".join(commit.line() for commit in commits)
    files.append(f"manifest/rank-{writer:05d}.jsonl", lines.encode(), commits[0].shard)


def cut_torn_lines(files: Files) -> None:
    """Cuts off altered last lines. Appending cuts an unterminated line itself, but a terminated one that was altered
    would end up in the middle."""
    for path in files.logs("manifest", "rank-"):
        data = files.read(path)
        last = data.rfind(b"\n", 0, -1) + 1
        if data and under_seal(data[last:]) is None:
            files.write(path, [data[:last]])


def write_index(files: Files, commits: Commits) -> None:
    files.write(INDEX, in_pieces(commits.lines()))


def in_pieces(lines: Iterable[str]) -> Iterator[bytes]:
    """Joins lines into pieces of WRITTEN_AT_ONCE lines."""
    left = iter(lines)
    while some := list(islice(left, WRITTEN_AT_ONCE)):
        yield "".join(some).encode()


def remove_logs(files: Files) -> None:
    """Deletes the writers' logs after `write_index`, which contains all of them."""
    files.remove_all(files.logs("manifest", "rank-"))


def write_metadata(files: Files, sizes: Sizes) -> None:
    """Writes the checksums of the files that are written once, before the first commit."""
    files.write(METADATA, [sealed({"v": MANIFEST_VERSION, "files": as_json(sizes)}).encode()])


def read_metadata(files: Files) -> Sizes:
    """Reads the checksums of `write_metadata`. Raises DamagedError when they are missing or altered."""
    what = f"{files.name}/{METADATA}"
    try:
        data = files.read(METADATA)
    except FileNotFoundError:
        data = b""
    with passed(what):
        body = unsealed(data)
        if body is None:
            raise DamagedError(f"{what}: is missing or damaged; restore it from a copy")
        check_version(body)
        files_of = members(members(body, ("v", "files"))["files"], (), None)
        return {safe_path(path): file_entry(entry, path) for path, entry in files_of.items()}
