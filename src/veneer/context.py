"""What holds for one call: which adapter each model uses, and which arithmetic.

The state is an immutable value in a ``ContextVar``, so it belongs to the running thread or asyncio
task. It is read as ``context.current``, an attribute of the module (PEP 562) and no function:
``torch.compile`` cannot trace ``ContextVar.get``, but guards module attributes, and reads this one
afresh before each run.

A context variable does not follow a generator: a value that is set in one stays set for its caller
while the generator is suspended. So a block that is opened in a generator (``Block``) is kept under
that generator's frame instead. It holds for the code that runs above that frame on the stack,
whichever thread or task advances the generator. As long as no such block is open, a call pays one
look at an empty dict for this.
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
    """``selection``: by model's id what it uses (``ActiveAdapter``; missing: its default). ``path``
    forces "factored" or "materialised". ``reached`` collects what runs, for ``check``. ``outer`` is
    what holds after the block, and ``source`` what opened it. ``blocks`` are those of generators
    that were opened in this thread or task, or in the one whose context this is a copy of;
    ``included`` are those that the selection has already taken in."""

    selection: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    reached: set[Any] | None = None
    outer: Context | None = field(default=None, repr=False, compare=False)
    source: Any = field(default=None, repr=False, compare=False)
    blocks: tuple[Block, ...] = ()
    included: frozenset[Block] = frozenset()


class Block:
    """A block that was opened in a generator. ``frame``: the generator's, None once the block has
    ended. ``outside``: what models use, instead of ``selection``, in a call that may be meant to be
    inside of the block or not."""

    def __init__(
        self,
        frame: FrameType,
        source: Any,
        selection: Mapping[str, Any],
        outside: Mapping[str, Any],
        changes: Any,
    ) -> None:
        self.frame: FrameType | None = frame
        self.source, self.selection, self.outside, self.changes = (
            source,
            selection,
            outside,
            changes,
        )
        self.caller = threading.get_ident(), _task()
        self.resolved: tuple[Any, Any] = (None, None)

    def state(self, caller: tuple[int, Any]) -> str:
        """Of a block whose generator does not run below the caller. "inside": the caller is a task
        or thread that was started by the generator's present step; "ended"; "outside": neither, or
        it cannot be known."""
        home, frame = caller == self.caller, self.frame
        if frame is None:
            return "ended" if home else "outside"
        return "inside" if not home and (frame.f_back is not None or _awaits(frame)) else "outside"


_NOTHING = Context()
_CONTEXT: ContextVar[Context] = ContextVar("veneer", default=_NOTHING)
#: by the frame of a generator, the blocks that are open in it
_OPEN: dict[FrameType, list[Block]] = {}
#: how many of them have ended
_ENDED = [0]

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
#: modules that run a generator up to its ``yield`` on behalf of a caller for whom its blocks are
#: meant to hold
_HOLDERS = ("_pytest.fixtures", "pytest_asyncio.plugin")

if TYPE_CHECKING:
    current: Context


def __getattr__(name: str) -> Context:
    if name != "current":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _CONTEXT.get()
    if (
        value is _NOTHING
        and torch._C._current_graph_task_id() != -1
        and torch._C._is_key_in_tls("context")
    ):
        # A GPU's part of backward runs in threads of torch's own, which have no context of ours;
        # activation checkpointing runs layers again there. torch hands them a copy of the context
        # of whoever called ``backward``.
        value = torch._C._get_obj_in_tls("context").get(_CONTEXT, _NOTHING)
    return _with_blocks(value) if _OPEN or value.blocks else value


def _with_blocks(value: Context) -> Context:
    """A context with the blocks of the generators that run below the caller, the innermost last."""
    frames = _frames_below()
    if not frames and not value.blocks:
        return value
    running = [block for frame in frames for block in _OPEN.get(frame, ())]
    caller = threading.get_ident(), _task()
    key = value, running, caller, _ENDED[0]
    if running and running[-1].resolved[0] == key:  # every layer of a step asks for the same
        return running[-1].resolved[1]
    others = [
        block for block in value.blocks if block not in running and block not in value.included
    ]
    states = [block.state(caller) for block in others]
    selection, changes = dict(value.selection), {}
    for block, state in zip(others, states, strict=True):
        if state == "outside":
            selection.update(block.outside)
    inside = [block for block, state in zip(others, states, strict=True) if state == "inside"]
    for block in (*inside, *(block for block in running if block not in value.included)):
        selection.update(block.selection)
        changes.update(block.changes)
    included = value.included.union(inside, running)
    made = replace(value, selection=selection, blocks=(), included=included, **changes)
    # those of another's may begin to run at any time
    if running and all(block.caller == caller for block in others):
        running[-1].resolved = key, made
    return made


def _frames_below() -> list[FrameType]:
    """The frames of generators with open blocks on this thread's stack, the outermost first."""
    # the others are suspended
    suspects = [frame for frame in tuple(_OPEN) if frame.f_back is not None]
    frames: list[FrameType] = []
    frame = sys._getframe(1) if suspects else None
    while frame is not None:
        if frame in suspects:  # a list of few: compared by identity
            frames.append(frame)
            if len(frames) == len(suspects):
                break
        frame = frame.f_back
    return frames[::-1]


