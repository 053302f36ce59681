"""The forms in which other tools know an autoencoder: gated, JumpReLU and TopK, all one-sided, and Bi-JumpReLU.

    gated      u = (x - b_dec) W_enc        f = 1[u + b_gate > 0]·ReLU(e^r_mag u + b_mag)
    jumprelu   z = (x - b_dec) W_enc + b_enc        f = z·1[z > threshold]
    topk       z as in jumprelu             f = ReLU(z) at the token's k largest z, else 0
    bijumprelu z as in jumprelu, f signed   (BiJumpReluForm)
    all        x̂ = f W_dec + b_dec

A one-sided latent is never negative. A signed autoencoder of d_sae latents has width n = 2·d_sae here: latent i of a
form is the positive pole of latent i, latent i + d_sae the negative one, so that the signed code is f[:, :d_sae] -
f[:, d_sae:]. Where a latent fires is the same in all forms, because Bi-JumpReLU, f = u' + b where u' > T, is JumpReLU
on z = u' + b with the threshold T + b = max(eʳθ + b, 0).

All tensors are float32 in units of the activations, in SAELens' orientation. Sums and products that a form needs are
taken in float64 and rounded once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from train.autoencoder import Autoencoder
from train.sae.batch_topk import BatchTopKWeights
from train.sae.gated import GatedWeights
from train.sae.relu import JumpReluWeights

UNIT: Final = 1e-6
"""Rows of the decoder whose norms differ from one by less than this have norm one: float32 cannot say it better."""


@dataclass(frozen=True)
class CodeForm:
    """What the three forms share."""

    W_enc: Float[Tensor, "d_in n"]
    W_dec: Float[Tensor, "n d_in"]
    b_dec: Float[Tensor, " d_in"]

    def named(self) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        return {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}

    @property
    def width(self) -> int:
        """n, the number of one-sided latents."""
        return self.W_dec.shape[0]

    def has_unit_rows(self) -> bool:
        """Whether every row of the decoder has norm one."""
        return bool((norms(self) - 1).abs().max() < UNIT)


@dataclass(frozen=True)
class GatedForm(CodeForm):
    """A Gated SAE with one-sided latents."""

    b_gate: Float[Tensor, " n"]
    r_mag: Float[Tensor, " n"]
    b_mag: Float[Tensor, " n"]


@dataclass(frozen=True)
class JumpReluForm(CodeForm):
    """A JumpReLU SAE; with a threshold of zero for all a ReLU SAE."""

    b_enc: Float[Tensor, " n"]
    threshold: Float[Tensor, " n"]


@dataclass(frozen=True)
class TopKForm(CodeForm):
    """A TopK SAE."""

    b_enc: Float[Tensor, " n"]
    k: int


@dataclass(frozen=True)
class BiJumpReluForm(CodeForm):
    """Bi-JumpReLU with signed latents, n = d_sae:

    f = z + offset_pos where z > threshold_pos, -(y + offset_neg) where y = -slope_neg·z > threshold_neg, else 0.
    """

    b_enc: Float[Tensor, " n"]
    threshold_pos: Float[Tensor, " n"]
    threshold_neg: Float[Tensor, " n"]
    offset_pos: Float[Tensor, " n"]
    offset_neg: Float[Tensor, " n"]
    slope_neg: Float[Tensor, " n"]


Form = GatedForm | JumpReluForm | TopKForm | BiJumpReluForm


def has_gates(sae: Autoencoder) -> bool:
    """Whether the autoencoder has a gated form: sa-gsae and gated."""
    return isinstance(sae.weights, GatedWeights)


def is_relu(sae: Autoencoder) -> bool:
    """Whether a latent is active wherever its pre-activation is above zero."""
    return sae.config.arch == "relu"


def has_one_threshold(sae: Autoencoder) -> bool:
    """Whether all latents have the same threshold: batch-topk and abs-topk."""
    return isinstance(sae.weights, BatchTopKWeights)


def has_thresholds(sae: Autoencoder) -> bool:
    """Whether the autoencoder has a JumpReLU form: one threshold per latent decides whether it is active."""
    return has_gates(sae) or is_relu(sae) or has_one_threshold(sae) or isinstance(sae.weights, JumpReluWeights)


def chooses_per_token(sae: Autoencoder) -> bool:
    """Whether the autoencoder has a TopK form: k latents of each token are active, by value or by magnitude."""
    return hasattr(sae.config, "k") and not has_thresholds(sae)


def gated_form(sae: Autoencoder) -> GatedForm:
    """Returns the gated form of an autoencoder that `has_gates`: its numbers unchanged but for signs."""
    w = sae.weights
    assert isinstance(w, GatedWeights)
    return GatedForm(
        **doubled(sae, w.W_enc),
        b_gate=-both_poles(sae, w.theta),
        r_mag=both_poles(sae, w.r),
        b_mag=both_poles(sae, w.b),
    )


def jumprelu_form(sae: Autoencoder) -> JumpReluForm:
    """Returns the JumpReLU form of an autoencoder that `has_thresholds`."""
    w = sae.weights
    if isinstance(w, GatedWeights):
        scale, b = both_poles(sae, w.r).double().exp(), both_poles(sae, w.b)
        threshold = (scale * both_poles(sae, w.theta).double() + b.double()).clamp_min(0.0)
        form = doubled(sae, w.W_enc)
        W_enc = (form["W_enc"].double() * scale).float()
        return JumpReluForm(**{**form, "W_enc": W_enc}, b_enc=b, threshold=threshold.float())
    threshold = thresholds_of(sae).repeat(len(signs(sae)))
    return JumpReluForm(**doubled(sae, w.W_enc), b_enc=signed_bias(sae), threshold=threshold)


def topk_form(sae: Autoencoder) -> TopKForm:
    """Returns the TopK form of an autoencoder that `chooses_per_token`. Of the two poles of a signed latent at most one
    is above zero, so that the k largest are the k largest by magnitude."""
    return TopKForm(**doubled(sae, sae.weights.W_enc), b_enc=signed_bias(sae), k=k_of(sae))


def signed_topk_form(sae: Autoencoder) -> TopKForm:
    """Returns the form of width d_sae of a signed autoencoder that `chooses_per_token`: the k largest by magnitude,
    with their signs. SAELens calls it abstopk."""
    w = sae.weights
    return TopKForm(w.W_enc.T.contiguous(), w.W_dec, w.b_dec, b_enc=signed_bias(sae)[: len(w.W_enc)], k=k_of(sae))


def bijumprelu_form(sae: Autoencoder) -> BiJumpReluForm:
    """Returns the form of width d_sae of a signed autoencoder that `has_thresholds`."""
    w = sae.weights
    if not isinstance(w, GatedWeights):
        thresholds = thresholds_of(sae)
        zeros, ones = torch.zeros_like(thresholds), torch.ones_like(thresholds)
        b_enc, threshold, offset, slope = bias_of(sae), thresholds.expand(2, -1), zeros.expand(2, -1), ones
        W_enc = w.W_enc.T
    else:
        r, theta, offset = (both_poles(sae, each).view(2, -1) for each in (w.r, w.theta, w.b))
        threshold = torch.maximum(r.double().exp() * theta.double(), -offset.double()).float()
        slope, b_enc = (r[1].double() - r[0].double()).exp().float(), torch.zeros_like(r[0])
        W_enc = (w.W_enc.T.double() * r[0].double().exp()).float()
    return BiJumpReluForm(
        W_enc=W_enc.contiguous(),
        W_dec=w.W_dec,
        b_dec=w.b_dec,
        b_enc=b_enc,
        threshold_pos=threshold[0],
        threshold_neg=threshold[1],
        offset_pos=offset[0],
        offset_neg=offset[1],
        slope_neg=slope,
    )


def doubled(sae: Autoencoder, W_enc: Float[Tensor, "d_sae d_in"]) -> dict[str, Tensor]:
    """Returns encoder, decoder and b_dec of a form whose latents are the poles of the autoencoder's."""
    return {
        "W_enc": torch.cat([sign * W_enc.T for sign in signs(sae)], dim=1).contiguous(),
        "W_dec": torch.cat([sign * sae.weights.W_dec for sign in signs(sae)]),
        "b_dec": sae.weights.b_dec,
    }


