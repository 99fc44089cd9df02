"""The adapters of one call, as ``kernels/mixed.py`` reads them, or laid out for ``kernels/batched.py``.

    deck ─ layers      each changed by one of two kernels
         ─ lineups     what the rows of a call use: groups, addresses or runs, gains and biases
         ─ racks       one for each size of adapter: slots, and which adapter has which

``mixed`` is compiled and reads the numbers where they are held. It is for float32 and bfloat16 on a processor, and of
prompts on few threads, as it has one. Where numba is missing, on other devices and in other dtypes it is ``batched``,
plain tensor code, for which each layer has A [slots, r, in] and B [slots, r, out] of each rack. An adapter that is used
takes a slot, the same one in every layer, and keeps it until another needs it. So who uses the same adapters again
finds them laid out, and one that comes copies its own numbers alone. A layer that an adapter leaves alone, or changes
at a smaller rank, has zeros there.

One call at a time has a deck: nothing moves under it. Slots belong to a ``Held`` by its ``uid``, which is never used
again, so an adapter that was removed cannot be met under its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapted import BASE, Selected, Site, at_least_float32
from veneer.bank.held import Held, Thin
from veneer.blend import blended
from veneer.kernels import THREADS, batched, fused, has_numba
from veneer.kernels.batched import Grouping
from veneer.rows import Parts

#: ranks are rounded up to powers of two from this on: adapters that come to the same share a rack
SMALLEST = 8
#: calls in a row that need at most half of a rack's slots before the others are given up
PATIENCE = 8
#: how many lineups are kept: a server's, for the rows that decode and those that begin
KEPT = 4
#: tokens a row up to which rows are grouped
FEW = 4

#: what a row uses: adapters and their weights; nothing is the base alone
Uses = tuple[tuple[Held, float], ...]


class Frame:
    """What a bank knows of the model that its adapters are for: its modules by the keys of their sites, and how its
    calls are selected."""

    def __init__(self, uid: str, time_first: bool) -> None:
        self.uid, self.time_first = uid, time_first
        self.modules: dict[Any, nn.Module] = {}


class Rack:
    """Slots for adapters of about one rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.slots, self.slack = rank, 0, 0
        self.taken: dict[int, int] = {}  # the longest unused first

    def free(self) -> int | None:
        return next((slot for slot in range(self.slots) if slot not in self.taken.values()), None)


class Block:
    """A layer's factors in one rack: A [slots, r, in], B [slots, r, out]."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B

    def slots(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Those of so many slots."""
        if count == len(self.A):
            return self.A, self.B
        return self.A.narrow(0, first, count), self.B.narrow(0, first, count)

    def put(self, slot: int, thin: Thin | None) -> None:
        rank = 0 if thin is None else len(thin.A)
        if thin is not None:
            self.A[slot, :rank] = thin.A
            self.B[slot, :rank] = thin.B
        self.A[slot, rank:] = self.B[slot, rank:] = 0  # whoever had this slot before; 0 · NaN would be NaN


def compiled(weight: Tensor, factors: torch.dtype) -> Any:
    """``kernels.mixed`` where it is for such a weight, else None."""
    if not has_numba() or weight.device.type != "cpu":
        return None
    from veneer.kernels import mixed

    return mixed if weight.dtype in mixed.DTYPES and factors in mixed.DTYPES else None


