"""Find the invocation tokens of adapters in the calls of a model (aLoRA; Greenewald et al. 2025,
"Activated LoRA", arXiv:2504.12397).

    invocation_tokens     1 2
    input_ids             5 9 1 2 7 1 2 4 6        the last occurrence counts
                          base      │ adapter      from the first invocation token on
    a later call          8                        with the same cache: the adapter still acts

Each module whose forward takes ``input_ids`` has a hook that searches the ids, row by row. The hook
stores the result in the context of the call, where the layers find it (``InvokedAdapter``). If such
a module calls another one with the same ids, the inner module uses the result of the outer one.

The call that fills a KV cache also stores its result on the cache, as column indices in the full
sequence. A later call with that cache searches only its new ids. Generated tokens invoke nothing,
as in PEFT: an override of ``generate`` searches the prompt, and its calls do not search again.

Activation checkpointing runs layers again in backward, after the call has ended. The function with
which transformers checkpoints a layer is wrapped, so that the layer runs again with the result of
its first call.

Rejected: passing the positions of the invocations as an argument, as PEFT does (``alora_offsets``).
A call without the argument would silently compute the base's output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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
from veneer.attach.source.method_overrides import attribute_before_override, override_method
from veneer.distributed import base_class
from veneer.errors import SelectionError

#: the names under which models of transformers take a cache, and return it
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
#: names of arguments that a call has only if a row holds several packed sequences
_PACKING_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
#: the attribute of a cache that holds the ``CachedStarts`` of the adapters that filled it
_STARTS_ATTRIBUTE = "_veneer_starts"
#: the attribute of a layer of transformers that holds the function that checkpoints it
_CHECKPOINT_ATTRIBUTE = "_gradient_checkpointing_func"


@dataclass(frozen=True)
class CachedStarts:
    """The columns of a KV cache at which the invocations of one adapter begin.

    Fields:
        starts: for each row of the batch the column from which the adapter acts; None if the row
            has no invocation.
        length: the number of columns that were searched.
        tail: the ids of the last searched columns, [rows, n], with n less than the number of
            invocation tokens. Ids of a later call may follow them and complete an invocation.
    """

    starts: Sequence[int | None]
    length: int
    tail: Tensor

    def resized(self, length: int, row_count: int, token_count: int) -> CachedStarts:
        """This object for the cache as it is now, with ``length`` columns of ``row_count`` rows: it
        may have been cut, or its rows repeated, since the search. ``token_count`` is the number of
        invocation tokens. Raises a SelectionError if ``row_count`` is not a multiple of the number
        of searched rows."""
        starts = [
            None if start is None or start + token_count > length else start
            for start in _repeat_starts(self.starts, row_count, "a cache")
        ]
        tail = self.tail.repeat_interleave(row_count // len(self.starts), 0)
        return CachedStarts(starts, length, tail if length == self.length else tail[:, :0])


def _repeat_starts(starts: Sequence[int | None], row_count: int, source: str) -> list[int | None]:
    """``starts`` of the searched rows, each repeated equally often, so that there is one for each
    of ``row_count`` rows: beams and samples turn a row into several adjacent rows. Raises a
    SelectionError if that is impossible; ``source`` is the text for the searched rows in it."""
    repeats, remainder = divmod(row_count, len(starts))
    if remainder or not repeats:
        raise SelectionError(
            f"a call of {row_count} rows behind {source} of {len(starts)}",
            "the rows in which invocation tokens were searched",
            "repeat its rows, or start anew",
        )
    return [start for start in starts for _ in range(repeats)]


@dataclass
class InvokedCall:
    """The invocations that were found in one call of a model.

    Fields:
        tokens: the tokens on which each adapter acts, by the adapter's name.
        cached: what the cache of the call will hold about each adapter, by the adapter's name.
    """

    tokens: dict[str, InvokedTokens] = field(default_factory=dict)
    cached: dict[str, CachedStarts] = field(default_factory=dict)


#: an adapter and the indices of the rows of the batch that use it; None if all rows use it
AdapterRows = tuple[ActiveAdapter, Sequence[int] | None]


# ---- on and off ----------------------------------------------------------------------------------


def with_invocation(adapters_by_key: dict[Any, Any], name: str) -> dict[Any, Any]:
    """``adapters_by_key``, the layer adapters of the adapter ``name``, wrapped so that each one
    changes only the tokens from the invocation on. A layer adapter that changes no weight, such as
    one that turns a fused fast path off, is not wrapped."""
    return {
        key: InvokedAdapter(layer_adapter, name) if layer_adapter.changes else layer_adapter
        for key, layer_adapter in adapters_by_key.items()
    }


def takes_input_ids(module: nn.Module) -> bool:
    return "input_ids" in _forward_parameters(base_class(module))


def update_invocation_hooks(model: nn.Module, model_adapters: ModelAdapters) -> None:
    """Register hooks by which calls of the model find the invocation tokens of its adapters. If no
    adapter has such tokens, remove the hooks."""
    has_invocations = any(config.invocation_tokens for config in model_adapters.configs.values())
    for module in {id(module): module for _, module in walk(model)}.values():
        _remove_hooks(module)
        if has_invocations and takes_input_ids(module):
            module.register_forward_pre_hook(partial(_begin_call, model_adapters), with_kwargs=True)
            module.register_forward_hook(
                partial(_end_call, model_adapters), with_kwargs=True, always_call=True
            )
            if callable(getattr(type(module), "generate", None)):
                override_method(module, "generate", _generate)


def _remove_hooks(module: nn.Module) -> None:
    """Undo ``update_invocation_hooks`` for a module, except for the override of ``generate``."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook_id, hook in list(hooks.items()):
            if isinstance(hook, partial) and hook.func in (_begin_call, _end_call):
                del hooks[hook_id]
                for hook_flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    hook_flags.pop(hook_id, None)
    checkpoint_function = module.__dict__.get(_CHECKPOINT_ATTRIBUTE)
    if isinstance(checkpoint_function, _CheckpointInCall):
        setattr(module, _CHECKPOINT_ATTRIBUTE, checkpoint_function.function)


