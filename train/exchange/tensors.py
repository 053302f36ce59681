"""Reads the tensors of files that other tools wrote: safetensors, NumPy's .npz and torch's .pt.

The files may come from anybody. Each size is checked before anything of that size is allocated, archives may not unpack
to much more than they are, and no code of a file is ever run: an .npz with pickled objects is refused, and the pickle
in a .pt may name tensors and nothing else before torch sees it (with weights_only=True).
"""

import hashlib
import io
import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import DamagedError, UserError
from shared.files.handles import open_to_read
from shared.files.local import read_whole
from shared.gate import MOST, SMALL, BadData, parse_json, quoted
from shared.memory import host_memory, in_words
from train.runs.checkpoint import TYPES, read_tensors

MOST_BYTES: Final = 1 << 36
"""Largest file of weights: 2^20 latents of 8,192 dimensions in float32."""
MEMORY: Final = 4
"""Bytes of memory that importing takes per byte of the file, at most."""
MOST_UNPACKED: Final = 32
"""How many times its own size an .npz may unpack to. Weights hardly shrink."""
MOST_ENTRIES: Final = 1024
"""Files inside an archive; an autoencoder has fewer than twenty tensors."""
FOREIGN: Final = {**TYPES, torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int32: "I32"}
"""The data types of other tools' safetensors."""
NUMBERS: Final = frozenset({"f2", "f4", "f8", "i4", "i8", "u1", "b1"})
"""The same of NumPy's arrays."""
NAMED: Final = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Bool)Storage"
)
"""What the pickle in a .pt may ask for."""
CALLING: Final = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"})
"""Opcodes that could run something, and that torch.save does not write."""


@dataclass(frozen=True)
class TensorFile:
    """The content of one file of weights."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    """As they are in the file: on the CPU, of any data type in FOREIGN."""
    others: dict[str, Any] = field(default_factory=dict)
    """What a .pt holds beside tensors: texts, numbers, tables."""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns whatever is wrong with a file into a UserError that names it."""
    try:
        yield
    except BadData as error:
        raise UserError(f"{path}: {error}") from error
    except DamagedError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError for anything else."""
    with readable(path):
        value = parse_json(read_whole(path, SMALL))
        if not isinstance(value, dict):
            raise BadData(f"is {quoted(value)} instead of an object")
        return value


def read_safetensors(path: Path) -> TensorFile:
    """Raises UserError for a file that is no safetensors, or holds a type that is not in FOREIGN."""
    with readable(path):
        data = read_bytes(path)
        return TensorFile(path, hashlib.sha256(data.data).hexdigest(), read_tensors(data, FOREIGN))


def read_bytes(path: Path) -> NDArray[np.uint8]:
    """Returns a regular file as an array that may be written to. Raises BadData for one that the memory cannot hold."""
    handle, status = open_to_read(path)
    with open(handle, "rb", buffering=0) as file:
        check_size(status.st_size)
        data, filled = np.empty(status.st_size, np.uint8), 0
        while filled < len(data) and (count := file.readinto(data[filled:].data)):
            filled += count
    if filled < len(data):
        raise BadData("became shorter while it was read")
    return data


def check_size(size: int) -> None:
    """Raises BadData where reading `size` bytes and translating them would not fit into the free memory."""
    if size > MOST_BYTES:
        raise BadData(f"has {in_words(size)}; more than {in_words(MOST_BYTES)} is no autoencoder")
    free = host_memory()
    if free is not None and MEMORY * size > free:
        raise BadData(
            f"holds {in_words(size)}, which take {MEMORY} times that while they are read; {in_words(free)} are free"
        )


def read_zip(path: Path) -> tuple[bytes, zipfile.ZipFile]:
    """Returns the bytes of an archive, and the archive with its directory checked. Raises BadData."""
    check_size(path.stat().st_size)
    data = read_whole(path, MOST_BYTES)
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = archive.infolist()
    if len(entries) > MOST_ENTRIES or len({entry.filename for entry in entries}) < len(entries):
        raise BadData(f"is an archive of {len(entries):,} files, or has one of them twice")
    return data, archive


@contextmanager
def unpacking(kind: str) -> Iterator[None]:
    """Turns what zipfile, zlib and NumPy raise for a broken archive into BadData."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadData(f"is not a whole {kind} file ({quoted(str(error))})") from error


# .npz


def read_npz(path: Path) -> TensorFile:
    """Raises UserError for a file that is no .npz of numbers, or would unpack to much more than it is."""
    with readable(path), unpacking(".npz"):
        data, archive = read_zip(path)
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_UNPACKED * len(data):
            raise BadData(f"has {len(data):,} bytes and says that it unpacks to {unpacked:,}; weights hardly shrink")
        check_size(unpacked)
        arrays = {entry.filename.removesuffix(".npy"): read_npy(archive, entry) for entry in archive.infolist()}
        return TensorFile(
            path, hashlib.sha256(data).hexdigest(), {key: torch.from_numpy(a) for key, a in arrays.items()}
        )


