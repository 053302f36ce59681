"""What an autoencoder is worth, on held-out tokens: one definition of every metric, sums in float64.

R² = 1 - SSE/SST over the whole split, with the split's own mean per dimension. L0 = non-zero latents a token, of
either sign. Dead = fired on none of the held-out tokens. CE recovered = (ablated - spliced) / (ablated - clean), with
the hookpoint set to zero or to its mean; excluded positions stay clean and their predictions are not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from shared.model import LanguageModel
from train.autoencoder import Autoencoder
from train.rows import Kept, Rows, to_tensor

ROWS_AT_A_TIME: Final = 4096
LOGITS_AT_A_TIME: Final = 1 << 26
BIPOLAR_MINORITY: Final = 0.1
"""A live latent is bipolar when its rarer sign makes up more than this share of its firings."""
SMALLEST_GAP: Final = 1e-3
"""Nats. Where ablation changes the loss by less, the share recovered means nothing and is not given."""


@dataclass(frozen=True)
class Fit:
    """How well activations are reconstructed, and with how many latents."""

    r2: float
    l0: float
    l0_pos: float
    l0_neg: float
    dead_fraction: float
    bipolar_fraction: float | None
    """Of the live latents; None for an architecture without signs or with no live latent."""
    tokens: int


@dataclass(frozen=True)
class Losses:
    """Next-token losses in nats, averaged over the same predictions."""

    clean: float
    zero: float
    mean: float
    spliced: list[float]
    tokens: int


def read_heldout(rows: Rows, keep: NDArray[np.bool_]) -> Float[Tensor, "rows d_in"]:
    """Every committed row marked in `keep` [contexts, context], in stored order and data type. Reads only the shards
    that hold such rows."""
    spec, marked = rows.store.spec, Kept(rows, keep)
    starts = (np.flatnonzero(keep.any(axis=1)) * spec.context).tolist()
    last = spec.context - 1
    wanted = {k for at in starts for k in range(at // spec.shard_rows, (at + last) // spec.shard_rows + 1)}
    found = [marked.values(unit.shard, unit.first) for unit in rows.units(1) if unit.shard in wanted]
    dtype = np.dtype("<f4") if spec.quantised else rows.activations.layout.dtype
    d_in = rows.activations.layout.row_shape[0]
    return to_tensor(np.concatenate([np.empty((0, d_in), dtype), *found]), spec.dtype)


def measure(sae: Autoencoder, rows: Float[Tensor, "rows d_in"], device: str) -> Fit:
    """Fit of one autoencoder on raw activations, computed in float32."""
    n = len(rows)
    mean = torch.stack([part.double().sum(0) for part in torch.split(rows, ROWS_AT_A_TIME)]).sum(0) / n
    sse = sst = 0.0
    d_sae = sae.config.d_sae
    fired = {sign: torch.zeros(d_sae, dtype=torch.float64, device=device) for sign in (1, -1)}
    for part in torch.split(rows, ROWS_AT_A_TIME):
        x = part.to(device).float()
        f = sae.encode(x)
        sse += (x - sae.decode(f)).double().square().sum().item()
        sst += (x.double() - mean.to(device)).square().sum().item()
        fired[1] += (f > 0).sum(0)
        fired[-1] += (f < 0).sum(0)
    total = fired[1] + fired[-1]
    live = total > 0
    minority = torch.minimum(fired[1], fired[-1])[live] / total[live]
    bipolar = (minority > BIPOLAR_MINORITY).double().mean().item() if sae.signed and live.any() else None
    return Fit(
        r2=1 - sse / sst if sst > 0 else float("nan"),
        l0=total.sum().item() / n,
        l0_pos=fired[1].sum().item() / n,
        l0_neg=fired[-1].sum().item() / n,
        dead_fraction=1 - live.double().mean().item(),
        bipolar_fraction=bipolar,
        tokens=n,
    )


def language_losses(
    model: LanguageModel,
    hook_name: str,
    tokens: NDArray[Any],
    counted: NDArray[np.bool_],
    special_ids: Sequence[int],
    mean: NDArray[np.float64],
    saes: Sequence[Autoencoder],
) -> Losses:
    """Losses of the language model on `tokens` [n, context] with the hookpoint left alone, set to zero, set to
    `mean` [d_in], and replaced by each autoencoder's reconstruction, at the positions marked in `counted`. A
    prediction counts where its position is marked and its target is not a special token."""
    target = torch.tensor(list(special_ids), device=model.device)
    average = torch.from_numpy(mean).float().to(model.device)
    replacements: list[Callable[[Tensor], Tensor] | None] = [
        None,
        torch.zeros_like,
        lambda x: average.to(x.dtype).expand_as(x),
        *[lambda x, sae=sae: reconstructed(sae, x) for sae in saes],
    ]
    sums, n = np.zeros(len(replacements)), 0
    batch = max(1, LOGITS_AT_A_TIME // (tokens.shape[1] * model.vocab_size))
    for start in range(0, len(tokens), batch):
        ids = torch.from_numpy(tokens[start : start + batch].astype("int64")).to(model.device)
        here = torch.from_numpy(counted[start : start + batch]).to(model.device)
        predicted = here[:, :-1] & ~torch.isin(ids[:, 1:], target)
        n += int(predicted.sum())
        for index, replace in enumerate(replacements):
            hook = None if replace is None else (hook_name, only_at(here, replace))
            sums[index] += model.losses(ids, hook)[predicted].double().sum().item()
    clean, zero, average_loss, *spliced = (float(total) / max(1, n) for total in sums)
    return Losses(clean, zero, average_loss, spliced, n)


def reconstructed(sae: Autoencoder, x: Float[Tensor, "contexts context *shape"]) -> Tensor:
    flat = x.flatten(0, 1).flatten(1)
    return sae.decode(sae.encode(flat)).to(x.dtype).view_as(x)


def only_at(here: Bool[Tensor, "contexts context"], replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`replace` at the marked positions, the activations as they are elsewhere."""

    def spliced(x: Tensor) -> Tensor:
        mask = here.view(*here.shape, *[1] * (x.ndim - 2))
        return torch.where(mask, replace(x), x)

    return spliced


def recovered(ablated: float, spliced: float, clean: float) -> float | None:
    """Share of the ablation's damage that splicing avoids; None where ablation does next to nothing."""
    return (ablated - spliced) / (ablated - clean) if ablated - clean > SMALLEST_GAP else None


def entry(sae: Autoencoder, fit: Fit, losses: Losses | None, index: int) -> dict[str, Any]:
    """One autoencoder's part of evaluation.json; it is number `index` in `losses`."""
    spliced = losses.spliced[index] if losses else None
    return {
        **{key: getattr(sae.config, key, None) for key in ("arch", "d_sae", "sparsity", "k", "l0_target", "seed")},
        "name": sae.config.name,
        **asdict(fit),
        "ce_spliced": spliced,
        "ce_recovered": recovered(losses.zero, losses.spliced[index], losses.clean) if losses else None,
        "ce_recovered_mean": recovered(losses.mean, losses.spliced[index], losses.clean) if losses else None,
        "ce_tokens": losses.tokens if losses else None,
    }
