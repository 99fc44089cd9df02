"""PEFT on the other end: it loads our folders, we load its, and the outputs are equal."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tests.support.adapters import FUSED, FUSED_IDS, fused
from tests.support.models import TinyLM
from tests.support.real_models import REAL
from tests.support.toys import calibration, error, flat, randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.errors import AdapterError
from veneer.layers import LAYERS
from veneer.tools.merge_checkpoint import merge_checkpoint
from veneer.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Mixed(nn.Module):
    """One of each layer kind that PEFT's format has, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=2)
        self.pads = 2
        self.c1 = nn.Conv1d(8, 8, 3, padding=1)
        self.c2 = nn.Conv2d(1, 4, (3, 5), stride=2)
        self.c3 = nn.Conv3d(1, 2, 3, padding=1)
        self.gpt = Conv1D(6, 8)
        self.q = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.c1(self.emb(ids).transpose(1, 2)).transpose(1, 2)  # [N, L, 8]
        x = (
            self.q(x)
            + self.c2(x[:, None]).mean((1, 2, 3))[:, None, None]
            + self.c3(x[:, None, None]).mean((1, 2))
        )
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
    {"targets": ["c1", "q"], "bias": "targets", "variant": "dora"},
    {"targets": ["q", "c1", "gpt"], "slices": {"q": [True, False], "c1": [(1, 4)]}},
    {
        "targets": ["q", "c1", "gpt"],
        "slices": {"q": [True, False], "c1": [(1, 4)]},
        "variant": "dora",
    },
    {"targets": ["norm"]},
    {"targets": ["q"], "train_also": ["c1"], "bias": "targets"},
    *({"targets": TARGETS, "variant": v.name, "alpha": 3} for v in VARIANTS if v.peft is not None),
]


def randomised(model, args, size=0.3, **fields):
    """A Veneer adapter on ``model`` with noise in each of its numbers."""
    config = veneer.LoraConfig(**{"rank": 2, **fields})
    handle = veneer.attach(model, config, **calibration(model, config.variant, args))
    randomise(handle, size)
    return handle


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_peft_loads_our_folder(tmp_path, fields):
    model = make()
    handle = randomised(model, (IDS,), rank=1 if "c3" in fields["targets"] else 2, **fields)
    path = handle.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(), path).eval()
    assert error(theirs(IDS), model(IDS)) < 1e-5
    assert error(theirs(IDS), make()(IDS)) > 1e-3


def peft_agrees_or_refuses(handle, args, fresh, folder) -> bool:
    """Assert that PEFT gives our outputs, or that the folder says why PEFT is not to load it;
    returns which."""
    expected = flat(handle.model(*args))
    path = handle.save(folder / "adapter")
    said = json.loads((path / "adapter_config.json").read_text())["peft_type"]
    if said == "LORA":
        theirs = peft.PeftModel.from_pretrained(fresh(), path).eval()
        assert error(flat(theirs(*args)), expected) < 1e-5
        assert error(flat(fresh()(*args)), expected) > 1e-3
    else:
        with pytest.raises(KeyError, match="not for PEFT"):
            peft.PeftModel.from_pretrained(fresh(), path)
    return said == "LORA"


# : the examples of each kind, by number, that PEFT computes as we do; those of other kinds it does
# not know
SHARED = {
    "linear": {0, 1},
    "conv1d_transformers": {0},
    "conv1d": {0, 1, 8},
    "conv2d": {0, 1, 8},
    "conv3d": {0, 1, 8, 9},
    "embedding": {0, 1, 2, 4},
    "attention": set(),  # PEFT doubles the out-projection
    "parameter": {0, 1},
    "norm": {0, 1, 2, 3, 4, 5, 6},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LAYERS.names())
def test_peft_gives_our_outputs_or_is_told_not_to(tmp_path, kind):
    for number, (module, args) in enumerate(LAYERS[kind].examples()):
        args = args if isinstance(args, tuple) else (args,)
        model = Above(module).eval()
        bare = copy.deepcopy(model)
        handle = randomised(model, args, targets="all")
        agrees = peft_agrees_or_refuses(
            handle, args, lambda bare=bare: copy.deepcopy(bare), tmp_path / str(number)
        )
        assert agrees == (number in SHARED.get(kind, ())), (kind, number)


