"""Reads a .pt of OpenAI's sparse autoencoders for GPT-2 (versions 1 and 4: ReLU)."""

from pathlib import Path
from typing import Final

from shared.gate import BadData, quoted
from train.exchange.readers.base import Theirs, TranslatedSAE, brought, found
from train.exchange.tensors import read_pickled, readable, take

SHAPES: Final = {"encoder.weight": "n d", "decoder.weight": "d n", "pre_bias": "d", "latent_bias": "n"}
STATISTICS: Final = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
BESIDE: Final = ("activation", "activation_state_dict")


def read_openai(path: Path) -> TranslatedSAE:
    """Raises UserError for version 5 (TopK), which normalises each token, and for other files."""
    file = read_pickled(path)
    with readable(path):
        activation = file.others.get("activation", "ReLU")
        if activation == "TopK":
            raise BadData("has TopK (version 5), which divides each token by its own length first: nothing here does")
        if activation != "ReLU":
            raise BadData(f"has the activation {quoted(activation)}; ReLU is read")
        if others := sorted(file.others.keys() - set(BESIDE)):
            raise BadData(f"has {quoted(others[0])}, which no autoencoder of OpenAI has")
    w, _ = take(file, "an autoencoder of OpenAI", SHAPES, STATISTICS)
    with readable(path):
        decoder = w["decoder.weight"].T.contiguous()
        parts = brought(Theirs(w["encoder.weight"], decoder, w["pre_bias"], {"b_enc": w["latent_bias"]}))
    return found(("OpenAI", "relu", file), "relu", parts, {})
