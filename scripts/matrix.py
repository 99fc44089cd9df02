"""Write docs/support.md: what works with what, every cell decided by a run.

    python scripts/matrix.py            run everything, print the page and write it
    python scripts/matrix.py --check    run everything, fail if the committed page says something else

The layers, variants and storages are those of the registries, the modules and inputs those of their ``examples``. All
examples of a kind stand side by side in one model, on which every variant is an adapter: so one file, one compilation
and one PEFT model serve them all. Where that fails, each example runs alone, to find out which it was and why.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers.pytorch_utils  # noqa: E402, F401 (the class of a kind that exists once this is imported)
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import veneer  # noqa: E402
from toys import cast, definition, error, flat, randomise  # noqa: E402
from veneer import context  # noqa: E402
from veneer.adapted import weight_of  # noqa: E402
from veneer.bases import BASES, Storage  # noqa: E402
from veneer.errors import VeneerError  # noqa: E402
from veneer.layers import LAYERS, Layer  # noqa: E402
from veneer.variants import VARIANTS, Variant  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
PATHS = (None, "materialised")
FORWARD, GRADIENT, PEFT = 1e-10, 1e-9, 1e-5
CYCLES = 10

EXACT = ""
#: begins what is said of an exact result
NOTE = "exact, with "
#: an example to which an operation does not apply
LEFT_OUT = None
#: what an operation says of each example by name: EXACT, LEFT_OUT or why it is not exact
Found = dict[str, str | None]


class Side(nn.Module):
    """Modules side by side, called on a mapping of their arguments by name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs):
        return {name: getattr(self, name)(*args) for name, args in inputs.items()}


class Inexact(Exception):
    """A run that ended and gave another result."""


@dataclass
class Case:
    """One variant on the examples of one kind of layer.

    Fields:
        base: the examples without adapters, float64.
        model: the same with an adapter that is named like each variant.
        other: another adapter on it.
        rows, breaks: what ``rows_of`` and ``breaks_of`` find for each example.
        compiled: the model, compiled with and without ``fullgraph``; shared by the cases of the model.
    """

    kind: Layer
    variant: Variant
    base: Side
    inputs: Mapping[str, tuple]
    model: Side
    other: str
    rows: Mapping[str, int | None]
    breaks: Mapping[str, str]
    compiled: dict[bool, Any] = field(default_factory=dict)
    alone: dict[str, Case] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.variant.name

    def solo(self, example: str) -> Case:
        """This case on one example."""
        if example not in self.alone:
            base = Side({example: getattr(self.base, example)})
            inputs = {example: self.inputs[example]}
            model = copy.deepcopy(base)
            attach(model, self.variant, inputs)
            attach(model, VARIANTS["lora"], inputs, name="other")
            self.alone[example] = Case(self.kind, self.variant, base, inputs, model, "other", self.rows, self.breaks)
        return self.alone[example]

    def outputs(self) -> dict[str, Tensor]:
        with veneer.use(self.model, self.name), torch.no_grad():
            return flats(self.model(self.inputs))


def flats(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: flat(output) for name, output in outputs.items()}


def attach(model: Side, variant: Variant, inputs: Mapping[str, tuple], name: str | None = None, exclude=()) -> Any:
    """The variant as an adapter with random numbers, on every weight that there is, with all the data that it needs."""
    given: dict[str, Any] = {}
    if variant.needs & {"inputs", "gradient"}:
        given["batches"] = [(inputs,)]
    if "gradient" in variant.needs:
        given["loss"] = lambda model, batch: sum(y.square().sum() for y in flats(model(*batch)).values())
    if "original" in variant.needs:
        state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
        given["original"] = {key: value + 0.05 * torch.randn_like(value) for key, value in state.items()}
    config = veneer.LoraConfig(rank=2, alpha=3, targets="all", variant=variant.name, exclude=exclude)
    handle = veneer.attach(model, config, name or variant.name, **given)
    randomise(handle)
    return handle


