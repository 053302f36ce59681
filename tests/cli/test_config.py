"""What may be asked for, and what a person reads when it may not."""

from pathlib import Path
from typing import Any

import pytest

from shared.command import tables
from shared.config import HarvestConfig, TrainConfig, demo_train
from shared.errors import UserError
from shared.saes import sae_config, sae_grid
from shared.schema import build, parse_set, read_toml

SAE: dict[str, Any] = {"arch": "gated", "d_sae": 8, "sparsity": 0.1}


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown setting 'contxt': did you mean context\?"):
        build(HarvestConfig, {"model": "tiny", "contxt": 3})
    with pytest.raises(UserError, match=r"unknown setting 'zzz': valid keys: model, revision"):
        build(HarvestConfig, {"model": "tiny", "zzz": 3})
    with pytest.raises(UserError, match=r"unknown setting 'width': valid keys: arch, d_sae"):
        build(TrainConfig, {"store": "s", "saes": [{**SAE, "width": 3}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, r"tokens: must be 1 or more \(got 0\)"),
        ({"codec": "gzip"}, r"codec: must be zstd, lz4, none or int8 \(got 'gzip'\)"),
        ({"seed": -1}, r"seed: must be 0 or more"),
        ({"name": "../x"}, r"name: must begin with a letter or a digit"),
        ({"model": None}, r"model: must be text"),
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
        ({"saes": [{**SAE, "arch": "top"}]}, r"arch: 'top' is none of sa-gsae, gated, relu"),
        ({"saes": [{**SAE, "sparsity": -1}]}, r"sparsity: must be 0 or more"),
        ({"saes": [{**SAE, "d_sae": 0}]}, r"d_sae: must be 1 or more"),
        ({"saes": [{**SAE, "l0_target": 8}]}, r"l0_target: 8 of 8 latents cannot be active"),
        ({"saes": [{"arch": "batch-topk", "d_sae": 8, "k": 9}]}, r"k: 9 of 8 latents cannot be active"),
        ({"saes": [{**SAE, "k": 3}]}, r"unknown setting 'k'"),
        ({"lr": -1}, r"lr: must be above 0 \(got -1\)"),
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
    axes: dict[str, list[Any]] = {"d_sae": [8], "sparsity": [0.1, 0.2], "seed": [0, 1]}
    grid = sae_grid(["sa-gsae", "gated:16"], axes, {})
    assert len(grid) == 8
    assert {(sae["arch"], sae["d_sae"]) for sae in grid} == {("sa-gsae", 8), ("gated", 16)}
    assert len(sae_grid([], {"d_sae": [8]}, {})) == 5, "the default sparsities"
    mixed = sae_grid(["gated", "abs-topk"], {"d_sae": [8], "l0_target": [2], "k": [1, 2]}, {"theta0": 1.0})
    assert [{**sae} for sae in mixed] == [
        {"arch": "gated", "d_sae": 8, "l0_target": 2, "theta0": 1.0},
        {"arch": "abs-topk", "d_sae": 8, "k": 1},
        {"arch": "abs-topk", "d_sae": 8, "k": 2},
    ]
    refused: list[tuple[list[str], dict[str, list[Any]], dict[str, Any], str]] = [
        (["gated"], {}, {}, "how wide"),
        (["gated:x"], {"d_sae": [8]}, {}, "expected ARCH or ARCH:WIDTH"),
        (["gate"], {"d_sae": [8]}, {}, r"is none of sa-gsae.*Did you mean gated\?"),
        (["gated:0"], {}, {}, "--arch gated:0: the width must be 1 or more"),
        (["relu"], {"d_sae": [8]}, {"theta0": 1.0}, "--theta0: is for sa-gsae"),
        (["abs-topk"], {"d_sae": [8], "sparsity": [0.1]}, {}, "--sparsity: is for sa-gsae"),
    ]
    for archs, wanted, options, message in refused:
        with pytest.raises(UserError, match=message):
            sae_grid(archs, wanted, options)


def test_names_say_what_is_unusual() -> None:
    assert sae_config(**SAE).name == "gated-8-lambda0.1-seed0"
    assert sae_config(**SAE, theta0=1.6, aux=False).name == "gated-8-lambda0.1-seed0-aux-false-theta0-1.6"
    assert sae_config(arch="abs-topk", d_sae=8, k=2).name == "abs-topk-8-k2-seed0"
    assert sae_config(arch="sa-gsae", d_sae=8, l0_target=2, tie="none").name == "sa-gsae-8-l0-2-seed0-tie-none"
    config = demo_train(Path("x"), "s")
    assert build(TrainConfig, config.model_dump(mode="json")) == config


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        demo_train(Path("demo"), "store").lr = 1.0  # type: ignore[misc]


def test_a_long_path_above_a_table_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """People copy it."""
    path = f"evaluations/{'x' * 200}/measured.json"
    tables.print_table(path, [{"arch": "relu", "l0": 3.0}])
    said = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in said] == [path, "arch   l0", "relu  3.0"]
