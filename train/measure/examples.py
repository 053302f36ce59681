"""The tokens on which one latent is most active, with the text around each: what you read to find out what it means.

`latent_examples` reads a store chunk by chunk, so that its memory does not grow with the store; `strongest` is the pure
step in the middle.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.store.opened import Store
from shared.store.reader import read_places
from shared.store.tokens import CountedMask
from train.data.rows import HookRows, to_tensor

if TYPE_CHECKING:
    from train.autoencoder import Autoencoder

ROWS_ENCODED: Final = 1024
"""Rows encoded at a time: [1024, d_sae] in float32 is 128 MB for d_sae = 32,768."""


@dataclass(frozen=True)
class LatentExample:
    """One token on which a latent is active."""

    value: float
    """The latent there, in the units of the activations. Its sign says which pole."""
    context: int
    """The row of the store's `tokens`."""
    position: int
    """The token's place in that row."""
    ids: tuple[int, ...]
    """All token ids of that row."""

    def text(self, tokenizer: Any, around: int = 8) -> str:
        """Returns the token in [[brackets]] between up to `around` tokens on either side, on one line."""
        at, last = self.position, self.position + 1 + around
        pieces = self.ids[max(0, at - around) : at], self.ids[at : at + 1], self.ids[at + 1 : last]
        before, token, after = (tokenizer.decode(list(piece)) for piece in pieces)
        return " ".join(f"{before}[[{token}]]{after}".split())


@dataclass(frozen=True)
class LatentExamples:
    """The strongest examples of each pole of one latent, the strongest first. `negative` is empty for a latent that
    carries no sign."""

    positive: list[LatentExample]
    negative: list[LatentExample]


@dataclass(frozen=True)
class Strongest:
    """The largest positive values seen so far, in falling order, and the place in the corpus of each."""

    values: NDArray[np.float64]
    places: NDArray[np.int64]

    @classmethod
    def none(cls) -> "Strongest":
        return cls(np.empty(0), np.empty(0, np.int64))


def strongest(best: Strongest, values: NDArray[np.float64], places: NDArray[np.int64], count: int) -> Strongest:
    """Returns the `count` largest positive values of `best` and `values` together. Of equal values, the place that
    comes first in the corpus wins, so that the order of reading does not matter."""
    positive = values > 0
    values = np.concatenate([best.values, values[positive]])
    places = np.concatenate([best.places, places[positive]])
    order = np.lexsort((places, -values))[:count]
    return Strongest(values[order], places[order])


def latent_examples(sae: "Autoencoder", store: Store, hook: str, latent: int, count: int = 10) -> LatentExamples:
    """Returns the `count` tokens of `store` on which `latent` of `sae` is largest, and the `count` on which it is most
    negative; fewer where it is active on fewer.

    Reads every committed row of `hook` (a path in the store, such as "layer_01/mlp_out") once and uses those that
    count: not the first positions of a context, no special tokens, no row with a NaN or an infinity. Raises UserError
    for a hookpoint, a latent or a count that does not fit, DamagedError when the store's bytes are not what was
    committed.
    """
    check(sae, store, hook, latent, count)
    high = low = Strongest.none()
    for rows, places in counted_rows(store, hook):
        values = values_of(sae, rows, latent)
        high, low = strongest(high, values, places, count), strongest(low, -values, places, count)
    return LatentExamples(described(store, high, 1), described(store, low, -1))


def values_of(sae: "Autoencoder", rows: Float[Tensor, "n d_in"], latent: int) -> NDArray[np.float64]:
    """Returns one latent on every row, [n]. Encodes ROWS_ENCODED rows at a time."""
    values = np.empty(len(rows))
    with torch.no_grad():
        for at in range(0, len(rows), ROWS_ENCODED):
            values[at : at + ROWS_ENCODED] = sae.encode(rows[at : at + ROWS_ENCODED])[:, latent].numpy()
    return values


def check(sae: "Autoencoder", store: Store, hook: str, latent: int, count: int) -> None:
    """Raises UserError unless an autoencoder, a hookpoint, a latent and a count fit together."""
    if hook not in store.spec.hookpoints:
        raise UserError(f"{hook}: is no hookpoint of {store.name}. It has {', '.join(store.spec.hookpoints)}")
    if store.spec.hookpoints[hook].d_in != sae.d_in:
        wide = store.spec.hookpoints[hook].d_in
        raise UserError(f"{hook}: its rows are {wide} wide, and the autoencoder takes rows {sae.d_in} wide")
    if not 0 <= latent < sae.config.d_sae:
        raise UserError(f"latent {latent}: this autoencoder has latents 0 to {sae.config.d_sae - 1}")
    if count < 1:
        raise UserError(f"count {count}: ask for 1 example or more")


def counted_rows(store: Store, hook: str) -> Iterator[tuple[Float[Tensor, "n d_in"], NDArray[np.int64]]]:
    """Yields the rows of one hookpoint that count, chunk by chunk, with each row's place in the corpus (context x
    length of a context + position)."""
    rows, counted = HookRows.of(store, hook), CountedMask(store.token_rows())
    for shard in store.commits:
        start, stop = store.spec.shard_range(shard)
        inside = read_places(rows.contexts, rows.positions, shard)
        keep, size = counted[start:stop][inside], rows.activations.layout.chunk_rows
        for chunk in range(-(-len(inside) // size)):
            values = to_tensor(rows.values(shard, chunk), store.spec.dtype).float()
            here = slice(chunk * size, chunk * size + len(values))
            chosen = torch.from_numpy(keep[here]) & values.isfinite().all(1)
            yield values[chosen], start + inside[here][chosen.numpy()]


def described(store: Store, best: Strongest, sign: int) -> list[LatentExample]:
    """Returns examples with the ids of their contexts, which are read now."""
    tokens, context = store.token_rows(check=False), store.spec.context
    found = []
    for value, place in zip(best.values.tolist(), best.places.tolist(), strict=True):
        row = place // context
        ids = tuple(tokens[row : row + 1][0].tolist())
        found.append(LatentExample(sign * value, row, place % context, ids))
    return found
