"""What attaching promises, how targets are chosen, and the errors that name every problem at
once."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from tests.support.models import IDS, ConvNet, Shared, TinyLM
from tests.support.toys import Diagonal, bits, error, randomise, works
from torch import nn

import veneer
from veneer.attach import install as installing
from veneer.errors import AdapterError, ConfigError, MergeError, SelectionError, TargetError

LINEAR = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up",
    "mlp.down",
]
ATTENTION, MLP = LINEAR[:4], LINEAR[4:]


def paths(model, **fields):
    return list(veneer.attach(model, veneer.LoraConfig(rank=2, **fields)).layers)


def blocks(leaves, which=(0, 1)):
    return [f"model.layers.{block}.{leaf}" for block in which for leaf in leaves]


def state(model, versions=True):
    """Everything that must be as it was: values, identities, flags, classes, hooks."""
    return (
        {
            name: (id(p), p.requires_grad, p._version if versions else None)
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        {path: type(module) for path, module in model.named_modules(remove_duplicate=False)},
        {path: sorted(module.__dict__) for path, module in model.named_modules()},
    )


# ---- promises
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_names_values_identities_and_ties_stay(tied):
    model = TinyLM(tied)
    before = {
        name: (p, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)
    }
    keys = list(model.state_dict())
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle)
    after = dict(model.named_parameters(remove_duplicate=False))
    for name, (parameter, value) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
        assert not parameter.requires_grad
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert [key for key in model.state_dict() if "veneer" not in key] == keys
    assert any("veneer" in key for key in model.state_dict())
    model.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "veneer" not in key},
        strict=False,
    )
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)


@pytest.mark.parametrize(
    "make", [TinyLM, lambda: TinyLM(tied=True), ConvNet, Shared, lambda: nn.Linear(4, 4)]
)
def test_detach_gives_back_the_very_model(make):
    model = make()
    next(model.parameters()).requires_grad_(False)  # the user's own choice must come back
    before = state(model)
    ranks = {"depthwise": 1} if isinstance(model, ConvNet) else {}
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", ranks=ranks))
    second = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", ranks=ranks), "second")
    randomise(handle)
    second.detach()
    assert state(model) != before
    handle.detach()
    assert state(model) == before


@pytest.mark.parametrize("tied", [False, True])
def test_copies_and_pickles_are_models_of_their_own(tied):
    model = TinyLM(tied)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", dropout=0.1))
    randomise(handle)
    model.eval()
    expected = model(IDS)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ):
        assert torch.equal(other(IDS), expected)
        assert type(other.lm_head) is type(model.lm_head)
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
        with veneer.use(model, None):  # a selection for one model says nothing about its copy
            assert torch.equal(other(IDS), expected)
        veneer.Handle(other, "default").parameters()[0].data.add_(1)
        assert torch.equal(model(IDS), expected)
        veneer.detach(other)
        assert torch.equal(model(IDS), expected)


def test_a_tied_weight_has_one_change_seen_through_every_name():
    model = TinyLM(tied=True)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["embed_tokens"]))
    randomise(handle)
    assert list(handle.layers) == ["model.embed_tokens"]
    plain = copy.deepcopy(model)
    veneer.detach(plain)
    (change,) = handle.changes.values()
    change = change.resolve(model.lm_head.weight)[0].delta()[0].T
    with torch.no_grad():
        plain.lm_head.weight += change
    assert error(model(IDS), plain(IDS)) < 1e-5
    handle.merge()
    assert error(model(IDS), plain(IDS)) < 1e-5
    assert model.to(torch.bfloat16).lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_weight_is_one_change_whichever_name_is_the_target():
    model = TinyLM(tied=True)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["lm_head"]))
    assert list(handle.layers) == ["model.embed_tokens"]
    assert handle.summary().trainable == 2 * (17 + 8)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tied_weight_takes_rank_alpha_and_slices_by_any_of_its_names(targets):
    fields = {"ranks": {"lm_head": 2}, "alphas": {"lm_head": 6}, "slices": {"lm_head": [(0, 4)]}}
    handle = veneer.attach(TinyLM(tied=True), veneer.LoraConfig(rank=3, targets=targets, **fields))
    (change,) = handle.changes.values()
    assert (change.rank, change.scale) == (2, 6 / 2)
    assert handle.summary().trainable == 2 * (17 + 4)


def test_a_module_with_two_names_that_runs_three_times():
    model, x = Shared(), torch.randn(3, 6)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["alias"]))
    randomise(handle)
    assert list(handle.layers) == ["block"]
    unmerged = model(x)
    handle.merge()
    assert error(model(x), unmerged) < 1e-5


def test_training_changes_the_adapter_alone():
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if "veneer" in name}
    assert len(changed) == 2 * len(handle.layers)


def test_numbers_of_real_configurations():
    """2 · layers · width · rank, from configurations that are published (RoBERTa-base q and v,
    SmolLM2 all linear)."""
    roberta = nn.ModuleList(
        nn.ModuleDict({"query": nn.Linear(768, 768), "value": nn.Linear(768, 768)})
        for _ in range(12)
    )
    summary = veneer.attach(
        roberta, veneer.LoraConfig(rank=8, targets=["query", "value"])
    ).summary()
    assert summary.trainable == 294_912
    assert summary.bytes == 4 * 294_912
    assert summary.percent == pytest.approx(
        100 * 294_912 / sum(p.numel() for p in roberta.parameters() if not p.requires_grad)
    )
    sizes = {
        "q": (576, 576),
        "k": (576, 192),
        "v": (576, 192),
        "o": (576, 576),
        "gate": (576, 1536),
        "up": (576, 1536),
    }
    sizes["down"] = (1536, 576)
    smol = nn.ModuleList(
        nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()}) for _ in range(30)
    )
    assert veneer.attach(smol, veneer.LoraConfig(rank=8)).summary().trainable == 2_442_240
    assert "2,442,240" in str(veneer.summarise(smol))
    assert "linear, lora" in str(veneer.summarise(smol))


def test_dtypes_of_what_is_trained():
    for base, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = nn.Linear(4, 4).to(base)
        assert {p.dtype for p in veneer.attach(model, veneer.LoraConfig(rank=2)).parameters()} == {
            wanted
        }
    model = nn.Linear(4, 4)
    assert {
        p.dtype
        for p in veneer.attach(model, veneer.LoraConfig(rank=2, dtype="bfloat16")).parameters()
    } == {torch.bfloat16}


def test_the_start_depends_on_the_seed_alone():
    handles = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        handles.append(veneer.attach(nn.Linear(6, 6), veneer.LoraConfig(rank=2)).parameters())
    assert torch.equal(handles[0][0], handles[1][0])
    assert not torch.equal(handles[0][0], handles[2][0])
    A, B = handles[0]
    assert A.abs().max() <= 6**-0.5
    assert A.std() > 0.1
    assert B.abs().sum() == 0


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    assert {p.device.type for p in handle.parameters()} == {"meta"}


# ---- targets
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", blocks(LINEAR)),
        ("attention", blocks(ATTENTION)),
        ("mlp", blocks(MLP)),
        ("all", ["model.embed_tokens", *blocks(["norm", *LINEAR]), "model.norm", "lm_head"]),
        ("q_proj", blocks(["self_attn.q_proj"])),
        (["self_attn.q_proj", "mlp.up"], blocks(["self_attn.q_proj", "mlp.up"])),
        ("model.layers.1.self_attn.v_proj", blocks(["self_attn.v_proj"], [1])),
        ("model.layers.*.mlp.*", blocks(MLP)),
        ("*.[kq]_proj", blocks(["self_attn.q_proj", "self_attn.k_proj"])),
        (r"re:model\.layers\.0\..*", blocks(["norm", *LINEAR], [0])),
        ("norm", [*blocks(["norm"]), "model.norm"]),
        ("lm_head.weight", ["lm_head"]),
        ("*.mlp.*.bias", blocks(MLP)),
        (["q_proj.bias", "v_proj"], blocks(["self_attn.q_proj", "self_attn.v_proj"])),
        (lambda path, module: isinstance(module, nn.Embedding), ["model.embed_tokens"]),
        (["lm_head", "attention"], [*blocks(ATTENTION), "lm_head"]),
    ],
    ids=lambda value: "a function" if callable(value) else str(value),
)
def test_targets(targets, expected):
    assert paths(TinyLM(), targets=targets) == expected


@pytest.mark.parametrize("path", ["", "mlp"])
def test_the_config_after_a_callable_chooses_the_same_layers(path):
    """The root's path is empty; "mlp" is a word, and the end of another path."""

    def make():
        linear = nn.Linear(4, 4)
        below = nn.ModuleDict({"mlp": nn.Linear(4, 4)})
        return nn.ModuleDict({"other": below, "mlp": linear}) if path else linear

    handle = veneer.attach(make(), veneer.LoraConfig(rank=2, targets=lambda name, _: name == path))
    again = veneer.attach(make(), veneer.LoraConfig.from_dict(handle.config.to_dict()))
    assert list(again.layers) == list(handle.layers) == [path]


