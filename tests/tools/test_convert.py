"""Conversions change nothing: what comes back are the same bits, or the same product where a format
has another rule, and libraries of the other side compute the same outputs. What a format cannot
hold, it says."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.support.models import IDS, Stack, TinyLM
from tests.support.real_models import REAL
from tests.support.toys import error, example, flat, randomise
from torch import nn

import veneer
from veneer.adapter_files.folder import read
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, OutputExistsError
from veneer.formats import BaseFacts
from veneer.formats.lycoris import read_factors
from veneer.layers import LAYERS
from veneer.tools.convert import FORMATS, MisreadElsewhere, conversion, convert, detect
from veneer.tools.convert.file_contents import list_changes

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings(
        "ignore::veneer.tools.convert.MisreadElsewhere"
    ),  # asserted where it is meant
]

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
#: what kohya's and diffusers' formats hold: layers by their weight, with one group
PLAIN = ("linear", "conv1d", "conv2d", "conv3d")


def trained(model, path, dtype=None, **config):
    """A saved adapter with changes that are not zero."""
    handle = veneer.attach(
        model,
        veneer.LoraConfig(**{"rank": 2, "targets": "all", "alpha": 3, "dtype": dtype, **config}),
    )
    randomise(handle)
    handle.save(path)
    handle.detach()
    return read(path)


def tensors(path):
    return load_file(path / "adapter_model.safetensors")


def same(one, other):
    """The same tensors, bit by bit, and the same rank, alpha and scale."""
    first, second = tensors(one.path), tensors(other.path)
    assert first.keys() == second.keys()
    assert all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )
    for at, layer in one.low.items():
        found = other.low[at]
        assert (layer.rank, layer.scale) == (found.rank, pytest.approx(found.scale, rel=1e-12))


def there_and_back(first, model, tmp_path, to, **options):
    """The adapter after it was written in another format and read again, on the same base."""
    between = tmp_path / f"between-{to}"
    convert(first.path, between, to=to, base=model, **options)
    assert detect(between) == to
    return read(convert(between, tmp_path / f"back-{to}", to="veneer", base=model))


def outputs(model, path, *args):
    handle = veneer.load(model, path)
    with torch.no_grad():
        found = flat(model(*args))
    handle.detach()
    return found


#: every layer in every format; what the image formats refuse whatever the variant, once
CASES = [
    (kind, number, to, variant)
    for kind, number in EXAMPLES
    for to in ("kohya", "diffusers", "peft")
    for variant in ("lora", "dora")
    if kind in PLAIN or (variant == "lora" and (to == "peft" or number == 0))
]


@pytest.mark.parametrize(("kind", "number", "to", "variant"), CASES)
def test_every_layer_comes_back_bit_by_bit(kind, number, to, variant, tmp_path):
    module, _ = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    first = trained(model, tmp_path / "a", variant=variant, rank=1)
    options = {} if to == "peft" else {"part": "model"}
    grouped = getattr(module, "groups", 1) > 1
    holds = to == "peft" or (kind in PLAIN and not grouped and not first.full)
    if to != "kohya":
        holds &= not str(first.peft_config["peft_type"]).startswith("not for PEFT")
    if not holds:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(AdapterError, match=r"in another way|cannot hold"):
            convert(first.path, tmp_path / "b", to=to, base=model, **options)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return
    same(first, there_and_back(first, model, tmp_path, to, **options))


@pytest.mark.parametrize(
    ("kind", "number", "variant"),
    [(kind, number, variant) for kind, number in EXAMPLES for variant in ("lora", "dora")]
    + [("conv2d", 0, variant) for variant in ("rslora", "loha", "lokr", "pissa", "vera")],
)
def test_every_layer_and_variant_has_a_dense_change(kind, number, variant, tmp_path):
    module, args = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    first = trained(model, tmp_path / "a", variant=variant, rank=1)
    second = there_and_back(first, model, tmp_path, "dense")
    expected = outputs_of(model, module, first.path, args)
    assert error(outputs_of(model, module, second.path, args), expected) < 1e-5
    plain = copy.deepcopy(module)  # and the file is what it says: base + ΔW
    for name, delta in load_file(tmp_path / "between-dense").items():
        path = name.removeprefix("layer.")
        held = plain.get_submodule(path.rpartition(".")[0])
        with torch.no_grad():
            {**held._parameters, **held._buffers}[path.rpartition(".")[2]].add_(delta)
    if kind not in (
        "embedding",
        "embedding_bag",
    ):  # max_norm rewrites the rows of a plain one as it reads them
        assert error(flat(plain(*args)), expected) < 1e-5


def outputs_of(model, module, path, args):
    handle = veneer.load(model, path)
    with torch.no_grad():
        found = flat(module(*args))
    handle.detach()
    return found


# ---------------------------------------------------------------------------------------------- the
# other side


class Picture(nn.Module):
    """What LoRAs of image models are on: linear layers, convolutions and pointwise ones."""

    def __init__(self):
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.mid = nn.Module()
        self.mid.to_q, self.mid.to_out = nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x):
        x = torch.relu(self.point(torch.relu(self.conv(x)))).mean((-2, -1))
        return self.mid.to_out(torch.relu(self.mid.to_q(x)))


X = torch.linspace(-2, 2, 200).sin().reshape(2, 4, 5, 5)


@pytest.fixture(scope="module")
def lycoris():
    found = pytest.importorskip("lycoris")
    found.logging.logger.setLevel("ERROR")
    return found


ALGORITHMS = {
    "lora": {},
    "lora, with a core": {"algo": "lora", "use_tucker": True},
    "lora, DoRA": {"algo": "lora", "dora_wd": True},
    "loha": {},
    "loha, DoRA": {"algo": "loha", "dora_wd": True},
    "lokr": {"factor": 2},
    "lokr, both": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1},
    "lokr, whole": {"algo": "lokr", "full_matrix": True},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_files_of_lycoris_give_its_outputs(name, lycoris, tmp_path):
    torch.manual_seed(0)
    model = Picture()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Picture"]})
    options = {
        "algo": name,
        "linear_dim": 2,
        "linear_alpha": 1.0,
        "conv_dim": 2,
        "conv_alpha": 1.0,
        **ALGORITHMS[name],
    }
    theirs = copy.deepcopy(model)
    network = lycoris.create_lycoris(theirs, 1.0, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        expected = theirs(X)
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "file"
    )
    assert detect(tmp_path / "file") == "kohya"
    back = convert(tmp_path / "file", tmp_path / "a", to="veneer", base=model)
    assert error(expected, model(X)) > 0.05
    assert error(outputs(model, back, X), flat(expected)) < 1e-6


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 4)] * 5),
    st.sampled_from([(), (1, 1), (3, 2)]),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from([None, 1.5]),
)
def test_lokr_of_any_shape_is_its_kronecker_product(sizes, kernel, whole, alpha):
    l, m, k, n, r = sizes  # noqa: E741
    w1, w2 = (
        (torch.randn(l, r), torch.randn(r, m)),
        (torch.randn(k, r), torch.randn(r, n * math.prod(kernel))),
    )
    first, second = (w1[0] @ w1[1]), (w2[0] @ w2[1]).reshape(k, n, *kernel)
    group = {"lokr_w1": first} if whole[0] else {"lokr_w1_a": w1[0], "lokr_w1_b": w1[1]}
    group |= {"lokr_w2": second} if whole[1] else {"lokr_w2_a": w2[0], "lokr_w2_b": w2[1]}
    if alpha is not None:
        group["alpha"] = torch.tensor(alpha)
    A, B, found = read_factors(group, (l * k, m * n, *kernel))
    scale = 1.0 if all(whole) or alpha is None else alpha / r
    left, right = (a.double() @ b.double() for a, b in (w1, w2))
    expected = scale * torch.einsum("lm,knx->lkmnx", left, right.view(k, n, -1)).reshape(l * k, -1)
    largest = scale * math.prod(
        factor.double().norm() for factor in (*w1, *w2)
    )  # of the terms, which may cancel
    assert found / len(A) == pytest.approx(scale)
    assert B.shape[1] == len(A) <= max(1, min(l * k, m * n * math.prod(kernel)))
    assert (found / len(A) * B.double() @ A.double() - expected).norm() < 1e-6 * largest


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "loha", "lokr"])
def test_lycoris_reads_what_is_written(variant, lycoris, tmp_path):
    torch.manual_seed(0)
    model = Picture()
    first = trained(model, tmp_path / "a", variant=variant)
    convert(first.path, tmp_path / "file", to="kohya", part="model", base=model)
    other = copy.deepcopy(model)
    network, _ = lycoris.create_lycoris_from_weights(1.0, None, other, load_file(tmp_path / "file"))
    assert len(network.loras) == 4
    network.apply_to()
    with torch.no_grad():
        found = other(X)
    assert error(flat(found), outputs(model, first.path, X)) < 1e-6


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def denoised(unet):
    x = torch.linspace(-1, 1, 2 * 4 * 64).reshape(2, 4, 8, 8)
    with torch.no_grad():
        return unet(x, 3, torch.linspace(-1, 1, 2 * 3 * 8).reshape(2, 3, 8)).sample


UNET = ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_loads_what_is_written(to, variant, unet, tmp_path):
    if (to, variant) == ("kohya", "dora"):
        pytest.skip("diffusers' converter of kohya files expects DoRA on linear layers alone")
    # of kohya files, diffusers 0.42 loses the alphas of attention where they are not those of all
    # layers
    more = {"ranks": {"to_v": 1}, "alphas": {"to_q": 5}} if to == "diffusers" else {}
    first = trained(unet, tmp_path / "a", targets=UNET, variant=variant, **more)
    convert(first.path, tmp_path / "file.safetensors", to=to, part="unet", base=unet)
    handle = veneer.load(unet, first.path)
    expected = denoised(unet)
    handle.detach()
    assert error(expected, denoised(unet)) > 0.05
    other = copy.deepcopy(unet)
    if to == "diffusers":
        other.load_lora_adapter(tmp_path, weight_name="file.safetensors", prefix="unet")
    else:
        from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

        state, alphas = _convert_non_diffusers_lora_to_diffusers(
            load_file(tmp_path / "file.safetensors")
        )
        other.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    assert error(denoised(other), expected) < 1e-5
    same(
        first, read(convert(tmp_path / "file.safetensors", tmp_path / "b", to="veneer", base=unet))
    )


@pytest.mark.filterwarnings(
    "ignore:The following alpha_pattern keys did not match"
)  # PEFT's, of what diffusers lost
@pytest.mark.parametrize(
    ("config", "lost"),
    [
        ({}, None),
        ({"alphas": {"conv1": 5}, "targets": ["conv1", "proj_in"]}, None),
        ({"targets": ["to_q", "to_v"]}, None),
        ({"ranks": {"to_v": 1}}, None),
        ({"alphas": {"to_q": 5}}, "alphas of attention"),
        ({"variant": "dora"}, "magnitudes of DoRA"),
        ({"variant": "dora", "targets": ["to_q", "to_v"]}, "magnitudes of DoRA"),
    ],
    ids=str,
)
def test_what_diffusers_drops_of_a_kohya_file_is_said_as_it_is_written(
    config, lost, unet, tmp_path
):
    """By the loader of its pipelines; the way out that the warning names is read right."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    first = trained(unet, tmp_path / "a", **{"targets": UNET, **config})
    handle = veneer.load(unet, first.path)
    expected = denoised(unet)
    handle.detach()
    for to in ("kohya", "diffusers"):
        file = f"{to}.safetensors"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            convert(first.path, tmp_path / file, to=to, part="unet", base=unet)
        said = [str(one.message) for one in caught if one.category is MisreadElsewhere]
        state, alphas, about = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(tmp_path), weight_name=file, use_safetensors=True, return_lora_metadata=True
        )
        other = copy.deepcopy(unet)
        other.load_lora_adapter(state, network_alphas=alphas, metadata=about, prefix="unet")
        if to == "kohya" and lost:
            assert error(denoised(other), expected) > 0.02
            assert len(said) == 1
            assert lost in said[0]
            assert 'convert to "diffusers"' in said[0]
        else:
            assert error(denoised(other), expected) < 1e-5
            assert not said


