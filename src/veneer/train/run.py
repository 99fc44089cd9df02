"""One training run from a configuration to an adapter folder.

    result = fit(TrainConfig(base="…", data="…", output="…"))
    result.adapter     the folder to merge, to serve, to load

The order is the cheapest check first: the output folder, the base's config, the data, the tokens, then the weights. A
run that was stopped or killed goes on from its newest complete checkpoint when it is started again with the same
configuration, and ends at the same losses, bit for bit, as one that was not.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, set_seed

import veneer
from veneer import models
from veneer.attach.summary import size
from veneer.errors import ConfigError, OutputExistsError
from veneer.train import callbacks as watch
from veneer.train import checkpoint, memory
from veneer.train.arguments import arguments_of, early_stop
from veneer.train.callbacks import say
from veneer.train.causal import must_not_see_later_tokens
from veneer.train.config import FREE_ON_RESUME, TrainConfig
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.prepare import Prepared, prepare
from veneer.train.tokens import IGNORED
from veneer.train.trainer import AdapterTrainer

Found = tuple[Path, int] | None  # the checkpoint to go on from, and its step


@dataclass(frozen=True)
class Result:
    """What a run gave. `losses[i]` is the loss of step i + 1 (nats a token) and `eval_losses` [(step, loss)], both
    from the first step on, whichever session computed them; `seconds` and `tokens` likewise. After an interruption
    `adapter` is the newest checkpoint's, and `interrupted` is true."""

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
    interrupted: bool = False
    checkpoint: Path | None = None


def fit(
    config: TrainConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
    quiet: bool = False,
) -> Result:
    """Train an adapter as `config` says and save it to `config.output / "adapter"`.

    Args:
        config: see `TrainConfig`.
        callbacks: more `transformers.TrainerCallback`s.
        console: where to print; stderr by default.
        quiet: print nothing.

    Raises:
        OutputExistsError: the output folder holds a finished run, or something that is no run.
        ConfigError: an unfinished run there has another configuration; a base that cannot be loaded, or is no causal
            language model.
        DataError, TargetError, CheckError: as the parts say. OSError: the disk is full or not writable.
    """
    console = Console(stderr=True, quiet=quiet) if console is None else console
    output = config.output.expanduser()
    resume = _unfinished(config, output)
    models.must_be_causal(config.base)
    tokenizer = models.load_tokenizer(config.base)
    prepared = prepare(config, tokenizer)
    found = _found(config, output, prepared, console) if resume else None
    arguments = arguments_of(config, output, prepared)
    _on_one_device(arguments, console)
    set_seed(config.seed)
    base = models.load_base(config.base, precision=config.precision, attention=config.attention)
    must_not_see_later_tokens(base.model, config.base)
    handle = _attach(config, base.model, found)
    cached = HiddenStateCache(base.model) if config.cache_lower else None
    _describe(config, base.model, handle, prepared, cached, console)
    if config.check:
        _check(base.model, prepared)
    before = _open(config, output, prepared, found)  # only now: a run that cannot begin leaves nothing behind
    stop = watch.StopOnSignal(console)
    bar = watch.ProgressBar(console, found[1] if found else 0)
    trainer = AdapterTrainer(
        model=base.model,
        args=arguments,
        train_dataset=prepared.train_set,
        eval_dataset=prepared.eval_set,
        processing_class=tokenizer,
        callbacks=[watch.LossLog(output, before), watch.StopOnNan(), stop, bar, *early_stop(config), *callbacks],
        adapter=handle,
        base_name=config.base,
        hidden_state_cache=cached,
    )
    trainer.remove_callback(PrinterCallback)
    trainer._total_train_tokens = max((line.get("tokens", 0) for line in before), default=0)
    _train(trainer, found, prepared, stop, bar, output)
    if stop.stopped and trainer.state.global_step < prepared.steps:
        return _interrupted(config, output, base, handle, prepared)
    return _finish(config, output, base, handle, prepared, console)


# ---------------------------------------------------------------------------------------------- the output folder


