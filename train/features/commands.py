"""The commands that look at what the latents of an autoencoder fire on."""

import dataclasses
import sys
from functools import partial
from typing import TYPE_CHECKING

import typer

from shared.command.commands import command
from shared.command.main import agrees, show
from shared.command.options import OptionsFrom, resolve
from shared.command.parameters import Json, Processes, RunFolder, RunOrNone
from shared.command.start import in_processes
from shared.launch import is_helper

if TYPE_CHECKING:
    from train.explain.run import ExplainSummary
    from train.features.writers.neuronpedia import NeuronpediaExport


def add_commands(app: typer.Typer, script: str, group: str) -> None:
    """Adds the commands to the command line. `script`: what several processes are started with."""

    @command(app, group=group, settings=OptionsFrom("features"))
    def features(
        context: typer.Context, run: RunOrNone = None, processes: Processes = 1, as_json: Json = False
    ) -> None:
        """Find what every latent of an autoencoder fires on, for both of its poles.

        One pass over the run's store, without the language model. It writes RUN/features/NAME/: Parquet files with
        counts, the strongest contexts, drawn firings, tokens, the logit lens and what fires together; and a page,
        index.html, that shows both poles of every latent. Without RUN it takes an autoencoder of any kind, trained here
        or imported, and a store that fits.

        $ sagsae features runs/three --sae sa-gsae-512-lambda0.1-seed0
        $ sagsae features runs/three --tokens 1000000 --processes 4
        $ sagsae features --sae imported/gpt2-8 --store stores/gpt2 --hook resid_pre --out features/gpt2-8
        $ sagsae features runs/three --export neuronpedia --creator NAME --out exported
        """
        config = resolve(context, run=run)
        if config.export is not None:
            from train.features.writers.neuronpedia import export_features

            written = export_features(config)
            show(
                {**dataclasses.asdict(written), "folder": str(written.folder)}, as_json, partial(print_export, written)
            )
            return
        in_processes(processes, script)
        from train.features.run import features as find

        done = find(config)
        if not is_helper():
            text = f"{done.folder}: {done.sae}, {done.rows:,} rows, L0 {done.l0:.4g}\nLook at it: {done.page.resolve()}"
            document = {**dataclasses.asdict(done), "folder": str(done.folder), "page": str(done.page)}
            show(document, as_json, lambda: typer.echo(text))

    @command(app, group=group, settings=OptionsFrom("explain"))
    def explain(context: typer.Context, run: RunFolder, as_json: Json = False) -> None:
        """Let a language model say what latents fire on, and test what it says.

        It sends texts of the store to --endpoint: first some windows in which a pole fires, then questions about other
        windows. Without --endpoint it prints the number of calls and tokens, and sends nothing.

        $ sagsae explain runs/three
        $ sagsae explain runs/three --endpoint http://127.0.0.1:8000/v1 --model qwen --latents 50
        """
        config = resolve(context, run=run)
        from train.explain.run import explain as ask

        asks = sys.stdin.isatty() and sys.stderr.isatty()
        done = ask(config, agrees if asks else None)
        show({**dataclasses.asdict(done), "file": str(done.file)}, as_json, partial(print_explained, done))


def print_export(done: "NeuronpediaExport") -> None:
    typer.echo(f"{done.folder}: {done.features:,} features and {done.activations:,} activations of {done.source}")
    if not done.lens:
        typer.echo("  they have no logit lens: no tokens that a feature raises or lowers")


def print_explained(done: "ExplainSummary") -> None:
    typer.echo(f"{done.file}: {done.explained:,} of {done.poles:,} poles explained, {done.calls:,} calls made")
    for test, words in (("detection", "fires in a window"), ("fuzz", "fires on a token"), ("poles", "which pole")):
        if test in done.means:
            figures = f"{done.means[test]:.3f}, lexical rule {done.means[f'{test}_rule']:.3f}"
            typer.echo(f"  {words}: balanced accuracy {figures} ({done.means[f'{test}_count']:,})")
    if done.failed:
        typer.echo(f"  {done.failed:,} poles failed; the same command asks again")
