"""Random damage to every file of a run: never a traceback, never a result of something else.

As it comes from disks and transfers (bytes), a checksum tells of everything but what docs/explanation/training.md
lists. As one who knows the format would do it (checksums made again), no value may end in a traceback, a hang or a wild
allocation; that what it says is true, no checksum can tell.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import rewrite, without
from support.runs import begun

from shared.command.tables import print_saes
from shared.config import EvalConfig, TrainConfig
from shared.errors import DamagedError, UserError
from shared.store.spec import seal
from train import load
from train.evaluate import evaluate
from train.report import write_report
from train.run import train as run_train
from train.runs.checkpoint import blake2b_of

Config = Callable[..., TrainConfig]
Case = tuple[int, Path]
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**400), 0.5, -0.0, 1e-320, 1e308, "", "x",
    "x" * 5000, "../../x", "\ud800", "0-4", "0-99999999999", [], {}, [[]], [None], {"a": 1}, [0, 0, 0], [[0, 0, 0]] * 4,
    [1e300], "nan",
)  # fmt: skip
UNSEALED = ("metrics.jsonl", "run.toml")
"""Of which no checksum tells."""
QUICK = 6
MANY = int(os.environ.get("SAGSAE_FUZZ_CASES", "2000"))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails what hangs."""

    def hung(*_: Any) -> None:
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Runs:
    """A finished run and one that was stopped a step before its end, sound; and a place for a damaged copy."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.finished = run_train(config.model_copy(update={"out": folder / "finished"})).run
        self.stopped = begun(config.model_copy(update={"out": folder / "stopped"}), config.tokens // config.batch - 1)  # type: ignore[operator]
        self.x = torch.randn(4, load(next((self.finished / "saes").iterdir())).d_in)
        self.sound = {run: self.results(run) for run in (self.finished, self.stopped)}

    def copy(self, run: Path) -> Path:
        place = self.folder / "copy"
        shutil.rmtree(place, ignore_errors=True)
        return Path(shutil.copytree(run, place))

    def results(self, run: Path) -> dict[str, Any]:
        """What each command gives on a sound run."""
        copy = self.copy(run)
        names = ("resume",) if run == self.stopped else ("eval", "train", "load", "report")
        return {name: self.command(name, copy) for name in names}

    def command(self, name: str, run: Path) -> Any:
        if name in ("resume", "train"):
            saes = run_train(self.config.model_copy(update={"out": run})).saes
            print_saes("", saes)
            trained = run.glob("saes/*/*.safetensors") if name == "resume" else ()
            weights = [path.read_bytes() for path in sorted(trained)]
            return json.dumps(saes), hashlib.sha256(b"".join(weights)).hexdigest()
        if name == "eval":
            results = evaluate(EvalConfig(run=run, ce=False, device="cpu")).results
            print_saes("", results["saes"])
            return json.dumps(results)
        if name == "report":
            write_report([run], run.parent / "report.html")
            return None  # what it shows of logs is not protected
        return [load(folder)(self.x).numpy().tobytes() for folder in sorted((run / "saes").iterdir())]


def bytes_damaged(data: bytes, rng: random.Random) -> bytes:
    """One of the ways of disks, of transfers and of editors."""
    at = rng.randrange(len(data)) if data else 0
    match rng.randrange(6):
        case 0:
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
        case 3:
            return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
        case 4:
            return data[:at] + data[at + rng.randrange(1, 20) :]
    return rng.choice([b"", b"{}", b"[]", b"null", b"[" * 200_000, b"\xff\xfe", data + data])


def value_damaged(value: Any, rng: random.Random) -> Any:
    """JSON of which something, at any depth, is another thing, or gone."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return without(key)(value)
        return {**value, key: value_damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], value_damaged(value[at], rng), *value[at + 1 :]]
    if type(value) in (int, float) and rng.random() < 0.5:
        third = value / 3 if abs(value) < 1e300 else value // 3  # of a huge integer there is no float
        return rng.choice([value + 1, -value, value * 1000, third, int(value)])
    return rng.choice(VALUES)


def reseal(run: Path) -> None:
    """Every checksum of a run, made anew."""
    for path in run.rglob("sae_weights.safetensors"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        again(path.with_name("cfg.json"), lambda about, digest=digest: {**about, "sha256": digest})  # type: ignore[misc]
    for path in run.rglob("state.json"):
        digests = [blake2b_of(part) for part in sorted(path.parent.glob("tensors-*"))]
        again(path, lambda state, digests=digests: {**state, "blake2b": digests} if "blake2b" in state else state)  # type: ignore[misc]
    for name in ("config.json", "record.json", "evaluation.json"):
        if (run / name).exists():
            again(run / name, lambda value: value)


def again(path: Path, change: Callable[[Any], Any]) -> None:
    try:
        rewrite(path, change)
        path.write_text(json.dumps(seal(json.loads(path.read_text()))))
    except (ValueError, RecursionError, TypeError, AttributeError):
        pass  # it is no JSON any more


def damage(run: Path, path: Path, sealed: bool, rng: random.Random) -> None:
    if sealed and path.suffix == ".json":
        value = json.loads(path.read_text())
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            value = value_damaged(value, rng)
        path.write_text(json.dumps(value))
    else:
        path.write_bytes(bytes_damaged(path.read_bytes(), rng))
    if sealed:
        reseal(run)


def one_case(runs: Runs, number: int) -> Iterator[str]:
    """What is wrong."""
    rng = random.Random(number)
    sealed, run = number % 2 == 0, rng.choice([runs.finished, runs.finished, runs.stopped])
    copy = runs.copy(run)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != ".lock")
    if run == runs.finished:
        files = [path for path in files if "checkpoints" not in path.parts]
    path = rng.choice(files)
    damage(copy, path, sealed, rng)
    what = f"case {number}: {path.relative_to(copy)}{', sealed again' if sealed else ''}"
    for name, sound in runs.sound[run].items():
        try:
            with within(60):
                found = runs.command(name, copy)
        except (UserError, DamagedError) as error:
            if len(str(error)) > 5000:
                yield f"{what}, {name}: a message of {len(str(error))} characters"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            yield f"{what}, {name}: {type(error).__name__} {str(error)[:200]} at {where.filename}:{where.lineno}"
        else:
            if not sealed and path.name not in UNSEALED and found != sound:
                yield f"{what}, {name}: another result"


@pytest.fixture
def runs(train_config: Config, tmp_path: Path) -> Runs:
    return Runs(train_config(tokens=64 * 14, track=()), tmp_path)


def test_fuzz_some_damage_to_a_run(runs: Runs) -> None:
    assert [problem for number in range(QUICK) for problem in one_case(runs, number)] == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fuzz_much_damage_to_a_run(runs: Runs) -> None:
    assert [problem for number in range(QUICK, QUICK + MANY) for problem in one_case(runs, number)] == []
