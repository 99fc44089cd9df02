"""A merge as it was asked for, and what it makes of one tensor.

    MergeJob       the base's files, what the adapters change (``merge_plan``), dtype, rounding
    merge_tensor(job, name, tensor)  ->  the tensor of the result, and what the merge did to it

Each weight is what ``veneer.merge`` would write into the live model, bit for bit: both call
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
from veneer.attach.merge_report import LayerMerge
from veneer.errors import BaseMismatchError, MergeError, listing, sentence
from veneer.fileio.hashing import fingerprint_beside, fingerprint_of, kind_of
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import HALF, Sums, known_rounding, wanting
from veneer.models.safetensors_dir import NAMES, Checkpoint, in_order, open_checkpoint
from veneer.tools.merge_checkpoint.aux_files import Changes
from veneer.tools.merge_checkpoint.growth import grown
from veneer.tools.merge_checkpoint.head import with_added
from veneer.tools.merge_checkpoint.linear_stub import linear_stub_model
from veneer.tools.merge_checkpoint.merge_plan import (
    Adapter,
    MergePlan,
    TensorEdit,
    apply,
    recipe_for,
    replaced,
)

#: bytes that numba takes, with what it needs to compile
NUMBA = 128 * 2**20
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergeJob:
    """Everything that a merge will do, before it begins."""

    checkpoint: Checkpoint
    merge_plan: MergePlan
    adapters: tuple[Adapter, ...]
    dtype: torch.dtype | None
    rounding: str
    verify_base: bool
    #: the folder of the adapter whose tokenizer the result gets; None: the base's
    tokenizer: Path | None
    #: how a parameter that several tensors hold is rounded, found when the first of them is there
    decided: dict[str, str] = field(default_factory=dict)

    @property
    def aux_changes(self) -> Changes:
        """How the files beside the weights differ from the base's."""
        rows = max(self.merge_plan.sizes.values(), default=None)
        return Changes(self.dtype, rows, self.tokenizer, self.merge_plan.head)

    def target(self, name: str) -> torch.dtype:
        own = self.checkpoint.dtype(name)
        return self.dtype if self.dtype is not None and own in FLOATS else own

    def copied(self, name: str) -> bool:
        as_it_is = name not in self.merge_plan.works and name not in self.merge_plan.sizes
        return as_it_is and self.target(name) == self.checkpoint.dtype(name)

    def written(self, name: str) -> int:
        own = self.checkpoint.bytes(name)
        return own // self.checkpoint.dtype(name).itemsize * self.target(name).itemsize

    def both(self, name: str) -> int:
        return self.checkpoint.bytes(name) + self.written(name)

    def room(self) -> tuple[int, bool]:
        """Bytes for what is between reading and writing (twice the largest tensor is promised,
        often one that no adapter changes), and whether that leaves enough for numba."""
        limit = max(map(self.both, self.checkpoint.where), default=0)
        needed = max(
            (self.both(name) for name in self.checkpoint.where if not self.copied(name)), default=0
        )
        compiled = limit - NUMBA >= needed
        return (limit - NUMBA if compiled else limit), compiled

    def layout(self, file: str) -> tuple[bytes, dict[str, int]]:
        """(the bytes before the first tensor, where each tensor begins) of a file of the result."""
        header, names = self.checkpoint.files[file], in_order(self.checkpoint.files[file])
        starts = dict(zip(names, accumulate(map(self.written, names), initial=0), strict=False))
        same = (
            not (self.merge_plan.sizes.keys() | self.merge_plan.added.keys())
            & header.tensors.keys()
        )
        if same and all(self.target(name) == self.checkpoint.dtype(name) for name in names):
            with (self.checkpoint.folder / file).open("rb") as stream:
                head = stream.read(header.data_start)
        else:
            said: dict[str, Any] = (
                {"__metadata__": dict(header.metadata)} if header.metadata else {}
            )
            for name, start in starts.items():
                dtype, shape = NAMES[self.target(name)], list(self.checkpoint.shape(name))
                said[name] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [start, start + self.written(name)],
                }
            text = json.dumps(said, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + start for name, start in starts.items()}

    def compare(self, paths: Sequence[str], loaded: Mapping[str, Tensor]) -> None:
        """BaseMismatchError for parameters not of the adapters' base; ``loaded`` are tensors that
        are there already."""
        mismatches = []

        def read(name: str) -> Tensor:
            return loaded[name] if name in loaded else self.checkpoint.read(name)

        for path in paths:
            tensors, shape, said = self.merge_plan.fingerprints[path]
            works = {
                name: next(w for w in self.merge_plan.works[name] if w.path == path)
                for name in tensors
            }
            found = {
                (kind, ids): fingerprint_beside(read(tensors[0]), ids, kind) if ids
                else fingerprint_of(shape, (read(name)[work.place.within] for name, work in works.items()), kind)
                for kind, ids in {(kind_of(expected), ids) for expected, ids in said.values()}
            }  # fmt: skip
            if wrong := [
                one
                for one, (expected, ids) in said.items()
                if expected != found[kind_of(expected), ids]
            ]:
                mismatches.append(f"{listing(tensors, 2)} (adapter {listing(wrong)})")
        if mismatches:
            wrong = f"other weights in {self.checkpoint.folder} ({listing(mismatches, 3)})"
            expected = "the weights that the adapters were trained on"
            same = "if these are the same in another precision"
            do = f"name that base, or pass verify_base=False (--no-verify-base) {same}"
            raise BaseMismatchError(f"This is another base. {sentence(wrong, expected, do)}")


