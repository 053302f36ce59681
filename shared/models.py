"""Which model a name means: aliases, folders and Hugging Face ids, the commit, the configuration, the tokenizer.

Nothing here reads weights, and no code that comes with a model is ever run. Heavy imports happen inside the functions
that need them.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final

from shared.errors import UserError

SHIPPED: Final = Path(__file__).parent / "tiny"

ALIASES: Final = {
    "tiny": str(SHIPPED),
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in
       ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")},
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "smollm3-3b-base": "HuggingFaceTB/SmolLM3-3B-Base",
    "gpt2": "openai-community/gpt2",
}  # fmt: skip

HUB_SECONDS: Final = 3.0
"""How long the hub may take to say which commit a name means."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `location` is a folder or a hub id, `commit` pins the weights."""

    name: str
    location: str
    local: bool
    commit: str
    """The hub's commit, or for a folder a digest of its configuration and weights."""
    cached: bool = False
    """The hub was out of reach: only what is in the local cache can be had."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that make transformers load exactly this, without the network when it is local."""
        if self.local:
            return {"local_files_only": True}
        return {"revision": self.commit, "local_files_only": self.cached}


@dataclass(frozen=True)
class ModelInfo:
    """What can be known from the configuration, before any weights are loaded."""

    n_layers: int
    d_model: int
    vocab_size: int
    max_context: int


def resolve_model(name: str, revision: str | None = None, weights: bool = True) -> ModelSource:
    """The model an alias, a folder or a hub id means. Raises UserError when there is none. Where no weights are wanted,
    a folder needs none and has no commit."""
    folder = local_folder(name)
    if folder is not None:
        if revision is not None:
            raise UserError(f"--revision {revision}: {name} is a folder; revisions belong to Hugging Face models")
        if not (folder / "config.json").is_file():
            raise UserError(f"--model {name}: the folder holds no config.json, so it is not a Hugging Face model")
        return ModelSource(name, str(folder), True, folder_digest(folder) if weights else "")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such folder")
    location = ALIASES.get(name, name)
    if "/" not in location:
        near = difflib.get_close_matches(name, ALIASES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Aliases: {', '.join(ALIASES)}."
        raise UserError(f"--model {name}: is not an alias, a folder, or a Hugging Face id (owner/name). {hint}")
    commit, cached = hub_commit(location, revision)
    return ModelSource(name, location, False, commit, cached)


def list_models() -> list[dict[str, str | int | None]]:
    """Every alias and what it stands for; layers and width where they are known without the network."""
    shipped = json.loads((SHIPPED / "config.json").read_text())
    known = {str(SHIPPED): ("shipped", shipped["num_hidden_layers"], shipped["hidden_size"])}
    table: list[dict[str, str | int | None]] = []
    for alias, location in ALIASES.items():
        model, layers, width = known.get(location, (location, None, None))
        table.append({"alias": alias, "model": model, "layers": layers, "width": width})
    return table


def local_folder(name: str) -> Path | None:
    """The folder that a name means, itself or as an alias; None for the name of a hub model."""
    folders = (Path(name).expanduser(), Path(ALIASES.get(name, "")))
    return next((folder for folder in folders if str(folder) != "." and folder.is_dir()), None)


def folder_digest(folder: Path) -> str:
    """Names the model in a folder by its configuration and by the size, first and last MiB of every weights file."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    weights = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
    if not weights:
        raise UserError(
            f"--model {folder}: the folder holds no weights (*.safetensors). Pickled ones (*.bin) are never read: "
            "save the model anew with save_pretrained"
        )
    for path in weights:
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def hub_commit(repo: str, revision: str | None) -> tuple[str, bool]:
    """The commit that a revision of a hub model means now, or the one in the local cache when the hub is out of reach;
    and whether it was. Takes at most HUB_SECONDS."""
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
        return str(within(HUB_SECONDS, asked).sha), False
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
            raise UserError(
                f"--model {repo}: Hugging Face cannot be reached ({type(unreachable).__name__}) and it is not in "
                "the local cache. Check the network, or give a folder that holds the model"
            ) from error


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns or raises. TimeoutError when it takes longer: a host with many addresses is tried once for
    each, with a time-out of its own. The call is then left alone, on a thread that keeps no process alive."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result.result(seconds)


def read_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.arguments)
    except (OSError, ValueError) as error:
        raise cannot_load(source, "configuration", error) from error


def model_info(config: Any) -> ModelInfo:
    text = config.get_text_config()
    context = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length"))
    return ModelInfo(
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        vocab_size=text.vocab_size,
        max_context=next((length for length in context if length), 1 << 20),
    )


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer, which must name an end-of-text token. Raises UserError otherwise."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.arguments)
    except (OSError, ValueError) as error:
        raise cannot_load(source, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {source.name}: its tokenizer names no end-of-text token to join documents with")
    return tokenizer


def cannot_load(source: ModelSource, what: str, error: BaseException) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    hint = ". Hugging Face cannot be reached, and the local cache lacks it: check the network" if source.cached else ""
    return UserError(f"--model {source.name}: its {what} cannot be loaded: {lines[0]}{hint}")
