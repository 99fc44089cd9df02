"""The rows of an embedding or head that ``LoraConfig(trainable_tokens=…)`` selects, and the reasons
why some cannot be trained. ``token_rows.py`` computes with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.attach.layer.names import Names
from veneer.bases import storage_of, weight_of
from veneer.distributed import base_class
from veneer.errors import listing, sentence
from veneer.layers import ParamRef, kind_for, kind_of, parameter_path

#: the layer kinds whose weight is [V, d], with one row per token
KINDS = ("embedding", "linear")


def token_ids_by_weight(
    names: Names, tokens: Any, problems: list[str]
) -> dict[ParamRef, tuple[int, ...]]:
    """The ids of ``LoraConfig.trainable_tokens``, ascending, by the weight whose rows they are (a
    tied weight by the first of its names)."""
    ids_by_weight: dict[ParamRef, tuple[int, ...]] = {}
    by_identity = names.holders()
    for path, ids in _ids_by_module(names, tokens, problems):
        module = names.modules[path]
        kind = kind_of(module)
        if kind is None or kind.name not in KINDS:
            problem = f"trainable_tokens of {path!r}, a {base_class(module).__name__}"
            problems.append(sentence(problem, "an embedding or a linear head", "name that"))
            continue
        owner = names.holders_of((path, kind.weight), by_identity)[0]
        sorted_ids = tuple(sorted(ids))
        if ids_by_weight.setdefault(owner, sorted_ids) != sorted_ids:
            problem = (
                f"other trainable_tokens for {path!r} than for {parameter_path(*owner)!r}, whose"
                " weight it shares"
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
    if isinstance(tokens, Mapping):
        for pattern, ids in tokens.items():
            matching = names.matching(pattern)
            if not matching:
                problem = (
                    f"trainable_tokens of {pattern!r}, which matches no"
                    f" module{names.suggest(pattern)}"
                )
                problems.append(
                    sentence(
                        problem,
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
    """The path of the input embedding, as ``get_input_embeddings`` gives it, or of the only
    embedding."""
    get: Any = getattr(names.model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if embedding is not None:
        return next((path for path, module in names.modules.items() if module is embedding), None)
    paths = _embeddings(names)
    return paths[0] if len(paths) == 1 else None


def token_problems(
    names: Names, owner: ParamRef, ids: Sequence[int], refs: Iterable[ParamRef]
) -> Iterator[str]:
    """The reasons why these rows of a weight cannot be trained; the modules of ``refs`` hold it."""
    storage: Any = storage_of(weight_of(names.modules[owner[0]], owner[1]))
    full_path = parameter_path(*owner)
    rows = storage.shape(weight_of(names.modules[owner[0]], owner[1]))[0]
    beyond = [id_ for id_ in ids if id_ >= rows]
    if beyond:
        do = f"grow the model first: model.resize_token_embeddings({max(ids) + 1})"
        yield sentence(
            f"token ids {listing(map(str, beyond), 4)} of {full_path!r}",
            f"ids below its {rows} rows",
            do,
        )
    for path, name in refs:
        module = names.modules[path]
        kind = kind_for(module, name)
        if kind.name not in KINDS:
            problem = (
                f"trainable_tokens of {full_path!r}, which {path!r} ({base_class(module).__name__})"
                " reads in another way"
            )
            yield sentence(
                problem, "embeddings and linear heads", "untie it, or leave these tokens out"
            )
