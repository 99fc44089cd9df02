"""The checks of ``verify`` that need the base: does each tensor of the base have the fingerprint
that the adapter's record holds, and do the changes fit the shapes of the base's weights?

The weights of the base are read one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.findings import FindingLog
from veneer.adapter_files.folder import AdapterFiles
from veneer.attach import UNTIE
from veneer.errors import listing, sentence
from veneer.fileio.hashing import fingerprint, fingerprint_without_rows
from veneer.formats import peft_paths
from veneer.lowrank import LowRank
from veneer.models.base_weights import BaseWeights
from veneer.precision import equal_values


def check_against_base(
    log: FindingLog,
    saved: AdapterFiles,
    products: Mapping[str, LowRank],
    norms: Mapping[str, float],
    weights: BaseWeights,
) -> None:
    """Compare everything that the adapter changes, and the rest of the base, with the base's files.

    Args:
        products: the low-rank change of each module or parameter, by path.
        norms: ‖ΔW‖ of each product, by the same path.
    """
    base_record = saved.metadata.get("base", {})
    base_name = base_record.get("name") or saved.peft_config.get("base_model_name_or_path")
    do = "take the base that it was trained on" + (f", {base_name}" if base_name else "")
    mismatches, large = _check_changed_weights(log, saved, products, norms, weights, do)
    recorded = base_record.get("weights", {})
    if recorded:
        _check_unchanged_tensors(log, base_record, weights, len(recorded) - mismatches, do)
    if large:
        problem = f"changes larger than the weight itself, ‖ΔW‖ / ‖W‖: {listing(large)}"
        log.add("warning", "norms", problem)
    _check_full_parameters(log, saved, weights)


def _check_changed_weights(
    log: FindingLog,
    saved: AdapterFiles,
    products: Mapping[str, LowRank],
    norms: Mapping[str, float],
    weights: BaseWeights,
    do: str,
) -> tuple[int, list[str]]:
    """Check each weight that the adapter changes at a low rank. Returns the number of weights that
    are missing or have another fingerprint, and the changes that are larger than their weight."""
    recorded = saved.metadata.get("base", {}).get("weights", {})
    # a product is filed under the path of its parameter or of its module
    product_paths = {
        path: next((key for key in (path, path.rpartition(".")[0]) if key in products), None)
        for path in recorded
    }
    product_paths = product_paths or {path: path for path in products}
    missing, misshapen, different, large = [], [], [], []
    for path, product_path in product_paths.items():
        weight = _read_weight(weights, path)
        if weight is None and not recorded:
            weight = _read_weight(weights, f"{path}.weight")
        if weight is None:
            missing.append(path)
        elif product_path is not None and not _fits(products[product_path], weight.shape):
            low = products[product_path]
            misshapen.append(
                f"{path} is {tuple(weight.shape)}, and B A there {low.B.shape[-2]} ×"
                f" {low.A.shape[-1]}"
            )
        elif (
            recorded
            and fingerprint_without_rows(weight, saved.token_ids(path), recorded[path])
            != recorded[path]
        ):
            different.append(path)
        elif product_path is not None:
            ratio = norms[product_path] / max(weight.float().norm().item(), 1e-30)
            large += [f"{path} ({ratio:.3g})"] if ratio > 1 else []
    problems = (
        (missing, "weights that the base lacks", "those that the adapter changes"),
        (misshapen, "other shapes", "those that the adapter fits"),
        (
            different,
            f"other numbers in {len(different)} of {len(product_paths)} weights",
            "its own base",
        ),
    )
    sentences = [
        sentence(f"{problem} ({listing(paths, 4)})", expected, do)
        for paths, problem, expected in problems
        if paths
    ]
    proof = "have the fingerprints of the record" if recorded else "by name and shape alone"
    log.add_problems("base", sentences, f"{len(product_paths)} weights {proof}")
    return len(missing) + len(different), large


def _check_unchanged_tensors(
    log: FindingLog, base_record: Mapping[str, Any], weights: BaseWeights, proven: int, do: str
) -> None:
    """Check the tensors that the model computes with and the adapter does not change.

    Args:
        proven: how many of the changed weights have the recorded fingerprint.
    """
    rest, changed = base_record.get("rest"), len(base_record["weights"])
    if rest is None:
        proof = (
            f"adapted layers only: {proven} of {changed} tensors proven, and none of the others, of"
            " which the Veneer that saved it recorded nothing"
        )
        log.add("ok", "proof", proof)
        return
    fingerprints = {name: weights.fingerprint(name, rest[name]) for name in rest}
    missing = [name for name, value in fingerprints.items() if value is None]
    different = [name for name, value in fingerprints.items() if value not in (None, rest[name])]
    if different:
        problem = (
            f"other numbers in {len(different)} of {len(rest)} tensors "
            "that it computes with and does not change"
        )
        text = sentence(f"{problem} ({listing(different, 4)})", "its own base", do)
        log.add("error", "base", text)
    if missing:
        problem = (
            f"{len(missing)} tensors that it computes with are not in this base:"
            f" {listing(missing, 4)}"
        )
        log.add("warning", "base", problem)
    proven += len(rest) - len(missing) - len(different)
    log.add("ok", "proof", f"{proven} of {len(rest) + changed} tensors proven")


def _check_full_parameters(log: FindingLog, saved: AdapterFiles, weights: BaseWeights) -> None:
    """Compare the parameters that are trained in full with the base's parameters of these names."""
    full = {
        f"{peft_paths.strip_wrappers(path)[0]}.{name}".lstrip("."): tensor
        for path, tensors in saved.full.items()
        for name, tensor in tensors.items()
    }
    new, misshapen, different = [], [], []
    for weight_path, tensor in full.items():
        module_path, _, name = weight_path.rpartition(".")
        weight = _read_weight(weights, weight_path)
        if weight is None:
            new.append(weight_path)
        elif weight.shape != tensor.shape:
            misshapen.append(
                f"{weight_path} {tuple(tensor.shape)}, in the base {tuple(weight.shape)}"
            )
        elif (
            module_path in saved.products
            and name == "weight"
            and fingerprint(weight) != fingerprint(tensor)
        ):
            # PEFT saves the frozen weight of an adapted embedding beside its change
            different.append(weight_path)
    do = "take the base that it was trained on"
    if misshapen:
        problem = f"trained in full with another shape: {listing(misshapen, 4)}"
        log.add("error", "base", sentence(problem, "the base's", do))
    if different:
        problem = f"another weight of {listing(different)} than the file holds of the base"
        log.add("error", "base", sentence(problem, "its own base", do))
    if new:
        problem = f"trained in full, and not in the base: {listing(new)} (a new head?)"
        log.add("warning", "base", problem)
    _check_tied_values(log, full, weights)


