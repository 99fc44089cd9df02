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
from torch import Tensor, nn

from veneer.adapter_files.file_names import common_tokenizer
from veneer.adapter_files.folder import read
from veneer.attach import Change, LayerMerge, fold_change
from veneer.errors import BaseMismatchError, MergeError, listing, sentence
from veneer.fileio.hashing import fingerprint_of, fingerprint_without_rows, kind_of
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import HALF_DTYPES, Folded, Sums, check_rounding, is_inaccurate
from veneer.lowrank import LowRank
from veneer.models.base_weights import slice_shape
from veneer.models.safetensors_dir import DTYPE_NAMES, Checkpoint, names_by_offset, open_checkpoint
from veneer.tools.merge_checkpoint.aux_files import FileChanges
from veneer.tools.merge_checkpoint.growth import add_tensors, grow_checkpoint
from veneer.tools.merge_checkpoint.linear_stub import linear_stub_model
from veneer.tools.merge_checkpoint.merge_plan import (
    FLOAT_DTYPES,
    MergePlan,
    WeightedFolder,
    plan_merge,
)
from veneer.tools.merge_checkpoint.tensor_edits import TensorEdit, merge_full
from veneer.variants import VARIANTS

#: bytes of memory that numba (a compiler for the rounding loop) needs when it is imported and used
NUMBA_BYTES = 128 * 2**20


