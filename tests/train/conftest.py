"""A tiny base on disk and a run on it, shared by the tests of a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny import sums, write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompt/completion rows."""
    return write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(40))


def config_of(base: Path, rows: Path, output: Path, /, **changes: Any) -> Any:
    """A `TrainConfig` of a small run with dropout and evaluation."""
    from veneer.train.config import make_config

    fields: dict[str, Any] = {
        "base": str(base), "data": str(rows), "output": str(output), "rank": 4, "dropout": 0.1,
        "epochs": 3, "batch_size": 4, "eval_fraction": 0.1, "eval_every": 4, "save_every": 5, "learning_rate": 5e-3,
        "precision": "fp32",
    }  # fmt: skip
    return make_config({**fields, **changes})


@pytest.fixture
def make(base: Path, rows: Path, tmp_path: Path) -> Callable[..., Any]:
    """`make(output="a", rank=2, ...)`: a `TrainConfig` of a small run with dropout and
    evaluation."""

    def build(output: str = "run", **changes: Any) -> Any:
        return config_of(base, rows, tmp_path / output, **changes)

    return build


@pytest.fixture(scope="session")
def whole(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of `make()` that nothing has stopped; tests only read it."""
    from veneer.train.run import fit

    return fit(config_of(base, rows, tmp_path_factory.mktemp("whole") / "run"), quiet=True)
