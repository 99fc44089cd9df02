"""The context of a call: the adapter that each model uses, and the arithmetic.

The context is an immutable value in a ``ContextVar``, so it belongs to the running thread or
asyncio task. It is read as ``context.current``, an attribute of this module (PEP 562) rather than a
function: ``torch.compile`` cannot trace ``ContextVar.get``, but it guards module attributes and
reads this one again before each run.

A context variable does not follow a generator: a value that is set in a generator stays set for its
caller while the generator is suspended. So a block that is opened in a generator (``Block``) is
stored under the frame of that generator instead. It applies to all code that runs above that frame
on the stack, whichever thread or task advances the generator. While no such block is open, the cost
for a call is one test of an empty dict.
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
from typing import TYPE_CHECKING, Any

import torch


@dataclass(frozen=True)
class Context:
    """The context of a call.

    Fields:
        selection: the ``ActiveAdapter`` of each model, by the model's ``uid``. A model that is
            missing here uses its default.
        path: "factored" or "materialised" forces this arithmetic; None leaves the choice to each
            layer.
        reached: collects the ids of layer adapters and changes that take part, for ``check``.
        outer: the context that is restored when the block ends.
        source: the object that opened the block.
        blocks: blocks of generators that were opened in this thread or task, or in the one whose
            context was copied for this one.
        included: the blocks that are already part of ``selection``.
        invoked: the ``InvokedCall`` of each model whose forward runs now, by the model's ``uid``,
            for adapters with invocation tokens (``attach/invocation.py``).
        prompts: the ``PromptStarts`` of each model whose ``generate`` runs now, by its ``uid``.
    """

    selection: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    reached: set[Any] | None = None
    outer: Context | None = field(default=None, repr=False, compare=False)
    source: Any = field(default=None, repr=False, compare=False)
    blocks: tuple[Block, ...] = ()
    included: frozenset[Block] = frozenset()
    invoked: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)


class Block:
    """A block that was opened in a generator.

    Fields:
        frame: the frame of the generator; None once the block has ended.
        source: the object that opened the block.
        selection, changes: the selection and the other fields of the context inside of the block.
        outside: replaces ``selection`` in calls for which it is not known whether they should be
            inside of the block.
        caller: the thread and task that opened the block.
        resolved: a cache of the last context that ended with this block, with its key.
    """

    def __init__(
        self,
        frame: FrameType,
        source: Any,
        selection: Mapping[str, Any],
        outside: Mapping[str, Any],
        changes: Any,
    ) -> None:
        self.frame: FrameType | None = frame
        self.source, self.selection = source, selection
        self.outside, self.changes = outside, changes
        self.caller = threading.get_ident(), _running_task()
        self.resolved: tuple[Any, Any] = (None, None)

    def state(self, caller: tuple[int, Any]) -> str:
        """The state of a block for a caller on whose stack the generator does not run.

        "inside": the caller is a task or thread that the generator started in its present step.
        "ended": the block has ended. "outside": neither, or it cannot be determined.
        """
        is_opener, frame = caller == self.caller, self.frame
        if frame is None:
            return "ended" if is_opener else "outside"
        if is_opener or (frame.f_back is None and not _is_awaiting(frame)):
            return "outside"
        return "inside"


_EMPTY = Context()
_CONTEXT: ContextVar[Context] = ContextVar("veneer", default=_EMPTY)
#: the open blocks of each generator, by its frame
_OPEN_BLOCKS: dict[FrameType, list[Block]] = {}
#: the number of blocks that have ended, in a list so that it can be changed
_ENDED_COUNT = [0]

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
#: modules that run a generator up to its ``yield`` so that its blocks apply to their caller
_FIXTURE_MODULES = ("_pytest.fixtures", "pytest_asyncio.plugin")

if TYPE_CHECKING:
    current: Context


def __getattr__(name: str) -> Context:
    if name != "current":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _CONTEXT.get()
    if (
        value is _EMPTY
        and torch._C._current_graph_task_id() != -1
        and torch._C._is_key_in_tls("context")
    ):
        # On a GPU, backward runs in threads of torch, which have no context of Veneer, and
        # activation checkpointing runs layers again in them. torch gives these threads a copy of
        # the context in which ``backward`` was called.
        value = torch._C._get_obj_in_tls("context").get(_CONTEXT, _EMPTY)
    return _with_blocks(value) if _OPEN_BLOCKS or value.blocks else value


def _with_blocks(value: Context) -> Context:
    """The context ``value`` with the blocks of the generators on the caller's stack applied, the
    innermost block last."""
    frames = _frames_below()
    if not frames and not value.blocks:
        return value
    running = [block for frame in frames for block in _OPEN_BLOCKS.get(frame, ())]
    caller = threading.get_ident(), _running_task()
    key = value, running, caller, _ENDED_COUNT[0]
    if running and running[-1].resolved[0] == key:  # cached: every layer of a step asks for it
        return running[-1].resolved[1]
    not_running = [
        block for block in value.blocks if block not in running and block not in value.included
    ]
    states = [block.state(caller) for block in not_running]
    selection, changes = dict(value.selection), {}
    for block, state in zip(not_running, states, strict=True):
        if state == "outside":
            selection.update(block.outside)
    inside = [block for block, state in zip(not_running, states, strict=True) if state == "inside"]
    for block in (*inside, *(block for block in running if block not in value.included)):
        selection.update(block.selection)
        changes.update(block.changes)
    included = value.included.union(inside, running)
    resolved = replace(value, selection=selection, blocks=(), included=included, **changes)
    # not cached if other threads or tasks have blocks, whose generators may resume at any time
    if running and all(block.caller == caller for block in not_running):
        running[-1].resolved = key, resolved
    return resolved


def _frames_below() -> list[FrameType]:
    """The frames of generators with open blocks on this thread's stack, the outermost first."""
    # a frame without ``f_back`` is suspended
    running = [frame for frame in tuple(_OPEN_BLOCKS) if frame.f_back is not None]
    frames: list[FrameType] = []
    frame = sys._getframe(1) if running else None
    while frame is not None:
        if frame in running:  # a short list
            frames.append(frame)
            if len(frames) == len(running):
                break
        frame = frame.f_back
    return frames[::-1]


