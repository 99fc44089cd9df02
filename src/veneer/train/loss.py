"""The loss of a causal language model, computed only at positions with a label, a few rows of
logits at a time.

    loss = Σ_{b,t : label[b,t+1] ≠ -100}  -log softmax(logits[b,t])[label[b,t+1]]  /  items

The body runs once, the rows without a label are dropped, and the head runs on `chunk` rows at a
time. Each chunk is differentiated as soon as its loss is known:

    hidden [b, s, h] → rows [n, h]
    for each chunk of rows: logits [c, v] → Σ -log p, ∂/∂rows, ∂/∂(head parameters)

`head_split` finds the head of a model, if its forward can be split into body and head. Any other
model computes the logits of all columns that have a label.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from veneer.attach import unwrap
from veneer.errors import ConfigError
from veneer.precision import at_least_float32
from veneer.train.chunked_cross_entropy import ChunkedCrossEntropy, leaf_of
from veneer.train.head_split import (
    Head,
    ModulePath,
    body_view,
    changes_head,
    find_body,
    with_rows,
)
from veneer.train.tokens import IGNORED

__all__ = [
    "LabelLosses",
    "TokenLoss",
    "causal_loss",
    "label_losses",
    "log_probabilities",
    "token_loss",
]

#: Rows of logits at a time. Fewer rows read the head's weight more often; more do not fit into the
#: CPU's caches.
CHUNK = 256


class TokenLoss(NamedTuple):
    """`total`: summed negative log-likelihood in nats, a scalar with gradient; `items`: number of
    labels in the sum; `correct`: number of labels that are the most likely token (0 without
    `accuracy`); `extra`: the weighted load-balancing loss of a mixture-of-experts model, or
    None."""

    total: Tensor
    items: Tensor
    correct: Tensor
    extra: Tensor | None


class LabelLosses(NamedTuple):
    """`losses`: -log p of each label, [n], row after row; `counts`: number of labels in each row,
    [b]; `right`: whether each label is the most likely token, [n] (None without `accuracy`)."""

    losses: Tensor
    counts: Tensor
    right: Tensor | None


def token_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    accuracy: bool = False,
    chunk: int = CHUNK,
    count: int | None = None,
) -> TokenLoss:
    """The summed loss of one batch.

    `inputs` are the model's keyword arguments with `labels` [b, s] (not shifted, -100 where the
    loss does not count). Works on any `transformers` causal language model. At most `chunk` rows of
    logits are in memory at a time if the model's forward is a body followed by a head that treats
    each row on its own. Any other model holds the logits of all columns with a label; so does a
    model inside DDP, FSDP or `torch.compile`, and one with a different adapter per row. The total
    has dtype float32, or float64 for float64 logits, and can be differentiated once. `count` is the
    number of labels, if the caller knows it: the host then need not wait for the GPU to count.

    Raises:
        ConfigError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk}", "at least one row", f"leave it out for {CHUNK}")
    labels: Tensor = inputs["labels"]
    model_inputs = {
        name: value
        for name, value in inputs.items()
        if name not in ("labels", "num_items_in_batch")
    }
    model_inputs.setdefault("use_cache", False)
    path = find_body(model)
    if path is not None:
        return _loss_in_chunks(model, path, model_inputs, labels, accuracy, chunk, count)
    columns = _labelled_columns(labels)
    if "logits_to_keep" in inspect.signature(type(unwrap(model)).forward).parameters:
        # A list of ints indexes hidden states on any device; a tensor would have to be on the
        # device of the last block, if the model is spread over several.
        spread = len({parameter.device for parameter in model.parameters()}) > 1
        model_inputs["logits_to_keep"] = columns.tolist() if spread else columns
    return _loss_of_columns(model, model(**model_inputs), columns, labels, accuracy)


def causal_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items_in_batch: Tensor | int | None = None,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """The mean loss per label, for `backward()` in a training loop, in place of
    `model(**inputs).loss`.

    `num_items_in_batch` replaces the number of labels of this batch: for gradient accumulation,
    pass the number of labels in all accumulated batches. The loss of a batch without labels is 0,
    not nan. See `token_loss`.

        loss = causal_loss(model, batch)  # input_ids, labels [b, s], other inputs of the model
        loss.backward()
    """
    result = token_loss(model, inputs, chunk=chunk)
    items = result.items if num_items_in_batch is None else num_items_in_batch
    loss = result.total / torch.as_tensor(items, device=result.total.device).clamp(min=1)
    return loss if result.extra is None else loss + result.extra.to(loss.device)


