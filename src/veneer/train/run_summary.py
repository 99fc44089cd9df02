"""The summary that a run prints before its first step: base, data, steps, memory, adapter."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from veneer.distributed import is_spread
from veneer.errors import format_bytes
from veneer.train.callbacks import say
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.plan import memory
from veneer.train.prepare import Prepared
from veneer.train.processes import Processes
from veneer.train.tasks import Task


def print_summary(
    task: Task,
    model: Any,
    handle: Any,
    prepared: Prepared,
    hidden_state_cache: HiddenStateCache | None,
    console: Console,
    processes: Processes,
) -> None:
    """Print the base, the data, the steps, the estimated memory, the blocks whose output is cached
    (if `hidden_state_cache` is not None) and the adapter. ``handle``: the adapter's `Handle`."""
    config, train_rows = task.config, prepared.train
    count_by_change = {"dropped": train_rows.dropped, "truncated": train_rows.truncated}
    length_note = "".join(
        f", {count:,} examples {change}" for change, count in count_by_change.items() if count
    )
    storage_notes = [str(model.dtype).removeprefix("torch.")]
    storage_notes += [f"linear layers in {config.quantize}"] if config.quantize else []
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    storage_notes += [f"on {', '.join(devices)}"] if len(devices) > 1 else []
    say(console, f"Base     {config.base} ({', '.join(storage_notes)})")
    say(console, f"Data     {config.data}: {task.describe_size(train_rows)}{length_note}")
    if prepared.unused:
        say(console, f"         columns that are not used: {', '.join(prepared.unused)}")
    if prepared.evaluation is not None:
        say(console, f"         {len(prepared.evaluation):,} examples to evaluate on")
    local_rows = config.batch_size * config.grad_accum
    process_note = (
        f", {local_rows} in each of {processes.count} processes" if processes.count > 1 else ""
    )
    row_noun = (
        f"packed rows, of at most {prepared.max_length} tokens" if config.packing else "examples"
    )
    step_rows = local_rows * processes.share_count
    say(console, f"Steps    {prepared.steps:,} of {step_rows} {row_noun}{process_note}")
    if config.parallel != "ddp" and processes.count == 1:
        say(
            console,
            f"         parallel {config.parallel} does nothing here: this is one process (torchrun"
            " starts several)",
        )
    if not console.quiet:  # the estimate takes a while: it counts a step on the meta device
        _print_memory(task, model, prepared, console, processes)
    if hidden_state_cache is not None:
        row_sets = (
            [train_rows] if prepared.evaluation is None else [train_rows, prepared.evaluation]
        )
        token_count = sum(sum(dataset_rows.lengths) for dataset_rows in row_sets)
        hidden_size = model.get_input_embeddings().weight.shape[1]
        cache_size = format_bytes(token_count * hidden_size * model.dtype.itemsize)
        say(
            console,
            f"Lower    {len(hidden_state_cache.blocks)} of {hidden_state_cache.block_count} blocks"
            f" run once for each row; {cache_size} are kept",
        )
    say(console, str(handle.summary()))


def _print_memory(
    task: Task, model: Any, prepared: Prepared, console: Console, processes: Processes
) -> None:
    """Print the estimated memory of a step. With several processes, also print that it is the
    memory of each. If the base will be divided among them only later, also print that the estimate
    is for the undivided base."""
    division_note = {
        "ddp": "",
        "fsdp": ", before the base is spread",
        "tp": ", before the base is cut",
    }[task.config.parallel]
    process_note = "" if is_spread(model.modules()) else division_note
    process_note = f" in each{process_note}" if processes.count > 1 else ""
    estimate = memory.estimate(model, task.config, *task.largest_batch(prepared))
    say(console, f"Memory   {estimate}{process_note}")
