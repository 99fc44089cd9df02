"""16-bit products of many shapes do not fill the memory of a server or a training run."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.extras import needs

from veneer.kernels import onednn

#: how many KiB a process grows by 16-bit products of 400 shapes
PRODUCTS = """
import resource, torch
from veneer.serve.start import prepare_process

prepare_process()
weight = torch.randn(256, 256, dtype=torch.bfloat16)
x = torch.randn(600, 256, dtype=torch.bfloat16)
torch.nn.functional.linear(x, weight)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for tokens in range(200, 600):
    torch.nn.functional.linear(x[:tokens], weight)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


@needs("fastapi")
@pytest.mark.skipif(sys.platform != "linux", reason="KiB of ru_maxrss")
def test_kernels_of_many_shapes_do_not_fill_a_servers_memory():
    unset = {name: value for name, value in os.environ.items() if name not in onednn.VARIABLES}
    # torch and oneDNN keep 1,024 each by default: 220 MiB after these products
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=unset,
    )
    assert int(done.stdout) < 60 * 1024


@needs("trl")
@pytest.mark.parametrize("value", [None, "7"])
def test_a_training_process_sets_what_the_user_has_not_set(value, tmp_path, monkeypatch):
    from veneer.cli import train

    for name in onednn.VARIABLES:
        monkeypatch.setenv(name, value or "")  # the test restores what was there
        if value is None:
            monkeypatch.delenv(name)
    settings: Any = SimpleNamespace(output=tmp_path / "run")
    seen = []
    monkeypatch.setattr(
        "veneer.train.run.fit",
        lambda *_, **__: seen.extend(map(os.environ.get, onednn.VARIABLES)) or sys.exit(3),
    )
    with pytest.raises(SystemExit):
        train._run(settings)
    assert seen == [value or str(onednn.TRAINING)] * 2
