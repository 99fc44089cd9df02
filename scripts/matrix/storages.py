"""The second table of the matrix: linear layers in each storage, with the variant "lora"."""

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
    """One example of a storage: a linear layer without (``base``) and with (``model``) an adapter,
    whose change has a tenth of the norm of the weight."""

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


def create_case(storage: Storage, module: nn.Module, base_module: nn.Module) -> Stored:
    base, model = Side({"m0": base_module.eval()}), Side({"m0": module.eval()})
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


#: limit of the relative error of a library's outputs; one that rounds its inputs to 8 bits has an
#: error of 0.6 %
LIBRARY = 1e-2
#: verdict if the library rounds {}, which the base computes
ROUNDS = f"{NOTE}the library's own rounding of {{}}, which is there without an adapter too"
#: limits of relative errors of outputs; gradients may have twice these
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def stored_forward(case: Stored) -> str:
    """Check the outputs of the default path, which adds ΔW x to the output of the base, and of the
    materialised path, which is the definition."""
    (change,) = case.handle.changes.values()
    numbers = {name: number.double() for name, number in change.named_parameters()}
    with torch.no_grad():
        base_truth, changed = stored_truth(case, case.x.double(), numbers, change.scale)
        with veneer.use(case.model, None):
            base = case()
        adapted = case()
        with context.override(path="materialised"):
            materialised = case()
    bound = BOUNDS[adapted.dtype]
    if not (
        error(adapted, base.double() + changed - base_truth) <= bound
        and error(materialised, changed) <= bound
    ):
        return "differs from the definition"
    if not error(base, base_truth) <= max(bound, LIBRARY):
        return "the weight that is read is not the one that the library uses"
    return EXACT if error(base, base_truth) <= bound else ROUNDS.format("y")


