"""Turns a reproduction into configurations of harvests and training runs. Writes nothing.

An *arm* is a set of autoencoders that differ only in λ (or k) and seed; the analysis refers to arms by name.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.config import HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.model.hooks import hook_table
from shared.model.source import local_place
from shared.saes import SAEConfig, sae_config
from train.reproduce.pilot import PilotChoice
from train.reproduce.preset import Request

SA_HALF: Final = "SA-GSAE, H"
SA_FULL: Final = "SA-GSAE, 2H"
GATED_HALF: Final = "Gated, H"
GATED_FULL: Final = "Gated, 2H"
NO_AUX: Final = "no auxiliary loss"
ONE_SIDED: Final = "one-sided gate"
TIE_R: Final = "tied r only"
UNTIED: Final = "untied"
LARGE: Final = "large initial threshold"
LARGE_RESET: Final = "large initial threshold, resets"

BASELINES: Final = ("AbsTopK, H", "BatchTopK, 2H", "JumpReLU, 2H", "ReLU, 2H")
FRONTIERS: Final = (SA_HALF, GATED_FULL, SA_FULL, GATED_HALF, *BASELINES)
"""The arms with more than one λ or k."""

METHODS: Final = {SA_HALF: "sa-gsae", GATED_FULL: "gated"}
"""The arms that are compared, each tuned by the pilot."""

Arms = dict[str, tuple[SAEConfig, ...]]


@dataclass(frozen=True)
class ReproductionCell:
    """One hookpoint of one model."""

    model: str
    hook: str
    """The hookpoint's short name."""
    path: str
    """The hookpoint's name in the store, such as layer_02/mlp_out."""
    d_in: int

    @property
    def name(self) -> str:
        return f"{store_name(self.model)} {self.path}"

    @property
    def folder(self) -> str:
        return slug(self.name)


