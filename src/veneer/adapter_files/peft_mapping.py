"""The mapping between an adapter of a model and PEFT's files: path, shapes and config of each
change, the changes that PEFT would apply differently, and the weight that a file's path means.

Veneer changes weights. PEFT wraps modules, and usually adds the change to the output of a module.
This equals a change of the weight if the output is linear in the weight and no other code reads the
weight. For a target parameter (``target_parameters``), PEFT adds the change to the parameter while
the module's forward runs. If PEFT's result differs from Veneer's, the adapter is still saved, in a
folder that PEFT refuses with the reason. Rejected: a folder that PEFT loads, with another result.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.adapter_files.peft_deviations import (
    attention_above,
    deviation_reason,
    is_zero,
    outside_reader,
)
from veneer.attach import Change, ModelIndex, adapters, attributes_read_above, layer_states
from veneer.bases import own_parameters, weight_of
from veneer.config import LoraConfig
from veneer.distributed import base_class
from veneer.formats import peft, peft_behaviour, peft_paths
from veneer.layers import GENERAL_KIND, ParamRef, kind_for, kind_of, parameter_path
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS


@dataclass(frozen=True)
class PeftEntry:
    """One change as PEFT's file holds it, for one of the modules that hold the changed weight.

    Fields:
        file_path: the path of the change in the file, with PEFT's wrappers.
        target: the path of the target in PEFT's config: of the parameter if ``is_parameter`` is
            true, else of the module.
        path, module, weight_name: the path of the module, the module, and the name of its weight.
        change: the change as it is installed in the model.
        low: the low-rank product as this module uses it. If ``transposed``, the module uses the
            transpose of the weight that ``change`` belongs to.
        alpha: the alpha for PEFT's config, with which the scale is ``low.scale``.
        is_complete: whether PEFT's file holds all parameters of the variant. Else it holds A and B
            of a plain LoRA with the same ΔW.
    """

    file_path: str
    target: str
    is_parameter: bool
    path: str
    module: nn.Module
    weight_name: str
    change: Change
    low: LowRank
    transposed: bool
    alpha: float
    is_complete: bool


def peft_entries(model_index: ModelIndex, adapter_name: str) -> list[PeftEntry]:
    """An entry for every change of an adapter and every module that holds the changed weight. A
    tied weight has several entries, because PEFT's file needs A and B for each of its modules."""
    adapted_weights: list[tuple[str, nn.Module, str, Change, bool]] = []
    parameter_paths = [parameter_path(*ref) for ref in all_refs(model_index)]
    for path, module, layer_state in layer_states(model_index.model):
        layer_adapter = layer_state.get(adapter_name)
        for weight_name in own_parameters(module) if layer_adapter is not None else ():
            if weight_name in layer_adapter.changes and layer_adapter.changes[weight_name].rank:
                kind_name = kind_for(module, weight_name).name
                is_parameter = kind_name == GENERAL_KIND.name or (
                    kind_name == "linear"
                    and peft_behaviour.mistakes_for_experts(path, parameter_paths)
                )
                change = layer_adapter.changes[weight_name]
                adapted_weights.append((path, module, weight_name, change, is_parameter))
    wrapper_counts = Counter(path for path, *_, is_parameter in adapted_weights if is_parameter)
    inner_wrapper_counts, entries = Counter(wrapper_counts), []
    for path, module, weight_name, change, is_parameter in adapted_weights:
        file_path, target = peft_paths.add_wrappers(path, wrapper_counts), path
        if is_parameter:  # PEFT nests a wrapper for each parameter of the module
            inner_wrapper_counts[path] -= 1
            file_path = ".".join(
                [*([file_path] if file_path else []), *["base_layer"] * inner_wrapper_counts[path]]
            )
            target = parameter_path(path, weight_name)
        elif _has_several_weights(module, weight_name):
            file_path = parameter_path(file_path, weight_name)
        low, _ = change.low_rank(weight_of(module, weight_name))
        is_complete = set(change.adapter_parameters) <= {"A", "B", *change.variant.peft_keys}
        layer_kind = kind_for(module, weight_name)
        entries.append(
            PeftEntry(
                file_path=file_path,
                target=target,
                is_parameter=is_parameter,
                path=path,
                module=module,
                weight_name=weight_name,
                change=change,
                low=change.as_read_by(layer_kind, low),
                transposed=change.is_transposed_in(layer_kind),
                alpha=change.alpha if is_complete else low.scale * low.rank,
                is_complete=is_complete,
            )
        )
    return entries


