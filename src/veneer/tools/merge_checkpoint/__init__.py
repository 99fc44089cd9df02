"""Merge adapters into a checkpoint on disk, tensor by tensor, with little memory.

    MergeJob          a checked merge: the base's files, the changes of each tensor, the options
    CheckpointWriter  reads, merges and writes each tensor; the tensors in memory need no more bytes
                      than the largest tensor and its result
    aux_files         copies or adjusts the configuration and the tokenizer

The result is written to a temporary folder, and takes the place of the folder ``out`` only when it
is complete and flushed to disk (``fileio.atomic``). If the merge fails or is killed before that,
``out`` is unchanged. The next merge into ``out`` removes the temporary folder of a killed merge.
Rejected: a journal from which a killed merge could resume. Merging takes about as long as copying
the files, so that starting again costs little.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files.file_names import content_hash
from veneer.attach import MergeReport
from veneer.errors import BaseMismatchError, MergeError, listing, raise_all
from veneer.fileio.atomic import must_not_exist, new_folder
from veneer.fileio.locks import hold_lock
from veneer.models.safetensors_dir import MODEL_FILES, must_hold_no_adapter, open_checkpoint
from veneer.tools.merge_checkpoint import aux_files
from veneer.tools.merge_checkpoint.aux_files import MERGE_RECORD
from veneer.tools.merge_checkpoint.job import MergeJob, merge_tensor, plan_job
from veneer.tools.merge_checkpoint.merged_files import CheckpointWriter, Progress, as_bytes

__all__ = ["CheckpointMerge", "merge_checkpoint", "prove"]


@dataclass(frozen=True)
class CheckpointMerge:
    """The result of ``merge_checkpoint``; ``str(merge)`` is readable text.

    Fields:
        path: the folder of the result.
        report: how much each low-rank change altered its weight, and how much of the change
            survived rounding. The paths in it are names of tensors in the files.
        left_out: names of files and folders of the base that were not copied, such as weights in
            other formats.
        notes: sentences that the user should read, such as that the vocabulary grew.
    """

    path: Path
    report: MergeReport
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [self.report.summary, f"written to {self.path}"]
        left_out_text = (
            f"not copied (weights of the base, hidden folders): {listing(self.left_out)}"
        )
        lines += [left_out_text] if self.left_out else []
        return "\n".join([*lines, *self.notes])


def merge_checkpoint(
    base: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "auto",
    verify_base: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    model: nn.Module | None = None,
) -> CheckpointMerge:
    """Merge adapters into the safetensors files of ``base``, and write the result to the folder
    ``out``, with the same shards, tensor names, index, configuration and tokenizer.

    Args:
        base: a folder with one or several safetensors files.
        adapters: adapter folders, or pairs (folder, coefficient wᵢ). The result is W + Σ wᵢ ΔWᵢ;
            wᵢ is 1 for a folder alone.
        dtype: the dtype of the floating-point tensors of the result (float64, float32, bfloat16 or
            float16). FP8 tensors and integers keep theirs. None keeps all dtypes.
        rounding: how 16-bit weights are rounded. "nearest": each element to the nearest value.
            "faithful": up or down, so that errors cancel in the directions that the adapter reads.
            "auto": "faithful" for the weights whose change "nearest" would distort.
        verify_base: whether to compare each changed weight with the fingerprints (hashes of base
            weights) in the adapters' records.
        overwrite: whether an existing folder ``out`` may be replaced. Files in it that do not
            belong to a model stay. Of the files of a tokenizer, a processor or generation, those
            are replaced or removed that an earlier merge wrote.
        progress: called after each tensor, with (bytes of the base's tensors that are done, bytes
            of all of them, name of the tensor).
        model: the model of ``base``, if transformers cannot build it from the config.json.

    Raises:
        CheckpointError: the base's files cannot be used, or lack a weight that an adapter changes.
        AdapterError, TargetError: an adapter cannot be read, or does not fit the model.
        BaseMismatchError: an adapter was trained on other weights.
        ConfigError: ``rounding`` is unknown, or transformers does not know the model.
        MergeError: ``adapters`` is empty; ``dtype`` is unsupported; a change cannot be merged into
            the files; a merged weight is not finite in its dtype; ``out`` holds the base; or
            another process merges into ``out``.
        OutputExistsError: ``out`` exists and ``overwrite`` is False, or ``out`` holds an adapter.

    After an error no temporary files remain, and ``out`` is unchanged.
    """
    out = Path(out).expanduser().resolve()
    must_not_exist(out, overwrite)
    must_hold_no_adapter(out)
    job = plan_job(base, adapters, dtype, rounding, verify_base, model)
    try:
        return _write_merge(job, base, out, overwrite, progress)
    except BaseMismatchError:
        if not job.merge_plan.uses_stub_model:
            raise
    # A weight differs from its fingerprint. Either the base is another one, or the first plan
    # mapped names wrongly, because its stub model assumes that the files name tensors as the model
    # names its parameters. So plan again with the model itself. If the base is another one, the
    # second merge raises the error again.
    job = plan_job(base, adapters, dtype, rounding, verify_base, model, allow_stub_model=False)
    return _write_merge(job, base, out, overwrite, progress)


def _write_merge(
    job: MergeJob, base: str | Path, out: Path, overwrite: bool, progress: Progress | None
) -> CheckpointMerge:
    if out == job.checkpoint.folder.resolve() or out in job.checkpoint.folder.resolve().parents:
        raise MergeError(
            f"{out}, which holds the base", "another folder for the result", "choose another"
        )
    lock_path = out.with_name(f".{out.name}.merging.lock")
    with (
        hold_lock(
            lock_path,
            lambda holder: MergeError(
                f"{holder}, which merges into {out}",
                "one at a time",
                "wait for it, or choose another folder",
            ),
        ),
        new_folder(
            out,
            overwrite=overwrite,
            replaces=(*MODEL_FILES, *aux_files.list_earlier_files(out)),
        ) as staging_folder,
    ):
        layer_reports = CheckpointWriter(job, staging_folder).write(progress)
        left_out = _write_aux_files(job, staging_folder)
        report = MergeReport(", ".join(path.name for path, _ in job.adapters), tuple(layer_reports))
        (staging_folder / MERGE_RECORD).write_text(
            json.dumps(_record(job, base, report), indent=2) + "\n"
        )
    return CheckpointMerge(out, report, tuple(left_out), job.merge_plan.notes)


def prove(
    base: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "auto",
    progress: Progress | None = None,
    model: nn.Module | None = None,
) -> int:
    """Verify byte by byte that ``out`` is the result of ``merge_checkpoint`` with these arguments.
    Tensors that the merge copied are compared with the base's, and merged tensors with the results
    of a new merge in memory. The configuration and tokenizer files are compared too; further files
    of a tokenizer, a processor or generation in ``out`` are a difference. Returns the number of
    tensors in ``out``. Nothing is written. Arguments that ``merge_checkpoint`` refuses raise the
    same errors here.

    Raises:
        MergeError: tensors or files differ; the error lists them.
    """
    job = plan_job(base, adapters, dtype, rounding, False, model)
    merged_checkpoint = open_checkpoint(out)
    problems = [
        f"{name!r} is in one of them only"
        for name in merged_checkpoint.file_of.keys() ^ job.checkpoint.file_of.keys()
    ]
    total_bytes, bytes_done = sum(map(job.checkpoint.bytes, job.checkpoint.file_of)), 0
    _, use_numba = job.memory_limit()
    for name in job.checkpoint.file_of.keys() & merged_checkpoint.file_of.keys():
        if merged_checkpoint.dtype(name) != job.output_dtype(name) or merged_checkpoint.shape(
            name
        ) != job.checkpoint.shape(name):
            problems.append(f"{name!r} is of another shape or dtype")
            continue
        expected_tensor, _ = merge_tensor(job, name, job.checkpoint.read(name), use_numba)
        if not torch.equal(as_bytes(expected_tensor), as_bytes(merged_checkpoint.read(name))):
            problems.append(f"{name!r} holds other numbers")
        bytes_done += job.checkpoint.bytes(name)
        if progress is not None:
            progress(bytes_done, total_bytes, name)
    problems += aux_files.list_differences(job.checkpoint, job.aux_changes, Path(out))
    raise_all(MergeError, f"{out} is not the base with these adapters", problems)
    return len(merged_checkpoint.file_of)


def _write_aux_files(job: MergeJob, target_folder: Path) -> list[str]:
    """Write the files that hold no weights, and the index of the shards if the base has one, to
    ``target_folder``. Returns the names of the base's files and folders that are not copied, such
    as weights in other formats and hidden folders."""
    checkpoint = job.checkpoint
    left_out = aux_files.write_aux_files(job.checkpoint, job.aux_changes, target_folder)
    if checkpoint.index is not None:
        total_bytes = sum(map(job.output_bytes, checkpoint.file_of))
        metadata = checkpoint.index.get("metadata") or {}
        base_index_path, result_index_path = (
            folder / str(checkpoint.index_name) for folder in (checkpoint.folder, target_folder)
        )
        if metadata.get("total_size") == total_bytes:
            shutil.copyfile(base_index_path, result_index_path)
        else:
            index = {**checkpoint.index, "metadata": {**metadata, "total_size": total_bytes}}
            result_index_path.write_text(json.dumps(index, indent=2) + "\n")
    return left_out


def _record(job: MergeJob, base: str | Path, report: MergeReport) -> dict[str, Any]:
    """The content of the file ``MERGE_RECORD`` in the result: the base, the adapters, the files
    without weights, the options and the effect on each weight. Folders are given by their last name
    only, so that the record reveals no paths of this machine."""
    return {
        "veneer": version("veneer"),
        "base": Path(base).name,
        "adapters": [
            {"name": path.name, "weight": weight, "content": content_hash(path)}
            for path, weight in job.adapters
        ],
        aux_files.FILES_FIELD: aux_files.list_written_files(job.checkpoint, job.aux_changes),
        "dtype": None if job.dtype is None else str(job.dtype).removeprefix("torch."),
        "rounding": job.rounding,
        "layers": {
            layer.path: {
                field: field_value
                for field, field_value in asdict(layer).items()
                if field != "path"
            }
            for layer in report.layers
        },
    }
