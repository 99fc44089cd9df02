"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: all weights of all layers and directions.

    weight_ih_l0 [gates · hidden, in]       weight_hh_l0 [gates · hidden, hidden]
    weight_hr_l0 [projection, hidden]       …

Each weight has its own change. A recurrence is not linear in its weights, so the module's own
forward runs on W + ΔW.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from veneer.layers._base import Layer, join_outputs, register


@register
class Recurrent(Layer):
    name = "recurrent"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.RNNBase,)

    def weights(self, module: Any) -> tuple[str, ...]:
        return tuple(
            name for names in module._all_weights for name in names if name.startswith("weight")
        )

    def bind(self, view: Any, values: Any) -> None:
        # A recurrent module passes the list ``_flat_weights`` of its parameters to its kernel, and
        # keeps a list of references to the same parameters. If the references match the parameters,
        # forward does not assign a new list. A new list in the view would be copied back to the
        # module, because Veneer copies attributes that forward changes.
        weights = [
            values.get(name, view._parameters.get(name)) for name in view._flat_weights_names
        ]
        view.__dict__["_flat_weights"] = weights
        view.__dict__["_flat_weight_refs"] = [
            None if weight is None else weakref.ref(weight) for weight in weights
        ]
        view.flatten_parameters()

    def take(
        self, module: Any, args: tuple, kwargs: dict, row_indices: Tensor, batch_size: int
    ) -> tuple[tuple, dict]:
        arguments = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        x, states = arguments["input"], arguments.get("hx")
        batch_axis = 0 if module.batch_first else 1
        if isinstance(x, PackedSequence):
            padded, lengths = pad_packed_sequence(x)  # [time, batch, in]
            if len(lengths) != batch_size:
                raise LookupError
            # the lengths are on the CPU, so the indices must be too
            x = _pack(
                padded.index_select(1, row_indices.to(padded.device)), lengths[row_indices.cpu()]
            )
        elif x.dim() != 3 or x.shape[batch_axis] != batch_size:
            raise LookupError
        else:
            x = x.index_select(batch_axis, row_indices.to(x.device))
        return (
            x,
            pytree.tree_map_only(
                Tensor, lambda state: state.index_select(1, row_indices.to(state.device)), states
            ),
        ), {}

    def put(self, module: Any, outputs: list[Any], order: Tensor) -> Any:
        if isinstance(outputs[0][0], PackedSequence):
            sequences, states = zip(*outputs, strict=True)
            padded_outputs, lengths = zip(*map(pad_packed_sequence, sequences), strict=True)
            longest = max(len(sequence) for sequence in padded_outputs)
            padded_batch = torch.cat(
                [
                    nn.functional.pad(sequence, (0, 0, 0, 0, 0, longest - len(sequence)))
                    for sequence in padded_outputs
                ],
                dim=1,
            )
            sequence = _pack(
                padded_batch.index_select(1, order.to(padded_batch.device)),
                torch.cat(lengths)[order.cpu()],
            )
            return sequence, join_outputs(list(states), order, lambda _: 1)
        return join_outputs(
            outputs,
            order,
            lambda tensor_index: 0 if tensor_index == 0 and module.batch_first else 1,
        )

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        x = randn(4, 3, 5)
        yield nn.LSTM(5, 4), x
        yield (
            nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True),
            (x, (randn(4, 4, 4), randn(4, 4, 4))),
        )
        yield nn.LSTM(5, 4, proj_size=3, bias=False), x
        yield nn.GRU(5, 4, num_layers=2, bidirectional=True), (x, randn(4, 3, 4))
        yield nn.RNN(5, 4, nonlinearity="relu"), x
        yield nn.GRU(5, 4), (pack_padded_sequence(x, torch.tensor([4, 2, 1])),)


def _pack(padded: Tensor, lengths: Tensor) -> PackedSequence:
    """Pack the padded sequences [time, batch, width]. If they are not sorted by length, the result
    contains the indices that sort them."""
    return pack_padded_sequence(
        padded, lengths, enforce_sorted=bool((lengths[1:] <= lengths[:-1]).all())
    )


@register
class RecurrentCell(Layer):
    name = "recurrent_cell"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.RNNCellBase,)

    def weights(self, module: Any) -> tuple[str, ...]:
        return ("weight_ih", "weight_hh")

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        x, state = (*args, None)[:2]
        if weight_name == "weight_hh":
            state = state[0] if isinstance(state, tuple) else state
            x = x.new_zeros(*x.shape[:-1], module.hidden_size) if state is None else state
        return x.reshape(1, -1, x.shape[-1])

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        yield nn.LSTMCell(5, 4), (randn(3, 5), (randn(3, 4), randn(3, 4)))
        yield nn.GRUCell(5, 4), (randn(3, 5), randn(3, 4))
        yield nn.RNNCell(5, 4, bias=False), (randn(3, 5), randn(3, 4))