def test_files_of_diffusers_are_read(unet, tmp_path):
    from peft import LoraConfig

    other = copy.deepcopy(unet)
    other.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=UNET, init_lora_weights=False))
    other.save_lora_adapter(tmp_path / "theirs")
    file = next((tmp_path / "theirs").glob("*.safetensors"))
    assert detect(file) == "diffusers"
    back = convert(file, tmp_path / "a", to="veneer", base=unet)
    handle = veneer.load(unet, back)
    found = denoised(unet)
    handle.detach()
    assert error(found, denoised(other)) < 1e-5


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "loha", "vera", "pissa"])
def test_peft_loads_what_is_written(variant, tmp_path):
    import peft

    model = TinyLM()
    first = trained(
        model, tmp_path / "a", targets=["q_proj", "up", "embed_tokens"], variant=variant
    )
    done = conversion(first.path, tmp_path / "b", to="peft")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert read(tmp_path / "b").record is None
    assert any("the record" in reason for reason in done.left_out)
    assert any("the numbers of variant" in reason for reason in done.left_out) == bool(
        first.adapter_parameters
    )
    expected = outputs(model, first.path, IDS)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "b"))
    assert error(flat(theirs(IDS)), expected) < 1e-5


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_folder_of_peft_becomes_one_that_proves_its_base(tmp_path):
    import peft

    model = TinyLM()
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert detect(tmp_path / "theirs") == "peft"
    convert(tmp_path / "theirs", tmp_path / "ours", to="veneer", base=model)
    assert detect(tmp_path / "ours") == "veneer"
    assert read(tmp_path / "ours").metadata["provenance"]["converted from"] == "peft"
    assert error(outputs(model, tmp_path / "ours", IDS), flat(theirs(IDS))) < 1e-5
    with pytest.raises(BaseMismatchError):
        veneer.load(TinyLM(), tmp_path / "ours")


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Flip(nn.Linear):
    def forward(self, input):
        return super().forward(input).flip(-1)


