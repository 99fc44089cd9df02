"""Fold an adapter into the weights of a live model, and take it out again to the very bits.

    W' = round(W + ΔW)      in float64, rounded once to the weight's dtype

All new weights are made and checked before the first is written. The old ones are kept beside the adapter (as buffers
that no state dict contains), so that ``unmerge`` restores bits instead of subtracting: W' - ΔW is W only when nothing
was rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.adapted import LayerAdapter
from veneer.attach import adapters, need_group, only_name, unwrap
from veneer.bases import BASES, Storage
from veneer.errors import MergeError, listing, raise_all, sentence
from veneer.hashing import digest


@dataclass(frozen=True)
class LayerMerge:
    """What a merge did to one parameter: ``change`` is ‖ΔW‖ / ‖W‖, ``retention`` the share of ΔW that the rounded
    weight realises."""

    path: str
    change: float
    retention: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. ``str(report)`` is a short text for people."""

    adapter: str
    layers: tuple[LayerMerge, ...]

    @property
    def retention(self) -> float:
        """The worst layer's share of the change that survived rounding; 1.0 where nothing changed."""
        return min((layer.retention for layer in self.layers), default=1.0)

    def __str__(self) -> str:
        worst = min(self.layers, key=lambda layer: layer.retention, default=None)
        if worst is None:
            return f"merged {self.adapter!r}: nothing to change"
        median = sorted(layer.retention for layer in self.layers)[len(self.layers) // 2]
        return (
            f"merged {self.adapter!r} into {len(self.layers)} parameters: {median:.2%} of the change kept after "
            f"rounding (median), {worst.retention:.2%} at worst ({worst.path}, where it is {worst.change:.1e} of the "
            "weight)"
        )


@dataclass(frozen=True)
class _Write:
    """One parameter's new content, ready to be written."""

    path: str
    name: str
    adapter: LayerAdapter
    parameter: Tensor
    storage: Storage
    encoded: Tensor
    report: LayerMerge | None


def merge(model: nn.Module, name: str | None = None, *, keep: bool = True) -> MergeReport:
    """Write ``W + ΔW``, rounded once, into the weights of ``model``, in place: parameters keep their identity and
    their ties.

    While merged, the model runs at the base's speed, with the adapter's outputs; a call that selects anything else
    raises.

    Args:
        name: the adapter; None takes the only one.
        keep: keep the old weights, which ``unmerge`` needs (as much memory again as the weights that change).

    Returns:
        per parameter how large the change was, and how much of it the weight's dtype could hold.

    Raises:
        MergeError: a merged weight would not be finite, or an adapter is merged already. Nothing was changed.
        SelectionError: no such adapter.
    """
    model = unwrap(model)
    name = only_name(model, name)
    group = need_group(model, name)
    if group.merged is not None:
        raise MergeError(
            sentence(f"{group.merged!r}, merged already", "an unmerged model", "call veneer.unmerge(model) first")
        )
    writes: list[_Write] = []
    problems: list[str] = []
    with torch.no_grad():
        for path, module, adapter in adapters(model, name):
            writes += _writes(path, module, adapter, problems)
    raise_all(MergeError, f"Nothing was merged of {name!r}", problems)
    done: list[_Write] = []
    try:
        for write in writes:
            _keep(write)
            done.append(write)
            write.storage.write(write.parameter, write.encoded)
    except BaseException:
        for write in done:
            _restore(write.adapter, write.name, write.parameter)
        for write in writes:
            _forget(write.adapter)
        raise
    if not keep:
        for write in writes:
            _forget(write.adapter)
    group.merged = name
    return MergeReport(name, tuple(write.report for write in writes if write.report))


def unmerge(model: nn.Module) -> None:
    """Restore the bits that the weights had before ``merge``.

    Raises:
        MergeError: nothing is merged; the old weights were not kept; or a merged weight was edited since, so that
            restoring would lose the edit. Nothing was changed.
    """
    model = unwrap(model)
    group = need_group(model)
    if group.merged is None:
        raise MergeError(sentence("a model in which nothing is merged", "a merged adapter", "call veneer.merge first"))
    merged = list(adapters(model, group.merged))
    kept = [(path, module, adapter) for path, module, adapter in merged if "backup" in adapter._modules]
    if merged and len(kept) < len(merged):
        found = f"{group.merged!r}, merged with keep=False"
        raise MergeError(sentence(found, "the weights from before the merge", "load the base again"))
    edited = [
        f"{path}.{name}"
        for path, module, adapter in kept
        for name in originals(adapter)
        if digest(_own(module, name)) != adapter.digests[name]
    ]
    if edited:
        found = f"weights edited since the merge (also by .to(dtype)): {listing(edited)}"
        raise MergeError(
            sentence(found, "the merged weights", "undo the edit, or detach(model, keep_merged=True) to keep it")
        )
    for _, module, adapter in kept:
        for name in list(originals(adapter)):
            _restore(adapter, name, _own(module, name))
        _forget(adapter)
    group.merged = None


def originals(adapter: LayerAdapter) -> dict[str, Tensor]:
    """The weights that a merge of ``adapter`` replaced, by name; empty while it is not merged."""
    backup = adapter._modules.get("backup")
    return cast(dict[str, Tensor], dict(backup._buffers)) if backup is not None else {}


def _writes(path: str, module: nn.Module, adapter: LayerAdapter, problems: list[str]) -> Iterator[_Write]:
    new: dict[str, Tensor] = {}
    if adapter.layer is not None:
        weight: Any = module._parameters[adapter.layer.weight]
        low, gain = adapter.resolve(weight)
        new[adapter.layer.weight] = adapter.changed(weight, low, gain, torch.float64)
    new |= {name: value.double() for name, value in adapter.full._parameters.items() if value is not None}
    for name, value in adapter.full._buffers.items():  # running statistics and the like: copied as they are
        buffer: Any = module._buffers[name]
        yield _Write(path, name, adapter, buffer, BASES["plain"], value.detach().clone(), None)
    for name, values in new.items():
        parameter: Any = module._parameters[name]
        storage = adapter.storage if adapter.layer and name == adapter.layer.weight else BASES["plain"]
        encoded = storage.encode(parameter, values)
        if not encoded.isfinite().all():
            found = f"{path}.{name}: W + ΔW is not finite in {encoded.dtype}"
            problems.append(sentence(found, "finite weights", "check the adapter for NaN or overflow"))
            continue
        report = _report(f"{path}.{name}".lstrip("."), storage.dense(parameter).double(), values, encoded.double())
        yield _Write(path, name, adapter, parameter, storage, encoded, report)


def _report(path: str, old: Tensor, exact: Tensor, rounded: Tensor) -> LayerMerge:
    change, realised = exact - old, rounded - old
    size = change.norm().item()
    retention = ((change * realised).sum() / (change * change).sum()).item() if size else 1.0
    base = old.norm().item()
    return LayerMerge(path, size / base if base else float(size > 0), retention)


def _keep(write: _Write) -> None:
    adapter, old = write.adapter, write.parameter.detach().clone()
    if "backup" not in adapter._modules:
        adapter.backup, adapter.digests = nn.Module(), {}
    adapter._modules["backup"].register_buffer(write.name, old, persistent=False)
    adapter.digests[write.name] = digest(write.encoded)


def _restore(adapter: LayerAdapter, name: str, parameter: Tensor) -> None:
    is_weight = adapter.layer is not None and name == adapter.layer.weight
    storage = adapter.storage if is_weight else BASES["plain"]
    storage.write(parameter, originals(adapter)[name])


def _own(module: nn.Module, name: str) -> Tensor:
    return {**module._buffers, **module._parameters}[name]


def _forget(adapter: LayerAdapter) -> None:
    adapter._modules.pop("backup", None)
    adapter.__dict__.pop("digests", None)
