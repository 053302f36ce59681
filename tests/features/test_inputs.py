"""A wrong run, store or option gets one sentence, and no file is left half-written."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import Sagsae
from support.exact.runs import HOOK, make_run, make_sae, make_store
from support.folders import before_each_file

from shared.errors import BusyError, DamagedError, UserError
from shared.schemas.features import FeaturesConfig
from shared.store.opened import Store
from train.features.run import features
from train.features.tables import FILES
from train.report.choice import best_at_median
from train.report.sae import MeasuredSAE
from train.runs.folder import RunFolder, read_sealed, write_sealed

TOKENS = 1100


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("inputs") / "s", TOKENS)


@pytest.fixture
def run(store: Store, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", store, [make_sae("sa-gsae", 32)])


def look(run: Path, **changes: Any) -> Any:
    return features(FeaturesConfig(run=run, device="cpu", **changes))


def test_a_second_call_has_nothing_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = look(run)
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = look(run)
    assert (second.complete, second.rows, second.l0) == (True, first.rows, first.l0)
    assert "is complete. Nothing to do" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert look(run, overwrite=True).complete is False


def test_about_says_what_it_was_made_from(run: Path, store: Store) -> None:
    done = look(run)
    about = read_sealed(done.folder / "about.json")
    assert about["identity"]["sha256"] == read_sealed(RunFolder(run).sae(done.sae) / "cfg.json")["sha256"]
    assert about["identity"]["snapshot"] == read_sealed(run / "config.json")["snapshot"]
    assert about["store"]["snapshot"] == store.snapshot_id
    assert (about["d_sae"], about["signed"], about["rows"], about["lens"]) == (32, True, done.rows, None)
    assert "pyarrow" in about
    assert about["versions"]["numpy"]


def test_of_several_one_has_to_be_named(store: Store, tmp_path: Path) -> None:
    saes = [make_sae("sa-gsae", 32), make_sae("gated", 32), make_sae("relu", 32)]
    run = make_run(tmp_path / "run", store, saes)
    with pytest.raises(UserError, match=r"holds 3 autoencoders. Choose one with --sae") as error:
        look(run)
    assert "the best is gated-32" in str(error.value), "the one at the median L0"
    for sae in saes:
        assert f"{sae.config.name}  L0 " in str(error.value)
    with pytest.raises(UserError, match=r"--sae nothing: .* has no such autoencoder"):
        look(run, sae="nothing")
    assert look(run, sae=saes[2].config.name).sae == saes[2].config.name


def sae(name: str, width: int, l0: float, r2: float) -> MeasuredSAE:
    return MeasuredSAE(name=name, arch="gated", d_sae=width, sparsity=1 / l0, seed=0, r2=r2, l0=l0, dead_fraction=0.0)


def test_the_best_is_on_the_frontier_that_is_highest_at_the_median_l0() -> None:
    low = [sae("a", 32, 4, 0.5), sae("b", 32, 16, 0.6)]
    high = [sae("c", 64, 2, 0.55), sae("d", 64, 30, 0.95)]
    best, middle = best_at_median([*low, *high])
    assert middle == pytest.approx(8)
    assert best is not None
    assert best.name == "d", "nearer to 8 than 2 is, by logarithm, and on the higher frontier"
    best, _ = best_at_median([sae("a", 32, 4, 0.5), sae("b", 64, 9, 0.6), sae("c", 128, 30, 0.7)])
    assert best is not None
    assert best.name == "b", "no frontier has two points"
    assert best_at_median([]) == (None, 0.0)


def altered(path: Path) -> None:
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "rows": 7}))


WRONG: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "not evaluated": (
        lambda run: (run / "evaluation.json").unlink(),
        UserError,
        "has no evaluation.json: run `sagsae eval",
    ),
    "not finished": (
        lambda run: write_sealed(run / "record.json", {"steps": 1}),
        UserError,
        "its training is not finished",
    ),
    "no run": (lambda run: shutil.rmtree(run), UserError, "is not a training run"),
    "no autoencoder": (lambda run: shutil.rmtree(run / "saes"), UserError, "does not hold a trained autoencoder"),
    "a changed autoencoder": (
        lambda run: weights(run).write_bytes(weights(run).read_bytes()[:-1] + b"\1"),
        DamagedError,
        "SHA-256 differs",
    ),
}


def weights(run: Path) -> Path:
    (found,) = run.glob("saes/*/sae_weights.safetensors")
    return found


@pytest.mark.parametrize("case", WRONG)
def test_a_run_that_cannot_be_used(case: str, run: Path) -> None:
    change, kind, message = WRONG[case]
    change(run)
    with pytest.raises(kind, match=message) as error:
        look(run)
    assert "\n" not in str(error.value)
    assert not (run / "features").exists()


def test_a_store_that_moved_or_is_another_one(store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "s"))
    run = make_run(tmp_path / "run", Store.open(copy), [make_sae("sa-gsae", 32)])
    copy.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"does not exist. Name its new place with --store"):
        look(run)
    other = make_store(tmp_path / "other", TOKENS, seed=6)
    with pytest.raises(UserError, match="was not trained on the rows that"):
        look(run, store=str(other.root))
    assert look(run, store=str(tmp_path / "moved")).rows


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"tokens": 600}, "with tokens = None, and this asks for 600"),
    "top": ({"top": 8}, "with top = 16, and this asks for 8"),
    "cofire_every": ({"cofire_every": 3}, "with cofire_every = 8, and this asks for 3"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_result_of_other_settings_is_kept(case: str, run: Path) -> None:
    first = look(run)
    changes, message = CHANGES[case]
    with pytest.raises(UserError, match=message):
        look(run, **changes)
    assert look(run).complete
    assert look(run, **changes, overwrite=True).folder == first.folder


def test_a_result_of_another_autoencoder_or_store_is_refused(run: Path, tmp_path: Path) -> None:
    done = look(run)
    make_sae("sa-gsae", 32, seed=5).save(tmp_path / "sae", {})
    about = read_sealed(tmp_path / "sae" / "cfg.json")
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(tmp_path / "sae" / name, run / "saes" / done.sae / name)
    write_sealed(run / "saes" / done.sae / "cfg.json", {**about, "seed": 0})
    with pytest.raises(UserError, match="was made from another autoencoder"):
        look(run)
    other = make_store(tmp_path / "other", TOKENS, seed=6)
    again = make_run(tmp_path / "again", other, [make_sae("sa-gsae", 32)])
    shutil.copytree(run / "features", again / "features")
    with pytest.raises(UserError, match="was made from other rows of the store"):
        look(again)


def test_an_altered_result_is_damaged(run: Path) -> None:
    done = look(run)
    (done.folder / "pairs.parquet").unlink()
    with pytest.raises(DamagedError, match=r"pairs.parquet: is missing"):
        look(run)
    altered(done.folder / "about.json")
    with pytest.raises(DamagedError, match="its checksum does not match"):
        look(run)


@pytest.mark.parametrize("name", ["job.json", "rank-00000.tally", "on-000000.pairs"])
def test_a_full_disk_is_temporary(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        if path.name.endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("train.features.pairs.SPILLED", 10)
    with monkeypatch.context() as patch:
        before_each_file(patch, full)
        with pytest.raises(BusyError, match=r"the disk is full. Free space"):
            look(run)
    assert not list((run / "features").glob("*/*.parquet"))
    assert look(run).rows


def test_an_altered_tally_is_damaged_and_overwrite_starts_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.features.run.write", killed)
        with pytest.raises(KeyboardInterrupt):
            look(run)
    (tally,) = (run / "features").glob("*.work/*.tally")
    whole = tally.read_bytes()
    for at in (20, len(whole) // 2, len(whole) - 100):
        tally.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedError, match=r"\.tally: was altered|\.tally: .*JSON"):
            look(run)
    tally.write_bytes(whole[:-4096])
    with pytest.raises(DamagedError, match="was cut"):
        look(run)
    with pytest.raises(UserError, match="holds a pass that was begun with top = 16"):
        look(run, top=3)
    assert look(run, overwrite=True).rows


def test_tokens_are_the_first_whole_contexts(run: Path, store: Store) -> None:
    done = look(run, tokens=700)
    counts = ~(store.tokens() == 7) & ~(store.tokens() == 11)
    counts[:, : store.spec.skip_positions] = False
    assert done.rows == counts[: 700 // store.spec.context].sum()
    assert look(run, tokens=1, overwrite=True).rows == counts[:1].sum(), "at least one context"


def test_train_overwrite_removes_them_and_nothing_else(run: Path) -> None:
    done = look(run)
    folder = RunFolder(run)
    assert folder.foreign_names() == folder.foreign_paths() == []
    (done.folder / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="was not put there by a run"):
        folder.clear()
    (done.folder / "mine.txt").unlink()
    folder.clear()
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.usefixtures("unfinished_pass")
def test_an_unfinished_pass_belongs_to_the_run(run: Path) -> None:
    assert list((run / "features").glob("*.work/*"))
    assert RunFolder(run).foreign_paths() == []


@pytest.fixture
def unfinished_pass(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.features.pairs.SPILLED", 10)
    monkeypatch.setattr("train.features.tables.SortedPairs.write", killed)
    with pytest.raises(KeyboardInterrupt):
        look(run)


def test_the_command_line(run: Path, sagsae: Sagsae) -> None:
    wrong = sagsae("features", run, "--top", 0)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--top" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    done = sagsae("features", run, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    page = ["app.js", "data", "index.html", "style.css"]
    assert sorted(path.name for path in Path(document["folder"]).iterdir()) == sorted([*FILES, *page, "about.json"])
    assert document["page"] == str(Path(document["folder"]) / "index.html")
    assert "rows, about" in done.stderr
    assert "of memory" in done.stderr


def test_the_hookpoint_is_that_of_the_store(store: Store) -> None:
    assert list(store.spec.hookpoints) == [HOOK]


def test_the_benchmark_prints_ratio_size_and_memory(run: Path, sagsae: Sagsae) -> None:
    """The benchmark prints every figure, and the sizes of the files. How fast it ran is not tested."""
    done = sagsae("bench", "features", "--run", run, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (folder,) = (run / "features").iterdir()
    sizes = {name: round((folder / name).stat().st_size / 32) for name in FILES}
    assert found["bytes_per_latent_by_file"] == sizes
    assert found["bytes_per_latent"] == sum(sizes.values())
    assert found["rows"] == read_sealed(folder / "about.json")["rows"]
    assert found["pass_vs_encode"] > 1
    assert {row["what"] for row in found["figures"]} == {"encode", "pass"}
    failed = sagsae("bench", "features", "--run", run, "--sae", "another")
    assert failed.returncode == 2
    assert "another" in failed.stderr
