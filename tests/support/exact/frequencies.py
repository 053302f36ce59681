"""A run on the grid whose exports say how often each latent fires, and the rows on which it was counted."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.config import EvalConfig
from support.exact.runs import HOOK, make_run, make_sae, make_store
from train.data.order import split_rows
from train.data.rows import HookRows
from train.evaluate import evaluate
from train.measure.metrics import read_heldout
from train.runs.folder import RunFolder

ARCHS = ("sa-gsae", "gated", "abs-topk", "signed-topk")


def counted_run(folder: Path) -> Path:
    """A run of ARCHS, evaluated, with its store beside it."""
    store = make_store(folder / "store", 4096)
    run = make_run(folder / "run", store, [make_sae(arch, 24) for arch in ARCHS], heldout_tokens=400)
    evaluate(EvalConfig(run=run, device="cpu", ce=False))
    return run


def heldout_rows(run: Path) -> NDArray[np.float32]:
    """The rows that the evaluation counted, [rows, d_in]."""
    from shared.store.opened import Store

    config = RunFolder(run).config()
    store = Store.open(config.store)
    parts = split_rows(store.token_rows(check=False), config)
    found: NDArray[np.float32] = read_heldout(HookRows.of(store, HOOK), parts.heldout).float().numpy()
    return found
