"""Folders of PEFT with what its options allow and Veneer's own do not: each computes as PEFT
computes it, or says why not."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.support.toys import error, flat, randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.adapter_files.match_base import PartialChange
from veneer.attach.reference import reference_of
from veneer.errors import AdapterError, MergeError
from veneer.tools.convert import conversion, convert
from veneer.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's own, and that its adapters carry no fingerprint


class Narrow(nn.Module):
    """Layers with few outputs or few inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 3, 3, padding=1)
        self.gpt, self.wide = Conv1D(8, 3), nn.Linear(8, 5)

    def forward(self, ids):
        return self.wide(torch.tanh(self.gpt(self.conv(self.embed(ids).mT).mT.contiguous())))


IDS = torch.arange(14).view(2, 7) % 11


def narrow():
    torch.manual_seed(3)
    return Narrow().eval()


def by_peft(folder, model, size=0.3, **fields):
    """(the model as PEFT loads it, the folder) of an adapter of PEFT with noise in each of its
    numbers."""
    torch.manual_seed(5)
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **fields})
    ).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * size)
    theirs.save_pretrained(folder)
    model = theirs.unload()
    model.load_state_dict(bare)
    return peft.PeftModel.from_pretrained(model, folder).eval(), folder


def agrees(theirs, path, fresh, *args, atol=1e-5):
    """Assert that Veneer computes what PEFT does from PEFT's folder, merges it, and saves it for
    both."""
    model = fresh()
    base, expected = flat(model(*args)), flat(theirs(*args))
    assert error(expected, base) > 1e-3
    handle = veneer.load(model, path, trainable=True)
    assert error(flat(model(*args)), expected) < atol
    ours = handle.save(path.parent / "ours")
    again = fresh()
    veneer.load(again, ours)
    assert error(flat(again(*args)), expected) < atol
    assert error(flat(peft.PeftModel.from_pretrained(fresh(), ours).eval()(*args)), expected) < atol
    handle.merge()
    assert error(flat(model(*args)), expected) < atol
    handle.unmerge()
    return handle


TARGETS = ["embed", "conv", "gpt", "wide"]


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"use_dora": True, "target_modules": ["conv", "wide"]}]
)
def test_a_rank_that_no_weight_has_is_compacted_to_one_that_it_has(tmp_path, fields):
    fields = {"target_modules": TARGETS, **fields}
    theirs, path = by_peft(tmp_path / "theirs", narrow(), r=12, lora_alpha=5, **fields)
    handle = agrees(theirs, path, narrow, IDS)
    assert {at: change.rank for at, change in handle.changes.items()} == {
        f"{at}.weight": rank
        for at, rank in zip(TARGETS, [6, 3, 3, 5], strict=True)
        if at in fields["target_modules"]
    }


def test_a_compacted_change_that_is_zero_can_still_be_trained(tmp_path):
    """PEFT's start: B of zeros, which a factorisation may not make an A of zeros too."""
    peft.get_peft_model(narrow(), peft.LoraConfig(r=12, target_modules=["wide"])).save_pretrained(
        tmp_path
    )
    model = narrow()
    (change,) = veneer.load(model, tmp_path, trainable=True).changes.values()
    model(IDS).square().sum().backward()
    assert change.B.grad.norm() > 1e-3


@pytest.mark.parametrize("name", ["wide", "conv", "embed", "gpt"])
def test_dora_with_rslora_has_the_scale_of_one_and_the_gain_of_the_other(tmp_path, name):
    fields = {"target_modules": [name], "use_dora": True, "use_rslora": True}
    theirs, path = by_peft(tmp_path / "theirs", narrow(), **fields)
    handle = agrees(theirs, path, narrow, IDS)
    assert VARIANTS[handle.config.variant].peft == {"use_dora": True, "use_rslora": True}


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 40}
TOKENS = torch.arange(12).view(2, 6) + 3


