"""Every architecture, tie and ablation, with weights away from their first values; data whose features are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.saes import SAEConfig, sae_config
from shared.store.opened import Store
from train.autoencoder import Autoencoder
from train.fit.optim import Optimizer, learning_rate, usual_warmup
from train.sae.base import StepInputs, StepMetrics, Weights, decode
from train.sae.families import family
from train.sae.gated import GatedFamily

D_IN, D_SAE, BATCH = 16, 48, 64

VARIANTS: dict[str, dict[str, Any]] = {
    "sa-gsae": {"arch": "sa-gsae"},
    "r tied": {"arch": "sa-gsae", "tie": "magnitude"},
    "untied": {"arch": "sa-gsae", "tie": "none"},
    "one-sided": {"arch": "sa-gsae", "one_sided": True},
    "no aux": {"arch": "sa-gsae", "aux": False},
    "untied, no aux": {"arch": "sa-gsae", "tie": "none", "aux": False},
    "gated": {"arch": "gated"},
    "gated, no aux": {"arch": "gated", "aux": False},
    "gated, free decoder": {"arch": "gated", "decoder": "free"},
    "free decoder, no aux": {"arch": "gated", "decoder": "free", "aux": False},
    "relu": {"arch": "relu"},
    "jumprelu": {"arch": "jumprelu"},
    "batch-topk": {"arch": "batch-topk", "k": 4, "aux_k": 5, "aux_after": 100},
    "abs-topk": {"arch": "abs-topk", "k": 4, "aux_k": 5, "aux_after": 100},
    "topk": {"arch": "topk", "k": 4, "aux_k": 5, "aux_after": 100},
    "signed-topk": {"arch": "signed-topk", "k": 4, "aux_k": 5, "aux_after": 100},
}
GATED = [name for name, values in VARIANTS.items() if values["arch"] in ("sa-gsae", "gated")]


def variant(name: str, d_sae: int = D_SAE, **changes: Any) -> SAEConfig:
    config: SAEConfig = sae_config(**{"d_sae": d_sae, **VARIANTS[name], **changes})
    return config


def gated_family(config: SAEConfig) -> GatedFamily:
    """The mathematics of a gated variant."""
    mathematics = family(config)
    assert isinstance(mathematics, GatedFamily)
    return mathematics


FOLDING = [name for name in VARIANTS if family(variant(name)).folds]


def weights(config: SAEConfig, seed: int = 0, d_in: int = D_IN) -> Any:
    """No term of a gradient vanishes by accident."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    w: Weights = family(config).initial(d_in, torch.randn(d_in, generator=generator), generator)
    named = w.named()
    changes = {"W_enc": 1.3 * named["W_enc"] + 0.05 * noise(named["W_enc"])}
    changes |= {key: size * noise(named[key]) for key, size in (("r", 0.3), ("b", 0.1), ("b_enc", 0.1)) if key in named}
    if "theta" in named:
        changes["theta"] = (named["theta"] * (1 + 0.5 * noise(named["theta"]))).clamp_min(0.01)
    if "threshold" in named:
        changes["threshold"] = torch.tensor(1.1)
    if config.arch == "abs-topk":
        changes["b_enc"] = torch.zeros_like(named["b_enc"])
    if not family(config).unit_decoder:
        changes["W_dec"] = named["W_dec"] * (1 + 0.3 * torch.rand(len(named["W_dec"]), 1, generator=generator))
    return replace(w, **changes)


IMPORTED = {"tool": "SAELens", "format": "saelens", "source": "a-release/layer_1", "sha256": "0" * 64}


def imported(
    folder: Path, store: Store, hook: str, arch: str = "jumprelu", d_sae: int = 48, seed: int = 0, **about: Any
) -> Path:
    """Writes an autoencoder as an import does, its λ not known. Its latents fire on a part of the activations. `about`
    changes what cfg.json says."""
    statistics, generator = store.statistics(hook), torch.Generator().manual_seed(seed)
    mean = torch.from_numpy(statistics.mean).float()

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    settings = {"k": 5} if "topk" in arch else {"sparsity": None}
    config = sae_config(arch=arch, d_sae=d_sae, **settings)
    weights = family(config).initial(len(mean), mean, generator)
    named = weights.named()
    scale = statistics.scale / len(mean) ** 0.5
    named["W_enc"] += 0.05 * noise(named["W_enc"])
    for name in {"theta", "b", "b_enc", "threshold"} & named.keys():
        named[name].copy_(0.3 * scale * noise(named[name]).abs())
    if "r" in named:
        named["r"].copy_(0.2 * noise(named["r"]))
    known = {"model": None, "hook_name": store.spec.hookpoints[hook].name, "context": None, "bos_id": None}
    Autoencoder(config, weights, 1.0).save(folder, {**known, "imported": IMPORTED, **about})
    return folder


