"""Plans a harvest before anything is written: it answers every question that needs no weights, and refuses everything
that can be refused."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from harvest.corpus.arrays import takes_rows
from harvest.corpus.documents import Corpus, JoinedIds, StopCheck, never_stop
from harvest.corpus.open import open_corpus
from harvest.corpus.pack import PackCounts
from harvest.reuse.shape import SHARD_BYTES, fixed_shape
from shared.config import HarvestConfig
from shared.device import native_dtype, pick_device
from shared.errors import UserError
from shared.files.base import Files, join
from shared.files.open import open_files
from shared.gate import named, quoted
from shared.model.configuration import ModelInfo
from shared.model.hooks import hook_widths, layer_of, resolve_hooks, resolve_layers
from shared.model.outline import outline
from shared.model.source import ModelSource, in_words, model_info, read_config, resolve_model, same_model
from shared.model.tokenizer import Encoder, open_encoder
from shared.progress import say
from shared.schema import build, cut
from shared.store.create import WrittenTokens
from shared.store.opened import is_store, read_state
from shared.store.spec import DTYPES, HookSpec, StoreSpec, TokenType


@dataclass(frozen=True)
class HarvestPlan:
    """A configuration in which every question is answered that needs no weights and writes nothing."""

    config: HarvestConfig
    source: ModelSource
    info: ModelInfo
    tokenizer: Encoder
    corpus: Corpus | JoinedIds
    device: str
    dtype: str
    context: int
    bos_id: int | None
    special_ids: tuple[int, ...]
    hooks: dict[str, HookSpec]
    files: Files

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def shuffles(self) -> bool:
        return self.config.shuffle_documents and isinstance(self.corpus, Corpus)


def make_plan(config: HarvestConfig, check_stop: StopCheck = never_stop) -> HarvestPlan:
    """Raises UserError at the first thing that is wrong with the model, the hookpoints, the corpus or the context."""
    source = resolve_model(config.model, config.revision)
    model_config = read_config(source)
    info = model_info(model_config)
    names = resolve_hooks(config.hooks, resolve_layers(config.layers, info), info)
    kept = sorted(set(map(layer_of, names.values())))
    widths = hook_widths(names.values(), outline(model_config, config.attention, source.name, kept))
    hooks = {path: HookSpec(name=name, d_in=widths[name]) for path, name in names.items()}
    context = config.context or min(1024, info.max_context)
    if context > info.max_context:
        raise UserError(f"--context {context}: {config.model} was made for at most {info.max_context} tokens")
    if config.skip_positions >= context:
        raise UserError(
            f"--skip-positions {config.skip_positions}: leaves nothing of a context of {context} tokens. Lower it"
        )
    if context > 1 << 16:
        raise UserError(f"--context {context}: a store holds at most {1 << 16} tokens in a context")
    files = open_files(join(config.out, config.name or store_name(source)))
    found = None if config.overwrite or not is_store(files) else read_state(files)[0]
    config = with_settings_of_store(config, found)
    device = pick_device(config.device, spread=True)
    computes = torch.device(pick_device("auto") if device == "map" else device)
    dtype = native_dtype(computes) if config.dtype == "auto" else config.dtype
    encoder = open_encoder(source, config.tokenizer, config.eos, config.split_special_tokens)
    default = Path(source.location) / "corpus.jsonl" if source.local else None
    corpus = open_corpus(config, default, info.vocab_size, check_stop)
    check_end(encoder, corpus, info)
    bos_id = None if takes_rows(corpus, context, config.bos) else bos_token(config, encoder, info)
    special = special_tokens(config, encoder, info)
    return HarvestPlan(config, source, info, encoder, corpus, device, dtype, context, bos_id, special, hooks, files)


def with_settings_of_store(config: HarvestConfig, store: StoreSpec | None) -> HarvestConfig:
    """Returns the configuration with settings of the existing store, where you did not choose them: `dtype` at auto,
    which depends on the machine, and a lossless codec, which changes no number."""
    if store is None:
        return config
    changes: dict[str, Any] = {}
    dtype = store.model.get("dtype")
    if config.dtype == "auto" and dtype in DTYPES:
        changes["dtype"] = dtype
    lossless = "int8" not in (config.codec, store.codec)
    if "codec" not in config.model_fields_set and lossless and config.codec != store.codec:
        changes["codec"] = store.codec
        say(f"{config.name or store.model.get('name')}: continues with codec {store.codec}, as the store has it")
    return config.model_copy(update=changes) if changes else config


def check_end(encoder: Encoder, corpus: Corpus | JoinedIds, info: ModelInfo) -> None:
    """Raises UserError when documents must be joined and no end-of-text id is known, or when the model does not know
    that id."""
    end, name = encoder.eos_id, encoder.source.name
    if end is not None and not 0 <= end < info.vocab_size:
        raise UserError(
            f"--eos: {end} is outside the model's vocabulary, 0 to {info.vocab_size - 1}. Say which id or token ends a "
            "document: --eos ID"
        )
    if end is None and isinstance(corpus, Corpus):
        if encoder.tokenizer is None:
            raise UserError(
                f"--model {name}: comes with no tokenizer (tokenizer.json, tokenizer.model, vocab.json, …). Name one "
                "with --tokenizer FOLDER_OR_ID; or give a corpus of token ids, and for documents the id that ends one "
                "with --eos"
            )
        raise UserError(
            f"--model {name}: its tokenizer names no end-of-text token to join documents with. Say which id or token "
            "ends a document: --eos ID_OR_TOKEN"
        )


def special_tokens(config: HarvestConfig, encoder: Encoder, info: ModelInfo) -> tuple[int, ...]:
    """Ids that count as special, among those that the model knows."""
    strange = [number for number in config.special_ids if number >= info.vocab_size]
    if strange:
        raise UserError(f"special_ids: {strange[0]} is outside the model's vocabulary, 0 to {info.vocab_size - 1}")
    return tuple(sorted({*(n for n in encoder.special_ids() if 0 <= n < info.vocab_size), *config.special_ids}))


def bos_token(config: HarvestConfig, encoder: Encoder, info: ModelInfo) -> int | None:
    """The id that begins every row, or None. 0 is a valid id."""
    bos = encoder.bos_id
    if config.bos == "true" and bos is None:
        raise UserError(f"--bos true: the tokenizer of {config.model} has no BOS token")
    wanted = config.bos == "true" or (config.bos == "auto" and bos is not None and encoder.starts_with() == bos)
    if wanted and bos is not None and not 0 <= bos < info.vocab_size:
        raise UserError(
            f"--set bos={config.bos}: the tokenizer's BOS has id {bos}, outside the model's vocabulary, 0 to "
            f"{info.vocab_size - 1}. Say --set bos=false, or check that the tokenizer is the model's"
        )
    return bos if wanted else None


def store_name(source: ModelSource) -> str:
    """The store's default name: `pythia-1b` for the alias, `Llama-3` for `meta/Llama-3`, the name of a folder or a GGUF
    file."""
    if not source.local:
        return source.name.split("/")[-1]
    place = Path(os.path.expanduser(source.name)).resolve()
    return place.name.removesuffix(".gguf") if source.gguf == place.name else place.name


def identity(plan: HarvestPlan) -> dict[str, Any]:
    """The part of a store's spec that the configuration alone decides. If it changes, it is another store."""
    return {
        "model": {
            "name": plan.source.name,
            "commit": plan.source.commit,
            "local": plan.source.local,
            "dtype": plan.dtype,
            "attention": plan.config.attention,
            "weight_processing": "none",
        },
        "tokenizer": plan.tokenizer.describe(),
        "context": plan.context,
        "bos_id": plan.bos_id,
        "special_ids": plan.special_ids,
        "skip_positions": plan.config.skip_positions,
        "hookpoints": plan.hooks,
        "dtype": plan.config.store_dtype,
        "codec": plan.config.codec,
        "seed": plan.config.seed,
    }


