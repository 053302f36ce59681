"""Options and arguments that no schema has."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def at_home(text: str) -> Path:
    """A path, with a `~` that the shell left alone."""
    return Path(os.path.expanduser(text))


def say_version(asked: bool) -> None:
    if asked:
        from shared.record import version

        names = ("sagsae", "torch", "transformer-lens")
        typer.echo(", ".join(f"{name} {version(name)}" for name in names))
        raise typer.Exit


def flag(name: str, text: str) -> Any:
    return typer.Option(name, help=text)


def value(metavar: str, text: str, **more: Any) -> Any:
    return typer.Option(metavar=metavar, help=text, **more)


def at_least(kind: type, least: Any) -> Callable[[Any], Any]:
    """A parser of numbers."""

    def parse(text: Any) -> Any:
        try:
            found = kind(text)
        except ValueError as error:
            raise typer.BadParameter(f"must be a {'whole ' if kind is int else ''}number (got {text!r})") from error
        if not found >= least:
            raise typer.BadParameter(f"must be {least:g} or more (got {text})")
        return found

    return parse


def argument(metavar: str, text: str, **more: Any) -> Any:
    return typer.Argument(metavar=metavar, help=text, **more)


Version = Annotated[
    bool,
    typer.Option("--version", callback=say_version, is_eager=True, help="Print the versions.", show_default=False),
]
Json = Annotated[bool, flag("--json", "Print one JSON document and nothing else on stdout.")]
Yes = Annotated[bool, flag("--yes", "Do not ask.")]
PlanOnly = Annotated[bool, flag("--plan", "Print what answering takes, and do nothing.")]
DryRun = Annotated[bool, flag("--dry-run", "Measure one batch, print what the whole would take, write nothing.")]
Processes = Annotated[
    int,
    value("INTEGER", "Processes on this machine, one per GPU.", parser=at_least(int, 1), rich_help_panel="Computation"),
]
Service = Annotated[
    str | None,
    value(
        "URL",
        "The activation cache to ask, http://HOST:PORT.",
        show_default="SAGSAE_SERVICE",
        rich_help_panel="The cache",
    ),
]
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait for the service's job, and show its progress.", rich_help_panel="The cache")
]
Follow = Annotated[bool, flag("--follow", "Print what is added until the job ends.")]
Force = Annotated[bool, flag("--force", "Delete it although it is pinned or leased; needs the admin's token.")]
JobNumber = Annotated[int, argument("JOB", "The number of a job.", min=1)]
JobStates = Annotated[str | None, value("STATE", "Only jobs in this state.", show_default="all")]
StoreId = Annotated[str, argument("STORE", "The store's id, as `sagsae store ls --service URL` lists it.")]
PinName = Annotated[str, argument("NAME", "The pin's name; a store may have several.")]
Rounds = Annotated[int, value("INTEGER", "Rounds that medians are taken over.", parser=at_least(int, 1))]
Every = Annotated[float, value("SECONDS", "Seconds between looks.", parser=at_least(float, 0.1))]
OutFolder = Annotated[Path, value("PATH", "The folder for everything.", parser=at_home)]
Scratch = Annotated[Path | None, value("PATH", "Where to write.", parser=at_home, show_default="a temporary folder")]
Full = Annotated[bool, flag("--full/--quick", "Decode every chunk, or only checksum the files.")]
Repair = Annotated[bool, flag("--repair", "Drop damaged shards; the next sagsae harvest writes them again.")]
Hidden = Annotated[str, typer.Option(hidden=True)]
StorePlace = Annotated[str, argument("STORE", "A store: a folder or a URL.")]
StoreFolder = Annotated[
    str | None, argument("FOLDER", "A folder (or URL) that holds stores.", show_default="stores, or the service")
]
Source = Annotated[str, argument("SOURCE", "A finished store.")]
Target = Annotated[str, argument("TARGET", "The new store: a folder or an s3:// URL.")]
RunFolder = Annotated[Path, argument("RUN", "A training run's folder.", parser=at_home)]
RunOrPage = Annotated[
    Path, argument("RUN", "A training run's folder, or the folder of one page, RUN/features/NAME.", parser=at_home)
]
RunOrNone = Annotated[
    Path | None, argument("RUN", "A training run's folder.", parser=at_home, show_default="none, with --sae")
]
RunFolders = Annotated[list[Path], argument("RUN", "Folders of evaluated runs.", parser=at_home)]
SavedPlace = Annotated[
    Path, argument("RUN", "A training run, RUN/NAME of one autoencoder, or an autoencoder's folder.", parser=at_home)
]
ForeignPlace = Annotated[Path, argument("SOURCE", "The other tool's folder or file.", parser=at_home)]
PushSource = Annotated[str, argument("SOURCE", "A run, RUN/SAE, an autoencoder's folder, or a finished store.")]
HubSource = Annotated[str, argument("OWNER/NAME[/SAE]", "A repository of the hub, or one autoencoder in it.")]
Names = Annotated[list[str] | None, argument("NAME", "A command (train, store recode, …) or an architecture.")]
Pages = Annotated[Path, argument("FOLDER", "Where settings.md and cli.md are.", parser=at_home)]
