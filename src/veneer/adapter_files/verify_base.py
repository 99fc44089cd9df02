"""The checks of ``verify`` that need the base: does each tensor of the base have the fingerprint
in the adapter's record, and do the changes fit the shapes of the base's weights?

The weights of the base are read one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.findings import FindingLog, Level
from veneer.adapter_files.folder import AdapterFiles
from veneer.attach import HOW_TO_UNTIE
from veneer.errors import listing, sentence
from veneer.fileio.hashing import fingerprint, fingerprint_without_rows
from veneer.formats import peft_paths
from veneer.lowrank import LowRank
from veneer.models.base_weights import BaseWeights
from veneer.precision import equal_values
from veneer.variants import VARIANTS


def check_against_base(
    log: FindingLog,
    adapter_files: AdapterFiles,
    products: Mapping[str, LowRank],
    norms: Mapping[str, float],
    base_weights: BaseWeights,
) -> None:
    """Compare the base's files with all weights that the adapter changes and all tensors that its
    record lists. Every result is added to ``log``.

    Args:
        products: the low-rank change of each module or parameter, by path.
        norms: ‖ΔW‖ of each product, by the same path.
        base_weights: the weights of the base, which are read from its files.
    """
    base_record = adapter_files.metadata.get("base", {})
    base_name = base_record.get("name") or adapter_files.peft_config.get("base_model_name_or_path")
    advice = "take the base that it was trained on" + (f", {base_name}" if base_name else "")
    if VARIANTS[adapter_files.config.variant].makes_up_for_quantization:
        message = "trained on the quantised base, whose numbers these files lack: not compared"
        log.add("warning", "base", message)
        return
    unproven_count, large_changes = _check_changed_weights(
        log, adapter_files, products, norms, base_weights, advice
    )
    recorded_weights = base_record.get("weights", {})
    if recorded_weights:
        _check_unchanged_tensors(
            log, base_record, base_weights, len(recorded_weights) - unproven_count, advice
        )
    if large_changes:
        log.add(
            "warning",
            "norms",
            f"changes larger than the weight itself, ‖ΔW‖ / ‖W‖: {listing(large_changes)}",
        )
    _check_full_parameters(log, adapter_files, base_weights)


def _check_changed_weights(
    log: FindingLog,
    adapter_files: AdapterFiles,
    products: Mapping[str, LowRank],
    norms: Mapping[str, float],
    base_weights: BaseWeights,
    advice: str,
) -> tuple[int, list[str]]:
    """Check each weight that the adapter changes at a low rank, and add the results to ``log``.

    Args:
        products: the low-rank change of each module or parameter, by path.
        norms: ‖ΔW‖ of each product, by the same path.
        advice: what to do, for the error texts.

    Returns:
        the number of weights that failed: they are missing, do not have the shape of the change, or
        do not have the recorded fingerprint; a text "path (‖ΔW‖ / ‖W‖)" for each change that is
        larger than its weight.
    """
    recorded_weights = adapter_files.metadata.get("base", {}).get("weights", {})
    # find the product of each recorded weight, by the path of the weight or of its module
    product_paths = {
        path: next((key for key in (path, path.rpartition(".")[0]) if key in products), None)
        for path in recorded_weights
    }
    product_paths = product_paths or {path: path for path in products}
    missing_paths, misshapen_paths, different_paths, large_changes = [], [], [], []
    for path, product_path in product_paths.items():
        weight = _read_weight(base_weights, path)
        if weight is None and not recorded_weights:
            weight = _read_weight(base_weights, f"{path}.weight")
        if weight is None:
            missing_paths.append(path)
        elif product_path is not None and not _fits_shape(
            products[product_path], _grown_shape(adapter_files, path, weight.shape)
        ):
            product = products[product_path]
            misshapen_paths.append(
                f"{path} is {tuple(weight.shape)}, and B A there {product.B.shape[-2]} ×"
                f" {product.A.shape[-1]}"
            )
        elif (
            recorded_weights
            and fingerprint_without_rows(
                weight, adapter_files.token_ids(path), recorded_weights[path]
            )
            != recorded_weights[path]
        ):
            different_paths.append(path)
        elif product_path is not None:
            ratio = norms[product_path] / max(weight.float().norm().item(), 1e-30)
            large_changes += [f"{path} ({ratio:.3g})"] if ratio > 1 else []
    problems = (
        (missing_paths, "weights that the base lacks", "those that the adapter changes"),
        (misshapen_paths, "other shapes", "those that the adapter fits"),
        (
            different_paths,
            f"other numbers in {len(different_paths)} of {len(product_paths)} weights",
            "its own base",
        ),
    )
    sentences = [
        sentence(f"{problem} ({listing(paths, 4)})", expected, advice)
        for paths, problem, expected in problems
        if paths
    ]
    proof = "have the fingerprints of the record" if recorded_weights else "by name and shape alone"
    log.add_problems("base", sentences, f"{len(product_paths)} weights {proof}")
    unproven_count = len(missing_paths) + len(misshapen_paths) + len(different_paths)
    return unproven_count, large_changes


def _check_unchanged_tensors(
    log: FindingLog,
    base_record: Mapping[str, Any],
    base_weights: BaseWeights,
    proven_count: int,
    advice: str,
) -> None:
    """Check the tensors that the record lists and that the adapter does not change. Add the results
    to ``log``, with the number of all tensors that have their recorded fingerprint.

    Args:
        base_record: the entry "base" of the record.
        proven_count: how many of the changed weights have their recorded fingerprint.
        advice: what to do, for the error texts.
    """
    expected_fingerprints, changed_count = base_record.get("rest"), len(base_record["weights"])
    if expected_fingerprints is None:
        proof_text = (
            f"adapted layers only: {proven_count} of {changed_count} tensors proven, and none of"
            " the others, of which the Veneer that saved it recorded nothing"
        )
        log.add("ok", "proof", proof_text)
        return
    fingerprints = {
        name: base_weights.fingerprint(name, expected_fingerprints[name])
        for name in expected_fingerprints
    }
    missing_names = [name for name, digest in fingerprints.items() if digest is None]
    different_names = [
        name
        for name, digest in fingerprints.items()
        if digest is not None and digest != expected_fingerprints[name]
    ]
    if different_names:
        problem = (
            f"other numbers in {len(different_names)} of {len(expected_fingerprints)} tensors that"
            f" it computes with and does not change ({listing(different_names, 4)})"
        )
        log.add("error", "base", sentence(problem, "its own base", advice))
    if missing_names:
        log.add(
            "warning",
            "base",
            f"{len(missing_names)} tensors that it computes with are not in this base:"
            f" {listing(missing_names, 4)}",
        )
    proven_count += len(expected_fingerprints) - len(missing_names) - len(different_names)
    log.add(
        "ok",
        "proof",
        f"{proven_count} of {len(expected_fingerprints) + changed_count} tensors proven",
    )


def _check_full_parameters(
    log: FindingLog, adapter_files: AdapterFiles, base_weights: BaseWeights
) -> None:
    """Check that the tensors that are trained in full have the shapes of the base's tensors of the
    same names, and that frozen weights among them are those of the base. Tensors that the base
    lacks are a warning, as they may be a new head."""
    full_tensors = {
        f"{peft_paths.strip_wrappers(path)[0]}.{name}".lstrip("."): tensor
        for path, tensors in adapter_files.full.items()
        for name, tensor in tensors.items()
    }
    new_paths, misshapen_paths, different_paths = [], [], []
    for weight_path, tensor in full_tensors.items():
        module_path, _, parameter_name = weight_path.rpartition(".")
        weight = _read_weight(base_weights, weight_path)
        if weight is None:
            new_paths.append(weight_path)
        elif tuple(tensor.shape) not in (
            tuple(weight.shape),
            # the bias of a head grows with its weight if tokens were added
            _grown_shape(adapter_files, f"{module_path}.weight", weight.shape),
        ):
            misshapen_paths.append(
                f"{weight_path} {tuple(tensor.shape)}, in the base {tuple(weight.shape)}"
            )
        elif (
            module_path in adapter_files.products
            and parameter_name == "weight"
            and fingerprint(weight) != fingerprint(tensor)
        ):
            # PEFT saves the frozen weight of an adapted embedding beside the embedding's change; if
            # it is not that of this base, the adapter belongs to another base
            different_paths.append(weight_path)
    advice = "take the base that it was trained on"
    findings: tuple[tuple[Level, list[str], str], ...] = (
        (
            "error",
            misshapen_paths,
            sentence(
                f"trained in full with another shape: {listing(misshapen_paths, 4)}",
                "the base's",
                advice,
            ),
        ),
        (
            "error",
            different_paths,
            sentence(
                f"another weight of {listing(different_paths)} than the file holds of the base",
                "its own base",
                advice,
            ),
        ),
        (
            "warning",
            new_paths,
            f"trained in full, and not in the base: {listing(new_paths)} (a new head?)",
        ),
    )
    for level, paths, message in findings:
        if paths:
            log.add(level, "base", message)
    _check_tied_values(log, full_tensors, base_weights)


def _check_tied_values(
    log: FindingLog, full_tensors: Mapping[str, Tensor], base_weights: BaseWeights
) -> None:
    """Warn if the adapter has different values for the names of one tied weight of the base, or
    values for some of the names only. ``full_tensors``: the adapter's tensors that are trained in
    full, by path."""
    for tied_names in dict.fromkeys(tuple(base_weights.aliases(path)) for path in full_tensors):
        values = {name: full_tensors[name] for name in tied_names if name in full_tensors}
        first_value, *further_values = values.values()
        if len(tied_names) < 2 or any(value.shape != first_value.shape for value in further_values):
            continue
        if len(values) < len(tied_names) or not all(
            equal_values(value, first_value) for value in further_values
        ):
            log.add(
                "warning",
                "base",
                f"values of their own for {listing(values)} of {listing(tied_names)}, one weight of"
                " the base: they load as PEFT computes them, each place with its own. Before a"
                f" merge, {HOW_TO_UNTIE}",
            )


def change_dims(product: LowRank) -> tuple[int, int, int]:
    """(groups, out, in) of the change that ``product`` makes."""
    return product.B.shape[0], product.B.shape[1], product.A.shape[2]


def _grown_shape(adapter_files: AdapterFiles, path: str, shape: torch.Size) -> tuple[int, ...]:
    """The shape that the weight at ``path`` had in training. It is ``shape``, that of the base's
    weight, but if the adapter trains tokens of the weight, the number of rows is the recorded one:
    the base may lack the rows of added tokens."""
    change = adapter_files.metadata.get("changes", {}).get(path, {})
    return (change["of"], *shape[1:]) if "tokens" in change else tuple(shape)


def _fits_shape(product: LowRank, shape: tuple[int, ...]) -> bool:
    """Whether a product fits a weight of this shape, or its transpose. A shape that does not have
    two axes fits if it has as many values as the product."""
    groups, out, in_ = change_dims(product)
    return groups * out * in_ == prod(shape) and (
        len(shape) != 2 or sorted((groups * out, in_)) == sorted(shape)
    )


def _read_weight(base_weights: BaseWeights, path: str) -> Tensor | None:
    """The values of the base's weight at a path, read from the file; None if the base has no such
    weight."""
    weight = base_weights.get(path)
    return None if weight is None else weight.read()
