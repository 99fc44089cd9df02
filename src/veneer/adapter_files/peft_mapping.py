"""How an adapter of a model lies in PEFT's files: the path, the shapes and the config of each of
its changes, and which of them PEFT would apply in another way. The other direction too: which
weight a path of such a file means.

What PEFT wraps is not what Veneer changes. It adds the change to what a module gives, so it is
right where a module's output is linear in its weight and nothing else reads that; or it adds it to
one parameter for the time of a forward of the module. A change that neither of these expresses is
still saved, in a folder that PEFT refuses with the reason: better than one that loads and computes
something else.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import base_class, layer_states, weight_of
from veneer.attach.change import Change
from veneer.attach.dtypes import at_least_float32
from veneer.attach.lookup import adapters, parameter_path
from veneer.attach.refusals import GENERAL_KIND, kind_for
from veneer.attach.targets import Names, ParamRef, own_parameters
from veneer.attach.views import view
from veneer.attach.weight_readers import asked, weight_readers
from veneer.bases import storage_of
from veneer.config import LoraConfig
from veneer.distributed import is_sharded, whole
from veneer.formats import peft, peft_tuners
from veneer.layers import Layer, kind_of
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS


@dataclass(frozen=True)
class PeftEntry:
    """One change as the PEFT file holds it, for one of the modules that have its weight. ``where``
    is its path in the file, ``target`` what PEFT's config calls it (a parameter's path if
    ``parameter``), ``low`` what this module reads. ``exact`` says that the file holds the very
    parameters of the change."""

    where: str
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
    """Every change under every module that holds its weight, as that module reads it: PEFT adapts
    them one by one."""
    found: list[tuple[str, nn.Module, str, Change, bool, bool]] = []
    parameters = [parameter_path(*ref) for ref in all_refs(names)]
    for path, module, layer_state in layer_states(names.model):
        part = layer_state.get(name)
        for weight in own_parameters(module) if part is not None else ():
            if weight in part.changes and part.changes[weight].rank:
                kind = kind_for(module, weight).name
                parameter = kind == GENERAL_KIND.name or (
                    kind == "linear" and peft.taken_for_experts(path, parameters)
                )
                found.append(
                    (path, module, weight, part.changes[weight], layer_state.transposed, parameter)
                )
    wraps = Counter(path for path, *_, parameter in found if parameter)
    inside, entries = Counter(wraps), []
    for path, module, weight, change, transposed, parameter in found:
        where, target = peft.nested(path, wraps), path
        if parameter:  # each further parameter of a module wraps the one before
            inside[path] -= 1
            where = ".".join([*([where] if where else []), *["base_layer"] * inside[path]])
            target = parameter_path(path, weight)
        elif _several(module, weight):
            where = parameter_path(where, weight)
        low, _ = change.low_rank(weight_of(module, weight))
        exact = set(change.adapter_parameters) <= {"A", "B", *change.variant.peft_keys}
        alpha = change.alpha if exact else low.scale * low.rank
        low = low.T if transposed else low
        made = PeftEntry(
            where, target, parameter, path, module, weight, change, low, transposed, alpha, exact
        )
        entries.append(made)
    return entries


def _several(module: nn.Module, weight: str) -> bool:
    """Whether the file holds several weights of this module, each under its own name."""
    return len(kind_for(module, weight).weights(module)) > 1


def _wraps(peft_form: list[PeftEntry]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in peft_form:
        counts[entry.path] = counts[entry.path] + 1 if entry.parameter else 1
        if isinstance(entry.module, nn.MultiheadAttention):  # PEFT adapts its out-projection along
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
            tensors[peft.key(entry.where, suffix)] = written(tensor)
        for number, suffix in change.variant.peft_keys.items():
            whole = _whole(change, weight, change.adapter_parameters[number])
            tensors[peft.key(entry.where, suffix)] = written(kind.pack_vector(whole, shape))
    wraps, biases = _wraps(peft_form), new_biases(model, name)
    for entry in peft_form if biases else ():
        value = biases.get(
            entry.path, entry.low.B.new_zeros(entry.low.B.shape[0] * entry.low.B.shape[1])
        )
        tensors[peft.key(entry.where, peft.LORA_BIAS)] = written(value / (entry.low.scale or 1))
    for path, _, part in adapters(model, name):
        # what is trained in full stands below the wrappers
        inside = [peft.nested(path, wraps)] if path else []
        where = ".".join([*inside, *["base_layer"] * wraps.get(path, 0)])
        for key, value in part.full.state_dict().items():
            if key != "bias" or path not in biases:
                tensors[peft.key(where, key)] = written(value)
    return tensors


def new_biases(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The biases that an adapter has for layers without one, by path. PEFT has room for them beside
    B."""
    parts = (
        (path, module, part.full._parameters.get("bias"))
        for path, module, part in adapters(model, name)
    )
    return {
        path: own
        for path, module, own in parts
        if own is not None and module._parameters.get("bias") is None
    }


