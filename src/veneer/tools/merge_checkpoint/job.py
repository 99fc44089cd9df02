"""A checked and planned merge, and the merge of one tensor.

    MergeJob       the base's files, the edits (``merge_plan``), dtype, rounding
    merge_tensor(job, name, tensor, compiled)  ->  the merged tensor, and reports of the merge

Each weight equals what ``veneer.merge`` would write into the live model, bit for bit: both call
``kernels.rounding.fold``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.file_names import common_tokenizer
from veneer.adapter_files.folder import read
from veneer.attach import Change, LayerMerge, fold_change
from veneer.errors import BaseMismatchError, MergeError, listing, sentence
from veneer.fileio.hashing import fingerprint_of, fingerprint_without_rows, kind_of
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import HALF_DTYPES, Folded, Sums, check_rounding, is_inaccurate
from veneer.lowrank import LowRank
from veneer.models.base_weights import slice_shape
from veneer.models.safetensors_dir import NAMES, Checkpoint, in_order, open_checkpoint
from veneer.tools.merge_checkpoint.aux_files import ConfigChanges
from veneer.tools.merge_checkpoint.growth import add_tensors, grow_checkpoint
from veneer.tools.merge_checkpoint.linear_stub import linear_stub_model
from veneer.tools.merge_checkpoint.merge_plan import (
    Adapter,
    MergePlan,
    TensorEdit,
    plan_merge,
)

#: bytes of memory that numba takes, including its compiler
NUMBA = 128 * 2**20
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergeJob:
    """A merge after all checks and planning."""

    checkpoint: Checkpoint
    merge_plan: MergePlan
    adapters: tuple[Adapter, ...]
    dtype: torch.dtype | None
    rounding: str
    verify_base: bool
    #: the folder of the adapter whose tokenizer the result gets; None: the base's
    tokenizer: Path | None
    #: the rounding of each parameter that several tensors hold, decided at the first of them
    decided: dict[str, str] = field(default_factory=dict)

    @property
    def aux_changes(self) -> ConfigChanges:
        """The differences of the files beside the weights from the base's."""
        rows = max(self.merge_plan.sizes.values(), default=None)
        return ConfigChanges(self.dtype, rows, self.tokenizer, self.merge_plan.head)

    def output_dtype(self, name: str) -> torch.dtype:
        base_dtype = self.checkpoint.dtype(name)
        return self.dtype if self.dtype is not None and base_dtype in FLOATS else base_dtype

    def is_copied(self, name: str) -> bool:
        unedited = name not in self.merge_plan.edits and name not in self.merge_plan.sizes
        return unedited and self.output_dtype(name) == self.checkpoint.dtype(name)

    def output_bytes(self, name: str) -> int:
        size = self.checkpoint.bytes(name)
        return size // self.checkpoint.dtype(name).itemsize * self.output_dtype(name).itemsize

    def buffer_bytes(self, name: str) -> int:
        return self.checkpoint.bytes(name) + self.output_bytes(name)

    def memory_limit(self) -> tuple[int, bool]:
        """(bytes that tensors may take between reading and writing, whether numba is used). The
        limit is twice the largest tensor; numba is used if its memory fits in too."""
        limit = max(map(self.buffer_bytes, self.checkpoint.file_of), default=0)
        needed = max(
            (
                self.buffer_bytes(name)
                for name in self.checkpoint.file_of
                if not self.is_copied(name)
            ),
            default=0,
        )
        compiled = limit - NUMBA >= needed
        return (limit - NUMBA if compiled else limit), compiled

    def layout(self, file: str) -> tuple[bytes, dict[str, int]]:
        """(header bytes, offset of each tensor) of a file of the result."""
        header, names = self.checkpoint.files[file], in_order(self.checkpoint.files[file])
        offsets = dict(
            zip(names, accumulate(map(self.output_bytes, names), initial=0), strict=False)
        )
        same_shapes = (
            not (self.merge_plan.sizes.keys() | self.merge_plan.added.keys())
            & header.tensors.keys()
        )
        if same_shapes and all(
            self.output_dtype(name) == self.checkpoint.dtype(name) for name in names
        ):
            with (self.checkpoint.folder / file).open("rb") as stream:
                header_bytes = stream.read(header.data_start)
        else:
            header_fields: dict[str, Any] = (
                {"__metadata__": dict(header.metadata)} if header.metadata else {}
            )
            for name, start in offsets.items():
                dtype, shape = NAMES[self.output_dtype(name)], list(self.checkpoint.shape(name))
                header_fields[name] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [start, start + self.output_bytes(name)],
                }
            text = json.dumps(header_fields, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            header_bytes = len(text).to_bytes(8, "little") + text
        return header_bytes, {name: len(header_bytes) + start for name, start in offsets.items()}

    def check_fingerprints(self, paths: Sequence[str], loaded: Mapping[str, Tensor]) -> None:
        """``BaseMismatchError`` if a parameter does not match the adapters' fingerprints.
        ``loaded``: tensors that are in memory already."""
        mismatches = []

        def read(name: str) -> Tensor:
            return loaded[name] if name in loaded else self.checkpoint.read(name)

        for path in paths:
            tensors, shape, expected_by_adapter = self.merge_plan.fingerprints[path]
            edits = {
                name: next(edit for edit in self.merge_plan.edits[name] if edit.path == path)
                for name in tensors
            }
            actual = {
                (kind, ids): fingerprint_without_rows(read(tensors[0]), ids, kind)
                if ids
                else fingerprint_of(
                    shape,
                    (read(name)[work.param_slice.within] for name, work in edits.items()),
                    kind,
                )
                for kind, ids in {
                    (kind_of(expected), ids) for expected, ids in expected_by_adapter.values()
                }
            }
            if mismatched_adapters := [
                adapter
                for adapter, (expected, ids) in expected_by_adapter.items()
                if expected != actual[kind_of(expected), ids]
            ]:
                mismatches.append(f"{listing(tensors, 2)} (adapter {listing(mismatched_adapters)})")
        if mismatches:
            mismatched_adapters = (
                f"other weights in {self.checkpoint.folder} ({listing(mismatches, 3)})"
            )
            expected = "the weights that the adapters were trained on"
            precision_hint = "if these are the same in another precision"
            do = f"name that base, or pass verify_base=False (--no-verify-base) {precision_hint}"
            raise BaseMismatchError(
                f"This is another base. {sentence(mismatched_adapters, expected, do)}"
            )


def plan_job(
    base: Any,
    adapters: Any,
    dtype: Any,
    rounding: str,
    verify_base: bool,
    model: Any,
    by_fingerprints: bool = True,
) -> MergeJob:
    """Check the arguments of ``merge_checkpoint`` and plan the merge. ``by_fingerprints`` allows to
    map tensors by the fingerprints in the adapters' records, if these are checked."""
    if not adapters:
        raise MergeError("no adapter", "one or several", "name them")
    check_rounding(rounding)
    if dtype is not None and dtype not in FLOATS:
        raise MergeError(
            f"dtype={dtype}", listing(map(str, FLOATS)), "choose one, or None to keep the base's"
        )
    weighted_adapters = [
        (adapter, 1.0) if isinstance(adapter, str | Path) else adapter for adapter in adapters
    ]
    adapter_weights = [(Path(path), float(weight)) for path, weight in weighted_adapters]
    folder = Path(base).expanduser()
    checkpoint = open_checkpoint(folder)  # before the adapters, because it fails sooner
    saved_adapters = [read(path) for path, _ in adapter_weights]
    for saved in saved_adapters:
        saved.refuse_invocation_tokens("a merge")
    tokenizer = common_tokenizer({str(path): path for path, _ in adapter_weights})
    stub_model = (
        linear_stub_model(checkpoint, saved_adapters)
        if model is None and verify_base and by_fingerprints
        else None
    )
    merge_plan = plan_merge(
        checkpoint, adapter_weights, saved_adapters, model if stub_model is None else stub_model
    )
    merge_plan = replace(merge_plan, by_fingerprints=stub_model is not None)
    checkpoint = add_tensors(grow_checkpoint(checkpoint, merge_plan.sizes), merge_plan.added)
    return MergeJob(
        checkpoint, merge_plan, tuple(adapter_weights), dtype, rounding, verify_base, tokenizer
    )


def merge_tensor(
    job: MergeJob, name: str, tensor: Tensor, compiled: bool
) -> tuple[Tensor, list[LayerMerge]]:
    """The merged tensor, and the report of each merged weight. ``compiled`` allows numba."""
    dtype, layers, result = job.output_dtype(name), [], None
    for edit in job.merge_plan.edits.get(name, ()):
        weight = tensor[edit.param_slice.within]
        if edit.changes:
            merged = merge_changes(
                edit, weight, dtype, _rounding(job, edit, dtype, compiled), compiled
            )
            value = merged.weight
            layers.append(
                LayerMerge(
                    name, merged.change, merged.retention, merged.rounding, merged.sums.retention
                )
            )
            finite = merged.finite
        else:
            value = merge_full(edit, weight, dtype)
            finite = not value.is_floating_point() or bool(value.isfinite().all())
        if not finite:
            problem = f"{name}: W + ΔW is not finite in {dtype}"
            raise MergeError(
                problem, "finite weights", "check the adapter, or choose a wider dtype"
            )
        if not edit.param_slice.within:
            result = value
        else:
            result = _cast(name, tensor, dtype).clone() if result is None else result
            result[edit.param_slice.within] = value
    return _cast(name, tensor, dtype) if result is None else result, layers


def _rounding(job: MergeJob, edit: TensorEdit, dtype: torch.dtype, compiled: bool) -> str:
    """The rounding of a slice: that of the whole parameter, for which "auto" decides once."""
    tensors = job.merge_plan.split_tensors.get(edit.path)
    if tensors is None or job.rounding != "auto" or dtype not in HALF_DTYPES:
        return job.rounding
    if edit.path not in job.decided:
        sums = Sums(0.0, 0.0, 0.0, 0.0)
        for name in tensors:
            tensor_edit = next(
                candidate for candidate in job.merge_plan.edits[name] if candidate.path == edit.path
            )
            weight = job.checkpoint.read(name)[tensor_edit.param_slice.within]
            sums += merge_changes(tensor_edit, weight, dtype, "nearest", compiled).sums
        job.decided[edit.path] = "faithful" if is_inaccurate(sums) else "nearest"
    return job.decided[edit.path]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    result = round_once(tensor, dtype) if tensor.dtype == torch.float64 else tensor.to(dtype)
    if bool((tensor.isfinite() & ~result.isfinite()).any()):
        problem = f"{name}: numbers beyond the range of {dtype}"
        raise MergeError(problem, "a dtype that holds them", "choose bfloat16 or float32")
    return result


class _NeedsBase(Exception):  # noqa: N818 (a signal, not an error)
    """A variant needs the frozen weight."""


def merge_changes(
    edit: TensorEdit,
    weight: Tensor,
    dtype: torch.dtype,
    rounding: str,
    compiled: bool,
) -> Folded:
    """Merge the changes of ``edit`` into ``weight``, a slice of a tensor that stays unchanged. The
    result is bit for bit what ``veneer.merge`` writes into a live model with this ``rounding``.
    ``compiled=False`` does not use numba."""
    shape = slice_shape(edit.shape, edit.param_slice.index)
    dense, first_change = weight.reshape(shape), edit.changes[0][1]
    dims = first_change.dims if not edit.param_slice.index else first_change.layer.dims(None, shape)
    layer_weight = first_change.layer.unfold(dense, dims)
    low, gain = _sum_changes(
        [(share, *_resolve_slice(change, edit, layer_weight)) for share, change in edit.changes]
    )
    folded = fold_change(
        first_change, layer_weight, low, gain, dtype=dtype, rounding=rounding, compiled=compiled
    )
    return replace(
        folded, weight=first_change.layer.fold(folded.weight, shape).reshape(weight.shape)
    )


def _resolve_slice(
    change: Change, edit: TensorEdit, layer_weight: Tensor
) -> tuple[LowRank, Tensor | None]:
    """(ΔW, gain) for the slice ``layer_weight`` of the parameter."""
    if not edit.param_slice.index:
        return change.resolve_float64(change.layer.fold(layer_weight, edit.shape))
    if change.tokens is not None:
        problem = f"trained tokens of {edit.path!r}, which the files hold in parts"
        raise MergeError(
            problem, "the whole of it in one tensor", "merge it in memory, and save the model"
        )
    all_rows = slice(None)
    groups, rows = (
        (*edit.param_slice.index, all_rows)[:2]
        if change.dims.groups > 1
        else (all_rows, edit.param_slice.index[0])
    )

    def need() -> Tensor:
        raise _NeedsBase

    parameters: dict[str, Any] = {
        name: value.double() for name, value in change.adapter_parameters.items()
    }
    try:
        low, _ = change.variant.resolve(parameters, change.scale, need)
    except _NeedsBase:
        if change.rows is not None or parameters.keys() - {"A", "B"} - set(
            change.variant.peft_keys
        ):
            problem = (
                f"variant {change.variant.name!r} on {edit.path!r}, which the files hold in parts"
            )
            raise MergeError(
                problem, "the whole of it in one tensor", "merge it in memory"
            ) from None
        shape = change.dims[:2]
        sliced_parameters = {
            name: value[groups]
            if name == "A"
            else value[groups, rows]
            if name == "B"
            else value.view(shape)[groups, rows].flatten()
            for name, value in parameters.items()
        }
        return change.variant.resolve(sliced_parameters, change.scale, lambda: layer_weight)
    if change.rows is not None:
        low = low.place(change.rows, change.dims.out)
    return LowRank(low.A[groups], low.B[groups, rows], low.scale), None


def _sum_changes(
    terms: Sequence[tuple[float, LowRank, Tensor | None]],
) -> tuple[LowRank, Tensor | None]:
    """Σ wᵢ (gᵢ ⊙ (W + ΔWᵢ) − W) as one change G ⊙ (W + ΔW) − W."""
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1:]
    shares, lows, optional_gains = zip(*terms, strict=True)
    if all(gain is None for gain in optional_gains):
        return LowRank.sum(lows, shares), None
    sizes = lows[0].B.shape[:2]
    gains = [
        torch.ones(sizes).double() if gain is None else gain.double().view(sizes)
        for gain in optional_gains
    ]
    total_gain = 1 + torch.stack(
        [share * (gain - 1) for share, gain in zip(shares, gains, strict=True)]
    ).sum(0)
    if total_gain.abs().min() < 1e-6:
        raise MergeError(
            "a row that these weights scale to nothing", "a gain that is not 0", "change them"
        )
    scaled_lows = [
        low.to(torch.float64).scale_rows(gain / total_gain)
        for low, gain in zip(lows, gains, strict=True)
    ]
    return LowRank.sum(scaled_lows, shares), total_gain.flatten()


def merge_full(edit: TensorEdit, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Merge values trained in full into ``weight``, a slice of a tensor: W + Σ wᵢ (Pᵢ − W),
    rounded once."""
    values = [
        (share, value[edit.param_slice.index].reshape(weight.shape)) for share, value in edit.full
    ]
    if not weight.is_floating_point() or (len(values) == 1 and values[0][0] == 1):
        value = values[0][1]
        return round_once(value.double(), dtype) if value.is_floating_point() else value.to(dtype)
    base = weight.double()
    return round_once(base + sum(share * (value.double() - base) for share, value in values), dtype)
