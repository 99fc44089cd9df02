"""Read the tensors of a safetensors file into newly allocated memory.

The safetensors library maps the file into memory instead, so a later write to the file would change
values after they were checked, and truncating the file would kill the process.
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
    """Read all tensors of a safetensors file, and its metadata, after its header was validated.
    ``AdapterError``: the file is not a complete safetensors file, or has a dtype that torch
    lacks."""
    file = Path(file)
    header = read_header(file)
    tensors: dict[str, Tensor] = {}
    unsupported_tensors = [
        f"{name!r} ({entry.dtype})"
        for name, entry in header.tensors.items()
        if entry.dtype not in DTYPES
    ]
    if unsupported_tensors:
        tensors_text = listing(unsupported_tensors, 3)
        raise AdapterError(
            f"{file} cannot be read ({tensors_text}: types of numbers that torch lacks)",
            f"one of {', '.join(DTYPES)}",
            "convert them to bfloat16",
        )
    with file.open("rb") as stream:
        for name, entry in throttle(header.tensors.items()):
            raw_bytes = read_bytes(
                stream, header.data_start + entry.start, entry.stop - entry.start
            )
            if raw_bytes is None:
                raise AdapterError(
                    f"{file} cannot be read (it ended within {name!r}, while it was read)",
                    "a whole safetensors file",
                    "get the file again, or let nobody write to it",
                )
            tensors[name] = raw_bytes.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors, dict(header.metadata)


def read_bytes(stream: BufferedReader, start: int, size: int) -> Tensor | None:
    """Read ``size`` bytes of a file, from the byte ``start`` on, into a new uint8 tensor [size].
    Returns None if the file ends earlier."""
    raw_bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
    stream.seek(start)
    return raw_bytes if stream.readinto(raw_bytes.numpy().data) == size else None


def cpu_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU; a tensor on the meta device stays there."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type in ("cpu", "meta") else tensor.to("cpu", copy=True)
