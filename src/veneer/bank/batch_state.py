"""The adapters of one call, laid out for ``kernels/batched.py``.

    BatchState ─ layers         each changed by batched products
               ─ assignments    what the rows of a call use: runs or lanes; groups of rows, gains and biases

An assignment lays the factors of its adapters out, each in a lane of A [lanes, r, in] and B [lanes,
r, out], for each layer and size of rank; the next call with the same adapters finds them. A layer
that an adapter leaves alone, or changes at a smaller rank, has zeros there.

One call at a time has a batch state: nothing moves under it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from veneer.attach import BASE, ActiveAdapter, RowAdapters, blend_adapters
from veneer.bank.resident import ResidentAdapter, ResolvedLowRank
from veneer.kernels import batched, device, fused
from veneer.kernels.batched import Grouping
from veneer.precision import at_least_float32

#: ranks are rounded up to powers of two from this on: adapters that come to the same share a bucket
SMALLEST = 8
#: how many assignments are kept: a server's, for the rows that decode and those that begin
KEPT = 2
#: tokens a row up to which rows are grouped
FEW = 4
# : on a device: runs of rows up to which each is a product, and rows an adapter up to which each
# has factors of its own
RUNS, ROWS = 2, 4

#: what a row uses: adapters and their weights; nothing is the base alone
Uses = tuple[tuple[ResidentAdapter, float], ...]


class Frame:
    """What a bank knows of its model: the modules by the keys of their layer states, and how calls
    are selected."""

    def __init__(self, uid: str, time_first: bool) -> None:
        self.uid, self.time_first = uid, time_first
        self.modules: dict[Any, nn.Module] = {}


class Layer:
    """One layer as a batch state has it."""

    def __init__(self, batch_state: BatchState, key: Any, resolved_low: ResolvedLowRank) -> None:
        self.batch_state, self.key, self.name = batch_state, key, resolved_low.name
        weight: Any = batch_state.frame.modules[key]._parameters[resolved_low.name]
        self.flipped = resolved_low.layer.out_axis == 1
        self.in_, self.out = resolved_low.A.shape[1], resolved_low.B.shape[1]
        self.away = not weight.is_cpu
        self.device, self.narrow = weight.device, weight.dtype
        self.dtype = weight.dtype if self.away else at_least_float32(weight.dtype)
        self.time_first = batch_state.frame.time_first
        self.factors = resolved_low.A.dtype
        self.nothing = resolved_low.A.new_empty(0, self.in_), resolved_low.B.new_empty(0, self.out)

    def laid_out(self, members: Sequence[ResidentAdapter]) -> tuple[Tensor, Tensor]:
        """The factors of these in a lane each: A [lanes, r, in], B [lanes, r, out]."""
        changes = [resident.parts.get(self.key) for resident in members]
        if self.away:
            A, B = self.side_by_side(
                [[change] if type(change) is ResolvedLowRank else [] for change in changes]
            )
            return A, B
        pairs = [
            (change.A, change.B) if type(change) is ResolvedLowRank else self.nothing
            for change in changes
        ]
        A, B = [A for A, _ in pairs], [B for _, B in pairs]
        # another call, which may be an ordinary one, reads what is made here
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if len({len(factor) for factor in A}) == 1:
                return torch.stack(A).to(self.dtype), torch.stack(B).to(self.dtype)
            return pad_sequence(A, batch_first=True).to(self.dtype), pad_sequence(
                B, batch_first=True
            ).to(self.dtype)

    def side_by_side(self, rows: Sequence[Sequence[ResolvedLowRank]]) -> list[Tensor]:
        """A [n, r, in] and B [n, r, out] of n rows, those parts of each below each other, with
        zeros below these: one copy each, in the dtype of the weight, that lives as long as a
        product."""
        ranks = [sum(len(change.A) for change in changes) for changes in rows]
        most, factors = max(ranks), []
        for name, width in (("A", self.in_), ("B", self.out)):
            zeros = self.batch_state.zeros(most * width, self.factors, self.device).view(
                most, width
            )
            pieces = [
                piece
                for changes, rank in zip(rows, ranks, strict=True)
                for piece in (*(getattr(change, name) for change in changes), zeros[rank:])
                if len(piece)
            ]
            factors.append(
                torch.cat(pieces or [zeros]).view(len(rows), most, width).to(self.narrow)
            )
        return factors

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        for resident in self.batch_state.assignment.members:
            if self.key in resident.parts:
                yield from resident.parts[self.key].reached_ids(method)

    def run(
        self,
        module: Any,
        base: Any,
        layer_state: Any,
        args: tuple,
        kwargs: dict,
        call: Any,
        share=True,
        method="forward",
    ) -> Any:
        # Each Python call here is time in every layer of a decoding step.
        assignment = self.batch_state.assignment
        if len(args) == 1 and not kwargs and call.path is None:
            x, parameters = args[0], module._parameters
            weight: Any = parameters[self.name]
            if (
                (fused.applies(x, weight) or device.applies_alike(x, weight))
                and x.ndim > 1
                and x.shape[0] == assignment.count
                and not (x.requires_grad and torch.is_grad_enabled())
                and not (self.time_first and x.ndim > 2 and x.shape[1] == assignment.count)
            ):
                weight = weight.mT if self.flipped else weight
                bias = parameters["bias"] if "bias" in parameters else None  # noqa: SIM401 (half the time of a call)
                flat = x.view(-1, self.in_) if x.is_contiguous() else x.reshape(-1, self.in_)
                tokens = len(flat) // assignment.count
                if assignment.multiplies_by_row(self, tokens):
                    delta = batched.by_rows(flat, *assignment.row_factors(self))
                elif tokens > FEW or (self.away and assignment.run_count <= RUNS):
                    delta = batched.by_runs(flat, self.out, assignment.runs(self), tokens)
                else:
                    delta = self.multiply_groups(flat, tokens, assignment)
                if self.key in assignment.bent:
                    y = self.bent(delta, flat, weight, bias, assignment)
                else:
                    y = fused.add_product(delta, flat, weight, bias)
                return y.view(*x.shape[:-1], self.out)
        return assignment.apart[self.key].run(
            module, base, layer_state, args, kwargs, call, method=method
        )

    def multiply_groups(self, flat: Tensor, tokens: int, assignment: BatchAssignment) -> Tensor:
        """Δ [N, out]."""
        wide = flat if flat.dtype is self.dtype else flat.to(self.dtype)
        delta = None
        for grouping, (A, B) in assignment.groups(self, tokens):
            h = batched.project_down(batched.gather_rows(wide, grouping), A, grouping)
            delta = batched.project_up(h, B, grouping, delta)
        if delta is None:
            return flat.new_zeros(len(flat), self.out)
        return delta if delta.dtype is flat.dtype else delta.to(flat.dtype)

    def bent(
        self,
        delta: Tensor,
        flat: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        assignment: BatchAssignment,
    ) -> Tensor:
        """With a gain or a bias of each row: gain ⊙ (x Wᵀ) + Δ + bias."""
        gain, row_bias = assignment.extra(self, bias, flat)
        if gain is None:
            y = fused.add_product(delta, flat, weight, None)
        else:
            plain, by_row = flat @ weight.mT, (assignment.count, -1, self.out)
            y = delta.view(by_row).addcmul_(plain.view(by_row), gain[:, None])
        if row_bias is not None:
            y = y.view(assignment.count, -1, self.out).add_(row_bias[:, None])
        elif bias is not None:
            y = y.add_(bias)
        return y


class BatchAssignment:
    """What the rows of a call use. ``table`` is what is called in the place of each layer."""

    def __init__(self, batch_state: BatchState, rows: tuple[Uses, ...]) -> None:
        self.batch_state, self.rows, self.count = batch_state, rows, len(rows)
        self.members = list({resident: None for uses in rows for resident, _ in uses})
        self.lanes: dict[int, list[ResidentAdapter]] = {}
        for resident in sorted(self.members, key=lambda resident: resident.uid):
            if resident.rank:  # rounded up, so that adapters of about one rank share a product
                self.lanes.setdefault(
                    max(SMALLEST, 1 << (resident.rank - 1).bit_length()), []
                ).append(resident)
        self.groupings: dict[Any, list[Grouping]] = {}
        siblings = (
            sibling for sibling in batch_state.assignments.values() if sibling.lanes == self.lanes
        )
        #: laid out, by layer: for all assignments of the same adapters
        self.factors: dict[Any, list[tuple[Tensor, Tensor]]] = next(
            (sibling.factors for sibling in siblings), {}
        )
        self.run_cache: dict[Any, list[batched.Run]] = {}
        self.by_row: dict[Any, tuple[list[list[ResolvedLowRank]], Tensor | None]] = {}
        self.extras: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        self.distinct = {
            uses: [i for i, row_indices in enumerate(rows) if row_indices == uses]
            for uses in dict.fromkeys(rows)
        }
        selections = [
            blend_adapters(
                [
                    (ActiveAdapter(resident.path.name, resident.parts), weight)
                    for resident, weight in uses
                ]
            )
            if uses
            else BASE
            for uses in self.distinct
        ]
        indices = [
            torch.tensor(row_indices, device="cpu") for row_indices in self.distinct.values()
        ]
        self.apart = RowAdapters(
            batch_state.frame.uid, selections, indices, self.count, batch_state.frame.time_first
        )
        general = {key for resident in self.members for key in resident.general}
        keys = dict.fromkeys(key for resident in self.members for key in resident.parts)
        self.table = {
            key: self.apart[key] if key in general else batch_state.layers[key] for key in keys
        }
        self.bent = {
            key for resident in self.members for key, change in resident.parts.items()
            if isinstance(change, ResolvedLowRank) and (change.gain is not None or change.bias is not None)
        }  # fmt: skip

    def runs(self, layer: Layer) -> list[batched.Run]:
        """Neighbouring rows that use the same, with their factors of a layer."""
        if layer.key not in self.run_cache:
            runs: list[batched.Run] = []
            first = 0
            for row in range(1, self.count + 1):
                if row == self.count or self.rows[row] != self.rows[first]:
                    changes = (
                        (resident.parts.get(layer.key), weight)
                        for resident, weight in self.rows[first]
                    )
                    factors = [
                        (change.A, change.B, weight)
                        for change, weight in changes
                        if change is not None
                    ]
                    runs.append(
                        (
                            first,
                            row,
                            [(A.to(layer.narrow), B.to(layer.narrow), w) for A, B, w in factors],
                        )
                    )
                    first = row
            self.run_cache[layer.key] = runs
        return self.run_cache[layer.key]

    @cached_property
    def run_count(self) -> int:
        return 1 + sum(uses != next_uses for uses, next_uses in itertools.pairwise(self.rows))

    def multiplies_by_row(self, layer: Layer, tokens: int) -> bool:
        """Whether each row is multiplied with factors of its own, laid out for the call: on a
        device, and prompts of 16 bits on a processor, whose batched products are then one in place
        of two an adapter."""
        if self.run_count <= RUNS:
            return False
        if not layer.away:
            return tokens > FEW and layer.narrow.itemsize == 2
        return tokens > FEW or self.count <= ROWS * max(len(self.members), 1)

    def row_factors(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor | None]:
        """A [rows, r, in] and B [rows, r, out] of a layer, laid out for this call, and the weights
        [rows, 1, r]."""
        if layer.key not in self.by_row:
            rows = [
                [(r.parts[layer.key], weight) for r, weight in uses if layer.key in r.parts]
                for uses in self.rows
            ]
            row_changes, weights = (
                [[change for change, _ in weighted_changes] for weighted_changes in rows],
                None,
            )
            if any(weight != 1 for weighted_changes in rows for _, weight in weighted_changes):
                each = [
                    torch.tensor([weight for change, weight in changes for _ in change.A])
                    for changes in rows
                ]
                weights = pad_sequence(each, batch_first=True)[:, None]
                weights = weights.to(layer.dtype).to(layer.device, non_blocking=True)
            self.by_row[layer.key] = row_changes, weights
        row_changes, weights = self.by_row[layer.key]
        A, B = layer.side_by_side(row_changes)
        return A, B, weights

    def groups(self, layer: Layer, tokens: int) -> Iterator[tuple[Grouping, tuple[Tensor, Tensor]]]:
        """For each size of rank how rows of so many tokens are grouped, and the factors of a
        layer."""
        key, lanes = (tokens, layer.device, layer.dtype), self.lanes
        if key not in self.groupings:
            self.groupings[key] = [
                _grouping(self.rows, members, *key) for members in lanes.values()
            ]
        if layer.away:
            return zip(
                self.groupings[key],
                [layer.laid_out(members) for members in lanes.values()],
                strict=True,
            )
        if layer.key not in self.factors:
            self.factors[layer.key] = [layer.laid_out(members) for members in lanes.values()]
        return zip(self.groupings[key], self.factors[layer.key], strict=True)

    def extra(
        self, layer: Layer, bias: Tensor | None, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gain and the bias of each row of a layer, [rows, out]; None where no row has its
        own."""
        if layer.key not in self.extras:
            changes = {resident: resident.parts.get(layer.key) for resident in self.members}

            def of_rows(name: str, base_value: Tensor) -> Tensor | None:
                if all(getattr(change, name, None) is None for change in changes.values()):
                    return None
                values = base_value.expand(self.count, layer.out).clone()
                for row, uses in enumerate(self.rows):
                    for resident, weight in uses:
                        if (value := getattr(changes[resident], name, None)) is not None:
                            values[row] += weight * (value.to(layer.dtype) - base_value)
                return values.to(like.dtype)

            gain = of_rows("gain", torch.ones(layer.out, dtype=layer.dtype, device=like.device))
            self.extras[layer.key] = (
                gain,
                None if bias is None else of_rows("bias", bias.to(layer.dtype)),
            )
        return self.extras[layer.key]


