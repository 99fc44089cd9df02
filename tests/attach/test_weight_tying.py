"""Adapters of PEFT that hold values of their own for each name of a tied weight compute as PEFT
does, everywhere."""

from __future__ import annotations

import functools
import warnings

import peft
import pytest
import torch
import transformers
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.adapter_files.ties import TieBroken
from veneer.adapter_files.verify import verify
from veneer.errors import AdapterError, MergeError
from veneer.tools.compose import compose
from veneer.tools.convert import convert
from veneer.tools.merge_checkpoint import merge_checkpoint
from veneer.train.loss import causal_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's own, and that its adapters carry no fingerprint

BOTH = ("embed_tokens", "lm_head")
IDS = torch.arange(12).view(2, 6)
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def llama(tied=True, vocab_size=40):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=vocab_size, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    return model if tied else untied(model)


def untied(model):
    """As the error and the docs say it is done."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def trained_by_peft(folder, modules=BOTH, **options):
    """(the folder, PEFT's logits) of an adapter that PEFT has trained on the tied model."""
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**{**settings, "modules_to_save": list(modules), **options})
    model = peft.get_peft_model(llama(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return folder, model(IDS).logits


@pytest.mark.parametrize("modules", [BOTH, BOTH[:1], BOTH[1:]], ids=" ".join)
def test_two_copies_of_a_tied_weight_compute_as_peft_does(tmp_path, modules):
    path, expected = trained_by_peft(tmp_path / "theirs", modules)
    model = llama()
    handle = veneer.load(model, path, untie=False)
    assert error(model(IDS).logits, expected) < 1e-5
    assert error(llama()(IDS).logits, expected) > 1e-2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert error(causal_loss(model, {"input_ids": IDS, "labels": IDS}), peft_loss(path)) < 1e-5

    ours = handle.save(tmp_path / "ours")
    again = llama()
    veneer.load(again, ours)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    theirs = peft.PeftModel.from_pretrained(llama(), ours).eval()
    assert error(theirs(IDS).logits, expected) < 1e-5
    with veneer.use(model, None):
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)


def test_a_head_that_peft_adapts_with_its_embedding_stays_in_a_composed_folder(tmp_path):
    changes = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": None}
    path, expected = trained_by_peft(tmp_path / "theirs", ensure_weight_tying=True, **changes)
    compose([path], tmp_path / "out", weights=[1.0])
    for folder in ("theirs", "out"):
        ours = llama()
        veneer.load(ours, tmp_path / folder)
        assert error(ours(IDS).logits, expected) < 1e-5
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    assert error(theirs(IDS).logits, expected) < 1e-5


def peft_loss(path):
    return peft.PeftModel.from_pretrained(llama(), path).eval()(IDS, labels=IDS).loss


def test_the_two_copies_train_apart_and_equal_ones_as_one(tmp_path):
    path, _ = trained_by_peft(tmp_path / "two")
    handle = veneer.load(llama(), path, trainable=True)
    assert {HEAD, EMBED} <= dict(handle.named_parameters()).keys()
    path, expected = trained_by_peft(tmp_path / "one", ensure_weight_tying=True)
    model = llama()
    handle = veneer.load(model, path, trainable=True)
    assert len({HEAD, EMBED} & dict(handle.named_parameters()).keys()) == 1
    assert error(model(IDS).logits, expected) < 1e-5
    handle.merge()  # one value: nothing to untie
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert error(model(IDS).logits, expected) < 1e-5
    assert not verify(path, llama()).errors


def test_the_bank_keeps_the_two_copies_apart(tmp_path):
    path, expected = trained_by_peft(tmp_path / "theirs")
    model = llama()
    bank = veneer.Bank(model)
    bank.register("two", path)
    with torch.no_grad(), bank.rows(["two", None]):
        rows = model(IDS).logits
    assert error(rows[0], expected[0]) < 1e-5
    assert error(rows[1], llama()(IDS).logits[1]) < 1e-5


@pytest.mark.parametrize("modules", [BOTH, BOTH[:1], BOTH[1:]], ids=" ".join)
def test_values_of_their_own_are_not_merged_into_one_weight(tmp_path, modules):
    path, expected = trained_by_peft(tmp_path / "theirs", modules)
    model = llama()
    handle = veneer.load(model, path, untie=False)
    with pytest.raises(
        MergeError, match=r"one weight.*\n?.*veneer.load unties.*untie the base first"
    ):
        handle.merge()
    assert error(model(IDS).logits, expected) < 1e-5  # untouched
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match=r"one weight.*\n?.*untie the base first"):
        merge_checkpoint(tmp_path / "base", [path], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    report = verify(path, tmp_path / "base")
    assert any("values of their own" in finding.message for finding in report.warnings), str(report)
    assert any(
        "values of their own" in finding.message for finding in verify(path, llama()).warnings
    )


def test_the_way_out_of_the_refusal_gives_peft_s_numbers(tmp_path):
    path, expected = trained_by_peft(tmp_path / "theirs")
    model = llama(tied=False)
    handle = veneer.load(model, path)
    handle.merge()
    assert error(model(IDS).logits, expected) < 1e-5
    llama(tied=False).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", [path], tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert error(merged(IDS).logits, expected) < 1e-5
    assert not any(
        "values of their own" in finding.message
        for finding in verify(path, tmp_path / "base").warnings
    )


def test_composing_and_converting_keep_the_two_copies(tmp_path):
    path, expected = trained_by_peft(tmp_path / "theirs")
    veneer.compose([path], tmp_path / "same")
    model = llama()
    veneer.load(model, tmp_path / "same")
    assert error(model(IDS).logits, expected) < 1e-5
    convert(path, tmp_path / "dense.safetensors", to="dense", base=llama())
    convert(tmp_path / "dense.safetensors", tmp_path / "back", to="veneer", base=llama())
    model = llama()
    veneer.load(model, tmp_path / "back")
    assert error(model(IDS).logits, expected) < 1e-4


#: fields of PEFT's config, by how they change one name of a tie
APART = {
    "in full, both": {"target_modules": ["q_proj"], "modules_to_save": [*BOTH]},
    "in full, the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "in full, the embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "at a low rank": {"target_modules": ["lm_head", "q_proj"]},
    "at a low rank, DoRA": {"target_modules": ["embed_tokens"], "use_dora": True},
    "in rows of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [1, 3]},
    },
}


