"""numba, which takes 100 MiB, is loaded where its loops gain something, and nowhere else."""

from __future__ import annotations

import pytest
from tests.support.compiled import needs_loop
from tests.support.forked import printed

CODE = """
import os, sys, torch, veneer
torch.set_num_threads(1)
width, dtype, bank = int(os.environ["WIDTH"]), getattr(torch, os.environ["DTYPE"]), os.environ["WHAT"] == "bank"
model, x = torch.nn.Sequential(torch.nn.Linear(width, width)).to(dtype), torch.randn(2, 64, width, dtype=dtype)
handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets="all"))
model(x).square().mean().backward()
with torch.no_grad():
    model(x)
handle.merge()
handle.unmerge()
if bank:
    handle.save(os.environ["FOLDER"])
    handle.detach()
    bank = veneer.Bank(model)
    bank.add(os.environ["FOLDER"], "a")
    with torch.no_grad(), bank.rows(["a", None]):
        model(x)
print("numba" in sys.modules)
"""


def loads(tmp_path, width, dtype, what="step"):
    said = printed(CODE, WIDTH=str(width), DTYPE=dtype, WHAT=what, FOLDER=str(tmp_path / "a"))
    return said.splitlines()[-1] == "True"


@pytest.mark.parametrize(("width", "dtype", "what"), [(64, "float32", "bank"), (256, "float64", "step")])
def test_who_gains_nothing_from_loops_never_loads_numba(tmp_path, width, dtype, what):
    assert not loads(tmp_path, width, dtype, what)


@needs_loop("thin_matmul")
def test_who_gains_from_loops_loads_it(tmp_path):
    assert loads(tmp_path, 256, "float32")
