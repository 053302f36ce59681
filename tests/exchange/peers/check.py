"""Loads every export with the tools themselves and compares what they compute with what sagsae computes.

    python check.py FOLDER      after prepare.py, in the tools' environment; writes FOLDER/readers.json

Nothing of sagsae is imported. The bounds: where the same latents are active, 1e-6 times the largest activation; at most
3 latents in a million active in one of both only.
"""

import importlib.util
import json
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

warnings.simplefilter("ignore")
RELATIVE, FLIPS = 1e-6, 3e-6
Case = dict[str, Any]
Row = dict[str, Any]
Said = tuple[str, Tensor, Tensor, bool]
"""Who reads it, f, x̂, and whether f is larger by the norms of the decoder's rows."""


def without_nnsight() -> None:
    """dictionary_learning imports nnsight, an old release, for the language model. Its loaders never call it."""
    if importlib.util.find_spec("nnsight") is None:
        empty: Any = types.ModuleType("nnsight")
        empty.LanguageModel = object
        sys.modules["nnsight"] = empty


without_nnsight()
import dictionary_learning.utils as dl  # noqa: E402
import numpy as np  # noqa: E402
import sae_bench.custom_saes.batch_topk_sae as batch_topk_sae  # noqa: E402
import sae_bench.custom_saes.gated_sae as gated_sae  # noqa: E402
import sae_bench.custom_saes.jumprelu_sae as jumprelu_sae  # noqa: E402
import sae_bench.custom_saes.relu_sae as relu_sae  # noqa: E402
import sae_bench.custom_saes.topk_sae as topk_sae  # noqa: E402
import sae_lens.loading.pretrained_sae_loaders as saelens_loaders  # noqa: E402
from sae_lens import SAE  # noqa: E402
from sparsify import SparseCoder  # noqa: E402

BENCH = {
    "GatedAutoEncoder": (gated_sae, "load_dictionary_learning_gated_sae"),
    "JumpReluAutoEncoder": (jumprelu_sae, "load_dictionary_learning_jump_relu_sae"),
    "BatchTopKSAE": (batch_topk_sae, "load_dictionary_learning_batch_topk_sae"),
    "AutoEncoder": (relu_sae, "load_dictionary_learning_relu_sae"),
    "AutoEncoderTopK": (topk_sae, "load_dictionary_learning_topk_sae"),
}


def joined(f: Tensor, d_sae: int) -> Tensor:
    """Latents of a doubled dictionary as signed ones."""
    return f if f.shape[1] == d_sae else f[:, :d_sae] - f[:, d_sae:]


def compared(case: Case, said: Said, reference: dict[str, Tensor]) -> Row:
    """One row of the result."""
    reader, f, x_hat, scaled = said
    mine = reference["f"] * reference["norms"] if scaled else reference["f"]
    found, x_hat, x = joined(f.float(), mine.shape[1]), x_hat.float(), reference["x"]
    flips = (found != 0) != (mine != 0)
    df = (found - mine).abs().masked_fill(flips, 0).max().item()
    dx = (x_hat - reference["x_hat"]).abs()[~flips.any(1)].max().item()
    bound, many = RELATIVE * x.abs().max().item(), int(flips.sum())
    holds = df <= bound and dx <= bound and many <= FLIPS * flips.numel()
    return {
        "name": case["name"], "tool": case["tool"], "form": case["form"], "b_dec": case["b_dec"], "reader": reader,
        "df": df, "dx": dx, "bound": bound, "flips": many, "codes": flips.numel(), "holds": holds,
    }  # fmt: skip


def saelens(root: Path, case: Case, x: Tensor) -> Iterator[Said]:
    """SAE.load_from_disk, before and after fold_W_dec_norm, which Neuronpedia calls."""
    folder = root / case["folder"]
    if case["form"] == "bijumprelu" and "sagsae_bijumprelu" not in sys.modules:
        sys.path.insert(0, str(folder))
        __import__("sagsae_bijumprelu")
    sae = SAE.load_from_disk(folder)
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert sae.cfg.metadata.sagsae["pairs"] == ("i, i + d_sae/2" if is_doubled(case) else None)
    f = sae.encode(x)
    yield "SAELens", f, sae.decode(f), False
    sae.fold_W_dec_norm()
    f = sae.encode(x)
    yield "SAELens, folded norms", f, sae.decode(f), True


def is_doubled(case: Case) -> bool:
    return bool(case["width"] == 2 * case["d_sae"])


