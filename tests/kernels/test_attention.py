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
from torch.utils.checkpoint import checkpoint

from veneer import models
from veneer.kernels import cpu_attention
from veneer.models.attention import PRODUCTS

few = st.integers(1, 4)


@settings(max_examples=80, deadline=None)
@given(
    b=few, heads=few, group=few, s=st.integers(1, 7), more=st.integers(0, 3), d=few, e=few,
    mask=st.sampled_from(["none", "causal", "boolean", "summand"]), scale=st.sampled_from([None, 0.3]),
    piece=st.integers(1, 8),
)  # fmt: skip
def test_equal_to_the_definition(b, heads, group, s, more, d, e, mask, scale, piece):
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
    alone = mask == "causal" and s == k
    bias = None if alone else cpu_attention.bias_of(given_mask, mask == "causal", query, key)
    plain = torch.ones(s, k, dtype=torch.bool).tril() if mask == "causal" else given_mask
    wide = [one.repeat_interleave(group, dim=1) for one in (key, value)]
    wanted = F.scaled_dot_product_attention(query, *wide, attn_mask=plain, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "PRODUCTS_ROWS", piece)
        found = cpu_attention.products(query, key, value, bias, scale, causal=alone)
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


@settings(max_examples=100, deadline=None)
@given(
    b=few, heads=few, group=few, s=st.integers(1, 9), d=few, e=few, scale=st.sampled_from([None, 0.3]),
    size=st.integers(1, 5), scores=st.integers(0, 400), seen=st.sampled_from(["b h s d", "b s h d"]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
)  # fmt: skip
def test_a_few_rows_and_heads_at_a_time(b, heads, group, s, d, e, scale, size, scores, seen, needs):
    """Values, gradients, and the gradients of these, of rows and heads in any chunks and either
    layout."""

    def made(count, width):
        shape = (b, count, s, width) if seen == "b h s d" else (b, s, count, width)
        one = torch.randn(shape, dtype=torch.float64)
        return one if seen == "b h s d" else one.transpose(1, 2)

    inputs = [one.requires_grad_(need) for one, need in zip(
        (made(heads * group, d), made(heads, d), made(heads, e)), needs, strict=True
    )]  # fmt: skip
    known = [one for one in inputs if one.requires_grad]
    wide = [one.repeat_interleave(group, dim=1) for one in inputs[1:]]
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "CAUSAL_MIN_KEYS": 1,
            "CAUSAL_ROWS": (size, size),
            "SCORES_PER_THREAD": scores,
            "PRODUCTS_ROWS": 2,
        }.items():
            patch.setattr(cpu_attention, name, value)
        found = cpu_attention.causal(*inputs, scale)
        raw = inputs[0] @ wide[0].mT * (d**-0.5 if scale is None else scale)
        wanted = raw.masked_fill(hidden, -torch.inf).softmax(-1) @ wide[1]
        assert found.shape == wanted.shape
        assert error(found, wanted) < 1e-12
        weight = torch.randn_like(wanted)
        ours, theirs, again = (
            torch.autograd.grad(y, known, weight, create_graph=graph, retain_graph=True)
            for y, graph in ((found, False), (wanted, True), (found, True))
        )
        assert all(near(one, other) for one, other in zip(ours, theirs, strict=True))
        assert all(near(one, other) for one, other in zip(again, theirs, strict=True))
        sums = [sum(one.square().sum() for one in grads) for grads in (again, theirs)]
        if sums[1].requires_grad:
            second, exact = (torch.autograd.grad(one, known, allow_unused=True) for one in sums)
            for one, other in zip(second, exact, strict=True):
                assert (one is None and other is None) or near(one, other)


def near(one, other):
    return error(one, other) < 1e-10 or (one - other).abs().max() < 1e-11


