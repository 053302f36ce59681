"""Collects what other tools ask about a saved autoencoder: model, hookpoint, corpus, and what was measured.

It comes from cfg.json and, where the autoencoder belongs to a run, from the run's settings, its evaluation and its
store. All of it may be anybody's: every value is checked here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shared.config import TrainConfig
from shared.errors import UserError
from shared.files.base import is_remote
from shared.gate import BadData, integer, members, number, quoted, text
from shared.model.source import ALIASES, local_place
from shared.model.weights import CONFIG, read_json
from shared.store.opened import Store, find_hookpoint
from shared.store.spec import StoreSpec, corpus_name
from train.autoencoder import SETTINGS
from train.exchange.saved import FiringCounts, SavedSAE
from train.runs.folder import RunFolder

MOST_CONTEXT: Final = 1 << 24
HOOK: Final = re.compile(r"blocks\.([0-9]{1,6})\.(?:hook_)?([A-Za-z0-9_.]+)")


@dataclass(frozen=True)
class ModuleNames:
    """What an architecture of transformers calls its modules."""

    base: str
    """The prefix of the base model inside the causal language model."""
    blocks: str
    before: str | None
    """The module whose output enters the first block; None where there is none."""
    mlp: str
    """Inside a block: the module whose output is mlp_out."""
    attention: str
    """Inside a block: the module whose output is attn_out."""
    heads: str
    """Inside a block: the module whose input is attn.hook_z."""


LLAMA: Final = ModuleNames("model.", "layers", "embed_tokens", "mlp", "self_attn", "self_attn.o_proj")
GEMMA: Final = replace(LLAMA, before=None)  # it scales embeddings before the first block
GEMMA2: Final = replace(GEMMA, mlp="post_feedforward_layernorm", attention="post_attention_layernorm")
FAMILIES: Final = {
    "gpt_neox": ModuleNames("gpt_neox.", "layers", "embed_in", "mlp", "attention", "attention.dense"),
    "gpt2": ModuleNames("transformer.", "h", "drop", "mlp", "attn", "attn.c_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), LLAMA),
    "gemma": GEMMA,
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA2),
}
"""By transformers' `model_type`."""
HUB_FAMILIES: Final = {
    r"EleutherAI/(pythia|gpt-neox)-.*": "gpt_neox",
    r"(openai-community/)?gpt2(-.*)?": "gpt2",
    r"HuggingFaceTB/SmolLM3-.*": "smollm3",
    r"HuggingFaceTB/SmolLM2?-.*": "llama",
    r"meta-llama/.*": "llama",
    r"Qwen/Qwen2(\.5)?-.*": "qwen2",
    r"Qwen/Qwen3-[0-9.]+B.*": "qwen3",
    r"google/gemma-[27]b.*": "gemma",
    r"google/gemma-2-.*": "gemma2",
    r"google/gemma-3-(270m|1b).*": "gemma3_text",
}
"""The `model_type` of models whose configuration is not on this machine, by their ids on the hub."""


@dataclass(frozen=True)
class HFHook:
    """A hookpoint as Hugging Face's modules know it."""

    base: str
    """The prefix of the base model inside the causal language model: `gpt_neox.`"""
    module: str
    """The module without that prefix: `layers.2`."""
    is_input: bool = False
    """Whether the hookpoint is the module's input; else it is the output."""

    @property
    def name(self) -> str:
        """`gpt_neox.layers.2`; for an input `gpt_neox.layers.2.attention.dense.input`."""
        return f"{self.base}{self.module}{'.input' if self.is_input else ''}"


@dataclass(frozen=True)
class About:
    """What other tools ask about an autoencoder. None stands for what is not known."""

    name: str
    settings: Mapping[str, Any]
    """cfg.json, in which no path of this machine is left."""
    model: str | None = None
    """The language model's id on the hub; of a folder its name."""
    hook_name: str | None = None
    """TransformerLens' name of the hookpoint: `blocks.2.hook_resid_post`."""
    hf_hook: HFHook | None = None
    context: int | None = None
    """Tokens of a context."""
    prepends_bos: bool | None = None
    dataset: str | None = None
    """The corpus: an id on the hub, or the name of a file."""
    exclude_special: bool | None = None
    """Whether special tokens were left out of training."""
    skip_positions: int | None = None
    """How many positions at the beginning of each context were left out of training."""
    measured: Mapping[str, Any] | None = None
    """Its entry in evaluation.json."""
    firings: FiringCounts | None = None
    """How often each latent fired on the held-out tokens."""

    @property
    def layer(self) -> int | None:
        """The number of the block that the hookpoint is in."""
        found = HOOK.fullmatch(self.hook_name or "")
        return int(found[1]) if found else None

    @property
    def hook_folder(self) -> str | None:
        """The hookpoint as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", self.hook_name).strip(".") or None if self.hook_name else None

    @property
    def hook_part(self) -> str | None:
        """The hookpoint inside its block: `resid_post`, `attn.hook_z`."""
        found = HOOK.fullmatch(self.hook_name or "")
        return found[2] if found else None


def about_sae(saved: SavedSAE) -> About:
    """Returns what is known about a saved autoencoder. Raises UserError when cfg.json has a value of a wrong type, and
    what reading the run's files raises. The store is read only where it is a folder that is still there."""
    settings = saved.about()
    run = RunFolder(saved.run).config() if saved.run else None
    spec = spec_of(run)
    try:
        model = known_model(settings.get("model"))
        hook_name = optional(settings, "hook_name", text)
        bos_known = "bos_id" in settings and (settings["bos_id"] is not None or "imported" not in settings)
        return About(
            name=saved.name,
            settings={**settings, **({"model": model} if model else {})},
            model=model["name"] if model else None,
            hook_name=hook_name,
            hf_hook=hf_hook(hook_name, model_type(settings["model"])) if model and hook_name else None,
            context=optional(settings, "context", lambda value, name: integer(value, name, 1, MOST_CONTEXT)),
            prepends_bos=settings["bos_id"] is not None if bos_known else None,
            dataset=optional(settings, "corpus", text) or (corpus_name(spec.corpus.get("source")) if spec else None),
            exclude_special=optional(settings, "exclude_special", truth) if run is None else run.exclude_special,
            skip_positions=skipped(settings, run, spec),
            measured=saved.measured() or None,
            firings=saved.firings(),
        )
    except BadData as error:
        raise UserError(f"{saved.folder / SETTINGS}: {error}") from error