def signed_bias(sae: Autoencoder) -> Float[Tensor, " n"]:
    """Returns b_enc of an architecture without gates, for each pole."""
    return torch.cat([sign * bias_of(sae) for sign in signs(sae)])


def bias_of(sae: Autoencoder) -> Float[Tensor, " d_sae"]:
    found = sae.weights.named().get("b_enc")
    return torch.zeros(sae.config.d_sae) if found is None else found


def k_of(sae: Autoencoder) -> int:
    k = getattr(sae.config, "k", None)
    assert isinstance(k, int), f"{sae.config.name} has thresholds"
    return k


def thresholds_of(sae: Autoencoder) -> Float[Tensor, " d_sae"]:
    """Returns the threshold of each latent's pre-activation in an architecture without gates."""
    w = sae.weights
    if isinstance(w, JumpReluWeights):
        return w.theta
    return w.threshold.expand(sae.config.d_sae) if isinstance(w, BatchTopKWeights) else torch.zeros(sae.config.d_sae)


def signs(sae: Autoencoder) -> tuple[float, ...]:
    """Returns the sign of each pole."""
    return (1.0, -1.0) if sae.signed else (1.0,)


def both_poles(sae: Autoencoder, rows: Float[Tensor, "poles d_sae"]) -> Float[Tensor, " n"]:
    """Returns the rows of each pole, one behind the other; a single row serves both."""
    return torch.cat([rows[min(pole, len(rows) - 1)] for pole in range(len(signs(sae)))])


