"""The figures, as plotly traces and layouts without colours: `page.js` paints them, in light, dark and on paper.

A trace says in its `meta` which architecture's colour it takes and which entry of the legend switches it. Width is told
by marker and dash besides, so that nothing hangs on colour alone. Names pass through `html.escape`, for plotly reads
its texts as HTML.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from train.report import wording
from train.report.answer import Series
from train.report.data import Curve
from train.report.frontier import mean_of_seeds
from train.report.sae import FrontierKey, MeasuredSAE

MARKERS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
Curves = Sequence[tuple[MeasuredSAE, Curve]]
Looks = dict[FrontierKey, int]
"""Which marker and dash a series has: alike for equal widths (and other settings) of all architectures."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
FAINTEST = 0.4
"""Opacity of a curve with the smallest λ (or k, or L0 target); the largest has 1."""


@dataclass(frozen=True)
class Plot:
    """One set of axes: plotly's JSON, and what it shows in words."""

    name: str
    title: str
    json: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One or more plots with a common legend and caption."""

    name: str
    title: str
    plots: tuple[Plot, ...]
    caption: str


def figures(series: Series, curves: Curves, prefix: str) -> list[Figure]:
    """Every figure there is data for. A series has the same marker and dash in all of them."""
    kinds = sorted({key[1:] for key in series})
    looks = {key: kinds.index(key[1:]) for key in series}
    saes = [sae for group in series.values() for sae in group]
    signed = {key: group for key, group in series.items() if group[0].signed}
    captions = _captions(saes)

    def against_l0(name: str, of: Series, field: str, axis: str, title: str) -> Figure:
        plot = _frontier(of, field, axis, looks, f"{prefix}-{name}-plot")
        return Figure(f"{prefix}-{name}", f"{title} against L0", (plot,), captions[name])

    massive = any(sae.has_massive for sae in saes)
    found = (
        against_l0("r2", series, "r2", "R²", "R²"),
        *((against_l0("rest", series, "r2_rest", "R² on the rest", "R² without massive tokens"),) if massive else ()),
        against_l0("ce", series, "ce_recovered", "CE loss recovered", "CE loss recovered"),
        against_l0("dead", series, "dead_fraction", "Share of latents dead", "Dead latents"),
        against_l0("poles", signed, "bipolar_fraction", "Share of live latents", "Latents that use both poles"),
        _census(signed, looks, f"{prefix}-census", captions["census"]),
        _training(curves, looks, f"{prefix}-training"),
    )
    return [figure for figure in found if all(plot.json["data"] for plot in figure.plots)]


def _captions(saes: Sequence[MeasuredSAE]) -> dict[str, str]:
    """What to look for, and on how many tokens it was measured."""
    rows = wording.tokens((sae.tokens for sae in saes), "held-out tokens")
    ce_rows = wording.tokens(sae.ce_tokens for sae in saes)
    ten, none, whole = (wording.percent(share, 0) for share in (0.1, 0.0, 1.0))
    return {
        "r2": "Up and to the left is better. A point is one autoencoder, a line joins the means over seeds. "
        f"Measured on {rows}.",
        "rest": "Only tokens whose norm is at most 5 times the median: what the autoencoder makes of ordinary tokens.",
        "ce": f"The reconstruction is spliced into the model: {whole} is the clean model, {none} the hookpoint set to "
        f"zero. Measured on the predictions of {ce_rows}.",
        "dead": f"Dead: did not fire, with either sign, on any of the {rows}. Fewer tokens make more look dead.",
        "poles": f"Of the live latents, those whose rarer sign makes up more than {ten} of their firings. "
        f"Measured on {rows}.",
        "census": "Live latents in ten equal groups, from those that fire most to those that fire least: which share "
        "of a group uses both poles, and which share of its activation mass Σ|f| those carry. Means over seeds; a "
        f"stronger line is a larger λ (or k). A latent seen a few times only looks one-sided. Measured on {rows}.",
    }


def _census(series: Series, looks: Looks, name: str, caption: str) -> Figure:
    share = _deciles(series, "bipolar", "Share that uses both poles", looks, f"{name}-share")
    mass = _deciles(series, "bipolar_mass", "Share of mass in these", looks, f"{name}-mass")
    return Figure(name, "Both poles, by how often a latent fires", (share, mass), caption)


def _deciles(series: Series, field: str, title: str, looks: Looks, name: str) -> Plot:
    """One line for each λ of each series, the mean over its seeds."""
    traces = []
    for key, saes in series.items():
        knobs = sorted({sae.knob for sae in saes})
        for rank, knob in enumerate(knobs, 1):
            counted = [getattr(sae.census.deciles, field) for sae in saes if sae.knob == knob and sae.census]
            means = [_mean(shares) for shares in zip(*counted, strict=True)]
            if any(mean is not None for mean in means):
                entry = wording.knob(knob)
                trace = _line(list(range(1, len(means) + 1)), means, _meta(key, entry), looks[key])
                trace.opacity, trace.line.width = _strength(rank, len(knobs)), 1.5
                head = f"<b>{escape(wording.label(key))}</b>, {entry}"
                trace.hoverinfo, trace.hovertemplate = None, f"{head}<br>group %{{x}}: %{{y:.1%}}<extra></extra>"
                traces.append(trace)
    layout = _layout("tenth of the live latents, busiest first", title)
    layout.yaxis.update(tickformat=",.0%", range=[-0.03, 1.03])
    layout.xaxis.dtick = 1
    return Plot(name, f"{title}, by tenths of the live latents", go.Figure(traces, layout).to_plotly_json())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _strength(rank: int, of: int) -> float:
    return FAINTEST + (1 - FAINTEST) * rank / of


def _training(curves: Curves, looks: Looks, name: str) -> Figure:
    most = max((curve.tokens[-1] for _, curve in curves if curve.tokens), default=0)
    fvu = _curves(curves, "fvu", "FVU", looks, f"{name}-fvu")
    l0 = _curves(curves, "l0", "L0", looks, f"{name}-l0")
    return Figure(
        name,
        "Training curves",
        (fvu, l0),
        f"FVU is 1 − R². Logged on the training batches themselves, over {most:,} tokens, so these are not held-out "
        "values. A stronger line is a larger λ (or k); seeds look alike. Choose an entry to hide or show it, with "
        "Shift to see it alone.",
    )


def _frontier(series: Series, field: str, title: str, looks: Looks, name: str) -> Plot:
    """One line and its markers for each series."""
    traces = []
    for key, saes in series.items():
        shown = [sae for sae in saes if sae.l0 and getattr(sae, field) is not None]
        if shown:
            means = mean_of_seeds(shown, field)
            look, meta = looks[key], _meta(key, "")
            traces.append(_line([p.l0 for p in means], [p.value for p in means], meta, look))
            traces.append(_points(shown, field, meta, look))
    layout = _layout("L0, mean non-zero latents per token", title)
    layout.yaxis.tickformat = ",.3~f" if field.startswith("r2") else ",.2~%"
    if field in ("dead_fraction", "bipolar_fraction"):
        layout.yaxis.rangemode = "tozero"
    layout.xaxis.update(_log_axis(value for trace in traces for value in trace.x))
    return Plot(name, f"{title} against L0", go.Figure(traces, layout).to_plotly_json())


def _curves(curves: Curves, field: str, title: str, looks: Looks, name: str) -> Plot:
    """One line for each autoencoder, fainter for a smaller λ."""
    traces = []
    for key, group in groupby(curves, key=lambda pair: pair[0].key):
        pairs = list(group)
        order = sorted({sae.knob for sae, _ in pairs})
        for sae, curve in pairs:
            meta = _meta(key, wording.knob(sae.knob))
            trace = _line(curve.tokens, getattr(curve, field), meta, looks[key])
            trace.opacity, trace.line.width = _strength(order.index(sae.knob) + 1, len(order)), 1.5
            trace.hoverinfo, trace.hovertemplate = None, _curve_hover(sae, title)
            traces.append(trace)
    layout = _layout("training tokens", title)
    layout.yaxis.update(_log_axis(value for trace in traces for value in trace.y))
    layout.xaxis.tickformat = "~s"
    layout.xaxis.rangemode = "tozero"
    return Plot(name, f"{title} against training tokens", go.Figure(traces, layout).to_plotly_json())


def _meta(key: FrontierKey, entry: str) -> dict[str, str]:
    return {"arch": key.arch, "group": wording.label(key), "entry": entry}


def _line(x: Sequence[float] | Sequence[int], y: Sequence[float | None], meta: dict[str, str], look: int) -> go.Scatter:
    line = {"width": 2, "dash": DASHES[look % len(DASHES)]}
    return go.Scatter(x=list(x), y=list(y), mode="lines", line=line, meta=meta, hoverinfo="skip", showlegend=False)


def _points(saes: Sequence[MeasuredSAE], field: str, meta: dict[str, str], look: int) -> go.Scatter:
    return go.Scatter(
        x=[sae.l0 for sae in saes],
        y=[getattr(sae, field) for sae in saes],
        mode="markers",
        marker={"size": 9, "symbol": MARKERS[look % len(MARKERS)], "line": {"width": 1}},
        text=[_hover(sae) for sae in saes],
        hovertemplate="%{text}<extra></extra>",
        meta=meta,
        showlegend=False,
    )


def _hover(sae: MeasuredSAE) -> str:
    """Every number of one autoencoder."""
    zero, mean = wording.percent(sae.ce_recovered, 2), wording.percent(sae.ce_recovered_mean, 2)
    lines = [
        _head(sae),
        f"R² {wording.fixed(sae.r2, 4)}" + (f" (rest {wording.fixed(sae.r2_rest, 4)})" if sae.has_massive else ""),
        f"L0 {wording.l0(sae.l0)} (L0+ {wording.l0(sae.l0_pos)}, L0− {wording.l0(sae.l0_neg)})",
        f"dead {wording.percent(sae.dead_fraction)}, both poles {wording.percent(sae.bipolar_fraction)}, "
        f"rescaling {wording.fixed(sae.rescaling, 3)}",
        f"CE spliced {wording.fixed(sae.ce_spliced, 4)}",
        f"CE recovered {zero} (zero), {mean} (mean)",
        f"{wording.count(sae.tokens)} tokens, CE on {wording.count(sae.ce_tokens)}",
        escape(sae.name),
    ]
    return "<br>".join(lines)


def _head(sae: MeasuredSAE) -> str:
    return f"<b>{escape(wording.label(sae.key))}</b>, {wording.knob(sae.knob)}, seed {sae.seed}"


def _curve_hover(sae: MeasuredSAE, title: str) -> str:
    return f"{_head(sae)}<br>{title} %{{y:.4~g}} at %{{x:,}} tokens<extra></extra>"


def _log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """A range with some air, and as many ticks as make plotly label 1, 2, 5, 10 rather than every digit."""
    logs = [math.log10(value) for value in values if value is not None and value > 0] or [0.0]
    low, high = min(logs), max(logs)
    air = max(0.05 * (high - low), 0.04)
    decades = high - low + 2 * air
    ticks = 5 if decades < 1 else max(3, math.ceil(decades / 0.65))
    return {"type": "log", "range": [low - air, high + air], "nticks": ticks, "minorloglabels": "complete"}


def _layout(x: str, y: str) -> go.Layout:
    """Transparent, without legend and with room for the labels only."""
    axis = {"zeroline": False, "showline": False}
    return go.Layout(
        template=go.layout.Template(),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 62, "r": 14, "t": 10, "b": 44},
        font={"family": FONT, "size": 12},
        xaxis={**axis, "title": {"text": x, "standoff": 8}},
        yaxis={**axis, "title": {"text": y, "standoff": 8}},
        hovermode="closest",
        hoverlabel={"align": "left", "font": {"family": FONT}},
        showlegend=False,
    )
