"""The short answer at the top of a report: sentences and a few large numbers, all computed from the measurements.

SA-GSAE of width H is compared with Gated of width 2H, and with Gated of width H if one was trained, at matched L0.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from train.report import wording
from train.report.frontier import FrontierComparison, FrontierPoint, compare, mean_of_seeds, seed_spread
from train.report.sae import FrontierKey, MeasuredSAE

Series = dict[FrontierKey, list[MeasuredSAE]]
"""The autoencoders of each (architecture, width, variant): all λ (or k, or L0 targets) and seeds."""

NEGLIGIBLE = 0.0005
"""Differences in R² that round to 0.000 are called equal."""

CAVEAT = (
    "Every SA-GSAE of width H can be written as a Gated SAE of width 2H with the same loss (split each latent into its "
    "two poles). So a win at half the width is an effect of optimisation, not of capacity."
)


@dataclass(frozen=True)
class NumberTile:
    """One large number with its name and a note."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Verdict:
    """The comparison of one SA-GSAE width with one Gated width."""

    title: str
    text: str
    tiles: tuple[NumberTile, ...]


@dataclass(frozen=True)
class Answer:
    """All comparisons of a setting, and remarks on it."""

    verdicts: tuple[Verdict, ...]
    remarks: tuple[str, ...]


def answer(series: Series) -> Answer:
    """Answers for one setting."""
    verdicts = tuple(_verdict(series, a, b) for a, b in _pairs(series))
    remarks = [] if verdicts else [_no_pair(series)]
    remarks += [_bipolar(saes) for saes in series.values() if saes[0].signed and _known(saes, "bipolar_fraction")]
    remarks += [_antipodal(saes) for saes in series.values() if not saes[0].signed and _pairs_found(saes)]
    own = [sae for key, saes in series.items() if not key.origin for sae in saes]
    remarks += [_spread(own)] if own else []
    return Answer(verdicts, (*remarks, CAVEAT) if verdicts else tuple(remarks))


def _pairs(series: Series) -> list[tuple[FrontierKey, FrontierKey]]:
    """Pairs each SA-GSAE with the Gated of twice its width and the Gated of its own width that has the same other
    settings, or else with the default Gated."""
    pairs = []
    for key in sorted(key for key in series if key.arch == "sa-gsae"):
        for width in (2 * key.d_sae, key.d_sae):
            found = [other for v in (_other_settings(key), "") if (other := FrontierKey("gated", width, v)) in series]
            pairs += [(key, other) for other in found[:1]]
    return pairs


def _other_settings(key: FrontierKey) -> str:
    """Returns the variant without the settings that Gated does not have."""
    return re.sub(r"(^|-)(tie-(magnitude|none)|one-sided-true)", "", key.variant).lstrip("-")


def _verdict(series: Series, signed: FrontierKey, gated: FrontierKey) -> Verdict:
    a, b = series[signed], series[gated]
    h, other = signed.d_sae, gated.d_sae
    names = wording.label(a[0].key), wording.label(b[0].key)
    points_a, points_b = mean_of_seeds(a, "r2"), mean_of_seeds(b, "r2")
    matched = compare(points_a, points_b)
    text = _sentence(names, matched) if matched else _no_overlap(names, points_a, points_b)
    if _other_settings(signed) != gated.variant:
        text += f" They differ in other settings too ({_other_settings(signed)}), not only in the signs of latents."
    tiles = (*_tiles(a, b, matched), *_parameter_tile(a[0].parameters, b[0].parameters))
    relation = "half the width" if other == 2 * h else "equal width"
    return Verdict(f"{names[0]} against {names[1]}, {relation}", text, tiles)


def _sentence(names: tuple[str, str], matched: FrontierComparison) -> str:
    """Describes the difference in R² over the shared range of L0."""
    a, b = names
    where = f"At matched L0 ({wording.l0_range(matched.l0_low, matched.l0_high)})"
    low, high = wording.fixed(abs(matched.lowest), 4), wording.fixed(abs(matched.highest), 4)
    if max(abs(matched.lowest), abs(matched.highest)) < NEGLIGIBLE:
        return f"{where}, {a} and {b} reach the same R² to within {NEGLIGIBLE:g}."
    if matched.lowest > -NEGLIGIBLE:
        return f"{where}, {a} reaches a higher R² than {b} {_amount(matched.lowest, matched.highest)}."
    if matched.highest < NEGLIGIBLE:
        return f"{where}, {a} reaches a lower R² than {b} {_amount(-matched.highest, -matched.lowest)}."
    crossings = " and ".join(wording.l0(l0) for l0 in matched.crossings)
    return (
        f"{where}, {a} is ahead of {b} in part of the range (R² higher by up to {high}) and behind in the rest "
        f"(lower by up to {low}); the frontiers cross at L0\N{NO-BREAK SPACE}≈\N{NO-BREAK SPACE}{crossings}."
    )


def _amount(small: float, large: float) -> str:
    """Says by how much. `small` may be a negligible difference of the other sign."""
    if small < NEGLIGIBLE:
        return f"nearly throughout, by up to {wording.fixed(large, 4)}"
    low, high = wording.fixed(small, 4), wording.fixed(large, 4)
    return f"throughout, by {high}" if low == high else f"throughout, by {low} to {high}"


