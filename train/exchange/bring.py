"""Brings in an autoencoder of another tool: recognises the tool by its files, reads them, writes a folder that
`train.load` reads."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.errors import UserError
from shared.files.local import explained, sync
from shared.gate import BadData, quoted
from shared.schemas.exchange import ImportConfig
from train.autoencoder import SETTINGS, WEIGHTS, Autoencoder
from train.exchange.readers.base import TranslatedSAE
from train.exchange.readers.dictionary_learning import read_dictionary_learning
from train.exchange.readers.gemma_scope import FILES as GEMMA_FILES
from train.exchange.readers.gemma_scope import read_gemma_scope
from train.exchange.readers.llamascopium import read_llamascopium
from train.exchange.readers.openai import read_openai
from train.exchange.readers.saelens import read_saelens
from train.exchange.readers.sparsify import read_sparsify
from train.runs.folder import read_sealed


@dataclass(frozen=True)
class Format:
    """A tool's format on disk."""

    tool: str
    files: tuple[str, ...]
    """What its folder holds."""
    read: Callable[[Path], TranslatedSAE]
    """Reads the folder, or the one file."""


FORMATS: Final = {
    "saelens": Format("SAELens", ("cfg.json", "sae_weights.safetensors"), read_saelens),
    "sparsify": Format("sparsify", ("cfg.json", "sae.safetensors"), read_sparsify),
    "dictionary-learning": Format("dictionary_learning", ("config.json", "ae.pt"), read_dictionary_learning),
    "llamascopium": Format("Llamascopium", ("config.json", "sae_weights.safetensors"), read_llamascopium),
    "gemma-scope": Format("Gemma Scope", ("params.npz or params.safetensors",), read_gemma_scope),
    "openai": Format("OpenAI", ("one .pt file",), read_openai),
}
"""By the name that `--format` takes, in the order in which a folder is tried."""
OURS: Final = frozenset({SETTINGS, WEIGHTS})
UNSAID: Final = dict.fromkeys(("model", "hook_name", "context", "bos_id"))
"""What cfg.json says in any case: null where it is not known."""
LLAMA_SCOPE: Final = (
    "is Llama Scope, for which tools disagree about the threshold. In SAELens' environment: "
    "SAE.from_pretrained(release, sae_id).save_model(folder); then import that folder"
)


@dataclass(frozen=True)
class Imported:
    """What was brought in."""

    folder: Path
    tool: str
    format: str
    """The tool's name of the architecture."""
    name: str
    """The autoencoder's name here: architecture and width."""
    d_in: int
    d_sae: int
    model: str | None
    hook_name: str | None
    notes: list[str]


def bring(config: ImportConfig) -> Imported:
    """Reads `config.source`, a folder or a file on this disk, and writes `config.out`. Raises UserError for what is no
    autoencoder of a known tool, or has no equal here, and for a folder that holds something else."""
    check_target(config.out, config.overwrite)
    format, place = recognised(config.source, config.format)
    if config.norm_factor is not None and format != "saelens":
        raise UserError("--norm-factor: is SAELens' norm_scaling_factor; no other tool's format leaves it out")
    found = read_saelens(place, config.norm_factor) if format == "saelens" else FORMATS[format].read(place)
    asked = {"model": {"name": config.model} if config.model else None, "hook_name": config.hook}
    about = {**UNSAID, **found.about, **{name: value for name, value in asked.items() if value is not None}}
    write_folder(config.out, found, {**about, "imported": record_of(found, config.source)}, config.overwrite)
    return Imported(
        config.out,
        found.tool,
        found.format,
        found.config.name,
        found.weights.W_enc.shape[1],
        len(found.weights.W_enc),
        about["model"]["name"] if about["model"] else None,
        about["hook_name"],
        found.notes,
    )


def record_of(found: TranslatedSAE, source: Path) -> dict[str, Any]:
    """The `imported` block of cfg.json."""
    return {
        "tool": found.tool,
        "format": found.format,
        "source": source.absolute().name,
        "file": found.file.path.name,
        "sha256": found.file.sha256,
        "prepend_bos": found.prepends_bos,
        "norms": found.norms,
        "notes": found.notes,
    }


# whose it is


