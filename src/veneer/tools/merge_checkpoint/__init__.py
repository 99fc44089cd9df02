"""Merge adapters into a checkpoint on disk, tensor by tensor, whatever its size.

    reader          the arithmetic            writer
    tensor  ──────► W' = round(W + ΔW) ──────► file of the same name, tensors in the same order
            └─────► fingerprint of the base ─┘

Four threads (and one that flushes to the disk), and at most twice the largest tensor between them (``memory``). What
no adapter changes is copied. The result is written past the system's cache (``stream``). It stands in a folder beside
OUT until it is whole, then takes its name in one step.

**A killed merge goes on where it was.** The folder's name follows from OUT's, and its journal says which tensors are on
the disk: a line is written only after what it speaks of was flushed. A journal of another merge (other files, adapters,
weights, dtype or rounding) is thrown away with its folder. Rejected: a finished file as the unit, as many models are
one file of many GiB.

Each weight is what ``veneer.merge`` would write into the live model, bit for bit: both call ``kernels.rounding.fold``.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.folder import content_hash, read
from veneer.attach.merge import LayerMerge, MergeReport
from veneer.errors import BaseMismatchError, CheckpointError, MergeError, listing, raise_all, sentence
from veneer.fileio.atomic import disk_errors, must_not_exist, publish
from veneer.fileio.hashing import hash_json
from veneer.fileio.untrusted import Header
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import HALF, Sums, known_rounding, wanting
from veneer.kernels.threads import apart
from veneer.models.safetensors_dir import DTYPES, NAMES, Checkpoint, in_order, open_checkpoint, read_tensor
from veneer.tools.merge_checkpoint import aux_files
from veneer.tools.merge_checkpoint.aux_files import RECORD
from veneer.tools.merge_checkpoint.direct_writer import BLOCK, DirectWriter, lag
from veneer.tools.merge_checkpoint.fingerprints import HashedAhead, ahead, printed
from veneer.tools.merge_checkpoint.linear_stub import linear_stub_model
from veneer.tools.merge_checkpoint.memory import Lease, Memory
from veneer.tools.merge_checkpoint.merge_plan import (
    Adapter,
    MergePlan,
    TensorEdit,
    apply,
    lies_in,
    mismatched,
    recipe_for,
    refuse,
    replaced,
)

JOURNAL = "journal.jsonl"
#: bytes that are written between two lines of the journal
STEP = 128 * 2**20
#: bytes that numba takes, with what it needs to compile
NUMBA = 240 * 2**20
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CheckpointMerge:
    """What a merge of a checkpoint did.

    ``report`` is what ``veneer.merge`` says too, by tensor; ``left_out`` names what of the base's folder was not copied
    (``aux_files.py``); ``resumed`` how many tensors an earlier, killed run had finished.
    """

    path: Path
    report: MergeReport
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    resumed: int

    def __str__(self) -> str:
        lines = [str(self.report), f"written to {self.path}"]
        lines += (
            [f"not copied (weights of the base, hidden folders): {listing(self.left_out)}"] if self.left_out else []
        )
        lines += [f"{self.resumed} tensors were there from a run that was interrupted"] if self.resumed else []
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class _Plan:
    """Everything that a merge will do, before it begins."""

    checkpoint: Checkpoint
    merge_plan: MergePlan
    adapters: tuple[Adapter, ...]
    dtype: torch.dtype | None
    rounding: str
    verify_base: bool
    #: fingerprints of tensors that are known already
    known: HashedAhead
    #: how a parameter that several tensors hold is rounded, found when the first of them is there
    decided: dict[str, str] = field(default_factory=dict)

    def target(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the result."""
        own = self.checkpoint.dtype(name)
        return self.dtype if self.dtype is not None and own in FLOATS else own

    def copied(self, name: str) -> bool:
        return name not in self.merge_plan.works and self.target(name) == self.checkpoint.dtype(name)

    def both(self, name: str) -> int:
        """Bytes of a tensor as it was and as it will be."""
        return self.checkpoint.bytes(name) + self.written(name)

    def written(self, name: str) -> int:
        """Bytes of a tensor in the result."""
        own = self.checkpoint.bytes(name)
        return own // self.checkpoint.dtype(name).itemsize * self.target(name).itemsize

    def room(self) -> tuple[int, bool]:
        """Bytes for what is between reading and writing, and whether that leaves enough for numba: twice the largest
        tensor is promised, and the largest is often one that no adapter changes."""
        limit = max(map(self.both, self.checkpoint.where), default=0)
        needed = max((self.both(name) for name in self.checkpoint.where if not self.copied(name)), default=0)
        compiled = limit - NUMBA >= needed
        return (limit - NUMBA if compiled else limit), compiled

    def identity(self) -> str:
        """What must be the same for a run to go on where another one stopped."""
        files = {name: (self.checkpoint.folder / name).stat() for name in self.checkpoint.files}
        said = [(content_hash(path), weight) for path, weight in self.adapters]
        sizes = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in files.items()}
        # what was written without comparing the base must not count as compared
        how = str(self.dtype), self.rounding, self.verify_base
        return hash_json([version("veneer"), str(self.checkpoint.folder.resolve()), sizes, said, how])

    def layout(self, file: str) -> tuple[bytes, dict[str, int], int]:
        """(the bytes before the first tensor, where each tensor begins, the size) of a file of the result."""
        header, names = self.checkpoint.files[file], in_order(self.checkpoint.files[file])
        if all(self.target(name) == self.checkpoint.dtype(name) for name in names):
            with (self.checkpoint.folder / file).open("rb") as stream:
                head = stream.read(header.data_start)
            starts = {name: header.data_start + header.tensors[name].start for name in names}
            return head, starts, header.data_start + max((e.stop for e in header.tensors.values()), default=0)
        return _written(header, {name: self.target(name) for name in names})


