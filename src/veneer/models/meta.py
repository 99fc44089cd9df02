"""Models of transformers without weights, and the parameter of each tensor in a checkpoint.

    meta_model("folder")                   every module, name, shape and tie; weights take no memory
    countable_model("config.json", dtype)  a causal language model whose training step runs on the
                                           meta device, for counting operations
    map_checkpoint_names(model, names)     the name of a tensor in a file -> slices of parameters

A file may name and split tensors in another way than the model (a prefix, q, k and v as one tensor,
a tensor for each expert). transformers converts them on loading; ``map_checkpoint_names`` applies
its conversion rules.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from veneer.errors import ConfigError
from veneer.models.locate import config_of
from veneer.models.messages import first_line, loading
from veneer.models.remote_code import code_options, without_hub_kernel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class ParamSlice(NamedTuple):
    """The parameter that a tensor of a checkpoint holds: ``path``, or the slice ``index`` of its
    first axes, such as one expert of a stack. ``within``: the slice of the tensor, if the tensor
    holds several parameters, such as q, k and v."""

    path: str
    index: tuple[slice, ...] = ()
    within: tuple[slice, ...] = ()


def meta_model(
    folder: str | Path, architecture: str | None = None, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """The model of a folder without its weights: every module, name, shape and tie, with zeros that
    take no memory.

    Args:
        architecture: a class of transformers; if it is None or unknown, the class in the folder's
            config.
        labels: labels of a classifier, one for each output of its head; None takes those in the
            config.

    Raises:
        ConfigError: transformers does not know the model.
    """
    import torch
    import transformers

    with loading(str(folder)):
        config = transformers.AutoConfig.from_pretrained(str(folder), **code_options())
        class_names = [architecture, *(getattr(config, "architectures", None) or ())]
        candidates = (getattr(transformers, name, None) for name in class_names if name)
        # the name may come from an untrusted file, and transformers also has classes that are not
        # models
        models = (
            cls
            for cls in candidates
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        )
        class_: Any = next(models, None)
        if class_ is None:
            problem = (
                f"a model {config.model_type!r} of class"
                f" {' or '.join(filter(None, class_names)) or 'unknown'}"
            )
            raise ConfigError(problem, "a class of transformers", "give the model itself (model=…)")
        config.__dict__.pop("quantization_config", None)
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
        with torch.device("meta"):
            model = class_(without_hub_kernel(config))
    return materialize_meta(model.eval())


def countable_model(source: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model on torch's meta device, whose steps can be counted there: attention
    is flash attention and experts are grouped products, as on a GPU. The model is in training mode.

    Args:
        source: as in ``load_base``, a ``config.json`` or its content, or a config of transformers.
        dtype: of the weights; None takes that of the config, else bfloat16.

    Raises:
        ConfigError: no configuration of a causal language model that transformers supports.
    """
    import torch
    import transformers

    if isinstance(source, Mapping):
        config = _config_in(source)
    elif isinstance(source, str | Path):
        config = _config_at(str(source))
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
    """The model, with flash attention on the meta device."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(COUNTED, _flash)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = COUNTED
    return model


def _config_in(fields: Mapping[str, Any]) -> Any:
    """The transformers config of a config.json with these fields."""
    import transformers

    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        problem = f"a configuration with model_type {kind!r}"
        raise ConfigError(
            problem, "a type that transformers knows", "correct it, or upgrade transformers"
        )
    try:
        return transformers.AutoConfig.for_model(
            kind, **{name: fields[name] for name in fields if name != "model_type"}
        )
    except Exception as error:  # config classes raise many kinds of exceptions for invalid fields
        problem = f"a configuration that is none of a {kind} ({first_line(error)})"
        raise ConfigError(problem, "what a config.json of one holds", "correct it") from error


def _config_at(source: str) -> Any:
    """The config of a base, or the config in a .json file."""
    if Path(source).suffix != ".json":
        return config_of(source)
    try:
        fields = json.loads(Path(source).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"no configuration in {source} ({first_line(error)})"
        raise ConfigError(
            problem, "a config.json of transformers", "check the path and the file"
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            f"a {type(fields).__name__} in {source}",
            "a config.json of transformers",
            "check the file",
        )
    return _config_in(fields)


#: the name of a ``countable_model``'s attention in transformers
COUNTED = "veneer_counted"


def _flash(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
) -> Any:
    """Flash attention that ignores the mask. query, key, value: [b, heads, s, d], with fewer heads
    of keys and values. Returns no attention weights."""
    import torch
    import torch.nn.functional as F

    width = value.shape[-1]
    # flash attention needs one width for all; DeepSeek's values are narrower
    if width != query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    causal = query.shape[2] == key.shape[2]
    out = attend(query, key, value, 0.0, causal, scale=scaling)[0][..., :width]
    return out.transpose(1, 2).contiguous(), None


def materialize_meta(model: Any) -> Any:
    """Replace tensors on the meta device by zeros on the CPU, in place. Untouched pages of zeros
    take no memory."""
    import numpy
    import torch

    materialized: dict[Any, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None or not value.is_meta:
                    continue
                # tensors are hashed by identity, so ties are preserved
                if value not in materialized:
                    tensor = torch.from_numpy(numpy.zeros(value.nbytes, numpy.uint8))
                    tensor = tensor.view(value.dtype).view(value.shape)
                    is_parameter = isinstance(value, torch.nn.Parameter)
                    materialized[value] = (
                        torch.nn.Parameter(tensor, value.requires_grad) if is_parameter else tensor
                    )
                table[name] = materialized[value]
    return model


def without_meta(model: Any) -> Any:
    """The model, or a copy after ``materialize_meta`` if any tensor is on the meta device."""
    empty = any(value.is_meta for value in itertools.chain(model.parameters(), model.buffers()))
    return materialize_meta(copy.deepcopy(model)) if empty else model


def map_checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, tuple[ParamSlice, ...]]:
    """Map the tensors of a checkpoint to slices of the parameters of ``model``, by the rules with
    which transformers renames, stacks, joins and splits tensors on loading. Tensors that the model
    lacks, and those that it converts in another way, are omitted, so that their parameters stay
    uncovered."""
    state = model.state_dict()
    if not hasattr(model, "base_model_prefix") or not hasattr(model, "config"):
        return {name: (ParamSlice(name),) for name in names if name in state}
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
    converted: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        path, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if path not in state and name in state:
            path, pattern = rename_source_key(name, [], [], prefix, state)
        if path not in state:
            continue
        if pattern is None:
            slices_by_tensor[name] = (ParamSlice(path),)
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            converted.setdefault(path, (converter, []))[1].append((name, pattern))
    for path, (converter, tensors) in converted.items():
        slices_by_tensor |= _map_converted(path, converter, tensors, state)
    return slices_by_tensor


def _map_converted(
    path: str, rule: Any, tensors: list[tuple[str, str]], state: Any
) -> dict[str, tuple[ParamSlice, ...]]:
    """The slices for one conversion rule of transformers that stacks or joins several tensors, or
    splits one."""
    steps = {type(step).__name__: getattr(step, "dim", None) for step in rule.operations}
    if steps == {"Chunk": 0} and len(tensors) == 1:
        targets = [
            path.replace(rule.target_patterns[0], target_pattern)
            for target_pattern in rule.target_patterns
        ]
        if any(target not in state for target in targets):
            return {}
        sizes = [state[target].shape[0] for target in targets]
        stops = [sum(sizes[: count + 1]) for count in range(len(sizes))]
        within = [slice(end - size, end) for size, end in zip(sizes, stops, strict=True)]
        param_slices = (
            ParamSlice(target, (), (rows,)) for target, rows in zip(targets, within, strict=True)
        )
        return {tensors[0][0]: tuple(param_slices)}
    stacked = "MergeModulelist" in steps
    is_supported = (
        steps.keys() <= {"MergeModulelist", "Concatenate"} and len(rule.target_patterns) == 1
    )
    if (
        not is_supported
        or steps.get("MergeModulelist", 0) != 0
        or steps.get("Concatenate", int(stacked)) != int(stacked)
    ):
        return {}
    shape, slices_by_tensor = state[path].shape, {}
    patterns = [
        pattern
        for pattern in rule.source_patterns
        if any(tensor_pattern == pattern for _, tensor_pattern in tensors)
    ]
    rows_per_pattern = shape[int(stacked)] // len(patterns)
    for pattern_index, pattern in enumerate(patterns):
        names_of_pattern = [name for name, tensor_pattern in tensors if tensor_pattern == pattern]
        if len(names_of_pattern) != (shape[0] if stacked else 1):
            return {}
        for number, name in enumerate(names_of_pattern):
            index = (slice(number, number + 1),) if stacked else ()
            start = pattern_index * rows_per_pattern
            rows = (slice(start, start + rows_per_pattern),) if len(patterns) > 1 else ()
            slices_by_tensor[name] = (ParamSlice(path, index + rows),)
    return slices_by_tensor
