"""Fold an adapter into the weights of a live model, and take it out again to the very bits.

    W' = round(gain ⊙ (W + ΔW))      to the weight's dtype, once

Rounding to nearest would lose most of a small change of 16-bit weights, which lie on the grid already; so where it
would, a weight is rounded so that what the adapter reads survives (``kernels/error_feedback.py``). Storages with a grid
of their own (packed ones) round as they do.

One weight at a time is made, checked, kept and overwritten, so that no more than one is in memory twice. What is found
wrong, or goes wrong, puts all of them back: the old bits are kept beside the adapter (outside of what state dicts and
``.to`` see), so that ``unmerge`` restores instead of subtracting: W' - ΔW is W only when nothing was rounded. Each is
kept before it is overwritten, and the model counts as merged until the last is back, so that whatever interrupts either
way, ``unmerge`` can finish it. With ``keep=False`` they are kept too, in a temporary file, until the last is written.
Rejected there: to make all weights twice, first to check and then to write, which takes twice as long and could not put
back what it wrote if the second pass fails.

Threads that merge, unmerge, attach and detach take turns. Threads that call the model do not wait for a merge, and a
call that runs meanwhile sees weights of which some are merged: let no call run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import layer_states, walk, weight_of
from veneer.attach.change import Change
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.lookup import adapters, changes, need_adapters, only_name, parameter_path, unwrap
from veneer.attach.state import ModelAdapters, in_turn
from veneer.attach.weight_tying import torn
from veneer.bases import BASES, Storage
from veneer.distributed import spread_problem
from veneer.errors import MergeError, listing, raise_all, sentence
from veneer.fileio.hashing import digest
from veneer.fileio.spill import Spill, Spilled, aside
from veneer.kernels.rounding import Folded, fold, known_rounding
from veneer.lowrank import LowRank
from veneer.precision import double, has_float64


@dataclass(frozen=True)
class LayerMerge:
    """What a merge did to one parameter: ``change`` is ‖ΔW‖ / ‖W‖, ``retention`` the share of ΔW that the rounded
    weight realises, ``rounding`` how that was rounded: "nearest", "faithful", or "storage" (its own way)."""

    path: str
    change: float
    retention: float
    rounding: str


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
        counts = Counter(layer.rounding for layer in self.layers)
        words = {"faithful": "rounded faithfully", "storage": "rounded as their storage does"}
        others = "".join(f"; {counts[name]} {text}" for name, text in words.items() if counts[name])
        return (
            f"merged {self.adapter!r} into {len(self.layers)} parameters: {median:.2%} of the change kept after "
            f"rounding (median), {worst.retention:.2%} at worst ({worst.path}, where it is {worst.change:.1e} of the "
            f"weight){others}\n"
            "the model is still attached; handle.detach(keep_merged=True) leaves a plain one with these weights, "
            "which other libraries can save and quantise"
        )


@dataclass(frozen=True)
class _StoredWeight:
    """One weight, parameter or buffer that an adapter changes, and the part that keeps its old bits while merged."""

    path: str
    name: str
    module: nn.Module
    keeper: Change | LayerAdapter
    target: Any
    storage: Storage

    def stored(self) -> dict[str, Tensor]:
        self.storage.prepare(self.module)
        return self.storage.stored(self.target)

    def write(self, stored: Mapping[str, Tensor]) -> None:
        self.storage.write(self.target, stored)
        self.storage.prepare(self.module)

    @property
    def where(self) -> str:
        return parameter_path(self.path, self.name)


@dataclass(frozen=True)
class _Write:
    """The new content of one stored weight, ready to be written."""

    stored_weight: _StoredWeight
    stored: dict[str, Tensor]
    report: LayerMerge | None


@dataclass(frozen=True)
class _Full:
    """Values that replace a weight's: in float64, or of a buffer as they are."""

    stored_weight: _StoredWeight
    values: Tensor


@dataclass(frozen=True)
class _Low:
    """A low-rank change of a weight, [g, out, in] by ``dims``."""

    stored_weight: _StoredWeight
    change: Change


