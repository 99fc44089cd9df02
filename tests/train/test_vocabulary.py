"""Tokens that a run adds: trained, saved with their tokenizer, and what a killed run makes of them
is the same."""

from __future__ import annotations

import peft
import pytest
import torch
from tests.support.runs import Crash, same
from tests.support.tiny import tiny_model, tiny_tokenizer, write_rows, write_tiny
from tests.support.toys import error
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.adapter_files import read
from veneer.errors import AdapterError, ConfigError
from veneer.tools.convert import convert
from veneer.tools.merge_checkpoint import merge_checkpoint
from veneer.train.config import make_config
from veneer.train.run import fit

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
NEW = [f"<t{number}>" for number in range(8)]
TEXT = "<t0> x <t3>"


def run(folder, base, output, **changes):
    rows = [
        {"prompt": f"{one} {n} =", "completion": f" {NEW[-1 - k]}"}
        for n in range(3)
        for k, one in enumerate(NEW)
    ]
    options = {
        "rank": 2,
        "max_steps": 6,
        "batch_size": 4,
        "save_every": 2,
        "learning_rate": 5e-2,
        "precision": "fp32",
    }
    data = write_rows(folder / "rows.jsonl", rows)
    given = {
        "base": str(base),
        "data": str(data),
        "output": str(folder / output),
        "add_tokens": NEW,
        **options,
    }
    return make_config({**given, **changes})


def logits(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def grown(base, seed=9):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(267)
    return model


def test_eight_added_tokens_are_trained_and_mean_the_same_everywhere(tmp_path):
    base = write_tiny(tmp_path / "base")
    result = fit(run(tmp_path, base, "run"), quiet=True)
    assert result.losses[-1] < result.losses[0]
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    assert tokenizer(TEXT).input_ids[0] == 259
    assert len(tokenizer) == 267
    assert result.handle.config.trainable_tokens == {"model.embed_tokens": tuple(range(259, 267))}
    assert read(result.adapter).metadata["changes"]["model.embed_tokens.weight"]["of"] == 267
    expected = logits(result.model, tokenizer)
    ours = AutoModelForCausalLM.from_pretrained(base)
    veneer.load(ours, result.adapter, grow=True)
    assert error(logits(ours, tokenizer), expected) < 1e-5
    theirs = peft.PeftModel.from_pretrained(grown(base), result.adapter)
    assert error(logits(theirs, tokenizer), expected) < 1e-5
    merge_checkpoint(base, [result.adapter], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (
        error(logits(merged, AutoTokenizer.from_pretrained(tmp_path / "merged")), expected) < 1e-5
    )
    with pytest.raises(AdapterError, match=r"one weight.*merge"):
        convert(result.adapter, tmp_path / "a.gguf", to="gguf", base=grown(base))
    apart = grown(base)
    apart.config.tie_word_embeddings = False
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    convert(result.adapter, tmp_path / "a.gguf", to="gguf", base=apart)
    veneer.load(apart, convert(tmp_path / "a.gguf", tmp_path / "back", to="veneer", base=apart))
    assert error(logits(apart, tokenizer), expected) < 1e-5


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path):
    base = write_tiny(tmp_path / "base")
    whole = fit(run(tmp_path, base, "whole"), quiet=True)
    with pytest.raises(ZeroDivisionError):
        fit(run(tmp_path, base, "cut"), quiet=True, callbacks=[Crash(4)])
    same(whole, fit(run(tmp_path, base, "cut"), quiet=True))


def test_both_ends_of_an_untied_model_are_trained_and_known_tokens_too(tmp_path):
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=False).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    result = fit(run(tmp_path, base, "run", trainable_tokens=["x"], max_steps=2), quiet=True)
    ids = result.handle.config.trainable_tokens
    assert ids.keys() == {"model.embed_tokens", "lm_head"}
    assert len(ids["lm_head"]) == 9
    with pytest.raises(ConfigError, match=r"'<no>'.*a token of the 267"):
        fit(run(tmp_path, base, "other", trainable_tokens=["<no>"]), quiet=True)
    with pytest.raises(ConfigError, match="blank"):
        fit(run(tmp_path, base, "other", add_tokens=[" "]), quiet=True)
    assert not (tmp_path / "other").exists()
