"""A language model whose unembedding is known: logits are linear in an activation that the last token decides."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shared.saes import sae_config
from train.autoencoder import Autoencoder
from train.sae.families import family

VOCABULARY, WIDTH, CONTEXT = 240, 64, 32


@dataclass
class LinearModel:
    """logits = x W_Uᵀ with x = E[token]. E and W_U are made of `directions`: each token has two of them, with signs, in
    its activation, and one in its row of W_U. Each direction with each sign is in the activations of 3 tokens at least,
    and in the rows of W_U of 3."""

    directions: Tensor
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    vocab_size: int = VOCABULARY

    def __post_init__(self) -> None:
        rng, many = np.random.default_rng(self.seed), len(self.directions)
        read, written = np.zeros((VOCABULARY, many)), np.zeros((VOCABULARY, many))
        for token in range(VOCABULARY):
            sign = 1 if token // many % 2 else -1
            read[token, rng.choice(many)] = rng.uniform(0.5, 1.0) * rng.choice([-1, 1])
            read[token, token % many] = rng.uniform(1.0, 1.5) * sign
            written[token, (7 * token + 3) % many] = 1.5 * sign
        self.embedding = torch.from_numpy(read).float() @ self.directions
        self.unembedding = torch.from_numpy(written).float() @ self.directions

    def logits(self, tokens: Tensor, splice: tuple[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        x = self.embedding[tokens]
        return (x if splice is None else splice[1](x)) @ self.unembedding.T

    def text(self, contexts: int, seed: int) -> np.ndarray:
        """Contexts that the model wrote: [contexts, CONTEXT] ids."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(VOCABULARY, (contexts, 1), generator=generator)
        for _ in range(CONTEXT - 1):
            p = self.logits(ids[:, -1:])[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
        return ids.numpy()


def orthonormal(many: int, seed: int = 0) -> Tensor:
    """[many, WIDTH]"""
    square: Tensor = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))[0]
    return square[:many]


def exact_sae(encoder: Tensor, decoder: Tensor) -> Autoencoder:
    """An SA-GSAE that reads `encoder` directions [n, WIDTH] above 0.1 and writes `decoder` directions."""
    config = sae_config(arch="sa-gsae", d_sae=len(encoder), sparsity=0.1)
    weights = family(config).initial(WIDTH, torch.zeros(WIDTH), torch.Generator())
    for name, tensor in weights.named().items():
        tensor.copy_({"W_enc": encoder, "W_dec": decoder, "theta": torch.tensor(0.1)}.get(name, torch.tensor(0.0)))
    return Autoencoder(config, weights, 1.5)
