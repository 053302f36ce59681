"""SAELens' own evaluation of exports, and the steps from its figures to sagsae's, on the same held-out contexts.

    python evals.py FOLDER MODEL      after prepare.py, in the tools' environment; writes FOLDER/evals.json and
                                      NAME.rows, the rows that SAELens measured

The one difference in R² and L0 is that SAELens counts position 0. In the losses it also keeps predictions of special
tokens, zeroes position 0 and special tokens in the ablation, and splices position 0.
"""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file
from torch import Tensor

warnings.simplefilter("ignore")
SPECIAL = 0
NAMES = ("sa-gsae-256-lambda0.1-seed0", "gated-256-lambda0.1-seed0")
Figures = dict[str, float]


def load_model(folder: str) -> Any:
    """The shipped model. Without the compatibility mode TransformerLens' hookpoints are silently ignored."""
    model = SAETransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return model


def by_saelens(sae: Any, model: Any, tokens: Tensor) -> tuple[Figures, Tensor]:
    """What run_evals says of all contexts, with SAELens' defaults; and the rows that R² and L0 were measured on."""
    batch = max(size for size in range(1, 19) if len(tokens) % size == 0)
    store = ActivationsStore.from_sae(
        model, sae, dataset=Dataset.from_dict({"input_ids": tokens.tolist()}), streaming=False,
        store_batch_size_prompts=batch, n_batches_in_buffer=2,
    )  # fmt: skip
    batches = len(tokens) // batch
    asked = get_eval_everything_config(batch, batches, batches)
    given: list[Tensor] = []
    handle = sae.hook_sae_input.register_forward_hook(lambda *call: given.append(call[2].clone()))
    scalars, _ = run_evals(sae, store, model, ActivationScaler(), asked, exclude_special_tokens=True)
    handle.remove()
    flat = {name: float(value) for part in scalars.values() for name, value in part.items()}
    names = {
        "r2": "explained_variance", "l0": "l0", "clean": "ce_loss_without_sae", "spliced": "ce_loss_with_sae",
        "zero": "ce_loss_with_ablation", "recovered": "ce_loss_score",
    }  # fmt: skip
    rows = torch.cat(given[-batches:])  # the first ones were spliced in, for the losses
    return {ours: flat[theirs] for ours, theirs in names.items()}, rows[tokens != SPECIAL]


def activations(model: Any, hook: str, tokens: Tensor) -> Tensor:
    found = [model.run_with_cache(part, names_filter=[hook])[1][hook] for part in torch.split(tokens, 39)]
    return torch.cat(found)


def fit(sae: Any, rows: Tensor) -> Figures:
    """R² and L0."""
    f = sae.encode(rows)
    target, error = rows.double(), (rows - sae.decode(f)).double()
    r2 = 1 - error.square().sum() / (target - target.mean(0)).square().sum()
    return {"r2": r2.item(), "l0": (f != 0).sum(1).double().mean().item()}


def losses(model: Any, hook: str, tokens: Tensor, where: Tensor, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The loss of every prediction, [contexts, context - 1], with the hookpoint changed at the positions in `where`."""
    found = []
    for part, mask in zip(torch.split(tokens, 39), torch.split(where, 39), strict=True):

        def replaced(x: Tensor, hook: Any, mask: Tensor = mask) -> Tensor:  # noqa: ARG001 (TransformerLens' signature)
            assert change is not None
            return torch.where(mask[..., None], change(x), x)

        hooks = [] if change is None else [(hook, replaced)]
        logits = model.run_with_hooks(part, fwd_hooks=hooks, return_type="logits")[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(loss.view(len(part), -1))
    return torch.cat(found)


@dataclass(frozen=True)
class Convention:
    """The positions [contexts, context] that count in R² and L0, the predictions [contexts, context - 1] in the losses,
    and where the hookpoint is replaced by the reconstruction and by zero."""

    fitted: Tensor
    predicted: Tensor
    spliced: Tensor
    zeroed: Tensor

    @classmethod
    def of_saelens(cls, tokens: Tensor) -> "Convention":
        plain = tokens != SPECIAL
        return cls(plain, plain[:, :-1], plain, torch.ones_like(plain))

    @classmethod
    def of_sagsae(cls, tokens: Tensor, counted: Tensor) -> "Convention":
        return cls(counted, counted[:, :-1] & (tokens[:, 1:] != SPECIAL), counted, counted)


def recomputed(sae: Any, model: Any, tokens: Tensor, by: Convention) -> Figures:
    """The figures by a convention, from SAELens' own parts."""
    hook = sae.cfg.metadata.hook_name
    changes: dict[str, tuple[Tensor, Callable[[Tensor], Tensor] | None]] = {
        "clean": (by.spliced, None), "spliced": (by.spliced, lambda x: sae.decode(sae.encode(x))),
        "zero": (by.zeroed, torch.zeros_like),
    }  # fmt: skip
    found = {
        name: losses(model, hook, tokens, where, change)[by.predicted].double().mean().item()
        for name, (where, change) in changes.items()
    }
    recovered = (found["zero"] - found["spliced"]) / (found["zero"] - found["clean"])
    return {**fit(sae, activations(model, hook, tokens)[by.fitted]), **found, "recovered": recovered}


def measured(evaluation: dict[str, Any], name: str) -> tuple[Figures, Figures]:
    """sagsae's evaluation.json: its own figures, and those of `--peer-conventions` that count position 0."""
    entry = next(each for each in evaluation["saes"] if each["name"] == name)
    own = {
        "r2": entry["r2"], "l0": entry["l0"], "clean": evaluation["ce_clean"], "spliced": entry["ce_spliced"],
        "zero": evaluation["ce_zero"], "recovered": entry["ce_recovered"],
    }  # fmt: skip
    every = entry["peers"]["SAELens, every position"]
    return own, {key: every[key] for key in ("r2", "l0")}


@torch.no_grad()
def main(root: Path, folder: str) -> None:
    held = np.load(root / "heldout.npz")
    tokens, counted = torch.from_numpy(held["tokens"]), torch.from_numpy(held["counted"])
    model = load_model(folder)
    evaluation = json.loads((root / "runs/resid_post/evaluation.json").read_text())
    found = {}
    for name in NAMES:
        sae = SAE.load_from_disk(root / "exports" / name / "saelens-gated")
        theirs, rows = by_saelens(sae, model, tokens)
        save_file({"x": rows}, root / f"{name}.rows")
        own, every = measured(evaluation, name)
        found[name] = {
            "SAELens": theirs,
            "SAELens, recomputed": recomputed(sae, model, tokens, Convention.of_saelens(tokens)),
            "evaluation.json, every position": every,
            "sagsae's conventions, in SAELens": recomputed(sae, model, tokens, Convention.of_sagsae(tokens, counted)),
            "evaluation.json": own,
        }
        for row, figures in found[name].items():
            print(name, row, {key: round(value, 7) for key, value in figures.items()}, flush=True)  # noqa: T201
    (root / "evals.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
