"""The page of one store: what is read from its folder, and what the template shows of it.

`read_numbers` reads the store, within bounds; every other function computes from what was read.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from harvest.serve.page.plots import POINTS, line_plot, stem_plot
from harvest.serve.page.words import ABSENT, Fact, ago, count, number, size, times
from harvest.serve.records import StoreOrigin
from shared.errors import DamagedError, UserError
from shared.gate import members, parse_json, printable
from shared.request import StoreReader, StoreRow
from shared.store.norms import MASSIVE, OUTLYING, Norms, norms, norms_by_position, outlying, spread
from shared.store.opened import Statistics, Store
from shared.store.spec import DTYPES, StoreSpec

SHARDS_FOR_MOMENTS: Final = 1024
"""Shards whose sums are read for the moments: three small files each."""
ARRAYS: Final = 60
"""Rows of the table of arrays."""
NAMED: Final = 6
"""Outlying dimensions that the plot labels."""
RECORD_BYTES: Final = 1 << 20
TEXT_LETTERS: Final = 480
"""Letters of a context that are shown."""
QUANTILE_NAMES: Final = {0.0: "Smallest", 0.01: "1 %", 0.5: "Median", 0.99: "99 %", 1.0: "Largest"}
VERSIONS: Final = ("sagsae", "torch", "transformers", "transformer-lens")


@dataclass(frozen=True)
class HookNumbers:
    """The statistics of one hookpoint."""

    statistics: Statistics
    norms: Norms | None
    by_position: Sequence[float]
    """The mean norm at each position of a context."""
    snr_db: float | None


@dataclass(frozen=True)
class StoreNumbers:
    """The sizes of a store's arrays, and the statistics of one of its hookpoints."""

    spec: StoreSpec
    hook: str
    shards: int
    """Committed shards."""
    sampled: int
    """Shards that the norms are over."""
    sizes: Mapping[str, int]
    """Bytes by array."""
    record: Mapping[str, Any]
    counted: HookNumbers | None
    """None where too few rows count, or the files are damaged."""
    damage: str = ""


def read_numbers(store: Store, hook: str | None = None) -> StoreNumbers:
    """Reads a store for its page: at most SHARDS_FOR_MOMENTS shards' sums and SAMPLED shards' norms, of this hookpoint
    or of the first. Damage is named in the result: a page shows what is left."""
    hook = hook if hook in store.spec.hookpoints else next(iter(store.spec.hookpoints))
    counted, damage = None, ""
    try:
        counted = read_statistics(store, hook)
    except (DamagedError, UserError, OSError) as error:
        damage = str(error)
    return StoreNumbers(
        spec=store.spec,
        hook=hook,
        shards=len(store.commits),
        sampled=len(spread(store).commits),
        sizes=array_sizes(store),
        record=read_record(store.root),
        counted=counted,
        damage=damage,
    )


def read_statistics(store: Store, hook: str) -> HookNumbers | None:
    """The statistics of a hookpoint; None where too few rows count. Raises DamagedError."""
    few, many = spread(store), spread(store, SHARDS_FOR_MOMENTS)
    if many.kept(hook) < 2:
        return None
    cost = many.quantisation(hook)
    positions = norms_by_position(few, hook).tolist()
    return HookNumbers(many.statistics(hook), norms(few, hook), positions, cost.snr_db if cost else None)


def array_sizes(store: Store) -> dict[str, int]:
    """Committed bytes of every array, and of the token ids on disk."""
    sizes = {array: store.commits.bytes_of(array) for array in sorted(store.spec.arrays())}
    tokens = [path.stat().st_size for path in (store.root / "tokens").rglob("*") if path.is_file()]
    return {**sizes, "tokens": sum(tokens)}


def read_record(folder: Path) -> dict[str, Any]:
    """record.json, or nothing where it cannot be read: it is for people only."""
    try:
        with (folder / "record.json").open("rb") as file:
            return members(parse_json(file.read(RECORD_BYTES)), (), None)
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True)
class HookLine:
    """One hookpoint in the table of a store."""

    path: str
    d_in: int
    size: str
    ratio: str
    chosen: bool


@dataclass(frozen=True)
class ArrayLine:
    """The bytes of one array."""

    path: str
    size: str
    percent: float


@dataclass(frozen=True)
class ContextLine:
    """The beginning of one context as text, or as ids where no tokenizer is at hand."""

    number: int
    text: str
    more: bool


@dataclass(frozen=True)
class TextsView:
    """The beginnings of some contexts, or why there are none."""

    contexts: tuple[ContextLine, ...] = ()
    note: str = ""
    pending: bool = False
    """Whether they are being decoded: they can be had in a moment."""