@in_turn
def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    keep: bool = True,
    rounding: str = "auto",
    inputs: Mapping[str, Tensor] | None = None,
) -> MergeReport:
    """Write ``W + ΔW``, rounded once, into the weights of ``model``, in place: parameters keep their identity and
    their ties.

    While merged, the model runs at the base's speed, with the adapter's outputs; a call that selects anything else
    raises. No thread may call the model while this runs, nor while ``unmerge`` does. ``detach(keep_merged=True)`` makes
    it a plain model, which it is not before: libraries that go by a layer's exact class, as ``torch.ao.quantization``
    does, pass adapted layers by.

    Args:
        name: the adapter; None takes the only one.
        keep: keep the old weights, which ``unmerge`` needs: as much memory of the processor as the weights that change.
            Without, they lie in a temporary file while this runs.
        rounding: of 16-bit weights. "nearest": each number to the nearest. "faithful": each to one of its two
            neighbours, so that the errors cancel on what the adapter reads; takes several times as long, a few seconds
            for 100 million weights. "auto": faithful for each weight of which nearest would keep less than 99 % of the
            change (or more than 101 %). Weights of more bits, those that are trained in full and embeddings of bounded
            norm are always rounded to nearest, packed ones (bitsandbytes, torchao, GGUF) by their storage's own rule.
        inputs: by the path of a weight, Σ xᵀx of its inputs ([g, in, in], in any scale): faithful rounding keeps the
            directions in which they vary most right, too.

    Returns:
        per parameter how large the change was, how much of it the weight's dtype could hold, and how it was rounded.

    Raises:
        ConfigError: another rounding.
        MergeError: a merged weight would not be finite, an adapter is merged already, this one has values of their own
            for the names of a tied weight, or the weights are spread over processes. Every weight has the bits that it
            had before.
        SelectionError: no such adapter.
    """
    model = unwrap(model)
    name = only_name(model, name)
    attached = need_adapters(model, name)
    if attached.merged is not None:
        raise MergeError(
            sentence(f"{attached.merged!r}, merged already", "an unmerged model", "call veneer.unmerge(model) first")
        )
    _must_be_whole(model, "a merge")
    known_rounding(rounding)
    return _merge_all(model, attached, name, keep, rounding, dict(inputs or {}))


def _merge_all(
    model: nn.Module, attached: ModelAdapters, name: str, keep: bool, rounding: str, moments: dict[str, Tensor]
) -> MergeReport:
    """Write all weights, or leave all of them as they are."""
    parts, problems = list(_parts(model, name)), [*_untied(model, name), *torn(model, name)]
    stored_weights, spill = [part.stored_weight for part in parts], None if keep else Spill()
    try:
        _forget(stored_weights)  # what an interrupt in the last line of an unmerge has left
        attached.merging, attached.merged = True, name
        reports = _write_all(parts, rounding, moments, spill, problems)
        raise_all(MergeError, f"Nothing was merged of {name!r}", problems)
        attached.merging = False
    except BaseException:
        if attached.merged is not None:
            _restore([stored_weight for stored_weight in stored_weights if _is_kept(stored_weight)])
            attached.merged = None
        _forget(stored_weights)
        attached.merging = False
        raise
    if not keep:
        _forget(stored_weights)
    return MergeReport(name, tuple(reports))


def _write_all(
    parts: Sequence[_Low | _Full],
    rounding: str,
    moments: dict[str, Tensor],
    spill: Spill | None,
    problems: list[str],
) -> list[LayerMerge]:
    """Write each weight as long as there are no problems, once its old bits are kept; then only look for more."""
    reports: list[LayerMerge] = []
    for part in parts:
        moment = moments.pop(part.stored_weight.where, None) if isinstance(part, _Low) else None
        with torch.no_grad():
            for write in _written(part, rounding, moment, problems):
                if not problems:
                    _keep(write, spill)
                    write.stored_weight.write(write.stored)
                reports += [write.report] if write.report else []
    problems += [
        sentence(f"inputs of {path!r}", "paths of weights that the adapter changes at a low rank", "leave it out")
        for path in moments
    ]
    return reports


