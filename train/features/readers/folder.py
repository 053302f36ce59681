"""The Parquet files of RUN/features/NAME/, read one range of latents at a time.

Sizes and column types are checked before a row group is read. Values are checked where they are indexes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DamagedError, UserError
from shared.gate import BadData, choice, integer, members, number, quoted, text
from train.runs.folder import read_sealed

MOST_LATENTS: Final = 1 << 24
MOST_TOKEN: Final = 1 << 32
WINDOW_TOKENS: Final = 4096
"""Tokens of a window, at most. Ours have 40."""
GROUP_BYTES: Final = 1 << 30
"""Bytes of a row group, decoded."""
GROUP_ROWS: Final = 1 << 24
TOKENS: Final = "tokens.parquet"
CALLS: Final = "explain.jsonl"
"""The file of answers that were paid for. No rewriting of the features deletes it."""
CURE: Final = "Make it again: sagsae features --overwrite"
POLE_KINDS: Final = {
    "latent": "int", "sign": "int", "firings": "int", "energy": "float", "max": "float", "share_of_energy": "float",
    "hist": "list", "lens": "list", "rule": "list", "near": "list", "far": "list", "cofire": "list",
}  # fmt: skip
EXAMPLE_KINDS: Final = {
    "latent": "int", "sign": "int", "group": "int", "rank": "int", "value": "float", "context": "int",
    "position": "int", "start": "int", "tokens": "list", "values": "list",
}  # fmt: skip


@dataclass(frozen=True)
class WrittenPole:
    """One row of latents.parquet; docs/reference/features.md says what its columns hold."""

    latent: int
    sign: int
    firings: int
    energy: float
    max: float
    share_of_energy: float
    hist: Sequence[int]
    lens: Sequence[Mapping[str, Any]] | None
    rule: Sequence[int]
    near: Sequence[Mapping[str, Any]]
    far: Sequence[Mapping[str, Any]]
    cofire: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class WrittenExample:
    """One row of examples.parquet: a firing with the text around it."""

    latent: int
    sign: int
    group: int
    """0: one of the strongest firings. 1 to 4: drawn, by quarters of the pole's maximum."""
    rank: int
    value: float
    context: int
    position: int
    start: int
    tokens: Sequence[int]
    values: Sequence[float]

    @property
    def peak(self) -> int:
        """The index of the firing in the window."""
        return self.position - self.start


@dataclass(frozen=True)
class FeatureFolder:
    """What `sagsae features` wrote for one autoencoder."""

    path: Path
    about: Mapping[str, Any]
    """The content of about.json; the members that this class has properties for are checked."""

    @property
    def name(self) -> str:
        """The autoencoder's name."""
        return self.path.name

    @property
    def d_sae(self) -> int:
        return int(self.about["d_sae"])

    @property
    def signed(self) -> bool:
        return bool(self.about["signed"])

    @property
    def rows(self) -> int:
        """Rows of the store that were counted."""
        return int(self.about["rows"])

    @property
    def scale(self) -> float:
        return float(self.about["scale"])

    def poles(self, first: int, last: int, columns: Sequence[str] = tuple(POLE_KINDS)) -> list[WrittenPole]:
        """The poles of the latents `first` to `last` - 1, in the order of the file. A column that is not read has an
        empty value. Raises DamagedError for a file that `sagsae features` does not write."""
        empty = {"firings": 0, "energy": 0.0, "max": 0.0, "share_of_energy": 0.0, "hist": (), "lens": None}
        empty |= {"rule": (), "near": (), "far": (), "cofire": ()}
        path = self.path / "latents.parquet"
        kinds = {name: POLE_KINDS[name] for name in ("latent", "sign", *columns)}
        with damage_named(path):
            found = [WrittenPole(**{**empty, **row}) for row in self.rows_of(path, kinds, first, last)]
            for pole in found:
                integer(pole.firings, "firings")
        return found

    def examples(self, first: int, last: int) -> list[WrittenExample]:
        """The examples of the latents `first` to `last` - 1, in the order of the file. Raises DamagedError for a file
        that `sagsae features` does not write."""
        path = self.path / "examples.parquet"
        with damage_named(path):
            found = [WrittenExample(**row) for row in self.rows_of(path, EXAMPLE_KINDS, first, last)]
            for example in found:
                check_example(example)
        return found

    def rows_of(self, path: Path, kinds: Mapping[str, str], first: int, last: int) -> Iterator[dict[str, Any]]:
        with opened(path, kinds) as file:
            for group in range(file.metadata.num_row_groups):
                if not overlaps(file.metadata.row_group(group), first, last):
                    continue
                for row in file.read_row_group(group, columns=list(kinds)).to_pylist():
                    if first <= integer(row["latent"], "latent", 0, self.d_sae - 1) < last:
                        choice(row["sign"], "sign", (1, -1) if self.signed else (1,))
                        yield row