def test_exclude_layers_ranks_and_alphas():
    assert paths(TinyLM(), exclude=["*.mlp.*", "k_proj"]) == blocks(
        ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"]
    )
    assert paths(TinyLM(), layers=[-1]) == blocks(LINEAR, [1])
    assert paths(TinyLM(), layers=[0], targets="attention") == blocks(ATTENTION, [0])
    config = veneer.LoraConfig(
        rank=2, alpha=4, ranks={"layers.0.self_attn.q_proj": 3, "*.q_proj": 5}, alphas={"v_proj": 7}
    )
    changes = veneer.attach(TinyLM(), config).changes
    assert changes["model.layers.0.self_attn.q_proj.weight"].rank == 3
    assert changes["model.layers.1.self_attn.q_proj.weight"].rank == 5
    assert changes["model.layers.1.self_attn.k_proj.weight"].rank == 2
    assert changes["model.layers.0.self_attn.v_proj.weight"].scale == 7 / 2
    assert changes["model.layers.0.self_attn.k_proj.weight"].scale == 4 / 2


def test_default_scales():
    assert veneer.attach(nn.Linear(32, 32)).changes["weight"].scale == 2
    assert (
        veneer.attach(nn.Linear(64, 64), veneer.LoraConfig(rank=64)).changes["weight"].scale == 0.5
    )
    assert (
        veneer.attach(nn.Linear(32, 32), veneer.LoraConfig(variant="rslora"))
        .changes["weight"]
        .scale
        == 2
    )


def test_every_linear_layer_of_a_model_without_a_known_head():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    assert paths(model) == ["0", "2"]


# ---- trained in full
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_trained_in_full_leave_the_base_alone(dtype):
    model, x = ConvNet().to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets=["pointwise"], train_also=["score", "norm"])
    )
    assert torch.equal(model(x), expected)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    assert set(dict(handle.named_parameters())) >= {"score.weight", "score.bias", "norm.weight"}
    model.train()
    optimiser = torch.optim.SGD(handle.parameters(), lr=0.5)
    for _ in range(3):
        model(x).float().square().sum().backward()
        optimiser.step()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    model.eval()
    trained = model(x)
    assert error(trained, expected) > 0.01
    with veneer.use(model, None):
        assert torch.equal(model(x), expected)
    handle.merge()
    assert error(model(x), trained) < (1e-5 if dtype == torch.float32 else 0.02)
    handle.unmerge()
    assert torch.equal(model(x), trained)
    handle.detach()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("bias", ["targets", "all"])
def test_trained_biases(bias):
    model = TinyLM()
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets=["q_proj", "k_proj"], bias=bias)
    )
    randomise(handle)
    trained = [name for name in dict(handle.named_parameters()) if name.endswith("bias")]
    assert len(trained) == (
        2
        if bias == "targets"
        else sum(name.endswith("bias") for name in model.state_dict() if "veneer" not in name)
    )
    with torch.no_grad():
        unmerged = model(IDS)
        with veneer.use(model, None):
            assert error(model(IDS), unmerged) > 1e-3
        assert veneer.check(model, IDS)
        handle.merge()
        assert error(model(IDS), unmerged) < 1e-5


