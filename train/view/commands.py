"""The command that serves the page of a run's latents."""

import typer

from shared.command.commands import command
from shared.command.main import show
from shared.command.options import OptionsFrom, resolve
from shared.command.parameters import Json, RunOrPage


def add_commands(app: typer.Typer, group: str) -> None:
    """Adds the command to the command line."""

    @command(app, group=group, settings=OptionsFrom("view"))
    def view(context: typer.Context, run: RunOrPage, as_json: Json = False) -> None:
        """Open the page of a run's latents with the language model behind it: steer with a latent, encode a text.

        It serves on 127.0.0.1 until SIGTERM or Ctrl-C, and prints the address with its key.

        $ sagsae view runs/three
        $ sagsae view runs/three --sae sa-gsae-512-lambda0.1-seed0 --no-model
        """
        config = resolve(context, run=run)
        from train.view.run import view as serve
        from train.view.server import ServedPage

        def started(url: str, page: ServedPage) -> None:
            document = {"url": url, "folder": str(page.folder), "live": page.live is not None, "missing": page.missing}
            lack = f"\nNothing is live: {page.missing}" if page.missing else ""
            show(document, as_json, lambda: typer.echo(f"Open {url}{lack}"))

        serve(config, started)
