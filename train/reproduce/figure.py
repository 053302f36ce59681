"""Draws a cell's frontiers as SVG: R² over L0, a line through the means over seeds, a dot per autoencoder."""

import math
from collections.abc import Sequence
from html import escape
from typing import Final

from train.reproduce.analysis import Arms
from train.reproduce.curves import ArmMeasurement

WIDTH: Final = 720.0
HEIGHT: Final = 420.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 130.0, 34.0, 46.0
COLOURS: Final = ("#0072b2", "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#8a6d00", "#555555")
DASHES: Final = ("none", "none", "6 4", "6 4")
"""Line styles: solid for the two arms that are compared, dashed for those of the other width; baselines are dotted."""
TICKS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)


def frontier_svg(title: str, arms: Arms) -> str:
    """Returns the SVG text. Arms without a point at a positive L0 are left out."""
    shown = {arm: known(points) for arm, points in arms.items() if known(points)}
    xs = [math.log(l0) for points in shown.values() for _, l0, _ in points] or [0.0]
    ys = [r2 for points in shown.values() for _, _, r2 in points] or [0.0]
    x_low, x_high = min(xs) - 0.1, max(xs) + 0.1
    air = max(0.04 * (max(ys) - min(ys)), 0.005)
    y_low, y_high = min(ys) - air, max(ys) + air

    def x(l0: float) -> float:
        return LEFT + (math.log(l0) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(r2: float) -> float:
        return HEIGHT - BOTTOM - (r2 - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH:g}" height="{HEIGHT:g}" fill="#ffffff"/>',
        f'<text x="{LEFT:g}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for tick in TICKS:
        if x_low <= math.log(tick) <= x_high:
            parts.append(line(x(tick), TOP, x(tick), HEIGHT - BOTTOM))
            parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16:g}" text-anchor="middle">{tick:g}</text>')
    for value in round_values(y_low, y_high):
        parts.append(line(LEFT, y(value), WIDTH - RIGHT, y(value)))
        parts.append(f'<text x="{LEFT - 6:g}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{HEIGHT - 8:g}" text-anchor="middle">L0, active latents per token</text>')
    parts.append(f'<text x="14" y="{HEIGHT / 2:g}" transform="rotate(-90 14 {HEIGHT / 2:g})">R²</text>')
    for index, (arm, points) in enumerate(shown.items()):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index] if index < len(DASHES) else "2 3"
        path = " ".join(f"{x(l0):.1f},{y(r2):.1f}" for l0, r2 in means(points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{x(l0):.1f}" cy="{y(r2):.1f}" r="3" fill="{colour}"/>' for _, l0, r2 in points]
        parts.append(legend_entry(arm, colour, index))
    return "\n".join([*parts, "</svg>"]) + "\n"


def legend_entry(arm: str, colour: str, index: int) -> str:
    y = TOP + 12 + 18 * index
    return (
        f'<circle cx="{WIDTH - RIGHT + 14:g}" cy="{y - 4:g}" r="4" fill="{colour}"/>'
        f'<text x="{WIDTH - RIGHT + 24:g}" y="{y:g}">{escape(arm)}</text>'
    )


def known(points: Sequence[ArmMeasurement]) -> list[tuple[float, float, float]]:
    """Returns setting, L0 and R² of the points that have L0 > 0 and R²."""
    return [(p.setting, p.l0, p.r2) for p in points if p.l0 and p.l0 > 0 and p.r2 is not None]


def means(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Returns L0 (geometric mean) and R² (mean) over the seeds of each setting, sorted by L0."""
    found = []
    for setting in {setting for setting, _, _ in points}:
        same = [(l0, r2) for s, l0, r2 in points if s == setting]
        log_l0 = math.fsum(math.log(l0) for l0, _ in same) / len(same)
        found.append((math.exp(log_l0), math.fsum(r2 for _, r2 in same) / len(same)))
    return sorted(found)


def round_values(low: float, high: float) -> list[float]:
    """Returns about six round numbers in the range."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#dddddd"/>'
