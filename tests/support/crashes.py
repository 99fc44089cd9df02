"""Child processes that change an adapter or a library on the disk and die while they do: by
kill -9 at a random moment, or by themselves before their k-th step on the disk. For
``test_crashes.py``."""

from __future__ import annotations

import itertools
import os
import random
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer
from veneer.fileio import atomic
from veneer.store.library import Library

#: exit code of a child that died before its k-th step
DIED = 77
#: functions of ``os`` that change something on the disk
STEPS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "utime", "chmod")


def make(path: Path, seed: int) -> Path:
    """Write an adapter folder whose values depend on the seed."""
    torch.manual_seed(seed)
    handle = veneer.attach(nn.Sequential(nn.Linear(6, 5)), veneer.LoraConfig(rank=2))
    for parameter in handle.parameters():
        parameter.data.normal_()
    return handle.save(path, overwrite=True, provenance={"seed": seed})


# ----------------------------------------------------------------------------------------------
# operations of a child


def save(folder: Path, number: int) -> None:
    make(folder / "adapter", number)


def save_among(folder: Path, number: int) -> None:
    """Overwrite an adapter in a folder that also holds files of other programs."""
    make(folder / "among", number)


def _library(folder: Path) -> Library:
    return Library(folder / "library")


def add(folder: Path, number: int) -> None:
    """Add adapters under new names and under a name that is replaced, in turn, with repeated
    contents."""
    name = f"new-{number}" if number % 3 else "replaced"
    _library(folder).add(folder / "sources" / str(number % 4), name, tags=["t"], overwrite=True)


def tag(folder: Path, number: int) -> None:
    _library(folder).tag("kept", f"t{number}", remove=[] if number == 0 else [f"t{number - 1}"])


def remove(folder: Path, number: int) -> None:
    library = _library(folder)
    library.add(folder / "sources" / str(number % 4), "gone", overwrite=True)
    library.remove("gone")


def gc(folder: Path, number: int) -> None:
    library = _library(folder)
    library.add(folder / "sources" / str(number % 4), "gone", overwrite=True)
    library.remove("gone")
    library.gc(grace=0)


def rebuild(folder: Path, number: int) -> None:
    _library(folder).rebuild()


OPERATIONS = {
    "save": save, "save_among": save_among, "add": add, "tag": tag, "remove": remove, "gc": gc,
    "rebuild": rebuild,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------
# ways to die


def without_exchange() -> None:
    """Let this process behave as on NFS, Lustre or macOS, where two folders cannot be exchanged in
    one step."""
    atomic._rename = lambda *_: False


def loop(operation: str, folder: Path, ready: Any, exchange: bool) -> None:
    """Repeat the operation until the process is killed. The numbers of tags continue after the
    tag that exists."""
    if not exchange:
        without_exchange()
    numbers = itertools.count(1000)
    if operation == "tag":
        (last,) = _library(folder).entry("kept").tags
        numbers = itertools.count(int(last[1:]) + 1)
    ready.set()
    for number in numbers:
        OPERATIONS[operation](folder, number)


def die_at(operation: str, folder: Path, number: int, step: int) -> None:
    """Do the operation once, and die instead of step number ``step`` on the disk. The process exits
    normally if the operation has fewer steps."""
    remaining = itertools.count(step, -1)

    def count_calls(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if next(remaining) == 0:
                os._exit(DIED)
            return function(*args, **options)

        return call

    for name in STEPS:
        setattr(os, name, count_calls(getattr(os, name)))
    atomic._rename = count_calls(atomic._rename)
    veneer.adapter_files.folder.save_file = count_calls(veneer.adapter_files.folder.save_file)
    OPERATIONS[operation](folder, number)


def die_at_each(pipe: Any, operation: str, folder: Path, exchange: bool) -> None:
    """For each (number, step) that ``pipe`` receives, call ``die_at`` in a fork of this process,
    and send back the exit code of the fork."""
    if not exchange:
        without_exchange()
    while True:
        try:
            number, step = pipe.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            status = 1
            try:
                die_at(operation, folder, number, step)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def work(folder: Path, worker: int, count: int, failed: Any) -> None:
    """Use a library, while other processes use it too. An error is put into ``failed``."""
    library, choice = _library(folder), random.Random(worker)
    try:
        for number in range(count):
            name = f"p{worker}-{number}"
            library.add(folder / "sources" / str(choice.randrange(4)), name, tags=["new"])
            library.tag("kept", name)
            veneer.adapter_files.read(library.get(name))
            library.add(
                folder / "sources" / str(choice.randrange(4)), f"own-{worker}", overwrite=True
            )
            if number % 2:
                library.remove(name)
            if choice.random() < 0.5:
                library.gc(grace=0)
            veneer.adapter_files.read(library.get(f"own-{worker}"))
    except BaseException as error:
        failed.put(f"{worker}: {error!r}")
        raise


def look(folder: Path, stop: Any, observed: Any, failed: Any) -> None:
    """Read the library while other processes write to it, until ``stop`` is set: every index that
    is read must be complete."""
    library, reads = _library(folder), 0
    try:
        while not stop.is_set():
            entries = library.list()
            assert {"kept"} <= {entry.name for entry in entries}
            veneer.adapter_files.read(library.get("kept"))
            reads += 1
        observed.put(reads)
    except BaseException as error:
        failed.put(f"reader: {error!r}")
        raise
