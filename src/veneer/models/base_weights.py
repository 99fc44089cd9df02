"""Read base weights by name, from any source.

    open_base_weights(source)                 calls one of these:
    module_weights(model)                     a live module; packed weights are read as dense ones
    state_dict_weights(model, tensors)        a state dict of ``model``
    folder_weights(model, folder)             safetensors files; names are those of ``model``
    tensor_weights(tensors)                   tensors by name, or a function that reads one

    weights.get(name)  ->  BaseWeight         shape, dtype, read(rows), fingerprint()

A ``BaseWeight`` is one parameter or persistent buffer. It is read completely, or by rows of its
first axis. So two models that are larger than memory can be compared, and a stack of experts can be
read one expert at a time, even if the file holds a tensor for each expert. A GGUF file is first
converted to a folder (``gguf_conversion.py``).

A tied parameter is one weight with several names. The files may hold a copy of it under each name.
The copies after the first are its ``duplicates``, for callers that compare the copies.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import ModelIndex, unwrap
from veneer.bases import Storage, own_parameters, storage_of, weight_of
from veneer.errors import CheckpointError, ConfigError, listing, raise_all, sentence
from veneer.fileio.hashing import XXH3, fingerprint_of, kind_of
from veneer.layers import ParamRef
from veneer.models.locate import folder_of
from veneer.models.meta import ParamSlice, map_checkpoint_names, meta_model
from veneer.models.safetensors_dir import Checkpoint, open_checkpoint

#: how many values of a weight to read at once, if the weight need not be in memory completely
BLOCK_SIZE = 1 << 24
#: weights that a model may tie (embeddings and output heads), by the last two components of their
#: names
TIED_ENDINGS = (
    "lm_head.weight", "embed_out.weight", "proj_out.weight", "embed_tokens.weight", "wte.weight",
    "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight", "shared.weight",
)  # fmt: skip

#: reads rows of a weight's first axis, or all rows for None
ReadRows = Callable[[slice | None], Tensor]
#: a module, tensors by name, a function that returns the tensor of a name, or a path
WeightSource = nn.Module | Mapping[str, Tensor] | Callable[[str], Tensor] | str | Path


@dataclass(frozen=True)
class BaseWeight:
    """One parameter or buffer.

    Fields:
        read_rows: takes a slice of rows of the first axis, or None for all rows, and returns the
            values on the device of the source (the CPU for files). The caller must not change the
            returned tensor, which may be the model's own.
        duplicates: if the weight is tied and the files hold a copy under each of its names, a
            function like ``read_rows`` for each copy after the first.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: ReadRows
    duplicates: tuple[ReadRows, ...] = ()

    def read(self, rows: slice | None = None) -> Tensor:
        return self.read_rows(rows)

    def blocks(self) -> Iterator[Tensor]:
        """The weight in blocks of rows, each of about ``BLOCK_SIZE`` values."""
        value_count = torch.Size(self.shape).numel()
        if not self.shape or not value_count:
            yield self.read()
            return
        step = max(1, BLOCK_SIZE * self.shape[0] // value_count)
        for start in range(0, self.shape[0], step):
            yield self.read(slice(start, start + step))

    def fingerprint(self, kind: str = XXH3) -> str:
        """The hash of shape and values by ``fileio.hashing.fingerprint``. The weight is read in
        blocks. ``kind``: the hash function, or a fingerprint that was computed with it."""
        return fingerprint_of(self.shape, self.blocks(), kind)


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base, by name. A tied weight is listed under each of its names.

    Fields:
        label: describes the source in messages.
        unread: names of the tensors in the files for which the model has no parameter.
        file_weights: for a folder that was opened without a model, its weights by their names in
            the files; else None. If it is set, ``get`` finds a weight with or without a prefix of
            its name.
    """

    label: str
    by_name: Mapping[str, BaseWeight]
    unread: tuple[str, ...] = ()
    file_weights: Mapping[str, BaseWeight] | None = None
    _fingerprints: dict[tuple[int, str], str] = field(default_factory=dict, compare=False)

    def get(self, name: str) -> BaseWeight | None:
        if self.file_weights is None:
            return self.by_name.get(name)
        for weights in (self.by_name, self.file_weights):
            match = _match_name(weights, name)
            if match is not None:
                return weights[match]
        return None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values of a weight, or of ``rows`` of its first axis. ``KeyError``: there is no
        weight of this name."""
        weight = self.get(name)
        if weight is None:
            raise KeyError(name)
        return weight.read(rows)

    def fingerprint(self, name: str, kind: str = XXH3) -> str | None:
        """The fingerprint of a weight, or None if there is no weight of this name. ``kind``: the
        hash function, or a fingerprint that was computed with it. For a folder that was opened
        without a model, each fingerprint is computed once; for any other source it is computed in
        each call, because a weight of a live model may have changed."""
        weight = self.get(name)
        cache_key = id(weight), kind_of(kind)
        if weight is None or self.file_weights is None:
            return None if weight is None else weight.fingerprint(kind)
        if cache_key not in self._fingerprints:
            self._fingerprints[cache_key] = weight.fingerprint(kind)
        return self._fingerprints[cache_key]

    def aliases(self, name: str) -> list[str]:
        """All names of the weight ``name``; [``name``] if there is no weight of this name."""
        weight = self.by_name.get(name)
        if weight is None:
            return [name]
        return [alias for alias, candidate in self.by_name.items() if candidate is weight]

    def find(self, names: Sequence[str]) -> BaseWeight | None:
        """The weight that has one of these names, or None. If several have one, they are copies of
        one tied weight: the result is the first, with the others as its ``duplicates``."""
        matches = {
            id(self.by_name[name]): self.by_name[name] for name in names if name in self.by_name
        }
        if len(matches) < 2:
            return next(iter(matches.values()), None)
        first, *copies = matches.values()
        readers = (read for weight in copies for read in (weight.read_rows, *weight.duplicates))
        return BaseWeight(first.shape, first.dtype, first.read_rows, (*first.duplicates, *readers))


def open_base_weights(source: WeightSource, model: nn.Module | None = None) -> BaseWeights:
    """The weights of ``source``, by their names in ``model`` if it is given.

    Without ``model``, the weights of a folder have the names that they have in the model of the
    folder's config, or those in the files if there is no config or transformers does not know this
    model. ``get`` then finds a weight with or without a prefix of its name, and a tied embedding by
    the name of the embedding or of the head.

    Raises:
        CheckpointError: the path holds no safetensors, damaged ones, or tensors that do not fill a
            parameter of the model.
    """
    if isinstance(source, nn.Module):
        return module_weights(unwrap(source))
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        folder = folder_of(source) if path.is_file() else path
        return _open_folder_by_config(folder) if model is None else folder_weights(model, folder)
    if isinstance(source, Mapping) and model is not None:
        return state_dict_weights(model, source)
    return tensor_weights(source)


def _open_folder_by_config(folder: Path) -> BaseWeights:
    checkpoint, by_name = open_checkpoint(folder), {}
    if (folder / "config.json").is_file():
        with suppress(ConfigError):  # transformers does not know the model of the config
            by_name = folder_weights(meta_model(folder), folder).by_name
    file_weights = {
        name: BaseWeight(
            checkpoint.shape(name), checkpoint.dtype(name), partial(checkpoint.read, name)
        )
        for name in checkpoint.file_of
    }
    return BaseWeights(str(folder), by_name, file_weights=file_weights)


def _match_name(known_names: Collection[str], name: str) -> str | None:
    """The entry of ``known_names`` for the weight ``name``: the same name, with or without a
    prefix, or, if ``name`` ends like that of an embedding or a head (``TIED_ENDINGS``), the first
    entry that does so too. None if there is no such entry."""
    components = name.split(".")
    suffixes = (".".join(components[start:]) for start in range(max(1, len(components) - 1)))
    match = next((suffix for suffix in suffixes if suffix in known_names), None)
    if match is not None:
        return match
    prefixed_names = [candidate for candidate in known_names if candidate.endswith(f".{name}")]
    if len(prefixed_names) == 1:
        return prefixed_names[0]
    if ".".join(components[-2:]) not in TIED_ENDINGS:
        return None
    tied_names = (tied for tied in known_names if ".".join(tied.split(".")[-2:]) in TIED_ENDINGS)
    return next(tied_names, None)


@dataclass(frozen=True)
class ModuleWeight:
    """One parameter or persistent buffer of a model.

    Fields:
        ref: (path of the module, name of the weight in the module) of its first occurrence in the
            model.
        names: all its names in the state dict.
        module: the module at ``ref``.
        weight: a tensor, the ``ParametrizationList`` that computes it, or ``module`` itself if only
            the module's own forward can read the weight.
        storage: how ``weight`` stores the values; None for a buffer, or if Veneer knows no storage
            for ``weight``. ``weight`` itself is then read as the tensor of the values.
    """

    ref: ParamRef
    names: tuple[str, ...]
    module: nn.Module
    weight: Any
    storage: Storage | None
    is_buffer: bool

    @property
    def path(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape if self.storage is None else self.storage.shape(self.weight))

    @property
    def is_readable(self) -> bool:
        """Whether the values can be read: they are not on the meta device, not lazy (without a
        shape yet), and not packed by a library that Veneer does not know."""
        tensors = self.weight.parameters() if isinstance(self.weight, nn.Module) else [self.weight]
        if any(nn.parameter.is_lazy(tensor) or tensor.is_meta for tensor in tensors):
            return False
        return self.storage is not None or type(self.weight).__module__.partition(".")[0] == "torch"

    def base_weight(self) -> BaseWeight:
        """The weight as a ``BaseWeight``, whose values are decoded by ``storage`` when they are
        read."""
        if self.storage is None:
            return _unsliced_weight(self.weight.shape, self.weight.dtype, self.weight.detach)
        read_dense = partial(_decode_weight, self.storage, self.weight)
        return _unsliced_weight(self.shape, self.storage.dtype(self.weight), read_dense)


def list_weights(model_index: ModelIndex) -> list[ModuleWeight]:
    """The parameters and persistent buffers of the model in ``model_index``, in the order of its
    modules. A tied weight is listed once, with all of its names."""
    entries_by_id: dict[int, tuple[ParamRef, list[str], Any, bool]] = {}
    for path, module in model_index.modules.items():
        non_persistent_names = module._non_persistent_buffers_set
        persistent_buffers = [name for name in module._buffers if name not in non_persistent_names]
        for name in (*own_parameters(module), *persistent_buffers):
            is_buffer = name in module._buffers
            weight = module._buffers[name] if is_buffer else weight_of(module, name)
            if weight is not None:
                entry = entries_by_id.setdefault(id(weight), ((path, name), [], weight, is_buffer))
                entry[1].extend(
                    f"{alias}.{name}".lstrip(".") for alias in model_index.aliases[path]
                )
    return [
        ModuleWeight(
            ref,
            tuple(weight_names),
            model_index.modules[ref[0]],
            weight,
            None if is_buffer else storage_of(weight),
            is_buffer,
        )
        for ref, weight_names, weight, is_buffer in entries_by_id.values()
    ]


def module_weights(model: nn.Module, label: str = "the model") -> BaseWeights:
    """The weights of a live module, without those of its adapters. An adapter that is merged is
    included in the values. ``label``: describes the module in messages."""
    by_name: dict[str, BaseWeight] = {}
    for module_weight in list_weights(ModelIndex(model)):
        by_name |= dict.fromkeys(module_weight.names, module_weight.base_weight())
    return BaseWeights(label, by_name)


def state_dict_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], label: str = "the state dict"
) -> BaseWeights:
    """The weights of a state dict of ``model``, each under all names that it has in the model.
    Tensors for which the model has no parameter keep their names. ``label``: describes the state
    dict in messages."""
    weights = {name: _tensor_weight(tensor) for name, tensor in tensors.items()}
    known_names = model.state_dict().keys()
    unmatched = {name: weight for name, weight in weights.items() if name not in known_names}
    return BaseWeights(label, {**unmatched, **_by_every_name(model, weights)})


