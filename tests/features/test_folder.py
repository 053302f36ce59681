"""`sagsae features --sae FOLDER --store STORE --out DIR`: an autoencoder without a run, trained here or imported."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.command import Sagsae
from support.exact.runs import HOOK, all_latents, make_run, make_sae, make_store
from support.folders import contents
from support.stores import unfinished

from shared.errors import DamagedError, UserError
from shared.schema import build
from shared.schemas.exchange import ExportConfig, ImportConfig
from shared.schemas.features import FeaturesConfig
from shared.store.opened import Store
from train.autoencoder import Autoencoder
from train.exchange.bring import bring
from train.exchange.export import export
from train.features.run import FeaturesSummary, features
from train.features.tables import FILES
from train.runs.folder import read_sealed
from train.sae.families import family

ABOUT = {"model": {"name": "made", "commit": "0" * 32, "local": True}, "hook_name": "blocks.0.hook_mlp_out"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("folder") / "s", 1100, nan=(30, 700))


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    """Stands alone."""
    make_sae("sa-gsae", 32).save(tmp_path / "alone", ABOUT)
    return tmp_path / "alone"


def look(sae: Path, store: Store, out: Path, **more: Any) -> FeaturesSummary:
    values = {"sae": str(sae), "store": str(store.root), "hook": HOOK, "out": out, "device": "cpu", **more}
    return features(build(FeaturesConfig, values))


def test_it_finds_what_a_run_of_the_same_rows_finds(store: Store, sae: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", store, [make_sae("sa-gsae", 32)])
    of_run = features(FeaturesConfig(run=run, device="cpu", cofire_every=8))
    for number, place in enumerate((sae, run / of_run.sae, run / "saes" / of_run.sae, run)):
        done = look(place, store, tmp_path / f"deep/{number}", cofire_every=8)
        assert done.folder == tmp_path / f"deep/{number}"
        assert (done.sae, done.rows, done.l0) == (of_run.sae, of_run.rows, of_run.l0)
        for name in FILES:
            assert (done.folder / name).read_bytes() == (of_run.folder / name).read_bytes()
        page = ("app.js", "data", "index.html", "style.css")
        assert {path.name for path in done.folder.iterdir()} == {"about.json", *FILES, *page}
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["0", "1", "2", "3"], "no .work is left"


@pytest.mark.parametrize("form", ["gated", "bijumprelu"])
def test_an_imported_autoencoder(store: Store, sae: Path, tmp_path: Path, form: str) -> None:
    """Somebody else's, as its folder does not say that it was ours."""
    export(ExportConfig.model_validate({"source": sae, "to": "saelens", "form": form, "out": tmp_path / "theirs"}))
    cfg = json.loads((tmp_path / "theirs/cfg.json").read_text())
    del cfg["metadata"]["sagsae"]
    (tmp_path / "theirs/cfg.json").write_text(json.dumps(cfg))
    bring(ImportConfig(source=tmp_path / "theirs", out=tmp_path / "imported"))
    done = look(tmp_path / "imported", store, tmp_path / "out")
    f = all_latents(store, make_sae("sa-gsae", 32)).f
    poles = [f > 0, f < 0] if form == "bijumprelu" else [np.concatenate([f > 0, f < 0], axis=1)]
    expected = np.stack([fires.sum(axis=0) for fires in poles], axis=1).reshape(-1)
    counted = pq.read_table(done.folder / "latents.parquet")["firings"].to_numpy()
    assert counted.tolist() == expected.tolist()
    assert done.l0 == pytest.approx((f != 0).sum() / done.rows)
    assert (sum(expected) > 1000, read_sealed(done.folder / "about.json")["signed"]) == (True, form == "bijumprelu")


