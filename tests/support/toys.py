"""A variant and a layer kind as a user would add them. Tests find them through the registries, like
Veneer's own. Also helpers that many tests use."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import veneer
from veneer.layers import LAYERS, Layer
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS
from veneer.variants.lora import LORA


def _init(start):
    return {**LORA.init(start), "gain": torch.ones(start.groups * start.out)}


def _resolve(parameters, scale, base):
    assert base().shape[0] == parameters["A"].shape[0]  # a variant may ask for the frozen weight
    return LowRank(parameters["A"], parameters["B"], scale), parameters["gain"]


#: a variant that rescales every output row by the ``gain`` of the equation
SCALED = replace(LORA, name="toy_scaled", init=_init, resolve=_resolve, peft=None)


class Squared(nn.Linear):
    """A linear layer with its own forward, which is not linear in the weight."""

    def forward(self, input):
        return F.linear(input, self.weight * self.weight.abs(), self.bias)


class Diagonal(nn.Module):
    """A layer of a kind that Veneer lacks: y is the product of x with each row of a table."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, width))

    def forward(self, x):
        return (x[..., None, :] * self.table).sum(-1)


class DiagonalKind(Layer):
    """The layer kind that CONTRIBUTING.md shows as an example."""

    name = "toy_diagonal"
    weight = "table"

    def types(self):
        return (Diagonal,)

    def op(self, module, x, weight, bias):
        return (x[..., None, :] * weight).sum(-1)

    def update(self, module, x, low, y):
        change = F.linear(F.linear(x, low.A[0]), low.B[0] * low.scale)
        return change if y is None else y + change

    def examples(self):
        yield Diagonal(5, 7), torch.randn(3, 7)


def register_toys() -> None:
    if SCALED.name not in VARIANTS.names():
        VARIANTS.add(SCALED.name, SCALED)
        LAYERS.add(DiagonalKind.name, DiagonalKind())


def randomise(handle, size: float = 0.3) -> None:
    """Give every trained value of an adapter a random number, because zeros could hide errors."""
    around_one = ("gain", "magnitude")
    for change in handle.changes.values():
        for name, parameter in change.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64) * size
            parameter.data.copy_(
                noise + (parameter.detach().cpu().double() if name in around_one else 0)
            )
    for layer_state in handle.layers.values():
        for parameter in layer_state.full.parameters():
            parameter.data.add_(torch.randn_like(parameter) * size)


#: a config that targets all weights, with a scale other than 1
ALL = veneer.LoraConfig(rank=2, targets="all", alpha=3)


def adapt(model, *names, config=ALL, size=0.3):
    """Attach random adapters of these names to ``model``, and return it."""
    for name in names:
        randomise(veneer.attach(model, config, name), size)
    return model


def example(kind, number=0, dtype=torch.float32):
    """(a layer of this kind in eval mode, the arguments of a call)."""
    torch.manual_seed(number)
    module, args = list(LAYERS[kind].examples())[number]
    return module.to(dtype).eval(), cast(args if isinstance(args, tuple) else (args,), dtype)


def numbers(model, name="a"):
    """Copies of the parameters of an adapter, by their keys in the model's state dict."""
    key_parts = {"veneer", name}
    matches = {
        key: p.detach().clone()
        for key, p in model.named_parameters()
        if key_parts <= set(key.split("."))
    }
    assert matches
    return matches


def selected(model, name, *args):
    """The output of a model with this adapter, without gradients."""
    with veneer.use(model, name), torch.no_grad():
        return model(*args)


def definition(module, values, args):
    """The output of a module's forward with other parameters or buffers, ``values`` by path. Every
    path of an adapted call must equal it."""
    module_copy = copy.deepcopy(module)
    for path, value in values.items():
        module_path, _, name = path.rpartition(".")
        holder = module_copy.get_submodule(module_path)
        table = holder._parameters if name in holder._parameters else holder._buffers
        table[name] = value
    if getattr(module_copy, "sparse", False):
        module_copy.sparse = (
            False  # torch cannot propagate a sparse gradient through a computed weight
        )
    if isinstance(module_copy, nn.RNNBase):
        module_copy._flat_weights = [
            module_copy._parameters[name] for name in module_copy._flat_weights_names
        ]
    return module_copy(*args)


def flat(output):
    """All floating-point tensors of a nested output, flattened into one vector."""
    leaves = [
        leaf.data if isinstance(leaf, PackedSequence) else leaf
        for leaf in pytree.tree_leaves(output)
    ]
    return torch.cat(
        [
            leaf.reshape(-1)
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        ]
    )


def cast(args, dtype):
    """Arguments with their floating-point tensors in another dtype."""

    def convert_leaf(leaf):
        if isinstance(leaf, PackedSequence):
            return leaf.to(dtype)
        return (
            leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
        )

    return pytree.tree_map(convert_leaf, args)


def error(actual, expected) -> float:
    """Relative error in the Frobenius norm, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def calibration(model, variant, args=(), loss=None) -> dict:
    """The arguments of ``attach`` that ``variant`` needs to start on ``model``. ``args``: the
    arguments of a call of the model."""
    needs, calibration = VARIANTS[variant].needs, {}
    if needs & {"inputs", "gradient"}:
        calibration["batches"] = [args]
    if "gradient" in needs:
        calibration["loss"] = loss or (
            lambda model, batch: flat(model(*batch)).float().square().sum()
        )
    if "original" in needs:
        state = {
            path: value for path, value in model.state_dict().items() if value.is_floating_point()
        }
        calibration["original"] = {
            path: value + 0.1 * torch.randn_like(value) for path, value in state.items()
        }
    return calibration


def bits(model) -> dict:
    """Copies of the base's tensors in a model's state dict, by key."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "veneer" not in name.split(".")
    }


def works(handle, *args, within=1e-5) -> None:
    """Assert what holds for every adapter: it changes the output, merged weights give the same
    output, and unmerging and detaching restore the base bit by bit."""
    model, before = handle.model.eval(), bits(handle.model)
    with torch.no_grad():
        forward = flat(model(*args))
        with veneer.use(model, None):
            base = flat(model(*args))
        assert error(forward, base) > 1e-3
        handle.merge()
        assert error(flat(model(*args)), forward) < within
        handle.unmerge()
        assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
        assert torch.equal(flat(model(*args)), forward)
        handle.detach()
        assert (
            error(flat(model(*args)), base) < 1e-6
        )  # another kernel may run if no gradient is needed
