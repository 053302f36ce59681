"""Measures autoencoders on held-out tokens. Each metric has one definition, here; sums are in float64.

R² = 1 - SSE/SST over the whole split, about the split's mean per dimension. It is measured again on the rows that are
not massive, about their own mean. L0 = non-zero latents per token, of either sign. census.py derives statistics from
counts of firings, directions.py from the decoder. CE recovered = (ablated - spliced) / (ablated - clean), with the
hookpoint ablated to zero or to its mean. Excluded positions keep their clean activations, and their predictions are not
counted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.store.norms import MASSIVE
from train.autoencoder import Autoencoder
from train.data.row_mask import RowMask
from train.data.rows import HookRows, KeptRows, to_tensor
from train.measure.census import Firings, census, dead, densities, share
from train.measure.directions import directions

ROWS_AT_A_TIME: Final = 4096
LOGITS_AT_A_TIME: Final = 1 << 26
CODES_AT_A_TIME: Final = 1 << 28
"""Maximum entries of a code in memory: a wide dictionary is measured on fewer rows at a time."""
SMALLEST_GAP: Final = 1e-3
"""In nats. Where ablation changes the loss by less, CE recovered is meaningless and is None."""


@dataclass(frozen=True)
class ReconstructionFit:
    """The measurements of one autoencoder: how well it reconstructs activations, and with how many latents."""

    r2: float
    r2_rest: float
    """R² on the rows that are not massive (shared/store/norms.py), about their own mean."""
    r2_all: float
    """R² on all rows, including those that `max_norm` leaves out of every other number."""
    rescaling: float | None
    """The factor on x̂ - mean that gives the best R²: above 1, reconstructions are too short (shrinkage)."""
    r2_rescaled: float | None
    """R² with that factor."""
    l0: float
    l0_pos: float
    l0_neg: float
    dead_fraction: float
    dead: dict[str, Any]
    bipolar_fraction: float | None
    """Share of the live latents that are bipolar; None for an architecture without signs or with no live latent."""
    bipolar_mass: float | None
    """Share of the activation mass Σ|f| that bipolar latents carry."""
    bipolar_energy: float | None
    """Share of the live latents with more than a tenth of their energy Σf² on the weaker side."""
    census: dict[str, Any] | None
    densities: dict[str, Any]
    directions: dict[str, Any] | None
    """See `train.measure.directions`; None when it was not asked for."""
    tokens: int


@dataclass
class ErrorSums:
    """Sums over rows, float64: SSE, SST about `mean`, and the products that the best rescaling needs."""

    mean: Float[Tensor, " d_in"]
    sse: float = 0.0
    sst: float = 0.0
    along: float = 0.0
    """⟨x - mean, x̂ - mean⟩"""
    length: float = 0.0
    """|x̂ - mean|²"""

    def add_(self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> None:
        target, found = x.double() - self.mean, x_hat.double() - self.mean
        self.sse += (target - found).square().sum().item()
        self.sst += target.square().sum().item()
        self.along += (target * found).sum().item()
        self.length += found.square().sum().item()

    @property
    def r2(self) -> float:
        return 1 - self.sse / self.sst if self.sst > 0 else float("nan")

    @property
    def rescaling(self) -> float | None:
        """The factor on x̂ - mean that gives the best R²; None when every reconstruction is the mean."""
        return self.along / self.length if self.length > 1e-9 * self.sst else None

    @property
    def r2_rescaled(self) -> float | None:
        factor = self.rescaling
        return None if factor is None or self.sst <= 0 else factor * self.along / self.sst


@dataclass(frozen=True)
class RowGroups:
    """Masks over the held-out rows: those that count, and those that are not massive."""

    counted: Bool[Tensor, " rows"]
    rest: Bool[Tensor, " rows"]
    limit: float
    """The norm above which a row is massive."""

    @classmethod
    def of(cls, lengths: NDArray[np.floating[Any]], norm_limit: float | None = None) -> "RowGroups":
        """Groups rows by their norms. `norm_limit` (setting `max_norm`): rows above it do not count."""
        limit = MASSIVE * float(np.median(lengths)) if len(lengths) else 0.0
        counted = np.ones(len(lengths), bool) if norm_limit is None else lengths <= norm_limit
        return cls(torch.from_numpy(counted), torch.from_numpy(lengths <= limit), limit)

    def distinct(self) -> dict[str, Bool[Tensor, " rows"]]:
        """Returns the masks that differ: the rows that count, those that are not massive ("rest"), and all rows."""
        others = {"rest": self.rest, "all": torch.ones_like(self.counted)}
        return {"counted": self.counted, **{name: m for name, m in others.items() if not m.equal(self.counted)}}

    def about(self, rows: Float[Tensor, "rows d_in"]) -> dict[str, Any]:
        """Returns the entry on massive rows for evaluation.json: their number, and their share of E|x - mean|²."""
        mean, massive = mean_row(rows), rows[~self.rest]
        parts = torch.split(rows, ROWS_AT_A_TIME) if len(massive) else ()
        whole = sum((part.double() - mean).square().sum().item() for part in parts)
        held = (massive.double() - mean).square().sum().item() / whole if whole else 0.0
        return {"times_median": MASSIVE, "norm": self.limit, "tokens": len(massive), "variance": held}


@dataclass(frozen=True)
class ModelLosses:
    """Next-token losses in nats, averaged over the same predictions."""

    clean: float
    zero: float
    mean: float
    spliced: list[float]
    tokens: int


def read_heldout(rows: HookRows, keep: NDArray[np.bool_] | RowMask) -> Float[Tensor, "rows d_in"]:
    """Returns the committed rows marked in `keep` [contexts, context], in stored order and data type. Reads only the
    shards that hold such rows."""
    spec, marked = rows.store.spec, KeptRows(rows, keep)
    shards = [k for k in RowMask.of(keep).shards(spec.shard_rows, spec.n_tokens) if k in rows.store.commits]
    part = replace(rows, store=rows.store.only(shards))
    found = [marked.values(unit.shard, unit.first) for unit in part.units(1)]
    dtype = np.dtype("<f4") if spec.quantised else rows.activations.layout.dtype
    d_in = rows.activations.layout.row_shape[0]
    return to_tensor(np.concatenate([np.empty((0, d_in), dtype), *found]), spec.dtype)


def measure(
    sae: Autoencoder,
    rows: Float[Tensor, "rows d_in"],
    device: str,
    silent: dict[str, Any] | None = None,
    groups: RowGroups | None = None,
    look_at_directions: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> ReconstructionFit:
    """Measures one autoencoder on raw activations, in float32. `silent`: the inactive latents that training logged
    (census.dead). `groups`: by default worked out from the rows' norms. `advance` is called with the number of rows
    done."""
    groups = groups or RowGroups.of(lengths_of(rows))
    errors, firings = sum_errors(sae, rows, device, groups.distinct(), advance)
    mine, n = errors["counted"], int(groups.counted.sum())
    counted = census(firings) if sae.signed else None
    return ReconstructionFit(
        r2=mine.r2,
        r2_rest=errors.get("rest", mine).r2,
        r2_all=errors.get("all", mine).r2,
        rescaling=mine.rescaling,
        r2_rescaled=mine.r2_rescaled,
        l0=firings.total.sum().item() / n,
        l0_pos=firings.positive.sum().item() / n,
        l0_neg=firings.negative.sum().item() / n,
        dead_fraction=share(~firings.live),
        dead=dead(firings, silent),
        bipolar_fraction=counted["bipolar"] if counted else None,
        bipolar_mass=counted["bipolar_mass"] if counted else None,
        bipolar_energy=counted["bipolar_energy"] if counted else None,
        census=counted,
        densities=densities(firings),
        directions=directions(sae.weights.W_dec[firings.live], sae.config.seed) if look_at_directions else None,
        tokens=n,
    )


def sum_errors(
    sae: Autoencoder,
    rows: Float[Tensor, "rows d_in"],
    device: str,
    masks: Mapping[str, Bool[Tensor, " rows"]],
    advance: Callable[[int], None],
) -> tuple[dict[str, ErrorSums], Firings]:
    """Returns the error sums of each mask's rows, about those rows' own mean, and the firings on the rows that
    count."""
    errors = {name: ErrorSums(mean_row(rows, mask).to(device)) for name, mask in masks.items()}
    firings, start = Firings.none(sae.config.d_sae, device), 0
    for x, f, x_hat in reconstructions(sae, rows, device):
        for name, mask in masks.items():
            marked = mask[start : start + len(x)].to(device)
            some = slice(None) if marked.all() else marked  # indexing by a mask would copy the rows
            errors[name].add_(x[some], x_hat[some])
            if name == "counted":
                firings.add_(f[some])
        start += len(x)
        advance(len(x))
    return errors, firings


def lengths_of(rows: Float[Tensor, "rows d_in"]) -> NDArray[np.float64]:
    """Returns the rows' norms, in float64."""
    parts = [part.double().norm(dim=1) for part in torch.split(rows, ROWS_AT_A_TIME)]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float64)


