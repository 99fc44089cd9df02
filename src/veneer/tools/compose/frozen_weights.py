"""The frozen weights below an adapter's changes, read from a model or from tensors by name, as [g,
out, in].

    frozen_weights.frozen_weight(aligned)  ->  FrozenWeight(weight [g, out, in], swapped)

A model says how each of its layers uses its weight. The shapes of tensors alone, with those of A
and B, tell the kind nearly always; where they do not (a square matrix may lie either way), that is
an error which asks for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_mapping import kind_for, ref_at
from veneer.attach.lookup import adapters_of, parameter_path, unwrap
from veneer.attach.targets import Names, own_parameters
from veneer.errors import AdapterError, BaseMismatchError, listing
from veneer.fileio.hashing import fingerprint
from veneer.layers import LAYERS
from veneer.layers._base import GENERAL
from veneer.layers.parameter import swapped_stack, without_unit_axes
from veneer.models.base_weights import BaseWeights, open_base_weights
from veneer.tools.compose.align import AlignedWeight, Order

#: where base weights come from: a model, or their dense tensors by path
Source = nn.Module | Mapping[str, Tensor] | Callable[[str], Tensor]


class FrozenWeight(NamedTuple):
    """A frozen weight, [g, out, in] in its stored dtype; ``swapped``: a file holds the change of
    its transpose; ``dense``: as it is stored, for its fingerprint."""

    weight: Tensor
    swapped: bool
    dense: Tensor


@dataclass(frozen=True)
class FrozenWeights:
    """Base weights by path: of a model, a mapping, or a function that raises KeyError for a path
    that it lacks; None: no base. ``structure`` is the model that tensors are of, on the meta device
    if need be."""

    source: Source | None
    structure: nn.Module | None = None

    @cached_property
    def names(self) -> Names | None:
        """The modules by path, where there is a model; AdapterError where an adapter is merged into
        it."""
        model = self.source if isinstance(self.source, nn.Module) else self.structure
        attached = adapters_of(self.source) if isinstance(self.source, nn.Module) else None
        if attached is not None and attached.merged is not None:
            problem = f"a base into which {attached.merged!r} is merged"
            raise AdapterError(
                problem, "the base's own weights", "call veneer.unmerge(model) first"
            )
        return None if model is None else Names(unwrap(model))

    @property
    def order(self) -> Order | None:
        """The names of a module's parameters in the model's order, where there is a model."""
        names = self.names
        return (
            None
            if names is None
            else lambda module: own_parameters(names.modules[names.canonical[module]])
        )

    @cached_property
    def _reader(self) -> BaseWeights | None:
        return None if self.source is None else open_base_weights(self.source)

    def get(self, path: str) -> Tensor | None:
        """The dense parameter or buffer at this path, None where there is none; AdapterError where
        it has no values."""
        if isinstance(self.source, nn.Module) and self.names is None:
            return None
        weight = None if self._reader is None else self._reader.get(path)
        tensor = None if weight is None else weight.read()
        if tensor is not None and tensor.is_meta:
            raise AdapterError(
                f"{path!r} on the meta device", "values", "load the base's weights first"
            )
        return None if tensor is None else tensor.detach().cpu()

    def frozen_weight(self, aligned: AlignedWeight, config: Mapping[str, Any]) -> FrozenWeight:
        """The weight that these changes are of; ``config`` is the PEFT config of an adapter that
        changes it. ``AdapterError``: there is no such weight, or it cannot be told how it is
        used."""
        path = aligned.weight
        if (
            path is None
            and self.names is not None
            and (ref := ref_at(self.names, aligned.path, config)) is not None
        ):
            path = parameter_path(*ref)
        at = aligned.at
        paths = (
            [path]
            if path
            else [parameter_path(at, "weight"), at, parameter_path(at, "in_proj_weight")]
        )
        path, dense = next(
            ((p, found) for p in paths if (found := self.get(p)) is not None), ("", None)
        )
        if dense is None:
            found = f"no {' or '.join(map(repr, paths))} in the base"
            raise AdapterError(
                found, "the weight that the adapters change", "pass the base that they are of"
            )
        if not dense.is_floating_point():
            found = f"{path!r} of {dense.dtype}"
            raise AdapterError(found, "a storage that Veneer knows", "load it dense")
        if self.names is not None:
            above, _, name = path.rpartition(".")
            module = self.names.modules[self.names.canonical[above]]
            kind = kind_for(module, name)
            peft_form = LAYERS[GENERAL] if aligned.parameter else kind
            swapped = peft_form.name == GENERAL and swapped_stack(module, dense.shape)
            swapped = swapped != (peft_form.out_axis != kind.out_axis)
            weight = kind.unfold(dense, kind.dims(module, dense.shape))
        else:
            # with changes of parameters a file does not say that its layers are transposed: see
            # peft_mapping
            lying = bool(config.get("fan_in_fan_out") or config.get("target_parameters"))
            weight, swapped = _by_shape(path, dense, aligned, lying)
        groups, out, in_ = aligned.template.dims
        if weight.shape != ((groups, in_, out) if swapped else (groups, out, in_)):
            found = f"{path!r} of shape {tuple(dense.shape)} in the base"
            expected = f"a weight that a change of (groups, out, in) = {(groups, out, in_)} fits"
            raise AdapterError(found, expected, "pass the base that the adapters are of")
        return FrozenWeight(weight, swapped, dense)

    def proven_weight(
        self, aligned: AlignedWeight, sources: Sequence[AdapterFiles]
    ) -> FrozenWeight:
        """The weight below the changes of these adapters, which must be the one that they were made
        for: ``BaseMismatchError`` by the fingerprints of their records. ``AdapterError`` as
        ``frozen_weight``."""
        found = self.frozen_weight(aligned, sources[0].peft_config)
        printed = None
        for source in sources:
            expected = source.metadata.get("base", {}).get("weights", {}).get(aligned.weight)
            printed = printed or (None if expected is None else fingerprint(found.dense, expected))
            if printed != expected and expected is not None:
                what = (
                    f"another weight {aligned.weight!r} in the base than {source.path} was made for"
                )
                raise BaseMismatchError(what, "the base of the adapters", "pass that base")
        return found


def _by_shape(path: str, dense: Tensor, aligned: AlignedWeight, lying: bool) -> tuple[Tensor, bool]:
    found = dict(_readings(dense, aligned))
    # square, and no layer of this file lies transposed
    if len(found) == 2 and dense.dim() == 2 and not lying:
        del found["transposed"]
    first = next(iter(found.values()), None)
    if first is None or not all(
        s == first[1] and torch.equal(w, first[0]) for w, s in found.values()
    ):
        ways = f"which may be {listing(found)}" if found else "whose shape fits no kind of layer"
        what = (
            f"{path!r} of shape {tuple(dense.shape)} with a change of A"
            f" {tuple(aligned.template.A.shape)}, {ways}"
        )
        raise AdapterError(
            what, "a weight of which it can be told how it is used", "pass model= too"
        )
    return first


def _readings(dense: Tensor, aligned: AlignedWeight) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """The ways in which a weight of this shape can be what a change of this shape changes: its
    kind's unfold."""
    layer, sizes = aligned.template, without_unit_axes(dense.shape)
    groups, out, in_ = layer.dims
    if layer.suffixes == LAYERS["embedding"].file_keys:
        if dense.shape == (in_, out):
            yield "embedding", (dense.mT[None], False)
        return
    if layer.A.dim() > 2:
        if (
            dense.dim() == layer.A.dim()
            and dense.shape[0] == groups * out
            and dense.numel() == groups * out * in_
        ):
            yield "convolution", (dense.reshape(groups, out, in_), False)
        return
    if dense.numel() != groups * out * in_:
        return
    if (sizes[0] == out and groups == 1) or sizes == (groups, out, in_):
        yield "plain", (dense.reshape(groups, out, in_), False)
    if dense.shape == (in_, out) and groups == 1 and not aligned.parameter:
        yield "transposed", (dense.mT[None], False)
    if sizes == (groups, in_, out):
        yield "stack of transposed matrices", (dense.reshape(groups, in_, out), True)
    if (
        dense.dim() > 2
        and dense.shape[1] == out
        and dense.shape[0] % groups == 0
        and not aligned.parameter
    ):
        parts = dense.reshape(groups, dense.shape[0] // groups, out, -1)
        yield "transposed convolution", (parts.transpose(1, 2).reshape(groups, out, in_), False)
