"""A trained autoencoder as a user meets it: a folder with `sae.safetensors` and `config.json`, on raw activations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from shared.device import native_dtype, torch_dtype
from shared.errors import DamagedError, UserError
from shared.files import write_file
from shared.record import write_json
from shared.saes import ARCHITECTURES, SAEConfig, sae_config
from train.sae import gated


@dataclass(frozen=True)
class Autoencoder:
    """Weights in units of unit variance, and the one number that takes raw activations there."""

    config: SAEConfig
    weights: gated.Weights
    scale: float
    """sqrt(E|x - mean|²) of the activations it was trained on."""

    @property
    def signed(self) -> bool:
        return self.config.arch == "sa-gsae"

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Raw activations to latents, float32, in units of `scale`. SA-GSAE latents carry a sign."""
        return gated.encode(self.weights, x.float() / self.scale, self.signed)

    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        """Latents back to raw activations, float32."""
        return gated.decode(self.weights, f) * self.scale

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Writes the folder. `about` says where the activations came from."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.named().items()}
        write_file(folder / "sae.safetensors", save(tensors))
        d_in = self.weights.W_dec.shape[1]
        write_json(folder / "config.json", {**self.config.model_dump(), "d_in": d_in, "scale": self.scale, **about})

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Autoencoder":
        """Raises UserError when the folder does not hold an autoencoder."""
        try:
            about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "sae.safetensors", device=device)
            config = sae_config(**{key: about[key] for key in ARCHITECTURES[about["arch"]].model_fields})
            return cls(config, gated.Weights(**tensors), float(about["scale"]))
        except SafetensorError as error:
            raise DamagedError(f"{folder / 'sae.safetensors'}: cannot be read ({error})") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: does not hold a trained autoencoder ({error!r})") from error


def matmul_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What matrix products take in. auto: bfloat16 where the hardware multiplies it natively, else float32."""
    return torch_dtype(native_dtype(device) if precision == "auto" else precision)
