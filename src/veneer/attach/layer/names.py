"""The modules and parameters of a model by their names, and the patterns that match these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from torch import Tensor, nn

from veneer.attach.layer.adapted_module import walk
from veneer.bases import is_storage_detail, own_parameters, weight_of
from veneer.config import path_test
from veneer.distributed import is_sharded
from veneer.errors import listing, nearest
from veneer.layers import ParamRef, kind_of
from veneer.precision import equal_values


class Names:
    """The modules of a model by path, without the modules that an earlier attach added.

    ``aliases`` maps the first name of each module to all its names, ``canonical`` each name to the
    first one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.aliases: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for path, module in walk(model):
            name = first.setdefault(id(module), path)
            self.modules.setdefault(name, module)
            self.aliases.setdefault(name, []).append(path)
        self.canonical = {
            alias: name for name, aliases in self.aliases.items() for alias in aliases
        }

    @cached_property
    def on_meta_device(self) -> bool:
        """Whether all parameters are on the meta device, to be loaded later. False for a model with
        accelerate's hooks: its parameters are offloaded."""
        hooked = any("_hf_hook" in module.__dict__ for module in self.modules.values())
        return not hooked and all(parameter.is_meta for _, parameter in self.parameters())

    def parameters(self) -> Iterator[tuple[ParamRef, nn.Parameter]]:
        """((path, name), parameter) of each plain parameter, a tied one under each of its names."""
        for path, module in self.modules.items():
            plain = {
                name: p
                for name, p in module._parameters.items()
                if p is not None and not is_storage_detail(module, name)
            }
            yield from (((path, name), parameter) for name, parameter in plain.items())

    def holders(self) -> dict[int, list[ParamRef]]:
        """(path, name) of every module that holds a parameter, by the parameter's identity."""
        by_identity: dict[int, list[ParamRef]] = {}
        for ref, parameter in self.parameters():
            by_identity.setdefault(id(parameter), []).append(ref)
        return by_identity

    def holders_of(
        self, ref: ParamRef, by_identity: Mapping[int, list[ParamRef]]
    ) -> list[ParamRef]:
        """(path, name) of every module that holds a weight, in the model's order. ``by_identity``
        is the result of ``holders``."""
        return by_identity.get(id(weight_of(self.modules[ref[0]], ref[1])), [ref])

    def split_ties(self, values: Mapping[str, Mapping[str, Tensor]]) -> frozenset[ParamRef]:
        """The tied parameters to which ``values``, {path: {name: value}}, gives different values,
        or a value for some of the names only."""
        split_refs: set[ParamRef] = set()
        for refs in self.holders().values():
            tied = [values[path][name] for path, name in refs if name in values.get(path, ())]
            if tied and (
                len(tied) < len(refs) or not all(equal_values(value, tied[0]) for value in tied)
            ):
                split_refs |= {ref for ref in refs if ref[1] in values.get(ref[0], ())}
        return frozenset(split_refs)

    def fresh_parameters(self) -> dict[int, ParamRef]:
        """The parameters that were not in the checkpoint: the first reference to each, by its
        ``id``.

        transformers marks the parameters that it loads. Without any such mark nothing is known, so
        the result is empty. Sharded parameters lose their marks when they are moved, so sharded and
        unsharded parameters are considered separately.
        """
        references: dict[int, ParamRef] = {}
        parameters = [
            (is_sharded(parameter), ref, parameter) for ref, parameter in self.parameters()
        ]
        with_marks = {sharded for sharded, _, parameter in parameters if _was_loaded(parameter)}
        for sharded, ref, parameter in parameters:
            if sharded in with_marks and not _was_loaded(parameter):
                references.setdefault(id(parameter), ref)
        return references

    def matching(self, pattern: str) -> list[str]:
        """The first names of the modules that ``pattern`` matches under any name, in the model's
        order."""
        test = path_test(pattern)
        return [name for name, aliases in self.aliases.items() if any(map(test, aliases))]

    def parameters_matching(self, pattern: str) -> list[ParamRef]:
        """The parameters whose path ``pattern`` matches, in the model's order."""
        test = path_test(pattern)
        return [
            (path, name)
            for path, module in self.modules.items()
            for name in own_parameters(module)
            if any(test(f"{alias}.{name}".lstrip(".")) for alias in self.aliases[path])
        ]

    def refs(self, path: str) -> list[ParamRef]:
        """The parameters of a module that an adapter may change: its weights and vectors, and those
        of children that its kind treats as part of it."""
        module = self.modules[path]
        kind = kind_of(module)
        if kind is None:
            return []
        refs = [(path, name) for name in (*kind.weights(module), *kind.vectors(module))]
        below = [self.canonical[f"{path}.{child}".lstrip(".")] for child in kind.below(module)]
        return [*refs, *(ref for child in below for ref in self.refs(child))]

    def children(self, path: str) -> Iterator[str]:
        """``path`` and the first names of everything below it."""
        for name, aliases in self.aliases.items():
            if any(
                alias == path or alias.startswith(f"{path}.") or path == "" for alias in aliases
            ):
                yield name

    def suggest(self, pattern: str, among: Iterable[str] | None = None) -> str:
        """A hint for a pattern that matches nothing: `` (nearest: …)`` among the paths ``among``
        (None: all that can be attached to) and their last names; or, if the pattern would match as
        a regular expression, that it must begin with ``re:``."""
        attachable = (
            [name for name, module in self.modules.items() if kind_of(module)]
            if among is None
            else [*among]
        )
        if count := _count_of_regex(pattern, attachable):
            return f" (as a regular expression it matches {count} paths: write {'re:' + pattern!r})"
        return nearest(pattern, [*(name.rpartition(".")[2] for name in attachable), *attachable])

    def leaves(self) -> str:
        """The distinct last names of the modules that can be attached to, for messages."""
        names = (
            name.rpartition(".")[2] or "(the model itself)"
            for name, m in self.modules.items()
            if kind_of(m)
        )
        return listing(dict.fromkeys(names), limit=12)


def _was_loaded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _count_of_regex(pattern: str, paths: Iterable[str]) -> int:
    """How many paths a pattern without ``re:`` would match as a regular expression."""
    try:
        expression = re.compile(pattern)
    except re.error:
        return 0
    return sum(expression.fullmatch(path) is not None for path in paths)
