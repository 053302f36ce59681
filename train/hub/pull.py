"""`sagsae pull`: brings autoencoders from a repository of the Hugging Face hub.

What sagsae pushed comes back byte for byte, from `sagsae/HOOKPOINT/NAME/`. An autoencoder of another tool is downloaded
with its whole folder, then imported like one on the disk. Nothing from the hub is trusted: names stay in their folder,
the sizes that the hub lists are limits, every file must have its listed digest, and nothing is unpickled here.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.errors import DamagedError, UserError
from shared.files.handles import Buffer
from shared.files.hub_files import HubFiles
from shared.files.local import explained, written_together
from shared.gate import SMALL, BadData, quoted, safe_path
from shared.hub.client import HubFile, HubRefusal, RepoState, describe_file, list_files, repo_state
from shared.hub.place import HubPlace, HubRepo, checked_revision, repo_named
from shared.progress import progress
from shared.schemas.exchange import ImportConfig, PullConfig
from train.autoencoder import SETTINGS, WEIGHTS, Autoencoder, expected_size, settings_of
from train.exchange.bring import bring
from train.hub.layout import OWN
from train.hub.upload import OutFile

PART_BYTES: Final = 8 << 20
WHOLE_BYTES: Final = 64 << 20
"""Size up to which a file is downloaded by one request."""
FOREIGN_FILES: Final = 16
"""Files that another tool's folder of one autoencoder has at most; theirs have two to four."""
FOREIGN_BYTES: Final = 64 << 30
"""What such a folder may have at most."""
NAMED: Final = 12
"""Names that a message lists."""


@dataclass(frozen=True)
class Pulled:
    """One autoencoder that is on this disk now."""

    name: str
    folder: Path
    repo: str
    commit: str
    bytes: int
    """Bytes that were downloaded; 0 when all was there already."""
    notes: list[str]


@dataclass(frozen=True)
class PinnedRepo:
    """A repository at one commit, with its files."""

    repo: HubRepo
    commit: str
    files: HubFiles

    def name(self, file: HubFile) -> str:
        """A file's name for messages."""
        return f"{self.files.name}/{file.path}"


@dataclass(frozen=True)
class RemoteSAE:
    """One of sagsae's own autoencoders in a repository."""

    key: str
    """HOOKPOINT/NAME."""
    settings: HubFile
    weights: HubFile

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


def pull(config: PullConfig) -> list[Pulled]:
    """Downloads the autoencoders that are named, and returns where they are: `out` for one, `out`/NAME for each of
    several. Raises UserError for what is not there, or would replace other files; DamagedError for files that are not
    what the hub lists; BusyError when the hub cannot be reached."""
    repo, wanted = parse_source(config.source)
    revision = None if config.revision is None else checked_revision(config.revision)
    commit = repo_state_or_store(repo, revision).commit
    there = PinnedRepo(repo, commit, HubFiles.pinned(HubPlace(repo, commit, "")))
    own = own_saes(there)
    chosen = matching(own, wanted) if wanted is not None else own
    if chosen:
        check_one(repo, chosen, wanted)
        return [pull_own(there, sae, place) for sae, place in placed(chosen, config.out)]
    if wanted is None:
        raise UserError(
            f"{repo}: has no autoencoder that sagsae pushed. Name the folder of one: sagsae pull {repo}/FOLDER"
        )
    return [pull_foreign(there, wanted, config.out, own)]


def parse_source(source: str) -> tuple[HubRepo, str | None]:
    """Returns the repository and the autoencoder in it that OWNER/NAME[/SAE] names."""
    parts = source.rstrip("/").split("/")
    repo = repo_named("/".join(parts[:2]), "model", quoted(source))
    if len(parts) == 2:
        return repo, None
    try:
        return repo, safe_path("/".join(parts[2:]))
    except BadData as error:
        raise UserError(f"{quoted(source)}: {error}. Expected OWNER/NAME/SAE") from error


