"""The browser of the tests of the page, and servers that stop at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import uvicorn.server
from tests.support.browser import browser  # noqa: F401 - a fixture is used by its name


@pytest.fixture(autouse=True, scope="session")
def _stops_at_once() -> Iterator[None]:
    """uvicorn looks every 0.1 s whether it is to stop, and then gives connections another 0.1 s:
    200 tests wait."""
    sooner = SimpleNamespace(
        **vars(asyncio) | {"sleep": lambda seconds: asyncio.sleep(seconds / 20)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", sooner)
        yield
