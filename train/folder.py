"""A run's folder: what is in it and whether it belongs to the run that is asked for.

config.json      what decides the result: the configuration, the snapshot of the store, the precision
record.json      what produced it: command, versions, device, times; "finished" appears when it is
metrics.jsonl    a line every `log_every` steps
checkpoints/     the newest two states, from which an interrupted run goes on
saes/NAME/       each trained autoencoder; evaluation.json what they are worth
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.config import TrainConfig, build
from shared.errors import UserError
from shared.manifest import LOCK_FILE, write_file
from shared.record import write_json

FREE: Final = {"out", "overwrite", "device", "store", "hook", "log_every", "checkpoint_every"}
"""Settings that may differ when a run goes on: they do not change what is trained."""
BEGINNINGS: Final = {LOCK_FILE, "record.json"}
"""What a run that was killed before it began may leave behind."""


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
        return (self.path / "config.json").is_file()

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
        return self.exists() and "finished" in self.read("record.json")

    def make(self) -> None:
        """The empty folder. Raises UserError when it cannot be made, or when something else is there."""
        if self.path.exists() and not self.exists() and any(p.name not in BEGINNINGS for p in self.path.iterdir()):
            raise UserError(f"{self.path}: exists and is not a training run. Choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / LOCK_FILE).touch()
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written to ({error.strerror})") from error

    def begin(self, identity: dict[str, Any], record: dict[str, Any]) -> None:
        """The run exists when config.json does, which is written last."""
        write_json(self.path / "record.json", record)
        write_json(self.path / "config.json", identity)

    def clear(self) -> None:
        """Deletes what is in the folder, config.json last: until then it is a run that --overwrite can clear."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == "config.json"):
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_same(self, identity: dict[str, Any]) -> None:
        """Raises UserError naming every setting in which the run that is here differs from the one asked for."""
        here = self.read("config.json")
        keys = [key for key in identity if key not in FREE and here.get(key) != identity[key]]
        if keys:
            differ = "; ".join(f"{key}: the run has {here.get(key)}, this asks for {identity[key]}" for key in keys)
            raise UserError(
                f"{self.path}: holds a run with other settings. {differ}. Choose another --out, or start afresh with "
                "--overwrite"
            )

    def cut_metrics(self, step: int) -> None:
        """Forgets what was logged after `step`: those steps are about to be repeated."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_file(self.metrics, "".join(kept).encode())

    def log(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
