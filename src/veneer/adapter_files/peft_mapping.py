"""The mapping between an adapter of a model and PEFT's files: the path, shapes and config of each
change, the changes that PEFT would apply differently, and the weight that a path of a file means.

PEFT wraps modules, and Veneer changes weights. PEFT adds the change to the output of a module,
which is right where the output is linear in the weight and no other code reads the weight; or it
adds the change to one parameter during the module's forward. A change that neither of these
expresses is still saved, in a folder that PEFT refuses with the reason: better than one that loads
and computes something else.
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
from veneer.attach import Change, Names, adapters, attributes_read_above, layer_states
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
    """One change as the PEFT file holds it, for one of the modules that have its weight.

    Fields:
        file_path: its path in the file.
        target: its name in PEFT's config, the path of a parameter if ``parameter`` is true.
        path, module, weight: the module and the name of its weight.
        low: the product as this module reads it, transposed if ``transposed``.
        exact: whether the file holds all parameters of the change, so that nothing is lost.
    """

    file_path: str
    target: str
    parameter: bool
    path: str
    module: nn.Module
    weight: str
    change: Change
    low: LowRank
    transposed: bool
    alpha: float
    exact: bool


def peft_entries(names: Names, name: str) -> list[PeftEntry]:
    """Every change, once for each module that holds its weight: PEFT adapts modules one by one."""
    adapted: list[tuple[str, nn.Module, str, Change, bool, bool]] = []
    parameters = [parameter_path(*ref) for ref in all_refs(names)]
    for path, module, layer_state in layer_states(names.model):
        layer_adapter = layer_state.get(name)
        for weight in own_parameters(module) if layer_adapter is not None else ():
            if weight in layer_adapter.changes and layer_adapter.changes[weight].rank:
                kind = kind_for(module, weight).name
                parameter = kind == GENERAL_KIND.name or (
                    kind == "linear" and peft_behaviour.mistakes_for_experts(path, parameters)
                )
                adapted.append(
                    (
                        path,
                        module,
                        weight,
                        layer_adapter.changes[weight],
                        layer_state.transposed,
                        parameter,
                    )
                )
    wrapper_counts = Counter(path for path, *_, parameter in adapted if parameter)
    inside, entries = Counter(wrapper_counts), []
    for path, module, weight, change, transposed, parameter in adapted:
        file_path, target = peft_paths.add_wrappers(path, wrapper_counts), path
        if parameter:  # PEFT wraps the module once more for each further parameter
            inside[path] -= 1
            file_path = ".".join(
                [*([file_path] if file_path else []), *["base_layer"] * inside[path]]
            )
            target = parameter_path(path, weight)
        elif _several(module, weight):
            file_path = parameter_path(file_path, weight)
        low, _ = change.low_rank(weight_of(module, weight))
        exact = set(change.adapter_parameters) <= {"A", "B", *change.variant.peft_keys}
        alpha = change.alpha if exact else low.scale * low.rank
        low = low.T if transposed else low
        entry = PeftEntry(
            file_path,
            target,
            parameter,
            path,
            module,
            weight,
            change,
            low,
            transposed,
            alpha,
            exact,
        )
        entries.append(entry)
    return entries


def _several(module: nn.Module, weight: str) -> bool:
    """Whether the file holds several weights of this module, each under its own name."""
    return len(kind_for(module, weight).weights(module)) > 1


def _wraps(peft_form: list[PeftEntry]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in peft_form:
        counts[entry.path] = counts[entry.path] + 1 if entry.parameter else 1
        if isinstance(entry.module, nn.MultiheadAttention):  # PEFT also wraps the out-projection
            counts[parameter_path(entry.path, "out_proj")] = 1
    return counts


def tensors_of(model: nn.Module, name: str, peft_form: list[PeftEntry]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for entry in peft_form:
        change, weight = entry.change, weight_of(entry.module, entry.weight)
        kind = GENERAL_KIND if entry.parameter else kind_for(entry.module, entry.weight)
        shape = change.storage.shape(weight)
        for suffix, tensor in zip(
            kind.file_keys, kind.pack(entry.low, entry.module, shape), strict=True
        ):
            tensors[peft.tensor_key(entry.file_path, suffix)] = file_tensor(tensor)
        for number, suffix in change.variant.peft_keys.items():
            magnitude = _full_magnitude(change, weight, change.adapter_parameters[number])
            tensors[peft.tensor_key(entry.file_path, suffix)] = file_tensor(
                kind.pack_vector(magnitude, shape)
            )
    wrapper_counts, biases = _wraps(peft_form), new_biases(model, name)
    for entry in peft_form if biases else ():
        value = biases.get(
            entry.path, entry.low.B.new_zeros(entry.low.B.shape[0] * entry.low.B.shape[1])
        )
        tensors[peft.tensor_key(entry.file_path, peft.LORA_BIAS)] = file_tensor(
            value / (entry.low.scale or 1)
        )
    for path, _, layer_adapter in adapters(model, name):
        # the file has parameters that are trained in full below the wrappers
        inside = [peft_paths.add_wrappers(path, wrapper_counts)] if path else []
        file_path = ".".join([*inside, *["base_layer"] * wrapper_counts.get(path, 0)])
        for key, value in layer_adapter.full.state_dict().items():
            if key != "bias" or path not in biases:
                tensors[peft.tensor_key(file_path, key)] = file_tensor(value)
    return tensors


def new_biases(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The biases that an adapter adds to layers without a bias, by module path. PEFT stores them
    beside B (``lora_bias``)."""
    biases = (
        (path, module, layer_adapter.full._parameters.get("bias"))
        for path, module, layer_adapter in adapters(model, name)
    )
    return {
        path: bias
        for path, module, bias in biases
        if bias is not None and module._parameters.get("bias") is None
    }


