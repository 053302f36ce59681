"""Hookpoints are named, found and measured from a model's configuration alone."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.command import Sagsae
from torch.nn.modules.module import register_module_forward_hook
from transformers import GPTNeoXConfig, LlamaConfig, MixtralConfig, SmolLM3Config

from harvest.run import harvest
from shared.config import HarvestConfig
from shared.errors import UserError
from shared.model.hooks import hook_table, hook_widths, resolve_hooks, resolve_layers
from shared.model.outline import outline
from shared.model.source import model_info, read_config, resolve_model
from shared.store.opened import Store


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
    with pytest.raises(UserError, match="Short names: resid_pre"):
        resolve_hooks(("mlp",), [1], info)
    with pytest.raises(UserError, match=r"--hook blocks\.9\.hook_mlp_out: the model has 3 layers"):
        resolve_hooks(("blocks.9.hook_mlp_out",), [1], info)


def test_what_cannot_be_harvested_is_refused(model_folder: Path) -> None:
    config = read_config(resolve_model(str(model_folder)))
    sdpa, eager = (outline(config, attention, "neox", [1]) for attention in ("sdpa", "eager"))
    assert hook_widths(["blocks.1.attn.hook_q"], eager) == {"blocks.1.attn.hook_q": 32}
    refused = {
        r"parallel residual\)\. Use resid_pre, resid_post, attn_out or mlp_out": ("hook_resid_mid", sdpa),
        r"no such hookpoint\. Near: .*blocks\.1\.mlp\.hook_p.*--attention eager": ("mlp.hook_prost", sdpa),
        r"attn\.hook_q: this model has no such hookpoint": ("attn.hook_q", sdpa),
        r"hook_pattern: never fires .*--attention eager makes more fire": ("attn.hook_pattern", sdpa),
        r"hook_pattern: returns \[batch, 2, context, context\] in a forward pass": ("attn.hook_pattern", eager),
    }
    for message, (part, found) in refused.items():
        with pytest.raises(UserError, match=message):
            hook_widths([f"blocks.1.{part}"], found)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPTNeoXConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192),
         {"hook_resid_post": 2048, "attn.hook_z": 2048, "mlp.hook_post": 8192}),
        (SmolLM3Config(), {"hook_resid_mid": 2048, "attn.hook_z": 2048, "mlp.hook_post": 11008}),
        (LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672,
                     num_key_value_heads=8, head_dim=256), {"hook_mlp_out": 8192, "attn.hook_z": 16384}),
        (MixtralConfig(), {"hook_mlp_out": 4096, "hook_resid_mid": 4096}),
    ],
)  # fmt: skip
def test_widths_of_large_models_cost_little(config: Any, expected: dict[str, int]) -> None:
    """Models of up to 300 GB: no weight is made, and one layer is run."""
    layer = config.num_hidden_layers - 1
    small = GPTNeoXConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    outline(small, "sdpa", "warm", [0])  # what is imported, and compiled, once
    before, run = memory_peak(), []
    watched = register_module_forward_hook(lambda module, _inputs, _outputs: run.append(type(module).__name__))
    try:
        found = outline(config, "sdpa", "large", [layer])
    finally:
        watched.remove()
    assert run.count("AttentionBridge") == 1
    assert memory_peak() - before < 100 << 20
    assert hook_widths([f"blocks.{layer}.{part}" for part in expected], found) == {
        f"blocks.{layer}.{part}": width for part, width in expected.items()
    }


def memory_peak() -> int:
    """Bytes that this process has had in memory at once."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_table_of_hookpoints(model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(model_folder / "config.json", tmp_path)  # no weights: none are read
    table = {hook.name: hook for hook in hook_table(str(tmp_path), None, ("mid", 2), "sdpa")}
    shorts = {(hook.layer, hook.short) for hook in table.values() if hook.short}
    assert shorts == {
        (layer, short) for layer in (1, 2) for short in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    }
    assert table["blocks.2.mlp.hook_post"].width == 64
    assert "blocks.2.attn.hook_q" not in table
    assert "blocks.1.hook_in" not in table, "one name a hookpoint"
    eager = {hook.name for hook in hook_table(str(tmp_path), None, (0,), "eager")}
    assert {"blocks.0.attn.hook_q", "blocks.0.attn.hook_k", "blocks.0.attn.hook_v"} <= eager
    assert "blocks.0.attn.hook_pattern" not in eager


def test_attention_is_part_of_what_a_store_is(model_folder: Path, tmp_path: Path) -> None:
    hooks = ("blocks.1.attn.hook_q", "mlp_out")
    config = HarvestConfig(
        model=str(model_folder), attention="eager", hooks=hooks, tokens=256, context=16, device="cpu", out=str(tmp_path)
    )
    done = harvest(config)
    assert {path: about["d_in"] for path, about in done.hookpoints.items()} == {
        "layer_01/attn.hook_q": 32,
        "layer_01/mlp_out": 32,
    }
    assert Store.open(done.store).spec.model["attention"] == "eager"
    with pytest.raises(UserError, match=r"model: the store has .*eager.*this asks for .*sdpa"):
        harvest(config.model_copy(update={"attention": "sdpa", "hooks": ("mlp_out",)}))


def test_commands(sagsae: Sagsae) -> None:
    done = sagsae("models", "--json")
    table = {entry["alias"]: entry for entry in json.loads(done.stdout)}
    assert table["tiny"] == {"alias": "tiny", "model": "shipped", "layers": 4, "width": 256}
    assert table["pythia-1b"] == {"alias": "pythia-1b", "model": "EleutherAI/pythia-1b", "layers": None, "width": None}
    done = sagsae("hooks", "--model", "tiny", "--layer", "3", "--json")
    assert {"name": "blocks.3.hook_mlp_out", "short": "mlp_out", "layer": 3, "width": 256} in json.loads(done.stdout)
    done = sagsae("hooks", "--model", "tiny", "--attention", "flash")
    assert (done.returncode, done.stderr) == (2, "error: --attention: must be sdpa or eager (got 'flash')\n")
