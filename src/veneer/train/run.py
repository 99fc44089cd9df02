"""One training run from a configuration to an adapter folder.

    result = fit(TrainConfig(base="…", data="…", output="…"))
    result.adapter     the folder to merge, to serve, to load

The cheapest checks come first: the output folder, the base's config, the data, the tokens, then the
weights. A run that was stopped or killed resumes from its newest complete checkpoint when it is
started again with the same configuration. Its losses are bit for bit those of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
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

from veneer.attach import check
from veneer.errors import AdapterError, ConfigError, TrainingError
from veneer.fileio.hashing import hash_json
from veneer.kernels.draws import sample_seed
from veneer.models.load import Base
from veneer.models.remote_code import with_trust_of_config
from veneer.train import callbacks as watch
from veneer.train import checkpoint, sharding, vocabulary
from veneer.train.adapter_setup import attach_adapter, invoked_example
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import say
from veneer.train.config import TrainConfig
from veneer.train.further import as_reference
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.make_trainer import trainer_of
from veneer.train.plan import memory
from veneer.train.prepare import Prepared
from veneer.train.processes import Processes, join, must_divide, share
from veneer.train.run_record import (
    ResumePoint,
    can_resume,
    find_resume_point,
    open_output,
    provenance_of,
    read_results,
    write_status,
)
from veneer.train.run_summary import print_summary
from veneer.train.tasks import TASKS, Task
from veneer.train.tasks._base import LOADING
from veneer.train.tensor_parallel import split


@dataclass(frozen=True)
class Result:
    """The result of a run. `losses[i]` is the loss of step i + 1 (sft: nats per token) and
    `eval_losses` holds (step, loss) pairs; these, `seconds` and `tokens` cover the run from its
    first step, including sessions before a resume. After an interruption, `interrupted` is true and
    `adapter` is the folder in the newest checkpoint. `prompt` is a prompt from the data, a text or
    a chat, if the base generates text."""

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
        callbacks: additional `transformers.TrainerCallback`s.
        console: output of progress and notes; stderr by default.
        quiet: print nothing to the default console.
        stop_order: called after each step; once it returns True, the run ends with a checkpoint, as
            after Ctrl-C.

    Raises:
        OutputExistsError: the output folder holds a finished run or files that are not a run, or
            another process writes its run there.
        ConfigError: the unfinished run there has another configuration, or the base cannot be
            loaded or is not a causal language model.
        DataError: the data cannot be read or used.
        TargetError, CheckError: the adapter does not fit the base.
        OSError: the disk is full or not writable.
    """
    processes = join()
    processes.same_rows = config.parallel == "tp"
    console = (
        (console or Console(stderr=True, quiet=quiet)) if processes.first else Console(quiet=True)
    )
    output = config.output.expanduser()
    with checkpoint.only_writer(output, processes):
        return _fit_locked(config, output, callbacks, console, stop_order, processes)


