"""What other tools compute from the files of an export, in float64 and numpy, as their own sources say it.

`SAYS` uses nothing of the exporter. tests/exchange/peers/ runs the tools themselves.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from shared.schemas.exchange import ExportConfig
from support.variants import D_IN, batch, variant, weights
from train.autoencoder import Autoencoder
from train.exchange.export import export
from train.exchange.saved import SavedSAE
from train.sae.families import family

Array = NDArray[np.float64]
Said = tuple[Array, Array]
"""f and x̂."""
SCALE: Final = 7.5
MODEL: Final = {"name": "pythia-1b", "commit": "0" * 40, "local": False, "dtype": "float32"}
ABOUT: Final[dict[str, Any]] = {
    "model": MODEL, "hook_name": "blocks.2.hook_resid_post", "context": 128, "bos_id": 0, "lambda": 0.1,
    "corpus": "owner/texts", "exclude_special": True, "exclude_positions": [0],
}  # fmt: skip


def save(folder: Path, name: str, about: dict[str, Any] | None = None, **changes: Any) -> Autoencoder:
    """Saves the variant of this name to a folder and returns it as it is loaded again. `changes`: its settings."""
    config = variant(name, **changes)
    Autoencoder.of(config, weights(config), SCALE).save(folder, {**ABOUT, **(about or {})})
    return SavedSAE(folder, None).load()


def rows(n: int = 2048) -> torch.Tensor:
    """Activations far from zero, in float32, [n, d_in]."""
    return SCALE * (batch(n=n) + torch.linspace(-1, 2, D_IN))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def wide(tensors: dict[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(each, dtype=np.float64) for name, each in tensors.items()}


def relu(z: Array) -> Array:
    return np.maximum(z, 0)


def largest(z: Array, k: int) -> NDArray[np.bool_]:
    """Where the k largest of each row are."""
    mask = np.zeros(z.shape, bool)
    np.put_along_axis(mask, np.argsort(-z, axis=1, kind="stable")[:, :k], True, axis=1)
    return mask


def saelens_says(folder: Path, x: Array) -> Said:
    """SAELens 6.54.12: saes/{sae,gated_sae,standard_sae,jumprelu_sae,topk_sae,abstopk_sae}.py."""
    cfg, w = read(folder / "cfg.json"), wide(load_file(folder / "sae_weights.safetensors"))
    assert cfg["normalize_activations"] == "none"
    assert (cfg["d_in"], cfg["d_sae"]) == w["W_enc"].shape == w["W_dec"].shape[::-1]
    u = (x - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"]
    architecture = cfg["architecture"]
    norms = np.linalg.norm(w["W_dec"], axis=1) if cfg.get("rescale_acts_by_decoder_norm") else 1.0
    z = (u + w.get("b_enc", 0.0)) * norms
    if architecture == "gated":
        f = (u + w["b_gate"] > 0) * relu(np.exp(w["r_mag"]) * u + w["b_mag"])
    elif architecture == "standard":
        f = relu(z)
    elif architecture == "jumprelu":
        f = relu(z) * (z > w["threshold"])
    elif architecture == "topk":
        f = relu(z) * largest(z, cfg["k"])
    elif architecture == "abstopk":
        f = z * largest(np.abs(z), cfg["k"])
    else:
        assert architecture == "bijumprelu"
        y = -w["slope_neg"] * z
        f = (z > w["threshold_pos"]) * (z + w["offset_pos"]) - (y > w["threshold_neg"]) * (y + w["offset_neg"])
    return f, (f / norms) @ w["W_dec"] + w["b_dec"]


def dictionary_learning_says(folder: Path, x: Array) -> Said:
    """dictionary_learning 0.1.0: dictionary.py, trainers/{top_k,batch_top_k}.py, chosen as utils.load_dictionary
    does."""
    cfg, w = read(folder / "config.json")["trainer"], wide(torch.load(folder / "ae.pt", weights_only=True))
    kind = cfg["dict_class"]
    if kind == "JumpReluAutoEncoder":
        z = x @ w["W_enc"] + w["b_enc"]
        f = relu(z * (z > w["threshold"]))
        return f, f @ w["W_dec"] + w["b_dec"]
    if kind == "GatedAutoEncoder":
        u = (x - w["decoder_bias"]) @ w["encoder.weight"].T
        f = (u + w["gate_bias"] > 0) * relu(np.exp(w["r_mag"]) * u + w["mag_bias"])
        return f, f @ w["decoder.weight"].T + w["decoder_bias"]
    b_dec = w["bias" if kind == "AutoEncoder" else "b_dec"]
    a = relu((x - b_dec) @ w["encoder.weight"].T + w["encoder.bias"])
    if kind == "BatchTopKSAE":
        assert cfg["k"] == w["k"]
        a = a * (a > w["threshold"])
    elif kind == "AutoEncoderTopK":
        a = a * largest(a, cfg["k"])
    else:
        assert kind == "AutoEncoder"
    return a, a @ w["decoder.weight"].T + b_dec


def sparsify_says(folder: Path, x: Array) -> Said:
    """sparsify 1.3.3: sparse_coder.py, fused_encoder.py. `folder` is the hookpoint's."""
    cfg, w = read(folder / "cfg.json"), wide(load_file(folder / "sae.safetensors"))
    assert not cfg["transcode"]
    assert cfg["num_latents"] == len(w["W_dec"])
    a = relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    f = a * largest(a, cfg["k"])
    return f, f @ w["W_dec"] + w["b_dec"]


