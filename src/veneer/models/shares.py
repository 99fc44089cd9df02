"""Load a base that is sharded over several processes, so that each process reads only its share
(the rows of its shards) of the files.

    build_on_meta       transformers' model, with the files' tensors on the meta device
    spread              a function of the caller (such as ``fully_shard``) that turns parameters
                        into DTensors, still on the meta device
    _read_shares        reads the values of this process's shard of each parameter

transformers builds the model. It gets the shapes of the files' tensors instead of their values. So
it renames, casts, ties and checks tensors as usual, and initialises missing ones (a new head). Its
conversion rules then tell which rows of which tensors form a shard, also for stacks of experts
(``base_weights.checkpoint_weights``). A ``WholeOnlyError`` is raised for a base with a parameter
whose rows are not rows of the files' tensors.

transformers' own loading into DTensors (``DistributedConfig``) is not used, because it maps
complete files into memory. Besides, if it joins or splits tensors along the sharded axis, it may
slice a tensor before or after that step, and does not report which.
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
    """A base of which a process cannot read only its share: the rows of a parameter are not rows of
    tensors in safetensors files."""


class _MetaPlaceholder:
    """An object that transformers takes for a tensor of a safetensors file. It has a shape. When
    transformers reads its values (``[...]`` and ``to``), it gets a tensor on the meta device, so
    that nothing is read from the file."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, _: Any) -> _MetaPlaceholder:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")


def load_shares(
    folder: Path,
    auto_class: str,
    spread: Callable[[Any], None],
    device: torch.device,
    fields: Mapping[str, Any],
    **options: Any,
) -> Any:
    """Load the model of a folder, with its parameters frozen and sharded over the processes.

    Args:
        auto_class: the name of the class of transformers that loads the model.
        spread: turns the parameters of a model into DTensors, in place.
        device: the device of this process's shards.
        fields: fields of the model's config to set.
        options: arguments of ``from_pretrained``.

    Raises:
        WholeOnlyError: the folder has no usable safetensors, its weights are quantised, or the rows
            of a parameter are not rows of the files' tensors.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        raise WholeOnlyError(str(error)) from error
    model = build_on_meta(checkpoint, auto_class, fields, **options).requires_grad_(False)
    sources = _sources(model, checkpoint)
    spread(model)
    _read_shares(model, sources, device)
    return model


def build_on_meta(
    checkpoint: Checkpoint, auto_class: str, fields: Mapping[str, Any], dtype: Any, **options: Any
) -> Any:
    """The model in which all tensors of the checkpoint are on the meta device, without values.
    transformers has initialised the parameters that the checkpoint lacks. ``WholeOnlyError``: the
    weights are quantised. ``dtype``: a torch dtype, or "auto" for that in the files. The other
    arguments are those of ``load_shares``."""
    import transformers

    folder, code_arguments = (
        checkpoint.folder,
        {"trust_remote_code": options.pop("trust_remote_code", False)},
    )
    config = transformers.AutoConfig.from_pretrained(folder, **code_arguments, **fields)
    if getattr(config, "quantization_config", None) is not None:
        raise WholeOnlyError(
            f"{folder}, whose weights are quantised", "weights in 16 or 32 bits", "read all of it"
        )
    weight_dtype = _stored_dtype(checkpoint, config) if dtype == "auto" else dtype
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty_model = getattr(transformers, auto_class).from_config(
            without_hub_kernel(config), dtype=weight_dtype, **code_arguments
        )
    placeholders: Any = {
        name: _MetaPlaceholder(checkpoint.shape(name)) for name in checkpoint.file_of
    }
    model = type(empty_model).from_pretrained(
        None,
        config=empty_model.config,
        state_dict=placeholders,
        dtype=weight_dtype,
        **code_arguments,
        **options,
    )
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            folder, **code_arguments
        )
    return model


def _stored_dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """The dtype that transformers chooses for ``dtype="auto"``: that in the config, else that of
    the first floating-point tensor in the files."""
    float_dtypes = (
        dtype for dtype in map(checkpoint.dtype, checkpoint.file_of) if dtype.is_floating_point
    )
    return config.dtype or next(float_dtypes, torch.float32)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Any], str], Any]]:
    """Yield (name, (dict of the module that holds the tensor, key in this dict), tensor) for all
    parameters and buffers. A tied tensor is yielded under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    yield f"{path}.{name}".lstrip("."), (table, name), tensor


