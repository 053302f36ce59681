"""What an autoencoder is worth, measured on held-out tokens: one definition of every metric, sums in float64.

R² = 1 - SSE/SST over the whole split, with the split's own mean per dimension; on the rows that are not massive again,
with theirs. L0 = non-zero latents a token, of
either sign. What is read off counts of firings is in census.py, off the decoder in directions.py. CE recovered =
(ablated - spliced) / (ablated - clean), with the hookpoint set to zero or to its mean; excluded positions stay clean
and their predictions are not counted.
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
"""Entries of the code, so that a wide dictionary is measured on fewer rows at a time."""
SMALLEST_GAP: Final = 1e-3
"""Nats. Where ablation changes the loss by less, the share recovered means nothing and is not given."""


@dataclass(frozen=True)
class ReconstructionFit:
    """How well activations are reconstructed, and with how many latents."""

    r2: float
    r2_rest: float
    """R² on the rows that are not massive (shared/store/norms.py), about their own mean."""
    r2_all: float
    """R² on all rows, those too that `max_norm` leaves out of every other number."""
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
    """Of the live latents; None for an architecture without signs or with no live latent."""
    bipolar_mass: float | None
    """Of Σ|f|."""
    census: dict[str, Any] | None
    densities: dict[str, Any]
    directions: dict[str, Any] | None
    """None where they were not asked for."""
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
        """None where every reconstruction is the mean."""
        return self.along / self.length if self.length > 1e-9 * self.sst else None

    @property
    def r2_rescaled(self) -> float | None:
        factor = self.rescaling
        return None if factor is None or self.sst <= 0 else factor * self.along / self.sst


@dataclass(frozen=True)
class RowGroups:
    """Which of the held-out rows count, and which are not massive."""

    counted: Bool[Tensor, " rows"]
    rest: Bool[Tensor, " rows"]
    limit: float
    """The norm above which a row is massive."""

    @classmethod
    def of(cls, lengths: NDArray[np.floating[Any]], norm_limit: float | None = None) -> "RowGroups":
        """By the norms of all held-out rows; `norm_limit`: see `max_norm`."""
        limit = MASSIVE * float(np.median(lengths)) if len(lengths) else 0.0
        counted = np.ones(len(lengths), bool) if norm_limit is None else lengths <= norm_limit
        return cls(torch.from_numpy(counted), torch.from_numpy(lengths <= limit), limit)

    def distinct(self) -> dict[str, Bool[Tensor, " rows"]]:
        """The rows that count; and those that are not massive (rest) and all, where these are others."""
        others = {"rest": self.rest, "all": torch.ones_like(self.counted)}
        return {"counted": self.counted, **{name: m for name, m in others.items() if not m.equal(self.counted)}}

    def about(self, rows: Float[Tensor, "rows d_in"]) -> dict[str, Any]:
        """What evaluation.json says of massive rows: how many there are, and which share of E|x - mean|² they hold."""
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
    """Every committed row marked in `keep` [contexts, context], in stored order and data type. Reads only the shards
    that hold such rows."""
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
    """Fit of one autoencoder on raw activations, computed in float32. `silent`: what training logged (census.dead).
    `groups`: by the rows' own norms, if not given. `advance` is told how many rows were taken."""
    groups = groups or RowGroups.of(lengths_of(rows))
    errors, firings = sums(sae, rows, device, groups.distinct(), advance)
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
        census=counted,
        densities=densities(firings),
        directions=directions(sae.weights.W_dec[firings.live], sae.config.seed) if look_at_directions else None,
        tokens=n,
    )


def sums(
    sae: Autoencoder,
    rows: Float[Tensor, "rows d_in"],
    device: str,
    masks: Mapping[str, Bool[Tensor, " rows"]],
    advance: Callable[[int], None],
) -> tuple[dict[str, ErrorSums], Firings]:
    """Errors on the rows of each mask, each about its own mean, and firings on those that count."""
    errors = {name: ErrorSums(mean_row(rows, mask).to(device)) for name, mask in masks.items()}
    firings, start = Firings.none(sae.config.d_sae, device), 0
    for x, f, x_hat in reconstructions(sae, rows, device):
        for name, mask in masks.items():
            here = mask[start : start + len(x)].to(device)
            some = slice(None) if here.all() else here  # a copy of nearly all rows is saved where all are meant
            errors[name].add_(x[some], x_hat[some])
            if name == "counted":
                firings.add_(f[some])
        start += len(x)
        advance(len(x))
    return errors, firings


