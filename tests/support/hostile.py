"""Make adapter files that are malicious or incomplete."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from tests.support.adapters import RECORD, TENSORS


class Runs:
    """An object whose pickle ends the process that loads it."""

    def __reduce__(self):
        return os._exit, (1,)


# ----------------------------------------------------------------------------------------------
# adapters of other libraries


def remove_record(path: Path) -> Path:
    """Remove the record of an adapter folder, so that it looks like another library's."""
    with safe_open(path / TENSORS, framework="pt") as tensor_file:
        names = tensor_file.keys()
        tensors = {name: tensor_file.get_tensor(name) for name in names}
    (path / RECORD).unlink()
    save_file(tensors, path / TENSORS)
    return path
