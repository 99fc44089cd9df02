"""PEFT's layout: the fields of ``adapter_config.json`` and the keys of
``adapter_model.safetensors``.

    base_model.model.<path>.lora_A.weight                 A of a low-rank change (each kind of layer
                                                          has its suffixes for A and B)
    base_model.model.<path>.lora_B.weight                 B
    base_model.model.<path>.<parameter>                   a parameter that was trained in full
    base_model.model.<path>.base_layer.bias               a trained bias of a layer that also has a
                                                          low-rank change
    base_model.model.<path>.lora_magnitude_vector         another parameter of a variant (DoRA)
    base_model.model.<path>.lora_B.bias                   the bias of ``lora_bias``, which is scaled
                                                          as B is
    base_model.model.<attention>.base_layer.out_proj.…    the out-projection of an adapted attention
    base_model.model.<experts>.base_layer.lora_A.weight   A of the second to last of several adapted
                                                          parameters of one module
    base_model.model.<block>.base_layer.<child>.…         a child of a module with an adapted
                                                          parameter

``base_layer`` is the original module within PEFT's wrapper. The layout is that of PEFT 0.21's
source; the tests compare it with PEFT. ``peft_paths.py`` has the rules for paths and patterns,
``peft_fields.py`` the checks of the config, and ``peft_behaviour.py`` the layers for which PEFT's
result differs from a change of the weight.

If PEFT would load a folder and compute another result, Veneer writes the reason into ``peft_type``:
PEFT fails on an unknown ``peft_type``, and its error shows this value, and so the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from veneer.errors import AdapterError, raise_all, sentence
from veneer.fileio.throttle import throttle
from veneer.formats.peft_paths import (
    attention_of,
    parameter_at,
    rank_alpha_scale,
    strip_wrappers,
)
from veneer.lowrank import LowRank

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
#: the suffix of DoRA's magnitude
MAGNITUDE = "lora_magnitude_vector"
#: the suffix of the bias b of ``lora_bias``: y = op(x; W) + bias + scale · (op(x; B A) + b)
LORA_BIAS = "lora_B.bias"
#: the beginning of a ``peft_type`` that keeps PEFT from loading a folder
NOT_FOR_PEFT = "not for PEFT"
#: the value of ``target_modules`` in a config without low-rank changes; PEFT refuses an empty value
NO_TARGETS = "dummy-target-modules"

#: the largest valid rank; no weight has as many inputs
MAX_RANK = 2**20


@dataclass(frozen=True)
class PeftLayer:
    """One low-rank change, with A and B in the shapes that they have in PEFT's file.

    Fields:
        target_path: the path of the changed module, or of the parameter if the config targets a
            parameter, without the segments ``base_layer`` of PEFT's wrappers.
        suffixes: the suffixes of the keys of A and B.
        rank, alpha, scale: those that the config gives to this change; ΔW = scale · B A.
        extras: the further tensors of a variant, by suffix.
    """

    target_path: str
    A: Tensor
    B: Tensor
    suffixes: tuple[str, str]
    rank: int
    alpha: float
    scale: float
    extras: Mapping[str, Tensor]

    @property
    def is_stacked(self) -> bool:
        """Whether B is [out, r·g], as PEFT stores g experts, rather than [g·out, r]. (g: the groups
        of a convolution or the experts of a stack; r: the rank.)"""
        return self.B.shape[1] != self._factor_rank

    @property
    def _factor_rank(self) -> int:
        """The config's rank, or the first size of A if the config's rank does not divide it."""
        return self.rank if self.A.shape[0] % self.rank == 0 else self.A.shape[0]

    @property
    def dims(self) -> tuple[int, int, int]:
        """(groups, out, in) of the change. ``AdapterError``: the shapes of A and B do not fit the
        rank."""
        product = self.low
        return product.A.shape[0], product.B.shape[1], product.A.shape[2]

    def with_magnitude(self, magnitude: Tensor | None) -> PeftLayer:
        """The layer with DoRA's magnitude, if there is one: [1, out, 1, …] for a convolution, else
        [out]."""
        shape = (1, -1, *[1] * (self.A.dim() - 2)) if self.A.dim() > 2 else (-1,)
        return (
            self
            if magnitude is None
            else replace(self, extras={MAGNITUDE: magnitude.reshape(shape)})
        )

    @property
    def low(self) -> LowRank:
        """The change as a low-rank product. It has one group, except for grouped convolutions and
        stacks of experts. ``AdapterError``: the shapes of A and B do not fit the rank."""
        rank = self._factor_rank
        group_count = self.A.shape[0] // rank
        try:
            A = self.A.reshape(group_count, rank, -1)  # [g·r, in/g, …] -> [g, r, in]
            # B: [g·out, r, …], or [out, r·g]
            B = (
                self.B.reshape(-1, rank, group_count).permute(2, 0, 1)
                if self.is_stacked
                else self.B.reshape(group_count, -1, rank)
            )
        except RuntimeError as error:
            raise AdapterError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} at {self.target_path!r}",
                f"a product of rank {self.rank}",
                "get the file again",
            ) from error
        return LowRank(A, B, self.scale)

    def with_low_rank(self, product: LowRank) -> PeftLayer:
        """A plain LoRA layer with the ΔW of ``product``: A and B in the layout of this layer, alpha
        = ``product.scale`` · rank, and no ``extras``."""
        group_count, rank, _ = product.A.shape
        A = product.A.reshape(group_count * rank, *self.A.shape[1:])
        if self.is_stacked:
            B = product.B.permute(1, 2, 0).reshape(product.B.shape[1], rank * group_count)
        else:
            B = product.B.reshape(group_count * product.B.shape[1], rank, *self.B.shape[2:])
        return replace(
            self, A=A, B=B, rank=rank, alpha=product.scale * rank, scale=product.scale, extras={}
        )


def not_for_peft(config: Mapping[str, Any]) -> str | None:
    """The reason, stored in ``peft_type``, why PEFT would compute another result with the adapter;
    None if PEFT may load the adapter."""
    peft_type = str(config.get("peft_type"))
    return (
        peft_type.removeprefix(NOT_FOR_PEFT).strip(": ")
        if peft_type.startswith(NOT_FOR_PEFT)
        else None
    )


def may_be_transposed(config: Mapping[str, Any]) -> bool:
    """Whether a folder may have changes of [in, out] weights. ``fan_in_fan_out`` is one flag for
    all layers. PEFT requires it to be False in a folder that changes parameters
    (``target_parameters``), so there it does not tell (``adapter_files/peft_mapping.py``)."""
    return bool(config.get("fan_in_fan_out") or config.get("target_parameters"))


def tensor_key(path: str, suffix: str) -> str:
    """The key of a tensor in PEFT's file."""
    return f"{PREFIX}{path}.{suffix}" if path else f"{PREFIX}{suffix}"


