"""Fold an adapter into the weights of a live model, and take it out again to the very bits.

    W' = round(gain ⊙ (W + ΔW))      to the weight's dtype, once

Where rounding to nearest would lose most of a small change of 16-bit or quantised weights, a weight
is rounded so that what the adapter reads survives (``kernels/error_feedback.py``). Storages that
name no grid round as they do.

One weight at a time is made, checked, kept and overwritten. Each is kept before that, and the model
counts as merged until the last is back, so that whatever interrupts either way, ``unmerge`` can
finish it. Rejected: to make all weights twice, first to check and then to write, which takes twice
as long and could not put back what it wrote if the second pass fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import walk, weight_of
from veneer.attach.change import Change
from veneer.attach.lookup import adapters, changes, need_adapters, only_name, parameter_path, unwrap
from veneer.attach.merge_report import LayerMerge, MergeReport
from veneer.attach.state import ModelAdapters, in_turn
from veneer.attach.weight_tying import torn, untied_since
from veneer.bases import BASES, GridStorage, Storage
from veneer.distributed import spread_problem
from veneer.errors import MergeError, listing, raise_all, sentence
from veneer.fileio.hashing import digest
from veneer.fileio.tensors import cpu_copy
from veneer.kernels.grid import Grid
from veneer.kernels.rounding import Folded, fold, fold_onto, known_rounding
from veneer.lowrank import LowRank
from veneer.precision import double, has_float64


@dataclass(frozen=True)
class _StoredWeight:
    """One weight, parameter or buffer that an adapter changes: at a low rank (``keeper`` is its
    ``Change``), or by ``values`` in its place. The keeper has the old bits while it is merged.
    ``origin``: what its storage held as the adapter was attached, where others are merged into it
    since."""

    path: str
    module: nn.Module
    name: str
    keeper: Any
    target: Any
    storage: Storage
    values: Tensor | None = None
    origin: Mapping[str, Tensor] | None = None

    @property
    def where(self) -> str:
        return parameter_path(self.path, self.name)

    def stored(self) -> dict[str, Tensor]:
        self.storage.prepare(self.module)
        return self.storage.stored_tensors(self.target)

    def write(self, stored: Mapping[str, Tensor]) -> None:
        self.storage.write(self.target, stored)
        self.storage.prepare(self.module)

    def change(self) -> tuple[LowRank, Tensor | None]:
        """ΔW and the gain, which are made of the weight that the adapter was attached to."""
        if self.origin is None:
            return self.keeper.resolve_float64(self.target)
        merged = {key: tensor.clone() for key, tensor in self.stored().items()}
        try:
            self.write(self.origin)
            return self.keeper.resolve_float64(self.target)
        finally:
            self.write(merged)

    def not_finite(self, dtype: torch.dtype) -> str:
        problem = f"{self.where}: W + ΔW is not finite in {dtype}"
        return sentence(problem, "finite weights", "check the adapter for NaN or overflow")


#: the new content of a stored weight, and what there is to report of it
_Content = tuple[dict[str, Tensor], LayerMerge | None]


@in_turn
def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    keep: bool = True,
    rounding: str = "auto",
    inputs: Mapping[str, Tensor] | None = None,
) -> MergeReport:
    """Write ``W + ΔW``, rounded once, into the weights of ``model``, in place: parameters keep
    their identity and their ties.

    While merged, the model runs at the base's speed, with the adapter's outputs; a call that
    selects anything else raises. An adapter that is attached or loaded meanwhile is one of the
    merged weights: it trains, runs and is merged on top of them, and is refused on any others. One
    that was attached before is merged over them as PEFT merges several, each change into the
    weights as they are then; calls without a selection then have all of them. No thread may call
    the model while this runs, nor while ``unmerge`` does. ``detach(keep_merged=True)`` makes it a
    plain model, for libraries that go by a layer's exact class.

    Args:
        name: the adapter; None takes the only one.
        keep: keep the old weights, which ``unmerge`` needs: as much memory of the processor as the
            weights that change. Without, they are dropped once all are written.
        rounding: of 16-bit weights, and of those that bitsandbytes or torchao keeps. "nearest":
            each number to the nearest. "faithful": each to one of its two neighbours, so that the
            errors cancel on what the adapter reads; takes several times as long, a few seconds for
            100 million 16-bit weights. "auto": faithful for each weight of which nearest would keep
            less than 99 % of the change (or more than 101 %). Weights of more bits, those that are
            trained in full and embeddings of bounded norm are always rounded to nearest, those of
            GGUF by their storage's own rule.
        inputs: by the path of a weight, Σ xᵀx of its inputs ([g, in, in], in any scale): faithful
            rounding keeps the directions in which they vary most right, too.

    Returns:
        per parameter how large the change was, how much of it the weight's dtype could hold, and
        how it was rounded.

    Raises:
        ConfigError: another rounding.
        MergeError: a weight is of a kind that its own library alone writes (GPTQ, AWQ, HQQ, FP8), a
            merged one would not be finite, the adapter was attached to weights that are no longer
            there or of which no copy was kept, it has values of their own for the names of a tied
            weight, or the weights are spread over processes. Every weight has the bits that it had
            before.
        SelectionError: no such adapter.
    """
    model = unwrap(model)
    name = only_name(model, name)
    attached = need_adapters(model, name)
    if name in attached.chain or not attached.can_lie_over(name):
        must_stand(attached, name, "a merge of")
    _must_be_whole(model, "a merge")
    known_rounding(rounding)
    if opaque := [weight for weight in _stored_weights(model, name) if weight.storage.opaque]:
        storage: Any = opaque[0].storage
        paths = listing(weight.where for weight in opaque)
        raise MergeError(
            f"Nothing was merged of {name!r} ({paths}). {storage.refusal(opaque[0].target)}"
        )
    return _merge_all(model, attached, name, keep, rounding, dict(inputs or {}))


def _merge_all(
    model: nn.Module,
    attached: ModelAdapters,
    name: str,
    keep: bool,
    rounding: str,
    moments: dict[str, Tensor],
) -> MergeReport:
    """Write all weights, or leave all of them as they are."""
    over = attached.selections[name].on != attached.merged
    origins = kept_bits(model, name) if over else {}
    weights = [
        replace(weight, origin=origins.get(id(weight.target)))
        for weight in _stored_weights(model, name)
    ]
    problems = [*untied_since(model, name), *torn(model, name), *no_weights_change(model, name)]
    problems += _unknown_origins(model, attached, name, weights)
    before = attached.chain
    try:
        _forget(weights)  # what an interrupt in the last line of an unmerge has left
        attached.merging = True
        attached.set_chain((*before, name))
        reports = _write_all(weights, rounding, moments, keep, problems)
        raise_all(MergeError, f"Nothing was merged of {name!r}", problems)
        attached.merging = False
    except BaseException:
        if attached.chain != before:
            _restore(filter(_is_kept, weights))
            attached.set_chain(before)
        _forget(weights)
        attached.merging = False
        raise
    if not keep:
        _forget(weights)
    return MergeReport(name, tuple(reports))


def _write_all(
    weights: Iterable[_StoredWeight], rounding: str, moments: dict[str, Tensor], keep: bool,
    problems: list[str],
) -> list[LayerMerge]:  # fmt: skip
    """Write each weight as long as there are no problems, once its old bits are kept; then only
    look for more."""
    reports: list[LayerMerge] = []
    for weight in weights:
        moment = moments.pop(weight.where, None) if weight.values is None else None
        with torch.no_grad():
            content = _content(weight, rounding, moment, problems)
            if content is None:
                continue
            stored, report = content
            if not problems:
                _keep(weight, stored, digests=keep)
                weight.write(stored)
            reports += [report] if report else []
            del content, stored  # before the next one is made
    expected = "paths of weights that the adapter changes at a low rank"
    problems += [sentence(f"inputs of {path!r}", expected, "leave it out") for path in moments]
    return reports


@in_turn
def unmerge(model: nn.Module, name: str | None = None) -> None:
    """Restore the bits that the weights had before the last ``merge``. If it is interrupted
    (Ctrl-C, memory), the next call finishes it. Adapters that were attached meanwhile stay, and are
    refused until that one is merged again.

    Args:
        name: the adapter; None takes the one that was merged last.

    Raises:
        MergeError: nothing is merged; another was merged on top of this one; the old weights were
            not kept; or a merged weight was edited since, so that restoring would lose the edit.
            Nothing was changed.
    """
    model = unwrap(model)
    attached = need_adapters(model)
    if attached.merged is None:
        raise MergeError(
            "a model in which nothing is merged", "a merged adapter", "call veneer.merge first"
        )
    last = attached.chain[-1]
    if name is not None and name != last:
        on_top = "which lies on top of it" if name in attached.chain else "and not that"
        found, expected = (
            f"unmerge of {name!r} while {last!r} is merged, {on_top}",
            "the last one merged",
        )
        raise MergeError(found, expected, f"unmerge {last!r} first")
    _must_be_whole(model, "an unmerge")
    every = list(_stored_weights(model, last))
    weights = list(filter(_is_kept, every))
    # of a merge that was cut off, the others are as they were
    if len(weights) < len(every) and not attached.merging:
        found = f"{last!r}, merged with keep=False"
        raise MergeError(found, "the weights from before the merge", "load the base again")
    merged, edited = [], []
    for weight in weights:
        found, expected = (
            _digest(weight.stored()),
            weight.keeper.__dict__.get("digests", {}).get(weight.name),
        )
        if expected is None or found == expected:
            merged.append(weight)
        elif found != (kept := _digest(_kept(weight))):
            # unless an unmerge that was interrupted has restored it
            between = all(found[key] in (kept.get(key), expected.get(key)) for key in found)
            (merged if between else edited).append(weight)
    if edited:
        found = (
            "weights edited since the merge (also by .to(dtype)):"
            f" {listing(weight.where for weight in edited)}"
        )
        raise MergeError(
            found,
            "the merged weights",
            "undo the edit, or detach(model, keep_merged=True) to keep it",
        )
    _restore(merged)
    attached.set_chain(attached.chain[:-1])  # what is kept has no meaning from here on
    _forget(every)
    attached.merging = False


def _must_be_whole(model: nn.Module, what: str) -> None:
    do = (
        "save the adapter, and merge it in one process, before the model is sharded or with `veneer"
        " merge`"
    )
    if problem := spread_problem((module for _, module in walk(model)), what, do):
        raise MergeError(problem)


def must_stand(attached: ModelAdapters, name: str, what: str) -> None:
    """Raise a MergeError unless the weights are those that the adapter ``name`` was attached to."""
    on, merged = attached.selections[name].on, attached.merged
    if on == merged:
        return
    if name in attached.chain:
        raise MergeError(
            f"{what} {name!r}, merged already",
            "an unmerged adapter",
            "call veneer.unmerge(model) first",
        )
    if merged is None:
        problem = f"{what} {name!r}, attached while {on!r} was merged, which it no longer is"
        raise MergeError(problem, "the weights that it was attached to", f"merge {on!r} again")
    there = "nothing" if on is None else repr(on)
    problem = f"{what} {name!r}, attached while {there} was merged, and {merged!r}, merged already"
    do = "call veneer.unmerge(model) first; `veneer compose` makes one adapter of several"
    raise MergeError(problem, "the weights that it was attached to", do)


def kept_bits(model: nn.Module, name: str) -> dict[int, dict[str, Tensor]]:
    """What the weights held when the adapter ``name`` was attached, where more is merged into them
    since, as their storage names it, by the identity of the weight."""
    return {key: _kept(weight) for key, weight in _since(model, name).items() if _is_kept(weight)}


def unkept(model: nn.Module, name: str) -> frozenset[int]:
    """The identities of those weights of which nobody has what they held then (``keep=False``)."""
    return frozenset(key for key, weight in _since(model, name).items() if not _is_kept(weight))


def _since(model: nn.Module, name: str) -> dict[int, _StoredWeight]:
    """The weights into which something was merged since the adapter was attached, each at the first
    such merge."""
    attached = need_adapters(model, name)
    merges, on = attached.merges(), attached.selections[name].on
    if on is not None and on not in merges:
        must_stand(attached, name, "the base of")
    above = merges if on is None else merges[: merges.index(on)]
    return {
        id(weight.target): weight for merged in above for weight in _stored_weights(model, merged)
    }


def _stored_weights(model: nn.Module, name: str) -> Iterator[_StoredWeight]:
    for path, module, weight, change in changes(model, name):
        yield _StoredWeight(path, module, weight, change, weight_of(module, weight), change.storage)
    seen: set[int] = set()  # tied parameters have one copy, and are written once
    for path, module, part in adapters(model, name):
        full, own = part.full, {**module._buffers, **module._parameters}
        for weight, values in (*full._parameters.items(), *full._buffers.items()):
            if values is not None and own[weight] is not None and id(values) not in seen:
                seen.add(id(values))
                yield _StoredWeight(path, module, weight, part, own[weight], BASES["plain"], values)


def no_weights_change(model: nn.Module, name: str) -> Iterator[str]:
    """Changes of what modules give that are none of their weights, as others read those past the
    modules; in words."""
    for path, _, weight, change in changes(model, name):
        if change.module_only:
            problem = (
                f"a change of what {path!r} gives, whose {weight!r} others read past it, unchanged"
                " as in PEFT"
            )
            do = (
                "keep the adapter beside the base, or train one with Veneer, which every reader"
                " sees"
            )
            yield sentence(problem, "a change of the weight", do)

    for path, module, part in adapters(model, name):
        for own in part.full._parameters:
            if own in module._parameters and module._parameters[own] is None:
                problem, do = (
                    f"a bias for {path!r}, which has none",
                    "keep the adapter beside the base",
                )
                yield sentence(problem, "a layer with a bias to merge it into", do)


def _unknown_origins(
    model: nn.Module, attached: ModelAdapters, name: str, weights: Iterable[_StoredWeight]
) -> Iterator[str]:
    """Weights of which a merge over others lacks what the adapter was attached to, or that do not
    add up; in words."""
    if attached.selections[name].on == attached.merged:
        return
    gone = unkept(model, name)
    for weight in weights:
        whole = weight.values is not None or weight.keeper.tokens is not None
        if id(weight.target) in gone and (whole or weight.keeper.variant.peft_keys):
            problem = f"{weight.where!r}, into which another was merged with keep=False"
            expected = f"the weight that {name!r} was attached to"
            yield sentence(problem, expected, "load the base again, and merge with keep=True")
        elif (
            weight.origin is not None
            and not isinstance(weight.target, nn.Parameter)
            and weight.values is not None
        ):
            problem = (
                f"{weight.where!r}, statistics that {name!r} and a merged adapter have of their own"
            )
            yield sentence(problem, "changes that add up", "merge one of them alone")


def _content(
    weight: _StoredWeight, rounding: str, moment: Tensor | None, problems: list[str]
) -> _Content | None:
    """What is to be written, or None and a problem more."""
    target, storage, values = weight.target, weight.storage, weight.values
    plain = isinstance(target, Tensor)
    if plain and target.is_meta and "_hf_hook" in weight.module.__dict__:
        do = (
            "bring it back (accelerate.hooks.remove_hook_from_module), or merge the files (veneer"
            " merge)"
        )
        problems.append(
            sentence(
                f"{weight.where}, whose numbers are elsewhere (offloaded?)",
                "a weight in memory",
                do,
            )
        )
        return None
    if plain and target.is_inference() and not torch.is_inference_mode_enabled():
        problem = (
            f"{weight.where}, made under torch.inference_mode, which torch lets nobody write"
            " outside it"
        )
        problems.append(
            sentence(
                problem, "a weight that can be written", "merge under torch.inference_mode too"
            )
        )
        return None
    if storage.dense_name is None and not has_float64(device := storage.device(target)):
        problem = (
            f"{weight.where}, a weight that is stored packed, on {device}, which has no float64"
        )
        problems.append(
            sentence(
                problem, "a device with float64", 'move the model for the merge: model.to("cpu")'
            )
        )
        return None
    if values is None:
        return _folded(weight, rounding, moment, problems)
    # running statistics and the like: copied as they are
    if plain and not isinstance(target, nn.Parameter):
        return {"values": values.detach().clone()}, None
    exact = double(values)
    if weight.origin is not None:  # its change goes into the weight as it is now
        exact = (
            exact - double(storage.decode(target, weight.origin)) + double(storage.dense(target))
        )
    return _encoded(weight, exact, problems)


def _folded(
    weight: _StoredWeight, rounding: str, moment: Tensor | None, problems: list[str]
) -> _Content | None:
    """Dense numbers go through ``fold``, by tiles. Float64 on the whole is for what storage or
    layer make more of."""
    change, storage, where = weight.keeper, weight.storage, weight.where
    storage.prepare(weight.module)
    low, gain = weight.change()
    dense, name = storage.dense(weight.target).detach(), storage.dense_name
    ours = type(dense) in (Tensor, nn.Parameter)  # not one that is spread over processes
    chosen = name is not None or isinstance(storage, GridStorage)  # its numbers, one by one
    if (
        not chosen
        or not ours
        or change.layer.apply_forward_rewrite(weight.module, dense) is not dense
    ):
        if moment is not None:
            problem = f"{where}: inputs= of a weight that is rounded as it is stored or read"
            problems.append(sentence(problem, "none: it has no faithful rounding", "leave it out"))
        exact = change.changed_weight(weight.target, low, gain, torch.float64)
        return _encoded(weight, change.layer.apply_forward_rewrite(weight.module, exact), problems)
    matrix = change.layer.unfold(dense, change.dims)
    square = len(matrix), *[matrix.shape[2]] * 2
    if moment is not None and (moment.shape != square or not moment.isfinite().all()):
        what = (
            "with numbers that are not finite"
            if moment.shape == square
            else f"of shape {tuple(moment.shape)}"
        )
        problem, expected = f"{where}: inputs= {what}", f"Σ xᵀx of shape {square}, finite"
        problems.append(sentence(problem, expected, "give that of the inputs of this weight"))
        return None
    if name is None:
        return _onto_grid(weight, matrix, low, gain, rounding, moment, problems)
    folded = fold_change(change, matrix, low, gain, rounding=rounding, inputs=moment)
    if not folded.finite:
        problems.append(weight.not_finite(dense.dtype))
        return None
    report = LayerMerge(
        where, folded.change, folded.retention, folded.rounding, folded.sums.retention
    )
    return {name: change.layer.fold(folded.weight, dense.shape)}, report


def fold_change(
    change: Change, weight: Tensor, low: LowRank, gain: Tensor | None, **options: Any
) -> Folded:
    """``fold`` for a weight of this change's layer, [g, out, in], or for a part of it."""
    return fold(weight, low, gain, side=_side(change), **options)


