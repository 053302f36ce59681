"""sagsae train --from: training starts from exactly what the source computes, and its records say which weights."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Sagsae
from support.runs import begun, lines_of, weights_of
from support.variants import imported, variant, weights
from torch import Tensor

from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import SAEConfig, sae_config
from shared.store.opened import Store
from train import load
from train.autoencoder import Autoencoder, settings_of
from train.run import train

HOOK, D_IN = "layer_01/mlp_out", 32
Config = Callable[..., TrainConfig]


def activations(store: Store, n: int = 256) -> Tensor:
    """Rows of the mean and the spread of the store's."""
    statistics = store.statistics(HOOK)
    noise = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(5))
    return torch.from_numpy(statistics.mean).float() + noise * torch.from_numpy(statistics.variance).sqrt().float()


def as_good_as_untrained(train_config: Config, source: Path, sae: SAEConfig, **changes: Any) -> Autoencoder:
    """What a run saves that can learn nothing."""
    run = train(train_config(saes=(sae,), warm_start=source, lr=1e-12, tokens=2 * 64, **changes)).run
    (folder,) = (run / "saes").iterdir()
    return load(folder)


def spoiled(folder: Path, name: str, config: SAEConfig | None = None, **changes: Any) -> Path:
    """A saved variant with other weights."""
    config = config or variant(name)
    w = weights(config, d_in=D_IN)
    w = replace(w, **{key: change(getattr(w, key)) for key, change in changes.items()})
    Autoencoder(config, w, 1.0).save(folder, {"model": None, "hook_name": None})
    return folder


