"""Trained rows of an embedding: W with other rows at the tokens is the definition, and every path
agrees with it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tests.support.toys import bits, error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import veneer
from veneer.errors import ConfigError, TargetError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW = [40, 41, 42]
IDS = torch.tensor([[1, 40, 7, 41, 42, 3], [42, 5, 6, 9, 40, 2]])
ALONE = veneer.LoraConfig(targets=(), trainable_tokens=NEW)
CONFIGS = {
    "alone": ALONE,
    "beside": veneer.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=NEW),
    "same": veneer.LoraConfig(rank=2, targets=["embed_tokens"], trainable_tokens=NEW),
    "dora": veneer.LoraConfig(rank=2, targets=["embed_tokens"], variant="dora", trainable_tokens=NEW),
    "sliced": veneer.LoraConfig(
        rank=2, targets="embed_tokens", slices={"embed_tokens": [(2, 9)]}, trainable_tokens=NEW
    ),
}  # fmt: skip


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made within it, in backward too."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "view" not in str(function) and function.overloadpacket not in (
            torch.ops.aten.t,
            torch.ops.aten.detach,
        ):
            self.shapes.update(
                tuple(one.shape) for one in tree_leaves(out) if isinstance(one, torch.Tensor)
            )
        return out


def llama(tied=True, dtype=torch.float64, **more):
    torch.manual_seed(0)
    fields = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 43, "tie_word_embeddings": tied, "attn_implementation": "eager",
    }  # fmt: skip
    return (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **more}))
        .to(dtype)
        .eval()
    )


def attached(tied=True, config=ALONE, dtype=torch.float64):
    model = llama(tied, dtype)
    handle = veneer.attach(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, handle


def defined(model, handle):
    """A plain copy of the model whose weights are the changed ones, by the definition."""
    plain = llama(model.config.tie_word_embeddings, model.dtype)
    own = dict(plain.named_parameters())
    for path, change in handle.changes.items():
        with torch.no_grad():
            target, values = own[path], change.adapter_parameters
            if change.rank:
                delta = change.scale * (values["B"][0] @ values["A"][0])
                if change.rows is not None:
                    delta = torch.zeros(16, 43, dtype=delta.dtype).index_copy(0, change.rows, delta)
                delta = delta.T if "embed" in path else delta
                target.add_(delta)
                if "magnitude" in values:
                    norms = target.norm(dim=0 if "embed" in path else 1)
                    target.mul_(values["magnitude"] / norms)
            if change.tokens is not None:
                target[change.tokens] = change.token_rows.to(target.dtype)
    return plain


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_have_their_rows_and_the_others_the_bases_on_every_path(name, tied):
    model, handle = attached(tied, CONFIGS[name])
    expected = defined(model, handle)(IDS).logits
    assert error(model(IDS).logits, expected) < 1e-12
    for path in ("factored", "materialised"):
        with veneer.use(model, "default", path=path):
            assert error(model(IDS).logits, expected) < 1e-12
    copied = copy.deepcopy(model)
    assert error(copied(IDS).logits, expected) < 1e-12
    with veneer.use(model, None):
        assert torch.equal(model(IDS).logits, llama(tied)(IDS).logits)
    with veneer.use(model, ["default", None]):
        both = model(IDS).logits
    assert error(both[:1], expected[:1]) < 1e-12
    assert error(both[1:], llama(tied)(IDS).logits[1:]) < 1e-12


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_writes_the_very_rows_and_leaves_the_others_to_the_bit(tied, dtype):
    model, handle = attached(tied, ALONE, dtype)
    base, before = bits(model), dict(llama(tied, dtype).named_parameters())
    rows = handle.changes[EMBED].token_rows.detach().clone()
    handle.merge(rounding="nearest")
    weight = model.model.embed_tokens.weight
    assert torch.equal(weight[NEW], rows.to(dtype))
    assert torch.equal(weight[:40], before[EMBED][:40])
    handle.unmerge()
    assert all(torch.equal(value, base[key]) for key, value in bits(model).items())
    handle.merge()  # as it rounds by itself, where the change is small
    assert torch.equal(weight[:40], before[EMBED][:40])


@pytest.mark.parametrize("name", ["alone", "same", "dora"])
def test_the_gradient_is_that_of_the_rows(name):
    model, handle = attached(True, CONFIGS[name])
    model(IDS, labels=IDS).loss.backward()
    plain = defined(model, handle)
    plain(IDS, labels=IDS).loss.backward()
    change = handle.changes[EMBED]
    found = dict(change.named_parameters())["token_rows"].grad
    assert error(found, plain.model.embed_tokens.weight.grad[NEW]) < 1e-10


def test_it_starts_as_the_base_and_trains_its_rows_alone():
    model = llama(dtype=torch.float32)
    expected = model(IDS).logits
    handle = veneer.attach(model, ALONE)
    assert error(model(IDS).logits, expected) < 1e-6
    ((name, rows),) = handle.named_parameters()
    assert name == f"{EMBED}.token_rows"
    assert torch.equal(rows, model.model.embed_tokens.weight[NEW])
    assert handle.summary().trainable == 3 * 16
    loss = model(IDS, labels=IDS).loss
    with Shapes() as made:
        loss.backward()
    assert rows.grad.shape == (3, 16)
    assert model.model.embed_tokens.weight.grad is None
    assert not {(43, 16), (16, 43)} & made.shapes  # no gradient of the size of the embedding
    assert (3, 16) in made.shapes
    veneer.check(model, IDS)


def test_the_head_of_an_untied_model_is_trained_when_it_is_named():
    config = veneer.LoraConfig(
        targets=(), trainable_tokens={"embed_tokens": NEW, "lm_head": NEW[:2]}
    )
    model, handle = attached(False, config)
    assert {path: tuple(change.token_rows.shape) for path, change in handle.changes.items()} == {
        EMBED: (3, 16), HEAD: (2, 16)
    }  # fmt: skip
    assert error(model(IDS).logits, defined(model, handle)(IDS).logits) < 1e-12
    low = veneer.LoraConfig(rank=2, targets="lm_head", trainable_tokens={"lm_head": NEW})
    model, handle = attached(False, low)
    expected = defined(model, handle)(IDS).logits
    assert error(model(IDS).logits, expected) < 1e-12
    handle.merge()
    assert error(model(IDS).logits, expected) < 1e-12


def test_under_autocast_and_in_16_bits_it_is_near_the_definition():
    model, handle = attached(True, ALONE, torch.float32)
    expected = defined(model, handle)(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(model(IDS).logits, expected) < 0.05
    narrow, handle = attached(True, ALONE, torch.bfloat16)
    assert error(narrow(IDS).logits, defined(narrow, handle)(IDS).logits) < 0.05


def test_a_scaled_embedding_and_one_with_a_norm_have_their_own_forward():
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(9, 5, max_norm=1.0).double())
    handle = veneer.attach(table, veneer.LoraConfig(targets=(), trainable_tokens=[2, 4]))
    with torch.no_grad():
        handle.parameters()[0].mul_(2)
    weight = table[0].weight.detach().clone()
    weight[[2, 4]] = handle.parameters()[0].detach()
    ids = torch.tensor([[0, 2, 4, 8]])
    plain = nn.functional.embedding(ids, weight.clone(), max_norm=1.0)
    assert error(table(ids), plain) < 1e-6


def test_several_adapters_with_tokens_blend_and_train_one_after_the_other():
    model, one = attached()
    two = veneer.attach(model, veneer.LoraConfig(targets=(), trainable_tokens=[41, 5]), "two")
    with torch.no_grad():
        two.parameters()[0].add_(0.1)
    plain = llama()
    with torch.no_grad():
        weight = plain.model.embed_tokens.weight
        W = weight.clone()
        for handle, share in ((one, 0.7), (two, 0.3)):
            changed = W.clone()
            changed[handle.changes[EMBED].tokens] = handle.parameters()[0]
            weight.add_(share * (changed - W))
    with veneer.use(model, {"default": 0.7, "two": 0.3}):
        assert error(model(IDS).logits, plain(IDS).logits) < 1e-12


def test_a_parametrised_head_has_trained_rows_too():
    model = nn.Sequential(
        nn.Embedding(9, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 9))
    )
    ids, base = torch.arange(9), model(torch.arange(9)).detach()
    handle = veneer.attach(model, veneer.LoraConfig(targets=(), trainable_tokens={"1": [3, 4]}))
    assert error(model(ids), base) < 1e-6
    with torch.no_grad():
        handle.changes["1.weight"].token_rows.zero_()
    expected = base.index_copy(1, torch.tensor([3, 4]), model[1].bias[3:5].detach().expand(9, 2))
    assert error(model(ids), expected) < 1e-6


def test_lora_plus_trains_rows_at_the_rate_that_was_asked_for():
    _, handle = attached(True, CONFIGS["same"], torch.float32)
    groups = veneer.optim.lora_plus(handle, lr=1e-3)
    assert [
        group["lr"] for group in groups if handle.changes[EMBED].token_rows in set(group["params"])
    ] == [1e-3]


def test_a_padding_row_is_trained_where_it_is_named():
    model, plain = llama(tied=False, pad_token_id=3), llama(tied=False, pad_token_id=3)
    handle = veneer.attach(model, veneer.LoraConfig(targets=(), trainable_tokens=[3, 40]))
    ((_, rows),) = handle.named_parameters()
    with torch.no_grad():
        rows.add_(0.1 * torch.randn_like(rows))
        plain.model.embed_tokens.weight[[3, 40]] = rows
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    model(IDS).logits.square().sum().backward()
    assert rows.grad.abs().amin(-1).gt(0).all()
    handle.merge()
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)


def refused(model, words, **fields):
    before = bits(model)
    with pytest.raises(TargetError, match=words):
        veneer.attach(model, veneer.LoraConfig(**{"rank": 2, "targets": "q_proj", **fields}))
    assert type(model.model.embed_tokens) is nn.Embedding
    assert all(torch.equal(value, before[key]) for key, value in bits(model).items())


def test_what_cannot_be_trained_is_told_and_nothing_is_attached():
    refused(
        llama(),
        r"ids 43, 50 of .*embed_tokens.* 43 rows.*resize_token_embeddings\(51\)",
        trainable_tokens=[43, 50],
    )
    refused(llama(), "matches no module", trainable_tokens={"embed": [1]})
    refused(llama(), "RMSNorm", trainable_tokens={"model.norm": [1]})
    refused(
        llama(), "other trainable_tokens", trainable_tokens={"embed_tokens": [1], "lm_head": [2]}
    )
    refused(llama(), "dropout", trainable_tokens=[1], targets="embed_tokens", dropout=0.1)
    refused(llama(), "in full", trainable_tokens=[1], train_also="embed_tokens")
    for tokens in ([1, 1], [-1], [True], "7", [1.0], {"embed_tokens": []}):
        with pytest.raises(ConfigError, match="trainable_tokens"):
            veneer.LoraConfig(trainable_tokens=tokens)
    with pytest.raises(ConfigError, match="targets"):
        veneer.LoraConfig(targets=())
    with pytest.raises(TargetError, match="path"):
        veneer.attach(nn.ModuleList([nn.Embedding(4, 2), nn.Embedding(4, 2)]), ALONE)


def test_a_config_with_tokens_is_a_value():
    assert veneer.LoraConfig(trainable_tokens={}) == veneer.LoraConfig()
    for tokens in (NEW, {"embed_tokens": NEW}, {41, 40}):
        config = veneer.LoraConfig(trainable_tokens=tokens)
        assert veneer.LoraConfig.from_dict(config.to_dict()) == config
