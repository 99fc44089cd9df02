"""The loss of a causal language model, computed only where a label is.

    loss = Σ_{b,t : label[b,t+1] ≠ -100}  -log softmax(logits[b,t])[label[b,t+1]]  /  items

With prompts masked, most positions carry no label, and the output head is the largest layer of a small model (a quarter
of a step for a vocabulary of 49,152). So the model is asked for the logits of those columns alone in which any row has
a label, and the cross-entropy, in fp32 (fp64 for an fp64 model), runs over the labelled cells alone. It goes through
the model's own forward: an adapter on the output head, a soft cap or a logit scale are all in it.

The alternative, trl's fused head, multiplies by `lm_head.weight` directly, which bypasses an adapter on the head, and
off the GPU it scores every position.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from veneer.train.tokens import IGNORED


class TokenLoss(NamedTuple):
    """`total`: summed negative log-likelihood in nats, a scalar with gradient; `items`: how many labels it sums;
    `correct`: how many of them are the most likely token (0 unless asked for); `extra`: a mixture-of-experts model's
    balancing loss, already weighted, or None."""

    total: Tensor
    items: Tensor
    correct: Tensor
    extra: Tensor | None


def token_loss(model: nn.Module, inputs: Mapping[str, Any], *, accuracy: bool = False) -> TokenLoss:
    """The summed loss of one batch.

    `inputs` are the model's keyword arguments with `labels` [b, s] (-100 where the loss does not count, not shifted).
    Works on any `transformers` causal language model; a forward that takes no `logits_to_keep` is run in full.
    """
    labels: Tensor = inputs["labels"]
    rest = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
    rest.setdefault("use_cache", False)
    target = labels[:, 1:]  # [b, s-1]: column t is what the logits at t should say
    wanted = target != IGNORED
    columns = wanted.any(dim=0).nonzero().squeeze(1)  # [c]
    if len(columns) == 0:
        # Nothing to learn, yet the graph must reach the parameters: a distributed backward waits for every rank.
        columns = torch.zeros(1, dtype=torch.long, device=labels.device)
    if _keeps_logits(model):
        outputs = model(**rest, logits_to_keep=columns)
        logits = outputs.logits  # [b, c, v]
    else:
        outputs = model(**rest)
        logits = outputs.logits[:, columns]
    cells = wanted[:, columns]  # [b, c]
    chosen = logits[cells]  # [n, v]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    answer = target[:, columns][cells]  # [n]
    total = functional.cross_entropy(chosen, answer, reduction="sum") if len(answer) else logits.sum() * 0.0
    correct = (chosen.detach().argmax(dim=-1) == answer).sum() if accuracy else torch.zeros_like(answer.sum())
    return TokenLoss(total, cells.sum(), correct, _balance(model, outputs))


def causal_loss(model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The mean loss a label: what to call `backward()` on in a loop of your own.

    `num_items_in_batch` replaces the count of this batch, for gradient accumulation over several: the count of all.

        loss = causal_loss(model, batch)
        loss.backward()
    """
    result = token_loss(model, inputs)
    items = (
        result.items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=result.total.device)
    )
    loss = result.total / items.clamp(min=1)
    return loss if result.extra is None else loss + result.extra


def _keeps_logits(model: nn.Module) -> bool:
    inner: Any = model
    while hasattr(inner, "module") and isinstance(inner.module, nn.Module):  # DistributedDataParallel
        inner = inner.module
    inner = getattr(inner, "_orig_mod", inner)  # torch.compile
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


def _balance(model: nn.Module, outputs: Any) -> Tensor | None:
    """The load-balancing loss that a mixture-of-experts model returns when its config asks for router logits."""
    extra = getattr(outputs, "aux_loss", None)
    if not isinstance(extra, Tensor):
        return None
    config: Any = getattr(model, "config", None)
    return extra * float(getattr(config, "router_aux_loss_coef", 0.0))
