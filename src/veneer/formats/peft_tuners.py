"""The files of PEFT's tuners besides LoRA whose changes are changes of weights, in the terms of
Veneer's variants.

    ADALORA    <path>.lora_A [r, in]  lora_B [out, r]  lora_E [r, 1]          ΔW = alpha / (init_r + 1e-5) · B diag(E) A
    LOHA       <path>.hada_w1_a, w1_b, w2_a, w2_b, t1, t2                     ΔW = alpha / r · (B1 A1) ⊙ (B2 A2)
    LOKR       <path>.lokr_w1 or w1_a, w1_b; lokr_w2 or w2_a, w2_b, t2        ΔW = alpha / r · C ⊗ (B2 A2)
    VERA       <path>.vera_lambda_b [out]  vera_lambda_d [r]                  ΔW = diag(b) B[:out] diag(d) A[:, :in]
               base_model.vera_A [r, largest in] base_model.vera_B [largest out, r], if
               save_projection
    LN_TUNING  <path>.ln_tuning_layers.<parameter>                             the layer, trained in full

Read from PEFT 0.21's source and checked against it in the tests. The core of a Tucker decomposition
(``t``, of a convolution with use_effective_conv2d) is multiplied into the factor of the inputs, a
w2 that is held whole is the product of itself and an identity: the ΔW is the same one.

A file says nothing of the shape of a weight but what its tensors say: VeRA's leave open how many
inputs a layer has, and those of a convolution may be flat. ``Weights`` tells, where there is a
base.
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

#: the shape and, where it is plain, the dtype of a base's parameter, by its path; None where the
#: base lacks it
Weights = Callable[[str], "tuple[tuple[int, ...], torch.dtype | None] | None"]

#: what PEFT adds to the rank that AdaLoRA divides by
EPSILON = 1e-5
#: VeRA's projections, beside all modules
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


class VariantChange(NamedTuple):
    """One change in its variant's terms: the parameters, with an axis for one group in front, and
    the scale of the variant's product."""

    parameters: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module by suffix, its rank and scale as the config says, the pattern of
    AdaLoRA's ranks, and VeRA's projections, cut to the layer."""

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
        suffixes: of a module's tensors; each of ``needs`` is one of these, or a choice of several
            that go together.
        fields: the tuner's own name of a field of LoRA's config.
        extra_fields: its further fields, which change nothing that is computed from the file, with
            the test of each.
        read: what a file holds of one module -> its change.
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
    # the masked triplets are still there
    if module.pattern is not None and len(module.pattern) == rank:
        mask = torch.tensor(module.pattern, dtype=torch.float32)
    elif rank != (module.rank if module.pattern is None else sum(module.pattern)):
        raise ValueError(f"rank {rank}, which its config does not give it")
    if not rank:  # every triplet was taken away, and PEFT keeps none
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
        # of a Conv1d, where PEFT aligns C with the last two axes: the product of no two matrices
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


#: how many axes tensors have by their suffix, where these are not 2
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
            "ADALORA", "adalora", ("lora_A", "lora_B", "lora_E"), ((("lora_A", "lora_B", "lora_E"),),),
            {"r": "init_r"}, {**_BUDGET, "rank_pattern": _masks}, _adalora,
        ),
        Tuner(
            "LOHA", "loha", tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            ((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),), {"lora_alpha": "alpha"}, _LYCORIS, _loha,
        ),
        Tuner(
            "LOKR", "lokr", tuple(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
            ((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
            {"lora_alpha": "alpha"},
            {**_LYCORIS, "decompose_both": _flag, "decompose_factor": _integer, "rank_dropout_scale": _flag}, _lokr,
        ),
        Tuner(
            "VERA", "vera", ("vera_lambda_b", "vera_lambda_d"), ((("vera_lambda_b", "vera_lambda_d"),),),
            {"lora_dropout": "vera_dropout"},
            {"projection_prng_key": _integer, "save_projection": _flag, "d_initial": _number, "init_weights": _any},
            _vera,
        ),
        Tuner("LN_TUNING", "lora", ("ln_tuning_layers",), (), {}, {}, lambda module: VariantChange({}, 1.0)),
    )
}  # fmt: skip
#: fields of LoRA's config that would mean another adapter
_NOT_THEIRS = ("target_parameters", "use_dora")
#: fields of LoRA's config that AdaLoRA's has, and does not look at
_UNUSED = ("r", "use_rslora", "alpha_pattern", "init_lora_weights", "rank_pattern")


def tuner_of(config: Mapping[str, Any]) -> Tuner | None:
    """The tuner of a config, if it is one of ``TUNERS``."""
    return TUNERS.get(str(config.get("peft_type")))


def check_config(
    config: Mapping[str, Any], by_veneer: bool = False, with_base: bool = False
) -> None:
    """``peft_fields.check_config``, for the configs of these tuners too."""
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


#: how the names begin that PEFT's tuners give their tensors; only LoRA's may have ".weight" behind
#: them
_MARKS = (
    "lora_", "hada_", "lokr_", "vera_", "ln_tuning_layers", "trainable_tokens_delta", "ia3_l", "oft_R", "boft_",
    "hra_u", "randlora_", "vblora_", "fourierft_", "shira_", "waveft_", "c3a_kernel", "delora_", "gralora_", "hira_",
)  # fmt: skip
_TOKENS = "TRAINABLE_TOKENS"


def check_tensors(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise AdapterError for tensors of another tuner than that of the config. ``peft.split``
    judges LoRA's further."""
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
    """A tuner's config in LoRA's fields: its targets, and the rank and alpha that the scale of a
    change comes from. A field that neither knows is still there."""
    own_fields = {
        *tuner.extra_fields,
        *tuner.fields.values(),
        *(_UNUSED if tuner.type == "ADALORA" else ()),
    }
    lora = {name: value for name, value in config.items() if name not in own_fields}
    lora |= {name: config.get(own_name) for name, own_name in tuner.fields.items()}
    if tuner.type == "ADALORA" and _number(lora.get("lora_alpha")) and lora["lora_alpha"] <= 0:
        lora["lora_alpha"] = lora["r"]
    if tuner.type == "VERA":  # the paper's scale is 1
        lora["lora_alpha"] = config.get("r")
        lora["bias"] = "lora_only" if config.get("bias") == "vera_only" else config.get("bias")
    if tuner.type == "LN_TUNING":
        targets = config.get("target_modules")
        named = targets if isinstance(targets, list) else []
        more = config.get("modules_to_save")
        saved_modules = [*named, *(more if isinstance(more, list) else [])]
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
    cut = (
        _projections(config, tensors, by_module, weights, problems) if tuner.type == "VERA" else {}
    )
    lora, patterns, layer_changes = as_lora(tuner, config), config.get("rank_pattern") or {}, {}
    for module_path, module_tensors in by_module.items():
        rank, alpha, scale = peft_paths.strength(lora, module_path)
        pattern = None
        if tuner.type == "ADALORA":
            scale, pattern = alpha / (rank + EPSILON), patterns.get(f"{module_path}.lora_E")
        pattern = None if pattern is None else tuple(pattern)
        lacking = [
            choice
            for choice in tuner.needs
            if not any(module_tensors.keys() >= {*names} for names in choice)
        ]
        odd = [
            name
            for name, tensor in module_tensors.items()
            if tensor.dim() not in _AXES.get(name, (2,))
        ]
        if odd:
            sizes = ", ".join(f"{name} {tuple(module_tensors[name].shape)}" for name in odd)
            axes = " or ".join(map(str, _AXES.get(odd[0], (2,))))
            problems.append(
                sentence(
                    f"{sizes} at {module_path!r}",
                    f"{axes} axes in {odd[0]}",
                    "get both files again",
                )
            )
        elif lacking:
            wanted = " and ".join(
                " or ".join(", ".join(names) for names in choice) for choice in lacking
            )
            problems.append(
                sentence(
                    f"no {wanted} at {module_path!r}", "a whole change", "get the whole file again"
                )
            )
        elif tuner.type != "VERA" or module_path in cut:
            try:
                layer_changes[module_path] = tuner.read(
                    ModuleTensors(
                        module_path, module_tensors, rank, scale, pattern, cut.get(module_path)
                    )
                )
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