def attach_where_possible(base: Side, model: Side, variant: Variant, inputs: Mapping[str, tuple]) -> dict[str, str]:
    """Attach the variant to ``model``, leaving out the examples that refuse it; why they do, by name."""
    try:
        attach(model, variant, inputs)
        return {}
    except Exception as whole:
        refused: dict[str, str] = {}
        for example, args in inputs.items():
            try:
                attach(Side({example: copy.deepcopy(getattr(base, example))}), variant, {example: args})
            except Exception as own:
                refused[example] = reason(own)
        if not refused:
            raise whole
        if len(refused) < len(inputs):
            rest = {example: args for example, args in inputs.items() if example not in refused}
            attach(model, variant, rest, exclude=tuple(refused))
        return refused


def reason(error: Exception, speaker: str = "") -> str:
    """An exception as a few words that are the same on every machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, VeneerError | Inexact):
        speaker, text = "", " ".join(lines)
        found = re.search(r"Found: (.*?)\. Expected: ", text)
        text = found[1] if found else text
    else:
        text = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
        text = re.sub(r"(\b[A-Z]\w+)\([^()]*(\([^()]*\)[^()]*)*\)", r"\1", text)  # Linear(in_features=…)
        text = re.split(r": (?:copying|\[)", text)[0]
        sentences = re.split(r"(?<=[\w`'\"])\. ", text)
        text = ". ".join(sentences[:2]) if len(sentences) > 1 and len(sentences[0]) < 60 else sentences[0]
    text = re.sub(r"(base_model\.model\.)?\b(m\d+|beside)\.?", "", text)  # the names of our examples
    text = re.sub(r"\b(rank|groups?=?|size of tensor \w|dimension) ?\(?\d+\)?", r"\1", text).strip(" .:;,")
    return f"{speaker}: {text}" if speaker else text


# The definition: the module's own forward on gain ⊙ (W + ΔW), in float64.


def expected(case: Case, examples: Mapping[str, tuple]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(y by example, the trained numbers as float64 leaves by name), with a graph from these to those."""
    leaves: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    handle = veneer.Handle(case.model, case.name)
    for path, change in handle.changes.items():
        own = {name: number.detach().clone().requires_grad_() for name, number in change.named_parameters()}
        leaves |= {f"{path}.{name}": number for name, number in own.items()}
        numbers = {**dict(change.named_buffers()), **own}
        weight = case.base.get_parameter(path).detach()
        dense = change.layer.unfold(weight, change.dims)
        if change.still is not None and "A" in numbers:  # the column of an input that never changes is zero
            numbers["A"] = numbers["A"] * (torch.arange(change.dims.in_) != change.still)
        low, gain = change.variant.resolve(numbers, change.scale, lambda dense=dense: dense)
        low = low if change.still is None else low.without(change.still)
        delta = torch.einsum("gor,gri->goi", low.B, low.A) * low.scale
        weight = weight + change.layer.fold(delta, weight.shape)
        values[path] = weight if gain is None else weight * change.layer.spread(gain, change.dims, weight.shape)
    for path, part in handle.layers.items():
        for name, parameter in part.full.named_parameters():
            leaves[f"{path}.{name}"] = values[f"{path}.{name}"] = parameter.detach().clone().requires_grad_()
        values |= {f"{path}.{name}": buffer.clone() for name, buffer in part.full.named_buffers()}
    outputs = {}
    for example, args in examples.items():
        own = {path.removeprefix(f"{example}."): v for path, v in values.items() if path.startswith(f"{example}.")}
        outputs[example] = flat(definition(getattr(case.base, example), own, args))
    return outputs, leaves


def forward(case: Case) -> Found:
    with torch.no_grad():
        wanted, _ = expected(case, case.inputs)
        base = flats(case.base(case.inputs))
        found: Found = {}
        for path in PATHS:
            with context.changed(path=path):
                for example, y in case.outputs().items():
                    found[example] = found.get(example) or _within(error(y, wanted[example]), FORWARD)
    idle = {example for example, y in base.items() if error(y, wanted[example]) < 1e-3}
    return {example: "the adapter changes nothing" if example in idle else why for example, why in found.items()}


