"""The task that a folder names is what PEFT does with such a model: its forward gives our
numbers."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.formats.peft_behaviour import wrapper_lacks

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, and of tiny configs

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TWO = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
       "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
IDS = {"input_ids": torch.arange(8).view(2, 4) + 3}
PAIR = {**IDS, "decoder_input_ids": torch.tensor([[1, 4], [1, 5]])}
IMAGE = {
    "input_ids": torch.tensor([[1, 63, 63, 63, 63, 5]]),
    "pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8),
}
SOUND = {
    "input_features": torch.linspace(-1, 1, 640).view(2, 8, 40).sin(),
    "decoder_input_ids": PAIR["decoder_input_ids"],
}


def whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**TWO, **sizes, **tokens)
    )


def llava():
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=63, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    text = transformers.Gemma3TextConfig(**TEXT, num_key_value_heads=1, head_dim=8)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=transformers.SiglipVisionConfig(**VISION), image_token_id=63,
        mm_tokens_per_image=4, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision, image_token_id=63, video_token_id=62, vision_start_token_id=60, vision_end_token_id=61,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def made(model, config, **sizes):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


PATCHES = {"input_ids": torch.tensor([[1, 60, 63, 61, 5]]), "pixel_values": torch.linspace(-1, 1, 384).view(4, 96),
           "image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": torch.eye(5)[2:3].long()}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: (model, what it is called with, targets, PEFT's task)
MODELS = {
    "whisper": (whisper, SOUND, ["q_proj", "v_proj"], None),
    "t5": (made("T5ForConditionalGeneration", "T5Config", **T5), PAIR, ["q", "v"], "SEQ_2_SEQ_LM"),
    "bart": (
        made("BartForConditionalGeneration", "BartConfig", **TWO),
        PAIR,
        ["q_proj"],
        "SEQ_2_SEQ_LM",
    ),
    "bart-decoder": (made("BartForCausalLM", "BartConfig", **TWO), IDS, ["q_proj"], "CAUSAL_LM"),
    "llava": (llava, IMAGE, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "gemma3": (
        gemma3,
        {**IMAGE, "token_type_ids": (IMAGE["input_ids"] == 63).long()},
        ["q_proj"],
        "CAUSAL_LM",
    ),
    "qwen2-vl": (qwen2_vl, PATCHES, ["q_proj", "qkv"], "CAUSAL_LM"),
    "llama": (made("LlamaForCausalLM", "LlamaConfig", **TEXT), IDS, ["q_proj"], "CAUSAL_LM"),
    "gpt2": (made("GPT2LMHeadModel", "GPT2Config", **GPT2), IDS, ["c_attn"], "CAUSAL_LM"),
    "bert-classifier": (
        made("BertForSequenceClassification", "BertConfig", **TEXT),
        IDS,
        ["dense"],
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_peft_s_forward_gives_our_numbers(tmp_path, name):
    make, inputs, targets, task = MODELS[name]

    def fresh():
        torch.manual_seed(0)
        return make().eval()

    model = fresh()
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets)), 0.3)
    path = veneer.save(model, tmp_path / "adapter")
    assert json.loads((path / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(fresh(), path).eval()
    with torch.no_grad():
        ours = model(**inputs).logits
        assert error(theirs(**inputs).logits, ours) < 1e-5
        assert error(fresh()(**inputs).logits, ours) > 1e-4


@pytest.mark.parametrize(
    ("target", "reason"),
    [("conv1", "stride"), ("conv2", "stride"), ("encoder.embed_positions", "num_embeddings")],
)
def test_a_layer_of_which_a_forward_asks_what_peft_s_wrapper_lacks_is_not_for_peft(
    tmp_path, target, reason
):
    def fresh():
        torch.manual_seed(0)
        return whisper().eval()

    model = fresh()
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=[target, "q_proj"])), 0.3)
    path = veneer.save(model, tmp_path / "adapter")
    with pytest.raises(KeyError, match=rf"not for PEFT.*{target}.*{reason}"):
        peft.PeftModel.from_pretrained(fresh(), path)
    again = fresh()
    veneer.load(again, path)
    with torch.no_grad():
        assert torch.equal(again(**SOUND).logits, model(**SOUND).logits)
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(AttributeError, match=reason):  # which is why
        theirs(**SOUND)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding, self.attention = (
            nn.Linear(4, 4),
            nn.Embedding(4, 4),
            nn.MultiheadAttention(4, 2),
        )
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv1d(4, 4, 3),
            nn.Conv2d(4, 4, 3),
            nn.Conv3d(4, 4, 3),
        )
        self.parameter = nn.Linear(4, 4)


def test_peft_s_wrappers_have_the_attributes_that_we_think_they_have():
    plain = dict(Layers().named_children())
    config = peft.LoraConfig(
        r=1, target_modules=[*plain][:-1], target_parameters=["parameter.weight"]
    )
    wrapped = peft.get_peft_model(Layers(), config).base_model.model
    told = 0
    for name, layer in plain.items():
        own = [*vars(layer), *type(layer).__constants__, *layer._modules]
        own += [attribute for attribute, value in layer._parameters.items() if value is not None]
        for attribute in (one for one in own if not one.startswith("_")):
            assert wrapper_lacks(attribute) != hasattr(getattr(wrapped, name), attribute), (
                name,
                attribute,
            )
            told += wrapper_lacks(attribute)
    assert told > 20


def test_the_card_of_a_model_that_reads_images_names_its_own_class(tmp_path):
    model = llava()
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["q_proj"]))
    text = (
        veneer.save(model, tmp_path / "adapter", base_name="owner/llava") / "README.md"
    ).read_text()
    assert text.count('LlavaForConditionalGeneration.from_pretrained("owner/llava")') == 2
    assert not any(word in text for word in ("AutoModelForCausalLM", "load_base", "vllm serve"))
