"""The loss of a causal language model, computed only at positions with a label, a few rows of
logits at a time.

    loss = Σ_{b,t : label[b,t+1] ≠ -100}  -log softmax(logits[b,t])[label[b,t+1]]  /  items

b: row of the batch; t: position; items: number of labels. The body of the model runs once, hidden
states without a label are dropped, and the output head runs on `chunk` rows at a time. Each chunk
is differentiated as soon as its loss is computed:

    hidden [b, s, h] → rows [n, h], the n hidden states with a label
    for each chunk of c rows: logits [c, v] → Σ -log p, ∂/∂rows, ∂/∂(head parameters)

`head_split` finds the head of a model whose forward can be split into body and head. For any other
model, logits are computed at once for all positions t whose next token has a label in any row; such
positions are called columns.
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
from veneer.train.chunked_cross_entropy import ChunkedCrossEntropy, make_leaf
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

#: Maximal number of rows of logits at a time. With fewer rows, the head's weight is read more
#: often; more rows do not fit into the caches of a CPU.
MAX_LOGIT_ROWS = 256


class TokenLoss(NamedTuple):
    """The summed loss of the labels of a batch.

    Fields:
        total: summed negative log-likelihood in nats, a scalar with gradient.
        items: number of labels in the sum.
        correct: number of labels that are the most likely token; 0 without `accuracy`.
        extra: the weighted load-balancing loss of a mixture-of-experts model, or None.
    """

    total: Tensor
    items: Tensor
    correct: Tensor
    extra: Tensor | None


class LabelLosses(NamedTuple):
    """The loss of each label of a batch.

    Fields:
        losses: -log p of each of n labels, [n], row after row.
        counts: number of labels in each of b rows, [b].
        right: whether each label is the most likely token, [n]; None without `accuracy`.
    """

    losses: Tensor
    counts: Tensor
    right: Tensor | None


def token_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    accuracy: bool = False,
    chunk: int = MAX_LOGIT_ROWS,
    count: int | None = None,
) -> TokenLoss:
    """The summed loss of one batch.

    Works on any causal language model of `transformers`. At most `chunk` rows of logits are in
    memory at a time if the model's forward is a body followed by a head that computes each row
    independently. Otherwise, the logits of all positions whose next token has a label in any row
    are in memory at once. This is also the case for a model inside DDP, FSDP or `torch.compile`,
    and if the rows of the batch have different adapters that change the head. The total has dtype
    float32, or float64 for float64 logits, and can be differentiated once.

    Args:
        inputs: the model's keyword arguments, with `labels` [rows, tokens], not shifted, and -100
            where the loss does not count.
        accuracy: whether to count the labels that are the most likely token.
        chunk: the maximal number of rows of logits at a time.
        count: the number of labels, if the caller knows it. The host then need not wait for the GPU
            to count them.

    Raises:
        ConfigError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise ConfigError(
            f"chunk={chunk}", "at least one row", f"leave it out for {MAX_LOGIT_ROWS}"
        )
    labels: Tensor = inputs["labels"]
    model_inputs = {
        name: value
        for name, value in inputs.items()
        if name not in ("labels", "num_items_in_batch")
    }
    model_inputs.setdefault("use_cache", False)
    body_path = find_body(model)
    if body_path is not None:
        return _loss_in_chunks(model, body_path, model_inputs, labels, accuracy, chunk, count)
    columns = _labelled_columns(labels)
    if "logits_to_keep" in inspect.signature(type(unwrap(model)).forward).parameters:
        # If the model is spread over several devices, a tensor of indices would have to be on the
        # device of the last block. A list of ints indexes hidden states on any device.
        is_spread = len({parameter.device for parameter in model.parameters()}) > 1
        model_inputs["logits_to_keep"] = columns.tolist() if is_spread else columns
    return _loss_of_columns(model, model(**model_inputs), columns, labels, accuracy)


def causal_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items_in_batch: Tensor | int | None = None,
    *,
    chunk: int = MAX_LOGIT_ROWS,
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
    label_count = result.items if num_items_in_batch is None else num_items_in_batch
    loss = result.total / torch.as_tensor(label_count, device=result.total.device).clamp(min=1)
    return loss if result.extra is None else loss + result.extra.to(loss.device)


