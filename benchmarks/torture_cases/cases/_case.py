"""What a case is, and how one is entered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torture_cases.judges import said
from torture_cases.library import Library, NotOffered, Result


@dataclass(frozen=True)
class Case:
    """One thing to get right. ``run`` takes a library."""

    name: str
    row: str
    run: Callable[[Library], Result]


CASES: list[Case] = []


def case(row: str, **named: dict[str, Any]):
    """Enter a function into CASES: under its own name, or under each of ``named`` with those
    arguments."""

    def enter(function: Callable[..., Result]):
        for name, arguments in (named or {function.__name__: {}}).items():
            CASES.append(Case(name, row, partial(function, **arguments)))
        return function

    return enter


def run(case: Case, library: Library) -> Result:
    """The case's result; an error that no judge expected is one too."""
    torch.manual_seed(0)
    try:
        return case.run(library)
    except NotOffered as reason:
        return Result(None, str(reason))
    except Exception as error:
        return Result(False, f"crashes: {said(error)}")
