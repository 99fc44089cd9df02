"""The entry point of the command line `veneer`: runs a subcommand, and turns errors into messages
and exit codes.

`veneer --help` reads a table (``command_table.py``) and does not import the libraries that the
subcommands need. This file imports none of them either, so it can say which package to install if
one is missing. `run` handles all errors: errors that the user can correct are printed on stderr as
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

#: numbers of system errors that the user can correct
CORRECTABLE_ERRNOS = {
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
    except SystemExit as exit_request:  # raised by typer at the end of each command
        code = exit_request.code  # 2 for an error of usage
        return code if isinstance(code, int) else int(bool(code))
    except VeneerError as error:
        return _report(error, str(error))
    except OSError as error:
        if error.errno not in CORRECTABLE_ERRNOS:
            raise
        return _report(error, _explain(error))
    except ModuleNotFoundError as error:
        message = missing_package_message(error)
        if message is None or os.environ.get("VENEER_DEBUG"):
            raise
        sys.stderr.write(f"Error: {message}\n")  # without rich, which may be missing
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130
    return 0


def main() -> NoReturn:
    """The entry point of the console script `veneer`."""
    sys.exit(run())


def _report(error: BaseException, message: str) -> int:
    """Print an error as one message and return exit code 2.

    Print nothing if another process of the training run reports the same error. Raise the error
    again if VENEER_DEBUG is set."""
    from rich.text import Text

    from veneer.cli.console import SafeConsole

    if os.environ.get("VENEER_DEBUG"):
        raise error
    if getattr(error, "reported_elsewhere", False):
        return 2
    console = SafeConsole(stderr=True)
    message_and_notes = "\n".join([message, *getattr(error, "__notes__", ())])
    console.print(
        Text("Error: ", style="bold red").append(Text(message_and_notes, style="default not bold")),
        soft_wrap=True,
    )
    return 2


def _explain(error: OSError) -> str:
    """Phrase a system error like Veneer's errors: what was found, what was expected, what to do."""
    file_name = f" {error.filename}" if error.filename else ""
    free_space, accessible_path = "room for the output", "a path that you may read and write"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return sentence(
                f"no space left on the disk while writing{file_name}",
                free_space,
                "free some space and run again",
            )
        case errno.EFBIG:
            return sentence(
                f"a limit on the size of a file, met by{file_name}",
                free_space,
                "raise the limit (ulimit -f)",
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return sentence(
                f"no permission for{file_name}",
                accessible_path,
                "choose another, or change its permissions",
            )
        case _:
            return sentence(
                f"{error.strerror}{':' + file_name if file_name else ''}",
                accessible_path,
                "check the path and the disk",
            )


#: module -> package on PyPI, where the names differ
_PACKAGE_OF_MODULE = {"yaml": "pyyaml", "google": "protobuf"}
#: the extras of Veneer that an error suggests first. If several extras install a package, the first
#: of these is suggested; extras that are not listed come last, in alphabetical order.
_PREFERRED_EXTRAS = ("cli", "train", "serve", "remote")


def extra_with_module(module: str) -> str | None:
    """Return the extra of Veneer (``pip install 'veneer[…]'``) to suggest for a module that is not
    installed, or None if no extra installs it."""
    top_module = module.partition(".")[0]
    package = _PACKAGE_OF_MODULE.get(top_module, top_module).replace("_", "-").lower()
    extras = []
    for requirement in metadata.requires("veneer") or ():
        name_match, extra_match = (
            re.match(r"[\w.-]+", requirement),
            re.search(r"extra == ['\"]([\w-]+)['\"]", requirement),
        )
        if name_match and extra_match and name_match[0].replace("_", "-").lower() == package:
            extras.append(extra_match[1])
    return min(
        extras,
        key=lambda extra: (
            _PREFERRED_EXTRAS.index(extra)
            if extra in _PREFERRED_EXTRAS
            else len(_PREFERRED_EXTRAS),
            extra,
        ),
        default=None,
    )


def missing_package_message(error: ModuleNotFoundError) -> str | None:
    """Return the error text for a missing package, or None if no extra of Veneer installs it."""
    extra = extra_with_module(error.name or "")
    if extra is None:
        return None
    package = str(error.name).partition(".")[0]
    return (
        f"Found: no Python package {package!r}. Expected: veneer[{extra}]. Do: pip install"
        f" 'veneer[{extra}]'."
    )
