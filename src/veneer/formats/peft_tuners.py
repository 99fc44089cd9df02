"""The files of PEFT's tuners besides LoRA whose changes are changes of weights, in the terms of
Veneer's variants.

    ADALORA    <path>.lora_A [r, in]  lora_B [out, r]  lora_E [r, 1]
               ΔW = alpha / (init_r + 1e-5) · B diag(E) A
    LOHA       <path>.hada_w1_a, w1_b, w2_a, w2_b, t1, t2
               ΔW = alpha / r · (B1 A1) ⊙ (B2 A2)
    LOKR       <path>.lokr_w1 or w1_a, w1_b; lokr_w2 or w2_a, w2_b, t2
               ΔW = alpha / r · C ⊗ (B2 A2)
    VERA       <path>.vera_lambda_b [out]  vera_lambda_d [r]
               ΔW = diag(b) B[:out] diag(d) A[:, :in]
               base_model.vera_A [r, largest in] base_model.vera_B [largest out, r], if
               save_projection
    LN_TUNING  <path>.ln_tuning_layers.<parameter>    the layer, trained in full

Read from PEFT 0.21's source and checked against it in the tests. The core of a Tucker decomposition
(``t``, for a convolution with use_effective_conv2d) is multiplied into the factor of the inputs. A
w2 that is stored as one matrix becomes the product of itself and an identity. Neither changes ΔW.

The tensors of a file do not always determine the shape of a weight: VeRA's leave open how many
inputs a layer has, and a convolution's may be flat. ``Weights`` gives the shapes of a base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.formats import peft, peft_fields, peft_paths
from veneer.formats.vera_projections import PROJECTIONS, Weights, layer_projections

#: PEFT divides AdaLoRA's alpha by the rank plus this
EPSILON = 1e-5


class VariantChange(NamedTuple):
    """One change in its variant's terms: the parameters, with a leading axis for one group, and the
    scale of the variant's product."""

    parameters: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module by suffix, and its rank and scale in the config. ``pattern``:
    AdaLoRA's mask over ranks. ``projections``: VeRA's A and B in the sizes of the layer."""

    module_path: str
    tensors: Mapping[str, Tensor]
    rank: int
    scale: float
    pattern: tuple[bool, ...] | None = None
    projections: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Tuner:
    """One of PEFT's tuners.

    Fields:
        type: ``peft_type``.
        variant: Veneer's variant whose parameters its tensors are.
        suffixes: of a module's tensors.
        needs: required suffixes. Each entry lists alternatives, and each alternative the suffixes
            that belong together.
        fields: the tuner's names for fields of LoRA's config, by LoRA's names.
        extra_fields: further fields, which do not affect the change that a file holds, each with a
            test of its value.
        read: computes the change of one module.
    """

    type: str
    variant: str
    suffixes: tuple[str, ...]
    needs: tuple[tuple[tuple[str, ...], ...], ...]
    fields: Mapping[str, str]
    extra_fields: Mapping[str, Callable[[Any], bool]]
    read: Callable[[ModuleTensors], VariantChange]


def _integer(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _any(value: Any) -> bool:
    return True


def _masks(value: Any) -> bool:
    lists = isinstance(value, dict) and all(isinstance(mask, list) for mask in value.values())
    return lists and all(_flag(kept_rank) for mask in value.values() for kept_rank in mask)


def _adalora(module: ModuleTensors) -> VariantChange:
    A, B, E = (module.tensors[name] for name in ("lora_A", "lora_B", "lora_E"))
    rank, mask = len(A), torch.ones(len(A))
    # the file still contains the masked triplets
    if module.pattern is not None and len(module.pattern) == rank:
        mask = torch.tensor(module.pattern, dtype=torch.float32)
    elif rank != (module.rank if module.pattern is None else sum(module.pattern)):
        raise ValueError(f"rank {rank}, which its config does not give it")
    if not rank:  # every triplet was pruned: use one that is zero
        A, B, E, mask = (
            A.new_zeros(1, A.shape[1]),
            B.new_zeros(len(B), 1),
            E.new_zeros(1, 1),
            mask.new_zeros(1),
        )
    return VariantChange(
        {"A": A[None], "B": B[None], "E": E.reshape(1, -1), "mask": mask[None]}, module.scale
    )


def _loha(module: ModuleTensors) -> VariantChange:
    factors = {}
    for side in "12":
        B, A = (module.tensors[f"hada_w{side}_{name}"] for name in "ab")
        core = module.tensors.get(f"hada_t{side}")
        if core is not None:
            B, A = B.mT, torch.einsum("ijkl,jn->inkl", core, A).flatten(1)
        if A.shape[0] != module.rank or B.shape[1] != module.rank:
            raise ValueError(f"rank {B.shape[1]} and {A.shape[0]}, and {module.rank} in its config")
        factors |= {f"A{side}": A[None], f"B{side}": B[None]}
    return VariantChange(factors, module.scale)


def _lokr(module: ModuleTensors) -> VariantChange:
    tensors = module.tensors
    C = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
        # Conv1d: PEFT aligns C with the last two axes, which is no Kronecker product of matrices
        if w2.dim() == 3:
            out, in_ = C.shape[0] * w2.shape[0], C.shape[1] * w2.shape[1] * w2.shape[2]
            C, w2 = C.new_ones(1, 1), torch.kron(C, w2).reshape(out, in_)
        w2 = w2.flatten(1)
        eye = torch.eye(min(w2.shape), dtype=w2.dtype)
        B, A = (eye, w2) if w2.shape[0] <= w2.shape[1] else (w2, eye)
    else:
        B, A = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        if "lokr_t2" in tensors:
            B, A = B.mT, torch.einsum("ijkl,jn->inkl", tensors["lokr_t2"], A).flatten(1)
        if A.shape[0] != module.rank or B.shape[1] != module.rank:
            raise ValueError(f"rank {B.shape[1]} and {A.shape[0]}, and {module.rank} in its config")
    return VariantChange({"C": C[None], "A2": A[None], "B2": B[None]}, module.scale)


def _vera(module: ModuleTensors) -> VariantChange:
    assert module.projections is not None
    b, d = module.tensors["vera_lambda_b"], module.tensors["vera_lambda_d"]
    A, B = module.projections
    if d.shape != (module.rank,) or A.shape[0] != module.rank or B.shape != (len(b), module.rank):
        raise ValueError(f"projections {tuple(A.shape)} and {tuple(B.shape)} of rank {module.rank}")
    return VariantChange({"A": A[None], "B": B[None], "d": d[None], "b": b[None]}, 1.0)


#: permitted numbers of axes by suffix, where tensors have more or fewer than 2
_AXES = {
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t2"), (4,)), "lokr_w2": (2, 3, 4),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), (1,)),
}  # fmt: skip
_LYCORIS = {
    "rank_dropout": _number,
    "module_dropout": _number,
    "init_weights": _any,
    "use_effective_conv2d": _flag,
}
_BUDGET = dict.fromkeys(("target_r", "tinit", "tfinal", "deltaT", "total_step", "init_r"), _integer)
_BUDGET |= dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), _number)
TUNERS = {
    tuner.type: tuner
    for tuner in (
        Tuner(
            "ADALORA",
            "adalora",
            ("lora_A", "lora_B", "lora_E"),
            ((("lora_A", "lora_B", "lora_E"),),),
            {"r": "init_r"},
            {**_BUDGET, "rank_pattern": _masks},
            _adalora,
        ),
        Tuner(
            "LOHA",
            "loha",
            tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            ((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),),
            {"lora_alpha": "alpha"},
            _LYCORIS,
            _loha,
        ),
        Tuner(
            "LOKR",
            "lokr",
            tuple(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
            (
                (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
                (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")),
            ),
            {"lora_alpha": "alpha"},
            {
                **_LYCORIS,
                "decompose_both": _flag,
                "decompose_factor": _integer,
                "rank_dropout_scale": _flag,
            },
            _lokr,
        ),
        Tuner(
            "VERA",
            "vera",
            ("vera_lambda_b", "vera_lambda_d"),
            ((("vera_lambda_b", "vera_lambda_d"),),),
            {"lora_dropout": "vera_dropout"},
            {
                "projection_prng_key": _integer,
                "save_projection": _flag,
                "d_initial": _number,
                "init_weights": _any,
            },
            _vera,
        ),
        Tuner(
            "LN_TUNING",
            "lora",
            ("ln_tuning_layers",),
            (),
            {},
            {},
            lambda module: VariantChange({}, 1.0),
        ),
    )
}
#: fields of LoRA's config that these tuners do not have
_NOT_THEIRS = ("target_parameters", "use_dora")
#: fields of LoRA's config that AdaLoRA's config inherits and ignores
_UNUSED = ("r", "use_rslora", "alpha_pattern", "init_lora_weights", "rank_pattern")


def tuner_of(config: Mapping[str, Any]) -> Tuner | None:
    """The tuner of a config, if it is one of ``TUNERS``."""
    return TUNERS.get(str(config.get("peft_type")))


def check_config(
    config: Mapping[str, Any], by_veneer: bool = False, with_base: bool = False
) -> None:
    """``peft_fields.check_config`` for these tuners' configs too."""
    tuner = None if by_veneer else tuner_of(config)
    problems = []
    for name, test in tuner.extra_fields.items() if tuner is not None else ():
        value = config.get(name)
        if value is not None and not test(value):
            problem = f"{name}={repr(value)[:200]} in {peft.CONFIG}"
            problems.append(
                sentence(
                    problem,
                    f"what PEFT writes there for {config['peft_type']}",
                    "get the file again",
                )
            )
    for name in _NOT_THEIRS if tuner is not None else ():
        if config.get(name):
            problems.append(
                sentence(
                    f"{name} in {peft.CONFIG} of {config['peft_type']}",
                    "none",
                    "get the file again",
                )
            )
    raise_all(AdapterError, f"This {peft.CONFIG} cannot be used", problems)
    peft_fields.check_config(
        config if tuner is None else as_lora(tuner, config), by_veneer, with_base
    )


