"""Tied weights that an adapter trains in full with values of their own.

A tie is one parameter under several names. Veneer trains it as one. PEFT gives each module in ``modules_to_save`` a
copy, tied or not, and leaves a module that is not among them as it was: its file may hold two values for one weight, or
one value for half of it. Such an adapter computes as PEFT does, each place with its own values, and cannot be merged.
Adapters that add tokens list both embeddings, so these files are common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from veneer.attach.lookup import adapters, parameter_path
from veneer.attach.refusals import holders
from veneer.attach.targets import Names, ParamRef
from veneer.errors import listing, sentence

UNTIE = (
    "untie the base first (config.tie_word_embeddings = False, and a copy for the head: "
    "`model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())`), save it, and merge into that"
)


def apart(names: Names, full: Mapping[str, Mapping[str, Tensor]]) -> frozenset[ParamRef]:
    """The (path, name) of tied parameters to which ``full`` gives values of their own. Equal ones are the tie's."""
    found: set[ParamRef] = set()
    for refs in holders(names).values():
        values = [full[path][name] for path, name in refs if name in full.get(path, ())]
        if values and (len(values) < len(refs) or not all(same(value, values[0]) for value in values)):
            found |= {ref for ref in refs if ref[1] in full.get(ref[0], ())}
    return frozenset(found)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, in whichever dtypes."""
    common = torch.promote_types(one.dtype, other.dtype)
    return one is other or torch.equal(one.to(common), other.to(common))


def torn(model: nn.Module, name: str) -> Iterator[str]:
    """Why the adapter ``name`` cannot be merged: of each tie to which it gives values of their own, in words."""
    trained = {path: part.full._parameters for path, _, part in adapters(model, name) if part.full._parameters}
    for refs in holders(Names(model)).values() if trained else ():
        own = [trained.get(path, {}).get(weight) for path, weight in refs]
        if all(value is own[0] for value in own):
            continue
        there = [parameter_path(*ref) for ref, value in zip(refs, own, strict=True) if value is not None]
        rest = [parameter_path(*ref) for ref, value in zip(refs, own, strict=True) if value is None]
        other = f"one weight with {listing(rest)}" if rest else "one weight"
        yield sentence(f"values of their own for {listing(there)}, {other} in this model", "one value", UNTIE)
