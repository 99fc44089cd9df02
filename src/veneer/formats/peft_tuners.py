"""Read the files of PEFT's tuners AdaLoRA, LoHa, LoKr and VeRA as parameters of Veneer's variants,
and those of LN tuning as layers trained in full.

    ADALORA    <path>.lora_A [r, in]  lora_B [out, r]  lora_E [r, 1]
               ΔW = alpha / (init_r + 1e-5) · B diag(E) A
    LOHA       <path>.hada_w1_a (B1), hada_w1_b (A1), hada_w2_a (B2), hada_w2_b (A2), hada_t1, …_t2
               ΔW = alpha / r · (B1 A1) ⊙ (B2 A2)
    LOKR       <path>.lokr_w1 (C), or lokr_w1_a lokr_w1_b = C; lokr_w2, or lokr_w2_a (B2), lokr_w2_b
               (A2) and lokr_t2
               ΔW = alpha / r · C ⊗ (B2 A2)
    VERA       <path>.vera_lambda_b [out]  vera_lambda_d [r]
               ΔW = diag(b) B[:out] diag(d) A[:, :in]
               base_model.vera_A [r, largest in], base_model.vera_B [largest out, r], if the config
               has save_projection
    LN_TUNING  <path>.ln_tuning_layers.<parameter>    the layer, trained in full

The formulas are those of PEFT 0.21's source; the tests compare the results with PEFT. The core of a
Tucker decomposition (``t1``, ``t2``, of a convolution with use_effective_conv2d) is multiplied into
A. A w2 that is stored as one matrix becomes the product of itself and an identity. Neither step
changes ΔW.

The tensors of a file do not always determine the shape of a weight: VeRA's do not show the number
of a layer's inputs, and a convolution's may be flattened. A ``WeightLookup`` gives the shapes of a
base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError, first_line, listing, raise_all, sentence
from veneer.formats import peft, peft_fields, peft_paths, peft_tokens
from veneer.formats.peft_fields import all_values, has_type, is_number
from veneer.formats.vera_projections import PROJECTIONS, WeightLookup, layer_projections

#: PEFT divides AdaLoRA's alpha by the rank plus ADALORA_EPSILON
ADALORA_EPSILON = 1e-5


class VariantChange(NamedTuple):
    """The change of one weight: the parameters of a variant, each with a first axis of size 1 (one
    group), and the scale that multiplies the variant's product."""

    parameters: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module in a tuner's file.

    Fields:
        tensors: by suffix.
        rank, scale: the module's rank and scale according to the config.
        mask: for AdaLoRA, whether each of the ranks is in use; None if the config does not tell.
        projections: for VeRA, A and B in the sizes of the layer.
    """

    module_path: str
    tensors: Mapping[str, Tensor]
    rank: int
    scale: float
    mask: Sequence[bool] | None = None
    projections: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Tuner:
    """One of PEFT's tuners.

    Fields:
        type: its ``peft_type``.
        variant: the name of Veneer's variant that has the tuner's parameters.
        suffixes: the suffixes of a module's tensors.
        required_suffixes: the suffixes that a module must have. Each entry lists alternatives; an
            alternative is a tuple of suffixes, all of which are required.
        fields: LoRA's name of a config field -> the tuner's name of the field.
        extra_fields: the tuner's further fields, each with a test of its value. They do not affect
            the change that a file holds.
        read: a function that computes the change of one module.
    """

    type: str
    variant: str
    suffixes: tuple[str, ...]
    required_suffixes: tuple[tuple[tuple[str, ...], ...], ...]
    fields: Mapping[str, str]
    extra_fields: Mapping[str, Callable[[Any], bool]]
    read: Callable[[ModuleTensors], VariantChange]


def _is_anything(value: Any) -> bool:
    return True


_is_integer, _is_flag = has_type(int), has_type(bool)
_are_masks = all_values(dict, all_values(list, _is_flag))


def _read_adalora(stored: ModuleTensors) -> VariantChange:
    A, B, E = (stored.tensors[name] for name in ("lora_A", "lora_B", "lora_E"))
    rank, mask = len(A), torch.ones(len(A))
    # a file may still have the pruned columns of B, rows of A and values of E; then keep the mask
    if stored.mask is not None and len(stored.mask) == rank:
        mask = torch.tensor(stored.mask, dtype=torch.float32)
    elif rank != (stored.rank if stored.mask is None else sum(stored.mask)):
        raise ValueError(f"rank {rank}, which its config does not give it")
    if not rank:  # AdaLoRA pruned every rank: use one rank with zeros
        A = A.new_zeros(1, A.shape[1])
        B = B.new_zeros(len(B), 1)
        E = E.new_zeros(1, 1)
        mask = mask.new_zeros(1)
    return VariantChange(
        {"A": A[None], "B": B[None], "E": E.reshape(1, -1), "mask": mask[None]}, stored.scale
    )


def _read_product(stored: ModuleTensors, prefix: str, index: str) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]) of the ``index``-th product of LoHa ("hada") or LoKr ("lokr"). If it
    is a Tucker decomposition, its core is multiplied into A."""
    B, A = (stored.tensors[f"{prefix}_w{index}_{name}"] for name in "ab")
    core = stored.tensors.get(f"{prefix}_t{index}")
    if core is not None:
        B, A = B.mT, torch.einsum("ijkl,jn->inkl", core, A).flatten(1)
    if A.shape[0] != stored.rank or B.shape[1] != stored.rank:
        raise ValueError(f"rank {B.shape[1]} and {A.shape[0]}, and {stored.rank} in its config")
    return B, A


