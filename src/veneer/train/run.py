"""One training run from a configuration to an adapter folder.

    result = fit(TrainConfig(base="…", data="…", output="…"))
    result.adapter     the folder to merge, to serve, to load

The cheapest check is first: the output folder, the base's config, the data, the tokens, then the
weights. A run that was stopped or killed goes on from its newest complete checkpoint when it is
started again with the same configuration, and ends at the same losses, bit for bit, as one that was
not.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from veneer.attach.check import check
from veneer.attach.fresh_weights import fresh_parameters
from veneer.attach.summary import size
from veneer.attach.targets import Names, fresh_head, listed
from veneer.config import LoraConfig
from veneer.distributed import is_spread
from veneer.errors import AdapterError, ConfigError, OutputExistsError, TrainingError
from veneer.fileio.hashing import hash_json
from veneer.handle import attach, load
from veneer.kernels.draws import sample_seed
from veneer.models.load import Base
from veneer.models.remote_code import with_trust_of_config
from veneer.train import callbacks as watch
from veneer.train import checkpoint, sharding, vocabulary
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import say
from veneer.train.config import FREE_ON_RESUME, TrainConfig
from veneer.train.further import OWN, as_reference, load_to_train
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.plan import memory
from veneer.train.prepare import Prepared
from veneer.train.processes import Processes, join, must_divide, share
from veneer.train.start_data import start_data
from veneer.train.tasks import TASKS, Task
from veneer.train.tasks._base import LOADING
from veneer.train.tensor_parallel import split
from veneer.train.trainer import trainer_of

Found = tuple[Path, int] | None  # the checkpoint to go on from, and its step


@dataclass(frozen=True)
class Result:
    """What a run gave. `losses[i]` is the loss of step i + 1 (sft: nats a token) and `eval_losses`
    [(step, loss)], both from the first step on, whichever session computed them; `seconds` and
    `tokens` likewise. After an interruption `adapter` is the newest checkpoint's, and `interrupted`
    is true. `prompt` is one of the data's, a text or a chat, if the base continues texts."""

    adapter: Path
    output: Path
    losses: list[float]
    eval_losses: list[tuple[int, float]]
    steps: int
    seconds: float
    tokens: int
    metrics: dict[str, Any]
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    handle: Any = field(repr=False)
    interrupted: bool
    checkpoint: Path | None
    prompt: str | list[Any] | None = None


@with_trust_of_config
def fit(
    config: TrainConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
    quiet: bool = False,
    stop_order: Callable[[], bool] | None = None,
) -> Result:
    """Train an adapter as `config` says and save it to `config.output / "adapter"`.

    Args:
        callbacks: more `transformers.TrainerCallback`s.
        console: where to print; stderr by default. `quiet` prints nothing there.
        stop_order: asked after each step; once it says true, the run ends with a checkpoint, as
            after Ctrl-C.

    Raises:
        OutputExistsError: the output folder holds a finished run, or something that is no run, or
            another process writes its run there.
        ConfigError: an unfinished run there has another configuration; a base that cannot be
            loaded, or is no causal language model.
        DataError, TargetError, CheckError: as the parts say. OSError: the disk is full or not
            writable.
    """
    processes = join()
    processes.same_rows = config.parallel == "tp"
    console = (
        (console or Console(stderr=True, quiet=quiet)) if processes.first else Console(quiet=True)
    )
    output = config.output.expanduser()
    with checkpoint.only_writer(output, processes):
        return _fit(config, output, callbacks, console, stop_order, processes)