def read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    """Returns one array of an .npz. Raises BadData when it is anything but numbers of the length that it says."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadData(f"has {quoted(entry.filename)} compressed in a way that NumPy does not use")
    with archive.open(entry) as stream:
        shape, columns_first, dtype = npy_header(stream, entry.filename)
        if dtype.hasobject:
            raise BadData(
                f"has Python objects in {quoted(entry.filename)}, whose pickle could run code; only numbers are read"
            )
        if f"{dtype.kind}{dtype.itemsize}" not in NUMBERS:
            raise BadData(f"has {quoted(entry.filename)} in the type {quoted(str(dtype))}, which no weights have")
        size = math.prod(shape) * dtype.itemsize
        if any(not 0 <= length < MOST for length in shape) or stream.tell() + size != entry.file_size:
            raise BadData(f"has {quoted(entry.filename)} with another length than its header says")
        content = bytearray(stream.read())
        if not size or len(content) != size:
            raise BadData(f"has {quoted(entry.filename)} empty or cut short")
        array = np.frombuffer(content, dtype).reshape(shape, order="F" if columns_first else "C")
        return np.ascontiguousarray(array, dtype.newbyteorder("="))


def npy_header(stream: Any, name: str) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    """Returns the shape, whether columns come first, and the data type. Raises BadData."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        return read(stream, max_header_size=10_000)
    except (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BadData(f"has {quoted(name)}, which is not an array of NumPy") from error


# .pt


def read_pickled(path: Path) -> TensorFile:
    """Reads what torch.save wrote. Raises UserError for a file of torch before 1.6 (2020), a compressed one, or one
    whose pickle asks for more than tensors."""
    with readable(path), unpacking("torch.save"):
        data, archive = read_zip(path)
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise BadData("is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > len(data):
            raise BadData("says that its parts are longer than itself")
        check_pickle(archive, [entry for entry in entries if entry.filename.endswith("data.pkl")])
        return split_pickled(path, hashlib.sha256(data).hexdigest(), load_checked(data))


def check_pickle(archive: zipfile.ZipFile, found: list[zipfile.ZipInfo]) -> None:
    """Raises BadData unless there is one pickle, which names nothing but tensors."""
    if len(found) != 1 or found[0].file_size > SMALL:
        raise BadData("has no pickle of a table of tensors in it, so torch.save did not write it")
    try:
        for opcode, argument, _ in pickletools.genops(archive.read(found[0])):
            if opcode.name in CALLING or (opcode.name == "GLOBAL" and not NAMED.fullmatch(str(argument))):
                asked = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else opcode.name
                raise BadData(
                    f"is a pickle that asks for {quoted(asked)}, which could run code; only tensors are read. If you "
                    "trust it, load it with its tool and save its state_dict() alone"
                )
    except BadData:
        raise
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise BadData(f"has a damaged pickle ({quoted(str(error))})") from error


def load_checked(data: bytes) -> Any:
    """Reads a table of tensors with torch.load, which runs no code of the file. Raises BadData whatever goes wrong."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # its messages and classes are many, and some are plain AssertionError or KeyError
        first = str(error).partition("\n")[0]
        raise BadData(f"cannot be read as a table of tensors ({quoted(first)})") from error


def split_pickled(path: Path, sha256: str, value: Any) -> TensorFile:
    """Raises BadData for anything but a table by names, or for a tensor that would be larger than what is stored."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadData(f"holds a {type(value).__name__} instead of a table of tensors by name")
    tensors = {key: each.detach() for key, each in value.items() if isinstance(each, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise BadData(f"has its tensor {quoted(name)} in a form that no weights have")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise BadData(f"has its tensor {quoted(name)} repeat what is stored once")
    others = {key: each for key, each in value.items() if not isinstance(each, Tensor)}
    return TensorFile(path, sha256, tensors, others)


# names and shapes


def take(
    file: TensorFile, what: str, shapes: Mapping[str, str], ignored: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns the tensors that `shapes` names, in float32, and the length of each axis. `shapes` has axis names with
    spaces: {"W_enc": "d_in d_sae"}. Raises UserError for a missing, an unknown or a misshapen tensor, NaN or
    infinities. `what` names the autoencoder in messages; `ignored` may be there."""
    with readable(file.path):
        if lacking := [name for name in shapes if name not in file.tensors]:
            raise BadData(f"lacks {', '.join(lacking)}; {what} has {', '.join(shapes)}")
        if others := sorted(file.tensors.keys() - shapes.keys() - set(ignored)):
            raise BadData(f"has the tensor {quoted(others[0])}, which {what} cannot have (it has {', '.join(shapes)})")
        sizes: dict[str, int] = {}
        for name, axes in shapes.items():
            check_shape(name, tuple(file.tensors[name].shape), axes.split(), sizes)
        return {name: as_float32(name, file.tensors[name]) for name in shapes}, sizes


def check_shape(name: str, shape: tuple[int, ...], axes: list[str], sizes: dict[str, int]) -> None:
    """Adds the lengths of a tensor's axes to `sizes`. Raises BadData for other axes, or another length of one."""
    if len(shape) == len(axes):
        known = {axis: sizes.get(axis, length) for axis, length in zip(axes, shape, strict=True)}
        if 0 not in shape and tuple(known[axis] for axis in axes) == shape:
            sizes.update(known)
            return
    wanted = " x ".join(f"{axis} ({sizes[axis]:,})" if axis in sizes else axis for axis in axes) or "one number"
    raise BadData(f"has {name} of shape {list(shape)} instead of {wanted}")


def as_float32(name: str, tensor: Tensor) -> Tensor:
    """Raises BadData for NaN and infinities, also for a float64 beyond the range of float32."""
    found = tensor.to(torch.float32)
    if not bool(found.isfinite().all()):
        raise BadData(f"has NaN or infinities in {name}")
    return found


def data_types(file: TensorFile, names: Iterable[str]) -> str:
    """The data types of some tensors, in words: `bfloat16`."""
    return ", ".join(sorted({str(file.tensors[name].dtype).removeprefix("torch.") for name in names}))
