"""Sign-Aware Gated and Gated sparse autoencoders: one family, one set of equations.

    u = (x - b_dec) W_encᵀ                          a, s = |u|, sign(u)   (SA-GSAE)      a, s = u, 1   (Gated)
    gate   m = 1[a > θ]                             soft gate  g = s·ReLU(a - θ)
    code   f = s·m·ReLU(eʳ a + b)                   x̂ = f W_dec + b_dec
    loss   |x - x̂|² + λ Σ|g| + |x - (g W̄_dec + b̄_dec)|²       summed over d_in, mean over the batch; bars: no gradient

Gated: arXiv 2404.16014. SA-GSAE (arXiv 2605.28149) as derived in docs/explanation/method.md: the ReLU acts on the
magnitude of each side, so an open latent can never change its sign. θ, r, b have a row for each pole, or one for both
(`tie`); an entry uses the row of the sign of u, which is all of it because θ >= 0 lets at most one pole be open.
Decoder rows have unit norm; x has unit variance. θ is trained by the L1 and auxiliary terms alone, r and b by the
reconstruction alone.

The free decoder (`Gated.decoder`) has no bars and no unit norm; its penalty is λ Σ|g_i||d_i|.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shared.saes import Gated, SaGsae
from train.sae.activation import Folded
from train.sae.base import Family, StepInputs, StepMetrics, Weights, decode, first_weights

AT_ONCE: Final = 1 << 24
"""Pre-activations that a reset looks at."""
CLOSED: Final = 1e30
"""A threshold that nothing exceeds. It is finite, as every saved number is."""
R_LIMIT: Final = 5.0
"""|r| is held below this, so that eʳ stays finite."""


@dataclass
class GatedWeights(Weights):
    theta: Float[Tensor, "poles d_sae"]
    r: Float[Tensor, "r_poles d_sae"]
    b: Float[Tensor, "poles d_sae"]

    LENGTHS: ClassVar[frozenset[str]] = frozenset({"b_dec", "theta", "b"})


class GatedFamily(Family[GatedWeights]):
    weights = GatedWeights
    config: Gated | SaGsae
    resets: ClassVar = ("theta", "r", "b")

    def __init__(self, config: Gated | SaGsae) -> None:
        self.config = config
        self.signed = isinstance(config, SaGsae) and not config.one_sided
        self.unit_decoder = not (isinstance(config, Gated) and config.decoder == "free")
        tie = config.tie if isinstance(config, SaGsae) and self.signed else "symmetric"
        self.uneven = config if isinstance(config, SaGsae) and config.uneven else None
        """The configuration, where the poles begin with different thresholds."""
        both = 1 if tie == "symmetric" else 2
        self.poles = {"theta": both, "r": 2 if tie == "none" else 1, "b": both}

    def initial(self, d_in: int, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> GatedWeights:
        """θ = theta0 / sqrt(d_in) (of negative poles, `theta0_negative` times that), r = b = 0."""
        d_sae = self.config.d_sae
        theta = torch.full((self.poles["theta"], d_sae), self.config.theta0 / d_in**0.5)
        if self.uneven:
            theta[1] *= self.uneven.theta0_negative
        return GatedWeights(
            **first_weights(d_in, d_sae, mean, generator),
            theta=theta,
            r=torch.zeros(self.poles["r"], d_sae),
            b=torch.zeros(self.poles["b"], d_sae),
        )

    def size(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """a and s; None stands for ones."""
        return (u.abs(), u.sign()) if self.signed else (u, None)

    def encode(self, w: GatedWeights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        return self.code(pre_activations(w, x), w.theta, w.r, w.b)

    def code(
        self,
        u: Float[Tensor, "*batch n"],
        theta: Float[Tensor, "poles n"],
        r: Float[Tensor, "r_poles n"],
        b: Float[Tensor, "poles n"],
    ) -> Float[Tensor, "*batch n"]:
        """f of some pre-activations. The scalars are those of their latents."""
        a, s = self.size(u)
        magnitude = torch.relu(torch.exp(pole(r, u)) * a + pole(b, u))
        return times(torch.where(a <= pole(theta, u), 0.0, magnitude), s)

    def closed(self, u: Any, theta: Any) -> Any:
        """Where f is zero for certain, found with fewer passes over u than `code` needs. NaN is not closed. `u` [batch,
        d_sae] and `theta` [poles, d_sae] are both tensors, or both numpy's arrays."""
        if not self.signed:
            return u <= theta[0]
        if len(theta) == 1:
            return abs(u) <= theta[0]
        return (u <= theta[0]) & (u >= -theta[1])

    def loss(self, w: GatedWeights, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, ""]:
        u = pre_activations(w, x)
        a, s = self.size(u)
        g = torch.relu(a - pole(w.theta, u))
        main = (x - decode(w, self.encode(w, x))).square().sum(1)
        penalty = (g if self.unit_decoder else g * w.W_dec.norm(dim=1)).sum(1)
        if not self.config.aux:
            return (main + now.sparsity * penalty).mean()
        W_dec, b_dec = (w.W_dec.detach(), w.b_dec.detach()) if self.unit_decoder else (w.W_dec, w.b_dec)
        aux = (x - (times(g, s) @ W_dec + b_dec)).square().sum(1)
        return (main + now.sparsity * penalty + aux).mean()

    def gradients(
        self, w: GatedWeights, x: Float[Tensor, "batch d_in"], now: StepInputs
    ) -> tuple[GatedWeights, StepMetrics]:
        """Seven matrix products (docs/explanation/method.md, gradients); thresholds and sums stay float32. b_dec is
        subtracted before rounding to `now.matmul`: activations have a mean much longer than their spread."""
        batch = len(x)
        W_enc, W_dec = w.W_enc.to(now.matmul), w.W_dec.to(now.matmul)
        centred = x - w.b_dec
        low = centred.to(now.matmul)
        u = (low @ W_enc.T).float()
        a, s = self.size(u)
        # 0/1 masks are the signs of non-negative floats: on a CPU far cheaper than comparisons and torch.where.
        g_size = torch.relu_(a - pole(w.theta, u))
        open_gate = g_size.sign()
        scale = torch.exp(pole(w.r, u))
        f_size = torch.relu_(torch.addcmul(pole(w.b, u), scale, a)).mul_(open_gate)
        active = f_size.sign()
        f, g = times(f_size, s).to(now.matmul), times(g_size, s).to(now.matmul)

        error = (f @ W_dec).float() - centred
        error_low = error.to(now.matmul)
        norm = None if self.unit_decoder else w.W_dec.norm(dim=1)
        price = now.sparsity / batch if norm is None else now.sparsity / batch * norm
        to_magnitude = times((error_low @ W_dec.T).float(), s).mul_(2 / batch).mul_(active)
        to_W_dec = (f.T @ error_low).float().mul_(2 / batch)
        to_b_dec = error.sum(0).mul_(2 / batch)
        if self.config.aux:
            aux_error = (g @ W_dec).float() - centred
            aux_low = aux_error.to(now.matmul)
            to_gate = times((aux_low @ W_dec.T).float(), s).mul_(2 / batch).add_(price).mul_(open_gate)
            auxiliary = aux_error.square().sum() / batch
            if norm is not None:
                to_W_dec.add_((g.T @ aux_low).float(), alpha=2 / batch)
                to_b_dec.add_(aux_error.sum(0), alpha=2 / batch)
        else:
            to_gate, auxiliary = open_gate * price, torch.zeros_like(to_b_dec.sum())
        if norm is not None:
            pull = g_size.sum(0) * (now.sparsity / batch) / norm.clamp_min(1e-8)
            to_W_dec.addcmul_(pull[:, None], w.W_dec)
        to_u = times(torch.addcmul(to_gate, scale, to_magnitude), s)

        grads = GatedWeights(
            W_enc=(to_u.to(now.matmul).T @ low).float(),
            W_dec=to_W_dec,
            b_dec=to_b_dec - to_u.sum(0) @ w.W_enc,
            theta=-by_pole(to_gate, u, len(w.theta)),
            r=torch.exp(w.r) * by_pole(to_magnitude * a, u, len(w.r)),
            b=by_pole(to_magnitude, u, len(w.b)),
        )
        penalty = (g_size if norm is None else g_size * norm).sum() / batch
        step = StepMetrics(error.square().sum() / batch, penalty, auxiliary, active.sum() / batch, active.amax(0) > 0)
        return grads, step

    def constrain_(self, w: GatedWeights) -> None:
        """|r| bounded, and θ >= 0 where latents have two poles (with a sum below 0 both would be open at once)."""
        w.r.clamp_(-R_LIMIT, R_LIMIT)
        if self.signed:
            w.theta.clamp_(min=0.0)

    def fold(self, w: GatedWeights) -> Folded:
        """z = e^(r⁺)·u, T = max(eʳθ, -b) for each pole, ρ = e^(r⁻ - r⁺) (docs/explanation/method.md, inference)."""
        W_enc = torch.exp(w.r[0])[:, None] * w.W_enc
        threshold = torch.maximum(torch.exp(w.r) * w.theta, -w.b).expand(2, -1).clone()
        if not self.signed:
            threshold[1] = torch.inf
        slope = torch.exp(w.r[-1] - w.r[0])
        return Folded(W_enc, -(W_enc @ w.b_dec), w.W_dec, w.b_dec, threshold, w.b.expand(2, -1).clone(), slope)

    def first_negative(self, w: GatedWeights, batches: Sequence[Float[Tensor, "_ d_in"]], rate: float) -> float:
        """The threshold that as many entries of all negative poles exceed on these rows as `rate` times `l0_target`, or
        times what the positive poles fire. With a rate of 0 nothing ever exceeds it."""
        if rate == 0.0:
            return CLOSED
        if self.config.l0_target is None:
            firings = sum(int((pre_activations(w, x) > w.theta[0]).sum()) for x in batches)
        else:
            firings = round(self.config.l0_target * sum(map(len, batches)))
        wanted = max(1, round(rate * firings))
        return max(0.0, smallest_of_largest((-pre_activations(w, x) for x in batches), wanted).item())

    def energy(self, w: GatedWeights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "2 d_sae"]:
        """Sum of squares of the code of each latent's two poles, in float64."""
        f = self.encode(w, x)
        return torch.stack([(side.relu() ** 2).sum(0, dtype=torch.float64) for side in (f, -f)])

    def flip_(self, w: GatedWeights, which: Bool[Tensor, " d_sae"]) -> None:
        """Exchanges the poles of these latents. The function stays the same, bit for bit, but for the sign of f."""
        for matrix in (w.W_enc, w.W_dec):
            matrix[which] = -matrix[which]
        for scalars in (w.theta, w.r, w.b):
            if len(scalars) == 2:
                scalars[:, which] = scalars[:, which].flip(0)

    def reset_(self, w: GatedWeights, x: Float[Tensor, "batch d_in"], which: Bool[Tensor, " d_sae"]) -> None:
        """Sets for the latents in `which` the threshold above which a share `reset_share` of this batch lies, and
        r = b = 0. Each then fires on that share, whatever the length of its encoder row. Where the poles begin with
        different thresholds, that is the positive poles' share, and the negative poles' thresholds begin again."""
        rank = min(len(x), max(1, round(len(x) * (1 - self.config.reset_share))))
        centred = x - w.b_dec
        silent = torch.nonzero(which).flatten()  # nearly all may be
        for some in torch.split(silent, max(1, AT_ONCE // len(x))):
            u = centred @ w.W_enc[some].T
            theta = torch.kthvalue(u if self.uneven else self.size(u)[0], rank, dim=0).values
            w.theta[:, some] = theta.clamp_min(0.0) if self.signed else theta
            if self.uneven:
                w.theta[1, some] = self.negative_after_reset(u, w.theta[0, some])
            w.r[:, some] = 0.0
            w.b[:, some] = 0.0

    def negative_after_reset(
        self, u: Float[Tensor, "batch latents"], positive: Float[Tensor, " latents"]
    ) -> Float[Tensor, " latents"]:
        """The negative poles' thresholds beside these of the positive ones."""
        assert self.uneven
        rate = self.uneven.negative_rate
        if rate is None:
            return positive * self.uneven.theta0_negative
        if not rate:
            return torch.full_like(positive, CLOSED)
        many = max(1, round(rate * self.config.reset_share * len(u)))
        return torch.kthvalue(-u, len(u) - many, dim=0).values.clamp_min(0.0)


def smallest_of_largest(parts: Iterable[Tensor], wanted: int) -> Float[Tensor, ""]:
    """The value that exactly `wanted` values of all parts exceed. Of fewer values, the smallest."""
    largest = torch.empty(0)
    for part in parts:
        values = part.reshape(-1)
        largest = largest.to(values)
        floor = largest.min() if len(largest) > wanted else values.new_tensor(-torch.inf)
        largest = torch.cat([largest, values[values > floor]])
        largest = torch.topk(largest, min(len(largest), wanted + 1), sorted=False).values
    return largest.min()


def pre_activations(w: Weights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    return (x - w.b_dec) @ w.W_enc.T


def pole(scalars: Float[Tensor, "poles d_sae"], u: Float[Tensor, "*batch d_sae"]) -> Tensor:
    """The row that an entry of u uses: the second where u is negative, if there is one."""
    return scalars[0] if len(scalars) == 1 else torch.where(u < 0, scalars[1], scalars[0])


def by_pole(gradient: Float[Tensor, "batch d_sae"], u: Float[Tensor, "batch d_sae"], poles: int) -> Tensor:
    """Sums over the batch, for each row of `pole`."""
    if poles == 1:
        return gradient.sum(0, keepdim=True)
    negative = u < 0
    return torch.stack([gradient.masked_fill(negative, 0.0).sum(0), gradient.masked_fill(~negative, 0.0).sum(0)])


def times(size: Tensor, sign: Tensor | None) -> Tensor:
    return size if sign is None else size * sign


def split(w: GatedWeights) -> GatedWeights:
    """SA-GSAE(d_sae) as the Gated SAE (2·d_sae) with the same loss: both poles of each latent become latents."""
    both = {name: getattr(w, name).expand(2, -1).reshape(1, -1) for name in ("theta", "r", "b")}
    return GatedWeights(torch.cat([w.W_enc, -w.W_enc]), torch.cat([w.W_dec, -w.W_dec]), w.b_dec, **both)


def join(w: GatedWeights) -> GatedWeights:
    """The SA-GSAE that `split` made this Gated SAE of. Raises ValueError when it is not two mirrored halves."""
    half = len(w.W_enc) // 2
    mirrored = all(torch.equal(part[:half], -part[half:]) for part in (w.W_enc, w.W_dec))
    if len(w.W_enc) % 2 or not mirrored:
        raise ValueError("the second half of its latents does not mirror the first")
    if (w.theta < 0).any():
        raise ValueError("a threshold is negative: both poles of a latent could be open at once")
    poles = {name: getattr(w, name).reshape(2, half) for name in ("theta", "r", "b")}
    return tied(GatedWeights(w.W_enc[:half].clone(), w.W_dec[:half].clone(), w.b_dec, **poles))


def tied(w: GatedWeights) -> GatedWeights:
    """The same function with one row where those of both poles are equal, as far as a tie can say it."""
    poles = {name: getattr(w, name) for name in ("theta", "r", "b")}
    equal = {name: torch.equal(rows[0], rows[1]) for name, rows in poles.items()}
    shared = poles if all(equal.values()) else {"r"} if equal["r"] else {}
    return replace(w, **{name: rows[:1] if name in shared else rows for name, rows in poles.items()})


def tie_of(w: GatedWeights) -> str:
    """The tie of two-sided weights: what both poles of a latent share."""
    return "symmetric" if len(w.theta) == 1 else "magnitude" if len(w.r) == 1 else "none"
