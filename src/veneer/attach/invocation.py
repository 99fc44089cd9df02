"""Find the invocation tokens of adapters in the calls of a model (aLoRA; Greenewald et al. 2025,
"Activated LoRA", arXiv:2504.12397).

    invocation_tokens     1 2
    input_ids             5 9 1 2 7 1 2 4 6        the last occurrence counts
                          base      │ adapter      with the invocation's own tokens
    a later call          8                        the same cache: the adapter goes on acting

A hook of every module of the model whose forward takes ``input_ids`` searches them, row by row, and
stores the result in the context of the call, where the layers find it (``InvokedAdapter``). The
modules below that call each other with the same ids use the outer one's result.

What a cache holds already was searched by the call that filled it; its result stays with the cache,
as columns of the full sequence. Within ``generate`` the prompt alone decides, as in PEFT: a token
that is generated invokes nothing. So ``generate`` is overridden, and searches before it runs.

Activation checkpointing runs layers again in backward, after the call has ended. The function of
transformers that checkpoints a layer is wrapped, so that it runs the layer with the result of the
call that it belongs to.

Rejected: to pass the starts as an argument, as PEFT does (``alora_offsets``): a call that does not
pass it is silently the base's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.layer.adapted_module import walk
from veneer.attach.layer.invoked_adapter import InvokedAdapter, InvokedTokens
from veneer.attach.layer.state import ActiveAdapter, ModelAdapters
from veneer.attach.rows.select_rows import RowAdapters
from veneer.attach.source.method_overrides import original, override_method
from veneer.distributed import base_class
from veneer.errors import SelectionError

#: the arguments in which models of transformers take a cache, and the outputs that return it
_CACHES = ("cache", "past_key_values", "cache_params")
#: arguments that come with several sequences in one row
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
#: the attribute of a cache with the ``CachedStarts`` of the adapters that filled it
_STARTS = "_veneer_starts"
#: the attribute of a layer of transformers with the function that checkpoints it
_CHECKPOINT = "_gradient_checkpointing_func"


@dataclass(frozen=True)
class CachedStarts:
    """The invocation of one adapter in the tokens that a cache holds.

    Fields:
        starts: for each row of the batch the column from which the adapter acts, or None.
        length: the number of columns that were searched.
        tail: the last of these tokens [rows, n], with which a later call may complete an
            invocation.
    """

    starts: Sequence[int | None]
    length: int
    tail: Tensor

    def after(self, length: int, rows: int, size: int) -> CachedStarts:
        """The same for a cache that now holds ``length`` columns of ``rows`` rows. It may have been
        cut since, or its rows repeated. ``size``: the number of invocation tokens."""
        starts = [
            None if start is None or start + size > length else start
            for start in _repeat(self.starts, rows, "a cache")
        ]
        tail = self.tail.repeat_interleave(rows // len(self.starts), 0)
        return CachedStarts(starts, length, tail if length == self.length else tail[:, :0])


@dataclass(frozen=True)
class PromptStarts:
    """The columns from which adapters act in the rows of ``generate``'s prompt, or None, by the
    adapter's name."""

    starts: Mapping[str, Sequence[int | None]]

    def of_rows(self, name: str, rows: int) -> list[int | None]:
        """The starts in a call of so many rows: several for each row of the prompt, where these are
        beams or samples."""
        return _repeat(self.starts[name], rows, "a prompt")


def _repeat(starts: Sequence[int | None], rows: int, source: str) -> list[int | None]:
    """The starts of the rows of a call, of which each row of ``source`` has become several."""
    times, rest = divmod(rows, len(starts))
    if rest or not times:
        problem = f"a call of {rows} rows behind {source} of {len(starts)}"
        do = "repeat its rows, or start anew"
        raise SelectionError(problem, "the rows in which invocation tokens were searched", do)
    return [start for start in starts for _ in range(times)]


@dataclass
class InvokedCall:
    """The invocations in one call of a model: the tokens on which each adapter acts, and the starts
    that its cache is to remember, by the adapter's name."""

    tokens: dict[str, InvokedTokens] = field(default_factory=dict)
    cached: dict[str, CachedStarts] = field(default_factory=dict)


