"""What every reader of another tool's autoencoder gives, and the arithmetic that brings it to this project's form.

    theirs   u = (s·x - b_dec) W + b   or   s·x W + b        x̂ = (f W_dec + b_dec) / s       W_dec rows of any norm d
    ours     u = (x - b_dec') W' + b'                        x̂ = f' W_dec' + b_dec'         rows of norm one

With f' = f·d/s, thresholds and biases grow by d/s, W by d, W_dec is divided by d and b_dec by s. Where b_dec is not
subtracted from the input, b' takes in W·b_dec. All of it is computed in float64 and rounded once. Rows that have norm
one already are left as they are, bit for bit. A row of zeros has d = 0: its latent can never matter, and never fires.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from shared.gate import BadData, quoted, text
from shared.saes import ARCHITECTURES, SAEConfig, sae_config
from train.exchange.tensors import TensorFile
from train.sae.base import Weights
from train.sae.batch_topk import BatchTopKWeights
from train.sae.gated import GatedWeights, tie_of, tied
from train.sae.relu import JumpReluWeights, ReluWeights

UNIT: Final = 1e-5
"""A decoder whose rows all have norm one to this precision is not touched."""
AT_ONCE: Final = 1 << 24
"""Entries of a matrix that are computed in float64 at a time."""
LARGEST_R: Final = 80.0
"""Where eʳ leaves float32."""
LONGEST: Final = 300
"""Characters of a model's or hookpoint's name."""


@dataclass(frozen=True)
class Theirs:
    """An autoencoder as another tool has it, with this project's names and shapes."""

    W_enc: Tensor
    """[d_sae, d_in]."""
    W_dec: Tensor
    """[d_sae, d_in]."""
    b_dec: Tensor
    """[d_in]."""
    lengths: Mapping[str, Tensor]
    """[d_sae] each: b_enc, theta and b, whichever it has. They grow with the activations. Of one with two poles per
    latent [2, d_sae] each."""
    r: Tensor | None = None
    """[d_sae], of a gated one; [2, d_sae] with two poles per latent."""
    threshold: Tensor | None = None
    """[], common to all latents."""
    centred: bool = True
    """Whether b_dec is subtracted from the input."""
    factor: float = 1.0
    """s, which the activations were multiplied by."""
    keeps_norms: bool = False
    """Whether rows may not be brought to norm one: which latents are active depends on their scale."""


@dataclass(frozen=True)
class TranslatedSAE:
    """What a reader gives."""

    tool: str
    format: str
    """The tool's name of the architecture."""
    config: SAEConfig
    weights: Weights
    file: TensorFile
    norms: dict[str, Any]
    """The decoder's rows: lowest and highest norm, how many are zero, whether they were brought to one."""
    about: dict[str, Any] = field(default_factory=dict)
    """Further members of cfg.json: model, hook_name and context, where the source says them."""
    notes: list[str] = field(default_factory=list)
    prepends_bos: bool | None = None
    scale: float = 1.0
    """Autoencoder.scale; 1 where it is not known."""


@dataclass(frozen=True)
class Parts:
    """An autoencoder in this project's form, float32."""

    matrices: dict[str, Tensor]
    """W_enc, W_dec, b_dec."""
    lengths: dict[str, Tensor]
    r: Tensor | None
    threshold: Tensor | None
    """None where rows of other norms made a threshold of each latent of it: lengths["theta"]."""
    norms: dict[str, Any]


def brought(theirs: Theirs) -> Parts:
    """Returns an autoencoder for raw activations, with b_dec on the input and decoder rows of norm one. Raises BadData
    where that leaves the range of float32."""
    norm = row_norms(theirs.W_dec)
    untouched = theirs.keeps_norms or bool(((norm - 1).abs() <= UNIT).all())
    to_encoder, to_decoder, to_code = row_factors(theirs, torch.ones_like(norm) if untouched else norm)
    lengths = {name: tensor.double() for name, tensor in theirs.lengths.items()}
    if not theirs.centred:
        add_shift(lengths, theirs, row_products(theirs.W_enc, theirs.b_dec))
    threshold = theirs.threshold
    if threshold is not None and not untouched:
        lengths["theta"], threshold = threshold.double().expand_as(norm), None
    found = Parts(
        {
            "W_enc": scaled_rows(theirs.W_enc, to_encoder),
            "W_dec": scaled_rows(theirs.W_dec, to_decoder),
            "b_dec": (theirs.b_dec.double() / theirs.factor).float(),
        },
        {name: (tensor * to_code).float() for name, tensor in lengths.items()},
        theirs.r,
        None if threshold is None else (threshold.double() / theirs.factor).float(),
        norms_said(norm, untouched),
    )
    check_range([*found.matrices.values(), *found.lengths.values()], found.r)
    return found


