"""The weights that a merge overwrites, and the copies of their old bits.

    stored_weights(model, name)     every weight, parameter or buffer that an adapter changes
    back_up(weight, new)            copy its bits before the merge writes
    restore(weights)                write the copies back
    bits_before_merge(model, name)  the bits that the weights had when an adapter was attached

The copies live on the part of the adapter that changes the weight (``StoredWeight.keeper``), so a
merge that is interrupted can still be undone by ``unmerge``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.attach.layer.lookup import adapters, changes, need_adapters
from veneer.attach.layer.state import ModelAdapters
from veneer.bases import BASES, Storage, weight_of
from veneer.errors import MergeError
from veneer.fileio.hashing import digest
from veneer.fileio.tensors import cpu_copy
from veneer.layers import parameter_path
from veneer.lowrank import LowRank


@dataclass(frozen=True)
class StoredWeight:
    """One weight, parameter or buffer that an adapter changes.

    Fields:
        keeper: the module that changes it and holds its old bits while it is merged: a ``Change``
            for a low-rank change, else the adapter's part at this layer.
        target: the tensor, or the packed weight, that a merge overwrites.
        values: the tensor that replaces the weight in full; None for a low-rank change.
        origin: the stored tensors of the weight as it was when the adapter was attached, where
            other adapters have been merged into it since; else None.
    """

    path: str
    module: nn.Module
    name: str
    keeper: Any
    target: Any
    storage: Storage
    values: Tensor | None = None
    origin: Mapping[str, Tensor] | None = None

    @property
    def full_path(self) -> str:
        return parameter_path(self.path, self.name)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors that the storage keeps for this weight, by its names for them."""
        self.storage.prepare(self.module)
        return self.storage.stored_tensors(self.target)

    def write(self, stored: Mapping[str, Tensor]) -> None:
        self.storage.write(self.target, stored)
        self.storage.prepare(self.module)

    def change(self) -> tuple[LowRank, Tensor | None]:
        """ΔW and the gain, computed from the weight that the adapter was attached to."""
        if self.origin is None:
            return self.keeper.resolve_float64(self.target)
        merged = {key: tensor.clone() for key, tensor in self.stored_tensors().items()}
        try:
            self.write(self.origin)
            return self.keeper.resolve_float64(self.target)
        finally:
            self.write(merged)


def stored_weights(model: nn.Module, name: str) -> Iterator[StoredWeight]:
    """Every weight that the adapter ``name`` changes. Tied parameters are listed once."""
    for path, module, weight, change in changes(model, name):
        yield StoredWeight(path, module, weight, change, weight_of(module, weight), change.storage)
    visited: set[int] = set()  # tied parameters have one copy, and are written once
    for path, module, layer_adapter in adapters(model, name):
        full, base = layer_adapter.full, {**module._buffers, **module._parameters}
        for weight, values in (*full._parameters.items(), *full._buffers.items()):
            if values is not None and base[weight] is not None and id(values) not in visited:
                visited.add(id(values))
                yield StoredWeight(
                    path, module, weight, layer_adapter, base[weight], BASES["plain"], values
                )


def require_attached_base(attached: ModelAdapters, name: str, action: str) -> None:
    """Raise a MergeError unless the weights are those that the adapter ``name`` was attached to.

    ``action`` opens the text of the error: "a merge of", for instance.
    """
    on, merged = attached.selections[name].on, attached.merged
    if on == merged:
        return
    if name in attached.chain:
        raise MergeError(
            f"{action} {name!r}, merged already",
            "an unmerged adapter",
            "call veneer.unmerge(model) first",
        )
    if merged is None:
        problem = f"{action} {name!r}, attached while {on!r} was merged, which it no longer is"
        raise MergeError(problem, "the weights that it was attached to", f"merge {on!r} again")
    merged_then = "nothing" if on is None else repr(on)
    problem = (
        f"{action} {name!r}, attached while {merged_then} was merged, and {merged!r}, merged"
        " already"
    )
    do = "call veneer.unmerge(model) first; `veneer compose` makes one adapter of several"
    raise MergeError(problem, "the weights that it was attached to", do)


def bits_before_merge(model: nn.Module, name: str) -> dict[int, dict[str, Tensor]]:
    """The stored tensors that weights had when the adapter ``name`` was attached, by the identity
    of the weight. Only weights into which other adapters have been merged since are listed."""
    return {
        key: backup_of(weight)
        for key, weight in _merged_since(model, name).items()
        if has_backup(weight)
    }


def without_backup(model: nn.Module, name: str) -> frozenset[int]:
    """The identities of the weights that were merged since the adapter was attached without a copy
    of their old bits (``keep=False``)."""
    return frozenset(
        key for key, weight in _merged_since(model, name).items() if not has_backup(weight)
    )


def _merged_since(model: nn.Module, name: str) -> dict[int, StoredWeight]:
    """The weights into which an adapter was merged after ``name`` was attached, by their identity.
    Each comes from the first such merge, whose backup is the oldest."""
    attached = need_adapters(model, name)
    merges, on = attached.merges(), attached.selections[name].on
    if on is not None and on not in merges:
        require_attached_base(attached, name, "the base of")
    later_merges = merges if on is None else merges[: merges.index(on)]
    return {
        id(weight.target): weight
        for merged in later_merges
        for weight in stored_weights(model, merged)
    }


def back_up(weight: StoredWeight, new: Mapping[str, Tensor], digests: bool = True) -> None:
    """Copy a weight's old bits, all in one step.

    ``digests``: also hash the new stored tensors ``new``, with which ``unmerge`` detects later
    edits. Copies that only undo a failed merge need no hashes.
    """
    keeper = weight.keeper.__dict__
    bits = {key: cpu_copy(tensor) for key, tensor in weight.stored_tensors().items()}
    if digests:
        keeper.setdefault("digests", {})[weight.name] = digest_tensors(new)
    keeper.setdefault("backup", {})[weight.name] = bits


def digest_tensors(stored: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in stored.items()}


def has_backup(weight: StoredWeight) -> bool:
    return weight.name in weight.keeper.__dict__.get("backup", {})


def backup_of(weight: StoredWeight) -> dict[str, Tensor]:
    """The bits from before the merge: in CPU memory, but for a packed weight on its own device."""
    bits = weight.keeper.__dict__["backup"][weight.name]
    stored = weight.stored_tensors() if weight.storage.dense_name is None else {}
    device = next((tensor.device for tensor in stored.values()), None)
    return bits if device is None else {key: tensor.to(device) for key, tensor in bits.items()}


def restore(weights: Iterable[StoredWeight]) -> None:
    """Write the old bits back into all of these weights. If one fails, continue with the others,
    then raise the first error."""
    failures: list[BaseException] = []
    for weight in weights:
        try:
            weight.write(backup_of(weight))
        except BaseException as error:
            failures.append(error)
    if failures:
        raise failures[0]


def drop_backups(weights: Sequence[StoredWeight]) -> None:
    """Forget the old bits of these weights, even if an interrupt arrives in the middle."""
    try:
        _drop_backups_once(weights)
    finally:
        _drop_backups_once(weights)


def _drop_backups_once(weights: Sequence[StoredWeight]) -> None:
    for weight in weights:
        for attribute in ("backup", "digests"):
            weight.keeper.__dict__.pop(attribute, None)