# ---- on and off ----------------------------------------------------------------------------------


def with_invocation(selected: dict[Any, Any], name: str) -> dict[Any, Any]:
    """The table of an ``ActiveAdapter`` with invocation tokens. A layer adapter without a change (a
    switch of a fast path) acts on every token."""
    return {
        key: InvokedAdapter(layer_adapter, name) if layer_adapter.changes else layer_adapter
        for key, layer_adapter in selected.items()
    }


def takes_input_ids(module: nn.Module) -> bool:
    return "input_ids" in _parameters(base_class(module))


def find_invocations(model: nn.Module, attached: ModelAdapters) -> None:
    """Let calls of the model find the invocation tokens of its adapters, if some have any, else
    leave its modules as they were."""
    wanted = any(config.invocation_tokens for config in attached.configs.values())
    for module in {id(module): module for _, module in walk(model)}.values():
        _remove_hooks(module)
        if wanted and takes_input_ids(module):
            module.register_forward_pre_hook(partial(_begin_call, attached), with_kwargs=True)
            module.register_forward_hook(
                partial(_end_call, attached), with_kwargs=True, always_call=True
            )
            if callable(getattr(type(module), "generate", None)):
                override_method(module, "generate", _generate)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, partial) and hook.func in (_begin_call, _end_call):
                del hooks[number]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(number, None)
    checkpoint = module.__dict__.get(_CHECKPOINT)
    if isinstance(checkpoint, _CheckpointInCall):
        setattr(module, _CHECKPOINT, checkpoint.function)


# ---- a call --------------------------------------------------------------------------------------


def _begin_call(attached: ModelAdapters, module: nn.Module, args: tuple, kwargs: Any) -> None:
    """Pre-forward hook: search the ids of the call, unless a module above has done it."""
    present = context.current
    invoked = present.invoked
    if attached.uid not in invoked:
        users = _users(attached)
        if users:
            invoked = {**invoked, attached.uid: _search_call(attached, module, users, args, kwargs)}
            if torch.is_grad_enabled():
                _checkpoint_in_calls(module)
    context.enter(module, {}, invoked=invoked)


def _end_call(
    attached: ModelAdapters, module: nn.Module, args: tuple, kwargs: Any, output: Any
) -> None:
    """Forward hook, also after an error: the cache of the call remembers what was found."""
    invoked_call = context.current.invoked.get(attached.uid)
    if not context.leave(module) or invoked_call is None or not invoked_call.cached:
        return
    filled = _cache_in(_arguments(module, args, kwargs)) or _cache_of(output)
    if filled is not None:
        earlier = getattr(filled, _STARTS, {})
        latest = {(attached.uid, name): starts for name, starts in invoked_call.cached.items()}
        setattr(filled, _STARTS, {**earlier, **latest})


def _users(attached: ModelAdapters) -> list[tuple[ActiveAdapter, Sequence[int] | None]]:
    """The adapters with invocation tokens that a call uses, each with the indices of its rows; None
    for all rows."""
    chosen = context.current.selection.get(attached.uid, attached.default)
    if chosen.layer_adapters is None or attached.merged != chosen.on:
        return []  # a call that the layers refuse
    if isinstance(chosen.layer_adapters, RowAdapters):
        rows = chosen.layer_adapters
        pairs = zip(rows.selections, rows.row_indices, strict=True)
        return [
            (selected, indices.tolist())
            for selected, indices in pairs
            if selected.invocation_tokens
        ]
    return [(chosen, None)] if chosen.invocation_tokens else []