def row_factors(theirs: Theirs, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What rows of the encoder, rows of the decoder and the code are multiplied by, float64 [d_sae] each."""
    if theirs.keeps_norms:
        return norm * theirs.factor, norm / theirs.factor, norm
    return norm, 1 / torch.where(norm > 0, norm, 1.0), norm / theirs.factor


def norms_said(norm: Tensor, untouched: bool) -> dict[str, Any]:
    """Norms of the decoder's rows as they came, for cfg.json."""
    low, high, zeros = norm.min().item(), norm.max().item(), int((norm == 0).sum())
    return {"lowest": low, "highest": high, "zeros": zeros, "made_one": not untouched}


def has_unit_rows(norms: Mapping[str, Any]) -> bool:
    return bool(norms["made_one"]) or (norms["lowest"] >= 1 - UNIT and norms["highest"] <= 1 + UNIT)


def add_shift(lengths: dict[str, Tensor], theirs: Theirs, shift: Tensor) -> None:
    """x W + b = (x - b_dec) W + (b + b_dec W): gates are θ - shift, magnitudes b + eʳ·shift."""
    if theirs.r is None:
        lengths["b_enc"] = lengths["b_enc"] + shift
        return
    lengths["theta"] = lengths["theta"] - shift
    lengths["b"] = lengths["b"] + theirs.r.double().exp() * shift


def check_range(tensors: list[Tensor], r: Tensor | None) -> None:
    if r is not None and float(r.abs().max()) > LARGEST_R:
        raise BadData(f"has r_mag up to {float(r.abs().max()):g}, whose exponential leaves the range of float32")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise BadData("leaves the range of float32 where its decoder's norms or its scaling factor are folded in")


def row_norms(matrix: Tensor) -> Tensor:
    """[rows] float64."""
    return torch.cat([part.double().norm(dim=1) for part in blocks(matrix)])


def row_products(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix @ vector [rows] in float64: the sum can nearly cancel what it is added to."""
    return torch.cat([part.double() @ vector.double() for part in blocks(matrix)])


def scaled_rows(matrix: Tensor, by: Tensor) -> Tensor:
    """Each row times a float64 number, rounded once. A matrix whose rows are not changed is only made contiguous."""
    if bool((by == 1).all()):
        return matrix.contiguous()
    rows = max(1, AT_ONCE // matrix.shape[1])
    parts = zip(blocks(matrix), torch.split(by, rows), strict=True)
    return torch.cat([(part.double() * each[:, None]).float() for part, each in parts])


def blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.split(matrix, max(1, AT_ONCE // matrix.shape[1]))


# the families


def found(
    source: tuple[str, str, TensorFile],
    family: str,
    parts: Parts,
    about: Mapping[str, Any],
    k: int = 0,
    notes: Iterable[str] = (),
) -> TranslatedSAE:
    """Returns the autoencoder as one of this project's architectures. `source`: the tool, its name of the architecture,
    the file; `k`: active latents per token, for those that have it."""
    tool, format, file = source
    config, weights = FAMILIES[family](parts, k)
    known = {name: value for name, value in about.items() if value is not None}
    bos = known.pop("prepend_bos", None)
    if "model" in known:
        known["model"] = {"name": known["model"]}
    said = [*notes, *notes_on(file, parts, family, config)]
    return TranslatedSAE(tool, format, config, weights, file, parts.norms, known, said, bos)


def notes_on(file: TensorFile, parts: Parts, family: str, config: SAEConfig) -> list[str]:
    """What a person must know before comparing the numbers with the tool's."""
    notes = []
    types = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values() if tensor.is_floating_point()}
    )
    if types != ["float32"]:
        notes.append(f"its weights were {', '.join(sorted(types))}, and are float32 here")
    norms = parts.norms
    if norms["made_one"]:
        notes.append(
            f"decoder rows had norms {norms['lowest']:.4g} to {norms['highest']:.4g} and have norm one here: a latent "
            "is the tool's times the norm of its row"
        )
    if norms["zeros"]:
        notes.append(f"{norms['zeros']:,} latents have a decoder row of zeros, and never fire here")
    theta = parts.lengths.get("theta")
    if family == "jumprelu" and theta is not None and (below := int((theta < 0).sum())):
        notes.append(f"{below:,} thresholds below 0 are 0 here, which is the same function: ReLU decides there")
    if family == "batch-topk" and config.arch == "jumprelu":
        notes.append("it is a jumprelu here: with rows of norm one the common threshold is another one for each latent")
    return notes


