"""Attention as matrix products: equal to torch's own in float64, in models of transformers with
every kind of mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.toys import error
from torch.nn.attention import SDPBackend, sdpa_kernel

from veneer import models
from veneer.kernels import cpu_attention
from veneer.models.attention import PRODUCTS

few = st.integers(1, 4)


@settings(max_examples=80, deadline=None)
@given(
    b=few, heads=few, group=few, s=st.integers(1, 7), more=st.integers(0, 3), d=few, e=few,
    mask=st.sampled_from(["none", "causal", "boolean", "summand"]), scale=st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_equal_to_the_definition(b, heads, group, s, more, d, e, mask, scale):
    k = s + more
    query, key, value = (
        torch.randn(b, heads * group, s, d),
        torch.randn(b, heads, k, d),
        torch.randn(b, heads, k, e),
    )
    query, key, value = (one.double().requires_grad_() for one in (query, key, value))
    given_mask = {
        "none": None,
        "causal": None,
        "boolean": torch.rand(b, 1, s, k) < 0.7,
        "summand": torch.randn(1, 1, s, k, dtype=torch.float64),
    }[mask]
    if mask == "boolean":
        given_mask[..., 0] = True
    bias = cpu_attention.bias_of(given_mask, mask == "causal", query, key)
    plain = torch.ones(s, k, dtype=torch.bool).tril() if mask == "causal" else given_mask
    wide = [one.repeat_interleave(group, dim=1) for one in (key, value)]
    wanted = F.scaled_dot_product_attention(query, *wide, attn_mask=plain, scale=scale)
    found = cpu_attention.attend_by_products(query, key, value, bias, scale)
    assert error(found, wanted) < 1e-12
    weight = torch.randn(found.shape, dtype=torch.float64)
    inputs = (query, key, value)
    pairs = zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(wanted, inputs, weight),
        strict=True,
    )
    assert all(
        error(one, other) < 1e-11 or (one - other).abs().max() < 1e-12 for one, other in pairs
    )


@pytest.mark.parametrize("length", [cpu_attention.VECTOR_MIN_KEYS - 12, cpu_attention.MAX_KEYS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_dtypes_that_models_have(dtype, length):
    """Errors against float64, next to those of torch's fused kernel."""
    torch.manual_seed(0)
    exact = [torch.randn(2, heads, length, 16, dtype=torch.float64) for heads in (6, 2, 2)]
    exact = [one.to(dtype).double().requires_grad_() for one in exact]
    weight = torch.randn(2, 6, length, 16).to(dtype)

    def values(run, inputs):
        y = run(*inputs)
        return [y, *torch.autograd.grad(y, inputs, weight.to(y.dtype))]

    def products(query, key, value):
        return cpu_attention.attend_by_products(
            query, key, value, cpu_attention.bias_of(None, True, query, key)
        )

    def fused(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    narrow = [one.detach().to(dtype).requires_grad_() for one in exact]
    triples = zip(
        values(products, narrow),
        values(fused, narrow),
        values(fused, exact),
        strict=True,
    )
    for one, theirs, wanted in triples:
        assert one.dtype == dtype
        assert error(one.double(), wanted) < max(
            2 * error(theirs.double(), wanted), 8 * torch.finfo(dtype).eps
        )


def test_a_compiled_call_has_no_break(monkeypatch):
    monkeypatch.setattr(cpu_attention, "HAS_BF16_PRODUCTS", True)

    def run(query):
        if cpu_attention.is_faster(query, query):
            return cpu_attention.attend_by_products(query, query, query, None)
        return query * 2

    for length in (64, cpu_attention.MAX_KEYS + 1):
        query = torch.randn(1, 2, length, 8, dtype=torch.bfloat16, requires_grad=True)
        found = torch.compile(run, backend="eager", fullgraph=True)(query)
        assert torch.equal(found, run(query))


def test_not_where_a_models_code_asks_for_sdpa():
    """DeepSeek's indexer, for one, is left out under any name that its code does not know."""
    config = transformers.AutoConfig.for_model(
        "deepseek_v32", vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        index_topk=16, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="sdpa"):
        models.use_products(model)
    assert model.config._attn_implementation == "sdpa"


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
    products = cpu_attention.attend_by_products
    monkeypatch.setattr(
        cpu_attention,
        "attend_by_products",
        lambda *args, **how: used.append(args) or products(*args, **how),
    )
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query, key: query.shape[2] > 1)
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
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query, key: True)
    models.use_products(model)
    ids = torch.randint(40, (1, 7))
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False).logits
    apart = torch.cat([model(ids[:, :3]).logits, model(ids[:, 3:]).logits], dim=1)
    assert error(packed, apart) < 1e-11


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_rows_whose_lengths_are_known_are_taken_apart(name, pays, monkeypatch):
    """Rows of 1 to 5 tokens, some longer than qwen3's window; what trl's collator says of them."""
    torch.manual_seed(0)
    model, lengths, calls = MODELS[name]().double().eval(), (4, 1, 4, 4, 3, 5), []
    embedded = torch.randn(1, sum(lengths), 16, dtype=torch.float64)
    weight = torch.randn(1, sum(lengths), 40, dtype=torch.float64)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = torch.tensor([0, 4, 5, 9, 13, 16, 21], dtype=torch.int32)
    rows = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}

    def values(run):
        x = embedded.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # whose gradient has a gradient
            y = run(x)
        (first,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
        return y, first, *torch.autograd.grad(first.square().sum(), x)

    wanted = values(
        lambda x: torch.cat(
            [model(inputs_embeds=one, use_cache=False).logits for one in x.split(lengths, 1)], 1
        )
    )
    packed = cpu_attention.is_packed
    monkeypatch.setattr(
        cpu_attention, "is_packed", lambda *args: calls.append(packed(*args)) or calls[-1]
    )
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query, key: pays)
    models.use_products(model)
    found = values(
        lambda x: model(inputs_embeds=x, position_ids=positions, use_cache=False, **rows).logits
    )
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-10
    assert calls == [True, False] * 2  # the rows themselves are none that are packed


