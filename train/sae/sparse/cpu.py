"""The sparse step with PyTorch alone: `embedding_bag` and its derivative, on any device."""

import torch
from jaxtyping import Float
from torch import Tensor

from train.sae.base import StepInputs, StepMetrics
from train.sae.gated import GatedFamily, GatedWeights
from train.sae.sparse.open import BLOCK, GPU_BLOCK, OpenEntries, above, bounds, of_entries


def open_entries(family: GatedFamily, w: GatedWeights, low: Float[Tensor, "batch d_in"]) -> OpenEntries:
    """`low` is x - b_dec, in the type that products are taken in."""
    batch, d_sae = len(low), len(w.W_enc)
    block = max(1, (BLOCK if low.device.type == "cpu" else GPU_BLOCK) // batch)
    found = []
    for first in range(0, d_sae, block):
        rows = slice(first, first + block)
        u = (w.W_enc[rows].to(low.dtype) @ low.T).float()
        latent, token = above(family, u, w.theta[:, rows]).nonzero(as_tuple=True)
        found.append((latent + first if first else latent, token, u[latent, token]))
    latent, token, values = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    ordered, by_token = torch.sort(token, stable=True)
    return OpenEntries(latent, token, values, by_token, bounds(ordered, batch), bounds(latent, d_sae))


def cpu_gradients(
    family: GatedFamily, w: GatedWeights, x: Float[Tensor, "batch d_in"], now: StepInputs
) -> tuple[GatedWeights, StepMetrics]:
    """What `family.gradients` gives."""
    batch = len(x)
    centred = x - w.b_dec
    at = open_entries(family, w, centred.to(now.matmul))
    a, s = family.size(at.u)
    sign = torch.ones_like(a) if s is None else s
    scale = torch.exp(of_entries(w.r, at))
    g = a - of_entries(w.theta, at)
    f = torch.relu(scale * a + of_entries(w.b, at))
    active = f.sign()

    codes = [f * sign, g * sign] if family.config.aux else [f * sign]
    error, *aux_error = [decoded.sub_(centred) for decoded in at.sum_by_token(codes, w.W_dec)]
    of_error, *of_aux_error = at.dots([error, *aux_error], w.W_dec)
    to_magnitude = of_error * sign * active * (2 / batch)
    to_gate = torch.zeros_like(a) + now.sparsity / batch
    auxiliary = torch.zeros((), device=x.device)
    if aux_error:
        to_gate += of_aux_error[0] * sign * (2 / batch)
        auxiliary = aux_error[0].square().sum() / batch
    to_u = (to_gate + scale * to_magnitude) * sign
    to_W_enc, to_W_dec = at.sum_by_latent([to_u, codes[0] * (2 / batch)], [centred, error])
    grads = GatedWeights(
        W_enc=to_W_enc,
        W_dec=to_W_dec,
        b_dec=error.sum(0) * (2 / batch) - at.total(to_u) @ w.W_enc,
        theta=-at.total_by_pole(to_gate, len(w.theta)),
        r=torch.exp(w.r) * at.total_by_pole(to_magnitude * a, len(w.r)),
        b=at.total_by_pole(to_magnitude, len(w.b)),
    )
    fired = at.total(active) > 0
    step = StepMetrics(error.square().sum() / batch, g.sum() / batch, auxiliary, active.sum() / batch, fired)
    return grads, step
