"""The rules of vLLM's loader, applied to the two files of an adapter.

    adapter_config.json    vllm/lora/peft_helper.py: PEFTHelper, its fields and ``validate_legal``
    the tensors' names     vllm/lora/utils.py: ``parse_fine_tuned_lora_name``
    the adapted modules    vllm/lora/lora_model.py: ``check_unexpected_modules``, by the last part
                           of a path

Which modules of a model vLLM can adapt is known to vLLM only: it wraps linear layers, and
embeddings of the models that list them. This file detects adapters that vLLM cannot load for any
model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.errors import listing
from veneer.formats import peft, peft_paths, peft_targets

__all__ = ["problems"]

#: the default of vLLM's ``max_lora_rank``, and its valid values
MAX_RANK = 16
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SIDES = re.compile(
    r"^(?:base_model\.model\.)?(.*?)\.?"
    r"(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<emb>[AB]))$"
)


def parse(name: str) -> tuple[str, str] | None:
    """(module, "lora_a" or "lora_b") of a tensor's name, as vLLM reads it; None for a name that it
    refuses."""
    match = _SIDES.match(name)
    if match is None or not match[1]:
        return None
    return match[1], f"lora_{(match['side'] or match['emb']).lower()}"


def problems(
    config: Mapping[str, Any],
    names: Iterable[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    max_rank: int | None = None,
) -> list[str]:
    """Why vLLM cannot load an adapter, or would compute another result with it; empty if it can.

    Args:
        config: ``adapter_config.json``.
        names: the names in ``adapter_model.safetensors``.
        shapes: the shapes of the tensors, which reveal convolutions.
        max_rank: ``max_lora_rank`` of the server; None allows up to the largest value that vLLM
            accepts.
    """
    names, (rank, limit) = (
        list(names),
        (largest_rank(config), RANKS[-1] if max_rank is None else max_rank),
    )
    saved, bias = config.get("modules_to_save"), config.get("bias") or "none"
    dora = config.get("use_dora") or any(
        name.rpartition(".")[2] == peft.MAGNITUDE for name in names
    )
    left_out = _left_out(config, names)
    deep = {
        name.removeprefix(peft.PREFIX) for name, shape in (shapes or {}).items() if len(shape) > 2
    }
    checks = [
        (config.get("peft_type") != "LORA", f"its peft_type is {config.get('peft_type')!r}"),
        (not isinstance(config.get("target_modules"), list | str), "it names no target modules"),
        (rank > limit, f"its rank is {rank}, above max_lora_rank {limit}"),
        (dora, "it is a DoRA"),
        (config.get("alora_invocation_tokens"), "it acts from its invocation tokens on"),
        (saved, f"it trains modules in full ({listing(saved or (), 3)})"),
        (bias != "none", f"it trains biases (bias={bias!r})"),
        *((True, reason) for reason in (*_scales(config, names), *_names(names))),
        (
            left_out,
            f"its config leaves out {listing(left_out, 2)}, of which vLLM applies the tensors",
        ),
        (deep, f"it changes convolutions ({listing(sorted(deep), 2)})"),
    ]
    return [reason for wrong, reason in checks if wrong]


def largest_rank(config: Mapping[str, Any]) -> int:
    """The ``max_lora_rank`` that a server needs: the largest rank of a layer."""
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])


def _left_out(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The modules with tensors that the config does not match."""
    ends = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    lora = config.get("peft_type") == "LORA"
    return sorted(peft_targets.left_out(config, dict.fromkeys(names), ends)) if lora else []


def _scales(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Problems of layers with different scales: releases that do not read rank_pattern and
    alpha_pattern give every layer the scale of r and lora_alpha."""
    if not (config.get("rank_pattern") or config.get("alpha_pattern")) or not config.get("r"):
        return []
    scale = peft_paths.strength(config)[2]  # without a path, no pattern applies
    paths = {parsed[0] for parsed in map(parse, names) if parsed is not None}
    deviating = sorted(
        path
        for path in paths
        if abs(peft_paths.strength(config, path)[2] - scale) > 1e-6 * abs(scale)
    )
    text = (
        f"layers have scales of their own ({listing(deviating, 2)}), which releases of vLLM have"
        " ignored"
    )
    return [text] if deviating else []


def _names(names: Iterable[str]) -> list[str]:
    """Problems of names that vLLM refuses, and of changes of modules that it cannot adapt."""
    reasons = []
    # vLLM ignores the base's own embeddings, which PEFT may also write
    frozen_embedding = re.compile(r"\.(embed_tokens|lm_head)\.base_layer\.weight$")
    parsed = {name: parse(name) for name in names if not frozen_embedding.search(name)}
    unknown = [
        name.removeprefix(peft.PREFIX)
        for name, parts_of_name in parsed.items()
        if parts_of_name is None
    ]
    if unknown := [name for name in unknown if not name.endswith(peft.MAGNITUDE)]:
        reasons.append(f"it holds tensors besides the factors ({listing(unknown, 3)})")
    modules = {parts_of_name[0] for parts_of_name in parsed.values() if parts_of_name is not None}
    wrapped = sorted(
        module_path
        for module_path in modules
        if "base_layer" in module_path.split(".")
        and not module_path.endswith(".experts.base_layer")
    )
    if wrapped:
        reasons.append(f"it changes what stands below a wrapper ({listing(wrapped, 2)})")
    return reasons
