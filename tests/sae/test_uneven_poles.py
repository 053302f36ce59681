"""An SA-GSAE whose poles began with different thresholds, through everything that takes a saved autoencoder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.runs import begun, weights_of
from support.serving.hub import Hub
from support.serving.hub import hub as hub

from shared.config import EvalConfig, TrainConfig
from shared.saes import SAEConfig, SaGsae, sae_config
from shared.schemas.exchange import ExportConfig, ImportConfig, PullConfig, PushConfig
from shared.schemas.features import FeaturesConfig
from shared.store.opened import Store
from train import load
from train.evaluate import evaluate
from train.exchange.bring import bring
from train.exchange.export import export
from train.features.run import features
from train.hub.pull import pull
from train.hub.push import push
from train.plan.idle import idle
from train.run import train

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SAES = tuple(
    sae_config(arch="sa-gsae", d_sae=48, tie="none", sparsity=0.1, **start)
    for start in ({"negative_rate": 0.05}, {"negative_rate": 0.0}, {"theta0_negative": 3.0})
)
Config = Callable[..., TrainConfig]


@pytest.fixture
def run(train_config: Config, tmp_path: Path) -> Path:
    return train(train_config(saes=SAES, out=tmp_path / "trained")).run


@pytest.mark.parametrize("sae", SAES, ids=lambda sae: sae.name)
def test_there_and_back(sae: SAEConfig, run: Path, store: Store, train_config: Config, tmp_path: Path) -> None:
    """Exported and imported; measured at another hookpoint; a start for another run."""
    folder = run / "saes" / sae.name
    saved = load(folder)
    assert saved.config == sae
    for tool in ("saelens", "dictionary-learning"):
        (done,) = export(
            ExportConfig.model_validate({"source": folder, "to": tool, "out": tmp_path / tool, "force": True})
        )
        bring(ImportConfig(source=done.folder, out=tmp_path / f"{tool}-back"))
        back = load(tmp_path / f"{tool}-back")
        assert back.config == sae
        assert all(torch.equal(tensor, back.weights.named()[key]) for key, tensor in saved.weights.named().items())
    measured = evaluate(
        EvalConfig(sae=folder, store=str(store.root), hook="resid_post", transfer=True, ce=False, out=tmp_path / "eval")
    )
    assert sae.name in str(measured)
    again = train(train_config(saes=(sae,), warm_start=folder, lr=1e-12, tokens=128, out=tmp_path / "again")).run
    (other,) = (again / "saes").iterdir()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * saved.scale
    torch.testing.assert_close(load(other)(x), saved(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(other).encode(x), saved.encode(x), rtol=1e-4, atol=1e-4)


def test_its_features_and_its_card(run: Path, hub: Hub, tmp_path: Path) -> None:
    assert hub.n_commits == 0
    for sae in SAES:
        features(FeaturesConfig(run=run, sae=sae.name))
    evaluate(EvalConfig(run=run, ce=False))
    push(PushConfig(source=str(run), repo="tester/uneven", private=True))
    pull(PullConfig(source="tester/uneven", out=tmp_path / "pulled"))
    pulled = {load(path.parent).config.name for path in (tmp_path / "pulled").rglob("cfg.json")}
    assert pulled == {sae.name for sae in SAES}


def test_a_run_that_was_stopped_ends_with_the_same_bits(run: Path, train_config: Config, tmp_path: Path) -> None:
    """The first thresholds are those that the first steps saw, not those of the rows after the stop."""
    config = train_config(saes=SAES, out=tmp_path / "stopped")
    begun(config, 11)
    train(config)
    assert weights_of(tmp_path / "stopped") == weights_of(run)


def test_a_start_that_another_autoencoder_replaces_is_said(train_config: Config, tmp_path: Path) -> None:
    def said(**resets: int) -> str:
        saes = tuple(SaGsae.model_validate({**sae.model_dump(), **resets}) for sae in SAES)
        return " ".join(idle(train_config(saes=saes, warm_start=tmp_path), 20))

    assert "negative_rate: has no effect" in said()
    assert "theta0_negative: has no effect" in said()
    assert "negative" not in said(reset_every=5), "where a reset has the negative poles begin again"
