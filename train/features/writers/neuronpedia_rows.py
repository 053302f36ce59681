"""Rows of Neuronpedia's tables, as its bulk import and SAEDashboard's converter name their fields.

Field names and order were taken from the dataclasses of sae_dashboard/neuronpedia/neuronpedia_export.py
(SAEDashboard 0.8.0) and compared with Neuronpedia's database schema (commit ebb8426f).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from train.features.poles import BINS, edges
from train.features.readers.folder import WrittenExample, WrittenPole
from train.features.readers.texts import TokenTexts

Row = dict[str, Any]
BARS: Final = 50
"""Bars of a histogram."""
LOGITS: Final = 10
"""Tokens listed for each end of the logit lens."""
DIGITS: Final = 4
"""Significant digits of a float16 value."""
BOTTOM: Final = "bottom"
"""`dataSource` of an activation whose most negative value counts: Neuronpedia draws it red."""
TOP_BIN: Final = -1.0
"""`binMin` and `binContains` of the strongest activations."""
EMPTY_LISTS: Final = (
    "vector neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices "
    "correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices correlated_features_pearson "
    "correlated_features_l1 logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist"
).split()
"""Lists of a feature that `sagsae features` has nothing for."""


@dataclass(frozen=True)
class NeuronpediaSource:
    """What all rows of one export have in common."""

    model: str
    layer: int
    set_name: str
    creator: str
    creator_id: str
    hook: str
    created: str
    """ISO 8601."""
    d_sae: int
    rows: int
    scale: float

    @property
    def id(self) -> str:
        """The source's id, which Neuronpedia calls the layer of a feature."""
        return f"{self.layer}-{self.set_name}"


@dataclass(frozen=True)
class ExportedFeature:
    """One feature of an export: a latent with both poles, or one pole as a latent of its own."""

    index: int
    poles: Sequence[WrittenPole]
    examples: Sequence[WrittenExample]
    opposite: WrittenPole | None
    """The pole whose logit lens is this feature's negative end, where there is one."""
    split: bool
    """Whether the values are those of one pole, without its sign."""


def features_of(
    poles: Sequence[WrittenPole], examples: Sequence[WrittenExample], d_sae: int, split: bool
) -> list[ExportedFeature]:
    """The features of some latents. `split`: pole + of latent i is feature i, and pole - is feature i + d_sae."""
    by_latent: dict[int, list[WrittenPole]] = {}
    for pole in poles:
        by_latent.setdefault(pole.latent, []).append(pole)
    examples_of: dict[tuple[int, int], list[WrittenExample]] = {}
    for each in examples:
        examples_of.setdefault((each.latent, each.sign), []).append(each)
    found = []
    for latent, some in by_latent.items():
        sides = sorted(some, key=lambda pole: -pole.sign)
        below = next((pole for pole in sides if pole.sign < 0), None)
        of = {pole.sign: examples_of.get((latent, pole.sign), []) for pole in sides}
        if not split:
            every = [each for pole in sides for each in of[pole.sign]]
            found.append(ExportedFeature(latent, sides, every, below, split=False))
            continue
        for pole in sides:
            opposite = next((other for other in sides if other is not pole), None)
            index = latent if pole.sign > 0 else latent + d_sae
            found.append(ExportedFeature(index, [pole], of[pole.sign], opposite, split=True))
    return found


def feature_row(source: NeuronpediaSource, feature: ExportedFeature, texts: TokenTexts) -> Row:
    """A row of the table `Neuron`."""
    heights, values = histogram(feature, source.scale)
    up, down = lens_of(feature.poles[0], texts), lens_of(feature.opposite, texts)
    near = neighbours_of(feature, source.d_sae)
    largest = max((pole.max for pole in feature.poles if feature.split or pole.sign > 0), default=0.0)
    return {
        "modelId": source.model, "layer": source.id, "index": str(feature.index), "creatorId": source.creator_id,
        "createdAt": source.created, "maxActApprox": rounded(largest), "hasVector": False, "vectorLabel": None,
        "vectorDefaultSteerStrength": 10, "hookName": source.hook,
        "topkCosSimIndices": [index for index, _ in near], "topkCosSimValues": [rounded(cosine) for _, cosine in near],
        "neg_str": [token for token, _ in down], "neg_values": [-logit for _, logit in down],
        "pos_str": [token for token, _ in up], "pos_values": [logit for _, logit in up],
        "frac_nonzero": sum(pole.firings for pole in feature.poles) / source.rows,
        "freq_hist_data_bar_heights": heights, "freq_hist_data_bar_values": values,
        "sourceSetName": source.set_name, **{name: [] for name in EMPTY_LISTS},
    }  # fmt: skip


