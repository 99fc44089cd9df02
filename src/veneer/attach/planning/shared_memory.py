"""Find distinct parameters that share memory: ``head.weight.data = emb.weight.data``, a transpose,
a view.

If one of them is adapted, the layer of the other one still computes with W, until a merge, which
writes the memory, changes both. Views into one buffer that share no byte of it (FSDP's) do not
overlap, nor do tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from veneer.attach.layer.names import Names
from veneer.bases import weight_of
from veneer.errors import sentence
from veneer.layers import ParamRef

#: (device, first address, address after the last byte, number of the parameter in the model's
#: order)
_Span = tuple[str, int, int, int]


def overlaps(names: Names, refs: Iterable[ParamRef]) -> Iterator[str]:
    """A problem for each of these parameters that shares memory with another parameter of the
    model, or has several elements in the same memory."""
    chosen = {id(weight_of(names.modules[path], name)) for path, name in refs}
    parameters: list[tuple[str, Tensor]] = []
    spans: list[_Span] = []
    visited: set[int] = set()
    for ref, parameter in names.parameters():
        if id(parameter) in visited or (ends := _address_range(parameter)) is None:
            continue
        visited.add(id(parameter))
        full_path = ".".join(ref).lstrip(".")
        if id(parameter) in chosen and _overlaps_itself(parameter):
            problem = (
                f"{full_path!r}, several elements of which are the same memory (an expanded"
                " tensor?)"
            )
            yield sentence(
                problem,
                "a weight whose elements can change one by one",
                f"set {full_path} to a clone of it",
            )
        spans.append((str(parameter.device), *ends, len(parameters)))
        parameters.append((full_path, parameter))
    for pair in _intersecting_pairs(sorted(spans)):
        (first, first_weight), (second, second_weight) = (
            parameters[min(pair)],
            parameters[max(pair)],
        )
        if chosen & {id(first_weight), id(second_weight)} and _share_bytes(
            first_weight, second_weight
        ):
            problem = f"{first!r} and {second!r}, two parameters that share memory"
            do = f"tie them properly (`{second} = {first}`, one parameter), or clone one of them"
            yield sentence(problem, "one parameter, or two with memory of their own", do)


def _address_range(tensor: Tensor) -> tuple[int, int] | None:
    """(the first address, the one after the last) of a tensor; None if it has no memory."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a tensor subclass that only wraps other tensors
        return None
    return (
        (start, start + _extent(tensor) * tensor.element_size())
        if start and tensor.numel()
        else None
    )


def _extent(tensor: Tensor) -> int:
    """The number of elements from the first to the last one in memory."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _intersecting_pairs(spans: list[_Span]) -> Iterator[tuple[int, int]]:
    """The numbers of each two parameters whose address ranges intersect; ``spans`` are sorted."""
    open_: list[_Span] = []
    for span in spans:
        device, start, _, number = span
        open_ = [before for before in open_ if before[0] == device and before[2] > start]
        for *_, open_number in open_:
            yield open_number, number
        open_.append(span)


def _share_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose address ranges intersect have a byte in common: two columns of one
    matrix have none."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    first = min(a.data_ptr(), b.data_ptr())
    size = max(t.data_ptr() + _extent(t) * t.element_size() for t in (a, b)) - first
    bytes_ = torch.zeros(size, dtype=torch.bool, device="cpu")
    bytes_of_a, bytes_of_b = (
        bytes_.as_strided(
            (*t.shape, t.element_size()),
            (*(n * t.element_size() for n in t.stride()), 1),
            t.data_ptr() - first,
        )
        for t in (a, b)
    )
    bytes_of_a.fill_(True)
    return bool(bytes_of_b.any())


def _overlaps_itself(tensor: Tensor) -> bool:
    # torch decides this for dense tensors, in any order of the axes
    if torch._debug_has_internal_overlap(tensor) == 0:  # pyright: ignore[reportPrivateImportUsage]
        return False
    elements = torch.zeros(_extent(tensor), dtype=torch.bool, device="cpu")
    elements.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(elements.sum()) < tensor.numel()
