"""numba, which takes 100 MiB, is not loaded by a small model, whatever is done with it."""

from __future__ import annotations

from tests.support.forked import printed

CODE = """
import os, sys, torch, veneer
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 96)).to(dtype), torch.randn(2, 64, 64, dtype=dtype)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets="all"))
    model(x).square().mean().backward()
    with torch.no_grad():
        model(x)
    handle.merge()
    handle.unmerge()
    handle.save(os.environ["FOLDER"], overwrite=True)
    handle.detach()
    bank = veneer.Bank(model)
    bank.add(os.environ["FOLDER"], "a")
    with torch.no_grad(), bank.rows(["a", None]):
        model(x)
print("numba" in sys.modules)
"""


def test_a_small_model_never_loads_numba(tmp_path):
    assert printed(CODE, FOLDER=str(tmp_path / "a")).splitlines()[-1] == "False"
