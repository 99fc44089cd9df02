"""Which rows ``LoraConfig(trainable_tokens=…)`` means, and why some cannot be trained. What is
computed with them: ``token_rows.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.attach.adapted_module import base_class, weight_of
from veneer.attach.lookup import parameter_path
from veneer.attach.refusals import holders, holders_of, kind_for
from veneer.attach.targets import Names, ParamRef
from veneer.bases import storage_of
from veneer.errors import listing, sentence
from veneer.layers import kind_of

#: the kinds whose weight is [V, d], a row a token
KINDS = ("embedding", "linear")


def wanted(names: Names, tokens: Any, problems: list[str]) -> dict[ParamRef, tuple[int, ...]]:
    """The ids of ``LoraConfig.trainable_tokens``, ascending, by the weight that they are rows of:
    of a tied one, the first of its names."""
    found: dict[ParamRef, tuple[int, ...]] = {}
    by_identity = holders(names)
    for path, ids in _by_module(names, tokens, problems):
        module = names.modules[path]
        kind = kind_of(module)
        if kind is None or kind.name not in KINDS:
            what = f"trainable_tokens of {path!r}, a {base_class(module).__name__}"
            problems.append(sentence(what, "an embedding or a linear head", "name that"))
            continue
        owner = holders_of(names, (path, kind.weight), by_identity)[0]
        own = tuple(sorted(ids))
        if found.setdefault(owner, own) != own:
            what = (
                f"other trainable_tokens for {path!r} than for {parameter_path(*owner)!r}, whose"
                " weight it shares"
            )
            problems.append(
                sentence(
                    what, "the same for every name of one weight", "name one of them, or untie them"
                )
            )
    return found


def _by_module(
    names: Names, tokens: Any, problems: list[str]
) -> Iterator[tuple[str, Sequence[int]]]:
    if isinstance(tokens, Mapping):
        for pattern, ids in tokens.items():
            matching = names.matching(pattern)
            if not matching:
                what = (
                    f"trainable_tokens of {pattern!r}, which matches no"
                    f" module{names.suggest(pattern)}"
                )
                problems.append(
                    sentence(
                        what, "an embedding or a head", f"name one of {listing(_tables(names))}"
                    )
                )
            yield from ((path, ids) for path in matching)
    elif tokens:
        path = _input_embedding(names)
        if path is None:
            what = (
                "trainable_tokens without a path, for a model with"
                f" {listing(_tables(names)) or 'no embedding'}"
            )
            problems.append(sentence(what, "the one embedding of its inputs", "give {path: ids}"))
        else:
            yield path, tokens


def _tables(names: Names) -> list[str]:
    return [path for path, module in names.modules.items() if isinstance(module, nn.Embedding)]


def _input_embedding(names: Names) -> str | None:
    """The path of what a model says is its input embedding, or of its only one."""
    get: Any = getattr(names.model, "get_input_embeddings", None)
    said = get() if callable(get) else None
    if said is not None:
        return next((path for path, module in names.modules.items() if module is said), None)
    tables = _tables(names)
    return tables[0] if len(tables) == 1 else None


def token_problems(
    names: Names, owner: ParamRef, ids: Sequence[int], refs: Iterable[ParamRef]
) -> Iterator[str]:
    """Why these rows of a weight, which the modules of ``refs`` hold, cannot be trained."""
    storage: Any = storage_of(weight_of(names.modules[owner[0]], owner[1]))
    where, rows = (
        parameter_path(*owner),
        storage.shape(weight_of(names.modules[owner[0]], owner[1]))[0],
    )
    beyond = [id_ for id_ in ids if id_ >= rows]
    if beyond:
        do = f"grow the model first: model.resize_token_embeddings({max(ids) + 1})"
        yield sentence(
            f"token ids {listing(map(str, beyond), 4)} of {where!r}",
            f"ids below its {rows} rows",
            do,
        )
    for path, name in refs:
        module = names.modules[path]
        kind = kind_for(module, name)
        if kind.name not in KINDS:
            problem = (
                f"trainable_tokens of {where!r}, which {path!r} ({base_class(module).__name__})"
                " reads in another way"
            )
            yield sentence(
                problem, "embeddings and linear heads", "untie it, or leave these tokens out"
            )
