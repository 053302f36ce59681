"""The commands that carry autoencoders to other tools and back."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import typer

from shared.command.commands import command
from shared.command.main import agrees, show
from shared.command.options import OptionsFrom, resolve
from shared.command.parameters import ForeignPlace, HubSource, Json, PushSource, SavedPlace
from shared.progress import gigabytes

if TYPE_CHECKING:
    from train.exchange.bring import Imported
    from train.exchange.export import Exported
    from train.hub.pull import Pulled
    from train.hub.upload import Pushed

GROUP: Final = "Exchange"


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    commands: dict[str, Callable[..., None]] = {"export": export, "import": import_, "push": push, "pull": pull}
    for name, function in commands.items():
        command(app, name, group=GROUP, settings=OptionsFrom(name))(function)


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


def push(context: typer.Context, source: PushSource, as_json: Json = False) -> None:
    """Publish autoencoders, or a store, on the Hugging Face hub.

    It sends what the repository lacks, in one commit, and asks before anything becomes public. After a cut, repeat
    the command. The token is that of `hf auth login` or HF_TOKEN.

    $ sagsae push runs/three --repo owner/my-saes --private
    $ sagsae push stores/tiny --repo owner/my-activations
    """
    config = resolve(context, source=source)
    from train.hub.push import push as run

    asks = sys.stdin.isatty() and sys.stderr.isatty()
    done = run(config, agrees if asks else None)
    show(dataclasses.asdict(done), as_json, partial(print_pushed, done))


def pull(context: typer.Context, source: HubSource, as_json: Json = False) -> None:
    """Bring autoencoders from the Hugging Face hub, those of other tools too.

    $ sagsae pull owner/my-saes --out saes
    $ sagsae pull owner/my-saes/blocks.2.hook_resid_post/sa-gsae-512-lambda0.1-seed0 --out sae
    """
    config = resolve(context, source=source)
    from train.hub.pull import pull as run

    done = run(config)
    show([plain(each) for each in done], as_json, partial(print_pulled, done))


def print_pushed(done: "Pushed") -> None:
    if not done.files_sent:
        typer.echo(f"{done.url}: has everything already ({done.files_there:,} files); nothing was sent")
        return
    who = "private" if done.private else "public"
    there = f", {done.files_there:,} were there" if done.files_there else ""
    typer.echo(f"{done.url} ({who}): {done.files_sent:,} files sent, {gigabytes(done.bytes_sent)}{there}")
    typer.echo(f"commit {done.commit}")


def print_pulled(done: "list[Pulled]") -> None:
    for each in done:
        came = gigabytes(each.bytes) if each.bytes else "was there already"
        typer.echo(f"{each.folder}: {each.name} ({came})")
        for note in each.notes:
            typer.echo(f"  {note}")


def plain(done: "Exported | Imported | Pulled") -> dict[str, Any]:
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
