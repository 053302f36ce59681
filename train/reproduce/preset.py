"""The sizes of a reproduction: three presets, and the settings that the command line may change."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from shared.errors import UserError
from shared.model.hooks import SHORT_HOOKS

CELLS: Final = ("resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Preset:
    """All sizes. Thresholds are in units of 1/sqrt(d_in)."""

    name: str
    models: tuple[str, ...]
    width: int
    """H, the width of SA-GSAE; Gated is compared at 2H."""
    sparsities: tuple[float, ...]
    """The λ of the two arms that are compared, for every seed."""
    thin_sparsities: tuple[float, ...]
    """The λ of SA-GSAE at 2H and Gated at H, which have one seed."""
    ablation_sparsity: float
    tokens: int
    """Training tokens per autoencoder."""
    batch: int
    seeds: int
    heldout: int
    ce_tokens: int
    pilot_tokens: int
    pilot_sparsities: tuple[float, ...]
    pilot_lrs: tuple[float, ...]
    pilot_theta0s: tuple[float, ...]
    large_theta0: float
    resets: int
    """The number of resets in the ablation with resets."""
    ks: tuple[int, ...]
    relu_sparsities: tuple[float, ...]
    jumprelu_sparsities: tuple[float, ...]
    dial_latents: int
    """Latents of an autoencoder that are tested as a dial."""
    dial_contexts: int
    """Held-out contexts that they are tested on."""
    corpus: str | None = None
    corpus_config: str | None = None


@dataclass(frozen=True)
class Request:
    """A preset with the models, hookpoints and settings that it is applied to."""

    preset: Preset
    models: tuple[str, ...]
    cells: tuple[str, ...]
    layer: int | str
    seeds: int
    tokens: int
    corpus: str | None
    corpus_config: str | None
    device: str
    out: Path


SMOKE: Final = Preset(
    name="smoke",
    models=("tiny",),
    width=48,
    sparsities=(0.1, 0.2, 0.4),
    thin_sparsities=(0.1, 0.4),
    ablation_sparsity=0.2,
    tokens=24_576,
    batch=256,
    seeds=2,
    heldout=4_000,
    ce_tokens=1_000,
    pilot_tokens=8_192,
    pilot_sparsities=(0.1, 0.4),
    pilot_lrs=(8e-3,),
    pilot_theta0s=(0.4, 1.0),
    large_theta0=3.0,
    resets=4,
    ks=(8,),
    relu_sparsities=(0.2,),
    jumprelu_sparsities=(0.01,),
    dial_latents=3,
    dial_contexts=2,
)
"""Shows in a minute or two that everything runs. Its numbers mean nothing."""

TINY: Final = Preset(
    name="tiny",
    models=("tiny",),
    width=1024,
    sparsities=(0.05, 0.085, 0.14, 0.24, 0.4),
    thin_sparsities=(0.05, 0.14, 0.4),
    ablation_sparsity=0.14,
    tokens=360_000,
    batch=512,
    seeds=3,
    heldout=40_000,
    ce_tokens=4_000,
    pilot_tokens=160_000,
    pilot_sparsities=(0.08, 0.25),
    pilot_lrs=(3e-3, 8e-3),
    pilot_theta0s=(0.4, 1.0, 1.6),
    large_theta0=4.0,
    resets=6,
    ks=(8, 24, 64),
    relu_sparsities=(0.05, 0.15),
    jumprelu_sparsities=(0.001, 0.004),
    dial_latents=20,
    dial_contexts=16,
)
"""The shipped model, in less than an hour on two idle cores."""

PAPER: Final = replace(
    TINY,
    name="paper",
    models=("pythia-1b", "smollm3-3b"),
    width=8192,
    tokens=50_000_000,
    batch=4096,
    heldout=1_000_000,
    ce_tokens=100_000,
    pilot_tokens=5_000_000,
    pilot_lrs=(3e-4, 1e-3, 3e-3),
    resets=20,
    ks=(16, 32, 64),
    corpus="HuggingFaceFW/fineweb",
    corpus_config="sample-10BT",
)
"""The paper's protocol: two models, three hookpoints, three seeds. The abstract does not give width, tokens and corpus;
these are our choice."""

PRESETS: Final = {preset.name: preset for preset in (SMOKE, TINY, PAPER)}


def make_request(
    preset: str,
    models: tuple[str, ...] = (),
    cells: str | None = None,
    layer: int | str = "mid",
    seeds: int | None = None,
    tokens: int | None = None,
    corpus: str | None = None,
    device: str = "auto",
    out: Path | None = None,
) -> Request:
    """Returns a request from the command line's options. Raises UserError for an unknown preset or cell, and for sizes
    that cannot be trained."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: is unknown. Choose from {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    names = tuple(dict.fromkeys(name.strip() for name in (cells or ",".join(CELLS)).split(",")))
    for name in names:
        if name not in SHORT_HOOKS:
            raise UserError(
                f"--cells {name}: is not a hookpoint. Choose from {', '.join(SHORT_HOOKS)}, separated by commas"
            )
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one is needed, two for intervals")
    least = 10 * chosen.batch
    if tokens is not None and tokens < least:
        raise UserError(f"--tokens {tokens}: too few to train on. Give at least {least:,} (ten batches)")
    return Request(
        preset=chosen,
        models=tuple(dict.fromkeys(models)) or chosen.models,
        cells=names,
        layer=layer,
        seeds=seeds or chosen.seeds,
        tokens=tokens or chosen.tokens,
        corpus=corpus or chosen.corpus,
        corpus_config=None if corpus else chosen.corpus_config,
        device=device,
        out=out or Path("reproduction"),
    )
