"""The ReLU autoencoder with an L1 penalty, and JumpReLU with an L0 penalty (arXiv 2407.14435).

    u = (x - b_dec) W_encᵀ + b_enc                     x̂ = f W_dec + b_dec,  |d_i| = 1
    relu       f = ReLU(u)                             loss  |x - x̂|² + λ Σ f
    jumprelu   f = u·H(u - θ)                          loss  |x - x̂|² + λ Σ H(u - θ)

H has no derivative that trains anything. JumpReLU takes, for θ alone, that of a step smoothed by a rectangle of width
ε: ∂H/∂θ := -K((u - θ)/ε)/ε and ∂f/∂θ := -θ·K((u - θ)/ε)/ε, with K = 1 on [-½, ½]. θ is raw and held at 0 or above.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from shared.saes import JumpRelu, Penalised
from train.sae.activation import Folded, one_sided
from train.sae.base import Family, StepInputs, StepMetrics, Weights, decode, first_weights


@dataclass
class ReluWeights(Weights):
    b_enc: Float[Tensor, " d_sae"]

    LENGTHS: ClassVar[frozenset[str]] = frozenset({"b_dec", "b_enc"})


@dataclass
class JumpReluWeights(ReluWeights):
    theta: Float[Tensor, " d_sae"]

    LENGTHS: ClassVar[frozenset[str]] = frozenset({"b_dec", "b_enc", "theta"})


def pre_activations(w: ReluWeights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    return (x - w.b_dec) @ w.W_enc.T + w.b_enc


class ReluFamily(Family[ReluWeights]):
    weights = ReluWeights
    config: Penalised

    def __init__(self, config: Penalised) -> None:
        self.config = config

    def initial(self, d_in: int, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> ReluWeights:
        d_sae = self.config.d_sae
        return ReluWeights(**first_weights(d_in, d_sae, mean, generator), b_enc=torch.zeros(d_sae))

    def encode(self, w: ReluWeights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        return torch.relu(pre_activations(w, x))

    def loss(self, w: ReluWeights, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, ""]:
        f = self.encode(w, x)
        return ((x - decode(w, f)).square().sum(1) + now.sparsity * f.sum(1)).mean()

    def gradients(
        self, w: ReluWeights, x: Float[Tensor, "batch d_in"], now: StepInputs
    ) -> tuple[ReluWeights, StepMetrics]:
        batch = len(x)
        centred, low, u = products(w, x, now)
        f = torch.relu_(u)
        active = f.sign()
        error, to_f, to_W_dec = reconstruct(w, f, centred, now)
        to_u = to_f.add_(now.sparsity / batch).mul_(active)
        grads = ReluWeights(**backward(w, to_u, low, error, now), W_dec=to_W_dec, b_enc=to_u.sum(0))
        return grads, measured(error, f.sum() / batch, active)

    def constrain_(self, w: ReluWeights) -> None:
        pass

    def fold(self, w: ReluWeights) -> Folded:
        return one_sided(w.W_enc, w.b_enc - w.W_enc @ w.b_dec, w.W_dec, w.b_dec, torch.zeros_like(w.b_enc))


class JumpReluFamily(Family[JumpReluWeights]):
    weights = JumpReluWeights
    config: JumpRelu

    def __init__(self, config: JumpRelu) -> None:
        self.config = config

    def initial(self, d_in: int, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> JumpReluWeights:
        d_sae = self.config.d_sae
        theta = torch.full((d_sae,), self.config.theta0 / d_in**0.5)
        parts = first_weights(d_in, d_sae, mean, generator)
        return JumpReluWeights(**parts, b_enc=torch.zeros(d_sae), theta=theta)

    def encode(self, w: JumpReluWeights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        u = pre_activations(w, x)
        return torch.where(u <= w.theta, 0.0, u)

    def width(self, w: JumpReluWeights) -> float:
        """ε."""
        return self.config.bandwidth / math.sqrt(w.W_dec.shape[1])

    def loss(self, w: JumpReluWeights, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, ""]:
        """Its value is exact; what autograd makes of it are the straight-through gradients."""
        u = pre_activations(w, x)
        gate = (u > w.theta).to(u.dtype)
        smooth = torch.clamp((u.detach() - w.theta) / self.width(w), -0.5, 0.5)
        smooth = smooth - smooth.detach()
        f = u * gate + w.theta.detach() * smooth
        return ((x - decode(w, f)).square().sum(1) + now.sparsity * (gate + smooth).sum(1)).mean()

    def gradients(
        self, w: JumpReluWeights, x: Float[Tensor, "batch d_in"], now: StepInputs
    ) -> tuple[JumpReluWeights, StepMetrics]:
        batch, width = len(x), self.width(w)
        centred, low, u = products(w, x, now)
        active = (u > w.theta).to(u.dtype)
        near = ((u - w.theta).abs() < width / 2).to(u.dtype)
        f = u.mul_(active)
        error, to_f, to_W_dec = reconstruct(w, f, centred, now)
        to_theta = -(torch.add(w.theta * to_f, now.sparsity / batch) * near).sum(0) / width
        to_u = to_f.mul_(active)
        grads = JumpReluWeights(**backward(w, to_u, low, error, now), W_dec=to_W_dec, b_enc=to_u.sum(0), theta=to_theta)
        return grads, measured(error, active.sum() / batch, active)

    def constrain_(self, w: JumpReluWeights) -> None:
        w.theta.clamp_(min=0.0)

    def fold(self, w: JumpReluWeights) -> Folded:
        return one_sided(w.W_enc, w.b_enc - w.W_enc @ w.b_dec, w.W_dec, w.b_dec, w.theta)


def products(w: Weights, x: Tensor, now: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(x - b_dec, the same rounded, u [batch, d_sae] float32). b_dec is subtracted before rounding."""
    centred = x - w.b_dec
    low = centred.to(now.matmul)
    u = (low @ w.W_enc.to(now.matmul).T).float()
    b_enc = getattr(w, "b_enc", None)
    return centred, low, u if b_enc is None else u.add_(b_enc)


def reconstruct(w: Weights, f: Tensor, centred: Tensor, now: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂ - x, ∂/∂f, ∂/∂W_dec) of |x - x̂|², mean over the batch."""
    batch, W_dec, code = len(f), w.W_dec.to(now.matmul), f.to(now.matmul)
    error = (code @ W_dec).float() - centred
    error_low = error.to(now.matmul)
    to_f = (error_low @ W_dec.T).float().mul_(2 / batch)
    return error, to_f, (code.T @ error_low).float().mul_(2 / batch)


def backward(w: Weights, to_u: Tensor, low: Tensor, error: Tensor, now: StepInputs) -> dict[str, Tensor]:
    """∂/∂W_enc and ∂/∂b_dec: that of the reconstruction, and through x - b_dec."""
    to_b_dec = error.sum(0).mul_(2 / len(error)) - to_u.sum(0) @ w.W_enc
    return {"W_enc": (to_u.to(now.matmul).T @ low).float(), "b_dec": to_b_dec}


def measured(error: Tensor, penalty: Tensor, active: Tensor) -> StepMetrics:
    batch = len(error)
    return StepMetrics(
        error.square().sum() / batch, penalty, torch.zeros_like(penalty), active.sum() / batch, active.amax(0) > 0
    )
