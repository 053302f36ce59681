"""Reads an autoencoder that SAELens saved: cfg.json and sae_weights.safetensors.

Its BatchTopK and Matryoshka BatchTopK are saved for inference as jumprelu. Folders of before SAELens 6 keep what is in
`metadata` now beside the architecture, and may lack that. bijumprelu is the architecture that `sagsae export --form
bijumprelu` adds to SAELens; its file of code is neither needed nor run.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from shared.gate import BadData, choice, integer, number, quoted
from train.exchange.readers.base import (
    Theirs,
    TranslatedSAE,
    brought,
    found,
    row_products,
    said_switch,
    said_text,
)
from train.exchange.readers.ours import block_in, restored
from train.exchange.tensors import TensorFile, read_json, read_safetensors, readable, take

SETTINGS: Final = "cfg.json"
WEIGHTS: Final = "sae_weights.safetensors"
MATRICES: Final = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_in", "b_dec": "d_in"}
VECTORS: Final = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "bijumprelu": ("b_enc", "threshold_pos", "threshold_neg", "offset_pos", "offset_neg", "slope_neg"),
}
"""The tensors [d_sae] of each architecture that is read."""
FAMILY: Final = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "signed-topk",
    "bijumprelu": "sa-gsae",
}
PER_TOKEN: Final = ("topk", "abstopk")
NO_AUTOENCODER: Final = "it predicts other activations than it reads"
REFUSED: Final = {
    "transcoder": NO_AUTOENCODER,
    "skip_transcoder": NO_AUTOENCODER,
    "jumprelu_transcoder": NO_AUTOENCODER,
    "jumprelu_skip_transcoder": NO_AUTOENCODER,
    "clt": "it reads one layer and writes to several",
    "temporal": "its code depends on earlier tokens",
    "matching_pursuit": "its code is found by iteration, not by an encoder",
    "batchtopk": "it is a checkpoint of a training; SAELens' save_inference_model writes what is read here",
    "matryoshka_batchtopk": "it is a checkpoint of a training; SAELens' save_inference_model writes what is read here",
}
STEEPEST: Final = 1e30
"""Largest slope of a negative pole, and one over the smallest: float32 holds its logarithm's exponential."""
ROUNDING: Final = 2.0**-23
"""How far float32 may be off, relative to a number."""
SCALING: Final = ("finetuning_scaling_factor", "scaling_factor")
"""Tensors of folders of before SAELens 6, all ones where nothing was finetuned."""


def read_saelens(folder: Path, factor: float | None = None) -> TranslatedSAE:
    """`factor`: SAELens' norm_scaling_factor, for a folder with normalize_activations expected_average_only_in. Raises
    UserError for what is no such folder, or has no equal here."""
    cfg = read_json(folder / SETTINGS)
    file = read_safetensors(folder / WEIGHTS)
    with readable(folder / SETTINGS):
        kind = architecture_of(cfg)
        scaling = activation_factor(cfg, factor)
        about = said_about(cfg)
        check_scaling(cfg, file)
    names = [name for name in VECTORS[kind] if kind != "abstopk" or name in file.tensors]
    shapes = MATRICES | dict.fromkeys(names, "d_sae")
    tensors, sizes = take(file, f"a SAELens autoencoder of architecture {kind}", shapes, SCALING)
    with readable(folder / SETTINGS):
        check_sizes(cfg, sizes)
        keeps = keeps_norms(cfg, kind)
        k = k_of(cfg, sizes["d_sae"]) if kind in PER_TOKEN else 0
        centred = said_switch(cfg, "apply_b_dec_to_input", True)
    with readable(file.path):
        parts = brought(translated(kind, tensors, centred, scaling, keeps))
    return restored(found(("SAELens", kind, file), FAMILY[kind], parts, about, k), block_in(cfg.get("metadata")))


def architecture_of(cfg: dict[str, Any]) -> str:
    """Raises BadData for one that is not read."""
    activation = said_text(cfg, "activation_fn_str", "activation_fn") or "relu"
    old = "topk" if activation == "topk" else "standard"
    name = said_text(cfg, "architecture") or old
    if name == "standard" and old == "topk":
        name = "topk"
    if name in REFUSED:
        raise BadData(f"says architecture {name}, which is not read: {REFUSED[name]}")
    if activation not in ("relu", "topk"):
        raise BadData(f"says activation_fn {quoted(activation)}; relu and topk are read")
    return choice(name, "architecture", tuple(VECTORS))


def activation_factor(cfg: dict[str, Any], factor: float | None) -> float:
    """s, which the activations were multiplied by. Raises BadData where it depends on the token, or is not said."""
    said = cfg.get("normalize_activations")  # true or false in early releases
    kind = "expected_average_only_in" if said is True else said_text(cfg, "normalize_activations") if said else "none"
    if kind == "expected_average_only_in":
        if factor is None:
            raise BadData(
                "says normalize_activations expected_average_only_in: its weights are for activations times a factor "
                "that the folder does not say. Give --norm-factor (norm_scaling_factor in SAELens' list of releases)"
            )
        return number(factor, "--norm-factor", 1e-9, 1e9)
    if kind != "none":
        raise BadData(
            f"says normalize_activations {quoted(kind)}, which divides each token by its own length: nothing here does"
        )
    if factor is not None:
        raise BadData("says normalize_activations none, so there is nothing to multiply. Leave --norm-factor out")
    return 1.0


