"""Cross-entropy over rows of logits in chunks, each of which is differentiated immediately.

    for each chunk:  logits [1, c, v]  →  Σ -log p,  ∂/∂rows [c, h],  ∂/∂(the head's parameters)

A row is the hidden state of one position that has a label, or the logits of that position. c: rows
of a chunk; v: size of the vocabulary; h: features of a hidden state. The sum over the chunks is a
scalar with precomputed gradients, so neither the logits nor the autograd graph of the output head
stay in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.errors import sentence
from veneer.precision import at_least_float32

#: the least float32 probability whose logarithm is accurate enough; log p of a smaller one, which
#: may have been rounded to 0, is computed from the logits
MIN_EXACT_P = 1e-30


class ChunkedCrossEntropy:
    """Accumulates over the chunks: the loss, its gradients, and the number of correct predictions.

    Args:
        first_logits: logits [1, c, v] of the largest chunk. The sums and the buffers get their
            shapes, dtypes and device from these logits.
        accuracy: whether to count the labels that are the most likely token.
    """

    def __init__(self, first_logits: Tensor, accuracy: bool) -> None:
        self.accuracy = accuracy
        self.total_loss = first_logits.new_zeros((), dtype=at_least_float32(first_logits.dtype))
        self.correct_count = first_logits.new_zeros((), dtype=torch.long)
        self.log_p: list[Tensor] = []  # log p of each label, [c, 1] per chunk
        self.is_correct: list[Tensor] = []  # whether each label is the likeliest, [c] per chunk
        self.row_gradients: list[Tensor] = []  # of the loss by the rows, [c, h] per chunk
        self.parameter_gradients: dict[Tensor, Tensor] = {}  # of the loss, by parameter of the head
        # The buffers, for the softmax and for a float32 copy of 16-bit logits, serve all chunks: to
        # allocate them for each chunk would take longer than to compute the exponentials.
        self.softmax = first_logits.new_empty(first_logits.shape[-2:], dtype=self.total_loss.dtype)
        self.float_buffer = (
            None if first_logits.dtype == self.softmax.dtype else torch.empty_like(self.softmax)
        )

    def add(self, leaf_rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a chunk. If its logits require a gradient, the chunk's loss is differentiated here.

        Args:
            leaf_rows: the rows [c, h] as a leaf of the autograd graph of the logits (`make_leaf`).
            logits: [1, c, v].
            labels: token ids [c].
        """
        labels = labels.to(logits.device)[:, None]
        float_logits = logits.detach()[0]
        if self.float_buffer is not None:
            float_logits = self.float_buffer[: len(float_logits)].copy_(float_logits)
        softmax = self.softmax[: len(float_logits)]
        p, log_p = _softmax_into(float_logits, labels, softmax)
        if self.accuracy:
            is_correct = (softmax.argmax(dim=-1, keepdim=True) == labels).squeeze(1)
            self.correct_count += is_correct.sum()
            self.is_correct.append(is_correct)
        self.total_loss -= log_p.sum()
        self.log_p.append(log_p)
        if not logits.requires_grad:
            return
        logit_gradient = softmax.scatter_(1, labels, p - 1)  # softmax(logits) - onehot(labels)
        parameters = [
            parameter for parameter in _leaf_tensors(logits) if parameter is not leaf_rows
        ]
        inputs = [leaf_rows, *parameters] if leaf_rows.requires_grad else parameters
        with torch.autocast(logits.device.type, enabled=False):
            gradients = list(
                torch.autograd.grad(logits, inputs, logit_gradient.to(logits.dtype)[None])
            )
        if leaf_rows.requires_grad:
            self.row_gradients.append(gradients.pop(0))
        for parameter, chunk_gradient in zip(parameters, gradients, strict=True):
            if parameter in self.parameter_gradients:
                self.parameter_gradients[parameter] += chunk_gradient
            else:  # the sum is in float32, so that it is rounded once, after the last chunk
                self.parameter_gradients[parameter] = chunk_gradient.to(
                    at_least_float32(chunk_gradient.dtype)
                )

    def differentiable_total(self, rows: Tensor) -> Tensor:
        """The summed loss as a differentiable function of all n rows [n, h] and of the head's
        parameters."""
        gradients = {rows: torch.cat(self.row_gradients)} if self.row_gradients else {}
        gradients |= {
            parameter: gradient.to(parameter.dtype)
            for parameter, gradient in self.parameter_gradients.items()
        }
        if not gradients:
            return self.total_loss
        return _PrecomputedGradients.apply(self.total_loss, list(gradients.values()), *gradients)  # pyright: ignore[reportReturnType]

    def label_losses(self, rows: Tensor) -> Tensor:
        """The loss of each of n labels, [n], as a differentiable function of the rows [n, h].
        Raises `NotImplementedError` if the head has parameters that train, because their gradients
        are known only for the sum of the losses."""
        if self.parameter_gradients:
            raise NotImplementedError(
                sentence(
                    "the losses of each label of a head that trains, whose gradient is known of"
                    " their sum",
                    "a frozen head",
                    "use token_loss or log_probabilities",
                )
            )
        losses = -torch.cat(self.log_p).squeeze(1)
        if not self.row_gradients:
            return losses
        return _PrecomputedRowGradients.apply(losses, torch.cat(self.row_gradients), rows)  # pyright: ignore[reportReturnType]