def label_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    accuracy: bool = False,
    chunk: int = MAX_LOGIT_ROWS,
) -> LabelLosses:
    """The loss of each label, instead of the sum that `token_loss` returns, for a loss that weights
    the labels differently. The losses can be differentiated once.

    Args:
        inputs: the model's keyword arguments, with `labels` [rows, tokens], not shifted, and -100
            where the loss does not count.
        accuracy: whether to find out which labels are the most likely token.
        chunk: the maximal number of rows of logits at a time, if the model's forward can be split
            into body and head.

    Raises:
        ConfigError: gradients are enabled, and the model adds a load-balancing loss over all rows,
            whose gradients would be missing.
    """
    labels: Tensor = inputs["labels"]
    model_inputs = {
        "use_cache": False,
        **{name: value for name, value in inputs.items() if name != "labels"},
    }
    adds_balancing_loss = getattr(
        getattr(unwrap(model), "config", None), "output_router_logits", False
    )
    if adds_balancing_loss and torch.is_grad_enabled():
        raise ConfigError(
            "output_router_logits=True, for a loss of the balance of experts over all rows",
            "losses of each row",
            "set it to False, or train the adapters one by one",
        )
    shifted_labels = labels[:, 1:]
    has_label, body_path = shifted_labels != IGNORED, find_body(model)
    counts, outputs = has_label.sum(1), None
    # A forward in chunks sums the gradients of the head's parameters over the labels, so a weight
    # for each label could not be applied to them. Therefore no chunks are used if the adapter
    # changes the head.
    adapter_changes_head = (
        torch.is_grad_enabled() and body_path is not None and changes_head(model, body_path)
    )
    if body_path is not None and has_label.any() and not adapter_changes_head:
        rows, sums, outputs, _ = _forward_in_chunks(
            model, body_path, model_inputs, labels, accuracy, chunk, None
        )
        if rows is not None and sums is not None:
            return LabelLosses(
                sums.label_losses(rows), counts, torch.cat(sums.is_correct) if accuracy else None
            )
    logits = (model(**model_inputs) if outputs is None else outputs).logits[:, :-1][has_label]
    float_logits = logits.to(at_least_float32(logits.dtype))
    target_ids = shifted_labels[has_label].to(float_logits.device)
    losses = functional.cross_entropy(float_logits, target_ids, reduction="none")
    return LabelLosses(
        losses, counts, float_logits.argmax(dim=-1) == target_ids if accuracy else None
    )


def log_probabilities(
    model: nn.Module, inputs: Mapping[str, Any], temperature: float = 1.0
) -> Tensor:
    """log p of each label given the tokens before it, [b, s - 1] for labels [b, s]; 0 at positions
    without a label. Can be differentiated as often as the model.

    If the model's forward can be split into body and head, only hidden states with a label reach
    the head. All their logits are kept for backward, because a preference loss knows the weight of
    each label only once it has the log p of all labels.

    Args:
        inputs: the model's keyword arguments, with `labels` [b, s], not shifted, and -100 at
            tokens that are no labels.
        temperature: the divisor of the logits before the softmax.
    """
    labels: Tensor = inputs["labels"]
    model_inputs = {
        "use_cache": False,
        **{name: value for name, value in inputs.items() if name != "labels"},
    }
    shifted_labels = labels[:, 1:]
    has_label = shifted_labels != IGNORED
    # [n, v], in the order of has_label.nonzero()
    logits = _labelled_logits(model, model_inputs, labels)
    target_ids = shifted_labels[has_label].to(logits.device)
    float_logits = logits.to(at_least_float32(logits.dtype)) / temperature
    log_p = -functional.cross_entropy(float_logits, target_ids, reduction="none")
    return log_p.new_zeros(has_label.shape).masked_scatter(has_label.to(log_p.device), log_p)