def corpus_asked(plan: HarvestPlan) -> dict[str, Any]:
    """The part of a store's `corpus` that the configuration alone decides."""
    return {
        "source": plan.corpus.description,
        "shuffled": plan.shuffles,
        "on_bad_document": plan.config.on_bad_document,
    }


def token_identity(plan: HarvestPlan) -> dict[str, Any]:
    """The part of a store's `corpus` that is equal in all stores with the same tokens."""
    return {**corpus_asked(plan), "whole": plan.config.tokens is None, "vocab_size": plan.info.vocab_size}


def make_spec(plan: HarvestPlan, counts: PackCounts, tokens: WrittenTokens, n_tokens: int) -> StoreSpec:
    corpus = {
        **token_identity(plan),
        "documents": counts.documents,
        "empty_documents": counts.empty,
        "bad_documents": counts.bad,
        "ids_blake2b": tokens.digest,
    }
    chunk_rows, shard_rows = shape(plan, n_tokens)
    return spec_of(plan, corpus, n_tokens, tokens.dtype, chunk_rows, shard_rows)


def asked_spec(plan: HarvestPlan, n_tokens: int) -> StoreSpec:
    """The spec of a store with these tokens, before they are known: their digest is a placeholder."""
    corpus = {**token_identity(plan), "ids_blake2b": "0" * 32}
    token_dtype: TokenType = "uint16" if plan.info.vocab_size <= 1 << 16 else "uint32"
    return spec_of(plan, corpus, n_tokens, token_dtype, *shape(plan, n_tokens))