def _read_loha(stored: ModuleTensors) -> VariantChange:
    factors = {}
    for factor_index in "12":
        B, A = _read_product(stored, "hada", factor_index)
        factors |= {f"A{factor_index}": A[None], f"B{factor_index}": B[None]}
    return VariantChange(factors, stored.scale)


def _read_lokr(stored: ModuleTensors) -> VariantChange:
    tensors = stored.tensors
    C = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
        # For a Conv1d, PEFT's ``kron`` of the matrix C and the 3-axis w2 multiplies C into the last
        # two axes. Its result is no Kronecker product of matrices: store it as w2, with C = 1.
        if w2.dim() == 3:
            out, in_ = C.shape[0] * w2.shape[0], C.shape[1] * w2.shape[1] * w2.shape[2]
            C, w2 = C.new_ones(1, 1), torch.kron(C, w2).reshape(out, in_)
        w2 = w2.flatten(1)
        eye = torch.eye(min(w2.shape), dtype=w2.dtype)
        B, A = (eye, w2) if w2.shape[0] <= w2.shape[1] else (w2, eye)
    else:
        B, A = _read_product(stored, "lokr", "2")
    return VariantChange({"C": C[None], "A2": A[None], "B2": B[None]}, stored.scale)


def _read_vera(stored: ModuleTensors) -> VariantChange:
    assert stored.projections is not None
    b, d = stored.tensors["vera_lambda_b"], stored.tensors["vera_lambda_d"]
    A, B = stored.projections
    if d.shape != (stored.rank,) or A.shape[0] != stored.rank or B.shape != (len(b), stored.rank):
        raise ValueError(f"projections {tuple(A.shape)} and {tuple(B.shape)} of rank {stored.rank}")
    return VariantChange({"A": A[None], "B": B[None], "d": d[None], "b": b[None]}, 1.0)


