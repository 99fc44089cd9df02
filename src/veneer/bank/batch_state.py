"""The state of one call of a bank: which adapters each row uses, and the factors of these adapters
in the form that ``kernels/batched.py`` and ``kernels/mixed_rows.py`` (a compiled loop) take.

    BatchState ─ layers         a ``BatchedLayer`` for each linear layer with a low-rank change
               ─ assignments    a ``BatchAssignment`` for each recent choice of adapters by row

Adapters whose ranks round up to the same power of two are computed together. For each layer and
each rounded rank, an assignment stacks the factors of its adapters into A [adapters, r, in] and
B [adapters, r, out], padded with zeros where an adapter has a smaller rank or does not change the
layer. On a CPU, later calls with the same adapters use the same tensors.

Each running call has its own batch state, so another call cannot change the state during the call.
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

#: the smallest rounded rank. Ranks are rounded up to powers of two, and the adapters of one rounded
#: rank are computed by one batched product.
MIN_ROUNDED_RANK = 8
#: how many assignments (choices of adapters by row) to cache. A server alternates between two: the
#: rows that generate tokens, and the rows whose prompts are computed.
MAX_CACHED_ASSIGNMENTS = 2
#: the most tokens per row for which rows are grouped by adapter; more tokens are those of prompts
MAX_GROUPED_TOKENS = 4
#: the most runs of neighbouring rows with the same adapters for which rows never get copies of the
#: factors; the most rows per adapter for which a GPU copies them for each row of few tokens
MAX_SINGLE_RUNS, MAX_ROWS_PER_ADAPTER = 2, 4

#: the adapters of one row, each with its weight; empty for the base alone
WeightedAdapters = tuple[tuple[ResidentAdapter, float], ...]


class ModelLayout:
    """What a batch state needs to know of the bank's model.

    Attributes:
        uid: the model's key in ``Context.selection``.
        time_first: whether a module of the model takes inputs [time, batch, …], rows on axis 1.
        modules: the adapted modules, by ``LayerState.key``.
    """

    def __init__(self, uid: str, time_first: bool) -> None:
        self.uid, self.time_first = uid, time_first
        self.modules: dict[Any, nn.Module] = {}


class BatchedLayer:
    """One linear layer of the model for one batch state. ``run`` replaces the layer's forward.

    Attributes:
        is_transposed: whether the module stores its weight as [in, out].
        compute_dtype, factor_dtype: dtypes of the batched products, and of the factors in the bank.
        row_loop: the module of the compiled loop, ``mixed_rows``; None if it cannot run the layer.
        empty_factors: A [0, in] and B [0, out], for an adapter that does not change the layer.
    """

    def __init__(self, batch_state: BatchState, key: Any, example_change: ResolvedLowRank) -> None:
        self.batch_state, self.key, self.weight_name = batch_state, key, example_change.weight_name
        weight: Any = batch_state.layout.modules[key]._parameters[example_change.weight_name]
        self.is_transposed = example_change.layer.out_axis == 1
        self.in_dim, self.out_dim = example_change.A.shape[1], example_change.B.shape[1]
        self.on_gpu = not weight.is_cpu
        self.device, self.weight_dtype = weight.device, weight.dtype
        self.compute_dtype = weight.dtype if self.on_gpu else at_least_float32(weight.dtype)
        self.time_first = batch_state.layout.time_first
        self.factor_dtype = example_change.A.dtype
        self.row_loop: Any = batched.load_row_loop(weight, self.factor_dtype)
        self.empty_factors = (
            example_change.A.new_empty(0, self.in_dim),
            example_change.B.new_empty(0, self.out_dim),
        )

    def stack_factors(self, adapters: Sequence[ResidentAdapter]) -> tuple[Tensor, Tensor]:
        """This layer's A [adapters, r, in] and B [adapters, r, out] of these adapters, padded with
        zeros to the largest rank r."""
        changes = [resident.layer_changes.get(self.key) for resident in adapters]
        if self.on_gpu:
            return self.join_factors(
                [[change] if type(change) is ResolvedLowRank else [] for change in changes]
            )
        pairs = [
            (change.A, change.B) if type(change) is ResolvedLowRank else self.empty_factors
            for change in changes
        ]
        A, B = [A for A, _ in pairs], [B for _, B in pairs]
        # no inference tensors, because later calls outside of inference mode use these tensors
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if len({len(factor) for factor in A}) == 1:
                return torch.stack(A).to(self.compute_dtype), torch.stack(B).to(self.compute_dtype)
            return pad_sequence(A, batch_first=True).to(self.compute_dtype), pad_sequence(
                B, batch_first=True
            ).to(self.compute_dtype)

    def join_ranks(
        self, adapters: Sequence[ResidentAdapter]
    ) -> tuple[Any, Any, tuple[tuple[int, int], ...]]:
        """The factors in the form of the compiled loop: (A [R, in], B [R, out], bounds), where row
        k of A and of B belong together, and the rows of the adapters follow one another.
        ``bounds``: for each adapter, its first row and the row after its last. The rows of each
        adapter are padded with zeros to a multiple of ``RANKS_TOGETHER``."""
        changes = [resident.layer_changes.get(self.key) for resident in adapters]
        ranks = [len(change.A) if type(change) is ResolvedLowRank else 0 for change in changes]
        multiple = self.row_loop.RANKS_TOGETHER
        ends = list(itertools.accumulate(rank + -rank % multiple for rank in ranks))
        bounds = tuple(zip([0, *ends], ends, strict=False))
        # no inference tensors, because later calls outside of inference mode use these tensors
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            A, B = (
                torch.zeros(ends[-1], width, dtype=self.factor_dtype)
                for width in (self.in_dim, self.out_dim)
            )
            for change, rank, (first, _) in zip(changes, ranks, bounds, strict=True):
                if rank:
                    A[first : first + rank], B[first : first + rank] = change.A, change.B
        return self.row_loop.to_array(A), self.row_loop.to_array(B), bounds

    def join_factors(self, rows: Sequence[Sequence[ResolvedLowRank]]) -> tuple[Tensor, Tensor]:
        """A [n, r, in] and B [n, r, out] for n rows of a batch: the factors of all changes of a
        row, joined along the rank and padded with zeros. Both are new copies in the dtype of the
        weight. They are large, so the caller must free them after the product."""
        ranks = [sum(len(change.A) for change in changes) for changes in rows]
        max_rank, factors = max(ranks), []
        for name, width in (("A", self.in_dim), ("B", self.out_dim)):
            zeros = self.batch_state.zeros(max_rank * width, self.factor_dtype, self.device).view(
                max_rank, width
            )
            pieces = [
                piece
                for changes, rank in zip(rows, ranks, strict=True)
                for piece in (*(getattr(change, name) for change in changes), zeros[rank:])
                if len(piece)
            ]
            factors.append(
                torch.cat(pieces or [zeros]).view(len(rows), max_rank, width).to(self.weight_dtype)
            )
        return factors[0], factors[1]

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        for resident in self.batch_state.assignment.adapters:
            if self.key in resident.layer_changes:
                yield from resident.layer_changes[self.key].reached_ids(method)

    def run(self, call: Call) -> Any:
        """The layer's output for a call. Calls without batched products (such as those with
        gradients) are computed by ``assignment.unresolved_layers``, separately for each adapter."""
        # written with few Python calls, because each costs time in every layer of a decoding step
        assignment = self.batch_state.assignment
        if len(call.args) == 1 and not call.kwargs and call.context.path is None:
            x, module, parameters = call.args[0], call.module, call.module._parameters
            weight: Any = parameters[self.weight_name]
            if (
                (fused.applies(x, weight) or device.applies_without_cast(x, weight))
                and x.ndim > 1
                and x.shape[0] == assignment.row_count
                and not (x.requires_grad and torch.is_grad_enabled())
                and not (self.time_first and x.ndim > 2 and x.shape[1] == assignment.row_count)
            ):
                weight = weight.mT if self.is_transposed else weight
                bias = parameters["bias"] if "bias" in parameters else getattr(module, "bias", None)
                token_inputs = (x.view if x.is_contiguous() else x.reshape)(-1, self.in_dim)
                tokens_per_row = len(token_inputs) // assignment.row_count
                if assignment.multiplies_by_row(self, tokens_per_row):
                    delta = batched.multiply_rows(token_inputs, *assignment.row_factors(self))
                elif tokens_per_row > MAX_GROUPED_TOKENS or (
                    self.on_gpu and assignment.run_count <= MAX_SINGLE_RUNS
                ):
                    runs = assignment.runs(self)
                    delta = batched.multiply_runs(token_inputs, self.out_dim, runs, tokens_per_row)
                else:
                    delta = self.multiply_groups(token_inputs, tokens_per_row, assignment)
                if self.key in assignment.gain_or_bias_keys:
                    y = self.add_gain_and_bias(delta, token_inputs, weight, bias, assignment)
                else:
                    y = fused.add_product(delta, token_inputs, weight, bias, tokens_per_row == 1)
                return y.view(*x.shape[:-1], self.out_dim)
        return assignment.unresolved_layers[self.key].run(call)

    def multiply_groups(
        self, token_inputs: Tensor, tokens_per_row: int, assignment: BatchAssignment
    ) -> Tensor:
        """x ΔWᵀ [N, out] for the tokens x = ``token_inputs`` [N, in], each with its row's ΔW."""
        if self.row_loop is not None and assignment.fits_row_loop(self, tokens_per_row):
            A, B, pairs = assignment.row_pairs(self, tokens_per_row)
            return self.row_loop.multiply_pairs(token_inputs, A, B, pairs)
        wide_inputs, delta = token_inputs, None
        if token_inputs.dtype is not self.compute_dtype:
            wide_inputs = token_inputs.to(self.compute_dtype)
        for grouping, (A, B) in assignment.groups(self, tokens_per_row):
            h = batched.project_down(batched.gather_rows(wide_inputs, grouping), A, grouping)
            delta = batched.project_up(h, B, grouping, delta)
        if delta is None:
            return token_inputs.new_zeros(len(token_inputs), self.out_dim)
        return delta if delta.dtype is token_inputs.dtype else delta.to(token_inputs.dtype)

    def add_gain_and_bias(
        self,
        delta: Tensor,
        token_inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        assignment: BatchAssignment,
    ) -> Tensor:
        """gain ⊙ (x Wᵀ) + ``delta`` + bias, [N, out], for x = ``token_inputs`` [N, in], with the
        gain and the bias of each row."""
        gain, row_bias = assignment.row_gain_and_bias(self, bias, token_inputs)
        if gain is None:
            y = fused.add_product(delta, token_inputs, weight, None)
        else:
            shape_by_row = assignment.row_count, -1, self.out_dim
            base_output = token_inputs @ weight.mT
            y = delta.view(shape_by_row).addcmul_(base_output.view(shape_by_row), gain[:, None])
        if row_bias is not None:
            y = y.view(assignment.row_count, -1, self.out_dim).add_(row_bias[:, None])
        elif bias is not None:
            y = y.add_(bias)
        return y