@in_turn
def unmerge(model: nn.Module) -> None:
    """Restore the bits that the weights had before ``merge``. If it is interrupted (Ctrl-C, memory), the next call
    finishes it.

    Raises:
        MergeError: nothing is merged; the old weights were not kept; or a merged weight was edited since, so that
            restoring would lose the edit. Nothing was changed.
    """
    model = unwrap(model)
    attached = need_adapters(model)
    if attached.merged is None:
        raise MergeError(sentence("a model in which nothing is merged", "a merged adapter", "call veneer.merge first"))
    _must_be_whole(model, "an unmerge")
    every = [part.stored_weight for part in _parts(model, attached.merged)]
    stored_weights = [stored_weight for stored_weight in every if _is_kept(stored_weight)]
    if (
        len(stored_weights) < len(every) and not attached.merging
    ):  # of a merge that was cut off, the others are as they were
        found = f"{attached.merged!r}, merged with keep=False"
        raise MergeError(sentence(found, "the weights from before the merge", "load the base again"))
    merged, edited = [], []
    for stored_weight in stored_weights:
        found, expected = _digest(stored_weight.stored()), _expected(stored_weight)
        if expected is None or found == expected:
            merged.append(stored_weight)
        elif found != (kept := _digest(_kept(stored_weight))):  # unless an unmerge that was interrupted has restored it
            between = all(found[key] in (kept.get(key), expected.get(key)) for key in found)
            (merged if between else edited).append(stored_weight)
    if edited:
        paths = listing(stored_weight.where for stored_weight in edited)
        found = f"weights edited since the merge (also by .to(dtype)): {paths}"
        raise MergeError(
            sentence(found, "the merged weights", "undo the edit, or detach(model, keep_merged=True) to keep it")
        )
    _restore(merged)
    attached.merged = None  # what is kept has no meaning from here on
    _forget(every)
    attached.merging = False


def _must_be_whole(model: nn.Module, what: str) -> None:
    do = "save the adapter, and merge it in one process, before the model is sharded or with `veneer merge`"
    if problem := spread_problem((module for _, module in walk(model)), what, do):
        raise MergeError(problem)


