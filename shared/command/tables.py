"""What commands print for people: short texts, and tables that are as wide as what they hold."""

import re
import sys
from collections.abc import Iterable
from typing import Any

from shared.progress import duration


def harvest_text(summary: Any) -> str:
    lines = [f"{summary.store}: {summary.tokens:,} tokens"]
    lines += [
        f"  {path}: d_in {h['d_in']}, {h['bytes'] / 1e6:.1f} MB, ratio {h['ratio']}"
        for path, h in summary.hookpoints.items()
    ]
    return "\n".join(lines)


def request_text(found: Any) -> str:
    """A plan in words, or the folders of an answer: one line for each, with its hookpoints where there are several."""
    if hasattr(found, "text"):
        return str(found.text)
    hooks: dict[str, list[str]] = {}
    for hook, place in found.hookpoints.items():
        hooks.setdefault(place.file or place.url or place.store, []).append(hook)
    return "\n".join(hooks) if len(hooks) == 1 else "\n".join(f"{at}  {' '.join(of)}" for at, of in hooks.items())


def recode_text(done: Any, source: str) -> str:
    ratio = done.bytes_after / max(1, done.bytes_before)
    return f"{done.store}: {done.tokens:,} tokens, {done.codec}, {ratio:.3f} times the size of {source}"


def verify_text(document: dict[str, Any]) -> str:
    damage, again = document["damage"], document["to_harvest"]
    found = f"{len(damage)} damaged files" if damage else "no damage"
    lines = [*damage, f"{document['store']}: {document['shards']} of {document['of_shards']} shards committed, {found}"]
    if again:
        lines.append(f"shards {again} are to be written again: run the same sagsae harvest command once more")
    return "\n".join(lines)


def trial_text(trial: Any) -> str:
    many = f"{trial.tokens:,}" if trial.tokens else "a million"
    free = "" if trial.bytes_free is None else f"; {trial.bytes_free / 1e9:.3g} GB are free"
    lines = [f"{trial.store}: {many} tokens, measured on one batch"]
    lines += [
        f"  {path}: d_in {h['d_in']}, {h['bytes'] / 1e9:.3g} GB, ratio {h['ratio']}"
        for path, h in trial.hookpoints.items()
    ]
    lines += [
        f"  {trial.bytes_to_write / 1e9:.3g} GB to write{free}{': too little' if trial.fits is False else ''}",
        f"  the model gives {trial.model_tokens_per_second:,.0f} tokens/s, the codec takes "
        f"{trial.codec_tokens_per_second:,.0f}",
    ]
    if trial.seconds:
        lines.append(f"  about {duration(trial.seconds)} at {trial.tokens_per_second:,.0f} tokens/s")
    return "\n".join(lines)


def knob(sae: dict[str, Any]) -> str:
    """What set its number of active latents: λ by itself, k or an L0 target with their name."""
    if sae.get("k") is not None:
        return f"k {sae['k']}"
    if sae.get("l0_target") is not None:
        return f"L0 {sae['l0_target']:g}"
    return "–" if sae.get("sparsity") is None else f"{sae['sparsity']:g}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def number(value: float | None, digits: int) -> str:
    """What was not measured, or is no number, is a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def variant(sae: dict[str, Any]) -> str:
    """What its name says beyond architecture, width, λ and seed: settings that are not as they are by default."""
    found = re.search(rf"-seed{sae['seed']}-(.+)$", str(sae.get("name", "")))
    return found[1] if found else ""


def print_saes(title: str, saes: list[dict[str, Any]]) -> None:
    """The numbers of every autoencoder, narrow enough for 80 columns; --json has all of them unrounded."""
    special = any(variant(sae) for sae in saes)
    massive = any(sae.get("r2_rest") not in (None, sae["r2"]) for sae in saes)
    rows = [
        {
            "arch": sae["arch"],
            "width": sae["d_sae"],
            "λ": knob(sae),
            "seed": sae["seed"],
            "R²": number(sae["r2"], 4),
            **({"R² rest": number(sae.get("r2_rest"), 4)} if massive else {}),
            "L0": number(sae["l0"], 1),
            "L0+": number(sae["l0_pos"], 1),
            "L0-": number(sae["l0_neg"], 1),
            "dead": share(sae["dead_fraction"]),
            "CE rec.": share(sae["ce_recovered"]),
            **({"rec": share(sae["rec"]), "mcs": number(sae["mcs"], 3)} if "rec" in sae else {}),
            "tokens": sae["tokens"],
            **({"settings": variant(sae)} if special else {}),
        }
        for sae in saes
    ]
    print_table(title, rows)


def print_evaluation(title: str, saes: list[dict[str, Any]], by_peers: bool) -> None:
    """What `sagsae eval` measured; with other tools' definitions where they were asked for."""
    print_saes(title, saes)
    if by_peers:
        print_peers("\nThe same by other tools' definitions", saes)
        print_lines(["", "SAELens counts position 0 of every context too. Its line `every position` does, as well."])


