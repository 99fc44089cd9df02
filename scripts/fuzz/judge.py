"""Judge a mutant: refused, harmless or different; every other outcome is a failure."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.adapter_files.file_names import CORE_FILES
from veneer.adapter_files.verify import verify

from .mutations import MUTATIONS, Mutant
from .seeds import INPUTS, SEEDS, Seed

#: limits of a mutant: its seconds; its memory may grow by BYTES + TIMES · (bytes of its files)
SECONDS, BYTES, TIMES = 5.0, 64 * 2**20, 40
#: bytes of address space that the process may add to that at its start
ADDRESSES = 2 * 2**30


@dataclass(frozen=True)
class Outcome:
    """The outcome of one mutant. ``kind``: refused, harmless, different or failure. ``text``: the
    error or the reason."""

    number: int
    seed: str
    mutation: str
    notes: str
    kind: str
    text: str
    seconds: float = 0.0


@dataclass
class Stand:
    """A seed, its folders, its model and the model's outputs, shared by all mutants of the seed.
    ``twin``: the folder of a second adapter of the same seed."""

    seed: Seed
    folder: Path
    twin: Path
    model: Any = None
    other_model: Any = None
    x: Any = None
    base: Any = None
    adapted: Any = None
    bits: dict[str, torch.Tensor] = field(default_factory=dict)

    def prepare(self) -> None:
        self.model, self.other_model = self.seed.base(), self.seed.base(other=True)
        self.x = INPUTS[self.seed.model]()
        self.base, self.bits = (
            self.model(self.x),
            {key: tensor.clone() for key, tensor in self.model.state_dict().items()},
        )
        handle = veneer.load(self.model, self.folder)
        self.adapted = self.model(self.x)
        handle.detach()
        assert not torch.equal(self.adapted, self.base)
        assert torch.equal(self.model(self.x), self.base)


class MutantError(Exception):
    """Raised if a mutant is neither refused nor loaded correctly."""


def mutant(number: int, seed: int, stands: list[Stand], work: Path) -> tuple[Stand, str, Mutant]:
    """(the stand of its seed, the name of its mutation, the mutant) with this number. The mutant is
    written to ``work``."""
    rng = random.Random(f"{seed}:{number}")
    stand, name = rng.choice(stands), rng.choice(list(MUTATIONS))
    folder = work / "adapter"
    shutil.copytree(stand.folder, folder)
    created = Mutant(folder, stand.twin, rng, stand.seed.ours)
    MUTATIONS[name](created)
    return stand, name, created


@torch.no_grad()
def judge(stand: Stand, candidate: Mutant) -> tuple[str, str]:
    """(kind, text) of a mutant's outcome. Raises MutantError, or the error of reading it."""
    model = stand.other_model if candidate.other_base else stand.model
    report = verify(candidate.folder)
    try:
        files = veneer.adapter_files.read(candidate.folder)
    except veneer.VeneerError:
        files = None
    if report.ok and files is None:
        raise MutantError(f"verify says good, and read refuses:\n{report}")
    str(report).encode()
    try:
        handle = veneer.load(model, candidate.folder)
    except veneer.VeneerError as error:
        return "refused", _check_refusal(stand, model, error)
    y = model(stand.x)
    handle.detach()
    if not _as_it_was(stand, model):
        raise MutantError("the model is not what it was before it was loaded")
    if not y.isfinite().all():
        raise MutantError("outputs that are not finite")
    if not report.ok:
        raise MutantError(f"verify refuses, and load does not:\n{report}")
    if not candidate.other_base and torch.equal(y, stand.adapted):
        return "harmless", ""
    if candidate.ours and not candidate.forged:
        raise MutantError("other outputs, and no hash was made anew")
    return "different", f"off by {(y - stand.adapted).abs().max().item():.1e}"


def _check_refusal(stand: Stand, model: Any, error: Exception) -> str:
    text = str(error)
    if "Found: " not in text or " Do: " not in text:
        raise MutantError(f"an error that does not say what was found and what to do: {text}")
    text.encode()
    if len(text) > 20_000:
        raise MutantError(f"an error of {len(text)} characters")
    if not _as_it_was(stand, model):
        raise MutantError(f"a model that is left changed by a load that was refused ({text})")
    return text


def _as_it_was(stand: Stand, model: Any) -> bool:
    if model is stand.other_model:
        return not any("veneer" in key for key in [*model.state_dict(), *model.__dict__])
    state = model.state_dict()
    return state.keys() == stand.bits.keys() and all(
        torch.equal(state[key], value) for key, value in stand.bits.items()
    )


def stands_in(folder: Path) -> list[Stand]:
    return [
        Stand(seed, folder / f"{number}-0", folder / f"{number}-1")
        for number, seed in enumerate(SEEDS.values())
    ]


def judge_mutant(number: int, seed: int, stands: list[Stand]) -> Outcome:
    """Make one mutant and judge it."""
    with tempfile.TemporaryDirectory() as work:
        try:
            stand, name, created = mutant(number, seed, stands, Path(work))
        except Exception:
            return Outcome(
                number, "?", "?", "the mutation itself", "failure", traceback.format_exc()
            )
        if stand.model is None:
            stand.prepare()
        size = sum(
            (created.folder / file).stat().st_size
            for file in CORE_FILES
            if (created.folder / file).is_file()
        )
        before, start = _peak(reset=True), time.perf_counter()
        try:
            kind, text = judge(stand, created)
        except MutantError as error:
            kind, text = "failure", str(error)
        except Exception:
            kind, text = "failure", traceback.format_exc()
        seconds, grown = time.perf_counter() - start, _peak() - before
        if grown > BYTES + TIMES * min(size, 2**30):
            kind, text = (
                "failure",
                (
                    f"{grown / 2**20:.0f} MiB of memory for {size / 2**20:.2f} MiB of files; {kind}"
                    f" {text}"
                ),
            )
        return Outcome(number, stand.seed.name, name, "; ".join(created.notes), kind, text, seconds)


def _peak(reset: bool = False) -> int:
    """The peak of the process's memory in bytes, since the last reset if the system can tell, else
    since its start."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(pipe: Connection, folder: Path, seed: int, numbers: Iterable[int]) -> None:
    """Run in the watched process: send the number of each mutant before it is judged, and then
    its outcome."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        address_bytes = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize")
        )
        resource.setrlimit(resource.RLIMIT_AS, (address_bytes + ADDRESSES, resource.RLIM_INFINITY))
    stands = stands_in(folder)
    for stand in stands:
        stand.prepare()
    for number in numbers:
        pipe.send(number)
        pipe.send(judge_mutant(number, seed, stands))
    pipe.send(None)


def table(outcomes: list[Outcome]) -> str:
    """A table with the number of outcomes of each kind for each mutation."""
    kinds = ("refused", "harmless", "different", "failure")
    counts = Counter((outcome.mutation, outcome.kind) for outcome in outcomes)
    lines = [f"{'mutation':<26}" + "".join(f"{kind:>11}" for kind in kinds)]
    for name in MUTATIONS:
        lines.append(f"{name:<26}" + "".join(f"{counts[name, kind]:>11,}" for kind in kinds))
    total = Counter(outcome.kind for outcome in outcomes)
    return "\n".join([*lines, f"{'all':<26}" + "".join(f"{total[kind]:>11,}" for kind in kinds)])
