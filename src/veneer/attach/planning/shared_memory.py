"""Find distinct parameters that share memory: ``head.weight.data = emb.weight.data``, a transpose,
a view.

If an adapter changes one of two parameters that share memory, the layer of the other one still
computes with the unchanged weight. But a merge would overwrite the memory, and so change both
layers. Such parameters are therefore refused. Parameters that are views into one buffer but have no
byte in common, as FSDP's, do not count, nor do tensors without memory, as on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from veneer.attach.layer.model_index import ModelIndex
from veneer.bases import weight_of
from veneer.errors import sentence
from veneer.layers import ParamRef

#: the memory of one parameter: (device, first address, address after the last byte, index of the
#: parameter in the model's order)
_Span = tuple[str, int, int, int]


def overlaps(model_index: ModelIndex, refs: Iterable[ParamRef]) -> Iterator[str]:
    """An error text for each parameter in ``refs``, the (path, name) of the parameters that an
    adapter changes, that shares memory with another parameter of the model, or in which several
    elements have the same memory."""
    changed_ids = {id(weight_of(model_index.modules[path], name)) for path, name in refs}
    parameters: list[tuple[str, Tensor]] = []
    spans: list[_Span] = []
    visited_ids: set[int] = set()
    for ref, parameter in model_index.parameters():
        if id(parameter) in visited_ids or (address_range := _address_range(parameter)) is None:
            continue
        visited_ids.add(id(parameter))
        full_path = ".".join(ref).lstrip(".")
        if id(parameter) in changed_ids and _overlaps_itself(parameter):
            yield sentence(
                f"{full_path!r}, several elements of which are the same memory (an expanded"
                " tensor?)",
                "a weight whose elements can change one by one",
                f"set {full_path} to a clone of it",
            )
        spans.append((str(parameter.device), *address_range, len(parameters)))
        parameters.append((full_path, parameter))
    for index_pair in _intersecting_pairs(sorted(spans)):
        (first_path, first_weight), (second_path, second_weight) = (
            parameters[min(index_pair)],
            parameters[max(index_pair)],
        )
        if changed_ids & {id(first_weight), id(second_weight)} and _share_bytes(
            first_weight, second_weight
        ):
            yield sentence(
                f"{first_path!r} and {second_path!r}, two parameters that share memory",
                "one parameter, or two with memory of their own",
                f"tie them properly (`{second_path} = {first_path}`, one parameter), or clone one"
                " of them",
            )


def _address_range(tensor: Tensor) -> tuple[int, int] | None:
    """(the address of the first byte, the address after the last byte) of a tensor. None if it has
    no memory."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
        return None
    try:
        start_address = tensor.data_ptr()
    except RuntimeError:  # a tensor subclass that wraps other tensors and has no memory of its own
        return None
    return (
        (start_address, start_address + _extent(tensor) * tensor.element_size())
        if start_address and tensor.numel()
        else None
    )


def _extent(tensor: Tensor) -> int:
    """The number of elements that fit into the memory from the tensor's first element to its last
    one. It exceeds the number of elements if the strides leave gaps."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _intersecting_pairs(spans: list[_Span]) -> Iterator[tuple[int, int]]:
    """Yield the two parameter indices of each pair of parameters on one device whose address ranges
    intersect. ``spans`` must be sorted."""
    open_spans: list[_Span] = []
    for span in spans:
        device, start, _, index = span
        open_spans = [
            earlier_span
            for earlier_span in open_spans
            if earlier_span[0] == device and earlier_span[2] > start
        ]
        for *_, earlier_index in open_spans:
            yield earlier_index, index
        open_spans.append(span)


def _share_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose address ranges intersect have a byte in common. Two columns of one
    matrix have none."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    first_address = min(a.data_ptr(), b.data_ptr())
    end_address = max(
        tensor.data_ptr() + _extent(tensor) * tensor.element_size() for tensor in (a, b)
    )
    byte_mask = torch.zeros(end_address - first_address, dtype=torch.bool, device="cpu")
    bytes_of_a, bytes_of_b = (
        byte_mask.as_strided(
            (*tensor.shape, tensor.element_size()),
            (*(stride * tensor.element_size() for stride in tensor.stride()), 1),
            tensor.data_ptr() - first_address,
        )
        for tensor in (a, b)
    )
    bytes_of_a.fill_(True)
    return bool(bytes_of_b.any())


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements of a tensor have the same memory."""
    # torch's check is cheap and returns 0 (no overlap) for dense tensors, in any order of the axes.
    # For all others, count the distinct places in memory that the elements have.
    if torch._debug_has_internal_overlap(tensor) == 0:  # pyright: ignore[reportPrivateImportUsage]
        return False
    is_used = torch.zeros(_extent(tensor), dtype=torch.bool, device="cpu")
    is_used.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(is_used.sum()) < tensor.numel()
