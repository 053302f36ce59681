"""Makes the figures as plotly traces and layouts without colours. `page.js` adds colours for light, dark and print.

The `meta` of a trace names its architecture, and its entry in the legend. An architecture has the same colour and
marker in every report; dashes tell its widths and variants apart. Names pass through `html.escape`, because plotly
reads its texts as HTML.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from shared.saes import ARCHITECTURES
from train.report import wording
from train.report.answer import Series
from train.report.data import Curve
from train.report.frontier import mean_of_seeds
from train.report.sae import FrontierKey, MeasuredSAE

MARKERS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "8px,2px,2px,2px,2px,2px", "10px,2px,2px,2px")
Curves = Sequence[tuple[MeasuredSAE, Curve]]


@dataclass(frozen=True)
class Look:
    """The marker and the dash of a series."""

    symbol: str
    dash: str


Looks = dict[FrontierKey, Look]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
SHARES = [-0.04, 1.08]
"""An axis of shares, with room between 100 % and the frame."""
FAINTEST = 0.4
"""Opacity of a curve with the smallest λ (or k, or L0 target); the largest has 1."""


@dataclass(frozen=True)
class Plot:
    """One set of axes: plotly's JSON, and a title in words."""

    name: str
    title: str
    json: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One or more plots that share a legend and a caption."""

    name: str
    title: str
    plots: tuple[Plot, ...]
    caption: str


def figures(series: Series, curves: Curves, prefix: str) -> list[Figure]:
    """Returns every figure for which there is data. A series has the same marker and dash in all of them."""
    looks = _looks(series)
    saes = [sae for group in series.values() for sae in group]
    signed = {key: group for key, group in series.items() if group[0].signed}
    captions = _captions(saes)

    def against_l0(name: str, shown: Series, field: str, axis: str, title: str) -> Figure:
        plot = _frontier(shown, field, axis, looks, f"{prefix}-{name}-plot")
        return Figure(f"{prefix}-{name}", f"{title} against L0", (plot,), captions[name])

    massive = any(sae.has_massive for sae in saes)
    found = (
        against_l0("r2", series, "r2", "R²", "R²"),
        *((against_l0("rest", series, "r2_rest", "R² rest", "R² without massive tokens"),) if massive else ()),
        against_l0("ce", series, "ce_recovered", "CE recovered (zero)", "CE recovered"),
        against_l0("dead", series, "dead_fraction", "Share of latents dead", "Dead latents"),
        against_l0("poles", signed, "bipolar_fraction", "Share of live latents", "Latents that use both poles"),
        _census(signed, looks, f"{prefix}-census", captions["census"]),
        _training(curves, looks, f"{prefix}-training"),
    )
    return [figure for figure in found if all(plot.json["data"] for plot in figure.plots)]


def _looks(keys: Iterable[FrontierKey]) -> Looks:
    """Returns the look of each series. An architecture's place in the registry decides the marker, whatever else there
    is; its first width begins with the dash of that place."""
    found = {}
    for arch, group in groupby(sorted(keys), key=lambda key: key.arch):
        place = list(ARCHITECTURES).index(arch)
        for rank, key in enumerate(group):
            found[key] = Look(MARKERS[place % len(MARKERS)], DASHES[(place + rank) % len(DASHES)])
    return found


def _captions(saes: Sequence[MeasuredSAE]) -> dict[str, str]:
    """Returns the captions: what a figure shows, and on how many tokens it was measured."""
    rows = wording.tokens((sae.tokens for sae in saes), "held-out tokens")
    ce_rows = wording.tokens(sae.ce_tokens for sae in saes)
    ten, none, whole = (wording.percent(share, 0) for share in (0.1, 0.0, 1.0))
    return {
        "r2": "Up and to the left is better. Each point is one autoencoder; lines join the means over seeds. "
        f"Measured on {rows}.",
        "rest": "The same on ordinary tokens only: those whose norm is at most 5 times the median.",
        "ce": f"The reconstruction replaces the activation in the language model: {whole} is as good as the unchanged "
        f"model, {none} as bad as setting the hookpoint to zero. Measured on the predictions of {ce_rows}.",
        "dead": f"The share of latents that did not fire, with either sign, on any of the {rows}. On fewer tokens, "
        "more latents look dead.",
        "poles": "The share of live latents that fire with both signs: the rarer sign makes up more than "
        f"{ten} of the latent’s firings. Measured on {rows}.",
        "census": "The live latents are divided into ten equal groups, from those that fire most often (1) to those "
        "that fire least (10). The first plot shows the share of each group that uses both poles, the second the share "
        "of the group’s activation mass Σ|f| that those latents carry. Means over seeds; fainter lines have a smaller "
        "λ (or k). A "
        f"latent that fired only a few times looks one-sided. Measured on {rows}.",
    }


def _census(series: Series, looks: Looks, name: str, caption: str) -> Figure:
    share = _deciles(series, "bipolar", "Share using both poles", looks, f"{name}-share")
    mass = _deciles(series, "bipolar_mass", "Share of activation mass", looks, f"{name}-mass")
    return Figure(name, "Both poles, by how often a latent fires", (share, mass), caption)


def _deciles(series: Series, field: str, title: str, looks: Looks, name: str) -> Plot:
    """Plots one line per λ of each series: the mean over its seeds."""
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
    layout = _layout("tenth of live latents, 1 = fires most", title)
    layout.yaxis.update(tickformat=",.0%", range=SHARES)
    layout.xaxis.dtick = 1
    return Plot(name, f"{title}, by tenths of the live latents", go.Figure(traces, layout).to_plotly_json())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _strength(rank: int, count: int) -> float:
    return FAINTEST + (1 - FAINTEST) * rank / count


def _training(curves: Curves, looks: Looks, name: str) -> Figure:
    most = max((curve.tokens[-1] for _, curve in curves if curve.tokens), default=0)
    fvu = _curves(curves, "fvu", "FVU", looks, f"{name}-fvu")
    l0 = _curves(curves, "l0", "L0", looks, f"{name}-l0")
    return Figure(
        name,
        "Training curves",
        (fvu, l0),
        f"FVU is 1 − R². These values were logged on the training batches, over {most:,} tokens; they are not held-out "
        "values. Fainter lines have a smaller λ (or k); seeds look the same. Click an entry of the legend to hide "
        "or show it; Shift-click shows it alone.",
    )


def _frontier(series: Series, field: str, title: str, looks: Looks, name: str) -> Plot:
    """Plots one line and its markers per series."""
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
    if field == "dead_fraction":
        layout.yaxis.rangemode = "tozero"
    if field == "bipolar_fraction":
        layout.yaxis.range = SHARES
    layout.xaxis.update(_log_axis(value for trace in traces for value in trace.x))
    return Plot(name, f"{title} against L0", go.Figure(traces, layout).to_plotly_json())


def _curves(curves: Curves, field: str, title: str, looks: Looks, name: str) -> Plot:
    """Plots one line per autoencoder, fainter for a smaller λ."""
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


def _line(
    x: Sequence[float] | Sequence[int], y: Sequence[float | None], meta: dict[str, str], look: Look
) -> go.Scatter:
    line = {"width": 2, "dash": look.dash}
    return go.Scatter(x=list(x), y=list(y), mode="lines", line=line, meta=meta, hoverinfo="skip", showlegend=False)


def _points(saes: Sequence[MeasuredSAE], field: str, meta: dict[str, str], look: Look) -> go.Scatter:
    return go.Scatter(
        x=[sae.l0 for sae in saes],
        y=[getattr(sae, field) for sae in saes],
        mode="markers",
        marker={"size": 9, "symbol": look.symbol, "line": {"width": 1}},
        text=[_hover(sae) for sae in saes],
        hovertemplate="%{text}<extra></extra>",
        meta=meta,
        showlegend=False,
    )


def _hover(sae: MeasuredSAE) -> str:
    """Returns the hover text with every number of one autoencoder."""
    zero, mean = wording.percent(sae.ce_recovered, 2), wording.percent(sae.ce_recovered_mean, 2)
    lines = [
        _head(sae),
        f"R² {wording.fixed(sae.r2, 4)}" + (f" (rest {wording.fixed(sae.r2_rest, 4)})" if sae.has_massive else ""),
        f"L0 {wording.l0(sae.l0)} (L0+ {wording.l0(sae.l0_pos)}, L0− {wording.l0(sae.l0_neg)})",
        f"dead {wording.percent(sae.dead_fraction)}, both poles {wording.percent(sae.bipolar_fraction)}, "
        f"by energy {wording.percent(sae.bipolar_energy)}, "
        f"rescaling {wording.fixed(sae.rescaling, 3)}",
        f"CE spliced {wording.fixed(sae.ce_spliced, 4)}",
        f"CE recovered {zero} (zero), {mean} (mean)",
        f"{wording.count(sae.tokens)} tokens, CE on {wording.count(sae.ce_tokens)}",
        escape(sae.name),
    ]
    return "<br>".join(lines)


def _head(sae: MeasuredSAE) -> str:
    seed = "" if sae.seed is None else f", seed {sae.seed}"
    return f"<b>{escape(wording.label(sae.key))}</b>, {wording.knob(sae.knob)}{seed}"


def _curve_hover(sae: MeasuredSAE, title: str) -> str:
    return f"{_head(sae)}<br>{title} %{{y:.4~g}} at %{{x:,}} tokens<extra></extra>"


def _log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """Returns a log axis with a margin, and with so many ticks that plotly labels 1, 2, 5, 10 instead of every
    digit."""
    logs = [math.log10(value) for value in values if value is not None and value > 0] or [0.0]
    low, high = min(logs), max(logs)
    margin = max(0.05 * (high - low), 0.04)
    decades = high - low + 2 * margin
    ticks = 5 if decades < 1 else max(3, math.ceil(decades / 0.65))
    return {"type": "log", "range": [low - margin, high + margin], "nticks": ticks, "minorloglabels": "complete"}


def _layout(x: str, y: str) -> go.Layout:
    """Returns a transparent layout without a legend, with margins for the labels only."""
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
