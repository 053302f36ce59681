"""Training on what an activation cache answers: `sagsae train --request key=value …`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import getpid
from pathlib import Path
from socket import gethostname
from typing import Any, NamedTuple

from shared.config import TrainConfig
from shared.errors import BusyError, DamagedError, UserError
from shared.files.base import is_remote
from shared.progress import say
from shared.service.address import SERVICE, configured_service
from shared.service.asking import ask_and_wait, chosen_place, parse_request, place_here
from shared.service.client import Client
from train.runs.folder import RunFolder


def answered(typed: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `store` and `hook` that answer a request; {} where none is to be asked. `typed`: what the command
    line says; `told`: what the --config file says. A run's own run.toml has the answer beside the request.

    Raises UserError when the request is wrong or refused, BusyError when the service is away and no run here has the
    answer."""
    if typed.get("request") and typed.get("store"):
        raise UserError("--request and --store: both say what to train on. Give one of the two")
    given = {**told, **typed}
    if not given.get("request") or (not typed.get("request") and given.get("store")) or typed.get("store"):
        return {}
    request, hook = tuple(given["request"]), given.get("hook")
    asked = parse_request(request, accept="exact")
    try:
        if configured_service() is None:
            raise BusyError(f"--request: which service? Give --service http://HOST:PORT, or set {SERVICE}")
        with Client() as client:
            answer = ask_and_wait(client, asked, bool(given.get("follow")))
            path, place = chosen_place(answer, hook)
            return {"store": place_here(client, place), "hook": path}
    except BusyError as error:
        found = recorded_answer(request, hook, given.get("out"))
        if found is None:
            raise
        say(f"{error}. The run in {found.folder} has the answer: {found.store}")
        return {"store": found.store, "hook": found.hook}


class RecordedAnswer(NamedTuple):
    """The answer to an earlier, equal request, as a run recorded it."""

    folder: Path
    store: str
    hook: str


def recorded_answer(request: tuple[str, ...], hook: str | None, out: str | None) -> RecordedAnswer | None:
    """What a run in `out`, or in any folder of runs/, recorded for the same request, where the store is a folder that
    is still here."""
    folders = [Path(out)] if out else sorted(Path("runs").glob("*"))
    for folder in folders:
        try:
            config = RunFolder(folder).config() if (folder / "config.json").exists() else None
        except (UserError, DamagedError):
            continue
        if config is None or config.request != request or is_remote(config.store) or config.hook is None:
            continue
        if hook in (None, config.hook, config.hook.split("/")[-1]) and Path(config.store).exists():
            return RecordedAnswer(folder, config.store, config.hook)
    return None


@contextmanager
def leased(config: TrainConfig, leads: bool = True) -> Iterator[None]:
    """Leases the store that a request found for the time of the block, where it is read from a folder and this process
    leads. A store that is read through the service is leased by its reader."""
    if not (leads and config.request) or is_remote(config.store) or configured_service() is None:
        yield
        return
    with Client() as client, client.lease(Path(config.store).name, f"process {getpid()} on {gethostname()}"):
        yield