def _fit(
    config: TrainConfig, output: Path, callbacks: Sequence[TrainerCallback], console: Console,
    stop_order: Callable[[], bool] | None, processes: Processes,
) -> Result:  # fmt: skip
    """`fit`, while no other run writes to `output`."""
    task, ids, prepared, found, arguments = begin(config, output, console, processes)
    if (seen := arguments.n_gpu) > 1:
        arguments._n_gpu = 1  # transformers would copy the model to all in each step (`nn.DataParallel`): trl refuses
        if config.device_map is None:
            say(
                console,
                f"{seen} GPUs are visible; this run trains on {arguments.device}"
                f" (CUDA_VISIBLE_DEVICES chooses one; `torchrun --nproc-per-node {seen} -m"
                " veneer.cli train …` trains on all).",
            )
    set_seed(config.seed)
    way = config.parallel if processes.count > 1 else "ddp"
    read = partial(sharding.load, task, arguments.device, console) if way == "fsdp" else task.load
    base, handle, cached = processes.each(
        lambda: _model(task, read, prepared, ids, found), _size, "a model"
    )
    describe(task, base.model, handle, prepared, cached, console, processes)
    if config.check:
        processes.each(lambda: _check(task, base.model, prepared))
    if part := {"fsdp": partial(sharding.shard, size=config.shard_size), "tp": split}.get(way):
        processes.each(lambda: part(base.model, arguments.device))
    before = processes.one(lambda: _open(config, output, prepared, found))
    stop = watch.StopOnSignal(console, alone=processes.count == 1, order=stop_order)
    bar = watch.ProgressBar(console, found[1] if found else 0, task)
    early = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else []
    trainer = trainer_of(
        task, base.model, cached,
        args=arguments,
        train_dataset=prepared.train_set,
        eval_dataset=prepared.eval_set,
        processing_class=base.tokenizer,
        callbacks=[watch.LossLog(output, before, task), watch.StopOnNan(), stop, bar, *early, *callbacks],
        adapter=handle,
        base_name=config.base,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.processes, trainer.stop, trainer.group_by_length = (
        processes,
        stop,
        config.group_by_length,
    )
    if processes.share:
        # other rows, other dropout and answers; numpy's generator takes 32 bits
        set_seed(sample_seed(config.seed, processes.share) % 2**32)
    trainer._total_train_tokens = max((line.get("tokens", 0) for line in before), default=0)
    with _gone():
        processes.each(lambda: _train(trainer, task, found, prepared, stop, bar, output))
    stopped = stop.stopped and trainer.state.global_step < prepared.steps
    told = processes.one(lambda: _told(output, interrupted=stopped))
    result = _result(told, output, base, handle, interrupted=stopped)
    if not result.interrupted:
        return _finish(config, task, result, prepared, console, processes)
    processes.one(lambda: write_status(output, "interrupted", config, prepared))
    return result


def begin(
    config: TrainConfig, output: Path, console: Console, processes: Processes
) -> tuple[Task, tuple[int, ...], Prepared, Found, TrainingArguments]:
    """What is judged before any weights are read: the task with the share of this process in a
    step, the ids of the tokens that it trains, its data, the checkpoint to go on from if there is
    one, and the trainer's arguments. Writes nothing."""
    resume = processes.one(lambda: unfinished(config, output))
    task = processes.each(lambda: _task(config, processes))
    ids, prepared = processes.each(lambda: _data(task), _content, "data")
    found = (
        _place(processes.one(lambda: found_in(config, output, prepared, console)))
        if resume
        else None
    )
    return (
        task,
        ids,
        prepared,
        found,
        processes.each(lambda: arguments_of(task.config, output, prepared)),
    )


def _task(config: TrainConfig, processes: Processes) -> Task:
    """The task with the share of this process in a step."""
    kind, own = TASKS[config.task], {}
    config = share(config, processes.shares, compares_rows=kind.compares_rows)
    divided = config.parallel != "ddp" and processes.count > 1
    if divided:
        own = {"loading": {**{name: getattr(config, name) for name in LOADING}, "device": "cpu"}}
    task = kind(config, **own)
    if divided:
        must_divide(config, processes.count, task.refers())
    return task


def _data(task: Task) -> tuple[tuple[int, ...], Prepared]:
    task.read_data()
    ids, prepared = vocabulary.learn(task.config, task.open()), task.prepare()
    if task.further is not None:
        prepared = replace(prepared, hashes={**prepared.hashes, "adapter": task.further.hash})
    return ids, prepared


def _content(data: tuple[tuple[int, ...], Prepared]) -> str:
    return hash_json([data[0], data[1].steps, data[1].hashes])


def _place(found: list[Any] | Found) -> Found:
    return None if found is None else (Path(found[0]), found[1])


def _model(
    task: Task, read: Callable[[], Base], prepared: Prepared, ids: tuple[int, ...], found: Found
) -> tuple[Base, Any, Any]:
    base = read()._replace(tokenizer=task.processor)
    handle = attach_as(task, base.model, prepared, ids, found)
    return base, handle, HiddenStateCache(base.model) if task.config.cache_lower else None


def _size(loaded: tuple[Base, Any, Any]) -> str:
    summary = loaded[1].summary()
    return hash_json([summary.trainable, summary.total])


def _open(
    config: TrainConfig, output: Path, prepared: Prepared, found: Found
) -> list[dict[str, Any]]:
    """Make the output folder ready; what its log ends with."""
    # only now: a run that cannot begin leaves nothing behind
    if found is None and (output / checkpoint.RUN).exists():
        checkpoint.clear(output, checkpoint.ADAPTER, checkpoint.LOG, checkpoint.METRICS, "runs")
    output.mkdir(parents=True, exist_ok=True)
    write_status(output, "running", config, prepared)
    return checkpoint.cut_log(output, found[1] if found is not None else 0)[-2:]


def unfinished(config: TrainConfig, output: Path) -> bool:
    """Whether `output` holds a run to go on with; False for a fresh start. Raises where neither is
    right. `overwrite` gives leave to replace what cannot be resumed; a run that can be is resumed
    all the same."""
    if output.is_file():
        raise OutputExistsError(
            f"{output} is a file", "a folder for the run", "choose another output"
        )
    run = checkpoint.read_json(output / checkpoint.RUN)
    if run is None and checkpoint.is_taken(output):
        do = "choose another output; Veneer replaces nothing that it did not write"
        raise OutputExistsError(
            f"{output} is not empty and holds no Veneer run", "a new folder", do
        )
    if run is None or run["status"] == checkpoint.CLEARED:
        if config.resume:
            raise ConfigError(
                f"no run in {output}", "one to resume", "leave out --resume, or check the path"
            )
        return False
    if run["status"] == "finished" and config.overwrite:
        return False
    if run["status"] == "finished":
        do = "choose another output, or pass --overwrite to replace it"
        raise OutputExistsError(f"{output} holds a finished run", "a new folder", do)
    # an older run lacks newer settings
    old, new = (
        {**TrainConfig.defaults(), **run["config"]},
        config.content(),
    )
    changed = [
        name
        for name in {**old, **new}
        if name not in FREE_ON_RESUME and old.get(name) != new.get(name)
    ]
    if not changed and config.resume is not False:
        return True
    if config.overwrite or checkpoint.newest(output) is None:  # nothing would be lost
        return False
    lines = "".join(f"\n  {name}: was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)
    raise (ConfigError if changed else OutputExistsError)(
        f"Found: {output} holds an unfinished"
        f" run{' with another configuration' if changed else ''}.{lines}\nExpected: the same"
        " configuration, to resume it exactly, or a new folder. Do: undo the change, choose"
        " another output, or pass --overwrite to start over."
    )


def found_in(
    config: TrainConfig, output: Path, prepared: Prepared, console: Console
) -> tuple[str, int] | None:
    """The newest checkpoint of the run in `output`, which began with the same data, and its
    step."""
    if checkpoint.read_json(output / checkpoint.RUN)["data"] == prepared.hashes:
        if (newest := checkpoint.newest(output)) is None:
            return None
        say(console, f"Resuming from step {newest[1]} ({newest[0]}).")
        tell_versions(checkpoint.read_json(output / checkpoint.RUN), console)
        return str(newest[0]), newest[1]
    if config.overwrite:
        return None
    what = (
        "the data" if config.adapter is None else "the data, or the adapter that it trains further,"
    )
    problem = f"{what} have changed since the unfinished run in {output} began"
    do = "restore them, choose another output, or pass --overwrite to start over"
    raise ConfigError(problem, "the same bytes, to resume it exactly", do)


def write_status(output: Path, status: str, config: TrainConfig, prepared: Prepared) -> None:
    about = {
        "status": status,
        "config": config.content(),
        "data": prepared.hashes,
        "steps": prepared.steps,
    }
    checkpoint.write_json(output / checkpoint.RUN, {**about, "versions": versions()})


@functools.cache
def versions() -> dict[str, str]:
    named = {
        name: version(name) for name in ("veneer", "torch", "transformers", "trl", "accelerate")
    }
    return {**named, "python": platform.python_version()}


def tell_versions(run: Mapping[str, Any], console: Console) -> None:
    """Say which libraries a run goes on with, where they are not those that it began with."""
    before, now = run.get("versions", {}), versions()
    changed = [
        f"{name} {before[name]}, now {now[name]}"
        for name in now
        if before.get(name, now[name]) != now[name]
    ]
    if changed:
        say(
            console,
            f"Versions The run was made with {'; '.join(changed)}: its losses may differ from those"
            " of a run that",
        )
        say(
            console,
            "         was not interrupted. Install the versions of before to go on exactly.",
        )


def attach_as(
    task: Task, model: Any, prepared: Prepared, ids: tuple[int, ...], found: Found = None
) -> Any:
    """A new adapter, which trains the tokens ``ids`` too, that which is trained further, or that of
    the checkpoint."""
    config, tokens = task.config, vocabulary.grow(model, task.processor, ids, task.config.seed)
    if found is not None:
        return load(model, found[0] / checkpoint.ADAPTER, name=OWN, trainable=True)
    if task.further is not None:
        return load_to_train(model, task.further)
    torch.manual_seed(config.seed)
    return attach(
        model, lora_of(config, model, tokens), name=OWN, **start_data(task, prepared.train, model)
    )


def lora_of(config: TrainConfig, model: Any, tokens: Mapping[str, tuple[int, ...]]) -> LoraConfig:
    """What is attached. ``tokens``: ids to train, by the path of the embedding."""
    dtype = {"auto": None, "fp32": "float32", "bf16": "bfloat16"}[config.adapter_dtype]
    return LoraConfig(
        rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=config.targets, exclude=config.exclude,
        layers=config.layers, train_also=[*config.train_also, *_new_heads(model, config)], bias=config.bias,
        variant=config.variant, dtype=dtype, trainable_tokens=tokens,
    )  # fmt: skip


def _new_heads(model: Any, config: TrainConfig) -> list[str]:
    """The modules of a task's head that no checkpoint held: they train in full, as "all-linear"
    sees to by itself."""
    if "all-linear" in listed(config.targets):
        return []
    names = Names(model)
    return sorted(
        {path for path, _ in fresh_head(names, fresh_parameters(names).values())}
        - {*config.train_also}
    )


def describe(
    task: Task, model: Any, handle: Any, prepared: Prepared, cached: HiddenStateCache | None, console: Console,
    processes: Processes | None = None,
) -> None:  # fmt: skip
    processes = processes or Processes()
    config, train = task.config, prepared.train
    changed = {"dropped": train.dropped, "truncated": train.truncated}
    notes = "".join(f", {count:,} examples {what}" for what, count in changed.items() if count)
    kept = [
        str(model.dtype).removeprefix("torch."),
        *([f"linear layers in {config.quantize}"] if config.quantize else []),
    ]
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    kept += [f"on {', '.join(devices)}"] if len(devices) > 1 else []
    say(console, f"Base     {config.base} ({', '.join(kept)})")
    say(console, f"Data     {config.data}: {task.amount(train)}{notes}")
    if prepared.unused:
        say(console, f"         columns that are not used: {', '.join(prepared.unused)}")
    if prepared.evaluation is not None:
        say(console, f"         {len(prepared.evaluation):,} examples to evaluate on")
    own = config.batch_size * config.grad_accum
    split = f", {own} in each of {processes.count} processes" if processes.count > 1 else ""
    rows = f"packed rows, of at most {prepared.max_length} tokens" if config.packing else "examples"
    say(console, f"Steps    {prepared.steps:,} of {own * processes.shares} {rows}{split}")
    if config.parallel != "ddp" and processes.count == 1:
        say(
            console,
            f"         parallel {config.parallel} does nothing here: this is one process (torchrun"
            " starts several)",
        )
    if not console.quiet:  # a step is counted for it
        later = {
            "ddp": "",
            "fsdp": ", before the base is spread",
            "tp": ", before the base is cut",
        }[config.parallel]
        each = (
            f" in each{'' if is_spread(model.modules()) else later}" if processes.count > 1 else ""
        )
        say(console, f"Memory   {memory.estimate(model, config, *task.largest(prepared))}{each}")
    if cached is not None:
        tokens = sum(sum(part.lengths) for part in (train, prepared.evaluation) if part is not None)
        kept = size(tokens * model.get_input_embeddings().weight.shape[1] * model.dtype.itemsize)
        say(
            console,
            f"Lower    {len(cached.blocks)} of {cached.count} blocks run once for each row; {kept}"
            " are kept",
        )
    say(console, str(handle.summary()))


def _check(task: Task, model: Any, prepared: Prepared) -> None:
    """Every adapter must be reached and get a gradient: on a short example, with the random state
    put back."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        check(model, task.example(prepared, model.device))


def _train(
    trainer: Any, task: Task, found: Found, prepared: Prepared, stop: Any, bar: Any, output: Path
) -> None:
    if found is not None and found[1] >= prepared.steps:
        return  # killed between the last checkpoint and the end: nothing is left to train
    try:
        with stop, as_reference(trainer.model, task.further, task.refers()):
            trainer.train(resume_from_checkpoint=str(found[0]) if found is not None else None)
    except (
        ImportError
    ) as error:  # an optimiser or a tracker whose package is missing says so itself
        raise ConfigError(
            f"Found: {error}. Do: install the package, or choose another setting."
        ) from error
    except OSError as error:
        note = "There is no checkpoint yet; the same command starts over."
        if (last := checkpoint.newest(output)) is not None:
            note = (
                f"The newest complete checkpoint is {last[0]}; start the same command again to go"
                " on from it."
            )
        error.add_note(note)
        raise
    finally:
        bar.close()


@contextmanager
def _gone() -> Iterator[None]:
    """Around what processes do together, where it is known who failed first: of one that could say
    why, that is told; what is left comes of one that went without a word."""
    try:
        yield
    except (
        RuntimeError,
        AdapterError,
    ) as error:  # of several that were left, the first one's is on the others, too
        if "losed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        problem = "a process of this run that is gone, in the middle of a step"
        do = (
            "see what it printed, or what killed it (memory?); the same command goes on from the"
            " last checkpoint"
        )
        told = TrainingError(problem, "all of them", do)
        told.told_elsewhere = getattr(error, "told_elsewhere", False)
        raise told from error


def _told(output: Path, interrupted: bool) -> dict[str, Any]:
    """What the files of a run that ended say of it."""
    lines = checkpoint.read_log(output)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    tokens = max((line.get("tokens", 0) for line in lines), default=0)
    last, step = checkpoint.newest(output) or (None, 0)
    folder, steps = (last, step) if interrupted else (output, len(losses))
    if folder is None:
        raise RuntimeError(f"the run in {output} was stopped, yet wrote no checkpoint")
    return {
        "adapter": str(folder / checkpoint.ADAPTER), "losses": losses, "eval_losses": evaluations, "steps": steps,
        "seconds": lines[-1]["seconds"] if lines else 0.0, "tokens": tokens, "checkpoint": last and str(last),
    }  # fmt: skip


def _result(
    told: dict[str, Any], output: Path, base: Base, handle: Any, interrupted: bool
) -> Result:
    last = told["checkpoint"]
    paths = {
        "adapter": Path(told["adapter"]),
        "checkpoint": None if last is None else Path(last),
        "output": output,
    }
    evaluations = [(step, loss) for step, loss in told["eval_losses"]]
    return Result(
        **{**told, **paths, "eval_losses": evaluations}, metrics={}, model=base.model, tokenizer=base.tokenizer,
        handle=handle, interrupted=interrupted,
    )  # fmt: skip


def _finish(
    config: TrainConfig,
    task: Task,
    result: Result,
    prepared: Prepared,
    console: Console,
    processes: Processes,
) -> Result:
    """Write the adapter and metrics.json, then mark the run as finished: the last thing that is
    done."""
    metrics = processes.one(lambda: _metrics(config, task, result))
    provenance = provenance_of(config, task, prepared, result.model, metrics)

    def put() -> None:
        if result.handle.config.trainable_tokens:
            result.tokenizer.save_pretrained(result.adapter)
        checkpoint.write_json(result.output / checkpoint.METRICS, metrics)
        write_status(result.output, "finished", config, prepared)

    processes.each(
        lambda: result.handle.save(
            result.adapter, base_name=config.base, provenance=provenance, overwrite=True
        )
    )
    processes.one(put)
    result.model.eval()
    losses = result.losses
    ends = f"loss {losses[0]:.4f} → {losses[-1]:.4f}"
    ends += f", evaluation {metrics['eval_loss']:.4f}" if "eval_loss" in metrics else ""
    say(console, f"Done     {result.steps:,} steps in {watch.duration(result.seconds)}: {ends}")
    say(console, f"Adapter  {result.adapter}")
    return replace(result, metrics=metrics, prompt=prepared.prompt if task.continues() else None)


def provenance_of(
    config: TrainConfig, task: Task, prepared: Prepared, model: Any, metrics: dict[str, Any]
) -> dict[str, Any]:
    """What the adapter of a finished run says of how it was made."""
    return {
        "config": config.content(),
        "task": task.record(),
        "data": prepared.hashes,
        "base_dtype": str(model.dtype).removeprefix("torch."),
        "metrics": {
            name: metrics[name] for name in metrics if name not in ("seconds", "peak_memory_bytes")
        },
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _metrics(config: TrainConfig, task: Task, result: Result) -> dict[str, Any]:
    losses, summary = result.losses, result.handle.summary()
    metrics: dict[str, Any] = {
        "steps": result.steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    metrics |= {
        "seconds": result.seconds,
        "tokens": result.tokens,
        "trainable_parameters": summary.trainable,
    }
    metrics |= {"total_parameters": summary.total, "peak_memory_bytes": memory.peak()}
    if evaluations := [loss for _, loss in result.eval_losses]:
        metrics["eval_loss"] = min(evaluations) if config.early_stopping else evaluations[-1]
        lines = [
            line
            for line in checkpoint.read_log(result.output)
            if line.get("eval_loss") == metrics["eval_loss"]
        ]
        names = [f"eval_{name}" for name in task.measures]
        metrics |= {name: lines[-1][name] for name in names if name in lines[-1]}
    return metrics
