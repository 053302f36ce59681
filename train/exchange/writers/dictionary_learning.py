"""dictionary_learning's files (0.1.0): config.json and ae.pt, a pickle of plain tensors. The package reads no other.

SAEBench reads them, too: it wants decoder rows of norm one, and looks at `trainer_class`. Every reader takes the
hookpoint for a block's output, so that other hookpoints are refused.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from shared.errors import UserError
from shared.schemas.exchange import ExportConfig
from train.autoencoder import Autoencoder
from train.exchange import forms
from train.exchange.about import About
from train.exchange.writers import Written, chosen, json_file, provenance_block

SETTINGS: Final = "config.json"
WEIGHTS: Final = "ae.pt"
NAMED: Final = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
"""Their names for tensors of a form; the matrices are transposed there."""


@dataclass(frozen=True)
class DictionaryKind:
    """One of dictionary_learning's classes."""

    has: Callable[[Autoencoder], bool]
    dict_class: str
    trainer_class: str
    tensors: Callable[[Autoencoder, forms.Form], dict[str, Tensor]]
    form: Callable[[Autoencoder], forms.Form] = forms.jumprelu_form
    subtracts_b_dec: bool = True


def linear(form: forms.Form, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns tensors under other names, the matrices as torch.nn.Linear holds them."""
    found = form.named()
    return {theirs: found[ours].T if found[ours].ndim == 2 else found[ours] for ours, theirs in names.items()}


def gated_tensors(_: Autoencoder, form: forms.Form) -> dict[str, Tensor]:
    vectors = {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
    return linear(form, {"W_enc": NAMED["W_enc"], "W_dec": NAMED["W_dec"], **vectors})


def relu_tensors(_: Autoencoder, form: forms.Form) -> dict[str, Tensor]:
    return linear(form, {**NAMED, "b_dec": "bias"})


def jumprelu_tensors(_: Autoencoder, form: forms.Form) -> dict[str, Tensor]:
    return form.named()


def topk_tensors(sae: Autoencoder, form: forms.Form) -> dict[str, Tensor]:
    """With the buffers `k` and `threshold`; -1 is their word for a threshold that is not there."""
    one = forms.thresholds_of(sae)[0] if forms.has_one_threshold(sae) else torch.tensor(-1.0)
    k = torch.tensor(forms.k_of(sae), dtype=torch.int32)
    return {**linear(form, {**NAMED, "b_dec": "b_dec"}), "k": k, "threshold": one.clone()}


FORMS: Final[Mapping[str, DictionaryKind]] = {
    "gated": DictionaryKind(forms.has_gates, "GatedAutoEncoder", "GatedSAETrainer", gated_tensors, forms.gated_form),
    "standard": DictionaryKind(forms.is_relu, "AutoEncoder", "StandardTrainer", relu_tensors),
    "batch-topk": DictionaryKind(forms.has_one_threshold, "BatchTopKSAE", "BatchTopKTrainer", topk_tensors),
    "jumprelu": DictionaryKind(
        forms.has_thresholds, "JumpReluAutoEncoder", "JumpReluTrainer", jumprelu_tensors, subtracts_b_dec=False
    ),
    "topk": DictionaryKind(forms.chooses_per_token, "AutoEncoderTopK", "TopKTrainer", topk_tensors, forms.topk_form),
}
"""By form; the first one that an autoencoder has is the default."""


def write(sae: Autoencoder, about: About, config: ExportConfig) -> Written:
    """Returns an autoencoder as dictionary_learning's files. Raises UserError when it does not have the form asked for,
    and for another hookpoint than a block's output unless that is forced."""
    check_hook(sae, about, config.force)
    name = chosen(sae, config, {form: kind.has for form, kind in FORMS.items()})
    kind = FORMS[name]
    form, notes = unit_rows(kind.form(sae), about)
    if not kind.subtracts_b_dec:
        form = forms.without_input_bias(form)
    tensors = OrderedDict(forms.on_disk(kind.tensors(sae, form)))
    settings = settings_of(sae, about, kind, form.width)
    return Written({SETTINGS: json_file(settings), WEIGHTS: [pickled(tensors)]}, name, form.width, notes)


def check_hook(sae: Autoencoder, about: About, force: bool) -> None:
    """Raises UserError for a hookpoint that the files cannot name."""
    if about.hook_part != "resid_post" and not force:
        what = about.hook_name or "a hookpoint that cfg.json does not name"
        raise UserError(
            f"{sae.config.name}: is for {what}, and every reader of dictionary_learning's files takes it for "
            "blocks.N.hook_resid_post. Export it to saelens, or write it all the same with --force"
        )


def unit_rows(form: forms.Form, about: About) -> tuple[forms.Form, list[str]]:
    """Returns the form with decoder rows of norm one, which SAEBench demands, and what a reader has to know."""
    notes = []
    if about.hook_part != "resid_post":
        notes.append(f"readers of these files take {about.hook_name} for blocks.{about.layer}.hook_resid_post")
    if not form.has_unit_rows():
        if isinstance(form, forms.TopKForm):
            notes.append("SAEBench will not read it: decoder rows have no norm one, which decides what TopK chooses")
        else:
            form = forms.with_unit_rows(form)
            notes.append("decoder rows were scaled to norm one: latents are larger by the rows' old norms")
    return form, notes


def settings_of(sae: Autoencoder, about: About, kind: DictionaryKind, width: int) -> dict[str, Any]:
    """Returns the content of config.json."""
    trainer = {
        "dict_class": kind.dict_class,
        "trainer_class": kind.trainer_class,
        "activation_dim": sae.d_in,
        "dict_size": width,
        "layer": about.layer,
        "lm_name": about.model,
        "submodule_name": f"{about.hook_part}_layer_{about.layer}" if about.hook_part else None,
    }
    if hasattr(sae.config, "k"):
        trainer["k"] = forms.k_of(sae)
    buffer = {"ctx_len": about.context, "d_submodule": sae.d_in}
    return {"trainer": trainer, "buffer": buffer, "sagsae": provenance_block(sae, about, width)}


def pickled(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns torch.save's file of plain tensors, which torch.load reads with weights_only=True."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()