def lens_of(pole: WrittenPole | None, texts: TokenTexts) -> list[tuple[str, float]]:
    """The tokens that a pole raises most, with their logits."""
    lens = (pole.lens if pole is not None else None) or []
    return [(texts.piece(int(each["token"])), rounded(each["logit"])) for each in list(lens)[:LOGITS]]


def neighbours_of(feature: ExportedFeature, d_sae: int) -> list[tuple[int, float]]:
    """The features whose directions are most alike, with their cosines."""
    pole = feature.poles[0]
    near = [(int(each["latent"]), float(each["cosine"])) for each in pole.near]
    if not feature.split:
        return near
    below = [(int(each["latent"]) + d_sae, -float(each["cosine"])) for each in pole.far]
    return sorted([*near, *below], key=lambda each: -each[1])[: len(near)]


def histogram(feature: ExportedFeature, scale: float) -> tuple[list[float], list[float]]:
    """Heights and middles of BARS bars of equal width over all firings. The firings of a bin of latents.parquet, whose
    widths grow, are spread evenly over it."""
    signs = [1 if feature.split else pole.sign for pole in feature.poles]
    ends = [sign * pole.max for sign, pole in zip(signs, feature.poles, strict=True)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    if not high > low:
        return [], []
    bars = np.linspace(low, high, BARS + 1)
    heights = np.zeros(BARS)
    for sign, pole in zip(signs, feature.poles, strict=True):
        heights += spread(np.asarray(pole.hist, np.float64), scale, pole.max, bars * sign)
    return [round(float(height), 2) for height in heights], [rounded(at) for at in (bars[:-1] + bars[1:]) / 2]


def spread(hist: NDArray[np.float64], scale: float, largest: float, bars: NDArray[np.float64]) -> NDArray[np.float64]:
    """The firings of one pole in each bar. `bars`: edges, as magnitudes of this pole, rising or falling."""
    if len(hist) != BINS or not hist.any():
        return np.zeros(len(bars) - 1)
    places = np.minimum(edges(scale), largest)
    places[0] = 0.0  # the first bin also counts what is below it, the last used one what is above it
    used = int(np.flatnonzero(hist)[-1])
    places[used + 1 :] = max(largest, places[used])
    total = np.concatenate([[0.0], np.cumsum(hist)])
    reached: NDArray[np.float64] = np.abs(np.diff(np.interp(bars, places[: used + 2], total[: used + 2])))
    return reached


def activation_rows(source: NeuronpediaSource, feature: ExportedFeature, texts: TokenTexts) -> list[Row]:
    """Rows of the table `Activation`, one per example."""
    drawn: dict[int, list[int]] = {pole.sign: [0] * 5 for pole in feature.poles}
    for each in feature.examples:
        drawn[each.sign][each.group] += 1
    largest = {pole.sign: pole.max for pole in feature.poles}
    return [
        activation_row(source, feature, each, largest[each.sign], drawn[each.sign], texts) for each in feature.examples
    ]


def activation_row(
    source: NeuronpediaSource,
    feature: ExportedFeature,
    example: WrittenExample,
    largest: float,
    drawn: Sequence[int],
    texts: TokenTexts,
) -> Row:
    """`largest`: the pole's largest magnitude. `drawn`: how many of its examples each group has."""
    if feature.split:
        values = [rounded(max(0.0, value * example.sign)) for value in example.values]
    else:
        values = [rounded(value) for value in example.values]
    bottom = not feature.split and example.sign < 0
    return {
        "id": identifier(source, example), "tokens": [texts.piece(token) for token in example.tokens],
        "index": str(feature.index), "layer": source.id, "modelId": source.model, "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)), "minValue": min(values), "values": values,
        "creatorId": source.creator_id, "dataSource": BOTTOM if bottom else None, "dataIndex": None, "dfaValues": [],
        "dfaTargetIndex": None, "dfaMaxValue": None, "createdAt": source.created, "lossValues": [],
        "logitContributions": None, **bin_of(example, largest, drawn, bottom), "qualifyingTokenIndex": example.peak,
        "zIndices": None, "zValues": None,
    }  # fmt: skip


def bin_of(example: WrittenExample, largest: float, drawn: Sequence[int], bottom: bool) -> dict[str, float | None]:
    """The range of values that an example was drawn from, and the share of the pole's firings in it. Activations at the
    bottom have none: Neuronpedia compares a range with the maximum of a window."""
    if bottom:
        return {"binMin": None, "binMax": None, "binContains": None}
    if example.group == 0:
        return {"binMin": TOP_BIN, "binMax": rounded(largest), "binContains": TOP_BIN}
    low, high = (rounded(largest * band / 4) for band in (example.group - 1, example.group))
    return {"binMin": low, "binMax": high, "binContains": rounded(drawn[example.group] / sum(drawn[1:]))}


def identifier(source: NeuronpediaSource, example: WrittenExample) -> str:
    """A name for an activation, in the form that Neuronpedia gives: the same for the same example."""
    words = (source.model, source.id, example.latent, example.sign, example.group, example.rank)
    return "c" + hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=12).hexdigest()


