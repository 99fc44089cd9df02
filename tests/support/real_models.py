"""Small models of real architectures that transformers, torchvision and diffusers build from a
config, with random weights.

``REAL`` maps a name to an entry. ``REAL[name].build()`` makes the same model each time, in eval
mode, with an example and a loss. The loss gives a gradient to every parameter of the model except
those that the entry lists with a reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Built = tuple[nn.Module, dict[str, Any], Callable[[Any], Tensor]]

#: softmax(q·(k + b)) = softmax(q·k): a bias of the keys adds the same number to all scores of a row
KEY_BIAS = "softmax does not see a bias of the keys"


@dataclass(frozen=True)
class RealModel:
    """One architecture.

    Args:
        make: returns (model, keyword arguments of its forward, loss function of its output), from
            the seeded random state.
        no_gradient: glob of parameter paths → the reason why the loss has no gradient there.
        fixed: glob of parameter paths → the reason why the model freezes them.
        skipped: glob of module paths → the reason why ``targets="all"`` leaves them out. All other
            modules must be targets.
        biases: whether any parameter is called "bias".
    """

    make: Callable[[], Built]
    no_gradient: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    biases: bool = True

    def build(self, seed: int = 0) -> Built:
        """(the model in eval mode, an example, a loss). The global random state is unchanged."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, example, loss = self.make()
            with torch.no_grad():
                grow_up(model.eval(), example)
        return model, example, loss


REAL: dict[str, RealModel] = {}


@functools.cache
def transformers_models() -> list[str]:
    """The names of the models with a class in transformers, which can save them as files."""
    from transformers import PreTrainedModel

    return [name for name, real in REAL.items() if isinstance(real.build()[0], PreTrainedModel)]


def _real(name: str, **fields: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def add(make: Callable[[], Built]) -> Callable[[], Built]:
        REAL[name] = RealModel(make, **fields)
        return make

    return add


def grow_up(model: nn.Module, example: Mapping[str, Any]) -> None:
    """Give a new model weights of the sizes that trained models have. Otherwise a test would miss
    errors, because some parameters have no effect.

    Zero biases and the ones of a norm get random values. Weights that start at 0.02, as if the
    model were wide, become large enough for attention to differ from an average. Running statistics
    become those of the example.
    """
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or not parameter.requires_grad:
                continue
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim > 1:
                fan_in = (
                    parameter[0].numel() if isinstance(module, _ConvNd) else parameter.shape[-1]
                )
                parameter.mul_(max(1.0, (fan_in * parameter.square().mean()).rsqrt().item()))
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    if norms:
        for norm in norms:
            norm.train().momentum = 1.0
        model(**example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        norm.running_var.clamp_(
            min=0.1
        )  # some channels hardly vary in so small an example, and would explode


# Examples and losses


def _ids(vocabulary: int, rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length))


def _padded(ids: Tensor, padding: int = 4) -> Tensor:
    """An attention mask in which the last row ends with padding."""
    mask = torch.ones_like(ids)
    mask[-1, -padding:] = 0
    return mask


def _next_token(ids: Tensor, mask: Tensor | None = None) -> Callable[[Any], Tensor]:
    """A loss: the cross-entropy of the next token, without padding."""
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return lambda output: F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )


def _near(*names: str, seed: int = 1) -> Callable[[Any], Tensor]:
    """A loss: the mean squared distance of tensors of the output to random tensors. ``names``: the
    names of these tensors; without names, the output itself."""

    def loss(output: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        tensors = [output[name] for name in names] if names else [output]
        return sum(((x - torch.randn(x.shape, generator=generator)) ** 2).mean() for x in tensors)

    return loss


def _causal(model: nn.Module, vocabulary: int, **shape: int) -> Built:
    ids = _ids(vocabulary, **shape)
    mask = _padded(ids)
    return model, {"input_ids": ids, "attention_mask": mask}, _next_token(ids, mask)


# Language models

_LLAMA = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@_real("llama", biases=False)
def _llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _causal(LlamaForCausalLM(LlamaConfig(**_LLAMA)), 60)


@_real("llama-tied-biased")
def _llama_tied() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    return _causal(LlamaForCausalLM(config), 60)


@_real("qwen3", biases=False)
def _qwen3() -> Built:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _causal(
        Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=8, tie_word_embeddings=True)), 60
    )