class Same(nn.Linear):
    def forward(self, input):
        return input @ self.weight.mT + self.bias


def by_peft(model, folder):
    import peft

    config = peft.LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("to", ["kohya", "dense"])
def test_what_peft_applies_in_another_way_is_no_change_of_a_weight(to, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2))
    by_peft(model, tmp_path / "theirs")
    part = {"part": "model"} if to == "kohya" else {}
    with pytest.raises(AdapterError, match="PEFT leaves out dilation"):
        convert(tmp_path / "theirs", tmp_path / "b", to=to, base=model, **part)
    with pytest.warns(
        veneer.UnverifiedAdapter, match="Nobody checked .* a dilation.* Give the model as base"
    ):
        convert(tmp_path / "theirs", tmp_path / "b", to=to, **part)  # without it nobody can tell


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_of_its_own_is_compared_also_without_weights(device, tmp_path):
    for layer in (Twice, Flip, Same):
        by_peft(nn.Sequential(layer(4, 5)), tmp_path / layer.__name__)
    with torch.device(device):
        bases = {layer.__name__: nn.Sequential(layer(4, 5)) for layer in (Twice, Flip, Same)}
    for name in ("Twice", "Flip"):
        with pytest.raises(AdapterError, match=f"{name} has a forward of its own"):
            convert(tmp_path / name, tmp_path / "b", to="kohya", base=bases[name], part="model")
    convert(tmp_path / "Same", tmp_path / "b", to="kohya", base=bases["Same"], part="model")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_base_may_keep_more_than_tensors_in_its_state(tmp_path):
    class Told(nn.Sequential):
        def get_extra_state(self):
            return {"no": "tensor"}

    by_peft(nn.Sequential(nn.Linear(4, 5)), tmp_path / "theirs")
    convert(
        tmp_path / "theirs", tmp_path / "b", to="kohya", base=Told(nn.Linear(4, 5)), part="model"
    )


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_what_a_module_gives_stays_that_beside_its_base(tmp_path):
    """Mamba reads ``x_proj.weight`` itself too, where PEFT changes what the module gives: a folder
    of ours says so."""
    import peft

    model = REAL["mamba"].build()[0]
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=1, target_modules=["x_proj"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "theirs")
    for base in (tmp_path / "base", model):
        convert(tmp_path / "theirs", tmp_path / "b", to="veneer", base=base, overwrite=True)
        assert any(
            said.get("module_only") for said in read(tmp_path / "b").metadata["changes"].values()
        )
        with pytest.raises(AdapterError):
            convert(tmp_path / "theirs", tmp_path / "dense", to="dense", base=base)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_base_in_a_folder_tells_what_reads_its_weights_past_their_modules(tmp_path):
    import peft
    import transformers

    sizes = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    attention = {
        "intermediate_size": 24,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    }
    model = transformers.DebertaForMaskedLM(transformers.DebertaConfig(**sizes, **attention))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=1, target_modules=["in_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"in_proj.* reads the weight itself, past the module"):
        convert(
            tmp_path / "theirs", tmp_path / "b", to="kohya", base=tmp_path / "base", part="model"
        )
    assert not (tmp_path / "b").exists()


# ----------------------------------------------------------------------------------------------
# whole models


@pytest.mark.parametrize("model", [lambda: TinyLM(tied=True), Stack], ids=["tied", "stack"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_model_with_parts_trained_in_full_as_dense_changes(model, variant, tmp_path):
    base = model().eval()
    also = "norm" if isinstance(base, TinyLM) else "head"
    config = {
        "train_also": (f"re:.*{also}",),
        "exclude": (f"re:.*{also}",),
        "bias": "targets",
        "variant": variant,
    }
    first = trained(base, tmp_path / "a", **config)
    expected, before = outputs(base, first.path, IDS), flat(base(IDS))
    second = there_and_back(first, base, tmp_path, "dense")
    assert error(outputs(base, second.path, IDS), expected) < 1e-5
    assert error(flat(base(IDS)), before) < 1e-6  # the base is as it was
    assert read(second.path).full.keys() == first.full.keys()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "conv1d_transformers"])
def test_a_dense_change_needs_no_base_where_the_file_tells_it(kind, tmp_path):
    import transformers.pytorch_utils  # noqa: F401 (its Conv1D is a kind of layer once it is imported)

    model = nn.ModuleDict({"layer": example(kind)[0]})
    first = trained(model, tmp_path / "a")
    convert(first.path, tmp_path / "with", to="dense", base=model)
    convert(first.path, tmp_path / "without", to="dense")
    one, other = load_file(tmp_path / "with"), load_file(tmp_path / "without")
    assert one.keys() == other.keys()
    assert all(error(other[key], one[key]) < 1e-6 for key in one)
    assert one["layer.weight"].shape == model["layer"].weight.shape


@pytest.mark.parametrize(
    ("beside", "target"),
    [(nn.Linear(7, 5), "second"), (nn.MultiheadAttention(6, 2), "second.in_proj_weight")],
    ids=["linear", "attention"],
)
def test_a_dense_change_lies_as_the_weight_of_its_own_layer(beside, target, tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"first": Conv1D(5, 7), "second": beside})
    first = trained(model, tmp_path / "a", targets=["first", target])
    convert(first.path, tmp_path / "with", to="dense", base=model)
    convert(first.path, tmp_path / "without", to="dense")
    one, other = load_file(tmp_path / "with"), load_file(tmp_path / "without")
    assert one.keys() == other.keys()
    assert all(error(other[key], one[key]) < 1e-6 for key in one)


