"""How adapted linear layers run through the fused kernel: alone, or together with those that read the same input.

    self.q_proj(x), self.k_proj(x), self.v_proj(x)      the first call computes all three, the others take theirs

Only plain changes come here, ΔW = s · B A of all outputs, over a plain weight: what a call needs is known when they are
attached. ``readers.alike`` finds the layers that may be computed together in the code of the module above them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels import fused, plan
from veneer.kernels.dropout import seed as new_seed
from veneer.layers import Layer


@dataclass(frozen=True, eq=False)
class Direct:
    """One plain low-rank change of a layer that is a matrix product.

    Fields:
        change: the ``adapted.Change``; its numbers A and B are read at each call, as they may be replaced.
        weight, bias: the names of the layer's parameters; None for no bias.
        flipped: the weight lies transposed, [in, out].
        forms_above: the number of tokens above which W + ΔW is formed (``plan.forms_above``).
    """

    change: Any
    weight: str
    bias: str | None
    flipped: bool
    forms_above: float

    def fits(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the layer may be computed on x before its own call."""
        weight: Any = module._parameters[self.weight]
        return fused.applies(x, weight) and not module._forward_pre_hooks


def direct(change: Any, module: nn.Module, layer: Layer) -> Direct:
    """What is known of a change of ``module`` before a call."""
    weight: Any = module._parameters[layer.weight]
    bias = "bias" if module._parameters.get("bias") is not None else None
    _, out, in_ = change.dims
    forms = plan.forms_above(out, in_, change.rank, weight.dtype)
    return Direct(change, layer.weight, bias, layer.out_axis == 1, forms)


def outputs(members: Sequence[tuple[nn.Module, Direct]], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same x [*, in]."""
    weights, biases, A, B = [], [], [], []
    for module, known in members:
        weight: Any = module._parameters[known.weight]
        weights.append(weight.mT if known.flipped else weight)
        biases.append(None if known.bias is None else module._parameters[known.bias])
        A.append(known.change._parameters["A"][0])
        B.append(known.change._parameters["B"][0])
    change, tokens = members[0][1].change, x.numel() // x.shape[-1]
    dropout = change.dropout if change.training else 0.0
    seed = new_seed() if dropout else 0
    form = not dropout and x.dtype.itemsize >= 4 and all(tokens > known.forms_above for _, known in members)
    scales = tuple(known.change.scale for _, known in members)
    return fused.linears(fused.Settings(scales, dropout, seed, form), x, weights, biases, A, B)


class Together:
    """Layers of one module that read the same input: the first one that is called computes all of them at once, the
    others then take what is theirs.

    ``members`` are (module, its part of the adapter) in the order of their calls. Whether x is the same is seen at each
    call: by identity, and by its version, as it may have been written to. A thread keeps the outputs of one group: what
    an exception has left there goes with the next one.
    """

    def __init__(self, members: list[tuple[nn.Module, Any]]) -> None:
        self.members = members
        self.missed = 0

    def output(self, module: nn.Module, part: Any, x: Tensor) -> Tensor:
        """The output of ``module``, whose part this is, of x [*, in]."""
        now = (self, 0 if x.is_inference() else x._version, torch.is_grad_enabled())
        known, held, ready = getattr(_THREAD, "ready", (None, None, {}))
        if held is x and known == now and id(part) in ready:
            y = ready.pop(id(part))
            if not ready:
                del _THREAD.ready
            return y
        first = part is self.members[0][1]
        self.missed += not first
        # Something comes between them, such as a hook that changes x: then nothing is computed in advance any more. Not
        # within backward, where a layer that runs again must save what it saved before.
        if not first or (self.missed > 2 and torch._C._current_graph_task_id() == -1):
            return outputs([(module, part.direct)], x)[0]
        others = [(other, own) for other, own in self.members[1:] if own.direct.fits(other, x)]
        y, *rest = outputs([(module, part.direct), *((other, own.direct) for other, own in others)], x)
        if rest:
            _THREAD.ready = now, x, {id(own): y for (_, own), y in zip(others, rest, strict=True)}
        return y


_THREAD = threading.local()
