"""Plots as inline SVG, made on the server: they need no script, no style attribute and no second request.

Places are percentages of the drawing, so that a plot is as wide as its page and its text keeps its size. Lines are
drawn in a nested SVG that is stretched; their width is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

POINTS: Final = 256
"""Points of one line. Longer series are reduced to the largest value of each part."""
SPAN: Final = 1000
"""Units of the stretched drawing, in both directions."""
DECADES: Final = 8.0
"""Largest ratio, as a power of ten, that a logarithmic axis shows."""


@dataclass(frozen=True)
class PlotScale:
    """A vertical axis from `low` to `high`."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """The place of a value between the bottom (0) and the top (1)."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, self.clip(value)))
        return (value - low) / (high - low)

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self) -> list[float]:
        """Three to seven round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first) / 5))
            if last - first >= 2:
                return [10.0**power for power in range(first, last + 1, stride)]
            factors = [f * 10.0**power for power in range(first - 1, last + 1) for f in (1, 2, 5)]
            return [value for value in factors if self.low <= value <= self.high]
        step = round_step((self.high - self.low) / 4)
        begin = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(begin, math.floor(self.high / step + 1e-9) + 1)]


def round_step(step: float) -> float:
    """The next larger step of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def scale_of(values: Sequence[float], zero: bool = False) -> PlotScale:
    """An axis that holds all finite values: logarithmic where the largest is over 20 times the smallest positive
    one. A linear axis begins at 0 with `zero`, else it spans at least a fifth of the largest value, so that noise does
    not fill it."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    positive = [value for value in finite if value > 0]
    low, high = min(finite), max(finite)
    if positive and high > 20 * min(positive):
        return PlotScale(max(min(positive), high / 10**DECADES) * 0.8, high * 1.25, log=True)
    gap = max((high - low) * 0.08, (0.2 * abs(high) - (high - low)) / 2) or 1.0
    return PlotScale(0.0 if zero else low - gap if low < 0 else max(0.0, low - gap), high + gap)


def reduced(values: Sequence[float], points: int = POINTS) -> list[tuple[float, float]]:
    """At most `points` pairs of place (index) and value: the largest finite value of each part, where there is one."""
    size = max(1, math.ceil(len(values) / points))
    pairs = []
    for start in range(0, len(values), size):
        part = [(value, start + n) for n, value in enumerate(values[start : start + size]) if math.isfinite(value)]
        if part:
            value, place = max(part)
            pairs.append((float(place), value))
    return pairs


def line_plot(values: Sequence[float], marked: Sequence[int], title: str) -> Markup:
    """A line over the index of the values. The values at `marked` are points beside the line, not parts of it."""
    points = {place: values[place] for place in marked if place < len(values) and math.isfinite(values[place])}
    rest = [math.nan if place in points else value for place, value in enumerate(values)]
    scale, last = scale_of(values), max(1, len(values) - 1)
    path = " ".join(f"{SPAN * x / last:.1f},{SPAN * (1 - scale.share(y)):.1f}" for x, y in reduced(rest))
    line = Markup('<polyline class="line" points="{}" vector-effect="non-scaling-stroke"/>').format(path)
    marks = Markup("").join(dot(place / last, scale.share(value)) for place, value in points.items())
    return frame(scale, len(values), stretched(line), marks, title)


def stem_plot(values: Sequence[float], limit: float, named: Sequence[int], title: str) -> Markup:
    """One stem per index from the bottom to its value, a dashed line at `limit`, and a labelled point at each of
    `named`."""
    scale, last = scale_of([*values, limit], zero=True), max(1, len(values) - 1)
    stems = " ".join(
        f"M{SPAN * x / last:.1f} {SPAN}V{SPAN * (1 - scale.share(y)):.1f}" for x, y in reduced(values) if y > 0
    )
    path = Markup('<path class="stem" d="{}" vector-effect="non-scaling-stroke"/>').format(stems)
    height = 100 * (1 - scale.share(limit))
    rule = Markup('<line class="limit" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>').format(height)
    marks = Markup("").join(labelled_dot(place, place / last, scale.share(values[place])) for place in named)
    return frame(scale, len(values), stretched(path), rule + marks, title)


def stretched(marks: Markup) -> Markup:
    opening = '<svg class="stretched" viewBox="0 0 {0} {0}" preserveAspectRatio="none" width="100%" height="100%">'
    return Markup(opening).format(SPAN) + marks + Markup("</svg>")


def dot(across: float, up: float) -> Markup:
    return Markup('<circle class="dot" cx="{:.2f}%" cy="{:.2f}%" r="3.5"/>').format(100 * across, 100 * (1 - up))


def labelled_dot(place: int, across: float, up: float) -> Markup:
    """A point with its index beside it, on the side that has the space."""
    anchor, shift = ("end", "-7") if across > 0.5 else ("start", "7")
    text = Markup('<text class="name" x="{:.2f}%" y="{:.2f}%" dx="{}" dy="4" text-anchor="{}">{}</text>')
    return dot(across, up) + text.format(100 * across, 100 * (1 - up), shift, anchor, place)


def frame(scale: PlotScale, count: int, drawing: Markup, marks: Markup, title: str) -> Markup:
    """The drawing with its axes. The horizontal one counts from 0 to `count` - 1."""
    rows = Markup("").join(level(scale.share(value), tick_text(value)) for value in scale.ticks())
    columns = Markup("").join(column(place, count) for place in column_ticks(count))
    opening = '<svg class="plot" role="img" aria-label="{}" width="100%" height="180">'
    return Markup(opening).format(title) + rows + columns + drawing + marks + Markup("</svg>")


def level(up: float, text: str) -> Markup:
    line = Markup('<line class="grid" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>').format(100 * (1 - up))
    label = Markup('<text x="0" y="{:.2f}%" dx="-8" dy="4" text-anchor="end">{}</text>').format(100 * (1 - up), text)
    return line + label


def column(place: int, count: int) -> Markup:
    across = 100 * place / max(1, count - 1)
    anchor = "start" if across == 0 else "end" if across > 97 else "middle"
    text = '<text x="{:.2f}%" y="100%" dy="17" text-anchor="{}">{}</text>'
    return Markup(text).format(across, anchor, f"{place:,}")


def column_ticks(count: int) -> list[int]:
    if count < 2:
        return [0]
    step = max(1, round(round_step((count - 1) / 4)))
    return [*range(0, count, step)]


def tick_text(value: float) -> str:
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.0e}"
