"""Trained tokens on the disk: a merge that grows the vocabulary, and what other tools say of
them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.support.tiny import tiny_config, tiny_model, tiny_tokenizer
from tests.support.toys import bits, error
from transformers import AutoModelForCausalLM

import veneer
from veneer.adapter_files.file_names import TOKENIZER_FILES
from veneer.adapter_files.verify import verify
from veneer.errors import AdapterError, BaseMismatchError, MergeError
from veneer.models.safetensors_dir import open_checkpoint
from veneer.tools.compare import compare
from veneer.tools.compose import compose
from veneer.tools.convert import conversion, convert
from veneer.tools.merge_checkpoint import merge_checkpoint, prove
from veneer.tools.merge_checkpoint.aux_files import FileChanges, write_aux_files

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's own, and that its adapters carry no fingerprint

BASE, NEW = 259, [259, 260, 261]
OLD_SIZE, NEW_SIZE = {"vocab_size": 259}, {"vocab_size": 262}
IDS = torch.tensor([[1, 259, 7, 260, 261, 3], [9, 5, 6, 9, 40, 2]])


def written(folder, tied=True, **options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(base, folder, tied=True, dtype=torch.float32, seed=7):
    """(adapter folder, the live model with it) of a base that grew by three tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer))
    tokens = NEW if tied else {"embed_tokens": NEW, "lm_head": NEW}
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=tokens)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    handle.save(folder)
    tokenizer.save_pretrained(folder)
    return folder, handle


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_on_the_disk_grows_the_vocabulary_as_a_live_one(tmp_path, dtype, tied):
    base = written(tmp_path / "base", tied, max_shard_size="20KB")
    adapter, handle = trained(base, tmp_path / "a", tied, dtype)
    if dtype is torch.bfloat16:
        written(tmp_path / "16", tied)
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "16")
        base = tmp_path / "16"
    done = merge_checkpoint(base, [adapter], tmp_path / "out")
    assert "The vocabulary grew to 262 rows." in done.notes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 262
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    handle.merge()
    handle.detach(keep_merged=True)
    expected = bits(handle.model)
    assert all(torch.equal(value, expected[key]) for key, value in bits(merged).items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<b>").input_ids == [260]
    assert prove(base, [adapter], tmp_path / "out") > 0
    assert error(merged(IDS).logits.float(), handle.model(IDS).logits.float()) < 1e-6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OLD_SIZE, NEW_SIZE),
        ({"text_config": OLD_SIZE}, {"text_config": NEW_SIZE}),
        ({**OLD_SIZE, "text_config": OLD_SIZE}, {**NEW_SIZE, "text_config": NEW_SIZE}),
        ({**OLD_SIZE, "text_config": {}}, {**NEW_SIZE, "text_config": NEW_SIZE}),
    ],
)
def test_the_new_size_is_written_wherever_a_config_has_the_old_one(tmp_path, config, expected):
    base = written(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    write_aux_files(open_checkpoint(base), FileChanges(vocabulary_size=262), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected


def test_a_merge_into_another_base_is_refused_and_one_that_has_grown_is_not(tmp_path):
    base = written(tmp_path / "base")
    adapter, handle = trained(base, tmp_path / "a")
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError):
        merge_checkpoint(tmp_path / "other", [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(262)
    grown.save_pretrained(tmp_path / "grown")
    merge_checkpoint(tmp_path / "grown", [adapter], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert error(merged(IDS).logits, handle.model(IDS).logits) < 1e-6


def test_a_merge_grows_the_bias_of_a_head_that_the_adapter_holds(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=40, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model.resize_token_embeddings(43)
    tokens = [40, 41, 42]
    handle = veneer.attach(
        model,
        veneer.LoraConfig(
            rank=2,
            targets=["q_proj"],
            bias="all",
            trainable_tokens={"embed_tokens": tokens, "lm_head": tokens},
        ),
    )
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    handle.save(tmp_path / "a")
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.lm_head.bias.shape == (43,)
    report = verify(tmp_path / "a", tmp_path / "base")
    assert report.ok, report
    handle.merge()
    handle.detach(keep_merged=True)
    expected = bits(model)
    assert all(torch.equal(value, expected[key]) for key, value in bits(merged).items())


def with_tokenizer(adapter, folder, *tokens):
    """The adapter with a tokenizer of other new tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(shutil.copytree(adapter, folder))
    return folder


def test_a_merge_of_several_takes_the_tokenizer_that_knows_all_tokens_or_refuses(tmp_path):
    base = written(tmp_path / "base")
    adapter, _ = trained(base, tmp_path / "a")
    fewer = with_tokenizer(adapter, tmp_path / "fewer", "<a>", "<b>")
    merge_checkpoint(base, [(adapter, 0.5), (fewer, 0.5)], tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<c>").input_ids == [261]
    assert prove(base, [(adapter, 0.5), (fewer, 0.5)], tmp_path / "out") > 0
    other = with_tokenizer(adapter, tmp_path / "other", "<a>", "<x>")
    with pytest.raises(
        AdapterError, match=r"other' has '<x>' at 260, where .*/a' has '<b>'.*one of them alone"
    ):
        merge_checkpoint(base, [adapter, fewer, other], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_the_tokenizer_of_a_snapshot_in_the_hubs_cache_is_merged_too(tmp_path):
    base = written(tmp_path / "base")
    adapter, _ = trained(base, tmp_path / "a")
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(adapter, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    merge_checkpoint(base, [snapshot], tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("<c>").input_ids == [261]


def test_what_has_no_place_for_tokens_says_so(tmp_path):
    adapter, handle = trained(written(tmp_path / "base"), tmp_path / "a")
    handle.detach()
    cases = (
        (r"trained tokens .*merge", lambda: compose([adapter, adapter], tmp_path / "out")),
        (
            "a base of 259 rows",
            lambda: convert(adapter, tmp_path / "out", to="dense", base=tmp_path / "base"),
        ),
        ("no base, from whose rows", lambda: convert(adapter, tmp_path / "out", to="dense")),
        (
            "embed_tokens.*embedding",
            lambda: convert(adapter, tmp_path / "out", to="kohya", base=handle.model),
        ),
    )
    for message, call in cases:
        with pytest.raises(AdapterError, match=message):
            call()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("source", ["veneer", "peft"])
def test_a_dense_file_has_the_changes_of_the_tokens_and_is_of_this_base_alone(
    tmp_path, source, tied
):
    adapter, handle = trained(written(tmp_path / "base", tied), tmp_path / "a", tied)
    expected = handle.model(IDS).logits
    handle.detach()
    if source == "peft":
        adapter = convert(adapter, tmp_path / "peft", to="peft")
    convert(adapter, tmp_path / "dense", to="dense", base=handle.model)
    rows = load_file(tmp_path / "dense")["model.embed_tokens.weight"].norm(dim=1)
    assert rows.nonzero().flatten().tolist() == NEW
    convert(tmp_path / "dense", tmp_path / "back", to="veneer", base=handle.model)
    veneer.load(handle.model, tmp_path / "back")
    assert error(handle.model(IDS).logits, expected) < 1e-5
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(262)
    if source == "veneer":
        with pytest.raises(BaseMismatchError, match=r"embed_tokens"):
            convert(tmp_path / "dense", tmp_path / "other", to="veneer", base=other)


def test_tokens_of_a_head_alone_are_a_linear_change_of_kohyas(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval()
    handle = veneer.attach(
        model, veneer.LoraConfig(targets=(), trainable_tokens={"lm_head": [4, 9]})
    )
    with torch.no_grad():
        handle.changes["lm_head.weight"].token_rows.normal_()
    expected = model(IDS % 259).logits
    handle.save(tmp_path / "a")
    handle.detach()
    convert(tmp_path / "a", tmp_path / "b", to="kohya", base=model, part="model")
    convert(tmp_path / "b", tmp_path / "c", to="veneer", base=model, part="model")
    veneer.load(model, tmp_path / "c")
    assert error(model(IDS % 259).logits, expected) < 1e-5


def test_tokens_go_to_peft_and_back_and_are_compared_row_by_row(tmp_path):
    base = written(tmp_path / "base")
    adapter, handle = trained(base, tmp_path / "a")
    convert(adapter, tmp_path / "peft", to="peft")
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(262)
    convert(tmp_path / "peft", tmp_path / "back", to="veneer", base=grown)
    theirs = peft.PeftModel.from_pretrained(grown, tmp_path / "peft").eval()
    assert error(theirs(IDS).logits, handle.model(IDS).logits) < 1e-6
    assert compare(adapter, tmp_path / "back").same_change
    with torch.no_grad():
        handle.changes["model.embed_tokens.weight"].token_rows[1].mul_(2)
    handle.save(tmp_path / "moved")
    moved = compare(adapter, tmp_path / "moved")
    assert not moved.same_change
    assert [one.path for one in moved.full if one.difference] == ["model.embed_tokens.weight[260]"]


def tokenizer_files(folder):
    return {
        name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()
    }


def test_a_converted_folder_has_the_tokenizer_and_a_file_names_it_as_left_out(tmp_path):
    adapter, handle = trained(written(tmp_path / "base"), tmp_path / "a")
    handle.detach()
    expected = tokenizer_files(adapter)
    assert "tokenizer.json" in expected
    convert(adapter, tmp_path / "peft", to="peft")
    (tmp_path / "peft" / "vocab.txt").write_text("another tokenizer's")
    convert(adapter, tmp_path / "peft", to="peft", overwrite=True)
    convert(tmp_path / "peft", tmp_path / "back", to="veneer", base=handle.model)
    assert tokenizer_files(tmp_path / "peft") == tokenizer_files(tmp_path / "back") == expected
    done = conversion(adapter, tmp_path / "dense", to="dense", base=handle.model)
    assert "the tokenizer with the added tokens" in done.left_out


def test_a_vocabulary_that_grows_in_a_buffer_too_is_not_grown_on_the_disk(tmp_path):
    sizes = {f"{side}_{what}": number for side in ("encoder", "decoder")
             for what, number in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=40, d_model=16, **sizes)
    )
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(42)
    veneer.attach(model, veneer.LoraConfig(targets=(), trainable_tokens=[40, 41])).save(
        tmp_path / "a"
    )
    with pytest.raises(MergeError, match=r"final_logits_bias.*resize_token_embeddings\(42\)"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