def prepare(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Compile what calls of the model will need, so that none of them waits for it: seconds, once on a machine."""
    for weight in {weight.dtype: weight for weight in model.parameters()}.values():
        factors = weight.dtype if dtype is None else dtype
        loop = compiled(weight, factors)
        if loop is not None:
            loop.change(torch.empty(0, 1, dtype=weight.dtype), 1, loop.rows([([0], [])]), loop.table([]), factors)


class Layer:
    """One layer in a deck."""

    def __init__(self, deck: Deck, key: Any, thin: Thin) -> None:
        self.deck, self.key, self.name = deck, key, thin.name
        own: Any = deck.frame.modules[key]._parameters[thin.name]
        self.flipped = thin.layer.out_axis == 1
        self.in_, self.out = thin.A.shape[1], thin.B.shape[1]
        self.device, self.narrow, self.dtype = own.device, own.dtype, at_least_float32(own.dtype)
        self.time_first = deck.frame.time_first
        self.blocks: dict[int, Block] = {}
        self.factors = thin.A.dtype
        self.compiled = compiled(own, self.factors)

    def room(self, rack: Rack) -> None:
        """Zeros for all slots of a rack, where the kernel wants them."""
        if self.compiled is not None:
            return
        A, B = (
            torch.zeros(rack.slots, rack.rank, width, dtype=self.dtype, device=self.device)
            for width in (self.in_, self.out)
        )
        before = self.blocks.get(rack.rank)
        self.blocks[rack.rank] = Block(A, B)
        if before is not None:
            kept = min(rack.slots, len(before.A))
            A[:kept], B[:kept] = before.A[:kept], before.B[:kept]

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
                and not (self.time_first and x.ndim > 2 and x.shape[1] == lineup.count)
            ):
                weight = weight.mT if self.flipped else weight
                bias = own["bias"] if "bias" in own else None  # noqa: SIM401 (half the time of a call)
                flat = x.view(-1, self.in_) if x.is_contiguous() else x.reshape(-1, self.in_)
                tokens = len(flat) // lineup.count
                if self.compiled is not None and (tokens <= FEW or torch.get_num_threads() <= THREADS):
                    flat = flat if flat.is_contiguous() else flat.contiguous()
                    table = lineup.tables.get(self.key)
                    table = lineup.table_of(self) if table is None else table
                    delta = self.compiled.change(flat, self.out, lineup.together, table, self.factors)
                elif tokens > FEW:
                    delta = batched.by_runs(flat, self.out, lineup.runs(self), tokens)
                else:
                    delta = self.grouped(flat, tokens, lineup)
                if self.key in lineup.bent:
                    y = self.bent(delta, flat, weight, bias, lineup)
                else:
                    y = fused.added(delta, flat, weight, bias)
                return y.view(*x.shape[:-1], self.out)
        return lineup.apart[self.key].run(module, base, site, args, kwargs, now, method=method)

    def grouped(self, flat: Tensor, tokens: int, lineup: Lineup) -> Tensor:
        """Δ [N, out]."""
        wide = flat if flat.dtype is self.dtype else flat.to(self.dtype)
        delta = None
        for rank, grouping in lineup.groupings(tokens, self.device, self.dtype):
            A, B = self.blocks[rank].slots(grouping.first, grouping.groups)
            h = batched.narrowed(batched.gathered(wide, grouping), A, grouping)
            delta = batched.widened(h, B, grouping, delta)
        if delta is None:
            return flat.new_zeros(len(flat), self.out)
        return delta if delta.dtype is flat.dtype else delta.to(flat.dtype)

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
        self.members = list({held: None for uses in rows for held, _ in uses})
        self.plans: dict[Any, list[tuple[int, Grouping]]] = {}
        self.made: dict[Any, list[batched.Run]] = {}
        self.extras: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        self.tables: dict[Any, Any] = {}
        self.distinct = {uses: [i for i, own in enumerate(rows) if own == uses] for uses in dict.fromkeys(rows)}
        selections = [
            blended([(Selected(held.path.name, held.parts), weight) for held, weight in uses]) if uses else BASE
            for uses in self.distinct
        ]
        indices = [torch.tensor(own, device="cpu") for own in self.distinct.values()]
        self.apart = Parts(deck.frame.uid, selections, indices, self.count, deck.frame.time_first)
        general = {key for held in self.members for key in held.general}
        keys = dict.fromkeys(key for held in self.members for key in held.parts)
        self.table = {key: self.apart[key] if key in general else deck.layers[key] for key in keys}
        self.bent = {
            key for held in self.members for key, part in held.parts.items()
            if isinstance(part, Thin) and (part.gain is not None or part.bias is not None)
        }  # fmt: skip

    @cached_property
    def together(self) -> Any:
        """The rows as ``kernels.mixed`` has them."""
        from veneer.kernels import mixed

        return mixed.rows([(own, [weight for _, weight in uses]) for uses, own in self.distinct.items()])

    def table_of(self, layer: Layer) -> Any:
        """Where the factors of a layer are that is for ``kernels.mixed``; they stay there as long as this lineup."""
        parts = [held.parts.get(layer.key) for uses in self.distinct for held, _ in uses]
        self.tables[layer.key] = layer.compiled.table([None if one is None else (one.A, one.B) for one in parts])
        return self.tables[layer.key]

    def runs(self, layer: Layer) -> list[batched.Run]:
        """Neighbouring rows that use the same, with their factors of a layer."""
        if layer.key not in self.made:
            runs: list[batched.Run] = []
            first = 0
            for row in range(1, self.count + 1):
                if row == self.count or self.rows[row] != self.rows[first]:
                    parts = ((held.parts.get(layer.key), weight) for held, weight in self.rows[first])
                    own = [(part.A, part.B, weight) for part, weight in parts if part is not None]
                    runs.append((first, row, [(A.to(layer.narrow), B.to(layer.narrow), w) for A, B, w in own]))
                    first = row
            self.made[layer.key] = runs
        return self.made[layer.key]

    def groupings(self, tokens: int, device: torch.device, dtype: torch.dtype) -> list[tuple[int, Grouping]]:
        """How rows of so many tokens are grouped in each rack that they use."""
        key = tokens, device, dtype
        found = self.plans.get(key)
        if found is None:
            found = self.plans[key] = [
                (rack.rank, _grouping(self.rows, rack, tokens, device, dtype))
                for rack in self.deck.racks.values()
                if any(held.uid in rack.taken for held in self.members)
            ]
        return found

    def extra(self, layer: Layer, bias: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gain and the bias of each row of a layer, [rows, out]; None where no row has its own."""
        if layer.key not in self.extras:
            thin = {held: held.parts.get(layer.key) for held in self.members}
            gains = any(one is not None and one.gain is not None for one in thin.values())
            biases = any(one is not None and one.bias is not None for one in thin.values())
            shape = self.count, layer.out
            gain = torch.ones(shape, dtype=layer.dtype, device=like.device) if gains else None
            own = bias.to(layer.dtype).expand(shape).clone() if biases and bias is not None else None
            for row, uses in enumerate(self.rows):
                for held, weight in uses:
                    part = thin[held]
                    if part is not None and part.gain is not None and gain is not None:
                        gain[row] += weight * (part.gain.to(layer.dtype) - 1)
                    if part is not None and part.bias is not None and own is not None and bias is not None:
                        own[row] += weight * (part.bias.to(layer.dtype) - bias.to(layer.dtype))
            both = (None if one is None else one.to(like.dtype) for one in (gain, own))
            self.extras[layer.key] = tuple(both)  # pyright: ignore[reportArgumentType]
        return self.extras[layer.key]


def _grouping(rows: Sequence[Uses], rack: Rack, tokens: int, device: torch.device, dtype: torch.dtype) -> Grouping:
    """The rows that use adapters of a rack, by their slots."""
    used = [rack.taken[held.uid] for uses in rows for held, _ in uses if held.uid in rack.taken]
    lowest, count = min(used), max(used) - min(used) + 1
    places: list[list[tuple[int, float]]] = [[] for _ in range(count)]
    mine: list[list[tuple[int, int]]] = []  # for each row, (slot, number within its group)
    for row, uses in enumerate(rows):
        mine.append([])
        for held, weight in uses:
            if held.uid in rack.taken:
                slot = rack.taken[held.uid] - lowest
                mine[row].append((slot, len(places[slot])))
                places[slot].append((row, weight))
    size = max(map(len, places))
    padded = [place + [(0, 0.0)] * (size - len(place)) for place in places]

    def of_tokens(indices: Sequence[int]) -> Tensor | None:
        """Indices of rows or places as those of their tokens; None where these are 0, 1, 2, …"""
        wide = torch.tensor(indices, device=device)[:, None] * tokens + torch.arange(tokens, device=device)
        flat = wide.flatten()
        same = len(flat) == count * size * tokens == len(rows) * tokens
        return None if same and torch.equal(flat, torch.arange(len(flat), device=device)) else flat

    order = of_tokens([row for place in padded for row, _ in place])
    strength = torch.tensor([[weight for _, weight in place] for place in padded], dtype=dtype, device=device)
    plain = all(weight in (0.0, 1.0) for place in padded for _, weight in place)
    weights = None if plain else strength.repeat_interleave(tokens, 1)[:, None]
    back = []
    for number in range(max(map(len, mine))):
        has = [len(own) > number for own in mine]
        own = [place[number] if some else (0, 0) for place, some in zip(mine, has, strict=True)]
        index = of_tokens([slot * size + within for slot, within in own])
        lacks = None
        if not all(has):
            lacks = ~torch.tensor(has, device=device).repeat_interleave(tokens)[:, None]
        back.append((index, lacks))
    return Grouping(lowest, count, order, weights, tuple(back))


class Deck:
    """Racks, layers, and what the running call uses."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.racks: dict[int, Rack] = {}
        self.layers: dict[Any, Layer] = {}
        self.lineups: dict[Any, Lineup] = {}
        self.lineup: Any = None  # a ``Lineup`` while a call runs

    @property
    def uids(self) -> set[int]:
        """Whose numbers are laid out or held."""
        laid = {uid for rack in self.racks.values() for uid in rack.taken}
        return laid.union(held.uid for lineup in self.lineups.values() for held in lineup.members)

    def use(self, rows: tuple[Uses, ...]) -> Lineup:
        """Lay out what the rows use, and make it what calls of the deck's layers mean."""
        members = list({held: None for uses in rows for held, _ in uses})
        key = tuple(tuple((held.uid, weight) for held, weight in uses) for uses in rows)
        self._give_up(members)
        lineup = self.lineups.pop(key, None) or self._new(rows, members)
        self.lineups[key] = lineup
        for held in members:
            rack = self.racks.get(_size(held))
            if rack is not None and held.uid in rack.taken:
                rack.taken[held.uid] = rack.taken.pop(held.uid)
        self.lineup = lineup
        return lineup

    def rest(self) -> None:
        """A call has ended: keep nothing of it."""
        self.lineup = None

    @torch.inference_mode(False)  # another call, which may be an ordinary one, writes into what is made here
    def _new(self, rows: tuple[Uses, ...], members: Sequence[Held]) -> Lineup:
        self._lay_out(members)
        while len(self.lineups) >= KEPT:
            del self.lineups[next(iter(self.lineups))]
        return Lineup(self, rows)

    def forget(self, uid: int) -> None:
        """An adapter is no longer in memory: its slot is free, and nothing here holds it. A rack that nobody has a slot
        of is given up."""
        self._vacate(uid)
        for rack in [one for one in self.racks.values() if not one.taken]:
            del self.racks[rack.rank]
            for layer in self.layers.values():
                layer.blocks.pop(rack.rank, None)

    def _vacate(self, uid: int) -> None:
        for rack in self.racks.values():
            rack.taken.pop(uid, None)
        self.lineups = {key: one for key, one in self.lineups.items() if all(held.uid != uid for held in one.members)}

    def _give_up(self, members: Sequence[Held]) -> None:
        """Slots that have long been more than twice of what is needed."""
        for rack in self.racks.values():
            needed = sum(bool(held.rank) and _size(held) == rack.rank for held in members)
            rack.slack = rack.slack + 1 if needed and 2 * needed <= rack.slots else 0
            if rack.slack > PATIENCE:
                rack.taken, rack.slack = {}, 0
                with torch.inference_mode(False):
                    self._resize(rack, 0)

    def _meet(self, members: Sequence[Held]) -> None:
        """Make the layers that they change and nobody did before."""
        parts = (pair for held in members for pair in held.parts.items())
        for key, part in parts:
            if isinstance(part, Thin) and key not in self.layers:
                self.layers[key] = Layer(self, key, part)
                for rack in self.racks.values():
                    self.layers[key].room(rack)

    def _lay_out(self, members: Sequence[Held]) -> None:
        self._meet(members)
        if all(layer.compiled is not None for layer in self.layers.values()):
            return
        wanted = {held.uid for held in members}
        for size in dict.fromkeys(_size(held) for held in members if held.rank):
            rack = self.racks.setdefault(size, Rack(size))
            new = [held for held in members if held.rank and _size(held) == size and held.uid not in rack.taken]
            kept = [uid for uid in rack.taken if uid in wanted]
            if len(new) + len(kept) > rack.slots:
                self._resize(rack, len(new) + len(kept))
            for held in new:
                slot = rack.free()
                if slot is None:
                    idle = next(uid for uid in rack.taken if uid not in wanted)
                    slot = rack.taken[idle]
                    self._vacate(idle)
                rack.taken[held.uid] = slot
                self._put(held, rack, slot)

    @torch.no_grad()
    def _resize(self, rack: Rack, slots: int) -> None:
        rack.slots, self.lineups = slots, {}
        for layer in self.layers.values():
            layer.room(rack)

    @torch.no_grad()
    def _put(self, held: Held, rack: Rack, slot: int) -> None:
        for key, layer in self.layers.items():
            if layer.compiled is not None:
                continue
            part = held.parts.get(key)
            layer.blocks[rack.rank].put(slot, part if isinstance(part, Thin) else None)


def _size(held: Held) -> int:
    """The rank of the rack for an adapter."""
    return max(SMALLEST, 1 << (held.rank - 1).bit_length())
