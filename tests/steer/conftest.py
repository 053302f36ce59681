"""A small run that was trained, evaluated inside the language model and counted by `features`."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving.loopback import ViewClient, viewing

from shared.config import EvalConfig, TrainConfig
from shared.saes import sae_config
from shared.schemas.features import FeaturesConfig
from shared.schemas.view import ViewConfig
from shared.store.opened import Store
from train.evaluate import evaluate
from train.features.run import features
from train.run import train
from train.view.live import LiveModel
from train.view.run import page_folder

NAME = "sa-gsae-48-lambda0.05-seed0"


@pytest.fixture(scope="session")
def finished(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an SA-GSAE of 48 latents on `mlp_out` of a model with random weights. Read only."""
    folder = tmp_path_factory.mktemp("steer") / "run"
    saes = (sae_config(arch="sa-gsae", d_sae=48, sparsity=0.05, theta0=1.0),)
    train(
        TrainConfig(
            store=str(store.root),
            hook="mlp_out",
            saes=saes,
            tokens=200 * 64,
            batch=64,
            lr=5e-3,
            streams=4,
            window_rows=1024,
            device="cpu",
            heldout_tokens=480,
            out=folder,
        )
    )  # fmt: skip
    evaluate(EvalConfig(run=folder, device="cpu", ce_tokens=10_000))
    features(FeaturesConfig(run=folder, device="cpu"))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def folder(finished: Path) -> Path:
    """The folder of its page."""
    return page_folder(ViewConfig(run=finished))


@pytest.fixture(scope="module")
def live(finished: Path, folder: Path) -> LiveModel:
    return LiveModel.load(ViewConfig(run=finished, sae=folder.name, device="cpu"), folder)


@pytest.fixture(scope="module")
def client(folder: Path, live: LiveModel) -> Iterator[ViewClient]:
    """A client of the page, served with its language model."""
    with viewing(folder, live) as found:
        yield found