def rounded(value: float) -> float:
    """A float with as many digits as the files have."""
    return float(f"{value:.{DIGITS}g}")


Table = Literal["release", "model", "sourceset", "source"]


def metadata_rows(source: NeuronpediaSource, title: str, windows: int) -> dict[Table, Row]:
    """The rows that say what the features are of. `windows`: tokens of a window."""
    common: Row = {"creatorId": source.creator_id, "createdAt": source.created}
    release = source.set_name
    return {
        "release": {
            "name": release, "description": title, "creatorName": source.creator, **common, "visibility": "PUBLIC",
            "isNewUi": False, "featured": False, "descriptionShort": title, "urls": [], "creatorEmail": None,
            "creatorNameShort": source.creator, "defaultSourceSetName": source.set_name, "defaultSourceId": source.id,
            "defaultUmapSourceIds": [],
        },
        "model": {
            "id": source.model, "instruct": False, **common, "displayNameShort": source.model,
            "displayName": source.model, "tlensId": None, "dimension": None, "visibility": "PUBLIC",
            "defaultSourceSetName": None, "defaultSourceId": None, "inferenceEnabled": False, "layers": 0,
            "neuronsPerLayer": 0, "owner": "", "updatedAt": source.created, "website": None,
        },
        "sourceset": {
            "modelId": source.model, "name": source.set_name, **common, "hasDashboards": True, "visibility": "PUBLIC",
            "description": title, "type": "", "creatorName": source.creator, "urls": [], "creatorEmail": None,
            "releaseName": release, "defaultOfModelId": None, "defaultRange": 1, "defaultShowBreaks": True,
            "showDfa": False, "showCorrelated": False, "showHeadAttribution": False, "showUmap": False,
        },
        "source": {
            "id": source.id, "modelId": source.model, "setName": source.set_name, **common, "hasDashboards": True,
            "inferenceEnabled": False, "inferenceHosts": [], "saelensConfig": None, "saelensRelease": None,
            "saelensSaeId": None, "hfRepoId": None, "hfFolderId": None, "visibility": "PUBLIC",
            "defaultOfModelId": None, "hasUmap": False, "hasUmapLogSparsity": False, "hasUmapClusters": False,
            "num_prompts": None, "num_tokens_in_prompt": windows, "dataset": None, "notes": None,
        },
    }  # fmt: skip
