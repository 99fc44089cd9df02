"""Fold an adapter into the weights of a live model: each weight W becomes gain ⊙ (W + ΔW), rounded
once to the weight's dtype.

Rounding to nearest would lose most of a small change of 16-bit or quantised weights. Such a weight
is rounded so that the change survives in the directions that the adapter reads
(``kernels/error_feedback.py``). If it is unknown which values the format of a quantised weight can
represent (GGUF), the weight is rounded by the rule of its storage.

Weights are merged one at a time: compute the new content, check it, copy the old bits, overwrite.
The model counts as merged until the last weight is restored, so ``unmerge`` can finish an
interrupted merge or unmerge. Rejected: computing all weights twice, once to check and once to
write. That takes twice as long, and a failure of the second pass could not be undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.layer.lookup import adapters, changes, name_or_default, need_adapters, unwrap
from veneer.attach.layer.state import ModelAdapters, one_thread_at_a_time
from veneer.attach.merging.fold_weights import merged_content
from veneer.attach.merging.merge_report import LayerMerge, MergeReport
from veneer.attach.merging.stored_weights import (
    StoredWeight,
    back_up,
    bits_before_merge,
    drop_backups,
    has_backup,
    require_attached_base,
    restore,
    stored_weights,
    without_backup,
)
from veneer.attach.merging.unmerge import require_unsharded
from veneer.attach.planning.weight_tying import broken_tie_problems, split_tie_problems
from veneer.errors import MergeError, listing, raise_all, sentence
from veneer.kernels.rounding import check_rounding


@one_thread_at_a_time
def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    keep: bool = True,
    rounding: str = "auto",
    inputs: Mapping[str, Tensor] | None = None,
) -> MergeReport:
    """Write gain ⊙ (W + ΔW), rounded once, into the weights of ``model``, in place. (The gain is a
    factor for each output, as in DoRA.) Parameters keep their identity and their ties.

    While an adapter is merged, the model runs at the base's speed and computes the adapter's
    outputs. A call that selects anything else raises an error. An adapter that is attached or
    loaded while another one is merged belongs to the merged weights: it trains, runs and is merged
    on top of them, and calls with it raise an error on other weights. An adapter that was attached
    before the other one was merged is added to the present weights, as PEFT merges several
    adapters. Calls without a selection then use all merged adapters. No thread may call the model
    while ``merge`` or ``unmerge`` runs. ``detach(keep_merged=True)`` leaves a plain model, for
    libraries that look at a layer's exact class.

    Args:
        name: the adapter; None stands for the default one, or the only one.
        keep: keep a copy of the old weights, which ``unmerge`` needs. It takes as much CPU memory
            as the weights that change. If False, the copies are dropped once all weights are
            written.
        rounding: how to round 16-bit weights and weights that bitsandbytes or torchao stores.
            "nearest" rounds each element to the nearest value. "faithful" rounds each element to
            one of its two neighbours, so that the errors cancel in the directions that the adapter
            reads. It takes several times as long: a few seconds for 100 million 16-bit weights.
            "auto" uses "faithful" for each weight where "nearest" would realise less than 99 % of
            the change (or more than 101 %), or make an error that is large against the change.
            Weights of more than 16 bits, weights that are trained in full and embeddings with
            ``max_norm`` are always rounded to nearest. GGUF weights are rounded by the rule of
            their storage.
        inputs: Σ xᵀx over the inputs x of a weight, [g, in, in], up to a common factor, by the path
            of the weight. g is the number of matrices in the weight, 1 for a linear layer. Faithful
            rounding then also keeps the outputs right in the directions in which the inputs vary
            most.

    Returns:
        for each parameter the size of the change, the share of the change that survived rounding to
        the weight's dtype, and the kind of rounding.

    Raises:
        ConfigError: ``rounding`` is unknown.
        MergeError: the adapter has invocation tokens; a weight can be written only by the library
            that stores it (GPTQ, AWQ, HQQ, FP8); a merged weight would not be finite; the weights
            that the adapter was attached to are gone, or were not kept; the adapter has different
            values for the names of a tied weight; or the weights are spread over processes. Every
            weight keeps the bits that it had before.
        SelectionError: there is no such adapter.
    """
    model = unwrap(model)
    name = name_or_default(model, name)
    model_adapters = need_adapters(model, name)
    if tokens := model_adapters.configs[name].invocation_tokens:
        raise MergeError(
            f"a merge of {name!r}, which acts from its invocation tokens {list(tokens)} on",
            "an adapter that acts on every token",
            "use it as an adapter; `veneer serve` takes it as it is",
        )
    if name in model_adapters.merge_order or not model_adapters.can_merge(name):
        require_attached_base(model_adapters, name, "a merge of")
    require_unsharded(model, "a merge")
    check_rounding(rounding)
    if opaque_weights := [
        weight for weight in stored_weights(model, name) if weight.storage.opaque
    ]:
        storage: Any = opaque_weights[0].storage
        paths = listing(weight.full_path for weight in opaque_weights)
        raise MergeError(
            f"Nothing was merged of {name!r} ({paths})."
            f" {storage.refusal(opaque_weights[0].weight_holder)}"
        )
    return _merge_all(model, model_adapters, name, keep, rounding, dict(inputs or {}))


def _merge_all(
    model: nn.Module,
    model_adapters: ModelAdapters,
    name: str,
    keep: bool,
    rounding: str,
    second_moments: dict[str, Tensor],
) -> MergeReport:
    """Overwrite all weights that the adapter ``name`` changes, or, if an error is raised, leave all
    of them as they were. ``second_moments`` is the argument ``inputs`` of ``merge``; entries that
    are used are removed from it.

    Raises:
        MergeError: with every reason why a weight cannot be merged.
    """
    is_over_others = model_adapters.selections[name].merged_at_attach != model_adapters.merged
    origin_by_id = bits_before_merge(model, name) if is_over_others else {}
    weights = [
        replace(weight, origin_tensors=origin_by_id.get(id(weight.weight_holder)))
        for weight in stored_weights(model, name)
    ]
    problems = [
        *broken_tie_problems(model, name),
        *split_tie_problems(model, name),
        *output_change_problems(model, name),
    ]
    if is_over_others:
        problems += _missing_origin_problems(model, name, weights)
    merge_order_before = model_adapters.merge_order
    try:
        drop_backups(weights)  # an unmerge that was interrupted at its end may have left some
        model_adapters.is_merging = True
        model_adapters.set_merge_order((*merge_order_before, name))
        reports = _write_all(weights, rounding, second_moments, keep, problems)
        raise_all(MergeError, f"Nothing was merged of {name!r}", problems)
        model_adapters.is_merging = False
    except BaseException:
        if model_adapters.merge_order != merge_order_before:
            restore(filter(has_backup, weights))
            model_adapters.set_merge_order(merge_order_before)
        drop_backups(weights)
        model_adapters.is_merging = False
        raise
    if not keep:
        drop_backups(weights)
    return MergeReport(name, tuple(reports))


def _write_all(
    weights: Iterable[StoredWeight],
    rounding: str,
    second_moments: dict[str, Tensor],
    keep: bool,
    problems: list[str],
) -> list[LayerMerge]:
    """Back up and overwrite each weight while ``problems`` is empty. After the first problem,
    compute the remaining weights only to add further problems. ``second_moments`` is the argument
    ``inputs`` of ``merge``, from which each used entry is removed; the entries that remain are
    problems. Returns a report for each low-rank or fully trained parameter."""
    reports: list[LayerMerge] = []
    for weight in weights:
        second_moment = (
            second_moments.pop(weight.full_path, None) if weight.full_values is None else None
        )
        with torch.no_grad():
            content = merged_content(weight, rounding, second_moment, problems)
            if content is None:
                continue
            stored_tensors, report = content
            if not problems:
                back_up(weight, stored_tensors, digests=keep)
                weight.write(stored_tensors)
            reports += [report] if report else []
            del content, stored_tensors  # free the memory before the next weight
    expected = "paths of weights that the adapter changes at a low rank"
    problems += [
        sentence(f"inputs of {path!r}", expected, "leave it out") for path in second_moments
    ]
    return reports


def output_change_problems(model: nn.Module, name: str) -> Iterator[str]:
    """An error text for each change of an adapter that cannot be written into a weight. Either the
    change applies to the output of one module only, as in PEFT, although other modules read the
    same weight; or it is a bias for a layer that has none."""
    for path, _, weight, change in changes(model, name):
        if change.module_only:
            yield sentence(
                f"a change of what {path!r} gives, whose {weight!r} others read past it, unchanged"
                " as in PEFT",
                "a change of the weight",
                "keep the adapter beside the base, or train one with Veneer, which every reader"
                " sees",
            )

    for path, module, layer_adapter in adapters(model, name):
        for parameter_name in layer_adapter.full._parameters:
            if parameter_name in module._parameters and module._parameters[parameter_name] is None:
                problem = f"a bias for {path!r}, which has none"
                advice = "keep the adapter beside the base"
                yield sentence(problem, "a layer with a bias to merge it into", advice)


def _missing_origin_problems(
    model: nn.Module, name: str, weights: Iterable[StoredWeight]
) -> Iterator[str]:
    """An error text for each weight that cannot be merged on top of the adapters that were merged
    since the adapter ``name`` was attached. Either the bits that the weight had at the attach are
    needed and were not kept (``keep=False``), or both adapters replace the same running statistics,
    whose changes cannot be added up."""
    ids_without_backup = without_backup(model, name)
    for weight in weights:
        needs_origin = weight.full_values is not None or weight.keeper.tokens is not None
        if id(weight.weight_holder) in ids_without_backup and (
            needs_origin or weight.keeper.variant.peft_keys
        ):
            problem = f"{weight.full_path!r}, into which another was merged with keep=False"
            expected = f"the weight that {name!r} was attached to"
            yield sentence(problem, expected, "load the base again, and merge with keep=True")
        elif (
            weight.origin_tensors is not None
            and not isinstance(weight.weight_holder, nn.Parameter)
            and weight.full_values is not None
        ):
            problem = (
                f"{weight.full_path!r}, statistics that {name!r} and a merged adapter have of"
                " their own"
            )
            yield sentence(problem, "changes that add up", "merge one of them alone")
