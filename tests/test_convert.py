"""Conversions change nothing: what comes back are the same bits, or the same product where a format has another rule,
and libraries of the other side compute the same outputs. What a format cannot hold, it says."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from models import IDS, Stack, TinyLM
from toys import error, example, flat, randomise
from veneer.artefact import read
from veneer.convert import FORMATS, conversion, convert, detect
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, OutputExistsError
from veneer.layers import LAYERS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
#: what kohya's and diffusers' formats hold: layers by their weight, with one group
PLAIN = ("linear", "conv1d", "conv2d", "conv3d")


def trained(model, path, dtype=None, **config):
    """A saved adapter with changes that are not zero."""
    handle = veneer.attach(
        model, veneer.LoraConfig(**{"rank": 2, "targets": "all", "alpha": 3, "dtype": dtype, **config})
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
    assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)
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
        with pytest.raises(AdapterError, match="in another way|cannot hold"):
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
    if kind not in ("embedding", "embedding_bag"):  # max_norm rewrites the rows of a plain one as it reads them
        assert error(flat(plain(*args)), expected) < 1e-5


def outputs_of(model, module, path, args):
    handle = veneer.load(model, path)
    with torch.no_grad():
        found = flat(module(*args))
    handle.detach()
    return found


# ---------------------------------------------------------------------------------------------- the other side


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
    options = {"algo": name, "linear_dim": 2, "linear_alpha": 1.0, "conv_dim": 2, "conv_alpha": 1.0, **ALGORITHMS[name]}
    theirs = copy.deepcopy(model)
    network = lycoris.create_lycoris(theirs, 1.0, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        expected = theirs(X)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "file")
    assert detect(tmp_path / "file") == "kohya"
    back = convert(tmp_path / "file", tmp_path / "a", to="veneer", base=model)
    assert error(expected, model(X)) > 0.05
    assert error(outputs(model, back, X), flat(expected)) < 1e-6


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
    # of kohya files, diffusers 0.42 loses the alphas of attention where they are not those of all layers
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

        state, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(tmp_path / "file.safetensors"))
        other.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    assert error(denoised(other), expected) < 1e-5
    same(first, read(convert(tmp_path / "file.safetensors", tmp_path / "b", to="veneer", base=unet)))


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