def lengths_of(rows: Float[Tensor, "rows d_in"]) -> NDArray[np.float64]:
    """Norms, in float64."""
    parts = [part.double().norm(dim=1) for part in torch.split(rows, ROWS_AT_A_TIME)]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float64)


def mean_row(rows: Float[Tensor, "rows d_in"], mask: Bool[Tensor, " rows"] | None = None) -> Float[Tensor, " d_in"]:
    """Of the marked rows, in float64."""
    mask = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask
    parts = zip(torch.split(rows, ROWS_AT_A_TIME), torch.split(mask, ROWS_AT_A_TIME), strict=True)
    sums = [(part if mine.all() else part[mine]).double().sum(0) for part, mine in parts]
    return torch.stack(sums).sum(0) / int(mask.sum())


def reconstructions(
    sae: Autoencoder, rows: Float[Tensor, "rows d_in"], device: str
) -> Iterator[tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_in"]]]:
    """x, f and x̂, some rows at a time, float32."""
    *parts, last = torch.split(rows, max(1, min(ROWS_AT_A_TIME, CODES_AT_A_TIME // sae.config.d_sae)))
    if parts and len(last) == 1:  # a row alone has no variance, by which a peer divides (train/measure/peers.py)
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
    """Losses of the language model on `tokens` [n, context] with the hookpoint left alone, set to zero, set to
    `mean` [d_in], and replaced by each autoencoder's reconstruction, at the positions marked in `counted`. A
    prediction counts where its position is marked and its target is not a special token. Autoencoders are taken one
    after another and let go. Raises UserError when no prediction counts."""
    predicted = counted[:, :-1] & ~np.isin(tokens[:, 1:], list(special_ids))
    if not predicted.any():
        raise UserError(
            "no prediction of the held-out contexts counts: their positions are excluded, or what follows them are "
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
            hook = None if replace is None else (hook_name, only_at(here, replace))
            total += model.losses(ids, hook)[wanted].double().sum().item()
        return total / int(predicted.sum())

    ablated = loss(None), loss(torch.zeros_like)
    middle = loss(lambda x: average.to(x.dtype).view(x.shape[2:]).expand_as(x))  # heads lie side by side
    return ModelLosses(*ablated, middle, [loss(partial(reconstructed, sae)) for sae in saes], int(predicted.sum()))


def reconstructed(sae: Autoencoder, x: Float[Tensor, "contexts context *shape"]) -> Tensor:
    rows = torch.split(x.flatten(0, 1).flatten(1), max(1, CODES_AT_A_TIME // sae.config.d_sae))
    return torch.cat([sae.decode(sae.encode(part)).to(x.dtype) for part in rows]).view_as(x)


def only_at(here: Bool[Tensor, "contexts context"], replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`replace` at the marked positions, the activations as they are elsewhere."""

    def spliced(x: Tensor) -> Tensor:
        mask = here.view(*here.shape, *[1] * (x.ndim - 2))
        return torch.where(mask, replace(x), x)

    return spliced


def recovered(ablated: float, spliced: float, clean: float) -> float | None:
    """Share of the ablation's damage that splicing avoids; None where ablation does next to nothing."""
    return (ablated - spliced) / (ablated - clean) if ablated - clean > SMALLEST_GAP else None


def entry(sae: Autoencoder, fit: ReconstructionFit, losses: ModelLosses | None, index: int) -> dict[str, Any]:
    """One autoencoder's part of evaluation.json; it is number `index` in `losses`. Of `sparsity`, `l0_target` and `k`
    the one that set its number of active latents is given, the others are null."""
    config = sae.config
    knobs = {key: getattr(config, key, None) for key in ("sparsity", "l0_target", "k")}
    if knobs["l0_target"] is not None:
        knobs["sparsity"] = None  # where λ began says nothing of the result
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