def test_packed_rows_are_taken_apart_where_fewer_scores_remain():
    query, mask = torch.empty(1, 2, 12, 4), torch.ones(1, 1, 12, 12, dtype=torch.bool)
    starts = torch.tensor([0, 6, 12])
    assert cpu_attention.is_packed(query, query, mask, starts, 6)
    assert not cpu_attention.is_packed(query, query, mask, torch.tensor([0, 3, 12]), 9)
    for others in (
        (mask, None, None),
        (None, starts, 6),
        (mask.float(), starts, 6),
        (mask[:, :, 1:], starts, 6),
    ):
        assert not cpu_attention.is_packed(query, query, *others)
    assert not cpu_attention.is_packed(query.to("meta"), query.to("meta"), mask, starts, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu_attention.is_packed(query, query, mask, starts, 6)


@pytest.mark.parametrize(
    ("dtype", "length", "keys", "is_trained", "is_faster"),
    [
        (torch.bfloat16, 64, 64, True, True),
        (torch.bfloat16, cpu_attention.MAX_KEYS, cpu_attention.MAX_KEYS, True, True),
        (torch.bfloat16, cpu_attention.MAX_KEYS + 1, cpu_attention.MAX_KEYS + 1, True, False),
        (torch.bfloat16, 64, 64, False, False),
        (torch.bfloat16, 1, 64, True, False),
        (torch.bfloat16, 32, 64, True, False),
        (torch.bfloat16, 1, 1, True, False),
        (torch.float16, 64, 64, True, False),
        (torch.float32, 64, 64, True, False),
    ],
)
def test_only_where_it_pays(dtype, length, keys, is_trained, is_faster, monkeypatch):
    """In a backward in bfloat16, on a CPU with instructions for it."""
    monkeypatch.setattr(cpu_attention, "HAS_BF16_PRODUCTS", True)
    query, key = torch.empty(1, 2, length, 4, dtype=dtype), torch.empty(1, 1, keys, 4, dtype=dtype)
    query.requires_grad_(is_trained)
    assert cpu_attention.is_faster(query, key) is is_faster
    assert not cpu_attention.is_faster(query.to("meta"), key.to("meta"))
    with torch.no_grad():
        assert not cpu_attention.is_faster(query, key)
    monkeypatch.setattr(cpu_attention, "HAS_BF16_PRODUCTS", False)
    assert not cpu_attention.is_faster(query, key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_on_a_cpu_takes_them(base, precision):
    loaded = models.load_base(base, precision=precision, device="cpu")
    assert loaded.model.config._attn_implementation == PRODUCTS
    assert models.load_base(base, attention="sdpa").model.config._attn_implementation == "sdpa"
    assert (
        models.load_base(base, attention="products").model.config._attn_implementation == PRODUCTS
    )
    assert models.load_base(base, attention="eager").model.config._attn_implementation == "eager"


def test_a_saved_model_does_not_ask_for_them(base, tmp_path):
    loaded = models.load_base(base, precision="bf16", device="cpu")
    models.save_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    assert PRODUCTS not in (tmp_path / "plain" / "config.json").read_text()