@dataclass(frozen=True)
class MergeJob:
    """A merge that is checked and planned.

    Fields:
        checkpoint: the base's files; tensors and rows that the merge adds to them read as zeros.
        dtype: the dtype of the floating-point tensors of the result; None keeps their dtypes.
        rounding: "nearest", "faithful" or "auto" (see ``merge_checkpoint``).
        verify_base: whether to compare changed weights with the fingerprints in adapters' records.
        tokenizer_folder: the folder of the adapter whose tokenizer the result gets; None: the
            base's tokenizer.
        chosen_roundings: the rounding that "auto" has chosen for each parameter that the files hold
            in several tensors, by path. It is filled as tensors are merged.
    """

    checkpoint: Checkpoint
    merge_plan: MergePlan
    adapters: tuple[WeightedFolder, ...]
    dtype: torch.dtype | None
    rounding: str
    verify_base: bool
    tokenizer_folder: Path | None
    chosen_roundings: dict[str, str] = field(default_factory=dict)

    @property
    def aux_changes(self) -> FileChanges:
        """How the configuration and the tokenizer of the result differ from the base's."""
        return FileChanges(
            dtype=self.dtype,
            vocabulary_size=max(self.merge_plan.grown_row_counts.values(), default=None),
            tokenizer_folder=self.tokenizer_folder,
            head=self.merge_plan.head,
        )

    def output_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the result."""
        base_dtype = self.checkpoint.dtype(name)
        return self.dtype if self.dtype is not None and base_dtype in FLOAT_DTYPES else base_dtype

    def is_copied(self, name: str) -> bool:
        """Whether a tensor has the same bytes in the result as in the base, so they are copied."""
        is_unedited = (
            name not in self.merge_plan.edits and name not in self.merge_plan.grown_row_counts
        )
        return is_unedited and self.output_dtype(name) == self.checkpoint.dtype(name)

    def output_bytes(self, name: str) -> int:
        """The size in bytes of a tensor in the result."""
        base_bytes = self.checkpoint.bytes(name)
        return base_bytes // self.checkpoint.dtype(name).itemsize * self.output_dtype(name).itemsize

    def buffer_bytes(self, name: str) -> int:
        """The bytes of memory for a tensor of the base together with its result."""
        return self.checkpoint.bytes(name) + self.output_bytes(name)

    def memory_limit(self) -> tuple[int, bool]:
        """(the limit in bytes for all tensors in memory, whether numba may be used). The limit is
        the size of the largest tensor plus its result. numba rounds faster, but needs
        ``NUMBA_BYTES`` itself. It may be used if these and the largest tensor that is merged (not
        copied) fit into the limit together. Then ``NUMBA_BYTES`` are subtracted from the limit."""
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

    def layout(self, file_name: str) -> tuple[bytes, dict[str, int]]:
        """For a file of the result: (its safetensors header with the length prefix, the offset in
        bytes of each tensor from the start of the file, by name)."""
        header, names = (
            self.checkpoint.files[file_name],
            names_by_offset(self.checkpoint.files[file_name]),
        )
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
            with (self.checkpoint.folder / file_name).open("rb") as stream:
                header_bytes = stream.read(header.data_start)
        else:
            header_fields: dict[str, Any] = (
                {"__metadata__": dict(header.metadata)} if header.metadata else {}
            )
            for name, start in offsets.items():
                shape = list(self.checkpoint.shape(name))
                dtype = DTYPE_NAMES[self.output_dtype(name)]
                header_fields[name] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [start, start + self.output_bytes(name)],
                }
            header_json = json.dumps(header_fields, separators=(",", ":")).encode()
            header_json += b" " * (-len(header_json) % 8)
            header_bytes = len(header_json).to_bytes(8, "little") + header_json
        return header_bytes, {name: len(header_bytes) + start for name, start in offsets.items()}

    def check_fingerprints(
        self, parameter_paths: Sequence[str], loaded_tensors: Mapping[str, Tensor]
    ) -> None:
        """Compare parameters of the base with the fingerprints in the adapters' records.
        ``BaseMismatchError``: some parameters differ; the error lists them. ``loaded_tensors``:
        tensors that are already in memory, by name; others are read again."""
        mismatches = []

        def read(name: str) -> Tensor:
            return loaded_tensors[name] if name in loaded_tensors else self.checkpoint.read(name)

        for path in parameter_paths:
            tensor_names, shape, expected_by_adapter = self.merge_plan.fingerprints[path]
            edits = {
                name: next(edit for edit in self.merge_plan.edits[name] if edit.path == path)
                for name in tensor_names
            }
            actual_fingerprints = {
                (hash_kind, token_ids): fingerprint_without_rows(
                    read(tensor_names[0]), token_ids, hash_kind
                )
                if token_ids
                else fingerprint_of(
                    shape,
                    (read(name)[edit.param_slice.within] for name, edit in edits.items()),
                    hash_kind,
                )
                for hash_kind, token_ids in {
                    (kind_of(expected), token_ids)
                    for expected, token_ids in expected_by_adapter.values()
                }
            }
            if mismatched_adapters := [
                adapter
                for adapter, (expected, token_ids) in expected_by_adapter.items()
                if expected != actual_fingerprints[kind_of(expected), token_ids]
            ]:
                mismatches.append(
                    f"{listing(tensor_names, 2)} (adapter {listing(mismatched_adapters)})"
                )
        if mismatches:
            problem = f"other weights in {self.checkpoint.folder} ({listing(mismatches, 3)})"
            expected = "the weights that the adapters were trained on"
            precision_hint = "if these are the same in another precision"
            advice = (
                f"name that base, or pass verify_base=False (--no-verify-base) {precision_hint}"
            )
            raise BaseMismatchError(f"This is another base. {sentence(problem, expected, advice)}")


def plan_job(
    base: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    dtype: torch.dtype | None,
    rounding: str,
    verify_base: bool,
    model: nn.Module | None,
    allow_stub_model: bool = True,
) -> MergeJob:
    """Check the arguments of ``merge_checkpoint``, and plan the merge. Nothing is written.

    Args:
        allow_stub_model: whether a stub with only the changed linear layers (``linear_stub_model``)
            may replace the model. The stub assumes that each tensor has the name of its weight,
            which only fingerprints can verify. So it is used only if ``verify_base`` is True too.
    """
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
    # without ``with_base``: the model of the plan has no values, from which to convert PiSSA
    saved_adapters = [read(path) for path, _ in weighted_paths]
    for saved_adapter in saved_adapters:
        saved_adapter.refuse_invocation_tokens("a merge")
        if VARIANTS[saved_adapter.config.variant].makes_up_for_quantization:
            raise MergeError(
                f"{saved_adapter.path}, which begins with what the quantisation of its base lost",
                "an adapter of the weights in the files",
                "load it on the quantised base, unmerged or merged in memory",
            )
    tokenizer_folder = common_tokenizer({str(path): path for path, _ in weighted_paths})
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
        checkpoint,
        merge_plan,
        tuple(weighted_paths),
        dtype,
        rounding,
        verify_base,
        tokenizer_folder,
    )


def merge_tensor(
    job: MergeJob, name: str, tensor: Tensor, use_numba: bool
) -> tuple[Tensor, list[LayerMerge]]:
    """(the tensor ``name`` of the result, a report of each low-rank change in it).

    Args:
        tensor: the values of the tensor in the base; not modified.
        use_numba: whether numba may be imported and used. The result has the same bits without it.

    Raises:
        MergeError: a value is not finite in the dtype of the result.
    """
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
    """The rounding for merging ``edit``: "nearest", "faithful", or "auto" if ``fold`` may choose.
    If several tensors hold slices of one parameter in 16 bits, all must be rounded alike. Then this
    function resolves "auto" when the first of them is merged: it rounds all slices to nearest, and
    chooses by the error."""
    tensor_names = job.merge_plan.split_tensors.get(edit.path)
    if tensor_names is None or job.rounding != "auto" or dtype not in HALF_DTYPES:
        return job.rounding
    if edit.path not in job.chosen_roundings:
        rounding_sums = Sums(0.0, 0.0, 0.0, 0.0)
        for name in tensor_names:
            tensor_edit = next(
                candidate for candidate in job.merge_plan.edits[name] if candidate.path == edit.path
            )
            weight = job.checkpoint.read(name)[tensor_edit.param_slice.within]
            rounding_sums += merge_changes(tensor_edit, weight, dtype, "nearest", use_numba).sums
        job.chosen_roundings[edit.path] = "faithful" if is_inaccurate(rounding_sums) else "nearest"
    return job.chosen_roundings[edit.path]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, rounded once. ``name`` is for the error text. ``MergeError``: a
    finite value is outside the range of ``dtype``."""
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
    """Raised in ``_resolve_slice`` when a variant such as DoRA asks for the frozen weight, which is
    not available as a whole."""