def _unfinished(config: TrainConfig, output: Path) -> bool:
    """Whether `output` holds a run to go on with; False for a fresh start. Raises where neither is right.

    `overwrite` gives leave to replace what cannot be resumed; a run that can be is resumed all the same, so that the
    same command may simply be given again after a kill. `resume: false` with `overwrite` starts over.
    """
    if output.is_file():
        raise OutputExistsError(
            f"Found: {output} is a file. Expected: a folder for the run. Do: choose another output."
        )
    run = checkpoint.read_json(output / checkpoint.RUN)
    if run is None and output.is_dir() and any(output.iterdir()):
        raise OutputExistsError(
            f"Found: {output} is not empty and holds no Veneer run. Expected: a new folder. Do: choose another output; "
            "Veneer replaces nothing that it did not write."
        )
    if run is None and config.resume:
        raise ConfigError(
            f"Found: no run in {output}. Expected: one to resume. Do: leave out --resume, or check the path."
        )
    if run is None or (run["status"] == "finished" and config.overwrite):
        return False
    if run["status"] == "finished":
        raise OutputExistsError(
            f"Found: {output} holds a finished run. Expected: a new folder. Do: choose another output, or pass "
            "--overwrite to replace it."
        )
    changed = _changes(run["config"], config.content())
    if not changed and config.resume is not False:
        return True
    if config.overwrite or checkpoint.newest(output) is None:  # nothing would be lost
        return False
    lines = "".join(f"\n  {name}: was {old!r}, is {new!r}" for name, old, new in changed)
    raise (ConfigError if changed else OutputExistsError)(
        f"Found: {output} holds an unfinished run{' with another configuration' if changed else ''}.{lines}\n"
        "Expected: the same configuration, to resume it exactly, or a new folder. Do: undo the change, choose another "
        "output, or pass --overwrite to start over."
    )


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [name for name in {**old, **new} if name not in FREE_ON_RESUME]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _found(config: TrainConfig, output: Path, prepared: Prepared, console: Console) -> Found:
    """The newest checkpoint of the run in `output`, which began with the same data."""
    if checkpoint.read_json(output / checkpoint.RUN)["data"] == prepared.hashes:
        newest = checkpoint.newest(output)
        if newest is not None:
            say(console, f"Resuming from step {newest[1]} ({newest[0]}).")
        return newest
    if config.overwrite:
        return None
    raise ConfigError(
        f"Found: the data have changed since the unfinished run in {output} began. Expected: the same bytes, to resume "
        "it exactly. Do: restore them, choose another output, or pass --overwrite to start over."
    )


def _open(config: TrainConfig, output: Path, prepared: Prepared, found: Found) -> list[dict[str, Any]]:
    """Make the folder ready, write down what runs in it, and return the log up to the step to go on from."""
    if found is None and (output / checkpoint.RUN).exists():
        checkpoint.clear(output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(output)
    _status(output, "running", config, prepared)
    return checkpoint.cut_log(output, found[1] if found is not None else 0)


def _status(output: Path, status: str, config: TrainConfig, prepared: Prepared) -> None:
    content = {
        "status": status,
        "config": config.content(),
        "data": prepared.hashes,
        "steps": prepared.steps,
        "versions": _versions(),
    }
    checkpoint.write_json(output / checkpoint.RUN, content)


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "accelerate")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


# ---------------------------------------------------------------------------------------------- before training


def _attach(config: TrainConfig, model: Any, found: Found) -> Any:
    """A new adapter, or the one of the checkpoint, which also verifies that the base is the same."""
    if found is not None:
        return veneer.load(model, found[0] / checkpoint.ADAPTER, name="default", trainable=True)
    dtype = {"auto": None, "fp32": "float32", "bf16": "bfloat16"}[config.adapter_dtype]
    torch.manual_seed(config.seed)
    lora = veneer.LoraConfig(
        rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=config.targets, exclude=config.exclude,
        layers=config.layers, train_also=config.train_also, bias=config.bias, variant=config.variant, dtype=dtype,
    )  # fmt: skip
    return veneer.attach(model, lora, name="default")


def _describe(
    config: TrainConfig,
    model: Any,
    handle: Any,
    prepared: Prepared,
    cached: HiddenStateCache | None,
    console: Console,
) -> None:
    train = prepared.train
    changed = {"dropped": train.dropped, "truncated": train.truncated}
    notes = "".join(f", {count:,} examples {what}" for what, count in changed.items() if count)
    say(console, f"Base     {config.base} ({str(model.dtype).removeprefix('torch.')})")
    say(
        console,
        f"Data     {config.data}: {len(train):,} examples, {sum(train.lengths):,} tokens, {train.trained_tokens:,} of "
        f"them learnt{notes}",
    )
    if prepared.unused:
        say(console, f"         columns that are not used: {', '.join(prepared.unused)}")
    if prepared.evaluation is not None:
        say(console, f"         {len(prepared.evaluation):,} examples to evaluate on")
    say(console, f"Steps    {prepared.steps:,} of {config.batch_size * config.grad_accum} examples")
    width, labelled = _largest_batch(prepared, config)
    expected = memory.estimate(
        model, tokens=width, labelled=labelled, rank=config.rank, optimiser=config.optimiser,
        checkpointing=config.activation_checkpointing,
    )  # fmt: skip
    say(console, f"Memory   {expected}")
    if cached is not None:
        kept = size(_kept(model, prepared))
        say(
            console,
            f"Lower    {len(cached.blocks)} of {cached.count} blocks run once for each row; {kept} are kept",
        )
    say(console, str(handle.summary()))


def _kept(model: Any, prepared: Prepared) -> int:
    """Bytes of the hidden states of all rows."""
    parts = [part for part in (prepared.train, prepared.evaluation) if part is not None]
    width = model.get_input_embeddings().weight.shape[1]
    return sum(length for part in parts for length in part.lengths) * width * model.dtype.itemsize


