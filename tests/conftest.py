"""What every test shares: a seed, one thread, and a variant and a layer kind that only tests
have."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import gc
import sys
from pathlib import Path

import pytest
import torch
from tests.support import extras
from tests.support.sampled import leave_to_the_slow_suite
from tests.support.tiny import write_tiny
from tests.support.toys import register_toys

register_toys()
gc.disable()  # nothing of what is imported and collected is garbage, and there is ever more of it to look through


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file whose imports need an extra that is missing is skipped."""
    report = yield
    why = extras.reason(report.longrepr) if report.failed else None
    if why is not None:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {why}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """So is a test that imports one as it runs."""
    report = yield
    error = None if call.excinfo is None else call.excinfo.value
    why = extras.reason(error) if isinstance(error, ModuleNotFoundError) else None
    if why is not None:
        report.outcome, report.longrepr = (
            "skipped",
            (str(item.path), item.location[1], f"Skipped: {why}"),
        )
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    leave_to_the_slow_suite(items)


def pytest_collection_finish():
    _freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """Some tests import large libraries, and each trainer has the garbage collected once or
    twice."""
    yield
    if len(sys.modules) > _freeze.modules + 100:
        gc.collect()
        _freeze()


def _freeze():
    """What is imported and collected stays to the end: the garbage collector need not walk it again
    and again."""
    _freeze.modules = len(sys.modules)
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _unflushed():
    """Flushing is for a loss of power, which no test can show: what a killed process has written is
    there. A disk takes milliseconds for each file. That it is asked for in the right order is what
    ``store/test_crashes.py`` looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny Llama and its tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("base") / "tiny")
