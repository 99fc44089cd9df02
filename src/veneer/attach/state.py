"""What an adapted model remembers.

    ModelAdapters       one a model, under the attribute ``_veneer``: names and configs of the adapters, which is merged
    LayerState          one an adapted layer, its child ``veneer``: the adapters of the layer, how it reads its weights
    ActiveAdapter       what one call uses: for the key of each layer, what the adapter does there

A call looks its ``ActiveAdapter`` up in the current context (``context.py``) by the model's
``uid``; without an entry it is the model's default.
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
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import SelectionError
from veneer.layers import Layer

if TYPE_CHECKING:
    from veneer.attach.layer_adapter import LayerAdapter

STATE = "veneer"
ADAPTERS = "_veneer"

#: from a module to one below it, by the names of children
ModulePath = tuple[str, ...]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False)
class ActiveAdapter:
    """What one call uses: the adapter's name, and its parts by the key of their layer's state, or
    by (key, method). No name is the base alone; no parts, that it cannot be told, or that the
    adapter has been detached. ``on`` is the adapter that was merged into the weights when this one
    was attached: it changes these. ``stream``: a block in which random numbers are this adapter's
    own (``veneer/engine``), where its rows share a batch; None: torch's."""

    name: str | None
    parts: Mapping[Any, Any] | None
    on: str | None = None
    stream: AbstractContextManager[Any] | None = None

    @property
    def table(self) -> Mapping[Any, Any]:
        """Its parts, or the error of a call whose adapter is gone."""
        if self.parts is None:
            raise self.refusal()
        return self.parts

    def refusal(self) -> SelectionError:
        """The error of a call that selects this although it has no parts."""
        return detached(self.name)


class OutsideGenerator(ActiveAdapter):
    """What a call uses between two steps of a generator that is suspended inside of a block: its
    caller may or may not mean the block to hold for that call. ``block``: how the block reads."""

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

#: Threads that attach and detach take turns. Threads that call the model never wait.
CHANGING = threading.RLock()


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of what changes a model's adapters: one thread at a time."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with CHANGING:
            return function(*args, **kwargs)

    return run


def detached(name: str | None) -> SelectionError:
    """The error of a call whose adapter is gone."""
    problem = f"a call that selects {name!r}, which was detached"
    return SelectionError(
        problem, "an adapter that stays until the call has ended", "detach it later"
    )


#: between the names of adapters that were merged one over the other, of which the upper one was
#: attached without the
#: lower; no adapter's name has it, so that no adapter is one of such weights
OVER = " + "


class ModelAdapters:
    """What the layers of one model share: the adapters' names, configs and parts, and which of them
    is merged. ``uid`` identifies the model in ``context.Context.selection``. A copy of the model is
    another model, so it gets another. ``merged`` names the weights as they are: by the adapter that
    was merged last, where it was attached to those below it; else by all that lie there, joined by
    ``OVER``. ``chain``: the merged adapters, the first one first. ``root`` is the model; unknown of
    a copy until it is seen at one. ``merging``: a merge has not come to its end, so that only
    weights of which a copy is kept may have been written. ``untied``: what is to be tied again with
    the last adapter (``weight_tying.Untied``)."""

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
        self.paths: dict[int, str] = {}  # of each layer's key: where it was as it was first adapted
        self.banks = 0  # who need adapted layers although no adapter of the model's own is there

    def set_adapters(
        self, configs: dict[str, LoraConfig], selections: dict[str, ActiveAdapter]
    ) -> None:
        """Replace the adapters, and with them the default selection: the one that was set, unless
        it is gone, else the only adapter, if there is just one."""
        self.configs, self.selections = configs, selections
        if self.default_name not in configs:
            self.default_name = None
        self.set_chain(self.chain)

    def set_chain(self, chain: tuple[str, ...]) -> None:
        """These adapters are merged, the first one first. The default selection follows."""
        self.chain, self.merged = chain, (None, *self._labels(chain))[-1]
        selections = self.selections
        if self.stacked:  # nothing else runs on these weights
            self.default = ActiveAdapter(self.merged, {})
            return
        if self.default_name is not None:
            self.default = selections[self.default_name]
        elif len(selections) == 1:
            self.default = next(iter(selections.values()))
        else:
            self.default = AMBIGUOUS if selections else BASE

    def _labels(self, chain: tuple[str, ...]) -> list[str]:
        """What ``merged`` is after each of these merges."""
        labels: list[str] = []
        for name in chain:
            below = labels[-1] if labels else None
            own = below is None or self.selections[name].on == below
            labels.append(name if own else f"{below}{OVER}{name}")
        return labels

    @property
    def stacked(self) -> bool:
        """Whether an adapter is merged over others that it was not attached to."""
        return self.merged is not None and OVER in self.merged

    def can_lie_over(self, name: str) -> bool:
        """Whether an adapter was attached to weights that lie below the merges, or to those as they
        are."""
        return self.selections[name].on in (None, *self._labels(self.chain))

    def merges(self) -> list[str]:
        """The merged adapters, the last one first."""
        return [*reversed(self.chain)]

    def claim(self, root: nn.Module) -> None:
        """These are the adapters of ``root``."""
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
        made = memo[id(self)] = object.__new__(ModelAdapters)
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # the whole model is copied
        if self.root is not None and (root := memo.get(id(self.root()))) is not None:
            made.claim(root)
        return made


#: Those of copies that have not been seen at the root of a model: of layers that were copied out
#: of one, which may by
#: now be in another, or in the same.
STRAY: weakref.WeakSet[ModelAdapters] = weakref.WeakSet()


class LayerState(nn.Module):
    """The adapters of one layer, by name, and how this layer reads its weights.

    ``layer`` is its kind (None for a module without parameters of its own, which only reads those
    of others), ``factors`` says that the factored form is right for it, ``product`` that it is a
    matrix product with a plain weight, which the fused kernel computes, ``stock`` that its class is
    one that the kind names, as found when it was attached (a compiled call that asked again would
    be compiled anew after each import), ``transposed`` that it holds the adapted weight transposed
    (a linear head tied to an embedding), ``attributes`` are those that a view of it gets in place
    of its own: a switch that turns a fused fast path off, and ``bound`` those that hold methods
    bound to the module. ``own_forward`` stood in the place of forward on the module, and runs where
    that would; ``opaque`` is the storage of a module that is its own weight, by which that forward
    passes gradients on.
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
        """Of a call whose selection names no parts, or another adapter than the merged one."""
        merged = self.attached.merged
        if chosen.parts is None and chosen.name is not None:
            return chosen.refusal()
        if chosen.parts is None:
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
        if self.attached.stacked:
            expected = "a call without a selection, which has all that is merged"
        return SelectionError(problem, expected, "call veneer.unmerge(model) first")

    def get(self, name: str) -> LayerAdapter | None:
        """The part of this adapter here."""
        return cast("LayerAdapter | None", self._modules.get(name))
