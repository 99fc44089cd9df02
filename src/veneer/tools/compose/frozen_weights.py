"""Read the frozen weights that an adapter changes, as [g, out, in], from a model or from tensors by
name.

    frozen_weights.frozen_weight(aligned, config)  ->  FrozenWeight(weight [g, out, in], swapped)

With a model, the layer determines the layout of its weight. Without one, the shapes of the weight,
A and B nearly always do. If they do not (a square matrix fits either orientation), an error asks
for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_mapping import ref_at
from veneer.attach import Names, adapters_of, unwrap
from veneer.bases import own_parameters
from veneer.errors import AdapterError, BaseMismatchError, listing
from veneer.fileio.hashing import fingerprint
from veneer.layers import LAYERS, kind_for, parameter_path
from veneer.layers._base import GENERAL
from veneer.layers.parameter import is_transposed_stack, without_unit_axes
from veneer.models.base_weights import BaseWeights, open_base_weights
from veneer.tools.compose.align import AlignedWeight, ParameterOrder

#: the source of base weights: a model, or dense tensors by path
Source = nn.Module | Mapping[str, Tensor] | Callable[[str], Tensor]


class FrozenWeight(NamedTuple):
    """A frozen weight [g, out, in] in its stored dtype. ``swapped``: the adapter folder stores the
    transposed change. ``dense``: the weight in its stored shape, for its fingerprint."""

    weight: Tensor
    swapped: bool
    dense: Tensor


@dataclass(frozen=True)
class FrozenWeights:
    """Base weights by path. ``source``: a model, a mapping, a function that raises KeyError for an
    unknown path, or None (no base). ``structure``: the model of those tensors, possibly on the meta
    device."""

    source: Source | None
    structure: nn.Module | None = None

    @cached_property
    def names(self) -> Names | None:
        """The modules by path; None without a model. ``AdapterError``: an adapter is merged into
        the model."""
        model = self.source if isinstance(self.source, nn.Module) else self.structure
        attached = adapters_of(self.source) if isinstance(self.source, nn.Module) else None
        if attached is not None and attached.merged is not None:
            problem = f"a base into which {attached.merged!r} is merged"
            raise AdapterError(
                problem, "the base's own weights", "call veneer.unmerge(model) first"
            )
        return None if model is None else Names(unwrap(model))

    @property
    def order(self) -> ParameterOrder | None:
        """The order of the parameters of each module; None without a model."""
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
        """The dense parameter or buffer at ``path`` on the CPU, or None. ``AdapterError``: it is on
        the meta device."""
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
        """The weight that these changes apply to. ``config``: the PEFT config of one of the
        adapters. ``AdapterError``: the base lacks the weight, or its layout is ambiguous."""
        path = aligned.weight
        if (
            path is None
            and self.names is not None
            and (ref := ref_at(self.names, aligned.entry_path, config)) is not None
        ):
            path = parameter_path(*ref)
        model_path = aligned.model_path
        paths = (
            [path]
            if path
            else [
                parameter_path(model_path, "weight"),
                model_path,
                parameter_path(model_path, "in_proj_weight"),
            ]
        )
        path, dense = next(
            ((p, tensor) for p in paths if (tensor := self.get(p)) is not None), ("", None)
        )
        if dense is None:
            problem = f"no {' or '.join(map(repr, paths))} in the base"
            raise AdapterError(
                problem, "the weight that the adapters change", "pass the base that they are of"
            )
        if not dense.is_floating_point():
            problem = f"{path!r} of {dense.dtype}"
            raise AdapterError(problem, "a storage that Veneer knows", "load it dense")
        if self.names is not None:
            above, _, name = path.rpartition(".")
            module = self.names.modules[self.names.canonical[above]]
            kind = kind_for(module, name)
            peft_form = LAYERS[GENERAL] if aligned.parameter else kind
            swapped = peft_form.name == GENERAL and is_transposed_stack(module, dense.shape)
            swapped = swapped != (peft_form.out_axis != kind.out_axis)
            weight = kind.unfold(dense, kind.dims(module, dense.shape))
        else:
            # a folder with changes of parameters may have transposed layers without saying so: see
            # peft_mapping
            transposed = bool(config.get("fan_in_fan_out") or config.get("target_parameters"))
            weight, swapped = _weight_by_shape(path, dense, aligned, transposed)
        groups, out, in_ = aligned.template.dims
        if weight.shape != ((groups, in_, out) if swapped else (groups, out, in_)):
            problem = f"{path!r} of shape {tuple(dense.shape)} in the base"
            expected = f"a weight that a change of (groups, out, in) = {(groups, out, in_)} fits"
            raise AdapterError(problem, expected, "pass the base that the adapters are of")
        return FrozenWeight(weight, swapped, dense)

    def proven_weight(
        self, aligned: AlignedWeight, sources: Sequence[AdapterFiles]
    ) -> FrozenWeight:
        """As ``frozen_weight``, after a check against the fingerprints in the adapters' records.
        ``BaseMismatchError``: an adapter was trained on another weight."""
        frozen = self.frozen_weight(aligned, sources[0].peft_config)
        actual = None
        for source in sources:
            expected = source.metadata.get("base", {}).get("weights", {}).get(aligned.weight)
            actual = actual or (None if expected is None else fingerprint(frozen.dense, expected))
            if actual != expected and expected is not None:
                problem = (
                    f"another weight {aligned.weight!r} in the base than {source.path} was made for"
                )
                raise BaseMismatchError(problem, "the base of the adapters", "pass that base")
        return frozen


def _weight_by_shape(
    path: str, dense: Tensor, aligned: AlignedWeight, transposed: bool
) -> tuple[Tensor, bool]:
    layouts = dict(_possible_layouts(dense, aligned))
    # a square matrix, and no layer of this adapter is transposed
    if len(layouts) == 2 and dense.dim() == 2 and not transposed:
        del layouts["transposed"]
    first = next(iter(layouts.values()), None)
    if first is None or not all(
        s == first[1] and torch.equal(w, first[0]) for w, s in layouts.values()
    ):
        layout_text = (
            f"which may be {listing(layouts)}" if layouts else "whose shape fits no kind of layer"
        )
        problem = (
            f"{path!r} of shape {tuple(dense.shape)} with a change of A"
            f" {tuple(aligned.template.A.shape)}, {layout_text}"
        )
        raise AdapterError(
            problem, "a weight of which it can be told how it is used", "pass model= too"
        )
    return first


def _possible_layouts(
    dense: Tensor, aligned: AlignedWeight
) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """(name of the layout, (weight as [g, out, in], swapped)) for each layer kind that fits the
    shapes of the weight and of its change."""
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
        blocks = dense.reshape(groups, dense.shape[0] // groups, out, -1)
        yield "transposed convolution", (blocks.transpose(1, 2).reshape(groups, out, in_), False)