def split_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    suffix_pairs: Iterable[tuple[str, str]],
    extra_suffixes: Iterable[str] = (),
    by_veneer: bool = False,
) -> tuple[dict[str, PeftLayer], dict[str, dict[str, Tensor]]]:
    """Split the tensors of a file into (low-rank changes by path in the file, parameters that are
    trained in full by path in the file and then by name).

    Args:
        suffix_pairs: (suffix of A, suffix of B) for each kind of layer.
        extra_suffixes: the suffixes of further parameters of variants.
        by_veneer: whether Veneer wrote the config, which then has full paths.

    Raises:
        AdapterError: a key is unknown, an A has no B, or a rank differs from the config's.
    """
    roles: dict[str, Any] = {
        suffix: (pair, "AB"[index]) for pair in suffix_pairs for index, suffix in enumerate(pair)
    }
    roles |= {suffix: (None, suffix) for suffix in extra_suffixes}
    entries: dict[str, dict[str, Any]] = {}
    full_parameters: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in throttle(tensors.items()):
        bare_key = key.removeprefix(PREFIX)
        suffix = next((end for end in roles if f".{bare_key}".endswith(f".{end}")), None)
        is_unknown = suffix is None and any(
            segment.startswith("lora_") for segment in bare_key.split(".")[-2:]
        )
        if not key.startswith(PREFIX) or is_unknown:
            expected = f"keys {PREFIX}<path>.lora_A.weight and the like"
            problems.append(sentence(f"tensor {key!r}", expected, "convert it first"))
        elif suffix is not None:
            pair, role = roles[suffix]
            path = bare_key[: -len(suffix)].rstrip(".")
            entry = entries.setdefault(path, {"suffixes": None})
            entry[role] = tensor
            entry["suffixes"] = pair or entry["suffixes"]
        else:
            path, _, parameter = bare_key.rpartition(".")
            # with bias="all", PEFT also saves the base's values of replaced modules, and trained
            # biases in modules_to_save twice: below a container, one key has the adapter's name
            repeated_key = re.sub(r"\.modules_to_save\.[^.]+(?=\.)", "", key)
            if ".original_module" in path or (repeated_key != key and repeated_key in tensors):
                continue
            path = re.sub(r"\.modules_to_save(\.default)?(?=\.|$)", "", path)
            path = re.sub(r"((^|\.)base_layer)+$", "", path)
            full_parameters.setdefault(path, {})[parameter] = tensor
    layers = {
        path: _build_layer(path, entry, config, by_veneer, problems)
        for path, entry in entries.items()
    }
    raise_all(AdapterError, "These adapter tensors cannot be used", problems)
    return {path: layer for path, layer in layers.items() if layer is not None}, full_parameters


