"""What only a frozen base allows, each with its gain: time with it / time without, of a training step of Veneer on
SmolLM2-135M's shape (12 layers). CPU time of one thread, in interleaved rounds. `lowest`: adapters in the upper third
of the layers, where backward ends, against a backward down to the embedding, as gradient checkpointing makes it
elsewhere. `cached`: the same adapters, with what the layers below put out taken from memory in place of computed.
`prompts`: half of the labels masked, as those of prompts are: their rows do not reach the head, against full logits.
`packed`: examples of 48 to 256 tokens end to end in rows of 256, against padding each to the longest.

    python benchmarks/frozen.py
    python benchmarks/frozen.py --dtype float32 --layers 6

Predicted: lowest 0.60, cached 0.45 (a third of 3 parts of 4), prompts 0.80, packed 0.55.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from candidates import ALPHA, DTYPES, Candidate, llama, own_loss, sharing, timed, with_products
from candidates import options as options_of
from report import measure, show, write
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.loss import causal_loss

#: of examples; each line fills a row
LENGTHS = ((256,), (208, 48), (160, 96), (128, 64, 64))


def adapted(base: nn.Module, layers: Sequence[int] | None = None) -> nn.Module:
    model = sharing(base)
    if next(model.parameters()).dtype.itemsize == 2:
        with_products(model)
    veneer.attach(model, veneer.LoraConfig(rank=8, alpha=ALPHA, layers=layers))
    return model


def calls(
    plain: nn.Module, batch: dict[str, Tensor], better: nn.Module, other: dict[str, Tensor] | None = None,
    loss: Any = causal_loss, better_loss: Any = causal_loss,
) -> dict[str, Callable[[], float]]:  # fmt: skip
    """A step of `plain` on `batch` by `loss`, and one of `better`, on `other` if that is given, by `better_loss`."""
    made = {}
    for name, model, inputs, own in (("without", plain, batch, loss), ("with", better, other or batch, better_loss)):
        candidate = Candidate(model, [one for one in model.parameters() if one.requires_grad], own)
        made[name] = functools.partial(timed, candidate, candidate.optimizer(), inputs)
    return made


def batch_of(base: nn.Module, rows: int = 4, length: int = 256) -> dict[str, Tensor]:
    ids = torch.randint(0, base.config.vocab_size, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def lowest(base: nn.Module) -> dict[str, Callable[[], float]]:
    upper = range(2 * base.config.num_hidden_layers // 3, base.config.num_hidden_layers)
    whole, ended, batch = adapted(base, list(upper)), adapted(base, list(upper)), batch_of(base)
    whole.get_input_embeddings().register_forward_hook(lambda *call: call[2].detach().requires_grad_())
    return calls(whole, batch, ended)


def cached(base: nn.Module) -> dict[str, Callable[[], float]]:
    first = 2 * base.config.num_hidden_layers // 3
    model, batch = adapted(base, list(range(first, base.config.num_hidden_layers))), batch_of(base)
    lower = HiddenStateCache(model)

    def from_memory(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with lower.given(model, inputs):
            return causal_loss(model, inputs)

    assert torch.allclose(causal_loss(model, batch), from_memory(model, batch), rtol=1e-3)
    return calls(model, batch, model, better_loss=from_memory)


def prompts(base: nn.Module) -> dict[str, Callable[[], float]]:
    model, batch = adapted(base), batch_of(base)
    batch["labels"][:, :128] = -100
    return calls(model, batch, model, loss=own_loss)


def packed(base: nn.Module) -> dict[str, Callable[[], float]]:
    model, lengths = adapted(base), [length for row in LENGTHS for length in row]
    ids = torch.randint(0, base.config.vocab_size, (sum(lengths),))
    padded = {"input_ids": torch.zeros(len(lengths), max(lengths), dtype=torch.long)}
    padded["labels"] = torch.full_like(padded["input_ids"], -100)
    padded["attention_mask"] = torch.zeros_like(padded["input_ids"])
    for row, part in enumerate(ids.split(lengths)):
        for name, value in (("input_ids", part), ("labels", part), ("attention_mask", 1)):
            padded[name][row, : len(part)] = value
    positions = torch.cat([torch.arange(length) for length in lengths])  # which keep the examples of a row apart
    line = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
    line = {name: value.view(len(LENGTHS), -1) for name, value in line.items()}
    assert torch.allclose(causal_loss(model, padded), causal_loss(model, line), rtol=1e-2)
    return calls(model, padded, model, line)


GAINS = {"lowest": lowest, "cached": cached, "prompts": prompts, "packed": packed}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options_of(__doc__, layers=12, runs=5)
    parser.add_argument("--gain", nargs="+", choices=GAINS, default=list(GAINS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for dtype in options.dtype:
        torch.manual_seed(0)
        base = llama(options.layers, 256, options.tiny).to(DTYPES[dtype])
        for gain in options.gain:
            setting = {"gain": gain, "dtype": dtype, "layers": options.layers}
            cases.append(measure(GAINS[gain](base), floor="without", runs=options.runs, **setting))
            show("frozen", cases[-1])
    asked = (options.gain, options.dtype, options.layers, options.tiny)
    if options.out is None and asked != (list(GAINS), list(DTYPES), 12, False):
        return {"name": "frozen", "cases": cases}
    return write("frozen", {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
