"""What a harvest will do, worked out before anything is written: every question that needs no weights is answered here,
and everything that can be refused is refused here.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harvest.arrays import takes_rows
from harvest.corpus import open_corpus
from harvest.documents import Corpus, Look, Stream, go_on
from harvest.pack import Counts
from shared.config import HarvestConfig
from shared.create import Tokens
from shared.device import native_dtype, pick_device
from shared.errors import UserError
from shared.files import Files, join, open_files
from shared.hooks import hook_widths, layer_of, resolve_hooks, resolve_layers
from shared.models import ModelInfo, ModelSource, load_tokenizer, model_info, read_config, resolve_model
from shared.outline import outline
from shared.spec import DTYPES, HookSpec, StoreSpec, TokenType

CHUNK_BYTES = 2 << 20
CHUNKS_PER_SHARD = 128
SHARD_BYTES = 2 << 30
"""Of all hookpoints of a shard, in memory."""
SHARDS_OF_A_SMALL_STORE = 16


@dataclass(frozen=True)
class Plan:
    """A configuration with every question answered that needs no weights and writes nothing."""

    config: HarvestConfig
    source: ModelSource
    info: ModelInfo
    tokenizer: Any
    corpus: Corpus | Stream
    device: str
    dtype: str
    context: int
    bos_id: int | None
    hooks: dict[str, HookSpec]
    files: Files

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def shuffles(self) -> bool:
        return self.config.shuffle_documents and isinstance(self.corpus, Corpus)


def make_plan(config: HarvestConfig, look: Look = go_on) -> Plan:
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
    device = pick_device(config.device, spread=True)
    computes = torch.device(pick_device("auto") if device == "map" else device)
    dtype = native_dtype(computes) if config.dtype == "auto" else config.dtype
    tokenizer = load_tokenizer(source)
    if len(tokenizer) > info.vocab_size:
        raise UserError(
            f"--model {config.model}: its tokenizer has {len(tokenizer)} tokens, the model only {info.vocab_size}"
        )
    default = Path(source.location) / "corpus.jsonl" if source.local else None
    corpus = open_corpus(config, default, info.vocab_size, look)
    bos_id = None if takes_rows(corpus, context, config.bos) else bos_token(config, tokenizer)
    files = open_files(join(config.out, config.name or store_name(source)))
    return Plan(config, source, info, tokenizer, corpus, device, dtype, context, bos_id, hooks, files)


def bos_token(config: HarvestConfig, tokenizer: Any) -> int | None:
    """The id that begins every row, or None. 0 is a valid id."""
    bos = tokenizer.bos_token_id
    if config.bos == "true" and bos is None:
        raise UserError(f"--bos true: the tokenizer of {config.model} has no BOS token")
    first = tokenizer("a")["input_ids"][:1]
    wanted = config.bos == "true" or (config.bos == "auto" and bos is not None and first == [bos])
    return bos if wanted else None


def store_name(source: ModelSource) -> str:
    """`pythia-1b` for the alias, `Llama-3` for `meta/Llama-3`, the folder's own name for a folder."""
    return Path(source.name).expanduser().resolve().name if source.local else source.name.split("/")[-1]


def identity(plan: Plan) -> dict[str, Any]:
    """The part of a store's spec that the configuration alone decides. A change in it is another store."""
    tokenizer = plan.tokenizer
    digest = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()
    return {
        "model": {
            "name": plan.source.name,
            "commit": plan.source.commit,
            "local": plan.source.local,
            "dtype": plan.dtype,
            "attention": plan.config.attention,
            "weight_processing": "none",
        },
        "tokenizer": {"blake2b": digest, "eos_id": tokenizer.eos_token_id},
        "context": plan.context,
        "bos_id": plan.bos_id,
        "special_ids": tuple(sorted(tokenizer.all_special_ids)),
        "skip_positions": plan.config.skip_positions,
        "hookpoints": plan.hooks,
        "dtype": plan.config.store_dtype,
        "codec": plan.config.codec,
        "seed": plan.config.seed,
    }


def corpus_asked(plan: Plan) -> dict[str, Any]:
    """The part of a store's `corpus` that the configuration alone decides."""
    return {
        "source": plan.corpus.description,
        "shuffled": plan.shuffles,
        "on_bad_document": plan.config.on_bad_document,
    }