def folder_weights(model: nn.Module, folder: str | Path) -> BaseWeights:
    """The weights of a folder of safetensors that transformers would load into ``model``, by their
    names in the model. ``CheckpointError``: the folder holds no safetensors, or tensors that do not
    fill a parameter of the model."""
    weights, unread = checkpoint_weights(model, open_checkpoint(folder))
    return BaseWeights(str(folder), _by_every_name(model, weights), unread)


class _TensorFunction(Mapping[str, BaseWeight]):
    """The weights that a function ``read`` returns by name. The function raises KeyError for an
    unknown name. Its names are not known, so iteration yields none."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> BaseWeight:
        return _tensor_weight(self._read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def tensor_weights(source: Mapping[str, Tensor] | Callable[[str], Tensor]) -> BaseWeights:
    """Weights from a mapping of tensors, or from a function that takes a name and returns a tensor,
    and raises KeyError for an unknown name. The names cannot be listed."""
    read: Any = source.__getitem__ if hasattr(source, "__getitem__") else source
    return BaseWeights("the tensors", _TensorFunction(read))


def checkpoint_weights(
    model: nn.Module, checkpoint: Checkpoint
) -> tuple[dict[str, BaseWeight], tuple[str, ...]]:
    """The weights of ``model`` in a checkpoint.

    Returns:
        (weights, each by one of its names in the state dict of ``model``; names of the checkpoint's
        tensors for which the model has no parameter).

    Raises:
        CheckpointError: the tensors for a parameter do not fill the parameter's shape.
    """
    param_slices = map_checkpoint_names(model, checkpoint.file_of, checkpoint.shape)
    tensors_of_path: dict[str, list[tuple[str, ParamSlice]]] = {}
    for tensor_name, tensor_slices in param_slices.items():
        for param_slice in tensor_slices:
            tensors_of_path.setdefault(param_slice.path, []).append((tensor_name, param_slice))
    state_dict, problems = model.state_dict(), []
    weights: dict[str, BaseWeight] = {}
    for path, tensors in tensors_of_path.items():
        model_shape = tuple(state_dict[path].shape)
        shape = _joined_shape(checkpoint, tensors, model_shape)
        if shape is None:
            shapes = (f"{name} {list(checkpoint.shape(name))}" for name, _ in tensors)
            expected = f"tensors that make {path} {list(model_shape)}"
            remedy = "get the files and the configuration of one model"
            problems.append(sentence(listing(shapes, 3), expected, remedy))
            continue
        dtypes = {checkpoint.dtype(tensor_name) for tensor_name, _ in tensors}
        dtype = functools.reduce(torch.promote_types, dtypes)
        read_rows = partial(_join_rows, checkpoint, tuple(tensors), shape, dtype)
        weights[path] = BaseWeight(shape, dtype, read_rows)
    raise_all(CheckpointError, f"The checkpoint {checkpoint.folder} cannot be used", problems)
    return weights, tuple(sorted(checkpoint.file_of.keys() - param_slices.keys()))


def _by_every_name(model: nn.Module, weights: Mapping[str, BaseWeight]) -> dict[str, BaseWeight]:
    """The weights of ``model`` in ``weights``, each listed under all names of its parameter in
    ``model``. Parameters without a weight are left out."""
    by_name: dict[str, BaseWeight] = {}
    source_weights = BaseWeights("", weights)
    for module_weight in list_weights(ModelIndex(model)):
        weight = source_weights.find(module_weight.names) or _computed_weight(
            module_weight, weights
        )
        if weight is not None:
            by_name |= dict.fromkeys(module_weight.names, weight)
    return by_name


def _computed_weight(
    module_weight: ModuleWeight, weights: Mapping[str, BaseWeight]
) -> BaseWeight | None:
    """The weight that a parametrization of the model computes from tensors in ``weights``. None if
    ``module_weight`` is not parametrized, or if ``weights`` lacks one of the tensors."""
    (path, name), parametrized = module_weight.ref, module_weight.weight
    if module_weight.is_buffer or not isinstance(parametrized, nn.Module):
        return None
    prefix = f"{path}.parametrizations.{name}.".lstrip(".")
    storage: Any = module_weight.storage
    keys = parametrized.state_dict().keys()
    if storage is None or not all(prefix + key in weights for key in keys):
        return None
    source_weights = {key: weights[prefix + key] for key in keys}

    def compute() -> Tensor:
        filled_copy = copy.deepcopy(parametrized)
        tensors = {key: weight.read() for key, weight in source_weights.items()}
        filled_copy.load_state_dict(tensors, assign=True)
        return _decode_weight(storage, filled_copy)

    dtype = next(
        weight.dtype for weight in source_weights.values() if weight.dtype.is_floating_point
    )
    return _unsliced_weight(storage.shape(parametrized), dtype, compute)


def _decode_weight(storage: Any, weight: Any) -> Tensor:
    with torch.no_grad():
        return storage.dense(weight).detach()


def _tensor_weight(tensor: Tensor) -> BaseWeight:
    return _unsliced_weight(tensor.shape, tensor.dtype, tensor.detach)


def _unsliced_weight(
    shape: Sequence[int], dtype: torch.dtype, read_all: Callable[[], Tensor]
) -> BaseWeight:
    """A ``BaseWeight`` for a source that can only be read completely: to read some rows,
    ``read_all`` is called and the rows are selected from its result."""
    read = lambda rows: read_all() if rows is None else read_all()[rows]  # noqa: E731
    return BaseWeight(tuple(shape), dtype, read)


def _joined_shape(
    checkpoint: Checkpoint, tensors: Sequence[tuple[str, ParamSlice]], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The shape of the parameter that ``tensors`` of a checkpoint, (name, slice of the parameter
    that it fills) each, form together. If one tensor holds the complete parameter, its shape; else
    ``shape``, the parameter's shape in the model, or None if the tensors do not fill it."""
    if len(tensors) == 1 and not tensors[0][1].index and not tensors[0][1].within:
        return checkpoint.shape(tensors[0][0])
    filled_count = 0
    for tensor_name, param_slice in tensors:
        target_shape = slice_shape(shape, param_slice.index)
        source_shape = slice_shape(checkpoint.shape(tensor_name), param_slice.within)
        if target_shape != source_shape and target_shape != (1, *source_shape):
            return None
        filled_count += target_shape.numel()
    return shape if filled_count == torch.Size(shape).numel() else None


