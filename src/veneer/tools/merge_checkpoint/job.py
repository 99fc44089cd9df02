"""Check and plan a merge of adapters into a checkpoint, lay out its files, and merge one tensor.

    plan_job(base, adapters, …)                ->  MergeJob: the base's files, the plan, the options
    merge_tensor(job, name, tensor, use_numba) ->  the merged tensor, and reports of its weights

Each merged weight equals bit for bit the weight that ``veneer.merge`` writes into a model in
memory, because both call ``kernels.rounding.fold``.
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
from veneer.models.safetensors_dir import NAMES, Checkpoint, names_by_offset, open_checkpoint
from veneer.tools.merge_checkpoint.aux_files import FileChanges
from veneer.tools.merge_checkpoint.growth import add_tensors, grow_checkpoint
from veneer.tools.merge_checkpoint.linear_stub import linear_stub_model
from veneer.tools.merge_checkpoint.merge_plan import (
    FLOAT_DTYPES,
    MergePlan,
    TensorEdit,
    WeightedFolder,
    plan_merge,
)

#: bytes of memory that numba needs, including its compiler
NUMBA_BYTES = 128 * 2**20


@dataclass(frozen=True)
class MergeJob:
    """A merge that is checked and planned."""

    checkpoint: Checkpoint
    merge_plan: MergePlan
    adapters: tuple[WeightedFolder, ...]
    dtype: torch.dtype | None
    rounding: str
    verify_base: bool
    #: the folder of the adapter whose tokenizer the result gets; None: the base's tokenizer
    tokenizer: Path | None
    #: by path of a parameter that several tensors hold: its rounding, once it has been chosen
    chosen_roundings: dict[str, str] = field(default_factory=dict)

    @property
    def aux_changes(self) -> FileChanges:
        """The changes of the base's configuration and tokenizer."""
        return FileChanges(
            dtype=self.dtype,
            vocabulary_size=max(self.merge_plan.grown_row_counts.values(), default=None),
            tokenizer=self.tokenizer,
            head=self.merge_plan.head,
        )

    def output_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the result."""
        base_dtype = self.checkpoint.dtype(name)
        return self.dtype if self.dtype is not None and base_dtype in FLOAT_DTYPES else base_dtype

    def is_copied(self, name: str) -> bool:
        """Whether the bytes of a tensor are copied from the base."""
        is_unedited = (
            name not in self.merge_plan.edits and name not in self.merge_plan.grown_row_counts
        )
        return is_unedited and self.output_dtype(name) == self.checkpoint.dtype(name)

    def output_bytes(self, name: str) -> int:
        """The size in bytes of a tensor in the result."""
        base_bytes = self.checkpoint.bytes(name)
        return base_bytes // self.checkpoint.dtype(name).itemsize * self.output_dtype(name).itemsize

    def buffer_bytes(self, name: str) -> int:
        """The bytes of memory for reading and merging a tensor."""
        return self.checkpoint.bytes(name) + self.output_bytes(name)

    def memory_limit(self) -> tuple[int, bool]:
        """(the limit of the bytes of all tensors in memory, whether numba is used). The limit is
        the size of the largest tensor and its result. numba is used if the largest tensor that is
        merged, and numba's own memory, fit into this limit; its memory is then subtracted."""
        limit = max(map(self.buffer_bytes, self.checkpoint.file_of), default=0)
        needed_bytes = max(
            (
                self.buffer_bytes(name)
                for name in self.checkpoint.file_of
                if not self.is_copied(name)
            ),
            default=0,
        )
        use_numba = limit - NUMBA_BYTES >= needed_bytes
        return (limit - NUMBA_BYTES if use_numba else limit), use_numba

    def layout(self, file: str) -> tuple[bytes, dict[str, int]]:
        """For a file of the result: (its safetensors header with the length prefix, the offset in
        bytes of each tensor from the start of the file, by name)."""
        header, names = self.checkpoint.files[file], names_by_offset(self.checkpoint.files[file])
        offsets = dict(
            zip(names, accumulate(map(self.output_bytes, names), initial=0), strict=False)
        )
        has_same_shapes = (
            not (self.merge_plan.grown_row_counts.keys() | self.merge_plan.added_shapes.keys())
            & header.tensors.keys()
        )
        if has_same_shapes and all(
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
            header_json = json.dumps(header_fields, separators=(",", ":")).encode()
            header_json += b" " * (-len(header_json) % 8)
            header_bytes = len(header_json).to_bytes(8, "little") + header_json
        return header_bytes, {name: len(header_bytes) + start for name, start in offsets.items()}

    def check_fingerprints(self, paths: Sequence[str], loaded: Mapping[str, Tensor]) -> None:
        """``BaseMismatchError`` if a parameter does not match the fingerprints in the adapters'
        records. ``loaded``: tensors that are already in memory, by name."""
        mismatches = []

        def read(name: str) -> Tensor:
            return loaded[name] if name in loaded else self.checkpoint.read(name)

        for path in paths:
            tensors, shape, expected_by_adapter = self.merge_plan.fingerprints[path]
            edits = {
                name: next(edit for edit in self.merge_plan.edits[name] if edit.path == path)
                for name in tensors
            }
            actual_fingerprints = {
                (kind, ids): fingerprint_without_rows(read(tensors[0]), ids, kind)
                if ids
                else fingerprint_of(
                    shape,
                    (read(name)[edit.param_slice.within] for name, edit in edits.items()),
                    kind,
                )
                for kind, ids in {
                    (kind_of(expected), ids) for expected, ids in expected_by_adapter.values()
                }
            }
            if mismatched_adapters := [
                adapter
                for adapter, (expected, ids) in expected_by_adapter.items()
                if expected != actual_fingerprints[kind_of(expected), ids]
            ]:
                mismatches.append(f"{listing(tensors, 2)} (adapter {listing(mismatched_adapters)})")
        if mismatches:
            problem = f"other weights in {self.checkpoint.folder} ({listing(mismatches, 3)})"
            expected = "the weights that the adapters were trained on"
            precision_hint = "if these are the same in another precision"
            do = f"name that base, or pass verify_base=False (--no-verify-base) {precision_hint}"
            raise BaseMismatchError(f"This is another base. {sentence(problem, expected, do)}")


def plan_job(
    base: Any,
    adapters: Any,
    dtype: Any,
    rounding: str,
    verify_base: bool,
    model: Any,
    allow_stub_model: bool = True,
) -> MergeJob:
    """Check the arguments of ``merge_checkpoint``, and plan the merge. ``allow_stub_model``:
    whether ``linear_stub_model`` may replace the model. This needs ``verify_base``, as it
    identifies tensors by the fingerprints in the adapters' records."""
    if not adapters:
        raise MergeError("no adapter", "one or several", "name them")
    check_rounding(rounding)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise MergeError(
            f"dtype={dtype}",
            listing(map(str, FLOAT_DTYPES)),
            "choose one, or None to keep the base's",
        )
    adapter_pairs = [
        (adapter, 1.0) if isinstance(adapter, str | Path) else adapter for adapter in adapters
    ]
    weighted_paths = [(Path(path), float(weight)) for path, weight in adapter_pairs]
    # open the checkpoint first, so that a wrong path is reported before the adapters are read
    checkpoint = open_checkpoint(Path(base).expanduser())
    saved_adapters = [read(path) for path, _ in weighted_paths]
    for saved_adapter in saved_adapters:
        saved_adapter.refuse_invocation_tokens("a merge")
    tokenizer = common_tokenizer({str(path): path for path, _ in weighted_paths})
    stub_model = (
        linear_stub_model(checkpoint, saved_adapters)
        if model is None and verify_base and allow_stub_model
        else None
    )
    merge_plan = replace(
        plan_merge(
            checkpoint, weighted_paths, saved_adapters, model if stub_model is None else stub_model
        ),
        uses_stub_model=stub_model is not None,
    )
    checkpoint = add_tensors(
        grow_checkpoint(checkpoint, merge_plan.grown_row_counts), merge_plan.added_shapes
    )
    return MergeJob(
        checkpoint, merge_plan, tuple(weighted_paths), dtype, rounding, verify_base, tokenizer
    )


def merge_tensor(
    job: MergeJob, name: str, tensor: Tensor, use_numba: bool
) -> tuple[Tensor, list[LayerMerge]]:
    """(the merged tensor, a report of each weight in it). ``use_numba``: whether numba may run."""
    dtype, reports, result = job.output_dtype(name), [], None
    for edit in job.merge_plan.edits.get(name, ()):
        weight = tensor[edit.param_slice.within]
        if edit.changes:
            folded = merge_changes(
                edit, weight, dtype, _choose_rounding(job, edit, dtype, use_numba), use_numba
            )
            merged_weight = folded.weight
            reports.append(
                LayerMerge(
                    name, folded.change, folded.retention, folded.rounding, folded.sums.retention
                )
            )
            is_finite = folded.finite
        else:
            merged_weight = merge_full(edit, weight, dtype)
            is_finite = not merged_weight.is_floating_point() or bool(
                merged_weight.isfinite().all()
            )
        if not is_finite:
            raise MergeError(
                f"{name}: W + ΔW is not finite in {dtype}",
                "finite weights",
                "check the adapter, or choose a wider dtype",
            )
        if not edit.param_slice.within:
            result = merged_weight
        else:
            result = _cast(name, tensor, dtype).clone() if result is None else result
            result[edit.param_slice.within] = merged_weight
    return _cast(name, tensor, dtype) if result is None else result, reports


def _choose_rounding(job: MergeJob, edit: TensorEdit, dtype: torch.dtype, use_numba: bool) -> str:
    """The rounding of a slice of a parameter. All slices of a parameter have the same rounding. For
    "auto", it is chosen when the first slice is merged, by the error of rounding all slices to
    nearest."""
    tensors = job.merge_plan.split_tensors.get(edit.path)
    if tensors is None or job.rounding != "auto" or dtype not in HALF_DTYPES:
        return job.rounding
    if edit.path not in job.chosen_roundings:
        rounding_sums = Sums(0.0, 0.0, 0.0, 0.0)
        for name in tensors:
            tensor_edit = next(
                candidate for candidate in job.merge_plan.edits[name] if candidate.path == edit.path
            )
            weight = job.checkpoint.read(name)[tensor_edit.param_slice.within]
            rounding_sums += merge_changes(tensor_edit, weight, dtype, "nearest", use_numba).sums
        job.chosen_roundings[edit.path] = "faithful" if is_inaccurate(rounding_sums) else "nearest"
    return job.chosen_roundings[edit.path]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, rounded once. ``MergeError``: a value is out of its range."""
    if tensor.dtype == dtype:
        return tensor
    cast_tensor = round_once(tensor, dtype) if tensor.dtype == torch.float64 else tensor.to(dtype)
    if bool((tensor.isfinite() & ~cast_tensor.isfinite()).any()):
        raise MergeError(
            f"{name}: numbers beyond the range of {dtype}",
            "a dtype that holds them",
            "choose bfloat16 or float32",
        )
    return cast_tensor


class _NeedsBase(Exception):  # noqa: N818 (a signal, not an error)
    """Raised in ``_resolve_slice`` when a variant asks for the frozen weight."""


def merge_changes(
    edit: TensorEdit,
    weight: Tensor,
    dtype: torch.dtype,
    rounding: str,
    use_numba: bool,
) -> Folded:
    """Merge the changes of ``edit`` into ``weight``, a slice of a tensor; neither is modified. The
    result equals bit for bit what ``veneer.merge`` with this ``rounding`` writes into a model in
    memory. ``use_numba``: whether numba may run."""
    shape = slice_shape(edit.shape, edit.param_slice.index)
    parameter_slice, first_change = weight.reshape(shape), edit.changes[0][1]
    dims = first_change.dims if not edit.param_slice.index else first_change.layer.dims(None, shape)
    layer_weight = first_change.layer.unfold(parameter_slice, dims)
    low_rank, gain = _sum_changes(
        [
            (coefficient, *_resolve_slice(change, edit, layer_weight))
            for coefficient, change in edit.changes
        ]
    )
    folded = fold_change(
        first_change,
        layer_weight,
        low_rank,
        gain,
        dtype=dtype,
        rounding=rounding,
        compiled=use_numba,
    )
    return replace(
        folded, weight=first_change.layer.fold(folded.weight, shape).reshape(weight.shape)
    )


def _resolve_slice(
    change: Change, edit: TensorEdit, layer_weight: Tensor
) -> tuple[LowRank, Tensor | None]:
    """(ΔW, gain) for the slice ``layer_weight`` of the parameter; the gain is None without DoRA.
    A variant that does not need the weight is computed for the whole parameter and then sliced. A
    variant that needs it (DoRA) is computed from the slices of its parameters and of the weight."""
    if not edit.param_slice.index:
        return change.resolve_float64(change.layer.fold(layer_weight, edit.shape))
    if change.tokens is not None:
        raise MergeError(
            f"trained tokens of {edit.path!r}, which the files hold in parts",
            "the whole of it in one tensor",
            "merge it in memory, and save the model",
        )
    all_rows = slice(None)
    groups, rows = (
        (*edit.param_slice.index, all_rows)[:2]
        if change.dims.groups > 1
        else (all_rows, edit.param_slice.index[0])
    )

    def require_base() -> Tensor:
        raise _NeedsBase

    parameters: dict[str, Any] = {
        name: parameter.double() for name, parameter in change.adapter_parameters.items()
    }
    try:
        low_rank, _ = change.variant.resolve(parameters, change.scale, require_base)
    except _NeedsBase:
        if change.rows is not None or parameters.keys() - {"A", "B"} - set(
            change.variant.peft_keys
        ):
            raise MergeError(
                f"variant {change.variant.name!r} on {edit.path!r}, which the files hold in parts",
                "the whole of it in one tensor",
                "merge it in memory",
            ) from None
        shape = change.dims[:2]
        sliced_parameters = {
            name: parameter[groups]
            if name == "A"
            else parameter[groups, rows]
            if name == "B"
            else parameter.view(shape)[groups, rows].flatten()
            for name, parameter in parameters.items()
        }
        return change.variant.resolve(sliced_parameters, change.scale, lambda: layer_weight)
    if change.rows is not None:
        low_rank = low_rank.expand_rows(change.rows, change.dims.out)
    return LowRank(low_rank.A[groups], low_rank.B[groups, rows], low_rank.scale), None


def _sum_changes(
    terms: Sequence[tuple[float, LowRank, Tensor | None]],
) -> tuple[LowRank, Tensor | None]:
    """(ΔW, the gain G) for which G ⊙ (W + ΔW) − W is the sum Σ wᵢ (gᵢ ⊙ (W + ΔWᵢ) − W) over the
    adapters. ``terms``: (coefficient wᵢ, ΔWᵢ, gain gᵢ of the rows) for each adapter. A gain of None
    means 1. ``MergeError``: G is 0 in some row."""
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1:]
    coefficients, low_ranks, optional_gains = zip(*terms, strict=True)
    if all(gain is None for gain in optional_gains):
        return LowRank.sum(low_ranks, coefficients), None
    gain_shape = low_ranks[0].B.shape[:2]  # [g, out]
    gains = [
        torch.ones(gain_shape).double() if gain is None else gain.double().view(gain_shape)
        for gain in optional_gains
    ]
    total_gain = 1 + torch.stack(
        [coefficient * (gain - 1) for coefficient, gain in zip(coefficients, gains, strict=True)]
    ).sum(0)
    if total_gain.abs().min() < 1e-6:
        raise MergeError(
            "a row that these weights scale to nothing", "a gain that is not 0", "change them"
        )
    scaled_low_ranks = [
        low_rank.to(torch.float64).scale_rows(gain / total_gain)
        for low_rank, gain in zip(low_ranks, gains, strict=True)
    ]
    return LowRank.sum(scaled_low_ranks, coefficients), total_gain.flatten()


def merge_full(edit: TensorEdit, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Merge parameters Pᵢ that adapters train in full into W = ``weight``, a slice of a tensor:
    W + Σ wᵢ (Pᵢ − W), rounded once to ``dtype``."""
    trained_values = [
        (coefficient, tensor[edit.param_slice.index].reshape(weight.shape))
        for coefficient, tensor in edit.full
    ]
    if not weight.is_floating_point() or (len(trained_values) == 1 and trained_values[0][0] == 1):
        trained_value = trained_values[0][1]
        if not trained_value.is_floating_point():
            return trained_value.to(dtype)
        return round_once(trained_value.double(), dtype)
    base_value = weight.double()
    change = sum(
        coefficient * (trained_value.double() - base_value)
        for coefficient, trained_value in trained_values
    )
    return round_once(base_value + change, dtype)
