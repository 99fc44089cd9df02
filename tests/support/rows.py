"""Batches whose rows use different adapters."""

from __future__ import annotations

from tests.support.toys import example
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from veneer.layers import LAYERS

# transformers' Conv1D is a kind of layer only after transformers was imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip


#: (name of the layer kind, number of its example)
EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]


def rows_of(module, args) -> tuple[int, int]:
    """(the number of rows of the batch, the axis of the rows in the first output)."""
    if isinstance(module, nn.EmbeddingBag) and len(args) > 1:
        return len(args[1]), 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first:
        return args[0].shape[1], 1
    return args[0].shape[0], 0


def has_rows(kind, number):
    module, args = example(kind, number)
    is_packed = isinstance(args[0], PackedSequence)
    return not is_packed and args[0].dim() > 1 and type(module).__name__ != "Experts"


#: the examples whose batch has rows
ROWS = [case for case in EXAMPLES if has_rows(*case)]
