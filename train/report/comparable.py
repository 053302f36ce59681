"""What the results of a run hang on, so that only runs that are alike in all of it are compared.

All that is in a run's config.json decides, but for what is listed here: a setting that is added to `TrainConfig` keeps
runs apart until someone says that it need not.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import PydanticUndefined

from shared.config import TrainConfig
from train.report.data import ReportedRun

IMMATERIAL: Final = frozenset({
    "out", "overwrite", "track", "log_every", "checkpoint_every", "keep_checkpoints",  # what is written, and where
    "store", "verify", "memory",  # where rows come from (`snapshot` says which), how they are checked and kept
    "device", "parallel", "parts", "compile", "step",  # who computes the same numbers: other rounding at most
    "tokens",  # `training tokens` says how many whole batches they are
    "saes",  # told apart one by one, within a setting
})  # fmt: skip
"""Settings that do not decide what is trained and measured."""
LONGEST: Final = 60
"""Letters of a value that are shown."""


@dataclass(frozen=True)
class Difference:
    """One thing in which settings differ."""

    name: str
    values: tuple[tuple[str, tuple[int, ...]], ...]
    """Each value, and the numbers of the settings that have it, from 1."""

    @property
    def text(self) -> str:
        """`clip_norm: none (setting 1), 1e-09 (settings 2 and 3)`."""
        return f"{self.name}: " + ", ".join(f"{value} ({_settings(numbers)})" for value, numbers in self.values)


def deciding(run: ReportedRun) -> dict[str, Any]:
    """All that decides a run's results, by name. A setting that an older run did not have is what it is by default."""
    usual = {name: field.default for name, field in TrainConfig.model_fields.items()
             if field.default is not PydanticUndefined}  # fmt: skip
    found = {key: value for key, value in {**usual, **run.config}.items() if key not in IMMATERIAL | {"hook"}}
    snapshot = found.pop("snapshot", None) or run.config.get("store")
    window = found.pop("dead_after_tokens")
    return {
        "model": run.store.get("commit") or run.model,  # whatever it is called
        "hookpoint": run.hook,
        "rows": snapshot,
        "training tokens": run.tokens_trained,
        "dead after tokens": min(window, run.tokens_trained or window) if isinstance(window, int) else window,
        "held-out tokens": run.evaluation.tokens,
        "seed of the order": found.pop("seed", None),
        **found,
    }


def identity(run: ReportedRun) -> str:
    """Equal for runs whose autoencoders may be compared."""
    return json.dumps(deciding(run), sort_keys=True, default=str)


def differences(groups: Sequence[Sequence[ReportedRun]]) -> list[Difference]:
    """In what the settings differ; each group holds the runs of one."""
    each = [(deciding(group[0]), shown(group[0])) for group in groups]
    names = dict.fromkeys(name for values, _ in each for name in values)
    found = []
    for name in names:
        holders: dict[str, tuple[str, list[int]]] = {}
        for number, (values, texts) in enumerate(each, 1):
            value = json.dumps(values.get(name), sort_keys=True, default=str)
            holders.setdefault(value, (texts.get(name, "none"), []))[1].append(number)
        if len(holders) > 1:
            found.append(Difference(name, tuple((text, tuple(numbers)) for text, numbers in holders.values())))
    return found


def shown(run: ReportedRun) -> dict[str, str]:
    """`deciding`, for people."""
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
