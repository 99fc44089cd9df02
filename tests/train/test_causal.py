"""`veneer train` trains causal language models on examples to imitate, and refuses what it would
train wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.support.tiny import sums, tiny_model, tiny_tokenizer, write_rows

from veneer import models
from veneer.errors import ConfigError, DataError
from veneer.train import data
from veneer.train.causal import must_keep_packed_examples_apart, must_not_see_later_tokens
from veneer.train.data import Columns
from veneer.train.run import fit
from veneer.train.tasks import TASKS

BERT = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def bert(name: str, **changes: Any) -> Any:
    kind = (
        "Roberta"
        if name.startswith("Roberta")
        else "Electra"
        if name.startswith("Electra")
        else "Bert"
    )
    torch.manual_seed(0)
    return getattr(transformers, name)(
        getattr(transformers, f"{kind}Config")(**{**BERT, **changes})
    ).eval()


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=259, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def classifier() -> Any:
    return transformers.LlamaForSequenceClassification(tiny_model().config)


def written(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "masked": (lambda: bert("BertForMaskedLM"), r"BertForMaskedLM, an encoder: each position sees"),
    "body": (lambda: bert("BertModel"), r"BertModel, an encoder: each position sees"),
    "a head of the right name": (
        lambda: bert("BertLMHeadModel"),
        r"BertLMHeadModel, an encoder: each position sees",
    ),
    "roberta": (lambda: bert("RobertaForMaskedLM"), r"RobertaForMaskedLM, an encoder"),
    "electra": (lambda: bert("ElectraForMaskedLM"), r"ElectraForMaskedLM, an encoder"),
    "translation": (bart, r"BartForConditionalGeneration, an encoder and a decoder"),
    "classifier": (classifier, r"whose config names LlamaForSequenceClassification"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_that_is_no_causal_language_model_is_refused_before_it_is_loaded(
    name: str, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, message = REFUSED[name]
    folder = written(build(), tmp_path / "base")

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(models, "load_head", load)
    config = make(base=str(folder), data=str(write_rows(tmp_path / "rows.jsonl", sums(8))))
    with pytest.raises(ConfigError, match=message) as error:
        fit(config, quiet=True)
    assert "Expected: a causal language model. Do: choose a causal base" in str(error.value)
    assert not config.output.exists()


def test_a_decoder_of_a_family_of_encoders_is_causal(tmp_path: Path) -> None:
    folder = written(bert("BertLMHeadModel", is_decoder=True), tmp_path / "base")
    models.must_be_causal(folder)
    must_not_see_later_tokens(models.load_base(folder, precision="fp32").model, "it")


def test_what_a_config_does_not_tell_two_rows_tell(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    must_not_see_later_tokens(tiny_model(), "it")
    must_not_see_later_tokens(tiny_model().bfloat16(), "it")
    with pytest.raises(
        ConfigError,
        match="BertLMHeadModel whose predictions change with the tokens that come after",
    ):
        must_not_see_later_tokens(bert("BertLMHeadModel"), "it")
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=259, d_model=32, n_layer=2, n_head=4, d_inner=48)
    folder = written(
        transformers.XLNetLMHeadModel(config), tmp_path / "xlnet"
    )  # in transformers' list of causal ones
    config = make(base=str(folder))
    with pytest.raises(ConfigError, match="XLNetLMHeadModel whose predictions change"):
        fit(config, quiet=True)
    assert not config.output.exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "products"])
def test_a_base_that_keeps_packed_examples_apart_may_pack(
    attention: str, precision: Any, base: Path
) -> None:
    loaded = models.load_base(base, attention=attention, precision=precision)
    must_keep_packed_examples_apart(loaded.model, "it")


def test_a_base_that_mixes_packed_examples_is_refused_with_packing_alone(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    """BLOOM takes the positions of packed examples and ignores them."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)
    folder = written(transformers.BloomForCausalLM(config), tmp_path / "bloom")
    unpacked = TASKS["sft"](make(base=str(folder)))
    unpacked.open_base()
    assert unpacked.load().model.config.model_type == "bloom"
    config = make(base=str(folder), packing=True, max_length=64)
    with pytest.raises(ConfigError, match="a BloomForCausalLM that mixes packed examples") as error:
        fit(config, quiet=True)
    assert "Do: leave out packing" in str(error.value)
    assert not config.output.exists()


PREFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "texts": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "--prompt-column prompt --completion-column chosen",
    ),
    "whole texts": ({"chosen": "a b", "rejected": "a c"}, "--text-column chosen"),
    "chats": (
        {
            "chosen": [{"role": "user", "content": "a"}],
            "rejected": [{"role": "user", "content": "b"}],
        },
        "--messages-column chosen",
    ),
    "beside a text": ({"text": "a", "chosen": "b", "rejected": "c"}, "--text-column chosen"),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_refused_with_the_trainer_that_learns_them(
    name: str, tmp_path: Path
) -> None:
    row, flags = PREFERENCES[name]
    file = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(
        DataError, match=rf"holds preferences.*\n.*\n.*--task dpo.*alone: {flags}\.$"
    ):
        data.read(file)
    words = flags.split()
    columns = {
        flag.removeprefix("--").removesuffix("-column"): column
        for flag, column in zip(words[::2], words[1::2], strict=True)
    }
    assert data.read(file, Columns(**columns)).unused  # the advice works


LABELLED: dict[str, tuple[dict[str, Any], Columns]] = {
    "text": ({"text": "good", "label": 1}, Columns(text="text")),
    "sentence": ({"sentence": "good", "label": 1}, Columns(text="sentence")),
    "completions": (
        {"prompt": "a", "completion": "b", "label": True},
        Columns(prompt="prompt", completion="completion"),
    ),
    "chat": (
        {"messages": [{"role": "user", "content": "a"}], "labels": 0},
        Columns(messages="messages"),
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_refused_unless_the_columns_are_named(name: str, tmp_path: Path) -> None:
    row, columns = LABELLED[name]
    file = write_rows(tmp_path / "a.jsonl", [row])
    flags = " ".join(
        f"--{part}-column {column}" for part, column in vars(columns).items() if column
    )
    with pytest.raises(
        DataError,
        match=rf"has the column 'labels?' beside .*\n(.*\n)*.*columns to read: {flags}\.$",
    ):
        data.read(file)
    assert data.read(file, columns).unused == (next(key for key in row if key.startswith("label")),)


def test_a_run_says_which_columns_it_does_not_use(make: Callable[..., Any], tmp_path: Path) -> None:
    import io

    from rich.console import Console

    rows = [{**row, "source": "me", "score": 1} for row in sums(8)]
    shown = io.StringIO()
    config = make(
        data=str(write_rows(tmp_path / "a.jsonl", rows)), epochs=1, max_steps=1, eval_fraction=0.0
    )
    fit(config, console=Console(file=shown, width=200))
    assert "columns that are not used: source, score" in shown.getvalue()
