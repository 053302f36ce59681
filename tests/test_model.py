"""The model we harvest is the model Hugging Face ships: equal bit for bit, spliced without a trace."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.errors import UserError
from shared.model import (
    SHIPPED,
    LanguageModel,
    model_info,
    read_config,
    resolve_hooks,
    resolve_layers,
    resolve_model,
)

IDS = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module", params=["neox", "gpt2", "llama"])
def folder(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "neox":
        return model_folder
    torch.manual_seed(0)
    if request.param == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=2, n_positions=64))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            **SMALL, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=64,
        ))  # fmt: skip
    path = tmp_path_factory.mktemp("models") / str(request.param)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, path)
    return path


def reference(folder: Path, layer: int) -> dict[str, Tensor]:
    """What Hugging Face's own modules give, read with torch hooks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    base = model.base_model
    block = (base.layers if hasattr(base, "layers") else base.h)[layer]
    attention = next(m for name, m in block.named_children() if name in ("attention", "attn", "self_attn"))
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)

        return hook

    for name, module in (("resid_post", block), ("attn_out", attention), ("mlp_out", block.mlp)):
        module.register_forward_hook(keep(name))
    with torch.inference_mode():
        found["logits"] = model(IDS, use_cache=False).logits
    return found


def captured(model: LanguageModel, layer: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    sinks = {f"blocks.{layer}.hook_{name}": lambda x, name=name: found.__setitem__(name, x.clone()) for name in names}
    with model.capturing(sinks) as run:
        run(IDS)
    return found


@pytest.mark.parametrize("layer", [1, 2])  # 2 is the last: the unembedding must not be needed
def test_activations_equal_hugging_face_bit_for_bit(folder: Path, layer: int) -> None:
    expected = reference(folder, layer)
    model = LanguageModel(resolve_model(str(folder)), "cpu", "float32")
    found = captured(model, layer, ("resid_post", "attn_out", "mlp_out"))
    for name, activations in found.items():
        assert torch.equal(activations, expected[name]), name


def test_activations_equal_the_stock_bridge(folder: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    names = ("resid_pre", "resid_post", "attn_out", "mlp_out")
    found = captured(LanguageModel(resolve_model(str(folder)), "cpu", "float32"), 1, names)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=stock, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(IDS)
    for name, activations in found.items():
        torch.testing.assert_close(activations, cache[f"blocks.1.hook_{name}"].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_splicing(folder: Path) -> None:
    model = LanguageModel(resolve_model(str(folder)), "cpu", "float32")
    logits = reference(folder, 1)["logits"]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    clean = model.losses(IDS)
    assert torch.equal(clean.flatten(), expected)
    for name in ("resid_post", "attn_out", "mlp_out"):
        hook = f"blocks.1.hook_{name}"
        assert torch.equal(model.losses(IDS, (hook, torch.clone)), clean), "splicing what was there changes nothing"
        assert not torch.equal(model.losses(IDS, (hook, torch.zeros_like)), clean), name
    assert torch.equal(model.losses(IDS), clean), "no hook stays behind"


def test_hooks_of_other_shapes_are_flattened(model_folder: Path) -> None:
    model = LanguageModel(resolve_model(str(model_folder)), "cpu", "float32")
    widths: dict[str, int] = {}
    sinks = {name: lambda x, name=name: widths.__setitem__(name, x.shape[1]) for name in
             ("blocks.0.attn.hook_z", "blocks.1.mlp.hook_post")}  # fmt: skip
    with model.capturing(sinks) as run:
        run(IDS)
    assert widths == {"blocks.0.attn.hook_z": 32, "blocks.1.mlp.hook_post": 64}
    with pytest.raises(UserError, match="no such hookpoint"):
        model.check_hooks(["blocks.0.hook_nonsense"])


def test_names(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("tiny").location == str(SHIPPED)
    with pytest.raises(UserError, match=r"--model pithia-1b: is not an alias.*Did you mean pythia-1b\?"):
        resolve_model("pithia-1b")
    with pytest.raises(UserError, match="no such folder"):
        resolve_model("./nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="revisions belong to Hugging Face"):
        resolve_model(str(model_folder), "main")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "gpt2")
    assert resolve_model("gpt2").local, "a folder wins over an alias"
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        resolve_model("gpt2")


def test_a_hub_out_of_reach_fails_fast_and_says_what_to_do() -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached.*or give a folder"):
        resolve_model("EleutherAI/pythia-1b")
    assert time.monotonic() - started < 5


def test_the_commit_of_a_folder_follows_its_weights(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    assert resolve_model(str(copy)).commit == resolve_model(str(model_folder)).commit
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert resolve_model(str(copy)).commit != resolve_model(str(model_folder)).commit


def test_broken_weights_are_an_error_for_people(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="weights cannot be loaded"):
        LanguageModel(resolve_model(str(copy)), "cpu", "float32")
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="configuration cannot be loaded"):
        read_config(resolve_model(str(copy)))


def test_layers_and_hookpoints(model_folder: Path) -> None:
    info = model_info(read_config(resolve_model(str(model_folder))))
    assert resolve_layers(("mid", 0, 0), info) == [0, 1]
    with pytest.raises(UserError, match=r"--layer 3: the model has 3 layers, 0 to 2"):
        resolve_layers((3,), info)
    named = resolve_hooks(("mlp_out", "blocks.2.attn.hook_z"), [0, 1], info)
    assert named == {
        "layer_00/mlp_out": "blocks.0.hook_mlp_out",
        "layer_01/mlp_out": "blocks.1.hook_mlp_out",
        "layer_02/attn.hook_z": "blocks.2.attn.hook_z",
    }
    for hook in ("resid_mid", "blocks.1.hook_resid_mid"):
        with pytest.raises(UserError, match=r"parallel residual\)\. Use resid_pre, resid_post, attn_out or mlp_out"):
            resolve_hooks((hook,), [1], info)
    with pytest.raises(UserError, match="Short names: resid_pre"):
        resolve_hooks(("mlp",), [1], info)
    with pytest.raises(UserError, match="--layer 9"):
        resolve_hooks(("blocks.9.hook_mlp_out",), [1], info)
