"""The command `veneer`: each command's file is imported when that command is called.

`veneer --help` reads a table (``command_table.py``) and loads none of the libraries of the
commands (``commands.py``). This file loads none of its own either, so that without them it can say
what to install. `run` handles all errors: errors that the user can correct are printed on stderr as
one message, with exit code 2; all others are bugs of Veneer and keep their traceback. Exit codes:

    0 success   1 bug (`diff --exit-code`: adapters differ)   2 bad input   130 stopped by Ctrl-C
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from veneer.errors import VeneerError, sentence

#: system errors that the user can correct
CORRECTABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        import typer

        from veneer.cli.commands import app

        typer.main.get_command(app).main(
            args=[*arguments] if arguments is not None else None, prog_name="veneer"
        )
    except SystemExit as stop:  # typer ends every command this way; its usage errors have code 2
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except VeneerError as error:
        return _report(error, str(error))
    except OSError as error:
        if error.errno not in CORRECTABLE:
            raise
        return _report(error, _explain(error))
    except ModuleNotFoundError as error:
        text = missing_package(error)
        if text is None or os.environ.get("VENEER_DEBUG"):
            raise
        sys.stderr.write(f"Error: {text}\n")  # without rich, which may be what is missing
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130
    return 0


def main() -> NoReturn:
    """The console script."""
    sys.exit(run())


def _report(error: BaseException, message: str) -> int:
    """Print an error as one message and return exit code 2.

    Prints nothing if another process of the run reports the same error. Raises the error again if
    VENEER_DEBUG is set."""
    from rich.text import Text

    from veneer.cli.console import SafeConsole

    if os.environ.get("VENEER_DEBUG"):
        raise error
    if getattr(error, "reported_elsewhere", False):
        return 2
    console = SafeConsole(stderr=True)
    text = "\n".join([message, *getattr(error, "__notes__", ())])
    console.print(
        Text("Error: ", style="bold red").append(Text(text, style="default not bold")),
        soft_wrap=True,
    )
    return 2


def _explain(error: OSError) -> str:
    """Phrase a system error like Veneer's own: found, expected, what to do."""
    file_name = f" {error.filename}" if error.filename else ""
    space, allowed = "room for the output", "a path that you may read and write"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return sentence(
                f"no space left on the disk while writing{file_name}",
                space,
                "free some space and run again",
            )
        case errno.EFBIG:
            return sentence(
                f"a limit on the size of a file, met by{file_name}",
                space,
                "raise the limit (ulimit -f)",
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return sentence(
                f"no permission for{file_name}",
                allowed,
                "choose another, or change its permissions",
            )
        case _:
            return sentence(
                f"{error.strerror}{':' + file_name if file_name else ''}",
                allowed,
                "check the path and the disk",
            )


#: module -> package, where their names differ
_PACKAGES = {"yaml": "pyyaml", "google": "protobuf"}
#: extras from smallest to largest; each contains those before it, so the first match is the
#: smallest extra with a package
_ORDER = ("cli", "train", "serve", "remote")


def extra_with(module: str) -> str | None:
    """Return the smallest extra (``pip install 'veneer[…]'``) that installs a module, or None."""
    top = module.partition(".")[0]
    package = _PACKAGES.get(top, top).replace("_", "-").lower()
    extras = []
    for requirement in metadata.requires("veneer") or ():
        name, extra = (
            re.match(r"[\w.-]+", requirement),
            re.search(r"extra == ['\"]([\w-]+)['\"]", requirement),
        )
        if name and extra and name[0].replace("_", "-").lower() == package:
            extras.append(extra[1])
    ranked = sorted(
        extras, key=lambda extra: (_ORDER.index(extra) if extra in _ORDER else len(_ORDER), extra)
    )
    return next(iter(ranked), None)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return the error text for a missing package, or None if no extra of Veneer contains it."""
    extra = extra_with(error.name or "")
    if extra is None:
        return None
    package = str(error.name).partition(".")[0]
    return (
        f"Found: no Python package {package!r}. Expected: veneer[{extra}]. Do: pip install"
        f" 'veneer[{extra}]'."
    )
