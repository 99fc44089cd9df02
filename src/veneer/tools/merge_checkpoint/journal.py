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
from pathlib import Path
from typing import Any

from veneer.errors import MergeError

JOURNAL = "journal.jsonl"


@contextmanager
def working_folder(out: Path, identity: str) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The folder in which the result grows, and what its journal says is done: the last line of a file counts all of
    its tensors that are. The journal of another merge is thrown away, with its folder. ``MergeError``: another process
    has it."""
    folder = out.with_name(f".{out.name}.merging")
    with _locked(out, folder.with_name(f"{folder.name}.lock")):
        lines: list[dict[str, Any]] = []
        with suppress(json.JSONDecodeError):  # the last line may have been cut off
            for text in (folder / JOURNAL).read_text().splitlines() if (folder / JOURNAL).is_file() else ():
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


@contextmanager
def _locked(out: Path, path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # a tenth of a second

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
        if not path.exists():  # its owner ended, and removed it, in between
            lock.release()
            raise Timeout(str(path))
    except Timeout:
        found = f"another process that merges into {out}, as {path} is locked"
        raise MergeError(found, "one", "wait for it, or choose another folder") from None
    try:
        yield
    finally:
        with suppress(PermissionError):  # a system that keeps open files keeps this one, which is empty
            path.unlink(missing_ok=True)
        lock.release()
