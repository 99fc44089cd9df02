"""The cases, a module for each kind of work. A process loads the module of its own case alone."""

from importlib import import_module

from runner import Case

#: in the order of the page
MODULES = (
    "training",
    "calls",
    "files",
    "runs",
    "planning",
    "tasks",
    "rollouts",
    "serving",
    "earlier",
)


def all_cases() -> dict[str, Case]:
    """Every case, by name, in the order of the page."""
    return {case.name: case for name in MODULES for case in import_module(f"cases.{name}").CASES}
