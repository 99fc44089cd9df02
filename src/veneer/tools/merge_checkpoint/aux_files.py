"""What stands beside the weights of a checkpoint and belongs to the merged one too: its configuration, its tokenizer.

Left out are the weights in other formats, which would be those of the base, and folders that hold such or are hidden
(what git and the hub's client keep). A configuration that names a dtype is written anew where the merge has another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from veneer.models.safetensors_dir import Checkpoint

RECORD, CONFIG = "veneer_merge.json", "config.json"
#: files that hold the same weights again for others
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".safetensors")


def companions(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """(the files to copy, relative to the folder; the names in it that are left out)."""
    files, left_out, folder = [], [], checkpoint.folder
    for path in sorted(folder.iterdir()):
        if path.name in checkpoint.files or path.name in (checkpoint.index_name, RECORD):
            continue
        inside = [path] if not path.is_dir() else [] if path.name.startswith(".") else list(path.rglob("*"))
        # links to folders are not gone into
        odd = any(one.name.endswith(OTHERS) or (one.is_dir() and one.is_symlink()) for one in inside)
        if odd or not inside:
            left_out.append(path.name)
        else:
            files += sorted(one.relative_to(folder) for one in inside if not one.is_dir())
    return files, left_out


def put(checkpoint: Checkpoint, dtype: torch.dtype | None, target: Path) -> list[str]:
    """Copy them into the folder ``target``; the names of what is left out."""
    files, left_out = companions(checkpoint)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if dtype is not None and file == Path(CONFIG):
            (target / file).write_bytes(_expected(checkpoint, dtype, file))
        else:
            shutil.copyfile(checkpoint.folder / file, target / file)
    return left_out


def differing(checkpoint: Checkpoint, dtype: torch.dtype | None, target: Path) -> Iterator[str]:
    """What is not in ``target`` as ``put`` writes it."""
    for file in companions(checkpoint)[0]:
        if not (target / file).is_file():
            yield f"{file} is not there"
        elif (target / file).read_bytes() != _expected(checkpoint, dtype, file):
            yield f"{file} is another file than the base's"


def _expected(checkpoint: Checkpoint, dtype: torch.dtype | None, file: Path) -> bytes:
    content = (checkpoint.folder / file).read_bytes()
    if dtype is None or file != Path(CONFIG):
        return content
    return (json.dumps(_retyped(json.loads(content), str(dtype).removeprefix("torch.")), indent=2) + "\n").encode()


def _retyped(said: Any, dtype: str) -> Any:
    """A configuration that names another dtype, wherever it names one."""
    if isinstance(said, dict):
        return {k: dtype if k in ("dtype", "torch_dtype") and v else _retyped(v, dtype) for k, v in said.items()}
    return [_retyped(each, dtype) for each in said] if isinstance(said, list) else said
