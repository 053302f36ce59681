"""Neuronpedia's files: what each field must hold, from SAEDashboard's dataclasses and Neuronpedia's database schema."""

import gzip
import json
from pathlib import Path
from typing import Any, Final

TEXT: Final = {"type": "string"}
SOME_TEXT: Final = {"type": "string", "minLength": 1}
NUMBER: Final = {"type": "number"}
WHOLE: Final = {"type": "integer"}
SWITCH: Final = {"type": "boolean"}
TEXTS: Final = {"type": "array", "items": TEXT}
NUMBERS: Final = {"type": "array", "items": NUMBER}
WHOLES: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}}
TIME: Final = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"}
PUBLIC: Final = {"enum": ["PUBLIC", "PRIVATE", "UNLISTED"]}


def maybe(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


FIELDS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "activations": {
        "id": {"type": "string", "pattern": "^c[0-9a-z]{24}$"}, "tokens": {**TEXTS, "minItems": 1, "maxItems": 1024},
        "index": {"type": "string", "pattern": r"^\d+$"}, "layer": SOME_TEXT, "modelId": SOME_TEXT, "maxValue": NUMBER,
        "maxValueTokenIndex": {**WHOLE, "minimum": 0}, "minValue": NUMBER, "values": NUMBERS, "creatorId": SOME_TEXT,
        "dataSource": {"enum": [None, "bottom"]}, "dataIndex": maybe(TEXT), "dfaValues": NUMBERS,
        "dfaTargetIndex": maybe(WHOLE), "dfaMaxValue": maybe(NUMBER), "createdAt": TIME, "lossValues": NUMBERS,
        "logitContributions": maybe(TEXT), "binMin": maybe(NUMBER), "binMax": maybe(NUMBER),
        "binContains": maybe(NUMBER), "qualifyingTokenIndex": maybe(WHOLE), "zIndices": {"type": "null"},
        "zValues": {"type": "null"},
    },
    "features": {
        "modelId": SOME_TEXT, "layer": SOME_TEXT, "index": {"type": "string", "pattern": r"^\d+$"},
        "creatorId": SOME_TEXT, "createdAt": TIME, "maxActApprox": NUMBER, "hasVector": SWITCH, "vector": NUMBERS,
        "vectorLabel": maybe(TEXT), "vectorDefaultSteerStrength": NUMBER, "hookName": maybe(TEXT),
        "topkCosSimIndices": WHOLES, "topkCosSimValues": NUMBERS, "neuron_alignment_indices": WHOLES,
        "neuron_alignment_values": NUMBERS, "neuron_alignment_l1": NUMBERS, "correlated_neurons_indices": WHOLES,
        "correlated_neurons_pearson": NUMBERS, "correlated_neurons_l1": NUMBERS, "correlated_features_indices": WHOLES,
        "correlated_features_pearson": NUMBERS, "correlated_features_l1": NUMBERS, "neg_str": TEXTS,
        "neg_values": NUMBERS, "pos_str": TEXTS, "pos_values": NUMBERS,
        "frac_nonzero": {"type": "number", "minimum": 0, "maximum": 1}, "freq_hist_data_bar_heights": NUMBERS,
        "freq_hist_data_bar_values": NUMBERS, "logits_hist_data_bar_heights": NUMBERS,
        "logits_hist_data_bar_values": NUMBERS, "decoder_weights_dist": NUMBERS, "sourceSetName": maybe(TEXT),
    },
    "model": {
        "id": SOME_TEXT, "instruct": SWITCH, "creatorId": SOME_TEXT, "displayNameShort": TEXT, "displayName": TEXT,
        "tlensId": maybe(TEXT), "dimension": maybe(WHOLE), "visibility": PUBLIC, "defaultSourceSetName": maybe(TEXT),
        "defaultSourceId": maybe(TEXT), "inferenceEnabled": SWITCH, "layers": WHOLE, "neuronsPerLayer": WHOLE,
        "createdAt": TIME, "owner": TEXT, "updatedAt": TIME, "website": maybe(TEXT),
    },
    "source": {
        "id": {"type": "string", "pattern": r"^\d+-."}, "modelId": SOME_TEXT, "setName": SOME_TEXT,
        "creatorId": SOME_TEXT, "hasDashboards": SWITCH, "inferenceEnabled": SWITCH,
        "inferenceHosts": {"type": "array", "maxItems": 0}, "saelensConfig": {"type": "null"},
        "saelensRelease": maybe(TEXT), "saelensSaeId": maybe(TEXT), "hfRepoId": maybe(TEXT), "hfFolderId": maybe(TEXT),
        "visibility": PUBLIC, "defaultOfModelId": maybe(TEXT), "hasUmap": SWITCH, "hasUmapLogSparsity": SWITCH,
        "hasUmapClusters": SWITCH, "num_prompts": maybe(WHOLE), "num_tokens_in_prompt": maybe(WHOLE),
        "dataset": maybe(TEXT), "notes": maybe(TEXT), "createdAt": TIME,
    },
    "release": {
        "name": SOME_TEXT, "description": SOME_TEXT, "creatorName": SOME_TEXT, "creatorId": SOME_TEXT,
        "visibility": PUBLIC, "isNewUi": SWITCH, "featured": SWITCH, "descriptionShort": maybe(TEXT), "urls": TEXTS,
        "creatorEmail": maybe(TEXT), "creatorNameShort": maybe(TEXT), "defaultSourceSetName": maybe(TEXT),
        "defaultSourceId": maybe(TEXT), "defaultUmapSourceIds": TEXTS, "createdAt": TIME,
    },
    "sourceset": {
        "modelId": SOME_TEXT, "name": SOME_TEXT, "creatorId": SOME_TEXT, "hasDashboards": SWITCH, "visibility": PUBLIC,
        "description": TEXT, "type": TEXT, "creatorName": SOME_TEXT, "urls": TEXTS, "creatorEmail": maybe(TEXT),
        "releaseName": SOME_TEXT, "defaultOfModelId": maybe(TEXT), "defaultRange": WHOLE, "defaultShowBreaks": SWITCH,
        "showDfa": SWITCH, "showCorrelated": SWITCH, "showHeadAttribution": SWITCH, "showUmap": SWITCH,
        "createdAt": TIME,
    },
}  # fmt: skip


def schema_of(table: str) -> dict[str, Any]:
    fields = FIELDS[table]
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .jsonl.gz file."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def batches(folder: Path, table: str) -> list[dict[str, Any]]:
    files = sorted((folder / table).glob("batch-*.jsonl.gz"))
    return [row for file in files for row in rows_in(file)]


def as_saedashboard_batch(folder: Path) -> dict[str, Any]:
    """The first batch as SAEDashboard itself would have written it before its conversion."""
    features = rows_in(folder / "features" / "batch-0.jsonl.gz")
    activations = rows_in(folder / "activations" / "batch-0.jsonl.gz")
    kept = [name for name in FIELDS["features"] if name.islower() and name not in ("layer", "index", "vector")]
    names = {"bin_min": "binMin", "bin_max": "binMax", "bin_contains": "binContains", "tokens": "tokens",
             "values": "values", "qualifying_token_index": "qualifyingTokenIndex"}  # fmt: skip
    return {
        "features": [
            {
                "feature_index": feature["index"],
                **{name: feature[name] for name in kept},
                "activations": [
                    {ours: row[theirs] for ours, theirs in names.items()}
                    for row in activations
                    if row["index"] == feature["index"]
                ],
            }
            for feature in features
        ]
    }
