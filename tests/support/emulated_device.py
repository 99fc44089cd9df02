"""Emulate two CUDA devices in main memory, and record their launches, waits and bytes: ``python -m
pytest -p tests.support.emulated_device tests/cuda``, which is ``make test-cuda``.

``emulated_device.cpp`` is compiled once for each torch, into ``$VENEER_TEST_CACHE`` or the user's
cache. The library must be loaded before torch looks for CUDA. So these tests run in a separate
process, and this file is a plugin of pytest.

    with count() as seen: run()         seen.launches, seen.waits: the names of the operations that
                                        the device was asked for, in order
    with bytes_more() as more: run()    more.peak, more.kept: bytes on the first device beyond those
                                        before the block
    with without_float64(): run()       the devices refuse float64, like MPS

``torch.cuda.set_sync_debug_mode`` warns of waits or refuses them, with CUDA's messages.

The emulation has no CUDA kernels (their speed, their rounding), no streams and no graphs.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
COUNT = 2


def _torch_folder() -> Path:
    located: Any = importlib.util.find_spec("torch")
    return Path(located.origin).parent


def why_not() -> str:
    """The reason why this machine cannot emulate the devices; "" if it can."""
    if sys.platform != "linux":
        return "the emulated device is for Linux"
    if not re.search(r"^cuda.*= None$", (_torch_folder() / "version.py").read_text(), re.MULTILINE):
        return "this torch has CUDA, and the device is emulated for one that has not"
    if shutil.which("g++") is None:
        return "no g++, which builds the emulated device (apt-get install g++)"
    return ""


def built() -> Path:
    """The path of the library for this torch, which is compiled if it is missing."""
    torch_folder = _torch_folder()
    inputs = SOURCE.read_bytes() + (torch_folder / "version.py").read_bytes()
    default_folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "veneer-tests"
    folder = Path(os.environ.get("VENEER_TEST_CACHE", default_folder))
    library = folder / f"emulated-{hashlib.sha256(inputs).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    include = torch_folder / "include"
    options = [
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        "-std=c++20",
        f"-I{include}",
        f"-I{include}/torch/csrc/api/include",
    ]
    torch_libraries = [
        f"-L{torch_folder}/lib",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{torch_folder}/lib",
    ]
    subprocess.run(["g++", *options, str(SOURCE), "-o", str(partial), *torch_libraries], check=True)
    partial.rename(library)
    return library


def load_library() -> Any:
    """Load the library into this process, before torch is imported."""
    library = built()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    device.device_events.restype = ctypes.c_char_p
    device.device_held.restype = device.device_peak.restype = ctypes.c_long
    return device


missing = why_not()
if missing and os.environ.get("CI"):
    raise RuntimeError(missing)
DEVICE: Any = None if missing else load_library()

import torch  # noqa: E402 (after the library is loaded)
import torch.cuda.random  # noqa: E402
from torch import nn  # noqa: E402

SYNC_MODES = ("default", "warn", "error")
G0, G1 = torch.device("cuda:0"), torch.device("cuda:1")


class _Device:
    """The replacement of ``torch.cuda.device``; it does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _pretend() -> None:
    """Replace the Python functions of torch.cuda that torch calls."""
    compiler, torch.compile = (
        torch.compile,
        lambda function=None, **_: function or (lambda function: function),
    )
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")
        # Import it before it could look for kernels, and without compiling its own kernels, which
        # would fail again in each call.
        importlib.import_module("bitsandbytes")
    torch.compile = compiler
    importlib.import_module(
        "torch._dynamo.trace_rules"
    ).get_torch_obj_rule_map()  # before functions are replaced
    assert DEVICE.device_ready(), "torch has looked for CUDA before the device was there"

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    properties = types.SimpleNamespace(
        name="emulated", major=8, minor=0, total_memory=80 << 30, multi_processor_count=8
    )
    no_ops = (
        "_lazy_init empty_cache synchronize set_device manual_seed manual_seed_all "
        "set_rng_state set_rng_state_all"
    )
    answers: dict[str, Any] = {
        **dict.fromkeys(no_ops.split()),
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": COUNT,
        "current_device": 0,
        "get_device_name": "emulated",
        "get_device_capability": (8, 0),
        "get_device_properties": properties,
        "mem_get_info": (60 << 30, 80 << 30),
    }
    functions = {name: constant(value) for name, value in answers.items()}
    functions["get_rng_state"] = lambda *_: torch.Generator("cuda").get_state()
    functions["get_rng_state_all"] = lambda: [torch.Generator("cuda").get_state()]
    for name in ("memory_allocated", "memory_reserved"):
        functions[name] = lambda *_: DEVICE.device_held(0)
    functions["max_memory_allocated"] = lambda *_: DEVICE.device_peak(0)
    functions["reset_peak_memory_stats"] = lambda *_: DEVICE.device_reset_peak()
    functions["set_sync_debug_mode"] = lambda mode: DEVICE.device_sync_mode(SYNC_MODES.index(mode))
    for name, function in functions.items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, function)
    torch.cuda.device = _Device  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = lambda self, *_, **__: self.to(G0)  # pyright: ignore[reportAttributeAccessIssue]
    nn.Module.cuda = lambda self, *_: self.to(G0)  # pyright: ignore[reportAttributeAccessIssue]

    clone = torch.UntypedStorage.clone

    def clone_there(self: torch.UntypedStorage) -> torch.UntypedStorage:  # for copy.deepcopy
        if not self.is_cuda:
            return clone(self)
        return (
            torch.empty(0, dtype=torch.uint8, device=self.device)
            .set_(self)
            .clone()
            .untyped_storage()
        )

    torch.UntypedStorage.clone = clone_there


