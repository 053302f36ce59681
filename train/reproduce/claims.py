"""The paper's claims, each with its published figure, and the rule that marks them.

A claim names a number of a cell, the bound that the number must pass, and the cells it is about. **Reproduced**: in at
least the share `most` of those cells, the whole 95 % interval over seeds passes the bound. **Partly**: in at least the
share `some` of them, the mean passes the weaker bound (`weak`, or the same one). Otherwise **not**. **Not measured**:
no cell has the number. One seed has no interval, so it can show "partly" at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from train.reproduce.analysis import TOLERANCE, CellResult
from train.reproduce.curves import Interval, magnitude_of
from train.reproduce.plan import LARGE, LARGE_RESET, NO_AUX, ONE_SIDED

REPRODUCED, PARTLY, NOT, NOT_MEASURED = "reproduced", "partly", "not", "not measured"

Value = Callable[[CellResult], Interval | None]
Where = Callable[[CellResult], bool]


def everywhere(_: CellResult) -> bool:
    return True


def not_dominating(cell: CellResult) -> bool:
    return cell.verdict != "dominates"


def at_hook(hook: str) -> Where:
    """Selects the cells of one hookpoint; "resid" selects the residual stream under any of its names."""
    return lambda cell: cell.hook.startswith("resid") if hook == "resid" else cell.hook == hook


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the rule by which a measurement agrees with it."""

    name: str
    paper: str
    """The figure in the paper's abstract."""
    ours: str
    """A description of our number."""
    value: Value
    bound: float
    above: bool = True
    """Whether the number must be above the bound or, if False, below it."""
    weak: float | None = None
    most: float = 1.0
    some: float = 0.5
    where: Where = everywhere
    at_bound: bool = False
    """Whether the bound itself passes."""


@dataclass(frozen=True)
class Finding:
    """A claim, our numbers and the mark."""

    claim: str
    paper: str
    ours: str
    rule: str
    values: dict[str, Interval | None]
    """Our number in each cell that the claim is about."""
    mark: str


def changed(arm: str, field: str) -> Value:
    return lambda cell: getattr(cell.changed[arm], field) if arm in cell.changed else None


def lowest(cell: CellResult) -> Interval | None:
    """Returns the lowest difference in R². Its lower end is the lowest of the intervals at any L0, because a claim
    about it means that every interval passes."""
    return replace(cell.r2.lowest, low=cell.r2.floor) if cell.r2 else None


def dead_ratio(cell: CellResult) -> Interval | None:
    return cell.dead_ratio.ratio if cell.dead_ratio else None


def magnitude(value: Interval | None) -> Interval | None:
    return magnitude_of(value) if value else None


RATIO: Final = "geometric mean over the overlap of dead(Gated) / dead(SA-GSAE)"