def changed_by_peft(folder, fields, make_model=llama, ids=IDS):
    """(the folder, PEFT's logits) of an adapter with noise in all that it trains."""
    torch.manual_seed(2)
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(make_model(), folder).eval()
    return folder, loaded(ids).logits.detach()


@torch.no_grad()
@pytest.mark.parametrize("case", APART)
def test_a_tie_that_a_folder_of_peft_changes_apart_is_gone_until_detach(tmp_path, case):
    path, expected = changed_by_peft(tmp_path / "theirs", APART[case])
    model, base = llama(), llama()(IDS).logits
    assert error(base, expected) > 1e-3
    with pytest.warns(
        TieBroken, match=r"apart from .* until the last adapter is detached.*untie=False"
    ):
        handle = veneer.load(model, path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert error(model(IDS).logits, expected) < 1e-5
    with veneer.use(model, None):
        assert torch.equal(model(IDS).logits, base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle.merge()
    assert error(model(IDS).logits, expected) < 1e-5
    model.save_pretrained(tmp_path / "merged")
    handle.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    ours = handle.save(tmp_path / "ours")
    again = llama()
    with pytest.warns(TieBroken):
        veneer.load(again, ours)
    assert error(again(IDS).logits, expected) < 1e-5
    handle.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(model(IDS).logits, base)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert error(plain(IDS).logits, expected) < 1e-5


@pytest.mark.parametrize("case", ["at a low rank", "in rows of the head"])
def test_untie_forces_it_without_a_warning_or_forbids_it(tmp_path, case):
    path, expected = changed_by_peft(tmp_path / "theirs", APART[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error", TieBroken)
        model = llama()
        with pytest.raises(AdapterError):
            veneer.load(model, path, untie=False)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        veneer.load(model, path, untie=True)
    assert error(model(IDS).logits, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("vocabulary", [40, 16])  # as many as features, too
def test_an_adapter_that_unties_stands_beside_one_of_the_tied_weight(tmp_path, vocabulary):
    """The head reads the change of the tied weight transposed, and its own as it is."""
    ids = IDS % vocabulary
    base = functools.partial(llama, vocab_size=vocabulary)
    path, expected = changed_by_peft(tmp_path / "theirs", APART["at a low rank"], base, ids)
    model = base()
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=["lm_head"]), "tied"))
    tied = model(ids).logits
    apart = veneer.load(model, path, name="apart", untie=True)
    for selection in ("apart", ["apart", "tied"], {"apart": 0.5, "tied": -0.5}):
        with veneer.use(model, selection, path="materialised"):
            defined = model(ids).logits
        with veneer.use(model, selection):
            assert error(model(ids).logits, defined) < 1e-5
    for name, logits in (("apart", expected), ("tied", tied)):
        with veneer.use(model, name):
            assert error(model(ids).logits, logits) < 1e-5
    again = base()
    veneer.load(again, apart.save(tmp_path / "ours"), untie=True)
    assert error(again(ids).logits, expected) < 1e-5


def test_an_adapter_of_the_tied_weight_is_saved_whole_beside_one_that_unties(tmp_path):
    path, _ = changed_by_peft(tmp_path / "b", APART["at a low rank"])
    model = llama()
    handle = veneer.attach(model, veneer.LoraConfig(targets=(), trainable_tokens=[3]), "a")
    with torch.no_grad():
        for change in handle.changes.values():
            change.token_rows.add_(1)
    expected = model(IDS).logits
    veneer.load(model, path, name="b", untie=True)
    handle.save(tmp_path / "a")
    again = llama()
    veneer.load(again, tmp_path / "a")
    assert error(again(IDS).logits, expected) < 1e-6


def test_a_weight_that_was_untied_is_not_called_random(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    path, _ = changed_by_peft(tmp_path / "b", APART["at a low rank"])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    veneer.load(model, path, name="b", untie=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", veneer.FreshWeights)
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=["q_proj"]), "c")


def test_a_tie_that_holds_a_merged_adapter_is_not_untied(tmp_path):
    path, _ = changed_by_peft(tmp_path / "theirs", APART["at a low rank"])
    model = llama()
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["lm_head"]), "below").merge()
    for untie in (None, True):
        with pytest.raises(
            AdapterError, match=r"while 'below' is merged into it.*call veneer\.unmerge"
        ):
            veneer.load(model, path, name="apart", untie=untie)
    assert model.lm_head.weight is model.model.embed_tokens.weight
