"""docs/reference/settings.md and cli.md, made from the schemas and from `--help`: `make reference` writes them."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shared.command.commands import commands_of, help_of
from shared.command.settings import SCHEMAS, Setting, architectures, settings_of
from shared.schema import Frozen

WIDTH: Final = 120
"""Columns of a line of Markdown."""
HELP_WIDTH: Final = 100
"""Columns of a line of help text."""
SETTINGS_HEAD: Final = """# Settings

*Generated from the schemas by `make reference`; edit their docstrings, not this page.*

Every setting is an option of a command and a key of its TOML file, which `--config` names. `--set key=value` sets a
key without a file. `--set` wins over options, options win over the file, and the file wins over defaults.
`sagsae settings train` prints the same in a terminal, `--json` as a document. [Commands](cli.md) shows the help text of
every command.
"""
CLI_HEAD: Final = """# Commands

*Generated from `--help` by `make reference`; edit docstrings, not this page.*

`sagsae` has one command per stage, and commands to look around and to measure. [Settings](settings.md) explains every
setting at length. Exit codes: 0 done, 2 something in the input is wrong, 3 data are damaged, 75 the same
command can succeed later, 130 stopped by a signal.
"""


def write_reference(folder: Path, app: Any, more: Mapping[str, str]) -> list[str]:
    """Writes both pages, and `more` (texts by name), into a folder and returns their paths. `app` is the whole command
    line."""
    pages = {"settings.md": settings_page(), "cli.md": cli_page(app), **more}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in pages]


def settings_page() -> str:
    """Every schema, under a heading each."""
    sections = [section_of(f"sagsae {name}", schema) for name, schema in SCHEMAS.items()]
    sections.append(
        "## Autoencoders\n\nA training run lists its autoencoders under `saes`. Which settings one has depends on its "
        "`arch`.\n"
    )
    sections += [section_of(name, schema, "###") for name, schema in architectures().items()]
    return "\n".join([SETTINGS_HEAD, *sections])


def section_of(title: str, schema: type[Frozen], level: str = "##") -> str:
    lines = [f"{level} {title}", "", *wrapped(" ".join((schema.__doc__ or "").split())), ""]
    settings = settings_of(schema)
    groups = list(dict.fromkeys(each.group for each in settings))
    for group in groups:
        lines += [f"{level}# {group}", ""] if len(groups) > 1 else []
        for each in settings:
            if each.group == group:
                lines += entry(each)
    return "\n".join(lines).rstrip("\n") + "\n"


def entry(setting: Setting) -> Iterator[str]:
    """One setting as an entry of a list: name, type, default and option; below them the meaning."""
    default = "required" if setting.default is None else f"default: {setting.default}"
    option = f"argument `{setting.option}`" if setting.is_argument else f"`{setting.left}`"
    yield from wrapped(f"* **`{setting.key}`** ({setting.type}; {default}; {option})", "    ")
    yield ""
    yield from wrapped("    " + " ".join(f"{setting.meaning} {setting.details}".split()), "    ")
    yield ""


def wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def cli_page(app: Any) -> str:
    """The help text of every command."""
    blocks = [f"## {name}\n\n```text\n{help_of(each, name, HELP_WIDTH)}\n```\n" for name, each in named_commands(app)]
    return "\n".join([CLI_HEAD, *blocks])


def named_commands(app: Any, above: Sequence[str] = ("sagsae",)) -> Iterator[tuple[str, Any]]:
    """Every command that is shown, with the words that call it."""
    yield " ".join(above), app
    for name, each in commands_of(app).items():
        yield from named_commands(each, [*above, name])
