"""Evaluations on disk: what may be replaced, and what a new one keeps of the one before.

A run's evaluation.json has firings.safetensors beside it, with the tensors NAME/positive and NAME/negative, int64
[d_sae] each, for every autoencoder: on how many held-out tokens each latent was above and below zero. evaluation.json
holds the SHA-256 of that file as `firings`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import torch

from shared.errors import UserError
from shared.files import local
from shared.gate import BadData
from shared.progress import say
from shared.record import finite, sealed_json
from train.measure.census import Firings
from train.runs.checkpoint import digested, pieces
from train.runs.folder import RunFolder, read_sealed

MEASURED: Final = "measured.json"
"""The file of an evaluation without a run (`sagsae eval --sae`)."""


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation and the file that holds them."""

    file: Path
    results: dict[str, Any]


def write_evaluation(folder: RunFolder, results: dict[str, Any], firings: Mapping[str, Firings]) -> dict[str, Any]:
    """Writes a run's evaluation.json and firings.safetensors, both or none, and returns the content of the first."""
    signs = {
        f"{name}/{sign}": getattr(counts, sign).to("cpu", torch.int64)
        for name, counts in firings.items()
        for sign in ("positive", "negative")
    }
    digest = hashlib.sha256()
    with local.written_together() as write:
        write(folder.firings, digested(pieces(signs), digest))
        results = {**results, "firings": digest.hexdigest()}
        write(folder.evaluation, [sealed_json(finite(results))])
    return results


def check_replaceable(evaluation: Path) -> None:
    """Raises UserError when the file is not an evaluation. A truncated evaluation may be replaced."""
    if evaluation.is_symlink() or (evaluation.exists() and not evaluation.is_file()):
        raise UserError(f"{evaluation}: is not an ordinary file. Move it away, then run the same command again")
    with evaluation.open("rb") if evaluation.exists() else BytesIO() as file:
        begin = file.read(1024).lstrip()
    if begin and not begin.startswith(b"{"):
        raise UserError(f"{evaluation}: is not an evaluation. Move it away, then run the same command again")


def earlier_evaluation(file: Path) -> dict[str, Any]:
    """Returns the evaluation that is there; empty when it is missing or cannot be read."""
    try:
        found = read_sealed(file)
    except FileNotFoundError:
        return {}
    except BadData as error:
        say(f"{file}: {error}. The losses of the language model in it are not kept")
        return {}
    return found if isinstance(found.get("saes"), list) else {}


def with_losses_of(before: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Adds the language model's losses of an earlier evaluation to `results`, which were measured without the model.
    An autoencoder that the earlier evaluation did not measure gets none."""
    known = {sae.get("name"): sae for sae in before.get("saes", ()) if isinstance(sae, dict)}
    saes = [{**sae, **with_prefix(known.get(sae["name"], {}), "ce_")} for sae in results["saes"]]
    return {**results, **with_prefix(before, "ce_"), "saes": saes}


def with_prefix(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.startswith(prefix)}