def _search_call(
    attached: ModelAdapters,
    module: nn.Module,
    users: Sequence[tuple[ActiveAdapter, Sequence[int] | None]],
    args: tuple,
    kwargs: Any,
) -> InvokedCall:
    arguments = _arguments(module, args, kwargs)
    ids = _require_ids(module, users, arguments.get("input_ids"))
    rows, width = ids.shape
    _refuse_packed(module, users, arguments, width)
    _refuse_other_rows(users, rows)
    filled, prompt = _cache_in(arguments), context.current.prompts.get(attached.uid)
    past, head_columns = _length_of(filled), _head_columns(arguments.get("logits_to_keep"), width)
    invoked_call = InvokedCall()
    for selected, indices in users:
        name, tokens = str(selected.name), selected.invocation_tokens
        before = getattr(filled, _STARTS, {}).get((attached.uid, name))
        before = None if before is None else before.after(past, rows, len(tokens))
        if prompt is not None and name in prompt.starts:
            starts = prompt.of_rows(name, rows)
        else:
            starts = find_starts(ids, tokens, past, before)
        wanted = range(rows) if indices is None else indices
        invoked_call.tokens[name] = InvokedTokens(
            [_column(starts[row], past, width) for row in wanted], width, head_columns
        )
        tail = ids if before is None else torch.cat((before.tail.to(ids.device), ids), 1)
        invoked_call.cached[name] = CachedStarts(
            starts, past + width, tail[:, max(0, tail.shape[1] - len(tokens) + 1) :]
        )
    return invoked_call


def find_starts(
    ids: Tensor, tokens: Sequence[int], past: int = 0, before: CachedStarts | None = None
) -> list[int | None]:
    """For each row of ids [rows, columns] the column in the full sequence at which the last
    occurrence of ``tokens`` begins; None for a row without one.

    Args:
        past: the number of columns before these.
        before: what is known of these.
    """
    rows = len(ids)
    earlier: Sequence[int | None] = [None] * rows if before is None else before.starts
    if before is not None:
        past -= before.tail.shape[1]
        ids = torch.cat((before.tail.to(ids.device), ids), 1)
    size = len(tokens)
    if ids.shape[1] < size:
        return list(earlier)
    wanted = torch.tensor(tokens, device=ids.device)
    matches = (ids.unfold(1, size, 1) == wanted).all(-1)  # [rows, columns − size + 1]
    numbers = torch.arange(1, matches.shape[1] + 1, device=ids.device)
    last = (matches * numbers).amax(1).tolist()  # 0 for none
    return [
        past + number - 1 if number else start for number, start in zip(last, earlier, strict=True)
    ]


def _column(start: int | None, past: int, width: int) -> int:
    """The column of a call, which begins behind ``past`` columns, from which an adapter acts."""
    return width if start is None else min(max(start - past, 0), width)


def _require_ids(module: nn.Module, users: Sequence[tuple[ActiveAdapter, Any]], ids: Any) -> Tensor:
    """The ids of a call [rows, columns]; an error where it has none."""
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids
    names = ", ".join(repr(selected.name) for selected, _ in users)
    shape = f"input_ids {list(ids.shape)}" if isinstance(ids, Tensor) else "no input_ids"
    problem = f"a call of {base_class(module).__name__} with {shape}, of adapter {names}"
    expected = "input_ids [rows, tokens], in which its invocation tokens are found"
    do = "pass input_ids instead of inputs_embeds, or select the base or another adapter"
    raise SelectionError(problem, expected, do)


def _refuse_packed(
    module: nn.Module, users: Sequence[Any], arguments: Mapping[str, Any], width: int
) -> None:
    """An error for rows that hold several sequences, of which each may have an invocation."""
    positions = arguments.get("position_ids")
    restarts = (
        arguments.get("attention_mask") is None
        and isinstance(positions, Tensor)
        and positions.dim() == 2
        and positions.shape[1] == width > 1
        and bool((positions.diff(dim=1) < 0).any())
    )
    if restarts or any(arguments.get(name) is not None for name in _PACKED):
        problem = f"a call of {base_class(module).__name__} with several sequences in one row"
        expected = f"one sequence a row, for the invocation tokens of {users[0][0].name!r}"
        raise SelectionError(problem, expected, "do not pack the rows")


def _refuse_other_rows(users: Sequence[tuple[Any, Sequence[int] | None]], rows: int) -> None:
    most = max((max(indices) + 1 for _, indices in users if indices is not None), default=0)
    if most > rows:
        problem = f"input_ids of {rows} rows in a block of `veneer.use` for at least {most}"
        raise SelectionError(problem, "one name or None for each row", "select for these rows")


