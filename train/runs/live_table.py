"""The table of autoencoders that a terminal shows under the progress bar, from the newest line of metrics.jsonl."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from shared.command.tables import share

OTHER_LINES: Final = 6
"""Lines of the screen that are not rows: the bar, the title, the column names, "and N more", the prompt."""


class LiveTable:
    """Shows as many autoencoders as fit on the screen, in the run's order. R² is 1 - FVU of the newest batch."""

    def __init__(self, names: Sequence[str], steps: int) -> None:
        self.names, self.steps = names, steps
        self.line: dict[str, Any] | None = None
        self.diverged: dict[str, str] = {}
        """For each autoencoder whose loss became NaN or infinite, the text that says when this was seen."""

    def update(self, line: dict[str, Any]) -> None:
        """Takes a line of metrics.jsonl to which `tokens_per_second` and `waiting_for_data` were added."""
        for name in self.names:
            values = line["saes"].get(name)
            if values is None:
                self.diverged.setdefault(name, "diverged")
            elif not math.isfinite(values["loss"]):
                self.diverged.setdefault(name, f"diverged by step {line['step']:,}")
        self.line = line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        if self.line is None:
            return
        line, room = self.line, max(1, console.height - OTHER_LINES)
        title = (
            f"step {line['step']:,} of {self.steps:,}, epoch {line['epoch']:.2f}, lr {line['lr']:.2g}, "
            f"{line['tokens_per_second']:,.0f} tokens/s, {share(line['waiting_for_data'])} waiting for data"
        )
        yield Text(title)
        table = Table(box=None, pad_edge=False)
        table.add_column("autoencoder", overflow="fold")
        for column in ("R²", "L0", "dead", "λ"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("")
        for name in self.names[:room]:
            table.add_row(Text(name), *self.cells(name, line["saes"]))
        yield table
        if len(self.names) > room:
            yield Text(f"and {len(self.names) - room} more", style="dim")

    def cells(self, name: str, saes: dict[str, dict[str, float]]) -> list[Text]:
        """Returns the cells of one autoencoder: R², L0, dead latents, λ, and when it diverged."""
        if name in self.diverged:
            return [*(Text("–") for _ in range(4)), Text(self.diverged[name], style="bold red")]
        values = saes[name]
        numbers = (
            f"{1 - values['fvu']:.4f}",
            f"{values['l0']:.1f}",
            share(values["dead_fraction"]),
            f"{values['lambda']:.3g}",
        )
        return [*(Text(number) for number in numbers), Text("")]
