"""A trained autoencoder as a user meets it: a folder with `sae_weights.safetensors` and `cfg.json`."""

import hashlib
import math
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.device import native_dtype, torch_dtype
from shared.errors import DamagedError, UserError
from shared.files.handles import Buffer
from shared.files.local import write_file
from shared.gate import BadData, choice, integer, members, number, text
from shared.saes import ARCHITECTURES, Gated, SAEConfig, SaGsae, sae_config
from train.runs.checkpoint import MOST_HEADER, pieces, read_tensors
from train.runs.folder import read_sealed, write_sealed
from train.sae.activation import Folded
from train.sae.base import Weights, decode
from train.sae.families import family
from train.sae.gated import GatedWeights, join, split

WEIGHTS: Final = "sae_weights.safetensors"
SETTINGS: Final = "cfg.json"
MOST_WIDE: Final = 1 << 24
"""Of activations."""


@dataclass(frozen=True)
class Autoencoder:
    """Takes activations as the language model has them, and gives them back; latents are in the same units."""

    config: SAEConfig
    weights: Weights
    """With the normalisation folded in; decoder rows have norm one (the free decoder's apart)."""
    scale: float
    """sqrt(E|x - mean|²) of the activations it was trained on, which had unit variance there. λ, θ0 and the loss in a
    run's metrics are in those units."""

    @classmethod
    def of(cls, config: SAEConfig, weights: Weights, scale: float) -> "Autoencoder":
        """From weights for activations of unit variance."""
        return cls(config, weights.times(scale), scale)

    @property
    def signed(self) -> bool:
        return family(self.config).signed

    @property
    def d_in(self) -> int:
        return self.weights.W_dec.shape[1]

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Raw activations to latents, float32. Signed architectures' latents carry a sign."""
        return family(self.config).encode(self.weights, x.float())

    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        """Latents back to raw activations, float32."""
        return decode(self.weights, f)

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """The reconstruction of raw activations."""
        return self.decode(self.encode(x))

    def to(self, device: torch.device | str) -> "Autoencoder":
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.weights.named().items()}
        return replace(self, weights=replace(self.weights, **moved))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by name, as they are in the file."""
        return self.weights.named()

    def fold(self) -> Folded:
        """The same function in its inference form: one activation, Bi-JumpReLU, between two matrix products. Raises
        UserError for an architecture that has no such form."""
        mathematics = family(self.config)
        if not mathematics.folds:
            raise UserError(
                f"{self.config.name}: does not fold, since no threshold of a latent alone decides whether it is "
                "active. Use encode and decode"
            )
        return mathematics.fold(self.weights)

    def split(self) -> "Autoencoder":
        """An SA-GSAE as the Gated SAE of twice the width that does the same: latent i becomes i and i + d_sae, its
        negative pole. Raises UserError for another architecture."""
        if not isinstance(self.config, SaGsae) or self.config.one_sided or not isinstance(self.weights, GatedWeights):
            raise UserError(f"{self.config.name}: has no two poles with gates to be split; an sa-gsae has")
        mine = {key: value for key, value in self.config if key in Gated.model_fields and key != "arch"}
        config = sae_config(**{**mine, "arch": "gated", "d_sae": 2 * self.config.d_sae})
        return replace(self, config=config, weights=split(self.weights))

    def join(self) -> "Autoencoder":
        """What `split` was made of: a Gated SAE whose second half of latents mirrors the first. Raises UserError when
        it does not."""
        if not isinstance(self.config, Gated) or not isinstance(self.weights, GatedWeights):
            raise UserError(f"{self.config.name}: is not a gated autoencoder, whose halves could be joined")
        try:
            weights = join(self.weights)
        except ValueError as error:
            raise UserError(f"{self.config.name}: cannot be joined to an sa-gsae: {error}") from error
        tie = "symmetric" if len(weights.theta) == 1 else "magnitude" if len(weights.r) == 1 else "none"
        mine = {key: value for key, value in self.config if key in SaGsae.model_fields and key != "arch"}
        config = sae_config(**{**mine, "arch": "sa-gsae", "d_sae": self.config.d_sae // 2, "tie": tie})
        return replace(self, config=config, weights=weights)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Writes the folder. `about` says where the activations came from."""
        digest = hashlib.sha256()

        def counted() -> Iterator[Buffer]:
            for piece in pieces(self.weights.named()):
                digest.update(piece)
                yield piece

        write_file(folder / WEIGHTS, counted())
        own = {"d_in": self.d_in, "scale": self.scale, "sha256": digest.hexdigest()}
        write_sealed(folder / SETTINGS, {**self.config.model_dump(), **own, **about})

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> "Autoencoder":
        """Raises UserError when the folder does not hold an autoencoder, DamagedError when it is not as it was saved:
        another checksum, other tensors than its architecture has, or numbers that are not finite."""
        folder = Path(folder)
        config, d_in, scale, digest = settings_of(folder)
        data = weights_of(folder / WEIGHTS, config, d_in)
        if hashlib.sha256(data.data).hexdigest() != digest:
            raise DamagedError(f"{folder / WEIGHTS}: is not what {SETTINGS} was written with (another SHA-256)")
        try:
            tensors = read_tensors(data)
        except BadData as error:
            raise DamagedError(f"{folder / WEIGHTS}: {error}") from error
        check_tensors(tensors, config, d_in, folder / WEIGHTS)
        placed = {name: tensor.to(device) for name, tensor in tensors.items()}
        return cls(config, family(config).weights(**placed), scale)


