"""Trains every family and tie on the shipped model, exports each in every form of every tool, and writes what sagsae
itself computes: `python prepare.py FOLDER`, in sagsae's environment. check.py then asks the tools.

    stores/ runs/ exports/      what the commands write
    references/NAME             x, f, x̂ of held-out rows and the decoder rows' norms (safetensors)
    cases.json                  one entry per export
    heldout.npz                 held-out contexts with the positions that count
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from harvest.run import harvest
from shared.config import EvalConfig, HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.saes import sae_config
from shared.schemas.exchange import ExportConfig
from shared.store.opened import find_hookpoint
from train.data.order import split
from train.data.rows import HookRows
from train.evaluate import evaluate
from train.exchange.export import export
from train.exchange.saved import SavedSAE, find_saes
from train.measure.metrics import read_heldout
from train.run import train
from train.runs.folder import RunFolder

ROWS, WIDTH = 4096, 256
FORMS = {
    "saelens": ("gated", "standard", "jumprelu", "topk", "abstopk", "bijumprelu"),
    "dictionary-learning": ("gated", "standard", "batch-topk", "jumprelu", "topk"),
    "sparsify": ("auto",),
    "gemma-scope": ("auto",),
}


def autoencoders() -> dict[str, list[Any]]:
    """The autoencoders of each run, by the hookpoint that it reads."""
    gates = {"d_sae": WIDTH, "sparsity": 0.1}
    saes = [sae_config(arch="sa-gsae", tie=tie, **gates) for tie in ("symmetric", "magnitude", "none")]
    saes += [sae_config(arch="sa-gsae", one_sided=True, **gates), sae_config(arch="gated", **gates)]
    saes += [sae_config(arch="gated", decoder="free", **gates), sae_config(arch="relu", **gates)]
    saes += [sae_config(arch="jumprelu", d_sae=WIDTH)]
    saes += [sae_config(arch=arch, d_sae=WIDTH, k=24) for arch in ("batch-topk", "abs-topk", "topk", "signed-topk")]
    return {"resid_post": saes, "attn.hook_z": saes[:1]}


def write_reference(saved: SavedSAE, folder: Path) -> None:
    """What sagsae computes on held-out rows."""
    assert saved.run is not None
    config = RunFolder(saved.run).config()
    store, hook = find_hookpoint(config.store, config.hook)
    x = read_heldout(HookRows.of(store, hook), split(store.spec, store.tokens(), config).heldout)[:ROWS].float()
    sae = saved.load()
    f = sae.encode(x)
    tensors = {"x": x, "f": f, "x_hat": sae.decode(f), "norms": sae.weights.W_dec.norm(dim=1)}
    folder.mkdir(exist_ok=True)
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / saved.name)


def exports(saved: SavedSAE, root: Path) -> list[dict[str, Any]]:
    """Exports an autoencoder in every form that it has."""
    found = []
    asked = [(tool, form, False) for tool, forms in FORMS.items() for form in forms]
    for tool, form, folded in [*asked, ("saelens", "auto", True)]:
        out = root / "exports" / saved.name / f"{tool}-{form}{'-folded' if folded else ''}"
        config = ExportConfig.model_validate(
            {"source": saved.folder, "to": tool, "form": form, "out": out, "fold_b_dec": folded, "overwrite": True}
        )
        try:
            (done,) = export(config)
        except UserError:
            continue  # a form that the autoencoder does not have; test_export.py holds which
        case = {"name": saved.name, "tool": tool, "form": done.form, "folder": str(out.relative_to(root))}
        found.append({**case, "b_dec": "folded" if folded else "", "width": done.width, "d_sae": WIDTH})
    return found + approximation(saved, root)


def approximation(saved: SavedSAE, root: Path) -> list[dict[str, Any]]:
    """sparsify's TopK in the place of thresholds: what the export says is lost is to be what sparsify loses."""
    out = root / "exports" / saved.name / "sparsify-approximate"
    config = ExportConfig(source=saved.folder, to="sparsify", out=out, approximate_topk=24, overwrite=True)
    (done,) = export(config)
    notes = [note for note in done.notes if "R² " in note]
    case = {"name": saved.name, "tool": "sparsify", "form": "topk, k 24", "folder": str(out.relative_to(root))}
    return [{**case, "b_dec": "", "width": done.width, "d_sae": WIDTH, "note": note} for note in notes]


def main(root: Path) -> None:
    for old in ("stores", "runs", "exports", "references"):
        shutil.rmtree(root / old, ignore_errors=True)  # made by another state of the code
    hooks = ("resid_post", "blocks.2.attn.hook_z")
    # whole contexts: the tools see the whole of the last one
    config = {"model": "tiny", "tokens": 64_000, "hooks": hooks, "layers": (2,), "out": root / "stores", "name": "s"}
    # float32 throughout, because the tools run the model so and store nothing: every figure then has to be theirs
    store = harvest(HarvestConfig.model_validate({**config, "dtype": "float32", "store_dtype": "float32"})).store
    cases: list[dict[str, Any]] = []
    for hook, saes in autoencoders().items():
        run = root / "runs" / hook
        settings = {"store": store, "hook": hook, "saes": saes, "tokens": 40_000, "batch": 512, "lr": 5e-3, "out": run}
        train(TrainConfig.model_validate(settings))
        for saved in find_saes(run):
            if hook == "resid_post":
                write_reference(saved, root / "references")
                cases += exports(saved, root)
            else:
                export(ExportConfig(source=saved.folder, to="saelens", out=root / "exports/heads", overwrite=True))
    run = root / "runs/resid_post"
    evaluate(EvalConfig(run=run, ce_tokens=10**9, peer_conventions=True))
    trained = RunFolder(run).config()
    opened, _ = find_hookpoint(trained.store, trained.hook)
    heldout = np.asarray(split(opened.spec, opened.tokens(), trained).heldout)
    contexts = np.flatnonzero(heldout.any(axis=1))
    tokens = opened.tokens()[contexts].astype("int64")
    np.savez(root / "heldout.npz", tokens=tokens, counted=heldout[contexts])
    (root / "cases.json").write_text(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
