"""A massive row in a batch: what it does to training, and that `longest_row` stops it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import rewrite, without
from support.runs import begun, weights_of

from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import sae_config
from shared.store.opened import Statistics
from train.data.norm_filter import shorten_
from train.fit.member import Member
from train.ranks import Ranks
from train.run import train
from train.sae.base import decode

D_IN, BATCH, STEPS, AT = 64, 256, 120, 100


def test_far_rows_come_nearer_and_others_keep_every_bit() -> None:
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0))
    mean = torch.full((D_IN,), 0.3)
    x[3], x[5], x[7] = mean + 1000 * x[3], mean + 5 * torch.eye(D_IN)[0], mean
    before = x.clone()
    shorten_(x, mean, 8.0)
    far = (before - mean).norm(dim=1) > 8.0
    assert far[3]
    assert torch.equal(x[~far], before[~far])
    assert (x[far] - mean).norm(dim=1).tolist() == pytest.approx([8.0] * int(far.sum()), rel=1e-5)
    torch.testing.assert_close(*((y[3] - mean) / (y[3] - mean).norm() for y in (x, before)))
    huge = torch.full((1, D_IN), 3e38)
    shorten_(huge, mean, 8.0)
    assert huge.isfinite().all(), "where the distance overflows float32"


def unexplained(arch: str, longest: float) -> float:
    """Share of the variance of ordinary rows that an autoencoder leaves unexplained, when late in training it saw one
    row of 150 times the usual distance."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=generator), dim=1)

    def rows(count: int) -> torch.Tensor:
        on = torch.rand(count, 40, generator=generator) < 0.08
        return (on * torch.randn(count, 40, generator=generator).abs()) @ features / 1.7

    config = sae_config(arch=arch, d_sae=96, sparsity=0.1, theta0=1.0)
    run = TrainConfig(store="s", saes=(config,), batch=BATCH, lr=1e-2)
    mean = rows(4096).mean(0)
    statistics = Statistics(4096, mean.double().numpy(), torch.full((D_IN,), 1 / D_IN).double().numpy())
    member = Member(config, run, STEPS, torch.float32, statistics, Ranks(torch.device("cpu")))
    with torch.no_grad():
        for step in range(STEPS):
            x = rows(BATCH)
            if step == AT:
                x[0] *= 150 / x[0].norm()
            if longest:
                shorten_(x, mean, longest)
            member.step_(x, step)
        held_out = rows(4096)
        x_hat = decode(member.weights, member.family.encode(member.weights, held_out))
    return float((held_out - x_hat).square().sum() / (held_out - held_out.mean(0)).square().sum())


@pytest.mark.parametrize("arch", ["sa-gsae", "gated"])
def test_one_massive_row_undoes_training_unless_it_is_shortened(arch: str) -> None:
    """The gates of an SA-GSAE are open on it in either direction, so it rewrites nearly every latent."""
    spoiled, kept = (unexplained(arch, longest) for longest in (0.0, 5.0))
    assert kept < 0.03
    assert spoiled > 2 * kept


def test_a_run_of_an_earlier_version_resumes_with_rows_as_they_are(
    train_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    whole = train(train_config(out=tmp_path / "whole", longest_row=0.0)).run
    part = begun(train_config(out=tmp_path / "part", longest_row=0.0), 11)
    rewrite(part / "config.json", without("longest_row"))
    with pytest.raises(UserError, match=r"longest_row: the run has 0\.0, this asks for 1\.5"):
        train(train_config(out=part, longest_row=1.5))
    train(train_config(out=part))
    assert weights_of(part) == weights_of(whole)


def test_it_changes_nothing_where_no_row_is_far(train_config: Callable[..., Any], tmp_path: Path) -> None:
    runs = {
        longest: train(train_config(out=tmp_path / f"{longest}", longest_row=longest)).run for longest in (0, 50, 0.5)
    }
    assert weights_of(runs[50]) == weights_of(runs[0])
    assert weights_of(runs[0.5]) != weights_of(runs[0])