def gemma_scope_says(folder: Path, x: Array) -> Said:
    """Gemma Scope's tutorial, and SAELens' loader of it."""
    w = wide(dict(np.load(folder / "params.npz", allow_pickle=False)))
    z = x @ w["W_enc"] + w["b_enc"]
    f = relu(z) * (z > w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


SAYS: Final[dict[str, Callable[[Path, Array], Said]]] = {
    "saelens": saelens_says,
    "dictionary-learning": dictionary_learning_says,
    "sparsify": sparsify_says,
    "gemma-scope": gemma_scope_says,
}


def signed(f: Array, d_sae: int) -> Array:
    """A code of either width as that of width d_sae."""
    return f if f.shape[1] == d_sae else f[:, :d_sae] - f[:, d_sae:]


def check_equal(sae: Autoencoder, x: torch.Tensor, said: Said, norms: Array | float = 1.0) -> None:
    """The bounds that hold between tools: 1e-6 times the largest activation where the same latents are active, and
    three codes in a million active in one of both only. `norms` of decoder rows that the export scaled to one."""
    f, x_hat = sae.encode(x).double().numpy() * norms, sae.decode(sae.encode(x)).double().numpy()
    their_f, most = signed(said[0], sae.config.d_sae), 1e-6 * float(x.abs().max())
    flips = (f != 0) != (their_f != 0)
    assert (f != 0).mean() > 0.005, "hardly a latent is active: nothing is compared"
    assert flips.sum() <= np.ceil(3e-6 * f.size)
    assert np.abs(f - their_f)[~flips].max() <= most
    same = ~flips.any(axis=1)
    assert np.abs(x_hat - said[1])[same].max() <= max(most, 1e-6 * np.abs(x_hat).max())  # random weights: |x̂| > |x|


# what golden/exchange.* holds

BASE: Final = ("sa-gsae", "r tied", "untied", "one-sided", "gated", "gated, free decoder", "relu", "jumprelu",
               "batch-topk", "abs-topk", "topk")  # fmt: skip
GATES: Final = BASE[:6]
GOLDEN: Final = [
    *((name, "saelens", "auto", folded) for name in BASE for folded in (False, True)),
    *((name, "saelens", "jumprelu", False) for name in (*GATES, "relu")),
    *((name, "saelens", "bijumprelu", False) for name in (*BASE[:3], "abs-topk")),
    *((name, "dictionary-learning", "auto", False) for name in BASE),
    *((name, "dictionary-learning", "jumprelu", False) for name in ("sa-gsae", "gated, free decoder")),
    *((name, "sparsify", "auto", False) for name in ("relu", "topk")),
    *((name, "gemma-scope", "auto", False) for name in BASE[:-1]),
]
"""Exports whose tools were asked: variant, tool, form, whether b_dec is folded."""


def fixed(name: str) -> Autoencoder:
    """A variant whose weights come from numpy's frozen stream, so that they are the same whatever the versions are."""
    config, random = variant(name), np.random.RandomState(5)
    shapes = family(config).shapes(D_IN)
    drawn = {key: random.standard_normal(shape).astype(np.float32) for key, shape in sorted(shapes.items())}
    drawn["W_dec"] /= np.linalg.norm(drawn["W_dec"], axis=1, keepdims=True)
    if name == "gated, free decoder":
        drawn["W_dec"] *= np.linspace(0.5, 2, len(drawn["W_dec"]), dtype=np.float32)[:, None]
    drawn["W_enc"] = drawn["W_dec"] + 0.1 * drawn["W_enc"]
    small = {"theta": (0.6, 0.3), "r": (0.0, 0.3), "b": (0.1, 0.2), "b_enc": (-0.2, 0.2), "threshold": (1.2, 0.0)}
    for key, (low, by) in small.items():
        if key in drawn:
            drawn[key] = np.float32(low) + np.float32(by) * np.abs(drawn[key])
    if config.arch == "abs-topk":
        drawn["b_enc"] *= 0
    tensors = {key: torch.from_numpy(np.asarray(each, np.float32)) for key, each in drawn.items()}
    return Autoencoder.of(config, family(config).weights(**tensors), SCALE)


def fixed_rows() -> torch.Tensor:
    """Activations [6, d_in], with b_dec's length."""
    drawn = np.random.RandomState(6).standard_normal((6, D_IN)) + np.linspace(-1, 1, D_IN)
    return torch.from_numpy((SCALE * drawn).astype(np.float32))


def write_golden(root: Path) -> list[dict[str, Any]]:
    """Writes the exports of GOLDEN and returns what golden/exchange.py and the test ask about each."""
    cases = []
    for name in BASE:
        fixed(name).save(root / "saes" / name, {**ABOUT, "hook_name": "blocks.2.hook_resid_post"})
    for number, (name, tool, form, folded) in enumerate(GOLDEN):
        values = {"source": root / "saes" / name, "to": tool, "form": form, "fold_b_dec": folded}
        (done,) = export(ExportConfig.model_validate({**values, "out": root / f"{number}"}))
        key = f"{tool} {name} {form}{' folded' if folded else ''}"
        case = {"key": key, "name": name, "tool": tool, "form": done.form, "folder": f"{number}", "width": done.width}
        cases.append({**case, "d_sae": fixed(name).config.d_sae, "b_dec": "folded" if folded else ""})
    return cases


DESCRIBED: Final = {
    "saelens": "cfg.json", "dictionary-learning": "config.json", "sparsify": "layers.2/cfg.json",
    "gemma-scope": "sagsae.json",
}  # fmt: skip


def described(folder: Path, tool: str) -> dict[str, Any]:
    """An export's description without sagsae's own block, and its tensors: names, types, shapes and two sums."""
    about = read(folder / DESCRIBED[tool])
    about.pop("sagsae", None)
    about.get("metadata", {}).pop("sagsae", None)
    sums = {}
    for name, each in sorted(tensors_of(folder, tool).items()):
        values = np.asarray(each, np.float64).reshape(-1)
        along = float(values @ np.cos(np.arange(values.size)))
        sums[name] = [str(each.dtype), list(each.shape), round(along, 3), round(float(np.linalg.norm(values)), 3)]
    return {"description": about, "tensors": sums}


def tensors_of(folder: Path, tool: str) -> dict[str, NDArray[Any]]:
    if tool == "saelens":
        return dict(load_file(folder / "sae_weights.safetensors"))
    if tool == "sparsify":
        return dict(load_file(folder / "layers.2/sae.safetensors"))
    if tool == "gemma-scope":
        return dict(np.load(folder / "params.npz", allow_pickle=False))
    return {name: each.numpy() for name, each in torch.load(folder / "ae.pt", weights_only=True).items()}
