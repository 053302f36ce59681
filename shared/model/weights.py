"""Checks the weights in a model's folder without loading them: which files they are, and whether they are complete.

It reads the index and the headers of safetensors files, which takes milliseconds. Whether the tensors belong to the
model is checked at loading (shared/model/language_model.py).
"""

import json
import re
import stat
from math import prod
from pathlib import Path
from typing import Any, Final

from shared.errors import UserError
from shared.files.local import error_kind

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
MAX_HEADER: Final = 100 << 20
MAX_JSON: Final = 64 << 20
"""Largest JSON file, in bytes. MAX_HEADER is safetensors' own limit."""
DESCRIPTIONS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model.v3",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""What transformers reads beside the weights: configurations, vocabularies, templates."""
MAX_DESCRIPTION: Final = 128 << 20
"""Largest of them, in bytes; the largest tokenizers have 40 MB."""
POINTER: Final = b"version https://git-lfs"
BYTES_OF_TYPES: Final = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64"),
}
ITEMSIZE: Final = {name: size for size, names in BYTES_OF_TYPES.items() for name in names}
FLOATS: Final = ("F64", "F32", "F16", "BF16")
PACKED: Final = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale\w*|SCB|absmax|quant_map|quant_state\S*|weight\.absmax|"
    r"\w+_(blocks|scales))$"
)
"""Names that quantised checkpoints give to their parts."""


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that hold a folder's weights, sorted, each complete by its own header. Raises UserError, naming the
    file, where there are none or transformers could not load them, and for weights that are quantised or an
    adapter's."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"--model {name}: the folder holds an adapter (adapter_config.json). Merge it into its model "
            "(merge_and_unload of PEFT), save that with save_pretrained, and harvest the result"
        )
    if (folder / SINGLE).exists():
        check_tensors(folder / SINGLE, name)
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return indexed_files(folder / INDEX, name)
    stray = sorted(path.name for path in folder.glob("*.safetensors"))
    if stray:
        raise UserError(
            f"--model {name}: the folder holds {stray[0]}, but neither {SINGLE} nor {INDEX}, where its weights are "
            "looked for. Rename the file, or save the model again with save_pretrained"
        )
    raise UserError(
        f"--model {name}: the folder holds no weights (*.safetensors). Pickled ones (*.bin) are never read: save the "
        "model again with save_pretrained"
    )


def indexed_files(index: Path, name: str) -> list[Path]:
    """The shards that an index names: plain names of files beside it, with the tensors that they should hold."""
    where = read_json(index, name).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"--model {name}: {index.name} names no weights (weight_map); download or save the model again")
    wanted: dict[str, set[str]] = {}
    for tensor, file in where.items():
        wanted.setdefault(file, set()).add(tensor)
    for file in sorted(wanted):
        if file != Path(file).name or not file.endswith(".safetensors") or "\\" in file or "\0" in file:
            raise UserError(
                f"--model {name}: {INDEX} names {file[:200]!r}, which is no *.safetensors file in the model's own "
                "folder. Nothing outside it is read"
            )
    absent = [file for file in sorted(wanted) if not (index.parent / file).exists()]
    if absent:
        raise UserError(
            f"--model {name}: of its {len(wanted)} weights files {len(absent)} are missing: {first_names(absent)}. "
            "Download or copy the model again"
        )
    for file, tensors in sorted(wanted.items()):
        lacking = sorted(tensors - check_tensors(index.parent / file, name).keys())
        if lacking:
            raise UserError(
                f"--model {name}: {file} lacks {len(lacking)} of the tensors that {INDEX} says it holds: "
                f"{first_names(lacking)}. Download or save the model again"
            )
    return [index.parent / file for file in sorted(wanted)]


