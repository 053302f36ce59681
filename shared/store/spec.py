"""The spec of a store: everything that decides its bytes, and the Zarr v3 documents that follow from it.

The arrays' zarr.json are written out here, not by a Zarr library: their bytes are part of the format
(docs/reference/store-format.md) and do not change with a library's version. Tests read them with four Zarr libraries.
"""

import json
import re
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, model_validator

from shared.gate import BadData, integer, members, named, quoted, safe_path, text
from shared.schema import Frozen
from shared.store.shard import BLOSC_MOST, CODECS, CodecName, ShardLayout, crc32c

FORMAT_VERSION: Final = 2
TOKENS_PER_CHUNK: Final = 1 << 20
FEW_IDS: Final = 8

# bf16 has no Zarr v3 data type that zarr-python knows: its bit pattern is stored as uint16. The fill values are NaN,
# or a value that is never written, so that a read of missing data is noticed.
DTYPES: Final[dict[str, tuple[np.dtype[Any], float | int]]] = {
    "bfloat16": (np.dtype("<u2"), 0x7FC0),
    "float16": (np.dtype("<f2"), float("nan")),
    "float32": (np.dtype("<f4"), float("nan")),
}
INT8: Final[tuple[np.dtype[Any], int]] = (np.dtype("i1"), -128)

TokenType = Literal["uint16", "uint32"]