def test_all_biases_have_other_names_too():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LSTM(4, 4), "c": nn.Linear(4, 4)})
    model["d"] = nn.MultiheadAttention(4, 2)
    config = veneer.LoraConfig(rank=2, targets=["a"], bias="all", exclude=["c"])
    handle = veneer.attach(model, config)
    trained = {name for name, _ in handle.named_parameters() if "bias" in name}
    lstm = {"b.bias_ih_l0", "b.bias_hh_l0"}
    assert trained == {"a.bias", *lstm, "d.in_proj_bias", "d.out_proj.bias"}


# ---- errors
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, ["rank=0", "at least 1"]),
        ({"rank": 2.5}, ["rank=2.5"]),
        ({"rank": True}, ["rank=True"]),
        ({"dropout": -0.5}, ["dropout=-0.5", "[0, 1)"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"alpha": float("nan")}, ["alpha=nan", "finite"]),
        ({"alpha": -1}, ["alpha=-1"]),
        ({"targets": []}, ["targets=()"]),
        ({"targets": ["a", 3]}, ["targets="]),
        ({"layers": [1.0]}, ["layers="]),
        ({"bias": "al"}, ["bias='al'", "'all'"]),
        ({"dtype": "int8"}, ["dtype='int8'"]),
        ({"variant": None}, ["variant=None", "Expected: one of"]),
        ({"variant": ["lora"]}, ["variant=['lora']"]),
        ({"variant": ""}, ["variant=''"]),
        ({"variant": "lorra"}, ["variant='lorra'", "'lora'"]),
        ({"ranks": {"a": 0}}, ["ranks['a']=0"]),
        (
            {"rank": -1, "dropout": 2, "bias": "x"},
            ["3 problems", "rank=-1", "dropout=2", "bias='x'"],
        ),
    ],
    ids=str,
)
def test_bad_configs(fields, words):
    with pytest.raises(ConfigError) as caught:
        veneer.LoraConfig(**fields)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_unknown_config_fields_name_the_nearest():
    with pytest.raises(ConfigError, match=r"'rnak' .nearest: 'rank'"):
        veneer.LoraConfig.from_dict({"rnak": 3})
    config = veneer.LoraConfig(targets=["a"], layers=[1], ranks={"a": 2})
    assert veneer.LoraConfig.from_dict(config.to_dict()) == config


def hooked():
    """A weight that an old-style hook computes anew in every call."""
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(nn.Linear(8, 8))


class Odd(nn.Module):
    """What an adapter could not change."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced = nn.Linear(8, 8)
        self.replaced.forward = self.replaced.forward
        self.whole = nn.Linear(8, 8)
        self.whole.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
        self.scripted = scripted()
        self.lazy = nn.LazyLinear(8)
        self.hooked = hooked()
        self.fine = nn.Linear(8, 8)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's deprecation
        return torch.jit.script(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"targets": ["q_porj"]}, ["'q_porj'", "nearest: 'q_proj'", "q_proj, k_proj"]),
        ({"targets": ["q_proj", "nothing"]}, ["'nothing' matches nothing"]),
        ({"targets": ["self_attn"]}, ["'self_attn' matches Attention"]),
        ({"targets": "re:("}, ["regular expression"]),
        ({"slices": {"re:(": [True]}}, ["regular expression"]),
        ({"trainable_tokens": {"re:(": [1]}}, ["regular expression"]),
        ({"targets": lambda path, module: False}, ["callable chose no module"]),
        ({"exclude": ["nothing"]}, ["exclude pattern 'nothing' matches no module"]),
        ({"exclude": ["*"]}, ["no module left"]),
        ({"layers": [2]}, ["layers=[2]", "[-2, 2)", "2 blocks"]),
        ({"rank": 9}, ["rank 9", "at most 8", "model.layers.0.self_attn.q_proj"]),
        ({"ranks": {"nothing": 3}}, ["ranks pattern 'nothing'"]),
        ({"alphas": {"lm_head": 3}}, ["alphas pattern 'lm_head'"]),
        ({"train_also": ["nothing"]}, ["train_also pattern 'nothing'"]),
        (
            {"targets": ["lm_head"], "train_also": ["embed_tokens"], "tied": True},
            ["through a tie, trained in full"],
        ),
        ({"targets": ["q_proj.wieght"]}, ["'q_proj.wieght' matches nothing"]),
        ({"slices": {"q_proj": [True, False, True]}}, ["slices [True, False, True]", "8 outputs"]),
        ({"slices": {"nothing": [True]}}, ["slices pattern 'nothing'"]),
        ({"slices": {"q_proj": [(0, 2), (6, 9)]}}, ["slices [(0, 2), (6, 9)]"]),
        ({"slices": {"q_proj": [(0, 1)]}}, ["rank 2", "at most 1"]),
        ({"train_also": ["q_proj"], "targets": ["q_proj"]}, ["in targets and in train_also"]),
        ({"targets": ["k_proj"], "bias": "targets"}, ["no bias there"]),
        ({"targets": ["nothing", "self_attn"], "exclude": ["other"]}, ["3 problems"]),
    ],
    ids=lambda value: "a function" if "function" in str(value) else str(value),
)
def test_bad_targets_are_named_all_at_once_and_leave_the_model_alone(config, words):
    config = dict(config)
    model = TinyLM(tied=config.pop("tied", False))
    before = state(model)
    with pytest.raises(TargetError) as caught:
        veneer.attach(model, veneer.LoraConfig(**{"rank": 2, **config}))
    for word in words:
        assert word in str(caught.value)
    assert state(model) == before


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("replaced", "forward was replaced on the instance"),
        ("whole", "torch.int8"),
        ("scripted", "TorchScript"),
        ("lazy", "no shape yet"),
        ("hooked", "computed by a hook"),
        ("hooked.weight_v", "a hook computes 'weight'"),
    ],
)
def test_what_an_adapter_could_not_change_is_refused_with_the_reason(target, words):
    model = Odd()
    before = state(model)
    with pytest.raises(TargetError, match=words):
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=[target]))
    with pytest.raises(TargetError):
        veneer.attach(model, veneer.LoraConfig(rank=2))
    assert state(model) == before
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["fine"]))


def test_training_what_the_user_froze_is_a_conflict():
    """One parameter frozen among trainable ones was frozen on purpose; a model frozen as a whole
    says nothing."""
    model = TinyLM()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.requires_grad_(False)
    before = state(model)
    for fields, frozen in (
        ({"targets": ["q_proj"], "train_also": ["lm_head"]}, ["lm_head.weight"]),
        ({"targets": ["q_proj"], "bias": "all"}, ["model.norm.bias"]),
        ({"targets": ["q_proj", "model.norm"]}, ["model.norm.weight"]),
    ):
        with pytest.raises(TargetError, match="froze") as caught:
            veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
        assert all(path in str(caught.value) for path in frozen)
        assert state(model) == before
    veneer.attach(
        model, veneer.LoraConfig(rank=2, targets=["lm_head"])
    )  # a low-rank change is for frozen weights
    with pytest.raises(
        TargetError, match="froze"
    ):  # what was frozen before the first adapter still counts
        veneer.attach(
            model,
            veneer.LoraConfig(rank=2, targets=["q_proj"], train_also=["model.norm"]),
            name="second",
        )
    with pytest.warns(veneer.SkippedLayers, match="froze"):
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"), name="second")
    assert "model.norm" not in handle.layers
    frozen = TinyLM().requires_grad_(False)
    veneer.attach(
        frozen, veneer.LoraConfig(rank=2, train_also=["lm_head", "model.norm"], bias="all")
    )


def test_weights_without_numbers_among_others_are_refused():
    """A model that is on the meta device as a whole gets its numbers later; a part of it was moved
    away."""
    model = TinyLM()
    model.model.layers[1].self_attn.q_proj.to("meta")
    before = state(model)
    with pytest.raises(TargetError, match="meta") as caught:
        veneer.attach(model, veneer.LoraConfig(rank=2))
    assert "model.layers.1.self_attn.q_proj" in str(caught.value)
    assert state(model) == before


def test_every_problem_in_one_error():
    """All that is wrong with one call, in one error; the model keeps every bit."""
    model = Odd()
    model.model = TinyLM()
    model.complex = nn.Linear(8, 8, dtype=torch.complex64)
    model.float8 = nn.Linear(8, 8)
    model.float8.weight = nn.Parameter(
        model.float8.weight.to(torch.float8_e4m3fn), requires_grad=False
    )
    model.away = nn.Linear(8, 8, device="meta")
    model.model.lm_head.requires_grad_(False)
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["fine"]), name="taken")
    for parameter in model.model.parameters():
        parameter.requires_grad_(True)
    del model.lazy  # its parameters have nothing to compare
    before, numbers = state(model), bits(model)
    config = veneer.LoraConfig(
        rank=9, targets=["whole", "hooked", "replaced", "scripted", "complex", "float8", "away", "fine", "nowhere"],
        exclude=["never"], train_also=["lm_head", "no_head"], ranks={"nobody": 2}, layers=[-3, 2],
    )  # fmt: skip
    with pytest.raises(TargetError) as caught:
        veneer.attach(model, config, name="taken")
    text = str(caught.value)
    for words in (
        "'taken', which is taken", "torch.int8", "by a hook", "replaced on the instance", "TorchScript",
        "complex64", "float8_e4m3fn", "'away'", "rank 9 for 'fine.weight'", "'nowhere' matches nothing",
        "'never' matches no module", "'no_head'", "'nobody'", "[-3, 2]", "lm_head.weight",
    ):  # fmt: skip
        assert words in text, words
    assert state(model) == before
    assert all(
        torch.equal(value, numbers[name])
        for name, value in bits(model).items()
        if not value.is_meta
    )


class Encoder(nn.Module):
    """Layers whose weights are read past their own forward, computed, rewritten as they are read,
    or shared."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(8, 8, max_norm=1.0)
        self.fused = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.parametrised = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.odd = Diagonal(8, 8)
        self.odd.table = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        x = self.fused(self.lookup(ids))
        x = x + self.attention(x, x, x)[0]
        x, _ = self.recurrent(self.parametrised(x))
        return self.norm(self.odd(x))


