"""Several processes that hold one model: which weights are sharded, and how all ranks run one
operation that succeeds on all of them or on none.

    is_sharded(tensor), full_tensor(tensor)   whether it is a DTensor (FSDP2, TP); all its values
    ranks = meet_ranks(path, model, alone=…)  ranks that save a model; None if this rank is alone
    ranks = all_ranks("train", patience)      all ranks of torch.distributed; each must call it
    with ranks.joint_work(subject):           run a block on every rank: all succeed, or all raise
    ranks.run_on_first(work)                  run on the first rank; every rank gets its result
    average_gradients(parameters)             average over the ranks, in one all-reduce

Ranks exchange messages through the store of ``torch.distributed``, not through collectives. So if
one rank fails or never calls, the other ranks raise an error instead of hanging. Gathering a weight
is a collective, so within ``Ranks.joint_work`` it begins only after every rank has reached it
(``Ranks.wait_for_every_rank``).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer import errors
from veneer.errors import AdapterError, VeneerError, listing, sentence

#: seconds that a rank waits for the others before it raises an error
PATIENCE = 300.0
#: seconds after which the first rank concludes that no other rank saves the model, if no weight is
#: sharded
SOLO_PATIENCE = 30.0

#: the ranks whose ``joint_work`` is running
_CURRENT_RANKS: ContextVar[Ranks | None] = ContextVar("veneer_ranks", default=None)
#: how many meetings (``meet_ranks``, ``all_ranks``) this process took part in, by the name of the
#: meeting or the hash of its ranks
_MEETING_COUNTS: dict[str, int] = {}


class SavedAlone(UserWarning):
    """Only one of several processes that hold a model saved it, so its copy was not compared with
    the copies of the other processes."""


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor of torch. The function does not import torch's module of
    DTensors, because the module is already imported if a DTensor exists."""
    dtensor_module = sys.modules.get("torch.distributed.tensor")
    return dtensor_module is not None and isinstance(tensor, dtensor_module.DTensor)


def full_tensor(tensor: Any) -> Any:
    """All values of a tensor that may be sharded. For a sharded tensor every rank must call this
    function, because it runs a collective. Within ``Ranks.joint_work`` it first waits for every
    rank, so that a rank that fails causes an error instead of a hang."""
    if not is_sharded(tensor):
        return tensor
    ranks = _CURRENT_RANKS.get()
    if ranks is not None:
        ranks.wait_for_every_rank()
    return tensor.full_tensor()


def within_joint_work() -> bool:
    """Whether the current code runs within ``Ranks.joint_work``."""
    return _CURRENT_RANKS.get() is not None