MOST_TOKENS: Final = 1 << 40
MOST_CONTEXT: Final = 1 << 16
"""Limit of index/position, which is uint16."""
MOST_CONTEXTS: Final = 1 << 32
"""Limit of index/context, which is uint32."""
MOST_SHARDS: Final = 1 << 22
MOST_CHUNKS: Final = 1 << 20
"""Chunks per shard: its index has 16 bytes for each."""
MOST_SHARD_ROWS: Final = BLOSC_MOST // 4
"""Rows per shard: norms and index arrays have one chunk per shard."""
MOST_WIDTH: Final = 1 << 24
MOST_HOOKPOINTS: Final = 1 << 14
HOOKPOINT: Final = re.compile(r"layer_[0-9]{2,6}/[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""The path of a hookpoint, as harvest and synth write it (shared/model/hooks.py)."""
NOT_A_HOOKPOINT: Final = (".json", ".jsonl", ".tmp")
"""Endings that mark names of other files."""

Count = Annotated[int, Field(strict=True, ge=1)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]


def hookpoint_path(path: str) -> str:
    if len(safe_path(path)) > 200 or not HOOKPOINT.fullmatch(path) or path.endswith(NOT_A_HOOKPOINT):
        raise BadData(f"{quoted(path)} is no path of a hookpoint, such as layer_08/mlp_out")
    return path


class HookSpec(Frozen):
    name: Annotated[str, AfterValidator(lambda name: text(name, "name", 256))]
    """TransformerLens name, such as `blocks.8.hook_mlp_out`."""
    d_in: Annotated[Count, Field(le=MOST_WIDTH)]


class StoreSpec(Frozen):
    """Everything that decides the bytes of a store: harvests with equal specs write equal stores. All numbers are
    bounded, and consistent with each other, so nothing is allocated or looped over that a store could not have."""

    format_version: Annotated[int, Field(strict=True)] = FORMAT_VERSION
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    corpus: dict[str, Any]
    context: Annotated[Count, Field(le=MOST_CONTEXT)]
    bos_id: TokenId | None
    special_ids: Annotated[tuple[TokenId, ...], Field(max_length=1 << 20)]
    skip_positions: Annotated[int, Field(strict=True, ge=0, le=MOST_CONTEXT)] = 1
    """The first positions of every context, which neither count in statistics nor are trained on."""
    n_tokens: Annotated[Count, Field(le=MOST_TOKENS)]
    token_dtype: TokenType
    hookpoints: Annotated[
        dict[Annotated[str, AfterValidator(hookpoint_path)], HookSpec],
        Field(min_length=1, max_length=MOST_HOOKPOINTS),
    ]
    """Hookpoints by path inside the store, such as `layer_08/mlp_out`."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """The type to which the model's activations were rounded. With codec int8 they were quantised after that."""
    codec: CodecName
    chunk_rows: Annotated[Count, Field(le=MOST_SHARD_ROWS)]
    shard_rows: Annotated[Count, Field(le=MOST_SHARD_ROWS)]
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]

    @model_validator(mode="after")
    def check_together(self) -> "StoreSpec":
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows: {self.shard_rows} is not a multiple of chunk_rows = {self.chunk_rows}")
        if self.shard_rows // self.chunk_rows > MOST_CHUNKS:
            raise ValueError(f"chunk_rows: {self.chunk_rows} makes more than {MOST_CHUNKS:,} chunks per shard")
        if self.n_shards > MOST_SHARDS:
            raise ValueError(f"shard_rows: {self.shard_rows} makes more than {MOST_SHARDS:,} shards")
        if self.n_contexts > MOST_CONTEXTS:
            raise ValueError(f"context: {self.context} makes more than {MOST_CONTEXTS:,} contexts")
        if self.skip_positions > self.context:
            raise ValueError(f"skip_positions: {self.skip_positions} is more than context = {self.context}")
        widest = max(hook.d_in for hook in self.hookpoints.values())
        if self.chunk_rows * widest * DTYPES[self.dtype][0].itemsize > BLOSC_MOST:
            raise ValueError(f"chunk_rows: {self.chunk_rows} rows of {widest} numbers are more than 2 GiB per chunk")
        return self

    def as_json(self) -> dict[str, Any]:
        """The spec as JSON. A skip_positions of 1 is left out, as in stores written before there was any other
        value."""
        return self.model_dump(mode="json", exclude={"skip_positions"} if self.skip_positions == 1 else None)

    @property
    def n_shards(self) -> int:
        return -(-self.n_tokens // self.shard_rows)

    @property
    def n_contexts(self) -> int:
        return -(-self.n_tokens // self.context)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The slice of the token stream that a shard holds (in permuted order)."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.n_tokens)

    @property
    def quantised(self) -> bool:
        return CODECS[self.codec].lossy

    def layouts(self) -> dict[str, ShardLayout]:
        """Every sharded array: hookpoints, int8's row scales, row norms, and where each row came from. Arrays that are
        read shard by shard have one chunk per shard."""
        per_shard = self.shard_rows // self.chunk_rows
        dtype, fill = INT8 if self.quantised else DTYPES[self.dtype]
        codec: CodecName = "none" if self.quantised else self.codec
        float32, nan = np.dtype("<f4"), float("nan")
        layouts = {}
        for path, hook in self.hookpoints.items():
            layouts[path] = ShardLayout(self.chunk_rows, per_shard, (hook.d_in,), dtype, codec, fill)
            layouts[f"stats/{path}/norm"] = ShardLayout(self.shard_rows, 1, (), float32, "zstd", nan)
            if self.quantised:
                layouts[f"scale/{path}/row"] = ShardLayout(self.chunk_rows, per_shard, (), float32, "zstd", nan)
        for name, index_dtype in (("context", "<u4"), ("position", "<u2")):
            dtype = np.dtype(index_dtype)
            layouts[f"index/{name}"] = ShardLayout(self.shard_rows, 1, (), dtype, "zstd", int(np.iinfo(dtype).max))
        return layouts

    def rows_of_shards(self) -> dict[str, tuple[int, np.dtype[Any]]]:
        """The arrays with one row per shard, [n_shards, d_in], each row a file: path -> (d_in, data type)."""
        float64, float32 = np.dtype("<f8"), np.dtype("<f4")
        arrays: dict[str, tuple[int, np.dtype[Any]]] = {}
        for path, hook in self.hookpoints.items():
            for name in ("sum", "sum_of_squares", *(["sum_of_squared_error"] if self.quantised else [])):
                arrays[f"stats/{path}/{name}"] = (hook.d_in, float64)
            if self.quantised:
                arrays[f"scale/{path}/dim"] = (hook.d_in, float32)
        return arrays

    def arrays(self) -> set[str]:
        """Every array in which a shard has a file."""
        return {*self.layouts(), *self.rows_of_shards()}

    def token_files(self) -> list[str]:
        """Paths of the chunks of `tokens`."""
        rows = token_layout(self.context, self.token_dtype).chunk_rows
        return [shard_file("tokens", number, True) for number in range(-(-self.n_contexts // rows))]

    def documents(self) -> dict[str, bytes]:
        """Every zarr.json but the store's own: arrays, and the groups that contain them."""
        tokens = token_layout(self.context, self.token_dtype)
        found = {"tokens": plain_document((self.n_contexts, self.context), tokens, ("context", "position"))}
        for path, layout in self.layouts().items():
            hook = self.hookpoints.get(path)
            about = {"logical_dtype": "int8" if self.quantised else self.dtype, "hook": hook.name} if hook else None
            found[path] = sharded_document(self.n_tokens, layout, {"sagsae": about} if about else {})
        for path, (d_in, dtype) in self.rows_of_shards().items():
            row = ShardLayout(1, 1, (d_in,), dtype, "none", float("nan"))
            found[path] = plain_document((self.n_shards, d_in), row, ("shard", "d_model"))
        group = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
        found |= {parent: group for path in list(found) for parent in parents(path)}
        return {f"{path}/zarr.json": as_bytes(document) for path, document in sorted(found.items())}


def read_spec(about: dict[str, Any]) -> StoreSpec:
    """The spec of an existing store, including what its readers need of the model and the corpus. Raises BadData naming
    the first member that is invalid."""
    try:
        spec = StoreSpec.model_validate(about)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        place = named(first["loc"])
        raise BadData(f"{place}: {message} (got {quoted(first['input'])})" if place else message) from error
    check_model(spec.model)
    check_corpus(spec)
    return spec


def check_model(model: dict[str, Any]) -> None:
    members(model, ("name",), None)
    text(model["name"], "model.name")
    for name in ("commit", "dtype", "attention", "weight_processing"):
        if model.get(name) is not None:
            text(model[name], f"model.{name}", 256)
    if not isinstance(model.get("local", False), bool):
        raise BadData(f"model.local is {quoted(model['local'])} instead of true or false")


def check_corpus(spec: StoreSpec) -> None:
    corpus = members(spec.corpus, ("ids_blake2b",), None)
    if not re.fullmatch(r"[0-9a-f]{32}", text(corpus["ids_blake2b"], "corpus.ids_blake2b")):
        raise BadData(f"corpus.ids_blake2b is {quoted(corpus['ids_blake2b'])} instead of 32 hexadecimal digits")
    if "vocab_size" in corpus:
        integer(corpus["vocab_size"], "corpus.vocab_size", 1, 1 << 32)
    for name in ("documents", "empty_documents", "bad_documents"):
        if name in corpus:
            integer(corpus[name], f"corpus.{name}")


def corpus_name(source: Any) -> str | None:
    """The corpus that a store records: the dataset's id on the hub, or the name of its first file. None where it says
    neither."""
    if not isinstance(source, dict):
        return None
    files = source.get("files")
    first = files[0].get("name") if isinstance(files, list) and files and isinstance(files[0], dict) else None
    name = source.get("name") or first or source.get("kind")
    return name if isinstance(name, str) else None


def rows_that_count(tokens: NDArray[Any], spec: StoreSpec) -> NDArray[np.bool_]:
    """[contexts, context]: all but the first positions (0 is an outlier in most models) and special tokens."""
    keep = ~are_special(tokens, spec.special_ids)
    keep[:, : spec.skip_positions] = False
    return keep


def are_special(tokens: NDArray[Any], special_ids: tuple[int, ...]) -> NDArray[np.bool_]:
    """`np.isin(tokens, special_ids)`; for a few ids without its memory cost."""
    if len(special_ids) > FEW_IDS:
        return np.isin(tokens, special_ids)
    found = np.zeros(tokens.shape, bool)
    for one in special_ids:
        found |= tokens == one
    return found


def token_layout(context: int, dtype: TokenType) -> ShardLayout:
    """The chunks of the token ids, [n_contexts, context]; each is a file of its own."""
    return ShardLayout(max(1, TOKENS_PER_CHUNK // context), 1, (context,), np.dtype(dtype).newbyteorder("<"), "zstd", 0)


def shard_file(array: str, shard: int, matrix: bool) -> str:
    """`c/<shard>/0` for a matrix, `c/<shard>` for a vector: Zarr's default chunk keys."""
    return f"{array}/c/{shard}/0" if matrix else f"{array}/c/{shard}"


def parents(path: str) -> list[str]:
    """`a/b/c` -> `a`, `a/b`."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def as_bytes(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"


LITTLE: Final = {"name": "bytes", "configuration": {"endian": "little"}}
CRC: Final = {"name": "crc32c"}


def chunk_codecs(layout: ShardLayout) -> list[dict[str, Any]]:
    """The encoding of a chunk, in Zarr's terms."""
    parameters = CODECS[layout.codec].blosc
    raw = LITTLE if layout.dtype.itemsize > 1 else {"name": "bytes"}
    if parameters is None:
        return [raw, CRC]
    return [
        raw,
        {"name": "blosc", "configuration": {"typesize": layout.dtype.itemsize, **vars(parameters)}},
        CRC,
    ]


def sharded_codecs(layout: ShardLayout) -> list[dict[str, Any]]:
    inside = {
        "chunk_shape": list(layout.chunk_shape),
        "codecs": chunk_codecs(layout),
        "index_codecs": [LITTLE, CRC],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": inside}]


def sharded_document(rows: int, layout: ShardLayout, attributes: dict[str, Any]) -> dict[str, Any]:
    shape = (rows, *layout.row_shape)
    chunk = (layout.shard_rows, *layout.row_shape)
    return document(shape, chunk, layout, sharded_codecs(layout), ("token", "d_model")[: len(shape)], attributes)


def plain_document(shape: tuple[int, ...], layout: ShardLayout, names: tuple[str, ...]) -> dict[str, Any]:
    """The zarr.json of an array whose every chunk is a file."""
    return document(shape, layout.chunk_shape, layout, chunk_codecs(layout), names, {})


def document(
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    layout: ShardLayout,
    codecs: list[dict[str, Any]],
    names: tuple[str, ...],
    attributes: dict[str, Any],
) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "data_type": layout.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if layout.fill != layout.fill else layout.fill,
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": list(names),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the crc32c of its compact, key-sorted JSON as its last member."""
    return {**document, "crc32c": crc32c(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())}


def is_sealed(document: dict[str, Any]) -> bool:
    return seal({key: value for key, value in document.items() if key != "crc32c"}) == document
