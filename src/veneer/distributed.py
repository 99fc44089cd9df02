"""Several processes that hold one model: which weights are spread over them, and how they do one
thing together.

    is_sharded(tensor), whole(tensor)       a DTensor, as FSDP2 and tensor parallelism make them; all of its numbers
    ranks = meet("save …", …)               every rank that holds the model has come; None where there is no other
    ranks = everyone("train", patience)     all ranks, which are known to come
    ranks.each(work, summary)               on every rank, with one outcome: all have it, or one error on all
    ranks.one(work)                         on the first rank, with its outcome on all
    average_gradients(parameters)           what each rank has its own of: one all-reduce

What is said goes through the store of ``torch.distributed``, not through collectives: so a rank
that stays away or fails becomes an error on the others, instead of a hang. Gathering a weight is a
collective; within ``Ranks.each`` it begins only once every rank stands before it (``Ranks.gate``).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer import errors
from veneer.errors import AdapterError, VeneerError, listing, sentence

T = TypeVar("T")

#: seconds for which a rank waits for the others
PATIENCE = 300.0
#: seconds for which the first rank waits before it concludes that it was called alone, where
#: nothing is spread
ALONE = 30.0

#: the ranks whose ``each`` is running
_WITHIN: ContextVar[Ranks | None] = ContextVar("veneer_ranks", default=None)
#: by who takes part: how many meetings this process has had
_MET: dict[str, int] = {}


class SavedAlone(UserWarning):
    """Of several processes, one alone saved a model that each of them holds: nobody compared it
    with the others."""


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one of torch's DTensors. Loads nothing: where there is one, its module is
    loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Any:
    """All numbers of a tensor that may be spread over processes: then a collective, which each of
    them must call."""
    if not is_sharded(tensor):
        return tensor
    ranks = _WITHIN.get()
    if ranks is not None:
        ranks.gate()
    return tensor.full_tensor()


def together() -> bool:
    """Whether every rank does what runs here, with one outcome (``Ranks.each``)."""
    return _WITHIN.get() is not None


def _fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    loaded = sys.modules.get("torch.distributed.fsdp")
    return [] if loaded is None else [one for one in modules if isinstance(one, loaded.FSDPModule)]


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module, without the one that ``fully_shard`` puts in front of it."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return kind.__mro__[2] if loaded is not None and issubclass(kind, loaded.FSDPModule) else kind


def is_spread(modules: Iterable[nn.Module]) -> bool:
    """Whether weights of these modules are spread over processes, also while FSDP2 has some of them
    gathered."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    modules = list(modules)
    return any(is_sharded(own) for one in modules for own in one._parameters.values()) or bool(
        _fsdp_modules(modules)
    )


def spread_problem(modules: Iterable[nn.Module], what: str, do: str) -> str | None:
    """The problem of an operation that needs whole weights, or None."""
    modules = list(modules)
    if has_fsdp1(modules):
        problem = f"{what} of a model in torch's first FullyShardedDataParallel (FSDP1)"
        return sentence(
            problem,
            "whole weights",
            f"{do}; FSDP2 (torch.distributed.fsdp.fully_shard) shards what is attached",
        )
    problem = (
        f"{what} of a model whose weights are spread over processes (DTensor, as FSDP2 makes them)"
    )
    return sentence(problem, "whole weights", do) if is_spread(modules) else None


def has_fsdp1(modules: Iterable[nn.Module]) -> bool:
    """Whether a module is wrapped by FSDP1, or its parameters are parts of a flat one that FSDP1
    made of them."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return False
    return any(
        isinstance(module, loaded.FullyShardedDataParallel)
        or any(
            getattr(parameter, "_fsdp_flattened", False)
            for parameter in module._parameters.values()
        )
        for module in modules
    )


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 has gathered: after a forward that no backward followed it may be older
    than the shards."""
    for module in _fsdp_modules(model.modules()):
        module.reshard()


