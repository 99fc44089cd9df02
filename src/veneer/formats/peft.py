"""PEFT's layout: the fields of ``adapter_config.json`` and the keys of
``adapter_model.safetensors``.

    base_model.model.<path>.lora_A.weight                 A of a low-rank change (suffixes by the
                                                          kind of the layer)
    base_model.model.<path>.lora_B.weight                 B
    base_model.model.<path>.<parameter>                   a parameter that was trained in full
    base_model.model.<path>.base_layer.bias               a trained bias of a layer that also has a
                                                          low-rank change
    base_model.model.<path>.lora_magnitude_vector         a further parameter of a variant
    base_model.model.<path>.lora_B.bias                   the bias of lora_bias, which is scaled
                                                          like B
    base_model.model.<attention>.base_layer.out_proj.…    the out-projection below an adapted
                                                          attention
    base_model.model.<experts>.base_layer.lora_A.weight   the last but one of several adapted
                                                          parameters of one module
    base_model.model.<block>.base_layer.<child>.…         a child of a module with an adapted
                                                          parameter

Read from PEFT 0.21's source and checked against it in the tests. ``peft_paths.py`` has the rules
for paths and patterns, ``peft_fields.py`` the checks of the config, ``peft_behaviour.py`` the
layers for which PEFT's result differs.

If PEFT would load a folder and compute another result, ``peft_type`` holds the reason: PEFT fails
on an unknown type, and its error shows the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from veneer.errors import AdapterError, raise_all, sentence
from veneer.fileio.throttle import throttle
from veneer.formats.peft_paths import attention_of, parameter_at, strength, strip_wrappers
from veneer.lowrank import LowRank

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
#: the suffix of DoRA's magnitude
MAGNITUDE = "lora_magnitude_vector"
#: the suffix of ``lora_bias``'s bias b beside B: y = op(x; W) + bias + scale · (op(x; B A) + b)
LORA_BIAS = "lora_B.bias"
NOT_FOR_PEFT = "not for PEFT"
#: ``target_modules`` of a config without low-rank changes, which PEFT would otherwise refuse
NO_TARGETS = "dummy-target-modules"

#: the largest valid rank; no weight has as many inputs
MAX_RANK = 2**20


@dataclass(frozen=True)
class PeftLayer:
    """One low-rank change in the layout of the file. ``target_path``: the path of its module, or of
    the parameter if the config targets one, without PEFT's wrappers. ``extras``: further tensors of
    a variant, by suffix."""

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
        """Whether the groups of B are along its last axis, [out, r·g], as PEFT stacks experts; else
        along its first axis."""
        return self.B.shape[1] != self._rank

    @property
    def _rank(self) -> int:
        return self.rank if self.A.shape[0] % self.rank == 0 else self.A.shape[0]

    @property
    def dims(self) -> tuple[int, int, int]:
        """(groups, out, in) of the change. Raises AdapterError as ``low`` does."""
        low = self.low
        return low.A.shape[0], low.B.shape[1], low.A.shape[2]

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
        """The change as a low-rank product, with one group except for grouped convolutions and
        stacks. ``AdapterError``: A and B are no product of this rank."""
        rank = self._rank
        groups = self.A.shape[0] // rank
        try:
            A = self.A.reshape(groups, rank, -1)  # [g·r, in/g, …] -> [g, r, in]
            # B: [g·out, r, …], or [out, r·g]
            B = (
                self.B.reshape(-1, rank, groups).permute(2, 0, 1)
                if self.is_stacked
                else self.B.reshape(groups, -1, rank)
            )
        except RuntimeError as error:
            problem = f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} at {self.target_path!r}"
            raise AdapterError(
                problem, f"a product of rank {self.rank}", "get the file again"
            ) from error
        return LowRank(A, B, self.scale)

    def with_low(self, low: LowRank) -> PeftLayer:
        """The layer with another product in the same layout, and with plain LoRA's alpha:
        ``low.scale · rank``."""
        groups, rank, _ = low.A.shape
        A = low.A.reshape(groups * rank, *self.A.shape[1:])
        if self.is_stacked:
            B = low.B.permute(1, 2, 0).reshape(low.B.shape[1], rank * groups)
        else:
            B = low.B.reshape(groups * low.B.shape[1], rank, *self.B.shape[2:])
        return replace(
            self, A=A, B=B, rank=rank, alpha=low.scale * rank, scale=low.scale, extras={}
        )


def not_for_peft(config: Mapping[str, Any]) -> str | None:
    """The reason in ``peft_type`` why PEFT would compute another result with this adapter; None if
    there is none."""
    type_ = str(config.get("peft_type"))
    return type_.removeprefix(NOT_FOR_PEFT).strip(": ") if type_.startswith(NOT_FOR_PEFT) else None


def key(path: str, suffix: str) -> str:
    return f"{PREFIX}{path}.{suffix}" if path else f"{PREFIX}{suffix}"


def split(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    suffixes: Iterable[tuple[str, str]],
    extras: Iterable[str] = (),
    by_veneer: bool = False,
) -> tuple[dict[str, PeftLayer], dict[str, dict[str, Tensor]]]:
    """The file's tensors as (low-rank changes by path, fully trained parameters by path and name).

    Args:
        suffixes: the (A, B) suffixes of the kinds of layers.
        extras: the suffixes of further parameters of variants.
        by_veneer: Veneer wrote the config, with full paths.

    Raises:
        AdapterError: an unknown key, an A without a B, a rank that the config contradicts.
    """
    parts_by_suffix: dict[str, Any] = {
        suffix: (pair, "AB"[side]) for pair in suffixes for side, suffix in enumerate(pair)
    }
    parts_by_suffix |= {suffix: (None, suffix) for suffix in extras}
    pairs: dict[str, dict[str, Any]] = {}
    full: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, tensor in throttle(tensors.items()):
        bare = name.removeprefix(PREFIX)
        suffix = next(
            (suffix for suffix in parts_by_suffix if bare == suffix or bare.endswith(f".{suffix}")),
            None,
        )
        unknown = suffix is None and any(
            segment.startswith("lora_") for segment in bare.split(".")[-2:]
        )
        if not name.startswith(PREFIX) or unknown:
            keys = f"keys {PREFIX}<path>.lora_A.weight and the like"
            problems.append(sentence(f"tensor {name!r}", keys, "convert it first"))
        elif suffix is not None:
            pair, side = parts_by_suffix[suffix]
            entry = pairs.setdefault(bare[: -len(suffix)].rstrip("."), {"suffixes": None})
            entry[side] = tensor
            entry["suffixes"] = pair or entry["suffixes"]
        else:
            path, _, parameter = bare.rpartition(".")
            # PEFT's bias="all" also saves the base's values
            if ".original_module" in path:
                continue
            # with modules_to_save, PEFT saves trained biases a second time under the adapter's name
            path = re.sub(r"\.modules_to_save(\.default)?(?=\.|$)", "", path)
            path = re.sub(r"((^|\.)base_layer)+$", "", path)
            full.setdefault(path, {})[parameter] = tensor
    low = {path: _layer(path, entry, config, by_veneer, problems) for path, entry in pairs.items()}
    raise_all(AdapterError, "These adapter tensors cannot be used", problems)
    return {path: layer for path, layer in low.items() if layer is not None}, full


def _layer(
    path: str,
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    by_veneer: bool,
    problems: list[str],
) -> PeftLayer | None:
    """The change at one path of the file; None, with a problem added, if its tensors are no pair.
    ``entry``: its ``suffixes``, and its tensors by "A", "B" or a variant's suffix."""
    A, B, named = entry.get("A"), entry.get("B"), parameter_at(config, path, by_veneer)
    if A is None or B is None:
        problems.append(
            sentence(f"half a pair at {path!r}", "both A and B", "get the whole file again")
        )
        return None
    if A.dim() < 2 or B.dim() < 2:
        problem = f"A {tuple(A.shape)} and B {tuple(B.shape)} at {path!r}"
        problems.append(sentence(problem, "matrices", "get the whole file again"))
        return None
    more = {
        suffix: tensor for suffix, tensor in entry.items() if suffix not in ("A", "B", "suffixes")
    }
    rank, alpha, scale = strength(config, *named, strip_wrappers(attention_of(path) or path)[0])
    target_path = named[0] if named else strip_wrappers(path)[0]
    # the number of matrices in a parameter is known only from a model
    if not named and B.shape[1] % rank:
        problem = f"rank {B.shape[1]} at {path!r} (A {tuple(A.shape)}, B {tuple(B.shape)})"
        do = (
            "get both files again (what PEFT writes for a grouped convolution is no change of its"
            " weight)"
        )
        problems.append(sentence(problem, f"{rank}, as {CONFIG} says", do))
    return PeftLayer(target_path, A, B, entry["suffixes"], rank, alpha, scale, more)


def of_parameter(path: str, layer: PeftLayer) -> bool:
    """Whether the config targets the entry at ``path`` as a parameter rather than as a module."""
    return layer.target_path != strip_wrappers(path)[0]


def pattern_of(path: str, layer: PeftLayer) -> str:
    """The path of the entry at ``path`` in ``rank_pattern`` and ``alpha_pattern``."""
    return (
        layer.target_path
        if of_parameter(path, layer)
        else strip_wrappers(attention_of(path) or path)[0]
    )