def optional(settings: Mapping[str, Any], name: str, check: Any) -> Any:
    """Returns a checked member; None where it is absent or null. Raises BadData."""
    return None if settings.get(name) is None else check(settings[name], name)


def truth(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadData(f"{name} is {quoted(value)} instead of true or false")
    return value


def known_model(recorded: Any) -> dict[str, Any] | None:
    """Returns the recorded model with its name as others know it: an alias resolved, of a folder the last part. Raises
    BadData."""
    if recorded is None:
        return None
    if not isinstance(recorded, dict):
        raise BadData(f"model is {quoted(recorded)} instead of an object")
    model = members(recorded, ("name",), None)
    name = text(model["name"], "model.name")
    if truth(model.get("local", False), "model.local"):
        return {**model, "name": Path(name).name or name}
    return {**model, "name": ALIASES.get(name, name)}


def model_type(model: Mapping[str, Any]) -> str | None:
    """Returns transformers' `model_type` of a recorded model: from its folder, from the hub's cache on this machine, or
    from its id. None where none of them says it. No request is sent."""
    name = text(model["name"], "model.name")
    try:
        if model.get("local", False):
            place = local_place(name)
            found = place / CONFIG if place is not None and place.is_dir() else None
        else:
            found = cached_config(ALIASES.get(name, name), optional(model, "commit", text))
        kind = read_json(found, name).get("model_type") if found is not None and found.is_file() else None
    except (UserError, OSError):
        kind = None
    if isinstance(kind, str):
        return kind
    ids = (kind for pattern, kind in HUB_FAMILIES.items() if re.fullmatch(pattern, ALIASES.get(name, name)))
    return None if model.get("local", False) else next(ids, None)


def cached_config(repo: str, commit: str | None) -> Path | None:
    """Returns the model's configuration in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, CONFIG, revision=commit)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def hf_hook(hook_name: str, kind: str | None) -> HFHook | None:
    """Returns the module of a model of this `model_type` that has a TransformerLens hookpoint as its output, or as its
    input; None for a hookpoint that no module has, and for types that are not in the table."""
    found = HOOK.fullmatch(hook_name)
    if found is None or kind not in FAMILIES:
        return None
    names, layer, part = FAMILIES[kind], int(found[1]), found[2]
    block = f"{names.blocks}.{layer}"
    modules = {
        "resid_post": block,
        "resid_pre": f"{names.blocks}.{layer - 1}" if layer else names.before,
        "mlp_out": f"{block}.{names.mlp}",
        "attn_out": f"{block}.{names.attention}",
        "attn.hook_z": f"{block}.{names.heads}",
    }
    module = modules.get(part)
    return HFHook(names.base, module, part == "attn.hook_z") if module else None


def spec_of(run: TrainConfig | None) -> StoreSpec | None:
    """Returns the spec of a run's store; None where it is not on this machine."""
    found = local_store(run)
    return found[0].spec if found else None


def local_store(run: TrainConfig | None) -> tuple[Store, str] | None:
    """Returns a run's store with the path of its hookpoint; None where it is not a folder of this machine."""
    if run is None or is_remote(run.store) or not Path(run.store).exists():
        return None
    try:
        return find_hookpoint(run.store, run.hook)
    except UserError:
        return None  # something else lies there now


def skipped(settings: Mapping[str, Any], run: TrainConfig | None, spec: StoreSpec | None) -> int | None:
    """Returns how many positions at the beginning of a context were left out; None where that is not known, or where
    others were. Raises BadData."""
    if settings.get("exclude_positions") is not None:
        left_out = settings["exclude_positions"]
    elif run is not None and run.exclude_positions is not None:
        left_out = list(run.exclude_positions)
    else:
        return spec.skip_positions if spec else None
    if not isinstance(left_out, list):
        raise BadData(f"exclude_positions is {quoted(left_out)} instead of a list")
    return len(left_out) if left_out == list(range(len(left_out))) else None


def measured_number(about: About, name: str) -> float | None:
    """Returns a number of evaluation.json, None where it was not measured. Raises UserError for anything else."""
    found = (about.measured or {}).get(name)
    try:
        return None if found is None else number(found, name)
    except BadData as error:
        raise UserError(f"evaluation.json of {about.name}: {error}. Write it again: sagsae eval") from error