def repo_state_or_store(repo: HubRepo, revision: str | None) -> RepoState:
    """Returns the state of a model repository. Raises UserError that says how to read a dataset of that name."""
    try:
        return repo_state(repo, revision)
    except HubRefusal as error:
        dataset = HubRepo(repo.name, "dataset")
        try:
            repo_state(dataset)
        except UserError:
            raise error from None
        raise UserError(f"{repo}: is a dataset. If it is a store, read it with --store hf://{repo}") from error


def own_saes(source: PinnedRepo) -> list[RemoteSAE]:
    """Returns sagsae's own autoencoders in a repository, sorted."""
    try:
        there = {file.path: file for file in list_files(source.repo, source.commit, OWN)}
    except FileNotFoundError:
        return []
    found = []
    for path, file in there.items():
        folder, _, name = path.rpartition("/")
        weights = there.get(f"{folder}/{WEIGHTS}")
        if name == SETTINGS and weights is not None and folder.count("/") == 2:
            found.append(RemoteSAE(folder.partition("/")[2], file, weights))
    return sorted(found, key=lambda sae: sae.key)


def matching(own: Sequence[RemoteSAE], wanted: str) -> list[RemoteSAE]:
    """Returns those that a text names: HOOKPOINT/NAME, or NAME alone; with `sagsae/` before it, too."""
    key = wanted.removeprefix(f"{OWN}/")
    return [sae for sae in own if key == sae.key] or [sae for sae in own if key == sae.name]


def check_one(repo: HubRepo, chosen: Sequence[RemoteSAE], wanted: str | None) -> None:
    if wanted is not None and len(chosen) > 1:
        raise UserError(f"{repo}: has {wanted} at several hookpoints. Name one: {listed(sae.key for sae in chosen)}")


def placed(chosen: Sequence[RemoteSAE], out: Path) -> list[tuple[RemoteSAE, Path]]:
    """The folder of each: `out` for one; of several, names that stand twice get their hookpoint."""
    if len(chosen) == 1:
        return [(chosen[0], out)]
    names = [sae.name for sae in chosen]
    return [(sae, out / (sae.name if names.count(sae.name) == 1 else sae.key)) for sae in chosen]


def listed(names: Any) -> str:
    every = list(names)
    return ", ".join(every[:NAMED]) + (f" and {len(every) - NAMED} more" if len(every) > NAMED else "")


# Our own


def pull_own(source: PinnedRepo, sae: RemoteSAE, out: Path) -> Pulled:
    """Downloads one autoencoder of sagsae's. cfg.json is read first: it says how large the weights may be."""
    sizes = {SETTINGS: sae.settings, WEIGHTS: sae.weights}
    if is_there(out, sizes):
        return Pulled(sae.name, out, source.repo.name, source.commit, 0, [])
    if sae.settings.size > SMALL:
        raise DamagedError(f"{source.name(sae.settings)}: has {sae.settings.size:,} bytes; at most {SMALL:,} are ours")
    settings = b"".join(map(bytes, checked_pieces(source, sae.settings)))
    check_weights_size(source, settings, sae)
    with explained(out), progress(f"pull {sae.name}", sae.weights.size, "bytes") as advance:
        with written_together() as write:
            write(out / WEIGHTS, advanced(checked_pieces(source, sae.weights), advance, sae.name))
            write(out / SETTINGS, [settings])
        loadable(out)
    size = sae.settings.size + sae.weights.size
    return Pulled(sae.name, out, source.repo.name, source.commit, size, [])


def loadable(out: Path) -> None:
    """Loads what was downloaded. Removes it again when it is no autoencoder."""
    try:
        Autoencoder.load(out)
    except (UserError, DamagedError):
        for name in (SETTINGS, WEIGHTS):
            (out / name).unlink(missing_ok=True)
        raise