def _labelled_logits(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """The logits [n, v] of the n positions whose next token has a label, for `labels` [b, s]."""
    has_label = functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
    body_path, is_split = find_body(model), False
    if body_path is None:
        return model(**inputs).logits[has_label]
    positions = has_label.flatten().nonzero().squeeze(1)  # [n]
    body, head = model.get_submodule(".".join(body_path)), Head(model, body_path, inputs)

    def split_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_split
        output = body(*args, **kwargs)
        hidden_rows = head.hidden_rows(output, labels, positions)
        if hidden_rows is None:
            return output
        is_split = True
        return with_rows(output, hidden_rows.index_select(0, positions.to(hidden_rows.device)))

    logits = body_view(model, body_path, split_forward)(**inputs).logits
    head.release()
    return logits[0] if is_split else logits[has_label.to(logits.device)]


def _labelled_columns(labels: Tensor) -> Tensor:
    """The indices [c] of the c columns of `labels` [b, s] (positions) at which the next token has a
    label in any row; column 0 if there is none."""
    columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    # Without labels, the loss must still depend on the parameters, because a distributed backward
    # waits for every rank.
    return columns if len(columns) else torch.zeros(1, dtype=torch.long, device=labels.device)


def _loss_of_columns(
    model: nn.Module, outputs: Any, columns: Tensor, labels: Tensor, accuracy: bool
) -> TokenLoss:
    """The loss of a model that cannot be split into body and head, from its `outputs`. Their logits
    are [b, c, v], of the c `columns` (positions whose next token has a label in any row), or
    [b, s, v], of all positions."""
    logits = outputs.logits
    if logits.shape[1] != len(columns):
        logits = logits[:, columns.to(logits.device)]
    column_labels = labels[:, 1:][:, columns]  # [b, c]: labels of the logits [b, c, v]
    labelled_positions = (column_labels != IGNORED).flatten().nonzero().squeeze(1)  # [n]
    target_ids = column_labels.flatten()[labelled_positions].to(logits.device)  # [n]
    label_logits = logits.flatten(0, 1)[labelled_positions.to(logits.device)]  # [n, v]
    label_logits = label_logits.to(at_least_float32(label_logits.dtype))
    total_loss = (
        functional.cross_entropy(label_logits, target_ids, reduction="sum")
        if len(target_ids)
        else label_logits.sum() * 0.0
    )
    correct_count = (
        (label_logits.detach().argmax(dim=-1) == target_ids).sum()
        if accuracy
        else torch.zeros_like(target_ids.sum())
    )
    label_count = torch.full_like(correct_count, len(target_ids))
    return TokenLoss(total_loss, label_count, correct_count, _balancing_loss(model, outputs))


def _balancing_loss(model: nn.Module, outputs: Any) -> Tensor | None:
    """The load-balancing loss that a mixture-of-experts model returns if its config has
    `output_router_logits`, times the config's `router_aux_loss_coef`; None if the model returns
    none."""
    balancing_loss = getattr(outputs, "aux_loss", None)
    if not isinstance(balancing_loss, Tensor):
        return None
    config = getattr(unwrap(model), "config", None)
    return balancing_loss * float(getattr(config, "router_aux_loss_coef", 0.0))


def _loss_in_chunks(
    model: nn.Module,
    body_path: ModulePath,
    inputs: dict[str, Any],
    labels: Tensor,
    accuracy: bool,
    chunk: int,
    count: int | None,
) -> TokenLoss:
    rows, sums, outputs, balancing_loss = _forward_in_chunks(
        model, body_path, inputs, labels, accuracy, chunk, count
    )
    if rows is None:  # the model could not be split
        return _loss_of_columns(model, outputs, _labelled_columns(labels), labels, accuracy)
    label_count = (labels[:, 1:] != IGNORED).sum()
    if sums is None:
        logits = outputs.logits
        label_count = label_count.to(logits.device)
        return TokenLoss(
            logits.to(at_least_float32(logits.dtype)).sum() * 0.0,
            label_count,
            label_count,
            balancing_loss,
        )
    return TokenLoss(
        sums.differentiable_total(rows),
        label_count.to(sums.total_loss.device),
        sums.correct_count,
        balancing_loss,
    )


def _forward_in_chunks(
    model: nn.Module,
    body_path: ModulePath,
    inputs: dict[str, Any],
    labels: Tensor,
    accuracy: bool,
    chunk: int,
    count: int | None,
) -> tuple[Tensor | None, ChunkedCrossEntropy | None, Any, Tensor | None]:
    """Run the body once, and the head on `chunk` labelled rows at a time, whose loss is
    differentiated at once. Arguments are those of `token_loss`; `inputs` are without labels.

    Returns:
        (rows, sums, outputs, balancing loss):

        - the hidden states [n, h] of the n positions with a label, or of one position if there are
          no labels; None if the model could not be split;
        - the losses and gradients of the chunks of rows; None if there are no chunks;
        - the model's output; None if there were chunks, whose sums replace it;
        - the weighted load-balancing loss of the model (`_balancing_loss`); None if the model
          returns none or could not be split.
    """
    # [b, s]: the next token at each position
    next_labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    has_label = next_labels != IGNORED
    # `nonzero` makes the host wait for the GPU; a known count of labels makes it unnecessary
    if count is None or labels.is_cpu:
        positions = has_label.flatten().nonzero().squeeze(1)  # [n]
    else:
        positions = has_label.flatten().byte().argsort(descending=True, stable=True)[:count]
    target_ids = next_labels.flatten().index_select(0, positions)  # [n]
    body, head = model.get_submodule(".".join(body_path)), Head(model, body_path, inputs)
    rows: Tensor | None = None
    first_chunk = torch.empty(0)

    def split_forward(*args: Any, **kwargs: Any) -> Any:
        """The body's output with the first chunk as its hidden states. The remaining forward of the
        model is then the head on that chunk. Further outputs of the body are not changed, because
        the model may compute a loss from them."""
        nonlocal rows, first_chunk
        output = body(*args, **kwargs)
        hidden_rows = head.hidden_rows(output, labels, positions)
        if hidden_rows is None:
            return output
        if len(positions) == 0:
            # Without labels, the loss must still depend on the parameters, because a distributed
            # backward waits for every rank.
            rows = first_chunk = hidden_rows[:1]
        else:
            rows = hidden_rows.index_select(0, positions.to(hidden_rows.device))  # [n, h]
            first_chunk = make_leaf(rows[:chunk])
        return with_rows(output, first_chunk)

    outputs = head.reuse_memory(body_view(model, body_path, split_forward))(**inputs)
    balancing_loss = None if rows is None else _balancing_loss(model, outputs)
    if rows is None or len(positions) == 0:
        head.release()
        return rows, None, outputs, balancing_loss
    sums = ChunkedCrossEntropy(outputs.logits, accuracy)
    sums.add(first_chunk, outputs.logits, target_ids[:chunk])
    del outputs  # frees the logits of the first chunk
    for start in range(chunk, len(rows), chunk):
        leaf = make_leaf(rows[start : start + chunk])
        sums.add(leaf, head(leaf).logits, target_ids[start : start + chunk])
    head.release()
    return rows, sums, None, balancing_loss