def planned(
    base: Any,
    adapters: Any,
    dtype: Any,
    rounding: str,
    verify_base: bool,
    model: Any,
    by_prints: bool = True,
) -> MergeJob:
    """Check what was asked for and find what it does to each tensor, as ``merge_checkpoint`` takes
    it. ``by_prints`` allows to find the tensors by the fingerprints that the adapters say, if they
    are compared."""
    if not adapters:
        raise MergeError("no adapter", "one or several", "name them")
    known_rounding(rounding)
    if dtype is not None and dtype not in FLOATS:
        raise MergeError(
            f"dtype={dtype}", listing(map(str, FLOATS)), "choose one, or None to keep the base's"
        )
    pairs = [(one, 1.0) if isinstance(one, str | Path) else one for one in adapters]
    given = [(Path(path), float(weight)) for path, weight in pairs]
    folder = Path(base).expanduser()
    checkpoint = open_checkpoint(folder)  # first: it is the quicker to fail
    saved_adapters = [read(path) for path, _ in given]
    tokenizer = common_tokenizer({str(path): path for path, _ in given})
    drawn = (
        linear_stub_model(checkpoint, saved_adapters)
        if model is None and verify_base and by_prints
        else None
    )
    merge_plan = recipe_for(folder, given, model if drawn is None else drawn)
    merge_plan = replace(merge_plan, by_prints=drawn is not None)
    checkpoint = with_added(grown(checkpoint, merge_plan.sizes), merge_plan.added)
    return MergeJob(checkpoint, merge_plan, tuple(given), dtype, rounding, verify_base, tokenizer)


def merge_tensor(
    job: MergeJob, name: str, tensor: Tensor, compiled: bool
) -> tuple[Tensor, list[LayerMerge]]:
    """A tensor of the result, and what the merge did to it. ``compiled`` allows numba."""
    dtype, layers, result = job.target(name), [], None
    for work in job.merge_plan.works.get(name, ()):
        part = tensor[work.place.within]
        if work.changes:
            folded = apply(work, part, dtype, _rounding(job, work, dtype, compiled), compiled)
            value = folded.weight
            layers.append(
                LayerMerge(
                    name, folded.change, folded.retention, folded.rounding, folded.sums.retention
                )
            )
            finite = folded.finite
        else:
            value = replaced(work, part, dtype)
            finite = not value.is_floating_point() or bool(value.isfinite().all())
        if not finite:
            problem = f"{name}: W + ΔW is not finite in {dtype}"
            raise MergeError(
                problem, "finite weights", "check the adapter, or choose a wider dtype"
            )
        if not work.place.within:
            result = value
        else:
            result = _cast(name, tensor, dtype).clone() if result is None else result
            result[work.place.within] = value
    return _cast(name, tensor, dtype) if result is None else result, layers


def _rounding(job: MergeJob, work: TensorEdit, dtype: torch.dtype, compiled: bool) -> str:
    """How to round a part of a parameter: as all of it, of which "auto" decides at once."""
    tensors = job.merge_plan.parts.get(work.path)
    if tensors is None or job.rounding != "auto" or dtype not in HALF:
        return job.rounding
    if work.path not in job.decided:
        whole = Sums(0.0, 0.0, 0.0, 0.0)
        for name in tensors:
            own = next(other for other in job.merge_plan.works[name] if other.path == work.path)
            part = job.checkpoint.read(name)[own.place.within]
            whole += apply(own, part, dtype, "nearest", compiled).sums
        job.decided[work.path] = "faithful" if wanting(whole) else "nearest"
    return job.decided[work.path]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    result = round_once(tensor, dtype) if tensor.dtype == torch.float64 else tensor.to(dtype)
    if bool((tensor.isfinite() & ~result.isfinite()).any()):
        problem = f"{name}: numbers beyond the range of {dtype}"
        raise MergeError(problem, "a dtype that holds them", "choose bfloat16 or float32")
    return result