class Above(nn.Module):
    """A module as a child."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)


#: what PEFT has no form for
NOT_PEFTS = {
    "on the root", "in a list", "everything", "everything by DoRA", "a tie of DoRA", "rows of a range",
    "bias of targets", "attention", "attention's out-projection",
}  # fmt: skip


@pytest.mark.parametrize("name", list(FUSED))
def test_peft_gives_our_outputs_on_special_layers_or_is_told_not_to(tmp_path, name):
    handle = randomised(fused(), (FUSED_IDS,), **FUSED[name])
    assert peft_agrees_or_refuses(handle, (FUSED_IDS,), fused, tmp_path) == (name not in NOT_PEFTS)


class Reads(nn.Module):
    """Reads a weight past its module, and holds layers with forwards of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.own = nn.Embedding(11, 8), Doubled(8, 8)
        self.same, self.scaled = Same(8, 8), Scaled(11, 8)

    def forward(self, ids):
        x = self.same(self.own(self.embed(ids))) + self.scaled(ids)
        return F.linear(x, self.embed.weight)


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class Same(nn.Linear):
    """As Falcon's."""

    def forward(self, input):
        return input @ self.weight.T + self.bias


class Scaled(nn.Embedding):
    """As Gemma's, which PEFT knows."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input):
        return super().forward(input) * self.embed_scale


def reads():
    torch.manual_seed(6)
    return Reads().eval()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("embed", "'the model' reads the weight itself"),
        ("own", "Doubled has a forward of its own"),
        ("same", None),
        ("scaled", None),
    ],
)
def test_forwards_that_pass_the_wrapper_by(tmp_path, target, words):
    handle = randomised(reads(), (IDS,), targets=[target])
    assert peft_agrees_or_refuses(handle, (IDS,), reads, tmp_path) == (words is None)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"]
    assert words is None or words in said
    theirs, path = by_peft(tmp_path / "theirs", reads(), target_modules=[target])
    if words is None or target == "embed":
        agrees(theirs, path, reads(), IDS)
    else:
        with pytest.raises(AdapterError, match=words):
            veneer.load(reads(), path)


def by_peft(folder, model, size=0.3, **fields):
    """(a PEFT model with noise in each of its numbers, the folder that it was saved in)."""
    torch.manual_seed(5)
    pads = getattr(model, "pads", None)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **fields})
    ).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * size)
            if pads is not None and 11 in parameter.shape:  # one row or column for each token
                parameter.data.select(
                    parameter.shape.index(11), pads
                ).zero_()  # PEFT does not keep the padding row at rest
    theirs.save_pretrained(folder)
    return theirs, folder


def agrees(theirs, path, model, *args):
    """Assert that the folder of PEFT gives its outputs, and so does what we save of it."""
    base = flat(model(*args))
    expected = flat(theirs(*args))
    with pytest.warns(veneer.UnverifiedAdapter, match="carries no fingerprint"):
        handle = veneer.load(model, path)
    assert error(flat(model(*args)), expected) < 1e-5
    assert error(expected, base) > 1e-3
    ours = handle.save(path.parent / "ours")
    handle.detach()
    handle = veneer.load(model, ours)
    assert error(flat(model(*args)), expected) < 1e-5
    return handle


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": TARGETS},
        {"target_modules": TARGETS, "use_rslora": True},
        {"target_modules": TARGETS, "use_dora": True},
        {"target_modules": ["q", "c1"], "modules_to_save": ["head"]},
        {"target_modules": r".*(emb|q)", "rank_pattern": {"emb": 4}, "alpha_pattern": {"q": 7}},
        {
            "target_modules": r"^(?!.*c\d).*(?<!h)(?:emb|q)(?=$|\.).*",
            "rank_pattern": {r"(?!q).mb": 4},
        },  # ms-swift's form
        {
            "target_modules": ["q", "emb"],
            "rank_pattern": {"emb": 4},
            "alpha_pattern": {"q": 7},
            "use_rslora": True,
        },
        {"target_modules": ["c1", "q"], "bias": "all", "modules_to_save": ["head"]},
        {"target_modules": ["q"], "bias": "lora_only"},
        {"target_modules": ["q"], "bias": "lora_only", "use_dora": True},
        {"target_modules": [], "target_parameters": ["q.weight", "emb.weight", "gpt.weight"]},
        {
            "target_modules": ["c1"],
            "target_parameters": ["gpt.weight"],
            "rank_pattern": {"gpt.weight": 4},
        },
        {"target_modules": "all-linear", "init_lora_weights": "orthogonal"},
        {"target_modules": ["q", "gpt"], "init_lora_weights": "gaussian", "lora_dropout": 0.2},
    ],
    ids=str,
)
def test_we_load_pefts_folder(tmp_path, fields):
    small = "c3" in fields["target_modules"] and isinstance(fields["target_modules"], list)
    theirs, path = by_peft(tmp_path / "adapter", make(), r=1 if small else 2, **fields)
    agrees(theirs, path, make(), IDS)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["attention"]},
        {
            "target_modules": ["attention"],
            "rank_pattern": {"attention": 4},
            "alpha_pattern": {"attention": 9},
        },
        {"target_modules": ["qkv"], "use_dora": True},
        {
            "target_modules": [],
            "target_parameters": ["experts.proj", "experts.more", "second.proj"],
        },
        {
            "target_modules": ["qkv"],
            "target_parameters": ["experts.more", "experts.proj"],
            "rank_pattern": {"experts.more": 4},
            "alpha_pattern": {"experts.proj": 5},
        },
        {"target_modules": [], "target_parameters": ["proj"], "modules_to_save": ["norm"]},
        {"target_modules": [], "target_parameters": ["attention.in_proj_weight"]},
    ],
    ids=str,
)
def test_we_load_pefts_experts_and_attention(tmp_path, fields):
    theirs, path = by_peft(tmp_path / "adapter", Experts(), **fields)
    handle = agrees(theirs, path, Experts(), EXPERTS_X)
    recorded = (
        veneer.adapter_files.read(tmp_path / "ours").layers if "use_dora" not in fields else {}
    )
    assert all("base_layer" not in at for at in recorded)
    known = dict(Experts().named_parameters()).keys() | dict(Experts().named_modules()).keys()
    assert recorded.keys() <= known
    assert len(recorded) == len(handle.changes) or "use_dora" in fields


class Experts(nn.Module):
    """Stacks of matrices, two in one module, one that lies as [E, in, out]; and an attention of
    torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.qkv, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts, self.second = Stacked(False), Stacked(True)
        self.eval()

    def forward(self, x):
        x = self.norm(self.qkv(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.second(self.experts(x))


class Stacked(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.proj, self.more = (
            nn.Parameter(torch.randn(3, 6, 8) / 3),
            nn.Parameter(torch.randn(8, 6) / 3),
        )
        if is_transposed:
            self.proj = nn.Parameter(torch.randn(3, 8, 6) / 3)

    def forward(self, x):
        stack = self.proj if self.is_transposed else self.proj.mT
        return x + torch.einsum("nli,eio->nlo", x, stack) @ self.more.T


EXPERTS_X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "fields",
    [
        {
            "targets": ["experts", "second"],
            "ranks": {"second.more": 4},
            "alphas": {"experts.proj": 5},
        },
        {"targets": ["experts.more", "second.proj", "in_proj_weight"]},
        {"targets": ["in_proj_weight", "qkv"], "ranks": {"attention": 4}, "bias": "targets"},
        {"targets": ["in_proj_weight"], "bias": "all"},
        {"targets": ["in_proj_weight"], "train_also": ["out_proj", "norm"]},
        {"targets": ["in_proj_weight"], "slices": {"in_proj_weight": [True, False, True]}},
        {"targets": ["experts", "in_proj_weight"], "variant": "pissa"},
    ],
    ids=str,
)
def test_peft_loads_our_experts_and_attention(tmp_path, fields):
    handle = randomised(Experts(), (EXPERTS_X,), **fields)
    assert peft_agrees_or_refuses(handle, (EXPERTS_X,), Experts, tmp_path)


# : PEFT fails loudly: its wrapper of the embeddings' position hides the children that the model
# reads
HIDDEN = {"vit"}


@pytest.mark.parametrize("name", list(REAL))
def test_real_models_go_both_ways(tmp_path, name):
    """Everything that can be attached to, as far as PEFT can; and its own adapters of all linear
    layers."""
    model, example, _ = REAL[name].build()
    base = floats(run(model, example))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = randomised(model, (), 0.05, targets="all")
    ours = floats(run(model, example))
    path = handle.save(tmp_path / "ours")
    said = json.loads((path / "adapter_config.json").read_text())["peft_type"]
    fresh = REAL[name].build()[0]
    if said != "LORA":
        with pytest.raises(KeyError, match="not for PEFT"):
            peft.PeftModel.from_pretrained(fresh, path)
    elif name in HIDDEN:
        theirs = peft.PeftModel.from_pretrained(fresh, path)
        with pytest.raises(AttributeError, match="ParamWrapper"):
            run(theirs.base_model.model, example)
    else:
        theirs = peft.PeftModel.from_pretrained(fresh, path).eval()
        assert error(floats(run(theirs.base_model.model, example)), ours) < 1e-5
        assert error(ours, base) > 1e-3

    model = REAL[name].build()[0]
    linear = [
        at
        for at, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    ]
    # without those that are tied or read past their modules
    ends = (
        "lm_head",
        "decoder",
        "proj_out",
        "out_proj",
        "attn.qkv",
        "attn.proj",
        "x_proj",
        "dt_proj",
    )
    targets = [at for at in linear if not at.endswith(ends)]
    theirs, path = by_peft(tmp_path / "theirs", model, 0.05, target_modules=targets)
    model = REAL[name].build()[0]
    veneer.load(model, path)
    assert error(floats(run(model, example)), floats(run(theirs.base_model.model, example))) < 1e-5


def run(model, example):
    with torch.no_grad():
        return model.eval()(**example)


def floats(output):
    return flat(dict(output) if isinstance(output, dict) else output)


def test_what_pissa_started_from_is_converted_by_peft(tmp_path):
    """PEFT takes the start off the base and, asked to, writes the change since then: a plain change
    of the base."""
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["q"]}
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(init_lora_weights="pissa", **fields)
    ).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    expected = theirs(IDS)
    theirs.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model = make()
    with pytest.warns(veneer.UnverifiedAdapter):
        (change,) = veneer.load(model, tmp_path / "adapter").changes.values()
    assert change.rank == 4
    assert error(model(IDS), expected) < 1e-5


