"""Checks that a loaded model is the one in its files, from the library's lists of missing and unexpected tensors.

transformers initialises weights at random where a file lacks them, and skips tensors that the model has no place for;
it only lists both.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from shared.errors import UserError
from shared.model.weights import first_names
from shared.progress import say

WRAPPERS: Final = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning",
    "model.module.": "a training wrapper",
    "base_model.model.": "PEFT: an adapter that was not merged",
    "transformer.module.": "a training wrapper",
}
BUFFERS: Final = re.compile(
    r"(inv_freq|\.(attn|attention|self_attn|self_attention)\.(bias|masked_bias)|masked_bias|causal_mask|position_ids|"
    r"(cos|sin)_cached|freqs_cis|rope\.freqs|rotary_(pos_)?emb\S*|relative_position_index|num_batches_tracked|"
    r"embed_positions\.(weights|_float_tensor)|alibi\w*|slopes|version)$"
)
"""Buffers that older checkpoints contain and newer models compute themselves."""
NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def check_loaded(model: Any, info: Mapping[str, Any], name: str) -> None:
    """Raises UserError, naming tensors, when weights of the model are missing from its files, or the files hold others
    that the model should use. Tensors of parts that do not run (vision towers, heads, further prediction layers) are
    listed in a message."""
    missing, unexpected = sorted(info.get("missing_keys", ())), sorted(info.get("unexpected_keys", ()))
    mismatched = sorted(f"{key[0]} {list(key[1])} for {list(key[2])}" for key in info.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            f"--model {name}: its files lack {len(missing):,} of the model's weights: {first_names(missing)}."
            f"{likely_reason(missing, unexpected, model)} Missing weights are never initialised at random"
        )
    if mismatched:
        raise UserError(
            f"--model {name}: {len(mismatched):,} weights have another shape in the files than config.json says: "
            f"{first_names(mismatched)}. The configuration and the weights are not of the same model"
        )
    wrong = tensors_that_belong(unexpected, model)
    if wrong:
        raise UserError(
            f"--model {name}: its files hold {len(wrong):,} weights for which the model that config.json describes has "
            f"no place: {first_names(wrong)}.{prefix_hint(wrong)} It would compute without them. Check config.json "
            "(architecture, number of layers, biases)"
        )
    zeros = [key for key, weight in model.named_parameters() if weight.dim() > 1 and is_zero(weight)]
    if zeros:
        names = first_names(zeros)
        say(f"{name}: {len(zeros):,} weights are all zeros, as in a file that was not written whole: {names}")
    rest = [key for key in unexpected if not BUFFERS.search(key)]
    if rest:
        say(f"{name}: {len(rest):,} tensors of its files are not part of the language model: {first_names(rest)}")


def is_zero(weight: Any) -> bool:
    """Whether a weight in memory is zero throughout. The end is checked first, so that other weights cost nothing."""
    return weight.device.type != "meta" and not weight.flatten()[-4096:].any() and not weight.any()


def tensors_that_belong(unexpected: Iterable[str], model: Any) -> list[str]:
    """The unexpected tensors that the model would compute with if it had a place for them: all inside the part that
    runs, except buffers and whole further layers of another kind than the model's own."""
    inside = f"{model.base_model_prefix}."
    own = {NUMBER.sub("#", key) for key in model.state_dict()}
    left = [key for key in unexpected if not BUFFERS.search(key)]
    blocks = {block_of(key) for key in model.state_dict()} - {None}
    foreign = {block_of(key) for key in left if block_of(key) and NUMBER.sub("#", key) not in own} - blocks
    wrapped = [key for key in left if any(key.startswith(wrapper) for wrapper in WRAPPERS) or ".lora_" in key]
    runs = [key for key in left if key.startswith(inside) or {block_of(key), f"{inside}{block_of(key)}"} & blocks]
    found = [key for key in runs if block_of(key) not in foreign]
    return sorted({*wrapped, *found})


def block_of(key: str) -> str | None:
    """`model.layers.3` for `model.layers.3.mlp.up_proj.weight`."""
    match = NUMBER.search(key)
    return key[: match.end()] if match else None


def likely_reason(missing: list[str], unexpected: list[str], model: Any) -> str:
    """A likely reason why weights are missing."""
    if unexpected:
        prefixes = prefix_hint(unexpected)
        return prefixes or f" They hold {len(unexpected):,} others instead: {first_names(unexpected)}."
    output = model.get_output_embeddings()
    if output is not None and all(model.get_submodule(key.rpartition(".")[0]) is output for key in missing):
        return " It is the output layer alone: save the whole causal language model, or set tie_word_embeddings."
    return " The download, the copy or the conversion is not complete."


def prefix_hint(keys: list[str]) -> str:
    for wrapper, who in WRAPPERS.items():
        if any(key.startswith(wrapper) for key in keys):
            return f" The files' names begin with {wrapper!r} ({who}): save the model inside the wrapper."
    return ""
