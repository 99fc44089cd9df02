"""PEFT's layout of trained tokens: rows of an embedding or a head that replace the base's rows.

    base_model.model.<path>.token_adapter.trainable_tokens_delta    the new rows [n, d] of n tokens
                                                                    (d: the embedding's width), not
                                                                    differences from the base's rows
    "trainable_token_indices" in the config                         the ids of these tokens: a list,
                                                                    or {the end of a path: a list}

A weight that is tied to the input embedding uses the same rows, and the file does not repeat them.
A folder with peft_type TRAINABLE_TOKENS (field ``token_indices``, keys
``<path>.trainable_tokens_delta``) means the same without a low-rank change. The layout is that of
PEFT 0.21's source. PEFT refuses a low-rank change of a module of which it trains tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.errors import AdapterError, raise_all, sentence
from veneer.formats import peft, peft_paths

#: the suffix of the rows in a folder with peft_type LORA, and in one with TRAINABLE_TOKENS
LORA_ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"
TUNER_ROWS_SUFFIX = "trainable_tokens_delta"
#: the config's field with the token ids, and the ``peft_type`` of a folder of tokens alone
INDICES_FIELD, TOKENS_TYPE = "trainable_token_indices", "TRAINABLE_TOKENS"


@dataclass(frozen=True)
class TokenRows:
    """The trained rows [n, d] of n tokens in the module at ``module_path``, by ascending id."""

    module_path: str
    ids: tuple[int, ...]
    rows: Tensor


def convert_to_lora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Convert the config and tensors of a folder with peft_type TRAINABLE_TOKENS to those of the
    equivalent folder with peft_type LORA. Any other folder is returned unchanged."""
    if config.get("peft_type") != TOKENS_TYPE:
        return config, tensors
    ending = f".{TUNER_ROWS_SUFFIX}"
    module_keys = [key.removesuffix(ending) for key in tensors if key.endswith(ending)]
    ids_by_path = {
        module_key.removeprefix(peft.PREFIX): config.get("token_indices")
        for module_key in module_keys
    }
    dropped_fields = (
        "peft_type",
        "token_indices",
        "target_modules",
        "init_weights",
        "exclude_modules",
    )
    lora_config = {
        **{name: value for name, value in config.items() if name not in dropped_fields},
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": peft.NO_TARGETS,
        INDICES_FIELD: ids_by_path,
    }
    lora_keys = {
        f"{module_key}.{TUNER_ROWS_SUFFIX}": f"{module_key}.{LORA_ROWS_SUFFIX}"
        for module_key in module_keys
    }
    return lora_config, {lora_keys.get(key, key): tensor for key, tensor in tensors.items()}


def split_rows(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
    """(the trained rows by the path of their module, all other tensors by key). ``AdapterError``:
    a tensor of rows is no matrix, or the config has for it no token ids, another number of ids, or
    an id twice."""
    other_tensors = {
        key: tensor for key, tensor in tensors.items() if not key.endswith(f".{LORA_ROWS_SUFFIX}")
    }
    # if the vocabulary has grown, PEFT also writes the frozen embedding, with a key below its
    # wrapper; give it the key of the module's own weight
    other_tensors = {
        key.replace(".token_adapter.base_layer.", "."): tensor
        for key, tensor in other_tensors.items()
    }
    token_rows: dict[str, TokenRows] = {}
    problems: list[str] = []
    for key in sorted(key for key in tensors if key.endswith(f".{LORA_ROWS_SUFFIX}")):
        rows, module_key = tensors[key], key.removesuffix(f".{LORA_ROWS_SUFFIX}")
        module_path = peft_paths.strip_wrappers(module_key.removeprefix(peft.PREFIX))[0]
        ids = token_ids(config, module_path)
        if rows.dim() != 2 or len(ids) != len(rows) or len(set(ids)) != len(ids) or not ids:
            problems.append(
                sentence(
                    f"rows {tuple(rows.shape)} of tokens at {module_path!r}, and {len(ids)} ids in"
                    f" {peft.CONFIG}",
                    "a row for each of different ids",
                    "get both files again",
                )
            )
            continue
        order = sorted(range(len(ids)), key=ids.__getitem__)
        token_rows[module_path] = TokenRows(
            module_path, tuple(ids[position] for position in order), rows[order]
        )
    raise_all(AdapterError, "The trained tokens cannot be used", problems)
    return token_rows, other_tensors


def token_ids(config: Mapping[str, Any], module_path: str) -> Sequence[int]:
    """The token ids that PEFT's ``config`` lists for the module at ``module_path``, in the order of
    the rows in the adapter's tensor of trained tokens. Empty if it lists none."""
    indices_field = config.get(INDICES_FIELD) or ()
    if not isinstance(indices_field, Mapping):
        return list(indices_field)
    path_endings = [ending for ending in indices_field if module_path.endswith(ending)]
    # PEFT takes an end within a name too ("tokens" for "embed_tokens"), but a path comes first, so
    # that Veneer's folders, which list paths, mean these alone
    path_endings.sort(key=lambda ending: not f".{module_path}".endswith(f".{ending}"))
    return indices_field[path_endings[0]] if path_endings else []
