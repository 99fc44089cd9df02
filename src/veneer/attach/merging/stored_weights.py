"""The weights that a merge overwrites, and the copies of their old bits.

    stored_weights(model, name)     every weight, parameter or buffer that an adapter changes
    back_up(weight, new)            copy the bits of a weight before the merge writes it
    restore(weights)                write the copies back
    bits_before_merge(model, name)  the bits that the weights had when an adapter was attached

The module of the adapter that changes a weight keeps the copy (``StoredWeight.keeper``), so an
interrupted merge can still be undone by ``unmerge``.
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
        path, name: the path of the module that holds the weight, and the name of the weight.
        keeper: the module that changes the weight and keeps its old bits while it is merged. It is
            a ``Change`` for a low-rank change, else the ``LayerAdapter``.
        target: the tensor, or the packed weight, that a merge overwrites.
        values: the tensor that replaces the weight in full; None for a low-rank change.
        origin: the stored tensors of the weight at the time when the adapter was attached. None
            unless other adapters have been merged into the weight since.
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
        """The tensors in which the storage keeps this weight, by the names that the storage gives
        them."""
        self.storage.prepare(self.module)
        return self.storage.stored_tensors(self.target)

    def write(self, stored: Mapping[str, Tensor]) -> None:
        self.storage.write(self.target, stored)
        self.storage.prepare(self.module)

    def change(self) -> tuple[LowRank, Tensor | None]:
        """(ΔW, gain), computed from the weight that the adapter was attached to."""
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
    visited: set[int] = set()  # tied parameters have one copy, which is written once
    for path, module, layer_adapter in adapters(model, name):
        full_module, base_tensors = layer_adapter.full, {**module._buffers, **module._parameters}
        for tensor_name, values in (
            *full_module._parameters.items(),
            *full_module._buffers.items(),
        ):
            target = None if values is None else base_tensors[tensor_name]
            if target is not None and id(values) not in visited:
                visited.add(id(values))
                yield StoredWeight(
                    path, module, tensor_name, layer_adapter, target, BASES["plain"], values
                )


def require_attached_base(model_adapters: ModelAdapters, name: str, action: str) -> None:
    """Raise a MergeError unless the weights are those that the adapter ``name`` was attached to.

    ``action`` is the beginning of the error text, such as "a merge of".
    """
    base_name, merged = model_adapters.selections[name].merged_at_attach, model_adapters.merged
    if base_name == merged:
        return
    if name in model_adapters.merge_order:
        raise MergeError(
            f"{action} {name!r}, merged already",
            "an unmerged adapter",
            "call veneer.unmerge(model) first",
        )
    if merged is None:
        raise MergeError(
            f"{action} {name!r}, attached while {base_name!r} was merged, which it no longer is",
            "the weights that it was attached to",
            f"merge {base_name!r} again",
        )
    merged_then = "nothing" if base_name is None else repr(base_name)
    raise MergeError(
        f"{action} {name!r}, attached while {merged_then} was merged, and {merged!r}, merged"
        " already",
        "the weights that it was attached to",
        "call veneer.unmerge(model) first; `veneer compose` makes one adapter of several",
    )


def bits_before_merge(model: nn.Module, name: str) -> dict[int, dict[str, Tensor]]:
    """The stored tensors that weights had when the adapter ``name`` was attached, by the ``id`` of
    the weight. Only weights into which other adapters have been merged since are listed."""
    return {
        key: backup_of(weight)
        for key, weight in _merged_since(model, name).items()
        if has_backup(weight)
    }


def without_backup(model: nn.Module, name: str) -> frozenset[int]:
    """The ``id`` of each weight that was merged, since the adapter was attached, without a copy of
    its old bits (``keep=False``)."""
    return frozenset(
        key for key, weight in _merged_since(model, name).items() if not has_backup(weight)
    )


def _merged_since(model: nn.Module, name: str) -> dict[int, StoredWeight]:
    """The weights into which another adapter was merged after ``name`` was attached, by their
    ``id``. Each is described by the first such merge, whose backup is the oldest."""
    model_adapters = need_adapters(model, name)
    merged_names = model_adapters.merge_order[::-1]  # the last merged one first
    base_name = model_adapters.selections[name].merged_at_attach
    if base_name is not None and base_name not in merged_names:
        require_attached_base(model_adapters, name, "the base of")
    later_names = (
        merged_names if base_name is None else merged_names[: merged_names.index(base_name)]
    )
    return {
        id(weight.target): weight
        for merged_name in later_names
        for weight in stored_weights(model, merged_name)
    }


def back_up(weight: StoredWeight, new: Mapping[str, Tensor], digests: bool = True) -> None:
    """Copy a weight's old bits, so that an interrupt leaves either a full copy or none.

    ``digests``: whether to hash the new stored tensors ``new`` too. ``unmerge`` detects later edits
    by these hashes; copies that only undo a failed merge need none.
    """
    keeper_attributes = weight.keeper.__dict__
    bits = {key: cpu_copy(tensor) for key, tensor in weight.stored_tensors().items()}
    if digests:
        keeper_attributes.setdefault("digests", {})[weight.name] = digest_tensors(new)
    keeper_attributes.setdefault("backup", {})[weight.name] = bits


def digest_tensors(stored: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in stored.items()}


def has_backup(weight: StoredWeight) -> bool:
    return weight.name in weight.keeper.__dict__.get("backup", {})


def backup_of(weight: StoredWeight) -> dict[str, Tensor]:
    """The bits from before the merge. They are in CPU memory, or, for a packed weight, on the
    device of the weight."""
    bits = weight.keeper.__dict__["backup"][weight.name]
    stored = weight.stored_tensors() if weight.storage.dense_name is None else {}
    device = next((tensor.device for tensor in stored.values()), None)
    return bits if device is None else {key: tensor.to(device) for key, tensor in bits.items()}


def restore(weights: Iterable[StoredWeight]) -> None:
    """Write the old bits of these weights back. If this fails for one weight, continue with the
    others, then raise the first error."""
    failures: list[BaseException] = []
    for weight in weights:
        try:
            weight.write(backup_of(weight))
        except BaseException as error:
            failures.append(error)
    if failures:
        raise failures[0]


def drop_backups(weights: Sequence[StoredWeight]) -> None:
    """Delete the old bits of these weights. If an interrupt ends this, it starts again, so that no
    weight keeps its old bits."""
    try:
        _drop_backups_once(weights)
    finally:
        _drop_backups_once(weights)


def _drop_backups_once(weights: Sequence[StoredWeight]) -> None:
    for weight in weights:
        for attribute in ("backup", "digests"):
            weight.keeper.__dict__.pop(attribute, None)
