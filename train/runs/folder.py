"""A run's folder: what is in it and whether it belongs to the run that is asked for.

run.toml         the settings, for `sagsae train --config`
config.json      what decides the result: the configuration, the rows that are read, the precision
record.json      what produced it: command, versions, device, times; "finished" appears when it is, and "diverged": at
                 which step the loss of an autoencoder was seen to be no number any more, if one's was
metrics.jsonl    a line every `log_every` steps, of the autoencoders of one wave; "wave" counts from 1
segments.jsonl   with --follow: which shards were read in which pass
checkpoints/     the newest two states, from which an interrupted run goes on; in each, saes/NAME as it was then. They
                 are removed when the run is finished, unless keep_checkpoints is set
saes/NAME/       each trained autoencoder; evaluation.json what they are worth
tensorboard/ wandb/   with --track: what the trackers were told

JSON of a run carries a crc32c of what it says ("crc32c"), but for metrics.jsonl. A run that cannot be read is damaged,
never absent: nothing is deleted unless --overwrite asks for it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomli_w

from shared.config import TrainConfig
from shared.errors import DamagedError, UserError
from shared.files.base import WHOLE_BYTES
from shared.files.handles import open_regular
from shared.files.local import check_removable, read_whole, remove_tree, sync, touch, write_file
from shared.files.locks import LOCK_FILE
from shared.gate import SMALL, BadData, parse_json, quoted
from shared.record import finite, sealed_json, to_json
from shared.schema import build
from shared.store.spec import is_sealed
from train.runs import checkpoint

FREE: Final = {
    "out", "parallel", "overwrite", "device", "store", "verify", "log_every", "checkpoint_every", "keep_checkpoints",
    "memory", "track",
}  # fmt: skip
"""Settings that may differ when a run goes on: they do not change what is trained."""
CLEARING: Final = "being-cleared"
"""There from the moment at which a run's config.json is given up until all of the run is."""
OURS: Final = {
    LOCK_FILE,
    CLEARING,
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
RESULTS: Final = ("evaluation.json", "saes", "checkpoints")
"""What is worth something by itself."""
INSIDE: Final = {
    "saes": r"[^/]+(/(sae_weights\.safetensors|cfg\.json)(\.\d+\.tmp)?)?",
    "checkpoints": r"((damaged\.|replaced\.)?step-\d+|building)(/(state\.json|tensors-\d+\.safetensors)(\.\d+\.tmp)?"
    r"|/saes(/[^/]+(/(sae_weights\.safetensors|cfg\.json)(\.\d+\.tmp)?)?)?)?",
}
"""What a run puts into these folders, as patterns of paths in them."""
CURE: Final = "Restore it from a copy, or start afresh with --overwrite"


def read_sealed(path: Path) -> dict[str, Any]:
    """An object of JSON, without its checksum. A file of an earlier sagsae has none. Raises BadData for anything else,
    FileNotFoundError when there is none."""
    try:
        data = read_whole(path, SMALL)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(error)) from error
    except OSError as error:
        raise BadData(f"cannot be read ({error.strerror})") from error
    except DamagedError as error:
        raise BadData(f"is no ordinary file of at most {SMALL >> 20} MiB") from error
    value = parse_json(data)
    if not isinstance(value, dict):
        raise BadData(f"is {quoted(value)} instead of an object")
    if "crc32c" in value and not is_sealed(value):
        raise BadData("was altered: its checksum does not match")
    return {key: item for key, item in value.items() if key != "crc32c"}


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all; null for NaN and infinities, which JSON does not have."""
    write_file(path, sealed_json(finite(value)))


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

    def identity(self) -> dict[str, Any] | None:
        """config.json of the run that was begun here; None when there is no run (a config.json alone may be anybody's).
        Raises DamagedError for a run whose config.json is gone, or was altered."""
        try:
            found = read_sealed(self.path / "config.json")
        except FileNotFoundError:
            if any(map(self.holds, RESULTS)) and not (self.path / CLEARING).exists():
                raise DamagedError(f"{self.path}: holds results of a run, but no config.json. {CURE}") from None
            return None
        except BadData as error:
            if not self.may_be_a_run():
                return None
            raise self.damaged("config.json", error) from error
        if {"snapshot", "saes"} <= set(found):
            return found
        if any(map(self.holds, RESULTS)) and self.may_be_a_run():
            raise self.damaged("config.json", "lacks what the run read")
        return None

    def exists(self) -> bool:
        """Whether a run was begun here. Raises DamagedError as `identity` does."""
        return self.identity() is not None

    def holds(self, name: str) -> bool:
        path = self.path / name
        return path.is_file() or (path.is_dir() and any(path.iterdir()))

    def may_be_a_run(self) -> bool:
        """Nothing is here but what a run puts here, and more than a config.json."""
        return (self.holds("run.toml") or self.holds("record.json")) and not self.strangers()

    def damaged(self, name: str, why: object) -> DamagedError:
        return DamagedError(f"{self.path / name}: {why}. {CURE}")

    def read(self, name: str) -> dict[str, Any]:
        """config.json, record.json or evaluation.json. Raises UserError when this is no run, DamagedError when the file
        is gone or was altered."""
        identity = self.identity()
        if identity is None:
            raise UserError(f"{self.path}: is not a training run. Make one with: sagsae train")
        if name == "config.json":
            return identity
        try:
            return read_sealed(self.path / name)
        except FileNotFoundError:
            raise self.damaged(name, "is missing") from None
        except BadData as error:
            raise self.damaged(name, error) from error

    def config(self) -> TrainConfig:
        values = self.read("config.json")
        try:
            return build(TrainConfig, {key: values[key] for key in TrainConfig.model_fields if key in values})
        except UserError as error:
            raise self.damaged("config.json", error) from error

    def finished(self) -> bool:
        """A finished run stays one without its evaluation.json, which `sagsae eval` writes anew."""
        return self.exists() and "finished" in self.read("record.json")

    def make(self, overwrite: bool = False) -> None:
        """The folder. Raises UserError when it cannot be made or written to, or when something else is there,
        DamagedError when a damaged run is and is not to be overwritten."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file. Choose another --out")
        try:
            ours = self.exists() or not (self.strangers() or self.holds("config.json"))
        except DamagedError:
            if not overwrite or self.strangers():
                raise
            ours = True
        if not ours:
            raise UserError(f"{self.path}: exists and is not a training run. Choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            touch(self.path / LOCK_FILE)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written to ({error.strerror})") from error

    def strangers(self) -> list[str]:
        """Names in the folder that no run puts there."""
        if not self.path.is_dir():
            return []
        return [path.name for path in self.path.iterdir() if path.name not in OURS and not is_leftover(path.name)]

    def strangers_inside(self) -> list[str]:
        """Paths in what `clear` would delete that no run puts there. Trackers' folders are the trackers'."""
        found = []
        for name, pattern in INSIDE.items():
            root = self.path / name
            if root.is_dir():
                paths = (path.relative_to(root).as_posix() for path in root.rglob("*"))
                found += [f"{name}/{path}" for path in paths if not re.fullmatch(pattern, path)]
        return sorted(found)

    def begin(self, config: TrainConfig, identity: dict[str, Any], record: dict[str, Any]) -> None:
        """The run exists when config.json does, which is written last."""
        settings = config.model_dump(mode="json", exclude_none=True, exclude={"out", "overwrite"})
        write_file(self.path / "run.toml", tomli_w.dumps(settings).encode())
        write_sealed(self.path / "record.json", record)
        write_sealed(self.path / "config.json", identity)

    def clear(self) -> None:
        """Deletes what a run put here, config.json first: then the rest is only what a run left behind. Of a link, the
        link. Raises UserError, before anything is deleted, when something else is in there."""
        others = [path for path in self.strangers_inside() if not (self.path / path.split("/")[0]).is_symlink()]
        if others:
            raise UserError(
                f"{self.path}: {others[0]} was not put there by a run, and would be deleted with it. Move it away, or "
                "choose another --out"
            )
        here = [self.path / name for name in sorted(OURS - {LOCK_FILE, CLEARING, "config.json"})]
        here = [path for path in here if os.path.lexists(path)]
        check_removable(here)
        with contextlib.suppress(FileNotFoundError):
            (self.path / "config.json").rename(self.path / CLEARING)
            sync(self.path)
        if here and not (self.path / CLEARING).exists():
            (self.path / CLEARING).touch()
        for path in here:
            remove_tree(path)
        (self.path / CLEARING).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Deletes what was being written when an earlier process was killed."""
        for place in (self.path, *self.path.glob("saes/*")):
            for leftover in place.glob("*.tmp"):
                if is_leftover(leftover.name):
                    leftover.unlink()
        checkpoint.tidy(self.checkpoints)

    def drop_checkpoints(self) -> None:
        """Of a run that is finished: nothing will go on from them. Left alone where something else is among them."""
        if any(path.startswith("checkpoints/") for path in self.strangers_inside()):
            return
        for folder in self.checkpoints.glob("*step-*"):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a link to somewhere else stays
            self.checkpoints.rmdir()

    def differs(self, identity: dict[str, Any]) -> list[str]:
        """Every setting in which the run that is here differs from the one asked for, in words."""
        here = self.read("config.json")
        return [each for key in identity if key not in FREE for each in differences(key, here.get(key), identity[key])]

    def check_same(self, identity: dict[str, Any]) -> None:
        """Raises UserError naming every setting in which the run that is here differs from the one asked for."""
        differ = self.differs(identity)
        if differ:
            raise UserError(
                f"{self.path}: holds a run with other settings. {'; '.join(differ)}. To go on with it, ask for what it "
                "has; or choose another --out, or start afresh with --overwrite"
            )

    def cut_metrics(self, wave: int, step: int) -> None:
        """Forgets what was logged after `step` of a wave: those steps are about to be repeated."""
        if not self.metrics.exists():
            return
        kept = []
        for line in read_whole(self.metrics, WHOLE_BYTES).splitlines(keepends=True):
            try:
                logged = parse_json(line)
                if (logged["wave"], logged["step"]) > (wave, step) or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break  # torn by a crash
            kept.append(line)
        write_file(self.metrics, b"".join(kept))

    def log(self, line: dict[str, Any]) -> None:
        with open(open_regular(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")


def is_leftover(name: str) -> bool:
    """Whether it is the temporary name of a file that a run was writing."""
    found = re.fullmatch(r"(.+)\.\d+\.tmp", name)
    return found is not None and found[1] in OURS | {"sae_weights.safetensors", "cfg.json"}


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