def _build_layer(
    path: str,
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    by_veneer: bool,
    problems: list[str],
) -> PeftLayer | None:
    """The change at one path of the file. If A or B is missing or has fewer than two axes, adds a
    problem and returns None. ``entry``: the "suffixes" of A and B, and the tensors by "A", "B" or a
    variant's suffix."""
    A, B = entry.get("A"), entry.get("B")
    parameter_path = parameter_at(config, path, by_veneer)
    if A is None or B is None:
        problems.append(
            sentence(f"half a pair at {path!r}", "both A and B", "get the whole file again")
        )
        return None
    if A.dim() < 2 or B.dim() < 2:
        problem = f"A {tuple(A.shape)} and B {tuple(B.shape)} at {path!r}"
        problems.append(sentence(problem, "matrices", "get the whole file again"))
        return None
    extras = {
        suffix: tensor for suffix, tensor in entry.items() if suffix not in ("A", "B", "suffixes")
    }
    module_path = strip_wrappers(attention_of(path) or path)[0]
    rank, alpha, scale = rank_alpha_scale(config, *parameter_path, module_path)
    target_path = parameter_path[0] if parameter_path else strip_wrappers(path)[0]
    # check the rank of modules only: B of a parameter is [out, rank · number of its matrices], and
    # only a model tells this number
    if not parameter_path and B.shape[1] % rank:
        problem = f"rank {B.shape[1]} at {path!r} (A {tuple(A.shape)}, B {tuple(B.shape)})"
        advice = (
            "get both files again (what PEFT writes for a grouped convolution is no change of its"
            " weight)"
        )
        problems.append(sentence(problem, f"{rank}, as {CONFIG} says", advice))
    return PeftLayer(target_path, A, B, entry["suffixes"], rank, alpha, scale, extras)


def targets_parameter(path: str, layer: PeftLayer) -> bool:
    """Whether the config names the target of a change as a parameter, not as a module. ``path``:
    the path of the change in the file."""
    return layer.target_path != strip_wrappers(path)[0]


def pattern_of(path: str, layer: PeftLayer) -> str:
    """The path by which ``rank_pattern`` and ``alpha_pattern`` give the rank and alpha of the
    change at ``path`` in the file."""
    return (
        layer.target_path
        if targets_parameter(path, layer)
        else strip_wrappers(attention_of(path) or path)[0]
    )
