"""Logs each line of metrics.jsonl to experiment trackers, from rank 0, with their files in the run's folder.

A resumed run stays one run in a tracker. Nothing leaves this machine unless the user sets WANDB_MODE.
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
    """Starts the trackers with the first logged line, so that a run that fails in its first step leaves no files.
    Without names it does nothing."""

    def __init__(
        self, names: Sequence[str], folder: RunFolder, identity: dict[str, Any], start: int, ranks: Ranks
    ) -> None:
        """`identity`: the resolved configuration. `start`: the step from which the run resumes; later lines that an
        earlier process logged are replaced."""
        self.names, self.folder, self.identity, self.start, self.ranks = names, folder, identity, start, ranks
        self.begun = False
        self.accelerator: Any = None

    def log(self, line: dict[str, Any]) -> None:
        """Logs a line of metrics.jsonl and any other numbers in it. Call it on every rank. Raises UserError on every
        rank when a tracker cannot start."""
        if self.names and not self.begun:
            problem = next((found for found in self.ranks.gather(self.start_trackers()) if found), None)
            if problem:
                raise UserError(problem)
            self.begun = True
        if self.accelerator is not None:
            self.accelerator.log(flattened(line), step=line["step"])

    def start_trackers(self) -> str | None:
        """Starts the trackers on rank 0. Returns an error message, or None."""
        if not self.ranks.leads:
            return None
        settings = {}
        if "tensorboard" in self.names:  # lines logged after `start` are hidden
            path = self.folder.path
            settings["tensorboard"] = {"run_name": "tensorboard", "logging_dir": path, "purge_step": self.start + 1}
        if "wandb" in self.names:
            settings["wandb"] = wandb_settings(self.folder)
        try:
            self.accelerator = self.ranks.trackers(self.folder.path, settings)
        except wandb_errors(self.names) as error:
            return f"--track wandb: {str(error).rstrip('.')}. Leave WANDB_MODE unset to keep it on this machine"
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.store_init_configuration(self.identity)
            else:
                text = json.dumps(self.identity, indent=2)
                tracker.log({"config": f"```json\n{text}\n```"}, step=self.start)
        return None

    def close(self) -> None:
        for tracker in self.accelerator.trackers if self.accelerator is not None else ():
            tracker.finish()
            if tracker.name == "wandb" and wandb_mode() == "offline":
                parts = self.folder.path / "wandb" / f"offline-run-*-{run_id(self.folder)}"
                say(f"--track wandb: the run was logged offline. To upload it: wandb sync {parts}")


def flattened(line: dict[str, Any]) -> dict[str, float]:
    """Returns a line's numbers by name, those of an autoencoder as `NAME/METRIC`, without the step."""
    values = {key: float(value) for key, value in line.items() if key not in ("step", "saes")}
    for name, metrics in line["saes"].items():
        values |= {f"{name}/{metric}": float(value) for metric, value in metrics.items()}
    return values


def wandb_mode() -> str:
    return os.environ.get("WANDB_MODE") or "offline"


def wandb_settings(folder: RunFolder) -> dict[str, Any]:
    """Returns the settings of wandb's run. Offline, wandb prints nothing and asks nothing; its error reporting, which
    would contact a server even then, is off."""
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
    """Returns wandb's run id: the same when a run is resumed, another after it was restarted with --overwrite."""
    decides = json.dumps([folder.read("config.json"), folder.read("record.json")["started"]], sort_keys=True)
    return hashlib.blake2b(decides.encode(), digest_size=8).hexdigest()
