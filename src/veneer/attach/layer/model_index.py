"""Look up the modules and parameters of a model by name or pattern, and suggest similar names for
errors.
"""

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


class ModelIndex:
    """An index of the modules of a model by path, without the modules that attaching has added.

    A module that the model holds in several places has several paths, which are called its names.
    ``modules`` maps the first name of each module to the module, ``aliases`` the first name to all
    names, and ``canonical`` each name to the first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.aliases: dict[str, list[str]] = {}
        first_paths: dict[int, str] = {}
        for path, module in walk(model):
            name = first_paths.setdefault(id(module), path)
            self.modules.setdefault(name, module)
            self.aliases.setdefault(name, []).append(path)
        self.canonical = {
            alias: name for name, aliases in self.aliases.items() for alias in aliases
        }

    @cached_property
    def on_meta_device(self) -> bool:
        """Whether all parameters are on the meta device, to be loaded later. False for a model with
        accelerate's hooks, whose parameters on the meta device are not missing but offloaded."""
        is_hooked = any("_hf_hook" in module.__dict__ for module in self.modules.values())
        return not is_hooked and all(parameter.is_meta for _, parameter in self.parameters())

    def parameters(self) -> Iterator[tuple[ParamRef, nn.Parameter]]:
        """Yield ((path, name), parameter) for each parameter of the model, except for those that
        only serve to store a packed weight, such as its scales. A tied parameter is listed for each
        module that holds it. ``path`` is the first name of the module."""
        for path, module in self.modules.items():
            visible_parameters = {
                name: parameter
                for name, parameter in module._parameters.items()
                if parameter is not None and not is_storage_detail(module, name)
            }
            yield from (((path, name), parameter) for name, parameter in visible_parameters.items())

    def refs_by_parameter_id(self) -> dict[int, list[ParamRef]]:
        """For each parameter, by its ``id``, the (path, name) of every module that holds it. A tied
        parameter has several."""
        refs_by_id: dict[int, list[ParamRef]] = {}
        for ref, parameter in self.parameters():
            refs_by_id.setdefault(id(parameter), []).append(ref)
        return refs_by_id

    def holders_of(self, ref: ParamRef, refs_by_id: Mapping[int, list[ParamRef]]) -> list[ParamRef]:
        """(path, name) of the parameter at ``ref`` in every module that holds it, in the model's
        order. ``refs_by_id`` is the result of ``refs_by_parameter_id``."""
        return refs_by_id.get(id(weight_of(self.modules[ref[0]], ref[1])), [ref])

    def split_ties(self, values: Mapping[str, Mapping[str, Tensor]]) -> frozenset[ParamRef]:
        """The (path, name) of every entry of ``values``, {path: {name: value}}, that would break a
        tie: several modules hold the same parameter, and ``values`` has different values for them,
        or values for only some of them."""
        split_refs: set[ParamRef] = set()
        for refs in self.refs_by_parameter_id().values():
            tied_values = [
                values[path][name] for path, name in refs if name in values.get(path, ())
            ]
            if tied_values and (
                len(tied_values) < len(refs)
                or not all(equal_values(value, tied_values[0]) for value in tied_values)
            ):
                split_refs |= {ref for ref in refs if ref[1] in values.get(ref[0], ())}
        return frozenset(split_refs)

    def fresh_parameters(self) -> dict[int, ParamRef]:
        """The parameters that were not in the checkpoint: {``id`` of a parameter: its first (path,
        name)}.

        transformers marks the parameters that it loads. If no parameter has a mark, it is unknown
        which were loaded, so the result is empty. Sharded parameters lose their marks when they are
        moved, so this rule is applied to sharded and to unsharded parameters separately.
        """
        fresh_refs: dict[int, ParamRef] = {}
        parameters = [
            (is_sharded(parameter), ref, parameter) for ref, parameter in self.parameters()
        ]
        marked_groups = {
            has_shards for has_shards, _, parameter in parameters if _was_loaded(parameter)
        }
        for has_shards, ref, parameter in parameters:
            if has_shards in marked_groups and not _was_loaded(parameter):
                fresh_refs.setdefault(id(parameter), ref)
        return fresh_refs

    def modules_matching(self, pattern: str) -> list[str]:
        """The first names of the modules that match ``pattern`` under any of their names, in the
        model's order."""
        is_match = path_test(pattern)
        return [name for name, aliases in self.aliases.items() if any(map(is_match, aliases))]

    def parameters_matching(self, pattern: str) -> list[ParamRef]:
        """The parameters whose path, under any name of their module, matches ``pattern``, in the
        model's order."""
        is_match = path_test(pattern)
        return [
            (path, name)
            for path, module in self.modules.items()
            for name in own_parameters(module)
            if any(is_match(f"{alias}.{name}".lstrip(".")) for alias in self.aliases[path])
        ]

    def adaptable_refs(self, path: str) -> list[ParamRef]:
        """The parameters that an adapter may change if the module at ``path`` is a target: its
        weights and vectors, and those of the children whose weights its own computation uses, such
        as the ``out_proj`` of ``nn.MultiheadAttention``."""
        module = self.modules[path]
        kind = kind_of(module)
        if kind is None:
            return []
        refs = [(path, name) for name in (*kind.weights(module), *kind.vectors(module))]
        child_paths = [
            self.canonical[f"{path}.{child}".lstrip(".")] for child in kind.below(module)
        ]
        return [
            *refs,
            *(ref for child_path in child_paths for ref in self.adaptable_refs(child_path)),
        ]

    def subtree_paths(self, path: str) -> Iterator[str]:
        """Yield ``path`` and the first name of every module below it."""
        for name, aliases in self.aliases.items():
            if any(
                alias == path or alias.startswith(f"{path}.") or path == "" for alias in aliases
            ):
                yield name

    def suggest(self, pattern: str, candidates: Iterable[str] | None = None) -> str:
        """A hint for a pattern that matches nothing: `` (nearest: …)``, or that the pattern must
        begin with ``re:`` if it would match as a regular expression. ``candidates`` are the paths
        that the hint may name; None stands for all modules that can be attached to."""
        paths = (
            [name for name, module in self.modules.items() if kind_of(module)]
            if candidates is None
            else [*candidates]
        )
        if match_count := _regex_match_count(pattern, paths):
            return (
                f" (as a regular expression it matches {match_count} paths: write"
                f" {'re:' + pattern!r})"
            )
        return nearest(pattern, [*(path.rpartition(".")[2] for path in paths), *paths])

    def last_components_text(self) -> str:
        """The distinct last components of the paths of modules that can be attached to, such as
        "q_proj", as a text for messages."""
        last_components = (
            name.rpartition(".")[2] or "(the model itself)"
            for name, module in self.modules.items()
            if kind_of(module)
        )
        return listing(dict.fromkeys(last_components), limit=12)


def _was_loaded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _regex_match_count(pattern: str, paths: Iterable[str]) -> int:
    """The number of paths that ``pattern``, which does not begin with ``re:``, would match as a
    regular expression. 0 if it is not a valid one."""
    try:
        regex = re.compile(pattern)
    except re.error:
        return 0
    return sum(regex.fullmatch(path) is not None for path in paths)