@pytest.mark.filterwarnings("ignore:Nobody checked what PEFT makes")
def test_where_a_flag_alone_tells_of_transposed_weights_the_base_decides(tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"first": Conv1D(5, 7), "second": nn.Linear(7, 5)})
    first = trained(model, tmp_path / "a")
    plain = read(convert(first.path, tmp_path / "plain", to="peft"))
    assert plain.peft_config["fan_in_fan_out"]
    with pytest.raises(AdapterError, match=r"'second.weight', which may be stored transposed"):
        convert(plain.path, tmp_path / "b", to="dense")
    assert not (tmp_path / "b").exists()
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    kinds = {change.weight: change.kind for change in list_changes(plain, BaseFacts(shapes))}
    assert kinds == {"first.weight": "Conv1D", "second.weight": "linear"}


@pytest.mark.parametrize(
    "config", [{"variant": "dora"}, {"train_also": ("head",), "targets": ["embed"]}]
)
def test_a_dense_change_that_depends_on_the_base_asks_for_it(config, tmp_path):
    first = trained(Stack(), tmp_path / "a", **{"targets": ["conv", "head"], **config})
    with pytest.raises(AdapterError, match="the base beside it"):
        convert(first.path, tmp_path / "b", to="dense")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("choice", "rank"), [({}, 4), ({"rank": 2}, 2), ({"energy": 0.5}, None), ({"energy": 1.0}, 8)]
)
def test_the_rank_of_a_product_is_chosen_and_its_error_told(choice, rank, tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(8, 9, bias=False)})
    first = trained(model, tmp_path / "a", rank=4)
    convert(first.path, tmp_path / "b", to="dense", base=model)
    done = conversion(tmp_path / "b", tmp_path / "c", to="veneer", base=model, **choice)
    delta = load_file(tmp_path / "b")["layer.weight"].double()
    found = read(tmp_path / "c").layers["layer"]
    S = torch.linalg.svdvals(delta)
    if rank is None:
        rank = int((S.square().cumsum(0) < 0.5 * S.square().sum()).sum()) + 1
    assert found.rank == done.ranks["layer.weight"] == rank
    off = S[rank:].norm() / S.norm()
    assert done.errors["layer.weight"] == pytest.approx(off.item(), abs=1e-6)
    assert error(found.delta(torch.float64)[0], delta) == pytest.approx(off.item(), abs=1e-6)