def _generator_frame() -> FrameType | None:
    """The frame of the generator that enters or leaves a block, or None if no generator does. A
    generator that implements a context manager (``contextlib``) acts for the code that enters that
    context manager."""
    frame = sys._getframe(2)
    while frame is not None:
        if _is_context_method(frame):
            frame = frame.f_back
            continue
        if not frame.f_code.co_flags & _GENERATOR:
            return None
        driver = frame.f_back
        if driver is None or not (
            _is_context_method(driver) or driver.f_globals.get("__name__") in _FIXTURE_MODULES
        ):
            return frame
        frame = driver
    return None


def _is_context_method(frame: FrameType) -> bool:
    """Whether a frame belongs to a method that enters or leaves a context manager."""
    methods = ("__enter__", "__exit__", "__aenter__", "__aexit__")
    return frame.f_code.co_name in methods or frame.f_globals.get("__name__") == "contextlib"


def _is_awaiting(frame: FrameType) -> bool:
    """Whether a suspended asynchronous generator waits at an ``await`` rather than a ``yield``."""
    resume = frame.f_lasti + 2  # the operand of RESUME distinguishes the two
    code = frame.f_code.co_code
    return code[resume] == dis.opmap["RESUME"] and code[resume + 1] & 3 == 3


def _running_task() -> Any:
    """A weak reference to the running asyncio task, or None."""
    asyncio = sys.modules.get("asyncio")
    loop = None if asyncio is None else asyncio._get_running_loop()
    if asyncio is None or loop is None:
        return None
    task = asyncio.current_task(loop)
    return None if task is None else weakref.ref(task)


def enter(
    source: Any,
    selection: Mapping[str, Any],
    *,
    outside: Callable[[], Any] | None = None,
    **changes: Any,
) -> None:
    """Add a selection to the present one and replace other fields of the context, until ``leave``
    is called with the same ``source``.

    Args:
        source: identifies the block.
        selection: ``ActiveAdapter`` by the ``uid`` of its model.
        outside: creates ``Block.outside``. Passed for blocks of the user, which may be opened in a
            generator; None for blocks that no generator can suspend.
        changes: other fields of the context.
    """
    value = _CONTEXT.get()
    frame = None if outside is None else _generator_frame()
    if outside is not None and frame is not None:
        block = Block(frame, source, selection, dict.fromkeys(selection, outside()), changes)
        _OPEN_BLOCKS.setdefault(frame, []).append(block)
        _CONTEXT.set(replace(value, blocks=(*_open_blocks(value.blocks), block)))
        return
    present = sys.modules[__name__].current
    _CONTEXT.set(
        replace(
            present,
            selection={**present.selection, **selection},
            **changes,
            outer=value,
            source=source,
            blocks=(),
        )
    )


def leave(source: Any) -> bool:
    """Restore the context from before ``enter`` of this source. Returns False and changes nothing
    if the block of this source is not the one that was opened last in this thread or task."""
    value = _CONTEXT.get()
    blocks = [
        block
        for blocks in tuple(_OPEN_BLOCKS.values())
        for block in blocks
        if block.source is source
    ]
    if blocks:
        frame = _generator_frame()
        in_frame = [block for block in blocks if block.frame is frame]
        if in_frame or value.source is not source:
            block = (in_frame or blocks)[-1]
            _close_block(block)
            _CONTEXT.set(_remove_block(value, block))
            return True
    if value.source is not source or value.outer is None:
        return False
    outer, remaining = value.outer, _open_blocks(value.blocks)
    _CONTEXT.set(replace(outer, blocks=(*outer.blocks, *remaining)) if remaining else outer)
    return True


def _open_blocks(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    return tuple(block for block in blocks if block.frame is not None)


def _close_block(block: Block) -> None:
    frame: Any = block.frame
    _OPEN_BLOCKS[frame].remove(block)
    if not _OPEN_BLOCKS[frame]:
        del _OPEN_BLOCKS[frame]
    block.frame, block.resolved = None, (None, None)
    _ENDED_COUNT[0] += 1


def _remove_block(value: Context, block: Block) -> Context:
    """The context ``value`` with a generator's block removed from it and from its outer
    contexts."""
    outer = None if value.outer is None else _remove_block(value.outer, block)
    if outer is value.outer and block not in value.blocks:
        return value
    remaining = tuple(listed for listed in value.blocks if listed is not block)
    changed = replace(value, outer=outer, blocks=remaining)
    return _EMPTY if changed.outer is None and changed == _EMPTY else changed


@contextmanager
def override(
    selection: Mapping[str, Any] | None = None,
    *,
    outside: Callable[[], Any] | None = None,
    **changes: Any,
) -> Iterator[None]:
    """A block with this selection and other fields of the context (``enter``, ``leave``)."""
    source = object()
    enter(source, selection or {}, outside=outside, **changes)
    try:
        yield
    finally:
        leave(source)
