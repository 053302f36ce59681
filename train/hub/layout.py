"""The files that a push of autoencoders puts into a repository.

README.md                 the card
HOOKPOINT/NAME/           the other tool's files (sparsify: MODULE/, as its loader wants it)
sagsae/HOOKPOINT/NAME/    sagsae's own files: cfg.json, sae_weights.safetensors
sagsae/saes.json          the rows of the card's table
sagsae/HOOKPOINT/frontier.svg    the card's picture of that hookpoint
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import UserError
from shared.files.base import DOCUMENT_BYTES
from shared.files.hub_files import HubFiles
from shared.gate import SMALL, BadData, safe_path
from shared.hub.client import RepoState
from shared.hub.place import HubPlace, HubRepo
from shared.record import finite, sealed_json
from shared.schema import build
from shared.schemas.exchange import ExportConfig, PushConfig
from train.autoencoder import SETTINGS, WEIGHTS
from train.exchange.about import About, about_sae
from train.exchange.export import Exported, export
from train.exchange.saved import SavedSAE
from train.hub.card import card, is_ours
from train.hub.picture import frontier_pictures
from train.hub.rows import SAERow, merge_rows, read_rows, row_of, rows_text
from train.hub.upload import OutFile

OWN: Final = "sagsae"
ROWS: Final = f"{OWN}/saes.json"
README: Final = "README.md"
OTHER_CARD: Final = f"{OWN}/README.md"
"""Where the card goes when the repository has a README of its owner's."""


@dataclass(frozen=True)
class Known:
    """What the repository holds that a push must know."""

    rows: list[SAERow]
    readme: str | None


def known_in(repo: HubRepo, state: RepoState | None) -> Known:
    """Returns the card and its rows as they are in the repository."""
    if state is None:
        return Known([], None)
    files = HubFiles.pinned(HubPlace(repo, state.commit, ""))
    rows, readme = found(files, ROWS, SMALL), found(files, README, DOCUMENT_BYTES)
    text = None if readme is None else readme.decode("utf-8", "replace")
    return Known(read_rows(rows, f"{repo}/{ROWS}") if rows is not None else [], text)


def found(files: HubFiles, path: str, most: int) -> bytes | None:
    """The content of a small file, None when there is none."""
    try:
        return bytes(files.client.get(*files.place(path), most)[0])
    except FileNotFoundError:
        return None


def files_of_saes(
    config: PushConfig, saes: Sequence[SavedSAE], known: Known, scratch: Path
) -> tuple[list[OutFile], list[str]]:
    """Returns all files of a push, and the names of the autoencoders. Files of another tool are written into `scratch`.
    Raises what an export raises."""
    files: list[OutFile] = []
    rows: list[SAERow] = []
    for number, saved in enumerate(saes):
        place = scratch / str(number)
        about = about_sae(saved)
        exported = exported_to(config, saved, place)
        own = own_folder(about)
        folder, inside = folder_in_repo(config, about, own, place, merge_rows(known.rows, rows))
        rows.append(row_of(saved, about, exported, own, folder, config))
        files += [OutFile(f"{folder}/{name}", path) for name, path in inside.items()]
        if any(row.folder == folder for row in known.rows):  # what an earlier push put there, of other weights
            files += [OutFile(f"{folder}/{name}", None) for name in exported.absent]
        files += own_files(saved, about, own)
    return [*files, *card_files(config, merge_rows(known.rows, rows), known)], [row.name for row in rows]


def exported_to(config: PushConfig, saved: SavedSAE, place: Path) -> Exported:
    asked = {key: getattr(config, key) for key in ("to", "form", "fold_b_dec", "approximate_topk", "force")}
    (exported,) = export(build(ExportConfig, {**asked, "source": saved.folder, "out": place}))
    return exported


def own_folder(about: About) -> str:
    """`sagsae/HOOKPOINT/NAME`. Raises UserError for a name that no repository can have."""
    hook = (about.hook_name or "unknown-hookpoint").replace("/", "_")
    try:
        return safe_path(f"{OWN}/{hook}/{about.name}")
    except BadData as error:
        raise UserError(f"{about.name}: {error}. Rename its folder") from error


def folder_in_repo(
    config: PushConfig, about: About, own: str, place: Path, rows: Sequence[SAERow]
) -> tuple[str, dict[str, Path]]:
    """Returns the folder of the other tool's files, and the files by their path in it. sparsify finds an autoencoder by
    its module's name alone; a second one of the same module gets a folder of its name around it."""
    written = {path.relative_to(place).as_posix(): path for path in sorted(place.rglob("*")) if path.is_file()}
    if config.to == "sparsify":
        module = next(path.rpartition("/")[0] for path in written if path.endswith("/cfg.json"))
        taken = any(row.folder == module and row.own != own for row in rows)
        inside = {path.rpartition("/")[2]: file for path, file in written.items() if path.startswith(f"{module}/")}
        return f"{about.name}/{module}" if taken else module, inside
    key = own.partition("/")[2]
    return f"{key}/trainer_0" if config.to == "dictionary-learning" else key, written


def own_files(saved: SavedSAE, about: About, own: str) -> list[OutFile]:
    """sagsae's own two files. cfg.json is as it is on the disk, unless it names a folder of this machine."""
    path = saved.folder / SETTINGS
    settings: bytes | Path = path
    if dict(about.settings) != saved.about():
        settings = sealed_json(finite(dict(about.settings)))
    return [OutFile(f"{own}/{WEIGHTS}", saved.folder / WEIGHTS), OutFile(f"{own}/{SETTINGS}", settings)]


def card_files(config: PushConfig, rows: list[SAERow], known: Known) -> list[OutFile]:
    """The card, its rows and its pictures. A README that sagsae did not write stays, and the card goes elsewhere."""
    pictures = frontier_pictures(rows)
    ours = known.readme is None or is_ours(known.readme)
    shown = [path if ours else path.removeprefix(f"{OWN}/") for path in pictures]
    text = card(config.repo, rows, config.license, shown, known.readme if ours else None)
    return [
        *(OutFile(path, svg) for path, svg in pictures.items()),
        OutFile(ROWS, rows_text(rows)),
        OutFile(README if ours else OTHER_CARD, text.encode()),
    ]