def slug(name: str) -> str:
    """Returns a name that can be part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def store_name(model: str) -> str:
    return slug(model if local_place(model) is None else Path(model).name)


def make_cells(request: Request) -> list[ReproductionCell]:
    """Returns all cells of a reproduction. Raises UserError when a model lacks the layer or one of the hookpoints."""
    cells: list[ReproductionCell] = []
    if len({store_name(model) for model in request.models}) < len(request.models):
        raise UserError(f"--model {' --model '.join(request.models)}: two of them have the same name")
    for model in request.models:
        table = hook_table(model, None, (request.layer,), "sdpa")
        by_name = {hook.short: hook for hook in table if hook.short}
        for name in request.cells:
            if name not in by_name:
                layer = table[0].layer if table else request.layer
                raise UserError(
                    f"--cells {name}: {model} has no such hookpoint in layer {layer}. It has {', '.join(by_name)}"
                )
            hook = by_name[name]
            cells.append(ReproductionCell(model, name, f"layer_{hook.layer:02d}/{name}", hook.width))
    return cells


def harvest_config(request: Request, model: str) -> HarvestConfig:
    """Returns the harvest of all hookpoints of a model in one forward pass. It has a fifth more tokens than are trained
    on, because a tenth is held out and some rows never count (the first position, special tokens)."""
    own_text = local_place(model) is not None and request.corpus == request.preset.corpus
    return HarvestConfig(
        model=model,
        layers=(request.layer,),
        hooks=request.cells,
        corpus=None if own_text else request.corpus,
        corpus_config=None if own_text else request.corpus_config,
        tokens=request.tokens * 6 // 5,
        device=request.device,
        out=str(request.out / "stores"),
        name=store_name(model),
    )


def train_config(
    request: Request, cell: ReproductionCell, store: str, stage: str, saes: Iterable[SAEConfig]
) -> TrainConfig:
    """Returns the configuration that trains all of these autoencoders in one pass over a cell's activations."""
    preset = request.preset
    tokens = min(request.tokens, preset.pilot_tokens) if stage == "pilot" else request.tokens
    return TrainConfig(
        store=store,
        hook=cell.path,
        saes=tuple(saes),
        tokens=tokens,
        batch=preset.batch,
        device=request.device,
        heldout_tokens=min(preset.heldout, request.tokens // 10),
        dead_after_tokens=max(preset.batch, tokens // 4),
        checkpoint_every=max(1, tokens // preset.batch // 3),
        out=run_folder(request, cell, stage),
    )


def run_folder(request: Request, cell: ReproductionCell, stage: str) -> Path:
    """The folder of one pass over a cell's activations."""
    return request.out / "runs" / cell.folder / stage


def method(arm: str, request: Request) -> dict[str, Any]:
    """Returns architecture and width of one of the two compared arms."""
    return {"arch": METHODS[arm], "d_sae": request.preset.width * (2 if arm == GATED_FULL else 1)}


def pilot_arms(request: Request) -> dict[str, dict[PilotChoice, tuple[SAEConfig, ...]]]:
    """Returns the pilot's autoencoders: for both methods the same candidates and λ, with one seed."""
    preset = request.preset
    choices = [PilotChoice(lr, theta0) for lr in preset.pilot_lrs for theta0 in preset.pilot_theta0s]
    return {
        arm: {
            choice: tuple(
                sae_config(**method(arm, request), sparsity=sparsity, lr=choice.lr, theta0=choice.theta0)
                for sparsity in preset.pilot_sparsities
            )
            for choice in choices
        }
        for arm in METHODS
    }


def main_arms(request: Request, sa: PilotChoice, gated: PilotChoice) -> Arms:
    """Returns SA-GSAE and Gated at H and at 2H. The two arms that are compared have every λ and seed. The others show
    the effect of width alone and have fewer λ and one seed."""
    preset, every_seed = request.preset, range(request.seeds)

    def arm(arch: str, width: int, choice: PilotChoice, sparsities: Iterable[float], seeds: Iterable[int]) -> Any:
        fixed = {"arch": arch, "d_sae": width, "lr": choice.lr, "theta0": choice.theta0}
        return tuple(sae_config(**fixed, sparsity=sparsity, seed=seed) for seed in seeds for sparsity in sparsities)

    return {
        SA_HALF: arm("sa-gsae", preset.width, sa, preset.sparsities, every_seed),
        GATED_FULL: arm("gated", 2 * preset.width, gated, preset.sparsities, every_seed),
        SA_FULL: arm("sa-gsae", 2 * preset.width, sa, preset.thin_sparsities, [0]),
        GATED_HALF: arm("gated", preset.width, gated, preset.thin_sparsities, [0]),
    }


def ablation_arms(request: Request, sa: PilotChoice, gated: PilotChoice) -> Arms:
    """Returns SA-GSAE at H with one setting changed, at one λ and every seed; and the baselines, with one seed. Signed
    baselines have width H and SA-GSAE's learning rate, the others 2H and Gated's."""
    preset, width = request.preset, request.preset.width
    steps = request.tokens // preset.batch

    def changed(**options: Any) -> tuple[SAEConfig, ...]:
        values = {"theta0": sa.theta0, "lr": sa.lr, "sparsity": preset.ablation_sparsity, **options}
        return tuple(sae_config(arch="sa-gsae", d_sae=width, seed=seed, **values) for seed in range(request.seeds))

    def baseline(arch: str, d_sae: int, lr: float, knob: str, values: Iterable[Any]) -> tuple[SAEConfig, ...]:
        return tuple(sae_config(arch=arch, d_sae=d_sae, lr=lr, **{knob: value}) for value in values)

    ks = sorted({min(k, width) for k in preset.ks})
    reset = max(1, steps // preset.resets)
    baselines = (
        baseline("abs-topk", width, sa.lr, "k", ks),
        baseline("batch-topk", 2 * width, gated.lr, "k", ks),
        baseline("jumprelu", 2 * width, gated.lr, "sparsity", preset.jumprelu_sparsities),
        baseline("relu", 2 * width, gated.lr, "sparsity", preset.relu_sparsities),
    )
    return {
        NO_AUX: changed(aux=False),
        ONE_SIDED: changed(one_sided=True),
        TIE_R: changed(tie="magnitude"),
        UNTIED: changed(tie="none"),
        LARGE: changed(theta0=preset.large_theta0),
        LARGE_RESET: changed(theta0=preset.large_theta0, reset_every=reset),
        **dict(zip(BASELINES, baselines, strict=True)),
    }


def every_sae(arms: Arms) -> list[SAEConfig]:
    return [sae for arm in arms.values() for sae in arm]