def meet(path: str, model: nn.Module, *, alone: bool) -> Ranks | None:
    """The ranks that hold a model, once all of them have come to save it at ``path``; None for a
    rank that saves by itself: the only one, one that was told so (``alone``), or one that the
    others leave waiting. ``AdapterError``: the weights are spread, and not every rank comes in
    time, comes to the same path, or may come."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    sharded: list[Any] = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    meshes = [parameter.device_mesh for parameter in sharded]
    members = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}) or range(
        dist.get_world_size()
    )
    if len(members) < 2 or (alone and not meshes):
        return None
    if alone:
        problem = "alone=True of a model whose weights are spread over processes"
        raise AdapterError(
            problem, "a call on every rank", "call save on every rank, without alone"
        )
    store = dist.distributed_c10d._get_default_store()
    if store is None and meshes:
        problem = (
            f"a process group of {dist.get_backend()} without a store, and weights that are spread"
            " over it"
        )
        raise AdapterError(problem, "gloo or nccl", "initialise torch.distributed with one of them")
    if store is None:  # MPI has none
        return None
    return _met(store, members, path, spread=bool(meshes))


def _met(store: Any, members: Sequence[int], path: str, *, spread: bool) -> Ranks | None:
    """Who comes is written down; whether all have come is decided once, for all: ``compare_set``
    lets one win."""
    who, own = hashlib.sha256(json.dumps([*members]).encode()).hexdigest()[:16], dist.get_rank()

    def warn(found: str) -> None:
        do = (
            "call save on every rank at about the same time, or on one with alone=True, which does"
            " not wait"
        )
        warnings.warn(
            sentence(found, "a call on every rank, which compares them", do),
            SavedAlone,
            stacklevel=5,
        )

    limit = ALONE if own == members[0] and not spread else PATIENCE
    while True:
        number = _MET.get(who, 0)
        _MET[who] = number + 1
        key = f"veneer/{who}/{number}"
        come = {rank: f"{key}/come/{rank}" for rank in members}
        ended = store.check([f"{key}/decided"]) and store.get(f"{key}/decided").decode() == "left"
        left = {
            rank: store.get(at).decode() for rank, at in come.items() if ended and store.check([at])
        }
        if not ended or path in left.values():
            break  # else it was another save, which this rank took no part in
    if ended and not spread:
        warn(f"{path}, which rank {listing(map(str, left))} saved before rank {own} came")
        return Ranks(store, key, ())
    store.set(come[own], path)
    absent = awaited(store, [*come.values()], limit, f"{key}/decided")
    decided = store.compare_set(f"{key}/decided", "", "left" if absent else "all").decode()
    here = [rank for rank in members if decided == "all" or store.check([come[rank]])]
    paths = {rank: store.get(come[rank]).decode() for rank in here}
    same = len(set(paths.values())) == 1
    if decided == "all" and same:
        return Ranks(store, key, members)
    if spread or (same and len(here) > 1):
        found = f"rank {listing(map(str, here))} of {len(members)} alone, after up to {limit:g} s"
        found = (
            found
            if same
            else f"other paths on other ranks ({listing(f'{r}: {p}' for r, p in paths.items())})"
        )
        do = "let every rank that holds the model call save, with the same path"
        raise AdapterError(f"{path} was not written. {sentence(found, 'every rank', do)}")
    if len(here) == 1:
        warn(f"{path} saved by rank {own} of {len(members)} alone, after {limit:g} s")
    return None


def everyone(name: str, patience: float) -> Ranks:
    """All ranks of ``torch.distributed``, which work together for long: each waits ``patience``
    seconds for another one. ``name``: of what they do, in which each process meets equally
    often."""
    number = _MET.get(name, 0)
    _MET[name] = number + 1
    store = dist.distributed_c10d._get_default_store()
    return Ranks(store, f"veneer/{name}/{number}", range(dist.get_world_size()), patience)


class Ranks:
    """The ranks of one meeting. ``writes`` is true on the one that writes files; of no members, on
    none."""

    def __init__(
        self, store: Any, key: str, members: Sequence[int], patience: float | None = None
    ) -> None:
        self.store, self.key, self.members = store, key, members
        self.patience = PATIENCE if patience is None else patience
        self.rank = dist.get_rank()
        self.writes = self.rank in members[:1]
        self.step = self.gates = 0

    def each(self, work: Callable[[], T], summary: Callable[[T], str], what: str) -> T:
        """What ``work`` gives on this rank, if it succeeds on every one and they agree.

        Args:
            summary: a short text of the result, which must be the same on every rank.
            what: what they would disagree on, in words.

        Raises:
            what ``work`` raises: here at once, on the other ranks as the same kind of error.
            AdapterError: the summaries differ, or a rank does not answer.
        """
        self.step, self.gates = self.step + 1, 0
        here, keys = (
            f"{self.key}/{self.step}/{self.rank}",
            {f"{self.key}/{self.step}/{r}": r for r in self.members},
        )
        token = _WITHIN.set(self)
        try:
            result = work()
            # never empty, which not every store tells from nothing
            own = json.dumps(summary(result))
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            _WITHIN.reset(token)
        self.store.set(here, own)
        absent = awaited(self.store, [*keys], self.patience, self._failed)
        self._raise_failed()
        if absent:
            missing = listing(str(keys[key]) for key in absent)
            problem = f"no answer from rank {missing} within {self.patience:g} s"
            raise AdapterError(
                problem, "one from every rank", "see what that rank printed; it may be gone"
            )
        groups: dict[str, list[int]] = {}
        for key, rank in keys.items():
            groups.setdefault(json.loads(self.store.get(key)), []).append(rank)
        if len(groups) > 1:
            parted = " and ".join(
                f"{text[:12]} on rank {listing(map(str, ranks))}" for text, ranks in groups.items()
            )
            do = (
                "look for what differs by rank: a seed, gradients that are not averaged, a base"
                " that was loaded anew"
            )
            error = AdapterError(f"{what} that differs by rank ({parted})", "one on all ranks", do)
            error.told_elsewhere = not self.writes
            raise error
        return result

    def one(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on the first rank, a JSON value, on every one. Raises as ``each``."""
        place = f"{self.key}/{self.step + 1}/value"
        self.each(
            lambda: self.store.set(place, json.dumps(work())) if self.writes else None,
            lambda _: "",
            "",
        )
        return json.loads(self.store.get(place))

    def _fail(self, error: BaseException) -> None:
        """Let the others know. Where one failed before this rank, its error is the one that is
        told; what came of it here, such as a connection that it closed, is not another one."""
        own = {"rank": self.rank, "error": type(error).__name__, "text": str(error)}
        first = json.loads(self.store.compare_set(self._failed, "", json.dumps(own)))
        if "told_elsewhere" in vars(error) or not isinstance(error, Exception):
            return  # it went through another ``each`` within this one
        elsewhere = first["rank"] != self.rank
        if elsewhere and not isinstance(error, VeneerError | OSError):
            raise _error(first) from error
        alike = first == {**own, "rank": first["rank"]}
        error.told_elsewhere = elsewhere and alike  # pyright: ignore[reportAttributeAccessIssue]

    def gate(self) -> None:
        """Wait until every rank stands here, before what all of them must do at once.

        Raises:
            what a rank raised that will not come; AdapterError: one does not come in time.
        """
        if not self.members:
            return
        self.gates += 1
        key, deadline, pause = (
            f"{self.key}/{self.step}/gate/{self.gates}",
            time.monotonic() + self.patience,
            0.001,
        )
        count = self.store.add(key, 1)
        while count < len(self.members):
            self._raise_failed()
            if time.monotonic() > deadline:
                problem = (
                    f"{count} of {len(self.members)} ranks at the gathering of a weight after"
                    f" {self.patience:g} s"
                )
                raise AdapterError(
                    problem, "all of them", "see what the others printed; one may be gone"
                )
            time.sleep(pause)
            pause, count = min(2 * pause, 0.1), self.store.add(key, 0)

    def _raise_failed(self) -> None:
        """Raise what another rank raised first, wherever it was: it comes no more."""
        if self.store.check([self._failed]):
            raise _error(json.loads(self.store.get(self._failed)))

    @property
    def _failed(self) -> str:
        return f"{self.key}/failed"


