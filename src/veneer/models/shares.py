"""Load a base so that each process reads only its own rows of the files.

    without_weights     transformers' model, with the tensors of the files on the meta device
    spread              ``fully_shard``: parameters become DTensors, their local shards still meta
    _read_shares        reads each local shard

transformers builds the model. It gets the shapes of the tensors instead of their values, so it
renames, casts, ties and checks them and initialises missing tensors (a new head) as usual. Its
conversion rules then determine the rows of the tensors that form a shard, also for stacks of
experts (``base_weights.checkpoint_weights``). ``WholeOnlyError``: they build a parameter in another
way.

Rejected: transformers' own loading into DTensors (``DistributedConfig``). It maps complete files
into memory, slices each tensor before it joins or splits several along the sharded axis, and does
not report which it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.distributed import is_sharded
from veneer.errors import CheckpointError, ConfigError, listing
from veneer.models.base_weights import BaseWeight, checkpoint_weights
from veneer.models.remote_code import without_hub_kernel
from veneer.models.safetensors_dir import Checkpoint, open_checkpoint


class WholeOnlyError(ConfigError):
    """A base whose files cannot be read by the rows of its parameters."""


class _Shape:
    """A placeholder that transformers reads instead of a tensor of the files: an empty tensor on
    the meta device."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, _: Any) -> _Shape:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")


def load_shares(
    folder: Path,
    auto: str,
    spread: Callable[[Any], None],
    device: torch.device,
    fields: Mapping[str, Any],
    **options: Any,
) -> Any:
    """Load the model of a folder in transformers' class ``auto``, frozen, and spread over
    processes.

    Args:
        spread: turns its parameters into DTensors, in place.
        fields: fields of its config.
        options: arguments of ``from_pretrained``.

    Raises:
        WholeOnlyError: no safetensors, packed weights, or a parameter that is not formed by rows of
            tensors.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        raise WholeOnlyError(str(error)) from error
    model = without_weights(checkpoint, auto, fields, **options).requires_grad_(False)
    sources = _sources(model, checkpoint)
    spread(model)
    _read_shares(model, sources, device)
    return model


def without_weights(
    checkpoint: Checkpoint, auto: str, fields: Mapping[str, Any], dtype: Any, **options: Any
) -> Any:
    """The model with the tensors of the files on the meta device; transformers has initialised all
    others."""
    import transformers

    folder, code = checkpoint.folder, {"trust_remote_code": options.pop("trust_remote_code", False)}
    config = transformers.AutoConfig.from_pretrained(folder, **code, **fields)
    if getattr(config, "quantization_config", None) is not None:
        raise WholeOnlyError(
            f"{folder}, whose weights are quantised", "weights in 16 or 32 bits", "read all of it"
        )
    weight_dtype = _dtype(checkpoint, config) if dtype == "auto" else dtype
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shell = getattr(transformers, auto).from_config(
            without_hub_kernel(config), dtype=weight_dtype, **code
        )
    shapes: Any = {name: _Shape(checkpoint.shape(name)) for name in checkpoint.file_of}
    model = type(shell).from_pretrained(
        None, config=shell.config, state_dict=shapes, dtype=weight_dtype, **code, **options
    )
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, **code)
    return model


def _dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """The dtype that transformers uses for "auto"."""
    floats = (
        dtype for dtype in map(checkpoint.dtype, checkpoint.file_of) if dtype.is_floating_point
    )
    return config.dtype or next(floats, torch.float32)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Any], str], Any]]:
    """(name, (the dict that holds it, its key there), tensor) of all parameters and buffers, under
    all their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, value in table.items():
                if value is not None:
                    yield f"{path}.{name}".lstrip("."), (table, name), value


def _sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, BaseWeight]:
    """The file weights of all tensors on the meta device, by all their names. transformers cannot
    compare tied weights on the meta device if the files hold both; this function ties equal
    ones."""
    values, _ = checkpoint_weights(model, checkpoint)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        target_param, source_param = model.get_parameter(target), model.get_parameter(source)
        if (
            target_param is not source_param
            and target_param.is_meta
            and source_param.is_meta
            and _equal(values.get(target), values.get(source))
        ):
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, source_param)
    meta_tensors = {name: value for name, _, value in _named_tensors(model) if value.is_meta}
    weights_by_id = {
        id(value): values[name] for name, value in meta_tensors.items() if name in values
    }
    if unmatched := [
        name for name, value in meta_tensors.items() if id(value) not in weights_by_id
    ]:
        problem = (
            f"{checkpoint.folder}, whose {listing(unmatched, 3)} is not made of rows of its tensors"
        )
        raise WholeOnlyError(
            problem, "a tensor a parameter, or stacked or joined ones", "read all of it"
        )
    return {name: weights_by_id[id(value)] for name, value in meta_tensors.items()}


def _equal(first: BaseWeight | None, second: BaseWeight | None) -> bool:
    if first is None or second is None or first.shape != second.shape:
        return False
    return all(torch.equal(a, b) for a, b in zip(first.blocks(), second.blocks(), strict=True))


def _read_shares(model: nn.Module, sources: Mapping[str, BaseWeight], device: torch.device) -> None:
    """Read the tensors that are on the meta device: this process's rows of a DTensor, all rows of
    others.

    A parameter is in memory twice while it is read, if ``device`` is not the CPU or its dtype
    differs from that of the files.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as part_of

    tensors_by_id = dict[int, Any]()
    for name, (table, key), value in _named_tensors(model):
        if not value.is_meta:
            continue
        if id(value) not in tensors_by_id:
            read = partial(_read, sources[name], value.dtype, device)
            if is_sharded(value):
                shape, offset = part_of(value.shape, value.device_mesh, value.placements)
                local_rows = read(slice(offset[0], offset[0] + shape[0]))
                tensor = DTensor.from_local(
                    local_rows,
                    value.device_mesh,
                    value.placements,
                    run_check=False,
                    shape=value.shape,
                    stride=value.stride(),
                )
            else:
                tensor = read(None)
            tensors_by_id[id(value)] = (
                nn.Parameter(tensor, value.requires_grad)
                if isinstance(value, nn.Parameter)
                else tensor
            )
            tensors_by_id[id(value)]._is_hf_initialized = (
                # the attribute by which transformers marks tensors that it has read
                # (``Names.fresh_parameters``)
                True
            )
        table[key] = tensors_by_id[id(value)]


def _read(
    value: BaseWeight, dtype: torch.dtype, device: torch.device, rows: slice | None
) -> Tensor:
    if rows is not None and rows.start >= rows.stop:
        return torch.empty((0, *value.shape[1:]), dtype=dtype, device=device)
    return value.read(rows).to(device, dtype)
