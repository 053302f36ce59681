"""A language model from which activations are read, and into which they are spliced.

Models run as Hugging Face ships them: no weight processing. shared/model/bridge.py adds the hooks. Heavy imports happen
inside the functions that need them.
"""

import copy
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from shared.device import sent, torch_dtype
from shared.errors import UserError
from shared.model.bridge import Attention, build_bridge, wants_sdpa
from shared.model.hooks import layer_of
from shared.model.loaded import check_loaded
from shared.model.source import ModelSource, explained_loading, read_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEVICE_MAP: Final[str | dict[str, str]] = "auto"
"""The device_map for `--device map`, which lets transformers spread a model."""


def load_weights(source: ModelSource, device: str, dtype: str, attention: Attention) -> Any:
    """Loads the model as Hugging Face makes it, every weight of it from the files. Raises UserError when weights cannot
    be loaded, are missing, have no place in the model, or do not fit into memory."""
    import torch
    from transformers import AutoModelForCausalLM

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # otherwise it asks a server to convert *.bin weights
    place = {"device_map": DEVICE_MAP} if device == "map" else {}
    with quiet_library(), explained_loading(source, "weights"), wants_sdpa(source.name, attention):
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.location,
                config=read_config(source),
                dtype=torch_dtype(dtype),
                attn_implementation=attention,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # check_loaded refuses the listed ones
                output_loading_info=True,
                **place,
                **source.arguments,
            )
            check_loaded(model, info, source.name)
            model.eval().requires_grad_(False)
            return model if place else model.to(device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise UserError(
                f"--model {source.name}: does not fit into the memory of {device}. Use --dtype bfloat16, or "
                "--device map to spread it over several GPUs"
            ) from error


@contextmanager
def quiet_library() -> Iterator[None]:
    """Silences what transformers would print beside our one message. A GGUF file shows its bar on a terminal only."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), gguf.tqdm
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    gguf.tqdm = partial(bar, disable=None)
    try:
        yield
    finally:
        gguf.tqdm = bar
        logging.set_verbosity(level)


def first_device(model: Any) -> "torch.device":
    """The device that takes the tokens of a spread model: the first one that computes. Weights on the host or on disk
    are brought there block by block."""
    import torch

    parts = getattr(model, "hf_device_map", {"": model.device}).values()
    return torch.device(next((part for part in parts if part not in ("cpu", "disk")), "cpu"))


def side_by_side(
    source: ModelSource, device: str, dtype: str, attention: Attention, count: int, loaded: Any = None
) -> list["LanguageModel"]:
    """One model for each of `count` threads, all over the same weights in memory. `loaded`: see LanguageModel."""
    model = load_weights(source, device, dtype, attention) if loaded is None else loaded
    weights = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    copies = [copy.deepcopy(model, dict(weights)) for _ in range(count - 1)]  # before hooks change the first in place
    return [LanguageModel(source, device, dtype, attention, each) for each in (model, *copies)]


class LanguageModel:
    """A causal language model with hooks. One thread at a time."""

    def __init__(
        self, source: ModelSource, device: str, dtype: str, attention: Attention = "sdpa", loaded: Any = None
    ) -> None:
        """`loaded` is what `load_weights` returned, if the weights are in memory already; it is changed in place."""
        import torch

        model = load_weights(source, device, dtype, attention) if loaded is None else loaded
        self.device = first_device(model) if device == "map" else torch.device(device)
        self.d_model = model.config.get_text_config().hidden_size
        self.vocab_size = model.config.get_text_config().vocab_size
        self.bridge = build_bridge(model, attention, source.name)
        self.n_layers = len(self.bridge.blocks)

    def check_hooks(self, names: list[str]) -> None:
        """Raises UserError for a hookpoint that this model does not have."""
        for name in names:
            if name not in self.bridge.hook_dict:
                near = difflib.get_close_matches(name, self.bridge.hook_dict, n=3)
                raise UserError(f"--hook {name}: this model has no such hookpoint. Near: {', '.join(near)}")

    @contextmanager
    def capturing(
        self, sinks: Mapping[str, Callable[["Tensor"], None]], widths: Mapping[str, int] | None = None
    ) -> Iterator[Callable[["Tensor"], None]]:
        """Yields a function tokens [n, context] -> None. It runs the model as far as the last hook and calls every sink
        once with its activations [n * context, d_in]. The sinks must not change them. Raises UserError in any call
        where a hook does not fire once with n * context rows, of the width in `widths`."""
        import torch

        self.check_hooks(list(sinks))
        last = max(map(layer_of, sinks))
        shape: list[int] = []
        fired: set[str] = set()

        def run(tokens: "Tensor") -> None:
            shape[:] = tokens.shape
            fired.clear()
            with torch.inference_mode():
                self.run_to(sent(tokens, self.device), last)
            for name in sinks.keys() - fired:
                raise UserError(f"--hook {name}: did not fire in this step; it has no row for every token")

        def reader(name: str, sink: Callable[["Tensor"], None]) -> Callable[["Tensor", Any], None]:
            def read(activations: "Tensor", hook: Any) -> None:  # noqa: ARG001 (TransformerLens passes it by name)
                rows = activations.flatten(2) if activations.dim() > 2 else activations
                expected = [*shape, (widths or {}).get(name, rows.shape[-1])]
                if name in fired or list(rows.shape) != expected:
                    what = "fired more than once in a step" if name in fired else f"gave {list(rows.shape)}"
                    raise UserError(f"--hook {name}: {what}; expected {expected}: a row for every token, once")
                fired.add(name)
                sink(rows.flatten(0, 1).to(self.device))

            return read

        try:
            for name, sink in sinks.items():
                self.bridge.add_hook(name, reader(name, sink))
            yield run
        finally:
            self.bridge.reset_hooks()

    def run_to(self, tokens: "Tensor", last: int) -> None:
        """Runs tokens [n, context] through the blocks up to `last` and nothing beyond."""
        if last + 1 == self.n_layers:  # the bridge would run the unembedding as well
            self.bridge.original_model.base_model(tokens, use_cache=False)
        else:
            self.bridge(tokens, stop_at_layer=last + 1, return_type=None, use_cache=False)

    def logits(self, tokens: "Tensor", splice: tuple[str, Callable[["Tensor"], "Tensor"]] | None = None) -> "Tensor":
        """Logits [n, context, vocab_size], float32. `splice` = (hook name, function): the function receives the
        activations [n, context, ...] at that hook, and the model continues with its result."""
        import torch

        hooks = []
        if splice is not None:
            name, replace = splice
            hooks = [(name, lambda activations, hook: replace(activations))]  # noqa: ARG005
        with torch.inference_mode():
            found: Tensor = self.bridge.run_with_hooks(
                tokens.to(self.device), fwd_hooks=hooks, return_type="logits", use_cache=False
            )
            return found.float()

    def losses(self, tokens: "Tensor", splice: tuple[str, Callable[["Tensor"], "Tensor"]] | None = None) -> "Tensor":
        """Next-token losses in nats [n, context - 1], float32. `splice`: as in `logits`."""
        import torch

        tokens = tokens.to(self.device)
        with torch.inference_mode():
            flat = self.logits(tokens, splice)[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none")
        return loss.view(len(tokens), -1)
