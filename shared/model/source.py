"""Decides which model a name means: aliases, folders and Hugging Face ids, the commit, the configuration.

Nothing here loads weights, and code that comes with a model is never run. Whatever a library raises while it reads
outside data becomes one message (`explained_loading`). Heavy imports happen inside the functions that need them.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final

from shared.errors import BusyError, DamagedError, Interrupted, LostError, UserError
from shared.files.digest import file_digests
from shared.model.configuration import ModelInfo, checked_config, checked_raw, info_of
from shared.model.weights import CONFIG, check_gguf, check_small, first_names, read_json, weight_files
from shared.progress import say

SHIPPED: Final = Path(__file__).parents[1] / "tiny"

ALIASES: Final = {
    "tiny": str(SHIPPED),
    **{
        f"pythia-{size}": f"EleutherAI/pythia-{size}"
        for size in ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
    },
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "smollm3-3b-base": "HuggingFaceTB/SmolLM3-3B-Base",
    "gpt2": "openai-community/gpt2",
}

HUB_SECONDS: Final = 3.0
"""Seconds that the hub may take to say which commit a name means."""


@dataclass(frozen=True)
class ModelSource:
    """The source of a model. `location` is a folder or a hub id, `commit` pins the weights."""

    name: str
    location: str
    local: bool
    commit: str
    """The hub's commit; for a folder 64 hex digits over all bytes of its configuration and weights."""
    cached: bool = False
    """True when the hub could not be reached: only the local cache is used."""
    gguf: str | None = None
    """The GGUF file in the folder that is the model: configuration, tokenizer and weights in one."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that make transformers load exactly this model, without the network when it is local."""
        if self.local:
            return {"local_files_only": True, **({"gguf_file": self.gguf} if self.gguf else {})}
        return {"revision": self.commit, "local_files_only": self.cached}


def resolve_model(name: str, revision: str | None = None, weights: bool = True) -> ModelSource:
    """The model that an alias, a folder, a GGUF file or a hub id means. Raises UserError when there is none, and for
    local weights that are incomplete. With `weights=False` a folder needs no weights and has no commit."""
    place = local_place(name)
    if place is not None:
        if revision is not None:
            raise UserError(f"--revision {revision}: {name} is a folder; revisions belong to Hugging Face models")
        return local_model(name, place, weights)
    if Path(os.path.expanduser(name)).is_file():
        raise UserError(f"--model {name}: is a file. Give the folder that it is in, or a GGUF file (*.gguf)")
    if means_a_path(name):
        raise UserError(f"--model {name}: there is no such folder")
    location = ALIASES.get(name, name)
    if "/" not in location:
        near = difflib.get_close_matches(name, ALIASES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Aliases: {', '.join(ALIASES)}."
        raise UserError(f"--model {name}: is not an alias, a folder, or a Hugging Face id (owner/name). {hint}")
    commit, cached = hub_commit(location, revision)
    return ModelSource(name, location, False, commit, cached)


def means_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith((".gguf", "/"))


def local_model(name: str, place: Path, weights: bool) -> ModelSource:
    """A folder with a config.json, a GGUF file, or a folder with one. Raises UserError for anything else."""
    folder = place if place.is_dir() else place.parent
    plain = place.is_dir() and (folder / CONFIG).exists() and (not weights or any(folder.glob("*.safetensors")))
    gguf = None if plain else gguf_of(name, place)
    if gguf is not None:
        check_gguf(folder / gguf, name)
        return ModelSource(name, str(folder), True, digest_of([folder / gguf]) if weights else "", gguf=gguf)
    if not (folder / CONFIG).exists():
        hint = " It holds an adapter: merge that into its model and save the result" * has_adapter(folder)
        raise UserError(f"--model {name}: the folder holds no config.json, so it is not a Hugging Face model.{hint}")
    check_small(folder, name)
    checked_raw(read_json(folder / CONFIG, name), name)
    return ModelSource(name, str(folder), True, folder_digest(folder, name) if weights else "")


def has_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def gguf_of(name: str, place: Path) -> str | None:
    """The name of the GGUF file that is meant: the file itself, or the only one in a folder; None when there is
    none."""
    if place.is_file():
        return place.name
    found = sorted(path.name for path in place.iterdir() if path.suffix.lower() == ".gguf")
    if len(found) > 1:
        raise UserError(
            f"--model {name}: the folder holds {len(found)} GGUF files ({first_names(found)}). Name one of them"
        )
    return found[0] if found else None


def list_models() -> list[dict[str, str | int | None]]:
    """Every alias and its model; layers and width where they are known without the network."""
    shipped = json.loads((SHIPPED / "config.json").read_text())
    known = {str(SHIPPED): ("shipped", shipped["num_hidden_layers"], shipped["hidden_size"])}
    table: list[dict[str, str | int | None]] = []
    for alias, location in ALIASES.items():
        model, layers, width = known.get(location, (location, None, None))
        table.append({"alias": alias, "model": model, "layers": layers, "width": width})
    return table


def local_place(name: str) -> Path | None:
    """The folder or the GGUF file that a name means, itself or as an alias; None for the name of a hub model."""
    places = (Path(os.path.expanduser(name)), Path(ALIASES.get(name, "")))
    try:
        return next((place for place in places if place.parts and is_there(place)), None)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name[:200]}: cannot be looked for ({error})") from error


def is_there(place: Path) -> bool:
    return place.is_dir() or (place.suffix.lower() == ".gguf" and place.exists())


def digest_of(files: list[Path]) -> str:
    """A digest over all bytes of files, in this order."""
    joined = " ".join(file_digests(files))
    return hashlib.blake2b(joined.encode(), digest_size=32).hexdigest()


