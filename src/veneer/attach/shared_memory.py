"""Parameters that share memory without being one: ``head.weight.data = emb.weight.data``, a
transpose, a view.

The other one's layer would go on with W where the first has W + ΔW, until a merge, which writes
memory, changed both. Views into one buffer that share no byte of it (FSDP's) are no overlap, and
neither is memory that is not there.
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
    """A problem for each of these parameters that shares memory with another one of the model, or
    with itself."""
    chosen = {id(weight_of(names.modules[path], name)) for path, name in refs}
    parameters: list[tuple[str, Tensor]] = []
    spans: list[_Span] = []
    seen: set[int] = set()
    for ref, parameter in names.parameters():
        if id(parameter) in seen or (ends := _ends(parameter)) is None:
            continue
        seen.add(id(parameter))
        where = ".".join(ref).lstrip(".")
        if id(parameter) in chosen and _overlaps_itself(parameter):
            problem = (
                f"{where!r}, several elements of which are the same memory (an expanded tensor?)"
            )
            yield sentence(
                problem,
                "a weight whose elements can change one by one",
                f"set {where} to a clone of it",
            )
        spans.append((str(parameter.device), *ends, len(parameters)))
        parameters.append((where, parameter))
    for one, other in _meeting(sorted(spans)):
        (first, weight), (second, another) = (
            parameters[min(one, other)],
            parameters[max(one, other)],
        )
        if chosen & {id(weight), id(another)} and _common(weight, another):
            problem = f"{first!r} and {second!r}, two parameters that share memory"
            do = f"tie them properly (`{second} = {first}`, one parameter), or clone one of them"
            yield sentence(problem, "one parameter, or two with memory of their own", do)


def _ends(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses between which a tensor lies, or None if it has none."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # of a kind of tensor that only holds others
        return None
    return (
        (start, start + _extent(tensor) * tensor.element_size())
        if start and tensor.numel()
        else None
    )


def _extent(tensor: Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _meeting(spans: list[_Span]) -> Iterator[tuple[int, int]]:
    open_: list[_Span] = []
    for span in spans:
        device, start, _, number = span
        open_ = [before for before in open_ if before[0] == device and before[2] > start]
        for *_, other in open_:
            yield other, number
        open_.append(span)


def _common(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose addresses meet have a byte in common: two columns of one matrix
    have none."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    first = min(one.data_ptr(), other.data_ptr())
    size = max(t.data_ptr() + _extent(t) * t.element_size() for t in (one, other)) - first
    bytes_ = torch.zeros(size, dtype=torch.bool, device="cpu")
    mine, others = (
        bytes_.as_strided(
            (*t.shape, t.element_size()),
            (*(n * t.element_size() for n in t.stride()), 1),
            t.data_ptr() - first,
        )
        for t in (one, other)
    )
    mine.fill_(True)
    return bool(others.any())


def _overlaps_itself(tensor: Tensor) -> bool:
    # of dense ones it says no, whichever axis comes first
    if torch._debug_has_internal_overlap(tensor) == 0:  # pyright: ignore[reportPrivateImportUsage]
        return False
    elements = torch.zeros(_extent(tensor), dtype=torch.bool, device="cpu")
    elements.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(elements.sum()) < tensor.numel()
