"""The model we harvest is the model Hugging Face ships: equal bit for bit at every hook, spliced without a trace."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import save_corpus, save_decoder, save_tokenizer, save_wide_model, sentences
from support.stores import in_token_order
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, SmolLM3Config

from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig
from shared.errors import UserError
from shared.model import language_model as language_model
from shared.model.bridge import Attention
from shared.model.language_model import LanguageModel, side_by_side
from shared.model.source import resolve_model
from shared.store.opened import Store

IDS = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
SHAPE: dict[str, Any] = {
    **SMALL, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "neox": GPTNeoXConfig(**SHAPE),
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=2, n_positions=64),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "smollm3": SmolLM3Config(**SHAPE, num_key_value_heads=2, pad_token_id=0),
}
MODULES = {
    "neox": ("layers", "attention", None),
    "gpt2": ("h", "attn", "ln_2"),
    "llama": ("layers", "self_attn", "post_attention_layernorm"),
    "smollm3": ("layers", "self_attn", "post_attention_layernorm"),
}
"""Where Hugging Face keeps its blocks, in them attention, and the norm that reads the stream between the two halves."""


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_decoder(tmp_path_factory.mktemp("models") / str(request.param), CONFIGS[request.param])
    save_tokenizer(path)
    return path


def reference(folder: Path, layer: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return hugging_face(folder, layer, dtype)(IDS)


def hugging_face(folder: Path, layer: int, dtype: torch.dtype) -> Callable[[Tensor], dict[str, Tensor]]:
    """What Hugging Face's own modules give for token ids, read with torch hooks: short name -> [n * context, d], and
    the logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    blocks, attention, middle = MODULES[folder.name]
    block = getattr(model.base_model, blocks)[layer]
    found: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        def hook(_module: Any, args: Any, options: Any) -> None:
            found[name] = (args[0] if args else options["hidden_states"]).flatten(0, 1)

        return hook

    def after(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)

        return hook

    block.register_forward_pre_hook(before("resid_pre"), with_kwargs=True)
    if middle:
        getattr(block, middle).register_forward_pre_hook(before("resid_mid"), with_kwargs=True)
    for name, module in (("resid_post", block), ("attn_out", getattr(block, attention)), ("mlp_out", block.mlp)):
        module.register_forward_hook(after(name))

    def run(ids: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            found["logits"] = model(ids, use_cache=False).logits
        return dict(found)

    return run


def captured(model: LanguageModel, layer: int, names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    sinks = {f"blocks.{layer}.hook_{name}": lambda x, name=name: found.__setitem__(name, x.clone()) for name in names}
    with model.capturing(sinks) as run:
        run(IDS)
    return found


def load(folder: Path, dtype: str = "float32", attention: Attention = "sdpa") -> LanguageModel:
    return LanguageModel(resolve_model(str(folder)), "cpu", dtype, attention)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", [1, 2])  # 2 is the last: the unembedding must not be needed
def test_activations_equal_hugging_face_bit_for_bit(folder: Path, layer: int, dtype: str) -> None:
    expected = reference(folder, layer, getattr(torch, dtype))
    del expected["logits"]
    assert len(expected) == (4 if folder.name == "neox" else 5), "resid_mid exists unless the residual is parallel"
    found = captured(load(folder, dtype), layer, list(expected))
    for name, activations in expected.items():
        assert activations.dtype == getattr(torch, dtype)
        assert torch.equal(found[name], activations), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_rows_equal_hugging_face_bit_for_bit(folder: Path, dtype: str, tmp_path: Path) -> None:
    """Contexts of 24 in shards of 320 rows, 5 contexts a batch: shards cut contexts, batches reach over their ends."""
    run, names = hugging_face(folder, 1, getattr(torch, dtype)), ["resid_pre", "resid_post", "attn_out", "mlp_out"]
    names += [] if folder.name == "neox" else ["resid_mid"]
    corpus = save_corpus(tmp_path / "corpus.jsonl", sentences(100))
    config = HarvestConfig(
        model=str(folder), corpus=str(corpus), context=24, tokens=1000, chunk_rows=64, shard_rows=320, batch_tokens=120,
        layers=(1,), hooks=tuple(names), dtype=dtype, store_dtype=dtype, device="cpu", out=str(tmp_path), name="s",
    )  # fmt: skip
    store = Store.open(run_harvest(config).store)
    ids = torch.from_numpy(store.tokens().astype("int64"))
    stored = {name: in_token_order(store, f"layer_01/{name}") for name in names}
    for shard in store.commits:
        start, stop = store.spec.shard_range(shard)
        first, last = start // 24, -(-stop // 24)
        parts = [run(ids[at : min(at + 5, last)]) for at in range(first, last, 5)]
        for name in names:
            rows = torch.cat([part[name] for part in parts])[start - 24 * first : stop - 24 * first]
            bits = rows.view(torch.uint16) if dtype == "bfloat16" else rows
            assert np.array_equal(stored[name][start:stop], bits.numpy()), (name, shard)


def test_activations_equal_the_stock_bridge(folder: Path) -> None:
    """Within 1e-5 of their scale; and --attention eager is the stock bridge, to the bit."""
    from transformer_lens.model_bridge import TransformerBridge

    names = [name for name in reference(folder, 1) if name != "logits"]
    found, eager = captured(load(folder), 1, names), captured(load(folder, attention="eager"), 1, names)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(IDS)
    for name in names:
        stock = cache[f"blocks.1.hook_{name}"].flatten(0, 1)
        assert torch.equal(eager[name], stock), name
        assert (found[name] - stock).abs().max() <= 1e-5 * stock.abs().max(), name


@pytest.mark.parametrize("layer", [1, 2])
def test_nothing_runs_beyond_the_last_hook(folder: Path, layer: int) -> None:
    model = load(folder)
    ran: list[str] = []
    parts = {f"block {k}": model.bridge.blocks[k].original_component for k in range(3)}
    parts["head"] = model.bridge.original_model.get_output_embeddings()
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_args, name=name: ran.append(name))
    captured(model, layer, ["attn_out"])
    assert ran == [f"block {k}" for k in range(layer + 1)]


def test_splicing(folder: Path) -> None:
    model = load(folder)
    logits = reference(folder, 1)["logits"]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    clean = model.losses(IDS)
    assert torch.equal(clean.flatten(), expected)
    for name in ("resid_post", "attn_out", "mlp_out"):
        hook = f"blocks.1.hook_{name}"
        assert torch.equal(model.losses(IDS, (hook, torch.clone)), clean), "splicing what was there changes nothing"
        assert not torch.equal(model.losses(IDS, (hook, torch.zeros_like)), clean), name
    assert torch.equal(model.losses(IDS), clean), "no hook stays behind"


def test_models_side_by_side(folder: Path) -> None:
    """Over the same weights, each with hooks of its own."""
    models = side_by_side(resolve_model(str(folder)), "cpu", "float32", "sdpa", 3)
    weights = [[tensor.data_ptr() for tensor in model.bridge.original_model.parameters()] for model in models]
    assert weights[0] == weights[1] == weights[2]
    batches = torch.randint(0, 300, (24, 3, 16), generator=torch.Generator().manual_seed(1))
    alone = LanguageModel(resolve_model(str(folder)), "cpu", "float32")
    expected = [rows_of(alone, tokens) for tokens in batches]

    def share_of(k: int) -> list[Any]:
        return [rows_of(models[k], tokens) for tokens in batches[k::3]]

    with ThreadPoolExecutor(3) as threads:
        shares = [threads.submit(share_of, k) for k in range(3)]
    for k, share in enumerate(shares):
        for found, wanted in zip(share.result(), expected[k::3], strict=True):
            assert torch.equal(found, wanted)


def rows_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    found: list[Tensor] = []
    with model.capturing({"blocks.1.hook_mlp_out": found.append}) as run:
        run(tokens)
    (rows,) = found
    return rows


def test_hooks_of_other_shapes_are_flattened(model_folder: Path) -> None:
    model = load(model_folder, attention="eager")
    found: dict[str, Tensor] = {}
    sinks = {name: lambda x, name=name: found.__setitem__(name, x.clone()) for name in
             ("blocks.0.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.0.attn.hook_q")}  # fmt: skip
    with model.capturing(sinks) as run:
        run(IDS)
    shapes = {name: tuple(rows.shape) for name, rows in found.items()}
    assert shapes == {
        "blocks.0.attn.hook_z": (48, 32),
        "blocks.1.mlp.hook_post": (48, 64),
        "blocks.0.attn.hook_q": (48, 32),
    }
    output = model.bridge.blocks[0].attn.o.original_component
    with torch.inference_mode(), model.capturing({"blocks.0.hook_attn_out": lambda x: found.update(out=x)}) as run:
        run(IDS)
        assert torch.equal(output(found["blocks.0.attn.hook_z"]), found["out"]), "heads side by side"
    with pytest.raises(UserError, match="no such hookpoint"):
        model.check_hooks(["blocks.0.hook_nonsense"])


def sink(_rows: Tensor) -> None: ...


def test_every_step_is_checked(model_folder: Path) -> None:
    """A hook that does not fire, fires twice, has no row a token or rows of another width stops the harvest."""
    model = load(model_folder)
    name = "blocks.1.hook_mlp_out"
    mlp = model.bridge.blocks[1].mlp
    with (
        pytest.raises(UserError, match=r"mlp_out: gave \[3, 16, 32\]; expected \[3, 16, 31\]"),
        model.capturing({name: sink}, {name: 31}) as run,
    ):
        run(IDS)
    with model.capturing({name: sink}, {name: 32}) as run:
        run(IDS)
        handle = mlp.original_component.register_forward_hook(lambda _module, _args, output: output[:, :-1])
        with pytest.raises(UserError, match=r"mlp_out: gave \[3, 15, 32\]; expected \[3, 16, 32\]"):
            run(IDS)
        handle.remove()
        handle = mlp.register_forward_hook(lambda _module, _args, output: mlp.hook_out(output))
        with pytest.raises(UserError, match="mlp_out: fired more than once"):
            run(IDS)
        handle.remove()
        run(IDS)
    silent = model.capturing({"blocks.1.attn.hook_pattern": sink})
    with pytest.raises(UserError, match="pattern: did not fire"), silent as run:
        run(IDS)


@pytest.mark.parametrize("split", [False, True])
def test_a_model_is_spread(folder: Path, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' device_map places it: whole on this machine's CPU, or with two blocks left on disk, whose
    weights are brought in one block at a time."""
    names = ["resid_pre", "resid_post", "attn_out", "mlp_out"]
    whole = load(folder)
    if split:
        model = AutoModelForCausalLM.from_pretrained(folder)
        blocks = f"{model.base_model_prefix}.{MODULES[folder.name][0]}"
        leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
        places = dict.fromkeys((name for name in leaves if not name.startswith(blocks)), "cpu")
        places |= {f"{blocks}.{k}": "disk" if k else "cpu" for k in range(3)}
        monkeypatch.setattr(language_model, "DEVICE_MAP", places)
    spread = LanguageModel(resolve_model(str(folder)), "map", "float32")
    assert spread.device == torch.device("cpu")
    weights = [next(block.original_component.parameters()).device.type for block in spread.bridge.blocks]
    assert weights == (["cpu", "meta", "meta"] if split else ["cpu"] * 3)
    for layer in (1, 2):
        expected, found = captured(whole, layer, names), captured(spread, layer, names)
        assert all(torch.equal(found[name], expected[name]) for name in names)
    assert torch.equal(spread.losses(IDS), whole.losses(IDS))


def test_a_model_of_the_shape_of_pythia(tmp_path: Path) -> None:
    model = load(save_wide_model(tmp_path / "wide"), "bfloat16")
    rows = captured(model, 1, ["mlp_out"])["mlp_out"]
    assert rows.shape == (48, 2048)
    assert 0.1 < rows.float().std() < 1000, "numbers that mean something"
