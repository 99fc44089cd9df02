"""From a full fine-tune to an adapter: of every changed weight the product of thin matrices that is
nearest to its change.

    ΔW = W_tuned − W_base ≈ B A        per weight, [g, out, in], truncated at a rank or at a share of ‖ΔW‖²

    open both models → pair their weights → which changed → low rank, whole or lost → factor → save

Models in folders are gone through weight by weight (stacks of experts matrix by matrix): memory is
a few times the largest tensor, and what is written.

``B = U √S, A = √S Vᵀ`` and alpha = rank: the scale is 1 everywhere, also for a reader that knows no
patterns.

A tuned model of coarser dtype is compared with the base rounded to that dtype: what rounding alone
did is no change. Where the tuned dtype is the finer one the difference is taken as it is. What
changed is written, or named in a report. Rejected: to write low rank and nothing else. A full
fine-tune moves norms and biases too, and some of its changes have no low rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapter_files.peft_mapping import kind_for
from veneer.adapter_files.save_load import save
from veneer.attach.adapted_module import base_class
from veneer.attach.install import detach, install
from veneer.attach.lookup import adapters, adapters_of, parameter_path
from veneer.attach.targets import Names, ParamRef
from veneer.config import LoraConfig, Targets
from veneer.errors import ConfigError, ExtractError, TargetError, listing, raise_all, sentence
from veneer.fileio.atomic import must_not_exist
from veneer.fileio.hashing import fingerprint_of
from veneer.kernels import svd
from veneer.layers._base import GENERAL
from veneer.models.base_weights import list_weights
from veneer.tools.extract.report import Extracted, ExtractReport, Kept, Lost
from veneer.tools.extract.selection import LITTLE, LOSSY, keep_options, plan, select_weights
from veneer.tools.extract.weight_pairs import Both, Source, WeightPair, open_both, pair_weights

__all__ = ["ExtractReport", "Extracted", "Kept", "Lost", "extract"]

#: what is written whole, with the reason
Whole = Sequence[tuple[WeightPair, str]]
#: (the layer that was factored last, how many are, how many there are)
Progress = Callable[[Extracted, int, int], None]


class _Product(NamedTuple):
    """The factors of one weight as they will be written: A [g, r, in], B [g, out, r]."""

    pair: WeightPair
    A: Tensor
    B: Tensor
    fingerprint: str
    facts: Extracted


@torch.no_grad()
def extract(
    base: Source,
    tuned: Source,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Targets = "all",
    exclude: str | Sequence[str] = (),
    keep: str | Sequence[str] = "auto",
    least: float = 0.5,
    model: nn.Module | None = None,
    base_name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the adapter that turns ``base`` into ``tuned``, as nearly as its rank allows, as the
    folder ``out``.

    Args:
        base, tuned: each a folder of safetensors (or what ``veneer.models.load_base`` takes), a
            live model, or a state dict (of the base only with ``model``). Neither is changed; no
            call of a live base may run meanwhile.
        rank: of every product, lowered where a weight allows less. Either this or ``energy``.
        energy: the share of ‖ΔW‖² in (0, 1) to keep; each weight gets the smallest rank that does.
        targets, exclude: which weights get a product, as in ``LoraConfig``. What ``exclude`` means
            is not written.
        keep: what is written whole. "auto": changed vectors (norms, biases) and lasting buffers,
            which have no low-rank change. Patterns and "lossy" (weights that keep less than
            ``least`` of their change, or whose product has as many numbers as they) add to that;
            "none" takes the vectors out.
        least: the share of ‖ΔW‖² below which a weight counts as lossy.
        model: the structure of a base that transformers cannot build; its values are not looked at.
        base_name: what to call the base; None takes the folder, or the name that transformers
            loaded it by.
        provenance: anything worth knowing, as JSON values.
        progress: called after each weight.

    Raises:
        ConfigError, CheckpointError: an option, or a folder that is no model.
        ExtractError: the models have other names or shapes, nothing changed, or values are not
            finite.
        TargetError: a pattern that matches nothing, or a changed weight that cannot carry an
            adapter.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    started, out = time.perf_counter(), Path(out)
    raise_all(ConfigError, "Nothing was extracted", _odd_options(rank, energy, least))
    keep_patterns = keep_options(keep)
    must_not_exist(out, overwrite)
    both = open_both(base, tuned, model)
    weight_pairs, names = pair_weights(both), Names(both.model)
    changed, attached = _changed(weight_pairs, both), adapters_of(both.model)
    taken = () if attached is None else attached.configs
    name = next(name for number in count() if (name := f"extracted{number}") not in taken)
    excluded = (exclude,) if isinstance(exclude, str) else exclude
    selection = select_weights(names, changed, targets, excluded, keep_patterns, name)
    dtype = (
        torch.float64 if any(p.old.dtype == torch.float64 for p in selection.low) else torch.float32
    )
    products, whole = [], list(selection.whole)
    for number, pair in enumerate(selection.low, 1):
        product = _factored(pair, rank, energy, dtype)
        if progress is not None:
            progress(product.facts, number, len(selection.low))
        if LOSSY in keep_patterns and (product.facts.large or product.facts.kept < least):
            whole.append((pair, LITTLE))
        else:
            products.append(product)
    if not products and not whole:
        problem = (
            f"changes of {listing((one.path for one, _ in selection.lost), 3)} alone, which nothing"
            " asks for"
        )
        raise ExtractError(problem, "something to write", "widen targets or keep")
    report = ExtractReport(
        out,
        tuple(product.facts for product in products),
        tuple(Kept(one.path, torch.Size(one.old.shape).numel(), one.change(), why) for one, why in whole),
        tuple(Lost(one.path, one.change(), why) for one, why in selection.lost),
        len(weight_pairs) - len(changed), both.new.unread, least, 0.0,
    )  # fmt: skip
    said = {
        "rank": rank,
        "energy": energy,
        "kept": report.kept,
        "lost": [entry.path for entry in report.lost],
    }
    _write(
        both, name, products, whole, dtype, out, base_name=base_name or both.name,
        provenance={"extracted": {"from": both.new.label, **said}, **(provenance or {})}, overwrite=overwrite,
    )  # fmt: skip
    return replace(report, seconds=time.perf_counter() - started)


def _odd_options(rank: Any, energy: Any, least: Any) -> list[str]:
    bad_rank = rank is not None and (type(rank) is not int or rank < 1)
    bad_energy = energy is not None and not (isinstance(energy, int | float) and 0 < energy < 1)
    bad_least, share = (
        not (isinstance(least, int | float) and 0 <= least <= 1),
        "a share between 0 and 1",
    )
    both, one = f"rank={rank!r} and energy={energy!r}", "give rank=16, or energy=0.95"
    checks = [
        ((rank is None) == (energy is None), both, "one of them", one),
        (bad_rank, f"rank={rank!r}", "a whole number of at least 1", "use 16, or energy=0.95"),
        (bad_energy, f"energy={energy!r}", share, "use 0.95, or 0.999 to lose next to nothing"),
        (bad_least, f"least={least!r}", "a share from 0 to 1", "use 0.5"),
    ]
    return [sentence(*said) for wrong, *said in checks if wrong]


def _changed(weight_pairs: Sequence[WeightPair], both: Both) -> list[WeightPair]:
    changed, broken = [], []
    for one in weight_pairs:
        differs, finite = one.compare()
        changed += [one] if differs else []
        broken += [] if finite or (one.entry.is_buffer and not differs) else [one.path]
    if broken:
        problem = f"NaN or infinity in {listing(broken, 40)}"
        raise ExtractError(
            problem, "finite numbers in base and tuned model", "get the models again"
        )
    if not changed:
        problem = f"no difference between {both.old.label} and {both.new.label}"
        raise ExtractError(
            problem, "a fine-tuned model and its base", "check which models these are"
        )
    return changed


def _factored(
    one: WeightPair, rank: int | None, energy: float | None, dtype: torch.dtype
) -> _Product:
    """The nearest product of one weight, in ``dtype``."""
    started = time.perf_counter()
    fingerprint = fingerprint_of(one.old.shape, (one.old.read(rows) for rows in one.rows))
    dense, frozen_input = (
        None if one.stacked else list(one.matrices()),
        one.kind.frozen_input(one.module),
    )
    unseen = 0.0
    for matrix in dense or () if frozen_input is not None else ():  # an input that never changes
        unseen += matrix[:, frozen_input].double().square().sum().item()
        matrix[:, frozen_input] = 0

    def matrices() -> Iterator[Tensor]:
        return iter(dense) if dense is not None else one.matrices()

    known = None
    if energy is not None:
        spectra = []
        for matrix in matrices():
            values, known = svd.spectrum(matrix)
            spectra.append(values)
        rank = svd.smallest_rank(spectra, energy)
    assert rank is not None  # one of the two is given
    rank, change, error, methods, factors = min(rank, one.dims.max_rank), unseen, unseen, set(), []
    for number, matrix in enumerate(matrices()):
        if known is not None and one.dims.groups == 1:
            vectors, method = known[:, :rank], "exact"
        else:
            vectors, method = svd.leading(matrix, rank, exact=energy is not None, seed=number)
        A, B = (factor.to(dtype) for factor in svd.split(matrix, vectors))
        change, error = change + svd.energy(matrix), error + svd.distance(matrix, A, B)
        factors.append((A.cpu(), B.cpu()))
        methods.add(method)
    base = sum(svd.energy(one.old.read(rows).reshape(1, -1)) for rows in one.rows)
    A, B = (torch.stack(side) for side in zip(*factors, strict=True))
    method = "exact" if methods == {"exact"} else "randomised"
    relative = (change / base) ** 0.5 if base else math.inf
    seconds = time.perf_counter() - started
    error = (error / change) ** 0.5
    facts = Extracted(
        one.path,
        (one.dims.groups, one.dims.out, one.dims.in_),
        rank,
        change**0.5,
        relative,
        error,
        method,
        seconds,
    )
    return _Product(one, A, B, fingerprint, facts)


def _write(
    both: Both,
    name: str,
    products: Sequence[_Product],
    whole: Whole,
    dtype: torch.dtype,
    out: Path,
    **options: Any,
) -> None:
    """Put the adapter onto the structure, save it, and take it off again."""
    names = Names(both.model)
    ranks = {product.pair.entry.ref: product.facts.rank for product in products}
    at = [one.pair.path for one in products] or [one.path for one, _ in whole]
    common = max(ranks.values(), default=1)
    config = LoraConfig(
        rank=common,
        alpha=float(common),
        targets=tuple(at),
        dtype="float64" if dtype == torch.float64 else None,
    )
    problems: list[str] = []
    plans = plan(names, config, ranks, [one for one, _ in whole], problems)
    raise_all(TargetError, "Nothing was written", problems)
    if both.meta_model:
        _show_forwards([(names.modules[path], weight) for path, weight in ranks])
    factors: dict[ParamRef, Mapping[str, Tensor]] = {
        product.pair.entry.ref: {"A": product.A, "B": product.B} for product in products
    }
    # what stands in the adapter in full are the tuned model's values, or the base's where only a
    # copy of the base is wanted, as for running statistics that did not change or that are left out
    tuned = {path for one, _ in whole for path in one.entry.names}
    done = {id(both.old.by_name.get(product.pair.path)) for product in products}
    fingerprints = {product.pair.path: product.fingerprint for product in products}
    try:
        install(both.model, name, plans, trainable=False, parameters=factors)
        for path, _, part in adapters(both.model, name):
            for key, value in (*part.full._parameters.items(), *part.full._buffers.items()):
                at = parameter_path(path, key)
                source = (both.new if at in tuned else both.old).by_name.get(at)
                if source is not None and value is not None:
                    value.copy_(source.read(None))
        for entry in list_weights(names):
            value = both.old.find(entry.names)
            if value is not None and id(value) not in done:
                fingerprints[entry.path] = value.fingerprint()
        save(both.model, out, name=name, fingerprints=fingerprints, **options)
    finally:
        attached = adapters_of(both.model)
        if attached is not None and name in attached.configs:
            detach(both.model, name)


def _show_forwards(targets: Sequence[tuple[nn.Module, str]]) -> None:
    """Some random rows in each weight of a meta model that a forward of its own reads: whether that
    computes what its kind does, which decides whether PEFT may have it, zeros do not tell."""
    generator = torch.Generator().manual_seed(0)
    for module, name in targets:
        kind, weight = kind_for(module, name), module._parameters.get(name)
        stock = kind.name == GENERAL or any(
            base_class(module).forward is known.forward for known in kind.types()
        )
        if weight is not None and not stock:
            weight.data[:8].normal_(generator=generator)
