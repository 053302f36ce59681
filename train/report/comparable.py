"""Decides which runs may be compared: those with the same value of every setting that decides the results.

Everything in a run's config.json counts, except the settings listed in IMMATERIAL. So a setting that is added to
`TrainConfig` separates runs until somebody adds it to that list.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import PydanticUndefined

from shared.config import TrainConfig
from train.fit.optim import usual_warmup
from train.report.data import ReportedRun

WRITTEN: Final = ("out", "overwrite", "track", "log_every", "checkpoint_every", "keep_checkpoints")
"""These decide what is written, and where."""
READ: Final = ("store", "request", "warm_start", "verify", "memory")
"""These decide where rows and first weights come from, how they are checked and kept. `snapshot` says which rows they
are, `start` of an autoencoder which weights."""
COMPUTED: Final = ("device", "parallel", "parts", "compile", "step")
"""These decide how the same numbers are computed, and change rounding at most."""
FOUND_ELSEWHERE: Final = ("tokens", "saes")
"""`tokens` is compared as `training tokens`; autoencoders are compared one by one."""
MEASURED_ON: Final = ("exclude_positions", "exclude_special", "heldout_tokens", "max_norm", "norm_limit")
"""These, with the rows and the seed of the order, decide which tokens are measured on, however autoencoders were
trained."""
IMMATERIAL: Final = frozenset({*WRITTEN, *READ, *COMPUTED, *FOUND_ELSEWHERE})
"""Settings that do not decide what is trained and measured."""
LONGEST: Final = 60
"""Number of characters of a value that are shown."""


@dataclass(frozen=True)
class Difference:
    """A value in which the settings of a report differ."""

    name: str
    values: tuple[tuple[str, tuple[int, ...]], ...]
    """Each value, with the numbers (from 1) of the settings that have it."""

    @property
    def text(self) -> str:
        """Text such as `clip_norm: none (setting 1), 1e-09 (settings 2 and 3)`."""
        return f"{self.name}: " + ", ".join(f"{value} ({_settings(numbers)})" for value, numbers in self.values)


def measured_on(run: ReportedRun) -> dict[str, Any]:
    """Returns everything that decides which tokens a run, or an evaluation without one, was measured on, by name."""
    found = training(run)
    names = ("model", "hookpoint", "rows", "tokens measured on", "seed of the order", *MEASURED_ON)
    return {name: found.get(name) for name in names}


def deciding(run: ReportedRun) -> dict[str, Any]:
    """Returns everything that decides results, by name: those of an evaluation without a run are decided by the tokens
    alone, since nothing was trained in it."""
    return training(run) if run.trained else measured_on(run)


def training(run: ReportedRun) -> dict[str, Any]:
    """Returns everything that decides a run's results, by name. Settings that an older run lacks have their default."""
    fields = TrainConfig.model_fields.items()
    usual = {name: field.default for name, field in fields if field.default is not PydanticUndefined}
    found = {key: value for key, value in {**usual, **run.config}.items() if key not in IMMATERIAL | {"hook"}}
    snapshot = found.pop("snapshot", None) or run.config.get("store")
    window = found.pop("dead_after_tokens")
    return {
        "model": run.store.get("commit") or run.model,  # the commit, because one model may have several names
        "hookpoint": run.hook,
        "rows": snapshot,
        "training tokens": run.tokens_trained,
        "dead after tokens": min(window, run.tokens_trained or window) if isinstance(window, int) else window,
        "tokens measured on": run.evaluation.tokens,
        "seed of the order": found.pop("seed", None),
        **found,
    }


def identity(run: ReportedRun) -> str:
    """Returns a text that is equal for runs whose autoencoders may be compared."""
    return json.dumps(deciding(run), sort_keys=True, default=str)


def same_tokens(run: ReportedRun, other: ReportedRun) -> bool:
    """Whether both were measured on the same tokens of the same activations."""
    one, two = (json.dumps(measured_on(each), sort_keys=True, default=str) for each in (run, other))
    return one == two


def differences(groups: Sequence[Sequence[ReportedRun]]) -> list[Difference]:
    """Returns the values in which the settings differ. Each group holds the runs of one setting. A value that follows
    from another (`_derived`) is left out, because the other is there."""
    each = [(deciding(group[0]), shown(group[0])) for group in groups]
    names = dict.fromkeys(name for values, _ in each for name in values)
    derived = _derived([group[0] for group in groups])
    found = []
    for name in names:
        holders: dict[str, tuple[str, list[int]]] = {}
        for number, (values, texts) in enumerate(each, 1):
            if name not in values and not groups[number - 1][0].trained:
                continue  # nothing was trained there
            value = json.dumps(values.get(name), sort_keys=True, default=str)
            holders.setdefault(value, (texts.get(name, "none"), []))[1].append(number)
        if len(holders) > 1 and name not in derived:
            found.append(
                Difference(name.replace("_", " "), tuple((text, tuple(numbers)) for text, numbers in holders.values()))
            )
    return found


def _derived(runs: Sequence[ReportedRun]) -> set[str]:
    """Returns the names of values that differ only because the runs have other numbers of tokens or steps."""
    windows, steps = [_window(run) for run in runs], [_steps(run) for run in runs]
    found = set()
    if len({run.tokens_trained for run in runs}) > 1 and windows == windows[:1] * len(windows):
        found.add("dead after tokens")
    warmups = [run.config.get("warmup_steps") for run in runs]
    if len(set(steps)) > 1 and warmups == [usual_warmup(count) for count in steps]:
        found.add("warmup_steps")
    return found


def _window(run: ReportedRun) -> Any:
    return run.config.get("dead_after_tokens", TrainConfig.model_fields["dead_after_tokens"].default)


def _steps(run: ReportedRun) -> int:
    batch = run.config.get("batch")
    return (run.tokens_trained or 0) // batch if isinstance(batch, int) and batch > 0 else 0


def shown(run: ReportedRun) -> dict[str, str]:
    """Returns the values of `deciding` as text for people."""
    commit = str(run.store.get("commit") or "")
    known = {"model": f"{run.model} ({commit[:12]})" if commit else run.model, "rows": run.rows}
    return {name: known.get(name) or written(value) for name, value in deciding(run).items()}


def written(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _settings(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"settings {', '.join(most)} and {last}" if most else f"setting {last}"