def check_weights_size(source: PinnedRepo, settings: bytes, sae: RemoteSAE) -> None:
    """Raises DamagedError when the hub lists weights of another size than cfg.json describes."""
    with tempfile.TemporaryDirectory(prefix="sagsae-pull-") as scratch:
        (Path(scratch) / SETTINGS).write_bytes(settings)
        try:
            config, d_in, *_ = settings_of(Path(scratch))
        except UserError as error:
            said = str(error).partition(f"({SETTINGS}: ")[2].rstrip(")")
            raise UserError(f"{source.name(sae.settings)}: describes no autoencoder of sagsae ({said})") from error
    least, most = expected_size(config, d_in)
    if not least < sae.weights.size <= most:
        raise DamagedError(
            f"{source.name(sae.weights)}: the hub lists {sae.weights.size:,} bytes; {SETTINGS} describes "
            f"{least:,}. Nothing was downloaded"
        )


def is_there(out: Path, sizes: dict[str, HubFile]) -> bool:
    """Whether a folder has exactly these files already. Raises UserError when it has others of their names."""
    present = {name: out / name for name in sizes if os.path.lexists(out / name)}
    if len(present) == len(sizes) and all(OutFile(name, path).is_at(sizes[name]) for name, path in present.items()):
        return True
    if present:
        raise UserError(f"{out}: holds {' and '.join(sorted(present))} of something else already. Choose another --out")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"--out {out}: is no folder. Choose another --out")
    return False


# Other tools'


def pull_foreign(source: PinnedRepo, folder: str, out: Path, own: Sequence[RemoteSAE]) -> Pulled:
    """Downloads the folder of another tool's autoencoder and imports it."""
    repo = source.repo
    try:
        there = list_files(repo, source.commit, folder)
    except FileNotFoundError:
        has = f". It has {listed(sae.key for sae in own)}" if own else ""
        raise UserError(f"{repo}: has no autoencoder and no folder {folder}{has}") from None
    size = sum(file.size for file in there)
    if len(there) > FOREIGN_FILES or size > FOREIGN_BYTES:
        raise UserError(
            f"{repo}/{folder}: has {len(there):,} files of {size:,} bytes together. Name the folder of one autoencoder"
        )
    with tempfile.TemporaryDirectory(prefix="sagsae-pull-") as scratch:
        place = Path(scratch) / folder.rpartition("/")[2]
        with (
            explained(scratch),
            progress(f"pull {repo}", max(1, size), "bytes") as advance,
            written_together() as write,
        ):
            for file in there:
                path = place / file.path.removeprefix(f"{folder}/")
                write(path, advanced(checked_pieces(source, file), advance, file.path))
        brought = bring(ImportConfig(source=place, out=out))
    return Pulled(brought.name, out, repo.name, source.commit, size, [f"imported from {brought.tool}", *brought.notes])


# Bytes


def checked_pieces(source: PinnedRepo, file: HubFile) -> Iterator[Buffer]:
    """Yields a file's bytes, as many as the hub lists. Raises DamagedError at the end when their digest is not the
    listed one."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    for piece in pieces_of(source, file):
        sha256.update(piece)
        blob.update(piece)
        yield piece
    if (sha256.hexdigest() if file.sha256 else blob.hexdigest()) == (file.sha256 or file.blob):
        return
    described = (
        None if file.sha256 else describe_file(source.repo, source.commit, file.path)
    )  # some servers list other ids
    if described is None or described.sha256 != sha256.hexdigest():
        raise DamagedError(
            f"{source.name(file)}: other bytes came than the hub lists (their digest differs). Try again"
        )


def pieces_of(source: PinnedRepo, file: HubFile) -> Iterator[Buffer]:
    """Yields a file's bytes: a small one as a whole, a large one by ranges."""
    if file.size <= WHOLE_BYTES:
        files = source.files
        data = bytes(files.client.get(*files.place(file.path), file.size)[0])
        if len(data) != file.size:
            raise DamagedError(f"{source.name(file)}: {len(data):,} bytes came, the hub lists {file.size:,}. Try again")
        yield data
        return
    opened = source.files.open(file.path, file.size)
    for begin in range(0, file.size, PART_BYTES):
        yield opened.read(begin, min(PART_BYTES, file.size - begin))


def advanced(pieces: Iterator[Buffer], advance: Any, note: str) -> Iterator[Buffer]:
    for piece in pieces:
        yield piece
        advance(len(piece), note)
