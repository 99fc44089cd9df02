"""`veneer train --dry-run`: everything up to the first step, without writing any file.

The output folder, the data, the tokens and the targets are checked as in a run. The base is on the
meta device, with shapes and without weights. It is loaded with its weights only if it is or will be
quantised, if tokens are trained, if the task's model does not generate text, if the variant starts
from data or from unquantised weights (`Variant.needs`), or if an adapter is trained further. Some
properties need the weights and are not checked: whether the base is causal and keeps packed
examples apart, whether the forward reaches every adapter, and whether the loss is finite.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console

from veneer.models.load import best_device, meta_base
from veneer.models.locate import config_of
from veneer.models.remote_code import with_trust_of_config
from veneer.train.adapter_setup import attach_adapter
from veneer.train.callbacks import format_duration, say
from veneer.train.config import TrainConfig
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.prepare import Prepared
from veneer.train.processes import Processes
from veneer.train.run import prepare_run
from veneer.train.run_summary import print_summary
from veneer.train.tasks import Task
from veneer.variants import VARIANTS

#: duration in seconds of the measurement of the machine's speed
TIMED_SECONDS = 0.3
#: maximal number of characters that are shown of each segment of the example
MAX_SHOWN_CHARACTERS = 1000


@with_trust_of_config
def dry_run(config: TrainConfig, *, console: Console | None = None) -> None:
    """Print the summary of the run, its estimated memory, a lower bound of its time, and its first
    example, to `console` (by default stderr).

    Raises:
        VeneerError: the errors that ``fit`` raises before its first step.
    """
    console = console or Console(stderr=True)
    output = config.output.expanduser()
    task, trained_token_ids, prepared, resume_point, _ = prepare_run(
        config, output, console, Processes()
    )
    is_quantised = (
        config.quantize or getattr(config_of(config.base), "quantization_config", None) is not None
    )
    needs_only_shapes = (
        not is_quantised
        and not trained_token_ids
        and not VARIANTS[config.variant].needs
        and config.adapter is None
    )
    if needs_only_shapes and task.generates_text():
        model: Any = meta_base(config.base, precision=config.precision, device=config.device)
    else:
        model = task.load().model
    handle = attach_adapter(task, model, prepared, trained_token_ids)
    hidden_state_cache = HiddenStateCache(model) if config.cache_lower else None
    print_summary(task, model, handle, prepared, hidden_state_cache, console, Processes())
    completed_steps = 0 if resume_point is None else resume_point[1]
    # There is no lower bound for grpo, whose answers may be short, nor for encoder-decoder models,
    # whose encoder and decoder read different tokens: it is unknown how many tokens a weight
    # multiplies.
    has_time_bound = task.name != "grpo" and not getattr(model.config, "is_encoder_decoder", False)
    if has_time_bound and any(prepared.train.lengths):
        say(
            console,
            f"Time     {_describe_time(task, model, prepared, prepared.steps - completed_steps)}",
        )
    _print_example(task, prepared, console)
    say(console, "Nothing was written. The same command without --dry-run starts the run.")


def _describe_time(task: Task, model: Any, prepared: Prepared, steps: int) -> str:
    """A lower bound of the time of ``steps`` steps, in words: the time of the base's matrix
    products in forward and backward, at this machine's current speed. All other operations of a
    step are left out. Backward stops at the first parameter that trains, so the weights before it
    count for the forward only."""
    config = task.config
    tokens_per_step = (
        sum(prepared.train.lengths) / len(prepared.train) * config.batch_size * config.grad_accum
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    excluded_weight_ids = {id(module.weight) for module in (embedding, head) if module is not None}
    experts_of_token = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    # the number of frozen weights that multiply a token, before and after the first parameter that
    # trains, in the order of the model's parameters
    weights_below, weights_above = 0.0, 0.0
    is_above = False
    for parameter in model.parameters():
        is_above = is_above or parameter.requires_grad
        if parameter.dim() < 2 or parameter.requires_grad or id(parameter) in excluded_weight_ids:
            continue
        used_share = 1.0
        if parameter.dim() == 3 and experts_of_token:  # experts, of which a token uses a few
            used_share = min(1.0, experts_of_token / len(parameter))
        weights_above += used_share * parameter.numel() * is_above
        weights_below += used_share * parameter.numel() * (not is_above)
    labelled_share = (
        0 if head is None else prepared.train.head_token_count / max(sum(prepared.train.lengths), 1)
    )
    head_weight_count = 0 if head is None else head.weight.numel() * labelled_share
    pass_count = 3 if config.activation_checkpointing else 2
    weights_below = 0 if config.cache_lower else weights_below
    operation_count = (
        2 * tokens_per_step * (pass_count * weights_above + weights_below + 2 * head_weight_count)
    )
    device = config.device or best_device()
    speed = _measure_speed(device, model.dtype, round(min(tokens_per_step, 1024)) or 1)
    least_time_text = format_duration(steps * operation_count / speed)
    return (
        f"at least {least_time_text} (the base's products at the {speed / 1e9:,.0f} GFLOP/s of now)"
    )


def _measure_speed(device: str, dtype: torch.dtype, tokens: int) -> float:
    """Measure the floating-point operations per second of the matrix product [tokens, 1024] ·
    [1024, 1024] on `device`, for `TIMED_SECONDS`."""
    x, weight = (
        torch.randn(row_count, 1024, device=device, dtype=dtype) for row_count in (tokens, 1024)
    )
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    torch.mm(x, weight)
    synchronize()
    start_time, product_count = time.perf_counter(), 0
    while time.perf_counter() - start_time < TIMED_SECONDS:
        torch.mm(x, weight)
        synchronize()
        product_count += 1
    return product_count * 2 * tokens * 1024**2 / (time.perf_counter() - start_time)


def _print_example(task: Task, prepared: Prepared, console: Console) -> None:
    """Print the segments of the first example, such as its prompt and its answer. Each line begins
    with "learnt" if the model learns to write the segment, or with "read" if it only reads it."""
    segments = task.segments(prepared.train[0])
    name_width = max(len(segment.name) for segment in segments)
    say(console, f"Example  row {prepared.train.record_indices[0] + 1} of the data:")
    for is_trained, name, text in segments:
        line_prefix = f"{'learnt' if is_trained else 'read':<6}" + (
            f" {name:<{name_width}}" if name_width else ""
        )
        shown_text = (
            text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]} …"
        )
        for line in shown_text.split("\n"):
            say(console, f"  {line_prefix} │ {line}")
