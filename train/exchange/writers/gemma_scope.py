"""Gemma Scope's file: params.npz, a JumpReLU SAE that does not subtract b_dec from its input, without pickles.

The format has no description. sagsae.json beside it holds sagsae's own.
"""

import io
from typing import Any, Final

import numpy as np

from shared.schemas.exchange import ExportConfig
from train.autoencoder import Autoencoder
from train.exchange import forms
from train.exchange.about import About
from train.exchange.writers import Written, chosen, json_file, provenance_block

SETTINGS: Final = "sagsae.json"
WEIGHTS: Final = "params.npz"


def write(sae: Autoencoder, about: About, config: ExportConfig) -> Written:
    """Returns an autoencoder as Gemma Scope's file. Raises UserError when it has no JumpReLU form."""
    name = chosen(sae, config, {"jumprelu": forms.has_thresholds})
    form = forms.without_input_bias(forms.jumprelu_form(sae))
    file = io.BytesIO()
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in forms.on_disk(form.named()).items()}
    np.savez(file, allow_pickle=False, **arrays)
    settings = {"hook_name": about.hook_name, "sagsae": provenance_block(sae, about, form.width)}
    return Written({SETTINGS: json_file(settings), WEIGHTS: [file.getvalue()]}, name, form.width)
