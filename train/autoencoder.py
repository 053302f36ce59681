"""Loads and saves trained autoencoders (a folder of `sae_weights.safetensors` and `cfg.json`), encodes and decodes."""

import hashlib
import math
import stat
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

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
from train.sae.gated import GatedWeights, join, split, tie_of

WEIGHTS: Final = "sae_weights.safetensors"
SETTINGS: Final = "cfg.json"
FOR_SAELENS: Final = "sagsae's own format. For SAELens: sagsae export RUN/NAME --to saelens --out DIR"
"""SAELens' files have the same names. It looks this up as an architecture, and its KeyError then says what to do."""
MOST_WIDE: Final = 1 << 24
"""Maximum d_in that cfg.json may claim."""


class Autoencoder(nn.Module):
    """Encodes and decodes raw activations of the language model; latents are in the same units as the activations.

    Its parameters have their names in the file, such as `W_enc` [d_sae, d_in]. They do not ask for gradients:
    `requires_grad_()` makes them trainable. A threshold that is measured, not trained, is a buffer.
    """

    def __init__(self, config: SAEConfig, weights: Weights, scale: float) -> None:
        """Takes the tensors of `weights`, with the normalisation folded in, without a copy. Decoder rows have norm one,
        unless the decoder norm is free. `scale` is sqrt(E|x - mean|²) of the training activations, which are divided by
        it in training. λ, θ0 and the loss in a run's metrics are in those units."""
        super().__init__()
        self.config, self.scale = config, scale
        for name, tensor in weights.named().items():
            if name in weights.KEPT:
                self.register_buffer(name, tensor.detach())
            else:
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))

    @classmethod
    def of(cls, config: SAEConfig, weights: Weights, scale: float) -> "Autoencoder":
        """Makes an autoencoder for raw activations from weights that were trained at unit variance."""
        return cls(config, weights.times(scale), scale)

    @property
    def weights(self) -> Weights:
        """The parameters and buffers in the form in which `train.sae` computes with them."""
        form = family(self.config).weights
        found: Weights = form(**{each.name: getattr(self, each.name) for each in fields(form)})
        return found

    @property
    def signed(self) -> bool:
        """Whether latents carry a sign."""
        return family(self.config).signed

    @property
    def d_in(self) -> int:
        """The width of an activation."""
        return self.weights.W_dec.shape[1]

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Returns the latents of raw activations, in the type of the weights: float32, unless you changed it. Signed
        architectures have latents of either sign."""
        weights = self.weights
        return family(self.config).encode(weights, x.to(weights.W_enc.dtype))

    def decode(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        """Returns the raw activations that latents stand for, in the type of the weights."""
        weights = self.weights
        return decode(weights, f.to(weights.W_dec.dtype))

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Returns the reconstruction of raw activations: what calling the autoencoder does."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{self.config.name}, d_in={self.d_in}, d_sae={self.config.d_sae}"

    def fold(self) -> Folded:
        """Returns the inference form of the same function: two matrix products with one activation, Bi-JumpReLU,
        between them. Raises UserError for an architecture that has no such form."""
        mathematics = family(self.config)
        if not mathematics.folds:
            raise UserError(
                f"{self.config.name}: does not fold, since no threshold of a latent alone decides whether it is "
                "active. Use encode and decode"
            )
        return mathematics.fold(self.weights)

    def split(self) -> "Autoencoder":
        """Returns the Gated SAE of twice the width that computes the same function as this SA-GSAE: latent i becomes
        latents i and i + d_sae, the second for its negative pole. Raises UserError for other architectures."""
        weights = self.weights
        if not isinstance(self.config, SaGsae) or self.config.one_sided or not isinstance(weights, GatedWeights):
            raise UserError(f"{self.config.name}: cannot be split; only a two-sided sa-gsae has two poles with gates")
        kept = {key: value for key, value in self.config if key in Gated.model_fields and key != "arch"}
        config = sae_config(**{**kept, "arch": "gated", "d_sae": 2 * self.config.d_sae})
        return Autoencoder(config, split(weights), self.scale)

    def join(self) -> "Autoencoder":
        """Reverses `split`: returns the SA-GSAE of half the width. Raises UserError unless this is a Gated SAE whose
        second half of latents mirrors the first."""
        weights = self.weights
        if not isinstance(self.config, Gated) or not isinstance(weights, GatedWeights):
            raise UserError(f"{self.config.name}: cannot be joined; it is not a gated autoencoder")
        try:
            joined = join(weights)
        except ValueError as error:
            raise UserError(f"{self.config.name}: cannot be joined to an sa-gsae: {error}") from error
        kept = {key: value for key, value in self.config if key in SaGsae.model_fields and key != "arch"}
        config = sae_config(**{**kept, "arch": "sa-gsae", "d_sae": self.config.d_sae // 2, "tie": tie_of(joined)})
        return Autoencoder(config, joined, self.scale)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Writes the folder. `about` is added to cfg.json: where the activations came from."""
        digest = hashlib.sha256()

        def counted() -> Iterator[Buffer]:
            for piece in pieces(self.weights.named()):
                digest.update(piece)
                yield piece

        write_file(folder / WEIGHTS, counted())
        described = {"d_in": self.d_in, "scale": self.scale, "sha256": digest.hexdigest()}
        described |= {"dtype": "float32", "architecture": FOR_SAELENS}
        write_sealed(folder / SETTINGS, {**self.config.model_dump(), **described, **about})

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> "Autoencoder":
        """Loads an autoencoder from its folder. Raises UserError when the folder does not hold one, DamagedError when
        it was altered: a wrong checksum, tensors of another architecture, NaN or infinities."""
        folder = Path(folder)
        config, d_in, scale, digest = settings_of(folder)
        data = weights_of(folder / WEIGHTS, config, d_in)
        if hashlib.sha256(data.data).hexdigest() != digest:
            raise DamagedError(f"{folder / WEIGHTS}: is not the file that {SETTINGS} describes (its SHA-256 differs)")
        try:
            tensors = read_tensors(data)
        except BadData as error:
            raise DamagedError(f"{folder / WEIGHTS}: {error}") from error
        check_tensors(tensors, config, d_in, folder / WEIGHTS)
        placed = {name: tensor.to(device) for name, tensor in tensors.items()}
        return cls(config, family(config).weights(**placed), scale)


