"""Convert the content of an adapter folder of another PEFT tuner than LoRA, such as LoHa
(``formats/peft_tuners.py``), into two descriptions of the adapter, as in a folder of Veneer:

    plain      LoRA's config and tensors, with the low-rank product to which each change is equal
    variant    the parameters of the variant of Veneer that has the tuner's form of ΔW, with their
               rank and alpha, by path of the weight

Tools for low-rank changes (``convert``, ``compose``, ``compare``) read the plain description.
``veneer.load`` installs the variant, whose training can continue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.peft_mapping import config_fields
from veneer.attach import ModelIndex
from veneer.bases import own_parameters, storage_of, weight_of
from veneer.config import LoraConfig
from veneer.errors import AdapterError, first_line, raise_all, sentence
from veneer.formats import peft, peft_paths, peft_tuners
from veneer.formats.peft_tuners import Tuner, VariantChange, WeightLookup
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS

#: the largest permitted number of values in A and B of a plain change. Without a limit, a file of a
#: few megabytes could require terabytes: the rank of LoHa's plain change is a product of two ranks
MAX_VALUES = 2**31


@dataclass(frozen=True)
class TunerFolder:
    """The content of a folder of a PEFT tuner such as LoHa, as the file has it and converted.

    Fields:
        tuner: what is known of the tuner (``formats/peft_tuners.py``).
        source: the config in the tuner's fields.
        config, tensors: the config in LoRA's fields and LoRA's tensors, for the plain changes.
        parameters: the variant's parameters, by the path of a weight and the parameter's name.
        ranks_and_alphas: (rank, alpha) of the variant, by the path of a weight.
        needs_base_shapes: whether the shapes of the changes are unknown, because they follow from a
            base that was not given. ``tensors`` then has no changes.
        paths: the paths of the changed modules.
        value_count: the number of values in the tuner's own tensors of the file.
    """

    tuner: Tuner
    source: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    ranks_and_alphas: Mapping[str, tuple[int, float]]
    needs_base_shapes: bool
    paths: tuple[str, ...]
    value_count: int

    @property
    def trains_in_full(self) -> bool:
        """Whether the tuner trains modules in full, as LN tuning does, rather than changes made of
        factors."""
        return not self.tuner.required_suffixes

    def variant_config(self, plain_config: LoraConfig) -> LoraConfig:
        """The config of Veneer's variant for this tuner: ``plain_config``, the config of the
        equivalent plain LoRA, with the variant's name, rank and alpha."""
        lora_config = peft_tuners.lora_config_of(self.tuner, self.source)
        alpha = 1.0 if self.tuner.type == "VERA" else lora_config["lora_alpha"]
        return replace(plain_config, variant=self.tuner.variant, rank=lora_config["r"], alpha=alpha)


class UnknownShapes(Mapping[str, Any]):
    """Takes the place of the mapping of low-rank changes if only the base tells their shapes. Any
    access raises an AdapterError that asks for the base."""

    def __init__(self, folder: TunerFolder, path: Any) -> None:
        self.folder, self.path = folder, path

    def _error(self) -> AdapterError:
        problem = (
            f"{self.path} of PEFT's {self.folder.tuner.type}, which does not tell how many inputs"
            " each layer has"
        )
        return AdapterError(
            problem, "the base beside it", "load it on its base, or convert it with the base first"
        )

    def __getitem__(self, key: str) -> Any:
        raise self._error()

    def __iter__(self) -> Iterator[str]:
        raise self._error()

    def __len__(self) -> int:
        raise self._error()


def weight_lookup_of(model_index: ModelIndex) -> WeightLookup:
    """A function that returns (shape, dtype) of a model's weight by its path. The dtype is None for
    a packed weight. The function returns None if the model has no such weight."""

    def shape_and_dtype(weight_path: str) -> tuple[tuple[int, ...], torch.dtype | None] | None:
        module_path, _, parameter_name = weight_path.rpartition(".")
        module = model_index.modules.get(model_index.canonical.get(module_path, module_path))
        weight = (
            None
            if module is None or parameter_name not in own_parameters(module)
            else weight_of(module, parameter_name)
        )
        storage: Any = None if weight is None else storage_of(weight)
        if storage is None:
            return None
        is_plain = storage.name == "plain" and weight.dtype.is_floating_point
        return tuple(storage.shape(weight)), weight.dtype if is_plain else None

    return shape_and_dtype


