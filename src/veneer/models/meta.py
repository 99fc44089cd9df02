"""Models of transformers without weights, and the parameters that each tensor in a checkpoint
fills.

    meta_model("folder")                   every module, name, shape and tied weight; the weights
                                           take no memory
    countable_model("config.json", dtype)  a causal language model whose training step runs on the
                                           meta device, so that its operations can be counted
    map_checkpoint_names(model, names)     {name of a tensor in a file: slices of parameters}

The tensors of a file may have other names than the model's parameters (a prefix), or hold several
parameters (q, k and v as one tensor), or only a slice of a parameter (a tensor for each expert).
transformers converts the tensors on loading; ``map_checkpoint_names`` applies its conversion rules.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F

from veneer.errors import ConfigError, first_line
from veneer.models.locate import config_of
from veneer.models.messages import loading
from veneer.models.remote_code import code_options, without_hub_kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ParamSlice(NamedTuple):
    """The parameter, or the slice of a parameter, whose values are in a tensor of a checkpoint.

    Fields:
        path: the name of the parameter in the state dict.
        index: the slice of the parameter along its first axes, such as one expert of a stack; empty
            for the whole parameter.
        within: the slice of the checkpoint's tensor along its first axes, if the tensor holds
            several parameters, such as q, k and v; empty for the whole tensor.
    """

    path: str
    index: tuple[slice, ...] = ()
    within: tuple[slice, ...] = ()


def meta_model(
    folder: str | Path, architecture: str | None = None, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """The model of a folder with all modules, names, shapes and tied weights, but with zeros as
    weights, which take no memory. It is in eval mode.

    Args:
        architecture: a class of transformers; if it is None or unknown, the class in the folder's
            config.
        labels: names of a classifier's labels, one for each output of its head; None takes the
            labels in the config.

    Raises:
        ConfigError: transformers does not know the model.
    """
    import transformers

    with loading(str(folder)):
        config = transformers.AutoConfig.from_pretrained(str(folder), **code_options())
        class_names = [architecture, *(getattr(config, "architectures", None) or ())]
        candidates = (getattr(transformers, name, None) for name in class_names if name)
        # The name may come from an untrusted file and name any attribute of transformers, so only
        # classes of models are accepted.
        model_classes = (
            cls
            for cls in candidates
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        )
        model_class: Any = next(model_classes, None)
        if model_class is None:
            raise ConfigError(
                f"a model {config.model_type!r} of class"
                f" {' or '.join(filter(None, class_names)) or 'unknown'}",
                "a class of transformers",
                "give the model itself (model=…)",
            )
        config.__dict__.pop("quantization_config", None)
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        with torch.device("meta"):
            model = model_class(without_hub_kernel(config))
    return materialize_meta(model.eval())


def countable_model(source: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model on torch's meta device, in training mode, for counting the operations
    of a training step. Attention is computed as flash attention and experts as grouped products, as
    on a GPU, so that the counts are those of a GPU.

    Args:
        source: a ``source`` of ``load_base``, a ``config.json`` or its content, or a config of
            transformers.
        dtype: dtype of the weights; None takes the dtype in the config, else bfloat16.

    Raises:
        ConfigError: the source has no configuration of a causal language model that transformers
            supports.
    """
    import transformers

    if isinstance(source, Mapping):
        config = _config_of_fields(source)
    elif isinstance(source, str | Path):
        config = _config_from_path(str(source))
    else:
        config = copy.deepcopy(source)
    config.__dict__.pop("quantization_config", None)
    with loading(config.model_type), torch.device("meta"):
        weight_dtype, options = (
            dtype or config.dtype or torch.bfloat16,
            code_options(source if isinstance(source, str | Path) else None),
        )
        model = transformers.AutoModelForCausalLM.from_config(
            without_hub_kernel(config), dtype=weight_dtype, **options
        )
        return count_attention(model).train()


