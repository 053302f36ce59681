"""The results as tables of text, for both Markdown and HTML. Missing numbers are an en dash."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.report.wording import ABSENT, fixed, l0_range, signed
from train.report.wording import l0 as short_l0
from train.reproduce.analysis import Arms, CellResult, over_seeds
from train.reproduce.claims import Finding
from train.reproduce.curves import ArmMeasurement, Interval
from train.reproduce.pilot import Pilot

Row = tuple[str, ...]


@dataclass(frozen=True)
class ReproductionTable:
    """One table of the results."""

    title: str
    note: str
    header: Row
    rows: tuple[Row, ...]


def number(found: Interval | None, digits: int = 4, sign: bool = False) -> str:
    """Returns text such as `0.123 [0.120, 0.126]`, without the bracket when there was one seed."""
    if found is None:
        return ABSENT

    def text(value: float) -> str:
        return signed(value, digits) if sign else fixed(value, digits)

    if found.low is None or found.high is None:
        return text(found.mean)
    return f"{text(found.mean)} [{text(found.low)}, {text(found.high)}]"


def claims_table(findings: Sequence[Finding]) -> ReproductionTable:
    rows = []
    for found in findings:
        values = [
            f"{cell}: {number(value, 3)}" if len(found.values) > 1 else number(value, 3)
            for cell, value in found.values.items()
            if value is not None
        ]
        ours = f"{found.ours}: {'; '.join(values)}" if values else found.ours
        rows.append((found.claim, found.paper, ours, found.rule, found.mark))
    note = (
        "Brackets hold the 95 % t interval over seeds. Reproduced: the whole interval passes the rule's bound in the "
        "cells that the rule asks for. Partly: the mean passes the weaker bound. One seed has no interval."
    )
    return ReproductionTable("Claims", note, ("Claim", "Paper", "Here", "Rule", "Mark"), tuple(rows))


def cells_table(cells: Sequence[CellResult]) -> ReproductionTable:
    rows = []
    for cell in cells:
        r2 = cell.r2
        span = l0_range(r2.l0_low, r2.l0_high).removeprefix("L0 ") if r2 else ABSENT
        lowest = f"{number(r2.lowest, 4, True)} at L0 {short_l0(r2.lowest_l0)}" if r2 else ABSENT
        highest = f"{number(r2.highest, 4, True)} at L0 {short_l0(r2.highest_l0)}" if r2 else ABSENT
        mean = number(r2.mean, 4, True) if r2 else ABSENT
        verdict = cell.verdict + ("" if cell.certain or r2 is None else " (by the mean)")
        rows.append((cell.cell, span, mean, lowest, highest, f"{r2.ahead:.0%}" if r2 else ABSENT, verdict))
    header = ("Cell", "L0", "ΔR², mean", "ΔR², lowest", "ΔR², highest", "Ahead over", "Verdict")
    note = (
        "R² of SA-GSAE at H minus R² of Gated at 2H at matched L0, over the range of L0 that every seed of both covers."
    )
    return ReproductionTable("R² at matched L0", note, header, tuple(rows))


def dead_table(cells: Sequence[CellResult]) -> ReproductionTable:
    rows = []
    for cell in cells:
        dead, ratio = cell.dead, cell.dead_ratio
        times = f"{ratio.bound} {number(ratio.ratio, 2)}".lstrip() if ratio else ABSENT
        numbers = (dead.sa, dead.gated) if dead else (None, None)
        rows.append(
            (
                cell.cell,
                short_l0(dead.l0) if dead else ABSENT,
                *(number(value, 3) for value in numbers),
                number(dead.difference if dead else None, 3, True),
                times,
                number(cell.bipolar, 3),
                number(cell.bipolar_energy, 3),
            )
        )
    header = ("Cell", "L0", "Dead, SA-GSAE H", "Dead, Gated 2H", "Difference", "Ratio over the sweep", "Both poles",
              "Both by energy")  # fmt: skip
    note = (
        "The share of dead latents at L0 64, or at the nearest L0 that both have. The ratio is the geometric mean of "
        "dead(Gated) / dead(SA-GSAE) over the overlap; fewer than half a dead latent counts as half (≥: the ratio is a "
        "lower bound, ≤: an upper bound, ≈: neither). Both poles: the share of SA-GSAE's live latents that fire with "
        "both signs, at the same L0. Both by energy: the share with more than a tenth of their energy on the weaker "
        "side."
    )
    return ReproductionTable("Dead latents", note, header, tuple(rows))


def changed_table(cells: Sequence[CellResult]) -> ReproductionTable:
    rows = [
        (
            cell.cell,
            arm,
            str(found.width),
            number(found.r2),
            number(found.l0, 2),
            number(found.dead, 3),
            number(found.loss_recovered, 3),
            number(found.difference, 4, True),
        )
        for cell in cells
        for arm, found in cell.changed.items()
    ]
    header = ("Cell", "Change", "Width", "R²", "L0", "Dead", "Loss recovered", "ΔR² at matched L0")
    note = (
        "Ablations of SA-GSAE at H, and baselines (means over their settings). ΔR² is the difference to SA-GSAE at H "
        "at the same L0; a dash means that SA-GSAE does not reach that L0. Loss recovered is relative to zero ablation."
    )
    return ReproductionTable("Ablations and baselines", note, header, tuple(rows))


def widths_table(cells: Sequence[CellResult]) -> ReproductionTable:
    rows = []
    for cell in cells:
        for name, found in (
            ("SA-GSAE H − Gated H", cell.equal_width),
            ("SA-GSAE 2H − SA-GSAE H", cell.full_width),
        ):
            span = l0_range(found.l0_low, found.l0_high).removeprefix("L0 ") if found else ABSENT
            numbers = (found.mean, found.lowest, found.highest) if found else (None, None, None)
            rows.append((cell.cell, name, span, *(number(value, 4, True) for value in numbers)))
        rows.append((cell.cell, "r tied − untied", "", number(cell.tied_r, 4, True), "", ""))
        rows.append((cell.cell, "all tied − untied", "", number(cell.tied, 4, True), "", ""))
    header = ("Cell", "Difference", "L0", "ΔR², mean", "Lowest", "Highest")
    return ReproductionTable("Widths and ties", "R² at matched L0.", header, tuple(rows))


def pilot_table(pilots: Mapping[str, Pilot]) -> ReproductionTable:
    rows = [
        (
            cell,
            arm,
            f"{trial.choice.lr:g}",
            f"{trial.choice.theta0:g}",
            short_l0(pilot.l0),
            fixed(trial.r2, 4),
            "chosen" if not place else "" if trial.reaches else "does not reach this L0",
        )
        for cell, pilot in pilots.items()
        for arm, trials in pilot.trials.items()
        for place, trial in enumerate(trials)
    ]
    header = ("Cell", "Method", "Learning rate", "θ0·√d_in", "L0", "R² at this L0", "")
    note = "Both methods are tuned by R² at the same L0: the geometric mean over all autoencoders of the cell's pilot."
    return ReproductionTable("Pilot", note, header, tuple(rows))


def frontier_table(points: Mapping[str, Arms]) -> ReproductionTable:
    rows = []
    for cell, arms in points.items():
        for arm, found in arms.items():
            for setting in sorted({point.setting for point in found}):
                same: list[ArmMeasurement] = [point for point in found if point.setting == setting]
                values = (over_seeds(same, field) for field in ("l0", "r2", "dead"))
                l0, r2, dead = values
                seeds = str(len(same))
                rows.append((cell, arm, f"{setting:g}", seeds, number(l0, 2), number(r2), number(dead, 3)))
    header = ("Cell", "Arm", "λ or k", "Seeds", "L0", "R²", "Dead")
    return ReproductionTable("All autoencoders", "Means over seeds.", header, tuple(rows))
