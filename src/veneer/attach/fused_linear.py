"""How adapted linear layers run through the fused kernel: alone, or together with those that read
the same input.

    self.q_proj(x), self.k_proj(x), self.v_proj(x)      the first call computes all three, the others take theirs

Only plain changes come here, ΔW = s · B A of all outputs, over a plain weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels import cost_model, device, fused
from veneer.kernels.dropout import seed as new_seed
from veneer.layers import Layer


@dataclass(frozen=True, eq=False)
class Direct:
    """One plain low-rank change of a layer that is a matrix product.

    Fields:
        change: the ``Change``; its A and B are read at each call, as they may be replaced.
        weight, bias: the names of the layer's parameters; None where it cannot have a bias.
        flipped: the weight lies transposed, [in, out].
        forms_above: the number of tokens above which W + ΔW is formed (``plan.forms_above``).
    """

    change: Any
    weight: str
    bias: str | None
    flipped: bool
    forms_above: float

    @property
    def drops(self) -> float:
        """The dropout of a call now."""
        return self.change.dropout if self.change.training else 0.0

    def fits(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the layer may be computed on x before its own call: no hook of it gives it
        another x."""
        weight: Any = module._parameters[self.weight]
        hooks = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        return not hooks and (fused.applies(x, weight) or device.applies(x, weight))

    def frozen(self, module: nn.Module) -> tuple[Any, Any]:
        """The layer's weight [out, in] and its bias, if it has one."""
        own = module._parameters
        weight: Any = own[self.weight]
        return weight.mT if self.flipped else weight, None if self.bias is None else own[self.bias]

    def reads(self, module: nn.Module) -> tuple[Any, ...]:
        """What the layer's output depends on besides x, to be compared."""
        factors, own = self.change._parameters, module._parameters
        tensors = (
            own[self.weight],
            own[self.bias] if self.bias else None,
            factors["A"],
            factors["B"],
        )
        return self.drops, self.change.scale, *identities(tensors)


def identities(tensors: Iterable[Tensor | None]) -> Iterator[tuple[int, int]]:
    """Of each tensor, what changes where another takes its place or its numbers change."""
    return ((id(one), one._version) for one in tensors if one is not None)


class Waiting(threading.local):
    """What the call of one layer has made for others that read the same x; in each thread, of one x
    at a time: what an exception has left there goes with the next one."""

    def __init__(self) -> None:
        self._of: tuple[Any, int, dict[Any, Any]] = None, 0, {}

    def put(self, x: Tensor, made: dict[Any, Any]) -> None:
        self._of = x, x._version, made

    def take(self, x: Tensor, key: Any) -> Any:
        """What was made for ``key`` of this x, as it is; None if nothing was. It is given once."""
        known, version, made = self._of
        if known is not x or version != x._version or key not in made:
            return None
        found = made.pop(key)
        if not made:
            self._of = None, 0, {}
        return found


def direct(change: Any, module: nn.Module, layer: Layer) -> Direct:
    """What is known of a change of ``module`` before a call."""
    weight: Any = module._parameters[layer.weight]
    bias = "bias" if "bias" in module._parameters else None
    _, out, in_ = change.dims
    forms = cost_model.forms_above(out, in_, change.rank, weight.dtype)
    return Direct(change, layer.weight, bias, layer.out_axis == 1, forms)


def outputs(
    members: Sequence[tuple[nn.Module, Direct]], x: Tensor, seed: int | None = None
) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same x [*, in]. ``seed``: of their one draw of dropout;
    None draws it."""
    weights, biases, A, B = [], [], [], []
    here = x.is_cpu
    for module, known in members:
        weight, bias = known.frozen(module)
        weights.append(weight)
        biases.append(bias)
        factors = known.change._parameters if here else known.change.adapter_parameters
        A.append(factors["A"])
        B.append(factors["B"])
    dropout = members[0][1].drops
    if not dropout:
        seed = 0
    elif seed is None:
        seed = new_seed()
    scales = tuple(known.change.scale for _, known in members)
    if not here:
        return device.linears(scales, x, weights, biases, A, B, None, dropout, seed)
    tokens = x.numel() // x.shape[-1]
    form = (
        not dropout
        and x.dtype.itemsize >= 4
        and all(tokens > known.forms_above for _, known in members)
    )
    return fused.linears(fused.Settings(scales, dropout, seed, form), x, weights, biases, A, B)


class Together:
    """Layers of one module that read the same input: the first one that is called computes all of
    them at once, the others then take what is theirs.

    That is one node in the graph, so it is for an x that has a graph itself: ``backward`` through
    one output frees what lies below x, and so could not be called through the others later either.
    With dropout it is for every x that may be seen again in such a graph: the draw is one for all,
    and checkpointing must meet the same draw without a graph.

    ``members`` are (module, its part of the adapter) in the order of their calls. Whether an output
    is still that of its layer is seen when it is taken: by the identities and versions of all that
    it was computed from.
    """

    def __init__(self, members: list[tuple[nn.Module, Any]]) -> None:
        self.members = members

    @staticmethod
    def applies(known: Direct, x: Tensor) -> bool:
        if torch.is_grad_enabled():
            return x.grad_fn is not None or (x.requires_grad and known.drops > 0)
        return known.drops > 0 and not x.is_inference()  # whose version nobody counts

    def output(self, module: nn.Module, part: Any, x: Tensor) -> Tensor:
        """The output of ``module``, whose part this is, of x [*, in] to which this applies."""
        ready = _READY.take(x, id(part))
        if ready is not None:
            y, read = ready
            if read == part.direct.reads(module) and (x.is_cpu or y.dtype == device.dtype_of(x)):
                return y
        known = part.direct
        if part is not self.members[0][1] or not known.fits(module, x):
            return outputs([(module, known)], x)[0]
        others = [
            (other, own.direct) for other, own in self.members[1:] if own.direct.fits(other, x)
        ]
        others = [(other, own) for other, own in others if own.drops == known.drops]
        y, *rest = outputs([(module, known), *others], x)
        if rest:
            parts = {id(own.direct): id(own) for _, own in self.members}
            _READY.put(
                x,
                {
                    parts[id(own)]: (y, own.reads(other))
                    for (other, own), y in zip(others, rest, strict=True)
                },
            )
        return y

    def seed(self, module: nn.Module, part: Any, x: Tensor) -> int:
        """That of the draw of ``module`` on x where its output is computed apart: with the draws of
        ``output``, one for all members that read this x. Those of several adapters wait at once,
        where rows of each are in x."""
        shared_input, version, seeds = getattr(_THREAD, "seeds", (None, 0, {}))
        if shared_input is not x or version != x._version:
            seeds = {}
        seed = seeds.pop(id(part), None)
        if seed is None:
            known, seed = part.direct, new_seed()
            if part is self.members[0][1] and known.fits(module, x):
                others = [own for other, own in self.members[1:] if own.direct.fits(other, x)]
                seeds |= {id(own): seed for own in others if own.direct.drops == known.drops}
        _THREAD.seeds = (x, x._version, seeds) if seeds else (None, 0, {})
        return seed


def seed_of(module: nn.Module, part: Any, x: Tensor) -> int:
    """The seed of the dropout of a part that is direct, on x."""
    return (
        new_seed()
        if part.together is None or x.is_inference()
        else part.together.seed(module, part, x)
    )


_READY, _THREAD = Waiting(), threading.local()
