"""A weighted blend of adapters, at the sites where it is more than a sum of products.

    W' = W + Σ wᵢ (W'ᵢ - W)        for each weight, and for each parameter that is trained in full

That defines a blend for every layer and variant. Where all parts are ``Thin``, ``kernels/batched.py`` computes the same
without forming anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from veneer.adapted import Site, Way, at_least_float32, viewed, weight_of
from veneer.bank.held import Held


def table_of(uses: Sequence[tuple[Held, float]]) -> Mapping[Any, Any]:
    """The parts of a blend, as ``adapted.Selected`` has them."""
    if len(uses) == 1 and uses[0][1] == 1:
        return uses[0][0].parts
    return _Table(uses)


class _Table(Mapping[Any, Any]):
    def __init__(self, uses: Sequence[tuple[Held, float]]) -> None:
        self.uses = uses

    def __getitem__(self, key: Any) -> Blend:
        parts = [(held.parts[key], weight) for held, weight in self.uses if key in held.parts]
        if not parts:
            raise KeyError(key)
        return Blend(parts)

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(key for held, _ in self.uses for key in held.parts))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Blend:
    """Stands where a ``LayerAdapter`` stands, for one call."""

    def __init__(self, parts: Sequence[tuple[Any, float]]) -> None:
        self.parts = parts

    @property
    def changes(self) -> dict[str, Any]:
        return {name: change for part, _ in self.parts for name, change in part.changes.items()}

    @property
    def hosted(self) -> dict[Way, Blend]:
        return self.below("forward")

    @property
    def entries(self) -> dict[str, dict[Way, Blend]]:
        return {method: self.below(method) for part, _ in self.parts for method in part.entries}

    def below(self, method: str) -> dict[Way, Blend]:
        found: dict[Way, list[tuple[Any, float]]] = {}
        for part, weight in self.parts:
            has = part.hosted if method == "forward" else part.entries.get(method, {})
            for way, one in has.items():
                found.setdefault(way, []).append((one, weight))
        return {way: Blend(parts) for way, parts in found.items()}

    def seen(self, method: str = "forward") -> Iterator[int]:
        for part, _ in self.parts:
            if method == "forward" or method in part.entries:
                yield from part.seen(method)

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        own: dict[str, Any] = {**module._buffers, **module._parameters}
        return self._blended([(part.replacements(module), weight) for part, weight in self.parts], own)

    def changed(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """As ``LayerAdapter.changed``."""
        own = {}
        for name, change in self.changes.items():
            dense = change.storage.dense(weight_of(module, name))
            own[name] = dense.to(at_least_float32(dense.dtype)) if wide else dense
        return self._blended([(part.changed(module, wide), weight) for part, weight in self.parts], own)

    def _blended(
        self, values: Sequence[tuple[Mapping[str, Tensor], float]], own: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        blended: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for found, _ in values for name in found):
            base = own[name]
            if not base.is_floating_point():  # a counter of batches
                blended[name] = next(found[name] for found, _ in values if name in found)
                continue
            wide = base.to(at_least_float32(base.dtype))
            sum_ = wide
            for found, weight in values:
                if name in found:
                    sum_ = sum_ + weight * (found[name].to(wide.dtype) - wide)
            blended[name] = sum_.to(base.dtype)
        return blended

    def run(self, module: nn.Module, base: Any, site: Site, args: tuple, kwargs: dict, now: Any, **how: Any) -> Any:
        return viewed(self, module, base, site, args, kwargs, how.get("method", "forward"))
