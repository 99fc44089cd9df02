"""PEFT on the other end: it loads our folders, we load its, and the outputs are equal."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from models import TinyLM
from toys import error, randomise
from veneer.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Mixed(nn.Module):
    """One of each layer kind that PEFT's format has, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=2)
        self.c1 = nn.Conv1d(8, 8, 3, padding=1)
        self.c2 = nn.Conv2d(1, 4, (3, 5), stride=2)
        self.c3 = nn.Conv3d(1, 2, 3, padding=1)
        self.gpt = Conv1D(6, 8)
        self.q = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.c1(self.emb(ids).transpose(1, 2)).transpose(1, 2)  # [N, L, 8]
        x = self.q(x) + self.c2(x[:, None]).mean((1, 2, 3))[:, None, None] + self.c3(x[:, None, None]).mean((1, 2))
        return self.head(self.norm(F.relu(self.gpt(x))))


TARGETS = ["emb", "c1", "c2", "c3", "gpt", "q"]
IDS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))


def make(seed=3):
    torch.manual_seed(seed)
    return Mixed().eval()


CONFIGS = [
    {"targets": TARGETS},
    {"targets": TARGETS, "variant": "rslora", "alpha": 5},
    {"targets": ["q", "c1"], "train_also": ["head", "norm"]},
    {"targets": ["q", "emb"], "ranks": {"emb": 4}, "alphas": {"q": 7}},
    {"targets": ["c1", "q"], "bias": "all"},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_peft_loads_our_folder(tmp_path, fields):
    model = make()
    handle = veneer.attach(model, veneer.LoraConfig(rank=1 if "c3" in fields["targets"] else 2, **fields))
    randomise(handle)
    path = handle.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(), path).eval()
    assert error(theirs(IDS), model(IDS)) < 1e-5
    assert error(theirs(IDS), make()(IDS)) > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": TARGETS},
        {"target_modules": TARGETS, "use_rslora": True},
        {"target_modules": ["q", "c1"], "modules_to_save": ["head"]},
        {"target_modules": r".*(emb|q)", "rank_pattern": {"emb": 4}, "alpha_pattern": {"q": 7}},
        {"target_modules": ["c1", "q"], "bias": "all", "modules_to_save": ["head"]},
        {"target_modules": ["q"], "bias": "lora_only"},
    ],
    ids=str,
)
def test_we_load_pefts_folder(tmp_path, fields):
    torch.manual_seed(5)
    small = "c3" in fields["target_modules"] and isinstance(fields["target_modules"], list)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=1 if small else 2, lora_alpha=3, **fields)).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
            if "lora_embedding_A" in name:
                parameter.data[:, 2] = 0  # PEFT does not keep the padding row at rest
    theirs.save_pretrained(tmp_path / "adapter")
    model = make()
    with pytest.warns(veneer.UnverifiedAdapter, match="carries no fingerprint"):
        handle = veneer.load(model, tmp_path / "adapter")
    assert error(model(IDS), theirs(IDS)) < 1e-5
    assert error(theirs(IDS), make()(IDS)) > 1e-3
    ours = handle.save(tmp_path / "ours")
    handle.detach()
    veneer.load(model, ours)
    assert error(model(IDS), theirs(IDS)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_goes_both_ways(tmp_path, tied):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, tie_word_embeddings=tied,
    )  # fmt: skip
    ids = torch.arange(24).view(2, 12)

    def llama():
        torch.manual_seed(2)
        return transformers.LlamaForCausalLM(config).eval()

    model = llama()
    targets = ["all-linear", "embed_tokens"]
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets=targets))
    assert len(handle.layers) == 15
    randomise(handle, 0.05)
    path = handle.save(tmp_path / "adapter")
    assert json.loads((path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    theirs = peft.PeftModel.from_pretrained(llama(), path).eval()
    assert error(theirs(ids).logits, model(ids).logits) < 1e-5
    by_transformers = llama()
    by_transformers.load_adapter(str(path))
    assert error(by_transformers(ids).logits, model(ids).logits) < 1e-5

    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = llama()
    with pytest.warns(veneer.UnverifiedAdapter):
        veneer.load(model, tmp_path / "theirs")
    assert error(model(ids).logits, theirs(ids).logits) < 1e-5


def saved_by_peft(tmp_path, model=None, **fields):
    theirs = peft.get_peft_model(model or make(), peft.LoraConfig(**{"r": 2, "target_modules": ["q"], **fields}))
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora=True|lora_magnitude"),
        ({"init_lora_weights": "pissa"}, "changed the base's weights"),
        ({"lora_bias": True}, "lora_bias=True|lora_B.bias"),
        ({"trainable_token_indices": {"emb": [1, 2]}}, "trainable_token_indices|token_adapter"),
        ({"target_parameters": ["q.weight"], "target_modules": []}, "target_parameters"),
    ],
    ids=str,
)
def test_what_we_would_compute_differently_is_refused(tmp_path, fields, words):
    path = saved_by_peft(tmp_path, **fields)
    with pytest.raises(AdapterError, match=words):
        veneer.load(make(), path)


