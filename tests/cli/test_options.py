"""Options come from the schemas: their help, their defaults, the reference pages and the names in errors."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_origin

import pytest
import typer
from support.command import ROOT, Sagsae

import cli
from harvest.serve.app import rest_document
from harvest.serve.rest.openapi import rest_page
from shared.command.commands import command, command_group, commands_of, help_of
from shared.command.grid import asked_saes
from shared.command.options import OptionsFrom, resolve
from shared.command.reference import cli_page, named_commands, settings_page
from shared.command.settings import AUTOENCODERS, SCHEMAS, all_settings, architectures, sae_settings, settings_of
from shared.config import HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.schema import Frozen, build

APP: Any = typer.main.get_command(cli.app)
COMMANDS = dict(named_commands(APP))
SCHEMAS_AND_ARCHITECTURES = {**SCHEMAS, **architectures()}
STATED = re.compile(r"\[(default: .+|required)\]")
WITHOUT_DEFAULT = {"--config", "--set", "--help", "--version"}


def entries(text: str) -> dict[str, str]:
    """Options of a help text with what is said of each."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if start := re.match(r"  (--\S+)", line):
            name = start[1].rstrip(",")
            found[name] = [line]
        elif name and line.startswith(" " * 20):
            found[name].append(line.strip())
        else:
            name = ""
    return {name: " ".join(lines) for name, lines in found.items()}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_states_its_default(name: str) -> None:
    found = entries(help_of(COMMANDS[name], name, 100))
    assert [option for option, text in found.items() if option not in WITHOUT_DEFAULT and not STATED.search(text)] == []


def test_what_help_says_is_what_a_schema_holds() -> None:
    found = entries(help_of(COMMANDS["sagsae train"], "sagsae train", 100))
    for each in settings_of(TrainConfig):
        if each.key not in (AUTOENCODERS, "store"):
            default = TrainConfig.model_fields[each.key].default
            text = found[each.left.split(" ")[0]]
            assert " ".join(each.help.split()) in " ".join(text.split()), each.key
            if isinstance(default, int | float | str) and not isinstance(default, bool):
                assert f"[default: {default:g}]" in text if isinstance(default, float) else f"{default}]" in text
    assert "[required]" in found["--store"]
    assert "[default: 0.1, 0.15, 0.22, 0.33, 0.5; jumprelu: 0.001, 0.002, 0.005, 0.01, 0.02]" in found["--sparsity"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_fits_the_terminal(width: int) -> None:
    for name in ("sagsae", "sagsae train", "sagsae harvest"):
        lines = help_of(COMMANDS[name], name, width).splitlines()
        assert max(map(len, (line for line in lines if not line.startswith("  $ ")))) <= width


@pytest.mark.parametrize("name", list(SCHEMAS_AND_ARCHITECTURES))
def test_every_field_has_a_meaning_a_default_and_one_place(name: str) -> None:
    schema = SCHEMAS_AND_ARCHITECTURES[name]
    settings = settings_of(schema)
    assert sorted(each.key for each in settings) == sorted(schema.model_fields)
    for each in settings:
        field = schema.model_fields[each.key]
        assert each.meaning, f"{name}: {each.key} has no docstring"
        assert (each.default is None) == field.is_required(), each.key
        assert each.default != "none" or get_origin(each.annotation) is tuple or name in architectures(), (
            f"{name}: {each.key} is None by default; say what that stands for: Default: …"
        )
        assert "Default:" not in each.meaning + each.details
    if schema.groups:
        assert [key for keys in schema.groups.values() for key in keys.split()] == [each.key for each in settings]


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "rest-api.md"])
def test_the_reference_is_what_the_schemas_say(name: str) -> None:
    pages: dict[str, Callable[[], str]] = {
        "settings.md": settings_page,
        "cli.md": partial(cli_page, APP),
        "rest-api.md": partial(rest_page, rest_document()),
    }
    page = pages[name]()
    assert (ROOT / "docs/reference" / name).read_text(encoding="utf-8") == page, "run: make reference"
    assert max(map(len, page.splitlines())) <= 120