ENCODER_IDS = torch.tensor([[1, 5, 3, 2], [7, 0, 2, 4]])


@pytest.mark.parametrize(
    "targets",
    [
        "all",
        "lookup",
        "fused.linear1",
        "fused.self_attn",
        "fused.norm1",
        "attention",
        "attention.out_proj",
        "attention.in_proj_weight",
        "parametrised",
        "recurrent",
        "recurrent.weight_hh_l0",
        "recurrent.bias_ih_l0",
        "odd",
        "norm",
    ],
)
def test_what_forward_reads_in_its_own_way_works(targets):
    """Fused fast paths, weights read from above, parametrisations, rewritten embeddings,
    recurrences, plain parameters, vectors."""
    model = Encoder().eval()
    model(ENCODER_IDS)  # the rows that it reads have their norms bounded from now on
    before = state(model, versions=False)
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets="all" if targets == "all" else [targets])
    )
    randomise(handle)
    works(handle, ENCODER_IDS)
    assert state(model, versions=False) == before


class Reads(nn.Module):
    """A head whose weights a forward reads past their modules: ``direct`` is how, in each
    subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Linear(6, 6), nn.Linear(6, 6)
        self.ls = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.named = nn.ModuleDict({"one": nn.Linear(6, 6)})

    def forward(self, x):
        h = self.named["one"](self.lin(self.emb(x)))
        for layer in self.ls:
            h = torch.tanh(layer(h))
        return self.direct(h)

    def direct(self, h):
        return F.linear(h, self.emb.weight) + F.linear(h, self.lin.weight)


def project(h, layer, scale=1):
    return F.linear(h, layer.weight) * scale


def of_model(model, h):
    return model.project(h, layer=model.emb) + project(h, scale=2, layer=model.lin)


class BySuper(Reads):
    def direct(self, h):
        return 2 * super().direct(h)


class BySuperForward(BySuper):
    def forward(self, x):
        return super().forward(x) + 1


class ByClass(Reads):
    def direct(self, h):
        return Reads.direct(self, h) + type(self).more(self, h)

    def more(self, h):
        return F.linear(h, self.ls[0].weight)


class ByProperty(Reads):
    @property
    def out_w(self):
        return self.emb.weight

    @property
    def head(self):
        return self.lin

    def direct(self, h):
        return F.linear(h, self.out_w) + F.linear(h, self.head.weight)


class ByGetter(Reads):
    def get_head(self):
        return self.lin if self.lin is not None else self.emb

    def direct(self, h):
        return F.linear(h, self.get_head().weight)


class ByEnumerate(Reads):
    def direct(self, h):
        for i, layer in enumerate(self.ls):
            h = F.linear(layer(h), layer.weight) * (i + 1)
        return h


class ByZip(Reads):
    def direct(self, h):
        for (layer, _), scale in zip(zip(self.ls, self.named.values()), (2, 3)):  # noqa: B905
            h = F.linear(h, layer.weight) * scale
        for _, layer in self.named.items():
            h = F.linear(h, layer.weight)
        for layer in (self.emb, self.lin):
            h = F.linear(h, layer.weight)
        for layer in self.ls[1:]:
            h = F.linear(h, layer.weight)
        return h


class ByComprehension(Reads):
    def direct(self, h):
        h = h + sum(F.linear(h, layer.weight) for layer in self.ls)
        return sum([F.linear(h, layer.weight) for layer in reversed(self.ls)])


class ByNames(Reads):
    def direct(self, h):
        one, (two, _) = self.emb, (self.lin, None)
        h = F.linear(h, one.weight) + F.linear(h, two.weight)
        if (three := self.named["one"]) is not None:
            h = F.linear(h, three.weight)
        last: nn.Linear = self.ls[1]
        return F.linear(h, last.weight)


class ByUnpacking(Reads):
    def direct(self, h):
        first, second = self.ls
        return F.linear(F.linear(h, first.weight), second.weight)


class ByGetattr(Reads):
    def direct(self, h):
        h = F.linear(h, getattr(self, "emb").weight) + F.linear(h, getattr(self.lin, "weight"))  # noqa: B009
        return F.linear(h, self._modules["emb"].weight) + F.linear(
            h, self.get_submodule("named.one").weight
        )


class ByStarred(Reads):
    def direct(self, h):
        arguments = (self, "unread", 0)
        return F.linear(h, self.emb.weight) + getattr(*arguments)


class ByHelper(Reads):
    def direct(self, h):
        return project(h, self.ls[0]) + of_model(self, h)

    def project(self, h, layer):
        return project(h, layer)


class ByLambda(Reads):
    out = lambda self, h: F.linear(h, self.emb.weight)  # noqa: E731

    def direct(self, h):
        return self.out(h)


class ByBound(Reads):
    def __init__(self):
        super().__init__()
        self.impl = self._impl

    def _impl(self, h):
        return F.linear(h, self.emb.weight)

    def direct(self, h):
        return self.impl(h)


class Below(Reads):
    """Reads what the module below reads too."""

    def __init__(self):
        super().__init__()
        self.inner = Reads()

    def direct(self, h):
        return F.linear(self.inner(h), self.inner.emb.weight) + F.linear(h, self.inner.ls[0].weight)


READS = [
    Reads,
    BySuper,
    BySuperForward,
    ByClass,
    ByProperty,
    ByGetter,
    ByEnumerate,
    ByZip,
    ByComprehension,
    ByNames,
]
READS += [ByUnpacking, ByGetattr, ByStarred, ByHelper, ByLambda, ByBound, Below]


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("cls", READS)
def test_a_weight_that_is_read_past_its_module_is_the_changed_one(cls, variant):
    model, x = cls().double(), torch.randn(3, 6, dtype=torch.float64)
    before = state(model, versions=False)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, variant=variant))
    randomise(handle)
    veneer.check(model, x)
    works(handle, x, within=1e-12)
    assert state(model, versions=False) == before


class Tower(nn.Module):
    """Calls from outside that read weights besides ``forward``: of its own and of modules below."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(width, width))
        self.emb = nn.Linear(width, width)
        self.seen = 0

    def encode(self, x, scale=1):
        self.seen += 1
        return self._encode(x) * scale

    def _encode(self, x):
        return self.emb(x).mul_(2) @ self.proj

    def fuse(self):
        self.fused = nn.Linear(6, 12, bias=False)
        self.fused.weight.data.copy_(torch.cat([self.emb.weight.data, self.emb.weight]))

    def attend(self, h):
        return F.linear(h, self.emb.weight)

    def both(self, x):
        return self.attend(self.encode(x)) + self(x)

    @property
    def head(self):
        return self.emb.weight @ self.proj

    @torch.no_grad()
    def reset(self):
        self.proj.fill_(1.0)
        nn.init.eye_(self.emb.weight)

    def forward(self, x):
        return self.encode(x)


