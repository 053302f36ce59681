"""The shapes at a model's hookpoints, derived from its configuration alone.

The model is built and run with torch's fake tensors, which have a shape and no memory. A model of any size thus passes
through the same bridge as the real one in a fraction of a second. Only the requested layers are kept.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from shared.errors import UserError
from shared.model.bridge import Attention, build_bridge, wants_sdpa
from shared.model.source import cause

if TYPE_CHECKING:
    from torch import Tensor

Shapes = list[tuple[int, ...]]
"""One shape for each time that a hookpoint fired in one forward pass."""

N: Final = 3
CONTEXT: Final = 61
"""Tokens per row of the batch: no model has this number of heads, so [n, context, ...] can be recognised."""


def outline(config: Any, attention: Attention, name: str, layers: Sequence[int]) -> dict[str, Shapes]:
    """Maps every name of every hookpoint of these layers to its shapes for N rows of CONTEXT tokens. Raises UserError
    where TransformerLens cannot wrap or run the model with this attention, naming the other kind where that works."""
    try:
        return trace_shapes(config, attention, name, layers)
    except CannotRun as error:
        other: Attention = "eager" if attention == "sdpa" else "sdpa"
        try:
            trace_shapes(config, other, name, layers)
            hint = f"Use --attention {other}, which works"
        except (CannotRun, UserError):
            hint = "The other kind of attention fails too: this model cannot be harvested"
        raise UserError(f"--model {name}: {error}. {hint}") from error.__cause__


class CannotRun(Exception):
    """A model cannot be run with fake tensors; the message says why."""


def trace_shapes(config: Any, attention: Attention, name: str, layers: Sequence[int]) -> dict[str, Shapes]:
    """Like `outline`, but raises CannotRun where the model cannot be built or run."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = [[0] * CONTEXT] * N
    shapes: dict[int, Shapes] = {}
    what = f"the model that its config.json describes cannot be made with --attention {attention}"
    try:
        with fake_tensors(), wants_sdpa(name, attention):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=attention, trust_remote_code=False
            )
            for module in model.eval().modules():
                if hasattr(module, "config"):
                    module.config._experts_implementation = "batched_mm"  # the only one that runs with fake tensors
            bridge = build_bridge(model, attention, name, layers)
            points = bridge.hook_dict
            for key, point in {id(point): point for point in points.values()}.items():
                point.add_hook(shape_recorder(shapes.setdefault(key, [])))
            architecture = type(model).__name__
            what = f"{architecture} cannot be run with --attention {attention} to find the shapes at its hookpoints"
            with torch.inference_mode():
                bridge.original_model.base_model(torch.tensor(tokens), use_cache=False)
    except UserError:
        raise
    except Exception as error:  # other libraries can raise anything for an odd configuration
        raise CannotRun(f"{what} ({cause(error)})") from error
    found = {}
    for hook, point in points.items():
        if hook.startswith("blocks."):
            _, number, rest = hook.split(".", 2)
            found[f"blocks.{layers[int(number)]}.{rest}"] = shapes[id(point)]
    return found


def shape_recorder(shapes: Shapes) -> Any:
    def record(activations: "Tensor", hook: Any) -> None:  # noqa: ARG001 (TransformerLens passes it by name)
        shapes.append(tuple(getattr(activations, "shape", ())))

    return record


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Makes every tensor inside a fake one, with a shape and no memory. Code that asks for a number receives 1 or True:
    padding masks are full and compared tensors are equal."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    class OutlineAnswers(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (aten.equal.default, aten.is_nonzero.default):
                return True
            if function in (aten._local_scalar_dense.default, aten.item.default):
                dtype = args[0].dtype
                return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
            return function(*args, **(kwargs or {}))

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs a traceback of every raised error
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), OutlineAnswers():  # type: ignore[no-untyped-call]
            yield
    finally:
        log.setLevel(level)
