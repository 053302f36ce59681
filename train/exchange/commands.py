"""The commands that carry autoencoders to other tools and back."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import typer

from shared.command.commands import command
from shared.command.main import show
from shared.command.options import OptionsFrom, resolve
from shared.command.parameters import ForeignPlace, Json, SavedPlace

if TYPE_CHECKING:
    from train.exchange.bring import Imported
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

    @command(app, "import", group=GROUP, settings=OptionsFrom("import"))
    def import_(context: typer.Context, source: ForeignPlace, as_json: Json = False) -> None:
        """Bring in an autoencoder that another tool trained.

        It reads SAELens, dictionary_learning, sparsify, Gemma Scope, Llamascopium and OpenAI, and runs no code of a
        file. The folder that it writes computes the same function.

        $ sagsae import downloads/blocks.8.hook_resid_post --out imported/gpt2-8
        $ sagsae import layer_12/params.npz --model gemma-2-2b --hook blocks.12.hook_resid_post --out imported/g12
        """
        config = resolve(context, source=source)
        from train.exchange.bring import bring as run

        done = run(config)
        show(plain(done), as_json, partial(print_imported, done))


def plain(done: "Exported | Imported") -> dict[str, Any]:
    return {**dataclasses.asdict(done), "folder": str(done.folder)}


def print_exported(done: "list[Exported]") -> None:
    """Prints where each one is; notes that all have in common once, at the end."""
    shared = [note for note in done[0].notes if len(done) > 1 and all(note in each.notes for each in done)]
    for each in done:
        typer.echo(f"{each.folder}: {each.name} for {each.tool} ({each.form}, {each.width:,} latents)")
        for note in each.notes:
            if note not in shared:
                typer.echo(f"  {note}")
    for note in shared:
        typer.echo(f"all of them: {note}")


def print_imported(done: "Imported") -> None:
    place = f" of {done.model}" if done.model else ""
    typer.echo(f"{done.folder}: {done.name} from {done.tool} ({done.format}), d_in {done.d_in:,}")
    typer.echo(
        f"  reads {done.hook_name}{place}" if done.hook_name else "  the files say no hookpoint; --hook names it"
    )
    for note in done.notes:
        typer.echo(f"  {note}")