def _full_magnitude(change: Change, weight: Any, values: Tensor) -> Tensor:
    """A magnitude for every output row; that of a row without a change is the norm of its
    weights."""
    if change.rows is None:
        return values
    dense = change.storage.dense(weight)
    norms = (
        change.layer.unfold(dense.to(at_least_float32(dense.dtype)), change.dims)
        .norm(dim=-1)
        .flatten()
    )
    return norms.index_copy(0, change.rows.to(norms.device), values.to(norms.dtype))


def file_tensor(tensor: Tensor) -> Tensor:
    """A copy of a tensor for safetensors: detached, contiguous, on the CPU."""
    return tensor.detach().cpu().contiguous().clone()


def peft_config(
    names: Names, name: str, config: LoraConfig, base_name: str | None, peft_form: list[PeftEntry]
) -> dict[str, Any]:
    variant = VARIANTS[config.variant]
    # PEFT has no name for one of several weights of a module, yet each has its own rank
    named = {
        (
            peft_paths.strip_wrappers(e.file_path)[0]
            if not e.parameter and _several(e.module, e.weight)
            else e.target
        ): e
        for e in peft_form
    }
    # in the order in which PEFT wraps them
    parameters = list(dict.fromkeys(entry.target for entry in peft_form if entry.parameter))
    targets = list(dict.fromkeys(entry.target for entry in peft_form if not entry.parameter))
    # PEFT refuses dropout and fan_in_fan_out for changes of parameters and of attention modules
    plain = not parameters and not any(
        isinstance(entry.module, nn.MultiheadAttention) for entry in peft_form
    )
    kinds = {kind_for(entry.module, entry.weight).name for entry in peft_form}
    task, tokens = _task(names.model), config.invocation_tokens
    peft_type = _peft_type(names, peft_form)
    if tokens and task != "CAUSAL_LM" and peft_type == "LORA":
        peft_type = f"{peft.NOT_FOR_PEFT}: PEFT finds invocation tokens for task CAUSAL_LM alone"
    fields = {
        "peft_type": peft_type,
        "task_type": task,
        "base_model_name_or_path": base_name,
        "lora_dropout": config.dropout if plain else 0.0,
        "target_modules": (
            peft_paths.targets_for(targets, filter(None, names.modules))
            if peft_form
            else peft.NO_TARGETS
        ),
        "modules_to_save": _replaceable_modules(names, name, _wraps(peft_form)) or None,
        "bias": {"none": "none", "targets": "lora_only", "all": "all"}[config.bias],
        "fan_in_fan_out": "conv1d_transformers" in kinds and plain,
        **({"lora_bias": True} if new_biases(names.model, name) else {}),
        **({"alora_invocation_tokens": list(tokens)} if tokens else {}),
        **(variant.peft or {}),
    }
    alpha = variant.default_alpha if config.alpha is None else config.alpha
    sizes = {target: (entry.low.rank, entry.alpha) for target, entry in named.items()}
    return config_fields(fields, sizes, (config.rank, alpha), parameters)


