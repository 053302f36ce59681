"""Stores and runs on which the arithmetic of float32 is exact, so that counts can be compared to the last one.

Activations, weights and thresholds are multiples of 1/16: every sum of products is then the same in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harvest.writer import ShardRows, ShardWriter
from shared.config import TrainConfig
from shared.files.local import LocalFiles
from shared.saes import ARCHITECTURES, SAEConfig, sae_config
from shared.store.create import building, create_store, finish_store, place_tokens, write_tokens
from shared.store.opened import Store
from shared.store.shard import as_float32
from shared.store.spec import HookSpec, StoreSpec, rows_that_count
from train.autoencoder import Autoencoder
from train.data.rows import HookRows
from train.plan.job import snapshot_of
from train.runs.folder import RunFolder, write_sealed
from train.sae.families import family

HOOK = "layer_00/mlp_out"
D_IN, VOCABULARY = 16, 40
ARCHS = tuple(ARCHITECTURES)


def make_store(root: Path, tokens: int, codec: str = "zstd", nan: Sequence[int] = (), **changes: Any) -> Store:
    """Contexts of 24 tokens in shards of 512 rows: every third context or so begins in one shard and ends in the next.
    `nan`: places whose rows hold a NaN."""
    files, rng = LocalFiles(root), np.random.default_rng(1)
    root.mkdir(parents=True)
    context = changes.get("context", 24)
    ids = rng.zipf(1.4, (-(-tokens // context), context)).clip(1, VOCABULARY).astype("<u2") - 1
    with building(files) as folder:
        written = write_tokens(folder, [ids], context, VOCABULARY)
        place_tokens(files, written)
    spec = StoreSpec.model_validate({
        "model": {"name": "made", "commit": "0" * 32, "local": True, "dtype": "float32", "attention": "sdpa"},
        "tokenizer": {}, "corpus": {"ids_blake2b": written.digest, "vocab_size": VOCABULARY}, "context": context,
        "bos_id": None, "special_ids": (7, 11), "skip_positions": 2, "n_tokens": tokens, "token_dtype": written.dtype,
        "hookpoints": {HOOK: HookSpec(name="blocks.0.hook_mlp_out", d_in=D_IN)}, "dtype": "bfloat16",
        "codec": codec, "chunk_rows": 64, "shard_rows": 512, "seed": 5, **changes,
    })  # fmt: skip
    create_store(files, spec, written.files, {"command": "none"})
    rows = rng.integers(-12, 13, (tokens, D_IN)).astype("<f4") / 8
    rows += rows[ids.reshape(-1)[:tokens] * 7]  # what a token's rows have in common
    rows[list(nan), 3] = np.nan
    bits = (rows.view("<u4") >> 16).astype("<u2")
    keep = rows_that_count(ids, spec)
    writer = ShardWriter(files, spec, keep, threads=1, allow_nonfinite=True)
    for shard in range(spec.n_shards):
        start, stop = spec.shard_range(shard)
        writer.commit(shard, {HOOK: rows_of(bits[start:stop], keep.reshape(-1)[start:stop])})
    writer.close()
    finish_store(files, spec)
    return Store.open(root)


def rows_of(bits: NDArray[Any], keep: NDArray[np.bool_]) -> ShardRows:
    x = as_float32(bits, "bfloat16").astype("f8")
    norms = np.sqrt(np.square(x).sum(axis=1)).astype("f4")
    counted = x[keep & np.isfinite(norms)]
    return ShardRows(bits, norms, counted.sum(axis=0), np.square(counted).sum(axis=0))


def make_sae(arch: str, d_sae: int = 64, seed: int = 0) -> Autoencoder:
    """Random weights on the grid; about a tenth of the latents are active on a row."""
    more = {"tie": "none"} if arch == "sa-gsae" else {"k": 6} if "topk" in arch else {}
    config = sae_config(arch=arch, d_sae=d_sae, seed=seed, **more)
    generator = torch.Generator().manual_seed(seed)
    weights = family(config).initial(D_IN, torch.zeros(D_IN), generator)
    for name, tensor in weights.named().items():
        tensor.copy_(torch.randint(-8, 9, tensor.shape, generator=generator) / 16.0)
        if name == "W_dec":
            tensor /= tensor.norm(dim=1, keepdim=True)
        elif name in ("theta", "threshold"):
            tensor.copy_(2.5 + tensor)
        elif name == "r":
            tensor.zero_()
        elif name == "b_enc":
            tensor.copy_(torch.zeros_like(tensor) if arch == "abs-topk" else tensor - (3.0 if arch == "relu" else 0.0))
    return Autoencoder(config, weights, 2.0)


def make_run(folder: Path, store: Store, saes: Sequence[Autoencoder], **changes: Any) -> Path:
    """A finished and evaluated run that read the whole store. The measurements in it are made up."""
    configs: tuple[SAEConfig, ...] = tuple(sae.config for sae in saes)
    config = TrainConfig(store=str(store.root), hook=HOOK, saes=configs, out=folder, **changes)
    run = RunFolder(folder)
    run.make()
    identity = {**config.model_dump(mode="json"), **snapshot_of(store, HOOK), "norm_limit": None}
    run.create(config, identity, {"finished": "2026-01-01T00:00:00+00:00", "steps": 1})
    for sae in saes:
        sae.save(run.sae(sae.config.name), {})
    entries = [measured(sae, number) for number, sae in enumerate(saes)]
    write_sealed(run.evaluation, {"tokens": 100, "saes": entries})
    return folder


def measured(sae: Autoencoder, number: int) -> dict[str, Any]:
    config = sae.config
    knobs = {key: getattr(config, key, None) for key in ("sparsity", "l0_target", "k")}
    known = {"name": config.name, "arch": config.arch, "d_sae": config.d_sae, "seed": config.seed, **knobs}
    return {**known, "r2": 0.8 - number / 100, "l0": 6.0 + number, "l0_pos": 3.0, "l0_neg": 3.0, "dead_fraction": 0.0}


@dataclass(frozen=True)
class AllLatents:
    """Every latent on every row of a store, in token order, computed at once: [tokens, d_sae], zero where a row does
    not count."""

    f: NDArray[np.float32]
    counts: NDArray[np.bool_]
    ids: NDArray[Any]
    context: int


def all_latents(store: Store, sae: Autoencoder) -> AllLatents:
    rows, spec = HookRows.of(store, HOOK), store.spec
    x = np.empty((spec.n_tokens, D_IN), np.float32)
    for shard in store.commits:
        at = 0
        for chunk in range(-(-store.commits[shard].rows // spec.chunk_rows)):
            values = rows.values(shard, chunk)
            part = values if spec.quantised else as_float32(values, spec.dtype)
            where = (
                rows.contexts.read(shard, chunk_of(rows, at)).astype(int) * spec.context
                + rows.positions.read(shard, chunk_of(rows, at)).astype(int)
            )[at % len_of(rows) : at % len_of(rows) + len(part)]
            x[where] = part
            at += len(part)
    ids = store.tokens().reshape(-1)[: spec.n_tokens]
    position = np.arange(spec.n_tokens) % spec.context
    counts = np.isfinite(x).all(1) & ~np.isin(ids, spec.special_ids) & (position >= spec.skip_positions)
    f = np.zeros((spec.n_tokens, sae.config.d_sae), np.float32)
    f[counts] = sae.encode(torch.from_numpy(x[counts])).numpy()
    return AllLatents(f, counts, ids, spec.context)


def len_of(rows: HookRows) -> int:
    """Rows of a chunk of the index arrays."""
    return rows.contexts.layout.chunk_rows


def chunk_of(rows: HookRows, at: int) -> int:
    return at // len_of(rows)