def print_findings(title: str, findings: Iterable[Any]) -> None:
    """What `sagsae reproduce` found: each claim of the paper with its mark."""
    rows = [{"mark": finding.mark, "claim": finding.claim, "paper": finding.paper} for finding in findings]
    print_table(title, rows)


def print_peers(title: str, saes: list[dict[str, Any]]) -> None:
    """R², L0 and dead by other tools' definitions, ours first (`sagsae eval --peer-conventions`)."""
    rows = []
    for sae in saes:
        ours = {"r2": sae["r2"], "l0": sae["l0"], "dead": sae["dead_fraction"]}
        for tool, numbers in {"sagsae": ours, **sae["peers"]}.items():
            legacy = numbers.get("r2_legacy")
            rows.append(
                {
                    "autoencoder": sae["name"],
                    "by": tool,
                    "R²": number(numbers["r2"], 4),
                    "R² legacy": number(legacy, 4),
                    "L0": number(numbers["l0"], 1),
                    "dead": share(numbers["dead"]),
                }
            )
    print_table(title, rows)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Columns as wide as what they hold, those of numbers set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ():
        first = next((row[column] for row in rows if row[column] not in (None, "–")), "")
        numeric = isinstance(first, int | float) or str(first)[:1].isdigit()
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text("–" if value is None else str(value)) for value in row.values()))
    console = Console(width=max(Console().width, 110))  # a cell that is cut off is worth less than a long line
    console.print(Text(title, style="italic"), soft_wrap=True)  # it may be a path, which somebody copies
    console.print(table)


def print_ratios(
    title: str, rows: list[dict[str, Any]], ratios: dict[str, Any], left_out: dict[str, str] | None = None
) -> None:
    """A benchmark's figures, below them every ratio that was measured, and why something was not."""
    print_table(title, rows)
    width = max((len(name) for name in ratios), default=0)
    print_lines(f"{name:{width}} {value}" for name, value in ratios.items() if value is not None)
    print_lines(f"{name} was not measured: {why}" for name, why in (left_out or {}).items())


def print_growth(found: dict[str, Any]) -> None:
    """What `bench scale` found: each measurement, how it grows, and what grows too fast."""
    print_table("Each in a fresh process; MB of memory that is no file's, beyond the process's own", found["table"])
    print_table("Growth: exponent of the size, bytes a shard or row between the two largest", found["growth"])
    verdict = "nothing grows faster than the store" if found["holds"] else "more than is promised: see above"
    print_lines([*found["failed"], verdict])


def print_lines(lines: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def print_settings(name: str, rows: list[dict[str, Any]]) -> None:
    """The settings of a command, a table under each heading; the last column is wrapped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=max(Console().width, 110))
    for group in dict.fromkeys(row["group"] for row in rows):
        table = Table(
            title=Text(f"{name}: {group}"), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for column in ("setting", "type", "default", "meaning"):
            table.add_column(column, max_width=None if column in ("setting", "meaning") else 22)
        for row in (row for row in rows if row["group"] == group):
            default = "required" if row["required"] else row["default"]
            table.add_row(*(Text(text) for text in (row["setting"], row["type"], default, row["meaning"])))
        console.print(table)
        console.print()
