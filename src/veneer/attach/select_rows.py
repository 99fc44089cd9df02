"""Rows of one batch that use different adapters: ``with veneer.use(model, ["a", None, "b"]):
model(x)``.

Every layer takes the rows of each distinct adapter out of its inputs, runs on them alone, and puts
the outputs back in order. What such a run calls below uses that one adapter too. That is right for
every layer whose inputs hold the rows along an axis that its kind knows (``Layer.take``), and an
error for any other.

A linear layer has one product with its weight for all rows instead, where that is plain and frozen:
on a processor if the rows of an adapter are neighbours (``kernels/spans.py``), with gradients to
all of them; on a device, where a launch is dear, for plain changes, which are two products of all
rows there (``kernels/batched.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach.adapted_module import base_class, base_forward, method_of, walk
from veneer.attach.blend import common_base_adapter
from veneer.attach.fused_linear import PendingOutputs, identities, seed_of
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.layer_call import with_update
from veneer.attach.routed_rows import spread, tokens_a_row
from veneer.attach.state import BASE, STATE, ActiveAdapter, ModelAdapters
from veneer.errors import SelectionError
from veneer.kernels import batched, device, fused
from veneer.kernels.dropout import seed as new_seed
from veneer.kernels.spans import Span, can_batch, linear, linears
from veneer.layers import LAYERS, Layer
from veneer.layers._base import GENERAL

#: outputs of layers that wait for their calls
_READY = PendingOutputs()
#: tensors, and what holds none
_DIVISIBLE = (Tensor, bool, int, float, complex, str, Enum, torch.Size, torch.dtype, torch.device)


class Parts(Mapping[Any, Any]):
    """The part at a layer: that of each distinct adapter, for its rows. ``selections``: what the
    rows use, each once; ``rows`` are the indices of those that use it, ``count`` is how many rows
    there are in all. ``time_first``: whether the model has a module whose inputs hold the rows
    along the second axis."""

    def __init__(
        self,
        uid: str,
        selections: Sequence[ActiveAdapter],
        rows: Sequence[Tensor],
        count: int,
        time_first: bool,
    ) -> None:
        self.uid, self.selections, self.rows, self.count, self.time_first = (
            uid,
            selections,
            rows,
            count,
            time_first,
        )
        #: False: every row uses the base alone, and layers only see whether there are so many rows
        self.adapted = any(selected is not BASE for selected in selections)
        self.order = torch.cat(list(rows)).argsort()
        #: of each of the selections the first row and the one after the last, if its rows are
        #: neighbours, in order
        self.spans = _spans(rows)
        self._moved: dict[torch.device, tuple[Sequence[Tensor], Tensor]] = {}
        self._made: dict[Any, Tensor] = {}
        self._by_rows: dict[Any, _ByRows] = {}
        places = {row: place for place, own in enumerate(rows) for row in own.tolist()}
        self.of_row = [places[row] for row in range(count)]

    def __getitem__(self, key: Any) -> Any:
        # or an error: one is gone
        parts = [selected.table.get(key) for selected in self.selections]
        known = self._by_rows.get(key)
        if known is None or known.parts != parts:
            if all(part is None for part in parts) and self.adapted:
                raise KeyError(key)
            known = self._by_rows[key] = _ByRows(self, parts)
        return known

    def __contains__(self, key: Any) -> bool:
        return not self.adapted or any(key in selected.table for selected in self.selections)

    def are_rows_of(self, x: Any) -> bool:
        """Whether the first axis of x holds the rows, and no other may."""
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != self.count:
            return False
        return not (self.time_first and x.ndim > 2 and x.shape[1] == self.count)

    def on(self, inputs: Any) -> tuple[Sequence[Tensor], Tensor]:
        """``rows`` and ``order`` on the device of a call's inputs, brought there at once and
        kept."""
        if not isinstance(inputs, Tensor):
            inputs = next(
                (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)),
                self.order,
            )
        if inputs.is_cpu:
            return self.rows, self.order
        device = inputs.device
        if device not in self._moved:
            *rows, order = (
                torch.cat([*self.rows, self.order])
                .to(device, non_blocking=True)
                .split([*map(len, self.rows), self.count])
            )
            self._moved[device] = rows, order
        return self._moved[device]

    def zeros(self, count: int, like: Tensor) -> Tensor:
        """So many, which nobody writes to: what changes nothing in the place of factors."""
        key = like.dtype, like.device
        if key not in self._made or len(self._made[key]) < count:
            with torch.inference_mode(False):
                self._made[key] = torch.zeros(count, dtype=like.dtype, device=like.device)
        return self._made[key]

    def scales(self, parts: Sequence[float], like: Tensor) -> Tensor:
        """A factor of each row, [N, 1, 1], given those of the distinct adapters."""
        key = *parts, like.dtype, like.device
        if key not in self._made:
            with torch.inference_mode(False):
                found = torch.tensor([parts[place] for place in self.of_row], dtype=like.dtype)[
                    :, None, None
                ]
                self._made[key] = found.to(like.device, non_blocking=True)
        return self._made[key]

    @contextmanager
    def only(self, selected: ActiveAdapter, nothing_below: bool = False) -> Iterator[None]:
        """A block in which one of the adapters is selected alone, with its own random numbers;
        ``nothing_below`` would ask what is selected."""
        if selected.stream is None and nothing_below:
            yield
            return
        with (
            context.override({self.uid: selected}),
            selected.stream or nullcontext(),
        ):
            yield

    def __iter__(self):
        return iter(
            dict.fromkeys(key for selected in self.selections for key in selected.parts or ())
        )

    def __len__(self) -> int:
        return len(list(iter(self)))


class _ByRows:
    """Stands where a ``LayerAdapter`` stands, for calls of these rows. ``changes``: those of the
    parts that change something here, and ``bounds`` the rows of each, if every one is plain and the
    rows of an adapter are neighbours."""

    def __init__(self, whole: Parts, parts: Sequence[Any]) -> None:
        self.whole, self.parts = whole, parts
        some = [part for part in parts if part is not None]
        plain = bool(some and whole.spans) and all(
            isinstance(own, LayerAdapter) and own.direct is not None for own in some
        )
        self.known: Any = some[0].direct if plain else None
        self.changes: list[Any] = [part.direct.change for part in some] if plain else []
        own = zip(whole.spans or (), parts, strict=False)
        self.bounds = [bounds for bounds, part in own if part is not None]
        self._spans: tuple[Any, tuple[Span, ...]] = (None, ())
        self.others = self._others() if self.changes else []

    def _others(self) -> list[tuple[nn.Module, _ByRows]]:
        """The layers that read the same x after this one, if they are the same for every adapter
        that changes it."""
        parts = [part for part in self.parts if part is not None]
        members = [part.together.members for part in parts if part.together is not None]
        if len(members) < len(parts) or any(
            own[0][1] is not part for own, part in zip(members, parts, strict=True)
        ):
            return []
        modules = [[module for module, _ in own] for own in members]
        if any(own != modules[0] for own in modules):
            return []
        found = [(module, self.whole[module._modules[STATE].key]) for module in modules[0][1:]]
        return [(module, own) for module, own in found if own.changes and own.bounds == self.bounds]

    def reached_ids(self, method: str = "forward"):
        for part in self.parts:
            yield from () if part is None else part.reached_ids(method)

    def run(
        self,
        module: Any,
        base: Any,
        layer_state: Any,
        args: tuple,
        kwargs: dict,
        now: Any,
        share=True,
        method="forward",
    ) -> Any:
        if len(self.parts) == 1:
            return self._undivided(module, base, layer_state, args, kwargs, now, share, method)
        x = args[0] if len(args) == 1 and not kwargs and method == "forward" else None
        seeds: list[int | None] = [None] * len(self.parts)
        if x is not None and now.path is None:
            y = self._plain(module, x) if self.changes else None
            if y is not None:
                return y
            seeds = self._seeds(module, x)
            y = self._at_once(module, x)
            y = self._by_spans(module, layer_state, x, seeds) if y is None else y
            if y is not None:
                return y
        whole, kind = (
            self.whole,
            (layer_state.layer if method == "forward" else None) or LAYERS[GENERAL],
        )
        # nobody below asks what is selected
        alone = all(child is layer_state for child in module._modules.values())
        tokens = tokens_a_row(module, (args, kwargs), whole.count) if kind.name == GENERAL else None
        if tokens is not None and tokens > 1 and whole.time_first:
            tokens = None
        refusal = self._refusal(kind, (args, kwargs), alone, routed=tokens is not None)
        if refusal is not None:
            raise _cannot_tell(module, refusal)
        outputs = []
        every, order = whole.on(args[0] if args and isinstance(args[0], Tensor) else (args, kwargs))
        for selected, rows, part, seed in zip(
            whole.selections, every, self.parts, seeds, strict=True
        ):
            drawn = {} if seed is None else {"seed": seed}
            try:
                own, named = kind.take(
                    module, args, kwargs, spread(rows, tokens or 1), whole.count * (tokens or 1)
                )
            except LookupError:
                raise _cannot_tell(
                    module, f"whose inputs do not hold the {whole.count} rows of the batch"
                ) from None
            with whole.only(selected, alone):
                if part is None:
                    outputs.append(method_of(base, method)(module, *own, **named))
                else:
                    y = part.run(
                        module,
                        base,
                        layer_state,
                        own,
                        named,
                        now,
                        share=False,
                        method=method,
                        **drawn,
                    )
                    outputs.append(y)
        return kind.put(module, outputs, spread(order, tokens or 1))

    def _undivided(
        self,
        module: Any,
        base: Any,
        layer_state: Any,
        args: tuple,
        kwargs: dict,
        now: Any,
        share: bool,
        method: str,
    ) -> Any:
        """The output where all rows use the same: that of a plain call, if there are so many
        rows."""
        whole, (part,), (selected,) = self.whole, self.parts, self.whole.selections
        kind = (layer_state.layer if method == "forward" else None) or LAYERS[GENERAL]
        x = args[0] if len(args) == 1 and not kwargs else None
        if not (
            type(kind).take is Layer.take
            and isinstance(x, Tensor)
            and x.ndim
            and len(x) == whole.count
        ):
            tokens = (
                tokens_a_row(module, (args, kwargs), whole.count) if kind.name == GENERAL else None
            )
            first = spread(whole.rows[0][:1], tokens or 1)
            try:
                kind.take(module, args, kwargs, first, whole.count * (tokens or 1))
            except LookupError:
                raise _cannot_tell(
                    module, f"whose inputs do not hold the {whole.count} rows of the batch"
                ) from None
        alone = all(child is layer_state for child in module._modules.values())
        with whole.only(selected, alone):
            if part is not None:
                return part.run(
                    module, base, layer_state, args, kwargs, now, share=share, method=method
                )
            if method == "forward":
                return base_forward(module, base, *args, **kwargs)
            return method_of(base, method)(module, *args, **kwargs)

    def _seeds(self, module: Any, x: Any) -> list[int | None]:
        """Those of the dropout of each part that is direct, as if its rows were computed alone."""
        seeds: list[int | None] = []
        for selected, part in zip(self.whole.selections, self.parts, strict=True):
            known = part.direct if isinstance(part, LayerAdapter) else None
            weight = None if known is None else module._parameters.get(known.weight)
            if (
                weight is None
                or not known.drops
                or not (fused.applies(x, weight) or device.applies(x, weight))
            ):
                seeds.append(None)  # the paths that take a seed are these
                continue
            with selected.stream or nullcontext():
                seeds.append(seed_of(module, part, x))
        return seeds

    def _by_spans(
        self, module: Any, layer_state: Any, x: Any, seeds: Sequence[int | None]
    ) -> Tensor | None:
        """The output of a linear layer whose weight is plain, if each part is a low-rank change of
        that alone."""
        whole, reader = self.whole, layer_state.layer
        if not (
            whole.spans and layer_state.factors and layer_state.product and whole.are_rows_of(x)
        ):
            return None
        weight = module._parameters.get(reader.weight)
        bias = module._parameters.get("bias")
        if bias is None and getattr(module, "bias", None) is not None:
            return None  # pruned or parametrised since
        if (
            weight is None
            or not fused.applies(x, weight)
            or (bias is not None and bias.requires_grad)
        ):
            return None
        if not all(part is None or _low_rank_alone(part) for part in self.parts):
            return None
        lows = {
            i: part.changes[reader.weight].resolve(weight)
            for i, part in enumerate(self.parts)
            if part is not None and part.changes and part.direct is None
        }
        if layer_state.transposed and any(gain is not None for _, gain in lows.values()):
            return None  # rows of ΔW are rescaled along what this layer reads as inputs
        tokens = x.shape[1:-1].numel()
        spans, A, B, gained = [], [], [], {}
        for i, ((first, after), part, seed) in enumerate(
            zip(whole.spans, self.parts, seeds, strict=True)
        ):
            if part is None or not part.changes:
                continue
            if part.direct is not None:  # what `resolve` would say
                own: Any = part.direct.change
                A.append(own._parameters["A"])
                B.append(own._parameters["B"])
                spans.append(
                    Span(
                        first * tokens,
                        after * tokens,
                        own.rank,
                        own.scale,
                        part.direct.drops,
                        seed or 0,
                    )
                )
                continue
            low, gain = lows[i]
            change = part.changes[reader.weight]
            drops = change.dropout if change.training else 0.0
            if gain is not None:
                gained[i] = low, gain, drops
                continue
            if drops:
                with whole.selections[i].stream or nullcontext():
                    seed = new_seed()
            low = low.T if layer_state.transposed else low
            spans.append(
                Span(first * tokens, after * tokens, low.rank, low.scale, drops, seed or 0)
            )
            A.append(low.A)
            B.append(low.B)
        matrix = weight.mT if reader.out_axis == 1 else weight
        y = linear(x, matrix, None if gained else bias, spans, A, B)
        return self._with_gains(module, reader, x, y, bias, gained) if gained else y

    def _plain(self, module: Any, x: Any) -> Tensor | None:
        """The output of a linear layer where each part is one plain change that drops nothing in
        this call, and those of the layers that read the same x, if these are the same for every
        adapter (``fused_linear.SharedInputLayers``)."""
        spans = self._of_tokens(module, x)
        if spans is None:
            return None
        ready = _READY.take(x, self)
        if ready is not None and ready[1:] == (spans, self._reads(module)):
            return ready[0]
        layers: list[tuple[Any, _ByRows]] = [(module, self)]
        if self.others and torch.is_grad_enabled() and x.grad_fn is not None and can_batch(spans):
            for other, own in self.others:
                if own.known.fits(other, x) and own._of_tokens(other, x) == spans:
                    layers.append((other, own))
        A, B = zip(*(own._factors() for _, own in layers), strict=True)
        weights, biases = zip(*(own.known.frozen(other) for other, own in layers), strict=True)
        if len(layers) == 1:
            return linear(x, weights[0], biases[0], spans, A[0], B[0])
        y, *rest = linears(x, weights, biases, spans, A, B)
        made = zip(layers[1:], rest, strict=True)
        _READY.put(x, {own: (y, spans, own._reads(other)) for (other, own), y in made})
        return y

    def _of_tokens(self, module: Any, x: Any) -> tuple[Span, ...] | None:
        """The spans of the changes in x [N, *, in]; None where ``_plain`` is not for the call."""
        own, known = module._parameters, self.known
        if (
            not {known.weight, known.bias or known.weight} <= own.keys()
            or not self.whole.are_rows_of(x)
            or not fused.applies(x, own[known.weight])
        ):
            return None
        bias = None if known.bias is None else own[known.bias]
        if bias is not None and bias.requires_grad:
            return None
        tokens = x.shape[1] if x.ndim == 3 else x.shape[1:-1].numel()
        now = [tokens]
        for change in self.changes:
            if change.dropout and change.training:
                return None
            now += change.rank, change.scale
        if self._spans[0] != now:
            pairs = zip(self.bounds, self.changes, strict=True)
            spans = (
                Span(first * tokens, after * tokens, own.rank, own.scale)
                for (first, after), own in pairs
            )
            self._spans = now, tuple(spans)
        return self._spans[1]

    def _reads(self, module: Any) -> list[tuple[int, int]]:
        """What the output depends on besides x and the spans, to be compared."""
        own, known, (A, B) = module._parameters, self.known, self._factors()
        return [
            *identities(
                (own[known.weight], None if known.bias is None else own[known.bias], *A, *B)
            )
        ]

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        factors = [change._parameters for change in self.changes]
        return [each["A"] for each in factors], [each["B"] for each in factors]

    def _with_gains(
        self, module: Any, reader: Any, x: Tensor, y: Tensor, bias: Any, gained: dict[int, Any]
    ) -> Tensor:
        """y, of which these spans are x Wᵀ alone yet, and none has the bias."""
        spans: Any = self.whole.spans
        sizes, outputs = [after - first for first, after in spans], []
        for i, (own, rows) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            if i in gained:
                low, gain, drops = gained[i]
                with self.whole.selections[i].stream or nullcontext():
                    outputs.append(with_update(reader, module, own, rows, low, gain, bias, drops))
            else:
                outputs.append(rows if bias is None else rows + bias)
        return torch.cat(outputs)

    def _at_once(self, module: Any, x: Any) -> Tensor | None:
        """The output of a linear layer on a device whose changes are plain; None where it is not
        that."""
        if not self.whole.are_rows_of(x) or x.is_cpu:
            return None
        known = next((part.direct for part in self.parts if isinstance(part, LayerAdapter)), None)
        if (
            known is None
            or not {known.weight, known.bias or known.weight} <= module._parameters.keys()
        ):
            return None
        whole, weight = self.whole, module._parameters[known.weight]
        if not device.applies_alike(x, weight):
            return None
        bias = None if known.bias is None else module._parameters[known.bias]
        if bias is not None and torch.is_grad_enabled() and x.itemsize < 4:
            return None  # which is rounded once there
        pairs = [_factors(part, x) for part in self.parts]
        some = next((pair for pair in pairs if pair is not None), None)
        if some is None or any(
            part is not None and pair is None for part, pair in zip(self.parts, pairs, strict=True)
        ):
            return None
        A, B, scale = some
        if any(one.dtype != A.dtype for pair in pairs if pair is not None for one in pair[:2]):
            return None
        filled = [(A[:0], B[:, :0], scale) if pair is None else pair for pair in pairs]
        scales = [pair[2] for pair in filled]
        downs, ups, _ = zip(*(filled[place] for place in whole.of_row), strict=True)
        zeros = whole.zeros(max(map(len, downs)) * max(weight.shape), A)
        scale = scale if len({*scales}) == 1 else whole.scales(scales, x)
        return batched.linear(
            x, weight.mT if known.flipped else weight, bias, downs, ups, scale, zeros
        )

    def _refusal(self, kind: Layer, inputs: Any, alone: bool, routed: bool) -> str | None:
        """Why the rows of a call cannot be told, or None: an object that no rows can be taken out
        of, or two axes that count the rows: in a model that puts time first, or of a mask of [time,
        time] where a module runs others."""
        for value in () if alone else _objects(inputs):
            return f"given a {type(value).__name__}, which cannot be divided into rows"
        if routed or type(kind).take is not Layer.take:
            return None
        square, leaves = (
            (self.whole.count,) * 2,
            [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)],
        )
        masks = not alone and len(leaves) > 1
        unclear = any(
            (
                masks
                if x.dim() == 2 and (x.is_floating_point() or x.dtype == torch.bool)
                else self.whole.time_first
            )
            for x in leaves
            if x.shape[:2] == square
        )
        return (
            f"with {self.whole.count} along two axes, of which either may be the rows"
            if unclear
            else None
        )


def _factors(part: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(A [r, in], B [out, r], the scale) of a plain change that drops nothing in this call."""
    if not isinstance(part, LayerAdapter) or part.direct is None or part.direct.drops:
        return None
    change = part.direct.change
    factors = change.adapter_parameters
    A, B = factors["A"][0], factors["B"][0]
    return (A, B, change.scale) if A.device == B.device == x.device else None