def merge_checkpoint(
    base: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "auto",
    verify_base: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    model: nn.Module | None = None,
) -> CheckpointMerge:
    """Merge adapters into the safetensors files of ``base``, written to the folder ``out`` in the same layout: shards,
    names, index, configuration and tokenizer.

    In memory at any time: twice the largest tensor at most, the adapters, and what torch itself takes. Run again after
    it was killed, it goes on where it was.

    Args:
        base: a folder with one or several safetensors files.
        adapters: folders, each alone or with a weight: W + Σ wᵢ ΔWᵢ.
        dtype: of all floating-point tensors of the result; None keeps each as it is.
        rounding: "nearest", "faithful" or "auto" (see ``veneer.merge``).
        verify_base: compare the fingerprint of each weight that changes with what the adapters say.
        progress: called as (bytes done, bytes in all, name of the tensor).
        model: the model of these files, where transformers cannot build it from their config.json.

    Raises:
        CheckpointError, AdapterError, BaseMismatchError: the files, an adapter, or the two together cannot be used.
        ConfigError: another rounding.
        MergeError: a merged weight is not finite in its dtype.
        OutputExistsError: ``out`` exists and ``overwrite`` is False.

        Nothing is left behind, and ``out`` is as it was. (An OSError, such as a full disk, leaves what was done beside
        ``out`` to go on from.)
    """
    out = Path(out).expanduser().resolve()
    must_not_exist(out, overwrite)
    plan = _planned(base, adapters, dtype, rounding, verify_base, model)
    try:
        return _merged(plan, base, out, progress)
    except BaseMismatchError:
        if not plan.merge_plan.by_prints:
            raise
    # the names were taken for those of the model's parameters, which only the model knows
    plan = _planned(base, adapters, dtype, rounding, verify_base, model, by_prints=False)
    return _merged(plan, base, out, progress)


def _merged(plan: _Plan, base: str | Path, out: Path, progress: Progress | None) -> CheckpointMerge:
    if out == plan.checkpoint.folder.resolve() or out in plan.checkpoint.folder.resolve().parents:
        raise MergeError(sentence(f"{out}, which holds the base", "another folder for the result", "choose another"))
    with disk_errors(out), _working(out, plan.identity()) as (folder, journal):
        try:
            run = _Run(plan, folder, journal, progress)
            run.whole()
            left_out = _aux_files(plan, folder)
            report = MergeReport(", ".join(path.name for path, _ in plan.adapters), tuple(run.layers))
            (folder / RECORD).write_text(json.dumps(_record(plan, base, report), indent=2) + "\n")
        except (MergeError, CheckpointError, ValueError):  # what no second run would mend
            shutil.rmtree(folder)
            raise
        except OSError as error:
            if (folder / JOURNAL).read_text().count("\n") < 2:
                shutil.rmtree(folder)
            else:
                error.add_note(f"What was done is kept in {folder}: run it again to go on, or delete that.")
            raise
        (folder / JOURNAL).unlink()
        publish(folder, out)
        if folder.exists():  # what was there before, or an empty folder
            shutil.rmtree(folder)
    return CheckpointMerge(out, report, tuple(left_out), plan.merge_plan.notes, run.resumed)


