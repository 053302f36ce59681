"""A run's folder: what is in it and whether it belongs to the run that is asked for.

run.toml         the settings, for `sagsae train --config`
config.json      what decides the result: the configuration, the snapshot of the store, the precision
record.json      what produced it: command, versions, device, times; "finished" appears when it is, and "diverged": at
                 which step the loss of an autoencoder was seen to be no number any more, if one's was
metrics.jsonl    a line every `log_every` steps, of the autoencoders of one wave; "wave" counts from 1
segments.jsonl   with --follow: which shards were read in which pass
checkpoints/     the newest two states, from which an interrupted run goes on; in each, saes/NAME as it was then
saes/NAME/       each trained autoencoder; evaluation.json what they are worth
tensorboard/ wandb/   with --track: what the trackers were told
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomli_w

from shared.config import TrainConfig
from shared.errors import UserError
from shared.files import LOCK_FILE, check_removable, remove_tree, touch, write_file
from shared.handles import open_regular
from shared.record import to_json, write_json
from shared.schema import build

FREE: Final = {
    "out", "parallel", "overwrite", "device", "store", "verify", "log_every", "checkpoint_every", "memory", "track"
}  # fmt: skip
"""Settings that may differ when a run goes on: they do not change what is trained."""
OURS: Final = {
    LOCK_FILE,
    "run.toml",
    "config.json",
    "record.json",
    "metrics.jsonl",
    "evaluation.json",
    "checkpoints",
    "saes",
    "segments.jsonl",
    "tensorboard",
    "wandb",
}
"""All that a run puts into its folder, and all that is ever deleted there."""


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    def sae(self, name: str) -> Path:
        return self.path / "saes" / name

    def exists(self) -> bool:
        """Whether a run was begun here: a config.json alone may be anybody's."""
        try:
            found = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and {"snapshot", "saes"} <= set(found)

    def read(self, name: str) -> dict[str, Any]:
        """config.json or record.json. Raises UserError when this is no run."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: is not a training run ({name} cannot be read). Make one with: sagsae train"
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: is not a training run ({name} holds no object)")
        return value

    def config(self) -> TrainConfig:
        values = self.read("config.json")
        return build(TrainConfig, {key: values[key] for key in TrainConfig.model_fields if key in values})

    def finished(self) -> bool:
        return self.exists() and self.evaluation.is_file() and "finished" in self.read("record.json")

    def make(self) -> None:
        """The folder. Raises UserError when it cannot be made or written to, or when something else is there."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file. Choose another --out")
        if self.path.exists() and not self.exists() and self.strangers():
            raise UserError(f"{self.path}: exists and is not a training run. Choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            touch(self.path / LOCK_FILE)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written to ({error.strerror})") from error

    def strangers(self) -> list[str]:
        """Names in the folder that no run puts there."""
        return [path.name for path in self.path.iterdir() if path.name not in OURS and path.suffix != ".tmp"]

    def begin(self, config: TrainConfig, identity: dict[str, Any], record: dict[str, Any]) -> None:
        """The run exists when config.json does, which is written last."""
        settings = config.model_dump(mode="json", exclude_none=True, exclude={"out", "overwrite"})
        write_file(self.path / "run.toml", tomli_w.dumps(settings).encode())
        write_json(self.path / "record.json", record)
        write_json(self.path / "config.json", identity)

    def clear(self) -> None:
        """Deletes what a run put here, config.json first: then the rest is only what a run left behind."""
        paths = [self.path / name for name in ("config.json", *sorted(OURS - {LOCK_FILE, "config.json"}))]
        check_removable(path for path in paths if os.path.lexists(path))
        for path in paths:
            remove_tree(path)

    def tidy(self) -> None:
        """Deletes what was being written when an earlier process was killed."""
        for leftover in self.path.rglob("*.tmp"):
            leftover.unlink()
        for leftover in self.checkpoints.glob("building.*"):
            shutil.rmtree(leftover)

    def check_same(self, identity: dict[str, Any]) -> None:
        """Raises UserError naming every setting in which the run that is here differs from the one asked for."""
        here = self.read("config.json")
        differ = [
            each for key in identity if key not in FREE for each in differences(key, here.get(key), identity[key])
        ]
        if differ:
            raise UserError(
                f"{self.path}: holds a run with other settings. {'; '.join(differ)}. Choose another --out, or start "
                "afresh with --overwrite"
            )

    def cut_metrics(self, wave: int, step: int) -> None:
        """Forgets what was logged after `step` of a wave: those steps are about to be repeated."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_bytes().splitlines(keepends=True):
            try:
                logged = json.loads(line)
                if (logged["wave"], logged["step"]) > (wave, step) or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break  # torn by a crash
            kept.append(line)
        write_file(self.metrics, b"".join(kept))

    def log(self, line: dict[str, Any]) -> None:
        with open(open_regular(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")


def differences(name: str, here: Any, asked: Any) -> Iterator[str]:
    """Where two values of a setting differ, in autoencoders field by field."""
    if isinstance(here, dict) and isinstance(asked, dict):
        for key in {**here, **asked}:
            yield from differences(f"{name}.{key}", here.get(key), asked.get(key))
    elif name == "saes" and here and len(here) == len(asked):
        for number, both in enumerate(zip(here, asked, strict=True)):
            yield from differences(f"{name}[{number}]", *both)
    elif name == "saes":
        yield f"saes: the run has {len(here or [])} autoencoders, this asks for {len(asked)}"
    elif here != asked:
        yield f"{name}: the run has {here}, this asks for {asked}"
