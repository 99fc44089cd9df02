"""A cache of the hidden states after the frozen lower blocks of a model, so that these blocks run
once for each row of the data.

    row (ids, positions)  →  blocks 0 … k-1, alone in a batch  →  cached hidden states [s, h]
    batch of rows         →  cached states, zero-padded        →  blocks k …, the head

k: number of frozen lower blocks; s: tokens of a row; h: features of a hidden state. Each row is
computed alone, without padding, so that its cached states do not depend on the batch that first
contained it, and a resumed run ends with the same bits. A packed row is cut into its examples, each
of which is computed and cached alone, because trl joins the rows of a batch, which differ in each
epoch, to one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from veneer.attach import unwrap
from veneer.context import evaluation_mode
from veneer.errors import ConfigError

#: model inputs on which the hidden states of a row may depend
KEY_INPUTS = {"input_ids", "attention_mask", "position_ids"}
#: model inputs on which hidden states do not depend, or which follow from the positions (for flash
#: attention)
IGNORED_INPUTS = {
    "labels", "num_items_in_batch", "use_cache", "logits_to_keep", "return_dict", "seq_idx",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
#: the remedy that the errors of this file name
REMEDY = "leave out cache_lower"


class HiddenStateCache:
    """The frozen lower blocks of a model, and their output for each row or packed example.

    Args:
        model: a causal language model of transformers whose trainable parameters are all in its
            upper blocks.

    Raises:
        ConfigError: a parameter outside the blocks trains, no block lies below the trained ones,
            the blocks below have dropout, or the base is sharded over processes.
    """

    def __init__(self, model: nn.Module) -> None:
        #: the frozen lower blocks; the number of all blocks of the model
        self.blocks, self.block_count = _frozen_blocks(model)
        #: hidden states [s, h] by the hash of the inputs of a row or of a packed example, in main
        #: memory
        self.states: dict[bytes, Tensor] = {}
        #: if a block returns a tuple, its elements after the hidden states, as the last lower block
        #: returned them; None if a block returns the hidden states alone
        self.extra_outputs: tuple[Any, ...] | None = None

    @contextmanager
    def use_for(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """A context in which the model's forward on a batch takes the output of the lower blocks
        from the cache. Rows and packed examples that the cache lacks are computed first.

        Args:
            model: the model, possibly inside a wrapper such as DDP.
            inputs: the model's keyword arguments: input_ids [b, s] of b rows, with an
                attention_mask (padding on the right), with the position_ids of packed rows, or
                with neither.

        Raises:
            ConfigError: there are other inputs, or padding on the left; or the upper blocks depend
                on more than the hidden states, which is tested on the first row or example.
        """
        hidden_by_row = [
            torch.cat([self._find_states(unwrap(model), example) for example in examples])
            for examples in _split_rows(inputs)
        ]
        hidden_batch = pad_sequence(hidden_by_row, batch_first=True).to(inputs["input_ids"].device)
        padding_columns = inputs["input_ids"].shape[1] - hidden_batch.shape[1]
        with self._replace_blocks(nn.functional.pad(hidden_batch, (0, 0, 0, padding_columns))):
            yield

    def _find_states(self, model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        """The cached hidden states [s, h] of a row or of a packed example. They are computed first
        if the cache lacks them, and tested if they are the first. Raises ``ConfigError`` as
        ``use_for`` does."""
        row_bytes = b"".join(
            name.encode() + row[name].cpu().numpy().tobytes() for name in sorted(row)
        )
        row_hash = hashlib.blake2b(row_bytes, digest_size=16).digest()
        is_first = not self.states
        if row_hash not in self.states:
            self.states[row_hash] = self._compute_states(model, row)
        if is_first:
            self._test_cached_states(model, row, self.states[row_hash])
        return self.states[row_hash]

    @torch.no_grad()
    def _compute_states(self, model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        """The hidden states [s, h] of a row after the lower blocks, on the CPU. Also sets
        ``extra_outputs``. Raises ``ConfigError`` if the model's forward does not run the blocks."""
        captured_states: list[Tensor] = []

        def capture(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self.extra_outputs = output[1:]
                output = output[0]
            captured_states.append(output[0].cpu())
            raise _StopForward

        hook = self.blocks[-1].register_forward_hook(capture)
        try:
            model(**row, use_cache=False)
        except _StopForward:
            return captured_states[0]
        finally:
            hook.remove()
        raise ConfigError("a forward that does not run the model's blocks", "one that does", REMEDY)

    @contextmanager
    def _replace_blocks(self, hidden_states: Tensor) -> Iterator[None]:
        """A context in which the last lower block returns ``hidden_states`` [b, s, h],
        and each other lower block returns its input, so that none of them computes anything."""

        def forward_of_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = (
                hidden_states
                if block is self.blocks[-1]
                else args[0]
                if args
                else kwargs["hidden_states"]
            )
            return output if self.extra_outputs is None else (output, *self.extra_outputs)

        previous_forwards = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = partial(forward_of_block, block)
            yield
        finally:
            for block, forward in zip(self.blocks, previous_forwards, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward

    @torch.no_grad()
    def _test_cached_states(
        self, model: nn.Module, row: dict[str, Tensor], hidden_states: Tensor
    ) -> None:
        """Raise ``ConfigError`` and empty the cache unless the model computes the same logits from
        the cached hidden states [s, h] of a row as from the row itself."""
        with evaluation_mode(model):
            reference_logits = model(**row, use_cache=False).logits
            # Lower blocks may keep a state in the model. This forward on a different row replaces
            # the state, so that the next forward shows whether upper blocks read it.
            model(**{**row, "input_ids": row["input_ids"].flip(1)}, use_cache=False)
            with self._replace_blocks(hidden_states.to(reference_logits.device)[None]):
                cached_logits = model(**row, use_cache=False).logits
        if not torch.allclose(
            cached_logits, reference_logits, rtol=0, atol=1e-3 * float(reference_logits.abs().max())
        ):
            self.states.clear()
            raise ConfigError(
                "blocks above that read more of the lower ones than their hidden states",
                "a stack of blocks, each on the output of the one before",
                REMEDY,
            )


class _StopForward(Exception):  # noqa: N818 (control flow, not an error)
    """Raised by a hook to end a forward after the lower blocks."""


def _frozen_blocks(model: Any) -> tuple[list[nn.Module], int]:
    """(the blocks below the lowest block with a trained parameter, number of all blocks). Raises
    ``ConfigError`` as ``HiddenStateCache`` does."""
    requirement = "everything that trains to lie in the upper blocks"
    trained_names = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError("a base that is sharded over processes", "a whole one", REMEDY)
    stacks = {
        path: stack for path, stack in model.named_modules() if isinstance(stack, nn.ModuleList)
    }
    for path, stack in stacks.items():
        if trained_names and all(name.startswith(f"{path}.") for name in trained_names):
            lowest_index = min(
                int(name.removeprefix(f"{path}.").partition(".")[0]) for name in trained_names
            )
            if not lowest_index:
                raise ConfigError("an adapter in block 0", requirement, f"set layers, or {REMEDY}")
            dropout_rates = [
                module.p
                for module in stack[:lowest_index].modules()
                if isinstance(module, nn.Dropout)
            ]
            config_fields = vars(model.config).items()
            dropout_rates += [
                value for name, value in config_fields if name.endswith(("dropout", "_pdrop"))
            ]
            if any(isinstance(rate, float | int) and rate > 0 for rate in dropout_rates):
                raise ConfigError(
                    "a base with dropout, which draws anew each time",
                    "dropout of 0 in the base's configuration",
                    REMEDY,
                )
            return list(stack[:lowest_index]), len(stack)
    longest_stack_path = max(stacks, key=lambda path: len(stacks[path]), default="")
    outside_name = next(
        (name for name in trained_names if not name.startswith(f"{longest_stack_path}.")),
        "nothing that trains",
    )
    raise ConfigError(
        f"{outside_name!r}, outside the blocks", requirement, f"set targets, or {REMEDY}"
    )


def _split_rows(inputs: Mapping[str, Any]) -> list[list[dict[str, Tensor]]]:
    """By row, the examples that it consists of: several for a packed row, else one. An example is
    the inputs that its hidden states depend on, by name: [1, s] for its s tokens, without padding.
    Raises ``ConfigError`` for inputs that are not supported and for padding on the left."""
    unsupported_names = (
        {name for name, value in inputs.items() if value is not None} - KEY_INPUTS - IGNORED_INPUTS
    )
    if unsupported_names:
        raise ConfigError(
            f"inputs {sorted(unsupported_names)}", f"only {sorted(KEY_INPUTS)}", REMEDY
        )
    mask = inputs.get("attention_mask")
    rows = []
    for row_index in range(len(inputs["input_ids"])):
        row = {
            name: inputs[name][row_index : row_index + 1]
            for name in KEY_INPUTS
            if inputs.get(name) is not None
        }
        if mask is not None:
            length = int(mask[row_index].sum())
            if not bool(mask[row_index, :length].all()):
                raise ConfigError("padding on the left", "padding on the right", REMEDY)
            row = {name: value[:, :length] for name, value in row.items()}
        rows.append([row] if mask is not None else _split_examples(row))
    return rows


def _split_examples(row: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples of a row without a mask, whose inputs are [1, s] by name. With position_ids, an
    example begins at each position 0; else the row is one example."""
    if "position_ids" not in row:
        return [row]
    first_tokens = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
    bounds = sorted({0, *first_tokens, row["input_ids"].shape[1]})
    return [
        {name: value[:, start:end] for name, value in row.items()}
        for start, end in pairwise(bounds)
    ]