def test_dense_changes_can_stay_whole(tmp_path):
    model = TinyLM()
    first = trained(model, tmp_path / "a", targets=["q_proj"])
    convert(first.path, tmp_path / "b", to="dense", base=model)
    done = conversion(tmp_path / "b", tmp_path / "c", to="veneer", base=model, whole=True)
    assert not done.ranks
    assert len(done.full) == 2
    assert error(outputs(model, tmp_path / "c", IDS), outputs(model, first.path, IDS)) < 1e-5


def test_a_dense_file_knows_its_base(tmp_path):
    model = TinyLM()
    convert(trained(model, tmp_path / "a").path, tmp_path / "b", to="dense", base=model)
    with pytest.raises(BaseMismatchError, match="other weights"):
        convert(tmp_path / "b", tmp_path / "c", to="veneer", base=TinyLM())
    convert(tmp_path / "b", tmp_path / "c", to="veneer", base=TinyLM(), verify_base=False)


# ----------------------------------------------------------------------------------------------
# scales and types


@pytest.mark.parametrize("alpha", [1, 3, 0.1, 1 / 3])
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_alpha_is_kept_exactly(to, alpha, tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    first = trained(model, tmp_path / "a", alpha=alpha, alphas={"b": 7}, ranks={"b": 3})
    second = there_and_back(first, model, tmp_path, to, part="model")
    same(first, second)
    assert {at: layer.alpha for at, layer in second.low.items()} == {
        at: layer.alpha for at, layer in first.low.items()
    }


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_layer_that_is_switched_off_stays_so_in_a_kohya_file(tmp_path):
    """PEFT allows alpha 0, and readers of kohya's files take it for a file without alpha."""
    import peft

    model = nn.ModuleDict({"to_q": nn.Linear(6, 6), "to_k": nn.Linear(6, 6)})
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 0}, init_lora_weights=False
    )
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "file", to="kohya", part="unet", base=model)
    convert(tmp_path / "file", tmp_path / "b", to="veneer", part="unet", base=model)
    norms = {path: layer.delta().norm() for path, layer in read(tmp_path / "b").layers.items()}
    assert norms["to_q"] > 0
    assert norms["to_k"] == 0


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_alphas_of_others_mean_what_they_mean_there(to, tmp_path):
    """None and 0 (to sd-scripts) are the rank; a slider's may be negative."""
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    names = {
        "kohya": ("lora_unet_mid_to_q", "lora_down.weight", "lora_up.weight"),
        "diffusers": ("mid.to_q", "lora_A.weight", "lora_B.weight"),
    }
    at, A, B = names[to]
    for alpha, scale in (
        (None, 1),
        (4.0, 2),
        (-3.0, -1.5),
        *(((0.0, 1),) if to == "kohya" else ()),
    ):
        more = {} if alpha is None else {f"{at}.alpha": torch.tensor(alpha)}
        save_file({f"{at}.{A}": down, f"{at}.{B}": up, **more}, tmp_path / "file")
        convert(tmp_path / "file", tmp_path / "a", to="veneer", base=Picture(), overwrite=True)
        assert error(read(tmp_path / "a").layers["mid.to_q"].delta()[0], scale * up @ down) < 1e-6


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_child_called_model_is_no_part_of_a_pipeline(to, tmp_path):
    """As language models have: the part "model" is the base itself."""
    model = nn.ModuleDict({"model": nn.ModuleDict({"a": nn.Linear(6, 6)}), "head": nn.Linear(6, 6)})
    first = trained(model, tmp_path / "a")
    same(first, there_and_back(first, model, tmp_path, to, part="model"))


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_rslora_becomes_an_alpha(to, tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    first = trained(model, tmp_path / "a", variant="rslora", ranks={"b": 3})
    second = there_and_back(first, model, tmp_path, to, part="model")
    assert second.config.variant == "lora"
    for at, low in first.layers.items():
        assert torch.equal(second.layers[at].A, low.A)
        assert error(second.layers[at].delta(torch.float64), low.delta(torch.float64)) < 1e-12


@pytest.mark.parametrize(("dtype", "type_"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "dense"])
def test_numbers_are_rounded_once_to_the_type_that_is_asked_for(to, dtype, type_, tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(6, 6)})
    first = trained(model, tmp_path / "a")
    options = {"part": "model"} if to in ("kohya", "diffusers") else {}
    out = convert(first.path, tmp_path / "b", to=to, base=model, dtype=dtype, **options)
    held = load_file(out / "adapter_model.safetensors" if out.is_dir() else out)
    convert(first.path, tmp_path / "c", to=to, base=model, **options)
    exact = load_file(
        tmp_path / "c" / "adapter_model.safetensors" if out.is_dir() else tmp_path / "c"
    )
    for key, tensor in exact.items():
        assert torch.equal(held[key], tensor if tensor.dim() == 0 else tensor.to(type_)), key


