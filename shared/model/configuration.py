"""Checks a model's configuration before anything is built from it.

A configuration is downloaded: its numbers become loops and allocations in other libraries, its names may become
imports. Here they are bounded, and a model that cannot be harvested is refused with one message.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shared.errors import UserError
from shared.model.weights import quantised

BOUNDS: Final = {
    (1, 1024): ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    (1, 1 << 18): ("hidden_size", "n_embd", "d_model", "hidden_dim", "head_dim", "max_seq_len_cached"),
    (1, 1 << 20): ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "ffn_hidden_size"),
    (1, 1 << 14): ("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "num_heads"),
    (0, 1 << 14): ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    (1, 1 << 24): ("vocab_size",),
    (1, 1 << 31): ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "sliding_window"),
}
LIMITS: Final = {key: limits for limits, keys in BOUNDS.items() for key in keys}
DEEPEST: Final = 32
KERNELS: Final = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
"""Members in which a configuration may name a repository of code (owner/kernel) that transformers would fetch and
run."""


ENCODERS: Final = (
    "bert",
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "electra",
    "ernie",
    "rembert",
    "roformer",
    "roberta-prelayernorm",
    "big_bird",
    "data2vec-text",
    "megatron-bert",
    "roc_bert",
    "xmod",
    "xlm",
    "modernbert",
    "distilbert",
    "albert",
    "deberta",
    "deberta-v2",
    "nomic_bert",
)
"""Encoder architectures. Some can also be decoders, and then set is_decoder."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts that the configuration states, before any weights are loaded."""

    n_layers: int
    d_model: int
    vocab_size: int
    max_context: int


def checked_raw(raw: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a config.json that is no configuration, whose numbers no model has, or that cannot be
    harvested."""
    if not isinstance(raw.get("model_type", ""), str):
        raise wrong_value(name, "model_type", raw["model_type"], "the name of an architecture")
    for inside in sections(raw, name):
        for key, value in inside.items():
            if key in LIMITS:
                check_number(name, key, value)
            if key in KERNELS:
                check_kernel(name, key, value)
    if raw.get("quantization_config") or raw.get("compression_config"):
        how = raw.get("quantization_config") or raw["compression_config"]
        method = how.get("quant_method") if isinstance(how, dict) else None
        raise quantised(name, f"{str(method)[:40]} in config.json" if method else "quantization_config in config.json")
    if raw.get("is_encoder_decoder"):
        raise encoder_decoder(name, raw.get("model_type"))
    if raw.get("transformers_weights"):
        raise UserError(
            f"--model {name}: its config.json names a weights file of its own (transformers_weights), which is not "
            "supported. Save the model again with save_pretrained"
        )
    if raw.get("auto_map") and not known_type(raw.get("model_type")):
        raise UserError(
            f"--model {name}: comes with code of its own (auto_map), which is never run, and transformers has none for "
            f"model_type {str(raw.get('model_type'))[:80]!r}. Use a model of an architecture that it knows"
        )


def known_type(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def sections(raw: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """A configuration and those inside it."""
    waiting: list[tuple[Mapping[str, Any], int]] = [(raw, 0)]
    while waiting:
        inside, depth = waiting.pop()
        if depth > DEEPEST:
            raise UserError(f"--model {name}: its configuration cannot be loaded: config.json is nested too deeply")
        yield inside
        waiting += [(value, depth + 1) for value in inside.values() if isinstance(value, dict)]


def check_number(name: str, key: str, value: object) -> None:
    low, high = LIMITS[key]
    each = value if isinstance(value, list) else [value]
    for one in each:
        if one is None or (key == "sliding_window" and one in (0, -1)):
            continue
        if isinstance(one, bool) or not isinstance(one, int) or not low <= one <= high:
            raise wrong_value(name, key, one, f"a whole number from {low} to {high:,}")


def check_kernel(name: str, key: str, value: object) -> None:
    for one in value.values() if isinstance(value, dict) else [value]:
        if one is not None and (not isinstance(one, str) or "/" in one or ":" in one or "@" in one):
            raise UserError(
                f"--model {name}: its config.json names {str(one)[:80]!r} as {key}: code from the hub, which is never "
                "fetched or run. Remove that line; --attention says how attention is computed"
            )


def checked_config(config: Any, name: str) -> Any:
    """Returns transformers' configuration. Raises UserError unless it is a decoder's and its numbers are plausible."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise encoder_decoder(name, config.model_type)
    if getattr(config, "quantization_config", None):
        raise quantised(name, "quantization_config")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model {name}: transformers has no causal language model of model_type {config.model_type!r}. Only "
            "a decoder that predicts the next token can be harvested"
        )
    text = text_config(config)
    encoder = config.model_type in ENCODERS and not getattr(config, "is_decoder", False)
    both_ways = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    if encoder or both_ways or getattr(text, "is_causal", None) is False:
        raise UserError(
            f"--model {name}: its attention is bidirectional ({config.model_type}). Only a decoder that predicts the "
            "next token from those before it can be harvested"
        )
    for key, names in (("layers", "num_hidden_layers"), ("width", "hidden_size"), ("vocabulary", "vocab_size")):
        value = getattr(text, names, None)
        if value is None:
            raise UserError(f"--model {name}: its configuration does not say its {key} ({names})")
        check_number(name, names, value)
    return config


def text_config(config: Any) -> Any:
    return config.get_text_config()


def info_of(config: Any) -> ModelInfo:
    text = text_config(config)
    context = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length"))
    return ModelInfo(
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        vocab_size=text.vocab_size,
        max_context=next((length for length in context if length), 1 << 20),
    )


def encoder_decoder(name: str, model_type: object) -> UserError:
    return UserError(
        f"--model {name}: is an encoder-decoder ({str(model_type)[:80]}). Only a decoder that predicts "
        "the next token can be harvested"
    )


def wrong_value(name: str, key: str, value: object, expected: str) -> UserError:
    shown = "a number of many digits" if isinstance(value, int) and value.bit_length() > 100 else repr(value)[:80]
    return UserError(f"--model {name}: its config.json says {key} = {shown}; {expected} is expected")
