"""Folders of PEFT's other tuners: what PEFT computes with them is what Veneer does, merged and
trained on too."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.support.toys import error
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.adapter_files.verify import verify
from veneer.errors import AdapterError
from veneer.formats.peft_tuners import TUNERS
from veneer.tools.convert import conversion, convert

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Net(nn.Module):
    """Linear layers of several shapes, a transposed one, convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(6, 14, 3, padding=1)
        self.c2 = nn.Conv2d(2, 14, (3, 5), stride=2, dilation=2, padding=4)
        self.q = nn.Linear(14, 12)
        self.gpt = Conv1D(10, 12)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):  # [N, 6, L]
        x = F.relu(self.c1(x)).mT
        x = self.q(x) + self.c2(x.mT.unflatten(1, (2, 7))).mean((1, 2, 3))[:, None, None]
        return self.head(self.norm(F.relu(self.gpt(x))))


X = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, lora_alpha=3, total_step=10, target_modules=["q", "gpt", "c2"]
    ),
    "adalora without alpha": lambda: peft.AdaLoraConfig(
        init_r=3, lora_alpha=0, total_step=10, target_modules=["q"]
    ),
    "adalora, more than the weight has": lambda: peft.AdaLoraConfig(
        init_r=12, total_step=10, target_modules=["q", "head"]
    ),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["q", "head"]),
    "loha, flat kernels": lambda: peft.LoHaConfig(
        r=3, alpha=4, target_modules=["c1", "c2", "q"], rank_dropout=0.5
    ),
    "loha, tucker": lambda: peft.LoHaConfig(
        r=2, target_modules=["c1", "c2"], use_effective_conv2d=True
    ),
    "loha, more than the weight has": lambda: peft.LoHaConfig(
        r=16, target_modules=["q", "head"], modules_to_save=["norm"]
    ),
    "loha, patterns": lambda: peft.LoHaConfig(
        r=2, target_modules=["q", "head"], rank_pattern={"head": 3}, alpha_pattern={"^q": 5}
    ),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["q", "head"]),
    "lokr, whole": lambda: peft.LoKrConfig(r=8, target_modules=["q", "head", "c1", "c2"]),
    "lokr, both": lambda: peft.LoKrConfig(
        r=1, target_modules=["q", "head"], decompose_both=True, decompose_factor=4
    ),
    "lokr, flat kernels": lambda: peft.LoKrConfig(
        r=1, target_modules=["c1", "c2", "q"], rank_dropout_scale=True
    ),
    "lokr, tucker": lambda: peft.LoKrConfig(
        r=2, target_modules=["c1", "c2"], use_effective_conv2d=True
    ),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=["q", "gpt"]),
    "vera, drawn": lambda: peft.VeraConfig(
        r=5, target_modules=["q", "gpt", "head"], save_projection=False, bias="vera_only"
    ),
    "vera, more than the weight has": lambda: peft.VeraConfig(
        r=20, target_modules=["q", "head"], modules_to_save=["norm"]
    ),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}
#: parts of the names of what trains
TRAINED = ("lora_", "hada_", "lokr_", "vera_lambda", "ln_tuning", "modules_to_save")
every = pytest.mark.parametrize("case", CONFIGS)


def net(dtype=torch.float32):
    torch.manual_seed(3)
    return Net().eval().to(dtype)


def theirs(config, path, dtype=torch.float32):
    """A model of PEFT's with noise in all that trains, and its folder."""
    model = peft.get_peft_model(net(dtype), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in TRAINED) and "ranknum" not in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias") and parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(path)
    return model


@every
def test_a_folder_computes_what_peft_computes(tmp_path, case):
    expected = theirs(CONFIGS[case](), tmp_path / "adapter")(X)
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").eval()(X)
    assert error(again, expected) < 1e-6
    model = net()
    handle = veneer.load(model, tmp_path / "adapter")
    assert error(model(X), expected) < 1e-5
    assert error(net()(X), expected) > 1e-3
    handle.merge()
    assert error(model(X), expected) < 1e-5


