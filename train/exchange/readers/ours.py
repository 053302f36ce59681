"""An autoencoder of this project that comes back from another tool's format as what it was.

Other tools have one-sided latents, so a signed autoencoder is exported at twice the width: latent i + d_sae is the
negative pole of latent i. `restored` joins the poles where the tensors still mirror each other.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from shared.errors import UserError
from shared.gate import BadData, members, number, text
from shared.saes import ARCHITECTURES, SAEConfig, SaGsae, sae_config
from train.exchange.readers.base import LONGEST, TranslatedSAE
from train.exchange.tensors import read_json
from train.sae.base import Weights
from train.sae.batch_topk import BatchTopKWeights
from train.sae.families import family
from train.sae.gated import GatedWeights, join, tie_of
from train.sae.relu import JumpReluWeights, ReluWeights

PER_TOKEN: Final = ("topk", "signed-topk")
ABOUT: Final = ("model", "hook_name", "context", "bos_id", "lambda", "corpus", "exclude_special", "exclude_positions")
"""What cfg.json said beside the settings. Check each value before use: the folder may come from anybody."""


BESIDE: Final = "sagsae.json"
"""What an export writes beside files whose format has no place for it."""


def block_in(values: Any) -> dict[str, Any]:
    """The settings of the autoencoder that sagsae exported, inside a description; {} for any other."""
    block = values.get("sagsae") if isinstance(values, dict) else None
    return block if isinstance(block, dict) else {}


def block_beside(folder: Path) -> dict[str, Any]:
    """The same, from the file beside the tool's. Raises UserError when it is there and cannot be read."""
    return block_in(read_json(folder / BESIDE)) if (folder / BESIDE).exists() else {}


def restored(found: TranslatedSAE, block: Mapping[str, Any]) -> TranslatedSAE:
    """The autoencoder with the architecture and settings that `block` says it had: `cfg.json` of the folder that was
    exported, kept by the tool's format. What does not fit the tensors stays as the tool has it, and a note says why."""
    if not block:
        return found
    try:
        config, scale = settings_of(block)
        changed = with_settings(found, config)
    except (BadData, UserError, ValueError) as error:
        why = f"it was exported by sagsae, and is {found.config.arch} here: {error}"
        return dataclasses.replace(found, notes=[*found.notes, why])
    about = {**found.about, **{name: block[name] for name in ABOUT if block.get(name) is not None}}
    return dataclasses.replace(found, config=changed[0], weights=changed[1], scale=scale, about=about)


def settings_of(block: Mapping[str, Any]) -> tuple[SAEConfig, float]:
    """The configuration and the scale of the autoencoder that was exported. Raises BadData or UserError."""
    arch = block.get("arch")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise BadData("its old settings name no architecture that is known here")
    if block.get("model") is not None:
        text(members(block["model"], ("name",), None)["name"], "model.name", LONGEST)
    if block.get("hook_name") is not None:
        text(block["hook_name"], "hook_name", LONGEST)
    fields = ARCHITECTURES[arch].config.model_fields
    config: SAEConfig = sae_config(**{key: block[key] for key in fields if key in block})
    return config, number(block.get("scale"), "scale", sys.float_info.min)


def with_settings(found: TranslatedSAE, config: SAEConfig) -> tuple[SAEConfig, Weights]:
    """The settings and the tensors with them. Raises ValueError where the function would be another one: the settings
    come from a file, and only the tensors are to be believed."""
    w, now = found.weights, found.config
    signed = family(config).signed
    halved = signed and not family(now).signed
    if now.d_sae != config.d_sae * (2 if halved else 1):
        raise ValueError(f"it has {now.d_sae:,} latents, and its old settings {config.d_sae:,}")
    if config.arch in PER_TOKEN and getattr(now, "k", None) != getattr(config, "k", None):
        raise ValueError("its old settings have another k")
    if family(now).signed and not signed:
        raise ValueError("its latents have two poles, and one in its old settings")
    if signed and isinstance(config, SaGsae):
        gates = as_gate(w, now.arch)
        weights = with_poles(join(gates) if halved else gates, family(config).poles)
        return config.model_copy(update={"tie": tie_of(weights)}), weights
    return config, join_halves(w, now.arch, config.arch) if halved else same_width(w, now, config)


