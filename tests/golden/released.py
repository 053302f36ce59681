"""Makes released.tar.xz: small autoencoders that SAELens, dictionary_learning and sparsify themselves saved, each with
what the tool computes of some activations: NAME/ (the tool's files) and NAME/said.safetensors (x, f, x_hat).

    ~/peers/bin/python tests/golden/released.py tests/golden/released.tar.xz

in the environment of tests/exchange/peers/versions.txt. Parameters are random, decoder rows have any norm. `f` is in
units of a decoder row of norm one: the tool's latent times the norm, but for per-token TopK. The folders gemma-… are
files of Gemma Scope's names and shapes, read by SAELens' own loader.
"""

import importlib.util
import json
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

if importlib.util.find_spec("nnsight") is None:  # dictionary_learning imports it for the language model, unused here
    empty: Any = types.ModuleType("nnsight")
    empty.LanguageModel = object
    sys.modules["nnsight"] = empty

import dictionary_learning.dictionary as dictionaries
import dictionary_learning.trainers.batch_top_k as batch_top_k
import dictionary_learning.trainers.matryoshka_batch_top_k as matryoshka
import dictionary_learning.trainers.top_k as top_k
import numpy as np
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

D_IN, D_SAE, ROWS, K = 8, 24, 16, 4
FACTOR = 0.37


def rows() -> Tensor:
    """Activations far from zero."""
    return 3 * torch.randn(ROWS, D_IN) + 5 * torch.randn(D_IN)


def fill(parameters: Any, b_dec: Tensor) -> None:
    """Random numbers in place of what training would have found."""
    with torch.no_grad():
        for name, p in parameters:
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 2 else 1.0))
            if "threshold" in name:
                p.abs_()
            if name in ("b_dec", "bias", "decoder_bias"):
                p.copy_(b_dec)


def keep(place: Path, x: Tensor, f: Tensor, x_hat: Tensor) -> None:
    said = {"x": x, "f": f.float(), "x_hat": x_hat.float()}
    save_file({name: each.detach().clone().contiguous() for name, each in said.items()}, place / "said.safetensors")


def saelens(out: Path) -> None:
    """Each architecture, b_dec on the input or not, with and without a scaling of the activations."""
    for architecture in ("standard", "gated", "jumprelu", "topk", "abstopk"):
        for on_input in (True, False):
            for rescale in (False, True) if "topk" in architecture else (False,):
                kind, settings = sae_lens.registry.get_sae_class(architecture)
                more = {"k": K, "rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
                sae = kind(settings(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=on_input, **more))
                x = rows()
                fill(sae.named_parameters(), x.mean(0))
                with torch.no_grad():
                    if not on_input:  # latents stay sparse on raw activations
                        shift = sae.b_dec @ sae.W_enc
                        (sae.b_gate if architecture == "gated" else sae.b_enc).data -= shift
                        if architecture == "gated":
                            sae.b_mag.data -= sae.r_mag.exp() * shift
                name = f"saelens-{architecture}{'' if on_input else '-folded'}{'-rescaled' if rescale else ''}"
                sae.save_model(out / name)
                keep_saelens(out / name, x, per_token="topk" in architecture)
                if not rescale and on_input:
                    scaled(out / f"{name}-scaled", sae, x, per_token="topk" in architecture)


def scaled(place: Path, sae: Any, x: Tensor, per_token: bool) -> None:
    """The same weights, for activations times FACTOR."""
    sae.save_model(place)
    cfg = json.loads((place / "cfg.json").read_text())
    (place / "cfg.json").write_text(json.dumps({**cfg, "normalize_activations": "expected_average_only_in"}))
    keep_saelens(place, x / FACTOR, per_token, FACTOR)


def keep_saelens(place: Path, x: Tensor, per_token: bool, factor: float | None = None) -> None:
    """What the folder is to SAELens. `per_token`: latents are not multiplied by the decoder's norms."""
    sae = SAE.load_from_disk(place)
    with torch.no_grad():
        if factor is not None:
            sae.fold_activation_norm_scaling_factor(factor)
        f = sae.encode(x)
        keep(place, x, f if per_token else f * sae.W_dec.norm(dim=1), sae.decode(f))


def batch_topk(out: Path) -> None:
    """As SAELens saves a trained one for use: a jumprelu."""
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=True)
    )
    x = rows()
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
        sae.W_enc.mul_(20)
        sae.topk_threshold.fill_(0.5)
    sae.save_inference_model(out / "saelens-batchtopk")
    keep_saelens(out / "saelens-batchtopk", x, per_token=False)