def _head_columns(logits_to_keep: Any, width: int) -> slice | Tensor | None:
    """The columns that the output head gets."""
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.dim() == 1:
        return logits_to_keep
    is_count = isinstance(logits_to_keep, int) and 0 < logits_to_keep < width
    return slice(width - int(logits_to_keep), width) if is_count else None


@cache
def _parameters(cls: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(cls.forward).parameters
    except (TypeError, ValueError):  # a forward that is no Python function
        return {}


def _arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; the first parameter of a forward is ``self``."""
    names = [*_parameters(base_class(module))][1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _cache_in(arguments: Mapping[str, Any]) -> Any:
    caches = (arguments.get(name) for name in _CACHES)
    return next((value for value in caches if hasattr(value, "get_seq_length")), None)


def _cache_of(output: Any) -> Any:
    """The cache that a call returns, or None."""
    values = output if isinstance(output, tuple) else ()
    named = (getattr(output, name, None) for name in _CACHES)
    return next((value for value in (*named, *values) if hasattr(value, "get_seq_length")), None)


def _length_of(filled: Any) -> int:
    """The number of columns that a cache holds. One of recurrent layers alone cannot tell, and
    remembers how many were searched."""
    length = 0 if filled is None else int(filled.get_seq_length())
    if not length:
        is_linear = getattr(filled, "is_linear", ())
        if isinstance(is_linear, Sequence) and is_linear and all(is_linear):
            cached = getattr(filled, _STARTS, {}).values()
            return max((starts.length for starts in cached), default=0)
    return length


# ---- generate ------------------------------------------------------------------------------------


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``model.generate(…)`` with the same arguments, in which the prompt's invocations hold."""
    override: Any = model.__dict__.get("generate")
    method: Callable[..., Any] = original(override, model) or partial(
        type(model).generate,  # pyright: ignore[reportAttributeAccessIssue]
        model,
    )
    attached = next(_attached_by_hooks(model), None)
    users = [] if attached is None else _users(attached)
    if attached is None or not users:
        return method(*args, **kwargs)
    ids = args[0] if args else kwargs.get("inputs")
    ids = kwargs.get("input_ids") if ids is None else ids
    if kwargs.get("inputs_embeds") is not None:
        ids = None
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = ids[None]
    ids = _require_ids(model, users, ids)
    filled, mask = _cache_in(kwargs), kwargs.get("attention_mask")
    # beside a cache, ids are the full sequence, or the new tokens alone with a longer mask
    past = max(0, mask.shape[1] - ids.shape[1]) if filled is not None and mask is not None else 0
    starts = {}
    for selected, _ in users:
        name, tokens = str(selected.name), selected.invocation_tokens
        before = getattr(filled, _STARTS, {}).get((attached.uid, name)) if past else None
        before = None if before is None else before.after(past, len(ids), len(tokens))
        starts[name] = find_starts(ids, tokens, past, before)
    prompts = {**context.current.prompts, attached.uid: PromptStarts(starts)}
    with context.override(prompts=prompts):
        return method(*args, **kwargs)


def _attached_by_hooks(module: nn.Module) -> Iterator[ModelAdapters]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, partial) and hook.func is _begin_call:
            yield hook.args[0]


# ---- activation checkpointing --------------------------------------------------------------------


class _CheckpointInCall:
    """transformers' function that checkpoints a layer, which runs the layer in backward with what
    its call had found."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(
            partial(_run_in_call, context.current.invoked, forward), *args, **kwargs
        )


def _run_in_call(
    invoked: Mapping[str, InvokedCall], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with context.override(invoked=invoked):
        return forward(*args, **kwargs)


def _checkpoint_in_calls(module: nn.Module) -> None:
    """Wrap the function that checkpoints a layer, where the model has enabled checkpointing."""
    for layer in module.modules():
        function = layer.__dict__.get(_CHECKPOINT)
        if function is not None and not isinstance(function, _CheckpointInCall):
            setattr(layer, _CHECKPOINT, _CheckpointInCall(function))
