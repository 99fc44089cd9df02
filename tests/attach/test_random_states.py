"""The random states that a Lightning checkpoint stores, on GPUs that are imitated."""

import pytest
import torch

from veneer import integrations


@pytest.mark.parametrize("count", [2, 1])
def test_states_of_gpus_are_restored_if_there_are_as_many(count, monkeypatch):
    gpu_states = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: gpu_states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    states = integrations._random_states()
    expected = torch.rand(3)
    integrations._set_random_states(states)
    assert torch.equal(torch.rand(3), expected)
    assert len(restored) == (2 if count == 2 else 0)
    assert all(map(torch.equal, restored, gpu_states))
