"""Batched factors of the adapters that one call uses, for ``kernels/batched.py``.

    BatchState ─ layers         each changed by batched products
               ─ assignments    what each row of a call uses; groups of rows, gains and biases

An assignment stacks the factors of its adapters in A [lanes, r, in] and B [lanes, r, out], one lane
for each adapter, for each layer and rounded rank. The next call with the same adapters uses the
same tensors. Lanes of adapters that do not change a layer, or change it at a smaller rank, are
padded with zeros.

Each running call has a batch state of its own, so none changes during a call.
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

from veneer.attach import BASE, ActiveAdapter, Call, RowAdapters, blend_adapters
from veneer.bank.resident import ResidentAdapter, ResolvedLowRank
from veneer.kernels import batched, device, fused
from veneer.kernels.batched import Grouping
from veneer.precision import at_least_float32

#: the smallest rounded rank: ranks are rounded up to powers of two, and adapters of the same
#: rounded rank share a product
LEAST_RANK = 8
#: how many assignments to cache: a server alternates between the rows that decode and those that
#: prefill
CACHED = 2
#: the most tokens per row for which rows are grouped by adapter
FEW_TOKENS = 4
#: on a device: the most runs of rows that are multiplied one by one, and the most rows per adapter
#: that are multiplied with factors stacked for each row
FEW_RUNS, ROWS_PER_ADAPTER = 2, 4

#: the adapters of a row and their weights; empty for the base alone
Uses = tuple[tuple[ResidentAdapter, float], ...]


class Frame:
    """A bank's facts about its model: the modules by the keys of their layer states, the id under
    which a selection is stored, and whether the batch is the second axis."""

    def __init__(self, uid: str, time_first: bool) -> None:
        self.uid, self.time_first = uid, time_first
        self.modules: dict[Any, nn.Module] = {}


class Layer:
    """One layer of a batch state, which runs in place of the layer's forward."""

    def __init__(self, batch_state: BatchState, key: Any, resolved_low: ResolvedLowRank) -> None:
        self.batch_state, self.key, self.name = batch_state, key, resolved_low.name
        weight: Any = batch_state.frame.modules[key]._parameters[resolved_low.name]
        self.flipped = resolved_low.layer.out_axis == 1
        self.in_, self.out = resolved_low.A.shape[1], resolved_low.B.shape[1]
        self.on_device = not weight.is_cpu
        self.device, self.weight_dtype = weight.device, weight.dtype
        self.dtype = weight.dtype if self.on_device else at_least_float32(weight.dtype)
        self.time_first = batch_state.frame.time_first
        self.factor_dtype = resolved_low.A.dtype
        self.no_factors = (
            resolved_low.A.new_empty(0, self.in_),
            resolved_low.B.new_empty(0, self.out),
        )

    def stack_factors(self, members: Sequence[ResidentAdapter]) -> tuple[Tensor, Tensor]:
        """The factors of these adapters, one lane each: A [lanes, r, in], B [lanes, r, out]."""
        changes = [resident.parts.get(self.key) for resident in members]
        if self.on_device:
            A, B = self.join_factors(
                [[change] if type(change) is ResolvedLowRank else [] for change in changes]
            )
            return A, B
        pairs = [
            (change.A, change.B) if type(change) is ResolvedLowRank else self.no_factors
            for change in changes
        ]
        A, B = [A for A, _ in pairs], [B for _, B in pairs]
        # later calls, which may be outside of inference mode, use these tensors
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if len({len(factor) for factor in A}) == 1:
                return torch.stack(A).to(self.dtype), torch.stack(B).to(self.dtype)
            return pad_sequence(A, batch_first=True).to(self.dtype), pad_sequence(
                B, batch_first=True
            ).to(self.dtype)

    def join_factors(self, rows: Sequence[Sequence[ResolvedLowRank]]) -> list[Tensor]:
        """A [n, r, in] and B [n, r, out] of n rows: the factors of each row's changes, joined along
        the rank and padded with zeros. They are copied once, in the dtype of the weight, and freed
        after the product."""
        ranks = [sum(len(change.A) for change in changes) for changes in rows]
        most, factors = max(ranks), []
        for name, width in (("A", self.in_), ("B", self.out)):
            zeros = self.batch_state.zeros(most * width, self.factor_dtype, self.device).view(
                most, width
            )
            pieces = [
                piece
                for changes, rank in zip(rows, ranks, strict=True)
                for piece in (*(getattr(change, name) for change in changes), zeros[rank:])
                if len(piece)
            ]
            factors.append(
                torch.cat(pieces or [zeros]).view(len(rows), most, width).to(self.weight_dtype)
            )
        return factors

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        for resident in self.batch_state.assignment.members:
            if self.key in resident.parts:
                yield from resident.parts[self.key].reached_ids(method)

    def run(self, call: Call) -> Any:
        """As ``LayerAdapter.run``."""
        # every Python call here costs time in each layer of a decoding step
        assignment = self.batch_state.assignment
        if len(call.args) == 1 and not call.kwargs and call.context.path is None:
            x, parameters = call.args[0], call.module._parameters
            weight: Any = parameters[self.name]
            if (
                (fused.applies(x, weight) or device.applies_without_cast(x, weight))
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
                    delta = batched.multiply_rows(flat, *assignment.row_factors(self))
                elif tokens > FEW_TOKENS or (self.on_device and assignment.run_count <= FEW_RUNS):
                    delta = batched.multiply_runs(flat, self.out, assignment.runs(self), tokens)
                else:
                    delta = self.multiply_groups(flat, tokens, assignment)
                if self.key in assignment.with_gain_or_bias:
                    y = self.add_gain_and_bias(delta, flat, weight, bias, assignment)
                else:
                    y = fused.add_product(delta, flat, weight, bias)
                return y.view(*x.shape[:-1], self.out)
        return assignment.row_parts[self.key].run(call)

    def multiply_groups(self, flat: Tensor, tokens: int, assignment: BatchAssignment) -> Tensor:
        """ΔW x of all rows, [N, out]."""
        wide = flat if flat.dtype is self.dtype else flat.to(self.dtype)
        delta = None
        for grouping, (A, B) in assignment.groups(self, tokens):
            h = batched.project_down(batched.gather_rows(wide, grouping), A, grouping)
            delta = batched.project_up(h, B, grouping, delta)
        if delta is None:
            return flat.new_zeros(len(flat), self.out)
        return delta if delta.dtype is flat.dtype else delta.to(flat.dtype)

    def add_gain_and_bias(
        self,
        delta: Tensor,
        flat: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        assignment: BatchAssignment,
    ) -> Tensor:
        """gain ⊙ (x Wᵀ) + Δ + bias, with a gain or a bias of each row."""
        gain, row_bias = assignment.extra(self, bias, flat)
        if gain is None:
            y = fused.add_product(delta, flat, weight, None)
        else:
            base_output, shape_by_row = flat @ weight.mT, (assignment.count, -1, self.out)
            y = delta.view(shape_by_row).addcmul_(base_output.view(shape_by_row), gain[:, None])
        if row_bias is not None:
            y = y.view(assignment.count, -1, self.out).add_(row_bias[:, None])
        elif bias is not None:
            y = y.add_(bias)
        return y


class BatchAssignment:
    """The adapters of each row of a call. ``table`` maps each layer's key to the object that
    computes the layer in this call."""

    def __init__(self, batch_state: BatchState, rows: tuple[Uses, ...]) -> None:
        self.batch_state, self.rows, self.count = batch_state, rows, len(rows)
        self.members = list({resident: None for uses in rows for resident, _ in uses})
        self.members_by_rank: dict[int, list[ResidentAdapter]] = {}
        for resident in sorted(self.members, key=lambda resident: resident.uid):
            if resident.rank:  # adapters of similar rank share a product
                self.members_by_rank.setdefault(
                    max(LEAST_RANK, 1 << (resident.rank - 1).bit_length()), []
                ).append(resident)
        self.groupings: dict[Any, list[Grouping]] = {}
        siblings = (
            sibling
            for sibling in batch_state.assignments.values()
            if sibling.members_by_rank == self.members_by_rank
        )
        #: stacked factors by layer, shared by all assignments of the same adapters
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
        self.row_parts = RowAdapters(
            batch_state.frame.uid, selections, indices, self.count, batch_state.frame.time_first
        )
        general = {key for resident in self.members for key in resident.general}
        keys = dict.fromkeys(key for resident in self.members for key in resident.parts)
        self.table = {
            key: self.row_parts[key] if key in general else batch_state.layers[key] for key in keys
        }
        self.with_gain_or_bias = {
            key
            for resident in self.members
            for key, change in resident.parts.items()
            if isinstance(change, ResolvedLowRank)
            and (change.gain is not None or change.bias is not None)
        }

    def runs(self, layer: Layer) -> list[batched.Run]:
        """Runs of neighbouring rows with the same adapters, and the factors of a layer for each
        run."""
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
                            [
                                (A.to(layer.weight_dtype), B.to(layer.weight_dtype), w)
                                for A, B, w in factors
                            ],
                        )
                    )
                    first = row
            self.run_cache[layer.key] = runs
        return self.run_cache[layer.key]

    @cached_property
    def run_count(self) -> int:
        return 1 + sum(uses != next_uses for uses, next_uses in itertools.pairwise(self.rows))

    def multiplies_by_row(self, layer: Layer, tokens: int) -> bool:
        """Whether to multiply each row by factors stacked for that row. True on a device, and for
        16-bit prompts on a CPU, where it takes one batched product in place of two for each
        adapter."""
        if self.run_count <= FEW_RUNS:
            return False
        if not layer.on_device:
            return tokens > FEW_TOKENS and layer.weight_dtype.itemsize == 2
        return tokens > FEW_TOKENS or self.count <= ROWS_PER_ADAPTER * max(len(self.members), 1)

    def row_factors(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor | None]:
        """A [rows, r, in] and B [rows, r, out] of a layer, stacked for this call, and the weights
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
                row_weights = [
                    torch.tensor([weight for change, weight in changes for _ in change.A])
                    for changes in rows
                ]
                weights = pad_sequence(row_weights, batch_first=True)[:, None]
                weights = weights.to(layer.dtype).to(layer.device, non_blocking=True)
            self.by_row[layer.key] = row_changes, weights
        row_changes, weights = self.by_row[layer.key]
        A, B = layer.join_factors(row_changes)
        return A, B, weights

    def groups(self, layer: Layer, tokens: int) -> Iterator[tuple[Grouping, tuple[Tensor, Tensor]]]:
        """For each rounded rank, the grouping of rows with this number of tokens, and the factors
        of a layer."""
        key, members_by_rank = (tokens, layer.device, layer.dtype), self.members_by_rank
        if key not in self.groupings:
            self.groupings[key] = [
                _grouping(self.rows, members, *key) for members in members_by_rank.values()
            ]
        if layer.on_device:
            return zip(
                self.groupings[key],
                [layer.stack_factors(members) for members in members_by_rank.values()],
                strict=True,
            )
        if layer.key not in self.factors:
            self.factors[layer.key] = [
                layer.stack_factors(members) for members in members_by_rank.values()
            ]
        return zip(self.groupings[key], self.factors[layer.key], strict=True)

    def extra(
        self, layer: Layer, bias: Tensor | None, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gain and the bias of each row for a layer, [rows, out]; None if no row has one."""
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
    """Group rows by the lanes of the adapters that they use. Computed on the CPU, so that nothing
    waits for a device."""
    count, lane_of = len(members), {resident: lane for lane, resident in enumerate(members)}
    rows_of_lane: list[list[tuple[int, float]]] = [[] for _ in members]
    lanes_of_row: list[list[tuple[int, int]]] = []  # for each row, (lane, index within the lane)
    for row, uses in enumerate(rows):
        lanes_of_row.append([])
        for resident, weight in uses:
            if (lane := lane_of.get(resident)) is not None:
                lanes_of_row[row].append((lane, len(rows_of_lane[lane])))
                rows_of_lane[lane].append((row, weight))
    size = max(map(len, rows_of_lane))
    padded = [lane_rows + [(0, 0.0)] * (size - len(lane_rows)) for lane_rows in rows_of_lane]

    def move_to_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def expand_to_tokens(indices: Sequence[int]) -> Tensor | None:
        """Indices of rows or lanes, expanded to indices of their tokens; None if these are 0, 1, 2,
        …"""
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

    order = expand_to_tokens([row for lane_rows in padded for row, _ in lane_rows])
    lane_weights = torch.tensor(
        [[weight for _, weight in lane_rows] for lane_rows in padded], dtype=dtype, device="cpu"
    )
    unweighted = all(weight in (0.0, 1.0) for lane_rows in padded for _, weight in lane_rows)
    weights = (
        None if unweighted else move_to_device(lane_weights.repeat_interleave(tokens, 1)[:, None])
    )
    gathers = []
    for number in range(max(map(len, lanes_of_row))):
        is_present = [len(entries) > number for entries in lanes_of_row]
        entries = [
            entry[number] if present else (0, 0)
            for entry, present in zip(lanes_of_row, is_present, strict=True)
        ]
        index = expand_to_tokens([lane * size + within for lane, within in entries])
        absent = None
        if not all(is_present):
            absent = move_to_device(
                ~torch.tensor(is_present, device="cpu").repeat_interleave(tokens)[:, None]
            )
        gathers.append((index, absent))
    return Grouping(count, order, weights, tuple(gathers))


