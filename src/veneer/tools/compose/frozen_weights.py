"""Read the frozen base weights that an adapter changes, as [g, out, in], from a model or from
tensors by path. g: groups of a convolution or matrices of a stack, else 1.

    frozen_weights.frozen_weight(aligned_weight, config)  ->  FrozenWeight

With a model, the class of the layer determines whether its weight is stored as [out, in] or
transposed. Without a model, the shapes of the weight, A and B nearly always determine this. If they
do not, as for a square matrix, an error asks for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.peft_mapping import ref_at
from veneer.attach import ModelIndex, adapters_of, unwrap
from veneer.bases import own_parameters
from veneer.errors import AdapterError, BaseMismatchError, listing
from veneer.fileio.hashing import fingerprint_without_rows, kind_of
from veneer.formats import peft
from veneer.layers import GENERAL_KIND, LAYERS, kind_for, parameter_path
from veneer.layers.parameter import is_transposed_stack, without_unit_axes
from veneer.models.base_weights import BaseWeights, open_base_weights
from veneer.tools.compose.align import AlignedWeight, ParameterOrder, order_parameters

#: where base weights come from: a model, or dense tensors by path
Source = nn.Module | Mapping[str, Tensor] | Callable[[str], Tensor]


class FrozenWeight(NamedTuple):
    """A frozen base weight, in its stored dtype. ``weight``: the weight as [g, out, in]; g: the
    number of its matrices. ``is_transposed``: whether the adapter folder stores the change as
    [g, in, out]. ``dense_weight``: the weight in its stored shape, for the fingerprint."""

    weight: Tensor
    is_transposed: bool
    dense_weight: Tensor


@dataclass(frozen=True)
class FrozenWeights:
    """Base weights by path. ``source``: a model, a mapping, a function that raises KeyError for an
    unknown path, or None if there is no base. ``structure``: the model that the tensors of
    ``source`` belong to, possibly on the meta device; None if it is unknown, or ``source`` is the
    model."""

    source: Source | None
    structure: nn.Module | None = None

    @cached_property
    def model_index(self) -> ModelIndex | None:
        """An index of the base's modules by path; None without a model. ``AdapterError``: an
        adapter is merged into the model's weights, so that these are not the base's."""
        model = self.source if isinstance(self.source, nn.Module) else self.structure
        attached_adapters = adapters_of(self.source) if isinstance(self.source, nn.Module) else None
        if attached_adapters is not None and attached_adapters.merged is not None:
            raise AdapterError(
                f"a base into which {attached_adapters.merged!r} is merged",
                "the base's own weights",
                "call veneer.unmerge(model) first",
            )
        return None if model is None else ModelIndex(unwrap(model))

    @property
    def parameter_order(self) -> ParameterOrder | None:
        """A function that maps the path of a module to the names of its parameters, in the order of
        the module; None without a model."""
        model_index = self.model_index
        return (
            None
            if model_index is None
            else lambda path: own_parameters(model_index.modules[model_index.canonical[path]])
        )

    def read_adapter(self, adapter: str | Path | AdapterFiles) -> AdapterFiles:
        """The content of an adapter folder, with its parameters in the order of the model.
        ``AdapterError``: it cannot be read, or its order is unknown (``order_parameters``)."""
        saved_adapter = adapter if isinstance(adapter, AdapterFiles) else read(adapter)
        return order_parameters(
            saved_adapter, self.model_index if saved_adapter.unordered_modules else None
        )

    @cached_property
    def _opened_weights(self) -> BaseWeights | None:
        return None if self.source is None else open_base_weights(self.source)

    def get(self, path: str) -> Tensor | None:
        """The dense parameter or buffer at ``path`` on the CPU; None if the base lacks it.
        ``AdapterError``: it is on the meta device."""
        weight = None if self._opened_weights is None else self._opened_weights.get(path)
        tensor = None if weight is None else weight.read()
        if tensor is not None and tensor.is_meta:
            raise AdapterError(
                f"{path!r} on the meta device", "values", "load the base's weights first"
            )
        return None if tensor is None else tensor.detach().cpu()

    def frozen_weight(
        self, aligned_weight: AlignedWeight, peft_config: Mapping[str, Any]
    ) -> FrozenWeight:
        """The base weight that the changes apply to. ``peft_config``: the PEFT config of one
        of the adapters. ``AdapterError``: the base lacks the weight or has it in another shape, or
        it is unknown whether the weight is transposed."""
        path = aligned_weight.weight_path
        if (
            path is None
            and self.model_index is not None
            and (ref := ref_at(self.model_index, aligned_weight.entry_path, peft_config))
            is not None
        ):
            path = parameter_path(*ref)
        model_path = aligned_weight.model_path
        candidate_paths = (
            [path]
            if path
            else [
                parameter_path(model_path, "weight"),
                model_path,
                parameter_path(model_path, "in_proj_weight"),
            ]
        )
        path, dense_weight = next(
            (
                (candidate, tensor)
                for candidate in candidate_paths
                if (tensor := self.get(candidate)) is not None
            ),
            ("", None),
        )
        if dense_weight is None:
            problem = f"no {' or '.join(map(repr, candidate_paths))} in the base"
            expected, fix = "the weight that the adapters change", "pass the base that they are of"
            raise AdapterError(problem, expected, fix)
        if not dense_weight.is_floating_point():
            raise AdapterError(
                f"{path!r} of {dense_weight.dtype}", "a storage that Veneer knows", "load it dense"
            )
        if self.model_index is not None:
            module_path, _, name = path.rpartition(".")
            module = self.model_index.modules[self.model_index.canonical[module_path]]
            layer_kind = kind_for(module, name)
            peft_layer_kind = GENERAL_KIND if aligned_weight.is_parameter else layer_kind
            is_transposed = peft_layer_kind is GENERAL_KIND and is_transposed_stack(
                module, dense_weight.shape
            )
            is_transposed = is_transposed != (peft_layer_kind.out_axis != layer_kind.out_axis)
            weight = layer_kind.unfold(dense_weight, layer_kind.dims(module, dense_weight.shape))
        else:
            weight, is_transposed = _weight_by_shape(
                path, dense_weight, aligned_weight, peft.may_be_transposed(peft_config)
            )
        groups, out, in_ = aligned_weight.any_layer.dims
        if weight.shape != ((groups, in_, out) if is_transposed else (groups, out, in_)):
            raise AdapterError(
                f"{path!r} of shape {tuple(dense_weight.shape)} in the base",
                f"a weight that a change of (groups, out, in) = {(groups, out, in_)} fits",
                "pass the base that the adapters are of",
            )
        return FrozenWeight(weight, is_transposed, dense_weight)

    def verified_weight(
        self, aligned_weight: AlignedWeight, source_adapters: Sequence[AdapterFiles]
    ) -> FrozenWeight:
        """The result of ``frozen_weight``, after a comparison with the fingerprints (hashes of base
        weights) in the adapters' records. A weight that no record lists is not checked.
        ``BaseMismatchError``: an adapter was trained on another value of the weight."""
        frozen_weight = self.frozen_weight(aligned_weight, source_adapters[0].peft_config)
        if (path := aligned_weight.weight_path) is not None:
            _must_match(path, frozen_weight.dense_weight, source_adapters)
        return frozen_weight

    def verify_recorded(self, source_adapters: Sequence[AdapterFiles]) -> None:
        """If an adapter trains parameters P in full, whose changes are P − P₀, compare each weight
        of the base that an adapter's record lists with its fingerprint. ``BaseMismatchError``: an
        adapter was trained on another value of the weight."""
        has_full = any(source_adapter.full for source_adapter in source_adapters)
        for path in dict.fromkeys(
            path
            for source_adapter in (source_adapters if has_full else ())
            for path in source_adapter.metadata.get("base", {}).get("weights", {})
        ):
            if (dense_weight := self.get(path)) is not None:
                _must_match(path, dense_weight, source_adapters)


def _must_match(path: str, dense_weight: Tensor, source_adapters: Sequence[AdapterFiles]) -> None:
    """``BaseMismatchError`` if the record of an adapter has another fingerprint for the weight at
    ``path`` of the base."""
    # The weight's fingerprint by (ids of the token rows that it leaves out, hash function). An
    # adapter with trained tokens records a fingerprint of the weight without these rows.
    fingerprints: dict[tuple[tuple[int, ...], str], str] = {}
    for source_adapter in source_adapters:
        recorded_fingerprint = source_adapter.metadata.get("base", {}).get("weights", {}).get(path)
        if recorded_fingerprint is None:
            continue
        fingerprint_key = source_adapter.token_ids(path), kind_of(recorded_fingerprint)
        if fingerprint_key not in fingerprints:
            fingerprints[fingerprint_key] = fingerprint_without_rows(dense_weight, *fingerprint_key)
        if fingerprints[fingerprint_key] != recorded_fingerprint:
            raise BaseMismatchError(
                f"another weight {path!r} in the base than {source_adapter.path} was made for",
                "the base of the adapters",
                "pass that base",
            )


def _weight_by_shape(
    path: str, dense_weight: Tensor, aligned_weight: AlignedWeight, may_be_transposed: bool
) -> tuple[Tensor, bool]:
    """(the weight as [g, out, in], whether the folder stores the change as [g, in, out]), from the
    shapes of the weight and of the change. ``may_be_transposed``: whether the adapter's config
    allows for weights [in, out]. ``AdapterError``: no layout fits the shapes, or several layouts
    fit and give different results."""
    layouts = dict(_possible_layouts(dense_weight, aligned_weight))
    # a square matrix fits "plain" and "transposed"; here the adapter's config rules out the latter
    if len(layouts) == 2 and dense_weight.dim() == 2 and not may_be_transposed:
        del layouts["transposed"]
    first_layout = next(iter(layouts.values()), None)
    if first_layout is None or not all(
        is_transposed == first_layout[1] and torch.equal(weight, first_layout[0])
        for weight, is_transposed in layouts.values()
    ):
        layout_text = (
            f"which may be {listing(layouts)}" if layouts else "whose shape fits no kind of layer"
        )
        raise AdapterError(
            f"{path!r} of shape {tuple(dense_weight.shape)} with a change of A"
            f" {tuple(aligned_weight.any_layer.A.shape)}, {layout_text}",
            "a weight of which it can be told how it is used",
            "pass model= too",
        )
    return first_layout


def _possible_layouts(
    dense_weight: Tensor, aligned_weight: AlignedWeight
) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """(name of the layout, (weight as [g, out, in], whether the folder stores the change as
    [g, in, out])) for each layout that fits the shapes of the weight and of its change."""
    layer, squeezed_shape = aligned_weight.any_layer, without_unit_axes(dense_weight.shape)
    groups, out, in_ = layer.dims
    if layer.suffixes == LAYERS["embedding"].file_keys:
        if dense_weight.shape == (in_, out):
            yield "embedding", (dense_weight.mT[None], False)
        return
    if layer.A.dim() > 2:
        if (
            dense_weight.dim() == layer.A.dim()
            and dense_weight.shape[0] == groups * out
            and dense_weight.numel() == groups * out * in_
        ):
            yield "convolution", (dense_weight.reshape(groups, out, in_), False)
        return
    if dense_weight.numel() != groups * out * in_:
        return
    if (squeezed_shape[0] == out and groups == 1) or squeezed_shape == (groups, out, in_):
        yield "plain", (dense_weight.reshape(groups, out, in_), False)
    if dense_weight.shape == (in_, out) and groups == 1 and not aligned_weight.is_parameter:
        yield "transposed", (dense_weight.mT[None], False)
    if squeezed_shape == (groups, in_, out):
        yield "stack of transposed matrices", (dense_weight.reshape(groups, in_, out), True)
    if (
        dense_weight.dim() > 2
        and dense_weight.shape[1] == out
        and dense_weight.shape[0] % groups == 0
        and not aligned_weight.is_parameter
    ):
        group_blocks = dense_weight.reshape(groups, dense_weight.shape[0] // groups, out, -1)
        yield (
            "transposed convolution",
            (group_blocks.transpose(1, 2).reshape(groups, out, in_), False),
        )
