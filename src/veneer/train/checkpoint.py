"""What a run leaves in its output folder.

output/
  run.json                 status (running, interrupted, finished, cleared), configuration, hashes of the data
  log.jsonl                one line a step, one an evaluation; grows, and is cut back to the step that a run resumes at
  checkpoint-120/          complete by construction: its name is given last, when all of it is on the disk
    adapter/  optimizer.pt  scheduler.pt  trainer_state.json
    rng_state.pth          of several processes, one each: rng_state_0.pth, rng_state_1.pth, …
  .checkpoint-130.….tmp/   what a kill leaves of one that was being written; swept away at the next start
  adapter/  metrics.json   the result
  .run.lock                held while a run writes here; .run.lock.holder says which process it is
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from veneer.errors import OutputExistsError
from veneer.fileio.atomic import EVERYTHING, disk_errors, new_folder, write_whole
from veneer.fileio.locks import locked
from veneer.fileio.temporary import remove, sweep
from veneer.train.processes import Processes

ADAPTER, STATE, RUN, LOG, METRICS = (
    "adapter",
    "trainer_state.json",
    "run.json",
    "log.jsonl",
    "metrics.json",
)
CLEARED, LOCK = "cleared", ".run.lock"


def path_of(output: str | Path, step: int) -> Path:
    return Path(output) / f"checkpoint-{step}"


def newest(output: Path) -> tuple[Path, int] | None:
    steps = {
        path: path.name.removeprefix("checkpoint-")
        for path in output.glob("checkpoint-*")
        if path.is_dir()
    }
    found = [(path, int(step)) for path, step in steps.items() if step.isdecimal()]
    return max(found, key=lambda pair: pair[1], default=None)


def clear(output: Path, *names: str) -> None:
    """Remove what an earlier run wrote under these names, and its checkpoints. Its record says so
    first, and stays until another takes its place: what a kill leaves of a run that is being
    removed is none to go on with."""
    if (found := read_json(output / RUN)) is not None:
        write_json(output / RUN, {**found, "status": CLEARED})
    for path in (*(output / name for name in names), *output.glob("checkpoint-*")):
        remove(path)


@contextmanager
def only_writer(output: Path, processes: Processes) -> Iterator[None]:
    """A block in which no other run writes to `output`, which begins without what killed ones left
    half-written. `OutputExistsError`: another process has it."""

    def refusal(holder: str) -> OutputExistsError:
        problem = f"{holder}, which writes its run to {output}"
        return OutputExistsError(
            problem, "one run for an output folder", "wait for it, or choose another output"
        )

    def hold() -> None:
        if not output.is_file():  # which is refused soon
            stack.enter_context(locked(output / LOCK, refusal))
        if (output / RUN).exists():  # else it is no folder of ours
            sweep(output)

    try:
        with ExitStack() as stack:
            processes.one(hold)
            yield
    finally:
        if processes.first and output.is_dir() and not any(output.iterdir()):
            output.rmdir()  # of a run that could not begin


def is_taken(output: Path) -> bool:
    """Whether the folder holds more than the lock of this run, and a record that was never
    whole."""
    return output.is_dir() and not all(
        file.name.startswith((LOCK, f".{RUN}.")) for file in output.iterdir()
    )


def write(
    output: str | Path, step: int, fill: Callable[[Path], None], processes: Processes
) -> None:
    """checkpoint-`step`: a folder that every process fills, and that gets its name when all have;
    when one fails, it vanishes, and all raise. A failed write, whichever library noticed it, comes
    out as an `OSError`."""
    target = path_of(output, step)

    def filled(folder: Path) -> None:
        with disk_errors(target):  # not around the meetings, whose errors are no disk's
            fill(folder)

    with ExitStack() as stack:
        made = new_folder(target, overwrite=True, replaces=[STATE, EVERYTHING])
        folder = Path(processes.one(lambda: str(stack.enter_context(made))))
        try:
            processes.each(lambda: filled(folder))
            processes.each(stack.close)
        except BaseException:
            # the first one's went, and this one, still writing, may have made it again
            if not processes.first:
                shutil.rmtree(folder.parent, ignore_errors=True)
            raise


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_log(output: Path) -> list[dict[str, Any]]:
    """The lines of the log. A last line that a power cut tore is left out."""
    text = (output / LOG).read_text(encoding="utf-8") if (output / LOG).is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line.endswith("}")]


def cut_log(output: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after `step`, which are about to be computed again; return those that stay."""
    kept = [line for line in read_log(output) if line["step"] <= step]
    write_whole(output / LOG, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
