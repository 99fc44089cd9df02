"""The entry point of the command line `veneer`: runs a subcommand, and turns errors into messages
and exit codes.

`veneer --help` reads a table (``command_table.py``), so it is fast: it does not import the modules
of the subcommands, nor torch. This file imports no optional package at its top level, so that it
can say which one to install if one is missing. `run` handles all errors: errors that the user can
correct are printed on stderr as one message, with exit code 2; all others are bugs of Veneer and
keep their traceback. Exit codes:

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
    """Run one command line and return its exit code. ``arguments``: the words after `veneer`; None
    takes them from ``sys.argv``. Errors that the user cannot correct are raised."""
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
        sys.stderr.write(f"Error: {message}\n")  # not by rich, which may be missing too
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130
    return 0


def main() -> NoReturn:
    """The entry point of the console script `veneer`."""
    sys.exit(run())


def _report(error: BaseException, message: str) -> int:
    """Print ``message`` and the notes of an error on stderr, and return exit code 2.

    Print nothing if another process of the training run prints the same error. If VENEER_DEBUG is
    set, raise the error instead, so that its traceback is shown."""
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
    """Return a message for a system error in the form of Veneer's errors: what was found, what was
    expected, and what to do."""
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


#: importable module -> its package on PyPI, if the two names differ
_PACKAGE_OF_MODULE = {"yaml": "pyyaml", "google": "protobuf"}
#: the order in which to suggest an extra of Veneer if several extras install the missing package;
#: extras that are not in this tuple come last, in alphabetical order
_PREFERRED_EXTRAS = ("cli", "train", "serve", "remote")


def extra_with_module(module: str) -> str | None:
    """Return the extra of Veneer to install (``pip install 'veneer[extra]'``) for a missing module,
    such as "serve" for "fastapi.responses". Return None if no extra installs the module."""
    top_module = module.partition(".")[0]
    package = _PACKAGE_OF_MODULE.get(top_module, top_module).replace("_", "-").lower()
    extras_with_package = []
    for requirement in metadata.requires("veneer") or ():
        name_match, extra_match = (
            re.match(r"[\w.-]+", requirement),
            re.search(r"extra == ['\"]([\w-]+)['\"]", requirement),
        )
        if name_match and extra_match and name_match[0].replace("_", "-").lower() == package:
            extras_with_package.append(extra_match[1])
    return min(
        extras_with_package,
        key=lambda extra: (
            _PREFERRED_EXTRAS.index(extra)
            if extra in _PREFERRED_EXTRAS
            else len(_PREFERRED_EXTRAS),
            extra,
        ),
        default=None,
    )


def missing_package_message(error: ModuleNotFoundError) -> str | None:
    """Return the message for a failed import, which says what to install. Return None if no extra
    of Veneer installs the module."""
    extra = extra_with_module(error.name or "")
    if extra is None:
        return None
    package = str(error.name).partition(".")[0]
    return (
        f"Found: no Python package {package!r}. Expected: veneer[{extra}]. Do: pip install"
        f" 'veneer[{extra}]'."
    )
