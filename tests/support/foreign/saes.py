"""Autoencoders as other tools save them, made here by their formats, with what the tool computes, in float64."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, ROWS = 12, 40, 64
MODEL, HOOK = "EleutherAI/pythia-14m", "blocks.3.hook_resid_post"


@dataclass(frozen=True)
class ForeignSAE:
    """What was written, and what the tool says of it: the code [rows, d_sae] and the reconstruction of `x`."""

    place: Path
    x: Tensor
    code: Tensor
    x_hat: Tensor
    norms: Tensor
    """[d_sae] the norms of the decoder's rows, in the units of the activations that the tool is given."""


def draws(seed: int, unit: bool = False) -> dict[str, Tensor]:
    """Every parameter that any tool has, in the shapes of SAELens. Decoder rows have norms from 0.3 to 2."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = torch.nn.functional.normalize(noise(D_SAE, D_IN), dim=1)
    if not unit:
        W_dec = W_dec * (0.3 + 1.7 * torch.rand(D_SAE, 1, generator=generator))
    return {
        "W_enc": noise(D_IN, D_SAE) * 0.5,
        "W_dec": W_dec,
        "b_dec": 3 * noise(D_IN),
        "b_enc": 0.3 * noise(D_SAE),
        "b_gate": 0.3 * noise(D_SAE) - 0.5,
        "b_mag": 0.3 * noise(D_SAE),
        "r_mag": 0.3 * noise(D_SAE),
        "threshold": noise(D_SAE).abs(),
        "x": noise(ROWS, D_IN) * 2 + 1,
    }


def largest(sizes: Tensor, k: int) -> Tensor:
    """1 at the k largest of each row, found by sorting."""
    mask = torch.zeros_like(sizes)
    for row, order in enumerate(sizes.argsort(dim=1, descending=True)):
        mask[row, order[:k]] = 1
    return mask


def activated(kind: str, w: Mapping[str, Tensor], u: Tensor, k: int) -> Tensor:
    """The code of pre-activations without biases [rows, d_sae], float64."""
    if kind == "gated":
        return ((u + w["b_gate"]) > 0) * (w["r_mag"].exp() * u + w["b_mag"]).clamp_min(0)
    v = u + w["b_enc"]
    if kind == "standard":
        return v.clamp_min(0)
    if kind == "jumprelu":
        return (v > w["threshold"]) * v.clamp_min(0)
    return v.clamp_min(0) * largest(v, k) if kind == "topk" else v * largest(v.abs(), k)


TENSORS = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
}


def saelens(
    place: Path,
    kind: str,
    centred: bool = True,
    factor: float | None = None,
    unit: bool = False,
    rescale: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> ForeignSAE:
    """A folder of SAELens 6. `rescale`: rescale_acts_by_decoder_norm; `changes`: other parameters."""
    w = draws(seed, unit) | dict(changes or {})
    k = 5
    if not centred:  # so that few latents are active on raw activations
        shift = w["b_dec"] @ w["W_enc"]
        w |= {
            "b_enc": w["b_enc"] - shift,
            "b_gate": w["b_gate"] - shift,
            "b_mag": w["b_mag"] - w["r_mag"].exp() * shift,
        }
    names = ("W_enc", "W_dec", "b_dec", *TENSORS[kind])
    stored = {name: w[name].to(dtype).contiguous() for name in names}
    write_saelens(
        place, kind, stored, apply_b_dec_to_input=centred, **scaled(factor), **topk_fields(kind, k, rescale), **more
    )
    exact = {name: tensor.double() for name, tensor in stored.items()}
    s = factor or 1.0
    x = w["x"].double() / s + (exact["b_dec"] / s if centred else 0)
    norm = exact["W_dec"].norm(dim=1)
    u = (s * x - (exact["b_dec"] if centred else 0)) @ exact["W_enc"]
    if rescale:
        u, exact["b_enc"] = u * norm, exact["b_enc"] * norm
    code = activated(kind, exact, u, k)
    rows = exact["W_dec"] / norm[:, None] if rescale else exact["W_dec"]
    norms = torch.ones_like(norm) if "topk" in kind else norm / s
    return ForeignSAE(place, x, code, (code @ rows + exact["b_dec"]) / s, norms)


def scaled(factor: float | None) -> dict[str, Any]:
    return {"normalize_activations": "expected_average_only_in" if factor else "none"}


def topk_fields(kind: str, k: int, rescale: bool) -> dict[str, Any]:
    return {"k": k, "rescale_acts_by_decoder_norm": rescale} if "topk" in kind else {}


def write_saelens(place: Path, kind: str, tensors: Mapping[str, Tensor], **cfg: Any) -> None:
    place.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), place / "sae_weights.safetensors")
    d_sae, d_in = tensors["W_dec"].shape
    metadata = {"model_name": MODEL, "hook_name": HOOK, "context_size": 128, "prepend_bos": False}
    metadata |= cfg.pop("metadata", {})
    about = {
        "architecture": kind,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "metadata": metadata,
    }
    (place / "cfg.json").write_text(json.dumps({**about, "apply_b_dec_to_input": True, **cfg}))


def dictionary_learning(place: Path, kind: str, seed: int = 0, unit: bool = False, **changes: Tensor) -> ForeignSAE:
    """A folder of dictionary_learning 0.1."""
    w = draws(seed, unit) | changes
    k = 5
    enc, dec = {"encoder.weight": w["W_enc"].T.contiguous()}, {"decoder.weight": w["W_dec"].T.contiguous()}
    linear, biased = {**enc, **dec}, {**enc, **dec, "encoder.bias": w["b_enc"]}
    plain = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    common = w.get("common", torch.tensor(0.8))
    many = torch.tensor(k, dtype=torch.int)
    gates = {"gate_bias": w["b_gate"], "mag_bias": w["b_mag"], "r_mag": w["r_mag"], "decoder_bias": w["b_dec"]}
    stored = {
        "AutoEncoder": {**biased, "bias": w["b_dec"]},
        "AutoEncoderNew": {**biased, "decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": {**linear, **gates},
        "JumpReluAutoEncoder": {**plain, "threshold": w["threshold"]},
        "BatchTopKSAE": {**biased, "b_dec": w["b_dec"], "k": many, "threshold": common},
        "MatryoshkaBatchTopKSAE": {**plain, "k": many, "threshold": common, "group_sizes": torch.tensor([10, 30])},
        "AutoEncoderTopK": {**biased, "b_dec": w["b_dec"], "k": many, "threshold": torch.tensor(-1.0)},
    }[kind]
    place.mkdir(parents=True, exist_ok=True)
    torch.save(stored, place / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": MODEL}
    trainer |= {"submodule_name": "resid_post_layer_3", "trainer_class": "Any"}
    (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    exact = {name: tensor.double() for name, tensor in w.items()}
    x = exact["x"] + exact["b_dec"]
    centre = torch.zeros(D_IN) if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else exact["b_dec"]
    u = (x - centre) @ exact["W_enc"]
    if FORMULAS[kind] == "batch":
        a = (u + exact["b_enc"]).clamp_min(0)
        code = a * (a > common.double())
    else:
        code = activated(FORMULAS[kind], exact, u, k)
    norms = torch.ones(D_SAE) if kind == "AutoEncoderTopK" else exact["W_dec"].norm(dim=1)
    return ForeignSAE(place, x, code, code @ exact["W_dec"] + exact["b_dec"], norms)


FORMULAS = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "BatchTopKSAE": "batch",
    "MatryoshkaBatchTopKSAE": "batch",
    "AutoEncoderTopK": "topk",
}


def sparsify(place: Path, k: int = 5, seed: int = 0, signed: bool = False, **cfg: Any) -> ForeignSAE:
    """A folder of sparsify 1.3, named after the module."""
    w = draws(seed, unit=True)
    place.mkdir(parents=True, exist_ok=True)
    stored = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file(stored, place / "sae.safetensors")
    about = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": D_SAE, "k": k}
    about |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN}
    (place / "cfg.json").write_text(json.dumps({**about, **({"signed": True} if signed else {}), **cfg}))
    exact = {name: tensor.double() for name, tensor in w.items()}
    x = exact["x"] + exact["b_dec"]
    code = activated("abstopk" if signed else "topk", exact, exact["x"] @ exact["W_enc"], k)
    return ForeignSAE(place, x, code, code @ exact["W_dec"] + exact["b_dec"], torch.ones(D_SAE))


def gemma_scope(place: Path, lower: bool = False, seed: int = 0) -> ForeignSAE:
    """params.npz or params.safetensors, by the name of `place`."""
    w = draws(seed)
    stored = {name: w[name].contiguous() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if lower:
        stored = {name.replace("W_", "w_"): tensor for name, tensor in stored.items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".npz":
        np.savez(place, **{name: tensor.numpy() for name, tensor in stored.items()})  # type: ignore[arg-type]
    else:
        save_file(stored, place)
    exact = {name: tensor.double() for name, tensor in w.items()}
    by = D_IN**0.5 if "embedding" in place.parts else 1.0
    x = exact["x"] / by
    u = x / by @ exact["W_enc"]
    code = activated("jumprelu", exact, u, 0)
    norms = exact["W_dec"].norm(dim=1) * by
    return ForeignSAE(place, x, code, by * (code @ exact["W_dec"]) + exact["b_dec"], norms)


def openai(place: Path, seed: int = 0, **more: Any) -> ForeignSAE:
    """A .pt of version 1 or 4."""
    w = draws(seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    stored = {"encoder.weight": w["W_enc"].T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous()}
    stored |= {"pre_bias": w["b_dec"], "latent_bias": w["b_enc"], "stats_last_nonzero": torch.zeros(D_SAE).long()}
    torch.save({**stored, "activation": "ReLU", "activation_state_dict": {}, **more}, place)
    exact = {name: tensor.double() for name, tensor in w.items()}
    x = exact["x"] + exact["b_dec"]
    code = activated("standard", exact, exact["x"] @ exact["W_enc"], 0)
    return ForeignSAE(place, x, code, code @ exact["W_dec"] + exact["b_dec"], exact["W_dec"].norm(dim=1))


def llamascopium(place: Path, kind: str, by_norm: bool = True, seed: int = 0, **cfg: Any) -> ForeignSAE:
    """A folder of Llamascopium in inference mode."""
    w = draws(seed)
    k = 5
    place.mkdir(parents=True, exist_ok=True)
    stored = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    stored["dataset_average_activation_norm.blocks.3.hook_resid_post"] = torch.tensor(float("nan"))
    if kind == "jumprelu":
        stored["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    save_file(stored, place / "sae_weights.safetensors")
    about = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "act_fn": kind, "top_k": k}
    about |= {"norm_activation": "inference", "sparsity_include_decoder_norm": by_norm, "use_decoder_bias": True}
    (place / "config.json").write_text(json.dumps({**about, "hook_point_in": HOOK, "hook_point_out": HOOK, **cfg}))
    exact = {name: tensor.double() for name, tensor in w.items()}
    exact["threshold"] = w["threshold"].log().double().exp()
    norm = exact["W_dec"].norm(dim=1)
    u, x = exact["x"] @ exact["W_enc"], exact["x"]
    d = norm if by_norm else torch.ones_like(norm)
    name = {"relu": "standard"}.get(kind, kind)
    code = activated(name, {**exact, "b_enc": exact["b_enc"] * d}, u * d, k) / d
    norms = torch.ones_like(norm) if kind == "topk" and not by_norm else norm
    return ForeignSAE(place, x, code, code @ exact["W_dec"] + exact["b_dec"], norms)
