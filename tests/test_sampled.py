"""The list of what the quick suite samples names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.sampled import EVERY

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", EVERY)
def test_what_is_sampled_is_there(name):
    file, _, function = name.partition("::")
    assert re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE)
