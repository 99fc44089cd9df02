"""The operations of the matrix, one for each column, and ``of_layer``, which runs them on each
variant and example."""

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
    Inexact,
    Results,
    Side,
    Verdicts,
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

#: call paths: the default (None), and the two that a context can select
PATHS = (None, "factored", "materialised")
#: limits of relative errors
FORWARD, GRADIENT, PEFT = 1e-10, 1e-9, 1e-5
#: how often ``unmerge`` merges and unmerges
CYCLES = 10

#: a function that selects an adapter for each row (None: the base alone) within a context
Select = Callable[[Sequence[str | None]], AbstractContextManager[Any]]

# The reference is the module's own forward on gain ⊙ (W + ΔW), in float64.


def weights_of(base: Side, handle: veneer.Handle) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(each changed weight of ``base`` by path, the adapter parameters as leaves by name), float64.
    The weights have a graph to the leaves."""
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
    """(y by example, the adapter parameters as leaves by name). The outputs have a graph to the
    leaves."""
    handle = veneer.Handle(case.model, case.name)
    values, leaves = weights_of(case.base, handle)
    for path, layer_state in handle.layers.items():
        values |= {
            f"{path}.{name}": buffer.clone() for name, buffer in layer_state.full.named_buffers()
        }
    outputs = {}
    for example, args in examples.items():
        example_weights = {
            path.removeprefix(f"{example}."): tensor
            for path, tensor in values.items()
            if path.startswith(f"{example}.")
        }
        outputs[example] = flat(definition(getattr(case.base, example), example_weights, args))
    return outputs, leaves


def forward(case: Case) -> Verdicts:
    with torch.no_grad():
        expected, _ = reference_outputs(case, case.inputs)
        base = flats(case.base(case.inputs))
        verdicts: Verdicts = {}
        for path in PATHS:
            with context.override(path=path):
                for example, y in case.outputs().items():
                    verdicts[example] = verdicts.get(example) or _within(
                        error(y, expected[example]), FORWARD
                    )
    unchanged_examples = {
        example for example, y in base.items() if error(y, expected[example]) < 1e-3
    }
    return {
        example: "the adapter changes nothing" if example in unchanged_examples else why
        for example, why in verdicts.items()
    }


def gradient(case: Case) -> Verdicts:
    inputs = pytree.tree_map(
        lambda x: x.clone().requires_grad_() if _is_float(x) else x, dict(case.inputs)
    )
    expected, leaves = reference_outputs(case, inputs)
    weights = {example: torch.randn_like(y) for example, y in expected.items()}
    example_inputs = [
        (example, x)
        for example, args in inputs.items()
        for x in pytree.tree_leaves(args)
        if _is_float(x)
    ]
    parameters = dict(veneer.Handle(case.model, case.name).named_parameters())
    if list(parameters) != list(leaves):
        raise Inexact(f"trains {list(parameters)}")
    names = [
        *(name.partition(".")[0] for name in parameters),
        *(example for example, _ in example_inputs),
    ]
    verdicts: Verdicts = dict.fromkeys(case.inputs, EXACT)

    def gradients(
        outputs: Mapping[str, Tensor], numbers: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        loss = sum((weights[example] * y).sum() for example, y in outputs.items())
        return torch.autograd.grad(loss, [*numbers.values(), *(x for _, x in example_inputs)])  # pyright: ignore

    true_gradients = gradients(expected, leaves)
    for path in PATHS:
        with context.override(path=path), veneer.use(case.model, case.name):
            actual = gradients(flats(case.model(inputs)), parameters)
        for example, actual_gradient, true_gradient in zip(
            names, actual, true_gradients, strict=True
        ):
            verdicts[example] = verdicts[example] or _within(
                error(actual_gradient, true_gradient), GRADIENT
            )
    return verdicts


def merge(case: Case) -> Verdicts:
    """Check the merged outputs in float64, and in bfloat16 that every merged weight is the nearest
    number to W + ΔW."""
    adapted = case.outputs()
    veneer.merge(case.model, case.name)
    verdicts: Verdicts = {}
    for example, y in case.outputs().items():
        verdicts[example] = _within(error(y, adapted[example]), FORWARD, "other outputs")
    veneer.unmerge(case.model)
    model, handle = in_bfloat16(case)
    exact, _ = weights_of(model, handle)
    for path, change in handle.changes.items():
        module_path, _, _ = path.rpartition(".")
        exact[path] = change.layer.apply_forward_rewrite(
            model.get_submodule(module_path), exact[path].detach()
        )
    handle.merge(rounding="nearest")
    for path, values in exact.items():
        wrong_count = wrong_roundings(model.get_parameter(path).detach(), values.detach())
        example = path.partition(".")[0]
        verdicts[example] = verdicts[example] or (
            f"{wrong_count} weights are not rounded to the nearest" if wrong_count else EXACT
        )
    return verdicts


def unmerge(case: Case) -> Verdicts:
    """Check the bits of the base after every cycle, because the next cycle might undo an error."""
    model, handle = in_bfloat16(case)
    before = bits(model)
    verdicts: Verdicts = dict.fromkeys(case.inputs, EXACT)
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
    """(the case's base in bfloat16, the handle of the variant on the same examples)."""
    model = copy.deepcopy(case.base).bfloat16()
    for example in set(model._modules) - set(case.inputs):
        del model._modules[example]
    return model, attach(model, case.variant, cast(dict(case.inputs), torch.bfloat16))


def save_load(case: Case) -> Verdicts:
    with tempfile.TemporaryDirectory() as folder:
        veneer.save(case.model, f"{folder}/adapter", name=case.name)
        fresh = copy.deepcopy(case.base)
        handle = veneer.load(fresh, f"{folder}/adapter", name=case.name)
    saved_tensors = numbers_of(veneer.Handle(case.model, case.name))
    loaded_tensors = numbers_of(handle)
    if saved_tensors.keys() != loaded_tensors.keys():
        raise Inexact("other trained numbers")
    if handle.config != veneer.Handle(case.model, case.name).config:
        raise Inexact("another config")
    before = case.outputs()
    with torch.no_grad():
        after = flats(fresh(case.inputs))
    verdicts: Verdicts = {}
    for example in case.inputs:
        names = [name for name in saved_tensors if name.startswith(f"{example}.")]
        same_tensors = all(torch.equal(saved_tensors[name], loaded_tensors[name]) for name in names)
        same_outputs = torch.equal(before[example], after[example])
        verdicts[example] = (
            EXACT
            if same_tensors and same_outputs
            else "other outputs"
            if same_tensors
            else "other trained numbers"
        )
    return verdicts


def mixed_batch(case: Case) -> Verdicts:
    return _of_rows(case, lambda names: veneer.use(case.model, names), case.model)


def bank(case: Case) -> Verdicts:
    """``mixed_batch`` with a bank that loads both adapters from their folders, on another base."""
    model = copy.deepcopy(case.base)
    with tempfile.TemporaryDirectory() as folder:
        adapter_bank = veneer.Bank(model)
        for name in (case.name, case.other):
            veneer.save(case.model, Path(folder) / name, name=name)
            adapter_bank.add(Path(folder) / name)
        return _of_rows(case, adapter_bank.rows, model)


def _of_rows(case: Case, select: Select, model: Side) -> Verdicts:
    verdicts: Verdicts = {}
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
    """Run a batch whose rows use different adapters, in an order that the library must restore,
    because it runs the rows of an adapter together. Fewer than four rows are repeated, so that they
    can have several orders."""
    choices = (case.name, case.other, None)
    outputs_by_choice = []
    if 0 < count < 4:
        module, repeated = getattr(case.base, example), torch.arange(4) % count
        row_args, row_kwargs = case.kind.take(module, args, {}, repeated, count)
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
            # row i of the whole batch's outputs under the adapter of row i
            order = torch.tensor(
                [choices.index(name) * count + row for row, name in enumerate(names)]
            )
            expected = case.kind.put(getattr(case.model, example), outputs_by_choice, order)
            if why := _within(
                error(flat(mixed), flat(expected)), FORWARD, "differs from the rows alone"
            ):
                return why
    return EXACT


def compile_model(case: Case) -> Verdicts:
    """Compile into one graph; examples whose base breaks the graph, with graph breaks."""
    breaking = {example: args for example, args in case.inputs.items() if case.breaks[example]}
    unbroken = {example: args for example, args in case.inputs.items() if not case.breaks[example]}
    verdicts: Verdicts = {}
    if breaking:
        verdicts_with_breaks = _check_compiled(case, breaking, fullgraph=False)
        verdicts |= {
            example: why
            or f"{NOTE}a gap in the compiled graph, as without an adapter: {case.breaks[example]}"
            for example, why in verdicts_with_breaks.items()
        }
    if unbroken:
        try:
            verdicts |= _check_compiled(case, unbroken, fullgraph=True)
        except Exception as error:
            if len(case.inputs) > 1:
                raise
            verdicts_with_breaks = _check_compiled(case, unbroken, fullgraph=False)
            verdicts |= {
                example: why or f"{NOTE}a gap in the compiled graph: {reason(error)}"
                for example, why in verdicts_with_breaks.items()
            }
    return verdicts


def _check_compiled(case: Case, inputs: Mapping[str, tuple], fullgraph: bool) -> Verdicts:
    run = case.compiled.setdefault(
        fullgraph, torch.compile(case.model, backend="aot_eager", fullgraph=fullgraph)
    )
    verdicts: Verdicts = dict.fromkeys(inputs, EXACT)
    for name in (case.name, case.other, case.name):
        with veneer.use(case.model, name), torch.no_grad():
            actual, expected = flats(run(inputs)), flats(case.model(inputs))
        verdicts = {
            example: verdicts[example]
            or _within(error(actual[example], expected[example]), FORWARD, "differs from eager")
            for example in inputs
        }
    return verdicts


MISSING_IN_FOLDER = (
    "PEFT computes it exactly, but leaves numbers out of the folder that it writes: those of a"
    " vector that is trained in full, if its module has other parameters or running statistics"
)


def peft_round_trip(case: Case) -> Verdicts:
    expected = case.outputs()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        veneer.save(case.model, f"{folder}/ours", name=case.name)

        def load_in_peft() -> Any:
            return peft.PeftModel.from_pretrained(copy.deepcopy(case.base), f"{folder}/ours").eval()

        try:
            peft_model = load_in_peft()
            outputs = flats(peft_model(case.inputs))
            peft_model.save_pretrained(f"{folder}/theirs")
            is_same = {
                example: error(outputs[example], y) <= PEFT for example, y in expected.items()
            }
            merged = (
                outputs
                if all(is_same.values())
                else flats(load_in_peft().merge_and_unload()(case.inputs))
            )
        except Exception as peft_error:
            raise Inexact(f"PEFT: {peft_error}") from peft_error
        reloaded = copy.deepcopy(case.base)
        veneer.load(reloaded, f"{folder}/theirs")
        reloaded_outputs = flats(reloaded(case.inputs))
        our_keys, peft_keys = (
            {*load_file(f"{folder}/{folder_name}/adapter_model.safetensors")}
            for folder_name in ("ours", "theirs")
        )
    verdicts: Verdicts = {}
    for example, y in expected.items():
        if is_same[example]:
            lost = any(f".{example}." in key for key in our_keys - peft_keys)
            why = MISSING_IN_FOLDER if lost else "what PEFT then writes gives other outputs"
            verdicts[example] = _within(error(reloaded_outputs[example], y), PEFT, why)
        elif error(merged[example], y) <= PEFT:
            verdicts[example] = "PEFT's forward differs from its own merge, which is ours"
        else:
            verdicts[example] = "PEFT computes something else from the same numbers"
    return verdicts


OPERATIONS: dict[str, Callable[[Case], Verdicts]] = {
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
    """All tensors of an adapter by path, including frozen ones and running statistics. The column
    of A of an input that never changes is zero, as in a file, because it has no effect."""
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
    """The bytes of the base's parameters and buffers, by name."""
    state = {name: value for name, value in model.state_dict().items() if ".veneer." not in name}
    return {
        name: value.clone().contiguous().flatten().view(torch.uint8)
        for name, value in state.items()
        if value.numel()
    }


def wrong_roundings(rounded: Tensor, exact: Tensor) -> int:
    """How many 16-bit numbers have a neighbour that is nearer to the exact number. If both are
    nearly equally near, either is right, because a variant's gain is float32."""
    distance, wrong = (rounded.double() - exact).abs(), 0
    distance = distance - 1e-6 * exact.abs().mean()
    for direction in (-1, 1):
        number = rounded.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        ordered = torch.where(number >= 0x8000, 0x8000 - number, number) + direction
        next_bits = torch.where(ordered < 0, 0x8000 - ordered, ordered).bitwise_and(0xFFFF)
        neighbour = next_bits.to(torch.int16).view(rounded.dtype)
        wrong += int(((neighbour.double() - exact).abs() < distance).sum())
    return wrong


def run(operation: Callable[[Case], Verdicts], case: Case) -> Verdicts:
    """The verdicts of an operation on all examples at once; if this raises, on each alone."""
    try:
        return operation(case)
    except Exception as error:
        if len(case.inputs) == 1:
            return dict.fromkeys(case.inputs, reason(error))
        verdicts: Verdicts = {}
        for example in case.inputs:
            verdicts |= run(operation, case.solo(example))
        # every example alone is exact, so the error comes from running them together
        return (
            verdicts
            if any(verdicts.values())
            else dict.fromkeys(verdicts, f"side by side: {reason(error)}")
        )


def of_layer(
    name: str, variants: Sequence[str] = (), operations: Sequence[str] = tuple(OPERATIONS)
) -> Results:
    """The results of every variant and every operation on one layer kind. ``variants`` (at least
    two) and ``operations`` restrict them."""
    quiet()
    kind = LAYERS[name]
    examples = {f"m{number}": example for number, example in enumerate(kind.examples())}
    if not any(kind.weights(module) for module, _ in examples.values()):
        # PEFT does not take an adapter that only trains vectors in full as LoRA. An additional
        # linear layer makes it one.
        examples["beside"] = (nn.Linear(3, 3), torch.randn(2, 3))
    base = Side({name: module for name, (module, _) in examples.items()}).double().eval()
    tuples = {
        name: args if isinstance(args, tuple) else (args,) for name, (_, args) in examples.items()
    }
    inputs = {name: cast(args, torch.float64) for name, args in tuples.items()}
    with torch.no_grad():
        base(inputs)  # the first call rescales the rows of an embedding with max_norm
        rows = {name: rows_of(kind, getattr(base, name), args) for name, args in inputs.items()}
    breaks = {}
    if "compile" in operations:
        breaks = {name: breaks_of(getattr(base, name), args) for name, args in inputs.items()}
        torch._dynamo.reset()
    model, compiled = copy.deepcopy(base), {}
    selected_variants = [
        variant for variant in VARIANTS if not variants or variant.name in variants
    ]
    refusals = {
        variant.name: attach_where_possible(base, model, variant, inputs)
        for variant in selected_variants
    }
    complete_variants = [name for name, why in refusals.items() if not why]
    results = Results(
        name,
        {},
        {
            name: describe_example(getattr(base, name), base.get_submodule("m0"))
            for name in inputs
            if name != "beside"
        },
    )
    for variant in selected_variants:
        torch.manual_seed(0)
        why = refusals[variant.name]
        variant_inputs = {name: args for name, args in inputs.items() if name not in why}
        second_variant = next(name for name in complete_variants if name != variant.name)
        case = Case(
            kind, variant, base, variant_inputs, model, second_variant, rows, breaks, compiled
        )
        verdicts_by_operation = {
            operation: {**why, **(run(OPERATIONS[operation], case) if variant_inputs else {})}
            for operation in operations
        }
        results.verdicts[variant.name] = {
            operation: {name: verdicts[name] for name in results.examples}
            for operation, verdicts in verdicts_by_operation.items()
        }
    return results
