"""Wraps a Hugging Face model with TransformerLens hookpoints; the only module that imports TransformerLens.

With `sdpa` every module keeps Hugging Face's own computation and the bridge only adds hooks, so activations equal the
Hugging Face forward pass bit for bit. With `eager` it is TransformerLens' stock bridge, which computes attention again
in Python: slower (up to five times at long contexts), equal up to rounding, and with hookpoints inside attention.
Neither changes the weights. docs/reference/models.md lists the architectures that were tried.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from shared.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Attention = Literal["sdpa", "eager"]


def build_bridge(model: "nn.Module", attention: Attention, name: str, layers: Sequence[int] | None = None) -> Any:
    """Wraps a model that was loaded with this attention; the model is changed in place. With `layers` only these are
    kept, numbered from 0. Raises UserError where TransformerLens does not know the architecture."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    config: Any = model.config
    architecture = type(model).__name__
    forwards = {module: vars(module).get("forward") for module in model.modules()}

    def prepare(adapter: Any) -> None:
        if "blocks" not in adapter.component_mapping:
            raise NotImplementedError("it has no list of blocks")
        if layers is not None:
            keep_layers(model, adapter.component_mapping["blocks"].name, layers)
        if attention == "sdpa":
            native_blocks(adapter)

    try:
        bridge = build_bridge_from_module(
            model, architecture, hf_config=config, model_name=name, post_adapter_hook=prepare
        )
    except Exception as error:  # adapters fail in many types
        raise UserError(
            f"--model {name}: TransformerLens cannot wrap {architecture} with --attention {attention}: "
            f"{str(error)[:300]}"
        ) from error
    if attention == "sdpa":
        restore_forwards(forwards)
    return bridge


@contextmanager
def wants_sdpa(name: str, attention: Attention) -> Iterator[None]:
    """Wraps the construction of a model: raises UserError where Hugging Face has no SDPA attention for it."""
    try:
        yield
    except ValueError as error:
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            architecture = str(error).split()[0]
            raise UserError(
                f"--model {name}: Hugging Face has no SDPA attention for {architecture}, so its own modules cannot be "
                "harvested as they are. Use --attention eager"
            ) from error
        raise


def native_blocks(adapter: Any) -> None:
    """Replaces the adapter's own attention, norms and fused projections by plain wrappers. Hooks fire on inputs and
    outputs, and on the input of attention's output projection (`attn.hook_z`)."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge, LinearBridge, MLPBridge
    from transformer_lens.model_bridge.generalized_components.gated_delta_net import GatedDeltaNetBridge
    from transformer_lens.model_bridge.generalized_components.joint_gate_up_mlp import JointGateUpMLPBridge
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    adapter.cfg.attn_implementation = "sdpa"  # an adapter set to eager would switch the model
    parts = adapter.component_mapping["blocks"].submodules
    for key, part in parts.items():
        if isinstance(part, AttentionBridge):
            output = part.submodules.get("o")
            parts[key] = AttentionBridge(
                name=part.name,
                config=adapter.cfg,
                fused_qkv=True,
                maintain_native_attention=True,
                optional=part.optional,
                submodules={} if output is None else {"o": LinearBridge(name=output.name)},
            )
            if output is None:
                parts[key].hook_aliases = {}
        elif isinstance(part, JointGateUpMLPBridge):
            out = LinearBridge(name=part.submodules["out"].name)
            parts[key] = MLPBridge(name=part.name, config=adapter.cfg, submodules={"out": out}, optional=part.optional)
            parts[key].hook_aliases = {"hook_post": "out.hook_in"}  # gate and up are one projection: no hook_pre
        elif isinstance(part, NormalizationBridge | GatedDeltaNetBridge):
            parts[key] = plain(part, adapter.cfg)
    final = adapter.component_mapping.get("ln_final")
    if final is not None:
        adapter.component_mapping["ln_final"] = plain(final, adapter.cfg)


def plain(part: Any, config: Any) -> Any:
    """A wrapper that only fires hooks, with the shapes that the part's hooks receive (OPT's MLP sees flat rows)."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    wrapper = GeneralizedComponent(name=part.name, config=config, optional=part.optional)
    wrapper.hook_in.hook_conversion = part.hook_in.hook_conversion
    wrapper.hook_out.hook_conversion = part.hook_out.hook_conversion
    return wrapper


def restore_forwards(forwards: "dict[nn.Module, Any]") -> None:
    """Undoes an adapter's changes to forwards of Hugging Face's modules (Falcon's): we promise the original ones."""
    for module, forward in forwards.items():
        if vars(module).get("forward") is not forward:
            del module.forward
            if forward is not None:
                module.forward = forward


def keep_layers(model: "nn.Module", path: str, layers: Sequence[int]) -> None:
    """Removes all other blocks, and their entries where the configuration lists one per layer."""
    from torch import nn

    parent, _, name = path.rpartition(".")
    blocks: Any = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, nn.ModuleList([blocks[layer] for layer in layers]))
    config: Any = model.config
    text = config.get_text_config()
    if vars(text).get("layer_types"):
        text.layer_types = [text.layer_types[layer] for layer in layers]