@pytest.mark.parametrize("arch", ["sa-gsae", "gated", "relu", "jumprelu", "topk", "batch-topk", "abs-topk"])
def test_an_imported_one_is_where_training_begins(
    arch: str, store: Store, train_config: Config, tmp_path: Path
) -> None:
    """Weights and latents to one part in a million. The threshold of a BatchTopK is set again at the end."""
    source = load(imported(tmp_path / "source", store, HOOK, arch))
    sparsity = {"k": 5} if "topk" in arch else {"sparsity": 0.1}
    found = as_good_as_untrained(train_config, tmp_path / "source", sae_config(arch=arch, d_sae=48, **sparsity))
    for name, tensor in source.weights.trained().items():
        size = tensor.abs().max().item() or 1.0
        torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=1e-6 * size)
    if not arch.startswith(("batch", "abs")):
        x = activations(store)
        assert source.encode(x).any()
        torch.testing.assert_close(found(x), source(x), rtol=1e-5, atol=1e-6 * x.abs().max().item())


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ("sa-gsae", {"arch": "gated", "d_sae": 96}),
        ("r tied", {"arch": "gated", "d_sae": 96}),
        ("untied", {"arch": "gated", "d_sae": 96, "decoder": "free"}),
        ("sa-gsae", {"arch": "sa-gsae", "d_sae": 48, "tie": "none"}),
        ("r tied", {"arch": "sa-gsae", "d_sae": 48, "tie": "none"}),
        ("one-sided", {"arch": "sa-gsae", "d_sae": 48, "one_sided": True}),
        ("gated, free decoder", {"arch": "gated", "d_sae": 48, "decoder": "free"}),
    ],
)
def test_another_form_of_the_same_function(
    made: str, wanted: dict[str, Any], store: Store, train_config: Config, tmp_path: Path
) -> None:
    source = Autoencoder(variant(made), weights(variant(made), d_in=D_IN), 1.0)
    source.save(tmp_path / "source", {"model": None, "hook_name": None})
    found = as_good_as_untrained(train_config, tmp_path / "source", sae_config(**wanted, sparsity=0.1))
    assert (found.config.arch, found.config.d_sae) == (wanted["arch"], wanted["d_sae"])
    x = activations(store)
    torch.testing.assert_close(found(x), source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", ["symmetric", "none"])
def test_and_back(tie: str, store: Store, train_config: Config, tmp_path: Path) -> None:
    """A gated one whose halves mirror each other starts an sa-gsae of half the width."""
    whole = Autoencoder(variant("sa-gsae"), weights(variant("sa-gsae"), d_in=D_IN), 1.0)
    whole.split().save(tmp_path / "source", {"model": None, "hook_name": None})
    wanted = sae_config(arch="sa-gsae", d_sae=48, tie=tie, sparsity=0.1)
    found = as_good_as_untrained(train_config, tmp_path / "source", wanted)
    torch.testing.assert_close(found(activations(store)), whole(activations(store)), rtol=1e-5, atol=1e-5)


def test_its_records_name_the_weights(store: Store, train_config: Config, tmp_path: Path) -> None:
    """By the digest of the content: a copy elsewhere is the same start, other weights are another run."""
    source = imported(tmp_path / "source", store, HOOK)
    _, _, _, digest = settings_of(source)
    saes = tuple(sae_config(arch="jumprelu", d_sae=48, sparsity=sparsity) for sparsity in (0.01, 0.02))
    run = train(train_config(saes=saes, warm_start=source)).run
    names = sorted(path.name for path in (run / "saes").iterdir())
    assert names == [f"jumprelu-48-lambda{value}-seed0-start-{digest[:12]}" for value in ("0.01", "0.02")]
    identity, record = (json.loads((run / name).read_text()) for name in ("config.json", "record.json"))
    assert [sae["start"] for sae in identity["saes"]] == [digest, digest]
    assert record["warm_start"] == {"folder": str(source), "sha256": digest}
    assert load(run / "saes" / names[0]).config.start == digest

    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    before = weights_of(run)
    train(train_config(saes=saes, warm_start=copy))
    assert weights_of(run) == before, "finished already"
    other = imported(tmp_path / "other", store, HOOK, seed=7)
    with pytest.raises(UserError, match=rf"saes\[0\]\.start: the run has {digest}, this asks for"):
        train(train_config(saes=saes, warm_start=other))
    with pytest.raises(UserError, match=r"saes\[0\]\.start"):
        train(train_config(saes=saes))
    usual = train(train_config(saes=saes, out=tmp_path / "usual")).run
    assert "start" not in json.loads((usual / "config.json").read_text())["saes"][0], "as in runs of earlier versions"
    logged = [lines_of(path)[0]["saes"].values() for path in (run, usual)]
    assert sorted(sae["fvu"] for sae in logged[0]) != sorted(sae["fvu"] for sae in logged[1])


@pytest.mark.parametrize("arch", ["gated", "batch-topk"])
def test_a_resumed_run_ends_with_the_same_bits(arch: str, store: Store, train_config: Config, tmp_path: Path) -> None:
    source = imported(tmp_path / "source", store, HOOK, arch)
    sparsity = {"k": 5} if "topk" in arch else {"sparsity": 0.1}
    saes = (sae_config(arch=arch, d_sae=48, **sparsity),)
    whole = train(train_config(saes=saes, warm_start=source, out=tmp_path / "whole")).run
    config = train_config(saes=saes, warm_start=source, out=tmp_path / "stopped")
    stopped = begun(config, 11)
    assert not (stopped / "evaluation.json").exists()
    train(config)
    assert weights_of(stopped) == weights_of(whole) != {}


@pytest.mark.slow
def test_after_sigterm_from_the_command_line(store: Store, tmp_path: Path, sagsae: Sagsae) -> None:
    source = imported(tmp_path / "source", store, HOOK, "gated")
    words = [
        "train", "--store", store.root, "--hook", HOOK, "--arch", "gated:48", "--sparsity", "0.1", "--from", source,
        "--tokens", 400 * 64, "--batch", 64, "--set", "log_every=1", "--set", "streams=4", "--device", "cpu",
    ]  # fmt: skip
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"

    def is_training() -> bool:
        log = stopped / "metrics.jsonl"
        return log.exists() and log.read_bytes().count(b"\n") >= 3

    done = sagsae(*words, "--out", stopped, stop=(signal.SIGTERM, is_training))
    assert done.returncode == 130, done.stderr
    assert sagsae(*words, "--out", stopped).returncode == 0
    assert sagsae(*words, "--out", whole).returncode == 0
    assert weights_of(stopped) == weights_of(whole) != {}


# --------------------------------------------------------------------------------------------- what does not fit


def gated(**settings: Any) -> SAEConfig:
    config: SAEConfig = sae_config(**{"arch": "gated", "d_sae": 48, "sparsity": 0.1, **settings})
    return config


def test_what_does_not_fit_is_refused_before_anything_is_made(train_config: Config, tmp_path: Path) -> None:
    def longer(tensor: Tensor) -> Tensor:
        return 2 * tensor

    plain = spoiled(tmp_path / "plain", "gated")
    none = spoiled(tmp_path / "none", "untied")
    free = spoiled(tmp_path / "free", "gated, free decoder")
    far = spoiled(tmp_path / "far", "gated", r=lambda r: r + 9)
    long = spoiled(tmp_path / "long", "gated", W_dec=longer)
    narrow = tmp_path / "narrow"
    Autoencoder(variant("gated"), weights(variant("gated")), 1.0).save(narrow, {})
    symmetric = sae_config(arch="sa-gsae", d_sae=48, sparsity=0.1)
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, SAEConfig, str]] = [
        (plain, gated(d_sae=64), "whose weights gated-64.* cannot have"),
        (plain, sae_config(arch="relu", d_sae=48), "whose weights relu-48.* cannot have"),
        (plain, sae_config(arch="sa-gsae", d_sae=24), "does not mirror the first"),
        (plain, sae_config(arch="sa-gsae", d_sae=48, one_sided=True), "cannot be joined|cannot have"),
        (none, symmetric, "whose weights sa-gsae-48.* cannot have"),
        (none, gated(), "whose weights gated-48.* cannot have"),
        (free, gated(), r"its decoder rows have norms from .* holds them at one"),
        (long, gated(), "its decoder rows have norms from 2 to 2"),
        (far, gated(), "has values of r that training would change at once"),
        (narrow, gated(), r"is for activations of d_in 16; .*/layer_01/mlp_out has 32"),
        (tmp_path / "empty", gated(), "is neither a run nor the folder of an autoencoder"),
        (plain, gated(start="ab" * 32), "gated-48.* starts from others"),
    ]
    for source, sae, message in cases:
        with pytest.raises(UserError, match=message) as refused:
            train(train_config(saes=(sae,), warm_start=source))
        assert str(source) in str(refused.value)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="Name it with --from"):
        train(train_config(saes=(gated(start="ab" * 32),)))
    run = train(train_config()).run
    with pytest.raises(UserError, match=r"holds 2 autoencoders\. Name one, RUN/NAME: gated-48"):
        train(train_config(saes=(gated(),), warm_start=run, out=tmp_path / "second"))


def test_other_activations_are_said(
    store: Store, train_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer's autoencoder may start the next layer's. One that is closed there could never learn."""
    source = imported(tmp_path / "source", store, HOOK, "gated", hook_name="blocks.0.hook_mlp_out")
    as_good_as_untrained(train_config, source, gated(theta0=0.3))
    said = capsys.readouterr().err
    assert "was made for 'blocks.0.hook_mlp_out'" in said
    assert "theta0: has no effect" in said
    closed = spoiled(tmp_path / "closed", "gated", theta=lambda theta: theta + 1e6)
    with pytest.raises(UserError, match="no latent of the autoencoder that it starts from opens"):
        train(train_config(saes=(gated(),), warm_start=closed, out=tmp_path / "closed-run"))