def mean_row(rows: Float[Tensor, "rows d_in"], mask: Bool[Tensor, " rows"] | None = None) -> Float[Tensor, " d_in"]:
    """Returns the mean of the marked rows (default: all), in float64."""
    mask = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask
    parts = zip(torch.split(rows, ROWS_AT_A_TIME), torch.split(mask, ROWS_AT_A_TIME), strict=True)
    sums = [(part if mine.all() else part[mine]).double().sum(0) for part, mine in parts]
    return torch.stack(sums).sum(0) / int(mask.sum())


def reconstructions(
    sae: Autoencoder, rows: Float[Tensor, "rows d_in"], device: str
) -> Iterator[tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_in"]]]:
    """Yields x, f and x̂ in float32, some rows at a time."""
    *parts, last = torch.split(rows, max(1, min(ROWS_AT_A_TIME, CODES_AT_A_TIME // sae.config.d_sae)))
    if parts and len(last) == 1:  # other tools divide by a batch's variance, and one row has none (peers.py)
        last = torch.cat([parts.pop(), last])
    for part in (*parts, last):
        x = part.to(device).float()
        f = sae.encode(x)
        yield x, f, sae.decode(f)


def language_losses(
    model: LanguageModel,
    hook_name: str,
    tokens: NDArray[Any],
    counted: NDArray[np.bool_],
    special_ids: Sequence[int],
    mean: NDArray[np.float64],
    saes: Iterable[Autoencoder],
) -> ModelLosses:
    """Returns the language model's losses on `tokens` [n, context] with the hookpoint unchanged, set to zero, set to
    `mean` [d_in], and replaced by each autoencoder's reconstruction, at the positions marked in `counted`. A
    prediction counts when its position is marked and its target is not a special token. Only one autoencoder is in
    memory at a time. Raises UserError when no prediction counts."""
    predicted = counted[:, :-1] & ~np.isin(tokens[:, 1:], list(special_ids))
    if not predicted.any():
        raise UserError(
            "no prediction of the held-out contexts counts: their positions are excluded, or the next tokens are "
            "special tokens. Harvest more tokens, exclude fewer positions, or measure without the loss: --no-ce"
        )
    average = torch.from_numpy(mean).float().to(model.device)
    batch = max(1, LOGITS_AT_A_TIME // (tokens.shape[1] * model.vocab_size))

    def loss(replace: Callable[[Tensor], Tensor] | None) -> float:
        total = 0.0
        for start in range(0, len(tokens), batch):
            some = slice(start, start + batch)
            ids = torch.from_numpy(tokens[some].astype("int64")).to(model.device)
            here, wanted = (torch.from_numpy(mask[some]).to(model.device) for mask in (counted, predicted))
            hook = None if replace is None else (hook_name, replaced_at(here, replace))
            total += model.losses(ids, hook)[wanted].double().sum().item()
        return total / int(predicted.sum())

    ablated = loss(None), loss(torch.zeros_like)
    at_mean = loss(lambda x: average.to(x.dtype).view(x.shape[2:]).expand_as(x))  # attention has a dimension of heads
    return ModelLosses(*ablated, at_mean, [loss(partial(reconstructed, sae)) for sae in saes], int(predicted.sum()))


def reconstructed(sae: Autoencoder, x: Float[Tensor, "contexts context *shape"]) -> Tensor:
    rows = torch.split(x.flatten(0, 1).flatten(1), max(1, CODES_AT_A_TIME // sae.config.d_sae))
    return torch.cat([sae.decode(sae.encode(part)).to(x.dtype) for part in rows]).view_as(x)


def replaced_at(
    here: Bool[Tensor, "contexts context"], replace: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Returns a function that applies `replace` at the marked positions and keeps the other activations."""

    def spliced(x: Tensor) -> Tensor:
        mask = here.view(*here.shape, *[1] * (x.ndim - 2))
        return torch.where(mask, replace(x), x)

    return spliced


def recovered(ablated: float, spliced: float, clean: float) -> float | None:
    """Returns CE recovered, the share of the ablation's damage that splicing avoids; None when ablation changes the
    loss by at most 0.001 nats."""
    return (ablated - spliced) / (ablated - clean) if ablated - clean > SMALLEST_GAP else None


def entry(sae: Autoencoder, fit: ReconstructionFit, losses: ModelLosses | None, index: int) -> dict[str, Any]:
    """Returns one autoencoder's entry of evaluation.json; `index` is its place in `losses`. Only the setting among
    `sparsity`, `l0_target` and `k` that fixed the number of active latents is given; the others are null."""
    config = sae.config
    knobs = {key: getattr(config, key, None) for key in ("sparsity", "l0_target", "k")}
    if knobs["l0_target"] is not None:
        knobs["sparsity"] = None  # the initial λ does not decide the result
    spliced = losses.spliced[index] if losses else None
    return {
        "name": config.name,
        "arch": config.arch,
        "d_sae": config.d_sae,
        **knobs,
        "seed": config.seed,
        **asdict(fit),
        "ce_spliced": spliced,
        "ce_recovered": recovered(losses.zero, losses.spliced[index], losses.clean) if losses else None,
        "ce_recovered_mean": recovered(losses.mean, losses.spliced[index], losses.clean) if losses else None,
        "ce_tokens": losses.tokens if losses else None,
    }
