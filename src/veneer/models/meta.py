"""A model of transformers without its weights, and which parameter each tensor of a checkpoint is
in it.

    meta_model("folder")                    every module, name, shape and tie, on torch's meta device: no memory
    countable_model("config.json", dtype)   the same of a causal language model, for a step on the meta device itself
    map_checkpoint_names(model, names)      the name of a tensor in a file -> the parameter, or part of one, that it is

A file may name and cut tensors otherwise than the model does (a prefix, q, k and v as one, an
expert a tensor); transformers maps them as it loads, and this asks it how.
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


class Place(NamedTuple):
    """What a tensor of a checkpoint is in the model: the parameter at ``path``, or the part
    ``index`` of it (its first axes), as for one expert of a stack. ``within`` is the part of the
    tensor that is meant, if that is not all of it, as where a file holds q, k and v as one."""

    path: str
    index: tuple[slice, ...] = ()
    within: tuple[slice, ...] = ()


def meta_model(
    folder: str | Path, architecture: str | None = None, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """The model of a folder in all but its weights: every module, name, shape and tie, with zeros
    that take no memory.

    Args:
        architecture: a class of transformers; None, or one that transformers does not have, takes
            the class that the folder's config names.
        labels: of a classifier, for a head of so many outputs; None takes those of the folder's
            config.

    Raises:
        ConfigError: no configuration of a model that transformers knows.
    """
    import torch
    import transformers

    with loading(str(folder)):
        config = transformers.AutoConfig.from_pretrained(str(folder), **code_options())
        named = [architecture, *(getattr(config, "architectures", None) or ())]
        known = (getattr(transformers, name, None) for name in named if name)
        # a name may come from a file, and transformers has other classes than models too
        models = (
            cls
            for cls in known
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        )
        class_: Any = next(models, None)
        if class_ is None:
            problem = (
                f"a model {config.model_type!r} of class"
                f" {' or '.join(filter(None, named)) or 'unknown'}"
            )
            raise ConfigError(problem, "a class of transformers", "give the model itself (model=…)")
        config.__dict__.pop("quantization_config", None)
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
        with torch.device("meta"):
            model = class_(without_hub_kernel(config))
    return filled(model.eval())


def countable_model(source: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model on torch's meta device, whose steps can be counted there: attention
    is flash attention and experts are grouped products, as on a GPU. The model is in training mode.

    Args:
        source: as ``load_base``, a ``config.json``, what stands in one, or a config of
            transformers.
        dtype: of the weights; None takes that of the config, else bfloat16.

    Raises:
        ConfigError: no configuration of a causal language model that transformers knows.
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
        own, options = (
            dtype or config.dtype or torch.bfloat16,
            code_options(source if isinstance(source, str | Path) else None),
        )
        model = transformers.AutoModelForCausalLM.from_config(
            without_hub_kernel(config), dtype=own, **options
        )
        return count_attention(model).train()


def count_attention(model: Any) -> Any:
    """The model, whose attention is flash attention on the meta device."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(COUNTED, _flash)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = COUNTED
    return model


def _config_in(fields: Mapping[str, Any]) -> Any:
    """What a config.json with these fields is to transformers."""
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
    except Exception as error:  # each type checks its fields in its own way
        problem = f"a configuration that is none of a {kind} ({first_line(error)})"
        raise ConfigError(problem, "what a config.json of one holds", "correct it") from error


def _config_at(source: str) -> Any:
    """The config of a base, or that in a file of its own."""
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


#: the attention of a ``countable_model``, among those of transformers
COUNTED = "veneer_counted"


def _flash(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
) -> Any:
    """Flash attention, whatever the mask: [b, heads, s, d] each, fewer heads of keys and values;
    and no weights."""
    import torch
    import torch.nn.functional as F

    width = value.shape[-1]
    if width != query.shape[-1]:  # it takes one width for all: DeepSeek's values are narrower
        value = F.pad(value, (0, query.shape[-1] - width))
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    causal = query.shape[2] == key.shape[2]
    out = attend(query, key, value, 0.0, causal, scale=scaling)[0][..., :width]
    return out.transpose(1, 2).contiguous(), None


def filled(model: Any) -> Any:
    """The model, with zeros on the CPU for what is on the meta device: pages that nobody touches
    take no memory."""
    import numpy
    import torch

    made: dict[Any, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is None or not value.is_meta:
                    continue
                if value not in made:  # a tensor is hashed by its identity, so ties stay
                    flat = torch.from_numpy(numpy.zeros(value.nbytes, numpy.uint8))
                    flat = flat.view(value.dtype).view(value.shape)
                    kept = isinstance(value, torch.nn.Parameter)
                    made[value] = torch.nn.Parameter(flat, value.requires_grad) if kept else flat
                own[name] = made[value]
    return model


def without_meta(model: Any) -> Any:
    """The model itself, or a copy that is ``filled`` where some of it is on the meta device."""
    empty = any(value.is_meta for value in itertools.chain(model.parameters(), model.buffers()))
    return filled(copy.deepcopy(model)) if empty else model


def map_checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    """What each tensor of a checkpoint is in ``model``. transformers renames, stacks, joins and
    splits tensors as it loads them; its own rules are asked here. A tensor that is made into a
    parameter in another way is left out, as is one that the model does not have: whoever wants to
    change that parameter will miss it.
    """
    state = model.state_dict()
    if not hasattr(model, "base_model_prefix") or not hasattr(model, "config"):
        return {name: (Place(name),) for name in names if name in state}
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
    prefix, found = model.base_model_prefix, {}
    parts: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        path, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if path not in state and name in state:
            path, pattern = rename_source_key(name, [], [], prefix, state)
        if path not in state:
            continue
        if pattern is None:
            found[name] = (Place(path),)
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            parts.setdefault(path, (converter, []))[1].append((name, pattern))
    for path, (converter, tensors) in parts.items():
        found |= _parts(path, converter, tensors, state)
    return found


def _parts(
    path: str, rule: Any, tensors: list[tuple[str, str]], state: Any
) -> dict[str, tuple[Place, ...]]:
    """The parameters that a rule of transformers stacks or joins out of tensors, or cuts out of
    one."""
    steps = {type(step).__name__: getattr(step, "dim", None) for step in rule.operations}
    if steps == {"Chunk": 0} and len(tensors) == 1:
        targets = [path.replace(rule.target_patterns[0], other) for other in rule.target_patterns]
        if any(target not in state for target in targets):
            return {}
        sizes = [state[target].shape[0] for target in targets]
        ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
        within = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        places = (Place(target, (), (rows,)) for target, rows in zip(targets, within, strict=True))
        return {tensors[0][0]: tuple(places)}
    stacked = "MergeModulelist" in steps
    known = steps.keys() <= {"MergeModulelist", "Concatenate"} and len(rule.target_patterns) == 1
    if (
        not known
        or steps.get("MergeModulelist", 0) != 0
        or steps.get("Concatenate", int(stacked)) != int(stacked)
    ):
        return {}
    shape, found = state[path].shape, {}
    patterns = [
        pattern for pattern in rule.source_patterns if any(own == pattern for _, own in tensors)
    ]
    share = shape[int(stacked)] // len(patterns)
    for at, pattern in enumerate(patterns):
        own = [name for name, other in tensors if other == pattern]
        if len(own) != (shape[0] if stacked else 1):
            return {}
        for number, name in enumerate(own):
            index = (slice(number, number + 1),) if stacked else ()
            rows = (slice(at * share, (at + 1) * share),) if len(patterns) > 1 else ()
            found[name] = (Place(path, index + rows),)
    return found
