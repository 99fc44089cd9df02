"""The state of an adapted model.

    ModelAdapters   one per model, its attribute ``_veneer``: names and configs of the adapters, and
                    which of them is merged
    LayerState      one per adapted layer, its child ``veneer``: the adapters of the layer, and how
                    the layer uses its weights
    ActiveAdapter   the selection of one call: what the adapter does at each layer, by its key

A call looks up its ``ActiveAdapter`` in the current context (``context.py``) by the model's
``uid``. Without an entry it uses the model's default.
"""

from __future__ import annotations

import copy
import functools
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import SelectionError
from veneer.layers import Layer

STATE = "veneer"
ADAPTERS = "_veneer"

#: the names of the children that lead from a module to one below it
ModulePath = tuple[str, ...]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False)
class ActiveAdapter:
    """The selection of one call.

    Fields:
        name: the adapter; None for the base alone.
        layer_adapters: what the adapter does at each layer, by the key of the layer's state or by
            (key, method). None if several adapters are possible and none was selected, or if the
            adapter has been detached: then a call is an error.
        on: the adapter that was merged into the weights when this one was attached, which is
            therefore a change of those weights.
        stream: a block in which random numbers come from this adapter's own stream
            (``veneer/engine``), where its rows share a batch with others; None for torch's.
        invocation_tokens: those of the adapter's config; empty for an adapter that acts on every
            token.
    """

    name: str | None
    layer_adapters: Mapping[Any, Any] | None
    on: str | None = None
    stream: AbstractContextManager[Any] | None = None
    invocation_tokens: tuple[int, ...] = ()

    @property
    def table(self) -> Mapping[Any, Any]:
        """``layer_adapters``; a SelectionError if there are none."""
        if self.layer_adapters is None:
            raise self.refusal()
        return self.layer_adapters

    def refusal(self) -> SelectionError:
        """The error of a call with this selection, which has no ``layer_adapters``."""
        return detached_error(self.name)


class OutsideGenerator(ActiveAdapter):
    """The selection of a call between two steps of a generator that is suspended inside a block.

    The caller may or may not expect the block to hold for that call, so the call is an error.
    ``block`` is the source text of the block, for the error.
    """

    def __init__(self, block: str) -> None:
        super().__init__(f"the selection of a suspended generator, {block}", None)
        self.block = block

    def refusal(self) -> SelectionError:
        problem = f"a call outside of a generator that is suspended inside of `with {self.block}:`"
        expected = "a call inside of that block, or one that selects for itself"
        do = (
            "decorate the generator function instead (`@veneer.use(model, name)`: it then selects"
            " in its steps alone), or put this call into a `with veneer.use(model, name):` of its"
            " own; a generator whose block is to hold for its caller is a"
            " `contextlib.contextmanager`"
        )
        return SelectionError(problem, expected, do)


BASE = ActiveAdapter(None, {})
AMBIGUOUS = ActiveAdapter(None, None)

#: Held by threads that attach, detach or merge. Threads that call the model never wait for it.
CHANGING = threading.RLock()


def one_thread_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of functions that change a model's adapters."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with CHANGING:
            return function(*args, **kwargs)

    return run


def detached_error(name: str | None) -> SelectionError:
    """The error of a call whose adapter has been detached."""
    problem = f"a call that selects {name!r}, which was detached"
    return SelectionError(
        problem, "an adapter that stays until the call has ended", "detach it later"
    )


#: joins the names of adapters in ``ModelAdapters.merged`` if one was merged over another that it
#: was not attached to. No adapter name contains it, so no adapter can be attached to such weights.
OVER = " + "


