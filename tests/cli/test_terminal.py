"""Nothing that a stranger's file says steers the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import veneer as package
from veneer.errors import escape_controls

# : clears the screen, names the window, goes back to the start of the line, turns the text around,
# ends a string
STEERS = "a\x1b[2Jb\x1b]0;owned\x07c\rd\u202ee\x9b31mf"
SHOWN = r"a\x1b[2Jb\x1b]0;owned"  # of what follows rich drops some marks by itself


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of another library, whose config names a base so."""
    handle = package.attach(nn.Sequential(nn.Linear(4, 4)), package.LoraConfig(rank=1))
    return handle.save(
        tmp_path / "adapter", base_name=STEERS, provenance={"title": STEERS, "description": STEERS}
    )


def clean(text: str) -> bool:
    return not any(mark in text for mark in "\x1b\x07\x9b\r\u202e")


def test_texts_of_strangers_are_shown_and_steer_nothing(veneer: Any, folder: Path) -> None:
    found = veneer("inspect", folder)
    assert found.code == 0
    assert SHOWN in found.out
    assert clean(found.out + found.err)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": STEERS}))
    for command in ("inspect", "verify"):
        found = veneer(command, folder)
        assert found.code != 0
        assert clean(found.out + found.err)
    found = veneer("inspect", folder.with_name(STEERS))
    assert SHOWN in found.err
    assert clean(found.out + found.err)


def test_a_model_card_holds_no_escape_sequences(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert r"\\x1b" in card
    assert clean(card)


@pytest.mark.parametrize(
    "text", ["a\nb\tc", "naïve – 日本語 🙂", "👩\u200d👩\u200d👧", "می\u200cخواهم"]
)
def test_texts_of_the_world_stay_as_they_are(text: str) -> None:
    assert escape_controls(text) == text
