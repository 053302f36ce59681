"""Sign-Aware Gated and Gated sparse autoencoders: one family, one set of equations.

    u = (x - b_dec) W_encᵀ                          a, s = |u|, sign(u)   (SA-GSAE)      a, s = u, 1   (Gated)
    gate   m = 1[a > θ]                             soft gate  g = s·ReLU(a - θ)
    code   f = s·m·ReLU(eʳ a + b)                   x̂ = f W_dec + b_dec
    loss   |x - x̂|² + λ Σ|g| + |x - (g W̄_dec + b̄_dec)|²       summed over d_in, mean over the batch; bars: no gradient

Gated: arXiv 2404.16014. SA-GSAE (arXiv 2605.28149) in its tied form, as derived in docs/method.md: the ReLU acts on the
magnitude of each side, so an open latent can never change its sign. Decoder rows have unit norm; x has unit variance.
θ is trained by the L1 and auxiliary terms alone, r and b by the reconstruction alone. Axis names: batch, d_in, d_sae.
"""

from dataclasses import dataclass, fields
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

R_LIMIT: Final = 5.0
"""|r| is held below this, so that eʳ stays finite."""
SMALLEST_NORM: Final = 1e-6
"""A decoder row shorter than this has no direction left and is drawn anew."""


@dataclass
class Weights:
    """The parameters, float32, in units where the activations have unit variance."""

    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    theta: Float[Tensor, " d_sae"]
    r: Float[Tensor, " d_sae"]
    b: Float[Tensor, " d_sae"]

    def named(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Step:
    """What a step measured, as device tensors (reading one waits for the device)."""

    reconstruction: Float[Tensor, ""]
    """|x - x̂|², mean over the batch: with unit variance, the fraction of variance unexplained."""
    sparsity: Float[Tensor, ""]
    """Σ|g|, mean over the batch, without λ."""
    auxiliary: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]
    """Which latents were non-zero somewhere in the batch."""


def initial_weights(
    d_in: int, d_sae: int, theta0: float, mean: Float[Tensor, " d_in"], generator: torch.Generator
) -> Weights:
    """Random unit decoder rows, the encoder a copy of them, b_dec the data's mean, θ = theta0 / sqrt(d_in)."""
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    theta = torch.full((d_sae,), theta0 / d_in**0.5)
    return Weights(W_dec.clone(), W_dec, mean.float().clone(), theta, torch.zeros(d_sae), torch.zeros(d_sae))


def pre_activations(w: Weights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    return (x - w.b_dec) @ w.W_enc.T


def encode(w: Weights, x: Float[Tensor, "batch d_in"], signed: bool) -> Float[Tensor, "batch d_sae"]:
    """The code f, in the precision of its inputs."""
    u = pre_activations(w, x)
    a = u.abs() if signed else u
    magnitude = torch.where(a > w.theta, torch.relu(torch.exp(w.r) * a + w.b), 0.0)
    return u.sign() * magnitude if signed else magnitude


def decode(w: Weights, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
    return f @ w.W_dec + w.b_dec


def loss(w: Weights, x: Float[Tensor, "batch d_in"], sparsity: float, signed: bool) -> Float[Tensor, ""]:
    """The training loss, written to be read and differentiated by autograd. `gradients` is what training uses."""
    u = pre_activations(w, x)
    a = u.abs() if signed else u
    g = torch.relu(a - w.theta)
    soft_code = u.sign() * g if signed else g
    main = (x - decode(w, encode(w, x, signed))).square().sum(1)
    aux = (x - (soft_code @ w.W_dec.detach() + w.b_dec.detach())).square().sum(1)
    return (main + sparsity * g.sum(1) + aux).mean()


def gradients(
    w: Weights, x: Float[Tensor, "batch d_in"], sparsity: float, signed: bool, matmul: torch.dtype
) -> tuple[Weights, Step]:
    """∂loss/∂weights in closed form (docs/method.md, gradients), and what the step measured.

    Seven matrix products, whose inputs are rounded to `matmul`; thresholds and sums stay float32. b_dec is
    subtracted before rounding: activations have a mean much longer than their spread.
    """
    batch = len(x)
    W_enc, W_dec = w.W_enc.to(matmul), w.W_dec.to(matmul)
    centred = x - w.b_dec
    low = centred.to(matmul)
    u = (low @ W_enc.T).float()
    a, s = (u.abs(), u.sign()) if signed else (u, None)
    # 0/1 masks are the signs of non-negative floats: on a CPU far cheaper than comparisons and torch.where.
    g_size = torch.relu_(a - w.theta)
    open_gate = g_size.sign()
    scale = torch.exp(w.r)
    f_size = torch.relu_(torch.addcmul(w.b, scale, a)).mul_(open_gate)
    active = f_size.sign()
    f, g = times(f_size, s).to(matmul), times(g_size, s).to(matmul)

    error = (f @ W_dec).float() - centred
    aux_error = (g @ W_dec).float() - centred
    error_low, aux_low = error.to(matmul), aux_error.to(matmul)
    to_magnitude = times((error_low @ W_dec.T).float(), s).mul_(2 / batch).mul_(active)
    to_gate = times((aux_low @ W_dec.T).float(), s).mul_(2 / batch).add_(sparsity / batch).mul_(open_gate)
    to_u = times(torch.addcmul(to_gate, scale, to_magnitude), s)

    grads = Weights(
        W_enc=(to_u.to(matmul).T @ low).float(),
        W_dec=(f.T @ error_low).float().mul_(2 / batch),
        b_dec=error.sum(0).mul_(2 / batch) - to_u.sum(0) @ w.W_enc,
        theta=-to_gate.sum(0),
        r=scale * (to_magnitude * a).sum(0),
        b=to_magnitude.sum(0),
    )
    step = Step(
        reconstruction=error.square().sum() / batch,
        sparsity=g_size.sum() / batch,
        auxiliary=aux_error.square().sum() / batch,
        l0=active.sum() / batch,
        fired=active.amax(0) > 0,
    )
    return grads, step


def times(size: Tensor, sign: Tensor | None) -> Tensor:
    return size if sign is None else size * sign


def project_gradient_(w: Weights, grads: Weights) -> None:
    """Takes the part along each decoder row out of its gradient: only the direction is trained."""
    along = (grads.W_dec * w.W_dec).sum(1, keepdim=True)
    grads.W_dec.addcmul_(along, w.W_dec, value=-1)


def constrain_(w: Weights, signed: bool) -> None:
    """After the optimiser's step: unit decoder rows, |r| bounded, and θ >= 0 where both sides share it (with θ < 0
    both gates of a latent would be open at once)."""
    w.W_dec /= w.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    w.r.clamp_(-R_LIMIT, R_LIMIT)
    if signed:
        w.theta.clamp_(min=0.0)
