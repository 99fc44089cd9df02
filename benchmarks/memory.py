"""Bytes of this process, and of what autograd keeps between forward and backward."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from candidates import Candidate

# : glibc gives back what is freed, but for pieces below 128 KiB; it would take its threshold from
# the largest so far
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


LINUX = sys.platform == "linux"


def saved_bytes(candidate: Candidate, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd holds between forward and backward, besides the model's own."""
    loss = candidate.loss(candidate.model, batch)
    model_storages = set(storages([*candidate.model.parameters(), *candidate.model.buffers()]))
    graph_storages = storages(saved_tensors(loss))
    loss.backward()
    return sum(size for address, size in graph_storages.items() if address not in model_storages)


def saved_tensors(output: Tensor) -> Iterator[Tensor]:
    """Every tensor that a node of the graph below `output` has saved."""
    visited, todo = set(), [output.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        todo += [below for below, _ in node.next_functions]
        values = [saved_value(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in [*values, getattr(node, "saved_tensors", ())]:
            yield from (
                tensor
                for tensor in (value if isinstance(value, list | tuple) else (value,))
                if isinstance(tensor, Tensor)
            )


def saved_value(node: Any, name: str) -> Any:
    """The value that a node saved under a name; behind hooks, their result."""
    try:
        return getattr(node, f"_raw{name}").data
    except (AttributeError, RuntimeError):  # no tensors, or no hooks
        return getattr(node, name)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of what lies under the tensors."""
    under = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in under}


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def resident() -> int:
    """Bytes of memory that this process has now; elsewhere than on Linux the most that it ever
    had."""
    return status("VmRSS") if LINUX else most()


def most() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that this process has during a call."""
    give_back()
    with contextlib.suppress(OSError):  # elsewhere than on Linux the peak is of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    run()
    return status("VmHWM") if LINUX else most()


def give_back() -> None:
    """Give what is free to the system: kept, it would pass for memory of the libraries."""
    gc.collect()
    if LINUX:
        ctypes.CDLL(None).malloc_trim(0)
