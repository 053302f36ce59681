"""sparsify's files (1.3.3): HOOKPOINT/cfg.json and HOOKPOINT/sae.safetensors, and config.json above them.

sparsify knows ReLU with the k largest latents of each token and nothing else. relu (k = all) and autoencoders that
choose per token are exact; TopK in the place of thresholds is an approximation.
"""

from typing import Any, Final

from shared.errors import UserError
from shared.schemas.exchange import ExportConfig
from train.autoencoder import Autoencoder
from train.exchange import forms
from train.exchange.about import About
from train.exchange.writers import Written, json_file, provenance_block
from train.runs.checkpoint import pieces

SETTINGS: Final = "cfg.json"
WEIGHTS: Final = "sae.safetensors"
ROOT_SETTINGS: Final = "config.json"
OURS: Final = "sagsae.json"
"""sagsae's own description: sparsify prints a warning for each member of cfg.json that it does not know."""


def write(sae: Autoencoder, about: About, config: ExportConfig) -> Written:
    """Returns an autoencoder as sparsify's files. Raises UserError when it has thresholds and no approximation was
    asked for, for another --form, and for a hookpoint that is no module's output unless that is forced."""
    if config.form not in ("auto", "topk"):
        raise UserError(f"--form {config.form}: sparsify knows topk only. Leave --form out")
    folder = folder_name(sae, about, config.force)
    exact = exact_form(sae)
    form = exact or approximation(sae, config.approximate_topk)
    tensors = {
        "encoder.weight": form.W_enc.T,
        "encoder.bias": form.b_enc,
        "W_dec": form.W_dec,
        "b_dec": form.b_dec,
    }
    notes = []
    if config.approximate_topk is not None and exact is not None:
        notes.append(f"--approximate-topk has no effect: TopK with k {form.k} is the same function")
    if not is_output(about):
        notes.append(f"the folder {folder} is no module of the language model: sparsify cannot place it")
    root = {"model": about.model, "dataset": about.dataset, "ctx_len": about.context, "sagsae": {"name": about.name}}
    files = {
        f"{folder}/{OURS}": json_file({"sagsae": provenance_block(sae, about, form.width)}),
        f"{folder}/{SETTINGS}": json_file(settings_of(sae, form)),
        f"{folder}/{WEIGHTS}": pieces(forms.on_disk(tensors)),
        ROOT_SETTINGS: json_file(root),
    }
    return Written(files, "topk", form.width, notes, None if exact else form)


def folder_name(sae: Autoencoder, about: About, force: bool) -> str:
    """Returns the hookpoint as sparsify names it: the module whose output it is, without the base model's prefix.
    Raises UserError where there is none."""
    if about.hf_hook is not None and is_output(about):
        return about.hf_hook.module
    if not force:
        what = about.hook_name or "a hookpoint that cfg.json does not name"
        raise UserError(
            f"{sae.config.name}: is for {what}, and sparsify knows hookpoints by the module whose output they are, "
            "which this one does not have or which sagsae does not know. Export it to saelens, or write it with --force"
        )
    return about.hook_folder or "unknown"


def is_output(about: About) -> bool:
    """Whether the hookpoint is known to be the output of a module."""
    return about.hf_hook is not None and not about.hf_hook.is_input


def exact_form(sae: Autoencoder) -> forms.TopKForm | None:
    """Returns the TopK form that computes the same function, None where there is none."""
    if forms.chooses_per_token(sae):
        return forms.topk_form(sae)
    return forms.approximate_topk(forms.jumprelu_form(sae), sae.config.d_sae) if forms.is_relu(sae) else None


def approximation(sae: Autoencoder, k: int | None) -> forms.TopKForm:
    """Returns the TopK SAE with k latents per token and decoder rows of norm one. Raises UserError without a k, or with
    more than there are."""
    if k is None:
        raise UserError(
            f"{sae.config.name}: has thresholds, and sparsify keeps the k largest latents of each token instead. Write "
            "an approximation with --approximate-topk K, or export it to saelens"
        )
    form = forms.with_unit_rows(forms.jumprelu_form(sae))
    if k > form.width:
        raise UserError(f"--approximate-topk {k}: {sae.config.name} has {form.width} latents there")
    assert isinstance(form, forms.JumpReluForm)
    return forms.approximate_topk(form, k)


def settings_of(sae: Autoencoder, form: forms.TopKForm) -> dict[str, Any]:
    """Returns the content of cfg.json. `num_latents` is what counts there; `expansion_factor` has to be a whole
    number."""
    return {
        "activation": "topk",
        "expansion_factor": max(1, form.width // sae.d_in),
        "normalize_decoder": form.has_unit_rows(),
        "num_latents": form.width,
        "k": form.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
