"""Read the tensors of a safetensors file into newly allocated memory.

The safetensors library maps the file into memory. With a map, a later write to the file would
change values after they were checked, and truncating the file would kill the process.
"""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import AdapterError, listing
from veneer.fileio.throttle import throttle
from veneer.fileio.untrusted import read_header

#: dtype name of safetensors -> torch dtype
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip


def read_tensors(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and its metadata, once its header was found to be true.
    ``AdapterError``: it is no whole safetensors file, or holds a type of numbers that torch
    lacks."""
    file = Path(file)
    header, tensors = read_header(file), {}
    odd = [
        f"{name!r} ({entry.dtype})"
        for name, entry in header.tensors.items()
        if entry.dtype not in DTYPES
    ]
    if odd:
        problem = f"{file} cannot be read ({listing(odd, 3)}: types of numbers that torch lacks)"
        raise AdapterError(problem, f"one of {', '.join(DTYPES)}", "convert them to bfloat16")
    with file.open("rb") as stream:
        for name, entry in throttle(header.tensors.items()):
            flat = read_bytes(stream, header.data_start + entry.start, entry.stop - entry.start)
            if flat is None:
                problem = f"{file} cannot be read (it ended within {name!r}, while it was read)"
                raise AdapterError(
                    problem,
                    "a whole safetensors file",
                    "get the file again, or let nobody write to it",
                )
            tensors[name] = flat.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors, dict(header.metadata)


def read_bytes(stream: BufferedReader, start: int, size: int) -> Tensor | None:
    """Read bytes of a file into a new tensor, uint8 [size]; None if the file ends before."""
    flat = torch.empty(size, dtype=torch.uint8, device="cpu")
    stream.seek(start)
    return flat if stream.readinto(flat.numpy().data) == size else None


def cpu_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU; a meta tensor is copied as a meta tensor."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type in ("cpu", "meta") else tensor.to("cpu", copy=True)