def gradient(case: Case) -> Found:
    inputs = pytree.tree_map(lambda x: x.clone().requires_grad_() if _is_float(x) else x, dict(case.inputs))
    wanted, leaves = expected(case, inputs)
    weights = {example: torch.randn_like(y) for example, y in wanted.items()}
    xs = [(example, x) for example, args in inputs.items() for x in pytree.tree_leaves(args) if _is_float(x)]
    own = dict(veneer.Handle(case.model, case.name).named_parameters())
    if list(own) != list(leaves):
        raise Inexact(f"trains {list(own)}")
    names = [*(name.partition(".")[0] for name in own), *(example for example, _ in xs)]
    found: Found = dict.fromkeys(case.inputs, EXACT)

    def gradients(outputs: Mapping[str, Tensor], numbers: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        loss = sum((weights[example] * y).sum() for example, y in outputs.items())
        return torch.autograd.grad(loss, [*numbers.values(), *(x for _, x in xs)])  # pyright: ignore

    truth = gradients(wanted, leaves)
    for path in PATHS:
        with context.changed(path=path), veneer.use(case.model, case.name):
            actual = gradients(flats(case.model(inputs)), own)
        for example, mine, true in zip(names, actual, truth, strict=True):
            found[example] = found[example] or _within(error(mine, true), GRADIENT)
    return found


def merge(case: Case) -> Found:
    """The outputs in float64, and in bfloat16 every merged weight: none of its neighbours is nearer to W + ΔW."""
    adapted = case.outputs()
    veneer.merge(case.model, case.name)
    found: Found = {example: _within(error(y, adapted[example]), FORWARD) for example, y in case.outputs().items()}
    veneer.unmerge(case.model)
    model, handle = in_bfloat16(case)
    exact: dict[str, Tensor] = {}
    for path, change in handle.changes.items():
        above, _, name = path.rpartition(".")
        module = model.get_submodule(above)
        weight = weight_of(module, name)
        with torch.no_grad():
            exact[path] = change.layer.settle(module, change.changed(weight, *change.resolve(weight), torch.float64))
    for path, part in handle.layers.items():
        exact |= {f"{path}.{name}": p.detach().double() for name, p in part.full.named_parameters()}
    handle.merge()
    for path, values in exact.items():
        wrong = wrong_roundings(model.get_parameter(path).detach(), values)
        example = path.partition(".")[0]
        found[example] = found[example] or (f"{wrong} weights are not rounded to the nearest" if wrong else EXACT)
    return found


def unmerge(case: Case) -> Found:
    model, handle = in_bfloat16(case)
    before = bits(model)
    for _ in range(CYCLES):
        handle.merge()
        merged = bits(model)
        handle.unmerge()
    found: Found = {}
    for example in case.inputs:
        own = [key for key in before if key.startswith(f"{example}.")]
        back = all(torch.equal(bits(model)[key], before[key]) for key in own)
        moved = any(not torch.equal(merged[key], before[key]) for key in own)
        found[example] = EXACT if back and moved else "other bits" if moved else "the merge changed nothing"
    return found


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
    mine, theirs = _numbers(veneer.Handle(case.model, case.name)), _numbers(handle)
    if mine.keys() != theirs.keys():
        raise Inexact("other trained numbers")
    before = case.outputs()
    with torch.no_grad():
        after = flats(fresh(case.inputs))
    found: Found = {}
    for example in case.inputs:
        own = [name for name in mine if name.startswith(f"{example}.")]
        same = all(torch.equal(mine[name], theirs[name]) for name in own)
        equal = torch.equal(before[example], after[example])
        found[example] = EXACT if same and equal else "other outputs" if same else "other trained numbers"
    return found


def mixed_batch(case: Case) -> Found:
    found: Found = {}
    for example, args in case.inputs.items():
        count = case.rows[example]
        if count is None:
            found[example] = LEFT_OUT
            continue
        names = [(case.name, None, case.other)[row % 3] for row in range(abs(count))]
        try:
            with torch.no_grad():
                each = []
                for name in (case.name, None, case.other):
                    with veneer.use(case.model, name):
                        each.append(case.model({example: args})[example])
                with veneer.use(case.model, names):
                    mixed = case.model({example: args})[example]
            # Row i of the outputs of the whole batch under its own adapter.
            order = torch.tensor([row % 3 * count + row for row in range(count)])
            alone = case.kind.put(getattr(case.model, example), each, order)
            found[example] = _within(error(flat(mixed), flat(alone)), FORWARD)
        except Exception as error_:
            found[example] = reason(error_)
    return found


def rows_of(kind: Layer, module: nn.Module, args: tuple) -> int | None:
    """How many rows the inputs of a module hold: as many as the base can be run on one by one, with the same outputs.
    None if there is no such number; negative for inputs that the kind cannot take apart."""
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    packed = [int(x.batch_sizes[0]) for x in args if isinstance(x, PackedSequence)]
    candidates = (*packed, *dict.fromkeys(size for x in tensors for size in x.shape[:2] if size > 1))
    whole, taken = flat(module(*args)), False
    for count in candidates:
        try:
            each = []
            for row in range(count):
                own, named = kind.take(module, args, {}, torch.tensor([row]), count)
                taken = True
                each.append(module(*own, **named))
            if error(flat(kind.put(module, each, torch.arange(count))), whole) < FORWARD:
                return count
        except (LookupError, RuntimeError):  # not an axis of rows
            continue
    return None if taken else -candidates[0]


def breaks_of(module: nn.Module, args: tuple) -> str:
    """Why the base alone cannot be compiled into one graph, or nothing."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(module, backend="eager", fullgraph=True)(*args)
    except Exception as broken:
        return reason(broken)
    return EXACT


def compiled(case: Case) -> Found:
    """Into one graph, but for what breaks without an adapter too; then with graph breaks."""
    broken = {example: args for example, args in case.inputs.items() if case.breaks[example]}
    rest = {example: args for example, args in case.inputs.items() if not case.breaks[example]}
    found: Found = {}
    if broken:
        split = _compiled(case, broken, fullgraph=False)
        found |= {e: why or f"{NOTE}a graph break, as in the base alone: {case.breaks[e]}" for e, why in split.items()}
    if rest:
        try:
            found |= _compiled(case, rest, fullgraph=True)
        except Exception as own:
            if len(case.inputs) > 1:
                raise
            split = _compiled(case, rest, fullgraph=False)
            found |= {e: why or f"{NOTE}a graph break: {reason(own)}" for e, why in split.items()}
    return found


def _compiled(case: Case, inputs: Mapping[str, tuple], fullgraph: bool) -> Found:
    run = case.compiled.setdefault(fullgraph, torch.compile(case.model, backend="aot_eager", fullgraph=fullgraph))
    found: Found = dict.fromkeys(inputs, EXACT)
    for name in (case.name, case.other, case.name):
        with veneer.use(case.model, name), torch.no_grad():
            actual, wanted = flats(run(inputs)), flats(case.model(inputs))
        found = {e: found[e] or _within(error(actual[e], wanted[e]), FORWARD) for e in inputs}
    return found


def peft_round_trip(case: Case) -> Found:
    wanted = case.outputs()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        veneer.save(case.model, f"{folder}/ours", name=case.name)
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(case.base), f"{folder}/ours").eval()
            there = flats(theirs(case.inputs))
            theirs.save_pretrained(f"{folder}/theirs")
            merged = flats(theirs.merge_and_unload()(case.inputs))
        except Exception as theirs_:
            raise Inexact(reason(theirs_, "PEFT")) from theirs_
        back = copy.deepcopy(case.base)
        veneer.load(back, f"{folder}/theirs")
        again = flats(back(case.inputs))
    found: Found = {}
    for example, y in wanted.items():
        if error(there[example], y) > PEFT:
            own = error(merged[example], y) <= PEFT
            found[example] = "PEFT's forward differs from " + ("its own merge, which is ours" if own else "ours")
        else:
            found[example] = _within(error(again[example], y), PEFT, "read again, differs from what was saved")
    return found


OPERATIONS: dict[str, Callable[[Case], Found]] = {
    "forward": forward,
    "gradient": gradient,
    "merge": merge,
    "unmerge": unmerge,
    "save/load": save_load,
    "mixed batch": mixed_batch,
    "compile": compiled,
    "PEFT round trip": peft_round_trip,
}


def _within(found: float, bound: float, what: str = "differs from the definition") -> str:
    return EXACT if found <= bound else what


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _numbers(handle: veneer.Handle) -> dict[str, Tensor]:
    """Every number of an adapter, frozen ones and running statistics too, but for those of an input that never changes:
    they have no effect, and stand as zeros in a file."""
    found: dict[str, Tensor] = {}
    for at, change in handle.changes.items():
        found |= {f"{at}.{name}": value for name, value in change.numbers.items()}
        if change.still is not None and "A" in change.numbers:
            found[f"{at}.A"] = change.numbers["A"].index_fill(2, torch.tensor([change.still]), 0)
    for at, part in handle.layers.items():
        found |= {f"{at}.{name}": value for name, value in part.full.state_dict().items()}
    return {name: value.detach() for name, value in found.items()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the base, as bytes."""
    state = {name: value for name, value in model.state_dict().items() if ".veneer." not in name}
    return {
        name: value.clone().contiguous().flatten().view(torch.uint8) for name, value in state.items() if value.numel()
    }


def wrong_roundings(rounded: Tensor, exact: Tensor) -> int:
    """How many 16-bit numbers have a neighbour that is nearer to the exact one."""
    distance, wrong = (rounded.double() - exact).abs(), 0
    for toward in (-1, 1):
        number = rounded.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        ordered = torch.where(number >= 0x8000, 0x8000 - number, number) + toward
        next_ = torch.where(ordered < 0, 0x8000 - ordered, ordered).bitwise_and(0xFFFF)
        neighbour = next_.to(torch.int16).view(rounded.dtype)
        wrong += int(((neighbour.double() - exact).abs() < distance).sum())
    return wrong


def run(operation: Callable[[Case], Found], case: Case) -> Found:
    """What an operation says of each example; if it fails on all at once, of each alone."""
    try:
        return operation(case)
    except Exception as failed:
        if len(case.inputs) == 1:
            return dict.fromkeys(case.inputs, reason(failed))
        found: Found = {}
        for example in case.inputs:
            found |= run(operation, case.solo(example))
        return found


@dataclass
class Results:
    """What was found of one kind: {variant or storage: {operation: {example: …}}}, and what the examples are."""

    name: str
    found: dict[str, dict[str, Found]]
    examples: dict[str, str]


def of_layer(name: str) -> Results:
    """Every variant × every operation on one kind of layer."""
    quiet()
    kind = LAYERS[name]
    examples = {f"m{number}": example for number, example in enumerate(kind.examples())}
    if not any(kind.weights(module) for module, _ in examples.values()):
        # An adapter that only trains vectors in full is no LoRA to PEFT: one linear layer beside them makes it one.
        examples["beside"] = (nn.Linear(3, 3), torch.randn(2, 3))
    base = Side({name: module for name, (module, _) in examples.items()}).double().eval()
    tuples = {name: args if isinstance(args, tuple) else (args,) for name, (_, args) in examples.items()}
    inputs = {name: cast(args, torch.float64) for name, args in tuples.items()}
    with torch.no_grad():
        base(inputs)  # a first call settles the rows of an embedding with max_norm
        rows = {name: rows_of(kind, getattr(base, name), args) for name, args in inputs.items()}
    breaks = {name: breaks_of(getattr(base, name), args) for name, args in inputs.items()}
    torch._dynamo.reset()
    model, compiled_ = copy.deepcopy(base), {}
    refused = {variant.name: attach_where_possible(base, model, variant, inputs) for variant in VARIANTS}
    whole = [name for name, why in refused.items() if not why]
    results = Results(name, {}, {name: described(getattr(base, name)) for name in inputs if name != "beside"})
    for variant in VARIANTS:
        why = refused[variant.name]
        own = {name: args for name, args in inputs.items() if name not in why}
        other = next(name for name in whole if name != variant.name)
        case = Case(kind, variant, base, own, model, other, rows, breaks, compiled_)
        found = {what: {**why, **(run(operation, case) if own else {})} for what, operation in OPERATIONS.items()}
        results.found[variant.name] = {
            what: {name: each[name] for name in results.examples} for what, each in found.items()
        }
    return results


def described(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


# Storages: linear layers whose weight is stored in another way, with variant "lora".


@dataclass
class Stored:
    """One example of a storage: a linear layer without and with an adapter whose change is a tenth of its weight."""

    storage: Storage
    base: Side
    model: Side
    handle: veneer.Handle
    x: Tensor

    @property
    def linear(self) -> Any:
        return self.model.m0

    @property
    def weight(self) -> Any:
        return weight_of(self.linear, "weight")

    def __call__(self, x: Tensor | None = None) -> Tensor:
        return self.model({"m0": (self.x if x is None else x,)})["m0"]


def stored(storage: Storage, module: nn.Module) -> Stored:
    base = Side({"m0": module.eval()})
    model = copy.deepcopy(base)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, alpha=2, targets="all"))
    randomise(handle)
    (change,) = handle.changes.values()
    weight = weight_of(model.m0, "weight")
    change.scale *= (0.1 * storage.dense(weight).double().norm() / change.resolve(weight)[0].norm()).item()
    bias: Any = module.bias
    return Stored(storage, base, model, handle, torch.randn(5, change.dims.in_, dtype=bias.dtype))


