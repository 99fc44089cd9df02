"""The commands on an adapter that adds tokens: which grow the base, and which ask for one that has
grown."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.support.commands import refused
from tests.support.tiny import tiny_tokenizer, write_tiny
from transformers import AutoModelForCausalLM

from veneer import LoraConfig, attach

Case = Callable[..., Any]
PROMPT = "5 <a>"


class Folders(NamedTuple):
    base: Path
    grown: Path  # the base with random rows for the new tokens
    adapter: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """An adapter that answers `PROMPT`, in which ``<a>`` is one token, with ``<b>``."""
    made = Folders(*(tmp_path_factory.mktemp("tokens") / name for name in Folders._fields))
    write_tiny(made.base, tie_word_embeddings=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made.base).eval(), tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    model.resize_token_embeddings(261, mean_resizing=False)
    model.save_pretrained(made.grown)
    tokenizer.save_pretrained(made.grown)
    ends = {"embed_tokens": [259, 260], "lm_head": [259, 260]}
    handle = attach(model, LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=ends))
    with torch.no_grad():
        handle.changes["model.embed_tokens.weight"].token_rows.normal_()
        last = model.model(torch.tensor([tokenizer(PROMPT).input_ids])).last_hidden_state[0, -1]
        handle.changes["lm_head.weight"].token_rows[1] = 10 * last
    handle.save(made.adapter)
    tokenizer.save_pretrained(made.adapter)
    return made


def test_generate_grows_the_base_and_takes_the_adapters_tokenizer(
    veneer: Case, folders: Folders
) -> None:
    options = "--prompt", PROMPT, "--max-new-tokens", 1
    found = veneer("generate", folders.base, "--adapter", folders.adapter, *options)
    assert found.code == 0, found.err
    assert found.out.strip() == "<b>"
    assert veneer("generate", folders.base, *options).out.strip() != "<b>"


def test_convert_to_gguf_asks_for_the_grown_base(
    veneer: Case, folders: Folders, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    command = "convert", folders.adapter, tmp_path / "a.gguf", "--to", "gguf"
    refused(veneer(*command), "trained tokens", "no base", "Do: give the base")
    refused(veneer(*command, "--base", folders.base), "259 rows", r"resize_token_embeddings\(261\)")
    assert not (tmp_path / "a.gguf").exists()
    found = veneer(*command, "--base", folders.grown)
    assert found.code == 0, found.err
    assert "fits this base alone" in found.out


def test_extract_of_a_vocabulary_that_grew_asks_for_a_base_that_grew_alike(
    veneer: Case, folders: Folders, tmp_path: Path
) -> None:
    assert veneer("merge", folders.base, folders.adapter, tmp_path / "merged").code == 0
    command = tmp_path / "merged", tmp_path / "out", "--rank", 2, "--json"
    refused(
        veneer("extract", folders.base, *command),
        "other shapes",
        "embed_tokens",
        "model.resize_token_embeddings",
    )
    assert not (tmp_path / "out").exists()
    found = veneer("extract", folders.grown, *command)
    assert found.code == 0, found.err
    kept = {layer["path"]: layer["kept"] for layer in json.loads(found.out)["layers"]}
    assert kept["model.embed_tokens.weight"] > 0.9999  # two rows are a product of rank 2
    options = "--prompt", PROMPT, "--max-new-tokens", 1
    assert (
        veneer("generate", folders.grown, "--adapter", tmp_path / "out", *options).out.strip()
        == "<b>"
    )


def test_chat_refuses_adapters_whose_new_tokens_share_an_id(
    veneer: Case, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, fewer = (
        shutil.copytree(folders.adapter, tmp_path / "o"),
        shutil.copytree(folders.adapter, tmp_path / "f"),
    )
    for place, tokens in ((other, ["<c>", "<d>"]), (fewer, ["<a>"])):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    both = "chat", folders.base, "--adapter", f"first={folders.adapter}", "--adapter"
    refused(
        veneer(*both, f"second={other}"),
        "'second' has '<c>' at 259, '<d>' at 260, where 'first' has '<a>'",
        "one tokenizer",
    )
    done = veneer(*both, f"second={fewer}")
    assert done.code == 0, done.err
