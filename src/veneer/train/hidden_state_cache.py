"""Hidden-state cache for the frozen lower blocks: computed once for each row of the data.

    row (ids, positions)  →  blocks 0 … k-1, alone in a batch  →  hidden [s, h], kept
    batch of rows         →  their hidden, padded with zeros   →  blocks k …, the head

A row is computed alone, without padding: a resumed run ends in the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from veneer.attach.lookup import unwrap
from veneer.errors import ConfigError

#: the inputs of a row that its hidden states may depend on
READ = {"input_ids", "attention_mask", "position_ids"}
#: and those that they do not depend on, or that flash attention reads of the positions
OTHER = {
    "labels", "num_items_in_batch", "use_cache", "logits_to_keep", "return_dict", "seq_idx", "cu_seq_lens_q",
    "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
INSTEAD = "leave out cache_lower"


class HiddenStateCache:
    """The frozen lower blocks of a model, and their output for each row. ``model``: one of
    transformers' causal language models, with everything that trains in the upper ones of its
    blocks. ``ConfigError``: something outside those blocks trains, nothing lies below, or what lies
    below is random."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks, self.count = _below(model)
        self.known: dict[bytes, Tensor] = {}  # hidden states [s, h] of a row, in main memory
        self.extra_outputs: tuple[Any, ...] | None = (
            None  # what a block gives besides them; None if it gives no tuple
        )

    @property
    def bytes(self) -> int:
        """What is kept now."""
        return sum(hidden.nbytes for hidden in self.known.values())

    @contextmanager
    def given(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within the block the model's forward takes the hidden states of this batch from memory,
        computed if need be. ``inputs``: the model's keyword arguments: input_ids [b, s], and
        attention_mask, with padding on the right, or the position_ids of packed rows, or neither.
        ``ConfigError``: another input, or padding on the left; what the blocks above compute
        depends on more than the hidden states (seen when the first row is computed)."""
        hidden = []
        for row in _rows(inputs):
            content = b"".join(
                name.encode() + row[name].cpu().numpy().tobytes() for name in sorted(row)
            )
            key, first = hashlib.blake2b(content, digest_size=16).digest(), not self.known
            if key not in self.known:
                self.known[key] = self._computed(unwrap(model), row)
            if first:
                self._prove(unwrap(model), row, self.known[key])
            hidden.append(self.known[key])
        whole = pad_sequence(hidden, batch_first=True).to(inputs["input_ids"].device)
        short = inputs["input_ids"].shape[1] - whole.shape[1]
        with self._standing_in(nn.functional.pad(whole, (0, 0, 0, short))):
            yield

    @torch.no_grad()
    def _computed(self, model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self.extra_outputs = output[1:]
                output = output[0]
            found.append(output[0].cpu())
            raise _Reached

        hook = self.blocks[-1].register_forward_hook(keep)
        try:
            model(**row, use_cache=False)
        except _Reached:
            return found[0]
        finally:
            hook.remove()
        raise ConfigError(
            "a forward that does not run the model's blocks", "one that does", INSTEAD
        )

    @contextmanager
    def _standing_in(self, hidden: Tensor) -> Iterator[None]:
        """The last of the lower blocks answers with these hidden states, the others with what they
        are given."""

        def answer(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = (
                hidden if block is self.blocks[-1] else args[0] if args else kwargs["hidden_states"]
            )
            return output if self.extra_outputs is None else (output, *self.extra_outputs)

        before = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = partial(answer, block)
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                block.__dict__.pop("forward", None)
                if own is not None:
                    block.forward = own

    @torch.no_grad()
    def _prove(self, model: nn.Module, row: dict[str, Tensor], hidden: Tensor) -> None:
        """That the model computes the same from the hidden states as from the row."""
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            expected = model(**row, use_cache=False).logits
            # nothing that another row has left behind may be read either
            model(**{**row, "input_ids": row["input_ids"].flip(1)}, use_cache=False)
            with self._standing_in(hidden.to(expected.device)[None]):
                found = model(**row, use_cache=False).logits
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not torch.allclose(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max())):
            self.known.clear()
            what = "blocks above that read more of the lower ones than their hidden states"
            raise ConfigError(
                what, "a stack of blocks, each on the output of the one before", INSTEAD
            )


class _Reached(Exception):  # noqa: N818 (it is no error)
    """The lower blocks have run; nothing above needs to."""


def _below(model: Any) -> tuple[list[nn.Module], int]:
    """(the blocks below the lowest one in which something trains, how many blocks there are)."""
    expected = "everything that trains to lie in the upper blocks"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError("a base that is sharded over processes", "a whole one", INSTEAD)
    stacks = {
        path: stack for path, stack in model.named_modules() if isinstance(stack, nn.ModuleList)
    }
    for path, stack in stacks.items():
        if trained and all(name.startswith(f"{path}.") for name in trained):
            lowest = min(int(name.removeprefix(f"{path}.").partition(".")[0]) for name in trained)
            if not lowest:
                raise ConfigError("an adapter in block 0", expected, f"set layers, or {INSTEAD}")
            drops = [
                module.p for module in stack[:lowest].modules() if isinstance(module, nn.Dropout)
            ]
            config = vars(model.config).items()
            drops += [value for name, value in config if name.endswith(("dropout", "_pdrop"))]
            if any(isinstance(p, float | int) and p > 0 for p in drops):
                problem = "a base with dropout, which draws anew each time"
                raise ConfigError(problem, "dropout of 0 in the base's configuration", INSTEAD)
            return list(stack[:lowest]), len(stack)
    stack = max(stacks, key=lambda path: len(stacks[path]), default="")
    outside = next(
        (name for name in trained if not name.startswith(f"{stack}.")), "nothing that trains"
    )
    raise ConfigError(f"{outside!r}, outside the blocks", expected, f"set targets, or {INSTEAD}")


def _rows(inputs: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    more = {name for name, value in inputs.items() if value is not None} - READ - OTHER
    if more:
        raise ConfigError(f"inputs {sorted(more)}", f"only {sorted(READ)}", INSTEAD)
    mask = inputs.get("attention_mask")
    rows = []
    for number in range(len(inputs["input_ids"])):
        row = {
            name: inputs[name][number : number + 1] for name in READ if inputs.get(name) is not None
        }
        if mask is not None:
            length = int(mask[number].sum())
            if not bool(mask[number, :length].all()):
                raise ConfigError("padding on the left", "padding on the right", INSTEAD)
            row = {name: value[:, :length] for name, value in row.items()}
        rows.append(row)
    return rows
