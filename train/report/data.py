"""Reads run folders: `config.json`, `record.json`, `evaluation.json` and, if there is one, `metrics.jsonl`; and folders
with the `measured.json` of an evaluation without a run.

Optional keys may be missing and are shown as not recorded. NaN and infinities (of a diverged autoencoder) are shown as
not measured. Every other fault raises UserError or DamagedError that names the folder.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import DamagedError, UserError
from shared.files.base import most_bytes
from shared.files.local import read_whole
from shared.saes import SAEConfig, sae_config
from shared.store.spec import is_sealed
from train.measure.written import MEASURED
from train.report.sae import MeasuredSAE
from train.sae.families import family

DIGEST = 12
"""Number of characters of a snapshot's digest that are shown: they fit on one line."""
CURVE_POINTS = 400
"""A training curve shows about this many of its logged steps at most."""


class HeldOutMassive(BaseModel):
    """The massive held-out rows: those whose norm is above `times_median` times the median."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    times_median: float
    tokens: int
    variance: float | None


class EvaluationFile(BaseModel):
    """The content of `evaluation.json`: measurements on held-out rows, for every autoencoder of the run."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    tokens: int
    ce_tokens: int | None = None
    ce_clean: float | None = None
    ce_zero: float | None = None
    ce_mean: float | None = None
    massive: HeldOutMassive | None = None
    left_out: int = 0
    """Number of rows that `max_norm` left out."""
    saes: tuple[MeasuredSAE, ...]


@dataclass(frozen=True)
class Curve:
    """The training log of one autoencoder, in the order of the steps."""

    tokens: list[int]
    fvu: list[float | None]
    l0: list[float | None]


@dataclass(frozen=True)
class ReportedRun:
    """The content of one run folder."""

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    evaluation: EvaluationFile
    curves: dict[str, Curve]
    trained: bool = True
    """Whether its autoencoders were trained here. Else this is an evaluation without a run: `config` says which rows
    were measured, and `saes` in it has the settings of each autoencoder by its name."""

    @property
    def store(self) -> dict[str, Any]:
        store = self.record.get("store")
        return store if isinstance(store, dict) else {}

    @property
    def rows(self) -> str:
        """The store's name and the snapshot that the run read."""
        name = str(self.store.get("path") or self.config.get("store") or "store not recorded").rstrip("/")
        snapshot = self.config.get("snapshot")
        return name.rpartition("/")[2] + (f" ({str(snapshot)[:DIGEST]})" if snapshot else "")

    @property
    def diverged(self) -> dict[str, Any]:
        """Autoencoders whose loss became NaN or infinite, with the step of each."""
        found = self.record.get("diverged")
        return found if isinstance(found, dict) else {}

    @property
    def model(self) -> str:
        return str(self.store.get("model") or "model not recorded")

    @property
    def hook(self) -> str:
        return str(self.config.get("hook") or self.store.get("hook") or "hookpoint not recorded")

    @cached_property
    def configs(self) -> dict[str, SAEConfig]:
        """The configuration of each autoencoder, by name. One that this version cannot read is missing."""
        saes, found = self.config.get("saes"), {}
        named = saes if isinstance(saes, dict) else dict(enumerate(saes)) if isinstance(saes, list) else {}
        for name, values in named.items():
            try:
                config = sae_config(**values)
            except (TypeError, UserError):
                continue
            found[name if isinstance(name, str) else config.name] = config
        return found

    @cached_property
    def unnamed(self) -> dict[str, str]:
        """By name, the settings of an autoencoder that its name does not tell, or rounds: the λ that steering to an L0
        target began with where it is not the usual one, and numbers of more than six digits."""
        return {name: told for name, config in self.configs.items() if (told := "-".join(beyond_name(config)))}

    @property
    def saes(self) -> list[MeasuredSAE]:
        """The autoencoders with what config.json says of them."""
        return [
            sae.model_copy(update={"unnamed": self.unnamed.get(sae.name, ""), "parameters": self.parameters(sae.name)})
            for sae in self.evaluation.saes
        ]

    def parameters(self, name: str) -> int | None:
        """Returns the number of values in an autoencoder's weights, from their shapes. None: not recorded."""
        if self.d_in is None or name not in self.configs:
            return None
        return sum(math.prod(shape) for shape in family(self.configs[name]).shapes(self.d_in).values())

    @property
    def d_in(self) -> int | None:
        d_in = self.store.get("d_in")
        return d_in if isinstance(d_in, int) else None

    @property
    def tokens_trained(self) -> int | None:
        """Returns the number of training tokens: those asked for, in whole batches; for an epoch, the last logged count
        or, without a log, steps times batch."""
        asked, batch = self.config.get("tokens"), self.config.get("batch")
        if type(asked) is int and type(batch) is int and asked > 0 and batch > 0:
            return asked // batch * batch
        logged = [curve.tokens[-1] for curve in self.curves.values() if curve.tokens]
        steps = self.record.get("steps")
        planned = steps * batch if isinstance(steps, int) and isinstance(batch, int) else None
        return max([*logged, planned or 0]) or None


def beyond_name(config: SAEConfig) -> Iterator[str]:
    """The settings of one autoencoder that decide its result and that its name leaves out or rounds."""
    for key, value in config:
        if not isinstance(value, float) or value == type(config).model_fields[key].default:
            continue
        if key == "sparsity" and getattr(config, "l0_target", None):
            yield f"from-lambda-{value!r}"
        elif key not in ("sparsity", "l0_target") and float(f"{value:g}") != value:
            yield f"{key.replace('_', '-')}-{value!r}"