class Towers(nn.Module):
    """Never calls its tower's ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.other = Tower(), nn.Linear(6, 6)

    def score(self, x):
        return F.linear(self.other(x), self.tower.emb.weight) + self.tower.head.sum()

    def forward(self, x):
        return self.tower.attend(self.tower.encode(x)) + self.tower.head.sum()


CALLS = {
    "forward": lambda model, x: model(x),
    "encode": lambda model, x: model.encode(x, scale=2),
    "attend": lambda model, x: model.attend(x),
    "both": lambda model, x: model.both(x),
    "property": lambda model, x: model.head,
}


@pytest.mark.parametrize(
    ("targets", "calls"),
    [
        (["proj", "emb"], CALLS),
        (["proj"], ["forward", "encode", "both", "property"]),
        (["emb"], CALLS),
    ],
    ids=["both", "proj", "emb"],
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_method_that_reads_a_weight_sees_the_change_once(targets, calls, variant):
    model, x = Tower().double(), torch.randn(3, 6, dtype=torch.float64)
    before = state(model, versions=False)
    with torch.no_grad():
        plain = {name: CALLS[name](model, x) for name in CALLS}
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets, variant=variant)))
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = {name: CALLS[name](other, x) for name in CALLS}
            with veneer.use(other, None):
                assert all(torch.equal(CALLS[name](other, x), plain[name]) for name in CALLS)
            veneer.merge(other)
            for name, value in found.items():
                assert error(CALLS[name](other, x), value) < 1e-12
                assert (error(value, plain[name]) > 1e-3) == (name in calls)
            veneer.unmerge(other)
    assert model.seen > 5
    veneer.detach(model)
    assert state(model, versions=False) == before


class ListedMatrices(nn.Module):
    """``encode`` reads an element of a list of parameters that ``forward`` does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])

    def encode(self, x):
        return x @ self.matrices[1]

    def forward(self, x):
        return x @ self.matrices[0]


