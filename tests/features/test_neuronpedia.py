"""The export for Neuronpedia: every row fits its schema, and holds what the Parquet files hold."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from support.exact.runs import all_latents, make_run, make_sae, make_store
from support.explain.neuronpedia import as_saedashboard_batch, batches, rows_in, schema_of
from support.explain.runs import NamedRun, make_named_run
from transformers import AutoTokenizer

from harvest.run import harvest
from shared.config import TrainConfig
from shared.errors import DamagedError, UserError
from shared.saes import sae_config
from shared.schema import build
from shared.schemas.features import FeaturesConfig
from train.features.run import features
from train.features.writers.neuronpedia import NeuronpediaExport, export_features
from train.run import train
from train.runs.folder import read_sealed, write_sealed

WIDTH = 16


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> NamedRun:
    return make_named_run(tmp_path_factory.mktemp("neuronpedia"), 4_000, d_sae=WIDTH)


def export(named: NamedRun, out: Path, **changes: Any) -> NeuronpediaExport:
    known = {"run": named.run, "export": "neuronpedia", "creator": "a maker", "out": out}
    return export_features(FeaturesConfig(**{**known, **changes}))


def parquet(named: NamedRun, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(named.features / name).to_pylist()
    return found


@pytest.mark.parametrize("split", [False, True])
def test_every_row_fits_its_schema(split: bool, named: NamedRun, tmp_path: Path) -> None:
    done = export(named, tmp_path, split=split)
    assert done.folder == tmp_path / "made" / done.source
    assert done.source == "0-mlp-sa-gsae-16" + "-split" * split
    for table in ("release", "model", "sourceset", "source"):
        (row,) = rows_in(done.folder / f"{table}.jsonl")
        jsonschema.validate(row, schema_of(table))
    for table, count in (("features", done.features), ("activations", done.activations)):
        rows = batches(done.folder, table)
        assert len(rows) == count > 0
        for row in rows:
            jsonschema.validate(row, schema_of(table))
    known = {row["index"] for row in batches(done.folder, "features")}
    assert known == {str(index) for index in range(WIDTH * (1 + split))}
    ids = [row["id"] for row in batches(done.folder, "activations")]
    assert len(set(ids)) == len(ids)


def test_one_feature_has_both_poles(named: NamedRun, tmp_path: Path) -> None:
    done = export(named, tmp_path)
    examples, rows = parquet(named, "examples.parquet"), batches(done.folder, "activations")
    assert len(rows) == len(examples)
    for example, row in zip(examples, rows, strict=True):
        assert row["index"] == str(example["latent"])
        assert row["tokens"] == [f" w{token}" for token in example["tokens"]]
        assert row["values"] == pytest.approx(example["values"], rel=1e-3)
        assert (row["minValue"], row["maxValue"]) == (min(row["values"]), max(row["values"]))
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"]
        assert row["values"][row["qualifyingTokenIndex"]] == pytest.approx(example["value"], rel=1e-3)
        assert row["dataSource"] == (None if example["sign"] > 0 else "bottom")
        assert (row["binMin"] is None) == (example["sign"] < 0)
    both = {row["index"] for row in rows if row["dataSource"]} & {row["index"] for row in rows if not row["dataSource"]}
    assert len(both) > WIDTH // 2
    truth = named.truth
    for latent, row in enumerate(batches(done.folder, "features")):
        f = truth.f[:, latent]
        assert row["frac_nonzero"] == pytest.approx((f != 0).sum() / truth.counts.sum())
        assert row["maxActApprox"] == pytest.approx(max(f.max(), 0.0), rel=1e-3)
        check_histogram(row, f[f != 0])


def test_split_features_are_the_poles(named: NamedRun, tmp_path: Path) -> None:
    done = export(named, tmp_path, split=True)
    examples = parquet(named, "examples.parquet")
    rows = {row["id"]: row for row in batches(done.folder, "activations")}
    assert len(rows) == len(examples)
    assert all(min(row["values"]) >= 0 and row["dataSource"] is None for row in rows.values())
    counted = {str(index): 0 for index in range(2 * WIDTH)}
    for row in rows.values():
        counted[row["index"]] += 1
    for pole in parquet(named, "latents.parquet"):
        index = pole["latent"] + (WIDTH if pole["sign"] < 0 else 0)
        own = sum((each["latent"], each["sign"]) == (pole["latent"], pole["sign"]) for each in examples)
        assert counted[str(index)] == own
    for row in batches(done.folder, "features"):
        latent, below = int(row["index"]) % WIDTH, int(row["index"]) >= WIDTH
        f = named.truth.f[:, latent] * (-1 if below else 1)
        assert row["frac_nonzero"] == pytest.approx((f > 0).sum() / named.truth.counts.sum())
        check_histogram(row, f[f > 0])


def test_split_neighbours_are_features_of_both_poles(named: NamedRun, tmp_path: Path) -> None:
    (weights,) = named.run.glob("saes/*/sae_weights.safetensors")
    found = load_file(weights)["W_dec"]
    directions = np.concatenate([found, -found])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    done = export(named, tmp_path, split=True)
    for row in batches(done.folder, "features"):
        cosines = directions @ directions[int(row["index"])]
        cosines[int(row["index"])] = -2
        assert row["topkCosSimValues"] == pytest.approx(np.sort(cosines)[::-1][:8].tolist(), rel=1e-3)
        assert cosines[row["topkCosSimIndices"]] == pytest.approx(row["topkCosSimValues"], rel=1e-3)


def check_histogram(row: dict[str, Any], firings: Any) -> None:
    """Bars hold all firings, and those below a middle as far as a bin of the file is wide."""
    heights, middles = np.array(row["freq_hist_data_bar_heights"]), np.array(row["freq_hist_data_bar_values"])
    assert heights.sum() == pytest.approx(len(firings), abs=0.5)
    if not len(firings):
        return
    assert len(heights) == len(middles) == 50
    half = (middles[1] - middles[0]) / 2
    for bar in (10, 25, 40):
        edge = middles[bar] + half
        low, high = sorted((edge * 2**-0.25, edge * 2**0.25))
        below = heights[: bar + 1].sum()
        assert (firings <= low - half).sum() - 1 <= below <= (firings <= high + half).sum() + 1


def test_the_lens_is_both_ends_of_a_direction(model_folder: Path, harvest_config: Any, tmp_path: Path) -> None:
    """With a real model and its own tokenizer."""
    asked = harvest_config(tmp_path, tokens=1000, corpus=str(model_folder / "corpus.jsonl"))
    saes = (sae_config(arch="sa-gsae", d_sae=20),)
    run = train(
        TrainConfig(
            store=str(harvest(asked).store), hook="mlp_out", saes=saes, tokens=640, batch=64, device="cpu",
            out=tmp_path / "run", heldout_tokens=64,
        )
    ).run  # fmt: skip
    features(FeaturesConfig(run=run, device="cpu"))
    done = export_features(FeaturesConfig(run=run, export="neuronpedia", creator="m", out=tmp_path / "out"))
    assert (done.lens, done.model) == (True, model_folder.name)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    (file,) = run.glob("features/*/latents.parquet")
    poles = {(row["latent"], row["sign"]): row["lens"] for row in pq.read_table(file).to_pylist()}
    for latent, row in enumerate(batches(done.folder, "features")):
        jsonschema.validate(row, schema_of("features"))
        for sign, name in ((1, "pos"), (-1, "neg")):
            lens = poles[latent, sign][:10]
            assert row[f"{name}_values"] == pytest.approx([sign * each["logit"] for each in lens], rel=1e-3)
            words = [tokenizer.decode([each["token"]]) for each in lens]
            assert [word.strip() for word in row[f"{name}_str"]] == [word.strip() for word in words]


def test_the_same_features_make_the_same_bytes(named: NamedRun, tmp_path: Path) -> None:
    one, other = export(named, tmp_path / "a").folder, export(named, tmp_path / "b").folder
    files = files_in(one)
    assert len(files) == 6
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_what_cannot_be_exported(named: NamedRun, tmp_path: Path) -> None:
    done = export(named, tmp_path / "out")
    with pytest.raises(UserError, match=r"is there already. Choose another --out, or add --overwrite"):
        export(named, tmp_path / "out")
    (done.folder / "release.jsonl").write_text("old")
    export(named, tmp_path / "out", overwrite=True)
    assert rows_in(done.folder / "release.jsonl")
    assert sorted(path.name for path in done.folder.parent.iterdir()) == [done.source]
    with pytest.raises(UserError, match="has no such autoencoder"):
        export(named, tmp_path / "b", sae="other")
    torn = shutil.copytree(named.run, tmp_path / "torn") / "features" / named.features.name / "tokens.parquet"
    for content, message in ((torn.read_bytes()[:-9], "cannot be read as Parquet"), (None, "is missing")):
        torn.unlink() if content is None else torn.write_bytes(content)
        with pytest.raises(DamagedError, match=rf"tokens.parquet: {message}"):
            export(named, tmp_path / "b", run=tmp_path / "torn")
    copy = NamedRun(Path(shutil.copytree(named.run, tmp_path / "copy")), named.truth, named.features)
    about = copy.run / "features" / named.features.name / "about.json"
    write_sealed(about, {**read_sealed(about), "hook_name": "ln_final"})
    with pytest.raises(UserError, match="ln_final: Neuronpedia orders features by layer"):
        export(copy, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    shutil.rmtree(about.parent)
    with pytest.raises(UserError, match="Run: sagsae features"):
        export(copy, tmp_path / "b")


def test_unsigned_latents_are_not_split(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 1_000)
    run = make_run(tmp_path / "run", store, [make_sae("relu", 8)])
    features(FeaturesConfig(run=run, device="cpu"))
    named = NamedRun(run, all_latents(store, make_sae("relu", 8)), run)
    with pytest.raises(UserError, match="have one pole each"):
        export(named, tmp_path / "out", split=True)
    with pytest.raises(UserError, match="holds no text"):
        export(named, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"creator": "x"}, "creator: is for an export. Add --export neuronpedia"),
        ({"export": "neuronpedia", "creator": "x"}, "out: an export needs a folder"),
        ({"export": "neuronpedia", "out": "x"}, "creator: Neuronpedia shows who made it"),
        ({"export": "neuronpedia", "out": "x", "creator": "x", "model_id": "../up"}, "model_id"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(FeaturesConfig, {"run": "r", **values})


CONVERT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import neuronpedia_export as theirs
print(theirs.export_neuronpedia_dashboards(theirs.NeuronpediaExportConfig(**json.loads(sys.argv[2]))))
"""