def folder_digest(folder: Path, name: str | None = None) -> str:
    """Identifies the model in a folder by all bytes of its configuration and of the weights files that are loaded.
    Raises UserError where these are incomplete."""
    return digest_of([folder / CONFIG, *weight_files(folder, name or str(folder))])


def sampled_digest(folder: Path) -> str:
    """The digest with which earlier versions identified a folder's model: 32 hex digits over its configuration and the
    size, first and last MiB of every weights file."""
    digest = hashlib.blake2b((folder / CONFIG).read_bytes(), digest_size=16)
    for path in sorted(p for p in folder.iterdir() if p.suffix == ".safetensors"):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def is_sampled(commit: object) -> bool:
    return isinstance(commit, str) and len(commit) == 32


def same_model(source: ModelSource, commit: object) -> bool:
    """Whether this is the model that a store names, by its content alone. A store of an earlier version names it by
    samples of its bytes; a message says that bytes outside the samples cannot be compared."""
    if source.commit == commit:
        return True
    comparable = source.local and source.gguf is None and is_sampled(commit)
    if not comparable or sampled_digest(Path(source.location)) != commit:
        return False
    say(
        f"{source.name}: the store is of an earlier version, which identified a model by its configuration and the "
        "first and last MiB of each weights file. These are the same; a change between them would not be noticed"
    )
    return True


def in_words(name: object, commit: object) -> str:
    """A model as messages name it."""
    kind = {32: "sampled digest", 40: "Hugging Face commit", 64: "digest"}.get(len(str(commit)), "commit")
    return f"{str(name)[:200]} ({kind} {str(commit)[:12]})"


def hub_commit(repo: str, revision: str | None) -> tuple[str, bool]:
    """The commit that a revision of a hub model means now, or the one in the local cache when the hub cannot be
    reached; and whether the cache was used. Takes at most HUB_SECONDS. Raises UserError for a model that is not there,
    BusyError when the hub is away and the cache lacks the model."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        asked = partial(HfApi().model_info, repo, revision=revision, timeout=HUB_SECONDS)
        return str(call_within(HUB_SECONDS, asked).sha), False
    except GatedRepoError as error:
        raise UserError(
            f"--model {repo}: needs permission; accept its terms and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"--revision {revision}: {repo} has no such branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"--model {repo}: Hugging Face has no model of that name") from error
    except Exception as unreachable:  # offline mode, DNS, proxies and time-outs arrive as many types
        try:
            return Path(snapshot_download(repo, revision=revision, local_files_only=True)).name, True
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise hub_error(unreachable)(
                f"--model {repo}: Hugging Face cannot be reached ({type(unreachable).__name__}) and it is not in "
                "the local cache. Check the network, or give a folder that holds the model"
            ) from error


def hub_error(error: BaseException) -> type[UserError]:
    """The class of message for a failed request to the hub: BusyError if the network or the server failed, UserError if
    the hub refused or may not be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OfflineModeIsEnabled):
            return UserError
        if isinstance(chain, HfHubHTTPError):
            status = chain.response.status_code
            return BusyError if status in (408, 429) or status >= 500 else UserError
        kinds = [kind.__name__ for kind in type(chain).__mro__]
        if isinstance(chain, ConnectionError | TimeoutError) or "TransportError" in kinds:  # of httpx, or of httpx2
            return BusyError
        chain = chain.__cause__ or chain.__context__
    return UserError


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns or raises what the call does. Raises TimeoutError when it takes longer, because a host with many
    addresses is tried once for each, with a timeout of its own. The call then continues on a daemon thread, which does
    not keep the process alive."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result.result(seconds)


def read_config(source: ModelSource) -> Any:
    """transformers' configuration of a model that can be harvested. Raises UserError for any other."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
    from transformers.utils import find_adapter_config_file

    with explained_loading(source, "configuration"):
        if not source.local and find_adapter_config_file(source.location, **source.arguments):
            raise UserError(
                f"--model {source.name}: is an adapter. Merge it into its model (merge_and_unload of PEFT), save that "
                "with save_pretrained, and give its folder"
            )
        raw, _ = PreTrainedConfig.get_config_dict(source.location, **source.arguments)
        checked_raw(raw, source.name)
        if source.gguf is None:
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.arguments)
        else:  # a second read of the file would take seconds
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    return checked_config(config, source.name)


def model_info(config: Any) -> ModelInfo:
    return info_of(config)


@contextmanager
def explained_loading(source: ModelSource, what: str) -> Iterator[None]:
    """Turns every error of a library that reads outside data into one message, including panics of Rust libraries,
    which are no Exception."""
    try:
        yield
    except (UserError, DamagedError, LostError, Interrupted):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # ends the process or a generator
        raise cannot_load(source, what, error) from error


def cannot_load(source: ModelSource, what: str, error: BaseException) -> UserError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    hint = ". Hugging Face cannot be reached, and the local cache lacks it: check the network" if source.cached else ""
    missing = source.cached and isinstance(error, OSError) and not HF_HUB_OFFLINE
    kind = BusyError if missing else UserError if source.local else hub_error(error)
    return kind(f"--model {source.name}: its {what} cannot be loaded: {cause(error)}{hint}")


def cause(error: BaseException) -> str:
    """The first line of a library's message, at most 300 characters, with the error's type where the line alone says
    little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[0][:300]
    is_clear = isinstance(error, OSError | UserError) or type(error) in (ValueError, RuntimeError)
    return line if is_clear and line else f"{type(error).__name__}{': ' if line else ''}{line}"