def made(kind, config):
    """A small model of transformers, always the same one."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # of a size that a trained one has
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def bloom(**fields):
    config = transformers.BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=40, **fields)
    return made(transformers.BloomForCausalLM, config)


def bloom_in_slices():
    return bloom(pretraining_tp=2, slow_but_exact=True)


BLOOM = ["query_key_value", "dense", "dense_4h_to_h"]


def deberta():
    config = transformers.DebertaConfig(
        **SMALL,
        num_hidden_layers=1,
        intermediate_size=24,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    return made(transformers.DebertaForMaskedLM, config)


def siglip():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return made(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4),
    )


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_branch_that_attributes_rule_out_is_no_read_of_a_weight(tmp_path):
    """BLOOM reads two weights past their modules if its config says so."""
    theirs, path = by_peft(tmp_path / "theirs", bloom(), 0.1, target_modules=BLOOM)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PartialChange)
        agrees(theirs, path, bloom, TOKENS)
    for fresh, words in (
        (bloom, "LORA"),
        (bloom_in_slices, "not for PEFT: .* reads the weight itself"),
    ):
        ours = veneer.attach(model := fresh(), veneer.LoraConfig(rank=2, targets=BLOOM))
        randomise(ours)
        assert veneer.check(model, {"input_ids": TOKENS})
        config = json.loads((ours.save(tmp_path / words[:4]) / "adapter_config.json").read_text())
        assert re.match(words, config["peft_type"])


@pytest.mark.parametrize(
    ("fresh", "targets"),
    [(bloom_in_slices, BLOOM), (deberta, ["in_proj", "dense"])],
    ids=["bloom", "deberta"],
)
def test_a_weight_that_is_read_past_its_module_changes_where_peft_changes_it(
    tmp_path, fresh, targets
):
    theirs, path = by_peft(tmp_path / "theirs", fresh(), 0.1, target_modules=targets)
    model, expected = fresh(), theirs(TOKENS).logits
    with pytest.warns(PartialChange, match=r"dense|in_proj"):
        handle = veneer.load(model, path, trainable=True)
    assert error(model(TOKENS).logits, expected) < 1e-5
    assert error(fresh()(TOKENS).logits, expected) > 1e-3
    if fresh is deberta:
        assert veneer.check(model, {"input_ids": TOKENS})
    ours = handle.save(tmp_path / "ours")
    again = fresh()
    veneer.load(again, ours)
    assert error(again(TOKENS).logits, expected) < 1e-5
    assert (
        error(peft.PeftModel.from_pretrained(fresh(), ours).eval()(TOKENS).logits, expected) < 1e-5
    )
    before = {name: value.clone() for name, value in again.state_dict().items()}
    with pytest.raises(MergeError, match=r"a change of what .* gives"):
        veneer.merge(again)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


class Reader(nn.Module):
    """Reads the weight of a layer past it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(self.layer(x).tanh(), self.layer.weight)


def test_a_change_of_a_module_alone_stays_one_when_it_is_composed_and_is_no_dense_change(tmp_path):
    def reader():
        torch.manual_seed(3)
        return Reader().eval()

    _, path = by_peft(tmp_path / "theirs", reader(), target_modules=["layer"])
    model = reader()
    ours = veneer.load(model, path).save(tmp_path / "ours")
    half = reader()
    veneer.compose([ours], tmp_path / "half", weights=[0.5])
    handle = veneer.load(half, tmp_path / "half")
    assert handle.changes["layer.weight"].module_only
    with veneer.use(model, {"default": 0.5}):
        assert error(half(X), model(X)) < 1e-5
    with pytest.raises(
        AdapterError, match=r"There is no ΔW of .* whose 'weight' others read past it"
    ):
        convert(ours, tmp_path / "dense.safetensors", to="dense", base=reader())
    with pytest.raises(AdapterError, match=r"changes of what modules give \(layer\.weight\)"):
        convert(ours, tmp_path / "kohya.safetensors", to="kohya", base=reader(), part="model")
    seen = veneer.attach(reader(), veneer.LoraConfig(rank=2, targets=["layer"])).save(
        tmp_path / "seen"
    )
    with pytest.raises(
        AdapterError, match=r"a change of 'layer\.weight' that some of them, as PEFT does, make"
    ):
        veneer.compose([ours, seen], tmp_path / "both")