@dataclass(frozen=True)
class ProvenanceNode:
    """A thing that the store was made from, and what that was made from."""

    title: str
    facts: tuple[Fact, ...]
    parents: tuple["ProvenanceNode", ...] = ()
    link: str = ""
    """The address of its own page."""


@dataclass(frozen=True)
class StorePlot:
    """A plot with its caption."""

    title: str
    drawing: Markup
    caption: str


@dataclass(frozen=True)
class StoreView:
    """Everything that the page of a store shows, as texts and drawings."""

    row: StoreRow
    facts: tuple[Fact, ...]
    hooks: tuple[HookLine, ...]
    hook: str
    moments: tuple[Fact, ...]
    quantiles: tuple[Fact, ...]
    massive: str
    damage: str
    """Why there are no statistics; empty where too few rows count."""
    sampled: str
    plots: tuple[StorePlot, ...]
    arrays: tuple[ArrayLine, ...]
    further_arrays: int
    key_parts: tuple[Fact, ...]
    provenance: ProvenanceNode
    train: str
    train_here: str | None
    """The same with the folder, for a reader on the server's machine."""
    python: str


def store_view(
    row: StoreRow, numbers: StoreNumbers, origin: StoreOrigin | None, url: str, folder: Path | None, now: float
) -> StoreView:
    """What the page shows. `url` is the store's own address on this server."""
    arrays = array_lines(numbers.sizes)
    return StoreView(
        row=row,
        facts=store_facts(row, numbers, now),
        hooks=tuple(hook_line(numbers, path) for path in numbers.spec.hookpoints),
        hook=numbers.hook,
        moments=moment_facts(numbers.counted),
        quantiles=quantile_facts(numbers.counted.norms if numbers.counted else None),
        massive=massive_text(numbers.counted.norms if numbers.counted else None),
        damage=printable(numbers.damage),
        sampled=sample_text(numbers),
        plots=store_plots(numbers.counted),
        arrays=arrays[:ARRAYS],
        further_arrays=len(arrays[ARRAYS:]),
        key_parts=key_facts(numbers.spec),
        provenance=provenance_tree(row, numbers, origin),
        train=train_command(url, numbers.hook),
        train_here=train_command(str(folder), numbers.hook) if folder else None,
        python=python_snippet(url, numbers),
    )


def store_facts(row: StoreRow, numbers: StoreNumbers, now: float) -> tuple[Fact, ...]:
    spec = numbers.spec
    total = sum(numbers.sizes.values())
    raw = sum(raw_bytes(row.rows, hook.d_in, spec.dtype) for hook in spec.hookpoints.values())
    stored = sum(stored_size(numbers, path) for path in spec.hookpoints)
    of = "" if row.rows == row.n_tokens else f" of {count(row.n_tokens)}"
    return (
        Fact("Model", row.model),
        Fact("Corpus", row.corpus),
        Fact("Tokens", f"{count(row.rows)}{of}"),
        Fact("Context", count(spec.context)),
        Fact("Format", f"{spec.dtype}, {spec.codec}"),
        Fact("Size", size(total)),
        Fact("Ratio", times(raw / stored) if stored else ABSENT),
        Fact("Shards", f"{count(numbers.shards)} of {count(spec.n_shards)}, {count(spec.shard_rows)} rows each"),
        Fact("Last used", ago(row.used, now)),
        Fact("Environment", row.environment[:8] or ABSENT),
    )


def raw_bytes(rows: int, d_in: int, dtype: str) -> int:
    return rows * d_in * DTYPES[dtype][0].itemsize


def stored_size(numbers: StoreNumbers, path: str) -> int:
    """Bytes of a hookpoint's activations, with the scales that are needed to read them back."""
    return sum(numbers.sizes.get(array, 0) for array in (path, f"scale/{path}/row", f"scale/{path}/dim"))


def hook_line(numbers: StoreNumbers, path: str) -> HookLine:
    spec, stored = numbers.spec, stored_size(numbers, path)
    d_in = spec.hookpoints[path].d_in
    rows = min(numbers.shards * spec.shard_rows, spec.n_tokens)
    ratio = times(raw_bytes(rows, d_in, spec.dtype) / stored) if stored else ABSENT
    return HookLine(path, d_in, size(stored), ratio, path == numbers.hook)


def array_lines(sizes: Mapping[str, int]) -> tuple[ArrayLine, ...]:
    """Arrays by their size, largest first."""
    total = max(1, sum(sizes.values()))
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ArrayLine(path, size(length), round(100 * length / total, 2)) for path, length in ordered)