def open_features(run: Path, name: str | None) -> FeatureFolder:
    """Opens RUN/features/NAME/. Raises UserError when there is none or it is not clear which is meant, DamagedError
    when about.json was altered."""
    place = run / "features"
    names = sorted(path.parent.name for path in place.glob("*/about.json")) if place.is_dir() else []
    if name is not None and name not in names:
        known = f"It has {', '.join(names)}" if names else "It has none"
        raise UserError(
            f"--sae {name}: {place} has no such autoencoder. {known}. Run: sagsae features {run} --sae NAME"
        )
    if not names:
        raise UserError(f"{run}: there are no features of it yet. Run: sagsae features {run}")
    if name is None and len(names) > 1:
        raise UserError(f"{run}: has features of {len(names)} autoencoders. Choose one with --sae: {', '.join(names)}")
    folder = place / (name or names[0])
    with damage_named(folder / "about.json"):
        about = read_sealed(folder / "about.json")
        check_about(about)
    return FeatureFolder(folder, about)


def check_about(about: Mapping[str, Any]) -> None:
    """Raises BadData for an about.json whose numbers cannot be."""
    members(about, ("d_sae", "signed", "scale", "rows", "context", "hook_name", "identity", "started"), None)
    integer(about["d_sae"], "d_sae", 1, MOST_LATENTS)
    choice(about["signed"], "signed", (True, False))
    number(about["scale"], "scale", 0.0)
    integer(about["rows"], "rows", 1)
    integer(about["context"], "context", 1, 1 << 16)
    text(about["hook_name"], "hook_name", 256)
    text(about["started"], "started", 64)
    members(about["identity"], ("sae", "sha256"), None)


def check_example(example: WrittenExample) -> None:
    """Raises BadData for an example whose parts do not fit together."""
    n = len(example.tokens)
    if not (0 < n <= WINDOW_TOKENS and n == len(example.values) and 0 <= example.peak < n):
        raise BadData(f"has an example of latent {example.latent} whose window and position do not fit together")
    for token in example.tokens:
        integer(token, "token", 0, MOST_TOKEN)
    for value in (*example.values, example.value):
        number(value, "value")
    integer(example.group, "group", 0, 4)


@contextmanager
def opened(path: Path, kinds: Mapping[str, str]) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file. Raises BadData when it is none, lacks a column, or has larger parts than ours."""
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            schema = file.schema_arrow
            for name, kind in kinds.items():
                if name not in schema.names or not is_kind(schema.field(name).type, kind):
                    raise BadData(f"has no column {name} of the type that sagsae features writes")
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                if about.total_byte_size > GROUP_BYTES or about.num_rows > GROUP_ROWS:
                    raise BadData(
                        f"has a row group of {about.total_byte_size:,} bytes; ours have at most {GROUP_BYTES:,}"
                    )
            yield file
    except FileNotFoundError as error:
        raise BadData("is missing") from error
    except (pa.ArrowException, OSError, TypeError) as error:
        raise BadData(
            f"cannot be read as Parquet ({quoted(str(error).splitlines()[0] if str(error) else error)})"
        ) from error


def is_kind(kind: pa.DataType, wanted: str) -> bool:
    if wanted == "bytes":
        return bool(pa.types.is_binary(kind))
    if wanted == "list":
        return bool(pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind))
    return bool(pa.types.is_integer(kind) if wanted == "int" else pa.types.is_floating(kind))


def overlaps(group: Any, first: int, last: int) -> bool:
    """Whether a row group can hold a latent from `first` to `last` - 1, by its statistics."""
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "latent")
    about = column.statistics
    return about is None or not about.has_min_max or (about.min < last and about.max >= first)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except BadData as error:
        raise DamagedError(f"{path}: {error}. {CURE}") from error
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: is missing. {CURE}") from error