def _check_tied_values(log: FindingLog, full: Mapping[str, Tensor], weights: BaseWeights) -> None:
    """Warn if the names of one tied weight of the base have different values in the adapter."""
    for names in dict.fromkeys(tuple(weights.aliases(path)) for path in full):
        values = {name: full[name] for name in names if name in full}
        first, *further = values.values()
        if len(names) < 2 or any(value.shape != first.shape for value in further):
            continue
        if len(values) < len(names) or not all(equal_values(value, first) for value in further):
            problem = (
                f"values of their own for {listing(values)} of {listing(names)}, one weight of the"
                " base"
            )
            text = "they load as PEFT computes them, each place with its own. Before a merge,"
            log.add("warning", "base", f"{problem}: {text} {UNTIE}")


def change_dims(low: LowRank) -> tuple[int, int, int]:
    """(groups, out, in) of the change that a product makes."""
    return low.B.shape[0], low.B.shape[1], low.A.shape[2]


def _fits(low: LowRank, shape: torch.Size) -> bool:
    """Whether a product has the shape of a weight, or of its transpose."""
    groups, out, in_ = change_dims(low)
    return groups * out * in_ == shape.numel() and (
        len(shape) != 2 or sorted((groups * out, in_)) == sorted(shape)
    )


def _read_weight(weights: BaseWeights, path: str) -> Tensor | None:
    weight = weights.get(path)
    return None if weight is None else weight.read()
