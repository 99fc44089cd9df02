"""The columns of the matrix: what is asked of each variant on each example, and ``of_layer``, which
asks it."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from tests.support.toys import cast, definition, error, flat
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import veneer
from veneer import context
from veneer.layers import LAYERS
from veneer.variants import VARIANTS

from .cases import (
    ALPHA,
    EXACT,
    LEFT_OUT,
    NOTE,
    RANK,
    Case,
    Found,
    Inexact,
    Results,
    Side,
    attach,
    attach_where_possible,
    breaks_of,
    describe_example,
    flats,
    quiet,
    reason,
    rows_of,
)
from .definitions import meaning

#: the one that a call takes by itself, and both that it may be told to take
PATHS = (None, "factored", "materialised")
FORWARD, GRADIENT, PEFT = 1e-10, 1e-9, 1e-5
CYCLES = 10

#: what selects an adapter (None: none) for each row
Select = Callable[[Sequence[str | None]], AbstractContextManager[Any]]

# The definition: the module's own forward on gain ⊙ (W + ΔW), in float64.


def weights_of(base: Side, handle: veneer.Handle) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(every changed weight of ``base`` by path, the trained numbers as leaves by name), float64,
    with a graph from these to those."""
    leaves: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for path, change in handle.changes.items():
        parameters = {
            name: number.detach().double().requires_grad_()
            for name, number in change.named_parameters()
        }
        leaves |= {f"{path}.{name}": number for name, number in parameters.items()}
        numbers = {
            **{name: buffer.double() for name, buffer in change.named_buffers()},
            **parameters,
        }
        values[path] = meaning(
            change,
            ALPHA,
            min(RANK, change.dims.max_rank),
            numbers,
            base.get_parameter(path).detach().double(),
        )
    for path, layer_state in handle.layers.items():
        for name, parameter in layer_state.full.named_parameters():
            leaves[f"{path}.{name}"] = values[f"{path}.{name}"] = (
                parameter.detach().double().requires_grad_()
            )
    return values, leaves


