"""Hookpoints: their names, their layers, and the width of a row at each.

A short name such as `mlp_out` means that hookpoint in every requested layer; any other is TransformerLens' own name. A
hookpoint can be harvested if it yields one row per token, once in a forward pass.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NoReturn

from shared.errors import UserError
from shared.model.bridge import Attention
from shared.model.configuration import ModelInfo
from shared.model.outline import CONTEXT, N, Shapes, outline
from shared.model.source import ModelSource, model_info, read_config, resolve_model

SHORT_HOOKS: Final = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Hook:
    """A hookpoint that can be harvested."""

    name: str
    short: str | None
    layer: int
    width: int


def resolve_layers(layers: tuple[int | str, ...], info: ModelInfo) -> list[int]:
    """Layer numbers; `mid` is n_layers // 2. Raises UserError for a layer the model does not have."""
    numbers = [info.n_layers // 2 if layer == "mid" else int(layer) for layer in layers]
    for number in numbers:
        check_layer(number, info, f"--layer {number}")
    return sorted(set(numbers))


def check_layer(number: int, info: ModelInfo, asked: str) -> None:
    """Raises UserError, which begins with what was `asked`, for a layer that the model does not have."""
    if not 0 <= number < info.n_layers:
        raise UserError(f"{asked}: the model has {info.n_layers} layers, 0 to {info.n_layers - 1}")


def resolve_hooks(hooks: tuple[str, ...], layers: list[int], info: ModelInfo) -> dict[str, str]:
    """Path in the store -> TransformerLens name, in order. A short name means that hook at every requested layer."""
    found: dict[str, str] = {}
    for hook in hooks:
        full = re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?([\w.]+)", hook)
        if full:
            number, rest = int(full[1]), full[2].removeprefix("hook_")
            check_layer(number, info, f"--hook {hook}")
            found[f"layer_{number:02d}/{rest}"] = hook
        elif hook in SHORT_HOOKS:
            found.update({f"layer_{layer:02d}/{hook}": f"blocks.{layer}.hook_{hook}" for layer in layers})
        else:
            raise UserError(
                f"--hook {hook}: is not a hookpoint. Short names: {', '.join(SHORT_HOOKS)}; "
                "or a TransformerLens name such as blocks.3.attn.hook_z"
            )
    return found


def layer_of(hook_name: str) -> int:
    return int(hook_name.split(".")[1])


def hook_widths(names: Iterable[str], outline: Mapping[str, Shapes]) -> dict[str, int]:
    """d_in of every named hookpoint: all numbers per token, heads side by side. Raises UserError for one that the model
    does not have or that has no row per token."""
    widths = {}
    for name in names:
        if name not in outline:
            refuse_absent(name, outline)
        width = row_width(outline[name])
        if width is None:
            refuse_shape(name, outline[name])
        widths[name] = width
    return widths


def row_width(shapes: Shapes) -> int | None:
    """Width of a row where a hookpoint fires once with [n, context, ...]; None where it cannot be harvested."""
    if len(shapes) != 1 or len(shapes[0]) < 3 or shapes[0][:2] != (N, CONTEXT):
        return None
    return prod(shapes[0][2:])


def refuse_absent(name: str, outline: Mapping[str, Shapes]) -> NoReturn:
    block, _, part = name.rpartition(".hook_")
    if part == "resid_mid" and {f"{block}.hook_attn_out", f"{block}.hook_mlp_out"} <= set(outline):
        raise UserError(
            "--hook resid_mid: does not exist in this model, whose attention and MLP both read the block's input "
            "(parallel residual). Use resid_pre, resid_post, attn_out or mlp_out"
        )
    near = difflib.get_close_matches(name, [hook for hook, shapes in outline.items() if row_width(shapes)], n=3)
    raise UserError(
        f"--hook {name}: this model has no such hookpoint. Near: {', '.join(near) or 'none'}. "
        "`sagsae hooks --model …` lists all; with --attention eager there are more"
    )


def refuse_shape(name: str, shapes: Shapes) -> NoReturn:
    names = {N: "batch", CONTEXT: "context"}
    given = " and ".join(f"[{', '.join(str(names.get(size, size)) for size in shape)}]" for shape in shapes)
    reason = f"returns {given} in a forward pass" if shapes else "never fires in a forward pass"
    raise UserError(
        f"--hook {name}: {reason}; a hookpoint must return [batch, context, width] once. "
        "`sagsae hooks --model …` lists what can, --attention eager makes more fire"
    )


def hook_table(model: str, revision: str | None, layers: tuple[int | str, ...], attention: Attention) -> list[Hook]:
    """The hookpoints that can be harvested from these layers of a model, each under its short name or else its shortest
    one. Reads no weights."""
    source = resolve_model(model, revision, weights=False)
    return hooks_of(source, read_config(source), layers, attention)


def hooks_of(source: ModelSource, config: Any, layers: tuple[int | str, ...], attention: Attention) -> list[Hook]:
    """The table of `hook_table` for a model whose configuration was read."""
    found = outline(config, attention, source.name, resolve_layers(layers, model_info(config)))
    names: dict[int, list[str]] = {}
    for name, shapes in found.items():
        names.setdefault(id(shapes), []).append(name)  # names of one hookpoint share one list of shapes
    best = [min(same, key=lambda name: (short_name(name) is None, len(name), name)) for same in names.values()]
    table = [(name, row_width(found[name])) for name in best]
    return [Hook(name, short_name(name), layer_of(name), width) for name, width in table if width is not None]


def short_name(hook_name: str) -> str | None:
    """`mlp_out` for `blocks.3.hook_mlp_out`; None for a hookpoint that has no short name."""
    part = re.sub(r"^blocks\.\d+\.hook_", "", hook_name)
    return part if part in SHORT_HOOKS else None
