"""A run's folder: its files, and whether it belongs to the run that the user asks for.

run.toml          the settings, for `sagsae train --config`
config.json       everything that decides the result: the configuration, the rows that are read, the precision
record.json       how it was produced: command, versions, device, times. "finished" is added at the end; "diverged"
                  names autoencoders whose loss became NaN or infinite, with the step at which this was seen
metrics.jsonl     one line every `log_every` steps for the autoencoders of one wave; "wave" counts from 1
segments.jsonl    with --follow: the shards that were read in each pass
checkpoints/      the two newest states, from which an interrupted run resumes, each with saes/NAME as it was then. They
                  are removed when the run is finished, unless keep_checkpoints is set
saes/NAME/        each trained autoencoder
evaluation.json   what was measured on held-out tokens
features/NAME/    what each latent of an autoencoder fires on; features/NAME.work/ while that is being counted. Its
                  dial.json says whether latents steer the language model
tensorboard/ wandb/   with --track: the trackers' files

All JSON files but metrics.jsonl hold a checksum of their content ("crc32c"). A run that cannot be read counts as
damaged, never as absent: nothing is deleted unless --overwrite asks for it.
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
from shared.files.local import check_removable, error_kind, read_whole, remove_tree, sync, touch, write_file
from shared.files.locks import LOCK_FILE
from shared.gate import SMALL, BadData, parse_json, quoted
from shared.launch import begun_by_this_command
from shared.record import finite, sealed_json, to_json
from shared.schema import build
from shared.store.spec import is_sealed
from train.runs import checkpoint

FREE: Final = {
    "out",
    "parallel",
    "overwrite",
    "device",
    "store",
    "request",
    "warm_start",
    "verify",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "memory",
    "track",
}
"""Settings that may change when a run is resumed, because they do not change the result."""
CLEARING: Final = "being-cleared"
"""A file that exists while a run is being deleted: config.json is renamed to it first, and it is removed last."""
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
    "features",
    "segments.jsonl",
    "tensorboard",
    "wandb",
}
"""Every name that a run puts into its folder. Nothing else is ever deleted there."""
RESULTS: Final = ("evaluation.json", "saes", "checkpoints")
"""Files and folders that show that a run was here even when its config.json is gone."""
FEATURES: Final = (
    r"(latents|examples|pairs|tokens)\.parquet|index\.html|app\.js|style\.css"
    r"|data(/(index\.js|latents(/\d{5,}\.js)?|tokens(/\d\d\.js)?))?"
)
"""Paths below features/NAME: the Parquet files and the page."""
INSIDE: Final = {
    "saes": r"[^/]+(/(sae_weights\.safetensors|cfg\.json)(\.\d+\.tmp)?)?",
    "checkpoints": r"((damaged\.|replaced\.)?step-\d+|building)(/(state\.json|tensors-\d+\.safetensors)(\.\d+\.tmp)?"
    r"|/saes(/[^/]+(/(sae_weights\.safetensors|cfg\.json)(\.\d+\.tmp)?)?)?)?",
    "features": rf"[^/]+(/(about\.json|dial\.json(\.\d+\.tmp)?|{FEATURES}))?"
    r"|[^/]+\.work(/(\.lock(\.held)?|(job\.json|rank-\d+\.tally|rank-\d+-\w+-\d+\.pairs)(\.\d+\.tmp)?"
    rf"|out(/(about\.json(\.\d+\.tmp)?|{FEATURES}|bucket-\d+))?))?",
}
"""Patterns of the paths that a run puts into these folders."""
CURE: Final = "Restore it from a copy, or restart the run with --overwrite"


def read_sealed(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, without its checksum. Files of earlier versions have no checksum. Raises
    BadData when it is no object or was altered, FileNotFoundError when there is no file."""
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
    """Writes a JSON object with its checksum, atomically. NaN and infinities become null, because JSON lacks them."""
    write_file(path, sealed_json(finite(value)))


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run."""

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
        """Returns config.json of the run in this folder, or None when there is no run (a config.json alone is not proof
        of one). Raises DamagedError for a run whose config.json is gone or was altered."""
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
            raise self.damaged("config.json", "does not say which rows the run read")
        return None

    def exists(self) -> bool:
        """Whether this folder holds a run. Raises DamagedError as `identity` does."""
        return self.identity() is not None

    def holds(self, name: str) -> bool:
        """Whether the folder has a file, or a folder with something in it, of this name."""
        path = self.path / name
        return path.is_file() or (path.is_dir() and any(path.iterdir()))

    def may_be_a_run(self) -> bool:
        """Whether the folder holds only files of a run, and more of them than a config.json."""
        return (self.holds("run.toml") or self.holds("record.json")) and not self.foreign_names()

    def damaged(self, name: str, why: object) -> DamagedError:
        return DamagedError(f"{self.path / name}: {why}. {CURE}")

    def read(self, name: str) -> dict[str, Any]:
        """Returns config.json, record.json or evaluation.json. Raises UserError when this is no run, DamagedError when
        the file is gone or was altered."""
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
        """Returns the run's configuration. Raises DamagedError when config.json is not valid."""
        values = self.read("config.json")
        try:
            return build(TrainConfig, {key: values[key] for key in TrainConfig.model_fields if key in values})
        except UserError as error:
            raise self.damaged("config.json", error) from error

    def finished(self) -> bool:
        """Whether training is finished. evaluation.json may still be missing; `sagsae eval` writes it again."""
        return self.exists() and "finished" in self.read("record.json")

    def is_begun(self) -> bool:
        """Whether this very command began the run before its processes were started again."""
        try:
            return self.exists() and begun_by_this_command(self.read("record.json"))
        except DamagedError:
            return False

    def make(self, overwrite: bool = False) -> None:
        """Creates the folder and its lock file. Raises UserError when it cannot be written to or holds something else
        than a run, DamagedError when it holds a damaged run and `overwrite` is not set."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file. Choose another --out")
        try:
            ours = self.exists() or not (self.foreign_names() or self.holds("config.json"))
        except DamagedError:
            if not overwrite or self.foreign_names():
                raise
            ours = True
        if not ours:
            raise UserError(f"{self.path}: exists and is not a training run. Choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            touch(self.path / LOCK_FILE)
        except OSError as error:
            raise error_kind(error)(f"--out {self.path}: cannot be written to ({error.strerror})") from error

    def foreign_names(self) -> list[str]:
        """Returns the names in the folder that are not a run's."""
        if not self.path.is_dir():
            return []
        return [path.name for path in self.path.iterdir() if path.name not in OURS and not is_leftover(path.name)]

    def foreign_paths(self) -> list[str]:
        """Returns the paths that `clear` would delete although no run wrote them; trackers' folders are left out."""
        found = []
        for name, pattern in INSIDE.items():
            root = self.path / name
            if root.is_dir():
                paths = (path.relative_to(root).as_posix() for path in root.rglob("*"))
                found += [f"{name}/{path}" for path in paths if not re.fullmatch(pattern, path)]
        return sorted(found)

    def create(self, config: TrainConfig, identity: dict[str, Any], record: dict[str, Any]) -> None:
        """Writes the files of a new run. config.json comes last: from then on the run exists."""
        settings = config.model_dump(mode="json", exclude_none=True, exclude={"out", "overwrite"})
        write_file(self.path / "run.toml", tomli_w.dumps(settings).encode())
        write_sealed(self.path / "record.json", record)
        write_sealed(self.path / "config.json", identity)

    def clear(self) -> None:
        """Deletes the run. config.json goes first, so that an interrupted deletion leaves no run that looks whole.
        Links are removed, not followed. Raises UserError, before anything is deleted, when a folder holds files that no
        run wrote."""
        others = [path for path in self.foreign_paths() if not (self.path / path.split("/")[0]).is_symlink()]
        if others:
            raise UserError(
                f"{self.path}: {others[0]} was not put there by a run, and would be deleted with it. Move it away, or "
                "choose another --out"
            )
        present = [self.path / name for name in sorted(OURS - {LOCK_FILE, CLEARING, "config.json"})]
        present = [path for path in present if os.path.lexists(path)]
        check_removable(present)
        with contextlib.suppress(FileNotFoundError):
            (self.path / "config.json").rename(self.path / CLEARING)
            sync(self.path)
        if present and not (self.path / CLEARING).exists():
            (self.path / CLEARING).touch()
        for path in present:
            remove_tree(path)
        (self.path / CLEARING).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Deletes the temporary files that a killed process left behind."""
        for place in (self.path, *self.path.glob("saes/*")):
            for leftover in place.glob("*.tmp"):
                if is_leftover(leftover.name):
                    leftover.unlink()
        checkpoint.tidy(self.checkpoints)

    def drop_checkpoints(self) -> None:
        """Deletes all checkpoints of a finished run, unless the folder holds files that no run wrote."""
        if any(path.startswith("checkpoints/") for path in self.foreign_paths()):
            return
        for folder in self.checkpoints.glob("*step-*"):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a link to somewhere else stays
            self.checkpoints.rmdir()

    def differs(self, identity: dict[str, Any]) -> list[str]:
        """Describes every setting in which the run in this folder differs from the one asked for."""
        recorded = self.read("config.json")
        return [
            each for key in identity if key not in FREE for each in differences(key, recorded.get(key), identity[key])
        ]

    def check_same(self, identity: dict[str, Any]) -> None:
        """Raises UserError that names every setting in which this run differs from the one asked for."""
        differ = self.differs(identity)
        if differ:
            raise UserError(
                f"{self.path}: holds a run with other settings. {'; '.join(differ)}. To resume it, ask for its "
                "settings; or choose another --out, or restart the run with --overwrite"
            )

    def cut_metrics(self, wave: int, step: int) -> None:
        """Deletes the lines logged after `step` of `wave`, because a resumed run repeats those steps."""
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
        """Appends one line to metrics.jsonl."""
        with open(open_regular(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")


def is_leftover(name: str) -> bool:
    """Whether this is the name of a temporary file of a run."""
    found = re.fullmatch(r"(.+)\.\d+\.tmp", name)
    return found is not None and found[1] in OURS | {"sae_weights.safetensors", "cfg.json"}


def differences(name: str, here: Any, asked: Any) -> Iterator[str]:
    """Describes where two values of a setting differ; autoencoders are compared field by field."""
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