def settings_of(folder: Path) -> tuple[SAEConfig, int, float, str]:
    """Returns the configuration, d_in, the scale and the SHA-256 of the weights from cfg.json. Raises UserError when it
    is missing or not valid."""
    try:
        about = read_sealed(folder / SETTINGS)
        members(about, ("arch", "d_in", "scale", "sha256"), None)
        arch = choice(about["arch"], "arch", tuple(ARCHITECTURES))
        kind = ARCHITECTURES[arch].config
        names = kind.model_fields
        found = members(about, names.keys() - kind.LATER, None)
        config = sae_config(**{key: found[key] for key in names if key in found})
        d_in = integer(about["d_in"], "d_in", 1, MOST_WIDE)
        scale = number(about["scale"], "scale", sys.float_info.min)
        return config, d_in, scale, text(about["sha256"], "sha256", 64)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: does not hold a trained autoencoder (there is no {SETTINGS})") from error
    except (BadData, UserError) as error:
        raise UserError(f"{folder}: does not hold a trained autoencoder ({SETTINGS}: {str(error)[:500]})") from error


def expected_size(config: SAEConfig, d_in: int) -> tuple[int, int]:
    """Returns the bytes of an autoencoder's tensors, and the largest size of the file that holds them."""
    tensors = 4 * sum(math.prod(shape) for shape in family(config).shapes(d_in).values())
    return tensors, tensors + MOST_HEADER + 8


def weights_of(path: Path, config: SAEConfig, d_in: int) -> NDArray[np.uint8]:
    """Returns the bytes of the weights' file. Raises DamagedError when its size does not fit the configuration,
    UserError when it cannot be read."""
    expected, most = expected_size(config, d_in)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is not an ordinary file")
        if not expected < found.st_size <= most:
            raise DamagedError(
                f"{path}: has {found.st_size:,} bytes; the weights of {config.name} of d_in {d_in} are {expected:,}"
            )
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path.parent}: holds no trained autoencoder ({path.name}: {error.strerror})") from error


def check_tensors(tensors: dict[str, Tensor], config: SAEConfig, d_in: int, what: Path) -> None:
    """Raises UserError for wrong names or shapes, DamagedError for a wrong data type, NaN or infinities."""
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
    """Returns the input type of matrix products. `auto` is bfloat16 where the hardware multiplies it natively, else
    float32. Raises UserError for tf32 on another device than CUDA."""
    if precision == "tf32":
        if device.type != "cuda":
            raise UserError(f"precision = tf32: works on CUDA devices only, and this is {device}. Use float32")
        return torch.float32
    return torch_dtype(native_dtype(device) if precision == "auto" else precision)
