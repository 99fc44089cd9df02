"""The rules of vLLM's loader, applied to the config and the tensors of an adapter folder. Each rule
comes from a file of vLLM:

    adapter_config.json    vllm/lora/peft_helper.py: PEFTHelper, its fields and ``validate_legal``
    the tensors' names     vllm/lora/utils.py: ``parse_fine_tuned_lora_name``
    the adapted modules    vllm/lora/lora_model.py: ``check_unexpected_modules``, by the last
                           name in a path

Only vLLM knows which modules of a model it can adapt: it wraps linear layers, and embeddings of the
models that list them. This file finds the adapters that vLLM cannot load for any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.errors import listing
from veneer.formats import peft, peft_paths, peft_targets

__all__ = ["problems"]

#: the valid values of vLLM's setting ``max_lora_rank``
VALID_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: matches the name of a tensor: an optional prefix, a module path, then a suffix for A or B
_FACTOR_NAME = re.compile(
    r"^(?:base_model\.model\.)?(.*?)\.?"
    r"(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding_factor>[AB]))$"
)


def parse_tensor_name(name: str) -> tuple[str, str] | None:
    """(module path, "lora_a" or "lora_b") of a tensor's name, as vLLM reads it; None if vLLM
    refuses the name."""
    match = _FACTOR_NAME.match(name)
    if match is None or not match[1]:
        return None
    return match[1], f"lora_{(match['factor'] or match['embedding_factor']).lower()}"


def problems(
    config: Mapping[str, Any],
    names: Iterable[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    max_rank: int | None = None,
) -> list[str]:
    """The reasons why vLLM cannot load an adapter, or would compute another result with it.

    Args:
        config: the fields of ``adapter_config.json``.
        names: the names of the tensors in ``adapter_model.safetensors``.
        shapes: the shapes of the tensors by name, which show whether a layer is a convolution; if
            None, convolutions are not found.
        max_rank: the server's ``max_lora_rank``; None means the largest value that vLLM accepts.
    """
    names, rank = list(names), largest_rank(config)
    rank_limit = VALID_MAX_RANKS[-1] if max_rank is None else max_rank
    saved_modules, bias = config.get("modules_to_save"), config.get("bias") or "none"
    is_dora = config.get("use_dora") or any(
        name.rpartition(".")[2] == peft.MAGNITUDE for name in names
    )
    ignored_modules = _ignored_modules(config, names)
    conv_names = {
        name.removeprefix(peft.PREFIX) for name, shape in (shapes or {}).items() if len(shape) > 2
    }
    checks = [
        (config.get("peft_type") != "LORA", f"its peft_type is {config.get('peft_type')!r}"),
        (not isinstance(config.get("target_modules"), list | str), "it names no target modules"),
        (rank > rank_limit, f"its rank is {rank}, above max_lora_rank {rank_limit}"),
        (is_dora, "it is a DoRA"),
        (config.get("alora_invocation_tokens"), "it acts from its invocation tokens on"),
        (saved_modules, f"it trains modules in full ({listing(saved_modules or (), 3)})"),
        (bias != "none", f"it trains biases (bias={bias!r})"),
        *((True, reason) for reason in (*_scale_problems(config, names), *_name_problems(names))),
        (
            ignored_modules,
            f"its config leaves out {listing(ignored_modules, 2)}, of which vLLM applies the"
            " tensors",
        ),
        (conv_names, f"it changes convolutions ({listing(sorted(conv_names), 2)})"),
    ]
    return [reason for is_problem, reason in checks if is_problem]


def largest_rank(config: Mapping[str, Any]) -> int:
    """The ``max_lora_rank`` that a server needs for an adapter: the largest rank of its layers."""
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])


def _ignored_modules(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The modules that the config does not match although the file has tensors for them. PEFT
    ignores these tensors, but vLLM applies them."""
    suffixes = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    if config.get("peft_type") != "LORA":
        return []
    return sorted(peft_targets.ignored_tensors(config, dict.fromkeys(names), suffixes))


def _scale_problems(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """One problem if layers have another scale than that of r and lora_alpha, else an empty list.
    Releases of vLLM that do not read rank_pattern and alpha_pattern use the scale of r and
    lora_alpha in every layer."""
    if not (config.get("rank_pattern") or config.get("alpha_pattern")) or not config.get("r"):
        return []
    scale = peft_paths.rank_alpha_scale(config)[2]  # without a path, no pattern applies
    paths = {
        parsed_name[0] for parsed_name in map(parse_tensor_name, names) if parsed_name is not None
    }
    deviating_paths = sorted(
        path
        for path in paths
        if abs(peft_paths.rank_alpha_scale(config, path)[2] - scale) > 1e-6 * abs(scale)
    )
    reason = (
        f"layers have scales of their own ({listing(deviating_paths, 2)}), which releases of vLLM"
        " have ignored"
    )
    return [reason] if deviating_paths else []


def _name_problems(names: Iterable[str]) -> list[str]:
    """One text if vLLM refuses the names of some tensors, and one if the adapter changes modules
    within a wrapper of PEFT (``base_layer``)."""
    reasons = []
    # vLLM ignores the base's own embeddings, which PEFT may also write
    frozen_embedding = re.compile(r"\.(embed_tokens|lm_head)\.base_layer\.weight$")
    parsed_names = {
        name: parse_tensor_name(name) for name in names if not frozen_embedding.search(name)
    }
    refused_names = [
        name.removeprefix(peft.PREFIX)
        for name, parsed_name in parsed_names.items()
        if parsed_name is None
    ]
    if refused_names := [name for name in refused_names if not name.endswith(peft.MAGNITUDE)]:
        reasons.append(f"it holds tensors besides the factors ({listing(refused_names, 3)})")
    modules = {parsed_name[0] for parsed_name in parsed_names.values() if parsed_name is not None}
    wrapped_modules = sorted(
        module_path
        for module_path in modules
        if "base_layer" in module_path.split(".")
        and not module_path.endswith(".experts.base_layer")
    )
    if wrapped_modules:
        reasons.append(f"it changes what stands below a wrapper ({listing(wrapped_modules, 2)})")
    return reasons