def config_fields(
    fields: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, float]],
    default: tuple[int, float],
    parameters: Sequence[str],
) -> dict[str, Any]:
    """A PEFT config of these fields, with the rank and alpha of each path.

    Args:
        sizes: (rank, alpha) by path.
        default: the (rank, alpha) for ``r`` and ``lora_alpha`` if some path has them.
        parameters: the paths for ``target_parameters``.
    """
    ranks = {target: rank for target, (rank, _) in sizes.items()}
    alphas = {target: alpha for target, (_, alpha) in sizes.items()}
    rank, alpha = peft_paths.common_size(ranks, alphas, *default)
    return {
        **fields,
        "r": rank,
        "lora_alpha": alpha,
        **({"target_parameters": list(parameters)} if parameters else {}),
        "rank_pattern": peft_paths.patterns_for(ranks, rank),
        "alpha_pattern": peft_paths.patterns_for(alphas, alpha),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _replaceable_modules(names: Names, name: str, wrapper_counts: Mapping[str, int]) -> list[str]:
    """The modules trained in full that PEFT can replace (``modules_to_save``), by the ends of their
    paths; PEFT loads the parameters of all others into the base."""
    trained = {
        path: layer_adapter.full._parameters
        for path, _, layer_adapter in adapters(names.model, name)
    }
    above = {path.rpartition(".")[0] for path in names.modules}
    full_modules = {
        path
        for path, parameters in trained.items()
        if parameters
        and path not in above
        and parameters.keys() >= set(own_parameters(names.modules[path]))
        and peft_paths.add_wrappers(f"{path}.", wrapper_counts) == f"{path}."
    }
    return sorted(
        path
        for path in full_modules
        if path
        and all(
            candidate in full_modules for candidate in names.modules if candidate.endswith(path)
        )
    )


def _peft_type(names: Names, peft_form: list[PeftEntry]) -> str:
    """ "LORA", or a text that keeps PEFT from loading changes that it would not apply as Veneer
    does."""
    for entry in peft_form:
        ref = entry.path, entry.weight
        nothing = is_zero(entry.low.A, entry.low.B) and not entry.change.variant.peft_keys
        reason = None if nothing or entry.change.module_only else outside_reader(names, ref)
        reason = deviation_reason(names, ref, entry.parameter) if reason is None else reason
        if attention_above(names, ref) is not None and not nothing:
            reason = (
                f"PEFT {peft_behaviour.LATEST_CHECKED} applies the change of an attention's"
                f" out-projection {peft_behaviour.OUT_PROJ_REPEATS} times"
            )
        if entry.change.variant.peft_keys and (entry.parameter or entry.transposed):
            reason = "PEFT rescales the outputs of modules alone"
        for above, attribute in attributes_read_above(names, entry.path) if reason is None else ():
            if peft_behaviour.wrapper_lacks(attribute):  # then the forward fails
                problem = f"{above or 'the model'!r} reads its {attribute!r}, which"
                reason = f"{problem} the module that PEFT puts around it lacks"
                break
        if reason is not None:
            return f"{peft.NOT_FOR_PEFT}: {entry.path!r}: {reason}"
    return "LORA"


#: the arguments that the forward of PEFT's model for a task always passes to the base's forward
_OUTPUTS = {"labels", "output_attentions", "output_hidden_states", "return_dict"}
_INPUTS = {"input_ids", "attention_mask", "inputs_embeds"}
_TASKS = {
    "CAUSAL_LM": _INPUTS | _OUTPUTS,
    "SEQ_2_SEQ_LM": _INPUTS | _OUTPUTS | {f"decoder_{name}" for name in _INPUTS},
}


def _task(model: nn.Module) -> str | None:
    """PEFT's task for a model that generates, by whether it has an encoder.

    None where the base's forward does not take the arguments that PEFT's would pass (Whisper reads
    sounds, not tokens): without a task, PEFT passes on the caller's arguments alone. None also for
    classifiers and question answering, for which PEFT would choose fully trained heads itself."""
    cls: Any = base_class(model)
    if not (callable(generates := getattr(cls, "can_generate", None)) and generates()):
        return None
    task = (
        "SEQ_2_SEQ_LM"
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        else "CAUSAL_LM"
    )
    parameters = inspect.signature(cls.forward).parameters
    takes_any = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    # token ids must be a named parameter, **kwargs do not count
    tokens = {name for name in _TASKS[task] if name.endswith("input_ids")}
    return (
        task
        if tokens <= parameters.keys() and (takes_any or _TASKS[task] <= parameters.keys())
        else None
    )


def resolve_file_path(names: Names, file_path: str) -> tuple[str, int, str]:
    """Resolve a path of a PEFT file into (the path of a module, the number of wrappers after it,
    the remaining path)."""
    segments, above, depth = file_path.split(".") if file_path else [], "", 0
    for count, segment in enumerate(segments):
        below = parameter_path(above, segment)
        if below in names.canonical:
            above, depth = below, 0
        elif segment == "base_layer":
            depth += 1
        else:
            return names.canonical[above], depth, ".".join(segments[count:])
    return names.canonical[above], depth, ""


def module_at(names: Names, file_path: str) -> str:
    """The first name of the module that a path of a PEFT file means; the path itself if there is
    none."""
    path, _, rest = resolve_file_path(names, file_path)
    return file_path if rest else path


def ref_at(names: Names, file_path: str, config: Mapping[str, Any]) -> ParamRef | None:
    """The weight that a path of a PEFT file means: the only weight of a module, a parameter by its
    own path, or one of several parameters under wrappers; None if there is none."""
    path, depth, rest = resolve_file_path(names, file_path)
    module = names.modules[path]
    if rest:
        return (path, rest) if rest in own_parameters(module) else None
    parameters = [
        name for name in own_parameters(module) if means_parameter(names, (path, name), config)
    ]
    if parameters:
        return (path, parameters[-1 - depth]) if depth < len(parameters) else None
    kind = kind_of(module)
    return (path, kind.weight) if kind is not None and kind.weight in kind.weights(module) else None


def means_parameter(names: Names, ref: ParamRef, config: Mapping[str, Any]) -> bool:
    """Whether a PEFT config targets this weight as a parameter, not by its module."""
    path, name = ref
    return bool(
        peft_paths.expected_parameters(
            config, [parameter_path(alias, name) for alias in names.aliases[path]]
        )
    )


def all_refs(names: Names) -> list[ParamRef]:
    return [
        (path, name) for path, module in names.modules.items() for name in own_parameters(module)
    ]