def spec_of(
    plan: HarvestPlan, corpus: dict[str, Any], n_tokens: int, token_dtype: TokenType, chunk_rows: int, shard_rows: int
) -> StoreSpec:
    about = {"corpus": corpus, "n_tokens": n_tokens, "token_dtype": token_dtype}
    return build(StoreSpec, {**identity(plan), **about, "chunk_rows": chunk_rows, "shard_rows": shard_rows})


def shape(plan: HarvestPlan, n_tokens: int) -> tuple[int, int]:
    """Rows per chunk and per shard: as configured, else the fixed shape."""
    config = plan.config
    return fixed_shape(model_row(plan), row_bytes(plan), n_tokens, config.chunk_rows, config.shard_rows)


def tell_of_small_shards(plan: HarvestPlan, spec: StoreSpec) -> None:
    """Prints that a store cannot share shards, where its hookpoints together would take too much memory."""
    usual = fixed_shape(model_row(plan), model_row(plan), spec.n_tokens, plan.config.chunk_rows)[1]
    if plan.config.shard_rows is None and spec.shard_rows < usual:
        say(
            f"{plan.name}: {len(plan.hooks)} hookpoints together would take too much memory, so its shards have "
            f"{spec.shard_rows:,} rows instead of {usual:,}. Stores of fewer hookpoints cannot share them; harvest "
            "fewer hookpoints into each store for that"
        )


def model_row(plan: HarvestPlan) -> int:
    """Bytes of a row as wide as the model, before the codec."""
    return plan.info.d_model * DTYPES[plan.config.store_dtype][0].itemsize


def row_bytes(plan: HarvestPlan) -> int:
    """Bytes of a row of all hookpoints, before the codec."""
    return sum(hook.d_in for hook in plan.hooks.values()) * DTYPES[plan.config.store_dtype][0].itemsize


def lent_shape(plan: HarvestPlan, lender: StoreSpec) -> tuple[int, int] | None:
    """The chunk and shard rows of an existing store with the same tokens, which put the rows in the same order. Returns
    None when others were configured, or when its shards would be too large for these hookpoints."""
    config, lent = plan.config, (lender.chunk_rows, lender.shard_rows)
    own = shape(plan, lender.n_tokens) if config.chunk_rows or config.shard_rows else lent
    asked = (config.chunk_rows or own[0], config.shard_rows or own[1])
    return lent if asked == lent and lent[1] * row_bytes(plan) <= 2 * SHARD_BYTES else None