def label_losses(
    model: nn.Module, inputs: Mapping[str, Any], *, accuracy: bool = False, chunk: int = CHUNK
) -> LabelLosses:
    """`token_loss` before the sum, for rows with different weights. It can be differentiated once.

    Raises:
        ConfigError: the model adds a load-balancing loss over all rows, which the gradients would
            lack.
    """
    labels: Tensor = inputs["labels"]
    model_inputs = {
        "use_cache": False,
        **{name: value for name, value in inputs.items() if name != "labels"},
    }
    balanced = getattr(getattr(unwrap(model), "config", None), "output_router_logits", False)
    if balanced and torch.is_grad_enabled():
        problem = "output_router_logits=True, for a loss of the balance of experts over all rows"
        raise ConfigError(
            problem, "losses of each row", "set it to False, or train the adapters one by one"
        )
    target = labels[:, 1:]
    wanted, path = target != IGNORED, find_body(model)
    counts, outputs = wanted.sum(1), None
    # the chunks would sum the gradients of an adapted head over the labels
    head_trains = torch.is_grad_enabled() and path is not None and changes_head(model, path)
    if path is not None and wanted.any() and not head_trains:
        rows, sums, outputs, _ = _forward_in_chunks(
            model, path, model_inputs, labels, accuracy, chunk, None
        )
        if rows is not None and sums is not None:
            return LabelLosses(
                sums.label_losses(rows), counts, torch.cat(sums.right) if accuracy else None
            )
    logits = (model(**model_inputs) if outputs is None else outputs).logits[:, :-1][wanted]
    wide = logits.to(at_least_float32(logits.dtype))
    answers = target[wanted].to(wide.device)
    losses = functional.cross_entropy(wide, answers, reduction="none")
    return LabelLosses(losses, counts, wide.argmax(dim=-1) == answers if accuracy else None)


def log_probabilities(
    model: nn.Module, inputs: Mapping[str, Any], temperature: float = 1.0
) -> Tensor:
    """log p of each label given the tokens before it, [b, s - 1]; 0 at positions without a label.
    Can be differentiated as often as the model.

    `inputs` as for `token_loss`. Only rows with a label reach the head, if the model's forward can
    be split there. Their logits, divided by `temperature`, are kept for backward, because a
    preference loss knows the weights of the labels only after all of them."""
    labels: Tensor = inputs["labels"]
    model_inputs = {
        "use_cache": False,
        **{name: value for name, value in inputs.items() if name != "labels"},
    }
    target = labels[:, 1:]
    wanted = target != IGNORED
    logits = _labelled_logits(
        model, model_inputs, labels
    )  # [n, v], in the order of wanted.nonzero()
    answers = target[wanted].to(logits.device)
    wide = logits.to(at_least_float32(logits.dtype)) / temperature
    log_p = -functional.cross_entropy(wide, answers, reduction="none")
    return log_p.new_zeros(wanted.shape).masked_scatter(wanted.to(log_p.device), log_p)


