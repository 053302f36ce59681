"""An autoencoder of this project that comes back from another tool's format as what it was.

Other tools have one-sided latents, so a signed autoencoder is exported at twice the width: latent i + d_sae is the
negative pole of latent i. `restored` joins the poles where the tensors still mirror each other.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from shared.errors import UserError
from shared.gate import BadData, members, number, text
from shared.saes import ARCHITECTURES, SAEConfig, SaGsae, sae_config
from train.exchange.readers.base import LONGEST, Found
from train.sae.base import Weights
from train.sae.batch_topk import BatchTopKWeights
from train.sae.families import family
from train.sae.gated import GatedWeights, join
from train.sae.relu import JumpReluWeights, ReluWeights

ABOUT: Final = ("model", "hook_name", "context", "bos_id", "lambda", "corpus", "exclude_special", "exclude_positions")
"""What cfg.json said beside the settings. Whoever uses one of them checks it, since a folder may come from anybody."""


def restored(found: Found, block: Mapping[str, Any]) -> Found:
    """The autoencoder with the architecture and settings that `block` says it had: `cfg.json` of the folder that was
    exported, kept by the tool's format. What does not fit the tensors stays as the tool has it, and a note says why."""
    if not block:
        return found
    try:
        config, scale = settings_of(block)
        changed = with_settings(found.weights, config, len(found.weights.W_enc))
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


def with_settings(w: Weights, config: SAEConfig, width: int) -> tuple[SAEConfig, Weights]:
    """Raises ValueError where the tensors are not those of such an autoencoder."""
    mathematics = family(config)
    if width == config.d_sae and type(w) is mathematics.weights:
        return config, w
    if width != config.d_sae * (2 if mathematics.signed else 1):
        raise ValueError(f"it has {width:,} latents, and its old settings {config.d_sae:,}")
    if isinstance(config, SaGsae) and not config.one_sided:
        weights = with_poles(join(as_gate(w)), mathematics.poles)
        rows = (len(weights.theta), len(weights.r))
        tie = {(1, 1): "symmetric", (2, 1): "magnitude", (2, 2): "none"}[rows]
        return config.model_copy(update={"tie": tie}), weights
    if mathematics.signed:
        return config, join_halves(w, config.arch)
    if config.arch == "batch-topk" and isinstance(w, JumpReluWeights):
        return config, BatchTopKWeights(w.W_enc, w.W_dec, w.b_dec, w.b_enc, common(w.theta))
    if config.arch == "relu" and isinstance(w, JumpReluWeights) and not bool(w.theta.any()):
        return config, ReluWeights(w.W_enc, w.W_dec, w.b_dec, w.b_enc)
    raise ValueError(f"as {config.arch} its tensors would be others; the function is the same")


def as_gate(w: Weights) -> GatedWeights:
    """JumpReLU as gates: u + b > T is u > T - b. Never below zero for poles, since T is max(eʳθ + b, 0)."""
    if isinstance(w, GatedWeights):
        return w
    if isinstance(w, ReluWeights):
        threshold = w.theta if isinstance(w, JumpReluWeights) else torch.zeros_like(w.b_enc)
        gates = {"theta": (threshold - w.b_enc)[None], "r": torch.zeros_like(w.b_enc)[None], "b": w.b_enc[None]}
        return GatedWeights(w.W_enc, w.W_dec, w.b_dec, **gates)
    raise ValueError("its latents have no thresholds of their own")


def with_poles(w: GatedWeights, poles: Mapping[str, int]) -> GatedWeights:
    """At least as many rows as the tie had: `join` gives the fewest that are exact."""
    rows = {name: max(poles[name], len(getattr(w, name))) for name in ("theta", "r", "b")}
    rows["theta"] = rows["b"] = max(rows["theta"], rows["b"], rows["r"])
    return dataclasses.replace(w, **{name: getattr(w, name).expand(count, -1).clone() for name, count in rows.items()})


def join_halves(w: Weights, arch: str) -> Weights:
    """An AbsTopK or SignedTopK autoencoder from its two halves. Raises ValueError."""
    half = len(w.W_enc) // 2
    if not isinstance(w, ReluWeights | BatchTopKWeights):
        raise ValueError("its latents have gates")
    if not all(torch.equal(part[:half], -part[half:]) for part in (w.W_enc, w.W_dec, w.b_enc)):
        raise ValueError("the second half of its latents does not mirror the first")
    halves = {"W_enc": w.W_enc[:half].clone(), "W_dec": w.W_dec[:half].clone(), "b_dec": w.b_dec}
    if arch == "signed-topk" and type(w) is ReluWeights:
        return ReluWeights(**halves, b_enc=w.b_enc[:half].clone())
    if arch == "abs-topk" and isinstance(w, JumpReluWeights | BatchTopKWeights) and not bool(w.b_enc.any()):
        threshold = w.threshold if isinstance(w, BatchTopKWeights) else common(w.theta)
        return BatchTopKWeights(**halves, b_enc=w.b_enc[:half].clone(), threshold=threshold)
    raise ValueError(f"as {arch} its tensors would be others")


def common(theta: Tensor) -> Tensor:
    if not bool((theta == theta[0]).all()):
        raise ValueError("its thresholds differ from latent to latent")
    return theta[0].clone()
