"""The state of an adapted model.

    ModelAdapters   one per model, its attribute ``_veneer``: the names and configs of its adapters,
                    and which of them are merged
    LayerState      one per adapted layer, its child ``veneer``: the adapters of the layer, and how
                    the layer uses its weights
    ActiveAdapter   the selection of one call of the model: an object for each changed layer, such
                    as a ``LayerAdapter``, by the layer's key
    Call            one call of an adapted module: its arguments and settings

A call looks up its ``ActiveAdapter`` in the current context (``context.py``), by the model's
``uid``. If the context has no entry for the model, the call uses the model's default.
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
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import nn

from veneer.config import LoraConfig
from veneer.context import Context
from veneer.errors import SelectionError
from veneer.layers import Layer

#: the name of the child of an adapted layer that holds its ``LayerState``
LAYER_STATE_NAME = "veneer"
#: the attribute of a model that holds its ``ModelAdapters``
MODEL_ADAPTERS_NAME = "_veneer"

#: the names of the children that lead from a module to a module below it
ModulePath = tuple[str, ...]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False)
class ActiveAdapter:
    """The selection of one call of a model: an adapter, a blend, an adapter for each row, or the
    base alone.

    Fields:
        name: the name of the adapter or blend; None for the base alone, and for rows with different
            adapters.
        layer_adapters: for each layer that changes, the object that computes its output, such as a
            ``LayerAdapter``. The keys are ``LayerState.key``, or (key, method) for methods
            besides forward. None if the call is an error: the model has several adapters and none
            was selected, or the adapter has been detached.
        merged_at_attach: the value of ``ModelAdapters.merged`` when this adapter was attached. The
            adapter's ΔW is valid only for the weights of that time. None stands for the base's
            weights.
        random_stream: a context manager in which random numbers come from this adapter's own
            generators (``veneer/engine``), so that they do not depend on what else is in the batch.
            None uses torch's default generators.
        invocation_tokens: the invocation tokens of the adapter's config. Empty for an adapter that
            acts on every token.
    """

    name: str | None
    layer_adapters: Mapping[Any, Any] | None
    merged_at_attach: str | None = None
    random_stream: AbstractContextManager[Any] | None = None
    invocation_tokens: tuple[int, ...] = ()

    @property
    def usable_layer_adapters(self) -> Mapping[Any, Any]:
        """``layer_adapters``. Raises a SelectionError if they are None."""
        if self.layer_adapters is None:
            raise self.selection_error()
        return self.layer_adapters

    def selection_error(self) -> SelectionError:
        """The error of a call with this selection, whose ``layer_adapters`` are None."""
        return detached_error(self.name)


class OutsideGenerator(ActiveAdapter):
    """The selection of a call that is made while a generator is suspended inside of a ``with
    veneer.use(…)`` block.

    The caller may or may not expect the block to apply to that call, so the call raises an error.
    ``block_source`` is the source text of the block's context manager, for the error.
    """

    def __init__(self, block_source: str) -> None:
        super().__init__(f"the selection of a suspended generator, {block_source}", None)
        self.block_source = block_source

    def selection_error(self) -> SelectionError:
        return SelectionError(
            "a call outside of a generator that is suspended inside of"
            f" `with {self.block_source}:`",
            "a call inside of that block, or one that selects for itself",
            "decorate the generator function instead (`@veneer.use(model, name)`: it then selects"
            " in its steps alone), or put this call into a `with veneer.use(model, name):` of its"
            " own; a generator whose block is to hold for its caller is a"
            " `contextlib.contextmanager`",
        )


#: the selection of the base alone
BASE = ActiveAdapter(None, {})
#: the selection of a call of a model that has several adapters and no default: the call is an error
NONE_SELECTED = ActiveAdapter(None, None)

#: A lock that is held while adapters are attached, detached or merged. Threads that call the model
#: never wait for it.
ADAPTER_CHANGE_LOCK = threading.RLock()


def one_thread_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of functions that change a model's adapters: a call holds ``ADAPTER_CHANGE_LOCK``,
    so that no two threads change adapters at once."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ADAPTER_CHANGE_LOCK:
            return function(*args, **kwargs)

    return run


def detached_error(name: str | None) -> SelectionError:
    """The error of a call whose adapter has been detached."""
    return SelectionError(
        f"a call that selects {name!r}, which was detached",
        "an adapter that stays until the call has ended",
        "detach it later",
    )


#: joins two adapter names in ``ModelAdapters.merged`` if the second adapter was merged on top of
#: the first, although it had been attached to weights without the first. No adapter name contains
#: this text.
MERGED_OVER = " + "


class ModelAdapters:
    """The adapters of one model, shared by its layers.

    Attributes:
        uid: identifies the model in ``context.Context.selection``. A copy of a model is another
            model and gets another ``uid``.
        configs, selections: the config and the ``ActiveAdapter`` of each adapter, by name.
        default: the ``ActiveAdapter`` of calls that select none.
        default_name: the adapter that ``veneer.set_default`` set as the default; None if none was
            set.
        merge_order: the names of the merged adapters, in the order of the merges.
        merged: a label for the present weights. None stands for the base's weights. A merge sets it
            to the name of the merged adapter, if that adapter was attached to the weights as they
            were just before the merge; else to the label of those weights and the name, joined by
            ``MERGED_OVER``.
        is_merging: whether a merge has begun and not ended. An error may have stopped it, but only
            weights that have a backup may have been overwritten.
        root: a weak reference to the model. None for a copy of this object until the copy of the
            model is used.
        untied: the weights to tie again when the last adapter is detached
            (``weight_tying.Untied``).
        original_requires_grad: ``requires_grad`` of the base's parameters before the first attach,
            by path.
        last_layer_key: the largest ``LayerState.key`` so far.
        layer_paths: the path of each layer when it was first adapted, by the layer's key.
        bank_count: the number of ``Bank`` objects on this model. They need adapted layers even if
            the model has no adapter.
    """

    default_name: str | None = None
    root: weakref.ref[nn.Module] | None = None
    is_merging = False
    merge_order: tuple[str, ...] = ()
    untied: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.uid = uuid.uuid4().hex
        self.configs: dict[str, LoraConfig] = {}
        self.selections: dict[str, ActiveAdapter] = {}
        self.default = BASE
        self.merged: str | None = None
        self.original_requires_grad: dict[str, bool] = {}
        self.last_layer_key = 0
        self.layer_paths: dict[int, str] = {}
        self.bank_count = 0

    def set_adapters(
        self, configs: dict[str, LoraConfig], selections: dict[str, ActiveAdapter]
    ) -> None:
        """Replace the adapters and update ``default``. If the adapter that was set as the default
        is no longer attached, no adapter is set as the default."""
        self.configs, self.selections = configs, selections
        if self.default_name not in configs:
            self.default_name = None
        self.set_merge_order(self.merge_order)

    def set_merge_order(self, merged_names: tuple[str, ...]) -> None:
        """Set the merged adapters, in the order of the merges, and update ``merged`` and
        ``default``, the selection of calls that select none: the adapter that was set as the
        default, else the only adapter."""
        self.merge_order, self.merged = merged_names, (None, *self._merged_labels(merged_names))[-1]
        selections = self.selections
        if self.has_unrelated_merges:
            # No single adapter belongs to these weights, so calls run them without one.
            self.default = ActiveAdapter(self.merged, {})
            return
        if self.default_name is not None:
            self.default = selections[self.default_name]
        elif len(selections) == 1:
            self.default = next(iter(selections.values()))
        else:
            self.default = NONE_SELECTED if selections else BASE

    def _merged_labels(self, merged_names: tuple[str, ...]) -> list[str]:
        """The value of ``merged`` after each merge, if these adapters are merged in this order."""
        labels: list[str] = []
        for name in merged_names:
            label_before = labels[-1] if labels else None
            was_attached_to_these = (
                label_before is None or self.selections[name].merged_at_attach == label_before
            )
            labels.append(name if was_attached_to_these else f"{label_before}{MERGED_OVER}{name}")
        return labels

    @property
    def has_unrelated_merges(self) -> bool:
        """Whether an adapter is merged over other adapters that were not merged when it was
        attached."""
        return self.merged is not None and MERGED_OVER in self.merged

    def can_merge(self, name: str) -> bool:
        """Whether the adapter ``name`` may be merged now: it was attached to the base's weights, or
        to the weights after one of the merges in ``merge_order``."""
        return self.selections[name].merged_at_attach in (
            None,
            *self._merged_labels(self.merge_order),
        )

    def claim(self, root: nn.Module) -> None:
        """Record that these are the adapters of the model ``root``, unless their model is known."""
        if self.root is None:
            self.root = weakref.ref(root)
            COPIES_WITHOUT_ROOT.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("uid", "default", "root")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, uid=uuid.uuid4().hex, bank_count=0)
        self.set_adapters(self.configs, self.selections)
        COPIES_WITHOUT_ROOT.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelAdapters:
        adapters_copy = memo[id(self)] = object.__new__(ModelAdapters)
        adapters_copy.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # if the full model is being copied, the memo holds its copy, which is the new root
        if self.root is not None and (root := memo.get(id(self.root()))) is not None:
            adapters_copy.claim(root)
        return adapters_copy


#: copies of ``ModelAdapters`` whose model is not known yet. If layers were copied out of a model,
#: their copy may be part of another model or of the same one, so lookups check all layers.
COPIES_WITHOUT_ROOT: weakref.WeakSet[ModelAdapters] = weakref.WeakSet()


class LayerState(nn.Module):
    """The adapters of one layer, by name, and how this layer uses its weights.

    Attributes:
        model_adapters: the ``ModelAdapters`` of the model through which the layer was adapted.
        key: identifies the layer in ``ActiveAdapter.layer_adapters``.
        layer: the kind of the layer (``veneer.layers``). None for a module that has no parameters
            and only reads the weights of other modules.
        supports_factored: whether the layer's output can be computed as op(x; W) + op(x; ΔW).
        is_plain_product: whether the layer is a matrix product with a plain weight, which the fused
            kernel computes.
        is_stock_class: whether the layer's class is one that its kind lists, such as ``nn.Linear``.
            Determined once, when the layer is adapted: if each call determined it, torch.compile
            would recompile the call after each import of a module.
        view_attributes: attributes that a view of the module gets in place of the module's, such as
            a switch that turns a fused fast path off.
        bound_methods: the names of attributes of the module that hold its bound methods.
        instance_forward: a forward that was set on the module instance, which runs in place of the
            class's forward. None if there is none.
        opaque_storage: ``BASES["opaque"]`` for a module whose weight only its own forward can read,
            or whose forward may have no derivative. The storage's method ``call`` runs that forward
            and passes gradients on to the input, or raises an error if it cannot. None for every
            other module.
        base_dtypes: a cache of ``views.py``: the dtypes of the tensors in the output of the layer
            without adapters, by everything that they depend on, such as the arguments' dtypes.
    """

    def __init__(
        self,
        model_adapters: ModelAdapters,
        layer: Layer | None,
        supports_factored: bool,
        view_attributes: Mapping[str, Any],
        is_plain_product: bool,
    ) -> None:
        super().__init__()
        model_adapters.last_layer_key += 1
        self.model_adapters, self.key = model_adapters, model_adapters.last_layer_key
        self.layer, self.supports_factored = layer, supports_factored
        self.is_plain_product, self.is_stock_class = is_plain_product, False
        self.view_attributes = dict(view_attributes)
        self.bound_methods: tuple[str, ...] = ()
        self.instance_forward: FunctionType | None = None
        self.opaque_storage: Any = None
        self.base_dtypes: dict[Any, tuple[Any, ...]] = {}

    def selection_error(self, active_adapter: ActiveAdapter) -> SelectionError:
        """The error of a call whose selection cannot run: it selects none of several adapters, a
        detached adapter, or an adapter (or the base alone) that does not belong to the present
        weights, because an adapter was merged or unmerged."""
        merged = self.model_adapters.merged
        if active_adapter.layer_adapters is None and active_adapter.name is not None:
            return active_adapter.selection_error()
        if active_adapter.layer_adapters is None:
            configs = self.model_adapters.configs
            return SelectionError(
                f"{len(configs)} adapters ({', '.join(configs)}) and none selected",
                "one selected adapter, or None for the base",
                "call the model inside `with veneer.use(model, name):`, or"
                " veneer.set_default(model, name) once",
            )
        if merged is None:
            base_name = active_adapter.merged_at_attach
            return SelectionError(
                f"a call that selects {active_adapter.name!r}, attached while {base_name!r} was"
                " merged, which it no longer is",
                "the weights that it was attached to",
                f"merge {base_name!r} again",
            )
        problem = (
            f"a call that selects {active_adapter.name!r} while {merged!r} is merged into the"
            " weights"
        )
        expected = f"the merged adapter {merged!r}, or one that was attached while it was merged"
        if self.model_adapters.has_unrelated_merges:
            expected = "a call without a selection, which has all that is merged"
        return SelectionError(problem, expected, "call veneer.unmerge(model) first")

    def get(self, name: str) -> Any:
        """The ``LayerAdapter`` of the adapter ``name`` at this layer; None if that adapter has none
        here."""
        return self._modules.get(name)


class Call(NamedTuple):
    """A call of the forward of an adapted module, or of another method that reads adapted weights.

    An ``ActiveAdapter`` maps the key of a layer to an object, such as a ``LayerAdapter``, whose
    ``run(call)`` computes the output of the call.

    Fields:
        module, layer_state: the adapted module, and its ``LayerState``.
        base_cls: the class of the module before it was adapted.
        args, kwargs: the arguments of the call, without ``self``.
        context: the context of the call.
        method: the name of the called method.
        may_share: whether layers that read the same input may be computed together.
        seed: the dropout seed. If it is None, a seed is drawn.
    """

    module: Any
    base_cls: Any
    layer_state: LayerState
    args: tuple
    kwargs: Mapping[str, Any]
    context: Context
    method: str = "forward"
    may_share: bool = True
    seed: int | None = None

    @property
    def x(self) -> Any:
        """The first argument of the call."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))
