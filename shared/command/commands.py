"""Commands of the command line, and how their help is written."""

import contextlib
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from shared.command.options import TYPED, OptionsFrom

CONTEXT_SETTINGS: Final[dict[str, Any]] = {"max_content_width": 120}
"""Columns that help text fills at most."""
OPTION_COLUMN, COMMAND_COLUMN = 30, 13
"""Columns of names in front of their texts."""
Function = TypeVar("Function", bound=Callable[..., Any])


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
