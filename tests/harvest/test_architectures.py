"""Every kind of decoder: with --attention sdpa equal to Hugging Face bit for bit, or refused in words."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import save_decoder
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.errors import UserError
from shared.model.bridge import Attention, build_bridge
from shared.model.hooks import SHORT_HOOKS, hook_widths, row_width
from shared.model.language_model import LanguageModel, load_weights
from shared.model.outline import outline
from shared.model.source import model_info, read_config, resolve_model

IDS = torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(0))
VOCABULARY: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
PLAIN: dict[str, Any] = {
    **VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
OLD: dict[str, Any] = {
    **VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
}  # fmt: skip
OPT: dict[str, Any] = {
    **VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **PLAIN, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
FALCON = {key: PLAIN[key] for key in PLAIN if key not in ("intermediate_size", "max_position_embeddings")}

EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-NeoX": ("GPTNeoX", PLAIN),
    "GPT-NeoX, sequential": ("GPTNeoX", {**PLAIN, "use_parallel_residual": False}),
    "GPT-2": ("GPT2", OLD),
    "GPT-J": ("GPTJ", {**OLD, "rotary_dim": 4}),
    "GPT-BigCode": ("GPTBigCode", OLD),
    "CodeGen": ("CodeGen", {**OLD, "rotary_dim": 4}),
    "OPT": ("OPT", OPT),
    "OPT, post-norm": ("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "Falcon": ("Falcon", FALCON),
    "Falcon, new": ("Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "Falcon, alibi": ("Falcon", {**FALCON, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}),
    "Llama": ("Llama", WIDE_HEADS),
    "Llama 4": ("Llama4Text", {**GROUPED, "head_dim": 8, **EXPERTS, "intermediate_size_mlp": 64}),
    "SmolLM3": ("SmolLM3", GROUPED),
    "Mistral": ("Mistral", WIDE_HEADS),
    "Ministral 3": ("Ministral3", WIDE_HEADS),
    "Mixtral": ("Mixtral", {**WIDE_HEADS, **EXPERTS}),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen2-MoE": ("Qwen2Moe", {**GROUPED, **SHARED_EXPERT}),
    "Qwen3": ("Qwen3", WIDE_HEADS),
    "Qwen3-MoE": ("Qwen3Moe", {**WIDE_HEADS, **EXPERTS}),
    "Qwen3-Next": (
        "Qwen3Next",
        {**WIDE_HEADS, **SHARED_EXPERT, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "Gemma": ("Gemma", WIDE_HEADS),
    "Gemma 3": ("Gemma3Text", WIDE_HEADS),
    "Phi": ("Phi", GROUPED),
    "Phi-3": ("Phi3", GROUPED),
    "OLMo": ("Olmo", GROUPED),
    "OLMo 2": ("Olmo2", GROUPED),
    "OLMo 3": ("Olmo3", GROUPED),
    "OLMoE": ("Olmoe", {**GROUPED, **EXPERTS}),
    "FlexOlmo": ("FlexOlmo", {**GROUPED, **EXPERTS}),
    "StableLM": ("StableLm", GROUPED),
    "StableLM, parallel": ("StableLm", {**GROUPED, "use_parallel_residual": True}),
    "StarCoder 2": ("Starcoder2", GROUPED),
    "Cohere": ("Cohere", GROUPED),
    "Cohere 2": ("Cohere2", GROUPED),
    "Granite": ("Granite", {**GROUPED, "residual_multiplier": 0.5}),
    "Granite-MoE": ("GraniteMoe", {**GROUPED, **EXPERTS, "residual_multiplier": 0.5}),
    "GLM": ("Glm", {**GROUPED, "head_dim": 8}),
    "GLM-4": ("Glm4", {**GROUPED, "head_dim": 8}),
    "GLM-4-MoE": (
        "Glm4Moe",
        {**GROUPED, "head_dim": 8, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1},
    ),
    "DeepSeek V2": ("DeepseekV2", {**LATENT, "topk_method": "greedy"}),
    "DeepSeek V3": ("DeepseekV3", LATENT),
    "Ernie 4.5": ("Ernie4_5", {**GROUPED, "head_dim": 8}),
    "EXAONE 4": ("Exaone4", GROUPED),
    "Seed-OSS": ("SeedOss", WIDE_HEADS),
    "Nemotron": ("Nemotron", GROUPED),
    "Apertus": ("Apertus", GROUPED),
    "Arcee": ("Arcee", GROUPED),
    "HunYuan": ("HunYuanDenseV1", WIDE_HEADS),
    "BitNet": ("BitNet", GROUPED),
    "NanoChat": ("NanoChat", GROUPED),
    "LFM2": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
    "RecurrentGemma": ("RecurrentGemma", {**WIDE_HEADS, "lru_width": 32, "attention_window_size": 16}),
}  # fmt: skip

EAGER_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 2": ("Gemma2", WIDE_HEADS),
    "VaultGemma": ("VaultGemma", WIDE_HEADS),
    "gpt-oss": ("GptOss", {**WIDE_HEADS, **EXPERTS}),
    "BLOOM": ("Bloom", {**VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 2, "initializer_range": 0.2}),
    "MPT": ("Mpt", {"vocab_size": 300, "d_model": 32, "n_heads": 2, "n_layers": 3, "max_seq_len": 64,
                    "initializer_range": 0.2}),
    "GPT-Neo": ("GPTNeo", {**VOCABULARY, "hidden_size": 32, "num_layers": 4, "num_heads": 2, "intermediate_size": 64,
                           "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64,
                           "initializer_range": 0.2}),
    "XGLM": ("XGLM", {**VOCABULARY, "d_model": 32, "num_layers": 3, "attention_heads": 2, "ffn_dim": 64,
                      "max_position_embeddings": 64, "init_std": 0.2}),
    "Mamba": ("Mamba", {**VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}),
}  # fmt: skip

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Helium": ("Helium", WIDE_HEADS, "TransformerLens cannot wrap HeliumForCausalLM"),
    "Persimmon": ("Persimmon", PLAIN, "TransformerLens cannot wrap PersimmonForCausalLM"),
    "Phi-MoE": ("Phimoe", {**GROUPED, **EXPERTS}, "TransformerLens cannot wrap PhimoeForCausalLM"),
    "JetMoE": (
        "JetMoe",
        {**VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 2, "kv_channels": 8,
         "intermediate_size": 64, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        "JetMoeForCausalLM cannot be run with --attention sdpa to find the shapes at its hookpoints",
    ),
}  # fmt: skip


def save(kind: str, settings: dict[str, Any], folder: Path) -> Path:
    return save_decoder(folder, getattr(transformers, f"{kind}Config")(**settings))


def module_of(model: LanguageModel, hook: str) -> tuple[str, bool]:
    """The Hugging Face module that a hookpoint belongs to, and whether it is its input."""
    _, number, *path, end = model.bridge.hook_dict[hook].name.split(".")
    if not path and end in ("hook_attn_out", "hook_mlp_out"):  # Granite's block scales what these modules give
        path, end = [end.removeprefix("hook_").removesuffix("_out")], "hook_out"
    part = model.bridge.blocks[int(number)]
    names = [model.bridge.adapter.component_mapping["blocks"].name, number]
    for key in path:
        part = part._modules[key]
        names += [part.name] if part.name else []  # OPT's MLP is no module of its own
    return ".".join(names), end == "hook_in"


def reference(folder: Path, points: dict[str, tuple[str, bool]], attention: Attention) -> dict[str, Tensor]:
    """What Hugging Face's own modules take or give: hook name -> [n * context, d]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    scale = getattr(model.config, "residual_multiplier", 1.0)
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}

    def keep(name: str, takes: bool) -> Any:
        def hook(_module: Any, args: Any, options: Any, output: Any) -> None:
            given = output[0] if isinstance(output, tuple | list) else output
            rows = (args[0] if args else options["hidden_states"]) if takes else given
            rows = rows * scale if name.endswith("_out") and scale != 1 else rows  # what is added to the stream
            found[name] = rows.reshape(-1, rows.shape[-1]).clone()

        return hook

    for name, (module, takes) in points.items():
        modules[module].register_forward_hook(keep(name, takes), with_kwargs=True)
    with torch.inference_mode():
        model(IDS, use_cache=False)
    return found


