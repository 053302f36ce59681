"""Reads an autoencoder that dictionary_learning saved: config.json, whose `trainer` names the class, and ae.pt."""

import re
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from shared.gate import BadData, choice, integer, quoted
from train.exchange.readers.base import Theirs, TranslatedSAE, brought, found, said_text
from train.exchange.readers.ours import block_in, restored
from train.exchange.tensors import TensorFile, read_json, read_pickled, readable, take

SETTINGS: Final = "config.json"
WEIGHTS: Final = "ae.pt"
LINEAR: Final = {"encoder.weight": "dict_size activation_dim", "decoder.weight": "activation_dim dict_size"}
PLAIN: Final = {"W_enc": "activation_dim dict_size", "W_dec": "dict_size activation_dim", "b_enc": "dict_size"}
BIASED: Final = {**LINEAR, "encoder.bias": "dict_size"}
GATES: Final = dict.fromkeys(("gate_bias", "mag_bias", "r_mag"), "dict_size")
CENTRE: Final = {"b_dec": "activation_dim"}
SHAPES: Final = {
    "AutoEncoder": {**BIASED, "bias": "activation_dim"},
    "AutoEncoderNew": {**BIASED, "decoder.bias": "activation_dim"},
    "GatedAutoEncoder": {**LINEAR, **GATES, "decoder_bias": "activation_dim"},
    "JumpReluAutoEncoder": {**PLAIN, **CENTRE, "threshold": "dict_size"},
    "BatchTopKSAE": {**BIASED, **CENTRE, "threshold": "", "k": ""},
    "MatryoshkaBatchTopKSAE": {**PLAIN, **CENTRE, "threshold": "", "k": ""},
    "AutoEncoderTopK": {**BIASED, **CENTRE, "k": ""},
}
"""The tensors of each class that is read."""
BESIDE: Final = {"MatryoshkaBatchTopKSAE": ("group_sizes",), "AutoEncoderTopK": ("threshold",)}
"""Tensors that decide nothing: all groups are used after training, and TopK chooses by size."""
FAMILY: Final = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "BatchTopKSAE": "batch-topk",
    "MatryoshkaBatchTopKSAE": "batch-topk",
    "AutoEncoderTopK": "topk",
}
UNCENTRED: Final = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Those that do not subtract their bias from the input."""
HOOKS: Final = {
    "resid_post": "hook_resid_post",
    "resid": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}


def read_dictionary_learning(folder: Path) -> TranslatedSAE:
    """Raises UserError for what is no such folder, or has no equal here."""
    cfg = read_json(folder / SETTINGS)
    with readable(folder / SETTINGS):
        trainer = cfg.get("trainer")
        if not isinstance(trainer, dict):
            raise BadData(f"trainer is {quoted(trainer)} instead of an object")
        kind = choice(trainer.get("dict_class"), "dict_class", tuple(SHAPES))
        about = said_about(cfg, trainer)
    file = read_pickled(folder / WEIGHTS)
    shapes = {
        name: axes for name, axes in SHAPES[kind].items() if name != "k" or "k" in file.tensors or "k" not in trainer
    }
    tensors, sizes = take(file, f"{kind} of dictionary_learning", shapes, BESIDE.get(kind, ()))
    with readable(folder / SETTINGS):
        for name in ("activation_dim", "dict_size"):
            if trainer.get(name, sizes[name]) != sizes[name]:
                raise BadData(f"says {name} {quoted(trainer[name])}, and {WEIGHTS} has {sizes[name]:,}")
    with readable(file.path):
        k = k_of(file, trainer, sizes["dict_size"]) if "k" in SHAPES[kind] else 0
        free = kind == "GatedAutoEncoder" and block_in(cfg).get("decoder") == "free"
        parts = brought(translated(kind, tensors, free))
    return restored(found(("dictionary_learning", kind, file), FAMILY[kind], parts, about, k), block_in(cfg))


def translated(kind: str, w: dict[str, Tensor], free: bool) -> Theirs:
    """Raises BadData for a BatchTopK without a threshold."""
    encoder = w["W_enc"].T.contiguous() if "W_enc" in w else w["encoder.weight"]
    decoder = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T.contiguous()
    b_dec = next(w[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in w)
    if kind == "GatedAutoEncoder":
        lengths = {"theta": -w["gate_bias"], "b": w["mag_bias"]}
        return Theirs(encoder, decoder, b_dec, lengths, w["r_mag"], keeps_norms=free)
    lengths = {"b_enc": w["b_enc"] if "b_enc" in w else w["encoder.bias"]}
    if kind == "JumpReluAutoEncoder":
        lengths["theta"] = w["threshold"]
    threshold = w["threshold"] if FAMILY[kind] == "batch-topk" else None
    if threshold is not None and bool(threshold < 0):
        raise BadData(
            f"has the threshold {float(threshold):g}: its training ended before threshold_start_step and gave it none. "
            "Train it for longer"
        )
    keeps, centred = kind == "AutoEncoderTopK", kind not in UNCENTRED
    return Theirs(encoder, decoder, b_dec, lengths, threshold=threshold, centred=centred, keeps_norms=keeps)


def k_of(file: TensorFile, trainer: dict[str, Any], width: int) -> int:
    """Active latents per token: a tensor, or in early releases a setting alone."""
    if "k" not in file.tensors:
        return integer(trainer.get("k"), "k", 1, width)
    if file.tensors["k"].dtype not in (torch.int32, torch.int64):
        raise BadData(f"has k in {file.tensors['k'].dtype} instead of an integer")
    return integer(int(file.tensors["k"]), "k", 1, width)


def said_about(cfg: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """model, hook_name and context. The hookpoint only where `submodule_name` says which: `resid_post_layer_8`."""
    buffer = cfg.get("buffer")
    context = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    module = said_text(trainer, "submodule_name") or ""
    place = re.fullmatch(r"([a-z_]+?)_layer_([0-9]{1,4})", module)
    hook = f"blocks.{int(place[2])}.{HOOKS[place[1]]}" if place and place[1] in HOOKS else None
    return {
        "model": said_text(trainer, "lm_name"),
        "hook_name": hook,
        "context": None if context is None else integer(context, "ctx_len", 1),
    }