def _generator_frame() -> FrameType | None:
    """The frame of the generator in which a block is entered or left; None: no generator does. A
    generator that is a context manager (``contextlib``) does so for the code that enters it."""
    frame = sys._getframe(2)
    while frame is not None:
        if _enters(frame):
            frame = frame.f_back
            continue
        if not frame.f_code.co_flags & _GENERATOR:
            return None
        driver = frame.f_back
        if driver is None or not (_enters(driver) or driver.f_globals.get("__name__") in _HOLDERS):
            return frame
        frame = driver
    return None


def _enters(frame: FrameType) -> bool:
    """Whether a frame is that of a method with which a context manager is entered or left."""
    methods = ("__enter__", "__exit__", "__aenter__", "__aexit__")
    return frame.f_code.co_name in methods or frame.f_globals.get("__name__") == "contextlib"


def _awaits(frame: FrameType) -> bool:
    """Whether a suspended asynchronous generator is so at an ``await``, and not at a ``yield``."""
    resume = frame.f_lasti + 2  # the operand of RESUME says after which of them
    code = frame.f_code.co_code
    return code[resume] == dis.opmap["RESUME"] and code[resume + 1] & 3 == 3


def _task() -> Any:
    """The asyncio task that runs, as a weak reference, or None."""
    asyncio = sys.modules.get("asyncio")
    loop = None if asyncio is None else asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)  # pyright: ignore[reportOptionalMemberAccess]
    return None if task is None else weakref.ref(task)


def enter(
    source: Any,
    selection: Mapping[str, Any],
    *,
    outside: Callable[[], Any] | None = None,
    **changes: Any,
) -> None:
    """Use this selection beside the present one, and replace other fields of the context, until
    ``leave`` of the same ``source``. ``outside``: in a block of the user's, which a generator may
    open, what makes ``Block.outside``."""
    value = _CONTEXT.get()
    frame = None if outside is None else _generator_frame()
    if outside is not None and frame is not None:
        block = Block(frame, source, selection, dict.fromkeys(selection, outside()), changes)
        _OPEN.setdefault(frame, []).append(block)
        _CONTEXT.set(replace(value, blocks=(*_still_open(value.blocks), block)))
        return
    now = sys.modules[__name__].current
    _CONTEXT.set(
        replace(
            now,
            selection={**now.selection, **selection},
            **changes,
            outer=value,
            source=source,
            blocks=(),
        )
    )


def leave(source: Any) -> bool:
    """Restore what was before ``enter`` of this source. False, and nothing is changed: that is not
    the block that was opened last in this thread or task."""
    value = _CONTEXT.get()
    blocks = [
        block for blocks in tuple(_OPEN.values()) for block in blocks if block.source is source
    ]
    if blocks:
        frame = _generator_frame()
        here = [block for block in blocks if block.frame is frame]
        if here or value.source is not source:
            block = (here or blocks)[-1]
            _close(block)
            _CONTEXT.set(_without(value, block))
            return True
    if value.source is not source or value.outer is None:
        return False
    outer, remaining = value.outer, _still_open(value.blocks)
    _CONTEXT.set(replace(outer, blocks=(*outer.blocks, *remaining)) if remaining else outer)
    return True


def _still_open(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    return tuple(block for block in blocks if block.frame is not None)


def _close(block: Block) -> None:
    frame: Any = block.frame
    _OPEN[frame].remove(block)
    if not _OPEN[frame]:
        del _OPEN[frame]
    block.frame, block.resolved = None, (None, None)
    _ENDED[0] += 1


def _without(value: Context, block: Block) -> Context:
    """A context, and those outside of it, in which a generator's block is no longer listed."""
    outer = None if value.outer is None else _without(value.outer, block)
    if outer is value.outer and block not in value.blocks:
        return value
    changed = replace(
        value, outer=outer, blocks=tuple(other for other in value.blocks if other is not block)
    )
    return _NOTHING if changed.outer is None and changed == _NOTHING else changed


@contextmanager
def changed(
    selection: Mapping[str, Any] | None = None,
    *,
    outside: Callable[[], Any] | None = None,
    **changes: Any,
) -> Iterator[None]:
    """``enter`` and ``leave`` around a block, also when it raises."""
    source = object()
    enter(source, selection or {}, outside=outside, **changes)
    try:
        yield
    finally:
        leave(source)
