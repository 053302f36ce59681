"""What may be asked for, and what a person reads when it may not."""

from pathlib import Path
from typing import Any

import pytest

from shared.config import HarvestConfig, TrainConfig, build, demo_train, parse_set, read_toml, sae_grid
from shared.errors import UserError

SAE: dict[str, Any] = {"arch": "gated", "d_sae": 8, "sparsity": 0.1}


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown setting 'contxt': did you mean context\?"):
        build(HarvestConfig, {"model": "tiny", "contxt": 3})
    with pytest.raises(UserError, match=r"unknown setting 'zzz': valid keys: model, revision"):
        build(HarvestConfig, {"model": "tiny", "zzz": 3})
    with pytest.raises(UserError, match=r"unknown setting 'saes.0.width'"):
        build(TrainConfig, {"store": "s", "saes": [{**SAE, "width": 3}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, r"tokens: .*greater than or equal to 1 \(got 0\)"),
        ({"codec": "gzip"}, r"codec: .*'zstd', 'lz4', 'none' or 'int8' \(got 'gzip'\)"),
        ({"seed": -1}, r"seed: .*greater than or equal to 0"),
        ({"name": "../x"}, r"name: .*pattern"),
        ({"model": None}, r"model: .*string"),
    ],
)
def test_harvest_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(HarvestConfig, {"model": "tiny", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saes": []}, "name at least one autoencoder"),
        ({"saes": [SAE, SAE]}, r"gated-8-lambda0.1-seed0 is listed twice"),
        ({"batch": 100, "streams": 8}, "batch: 100 is not a multiple of streams = 8"),
        ({"saes": [{**SAE, "arch": "topk"}]}, r"saes.0.arch: .*'sa-gsae' or 'gated' \(got 'topk'\)"),
        ({"saes": [{**SAE, "sparsity": 0}]}, r"saes.0.sparsity: .*greater than 0"),
        ({"lr": -1}, r"lr: .*greater than 0"),
    ],
)
def test_train_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(TrainConfig, {"store": "s", "saes": [SAE], **changes})


def test_toml_and_set(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('store = "s"\nlr = 0.1\n[[saes]]\narch = "gated"\nd_sae = 8\nsparsity = 0.1\n')
    values = {
        **read_toml(tmp_path / "run.toml"),
        **parse_set(["lr=0.2", "hook=layer_01/mlp_out", "exclude_special=false"]),
    }
    config = build(TrainConfig, values)
    assert (config.lr, config.hook, config.exclude_special, config.saes[0].d_sae) == (0.2, "layer_01/mlp_out", False, 8)
    (tmp_path / "bad.toml").write_text("lr = ")
    with pytest.raises(UserError, match="is not valid TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(UserError, match="cannot be read"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="expected key=value"):
        parse_set(["lr"])


def test_a_grid_of_autoencoders() -> None:
    grid = sae_grid(["sa-gsae", "gated:16"], [8], [0.1, 0.2], [0, 1])
    assert len(grid) == 8
    assert {(sae["arch"], sae["d_sae"]) for sae in grid} == {("sa-gsae", 8), ("gated", 16)}
    assert len(sae_grid([], [8], [], [])) == 5, "the default sparsities"
    with pytest.raises(UserError, match="how wide"):
        sae_grid(["gated"], [], [], [])
    with pytest.raises(UserError, match="expected ARCH or ARCH:WIDTH"):
        sae_grid(["gated:wide"], [], [], [])


def test_configurations_are_frozen_and_survive_json() -> None:
    config = demo_train(Path("demo"), "store")
    with pytest.raises(ValueError, match="frozen"):
        config.lr = 1.0  # type: ignore[misc]
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
