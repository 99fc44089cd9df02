"""Detect the format of an adapter from its contents, never from its name."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import AdapterError, listing
from veneer.fileio.untrusted import Header, read_header
from veneer.formats import FORMATS, peft


def detect(path: str | Path) -> str:
    """The format of the adapter at ``path``: "veneer", "peft", "kohya", "diffusers", "gguf" or
    "dense".

    Raises:
        AdapterError: nothing exists at ``path``, or no format recognises it.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    if not path.is_file():
        raise AdapterError(f"nothing at {path}", "an adapter", "check the path")
    with path.open("rb") as stream:
        first_bytes = stream.read(16)
    # a safetensors file begins with the length of its header in 8 bytes, then the header's JSON
    is_safetensors = first_bytes[8:9] == b"{"
    if not is_safetensors and first_bytes.startswith((b"PK", b"\x80")):
        problem = f"{path}, a pickle, which runs code as it is opened"
        raise AdapterError(problem, "safetensors or GGUF", "get the adapter as safetensors")
    header = read_header(path) if is_safetensors else Header({}, {}, 0)
    keys, metadata = header.tensors, header.metadata
    for format_ in FORMATS:
        if format_.recognises(first_bytes, keys, metadata):
            return format_.name
    if any(key.startswith(peft.PREFIX) for key in keys):
        problem = f"{path}, the tensors of a PEFT folder without its {peft.CONFIG}"
        raise AdapterError(problem, "the folder", "name the folder that holds both")
    problem = f"{path} with keys such as {listing(sorted(keys), 2)}" if keys else f"{path}"
    raise AdapterError(problem, f"one of {', '.join(FORMATS.names())}", "check the file")


def _detect_folder(path: Path) -> str:
    tensors = path / peft.TENSORS
    if tensors.is_file():
        return "veneer" if "veneer" in read_header(tensors).metadata else "peft"
    files = sorted(path.iterdir())
    if pickles := [file.name for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]:
        problem = f"{listing(pickles, 2)} in {path}, a pickle, which runs code as it is opened"
        raise AdapterError(problem, peft.TENSORS, "save the adapter again as safetensors")
    single_files = [file.name for file in files if file.suffix in (".safetensors", ".gguf")]
    do = f"name the file, such as {path / single_files[0]}" if single_files else "check the path"
    raise AdapterError(
        f"no {peft.TENSORS} in the folder {path}", "an adapter folder, or a file", do
    )
