"""What a run tells experiment trackers, and what a terminal shows of it: the numbers of metrics.jsonl, nothing sent."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.command import ROOT, Sagsae
from support.folders import rewrite
from support.runs import unfinished_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

import train.run
from shared.config import TrainConfig
from shared.errors import UserError
from shared.progress import progress
from shared.store.opened import Store
from train.run import train as run_train
from train.runs.folder import read_sealed
from train.runs.live_table import LiveTable

Config = Callable[..., TrainConfig]
BESIDE = {"tokens_per_second", "waiting_for_data"}
"""What trackers are told and metrics.jsonl does not hold."""


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl by name of a number: (step, value) in order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        values = {key: value for key, value in line.items() if key not in ("step", "saes")}
        for name, metrics in line["saes"].items():
            values |= {f"{name}/{key}": value for key, value in metrics.items()}
        for key, value in values.items():
            found.setdefault(key, []).append((line["step"], float(np.float32(value))))
    return found


def events(run: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """What TensorBoard shows of a run: its numbers, and its configuration."""
    seen = EventAccumulator(str(run / "tensorboard")).Reload()
    text = seen.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    numbers = {tag: [(event.step, event.value) for event in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}
    return numbers, json.loads(text.removeprefix("```json").removesuffix("```"))


def check_events(run: Path, steps: list[int]) -> None:
    numbers, config = events(run)
    assert {key: value for key, value in numbers.items() if key not in BESIDE} == logged(run)
    assert {"sa-gsae-48-lambda0.2-seed0/fvu", "gated-48-lambda0.2-seed0/l0", "lr", "seconds"} < set(numbers)
    for key in BESIDE:
        assert [step for step, _ in numbers[key]] == steps
    assert all(value > 0 for _, value in numbers["tokens_per_second"])
    assert all(0 <= value <= 1 for _, value in numbers["waiting_for_data"])
    assert config == read_sealed(run / "config.json")


def test_tensorboard_has_what_metrics_has(train_config: Config) -> None:
    check_events(run_train(train_config(track=("tensorboard",))).run, [5, 10, 15, 20])


def fail_after(step: int, patch: pytest.MonkeyPatch) -> None:
    agree = train.run.agree

    def failing(stop: bool, done: int, ranks: Any) -> bool:
        if done == step:
            raise RuntimeError("power cut")
        return agree(stop, done, ranks)

    patch.setattr(train.run, "agree", failing)


def test_tensorboard_after_a_run_that_went_on(train_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines after the checkpoint are made anew, and TensorBoard shows the new ones only."""
    config = train_config(track=("tensorboard",))
    with monkeypatch.context() as patch:
        fail_after(13, patch)
        with pytest.raises(RuntimeError, match="power cut"):
            run_train(config)
    assert [step for step, _ in events(config.out)[0]["lr"]] == [5, 10]  # type: ignore[arg-type]
    check_events(run_train(config).run, [5, 10, 15, 20])


