"""Writes trained autoencoders as files that other tools load: all of those that were asked for, or none.

OUT/                    one autoencoder
OUT/HOOKPOINT/NAME/     several of a run (sparsify: OUT/NAME/, in which it makes a folder for the hookpoint)
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.errors import UserError
from shared.files import local
from shared.files.base import WHOLE_BYTES
from shared.files.local import explained, read_whole
from shared.gate import BadData, parse_json
from shared.schemas.exchange import ExportConfig
from train.autoencoder import Autoencoder
from train.data.order import split_rows
from train.data.rows import HookRows
from train.exchange.about import About, about_sae, local_store
from train.exchange.forms import TopKForm, reconstruct_topk
from train.exchange.saved import SavedSAE, find_saes
from train.exchange.writers import Written, dictionary_learning, gemma_scope, saelens, sparsify
from train.measure.metrics import ErrorSums, mean_row, read_heldout
from train.runs.folder import RunFolder
from train.runs.owner import owner_of

WRITERS: Final = MappingProxyType(
    {
        "saelens": saelens.write,
        "dictionary-learning": dictionary_learning.write,
        "sparsify": sparsify.write,
        "gemma-scope": gemma_scope.write,
    }
)
"""By tool."""
DESCRIPTIONS: Final = ("cfg.json", "config.json", "sagsae.json")
"""Names of the files in which an export says whose it is."""
ROWS_TO_MEASURE: Final = 4096
"""Held-out rows on which an approximation is compared with the autoencoder."""


@dataclass(frozen=True)
class Exported:
    """One autoencoder in another tool's files."""

    name: str
    folder: Path
    tool: str
    form: str
    """The tool's architecture."""
    width: int
    """Its number of latents: twice the autoencoder's where both poles of a latent are latents of their own."""
    notes: list[str]
    """What a reader has to know, a sentence each."""
    absent: tuple[str, ...] = ()
    """Files that another export for this tool has, and this one does not."""


def export(config: ExportConfig) -> list[Exported]:
    """Writes one autoencoder, or all of a run, for another tool. Raises UserError when the tool's format cannot say
    what an autoencoder is, or when files are in the way that no export wrote; then nothing is written."""
    found = find_saes(config.source)
    check_out(config.out)
    done, obsolete = [], list[Path]()
    with explained(config.out), nothing_left(config.out), local.written_together() as write:
        for saved in found:
            sae, about = saved.load(), about_sae(saved)
            written = WRITERS[config.to](sae, about, config)
            folder = config.out if len(found) == 1 else config.out / subfolder(about, config)
            absent = tuple(name for name in written.optional if name not in written.files)
            for place in (folder / path for path in (*absent, *written.files)):
                check_replaceable(place, config.overwrite)
            for path, content in written.files.items():
                write(folder / path, content)
            obsolete += [folder / name for name in absent]
            notes = [*written.notes, *measured_loss(saved, sae, written)]
            done.append(Exported(saved.name, folder, config.to, written.form, written.width, notes, absent))
        for place in obsolete:
            place.unlink(missing_ok=True)
    return done


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """Removes the empty folders of an export that failed."""
    existed = out.exists()
    try:
        yield
    except BaseException:
        for folder in [] if existed else [*sorted(out.rglob("*"), reverse=True), out]:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def subfolder(about: About, config: ExportConfig) -> Path:
    """Returns the folder of one of several autoencoders. SAELens' id on the hub is the same path."""
    hook = None if config.to == "sparsify" else about.hook_folder
    return Path(hook, about.name) if hook else Path(about.name)


def check_out(out: Path) -> None:
    """Raises UserError when files may not be written there: into a run, a store or an autoencoder of sagsae."""
    owner = None if is_export(out) else owner_of(out / "any")
    if owner:
        raise UserError(f"--out {out}: is in {owner}. Choose another --out")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"--out {out}: is no folder. Choose another --out")


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Raises UserError when there is something at `path` that must stay: a file that no export wrote, or any without
    `overwrite`."""
    if not os.path.lexists(path):
        return
    ours = path.is_file() and not path.is_symlink() and is_export(path.parent)
    if not ours:
        raise UserError(f"{path}: exists, and sagsae export did not write it. Choose another --out")
    if not overwrite:
        raise UserError(f"{path}: exists. Replace the earlier export with --overwrite, or choose another --out")


def is_export(folder: Path) -> bool:
    """Whether an export wrote the description in a folder."""
    return any(says_sagsae(folder / name) for name in DESCRIPTIONS)


def says_sagsae(path: Path) -> bool:
    try:
        found = parse_json(read_whole(path, WHOLE_BYTES), WHOLE_BYTES)
    except (OSError, UserError, BadData):
        return False
    places = (found, found.get("metadata")) if isinstance(found, dict) else ()
    return any(isinstance(place, dict) and isinstance(place.get("sagsae"), dict) for place in places)


def measured_loss(saved: SavedSAE, sae: Autoencoder, written: Written) -> Iterable[str]:
    """Returns what an approximation loses on the run's held-out rows, in words; nothing for an exact export."""
    if written.approximation is None:
        return []
    k = written.approximation.k
    x = heldout_rows(saved, sae)
    if x is None:
        return [f"an approximation (TopK, k {k}); R² was not measured, for the run's store is not on this machine"]
    ours, theirs = r2_of(x, sae), r2_of(x, approximated(written.approximation))
    return [
        f"an approximation (TopK, k {k}): R² {theirs:.4f} instead of {ours:.4f}, {ours - theirs:+.4f} lost, on "
        f"{len(x):,} held-out rows"
    ]


def approximated(form: TopKForm) -> Callable[[Tensor], Tensor]:
    return lambda x: reconstruct_topk(form, x)


def heldout_rows(saved: SavedSAE, sae: Autoencoder) -> Float[Tensor, "rows d_in"] | None:
    """Returns the first held-out rows of the run's store; None where the store is not on this machine or has rows of
    another width."""
    config = RunFolder(saved.run).config() if saved.run else None
    found = local_store(config)
    if config is None or found is None:
        return None
    store, hook = found
    rows = HookRows.of(store, hook)
    if store.spec.hookpoints[hook].d_in != sae.d_in:
        return None
    heldout = read_heldout(rows, split_rows(store.token_rows(check=False), config).heldout)[:ROWS_TO_MEASURE]
    return heldout.float() if len(heldout) > 1 else None


def r2_of(x: Float[Tensor, "rows d_in"], reconstruct: Callable[[Tensor], Tensor]) -> float:
    """Returns R² of a reconstruction, about the rows' mean."""
    sums = ErrorSums(mean_row(x))
    for part in torch.split(x, 256):
        sums.add_(part, reconstruct(part))
    return sums.r2