def harvested(model: LanguageModel, widths: dict[str, int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    sinks = {name: lambda x, name=name: found.__setitem__(name, x.clone()) for name in widths}
    with model.capturing(sinks, widths) as run:
        run(IDS)
    return found


def known(folder: Path, attention: Attention, layers: list[int]) -> dict[str, int]:
    """Every hookpoint that can be harvested, with the width that its configuration gives it."""
    found = outline(read_config(resolve_model(str(folder))), attention, "it", layers)
    return hook_widths([name for name, shapes in found.items() if row_width(shapes)], found)


def check(folder: Path, attention: Attention, tolerance: float) -> None:
    last = model_info(read_config(resolve_model(str(folder)))).n_layers - 1
    model = LanguageModel(resolve_model(str(folder)), "cpu", "float32", attention)
    for layers in ([0, last], [1]):
        widths = known(folder, attention, layers)
        found = harvested(model, widths)  # raises where a width was wrong, or a hook did not fire
        short = [f"blocks.{layer}.hook_{short}" for layer in layers for short in SHORT_HOOKS]
        short = [name for name in short if name in model.bridge.hook_dict]
        assert {f"blocks.{layer}.hook_resid_{end}" for layer in layers for end in ("pre", "post")} <= set(short)
        expected = reference(folder, {name: module_of(model, name) for name in short}, attention)
        for name in short:
            difference = (found[name] - expected[name]).abs().max()
            assert difference <= tolerance * expected[name].abs().max(), f"{name}: {difference}"


def calls(model: Any) -> list[str]:
    """Every call of a module, by name, in the order in which they end; filled while the model runs."""
    made: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_args, name=name: made.append(name))
    return made


@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_hugging_face_bit_for_bit(name: str, tmp_path: Path) -> None:
    check(save(*EQUAL[name], tmp_path), "sdpa", 0.0)


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_without_sdpa_in_hugging_face(name: str, tmp_path: Path) -> None:
    folder = save(*EAGER_ONLY[name], tmp_path)
    message = "Hugging Face has no SDPA attention for .*Use --attention eager"
    with pytest.raises(UserError, match=message):
        known(folder, "sdpa", [1])
    with pytest.raises(UserError, match=message):
        LanguageModel(resolve_model(str(folder)), "cpu", "float32")
    check(folder, "eager", 1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_harvested_is_refused(name: str, tmp_path: Path) -> None:
    kind, settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        known(save(kind, settings, tmp_path), "sdpa", [1])


@pytest.mark.parametrize("name", EQUAL)
def test_every_module_computes_for_itself(name: str, tmp_path: Path) -> None:
    """The bridge leaves none of Hugging Face's modules out, calls none twice, and replaces no forward."""
    source = resolve_model(str(save(*EQUAL[name], tmp_path)))
    alone, bridged = (load_weights(source, "cpu", "float32", "sdpa") for _ in range(2))
    modules = list(bridged.modules())
    expected, made = calls(alone), calls(bridged)
    build_bridge(bridged, "sdpa", "it")
    with torch.inference_mode():
        alone.base_model(IDS, use_cache=False)
        bridged.base_model(IDS, use_cache=False)
    assert made == expected
    assert not [module for module in modules if "forward" in vars(module)]


ADDS_UP = [name for name in EQUAL if name not in ("OPT, post-norm", "Qwen3-Next", "LFM2", "RecurrentGemma")]


@pytest.mark.parametrize("name", ADDS_UP)
def test_the_halves_of_a_block_add_up(name: str, tmp_path: Path) -> None:
    """What the names mean: attn_out and mlp_out are what a block adds to the stream."""
    folder = save(*EQUAL[name], tmp_path)
    model = LanguageModel(resolve_model(str(folder)), "cpu", "float32")
    found = harvested(model, known(folder, "sdpa", [1]))
    pre, post, attention, mlp = (
        found[f"blocks.1.hook_{short}"] for short in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    )
    torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-5, atol=1e-5)
    middle = found.get("blocks.1.hook_resid_mid")
    if middle is not None:
        torch.testing.assert_close(pre + attention, middle, rtol=1e-5, atol=1e-5)