def test_a_change_of_zeros_may_stand_where_peft_applies_none(tmp_path):
    """PEFT adapts the out-projection of torch's attention, which its fused forward never calls: B
    stays zero."""
    theirs = peft.get_peft_model(
        siglip(), peft.LoraConfig(r=2, target_modules=["out_proj", "fc1"])
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and "head.attention" not in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    handle = agrees(theirs, tmp_path / "theirs", siglip, IMAGE)
    assert "head.attention.out_proj.weight" in handle.changes


PATTERNS = {
    "look-around": r"^(?:.*\.)?(?!g)(wide|conv)$|(?<=m)bed$",
    "more than is run": "|".join([*(f"(?:layers\\.{n}\\.)?x" for n in range(400)), "conv", "wide"]),
    "a class by name": "[[:w]ide|conv|wide",
}


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("name", PATTERNS)
def test_the_tensors_tell_what_a_pattern_means_that_is_not_run(tmp_path, name):
    theirs, path = by_peft(tmp_path / "theirs", narrow(), target_modules=PATTERNS[name])
    handle = agrees(theirs, path, narrow, IDS)
    meant = [at for at, _ in narrow().named_modules() if re.fullmatch(PATTERNS[name], at)]
    assert [f"{at}.weight" for at in meant] == [*handle.changes]
    config = path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": "(wide"}))
    with pytest.raises(AdapterError, match="no regular expression"):
        veneer.load(narrow(), path)


def roberta():
    config = transformers.RobertaConfig(**SMALL, intermediate_size=24, num_hidden_layers=1)
    return made(transformers.RobertaForSequenceClassification, config)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "use_dora": True},
        {
            "target_modules": r".*(?:dense|query|out_proj)",
            "modules_to_save": ["out_proj"],
            "bias": "all",
        },
    ],
    ids=str,
)
def test_targets_inside_of_what_is_saved_whole_are_none(tmp_path, fields):
    theirs, path = by_peft(tmp_path / "theirs", roberta(), **fields)
    handle = agrees(theirs, path, roberta, TOKENS)
    adapted = {
        key.split(".lora_")[0]
        for key in load_file(path / "adapter_model.safetensors")
        if ".lora_" in key
    }
    assert {at.removesuffix(".weight") for at in handle.changes} == {
        at.removeprefix("base_model.model.") for at in adapted
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"gpt": 1}},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "olora", "target_modules": ["wide"]},
        {
            "init_lora_weights": "OLoRA",
            "target_modules": ["wide"],
            "use_dora": True,
            "use_rslora": True,
        },
    ],
    ids=str,
)
def test_a_start_that_peft_takes_off_the_base_is_a_part_of_the_change(tmp_path, fields, dtype):
    def fresh():
        return narrow().to(dtype)

    fields = {"target_modules": ["wide", "gpt"], **fields}
    theirs, path = by_peft(tmp_path / "theirs", fresh(), **fields)
    assert (
        json.loads((path / "adapter_config.json").read_text())["init_lora_weights"]
        == fields["init_lora_weights"]
    )
    # in 16 bits PEFT rounds the base without its start, and every output
    handle = agrees(theirs, path, fresh, IDS, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert handle.changes["wide.weight"].rank == 4
    if (
        "use_dora" in fields or dtype != torch.float32
    ):  # PEFT rounds A and B of the start to 16 bits
        return
    (start := tmp_path / "start").mkdir()
    peft.get_peft_model(fresh(), peft.LoraConfig(r=2, lora_alpha=3, **fields)).save_pretrained(
        start
    )
    change = veneer.load(fresh(), start).changes["wide.weight"]
    low, _ = change.resolve(fresh().wide.weight)
    assert low.norm() < 1e-5


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("pissa_niter_4", "random approximation"),
        ("corda", "found in data"),
        ("loftq", "quantised the base"),
        ("lora_ga", "found in gradients"),
    ],
)
def test_a_start_that_nobody_can_make_again_is_refused(tmp_path, start, words):
    peft.get_peft_model(narrow(), peft.LoraConfig(r=2, target_modules=["wide"])).save_pretrained(
        tmp_path
    )
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": start}))
    with pytest.raises(AdapterError, match=words):
        veneer.load(narrow(), tmp_path)


