"""Measures in sagsae the very rows that SAELens measured: `python same_rows.py FOLDER`, after evals.py, in sagsae's
environment. Adds two lines to each autoencoder in FOLDER/evals.json, and writes FOLDER/rows.json.

    sagsae on SAELens' rows         the rows that SAELens' model gave SAELens' autoencoder
    sagsae on them as bfloat16      the same, rounded as a store rounds them by default
    rows.json                       how many they are, and how far they lie from the store's at most
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from train.autoencoder import Autoencoder
from train.data.rows import HookRows, norms_and_places
from train.measure.heldout import HeldOutRows
from train.measure.metrics import read_heldout
from train.measure.peers import SAELensMetrics, measured_by
from train.runs.rows import trained_rows


def stored_rows(run: Path) -> Tensor:
    """The store's held-out rows with position 0, in the order of the corpus."""
    found = trained_rows(run, None)
    tokens = found.store.token_rows(check=False)
    mask = HeldOutRows.of(found.store, found.hook, tokens, found.config, None, every_position=True).every_position
    assert mask is not None
    rows = HookRows.of(found.store, found.hook)
    _, places = norms_and_places(rows, mask)
    return read_heldout(rows, mask).float()[torch.from_numpy(np.argsort(places))]


def main(root: Path) -> None:
    run, file = root / "runs/resid_post", root / "evals.json"
    evals: dict[str, dict[str, Any]] = json.loads(file.read_text())
    stored, apart = stored_rows(run), 0.0
    for name, figures in evals.items():
        sae = Autoencoder.load(run / "saes" / name)
        x = load_file(root / f"{name}.rows")["x"]
        assert x.shape == stored.shape
        apart = max(apart, (x - stored).abs().max().item())
        for row, given in {"SAELens' rows": x, "them as bfloat16": x.bfloat16().float()}.items():
            (numbers,) = measured_by((SAELensMetrics,), sae, given, "cpu")
            figures[f"sagsae on {row}"] = {key: numbers[key] for key in ("r2", "l0")}
    file.write_text(json.dumps(evals, indent=1))
    (root / "rows.json").write_text(json.dumps({"many": len(stored), "apart": apart}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
