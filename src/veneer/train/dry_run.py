"""`veneer train --dry-run`: everything up to the first step, and nothing written.

The output folder, the data, the tokens and the targets are judged as a run judges them. The base is on the meta device,
where it has shapes and no weights, unless it is quantised or to be, gets more tokens or the head of another task than
language, or the variant starts from data: then it is loaded.
What only weights tell is left to the run: whether every adapter is reached, and whether the loss is a number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from veneer.models.load import best_device, meta_base
from veneer.models.locate import config_of
from veneer.train import vocabulary
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import duration, say
from veneer.train.config import TrainConfig
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.prepare import Prepared
from veneer.train.run import attach_as, describe, found_in, unfinished
from veneer.train.tasks import TASKS, Task
from veneer.train.tokens import IGNORED, Examples
from veneer.variants import VARIANTS

#: seconds for which the machine's products are timed
TIMED = 0.3
#: characters of the example that are shown
SHOWN = 2000


def dry_run(config: TrainConfig, *, console: Console | None = None) -> None:
    """Print what the run would do, how much memory and at least how much time it takes, and its first example.

    Raises: as ``fit`` does before its first step.
    """
    console = console or Console(stderr=True)
    output = config.output.expanduser()
    resume = unfinished(config, output)
    task = TASKS[config.task](config)
    ids = vocabulary.learn(config, task.open())
    prepared = task.prepare()
    found = found_in(config, output, prepared, console) if resume else None
    arguments_of(config, output, prepared)
    packed = config.quantize or getattr(config_of(config.base), "quantization_config", None) is not None
    shapes_do = not packed and not ids and not VARIANTS[config.variant].needs
    if shapes_do and task.auto == "AutoModelForCausalLM":
        model: Any = meta_base(config.base, precision=config.precision, device=config.device)
    else:
        model = task.load().model
    handle = attach_as(task, model, prepared, ids)
    cached = HiddenStateCache(model) if config.cache_lower else None
    describe(task, model, handle, prepared, cached, console)
    done = 0 if found is None else found[1]
    # an answer that is still to be drawn may be short, and half of the layers read what the other half writes to
    bounded = task.name != "grpo" and not getattr(model.config, "is_encoder_decoder", False)
    if bounded and any(prepared.train.lengths):
        say(console, f"Time     {_time(task, model, prepared, prepared.steps - done)}")
    _show(task, prepared, console)
    say(console, "Nothing was written. The same command without --dry-run starts the run.")


def _time(task: Task, model: Any, prepared: Prepared, steps: int) -> str:
    """A lower bound: the products of the base alone, forward and back through it, at the speed that this machine's have
    now. Backward ends at the lowest adapted block, which is not counted; nor is what else a step does."""
    config = task.config
    tokens = sum(prepared.train.lengths) / len(prepared.train) * config.batch_size * config.grad_accum
    embedding = model.get_input_embeddings()
    tables = {id(embedding.weight)} if embedding is not None else set()
    head = model.get_output_embeddings()
    weights = sum(
        parameter.numel() for parameter in model.parameters()
        if parameter.dim() > 1 and id(parameter) not in tables and not parameter.requires_grad
    )  # fmt: skip
    labelled = 0 if head is None else prepared.train.trained_tokens / max(sum(prepared.train.lengths), 1)
    if head is not None and id(head.weight) not in tables:
        weights -= head.weight.numel()
    of_head = 0 if head is None else head.weight.numel() * labelled
    passes = 3 if config.activation_checkpointing else 2
    operations = 2 * tokens * (passes * weights + 2 * of_head)
    device = config.device or best_device()
    speed = _speed(device, model.dtype, round(min(tokens, 1024)) or 1)
    least = duration(steps * operations / speed)
    return f"at least {least} (the base's products at the {speed / 1e9:,.0f} GFLOP/s of now)"


def _speed(device: str, dtype: torch.dtype, tokens: int) -> float:
    """Operations a second of a product [tokens, 1024] · [1024, 1024] on this device."""
    x, weight = (torch.randn(size, 1024, device=device, dtype=dtype) for size in (tokens, 1024))
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    torch.mm(x, weight)
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < TIMED:
        torch.mm(x, weight)
        wait()
        count += 1
    return count * 2 * tokens * 1024**2 / (time.perf_counter() - start)


def _show(task: Task, prepared: Prepared, console: Console) -> None:
    """The first example as the model sees it."""
    if isinstance(prepared.train, Examples):
        _show_tokens(prepared.train, task.processor, console)
        return
    row = prepared.train.rows[0]
    say(console, f"Example  row {prepared.train.index[0] + 1} of the data:")
    decode = getattr(task.processor, "decode", None)
    for name, value in row.items():
        tokens = name == "ids" or (name == "labels" and task.item == "token")
        if tokens and decode is not None and all(type(one) is int for one in value):
            shown = f"{len(value)} tokens │ {decode([one for one in value if one >= 0])}"
        else:
            shown = f"{type(value).__name__} {getattr(value, 'shape', value)}"
        say(console, f"  {name} │ {shown[:SHOWN]}")


def _show_tokens(examples: Examples, tokenizer: Any, console: Console) -> None:
    """Which of the first example's text is only read, and which is learnt."""
    ids, labels = examples.input_ids[0], examples.labels[0]
    say(console, f"Example  {len(ids)} tokens, row {examples.index[0] + 1} of the data:")
    left = SHOWN
    for learnt, part in _stretches(ids, labels):
        text = tokenizer.decode(part)
        shown = text if len(text) <= left else f"{text[:left]} …"
        left = max(0, left - len(text))
        for line in shown.split("\n"):
            say(console, f"  {'learnt' if learnt else 'read  '} │ {line}")
        if not left:
            return


def _stretches(ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """(whether they are learnt, token ids) of each stretch of an example. The first token is never predicted."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            yield labels[start] != IGNORED, ids[start:end]
            start = end
