"""kohya files of DiT models: the names that ComfyUI reads of SD3 and Flux, and what diffusers makes
of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support.toys import randomise

import veneer
from veneer.errors import AdapterError
from veneer.formats import MisreadElsewhere
from veneer.tools.convert import convert

diffusers: Any = pytest.importorskip("diffusers")

FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip
SD3 = {
    "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64,
    "out_channels": 4,
}  # fmt: skip
PIXART = {
    "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
    "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8,
    "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10,
}  # fmt: skip
ATTENTION = ["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0"]


def make(kind: str) -> Any:
    torch.manual_seed(0)
    classes = {
        "flux": "FluxTransformer2DModel",
        "sd3": "SD3Transformer2DModel",
        "pixart": "PixArtTransformer2DModel",
    }
    return getattr(diffusers, classes[kind])(
        **{"flux": FLUX, "sd3": SD3, "pixart": PIXART}[kind]
    ).eval()


@torch.no_grad()
def outputs(kind: str, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 3, 32, generator=generator)
    if kind == "flux":
        image = torch.randn(1, 4, 4, generator=generator)
        pooled, time = torch.randn(1, 32, generator=generator), torch.tensor([0.5])
        return model(
            image, text, pooled, time, torch.zeros(4, 3), torch.zeros(3, 3), return_dict=False
        )[0]
    image = torch.randn(1, 4, 8, 8, generator=generator)
    pooled = torch.randn(1, 64, generator=generator)
    return model(image, text, pooled, torch.tensor([5]), return_dict=False)[0]


def pipeline(kind: str, transformer: Any) -> Any:
    class_: Any = {"flux": diffusers.FluxPipeline, "sd3": diffusers.StableDiffusion3Pipeline}[kind]
    names = (
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    rest = {} if kind == "flux" else dict.fromkeys(names)
    rest = rest or dict.fromkeys(name for name in names if not name.endswith("_3"))
    return class_(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **rest
    )


def saved(kind: str, targets: list[str], folder: Path) -> torch.Tensor:
    model = make(kind)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, alpha=3, targets=targets))
    randomise(handle)
    handle.save(folder)
    return outputs(kind, model)


def test_attention_of_flux_is_read_by_diffusers_as_it_is_meant(tmp_path: Path) -> None:
    expected = saved("flux", ATTENTION, tmp_path / "a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MisreadElsewhere)
        convert(
            tmp_path / "a",
            tmp_path / "a.safetensors",
            to="kohya",
            part="transformer",
            base=make("flux"),
        )
    (message,) = [str(warning.message) for warning in caught]
    assert "sd-scripts" in message
    assert "diffusers" not in message
    assert all(key.startswith("lora_transformer_") for key in load_file(tmp_path / "a.safetensors"))
    model = make("flux")
    pipe = pipeline("flux", model)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert pipe.get_list_adapters()
    assert torch.allclose(outputs("flux", model), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "targets"), [("sd3", ATTENTION), ("flux", ["ff.net.2", "proj_mlp"])]
)
def test_what_diffusers_does_not_read_is_said_and_its_own_format_is_read(
    kind: str, targets: list[str], tmp_path: Path
) -> None:
    expected = saved(kind, targets, tmp_path / "a")
    with (
        pytest.warns(MisreadElsewhere, match="sd-scripts"),
        pytest.warns(MisreadElsewhere, match='convert to "diffusers"'),
    ):
        convert(
            tmp_path / "a",
            tmp_path / "k.safetensors",
            to="kohya",
            part="transformer",
            base=make(kind),
        )
    names = {key.partition(".")[0] for key in load_file(tmp_path / "k.safetensors")}
    assert all(name.startswith("lora_transformer_") for name in names)
    back = make(kind)
    convert(tmp_path / "k.safetensors", tmp_path / "back", to="veneer", base=back)
    veneer.load(back, tmp_path / "back")
    assert torch.allclose(outputs(kind, back), expected, atol=1e-5)
    convert(
        tmp_path / "a",
        tmp_path / "d.safetensors",
        to="diffusers",
        part="transformer",
        base=make(kind),
    )
    model = make(kind)
    pipe = pipeline(kind, model)
    pipe.load_lora_weights(tmp_path, weight_name="d.safetensors")
    assert pipe.get_list_adapters()
    assert torch.allclose(outputs(kind, model), expected, atol=1e-4)


@pytest.mark.parametrize("targets", [["attn1.to_q"], ["ff.net.2"]])
def test_a_transformer_of_which_nobody_reads_such_names_is_refused(
    targets: list[str], tmp_path: Path
) -> None:
    model = make("pixart")
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets)).save(tmp_path / "a")
    with pytest.raises(AdapterError, match=r'neither SD3 nor Flux.*"diffusers"'):
        convert(
            tmp_path / "a",
            tmp_path / "k.safetensors",
            to="kohya",
            part="transformer",
            base=make("pixart"),
        )
    assert not (tmp_path / "k.safetensors").exists()