def test_trackers_are_no_part_of_what_a_run_is(train_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may come in when a run goes on, change nothing that is trained, and end with --overwrite."""
    weights = {}
    for track in ((), ("tensorboard",)):
        with monkeypatch.context() as patch:
            fail_after(13, patch)
            with pytest.raises(RuntimeError):
                run_train(train_config())
        run = run_train(train_config(track=track)).run
        weights[track] = {path.name: path.read_bytes() for path in run.rglob("sae_weights.safetensors")}
        assert (run / "tensorboard").exists() == bool(track)
        if track:
            assert [step for step, _ in events(run)[0]["lr"]] == [10, 15, 20]
        run_train(train_config(overwrite=True))
        assert not (run / "tensorboard").exists()
        shutil.rmtree(run)
    assert weights[()] == weights[("tensorboard",)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing(train_config: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(package: str) -> str:
        if package == name:
            raise metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(metadata, "version", without)
    config = train_config(track=(name,))
    with pytest.raises(UserError, match=rf"--track {name}: the package is not installed. pip install {name}"):
        run_train(config)
    assert config.out is not None
    assert not config.out.exists()


def test_a_run_that_could_never_learn_is_not_tracked(train_config: Config) -> None:
    saes = tuple(sae.model_copy(update={"theta0": 1e6}) for sae in train_config().saes[:1])
    config = train_config(saes=saes, track=("tensorboard", "wandb"))
    with pytest.raises(UserError, match="closes every latent"):
        run_train(config)
    assert config.out is not None
    assert [path.name for path in config.out.iterdir()] == [".lock"]


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Stands between any other process and the world; the first bytes of everything that is asked of it."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    asked.append(connection.recv(200))

        threading.Thread(target=serve, daemon=True).start()
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for spelt in (name, name.lower()):
                monkeypatch.setenv(spelt, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy", "WANDB_MODE", "WANDB_ERROR_REPORTING", "WANDB_PROJECT", "WANDB_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        yield asked
        server.shutdown(socket.SHUT_RDWR)


def wandb_records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file: after 7 bytes, blocks of 32 KiB of pieces (crc32, length, kind: 1 a whole record,
    4 the last piece of one)."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def test_wandb_is_offline_and_one_run(sagsae: Sagsae, store: Store, tmp_path: Path, proxy: list[bytes]) -> None:
    """In processes of their own, with every request of theirs caught: none is made, nobody is asked to log in."""
    run = tmp_path / "run"
    command = ["train", "--store", store.root, "--hook", "mlp_out", "--arch", "sa-gsae:48", "--sparsity", "0.2",
               "--batch", 64, "--tokens", 64 * 20, "--device", "cpu", "--set", "log_every=5", "--track", "wandb",
               "--set", "keep_checkpoints=true", "--out", run, "--json"]  # fmt: skip
    done = sagsae(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 20
    assert "wandb sync" in done.stderr
    assert "log in" not in done.stderr.lower()
    unfinished_run(run)
    for path in (run / "checkpoints").iterdir():
        rewrite(path / "state.json", lambda state: {**state, "step": 12})
    again = sagsae(*command)
    assert again.returncode == 0, again.stderr
    assert proxy == []
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1, "two parts of one run"
    first, second = (list(wandb_records(next(folder.glob("*.wandb")))) for folder in folders)
    assert history(first).keys() == {5, 10, 15, 20}
    assert history(second).keys() == {15, 20}
    for key, values in logged(run).items():
        for step, value in values:
            found = history(second if step > 12 else first)[step][key]
            assert math.isclose(found, value, rel_tol=1e-6), (key, step)
    config = {item.key: json.loads(item.value_json) for record in second for item in record.config.update}
    assert config.items() >= read_sealed(run / "config.json").items()


def history(records: list[Record]) -> dict[int, dict[str, float]]:
    return {
        record.history.step.num: {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    }


def line(step: int, **saes: float) -> dict[str, Any]:
    """As of metrics.jsonl, with a loss for each autoencoder."""
    metrics = {"fvu": 0.25, "aux_fvu": 0.5, "l0": 12.34, "dead_fraction": 0.125, "lambda": 0.2, "sparse": False}
    return {
        "step": step, "tokens": 64 * step, "epoch": 0.5, "lr": 5e-3, "seconds": 1.0, "tokens_per_second": 12345.6,
        "waiting_for_data": 0.034, "saes": {name: {"loss": loss, **metrics} for name, loss in saes.items()},
    }  # fmt: skip


def drawn(table: LiveTable, height: int = 30) -> list[str]:
    console = Console(width=90, height=height, record=True, file=io.StringIO())
    console.print(table)
    return [text.rstrip() for text in console.export_text().splitlines()]


def test_the_live_table() -> None:
    table = LiveTable(["good", "bad"], 2000)
    assert drawn(table) in ([], [""]), "nothing is known yet"
    table.update(line(1000, good=1.0, bad=2.0))
    title, header, good, bad = drawn(table)
    assert title == "step 1,000 of 2,000, epoch 0.50, lr 0.005, 12,346 tokens/s, 3.4% waiting for data"
    assert header.split() == ["autoencoder", "R²", "L0", "dead", "λ"]
    assert good.split() == ["good", "0.7500", "12.3", "12.5%", "0.2"]
    assert bad.split() == ["bad", *good.split()[1:]]


def test_the_live_table_shows_what_diverged() -> None:
    table = LiveTable(["good", "bad"], 2000)
    for step, losses in ((50, {"good": 1.0, "bad": math.nan}), (100, {"good": 1.0})):
        table.update(line(step, **losses))
        *_, good, bad = drawn(table)
        assert "diverged" not in good
        assert bad.split() == ["bad", "–", "–", "–", "–", "diverged", "by", "step", "50"], step
    went_on = LiveTable(["good", "bad"], 2000)
    went_on.update(line(150, good=1.0))
    assert drawn(went_on)[-1].split() == ["bad", "–", "–", "–", "–", "diverged"]


def test_the_live_table_fits_the_screen() -> None:
    names = [f"sae{n}" for n in range(40)]
    table = LiveTable(names, 2000)
    table.update(line(50, **dict.fromkeys(names, 1.0)))
    seen = drawn(table, height=20)
    assert len(seen) <= 19, "the bar and the table"
    assert seen[-1] == "and 26 more"


def test_no_terminal_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = LiveTable(["good"], 2000)
    table.update(line(50, good=1.0))
    with progress("train", 10, "steps", below=table) as advance:
        advance(10, "")
    assert capsys.readouterr().err == ""


def test_a_terminal_has_the_table_under_the_bar(store: Store, tmp_path: Path) -> None:
    arguments = ["train", "--store", store.root, "--hook", "mlp_out", "--arch", "sa-gsae:48", "--sparsity", "0.2",
                 "--batch", 64, "--tokens", 64 * 20, "--device", "cpu", "--set", "log_every=5", "--json",
                 "--out", tmp_path / "run"]  # fmt: skip
    screen, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=terminal, env={**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(screen, 4096):
            shown += part
    os.close(screen)
    assert process.stdout is not None
    with process.stdout:
        document = process.stdout.read()
    assert process.wait() == 0
    assert json.loads(document)["steps"] == 20, "stdout holds the document alone"
    newest = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    values = json.loads(newest)["saes"]["sa-gsae-48-lambda0.2-seed0"]
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    assert "step 20 of 20, epoch" in text
    row = rf"sa-gsae-48-lambda0.2-seed0 +{1 - values['fvu']:.4f} +{values['l0']:.1f} "
    assert re.search(rf"train .*100%.*tokens/s.*\s+step 20 of 20.*\s+autoencoder .*\s+{row}", text)