@pytest.mark.parametrize("length", [cpu_attention.VECTOR_MIN_KEYS - 12, 200])
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

    def fused(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    narrow = [one.detach().to(dtype).requires_grad_() for one in exact]
    triples = zip(
        values(cpu_attention.causal, narrow),
        values(fused, narrow),
        values(fused, exact),
        strict=True,
    )
    for one, theirs, wanted in triples:
        assert one.dtype == dtype
        assert error(one.double(), wanted) < max(
            2 * error(theirs.double(), wanted), 8 * torch.finfo(dtype).eps
        )


def test_under_autocast_and_transforms_it_is_the_products():
    inputs = [torch.randn(1, heads, 150, 4).requires_grad_() for heads in (4, 2, 2)]
    wanted = cpu_attention.causal(*inputs)
    assert "Causal" in wanted.grad_fn.next_functions[0][0].name()
    assert (
        error(torch.func.vmap(cpu_attention.causal)(*(one[None] for one in inputs))[0], wanted)
        < 1e-6
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(cpu_attention.causal(*inputs).float(), wanted) < 0.05
        known = torch.autograd.grad(
            wanted.sum(), inputs
        )  # a backward under autocast is in the dtype of forward
    assert all(one.dtype == torch.float32 for one in known)
    assert not cpu_attention.is_faster(*(one.double() for one in inputs[:2]), True)


def test_many_gradients_at_once_checkpointed_and_of_gradients_under_autocast():
    inputs = [torch.randn(1, heads, 150, 4).requires_grad_() for heads in (4, 2, 2)]
    y = cpu_attention.causal(*inputs)
    weights = torch.randn(3, *y.shape)
    many = torch.autograd.grad(y, inputs, weights, is_grads_batched=True, retain_graph=True)
    for place in range(3):
        one = torch.autograd.grad(y, inputs, weights[place], retain_graph=True)
        assert all(
            error(a[place].double(), b.double()) < 1e-5 for a, b in zip(many, one, strict=True)
        )
    again = checkpoint(cpu_attention.causal, *inputs, use_reentrant=False)
    one = torch.autograd.grad(y, inputs, weights[0], retain_graph=True)
    pairs = zip(torch.autograd.grad(again, inputs, weights[0]), one, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, inputs, weights[0], create_graph=True)
    one = torch.autograd.grad(y, inputs, weights[0])
    assert all(error(a.double(), b.double()) < 1e-5 for a, b in zip(found, one, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_call_has_no_break(dtype):
    def run(query):
        return (
            cpu_attention.causal(query, query, query)
            if cpu_attention.is_faster(query, query, True)
            else query * 2
        )

    query = torch.randn(1, 2, 140, 8, dtype=dtype, requires_grad=True)
    found = torch.compile(run, backend="eager", fullgraph=True)(query)
    wanted = (
        query * 2
        if dtype is torch.float32
        else cpu_attention.products(query, query, query, None, causal=True)
    )
    assert error(found.double(), wanted.double()) < 1e-2


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


def test_no_scores_are_kept():
    inputs = [torch.randn(2, heads, 256, 8).requires_grad_() for heads in (4, 2, 2)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: kept.append(one.numel()) or one, lambda one: one
    ):
        cpu_attention.causal(*inputs)
    assert sum(kept) == sum(one.numel() for one in inputs)


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
    products = cpu_attention.products
    monkeypatch.setattr(
        cpu_attention, "products", lambda *args, **how: used.append(args) or products(*args, **how)
    )
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query, key, causal: query.shape[2] > 1)
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


def test_a_model_whose_rows_are_long_enough(monkeypatch):
    """Grouped heads, in two layers, with the gradient of what is embedded."""
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    embedded, calls = torch.randn(2, cpu_attention.CAUSAL_MIN_KEYS, 16), []
    causal = cpu_attention.causal
    monkeypatch.setattr(cpu_attention, "causal", lambda *args: calls.append(args) or causal(*args))

    def values():
        x = embedded.clone().requires_grad_()
        y = model(inputs_embeds=x, use_cache=False).logits
        return y, *torch.autograd.grad(y.square().sum(), x)

    wanted = values()
    models.use_products(model)
    for one, other in zip(values(), wanted, strict=True):
        assert error(one.double(), other.double()) < 1e-5
    assert len(calls) == 2


def test_packed_rows_do_not_see_each_other(monkeypatch):
    torch.manual_seed(0)
    model = MODELS["llama"]().double().eval()
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query, key, causal: True)
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
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query, key, causal: pays)
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
    ("dtype", "length", "keys", "causal", "kept", "chosen"),
    [
        (torch.bfloat16, 64, 64, False, True, True),
        (
            torch.bfloat16,
            cpu_attention.PRODUCTS_MAX_KEYS + 1,
            cpu_attention.PRODUCTS_MAX_KEYS + 1,
            True,
            True,
            False,
        ),
        (
            torch.bfloat16,
            cpu_attention.PRODUCTS_MAX_KEYS + 1,
            cpu_attention.PRODUCTS_MAX_KEYS + 1,
            False,
            False,
            False,
        ),
        (
            torch.bfloat16,
            cpu_attention.CAUSAL_MAX_KEYS[2],
            cpu_attention.CAUSAL_MAX_KEYS[2],
            True,
            False,
            True,
        ),
        (
            torch.bfloat16,
            cpu_attention.CAUSAL_MAX_KEYS[2] + 1,
            cpu_attention.CAUSAL_MAX_KEYS[2] + 1,
            True,
            False,
            False,
        ),
        (torch.bfloat16, 1, 64, True, False, False),
        (torch.bfloat16, 32, 64, True, False, False),
        (
            torch.float32,
            cpu_attention.CAUSAL_MIN_KEYS,
            cpu_attention.CAUSAL_MIN_KEYS,
            True,
            True,
            True,
        ),
        (
            torch.float32,
            cpu_attention.CAUSAL_MIN_KEYS - 1,
            cpu_attention.CAUSAL_MIN_KEYS - 1,
            True,
            True,
            False,
        ),
        (
            torch.float32,
            cpu_attention.CAUSAL_MAX_KEYS[4] + 1,
            cpu_attention.CAUSAL_MAX_KEYS[4] + 1,
            True,
            True,
            False,
        ),
        (
            torch.float32,
            cpu_attention.CAUSAL_MIN_KEYS,
            cpu_attention.CAUSAL_MIN_KEYS,
            False,
            False,
            False,
        ),
        (torch.int32, 200, 200, True, False, False),
    ],
)
def test_only_where_it_pays(dtype, length, keys, causal, kept, chosen, monkeypatch):
    """On a processor with matrix units, where a backward of long rows in 16 bits does not."""
    monkeypatch.setattr(cpu_attention, "has_amx", lambda: True)
    query, key = torch.empty(1, 2, length, 4, dtype=dtype), torch.empty(1, 1, keys, 4, dtype=dtype)
    query = query.requires_grad_(kept) if kept else query
    assert cpu_attention.is_faster(query, key, causal) is chosen
    assert not cpu_attention.is_faster(query.to("meta"), key.to("meta"), causal)
    longer = (
        causal and dtype is torch.bfloat16 and length == keys == cpu_attention.PRODUCTS_MAX_KEYS + 1
    )
    with torch.no_grad():
        assert cpu_attention.is_faster(query, key, causal) is (chosen or longer)
    monkeypatch.setattr(cpu_attention, "has_amx", lambda: False)
    assert cpu_attention.is_faster(query, key, causal) is (chosen or longer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cpu_attention.CAUSAL_MAX_THREADS + 1)
    assert cpu_attention.is_faster(query, key, causal) is (
        (chosen or longer) and dtype is torch.bfloat16
    )


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