def without_input_bias(form: Form) -> Form:
    """Returns the form for a tool that does not subtract b_dec from its input: b_dec is folded into the biases."""
    shift = form.b_dec.double() @ form.W_enc.double()
    if isinstance(form, GatedForm):
        b_mag = form.b_mag.double() - form.r_mag.double().exp() * shift
        return replace(form, b_gate=(form.b_gate.double() - shift).float(), b_mag=b_mag.float())
    return replace(form, b_enc=(form.b_enc.double() - shift).float())


def norms(form: CodeForm) -> Float[Tensor, " n"]:
    """Returns the norms of the decoder's rows, in float64."""
    return form.W_dec.double().square().sum(1).sqrt()


def with_unit_rows(form: Form) -> Form:
    """Returns the form with decoder rows of norm one and the same x̂; its f is that of `form` times the old norms.
    Raises ValueError for a TopK form, in which norms change the choice of the k largest."""
    if isinstance(form, TopKForm):
        raise ValueError("norms of the decoder's rows take part in the choice of the k largest latents")
    length = norms(form)
    W_dec = form.W_dec.double() / length.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    W_dec[length == 0, 0] = 1.0  # a latent without a direction: below its encoder and biases become zero, too
    scaled = {name: (each.double() * length).float() for name, each in form.named().items() if name in SCALED}
    changed: dict[str, Any] = {"W_dec": W_dec.float(), **scaled}
    return replace(form, **changed)


SCALED: Final = frozenset(
    "W_enc b_enc threshold b_gate b_mag threshold_pos threshold_neg offset_pos offset_neg".split()
)
"""The tensors that are multiplied by the norms of the decoder's rows when those become one: all that grow with f."""


def approximate_topk(form: JumpReluForm, k: int) -> TopKForm:
    """Returns a TopK SAE with the same encoder and decoder: an approximation, because it has no thresholds."""
    return TopKForm(form.W_enc, form.W_dec, form.b_dec, form.b_enc, min(k, form.width))


def reconstruct_topk(form: TopKForm, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
    """Returns x̂ of a one-sided TopK form, in float32."""
    z = torch.relu((x - form.b_dec) @ form.W_enc + form.b_enc)
    largest = torch.topk(z, form.k, dim=1, sorted=False)
    f = torch.zeros_like(z).scatter_(1, largest.indices, largest.values)
    return f @ form.W_dec + form.b_dec


def on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as files hold them: on the CPU, detached, contiguous and float32 (integers as they are)."""
    return {
        name: (each.float() if each.is_floating_point() else each).detach().cpu().contiguous()
        for name, each in tensors.items()
    }
