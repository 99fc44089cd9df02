"""Linear layers of other libraries that are no ``nn.Linear`` are linear layers to us: in words,
paths and files."""

from __future__ import annotations

import pytest
import torch
from tests.support.toys import error, randomise

import veneer
from veneer.layers import kind_of


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's, of what the library does as it is imported
def test_linear_layers_of_pytorch_geometric(tmp_path):
    geometric = pytest.importorskip("torch_geometric.nn")
    x, edges = torch.randn(12, 6), torch.randint(0, 12, (2, 30))
    model = geometric.GraphSAGE(-1, 8, num_layers=2, out_channels=3).eval()
    with pytest.raises(veneer.errors.TargetError, match="no shape yet"):
        veneer.attach(model, veneer.LoraConfig(rank=2))
    base = model(x, edges)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    lin = [f"convs.{block}.{name}.weight" for block in (0, 1) for name in ("lin_l", "lin_r")]
    assert sorted(handle.changes) == lin
    assert [kind_of(module).name for module in (model.convs[0].lin_l, model.convs[1].lin_r)] == [
        "linear"
    ] * 2
    randomise(handle)
    y = model(x, edges)
    assert error(y, base) > 1e-2
    handle.save(tmp_path / "adapter")
    handle.merge()
    assert error(model(x, edges), y) < 1e-5
    handle.unmerge()
    handle.detach()
    assert torch.equal(model(x, edges), base)
    veneer.load(model, tmp_path / "adapter")
    assert torch.equal(model(x, edges), y)
