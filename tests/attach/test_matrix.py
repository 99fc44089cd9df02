"""The matrix of docs/support.md proves what it says: break an operation, and its cells are no
longer exact."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from tests.support.broken import (
    first_row_decides,
    first_row_decides_for_a_bank,
    unmerge_loses_a_bit,
)

with warnings.catch_warnings():  # of the libraries that the matrix loads
    warnings.simplefilter("ignore")
    from scripts.matrix import operations, storages
    from scripts.matrix.cases import NOTE
    from scripts.matrix.page import Page

from veneer.adapter_files import match_parameters, save_load
from veneer.attach.layer.change import Change
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.merging import fold_weights, stored_weights
from veneer.attach.merging import merge as merging
from veneer.attach.rows import select_rows
from veneer.bases import BASES
from veneer.formats import peft
from veneer.kernels import fused
from veneer.kernels.rounding import Folded, Sums
from veneer.layers import LAYERS
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS

LAYER_NAMES, VARIANT_NAMES = ("linear", "embedding"), ("lora", "dora")
#: of which every cell is exact, where PEFT is asked
PEFT_LAYERS = ("linear", "conv1d_transformers")


@pytest.fixture(autouse=True)
def _alone():
    """The matrix sets what holds for a whole process; here it holds for one test."""
    threads, settings = torch.get_num_threads(), torch._dynamo.config
    limits = {
        name: getattr(settings, name) for name in ("recompile_limit", "accumulated_recompile_limit")
    }
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch._dynamo.config.patch(**limits):
        yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def layers_of(operation):
    return PEFT_LAYERS if operation == "PEFT round trip" else LAYER_NAMES


def cells(operation, layers, variants=VARIANT_NAMES):
    """{(layer, variant): what the page says of it}."""
    found = {}
    for layer in layers:
        results = operations.of_layer(layer, VARIANT_NAMES, [operation])
        for variant in variants:
            found[layer, variant] = Page().cell(
                results.verdicts[variant][operation], results.examples
            )[0]
    return found


def marks_of(operation):
    """A compiler takes seconds for each mutation, so the slow suite has them. `make check` compiles
    every cell of the matrix: what the quick suite leaves out is the proof that this would
    notice."""
    return [pytest.mark.slow] if operation == "compile" else []


@pytest.mark.parametrize(
    "operation", [pytest.param(name, marks=marks_of(name)) for name in operations.OPERATIONS]
)
def test_the_cells_that_are_broken_below_are_exact(operation):
    assert set(cells(operation, layers_of(operation)).values()) == {"exact"}


# The mutations: each takes pytest's monkeypatch and breaks Veneer in one place. "only" are the
# layers and variants that it breaks, if those are not all.


def scale_is_off(patch):
    """By one in a million, in every path alike."""
    original = Change.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.scale *= 1 + 1e-6

    patch.setattr(Change, "__init__", init)


def own_path_is_off(patch):
    """Only the path that a call takes when none is forced."""
    for name in ("linear", "linear_without_graph"):
        original = getattr(fused, name)
        patch.setattr(
            fused, name, lambda scale, *rest, original=original: original(scale * (1 + 1e-6), *rest)
        )


own_path_is_off.only = (["linear"], ["lora"])


def resolve_is_wrong(patch):
    """A variant that computes another change than its paper, and is consistent in it."""
    for name in VARIANT_NAMES:
        original = VARIANTS[name].resolve

        def resolve(parameters, scale, base, original=original):
            return original({**parameters, "B": parameters["B"].flip(2)}, scale, base)

        patch.setitem(vars(VARIANTS[name]), "resolve", resolve)


def nothing_changes(patch):
    def run(self, module, base, layer_state, args, kwargs, now, share=True):
        return base.forward(module, *args, **kwargs)

    patch.setattr(LayerAdapter, "run", run)


def _factors(patch, turned):
    """Every change, with its A as ``turned(A)``."""
    original = Change.resolve

    def resolve(self, weight, dtype=None):
        low, gain = original(self, weight, dtype)
        return LowRank(turned(low.A), low.B, low.scale), gain

    patch.setattr(Change, "resolve", resolve)


def gradient_of_A_is_dropped(patch):
    _factors(patch, lambda A: A.detach() + 0 * A)


def gradient_of_A_is_off(patch):
    _factors(patch, lambda A: A + 1e-6 * (A - A.detach()))


def _folds(patch, folded):
    """Every merged weight is ``folded(weight, ΔW in float64, gain [g, out, 1])``."""

    def fold(weight, low, gain, **options):
        spread = (
            torch.ones(1, dtype=torch.float64)
            if gain is None
            else gain.double().view(*weight.shape[:2], 1)
        )
        made = folded(weight, low.delta(torch.float64), spread)
        return Folded(made.to(weight.dtype), 1.0, 1.0, "nearest", True, Sums(0.0, 0.0, 0.0, 0.0))

    patch.setattr(fold_weights, "fold", fold)


def merge_rounds_twice(patch):
    """W + ΔW in the weight's own dtype, then the gain."""
    _folds(patch, lambda W, delta, gain: (W + delta.to(W.dtype)) * gain.to(W.dtype))