def reference_outputs(
    case: Case, examples: Mapping[str, tuple]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(y by example, the trained numbers as leaves by name), with a graph from these to those."""
    handle = veneer.Handle(case.model, case.name)
    values, leaves = weights_of(case.base, handle)
    for path, layer_state in handle.layers.items():
        values |= {
            f"{path}.{name}": buffer.clone() for name, buffer in layer_state.full.named_buffers()
        }
    outputs = {}
    for example, args in examples.items():
        example_weights = {
            path.removeprefix(f"{example}."): v
            for path, v in values.items()
            if path.startswith(f"{example}.")
        }
        outputs[example] = flat(definition(getattr(case.base, example), example_weights, args))
    return outputs, leaves


def forward(case: Case) -> Found:
    with torch.no_grad():
        wanted, _ = reference_outputs(case, case.inputs)
        base = flats(case.base(case.inputs))
        verdicts: Found = {}
        for path in PATHS:
            with context.override(path=path):
                for example, y in case.outputs().items():
                    verdicts[example] = verdicts.get(example) or _within(
                        error(y, wanted[example]), FORWARD
                    )
    idle = {example for example, y in base.items() if error(y, wanted[example]) < 1e-3}
    return {
        example: "the adapter changes nothing" if example in idle else why
        for example, why in verdicts.items()
    }


def gradient(case: Case) -> Found:
    inputs = pytree.tree_map(
        lambda x: x.clone().requires_grad_() if _is_float(x) else x, dict(case.inputs)
    )
    wanted, leaves = reference_outputs(case, inputs)
    weights = {example: torch.randn_like(y) for example, y in wanted.items()}
    xs = [
        (example, x)
        for example, args in inputs.items()
        for x in pytree.tree_leaves(args)
        if _is_float(x)
    ]
    parameters = dict(veneer.Handle(case.model, case.name).named_parameters())
    if list(parameters) != list(leaves):
        raise Inexact(f"trains {list(parameters)}")
    names = [*(name.partition(".")[0] for name in parameters), *(example for example, _ in xs)]
    verdicts: Found = dict.fromkeys(case.inputs, EXACT)

    def gradients(
        outputs: Mapping[str, Tensor], numbers: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        loss = sum((weights[example] * y).sum() for example, y in outputs.items())
        return torch.autograd.grad(loss, [*numbers.values(), *(x for _, x in xs)])  # pyright: ignore

    truth = gradients(wanted, leaves)
    for path in PATHS:
        with context.override(path=path), veneer.use(case.model, case.name):
            actual = gradients(flats(case.model(inputs)), parameters)
        for example, mine, true in zip(names, actual, truth, strict=True):
            verdicts[example] = verdicts[example] or _within(error(mine, true), GRADIENT)
    return verdicts


def merge(case: Case) -> Found:
    """The outputs in float64, and in bfloat16 every merged weight: none of its neighbours is nearer
    to W + ΔW."""
    adapted = case.outputs()
    veneer.merge(case.model, case.name)
    verdicts: Found = {}
    for example, y in case.outputs().items():
        verdicts[example] = _within(error(y, adapted[example]), FORWARD, "other outputs")
    veneer.unmerge(case.model)
    model, handle = in_bfloat16(case)
    exact, _ = weights_of(model, handle)
    for path, change in handle.changes.items():
        above, _, _ = path.rpartition(".")
        exact[path] = change.layer.apply_forward_rewrite(
            model.get_submodule(above), exact[path].detach()
        )
    handle.merge(rounding="nearest")
    for path, values in exact.items():
        wrong = wrong_roundings(model.get_parameter(path).detach(), values.detach())
        example = path.partition(".")[0]
        verdicts[example] = verdicts[example] or (
            f"{wrong} weights are not rounded to the nearest" if wrong else EXACT
        )
    return verdicts


def unmerge(case: Case) -> Found:
    """The bits after every cycle: an error that undoes itself in the next one is an error too."""
    model, handle = in_bfloat16(case)
    before = bits(model)
    verdicts: Found = dict.fromkeys(case.inputs, EXACT)
    for _ in range(CYCLES):
        handle.merge()
        merged = bits(model)
        handle.unmerge()
        after = bits(model)
        for example in verdicts:
            keys = [key for key in before if key.startswith(f"{example}.")]
            if not any(not torch.equal(merged[key], before[key]) for key in keys):
                verdicts[example] = verdicts[example] or "the merge changed nothing"
            if not all(torch.equal(after[key], before[key]) for key in keys):
                verdicts[example] = verdicts[example] or "other bits"
    return verdicts


def in_bfloat16(case: Case) -> tuple[Side, veneer.Handle]:
    """The case's base in bfloat16 with the variant on the same examples."""
    model = copy.deepcopy(case.base).bfloat16()
    for example in set(model._modules) - set(case.inputs):
        del model._modules[example]
    return model, attach(model, case.variant, cast(dict(case.inputs), torch.bfloat16))


def save_load(case: Case) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        veneer.save(case.model, f"{folder}/adapter", name=case.name)
        fresh = copy.deepcopy(case.base)
        handle = veneer.load(fresh, f"{folder}/adapter", name=case.name)
    mine, theirs = numbers_of(veneer.Handle(case.model, case.name)), numbers_of(handle)
    if mine.keys() != theirs.keys():
        raise Inexact("other trained numbers")
    if handle.config != veneer.Handle(case.model, case.name).config:
        raise Inexact("another config")
    before = case.outputs()
    with torch.no_grad():
        after = flats(fresh(case.inputs))
    verdicts: Found = {}
    for example in case.inputs:
        names = [name for name in mine if name.startswith(f"{example}.")]
        same = all(torch.equal(mine[name], theirs[name]) for name in names)
        equal = torch.equal(before[example], after[example])
        verdicts[example] = (
            EXACT if same and equal else "other outputs" if same else "other trained numbers"
        )
    return verdicts


def mixed_batch(case: Case) -> Found:
    return _of_rows(case, lambda names: veneer.use(case.model, names), case.model)


def bank(case: Case) -> Found:
    """From the folders of both adapters, on a base of its own."""
    model = copy.deepcopy(case.base)
    with tempfile.TemporaryDirectory() as folder:
        adapter_bank = veneer.Bank(model)
        for name in (case.name, case.other):
            veneer.save(case.model, Path(folder) / name, name=name)
            adapter_bank.add(Path(folder) / name)
        return _of_rows(case, adapter_bank.rows, model)


def _of_rows(case: Case, select: Select, model: Side) -> Found:
    verdicts: Found = {}
    for example, args in case.inputs.items():
        count = case.rows[example]
        try:
            verdicts[example] = (
                LEFT_OUT
                if count is None
                else _check_mixed_rows(case, example, args, count, select, model)
            )
        except Exception as error:
            verdicts[example] = reason(error)
    return verdicts


def _check_mixed_rows(
    case: Case, example: str, args: tuple, count: int, select: Select, model: Side
) -> str:
    """Rows in such an order that they must be brought back into it, as those of one adapter run
    together. Fewer than four are repeated: two would have one order alone."""
    choices = (case.name, case.other, None)
    outputs_by_choice = []
    if 0 < count < 4:
        module, again = getattr(case.base, example), torch.arange(4) % count
        row_args, row_kwargs = case.kind.take(module, args, {}, again, count)
        args, count = inspect.signature(module.forward).bind(*row_args, **row_kwargs).args, 4
    count = abs(count)
    with torch.no_grad():
        for name in choices:
            with veneer.use(case.model, name):
                outputs_by_choice.append(case.model({example: args})[example])
        for pattern in (
            (case.name, case.other, case.name, None),
            (None, case.name, case.name, case.other),
        ):
            names = [pattern[row % 4] for row in range(count)]
            with select(names):
                mixed = model({example: args})[example]
            # row i of the outputs of the whole batch under its own adapter
            order = torch.tensor(
                [choices.index(name) * count + row for row, name in enumerate(names)]
            )
            expected = case.kind.put(getattr(case.model, example), outputs_by_choice, order)
            if why := _within(
                error(flat(mixed), flat(expected)), FORWARD, "differs from the rows alone"
            ):
                return why
    return EXACT


def compile_model(case: Case) -> Found:
    """Into one graph, but for what breaks without an adapter too; then with graph breaks."""
    broken = {example: args for example, args in case.inputs.items() if case.breaks[example]}
    rest = {example: args for example, args in case.inputs.items() if not case.breaks[example]}
    verdicts: Found = {}
    if broken:
        split = _check_compiled(case, broken, fullgraph=False)
        verdicts |= {
            e: why or f"{NOTE}a gap in the compiled graph, as without an adapter: {case.breaks[e]}"
            for e, why in split.items()
        }
    if rest:
        try:
            verdicts |= _check_compiled(case, rest, fullgraph=True)
        except Exception as error:
            if len(case.inputs) > 1:
                raise
            split = _check_compiled(case, rest, fullgraph=False)
            verdicts |= {
                e: why or f"{NOTE}a gap in the compiled graph: {reason(error)}"
                for e, why in split.items()
            }
    return verdicts


def _check_compiled(case: Case, inputs: Mapping[str, tuple], fullgraph: bool) -> Found:
    run = case.compiled.setdefault(
        fullgraph, torch.compile(case.model, backend="aot_eager", fullgraph=fullgraph)
    )
    verdicts: Found = dict.fromkeys(inputs, EXACT)
    for name in (case.name, case.other, case.name):
        with veneer.use(case.model, name), torch.no_grad():
            actual, wanted = flats(run(inputs)), flats(case.model(inputs))
        verdicts = {
            e: verdicts[e] or _within(error(actual[e], wanted[e]), FORWARD, "differs from eager")
            for e in inputs
        }
    return verdicts


WITHOUT = (
    "PEFT computes it exactly, but leaves numbers out of the folder that it writes: those of a"
    " vector that is trained in full, if its module has other parameters or running statistics"
)


def peft_round_trip(case: Case) -> Found:
    wanted = case.outputs()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        veneer.save(case.model, f"{folder}/ours", name=case.name)

        def theirs() -> Any:
            return peft.PeftModel.from_pretrained(copy.deepcopy(case.base), f"{folder}/ours").eval()

        try:
            peft_model = theirs()
            outputs = flats(peft_model(case.inputs))
            peft_model.save_pretrained(f"{folder}/theirs")
            same = {example: error(outputs[example], y) <= PEFT for example, y in wanted.items()}
            merged = (
                outputs if all(same.values()) else flats(theirs().merge_and_unload()(case.inputs))
            )
        except Exception as failed:
            raise Inexact(f"PEFT: {failed}") from failed
        back = copy.deepcopy(case.base)
        veneer.load(back, f"{folder}/theirs")
        again = flats(back(case.inputs))
        ours, rewritten = (
            {*load_file(f"{folder}/{whose}/adapter_model.safetensors")}
            for whose in ("ours", "theirs")
        )
    verdicts: Found = {}
    for example, y in wanted.items():
        if same[example]:
            lost = any(f".{example}." in key for key in ours - rewritten)
            why = WITHOUT if lost else "what PEFT then writes gives other outputs"
            verdicts[example] = _within(error(again[example], y), PEFT, why)
        elif error(merged[example], y) <= PEFT:
            verdicts[example] = "PEFT's forward differs from its own merge, which is ours"
        else:
            verdicts[example] = "PEFT computes something else from the same numbers"
    return verdicts


OPERATIONS: dict[str, Callable[[Case], Found]] = {
    "forward": forward,
    "gradient": gradient,
    "merge": merge,
    "unmerge": unmerge,
    "save/load": save_load,
    "mixed batch": mixed_batch,
    "bank": bank,
    "compile": compile_model,
    "PEFT round trip": peft_round_trip,
}


def _within(distance: float, bound: float, problem: str = "differs from the definition") -> str:
    return EXACT if distance <= bound else problem


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def numbers_of(handle: veneer.Handle) -> dict[str, Tensor]:
    """Every number of an adapter, frozen ones and running statistics too, but for those of an input
    that never changes: they have no effect, and stand as zeros in a file."""
    values: dict[str, Tensor] = {}
    for path, change in handle.changes.items():
        values |= {f"{path}.{name}": value for name, value in change.adapter_parameters.items()}
        if change.frozen_input is not None and "A" in change.adapter_parameters:
            values[f"{path}.A"] = change.adapter_parameters["A"].index_fill(
                2, torch.tensor([change.frozen_input]), 0
            )
    for path, layer_state in handle.layers.items():
        values |= {f"{path}.{name}": value for name, value in layer_state.full.state_dict().items()}
    return {name: value.detach() for name, value in values.items()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the base, as bytes."""
    state = {name: value for name, value in model.state_dict().items() if ".veneer." not in name}
    return {
        name: value.clone().contiguous().flatten().view(torch.uint8)
        for name, value in state.items()
        if value.numel()
    }


def wrong_roundings(rounded: Tensor, exact: Tensor) -> int:
    """How many 16-bit numbers have a neighbour that is nearer to the exact one. Of two that are
    nearly as near, either is right: a variant's gain is float32."""
    distance, wrong = (rounded.double() - exact).abs(), 0
    distance = distance - 1e-6 * exact.abs().mean()
    for toward in (-1, 1):
        number = rounded.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        ordered = torch.where(number >= 0x8000, 0x8000 - number, number) + toward
        next_ = torch.where(ordered < 0, 0x8000 - ordered, ordered).bitwise_and(0xFFFF)
        neighbour = next_.to(torch.int16).view(rounded.dtype)
        wrong += int(((neighbour.double() - exact).abs() < distance).sum())
    return wrong


def run(operation: Callable[[Case], Found], case: Case) -> Found:
    """Run an operation on all examples; if that raises, run it on each example alone."""
    try:
        return operation(case)
    except Exception as failed:
        if len(case.inputs) == 1:
            return dict.fromkeys(case.inputs, reason(failed))
        verdicts: Found = {}
        for example in case.inputs:
            verdicts |= run(operation, case.solo(example))
        # every example alone is exact, so the error comes from running them together
        return (
            verdicts
            if any(verdicts.values())
            else dict.fromkeys(verdicts, f"side by side: {reason(failed)}")
        )


def of_layer(
    name: str, variants: Sequence[str] = (), operations: Sequence[str] = tuple(OPERATIONS)
) -> Results:
    """Every variant × every operation on one kind of layer; or at least two variants, and some
    operations."""
    quiet()
    kind = LAYERS[name]
    examples = {f"m{number}": example for number, example in enumerate(kind.examples())}
    if not any(kind.weights(module) for module, _ in examples.values()):
        # An adapter that only trains vectors in full is no LoRA to PEFT: one linear layer beside
        # them makes it one.
        examples["beside"] = (nn.Linear(3, 3), torch.randn(2, 3))
    base = Side({name: module for name, (module, _) in examples.items()}).double().eval()
    tuples = {
        name: args if isinstance(args, tuple) else (args,) for name, (_, args) in examples.items()
    }
    inputs = {name: cast(args, torch.float64) for name, args in tuples.items()}
    with torch.no_grad():
        base(inputs)  # a first call settles the rows of an embedding with max_norm
        rows = {name: rows_of(kind, getattr(base, name), args) for name, args in inputs.items()}
    breaks = {}
    if "compile" in operations:
        breaks = {name: breaks_of(getattr(base, name), args) for name, args in inputs.items()}
        torch._dynamo.reset()
    model, compiled_ = copy.deepcopy(base), {}
    chosen = [variant for variant in VARIANTS if not variants or variant.name in variants]
    refused = {
        variant.name: attach_where_possible(base, model, variant, inputs) for variant in chosen
    }
    complete = [name for name, why in refused.items() if not why]
    results = Results(
        name,
        {},
        {
            name: describe_example(getattr(base, name), base.get_submodule("m0"))
            for name in inputs
            if name != "beside"
        },
    )
    for variant in chosen:
        torch.manual_seed(0)
        why = refused[variant.name]
        variant_inputs = {name: args for name, args in inputs.items() if name not in why}
        second_variant = next(name for name in complete if name != variant.name)
        case = Case(
            kind, variant, base, variant_inputs, model, second_variant, rows, breaks, compiled_
        )
        verdicts_by_operation = {
            operation: {**why, **(run(OPERATIONS[operation], case) if variant_inputs else {})}
            for operation in operations
        }
        results.verdicts[variant.name] = {
            operation: {name: each[name] for name in results.examples}
            for operation, each in verdicts_by_operation.items()
        }
    return results
