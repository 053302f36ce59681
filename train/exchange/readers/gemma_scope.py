"""Reads an autoencoder of Gemma Scope (params.npz) or Gemma Scope 2 (params.safetensors): JumpReLU, b_dec not
subtracted from the input.

The files say neither the model nor the hookpoint; the path does, as the repositories name their folders:
`…-pt-res/layer_20/width_16k/average_l0_71`, `resid_post/layer_12_width_16k_l0_medium`. Those of the embedding (a folder
`embedding` in the path) are for activations that the language model multiplies by sqrt(d_in).
"""

import math
import re
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from shared.gate import BadData
from train.exchange.readers.base import Found, Theirs, brought, found
from train.exchange.readers.ours import restored
from train.exchange.tensors import TensorFile, read_json, read_npz, read_safetensors, readable, take

FILES: Final = ("params.npz", "params.safetensors")
NAMES: Final = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_in", "b_enc": "d_sae", "b_dec": "d_in", "threshold": "d_sae"}
PLACES: Final = {
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "-res": "hook_resid_post",
    "-mlp": "hook_mlp_out",
    "-att": "attn.hook_z",
}
"""Parts of a folder's name, and the hookpoint in a layer."""


def read_gemma_scope(path: Path) -> Found:
    """Raises UserError for a file without these tensors, or a transcoder of Gemma Scope 2."""
    file = read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    folders = path.absolute().parts[:-1]
    with readable(path):
        if "affine_skip_connection" in file.tensors or any("transcoder" in name for name in folders[-4:]):
            raise BadData("is a transcoder, which predicts other activations than it reads: nothing here does")
    shapes = {lower(name) if lower(name) in file.tensors else name: axes for name, axes in NAMES.items()}
    tensors, sizes = take(file, "an autoencoder of Gemma Scope", shapes)
    named = {name: tensors[found_name] for name, found_name in zip(NAMES, shapes, strict=True)}
    embedding = "embedding" in folders
    with readable(path):
        parts = brought(translated(named, math.sqrt(sizes["d_in"]) if embedding else 1.0))
    notes = ["it is one of the embedding: it reads activations multiplied by sqrt(d_in)"] if embedding else []
    done = found(("Gemma Scope", file_kind(file), file), "jumprelu", parts, said_about(path), notes=notes)
    return restored(done, ours_of(path.parent / "sagsae.json"))


def ours_of(path: Path) -> dict[str, Any]:
    """What sagsae's export writes beside the file, whose format has no description; {} for any other."""
    block = read_json(path).get("sagsae") if path.exists() else None
    return block if isinstance(block, dict) else {}


def lower(name: str) -> str:
    return name.replace("W_", "w_")


def file_kind(file: TensorFile) -> str:
    return f"jumprelu ({file.path.suffix.removeprefix('.')})"


def translated(w: dict[str, Tensor], by: float) -> Theirs:
    """`by`: what the model multiplies an embedding by. x = by·e: W_enc/by, W_dec·by."""
    lengths = {"b_enc": w["b_enc"], "theta": w["threshold"]}
    matrices = (w["W_enc"].T.contiguous() / by, w["W_dec"] * by) if by != 1 else (w["W_enc"].T.contiguous(), w["W_dec"])
    return Theirs(*matrices, w["b_dec"], lengths, centred=False)


def said_about(path: Path) -> dict[str, Any]:
    """The hookpoint, where the path names a layer and a place in it."""
    folders = path.absolute().parts[:-1]
    layer = re.search(r"layer_([0-9]{1,4})(?![0-9])", "/".join(folders))
    place = next((PLACES[word] for folder in reversed(folders) for word in PLACES if ends(folder, word)), None)
    return {"hook_name": f"blocks.{int(layer[1])}.{place}"} if layer and place else {}


def ends(folder: str, word: str) -> bool:
    """`-res` ends a repository's name; the others are a folder's name, perhaps with `_all` behind it."""
    return folder.endswith(word) if word.startswith("-") else folder in (word, f"{word}_all")
