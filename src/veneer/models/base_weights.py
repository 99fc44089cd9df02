"""The numbers of a model by the names of its parameters, wherever they lie.

    of_module(model)            in a live module; what is packed there is read as the dense numbers that it means
    of_state(model, tensors)    in a state dict
    of_folder(model, folder)    in safetensors, read when they are asked for

A ``Value`` is one parameter (or lasting buffer): its shape, its dtype, and how to read it, all of
it or some rows of its first axis. So two models that are larger than memory can be gone through
side by side, one weight at a time, and a stack of experts one expert at a time, although its file
may hold a tensor for each of them.

A tied parameter is one value under all its names. A file may hold it several times; ``Value.again``
are the others, for whoever needs to know that they are equal.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import weight_of
from veneer.attach.targets import Names, ParamRef, own_parameters
from veneer.bases import storage_of
from veneer.errors import CheckpointError, listing, raise_all, sentence
from veneer.models.meta import Place, map_checkpoint_names
from veneer.models.safetensors_dir import Checkpoint, open_checkpoint

#: numbers of a value that are read at once where it need not be in memory as a whole
PART = 1 << 24

Read = Callable[[slice | None], Tensor]


@dataclass(frozen=True)
class Value:
    """One parameter or buffer. ``read(rows)`` gives rows of the first axis, None all of it, on the
    device where it is (the CPU for files); what it gives is not to be written to."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Read
    again: tuple[Read, ...] = ()

    def parts(self) -> Iterator[Tensor]:
        """All of it, as parts that follow each other along the first axis, of about ``PART``
        numbers."""
        if not self.shape or not torch.Size(self.shape).numel():
            yield self.read(None)
            return
        step = max(1, PART * self.shape[0] // torch.Size(self.shape).numel())
        yield from (
            self.read(slice(start, start + step)) for start in range(0, self.shape[0], step)
        )


@dataclass(frozen=True)
class Weights:
    """The values of a model by every name that they have. ``unread`` are tensors of the files that
    are none of it."""

    what: str
    values: Mapping[str, Value]
    unread: tuple[str, ...] = ()

    def find(self, names: Sequence[str]) -> Value | None:
        """The value that goes by these names, with those that go by only some of them in
        ``again``."""
        found: list[Value] = []
        for value in (self.values[name] for name in names if name in self.values):
            if all(value is not other for other in found):
                found.append(value)
        if len(found) < 2:
            return found[0] if found else None
        first, *others = found
        again = (*first.again, *(read for other in others for read in (other.read, *other.again)))
        return Value(first.shape, first.dtype, first.read, again)


@dataclass(frozen=True)
class Named:
    """One parameter or buffer of a model: where it is first met, and all its names."""

    ref: ParamRef
    names: tuple[str, ...]
    buffer: bool

    @property
    def path(self) -> str:
        return self.names[0]

    def held(self, names: Names) -> tuple[Any, Any]:
        """What its module keeps under its name, and how that is stored (None: as it is)."""
        module, name = names.modules[self.ref[0]], self.ref[1]
        weight: Any = module._buffers[name] if self.buffer else weight_of(module, name)
        return weight, None if self.buffer else storage_of(weight)


def named(names: Names) -> list[Named]:
    """The parameters and lasting buffers of a model, each once, in the model's order."""
    by_identity: dict[int, tuple[ParamRef, list[str], bool]] = {}
    for path, module in names.modules.items():
        lasting = [
            name for name in module._buffers if name not in module._non_persistent_buffers_set
        ]
        for name in (*own_parameters(module), *lasting):
            value = module._buffers[name] if name in module._buffers else weight_of(module, name)
            if value is not None:
                entry = by_identity.setdefault(
                    id(value), ((path, name), [], name in module._buffers)
                )
                entry[1].extend(f"{alias}.{name}".lstrip(".") for alias in names.aliases[path])
    return [Named(ref, tuple(paths), buffer) for ref, paths, buffer in by_identity.values()]


def of_module(model: nn.Module, what: str = "the model") -> Weights:
    """The values of a live module, adapters aside (a merged one is in the weights)."""
    names = Names(model)
    values: dict[str, Value] = {}
    for entry in named(names):
        tensor, storage = entry.held(names)
        if storage is None:
            value = _value(tensor.shape, tensor.dtype, tensor.detach)
        else:
            value = _value(
                storage.shape(tensor), storage.dtype(tensor), partial(_dense, storage, tensor)
            )
        values |= dict.fromkeys(entry.names, value)
    return Weights(what, values)


def of_state(
    model: nn.Module, tensors: Mapping[str, Tensor], what: str = "the state dict"
) -> Weights:
    """The values of a state dict of ``model``; those under names that it does not have are kept,
    under these."""
    found = {
        name: _value(tensor.shape, tensor.dtype, tensor.detach) for name, tensor in tensors.items()
    }
    known = model.state_dict().keys()
    odd = {name: value for name, value in found.items() if name not in known}
    return Weights(what, {**odd, **_by_every_name(model, found)})


def of_folder(model: nn.Module, folder: str | Path) -> Weights:
    """The values of a folder of safetensors whose tensors are those of ``model`` by transformers'
    rules. ``CheckpointError``: as ``in_checkpoint``, or not such a folder."""
    checkpoint = open_checkpoint(folder)
    values, unread = in_checkpoint(model, checkpoint)
    return Weights(str(folder), _by_every_name(model, values), unread)


def in_checkpoint(
    model: nn.Module, checkpoint: Checkpoint
) -> tuple[dict[str, Value], tuple[str, ...]]:
    """(the values in a checkpoint by the names that they have in the state dict of ``model``, each
    under one of them; its tensors that are none of these). ``CheckpointError``: tensors that do not
    fill the parameters that they are a part of."""
    found = map_checkpoint_names(model, checkpoint.where)
    pieces: dict[str, list[tuple[str, Place]]] = {}
    for name, own in found.items():
        for place in own:
            pieces.setdefault(place.path, []).append((name, place))
    state, problems = model.state_dict(), []
    values: dict[str, Value] = {}
    for path, own in pieces.items():
        shape, dtypes = (
            _filled(checkpoint, own, tuple(state[path].shape)),
            {checkpoint.dtype(name) for name, _ in own},
        )
        if shape is None:
            what = f"{listing((f'{name} {list(checkpoint.shape(name))}' for name, _ in own), 3)}"
            expected = f"what makes {path} {list(state[path].shape)}"
            problems.append(
                sentence(what, expected, "get the files and the configuration of one model")
            )
            continue
        dtype = functools.reduce(torch.promote_types, dtypes)
        values[path] = Value(
            shape, dtype, partial(_assembled, checkpoint, tuple(own), shape, dtype)
        )
    raise_all(CheckpointError, f"The checkpoint {checkpoint.folder} cannot be used", problems)
    return values, tuple(sorted(checkpoint.where.keys() - found.keys()))


def _by_every_name(model: nn.Module, found: Mapping[str, Value]) -> dict[str, Value]:
    """The values under every name that the parameters of ``model`` have."""
    values: dict[str, Value] = {}
    weights, names = Weights("", found), Names(model)
    for entry in named(names):
        value = weights.find(entry.names) or _made(names, entry, found)
        if value is not None:
            values |= dict.fromkeys(entry.names, value)
    return values


def _made(names: Names, entry: Named, found: Mapping[str, Value]) -> Value | None:
    """The value of a weight that a parametrization makes of what the files hold, or None if they
    lack some of it."""
    path, name = entry.ref
    made: Any = None if entry.buffer else weight_of(names.modules[path], name)
    if not isinstance(made, nn.Module):
        return None
    parts = {
        key: found.get(f"{path}.parametrizations.{name}.{key}".lstrip("."))
        for key in made.state_dict()
    }
    known = {key: value for key, value in parts.items() if value is not None}
    storage: Any = storage_of(made)
    if storage is None or len(known) < len(parts):
        return None

    def dense() -> Tensor:
        own = copy.deepcopy(made)
        own.load_state_dict({key: value.read(None) for key, value in known.items()}, assign=True)
        return _dense(storage, own)

    first = next(value.dtype for value in known.values() if value.dtype.is_floating_point)
    return _value(storage.shape(made), first, dense)


def _dense(storage: Any, weight: Any) -> Tensor:
    with torch.no_grad():
        return storage.dense(weight).detach()


def _value(shape: Sequence[int], dtype: torch.dtype, whole: Callable[[], Tensor]) -> Value:
    """One of which rows are made with all the others."""
    return Value(tuple(shape), dtype, lambda rows: whole() if rows is None else whole()[rows])


def _filled(
    checkpoint: Checkpoint, pieces: Sequence[tuple[str, Place]], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The shape of what these tensors make, of which one alone has its own; None if they do not
    fill ``shape``."""
    if len(pieces) == 1 and not pieces[0][1].index and not pieces[0][1].within:
        return checkpoint.shape(pieces[0][0])
    count = 0
    for name, place in pieces:
        target, source = sliced(shape, place.index), sliced(checkpoint.shape(name), place.within)
        if target != source and target != (1, *source):
            return None
        count += target.numel()
    return shape if count == torch.Size(shape).numel() else None


def sliced(shape: Sequence[int], index: Sequence[slice]) -> torch.Size:
    """The shape of the part ``index`` of a tensor."""
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=False)]
    return torch.Size([*sizes, *shape[len(index) :]])


def _assembled(
    checkpoint: Checkpoint,
    pieces: Sequence[tuple[str, Place]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: slice | None,
) -> Tensor:
    """Rows of the parameter that tensors of the files make: no more of the files is read than these
    need."""
    name, place = pieces[0]
    if len(pieces) == 1 and not place.index and len(place.within) < 2:
        if place.within:
            meant = range(checkpoint.shape(name)[0])[place.within[0]][rows or slice(None)]
            rows = slice(meant.start, meant.stop)
        return checkpoint.read(name, rows).to(dtype)
    asked = range(shape[0])[rows or slice(None)]
    whole = torch.empty(len(asked), *shape[1:], dtype=dtype)
    for name, place in pieces:
        own = range(shape[0])[place.index[0]]
        # never divided along the first axis: a part of a stack is a whole matrix, other parameters
        # are read as a whole
        if own.start < asked.stop and asked.start < own.stop:
            part = whole[(slice(own.start - asked.start, own.stop - asked.start), *place.index[1:])]
            part.copy_(checkpoint.read(name)[place.within].reshape(part.shape))
    return whole