def test_every_setting_can_be_an_option() -> None:
    for name, schema in SCHEMAS.items():
        found: Any = APP
        for word in name.split():
            found = commands_of(found)[word]
        typed = {
            each.name for each in found.make_context(name, [], resilient_parsing=True).command.options_from.options
        }
        names = {each.name for each in settings_of(schema) if not each.is_argument and each.key != AUTOENCODERS}
        assert names <= typed, name
        parameters = [each.name for each in found.get_params(found.make_context(name, [], resilient_parsing=True))]
        assert len(set(parameters)) == len(parameters), f"{name}: two options have the same name"
    options = OptionsFrom("train", config=True)
    assert {each.name for each in sae_settings()} < {each.name for each in options.options}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip-norm", "-1"], "error: --clip-norm: must be above 0 (got -1.0)\n"),
        (["--clip-norm", "x"], "error: --clip-norm: must be a number (got 'x')\n"),
        (["--batch", "1.5"], "error: --batch: must be a whole number (got '1.5')\n"),
        (["--batch", "100"], "error: --batch: 100 is not a multiple of streams = 8\n"),
        (["--checkpoint-every", "0"], "error: --checkpoint-every: must be 1 or more, or auto (got 0)\n"),
        (["--checkpoint-every", "never"], "error: --checkpoint-every: must be a whole number, or auto (got 'never')\n"),
        (["--precision", "fp8"], "error: --precision: must be auto, float32, tf32 or bfloat16 (got 'fp8')\n"),
        (["--memory", "much"], "error: --memory: "),
        (["--data-seed", "-1"], "error: --data-seed: must be 0 or more (got -1)\n"),
        (["--track", "paper"], "error: --track: must be tensorboard or wandb (got 'paper')\n"),
        (["--theta0", "-3"], "error: --theta0: must be 0 or more (got -3.0)\n"),
        (["--seed", "-1"], "error: --seed: must be 0 or more (got -1)\n"),
        (["--arch", "gated:8"], "error: --arch: gated-8-lambda0.1-seed0 is listed twice"),
        (["--set", "clip_norm=-1"], "error: --set clip_norm: must be above 0 (got -1)\n"),
        (
            ["--set", "arch=topk"],
            "error: --set arch: is a setting of the autoencoders. Give --arch ARCH[:WIDTH], or put it into saes\n",
        ),
        (["--set", "clip_nrm=1"], "error: --set: unknown setting 'clip_nrm': did you mean clip_norm?\n"),
        (["--set", 'saes=[{"arch": "gated", "d_sae": 0}]'], "error: --set saes.0.d_sae: must be 1 or more (got 0)\n"),
        (["--config", "run.toml"], "error: run.toml: lr: must be above 0 (got -0.5)\n"),
        (["--config", "run.toml", "--lr", "0.1"], "error: run.toml: unknown setting 'tokns': did you mean tokens?\n"),
    ],
)
def test_an_error_names_what_was_typed(
    sagsae: Sagsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("tokns = 5\nlr = -0.5\n")
    done = sagsae("train", "--store", "s", "--arch", "gated:8", *arguments)
    assert (done.returncode, done.stderr[: len(message)]) == (2, message)


def test_a_file_names_its_autoencoders(sagsae: Sagsae, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('store = "s"\n[[saes]]\narch = "gated"\nd_sae = 8\ntheta0 = -1\n')
    assert sagsae("train", "--config", file).stderr == f"error: {file}: saes.0.theta0: must be 0 or more (got -1)\n"


def test_options_win_over_the_file_and_set_over_both(tmp_path: Path) -> None:
    file = tmp_path / "synth.toml"
    file.write_text("d_in = 8\nfeatures = 50\nzipf = 0.6\n")
    app, seen = command_group(), []

    @command(app, settings=OptionsFrom("synth", config=True))
    def probe(context: typer.Context) -> None:
        seen.append(resolve(context))

    words = ["--config", str(file), "--d-in", "32", "--coefficients", "1", "2", "--features", "40", "--set", "d_in=16"]
    app(words, standalone_mode=False)
    assert (seen[0].d_in, seen[0].features, seen[0].zipf, seen[0].coefficients) == (16, 40, 0.6, (1.0, 2.0))
    assert seen[0].noise == 0.01


@pytest.mark.parametrize("name", list(SCHEMAS_AND_ARCHITECTURES))
def test_settings_are_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["settings", *name.split(), "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)
    schema: type[Frozen] = SCHEMAS_AND_ARCHITECTURES[name]
    assert {row["setting"] for row in rows} == set(schema.model_fields)
    assert all(set(row) >= {"option", "type", "default", "required", "meaning"} for row in rows)
    cli.app(["settings", *name.split()], standalone_mode=False)
    said = capsys.readouterr().out
    assert all(row["setting"] in said for row in rows)


def test_settings_of_what_has_none() -> None:
    with pytest.raises(UserError, match=r"models: has no settings\. Those that have are harvest, request,"):
        all_settings("models")


def test_switches_have_both_forms_where_they_are_on_by_default() -> None:
    forms = {each.key: each.left for each in (*settings_of(HarvestConfig), *sae_settings())}
    assert (forms["shuffle_documents"], forms["overwrite"]) == ("--[no-]shuffle-documents", "--overwrite")
    assert (forms["aux"], forms["one_sided"]) == ("--[no-]aux", "--one-sided")


def test_autoencoders_that_options_name() -> None:
    assert asked_saes({}, {}) is None
    grid = asked_saes({"arch": ["gated:8"], "sparsity": [0.1], "aux": False}, {})
    assert grid == [{"arch": "gated", "d_sae": 8, "sparsity": 0.1, "aux": False}]
    for typed, message in (
        ({"theta0": 1.0}, "--theta0: belongs to autoencoders"),
        ({"expansion": [2.0]}, "say which with --store"),
        ({"arch": ["gated:8"], "sparsity": [-1.0]}, r"--sparsity: must be 0 or more \(got -1.0\)"),
        ({"arch": ["gated:8"], "k": [2]}, "--k: is for batch-topk, abs-topk, topk"),
    ):
        with pytest.raises(UserError, match=message):
            asked_saes(typed, {})


def test_labels_are_used_where_they_are_given() -> None:
    with pytest.raises(UserError, match=r"^--layer: must be a layer number from 0, or mid \(got 'x'\)$"):
        build(HarvestConfig, {"model": "tiny", "layers": ["x"]}, {"layers": "--layer"})
    with pytest.raises(UserError, match=r"^layers\.0: must be a layer number"):
        build(HarvestConfig, {"model": "tiny", "layers": ["x"]})
    with pytest.raises(UserError, match=r"^run.toml: hooks: must be a list \(got 5\)$"):
        build(HarvestConfig, {"model": "tiny", "hooks": 5}, {"hooks": "run.toml: hooks"})


def test_every_command_prints_json() -> None:
    for name, each in COMMANDS.items():
        if not commands_of(each):
            assert "--json" in entries(help_of(each, name, 100)), name
