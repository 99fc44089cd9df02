"""A run in several worker processes that Ray Train starts, and restarts when one of them dies.

    driver (`veneer train`)                    workers
    launch(work, …)  ── work ─────────────▶    work(stop_requested), in torch.distributed
    prints           ◀─ lines ─────────────    stderr of the first worker
    Ctrl-C           ── stop_requested() ─▶    called after each step

Workers run in the driver's working folder. Ray places the workers, connects them, and replaces all
of them when one dies. Everything else works as under torchrun: Veneer writes the checkpoints to the
output folder, which all workers must be able to access, and new workers resume from the newest
checkpoint. An error that new workers would raise again ends the run at once, and the driver raises
it.
"""

from __future__ import annotations

import builtins
import io
import logging
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    WorkerGroupError,
    get_context,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from veneer.errors import ConfigError, TrainingError, VeneerError, listing
from veneer.train.processes import PATIENCE

#: seconds between two requests of the driver for the lines that the first worker has printed
POLL_SECONDS = 0.2

#: a function that a worker calls after each step to learn whether the user asked the run to stop
StopRequested = Callable[[], bool]
#: a function that prints a line
Say = Callable[[str], Any]
#: The function that each worker runs. Its argument is the `StopRequested` function. The value that
#: it returns in the first worker is the result of the run.
Work = Callable[[StopRequested], Any]


class Channel:
    """A Ray actor on the driver's node through which driver and workers communicate: printed lines
    and the result go to the driver, the request to stop goes to the workers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.is_stop_requested, self.result = False, None

    def say(self, text: str) -> None:
        self.lines.append(text)

    def take_lines(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def request_stop(self) -> None:
        self.is_stop_requested = True

    def stop_requested(self) -> bool:
        return self.is_stop_requested

    def set_result(self, result: Any) -> None:
        self.result = result

    def get_result(self) -> Any:
        return self.result


def launch(work: Work, workers: int, max_restarts: int, say: Say, gpus: bool | None = None) -> Any:
    """Run `work` in several workers and return the result of the first one. Starts Ray and ends it
    afterwards, or connects to the cluster at RAY_ADDRESS, which goes on. Must be called in the main
    thread, because it handles signals.

    Args:
        work: an importable function, because the workers get it by its name.
        workers: the number of workers.
        max_restarts: how often all workers may restart because one died.
        say: prints a line of the first worker's stderr, or a message of the driver.
        gpus: whether each worker gets a GPU; None gives each one if the cluster has GPUs.

    Raises:
        Exception: an error of a worker that new workers would raise again, or that came after the
            last restart.
        TrainingError: workers died more than `max_restarts` times.
        ConfigError: there is no cluster at RAY_ADDRESS.
        KeyboardInterrupt: a second Ctrl-C.
    """
    # without these variables, Ray would log the workers' lines and print them a second time
    for variable_name in ("PRINT_PATCH", "WORKER_STRUCTURED_LOGGING"):
        os.environ.setdefault(f"RAY_TRAIN_ENABLE_{variable_name}", "0")
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} ({error})",
            "one that answers",
            "check the address; unset it for a Ray on this machine",
        ) from error
    try:
        uses_gpus = _use_gpus(workers, say, gpus)
        driver_node = ray.get_runtime_context().get_node_id()
        driver_affinity = NodeAffinitySchedulingStrategy(driver_node, soft=False)
        channel = (
            ray.remote(Channel).options(num_cpus=0, scheduling_strategy=driver_affinity).remote()
        )
        with tempfile.TemporaryDirectory() as storage_folder:
            trainer = TorchTrainer(
                _run_worker,
                train_loop_config={"work": work, "channel": channel, "folder": str(Path.cwd())},
                torch_config=TorchConfig(
                    "cpu:gloo,cuda:nccl" if uses_gpus else "gloo", timeout_s=int(PATIENCE)
                ),
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=uses_gpus),
                run_config=RunConfig(
                    storage_path=storage_folder,  # for Ray's own files; this run keeps none of them
                    failure_config=FailureConfig(max_failures=max_restarts),
                    callbacks=[WatchFailures(channel, workers)],
                ),
            )
            # In another thread: in the main thread, `fit` would react to Ctrl-C by killing the
            # workers before they can write a checkpoint.
            future = _run_in_thread(trainer.fit)
            with _stop_on_signal(channel, say):
                while not future.done():
                    _print_lines(channel, say)
                    time.sleep(POLL_SECONDS)
        _print_lines(channel, say)
        _raise_failure(future.exception(), max_restarts)
        return ray.get(channel.get_result.remote())
    finally:
        ray.shutdown()


def _use_gpus(workers: int, say: Say, gpus: bool | None) -> bool:
    """Return whether each worker gets a GPU: `gpus`, or if it is None, whether the cluster has any.
    If the cluster has fewer CPUs or GPUs than workers, say so, since the workers then wait."""
    resources: dict[str, Any] = ray.cluster_resources()
    uses_gpus = resources.get("GPU", 0) > 0 if gpus is None else gpus
    for resource in ("CPU", "GPU") if uses_gpus else ("CPU",):
        if (count := int(resources.get(resource, 0))) < workers:
            say(
                f"The cluster has {count} {resource}s for {workers} workers, which wait for more"
                " (or Ctrl-C)."
            )
    return uses_gpus


def _run_in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run `work` in a daemon thread. The returned future gets its result or its error."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _print_lines(channel: Any, say: Say) -> None:
    for text in ray.get(channel.take_lines.remote()):
        say(text)


@contextmanager
def _stop_on_signal(channel: Any, say: Say) -> Iterator[None]:
    """A context in which Ctrl-C or SIGTERM asks the workers to stop after the current step, with a
    checkpoint, and a second signal raises `KeyboardInterrupt`."""
    is_stop_requested = False

    def handle_signal(signal_number: int, frame: Any) -> None:
        nonlocal is_stop_requested
        if is_stop_requested:
            raise KeyboardInterrupt
        is_stop_requested = True
        channel.request_stop.remote()
        say("Stopping after this step … (again to stop at once)")

    previous_handlers = {
        signal_number: signal.signal(signal_number, handle_signal)
        for signal_number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)


def _raise_failure(error: BaseException | None, max_restarts: int) -> None:
    """Raise the worker's error that the `error` of `TorchTrainer.fit` holds, a `TrainingError` if
    workers died without raising one, or else `error` itself. Do nothing if `error` is None."""
    if isinstance(error, ControllerError) and hasattr(error.controller_failure, "recurs"):
        raise error.controller_failure from None
    if not isinstance(error, WorkerGroupError):
        if error is not None:
            raise error
        return
    # an error that a worker itself raised (`_run_worker` sets its `recurs`) explains the failure
    # better than the death of another worker
    for failure in error.worker_failures.values():
        if hasattr(failure, "recurs") and not getattr(failure, "reported_elsewhere", False):
            raise failure from None
    raise TrainingError(
        f"worker {listing(map(str, sorted(error.worker_failures)))} that died, after {max_restarts}"
        " restarts",
        "workers that live",
        "see what killed it (memory?) in Ray's logs; the same command goes on from the last"
        " checkpoint",
    ) from None


class WatchFailures(UserCallback):
    """A callback that Ray's controller calls when workers fail. It ends the run for an error that
    new workers would raise again; without it, the controller would restart them after any error."""

    def __init__(self, channel: Any, worker_count: int) -> None:
        self.channel, self.worker_count = channel, worker_count

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise an error that new workers would raise again (`recurs`, set by `_run_worker`), so
        that Ray ends the run. For any other failure, have the driver print what happened.

        Args:
            worker_exceptions: by rank, the error that a worker raised, or an error of Ray for a
                worker that died; the latter has no attribute `recurs`.
        """
        for error in worker_exceptions.values():
            if getattr(error, "recurs", False):
                raise error
        dead_ranks = [
            rank for rank, error in worker_exceptions.items() if not hasattr(error, "recurs")
        ]
        if dead_ranks:
            problem = f"Worker {listing(map(str, sorted(dead_ranks)))} of {self.worker_count} died"
        else:
            rank, error = min(worker_exceptions.items())
            problem = (
                f"Worker {rank} of {self.worker_count} failed ({type(error).__name__}: {error})"
            )
        ray.get(self.channel.say.remote(f"{problem}. All start again, if any restart is left."))