class BatchState:
    """The layers, cached assignments of recent calls, and the assignment of the running call."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.layers: dict[Any, Layer] = {}
        self.assignments: dict[Any, BatchAssignment] = {}
        self.assignment: Any = None  # a ``BatchAssignment`` while a call runs
        self.zero_buffers: dict[Any, Tensor] = {}

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``count`` zeros, shared and never written to."""
        buffer = self.zero_buffers.get((dtype, device))
        if buffer is None or len(buffer) < count:
            with torch.inference_mode(False):
                buffer = self.zero_buffers[dtype, device] = torch.zeros(
                    count, dtype=dtype, device=device
                )
        return buffer[:count]

    def use(self, rows: tuple[Uses, ...]) -> BatchAssignment:
        """Make ``rows`` the assignment of the calls that follow."""
        key = tuple(tuple((resident.uid, weight) for resident, weight in uses) for uses in rows)
        assignment = self.assignments.pop(key, None)
        if assignment is None:
            while len(self.assignments) >= CACHED:
                del self.assignments[next(iter(self.assignments))]
            for resident in {resident for uses in rows for resident, _ in uses}:
                for layer, part in resident.parts.items():
                    if isinstance(part, ResolvedLowRank) and layer not in self.layers:
                        self.layers[layer] = Layer(self, layer, part)
            with torch.inference_mode(
                False
            ):  # later calls, which may be outside of inference mode, use its tensors
                assignment = BatchAssignment(self, rows)
        self.assignments[key] = self.assignment = assignment
        return assignment

    def keep(self, alive: set[int]) -> None:
        """Drop assignments with adapters that are no longer in memory. ``alive``: the ``uid`` of
        those that are."""
        self.assignments = {
            key: assignment
            for key, assignment in self.assignments.items()
            if all(member.uid in alive for member in assignment.members)
        }
