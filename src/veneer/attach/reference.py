"""The reference model of DPO, KTO, GRPO and RLOO: the policy's own weights under another selection.

    reference = Reference(model)              calls of it compute the base alone
    reference = Reference(model, "before")    or another adapter of the model: what an earlier run left
    reference = reference_of(model)           or what the model computes now, whatever it learns after this

Such a loss compares the policy with a model that does not move. A policy that is a frozen base and
an adapter holds that model already, so a second copy of the weights is memory for nothing.
``Reference`` is a module without parameters, children or state of its own, whose calls run the
policy's modules inside ``veneer.use(model, name)``, in evaluation mode. Rejected: a second tree of
modules over the same parameters. Methods that libraries put on a module (accelerate's hooks of a
``device_map``, FSDP's) are bound to the first tree, and would compute the policy without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import weight_of, with_values
from veneer.attach.lookup import adapters, changes, need_adapters, selected_name, unwrap
from veneer.attach.method_overrides import without_adapters
from veneer.attach.select import use
from veneer.errors import MergeError


class Reference(nn.Module):
    """``model`` as it computes with the adapter ``name``, or without any (None), whoever trains its
    adapters meanwhile.

    Give it to a trainer as its reference model. It is called as the model is, and answers for the
    model's attributes: what is a module or a method there runs under the same selection. Its
    ``state_dict()`` has the model's own tensors (for None, those of the base), so that whoever
    hashes it sees which model it is; ``parameters()`` is empty, as there is nothing here to move,
    shard, count or train.

    A call puts the modules of the model in evaluation mode until it ends, so nothing is dropped and
    no random number drawn; no other thread may train the model meanwhile.

    Raises:
        SelectionError: the model has no adapter, or none of this name.
        MergeError: an adapter is merged into the weights, which are therefore not the base's; also
            in a call.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        super().__init__()
        self._set(unwrap(model), name, {}, unwrap(model))

    def _set(
        self, root: nn.Module, name: str | None, values: Mapping[int, Tensor], part: nn.Module
    ) -> Reference:
        # past nn.Module's own attributes: a registered child would be trained, moved and saved
        self.__dict__.update(_root=root, _adapter=name, _values=values, _part=part, training=False)
        self._check()
        return self

    def _check(self) -> None:
        attached = need_adapters(self._root, self._adapter, walk=False)
        if attached.merged is not None:
            problem = f"{attached.merged!r} merged into the weights of a reference model"
            raise MergeError(problem, "an unmerged model", "call veneer.unmerge first")

    @contextmanager
    def selected(self) -> Iterator[None]:
        """A block in which the model is this one."""
        self._check()
        training = [module for module in self._root.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with (
                use(self._root, self._adapter),
                with_values(_holders(self._root, self._adapter), self._values),
            ):
                yield
        finally:
            for module in training:
                module.training = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # not in ``forward``: trainers put others in its place, which go to the parts of the model
        # by themselves
        with self.selected():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._part(*args, **kwargs)

    def train(self, mode: bool = True) -> Reference:
        """It stays in evaluation mode."""
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The tensors of the model, in the model's own memory; for None without those of
        adapters."""
        if self._adapter is None:
            return without_adapters(self._part).state_dict(*args, **kwargs)
        with self.selected():
            return self._part.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("_root", "_adapter", "_values", "_part"):
            raise AttributeError(name)  # while a copy of this is being made
        return self._seen(getattr(self._part, name))

    def _seen(self, value: Any) -> Any:
        """An attribute of the model, or what a method gave, as it is under this selection."""
        if isinstance(value, nn.Module):
            part = object.__new__(Reference)
            nn.Module.__init__(part)
            return part._set(self._root, self._adapter, self._values, value)
        if not isinstance(value, MethodType):
            return value

        @functools.wraps(value.__func__)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self.selected():
                return self._seen(value(*args, **kwargs))

        return method


def reference_of(model: nn.Module) -> Reference:
    """What ``model`` computes now, for good: the base while its adapter changes nothing yet, as it
    does before the first step, else with a copy of the adapter's parameters as they are (a few MB;
    the base stays shared).

    Raises:
        SelectionError: no adapter, or several and none selected.
        MergeError: an adapter is merged into the weights.
    """
    model = unwrap(model)
    name = selected_name(model)
    if _changes_nothing(model, name):
        return Reference(model)
    held = [
        value
        for holder in _holders(model, name)
        for value in (*_own(holder._parameters), *_own(holder._buffers))
    ]
    values: dict[int, Tensor] = {}
    for value in held:
        copied = value.detach().clone()
        frozen = (
            nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied
        )
        values.setdefault(id(value), frozen)
    return Reference(model, name)._set(model, name, values, model)


def _own(table: Mapping[str, Tensor | None]) -> list[Tensor]:
    return [value for value in table.values() if value is not None]


def _holders(model: nn.Module, name: str | None) -> list[nn.Module]:
    """The modules that hold what the adapter trains."""
    parts = [] if name is None else [part for _, _, part in adapters(model, name)]
    return [module for part in parts for module in part.modules()]


def _changes_nothing(model: nn.Module, name: str) -> bool:
    """Whether every change is 0, and what is trained in full (or kept, as running statistics)
    equals the base's."""
    for _, module, part in adapters(model, name):
        base = {**module._parameters, **module._buffers}
        for key, value in part.full.state_dict().items():
            own = base[key]  # None: a bias for a layer without one
            if bool(value.any()) if own is None else not torch.equal(value.to(own.dtype), own):
                return False
    for _, module, weight, change in changes(model, name):
        low, gain = change.resolve(weight_of(module, weight))
        # a column of B and its row of A
        if gain is not None or bool((low.B.any(1) & low.A.any(2)).any()):
            return False
    return True