if DEVICE is not None:
    _pretend()


class Seen:
    """The operations that the devices were asked for during a block."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def _of(self, kind: str) -> list[str]:
        return [name for name, what in self.events if what.startswith(kind)]

    @property
    def launches(self) -> list[str]:
        return self._of("launch")

    @property
    def waits(self) -> list[str]:
        return [f"{name} ({what})" for name, what in self.events if what.startswith("wait")]

    @property
    def between(self) -> list[str]:
        """The copies from one device to the other."""
        return self._of("peer")


@contextmanager
def count() -> Iterator[Seen]:
    recorded = Seen()
    DEVICE.device_record()
    try:
        yield recorded
    finally:
        lines = DEVICE.device_events().decode().splitlines()
        recorded.events = [(name, what) for name, what in (line.split("\t") for line in lines)]


class Bytes:
    peak = kept = 0


@contextmanager
def bytes_more() -> Iterator[Bytes]:
    gc.collect()  # so that earlier garbage is not counted
    more, before = Bytes(), DEVICE.device_held(0)
    DEVICE.device_reset_peak()
    yield more
    more.peak, more.kept = DEVICE.device_peak(0) - before, DEVICE.device_held(0) - before


@contextmanager
def without_float64() -> Iterator[None]:
    DEVICE.device_narrow(1)
    try:
        yield
    finally:
        DEVICE.device_narrow(0)


@contextmanager
def one_visible() -> Iterator[None]:
    """Make torch report one device: transformers would use ``nn.DataParallel`` with two."""
    before, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
    try:
        yield
    finally:
        torch.cuda.device_count = before


def waits_of(run: Callable[[], Any], plain: Callable[[], Any] | None = None) -> Counter[str]:
    """The waits in the second call of ``run``, minus those of ``plain``, the same call without
    adapters."""
    wait_counts = []
    for call in (run, plain):
        names: list[str] = []
        if call is not None:
            call()
            with count() as recorded:
                call()
            names = recorded.waits
        wait_counts.append(Counter(names))
    return wait_counts[0] - wait_counts[1]
