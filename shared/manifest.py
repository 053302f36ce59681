"""What exists in a store: the commits, one line each, and the checksums of the files that no commit covers.

A shard is committed by one line in its writer's log, appended and synced after all its files are in place. The line
carries the length and crc32 of every file and ends in its own crc32c, so a torn line is recognised. When a store is
complete its lines are sorted into one index: then nothing in it tells how many writers there were.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from shared.errors import DamagedError, UserError
from shared.files import Files
from shared.gate import BadData, file_entry, integer, members, parse_json, passed, safe_path
from shared.shard import crc32c

MANIFEST_VERSION: Final = 1
INDEX: Final = "manifest/index.jsonl"
METADATA: Final = "manifest/metadata.json"
AT_ONCE: Final = 16
"""Small files read at once: from an object store each takes the time of a round trip."""

Sizes = dict[str, tuple[int, int]]
"""Length and crc32 of whole files."""


@dataclass(frozen=True)
class Commit:
    """One manifest line: a shard that exists, and the length and crc32 of each of its files."""

    shard: int
    rows: int
    start: int
    stop: int
    kept: int
    """Rows that count in the statistics: not position 0, not a special token."""
    files: Sizes
    """By array."""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """Of the kept rows, those with a NaN or an infinity, which the moments leave out: by hookpoint that has any such
    row, kept or not."""

    def line(self) -> str:
        body = {
            "v": MANIFEST_VERSION,
            "k": self.shard,
            "rows": self.rows,
            "in": [self.start, self.stop],
            "kept": self.kept,
            "files": as_json(self.files),
        }
        return sealed({**body, "nonfinite": dict(sorted(self.nonfinite.items()))} if self.nonfinite else body)


def as_json(files: Sizes) -> dict[str, dict[str, int]]:
    return {path: {"bytes": n, "crc32": crc} for path, (n, crc) in sorted(files.items())}


def as_sizes(entries: Any) -> Sizes:
    """Raises BadData for entries that we do not write."""
    return {safe_path(path): file_entry(entry, path) for path, entry in members(entries, (), None).items()}


def sealed(body: dict[str, Any]) -> str:
    """A line of JSON whose last member is the crc32c of the line without it."""
    text = json.dumps(body, separators=(",", ":"))
    return f'{text[:-1]},"c":{crc32c(text.encode())}}}\n'


def unsealed(line: str) -> Any:
    """The body of a sealed line; None when the line is torn or altered. Raises BadData when what was sealed is no
    JSON that we write."""
    text, found, crc = line.rstrip("\n").rpartition(',"c":')
    if not found or not line.endswith("}\n") or crc != f"{crc32c((text + '}').encode())}}}":
        return None
    return members(parse_json(text + "}"), ("v",), None)


def parse_commit(line: str) -> Commit | None:
    """The commit of a manifest line, or None when the line is torn or altered. Raises BadData when what was sealed is
    no commit that we write."""
    body = unsealed(line)
    if body is None:
        return None
    check_version(body)
    members(body, ("v", "k", "rows", "in", "kept", "files"), ("nonfinite",))
    span, nonfinite = body["in"], members(body.get("nonfinite", {}), (), None)
    if not isinstance(span, list) or len(span) != 2:
        raise BadData("in is not the beginning and the end of a range")
    start, stop = (integer(value, "in") for value in span)
    shard, rows, kept = (integer(body[name], name) for name in ("k", "rows", "kept"))
    counts = {safe_path(path): integer(n, f"nonfinite of {path}") for path, n in nonfinite.items()}
    return Commit(shard, rows, start, stop, kept, as_sizes(body["files"]), counts)


def commit_or_none(line: str) -> Commit | None:
    """The same for a line that anybody may have sealed: what is no commit of ours is a bad line."""
    try:
        return parse_commit(line)
    except BadData:
        return None


def check_version(body: dict[str, Any]) -> None:
    """Raises UserError for a newer manifest, BadData for none."""
    version = integer(body["v"], "v", 1)
    if version > MANIFEST_VERSION:
        raise UserError(
            f"the manifest is in version {version}, this sagsae reads version {MANIFEST_VERSION}. Install a newer one"
        )


@dataclass(frozen=True)
class Log:
    """One file of the manifest as it is now."""

    path: str
    commits: list[Commit]
    bad: list[int]
    """Numbers of the lines that are no commits."""
    lines: int

    @property
    def torn(self) -> bool:
        """Whether only its last line is bad: being written now, or torn by a crash."""
        return self.bad == [self.lines] and self.path != INDEX


def read_log(files: Files, path: str) -> Log:
    lines = files.read(path).splitlines(keepends=True)
    parsed = [commit_or_none(line.decode(errors="replace")) for line in lines]
    bad = [number for number, commit in enumerate(parsed, start=1) if commit is None]
    return Log(path, [commit for commit in parsed if commit is not None], bad, len(lines))


def read_logs(files: Files, final: bool) -> list[Log]:
    """The whole manifest. A final store has it in one file, which can be read where files cannot be listed. The index
    is read last: a harvest that ends meanwhile writes it before it deletes the logs."""
    paths = [] if final else files.logs("manifest", "rank-")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            logs = list(pool.map(lambda path: read_log(files, path), paths))
        except FileNotFoundError:  # the harvest ended since the listing, and the index has its lines now
            return read_logs(files, final)
    try:
        return [read_log(files, INDEX), *logs]
    except FileNotFoundError:
        if final:
            raise DamagedError(f"{files.name}/{INDEX}: is missing; restore it from a copy") from None
    return logs


def commits_of(logs: Iterable[Log]) -> dict[int, Commit]:
    """By shard, in order. Of a shard that is committed twice the last one counts."""
    by_shard = {commit.shard: commit for log in logs for commit in log.commits}
    return {shard: by_shard[shard] for shard in sorted(by_shard)}


def read_manifest(files: Files, final: bool) -> dict[int, Commit]:
    """Every committed shard. A torn last line is not a commit; raises DamagedError for any other bad line: no crash
    makes one."""
    logs = read_logs(files, final)
    for log in logs:
        if log.bad and not log.torn:
            raise DamagedError(
                f"{files.name}/{log.path}: line {log.bad[0]} of the manifest is damaged. Restore it from a copy, or "
                "give up its shard with: sagsae store verify --repair"
            )
    return commits_of(logs)


def append_commit(files: Files, writer: int, commit: Commit) -> None:
    """Commits a shard: after this returns the shard exists, whatever happens next."""
    files.append(f"manifest/rank-{writer:05d}.jsonl", commit.line().encode(), commit.shard)


def cut_torn_lines(files: Files) -> None:
    """Appending cuts a line that does not end. One that ends but was altered would be in the middle after that."""
    for log in read_logs(files, final=False):
        if log.torn:
            files.write(log.path, [commit.line().encode() for commit in log.commits])


def write_index(files: Files, commits: Iterable[Commit]) -> None:
    files.write(INDEX, [commit.line().encode() for commit in sorted(commits, key=lambda commit: commit.shard)])


def remove_logs(files: Files) -> None:
    """After `write_index`: the writers' own logs say nothing more."""
    for path in files.logs("manifest", "rank-"):
        files.remove(path)


def write_metadata(files: Files, sizes: Sizes) -> None:
    """The checksums of what is written once, before the first commit."""
    files.write(METADATA, [sealed({"v": MANIFEST_VERSION, "files": as_json(sizes)}).encode()])


def read_metadata(files: Files) -> Sizes:
    """Raises DamagedError when it is missing or altered."""
    try:
        data = files.read(METADATA).decode(errors="replace")
    except FileNotFoundError:
        data = ""
    with passed(f"{files.name}/{METADATA}"):
        body = unsealed(data)
        if body is None:
            raise DamagedError(f"{files.name}/{METADATA}: is missing or damaged; restore it from a copy")
        check_version(body)
        return as_sizes(members(body, ("v", "files"))["files"])