def recognised(source: Path, asked: str) -> tuple[str, Path]:
    """The format and the folder or file to read. Raises UserError when it is none, or not the one that is
    asked for."""
    with explained(source):
        if not source.exists():
            raise UserError(
                f"{source}: is no folder or file here. Give the folder of an autoencoder; sagsae pull fetches one from "
                "the Hugging Face hub"
            )
        place = source if source.is_dir() or source.suffix in (".npz", ".pt", ".pth") else source.parent
        if source.is_file() and source.name in (*GEMMA_FILES, "ae.pt"):
            place = source if source.name in GEMMA_FILES else source.parent
        found = of_folder(place) if place.is_dir() else of_file(place)
    if found is None:
        raise UserError(nothing_known(source, place))
    format, path = found
    if asked not in ("auto", format):
        files = " and ".join(FORMATS[format].files)
        raise UserError(
            f"--format {asked}: {source} is of {FORMATS[format].tool} ({files}), not of {FORMATS[asked].tool}. "
            "Leave --format out"
        )
    return format, path


def of_file(path: Path) -> tuple[str, Path] | None:
    """A file that stands for itself."""
    if path.name in GEMMA_FILES or path.suffix == ".npz":
        return "gemma-scope", path
    return ("openai", path) if path.suffix in (".pt", ".pth") else None


def of_folder(folder: Path) -> tuple[str, Path] | None:
    """The first format whose files are all there. Raises UserError for a folder of ours, and for Llama Scope."""
    names = {path.name for path in folder.iterdir()}
    if names >= OURS and is_ours(folder):
        raise UserError(f"{folder}: is sagsae's own folder already; train.load and sagsae eval --sae read it as it is")
    if {"hyperparams.json", "checkpoints"} <= names:
        raise UserError(f"{folder}: {LLAMA_SCOPE}")
    for name in ("saelens", "sparsify", "dictionary-learning", "llamascopium"):
        if set(FORMATS[name].files) <= names:
            return name, folder
    if params := [name for name in GEMMA_FILES if name in names]:
        return "gemma-scope", folder / params[0]
    pickles = [name for name in names if name.endswith((".pt", ".pth")) and name != "ae.pt"]
    return ("openai", folder / pickles[0]) if len(pickles) == 1 else None


def is_ours(folder: Path) -> bool:
    """Whether its cfg.json is one that Autoencoder.save wrote."""
    try:
        return {"arch", "d_sae", "scale"} <= read_sealed(folder / SETTINGS).keys()
    except (BadData, FileNotFoundError):
        return False


def nothing_known(source: Path, place: Path) -> str:
    """One sentence with what was looked for, and what is there."""
    wanted = "; ".join(f"{', '.join(each.files)} ({each.tool})" for each in FORMATS.values())
    if not place.is_dir():
        return f"{source}: is no autoencoder that is read here. These are: {wanted}"
    inside = sorted(path for path in place.iterdir() if path.is_dir())
    below = next((path for path in inside if any(path.glob("*.safetensors")) or (path / "ae.pt").exists()), None)
    hint = f". Give one of its folders, such as {below}" if below else ""
    there = ", ".join(quoted(path.name, 40) for path in sorted(place.iterdir())[:6]) or "nothing"
    return f"{source}: holds {there}, and none of: {wanted}{hint}"


# writing


def check_target(out: Path, overwrite: bool) -> None:
    """Raises UserError where the folder holds anything but an imported autoencoder that may be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: is a file or a link. Choose another --out")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not names:
        return
    if not names <= OURS or not is_imported(out):
        raise UserError(
            f"--out {out}: exists and holds something else than an imported autoencoder. Choose another --out"
        )
    if not overwrite:
        raise UserError(f"--out {out}: holds an imported autoencoder. Choose another --out, or replace it: --overwrite")


def is_imported(folder: Path) -> bool:
    try:
        return isinstance(read_sealed(folder / SETTINGS).get("imported"), dict)
    except (BadData, FileNotFoundError):
        return False


def write_folder(out: Path, found: TranslatedSAE, about: dict[str, Any], overwrite: bool) -> None:
    """All of the folder or nothing: it is built beside its place and renamed."""
    with explained(f"--out {out}"), built_beside(out) as building:
        Autoencoder(found.config, found.weights, found.scale).save(building, about)
        Autoencoder.load(building)
        check_target(out, overwrite)
        if out.exists():
            out.rename(building.with_name(f"{building.name}.before"))
        building.rename(out)
        sync(out.parent.absolute())


@contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """An empty folder on the same disk; whatever is left of it in the end is removed."""
    building = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    before = building.with_name(f"{building.name}.before")
    building.mkdir(parents=True)
    try:
        yield building
    except BaseException:
        if before.exists() and not out.exists():
            before.rename(out)
        raise
    finally:
        for each in (building, before):
            shutil.rmtree(each, ignore_errors=True)