def merge_rounds_the_change(patch):
    """ΔW to the weight's own dtype, before it is added."""
    _folds(patch, lambda W, delta, gain: (W.double() + delta.to(W.dtype).double()) * gain)


def merge_is_off(patch):
    _folds(patch, lambda W, delta, gain: (W.double() + delta) * gain * (1 + 1e-6))


def merge_writes_nothing(patch):
    patch.setattr(stored_weights.StoredWeight, "write", lambda self, stored: None)


def unmerge_subtracts(patch):
    """W' − (W' − W), where it should put back W."""
    original = merging.back_up

    def keep(weight, stored, **options):
        original(weight, stored, **options)
        for key, old in weight.keeper.__dict__["backup"][weight.name].items():
            new = stored[key]
            old.copy_(new - (new - old))

    patch.setattr(merging, "back_up", keep)


def save_loses_alpha(patch):
    original = save_load._describe_change
    patch.setattr(save_load, "_describe_change", lambda change: {**original(change), "alpha": 32})


def load_loses_alpha(patch):
    original = save_load.install_adapter

    def install(*args, **kwargs):
        done = original(*args, **kwargs)
        for _, _, _, change in save_load.changes(args[0], args[1]):
            change.scale = change.variant.scale(32, change.rank)
        return done

    patch.setattr(save_load, "install_adapter", install)


def load_is_off_by_a_bit(patch):
    original = match_parameters.ParameterReader.read

    def numbers(*args):
        found = original(*args)
        return {**found, "A": torch.nextafter(found["A"], found["A"] + 1)}

    patch.setattr(match_parameters.ParameterReader, "read", numbers)


def rows_lose_their_order(patch):
    original = select_rows.RowAdapters.__init__

    def init(self, *args):
        original(self, *args)
        self.order = torch.arange(self.row_count)

    patch.setattr(select_rows.RowAdapters, "__init__", init)


def rows_cannot_be_taken(patch):
    def take(*_):
        raise LookupError

    for name in LAYER_NAMES:
        patch.setattr(type(LAYERS[name]), "take", take)


def _when_compiled(patch, run):
    original = LayerAdapter.run

    def either(self, module, base, layer_state, args, kwargs, now, share=True):
        if torch.compiler.is_compiling():
            return run(original, self, module, base, layer_state, args, kwargs, now)
        return original(self, module, base, layer_state, args, kwargs, now, share)

    patch.setattr(LayerAdapter, "run", either)


def compiler_sees_no_change(patch):
    _when_compiled(
        patch,
        lambda original, self, module, base, layer_state, args, kwargs, now: base.forward(
            module, *args
        ),
    )


def compiler_sees_one_adapter(patch):
    def run(original, self, module, base, layer_state, args, kwargs, now):
        return original(
            next(iter(layer_state.children())), module, base, layer_state, args, kwargs, now
        )

    _when_compiled(patch, run)


def compiler_breaks_the_graph(patch):
    def run(original, *args):
        torch._dynamo.graph_break()
        return original(*args)

    _when_compiled(patch, run)


compiler_breaks_the_graph.only = (["linear"], ["lora", "dora"])


def peft_key_is_wrong(patch):
    original = peft.tensor_key
    patch.setattr(
        peft, "tensor_key", lambda path, suffix: original(path, suffix.replace("lora_A", "lora_X"))
    )


def peft_config_has_another_alpha(patch):
    original = save_load.peft_config
    patch.setattr(save_load, "peft_config", lambda *args: {**original(*args), "lora_alpha": 32})


MUTATIONS = {
    "forward": [scale_is_off, own_path_is_off, resolve_is_wrong, nothing_changes],
    "gradient": [gradient_of_A_is_dropped, gradient_of_A_is_off, scale_is_off],
    "merge": [merge_rounds_twice, merge_rounds_the_change, merge_is_off, merge_writes_nothing],
    "unmerge": [unmerge_subtracts, unmerge_loses_a_bit, merge_writes_nothing],
    "save/load": [save_loses_alpha, load_loses_alpha, load_is_off_by_a_bit],
    "mixed batch": [first_row_decides, rows_lose_their_order, rows_cannot_be_taken],
    "bank": [first_row_decides_for_a_bank],
    "compile": [compiler_sees_no_change, compiler_sees_one_adapter, compiler_breaks_the_graph],
    "PEFT round trip": [peft_key_is_wrong, peft_config_has_another_alpha],
}


