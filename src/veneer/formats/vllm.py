"""What vLLM can load: the published rules of its loader, applied to the two files of an adapter.

    adapter_config.json    vllm/lora/peft_helper.py: PEFTHelper, its fields and ``validate_legal``
    the tensors' names     vllm/lora/utils.py: ``parse_fine_tuned_lora_name``
    what holds a LoRA      vllm/lora/lora_model.py: ``check_unexpected_modules``, by the last part of a path

Which modules of a model vLLM has layers for is known to vLLM alone: it wraps linear layers, and embeddings of the
models that name them. What no model of its can load is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.errors import listing
from veneer.formats import peft

__all__ = ["problems"]

#: vLLM's own default of ``max_lora_rank``, and the ranks that it may be set to
MAX_RANK = 16
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SIDES = re.compile(r"^(?:base_model\.model\.)?(.*?)\.?(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<emb>[AB]))$")


def parse(name: str) -> tuple[str, str] | None:
    """(module, "lora_a" or "lora_b") of a tensor's name, as vLLM reads it; None for a name that it refuses."""
    found = _SIDES.match(name)
    if found is None or not found[1]:
        return None
    return found[1], f"lora_{(found['side'] or found['emb']).lower()}"


def problems(
    config: Mapping[str, Any],
    names: Iterable[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    max_rank: int | None = None,
) -> list[str]:
    """Why vLLM cannot load an adapter, or would compute something else with it; empty if it can.

    Args:
        config: ``adapter_config.json``.
        names: the names in ``adapter_model.safetensors``.
        shapes: their shapes, which tell convolutions.
        max_rank: ``max_lora_rank`` of the server; None leaves the rank open up to the largest that vLLM knows.
    """
    found, names = [], list(names)
    if config.get("peft_type") != "LORA":
        found.append(f"its peft_type is {config.get('peft_type')!r}")
    if not isinstance(config.get("target_modules"), list | str):
        found.append("it names no target modules")
    rank = largest_rank(config)
    limit = RANKS[-1] if max_rank is None else max_rank
    if rank > limit:
        found.append(f"its rank is {rank}, above max_lora_rank {limit}")
    if config.get("use_dora") or any(name.rpartition(".")[2] == "lora_magnitude_vector" for name in names):
        found.append("it is a DoRA")
    if config.get("modules_to_save"):
        found.append(f"it trains modules in full ({listing(config['modules_to_save'], 3)})")
    if (config.get("bias") or "none") != "none":
        found.append(f"it trains biases (bias={config['bias']!r})")
    found += _scales(config, names)
    found += _names(names)
    deep = [name for name, shape in (shapes or {}).items() if len(shape) > 2]
    if deep:
        found.append(f"it changes convolutions ({listing(sorted({n.removeprefix(peft.PREFIX) for n in deep}), 2)})")
    return found


def largest_rank(config: Mapping[str, Any]) -> int:
    """The rank that a server must have room for: that of the layer with the most."""
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])


def _scales(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Releases that do not read rank_pattern and alpha_pattern give every layer the one scale of r and lora_alpha."""
    if not (config.get("rank_pattern") or config.get("alpha_pattern")) or not config.get("r"):
        return []
    plain = {**config, "rank_pattern": {}, "alpha_pattern": {}}
    _, _, one = peft.strength(plain, "")
    paths = {parsed[0] for parsed in map(parse, names) if parsed is not None}
    other = sorted(path for path in paths if abs(peft.strength(config, path)[2] - one) > 1e-6 * abs(one))
    if not other:
        return []
    return [f"layers have scales of their own ({listing(other, 2)}), which releases of vLLM have ignored"]


def _names(names: Iterable[str]) -> list[str]:
    """Names that vLLM refuses, and changes whose place it does not have."""
    found = []
    # it passes over the base's own embeddings, which PEFT may write along
    own = re.compile(r"\.(embed_tokens|lm_head)\.base_layer\.weight$")
    parsed = {name: parse(name) for name in names if not own.search(name)}
    unknown = [name.removeprefix(peft.PREFIX) for name, what in parsed.items() if what is None]
    unknown = [name for name in unknown if not name.endswith("lora_magnitude_vector")]
    if unknown:
        found.append(f"it holds tensors besides the factors ({listing(unknown, 3)})")
    modules = {what[0] for what in parsed.values() if what is not None}
    wrapped = sorted(at for at in modules if "base_layer" in at.split(".") and not at.endswith(".experts.base_layer"))
    if wrapped:
        found.append(f"it changes what stands below a wrapper ({listing(wrapped, 2)})")
    return found