#: the permitted numbers of axes of a tensor, by suffix; tensors with other suffixes have 2 axes
_AXIS_COUNTS = {
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t2"), (4,)), "lokr_w2": (2, 3, 4),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), (1,)),
}  # fmt: skip
#: the further config fields that LoHa and LoKr share -> a test of the field's value
_LYCORIS_FIELDS = {
    "rank_dropout": is_number,
    "module_dropout": is_number,
    "init_weights": _is_anything,
    "use_effective_conv2d": _is_flag,
}
#: AdaLoRA's config fields that schedule its budget of ranks -> a test of the field's value
_BUDGET_FIELDS = {
    **dict.fromkeys(("target_r", "tinit", "tfinal", "deltaT", "total_step", "init_r"), _is_integer),
    **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), is_number),
}
TUNERS = {
    tuner.type: tuner
    for tuner in (
        Tuner(
            "ADALORA",
            "adalora",
            ("lora_A", "lora_B", "lora_E"),
            ((("lora_A", "lora_B", "lora_E"),),),
            {"r": "init_r"},
            {**_BUDGET_FIELDS, "rank_pattern": _are_masks},
            _read_adalora,
        ),
        Tuner(
            "LOHA",
            "loha",
            tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            ((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),),
            {"lora_alpha": "alpha"},
            _LYCORIS_FIELDS,
            _read_loha,
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
                **_LYCORIS_FIELDS,
                "decompose_both": _is_flag,
                "decompose_factor": _is_integer,
                "rank_dropout_scale": _is_flag,
            },
            _read_lokr,
        ),
        Tuner(
            "VERA",
            "vera",
            ("vera_lambda_b", "vera_lambda_d"),
            ((("vera_lambda_b", "vera_lambda_d"),),),
            {"lora_dropout": "vera_dropout"},
            {
                "projection_prng_key": _is_integer,
                "save_projection": _is_flag,
                "d_initial": is_number,
                "init_weights": _is_anything,
            },
            _read_vera,
        ),
        Tuner(
            "LN_TUNING",
            "lora",
            ("ln_tuning_layers",),
            (),
            {},
            {},
            lambda stored: VariantChange({}, 1.0),
        ),
    )
}
#: the fields of LoRA's config that no tuner here has
_LORA_ONLY_FIELDS = ("target_parameters", "use_dora")
#: the fields that AdaLoRA's config inherits from LoRA's and ignores
_ADALORA_IGNORED_FIELDS = ("r", "use_rslora", "alpha_pattern", "init_lora_weights", "rank_pattern")


def tuner_of(config: Mapping[str, Any]) -> Tuner | None:
    """The tuner that a config names in ``peft_type``; None if ``TUNERS`` lacks it."""
    return TUNERS.get(str(config.get("peft_type")))


def check_config(
    config: Mapping[str, Any], by_veneer: bool = False, with_base: bool = False
) -> None:
    """Raise AdapterError for an unsupported or invalid config, as ``peft_fields.check_config``
    does, but also accept the configs of ``TUNERS``."""
    tuner = None if by_veneer else tuner_of(config)
    if tuner is not None:
        problems = [
            sentence(
                f"{name}={repr(config[name])[:200]} in {peft.CONFIG}",
                f"what PEFT writes there for {tuner.type}",
                "get the file again",
            )
            for name, test in tuner.extra_fields.items()
            if config.get(name) is not None and not test(config[name])
        ]
        problems += [
            sentence(f"{name} in {peft.CONFIG} of {tuner.type}", "none", "get the file again")
            for name in _LORA_ONLY_FIELDS
            if config.get(name)
        ]
        raise_all(AdapterError, f"This {peft.CONFIG} cannot be used", problems)
        config = lora_config_of(tuner, config)
    peft_fields.check_config(config, by_veneer, with_base)


#: the beginnings of the suffixes of PEFT's tuners. (If the last segment of a key is "weight", as in
#: LoRA's, the segment before it has one of these beginnings.)
_TUNER_PREFIXES = (
    "lora_", "hada_", "lokr_", "vera_", "ln_tuning_layers", "trainable_tokens_delta", "ia3_l",
    "oft_R", "boft_", "hra_u", "randlora_", "vblora_", "fourierft_", "shira_", "waveft_",
    "c3a_kernel", "delora_", "gralora_", "hira_",
)  # fmt: skip