def test_a_method_that_reads_an_element_of_a_list_sees_the_change():
    model, x = ListedMatrices().double(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        plain = model.encode(x)
        config = veneer.LoraConfig(rank=2, targets=["matrices.0", "matrices.1"])
        randomise(veneer.attach(model, config))
        changed = model.encode(x)
        veneer.merge(model)
        assert error(model.encode(x), changed) < 1e-12
    assert error(changed, plain) > 1e-3


def test_methods_follow_the_selection_and_the_rows():
    model, x = Tower().double(), torch.randn(3, 6, dtype=torch.float64)
    for name, targets in {"a": ["proj"], "b": ["emb"]}.items():
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets), name))
    with pytest.raises(SelectionError, match="none selected"):
        model.encode(x)
    with torch.no_grad():
        for call in (CALLS["encode"], CALLS["attend"], CALLS["both"]):
            alone = {}
            for name in ("a", "b", None):
                with veneer.use(model, name):
                    alone[name] = call(model, x)
            with veneer.use(model, ["b", None, "a"]):
                rows = call(model, x)
            assert error(rows, torch.stack([alone["b"][0], alone[None][1], alone["a"][2]])) < 1e-12
    veneer.detach(model, "a")
    assert error(model.attend(x), F.linear(x, model.emb.weight)) > 1e-3
    veneer.detach(model, "b")
    assert torch.equal(model.attend(x), F.linear(x, model.emb.weight))


def test_a_method_that_writes_a_weight_writes_the_base():
    model = Tower()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["proj", "emb"]))
    randomise(handle)
    model.fuse()
    assert torch.equal(model.fused.weight[:6], model.emb.weight)
    model.reset()
    assert torch.equal(model.proj, torch.ones(6, 6))
    assert torch.equal(model.emb.weight, torch.eye(6))


def test_a_parent_may_call_other_methods_of_its_child():
    model, x = Towers().double(), torch.randn(3, 6, dtype=torch.float64)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["proj", "emb"]))
    randomise(handle)
    with torch.no_grad():
        score = model.score(x)
        handle.merge()
        assert error(model.score(x), score) < 1e-12
        handle.unmerge()
    veneer.check(model, x)
    works(handle, x, within=1e-12)


def test_methods_compile_and_train():
    model, x = Tower(), torch.randn(3, 6)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["proj", "emb"]))
    randomise(handle)
    torch._dynamo.reset()
    encode = torch.compile(model.attend, backend="eager", fullgraph=True)
    assert error(encode(x), model.attend(x)) < 1e-6
    model.encode(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())


class Listed(nn.Sequential):
    """A list of modules with a method that reads one of them."""

    def logits(self, h):
        return F.linear(h, self[0].weight)


class Kept(Tower):
    @functools.cached_property
    def twice(self):
        return self.emb.weight * 2

    def forward(self, x):
        return x @ self.twice


def test_what_no_view_can_show_is_refused_with_the_reason():
    model = nn.Sequential(Listed(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 6))
    before = state(model)
    with pytest.raises(TargetError, match=r"'0' in 'logits' reads it, and .*items"):
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0.0"]))
    with pytest.raises(
        TargetError, match="the model in 'twice' reads it, and that is computed once"
    ):
        veneer.attach(Kept(), veneer.LoraConfig(rank=2, targets=["emb"]))
    tower = Tower()
    tower.encode = lambda x: x @ tower.proj
    with pytest.raises(TargetError, match="its encode was replaced on the instance"):
        veneer.attach(tower, veneer.LoraConfig(rank=2, targets=["proj"]))
    assert state(model) == before


def test_a_tie_that_is_trained_in_full_stays_a_tie():
    for also in ("lm_head", "embed_tokens"):
        model = TinyLM(tied=True).eval()
        handle = veneer.attach(
            model, veneer.LoraConfig(rank=2, targets=["q_proj"], train_also=[also])
        )
        assert len([p for p in handle.parameters() if p.shape == (17, 8)]) == 1
        randomise(handle)
        with torch.no_grad():
            plain = copy.deepcopy(model)
            veneer.merge(plain)
            assert plain.lm_head.weight is plain.model.embed_tokens.weight
        works(handle, IDS)


@pytest.mark.parametrize("bias", ["targets", "all"])
def test_biases_beside_a_shared_weight_are_trained_each_for_itself(bias):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, bias=bias))
    assert list(handle.changes) == ["0.weight"]
    own = dict(handle.named_parameters())
    assert ("0.bias" in own, "1.bias" in own) == (True, bias == "all")
    randomise(handle)
    works(handle, torch.randn(3, 4))


def test_arguments_of_another_kind():
    model = TinyLM()
    before = state(model)
    for config in ("all-linear", {"rank": 2}):
        with pytest.raises(ConfigError, match=r"Expected: a veneer\.LoraConfig"):
            veneer.attach(model, config)
    assert state(model) == before
    for function in (
        veneer.attach,
        veneer.merge,
        veneer.detach,
        lambda model: veneer.use(model, "a"),
    ):
        with pytest.raises(TargetError, match="a str for a model"):
            function("llama")
    veneer.attach(model, veneer.LoraConfig(rank=2))
    with pytest.raises(SelectionError, match=r"no adapter named 'b'"):
        veneer.use(model, ["default", "b"])


def test_names_of_adapters_and_roots():
    model = TinyLM()
    for name in ("", "a.b", "a b", "ü/"):
        with pytest.raises(TargetError, match="adapter name"):
            veneer.attach(model, veneer.LoraConfig(rank=2), name)
    veneer.attach(model, veneer.LoraConfig(rank=2), "keys")  # a name that nn.Module itself has
    with pytest.raises(TargetError, match="'keys', which is taken"):
        veneer.attach(model, veneer.LoraConfig(rank=2), "keys")
    with pytest.raises(TargetError, match="another model object"):
        veneer.attach(model.model, veneer.LoraConfig(rank=2))
    outer = nn.Sequential(model)
    with pytest.raises(TargetError, match="another model object"):
        veneer.attach(nn.ModuleList([outer, nn.Linear(2, 2)]), veneer.LoraConfig(rank=2))
    veneer.merge(model)
    with pytest.raises(MergeError, match="is merged"):
        veneer.detach(model)


