"""The folder in which a merge grows, and the journal of what is on the disk already.

.OUT.merging/journal.jsonl     {"merge": identity}, then lines {"file", "tensors": how many more, "layers": report}
.OUT.merging.lock              held by the one process that merges into OUT
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from veneer.errors import MergeError
from veneer.fileio.locks import locked

JOURNAL = "journal.jsonl"


@contextmanager
def working_folder(out: Path, identity: str) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The folder in which the result grows, and what its journal says is done: the last line of a
    file counts all of its tensors that are. The journal of another merge is thrown away, with its
    folder. ``MergeError``: another process has it."""
    folder = out.with_name(f".{out.name}.merging")
    with locked(folder.with_name(f"{folder.name}.lock"), partial(_busy, out)):
        lines: list[dict[str, Any]] = []
        with suppress(json.JSONDecodeError):  # the last line may have been cut off
            for text in (
                (folder / JOURNAL).read_text().splitlines() if (folder / JOURNAL).is_file() else ()
            ):
                lines.append(json.loads(text))
        if lines[:1] != [{"merge": identity}]:
            if folder.exists():
                shutil.rmtree(folder)
            lines = [{"merge": identity}]
        folder.mkdir(parents=True, exist_ok=True)
        # written anew, without what was cut off within a line
        (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
        counted: Counter[str] = Counter()
        for line in lines[1:]:
            counted[line["file"]] += int(line["tensors"])
        yield folder, [{**line, "tensors": counted[line["file"]]} for line in lines[1:]]


def _busy(out: Path, holder: str) -> MergeError:
    return MergeError(
        f"{holder}, which merges into {out}",
        "one at a time",
        "wait for it, or choose another folder",
    )
