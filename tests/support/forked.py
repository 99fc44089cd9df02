"""Run Python code as a program, in a process that is forked from one that has imported the large
libraries.

Such a program starts in milliseconds instead of seconds. It imports Veneer by itself. This file is
also the server process that is forked, so at its top it imports the standard library only.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

#: the libraries that most programs need; with the same tuple for all, one server process is enough
LARGE = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "typer",
    "pydantic",
)


def printed(code: str, **environment: str) -> str:
    """The output of a program, which must succeed. torch is imported before the program begins; the
    other large libraries are not."""
    program = Program(code, "torch", **environment)
    assert program.wait() == 0, program.said
    return program.said


class Program:
    """A program that runs in ``folder`` after the libraries ``imported`` were imported. ``strict``:
    whether warnings are errors in it."""

    def __init__(
        self,
        code: str,
        *imported: str,
        folder: Path | None = None,
        strict: bool = False,
        **environment: str,
    ) -> None:
        self._files = Path(tempfile.mkdtemp(dir=_files()))
        (self._files / "output").touch()
        request = {
            "code": code,
            "folder": str(folder or Path.cwd()),
            "strict": strict,
            "environment": environment,
        }
        print(
            json.dumps({**request, "files": str(self._files)}),
            file=_server(imported).stdin,
            flush=True,
        )
        self.until((self._files / "pid").exists)
        self.pid = int((self._files / "pid").read_text())

    @property
    def said(self) -> str:
        """The output so far, of stdout and stderr."""
        return (self._files / "output").read_text()

    @property
    def alive(self) -> bool:
        return not (self._files / "status").exists()

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end of the program. Returns its exit code, negative after a signal."""
        self.until(lambda: not self.alive, seconds)
        return int((self._files / "status").read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.alive:
            os.kill(self.pid, number)

    @staticmethod
    def until(condition: Callable[[], object], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.002)


@functools.cache
def _server(imported: tuple[str, ...]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__, *imported], stdin=subprocess.PIPE, text=True
    )

    @atexit.register
    def end() -> None:
        with server:  # __exit__ waits for its end
            server.kill()

    return server


@functools.cache
def _files() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return folder


# ----------------------------------------------------------------------------------------------
# the server process


def _serve(imported: list[str]) -> None:
    sys.path.pop(0)  # remove this file's folder, which a program would not have
    gc.disable()
    for library in imported:
        importlib.import_module(library)
    os.fsync = lambda fd: None  # as in the process of the tests
    # garbage collection in a program would visit all objects, and so copy the shared pages
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        if os.fork() == 0:
            _watch(**json.loads(line))


def _watch(files: str, **request: Any) -> NoReturn:
    """Start the program, and write its process id and its exit code to files."""
    child = os.fork()
    if child == 0:
        _run(output=f"{files}/output", **request)
    _write_status(files, "pid", child)
    _write_status(files, "status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _write_status(files: str, name: str, number: int) -> None:
    hidden = Path(files, f".{name}")
    hidden.write_text(str(number))
    hidden.rename(Path(files, name))


def _run(
    code: str, folder: str, strict: bool, environment: dict[str, str], output: str
) -> NoReturn:
    out = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
        os.dup2(file, number)
    os.chdir(folder)
    sys.path.insert(0, "")
    os.environ.update(environment)
    warnings.simplefilter("error" if strict else "ignore")
    main: Any = types.ModuleType("__main__")
    sys.modules["__main__"], status = main, 0
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), main.__dict__)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        status = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1:])
