"""The second table: linear layers whose weight is stored in another way, with variant "lora"."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tests.support.toys import error, randomise
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

import veneer
from veneer import context
from veneer.bases import BASES, Storage, weight_of

from .cases import EXACT, NOTE, Results, Side, quiet, reason
from .operations import numbers_of, wrong_roundings


@dataclass
class Stored:
    """One example of a storage: a linear layer without and with an adapter whose change is a tenth
    of its weight."""

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


def create_case(storage: Storage, module: nn.Module, again: nn.Module) -> Stored:
    base, model = Side({"m0": again.eval()}), Side({"m0": module.eval()})
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, alpha=2, targets="all"))
    randomise(handle)
    (change,) = handle.changes.values()
    weight = weight_of(model.get_submodule("m0"), "weight")
    change.scale = (0.1 * storage.dense(weight).double().norm() / product(change).norm()).item()
    bias: Any = module.bias
    return Stored(storage, base, model, handle, torch.randn(5, change.dims.in_, dtype=bias.dtype))


def product(change: Any) -> Tensor:
    """B A in float64."""
    return change.B.detach()[0].double() @ change.A.detach()[0].double()


def stored_truth(
    case: Stored, x: Tensor, numbers: Mapping[str, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """(W x, (W + ΔW) x), both with the bias, in float64."""
    W, bias = case.storage.dense(case.weight).detach().double(), case.linear.bias.detach().double()
    return F.linear(x, W, bias), F.linear(x, W + scale * numbers["B"][0] @ numbers["A"][0], bias)


# : of what a library computes from the weight that it stores: one that rounds its inputs to 8 bits
# is off by 0.6 %
LIBRARY = 1e-2
#: {} is computed from the base too, which the library rounds
ROUNDS = f"{NOTE}the library's own rounding of {{}}, which is there without an adapter too"
#: relative errors of outputs; of gradients twice these
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def stored_forward(case: Stored) -> str:
    """The default path adds ΔW x to what the base computes; the materialised one is the
    definition."""
    (change,) = case.handle.changes.values()
    numbers = {name: number.double() for name, number in change.named_parameters()}
    with torch.no_grad():
        plain, changed = stored_truth(case, case.x.double(), numbers, change.scale)
        with veneer.use(case.model, None):
            base = case()
        adapted = case()
        with context.override(path="materialised"):
            materialised = case()
    bound = BOUNDS[adapted.dtype]
    if not (
        error(adapted, base.double() + changed - plain) <= bound
        and error(materialised, changed) <= bound
    ):
        return "differs from the definition"
    if not error(base, plain) <= max(bound, LIBRARY):
        return "the weight that is read is not the one that the library uses"
    return EXACT if error(base, plain) <= bound else ROUNDS.format("y")


def stored_gradient(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    parameters = dict(change.named_parameters())
    x, x64 = case.x.clone().requires_grad_(), case.x.double().requires_grad_()
    numbers = {
        name: number.detach().double().requires_grad_() for name, number in parameters.items()
    }
    _, wanted = stored_truth(case, x64, numbers, change.scale)
    weights = torch.randn_like(wanted)
    truth = torch.autograd.grad((wanted * weights).sum(), [*numbers.values(), x64])

    def gradients(path: str | None) -> tuple[Tensor, ...]:
        with context.override(path=path):
            y = case(x)
            return torch.autograd.grad(y, [*parameters.values(), x], weights.to(y.dtype))

    def differ(gradients: tuple[Tensor, ...]) -> list[str]:
        return [
            name
            for name, a, b in zip((*parameters, "x"), gradients, truth, strict=True)
            if not error(a, b) <= bound
        ]

    default_gradients, bound = gradients(None), 2 * BOUNDS[case.x.dtype]
    wrong = differ(gradients("materialised")) or differ(default_gradients)
    if wrong == ["x"]:
        with veneer.use(case.model, None):
            (plain,) = torch.autograd.grad((case(x) * weights.to(x.dtype)).sum(), x)
        share = weights @ (change.scale * product(change))
        if (
            error(default_gradients[-1], plain.double() + share) <= bound
            and error(default_gradients[-1], truth[-1]) <= LIBRARY
        ):
            return ROUNDS.format("the gradient of x")
    return f"differs for {', '.join(wrong)}" if wrong else EXACT


#: begins what is said of a merge whose result lies on the storage's own, coarser grid
GRID = "rounded to the numbers that the storage can hold, which keeps "


def stored_merge(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    before = case.storage.dense(case.weight).detach().double().clone()
    moved = change.layer.fold(change.scale * product(change)[None], before.shape)
    exact = before + moved
    report = case.handle.merge(rounding="nearest")
    merged = case.storage.dense(case.weight).detach().clone()
    case.handle.unmerge()
    if merged.dtype in (torch.bfloat16, torch.float16):
        rounded = not wrong_roundings(merged, exact)
    else:
        rounded = not error(merged, exact.to(merged.dtype)) > ONE_ROUNDING
    if rounded:
        return EXACT
    retention = (((merged.double() - before) * moved).sum() / moved.square().sum()).item()
    if not abs(retention - report.retention) < 1e-6:
        return "keeps another share of the change than the merge says"
    if not error(merged, exact) < error(before, exact):
        return "no nearer to W + ΔW than before"
    far = farther(merged.double(), exact)
    if (
        far > 0.01 * exact.numel()
    ):  # a block may stay as it was, where that is nearer than a grid of its own
        return f"{far} weights are not rounded to the nearest"
    percent = 10 * round(10 * retention)  # coarse, so that no other machine rounds it otherwise
    return f"{GRID}about {percent}% of a change a tenth as large as the weight"


#: float64 products that are summed in another order may round otherwise, once in a long while
ONE_ROUNDING = 1e-9


def farther(merged: Tensor, exact: Tensor) -> int:
    """How many numbers have a nearer one on their own grid. Of the grid that a block shares those
    points are known that its other numbers lie on; 16 in a row are in one block of every
    storage."""
    rounded, targets = merged.reshape(-1, 16), exact.reshape(-1, 16)
    nearest = (rounded[:, None, :] - targets[:, :, None]).abs().amin(2)
    slack = 0.002 * rounded.abs().amax(
        1, keepdim=True
    )  # a scale that is rounded itself moves the grid
    return int(((rounded - targets).abs() > nearest + slack).sum())


def stored_unmerge(case: Stored) -> str:
    def snapshot() -> dict[str, Tensor]:
        """The weight as it is stored, as it is read, and what it is computed from."""
        computed = case.weight.state_dict() if isinstance(case.weight, nn.Module) else {}
        tensors = {
            **case.storage.stored_tensors(case.weight),
            **computed,
            "dense": case.storage.dense(case.weight),
        }
        return {name: value.detach().clone() for name, value in tensors.items()}

    same, moved = True, True
    with torch.no_grad():
        before, y = snapshot(), case()
        for _ in range(3):
            case.handle.merge()
            merged = snapshot()
            case()
            case.handle.unmerge()
            after = snapshot()
            moved &= not torch.equal(merged["dense"], before["dense"])
            same &= before.keys() == after.keys() and all(
                torch.equal(after[name], before[name]) for name in before
            )
            same &= torch.equal(case(), y)
    return "the merge changed nothing" if not moved else EXACT if same else "other bits"


def stored_save(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    change.scale = change.variant.scale(
        change.alpha, change.rank
    )  # a file holds alpha, not a scale
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        case.handle.save(f"{folder}/adapter")
        fresh = case.base
        handle = veneer.load(fresh, f"{folder}/adapter")
        mine, theirs = numbers_of(case.handle), numbers_of(handle)
        same = mine.keys() == theirs.keys() and all(
            torch.equal(mine[name], theirs[name]) for name in mine
        )
        equal = torch.equal(case(), fresh({"m0": (case.x,)})["m0"])
    return EXACT if same and equal else "other outputs" if same else "other trained numbers"


STORED: dict[str, Callable[[Stored], str]] = {
    "forward": stored_forward,
    "gradient": stored_gradient,
    "merge": stored_merge,
    "unmerge": stored_unmerge,
    "save/load": stored_save,
}


def of_storage(name: str, operations: Sequence[str] = tuple(STORED)) -> Results:
    """Every operation on every example of one storage, or some of them."""
    quiet()
    storage = BASES[name]
    results = Results(name, {name: {operation: {} for operation in operations}}, {})
    torch.manual_seed(0)
    fresh = list(storage.examples())  # the same again, as not every storage can be copied
    torch.manual_seed(0)
    for number, module in enumerate(list(storage.examples())):
        example = f"m{number}"
        torch.manual_seed(number)
        results.examples[example] = storage_label(storage, weight_of(module, "weight"))
        case = create_case(storage, module, fresh[number])
        for operation in operations:
            try:
                verdict = STORED[operation](case)
            except Exception as failed:
                verdict = reason(failed)
            results.verdicts[name][operation][example] = verdict
    return results


def storage_label(storage: Storage, weight: Any) -> str:
    """A stored weight in a few words: the type of its packing, and its dtype if that is not
    float32."""
    if isinstance(weight, ParametrizationList):
        words = [" ∘ ".join(type(each).__name__.strip("_") for each in reversed(list(weight)))]
    elif storage.name == "plain":
        words = []
    else:
        packing = getattr(weight, "quant_type", None) or type(weight).__name__
        nested = getattr(getattr(weight, "quant_state", None), "nested", False)
        words = [getattr(packing, "name", packing), *(["nested"] if nested else [])]
    dtype = storage.dtype(weight)
    return " ".join(
        words + ([str(dtype).removeprefix("torch.")] if dtype != torch.float32 or not words else [])
    )
