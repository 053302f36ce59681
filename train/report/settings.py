"""Puts runs together for comparison.

Autoencoders are compared within a *setting* only: runs that are alike in all that decides a result (comparable.py).
Runs of one setting (more λ, more seeds) share its figures; another setting gets a section of its own, which says in
what it differs. An autoencoder that was trained twice counts once: a repetition is no seed. An evaluation without a run
(`sagsae eval --sae`) stands beside every setting that was measured on the same tokens, else in a section of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.saes import ARCHITECTURES
from shared.store.norms import WORTH_SAYING, share
from train.measure.useless import useless
from train.report import wording
from train.report.answer import Answer, Series, answer
from train.report.comparable import identity, same_tokens
from train.report.data import ReportedRun
from train.report.figures import Figure, figures
from train.report.naming import folder_names
from train.report.sae import MeasuredSAE

IN_A_TITLE = 3
"""Run folders that a section's title names."""


@dataclass(frozen=True)
class ReportSection:
    """One setting, ready for the page."""

    name: str
    title: str
    facts: tuple[tuple[str, str], ...]
    answer: Answer
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    runs: tuple[ReportedRun, ...]


Pairs = list[tuple[MeasuredSAE, ReportedRun]]


def sections(runs: Sequence[ReportedRun]) -> list[ReportSection]:
    """One for each setting, in the order in which the runs were named."""
    groups = grouped(runs)
    if len(groups) == 1:
        return [_section("setting-1", " · ".join(_site(groups[0][0])), groups[0])]
    names = folder_names([run.folder for run in runs])
    several = len({_site(run) for run in runs}) > 1
    return [
        _section(f"setting-{number}", _title(group, names, several), group) for number, group in enumerate(groups, 1)
    ]