def _labelled_logits(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """The logits [n, v] of the positions whose next token has a label."""
    wanted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
    path, is_split = find_body(model), False
    if path is None:
        return model(**inputs).logits[wanted]
    positions = wanted.flatten().nonzero().squeeze(1)  # [n]
    body, head = model.get_submodule(".".join(path)), Head(model, path, inputs)

    def answer(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_split
        output = body(*args, **kwargs)
        flat = head.hidden_rows(output, labels, positions)
        if flat is None:
            return output
        is_split = True
        return with_rows(output, flat.index_select(0, positions.to(flat.device)))

    logits = body_view(model, path, answer)(**inputs).logits
    head.release()
    return logits[0] if is_split else logits[wanted.to(logits.device)]


def _labelled_columns(labels: Tensor) -> Tensor:
    """The columns [c] whose next token has a label in any row; column 0 if there is none."""
    columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    # Without labels the graph must still reach the parameters, because a distributed backward waits
    # for every rank.
    return columns if len(columns) else torch.zeros(1, dtype=torch.long, device=labels.device)


def _loss_of_columns(
    model: nn.Module, outputs: Any, columns: Tensor, labels: Tensor, accuracy: bool
) -> TokenLoss:
    """The loss from the full logits of `columns`; the output has these columns or all of them."""
    logits = outputs.logits
    if logits.shape[1] != len(columns):
        logits = logits[:, columns.to(logits.device)]
    target = labels[:, 1:][:, columns]  # [b, c]: labels of the logits [b, c, v]
    cells = (target != IGNORED).flatten().nonzero().squeeze(1)  # [n]
    answers = target.flatten()[cells].to(logits.device)  # [n]
    label_logits = logits.flatten(0, 1)[cells.to(logits.device)]  # [n, v]
    label_logits = label_logits.to(at_least_float32(label_logits.dtype))
    total = (
        functional.cross_entropy(label_logits, answers, reduction="sum")
        if len(answers)
        else label_logits.sum() * 0.0
    )
    correct = (
        (label_logits.detach().argmax(dim=-1) == answers).sum()
        if accuracy
        else torch.zeros_like(answers.sum())
    )
    items = torch.full_like(correct, len(answers))
    return TokenLoss(total, items, correct, _balancing_loss(model, outputs))


def _balancing_loss(model: nn.Module, outputs: Any) -> Tensor | None:
    """The weighted load-balancing loss that a mixture-of-experts model returns if its config has
    `output_router_logits`."""
    extra, config = getattr(outputs, "aux_loss", None), getattr(unwrap(model), "config", None)
    return (
        extra * float(getattr(config, "router_aux_loss_coef", 0.0))
        if isinstance(extra, Tensor)
        else None
    )


class _ChunkedForward(NamedTuple):
    """`rows`: hidden states [n, h] of the positions with a label, or None if the model could not be
    split; `sums`: losses and gradients of their chunks, if there are any; `outputs`: the model's
    output if it is still needed; `extra`: the load-balancing loss."""

    rows: Tensor | None
    sums: ChunkedCrossEntropy | None
    outputs: Any
    extra: Tensor | None


def _loss_in_chunks(
    model: nn.Module,
    path: ModulePath,
    inputs: dict[str, Any],
    labels: Tensor,
    accuracy: bool,
    chunk: int,
    count: int | None,
) -> TokenLoss:
    forward = _forward_in_chunks(model, path, inputs, labels, accuracy, chunk, count)
    rows, sums, outputs, extra = forward
    if rows is None:  # the body returns other hidden states, or the head mixes rows
        return _loss_of_columns(model, outputs, _labelled_columns(labels), labels, accuracy)
    items = (labels[:, 1:] != IGNORED).sum()
    if sums is None:
        logits = outputs.logits
        items = items.to(logits.device)
        return TokenLoss(logits.to(at_least_float32(logits.dtype)).sum() * 0.0, items, items, extra)
    return TokenLoss(sums.differentiable(rows), items.to(sums.total.device), sums.correct, extra)


def _forward_in_chunks(
    model: nn.Module,
    path: ModulePath,
    inputs: dict[str, Any],
    labels: Tensor,
    accuracy: bool,
    chunk: int,
    count: int | None,
) -> _ChunkedForward:
    """Run the body once and the head on `chunk` labelled rows at a time."""
    # [b, s]: the next token at each position
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wanted = targets != IGNORED
    if count is None or labels.is_cpu:
        positions = wanted.flatten().nonzero().squeeze(1)  # [n]
    else:
        positions = wanted.flatten().byte().argsort(descending=True, stable=True)[:count]
    answers = targets.flatten().index_select(0, positions)  # [n]
    body, head = model.get_submodule(".".join(path)), Head(model, path, inputs)
    rows: Tensor | None = None
    first = torch.empty(0)

    def answer(*args: Any, **kwargs: Any) -> Any:
        """The body's output with the first chunk as its hidden states, so that the rest of the
        model's forward is the head on that chunk. The body's further outputs stay, because the
        model may compute a loss from them."""
        nonlocal rows, first
        output = body(*args, **kwargs)
        flat = head.hidden_rows(output, labels, positions)
        if flat is None:
            return output
        if len(positions) == 0:
            rows = first = flat[:1]  # without labels the graph must still reach the parameters
        else:
            rows = flat.index_select(0, positions.to(flat.device))  # [n, h]
            first = leaf_of(rows[:chunk])
        return with_rows(output, first)

    outputs = head.reuse_memory(body_view(model, path, answer))(**inputs)
    extra = None if rows is None else _balancing_loss(model, outputs)
    if rows is None or len(positions) == 0:
        head.release()
        return _ChunkedForward(rows, None, outputs, extra)
    sums = ChunkedCrossEntropy(outputs.logits, accuracy)
    sums.add(first, outputs.logits, answers[:chunk])
    del outputs  # frees the logits of the first chunk
    for start in range(chunk, len(rows), chunk):
        leaf = leaf_of(rows[start : start + chunk])
        sums.add(leaf, head(leaf).logits, answers[start : start + chunk])
    head.release()
    return _ChunkedForward(rows, sums, None, extra)