def prove(
    base: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "auto",
    progress: Progress | None = None,
    model: nn.Module | None = None,
) -> int:
    """Read a merged checkpoint again and compare every byte with what it must be: what no adapter changes with the
    base, the rest with the merge done again. Returns how many tensors were compared.

    Raises:
        MergeError: names the tensors, or the files beside them, that differ.
    """
    plan = _planned(base, adapters, dtype, rounding, False, model)
    merged = open_checkpoint(out)
    problems = [f"{name!r} is in one of them only" for name in merged.where.keys() ^ plan.checkpoint.where.keys()]
    total, done = sum(map(plan.checkpoint.bytes, plan.checkpoint.where)), 0
    _, compiled = plan.room()
    for name in plan.checkpoint.where.keys() & merged.where.keys():
        if merged.dtype(name) != plan.target(name) or merged.shape(name) != plan.checkpoint.shape(name):
            problems.append(f"{name!r} is of another shape or dtype")
            continue
        expected, _ = _computed(plan, name, plan.checkpoint.read(name), compiled, [])
        if not _same(expected, merged.read(name)):
            problems.append(f"{name!r} holds other numbers")
        done += plan.checkpoint.bytes(name)
        if progress is not None:
            progress(done, total, name)
    problems += aux_files.differing(plan.checkpoint, dtype, Path(out))
    raise_all(MergeError, f"{out} is not the base with these adapters", problems)
    return len(merged.where)


def _planned(
    base: Any, adapters: Any, dtype: Any, rounding: str, verify_base: bool, model: Any, by_prints: bool = True
) -> _Plan:
    """``by_prints`` allows to find the tensors by the fingerprints that the adapters say, if they are compared."""
    if not adapters:
        raise MergeError(sentence("no adapter", "one or several", "name them"))
    known_rounding(rounding)
    if dtype is not None and dtype not in FLOATS:
        raise MergeError(
            sentence(f"dtype={dtype}", listing(map(str, FLOATS)), "choose one, or None to keep the base's")
        )
    given = [
        Adapter(Path(one)) if isinstance(one, str | Path) else Adapter(Path(one[0]), float(one[1])) for one in adapters
    ]
    folder = Path(base).expanduser()
    checkpoint = open_checkpoint(folder)  # first: it is the quicker to fail
    saved_adapters = [read(path) for path, _ in given]
    speak_of = {name for saved in saved_adapters for name in saved.metadata.get("base", {}).get("weights", {})}
    drawn = linear_stub_model(checkpoint, saved_adapters) if model is None and verify_base and by_prints else None
    with ahead(checkpoint, speak_of if verify_base and drawn is None else ()) as known:
        merge_plan = recipe_for(folder, given, model if drawn is None else drawn)
    merge_plan = replace(merge_plan, by_prints=drawn is not None)
    return _Plan(checkpoint, merge_plan, tuple(given), dtype, rounding, verify_base, known)


# ---------------------------------------------------------------------------------------------- one tensor


def _computed(
    plan: _Plan, name: str, tensor: Tensor, compiled: bool, lent: list[Tensor]
) -> tuple[Tensor, list[LayerMerge]]:
    """A tensor of the result, and what the merge did to it. ``lent`` is memory for it, as ``apply`` takes it."""
    dtype, layers = plan.target(name), []
    result = None
    for work in plan.merge_plan.works.get(name, ()):
        part = tensor[work.place.within]
        if work.changes:
            if work.place.within:
                lent.clear()
            folded = apply(work, part, dtype, _rounding(plan, work, dtype, compiled), compiled, lent)
            value = folded.weight
            layers.append(LayerMerge(name, folded.change, folded.retention, folded.rounding))
            finite = folded.finite
        else:
            lent.clear()
            value = replaced(work, part, dtype)
            finite = not value.is_floating_point() or bool(value.isfinite().all())
        if not finite:
            found = f"{name}: W + ΔW is not finite in {dtype}"
            raise MergeError(sentence(found, "finite weights", "check the adapter, or choose a wider dtype"))
        if not work.place.within:
            result = value
        else:
            result = _cast(name, tensor, dtype).clone() if result is None else result
            result[work.place.within] = value
    return _cast(name, tensor, dtype) if result is None else result, layers