def test_a_type_that_cannot_hold_the_numbers_is_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(6, 6)})
    first = trained(model, tmp_path / "a")
    handle = veneer.load(model, first.path, trainable=True)
    next(iter(handle.changes.values())).A.data.mul_(1e6)
    handle.save(tmp_path / "large")
    with pytest.raises(AdapterError, match="cannot hold"):
        convert(tmp_path / "large", tmp_path / "b", to="kohya", part="model", dtype="fp16")
    assert not (tmp_path / "b").exists()


# ----------------------------------------------------------------------------------------------
# kohya's names


class Pipeline(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = Picture()
        self.text_encoder = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        self.text_encoder_2 = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})


def test_several_models_are_one_file(tmp_path):
    model = Pipeline()
    first = trained(model, tmp_path / "a")
    for to in ("kohya", "diffusers"):
        same(first, there_and_back(first, model, tmp_path, to))
    keys = {key.partition(".")[0] for key in load_file(tmp_path / "between-kohya")}
    assert {"lora_unet_mid_to_q", "lora_te1_q_proj", "lora_te2_q_proj"} <= keys
    for to in ("kohya", "diffusers"):
        with pytest.raises(AdapterError, match=r"unet \(4 layers\), text_encoder \(1 layers\)"):
            convert(tmp_path / f"between-{to}", tmp_path / "b", to="veneer", base=model.unet)
        done = conversion(
            tmp_path / f"between-{to}", tmp_path / to, to="veneer", base=model.unet, part="unet"
        )
        assert len(done.ranks) == 4
        assert [reason.partition(":")[0] for reason in done.left_out] == [
            "1 layers of text_encoder",
            "1 layers of text_encoder_2",
        ]


def test_the_first_of_two_text_encoders_is_te1_where_it_alone_changed(tmp_path):
    model = Pipeline()
    first = trained(model, tmp_path / "a", targets=["text_encoder.q_proj"])
    same(first, there_and_back(first, model, tmp_path, "kohya"))
    keys = {key.partition(".")[0] for key in load_file(tmp_path / "between-kohya")}
    assert keys == {"lora_te1_q_proj"}


