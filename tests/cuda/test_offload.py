"""`veneer train` on a device: activations offloaded to main memory, and a base that is spread over
two devices."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.emulated_device import bytes_more
from tests.support.tiny import sums, write_rows, write_tiny
from trl.models import activation_offloading
from trl.trainer import sft_trainer

from veneer import models
from veneer.train.config import make_config
from veneer.train.run import fit

BLOCKS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    write_tiny(folder / "base", hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS)
    write_rows(folder / "rows.jsonl", sums(40))
    return folder


def run(place: Path, name: str, **changes: Any) -> Any:
    fields = {
        "base": str(place / "base"),
        "data": str(place / "rows.jsonl"),
        "output": str(place / name),
    }
    config = make_config(
        {**fields, "max_steps": 3, "batch_size": 16, "precision": "fp32", "check": False, **changes}
    )
    return fit(config, quiet=True)


@pytest.fixture
def _one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated device has no streams and no pinned memory: trl's other way, which copies and
    waits."""
    made = partial(
        activation_offloading.get_act_offloading_ctx_manager,
        use_streams=False,
        use_pin_memory=False,
    )
    monkeypatch.setattr(sft_trainer, "get_act_offloading_ctx_manager", made)
    monkeypatch.setattr(activation_offloading.OffloadActivations, "s0", None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_one_stream")
def test_offloaded_activations_change_no_loss_and_leave_the_device(place: Path) -> None:
    run(place, "first")  # what is made once in a process
    found = {}
    for offloaded in (False, True):
        with bytes_more() as more:
            result = run(place, f"offloaded-{offloaded}", offload_activations=offloaded)
        found[offloaded] = result.losses, more.peak
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert found[True][1] < 0.75 * found[False][1]


def test_a_base_over_two_devices_trains_to_the_losses_of_one(place: Path) -> None:
    lower = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "lm_head"], 0)
    blocks = {f"model.layers.{i}": int(i >= BLOCKS // 2) for i in range(BLOCKS)}
    one, both = (
        run(place, "one"),
        run(place, "both", device_map={**lower, **blocks, "model.norm": 1}, check=True),
    )
    assert {str(p.device) for p in both.model.parameters()} == {"cuda:0", "cuda:1"}
    assert both.losses == pytest.approx(one.losses, rel=1e-5)


def test_a_base_on_a_device_keeps_its_attention(place: Path) -> None:
    """Attention as plain products is for a processor."""
    assert (
        models.load_base(place / "base", device="cuda").model.config._attn_implementation == "sdpa"
    )
