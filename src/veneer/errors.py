"""Every error that Veneer raises on purpose, as one tree.

    VeneerError
    ├── ConfigError        ValueError       a field of a config is wrong
    ├── TargetError        ValueError       what was asked for cannot be attached to this model
    ├── SelectionError     RuntimeError     no, an unknown or a conflicting adapter is selected
    ├── BankFullError      MemoryError      adapters that a bank's budget cannot hold at once
    ├── MergeError         RuntimeError     a merge or an unmerge that would lose something
    ├── CheckError         RuntimeError     an attached adapter that the model's output never sees
    ├── DataError          ValueError       training data that cannot be read or used
    ├── TrainingError      ArithmeticError  a run whose loss is no number, or that lost a process
    ├── OutputExistsError  FileExistsError  an output path that already holds something
    ├── CheckpointError    ValueError       a model's files that cannot be read
    ├── MethodError        AttributeError   a name of another library, asked of Veneer or of what it attached
    ├── LibraryError       LookupError      a name that a library lacks or cannot take, an index that is damaged
    ├── RemoteError        OSError          a remote place that cannot be reached, read or written
    ├── ExtractError       ValueError       two models whose difference no adapter can be
    └── AdapterError       ValueError       an adapter folder that cannot be trusted or read
        └── BaseMismatchError               an intact adapter, made for another base

Each is also the standard library's type for its kind, so that ``except ValueError`` works. A
message says what was found, what was expected and what to do; a function that finds several
problems collects them and raises once.
"""

from __future__ import annotations

import difflib
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError", "BankFullError", "BaseMismatchError", "CheckError", "CheckpointError", "ConfigError", "DataError",
    "ExtractError", "LibraryError", "MergeError", "MethodError", "OutputExistsError", "RemoteError", "SelectionError",
    "TargetError", "TrainingError", "VeneerError",
]  # fmt: skip


class VeneerError(Exception):
    """The root of the tree: catch this to catch everything that Veneer raises on purpose. It takes
    a message, or what was found, what was expected and what to do (``sentence``)."""

    #: of several processes that work together, another one raised this first, and tells it
    told_elsewhere = False

    def __init__(self, *words: str) -> None:
        super().__init__(sentence(*words) if len(words) == 3 else "".join(words))
        self.found = words[0] if len(words) == 3 else str(self)


class ConfigError(VeneerError, ValueError):
    """A field of a config is wrong."""


class TargetError(VeneerError, ValueError):
    """What was asked for cannot be attached to this model. Nothing was changed."""


class SelectionError(VeneerError, RuntimeError):
    """No adapter, an unknown adapter or a conflicting adapter is selected for a call."""


class BankFullError(VeneerError, MemoryError):
    """Adapters that are used or pinned at once, and more than a bank's budget of bytes."""


class MergeError(VeneerError, RuntimeError):
    """A merge or an unmerge that would lose something. Nothing was changed."""


class CheckError(VeneerError, RuntimeError):
    """An attached adapter that the model's output does not depend on."""


class DataError(VeneerError, ValueError):
    """Training or evaluation data that cannot be read or used."""


class TrainingError(VeneerError, ArithmeticError):
    """A run whose loss became infinite or not a number, or one of whose processes is gone."""


class OutputExistsError(VeneerError, FileExistsError):
    """An output path that already holds something, and no leave to replace it."""


class CheckpointError(VeneerError, ValueError):
    """The files of a model that are missing, damaged or not understood."""


class MethodError(VeneerError, AttributeError):
    """A name of another library that Veneer, a handle or a model with adapters does not have."""


class LibraryError(VeneerError, LookupError):
    """A name that a library of adapters lacks or cannot take, or an index of one that is
    damaged."""


class RemoteError(VeneerError, OSError):
    """A remote place that cannot be reached, read or written."""


class ExtractError(VeneerError, ValueError):
    """Two models whose difference cannot be written as an adapter. Nothing was written."""


class AdapterError(VeneerError, ValueError):
    """An adapter folder that is missing, damaged, altered or not understood."""


class BaseMismatchError(AdapterError):
    """An intact adapter whose base weights are not those of this model."""


# : characters of what was found, and problems, that one message shows: both may come from a file of
# any size
LONGEST, MOST = 2000, 50


def escape_controls(text: str) -> str:
    r"""A text of strangers as a terminal may show it: what steers one (escape sequences, overrides
    of the direction of writing) as ``\x1b``; lines and tabs stay."""
    return "".join(ascii(mark)[1:-1] if _steers(mark) else mark for mark in text)


def _steers(mark: str) -> bool:
    if mark.isprintable() or mark in "\n\t":
        return False
    return unicodedata.category(mark) != "Cf" or unicodedata.bidirectional(mark) != "BN"


def sentence(found: str, expected: str, do: str) -> str:
    """One problem in the form that every message of Veneer has."""
    found = found if len(found) <= LONGEST else f"{found[:LONGEST]}…"
    return f"Found: {found}. Expected: {expected}. Do: {do}."


def raise_all(error: type[VeneerError], what: str, problems: Sequence[str]) -> None:
    """Raise ``error`` once with every collected problem; return quietly if there are none."""
    if len(problems) == 1:
        raise error(f"{what}. {problems[0]}")
    if problems:
        lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:MOST], 1)]
        lines += [f"  … and {len(problems) - MOST} more"] if len(problems) > MOST else []
        raise error("\n".join([f"{what}: {len(problems)} problems", *lines]))


def warn_caller(message: str, category: type[Warning], within: Sequence[str] = ("veneer",)) -> None:
    """Warn at the line that called into these packages, however deep the call is within them. Each
    such line then warns once; at a line of a library, the first caller alone would be warned in the
    life of a process."""
    frame, level = sys._getframe(1), 2
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in within
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """`` (nearest: 'a', 'b')`` for the other known words most like ``word``, or an empty string."""
    others = [other for other in dict.fromkeys(known) if other != word]
    close = difflib.get_close_matches(word, others, n=limit, cutoff=0.5)
    return f" (nearest: {', '.join(map(repr, close))})" if close else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first ``limit`` names, comma separated, and how many more there are."""
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"