def _fit_locked(
    config: TrainConfig,
    output: Path,
    callbacks: Sequence[TrainerCallback],
    console: Console,
    stop_order: Callable[[], bool] | None,
    processes: Processes,
) -> Result:
    """`fit`, while no other run can write to `output`."""
    task, ids, prepared, resume_point, arguments = prepare_run(config, output, console, processes)
    _use_one_gpu(config, arguments, console)
    set_seed(config.seed)
    parallel = config.parallel if processes.count > 1 else "ddp"
    load_base = task.load
    if parallel == "fsdp":
        load_base = partial(sharding.load, task, arguments.device, console)
    base, handle, cached = processes.run_on_all(
        lambda: load_model(task, load_base, prepared, ids, resume_point),
        _hash_parameter_counts,
        "a model",
    )
    print_summary(task, base.model, handle, prepared, cached, console, processes)
    if config.check:
        processes.run_on_all(lambda: _check_gradients(task, base.model, prepared, handle))
    _divide_base(config, parallel, base.model, arguments.device, processes)
    before = processes.run_on_first(lambda: open_output(config, output, prepared, resume_point))
    stop = watch.StopOnSignal(console, alone=processes.count == 1, order=stop_order)
    bar = watch.ProgressBar(console, resume_point[1] if resume_point else 0, task)
    early = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else []
    log = watch.LossLog(output, before, task)
    trainer = trainer_of(
        task,
        base.model,
        cached,
        args=arguments,
        train_dataset=prepared.train_set,
        eval_dataset=prepared.eval_set,
        processing_class=base.tokenizer,
        callbacks=[log, watch.StopOnNan(), stop, bar, *early, *callbacks],
        adapter=handle,
        base_name=config.base,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.processes, trainer.stop = processes, stop
    trainer.group_by_length = config.group_by_length
    if processes.share:
        # each share of the rows needs its own dropout and answers; numpy's seeds have 32 bits
        set_seed(sample_seed(config.seed, processes.share) % 2**32)
    trainer._total_train_tokens = max((line.get("tokens", 0) for line in before), default=0)
    with _replace_connection_errors():
        processes.run_on_all(
            lambda: _run_trainer(trainer, task, resume_point, prepared, stop, bar, output)
        )
    stopped = stop.stopped and trainer.state.global_step < prepared.steps
    results = processes.run_on_first(lambda: read_results(output, interrupted=stopped))
    result = _build_result(results, output, base, handle, interrupted=stopped)
    if not result.interrupted:
        return _finish(config, task, result, prepared, console, processes)
    processes.run_on_first(lambda: write_status(output, "interrupted", config, prepared))
    return result


def _divide_base(
    config: TrainConfig, parallel: str, model: Any, device: torch.device, processes: Processes
) -> None:
    """Shard (fsdp) or cut (tp) the base over the processes."""
    dividers = {"fsdp": partial(sharding.shard, size=config.shard_size), "tp": split}
    if divide := dividers.get(parallel):
        processes.run_on_all(lambda: divide(model, device))


def _use_one_gpu(config: TrainConfig, arguments: TrainingArguments, console: Console) -> None:
    """Train on one of several visible GPUs, and print how to use all of them. transformers would
    otherwise copy the model to all of them in each step (`nn.DataParallel`), which trl refuses."""
    if (visible := arguments.n_gpu) <= 1:
        return
    arguments._n_gpu = 1
    if config.device_map is None:
        say(
            console,
            f"{visible} GPUs are visible; this run trains on {arguments.device}"
            f" (CUDA_VISIBLE_DEVICES chooses one; `torchrun --nproc-per-node {visible} -m"
            " veneer.cli train …` trains on all).",
        )


def prepare_run(
    config: TrainConfig, output: Path, console: Console, processes: Processes
) -> tuple[Task, tuple[int, ...], Prepared, ResumePoint, TrainingArguments]:
    """Check and prepare everything that needs no weights: the task with this process's share of a
    step, the ids of the tokens to train, the data, the checkpoint to resume from (or None), and the
    trainer's arguments. Writes nothing."""
    resume = processes.run_on_first(lambda: can_resume(config, output))
    task = processes.run_on_all(lambda: _make_task(config, processes))
    ids, prepared = processes.run_on_all(lambda: prepare_data(task), _hash_data, "data")
    resume_point = (
        _as_resume_point(
            processes.run_on_first(lambda: find_resume_point(config, output, prepared, console))
        )
        if resume
        else None
    )
    return (
        task,
        ids,
        prepared,
        resume_point,
        processes.run_on_all(lambda: arguments_of(task.config, output, prepared)),
    )


def _make_task(config: TrainConfig, processes: Processes) -> Task:
    """The task, with this process's share of the examples of a step."""
    kind, options = TASKS[config.task], {}
    config = share(config, processes.shares, compares_rows=kind.compares_rows)
    divided = config.parallel != "ddp" and processes.count > 1
    if divided:
        loading = {name: getattr(config, name) for name in LOADING}
        options = {"loading": {**loading, "device": "cpu"}}
    task = kind(config, **options)
    if divided:
        must_divide(config, processes.count, task.needs_reference())
    return task


def prepare_data(task: Task) -> tuple[tuple[int, ...], Prepared]:
    """(ids of the tokens to train, data of the run)."""
    task.read_data()
    ids, prepared = vocabulary.learn(task.config, task.open()), task.prepare()
    if task.further is not None:
        prepared = replace(prepared, hashes={**prepared.hashes, "adapter": task.further.hash})
    return ids, prepared


def _hash_data(data: tuple[tuple[int, ...], Prepared]) -> str:
    return hash_json([data[0], data[1].steps, data[1].hashes])


def _as_resume_point(pair: list[Any] | tuple[str, int] | None) -> ResumePoint:
    return None if pair is None else (Path(pair[0]), pair[1])


def load_model(
    task: Task,
    read: Callable[[], Base],
    prepared: Prepared,
    ids: tuple[int, ...],
    resume_point: ResumePoint,
) -> tuple[Base, Any, Any]:
    base = read()._replace(tokenizer=task.processor)
    handle = attach_adapter(task, base.model, prepared, ids, resume_point)
    return base, handle, HiddenStateCache(base.model) if task.config.cache_lower else None


def _hash_parameter_counts(loaded: tuple[Base, Any, Any]) -> str:
    summary = loaded[1].summary()
    return hash_json([summary.trainable, summary.total])


def _check_gradients(task: Task, model: Any, prepared: Prepared, handle: Any) -> None:
    """Check on a short example that the forward reaches every adapted layer and that each gets a
    gradient. Restores the random state."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        check(model, invoked_example(handle, task.example(prepared, model.device)))


def _run_trainer(
    trainer: Any,
    task: Task,
    resume_point: ResumePoint,
    prepared: Prepared,
    stop: Any,
    bar: Any,
    output: Path,
) -> None:
    """Train from the resume point to the last step, and explain errors of missing packages and of
    the disk."""
    if resume_point is not None and resume_point[1] >= prepared.steps:
        return  # the run was killed between its last checkpoint and its end
    try:
        with stop, as_reference(trainer.model, task.further, task.needs_reference()):
            trainer.train(
                resume_from_checkpoint=str(resume_point[0]) if resume_point is not None else None
            )
    except ImportError as error:  # the message names the missing package of an optimiser or tracker
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
def _replace_connection_errors() -> Iterator[None]:
    """A block whose connection errors become a `TrainingError` with advice. A process that fails
    with an error reports it to the others; a lost connection means that one died silently."""
    try:
        yield
    # all surviving processes raise the error of the first one that lost its connection
    except (RuntimeError, AdapterError) as error:
        if "losed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        problem = "a process of this run that is gone, in the middle of a step"
        do = (
            "see what it printed, or what killed it (memory?); the same command goes on from the"
            " last checkpoint"
        )
        lost = TrainingError(problem, "all of them", do)
        lost.reported_elsewhere = getattr(error, "reported_elsewhere", False)
        raise lost from error


def _build_result(
    results: dict[str, Any], output: Path, base: Base, handle: Any, interrupted: bool
) -> Result:
    last = results["checkpoint"]
    paths = {
        "adapter": Path(results["adapter"]),
        "checkpoint": None if last is None else Path(last),
        "output": output,
    }
    evaluations = [(step, loss) for step, loss in results["eval_losses"]]
    return Result(
        **{**results, **paths, "eval_losses": evaluations},
        metrics={},
        model=base.model,
        tokenizer=base.tokenizer,
        handle=handle,
        interrupted=interrupted,
    )


def _finish(
    config: TrainConfig,
    task: Task,
    result: Result,
    prepared: Prepared,
    console: Console,
    processes: Processes,
) -> Result:
    """Write the adapter and metrics.json, then mark the run as finished; this write is the last."""
    metrics = processes.run_on_first(lambda: _collect_metrics(config, task, result))
    provenance = provenance_of(config, task, prepared, result.model, metrics)

    def write_files() -> None:
        if result.handle.config.trainable_tokens:
            result.tokenizer.save_pretrained(result.adapter)
        checkpoint.write_json(result.output / checkpoint.METRICS, metrics)
        write_status(result.output, "finished", config, prepared)

    processes.run_on_all(
        lambda: result.handle.save(
            result.adapter, base_name=config.base, provenance=provenance, overwrite=True
        )
    )
    processes.run_on_first(write_files)
    result.model.eval()
    losses = result.losses
    change = f"loss {losses[0]:.4f} → {losses[-1]:.4f}"
    change += f", evaluation {metrics['eval_loss']:.4f}" if "eval_loss" in metrics else ""
    say(console, f"Done     {result.steps:,} steps in {watch.duration(result.seconds)}: {change}")
    say(console, f"Adapter  {result.adapter}")
    return replace(
        result, metrics=metrics, prompt=prepared.prompt if task.generates_text() else None
    )


def _collect_metrics(config: TrainConfig, task: Task, result: Result) -> dict[str, Any]:
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
    metrics |= {"total_parameters": summary.total, "peak_memory_bytes": memory.peak_memory()}
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