@every
def test_it_trains_on_and_is_saved_whole(tmp_path, case):
    """What is trained on is the variant (LoHa's four factors, VeRA's two vectors, …) on PEFT's own
    start."""
    expected = theirs(CONFIGS[case](), tmp_path / "adapter")(X)
    model = net()
    handle = veneer.load(model, tmp_path / "adapter", trainable=True)
    assert handle.config.variant == case.split(",")[0].split()[0].replace("ln_tuning", "lora")
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.01)
    before = F.mse_loss(model(X), torch.zeros(()).expand(2, 9, 3))
    before.backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    optimizer.step()
    after = model(X)
    assert F.mse_loss(after, torch.zeros(()).expand(2, 9, 3)) < before
    ours = handle.save(tmp_path / "ours")
    again = net()
    veneer.load(again, ours)
    assert error(again(X), after) < 1e-6
    assert error(after, expected) > 1e-5
    if "c2" not in handle.layers:  # with a dilation, which PEFT's plain LoRA leaves out
        assert error(peft.PeftModel.from_pretrained(net(), ours).eval()(X), after) < 1e-5


def test_dropouts_of_pefts_training_are_not_applied(tmp_path):
    config = peft.LoHaConfig(r=2, target_modules=["q"], rank_dropout=0.9, module_dropout=0.9)
    expected = theirs(config, tmp_path / "adapter")(X)
    model = net()
    veneer.load(model, tmp_path / "adapter", trainable=True)
    for _ in range(5):
        assert error(model.train()(X), expected) < 1e-5


@every
def test_convert_to_peft_writes_plain_lora(tmp_path, case):
    expected = theirs(CONFIGS[case](), tmp_path / "adapter")(X)
    if "c2" in (CONFIGS[case]().target_modules or ()):
        with pytest.raises(AdapterError, match="PEFT leaves out dilation"):
            convert(tmp_path / "adapter", tmp_path / "plain", to="peft", base=net())
        return
    done = conversion(tmp_path / "adapter", tmp_path / "plain", to="peft", base=net())
    assert done.source == f"peft ({CONFIGS[case]().peft_type.value})"
    assert (
        error(peft.PeftModel.from_pretrained(net(), tmp_path / "plain").eval()(X), expected) < 1e-5
    )
    model = net()
    assert veneer.load(model, tmp_path / "plain").config.variant == "lora"
    assert error(model(X), expected) < 1e-5


@pytest.mark.parametrize(
    ("case", "to"),
    [
        ("adalora", "veneer"),
        ("adalora", "dense"),
        ("lokr, tucker", "dense"),
        ("vera, drawn", "veneer"),
        ("lokr, tucker", "veneer"),
        ("loha", "kohya"),
    ],
)
def test_other_formats_take_them_too(tmp_path, case, to):
    expected = theirs(CONFIGS[case](), tmp_path / "adapter")(X)
    out = tmp_path / ("out" if to == "veneer" else "out.safetensors")
    part = {"part": "unet"} if to == "kohya" else {}
    convert(tmp_path / "adapter", out, to=to, base=net(), **part)
    if to != "veneer":
        out = convert(out, tmp_path / "back", to="veneer", base=net(), **part)
    handle = veneer.load(model := net(), out)
    assert error(model(X), expected) < 1e-5
    assert to != "veneer" or handle.config.variant == case.split(",")[0]


def test_without_its_base_a_loha_is_converted_and_composed(tmp_path):
    model = theirs(CONFIGS["loha"](), tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "plain", to="peft")
    plain = veneer.adapter_files.read(tmp_path / "plain")
    # the square of the rank, at most what the weight has
    assert sorted(low.rank for low in plain.products.values()) == [3, 4]
    assert (
        error(peft.PeftModel.from_pretrained(net(), tmp_path / "plain").eval()(X), model(X)) < 1e-5
    )
    veneer.compose(
        [tmp_path / "adapter", tmp_path / "plain"], tmp_path / "half", weights=[0.25, 0.75]
    )
    ours = net()
    veneer.load(ours, tmp_path / "half")
    assert error(ours(X), model(X)) < 1e-5