def _fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    fsdp_package = sys.modules.get("torch.distributed.fsdp")
    return (
        []
        if fsdp_package is None
        else [module for module in modules if isinstance(module, fsdp_package.FSDPModule)]
    )


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before adapters were attached and before ``fully_shard`` gave it
    a subclass, of which ``__mro__`` is [subclass, FSDPModule, original class, …]."""
    module_class = getattr(type(module), "veneer_base", type(module))
    fsdp_package = sys.modules.get("torch.distributed.fsdp")
    is_fsdp_class = fsdp_package is not None and issubclass(module_class, fsdp_package.FSDPModule)
    return module_class.__mro__[2] if is_fsdp_class else module_class


def is_spread(modules: Iterable[nn.Module]) -> bool:
    """Whether weights of these modules are sharded over processes. The result stays True while
    FSDP2 has gathered the full weights."""
    modules = list(modules)
    return any(
        is_sharded(parameter) for module in modules for parameter in module._parameters.values()
    ) or bool(_fsdp_modules(modules))


def spread_problem(modules: Iterable[nn.Module], operation: str, advice: str) -> str | None:
    """The error message for an operation that needs full weights; None if the weights of
    ``modules`` are not sharded.

    Args:
        operation: the name of the operation, which begins the message.
        advice: the advice at the end of the message.
    """
    modules = list(modules)
    if has_fsdp1(modules):
        problem = f"{operation} of a model in torch's first FullyShardedDataParallel (FSDP1)"
        return sentence(
            problem,
            "whole weights",
            f"{advice}; FSDP2 (torch.distributed.fsdp.fully_shard) shards what is attached",
        )
    problem = (
        f"{operation} of a model whose weights are spread over processes (DTensor, as FSDP2 makes"
        " them)"
    )
    return sentence(problem, "whole weights", advice) if is_spread(modules) else None


def has_fsdp1(modules: Iterable[nn.Module]) -> bool:
    """Whether one of ``modules`` is a wrapper of FSDP1, or has a parameter that is a view into a
    flat parameter of FSDP1."""
    fsdp_package = sys.modules.get("torch.distributed.fsdp")
    if fsdp_package is None:
        return False
    return any(
        isinstance(module, fsdp_package.FullyShardedDataParallel)
        or any(
            getattr(parameter, "_fsdp_flattened", False)
            for parameter in module._parameters.values()
        )
        for module in modules
    )


def reshard(model: nn.Module) -> None:
    """Free the full weights that FSDP2 gathered for a forward. If no backward follows, FSDP2 keeps
    them, and they may be older than the shards."""
    for module in _fsdp_modules(model.modules()):
        module.reshard()


def meet_ranks(path: str, model: nn.Module, *, alone: bool) -> Ranks | None:
    """Wait until all ranks that hold a model have called this function to save it at ``path``.

    Args:
        alone: only this rank saves the model, so it does not wait.

    Returns:
        the ranks; None if this rank saves the model without the others: because it is the only
        rank, ``alone`` is set, no other rank calls in time, or the others save an unsharded model
        to other paths. If another rank has already saved the unsharded model to ``path``, the
        result is a ``Ranks`` without members, with which this rank writes nothing.

    Raises:
        AdapterError: the weights are sharded, and either ``alone`` is set or not all ranks call in
            time with the same path; or the weights are not sharded, and more than one rank, but not
            all of them, call in time with the same path.

    Warns:
        SavedAlone: no other rank called in time, or another rank has saved to ``path`` already.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    sharded_parameters: list[Any] = [
        parameter for parameter in model.parameters() if is_sharded(parameter)
    ]
    meshes = [parameter.device_mesh for parameter in sharded_parameters]
    mesh_ranks = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
    member_ranks = mesh_ranks or range(dist.get_world_size())
    if len(member_ranks) < 2 or (alone and not meshes):
        return None
    if alone:
        raise AdapterError(
            "alone=True of a model whose weights are spread over processes",
            "a call on every rank",
            "call save on every rank, without alone",
        )
    store = dist.distributed_c10d._get_default_store()
    return _arrive(store, member_ranks, path, sharded=bool(meshes))


def _arrive(store: Any, member_ranks: Sequence[int], path: str, *, sharded: bool) -> Ranks | None:
    """Record in the store that this rank has called ``meet_ranks``, and wait for the other ranks.
    An atomic ``compare_set`` decides once for all ranks whether every rank has called. Result and
    errors are those of ``meet_ranks``. ``sharded``: whether weights of the model are sharded."""
    this_rank = dist.get_rank()

    def warn(problem: str) -> None:
        message = sentence(
            problem,
            "a call on every rank, which compares them",
            "call save on every rank at about the same time, or on one with alone=True, which does"
            " not wait",
        )
        warnings.warn(message, SavedAlone, stacklevel=5)

    meeting_key, arrival_keys, earlier_paths = _next_meeting(store, member_ranks, path)
    if earlier_paths and not sharded:
        earlier_ranks_text = listing(map(str, earlier_paths))
        warn(f"{path}, which rank {earlier_ranks_text} saved before rank {this_rank} came")
        return Ranks(store, meeting_key, ())
    waits_briefly = this_rank == member_ranks[0] and not sharded
    patience = SOLO_PATIENCE if waits_briefly else PATIENCE
    store.set(arrival_keys[this_rank], path)
    decision_key = f"{meeting_key}/decided"
    missing_keys = wait_for_keys(store, [*arrival_keys.values()], patience, decision_key)
    decision = store.compare_set(decision_key, "", "left" if missing_keys else "all").decode()
    present_ranks = [
        rank for rank in member_ranks if decision == "all" or store.check([arrival_keys[rank]])
    ]
    paths = {rank: store.get(arrival_keys[rank]).decode() for rank in present_ranks}
    same_path = len(set(paths.values())) == 1
    if decision == "all" and same_path:
        return Ranks(store, meeting_key, member_ranks)
    if sharded or (same_path and len(present_ranks) > 1):
        if same_path:
            ranks_text = listing(map(str, present_ranks))
            problem = f"rank {ranks_text} of {len(member_ranks)} alone, after up to {patience:g} s"
        else:
            paths_text = listing(f"{rank}: {rank_path}" for rank, rank_path in paths.items())
            problem = f"other paths on other ranks ({paths_text})"
        advice = "let every rank that holds the model call save, with the same path"
        raise AdapterError(f"{path} was not written. {sentence(problem, 'every rank', advice)}")
    if len(present_ranks) == 1:
        warn(f"{path} saved by rank {this_rank} of {len(member_ranks)} alone, after {patience:g} s")
    return None