def stored_truth(case: Stored, x: Tensor, numbers: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """(W x, (W + ΔW) x), both with the bias, in float64."""
    W, bias = case.storage.dense(case.weight).detach().double(), case.linear.bias.detach().double()
    return F.linear(x, W, bias), F.linear(x, W + scale * numbers["B"][0] @ numbers["A"][0], bias)


BOUNDS = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def stored_forward(case: Stored) -> str:
    """The default path adds ΔW x to what the base computes; the materialised one is the definition."""
    (change,) = case.handle.changes.values()
    numbers = {name: number.double() for name, number in change.named_parameters()}
    with torch.no_grad():
        plain, changed = stored_truth(case, case.x.double(), numbers, change.scale)
        with veneer.use(case.model, None):
            base = case()
        adapted = case()
        with context.changed(path="materialised"):
            materialised = case()
    bound = BOUNDS[adapted.dtype]
    if error(adapted, base.double() + changed - plain) > bound or error(materialised, changed) > bound:
        return "differs from the definition"
    return EXACT if error(base, plain) <= bound else f"{NOTE}the library's own rounding in the base's part of y"


def stored_gradient(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    own = dict(change.named_parameters())
    x, x64 = case.x.clone().requires_grad_(), case.x.double().requires_grad_()
    numbers = {name: number.detach().double().requires_grad_() for name, number in own.items()}
    _, wanted = stored_truth(case, x64, numbers, change.scale)
    y = case(x)
    weights = torch.randn_like(y)
    truth = torch.autograd.grad((wanted * weights.double()).sum(), [*numbers.values(), x64])
    found = torch.autograd.grad((y * weights).sum(), [*own.values(), x])
    bound = 10 * BOUNDS[y.dtype]
    wrong = [name for name, a, b in zip((*own, "x"), found, truth, strict=True) if error(a, b) > bound]
    if wrong == ["x"]:
        with veneer.use(case.model, None):
            (plain,) = torch.autograd.grad((case(x) * weights).sum(), x)
        low, _ = change.resolve(case.weight)
        share = weights.double() @ low.delta(torch.float64)[0]
        if error(found[-1], plain.double() + share) <= bound:
            return f"{NOTE}the library's own rounding in the base's part of ∂x"
    return f"differs for {', '.join(wrong)}" if wrong else EXACT


def stored_merge(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    with torch.no_grad():
        exact = change.changed(case.weight, *change.resolve(case.weight), torch.float64)
    report = case.handle.merge()
    merged = case.storage.dense(case.weight).detach()
    case.handle.unmerge()
    if merged.dtype in (torch.bfloat16, torch.float16):
        rounded = not wrong_roundings(merged, exact)
    else:
        rounded = torch.equal(merged, exact.to(merged.dtype))
    return EXACT if rounded else f"{GRID}{report.retention:.0%}"


#: begins what is said of a merge whose result lies on the storage's own, coarser grid
GRID = "to its grid: "


def stored_unmerge(case: Stored) -> str:
    def held() -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in case.storage.stored(case.weight).items()}

    with torch.no_grad():
        before, y = held(), case()
        for _ in range(3):
            case.handle.merge()
            case()
            case.handle.unmerge()
        after, again = held(), case()
    same = before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    return EXACT if same and torch.equal(y, again) else "other bits"


def stored_save(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    change.scale = change.variant.scale(change.alpha, change.rank)  # a file holds alpha, not a scale
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        case.handle.save(f"{folder}/adapter")
        fresh = copy.deepcopy(case.base)
        handle = veneer.load(fresh, f"{folder}/adapter")
        mine, theirs = _numbers(case.handle), _numbers(handle)
        same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        equal = torch.equal(case(), fresh({"m0": (case.x,)})["m0"])
    return EXACT if same and equal else "other outputs" if same else "other trained numbers"


STORED: dict[str, Callable[[Stored], str]] = {
    "forward": stored_forward,
    "gradient": stored_gradient,
    "merge": stored_merge,
    "unmerge": stored_unmerge,
    "save/load": stored_save,
}


def of_storage(name: str) -> Results:
    """Every operation on every example of one storage."""
    quiet()
    storage = BASES[name]
    results = Results(name, {name: {what: {} for what in STORED}}, {})
    for number, module in enumerate(storage.examples()):
        example = f"m{number}"
        results.examples[example] = type(weight_of(module, "weight")).__name__
        case = stored(storage, module)
        for what, operation in STORED.items():
            try:
                found = operation(case)
            except Exception as failed:
                found = reason(failed)
            results.found[name][what][example] = found
    return results


# The page.


class Page:
    """Tables, and their footnotes."""

    def __init__(self) -> None:
        self.notes: dict[str, int] = {}
        self.counts = {"exact": 0, "exact, with a note": 0, "in part": 0, "no": 0}

    def cell(self, found: Found, examples: Mapping[str, str]) -> tuple[str, str]:
        """(the class of a cell, its text)."""
        counted = {example: why for example, why in found.items() if why is not LEFT_OUT}
        whys = {why: [e for e in counted if counted[e] == why] for why in dict.fromkeys(counted.values()) if why}
        if counted and not whys:
            return "exact", "exact"
        grids = [why.removeprefix(GRID) for why in whys if why.startswith(GRID)]
        if grids:  # the shares of all examples as one range
            least, most = min(grids, key=lambda s: int(s[:-1])), max(grids, key=lambda s: int(s[:-1]))
            share = least if least == most else f"{least} to {most}"
            kept = f"rounded to the storage's own grid, which keeps {share} of a change that is a tenth of the weight"
            whys = {kept: [e for why, es in whys.items() if why.startswith(GRID) for e in es],
                    **{why: es for why, es in whys.items() if not why.startswith(GRID)}}  # fmt: skip
        texts = []
        for why, own in whys.items():
            which = "" if len(own) == len(counted) else ", ".join(dict.fromkeys(f"`{examples[e]}`" for e in own)) + ": "
            texts.append(f"{which}{why.removeprefix(NOTE)}")
        number = self.notes.setdefault("; ".join(texts) or "no example has rows", len(self.notes) + 1)
        good = sum(not why for why in counted.values())
        noted = sum(bool(why) and why.startswith((NOTE, GRID)) for why in counted.values())
        if grids and good + noted == len(counted):
            return "exact, with a note", f"to its grid [^{number}]"
        if counted and good + noted == len(counted):
            return "exact, with a note", f"exact [^{number}]"
        return ("in part", f"in part [^{number}]") if good + noted else ("no", f"no [^{number}]")

    def rows(self, results: Results) -> Iterator[tuple[str, list[str]]]:
        """(variants, cells): one row for all variants of which the same was found."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, found in results.found.items():
            cells = [self.cell(each, results.examples) for each in found.values()]
            for kind, _ in cells:
                self.counts[kind] += 1
            groups.setdefault(tuple(text for _, text in cells), []).append(name)
        most = max(groups.values(), key=len)
        for cells, names in groups.items():
            others = [name for name in results.found if name not in names]
            if not others:
                said = f"all {len(names)}" if len(names) > 1 else ""
            elif names is most and len(others) < len(names):
                said = f"all but {', '.join(others)}"
            else:
                said = ", ".join(names)
            yield said, list(cells)


INTRO = """# What works with what

Written by `make matrix`, which runs every cell; nothing here is typed. CI runs it again and fails if this page says
something else.

**exact** means, for every example of the layer (each option that changes the arithmetic):

| | |
|---|---|
| forward | in float64, the default path and the materialised one are within 1e-10 of the definition: the module's own forward on gain ⊙ (W + ΔW) |
| gradient | on both paths, of every trained number and every input, within 1e-9 of autograd through the definition |
| merge | the merged outputs are within 1e-10 of the adapted ones; in bfloat16 every merged weight is W + ΔW rounded to the nearest |
| unmerge | in bfloat16, after {cycles} merges and unmerges, every bit of the base is back |
| save/load | on a fresh base, the same trained numbers and the same bits of output |
| mixed batch | rows of one batch that use this adapter, none and another one are within 1e-10 of the rows of whole batches |
| compile | `torch.compile` into one graph, switched between two adapters, is within 1e-10 of eager |
| PEFT round trip | what PEFT loads and computes from our folder, and what we load from the folder that PEFT then writes, within 1e-5 |

"in part" and "no" say why in a footnote, in the words of the exception that was raised. A mixed batch is asked of
examples whose inputs hold rows: the base gives the same outputs when it runs on them one by one.

## Layers × variants
"""


def page(layers: list[Results], storages: list[Results]) -> tuple[str, str]:
    """(the page, its summary)."""
    made = Page()
    lines = [f"| layer | variants | {' | '.join(OPERATIONS)} |", "|---" * (len(OPERATIONS) + 2) + "|"]
    for results in layers:
        for said, cells in made.rows(results):
            lines.append(f"| {results.name} | {said} | {' | '.join(cells)} |")
    cells = sum(made.counts.values())
    said = ", ".join(f"{count} {kind}" for kind, count in made.counts.items())
    summary = f"{len(layers)} layers × {len(VARIANTS.names())} variants × {len(OPERATIONS)} operations = {cells} cells: {said}."
    lines += ["", summary, ""]
    skipped = {
        results.examples[example]: None
        for results in layers
        for found in results.found.values()
        for example, why in found["mixed batch"].items()
        if why is LEFT_OUT
    }
    lines += [f"Examples without rows: {', '.join(f'`{name}`' for name in skipped)}.", ""]
    lines += ["## Storages of a linear layer's weight, with variant `lora`", ""]
    lines += [f"| storage | examples | {' | '.join(STORED)} |", "|---" * (len(STORED) + 2) + "|"]
    made.counts = dict.fromkeys(made.counts, 0)
    for results in storages:
        for _, row in made.rows(results):
            kinds = ", ".join(dict.fromkeys(results.examples.values()))
            lines.append(f"| {results.name} | {len(results.examples)}: {kinds} | {' | '.join(row)} |")
    said = ", ".join(f"{count} {kind}" for kind, count in made.counts.items())
    more = f"{len(storages)} storages × {len(STORED)} operations = {sum(made.counts.values())} cells: {said}."
    lines += ["", more, ""]
    lines += [f"[^{number}]: {text}." for text, number in made.notes.items()]
    return INTRO.format(cycles=CYCLES) + "\n" + "\n".join(lines) + "\n", f"{summary}\n{more}"


def quiet() -> None:
    """One thread, one seed, and nobody who talks in between."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 4096
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", veneer.SkippedLayers)  # an example without an adapter would prove nothing
    logging.disable(logging.WARNING)


def everything(jobs: int) -> tuple[str, str]:
    names = [(of_layer, name) for name in LAYERS.names()] + [(of_storage, name) for name in BASES.names()]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(run_one, name) for run_one, name in names]
        results = [future.result() for future in running]
    return page(results[: len(LAYERS.names())], results[len(LAYERS.names()) :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the committed page says something else")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes at a time")
    arguments = parser.parse_args()
    text, summary = everything(arguments.jobs)
    committed = PAGE.read_text() if PAGE.exists() else ""
    if arguments.check:
        if text == committed:
            print(f"docs/support.md: fresh\n{summary}")
            return 0
        print(
            "\n".join(
                difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "found", lineterm="")
            )
        )
        print("Found: docs/support.md out of date. Expected: what `make matrix` writes. Do: run it and commit.")
        return 1
    PAGE.write_text(text)
    print(f"{text}\n{summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