def test_a_start_needs_the_values_of_the_base(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["wide", "conv"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="Unknown initialization"):  # so PEFT writes no such folder
        peft.get_peft_model(narrow(), config)
    config = peft.LoraConfig(r=2, target_modules=["wide"], init_lora_weights="pissa")
    peft.get_peft_model(narrow(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"load it on its base with veneer\.load and save it"):
        veneer.adapter_files.read(tmp_path)
    with torch.device("meta"):
        model = Narrow().eval()
    with pytest.raises(AdapterError, match="'wide': pissa starts from the values of the weight"):
        veneer.load(model, tmp_path)


def llama():
    config = transformers.LlamaConfig(
        **SMALL,
        num_hidden_layers=1,
        intermediate_size=24,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return made(transformers.LlamaForCausalLM, config)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]], ids=" ".join
)
def test_one_name_of_a_tied_weight_is_changed_where_it_may_be_untied(tmp_path, targets, use_dora):
    theirs, path = by_peft(tmp_path / "theirs", llama(), target_modules=targets, use_dora=use_dora)
    model, expected = llama(), theirs(TOKENS).logits
    base, tied = model(TOKENS).logits, model.lm_head.weight
    with pytest.raises(AdapterError, match="untie=True"):
        veneer.load(model, path, untie=False)
    broken = path / "adapter_config.json"
    whole = broken.read_text()
    broken.write_text(json.dumps({**json.loads(whole), "target_modules": [*targets, "k_proj"]}))
    with pytest.raises(AdapterError, match="no tensors for"):
        veneer.load(model, path, untie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied
    assert model.config.tie_word_embeddings
    broken.write_text(whole)

    handle = veneer.load(model, path, untie=True, trainable=True)
    assert error(model(TOKENS).logits, expected) < 1e-5
    ours = handle.save(tmp_path / "ours")
    again = llama()
    veneer.load(again, ours, untie=True)
    assert error(again(TOKENS).logits, expected) < 1e-5
    assert (
        error(peft.PeftModel.from_pretrained(llama(), ours).eval()(TOKENS).logits, expected) < 1e-5
    )
    handle.merge()
    assert error(model(TOKENS).logits, expected) < 1e-5
    handle.unmerge()
    handle.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied
    assert model.config.tie_word_embeddings
    assert torch.equal(model(TOKENS).logits, base)

    veneer.merge(again)
    veneer.detach(again, keep_merged=True)
    again.save_pretrained(tmp_path / "merged")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert error(plain(TOKENS).logits, expected) < 1e-5


class Biased(nn.Module):
    """Layers with a bias, and two without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gpt, self.wide = (
            nn.Conv1d(6, 3, 3, padding=1),
            Conv1D(8, 3),
            nn.Linear(8, 5),
        )
        self.bare, self.bare_conv = nn.Linear(5, 4, bias=False), nn.Conv1d(4, 4, 1, bias=False)

    def forward(self, x):
        x = self.bare(torch.tanh(self.wide(torch.tanh(self.gpt(self.conv(x.mT).mT.contiguous())))))
        return self.bare_conv(x.mT)


def biased():
    torch.manual_seed(3)
    return Biased().eval()


X = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))
WITH, WITHOUT = ["conv", "gpt", "wide"], ["bare", "bare_conv"]


@pytest.mark.parametrize(
    "fields", [{}, {"bias": "lora_only", "use_rslora": True}, {"bias": "all"}], ids=str
)
def test_a_bias_beside_b_is_a_change_of_the_bias(tmp_path, fields):
    theirs, path = by_peft(
        tmp_path / "theirs", biased(), lora_bias=True, target_modules=WITH, **fields
    )
    handle = agrees(theirs, path, biased, X)
    biases = {
        name: parameter for name, parameter in handle.named_parameters() if name.endswith(".bias")
    }
    assert set(biases) == {f"{at}.bias" for at in WITH}
    handle.model(X).square().sum().backward()
    assert all(parameter.grad.norm() > 1e-3 for parameter in biases.values())
    with pytest.raises(AdapterError, match="lora_bias=true, biases beside B"):
        veneer.adapter_files.read(path)


def test_a_layer_without_a_bias_has_one_in_the_adapter(tmp_path):
    theirs, path = by_peft(
        tmp_path / "theirs", biased(), lora_bias=True, target_modules=[*WITHOUT, "wide"]
    )
    model, expected = biased(), theirs(X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = veneer.load(model, path, trainable=True)
    assert error(model(X), expected) < 1e-5
    with veneer.use(model, {"default": 1.0}):
        assert error(model(X), expected) < 1e-5
    with veneer.use(model, ["default", None]):
        assert error(model(X), torch.stack([expected[0], biased()(X)[1]])) < 1e-5
    assert veneer.check(model, X)
    ours = handle.save(tmp_path / "ours")
    with pytest.raises(AdapterError, match="lora_bias=true"):
        convert(ours, tmp_path / "kohya.safetensors", to="kohya", base=biased(), part="model")
    again = biased()
    veneer.load(again, ours)
    assert error(again(X), expected) < 1e-5
    assert error(peft.PeftModel.from_pretrained(biased(), ours).eval()(X), expected) < 1e-5
    bank = veneer.Bank(again := biased())
    bank.add(ours)
    with bank.rows(["ours", None]), torch.no_grad():
        assert error(again(X), torch.stack([expected[0], biased()(X)[1]])) < 1e-5
    bank.close()
    with pytest.raises(MergeError, match="a bias for 'bare', which has none"):
        handle.merge()
    model(X).square().sum().backward()
    assert dict(handle.named_parameters())["bare.bias"].grad.norm() > 1e-3
    handle.detach()
    assert model.bare.bias is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_reference_keeps_the_bias_of_a_layer_without_one(tmp_path):
    theirs, path = by_peft(tmp_path / "theirs", biased(), lora_bias=True, target_modules=WITHOUT)
    model = biased()
    veneer.load(model, path)
    assert error(reference_of(model)(X), theirs(X)) < 1e-5


def test_what_is_merged_for_good_into_an_untied_weight_stays_whatever_was_merged_on_top(tmp_path):
    _, path = by_peft(tmp_path / "theirs", llama(), target_modules=["lm_head"])
    model = llama()
    veneer.load(model, path, untie=True, name="below").merge()
    expected = model(TOKENS).logits
    top = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["q_proj"]), name="top")
    randomise(top)
    top.merge()
    veneer.detach(model, "below", keep_merged=True)
    top.unmerge()
    top.detach()
    assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize(
    ("key", "words"), [("gpt.lora_B.bias", "no 'lora_B.bias' that fits 'gpt'")]
)
def test_a_folder_that_lacks_a_bias_beside_b_is_not_whole(tmp_path, key, words):
    _, path = by_peft(tmp_path / "theirs", biased(), lora_bias=True, target_modules=WITH)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.{key}"]
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=words):
        veneer.load(biased(), path)


def without(path, field):
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config.pop(field)
    file.write_text(json.dumps(config))
    return path


def test_repeated_layers_are_those_of_a_base_that_has_them(tmp_path):
    config = transformers.LlamaConfig(
        **SMALL, num_hidden_layers=2, intermediate_size=24, num_key_value_heads=1
    )

    def fresh():
        return made(transformers.LlamaForCausalLM, copy.deepcopy(config))

    fields = {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [1, 2]]}
    theirs, path = (
        peft.get_peft_model(fresh(), peft.LoraConfig(**fields, init_lora_weights=False)).eval(),
        tmp_path,
    )
    theirs.save_pretrained(path)
    with pytest.raises(AdapterError, match=r"layer_replication=.*a base that has these layers"):
        veneer.load(fresh(), path)
    larger = peft.get_peft_model(fresh(), peft.LoraConfig.from_pretrained(path)).unload()
    larger.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in larger.model.layers)
    larger.save_pretrained(tmp_path / "larger")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "larger").eval()
    handle = veneer.load(model, without(path, "layer_replication"))
    assert len(handle.changes) == 6
    assert error(model(TOKENS).logits, theirs(TOKENS).logits) < 1e-5


def test_qalora_pools_in_gptq_layers_alone(tmp_path):
    fields = {"use_qalora": True, "qalora_group_size": 2, "target_modules": ["wide"]}
    theirs, path = by_peft(tmp_path / "theirs", narrow(), **fields)
    agrees(theirs, path, narrow, IDS)
    with pytest.raises(AdapterError, match=r"use_qalora=true.*on its base"):
        convert(path, tmp_path / "kohya", to="kohya", base=narrow(), part="model")
    change = path / "adapter_config.json"
    change.write_text(
        (whole := change.read_text()).replace('"qalora_group_size": 2', '"qalora_group_size": 1')
    )
    with pytest.raises(AdapterError, match=r"use_qalora=true.*unless that base is GPTQ"):
        veneer.load(narrow(), path)
    change.write_text(whole)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {
            key: value[:, ::2].clone() if "lora_A" in key else value
            for key, value in tensors.items()
        },
        file,
    )
    with pytest.raises(AdapterError, match="wide"):
        veneer.load(narrow(), path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_bias": True}, "lora_bias=true"),
    ],
    ids=str,
)
def test_what_the_factors_alone_do_not_say_goes_into_no_file_of_factors(tmp_path, fields, words):
    theirs, path = by_peft(tmp_path / "theirs", narrow(), target_modules=["wide"], **fields)
    with pytest.raises(AdapterError, match=words):
        convert(path, tmp_path / "kohya.safetensors", to="kohya", base=narrow(), part="model")
    assert not (tmp_path / "kohya.safetensors").exists()
    convert(path, tmp_path / "dense", to="dense", base=narrow())
    done = conversion(path, tmp_path / "veneer", to="veneer", base=narrow())
    written = veneer.adapter_files.read(done.path).low["wide"].rank
    assert (
        done.ranks
        == {"wide.weight": written}
        == {"wide.weight": 4 if "init_lora_weights" in fields else 2}
    )
    model = narrow()
    veneer.load(model, tmp_path / "veneer")
    assert error(model(IDS), theirs(IDS)) < 1e-5
    change = theirs.merge_and_unload().wide.weight - narrow().wide.weight
    assert error(load_file(tmp_path / "dense")["wide.weight"], change) < 1e-5


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"lora_bias": True}], ids=str)
def test_growing_takes_what_needs_the_base(tmp_path, fields):
    theirs, path = by_peft(tmp_path / "theirs", llama(), target_modules=["down_proj"], **fields)
    model = llama()
    veneer.load(model, path, grow=True)
    assert error(model(TOKENS).logits, theirs(TOKENS).logits) < 1e-5