def _rounding(plan: _Plan, work: TensorEdit, dtype: torch.dtype, compiled: bool) -> str:
    """How to round a part of a parameter: as all of it, of which "auto" decides at once."""
    tensors = plan.merge_plan.parts.get(work.path)
    if tensors is None or plan.rounding != "auto" or dtype not in HALF:
        return plan.rounding
    if work.path not in plan.decided:
        whole = Sums(0.0, 0.0, 0.0, 0.0)
        for name in tensors:
            own = next(other for other in plan.merge_plan.works[name] if other.path == work.path)
            part = plan.checkpoint.read(name)[own.place.within]
            whole += apply(own, part, dtype, "nearest", compiled, []).sums
        plan.decided[work.path] = "faithful" if wanting(whole) else "nearest"
    return plan.decided[work.path]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    result = round_once(tensor, dtype) if tensor.dtype == torch.float64 else tensor.to(dtype)
    if bool((tensor.isfinite() & ~result.isfinite()).any()):
        found = f"{name}: numbers beyond the range of {dtype}"
        raise MergeError(sentence(found, "a dtype that holds them", "choose bfloat16 or float32"))
    return result


def _bytes(one: Tensor) -> Tensor:
    return one.contiguous().reshape(-1).view(torch.uint8)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_bytes(one), _bytes(other))


# ---------------------------------------------------------------------------------------------- all of them


