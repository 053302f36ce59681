"""Commands whose options are the fields of a schema: the door to typer, together with cli.py.

    @command(app, settings=OptionsFrom("harvest"))
    def harvest(context: Context, …):
        config = resolve(context)

A command's options are made from its schema (shared/command/settings.py) when its help or its arguments are asked for, so that
`sagsae --help` imports no schema. `resolve` validates what was typed over what a --config file says, and errors name
the option, the key of `--set` or the file.
"""

import contextlib
import inspect
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from shared.launch import is_helper, wait_briefly

if TYPE_CHECKING:
    from shared.command.settings import Setting
    from shared.schema import Frozen

TYPED: Final = "sagsae.typed"
"""Where a context keeps the options that were typed, by name."""
CONTEXT_SETTINGS: Final[dict[str, Any]] = {"max_content_width": 120}
"""Columns that help text fills at most."""
OPTION_COLUMN, COMMAND_COLUMN = 30, 13
"""Columns of names in front of their texts."""
Function = TypeVar("Function", bound=Callable[..., Any])


# where options come from


@dataclass(frozen=True)
class OptionsFrom:
    """Which fields of which schema become options of a command."""

    name: str
    """The schema's name in SCHEMAS."""
    only: str = ""
    """Names of the fields, with spaces. Default: all."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of this command that differ from the schema's."""
    config: bool = False
    """Whether there are --config and --set."""
    sets: bool = False
    """Whether there is --set."""

    @property
    def schema(self) -> "type[Frozen]":
        found: type[Frozen] = import_module("shared.command.settings").SCHEMAS[self.name]
        return found

    @cached_property
    def settings(self) -> "tuple[Setting, ...]":
        """What becomes an option, in the order of `--help`. Arguments are parameters of the command's function."""
        from dataclasses import replace

        from shared.command.settings import AUTOENCODERS, sae_settings, settings_of, value_words

        found: list[Setting] = []
        for each in settings_of(self.schema):
            if each.is_argument or (self.only and each.key not in self.only.split()):
                continue
            if each.key == AUTOENCODERS:
                found += sae_settings()
            elif each.key in self.defaults:
                found.append(replace(each, default=value_words(self.defaults[each.key])))
            else:
                found.append(each)
        return tuple(found)

    @cached_property
    def options(self) -> list[Any]:
        """The same as typer's parameters, none of which has a default: what is not typed is None."""
        file = self.config  # what is missing on the command line may stand in it
        parameters = [
            parameter(each.name, typer_type(each), option_of(each), each.default is None and not file)
            for each in self.settings
        ]
        if self.config:
            text = "TOML file with any of the settings."
            parameters.append(parameter("config", str, settings_option("--config", text, "PATH")))
        if self.config or self.sets:
            text = "Any setting, such as --set lr=0.01. The value is JSON or text. Repeatable."
            parameters.append(parameter("set_", list[str], settings_option("--set", text, "KEY=VALUE")))
        return made_by_typer(parameters)


def settings_option(name: str, text: str, metavar: str) -> Any:
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel="Settings", show_default=False)


def option_of(setting: "Setting") -> Any:
    return typer.Option(
        setting.option,
        help=setting.help,
        metavar=setting.metavar or None,
        rich_help_panel=setting.group,
        show_default=False,
    )


def typer_type(setting: "Setting") -> Any:
    """What typer makes of what was typed: switches, texts, lists and tuples of texts. Numbers come later, in `number`,
    so that every wrong value is told in the same words."""
    kind = setting.annotation
    if get_origin(kind) is tuple and get_args(kind)[-1] is not Ellipsis:
        return tuple[(str,) * len(get_args(kind))]  # type: ignore[misc]
    return bool if kind is bool else list[str] if setting.repeatable else str


def parameter(name: str, kind: Any, option: Any, required: bool = False) -> inspect.Parameter:
    if required:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option])
    annotation = Annotated[Union[kind, None], option]  # noqa: UP007 (made at run time)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def made_by_typer(parameters: Sequence[inspect.Parameter]) -> list[Any]:
    """Parameters of a command, as typer makes them from the signature of a function."""

    def signature(**_: Any) -> None: ...

    signature.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    signature.__annotations__ = {each.name: each.annotation for each in parameters}
    holder = typer.Typer(add_completion=False)
    holder.command()(signature)
    return list(typer.main.get_command(holder).params)


# commands