def needs_base_shapes(tuner: Tuner, weights: Weights | None) -> bool:
    """Whether only a base tells the shapes of the changes."""
    return tuner.type == "VERA" and weights is None


def _projections(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], by_module: Mapping[str, Mapping[str, Tensor]],
    weights: Weights | None, problems: list[str],
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """VeRA's A [r, in] and B [out, r] of each module, cut to the layer: the file's, or those that
    PEFT draws from the config's key."""
    if weights is None:
        return {}
    sizes: dict[str, tuple[int, int, torch.dtype | None]] = {}
    for module_path, module_tensors in by_module.items():
        shape_and_dtype, out = (
            weights(f"{module_path}.weight"),
            module_tensors["vera_lambda_b"].numel() if "vera_lambda_b" in module_tensors else 0,
        )
        if (
            shape_and_dtype is None
            or not out
            or len(shape_and_dtype[0]) != 2
            or math.prod(shape_and_dtype[0]) % out
        ):
            shape = "none" if shape_and_dtype is None else tuple(shape_and_dtype[0])
            expected = "a weight with as many outputs"
            problems.append(
                sentence(
                    f"{out} outputs at {module_path!r}, where the base has {shape}",
                    expected,
                    "use its base",
                )
            )
        else:
            sizes[module_path] = out, math.prod(shape_and_dtype[0]) // out, shape_and_dtype[1]
    if problems or not sizes:
        return {}
    out, in_ = max(out for out, _, _ in sizes.values()), max(in_ for _, in_, _ in sizes.values())
    A, B = (tensors.get(name) for name in PROJECTIONS)
    drawn = A is None or B is None
    if drawn and config.get("save_projection", True):
        problem = (
            f"no {' and no '.join(key for key in PROJECTIONS if key not in tensors)}, and"
            " save_projection=True"
        )
        problems.append(sentence(problem, "both projections", "get the whole file again"))
        return {}
    if drawn and not _integer(config.get("projection_prng_key")):
        problem = (
            f"no {' and no '.join(key for key in PROJECTIONS if key not in tensors)}, and no"
            " projection_prng_key"
        )
        problems.append(
            sentence(
                problem,
                "the projections, or what they are drawn from",
                "get both files again",
            )
        )
        return {}
    if A is None or B is None:
        A, B = drawn_projections(config["projection_prng_key"], config["r"], out, in_)
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] < in_ or B.shape[0] < out:
        shape_and_dtype = f"projections {tuple(A.shape)} and {tuple(B.shape)}"
        problems.append(
            sentence(shape_and_dtype, f"at least {in_} inputs and {out} outputs", "use its base")
        )
        return {}
    cut = {}
    for module_path, (rows, columns, dtype) in sizes.items():
        pair = A[:, :columns], B[:rows]
        if drawn and dtype is not None:  # PEFT rounds what it draws to the dtype of the base
            pair = pair[0].to(dtype).to(A.dtype), pair[1].to(dtype).to(B.dtype)
        cut[module_path] = pair
    return cut


