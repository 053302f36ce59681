"""The data of the page: one script for every 64 latents, and the index of all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from train.features.site.columns import ListColumn, lists, numbers
from train.features.site.pack import half, packed, smallest
from train.features.slots import counted_off

PER_SHARD: Final = 64
"""Latents in a script."""
LISTED: Final = 8
"""Entries of each list of a pole on its page."""
BEST: Final = 10
PER_BAND: Final = 3
"""Examples that the page shows of a pole: the strongest, and those drawn from each quarter of its maximum."""
BANDS: Final = 4
SHOWN: Final = 4
"""Tokens of a pole in the index."""
SHARES: Final = 10_000
"""Units of a share, of an F1 and of a cosine in the index."""


@dataclass(frozen=True)
class TokenCounts:
    """How often each token was read, by token id."""

    rows: NDArray[np.int64]

    def lift(self, token: NDArray[Any], share: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much more frequent tokens are than among all rows."""
        usual = np.maximum(self.rows[token], 1) / max(1, int(self.rows.sum()))
        return np.asarray(share / usual)


@dataclass
class SiteIndex:
    """One row per latent, filled shard by shard."""

    d_sae: int
    sides: int
    columns: dict[str, NDArray[Any]] = field(init=False)

    def __post_init__(self) -> None:
        poles = self.sides * self.d_sae
        self.columns = {
            "firings": np.zeros(poles, np.uint32),
            "share": np.zeros(poles, np.uint16),
            "f1": np.zeros(poles, np.uint16),
            "tokens": np.zeros((poles, SHOWN), np.uint32),  # token + 1; 0 for none
            "far": np.zeros(self.d_sae, np.uint32),  # latent + 1; 0 for none
            "cosine": np.zeros(self.d_sae, np.int16),
        }

    def take(self, first: int, table: pa.Table) -> None:
        """Fills the rows of some latents."""
        poles = slice(first * self.sides, first * self.sides + len(table))
        self.columns["firings"][poles] = numbers(table["firings"])
        self.columns["share"][poles] = np.rint(SHARES * numbers(table["share_of_energy"]))
        self.columns["f1"][poles] = np.rint(SHARES * numbers(table["rule_f1"]))
        self.columns["tokens"][poles] = telling(lists(table, "rule"), lists(table, "on", "token"))
        far = lists(table, "far", "latent", "cosine").first(1)
        mine = np.flatnonzero(far.lengths.reshape(-1, self.sides)[:, 0])
        entry = (np.cumsum(far.lengths) - far.lengths).reshape(-1, self.sides)[mine, 0]
        self.columns["far"][first + mine] = far["latent"][entry] + 1
        self.columns["cosine"][first + mine] = np.rint(SHARES * far["cosine"][entry])

    def script(self, about: dict[str, Any], words: dict[str, NDArray[Any]]) -> bytes:
        arrays = {name: values.T if values.ndim > 1 else values for name, values in self.columns.items()}
        small = {name: smallest(arrays[name]) for name in ("firings", "tokens", "far")}
        return packed("index", about, {**arrays, **small, **words})


def telling(rule: ListColumn, on: ListColumn) -> NDArray[np.uint32]:
    """The tokens that name poles, plus 1: those of the rule, then the most frequent others. [poles, SHOWN]"""
    found = np.zeros((len(rule.lengths), SHOWN), np.uint32)
    row = np.concatenate([rule.rows, on.rows])
    token = np.concatenate([rule[""], on["token"]]).astype(np.int64)
    order = np.argsort(row, kind="stable")
    row, token = row[order], token[order]
    _, once = np.unique(row << 32 | token, return_index=True)
    once.sort()
    row, token = row[once], token[once]
    place = counted_off(row)
    keep = place < SHOWN
    found[row[keep], place[keep]] = token[keep] + 1
    return found


def latents_script(
    about: Mapping[str, Any], table: pa.Table, examples: pa.Table, counts: TokenCounts, used: NDArray[np.bool_]
) -> bytes:
    """The script of some latents. `about`: what its header says. Marks in `used` which tokens are in it."""
    firings = np.maximum(numbers(table["firings"]), 1)
    arrays = {name: numbers(table[name]) for name in ("mass", "energy")}
    arrays |= {name: numbers(table[name]).astype(np.float32) for name in ("max", "mean", "q50", "q95", "rule_f1")}
    arrays["share"] = numbers(table["share_of_energy"]).astype(np.float32)
    arrays["firings"] = smallest(numbers(table["firings"]))
    arrays["hist"] = smallest(table["hist"].combine_chunks().flatten().to_numpy())
    for kind in ("on", "before", "after"):
        found = lists(table, kind, "token", "count")
        if kind != "on":
            lift = counts.lift(found["token"], found["count"] / firings[found.rows])
            found = found.sorted_by(found["count"] * np.log2(lift))
        arrays |= flat(kind, found.first(LISTED), token=smallest, count=smallest)
    arrays |= flat("lens", lists(table, "lens", "token", "logit").first(LISTED), token=smallest, logit=half)
    arrays |= flat("rule", lists(table, "rule"), **{"": smallest})
    for kind in ("near", "far"):
        arrays |= flat(kind, lists(table, kind, "latent", "cosine").first(LISTED), latent=smallest, cosine=half)
    cofire = lists(table, "cofire", "latent", "sign", "jaccard", "lift").first(LISTED)
    arrays |= flat("cofire", cofire, latent=smallest, sign=np.int8, jaccard=half, lift=half)
    arrays |= example_arrays(table, examples)
    for name in ("on.token", "before.token", "after.token", "lens.token", "rule", "example.token"):
        used[arrays[name].astype(np.int64)] = True
    return packed("shard", about, arrays)


def flat(name: str, column: ListColumn, **kinds: Any) -> dict[str, NDArray[Any]]:
    """A column of lists as arrays NAME.lengths and NAME.MEMBER."""
    arrays = {
        f"{name}.{member}".rstrip("."): kind(column[member]) if callable(kind) else column[member].astype(kind)
        for member, kind in kinds.items()
    }
    return {f"{name}.lengths": smallest(column.lengths), **arrays}


def example_arrays(table: pa.Table, examples: pa.Table) -> dict[str, NDArray[Any]]:
    """The examples that the page shows, and how many were drawn in each band, [poles, BANDS]."""
    sides = 1 + int((numbers(table["sign"]) < 0).any())
    pole = sides * (numbers(examples["latent"]).astype(np.int64) - int(numbers(table["latent"])[0]))
    pole += numbers(examples["sign"]) < 0
    group = numbers(examples["group"]).astype(np.int64)
    cell = pole * (BANDS + 1) + group
    drawn = np.bincount(cell, minlength=(BANDS + 1) * len(table)).reshape(-1, BANDS + 1)[:, 1:]
    rank = numbers(examples["rank"])
    chosen = examples.filter(pa.array(rank < np.where(group == 0, BEST, PER_BAND))).combine_chunks()
    keep = rank < np.where(group == 0, BEST, PER_BAND)
    tokens, values = lists(chosen, "tokens"), lists(chosen, "values")
    return {
        "drawn": smallest(drawn),
        "example.lengths": smallest(np.bincount(pole[keep], minlength=len(table))),
        "example.group": group[keep].astype(np.uint8),
        "example.value": numbers(chosen["value"]),
        "example.context": smallest(numbers(chosen["context"])),
        "example.position": numbers(chosen["position"]),
        "example.before": smallest(numbers(chosen["position"]).astype(np.int64) - numbers(chosen["start"])),
        "example.size": smallest(tokens.lengths),
        "example.token": smallest(tokens[""]),
        "example.values": half(values[""]),
    }