def _has_several_weights(module: nn.Module, weight_name: str) -> bool:
    """Whether PEFT's file can hold changes of several weights of this module, such as those of an
    attention, each under its name."""
    return len(kind_for(module, weight_name).weights(module)) > 1


def _wrapper_counts(entries: list[PeftEntry]) -> dict[str, int]:
    """The number of PEFT's wrappers around each adapted module, by path."""
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry.path] = counts[entry.path] + 1 if entry.is_parameter else 1
        if isinstance(entry.module, nn.MultiheadAttention):  # PEFT wraps the out-projection, too
            counts[parameter_path(entry.path, "out_proj")] = 1
    return counts


def file_tensors(
    model: nn.Module, adapter_name: str, entries: list[PeftEntry]
) -> dict[str, Tensor]:
    """The tensors of an adapter for PEFT's file, by key: those of the low-rank changes ``entries``,
    the biases of ``lora_bias``, and the tensors that are trained in full."""
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        change, weight = entry.change, weight_of(entry.module, entry.weight_name)
        layer_kind = (
            GENERAL_KIND if entry.is_parameter else kind_for(entry.module, entry.weight_name)
        )
        shape = change.storage.shape(weight)
        for suffix, tensor in zip(
            layer_kind.file_keys, layer_kind.pack(entry.low, entry.module, shape), strict=True
        ):
            tensors[peft.tensor_key(entry.file_path, suffix)] = file_tensor(tensor)
        for parameter_name, suffix in change.variant.peft_keys.items():
            magnitude = _full_magnitude(change, weight, change.adapter_parameters[parameter_name])
            tensors[peft.tensor_key(entry.file_path, suffix)] = file_tensor(
                layer_kind.pack_vector(magnitude, shape)
            )
    wrapper_counts, biases = _wrapper_counts(entries), new_biases(model, adapter_name)
    for entry in entries if biases else ():
        bias = biases.get(
            entry.path, entry.low.B.new_zeros(entry.low.B.shape[0] * entry.low.B.shape[1])
        )
        tensors[peft.tensor_key(entry.file_path, peft.LORA_BIAS)] = file_tensor(
            bias / (entry.low.scale or 1)
        )
    for path, _, layer_adapter in adapters(model, adapter_name):
        # in the file, the path of a tensor that is trained in full includes its module's wrappers
        wrapped_path = [peft_paths.add_wrappers(path, wrapper_counts)] if path else []
        file_path = ".".join([*wrapped_path, *["base_layer"] * wrapper_counts.get(path, 0)])
        for key, tensor in layer_adapter.full.state_dict().items():
            if key != "bias" or path not in biases:
                tensors[peft.tensor_key(file_path, key)] = file_tensor(tensor)
    return tensors


