"""The logit lens: which tokens a decoder direction raises when it goes straight to the model's output.

    logits(d) = W_U diag(γ) d, less their mean over the vocabulary         W_U, γ: output embedding and final norm

Where the final norm is a LayerNorm, d loses its mean first. Only hookpoints on the residual stream have a lens. W_U
and γ are read from the model's files; nothing else of the model is loaded, and nothing is downloaded.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.model.source import ALIASES, local_place, resolve_model, same_model
from shared.model.weights import CONFIG, check_tensors, read_json, weight_files
from shared.store.opened import Store

TOKENS: Final = 16
"""Tokens listed for each pole."""
RESIDUAL: Final = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
OUTPUT: Final = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
INPUT: Final = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")
NORM: Final = re.compile(r"^(?!.*\.\d+\.)(.*\.)?(norm|ln_f|final_layer_norm|final_layernorm|norm_f|ln_out)\.(weight)$")
HUB_NAME: Final = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?")
COMMIT: Final = re.compile("[0-9a-f]{40}")
ROWS: Final = 8192
"""Tokens of the vocabulary that are compared at a time."""
LATENTS: Final = 1024
"""Directions that one thread computes at a time."""


class NoLens(Exception):
    """Why there is no logit lens."""


@dataclass(frozen=True)
class Unembedding:
    """The two tensors of a model's file."""

    file: Path
    tensor: str
    """The output embedding's name in the file, [vocabulary, d_model]."""
    gamma: Float[Tensor, " d_model"]
    centred: bool
    """Whether the final norm takes the mean away."""
    commit: str
    """The model that they are from."""

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "tokens d_model"]]]:
        """Yields the first token and the rows of W_U diag(γ), block by block."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            rows = file.get_slice(self.tensor)
            for start in range(0, rows.get_shape()[0], ROWS):
                yield start, rows[start : start + ROWS].float() * self.gamma


@dataclass(frozen=True)
class LensTokens:
    """For each pole, the tokens whose logits its direction raises most: [poles, tokens]."""

    token: NDArray[np.int64]
    logit: NDArray[np.float32]


def find_unembedding(store: Store, hook: str, name: str | None) -> Unembedding:
    """Finds the tensors in the files of the model that a store was harvested from, or of the model `name`. Raises
    NoLens when they are not on this machine or not in this form, UserError when a typed model is another one."""
    about, point = store.spec.model, store.spec.hookpoints[hook]
    if about.get("commit") is None or about.get("name") is None:
        raise NoLens(f"{store.name} was not harvested from a language model")
    if not RESIDUAL.fullmatch(point.name):
        raise NoLens(f"{point.name} is not on the residual stream")
    try:
        folder = model_folder(str(about["name"]), str(about["commit"]), name)
        files = [(path, check_tensors(path, folder.name)) for path in weight_files(folder, folder.name)]
        return unembedding_in(folder, files, point.d_in, str(about["commit"]))
    except UserError as error:
        if name is not None:
            raise
        raise NoLens(str(error)) from error


def model_folder(harvested: str, commit: str, name: str | None) -> Path:
    """The folder of a model's files. Raises NoLens when it is not on this machine, UserError when a typed model is
    another one."""
    from huggingface_hub import try_to_load_from_cache

    wanted = name or harvested
    place = local_place(wanted)
    if place is None:
        found = None
        if HUB_NAME.fullmatch(location := ALIASES.get(wanted, wanted)) and COMMIT.fullmatch(commit):
            found = try_to_load_from_cache(location, CONFIG, revision=commit)
        if not isinstance(found, str):
            raise NoLens(f"its model {wanted} is not on this machine. Name its folder with --model")
        return Path(found).parent
    source = resolve_model(wanted)
    if not same_model(source, commit):
        raise UserError(f"--model {wanted}: is not the model that the store was harvested from ({harvested})")
    if source.gguf:
        raise NoLens(f"its model {wanted} is a GGUF file")
    return Path(source.location)


def unembedding_in(
    folder: Path, files: Sequence[tuple[Path, Mapping[str, Any]]], d_model: int, commit: str
) -> Unembedding:
    """Finds both tensors by their names and shapes. Raises NoLens when they are missing or ambiguous."""
    from safetensors import safe_open

    shapes = {name: (path, list(about["shape"])) for path, header in files for name, about in header.items()}
    matrices = [name for name, (_, shape) in shapes.items() if len(shape) == 2 and shape[1] == d_model]
    wide = [name for name in matrices if OUTPUT.search(name)] or [name for name in matrices if INPUT.search(name)]
    norms = [name for name, (_, shape) in shapes.items() if shape == [d_model] and NORM.match(name)]
    if len(wide) != 1 or len(norms) != 1:
        raise NoLens(f"the files of its model have {len(wide)} output embeddings and {len(norms)} final norms")
    with safe_open(shapes[norms[0]][0], framework="pt") as file:
        gamma = file.get_tensor(norms[0]).float()
    if str(read_json(folder / CONFIG, folder.name).get("model_type", "")).startswith("gemma"):
        gamma = gamma + 1
    centred = norms[0].removesuffix("weight") + "bias" in shapes
    return Unembedding(shapes[wide[0]][0], wide[0], gamma, centred, commit)


def logit_lens(found: Unembedding, W_dec: Float[Tensor, "d_sae d_model"], sides: int, pool: Executor) -> LensTokens:
    """Returns the tokens that every pole raises most. Each thread of `pool` computes some latents at a time."""
    total, many = torch.zeros(W_dec.shape[1], dtype=torch.float64), 0
    for _, rows in found.blocks():
        total, many = total + rows.double().sum(0), many + len(rows)
    mean, count = (total / many).float(), min(TOKENS, many)
    token = np.zeros((len(W_dec), sides, count), np.int64)
    logit = np.full((len(W_dec), sides, count), -np.inf, np.float32)
    starts = range(0, len(W_dec), LATENTS)
    for first, rows in found.blocks():

        def work(start: int, first: int = first, rows: Tensor = rows - mean) -> None:
            some = slice(start, start + LATENTS)
            d = W_dec[some] - W_dec[some].mean(1, keepdim=True) if found.centred else W_dec[some]
            logits = d @ rows.T
            for side in range(sides):
                best = (logits if side == 0 else -logits).topk(min(count, len(rows)), dim=1)
                both = np.concatenate([logit[some, side], best.values.numpy()], axis=1)
                ids = np.concatenate([token[some, side], best.indices.numpy() + first], axis=1)
                order = np.argsort(-both, axis=1, kind="stable")[:, :count]
                logit[some, side] = np.take_along_axis(both, order, 1)
                token[some, side] = np.take_along_axis(ids, order, 1)

        list(pool.map(work, starts))
    return LensTokens(token.reshape(-1, count), logit.reshape(-1, count))
