"""All checks of an adapter folder: is it undamaged, and was it trained on this base?

``read`` and ``load`` raise at the first problem. ``verify`` runs the same checks one by one and
reports the result of each check as a ``Finding``, even if the check passed.

    error      ``read`` or ``load`` refuses the folder, or the adapter does not fit the base
    warning    the folder loads, but somebody should look at it
    ok         the check passed

Norms: ‖ΔW‖ of each change is compared with the adapter's other changes of the same shape. Let d be
the distance of log ‖ΔW‖ from its median. A change is an outlier if d > 6 · 1.4826 · (median of all
d) and its norm differs from the median norm by more than a factor of ten. Medians are used, because
outliers hardly move them, unlike a mean and a standard deviation (Leys et al. 2013, "Detecting
outliers"). (1.4826 · median d estimates the standard deviation of normally distributed values.)

The weights of the base are read from its files one at a time (``verify_base.py``). A model on the
meta device, made from the base's config (``models.meta_model``), tells which tensors of the files
make up which weight. Without such a config, weights are found by the names of the tensors.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import file_names, folder, number_checks
from veneer.adapter_files.findings import Finding, FindingLog, Report
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.record import (
    PARAMETERS,
    RECORD,
    compare_hashes,
    record_in_header,
    record_problems,
)
from veneer.adapter_files.verify_base import change_dims, check_against_base
from veneer.errors import CheckpointError, listing, sentence
from veneer.fileio.tensors import read_tensors
from veneer.fileio.untrusted import MAX_JSON_BYTES, describe_format, location_problems, read_json
from veneer.formats import peft, peft_paths, peft_tokens
from veneer.formats.peft_targets import describe_ignored
from veneer.formats.peft_tuners import check_config, tuner_of
from veneer.lowrank import LowRank
from veneer.models.base_weights import BaseWeights, open_base_weights

__all__ = ["Finding", "Report", "verify"]

#: the suffixes of files that a computer or an interpreter executes
_CODE_SUFFIXES = frozenset(
    [
        ".py",
        ".pyc",
        ".pyd",
        ".so",
        ".dll",
        ".dylib",
        ".exe",
        ".sh",
        ".bat",
        ".cmd",
        ".ps1",
        ".js",
        ".jar",
    ]
)
#: the limits for an outlier: at least MIN_SAME_SHAPE changes have its shape; its d, defined in the
#: docstring of this module, is more than MAX_RELATIVE_DEVIATION times the median d; its norm
#: and the median norm differ by more than the factor MIN_NORM_RATIO
MIN_SAME_SHAPE, MAX_RELATIVE_DEVIATION, MIN_NORM_RATIO = 6, 6 * 1.4826, 10


def verify(path: str | Path, base: str | Path | nn.Module | None = None) -> Report:
    """Check an adapter folder, and whether it was trained on ``base``.

    Without a base, ``verify`` needs no model. With a base, each weight that the adapter changes is
    compared with its recorded fingerprint, with one weight in memory at a time. If another library
    wrote the adapter, names and shapes are compared instead.

    Args:
        base: a folder with safetensors, or a model. If transformers knows the folder's config,
            weights are read as transformers loads them, even if they are fused, stacked or tied.
            Else they are found by their names, which may differ by a prefix; a tied embedding may
            have either of its names.

    Returns:
        A report. Problems of the adapter are findings in the report, and never raised.

    Raises:
        CheckpointError: ``base`` is a path without safetensors, or its files are damaged.
    """
    verification = _Verification(Path(path), None if base is None else open_base_weights(base))
    verification.run()
    return Report(verification.path, tuple(verification.log.findings))


class _Verification:
    """One run of all checks of the folder ``path``. ``weights``: the base's; None without a base.
    The results are collected in ``log``."""

    def __init__(self, path: Path, weights: BaseWeights | None) -> None:
        self.path, self.weights = path, weights
        self.log = FindingLog()

    def run(self) -> None:
        """Run the checks in order. Checks are left out if an earlier one could not read the files
        that they need."""
        path, log = self.path, self.log
        log.add_problems(
            "files",
            folder.folder_problems(path),
            f"{peft.CONFIG} and {peft.TENSORS} are there, and no pickle of them",
        )
        if not path.is_dir():
            return
        self.check_extra_files()
        readable_names = {
            name
            for name in file_names.CORE_FILES
            if (path / name).is_file() and not location_problems(path, [name])
        }
        has_config, has_tensors = peft.CONFIG in readable_names, peft.TENSORS in readable_names
        peft_config = log.try_step("config", read_json, path / peft.CONFIG) if has_config else None
        tensors_and_header = (
            log.try_step("tensors", read_tensors, path / peft.TENSORS) if has_tensors else None
        )
        if tensors_and_header is None:
            return
        tensors, header = tensors_and_header
        log.add("ok", "tensors", f"{len(tensors)} tensors, each where the header says")
        has_record = "veneer" in header
        record, parameters = self.check_record(peft_config, tensors, header, readable_names)
        original_files = peft_config, tensors
        if peft_config is not None:
            peft_config, tensors = peft_tokens.convert_to_lora(peft_config, tensors)
        if (fields := peft_config) is not None:
            peft_config = log.try_step(
                "config", lambda: check_config(fields, has_record, with_base=True) or fields
            )
        self.check_numbers({**tensors, **(parameters or {})})
        if peft_config is None or parameters is None or (record is None and has_record):
            return
        if record is None:
            converted = log.try_step("layers", folder.convert_foreign_files, *original_files)
            if converted is None:
                return
            peft_config, tensors, ignored_modules = converted
            if ignored_modules:
                log.add("warning", "config", describe_ignored(ignored_modules))
        self.check_layers(peft_config, record, tensors, parameters)

    def check_record(
        self,
        peft_config: Mapping[str, Any] | None,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, str],
        readable_names: set[str],
    ) -> tuple[dict[str, Any] | None, dict[str, Tensor] | None]:
        """Check the record and the hashes. Returns (the record, the tensors of
        ``veneer.safetensors``): the record is None if there is none or it cannot be used, the
        tensors are None if the file could not be read.

        Args:
            peft_config: the fields of ``adapter_config.json``; None if they could not be read.
            header: the texts in the header of ``adapter_model.safetensors``.
            readable_names: the files of the folder that may be opened.
        """
        path = self.path
        record = self.log.try_step("record", record_in_header, path, header)
        if any(
            os.path.lexists(path / name) and name not in readable_names
            for name in (RECORD, PARAMETERS)
        ):
            # do not open a file that must not be read, such as a link that leaves the folder; the
            # check "files" has reported it already
            return None, None
        if record is not None:
            is_valid, parameters = self.check_hashes(record, peft_config or {}, tensors)
            return (record if is_valid else None), parameters
        if not (path / RECORD).exists() and "veneer" not in header:
            self.log.add(
                "warning",
                "record",
                "written by another library: nothing tells whether it was altered, or for which"
                " base",
            )
        return None, {}

    def check_hashes(
        self,
        record: Mapping[str, Any],
        peft_config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> tuple[bool, dict[str, Tensor] | None]:
        """Check the fields of the record and the hashes in it. Returns (whether the record is valid
        and no file has changed, the tensors of ``veneer.safetensors``, or None if these could not
        be read)."""
        problems = list(record_problems(record, self.path))
        parameters = None
        if not problems:
            parameters = self.log.try_step("record", folder.read_parameters, self.path, record)
        changed_by_content = (
            self.log.try_step(
                "record", compare_hashes, self.path, record, peft_config, tensors, parameters
            )
            or {}
        )
        expected, advice = "the files as they were saved", "get another copy"
        problems += [
            sentence(f"{content} changed after it was written", expected, advice)
            for content, has_changed in changed_by_content.items()
            if has_changed
        ]
        if changed_by_content or problems:
            self.log.add_problems(
                "record", problems, f"the hashes are right: {', '.join(changed_by_content)}"
            )
        return bool(changed_by_content) and not problems, parameters

    def check_layers(
        self,
        peft_config: Mapping[str, Any],
        record: Mapping[str, Any] | None,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
    ) -> None:
        """Check that the files make up one adapter, and then check its changes. ``parameters``: the
        tensors of ``veneer.safetensors``."""
        tuner = tuner_of(peft_config) if record is None else None
        weight_lookup = None if self.weights is None or tuner is None else self.shape_and_dtype
        adapter_files = self.log.try_step(
            "layers",
            folder.assemble,
            self.path,
            peft_config,
            record,
            tensors,
            parameters,
            weight_lookup,
        )
        if adapter_files is None:
            return
        if adapter_files.tuner is not None and adapter_files.tuner.needs_base_shapes:
            self.log.add(
                "warning",
                "layers",
                f"{len(adapter_files.tuner.paths)} changes of {adapter_files.tuner.tuner.type},"
                " whose shapes only the base tells: give it to have them checked",
            )
            return
        if adapter_files.unordered_modules:
            self.log.add(
                "warning",
                "layers",
                f"several parameters of {listing(adapter_files.unordered_modules, 3)}, whose order"
                " only the model tells: load it to have their changes checked",
            )
            return
        products = self.log.try_step("layers", lambda: adapter_files.products)
        if products is not None:
            self.check_changes(adapter_files, products)

    def check_changes(self, adapter_files: AdapterFiles, products: Mapping[str, LowRank]) -> None:
        """Check the targets and norms of an adapter, warn of parameters that were random in
        training and are in no file ("fresh" in the record), and check the adapter against the base.
        ``products``: the low-rank change of each module or parameter, by path."""
        token_count = sum(len(token_rows.ids) for token_rows in adapter_files.tokens.values())
        tokens_text = f", {token_count} tokens" if token_count else ""
        self.log.add(
            "ok",
            "layers",
            f"{len(products)} changes, as the config says, and {len(adapter_files.full)} in full"
            f"{tokens_text}",
        )
        # in a folder of another library, a target without tensors may be a sign of lost tensors;
        # without a model, nothing else tells
        if adapter_files.record is None:
            targets = adapter_files.peft_config.get("target_modules") or ()
            unused_targets = [
                name
                for name in (() if isinstance(targets, str) else targets)
                if not peft_paths.expected_paths({"target_modules": [name]}, products)
            ]
            if unused_targets:
                self.log.add(
                    "warning", "config", f"targets without a tensor: {listing(unused_targets)}"
                )
        norms = {path: product.norm() for path, product in products.items()}
        self.check_norms(adapter_files, products, norms)
        fresh_names = adapter_files.metadata.get("base", {}).get("fresh")
        if fresh_names:
            self.log.add(
                "warning",
                "proof",
                f"random as it was trained, and in no file: {listing(fresh_names, 4)}. Whatever"
                " reads them gives other answers after each load of the base; train_also would have"
                " kept them",
            )
        if self.weights is not None:
            try:
                check_against_base(self.log, adapter_files, products, norms, self.weights)
            except CheckpointError as error:  # such as a file of the base that was just truncated
                self.log.add("error", "base", str(error))

    def shape_and_dtype(self, path: str) -> tuple[tuple[int, ...], torch.dtype | None] | None:
        """The shape and dtype of the base's weight at ``path``; None if there is no such weight."""
        weight = None if self.weights is None else self.weights.get(path)
        return None if weight is None else (weight.shape, weight.dtype)

    def check_extra_files(self) -> None:
        """Warn of files that an adapter does not need and that might do harm."""
        for file in sorted(self.path.iterdir()):
            if file.name in file_names.FILES or (file.is_dir() and not file.is_symlink()):
                continue
            if location_problems(self.path, [file.name]) or not file.is_file():
                problem = f"{file.name} is a link that leads elsewhere, or no regular file"
            else:
                problem = _file_danger(file)
            if problem is not None:
                self.log.add("warning", "files", problem)

    def check_numbers(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that every value is finite, and warn of unusual dtypes."""
        self.log.add_problems(
            "numbers",
            number_checks.number_problems(tensors, "get another copy"),
            "every number is finite",
        )
        dtype_names = sorted(
            {
                str(tensor.dtype).removeprefix("torch.")
                for tensor in tensors.values()
                if tensor.dtype in number_checks.FLOAT_DTYPES
            }
        )
        if len(dtype_names) > 1:
            self.log.add("warning", "numbers", f"stored in several types: {', '.join(dtype_names)}")
        elif dtype_names == ["float64"]:
            self.log.add(
                "warning",
                "numbers",
                "stored as float64, of which nothing that loads it keeps more than float32",
            )

    def check_norms(
        self,
        adapter_files: AdapterFiles,
        products: Mapping[str, LowRank],
        norms: Mapping[str, float],
    ) -> None:
        """Warn of changes that are zero, and of changes whose norm is an outlier among the changes
        of the same shape. ``norms``: ‖ΔW‖ of each of ``products``, by path."""
        plain_paths = {
            layer.target_path for layer in adapter_files.low.values() if not layer.extras
        }
        zero_paths = [path for path, norm in norms.items() if norm == 0 and path in plain_paths]
        if zero_paths and len(zero_paths) == len(norms) and not adapter_files.full:
            self.log.add(
                "warning",
                "norms",
                "every change is zero: this adapter changes nothing (was it ever trained?)",
            )
        elif zero_paths:
            self.log.add(
                "warning",
                "norms",
                f"changes of zero, as before training, at {listing(zero_paths)}",
            )
        outliers = list(_outliers(products, norms))
        for path, norm, median in outliers:
            self.log.add(
                "warning",
                "norms",
                f"‖ΔW‖ is {norm:.3g} at {path!r}, and {median:.3g} in the middle of the layers of"
                " its shape",
            )
        if not zero_paths and not outliers:
            self.log.add(
                "ok",
                "norms",
                "no change stands out among those of its shape"
                f" (‖ΔW‖ up to {max(norms.values(), default=0.0):.3g})",
            )


def _file_danger(file: Path) -> str | None:
    """The reason why a file beside an adapter might do harm; None if there is no reason."""
    with file.open("rb") as stream:
        first_bytes = stream.read(16)
    file_type = describe_format(first_bytes)
    is_program = file.suffix.lower() in _CODE_SUFFIXES or first_bytes.startswith(
        (b"#!", b"\x7fELF", b"MZ")
    )
    if file_type and "pickle" in file_type:
        return f"{file.name} is {file_type}; Veneer does not open it"
    if classes := _auto_map_classes(file):
        return (
            f"{file.name} names code that is to run when it is loaded ({listing(classes, 3)}); an"
            " adapter needs none, and Veneer runs none"
        )
    if is_program or os.access(file, os.X_OK):
        return f"{file.name} is a program; an adapter needs none, and Veneer runs none"
    return None


def _auto_map_classes(file: Path) -> list[str]:
    """The Python classes in the field ``auto_map`` of a config of transformers, which would load
    their code from files beside the model; ["auto_map"] if the field cannot be parsed. Empty for
    any other file."""
    if not file.name.endswith("config.json"):
        return []
    with file.open("rb") as stream:
        raw_bytes = stream.read(MAX_JSON_BYTES)
    if b'"auto_map"' not in raw_bytes:
        return []
    try:  # not ``read_json``: the model_max_length of a tokenizer may have 31 digits
        classes = json.loads(raw_bytes)["auto_map"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ["auto_map"]
    names = classes.values() if isinstance(classes, dict) else [classes]
    flat_names = (
        name for entry in names for name in (entry if isinstance(entry, list) else [entry])
    )
    return sorted({str(name)[:100] for name in flat_names if name is not None})


def _outliers(
    products: Mapping[str, LowRank], norms: Mapping[str, float]
) -> Iterator[tuple[str, float, float]]:
    """(path, ‖ΔW‖, median ‖ΔW‖ of the changes of its shape) of each outlier, as defined in the
    docstring of this module. ``norms``: ‖ΔW‖ of each of ``products``, by path."""
    log_norms: dict[tuple[int, ...], dict[str, float]] = {}
    for path, product in products.items():
        if norms[path] > 0:
            log_norms.setdefault(change_dims(product), {})[path] = math.log(norms[path])
    for shape_norms in log_norms.values():
        if len(shape_norms) < MIN_SAME_SHAPE:
            continue
        median_log_norm = statistics.median(shape_norms.values())
        median_deviation = statistics.median(
            abs(log_norm - median_log_norm) for log_norm in shape_norms.values()
        )
        for path, log_norm in shape_norms.items():
            if abs(log_norm - median_log_norm) > max(
                MAX_RELATIVE_DEVIATION * median_deviation, math.log(MIN_NORM_RATIO)
            ):
                yield path, norms[path], math.exp(median_log_norm)
