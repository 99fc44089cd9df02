"""The rows of an embedding or head that ``LoraConfig(trainable_tokens=…)`` selects, and the reasons
why some of them cannot be trained. ``layer/token_rows.py`` computes with the trained rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.attach.layer.names import Names
from veneer.distributed import base_class
from veneer.errors import listing, sentence
from veneer.layers import ParamRef, kind_for, kind_of, parameter_path

#: the layer kinds whose weight is [V, d], with one row for each token of the vocabulary
KINDS = ("embedding", "linear")


def token_ids_by_weight(
    names: Names, tokens: Any, problems: list[str]
) -> dict[ParamRef, tuple[int, ...]]:
    """The ids of ``LoraConfig.trainable_tokens``, in ascending order, by the weight that has rows
    for them. A tied weight is listed under the first of its names. Reasons against ``tokens`` are
    added to ``problems``."""
    ids_by_weight: dict[ParamRef, tuple[int, ...]] = {}
    refs_by_id = names.refs_by_parameter_id()
    for path, ids in _ids_by_module(names, tokens, problems):
        module = names.modules[path]
        kind = kind_of(module)
        if kind is None or kind.name not in KINDS:
            problem = f"trainable_tokens of {path!r}, a {base_class(module).__name__}"
            problems.append(sentence(problem, "an embedding or a linear head", "name that"))
            continue
        first_ref = names.holders_of((path, kind.weight), refs_by_id)[0]
        sorted_ids = tuple(sorted(ids))
        if ids_by_weight.setdefault(first_ref, sorted_ids) != sorted_ids:
            problem = (
                f"other trainable_tokens for {path!r} than for {parameter_path(*first_ref)!r},"
                " whose weight it shares"
            )
            problems.append(
                sentence(
                    problem,
                    "the same for every name of one weight",
                    "name one of them, or untie them",
                )
            )
    return ids_by_weight


def _ids_by_module(
    names: Names, tokens: Any, problems: list[str]
) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield (path of a module, token ids). Reasons against ``tokens``, the value of
    ``LoraConfig.trainable_tokens``, are added to ``problems``."""
    if isinstance(tokens, Mapping):
        for pattern, ids in tokens.items():
            matching = names.modules_matching(pattern)
            if not matching:
                problems.append(
                    sentence(
                        f"trainable_tokens of {pattern!r}, which matches no"
                        f" module{names.suggest(pattern)}",
                        "an embedding or a head",
                        f"name one of {listing(_embeddings(names))}",
                    )
                )
            yield from ((path, ids) for path in matching)
    elif tokens:
        path = _input_embedding(names)
        if path is None:
            problem = (
                "trainable_tokens without a path, for a model with"
                f" {listing(_embeddings(names)) or 'no embedding'}"
            )
            problems.append(
                sentence(problem, "the one embedding of its inputs", "give {path: ids}")
            )
        else:
            yield path, tokens


def _embeddings(names: Names) -> list[str]:
    return [path for path, module in names.modules.items() if isinstance(module, nn.Embedding)]


def _input_embedding(names: Names) -> str | None:
    """The path of the input embedding that ``get_input_embeddings`` returns, or of the model's only
    embedding. None if there is neither."""
    get_embedding: Any = getattr(names.model, "get_input_embeddings", None)
    embedding = get_embedding() if callable(get_embedding) else None
    if embedding is not None:
        return next((path for path, module in names.modules.items() if module is embedding), None)
    paths = _embeddings(names)
    return paths[0] if len(paths) == 1 else None


def token_problems(
    names: Names, refs: Sequence[ParamRef], ids: Sequence[int], row_count: int
) -> Iterator[str]:
    """The reasons why the rows ``ids`` of a weight with ``row_count`` rows cannot be trained.
    ``refs`` name the weight in every module that holds it."""
    full_path = parameter_path(*refs[0])
    missing_ids = [token_id for token_id in ids if token_id >= row_count]
    if missing_ids:
        yield sentence(
            f"token ids {listing(map(str, missing_ids), 4)} of {full_path!r}",
            f"ids below its {row_count} rows",
            f"grow the model first: model.resize_token_embeddings({max(ids) + 1})",
        )
    for path, name in refs:
        module = names.modules[path]
        kind = kind_for(module, name)
        if kind.name not in KINDS:
            yield sentence(
                f"trainable_tokens of {full_path!r}, which {path!r} ({base_class(module).__name__})"
                " reads in another way",
                "embeddings and linear heads",
                "untie it, or leave these tokens out",
            )
