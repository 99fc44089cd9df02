"""Tests on the emulated device (``tests/support/emulated_device.py``): ``make test-cuda``. Other
runs leave them out, as the device must be there before torch is."""

from __future__ import annotations

import sys

import pytest

PLUGIN = "tests.support.emulated_device"

if PLUGIN not in sys.modules:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = getattr(sys.modules.get(PLUGIN), "missing", "")
    for item in items:
        item.add_marker(
            pytest.mark.filterwarnings("ignore:CUDA reports that you have 2 available devices")
        )
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))