def grouped(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """The runs of each setting, in the order in which they were named."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in sorted(runs, key=lambda run: not run.trained):
        beside = [] if run.trained else [group for group in groups.values() if joins(run, group)]
        for group in beside:
            group.append(run)
        if not beside:
            groups.setdefault(identity(run), []).append(run)
    return list(groups.values())


def joins(evaluation: ReportedRun, group: Sequence[ReportedRun]) -> bool:
    """Whether an evaluation without a run stands beside the runs of a setting."""
    return group[0].trained and same_tokens(evaluation, group[0])


def _site(run: ReportedRun) -> tuple[str, str]:
    return run.model, run.hook


def in_order(saes: Iterable[MeasuredSAE]) -> list[MeasuredSAE]:
    """In the order of the registry, SA-GSAE first, then by width, variant, λ and seed."""
    order = list(ARCHITECTURES)
    return sorted(saes, key=lambda sae: (order.index(sae.arch), sae.key, sae.knob, sae.seed or 0))


def measured(run: ReportedRun) -> list[MeasuredSAE]:
    """The run's autoencoders in order, each saying on how many tokens it was measured, if only by its run."""
    filled = []
    for sae in in_order(run.saes):
        tokens = run.evaluation.tokens if sae.tokens is None else sae.tokens
        missing = sae.ce_tokens is None and sae.ce_spliced is not None
        ce_tokens = run.evaluation.ce_tokens if missing else sae.ce_tokens
        filled.append(sae.model_copy(update={"tokens": tokens, "ce_tokens": ce_tokens}))
    return filled


def _title(runs: Sequence[ReportedRun], names: Mapping[Path, str], several: bool) -> str:
    """Names one of several settings by its run folders; by model and hookpoint too where the page has several."""
    told = [names[run.folder] for run in runs]
    rest = [f"and {len(told) - IN_A_TITLE} more"] if len(told) > IN_A_TITLE else []
    return " · ".join([", ".join([*told[:IN_A_TITLE], *rest]), *(_site(runs[0]) if several else ())])


def once(pairs: Pairs) -> tuple[Pairs, list[str]]:
    """Each autoencoder of a setting once, the first of its kind; and of each repetition a sentence."""
    first: dict[Any, tuple[MeasuredSAE, ReportedRun]] = {}
    said = []
    for sae, run in pairs:
        kept, owner = first.setdefault((sae.key, sae.knob, sae.seed), (sae, run))
        if kept is sae:
            continue
        same = (kept.r2, kept.l0) == (sae.r2, sae.l0)
        if not run.trained:
            said.append(f"{sae.name} was measured in {owner.folder} and in {run.folder}: the first alone counts.")
            continue
        how = "with the same result" if same else f"and ended at another R² ({_number(kept.r2)} and {_number(sae.r2)})"
        said.append(
            f"{sae.name} was trained in {owner.folder} and in {run.folder} with the same settings and seed, {how}. "
            "That is no other seed: the first alone is in the figures and means."
        )
    return list(first.values()), said


def _number(value: float | None) -> str:
    return wording.fixed(value, 4)


def _section(name: str, title: str, runs: Sequence[ReportedRun]) -> ReportSection:
    pairs, repeated = once([(sae, run) for run in runs for sae in measured(run)])
    saes = in_order(sae for sae, _ in pairs)
    series: Series = {}
    for sae in saes:
        series.setdefault(sae.key, []).append(sae)
    curves = [(sae, run.curves[sae.name]) for sae, run in pairs if sae.name in run.curves]
    curves.sort(key=lambda pair: saes.index(pair[0]))
    return ReportSection(
        name=name,
        title=title,
        facts=_facts(runs, saes),
        answer=answer(series),
        figures=tuple(figures(series, curves, name)),
        notes=(*_notes(runs, saes), *repeated),
        runs=tuple(runs),
    )


def _notes(runs: Sequence[ReportedRun], saes: Sequence[MeasuredSAE]) -> list[str]:
    """What a figure cannot show, so that nothing is left out in silence."""
    notes = [*_massive(runs), *(f"{line}." for line in useless([sae.model_dump() for sae in saes]))]
    silent = sum(not sae.l0 for sae in saes)
    if silent:
        notes.append(
            f"{silent} of {len(saes)} autoencoders {'has' if silent == 1 else 'have'} no L0 above zero, and no "
            "place in the figures. The table has every autoencoder."
        )
    if any(sae.ce_spliced is None for sae in saes):
        who = "any" if all(sae.ce_spliced is None for sae in saes) else "every"
        notes.append(f"Cross-entropy was not measured for {who} autoencoder here.")
    predictions = {sae.ce_tokens for sae in saes if sae.ce_spliced is not None}
    if len(predictions) > 1:
        notes.append(
            f"Cross-entropy was measured on {wording.span(predictions)} tokens: compare equal counts only, or measure "
            "again with one `--ce-tokens`."
        )
    if any(sae.directions and sae.directions.sampled for sae in saes):
        notes.append("Antipodal pairs of wide dictionaries are estimated from a sample of their directions.")
    notes += [
        f"{name} diverged: its loss is no number since step {step}. It was not measured and is nowhere on this page."
        for run in runs
        for name, step in run.diverged.items()
    ]
    unlogged = [run.folder for run in trained_in(runs) if not run.curves]
    notes += [f"{folder} has no metrics.jsonl, so no training curves." for folder in unlogged]
    notes += [_guest(sae, run) for run in runs if not run.trained for sae in run.saes]
    return notes


def trained_in(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """The runs among them; not the evaluations without one."""
    return [run for run in runs if run.trained]


def _guest(sae: MeasuredSAE, run: ReportedRun) -> str:
    """What a reader must know of an autoencoder that was not trained in a run of this section."""
    source = (
        f"was imported from {sae.imported.tool} ({sae.imported.source})" if sae.imported else "was trained elsewhere"
    )
    text = f"{sae.name} {source}."
    made_for = sae.made_for
    if made_for and made_for.hook_name and made_for.hook_name != run.store.get("hook_name"):
        text += f" It was made for {made_for.hook_name}."
    if made_for and made_for.model and made_for.model != run.model:
        text += f" Its language model is {made_for.model}."
    return f"{text} It was measured on the same tokens as the others here, and may have been trained on them."


def _massive(runs: Sequence[ReportedRun]) -> list[str]:
    """The runs of a setting were measured on the same rows; an older evaluation does not say it."""
    evaluation = next((run.evaluation for run in runs if run.evaluation.massive), runs[0].evaluation)
    found, left_out = evaluation.massive, evaluation.left_out
    if found is None or not found.tokens:
        return []
    counted = evaluation.tokens + left_out
    text = (
        f"{found.tokens:,} of {counted:,} held-out tokens ({share(found.tokens / counted)}) have a norm above "
        f"{found.times_median:g} times the median"
    )
    if found.variance is not None:
        text += f" and hold {share(found.variance)} of the variance"
    if left_out:
        return [f"{text}. max_norm left {left_out:,} out of training and of all numbers here."]
    if found.variance is not None and found.variance >= WORTH_SAYING:
        text += ", and weigh as much in R²"
    return [f"{text}. R² on the other tokens is beside it."]


def _facts(runs: Sequence[ReportedRun], saes: Sequence[MeasuredSAE]) -> tuple[tuple[str, str], ...]:
    """What a reader wants to know before any number."""
    trained = trained_in(runs)
    records = [run.record for run in trained or runs]
    guests = len(saes) - sum(sae.origin == "" for sae in saes)
    dimensions = "" if runs[0].d_in is None else f", {runs[0].d_in:,} dimensions"
    seconds = [float(record["seconds"]) for record in records if isinstance(record.get("seconds"), int | float)]
    return (
        ("Model", runs[0].model),
        ("Hookpoint", runs[0].hook + dimensions),
        ("Store", _distinct(run.rows for run in runs)),
        ("Trained on", wording.tokens(run.tokens_trained for run in trained) if trained else "other data"),
        ("Measured on", wording.tokens((sae.tokens for sae in saes), "held-out tokens")),
        ("Autoencoders", _counted(len(saes) - guests, len(trained), guests)),
        ("Device", _distinct(_device(record) for record in records)),
        ("Training time", wording.duration(sum(seconds)) if seconds else "not recorded"),
        ("Started", _distinct(_date(record.get("started")) for record in records)),
        ("Version", _distinct(_version(record) for record in records)),
    )


def _counted(own: int, runs: int, guests: int) -> str:
    """`6`, `12 in 2 runs`, `6, and 1 from elsewhere`."""
    here = f"{own}" + (f" in {runs} runs" if runs > 1 else "")
    return here if not guests else f"{here}, and {guests} from elsewhere" if own else f"{guests} from elsewhere"


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text)) or "not recorded"


def _device(record: dict[str, Any]) -> str:
    return ", ".join(str(record[key]) for key in ("device", "precision") if record.get(key))


def _version(record: dict[str, Any]) -> str:
    versions = record.get("versions")
    version = versions.get("sagsae") if isinstance(versions, dict) else None
    return f"sagsae {version}" if version else ""


def _date(started: object) -> str:
    """`2026-11-22T10:26:00+00:00` -> `22 Nov 2026, 10:26 UTC`; anything else as it is."""
    try:
        moment = datetime.fromisoformat(str(started))
    except ValueError:
        return str(started or "")
    return f"{moment.day} {moment:%b %Y, %H:%M %Z}".strip()