def command_group() -> typer.Typer:
    """A group of commands whose help is written here, not by typer."""
    return typer.Typer(
        cls=CommandGroup,
        context_settings=CONTEXT_SETTINGS,
        rich_markup_mode=None,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )


def command(
    app: typer.Typer,
    name: str | None = None,
    *,
    settings: OptionsFrom | None = None,
    group: str = "Commands",
    hidden: bool = False,
) -> Callable[[Function], Function]:
    """Makes a function a command of `app`, under a heading of the help text, with the settings of a schema."""
    kind = type("SagsaeCommand", (SettingsCommand,), {"options_from": settings})
    return app.command(name, cls=kind, rich_help_panel=group, hidden=hidden)


class SettingsCommand(TyperCommand):
    """A command that knows where its options come from."""

    options_from: ClassVar[OptionsFrom | None] = None

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        if self.options_from is None:
            return own
        arguments = [each for each in own if each.param_type_name == "argument"]
        return [*arguments, *self.options_from.options, *(each for each in own if each not in arguments)]

    def invoke(self, ctx: Any) -> Any:
        if self.options_from is not None:
            typed = {each.name: ctx.params.pop(each.name, None) for each in self.options_from.options}
            ctx.meta[TYPED] = {name: value for name, value in typed.items() if value not in (None, (), [])}
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_parameters(ctx, formatter, self.get_params(ctx))

    def format_help_text(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (click's signature)
        write_text(formatter, self.help or "")


class CommandGroup(TyperGroup):
    """A command of commands, which are listed under their headings."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (click's signature)
        write_text(formatter, self.help or "")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        found: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            each = self.get_command(ctx, name)
            if each is not None and not each.hidden:
                group = getattr(each, "rich_help_panel", None)
                heading = group if isinstance(group, str) else "Commands"
                text = inspect.cleandoc(each.help or "").partition("\n\n")[0]
                found.setdefault(heading, []).append((name, " ".join(text.split())))
        for heading, entries in found.items():
            write_entries(formatter, heading, entries, COMMAND_COLUMN)
        write_parameters(ctx, formatter, self.get_params(ctx))


# help text


def help_of(each: Any, name: str, width: int) -> str:
    """The help text of a command as a page of `width` columns shows it."""
    context = each.make_context(name, [], resilient_parsing=True, terminal_width=width)
    return re.sub(r"\x1b\[[0-9;]*m", "", each.get_help(context)).rstrip()


def commands_of(app: Any) -> dict[str, Any]:
    """The commands of a group that are shown, by name; none for a command."""
    return {name: each for name, each in getattr(app, "commands", {}).items() if not each.hidden}


def write_text(formatter: Any, text: str) -> None:
    """A docstring: its paragraphs wrapped, but examples, which begin with `$`, as they are."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        is_example = paragraph.startswith("$ ")
        lines = paragraph.splitlines() if is_example else textwrap.wrap(" ".join(paragraph.split()), formatter.width)
        formatter.write("\n" + "".join(f"{'  ' if is_example else ''}{line}\n" for line in lines))


def write_parameters(ctx: Any, formatter: Any, parameters: Sequence[Any]) -> None:
    """Arguments and options under their headings."""
    found: dict[str, list[tuple[str, str]]] = {}
    for each in parameters:
        if getattr(each, "hidden", False):
            continue
        is_argument = each.param_type_name == "argument"
        heading = "Arguments" if is_argument else getattr(each, "rich_help_panel", None) or "Options"
        found.setdefault(heading, []).append((left_side(each), right_side(each, ctx)))
    for heading, entries in found.items():
        write_entries(formatter, heading, entries, OPTION_COLUMN)


def left_side(each: Any) -> str:
    """`--clip-norm NUMBER`, `--[no-]directions`, `STORE`."""
    if each.param_type_name == "argument":
        return str(each.metavar or each.name.upper()) + ("..." if each.nargs == -1 else "")
    both = [f"--[no-]{name[2:]}" for name in each.opts if f"--no-{name[2:]}" in each.secondary_opts]
    names = both or [*each.opts, *each.secondary_opts]
    value = "" if getattr(each, "is_flag", False) else each.metavar or "VALUE"
    return f"{', '.join(names)} {value}".strip()


def right_side(each: Any, ctx: Any) -> str:
    """The text of a parameter with its default, which typer's own show in brackets."""
    text = each.help or ""
    shown = each.show_default
    default = each.get_default(ctx, call=False)
    if isinstance(shown, str):
        text += f" [default: {shown}]"
    elif shown and isinstance(default, bool) and getattr(each, "is_flag", False):
        text += f" [default: {switched(each, default)}]" if each.name != "help" else ""
    elif shown and default is not None and default != ():
        text += f" [default: {default}]"
    return f"{text} [required]" if each.required and not text.endswith("[required]") else text


def switched(each: Any, default: bool) -> str:
    """The state of a switch: on or off, or the name of the one of two that it is."""
    name = str(each.secondary_opts[0] if each.secondary_opts and not default else each.opts[0]).removeprefix("--")
    is_pair = each.secondary_opts and not each.secondary_opts[0].startswith("--no-")
    return name if is_pair else "on" if default else "off"


def write_entries(formatter: Any, heading: str, entries: Sequence[tuple[str, str]], column: int) -> None:
    """Names on the left, texts beside them; the text of a long name begins on the next line."""
    with section(formatter, heading):
        for name, text in entries:
            lines = textwrap.wrap(text, formatter.width - column, break_on_hyphens=False) or [""]
            if len(name) > column - 4:
                lines.insert(0, "")
            first, *rest = lines
            padding = " " * (column - 2 - len(name))
            formatter.write(f"  {coloured(name)}{padding if first else ''}{first}".rstrip() + "\n")
            for line in rest:
                formatter.write(f"{' ' * column}{line}\n")


@contextlib.contextmanager
def section(formatter: Any, heading: str) -> Iterator[None]:
    formatter.write(f"\n{typer.style(f'{heading}:', bold=True) if in_colour() else f'{heading}:'}\n")
    yield


def coloured(name: str) -> str:
    word, space, rest = name.partition(" ")
    return typer.style(word, fg=typer.colors.CYAN, bold=True) + space + rest if in_colour() else name


def in_colour() -> bool:
    """Whether help texts have colours; a pipe gets none anyway. See https://no-color.org."""
    return not os.environ.get("NO_COLOR")


# what was typed


def typed_saes(context: Any) -> dict[str, Any]:
    """The options that say which autoencoders to train, by key. `lr` is among them where it has several values."""
    settings = options_from(context).settings
    typed = context.meta[TYPED]
    found = {each.key: as_numbers(each, typed[each.name]) for each in settings if each.sae and each.name in typed}
    rates = [as_numbers(each, typed["lr"]) for each in settings if each.name == "lr" and len(typed.get("lr", ())) > 1]
    return {**found, "lr": rates[0]} if rates else found


def typed_settings(context: Any) -> dict[str, Any]:
    """What was typed of the schema's settings, by key, before it is validated."""
    return typed_values(options_from(context).settings, context.meta[TYPED])


def resolve(context: Any, **arguments: Any) -> Any:
    """The validated configuration: defaults, over them the --config file, the options with `arguments`, and --set.

    Raises UserError, which names a wrong value by the option that was typed, or by its key and where it came from.
    """
    from shared.command.grid import check_listed_saes
    from shared.schema import build, parse_set, read_toml

    source = options_from(context)
    typed = dict(context.meta[TYPED])
    file, assignments = typed.pop("config", None), typed.pop("set_", [])
    told = read_toml(Path(os.path.expanduser(file))) if file else {}
    options = typed_values(source.settings, typed)
    given = {key: value for key, value in arguments.items() if value is not None}
    assigned = parse_set(list(assignments))
    labels = {key: f"{file}: {key}" for key in told}
    labels |= {each.key: each.flag for each in source.settings if each.key in options and not each.sae}
    labels |= {"saes": "--arch"} if "saes" in given else {}
    labels |= {key: f"--set {key}" for key in assigned}
    check_listed_saes({**told, **given, **assigned}.get("saes"), labels.get("saes", "saes"))
    return build(source.schema, {**source.defaults, **told, **options, **given, **assigned}, labels)


def typed_values(settings: "Sequence[Setting]", typed: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, by the schema's keys. Several values of one that has a single value belong to autoencoders."""
    found = {}
    for each in settings:
        if each.sae or each.name not in typed:
            continue
        value = as_numbers(each, typed[each.name])
        if each.repeatable and get_origin(each.annotation) is not tuple:
            if len(value) > 1:
                continue
            value = value[0]
        found[each.key] = value
    return found


def as_numbers(setting: "Setting", value: Any) -> Any:
    """A value or a list of them with numbers instead of texts, where the setting takes nothing else."""
    from shared.command.settings import number_type
    from shared.errors import UserError
    from shared.gate import quoted

    kind = number_type(setting.annotation)
    if kind is None:
        return value
    if isinstance(value, list | tuple):
        return [as_numbers(setting, each) for each in value]
    try:
        return kind(value)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"{setting.flag}: must be {expected} (got {quoted(value)})") from error


def options_from(context: Any) -> OptionsFrom:
    source = getattr(context.command, "options_from", None)
    assert isinstance(source, OptionsFrom), "this command has no schema"
    return source


# running


def show(document: Any, as_json: bool, text: Callable[[], object]) -> None:
    """Prints what a command returned: a document of JSON, or the text for people."""
    if as_json:
        from shared.record import to_json

        typer.echo(to_json(document, default=str))
    else:
        text()


def run_app(app: typer.Typer) -> None:
    """Runs the command line: every error that a person can mend becomes one message and its exit code."""
    from shared.device import heed_quota
    from shared.errors import DamagedError, Interrupted, LostError, UserError

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signal module's signature)
        raise Interrupted("stopped. To continue, run the same command again")

    signal.signal(signal.SIGINT, stop)  # what works on something has a gentler way: shared/stop.py
    wait_briefly()
    heed_quota()
    try:
        app()
    except (UserError, DamagedError, Interrupted, LostError) as error:
        if isinstance(error, Interrupted):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more changes nothing now
        if isinstance(error, LostError):
            time.sleep(1)  # the launcher takes the exit code of who ended first
        if not (isinstance(error, Interrupted | LostError) and is_helper()):
            typer.echo(f"{'stopped' if isinstance(error, Interrupted) else 'error'}: {error}", err=True)
        if isinstance(error, Interrupted) and "RANK" not in os.environ:
            end_now(error.exit_code)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # none of the operating system's: a fault of ours
            raise
        from shared.files.local import in_words

        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        typer.echo(f"error: {f'{where}: ' if where else ''}{in_words(error)}", err=True)
        sys.exit(UserError.exit_code)
    except MemoryError as error:
        typer.echo(f"error: there is not enough memory ({error}). Give less at once, or use a larger machine", err=True)
        sys.exit(UserError.exit_code)


def end_now(code: int) -> None:
    """Ends a process that may have been stopped in the middle of anything. Python would wait for threads first, and the
    libraries' own, which then meet what is gone already, would abort it. On disk everything is whole or absent."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


# options and arguments that no schema has


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
DryRun = Annotated[bool, flag("--dry-run", "Measure one batch, print what the whole would take, write nothing.")]
Processes = Annotated[
    int,
    value("INTEGER", "Processes on this machine, one per GPU.", parser=at_least(int, 1), rich_help_panel="Computation"),
]
Rounds = Annotated[int, value("INTEGER", "Rounds that medians are taken over.", parser=at_least(int, 1))]
Every = Annotated[float, value("SECONDS", "Seconds between looks.", parser=at_least(float, 0.1))]
OutFolder = Annotated[Path, value("PATH", "The folder for everything.", parser=at_home)]
Scratch = Annotated[Path | None, value("PATH", "Where to write.", parser=at_home, show_default="a temporary folder")]
Full = Annotated[bool, flag("--full/--quick", "Decode every chunk, or only checksum the files.")]
Repair = Annotated[bool, flag("--repair", "Drop damaged shards; the next sagsae harvest writes them again.")]
Hidden = Annotated[str, typer.Option(hidden=True)]
StorePlace = Annotated[str, argument("STORE", "A store: a folder or a URL.")]
StoreFolder = Annotated[str, argument("FOLDER", "A folder (or URL) that holds stores.")]
Source = Annotated[str, argument("SOURCE", "A finished store.")]
Target = Annotated[str, argument("TARGET", "The new store: a folder or an s3:// URL.")]
RunFolder = Annotated[Path, argument("RUN", "A training run's folder.", parser=at_home)]
RunFolders = Annotated[list[Path], argument("RUN", "Folders of evaluated runs.", parser=at_home)]
Names = Annotated[list[str], argument("NAME", "A command (train, store recode, …) or an architecture.")]
Pages = Annotated[Path, argument("FOLDER", "Where settings.md and cli.md are.", parser=at_home)]