def check_same(plan: HarvestPlan, spec: StoreSpec) -> None:
    """Raises UserError, naming every field that differs, when the store was begun with another request. The model's
    content counts; its name and place do not."""
    wanted: dict[str, Any] = {**identity(plan), **corpus_asked(plan)}
    wanted |= {
        "n_tokens": plan.config.tokens,
        "chunk_rows": plan.config.chunk_rows,
        "shard_rows": plan.config.shard_rows,
    }
    if plan.config.tokens is None and spec.corpus.get("whole") is False:
        wanted["n_tokens"] = "all tokens of the corpus"
    found: dict[str, Any] = {"on_bad_document": "refuse", **dict(spec), **spec.corpus}  # older stores refused
    asked, there = wanted.pop("model"), found["model"]
    differ = model_differs(plan.source, there, asked)
    if spec.special_ids == special_ids_of_old_stores(plan) != plan.special_ids and not plan.config.special_ids:
        wanted["special_ids"] = spec.special_ids
        say(
            f"{plan.name}: the store is of an earlier version, which counted {len(spec.special_ids)} ids as special; "
            f"now {len(plan.special_ids)} are. It continues with its own"
        )
    optional = ("n_tokens", "chunk_rows", "shard_rows")
    pairs = {key: (found[key], value) for key, value in wanted.items() if not (key in optional and value is None)}
    differ += [difference(key, old, new) for key, (old, new) in pairs.items() if old != new]
    if differ:
        changed = {key for key, (old, new) in pairs.items() if old != new}
        advice = advice_for(plan, spec, changed, len(differ))
        raise UserError(
            f"{plan.name}: was harvested differently. {'; '.join(differ)}. {advice} "
            "--overwrite would delete the store and start again"
        )


def difference(key: str, there: Any, asked: Any) -> str:
    """Describes in one line how a requested setting differs from the store's."""
    if key != "source":
        return f"{key}: the store has {setting_in_words(there)}, this asks for {setting_in_words(asked)}"
    stores, ours = corpus_name(there), corpus_name(asked)
    if stores != ours:
        return f"corpus: the store has {stores}, this asks for {ours}"
    parts = [key for key in asked if not isinstance(there, dict) or there.get(key) != asked[key]]
    return f"corpus: {ours} is not the same as when the store was begun ({', '.join(parts)})"


def corpus_name(description: Any) -> str:
    """What a person calls a recorded corpus: its first file and the number of the others, its dataset, or its kind."""
    if not isinstance(description, dict):
        return quoted(description, 60)
    files = description.get("files")
    names = [file.get("name") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    name = str(names[0] if names else description.get("name") or description.get("kind"))
    return named([name]) + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def setting_in_words(value: Any) -> str:
    """A recorded setting as a message shows it: a table by its keys and plain values, whatever is long cut."""
    if isinstance(value, dict):
        plain = (int, float, str, NoneType)
        value = ", ".join(f"{key} {each}" if isinstance(each, plain) else key for key, each in value.items())
    return cut(str(value), 200)


def model_differs(source: ModelSource, there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Describes in at most one line how the requested model differs from the store's."""
    keys = [key for key in ("dtype", "attention", "weight_processing") if there.get(key) != asked[key]]
    pairs = [(f"{key} {there.get(key)}", f"{key} {asked[key]}") for key in keys]
    if not same_model(source, there.get("commit")):
        store, here = (in_words(model.get("name"), model.get("commit")) for model in (there, asked))
        pairs.insert(0, (store, here))
    if not pairs:
        return []
    stores, ours = (", ".join(side) for side in zip(*pairs, strict=True))
    return [f"model: the store has {stores}, this asks for {ours}"]


def special_ids_of_old_stores(plan: HarvestPlan) -> tuple[int, ...]:
    """The special ids as earlier versions counted them."""
    return tuple(sorted(plan.tokenizer.listed_special_ids()))


def advice_for(plan: HarvestPlan, spec: StoreSpec, changed: set[str], many: int) -> str:
    """Advice for a request that differs in the `changed` fields; following it loses no data."""
    if changed == {"codec"} and many == 1 and "int8" not in (spec.codec, plan.config.codec):
        return (
            "The rows are the same with either codec: leave --codec out to resume, or rewrite the finished store with "
            f"`sagsae store recode {plan.name} NEW --codec {plan.config.codec}`."
        )
    if changed == {"hookpoints"} and many == 1:
        return (
            "Harvest the other hookpoints into a store beside it (another --name): it takes the tokens and the order "
            "of rows of this one."
        )
    if changed == {"n_tokens"} and many == 1:
        return "Choose another --name; or leave --tokens as it was. A finished store is not made longer or shorter."
    if "source" in changed:
        return "Choose another --name to harvest this corpus into a store of its own."
    return "Choose another --name or --out."