def _sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, BaseWeight]:
    """The weight in the files for each of the model's tensors on the meta device, by all names of
    the tensor. Ties weights of the model in place.

    If the files hold both of two tied weights, transformers ties them only if their values are
    equal, which it cannot tell on the meta device. This function compares the values in the files,
    and ties the weights if they are equal.

    Raises:
        WholeOnlyError: a tensor on the meta device has no weight in the files.
    """
    weights, _ = checkpoint_weights(model, checkpoint)
    for target_name, source_name in getattr(model, "all_tied_weights_keys", {}).items():
        target_param, source_param = (
            model.get_parameter(target_name),
            model.get_parameter(source_name),
        )
        if (
            target_param is not source_param
            and target_param.is_meta
            and source_param.is_meta
            and _have_equal_values(weights.get(target_name), weights.get(source_name))
        ):
            path, _, name = target_name.rpartition(".")
            setattr(model.get_submodule(path), name, source_param)
    meta_tensors = {name: tensor for name, _, tensor in _named_tensors(model) if tensor.is_meta}
    weights_by_id = {
        id(tensor): weights[name] for name, tensor in meta_tensors.items() if name in weights
    }
    if unmatched := [
        name for name, tensor in meta_tensors.items() if id(tensor) not in weights_by_id
    ]:
        problem = (
            f"{checkpoint.folder}, whose {listing(unmatched, 3)} is not made of rows of its tensors"
        )
        raise WholeOnlyError(
            problem, "a tensor a parameter, or stacked or joined ones", "read all of it"
        )
    return {name: weights_by_id[id(tensor)] for name, tensor in meta_tensors.items()}


def _have_equal_values(first_weight: BaseWeight | None, second_weight: BaseWeight | None) -> bool:
    if first_weight is None or second_weight is None or first_weight.shape != second_weight.shape:
        return False
    return all(
        torch.equal(a, b)
        for a, b in zip(first_weight.blocks(), second_weight.blocks(), strict=True)
    )


def _read_shares(model: nn.Module, sources: Mapping[str, BaseWeight], device: torch.device) -> None:
    """Replace each tensor of the model on the meta device by its values on ``device``: for a
    DTensor, those of this process's rows; for any other tensor, all of them. ``sources``: the
    weight in the files for each name of a tensor.

    While a parameter is read, its values are in memory twice if ``device`` is not the CPU or the
    dtype differs from that in the files.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local_part

    loaded_tensors: dict[int, Any] = {}  # by the id of the tensor on the meta device
    for name, (tensors_by_key, key), meta_tensor in _named_tensors(model):
        if not meta_tensor.is_meta:
            continue
        if id(meta_tensor) not in loaded_tensors:
            read_rows = partial(_read_rows, sources[name], meta_tensor.dtype, device)
            if is_sharded(meta_tensor):
                shape, offset = local_part(
                    meta_tensor.shape, meta_tensor.device_mesh, meta_tensor.placements
                )
                local_rows = read_rows(slice(offset[0], offset[0] + shape[0]))
                tensor = DTensor.from_local(
                    local_rows,
                    meta_tensor.device_mesh,
                    meta_tensor.placements,
                    run_check=False,
                    shape=meta_tensor.shape,
                    stride=meta_tensor.stride(),
                )
            else:
                tensor = read_rows(None)
            loaded_tensors[id(meta_tensor)] = (
                nn.Parameter(tensor, meta_tensor.requires_grad)
                if isinstance(meta_tensor, nn.Parameter)
                else tensor
            )
            # With this attribute, transformers marks tensors that it has read from files. Veneer
            # takes parameters without it for newly initialised ones
            # (``ModelIndex.fresh_parameters``).
            loaded_tensors[id(meta_tensor)]._is_hf_initialized = True
        tensors_by_key[key] = loaded_tensors[id(meta_tensor)]


def _read_rows(
    weight: BaseWeight, dtype: torch.dtype, device: torch.device, rows: slice | None
) -> Tensor:
    if rows is not None and rows.start >= rows.stop:
        return torch.empty((0, *weight.shape[1:]), dtype=dtype, device=device)
    return weight.read(rows).to(device, dtype)