# ---- a call --------------------------------------------------------------------------------------


def _begin_call(model_adapters: ModelAdapters, module: nn.Module, args: tuple, kwargs: Any) -> None:
    """Pre-forward hook: search the ids of the call, unless the call of a module above has done so,
    and set the result in the context of the call."""
    was_interrupted = context.is_open(module)  # an earlier call, by Ctrl-C: ``_end_call`` never ran
    context.leave(module)
    invoked_calls = context.current.invoked_calls
    if was_interrupted or model_adapters.uid not in invoked_calls:
        adapter_rows = _invoked_adapter_rows(model_adapters)
        if adapter_rows:
            invoked_call = _search_call(model_adapters, module, adapter_rows, args, kwargs)
            invoked_calls = {**invoked_calls, model_adapters.uid: invoked_call}
            if torch.is_grad_enabled():
                _wrap_checkpoint_functions(module)
    context.enter(module, {}, invoked_calls=invoked_calls)


def _end_call(
    model_adapters: ModelAdapters, module: nn.Module, args: tuple, kwargs: Any, output: Any
) -> None:
    """Forward hook, which also runs after an error: end the context that ``_begin_call`` set, and
    store the invocations that the call has found on its cache, for later calls."""
    invoked_call = context.current.invoked_calls.get(model_adapters.uid)
    if not context.leave(module) or invoked_call is None or not invoked_call.cached:
        return
    kv_cache = _cache_in_arguments(_arguments_by_name(module, args, kwargs)) or _cache_of(output)
    if kv_cache is not None:
        earlier_starts = getattr(kv_cache, _STARTS_ATTRIBUTE, {})
        new_starts = {
            (model_adapters.uid, name): cached_starts
            for name, cached_starts in invoked_call.cached.items()
        }
        setattr(kv_cache, _STARTS_ATTRIBUTE, {**earlier_starts, **new_starts})


