"""The command that looks at what the latents of a run fire on."""

import dataclasses

import typer

from shared.command.commands import command
from shared.command.main import show
from shared.command.options import OptionsFrom, resolve
from shared.command.parameters import Json, Processes, RunFolder
from shared.command.start import in_processes
from shared.launch import is_helper


def add_commands(app: typer.Typer, script: str, group: str) -> None:
    """Adds the command to the command line. `script`: what several processes are started with."""

    @command(app, group=group, settings=OptionsFrom("features"))
    def features(context: typer.Context, run: RunFolder, processes: Processes = 1, as_json: Json = False) -> None:
        """Find what every latent of an autoencoder fires on, for both of its poles.

        One pass over the run's store, without the language model. It writes RUN/features/NAME/: Parquet files with
        counts, the strongest contexts, drawn firings, tokens, the logit lens and what fires together; and a page,
        index.html, that shows both poles of every latent.

        $ sagsae features runs/three --sae sa-gsae-512-lambda0.1-seed0
        $ sagsae features runs/three --tokens 1000000 --processes 4
        """
        config = resolve(context, run=run)
        in_processes(processes, script)
        from train.features.run import features as find

        done = find(config)
        if not is_helper():
            text = f"{done.folder}: {done.sae}, {done.rows:,} rows, L0 {done.l0:.4g}\nLook at it: {done.page.resolve()}"
            document = {**dataclasses.asdict(done), "folder": str(done.folder), "page": str(done.page)}
            show(document, as_json, lambda: typer.echo(text))