@dataclass(frozen=True)
class SkippedFolder:
    """A folder that is not in the report, and the reason, which names the folder and what to do."""

    folder: Path
    reason: str


def read_runs(folders: list[Path]) -> tuple[list[ReportedRun], list[SkippedFolder]]:
    """Reads every folder once, in the order given. Returns the runs and the folders that were left out. Raises
    UserError when no run is left."""
    if not folders:
        raise UserError("no run to report on: name at least one run folder, such as `sagsae report runs/NAME`")
    unique = {folder.resolve(): folder for folder in reversed(folders)}
    runs, left_out = [], []
    for folder in reversed(list(unique.values())):
        try:
            runs.append(read_run(folder))
        except (UserError, DamagedError) as error:
            left_out.append(SkippedFolder(folder, str(error)))
    if not runs:
        more = f". The other {len(left_out) - 1} cannot be reported on either" if len(left_out) > 1 else ""
        raise UserError(left_out[0].reason + more)
    return runs, left_out


def read_run(folder: Path) -> ReportedRun:
    """Reads one run folder. Raises UserError when it is not a run, is not evaluated, or cannot be read; DamagedError
    when a file was altered."""
    try:
        if (folder / MEASURED).is_file():
            return _read_measured(folder)
        for name in ("config.json", "record.json"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: is not a training run: it has no {name}. Make one with: sagsae train")
        config, record = _read_object(folder / "config.json"), _read_object(folder / "record.json")
        metrics = _read_metrics(folder / "metrics.jsonl")
        if not (folder / "evaluation.json").is_file():
            raise UserError(f"{folder} {_not_evaluated(folder, record, metrics)}")
        return ReportedRun(folder, config, record, _read_evaluation(folder), _curves(metrics))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}). Make it readable, or leave it out") from error


def _read_measured(folder: Path) -> ReportedRun:
    """Reads an evaluation without a run."""
    values = _read_object(folder / MEASURED)
    rows, record, settings = (values.get(key) for key in ("rows", "record", "settings"))
    if not (isinstance(rows, dict) and isinstance(record, dict) and isinstance(settings, dict)):
        raise UserError(f"{folder / MEASURED}: does not say which rows it measured. Measure again: sagsae eval --sae")
    evaluation = _evaluation_of(values, folder / MEASURED, "sagsae eval --sae")
    return ReportedRun(folder, {**rows, "saes": settings}, record, evaluation, {}, trained=False)


def _not_evaluated(folder: Path, record: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    steps, logged = record.get("steps"), metrics[-1].get("step") if metrics else 0
    if "finished" not in record and isinstance(steps, int) and isinstance(logged, int) and logged < steps:
        return (
            f"is not finished: {logged:,} of {steps:,} steps are logged. Run its `sagsae train` command again to "
            "resume and evaluate it (record.json has the command)"
        )
    return f"has no evaluation.json: run `sagsae eval {folder}` first"


def _read_evaluation(folder: Path) -> EvaluationFile:
    file = folder / "evaluation.json"
    return _evaluation_of(_read_object(file), file, f"sagsae eval {folder}")


def _evaluation_of(values: dict[str, Any], file: Path, command: str) -> EvaluationFile:
    """Returns what an evaluation says. Raises UserError, which names the `command` that makes it again."""
    try:
        evaluation = EvaluationFile.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: {key}: {first['msg']}. Measure again with `{command}`") from error
    if not evaluation.saes:
        raise UserError(f"{file} lists no autoencoder: run `{command}` again")
    return evaluation


def _read_text(path: Path) -> str:
    try:
        return read_whole(path, most_bytes(path.name)).decode()
    except DamagedError as error:
        raise UserError(f"{path}: is no ordinary file, or too large for a run. Restore it from a copy") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    """Parses a JSON object; NaN and infinities become None."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not valid JSON ({error}). Restore the file or make the run again") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file without its checksum. Files of earlier versions have none."""
    value = _parse(_read_text(path), str(path))
    if "crc32c" in value and not is_sealed(value):
        raise DamagedError(f"{path}: was altered: its checksum does not match. Restore it from a copy")
    return {key: item for key, item in value.items() if key != "crc32c"}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of the log. A last line without a line end is incomplete and left out."""
    if not path.exists():
        return []
    lines = _read_text(path).split("\n")[:-1]
    return [_metric(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _metric(text: str, where: str) -> dict[str, Any]:
    line = _parse(text, where)
    saes = line.get("saes")
    named = isinstance(saes, dict) and all(isinstance(values, dict) for values in saes.values())
    if not named or not isinstance(line.get("tokens"), int):
        raise UserError(f'{where}: expected {{"tokens": int, "saes": {{NAME: {{...}}}}}}, as `sagsae train` writes it')
    return line


def _curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    """Returns the training curve of each autoencoder. Each line of the log holds the autoencoders of one wave."""
    waves: dict[object, list[dict[str, Any]]] = {}
    for line in lines:
        waves.setdefault(line.get("wave"), []).append(line)
    curves: dict[str, Curve] = {}
    for line in [line for wave in waves.values() for line in _thinned(wave)]:
        for name, values in line["saes"].items():
            curve = curves.setdefault(name, Curve([], [], []))
            curve.tokens.append(line["tokens"])
            curve.fvu.append(_rounded(values.get("fvu")))
            curve.l0.append(_rounded(values.get("l0")))
    return curves


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stride = max(1, len(lines) // CURVE_POINTS)
    return [line for index, line in enumerate(lines) if index % stride == 0 or index == len(lines) - 1]


def _rounded(value: object) -> float | None:
    """Rounds to five significant digits, which is enough for a plot and keeps the page small."""
    return float(f"{value:.5g}") if isinstance(value, int | float) else None