def kept_bits(model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """What the weights held before ``merge``, as their storage names it, by the identity of the weight. Whichever
    adapter is merged, every other one was made for these too."""
    attached = need_adapters(model)
    stored_weights = [] if attached.merged is None else [part.stored_weight for part in _parts(model, attached.merged)]
    return {
        id(stored_weight.target): _kept(stored_weight) for stored_weight in stored_weights if _is_kept(stored_weight)
    }


def unkept(model: nn.Module) -> frozenset[int]:
    """The identities of merged weights of which nobody has what they held before (``keep=False``)."""
    attached = need_adapters(model)
    stored_weights = [] if attached.merged is None else [part.stored_weight for part in _parts(model, attached.merged)]
    return frozenset(id(stored_weight.target) for stored_weight in stored_weights if not _is_kept(stored_weight))


def _parts(model: nn.Module, name: str) -> Iterator[_Low | _Full]:
    """All that an adapter changes."""
    for path, module, weight, change in changes(model, name):
        yield _Low(_StoredWeight(path, weight, module, change, weight_of(module, weight), change.storage), change)
    seen: set[int] = set()  # tied parameters have one copy, and are written once
    for path, module, part in adapters(model, name):
        for own, value in part.full._parameters.items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                stored_weight = _StoredWeight(path, own, module, part, module._parameters[own], BASES["plain"])
                yield _Full(stored_weight, value)
        for own, value in part.full._buffers.items():  # running statistics and the like: copied as they are
            assert value is not None
            yield _Full(_StoredWeight(path, own, module, part, module._buffers[own], BASES["plain"]), value)


def _untied(model: nn.Module, name: str) -> Iterator[str]:
    """Weights that were one with another module's when the adapter was attached, and no longer are: a merge, which
    writes once, would miss them."""
    first: dict[int, tuple[str, Any]] = {}
    for path, module, layer_state in layer_states(model):
        part = layer_state.get(name)
        if part is None:
            continue
        for own, value in (*part.changes.items(), *part.full._parameters.items()):
            where, weight = parameter_path(path, own), weight_of(module, own)
            other, target = first.setdefault(id(value), (where, weight))
            if weight is not target and not _same_memory(weight, target):
                found = f"{where!r} and {other!r}, one weight when attached, untied since"
                do = "tie them again (`to_empty`, and loading with `assign=True`, untie)"
                yield sentence(found, "one weight", do)


def _same_memory(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.data_ptr() == other.data_ptr() != 0


def _written(part: _Low | _Full, rounding: str, moment: Tensor | None, problems: list[str]) -> Iterator[_Write]:
    stored_weight = part.stored_weight
    if (
        isinstance(stored_weight.target, Tensor)
        and stored_weight.target.is_inference()
        and not torch.is_inference_mode_enabled()
    ):
        found = f"{stored_weight.where}, made under torch.inference_mode, which torch lets nobody write outside it"
        problems.append(sentence(found, "a weight that can be written", "merge under torch.inference_mode too"))
    elif stored_weight.storage.dense_name is None and not has_float64(
        device := stored_weight.storage.dense(stored_weight.target).device
    ):
        found = f"{stored_weight.where}, a weight that is stored packed, on {device}, which has no float64"
        problems.append(sentence(found, "a device with float64", 'move the model for the merge: model.to("cpu")'))
    elif isinstance(part, _Low):
        yield from _folded(part, rounding, moment, problems)
    elif not isinstance(stored_weight.target, nn.Parameter) and isinstance(stored_weight.target, Tensor):
        yield _Write(stored_weight, {"values": part.values.detach().clone()}, None)
    else:
        yield from _encoded(stored_weight, double(part.values), problems)


def _folded(part: _Low, rounding: str, moment: Tensor | None, problems: list[str]) -> Iterator[_Write]:
    """A weight that is stored as dense numbers goes through ``fold``, tile by tile. Float64 on the whole is left for
    what the storage or the layer makes more of."""
    stored_weight, change = part.stored_weight, part.change
    stored_weight.storage.prepare(stored_weight.module)
    low, gain = change.exactly(stored_weight.target)
    dense, name = stored_weight.storage.dense(stored_weight.target).detach(), stored_weight.storage.dense_name
    ours = type(dense) in (Tensor, nn.Parameter)  # not one that is spread over processes
    if name is None or not ours or change.layer.apply_forward_rewrite(stored_weight.module, dense) is not dense:
        if moment is not None:
            found = f"{stored_weight.where}: inputs= of a weight that is rounded as it is stored or read"
            problems.append(sentence(found, "none: it has no faithful rounding", "leave it out"))
        exact = change.changed(stored_weight.target, low, gain, torch.float64)
        yield from _encoded(stored_weight, change.layer.apply_forward_rewrite(stored_weight.module, exact), problems)
        return
    weight = change.layer.unfold(dense, change.dims)
    square = len(weight), *[weight.shape[2]] * 2
    if moment is not None and (moment.shape != square or not moment.isfinite().all()):
        what = "with numbers that are not finite" if moment.shape == square else f"of shape {tuple(moment.shape)}"
        found, expected = f"{stored_weight.where}: inputs= {what}", f"Σ xᵀx of shape {square}, finite"
        problems.append(sentence(found, expected, "give that of the inputs of this weight"))
        return
    folded = fold_change(change, weight, low, gain, rounding=rounding, inputs=moment)
    if not folded.finite:
        problems.append(_not_finite(stored_weight, dense.dtype))
        return
    report = LayerMerge(stored_weight.where, folded.change, folded.retention, folded.rounding)
    yield _Write(stored_weight, {name: change.layer.fold(folded.weight, dense.shape)}, report)


def fold_change(change: Change, weight: Tensor, low: LowRank, gain: Tensor | None, **options: Any) -> Folded:
    """``fold`` for a weight of this change's layer, [g, out, in], or for a part of it."""
    # What reads an index knows no direction of inputs: there the change is in the outputs.
    side = "inputs" if change.layer.drops_input else "outputs"
    return fold(weight, low, gain, side=side, **options)


def _encoded(stored_weight: _StoredWeight, values: Tensor, problems: list[str]) -> Iterator[_Write]:
    try:
        stored = stored_weight.storage.encode(stored_weight.target, values)
    except MergeError as error:
        problems.append(f"{stored_weight.where}: {error}")
        return
    rounded = stored_weight.storage.decode(stored_weight.target, stored)
    if not rounded.isfinite().all():
        problems.append(_not_finite(stored_weight, rounded.dtype))
        return
    rounding = "storage" if stored_weight.storage.dense_name is None else "nearest"
    old = double(stored_weight.storage.dense(stored_weight.target))
    yield _Write(stored_weight, stored, _report(stored_weight.where, old, values, double(rounded), rounding))


def _not_finite(stored_weight: _StoredWeight, dtype: torch.dtype) -> str:
    found = f"{stored_weight.where}: W + ΔW is not finite in {dtype}"
    return sentence(found, "finite weights", "check the adapter for NaN or overflow")


def _report(path: str, old: Tensor, exact: Tensor, rounded: Tensor, rounding: str) -> LayerMerge:
    change, realised = exact - old, rounded - old
    size = change.norm().item()
    retention = ((change * realised).sum() / (change * change).sum()).item() if size else 1.0
    base = old.norm().item()
    return LayerMerge(path, size / base if base else float(size > 0), retention, rounding)


def _keep(write: _Write, spill: Spill | None = None) -> None:
    """Put a weight's old bits aside, all of them in one step. In ``spill`` they are for a failure alone, and
    nobody will ask whether the merged weight was edited."""
    stored_weight = write.stored_weight
    bits = {
        key: aside(tensor) if spill is None else spill.put(tensor) for key, tensor in stored_weight.stored().items()
    }
    own = stored_weight.keeper.__dict__
    if spill is None:
        own.setdefault("digests", {})[stored_weight.name] = _digest(write.stored)
    own.setdefault("backup", {})[stored_weight.name] = bits


def _digest(stored: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in stored.items()}


def _expected(stored_weight: _StoredWeight) -> dict[str, str] | None:
    return stored_weight.keeper.__dict__.get("digests", {}).get(stored_weight.name)


def _is_kept(stored_weight: _StoredWeight) -> bool:
    return stored_weight.name in stored_weight.keeper.__dict__.get("backup", {})


def _kept(stored_weight: _StoredWeight) -> dict[str, Tensor]:
    """The bits from before the merge, in memory of the processor; those of a packed weight, whose parts are read
    together, on its device."""
    bits = stored_weight.keeper.__dict__["backup"][stored_weight.name]
    bits = {key: one.read() if isinstance(one, Spilled) else one for key, one in bits.items()}
    if stored_weight.storage.dense_name is None:
        device = next((one.device for one in stored_weight.stored().values()), None)
        bits = {key: one if device is None else one.to(device) for key, one in bits.items()}
    return bits


def _restore(stored_weights: Iterable[_StoredWeight]) -> None:
    """Write the kept bits back into all of these, also if one fails; then its error is raised."""
    failed: list[BaseException] = []
    for stored_weight in stored_weights:
        try:
            stored_weight.write(_kept(stored_weight))
        except BaseException as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _forget(stored_weights: Iterable[_StoredWeight]) -> None:
    keepers = [stored_weight.keeper for stored_weight in stored_weights]
    try:
        _drop(keepers)
    finally:
        _drop(keepers)  # again, should the first have been interrupted


def _drop(keepers: Iterable[Change | LayerAdapter]) -> None:
    for keeper in keepers:
        for name in ("backup", "digests"):
            keeper.__dict__.pop(name, None)