def test_a_later_peft_may_apply_an_out_projection_once(tmp_path):
    _, path = by_peft(tmp_path / "adapter", Experts(), target_modules=["attention"])
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.22.0"}))
    with pytest.raises(
        AdapterError, match=r"'attention.out_proj'.* of PEFT 0\.22\.0 it is not known"
    ):
        veneer.load(Experts(), path)
    (path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.9.1.dev0"}))
    veneer.load(Experts(), path)


def test_magnitudes_of_a_tie_that_differ_are_refused(tmp_path):
    """PEFT rescales the outputs of both modules; of the tied weight those are other axes."""
    theirs = peft.get_peft_model(
        TinyLM(True), peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    )
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    above = "base_model.model.model.embed_tokens."
    tensors |= {
        "base_model.model.lm_head.lora_A.weight": tensors[
            f"{above}lora_embedding_B"
        ].mT.contiguous(),
        "base_model.model.lm_head.lora_B.weight": tensors[
            f"{above}lora_embedding_A"
        ].mT.contiguous(),
        "base_model.model.lm_head.lora_magnitude_vector": torch.ones(17),
    }
    save_file(tensors, file)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] += ["lm_head"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"different changes for 'model\.embed_tokens'"):
        veneer.load(TinyLM(True), tmp_path / "adapter")


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
    theirs = peft.get_peft_model(
        model or make(), peft.LoraConfig(**{"r": 2, "target_modules": ["q"], **fields})
    )
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "pissa_niter_2"}, "random approximation"),
        ({"target_modules": [], "target_parameters": ["c1.weight"]}, r"those of a parameter layer"),
        (
            {"target_modules": ["emb"], "init_lora_weights": False},
            "a change of the padding row 2 of 'emb'",
        ),
        ({"kasa_config": peft.KasaConfig()}, "kasa_config"),
    ],
    ids=str,
)
def test_what_we_would_compute_differently_is_refused(tmp_path, fields, words):
    path = saved_by_peft(tmp_path, **fields)
    with pytest.raises(AdapterError, match=words):
        veneer.load(make(), path)


