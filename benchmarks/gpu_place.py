"""The device that `make gpu` runs on: what it is called, how long a call takes there, what it
holds, when the host waits for it. "cuda" is also the device that the tests emulate; "cpu" answers
what has an answer there."""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

#: what Apple's device says of an operation that it has no kernel for
LACKS = ("not currently implemented for the MPS device",)
#: what CUDA says of a wait of the host, as a warning and as an error
WAIT = "called a synchronizing CUDA operation"


class Skipped(Exception):  # noqa: N818 (no error of the program)
    """A part that cannot run here; the text says why."""


def import_library(module: str) -> Any:
    """A library's module, imported; ``Skipped`` where the library is not installed."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise Skipped(f"{package.replace('_', '-')} is not installed")
    return importlib.import_module(module)


#: what stands around an operation that is named: tests count there what a device is asked for
Watch = Callable[[str], AbstractContextManager[Any]]
no_watch: Watch = nullcontext


@dataclass(frozen=True)
class Place:
    """A device, whether sizes are a toy's, and who watches."""

    device: torch.device
    quick: bool = False
    watch: Watch = field(default=no_watch, compare=False)

    @property
    def kind(self) -> str:
        return self.device.type

    @property
    def wide(self) -> bool:
        """Whether it has float64."""
        return self.kind != "mps"

    @property
    def count(self) -> int:
        return torch.cuda.device_count() if self.kind == "cuda" else 1

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.kind == "cuda" else self.kind

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        elif self.kind == "mps":
            torch.mps.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time of a call, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes at the peak of a call beyond those held before it; None where nobody counts
        them."""
        if self.kind != "cuda":
            run()
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def describe(self) -> dict[str, Any]:
        if self.kind != "cuda":
            return {"device": self.kind}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": "cuda",
            "gpu": self.name,
            "gpus": self.count,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or "none",
        }


def find(name: str, quick: bool) -> Place:
    """The device of this name. ``Skipped`` says what is missing, in one line."""
    available = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name not in available:
        raise Skipped(
            f"Found: --device {name}. Expected: cuda, mps or cpu. Do: leave it out on a machine "
            "with a GPU."
        )
    if not available[name]():
        build = "for a GPU" if torch.version.cuda or torch.version.hip else "without one"
        raise Skipped(
            f"Found: no {name.upper()} device (torch {torch.__version__}, which is built {build}). "
            "Expected: a GPU that torch sees. Do: run this on a machine with one, or try its parts "
            "with --device cpu --quick."
        )
    return Place(torch.device("cuda", 0) if name == "cuda" else torch.device(name), quick)


@contextlib.contextmanager
def _sync_debug_mode(target: Place, name: str) -> Iterator[None]:
    if target.kind != "cuda":
        raise Skipped(f"only CUDA says when the host waits for it; this is {target.kind}")
    torch.cuda.set_sync_debug_mode(name)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(target: Place, run: Callable[[], object]) -> list[str]:
    """Where the host waits for the device within a call: "file:line" for each time. Run it once
    before."""
    with (
        warnings.catch_warnings(record=True, action="always") as caught,
        _sync_debug_mode(target, "warn"),
    ):
        run()
    return [
        f"{warning.filename}:{warning.lineno}" for warning in caught if WAIT in str(warning.message)
    ]


def refuse_waits(target: Place, run: Callable[[], object]) -> None:
    """A call in which a wait of the host is a RuntimeError, CUDA's own."""
    with _sync_debug_mode(target, "error"):
        run()