def batch(seed: int = 0, n: int = BATCH, d_in: int = D_IN) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(100 + seed))


def silences(d_sae: int = D_SAE, seed: int = 0) -> Tensor:
    """A third of the latents silent for long."""
    return 300 * (torch.rand(d_sae, generator=torch.Generator().manual_seed(seed)) < 0.33).long()


def by_autograd(config: SAEConfig, w: Any, x: Tensor, now: StepInputs) -> tuple[dict[str, Tensor], Tensor]:
    """(gradients, loss) in float64."""
    wide = {name: tensor.double().requires_grad_() for name, tensor in w.named().items()}
    loss = family(config).loss(type(w)(**wide), x.double(), now)
    torch.autograd.backward(loss)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in wide.items()}
    return {name: zeros[name] if p.grad is None else p.grad for name, p in wide.items()}, loss.detach()


def known_features(p_bipolar: float, seed: int) -> tuple[Tensor, Tensor]:
    """(activations [50000, 64] of unit variance, directed features): 96 random directions, 3 active a token with
    Zipf(0.5) frequencies, coefficients U(0.5, 1.5), of either sign for a share `p_bipolar` of them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(96, 64, generator=generator), dim=1)
    coefficients, bipolar = known_coefficients(p_bipolar, generator)
    x = coefficients @ directions
    x += 0.01 * torch.randn(50_000, 64, generator=generator)
    x -= x.mean(0)
    return x / x.square().sum(1).mean().sqrt(), torch.cat([directions, -directions[bipolar]])


def known_coefficients(p_bipolar: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    frequency = torch.arange(1, 97).float() ** -0.5
    active = torch.rand(50_000, 96, generator=generator) < 3 * frequency / frequency.sum()
    size = 0.5 + torch.rand(50_000, 96, generator=generator)
    bipolar = torch.arange(96) < round(96 * p_bipolar)
    bipolar = bipolar[torch.randperm(96, generator=generator)]
    negative = bipolar & (torch.rand(50_000, 96, generator=generator) < 0.5)
    return active * size * torch.where(negative, -1.0, 1.0), bipolar


def update(config: SAEConfig, w: Any, optimizer: Optimizer, x: Tensor, now: StepInputs, lr: float) -> StepMetrics:
    mathematics = family(config)
    grads, step = mathematics.gradients(w, x, now)
    optimizer.step_({name: getattr(grads, name) for name in w.trained()}, lr)
    mathematics.constrain_(w)
    mathematics.absorb_(w, step)
    return step


def trained(
    x: Tensor, config: SAEConfig, steps: int, seed: int = 1, lr: float = 1e-2, matmul: torch.dtype = torch.float32
) -> Any:
    """The recipe on batches of 512, without ranks and files."""
    generator = torch.Generator().manual_seed(seed)
    w = family(config).initial(x.shape[1], x.mean(0), generator)
    optimizer = Optimizer(w, family(config).unit_decoder)
    silent = torch.zeros(config.d_sae, dtype=torch.int64)
    for step in range(steps):
        rows = torch.randint(len(x), (512,), generator=generator)
        now = StepInputs(getattr(config, "sparsity", 0.0), matmul, silent)
        found = update(config, w, optimizer, x[rows], now, learning_rate(step, steps, lr, usual_warmup(steps), 0.3))
        silent += 512
        silent.masked_fill_(found.fired, 0)
    return w


def quality(config: SAEConfig, w: Any, x: Tensor, features: Tensor) -> tuple[float, float, float]:
    """(R², L0, share of the directed features that a firing pole points along with cosine > 0.9)."""
    f = family(config).encode(w, x[:10_000])
    r2 = 1 - ((x[:10_000] - decode(w, f)).square().sum() / x[:10_000].square().sum()).item()
    poles = [w.W_dec[((f > 0).float().mean(0) > 1e-4)], -w.W_dec[((f < 0).float().mean(0) > 1e-4)]]
    directions = torch.cat(poles)
    found = (directions @ features.T).max(0).values > 0.9 if len(directions) else torch.zeros(len(features))
    return r2, (f != 0).float().sum(1).mean().item(), found.float().mean().item()