def _side(change: Change) -> str:
    """What reads an index knows no direction of inputs: there the change is in the outputs."""
    return "inputs" if change.layer.drops_input else "outputs"


def _onto_grid(
    weight: _StoredWeight, matrix: Tensor, low: LowRank, gain: Tensor | None, rounding: str, moment: Tensor | None,
    problems: list[str],
) -> _Content | None:  # fmt: skip
    """What a storage with other numbers than a dtype's is to hold: each to nearest, then as
    ``rounding`` says."""
    change, storage, target = weight.keeper, cast(GridStorage, weight.storage), weight.target
    content = _encoded(weight, change.changed_weight(target, low, gain, torch.float64), problems)
    if content is None or rounding == "nearest":
        return content
    stored, report = cast(tuple[dict[str, Tensor], LayerMerge], content)  # a change has a report

    def unfold(values: Tensor) -> Tensor:
        return change.layer.unfold(values, change.dims)

    def grid() -> Grid:
        return storage.grid(target, stored).map_tensors(unfold)

    nearest = unfold(storage.decode(target, stored))
    options: Any = {"rounding": rounding, "side": _side(change), "inputs": moment}
    folded = fold_onto(grid, matrix, low, gain, nearest, **options)
    if folded.rounding == "nearest":
        return content
    stored = storage.onto(
        target, stored, double(change.layer.fold(folded.weight, storage.shape(target)))
    )
    return stored, replace(report, retention=folded.retention, rounding=folded.rounding)