@_real("qwen3-moe", biases=False)
def _qwen3_moe() -> Built:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    # the second layer has a dense MLP
    config = Qwen3MoeConfig(
        **_LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        mlp_only_layers=[1], norm_topk_prob=True,
    )  # fmt: skip
    return _causal(Qwen3MoeForCausalLM(config), 60, rows=3, length=16)


@_real("mixtral", biases=False)
def _mixtral() -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    return _causal(MixtralForCausalLM(config), 60, rows=3, length=16)


@_real("gpt-oss")
def _gpt_oss() -> Built:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    return _causal(GptOssForCausalLM(config), 60, rows=3, length=16)


@_real("gpt2")
def _gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _causal(GPT2LMHeadModel(config), 60)


@_real("mamba")
def _mamba() -> Built:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=2, conv_kernel=3, expand=2,
        time_step_rank=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _causal(MambaForCausalLM(config), 60)


# Encoders, and encoders with decoders

_BERT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


def _pretraining(model: nn.Module, *names: str) -> Built:
    ids = _ids(60)
    segments = torch.zeros_like(ids)
    segments[:, 6:] = 1
    example = {"input_ids": ids, "attention_mask": _padded(ids), "token_type_ids": segments}
    return model, example, _near(*names)


@_real("bert", no_gradient={"*.self.key.bias": KEY_BIAS})
def _bert() -> Built:
    from transformers import BertConfig, BertForPreTraining

    return _pretraining(
        BertForPreTraining(BertConfig(**_BERT)), "prediction_logits", "seq_relationship_logits"
    )


@_real("albert", no_gradient={"*.attention.key.bias": KEY_BIAS})
def _albert() -> Built:
    from transformers import AlbertConfig, AlbertForPreTraining

    # one group of two layers, called twice: four layers with the weights of two
    config = AlbertConfig(**{**_BERT, "num_hidden_layers": 4}, embedding_size=16, inner_group_num=2)
    return _pretraining(AlbertForPreTraining(config), "prediction_logits", "sop_logits")


@_real("deberta-v2")
def _deberta() -> Built:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        **_BERT, relative_attention=True, position_buckets=4, pos_att_type="p2c|c2p",
        norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3, conv_act="gelu",
        num_labels=3,
    )  # fmt: skip
    return _pretraining(DebertaV2ForSequenceClassification(config), "logits")


@_real("t5", biases=False)
def _t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    ids, answer = _ids(60), _ids(60, length=7)
    example = {
        "input_ids": ids, "attention_mask": _padded(ids),
        "decoder_input_ids": answer, "decoder_attention_mask": _padded(answer, 2),
    }  # fmt: skip
    return (
        T5ForConditionalGeneration(config),
        example,
        _next_token(answer, example["decoder_attention_mask"]),
    )


# Vision


@_real("vit", no_gradient={"*.k_proj.bias": KEY_BIAS})
def _vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    return (
        ViTForImageClassification(config),
        {"pixel_values": torch.randn(2, 3, 16, 16)},
        _near("logits"),
    )


@_real("dinov2", no_gradient={"*.k_proj.bias": KEY_BIAS})
def _dinov2() -> Built:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16,
        patch_size=4, use_swiglu_ffn=True,
    )  # fmt: skip
    # a larger image than the config's, so that the position embeddings are interpolated; some
    # patches are masked
    masked = torch.rand(2, 25) < 0.3
    example = {"pixel_values": torch.randn(2, 3, 20, 20), "bool_masked_pos": masked}
    return Dinov2Model(config), example, _near("last_hidden_state")


@_real("swin", no_gradient={"*.k_proj.bias": KEY_BIAS})
def _swin() -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        num_labels=5, use_absolute_embeddings=True,
    )  # fmt: skip
    return (
        SwinForImageClassification(config),
        {"pixel_values": torch.randn(2, 3, 32, 32)},
        _near("logits"),
    )


@_real("convnext")
def _convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2,
        hidden_sizes=[16, 24],
        depths=[2, 2],
        patch_size=4,
        num_labels=5,
        layer_scale_init_value=0.5,
    )
    return (
        ConvNextForImageClassification(config),
        {"pixel_values": torch.randn(2, 3, 32, 32)},
        _near("logits"),
    )