def check_tensors(path: Path, name: str) -> dict[str, Any]:
    """The header of a safetensors file. Raises UserError for a file that is cut short, is something else, or is
    quantised."""
    header, start = read_header(path, name)
    end = start
    for tensor, about in header.items():
        try:
            dtype, shape, (first, last) = about["dtype"], about["shape"], about["data_offsets"]
            sound = 0 <= first <= last and all(type(n) is int and n >= 0 for n in (*shape, first, last))
            sound = sound and last - first == prod(shape) * ITEMSIZE.get(dtype, (last - first) / (prod(shape) or 1))
        except (TypeError, KeyError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise no_weights(path, name, f"its header is impossible for {tensor[:200]!r}")
        if PACKED.search(tensor) or (tensor.endswith(".weight") and dtype not in FLOATS):
            raise quantised(name, f"{tensor} in {path.name} is {dtype}")
        end = max(end, start + last)
    size = path.stat().st_size
    if size != end:
        raise no_weights(path, name, f"it has {size:,} bytes, its header says {end:,}")
    return header


def read_header(path: Path, name: str) -> tuple[dict[str, Any], int]:
    """The tensors in the header, and the offset at which their bytes begin."""
    check_regular(path, name)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(size - 8, MAX_HEADER):
            raise no_weights(path, name, "it is cut, or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise no_weights(path, name, "its header cannot be read") from error
    if not isinstance(header, dict):
        raise no_weights(path, name, "its header is not a list of tensors")
    header.pop("__metadata__", None)
    if not header:
        raise no_weights(path, name, "it holds no tensor")
    return header, 8 + length


def check_gguf(path: Path, name: str) -> None:
    """Raises UserError for a file that does not begin like a GGUF file. The rest is checked when it is read."""
    check_regular(path, name)
    with path.open("rb") as file:
        head = file.read(24)
    version = int.from_bytes(head[4:8], "little")
    counts = (int.from_bytes(head[8:16], "little"), int.from_bytes(head[16:24], "little"))
    if head[:4] != b"GGUF" or len(head) < 24:
        raise no_weights(path, name, "it is cut, or no GGUF file")
    if version not in (2, 3) or max(counts) > 1 << 20:
        raise no_weights(path, name, f"it is GGUF of version {version}, {counts[0]} tensors and {counts[1]} values")


def check_regular(path: Path, name: str) -> None:
    """Raises UserError for anything but a readable file, and for the pointer that Git LFS leaves in its place."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"--model {name}: {path.name} is not a file")
        with path.open("rb") as file:
            head = file.read(len(POINTER))
    except OSError as error:
        raise error_kind(error)(f"--model {name}: {path.name} cannot be read ({error.strerror})") from error
    if head == POINTER:
        raise UserError(
            f"--model {name}: {path.name} is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`, or "
            "download the model again"
        )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for anything else."""
    check_regular(path, name)
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError("it is too large")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        what = "configuration" if path.name == CONFIG else "list of weights"
        raise UserError(
            f"--model {name}: its {what} cannot be loaded: {path.name} is no JSON object that can be read "
            f"({str(error)[:200]}). Download or save the model again"
        ) from error
    return found


def check_small(folder: Path, name: str) -> None:
    """Raises UserError for a file beside the weights that is larger than any of its kind: transformers would read it
    whole."""
    for path in (folder / file for file in DESCRIPTIONS):
        if path.is_file() and path.stat().st_size > MAX_DESCRIPTION:
            raise UserError(
                f"--model {name}: {path.name} has {path.stat().st_size:,} bytes; a file of its kind has at most "
                f"{MAX_DESCRIPTION:,}. Download or save the model again"
            )


def no_weights(path: Path, name: str, why: str) -> UserError:
    return UserError(
        f"--model {name}: its weights cannot be loaded: {path.name}: {why}. Download, copy or save the model again"
    )


def quantised(name: str, how: str) -> UserError:
    return UserError(
        f"--model {name}: its weights are quantised ({how}), which is not supported. Harvest the model that they were "
        "made from, or one saved with full weights"
    )


def first_names(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(name[:200] for name in names[:most]) + more