@pytest.mark.parametrize(
    ("operation", "mutation"),
    [
        pytest.param(operation, mutation, marks=marks_of(operation))
        for operation, all_ in MUTATIONS.items()
        for mutation in all_
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_operation_is_not_exact(operation, mutation, monkeypatch):
    layers, variants = getattr(mutation, "only", (layers_of(operation), VARIANT_NAMES))
    mutation(monkeypatch)
    found = cells(operation, layers, variants)
    assert "exact" not in found.values(), found


def test_every_operation_is_broken():
    assert MUTATIONS.keys() == operations.OPERATIONS.keys()
    assert STORED_MUTATIONS.keys() == storages.STORED.keys()


def test_what_fails_side_by_side_alone_is_not_exact():
    """A run that fails on all examples at once and succeeds on each by itself."""

    def operation(case):
        if len(case.inputs) > 1:
            raise RuntimeError("two of them")
        return dict.fromkeys(case.inputs, "")

    class Case:
        inputs = {"m0": (), "m1": ()}

        def solo(self, example):
            alone = Case()
            alone.inputs = {example: ()}
            return alone

    assert set(operations.run(operation, Case()).values()) == {"side by side: two of them"}


# The second table: two storages, of which one has a grid and a library that rounds.


def change_is_off(patch):
    original = Change.resolve

    def resolve(self, weight, dtype=None):
        low, gain = original(self, weight, dtype)
        return LowRank(low.A, low.B, low.scale * 1.5), gain

    patch.setattr(Change, "resolve", resolve)
    direct = fused.linear
    patch.setattr(fused, "linear", lambda scale, *rest: direct(scale * 1.5, *rest))


def weight_is_read_wrong(patch):
    """One that is consistent: all of Veneer reads the same wrong weight."""
    for name in STORED_NAMES:
        kind = type(BASES[name])
        original = kind.decode
        patch.setattr(
            kind, "decode", lambda self, *args, original=original: original(self, *args) * 1.1
        )


def weight_is_written_wrong(patch):
    for name in STORED_NAMES:
        kind = type(BASES[name])
        encode, write = kind.encode, kind.write
        if BASES[name].dense_name is None:
            patch.setattr(
                kind,
                "encode",
                lambda self, weight, values, encode=encode: encode(self, weight, values * 1.02),
            )
        else:  # what is stored as its numbers is not encoded
            off = {BASES[name].dense_name: 1.02}
            patch.setattr(
                kind, "write",
                lambda self, weight, stored, write=write, off=off: write(
                    self, weight, {key: value * off.get(key, 1) for key, value in stored.items()}
                ),
            )  # fmt: skip


def report_is_wrong(patch):
    original = fold_weights.measure_change

    def report(path, old, exact, rounded, rounding):
        return original(path, old, exact, exact, rounding)

    patch.setattr(fold_weights, "measure_change", report)


report_is_wrong.only = ["gguf"]

STORED_NAMES = ("plain", "gguf")
STORED_MUTATIONS = {
    "forward": [change_is_off, weight_is_read_wrong],
    "gradient": [gradient_of_A_is_dropped, change_is_off],
    "merge": [weight_is_written_wrong, change_is_off, report_is_wrong, merge_writes_nothing],
    "unmerge": [unmerge_loses_a_bit],
    "save/load": [load_loses_alpha, load_is_off_by_a_bit],
}


def stored_cells(operation, names=STORED_NAMES):
    """{(storage, example): whether it is exact, or rounded by the storage or its library alone}."""
    return {
        (name, example): not why or why.startswith((NOTE, storages.GRID))
        for name in names
        for example, why in storages.of_storage(name, [operation]).verdicts[name][operation].items()
    }


@pytest.mark.parametrize("operation", storages.STORED)
def test_the_stored_cells_that_are_broken_below_are_exact(operation):
    assert all(stored_cells(operation).values())


@pytest.mark.parametrize(
    ("operation", "mutation"),
    [(operation, mutation) for operation, all_ in STORED_MUTATIONS.items() for mutation in all_],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_operation_on_a_storage_is_not_exact(operation, mutation, monkeypatch):
    mutation(monkeypatch)
    found = stored_cells(operation, getattr(mutation, "only", STORED_NAMES))
    assert not any(found.values()), found
