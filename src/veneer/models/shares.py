"""A base of which each process reads its own rows of the files, and no weight as a whole.

    without_weights     what ``from_pretrained`` makes of the files; what they hold is on the meta device
    spread              ``fully_shard``: each parameter becomes a DTensor, whose part here is still there
    _read_shares        each part is read

transformers makes the model: it is given the tensors' shapes for tensors, so that it renames,
casts, ties and checks them, and initialises what the files lack (a new head) as it always does. Its
own rules then say which rows of which tensors a part consists of, of a stack of experts too
(``base_weights.checkpoint_weights``). Where they make a parameter in another way,
``WholeOnlyError`` says so.

Rejected: transformers' own reading into DTensors (its ``DistributedConfig``). It maps whole files
into memory, cuts each tensor before it joins or splits several along the axis that is cut, and
cannot be asked which it did.
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
    """Stands for a tensor of the files where transformers reads it: an empty one on the meta
    device."""

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
    **own: Any,
) -> Any:
    """The model of a folder as transformers' class ``auto`` makes it, frozen, and spread over
    processes.

    Args:
        spread: makes DTensors of its parameters, in place.
        fields: of its config.
        own: of ``from_pretrained``.

    Raises:
        WholeOnlyError: no safetensors, packed weights, or a parameter that is not made of rows of
            tensors.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        raise WholeOnlyError(str(error)) from error
    model = without_weights(checkpoint, auto, fields, **own).requires_grad_(False)
    sources = _sources(model, checkpoint)
    spread(model)
    _read_shares(model, sources, device)
    return model


def without_weights(
    checkpoint: Checkpoint, auto: str, fields: Mapping[str, Any], dtype: Any, **options: Any
) -> Any:
    """The model with its parameters and buffers on the meta device where the files hold them, and
    as transformers initialises them where not."""
    import transformers

    folder, code = checkpoint.folder, {"trust_remote_code": options.pop("trust_remote_code", False)}
    config = transformers.AutoConfig.from_pretrained(folder, **code, **fields)
    if getattr(config, "quantization_config", None) is not None:
        raise WholeOnlyError(
            f"{folder}, whose weights are quantised", "weights in 16 or 32 bits", "read all of it"
        )
    own = _dtype(checkpoint, config) if dtype == "auto" else dtype
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shell = getattr(transformers, auto).from_config(
            without_hub_kernel(config), dtype=own, **code
        )
    shapes: Any = {name: _Shape(checkpoint.shape(name)) for name in checkpoint.where}
    model = type(shell).from_pretrained(
        None, config=shell.config, state_dict=shapes, dtype=own, **code, **options
    )
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, **code)
    return model


def _dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """What transformers takes for "auto"."""
    floats = (dtype for dtype in map(checkpoint.dtype, checkpoint.where) if dtype.is_floating_point)
    return config.dtype or next(floats, torch.float32)


def _held(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Any], str], Any]]:
    """(name, (the table that holds it, its name there), value) of all parameters and buffers, under
    all their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for own, value in table.items():
                if value is not None:
                    yield f"{path}.{own}".lstrip("."), (table, own), value


def _sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, BaseWeight]:
    """What the files hold of all that is on the meta device, by every name. Those that transformers
    ties where both are in the files and equal, it could not compare: they are tied here."""
    values, _ = checkpoint_weights(model, checkpoint)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        own, other = model.get_parameter(target), model.get_parameter(source)
        if (
            own is not other
            and own.is_meta
            and other.is_meta
            and _equal(values.get(target), values.get(source))
        ):
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, other)
    held = {name: value for name, _, value in _held(model) if value.is_meta}
    found = {id(value): values[name] for name, value in held.items() if name in values}
    if unknown := [name for name, value in held.items() if id(value) not in found]:
        problem = (
            f"{checkpoint.folder}, whose {listing(unknown, 3)} is not made of rows of its tensors"
        )
        raise WholeOnlyError(
            problem, "a tensor a parameter, or stacked or joined ones", "read all of it"
        )
    return {name: found[id(value)] for name, value in held.items()}


def _equal(one: BaseWeight | None, other: BaseWeight | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return all(torch.equal(a, b) for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _read_shares(model: nn.Module, sources: Mapping[str, BaseWeight], device: torch.device) -> None:
    """Read what of a model is on the meta device: of a DTensor the rows that are this process's, of
    all else all.

    A parameter at a time is in memory twice if ``device`` is not the processor, or its dtype is not
    that of the files.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as part_of

    made = dict[int, Any]()
    for name, (table, own), value in _held(model):
        if not value.is_meta:
            continue
        if id(value) not in made:
            read = partial(_read, sources[name], value.dtype, device)
            if is_sharded(value):
                shape, first = part_of(value.shape, value.device_mesh, value.placements)
                here = read(slice(first[0], first[0] + shape[0]))
                new = DTensor.from_local(
                    here,
                    value.device_mesh,
                    value.placements,
                    run_check=False,
                    shape=value.shape,
                    stride=value.stride(),
                )
            else:
                new = read(None)
            made[id(value)] = (
                nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
            )
            made[
                id(value)
            ]._is_hf_initialized = (
                True  # as transformers marks what it has read (``fresh_weights``)
            )
        table[own] = made[id(value)]


def _read(
    value: BaseWeight, dtype: torch.dtype, device: torch.device, rows: slice | None
) -> Tensor:
    if rows is not None and rows.start >= rows.stop:
        return torch.empty((0, *value.shape[1:]), dtype=dtype, device=device)
    return value.read(rows).to(device, dtype)
