"""explanations.parquet, one row per pole, and explanations.json, which says how they were made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DamagedError
from shared.files.local import write_file
from shared.gate import BadData
from shared.progress import say
from shared.record import provenance
from train.explain.interview import EXPLAINED, PoleOutcome
from train.features.readers.folder import opened
from train.runs.folder import read_sealed, write_sealed

PARQUET: Final = "explanations.parquet"
ABOUT: Final = "explanations.json"
FORMAT: Final = 1
TESTS: Final = ("detection", "fuzz", "poles")
SCHEMA: Final = pa.schema(
    [("latent", pa.int32()), ("sign", pa.int8()), ("state", pa.string()), ("why", pa.string()),
     ("explanation", pa.string())]
    + [(f"{test}{part}", pa.int32() if part == "_windows" else pa.float32())
       for test in TESTS for part in ("", "_low", "_high", "_rule", "_windows")]
)  # fmt: skip
Row = dict[str, Any]


def row_of(outcome: PoleOutcome) -> Row:
    row: Row = dict.fromkeys(SCHEMA.names)
    row |= {"latent": outcome.latent, "sign": outcome.sign, "state": outcome.state, "why": outcome.why}
    row["explanation"] = outcome.explanation
    for test, score in outcome.scores.items():
        row |= {test: score.accuracy, f"{test}_low": score.low, f"{test}_high": score.high}
        row |= {f"{test}_rule": score.rule, f"{test}_windows": score.windows}
    return row


def write_results(
    folder: Path, outcomes: Sequence[PoleOutcome], identity: Mapping[str, Any], about: Mapping[str, Any]
) -> list[Row]:
    """Writes both files, each whole or not at all, with the rows of earlier calls of the same identity beside the new
    ones. Returns all rows, by latent."""
    rows = {(row["latent"], row["sign"]): row for row in earlier_rows(folder, identity)}
    rows |= {(outcome.latent, outcome.sign): row_of(outcome) for outcome in outcomes}
    ordered = [rows[key] for key in sorted(rows, key=lambda key: (key[0], -key[1]))]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ordered, SCHEMA), sink, compression="zstd", version="2.6")
    write_file(folder / PARQUET, [sink.getvalue().to_pybytes()])
    summary = {"format": FORMAT, **provenance(), "identity": identity, **about, "means": means(ordered)}
    write_sealed(folder / ABOUT, summary)
    return ordered


def earlier_rows(folder: Path, identity: Mapping[str, Any]) -> list[Row]:
    """The rows of an earlier call; none when it asked another model or other questions."""
    try:
        about = read_sealed(folder / ABOUT)
    except FileNotFoundError:
        return []
    except BadData as error:
        raise DamagedError(f"{folder / ABOUT}: {error}. Delete it; answers that were paid for stay") from error
    if about.get("identity") != identity:
        say(f"{folder / PARQUET}: had explanations of another model, or of other questions. They are replaced")
        return []
    kinds = {"latent": "int", "sign": "int"}
    try:
        with opened(folder / PARQUET, kinds) as file:
            if file.schema_arrow.remove_metadata() != SCHEMA:
                raise BadData("has other columns than sagsae explain writes")
            rows: list[Row] = file.read().to_pylist()
            return rows
    except BadData as error:
        raise DamagedError(f"{folder / PARQUET}: {error}. Delete it; answers that were paid for stay") from error


def means(rows: Sequence[Row]) -> Row:
    """The mean of each score over the poles that have it, with their number."""
    found: Row = {"explained": sum(row["state"] == EXPLAINED for row in rows), "asked": len(rows)}
    for test in TESTS:
        known = [row for row in rows if row[test] is not None and (test != "poles" or row["sign"] == 1)]
        if known:
            found[test] = sum(row[test] for row in known) / len(known)
            found[f"{test}_rule"] = sum(row[f"{test}_rule"] for row in known) / len(known)
            found[f"{test}_count"] = len(known)
    return found
