"""The context of a call of a model: which adapter each model uses, and whether adapted layers
compute the factored or the materialised form.

The context is an immutable value in a ``ContextVar``, so it belongs to the running thread or
asyncio task. It is read as ``context.current``, an attribute of this module (PEP 562) rather than a
function: ``torch.compile`` cannot trace ``ContextVar.get``, but it guards module attributes and
reads them again before each run.

A context variable is not bound to a generator: a value that is set in a generator stays set for the
generator's caller while the generator is suspended. So if a ``with`` block is opened in a
generator (``Block``), it is stored under the frame of that generator instead. The block applies to
the generator and to all code that it calls, whichever thread or task advances the generator. While
no such block is open, the cost for a call is one test of an empty dict.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch


@dataclass(frozen=True)
class Context:
    """The settings that apply to calls of models in the current thread or asyncio task.

    Fields:
        selection: the ``ActiveAdapter`` of each model, by the model's ``uid``. A model without an
            entry uses its default adapter.
        path: "factored" (W x + ΔW x, with ΔW x as a product of thin matrices) or "materialised"
            ((W + ΔW) x) forces this form; None leaves the choice to each layer.
        reached_ids: a set to which each call adds the ``id`` of the layer adapters and changes that
            it uses, for ``veneer.check``. None collects nothing.
        outer: the context that is restored when the ``with`` block that set this context ends.
        opener: the object that opened this ``with`` block, and that ``leave`` expects.
        blocks: the open ``with`` blocks of generators (``Block``) that this thread or task opened,
            or that it inherited with the context from the thread or task that started it.
        applied_blocks: the blocks of generators whose changes this context already contains, so
            that they are not applied twice.
        invoked_calls: the ``InvokedCall`` of each model whose forward runs now, by the model's
            ``uid``, for adapters with invocation tokens (``attach/invocation.py``).
        prompt_starts: for each model whose ``generate`` runs now, by the model's ``uid``, a mapping
            from an adapter's name to a list. The list holds, for each row of the prompt, the column
            of the token from which the adapter acts, or None if it does not act.
    """

    selection: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    reached_ids: set[Any] | None = None
    outer: Context | None = field(default=None, repr=False, compare=False)
    opener: Any = field(default=None, repr=False, compare=False)
    blocks: tuple[Block, ...] = ()
    applied_blocks: frozenset[Block] = frozenset()
    invoked_calls: Mapping[str, Any] = field(default_factory=dict)
    prompt_starts: Mapping[str, Any] = field(default_factory=dict)


class Block:
    """A ``with`` block, such as that of ``veneer.use``, that was opened in a generator.

    Fields:
        frame: the frame of the generator; None once the block has ended.
        opener: the object that opened the block.
        selection, context_fields: the selection and the other fields of the context inside of the
            block.
        suspended_selection: replaces ``selection`` in calls for which it is unknown whether they
            should be inside of the block, because the generator is suspended.
        caller: (id of the thread, weak reference to the asyncio task or None) that opened the
            block.
        cached_context: the cache of ``_apply_blocks`` for calls in which this block is innermost,
            as (key, context). The key holds the values that the context was computed from.
    """

    def __init__(
        self,
        frame: FrameType,
        opener: Any,
        selection: Mapping[str, Any],
        suspended_selection: Mapping[str, Any],
        context_fields: Any,
    ) -> None:
        self.frame: FrameType | None = frame
        self.opener, self.selection = opener, selection
        self.suspended_selection, self.context_fields = suspended_selection, context_fields
        self.caller = threading.get_ident(), _running_task()
        self.cached_context: tuple[Any, Any] = (None, None)

    def caller_position(self, caller: tuple[int, Any]) -> str:
        """The position of a caller relative to the block, if the block's generator does not run on
        the caller's stack. ``caller`` is (id of the thread, weak reference to the task or None).

        "inside": the caller is a task or thread that the generator started in its present step.
        "ended": the block has ended, and the caller opened it. "outside": all other cases, and
        cases that cannot be told apart.
        """
        is_opener, frame = caller == self.caller, self.frame
        if frame is None:
            return "ended" if is_opener else "outside"
        if is_opener or (frame.f_back is None and not _is_awaiting(frame)):
            return "outside"
        return "inside"


_EMPTY_CONTEXT = Context()
_CONTEXT: ContextVar[Context] = ContextVar("veneer", default=_EMPTY_CONTEXT)
#: the open ``with`` blocks of each generator, by the generator's frame
_OPEN_BLOCKS: dict[FrameType, list[Block]] = {}
#: the number of blocks that have ended, in a list so that functions can change it. It is part of
#: the key of ``Block.cached_context``, so that the cache is invalid once any block has ended.
_ENDED_COUNT = [0]

_GENERATOR_FLAGS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
#: modules that run generators of the user (test fixtures) up to the ``yield``. The blocks of such a
#: generator apply to the code that called the module, as those of a context manager do.
_FIXTURE_MODULES = ("_pytest.fixtures", "pytest_asyncio.plugin")

if TYPE_CHECKING:
    current: Context


def __getattr__(name: str) -> Context:
    if name != "current":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    context = _CONTEXT.get()
    if (
        context is _EMPTY_CONTEXT
        and torch._C._current_graph_task_id() != -1
        and torch._C._is_key_in_tls("context")
    ):
        # On a GPU, backward runs in threads of torch, which have no context of Veneer, and
        # activation checkpointing runs layers again in them. torch gives these threads a copy of
        # the context in which ``backward`` was called, so use that one.
        context = torch._C._get_obj_in_tls("context").get(_CONTEXT, _EMPTY_CONTEXT)
    return _apply_blocks(context) if _OPEN_BLOCKS or context.blocks else context


def _apply_blocks(context: Context) -> Context:
    """``context`` with the changes of all open ``with`` blocks in generators (``Block``) that
    surround this call: the blocks of generators that started the caller's thread or task, then
    those of generators on the caller's stack, the innermost last. For blocks of suspended
    generators, ``Block.suspended_selection`` is applied instead."""
    frames = _running_generator_frames()
    if not frames and not context.blocks:
        return context
    running_blocks = [block for frame in frames for block in _OPEN_BLOCKS.get(frame, ())]
    caller = threading.get_ident(), _running_task()
    cache_key = context, running_blocks, caller, _ENDED_COUNT[0]
    # use a cached result, because every layer of a training step reads the context
    if running_blocks and running_blocks[-1].cached_context[0] == cache_key:
        return running_blocks[-1].cached_context[1]
    off_stack_blocks = [
        block
        for block in context.blocks
        if block not in running_blocks and block not in context.applied_blocks
    ]
    positions = [block.caller_position(caller) for block in off_stack_blocks]
    selection, context_fields = dict(context.selection), {}
    for block, position in zip(off_stack_blocks, positions, strict=True):
        if position == "outside":
            selection.update(block.suspended_selection)
    enclosing_blocks = [
        block
        for block, position in zip(off_stack_blocks, positions, strict=True)
        if position == "inside"
    ]
    for block in (
        *enclosing_blocks,
        *(block for block in running_blocks if block not in context.applied_blocks),
    ):
        selection.update(block.selection)
        context_fields.update(block.context_fields)
    resolved_context = replace(
        context,
        selection=selection,
        blocks=(),
        applied_blocks=context.applied_blocks.union(enclosing_blocks, running_blocks),
        **context_fields,
    )
    # Do not cache if other threads or tasks opened some of the blocks: their generators may resume
    # or suspend at any time, which changes the result but not the key.
    if running_blocks and all(block.caller == caller for block in off_stack_blocks):
        running_blocks[-1].cached_context = cache_key, resolved_context
    return resolved_context


def _running_generator_frames() -> list[FrameType]:
    """The frames on this thread's stack of generators in which a ``with`` block (``Block``) is
    open, the outermost first."""
    # a frame without ``f_back`` is suspended, and so on no stack
    running_frames = [frame for frame in tuple(_OPEN_BLOCKS) if frame.f_back is not None]
    frames_on_stack: list[FrameType] = []
    frame = sys._getframe(1) if running_frames else None
    while frame is not None:
        if frame in running_frames:  # fast, because few generators have open blocks
            frames_on_stack.append(frame)
            if len(frames_on_stack) == len(running_frames):
                break
        frame = frame.f_back
    return frames_on_stack[::-1]


def _generator_frame() -> FrameType | None:
    """The frame of the generator whose code enters or leaves a ``with`` block by this call, or None
    if the code is in no generator. If a generator implements a context manager (``contextlib``),
    its blocks belong to the code that enters that context manager, maybe in another generator."""
    frame = sys._getframe(2)
    while frame is not None:
        if _is_context_method(frame):
            frame = frame.f_back
            continue
        if not frame.f_code.co_flags & _GENERATOR_FLAGS:
            return None
        resuming_frame = frame.f_back
        if resuming_frame is None or not (
            _is_context_method(resuming_frame)
            or resuming_frame.f_globals.get("__name__") in _FIXTURE_MODULES
        ):
            return frame
        frame = resuming_frame
    return None


def _is_context_method(frame: FrameType) -> bool:
    """Whether a frame belongs to a method that enters or leaves a context manager."""
    method_names = ("__enter__", "__exit__", "__aenter__", "__aexit__")
    return frame.f_code.co_name in method_names or frame.f_globals.get("__name__") == "contextlib"


def _is_awaiting(frame: FrameType) -> bool:
    """Whether a suspended asynchronous generator waits at an ``await`` rather than a ``yield``."""
    resume_index = frame.f_lasti + 2  # RESUME has the argument 3 after an await, 1 after a yield
    bytecode = frame.f_code.co_code
    return bytecode[resume_index] == dis.opmap["RESUME"] and bytecode[resume_index + 1] & 3 == 3


def _running_task() -> Any:
    """A weak reference to the running asyncio task, or None."""
    asyncio = sys.modules.get("asyncio")
    loop = None if asyncio is None else asyncio._get_running_loop()
    if asyncio is None or loop is None:
        return None
    task = asyncio.current_task(loop)
    return None if task is None else weakref.ref(task)


def enter(
    opener: Any,
    selection: Mapping[str, Any],
    *,
    make_suspended: Callable[[], Any] | None = None,
    **context_fields: Any,
) -> None:
    """Open a block: add ``selection`` to that of the current context and replace other fields of
    the context, until ``leave`` is called with the same ``opener``.

    Args:
        opener: the object that opens the block, which identifies it.
        selection: ``ActiveAdapter`` by the ``uid`` of its model.
        make_suspended: a function whose result becomes the entry of each model in
            ``Block.suspended_selection``, if the block is opened in a generator. Pass it for blocks
            of the user, which may be opened there; None for blocks that no generator can suspend.
        context_fields: the values of other fields of the context.
    """
    stored_context = _CONTEXT.get()
    frame = None if make_suspended is None else _generator_frame()
    if make_suspended is not None and frame is not None:
        suspended_selection = dict.fromkeys(selection, make_suspended())
        block = Block(frame, opener, selection, suspended_selection, context_fields)
        _OPEN_BLOCKS.setdefault(frame, []).append(block)
        _CONTEXT.set(replace(stored_context, blocks=(*_open_blocks(stored_context.blocks), block)))
        return
    present_context = sys.modules[__name__].current
    _CONTEXT.set(
        replace(
            present_context,
            selection={**present_context.selection, **selection},
            **context_fields,
            outer=stored_context,
            opener=opener,
            blocks=(),
        )
    )


def leave(opener: Any) -> bool:
    """End the block that ``enter`` opened with this ``opener``, and return True. Blocks in
    generators may end in any order. Any other block must be the last that was opened in this thread
    or task; otherwise nothing changes and the result is False. Blocks that hooks of modules opened
    later end too: after a KeyboardInterrupt in a module, torch does not call the hook that would
    end them."""
    stored_context = _CONTEXT.get()
    blocks = [
        block
        for blocks in tuple(_OPEN_BLOCKS.values())
        for block in blocks
        if block.opener is opener
    ]
    if blocks:
        frame = _generator_frame()
        blocks_in_frame = [block for block in blocks if block.frame is frame]
        if blocks_in_frame or stored_context.opener is not opener:
            block = (blocks_in_frame or blocks)[-1]
            _close_block(block)
            _CONTEXT.set(_remove_block(stored_context, block))
            return True
    context, open_blocks = stored_context, _open_blocks(stored_context.blocks)
    while context.opener is not opener and isinstance(context.opener, torch.nn.Module):
        context = cast(Context, context.outer)
        open_blocks = (*_open_blocks(context.blocks), *open_blocks)
    outer_context = context.outer
    if context.opener is not opener or outer_context is None:
        return False
    _CONTEXT.set(
        replace(outer_context, blocks=(*outer_context.blocks, *open_blocks))
        if open_blocks
        else outer_context
    )
    return True


def is_open(opener: Any) -> bool:
    """Whether this call is inside of a block that ``enter`` opened with this ``opener``, except for
    blocks in generators."""
    context: Context | None = _CONTEXT.get()
    while context is not None and context.opener is not opener:
        context = context.outer
    return context is not None


def _open_blocks(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    return tuple(block for block in blocks if block.frame is not None)


def _close_block(block: Block) -> None:
    frame: Any = block.frame
    _OPEN_BLOCKS[frame].remove(block)
    if not _OPEN_BLOCKS[frame]:
        del _OPEN_BLOCKS[frame]
    block.frame, block.cached_context = None, (None, None)
    _ENDED_COUNT[0] += 1


def _remove_block(context: Context, block: Block) -> Context:
    """``context`` without a generator's block. The block is also removed from the contexts that
    will be restored later (``Context.outer``)."""
    outer_context = None if context.outer is None else _remove_block(context.outer, block)
    if outer_context is context.outer and block not in context.blocks:
        return context
    remaining_blocks = tuple(
        other_block for other_block in context.blocks if other_block is not block
    )
    changed_context = replace(context, outer=outer_context, blocks=remaining_blocks)
    return (
        _EMPTY_CONTEXT
        if changed_context.outer is None and changed_context == _EMPTY_CONTEXT
        else changed_context
    )


@contextmanager
def override(
    selection: Mapping[str, Any] | None = None,
    *,
    make_suspended: Callable[[], Any] | None = None,
    **context_fields: Any,
) -> Iterator[None]:
    """A context manager that changes the selection and other fields of the context. The arguments
    are those of ``enter``."""
    opener = object()
    enter(opener, selection or {}, make_suspended=make_suspended, **context_fields)
    try:
        yield
    finally:
        leave(opener)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """A context manager in which every module of a model is in evaluation mode. At the end, each
    module gets the mode that it had before. The attribute ``training`` is set directly, because a
    model may override the methods ``train`` and ``eval``."""
    was_training: dict[torch.nn.Module, bool] = {}
    pending_modules: list[torch.nn.Module | None] = [model]
    while pending_modules:
        if (module := pending_modules.pop()) is not None and module not in was_training:
            was_training[module] = module.training
            # a copy, because another thread that attaches an adapter may change the dict
            pending_modules += list(module._modules.values())
    try:
        for module in was_training:
            module.training = False
        yield
    finally:
        for module, module_was_training in was_training.items():
            module.training = module_was_training