@_real("resnet18")
def _resnet18() -> Built:
    from torchvision.models.resnet import BasicBlock, ResNet

    class NarrowResNet(ResNet):
        """A ResNet with an eighth of the channels after the stem."""

        def _make_layer(self, block, planes, *args, **kwargs):
            return super()._make_layer(block, planes // 8, *args, **kwargs)

    model = NarrowResNet(BasicBlock, [2, 2, 2, 2])
    model.fc = nn.Linear(64, 10)
    return model, {"x": torch.randn(4, 3, 64, 64)}, _near()


@_real("mobilenet-v3-small")
def _mobilenet() -> Built:
    from torchvision.models import mobilenet_v3_small

    return (
        mobilenet_v3_small(width_mult=0.5, num_classes=10),
        {"x": torch.randn(4, 3, 64, 64)},
        _near(),
    )


@_real("efficientnet-b0")
def _efficientnet() -> Built:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    # the stages of b0, one block for each and two for one: expansion, kernel, stride, channels in
    # and out, blocks
    stages = [
        (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 1), (6, 3, 2, 40, 80, 1),
        (6, 5, 1, 80, 112, 1), (6, 5, 2, 112, 192, 1), (6, 3, 1, 192, 320, 1),
    ]  # fmt: skip
    blocks = [MBConvConfig(*stage, width_mult=0.25, depth_mult=1.0) for stage in stages]
    return (
        EfficientNet(blocks, dropout=0.2, num_classes=10),
        {"x": torch.randn(4, 3, 64, 64)},
        _near(),
    )


@_real("torchvision-vit")
def _torchvision_vit() -> Built:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=16,
        patch_size=4,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
        num_classes=5,
    )
    return model, {"x": torch.randn(2, 3, 16, 16)}, _near()


@_real("torchvision-swin")
def _torchvision_swin() -> Built:
    from torchvision.models import SwinTransformer

    model = SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4],
        mlp_ratio=2.0, stochastic_depth_prob=0.0, num_classes=5,
    )  # fmt: skip
    return model, {"x": torch.randn(2, 3, 16, 16)}, _near()


# Text and images, and sound


@_real("clip", no_gradient={"*.k_proj.bias": KEY_BIAS})
def _clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    layers = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
    }
    text = {
        "vocab_size": 60,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = CLIPConfig(
        text_config={**layers, **text},
        vision_config={**layers, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    ids = _ids(60, rows=3, length=8)
    ids[:, -1] = 59  # the end of the text, from which the tower's output is taken
    ids[-1, 4], ids[-1, 5:] = 59, 0
    example = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(3, 3, 16, 16),
    }
    return CLIPModel(config), example, _near("logits_per_image")


@_real("clip-large-image", no_gradient={"*.k_proj.bias": KEY_BIAS})
def _clip_large_image() -> Built:
    """CLIP with a larger image than its config says, so that it interpolates its position
    embeddings."""
    model, example, loss = _clip()
    return (
        model,
        {**example, "pixel_values": torch.randn(3, 3, 24, 24), "interpolate_pos_encoding": True},
        loss,
    )


@_real("unet2d-condition")
def _unet() -> Built:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
        attention_head_dim=4,
    )  # fmt: skip
    example = {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }  # fmt: skip
    return model, example, _near("sample")


@_real(
    "whisper",
    fixed={"model.encoder.embed_positions.weight": "sinusoids, which the model does not train"},
)
def _whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=16, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    answer = _ids(60, length=7)
    example = {
        "input_features": torch.randn(2, 8, 32), "decoder_input_ids": answer,
        "decoder_attention_mask": _padded(answer, 2),
    }  # fmt: skip
    loss = _next_token(answer, example["decoder_attention_mask"])
    return WhisperForConditionalGeneration(config), example, loss


@_real("wav2vec2", no_gradient={"*.k_proj.bias": KEY_BIAS})
def _wav2vec2() -> Built:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    # layerdrop would leave whole layers out of a training step
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(8, 3), conv_stride=(4, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.0, feat_extract_norm="group",
    )  # fmt: skip
    attention_mask = torch.ones(2, 200, dtype=torch.long)
    attention_mask[1, 150:] = 0
    masked_frames = torch.zeros(2, 24, dtype=torch.bool)  # frames that the model has to guess
    masked_frames[:, 3:6] = True
    example = {
        "input_values": torch.randn(2, 200),
        "attention_mask": attention_mask,
        "mask_time_indices": masked_frames,
    }
    return Wav2Vec2Model(config), example, _near("last_hidden_state")