def _low_rank_alone(part: Any) -> bool:
    """Whether a part does nothing but change weights of its layer at a low rank."""
    return (
        isinstance(part, LayerAdapter)
        and not part.read_below
        and not (part.full._parameters or part.full._buffers)
    )


def _spans(rows: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    flat = [row for own in rows for row in own.tolist()]
    return (
        [*pairwise(accumulate(map(len, rows), initial=0))]
        if flat == list(range(len(flat)))
        else None
    )


def _cannot_tell(module: nn.Module, why: str) -> SelectionError:
    do = "exclude that layer, or run each adapter on its rows alone"
    return SelectionError(f"a {base_class(module).__name__} {why}", "one row an adapter", do)


def _objects(value: Any) -> Iterator[Any]:
    """What in a call's arguments may hold rows where nobody can take them out, such as a cache of
    keys and values."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if type(value) in (tuple, list):
        for one in value:
            yield from _objects(one)
    elif not (value is None or callable(value) or isinstance(value, _DIVISIBLE)):
        yield value


def by_rows(
    model: nn.Module, attached: ModelAdapters, selections: Sequence[ActiveAdapter]
) -> ActiveAdapter:
    """A selection that uses ``selections[i]`` for row i; rows that use the same hold the same
    object."""
    distinct = list(dict.fromkeys(selections))
    if not distinct:
        raise SelectionError(
            "no names", "one name or None for each row", "name an adapter for each row"
        )
    rows = [
        torch.tensor([i for i, one in enumerate(selections) if one is own], device="cpu")
        for own in distinct
    ]
    parts = Parts(attached.uid, distinct, rows, len(selections), time_first(model))
    merged = (
        distinct[0].name if len(distinct) == 1 and distinct[0].name == attached.merged else None
    )
    return ActiveAdapter(merged, parts, common_base_adapter(distinct))


def time_first(model: nn.Module) -> bool:
    """Whether a module of the model takes inputs that hold the rows along the second axis."""
    return any(getattr(module, "batch_first", True) is False for _, module in walk(model))
