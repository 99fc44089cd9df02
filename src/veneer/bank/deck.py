"""The adapters of one call, laid out for ``kernels/batched.py``.

A deck has a number of *lanes*: rows of A and B of each layer. An adapter that is used takes as many lanes as its rank,
the same ones in every layer, and keeps them until others need them. So who uses the same adapters again finds them laid
out, and one that comes copies its own numbers alone. A layer that an adapter leaves alone, or changes at a smaller
rank, has zeros there.

    lineup   what the rows of a call use: a mask over lanes, runs of equal rows, and who is called in a layer's place

One call at a time has a deck: no lane changes under it. Lanes belong to a ``Held`` by its ``uid``, which is never used
again, so an adapter that was removed cannot be met under its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapted import BASE, Selected, Site
from veneer.bank.blend import table_of
from veneer.bank.held import Held, Thin
from veneer.kernels import batched, fused
from veneer.kernels.batched import Run
from veneer.rows import Parts

#: lanes are a multiple of this
STEP = 8
#: how many lineups are kept: a server's, for the rows that decode and those that begin
KEPT = 4

#: what a row uses: adapters and their weights; nothing is the base alone
Uses = tuple[tuple[Held, float], ...]


class Frame:
    """What a bank knows of the model that its adapters are for: its modules by the keys of their sites, which layers
    read one input, and how its calls are selected."""

    def __init__(self, uid: str, time_first: bool) -> None:
        self.uid, self.time_first = uid, time_first
        self.modules: dict[Any, nn.Module] = {}
        self.mates: dict[Any, tuple[Any, ...]] = {}


class Layer:
    """One layer in a deck: the factors of all lanes, A [H, in] and B [H, out].

    ``mates`` are the layers that read the same input; their A lie below each other in ``joined``, this one's as
    number ``place``.
    """

    def __init__(self, deck: Deck, key: Any, thin: Thin) -> None:
        self.deck, self.key, self.name = deck, key, thin.name
        own: Any = deck.frame.modules[key]._parameters
        self.flipped = thin.layer.out_axis == 1
        self.in_, self.out = thin.A.shape[1], thin.B.shape[1]
        self.like: Tensor = own[self.name]
        self.A, self.B = self.like.new_zeros(deck.size, self.in_), self.like.new_zeros(deck.size, self.out)
        self.mates: tuple[Layer, ...] = (self,)
        self.joined, self.place = self.A, 0

    def put(self, lanes: slice, thin: Thin | None) -> None:
        rank = 0 if thin is None else len(thin.A)
        if thin is not None:
            self.A[lanes.start : lanes.start + rank] = thin.A
            self.B[lanes.start : lanes.start + rank] = thin.B
        self.B[lanes.start + rank : lanes.stop] = 0  # whoever had these lanes before

    def resize(self, size: int) -> None:
        """Another number of lanes; those that both have keep what they hold."""
        kept = min(size, len(self.B))
        before, self.B = self.B, self.like.new_zeros(size, self.out)
        self.B[:kept] = before[:kept]
        before, self.A = self.A, self.like.new_zeros(size, self.in_)
        self.A[:kept] = before[:kept]

    def seen(self, method: str = "forward") -> Iterator[int]:
        for held in self.deck.lineup.members:
            if self.key in held.parts:
                yield from held.parts[self.key].seen(method)

    def run(
        self, module: nn.Module, base: type[nn.Module], site: Site, args: tuple, kwargs: dict, now: Any,
        share: bool = True, method: str = "forward",
    ) -> Any:  # fmt: skip
        # Each Python call here is time in every layer of a decoding step.
        lineup = self.deck.lineup
        if len(args) == 1 and not kwargs and now.path is None:
            x, own = args[0], module._parameters
            weight: Any = own[self.name]
            if (
                fused.applies(x, weight)
                and x.ndim > 1
                and x.shape[0] == lineup.count
                and not (x.requires_grad and torch.is_grad_enabled())
            ):
                weight = weight.mT if self.flipped else weight
                bias = own["bias"] if "bias" in own else None  # noqa: SIM401 (half the time of a call)
                flat = x.view(-1, self.in_) if x.is_contiguous() else x.reshape(-1, self.in_)
                delta = self.delta(x, flat, lineup)
                if self.key in lineup.bent:
                    y = self.bent(delta, flat, weight, bias, lineup)
                else:
                    y = fused.added(delta, flat, weight, bias)
                return y.view(*x.shape[:-1], self.out)
        return lineup.apart[self.key].run(module, base, site, args, kwargs, now, method=method)

    def delta(self, x: Tensor, flat: Tensor, lineup: Lineup) -> Tensor:
        """Each row's x ΔWᵀ, [N, out]."""
        if len(flat) > lineup.most(self):
            return batched.by_runs(flat, self.A, self.B, lineup.runs, len(flat) // lineup.count)
        return self.lanes(x, flat, lineup) @ self.B

    def lanes(self, x: Tensor, flat: Tensor, lineup: Lineup) -> Tensor:
        """What is in the lanes [N, H]: made for all layers that read this x by the first of them."""
        mask = lineup.mask(flat)
        if len(self.mates) == 1 or x.is_inference():  # an inference tensor's changes are counted by nobody
            return batched.lanes(flat, self.A, mask)
        deck, version = self.deck, x._version
        known = deck.shared
        if known is None or known[0] is not x or known[1] != version or known[2] is not self.mates:
            known = deck.shared = x, version, self.mates, batched.lanes(flat, self.joined, mask)
        size = len(self.A)
        return known[3].narrow(1, self.place * size, size)

    def bent(self, delta: Tensor, flat: Tensor, weight: Tensor, bias: Tensor | None, lineup: Lineup) -> Tensor:
        """With a gain or a bias of each row: gain ⊙ (x Wᵀ) + Δ + bias."""
        gain, own = lineup.extra(self, bias, flat)
        if gain is None:
            y = fused.added(delta, flat, weight, None)
        else:
            plain, by_row = flat @ weight.mT, (lineup.count, -1, self.out)
            y = delta.view(by_row).addcmul_(plain.view(by_row), gain[:, None])
        if own is not None:
            y = y.view(lineup.count, -1, self.out).add_(own[:, None])
        elif bias is not None:
            y = y.add_(bias)
        return y


class Lineup:
    """What the rows of a call use. ``table`` is what is called in the place of each site's layer."""

    def __init__(self, deck: Deck, rows: tuple[Uses, ...]) -> None:
        self.deck, self.rows, self.count = deck, rows, len(rows)
        self.members = {held: None for uses in rows for held, _ in uses}
        self.runs = _runs(rows, deck.taken)
        self.masks: dict[Any, Tensor] = {}
        self.limits: dict[Any, float] = {}
        self.extras: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        distinct = dict.fromkeys(rows)
        selections = [Selected("a blend", table_of(uses)) if uses else BASE for uses in distinct]
        indices = [torch.tensor([i for i, own in enumerate(rows) if own == uses], device="cpu") for uses in distinct]
        self.apart = Parts(deck.frame.uid, selections, indices, self.count, deck.frame.time_first)
        general = {key for held in self.members for key in held.general}
        keys = dict.fromkeys(key for held in self.members for key in held.parts)
        self.table = {key: self.apart[key] if key in general else deck.layers[key] for key in keys}
        self.bent = {
            key for held in self.members for key, part in held.parts.items()
            if isinstance(part, Thin) and (part.gain is not None or part.bias is not None)
        }  # fmt: skip

    def most(self, layer: Layer) -> float:
        size = layer.out, layer.in_
        if size not in self.limits:
            self.limits[size] = batched.most(self.deck.size, self.runs, *size)
        return self.limits[size]

    def mask(self, flat: Tensor) -> Tensor | None:
        """M [N, H] for N rows of x, like x."""
        key = flat.dtype, flat.device, len(flat)
        mask = self.masks.get(key)
        if mask is None:
            mask = torch.zeros(self.count, self.deck.size, dtype=torch.float64, device="cpu")
            for row, uses in enumerate(self.rows):
                for held, weight in uses:
                    mask[row, self.deck.taken[held.uid]] += weight
            mask = mask.repeat_interleave(len(flat) // self.count, 0).to(flat.device, flat.dtype)
            self.masks[key] = mask
        return mask

    def extra(self, layer: Layer, bias: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gain and the bias of each row of a layer, [rows, out]; None where no row has its own."""
        if layer.key not in self.extras:
            thin = {held: held.parts.get(layer.key) for held in self.members}
            gains = any(one is not None and one.gain is not None for one in thin.values())
            biases = any(one is not None and one.bias is not None for one in thin.values())
            shape = self.count, layer.out
            gain = torch.ones(shape, dtype=torch.float32, device=like.device) if gains else None
            own = None
            if biases and bias is not None:
                own = bias.float().expand(shape).clone()
            for row, uses in enumerate(self.rows):
                for held, weight in uses:
                    part = thin[held]
                    if part is not None and part.gain is not None and gain is not None:
                        gain[row] += weight * (part.gain.float() - 1)
                    if part is not None and part.bias is not None and own is not None and bias is not None:
                        own[row] += weight * (part.bias.float() - bias.float())
            both = (None if one is None else one.to(like.dtype) for one in (gain, own))
            self.extras[layer.key] = tuple(both)  # pyright: ignore[reportArgumentType]
        return self.extras[layer.key]


def _runs(rows: Sequence[Uses], taken: Mapping[int, slice]) -> tuple[Run, ...]:
    runs: list[Run] = []
    first = 0
    for row in range(1, len(rows) + 1):
        if row == len(rows) or rows[row] != rows[first]:
            uses = tuple((taken[held.uid], weight) for held, weight in rows[first] if held.rank)
            runs.append((first, row, uses))
            first = row
    return tuple(runs)


class Deck:
    """Lanes, who has which, and the layers that they belong to."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.size = 0
        self.taken: dict[int, slice] = {}  # the longest unused first
        self.layers: dict[Any, Layer] = {}
        self.lineups: dict[Any, Lineup] = {}
        self.lineup: Any = None  # a ``Lineup`` while a call runs
        self.shared: tuple[Tensor, int, tuple[Layer, ...], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(one.A.nbytes + one.B.nbytes for one in self.layers.values())

    def use(self, rows: tuple[Uses, ...]) -> Lineup:
        """Lay out what the rows use, and make it what calls of the deck's layers mean."""
        key = tuple(tuple((held.uid, weight) for held, weight in uses) for uses in rows)
        if key not in self.lineups:
            self._lay_out(list({held: None for uses in rows for held, _ in uses}))
            while len(self.lineups) >= KEPT:
                del self.lineups[next(iter(self.lineups))]
        lineup = self.lineups.pop(key, None) or Lineup(self, rows)
        self.lineups[key] = lineup
        for held in lineup.members:
            if held.uid in self.taken:
                self.taken[held.uid] = self.taken.pop(held.uid)
        self.lineup = lineup
        return lineup

    def rest(self) -> None:
        """A call has ended: keep nothing of it."""
        self.shared = self.lineup = None

    def forget(self, uid: int) -> None:
        """An adapter is no longer in memory: its lanes are free, and nothing here holds it."""
        if uid in self.taken:
            del self.taken[uid]
        self.lineups = {key: one for key, one in self.lineups.items() if all(held.uid != uid for held in one.members)}

    def _lay_out(self, members: Sequence[Held]) -> None:
        wanted = {held.uid for held in members}
        for held in members:
            if held.rank and held.uid not in self.taken:
                lanes = self._room(held.rank, wanted)
                self._put(held, lanes)
                self.taken[held.uid] = lanes
            elif not held.rank:
                self.taken.setdefault(held.uid, slice(0, 0))

    def _room(self, rank: int, wanted: set[int]) -> slice:
        """Lanes side by side, free or taken by the adapters that were not used for longest."""
        while (gap := self._gap(rank)) is None:
            idle = next((uid for uid in self.taken if uid not in wanted), None)
            if idle is not None:
                self.forget(idle)
                continue
            size = max((at.stop for at in self.taken.values()), default=0) + rank
            self._resize(-(-size // STEP) * STEP)
        return gap

    def _gap(self, rank: int) -> slice | None:
        start = 0
        for at in sorted(self.taken.values(), key=lambda at: at.start):
            if at.start - start >= rank:
                break
            start = max(start, at.stop)
        return slice(start, start + rank) if start + rank <= self.size else None

    def _resize(self, size: int) -> None:
        self.size, self.lineups, self.shared = size, {}, None
        for layer in self.layers.values():
            layer.resize(size)
        self._join()

    def _put(self, held: Held, lanes: slice) -> None:
        with torch.no_grad():
            new = [(key, part) for key, part in held.parts.items() if isinstance(part, Thin) and key not in self.layers]
            for key, part in new:
                self.layers[key] = Layer(self, key, part)
            if new:
                self._join()
            for key, layer in self.layers.items():
                part = held.parts.get(key)
                layer.put(lanes, part if isinstance(part, Thin) else None)

    def _join(self) -> None:
        """Let the A of layers that read one input lie below each other."""
        for keys in dict.fromkeys(self.frame.mates.values()):
            mates = tuple(self.layers[key] for key in keys if key in self.layers)
            if len({(layer.in_, layer.like.dtype, layer.like.device) for layer in mates}) != 1 or len(mates) < 2:
                continue
            joined = torch.cat([layer.A for layer in mates])
            for place, layer in enumerate(mates):
                layer.mates, layer.joined, layer.place = mates, joined, place
                layer.A = joined[place * self.size : (place + 1) * self.size]