@pytest.mark.slow
def test_saedashboards_own_converter_writes_the_same(named: NamedRun, tmp_path: Path) -> None:
    """SAGSAE_SAEDASHBOARD: the folder of neuronpedia_export.py in a checkout; no release on PyPI has had it so far
    (0.8.0). SAGSAE_PEER_PYTHON: a Python with orjson."""
    folder = os.environ.get("SAGSAE_SAEDASHBOARD")
    if not folder:
        pytest.skip("SAGSAE_SAEDASHBOARD names no converter")
    done = export(named, tmp_path / "ours", split=True)
    (tmp_path / "dashboards").mkdir()
    (tmp_path / "dashboards" / "batch-0.json").write_text(json.dumps(as_saedashboard_batch(done.folder)))
    source = rows_in(done.folder / "source.jsonl")[0]
    settings = {
        "saedashboard_output_dir": str(tmp_path / "dashboards"), "exports_dir": str(tmp_path / "theirs"),
        "creator_name": "a maker", "creator_id": source["creatorId"], "release_id": source["setName"],
        "release_title": "title", "url": "", "model_name": done.model, "neuronpedia_source_set_id": source["setName"],
        "neuronpedia_source_set_description": "title", "hf_weights_repo_id": "", "hf_weights_path": "",
        "hook_point": "hook_mlp_out", "layer_num": 0, "prompts_huggingface_dataset_path": "", "n_prompts_total": 0,
        "n_tokens_in_prompt": source["num_tokens_in_prompt"],
    }  # fmt: skip
    python = os.environ.get("SAGSAE_PEER_PYTHON", sys.executable)
    said = subprocess.run(
        [python, "-c", CONVERT, folder, json.dumps(settings)], check=True, capture_output=True, text=True
    )
    converted = Path(said.stdout.splitlines()[-1])
    names = files_in(converted)
    assert names == files_in(done.folder)
    for name in names:
        ours, others = rows_in(done.folder / name), rows_in(converted / name)
        assert len(ours) == len(others) > 0
        for row, other in zip(ours, others, strict=True):
            assert row.keys() == other.keys(), name
            assert {key: row[key] for key in row if key not in DIFFERENT} == {
                key: other[key] for key in other if key not in DIFFERENT
            }, name


DIFFERENT = (
    "id createdAt updatedAt hookName sourceSetName topkCosSimIndices topkCosSimValues description descriptionShort "
    "defaultSourceSetName defaultSourceId dataset hfFolderId hfRepoId num_prompts maxActApprox"
).split()
"""Fields that the converter leaves empty, or makes up itself."""


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