def test_a_second_call_has_nothing_to_do_and_another_autoencoder_is_noticed(
    store: Store, sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    first = look(sae, store, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert look(sae, store, tmp_path / "out").complete
    assert "is complete. Nothing to do" in capsys.readouterr().err
    make_sae("sa-gsae", 32, seed=1).save(sae, ABOUT)
    with pytest.raises(UserError, match="was made from another autoencoder"):
        look(sae, store, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert look(sae, store, tmp_path / "out", overwrite=True).sae != first.sae
    assert contents(tmp_path / "out") != before


# what does not fit


def test_another_hookpoint_or_model(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sae("gated", 32).save(tmp_path / "hook", {**ABOUT, "hook_name": "blocks.1.hook_mlp_out"})
    make_sae("gated", 32).save(tmp_path / "model", {**ABOUT, "model": {"name": "other", "commit": "1" * 32}})
    for name, message in (("hook", "was made for 'blocks.1.hook_mlp_out'"), ("model", "was made for 'other'")):
        with pytest.raises(UserError, match=message):
            look(tmp_path / name, store, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert look(tmp_path / name, store, tmp_path / f"{name}-out", transfer=True).rows > 500
        assert message in capsys.readouterr().err
    make_sae("gated", 32).save(tmp_path / "unknown", {})
    look(tmp_path / "unknown", store, tmp_path / "unknown-out")
    assert "its cfg.json does not say its hookpoint" in capsys.readouterr().err


def test_another_width(store: Store, tmp_path: Path) -> None:
    config = make_sae("gated", 32).config
    narrow = family(config).initial(8, torch.zeros(8), torch.Generator())
    Autoencoder(config, narrow, 1.0).save(tmp_path / "narrow", ABOUT)
    for transfer in (False, True):
        with pytest.raises(UserError, match=r"is for activations of d_in 8; .* has 16"):
            look(tmp_path / "narrow", store, tmp_path / "out", transfer=transfer)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sae": None}, "RUN: name a run, or an autoencoder, a store and a folder .*--sae is missing"),
    ({"store": None, "out": None}, r"--store, --out is missing"),
    ({"run": "run"}, "--hook: is for an autoencoder without a run"),
    ({"run": "run", "hook": None, "transfer": True}, "--(transfer|hook|out): is for an autoencoder without a run"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_options_that_do_not_go_together(store: Store, sae: Path, tmp_path: Path, change: Any, message: str) -> None:
    values = {"sae": str(sae), "store": str(store.root), "hook": HOOK, "out": tmp_path / "out", **change}
    with pytest.raises(UserError, match=message):
        build(FeaturesConfig, {key: value for key, value in values.items() if value is not None})


def test_no_autoencoder_or_several(store: Store, sae: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", store, [make_sae("sa-gsae", 32), make_sae("gated", 32)])
    with pytest.raises(UserError, match=r"holds 2 autoencoders. Name one of them, such as .*/run/saes/gated-32"):
        look(run, store, tmp_path / "out")
    with pytest.raises(UserError, match="is neither a run nor the folder of an autoencoder"):
        look(tmp_path / "nothing", store, tmp_path / "out")
    weights = sae / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedError, match="SHA-256 differs"):
        look(sae, store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_without_rows(store: Store, sae: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "s"))
    unfinished(copy)[0].write_text("")
    with pytest.raises(UserError, match="no shard is committed yet"):
        look(sae, Store.open(copy), tmp_path / "out")
    with pytest.raises(UserError, match="nothing"):
        look(sae, store, tmp_path / "out", hook="nothing")


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_of_others_is_touched(store: Store, sae: Path, tmp_path: Path, overwrite: bool) -> None:
    """--overwrite deletes what the folder holds, so that it may hold nothing else."""
    run = make_run(tmp_path / "run", store, [make_sae("sa-gsae", 32)])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/deep").mkdir(parents=True)
    (tmp_path / "mine/deep/about.json").write_text("mine")
    (tmp_path / "busy.work").mkdir()
    (tmp_path / "busy.work/notes.txt").write_text("mine")
    (tmp_path / "page").mkdir()
    (tmp_path / "page/index.html").write_text("mine")
    shutil.copytree(tmp_path / "page", tmp_path / "described")
    (tmp_path / "described/about.json").write_text('{"mine": 1}')
    before = contents(tmp_path)
    places = (sae, sae / "in", run / "features/x", store.root / "in", tmp_path / "file", tmp_path / "link")
    for out in (
        *places,
        tmp_path / "mine",
        tmp_path / "busy",
        tmp_path / "page",
        tmp_path / "described",
        Path("/"),
        tmp_path / "..",
    ):
        with pytest.raises(UserError, match="--out") as error:
            look(sae, store, out, overwrite=overwrite)
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_the_command(store: Store, sae: Path, tmp_path: Path, sagsae: Sagsae) -> None:
    words = ("features", "--sae", sae, "--store", store.root, "--out", tmp_path / "out", "--processes", 2, "--json")
    done = sagsae(*words)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["folder"], said["complete"]) == (str(tmp_path / "out"), False)
    alone = look(sae, store, tmp_path / "alone-out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (alone.folder / name).read_bytes()
    done = sagsae("features", "--sae", sae)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RUN: name a run, or an autoencoder, a store and a folder")
    assert "Traceback" not in done.stderr