def _error(first: dict[str, Any]) -> VeneerError:
    """The error of the rank that failed first, as the others raise it."""
    error = getattr(errors, first["error"], AdapterError)(
        f"On rank {first['rank']}: {first['text'] or first['error']}"
    )
    error.told_elsewhere = True
    return error


def awaited(store: Any, keys: Sequence[str], seconds: float, stop: str | None = None) -> list[str]:
    """Which keys a store still lacks when all are there, when ``stop`` is, or when the time is
    over."""
    deadline, pause = time.monotonic() + seconds, 0.002
    absent = [*keys]
    while True:
        absent = [key for key in absent if not store.check([key])]
        if not absent or time.monotonic() > deadline:
            return absent
        if stop is not None and store.check([stop]):
            # what was there before it, too
            return [key for key in absent if not store.check([key])]
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


@torch.no_grad()
def whole_values(values: Iterable[Tensor | None]) -> dict[int, Tensor]:
    """All numbers of those tensors that are spread, by the identity of the tensor."""
    return {
        id(value): whole(value.detach())
        for value in values
        if is_sharded(value) and value is not None
    }


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter the mean of its gradients on all ranks: one all-reduce, in float32
    (float64 for those). Where a rank has no gradient, it counts as zeros; where none has, there is
    none."""
    own = [parameter.grad for parameter in parameters]
    device, wide = parameters[0].device, torch.float32
    if any(parameter.dtype == torch.float64 for parameter in parameters):
        wide = torch.float64
    sizes = [*(parameter.numel() for parameter in parameters), len(own)]
    flat = torch.zeros(sum(sizes), dtype=wide, device=device)
    *parts, counts = flat.split(sizes)
    here = [gradient is not None for gradient in own]
    counts.copy_(torch.tensor(here))
    for part, gradient in zip(parts, own, strict=True):
        if gradient is not None:
            part.copy_(gradient.flatten())
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    # only where a gradient is missing does the host ask the device about the others'
    there = here if all(here) else counts.tolist()
    for parameter, part, some in zip(parameters, parts, there, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if some else None