@torch.no_grad()
def convert_tuner_files(
    tuner: Tuner,
    tuner_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weight_lookup: WeightLookup | None,
) -> TunerFolder:
    """Convert the config and the tensors in a folder of a PEFT tuner such as LoHa.

    Args:
        tensors: the tensors of adapter_model.safetensors, by key.
        weight_lookup: a function that returns the shape and dtype of a base's weight by its path.
            None if there is no base; the shapes of VeRA's changes are then unknown.

    Raises:
        AdapterError: the tensors are no changes of this tuner, or do not fit the base.
    """
    changes, other_tensors = peft_tuners.read_changes(tuner, tuner_config, tensors, weight_lookup)
    lora_config, products, problems = peft_tuners.lora_config_of(tuner, tuner_config), {}, []
    parameters: dict[str, Tensor] = {}
    ranks_and_alphas: dict[str, tuple[int, float]] = {}
    for module_path, change in changes.items():
        product = _plain_product(tuner, module_path, change, problems)
        if product is None:
            continue
        products[module_path] = product
        # PEFT allows a rank above min(out, in); it is lowered here
        out, in_ = product.B.shape[1], product.A.shape[2]
        rank = min(peft_paths.rank_alpha_scale(lora_config, module_path)[0], out, in_)
        if tuner.type == "ADALORA":
            rank = min(change.parameters["A"].shape[1], rank)
        # the alpha from which the variant computes the change's scale at this rank
        alpha = change.scale / VARIANTS[tuner.variant].scale(1.0, rank)
        ranks_and_alphas[f"{module_path}.weight"] = rank, alpha
        parameters |= {
            f"{module_path}.weight.{name}": parameter
            for name, parameter in change.parameters.items()
        }
    raise_all(AdapterError, "These adapter tensors cannot be used", problems)
    plain_tensors = dict(other_tensors)
    for module_path, product in products.items():
        A, B = peft_tuners.reshape_for_file(module_path, product.A[0], product.B[0], weight_lookup)
        plain_tensors |= {
            peft.tensor_key(module_path, "lora_A.weight"): A,
            peft.tensor_key(module_path, "lora_B.weight"): B,
        }
    plain_ranks_and_alphas = {
        module_path: (product.rank, product.scale * product.rank)
        for module_path, product in products.items()
    }
    config_pair = lora_config["r"], lora_config["lora_alpha"]
    default_pair = next(iter(plain_ranks_and_alphas.values()), config_pair)
    plain_config = {**lora_config, "use_rslora": False}
    plain_config = config_fields(plain_config, plain_ranks_and_alphas, default_pair, ())
    tuner_tensors = {
        key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in tuner.suffixes
    }
    return TunerFolder(
        tuner=tuner,
        source=tuner_config,
        config=plain_config,
        tensors=plain_tensors,
        parameters=parameters,
        ranks_and_alphas=ranks_and_alphas,
        # VeRA's files hold no shapes of the changes, which follow from a base
        needs_base_shapes=tuner.type == "VERA" and weight_lookup is None,
        paths=_module_paths(tuner_tensors),
        value_count=sum(tensor.numel() for tensor in tuner_tensors.values()),
    )


def _module_paths(keys: Iterable[str]) -> tuple[str, ...]:
    """The paths of the modules that the tensors with these keys belong to, in sorted order."""
    paths_in_file = (key.removeprefix(peft.PREFIX).rpartition(".")[0] for key in keys)
    return tuple(sorted({peft_paths.strip_wrappers(path)[0] for path in paths_in_file}))


def _plain_product(
    tuner: Tuner, module_path: str, change: VariantChange, problems: list[str]
) -> LowRank | None:
    """The low-rank product to which the change of the module at ``module_path`` is equal, with a
    rank of at most min(out, in). If it cannot be computed or is too large, None, and an error text
    is added to ``problems``."""
    parameters, variant = change.parameters, VARIANTS[tuner.variant]
    if _count_values(tuner, parameters) > MAX_VALUES:
        shapes_text = _format_shapes(parameters)
        expected = f"factors of at most {MAX_VALUES:,} numbers"
        problems.append(
            sentence(
                f"{shapes_text} at {module_path!r}",
                expected,
                "get another copy; its tensors are damaged",
            )
        )
        return None
    try:
        product, _ = variant.resolve(parameters, change.scale, lambda: torch.empty(0))
        max_rank = min(product.B.shape[1], product.A.shape[2])
        dense = product.delta(torch.float64) if product.rank > max_rank else None
    except (RuntimeError, IndexError, ValueError) as error:
        shapes_text = _format_shapes(parameters)
        problem = f"{shapes_text} at {module_path!r} ({first_line(error)})"
        problems.append(sentence(problem, f"a change of {tuner.type}", "get both files again"))
        return None
    if dense is None:
        return product
    # the rank exceeds min(out, in): factor ΔW into itself and an identity, which takes less memory
    dense = dense.to(product.A.dtype)
    out, in_ = dense.shape[1:]
    eye = torch.eye(min(out, in_), dtype=dense.dtype)[None]
    return LowRank(eye, dense, 1.0) if in_ <= out else LowRank(dense, eye, 1.0)


def _format_shapes(parameters: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{name} {tuple(parameter.shape[1:])}" for name, parameter in parameters.items()
    )


def _count_values(tuner: Tuner, parameters: Mapping[str, Tensor]) -> int:
    """The number of values that A and B of the equivalent plain LoRA have, computed from shapes
    alone, so that too large ones are never made. ``parameters``: those of the variant, each with a
    first axis of size 1."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if tuner.type == "LOHA":
        rank = shapes["A1"][1] * shapes["A2"][1]
        return rank * (shapes["A1"][2] + shapes["B1"][1])
    if tuner.type == "LOKR":
        (_, l, m), (_, k, q), n = shapes["C"], shapes["B2"], shapes["A2"][2]  # noqa: E741
        return min(l, m) * q * (l * k + m * n)
    return sum(parameter.numel() for parameter in parameters.values())
