"""What a bank takes from an adapter in training: its numbers of now, without a file in between."""

from __future__ import annotations

import pytest
import torch
from tests.support.models import IDS, TinyLM
from tests.support.toys import randomise

import veneer
from veneer.errors import AdapterError


def answer(bank, name):
    with torch.no_grad(), bank.rows([name] * len(IDS)):
        return bank.model(IDS)


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
def test_numbers_of_now_until_they_are_put_again(tmp_path, variant, monkeypatch):
    model = TinyLM()
    bank = veneer.Bank(model)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, variant=variant), "run")
    read = []
    real = bank._load
    monkeypatch.setattr(
        bank, "_load", lambda entry, wanted: read.append(entry.name) or real(entry, wanted)
    )
    told = []
    for step in range(2):
        randomise(handle, 0.3)
        handle.save(tmp_path / str(step))
        bank.put("now", tmp_path / str(step), "run")
        with torch.no_grad(), handle.use():
            told.append(model(IDS))
        torch.testing.assert_close(answer(bank, "now"), told[step])
    assert (read == []) == (
        variant != "vera"
    )  # whose shared numbers are low rank only once they are resolved
    randomise(handle, 0.3)
    torch.testing.assert_close(answer(bank, "now"), told[1])  # which training does not reach

    bank.add(tmp_path / "1", "read")
    torch.testing.assert_close(answer(bank, "now"), answer(bank, "read"))


def test_what_was_evicted_is_read_from_the_folder(tmp_path):
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2), "run")
    bank = veneer.Bank(model)
    folders = []
    for name in "ab":
        randomise(handle, 0.3)
        handle.save(tmp_path / name)
        bank.put(name, tmp_path / name, "run")
        folders.append(answer(bank, name))
    bank.capacity = bank.nbytes
    events = []
    bank.on_event = lambda kind, name, _: events.append((kind, name))
    bank.add(tmp_path / "a", "c")  # for which there is room once another is gone
    for name, expected in zip("abab", folders * 2, strict=True):
        torch.testing.assert_close(answer(bank, name), expected)
    assert ("evict", "a") in events
    assert ("load", "a") in events


def test_a_folder_that_is_not_there_changes_nothing(tmp_path):
    model = TinyLM()
    veneer.attach(model, veneer.LoraConfig(rank=2), "run")
    bank = veneer.Bank(model)
    with pytest.raises(AdapterError, match="cannot be registered"):
        bank.put("now", tmp_path / "none", "run")
    assert bank.names == ()
    assert bank.nbytes == 0
