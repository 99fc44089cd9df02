"""Cross-entropy over rows of logits that come a chunk at a time, each differentiated as soon as it
is known.

    for each chunk:  logits [1, c, v]  →  Σ -log p,  ∂/∂rows [c, h],  ∂/∂(the head's parameters)

The sum of the chunks is then a scalar whose gradients are known: no logits and no graph of the head
are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.attach.dtypes import at_least_float32
from veneer.errors import sentence

#: a share of the softmax whose logarithm is exact in float32
TINY = 1e-30


class ChunkedCrossEntropy:
    """Sums over the chunks: of the loss, of its gradients, of the right answers. ``like``: logits
    [1, c, v] of the largest chunk, for the shape, dtype and device of the sums. ``accuracy``:
    whether right answers are counted."""

    def __init__(self, like: Tensor, accuracy: bool) -> None:
        self.accuracy = accuracy
        self.total = like.new_zeros((), dtype=at_least_float32(like.dtype))
        self.correct = like.new_zeros((), dtype=torch.long)
        self.told: list[Tensor] = []
        self.right: list[Tensor] = []  # of each label, as `accuracy` asks for
        self.rows: list[Tensor] = []
        self.gradients: dict[Tensor, Tensor] = {}  # by the head's own parameters
        # of all chunks: fresh memory for each would cost more than the exponentials that are
        # written to it
        self.shares = like.new_empty(like.shape[-2:], dtype=self.total.dtype)
        self.wide = None if like.dtype == self.shares.dtype else torch.empty_like(self.shares)

    def add(self, leaf: Tensor, logits: Tensor, answers: Tensor) -> None:
        """One chunk: rows [c, h] without a graph, their logits [1, c, v], what these should say
        [c]."""
        answers = answers.to(logits.device)[:, None]
        wide = logits.detach()[0]
        if self.wide is not None:
            wide = self.wide[: len(wide)].copy_(wide)
        shares = self.shares[: len(wide)]
        chosen, told = _shares(wide, answers, shares)
        if self.accuracy:
            right = (shares.argmax(dim=-1, keepdim=True) == answers).squeeze(1)
            self.correct += right.sum()
            self.right.append(right)
        self.total -= told.sum()
        self.told.append(told)
        if not logits.requires_grad:
            return
        gradient = shares.scatter_(1, answers, chosen - 1)  # softmax - onehot
        parameters = [parameter for parameter in _leaves(logits) if parameter is not leaf]
        wanted = [leaf, *parameters] if leaf.requires_grad else parameters
        with torch.autocast(logits.device.type, enabled=False):
            gradients = list(torch.autograd.grad(logits, wanted, gradient.to(logits.dtype)[None]))
        if leaf.requires_grad:
            self.rows.append(gradients.pop(0))
        for parameter, chunk in zip(parameters, gradients, strict=True):
            if parameter in self.gradients:
                self.gradients[parameter] += chunk
            else:  # rounded to 16 bits once, after the last chunk
                self.gradients[parameter] = chunk.to(at_least_float32(chunk.dtype))

    def differentiable(self, rows: Tensor) -> Tensor:
        """The total, as a function of all rows and of the head's own parameters."""
        known = {rows: torch.cat(self.rows)} if self.rows else {}
        known |= {
            parameter: gradient.to(parameter.dtype)
            for parameter, gradient in self.gradients.items()
        }
        return (
            _KnownGradients.apply(self.total, list(known.values()), *known) if known else self.total
        )  # pyright: ignore[reportReturnType]

    def label_losses(self, rows: Tensor) -> Tensor:
        """The loss of each label [n], as a function of the rows [n, h] alone: the head has nothing
        that trains."""
        if self.gradients:
            problem = (
                "the losses of each label of a head that trains, whose gradient is known of"
                " their sum"
            )
            raise NotImplementedError(
                sentence(problem, "a frozen head", "use token_loss or log_probabilities")
            )
        losses = -torch.cat(self.told).squeeze(1)
        return _KnownRows.apply(losses, torch.cat(self.rows), rows) if self.rows else losses  # pyright: ignore[reportReturnType]


class _KnownRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradients: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _once()
        (known,) = ctx.saved_tensors
        return None, None, known * upstream.to(known.device, known.dtype)[:, None]


def _once() -> None:
    if torch.is_grad_enabled():  # the known gradients would silently pass for constants
        problem = "create_graph=True through token_loss, which keeps no graph of the head"
        raise NotImplementedError(
            sentence(problem, "one derivative", "differentiate model(**inputs).loss instead")
        )


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _once()
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return (
            None,
            None,
            *(known * upstream.to(known.device) if needed else None for known, needed in pairs),
        )


def _shares(logits: Tensor, answers: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``out`` with the softmax of logits [c, v]; returns those of the answers [c, 1], and
    their logarithms."""
    if not logits.is_cpu:  # where to ask whether a share is small is to wait
        torch.sub(logits, logits.logsumexp(dim=-1, keepdim=True), out=out)
        told = out.gather(1, answers)
        out.exp_()
        return told.exp(), told
    torch.softmax(logits, dim=-1, out=out)
    chosen = out.gather(1, answers)
    told = chosen.log()
    unlikely = (chosen < TINY).squeeze(1)
    if unlikely.any():  # a share that is too small for its logarithm
        told[unlikely] = torch.log_softmax(logits[unlikely], dim=-1).gather(1, answers[unlikely])
    return chosen, told


def leaf_of(rows: Tensor) -> Tensor:
    return rows.detach().requires_grad_(rows.requires_grad)


def _leaves(output: Tensor) -> list[Tensor]:
    found, seen, todo = [], set(), [output.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a graph ends in a leaf
            found.append(node.variable)
        todo += [below for below, _ in node.next_functions]
    return found