def _grouping(
    rows: Sequence[Uses],
    members: Sequence[ResidentAdapter],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Grouping:
    """The rows that use some of these adapters, by their lanes; made on the processor, as nobody
    waits for it."""
    count, lane_of = len(members), {resident: lane for lane, resident in enumerate(members)}
    rows_of_lane: list[list[tuple[int, float]]] = [[] for _ in members]
    mine: list[list[tuple[int, int]]] = []  # for each row, (lane, number within it)
    for row, uses in enumerate(rows):
        mine.append([])
        for resident, weight in uses:
            if (lane := lane_of.get(resident)) is not None:
                mine[row].append((lane, len(rows_of_lane[lane])))
                rows_of_lane[lane].append((row, weight))
    size = max(map(len, rows_of_lane))
    padded = [lane_rows + [(0, 0.0)] * (size - len(lane_rows)) for lane_rows in rows_of_lane]

    def move_to_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def of_tokens(indices: Sequence[int]) -> Tensor | None:
        """Indices of rows or lanes as those of their tokens; None where these are 0, 1, 2, …"""
        wide = torch.tensor(indices, device="cpu")[:, None] * tokens + torch.arange(
            tokens, device="cpu"
        )
        flat = wide.flatten()
        same = len(flat) == count * size * tokens == len(rows) * tokens
        return (
            None
            if same and torch.equal(flat, torch.arange(len(flat), device="cpu"))
            else move_to_device(flat)
        )

    order = of_tokens([row for lane_rows in padded for row, _ in lane_rows])
    strength = torch.tensor(
        [[weight for _, weight in lane_rows] for lane_rows in padded], dtype=dtype, device="cpu"
    )
    plain = all(weight in (0.0, 1.0) for lane_rows in padded for _, weight in lane_rows)
    weights = None if plain else move_to_device(strength.repeat_interleave(tokens, 1)[:, None])
    back = []
    for number in range(max(map(len, mine))):
        has = [len(entries) > number for entries in mine]
        entries = [entry[number] if some else (0, 0) for entry, some in zip(mine, has, strict=True)]
        index = of_tokens([lane * size + within for lane, within in entries])
        lacks = None
        if not all(has):
            lacks = move_to_device(
                ~torch.tensor(has, device="cpu").repeat_interleave(tokens)[:, None]
            )
        back.append((index, lacks))
    return Grouping(0, count, order, weights, tuple(back))


class BatchState:
    """Layers, what the rows of late calls used, and what those of the running call use."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.layers: dict[Any, Layer] = {}
        self.assignments: dict[Any, BatchAssignment] = {}
        self.assignment: Any = None  # a ``BatchAssignment`` while a call runs
        self.nothing: dict[Any, Tensor] = {}

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """So many zeros, which nobody writes to."""
        buffer = self.nothing.get((dtype, device))
        if buffer is None or len(buffer) < count:
            with torch.inference_mode(False):
                buffer = self.nothing[dtype, device] = torch.zeros(
                    count, dtype=dtype, device=device
                )
        return buffer[:count]

    def use(self, rows: tuple[Uses, ...]) -> BatchAssignment:
        """Make what the rows use what calls of its layers mean."""
        key = tuple(tuple((resident.uid, weight) for resident, weight in uses) for uses in rows)
        assignment = self.assignments.pop(key, None)
        if assignment is None:
            while len(self.assignments) >= KEPT:
                del self.assignments[next(iter(self.assignments))]
            for resident in {resident for uses in rows for resident, _ in uses}:
                for layer, part in resident.parts.items():
                    if isinstance(part, ResolvedLowRank) and layer not in self.layers:
                        self.layers[layer] = Layer(self, layer, part)
            with torch.inference_mode(
                False
            ):  # another call, which may be an ordinary one, uses what is made here
                assignment = BatchAssignment(self, rows)
        self.assignments[key] = self.assignment = assignment
        return assignment

    def keep(self, alive: set[int]) -> None:
        """Hold nothing of adapters that are no longer in memory; ``alive`` are the ``uid`` of those
        that are."""
        self.assignments = {
            key: assignment
            for key, assignment in self.assignments.items()
            if all(member.uid in alive for member in assignment.members)
        }
