"""Folders as an import writes them: weights of random directions for a store's activations, λ not known."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.saes import sae_config
from shared.store.opened import Store
from train.autoencoder import Autoencoder
from train.sae.families import family

IMPORTED = {"tool": "SAELens", "format": "saelens", "source": "a-release/layer_1", "sha256": "0" * 64}


def imported(
    folder: Path, store: Store, hook: str, arch: str = "jumprelu", d_sae: int = 48, seed: int = 0, **about: Any
) -> Path:
    """Writes an autoencoder whose latents fire on a part of the activations. `about` changes what cfg.json says."""
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
