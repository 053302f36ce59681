"""`sagsae features --export neuronpedia`: the files of Neuronpedia's bulk import, from the Parquet files alone.

    OUT/MODEL/LAYER-SET/release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl
                        features/batch-N.jsonl.gz   activations/batch-N.jsonl.gz

A signed latent is one feature whose negative contexts are at the bottom, or two non-negative features (--split). The
folder is there as a whole or not at all, and has the same bytes each time.
"""

import gzip
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.errors import DamagedError, UserError
from shared.files.local import explained, remove_tree, sync, write_file
from shared.gate import BadData, text
from shared.record import to_json
from shared.schemas.features import NEURONPEDIA_NAME, FeaturesConfig
from train.features.code import WINDOW
from train.features.readers.folder import FeatureFolder, open_features
from train.features.readers.texts import TokenTexts, token_texts
from train.features.writers.neuronpedia_rows import (
    NeuronpediaSource,
    Row,
    activation_rows,
    feature_row,
    features_of,
    metadata_rows,
)

BATCH: Final = 256
"""Latents of a file."""
LEVEL: Final = 6
HOOK: Final = re.compile(r"blocks\.(\d{1,4})\.(.+)")
SHORT: Final = {"hook_resid_pre": "res-pre", "hook_resid_mid": "res-mid", "hook_resid_post": "res",
                "hook_attn_out": "att", "hook_mlp_out": "mlp"}  # fmt: skip
"""What Neuronpedia's source sets call a hookpoint."""


@dataclass(frozen=True)
class NeuronpediaExport:
    """What was written."""

    folder: Path
    model: str
    source: str
    features: int
    activations: int
    lens: bool
    """Whether the features have tokens that they raise and lower."""


def export_features(config: FeaturesConfig) -> NeuronpediaExport:
    """Writes an export. Raises UserError, in one sentence, for what Neuronpedia cannot hold, for a folder that is
    there, and when `sagsae features` was not called before."""
    assert config.run is not None, "the settings were checked"
    assert config.out is not None, "the settings were checked"
    folder = open_features(config.run, config.sae)
    source = source_of(folder, config)
    if config.split and not folder.signed:
        raise UserError(f"--split: the latents of {folder.name} have one pole each. Leave --split out")
    texts = token_texts(folder.path)
    out = config.out / source.model / source.id
    if out.exists() and not config.overwrite:
        raise UserError(f"{out}: is there already. Choose another --out, or add --overwrite")
    building = out.with_name(f"{out.name}.building")
    with explained(out.parent):
        if building.exists() or building.is_symlink():
            remove_tree(building)
        building.mkdir(parents=True)
        try:
            features, activations, lens = write_batches(folder, source, texts, building, config.split)
            for name, row in metadata_rows(source, title_of(folder, config.split), WINDOW).items():
                write_file(building / f"{name}.jsonl", lines([row]))
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if out.exists():
            remove_tree(out)
        building.rename(out)
        sync(out.parent)
    return NeuronpediaExport(out, source.model, source.id, features, activations, lens)


def source_of(folder: FeatureFolder, config: FeaturesConfig) -> NeuronpediaSource:
    """The ids of an export. Raises UserError where Neuronpedia has no place for a hookpoint or a model."""
    about = folder.about
    hook = str(about["hook_name"])
    place = HOOK.fullmatch(hook)
    if place is None:
        raise UserError(f"{hook}: Neuronpedia orders features by layer, and this hookpoint names none")
    model = config.model_id or model_id(about)
    if model is None:
        raise UserError("the features do not say which model they are of. Name it with --model-id")
    set_name = config.set_name or default_set(place[2], folder, config.split)
    return NeuronpediaSource(
        model=model,
        layer=int(place[1]),
        set_name=set_name,
        creator=config.creator or "",
        creator_id=config.creator_id,
        hook=hook,
        created=str(about["started"]),
        d_sae=folder.d_sae,
        rows=folder.rows,
        scale=folder.scale,
    )


def model_id(about: Any) -> str | None:
    """The model's name in small letters, without the folders or the owner before it; None where there is none."""
    store = about.get("store")
    name = store.get("model") if isinstance(store, dict) else None
    try:
        found = Path(text(name, "model", 512)).name.lower()
    except BadData:
        return None
    return found if re.fullmatch(NEURONPEDIA_NAME, found) else None


def default_set(point: str, folder: FeatureFolder, split: bool) -> str:
    """A name such as mlp-sa-gsae-512: the hookpoint, then the architecture and width in the autoencoder's name."""
    arch = re.match(r"[a-z-]+(?=-\d)", folder.name)
    short = SHORT.get(point) or re.sub(r"[^a-z0-9]+", "-", point.lower()).strip("-")
    return f"{short}-{arch[0] if arch else 'sae'}-{folder.d_sae}" + ("-split" if split else "")


def title_of(folder: FeatureFolder, split: bool) -> str:
    form = "each pole of a latent is a feature" if split else "signed latents" if folder.signed else "unsigned latents"
    return f"{folder.name} on {folder.about['hook_name']} ({form})"


def write_batches(
    folder: FeatureFolder, source: NeuronpediaSource, texts: TokenTexts, out: Path, split: bool
) -> tuple[int, int, bool]:
    """Writes the files of features and activations. Returns the number of each, and whether there is a logit lens."""
    features = activations = 0
    lens = False
    for number, first in enumerate(range(0, folder.d_sae, BATCH)):
        last = min(folder.d_sae, first + BATCH)
        poles = folder.poles(first, last)
        lens = lens or any(pole.lens for pole in poles)
        found = features_of(poles, folder.examples(first, last), folder.d_sae, split)
        rows = [row for feature in found for row in activation_rows(source, feature, texts)]
        write_gzip(out / "features" / f"batch-{number}.jsonl.gz", [feature_row(source, each, texts) for each in found])
        write_gzip(out / "activations" / f"batch-{number}.jsonl.gz", rows)
        features, activations = features + len(found), activations + len(rows)
    if not features:
        raise DamagedError(f"{folder.path}: holds no latent. Make it again: sagsae features --overwrite")
    return features, activations, lens


def write_gzip(path: Path, rows: Iterable[Row]) -> None:
    write_file(path, gzip.compress(lines(rows), LEVEL, mtime=0))


def lines(rows: Iterable[Row]) -> bytes:
    """JSON lines."""
    return b"".join(to_json(row, ensure_ascii=False).encode() + b"\n" for row in rows)