def test_memory_that_runs_out_while_attaching_changes_nothing(monkeypatch):
    model = TinyLM()
    before = state(model)
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError
        return original(*args)

    original = installing.make_change
    monkeypatch.setattr(installing, "make_change", failing)
    with pytest.raises(MemoryError):
        veneer.attach(model, veneer.LoraConfig(rank=2))
    assert state(model) == before


# ---- the base that stays, and what patterns reach
# ---------------------------------------------------------------


def test_running_statistics_of_the_base_stay():
    model, x = ConvNet(), torch.randn(4, 3, 8, 8) * 3 + 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["pointwise"]))
    model.train()
    for _ in range(3):
        model(x)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    trained = model.eval()(x)
    handle.merge()
    assert error(model(x), trained) < 1e-5
    handle.unmerge()
    handle.detach()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_excluding_a_container_excludes_what_is_in_it():
    assert paths(TinyLM(), exclude=["self_attn"]) == blocks(MLP)
    assert paths(TinyLM(), exclude=["layers.0"]) == blocks(LINEAR, [1])


def test_train_also_needs_something_to_train():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(
        TargetError, match="train_also pattern '1' matches modules without parameters"
    ):
        veneer.attach(model, veneer.LoraConfig(rank=2, train_also=["1"]))


def test_all_means_all_that_can_be_attached_to_and_tells_the_rest():
    model = Odd()
    with pytest.warns(veneer.SkippedLayers, match="leaves out") as caught:
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    assert list(handle.layers) == ["fine"]
    text = str(caught[0].message)
    for name in ("replaced", "whole", "scripted", "lazy", "hooked"):
        assert f"'{name}'" in text


def test_all_lowers_the_rank_to_what_each_shape_allows():
    model = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 20), nn.Conv2d(20, 20, 3, groups=20))
    changes = veneer.attach(model, veneer.LoraConfig(rank=8, alpha=8, targets="all")).changes
    assert [change.rank for change in changes.values()] == [3, 8, 1]
    veneer.detach(model)
    with pytest.raises(TargetError, match="rank 4"):
        veneer.attach(model, veneer.LoraConfig(rank=8, targets="all", ranks={"0": 4}))
    with pytest.raises(TargetError, match="at most 3"):
        veneer.attach(model, veneer.LoraConfig(rank=8, targets=["0"]))


@pytest.mark.parametrize("slices", [[False, True, False, True], [(2, 4), (6, 8)]])
def test_slices_change_their_outputs_alone(slices):
    model, x = nn.Linear(6, 8), torch.randn(3, 6)
    base = model(x)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, slices={"*": slices}, targets="all"))
    randomise(handle)
    kept, changed = [0, 1, 4, 5], [2, 3, 6, 7]
    assert torch.equal(model(x)[:, kept], base[:, kept])
    assert error(model(x)[:, changed], base[:, changed]) > 1e-3
    assert handle.summary().trainable == 2 * (6 + 4)
    works(handle, x)


def test_bias_all_honours_exclude():
    model = TinyLM()
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets=["q_proj"], exclude=["norm"], bias="all")
    )
    assert not any("norm" in path for path in handle.layers)


def test_configs_of_natural_values():
    config = veneer.LoraConfig(
        exclude=None, train_also=None, ranks=None, alphas=None, layers={1, 0}
    )
    assert (config.exclude, config.train_also, config.ranks, config.layers) == ((), (), {}, (0, 1))
    assert veneer.LoraConfig(layers=3).layers == (3,)
    assert veneer.LoraConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="ranks="):
        veneer.LoraConfig(ranks=[1])


# ---- weights that share memory, containers, starts that fail, modes
# ---------------------------------------------


class Pair(nn.Module):
    def __init__(self, vocabulary: int = 6, width: int = 4) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        return self.head(self.emb(ids))


def one_memory(model):
    model.head.weight.data = model.emb.weight.data


def turned(model):
    model.head = nn.Linear(6, 4, bias=False)
    model.head.weight = nn.Parameter(model.emb.weight.t())


def in_part(model):
    model.head.weight = nn.Parameter(model.emb.weight.detach().view(-1)[8:].view(4, 4))


def buried(model):
    model.vector = nn.Module()
    model.vector.bias = nn.Parameter(model.head.weight.detach()[2])
    model.emb.weight.requires_grad_(False)


@pytest.mark.parametrize(
    "fields", [{"targets": ["head"]}, {"targets": ["emb"], "train_also": ["head"]}, {}], ids=str
)
@pytest.mark.parametrize("share", [one_memory, turned, in_part, buried])
def test_parameters_that_share_memory_are_refused(share, fields):
    model = Pair()
    share(model)
    before = state(model)
    if share is buried:
        fields = {"targets": ["head"]}
    with pytest.raises(TargetError, match="share memory") as caught:
        veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
    other = "vector.bias" if share is buried else "emb.weight"
    for words in ("'head.weight'", f"'{other}'", "head.weight", "tie them"):
        assert words in str(caught.value)
    if share is one_memory:
        assert "`head.weight = emb.weight`" in str(caught.value)
    assert state(model) == before


def test_a_tie_and_views_that_do_not_overlap_are_no_shared_memory():
    model = Pair()
    model.head.weight = model.emb.weight
    model.rest = nn.ModuleDict(
        {"fused": nn.Linear(4, 12), "q": nn.Linear(4, 6), "v": nn.Linear(4, 6)}
    )
    flat_buffer, whole = torch.randn(200), torch.randn(6, 8)
    for layer, start in (("q", 0), ("v", 24)):
        model.rest[layer].weight = nn.Parameter(flat_buffer[start : start + 24].view(6, 4))
    model.side, model.beside = (
        nn.Linear(4, 6),
        nn.Linear(4, 6),
    )  # columns of one matrix: woven, but apart
    model.side.weight, model.beside.weight = nn.Parameter(whole[:, :4]), nn.Parameter(whole[:, 4:])
    model.far = nn.Linear(4, 6, device="meta")
    model.farther = nn.Linear(4, 6, device="meta")
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["head", "q", "v", "side", "beside"]))
    other = Pair()
    one_memory(other)  # neither of which changes
    other.fine = nn.Linear(4, 4)
    veneer.attach(other, veneer.LoraConfig(rank=2, targets=["fine"]))