def test_a_peft_adapter_must_be_whole(tmp_path):
    from safetensors.torch import load_file, save_file

    path = saved_by_peft(tmp_path, target_modules=["q", "c1"])
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    lacking = {key: value for key, value in tensors.items() if "c1" not in key}
    save_file(lacking, file)
    with pytest.raises(AdapterError, match="no tensors for c1"):
        veneer.load(make(), path)
    save_file({**tensors, "base_model.model.extra.weight": torch.zeros(2)}, file)
    with pytest.raises(AdapterError, match=r"extra\.weight"):
        veneer.load(make(), path)
    save_file({key: value for key, value in tensors.items() if "c1.lora_A" not in key}, file)
    with pytest.raises(AdapterError, match="half a pair at 'c1'"):
        veneer.load(make(), path)
    config = json.loads((path / "adapter_config.json").read_text())
    save_file(tensors, file)
    (path / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(AdapterError, match=r"rank 2 at .*3, as adapter_config.json says"):
        veneer.load(make(), path)
    del config["lora_alpha"]
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="no 'lora_alpha'"):
        veneer.load(make(), path)


def test_half_of_a_tied_weight_is_refused(tmp_path):
    """PEFT changes one side of a tied weight; that is no change of the weight."""
    path = saved_by_peft(tmp_path, model=TinyLM(tied=True), target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="whose weight 'lm_head' shares"):
        veneer.load(TinyLM(tied=True), path)


def test_a_grouped_convolution_of_peft_is_refused(tmp_path):
    def grouped():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))

    path = saved_by_peft(tmp_path, model=grouped(), target_modules=["0"])
    with pytest.raises(AdapterError, match=r"A \(2, 4, 3, 3\).*no change of its weight"):
        veneer.load(grouped(), path)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_the_base_weight_that_peft_writes_along_is_no_change(tmp_path, target):
    """save_embedding_layers="auto" puts the frozen weight of an adapted head or embedding into the file."""

    def llama():
        torch.manual_seed(2)
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
        )
        return transformers.LlamaForCausalLM(config).eval()

    ids = torch.arange(12).view(2, 6)
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama()
    with pytest.warns(veneer.UnverifiedAdapter):
        handle = veneer.load(model, tmp_path / "adapter")
    assert error(model(ids).logits, theirs(ids).logits) < 1e-5
    handle.merge()
    assert error(model(ids).logits, theirs(ids).logits) < 1e-5
    assert error(llama()(ids).logits, theirs(ids).logits) > 1e-3
    other = llama()
    other.get_submodule("lm_head" if target == "lm_head" else "model.embed_tokens").weight.data.add_(0.5)
    with pytest.raises(veneer.errors.BaseMismatchError, match="another weight"):
        veneer.load(other, tmp_path / "adapter")


def bert(kind=transformers.BertForSequenceClassification):
    torch.manual_seed(4)
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    return kind(config).eval()


@pytest.mark.parametrize(
    "kind",
    [
        transformers.BertForSequenceClassification,
        transformers.BertForTokenClassification,
        transformers.BertForQuestionAnswering,
    ],
)
@pytest.mark.parametrize("fields", [{}, {"train_also": ["dense"]}, {"bias": "all", "train_also": ["pooler"]}], ids=str)
def test_peft_loads_classifiers_of_ours(tmp_path, kind, fields):
    if "pooler" in fields.get("train_also", ()) and kind is not transformers.BertForSequenceClassification:
        pytest.skip("only the sequence classifier has a pooler")
    fields = {**fields, "targets": ["query", "value"]} if "dense" in fields.get("train_also", ()) else fields
    model, ids = bert(kind), torch.arange(12).view(2, 6)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
    randomise(handle)
    path = handle.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(bert(kind), path).eval()
    for ours, other in zip(model(ids).values(), theirs(ids).values(), strict=True):
        assert error(other, ours) < 1e-5


def test_biases_and_a_container_of_modules_to_save_from_peft(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"], task_type="SEQ_CLS", bias="all")
    theirs = peft.get_peft_model(bert(), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model, ids = bert(), torch.arange(12).view(2, 6)
    with pytest.warns(veneer.UnverifiedAdapter):
        veneer.load(model, tmp_path / "adapter")
    assert error(model(ids).logits, theirs(ids).logits) < 1e-5


def test_a_tied_embedding_goes_through_save_pretrained_and_check(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    model = transformers.T5ForConditionalGeneration(config).eval()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    ids = torch.arange(12).view(2, 6)
    assert veneer.check(model, {"input_ids": ids, "decoder_input_ids": ids})
    model.save_pretrained(tmp_path / "model")
    handle.merge()
    with pytest.raises(veneer.errors.CheckError, match="merged into the weights"):
        veneer.check(model, {"input_ids": ids, "decoder_input_ids": ids})
