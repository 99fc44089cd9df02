"""Several adapters side by side: which of their changes are of the same weight.

    align(adapter files)  ->  an AlignedWeight for each weight that any of them changes: at, path, who changes it

Adapters of one model may have other paths for one weight in their files, as PEFT nests what it wraps: so changes are
matched by ``PeftLayer.at``, and a file of all of them gets paths of its own. A tied weight stands in a file under each
of its names; the record of an adapter lists it under the first. The others are its aliases, of which the changes are
the same product, transposed where one module reads the weight so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from veneer.adapter_files.folder import AdapterFiles
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.formats import peft
from veneer.lowrank import LowRank


@dataclass(frozen=True)
class AlignedWeight:
    """One weight, as adapters change it.

    Fields:
        at: the path of its module, or of the parameter where that is meant (``PeftLayer.at``).
        path: its path in a file with all the changes.
        parameter: whether a file means the parameter, not the module.
        weight: the path of the weight, where a record says it.
        layers: the change that each adapter has here, by the adapter's number.
        alias_of: (at, transposed) of the weight that this one is tied to, if it is not the first of its names.
    """

    at: str
    path: str
    parameter: bool
    weight: str | None
    layers: Mapping[int, peft.PeftLayer]
    alias_of: tuple[str, bool] | None = None

    @property
    def template(self) -> peft.PeftLayer:
        """A change here, for its shapes and suffixes."""
        return next(iter(self.layers.values()))


#: the names of a module's own parameters in the model's order; None where nobody knows it
Order = Callable[[str], Sequence[str]]


def align(saved_adapters: Sequence[AdapterFiles], order: Order | None = None) -> list[AlignedWeight]:
    """The weights that these adapters change, in the first one's order.

    Raises:
        AdapterError: with every problem at once: shapes that differ, a weight that is tied in one and not in another,
            a module in one and its parameter in another, parameters whose order in a file nobody knows.
    """
    problems: list[str] = []
    changes: dict[str, dict[int, tuple[str, peft.PeftLayer]]] = {}
    for number, saved in enumerate(saved_adapters):
        for path, layer in saved.low.items():
            changes.setdefault(layer.at, {})[number] = path, layer
    parameters = {at for at, entries in changes.items() if any(peft.of_parameter(*entry) for entry in entries.values())}
    problems += _unlike(saved_adapters, changes, parameters)
    weights, aliases = _weights(saved_adapters, problems)
    paths = _paths(changes, parameters, order, problems)
    raise_all(AdapterError, "These adapters cannot be put side by side", problems)
    aligned_weights = {
        at: AlignedWeight(
            at, paths[at], at in parameters, weights.get(at),
            {number: layer for number, (_, layer) in entries.items()}, aliases.get(at),
        )
        for at, entries in changes.items()
    }  # fmt: skip
    return [aligned_weights[at] for at in paths]


def _unlike(
    saved_adapters: Sequence[AdapterFiles],
    changes: Mapping[str, Mapping[int, tuple[str, peft.PeftLayer]]],
    parameters: set[str],
) -> Iterator[str]:
    """Changes of one place that cannot be changes of one weight."""
    for at, entries in changes.items():
        shapes: dict[tuple, int] = {}
        for number, (path, layer) in entries.items():
            try:
                groups, _, in_ = layer.low.A.shape
            except RuntimeError:
                found = (
                    f"A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} at {at!r} in {saved_adapters[number].path}"
                )
                yield sentence(found, f"factors of rank {layer.rank}", "get the adapter again")
                break
            form = layer.suffixes, peft.of_parameter(path, layer), groups, layer.low.B.shape[1], in_, layer.A.shape[1:]
            shapes.setdefault(form, number)
        if len(shapes) > 1:
            said = [f"{_size(changes[at][number][1])} in {saved_adapters[number].path}" for number in shapes.values()]
            yield sentence(f"changes of {at!r} of {listing(said, 3)}", "changes of one weight", "leave one of them out")
    for at in parameters:
        above = at.rpartition(".")[0]
        if above in changes and above not in parameters:
            found = f"a change of the module {above!r} in one adapter and of its parameter {at!r} in another"
            yield sentence(found, "one of the two", "load one on its model, attach it by the other name and save it")


def _size(layer: peft.PeftLayer) -> str:
    groups, _, in_ = layer.low.A.shape
    return f"(groups, out, in) = {(groups, layer.low.B.shape[1], in_)}"


def recorded(saved: AdapterFiles) -> dict[str, str]:
    """The path of each weight that the record lists, by ``at``."""
    known = {layer.at for layer in saved.low.values()}
    found = {}
    for weight in saved.metadata.get("changes", {}):
        above = weight.rpartition(".")[0]
        found[weight if weight in known else above] = weight
    return found


def _weights(
    saved_adapters: Sequence[AdapterFiles], problems: list[str]
) -> tuple[dict[str, str], dict[str, tuple[str, bool]]]:
    """(the path of each weight by ``at``, the aliases by ``at``)."""
    weights: dict[str, str] = {}
    candidates: dict[str, dict[tuple[str, bool], None]] = {}
    by_at = [{layer.at: layer for layer in saved.low.values()} for saved in saved_adapters]
    for saved, layers in zip(saved_adapters, by_at, strict=True):
        own = recorded(saved)
        weights |= own
        for at in layers.keys() - own.keys() if saved.record is not None else ():
            found = {(other, t): None for other in own if other in layers for t in _ties(layers[at], layers[other])}
            candidates[at] = {c: None for c in candidates.get(at, found) if c in found}
    aliases: dict[str, tuple[str, bool]] = {}
    for at, found in candidates.items():
        # if several fit, their changes are equal in every adapter, and so is any sum of them
        fits = [candidate for candidate in found if all(_agree(layers, at, *candidate) for layers in by_at)]
        if fits:
            aliases[at] = fits[0]
        else:
            what = f"a change of {at!r}, tied to another weight in one adapter and not in another"
            problems.append(sentence(what, "adapters of one model", "leave one of them out"))
    return weights, aliases


def _agree(layers: Mapping[str, peft.PeftLayer], alias: str, at: str, transposed: bool) -> bool:
    """Whether an adapter changes both of two names by one change, or neither."""
    if alias in layers and at in layers:
        return transposed in _ties(layers[alias], layers[at])
    return alias not in layers and at not in layers


def _ties(one: peft.PeftLayer, other: peft.PeftLayer) -> Iterator[bool]:
    """In which ways (transposed or not) one change is the other."""
    for transposed in (False, True):
        low = other.low.T if transposed else other.low
        if one.scale == other.scale and torch.equal(one.low.A, low.A) and torch.equal(one.low.B, low.B):
            yield transposed


def _paths(
    changes: Mapping[str, Mapping[int, tuple[str, peft.PeftLayer]]],
    parameters: set[str],
    order: Order | None,
    problems: list[str],
) -> dict[str, str]:
    """The path of each change in a file of all of them, with the wrappers that PEFT puts around modules."""
    inside: dict[str, list[str]] = {}
    for at in changes:
        if at in parameters:
            inside.setdefault(at.rpartition(".")[0], []).append(at)
    wraps = {module: len(ats) for module, ats in inside.items()}
    paths: dict[str, str] = {}
    for at, entries in changes.items():
        if at not in parameters:
            nested = peft.nested(at, wraps)
            if any(peft.attention_of(path) is not None for path, _ in entries.values()):
                above, _, last = nested.rpartition(".")
                nested = f"{above}.base_layer.{last}".lstrip(".")
            paths[at] = nested
            continue
        module = at.rpartition(".")[0]
        ordered = _ordered(module, inside.pop(module, []), changes, order, problems)
        for number, own in enumerate(ordered, 1):
            nests = ["base_layer"] * (len(ordered) - number)
            paths[own] = ".".join([*([peft.nested(module, wraps)] if module else []), *nests])
    return paths


def _ordered(
    module: str,
    ats: list[str],
    changes: Mapping[str, Mapping[int, tuple[str, peft.PeftLayer]]],
    order: Order | None,
    problems: list[str],
) -> list[str]:
    """The parameters of one module in the model's order, in which PEFT wraps them. A file tells it by their depth: the
    first one is nested deepest."""
    if len(ats) < 2:
        return ats
    if order is not None:
        known = [f"{module}.{name}".lstrip(".") for name in order(module)]
        return sorted(ats, key=known.index)
    for number in {number for at in ats for number in changes[at]}:
        depths = {at: peft.unnested(changes[at][number][0])[1] for at in ats if number in changes[at]}
        if len(depths) == len(ats):
            return sorted(ats, key=lambda at: -depths[at])
    found = f"parameters of {module!r} ({listing(ats)}) that no one adapter changes all of"
    problems.append(
        sentence(
            found, "their order in the model, in which PEFT nests them", "pass the model (--base on the command line)"
        )
    )
    return ats


def applied(saved: AdapterFiles) -> dict[str, LowRank]:
    """The product of each change by ``at``, as the library that wrote it applies it: PEFT adds that of an attention's
    out-projection ``peft.TIMES`` times.

    Raises:
        AdapterError: of the version of PEFT that wrote it this is not known.
    """
    found = {}
    for path, layer in saved.low.items():
        twice = saved.record is None and peft.attention_of(path) is not None
        if twice and (reason := peft.unsure(saved.peft_config)) is not None:
            raise AdapterError(sentence(f"a change of {layer.at!r}: {reason}", "a known meaning", "use PEFT for it"))
        found[layer.at] = replace(layer.low, scale=layer.scale * peft.TIMES) if twice else layer.low
    return found