def settings_of(folder: Path) -> tuple[SAEConfig, int, float, str]:
    """The configuration, d_in, the scale and the SHA-256 of the weights."""
    try:
        about = read_sealed(folder / SETTINGS)
        members(about, ("arch", "d_in", "scale", "sha256"), None)
        arch = choice(about["arch"], "arch", tuple(ARCHITECTURES))
        fields = members(about, ARCHITECTURES[arch].config.model_fields, None)
        config = sae_config(**{key: fields[key] for key in ARCHITECTURES[arch].config.model_fields})
        d_in = integer(about["d_in"], "d_in", 1, MOST_WIDE)
        scale = number(about["scale"], "scale", sys.float_info.min)
        return config, d_in, scale, text(about["sha256"], "sha256", 64)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: does not hold a trained autoencoder (there is no {SETTINGS})") from error
    except (BadData, UserError) as error:
        raise UserError(f"{folder}: does not hold a trained autoencoder ({SETTINGS}: {str(error)[:500]})") from error


def weights_of(path: Path, config: SAEConfig, d_in: int) -> NDArray[np.uint8]:
    """The file's bytes, no more than such an autoencoder's can be. Raises UserError, DamagedError."""
    expected = 4 * sum(math.prod(shape) for shape in family(config).shapes(d_in).values())
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is no file")
        if not expected < found.st_size <= expected + MOST_HEADER + 8:
            raise DamagedError(
                f"{path}: has {found.st_size:,} bytes; the weights of {config.name} of d_in {d_in} are {expected:,}"
            )
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path.parent}: holds no trained autoencoder ({path.name}: {error.strerror})") from error


def check_tensors(tensors: dict[str, Tensor], config: SAEConfig, d_in: int, what: Path) -> None:
    """Raises UserError for tensors of other names or shapes, DamagedError for another type or for NaN."""
    wanted = family(config).shapes(d_in)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise UserError(f"{what}: holds {found}; {config.name} of d_in {d_in} has {wanted}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise DamagedError(f"{what}: {name} is {tensor.dtype}; autoencoders are saved in float32")
        if not tensor.isfinite().all():
            raise DamagedError(f"{what}: {name} has NaN or infinities. Train this autoencoder again")


def matmul_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What matrix products take in. auto: bfloat16 where the hardware multiplies it natively, else float32. Raises
    UserError for tf32 on what is no CUDA device."""
    if precision == "tf32":
        if device.type != "cuda":
            raise UserError(f"precision = tf32: is a format of CUDA devices, and this is {device}. Use float32")
        return torch.float32
    return torch_dtype(native_dtype(device) if precision == "auto" else precision)