def count_attention(model: Any) -> Any:
    """Change a model in place to compute attention by ``_flash_attention``, which runs on the meta
    device, and return it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(COUNTED_ATTENTION, _flash_attention)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = COUNTED_ATTENTION
    return model


def _config_of_fields(fields: Mapping[str, Any]) -> Any:
    """The config of transformers for the fields of a config.json. ``ConfigError``: transformers
    does not know the model type, or the fields are not valid for it."""
    import transformers

    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"a configuration with model_type {model_type!r}",
            "a type that transformers knows",
            "correct it, or upgrade transformers",
        )
    try:
        return transformers.AutoConfig.for_model(
            model_type, **{name: fields[name] for name in fields if name != "model_type"}
        )
    except Exception as error:  # config classes raise many kinds of exceptions for invalid fields
        raise ConfigError(
            f"a configuration that is none of a {model_type} ({first_line(error)})",
            "what a config.json of one holds",
            "correct it",
        ) from error


def _config_from_path(source: str) -> Any:
    """The config in ``source`` if it ends in ".json"; else the config of the base ``source``.
    ``ConfigError``: it cannot be read."""
    if Path(source).suffix != ".json":
        return config_of(source)
    try:
        fields = json.loads(Path(source).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"no configuration in {source} ({first_line(error)})",
            "a config.json of transformers",
            "check the path and the file",
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            f"a {type(fields).__name__} in {source}",
            "a config.json of transformers",
            "check the file",
        )
    return _config_of_fields(fields)


#: the name under which transformers knows ``_flash_attention``
COUNTED_ATTENTION = "veneer_counted"


def _flash_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
) -> Any:
    """Attention by torch's operator for flash attention, so that the operations of a GPU are
    counted. The mask is ignored: attention is causal if there are as many queries as keys.

    Args:
        query, key, value: [b, heads, s, d] for b rows of s tokens. Keys and values may have fewer
            heads; values may be narrower.

    Returns:
        (output [b, s, heads, width of the values], None), as transformers expects.
    """
    width = value.shape[-1]
    # flash attention needs query, key and value of one width; DeepSeek's values are narrower
    if width != query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    flash_attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    is_causal = query.shape[2] == key.shape[2]
    output = flash_attention(query, key, value, 0.0, is_causal, scale=scaling)[0][..., :width]
    return output.transpose(1, 2).contiguous(), None


def materialize_meta(model: Any) -> Any:
    """Replace the model's tensors on the meta device by zeros on the CPU, in place, and return the
    model. The zeros take no memory until they are written to. Ties are preserved."""
    materialized: dict[Any, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, meta_tensor in table.items():
                if meta_tensor is None or not meta_tensor.is_meta:
                    continue
                # a dict finds tensors by identity, so a tied tensor is replaced by one tensor
                if meta_tensor not in materialized:
                    tensor = torch.from_numpy(numpy.zeros(meta_tensor.nbytes, numpy.uint8))
                    tensor = tensor.view(meta_tensor.dtype).view(meta_tensor.shape)
                    is_parameter = isinstance(meta_tensor, torch.nn.Parameter)
                    materialized[meta_tensor] = (
                        torch.nn.Parameter(tensor, meta_tensor.requires_grad)
                        if is_parameter
                        else tensor
                    )
                table[name] = materialized[meta_tensor]
    return model


def without_meta(model: Any) -> Any:
    """The model itself if no tensor is on the meta device; else a copy in which
    ``materialize_meta`` has replaced these tensors by zeros."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    has_meta_tensor = any(tensor.is_meta for tensor in tensors)
    return materialize_meta(copy.deepcopy(model)) if has_meta_tensor else model


