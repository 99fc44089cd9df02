"""Files of a run in its output folder.

output/
  run.json                 status (running, interrupted, finished, cleared), configuration, hashes
                           of the data, number of steps, versions of the libraries
  log.jsonl                one line per step and per evaluation; when a run resumes from a step, the
                           lines of later steps are dropped
  checkpoint-120/          always complete: it gets its name once all of its files are written
    adapter/  optimizer.pt  scheduler.pt  trainer_state.json
    rng_state.pth          with several processes one file each: rng_state_0.pth, rng_state_1.pth, …
  .checkpoint-130.….tmp/   an incomplete checkpoint of a killed run; the next start removes it
  adapter/  metrics.json   the result of a finished run
  .run.lock                held while a run writes here; .run.lock.holder names the process
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.errors import OutputExistsError
from veneer.fileio.atomic import EVERYTHING, disk_errors, new_folder, write_whole
from veneer.fileio.locks import hold_lock
from veneer.fileio.temporary import recover_all, remove
from veneer.train.processes import Processes

#: names of files and folders of a run (see the top of this file)
ADAPTER, STATE, RUN, LOG, METRICS = (
    "adapter",
    "trainer_state.json",
    "run.json",
    "log.jsonl",
    "metrics.json",
)
#: the status in run.json of a run whose files are being removed; the name of the lock file
CLEARED, LOCK = "cleared", ".run.lock"


def path_of(output: str | Path, step: int) -> Path:
    return Path(output) / f"checkpoint-{step}"


def newest(output: Path) -> tuple[Path, int] | None:
    """(folder, step) of the newest checkpoint, or None."""
    step_texts = {
        path: path.name.removeprefix("checkpoint-")
        for path in output.glob("checkpoint-*")
        if path.is_dir()
    }
    checkpoints = [
        (path, int(step_text)) for path, step_text in step_texts.items() if step_text.isdecimal()
    ]
    return max(checkpoints, key=lambda checkpoint: checkpoint[1], default=None)


def clear(output: Path, *names: str) -> None:
    """Remove an earlier run's checkpoints, and the files and folders of `output` with these names.
    The status in run.json changes to "cleared" first, so that a run whose removal was interrupted
    is not resumed."""
    if (record := read_json(output / RUN)) is not None:
        write_json(output / RUN, {**record, "status": CLEARED})
    for path in (*(output / name for name in names), *output.glob("checkpoint-*")):
        remove(path)


@contextmanager
def only_writer(output: Path, processes: Processes) -> Iterator[None]:
    """A block in which no other run writes to `output`. At the beginning, writes that killed runs
    left incomplete are finished or removed; at the end, `output` is removed if it is empty. Raises
    `OutputExistsError` if another process writes its run there."""

    def make_refusal(holder_text: str) -> OutputExistsError:
        return OutputExistsError(
            f"{holder_text}, which writes its run to {output}",
            "one run for an output folder",
            "wait for it, or choose another output",
        )

    def hold_output_lock() -> None:
        if not output.is_file():  # a file holds no lock; `can_resume` refuses it later
            exit_stack.enter_context(hold_lock(output / LOCK, make_refusal))
        if (output / RUN).exists():  # otherwise temporary files are another program's
            recover_all(output)

    try:
        with ExitStack() as exit_stack:
            processes.run_on_first(hold_output_lock)
            yield
    finally:
        # the removal fails if another run has written there or removed the folder meanwhile
        with suppress(OSError):
            if processes.is_first and output.is_dir() and not any(output.iterdir()):
                output.rmdir()  # the run could not begin and wrote nothing


def has_foreign_files(output: Path) -> bool:
    """Whether the folder `output` holds anything but the lock of this run and temporary folders of
    run.json, which a killed run may leave. False if there is no such folder."""
    return output.is_dir() and not all(
        file.name.startswith((LOCK, f".{RUN}.")) for file in output.iterdir()
    )


def write(
    output: str | Path, step: int, fill: Callable[[Path], None], processes: Processes
) -> None:
    """Write the folder checkpoint-`step`: every process calls `fill` on a temporary folder, which
    gets its final name once all processes are done. If one process fails, the temporary folder is
    removed and all processes raise. A failed write raises `OSError`, whichever library reported
    it."""
    checkpoint_folder = path_of(output, step)

    with ExitStack() as exit_stack:
        writer = new_folder(checkpoint_folder, overwrite=True, replaces=[STATE, EVERYTHING])
        staging_folder = Path(processes.run_on_first(lambda: str(exit_stack.enter_context(writer))))
        try:
            # `disk_errors` is the inner of the two, because errors of communication between
            # processes, which `joint_work` raises, have nothing to do with the disk
            with processes.joint_work(), disk_errors(checkpoint_folder):
                fill(staging_folder)
            with processes.joint_work():
                exit_stack.close()  # in the first process, this gives the folder its final name
        except BaseException:
            # the first process has removed the folder, but a write of this process may have created
            # it again since
            if not processes.is_first:
                shutil.rmtree(staging_folder.parent, ignore_errors=True)
            raise


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_log(output: Path) -> list[dict[str, Any]]:
    """The lines of the log; [] if there is none. A last line that is incomplete, for example after
    a power cut, is left out."""
    log_text = (output / LOG).read_text(encoding="utf-8") if (output / LOG).is_file() else ""
    return [json.loads(line) for line in log_text.split("\n") if line.endswith("}")]


def cut_log(output: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of the log after `step`, because the resumed run computes these steps again.
    Returns the remaining lines."""
    lines = [line for line in read_log(output) if line["step"] <= step]
    write_whole(output / LOG, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
