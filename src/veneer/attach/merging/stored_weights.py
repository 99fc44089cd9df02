"""The weights that a merge overwrites, and the copies of their old bits.

    stored_weights(model, name)     every weight, parameter or buffer that an adapter changes
    back_up(weight, new_tensors)    copy the bits of a weight before the merge writes it
    restore(weights)                write the copies back
    bits_before_merge(model, name)  the bits that the weights had when an adapter was attached

The copy is an attribute of the adapter's module that changes the weight (``StoredWeight.keeper``),
not a local variable of ``merge``, so ``unmerge`` can undo a merge that was interrupted.
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
        path, module, name: the module that holds the weight, its path, and the name of the weight.
        keeper: the module of the adapter that changes the weight, and on which a merge keeps the
            weight's old bits. A ``Change`` for a low-rank change, else the ``LayerAdapter``.
        weight_holder: the tensor or, for a packed weight, the object that a merge overwrites; see
            ``bases.weight_of``.
        storage: the way in which the weight is stored (``veneer.bases``).
        full_values: the tensor that replaces the weight in full; None for a low-rank change.
        origin_tensors: the stored tensors of the weight when the adapter was attached, by name.
            None unless other adapters have been merged into the weight since.
    """

    path: str
    module: nn.Module
    name: str
    keeper: Any
    weight_holder: Any
    storage: Storage
    full_values: Tensor | None = None
    origin_tensors: Mapping[str, Tensor] | None = None

    @property
    def full_path(self) -> str:
        return parameter_path(self.path, self.name)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors in which the storage keeps this weight, by the names that the storage gives
        them."""
        self.storage.prepare(self.module)
        return self.storage.stored_tensors(self.weight_holder)

    def write(self, new_tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the stored tensors of the weight, in place, with those of the same names."""
        self.storage.write(self.weight_holder, new_tensors)
        self.storage.prepare(self.module)

    def change(self) -> tuple[LowRank, Tensor | None]:
        """(ΔW, gain) in float64, computed from the weight that the adapter was attached to: a gain
        as in DoRA depends on it. If other adapters have been merged since, that weight is written
        for the computation, and the present one is written back afterwards."""
        if self.origin_tensors is None:
            return self.keeper.resolve_float64(self.weight_holder)
        merged_tensors = {key: tensor.clone() for key, tensor in self.stored_tensors().items()}
        try:
            self.write(self.origin_tensors)
            return self.keeper.resolve_float64(self.weight_holder)
        finally:
            self.write(merged_tensors)


def stored_weights(model: nn.Module, name: str) -> Iterator[StoredWeight]:
    """Every weight that the adapter ``name`` changes. Tied parameters are listed once."""
    for path, module, weight_name, change in changes(model, name):
        yield StoredWeight(
            path, module, weight_name, change, weight_of(module, weight_name), change.storage
        )
    visited_ids: set[int] = set()  # tied parameters have one trained copy: yield it for one of them
    for path, module, layer_adapter in adapters(model, name):
        full_module, base_tensors = layer_adapter.full, {**module._buffers, **module._parameters}
        for tensor_name, full_values in (
            *full_module._parameters.items(),
            *full_module._buffers.items(),
        ):
            weight_holder = None if full_values is None else base_tensors[tensor_name]
            if weight_holder is not None and id(full_values) not in visited_ids:
                visited_ids.add(id(full_values))
                yield StoredWeight(
                    path,
                    module,
                    tensor_name,
                    layer_adapter,
                    weight_holder,
                    BASES["plain"],
                    full_values,
                )


def require_attached_base(model_adapters: ModelAdapters, name: str, action: str) -> None:
    """Raise a MergeError unless the same adapters are merged into the weights as when the adapter
    ``name`` was attached.

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
    """The stored tensors that weights had when the adapter ``name`` was attached: {``id`` of the
    weight (``StoredWeight.weight_holder``): {name: tensor}}. Only weights into which other adapters
    have been merged since, with a backup, are listed.

    Raises:
        MergeError: the adapter that was merged when ``name`` was attached is merged no longer.
    """
    return {
        weight_id: backup_of(weight)
        for weight_id, weight in _merged_since(model, name).items()
        if has_backup(weight)
    }


def without_backup(model: nn.Module, name: str) -> frozenset[int]:
    """The ``id`` of each weight into which another adapter was merged, since ``name`` was attached,
    and whose old bits were not kept (``keep=False``)."""
    return frozenset(
        weight_id
        for weight_id, weight in _merged_since(model, name).items()
        if not has_backup(weight)
    )


def _merged_since(model: nn.Module, name: str) -> dict[int, StoredWeight]:
    """The weights into which other adapters were merged after ``name`` was attached, by their
    ``id``. If several adapters were merged into a weight, it is the ``StoredWeight`` of the first
    of them: its backup holds the bits from the time of the attach."""
    model_adapters = need_adapters(model, name)
    merged_names = model_adapters.merge_order[::-1]  # the last merged one first
    base_name = model_adapters.selections[name].merged_at_attach
    if base_name is not None and base_name not in merged_names:
        require_attached_base(model_adapters, name, "the base of")
    later_names = (
        merged_names if base_name is None else merged_names[: merged_names.index(base_name)]
    )
    return {
        id(weight.weight_holder): weight
        for merged_name in later_names
        for weight in stored_weights(model, merged_name)
    }


def back_up(weight: StoredWeight, new_tensors: Mapping[str, Tensor], digests: bool = True) -> None:
    """Copy a weight's old bits to CPU memory and store them on ``weight.keeper``. An interrupt
    leaves either a full copy or none.

    Args:
        new_tensors: the stored tensors that the merge will write.
        digests: whether to store hashes of ``new_tensors`` too, by which ``unmerge`` detects later
            edits. Copies that only serve to undo a failed merge need none.
    """
    keeper_attributes = weight.keeper.__dict__
    old_tensors = {key: cpu_copy(tensor) for key, tensor in weight.stored_tensors().items()}
    if digests:
        keeper_attributes.setdefault("digests", {})[weight.name] = digest_tensors(new_tensors)
    keeper_attributes.setdefault("backup", {})[weight.name] = old_tensors


def digest_tensors(stored_tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in stored_tensors.items()}


def has_backup(weight: StoredWeight) -> bool:
    return weight.name in weight.keeper.__dict__.get("backup", {})


def backup_of(weight: StoredWeight) -> dict[str, Tensor]:
    """The stored tensors from before the merge, by name: in CPU memory or, for a packed (quantised)
    weight, on the device of the weight."""
    old_tensors = weight.keeper.__dict__["backup"][weight.name]
    present_tensors = weight.stored_tensors() if weight.storage.dense_name is None else {}
    device = next((tensor.device for tensor in present_tensors.values()), None)
    return (
        old_tensors
        if device is None
        else {key: tensor.to(device) for key, tensor in old_tensors.items()}
    )


def restore(weights: Iterable[StoredWeight]) -> None:
    """Write the old bits of these weights back. All of them must have a backup. If writing one
    weight fails, continue with the others, then raise the first error."""
    errors: list[BaseException] = []
    for weight in weights:
        try:
            weight.write(backup_of(weight))
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def drop_backups(weights: Sequence[StoredWeight]) -> None:
    """Delete the backups of these weights. If an interrupt (Ctrl-C) stops the deletion, it is run
    once more, so that no weight keeps a backup."""
    try:
        _drop_backups_once(weights)
    finally:
        _drop_backups_once(weights)


def _drop_backups_once(weights: Sequence[StoredWeight]) -> None:
    for weight in weights:
        for attribute in ("backup", "digests"):
            weight.keeper.__dict__.pop(attribute, None)
