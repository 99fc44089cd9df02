"""A run in several processes, as torchrun starts them.

    a step      batch_size · grad_accum examples in total: each process computes its share
    gradients   averaged over the processes once per step
    files       only the first process writes and prints

Every process reads the data and the base, and attaches the adapter. All processes run the same
stages, and each stage has one outcome: all processes complete it, or all raise the error of the
process that failed (`distributed.Ranks`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from veneer.errors import ConfigError, TrainingError
from veneer.train.config import TrainConfig

if TYPE_CHECKING:
    from veneer.distributed import Ranks

#: seconds that a process waits for other processes, which may read the base from a slower disk
PATIENCE = 3600.0
#: key in the launcher's store; its value is the output folder of the run that has finished
FINISHED = "veneer/finished"
#: by `parallel`, the settings that a base divided over processes does not support, and the reasons
UNSUPPORTED_SETTINGS = {
    "fsdp": {
        "quantize": "packed weights are not spread",
        "a quantised base": "packed weights are not spread",
        "cache_lower": "its blocks run for a row at a time, in one process and not in another",
        "task grpo": "answers of different lengths take different numbers of passes",
        "invocation": "it has not been tried on a model that is spread",
    },
    "tp": {
        "quantize": "packed weights are not cut",
        "a quantised base": "packed weights are not cut",
        "cache_lower": "its blocks would have to be cut as well",
        "device_map": "each process has a device",
        "task grpo": "its answers have not been tried on a model that is cut",
        "invocation": "it has not been tried on a model that is cut",
        "a preference from adapter": (
            "the base is cut before that adapter is there once more, as it was"
        ),
    },
}
#: environment variables that a launcher sets
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """The processes of one run.

    Attributes:
        ranks: the group of processes; None for a run in one process.
        computes_all_rows: whether each process computes all rows of a batch with a shard of the
            base (tensor parallelism). Otherwise each computes its share of the rows.
        is_first: whether this process writes and prints.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks, self.computes_all_rows, self.parent_pid = ranks, False, os.getppid()
        self.count = 1 if ranks is None else len(ranks.members)
        self.rank = 0 if ranks is None else ranks.rank
        self.is_first = ranks is None or ranks.is_writer

    @property
    def share_count(self) -> int:
        """The number of shares into which the rows of a step are divided."""
        return 1 if self.computes_all_rows else self.count

    @property
    def share_index(self) -> int:
        """The index of this process's share."""
        return 0 if self.computes_all_rows else self.rank

    def must_have_parent(self) -> None:
        """Raise `TrainingError` if the launcher of this process is gone. Else a new launcher could
        start other processes, which would write to the same output."""
        if self.ranks is not None and os.getppid() != self.parent_pid:
            raise TrainingError(
                "the launcher of this process is gone",
                "torchrun, until the end",
                "start it again: it goes on from the last checkpoint",
            )

    def joint_work(self, subject: str = "") -> AbstractContextManager[Callable[..., None]]:
        """Run the block in every process, as `Ranks.joint_work` does: it succeeds in all, or raises
        in all. In a run of one process, the yielded function `compare` does nothing."""
        if self.ranks is None:
            return nullcontext(lambda summary, *result: None)
        return self.ranks.joint_work(subject)

    def run_on_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the first process, as `Ranks.run_on_first` does, and return its result,
        which must be a JSON value, in every process."""
        return work() if self.ranks is None else self.ranks.run_on_first(work)


def join() -> Processes:
    """Join the processes that a launcher started. Without a launcher, return this process alone.

    Raises:
        ConfigError: the environment sets a WORLD_SIZE, but not the other variables of a launcher.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        # with LOCAL_RANK set, accelerate would wrap the model of a single process in DDP
        os.environ.pop("LOCAL_RANK", None)
        return Processes()
    if missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}",
            "what torchrun sets",
            "start the run with torchrun, or unset WORLD_SIZE",
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from veneer.distributed import all_ranks

    if not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():  # nccl for tensors on GPUs
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=PATIENCE)
        store, rank, process_count = next(rendezvous("env://", timeout=timeout))
        store = fresh_store(store, rank, process_count)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=process_count, timeout=timeout
        )
    return Processes(all_ranks("train", PATIENCE))


