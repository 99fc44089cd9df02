"""PEFT's layout of trained tokens: rows of an embedding or a head that replace the base's rows.

    base_model.model.<path>.token_adapter.trainable_tokens_delta    the rows [n, d] themselves, not
                                                                    a difference
    trainable_token_indices                                         their ids: a list, or {the end
                                                                    of a path: a list}

A weight that is tied to the input embedding uses the same rows, and the file does not repeat them.
A folder of peft_type TRAINABLE_TOKENS (``token_indices``, key ``<path>.trainable_tokens_delta``)
means the same without a low-rank change. Read from PEFT 0.21's source, which refuses a low-rank
change of the same module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.errors import AdapterError, raise_all, sentence
from veneer.formats import peft, peft_paths

SUFFIX, ALONE = "token_adapter.trainable_tokens_delta", "trainable_tokens_delta"
FIELD, TYPE = "trainable_token_indices", "TRAINABLE_TOKENS"


@dataclass(frozen=True)
class TokenRows:
    """The rows [n, d] of the tokens ``ids``, ascending, in the module at ``module_path``."""

    module_path: str
    ids: tuple[int, ...]
    rows: Tensor


def as_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Convert a folder of PEFT's TRAINABLE_TOKENS to an equivalent LORA; return any other
    unchanged."""
    if config.get("peft_type") != TYPE:
        return config, tensors
    ends = [key.removesuffix(f".{ALONE}") for key in tensors if key.endswith(f".{ALONE}")]
    ids_by_path = {end.removeprefix(peft.PREFIX): config.get("token_indices") for end in ends}
    dropped = ("peft_type", "token_indices", "target_modules", "init_weights", "exclude_modules")
    rest = {name: value for name, value in config.items() if name not in dropped}
    lora = {
        **rest,
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": peft.NO_TARGETS,
        FIELD: ids_by_path,
    }
    renamed = {f"{end}.{ALONE}": f"{end}.{SUFFIX}" for end in ends}
    return lora, {renamed.get(key, key): value for key, value in tensors.items()}


def split(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
    """(the trained rows by the path of their module, the other tensors). ``AdapterError``: rows
    without ids, or another number of rows than of ids."""
    rest = {key: value for key, value in tensors.items() if not key.endswith(f".{SUFFIX}")}
    # for a vocabulary that grew, PEFT also writes the frozen embedding below the wrapper
    rest = {key.replace(".token_adapter.base_layer.", "."): value for key, value in rest.items()}
    token_rows: dict[str, TokenRows] = {}
    problems: list[str] = []
    for key in sorted(key for key in tensors if key.endswith(f".{SUFFIX}")):
        rows, module_path = (
            tensors[key],
            peft_paths.strip_wrappers(key.removeprefix(peft.PREFIX).removesuffix(f".{SUFFIX}"))[0],
        )
        ids = indices(config, module_path)
        if rows.dim() != 2 or len(ids) != len(rows) or len(set(ids)) != len(ids) or not ids:
            problem = (
                f"rows {tuple(rows.shape)} of tokens at {module_path!r}, and {len(ids)} ids in"
                f" {peft.CONFIG}"
            )
            problems.append(
                sentence(problem, "a row for each of different ids", "get both files again")
            )
            continue
        order = sorted(range(len(ids)), key=ids.__getitem__)
        token_rows[module_path] = TokenRows(
            module_path, tuple(ids[position] for position in order), rows[order]
        )
    raise_all(AdapterError, "The trained tokens cannot be used", problems)
    return token_rows, rest


def indices(config: Mapping[str, Any], module_path: str) -> Sequence[int]:
    """The ids in a config for the module at a path, in the order of its rows."""
    field = config.get(FIELD) or ()
    if not isinstance(field, Mapping):
        return list(field)
    return next(
        (
            ids
            for end, ids in field.items()
            if module_path == end or module_path.endswith(f".{end}")
        ),
        [],
    )
