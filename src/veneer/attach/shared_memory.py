"""Parameters that share memory without being one: ``head.weight.data = emb.weight.data``, a transpose, a view.

An adapter belongs to a parameter. The other one's layer would go on with W where the first has W + ΔW, until a merge,
which writes memory, changed both. A tie is one parameter under two names. Views into one buffer that share no byte of
it (FSDP's) are no overlap, and neither is memory that is not there (meta tensors).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import weight_of
from veneer.attach.targets import Names, ParamRef
from veneer.errors import sentence

#: (device, first address, the address after the last one, number in the model's order)
_Span = tuple[str, int, int, int]


def overlaps(names: Names, refs: Iterable[ParamRef]) -> Iterator[str]:
    """A problem for each of these parameters that shares memory with another one of the model, or with itself."""
    chosen = {id(weight_of(names.modules[path], name)) for path, name in refs}
    parameters: list[tuple[str, Tensor]] = []
    spans: list[_Span] = []
    seen: set[int] = set()
    for path, module in names.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or (ends := _ends(parameter)) is None:
                continue
            seen.add(id(parameter))
            where = f"{path}.{name}" if path else name
            if id(parameter) in chosen and _overlaps_itself(parameter):
                found = f"{where!r}, several elements of which are the same memory (an expanded tensor?)"
                yield sentence(found, "a weight whose elements can change one by one", f"set {where} to a clone of it")
            spans.append((str(parameter.device), *ends, len(parameters)))
            parameters.append((where, parameter))
    for one, other in _meeting(sorted(spans)):
        (first, weight), (second, another) = parameters[min(one, other)], parameters[max(one, other)]
        if chosen & {id(weight), id(another)} and _common(weight, another):
            found = f"{first!r} and {second!r}, two parameters that share memory"
            do = f"tie them properly (`{second} = {first}`, one parameter), or clone one of them"
            yield sentence(found, "one parameter, or two with memory of their own", do)


def _ends(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses between which a tensor lies, or None if it has none."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # of a kind of tensor that only holds others
        return None
    return (start, start + _extent(tensor) * tensor.element_size()) if start and tensor.numel() else None


def _extent(tensor: Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _meeting(spans: list[_Span]) -> Iterator[tuple[int, int]]:
    """The pairs of sorted spans that have an address in common."""
    open_: list[_Span] = []
    for span in spans:
        device, start, _, number = span
        open_ = [before for before in open_ if before[0] == device and before[2] > start]
        for *_, other in open_:
            yield other, number
        open_.append(span)


def _common(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose addresses meet have a byte in common: not if they are woven, as two columns of one
    matrix are."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    first = min(one.data_ptr(), other.data_ptr())
    size = max(t.data_ptr() + _extent(t) * t.element_size() for t in (one, other)) - first
    bytes_ = torch.zeros(size, dtype=torch.bool, device="cpu")
    _of(bytes_, one, one.data_ptr() - first).fill_(True)
    return bool(_of(bytes_, other, other.data_ptr() - first).any())


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride <= reach:  # the smaller axes may step into this one
            bytes_ = torch.zeros(_extent(tensor) * tensor.element_size(), dtype=torch.bool, device="cpu")
            _of(bytes_, tensor, 0).fill_(True)
            return int(bytes_.sum()) < tensor.numel() * tensor.element_size()
        reach += (size - 1) * stride
    return False


def _of(bytes_: Tensor, tensor: Tensor, start: int) -> Tensor:
    """The part of ``bytes_`` where a tensor lies that starts at ``start``."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return bytes_.as_strided((*tensor.shape, size), (*strides, 1), start)
