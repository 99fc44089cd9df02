"""One file with the UNet and the text encoder of an image pipeline, as kohya and diffusers write
it: both at once, by the names that real files have, and what diffusers' own loader makes of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from veneer.tools.convert import MisreadElsewhere, convert

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # of libraries: other code paths, special tokens out of range
TARGETS = ["to_q", "to_k", "to_v", "q_proj", "v_proj", "fc1"]


def models():
    """The UNet and the CLIP of a very small Stable Diffusion, under the names that a pipeline has
    for them."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(config)}).eval()


@torch.no_grad()
def answer(both):
    """What the text encoder answers, and what the UNet then does."""
    text = both["text_encoder"](torch.arange(8)[None]).last_hidden_state
    return torch.cat(
        [text.flatten(), both["unet"](torch.ones(1, 4, 8, 8), 3, text).sample.flatten()]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(an adapter folder of both, what the two then answer)."""
    both = models()
    handle = veneer.attach(both, veneer.LoraConfig(rank=2, targets=TARGETS, alpha=3))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    return handle.save(tmp_path_factory.mktemp("both") / "adapter"), answer(both)


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_both_are_written_read_and_loaded_at_once(trained, kind, tmp_path):
    folder, expected = trained
    convert(folder, tmp_path / "file", to=kind)
    start = {
        "kohya": "lora_te_text_model_encoder_layers_0_",
        "diffusers": "text_encoder.encoder.layers.0.",
    }
    assert any(key.startswith(start[kind]) for key in load_file(tmp_path / "file"))
    both = models()
    convert(tmp_path / "file", tmp_path / "back", to="veneer", base=both)
    before = answer(both)
    veneer.load(both, tmp_path / "back")
    assert torch.equal(answer(both), expected)
    with veneer.use(both, None):
        assert torch.equal(answer(both), before)


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_diffusers_own_loader_computes_the_same(trained, kind, tmp_path):
    """Of a kohya file it leaves out the attention of a text encoder, which is said as that is
    written."""
    folder, expected = trained
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if kind == "kohya":
        with pytest.warns(MisreadElsewhere, match="leaves out the attention of a text encoder"):
            convert(folder, file, to=kind)
        both = models()
        handle = veneer.load(both, folder)
        for path, change in handle.changes.items():
            if ".self_attn." in path:
                nn.init.zeros_(change.adapter_parameters["B"])
        expected = answer(both)
    else:
        convert(folder, file, to=kind)
    assert (loaded_by_diffusers(tmp_path) - expected).abs().max() < 1e-5


def loaded_by_diffusers(folder):
    """What both answer with the file in a folder, loaded as a pipeline's ``load_lora_weights``
    does."""
    both, loader = models(), diffusers.StableDiffusionPipeline
    state, alphas, config = loader.lora_state_dict(
        str(folder), unet_config=both["unet"].config, return_lora_metadata=True
    )
    loader.load_lora_into_unet(state, alphas, both["unet"], metadata=config)
    loader.load_lora_into_text_encoder(
        state, alphas, both["text_encoder"], prefix="text_encoder", metadata=config
    )
    return answer(both)


#: what a file holds: (variant, targets in the UNet, targets in the text encoder, more fields)
FILES = {
    "DoRA": ("dora", ["to_q"], ["q_proj", "fc1"], {}),
    "no attention in the text encoder": ("lora", ["to_q"], ["fc1", "fc2"], {}),
    "DoRA, no attention in the text encoder": ("dora", ["to_q"], ["fc1", "fc2"], {}),
    "alphas": (
        "lora",
        ["to_q", "ff.net.2"],
        ["q_proj", "out_proj", "fc1"],
        {"alphas": {"to_q": 5, "fc1": 7}},
    ),
    "an alpha a model": ("lora", ["to_q", "to_k"], ["fc1"], {"alphas": {"fc1": 7}}),
    "whole attention": ("lora", ["to_q"], ["q_proj", "out_proj", "fc1"], {}),
    "a part of attention": ("lora", ["to_q"], ["q_proj", "fc1"], {}),
}


#: those of which each says something that no other does
QUICK = {("DoRA", "diffusers"), ("no attention in the text encoder", "diffusers")}
QUICK |= {("an alpha a model", "kohya"), ("whole attention", "kohya")}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=() if (case, kind) in QUICK else pytest.mark.slow)
        for case in FILES
        for kind in ("diffusers", "kohya")
    ],
)
def test_a_file_is_right_in_diffusers_or_says_what_it_loses_there(case, kind, tmp_path):
    variant, unet, text, fields = FILES[case]
    both = models()
    config = veneer.LoraConfig(rank=2, targets=[*unet, *text], alpha=3, variant=variant, **fields)
    handle = veneer.attach(both, config)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    folder, expected = handle.save(tmp_path / "adapter"), answer(both)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", MisreadElsewhere)
        convert(folder, tmp_path / "pytorch_lora_weights.safetensors", to=kind)
    told = [warning for warning in said if warning.category is MisreadElsewhere]
    off = (loaded_by_diffusers(tmp_path) - expected).abs().max()
    assert (off > 1e-3) == bool(told)
    assert off < 1e-5 or (kind == "kohya" and told)
    again = models()
    convert(
        tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "back", to="veneer", base=again
    )
    veneer.load(again, tmp_path / "back")
    assert torch.equal(answer(again), expected)


def test_the_text_encoder_of_a_file_alone_is_loaded_onto_it(trained, tmp_path):
    folder, _ = trained
    convert(folder, tmp_path / "file", to="kohya")
    clip = models()["text_encoder"]
    convert(tmp_path / "file", tmp_path / "clip", to="veneer", base=clip, part="text_encoder")
    veneer.load(clip, tmp_path / "clip")
    own = _loaded(folder)["text_encoder"]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(clip(ids).last_hidden_state, own(ids).last_hidden_state)


def _loaded(folder):
    both = models()
    veneer.load(both, folder)
    return both