class _Run:
    """One run of a merge: the threads, the open files, and how far it has come."""

    def __init__(self, plan: _Plan, folder: Path, journal: list[dict[str, Any]], progress: Progress | None) -> None:
        self.plan, self.folder, self.progress = plan, folder, progress
        self.done = {line["file"]: line["tensors"] for line in journal}
        self.layers = [LayerMerge(*layer) for line in journal for layer in line["layers"]]
        self.resumed = sum(self.done.values())
        self.total = sum(map(plan.checkpoint.bytes, plan.checkpoint.where))
        limit, self.compiled = plan.room()
        self.memory = Memory(limit)
        self.read: queue.Queue[Any] = queue.Queue()
        self.ready: queue.Queue[Any] = queue.Queue()
        self.stopped, self.failed = threading.Event(), []
        self.comparing = ThreadPoolExecutor(1)
        self.sources: dict[str, int] = {}
        self.opening = threading.Lock()

    def whole(self) -> None:
        """Everything that is left to do."""
        threads = [threading.Thread(target=self._guarded, args=(part,)) for part in (self._reading, self._writing)]
        for thread in threads:
            thread.start()
        try:
            with apart():
                while (job := self._next(self.read)) is not None:
                    self.ready.put(self._done(*job))
                    job = None
            self.ready.put(None)
        except BaseException:
            self.stopped.set()
            raise
        finally:
            for thread in threads:
                thread.join()
            self.comparing.shutdown(cancel_futures=True)
            for descriptor in self.sources.values():
                os.close(descriptor)
        if self.failed:
            raise self.failed[0]

    def _done(
        self, name: str, tensor: Tensor | None, old: Lease | None, start: int, compared: Future[None] | None
    ) -> tuple[Tensor | None, Lease | None, list[LayerMerge]]:
        """A tensor of the result, the memory that is left to it, and what the merge did; None for one that is
        copied. What is not of the base goes no further. ``start`` is where the tensor begins in the result."""
        if tensor is None or old is None:
            if compared is not None:
                compared.result()
            return None, None, []
        new = self.memory.take(self.stopped)
        new.lent[0] = new.lent[0][lag(new.address, start) :]
        result, layers = _computed(self.plan, name, tensor, self.compiled, new.lent)
        if compared is not None:
            compared.result()
        spare, kept = (new, old) if lies_in(result, tensor) else (old, new)
        self.memory.give(spare, tensor if spare is old else None)
        return result, kept, layers

    def _guarded(self, part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:  # raised again in the thread that waits for this one
            self.failed.append(error)
            self.stopped.set()

    def _next(self, jobs: queue.Queue[Any]) -> Any:
        """The next job; None at the end, and when another thread has failed."""
        while not self.stopped.is_set():
            try:
                return jobs.get(timeout=0.1)
            except queue.Empty:
                continue
        return None

    def _left(self) -> Iterator[tuple[str, str]]:
        """(file, tensor) of all that is not done, in the order of writing."""
        for file, header in self.plan.checkpoint.files.items():
            for name in in_order(header)[self.done.get(file, 0) :]:
                yield file, name

    def _source(self, name: str) -> int:
        file = self.plan.checkpoint.where[name]
        with self.opening:
            if file not in self.sources:
                self.sources[file] = os.open(self.plan.checkpoint.folder / file, os.O_RDONLY)
            return self.sources[file]

    def _reading(self) -> None:
        last, checkpoint = self._last_of_each(), self.plan.checkpoint
        at, starts = "", {}
        for file, name in self._left():
            if self.stopped.is_set():
                return
            if file != at:
                at, (_, starts, _) = file, self.plan.layout(file)
            tensor = old = None
            if not self.plan.copied(name):
                size = checkpoint.bytes(name)
                old = self.memory.ahead(size + BLOCK, self.plan.written(name) + BLOCK, self.stopped)
                tensor = read_tensor(self._source(name), checkpoint, name, into=old.lent.pop()[:size])
            compared = None
            if name in last:
                loaded = {} if tensor is None else {name: tensor}
                compared = self.comparing.submit(self._compare, last[name], loaded)
                loaded = None
            self.read.put((name, tensor, old, starts[name], compared))
            tensor = None  # nobody holds on to memory that others wait for
        self.read.put(None)

    def _compare(self, paths: Sequence[str], loaded: Mapping[str, Tensor]) -> None:
        """Refuse parameters that are not those of the adapters' base."""
        merge_plan, checkpoint, known = self.plan.merge_plan, self.plan.checkpoint, self.plan.known
        found = [
            mismatched(merge_plan, path, printed(merge_plan, checkpoint, path, self._source, loaded, known))
            for path in paths
        ]
        refuse([one for one in found if one], checkpoint.folder)

    def _last_of_each(self) -> dict[str, list[str]]:
        """The parameters whose fingerprint can be told once this tensor is read, by its name. What an earlier run has
        finished was compared by it."""
        if not self.plan.verify_base:
            return {}
        order = {name: number for number, name in enumerate(self.plan.checkpoint.where)}
        last: dict[str, list[str]] = {}
        for path, (tensors, *_) in self.plan.merge_plan.fingerprints.items():
            last.setdefault(max(tensors, key=order.__getitem__), []).append(path)
        return last

    def _writing(self) -> None:
        passed = self.total - sum(self.plan.checkpoint.bytes(name) for _, name in self._left())
        with (self.folder / JOURNAL).open("a") as journal, ThreadPoolExecutor(1) as flushing:
            flushed: list[Future[None]] = []
            for file in self.plan.checkpoint.files:
                head, starts, size = self.plan.layout(file)
                names = in_order(self.plan.checkpoint.files[file])
                done, layers, since = self.done.get(file, 0), [], 0
                if done == len(names) and names:
                    continue
                target = DirectWriter(self.folder / file, starts[names[done]] if done else 0)
                try:
                    if not done:
                        target.write(memoryview(head))
                    for count, name in enumerate(names[done:], done + 1):
                        job = self._next(self.ready)
                        if job is None:
                            return
                        result, lease, more = job
                        self._store(target, name, result, lease)
                        job = result = None
                        layers += more
                        since += self.plan.checkpoint.bytes(name)
                        passed += self.plan.checkpoint.bytes(name)
                        if since >= STEP or count == len(names):
                            target.flush()
                            if count == len(names):
                                os.ftruncate(target.descriptor, size)
                            line = {"file": file, "tensors": count - done, "layers": [astuple(one) for one in layers]}
                            own = os.dup(target.descriptor)
                            flushed.append(flushing.submit(_flushed, own, journal, json.dumps(line)))
                            self.layers += layers
                            done, since, layers = count, 0, []
                            _raise_of(flushed)
                        if self.progress is not None:
                            self.progress(passed, self.total, name)
                    if not names:
                        target.flush()
                        os.ftruncate(target.descriptor, size)
                finally:
                    target.close()
            wait(flushed)
            _raise_of(flushed)

    def _store(self, target: DirectWriter, name: str, result: Tensor | None, lease: Lease | None) -> None:
        if result is None or lease is None:
            target.copy(self._source(name), self.plan.checkpoint.start(name), self.plan.checkpoint.bytes(name))
            return
        target.write(memoryview(_bytes(result).numpy().data))
        self.memory.give(lease, result)


def _flushed(target: int, journal: Any, line: str) -> None:
    """Flush what was written to a file, then say so in the journal. In a thread of its own: the disk then works while
    the next tensors are computed."""
    try:
        os.fdatasync(target)
    finally:
        os.close(target)
    journal.write(line + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _raise_of(flushed: Sequence[Future[None]]) -> None:
    for one in flushed:
        if one.done():
            one.result()


# ---------------------------------------------------------------------------------------------- the folder


@contextmanager
def _working(out: Path, identity: str) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The folder in which the result grows, and what its journal says is done. One process at a time has it."""
    folder = out.with_name(f".{out.name}.merging")
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = f"another process that merges into {out}"
            raise MergeError(sentence(found, "one", "wait for it, or choose another folder")) from None
        lines = _journal(folder / JOURNAL)
        if not lines or lines[0] != {"merge": identity}:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            lines = [{"merge": identity}]
        # written anew, without what was cut off within a line
        (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
        counted: Counter[str] = Counter()
        for line in lines[1:]:
            counted[line["file"]] += int(line["tensors"])
        yield folder, [{**line, "tensors": counted[line["file"]]} for line in lines[1:]]
    finally:
        os.close(held)


def _journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; the last one may have been cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _written(header: Header, dtypes: Mapping[str, torch.dtype]) -> tuple[bytes, dict[str, int], int]:
    """As ``_Plan.layout``, for a file whose tensors change their size."""
    said: dict[str, Any] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    stop = 0
    for name, dtype in dtypes.items():
        entry, start = header.tensors[name], stop
        stop += (entry.stop - entry.start) // DTYPES[entry.dtype].itemsize * dtype.itemsize
        said[name] = {"dtype": NAMES[dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    starts = {name: len(head) + said[name]["data_offsets"][0] for name in dtypes}
    return head, starts, len(head) + stop


def _aux_files(plan: _Plan, folder: Path) -> list[str]:
    """Write what belongs to the result besides its weights; the names of what was left out."""
    checkpoint, left_out = plan.checkpoint, aux_files.put(plan.checkpoint, plan.dtype, folder)
    if checkpoint.index is not None:
        total = sum(plan.layout(file)[2] - len(plan.layout(file)[0]) for file in checkpoint.files)
        metadata = checkpoint.index.get("metadata") or {}
        index = {**checkpoint.index, "metadata": {**metadata, "total_size": total}}
        if metadata.get("total_size") == total:
            shutil.copyfile(checkpoint.folder / str(checkpoint.index_name), folder / str(checkpoint.index_name))
        else:
            (folder / str(checkpoint.index_name)).write_text(json.dumps(index, indent=2) + "\n")
    return left_out


def _record(plan: _Plan, base: str | Path, report: MergeReport) -> dict[str, Any]:
    """What was merged, for whoever finds the result: no paths of this machine."""
    return {
        "veneer": version("veneer"),
        "base": Path(base).name,
        "adapters": [
            {"name": path.name, "weight": weight, "content": content_hash(path)} for path, weight in plan.adapters
        ],
        "dtype": None if plan.dtype is None else str(plan.dtype).removeprefix("torch."),
        "rounding": plan.rounding,
        "layers": {layer.path: {k: v for k, v in asdict(layer).items() if k != "path"} for layer in report.layers},
    }