def slice_shape(shape: Sequence[int], index: Sequence[slice]) -> torch.Size:
    """The shape of ``tensor[index]`` for a tensor of this shape."""
    sizes = [len(range(*axis.indices(size))) for axis, size in zip(index, shape, strict=False)]
    return torch.Size([*sizes, *shape[len(index) :]])


def _join_rows(
    checkpoint: Checkpoint,
    tensors: Sequence[tuple[str, ParamSlice]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: slice | None,
) -> Tensor:
    """The rows ``rows`` (None: all) of the parameter with this ``shape`` that ``tensors`` of a
    checkpoint, (name, slice of the parameter that it fills) each, form together. Only tensors that
    hold some of these rows are read. The result is converted to ``dtype``."""
    tensor_name, param_slice = tensors[0]
    if len(tensors) == 1 and not param_slice.index and len(param_slice.within) < 2:
        if param_slice.within:
            all_rows = range(checkpoint.shape(tensor_name)[0])[param_slice.within[0]]
            file_rows = all_rows[rows or slice(None)]
            rows = slice(file_rows.start, file_rows.stop)
        return checkpoint.read(tensor_name, rows).to(dtype)
    requested_rows = range(shape[0])[rows or slice(None)]
    joined_rows = torch.empty(len(requested_rows), *shape[1:], dtype=dtype)
    for tensor_name, param_slice in tensors:
        index = param_slice.index or (slice(None),)
        tensor_rows = range(shape[0])[index[0]]
        first = max(tensor_rows.start, requested_rows.start)
        stop = min(tensor_rows.stop, requested_rows.stop)
        if first >= stop:
            continue
        target_rows = slice(first - requested_rows.start, stop - requested_rows.start)
        target = joined_rows[(target_rows, *index[1:])]
        source_rows = slice(first - tensor_rows.start, stop - tensor_rows.start)
        if not param_slice.within and checkpoint.shape(tensor_name)[0] == len(tensor_rows):
            source = checkpoint.read(tensor_name, source_rows)
        else:
            whole = checkpoint.read(tensor_name)[param_slice.within]
            source = whole.reshape(len(tensor_rows), *target.shape[1:])[source_rows]
        target.copy_(source.reshape(target.shape))
    return joined_rows
