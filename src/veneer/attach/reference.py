"""The reference model of DPO, KTO, GRPO and RLOO: the policy's own modules, run with another
adapter or with none.

    reference = Reference(model)              computes the base alone
    reference = Reference(model, "before")    computes another adapter, from an earlier run
    reference = reference_of(model)           always computes what the model computes now

These losses compare the policy, which is trained, with a fixed model. A policy that consists of a
frozen base and an adapter contains the fixed model already, so a second copy of the weights would
waste memory. ``Reference`` is a module without parameters and children. Its calls run the policy's
modules inside ``veneer.use(model, name)``, in evaluation mode. Rejected: a second tree of modules
over the same parameters. Methods that libraries set on a module (accelerate's hooks of a
``device_map``, FSDP's) are bound to the modules of the first tree, so that a call of the second
tree would silently compute the policy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.layer.adapted_module import replaced_tensors
from veneer.attach.layer.lookup import adapters, changes, need_adapters, selected_name, unwrap
from veneer.attach.select import use
from veneer.attach.source.method_overrides import without_adapters
from veneer.bases import weight_of
from veneer.errors import MergeError, SelectionError


class Reference(nn.Module):
    """``model`` with the adapter ``name``, or, if ``name`` is None, without any adapter. The
    adapters of the model may be trained between its calls.

    Pass it to a trainer as its reference model. It is called like the model and has the model's
    attributes. Modules and methods among these attributes compute with the same adapter. The
    ``state_dict()`` holds the tensors of the model (without any adapter's if ``name`` is None), so
    that a hash of them identifies what the reference computes. ``parameters()`` is empty, because
    there is nothing to move, shard, count or train.

    During a call the modules of the model are in evaluation mode, so there is no dropout and no
    random number is drawn. No other thread may train the model during a call.

    Raises:
        SelectionError: the model has no adapter, or none of this name.
        MergeError: an adapter is merged into the weights, so the base cannot be computed. Calls
            raise this error too, and SelectionError if the parameters of the adapter were replaced
            (sharding, ``load_state_dict(assign=True)``) since ``reference_of`` copied them.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        super().__init__()
        self._set_attributes(unwrap(model), name, {}, unwrap(model))

    def _set_attributes(
        self,
        root: nn.Module,
        name: str | None,
        frozen_copies: Mapping[int, tuple[Tensor, Tensor]],
        submodule: nn.Module,
    ) -> Reference:
        """Set the attributes of the reference, and return it. Raises the errors of the class.

        Args:
            root: the model.
            name: the adapter, or None for the base alone.
            frozen_copies: by the ``id`` of a tensor of the adapter, this tensor and the copy that
                replaces it during a call.
            submodule: the module that a call of the reference runs: ``root`` or a module below it.
        """
        # not by nn.Module.__setattr__: a registered child would be trained, moved and saved
        self.__dict__.update(
            _root=root,
            _adapter=name,
            _frozen_copies=frozen_copies,
            _submodule=submodule,
            training=False,
        )
        self._require_unmerged()
        return self

    def _require_unmerged(self) -> None:
        model_adapters = need_adapters(self._root, self._adapter, check_all_layers=False)
        if model_adapters.merged is not None:
            raise MergeError(
                f"{model_adapters.merged!r} merged into the weights of a reference model",
                "an unmerged model",
                "call veneer.unmerge first",
            )

    @contextmanager
    def selected(self) -> Iterator[None]:
        """A context manager in which the model computes what this reference computes."""
        self._require_unmerged()
        holders = _tensor_holders(self._root, self._adapter) if self._frozen_copies else []
        copies = {key: copy for key, (_, copy) in self._frozen_copies.items()}
        known_ids = {*copies, *map(id, copies.values())}
        if any(id(tensor) not in known_ids for tensor in _own_tensors(holders)):
            raise SelectionError(
                f"a reference of {self._adapter!r}, whose parameters were replaced since",
                "the parameters that it was made of",
                "call reference_of after sharding, or after load_state_dict(assign=True); give a"
                " trainer that shards the model a ref_model",
            )
        with (
            context.evaluation_mode(self._root),
            use(self._root, self._adapter),
            replaced_tensors(holders, copies),
        ):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # not in ``forward``, because trainers replace it by a method that calls submodules itself
        with self.selected():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._submodule(*args, **kwargs)

    def train(self, mode: bool = True) -> Reference:
        """Do nothing: a reference stays in evaluation mode."""
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The tensors of the model, which share its memory, under the model's names. A reference of
        the base alone leaves the tensors of adapters out."""
        if self._adapter is None:
            return without_adapters(self._submodule).state_dict(*args, **kwargs)
        with self.selected():
            return self._submodule.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("_root", "_adapter", "_frozen_copies", "_submodule"):
            raise AttributeError(name)  # not set yet in a new copy; avoids a recursion
        return self._under_selection(getattr(self._submodule, name))

    def _under_selection(self, value: Any) -> Any:
        """Wrap an attribute of the model, or the result of one of its methods, so that it computes
        what this reference computes. Values that are neither modules nor methods are not
        wrapped."""
        if isinstance(value, nn.Module):
            reference = object.__new__(Reference)
            nn.Module.__init__(reference)
            return reference._set_attributes(self._root, self._adapter, self._frozen_copies, value)
        if not isinstance(value, MethodType):
            return value

        @functools.wraps(value.__func__)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self.selected():
                return self._under_selection(value(*args, **kwargs))

        return method


def reference_of(model: nn.Module) -> Reference:
    """A reference that always computes what ``model`` computes now.

    If the adapter changes nothing yet, as before the first training step, the reference is the base
    alone. Else the reference has a copy of the adapter's present parameters (a few MB), which later
    training does not change, and shares the base.

    Raises:
        SelectionError: there is no adapter, or there are several and none is selected.
        MergeError: an adapter is merged into the weights.
    """
    model = unwrap(model)
    name = selected_name(model)
    if _changes_nothing(model, name):
        return Reference(model)
    frozen_copies: dict[int, tuple[Tensor, Tensor]] = {}
    for tensor in _own_tensors(_tensor_holders(model, name)):
        tensor_copy = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        frozen_copy = (
            nn.Parameter(tensor_copy, requires_grad=False) if is_parameter else tensor_copy
        )
        frozen_copies.setdefault(id(tensor), (tensor, frozen_copy))
    return Reference(model, name)._set_attributes(model, name, frozen_copies, model)


def _tensor_holders(model: nn.Module, name: str | None) -> list[nn.Module]:
    """The modules that hold the adapter's parameters and buffers; none if ``name`` is None."""
    if name is None:
        return []
    return [
        module
        for _, _, layer_adapter in adapters(model, name)
        for module in layer_adapter.modules()
    ]


def _own_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The parameters and buffers of modules, without those of their children."""
    for module in modules:
        yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))


def _changes_nothing(model: nn.Module, name: str) -> bool:
    """Whether the model with the adapter equals the base: every low-rank change is 0, every
    parameter that is trained in full equals the base's, and so does every buffer of the adapter
    (running statistics)."""
    for _, module, layer_adapter in adapters(model, name):
        base_tensors = {**module._parameters, **module._buffers}
        for key, tensor in layer_adapter.full.state_dict().items():
            base_tensor = base_tensors[key]  # None if only the adapter has a bias
            differs = (
                bool(tensor.any())
                if base_tensor is None
                else not torch.equal(tensor.to(base_tensor.dtype), base_tensor)
            )
            if differs:
                return False
    for _, module, weight_name, change in changes(model, name):
        low_rank, gain = change.resolve(weight_of(module, weight_name))
        # B A is 0 unless, for some rank index, the column of B and the row of A are both not 0
        if gain is not None or bool((low_rank.B.any(1) & low_rank.A.any(2)).any()):
            return False
    return True