CLAIMS: Final = (
    Claim("SA-GSAE at H has a higher R² than Gated at 2H over the whole overlap", "3 of 6 cells",
          "lowest difference in R² over the overlap", lowest, 0.0, most=0.5, some=1e-9),
    Claim("Where it does not, R² is within 0.025", "within 0.025, largest gap 0.008",
          "lowest difference in R² over the overlap", lowest, -TOLERANCE, where=not_dominating, at_bound=True),
    Claim("There, a smaller share of latents is dead", "lower by 0.35 to 0.62 (v1), to 0.82 (v2)",
          "dead(SA-GSAE) − dead(Gated) at L0 64 or the nearest",
          lambda cell: cell.dead.difference if cell.dead else None, -0.35, above=False, weak=0.0, where=not_dominating),
    Claim("Fewer dead latents over the sweep: MLP output", "100 to 500 times fewer", RATIO, dead_ratio, 100.0, weak=2.0,
          where=at_hook("mlp_out")),
    Claim("Fewer dead latents over the sweep: attention", "2 to 4 times fewer", RATIO, dead_ratio, 2.0, weak=1.0,
          where=at_hook("attn_out")),
    Claim("Fewer dead latents over the sweep: residual stream",
          "100 to 500 times fewer (Pythia-1B), 2 to 4 (SmolLM3-3B)", RATIO, dead_ratio, 2.0, weak=1.0,
          where=at_hook("resid")),
    Claim("Without the auxiliary loss reconstruction collapses", "no R² in the abstract", "R² without it",
          changed(NO_AUX, "r2"), 0.3, above=False, weak=0.5),
    Claim("Without it the loss recovered collapses", "0.27", "loss recovered against zero ablation",
          changed(NO_AUX, "loss_recovered"), 0.3, above=False, weak=0.5),
    Claim("Without it nearly all latents die", "98 % dead", "dead without it", changed(NO_AUX, "dead"), 0.9, weak=0.5),
    Claim("The two-sided gate is load-bearing", "no figure in the abstract",
          "R² of the one-sided gate − two-sided, same width, matched L0", changed(ONE_SIDED, "difference"), 0.0,
          above=False),
    Claim("Tying r of both poles changes nothing", "|ΔR²| = 0.0015", "|R² with r tied − untied| at matched L0",
          lambda cell: magnitude(cell.tied_r), 0.005, above=False, at_bound=True),
    Claim("Nor does tying everything", "ours: no figure in the abstract", "|R² with all tied − untied| at matched L0",
          lambda cell: magnitude(cell.tied), 0.005, above=False, at_bound=True),
    Claim("MLP output: most latents carry both polarities", "“most”", "share of live latents with both poles",
          lambda cell: cell.bipolar, 0.5, where=at_hook("mlp_out")),
    Claim("Attention: bipolar structure is concentrated in the top latents", "no figure in the abstract",
          "share with both poles in the tenth that fires most − in all live latents",
          lambda cell: cell.concentration, 0.1, weak=0.0, where=at_hook("attn_out")),
    Claim("SA-GSAE at 2H collapses at the residual stream", "SmolLM3-3B only",
          "lowest R² of SA-GSAE at 2H − at H over the overlap",
          lambda cell: cell.full_width.lowest if cell.full_width else None, -0.1, above=False, weak=-0.025,
          where=at_hook("resid")),
    Claim("A large initial threshold kills latents", "no figure in the abstract", "dead − dead at the tuned threshold",
          changed(LARGE, "more_dead"), 0.25, weak=0.0),
    Claim("Threshold resets prevent that", "no figure in the abstract",
          "dead with resets − dead at the tuned threshold", changed(LARGE_RESET, "more_dead"), 0.05, above=False,
          weak=0.25),
    Claim("A nameable opposition between the poles is rare", "v2, no figure",
          "share of latents whose poles both have a lexical rule with F1 above 0.5", lambda cell: cell.nameable, 0.05,
          above=False, weak=0.1),
    Claim("A latent's value is a causal dial, in a limited scope", "v2, no figure",
          "share of two-sided latents that pass the dial test", lambda cell: cell.dial, 0.5, weak=0.1),
)  # fmt: skip


def judge(claim: Claim, cells: Sequence[CellResult]) -> Finding:
    """Marks a claim by all cells that it is about."""
    values = {cell.cell: claim.value(cell) for cell in cells if claim.where(cell)}
    return Finding(claim.name, claim.paper, claim.ours, rule(claim), values, mark(claim, list(values.values())))


def judge_all(cells: Sequence[CellResult]) -> list[Finding]:
    return [judge(claim, cells) for claim in CLAIMS]


def mark(claim: Claim, values: Sequence[Interval | None]) -> str:
    """A cell without a number does not pass."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_MEASURED
    weak = claim.bound if claim.weak is None else claim.weak
    surely = sum(passes(claim, value.low if claim.above else value.high, claim.bound) for value in known)
    likely = sum(passes(claim, value.mean, weak) for value in known)
    if surely >= claim.most * len(values):
        return REPRODUCED
    return PARTLY if likely and likely >= claim.some * len(values) else NOT


def passes(claim: Claim, value: float | None, bound: float) -> bool:
    if value is None:
        return False
    return (claim.at_bound and value == bound) or (value > bound if claim.above else value < bound)


def rule(claim: Claim) -> str:
    """Describes the claim's rule in words."""
    side = ("≥" if claim.above else "≤") if claim.at_bound else (">" if claim.above else "<")
    where = "every cell" if claim.most == 1 else f"{claim.most:.0%} of cells"
    weak = claim.bound if claim.weak is None else claim.weak
    half = "any cell" if claim.some < 0.1 else f"{claim.some:.0%} of cells"
    return f"{side} {claim.bound:g} in {where}; partly: mean {side} {weak:g} in {half}"