class ModelAdapters:
    """The adapters of one model, shared by its layers.

    Attributes:
        uid: identifies the model in ``context.Context.selection``. A copy of a model is another
            model and gets another ``uid``.
        chain: the merged adapters, in the order of the merges.
        merged: the name of the weights as they are; None for the base's. It is the name of the
            last merged adapter if that was attached to the weights below it, else all names of the
            chain joined by ``OVER``.
        merging: a merge has begun and not ended. Only weights with a backup may have been written.
        root: the model. Unknown for a copy until the copied model is used.
        untied: the weights to tie again when the last adapter is detached
            (``weight_tying.Untied``).
        required_grad: ``requires_grad`` of the base's parameters, by path, before the first attach.
    """

    #: the adapter of calls that select none (``veneer.set_default``); None: the only one, if there
    #: is one
    default_name: str | None = None
    root: weakref.ref[nn.Module] | None = None
    merging = False
    chain: tuple[str, ...] = ()
    untied: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.uid = uuid.uuid4().hex
        self.configs: dict[str, LoraConfig] = {}
        self.selections: dict[str, ActiveAdapter] = {}
        self.default = BASE
        self.merged: str | None = None
        self.required_grad: dict[str, bool] = {}
        self.keys = 0
        self.paths: dict[int, str] = {}  # layer key -> path of the layer when it was first adapted
        self.banks = 0  # banks of this model, which need adapted layers even without an adapter

    def set_adapters(
        self, configs: dict[str, LoraConfig], selections: dict[str, ActiveAdapter]
    ) -> None:
        """Replace the adapters and update the default selection: the default that was set, if it is
        still there, else the only adapter."""
        self.configs, self.selections = configs, selections
        if self.default_name not in configs:
            self.default_name = None
        self.set_chain(self.chain)

    def set_chain(self, chain: tuple[str, ...]) -> None:
        """Set the merged adapters, in the order of the merges, and update the default selection."""
        self.chain, self.merged = chain, (None, *self._labels(chain))[-1]
        selections = self.selections
        if self.has_unrelated_merges:  # nothing else runs on these weights
            self.default = ActiveAdapter(self.merged, {})
            return
        if self.default_name is not None:
            self.default = selections[self.default_name]
        elif len(selections) == 1:
            self.default = next(iter(selections.values()))
        else:
            self.default = AMBIGUOUS if selections else BASE

    def _labels(self, chain: tuple[str, ...]) -> list[str]:
        """The value of ``merged`` after each of these merges."""
        labels: list[str] = []
        for name in chain:
            below = labels[-1] if labels else None
            attached_here = below is None or self.selections[name].on == below
            labels.append(name if attached_here else f"{below}{OVER}{name}")
        return labels

    @property
    def has_unrelated_merges(self) -> bool:
        """Whether an adapter is merged over others that it was not attached to."""
        return self.merged is not None and OVER in self.merged

    def can_merge(self, name: str) -> bool:
        """Whether an adapter was attached to the base, or to the weights after one of the
        merges."""
        return self.selections[name].on in (None, *self._labels(self.chain))

    def merges(self) -> list[str]:
        """The merged adapters, the last merge first."""
        return [*reversed(self.chain)]

    def claim(self, root: nn.Module) -> None:
        """Note that these are the adapters of the model ``root``."""
        if self.root is None:
            self.root = weakref.ref(root)
            STRAY.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("uid", "default", "root")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, uid=uuid.uuid4().hex, banks=0)
        self.set_adapters(self.configs, self.selections)
        STRAY.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelAdapters:
        copied = memo[id(self)] = object.__new__(ModelAdapters)
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # the root is in the memo if the full model is being copied
        if self.root is not None and (root := memo.get(id(self.root()))) is not None:
            copied.claim(root)
        return copied


#: copies without a known root: layers that were copied out of a model, and that may now be part of
#: another model, or of the same one
STRAY: weakref.WeakSet[ModelAdapters] = weakref.WeakSet()


class LayerState(nn.Module):
    """The adapters of one layer, by name, and how this layer uses its weights.

    Attributes:
        key: identifies the layer in ``ActiveAdapter.layer_adapters``.
        layer: its kind; None for a module without parameters that only reads those of others.
        factors: whether the factored form is right for it.
        product: whether it is a matrix product with a plain weight, which the fused kernel
            computes.
        stock: whether its class is one that the kind names. Determined once, when the layer is
            adapted: a compiled call that asked again would be recompiled after each import.
        transposed: whether it holds the adapted weight transposed (a linear head tied to an
            embedding).
        attributes: attributes that a view of the module gets in place of the module's own, such as
            a switch that turns a fused fast path off.
        bound: the names of attributes that hold methods bound to the module.
        own_forward: a forward that was set on the module instance, which runs in place of the
            class's forward.
        opaque: the storage of a module that is its own weight; its forward passes gradients on.
    """

    def __init__(
        self,
        attached: ModelAdapters,
        layer: Layer | None,
        factors: bool,
        attributes: Mapping[str, Any],
        product: bool,
    ) -> None:
        super().__init__()
        attached.keys += 1
        self.attached, self.key = attached, attached.keys
        self.layer, self.factors, self.product, self.transposed = layer, factors, product, False
        self.stock = False
        self.attributes = dict(attributes)
        self.bound: tuple[str, ...] = ()
        self.own_forward: FunctionType | None = None
        self.opaque: Any = None

    def refusal(self, chosen: ActiveAdapter) -> SelectionError:
        """The error of a call that selects nothing usable, or another adapter than the merged
        one."""
        merged = self.attached.merged
        if chosen.layer_adapters is None and chosen.name is not None:
            return chosen.refusal()
        if chosen.layer_adapters is None:
            problem = (
                f"{len(self.attached.configs)} adapters ({', '.join(self.attached.configs)}) and"
                " none selected"
            )
            do = (
                "call the model inside `with veneer.use(model, name):`, or"
                " veneer.set_default(model, name) once"
            )
            return SelectionError(problem, "one selected adapter, or None for the base", do)
        if merged is None:
            problem = (
                f"a call that selects {chosen.name!r}, attached while {chosen.on!r} was merged, "
                "which it no longer is"
            )
            return SelectionError(
                problem, "the weights that it was attached to", f"merge {chosen.on!r} again"
            )
        problem = f"a call that selects {chosen.name!r} while {merged!r} is merged into the weights"
        expected = f"the merged adapter {merged!r}, or one that was attached while it was merged"
        if self.attached.has_unrelated_merges:
            expected = "a call without a selection, which has all that is merged"
        return SelectionError(problem, expected, "call veneer.unmerge(model) first")

    def get(self, name: str) -> Any:
        """The ``LayerAdapter`` of the adapter ``name`` here; None if it changes nothing here."""
        return self._modules.get(name)