def dictionary_learning(out: Path) -> None:
    made = {
        "AutoEncoder": dictionaries.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": dictionaries.AutoEncoderNew(D_IN, D_SAE),
        "GatedAutoEncoder": dictionaries.GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": dictionaries.JumpReluAutoEncoder(D_IN, D_SAE),
        "BatchTopKSAE": batch_top_k.BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": matryoshka.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, 16]),
        "AutoEncoderTopK": top_k.AutoEncoderTopK(D_IN, D_SAE, K),
    }
    for name, sae in made.items():
        place, x = out / f"dictionary_learning-{name}", rows()
        fill(sae.named_parameters(), x.mean(0))
        if "BatchTopK" in name:
            sae.threshold.fill_(0.7)
        place.mkdir(parents=True)
        torch.save(sae.state_dict(), place / "ae.pt")
        trainer = {
            "dict_class": name,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "layer": 2,
            "lm_name": "gpt2",
            "k": K,
        }
        (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        decoder = sae.W_dec if hasattr(sae, "W_dec") else sae.decoder.weight.T
        with torch.no_grad():
            f = sae.encode(x)
            keep(place, x, f if name == "AutoEncoderTopK" else f * decoder.norm(dim=1), sae.decode(f))


def sparsify(out: Path) -> None:
    for k in (K, D_SAE):
        sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=k))
        x = rows()
        fill(sae.named_parameters(), x.mean(0))
        with torch.no_grad():
            sae.set_decoder_norm_to_unit_norm()
            place = out / f"sparsify-{k}" / "layers.2"
            sae.save_to_disk(place)
            code = sae.encode(x)
            f = torch.zeros(ROWS, D_SAE).scatter_(1, code.top_indices.long(), code.top_acts)
            keep(place, x, f, sae.decode(code.top_acts, code.top_indices))


def gemma_scope(out: Path) -> None:
    """SAELens' loader, its download replaced by the file; of a hookpoint and of the embedding."""
    for folder in ("layer_2/width_16k/average_l0_5", "embedding/width_4k/average_l0_5"):
        place, x = out / f"gemma-{folder.partition('_')[0].partition('/')[0]}" / folder, rows()
        place.mkdir(parents=True)
        shapes = {
            "W_enc": (D_IN, D_SAE),
            "W_dec": (D_SAE, D_IN),
            "b_enc": (D_SAE,),
            "b_dec": (D_IN,),
            "threshold": (D_SAE,),
        }
        w = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        w["threshold"].abs_()
        arrays: dict[str, Any] = {name: each.numpy() for name, each in w.items()}
        np.savez(place / "params.npz", **arrays)
        loaders.hf_hub_download = lambda *_, place=place, **__: str(place / "params.npz")
        known = {"d_in": D_IN, "d_sae": D_SAE}
        _, state, _ = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", folder, "cpu", False, known
        )
        kind, settings = sae_lens.registry.get_sae_class("jumprelu")
        sae = kind(settings(**known, apply_b_dec_to_input=False))
        sae.load_state_dict(state)
        x = x / x.abs().max()
        with torch.no_grad():
            f = sae.encode(x)
            keep(place, x, f * sae.W_dec.norm(dim=1), sae.decode(f))


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for make in (saelens, batch_topk, dictionary_learning, sparsify, gemma_scope):
            make(Path(folder))
        with tarfile.open(sys.argv[1], "w:xz") as archive:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                    member.size = path.stat().st_size
                    with path.open("rb") as file:
                        archive.addfile(member, file)
