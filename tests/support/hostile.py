"""Files that lie."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from tests.support.adapters import RECORD, TENSORS


class Runs:
    """A pickle that ends whoever reads it."""

    def __reduce__(self):
        return os._exit, (1,)


# ----------------------------------------------------------------------------------------------
# types and magnitudes


def remove_record(path: Path) -> Path:
    """As another library's: without a record."""
    with safe_open(path / TENSORS, framework="pt") as opened:
        names = opened.keys()
        tensors = {name: opened.get_tensor(name) for name in names}
    (path / RECORD).unlink()
    save_file(tensors, path / TENSORS)
    return path