def drawn_projections(key: int, rank: int, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """A [rank, in_] and B [out, rank] as PEFT draws them for VeRA: Kaiming-uniform with gain √2,
    from torch's generator with this seed. One dtype, float32, and one device, the CPU, as another
    would draw other numbers."""
    generator = torch.Generator(device="cpu").manual_seed(key)
    A, B = (
        torch.empty(shape, dtype=torch.float32, device="cpu")
        for shape in ((rank, in_), (out, rank))
    )
    for matrix in (A, B):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return A, B


def deviation_reason(kind: str, module: Any) -> str | None:
    """As ``peft_behaviour.deviation_reason``, for these tuners: why PEFT computes something else
    than a change of the weight gives, or why the change is none that a variant has; None if
    neither."""
    if kind in ("conv1d", "conv2d"):  # with the layer's stride, padding, dilation and groups
        if module.groups != 1:
            return (
                f"one product for all {module.groups} groups of a convolution, of which Veneer has"
                " one each"
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
    """A [r, in] and B [out, r] of a plain change in the shapes of LoRA's file: those of the layer,
    where a base tells them."""
    shape_and_dtype = None if weights is None else weights(f"{module_path}.weight")
    shape = () if shape_and_dtype is None else shape_and_dtype[0]
    conv = len(shape) > 2 and math.prod(shape[1:]) == A.shape[1]
    yield A.reshape(-1, *shape[1:]) if conv else A
    yield B.reshape(*B.shape, *[1] * (len(shape) - 2)) if conv else B
