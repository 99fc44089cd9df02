"""Conversion of a folder of PEFT's other tuners (``formats/peft_tuners.py``) into the folder that
Veneer would write.

    plain      LoRA's config and tensors, with the plain change that each of the tuner's changes
               amounts to
    variant    the variant's parameters, and their rank and alpha, by the path of the weight

So tools for low-rank changes (``convert``, ``compose``, ``compare``) read these folders too, and
``veneer.load`` installs the variant, whose training can go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.peft_mapping import config_fields
from veneer.attach import Names
from veneer.bases import own_parameters, storage_of, weight_of
from veneer.config import LoraConfig
from veneer.errors import AdapterError, raise_all, sentence
from veneer.formats import peft, peft_paths, peft_tuners
from veneer.formats.peft_tuners import Tuner, VariantChange, Weights
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS

#: the largest number of values in the factors of a plain change: a file of a few megabytes could
#: otherwise require terabytes
LARGEST = 2**31


@dataclass(frozen=True)
class TunerFolder:
    """The content of a folder of another tuner.

    Fields:
        source: the tuner's own config.
        config, tensors: LoRA's, of the plain changes.
        parameters: those of the variant, by the path of a weight and their name.
        sizes: the rank and alpha of the variant, by the path of a weight.
        needs_base_shapes: only the base tells the shapes of the changes, so that ``tensors`` has
            none of them.
        paths: the modules that change.
        numbers: how many numbers the tuner trained.
    """

    tuner: Tuner
    source: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    sizes: Mapping[str, tuple[int, float]]
    needs_base_shapes: bool
    paths: tuple[str, ...]
    numbers: int

    @property
    def trains_in_full(self) -> bool:
        """Whether the tuner trains its modules in full."""
        return not self.tuner.needs

    def config_of(self, plain: LoraConfig) -> LoraConfig:
        """The config of the variant, from that of the plain changes."""
        lora = peft_tuners.lora_config_of(self.tuner, self.source)
        alpha = 1.0 if self.tuner.type == "VERA" else lora["lora_alpha"]
        return replace(plain, variant=self.tuner.variant, rank=lora["r"], alpha=alpha)


class Unsized(Mapping[str, Any]):
    """Stands for changes of unknown shapes: any access raises an AdapterError with the reason."""

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


def weights_of(names: Names) -> Weights:
    """The shapes of a model's weights by their path, and the dtypes of plain ones."""

    def find_shape(weight_path: str) -> tuple[tuple[int, ...], torch.dtype | None] | None:
        path, _, name = weight_path.rpartition(".")
        module = names.modules.get(names.canonical.get(path, path))
        weight = (
            None
            if module is None or name not in own_parameters(module)
            else weight_of(module, name)
        )
        storage: Any = None if weight is None else storage_of(weight)
        if storage is None:
            return None
        plain = storage.name == "plain" and weight.dtype.is_floating_point
        return tuple(storage.shape(weight)), weight.dtype if plain else None

    return find_shape


@torch.no_grad()
def tuner_folder(
    tuner: Tuner, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Weights | None
) -> TunerFolder:
    """Convert a tuner's files. ``AdapterError``: the tensors are no changes of this tuner, or do
    not fit the base."""
    needs_base_shapes = peft_tuners.needs_base_shapes(tuner, weights)
    changes, rest = peft_tuners.read_changes(tuner, config, tensors, weights)
    lora, plain, problems = peft_tuners.lora_config_of(tuner, config), {}, []
    parameters: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for module_path, change in changes.items():
        low = _plain(tuner, module_path, change, problems)
        if low is None:
            continue
        plain[module_path] = low
        groups, out, in_ = *low.B.shape[:2], low.A.shape[2]
        assert groups == 1
        # PEFT allows a rank above min(out, in)
        rank = min(peft_paths.rank_alpha_scale(lora, module_path)[0], out, in_)
        if tuner.type == "ADALORA":
            rank = min(change.parameters["A"].shape[1], rank)
        sizes[f"{module_path}.weight"] = rank, _alpha(tuner, change.scale, rank)
        parameters |= {
            f"{module_path}.weight.{name}": value for name, value in change.parameters.items()
        }
    raise_all(AdapterError, "These adapter tensors cannot be used", problems)
    plain_tensors = dict(rest)
    for module_path, low in plain.items():
        A, B = peft_tuners.reshape_for_file(module_path, low.A[0], low.B[0], weights)
        plain_tensors |= {
            peft.tensor_key(module_path, "lora_A.weight"): A,
            peft.tensor_key(module_path, "lora_B.weight"): B,
        }
    scales = {module_path: (low.rank, low.scale * low.rank) for module_path, low in plain.items()}
    usual = next(iter(scales.values()), (lora["r"], lora["lora_alpha"]))
    source, config = config, config_fields({**lora, "use_rslora": False}, scales, usual, ())
    tuner_tensors = {
        key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in tuner.suffixes
    }
    paths = {
        peft_paths.strip_wrappers(key.removeprefix(peft.PREFIX).rpartition(".")[0])[0]
        for key in tuner_tensors
    }
    numbers = sum(tensor.numel() for tensor in tuner_tensors.values())
    return TunerFolder(
        tuner,
        source,
        config,
        plain_tensors,
        parameters,
        sizes,
        needs_base_shapes,
        tuple(sorted(paths)),
        numbers,
    )


def _alpha(tuner: Tuner, scale: float, rank: int) -> float:
    """The alpha with which the variant has this scale at this rank."""
    return scale / VARIANTS[tuner.variant].scale(1.0, rank)


def _plain(
    tuner: Tuner, module_path: str, change: VariantChange, problems: list[str]
) -> LowRank | None:
    """The plain change that a variant's change amounts to, of a rank of at most min(out, in); None,
    with a problem added, if it has none."""
    parameters, variant = change.parameters, VARIANTS[tuner.variant]
    if _count(tuner, parameters) > LARGEST:
        sizes = ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in parameters.items())
        expected = f"factors of at most {LARGEST:,} numbers"
        problems.append(
            sentence(
                f"{sizes} at {module_path!r}", expected, "get another copy; its tensors are damaged"
            )
        )
        return None
    try:
        low, _ = variant.resolve(parameters, change.scale, lambda: torch.empty(0))
        dense = low.delta(torch.float64) if low.rank > min(low.B.shape[1], low.A.shape[2]) else None
    except (RuntimeError, IndexError, ValueError) as error:
        sizes = ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in parameters.items())
        problem = f"{sizes} at {module_path!r} ({str(error).splitlines()[0]})"
        problems.append(sentence(problem, f"a change of {tuner.type}", "get both files again"))
        return None
    if dense is None:
        return low
    # ΔW and an identity have fewer values than the factors
    dense, (out, in_) = (
        dense.to(low.A.dtype),
        dense.shape[1:],
    )
    eye = torch.eye(min(out, in_), dtype=dense.dtype)[None]
    return LowRank(eye, dense, 1.0) if in_ <= out else LowRank(dense, eye, 1.0)


def _count(tuner: Tuner, parameters: Mapping[str, Tensor]) -> int:
    """The number of values in the factors of the plain change, from the shapes."""
    shapes = {name: value.shape for name, value in parameters.items()}
    if tuner.type == "LOHA":
        rank = shapes["A1"][1] * shapes["A2"][1]
        return rank * (shapes["A1"][2] + shapes["B1"][1])
    if tuner.type == "LOKR":
        (_, l, m), (_, k, q), n = shapes["C"], shapes["B2"], shapes["A2"][2]  # noqa: E741
        return min(l, m) * q * (l * k + m * n)
    return sum(value.numel() for value in parameters.values())