def test_vera_asks_for_the_base_that_tells_its_shapes(tmp_path):
    theirs(CONFIGS["vera"](), tmp_path / "adapter")
    saved = veneer.adapter_files.read(tmp_path / "adapter")
    assert saved.tuner is not None
    assert saved.tuner.paths == ("gpt", "q")
    assert saved.parameters == 10 + 12 + 2 * 5
    for use in (
        lambda: saved.products,
        lambda: len(saved.low),
        lambda: convert(tmp_path / "adapter", tmp_path / "out", to="peft"),
        lambda: veneer.compose([tmp_path / "adapter"] * 2, tmp_path / "out"),
    ):
        with pytest.raises(AdapterError, match="how many inputs each layer has"):
            use()
    assert not (tmp_path / "out").exists()
    report = verify(tmp_path / "adapter")
    assert report.ok
    assert any("only the base tells" in str(finding) for finding in report.findings)
    assert verify(tmp_path / "adapter", net()).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drawn_projections_are_rounded_as_peft_rounds_them(tmp_path, dtype):
    model = theirs(CONFIGS["vera, drawn"](), tmp_path / "adapter", dtype)
    veneer.load(ours := net(dtype), tmp_path / "adapter")
    low = next(iter(ours.q.veneer.children())).low.weight.adapter_parameters
    assert torch.equal(low["A"][0], model.base_model.vera_A["default"][:, :14].float())
    assert torch.equal(low["B"][0], model.base_model.vera_B["default"][:12].float())