#: prefixes of the tensor names of PEFT's tuners; only LoRA's names may end in ".weight"
_MARKS = (
    "lora_",
    "hada_",
    "lokr_",
    "vera_",
    "ln_tuning_layers",
    "trainable_tokens_delta",
    "ia3_l",
    "oft_R",
    "boft_",
    "hra_u",
    "randlora_",
    "vblora_",
    "fourierft_",
    "shira_",
    "waveft_",
    "c3a_kernel",
    "delora_",
    "gralora_",
    "hira_",
)
_TOKENS = "TRAINABLE_TOKENS"


def check_tensors(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise AdapterError for tensors of another tuner than the config's. ``peft.split`` checks
    LoRA's tensors further."""
    type_, tuner = config.get("peft_type"), tuner_of(config)
    strange = []
    for key in keys:
        *_, above, last = ["", "", *key.removeprefix(peft.PREFIX).split(".")]
        marked = [segment for segment in (above, last) if segment.startswith(_MARKS)]
        if tuner is not None:
            is_valid = (
                "ln_tuning_layers" in (above, last) if not tuner.needs else last in tuner.suffixes
            )
            is_valid = is_valid or (type_ == "VERA" and key in PROJECTIONS)
        elif type_ == _TOKENS:
            is_valid = last == "trainable_tokens_delta"
        else:
            is_valid = all(mark.startswith("lora_") for mark in marked) or above == "token_adapter"
        if marked and not is_valid:
            strange.append(key)
    if strange:
        problem = (
            f"tensors of another tuner than {type_}, as {peft.CONFIG} says:"
            f" {listing(sorted(strange), 2)}"
        )
        raise AdapterError(problem, f"those of {type_}", "get both files again, of one adapter")


def as_lora(tuner: Tuner, config: Mapping[str, Any]) -> dict[str, Any]:
    """A tuner's config in LoRA's fields: its targets, and the rank and alpha that determine the
    scale of a change. Unknown fields are kept."""
    tuner_fields = {
        *tuner.extra_fields,
        *tuner.fields.values(),
        *(_UNUSED if tuner.type == "ADALORA" else ()),
    }
    lora = {name: value for name, value in config.items() if name not in tuner_fields}
    lora |= {name: config.get(tuner_name) for name, tuner_name in tuner.fields.items()}
    if tuner.type == "ADALORA" and _number(lora.get("lora_alpha")) and lora["lora_alpha"] <= 0:
        lora["lora_alpha"] = lora["r"]
    if tuner.type == "VERA":  # the paper's scale is 1
        lora["lora_alpha"] = config.get("r")
        lora["bias"] = "lora_only" if config.get("bias") == "vera_only" else config.get("bias")
    if tuner.type == "LN_TUNING":
        targets = config.get("target_modules")
        target_names = targets if isinstance(targets, list) else []
        extra_modules = config.get("modules_to_save")
        extra_names = extra_modules if isinstance(extra_modules, list) else []
        saved_modules = [*target_names, *extra_names]
        lora |= {
            "r": 1,
            "lora_alpha": 1,
            "target_modules": peft.NO_TARGETS,
            "modules_to_save": saved_modules,
        }
    return {**lora, "peft_type": "LORA"}


def changes(
    tuner: Tuner, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Weights | None
) -> tuple[dict[str, VariantChange], dict[str, Tensor]]:
    """The changes of a file by the path of their module, and its other tensors under the keys that
    LoRA's file gives them. ``AdapterError``: tensors that are no change of this tuner. Needs
    ``weights`` for VeRA (see ``needs_base_shapes``)."""
    by_module: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        bare = key.removeprefix(peft.PREFIX)
        path, _, suffix = bare.rpartition(".")
        if tuner.type == "LN_TUNING" and (above := path.removesuffix(".ln_tuning_layers")) != path:
            rest[peft.key(above, suffix)] = tensor
        elif bare != key and suffix in tuner.suffixes:
            by_module.setdefault(peft_paths.strip_wrappers(path)[0], {})[suffix] = tensor
        elif key not in PROJECTIONS or tuner.type != "VERA":
            rest[key] = tensor
    is_vera = tuner.type == "VERA"
    projections = (
        layer_projections(config, tensors, by_module, weights, problems) if is_vera else {}
    )
    lora, patterns, layer_changes = as_lora(tuner, config), config.get("rank_pattern") or {}, {}
    for module_path, module_tensors in by_module.items():
        rank, alpha, scale = peft_paths.strength(lora, module_path)
        pattern = None
        if tuner.type == "ADALORA":
            scale, pattern = alpha / (rank + EPSILON), patterns.get(f"{module_path}.lora_E")
        pattern = None if pattern is None else tuple(pattern)
        pair = projections.get(module_path)
        module = ModuleTensors(module_path, module_tensors, rank, scale, pattern, pair)
        if problem := _module_problem(tuner, module):
            problems.append(problem)
        elif not is_vera or pair is not None:
            try:
                layer_changes[module_path] = tuner.read(module)
            except (RuntimeError, ValueError, IndexError) as error:
                sizes = ", ".join(
                    f"{name} {tuple(tensor.shape)}" for name, tensor in module_tensors.items()
                )
                problem = f"{sizes} at {module_path!r} ({str(error).splitlines()[0]})"
                problems.append(
                    sentence(problem, f"a change of {tuner.type}", "get both files again")
                )
    raise_all(AdapterError, "These adapter tensors cannot be used", problems)
    return layer_changes, rest


def _module_problem(tuner: Tuner, module: ModuleTensors) -> str | None:
    """Why a module's tensors are no change of this tuner: other axes, or a missing tensor."""
    unusual = [
        name for name, tensor in module.tensors.items() if tensor.dim() not in _AXES.get(name, (2,))
    ]
    if unusual:
        sizes = ", ".join(f"{name} {tuple(module.tensors[name].shape)}" for name in unusual)
        axes = " or ".join(map(str, _AXES.get(unusual[0], (2,))))
        return sentence(
            f"{sizes} at {module.module_path!r}",
            f"{axes} axes in {unusual[0]}",
            "get both files again",
        )
    missing = [
        choice
        for choice in tuner.needs
        if not any(module.tensors.keys() >= {*names} for names in choice)
    ]
    if missing:
        alternatives = " and ".join(
            " or ".join(", ".join(names) for names in choice) for choice in missing
        )
        return sentence(
            f"no {alternatives} at {module.module_path!r}",
            "a whole change",
            "get the whole file again",
        )
    return None


def needs_base_shapes(tuner: Tuner, weights: Weights | None) -> bool:
    """Whether the shapes of the changes are known from a base only."""
    return tuner.type == "VERA" and weights is None


def deviation_reason(kind: str, module: Any) -> str | None:
    """As ``peft_behaviour.deviation_reason``, for these tuners: why PEFT's result differs from that
    of a change of the weight, or why no variant can represent the change; None if neither."""
    if kind in ("conv1d", "conv2d"):  # with the layer's stride, padding, dilation and groups
        if module.groups != 1:
            return (
                f"one product for all {module.groups} groups of a convolution, where Veneer has one"
                " for each group"
            )
        return (
            None
            if module.padding_mode == "zeros"
            else f"PEFT leaves out padding_mode={module.padding_mode!r}"
        )
    return (
        None
        if kind in ("linear", "conv1d_transformers")
        else f"PEFT has no {kind} layer of this tuner"
    )


def plain_shapes(
    module_path: str, A: Tensor, B: Tensor, weights: Weights | None
) -> Iterator[Tensor]:
    """A [r, in] and B [out, r] of a plain change in the shapes of LoRA's file, for the layer in the
    base if one is known."""
    shape_and_dtype = None if weights is None else weights(f"{module_path}.weight")
    shape = () if shape_and_dtype is None else shape_and_dtype[0]
    conv = len(shape) > 2 and math.prod(shape[1:]) == A.shape[1]
    yield A.reshape(-1, *shape[1:]) if conv else A
    yield B.reshape(*B.shape, *[1] * (len(shape) - 2)) if conv else B