class _PrecomputedRowGradients(torch.autograd.Function):
    """Losses [n] of rows [n, h]. Backward uses precomputed gradients [n, h], in each row the
    gradient of the row's loss with respect to the row."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradients: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative()
        (gradients,) = ctx.saved_tensors
        return (
            None,
            None,
            gradients * output_gradient.to(gradients.device, gradients.dtype)[:, None],
        )


def _refuse_second_derivative() -> None:
    # Only create_graph=True enables gradients in a backward. The second derivative would be wrong,
    # because autograd would treat the precomputed gradients as constants.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            sentence(
                "create_graph=True through token_loss, which keeps no graph of the head",
                "one derivative",
                "differentiate model(**inputs).loss instead",
            )
        )


class _PrecomputedGradients(torch.autograd.Function):
    """The scalar `total_loss` as a function of `inputs`. Backward uses the precomputed `gradients`
    of the scalar, one for each input."""

    @staticmethod
    def forward(ctx: Any, total_loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total_loss.clone()

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        _refuse_second_derivative()
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return (
            None,
            None,
            *(
                gradient * output_gradient.to(gradient.device) if is_needed else None
                for gradient, is_needed in gradients
            ),
        )


def _softmax_into(logits: Tensor, labels: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``out`` with the softmax of logits [c, v]. Returns (p, log p) of the labels, [c, 1]
    each."""
    # on a GPU, log p comes from the logits, since a test for small p would make the host wait
    if not logits.is_cpu:
        torch.sub(logits, logits.logsumexp(dim=-1, keepdim=True), out=out)
        log_p = out.gather(1, labels)
        out.exp_()
        return log_p.exp(), log_p
    torch.softmax(logits, dim=-1, out=out)
    p = out.gather(1, labels)
    log_p = p.log()
    is_unlikely = (p < MIN_EXACT_P).squeeze(1)
    if is_unlikely.any():
        log_p[is_unlikely] = torch.log_softmax(logits[is_unlikely], dim=-1).gather(
            1, labels[is_unlikely]
        )
    return p, log_p


def make_leaf(rows: Tensor) -> Tensor:
    """The rows as a leaf of a new autograd graph. The leaf requires a gradient if the rows do."""
    return rows.detach().requires_grad_(rows.requires_grad)


def _leaf_tensors(output: Tensor) -> list[Tensor]:
    """The leaf tensors that require a gradient in the autograd graph of ``output``."""
    leaves, visited_nodes, pending_nodes = [], set(), [output.grad_fn]
    while pending_nodes:
        node: Any = pending_nodes.pop()
        if node is None or node in visited_nodes:
            continue
        visited_nodes.add(node)
        if hasattr(node, "variable"):  # the node accumulates the gradient of a leaf
            leaves.append(node.variable)
        pending_nodes += [next_node for next_node, _ in node.next_functions]
    return leaves