def _invoked_adapter_rows(model_adapters: ModelAdapters) -> list[AdapterRows]:
    """The adapters with invocation tokens that a call in this context uses, each with its rows."""
    selected = context.current.selection.get(model_adapters.uid, model_adapters.default)
    if selected.layer_adapters is None or model_adapters.merged != selected.merged_at_attach:
        return []  # the layers raise an error, or run on merged weights
    if isinstance(selected.layer_adapters, RowAdapters):
        row_adapters = selected.layer_adapters
        selections_with_rows = zip(row_adapters.selections, row_adapters.row_indices, strict=True)
        return [
            (row_selection, indices.tolist())
            for row_selection, indices in selections_with_rows
            if row_selection.invocation_tokens
        ]
    return [(selected, None)] if selected.invocation_tokens else []


def _search_call(
    model_adapters: ModelAdapters,
    module: nn.Module,
    adapter_rows: Sequence[AdapterRows],
    args: tuple,
    kwargs: Any,
) -> InvokedCall:
    """Search the ``input_ids`` of a call for the invocation tokens of the adapters. Raises a
    SelectionError if the call has no ids that can be searched row by row."""
    arguments = _arguments_by_name(module, args, kwargs)
    ids = _require_ids(module, adapter_rows, arguments.get("input_ids"))
    row_count, width = ids.shape
    _refuse_packed(module, adapter_rows, arguments, width)
    _refuse_other_rows(adapter_rows, row_count)
    kv_cache = _cache_in_arguments(arguments)
    prompt_starts = context.current.prompt_starts.get(model_adapters.uid, {})
    past_length = _cache_length(kv_cache)
    head_columns = _head_columns(arguments.get("logits_to_keep"), width)
    invoked_call = InvokedCall()
    for active_adapter, row_indices in adapter_rows:
        name, invocation_tokens = str(active_adapter.name), active_adapter.invocation_tokens
        cached_starts = _cached_starts(
            kv_cache, model_adapters, active_adapter, past_length, row_count
        )
        if name in prompt_starts:  # for beams or samples, ``generate`` repeats rows
            starts = _repeat_starts(prompt_starts[name], row_count, "a prompt")
        else:
            starts = find_starts(ids, invocation_tokens, past_length, cached_starts)
        call_starts = [
            _column_in_call(starts[row], past_length, width)
            for row in (range(row_count) if row_indices is None else row_indices)
        ]
        invoked_call.tokens[name] = InvokedTokens(call_starts, width, head_columns)
        tail = (
            ids if cached_starts is None else torch.cat((cached_starts.tail.to(ids.device), ids), 1)
        )
        tail = tail[:, max(0, tail.shape[1] - len(invocation_tokens) + 1) :]
        invoked_call.cached[name] = CachedStarts(starts, past_length + width, tail)
    return invoked_call


def find_starts(
    ids: Tensor,
    tokens: Sequence[int],
    past_length: int = 0,
    cached_starts: CachedStarts | None = None,
) -> list[int | None]:
    """For each row of ``ids`` [rows, columns], the column in the full sequence at which the last
    occurrence of the invocation ``tokens`` begins. None for a row without an occurrence.

    Args:
        past_length: the number of columns of the full sequence before ``ids``.
        cached_starts: the result of the search in the columns before ``ids``.
    """
    row_count = len(ids)
    earlier_starts: Sequence[int | None] = (
        [None] * row_count if cached_starts is None else cached_starts.starts
    )
    if cached_starts is not None:
        past_length -= cached_starts.tail.shape[1]
        ids = torch.cat((cached_starts.tail.to(ids.device), ids), 1)
    token_count = len(tokens)
    if ids.shape[1] < token_count:
        return list(earlier_starts)
    pattern = torch.tensor(tokens, device=ids.device)
    matches = (ids.unfold(1, token_count, 1) == pattern).all(-1)  # [rows, columns − tokens + 1]
    positions = torch.arange(1, matches.shape[1] + 1, device=ids.device)  # 0 means no match
    last_positions = (matches * positions).amax(1).tolist()
    return [
        past_length + position - 1 if position else start
        for position, start in zip(last_positions, earlier_starts, strict=True)
    ]


