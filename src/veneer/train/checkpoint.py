"""What a run leaves in its output folder, and how a half-written part of it is told from a whole one.

output/
  run.json                 status (running, interrupted, finished), configuration, hashes of the data
  log.jsonl                one line a step, one an evaluation; grows, and is cut back to the step that a run resumes at
  checkpoint-120/          complete by construction: its name is given last, when all of it is on the disk
    adapter/  optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json
  .checkpoint-130.….tmp/   what a kill leaves of one that was being written; swept away at the next start
  adapter/  metrics.json   the result
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from veneer.fileio.atomic import disk_errors, new_folder, write_whole

ADAPTER, STATE, RUN, LOG, METRICS = "adapter", "trainer_state.json", "run.json", "log.jsonl", "metrics.json"


def path_of(output: str | Path, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return Path(output) / f"checkpoint-{step}"


def newest(output: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint and its step."""
    found = [
        (int(match.group(1)), path)
        for path in output.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    if not found:
        return None
    step, path = max(found)
    return path, step


def clear(output: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    for path in [*(output / name for name in (ADAPTER, LOG, METRICS, "runs")), *output.glob("checkpoint-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (output / RUN).unlink(missing_ok=True)  # last: without it, what is left would not count as a run's


def sweep(output: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in [*output.glob(".*.tmp"), *output.glob(".*.replaced")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _alone(value: Any) -> Any:
    """One process shares with nobody."""
    return value


@contextmanager
def writing(
    output: str | Path, step: int, *, main: bool = True, share: Callable[[Any], Any] = _alone
) -> Iterator[Path]:
    """A folder to fill, which becomes checkpoint-`step` when the block ends without an error, and vanishes otherwise.

    `main` is true in the one process that makes and renames it; `share` gives every process the first one's value, and
    so is a barrier too. A failed write, whichever library noticed it, comes out as an `OSError`.
    """
    target = path_of(output, step)
    with disk_errors(target), ExitStack() as stack:
        folder = stack.enter_context(new_folder(target, overwrite=True)) if main else None
        yield share(folder)
        share(None)  # all have written before the first renames
    share(None)


# ---------------------------------------------------------------------------------------------- run.json, log.jsonl


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the old file or the new one is there, whole, at any moment."""
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_log(output: Path) -> list[dict[str, Any]]:
    """The lines of the log. A last line that a power cut tore is left out."""
    path = output / LOG
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


def cut_log(output: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after `step`, which are about to be computed again; return those that stay."""
    kept = [line for line in read_log(output) if line["step"] <= step]
    temporary = output / f".{LOG}.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(output / LOG)
    return kept
