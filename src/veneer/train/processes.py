"""A run in several processes, as torchrun starts them.

    a step      batch_size · grad_accum examples, however many processes there are: each computes its share
    gradients   averaged over the processes once a step: nothing else travels
    files       the first process writes; it alone prints

Every process does everything else: it reads the data and the base, and attaches the adapter. They do so stage by stage,
and a stage ends with one outcome: all are through, or all raise what one of them met (`distributed.Ranks`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from veneer.errors import ConfigError
from veneer.train.config import TrainConfig

if TYPE_CHECKING:
    from veneer.distributed import Ranks

T = TypeVar("T")

#: seconds that a process waits for the others: one may read a base from a slower disk
PATIENCE = 3600.0
#: what a launcher tells a process
TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """Those of one run. A run in one process has no `ranks`, and waits for nobody. `same_rows`: each computes on all
    rows, with a part of the base, instead of on its share of them."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks, self.same_rows = ranks, False

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

    def each(self, work: Callable[[], T], summary: Callable[[T], str] = lambda _: "", what: str = "") -> T:
        """As `Ranks.each`."""
        return work() if self.ranks is None else self.ranks.each(work, summary, what)

    def one(self, work: Callable[[], Any]) -> Any:
        """As `Ranks.one`: what `work` gives must be a JSON value."""
        return work() if self.ranks is None else self.ranks.one(work)


def join() -> Processes:
    """The processes that a launcher started, which find each other here; or this one, if there was none.

    Raises:
        ConfigError: the environment names several, and not where they meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    if missing := [name for name in TOLD if name not in os.environ]:
        found = f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}"
        raise ConfigError(found, "what torchrun sets", "start the run with torchrun, or unset WORLD_SIZE")
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from veneer.distributed import everyone

    if not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():  # gloo for what lies in main memory
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=PATIENCE)
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun's store outlives processes that it starts again, and holds what those before them wrote: torch
            # 2.13 would connect to their addresses. Nodes count restarts each for itself: several need a new store.
            store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    return Processes(everyone("train", PATIENCE))


def leave() -> None:
    """Leave the others, after a run that all of them ended."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def share(config: TrainConfig, processes: int, *, compares_rows: bool) -> TrainConfig:
    """The configuration of one of several processes, in whose steps all of them together see as many examples as
    `config` says: as few forward passes as hold `batch_size` examples at most.

    Args:
        compares_rows: the loss compares the examples of one forward pass, so their number must stay.

    Raises:
        ConfigError: the examples of a step do not divide.
    """
    if processes == 1:
        return config
    step = config.batch_size * config.grad_accum
    do = f"set grad_accum to a multiple of {processes}, or start another number of processes"
    per_step = f"batch_size {config.batch_size} × grad_accum {config.grad_accum} = {step} examples a step"
    if config.device_map is not None:
        found = f"device_map over {processes} processes, each of which has a device"
        raise ConfigError(found, "one of the two", "leave out device_map, or run without torchrun")
    if step % processes:
        raise ConfigError(f"{per_step}, over {processes} processes", "as many for each process", do)
    own = step // processes
    passes = next(n for n in range(1, own + 1) if own % n == 0 and own // n <= config.batch_size)
    if compares_rows and own // passes != config.batch_size:
        found = f"{per_step}, over {processes} processes: {own // passes} in a forward pass, whose rows "
        found += f"the loss of task {config.task} compares"
        raise ConfigError(found, f"{config.batch_size} in a forward pass", do)
    return config.model_copy(update={"batch_size": own // passes, "grad_accum": passes})
