"""The loss of a causal language model, computed only where a label is, and a few rows of logits at
a time.

    loss = Σ_{b,t : label[b,t+1] ≠ -100}  -log softmax(logits[b,t])[label[b,t+1]]  /  items

The body runs once, the rows without a label are dropped, and the head runs on `chunk` rows at a
time, each differentiated as soon as its loss is known:

    hidden [b, s, h] → rows [n, h] → for each chunk: logits [c, v] → Σ -log p, ∂/∂rows, ∂/∂(head
    parameters)

What the head is, the model says: its own forward runs on a view of it whose body answers with the
rows at hand. Whether a forward can be cut there is read in its source, and tried once a model on a
few rows; any other model is asked for the logits of the columns with a label.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import reduce
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from veneer import context
from veneer.attach.adapted_module import base_class
from veneer.attach.dtypes import at_least_float32
from veneer.attach.lookup import adapters_of, unwrap
from veneer.attach.select import use
from veneer.attach.source_analysis import submodule_calls
from veneer.attach.state import LayerState
from veneer.attach.views import view
from veneer.errors import ConfigError
from veneer.kernels import fused
from veneer.train.chunked_cross_entropy import ChunkedCrossEntropy, leaf_of
from veneer.train.tokens import IGNORED

__all__ = [
    "LabelLosses",
    "TokenLoss",
    "causal_loss",
    "label_losses",
    "log_probabilities",
    "token_loss",
]

#: Rows of logits at a time. Fewer read the head's weight more often, more fall out of the caches.
CHUNK = 256

#: Whether a model's head was found to treat each row alone.
_ROWWISE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

ModulePath = tuple[str, ...]


class TokenLoss(NamedTuple):
    """`total`: summed negative log-likelihood in nats, a scalar with gradient; `items`: how many
    labels it sums; `correct`: how many of them are the most likely token (0 unless asked for);
    `extra`: a mixture-of-experts model's balancing loss, already weighted, or None."""

    total: Tensor
    items: Tensor
    correct: Tensor
    extra: Tensor | None


class LabelLosses(NamedTuple):
    """`losses`: -log p of each label, [n], row after row; `counts`: how many labels each row has,
    [b]; `right`: which of them are the most likely token, [n] (None unless asked for)."""

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

    `inputs` are the model's keyword arguments with `labels` [b, s] (-100 where the loss does not
    count, not shifted). Works on any `transformers` causal language model. At most `chunk` rows of
    logits are held at a time, if the model's forward is its body and then a head on each row; of
    any other (and inside DDP, FSDP or `torch.compile`, and with an adapter for each row), the
    logits of the columns with a label. The total is a float32, a float64 one for such logits; it
    can be differentiated once. `count` is how many labels there are, if the caller knows: to find
    them in the memory of a GPU, the host would wait for it.

    Raises:
        ConfigError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk}", "at least one row", f"leave it out for {CHUNK}")
    labels: Tensor = inputs["labels"]
    rest = {
        name: value
        for name, value in inputs.items()
        if name not in ("labels", "num_items_in_batch")
    }
    rest.setdefault("use_cache", False)
    path = _body(model)
    if path is not None:
        return _in_chunks(model, path, rest, labels, accuracy, chunk, count)
    columns = _columns(labels)
    if "logits_to_keep" in inspect.signature(type(unwrap(model)).forward).parameters:
        # Numbers fit hidden states on any device; a tensor would have to be where the last block of
        # a spread model is.
        spread = len({parameter.device for parameter in model.parameters()}) > 1
        rest["logits_to_keep"] = columns.tolist() if spread else columns
    return _at_once(model, model(**rest), columns, labels, accuracy)


def causal_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items_in_batch: Tensor | int | None = None,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """The mean loss a label: what to call `backward()` on in a loop of your own, in place of
    `model(**inputs).loss`.

    `num_items_in_batch` replaces the count of this batch, for gradient accumulation over several:
    the count of all. A batch without labels is 0, not nan. See `token_loss`.

        loss = causal_loss(model, batch) # input_ids, labels [b, s], and whatever else the model
        takes loss.backward()
    """
    result = token_loss(model, inputs, chunk=chunk)
    items = result.items if num_items_in_batch is None else num_items_in_batch
    loss = result.total / torch.as_tensor(items, device=result.total.device).clamp(min=1)
    return loss if result.extra is None else loss + result.extra.to(loss.device)


