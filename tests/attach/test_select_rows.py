"""Rows of one batch that use different adapters equal each row alone, for every layer kind whose
inputs hold rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.models import IDS, Stack, TinyLM
from tests.support.tiny import tiny_model
from tests.support.toys import adapt, error, example, flat, numbers, selected
from torch import nn
from torch.utils import _pytree as pytree

import veneer
from veneer.errors import SelectionError

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip
from tests.support.rows import ROWS, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize(("kind", "number"), ROWS)
def test_mixed_rows_equal_each_row_alone(kind, number):
    module, args = example(kind, number, torch.float64)
    adapt(module, "a", "b", "unused")
    count, axis = rows_of(module, args)
    names = list(itertools.islice(itertools.cycle(["a", None, "b"]), count))

    def run(selection):
        with veneer.use(module, selection):
            return module(*args)

    run(None)  # an embedding's max_norm writes into the base's own rows when the base itself runs
    whole = {name: run(name) for name in set(names)}
    mixed = run(names)
    first = pytree.tree_leaves(mixed)[0]
    for row, name in enumerate(names):
        expected = pytree.tree_leaves(whole[name])[0].select(axis, row)
        assert error(first.select(axis, row), expected) < 1e-10
    assert [leaf.shape for leaf in pytree.tree_leaves(mixed)] == [
        leaf.shape for leaf in pytree.tree_leaves(whole["a"])
    ]
    assert torch.equal(flat(run(["b"] * count)), flat(run("b")))

    module.zero_grad()
    flat(mixed).square().sum().backward()
    reached = {key for key, parameter in module.named_parameters() if parameter.grad is not None}
    assert reached == {key for name in set(names) - {None} for key in numbers(module, name)}


def test_recurrent_states_of_mixed_rows_are_in_order():
    module = adapt(nn.LSTM(5, 4, num_layers=2, batch_first=True), "a", "b")
    x, names = torch.randn(3, 4, 5), ["b", "a", "b"]
    with veneer.use(module, names):
        y, states = module(x)
    for row, name in enumerate(names):
        with veneer.use(module, name):
            wanted, own = module(x[row : row + 1])
        assert error(y[row : row + 1], wanted) < 1e-5
        assert all(
            error(state[:, row], mine[:, 0]) < 1e-5 for state, mine in zip(states, own, strict=True)
        )


def encoder():
    from transformers import BertConfig, BertModel

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()


@pytest.mark.parametrize("make_model", [TinyLM, lambda: TinyLM(tied=True), Stack, tiny_model, encoder],
                         ids=["lm", "tied", "stack", "llama", "encoder"])  # fmt: skip
def test_mixed_rows_through_whole_models(make_model):
    model = (
        make_model().double().eval()
    )  # in float32 a toy's gradients lose four digits on some processors
    exclude = [
        f"*{kind}_embeddings" for kind in ("position", "token_type") if hasattr(model, "embeddings")
    ]
    adapt(model, "a", "b", config=veneer.LoraConfig(rank=2, targets="all", exclude=exclude))
    ids, names = torch.randint(0, 17, (5, 6)), ["a", None, "b", "b", None]

    def run(selection, ids):
        with veneer.use(model, selection):
            y = model(ids)
        return y if isinstance(y, torch.Tensor) else y[0]

    mixed = run(names, ids)
    for row, name in enumerate(names):
        assert error(mixed[row], run(name, ids[row : row + 1])[0]) < 1e-10
    model.zero_grad()
    run(["a", None, "a", "a", None], ids).square().mean().backward()
    actual = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert actual
    assert all("b" not in key.split(".") for key in actual)
    model.zero_grad()
    (run("a", ids[[0, 2, 3]]).square().sum() / mixed.numel()).backward()
    assert all(
        error(actual[key], p.grad) < 1e-10 for key, p in model.named_parameters() if key in actual
    )


def test_generation_with_an_adapter_for_each_row():
    model = adapt(tiny_model(), "a", "b", size=1.0)
    ids, names = torch.randint(3, 200, (3, 5)), ["a", None, "b"]

    def generate(selection, ids):
        with veneer.use(model, selection):
            mask = torch.ones_like(ids)
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
            )

    mixed = generate(names, ids)
    alone = [generate(name, ids[row : row + 1])[0] for row, name in enumerate(names)]
    assert torch.equal(mixed, torch.stack(alone))
    assert not torch.equal(generate("b", ids[:1])[0], alone[0])


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (nn.Linear(4, 4), (torch.randn(6, 4),)),
        (
            nn.GRU(5, 4),
            (nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 5), torch.tensor([4, 2])),),
        ),
        (nn.LSTM(5, 4), (torch.randn(3, 2, 5),)),
        (nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3),
        (nn.EmbeddingBag(9, 5), (torch.arange(6), torch.tensor([0, 2]))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_that_cannot_be_told_are_an_error(module, args):
    adapt(module, "a", "b")
    before = selected(module, "a", *args)
    with (
        pytest.raises(SelectionError, match="do not hold the 3 rows"),
        veneer.use(module, ["a", "b", None]),
    ):
        module(*args)
    assert torch.equal(flat(selected(module, "a", *args)), flat(before))


@pytest.mark.parametrize("positional", range(3, 9))
def test_every_argument_of_attention_reaches_mixed_rows(positional):
    module = adapt(nn.MultiheadAttention(8, 2, batch_first=True), "a", "b")
    x, mask = torch.randn(3, 4, 8), torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    args = (x, x, x, torch.arange(4).expand(3, 4) > 2, True, mask, False, False)
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    kwargs = dict(zip(names[positional:], args[positional:], strict=True))
    with veneer.use(module, ["a", None, "b"]):
        mixed = module(*args[:positional], **kwargs)
        with pytest.raises(TypeError):
            module(*args, None)
    assert mixed[1].shape == (3, 2, 4, 4)  # a head each: average_attn_weights=False
    for row, name in enumerate(["a", None, "b"]):
        alone = selected(module, name, *args)
        assert all(
            error(one[row], other[row]) < 1e-5 for one, other in zip(mixed, alone, strict=True)
        )


class Scaled(nn.MultiheadAttention):
    """One that takes more than torch's."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False, scale=1.0):  # fmt: skip
        y, weights = super().forward(query, key, value, key_padding_mask, need_weights, attn_mask,
                                     average_attn_weights, is_causal)  # fmt: skip
        return y * scale, weights


