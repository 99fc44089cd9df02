"""A run in several processes, as torchrun starts them.

    a step      batch_size · grad_accum examples in total: each process computes its share
    gradients   averaged over the processes once per step
    files       only the first process writes and prints

Every process reads the data and the base, and attaches the adapter. All processes run the same
stages (`Processes.joint_work`, `run_on_first`), and each stage ends in the same way in all of them:
all processes complete it, or all raise the error of the process that failed.
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

if TYPE_CHECKING:
    from veneer.distributed import Ranks
    from veneer.train.config import TrainConfig

#: seconds that a process waits for the others. It is long because they may read the base from a
#: slower disk.
PATIENCE = 3600.0
#: Key in the key-value store of torchrun, which outlives the processes that torchrun restarts. Its
#: value is the output folder of a run that has finished, so that restarted processes do not run it
#: again.
FINISHED_RUN_KEY = "veneer/finished"
#: For each value of `parallel` that divides the base over processes: by the name of a setting that
#: it does not support, the reason, for the error. The names are those in `check_divided_settings`.
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
        "early_stopping": "the best adapter cannot be loaded onto a base that is cut",
        "invocation": "it has not been tried on a model that is cut",
        "a preference from adapter": (
            "the base is cut before that adapter is there once more, as it was"
        ),
    },
}
#: environment variables that a launcher sets
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """The processes of one run, as seen by one of them.

    Attributes:
        ranks: the group of processes; None for a run in one process.
        parallel: how the processes divide the work, a value of `TrainConfig.parallel`; `run.fit`
            sets it.
        parent_pid: the process id of the parent, which is the launcher if there is one.
        count, rank: the number of processes, and the rank of this one.
        is_first: whether this is the process that writes files and prints.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks, self.parallel, self.parent_pid = ranks, "ddp", os.getppid()
        self.count = 1 if ranks is None else len(ranks.members)
        self.rank = 0 if ranks is None else ranks.rank
        self.is_first = ranks is None or ranks.is_writer

    @property
    def share_count(self) -> int:
        """The number of shares into which the rows of a step are divided (`count_shares`)."""
        return count_shares(self.parallel, self.count)

    @property
    def share_index(self) -> int:
        """The index, from 0, of the share of a step's rows that this process computes."""
        return 0 if self.share_count == 1 else self.rank

    def must_have_parent(self) -> None:
        """Raise `TrainingError` if the launcher of this process has died. If this process went on,
        it would write to the same output as the processes of a new launcher."""
        if self.ranks is not None and os.getppid() != self.parent_pid:
            raise TrainingError(
                "the launcher of this process is gone",
                "torchrun, until the end",
                "start it again: it goes on from the last checkpoint",
            )

    def joint_work(self, subject: str = "") -> AbstractContextManager[Callable[..., None]]:
        """A context whose block every process runs: it succeeds in all of them, or an error in one
        of them is raised in all.

        Yields a function `compare(summary, *result)`, where `summary(*result)` is a short text. If
        the block calls it, an error is raised unless all processes have the same text. In a run of
        one process it does nothing.

        Args:
            subject: the name of the compared result, for this error.
        """
        if self.ranks is None:
            return nullcontext(lambda summary, *result: None)
        return self.ranks.joint_work(subject)

    def run_on_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the first process only, and return its result, which must be a JSON value,
        in every process. Every process must call this method; an error is raised in all."""
        return work() if self.ranks is None else self.ranks.run_on_first(work)


def count_shares(parallel: str, process_count: int) -> int:
    """The number of shares into which `process_count` processes divide the rows of a step: 1 if
    `parallel` is "tp" (tensor parallelism), because each process then computes all rows with its
    part of the base; else `process_count`."""
    return 1 if parallel == "tp" else process_count


def join() -> Processes:
    """Connect this process to the others that its launcher started (torch's process group). Without
    a launcher, or with WORLD_SIZE 1, return a `Processes` of this process alone.

    Raises:
        ConfigError: the environment sets a WORLD_SIZE, but not the other variables of a launcher.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        # removed because accelerate takes LOCAL_RANK for a distributed run and would wrap the model
        # of this single process in DDP
        os.environ.pop("LOCAL_RANK", None)
        return Processes()
    if missing_variables := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing_variables)}",
            "what torchrun sets",
            "start the run with torchrun, or unset WORLD_SIZE",
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from veneer.distributed import all_ranks

    if not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():  # nccl communicates tensors on GPUs
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
    """Return a view of `store`, torchrun's key-value store, that has no entries yet. All processes
    that torchrun starts together must call this function, and all get the same view. It is needed
    because the store outlives the processes that torchrun restarts and keeps their addresses, to
    which torch 2.13 would connect.

    The view is a `PrefixStore`, whose keys share a prefix, the namespace. A count of restarts
    cannot name it, because each machine counts separately. So the first process publishes a random
    token as the namespace. Each other process writes a random token of its own under this
    namespace, and the first process answers with the list of all these tokens. A process accepts
    the namespace once the list contains its own token. A namespace that an earlier start published
    is thus never accepted, because its list has only earlier tokens.

    Args:
        patience: seconds to wait for the other processes.

    Raises:
        TrainingError: some processes do not arrive in this time.
    """
    from torch._C._distributed_c10d import PrefixStore

    from veneer.distributed import wait_for_keys

    own_token, deadline = uuid4().hex, time.monotonic() + patience
    if rank == 0:
        token_keys = [f"veneer/{own_token}/{peer}" for peer in range(1, process_count)]
        store.set("veneer/start", own_token)
        if missing_keys := wait_for_keys(store, token_keys, patience):
            raise _timeout_error(
                f"{len(missing_keys)} of {len(token_keys)} other processes did not come", patience
            )
        store.set(
            f"veneer/{own_token}/all", json.dumps([store.get(key).decode() for key in token_keys])
        )
        return PrefixStore(own_token, store)
    while time.monotonic() < deadline:
        if store.check(["veneer/start"]):
            namespace = store.get("veneer/start").decode()
            store.set(f"veneer/{namespace}/{rank}", own_token)
            if store.check([f"veneer/{namespace}/all"]) and own_token in json.loads(
                store.get(f"veneer/{namespace}/all")
            ):
                return PrefixStore(namespace, store)
        time.sleep(0.02)
    raise _timeout_error("the first process did not come", patience)


