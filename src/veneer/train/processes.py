"""A run in several processes, as torchrun starts them.

    a step      batch_size · grad_accum examples, however many processes there are: each computes its share
    gradients   averaged over the processes once a step: nothing else travels
    files       the first process writes; it alone prints

Every process does everything else: it reads the data and the base, and attaches the adapter. They
do so stage by stage, and a stage ends with one outcome: all are through, or all raise what one of
them met (`distributed.Ranks`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from veneer.errors import ConfigError, TrainingError
from veneer.train.config import TrainConfig

if TYPE_CHECKING:
    from veneer.distributed import Ranks

T = TypeVar("T")

#: seconds that a process waits for the others: one may read a base from a slower disk
PATIENCE = 3600.0
#: where a launcher's store says which run its processes have finished
FINISHED = "veneer/finished"
#: what a base that is divided over the processes cannot do, and why, by the setting `parallel`
UNDIVIDED = {
    "fsdp": {
        "quantize": "packed weights are not spread", "a quantised base": "packed weights are not spread",
        "cache_lower": "its blocks run for a row at a time, in one process and not in another",
        "task grpo": "answers of different lengths take different numbers of passes",
    },
    "tp": {
        "quantize": "packed weights are not cut", "a quantised base": "packed weights are not cut",
        "cache_lower": "its blocks would have to be cut as well", "device_map": "each process has a device",
        "task grpo": "its answers have not been tried on a model that is cut",
        "a preference from adapter": "the base is cut before that adapter is there once more, as it was",
    },
}  # fmt: skip
#: what a launcher tells a process
TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """Those of one run. A run in one process has no `ranks`, and waits for nobody. `same_rows`:
    each computes on all rows, with a part of the base, instead of on its share of them."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks, self.same_rows, self.parent = ranks, False, os.getppid()

    @property
    def count(self) -> int:
        return 1 if self.ranks is None else len(self.ranks.members)

    @property
    def rank(self) -> int:
        return 0 if self.ranks is None else self.ranks.rank

    @property
    def shares(self) -> int:
        """Into how many the rows of a step are divided."""
        return 1 if self.same_rows else self.count

    @property
    def share(self) -> int:
        """Which of them this process has."""
        return 0 if self.same_rows else self.rank

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.ranks is None or self.ranks.writes

    def must_have_parent(self) -> None:
        """`TrainingError` if what started this process is gone: started again, it would start
        others beside this one, which write to the same output."""
        if self.ranks is not None and os.getppid() != self.parent:
            do = "start it again: it goes on from the last checkpoint"
            raise TrainingError(
                "the launcher of this process is gone", "torchrun, until the end", do
            )

    def each(
        self, work: Callable[[], T], summary: Callable[[T], str] = lambda _: "", what: str = ""
    ) -> T:
        """As `Ranks.each`."""
        return work() if self.ranks is None else self.ranks.each(work, summary, what)

    def one(self, work: Callable[[], Any]) -> Any:
        """As `Ranks.one`: what `work` gives must be a JSON value."""
        return work() if self.ranks is None else self.ranks.one(work)


def join() -> Processes:
    """The processes that a launcher started, which find each other here; or this one, if there was
    none.

    Raises:
        ConfigError: the environment names several, and not where they meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        # accelerate would make one process a group, and wrap the model into DDP
        os.environ.pop("LOCAL_RANK", None)
        return Processes()
    if missing := [name for name in TOLD if name not in os.environ]:
        problem = f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}"
        raise ConfigError(
            problem, "what torchrun sets", "start the run with torchrun, or unset WORLD_SIZE"
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from veneer.distributed import everyone

    if not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():  # gloo for what lies in main memory
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=PATIENCE)
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        store = meeting(store, rank, count)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    return Processes(everyone("train", PATIENCE))


def meeting(store: Any, rank: int, count: int, patience: float = PATIENCE) -> Any:
    """A part of `store` for these processes alone, which holds nothing yet. torchrun's store
    outlives the processes that it starts again and keeps what they wrote: torch 2.13 would connect
    to their addresses. Machines count restarts each for itself, so the first process gives the part
    a name. Each other one writes a number of its own under the name that it finds, and knows that
    it is none of an earlier start once its number is among those listed there.

    Raises:
        TrainingError: some do not come in time.
    """
    from torch._C._distributed_c10d import PrefixStore

    from veneer.distributed import awaited

    own, deadline = uuid4().hex, time.monotonic() + patience
    if rank == 0:
        keys = [f"veneer/{own}/{other}" for other in range(1, count)]
        store.set("veneer/start", own)
        if absent := awaited(store, keys, patience):
            raise _alone(f"{len(absent)} of {len(keys)} other processes did not come", patience)
        store.set(f"veneer/{own}/all", json.dumps([store.get(key).decode() for key in keys]))
        return PrefixStore(own, store)
    while time.monotonic() < deadline:
        if store.check(["veneer/start"]):
            name = store.get("veneer/start").decode()
            store.set(f"veneer/{name}/{rank}", own)
            if store.check([f"veneer/{name}/all"]) and own in json.loads(
                store.get(f"veneer/{name}/all")
            ):
                return PrefixStore(name, store)
        time.sleep(0.02)
    raise _alone("the first process did not come", patience)


def _alone(found: str, patience: float) -> TrainingError:
    return TrainingError(
        f"{found} within {patience:g} s",
        "all of them",
        "see what they printed, on their machines too",
    )


def leave(output: str) -> None:
    """Leave the others, after a run that all of them ended, and whose result, if it has one, is in
    `output`."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if dist.get_rank() == 0:
            _launchers_store().set(FINISHED, output)
        dist.barrier()
        dist.destroy_process_group()


