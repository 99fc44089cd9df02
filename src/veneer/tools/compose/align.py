"""Several adapters side by side: which of their changes are of the same weight.

    align(adapter files) -> an AlignedWeight for each weight that any of them changes: at, path, who
    changes it

Changes are matched by ``PeftLayer.target_path``, as PEFT nests what it wraps. A tied weight stands
in a file under each of its names; the record lists the first. The others are its aliases, of which
the changes are the same product, transposed where one module reads the weight so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from veneer.adapter_files.folder import AdapterFiles
from veneer.attach.lookup import parameter_path
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.formats import peft, peft_behaviour, peft_paths
from veneer.lowrank import LowRank


@dataclass(frozen=True)
class AlignedWeight:
    """One weight, as adapters change it."""

    at: str  # ``PeftLayer.target_path``: the path of its module, or of the parameter
    path: str  # in a file with all the changes
    parameter: bool  # whether a file means the parameter, not the module
    weight: str | None  # the path of the weight, where a record says it
    # the change that each adapter has here, by the adapter's number
    layers: Mapping[int, peft.PeftLayer]
    alias_of: tuple[str, bool] | None = (
        None  # (at, transposed) of the weight that it is tied to, if that comes first
    )

    @property
    def template(self) -> peft.PeftLayer:
        """A change here, for its shapes and suffixes."""
        return next(iter(self.layers.values()))


#: the names of a module's own parameters in the model's order; None where nobody knows it
Order = Callable[[str], Sequence[str]]
#: by ``at`` and the adapter's number: (path in its file, change)
Changes = Mapping[str, Mapping[int, tuple[str, peft.PeftLayer]]]


def align(
    saved_adapters: Sequence[AdapterFiles], order: Order | None = None
) -> list[AlignedWeight]:
    """The weights that these adapters change, in the first one's order. ``AdapterError``: with
    every problem at once: shapes that differ, a weight that is tied in one and not in another, a
    module in one and its parameter in another, parameters whose order in a file nobody knows."""
    problems: list[str] = []
    changes: dict[str, dict[int, tuple[str, peft.PeftLayer]]] = {}
    for number, saved in enumerate(saved_adapters):
        for path, layer in saved.low.items():
            changes.setdefault(layer.target_path, {})[number] = path, layer
    parameters = {
        at
        for at, entries in changes.items()
        if any(peft.of_parameter(*entry) for entry in entries.values())
    }
    problems += _unlike(saved_adapters, changes, parameters)
    weights, aliases = _weights(saved_adapters, problems)
    paths = _paths(changes, parameters, order, problems)
    raise_all(AdapterError, "These adapters cannot be put side by side", problems)
    return [
        AlignedWeight(
            at, paths[at], at in parameters, weights.get(at),
            {number: layer for number, (_, layer) in changes[at].items()}, aliases.get(at),
        )
        for at in paths
    ]  # fmt: skip


def _unlike(
    saved_adapters: Sequence[AdapterFiles], changes: Changes, parameters: set[str]
) -> Iterator[str]:
    """Changes of one place that cannot be changes of one weight."""
    for at, entries in changes.items():
        shapes: dict[tuple, int] = {}
        for number, (path, layer) in entries.items():
            form = layer.suffixes, peft.of_parameter(path, layer), layer.dims, layer.A.shape[1:]
            shapes.setdefault(form, number)
        if len(shapes) > 1:
            sizes = [(form[2], saved_adapters[number].path) for form, number in shapes.items()]
            said = [f"(groups, out, in) = {dims} in {path}" for dims, path in sizes]
            yield sentence(
                f"changes of {at!r} of {listing(said, 3)}",
                "changes of one weight",
                "leave one of them out",
            )
    for at in parameters:
        above = at.rpartition(".")[0]
        if above in changes and above not in parameters:
            problem = (
                f"a change of the module {above!r} in one adapter and of its parameter {at!r} in"
                " another"
            )
            yield sentence(
                problem,
                "one of the two",
                "load one on its model, attach it by the other name and save it",
            )


def _weights(
    saved_adapters: Sequence[AdapterFiles], problems: list[str]
) -> tuple[dict[str, str], dict[str, tuple[str, bool]]]:
    """(the path of each weight by ``at``, the aliases by ``at``)."""
    weights: dict[str, str] = {}
    candidates: dict[str, dict[tuple[str, bool], None]] = {}
    by_at = [{layer.target_path: layer for layer in saved.low.values()} for saved in saved_adapters]
    for saved, layers in zip(saved_adapters, by_at, strict=True):
        # the path of each weight that the record lists, by ``at``
        own = {
            w if w in layers else w.rpartition(".")[0]: w for w in saved.metadata.get("changes", {})
        }
        weights |= own
        for at in layers.keys() - own.keys() if saved.record is not None else ():
            found = {
                (other, t): None
                for other in own
                if other in layers
                for t in _ties(layers[at], layers[other])
            }
            candidates[at] = {c: None for c in candidates.get(at, found) if c in found}
    aliases: dict[str, tuple[str, bool]] = {}
    for at, found in candidates.items():
        # if several fit, their changes are equal in every adapter, and so is any sum of them
        for other, transposed in found:
            # by one change, or neither
            pairs = [(layers.get(at), layers.get(other)) for layers in by_at]
            if all(transposed in _ties(a, b) if a and b else a is b for a, b in pairs):
                aliases[at] = other, transposed
                break
        else:
            text = f"a change of {at!r}, tied to another weight in one adapter and not in another"
            problems.append(sentence(text, "adapters of one model", "leave one of them out"))
    return weights, aliases


def _ties(one: peft.PeftLayer, other: peft.PeftLayer) -> Iterator[bool]:
    for transposed in (False, True):
        low = other.low.T if transposed else other.low
        if (
            one.scale == other.scale
            and torch.equal(one.low.A, low.A)
            and torch.equal(one.low.B, low.B)
        ):
            yield transposed


def _paths(
    changes: Changes, parameters: set[str], order: Order | None, problems: list[str]
) -> dict[str, str]:
    """The path of each change in a file of all of them, with the wrappers that PEFT puts around
    modules."""
    inside: dict[str, list[str]] = {}
    for at in filter(parameters.__contains__, changes):
        inside.setdefault(at.rpartition(".")[0], []).append(at)
    wraps = {module: len(ats) for module, ats in inside.items()}
    paths: dict[str, str] = {}
    for at, entries in changes.items():
        above, _, last = at.rpartition(".")
        if at in parameters:
            ordered = _ordered(above, inside.pop(above, []), changes, order, problems)
            for number, own in enumerate(ordered, 1):
                nests = ["base_layer"] * (len(ordered) - number)
                paths[own] = ".".join(
                    [*([peft_paths.add_wrappers(above, wraps)] if above else []), *nests]
                )
        elif any(peft_paths.attention_of(path) is not None for path, _ in entries.values()):
            paths[at] = f"{peft_paths.add_wrappers(at, wraps).removesuffix(last)}base_layer.{last}"
        else:
            paths[at] = peft_paths.add_wrappers(at, wraps)
    return paths


def _ordered(
    module: str, ats: list[str], changes: Changes, order: Order | None, problems: list[str]
) -> list[str]:
    """The parameters of one module in the model's order, in which PEFT wraps them. A file tells it
    by their depth: the first one is nested deepest."""
    if len(ats) < 2:
        return ats
    if order is not None:
        return sorted(ats, key=[parameter_path(module, name) for name in order(module)].index)
    for number in {number for at in ats for number in changes[at]}:
        depths = {
            at: peft_paths.strip_wrappers(changes[at][number][0])[1]
            for at in ats
            if number in changes[at]
        }
        if len(depths) == len(ats):
            return sorted(ats, key=lambda at: -depths[at])
    problem = f"parameters of {module!r} ({listing(ats)}) that no one adapter changes all of"
    expected = "their order in the model, in which PEFT nests them"
    problems.append(sentence(problem, expected, "pass the model (--base on the command line)"))
    return ats


def applied(saved: AdapterFiles) -> dict[str, LowRank]:
    """The product of each change by ``at``, as the library that wrote it applies it: PEFT adds that
    of an attention's out-projection ``peft_behaviour.OUT_PROJ_REPEATS`` times. AdapterError where
    this is not known of its version."""
    products = {}
    for path, layer in saved.low.items():
        twice = saved.record is None and peft_paths.attention_of(path) is not None
        if twice and (reason := peft_behaviour.out_proj_problem(saved.peft_config)) is not None:
            problem = f"a change of {layer.target_path!r} in {saved.path}: {reason}"
            raise AdapterError(problem, "a known meaning", "use PEFT for it")
        products[layer.target_path] = (
            replace(layer.low, scale=layer.scale * peft_behaviour.OUT_PROJ_REPEATS)
            if twice
            else layer.low
        )
    return products