def moment_facts(counted: HookNumbers | None) -> tuple[Fact, ...]:
    """The moments of the chosen hookpoint; nothing where there are none."""
    if counted is None:
        return ()
    statistics, measured = counted.statistics, counted.norms
    mean_square = float((statistics.variance + statistics.mean**2).sum())
    facts = [
        Fact("Rows that count", count(statistics.n)),
        Fact("Scale √E|x − mean|²", number(statistics.scale)),
        Fact("Norm of the mean", number(float((statistics.mean**2).sum() ** 0.5))),
        Fact("Mean square E|x|²", number(mean_square)),
        Fact("Total variance", number(float(statistics.variance.sum()))),
    ]
    if counted.snr_db is not None:
        facts.append(Fact("int8 SNR", f"{counted.snr_db:.2f} dB"))
    if measured:
        facts.append(Fact("Norm at position 0", number(measured.at_position_0)))
        facts.append(Fact("Rows with NaN or infinity", count(measured.nonfinite)))
    return tuple(facts)


def quantile_facts(measured: Norms | None) -> tuple[Fact, ...]:
    if measured is None:
        return ()
    return tuple(Fact(QUANTILE_NAMES[q], number(value)) for q, value in sorted(measured.quantiles.items()))


def massive_text(measured: Norms | None) -> str:
    if measured is None:
        return ""
    massive = measured.massive
    if not massive.rows:
        return f"No row is massive: none has a norm above {MASSIVE:g} times the median."
    rows = f"{count(massive.rows)} of {count(massive.of)} rows have a norm above {MASSIVE:g} times the median."
    return f"{rows} {massive.text}." if massive.text else f"{rows} They hold little of the variance."


def sample_text(numbers: StoreNumbers) -> str:
    if numbers.sampled == numbers.shards:
        return ""
    return f"Norms are over {count(numbers.sampled)} of {count(numbers.shards)} shards, evenly spread."


def store_plots(counted: HookNumbers | None) -> tuple[StorePlot, ...]:
    if counted is None:
        return ()
    return position_plot(counted.by_position), dimension_plot(counted.statistics)


def position_plot(norms: Sequence[float]) -> StorePlot:
    drawing = line_plot(norms, [0], f"Mean norm at each of {len(norms)} positions")
    caption = "The mean norm at each position of a context. The point is position 0."
    return StorePlot("Norm by position", drawing, caption)


def dimension_plot(statistics: Statistics) -> StorePlot:
    """The root mean square of each dimension, as a multiple of the median dimension's."""
    found = outlying(statistics)
    rms = np.sqrt(statistics.variance + statistics.mean**2)
    ratios = (rms / max(float(np.median(rms)), np.finfo(np.float64).tiny)).tolist()
    drawing = stem_plot(ratios, OUTLYING, list(found)[:NAMED], f"Root mean square of {len(ratios)} dimensions")
    named = ", ".join(f"{dim} ({times(ratio)})" for dim, ratio in list(found.items())[:NAMED])
    what = f"{len(found)} of {count(len(ratios))} dimensions are outlying: {named}." if found else "None is outlying."
    caption = f"{what} A dimension is outlying above {OUTLYING:g} times the median."
    more = " Of neighbouring dimensions, the largest is drawn." if len(ratios) > POINTS else ""
    return StorePlot("Root mean square by dimension", drawing, caption + more)


def key_facts(spec: StoreSpec) -> tuple[Fact, ...]:
    """The parts of the key: what two stores must have in common to hold the same rows in the same order and format."""
    model, corpus = spec.model, spec.corpus
    return (
        Fact("Store format", str(spec.format_version)),
        Fact("Model", str(model.get("commit") or ABSENT)),
        Fact("Computed in", str(model.get("dtype") or ABSENT)),
        Fact("Attention", str(model.get("attention") or ABSENT)),
        Fact("Weight processing", str(model.get("weight_processing") or ABSENT)),
        Fact("Tokenizer", str(spec.tokenizer.get("blake2b") or ABSENT)),
        Fact("Special ids", ids_text(spec.special_ids)),
        Fact("BOS id", ABSENT if spec.bos_id is None else str(spec.bos_id)),
        Fact("Context", count(spec.context)),
        Fact("Skipped positions", str(spec.skip_positions)),
        Fact("Documents shuffled", "yes" if corpus.get("shuffled") else "no"),
        Fact("Bad documents", str(corpus.get("on_bad_document") or ABSENT)),
        Fact("Seed", str(spec.seed)),
        Fact("Stored as", f"{spec.dtype}, {spec.codec}"),
        Fact("Rows of a chunk, of a shard", f"{count(spec.chunk_rows)}, {count(spec.shard_rows)}"),
    )