def test_a_name_must_mean_one_module(tmp_path):
    class ModelIndex(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.a_b = nn.Module(), nn.Linear(4, 4)
            self.a.b = nn.Linear(4, 4)

    pair = {"lora_down.weight": torch.ones(1, 4), "lora_up.weight": torch.ones(4, 1)}
    save_file({f"lora_unet_a_b.{key}": value for key, value in pair.items()}, tmp_path / "a")
    with pytest.raises(AdapterError, match=r"which may mean a\.b, a_b"):
        convert(tmp_path / "a", tmp_path / "b", to="veneer", base=ModelIndex())
    save_file(
        {f"lora_unet_input_blocks_1.{key}": value for key, value in pair.items()}, tmp_path / "c"
    )
    with pytest.raises(AdapterError, match="block names of the model as first published"):
        convert(tmp_path / "c", tmp_path / "b", to="veneer", base=ModelIndex())
    with pytest.raises(AdapterError, match="names that differ"):
        convert(trained(ModelIndex(), tmp_path / "d").path, tmp_path / "b", to="kohya", part="unet")
    with pytest.raises(AdapterError, match="a base to tell"):
        convert(tmp_path / "a", tmp_path / "b", to="peft")
    with pytest.raises(AdapterError, match="give part"):
        convert(tmp_path / "d", tmp_path / "b", to="kohya")


def test_the_header_is_what_kohyas_tools_read_and_is_kept(tmp_path):
    from safetensors import safe_open

    model = Picture()
    first = trained(model, tmp_path / "a", alpha=3)
    convert(first.path, tmp_path / "b", to="kohya", part="unet")
    with safe_open(tmp_path / "b", "pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == "2"
    assert header["ss_network_alpha"] == "3"
    assert header["ss_network_module"] == "networks.lora"
    save_file(
        load_file(tmp_path / "b"),
        tmp_path / "c",
        metadata={**header, "ss_base_model_version": "sd_v1"},
    )
    convert(tmp_path / "c", tmp_path / "d", to="veneer", base=model)
    assert read(tmp_path / "d").metadata["provenance"]["header"]["ss_base_model_version"] == "sd_v1"
    convert(tmp_path / "d", tmp_path / "e", to="kohya", part="unet")
    with safe_open(tmp_path / "e", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"


@pytest.mark.parametrize(
    "provenance",
    [
        {"converted from": "dense", "header": {"veneer_dense": "{}"}},
        {"converted from": "diffusers", "header": {"lora_adapter_metadata": "{}"}},
        {"header": {"ss_base_model_version": "sd_v1"}},
        {"header": "a text"},
        {"converted from": "kohya", "header": "a text"},
    ],
    ids=str,
)
def test_the_header_of_another_format_is_not_copied(tmp_path, provenance):
    """Readers would take the file for one of that format."""
    from safetensors import safe_open

    handle = veneer.attach(Picture(), veneer.LoraConfig(rank=2, targets="all"))
    handle.save(tmp_path / "a", provenance=provenance)
    convert(tmp_path / "a", tmp_path / "b", to="kohya", part="unet")
    assert detect(tmp_path / "b") == "kohya"
    with safe_open(tmp_path / "b", "pt") as file:
        header = file.metadata()
    assert {key for key in header if not key.startswith("ss_")} == {"format"}
    assert header["ss_base_model_version"] == "unknown"


@pytest.mark.parametrize("base", ["linear", "conv"])
@pytest.mark.parametrize("file", ["linear", "conv"])
def test_a_pointwise_convolution_and_a_linear_layer_are_one(file, base, tmp_path):
    layers = {"linear": nn.Linear(4, 6, bias=False), "conv": nn.Conv2d(4, 6, 1, bias=False)}
    low = {"linear": ((2, 4), (6, 2)), "conv": ((2, 4, 1, 1), (6, 2, 1, 1))}[file]
    A, B = (torch.randn(shape) for shape in low)
    save_file({"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B}, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="veneer", base=nn.ModuleDict({"x": layers[base]}))
    found = read(tmp_path / "b").layers["x"]
    assert torch.equal(found.A.flatten(), A.flatten())
    assert torch.equal(found.B.flatten(), B.flatten())
    assert found.scale == 1  # no alpha means that of the rank


def test_the_folder_of_a_pipeline_is_a_base_for_names(tmp_path):
    model = Pipeline()
    first = trained(model, tmp_path / "a")
    convert(first.path, tmp_path / "file", to="kohya")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (tmp_path / "pipe" / part).mkdir(parents=True)
        save_file(getattr(model, part).state_dict(), tmp_path / "pipe" / part / "model.safetensors")
    convert(tmp_path / "file", tmp_path / "b", to="peft", base=tmp_path / "pipe")
    one, other = tensors(first.path), tensors(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


DOWN, UP = {"lora_down.weight": torch.ones(2, 8)}, {"lora_up.weight": torch.ones(8, 2)}
BAD_KOHYA = {
    "half a pair": (DOWN, "all factors"),
    "another shape": ({**DOWN, "lora_up.weight": torch.ones(5, 2)}, r"those of a weight \(8, 8\)"),
    "another rank": ({**DOWN, "lora_up.weight": torch.ones(8, 3)}, "those of a weight"),
    "unknown keys": ({**DOWN, **UP, "oft_blocks": torch.ones(2)}, "oft_blocks"),
    "a Tucker core": (
        {f"hada_{name}": torch.ones(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        "a Tucker core",
    ),
    "rescaled inputs": ({**DOWN, **UP, "dora_scale": torch.ones(1, 8)}, "rescales inputs"),
    "not a number": ({**DOWN, "lora_up.weight": torch.full((8, 2), torch.nan)}, "not finite"),
    "half of LoKr": ({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 1)}, "all factors"),
}


@pytest.mark.parametrize(("held", "message"), BAD_KOHYA.values(), ids=BAD_KOHYA.keys())
def test_bad_files_of_kohya_are_refused(held, message, tmp_path):
    save_file({f"lora_unet_mid_to_q.{key}": value for key, value in held.items()}, tmp_path / "a")
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "a", tmp_path / "b", to="veneer", base=Picture())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_all_reasons_are_told_at_once(tmp_path):
    model = Stack()
    first = trained(model, tmp_path / "a", train_also=("head",), exclude=("head",))
    with pytest.raises(AdapterError) as caught:
        convert(first.path, tmp_path / "b", to="kohya", part="unet", base=model)
    for reason in (
        "embed.weight",
        "in_proj_weight",
        "recurrent.weight_ih_l0",
        "'head' trained in full",
    ):
        assert reason in str(caught.value), reason


# ----------------------------------------------------------------------------------------------
# what cannot be read


def test_pickles_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    (tmp_path / "folder").mkdir()
    torch.save({}, tmp_path / "folder" / "adapter_model.bin")
    for name in ("zip.bin", "old.bin", "folder"):
        with pytest.raises(AdapterError, match="a pickle, which runs code"):
            detect(tmp_path / name)


def test_what_nobody_knows_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello there, this is no adapter")
    save_file({"model.layers.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "bare.safetensors")
    (tmp_path / "empty").mkdir()
    cases = {
        "text": "one of",
        "model.safetensors": "keys such as",
        "bare.safetensors": "name the folder",
        "no": "nothing",
    }
    for name, message in {**cases, "empty": "an adapter folder"}.items():
        with pytest.raises(AdapterError, match=message):
            detect(tmp_path / name)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "gguf", "dense"])
def test_a_file_that_is_cut_short_is_refused(to, tmp_path):
    from tests.support.llama_cpp import llama

    model = llama() if to == "gguf" else Picture()
    options = {"part": "unet"} if to in ("kohya", "diffusers") else {}
    targets = ["q_proj", "k_proj"] if to == "gguf" else "all"
    convert(
        trained(model, tmp_path / "a", targets=targets).path,
        tmp_path / "b",
        to=to,
        base=model,
        **options,
    )
    whole = (tmp_path / "b").read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 40, 12, 3, 0):
        (tmp_path / "b").write_bytes(whole[:size])
        with pytest.raises(AdapterError):
            convert(tmp_path / "b", tmp_path / "c", to="veneer", base=model)
        assert not (tmp_path / "c").exists()


def test_choices_that_mean_nothing_are_refused(tmp_path):
    model = Picture()
    first = trained(model, tmp_path / "a")
    with pytest.raises(ConfigError, match="format 'onnx'"):
        convert(first.path, tmp_path / "b", to="onnx")
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        convert(first.path, tmp_path / "b", to="kohya", dtype="int8")
    with pytest.raises(ConfigError, match="for dense changes alone"):
        convert(first.path, tmp_path / "b", to="kohya", rank=2)
    with pytest.raises(AdapterError, match="already"):
        convert(first.path, tmp_path / "b", to="veneer", base=model)
    convert(first.path, tmp_path / "b", to="peft")
    with pytest.raises(AdapterError, match="no base"):
        convert(tmp_path / "b", tmp_path / "c", to="veneer")
    with pytest.raises(AdapterError, match="meta device"):
        convert(tmp_path / "b", tmp_path / "c", to="veneer", base=copy.deepcopy(model).to("meta"))
    convert(first.path, tmp_path / "d", to="dense")
    for choice in ({"rank": 0}, {"energy": 1.5}, {"rank": 2, "whole": True}):
        with pytest.raises(AdapterError):
            convert(tmp_path / "d", tmp_path / "e", to="veneer", base=model, **choice)


def test_nothing_is_replaced_unasked(tmp_path):
    first = trained(Picture(), tmp_path / "a")
    (tmp_path / "b").write_text("mine")
    for to, part in (("peft", None), ("kohya", "unet")):
        with pytest.raises(OutputExistsError):
            convert(first.path, tmp_path / "b", to=to, part=part)
    convert(first.path, tmp_path / "b", to="kohya", part="unet", overwrite=True)
    assert detect(tmp_path / "b") == "kohya"
    with pytest.raises(OutputExistsError):
        convert(first.path, tmp_path / "a", to="kohya", part="unet", overwrite=True)  # a folder
    assert read(first.path)


def test_a_model_with_an_adapter_keeps_it(tmp_path):
    model = Picture()
    first = trained(model, tmp_path / "a")
    convert(first.path, tmp_path / "b", to="peft")
    handle = veneer.attach(model, veneer.LoraConfig(rank=1, targets="all"), "mine")
    randomise(handle)
    before = model(X)
    convert(tmp_path / "b", tmp_path / "c", to="veneer", base=model)
    assert torch.equal(model(X), before)


def test_a_new_format_is_one_registration(tmp_path):
    from dataclasses import replace

    def write(adapter, path, base, options):
        path.write_text(json.dumps(sorted(entry.weight for entry in adapter.changes)))
        return []

    new = replace(
        FORMATS["kohya"],
        name="toy",
        recognises=lambda start, keys, header: start[:1] == b"[",
        write=write,
    )
    FORMATS.add("toy", new)
    try:
        convert(trained(Picture(), tmp_path / "a").path, tmp_path / "b", to="toy")
        assert detect(tmp_path / "b") == "toy"
        assert json.loads((tmp_path / "b").read_text())[0] == "conv.weight"
    finally:
        FORMATS.remove("toy")


def test_every_format_says_what_it_is():
    for format_ in FORMATS:
        assert format_.title
        assert format_.lacks


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"to": "peft", "part": "unet"}, "a part, from veneer to peft.*kohya"),
        ({"to": "dense", "part": "unet"}, "a part, from veneer to dense"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, match, tmp_path):
    model = TinyLM()
    first = trained(model, tmp_path / "a", targets=["q_proj"])
    with pytest.raises(ConfigError, match=match):
        convert(first.path, tmp_path / "out", base=model, **options)
    plain = convert(first.path, tmp_path / "plain", to="peft")
    with pytest.raises(ConfigError, match="as they train"):
        convert(plain, tmp_path / "out", to="veneer", base=model, dtype="bf16")
    assert not (tmp_path / "out").exists()
