"""A run in several workers that Ray Train starts, and starts again when one dies.

    driver                                       workers
    launch(work, …)         ── work ──────▶      work(asked), in torch.distributed, in the driver's folder
    prints                  ◀─ lines ──────      what the first one writes to stderr
    Ctrl-C                  ── asked() ───▶      looked at after each step

Ray places the workers, has them find each other, and replaces all of them when one is gone.
Everything else is as under torchrun: checkpoints are ours, in the output folder that all of them
reach, and new workers go on from the newest. An error that would come again ends the run at once,
and reaches the driver as it was raised.
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
)  # fmt: skip
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from veneer.errors import ConfigError, TrainingError, VeneerError, listing
from veneer.train.processes import PATIENCE

#: seconds between two looks at what the workers have said
LOOK = 0.2

Asked = Callable[[], bool]
Say = Callable[[str], Any]
#: what each worker does, while `asked()` says whether the run is to stop; the driver gets what the
#: first one's gives
Work = Callable[[Asked], Any]


class Line:
    """Between the driver and the workers: a Ray actor beside the driver."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stop, self.value = False, None

    def say(self, text: str) -> None:
        self.lines.append(text)

    def heard(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def ask(self) -> None:
        self.stop = True

    def asked(self) -> bool:
        return self.stop

    def end(self, value: Any) -> None:
        self.value = value

    def ended(self) -> Any:
        return self.value


def launch(work: Work, workers: int, max_restarts: int, say: Say, gpus: bool | None = None) -> Any:
    """What `work` gives on the first of so many workers; called from a program's main thread.

    Args:
        work: goes to the workers by its name, so they must be able to import it.
        max_restarts: how often all start again because one is gone.
        say: prints a line.
        gpus: one for each worker. None: if the cluster has any.

    Raises:
        what a worker raised; TrainingError: workers died more often than that; ConfigError: no
        cluster where one was named. KeyboardInterrupt: a second Ctrl-C.
    """
    # Ray's log would hold, and tell again, what is printed
    for name in (
        "PRINT_PATCH",
        "WORKER_STRUCTURED_LOGGING",
    ):
        os.environ.setdefault(f"RAY_TRAIN_ENABLE_{name}", "0")
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except ConnectionError as error:
        problem = f"no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} ({error})"
        do = "check the address; unset it for a Ray on this machine"
        raise ConfigError(problem, "one that answers", do) from error
    try:
        has: dict[str, Any] = ray.cluster_resources()
        gpu = has.get("GPU", 0) > 0 if gpus is None else gpus
        for kind in ("CPU", "GPU") if gpu else ("CPU",):
            if (count := int(has.get(kind, 0))) < workers:
                say(
                    f"The cluster has {count} {kind}s for {workers} workers, which wait for more"
                    " (or Ctrl-C)."
                )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        line = ray.remote(Line).options(num_cpus=0, scheduling_strategy=here).remote()
        with tempfile.TemporaryDirectory() as folder:
            trainer = TorchTrainer(
                _worker,
                train_loop_config={"work": work, "line": line, "folder": str(Path.cwd())},
                torch_config=TorchConfig("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(PATIENCE)),
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
                run_config=RunConfig(  # the folder is for Ray's own records, of which there are none
                    storage_path=folder, failure_config=FailureConfig(max_failures=max_restarts),
                    callbacks=[Watch(line, workers)],
                ),
            )  # fmt: skip
            done = _aside(trainer.fit)  # in this thread, Ray would take Ctrl-C for an order to kill
            with _ask_on_signal(line, say):
                while not done.done():
                    _print(line, say)
                    time.sleep(LOOK)
        _print(line, say)
        _outcome(done.exception(), max_restarts)
        return ray.get(line.ended.remote())
    finally:
        ray.shutdown()


def _aside(work: Callable[[], Any]) -> Future[Any]:
    """Begin something that the end of this program does not wait for."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done


def _print(line: Any, say: Say) -> None:
    for text in ray.get(line.heard.remote()):
        say(text)


@contextmanager
def _ask_on_signal(line: Any, say: Say) -> Iterator[None]:
    """Ctrl-C (and SIGTERM) ends the run after a step, with a checkpoint; a second one at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        line.ask.remote()
        say("Stopping after this step … (again to stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(error: BaseException | None, max_restarts: int) -> None:
    """Raise what a run ended with, if it failed, as what it was."""
    if isinstance(error, ControllerError) and hasattr(error.controller_failure, "comes_again"):
        raise error.controller_failure from None
    if not isinstance(error, WorkerGroupError):
        if error is not None:
            raise error
        return
    for (
        failure
    ) in error.worker_failures.values():  # what a worker could still say, rather than that it died
        if hasattr(failure, "comes_again") and not getattr(failure, "told_elsewhere", False):
            raise failure from None
    died = (
        f"worker {listing(map(str, sorted(error.worker_failures)))} that died, after {max_restarts}"
        " restarts"
    )
    do = (
        "see what killed it (memory?) in Ray's logs; the same command goes on from the last"
        " checkpoint"
    )
    raise TrainingError(died, "workers that live", do) from None


class Watch(UserCallback):
    """Sits in Ray's controller, which would start all workers again after any error."""

    def __init__(self, line: Any, workers: int) -> None:
        self.line, self.workers = line, workers

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise an error that would come again: Ray then ends the run. Say what else befell the
        workers."""
        for error in worker_exceptions.values():
            if getattr(error, "comes_again", False):
                raise error
        ranks = [
            rank for rank, error in worker_exceptions.items() if not hasattr(error, "comes_again")
        ]
        if ranks:
            problem = f"Worker {listing(map(str, sorted(ranks)))} of {self.workers} died"
        else:
            rank, error = min(worker_exceptions.items())
            problem = f"Worker {rank} of {self.workers} failed ({type(error).__name__}: {error})"
        ray.get(self.line.say.remote(f"{problem}. All start again, if any restart is left."))


class _Said(io.TextIOBase):
    """A file whose lines the driver prints."""

    def __init__(self, line: Any) -> None:
        self.line, self.rest = line, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.line.say.remote("\n".join(lines))
        return len(text)


def _worker(config: dict[str, Any]) -> None:
    """What runs in each worker, in a thread of its own."""
    first, line = get_context().get_world_rank() == 0, config["line"]
    try:
        try:
            os.chdir(config["folder"])  # so that paths mean what they mean in the driver
        except OSError as error:
            problem = f"no folder {config['folder']} on the node {os.uname().nodename}"
            raise ConfigError(
                problem, "the driver's, on a file system that all share", "start it in such one"
            ) from error
        with redirect_stderr(_Said(line)) if first else nullcontext():
            value = config["work"](lambda: first and ray.get(line.asked.remote()))
        if first:
            ray.get(line.end.remote(value))  # after all that it has said
    except Exception as error:
        told: Any = error
        if not isinstance(error, VeneerError) and type(error) not in vars(builtins).values():
            # another library's may not travel
            told = RuntimeError(f"{type(error).__name__}: {error}")
        if not isinstance(error, VeneerError | OSError):
            told.add_note(f"In a worker:\n{traceback.format_exc()}")
        told.comes_again = _comes_again(error)
        if told is error:
            raise
        raise told from error


def _comes_again(error: Exception) -> bool:
    """Whether new workers would end like this. Not what comes of another worker that is gone, and
    not what torch raises of a device or a connection."""
    if isinstance(error, VeneerError):
        return not (
            error.told_elsewhere
            or (isinstance(error, TrainingError) and error.__cause__ is not None)
        )
    return not isinstance(error, RuntimeError)