def _timeout_error(problem: str, patience: float) -> TrainingError:
    return TrainingError(
        f"{problem} within {patience:g} s",
        "all of them",
        "see what they printed, on their machines too",
    )


def leave(output: str) -> None:
    """Destroy the process group after a run that ended in all processes. Before that, record the
    output folder `output` as finished in the launcher's store (for `is_run_finished`), and wait for
    all processes. Without a process group, do nothing."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if dist.get_rank() == 0:
            _launcher_store().set(FINISHED_RUN_KEY, output)
        dist.barrier()
        dist.destroy_process_group()


def is_run_finished(output: str) -> bool:
    """Whether processes of the same launcher have already finished the run in `output`. If one of
    them fails while it exits, the launcher restarts all of them, and the run must not be repeated.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    store = _launcher_store()
    return store.check([FINISHED_RUN_KEY]) and store.get(FINISHED_RUN_KEY).decode() == output


def _launcher_store() -> Any:
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def share_config(config: TrainConfig, process_count: int, *, compares_rows: bool) -> TrainConfig:
    """The configuration of each of `process_count` processes that share the examples of a step. Its
    `batch_size` and `grad_accum` are chosen (`split_step`) so that a step of all processes together
    has as many examples as a step of `config`.

    Args:
        compares_rows: whether the loss of an example depends on the other examples of its forward
            pass, so that `batch_size` must not change.

    Raises:
        ConfigError: the examples of a step cannot be divided evenly, or only with another
            `batch_size` although `compares_rows` is True; or `device_map` is set.
    """
    if process_count == 1:
        return config
    if config.device_map is not None:
        raise ConfigError(
            f"device_map over {process_count} processes, each of which has a device",
            "one of the two",
            "leave out device_map, or run without torchrun",
        )
    batch_size, pass_count = split_step(config.batch_size, config.grad_accum, process_count)
    if compares_rows and batch_size != config.batch_size:
        problem = _describe_step(config.batch_size, config.grad_accum, process_count)
        raise ConfigError(
            f"{problem}: {batch_size} in a forward pass, whose rows the loss of task {config.task}"
            " compares",
            f"{config.batch_size} in a forward pass",
            _division_advice(process_count),
        )
    return config.model_copy(update={"batch_size": batch_size, "grad_accum": pass_count})


def check_divided_settings(
    config: TrainConfig,
    process_count: int,
    needs_reference: bool = False,
    invocation_tokens: tuple[int, ...] = (),
) -> None:
    """Raise `ConfigError` for settings that do not work if the base is divided over `process_count`
    processes: sharded (`parallel` fsdp) or with matrices cut between them (tp). Also raise it for a
    `shard_size` that does not divide the number of processes.

    Args:
        needs_reference: whether the loss compares the model with a reference policy.
        invocation_tokens: those of the adapter that the run trains further.
    """
    from veneer.models.locate import config_of

    settings_in_use = {
        "quantize": config.quantize,
        "a quantised base": (
            getattr(config_of(config.base), "quantization_config", None) is not None
        ),
        "cache_lower": config.cache_lower,
        "device_map": config.device_map,
        "task grpo": config.task == "grpo",
        "early_stopping": config.early_stopping,
        "invocation": config.invocation is not None or invocation_tokens,
        "a preference from adapter": needs_reference and config.adapter is not None,
    }
    for setting_name, reason in UNSUPPORTED_SETTINGS[config.parallel].items():
        if settings_in_use[setting_name]:
            raise ConfigError(
                f"parallel {config.parallel} with {setting_name}: {reason}",
                "one of them",
                "set parallel to ddp, or leave the other out",
            )
    if config.shard_size is not None and process_count % config.shard_size:
        raise ConfigError(
            f"shard_size {config.shard_size} of {process_count} processes",
            "a number that divides them",
            "set it to the processes of a machine",
        )


def split_step(batch_size: int, grad_accum: int, process_count: int) -> tuple[int, int]:
    """Divide the `batch_size` · `grad_accum` examples of a step among `process_count` processes.
    Returns (examples per forward pass, forward passes per step) of each process: the fewest passes
    of equal size with at most `batch_size` examples. Raises `ConfigError` if the processes cannot
    get equally many examples."""
    share_size, remainder = divmod(batch_size * grad_accum, process_count)
    if remainder:
        raise ConfigError(
            _describe_step(batch_size, grad_accum, process_count),
            "as many for each process",
            _division_advice(process_count),
        )
    passes = next(
        passes
        for passes in range(1, share_size + 1)
        if share_size % passes == 0 and share_size // passes <= batch_size
    )
    return share_size // passes, passes


def _describe_step(batch_size: int, grad_accum: int, process_count: int) -> str:
    return (
        f"batch_size {batch_size} × grad_accum {grad_accum} = {batch_size * grad_accum} examples a"
        f" step, over {process_count} processes"
    )


def _division_advice(process_count: int) -> str:
    return f"set grad_accum to a multiple of {process_count}, or start another number of processes"
