"""Cross-entropy over rows of logits in chunks, each of which is differentiated immediately.

    for each chunk:  logits [1, c, v]  →  Σ -log p,  ∂/∂rows [c, h],  ∂/∂(the head's parameters)

The sum over the chunks is a scalar with precomputed gradients, so neither logits nor the head's
graph stay in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.errors import sentence
from veneer.precision import at_least_float32

#: smallest probability whose logarithm is exact in float32
TINY = 1e-30


class ChunkedCrossEntropy:
    """Sums over the chunks: the loss, its gradients, the number of right answers. ``like``: logits
    [1, c, v] of the largest chunk, for the shape, dtype and device of the sums. ``accuracy``:
    whether to count right answers."""

    def __init__(self, like: Tensor, accuracy: bool) -> None:
        self.accuracy = accuracy
        self.total = like.new_zeros((), dtype=at_least_float32(like.dtype))
        self.correct = like.new_zeros((), dtype=torch.long)
        self.log_p: list[Tensor] = []  # of each label, [c, 1] per chunk
        self.right: list[Tensor] = []  # whether each label is the most likely token, [c] per chunk
        self.row_gradients: list[Tensor] = []  # [c, h] per chunk
        self.gradients: dict[Tensor, Tensor] = {}  # by parameter of the head
        # one buffer for all chunks: allocating one for each would take longer than computing the
        # exponentials
        self.softmax = like.new_empty(like.shape[-2:], dtype=self.total.dtype)
        self.wide = None if like.dtype == self.softmax.dtype else torch.empty_like(self.softmax)

    def add(self, leaf: Tensor, logits: Tensor, answers: Tensor) -> None:
        """Add a chunk: a leaf with its rows [c, h], their logits [1, c, v], their labels [c]."""
        answers = answers.to(logits.device)[:, None]
        wide = logits.detach()[0]
        if self.wide is not None:
            wide = self.wide[: len(wide)].copy_(wide)
        softmax = self.softmax[: len(wide)]
        p, log_p = _softmax_into(wide, answers, softmax)
        if self.accuracy:
            right = (softmax.argmax(dim=-1, keepdim=True) == answers).squeeze(1)
            self.correct += right.sum()
            self.right.append(right)
        self.total -= log_p.sum()
        self.log_p.append(log_p)
        if not logits.requires_grad:
            return
        gradient = softmax.scatter_(1, answers, p - 1)  # softmax - onehot
        parameters = [parameter for parameter in _leaves(logits) if parameter is not leaf]
        wanted = [leaf, *parameters] if leaf.requires_grad else parameters
        with torch.autocast(logits.device.type, enabled=False):
            gradients = list(torch.autograd.grad(logits, wanted, gradient.to(logits.dtype)[None]))
        if leaf.requires_grad:
            self.row_gradients.append(gradients.pop(0))
        for parameter, chunk in zip(parameters, gradients, strict=True):
            if parameter in self.gradients:
                self.gradients[parameter] += chunk
            else:  # summed in float32 and rounded to 16 bits once, after the last chunk
                self.gradients[parameter] = chunk.to(at_least_float32(chunk.dtype))

    def differentiable(self, rows: Tensor) -> Tensor:
        """The total as a differentiable function of all rows [n, h] and the head's parameters."""
        gradients = {rows: torch.cat(self.row_gradients)} if self.row_gradients else {}
        gradients |= {
            parameter: gradient.to(parameter.dtype)
            for parameter, gradient in self.gradients.items()
        }
        if not gradients:
            return self.total
        return _PrecomputedGradients.apply(self.total, list(gradients.values()), *gradients)  # pyright: ignore[reportReturnType]

    def label_losses(self, rows: Tensor) -> Tensor:
        """The loss of each label [n] as a differentiable function of the rows [n, h]. Raises
        `NotImplementedError` if the head has parameters that train."""
        if self.gradients:
            problem = (
                "the losses of each label of a head that trains, whose gradient is known of"
                " their sum"
            )
            raise NotImplementedError(
                sentence(problem, "a frozen head", "use token_loss or log_probabilities")
            )
        losses = -torch.cat(self.log_p).squeeze(1)
        if not self.row_gradients:
            return losses
        return _PrecomputedRowGradients.apply(losses, torch.cat(self.row_gradients), rows)  # pyright: ignore[reportReturnType]


class _PrecomputedRowGradients(torch.autograd.Function):
    """Losses [n] of rows [n, h], with the gradient of each loss in its row."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradients: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative()
        (gradients,) = ctx.saved_tensors
        return None, None, gradients * upstream.to(gradients.device, gradients.dtype)[:, None]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # autograd would treat the precomputed gradients as constants
        problem = "create_graph=True through token_loss, which keeps no graph of the head"
        raise NotImplementedError(
            sentence(problem, "one derivative", "differentiate model(**inputs).loss instead")
        )


class _PrecomputedGradients(torch.autograd.Function):
    """A scalar total, with its gradient in each input."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _refuse_second_derivative()
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return (
            None,
            None,
            *(
                gradient * upstream.to(gradient.device) if needed else None
                for gradient, needed in pairs
            ),
        )


def _softmax_into(logits: Tensor, answers: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``out`` with the softmax of logits [c, v]. Returns (p, log p) of the answers, [c, 1]."""
    if not logits.is_cpu:  # a test for small probabilities would wait for the device
        torch.sub(logits, logits.logsumexp(dim=-1, keepdim=True), out=out)
        log_p = out.gather(1, answers)
        out.exp_()
        return log_p.exp(), log_p
    torch.softmax(logits, dim=-1, out=out)
    p = out.gather(1, answers)
    log_p = p.log()
    unlikely = (p < TINY).squeeze(1)
    if unlikely.any():  # the logarithm of such a probability is not exact
        log_p[unlikely] = torch.log_softmax(logits[unlikely], dim=-1).gather(1, answers[unlikely])
    return p, log_p


def leaf_of(rows: Tensor) -> Tensor:
    """Rows as a leaf of a new graph, which requires a gradient if the rows do."""
    return rows.detach().requires_grad_(rows.requires_grad)


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaf tensors of an output's graph."""
    leaves, visited, pending = [], set(), [output.grad_fn]
    while pending:
        node: Any = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):  # the graph ends in a leaf
            leaves.append(node.variable)
        pending += [below for below, _ in node.next_functions]
    return leaves
