"""The identity of activations: stores with equal keys hold equal rows, in the same order and format.

How many tokens and which hookpoints a store has is its extent, which is not part of the key. Neither are the names and
places of the model and the corpus: their content counts. docs/explanation/cache.md lists everything.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shared.gate import BadData, parse_json
from shared.store.shard import CodecName
from shared.store.spec import StoreSpec

MODEL_FIELDS: Final = ("commit", "dtype", "attention", "weight_processing")
CORPUS_FIELDS: Final = ("source", "shuffled", "on_bad_document")
TOKEN_FIELDS: Final = ("tokenizer", "context", "bos_id", "special_ids", "seed")
"""The fields of a store's spec that decide its tokens, beside the corpus."""
NUMERIC: Final = ("torch", "transformers", "transformer-lens")
"""Packages whose version can change the last bits of an activation."""
DIGEST_BYTES: Final = 16


def digest_of(value: Any) -> str:
    """32 hex digits over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()


def store_key(spec: StoreSpec) -> str:
    """The key of a store."""
    return digest_of(key_parts(spec))


def rows_key(spec: StoreSpec) -> str:
    """The identity of a store's rows, whatever their order and format: of two lossless stores with equal keys, each
    can be made from the rows of the other, as far as they go."""
    return digest_of(rows_parts(spec))


def key_parts(spec: StoreSpec) -> dict[str, Any]:
    """Everything that decides the rows of a store, their order and their format, apart from its extent."""
    shape = [spec.chunk_rows, spec.shard_rows]
    return {**rows_parts(spec), "format_version": spec.format_version, "codec": spec.codec, "shape": shape}


def rows_parts(spec: StoreSpec) -> dict[str, Any]:
    """Everything that decides the rows of a store, apart from its extent."""
    return {
        "model": {name: spec.model.get(name) for name in MODEL_FIELDS},
        "tokens": token_parts(spec),
        "skip_positions": spec.skip_positions,
        "dtype": spec.dtype,
    }


def token_parts(spec: StoreSpec) -> dict[str, Any]:
    """Everything that decides a store's stream of tokens, apart from its length."""
    corpus = {"on_bad_document": "refuse", **spec.corpus}  # older stores refused
    fields = {name: getattr(spec, name) for name in TOKEN_FIELDS}
    return {**fields, "corpus": {name: corpus.get(name) for name in CORPUS_FIELDS}}


def token_key(spec: StoreSpec) -> str:
    """The identity of a store's stream of tokens: of two stores with equal keys, the stream of one begins with that of
    the other."""
    return digest_of(token_parts(spec))


def with_codec(spec: StoreSpec, codec: CodecName) -> StoreSpec:
    return spec.model_copy(update={"codec": codec})


def environment_of(record: Mapping[str, Any]) -> str:
    """A digest of what else can change the last bits: versions of the libraries, and the device's name. `record` is a
    store's record.json; a store of an earlier version names no device."""
    versions = record.get("versions")
    named = versions if isinstance(versions, dict) else {}
    return digest_of([{name: named.get(name) for name in NUMERIC}, record.get("device")])


def environment_in(data: bytes) -> str:
    """The environment in the bytes of a record.json; that of an empty record where they cannot be read."""
    try:
        record = parse_json(data)
    except BadData:
        record = {}
    return environment_of(record if isinstance(record, dict) else {})


def store_folder(label: str, hookpoints: Sequence[str], tokens: int | None, key: str) -> str:
    """A readable name for a new store's folder, always the same for the same key and extent: such as
    `pythia-1b-l8-mlp_out-20M-1f3a9c2e`."""
    extent = digest_of([key, sorted(hookpoints), tokens])
    name = re.sub(r"[^\w.-]+", "-", label).strip("-._")[:60] or "model"
    return f"{name}-{hooks_in_words(hookpoints)}-{tokens_in_words(tokens)}-{extent[:8]}"


def hooks_in_words(hookpoints: Sequence[str]) -> str:
    """`l8-mlp_out`, or `l8-3hooks`, or `12hooks` where they are of several layers."""
    layers = {path.partition("/")[0].removeprefix("layer_").lstrip("0") or "0" for path in hookpoints}
    if len(layers) > 1:
        return f"{len(hookpoints)}hooks"
    names = sorted(path.partition("/")[2] for path in hookpoints)
    return f"l{layers.pop()}-{names[0][:40] if len(names) == 1 else f'{len(names)}hooks'}"


def tokens_in_words(tokens: int | None) -> str:
    """`20M`, `250k`, `1234567` or `all`."""
    if tokens is None:
        return "all"
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)
