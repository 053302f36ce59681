"""SAELens' files (6.54.12): cfg.json, sae_weights.safetensors, and sparsity.safetensors where firings were counted.

Every member of cfg.json is written, for SAELens replaces absent ones silently: without `sae_lens_version` it drops the
whole metadata, and without `apply_b_dec_to_input` it subtracts b_dec from the input.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.schemas.exchange import ExportConfig
from train.autoencoder import Autoencoder
from train.exchange import forms
from train.exchange.about import About, measured_number
from train.exchange.saved import FiringCounts
from train.exchange.writers import Written, chosen, json_file, provenance_block
from train.runs.checkpoint import pieces

SETTINGS: Final = "cfg.json"
WEIGHTS: Final = "sae_weights.safetensors"
SPARSITY: Final = "sparsity.safetensors"
NEVER: Final = 1e-10
"""What SAELens adds to the share of tokens on which a latent fires, so that log10 of it is -10 for one that never does.
"""
NATIVE: Final = "sagsae_bijumprelu.py"
"""The class that SAELens needs for the bijumprelu form."""
VERSION: Final = "6.54.12"
"""The release whose files these are."""
FORMS: Final[Mapping[str, tuple[Callable[[Autoencoder], bool], Callable[[Autoencoder], forms.Form]]]] = {
    "gated": (forms.has_gates, forms.gated_form),
    "standard": (forms.is_relu, forms.jumprelu_form),
    "jumprelu": (forms.has_thresholds, forms.jumprelu_form),
    "abstopk": (lambda sae: sae.signed and forms.chooses_per_token(sae), forms.signed_topk_form),
    "topk": (forms.chooses_per_token, forms.topk_form),
    "bijumprelu": (lambda sae: sae.signed and forms.has_thresholds(sae), forms.bijumprelu_form),
}
"""Each architecture of SAELens: whether an autoencoder has it, and how it is made. The first one is the default."""


def write(sae: Autoencoder, about: About, config: ExportConfig) -> Written:
    """Returns an autoencoder as SAELens' files. Raises UserError when it does not have the form asked for."""
    name = chosen(sae, config, {form: has for form, (has, _) in FORMS.items()})
    form = FORMS[name][1](sae)
    if config.fold_b_dec:
        form = forms.without_input_bias(form)
    tensors = form.named()
    if name == "standard":
        del tensors["threshold"]
    settings = settings_of(sae, about, name, form, config)
    files = {SETTINGS: json_file(settings), WEIGHTS: pieces(forms.on_disk(tensors))}
    if about.firings is not None:
        files[SPARSITY] = pieces({"sparsity": log_frequencies(about.firings, form.width)})
    if name == "bijumprelu":
        files[NATIVE] = [(Path(__file__).parent / NATIVE).read_bytes()]
    return Written(files, name, form.width, notes_of(about, name, settings), optional=(SPARSITY, NATIVE))


def log_frequencies(firings: FiringCounts, width: int) -> Float[Tensor, " n"]:
    """Returns log10 of the share of tokens on which each latent of the exported width fires: the two poles of a signed
    latent one behind the other, or together where the export keeps the sign."""
    above, below = firings.positive, firings.negative
    counts = torch.cat([above, below]) if width == 2 * len(above) else above + below
    return torch.log10(counts.double() / firings.tokens + NEVER).float()


def settings_of(sae: Autoencoder, about: About, name: str, form: forms.Form, config: ExportConfig) -> dict[str, Any]:
    """Returns the content of cfg.json."""
    topk = {}
    if isinstance(form, forms.TopKForm):
        # With unit rows nothing is rescaled, and SAELens refuses fold_W_dec_norm without this.
        topk = {"k": form.k, "rescale_acts_by_decoder_norm": form.has_unit_rows()}
    is_hook_z = (about.hook_name or "").endswith("hook_z")
    return {
        "architecture": name,
        "d_in": sae.d_in,
        "d_sae": form.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not config.fold_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if is_hook_z else "none",
        **topk,
        "metadata": metadata(sae, about, form.width),
    }


def metadata(sae: Autoencoder, about: About, width: int) -> dict[str, Any]:
    """Returns what SAELens knows about the autoencoder's surroundings. Members without a value are null."""
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": about.model,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "hook_name": about.hook_name,
        "hf_hook_name": about.hf_hook.name if about.hf_hook else None,
        "hook_head_index": None,
        "context_size": about.context,
        "prepend_bos": about.prepends_bos,
        "dataset_path": about.dataset,
        "seqpos_slice": [about.skip_positions, None] if about.skip_positions else [None],
        "exclude_special_tokens": about.exclude_special,
        "l0": measured_number(about, "l0"),
        "r2": measured_number(about, "r2"),
        "num_dead_features": dead_latents(sae, about, width),
        "sagsae": provenance_block(sae, about, width),
    }


def dead_latents(sae: Autoencoder, about: About, width: int) -> int | None:
    """Returns how many latents of the exported width fired on no held-out token; None where it was not measured."""
    densities = (about.measured or {}).get("densities")
    never = densities.get("never") if isinstance(densities, dict) else None
    if not isinstance(never, dict):
        return None
    poles = ("positive", "negative") if width == 2 * sae.config.d_sae else ("either",)
    found = [each for each in map(never.get, poles) if type(each) is int]
    return sum(found) if len(found) == len(poles) else None


def notes_of(about: About, name: str, settings: dict[str, Any]) -> list[str]:
    """Returns what the reader of the files has to know or lacks."""
    found = settings["metadata"]
    wanted = ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path")
    missing = [key for key in wanted if found[key] is None]
    notes = [f"not known, and null in cfg.json: {', '.join(missing)}"] if missing else []
    if about.measured is None:
        notes.append("not evaluated: cfg.json says no L0 and no R². Run sagsae eval first")
    if name == "bijumprelu":
        notes.append(f"SAELens loads it after `import {NATIVE.removesuffix('.py')}`, a file beside it")
    if about.firings is None:
        notes.append(f"no {SPARSITY}: firings of single latents were not counted. sagsae eval RUN counts them")
    return notes
