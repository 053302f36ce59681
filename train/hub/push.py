"""`sagsae push`: publishes autoencoders as a model of the Hugging Face hub, and a store as a dataset."""

import tempfile
from pathlib import Path

from shared.files.base import is_remote
from shared.files.open import open_files
from shared.hub.place import HubRepo, repo_named
from shared.progress import say
from shared.schemas.exchange import PushConfig
from shared.store.opened import is_store
from train.exchange.saved import find_saes
from train.hub.card import is_ours
from train.hub.layout import OTHER_CARD, README, files_of_saes, known_in
from train.hub.store import push_store
from train.hub.upload import Confirm, Pushed, find_repo, push_files


def push(config: PushConfig, confirm: Confirm | None = None) -> Pushed:
    """Sends what the repository lacks, in one commit; nothing when all is there. `confirm` is asked before something
    becomes public. Raises UserError when a question cannot be asked or is answered with no, and for what the hub
    refuses; BusyError when the same command can succeed later: it then sends only what is still missing."""
    if is_remote(config.source) or is_store(open_files(config.source)):
        return push_store(config, agreed(config, confirm))
    repo = repo_named(config.repo, "model", f"--repo {config.repo}")
    return push_saes(config, repo, agreed(config, confirm))


def agreed(config: PushConfig, confirm: Confirm | None) -> Confirm | None:
    """--yes answers every question."""
    return (lambda _: True) if config.yes else confirm


def push_saes(config: PushConfig, repo: HubRepo, confirm: Confirm | None) -> Pushed:
    saes = find_saes(Path(config.source))
    state = find_repo(repo)
    known = known_in(repo, state)
    if known.readme is not None and not is_ours(known.readme):
        say(f"{repo}: its {README} is not sagsae's and stays as it is; the card goes to {OTHER_CARD}")
    with tempfile.TemporaryDirectory(prefix="sagsae-push-") as scratch:
        files, names = files_of_saes(config, saes, known, Path(scratch))
        what = f"{len(names):,} autoencoders" if len(names) > 1 else f"autoencoder {names[0]}"
        return push_files(repo, state, [files], what, config.private, confirm)
