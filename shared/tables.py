"""What commands print for people: short texts, and tables that are as wide as what they hold."""

from typing import Any


def harvest_text(summary: Any) -> str:
    lines = [f"{summary.store}: {summary.tokens:,} tokens"]
    lines += [
        f"  {path}: d_in {h['d_in']}, {h['bytes'] / 1e6:.1f} MB, ratio {h['ratio']}"
        for path, h in summary.hookpoints.items()
    ]
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


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def print_saes(title: str, saes: list[dict[str, Any]]) -> None:
    """The numbers of every autoencoder, narrow enough for 80 columns; --json has all of them unrounded."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}%"

    rows = [
        {
            "arch": sae["arch"],
            "width": sae["d_sae"],
            "λ": f"{sae['sparsity']:g}" if sae["sparsity"] is not None else f"k {sae['k']}",
            "seed": sae["seed"],
            "R²": f"{sae['r2']:.4f}",
            "L0": f"{sae['l0']:.1f}",
            "L0+": f"{sae['l0_pos']:.1f}",
            "L0-": f"{sae['l0_neg']:.1f}",
            "dead": share(sae["dead_fraction"]),
            "CE rec.": share(sae["ce_recovered"]),
            "tokens": sae["tokens"],
        }
        for sae in saes
    ]
    print_table(title, rows)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Columns as wide as what they hold; the first is text, the others are set to the right where they are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for column, first in (rows[0] if rows else {}).items():
        numeric = isinstance(first, int | float) or str(first)[:1].isdigit()
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text("–" if value is None else str(value)) for value in row.values()))
    Console(width=max(Console().width, 110)).print(table)  # a cell that is cut off is worth less than a long line