def finished_before(output: str) -> bool:
    """Whether processes of the same launcher have finished the run in `output`: one of them failed
    as it left, so all were started again."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    store = _launchers_store()
    return store.check([FINISHED]) and store.get(FINISHED).decode() == output


def _launchers_store() -> Any:
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def share(config: TrainConfig, processes: int, *, compares_rows: bool) -> TrainConfig:
    """The configuration of one of several processes, in whose steps all of them together see as
    many examples as `config` says (`divided`).

    Args:
        compares_rows: the loss compares the examples of one forward pass, so their number must
            stay.

    Raises:
        ConfigError: the examples of a step do not divide.
    """
    if processes == 1:
        return config
    if config.device_map is not None:
        found = f"device_map over {processes} processes, each of which has a device"
        raise ConfigError(found, "one of the two", "leave out device_map, or run without torchrun")
    rows, passes = divided(config.batch_size, config.grad_accum, processes)
    if compares_rows and rows != config.batch_size:
        found = (
            f"{_step(config.batch_size, config.grad_accum, processes)}: {rows} in a forward pass,"
            " whose rows "
        )
        found += f"the loss of task {config.task} compares"
        raise ConfigError(found, f"{config.batch_size} in a forward pass", _advice(processes))
    return config.model_copy(update={"batch_size": rows, "grad_accum": passes})


def must_divide(config: TrainConfig, count: int, refers: bool = False) -> None:
    """Raises `ConfigError` for what does not work on a base that is spread (fsdp) or cut (tp) over
    `count` processes. ``refers``: whether the loss measures from a reference."""
    from veneer.models.locate import config_of

    there = {
        "quantize": config.quantize,
        "a quantised base": (
            getattr(config_of(config.base), "quantization_config", None) is not None
        ),
        "cache_lower": config.cache_lower,
        "device_map": config.device_map,
        "task grpo": config.task == "grpo",
        "a preference from adapter": refers and config.adapter is not None,
    }
    for name, why in UNDIVIDED[config.parallel].items():
        if there[name]:
            problem = f"parallel {config.parallel} with {name}: {why}"
            raise ConfigError(problem, "one of them", "set parallel to ddp, or leave the other out")
    if config.shard_size is not None and count % config.shard_size:
        problem = f"shard_size {config.shard_size} of {count} processes"
        raise ConfigError(
            problem, "a number that divides them", "set it to the processes of a machine"
        )


def divided(batch_size: int, grad_accum: int, processes: int) -> tuple[int, int]:
    """(examples of a forward pass, forward passes) in a step of one of several processes that share
    the examples: as few passes as hold `batch_size` examples at most. `ConfigError`: they do not
    divide."""
    own, rest = divmod(batch_size * grad_accum, processes)
    if rest:
        raise ConfigError(
            _step(batch_size, grad_accum, processes), "as many for each process", _advice(processes)
        )
    passes = next(n for n in range(1, own + 1) if own % n == 0 and own // n <= batch_size)
    return own // passes, passes


def _step(batch_size: int, grad_accum: int, processes: int) -> str:
    examples = (
        f"batch_size {batch_size} × grad_accum {grad_accum} = {batch_size * grad_accum} examples a"
        " step"
    )
    return f"{examples}, over {processes} processes"


def _advice(processes: int) -> str:
    return f"set grad_accum to a multiple of {processes}, or start another number of processes"
