"""The layers and the hooks that the form offers for a model, from its configuration alone.

This runs in the planner's process. It asks the network for nothing: a model of the hub whose configuration is not on
this machine has no list, and its layers and hooks are typed.
"""

from pathlib import Path
from typing import Any

from shared.model.hooks import hooks_of
from shared.model.source import ALIASES, ModelSource, local_place, model_info, read_config, resolve_model


def model_sites(model: str) -> dict[str, Any]:
    """`layers`: their number, or None where the configuration is not on this machine; `hooks`: short name and width of
    each that the model's middle layer has. Raises UserError for a model that cannot be harvested."""
    source = source_here(model)
    if source is None:
        return {"layers": None, "hooks": []}
    config = read_config(source)
    found = hooks_of(source, config, ("mid",), "sdpa")
    return {"layers": model_info(config).n_layers, "hooks": [[hook.short, hook.width] for hook in found if hook.short]}


def source_here(model: str) -> ModelSource | None:
    """A model whose configuration is on this machine: a folder, or what the hub's cache holds."""
    if local_place(model) is not None:
        return resolve_model(model, weights=False)
    from huggingface_hub import try_to_load_from_cache

    repo = ALIASES.get(model, model)
    found = try_to_load_from_cache(repo, "config.json")
    return ModelSource(model, repo, False, Path(found).parent.name, True) if isinstance(found, str) else None
