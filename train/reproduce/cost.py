"""Estimates time, disk and memory of a reproduction before it starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from shared.device import pick_device, usable_cores
from shared.errors import UserError
from shared.saes import SAEConfig
from train.reproduce.pilot import PilotChoice
from train.reproduce.plan import ReproductionCell, ablation_arms, every_sae, harvest_config, main_arms, pilot_arms
from train.reproduce.preset import Request

GPU_RATE: Final = 1.5e14
"""Assumed speed of training on one data-centre GPU in bfloat16, in FLOP per second."""
CORE_RATE: Final = 1.25e11
"""Assumed speed of one CPU core that multiplies bfloat16 natively, in FLOP per second."""
OVERHEAD: Final = 1.4
"""Factor for harvest, evaluation, reading and a look at latents."""
FLOPS: Final = 14
"""FLOP per weight of the encoder and token: seven matrix products (docs/explanation/method.md)."""
WEIGHT_BYTES: Final = 32
"""Bytes per weight of the encoder: encoder and decoder, their gradients and Adam's two moments, in float32."""
STORE_RATIO: Final = 1.4
"""Compression ratio of bfloat16 activations."""
ASK_HOURS: Final = 2.0
ASK_BYTES: Final = 50e9


@dataclass(frozen=True)
class ReproductionCost:
    """The size and estimated cost of a reproduction."""

    cells: int
    autoencoders: int
    harvested_tokens: int
    """Tokens harvested per model."""
    trained_tokens: int
    """Training tokens per autoencoder, outside the pilot."""
    flops: float
    hours: float
    """Hours on this device."""
    gpu_hours: float
    """Hours on one data-centre GPU."""
    store_bytes: int
    memory_bytes: int
    """Bytes of weights, gradients and moments in the largest pass."""

    @property
    def text(self) -> str:
        return (
            f"{self.autoencoders} autoencoders in {many(self.cells, 'cell')}, {self.trained_tokens:,} training tokens "
            f"each; {self.harvested_tokens:,} tokens harvested from each model; {self.flops:.2g} FLOP: about "
            f"{spell(self.hours)} on this device ({self.gpu_hours:.2g} GPU-hours on a data-centre GPU), "
            f"{self.store_bytes / 1e9:.2g} GB of disk, {self.memory_bytes / 1e9:.2g} GB of memory for weights"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def spell(hours: float) -> str:
    return many(max(1, round(60 * hours)), "minute") if hours < 1.5 else f"{hours:,.3g} hours"


def many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def estimate(request: Request, cells: Sequence[ReproductionCell]) -> ReproductionCost:
    """Estimates the cost from the plan's configurations. It does not depend on which candidates the pilot chooses."""
    any_choice = PilotChoice(1e-3, 1.0)
    pilot = [sae for arm in pilot_arms(request).values() for saes in arm.values() for sae in saes]
    main = every_sae(main_arms(request, any_choice, any_choice))
    ablations = every_sae(ablation_arms(request, any_choice, any_choice))
    pilot_tokens = min(request.tokens, request.preset.pilot_tokens)
    latent_tokens = latents(pilot) * pilot_tokens + (latents(main) + latents(ablations)) * request.tokens
    flops = float(sum(FLOPS * cell.d_in * latent_tokens for cell in cells))
    cpu = pick_device(request.device).startswith("cpu")
    rate = CORE_RATE * usable_cores() if cpu else GPU_RATE
    harvested = harvest_config(request, request.models[0]).tokens or 0
    width = max(cell.d_in for cell in cells)
    return ReproductionCost(
        cells=len(cells),
        autoencoders=len(cells) * (len(pilot) + len(main) + len(ablations)),
        harvested_tokens=harvested,
        trained_tokens=request.tokens,
        flops=flops,
        hours=OVERHEAD * flops / rate / 3600,
        gpu_hours=OVERHEAD * flops / GPU_RATE / 3600,
        store_bytes=int(sum(2 * cell.d_in * harvested / STORE_RATIO for cell in cells)),
        memory_bytes=WEIGHT_BYTES * width * max(latents(pilot), latents(main), latents(ablations)),
    )


def latents(saes: Sequence[SAEConfig]) -> int:
    return sum(sae.d_sae for sae in saes)


def check_consent(cost: ReproductionCost, yes: bool) -> None:
    """Raises UserError for a long or large job without `--yes`."""
    if not yes and (cost.hours > ASK_HOURS or cost.store_bytes > ASK_BYTES):
        raise UserError(f"this is a large job: {cost.text}. To start it, run the same command again with --yes")