def _encoded(weight: _StoredWeight, values: Tensor, problems: list[str]) -> _Content | None:
    storage = weight.storage
    try:
        stored = storage.encode(weight.target, values)
    except MergeError as error:
        problems.append(f"{weight.where}: {error}")
        return None
    rounded = storage.decode(weight.target, stored)
    if not rounded.isfinite().all():
        problems.append(weight.not_finite(rounded.dtype))
        return None
    rounding = "storage" if storage.dense_name is None else "nearest"
    return stored, _report(
        weight.where, double(storage.dense(weight.target)), values, double(rounded), rounding
    )


def _report(path: str, old: Tensor, exact: Tensor, rounded: Tensor, rounding: str) -> LayerMerge:
    change, realised = exact - old, rounded - old
    size, base = change.norm().item(), old.norm().item()
    retention = ((change * realised).sum() / (change * change).sum()).item() if size else 1.0
    return LayerMerge(
        path, size / base if base else float(size > 0), retention, rounding, retention
    )


def _keep(weight: _StoredWeight, new: Mapping[str, Tensor], digests: bool = True) -> None:
    """Keep a weight's old bits, all in one step. ``digests``: hash the new ones, which ``unmerge``
    compares; copies that only undo a failure need none."""
    keeper = weight.keeper.__dict__
    bits = {key: cpu_copy(tensor) for key, tensor in weight.stored().items()}
    if digests:
        keeper.setdefault("digests", {})[weight.name] = _digest(new)
    keeper.setdefault("backup", {})[weight.name] = bits


def _digest(stored: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in stored.items()}


def _is_kept(weight: _StoredWeight) -> bool:
    return weight.name in weight.keeper.__dict__.get("backup", {})


def _kept(weight: _StoredWeight) -> dict[str, Tensor]:
    """The bits from before the merge, in memory of the processor; those of a packed weight on its
    device."""
    bits = weight.keeper.__dict__["backup"][weight.name]
    stored = weight.stored() if weight.storage.dense_name is None else {}
    device = next((one.device for one in stored.values()), None)
    return bits if device is None else {key: one.to(device) for key, one in bits.items()}


def _restore(weights: Iterable[_StoredWeight]) -> None:
    """Write the kept bits back into all of these, also if one fails; then its error is raised."""
    failed: list[BaseException] = []
    for weight in weights:
        try:
            weight.write(_kept(weight))
        except BaseException as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _forget(weights: Sequence[_StoredWeight]) -> None:
    try:
        _drop(weights)
    finally:
        _drop(weights)  # again, should the first have been interrupted


def _drop(weights: Sequence[_StoredWeight]) -> None:
    for weight in weights:
        for name in ("backup", "digests"):
            weight.keeper.__dict__.pop(name, None)