def said_about(cfg: dict[str, Any]) -> dict[str, Any]:
    """model, hook_name, context and prepend_bos."""
    metadata = cfg.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise BadData(f"metadata is {quoted(metadata)} instead of an object")
    values = {**cfg, **(metadata or {})}
    hook_name = said_text(values, "hook_name", "hook_point")
    if values.get("hook_head_index") is not None:
        raise BadData(f"reads head {quoted(values['hook_head_index'])} alone, and hookpoints have all heads here")
    if values.get("hook_name_out") not in (None, hook_name):
        raise BadData("is a transcoder: it predicts other activations than it reads")
    context = values.get("context_size")
    return {
        "model": said_text(values, "model_name"),
        "hook_name": hook_name,
        "context": None if context is None else integer(context, "context_size", 1),
        "prepend_bos": said_switch(values, "prepend_bos", False) if values.get("prepend_bos") is not None else None,
    }


def check_sizes(cfg: dict[str, Any], sizes: dict[str, int]) -> None:
    """Raises BadData where cfg.json and the tensors disagree."""
    for name in ("d_in", "d_sae"):
        if cfg.get(name, sizes[name]) != sizes[name]:
            raise BadData(f"says {name} {quoted(cfg[name])}, and {WEIGHTS} has {sizes[name]:,}")


def keeps_norms(cfg: dict[str, Any], kind: str) -> bool:
    """Whether decoder rows stay as they are: per-token TopK chooses by size, and a gated autoencoder of ours may have
    had a free decoder."""
    if kind in PER_TOKEN:
        return not said_switch(cfg, "rescale_acts_by_decoder_norm", False)
    return kind == "gated" and block_in(cfg.get("metadata")).get("decoder") == "free"


def check_scaling(cfg: dict[str, Any], file: TensorFile) -> None:
    """Raises BadData where the code is multiplied by finetuned factors."""
    ones = all(bool((file.tensors[name] == 1).all()) for name in SCALING if name in file.tensors)
    if said_switch(cfg, "finetuning_scaling_factor", False) or not ones:
        raise BadData("has finetuning_scaling_factor, which is not read. Fold it into W_dec in SAELens, and save again")


def k_of(cfg: dict[str, Any], d_sae: int) -> int:
    arguments = cfg.get("activation_fn_kwargs")
    old = arguments if isinstance(arguments, dict) else {}
    return integer(cfg.get("k", old.get("k")), "k", 1, d_sae)


def translated(kind: str, w: dict[str, Tensor], centred: bool, factor: float, keeps: bool) -> Theirs:
    """Gated: π = u + b_gate > 0 is u > -b_gate."""
    matrices = (w["W_enc"].T.contiguous(), w["W_dec"], w["b_dec"])
    rest: dict[str, Any] = {"centred": centred, "factor": factor, "keeps_norms": keeps}
    if kind == "bijumprelu":
        lengths, r = two_poles(w, matrices[0], centred)
        return Theirs(*matrices, lengths, r, factor=factor)
    if kind == "gated":
        return Theirs(*matrices, {"theta": -w["b_gate"], "b": w["b_mag"]}, w["r_mag"], **rest)
    lengths = {"b_enc": w.get("b_enc", torch.zeros(len(w["W_dec"])))}
    if kind == "jumprelu":
        lengths["theta"] = w["threshold"]
    return Theirs(*matrices, lengths, **rest)


def two_poles(w: dict[str, Tensor], W_enc: Tensor, centred: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Returns θ, b and r of the gates [2, d_sae] that are Bi-JumpReLU, for an input from which b_dec is subtracted:

        z = u + c        z > T⁺  is  u > T⁺ - c        -ρz > T⁻  is  -u > T⁻/ρ + c        r = (0, log ρ)

    c = b_enc, and W_enc b_dec more where the tool does not subtract b_dec. A c that is the rounding of b_enc alone is
    zero. Raises BadData for what no gates compute: two signs at once, or a value of the other sign than its pole's."""
    slope = w["slope_neg"].double()
    if bool((slope < STEEPEST**-1).any() | (slope > STEEPEST).any()):
        lowest, highest = slope.min().item(), slope.max().item()
        raise BadData(
            f"has slope_neg from {lowest:g} to {highest:g}; slopes from {STEEPEST**-1:.0e} to {STEEPEST:.0e} are read"
        )
    shift = torch.zeros_like(slope) if centred else row_products(W_enc, w["b_dec"])
    c = w["b_enc"].double() + shift
    c = torch.where(c.abs() <= ROUNDING * shift.abs(), 0.0, c)
    threshold, offset = (torch.stack([w[f"{name}_pos"], w[f"{name}_neg"]]).double() for name in ("threshold", "offset"))
    if bool((threshold + offset < 0).any()):
        raise BadData("has a threshold below minus its offset: a pole would have values of the other sign")
    theta = torch.stack([threshold[0] - c, threshold[1] / slope + c])
    if bool((theta < 0).any()):
        raise BadData("has a threshold below b_enc: both poles of a latent could be active at once")
    b = torch.stack([offset[0] + c, offset[1] - slope * c])
    return {"theta": theta, "b": b}, torch.stack([torch.zeros_like(slope), slope.log()]).float()