def check_tensors(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise AdapterError if a key belongs to another tuner than the config's.
    ``peft.split_tensors`` has further checks of LoRA's tensors."""
    peft_type, tuner = config.get("peft_type"), tuner_of(config)
    foreign_keys = []
    for key in keys:
        *_, parent_segment, last_segment = ["", "", *key.removeprefix(peft.PREFIX).split(".")]
        tuner_segments = [
            name for name in (parent_segment, last_segment) if name.startswith(_TUNER_PREFIXES)
        ]
        if tuner is not None:
            is_valid = (
                "ln_tuning_layers" in (parent_segment, last_segment)
                if not tuner.required_suffixes
                else last_segment in tuner.suffixes
            )
            is_valid = is_valid or (peft_type == "VERA" and key in PROJECTIONS)
        elif peft_type == peft_tokens.TOKENS_TYPE:
            is_valid = last_segment == peft_tokens.TUNER_ROWS_SUFFIX
        else:
            is_lora = all(segment.startswith("lora_") for segment in tuner_segments)
            is_valid = is_lora or parent_segment == "token_adapter"
        if tuner_segments and not is_valid:
            foreign_keys.append(key)
    if foreign_keys:
        raise AdapterError(
            f"tensors of another tuner than {peft_type}, as {peft.CONFIG} says:"
            f" {listing(sorted(foreign_keys), 2)}",
            f"those of {peft_type}",
            "get both files again, of one adapter",
        )


def lora_config_of(tuner: Tuner, config: Mapping[str, Any]) -> dict[str, Any]:
    """A tuner's config with the names of LoRA's fields: the targets, and the rank and alpha that
    determine the scale of a change. Unknown fields are kept."""
    tuner_fields = {
        *tuner.extra_fields,
        *tuner.fields.values(),
        *(_ADALORA_IGNORED_FIELDS if tuner.type == "ADALORA" else ()),
    }
    lora_config = {name: value for name, value in config.items() if name not in tuner_fields}
    lora_config |= {name: config.get(tuner_name) for name, tuner_name in tuner.fields.items()}
    alpha: Any = lora_config.get("lora_alpha")
    if tuner.type == "ADALORA" and is_number(alpha) and alpha <= 0:
        lora_config["lora_alpha"] = lora_config["r"]
    if tuner.type == "VERA":  # VeRA has no alpha: its scale is 1
        lora_config["lora_alpha"] = config.get("r")
        bias = config.get("bias")
        lora_config["bias"] = "lora_only" if bias == "vera_only" else bias
    if tuner.type == "LN_TUNING":
        saved_modules = [
            name
            for field in ("target_modules", "modules_to_save")
            if isinstance(config.get(field), list)
            for name in config[field]
        ]
        lora_config |= {
            "r": 1,
            "lora_alpha": 1,
            "target_modules": peft.NO_TARGETS,
            "modules_to_save": saved_modules,
        }
    return {**lora_config, "peft_type": "LORA"}


def read_changes(
    tuner: Tuner,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weight_lookup: WeightLookup | None,
) -> tuple[dict[str, VariantChange], dict[str, Tensor]]:
    """(the changes of a file by module path, its other tensors with the keys of LoRA's file).

    Args:
        weight_lookup: returns the shapes of the base's weights, which determine the shapes of
            VeRA's changes. If None, VeRA's changes are left out.

    Raises:
        AdapterError: tensors are no change of this tuner.
    """
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    other_tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        bare_key = key.removeprefix(peft.PREFIX)
        path, _, suffix = bare_key.rpartition(".")
        if (
            tuner.type == "LN_TUNING"
            and (module_path := path.removesuffix(".ln_tuning_layers")) != path
        ):
            other_tensors[peft.tensor_key(module_path, suffix)] = tensor
        elif bare_key != key and suffix in tuner.suffixes:
            tensors_by_module.setdefault(peft_paths.strip_wrappers(path)[0], {})[suffix] = tensor
        elif key not in PROJECTIONS or tuner.type != "VERA":
            other_tensors[key] = tensor
    is_vera = tuner.type == "VERA"
    projections = (
        layer_projections(config, tensors, tensors_by_module, weight_lookup, problems)
        if is_vera
        else {}
    )
    lora_config, layer_changes = lora_config_of(tuner, config), {}
    masks = config.get("rank_pattern") or {}
    for module_path, module_tensors in tensors_by_module.items():
        rank, alpha, scale = peft_paths.rank_alpha_scale(lora_config, module_path)
        mask = None
        if tuner.type == "ADALORA":
            scale, mask = alpha / (rank + ADALORA_EPSILON), masks.get(f"{module_path}.lora_E")
        module_projections = projections.get(module_path)
        stored = ModuleTensors(module_path, module_tensors, rank, scale, mask, module_projections)
        if problem := _module_problem(tuner, stored):
            problems.append(problem)
        elif not is_vera or module_projections is not None:
            try:
                layer_changes[module_path] = tuner.read(stored)
            except (RuntimeError, ValueError, IndexError) as error:
                shapes_text = ", ".join(
                    f"{name} {tuple(tensor.shape)}" for name, tensor in module_tensors.items()
                )
                problem = f"{shapes_text} at {module_path!r} ({first_line(error)})"
                problems.append(
                    sentence(problem, f"a change of {tuner.type}", "get both files again")
                )
    raise_all(AdapterError, "These adapter tensors cannot be used", problems)
    return layer_changes, other_tensors


def _module_problem(tuner: Tuner, stored: ModuleTensors) -> str | None:
    """Why a module's tensors are no change of this tuner: a wrong number of axes, or a missing
    tensor. None if they are a change."""
    misshapen_names = [
        name
        for name, tensor in stored.tensors.items()
        if tensor.dim() not in _AXIS_COUNTS.get(name, (2,))
    ]
    if misshapen_names:
        shapes_text = ", ".join(
            f"{name} {tuple(stored.tensors[name].shape)}" for name in misshapen_names
        )
        axes_text = " or ".join(map(str, _AXIS_COUNTS.get(misshapen_names[0], (2,))))
        return sentence(
            f"{shapes_text} at {stored.module_path!r}",
            f"{axes_text} axes in {misshapen_names[0]}",
            "get both files again",
        )
    missing_suffixes = [
        alternatives
        for alternatives in tuner.required_suffixes
        if not any(stored.tensors.keys() >= {*suffixes} for suffixes in alternatives)
    ]
    if missing_suffixes:
        missing_text = " and ".join(
            " or ".join(", ".join(suffixes) for suffixes in alternatives)
            for alternatives in missing_suffixes
        )
        return sentence(
            f"no {missing_text} at {stored.module_path!r}",
            "a whole change",
            "get the whole file again",
        )
    return None


def deviation_reason(kind_name: str, module: Any) -> str | None:
    """Why PEFT's result with a tuner of ``TUNERS`` differs from the result of a change of the
    weight, or why no variant of Veneer can represent the change; None if neither is so.
    ``kind_name``: the name of the module's kind (``layers/``)."""
    # PEFT convolves x with its ΔW by the layer's stride, padding, dilation and groups, so the
    # result can differ only with several groups or another padding mode.
    if kind_name in ("conv1d", "conv2d"):
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
        if kind_name in ("linear", "conv1d_transformers")
        else f"PEFT has no {kind_name} layer of this tuner"
    )


def reshape_for_file(
    module_path: str, A: Tensor, B: Tensor, weight_lookup: WeightLookup | None
) -> Iterator[Tensor]:
    """Yield A [r, in], then B [out, r], of a plain low-rank change in the shapes of LoRA's file.
    If the base is known and the layer is a convolution, they get the axes of its kernel."""
    shape_and_dtype = None if weight_lookup is None else weight_lookup(f"{module_path}.weight")
    shape = () if shape_and_dtype is None else shape_and_dtype[0]
    is_conv = len(shape) > 2 and math.prod(shape[1:]) == A.shape[1]
    yield A.reshape(-1, *shape[1:]) if is_conv else A
    yield B.reshape(*B.shape, *[1] * (len(shape) - 2)) if is_conv else B
