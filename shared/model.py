"""The one door to TransformerLens: which model a name means, its hookpoints, capture, and splicing.

Models run as Hugging Face ships them: no weight processing, native (SDPA) attention, so that activations equal the
Hugging Face forward bit for bit. TransformerLens contributes the hooks and their names. Its stock bridge
re-implements attention eagerly, which costs up to five times the forward at long contexts; `native_blocks` swaps that
part for the model's own modules. Heavy imports happen inside the functions that need them.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHIPPED: Final = Path(__file__).parent / "tiny"

ALIASES: Final = {
    "tiny": str(SHIPPED),
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in
       ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")},
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "smollm3-3b-base": "HuggingFaceTB/SmolLM3-3B-Base",
    "gpt2": "openai-community/gpt2",
}  # fmt: skip

SHORT_HOOKS: Final = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `location` is a folder or a hub id, `commit` pins the weights."""

    name: str
    location: str
    local: bool
    commit: str
    """The hub's commit, or for a folder a digest of its configuration and weights."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that make transformers load exactly this, without the network when it is local."""
        return {"local_files_only": True} if self.local else {"revision": self.commit}


@dataclass(frozen=True)
class ModelInfo:
    """What can be known from the configuration, before any weights are loaded."""

    n_layers: int
    d_model: int
    vocab_size: int
    max_context: int
    parallel_residual: bool


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """The model an alias, a folder or a hub id means. Raises UserError when there is none."""
    folder = local_folder(name)
    if folder is not None:
        if revision is not None:
            raise UserError(f"--revision {revision}: {name} is a folder; revisions belong to Hugging Face models")
        if not (folder / "config.json").is_file():
            raise UserError(f"--model {name}: the folder holds no config.json, so it is not a Hugging Face model")
        return ModelSource(name, str(folder), True, folder_digest(folder))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such folder")
    location = ALIASES.get(name, name)
    if "/" not in location:
        near = difflib.get_close_matches(name, ALIASES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Aliases: {', '.join(ALIASES)}."
        raise UserError(f"--model {name}: is not an alias, a folder, or a Hugging Face id (owner/name). {hint}")
    return ModelSource(name, location, False, hub_commit(location, revision))


def local_folder(name: str) -> Path | None:
    """The folder that a name means, itself or as an alias; None for the name of a hub model."""
    folders = (Path(name).expanduser(), Path(ALIASES.get(name, "")))
    return next((folder for folder in folders if str(folder) != "." and folder.is_dir()), None)


def folder_digest(folder: Path) -> str:
    """Names the model in a folder by its configuration and by the size, first and last MiB of every weights file."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    if not weights:
        raise UserError(f"--model {folder}: the folder holds no weights (*.safetensors)")
    for path in weights:
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def hub_commit(repo: str, revision: str | None) -> str:
    """The commit that a revision of a hub model means now, or the one in the local cache when it is out of reach."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return str(HfApi().model_info(repo, revision=revision, timeout=5).sha)
    except GatedRepoError as error:
        raise UserError(
            f"--model {repo}: needs permission; accept its terms and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"--revision {revision}: {repo} has no such branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"--model {repo}: Hugging Face has no model of that name") from error
    except Exception as unreachable:  # offline mode, DNS, proxies and time-outs arrive as many types
        try:
            return Path(snapshot_download(repo, revision=revision, local_files_only=True)).name
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise UserError(
                f"--model {repo}: Hugging Face cannot be reached ({type(unreachable).__name__}) and it is not in "
                "the local cache. Check the network, or give a folder that holds the model"
            ) from error


def read_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {source.name}: its configuration cannot be loaded: {first_line(error)}") from error


def model_info(config: Any) -> ModelInfo:
    text = config.get_text_config()
    return ModelInfo(
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        vocab_size=text.vocab_size,
        max_context=getattr(text, "max_position_embeddings", 1 << 20),
        parallel_residual=bool(getattr(text, "use_parallel_residual", text.model_type in ("gptj", "phi", "cohere"))),
    )


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer, which must name an end-of-text token. Raises UserError otherwise."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {source.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {source.name}: its tokenizer names no end-of-text token to join documents with")
    return tokenizer


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def resolve_layers(layers: tuple[int | str, ...], info: ModelInfo) -> list[int]:
    """Layer numbers; `mid` is n_layers // 2. Raises UserError for a layer the model does not have."""
    numbers = [info.n_layers // 2 if layer == "mid" else int(layer) for layer in layers]
    for number in numbers:
        if not 0 <= number < info.n_layers:
            raise UserError(f"--layer {number}: the model has {info.n_layers} layers, 0 to {info.n_layers - 1}")
    return sorted(set(numbers))


def resolve_hooks(hooks: tuple[str, ...], layers: list[int], info: ModelInfo) -> dict[str, str]:
    """Path in the store -> TransformerLens name, in order. A short name means that hook at every layer asked for."""
    found: dict[str, str] = {}
    for hook in hooks:
        full = re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?([\w.]+)", hook)
        if full:
            number, rest = int(full[1]), full[2].removeprefix("hook_")
            resolve_layers((number,), info)
            found[f"layer_{number:02d}/{rest}"] = hook
        elif hook in SHORT_HOOKS:
            found.update({f"layer_{layer:02d}/{hook}": f"blocks.{layer}.hook_{hook}" for layer in layers})
        else:
            raise UserError(
                f"--hook {hook}: is not a hookpoint. Short names: {', '.join(SHORT_HOOKS)}; "
                "or a TransformerLens name such as blocks.3.attn.hook_z"
            )
    if info.parallel_residual and any(name.endswith("hook_resid_mid") for name in found.values()):
        raise UserError(
            "--hook resid_mid: does not exist in this model, whose attention and MLP both read the block's input "
            "(parallel residual). Use resid_pre, resid_post, attn_out or mlp_out"
        )
    return found


def layer_of(hook_name: str) -> int:
    return int(hook_name.split(".")[1])


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def pick_device(name: str) -> str:
    """`auto` is CUDA when there is one. Raises UserError for a device this machine does not have."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps", "xpu")
    except RuntimeError:
        known = False
    if not known:
        raise UserError(f"--device {name}: is not a device. Use auto, cpu, cuda, cuda:1, … mps or xpu")
    count = torch.cuda.device_count() if device.type == "cuda" else torch.get_device_module(device).device_count()
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} {device.type} devices. Use --device cpu, or auto")
    return name


def native_dtype(device: "torch.device") -> str:
    """bfloat16 where the hardware multiplies it natively (recent GPUs; CPUs with AVX512-BF16 or AMX), else float32.
    torch keeps the question about CPUs private; where it cannot be asked, the answer is float32."""
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    native = device.type == "cpu" and any(question is not None and question() for question in asked)
    return "bfloat16" if native else "float32"


def native_blocks(adapter: Any) -> None:
    """Keeps the model's own attention and norms inside the bridge; hooks fire on their inputs and outputs."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge, LinearBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    adapter.cfg.attn_implementation = "sdpa"
    blocks = adapter.component_mapping["blocks"].submodules
    attention = blocks["attn"]
    blocks["attn"] = AttentionBridge(
        name=attention.name,
        config=adapter.cfg,
        fused_qkv=True,
        maintain_native_attention=True,
        submodules={"o": LinearBridge(name=attention.submodules["o"].name)},
    )
    for norm in ("ln1", "ln2"):
        blocks[norm] = GeneralizedComponent(name=blocks[norm].name, config=adapter.cfg)
    final = adapter.component_mapping["ln_final"]
    adapter.component_mapping["ln_final"] = GeneralizedComponent(name=final.name, config=adapter.cfg)


class LanguageModel:
    """A causal language model that activations are read from and spliced into. One thread at a time."""

    def __init__(self, source: ModelSource, device: str, dtype: str) -> None:
        import torch
        from safetensors import SafetensorError
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.location,
                dtype=torch_dtype(dtype),
                attn_implementation="sdpa",
                trust_remote_code=False,
                **source.arguments,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--model {source.name}: its weights cannot be loaded: {first_line(error)}") from error
        model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.n_layers = model.config.get_text_config().num_hidden_layers
        self.d_model = model.config.get_text_config().hidden_size
        self.vocab_size = model.config.get_text_config().vocab_size
        self.bridge = build_bridge_from_module(
            model,
            type(model).__name__,
            hf_config=model.config,
            model_name=source.location,
            post_adapter_hook=native_blocks,
        )

    def check_hooks(self, names: list[str]) -> None:
        """Raises UserError for a hookpoint that this model does not have."""
        for name in names:
            if name not in self.bridge.hook_dict:
                near = difflib.get_close_matches(name, self.bridge.hook_dict, n=3)
                raise UserError(f"--hook {name}: this model has no such hookpoint. Near: {', '.join(near)}")

    @contextmanager
    def capturing(self, sinks: Mapping[str, Callable[["Tensor"], None]]) -> Iterator[Callable[["Tensor"], None]]:
        """Gives a function tokens [n, context] -> None that runs the model as far as the last hook and calls every
        sink with its activations [n * context, d_in], once a call. The sinks must not change what they get."""
        import torch

        self.check_hooks(list(sinks))
        last = max(map(layer_of, sinks))

        def run(tokens: "Tensor") -> None:
            tokens = tokens.to(self.device)
            with torch.inference_mode():
                if last + 1 == self.n_layers:  # the bridge would run the unembedding as well
                    self.bridge.original_model.base_model(tokens, use_cache=False)
                else:
                    self.bridge(tokens, stop_at_layer=last + 1, return_type=None, use_cache=False)

        def reader(sink: Callable[["Tensor"], None]) -> Callable[["Tensor", Any], None]:
            def read(activations: "Tensor", hook: Any) -> None:  # noqa: ARG001 (TransformerLens passes it by name)
                sink(activations.flatten(0, 1).flatten(1))

            return read

        try:
            for name, sink in sinks.items():
                self.bridge.add_hook(name, reader(sink))
            yield run
        finally:
            self.bridge.reset_hooks()

    def losses(self, tokens: "Tensor", splice: tuple[str, Callable[["Tensor"], "Tensor"]] | None = None) -> "Tensor":
        """Next-token losses in nats [n, context - 1], float32. `splice` = (hook name, function of the activations
        [n, context, ...] at that hook that returns what the model goes on with)."""
        import torch

        tokens = tokens.to(self.device)
        hooks = []
        if splice is not None:
            name, replace = splice
            hooks = [(name, lambda activations, hook: replace(activations))]  # noqa: ARG005
        with torch.inference_mode():
            logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", use_cache=False)
            flat = logits[:, :-1].float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none")
        return loss.view(len(tokens), -1)