def dictionary_learning(root: Path, case: Case, x: Tensor) -> Iterator[Said]:
    """load_dictionary; SAEBench's loaders and SAELens' own, which take a repository's files."""
    place = root / case["folder"]
    ours, config = dl.load_dictionary(str(place), "cpu")
    f = ours.encode(x)
    yield "dictionary_learning", f, ours.decode(f), True
    module, name = BENCH[config["trainer"]["dict_class"]]
    vars(module)["hf_hub_download"] = from_folder(root)
    load: Callable[..., Any] = getattr(module, name)
    file = f"{case['folder']}/ae.pt"
    sae = load("o/r", file, "tiny", torch.device("cpu"), torch.float32, layer=2)
    f = sae.encode(x)
    yield "SAEBench", f, sae.decode(f), True
    vars(saelens_loaders)["hf_hub_download"] = from_folder(root)
    converter = saelens_loaders.NAMED_PRETRAINED_SAE_LOADERS["dictionary_learning_1"]
    sae = SAE.from_pretrained("o/r", case["folder"], converter=converter)
    f = sae.encode(x)
    yield "SAELens", f, sae.decode(f), True


def from_folder(root: Path) -> Callable[..., str]:
    """Stands in for the hub: a repository's file lies in this folder."""

    def hf_hub_download(repo_id: str, filename: str, **more: Any) -> str:  # noqa: ARG001 (huggingface_hub's signature)
        path = root / more.get("subfolder", "") / filename
        if not path.exists():
            raise saelens_loaders.EntryNotFoundError(filename)
        return str(path)

    return hf_hub_download


def sparsify(root: Path, case: Case, x: Tensor) -> Iterator[Said]:
    sae = SparseCoder.load_from_disk(root / case["folder"] / "layers.2")
    values, indices, _ = sae.encode(x)
    if "note" in case:
        check_note(case, x, sae.decode(values, indices))
        return
    f = torch.zeros(len(x), sae.num_latents).scatter_(1, indices, values)
    yield "sparsify", f, sae.decode(values, indices), False


def check_note(case: Case, x: Tensor, x_hat: Tensor) -> None:
    """The export said what R² sparsify will have."""
    said = re.search(r"R² (\S+) instead", case["note"])
    assert said is not None, case
    r2 = 1 - (x - x_hat).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert abs(float(said[1]) - r2.item()) < 1e-4, (case, r2.item())


def gemma_scope(root: Path, case: Case, x: Tensor) -> Iterator[Said]:
    """SAELens' loader of Gemma Scope, which finds out about a model by its repository's name."""
    vars(saelens_loaders)["hf_hub_download"] = from_folder(root / case["folder"])
    n, d_in = case["width"], x.shape[1]
    (root / case["folder"] / "layer_2").mkdir(exist_ok=True)
    (root / case["folder"] / "layer_2/params.npz").write_bytes((root / case["folder"] / "params.npz").read_bytes())
    converter = saelens_loaders.gemma_2_sae_huggingface_loader
    config, state, _ = converter("google/gemma-scope-2b-pt-res", "layer_2", cfg_overrides={"d_in": d_in, "d_sae": n})
    config = saelens_loaders.handle_config_defaulting(config)
    cls = SAE.get_sae_class_for_architecture("jumprelu")
    sae: Any = cls(SAE.get_sae_config_class_for_architecture("jumprelu").from_dict(config))
    sae.load_state_dict(state)
    f = sae.encode(x)
    yield "SAELens", f, sae.decode(f), False


def check_heads(root: Path) -> None:
    """An export for attn.hook_z takes heads side by side: [batch, position, head, d_head], equal to flat rows."""
    sae = SAE.load_from_disk(root / "exports/heads")
    assert sae.cfg.reshape_activations == "hook_z"
    x = torch.randn(2, 5, 4, sae.cfg.d_in // 4, generator=torch.Generator().manual_seed(0))
    heads = sae(x)
    flat = sae.W_dec.new_tensor(np.asarray(x.flatten(2)))
    sae.turn_off_forward_pass_hook_z_reshaping()
    assert heads.shape == x.shape
    assert torch.equal(heads.flatten(2), sae(flat))


READERS = {
    "saelens": saelens,
    "dictionary-learning": dictionary_learning,
    "sparsify": sparsify,
    "gemma-scope": gemma_scope,
}


@torch.no_grad()
def main(root: Path) -> None:
    rows: list[Row] = []
    for case in json.loads((root / "cases.json").read_text()):
        reference = load_file(root / "references" / case["name"])
        for said in READERS[case["tool"]](root, case, reference["x"]):
            row = compared(case, said, reference)
            rows.append(row)
            print(json.dumps(row), flush=True)  # noqa: T201
    check_heads(root)
    (root / "readers.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