def _column_in_call(start: int | None, past_length: int, width: int) -> int:
    """The column of a call from which an adapter acts, given the column ``start`` of the full
    sequence. The call has ``width`` columns, after ``past_length`` earlier ones. The result is
    ``width`` if the adapter acts on none of them, as for a ``start`` of None."""
    return width if start is None else min(max(start - past_length, 0), width)


def _require_ids(module: nn.Module, adapter_rows: Sequence[AdapterRows], ids: Any) -> Tensor:
    """The ``input_ids`` of a call, [rows, columns]. Raises a SelectionError if the call has no
    ``input_ids`` of this shape."""
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids
    names_text = ", ".join(repr(active_adapter.name) for active_adapter, _ in adapter_rows)
    shape = f"input_ids {list(ids.shape)}" if isinstance(ids, Tensor) else "no input_ids"
    raise SelectionError(
        f"a call of {base_class(module).__name__} with {shape}, of adapter {names_text}",
        "input_ids [rows, tokens], in which its invocation tokens are found",
        "pass input_ids instead of inputs_embeds, or select the base or another adapter",
    )


def _refuse_packed(
    module: nn.Module,
    adapter_rows: Sequence[AdapterRows],
    arguments: Mapping[str, Any],
    width: int,
) -> None:
    """Raise a SelectionError if a row of ``width`` tokens holds several packed sequences: each may
    have an invocation of its own, but the search finds one in a row."""
    positions = arguments.get("position_ids")
    positions_restart = (
        arguments.get("attention_mask") is None
        and isinstance(positions, Tensor)
        and positions.dim() == 2
        and positions.shape[1] == width > 1
        and bool((positions.diff(dim=1) < 0).any())
    )
    if positions_restart or any(arguments.get(name) is not None for name in _PACKING_NAMES):
        raise SelectionError(
            f"a call of {base_class(module).__name__} with several sequences in one row",
            f"one sequence a row, for the invocation tokens of {adapter_rows[0][0].name!r}",
            "do not pack the rows",
        )


def _refuse_other_rows(adapter_rows: Sequence[AdapterRows], row_count: int) -> None:
    """Raise a SelectionError if adapters were selected for more rows than the ids of a call
    have."""
    selected_count = max(
        (max(row_indices) + 1 for _, row_indices in adapter_rows if row_indices is not None),
        default=0,
    )
    if selected_count > row_count:
        raise SelectionError(
            f"input_ids of {row_count} rows in a block of `veneer.use` for at least"
            f" {selected_count}",
            "one name or None for each row",
            "select for these rows",
        )


def _head_columns(logits_to_keep: Any, width: int) -> slice | Tensor | None:
    """The columns, out of ``width``, for which a model of transformers computes logits, given its
    argument ``logits_to_keep`` (column indices, or a number of last columns). None for all."""
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.dim() == 1:
        return logits_to_keep
    is_count = isinstance(logits_to_keep, int) and 0 < logits_to_keep < width
    return slice(width - int(logits_to_keep), width) if is_count else None


