"""Options from schemas, and the configuration that was asked for with them.

    @command(app, settings=OptionsFrom("harvest"))
    def harvest(context: Context, …):
        config = resolve(context)

A command's options are made from its schema (settings.py) when its help or its arguments are asked for, so that
`sagsae --help` imports no schema. `resolve` validates what was typed over what a --config file says, and errors name
the option, the key of `--set` or the file.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Union, get_args, get_origin

import typer

if TYPE_CHECKING:
    from shared.command.settings import Setting
    from shared.schema import Frozen

TYPED: Final = "sagsae.typed"
"""Where a context keeps the options that were typed, by name."""


@dataclass(frozen=True)
class OptionsFrom:
    """The schema whose fields become options of a command, and which of them do."""

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
            text = "Any setting by its key, as JSON or text. Repeatable."
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
    so that every wrong value is reported in the same words."""
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


def told_settings(context: Any) -> dict[str, Any]:
    """What the --config file and --set say, by key, before it is validated."""
    from shared.schema import parse_set, read_toml

    typed = context.meta[TYPED]
    file = typed.get("config")
    return {**(read_toml(Path(os.path.expanduser(file))) if file else {}), **parse_set(list(typed.get("set_") or []))}


def resolve(context: Any, **arguments: Any) -> Any:
    """The validated configuration: defaults, over them the --config file, the options with `arguments`, and --set.

    Raises UserError, which names a wrong value by the option that was typed, or by its key and where it came from.
    """
    from shared.command.grid import check_listed_saes
    from shared.errors import UserError
    from shared.schema import build, parse_set, read_toml

    source = options_from(context)
    typed = dict(context.meta[TYPED])
    file, assignments = typed.pop("config", None), typed.pop("set_", [])
    told = read_toml(Path(os.path.expanduser(file))) if file else {}
    options = typed_values(source.settings, typed)
    given = {key: value for key, value in arguments.items() if value is not None}
    assigned = parse_set(list(assignments))
    labels = {key: f"{file}: {key}" for key in told}
    for each in source.settings:
        if each.sae and each.key in {**told, **assigned} and each.key not in source.schema.model_fields:
            place = f"--set {each.key}" if each.key in assigned else labels[each.key]
            raise UserError(f"{place}: is a setting of the autoencoders. Give {each.left}, or put it into saes")
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
