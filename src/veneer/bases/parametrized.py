"""A weight that ``torch.nn.utils.parametrize`` computes at every access: weight norm, spectral
norm, orthogonal, …

    module.weight = pₙ(… p₁(p₀(original)))        p₀ … pₙ: the parametrizations
    ``module.parametrizations.weight`` is their ``ParametrizationList``

**Reading.** Computing the weight may change state: in training mode, spectral norm updates its
vectors u and v. The frozen weight is therefore what the list computes in evaluation mode from its
current state. The computation runs on a view of the list (an object with the same parameters and
copied buffers), because setting ``training`` on the list itself would affect other threads.

**Merging.** Most parametrizations have no exact inverse. A merge therefore keeps the original
tensors, and changes the class of the list to ``Merged``, which returns the buffer ``merged`` bit
for bit. The parametrizations then no longer run, so u and v stay constant. The state dict then has
this buffer as an additional key. Unmerging restores the class. Torch itself refuses to pickle
parametrized modules (copying works); ``parametrize.remove_parametrizations`` on a merged module
leaves the merged weight. Rejected: appending a last parametrization that ignores its input, because
all others would still run and change their state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from veneer.bases._base import Storage, register
from veneer.errors import MergeError
from veneer.kernels.reference import round_once


class Merged(ParametrizationList):
    """A ``ParametrizationList`` whose parametrizations do not run: it returns the merged weight,
    stored in the buffer ``merged``. It is never constructed. Instead, ``Parametrized.write`` sets
    the ``__class__`` of an existing ``ParametrizationList`` to this class, and an unmerge sets it
    back."""

    merged: Tensor

    def forward(self) -> Tensor:
        return self.merged

    def right_inverse(self, value: Tensor) -> None:
        raise MergeError(
            "an assignment to a parametrized weight while an adapter is merged into it",
            "no write to a merged weight",
            "call veneer.unmerge(model) first",
        )


class Symmetric(nn.Module):
    """A parametrization for ``Parametrized.examples``: a symmetric matrix from the upper triangle
    of the parameter, as in torch's tutorial."""

    def forward(self, original: Tensor) -> Tensor:
        return original.triu() + original.triu(1).mT


@register
class Parametrized(Storage):
    name = "parametrized"
    dense_name = "merged"
    computed = True

    def holds(self, weight: object) -> bool:
        return type(weight) in (ParametrizationList, Merged)

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        return {"merged": weight.merged} if isinstance(weight, Merged) else {}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        if "merged" in stored:
            return stored["merged"]
        evaluation_view: Any = _evaluation_view(weight, ParametrizationList)
        stored_originals = (*weight.parameters(), *weight.buffers())
        device_type = stored_originals[0].device.type if stored_originals else "cpu"
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            return evaluation_view()

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        return {"merged": round_once(values, self.dense(weight).dtype)}

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        weight._buffers.pop("merged", None)
        weight.__class__ = Merged if stored else ParametrizationList
        if stored:
            weight.register_buffer("merged", stored["merged"].detach().clone())

    def examples(self) -> Iterator[nn.Module]:
        yield weight_norm(nn.Linear(4, 3))
        yield spectral_norm(nn.Linear(4, 3))
        yield orthogonal(nn.Linear(4, 4))
        yield orthogonal(nn.Linear(3, 4))
        yield weight_norm(nn.Linear(4, 3, dtype=torch.bfloat16))
        square = nn.Linear(4, 4)
        register_parametrization(square, "weight", Symmetric())
        yield spectral_norm(square)  # two parametrizations, one after the other

    def shape(self, weight: Any) -> torch.Size:
        return self.dense(weight).shape


def _evaluation_view(module: nn.Module, view_class: type[nn.Module]) -> nn.Module:
    """A view of ``module`` in evaluation mode: an object of class ``view_class`` with the same
    parameters, copies of the buffers, and views of the children. A forward of the view that changes
    its buffers does not affect ``module``."""
    view = object.__new__(view_class)
    view.__dict__.update(module.__dict__, training=False)
    view.__dict__["_parameters"] = dict(module._parameters)
    view.__dict__["_buffers"] = {
        name: None if value is None else value.detach().clone()
        for name, value in module._buffers.items()
    }
    view.__dict__["_modules"] = {
        name: None if child is None else _evaluation_view(child, type(child))
        for name, child in module._modules.items()
    }
    return view