def _no_overlap(names: tuple[str, str], a: list[FrontierPoint], b: list[FrontierPoint]) -> str:
    """Says why no difference can be stated, and what to train to get one."""
    if not a or not b:
        missing = names[0] if not a else names[1]
        return f"{missing} has no measured R² at a non-zero L0, so there is nothing to compare."
    ranges = [wording.l0_range(points[0].l0, points[-1].l0) for points in (a, b)]
    denser, sparser = names if a[0].l0 > b[-1].l0 else names[::-1]
    return (
        f"The frontiers do not overlap: {names[0]} covers {ranges[0]}, {names[1]} {ranges[1]}. No difference "
        f"at matched L0 can be stated; train {denser} with a larger λ, or {sparser} with a smaller one."
    )


def _tiles(a: list[MeasuredSAE], b: list[MeasuredSAE], matched: FrontierComparison | None) -> tuple[NumberTile, ...]:
    if matched is None:
        return (NumberTile("Difference in R² at matched L0", wording.ABSENT, "the frontiers do not overlap"),)
    low, high = wording.signed(matched.lowest), wording.signed(matched.highest)
    between = f"SA-GSAE minus Gated, mean over the range of L0 (lowest {low}, highest {high})"
    tiles = [NumberTile("Difference in R² at matched L0", wording.signed(matched.mean), between)]
    ce = compare(mean_of_seeds(a, "ce_recovered"), mean_of_seeds(b, "ce_recovered"))
    if ce:
        low, mean, high = (wording.signed(100 * value, 2) for value in (ce.lowest, ce.mean, ce.highest))
        note = f"percentage points, SA-GSAE minus Gated, mean over the range of L0 (lowest {low}, highest {high})"
        tiles.append(NumberTile("Difference in CE recovered at matched L0", mean, note))
    dead = compare(mean_of_seeds(a, "dead_fraction"), mean_of_seeds(b, "dead_fraction"))
    if dead:
        note = f"of SA-GSAE, {wording.percent(dead.mean_b)} of Gated (means over the range of L0)"
        tiles.append(NumberTile("Dead latents at matched L0", wording.percent(dead.mean_a), note))
    return tuple(tiles)


def _parameter_tile(a: int | None, b: int | None) -> list[NumberTile]:
    if not a or not b:
        return []
    return [NumberTile("Parameters", wording.short(a), f"of SA-GSAE, {wording.short(b)} of Gated (ratio {a / b:.2f})")]


def _no_pair(series: Series) -> str:
    trained = ", ".join(wording.label(key) for key in series if not key.origin)
    if not trained:
        return "No autoencoder of this section was trained here, so no comparison at matched L0 is stated."
    return (
        f"Trained here: {trained}. There is no pair of SA-GSAE at width H and Gated at 2H (or H), so no comparison at "
        "matched L0 is stated."
    )


def _known(saes: Sequence[MeasuredSAE], field: str) -> list[float]:
    return sorted(value for sae in saes if (value := getattr(sae, field)) is not None)


def _shares(values: Sequence[float], start: str) -> str:
    low, high = wording.percent(values[0], 0), wording.percent(values[-1], 0)
    return low if low == high else f"{start} {low} and {high}"


def _bipolar(saes: Sequence[MeasuredSAE]) -> str:
    mass, energy = _known(saes, "bipolar_mass"), _known(saes, "bipolar_energy")
    by_energy = (
        f" {_shares(energy, 'Between')} have more than {wording.percent(0.1, 0)} of their energy Σf² on the weaker "
        "side."
        if energy
        else ""
    )
    carried = f" They carry {_shares(mass, 'between')} of the activation mass." if mass else ""
    return (
        f"{_shares(_known(saes, 'bipolar_fraction'), 'Between')} of the live latents of {wording.label(saes[0].key)} "
        f"use both poles (the rarer sign makes up more than {wording.percent(0.1, 0)} of a latent’s firings).{carried}"
        f"{by_energy}"
    )


def _pairs_found(saes: Sequence[MeasuredSAE]) -> list[int]:
    return sorted(sae.directions.antipodal_pairs for sae in saes if sae.directions)


def _antipodal(saes: Sequence[MeasuredSAE]) -> str:
    found, name = _pairs_found(saes), wording.label(saes[0].key)
    low, high = found[0], found[-1]
    if not high:
        return f"No two live latents of {name} are antipodal (cosine below −0.9)."
    pairs = "1 antipodal pair" if high == low == 1 else f"{wording.span(found)} antipodal pairs"
    return (
        f"{name} has {pairs} of live latents (cosine below −0.9). A dictionary with signs would need one latent "
        f"instead of {'the' if high == low == 1 else 'each'} pair."
    )


def _spread(saes: Sequence[MeasuredSAE]) -> str:
    spread = seed_spread(saes)
    if spread is None:
        return (
            "Each autoencoder was trained with one seed only. The spread between seeds is not known, so small "
            "differences may be noise."
        )
    most = wording.fixed(spread, 4)
    return f"Seeds of the same autoencoder differ by up to {most} in R². Differences smaller than that may be noise."