def test_arguments_of_a_subclass_of_attention_reach_mixed_rows():
    module = adapt(Scaled(8, 2), "a", "b")
    args = (*[torch.randn(4, 2, 8)] * 3, None, False, None, True, False, 3.0)
    with veneer.use(module, ["a", "b"]):
        y, _ = module(*args)
    assert error(y[:, 1], selected(module, "b", *args)[0][:, 1]) < 1e-5


class Encoder(nn.Module):
    """One without children, whose forward calls another method that reads the weight."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(4, 5))

    def encode(self, x):
        return x @ self.proj

    def forward(self, x):
        return self.encode(x).relu()


def test_mixed_rows_reach_a_method_that_forward_calls():
    module, x, names = adapt(Encoder(), "a", "b"), torch.randn(3, 4), ["a", None, "b"]
    with veneer.use(module, names):
        y, code = module(x), module.encode(x)
    for row, name in enumerate(names):
        with veneer.use(module, name):
            assert error(y[row], module(x)[row]) < 1e-6
            assert error(code[row], module.encode(x)[row]) < 1e-6


class TimeFirst(nn.Module):
    """Says nowhere but in its GRU that its second axis counts the rows."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.GRU(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


def layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0, **options).eval()


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (TimeFirst(), (torch.randn(3, 3, 4),)),
        (layer(), (torch.randn(3, 3, 8),)),
        (nn.TransformerDecoderLayer(8, 2, 12), (torch.randn(3, 3, 8), torch.randn(3, 3, 8))),
        (layer(batch_first=True), (torch.randn(3, 3, 8), torch.ones(3, 3).triu(1).bool())),
    ],
    ids=["recurrent", "encoder", "decoder", "mask"],
)
def test_rows_along_either_of_two_axes_are_an_error(module, args):
    adapt(module, "a", "b")
    names = ["a", "b", None]
    with pytest.raises(SelectionError, match="3 along two axes"), veneer.use(module, names):
        module(*args)
    if isinstance(module, nn.TransformerEncoderLayer) and module.self_attn.batch_first:
        with veneer.use(module, names):
            y = module(args[0])
        assert all(
            error(y[row], selected(module, name, args[0])[row]) < 1e-5
            for row, name in enumerate(names)
        )


def test_what_mixed_rows_need_of_the_names():
    model = adapt(TinyLM(), "a", "b")
    with pytest.raises(SelectionError, match="no names"):
        veneer.use(model, [])
    with (
        pytest.raises(SelectionError, match="'b', which was detached"),
        veneer.use(model, ["a", "b"]),
    ):
        veneer.detach(model, "b")
        model(IDS)
    veneer.merge(model, "a")
    with pytest.raises(SelectionError, match="is merged"), veneer.use(model, ["a", None]):
        model(IDS)


def test_hooks_fire_once_for_all_rows():
    model, fired = Stack(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    with veneer.use(adapt(model, "a", "b"), "a"):
        model(IDS)
    alone, fired[:] = list(fired), []
    with veneer.use(model, ["a", "b"]):
        model(IDS)
    below = {"encoder"}  # which runs whole for each adapter, and with it what is below
    assert [name for name in fired if name.split(".")[0] not in below or name in below] == [
        name for name in alone if name.split(".")[0] not in below or name in below
    ]


class Cached(nn.Module):
    """Attention as some decoders write it: reads a weight below directly, and keeps keys in an
    object that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, cache=None):
        key = nn.functional.linear(x, self.key.weight)
        if cache is not None:
            key = cache.update(key)
        return torch.softmax(self.query(x) @ key.mT, -1) @ key


class Cache:
    def __init__(self) -> None:
        self.keys = []

    def update(self, key):
        self.keys.append(key)
        return torch.cat(self.keys, 1)


def test_an_object_that_may_hold_rows_is_not_shared_between_them():
    module, x = adapt(Cached(), "a", "b"), torch.randn(2, 3, 4)
    with veneer.use(module, ["a", "b"]):
        y = module(x)
        with pytest.raises(
            SelectionError, match="a Cached given a Cache, which cannot be divided into rows"
        ):
            module(x, cache=Cache())
    for row, name in enumerate("ab"):
        assert error(y[row], selected(module, name, x)[row]) < 1e-5
        assert selected(module, name, x, Cache()).shape == x.shape