def _next_meeting(
    store: Any, member_ranks: Sequence[int], path: str
) -> tuple[str, dict[int, str], dict[int, str]]:
    """The meeting (one save by all ranks of ``member_ranks``) in which this rank takes part.

    Meetings for other paths that the other ranks ended without this rank are skipped.

    Returns:
        (the prefix of the meeting's keys in the store, the key of each rank's arrival by rank, the
        paths of the ranks that came before the meeting was ended without this rank, by rank). The
        last is empty unless a rank saved to ``path`` in that meeting.
    """
    ranks_hash = hashlib.sha256(json.dumps([*member_ranks]).encode()).hexdigest()[:16]
    while True:
        meeting_index = _MEETING_COUNTS.get(ranks_hash, 0)
        _MEETING_COUNTS[ranks_hash] = meeting_index + 1
        meeting_key = f"veneer/{ranks_hash}/{meeting_index}"
        arrival_keys = {rank: f"{meeting_key}/come/{rank}" for rank in member_ranks}
        decision_key = f"{meeting_key}/decided"
        if not store.check([decision_key]) or store.get(decision_key).decode() != "left":
            return meeting_key, arrival_keys, {}
        earlier_paths = {
            rank: store.get(arrival_key).decode()
            for rank, arrival_key in arrival_keys.items()
            if store.check([arrival_key])
        }
        if path in earlier_paths.values():
            return meeting_key, arrival_keys, earlier_paths


def all_ranks(name: str, patience: float) -> Ranks:
    """All ranks of ``torch.distributed``; each waits up to ``patience`` seconds for the others.
    Every process must call this function the same number of times with each ``name``, because the
    keys in the store contain the number of the call."""
    meeting_index = _MEETING_COUNTS.get(name, 0)
    _MEETING_COUNTS[name] = meeting_index + 1
    store = dist.distributed_c10d._get_default_store()
    return Ranks(store, f"veneer/{name}/{meeting_index}", range(dist.get_world_size()), patience)