class BatchAssignment:
    """The adapters of each row of a call.

    Attributes:
        rows: for each row, its adapters with their weights (its blend).
        layer_table: maps the key of each changed layer to the object whose ``run`` computes it.
        adapters: the adapters of all rows, each listed once.
        adapters_by_rank: {rounded rank: its adapters}, without adapters of rank 0.
        groupings: for each rounded rank, how rows are grouped, by (tokens per row, device, dtype).
        rows_by_blend: {blend: the indices of the rows that use it}.
        unresolved_layers: by layer key, objects that compute each adapter's rows separately, for
            changes that are no ``ResolvedLowRank`` and for calls without batched products.
        gain_or_bias_keys: keys of layers for which some adapter has a gain or a bias.
    """

    def __init__(self, batch_state: BatchState, rows: tuple[WeightedAdapters, ...]) -> None:
        self.batch_state, self.rows, self.row_count = batch_state, rows, len(rows)
        self.adapters = list({resident: None for blend in rows for resident, _ in blend})
        self.adapters_by_rank: dict[int, list[ResidentAdapter]] = {}
        for resident in sorted(self.adapters, key=lambda resident: resident.uid):
            if resident.rank:  # adapters of one rounded rank share a batched product
                self.adapters_by_rank.setdefault(
                    max(MIN_ROUNDED_RANK, 1 << (resident.rank - 1).bit_length()), []
                ).append(resident)
        self.groupings: dict[Any, list[Grouping]] = {}
        siblings = [
            sibling
            for sibling in batch_state.assignments.values()
            if sibling.adapters_by_rank == self.adapters_by_rank
        ]
        #: results of ``stack_factors`` by layer, shared by all assignments of the same adapters
        self.factors: dict[Any, list[tuple[Tensor, Tensor]]] = next(
            (sibling.factors for sibling in siblings), {}
        )
        #: results of ``join_ranks`` by layer, shared by all assignments of the same adapters
        self.joined_factors: dict[Any, tuple[Any, Any, tuple[tuple[int, int], ...]]] = next(
            (sibling.joined_factors for sibling in siblings), {}
        )
        self.pair_cache: dict[Any, Any] = {}
        self.run_cache: dict[Any, list[batched.Run]] = {}
        self.row_factor_cache: dict[Any, tuple[list[list[ResolvedLowRank]], Tensor | None]] = {}
        self.gain_and_bias_cache: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        self.rows_by_blend = {
            blend: [row for row, row_blend in enumerate(rows) if row_blend == blend]
            for blend in dict.fromkeys(rows)
        }
        selections = [_select(blend) for blend in self.rows_by_blend]
        index_tensors = [
            torch.tensor(row_indices, device="cpu") for row_indices in self.rows_by_blend.values()
        ]
        layout = batch_state.layout
        self.unresolved_layers = RowAdapters(
            layout.uid, selections, index_tensors, self.row_count, layout.time_first
        )
        unresolved_keys = {key for resident in self.adapters for key in resident.unresolved_keys}
        keys = dict.fromkeys(key for resident in self.adapters for key in resident.layer_changes)
        self.layer_table = {
            key: (self.unresolved_layers if key in unresolved_keys else batch_state.layers)[key]
            for key in keys
        }
        self.gain_or_bias_keys = {
            key
            for resident in self.adapters
            for key, change in resident.layer_changes.items()
            if isinstance(change, ResolvedLowRank)
            and (change.gain is not None or change.bias is not None)
        }

    def runs(self, layer: BatchedLayer) -> list[batched.Run]:
        """The runs of neighbouring rows with the same adapters, with their factors for a layer, as
        ``multiply_runs`` takes them: (first row, row after the last, [(A, B, weight), …])."""
        if layer.key not in self.run_cache:
            runs: list[batched.Run] = []
            first_row, dtype = 0, layer.weight_dtype
            for blend, run_rows in itertools.groupby(self.rows):
                end_row = first_row + len(list(run_rows))
                factors = [
                    (change.A.to(dtype), change.B.to(dtype), weight)
                    for resident, weight in blend
                    if (change := resident.layer_changes.get(layer.key)) is not None
                ]
                runs.append((first_row, end_row, factors))
                first_row = end_row
            self.run_cache[layer.key] = runs
        return self.run_cache[layer.key]

    @cached_property
    def run_count(self) -> int:
        return 1 + sum(blend != next_blend for blend, next_blend in itertools.pairwise(self.rows))

    def multiplies_by_row(self, layer: BatchedLayer, tokens_per_row: int) -> bool:
        """Whether to multiply each row with its own copy of its adapters' factors. On a GPU, this
        is faster unless many rows of few tokens share an adapter. On a CPU, it is faster only for
        many tokens in 16 bits: two batched products replace two for each run and adapter."""
        if self.run_count <= MAX_SINGLE_RUNS:
            return False
        if not layer.on_gpu:
            return tokens_per_row > MAX_GROUPED_TOKENS and layer.weight_dtype.itemsize == 2
        has_few_rows = self.row_count <= MAX_ROWS_PER_ADAPTER * max(len(self.adapters), 1)
        return tokens_per_row > MAX_GROUPED_TOKENS or has_few_rows

    def row_factors(self, layer: BatchedLayer) -> tuple[Tensor, Tensor, Tensor | None]:
        """New copies A [rows, r, in] and B [rows, r, out] for a layer, and the blend weights of the
        adapters that the ranks of a row come from, [rows, 1, r], or None if all weights are 1."""
        if layer.key not in self.row_factor_cache:
            rows = [
                [
                    (resident.layer_changes[layer.key], weight)
                    for resident, weight in blend
                    if layer.key in resident.layer_changes
                ]
                for blend in self.rows
            ]
            row_changes = [[change for change, _ in weighted_changes] for weighted_changes in rows]
            weights = None
            if any(weight != 1 for weighted_changes in rows for _, weight in weighted_changes):
                row_weights = [
                    torch.tensor([weight for change, weight in changes for _ in change.A])
                    for changes in rows
                ]
                weights = pad_sequence(row_weights, batch_first=True)[:, None]
                weights = weights.to(layer.compute_dtype).to(layer.device, non_blocking=True)
            self.row_factor_cache[layer.key] = row_changes, weights
        row_changes, weights = self.row_factor_cache[layer.key]
        return *layer.join_factors(row_changes), weights

    def groups(
        self, layer: BatchedLayer, tokens_per_row: int
    ) -> Iterator[tuple[Grouping, tuple[Tensor, Tensor]]]:
        """For each rounded rank: (how the rows are grouped, (A, B) of a layer, stacked)."""
        key = tokens_per_row, layer.device, layer.compute_dtype
        if key not in self.groupings:
            self.groupings[key] = [
                batched.make_grouping(self.index_adapters(adapters), len(adapters), *key)
                for adapters in self.adapters_by_rank.values()
            ]
        factors = None if layer.on_gpu else self.factors.get(layer.key)
        if factors is None:
            factors = [layer.stack_factors(adapters) for adapters in self.adapters_by_rank.values()]
            if not layer.on_gpu:
                self.factors[layer.key] = factors
        return zip(self.groupings[key], factors, strict=True)

    def index_adapters(self, adapters: Sequence[ResidentAdapter]) -> list[list[tuple[int, float]]]:
        """For each row: (index in ``adapters``, weight) of its adapters that ``adapters`` has."""
        index_of = {resident: index for index, resident in enumerate(adapters)}
        return [
            [(index_of[resident], weight) for resident, weight in blend if resident in index_of]
            for blend in self.rows
        ]

    @property
    def sorted_adapters(self) -> list[ResidentAdapter]:
        """The adapters of rank 1 and more, in the order of ``adapters_by_rank``."""
        return [resident for adapters in self.adapters_by_rank.values() for resident in adapters]

    @cached_property
    def rank_sum(self) -> int:
        """The rounded ranks of the adapters of each row, summed over all rows."""
        rounded_rank_of = {
            resident: rank
            for rank, adapters in self.adapters_by_rank.items()
            for resident in adapters
        }
        return sum(rounded_rank_of.get(resident, 0) for blend in self.rows for resident, _ in blend)

    def fits_row_loop(self, layer: BatchedLayer, tokens_per_row: int) -> bool:
        """Whether the compiled loop, which has one thread, is faster than batched products."""
        multiply_add_count = self.rank_sum * tokens_per_row * (layer.in_dim + layer.out_dim)
        return multiply_add_count * torch.get_num_threads() <= batched.LOOP_MAX_WORK

    def row_pairs(self, layer: BatchedLayer, tokens_per_row: int) -> tuple[Any, Any, Any]:
        """The arguments of the compiled loop: A [R, in] and B [R, out] of ``join_ranks`` for a
        layer, and the pairs of rows and adapters (``mixed_rows.RowPairs``)."""
        if layer.key not in self.joined_factors:
            self.joined_factors[layer.key] = layer.join_ranks(self.sorted_adapters)
        A, B, bounds = self.joined_factors[layer.key]
        key = tokens_per_row, bounds
        if key not in self.pair_cache:
            indexed_rows = self.index_adapters(self.sorted_adapters)
            self.pair_cache[key] = layer.row_loop.make_pairs(indexed_rows, bounds, tokens_per_row)
        return A, B, self.pair_cache[key]

    def row_gain_and_bias(
        self, layer: BatchedLayer, bias: Tensor | None, like_tensor: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gain and the bias of each row for a layer, each [rows, out] or None if no adapter
        changes it. ``bias``: the layer's own bias; ``like_tensor``: a tensor with the dtype and
        device of the results."""
        if layer.key not in self.gain_and_bias_cache:
            changes = {
                resident: resident.layer_changes.get(layer.key) for resident in self.adapters
            }

            def expand(attribute: str, base_value: Tensor) -> Tensor | None:
                if all(getattr(change, attribute, None) is None for change in changes.values()):
                    return None
                values = base_value.expand(self.row_count, layer.out_dim).clone()
                for row, blend in enumerate(self.rows):
                    for resident, weight in blend:
                        if (value := getattr(changes[resident], attribute, None)) is not None:
                            values[row] += weight * (value.to(layer.compute_dtype) - base_value)
                return values.to(like_tensor.dtype)

            ones = torch.ones(layer.out_dim, dtype=layer.compute_dtype, device=like_tensor.device)
            gain = expand("gain", ones)
            row_bias = None if bias is None else expand("bias", bias.to(layer.compute_dtype))
            self.gain_and_bias_cache[layer.key] = gain, row_bias
        return self.gain_and_bias_cache[layer.key]


def _select(blend: WeightedAdapters) -> Any:
    """The adapters of a row, blended into one ``ActiveAdapter``, for ``RowAdapters``."""
    selected = [
        (ActiveAdapter(resident.path.name, resident.layer_changes), weight)
        for resident, weight in blend
    ]
    return blend_adapters(selected) if selected else BASE


class BatchState:
    """The state of one call: its ``assignment`` (None between calls), and caches for later calls:
    ``layers`` by ``LayerState.key``, ``assignments`` by each row's adapter uids and weights."""

    def __init__(self, layout: ModelLayout) -> None:
        self.layout = layout
        self.layers: dict[Any, BatchedLayer] = {}
        self.assignments: dict[Any, BatchAssignment] = {}
        self.assignment: Any = None
        self.zero_buffers: dict[Any, Tensor] = {}

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor [count] of zeros. All callers share its memory, so do not write to it."""
        buffer = self.zero_buffers.get((dtype, device))
        if buffer is None or len(buffer) < count:
            with torch.inference_mode(False):
                buffer = self.zero_buffers[dtype, device] = torch.zeros(
                    count, dtype=dtype, device=device
                )
        return buffer[:count]

    def use(self, rows: tuple[WeightedAdapters, ...]) -> BatchAssignment:
        """Return the assignment of these adapters to the rows, and use it for the next calls."""
        key = tuple(tuple((resident.uid, weight) for resident, weight in blend) for blend in rows)
        assignment = self.assignments.pop(key, None)
        if assignment is None:
            while len(self.assignments) >= MAX_CACHED_ASSIGNMENTS:
                del self.assignments[next(iter(self.assignments))]
            for resident in {resident for blend in rows for resident, _ in blend}:
                for layer_key, change in resident.layer_changes.items():
                    if isinstance(change, ResolvedLowRank) and layer_key not in self.layers:
                        self.layers[layer_key] = BatchedLayer(self, layer_key, change)
            # no inference tensors, because later calls outside of inference mode use them
            with torch.inference_mode(False):
                assignment = BatchAssignment(self, rows)
        self.assignments[key] = self.assignment = assignment
        return assignment

    def drop_removed(self, resident_uids: set[int]) -> None:
        """Drop the cached assignments that use an adapter which is no longer in memory, to free its
        factors. ``resident_uids``: the uids of the adapters in memory."""
        self.assignments = {
            key: assignment
            for key, assignment in self.assignments.items()
            if all(adapter.uid in resident_uids for adapter in assignment.adapters)
        }