def ids_text(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return (", ".join(map(str, ids[:8])) or "none") + more


def provenance_tree(row: StoreRow, numbers: StoreNumbers, origin: StoreOrigin | None) -> ProvenanceNode:
    """The store, what wrote it, and the model, the corpus and the other stores that it was written from."""
    spec, record = numbers.spec, numbers.record
    tokenizer = ProvenanceNode("Tokenizer", (Fact("Digest", str(spec.tokenizer.get("blake2b") or ABSENT)),))
    model = ProvenanceNode(f"Model {row.model}", (Fact("Commit", str(spec.model.get("commit") or ABSENT)),))
    corpus = ProvenanceNode(f"Corpus {row.corpus}", corpus_facts(spec.corpus), (tokenizer,))
    versions = record.get("versions")
    known = versions if isinstance(versions, dict) else {}
    facts = [
        Fact("Command", str(record.get("command") or "not recorded")),
        Fact("Begun", str(record.get("started") or ABSENT)),
        Fact("Versions", ", ".join(f"{name} {known[name]}" for name in VERSIONS if known.get(name)) or ABSENT),
        Fact("Code", git_text(record.get("git"))),
    ]
    donors = tuple(ProvenanceNode(f"Parts of {name}", (), (), f"/stores/{quote(name)}") for name in lenders(origin))
    job = ProvenanceNode(f"Job {origin.job}", (), (), f"/jobs/{origin.job}") if origin else None
    harvest = ProvenanceNode("Harvest", tuple(facts), (*([job] if job else []), model, corpus, *donors))
    return ProvenanceNode(f"Store {row.id}", (Fact("Key", row.key), Fact("Spec", row.spec_id or ABSENT)), (harvest,))


def lenders(origin: StoreOrigin | None) -> tuple[str, ...]:
    return origin.donors if origin else ()


def corpus_facts(corpus: Mapping[str, Any]) -> tuple[Fact, ...]:
    source = corpus.get("source")
    about = source if isinstance(source, dict) else {}
    facts = [Fact("Source", short_value(about))] if about else []
    facts += [Fact("Documents", count(corpus["documents"]))] if isinstance(corpus.get("documents"), int) else []
    return (*facts, Fact("Token ids", str(corpus.get("ids_blake2b"))))


def short_value(value: object, longest: int = 240) -> str:
    """A JSON value in one line, cut where it is long."""
    if isinstance(value, dict):
        text = ", ".join(f"{key} {short_value(item, 80)}" for key, item in list(value.items())[:12] if item is not None)
    elif isinstance(value, list):
        text = "; ".join(short_value(item, 120) for item in value[:3]) + (" …" if len(value) > 3 else "")
    else:
        text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def git_text(git: object) -> str:
    if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
        return ABSENT
    return str(git["commit"])[:12] + (" with changes" if git.get("changed") else "")


def train_command(place: str, hook: str) -> str:
    """The command that trains on one hookpoint of the store. Ids and hookpoints need no quotes in a shell."""
    return f"sagsae train --store {shlex.quote(place)} --hook {hook} --arch sa-gsae:4096"


def python_snippet(url: str, numbers: StoreNumbers) -> str:
    width = numbers.spec.hookpoints[numbers.hook].d_in
    return "\n".join(
        (
            "from shared.store.opened import Store",
            "from train.measure.examples import counted_rows",
            "",
            f'store = Store.open("{url}")',
            f'for rows, places in counted_rows(store, "{numbers.hook}"):',
            f"    print(rows.shape, rows.mean())   # [n, {width}] float32, and the token of each row",
            "    break",
        )
    )


def reader_facts(readers: Sequence[StoreReader], now: float) -> tuple[Fact, ...]:
    """Who leased the store, and when."""
    return tuple(Fact(each.holder, "reads it now" if each.reads else ago(each.since, now)) for each in readers)


def texts_view(found: Mapping[str, Any] | None) -> TextsView:
    """What the planner's process decoded; None while it still does."""
    if found is None:
        return TextsView(note="The texts are being decoded. Reload the page in a moment.", pending=True)
    note = f"The token ids are shown, because there is no text: {found['note']}" if found["note"] else ""
    return TextsView(tuple(context_line(each) for each in found["contexts"]), note)


def context_line(found: Mapping[str, Any]) -> ContextLine:
    text = " ".join(map(str, found["ids"])) if found["text"] is None else str(found["text"])
    return ContextLine(int(found["context"]), printable(text[:TEXT_LETTERS]), len(text) > TEXT_LETTERS)
