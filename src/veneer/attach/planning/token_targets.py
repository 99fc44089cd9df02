"""Find the rows of an embedding or head that ``LoraConfig(trainable_tokens=…)`` trains in full, and
the reasons why some of them cannot be trained. ``layer/token_rows.py`` computes with the trained
rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.attach.layer.model_index import ModelIndex
from veneer.distributed import base_class
from veneer.errors import listing, sentence
from veneer.layers import ParamRef, kind_for, kind_of, parameter_path

#: the layer kinds whose weight can have one row for each token of the vocabulary
KINDS = ("embedding", "linear")


def token_ids_by_weight(
    model_index: ModelIndex, trainable_tokens: Any, problems: list[str]
) -> dict[ParamRef, tuple[int, ...]]:
    """The token ids of ``trainable_tokens`` (``LoraConfig.trainable_tokens``), in ascending order,
    by the (path, name) of the weight whose rows are trained for them. A tied weight is listed under
    the first of its names. Reasons against ``trainable_tokens`` are added to ``problems``."""
    ids_by_weight: dict[ParamRef, tuple[int, ...]] = {}
    refs_by_id = model_index.refs_by_parameter_id()
    for path, ids in _ids_by_module(model_index, trainable_tokens, problems):
        module = model_index.modules[path]
        kind = kind_of(module)
        if kind is None or kind.name not in KINDS:
            problem = f"trainable_tokens of {path!r}, a {base_class(module).__name__}"
            problems.append(sentence(problem, "an embedding or a linear head", "name that"))
            continue
        first_ref = model_index.holders_of((path, kind.weight), refs_by_id)[0]
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
    model_index: ModelIndex, trainable_tokens: Any, problems: list[str]
) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield (path of a module, ids of its trained tokens). ``trainable_tokens`` is either {pattern:
    ids} or only the ids, which then belong to the input embedding. Reasons against it are added to
    ``problems``."""
    if isinstance(trainable_tokens, Mapping):
        for pattern, ids in trainable_tokens.items():
            matching_paths = model_index.modules_matching(pattern)
            if not matching_paths:
                problems.append(
                    sentence(
                        f"trainable_tokens of {pattern!r}, which matches no"
                        f" module{model_index.suggest(pattern)}",
                        "an embedding or a head",
                        f"name one of {listing(_embedding_paths(model_index))}",
                    )
                )
            yield from ((path, ids) for path in matching_paths)
    elif trainable_tokens:
        path = _input_embedding_path(model_index)
        if path is None:
            problem = (
                "trainable_tokens without a path, for a model with"
                f" {listing(_embedding_paths(model_index)) or 'no embedding'}"
            )
            problems.append(
                sentence(problem, "the one embedding of its inputs", "give {path: ids}")
            )
        else:
            yield path, trainable_tokens


def _embedding_paths(model_index: ModelIndex) -> list[str]:
    return [
        path for path, module in model_index.modules.items() if isinstance(module, nn.Embedding)
    ]


def _input_embedding_path(model_index: ModelIndex) -> str | None:
    """The path of the module that the model's ``get_input_embeddings`` returns; if it returns none,
    the path of the model's only embedding. None if that does not exist either."""
    get_embedding: Any = getattr(model_index.model, "get_input_embeddings", None)
    embedding = get_embedding() if callable(get_embedding) else None
    if embedding is not None:
        return next(
            (path for path, module in model_index.modules.items() if module is embedding), None
        )
    paths = _embedding_paths(model_index)
    return paths[0] if len(paths) == 1 else None


def token_problems(
    model_index: ModelIndex, refs: Sequence[ParamRef], token_ids: Sequence[int], row_count: int
) -> Iterator[str]:
    """The reasons why the rows for ``token_ids`` of a weight with ``row_count`` rows cannot be
    trained. ``refs`` are the (path, name) of the weight in every module that holds it."""
    full_path = parameter_path(*refs[0])
    missing_ids = [token_id for token_id in token_ids if token_id >= row_count]
    if missing_ids:
        yield sentence(
            f"token ids {listing(map(str, missing_ids), 4)} of {full_path!r}",
            f"ids below its {row_count} rows",
            f"grow the model first: model.resize_token_embeddings({max(token_ids) + 1})",
        )
    for path, name in refs:
        module = model_index.modules[path]
        kind = kind_for(module, name)
        if kind.name not in KINDS:
            yield sentence(
                f"trainable_tokens of {full_path!r}, which {path!r} ({base_class(module).__name__})"
                " reads in another way",
                "embeddings and linear heads",
                "untie it, or leave these tokens out",
            )
