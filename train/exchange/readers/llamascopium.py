"""Reads an autoencoder that Llamascopium saved: config.json and sae_weights.safetensors.

Only with norm_activation `inference`, where its weights are for raw activations. b_D is not subtracted from the input.
With sparsity_include_decoder_norm, latents are chosen by u times the norm of their decoder row.
"""

from pathlib import Path
from typing import Any, Final

import torch

from shared.gate import BadData, choice, integer, quoted
from train.exchange.readers.base import Parts, Theirs, TranslatedSAE, brought, found, said_switch, said_text
from train.exchange.tensors import read_json, read_safetensors, readable, take

SETTINGS: Final = "config.json"
WEIGHTS: Final = "sae_weights.safetensors"
THRESHOLD: Final = "activation_function.log_jumprelu_threshold"
ACTIVATIONS: Final = ("relu", "jumprelu", "topk")
AVERAGE: Final = "dataset_average_activation_norm."


def read_llamascopium(folder: Path) -> TranslatedSAE:
    """Raises UserError for what is no such folder, or has no equal here."""
    cfg = read_json(folder / SETTINGS)
    with readable(folder / SETTINGS):
        check_kind(cfg)
        kind = choice(said_text(cfg, "act_fn") or "relu", "act_fn", ACTIVATIONS)
        by_norm = said_switch(cfg, "sparsity_include_decoder_norm", True)
        has_bias = said_switch(cfg, "use_decoder_bias", True)
        about = {"hook_name": said_text(cfg, "hook_point_in")}
    file = read_safetensors(folder / WEIGHTS)
    shapes = {"W_E": "d_model d_sae", "b_E": "d_sae", "W_D": "d_sae d_model"}
    shapes |= ({"b_D": "d_model"} if has_bias else {}) | ({THRESHOLD: "d_sae"} if kind == "jumprelu" else {})
    ignored = [name for name in file.tensors if name.startswith(AVERAGE)]
    w, sizes = take(file, f"an autoencoder of Llamascopium with {kind}", shapes, ignored)
    with readable(file.path):
        b_dec = w.get("b_D", torch.zeros(sizes["d_model"]))
        lengths = {"b_enc": w["b_E"]}
        if kind == "jumprelu":
            lengths["theta"] = w[THRESHOLD].exp()
        keeps = kind == "topk" and not by_norm
        parts = brought(Theirs(w["W_E"].T.contiguous(), w["W_D"], b_dec, lengths, centred=False, keeps_norms=keeps))
        if kind == "jumprelu" and by_norm:
            parts = with_thresholds(parts, lengths["theta"])
    with readable(folder / SETTINGS):
        k = integer(cfg.get("top_k"), "top_k", 1, sizes["d_sae"]) if kind == "topk" else 0
    return found(("Llamascopium", kind, file), kind, parts, about, k)


def with_thresholds(parts: Parts, theta: torch.Tensor) -> Parts:
    """Thresholds that are of u times the norm already, which u is here."""
    return Parts(parts.matrices, {**parts.lengths, "theta": theta}, parts.r, parts.threshold, parts.norms)


def check_kind(cfg: dict[str, Any]) -> None:
    """Raises BadData for anything but an autoencoder for raw activations."""
    if cfg.get("sae_type", "sae") != "sae" or cfg.get("hook_point_in") != cfg.get("hook_point_out"):
        raise BadData(
            f"is a {quoted(cfg.get('sae_type'))} that predicts other activations than it reads: nothing here does"
        )
    if said_switch(cfg, "use_glu_encoder", False):
        raise BadData("has use_glu_encoder, a second encoder that has no equal here")
    norm = said_text(cfg, "norm_activation") or "dataset-wise"
    if norm != "inference":
        raise BadData(
            f"says norm_activation {quoted(norm)}; only inference is read. Save it in Llamascopium with "
            "save_pretrained(…, fold_activation_scale=True)"
        )