def test_shared_memory_is_found_when_an_adapter_is_loaded(tmp_path):
    path = veneer.attach(Pair(), veneer.LoraConfig(rank=2, targets=["head"])).save(
        tmp_path / "adapter"
    )
    model = Pair()
    one_memory(model)
    with pytest.raises(AdapterError, match="share memory"):
        veneer.load(model, path, verify_base=False)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(1, 5).expand(5, 5),
        torch.randn(9).as_strided((5, 5), (1, 1)),
        torch.randn(9).as_strided((3, 4), (2, 1)),
    ],
    ids=["expanded", "hankel", "windows"],
)
def test_a_weight_that_overlaps_itself_is_refused(weight):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight = nn.Parameter(weight)
    before = state(model)
    for fields in ({"targets": ["0"]}, {"targets": ["0.weight"]}):
        with pytest.raises(TargetError, match=r"'0\.weight'.*same memory"):
            veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
    assert state(model) == before
    model[0].weight = nn.Parameter(
        torch.randn(6, 10).as_strided(weight.shape, (20, 2) if weight.shape[0] < 4 else (11, 2))
    )
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"]))


class Scale(nn.Sequential):
    """A container with a parameter of its own, which would run what an adapter puts beside its
    items."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return super().forward(x) @ self.scale


class Direct(nn.Sequential):
    """A container that reads its item's weight."""

    def forward(self, x):
        return nn.functional.linear(x, self[0].weight) + self[1](x)


class Framed(nn.ModuleList):
    def __init__(self):
        super().__init__([nn.Linear(4, 4)])
        self.gain = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.ones(4))


class Mapped(nn.ModuleDict):
    def __init__(self):
        super().__init__({"one": nn.Linear(4, 4)})
        self.table = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (Scale, {"targets": ["held.scale"]}),
        (Scale, {"targets": ["held.0"], "train_also": ["held"]}),
        (lambda: Direct(nn.Linear(4, 4), nn.Linear(4, 4)), {"targets": ["held.0"]}),
        (
            lambda: Direct(nn.Linear(4, 4), nn.Linear(4, 4)),
            {"targets": ["held.1"], "train_also": ["held.0"]},
        ),
        (Framed, {"targets": ["gain"]}),
        (Framed, {"targets": ["held.0"], "bias": "all"}),
        (Mapped, {"targets": ["held.table"]}),
    ],
)
def test_a_container_is_refused_as_it_would_run_the_adapter(make, fields):
    model = nn.ModuleDict({"held": make()})
    before = state(model)
    with pytest.raises(TargetError, match=r"'held'.*items"):
        veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
    assert state(model) == before


def test_the_items_of_containers_are_attached_to_as_before():
    for model in (Scale(), nn.ModuleDict({"held": Framed()}), nn.ModuleDict({"held": Mapped()})):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
        assert "items" in str(told[0].message)
        assert all(isinstance(model.get_submodule(path), nn.Linear) for path in handle.layers)
    works(adapt_linear(Scale()), torch.randn(3, 4))


def adapt_linear(model, **fields):
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
    randomise(handle)
    return handle


class Laminate(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.veneer = nn.Linear(4, 4)

    def forward(self, x):
        return self.veneer(super().forward(x))


def test_a_child_that_is_called_as_ours_is_not_overwritten():
    model, x = nn.Sequential(Laminate()), torch.randn(3, 4)
    before, expected = state(model), model(x)
    for fields in (
        {},
        {"targets": ["0"]},
        {"targets": ["0.veneer"], "train_also": ["0"]},
        {"bias": "all"},
    ):
        with pytest.raises(TargetError, match="a child of its own called 'veneer'"):
            veneer.attach(model, veneer.LoraConfig(rank=2, **fields))
    assert state(model) == before
    works(adapt_linear(model, targets=["0.veneer"]), x)
    assert torch.equal(model(x), expected)
    encoder = nn.TransformerEncoderLayer(4, 2, 4)
    encoder.veneer = nn.Identity()
    with pytest.raises(TargetError, match="a child of its own called 'veneer'"):
        veneer.attach(nn.Sequential(encoder), veneer.LoraConfig(rank=2, targets=["linear1"]))


def test_the_nearest_names_are_others_and_targets():
    model = nn.ModuleList(
        nn.ModuleDict({"v": nn.Linear(4, 4), "vo": nn.Linear(4, 4)}) for _ in range(2)
    )
    with pytest.raises(TargetError) as caught:
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=["vo"], ranks={"v": 1}))
    assert "'v' matches no target (nearest: 'vo')" in str(caught.value)
    flat = nn.ModuleDict({"v": nn.Linear(4, 4), "w": nn.Linear(4, 4)})
    with pytest.raises(TargetError) as caught:
        veneer.attach(flat, veneer.LoraConfig(rank=2, targets=["w"], ranks={"v": 1}))
    assert "nearest" not in str(caught.value)


def test_a_new_change_is_in_the_mode_of_its_layer(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    model.train()
    model[0].eval()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, dropout=0.5))
    randomise(handle)
    path = handle.save(tmp_path / "adapter")
    for _ in range(2):
        assert {at: change.training for at, change in handle.changes.items()} == {
            "0.weight": False,
            "1.weight": True,
        }
        assert torch.equal(model[0](x), model[0](x))
        assert not torch.equal(model[1](x), model[1](x))
        handle.detach()
        handle = veneer.load(model, path, trainable=True)
    model.eval()
    model[1].train()
    other = veneer.attach(
        model, veneer.LoraConfig(rank=2, train_also=["1"], targets=["0"]), "other"
    )
    assert {path: part.training for path, part in other.layers.items()} == {"0": False, "1": True}


def test_a_layer_without_a_bias_whose_weight_has_another_name_is_trained_in_full():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(6))
            self.register_parameter("bias", None)

        def forward(self, x):
            return x * self.gamma

    model, x = nn.Sequential(nn.Linear(6, 6), Scale()), torch.randn(3, 6)
    base = model(x).detach()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="0", train_also="1"))
    assert error(model(x), base) < 1e-6
    model(x).square().sum().backward()
    assert dict(handle.named_parameters())["1.gamma"].grad.any()
