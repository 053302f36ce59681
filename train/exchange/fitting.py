"""Whether an autoencoder fits activations: width, hookpoint and language model, by what its cfg.json says of them.

cfg.json may come from anybody and may leave the last two out: null is not known, and fits with a word about it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from shared.errors import UserError
from shared.gate import BadData, quoted, text
from shared.model.source import ALIASES
from shared.progress import say
from shared.store.opened import Store

HUB_COMMIT: Final = 40
"""Hex digits of a commit on the hub. Other lengths are digests of a model's content."""
SAME_NAMES: Final = {"gpt2-small": "gpt2"}
"""Other tools' short names that are not the last part of the hub's."""


@dataclass(frozen=True)
class Origin:
    """What an autoencoder was made for, as its cfg.json says. None: not known."""

    model: str | None
    commit: str | None
    hook_name: str | None

    @classmethod
    def of(cls, about: Mapping[str, Any], what: str) -> "Origin":
        """Reads cfg.json's `model` (a name, or a table with `name` and `commit`) and `hook_name`. Raises UserError
        naming `what` for other types."""
        model = about.get("model")
        named = model if isinstance(model, dict) else {"name": model}
        found = {"model": named.get("name"), "commit": named.get("commit"), "hook_name": about.get("hook_name")}
        try:
            return cls(**{key: None if value is None else text(value, key, 512) for key, value in found.items()})
        except BadData as error:
            raise UserError(f"{what}: its cfg.json is not an autoencoder's ({error})") from error


def check_fits(origin: Origin, d_in: int, store: Store, hook: str, what: str, transfer: bool = False) -> None:
    """Raises UserError when `what`, made for `origin` at width `d_in`, does not fit a hookpoint of the store. With
    `transfer`, another model or hookpoint of the same width fits, with a message. So does what cfg.json leaves out."""
    spec = store.spec.hookpoints[hook]
    place = f"{store.name}/{hook}"
    if d_in != spec.d_in:
        raise UserError(f"{what}: is for activations of d_in {d_in}; {place} has {spec.d_in}")
    for sentence in (other_hook(origin, spec.name, place), other_model(origin, store)):
        if sentence and not transfer:
            raise UserError(f"{what}: {sentence}. Name another store or hookpoint, or measure it here with --transfer")
        if sentence:
            say(f"{what}: {sentence}")
    for key, value in (("hookpoint", origin.hook_name), ("language model", origin.model)):
        if value is None:
            say(f"{what}: its cfg.json does not say its {key}; it is taken to be that of {place}")


def other_hook(origin: Origin, name: str, place: str) -> str | None:
    """Says that the autoencoder is for another hookpoint than `name`; None when it is not known to be."""
    if origin.hook_name is None or same_place(origin.hook_name) == same_place(name):
        return None
    return f"was made for {quoted(origin.hook_name)}; {place} is {name}"


def same_place(hook_name: str) -> str:
    """The name of a hookpoint, the same for both names of one tensor: the end of a layer begins the next one."""
    found = re.fullmatch(r"blocks\.([1-9][0-9]{0,4})\.hook_resid_pre", hook_name)
    return f"blocks.{int(found[1]) - 1}.hook_resid_post" if found else hook_name


def other_model(origin: Origin, store: Store) -> str | None:
    """Says that the autoencoder is for another language model than the store's; None when it is not known to be.
    Contents are compared where both are known. A copy in a folder cannot be compared with a name."""
    name, commit = str(store.spec.model["name"]), str(store.spec.model.get("commit"))
    if origin.model is None or origin.commit == commit:
        return None
    by_content = [len(each) != HUB_COMMIT for each in (origin.commit, commit) if each is not None]
    other = f"was made for {quoted(origin.model)}; {store.name} was harvested from {name}"
    if origin.commit is not None and all(by_content):
        return f"{other}, and their contents differ"
    if canonical(origin.model) == canonical(name):
        return None
    if any(by_content):
        say(f"{other}, which cannot be compared: it is taken to be the same model")
        return None
    return other


def canonical(name: str) -> str:
    """A model's name without its owner, in small letters: how other tools shorten it."""
    short = PurePosixPath(ALIASES.get(name, name)).name.lower()
    return SAME_NAMES.get(short, short)
