"""One training run from a configuration to an adapter folder.

    result = fit(TrainConfig(base="…", data="…", output="…"))
    result.adapter     the adapter folder, which can be merged, served or loaded

The cheapest checks come first, so that mistakes show early: the output folder, the base's config,
the data, the tokens, then the weights. A run that was stopped or killed resumes from its newest
complete checkpoint when it is started again with the same configuration. Its losses are then bit
for bit those of an uninterrupted run.
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
    TrainerState,
    TrainingArguments,
    set_seed,
)

from veneer.attach import check
from veneer.errors import AdapterError, ConfigError, TrainingError
from veneer.fileio.hashing import hash_json
from veneer.kernels.draws import sample_seed
from veneer.models.load import Base
from veneer.models.remote_code import trust_remote_code
from veneer.train import checkpoint, sharding, vocabulary
from veneer.train.adapter_setup import attach_adapter, invoked_example
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import (
    LossLog,
    ProgressBar,
    StopOnNan,
    StopOnSignal,
    format_duration,
    say,
)
from veneer.train.config import TrainConfig
from veneer.train.further import as_reference, must_lie_outside
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.plan import memory
from veneer.train.prepare import Prepared
from veneer.train.processes import Processes, check_divided_settings, join, share_config
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
from veneer.train.tasks._base import LOAD_OPTIONS
from veneer.train.tensor_parallel import cut_model
from veneer.train.trainer import TaskTrainer


@dataclass(frozen=True)
class Result:
    """The result of a run. Losses, steps, seconds and tokens include those before a resume.

    Fields:
        adapter: the adapter folder; after an interruption, the one in the newest checkpoint.
        output: the output folder of the run.
        losses: the loss of each step (sft: nats per token).
        eval_losses: (step, loss) of each evaluation.
        tokens: number of tokens that the steps computed, without padding.
        metrics: the content of metrics.json; empty after an interruption.
        model, tokenizer, handle: the base with the adapter attached, its processor, and the
            `Handle` of the adapter.
        interrupted: whether the run was stopped before its last step.
        checkpoint: the newest checkpoint folder, or None.
        prompt: a prompt from the data, a text or a chat; None if the base generates no text.
    """

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


def fit(
    config: TrainConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
    quiet: bool = False,
    stop_order: Callable[[], bool] | None = None,
) -> Result:
    """Train an adapter as `config` says and save it to `config.output / "adapter"`. An unfinished
    run with the same configuration in `config.output` is resumed.

    Args:
        callbacks: `transformers.TrainerCallback`s to call in addition.
        console: where progress and notes are printed; stderr by default.
        quiet: print nothing to the default console.
        stop_order: called after each step; once it returns True, the run ends with a checkpoint, as
            after Ctrl-C.

    Raises:
        OutputExistsError: the output folder holds a finished run or other files, or
            another process writes its run there.
        ConfigError: the unfinished run there has another configuration, or the base cannot be
            loaded or is not a causal language model.
        DataError: the data cannot be read or used.
        TargetError, CheckError: the adapter does not fit the base.
        TrainingError: a loss is not finite, or another process of the run is gone.
        OSError: the disk is full or not writable.
    """
    processes = join()
    processes.parallel = config.parallel
    console = (
        (console or Console(stderr=True, quiet=quiet))
        if processes.is_first
        else Console(quiet=True)
    )
    output = config.output.expanduser()
    remote_code_trust = trust_remote_code(config.base, config.trust_remote_code)
    with remote_code_trust, checkpoint.only_writer(output, processes):
        return _fit_locked(config, output, callbacks, console, stop_order, processes)


def _fit_locked(
    config: TrainConfig,
    output: Path,
    callbacks: Sequence[TrainerCallback],
    console: Console,
    stop_order: Callable[[], bool] | None,
    processes: Processes,
) -> Result:
    """Do the work of `fit`. The caller holds the lock of the folder `output`, so that no other run
    writes there."""
    run_inputs = prepare_run(config, output, console, processes)
    task, token_ids, prepared, resume_point, arguments = run_inputs
    _use_one_gpu(config, arguments, console)
    set_seed(config.seed)
    parallel = config.parallel if processes.count > 1 else "ddp"
    load_base = task.load
    if parallel == "fsdp":
        load_base = partial(sharding.load, task, arguments.device, console)
    with processes.joint_work("a model") as compare:
        base, handle, hidden_state_cache = load_model(
            task, load_base, prepared, token_ids, resume_point
        )
        compare(_hash_parameter_counts, handle)
    print_summary(task, base.model, handle, prepared, hidden_state_cache, console, processes)
    if config.check:
        with processes.joint_work():
            _check_gradients(task, base.model, prepared, handle)
    _divide_base(config, parallel, base.model, arguments.device, processes)
    log_lines = processes.run_on_first(lambda: open_output(config, output, prepared, resume_point))
    stopper = StopOnSignal(console, single_process=processes.count == 1, stop_order=stop_order)
    progress_bar = ProgressBar(console, resume_point[1] if resume_point else 0, task)
    early_stopping = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else []
    loss_log = LossLog(output, log_lines, task)
    trainer = make_trainer(
        task,
        base.model,
        hidden_state_cache,
        args=arguments,
        train_dataset=prepared.train_set,
        eval_dataset=prepared.eval_set,
        processing_class=base.tokenizer,
        callbacks=[loss_log, StopOnNan(), stopper, progress_bar, *early_stopping, *callbacks],
        adapter=handle,
        base_name=config.base,
    )
    trainer.processes, trainer.stop = processes, stopper
    if processes.share_index:
        # processes with different rows need different dropout masks and sampled answers; the seed
        # is reduced because numpy accepts at most 32 bits
        set_seed(sample_seed(config.seed, processes.share_index) % 2**32)
    trainer._total_train_tokens = max((line.get("tokens", 0) for line in log_lines), default=0)
    with _replace_connection_errors(), processes.joint_work():
        _run_trainer(trainer, task, resume_point, prepared, stopper, progress_bar, output)
    is_interrupted = stopper.stopped and trainer.state.global_step < prepared.steps
    results = processes.run_on_first(lambda: read_results(output, interrupted=is_interrupted))
    result = _build_result(results, output, base, handle, interrupted=is_interrupted)
    if not result.interrupted:
        return _finish_run(config, task, result, prepared, console, processes)
    processes.run_on_first(lambda: write_status(output, "interrupted", config, prepared))
    return result


def _divide_base(
    config: TrainConfig, parallel: str, model: Any, device: torch.device, processes: Processes
) -> None:
    """Divide the base over the processes as `parallel` says: "fsdp" shards it, "tp" cuts its
    matrices, "ddp" leaves it undivided."""
    divide_functions = {
        "fsdp": partial(sharding.shard, shard_size=config.shard_size),
        "tp": cut_model,
    }
    if divide := divide_functions.get(parallel):
        with processes.joint_work():
            divide(model, device)


def _use_one_gpu(config: TrainConfig, arguments: TrainingArguments, console: Console) -> None:
    """If several GPUs are visible to this process, make the trainer use one. transformers would
    otherwise copy the model to all of them in each step (`nn.DataParallel`), and trl raises an
    error for that. Also print how to train on all GPUs, unless `device_map` already uses them."""
    if (gpu_count := arguments.n_gpu) <= 1:
        return
    arguments._n_gpu = 1
    if config.device_map is None:
        say(
            console,
            f"{gpu_count} GPUs are visible; this run trains on {arguments.device}"
            f" (CUDA_VISIBLE_DEVICES chooses one; `torchrun --nproc-per-node {gpu_count} -m"
            " veneer.cli train …` trains on all).",
        )


def prepare_run(
    config: TrainConfig, output: Path, console: Console, processes: Processes
) -> tuple[Task, tuple[int, ...], Prepared, ResumePoint, TrainingArguments]:
    """Check and prepare everything that needs no weights. Writes nothing.

    Returns:
        (the task, whose configuration has this process's share of a step's examples; ids of the
        tokens to train; the data; the checkpoint to resume from, or None; the trainer's arguments).
    """
    should_resume = processes.run_on_first(lambda: can_resume(config, output))
    with processes.joint_work():
        task = _make_task(config, processes)
        must_lie_outside(task.initial_adapter, output)
    with processes.joint_work("data") as compare:
        token_ids, prepared = prepare_data(task)
        compare(_hash_data, token_ids, prepared)
    newest_checkpoint = (
        processes.run_on_first(lambda: find_resume_point(config, output, prepared, console))
        if should_resume
        else None
    )
    # the first process sends (folder, step) as JSON to the others, which makes the pair a list
    resume_point = (
        None if newest_checkpoint is None else (Path(newest_checkpoint[0]), newest_checkpoint[1])
    )
    with processes.joint_work():
        arguments = arguments_of(task.config, output, prepared)
    return task, token_ids, prepared, resume_point, arguments


def _make_task(config: TrainConfig, processes: Processes) -> Task:
    """Create the task. Its configuration has this process's share of the examples of a step. If the
    base will be divided over processes, the task's load options name the CPU."""
    task_class, task_options = TASKS[config.task], {}
    config = share_config(config, processes.share_count, compares_rows=task_class.compares_rows)
    is_divided = config.parallel != "ddp" and processes.count > 1
    if is_divided:
        load_options = {name: getattr(config, name) for name in LOAD_OPTIONS}
        task_options = {"load_options": {**load_options, "device": "cpu"}}
    task = task_class(config, **task_options)
    if is_divided:
        initial_adapter = task.initial_adapter
        check_divided_settings(
            config,
            processes.count,
            task.needs_reference(),
            () if initial_adapter is None else initial_adapter.invocation_tokens,
        )
    return task


def prepare_data(task: Task) -> tuple[tuple[int, ...], Prepared]:
    """Read and encode the data of a run, and add the run's new tokens to the tokenizer. Returns
    (ids of the tokens to train, the data)."""
    task.read_data()
    token_ids, prepared = vocabulary.add_tokens(task.config, task.open_base()), task.prepare()
    if task.initial_adapter is not None:
        prepared = replace(
            prepared, hashes={**prepared.hashes, "adapter": task.initial_adapter.hash}
        )
    return token_ids, prepared


def _hash_data(token_ids: tuple[int, ...], prepared: Prepared) -> str:
    return hash_json([token_ids, prepared.steps, prepared.hashes])


def load_model(
    task: Task,
    load_base: Callable[[], Base],
    prepared: Prepared,
    token_ids: tuple[int, ...],
    resume_point: ResumePoint,
) -> tuple[Base, Any, Any]:
    """Load the base and attach the adapter, that of the checkpoint `resume_point` if there is one.
    ``token_ids``: ids of the tokens to train. Returns (base, handle of the adapter, cache of the
    hidden states after the frozen lower blocks, or None without `cache_lower`)."""
    base = load_base()._replace(tokenizer=task.processor)
    handle = attach_adapter(task, base.model, prepared, token_ids, resume_point)
    return base, handle, HiddenStateCache(base.model) if task.config.cache_lower else None


def make_trainer(
    task: Task, model: Any, hidden_state_cache: HiddenStateCache | None, **options: Any
) -> Any:
    """The trainer of a task: for sft `AdapterTrainer`, which supports packing and offloading, and
    else `TaskTrainer`. It prints no logs. ``options``: further keyword arguments of the trainer."""
    if task.name == "sft":  # imported only here, because trl takes half a second to import
        from veneer.train.sft_trainer import AdapterTrainer

        trainer: Any = AdapterTrainer(model, hidden_state_cache=hidden_state_cache, **options)
    else:
        trainer = TaskTrainer(model, task=task, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.group_by_length = task.config.group_by_length
    return trainer


def _hash_parameter_counts(handle: Any) -> str:
    summary = handle.summary()
    return hash_json([summary.trainable, summary.total])


def _check_gradients(task: Task, model: Any, prepared: Prepared, handle: Any) -> None:
    """Check on a short example that the forward reaches every adapted layer and that each gets a
    gradient; raises `CheckError` otherwise. Restores the random state."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        check(model, invoked_example(handle, task.example(prepared, model.device)))


def _run_trainer(
    trainer: Any,
    task: Task,
    resume_point: ResumePoint,
    prepared: Prepared,
    stopper: StopOnSignal,
    progress_bar: ProgressBar,
    output: Path,
) -> None:
    """Train from the resume point to the last step, or until `stopper` ends the run. Raises
    `ConfigError` if a package of an optimiser or tracker is not installed. Adds a note to an
    `OSError` (a full disk) that says from which checkpoint the run can go on."""
    if resume_point is not None:
        trainer_state = TrainerState.load_from_json(str(resume_point[0] / checkpoint.STATE))
        if _has_no_steps_left(trainer_state, prepared.steps, task.config.early_stopping):
            # the run was killed before it wrote its results, so only these are missing
            trainer.state = trainer_state
            trainer._load_best_model()
            return
    try:
        with stopper, as_reference(trainer.model, task.initial_adapter, task.needs_reference()):
            trainer.train(
                resume_from_checkpoint=str(resume_point[0]) if resume_point is not None else None
            )
    except ImportError as error:  # the message names the missing package of an optimiser or tracker
        raise ConfigError(
            f"Found: {error}. Do: install the package, or choose another setting."
        ) from error
    except OSError as error:
        note = "There is no checkpoint yet; the same command starts over."
        if (newest := checkpoint.newest(output)) is not None:
            note = (
                f"The newest complete checkpoint is {newest[0]}; start the same command again to go"
                " on from it."
            )
        error.add_note(note)
        raise
    finally:
        progress_bar.close()


def _has_no_steps_left(state: TrainerState, step_count: int, early_stopping: int | None) -> bool:
    """Whether the run ends at the checkpoint with this state: at the last of `step_count` steps, or
    (unless `early_stopping` is None) after `early_stopping` evaluations without a new best."""
    if early_stopping is not None:
        callback_states: Any = state.stateful_callbacks
        attributes = callback_states[EarlyStoppingCallback.__name__]["attributes"]
        if attributes["early_stopping_patience_counter"] >= early_stopping:
            return True
    return state.global_step >= step_count


@contextmanager
def _replace_connection_errors() -> Iterator[None]:
    """A context that turns the error of a lost connection into a `TrainingError` with advice. The
    other process was then killed: one that raises an exception reports it to the others instead."""
    try:
        yield
    # torch raises `RuntimeError` in the first process that loses its connection; the other
    # processes get a copy of the error as `AdapterError` (`Ranks.joint_work`)
    except (RuntimeError, AdapterError) as error:
        if "losed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        problem = "a process of this run that is gone, in the middle of a step"
        remedy = (
            "see what it printed, or what killed it (memory?); the same command goes on from the"
            " last checkpoint"
        )
        connection_error = TrainingError(problem, "all of them", remedy)
        connection_error.reported_elsewhere = getattr(error, "reported_elsewhere", False)
        raise connection_error from error


def _build_result(
    results: dict[str, Any], output: Path, base: Base, handle: Any, interrupted: bool
) -> Result:
    checkpoint_path = results["checkpoint"]
    path_by_field = {
        "adapter": Path(results["adapter"]),
        "checkpoint": None if checkpoint_path is None else Path(checkpoint_path),
        "output": output,
    }
    evaluations = [(step, loss) for step, loss in results["eval_losses"]]
    return Result(
        **{**results, **path_by_field, "eval_losses": evaluations},
        metrics={},
        model=base.model,
        tokenizer=base.tokenizer,
        handle=handle,
        interrupted=interrupted,
    )


def _finish_run(
    config: TrainConfig,
    task: Task,
    result: Result,
    prepared: Prepared,
    console: Console,
    processes: Processes,
) -> Result:
    """Write the adapter and metrics.json, and mark the run as finished last, so that a run killed
    before that is resumed. Returns `result` with its metrics and sample prompt."""
    metrics = processes.run_on_first(lambda: _collect_metrics(config, task, result))
    provenance = provenance_of(config, task, prepared, result.model, metrics)

    def write_files() -> None:
        if result.handle.config.trainable_tokens:
            result.tokenizer.save_pretrained(result.adapter)
        checkpoint.write_json(result.output / checkpoint.METRICS, metrics)
        write_status(result.output, "finished", config, prepared)

    with processes.joint_work():
        result.handle.save(
            result.adapter, base_name=config.base, provenance=provenance, overwrite=True
        )
    processes.run_on_first(write_files)
    result.model.eval()
    losses = result.losses
    loss_change = f"loss {losses[0]:.4f} → {losses[-1]:.4f}"
    loss_change += f", evaluation {metrics['eval_loss']:.4f}" if "eval_loss" in metrics else ""
    say(
        console,
        f"Done     {result.steps:,} steps in {format_duration(result.seconds)}: {loss_change}",
    )
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
        "seconds": result.seconds,
        "tokens": result.tokens,
        "trainable_parameters": summary.trainable,
        "total_parameters": summary.total,
        "peak_memory_bytes": memory.peak_memory(),
    }
    if evaluations := [loss for _, loss in result.eval_losses]:
        metrics["eval_loss"] = min(evaluations) if config.early_stopping else evaluations[-1]
        eval_lines = [
            line
            for line in checkpoint.read_log(result.output)
            if line.get("eval_loss") == metrics["eval_loss"]
        ]
        names = [f"eval_{name}" for name in task.measures]
        metrics |= {name: eval_lines[-1][name] for name in names if name in eval_lines[-1]}
    return metrics