def _whole(change: Change, weight: Any, values: Tensor) -> Tensor:
    """A magnitude for every output: where nothing changes, the norm of the weight's own row."""
    if change.rows is None:
        return values
    dense = change.storage.dense(weight)
    norms = (
        change.layer.unfold(dense.to(at_least_float32(dense.dtype)), change.dims)
        .norm(dim=-1)
        .flatten()
    )
    return norms.index_copy(0, change.rows.to(norms.device), values.to(norms.dtype))


def written(tensor: Tensor) -> Tensor:
    """A tensor as a file takes it: on the CPU, in memory of its own."""
    return tensor.detach().cpu().contiguous().clone()


def peft_config(
    names: Names, name: str, config: LoraConfig, base_name: str | None, peft_form: list[PeftEntry]
) -> dict[str, Any]:
    variant = VARIANTS[config.variant]
    # of several weights of one module, for which PEFT has no name, each has a rank of its own
    named = {
        (
            peft.unnested(e.where)[0]
            if not e.parameter and _several(e.module, e.weight)
            else e.target
        ): e
        for e in peft_form
    }
    # in the order of wrapping
    parameters = list(dict.fromkeys(entry.target for entry in peft_form if entry.parameter))
    targets = list(dict.fromkeys(entry.target for entry in peft_form if not entry.parameter))
    # PEFT refuses dropout and Conv1D's flag where a change has no input of its own.
    plain = not parameters and not any(
        isinstance(entry.module, nn.MultiheadAttention) for entry in peft_form
    )
    kinds = {kind_for(entry.module, entry.weight).name for entry in peft_form}
    fields = {
        "peft_type": _peft_type(names, peft_form),
        "task_type": _task(names.model),
        "base_model_name_or_path": base_name,
        "lora_dropout": config.dropout if plain else 0.0,
        "target_modules": (
            peft.targets_for(targets, filter(None, names.modules)) if peft_form else peft.NO_TARGETS
        ),
        "modules_to_save": _whole_modules(names, name, _wraps(peft_form)) or None,
        "bias": {"none": "none", "targets": "lora_only", "all": "all"}[config.bias],
        "fan_in_fan_out": "conv1d_transformers" in kinds and plain,
        **({"lora_bias": True} if new_biases(names.model, name) else {}),
        **(variant.peft or {}),
    }
    alpha = variant.default_alpha if config.alpha is None else config.alpha
    sizes = {at: (entry.low.rank, entry.alpha) for at, entry in named.items()}
    return config_fields(fields, sizes, (config.rank, alpha), parameters)