def map_checkpoint_names(
    model: Any, names: Iterable[str], shape_of: Callable[[str], Sequence[int]] | None = None
) -> dict[str, tuple[ParamSlice, ...]]:
    """Map the tensors of a checkpoint to slices of the parameters of ``model``, by the rules with
    which transformers renames, stacks, joins and splits tensors on loading. ``shape_of``: returns
    the shape of a tensor by name; None: tensors that are joined have equally many rows.

    The result omits tensors for which the model has no parameter, and tensors that transformers
    converts by rules that this function does not know. The caller must check whether all parameters
    get values."""
    state_dict = model.state_dict()
    if not hasattr(model, "base_model_prefix") or not hasattr(model, "config"):
        return {name: (ParamSlice(name),) for name in names if name in state_dict}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, slices_by_tensor = model.base_model_prefix, {}
    tensors_to_convert: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for tensor_name in sorted(names, key=dot_natural_key):
        path, pattern = rename_source_key(tensor_name, renamings, converters, prefix, state_dict)
        if path not in state_dict and tensor_name in state_dict:
            path, pattern = rename_source_key(tensor_name, [], [], prefix, state_dict)
        if path not in state_dict:
            continue
        if pattern is None:
            slices_by_tensor[tensor_name] = (ParamSlice(path),)
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            tensors_to_convert.setdefault(path, (converter, []))[1].append((tensor_name, pattern))
    for path, (converter, tensors) in tensors_to_convert.items():
        slices_by_tensor |= _map_converted(path, converter, tensors, state_dict, shape_of)
    return slices_by_tensor


def _map_converted(
    path: str,
    rule: Any,
    tensors: list[tuple[str, str]],
    state_dict: Any,
    shape_of: Callable[[str], Sequence[int]] | None,
) -> dict[str, tuple[ParamSlice, ...]]:
    """The result of ``map_checkpoint_names`` for tensors that one conversion rule of transformers
    stacks or joins to a parameter, or splits into several.

    Args:
        path: the name of the parameter, or of the first one.
        rule: a ``WeightConverter`` of transformers.
        tensors: (name of a tensor, pattern of the rule that it matches).
        state_dict: that of the model.
        shape_of: that of ``map_checkpoint_names``.

    Returns:
        {name of a tensor: slices of parameters}; empty if the rule is of an unknown form, or if
        tensors or parameters are missing.
    """
    operation_dims = {
        type(operation).__name__: getattr(operation, "dim", None) for operation in rule.operations
    }
    if operation_dims == {"Chunk": 0} and len(tensors) == 1:
        target_names = [
            path.replace(rule.target_patterns[0], target_pattern)
            for target_pattern in rule.target_patterns
        ]
        if any(target not in state_dict for target in target_names):
            return {}
        sizes = [state_dict[target].shape[0] for target in target_names]
        param_slices = (
            ParamSlice(target, (), (slice(end - size, end),))
            for target, size, end in zip(
                target_names, sizes, itertools.accumulate(sizes), strict=True
            )
        )
        return {tensors[0][0]: tuple(param_slices)}
    is_stacked = "MergeModulelist" in operation_dims
    is_supported = (
        operation_dims.keys() <= {"MergeModulelist", "Concatenate"}
        and len(rule.target_patterns) == 1
    )
    if (
        not is_supported
        or operation_dims.get("MergeModulelist", 0) != 0
        or operation_dims.get("Concatenate", int(is_stacked)) != int(is_stacked)
    ):
        return {}
    shape, slices_by_tensor = state_dict[path].shape, {}
    patterns = [
        pattern
        for pattern in rule.source_patterns
        if any(tensor_pattern == pattern for _, tensor_pattern in tensors)
    ]
    row_count, end = shape[int(is_stacked)] // len(patterns), 0
    for pattern in patterns:
        names_of_pattern = [
            tensor_name for tensor_name, tensor_pattern in tensors if tensor_pattern == pattern
        ]
        if len(names_of_pattern) != (shape[0] if is_stacked else 1):
            return {}
        if shape_of is not None and not is_stacked:
            row_count = shape_of(names_of_pattern[0])[0]
        start, end = end, end + row_count
        for stack_index, tensor_name in enumerate(names_of_pattern):
            index = (slice(stack_index, stack_index + 1),) if is_stacked else ()
            rows = (slice(start, end),) if len(patterns) > 1 else ()
            slices_by_tensor[tensor_name] = (ParamSlice(path, index + rows),)
    return slices_by_tensor
