"""Training runs that were stopped, and what they left."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import train.autoencoder
import train.plan.job
import train.resume
import train.run
from shared.config import TrainConfig
from shared.errors import Interrupted
from support.folders import contents, rewrite, without
from train.run import train as run_train


def unfinished_run(run: Path) -> None:
    """As if it had been killed before it was marked finished."""
    rewrite(run / "record.json", without("finished"))


def weights_of(run: Path) -> dict[str, bytes]:
    return {key: data for key, data in contents(run).items() if key.startswith("saes/")}


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def stopped_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """A stop is asked for once so many steps are made."""
    asked = iter(range(1, 10_000))

    @contextmanager
    def stop_requests() -> Iterator[Callable[[], bool]]:
        yield lambda: next(asked) == steps

    patch.setattr(train.run, "stop_requests", stop_requests)


def begun(config: TrainConfig, steps: int) -> Path:
    """The folder of a run that was stopped."""
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, steps)
        with pytest.raises(Interrupted):
            run_train(config)
    assert config.out is not None
    return config.out
