"""Known features: the energy of the weaker pole tells two-sided latents from one-sided ones."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from harvest.synth import synth
from shared.config import SynthConfig, TrainConfig
from shared.saes import sae_config
from shared.schemas.features import FeaturesConfig
from shared.store.opened import Store
from shared.synthetic import truth_of
from train.autoencoder import Autoencoder
from train.features.run import features
from train.measure.recovery import FIRES, MATCHED, best_poles
from train.run import train

TWO_SIDED = 0.1
"""Share of a latent's energy on its weaker side from which on a page calls it two-sided."""


@pytest.mark.slow
def test_both_poles_by_energy_are_those_of_bipolar_features(tmp_path: Path) -> None:
    """Acceptance: at least 95 % of the latents matched on both sides are found, and at most 5 % of the others."""
    store = Store.open(synth(SynthConfig(tokens=600_000, p_bipolar=0.5, out=str(tmp_path))).store)
    trained = train(
        TrainConfig(
            store=str(store.root),
            saes=(sae_config(arch="sa-gsae", d_sae=96, sparsity=0.4, theta0=0.16),),
            tokens=600_000,
            batch=512,
            lr=1e-2,
            device="cpu",
            precision="float32",
            heldout_tokens=20_000,
            out=tmp_path / "run",
        )
    )
    done = features(FeaturesConfig(run=trained.run, device="cpu"))
    columns = pq.read_table(done.folder / "latents.parquet", columns=["firings", "share_of_energy"])
    firings, share = (columns[name].to_numpy().reshape(-1, 2) for name in columns.column_names)
    truth = truth_of(store.spec.model)
    assert truth is not None
    W_dec = Autoencoder.load(done.folder.parents[1] / "saes" / done.sae).weights.W_dec
    fires = torch.from_numpy(FIRES * done.rows < firings.T)
    found = best_poles(torch.from_numpy(truth.directed).float(), W_dec, fires)
    matched = np.zeros((96, 2), np.bool_)
    good = found.cosine > MATCHED
    matched[found.latent[good].numpy(), (found.sign[good] < 0).long().numpy()] = True
    both, one = matched.all(1), matched.any(1) & ~matched.all(1)
    assert min(both.sum(), one.sum()) > 30
    two_sided = share.min(1) > TWO_SIDED
    assert two_sided[both].mean() >= 0.95
    assert two_sided[one].mean() <= 0.05
    by_count = firings.min(1) > TWO_SIDED * firings.sum(1)
    assert by_count[one].mean() > two_sided[one].mean(), "by count, noise at the threshold passes for a pole"