def decides_the_tokens(plan: Plan) -> dict[str, Any]:
    """What of a store's `corpus` is equal in all stores of the same tokens."""
    return {**corpus_asked(plan), "whole": plan.config.tokens is None, "vocab_size": plan.info.vocab_size}


def default_chunk_rows(row_bytes: int) -> int:
    """The power of two that makes a chunk at most 2 MiB."""
    return max(1, 1 << (CHUNK_BYTES // row_bytes).bit_length() - 1)


def make_spec(plan: Plan, counts: Counts, tokens: Tokens, n_tokens: int) -> StoreSpec:
    corpus = {
        **decides_the_tokens(plan),
        "documents": counts.documents,
        "empty_documents": counts.empty,
        "bad_documents": counts.bad,
        "ids_blake2b": tokens.digest,
    }
    chunk_rows, shard_rows = shape(plan, n_tokens)
    return spec_of(plan, corpus, n_tokens, tokens.dtype, chunk_rows, shard_rows)


def spec_of(
    plan: Plan, corpus: dict[str, Any], n_tokens: int, token_dtype: TokenType, chunk_rows: int, shard_rows: int
) -> StoreSpec:
    return StoreSpec(
        **identity(plan),
        corpus=corpus,
        n_tokens=n_tokens,
        token_dtype=token_dtype,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
    )


def shape(plan: Plan, n_tokens: int) -> tuple[int, int]:
    """Rows of a chunk and of a shard: what was asked for, else chunks of 2 MiB, 128 of them or fewer."""
    widths = [hook.d_in * DTYPES[plan.config.store_dtype][0].itemsize for hook in plan.hooks.values()]
    return shape_of(widths, n_tokens, plan.config.chunk_rows, plan.config.shard_rows)


def shape_of(widths: list[int], n_tokens: int, chunk_rows: int | None, shard_rows: int | None) -> tuple[int, int]:
    """`widths`: bytes of a row of each hookpoint. A shard has fewer chunks in a small store, and where all hookpoints
    together would make one too large for memory."""
    chunk_rows = chunk_rows or default_chunk_rows(max(widths))
    most = max(1, SHARD_BYTES // (chunk_rows * sum(widths)))
    chunks = min(CHUNKS_PER_SHARD, most, -(-n_tokens // (chunk_rows * SHARDS_OF_A_SMALL_STORE)))
    shard_rows = shard_rows or chunk_rows * chunks
    if shard_rows % chunk_rows:
        raise UserError(f"shard_rows: {shard_rows} is not a multiple of chunk_rows = {chunk_rows}")
    return chunk_rows, shard_rows


def lent_shape(plan: Plan, lender: StoreSpec) -> tuple[int, int] | None:
    """That of another store over the same tokens, which puts the rows in the same order; None where another was asked
    for, or where its shards would be too large for these hookpoints."""
    config, lent = plan.config, (lender.chunk_rows, lender.shard_rows)
    width = sum(hook.d_in for hook in plan.hooks.values()) * DTYPES[config.store_dtype][0].itemsize
    asked = (config.chunk_rows or lent[0], config.shard_rows or lent[1])
    return lent if asked == lent and lent[1] * width <= 2 * SHARD_BYTES else None


def check_same(plan: Plan, spec: StoreSpec) -> None:
    """Raises UserError, naming every field that differs, when the store was begun with another request."""
    wanted: dict[str, Any] = {**identity(plan), **corpus_asked(plan)}
    wanted |= {
        "n_tokens": plan.config.tokens,
        "chunk_rows": plan.config.chunk_rows,
        "shard_rows": plan.config.shard_rows,
    }
    if plan.config.tokens is None and spec.corpus.get("whole") is False:
        wanted["n_tokens"] = "all that the corpus gives"
    found: dict[str, Any] = {"on_bad_document": "refuse", **dict(spec), **spec.corpus}  # older stores refused
    optional = ("n_tokens", "chunk_rows", "shard_rows")
    pairs = {key: (found[key], value) for key, value in wanted.items() if not (key in optional and value is None)}
    differ = [f"{key}: the store has {old}, this asks for {new}" for key, (old, new) in pairs.items() if old != new]
    if differ:
        raise UserError(
            f"{plan.name}: was harvested differently. {'; '.join(differ)}. Choose another --name or --out, or start "
            "afresh with --overwrite"
        )