def config_fields(
    fields: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, float]],
    usual: tuple[int, float],
    parameters: Sequence[str],
) -> dict[str, Any]:
    """A PEFT config of these fields, with what PEFT has for the rank and alpha of each path, in
    ``sizes``."""
    ranks = {at: rank for at, (rank, _) in sizes.items()}
    alphas = {at: alpha for at, (_, alpha) in sizes.items()}
    rank, alpha = peft.common(ranks, alphas, *usual)
    return {
        **fields,
        "r": rank,
        "lora_alpha": alpha,
        **({"target_parameters": list(parameters)} if parameters else {}),
        "rank_pattern": peft.patterns_for(ranks, rank),
        "alpha_pattern": peft.patterns_for(alphas, alpha),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _whole_modules(names: Names, name: str, wraps: Mapping[str, int]) -> list[str]:
    """The modules trained in full that PEFT can replace, by the ends of paths; the rest it loads
    into the base."""
    trained = {path: part.full._parameters for path, _, part in adapters(names.model, name)}
    above = {path.rpartition(".")[0] for path in names.modules}
    whole = {
        path
        for path, parameters in trained.items()
        if parameters
        and path not in above
        and parameters.keys() >= set(own_parameters(names.modules[path]))
        and peft.nested(f"{path}.", wraps) == f"{path}."
    }
    return sorted(
        path
        for path in whole
        if path and all(o in whole for o in names.modules if o.endswith(path))
    )


def _peft_type(names: Names, peft_form: list[PeftEntry]) -> str:
    """ "LORA", or what keeps PEFT from loading changes that it would apply in another way, or not at
    all."""
    for entry in peft_form:
        ref = entry.path, entry.weight
        nothing = is_zero(entry.low.A, entry.low.B) and not entry.change.variant.peft_keys
        reason = None if nothing or entry.change.module_only else reads_past(names, ref)
        reason = differs(names, ref, entry.parameter) if reason is None else reason
        if attention_above(names, ref) is not None and not nothing:
            reason = (
                f"PEFT {peft.KNOWN} applies the change of an attention's out-projection"
                f" {peft.TIMES} times"
            )
        if entry.change.variant.peft_keys and (entry.parameter or entry.transposed):
            reason = "PEFT rescales the outputs of modules alone"
        for above, attribute in asked(names, entry.path) if reason is None else ():
            if peft.lacks(attribute):  # then the forward fails
                problem = f"{above or 'the model'!r} reads its {attribute!r}, which"
                reason = f"{problem} the module that PEFT puts around it lacks"
                break
        if reason is not None:
            return f"{peft.NOT_FOR_PEFT}: {entry.path!r}: {reason}"
    return "LORA"


#: what the forward of PEFT's model for a task gives to the base's by name, whatever the caller gave
_OUTPUTS = {"labels", "output_attentions", "output_hidden_states", "return_dict"}
_INPUTS = {"input_ids", "attention_mask", "inputs_embeds"}
_TASKS = {
    "CAUSAL_LM": _INPUTS | _OUTPUTS,
    "SEQ_2_SEQ_LM": _INPUTS | _OUTPUTS | {f"decoder_{name}" for name in _INPUTS},
}


def _task(model: nn.Module) -> str | None:
    """PEFT's task: of a model that generates, by whether it has an encoder, as its config says.
    None, with which PEFT passes on whatever it is given, where the base's forward does not take
    what PEFT's would give it: Whisper reads sounds, not tokens. None too for classifiers and
    question answering: there PEFT expects its own choice of fully trained heads."""
    cls: Any = base_class(model)
    if not (callable(generates := getattr(cls, "can_generate", None)) and generates()):
        return None
    task = (
        "SEQ_2_SEQ_LM"
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        else "CAUSAL_LM"
    )
    taken = inspect.signature(cls.forward).parameters
    rest = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    # what is in the rest is no input
    tokens = {name for name in _TASKS[task] if name.endswith("input_ids")}
    return task if tokens <= taken.keys() and (rest or _TASKS[task] <= taken.keys()) else None


def reads_past(names: Names, ref: ParamRef, nested: str | None = None) -> str | None:
    """Who reads a weight past the module that PEFT wraps, in words, or None: there PEFT changes
    what the module gives, and not what they read. ``nested``: the attention that PEFT adapted along
    with this out-projection."""
    above = [
        weight_reader.path
        for weight_reader in weight_readers(names, *ref, now=True)
        if weight_reader.path != nested
    ]
    return (
        f"{above[0] or 'the model'!r} reads the weight itself, past the module that PEFT wraps"
        if above
        else None
    )


def differs(
    names: Names,
    ref: ParamRef,
    parameter: bool,
    rule: Callable[[str, Any], str | None] = peft.differs,
) -> str | None:
    """Why PEFT computes something else at a module than a change of its weight gives, or None.
    ``parameter``: it changes the parameter, not the module. ``rule``: the reasons in a module of a
    kind, which another tuner than LoRA has others of."""
    path, name = ref
    module, kind = names.modules[path], kind_for(names.modules[path], name)
    if path == "":
        return "PEFT cannot wrap the model itself"
    if parameter:
        recurrent = isinstance(module, nn.RNNBase)
        return (
            "its kernel reads a list of weights that PEFT leaves as it was" if recurrent else None
        )
    reason = rule(kind.name, module)
    if reason is None and not _plain_forward(kind, module, name):
        reason = (
            f"{base_class(module).__name__} has a forward of its own, which PEFT runs on the old"
            " weight"
        )
    return reason


def otherwise(
    names: Names,
    ref: ParamRef,
    layer: peft.PeftLayer,
    parameter: bool,
    tuner: object,
    nested: str | None = None,
) -> tuple[str | None, str | None]:
    """What PEFT computes otherwise than a change of the weight: who reads it past its module (where
    the product is zero that is no matter), and what the module does, each in words or None.
    Arguments as ``differs`` and ``reads_past`` have them; ``tuner``: the name of another tuner than
    LoRA, or None."""
    past = (
        None if not layer.extras and is_zero(layer.A, layer.B) else reads_past(names, ref, nested)
    )
    return past, differs(
        names, ref, parameter, peft.differs if tuner is None else peft_tuners.differs
    )


def is_zero(A: Tensor, B: Tensor) -> bool:
    """Whether a product changes nothing, whoever applies it: PEFT never trains a weight that is
    read past its module alone, such as an attention's out-projection by itself."""
    return not (A.any() and B.any())


def attention_above(names: Names, ref: ParamRef) -> str | None:
    """The path of the attention whose out-projection's weight this is, or None."""
    above, _, last = ref[0].rpartition(".")
    return (
        above
        if last == "out_proj" and isinstance(names.modules.get(above), nn.MultiheadAttention)
        else None
    )


def _plain_forward(kind: Layer, module: nn.Module, name: str) -> bool:
    """Whether the module computes ``kind.op``: its class has torch's forward, or one that gives the
    same."""
    base, weight = base_class(module), weight_of(module, name)
    storage: Any = storage_of(weight)
    if any(base.forward is stock.forward for stock in (*kind.types(), *storage.modules())):
        return True
    dense, own = storage.dense(weight), {}
    if not dense.any():  # of a model without weights: with these, every forward gives the same
        # numbers that differ along every axis, in little memory
        strides = range(dense.dim(), 0, -1)
        last = sum(stride * (size - 1) for stride, size in zip(strides, dense.shape, strict=True))
        numbers = torch.arange(last + 1.0, device=dense.device).sin().to(dense.dtype)
        dense = numbers.as_strided(dense.shape, [*strides])
        own = {name: dense}
    embeds = kind.name == "embedding"
    x = torch.arange(2 * kind.dims(module, dense.shape).in_, device=dense.device)
    x = x[:2] % len(dense) if embeds else x.view(2, -1).to(dense.dtype).sin()
    sharded = {
        other: whole(value) for other, value in module._parameters.items() if is_sharded(value)
    }
    module = view(module, base, {**sharded, **own})
    try:
        y = base.forward(module, x)
        expected = kind.op(module, x, dense, module._parameters.get("bias"))
        # PEFT knows of embeddings that scale what they give
        expected = expected * getattr(module, "embed_scale", 1) if embeds else expected
        return bool((y - expected).norm() <= 1e-2 * expected.norm())
    except Exception:  # whatever a forward that we do not know makes of it
        return False


def found_at(names: Names, file_path: str) -> tuple[str, int, str]:
    """What a path of a PEFT file means: (a module, how many wrappers stand behind it, what
    follows)."""
    parts, above, depth = file_path.split(".") if file_path else [], "", 0
    for count, part in enumerate(parts):
        below = parameter_path(above, part)
        if below in names.canonical:
            above, depth = below, 0
        elif part == "base_layer":
            depth += 1
        else:
            return names.canonical[above], depth, ".".join(parts[count:])
    return names.canonical[above], depth, ""


def module_at(names: Names, file_path: str) -> str:
    """The module that a path of a PEFT file means, under its first name."""
    path, _, rest = found_at(names, file_path)
    return file_path if rest else path


def ref_at(names: Names, file_path: str, config: Mapping[str, Any]) -> ParamRef | None:
    """The weight that a path of a PEFT file means: a module's only one, one by its own path, or a
    nested parameter."""
    path, depth, rest = found_at(names, file_path)
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
    """Whether a PEFT config means this weight as a parameter, not by its module."""
    path, name = ref
    return bool(
        peft.expected_parameters(
            config, [parameter_path(alias, name) for alias in names.aliases[path]]
        )
    )


def all_refs(names: Names) -> list[ParamRef]:
    return [
        (path, name) for path, module in names.modules.items() for name in own_parameters(module)
    ]