def relu(parts: Parts, k: int) -> tuple[SAEConfig, Weights]:  # noqa: ARG001 (one signature for all families)
    return settings("relu", parts), ReluWeights(**parts.matrices, b_enc=parts.lengths["b_enc"])


def jumprelu(parts: Parts, k: int) -> tuple[SAEConfig, Weights]:  # noqa: ARG001
    """Below a threshold of 0 ReLU decides: f = ReLU(u)·1[u > θ] is the same with θ = 0."""
    theta = parts.lengths["theta"].clamp_min(0.0)
    return settings("jumprelu", parts), JumpReluWeights(**parts.matrices, b_enc=parts.lengths["b_enc"], theta=theta)


def gated(parts: Parts, k: int) -> tuple[SAEConfig, Weights]:  # noqa: ARG001
    assert parts.r is not None
    rows = {"theta": parts.lengths["theta"][None], "r": parts.r[None], "b": parts.lengths["b"][None]}
    return settings("gated", parts, decoder="unit" if has_unit_rows(parts.norms) else "free"), GatedWeights(
        **parts.matrices, **rows
    )


def sa_gsae(parts: Parts, k: int) -> tuple[SAEConfig, Weights]:  # noqa: ARG001
    """With the fewest scalars that are exact."""
    assert parts.r is not None
    weights = tied(GatedWeights(**parts.matrices, theta=parts.lengths["theta"], r=parts.r, b=parts.lengths["b"]))
    return settings("sa-gsae", parts, tie=tie_of(weights)), weights


def batch_topk(parts: Parts, k: int) -> tuple[SAEConfig, Weights]:
    """JumpReLU where rows of other norms made a threshold of each latent of the common one."""
    if parts.threshold is None:
        return jumprelu(parts, k)
    weights = BatchTopKWeights(**parts.matrices, b_enc=parts.lengths["b_enc"], threshold=parts.threshold)
    return settings("batch-topk", parts, k=k), weights


def topk(parts: Parts, k: int) -> tuple[SAEConfig, Weights]:
    return settings("topk", parts, k=k), ReluWeights(**parts.matrices, b_enc=parts.lengths["b_enc"])


def signed_topk(parts: Parts, k: int) -> tuple[SAEConfig, Weights]:
    return settings("signed-topk", parts, k=k), ReluWeights(**parts.matrices, b_enc=parts.lengths["b_enc"])


FAMILIES: Final[Mapping[str, Callable[[Parts, int], tuple[SAEConfig, Weights]]]] = {
    "relu": relu,
    "jumprelu": jumprelu,
    "gated": gated,
    "sa-gsae": sa_gsae,
    "batch-topk": batch_topk,
    "topk": topk,
    "signed-topk": signed_topk,
}


def settings(arch: str, parts: Parts, **more: Any) -> SAEConfig:
    """The configuration of an autoencoder whose training is unknown."""
    unknown = {"sparsity": None} if ARCHITECTURES[arch].has("sparsity") else {}
    config: SAEConfig = sae_config(arch=arch, d_sae=len(parts.matrices["W_enc"]), **unknown, **more)
    return config


# what files say


def said_text(values: Mapping[str, Any], *names: str) -> str | None:
    """The first of some members that is there and not null. Raises BadData for one that is no text."""
    found = next((values[name] for name in names if values.get(name) is not None), None)
    return None if found is None else text(found, names[0], LONGEST)


def said_switch(values: Mapping[str, Any], name: str, default: bool) -> bool:
    """A member that is true or false. Raises BadData."""
    found = values.get(name)
    if found is None:
        return default
    if not isinstance(found, bool):
        raise BadData(f"{name} is {quoted(found)} instead of true or false")
    return found
