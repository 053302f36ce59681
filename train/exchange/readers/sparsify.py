"""Reads an autoencoder that sparsify saved: cfg.json and sae.safetensors, in a folder named after the HF module."""

import re
from pathlib import Path
from typing import Any, Final

from shared.errors import UserError
from shared.gate import BadData, integer, quoted
from train.exchange.readers.base import Theirs, TranslatedSAE, brought, found, said_switch, said_text
from train.exchange.readers.ours import block_beside, restored
from train.exchange.tensors import read_json, read_safetensors, readable, take

SETTINGS: Final = "cfg.json"
WEIGHTS: Final = "sae.safetensors"
SHAPES: Final = {"encoder.weight": "n d_in", "encoder.bias": "n", "W_dec": "n d_in", "b_dec": "d_in"}
REFUSED: Final = {
    "transcode": "it is a transcoder: it predicts other activations than it reads",
    "skip_connection": "its output has a part that passes no latent",
    "embed_skip": "its output has a part that comes from the embedding",
    "gram_lookup": "its output has a part that comes from a table of n-grams",
}
"""Switches of cfg.json that make it something that has no equal here."""
MODULES: Final = {
    "": "hook_resid_post",
    ".mlp": "hook_mlp_out",
    ".attention": "hook_attn_out",
    ".self_attn": "hook_attn_out",
}


def read_sparsify(folder: Path) -> TranslatedSAE:
    """Raises UserError for what is no such folder, or has no equal here."""
    cfg = read_json(folder / SETTINGS)
    with readable(folder / SETTINGS):
        for name, why in REFUSED.items():
            if said_switch(cfg, name, False):
                raise BadData(f"says {name}, which has no equal here: {why}")
        activation = said_text(cfg, "activation") or "topk"
        if activation != "topk":
            raise BadData(f"says activation {quoted(activation)}; only topk is read")
        signed = said_switch(cfg, "signed", False)
    file = read_safetensors(folder / WEIGHTS)
    tensors, sizes = take(file, "an autoencoder of sparsify", SHAPES)
    with readable(folder / SETTINGS):
        if cfg.get("d_in", sizes["d_in"]) != sizes["d_in"]:
            raise BadData(f"says d_in {quoted(cfg['d_in'])}, and {WEIGHTS} has {sizes['d_in']:,}")
        if cfg.get("num_latents") not in (None, 0, sizes["n"]):
            raise BadData(f"says num_latents {quoted(cfg['num_latents'])}, and {WEIGHTS} has {sizes['n']:,}")
        k = integer(cfg.get("k"), "k", 1)
    family = "signed-topk" if signed else "topk" if k < sizes["n"] else "relu"
    with readable(file.path):
        matrices = (tensors["encoder.weight"], tensors["W_dec"], tensors["b_dec"])
        parts = brought(Theirs(*matrices, {"b_enc": tensors["encoder.bias"]}, keeps_norms=family != "relu"))
    done = found(("sparsify", "topk", file), family, parts, said_about(folder), min(k, sizes["n"]))
    return restored(done, block_beside(folder))


def said_about(folder: Path) -> dict[str, Any]:
    """hook_name from the folder's name, model and context from the config.json above it, where there is one."""
    module = re.fullmatch(r"(?:\w+\.)?(?:layers|h)\.([0-9]{1,4})((?:\.\w+)?)", folder.absolute().name)
    hook = f"blocks.{int(module[1])}.{MODULES[module[2]]}" if module and module[2] in MODULES else None
    try:
        above = read_json(folder.absolute().parent / "config.json")
        context = above.get("ctx_len")
        model = said_text(above, "model")
    except (UserError, BadData):  # it belongs to the repository, not to the autoencoder
        return {"hook_name": hook}
    return {"hook_name": hook, "model": model, "context": context if type(context) is int and context > 0 else None}