class Ranks:
    """The ranks of one meeting (one call of ``meet_ranks`` or ``all_ranks`` on each rank), which
    run operations together.

    Attributes:
        store, key_prefix: the store of ``torch.distributed``, and the prefix of the meeting's keys
            in it.
        members: the ranks that take part.
        patience: seconds that a rank waits for the others.
        rank: the rank of this process.
        is_writer: whether this rank writes files. Only the first member does; without members, no
            rank does.
        operation_index: the number of operations so far; the keys in the store contain it.
        wait_count: how many times the running operation has called ``wait_for_every_rank``.
    """

    def __init__(
        self, store: Any, key_prefix: str, members: Sequence[int], patience: float | None = None
    ) -> None:
        self.store, self.key_prefix, self.members = store, key_prefix, members
        self.patience = PATIENCE if patience is None else patience
        self.rank = dist.get_rank()
        self.is_writer = self.rank in members[:1]
        self.operation_index = self.wait_count = 0

    @contextmanager
    def joint_work(self, subject: str = "") -> Iterator[Callable[..., None]]:
        """Run the block on every rank: it succeeds on all ranks, or all raise an error.

        Yields a function ``compare(summary, *result)``. The block may call it once, to compare the
        ranks: ``summary(*result)`` is a short text, which must be the same on every rank.

        Args:
            subject: the name of what is compared, in errors.

        Raises:
            the error of the block, on the rank where it failed; the other ranks raise an error of
                the same class.
            AdapterError: the summaries differ, or a rank does not answer.
        """
        self.operation_index, self.wait_count = self.operation_index + 1, 0
        summaries: list[str] = []
        token = _CURRENT_RANKS.set(self)
        try:
            yield lambda summary, *result: summaries.append(summary(*result))
        except BaseException as error:
            self._report_error(error)
            raise
        finally:
            _CURRENT_RANKS.reset(token)
        self._await_all("".join(summaries), subject)

    def _await_all(self, summary: str, subject: str) -> None:
        """Wait until every rank has ended the block of ``joint_work``, and compare the summaries.
        Raises the errors of ``joint_work``."""
        rank_of_key = {f"{self.key_prefix}/{self.operation_index}/{r}": r for r in self.members}
        # JSON is never empty: some stores cannot tell an empty value from a missing one
        self.store.set(f"{self.key_prefix}/{self.operation_index}/{self.rank}", json.dumps(summary))
        missing_keys = wait_for_keys(self.store, [*rank_of_key], self.patience, self._failure_key)
        self._raise_reported_error()
        if missing_keys:
            missing_ranks = listing(str(rank_of_key[key]) for key in missing_keys)
            raise AdapterError(
                f"no answer from rank {missing_ranks} within {self.patience:g} s",
                "one from every rank",
                "see what that rank printed; it may be gone",
            )
        ranks_by_summary: dict[str, list[int]] = {}
        for key, rank in rank_of_key.items():
            ranks_by_summary.setdefault(json.loads(self.store.get(key)), []).append(rank)
        if len(ranks_by_summary) > 1:
            differences = " and ".join(
                f"{summary_of_rank[:12]} on rank {listing(map(str, ranks))}"
                for summary_of_rank, ranks in ranks_by_summary.items()
            )
            error = AdapterError(
                f"{subject} that differs by rank ({differences})",
                "one on all ranks",
                "look for what differs by rank: a seed, gradients that are not averaged, a base"
                " that was loaded anew",
            )
            error.reported_elsewhere = not self.is_writer
            raise error

    def run_on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on the first rank and return its result, a JSON value, on every rank. Raises
        the errors of ``joint_work``."""
        value_key = f"{self.key_prefix}/{self.operation_index + 1}/value"
        with self.joint_work():
            if self.is_writer:
                self.store.set(value_key, json.dumps(work()))
        return json.loads(self.store.get(value_key))

    def _report_error(self, error: BaseException) -> None:
        """Report an error of this rank to the other ranks.

        If another rank has failed before, an error here that is neither a ``VeneerError`` nor an
        ``OSError`` is probably a consequence of that failure, so this method raises the error of
        the other rank."""
        report = {"rank": self.rank, "error": type(error).__name__, "text": str(error)}
        first_report = json.loads(self.store.compare_set(self._failure_key, "", json.dumps(report)))
        if "reported_elsewhere" in vars(error) or not isinstance(error, Exception):
            return  # a nested ``joint_work`` has reported it already
        failed_elsewhere = first_report["rank"] != self.rank
        if failed_elsewhere and not isinstance(error, VeneerError | OSError):
            raise _error_of_rank(first_report) from error
        same_error = first_report == {**report, "rank": first_report["rank"]}
        error.reported_elsewhere = (  # pyright: ignore[reportAttributeAccessIssue]
            failed_elsewhere and same_error
        )

    def wait_for_every_rank(self) -> None:
        """Wait until every rank has reached this call, so that a collective after it does not hang.

        Raises:
            the error of another rank, if one failed; AdapterError: a rank does not reach the call
                within ``patience`` seconds.
        """
        if not self.members:
            return
        self.wait_count += 1
        arrivals_key = f"{self.key_prefix}/{self.operation_index}/gate/{self.wait_count}"
        deadline = time.monotonic() + self.patience
        pause_seconds = 0.001
        arrived_count = self.store.add(arrivals_key, 1)
        while arrived_count < len(self.members):
            self._raise_reported_error()
            if time.monotonic() > deadline:
                raise AdapterError(
                    f"{arrived_count} of {len(self.members)} ranks at the gathering of a weight"
                    f" after {self.patience:g} s",
                    "all of them",
                    "see what the others printed; one may be gone",
                )
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 0.1)
            arrived_count = self.store.add(arrivals_key, 0)  # adding 0 reads the number

    def _raise_reported_error(self) -> None:
        """Raise the first error of another rank, if one has failed."""
        if self.store.check([self._failure_key]):
            raise _error_of_rank(json.loads(self.store.get(self._failure_key)))

    @property
    def _failure_key(self) -> str:
        return f"{self.key_prefix}/failed"


def _error_of_rank(report: dict[str, Any]) -> VeneerError:
    """The error of the rank that failed first, as the other ranks raise it."""
    error = getattr(errors, report["error"], AdapterError)(
        f"On rank {report['rank']}: {report['text'] or report['error']}"
    )
    error.reported_elsewhere = True
    return error


def wait_for_keys(
    store: Any, keys: Sequence[str], seconds: float, stop_key: str | None = None
) -> list[str]:
    """Wait until a store has all ``keys``, or has the key ``stop_key``, or ``seconds`` have passed.
    Returns the keys that the store still lacks."""
    deadline, pause_seconds = time.monotonic() + seconds, 0.002
    missing_keys = [*keys]
    while True:
        missing_keys = [key for key in missing_keys if not store.check([key])]
        if not missing_keys or time.monotonic() > deadline:
            return missing_keys
        if stop_key is not None and store.check([stop_key]):
            # check once more, because keys may have been set just before `stop_key`
            return [key for key in missing_keys if not store.check([key])]
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, 0.2)


@torch.no_grad()
def full_tensors(tensors: Iterable[Tensor | None]) -> dict[int, Tensor]:
    """The full tensor of each sharded tensor in ``tensors``, by the ``id`` of the sharded tensor.
    Every rank must call it (see ``full_tensor``)."""
    return {
        id(tensor): full_tensor(tensor.detach())
        for tensor in tensors
        if is_sharded(tensor) and tensor is not None
    }


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradient of each parameter by its mean over all ranks, in one all-reduce in
    float32 (float64 if a parameter has that dtype). If only some ranks have a gradient for a
    parameter, the others count as zeros; if no rank has one, the gradient stays None."""
    gradients = [parameter.grad for parameter in parameters]
    device, dtype = parameters[0].device, torch.float32
    if any(parameter.dtype == torch.float64 for parameter in parameters):
        dtype = torch.float64
    sizes = [*(parameter.numel() for parameter in parameters), len(gradients)]
    flat_gradients = torch.zeros(sum(sizes), dtype=dtype, device=device)
    *gradient_slices, gradient_counts = flat_gradients.split(sizes)
    has_gradient = [gradient is not None for gradient in gradients]
    gradient_counts.copy_(torch.tensor(has_gradient))
    for gradient_slice, gradient in zip(gradient_slices, gradients, strict=True):
        if gradient is not None:
            gradient_slice.copy_(gradient.flatten())
    dist.all_reduce(flat_gradients)
    flat_gradients /= dist.get_world_size()
    # read the counts only if a gradient is missing: copying them to the host waits for the device
    has_gradient_anywhere = has_gradient if all(has_gradient) else gradient_counts.tolist()
    for parameter, gradient_slice, is_present in zip(
        parameters, gradient_slices, has_gradient_anywhere, strict=True
    ):
        parameter.grad = (
            gradient_slice.view_as(parameter).to(parameter.dtype) if is_present else None
        )
