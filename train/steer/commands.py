"""The commands that steer a language model with a latent, and test whether that works."""

import typer

from shared.command.commands import command
from shared.command.main import show
from shared.command.options import OptionsFrom, resolve
from shared.command.parameters import Json, RunFolder


def add_commands(app: typer.Typer, group: str) -> None:
    """Adds the commands to the command line."""

    @command(app, group=group, settings=OptionsFrom("steer"))
    def steer(context: typer.Context, run: RunFolder, as_json: Json = False) -> None:
        """Let the language model continue a text with one latent set to other values.

        Below it stands what the change does to the next token. With --contexts it is measured on held-out text instead.

        $ sagsae steer runs/three --latent 214 --prompt "In the morning"
        $ sagsae steer runs/three --latent 214 --dial=-2,2 --mode add --contexts 64
        """
        config = resolve(context, run=run)
        from train.steer.steer import steer as turn

        found = turn(config)
        show(found.document(), as_json, found.print)

    @command(app, group=group, settings=OptionsFrom("dial"))
    def dial(context: typer.Context, run: RunFolder, as_json: Json = False) -> None:
        """Test whether the values of latents steer the next tokens more than control directions do.

        It writes RUN/features/NAME/dial.json. A verdict needs 40 control directions.

        $ sagsae dial runs/three --latents 50
        $ sagsae dial runs/three --latent 214 --latent 31
        """
        config = resolve(context, run=run)
        from train.steer.dial import dial as test
        from train.steer.wording import print_dial

        done = test(config)
        document = {"file": str(done.file), **done.found.model_dump(mode="json")}
        show(document, as_json, lambda: print_dial(done.file, done.found, done.encoder))