def test_a_peft_adapter_must_be_whole(tmp_path):
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


def test_half_of_a_tied_weight_can_be_forbidden(tmp_path):
    """PEFT changes one side of a tied weight; that is no change of the weight."""
    path = saved_by_peft(tmp_path, model=TinyLM(tied=True), target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="whose weight 'lm_head' shares"):
        veneer.load(TinyLM(tied=True), path, untie=False)
    with pytest.warns(veneer.TieBroken):
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
    """save_embedding_layers="auto" puts the frozen weight of an adapted head or embedding into the
    file."""

    def llama():
        torch.manual_seed(2)
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=40,
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
    other.get_submodule(
        "lm_head" if target == "lm_head" else "model.embed_tokens"
    ).weight.data.add_(0.5)
    with pytest.raises(veneer.errors.BaseMismatchError, match="another weight"):
        veneer.load(other, tmp_path / "adapter")
    for folder, base in (("base", llama()), ("other", other)):
        base.save_pretrained(tmp_path / folder)
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert error(merged(ids).logits, theirs(ids).logits) < 1e-5
    with pytest.raises(veneer.errors.BaseMismatchError, match=target):
        merge_checkpoint(tmp_path / "other", [tmp_path / "adapter"], tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def bert(kind=transformers.BertForSequenceClassification):
    torch.manual_seed(4)
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
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
@pytest.mark.parametrize(
    "fields", [{}, {"train_also": ["dense"]}, {"bias": "all", "train_also": ["pooler"]}], ids=str
)
def test_peft_loads_classifiers_of_ours(tmp_path, kind, fields):
    if (
        "pooler" in fields.get("train_also", ())
        and kind is not transformers.BertForSequenceClassification
    ):
        pytest.skip("only the sequence classifier has a pooler")
    fields = (
        {**fields, "targets": ["query", "value"]}
        if "dense" in fields.get("train_also", ())
        else fields
    )
    model, ids = bert(kind), torch.arange(12).view(2, 6)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
    randomise(handle)
    path = handle.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(bert(kind), path).eval()
    for ours, other in zip(model(ids).values(), theirs(ids).values(), strict=True):
        assert error(other, ours) < 1e-5


@pytest.mark.parametrize("name", ["default", "sst2"])
def test_biases_and_a_container_of_modules_to_save_from_peft(tmp_path, name):
    config = peft.LoraConfig(
        r=2, target_modules=["query"], modules_to_save=["pooler"], task_type="SEQ_CLS", bias="all"
    )
    theirs = peft.get_peft_model(bert(), config, adapter_name=name).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model, ids = bert(), torch.arange(12).view(2, 6)
    with pytest.warns(veneer.UnverifiedAdapter):
        veneer.load(model, tmp_path / "adapter" / (name if name != "default" else ""))
    assert error(model(ids).logits, theirs(ids).logits) < 1e-5


def test_a_tied_embedding_goes_through_save_pretrained_and_check(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    ids = torch.arange(12).view(2, 6)
    assert veneer.check(model, {"input_ids": ids, "decoder_input_ids": ids})
    model.save_pretrained(tmp_path / "model")
    handle.merge()
    with pytest.raises(veneer.errors.CheckError, match="merged into the weights"):
        veneer.check(model, {"input_ids": ids, "decoder_input_ids": ids})