def test_pruned_triplets_stay_away(tmp_path):
    """PEFT cuts its tensors to the ranks that its allocator left, and divides by the rank that was
    there before."""
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=0,
        tfinal=2,
        total_step=5,
        deltaT=1,
        lora_alpha=3,
        target_modules=["q", "head"],
    )
    model = peft.get_peft_model(net(), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.5 * torch.randn_like(parameter)
    for step in range(1, 5):
        (model(X) ** 2).mean().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    kept = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["rank_pattern"]
    assert sorted(map(sum, kept.values())) != [4, 4]
    handle = veneer.load(ours := net(), tmp_path / "adapter", trainable=True)
    assert (
        error(ours(X), peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").eval()(X)) < 1e-5
    )
    assert {at: change.rank for at, change in handle.changes.items()} == {
        f"{at.removesuffix('.lora_E')}.weight": sum(mask) for at, mask in kept.items()
    }


@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_that_lost_every_triplet_changes_nothing(tmp_path, whole):
    """Its tensors may be cut to nothing, or be there beside the mask."""
    theirs(CONFIGS["adalora"](), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    at = "base_model.model.q.lora_"
    for name in () if whole else ("A", "E", "B"):
        tensors[at + name] = tensors[at + name][:, :0] if name == "B" else tensors[at + name][:0]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    change_config(tmp_path / "adapter", rank_pattern={"q.lora_E": [False] * 4})
    handle = veneer.load(net(), tmp_path / "adapter", trainable=True)
    assert handle.changes["q.weight"].resolve(handle.model.q.weight)[0].norm() == 0
    assert handle.changes["gpt.weight"].resolve(handle.model.gpt.weight)[0].norm() > 0


def change_config(path, **fields):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_tensors(path, **changes):
    """Other tensors by the ends of their keys with "__" for a dot; None takes one away."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    for end, make in changes.items():
        (key,) = [key for key in tensors if key.endswith(end.replace("__", "."))]
        tensors |= {key: tensors[key] if make is None else make(tensors[key]).contiguous()}
        if make is None:
            del tensors[key]
    save_file(tensors, file)


BROKEN = {
    "half a change": (
        "loha",
        {"head__hada_w1_a": None},
        {},
        r"no hada_w1_a, hada_w1_b.* at 'head'",
    ),
    "neither form": (
        "lokr",
        {"q__lokr_w1": None},
        {},
        r"no lokr_w1 or lokr_w1_a, lokr_w1_b at 'q'",
    ),
    "a whole layer": (
        "vera",
        {"q__vera_lambda_b": None, "q__vera_lambda_d": None},
        {},
        r"no tensors for q",
    ),
    "no projections": (
        "vera",
        {"vera_A": None},
        {},
        r"no base_model.vera_A, and save_projection=True",
    ),
    "nothing to draw from": (
        "vera",
        {"vera_A": None, "vera_B": None},
        {"save_projection": False, "projection_prng_key": None},
        r"no projection_prng_key",
    ),
    "small projections": (
        "vera",
        {"vera_A": lambda A: A[:, :3]},
        {},
        r"projections \(5, 3\).*at least 14 inputs",
    ),
    "another rank": ("loha", {}, {"r": 3}, r"rank 2 and 2, and 3 in its config"),
    "ranks that are cut otherwise": (
        "adalora",
        {},
        {"rank_pattern": {"q.lora_E": [True, False]}},
        r"rank 4",
    ),
    "shapes that do not meet": (
        "loha",
        {"q__hada_w2_b": lambda w: w[:, :5]},
        {},
        r"a change of LOHA",
    ),
    "another base": ("lokr", {"q__lokr_w1": lambda w: w[:1]}, {}, r"those of a linear layer"),
    "a field of another type": (
        "vera",
        {},
        {"projection_prng_key": "7"},
        r"projection_prng_key='7'",
    ),
    "masks that are none": ("adalora", {}, {"rank_pattern": {"q.lora_E": 3}}, r"rank_pattern="),
    "a field that nobody knows": ("lokr", {}, {"unknown": True}, r"unknown=True"),
    "numbers that are not finite": ("loha", {"q__hada_w1_a": lambda w: w / 0}, {}, r"not finite"),
    "parameters": (
        "adalora",
        {},
        {"target_parameters": ["q.weight"]},
        r"target_parameters in .* of ADALORA",
    ),
    "a norm": (
        "ln_tuning",
        {"norm__ln_tuning_layers__bias": None, "norm__ln_tuning_layers__weight": None},
        {},
        r"no tensors for norm",
    ),
    "a layer that is not there": (
        "loha",
        {},
        {"target_modules": ["q", "head", "norm"]},
        r"no tensors for norm",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_not_whole_is_refused_with_a_reason(tmp_path, broken):
    case, tensors, config, reason = BROKEN[broken]
    theirs(CONFIGS[case](), tmp_path / "adapter")
    change_tensors(tmp_path / "adapter", **tensors)
    change_config(tmp_path / "adapter", **config)
    model = net()
    with pytest.raises(AdapterError, match=reason):
        veneer.load(model, tmp_path / "adapter")
    assert not hasattr(model.q, "veneer")


def test_a_small_file_cannot_ask_for_all_memory(tmp_path):
    theirs(CONFIGS["lokr, whole"](), tmp_path / "adapter")
    big = {
        "head__lokr_w1": lambda w: torch.ones(2048, 2048),
        "head__lokr_w2": lambda w: torch.ones(64, 64),
    }
    change_tensors(tmp_path / "adapter", **big)
    with pytest.raises(AdapterError, match="factors of at most"):
        veneer.load(net(), tmp_path / "adapter")


@pytest.mark.parametrize("case", ["loha, flat kernels", "adalora"])
def test_what_peft_computes_otherwise_is_refused(tmp_path, case):
    def odd(**fields):
        model = net()
        model.c2 = nn.Conv2d(2, 14, (3, 5), stride=2, dilation=2, padding=4, **fields)
        return model

    model = peft.get_peft_model(odd(padding_mode="circular"), CONFIGS[case]())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="PEFT leaves out padding_mode"):
        veneer.load(odd(padding_mode="circular"), tmp_path / "adapter")
    model = peft.get_peft_model(odd(groups=2), CONFIGS[case]())
    model.save_pretrained(tmp_path / "grouped")
    with pytest.raises(AdapterError, match="one product for all 2 groups"):
        veneer.load(odd(groups=2), tmp_path / "grouped")


@pytest.mark.parametrize("fields", [{"layer_replication": [[0, 1], [0, 1]]}])
def test_what_changes_more_than_weights_is_refused(tmp_path, fields):
    peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q"])).save_pretrained(
        tmp_path / "adapter"
    )
    change_config(tmp_path / "adapter", **fields)
    with pytest.raises(
        AdapterError, match=f"{next(iter(fields))}=.*a field that Veneer can honour"
    ):
        veneer.load(net(), tmp_path / "adapter")


@pytest.mark.parametrize(
    "type_",
    sorted({kind.value for kind in peft.PeftType} - TUNERS.keys() - {"LORA", "TRAINABLE_TOKENS"}),
)
def test_other_tuners_are_refused_by_name(tmp_path, type_):
    theirs(CONFIGS["loha"](), tmp_path / "adapter")
    change_config(tmp_path / "adapter", peft_type=type_)
    with pytest.raises(
        AdapterError, match=f"peft_type '{type_}'.*Do: save it as LoRA.*veneer extract"
    ):
        veneer.load(net(), tmp_path / "adapter")


#: types that are not read, but that PEFT merges
MERGED_BY_PEFT = {
    "IA3": lambda: peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
    "HIRA": lambda: peft.HiraConfig(target_modules=["q"], r=2),
    "OFT": lambda: peft.OFTConfig(
        target_modules=["q"], r=2, oft_block_size=0, use_cayley_neumann=False
    ),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q"], boft_block_size=2),
    "HRA": lambda: peft.HRAConfig(target_modules=["q"], r=2),
    "FOURIERFT": lambda: peft.FourierFTConfig(target_modules=["q"], n_frequency=10),
    "SHIRA": lambda: peft.ShiraConfig(target_modules=["q"], r=1),
    "WAVEFT": lambda: peft.WaveFTConfig(target_modules=["q"], n_frequency=8),
    "C3A": lambda: peft.C3AConfig(target_modules=["q"], block_size=2),
    "VBLORA": lambda: peft.VBLoRAConfig(target_modules=["q"], vector_length=2, num_vectors=5, r=2),
    "RANDLORA": lambda: peft.RandLoraConfig(target_modules=["q"], r=2, randlora_alpha=1),
}


@pytest.mark.parametrize("type_", MERGED_BY_PEFT)
def test_what_peft_merges_of_a_type_that_is_not_read_becomes_an_adapter(tmp_path, type_):
    model = peft.get_peft_model(net(), MERGED_BY_PEFT[type_]())
    assert type_ not in TUNERS
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    merged = model.merge_and_unload().eval()
    assert error(merged(X), net()(X)) > 1e-4
    veneer.extract(net(), merged, tmp_path / "adapter", energy=1 - 1e-10)
    ours = net()
    (change,) = veneer.load(ours, tmp_path / "adapter").changes.values()
    assert error(ours(X), merged(X)) < 1e-4
    assert type_ != "HRA" or change.rank <= 2


def test_a_bank_mixes_rows_of_several_tuners(tmp_path):
    bank, expected = veneer.Bank(net()), []
    cases = ["adalora", "loha", "lokr", "vera"]
    for case in cases:
        expected.append(theirs(CONFIGS[case](), tmp_path / case)(X[:1]))
        bank.add(tmp_path / case, case)
    with bank.rows(cases):
        y = bank.model(X[:1].expand(4, -1, -1))
    assert error(y, torch.cat(expected)) < 1e-5


def test_every_tuner_that_is_read_is_tested():
    assert {CONFIGS[case]().peft_type.value for case in CONFIGS} == TUNERS.keys()
