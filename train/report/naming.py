"""The short names that a report shows for runs and autoencoders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shared.saes import ARCHITECTURES
from train.report.data import ReportedRun
from train.report.sae import MeasuredSAE

SHORTEST = 2
"""Number of the last folders of a path that its name has at least: `runs/first`."""


def folder_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Returns the ends of the folders' paths, as short as tells them apart."""
    whole = {folder: folder.absolute().parts[1:] for folder in folders}
    longest = max(map(len, whole.values()), default=0)
    for count in range(SHORTEST, longest + 1):
        names = {folder: "/".join(parts[-count:]) for folder, parts in whole.items()}
        if len(set(names.values())) == len(names):
            return names
    return {folder: str(folder) for folder in folders}


def labelled(runs: Sequence[ReportedRun]) -> tuple[list[ReportedRun], list[str]]:
    """Leaves out of labels the settings that all autoencoders of an architecture share. Returns the runs, and a
    sentence for each set of settings that was left out."""
    shared = _shared([sae for run in runs for sae in run.saes])
    told = [
        replace(run, evaluation=run.evaluation.model_copy(update={"saes": tuple(_told(s, shared) for s in run.saes)}))
        for run in runs
    ]
    owners: dict[tuple[str, ...], list[str]] = {}
    for arch, settings in shared.items():
        if settings:
            owners.setdefault(settings, []).append(ARCHITECTURES[arch].label)
    return told, [
        f"Every {_either(archs)} autoencoder on this page has {', '.join(settings)}; labels leave it out."
        for settings, archs in owners.items()
    ]


def _either(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _shared(saes: Sequence[MeasuredSAE]) -> dict[str, tuple[str, ...]]:
    """Returns, by architecture, the settings that differ from the default in the same way in all its autoencoders."""
    found: dict[str, tuple[str, ...]] = {}
    for sae in saes:
        own = sae.special
        found[sae.arch] = tuple(setting for setting in found.get(sae.arch, own) if setting in own)
    return found


def _told(sae: MeasuredSAE, shared: dict[str, tuple[str, ...]]) -> MeasuredSAE:
    told = "-".join(setting for setting in sae.special if setting not in shared[sae.arch])
    return sae.model_copy(update={"told": told})
