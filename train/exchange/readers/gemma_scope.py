"""Reads an autoencoder of Gemma Scope (params.npz) or Gemma Scope 2 (params.safetensors, config.json): JumpReLU, b_dec
not subtracted from the input.

Where no config.json says the model and the hookpoint, the path does, as the repositories name their folders:
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`, `resid_post/layer_12_width_16k_l0_medium`. Those of the
embedding (a folder `embedding` in the path) are for activations that the language model multiplies by sqrt(d_in).
"""

import math
import re
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from shared.gate import BadData, quoted
from train.exchange.readers.base import Theirs, TranslatedSAE, brought, found, said_text
from train.exchange.readers.ours import block_beside, restored
from train.exchange.tensors import TensorFile, read_json, read_npz, read_safetensors, readable, take

FILES: Final = ("params.npz", "params.safetensors")
SETTINGS: Final = "config.json"
EMBEDDING: Final = "embedding"
NAMES: Final = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_in", "b_enc": "d_sae", "b_dec": "d_in", "threshold": "d_sae"}
PLACES: Final = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
    "-res": "hook_resid_post",
    "-mlp": "hook_mlp_out",
    "-att": "attn.hook_z",
}
"""Ends of a folder's name, and the hookpoint in a layer. Those of attention read what goes into its output matrix."""
MODELS: Final = {
    r"gemma-scope-2-(\w+)-(pt|it)": "google/gemma-3-{0}-{1}",
    r"gemma-scope-(\d+b)-pt-": "google/gemma-2-{0}",
    r"gemma-scope-(\d+b)-it-": "google/gemma-2-{0}-it",
}
"""Names of repositories, and the language model."""
SCALING: Final = "scaling_factor"
"""A tensor of the first version, all ones where nothing was finetuned."""


def read_gemma_scope(path: Path) -> TranslatedSAE:
    """Raises UserError for a file without these tensors, or a transcoder."""
    file = read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    folders = path.absolute().parts[:-1]
    settings = read_json(path.parent / SETTINGS) if path.suffix != ".npz" and (path.parent / SETTINGS).exists() else {}
    with readable(path):
        check_kind(file, folders, settings)
        about = {**said_by(folders), **({"model": model} if (model := said_text(settings, "model_name")) else {})}
    shapes = {lower(name) if lower(name) in file.tensors else name: axes for name, axes in NAMES.items()}
    tensors, sizes = take(file, "an autoencoder of Gemma Scope", shapes, (SCALING,))
    named = {name: tensors[found_name] for name, found_name in zip(NAMES, shapes, strict=True)}
    embedding = EMBEDDING in folders
    with readable(path):
        parts = brought(translated(named, math.sqrt(sizes["d_in"]) if embedding else 1.0))
    notes = ["it is one of the embedding: it reads activations multiplied by sqrt(d_in)"] if embedding else []
    kind = f"jumprelu ({path.suffix.removeprefix('.')})"
    done = found(("Gemma Scope", kind, file), "jumprelu", parts, about, notes=notes)
    return restored(done, block_beside(path.parent))


def check_kind(file: TensorFile, folders: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Raises BadData for a transcoder, whose tensors can have the same names, and for finetuned factors."""
    reads, writes = settings.get("hf_hook_point_in"), settings.get("hf_hook_point_out")
    named = any("transcoder" in name or name == "clt" for name in folders[-4:])
    if named or "affine_skip_connection" in file.tensors or writes not in (None, reads):
        raise BadData("is a transcoder, which predicts other activations than it reads: nothing here does")
    if settings.get("architecture") not in (None, "jump_relu"):
        raise BadData(f"has the architecture {quoted(settings['architecture'])} in its {SETTINGS}; jump_relu is read")
    if SCALING in file.tensors and not bool((file.tensors[SCALING] == 1).all()):
        raise BadData(f"has {SCALING}, which is not read. Fold it into W_dec")


def lower(name: str) -> str:
    return name.replace("W_", "w_")


def translated(w: dict[str, Tensor], by: float) -> Theirs:
    """`by`: what the model multiplies an embedding by. x = by·e: W_enc/by, W_dec·by."""
    lengths = {"b_enc": w["b_enc"], "theta": w["threshold"]}
    matrices = (w["W_enc"].T.contiguous() / by, w["W_dec"] * by) if by != 1 else (w["W_enc"].T.contiguous(), w["W_dec"])
    return Theirs(*matrices, w["b_dec"], lengths, centred=False)


def said_by(folders: tuple[str, ...]) -> dict[str, Any]:
    """The model and the hookpoint, where the path names them."""
    whole = "/".join(folders)
    layer = re.search(r"layer_([0-9]{1,4})(?![0-9])", whole)
    place = next((PLACES[word] for folder in reversed(folders) for word in PLACES if ends(folder, word)), None)
    models = [name.format(*match.groups()) for pattern, name in MODELS.items() if (match := re.search(pattern, whole))]
    hook = "hook_embed" if EMBEDDING in folders else f"blocks.{int(layer[1])}.{place}" if layer and place else None
    return {"model": models[0] if models else None, "hook_name": hook}


def ends(folder: str, word: str) -> bool:
    """`-res` ends a repository's name; the others are a folder's name, perhaps with `_all` behind it."""
    return folder.endswith(word) if word.startswith("-") else folder in (word, f"{word}_all")
