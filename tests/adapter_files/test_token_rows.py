"""Trained tokens in adapter folders: Veneer's own, PEFT's both ways, and of vocabularies that
grew."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.support.adapters import forge
from tests.support.toys import bits, error

import veneer
from veneer.adapter_files import read
from veneer.adapter_files.verify import verify
from veneer.errors import AdapterError, BaseMismatchError

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's own, and that its adapters carry no fingerprint

EMBED, NEW = "model.embed_tokens.weight", [40, 41, 42]
IDS = torch.tensor([[1, 40, 7, 41, 42, 3], [42, 5, 6, 9, 40, 2]])
ALONE = veneer.LoraConfig(targets=(), trainable_tokens=NEW)
BESIDE = veneer.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=NEW)
BOTH = veneer.LoraConfig(
    rank=2, targets=["q_proj"], trainable_tokens={"embed_tokens": NEW, "lm_head": NEW}
)
SAME = veneer.LoraConfig(rank=2, targets=["embed_tokens"], trainable_tokens=NEW)


def llama(tied=True, size=43, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=size,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def grown(tied=True, seed=7):
    """A model whose vocabulary grew by three tokens, which got other random rows for each seed."""
    model = llama(tied, 40)
    torch.manual_seed(seed)
    model.resize_token_embeddings(43)
    return model


def trained(model, folder, config=BESIDE):
    """(the folder, the logits) of a trained adapter."""
    handle = veneer.attach(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        handle.save(folder)
        return folder, model(IDS).logits


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "config", [ALONE, BESIDE, BOTH, SAME], ids=["alone", "beside", "both", "same"]
)
def test_a_saved_adapter_loads_with_the_same_outputs_here_and_in_peft(tmp_path, config, tied):
    folder, expected = trained(llama(tied), tmp_path / "a", config)
    model = llama(tied)
    handle = veneer.load(model, folder, trainable=True)
    assert torch.equal(logits(model), expected)
    assert handle.config == config
    handle.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == load_file(
        folder / "adapter_model.safetensors"
    ).keys()  # fmt: skip
    assert verify(folder, llama(tied)).ok
    if config is SAME:
        with pytest.raises(
            KeyError, match=r"not for PEFT.*low-rank change of a module of which it trains tokens"
        ):
            peft.PeftModel.from_pretrained(llama(tied), folder)
        return
    theirs = peft.PeftModel.from_pretrained(llama(tied), folder)
    assert error(logits(theirs), expected) < 1e-6
    if tied or config is BOTH:
        assert error(logits(theirs.merge_and_unload()), expected) < 1e-6


def test_peft_refuses_tokens_beside_a_low_rank_change_of_their_embedding():
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], trainable_token_indices=NEW)
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        peft.get_peft_model(llama(), config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "indices",
    [
        [42, 40],
        {"embed_tokens": [42, 40]},
        {"tokens": [42, 40]},
        {"embed_tokens": [42], "lm_head": [42]},
    ],
)
def test_an_adapter_of_pefts_computes_the_same_here(tmp_path, indices, tied):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    theirs = peft.get_peft_model(llama(tied), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model = llama(tied)
    handle = veneer.load(model, tmp_path)
    assert error(logits(model), logits(theirs)) < 1e-6
    handle.merge()
    assert error(logits(model), logits(theirs)) < 1e-6


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_of_trainable_tokens_computes_the_same_here(tmp_path, tied):
    theirs = peft.get_peft_model(llama(tied), peft.TrainableTokensConfig(token_indices=[42, 7]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
        == "TRAINABLE_TOKENS"
    )
    model = llama(tied)
    handle = veneer.load(model, tmp_path)
    assert error(logits(model), logits(theirs)) < 1e-6
    assert handle.changes[EMBED].tokens.tolist() == [7, 42]


def test_a_head_of_pefts_alone_in_a_model_that_stays_tied_is_refused(tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [42]}
    )
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    model = llama()
    words = r"PEFT trains the tokens of one of the modules that share this weight.*untie=True"
    with pytest.raises(AdapterError, match=words):
        veneer.load(model, tmp_path, untie=False)
    assert not hasattr(model, "_veneer")


def test_a_token_means_the_same_on_a_vocabulary_that_is_grown_again(tmp_path):
    folder, expected = trained(grown(seed=7), tmp_path / "a")
    model = grown(seed=8)  # with other random rows
    veneer.load(model, folder)
    assert error(logits(model), expected) < 1e-6
    changed = grown()
    with torch.no_grad():
        changed.model.embed_tokens.weight[39, 0] += 1
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        veneer.load(changed, folder)
    said = read(folder).metadata["changes"][EMBED]
    assert (said["tokens"], said["of"]) == ([[40, 43]], 43)


def test_a_base_that_did_not_grow_is_one_clear_error_or_grown(tmp_path):
    folder, expected = trained(grown(), tmp_path / "a")
    model = llama(size=40)
    before = bits(model)
    words = r"43 rows of 'model.embed_tokens.weight', which has 40.*resize_token_embeddings\(43\).*grow=True"
    with pytest.raises(AdapterError, match=words):
        veneer.load(model, folder)
    assert all(torch.equal(value, before[key]) for key, value in bits(model).items())
    veneer.load(model, folder, grow=True)
    assert error(logits(model), expected) < 1e-6
    assert model.config.vocab_size == 43
    other = llama(size=40, seed=1)
    before = bits(other)
    with pytest.raises(BaseMismatchError):
        veneer.load(other, folder, grow=True)
    assert other.config.vocab_size == 40
    assert other.get_input_embeddings().num_embeddings == 40
    assert all(torch.equal(value, before[key]) for key, value in bits(other).items())
    fitting = grown(seed=8)  # has grown already
    veneer.load(fitting, folder, grow=True)
    assert error(logits(fitting), expected) < 1e-6


def test_a_base_that_did_not_grow_is_verified_beside_a_change_of_its_embedding(tmp_path):
    folder, _ = trained(grown(), tmp_path / "a", SAME)
    llama(size=40).save_pretrained(tmp_path / "base")
    assert verify(folder, tmp_path / "base").ok
    llama(size=40, seed=1).save_pretrained(tmp_path / "other")
    assert "other numbers" in str(verify(folder, tmp_path / "other"))


def test_rows_that_grew_and_were_never_trained_are_told(tmp_path):
    folder, _ = trained(
        grown(),
        tmp_path / "a",
        veneer.LoraConfig(rank=2, targets="q_proj", trainable_tokens=[40, 42]),
    )
    with pytest.raises(AdapterError, match=r"row 41 .*never trained"):
        veneer.load(llama(size=40), folder, grow=True)
    with pytest.raises(BaseMismatchError):
        veneer.load(grown(seed=8), folder)
    veneer.load(grown(), folder)


def test_a_bias_that_would_grow_is_in_no_file(tmp_path):
    def biased(size):
        model = llama(False, size)
        model.lm_head = torch.nn.Linear(16, size)
        return model

    model = biased(40)
    model.resize_token_embeddings(43)  # new numbers of the bias are the mean of the old ones
    folder, _ = trained(model, tmp_path / "a", BOTH)
    with pytest.raises(
        AdapterError, match=r"'lm_head\.bias', of which 3 numbers would be new and in no file"
    ):
        veneer.load(biased(40), folder, grow=True, verify_base=False)


def test_what_peft_writes_of_a_vocabulary_that_grew_loads(tmp_path):
    base = tmp_path / "base"
    llama(size=40).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(7)
    model.resize_token_embeddings(43)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=NEW, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path / "a")
    assert any(
        "base_layer.weight" in key
        for key in load_file(tmp_path / "a" / "adapter_model.safetensors")
    )
    ours = grown(seed=8)
    veneer.load(ours, tmp_path / "a")
    assert error(logits(ours), logits(theirs)) < 1e-6


def test_damaged_and_dishonest_files_are_refused(tmp_path):
    folder, _ = trained(llama(), tmp_path / "a")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())

    def plain(name, tensors, **fields):
        path = tmp_path / name
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config | fields))
        return path

    refused = {
        "fewer": ("a row for each", {**tensors, key: tensors[key][:2].clone()}, {}),
        "no rows": ("no rows of them", {k: v for k, v in tensors.items() if k != key}, {}),
        "twice": ("a row for each", tensors, {"trainable_token_indices": {"embed_tokens": [40, 40, 41]}}),
        "width": ("8 numbers", {**tensors, key: tensors[key][:, :8].clone()}, {}),
        "beyond": ("46 rows", tensors, {"trainable_token_indices": {"embed_tokens": [40, 41, 45]}}),
        "words": ("token ids", tensors, {"trainable_token_indices": "all"}),
        "nowhere": ("lacks", {k.replace("embed_tokens", "embd"): v for k, v in tensors.items()},
                    {"trainable_token_indices": [40, 41, 42]}),
    }  # fmt: skip
    for name, (words, changed, fields) in refused.items():
        with pytest.raises(AdapterError, match=words):
            veneer.load(llama(), plain(name, changed, **fields))
    forge(folder, record=lambda record: record["changes"][EMBED].update(tokens=[[0, 10**18]]))
    with pytest.raises(AdapterError, match="other trained tokens"):
        veneer.load(llama(), folder)


def test_a_base_grows_for_an_adapter_that_holds_the_grown_head(tmp_path):
    config = veneer.LoraConfig(
        rank=2, targets="q_proj", trainable_tokens=[40, 41, 42], train_also=["lm_head"]
    )
    folder, expected = trained(grown(tied=False), tmp_path / "a", config)
    model = llama(False, 40)
    veneer.load(model, folder, grow=True)
    assert torch.allclose(logits(model), expected, atol=1e-5)
