"""Attention as matrix products: equal to torch's own in float64, in models of transformers with every kind of mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from toys import error
from veneer import models
from veneer.kernels import attention

few = st.integers(1, 4)


@settings(max_examples=80, deadline=None)
@given(
    b=few, heads=few, group=few, s=st.integers(1, 7), more=st.integers(0, 3), d=few, e=few,
    mask=st.sampled_from(["none", "causal", "boolean", "summand"]), scale=st.sampled_from([None, 0.3]),
    piece=st.integers(1, 8),
)  # fmt: skip
def test_equal_to_the_definition(b, heads, group, s, more, d, e, mask, scale, piece):
    k = s + more
    query, key, value = torch.randn(b, heads * group, s, d), torch.randn(b, heads, k, d), torch.randn(b, heads, k, e)
    query, key, value = (one.double().requires_grad_() for one in (query, key, value))
    given_mask = {
        "none": None,
        "causal": None,
        "boolean": torch.rand(b, 1, s, k) < 0.7,
        "summand": torch.randn(1, 1, s, k, dtype=torch.float64),
    }[mask]
    if mask == "boolean":
        given_mask[..., 0] = True
    alone = mask == "causal" and s == k
    bias = None if alone else attention.bias_of(given_mask, mask == "causal", query, key)
    plain = torch.ones(s, k, dtype=torch.bool).tril() if mask == "causal" else given_mask
    wide = [one.repeat_interleave(group, dim=1) for one in (key, value)]
    wanted = F.scaled_dot_product_attention(query, *wide, attn_mask=plain, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PIECE", piece)
        found = attention.products(query, key, value, bias, scale, causal=alone)
    assert error(found, wanted) < 1e-12
    weight = torch.randn(found.shape, dtype=torch.float64)
    inputs = (query, key, value)
    pairs = zip(torch.autograd.grad(found, inputs, weight), torch.autograd.grad(wanted, inputs, weight), strict=True)
    assert all(error(one, other) < 1e-11 or (one - other).abs().max() < 1e-12 for one, other in pairs)


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=40,
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
            head_dim=8, vocab_size=40, use_sliding_window=True, sliding_window=3, max_window_layers=1,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=40
        )
    ),
}  # fmt: skip
MASKS = {
    "none": None,
    "right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask", MASKS)
def test_models_give_what_they_gave(name, mask, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    ids, rows = torch.randint(40, (2, 6)), MASKS[mask]
    wanted = model(ids, attention_mask=rows).logits
    used = []
    products = attention.products
    monkeypatch.setattr(attention, "products", lambda *args, **how: used.append(args) or products(*args, **how))
    monkeypatch.setattr(attention, "pays", lambda query, key, causal: query.shape[2] > 1)
    models.use_products(model)
    found = model(ids, attention_mask=rows).logits
    assert len(used) == 2
    seen = slice(None) if rows is None else rows.bool()
    assert error(found[seen], wanted[seen]) < 1e-11
    if name != "bert":  # positions follow from the mask, if there is one
        options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
        one = model.generate(ids[:1], **options)
        model.set_attn_implementation("sdpa")
        assert torch.equal(one, model.generate(ids[:1], **options))


def test_packed_rows_do_not_see_each_other(monkeypatch):
    torch.manual_seed(0)
    model = MODELS["llama"]().double().eval()
    monkeypatch.setattr(attention, "pays", lambda query, key, causal: True)
    models.use_products(model)
    ids = torch.randint(40, (1, 7))
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False).logits
    apart = torch.cat([model(ids[:, :3]).logits, model(ids[:, 3:]).logits], dim=1)
    assert error(packed, apart) < 1e-11


@pytest.mark.parametrize(
    ("dtype", "length", "keys", "causal", "kept", "chosen"),
    [
        (torch.bfloat16, 64, 64, False, True, True),
        (torch.bfloat16, attention.LONGEST + 1, attention.LONGEST + 1, True, True, False),
        (torch.bfloat16, attention.LONGEST + 1, attention.LONGEST + 1, False, False, False),
        (torch.bfloat16, attention.LONGEST_PIECES, attention.LONGEST_PIECES, True, False, True),
        (torch.bfloat16, attention.LONGEST_PIECES + 1, attention.LONGEST_PIECES + 1, True, False, False),
        (torch.bfloat16, 1, 64, True, False, False),
        (torch.bfloat16, 32, 64, True, False, False),
        (torch.float32, 64, 64, True, False, False),
    ],
)
def test_only_where_it_pays(dtype, length, keys, causal, kept, chosen):
    query, key = torch.empty(1, 2, length, 4, dtype=dtype), torch.empty(1, 1, keys, 4, dtype=dtype)
    assert attention.pays(query.requires_grad_(kept), key, causal) is chosen
    assert not attention.pays(query.to("meta"), key.to("meta"), causal)
    with torch.no_grad():
        longer = causal and length == keys == attention.LONGEST + 1
        assert attention.pays(query, key, causal) is (chosen or longer)


@pytest.mark.parametrize(("precision", "chosen"), [("fp32", "sdpa"), ("bf16", models.PRODUCTS)])
def test_a_base_on_a_cpu_takes_them_in_16_bits(base, precision, chosen):
    loaded = models.load_base(base, precision=precision, device="cpu")
    assert loaded.model.config._attn_implementation == chosen
    assert models.load_base(base, attention="products").model.config._attn_implementation == models.PRODUCTS
    assert models.load_base(base, attention="eager").model.config._attn_implementation == "eager"


def test_a_saved_model_does_not_ask_for_them(base, tmp_path):
    loaded = models.load_base(base, precision="bf16", device="cpu")
    models.save_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    assert models.PRODUCTS not in (tmp_path / "plain" / "config.json").read_text()