def new_biases(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The biases that an adapter adds to layers without a bias, by module path. PEFT stores such a
    bias beside B (``lora_bias``)."""
    biases = (
        (path, module, layer_adapter.full._parameters.get("bias"))
        for path, module, layer_adapter in adapters(model, adapter_name)
    )
    return {
        path: bias
        for path, module, bias in biases
        if bias is not None and module._parameters.get("bias") is None
    }


def _full_magnitude(change: Change, weight: Any, trained_magnitudes: Tensor) -> Tensor:
    """DoRA's magnitudes [groups · out] for all output rows of ``weight``: ``trained_magnitudes``
    for the rows that ``change`` changes, and the norm of the row for all others."""
    if change.rows is None:
        return trained_magnitudes
    dense = change.storage.dense(weight)
    norms = (
        change.layer.unfold(dense.to(at_least_float32(dense.dtype)), change.dims)
        .norm(dim=-1)
        .flatten()
    )
    return norms.index_copy(0, change.rows.to(norms.device), trained_magnitudes.to(norms.dtype))


def file_tensor(tensor: Tensor) -> Tensor:
    """A copy of a tensor for safetensors: detached, contiguous, on the CPU."""
    return tensor.detach().cpu().contiguous().clone()


def peft_config(
    model_index: ModelIndex,
    adapter_name: str,
    config: LoraConfig,
    base_name: str | None,
    entries: list[PeftEntry],
) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` for an adapter. ``config``: its config in Veneer's
    fields. ``base_name``: the name of the base; None if it is unknown."""
    variant = VARIANTS[config.variant]
    # the keys are the paths for ``rank_pattern`` and ``alpha_pattern``: the target, or for a module
    # with several weights the path of the weight, because each of them has its own rank
    entries_by_path = {
        (
            peft_paths.strip_wrappers(entry.file_path)[0]
            if not entry.is_parameter and _has_several_weights(entry.module, entry.weight_name)
            else entry.target
        ): entry
        for entry in entries
    }
    # ``target_parameters`` must list the parameters in the order of ``entries``, in which PEFT
    # nests its wrappers
    parameter_paths = list(dict.fromkeys(entry.target for entry in entries if entry.is_parameter))
    module_paths = list(dict.fromkeys(entry.target for entry in entries if not entry.is_parameter))
    # PEFT refuses dropout and fan_in_fan_out for changes of parameters and of attention modules:
    # they are written only if there are no such changes
    has_modules_only = not parameter_paths and not any(
        isinstance(entry.module, nn.MultiheadAttention) for entry in entries
    )
    kind_names = {kind_for(entry.module, entry.weight_name).name for entry in entries}
    task_type, invocation_tokens = _task_type(model_index.model), config.invocation_tokens
    peft_type = _peft_type(model_index, entries)
    if invocation_tokens and task_type != "CAUSAL_LM" and peft_type == "LORA":
        peft_type = f"{peft.NOT_FOR_PEFT}: PEFT finds invocation tokens for task CAUSAL_LM alone"
    fields = {
        "peft_type": peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "lora_dropout": config.dropout if has_modules_only else 0.0,
        "target_modules": (
            peft_paths.targets_for(module_paths, filter(None, model_index.modules))
            if entries
            else peft.NO_TARGETS
        ),
        "modules_to_save": _modules_to_save(model_index, adapter_name, _wrapper_counts(entries))
        or None,
        "bias": {"none": "none", "targets": "lora_only", "all": "all"}[config.bias],
        "fan_in_fan_out": "conv1d_transformers" in kind_names and has_modules_only,
        **({"lora_bias": True} if new_biases(model_index.model, adapter_name) else {}),
        **({"alora_invocation_tokens": list(invocation_tokens)} if invocation_tokens else {}),
        **(variant.peft or {}),
    }
    alpha = variant.default_alpha if config.alpha is None else config.alpha
    ranks_and_alphas = {
        target: (entry.low.rank, entry.alpha) for target, entry in entries_by_path.items()
    }
    return config_fields(fields, ranks_and_alphas, (config.rank, alpha), parameter_paths)


def config_fields(
    fields: Mapping[str, Any],
    ranks_and_alphas: Mapping[str, tuple[int, float]],
    default_pair: tuple[int, float],
    parameter_paths: Sequence[str],
) -> dict[str, Any]:
    """A config with PEFT's ``fields``, completed by the rank and alpha of each target.

    Args:
        ranks_and_alphas: (rank, alpha) by path of a target.
        default_pair: (rank, alpha) for ``r`` and ``lora_alpha``, if some target has this pair. Else
            the most frequent pair in ``ranks_and_alphas`` is used.
        parameter_paths: the paths for ``target_parameters``.
    """
    ranks = {target: rank for target, (rank, _) in ranks_and_alphas.items()}
    alphas = {target: alpha for target, (_, alpha) in ranks_and_alphas.items()}
    rank, alpha = peft_paths.common_rank_and_alpha(ranks, alphas, *default_pair)
    return {
        **fields,
        "r": rank,
        "lora_alpha": alpha,
        **({"target_parameters": list(parameter_paths)} if parameter_paths else {}),
        "rank_pattern": peft_paths.patterns_for(ranks, rank),
        "alpha_pattern": peft_paths.patterns_for(alphas, alpha),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _modules_to_save(
    model_index: ModelIndex, adapter_name: str, wrapper_counts: Mapping[str, int]
) -> list[str]:
    """The paths for ``modules_to_save``: those of modules without submodules whose parameters are
    all trained in full. PEFT replaces every module whose path ends in a listed path, so a path is
    listed only if all modules that it matches are trained in full. Parameters of other modules need
    no entry, because PEFT loads them into the base."""
    full_parameters = {
        path: layer_adapter.full._parameters
        for path, _, layer_adapter in adapters(model_index.model, adapter_name)
    }
    parent_paths = {path.rpartition(".")[0] for path in model_index.modules}
    full_modules = {
        path
        for path, parameters in full_parameters.items()
        if parameters
        and path not in parent_paths
        and parameters.keys() >= set(own_parameters(model_index.modules[path]))
        and peft_paths.add_wrappers(f"{path}.", wrapper_counts) == f"{path}."
    }
    return sorted(
        path
        for path in full_modules
        if path
        and all(
            candidate in full_modules
            for candidate in model_index.modules
            if candidate.endswith(path)
        )
    )


def _peft_type(model_index: ModelIndex, entries: list[PeftEntry]) -> str:
    """The ``peft_type``: "LORA", or, if PEFT would compute another result than Veneer, a text that
    gives the reason. PEFT refuses a config with such an unknown type."""
    for entry in entries:
        ref = entry.path, entry.weight_name
        is_zero_change = is_zero(entry.low.A, entry.low.B) and not entry.change.variant.peft_keys
        reason = (
            None if is_zero_change or entry.change.module_only else outside_reader(model_index, ref)
        )
        reason = (
            deviation_reason(model_index, ref, entry.is_parameter) if reason is None else reason
        )
        if attention_above(model_index, ref) is not None and not is_zero_change:
            reason = (
                f"PEFT {peft_behaviour.LATEST_CHECKED} applies the change of an attention's"
                f" out-projection {peft_behaviour.OUT_PROJ_REPEATS} times"
            )
        if entry.change.variant.peft_keys and (entry.is_parameter or entry.transposed):
            reason = "PEFT rescales the outputs of modules alone"
        for parent_path, attribute in (
            attributes_read_above(model_index, entry.path) if reason is None else ()
        ):
            if peft_behaviour.wrapper_lacks(attribute):  # PEFT's forward would fail
                reason = (
                    f"{parent_path or 'the model'!r} reads its {attribute!r}, which the module that"
                    " PEFT puts around it lacks"
                )
                break
        if reason is not None:
            return f"{peft.NOT_FOR_PEFT}: {entry.path!r}: {reason}"
    return "LORA"


#: the arguments that PEFT's model for a task always passes to the base's forward
_OUTPUT_ARGUMENTS = {"labels", "output_attentions", "output_hidden_states", "return_dict"}
_INPUT_ARGUMENTS = {"input_ids", "attention_mask", "inputs_embeds"}
_TASK_ARGUMENTS = {
    "CAUSAL_LM": _INPUT_ARGUMENTS | _OUTPUT_ARGUMENTS,
    "SEQ_2_SEQ_LM": {
        *_INPUT_ARGUMENTS,
        *_OUTPUT_ARGUMENTS,
        *(f"decoder_{argument}" for argument in _INPUT_ARGUMENTS),
    },
}


def _task_type(model: nn.Module) -> str | None:
    """PEFT's ``task_type`` for a model that generates text: a decoder, or an encoder and a decoder.

    None if the base's forward does not take the arguments that PEFT would pass for the task.
    Whisper, for example, reads sounds and not tokens. Without a task, PEFT passes only the caller's
    arguments. None also for classifiers and question answering, because for these tasks PEFT itself
    would choose heads to train in full."""
    model_class: Any = base_class(model)
    can_generate = getattr(model_class, "can_generate", None)
    if not (callable(can_generate) and can_generate()):
        return None
    task = (
        "SEQ_2_SEQ_LM"
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        else "CAUSAL_LM"
    )
    parameters = inspect.signature(model_class.forward).parameters
    takes_any_keyword = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    # a forward that takes token ids only by **kwargs is taken for one that does not read tokens
    arguments = _TASK_ARGUMENTS[task]
    token_arguments = {name for name in arguments if name.endswith("input_ids")}
    return (
        task
        if token_arguments <= parameters.keys()
        and (takes_any_keyword or arguments <= parameters.keys())
        else None
    )


def resolve_file_path(model_index: ModelIndex, file_path: str) -> tuple[str, int, str]:
    """Resolve a path in PEFT's file: (the path of the deepest module of the model that it leads to,
    the number of segments ``base_layer`` of PEFT's wrappers after this module, the rest of the
    path, which is empty if the path means this module)."""
    segments, module_path, wrapper_count = file_path.split(".") if file_path else [], "", 0
    for position, segment in enumerate(segments):
        child_path = parameter_path(module_path, segment)
        if child_path in model_index.canonical:
            module_path, wrapper_count = child_path, 0
        elif segment == "base_layer":
            wrapper_count += 1
        else:
            return model_index.canonical[module_path], wrapper_count, ".".join(segments[position:])
    return model_index.canonical[module_path], wrapper_count, ""


def module_at(model_index: ModelIndex, file_path: str) -> str:
    """The path in the model of the module that a path in PEFT's file means; for a module that the
    model holds under several paths, the first. If there is no such module, ``file_path``."""
    path, _, remaining_path = resolve_file_path(model_index, file_path)
    return file_path if remaining_path else path


def ref_at(
    model_index: ModelIndex, file_path: str, peft_config: Mapping[str, Any]
) -> ParamRef | None:
    """(module path, name) of the weight that a path in PEFT's file means; None if the model has no
    such weight. The path may end in the name of a parameter. Otherwise it is the path of a module
    and means its only weight. If ``peft_config`` targets parameters of the module, the number of
    wrappers in the path tells which one is meant."""
    path, wrapper_count, remaining_path = resolve_file_path(model_index, file_path)
    module = model_index.modules[path]
    if remaining_path:
        return (path, remaining_path) if remaining_path in own_parameters(module) else None
    parameter_names = [
        name
        for name in own_parameters(module)
        if means_parameter(model_index, (path, name), peft_config)
    ]
    if parameter_names:
        return (
            (path, parameter_names[-1 - wrapper_count])
            if wrapper_count < len(parameter_names)
            else None
        )
    layer_kind = kind_of(module)
    return (
        (path, layer_kind.weight)
        if layer_kind is not None and layer_kind.weight in layer_kind.weights(module)
        else None
    )


def means_parameter(model_index: ModelIndex, ref: ParamRef, peft_config: Mapping[str, Any]) -> bool:
    """Whether a config of PEFT targets this weight as a parameter, rather than its module."""
    module_path, parameter_name = ref
    return bool(
        peft_paths.expected_parameters(
            peft_config,
            [parameter_path(alias, parameter_name) for alias in model_index.aliases[module_path]],
        )
    )


def all_refs(model_index: ModelIndex) -> list[ParamRef]:
    """(module path, name) of all parameters of a model. A tied parameter is listed for each module
    that holds it."""
    return [
        (path, name)
        for path, module in model_index.modules.items()
        for name in own_parameters(module)
    ]
