"""`veneer merge` of classifiers: the head that the adapter trained, its labels, and what
transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.support.tiny import tiny_tokenizer, write_tiny
from tests.support.toys import randomise
from transformers import AutoModelForSequenceClassification

import veneer
from veneer.adapter_files import save_load
from veneer.errors import MergeError
from veneer.tools.merge_checkpoint import merge_checkpoint, prove

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 16,
}  # fmt: skip
IDS = torch.arange(8)[None]


def write_base(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    if kind == "encoder":
        transformers.BertModel(config).save_pretrained(folder)
    elif kind == "shards":
        transformers.BertForMaskedLM(config).save_pretrained(folder, max_shard_size="4KB")
    else:
        config.id2label, config.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def trained(base: Path, labels: list[str], folder: Path, **provenance: Any) -> Any:
    names = dict(enumerate(labels))
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, id2label=names)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    handle.save(folder, provenance=provenance)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("encoder", ["a", "b"]),
        ("encoder", ["low", "mid", "high"]),
        ("shards", [*"abcde"]),
        ("head", ["x", "y", "z"]),
    ],
)
def test_the_merged_classifier_is_the_adapted_one(
    kind: str, labels: list[str], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", kind)
    model = trained(base, labels, tmp_path / "adapter")
    done = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert prove(base, [tmp_path / "adapter"], tmp_path / "merged") > 10
    assert any("classifier.weight" in note for note in done.notes) == (kind != "head")
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert [merged.config.id2label[number] for number in range(len(labels))] == labels
    assert merged.config.label2id == {label: number for number, label in enumerate(labels)}
    assert merged.config.architectures == ["BertForSequenceClassification"]


def test_a_record_without_labels_is_known_by_the_size_of_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", "encoder")
    monkeypatch.setattr(save_load, "labels_of", lambda model: None)  # as an earlier Veneer wrote it
    model = trained(base, ["a", "b", "c"], tmp_path / "adapter")
    assert "labels" not in json.loads((tmp_path / "adapter" / "veneer.json").read_text())["base"]
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert merged.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    trained(
        base,
        ["a", "b", "c"],
        tmp_path / "run",
        task={"name": "classify", "labels": ["p", "q", "r"]},
    )
    merge_checkpoint(base, [tmp_path / "run"], tmp_path / "named")
    assert json.loads((tmp_path / "named" / "config.json").read_text())["id2label"]["2"] == "r"


def test_heads_of_different_labels_are_not_merged_into_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "encoder")
    trained(base, ["a", "b", "c"], tmp_path / "one")
    trained(base, ["a", "b", "d"], tmp_path / "other")
    with pytest.raises(MergeError, match=r"a, b, c.*a, b, d"):
        merge_checkpoint(
            base, [(tmp_path / "one", 0.5), (tmp_path / "other", 0.5)], tmp_path / "merged"
        )
    assert not (tmp_path / "merged").exists()


def test_save_pretrained_says_what_from_pretrained_must_be_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "encoder")
    model = trained(base, ["a", "b", "c"], tmp_path / "adapter")
    with pytest.warns(veneer.LoadedElsewhere, match="num_labels=3"):
        model.save_pretrained(tmp_path / "saved")
    again: Any = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", num_labels=3
    )
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize("pad_token", ["<|pad|>", None])
def test_a_merged_classifier_of_a_decoder_finds_the_last_token(
    pad_token: str | None, tmp_path: Path
) -> None:
    """As in training: by the padding token of the tokenizer, else its end-of-text token."""
    base = write_tiny(tmp_path / "base", pad_token_id=None)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(base)
    pad_id = tokenizer.eos_token_id if pad_token is None else tokenizer.pad_token_id
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=pad_id
    )
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    handle.save(tmp_path / "adapter")
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, pad_id, pad_id], [5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected, found = model.eval()(ids).logits, merged.eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_labels_of_a_head_that_the_base_has_are_written_and_proved(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "head")
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, id2label={0: "neg", 1: "neu", 2: "pos"}
    )
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    assert not any(layer.full._parameters for layer in handle.layers.values())
    randomise(handle)
    handle.save(tmp_path / "adapter")
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "neu", "2": "pos"}
    assert prove(base, [tmp_path / "adapter"], tmp_path / "merged") > 10


def test_two_heads_that_the_base_lacks_need_weights_that_add_up_to_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "encoder")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        trained(base, ["x", "y"], folder)
    for adapters in (folders, [(folders[0], 0.7)]):
        with pytest.raises(MergeError, match="which the base's files lack, in adapters whose"):
            merge_checkpoint(base, adapters, tmp_path / "out")
    merge_checkpoint(base, [(folder, 0.5) for folder in folders], tmp_path / "mean")
    heads = [AutoModelForSequenceClassification.from_pretrained(base) for _ in folders]
    for head, folder in zip(heads, folders, strict=True):
        veneer.load(head, folder)
        veneer.merge(head)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean")
    mean = sum(head.classifier.weight for head in heads) / 2
    assert torch.allclose(merged.classifier.weight, mean, atol=1e-6)
