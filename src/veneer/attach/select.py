"""Select the adapter of a call: ``with veneer.use(model, "a"): model(x)``, or the model's default
adapter, which ``veneer.set_default(model, "a")`` sets.

A selection applies inside of its ``with`` block, in the same thread or asyncio task. In a generator
it applies during the steps of the generator (see ``veneer.context``). Activation checkpointing runs
layers again during backward, so the backward pass belongs inside of the block too.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn

from veneer import context
from veneer.attach.layer.lookup import need_adapters, unwrap
from veneer.attach.layer.state import BASE, ActiveAdapter, OutsideGenerator, one_thread_at_a_time
from veneer.attach.rows.blend import blend_adapters, require_finite_coefficients
from veneer.attach.rows.select_rows import by_rows
from veneer.errors import SelectionError
from veneer.kernels import cost_model

#: the choice for a call or a row of the batch: the name of an adapter, None for the base alone, or
#: a blend {name: weight}
Choice = str | Mapping[str, float] | None
#: the type of a function that ``use`` decorates
Function = TypeVar("Function", bound=Callable[..., Any])


class use:
    """A context manager that selects the adapter ``name`` of ``model``, or the base alone if
    ``name`` is None.

    A mapping {name: weight} selects a blend: W + Σ wᵢ (W′ᵢ − W) for each weight W of the model and
    for each parameter that is trained in full, where W′ᵢ is W as the i-th adapter changes it. The
    adapters may differ in layers, variants and ranks. Gradients reach each of them. A weight wᵢ of
    0 leaves an adapter out.

    A sequence of names, None and blends selects one of them for each row of the batch: ``with
    veneer.use(model, ["a", None, {"a": 0.7, "b": 0.3}]):``. A layer then runs once for each
    distinct entry, unless it is a linear layer that can compute all rows at once.

    A ``with`` block in a generator applies while the generator runs. Between two steps of the
    generator, a call that makes no selection is an error, because the caller may or may not expect
    the block to apply. As a decorator, ``@veneer.use(model, "a")`` selects in each call of a
    function. In a decorated generator function, asynchronous or not, the selection applies only
    during the steps of the generator.

    Args:
        path: "factored" (the product with W plus the low-rank product) or "materialised" (the
            product with W + ΔW) for the layers that support both. None leaves the choice to each
            layer; ``Handle.plan`` shows it.

    Raises:
        SelectionError: there is no such adapter or path, a blend is empty, or a weight wᵢ is not a
            finite number. In a call: a blend in training mode at a module with running statistics,
            which belong to one adapter; or a call between two steps of a generator with an open
            block. At the end of the block: blocks that were entered by hand are left in another
            order, thread or task.
    """

    def __init__(
        self, model: nn.Module, name: Choice | Sequence[Choice], *, path: str | None = None
    ) -> None:
        if path not in (None, cost_model.FACTORED, cost_model.MATERIALISED):
            raise SelectionError(
                f"path={path!r}",
                "a way to compute an adapted layer",
                f"use {cost_model.FACTORED!r}, {cost_model.MATERIALISED!r} or None",
            )
        self._context_fields: dict[str, Any] = {} if path is None else {"path": path}
        model_adapters = need_adapters(model, check_all_layers=False)
        self._model_uid = model_adapters.uid
        self._name = name
        if name is None or isinstance(name, str | Mapping):
            self._selected = active_adapter(model, name)
        elif isinstance(name, Iterable) and not isinstance(name, Set):
            # One ``ActiveAdapter`` for equal choices, so that their rows run together. Equal names
            # mean equal choices, because the name of a blend contains its exact weights.
            active_by_name: dict[str | None, ActiveAdapter] = {}
            active_per_row = [active_adapter(model, choice) for choice in name]
            active_per_row = [
                active_by_name.setdefault(active.name, active) for active in active_per_row
            ]
            self._selected = by_rows(unwrap(model), model_adapters, active_per_row)
        else:
            raise SelectionError(
                f"{name!r} to use",
                "a name, None, a blend {name: weight}, or a list of these, one for each row",
                "choose one of these",
            )
        self._was_entered = False

    def __enter__(self) -> None:
        self._was_entered = True
        context.enter(
            self,
            {self._model_uid: self._selected},
            # calls while a generator that has entered this block is suspended raise an error
            make_suspended=lambda: OutsideGenerator(f"veneer.use(…, {self._name!r})"),
            **self._context_fields,
        )

    def __exit__(self, *_: object) -> None:
        if not context.leave(self):
            raise SelectionError(
                f"`veneer.use(…, {self._name!r})` left out of order, "
                "or in another thread or task than it was entered",
                "the block that was entered last here",
                "leave blocks where they were entered, the last one first, as `with` does",
            )

    def __call__(self, function: Function) -> Function:
        """Wrap ``function`` so that its calls run with this selection. A generator function runs
        with it during the steps of the generator."""
        self._was_entered = True
        return wrap_calls_in(
            lambda: context.override({self._model_uid: self._selected}, **self._context_fields),
            function,
        )

    def __del__(self) -> None:
        # Warn, because `veneer.use(…)` without `with` does nothing, but looks as if it selected for
        # all later calls.
        if not getattr(self, "_was_entered", True):
            warnings.warn(
                f"veneer.use(…, {self._name!r}) selects only inside a `with` block; this call did"
                " nothing",
                stacklevel=2,
            )


@one_thread_at_a_time
def set_default(model: nn.Module, name: str | None) -> None:
    """Set the adapter that calls of ``model`` without a selection use. ``name=None`` removes the
    default. Calls without a selection then use the only adapter; if there are several, they raise
    an error.

    The default is a property of the model. It holds in every thread, and in copies and pickles.
    Detaching the adapter clears the default; an adapter that is attached under the same name later
    is not the default. Functions that take an adapter's name use the default if no name is passed.
    Every ``use`` overrides the default; ``veneer.use(model, None)`` selects the base alone.

    Raises:
        SelectionError: there is no such adapter.
    """
    model_adapters = need_adapters(model, name)
    model_adapters.default_name = name
    # also updates ``model_adapters.default``, which calls without a selection use
    model_adapters.set_merge_order(model_adapters.merge_order)


def active_adapter(model: nn.Module, choice: Choice) -> ActiveAdapter:
    """The ``ActiveAdapter`` of a name, a blend or None (the base alone). Raises a SelectionError if
    the model cannot select it."""
    if choice is None:
        return BASE
    if not isinstance(choice, Mapping):
        return need_adapters(model, choice, check_all_layers=False).selections[choice]
    if not choice:
        raise SelectionError(
            "a blend of nothing, {}",
            "at least one adapter",
            'name adapters and their weights, as {"a": 0.7, "b": 0.3}, or None for the base alone',
        )
    require_finite_coefficients(choice)
    if None in choice:
        raise SelectionError(
            "the weight of None in a blend",
            "names alone: what is missing to 1 is the base's anyway",
            "leave it out",
        )
    weighted_adapters = [
        (active_adapter(model, name), coefficient) for name, coefficient in choice.items()
    ]
    weighted_adapters = [
        (active, coefficient) for active, coefficient in weighted_adapters if coefficient
    ]
    return blend_adapters(weighted_adapters) if weighted_adapters else BASE


def wrap_calls_in(make_context: Callable[[], AbstractContextManager[Any]], function: Any) -> Any:
    """Wrap a function so that each call runs in a new context manager, created by ``make_context``.
    In a generator function, asynchronous or not, each step of the generator runs in a new context
    manager, and no context manager is open while the generator is suspended."""

    @functools.wraps(function)
    def generate(*args: Any, **kwargs: Any) -> Any:
        generator = function(*args, **kwargs)
        resume, resume_argument = generator.send, None
        while True:
            try:
                with make_context():
                    yielded_value = resume(resume_argument)
            except StopIteration as stop:
                return stop.value
            try:
                resume, resume_argument = generator.send, (yield yielded_value)
            except GeneratorExit:
                with make_context():
                    generator.close()
                raise
            except BaseException as error:  # the next step raises it in the generator
                resume, resume_argument = generator.throw, error

    @functools.wraps(function)
    async def generate_async(*args: Any, **kwargs: Any) -> Any:
        generator = function(*args, **kwargs)
        resume, resume_argument = generator.asend, None
        while True:
            try:
                with make_context():
                    yielded_value = await resume(resume_argument)
            except StopAsyncIteration:
                return
            try:
                resume, resume_argument = generator.asend, (yield yielded_value)
            except GeneratorExit:
                with make_context():
                    await generator.aclose()
                raise
            except BaseException as error:  # the next step raises it in the generator
                resume, resume_argument = generator.athrow, error

    @functools.wraps(function)
    async def run_async(*args: Any, **kwargs: Any) -> Any:
        with make_context():
            return await function(*args, **kwargs)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with make_context():
            return function(*args, **kwargs)

    if inspect.isgeneratorfunction(function):
        return generate
    if inspect.isasyncgenfunction(function):
        return generate_async
    return run_async if inspect.iscoroutinefunction(function) else run
