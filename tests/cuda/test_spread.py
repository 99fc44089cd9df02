"""A model on two devices: accelerate's ``device_map``, offloaded weights, and training where
several are visible."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from tests.support.emulated_device import G0, G1, count, one_visible
from tests.support.tiny import sums, tiny_model, write_rows, write_tiny
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.errors import MergeError, TargetError, VeneerError
from veneer.models.decode.forward import Forward
from veneer.models.decode.slots import Slots
from veneer.train.loss import causal_loss

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(5))
PLACES = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "model.rotary_emb": 0,
          "lm_head": 1}  # fmt: skip


def logits(model, place=G0):
    return model(input_ids=IDS.to(place), use_cache=False).logits


@pytest.fixture
def spread():
    """(the model, the same on two devices by hooks), both adapted with the same numbers."""
    model = tiny_model(tie_word_embeddings=False)
    other = accelerate.dispatch_model(copy.deepcopy(model), PLACES, force_hooks=True)
    handles = [veneer.attach(one, veneer.LoraConfig(rank=4)) for one in (model, other)]
    randomise(handles[0], 0.1)
    with torch.no_grad():
        for mine, theirs in zip(*(handle.parameters() for handle in handles), strict=True):
            theirs.copy_(mine)
    return model, other, *handles


def test_it_trains_as_on_one_device(spread):
    model, other, handle, other_handle = spread
    assert {p.device for p in other_handle.parameters()} == {G0, G1}
    assert error(logits(other).cpu(), logits(model, "cpu")) < 1e-5
    for one, place in ((model, "cpu"), (other, G0)):
        causal_loss(one.train(), {"input_ids": IDS.to(place), "labels": IDS.to(place)}).backward()
    for mine, theirs in zip(handle.parameters(), other_handle.parameters(), strict=True):
        assert error(theirs.grad.cpu(), mine.grad) < 1e-3


def test_it_checks_merges_saves_and_loads(spread, tmp_path):
    _, other, _, handle = spread
    y = logits(other)
    veneer.check(other, {"input_ids": IDS.to(G0), "use_cache": False})
    handle.merge()
    assert error(logits(other).cpu(), y.cpu()) < 1e-4
    handle.unmerge()
    handle.save(tmp_path / "a")
    handle.detach()
    assert "_old_forward" in other.model.layers[0].mlp.up_proj.__dict__
    assert type(other.model.layers[0].mlp.up_proj) is nn.Linear
    plain = logits(other)
    veneer.load(other, tmp_path / "a")
    assert error(logits(other).cpu(), y.cpu()) < 1e-5
    assert error(plain.cpu(), y.cpu()) > 1e-3


def test_it_serves_rows(spread, tmp_path):
    model, other, handle, other_handle = spread
    handle.save(tmp_path / "a")
    answers = []
    for one, place in ((model, "cpu"), (other, G0)):
        (handle if one is model else other_handle).detach()
        bank = veneer.Bank(one)
        bank.add(tmp_path / "a")
        with bank.rows(["a", None, "a"]), torch.no_grad():
            rows = logits(one, place)
        forward, slots = Forward(one), Slots(4, 64, torch.device(place))
        with torch.inference_mode(), bank.rows(["a", None]):
            served_rows = [slots.allocate(64), slots.allocate(64)]
            forward.fill(slots, served_rows, [[4, 5, 6], [4, 5]])
            served = forward.decode(slots, served_rows, [7, 8], [3, 2])
        forward.close()
        bank.close()
        answers.append((rows.cpu(), served.cpu()))
    for mine, theirs in zip(*answers, strict=True):
        assert error(theirs, mine) < 1e-4


def test_two_devices_by_hand():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8).to(G0), nn.Linear(8, 8).to(G1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).to(G1))

    model, x = Split(), torch.randn(5, 8, device=G0)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle)
    model(x).sum().backward()
    veneer.check(model, x)
    with torch.no_grad():
        y = model(x)
        handle.merge()
        assert error(model(x).cpu(), y.cpu()) < 1e-3
        handle.unmerge()
        with veneer.use(model, ["default", None, "default", None, None]):
            assert error(model(x)[[0, 2]].cpu(), y[[0, 2]].cpu()) < 1e-5


def test_a_model_that_is_moved_after_attaching():
    model = tiny_model()
    randomise(veneer.attach(model, veneer.LoraConfig(rank=4)))
    y = logits(model, "cpu")
    for place in (G0, G1):
        assert error(logits(model.to(place), place).cpu(), y) < 1e-5
    module = nn.MultiheadAttention(8, 2, batch_first=True).to(G0)
    slices = {"in_proj_weight": [True, False, True]}
    veneer.attach(module, veneer.LoraConfig(rank=2, targets=["in_proj_weight"], slices=slices))
    for place in (G0, G1):
        x = torch.randn(2, 3, 8, device=place)
        module.to(place)(x, x, x)[0].sum().backward()
        module.zero_grad()
        with count() as seen:
            module(x, x, x)
        assert seen.waits == []


def test_weights_that_are_offloaded_after_attaching_answer_and_do_not_train(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4))
    randomise(handle)
    y = logits(model, "cpu")
    model = accelerate.cpu_offload(model, execution_device=0)
    out = logits(model)
    assert error(out.cpu(), y) < 1e-5
    with pytest.raises(TargetError, match="offloaded"):
        out.sum().backward()
    with pytest.raises(MergeError, match="offloaded"):
        handle.merge()


def test_weights_that_are_offloaded_before_are_refused():
    model = accelerate.cpu_offload(tiny_model(tie_word_embeddings=False), execution_device=0)
    with pytest.raises(TargetError, match="meta"):
        veneer.attach(model, veneer.LoraConfig(rank=4))
    assert not any("veneer" in name for name, _ in model.named_modules())


def config_of(folder: Path, **changes):
    from veneer.train.config import make_config

    write_tiny(folder / "base")
    write_rows(folder / "data.jsonl", sums(12))
    fields = {
        "base": folder / "base",
        "data": folder / "data.jsonl",
        "output": folder / "out",
        "max_steps": 2,
    }
    fields = {
        name: value if isinstance(value, int) else str(value) for name, value in fields.items()
    }
    more = {"batch_size": 2, "precision": "bf16", "optimiser": "adamw_torch", "eval_fraction": 0.0}
    return make_config({**fields, **more, **changes})


def test_a_run_trains_on_the_device_and_waits_once_a_step(tmp_path, monkeypatch):
    from veneer.train import sft_trainer
    from veneer.train.run import fit

    seen = []
    original = sft_trainer.AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        with count() as one:
            found = original(self, *args, **kwargs)
        seen.append(one.waits)
        return found

    monkeypatch.setattr(sft_trainer.AdapterTrainer, "training_step", training_step)
    with one_visible():
        result = fit(config_of(tmp_path, grad_accum=2, dropout=0.1), quiet=True)
    assert next(result.model.parameters()).device == G0
    assert len(result.losses) == 2
    assert len(seen) == 4
    own = [
        wait for waits in seen[1:] for wait in waits if not wait.startswith("_local_scalar_dense")
    ]
    assert own == []


def test_a_run_that_sees_two_devices_says_what_it_does(tmp_path):
    from veneer.train.run import fit

    with contextlib.suppress(VeneerError):  # or refuses, in its own words
        fit(config_of(tmp_path, max_steps=1), quiet=True)