def label_losses(
    model: nn.Module, inputs: Mapping[str, Any], *, accuracy: bool = False, chunk: int = CHUNK
) -> LabelLosses:
    """`token_loss` before it is summed, for rows that differ in what they weigh. It can be
    differentiated once.

    Raises:
        ConfigError: the model adds a loss over all rows, the balance of its experts, which
            gradients would lack.
    """
    labels: Tensor = inputs["labels"]
    rest = {
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
    wanted, path = target != IGNORED, _body(model)
    counts, outputs = wanted.sum(1), None
    # whose gradient is asked for
    whole = torch.is_grad_enabled() and path is not None and _changes_head(model, path)
    if path is not None and wanted.any() and not whole:
        rows, sums, outputs, _ = _chunks(model, path, rest, labels, accuracy, chunk, None)
        if rows is not None and sums is not None:
            return LabelLosses(
                sums.label_losses(rows), counts, torch.cat(sums.right) if accuracy else None
            )
    logits = (model(**rest) if outputs is None else outputs).logits[:, :-1][wanted]
    wide = logits.to(at_least_float32(logits.dtype))
    answers = target[wanted].to(wide.device)
    losses = functional.cross_entropy(wide, answers, reduction="none")
    return LabelLosses(losses, counts, wide.argmax(dim=-1) == answers if accuracy else None)


def log_probabilities(
    model: nn.Module, inputs: Mapping[str, Any], temperature: float = 1.0
) -> Tensor:
    """log p of each label from the tokens before it, [b, s - 1]; 0 where there is none.
    Differentiable as often as the model.

    `inputs` as `token_loss` takes them. The rows with a label alone reach the head, where the
    model's forward can be cut there; their logits, divided by `temperature`, are kept for backward:
    what a preference weighs them by is known only once all of them are."""
    labels: Tensor = inputs["labels"]
    rest = {
        "use_cache": False,
        **{name: value for name, value in inputs.items() if name != "labels"},
    }
    target = labels[:, 1:]
    wanted = target != IGNORED
    logits = _labelled_logits(model, rest, labels)  # [n, v], in the order of wanted.nonzero()
    answers = target[wanted].to(logits.device)
    wide = logits.to(at_least_float32(logits.dtype)) / temperature
    told = -functional.cross_entropy(wide, answers, reduction="none")
    return told.new_zeros(wanted.shape).masked_scatter(wanted.to(told.device), told)


def _labelled_logits(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """The logits [n, v] of the positions whose next token has a label."""
    wanted, path, cut = (
        functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED,
        _body(model),
        False,
    )
    if path is None:
        return model(**inputs).logits[wanted]
    places = wanted.flatten().nonzero().squeeze(1)  # [n]
    body, head = model.get_submodule(".".join(path)), _Head(model, path, inputs)

    def answer(*args: Any, **kwargs: Any) -> Any:
        nonlocal cut
        output = body(*args, **kwargs)
        flat = head.rows_of(output, labels, places)
        if flat is None:
            return output
        cut = True
        return _with_rows(output, flat.index_select(0, places.to(flat.device)))

    logits = _view(model, path, answer)(**inputs).logits
    head.forget()
    return logits[0] if cut else logits[wanted.to(logits.device)]


def _columns(labels: Tensor) -> Tensor:
    columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    # Nothing to learn, yet the graph must reach the parameters: a distributed backward waits for
    # every rank.
    return columns if len(columns) else torch.zeros(1, dtype=torch.long, device=labels.device)


def _at_once(
    model: nn.Module, outputs: Any, columns: Tensor, labels: Tensor, accuracy: bool
) -> TokenLoss:
    """The loss by logits of all columns, or of these alone."""
    logits = outputs.logits
    if logits.shape[1] != len(columns):
        logits = logits[:, columns.to(logits.device)]
    target = labels[:, 1:][:, columns]  # [b, c]: what the logits [b, c, v] should say
    cells = (target != IGNORED).flatten().nonzero().squeeze(1)  # [n]
    answers = target.flatten()[cells].to(logits.device)  # [n]
    chosen = logits.flatten(0, 1)[cells.to(logits.device)]  # [n, v]
    chosen = chosen.to(at_least_float32(chosen.dtype))
    total = (
        functional.cross_entropy(chosen, answers, reduction="sum")
        if len(answers)
        else chosen.sum() * 0.0
    )
    correct = (
        (chosen.detach().argmax(dim=-1) == answers).sum()
        if accuracy
        else torch.zeros_like(answers.sum())
    )
    items = torch.full_like(correct, len(answers))
    return TokenLoss(total, items, correct, _balance(model, outputs))


def _balance(model: nn.Module, outputs: Any) -> Tensor | None:
    """The load-balancing loss that a mixture-of-experts model returns when its config asks for
    router logits."""
    extra, config = getattr(outputs, "aux_loss", None), getattr(unwrap(model), "config", None)
    return (
        extra * float(getattr(config, "router_aux_loss_coef", 0.0))
        if isinstance(extra, Tensor)
        else None
    )


class _Chunks(NamedTuple):
    """The labelled rows [n, h] of a body's hidden states, None where a model could not be cut
    there; what their chunks came to, where there are any; the model's output, where it is needed
    still; its loss of balance."""

    rows: Tensor | None
    sums: ChunkedCrossEntropy | None
    outputs: Any
    extra: Tensor | None


def _in_chunks(
    model: nn.Module, path: ModulePath, inputs: dict[str, Any], labels: Tensor, accuracy: bool, chunk: int,
    count: int | None,
) -> TokenLoss:  # fmt: skip
    rows, sums, outputs, extra = _chunks(model, path, inputs, labels, accuracy, chunk, count)
    if rows is None:  # no body of this kind, or a head that looks at several rows at once
        return _at_once(model, outputs, _columns(labels), labels, accuracy)
    items = (labels[:, 1:] != IGNORED).sum()
    if sums is None:
        logits = outputs.logits
        items = items.to(logits.device)
        return TokenLoss(logits.to(at_least_float32(logits.dtype)).sum() * 0.0, items, items, extra)
    return TokenLoss(sums.differentiable(rows), items.to(sums.total.device), sums.correct, extra)


def _chunks(
    model: nn.Module, path: ModulePath, inputs: dict[str, Any], labels: Tensor, accuracy: bool, chunk: int,
    count: int | None,
) -> _Chunks:  # fmt: skip
    # [b, s]: what the hidden state here should say
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wanted = targets != IGNORED
    if count is None or labels.is_cpu:
        places = wanted.flatten().nonzero().squeeze(1)  # [n]
    else:
        places = wanted.flatten().byte().argsort(descending=True, stable=True)[:count]
    answers = targets.flatten().index_select(0, places)  # [n]
    body, head = model.get_submodule(".".join(path)), _Head(model, path, inputs)
    rows: Tensor | None = None
    first = torch.empty(0)

    def answer(*args: Any, **kwargs: Any) -> Any:
        """The body's output with the first chunk of rows in it: the rest of the forward, which may
        need the others of the body's outputs for a loss of its own, is then the head on that
        chunk."""
        nonlocal rows, first
        output = body(*args, **kwargs)
        flat = head.rows_of(output, labels, places)
        if flat is None:
            return output
        if len(places) == 0:
            rows = first = flat[:1]  # nothing to learn, yet the graph must reach the parameters
        else:
            rows = flat.index_select(0, places.to(flat.device))  # [n, h]
            first = leaf_of(rows[:chunk])
        return _with_rows(output, first)

    outputs = head.reusing(_view(model, path, answer))(**inputs)
    extra = None if rows is None else _balance(model, outputs)
    if rows is None or len(places) == 0:
        head.forget()
        return _Chunks(rows, None, outputs, extra)
    sums = ChunkedCrossEntropy(outputs.logits, accuracy)
    sums.add(first, outputs.logits, answers[:chunk])
    del outputs  # and with it these logits
    for start in range(chunk, len(rows), chunk):
        leaf = leaf_of(rows[start : start + chunk])
        sums.add(leaf, head(leaf).logits, answers[start : start + chunk])
    head.forget()
    return _Chunks(rows, sums, None, extra)


class _Head:
    """What a model's forward does after its body, on rows [n, h] of which each is treated alone."""

    def __init__(self, model: nn.Module, path: ModulePath, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        if "output_router_logits" in inspect.signature(base_class(model).forward).parameters:
            # the balance of the experts is known already
            self.inputs = {
                **inputs,
                "output_router_logits": False,
            }
        self.output: Any = None
        self.rows = self.memory = torch.empty(0)
        self.taken = False
        self.view = self.reusing(
            _view(model, path, lambda *_, **__: _with_rows(self.output, self.rows))
        )

    def __call__(self, rows: Tensor) -> Any:
        self.rows, self.taken = rows, False
        return self.view(**self.inputs)

    def forget(self) -> None:
        """Let go of the tensors of the call: its view of the model and this hold each other, until
        garbage is collected."""
        self.output, self.rows, self.memory, self.inputs = None, torch.empty(0), torch.empty(0), {}

    def within(self, rows: Tensor) -> Any:
        """The same while the model's forward runs: a wrapper around it, such as accelerate's
        autocast, is around this already, and could not be entered twice."""
        self.rows = rows
        return base_class(self.model).forward(self.view, **self.inputs)

    def rows_of(self, output: Any, labels: Tensor, places: Tensor) -> Tensor | None:
        """The body's hidden states as rows [b · s, h]; None if it gave none for each token of
        labels [b, s], or if the head looks at several at once, which those at `places` are tried
        for."""
        self.output = output
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != labels.shape:
            return None
        flat = hidden.flatten(0, 1)
        return flat if self.is_rowwise(flat[places[:3].to(flat.device)].detach()) else None

    def is_rowwise(self, rows: Tensor) -> bool:
        """Whether the logits of some rows stay the same among others and in another order; tried
        once a model."""
        known = _ROWWISE.get(self.model)
        if known is not None or len(rows) == 0:
            return known is not False
        attached, self.taken = adapters_of(self.model), True  # both of these are needed at once
        # Without the adapter, whose dropout would differ from run to run. Not under no_grad:
        # autocast would keep the weights that it casts there, and the first chunk would get them
        # without gradient.
        with (
            nullcontext()
            if attached is None or attached.stacked
            else use(self.model, attached.merged)
        ):
            alone = self.within(rows).logits
            among = self.within(torch.cat([-rows, rows.flip(0)])).logits
        known = alone.shape[:-1] == (1, len(rows)) and among.shape == (
            1,
            2 * len(rows),
            alone.shape[-1],
        )
        if known:
            one, other = alone.detach()[0], among.detach()[0, len(rows) :].flip(0)
            tolerance = torch.finfo(one.dtype).eps ** 0.5 * float(one.abs().max())
            known = torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
        _ROWWISE[self.model], self.taken = known, False
        return known

    def reusing(self, model: nn.Module) -> nn.Module:
        """A view of the model whose output layer writes the logits of each chunk over those of the
        one before, if it is a frozen one on a processor, where fresh memory of that size takes its
        time."""
        layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
        name = next(
            (name for name, child in model._modules.items() if child is layer is not None), None
        )
        # hooks, or a forward of its own (accelerate's), do more than the class says
        watched = ("forward", *_HOOKS)
        if (
            name is None
            or type(layer) is not nn.Linear
            or any(layer.__dict__.get(word) for word in watched)
        ):
            return model

        def forward(rows: Tensor) -> Tensor:
            weight, bias = layer.weight, layer.bias
            plain = (
                rows.is_cpu
                and fused.applies(rows, weight)
                and (bias is None or not bias.requires_grad)
            )
            if self.taken or not plain:  # a forward may ask twice, and needs both
                return functional.linear(rows, weight, bias)
            self.taken, size = True, rows.shape[:-1].numel() * len(weight)
            if self.memory.numel() < size:
                self.memory = rows.new_empty(size)
            return _Into.apply(rows, weight, bias, self.memory)  # pyright: ignore[reportReturnType]

        return _view(model, (name,), forward)


class _Into(torch.autograd.Function):
    """A frozen linear layer whose output lies in given memory."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor
    ) -> Tensor:
        flat = rows.flatten(0, -2)
        place = memory[: len(flat) * len(weight)].view(len(flat), len(weight))
        ctx.save_for_backward(weight)
        if bias is None:
            torch.mm(flat, weight.mT, out=place)
        else:
            torch.addmm(bias, flat, weight.mT, out=place)
        return place.view(*rows.shape[:-1], len(weight)).data  # which forgets that it is a view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None, None, None


def _body(model: nn.Module) -> ModulePath | None:
    """The path to the module whose output is a model's hidden states, if the model's forward can be
    cut there."""
    if not hasattr(type(model), "base_model_prefix"):
        return None  # none of transformers', or one inside a wrapper that needs to see each call (DDP, FSDP)
    if torch.compiler.is_compiling() or model.__dict__.get("_compiled_call_impl") is not None:
        return None  # what is differentiated at once is no part of a compiled graph
    if any(model.__dict__.get(hooks) for hooks in _HOOKS):
        return None  # they expect one call a batch (FSDP2's do)
    own = inspect.unwrap(base_class(model).forward)
    forward = model.__dict__.get("forward")
    if forward is not None and not (
        isinstance(forward, MethodType)
        and forward.__self__ is model
        and inspect.unwrap(forward.__func__) is own
    ):
        return None  # replaced by something else than a wrapper of the model's own, such as accelerate's autocast
    found = [(path, late) for path, late in submodule_calls(own) if _is_model(model, path)]
    if len(found) != 1 or found[0][1]:
        return None
    path = found[0][0]
    if _sees_chunks(model, path):
        return None
    attached = adapters_of(model)
    if attached is not None:
        chosen = context.current.selection.get(attached.uid, attached.default)
        if chosen.name is None and chosen.parts and _changes_outside(model, path, chosen.parts):
            return None  # an adapter for each row of the batch, which the head would no longer know
    return path


def _sees_chunks(model: nn.Module, path: ModulePath) -> bool:
    """Whether what is outside the body would do something a chunk that it should do once a batch:
    gather a head that is spread, or call a hook on the gradient of a parameter."""
    outside = list(_outside(model, path))
    values = [
        value for module in outside for value in module._parameters.values() if value is not None
    ]
    if any(isinstance(value, DTensor) for value in values):
        inside = {id(value) for value in model.get_submodule(".".join(path)).parameters()}
        if any(isinstance(value, DTensor) and id(value) not in inside for value in values):
            return True
    # a walk through the whole model in each step would cost as much as a layer; yet an adapted head
    # may read the change of a weight that it shares with the body, which lies there. Not seen: a
    # forward that reads a weight of the body by its path, as none of transformers' does
    adapted = any(isinstance(module, LayerState) for module in outside)
    return any(
        value.requires_grad and value._backward_hooks
        for value in (model.parameters() if adapted else values)
    )


def _changes_outside(model: nn.Module, path: ModulePath, parts: Mapping[Any, Any]) -> bool:
    """Whether an adapter does something in a model besides its body."""
    outside = [one.key for one in _outside(model, path) if isinstance(one, LayerState)]
    keys = {key[0] if isinstance(key, tuple) else key for key in parts} if outside else set()
    return any(key in keys for key in outside)


def _changes_head(model: nn.Module, path: ModulePath) -> bool:
    """Whether the adapter that is selected does something in a model besides its body."""
    attached = adapters_of(model)
    chosen = (
        None if attached is None else context.current.selection.get(attached.uid, attached.default)
    )
    return (
        chosen is not None
        and bool(chosen.parts)
        and _changes_outside(model, path, chosen.parts or {})
    )


def _outside(module: nn.Module, path: ModulePath) -> Iterator[nn.Module]:
    """A module and those below it, but for the one at the end of a path and those below that."""
    if not path:
        return
    yield module
    for name, child in module._modules.items():
        if name == path[0]:
            yield from _outside(child, path[1:])  # pyright: ignore[reportArgumentType]
        elif child is not None:
            yield from child.modules()


def _is_model(model: nn.Module, path: ModulePath) -> bool:
    """Whether there is one of transformers' models at the end of a path of attributes."""
    module = reduce(lambda module, name: getattr(module, "_modules", {}).get(name), path, model)
    return hasattr(type(module), "base_model_prefix")


def _view(module: nn.Module, path: ModulePath, answer: Callable[..., Any]) -> nn.Module:
    if not path:
        seen = view(module, type(module), {})
        seen.__dict__.update(
            {hooks: OrderedDict() for hooks in _HOOKS}, _compiled_call_impl=None, forward=answer
        )
        return seen
    below = _view(module._modules[path[0]], path[1:], answer)  # pyright: ignore[reportArgumentType]
    seen = view(module, type(module), {}, {path[0]: below})
    forward = seen.__dict__.get("forward")
    if isinstance(forward, MethodType):
        seen.__dict__["forward"] = MethodType(forward.__func__, seen)
    return seen


def _with_rows(output: Any, rows: Tensor) -> Any:
    changed = copy.copy(output)
    changed.last_hidden_state = rows[None]
    return changed