@cache
def _forward_parameters(cls: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(cls.forward).parameters
    except (TypeError, ValueError):  # a forward that is no Python function
        return {}


def _arguments_by_name(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. The first parameter of a forward is ``self``."""
    names = [*_forward_parameters(base_class(module))][1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _cache_in_arguments(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or None."""
    values = (arguments.get(name) for name in _CACHE_NAMES)
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _cache_of(output: Any) -> Any:
    """The cache that a call returns, or None."""
    elements = output if isinstance(output, tuple) else ()
    attributes = (getattr(output, name, None) for name in _CACHE_NAMES)
    return next(
        (value for value in (*attributes, *elements) if hasattr(value, "get_seq_length")), None
    )


def _cached_starts(
    kv_cache: Any, model_adapters: ModelAdapters, active: ActiveAdapter, length: int, row_count: int
) -> CachedStarts | None:
    """The invocations of an adapter in a cache that now holds ``length`` columns of ``row_count``
    rows. None if no search for this adapter was stored on the cache."""
    cached_starts = getattr(kv_cache, _STARTS_ATTRIBUTE, {}).get((model_adapters.uid, active.name))
    token_count = len(active.invocation_tokens)
    return None if cached_starts is None else cached_starts.resized(length, row_count, token_count)


def _cache_length(kv_cache: Any) -> int:
    """The number of columns that a cache holds; 0 if there is no cache. A cache that has only
    recurrent layers reports no length, so the number of columns searched so far is returned."""
    length = 0 if kv_cache is None else int(kv_cache.get_seq_length())
    if not length:
        is_linear = getattr(kv_cache, "is_linear", ())
        if isinstance(is_linear, Sequence) and is_linear and all(is_linear):
            cached_starts = getattr(kv_cache, _STARTS_ATTRIBUTE, {}).values()
            return max((cached.length for cached in cached_starts), default=0)
    return length


# ---- generate ------------------------------------------------------------------------------------


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The override of ``model.generate``, with the same arguments. It searches the prompt alone,
    and the calls within ``generate`` use the result, so generated tokens invoke nothing."""
    override_function: Any = model.__dict__.get("generate")
    original_generate: Callable[..., Any] = attribute_before_override(
        override_function, model
    ) or partial(
        type(model).generate,  # pyright: ignore[reportAttributeAccessIssue]
        model,
    )
    model_adapters = _adapters_of_hooks(model)
    adapter_rows = [] if model_adapters is None else _invoked_adapter_rows(model_adapters)
    if model_adapters is None or not adapter_rows:
        return original_generate(*args, **kwargs)
    ids = args[0] if args else kwargs.get("inputs")
    ids = kwargs.get("input_ids") if ids is None else ids
    if kwargs.get("inputs_embeds") is not None:
        ids = None
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = ids[None]
    ids = _require_ids(model, adapter_rows, ids)
    kv_cache, attention_mask = _cache_in_arguments(kwargs), kwargs.get("attention_mask")
    # With a cache, ``ids`` is the full sequence, or only its new tokens if the mask is longer.
    is_continued = kv_cache is not None and attention_mask is not None
    past_length = max(0, attention_mask.shape[1] - ids.shape[1]) if is_continued else 0
    starts_by_adapter = {}
    for active_adapter, _ in adapter_rows:
        cached_starts = (
            _cached_starts(kv_cache, model_adapters, active_adapter, past_length, len(ids))
            if past_length
            else None
        )
        starts_by_adapter[str(active_adapter.name)] = find_starts(
            ids, active_adapter.invocation_tokens, past_length, cached_starts
        )
    prompt_starts = {**context.current.prompt_starts, model_adapters.uid: starts_by_adapter}
    with context.override(prompt_starts=prompt_starts):
        return original_generate(*args, **kwargs)


def _adapters_of_hooks(module: nn.Module) -> ModelAdapters | None:
    """The ``ModelAdapters`` to which the hook ``_begin_call`` of a module is bound; None if the
    module has no such hook."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, partial) and hook.func is _begin_call:
            return hook.args[0]
    return None


# ---- activation checkpointing --------------------------------------------------------------------


class _CheckpointInCall:
    """A wrapper of the function with which transformers checkpoints a layer. Backward runs the
    layer again, after the call has ended; the wrapper lets it use the invocations of the call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        invoked_calls = context.current.invoked_calls
        return self.function(
            partial(_run_with_invoked_calls, invoked_calls, forward), *args, **kwargs
        )


def _run_with_invoked_calls(
    invoked_calls: Mapping[str, InvokedCall],
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run ``forward`` with ``invoked_calls`` in the context, from which its layers learn on which
    tokens the adapters act."""
    with context.override(invoked_calls=invoked_calls):
        return forward(*args, **kwargs)


def _wrap_checkpoint_functions(module: nn.Module) -> None:
    """Replace the checkpoint function of each layer that has one by a ``_CheckpointInCall``."""
    for layer in module.modules():
        function = layer.__dict__.get(_CHECKPOINT_ATTRIBUTE)
        if function is not None and not isinstance(function, _CheckpointInCall):
            setattr(layer, _CHECKPOINT_ATTRIBUTE, _CheckpointInCall(function))