def stored_gradient(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    parameters = dict(change.named_parameters())
    x, x64 = case.x.clone().requires_grad_(), case.x.double().requires_grad_()
    numbers = {
        name: number.detach().double().requires_grad_() for name, number in parameters.items()
    }
    _, expected = stored_truth(case, x64, numbers, change.scale)
    weights = torch.randn_like(expected)
    truth = torch.autograd.grad((expected * weights).sum(), [*numbers.values(), x64])

    def gradients(path: str | None) -> tuple[Tensor, ...]:
        with context.override(path=path):
            y = case(x)
            return torch.autograd.grad(y, [*parameters.values(), x], weights.to(y.dtype))

    def different_names(gradients: tuple[Tensor, ...]) -> list[str]:
        return [
            name
            for name, a, b in zip((*parameters, "x"), gradients, truth, strict=True)
            if not error(a, b) <= bound
        ]

    default_gradients, bound = gradients(None), 2 * BOUNDS[case.x.dtype]
    wrong_names = different_names(gradients("materialised")) or different_names(default_gradients)
    if wrong_names == ["x"]:
        with veneer.use(case.model, None):
            (base_gradient,) = torch.autograd.grad((case(x) * weights.to(x.dtype)).sum(), x)
        change_gradient = weights @ (change.scale * product(change))
        if (
            error(default_gradients[-1], base_gradient.double() + change_gradient) <= bound
            and error(default_gradients[-1], truth[-1]) <= LIBRARY
        ):
            return ROUNDS.format("the gradient of x")
    return f"differs for {', '.join(wrong_names)}" if wrong_names else EXACT


#: begins the verdict on a merge whose result is rounded to the coarser grid of the storage
GRID = "rounded to the numbers that the storage can hold, which keeps "


def stored_merge(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    before = case.storage.dense(case.weight).detach().double().clone()
    delta = change.layer.fold(change.scale * product(change)[None], before.shape)
    exact = before + delta
    report = case.handle.merge(rounding="nearest")
    merged = case.storage.dense(case.weight).detach().clone()
    case.handle.unmerge()
    if merged.dtype in (torch.bfloat16, torch.float16):
        is_exact = not wrong_roundings(merged, exact)
    else:
        is_exact = not error(merged, exact.to(merged.dtype)) > ONE_ROUNDING
    if is_exact:
        return EXACT
    retention = (((merged.double() - before) * delta).sum() / delta.square().sum()).item()
    if not abs(retention - report.retention) < 1e-6:
        return "keeps another share of the change than the merge says"
    if not error(merged, exact) < error(before, exact):
        return "no nearer to W + ΔW than before"
    far_count = count_far(merged.double(), exact)
    if (
        far_count > 0.01 * exact.numel()
    ):  # a block may stay unchanged if this is nearer than its new grid
        return f"{far_count} weights are not rounded to the nearest"
    percent = 10 * round(10 * retention)  # coarse, so that all machines give the same text
    return f"{GRID}about {percent}% of a change a tenth as large as the weight"


#: rarely, a sum in another order rounds a float64 product differently
ONE_ROUNDING = 1e-9


def count_far(merged: Tensor, exact: Tensor) -> int:
    """How many merged numbers are not the nearest on their grid. The known points of the grid of a
    block are those of its other numbers; 16 numbers in a row are in one block in every storage."""
    rounded, targets = merged.reshape(-1, 16), exact.reshape(-1, 16)
    nearest = (rounded[:, None, :] - targets[:, :, None]).abs().amin(2)
    slack = 0.002 * rounded.abs().amax(1, keepdim=True)  # a rounded scale shifts the grid
    return int(((rounded - targets).abs() > nearest + slack).sum())


def stored_unmerge(case: Stored) -> str:
    def snapshot() -> dict[str, Tensor]:
        """The stored tensors of the weight, its dense value, and the inputs of its computation."""
        computed = case.weight.state_dict() if isinstance(case.weight, nn.Module) else {}
        tensors = {
            **case.storage.stored_tensors(case.weight),
            **computed,
            "dense": case.storage.dense(case.weight),
        }
        return {name: value.detach().clone() for name, value in tensors.items()}

    is_restored, is_changed = True, True
    with torch.no_grad():
        before, y = snapshot(), case()
        for _ in range(3):
            case.handle.merge()
            merged = snapshot()
            case()
            case.handle.unmerge()
            after = snapshot()
            is_changed &= not torch.equal(merged["dense"], before["dense"])
            is_restored &= before.keys() == after.keys() and all(
                torch.equal(after[name], before[name]) for name in before
            )
            is_restored &= torch.equal(case(), y)
    return "the merge changed nothing" if not is_changed else EXACT if is_restored else "other bits"


def stored_save(case: Stored) -> str:
    (change,) = case.handle.changes.values()
    change.scale = change.variant.scale(
        change.alpha, change.rank
    )  # a file stores alpha instead of the scale
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        case.handle.save(f"{folder}/adapter")
        loaded_model = case.base
        handle = veneer.load(loaded_model, f"{folder}/adapter")
        saved_tensors, loaded_tensors = numbers_of(case.handle), numbers_of(handle)
        same_tensors = saved_tensors.keys() == loaded_tensors.keys() and all(
            torch.equal(saved_tensors[name], loaded_tensors[name]) for name in saved_tensors
        )
        same_outputs = torch.equal(case(), loaded_model({"m0": (case.x,)})["m0"])
    if same_tensors and same_outputs:
        return EXACT
    return "other outputs" if same_tensors else "other trained numbers"


STORED: dict[str, Callable[[Stored], str]] = {
    "forward": stored_forward,
    "gradient": stored_gradient,
    "merge": stored_merge,
    "unmerge": stored_unmerge,
    "save/load": stored_save,
}


def of_storage(name: str, operations: Sequence[str] = tuple(STORED)) -> Results:
    """The results of ``operations`` on every example of one storage."""
    quiet()
    storage = BASES[name]
    results = Results(name, {name: {operation: {} for operation in operations}}, {})
    torch.manual_seed(0)
    base_modules = list(storage.examples())  # built twice, because some storages cannot be copied
    torch.manual_seed(0)
    for number, module in enumerate(list(storage.examples())):
        example = f"m{number}"
        torch.manual_seed(number)
        results.examples[example] = storage_label(storage, weight_of(module, "weight"))
        case = create_case(storage, module, base_modules[number])
        for operation in operations:
            try:
                verdict = STORED[operation](case)
            except Exception as failed:
                verdict = reason(failed)
            results.verdicts[name][operation][example] = verdict
    return results


def storage_label(storage: Storage, weight: Any) -> str:
    """A short description of a stored weight: the type of its packing, and its dtype if this is not
    float32."""
    if isinstance(weight, ParametrizationList):
        words = [" ∘ ".join(type(step).__name__.strip("_") for step in reversed(list(weight)))]
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