def same_width(w: Weights, now: SAEConfig, config: SAEConfig) -> Weights:
    """The tensors as those of an architecture that computes the same. Raises ValueError where it does not."""
    if now.arch == config.arch or (now.arch == "gated" and isinstance(config, SaGsae) and config.one_sided):
        return w
    if isinstance(w, JumpReluWeights) and config.arch == "batch-topk":
        return BatchTopKWeights(w.W_enc, w.W_dec, w.b_dec, w.b_enc, common(w.theta))
    if isinstance(w, GatedWeights) and config.arch == "abs-topk" and is_one_jump(w):
        return BatchTopKWeights(w.W_enc, w.W_dec, w.b_dec, torch.zeros_like(w.theta[0]), common(w.theta[0]))
    if isinstance(w, JumpReluWeights) and config.arch == "relu" and not bool(w.theta.any()):
        return ReluWeights(w.W_enc, w.W_dec, w.b_dec, w.b_enc)
    raise ValueError(f"as {config.arch} its tensors would be others")


def is_one_jump(w: GatedWeights) -> bool:
    """Whether both poles have the same thresholds, and magnitudes are |u| itself."""
    return len(w.theta) == 1 and not bool(w.r.any()) and not bool(w.b.any())


def as_gate(w: Weights, arch: str) -> GatedWeights:
    """JumpReLU as gates: u + b > T is u > T - b. Never below zero for poles, since T is max(eʳθ + b, 0)."""
    if isinstance(w, GatedWeights):
        return w
    if isinstance(w, ReluWeights) and arch in ("relu", "jumprelu"):
        threshold = w.theta if isinstance(w, JumpReluWeights) else torch.zeros_like(w.b_enc)
        gates = {"theta": (threshold - w.b_enc)[None], "r": torch.zeros_like(w.b_enc)[None], "b": w.b_enc[None]}
        return GatedWeights(w.W_enc, w.W_dec, w.b_dec, **gates)
    raise ValueError("its latents have no thresholds of their own")


def with_poles(w: GatedWeights, poles: Mapping[str, int]) -> GatedWeights:
    """At least as many rows as the tie had: `join` gives the fewest that are exact."""
    rows = {name: max(poles[name], len(getattr(w, name))) for name in ("theta", "r", "b")}
    rows["theta"] = rows["b"] = max(rows["theta"], rows["b"], rows["r"])
    return dataclasses.replace(w, **{name: getattr(w, name).expand(count, -1).clone() for name, count in rows.items()})


def join_halves(w: Weights, now: str, arch: str) -> Weights:
    """An AbsTopK or SignedTopK autoencoder (`arch`) from its two halves, of the architecture `now`. Raises
    ValueError."""
    half = len(w.W_enc) // 2
    if not isinstance(w, ReluWeights | BatchTopKWeights):
        raise ValueError("its latents have gates")
    if not all(torch.equal(part[:half], -part[half:]) for part in (w.W_enc, w.W_dec, w.b_enc)):
        raise ValueError("the second half of its latents does not mirror the first")
    halves = {"W_enc": w.W_enc[:half].clone(), "W_dec": w.W_dec[:half].clone(), "b_dec": w.b_dec}
    if arch == "signed-topk" and now == "topk":
        return ReluWeights(**halves, b_enc=w.b_enc[:half].clone())
    if arch == "abs-topk" and isinstance(w, JumpReluWeights | BatchTopKWeights) and not bool(w.b_enc.any()):
        threshold = w.threshold if isinstance(w, BatchTopKWeights) else common(w.theta)
        return BatchTopKWeights(**halves, b_enc=w.b_enc[:half].clone(), threshold=threshold)
    raise ValueError(f"as {arch} its tensors would be others")


def common(theta: Tensor) -> Tensor:
    if not bool((theta == theta[0]).all()):
        raise ValueError("its thresholds differ from latent to latent")
    return theta[0].clone()
