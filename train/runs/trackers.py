"""A run as experiment trackers see it: each line of metrics.jsonl, in the run's folder, told by rank 0 alone.

A run that goes on is the same run to them. Nothing leaves this machine unless the user set WANDB_MODE.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from shared.errors import UserError
from shared.progress import say
from shared.record import version
from train.ranks import Ranks
from train.runs.folder import RunFolder


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for the first tracker whose package is not installed."""
    for name in names:
        if version(name) is None:
            raise UserError(f"--track {name}: the package is not installed. pip install {name}")


class Tracking:
    """Begun with the first line: a run that is refused at its first step leaves nothing behind. Without names it does
    nothing."""

    def __init__(
        self, names: Sequence[str], folder: RunFolder, identity: dict[str, Any], start: int, ranks: Ranks
    ) -> None:
        """`identity`: the resolved configuration. `start`: the steps made so far; lines after it are made anew."""
        self.names, self.folder, self.identity, self.start, self.ranks = names, folder, identity, start, ranks
        self.begun = False
        self.told: Any = None

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and whatever other numbers are beside them; called on every rank. Raises UserError
        on every rank when a tracker cannot begin."""
        if self.names and not self.begun:
            problem = next((found for found in self.ranks.gather(self.begin()) if found), None)
            if problem:
                raise UserError(problem)
            self.begun = True
        if self.told is not None:
            self.told.log(flattened(line), step=line["step"])

    def begin(self) -> str | None:
        """On rank 0; what went wrong, else None."""
        if not self.ranks.leads:
            return None
        settings = {}
        if "tensorboard" in self.names:  # what was logged after `start` is not shown any more
            path = self.folder.path
            settings["tensorboard"] = {"run_name": "tensorboard", "logging_dir": path, "purge_step": self.start + 1}
        if "wandb" in self.names:
            settings["wandb"] = wandb_settings(self.folder)
        try:
            self.told = self.ranks.trackers(self.folder.path, settings)
        except wandb_errors(self.names) as error:
            return f"--track wandb: {str(error).rstrip('.')}. Leave WANDB_MODE unset to keep it on this machine"
        for tracker in self.told.trackers:
            if tracker.name == "wandb":
                tracker.store_init_configuration(self.identity)
            else:
                text = json.dumps(self.identity, indent=2)
                tracker.log({"config": f"```json\n{text}\n```"}, step=self.start)
        return None

    def close(self) -> None:
        for tracker in self.told.trackers if self.told is not None else ():
            tracker.finish()
            if tracker.name == "wandb" and wandb_mode() == "offline":
                parts = self.folder.path / "wandb" / f"offline-run-*-{run_id(self.folder)}"
                say(f"--track wandb: was offline. To upload: wandb sync {parts}")


def flattened(line: dict[str, Any]) -> dict[str, float]:
    """A line's numbers by name, an autoencoder's as `NAME/METRIC`; without the step."""
    values = {key: float(value) for key, value in line.items() if key not in ("step", "saes")}
    for name, metrics in line["saes"].items():
        values |= {f"{name}/{metric}": float(value) for metric, value in metrics.items()}
    return values


def wandb_mode() -> str:
    return os.environ.get("WANDB_MODE") or "offline"


def wandb_settings(folder: RunFolder) -> dict[str, Any]:
    """What wandb's run is begun with. Offline it says nothing and asks nothing; and its reports on itself, which look
    for a server even then, are off."""
    if wandb_mode() == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported, too
    import wandb

    return {
        "run_name": os.environ.get("WANDB_PROJECT") or "sagsae",  # accelerate's word for the project
        "name": folder.path.resolve().name,
        "id": run_id(folder),
        "resume": "allow",
        "dir": str(folder.path),
        "mode": wandb_mode(),
        "settings": wandb.Settings(console="off", silent=wandb_mode() == "offline"),
    }


def wandb_errors(names: Sequence[str]) -> tuple[type[Exception], ...]:
    if "wandb" not in names:
        return ()
    import wandb

    return (wandb.Error,)


def run_id(folder: RunFolder) -> str:
    """The same whenever a run goes on, another once it was started afresh."""
    decides = json.dumps([folder.read("config.json"), folder.read("record.json")["started"]], sort_keys=True)
    return hashlib.blake2b(decides.encode(), digest_size=8).hexdigest()