def merge_changes(
    edit: TensorEdit,
    weight: Tensor,
    dtype: torch.dtype,
    rounding: str,
    use_numba: bool,
) -> Folded:
    """Merge the low-rank changes of ``edit`` into ``weight``, the slice of a tensor that ``edit``
    names; neither is modified. The result has the shape of ``weight``, and equals bit for bit what
    ``veneer.merge`` with this ``rounding`` writes into a model in memory.

    Args:
        dtype: the dtype of the result.
        use_numba: whether numba may be imported and used. The result has the same bits without it.
    """
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
    """(ΔW, gain) of one adapter's change for the slice of the parameter that ``edit`` names: the
    slice becomes gain ⊙ (W + ΔW). The gain has a factor for each output row; None stands for 1.

    ``layer_weight`` holds the base's values W of the slice as [g, out, in], where g counts the
    matrices of a stack. If the adapter's variant of LoRA does not need W, ΔW is computed for the
    whole parameter and then sliced. DoRA needs W: ΔW and the gain are computed from the same slice
    of the adapter's parameters and of W. ``MergeError``: a slice alone cannot be computed.
    """
    if not edit.param_slice.index:
        return change.resolve_float64(change.layer.fold(layer_weight, edit.shape))
    if change.tokens is not None:
        raise MergeError(
            f"trained tokens of {edit.path!r}, which the files hold in parts",
            "the whole of it in one tensor",
            "merge it in memory, and save the model",
        )
    whole_axis = slice(None)
    group_slice, row_slice = (
        (*edit.param_slice.index, whole_axis)[:2]
        if change.dims.groups > 1
        else (whole_axis, edit.param_slice.index[0])
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
        group_row_shape = change.dims[:2]
        sliced_parameters = {
            name: parameter[group_slice]
            if name == "A"
            else parameter[group_slice, row_slice]
            if name == "B"
            else parameter.view(group_row_shape)[group_slice, row_slice].flatten()
            for name, parameter in parameters.items()
        }
        return change.variant.resolve(sliced_parameters, change.scale, lambda: layer_weight)
    if change.rows is not None:
        low_rank = low_rank.expand_rows(change.rows, change.dims.out)
    return LowRank(
        low_rank.A[group_slice], low_rank.B[group_slice, row_slice], low_rank.scale
    ), None


def _sum_changes(
    terms: Sequence[tuple[float, LowRank, Tensor | None]],
) -> tuple[LowRank, Tensor | None]:
    """(ΔW, the gain G) for which G ⊙ (W + ΔW) − W is the sum Σ wᵢ (gᵢ ⊙ (W + ΔWᵢ) − W) over the
    adapters. A gain has a factor for each output row; None stands for 1 in all rows.

    ``terms``: (coefficient wᵢ, ΔWᵢ, gain gᵢ) for each adapter. ``MergeError``: G is nearly 0 in
    some row, so that ΔW, which is divided by G, is undefined."""
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
