"""The fingerprints of a base: whether its weights are those that the adapters were trained on.

SHA-256 takes a third of the time of a merge. While another process finds the names (``merge_plan``), the tensors that
adapters speak of are hashed already; what was not reached by then is hashed when it is read. A file that changes
in between is found by its time and size, and hashed again.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from veneer.models.safetensors_dir import Checkpoint, read_tensor
from veneer.tools.merge_checkpoint.merge_plan import MergePlan

#: bytes that are read and hashed at once: they stay in the cache in between
PIECE = 1 << 21

#: (when the file was changed, its size, the fingerprint) by the name of a tensor
HashedAhead = Mapping[str, tuple[int, int, str]]


@contextmanager
def ahead(checkpoint: Checkpoint, names: Collection[str]) -> Iterator[HashedAhead]:
    """While the block runs, hash the bfloat16 tensors of these names; yields what is known so far."""
    known: dict[str, tuple[int, int, str]] = {}
    over = threading.Event()
    wanted = [name for name in checkpoint.where if name in names and checkpoint.dtype(name) == torch.bfloat16]
    thread = threading.Thread(target=_hash, args=(checkpoint, wanted, known, over), daemon=True)
    thread.start()
    try:
        yield known
    finally:
        over.set()
        thread.join()


def _hash(
    checkpoint: Checkpoint, names: list[str], known: dict[str, tuple[int, int, str]], over: threading.Event
) -> None:
    piece = memoryview(bytearray(PIECE))
    for name in names:
        try:
            source = os.open(checkpoint.folder / checkpoint.where[name], os.O_RDONLY)
        except OSError:
            return  # whoever needs it will meet the same, and say so
        try:
            stamp = _stamp(source)
            whole = hashlib.sha256(_head(checkpoint.shape(name)))
            left, at = checkpoint.bytes(name), checkpoint.start(name)
            while left:
                count = 0 if over.is_set() else os.preadv(source, [piece[: min(left, PIECE)]], at)
                if not count:
                    return
                whole.update(piece[:count])
                left, at = left - count, at + count
            if _stamp(source) == stamp:
                known[name] = (*stamp, _digits(whole))
        except OSError:
            return
        finally:
            os.close(source)


def _stamp(source: int) -> tuple[int, int]:
    stat = os.fstat(source)
    return stat.st_mtime_ns, stat.st_size


def _head(shape: Collection[int]) -> bytes:
    return str(tuple(shape)).encode()


def _digits(whole: hashlib._Hash) -> str:
    return whole.hexdigest()[:32]


def printed(
    merge_plan: MergePlan,
    checkpoint: Checkpoint,
    path: str,
    source: Callable[[str], int],
    loaded: Mapping[str, Tensor],
    known: HashedAhead,
) -> str:
    """The fingerprint of a base weight (``hashing.fingerprint``), tensor by tensor where several hold it.

    Args:
        source: the open file of a tensor.
        loaded: tensors that are in memory already.
        known: what ``ahead`` found.
    """
    tensors, shape, _ = merge_plan.fingerprints[path]
    within = {name: next(own.place.within for own in merge_plan.works[name] if own.path == path) for name in tensors}
    if len(tensors) == 1 and tensors[0] in known and not within[tensors[0]]:
        *stamp, found = known[tensors[0]]
        if tuple(shape) == tuple(checkpoint.shape(tensors[0])) and tuple(stamp) == _stamp(source(tensors[0])):
            return found
    whole = hashlib.sha256(_head(shape))
    for name in tensors:
        tensor = loaded.get(name)
        tensor = read_tensor(source(name), checkpoint, name) if tensor is None else tensor
        part = tensor[within[name]].to(torch.bfloat16).contiguous()
        whole.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return _digits(whole)