def fresh_store(store: Any, rank: int, process_count: int, patience: float = PATIENCE) -> Any:
    """Create an empty namespace of `store` for the processes of this start. torchrun's store
    outlives the processes that it restarts and keeps their entries, so torch 2.13 would connect to
    their old addresses.

    Each machine counts restarts separately, so the first process names the namespace with a random
    token. Every other process writes its own token under that name. It accepts the name once the
    first process has published a list there that contains this token. The list under a name from an
    earlier start never contains it.

    Raises:
        TrainingError: some processes do not arrive in `patience` seconds.
    """
    from torch._C._distributed_c10d import PrefixStore

    from veneer.distributed import wait_for_keys

    token, deadline = uuid4().hex, time.monotonic() + patience
    if rank == 0:
        keys = [f"veneer/{token}/{peer}" for peer in range(1, process_count)]
        store.set("veneer/start", token)
        if missing := wait_for_keys(store, keys, patience):
            raise _timeout_error(
                f"{len(missing)} of {len(keys)} other processes did not come", patience
            )
        store.set(f"veneer/{token}/all", json.dumps([store.get(key).decode() for key in keys]))
        return PrefixStore(token, store)
    while time.monotonic() < deadline:
        if store.check(["veneer/start"]):
            name = store.get("veneer/start").decode()
            store.set(f"veneer/{name}/{rank}", token)
            if store.check([f"veneer/{name}/all"]) and token in json.loads(
                store.get(f"veneer/{name}/all")
            ):
                return PrefixStore(name, store)
        time.sleep(0.02)
    raise _timeout_error("the first process did not come", patience)


def _timeout_error(problem: str, patience: float) -> TrainingError:
    return TrainingError(
        f"{problem} within {patience:g} s",
        "all of them",
        "see what they printed, on their machines too",
    )


def leave(output: str) -> None:
    """Leave the process group after a run that ended in all processes, and record `output` in the
    launcher's store."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if dist.get_rank() == 0:
            _launcher_store().set(FINISHED, output)
        dist.barrier()
        dist.destroy_process_group()


def is_run_finished(output: str) -> bool:
    """Whether processes of the same launcher have already finished the run in `output`. The
    launcher restarts them all if one of them fails while it exits."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    store = _launcher_store()
    return store.check([FINISHED]) and store.get(FINISHED).decode() == output


def _launcher_store() -> Any:
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def share_config(config: TrainConfig, processes: int, *, compares_rows: bool) -> TrainConfig:
    """The configuration of each of several processes. A step of all of them together has the number
    of examples that `config` gives (`split_step`).

    Args:
        compares_rows: whether the loss compares the examples of a forward pass, so that their
            number must not change.

    Raises:
        ConfigError: the examples of a step cannot be divided evenly.
    """
    if processes == 1:
        return config
    if config.device_map is not None:
        raise ConfigError(
            f"device_map over {processes} processes, each of which has a device",
            "one of the two",
            "leave out device_map, or run without torchrun",
        )
    batch_size, passes = split_step(config.batch_size, config.grad_accum, processes)
    if compares_rows and batch_size != config.batch_size:
        step = _describe_step(config.batch_size, config.grad_accum, processes)
        raise ConfigError(
            f"{step}: {batch_size} in a forward pass, whose rows the loss of task {config.task}"
            " compares",
            f"{config.batch_size} in a forward pass",
            _division_advice(processes),
        )
    return config.model_copy(update={"batch_size": batch_size, "grad_accum": passes})


def check_divided_settings(
    config: TrainConfig, process_count: int, needs_reference: bool = False
) -> None:
    """Raise `ConfigError` for settings that do not work on a base that is sharded over (fsdp) or
    cut between (tp) `process_count` processes. ``needs_reference``: as `Task.needs_reference`."""
    from veneer.models.locate import config_of

    settings_in_use = {
        "quantize": config.quantize,
        "a quantised base": (
            getattr(config_of(config.base), "quantization_config", None) is not None
        ),
        "cache_lower": config.cache_lower,
        "device_map": config.device_map,
        "task grpo": config.task == "grpo",
        "invocation": config.invocation is not None,
        "a preference from adapter": needs_reference and config.adapter is not None,
    }
    for name, reason in UNSUPPORTED_SETTINGS[config.parallel].items():
        if settings_in_use[name]:
            raise ConfigError(
                f"parallel {config.parallel} with {name}: {reason}",
                "one of them",
                "set parallel to ddp, or leave the other out",
            )
    if config.shard_size is not None and process_count % config.shard_size:
        raise ConfigError(
            f"shard_size {config.shard_size} of {process_count} processes",
            "a number that divides them",
            "set it to the processes of a machine",
        )


def split_step(batch_size: int, grad_accum: int, processes: int) -> tuple[int, int]:
    """(examples per forward pass, forward passes) of a step in one of several processes that share
    its examples: the fewest equal passes of at most `batch_size` examples. Raises `ConfigError` if
    the examples cannot be divided evenly."""
    share_size, remainder = divmod(batch_size * grad_accum, processes)
    if remainder:
        raise ConfigError(
            _describe_step(batch_size, grad_accum, processes),
            "as many for each process",
            _division_advice(processes),
        )
    passes = next(
        passes
        for passes in range(1, share_size + 1)
        if share_size % passes == 0 and share_size // passes <= batch_size
    )
    return share_size // passes, passes


def _describe_step(batch_size: int, grad_accum: int, processes: int) -> str:
    return (
        f"batch_size {batch_size} × grad_accum {grad_accum} = {batch_size * grad_accum} examples a"
        f" step, over {processes} processes"
    )


def _division_advice(processes: int) -> str:
    return f"set grad_accum to a multiple of {processes}, or start another number of processes"
