"""The commands that carry autoencoders to other tools and back."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import typer

from shared.command.commands import command
from shared.command.main import show
from shared.command.options import OptionsFrom, resolve
from shared.command.parameters import Json, SavedPlace

if TYPE_CHECKING:
    from train.exchange.export import Exported

GROUP: Final = "Exchange"


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to the command line."""

    @command(app, group=GROUP, settings=OptionsFrom("export"))
    def export(context: typer.Context, source: SavedPlace, as_json: Json = False) -> None:
        """Write autoencoders as files that another tool loads.

        The files need nothing of sagsae, and compute the same function. A signed latent becomes two latents there, i
        and i + d_sae.

        $ sagsae export runs/three --to saelens --out exported
        $ sagsae export runs/three/sa-gsae-512-lambda0.1-seed0 --to dictionary-learning --out exported
        """
        config = resolve(context, source=source)
        from train.exchange.export import export as run

        done = run(config)
        show([plain(each) for each in done], as_json, partial(print_exported, done))


def plain(exported: "Exported") -> dict[str, Any]:
    return {**dataclasses.asdict(exported), "folder": str(exported.folder)}


def print_exported(done: "list[Exported]") -> None:
    for each in done:
        typer.echo(f"{each.folder}: {each.name} for {each.tool} ({each.form}, {each.width:,} latents)")
        for note in each.notes:
            typer.echo(f"  {note}")