def _largest_batch(prepared: Prepared, config: TrainConfig) -> tuple[int, int]:
    """(tokens with padding, labels) of the batch that needs the most."""
    if config.packing:
        whole = prepared.max_length * config.batch_size
        return whole, round(whole * prepared.train.trained_tokens / sum(prepared.train.lengths))
    order = sorted(range(len(prepared.train)), key=prepared.train.lengths.__getitem__, reverse=True)[
        : config.batch_size
    ]
    labelled = sum(label != IGNORED for i in order for label in prepared.train.labels[i])
    return len(order) * prepared.train.lengths[order[0]], labelled


def _check(model: Any, prepared: Prepared) -> None:
    """Every adapter must be reached and get a gradient: on the shortest example, with the random state put back."""
    shortest = min(range(len(prepared.train)), key=prepared.train.lengths.__getitem__)
    ids = torch.tensor([prepared.train.input_ids[shortest][:64]], device=model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        veneer.check(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})


def _on_one_device(arguments: Any, console: Console) -> None:
    """One process trains on one GPU, also where it sees several: transformers would copy the model to all of them in
    each step (`nn.DataParallel`), which trl refuses. A process of several has one by itself."""
    if (seen := arguments.n_gpu) > 1:
        arguments._n_gpu = 1
        say(console, f"{seen} GPUs are visible; this run trains on {arguments.device} (CUDA_VISIBLE_DEVICES chooses).")


# ---------------------------------------------------------------------------------------------- training and after


def _train(trainer: Any, found: Found, prepared: Prepared, stop: Any, bar: Any, output: Path) -> None:
    if found is not None and found[1] >= prepared.steps:
        return  # killed between the last checkpoint and the end: nothing is left to train
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(found[0]) if found is not None else None)
    except ImportError as error:  # an optimiser or a tracker whose package is missing says so itself
        raise ConfigError(f"Found: {error}. Do: install the package, or choose another setting.") from error
    except OSError as error:
        last = checkpoint.newest(output)
        error.add_note(
            f"The newest complete checkpoint is {last[0]}; start the same command again to go on from it."
            if last is not None
            else "There is no checkpoint yet; the same command starts over."
        )
        raise
    finally:
        bar.close()


def _history(output: Path) -> tuple[list[float], list[tuple[int, float]], float, int]:
    lines = checkpoint.read_log(output)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    tokens = max((line.get("tokens", 0) for line in lines), default=0)
    return losses, evaluations, lines[-1]["seconds"] if lines else 0.0, tokens


def _interrupted(config: TrainConfig, output: Path, base: Any, handle: Any, prepared: Prepared) -> Result:
    _status(output, "interrupted", config, prepared)
    losses, evaluations, seconds, tokens = _history(output)
    last = checkpoint.newest(output)
    if last is None:
        raise RuntimeError(f"the run in {output} was stopped, yet wrote no checkpoint")
    return Result(
        last[0] / checkpoint.ADAPTER, output, losses, evaluations, last[1], seconds, tokens, {},
        base.model, base.tokenizer, handle, interrupted=True, checkpoint=last[0],
    )  # fmt: skip


def _finish(config: TrainConfig, output: Path, base: Any, handle: Any, prepared: Prepared, console: Console) -> Result:
    """Write the adapter and metrics.json, then mark the run as finished: the last thing that is done."""
    losses, evaluations, seconds, tokens = _history(output)
    summary = handle.summary()
    metrics: dict[str, Any] = {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": seconds,
        "tokens": tokens,
        "trainable_parameters": summary.trainable,
        "total_parameters": summary.total,
        "peak_memory_bytes": memory.peak(),
    }
    if evaluations:
        metrics["eval_loss"] = min(loss for _, loss in evaluations) if config.early_stopping else evaluations[-1][1]
    provenance = {
        "config": config.content(),
        "data": prepared.hashes,
        "base_dtype": str(base.model.dtype).removeprefix("torch."),
        "metrics": {name: metrics[name] for name in metrics if name not in ("seconds", "peak_memory_bytes")},
        "versions": _versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    adapter = veneer.save(
        base.model, output / checkpoint.ADAPTER, name=handle.name, base_name=config.base, provenance=provenance,
        overwrite=True,
    )  # fmt: skip
    checkpoint.write_json(output / checkpoint.METRICS, metrics)
    _status(output, "finished", config, prepared)
    base.model.eval()
    say(
        console,
        f"Done     {len(losses):,} steps in {watch.duration(seconds)}: loss {losses[0]:.4f} → {losses[-1]:.4f}"
        + (f", evaluation {metrics['eval_loss']:.4f}" if evaluations else ""),
    )
    say(console, f"Adapter  {adapter}")
    return Result(
        Path(adapter), output, losses, evaluations, len(losses), seconds, tokens, metrics,
        base.model, base.tokenizer, handle, checkpoint=(checkpoint.newest(output) or (None,))[0],
    )  # fmt: skip