class _ChannelFile(io.TextIOBase):
    """A text file that sends each complete line to the channel, from which the driver prints it."""

    def __init__(self, channel: Any) -> None:
        self.channel, self.unfinished_line = channel, ""

    def write(self, text: str) -> int:
        *lines, self.unfinished_line = (self.unfinished_line + text).split("\n")
        if lines:
            self.channel.say.remote("\n".join(lines))
        return len(text)


def _run_worker(config: dict[str, Any]) -> None:
    """The main function of each worker: run the work in the driver's folder, and put the result of
    the first worker into the channel. An error gets the attribute `recurs` (whether new workers
    would raise it again), and is replaced by a `RuntimeError` if Ray could perhaps not pickle it.

    Args:
        config: {"work": the `Work`, "channel": the handle of the `Channel` actor, "folder": the
            path of the driver's working folder}.
    """
    is_first, channel = get_context().get_world_rank() == 0, config["channel"]
    try:
        try:
            os.chdir(config["folder"])  # relative paths must mean the same as in the driver
        except OSError as error:
            raise ConfigError(
                f"no folder {config['folder']} on the node {os.uname().nodename}",
                "the driver's, on a file system that all share",
                "start it in such one",
            ) from error
        with redirect_stderr(_ChannelFile(channel)) if is_first else nullcontext():
            result = config["work"](lambda: is_first and ray.get(channel.stop_requested.remote()))
        if is_first:
            ray.get(channel.set_result.remote(result))  # arrives after all printed lines
    except Exception as error:
        picklable_error: Any = error
        if not isinstance(error, VeneerError) and type(error) not in vars(builtins).values():
            # an error class of another library may not be picklable
            picklable_error = RuntimeError(f"{type(error).__name__}: {error}")
        if not isinstance(error, VeneerError | OSError):
            picklable_error.add_note(f"In a worker:\n{traceback.format_exc()}")
        picklable_error.recurs = _would_recur(error)
        if picklable_error is error:
            raise
        raise picklable_error from error


def _would_recur(error: Exception) -> bool:
    """Whether new workers would raise the same error, so that a restart is useless. False for the
    consequences of another worker's failure, and for any `RuntimeError`, since torch raises it for
    failures of a device or a connection."""
    if isinstance(error, VeneerError):
        return not (
            error.reported_elsewhere
            or (isinstance(error, TrainingError) and error.__cause__ is not None)
        )
    return not isinstance(error, RuntimeError)
