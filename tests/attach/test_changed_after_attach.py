"""A model that is changed after an adapter was attached, or called otherwise than it was selected
for: each is right, or an error that says so."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.toys import error, randomise
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import veneer
from veneer.bases.parametrized import Symmetric
from veneer.errors import SelectionError


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def attach_two(model, **config):
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", **config), name))
    return model


ROWS = [["a"] * 4, [None] * 4, [{"a": 0.5, "b": 0.5}] * 4, ["a", "b"] * 2]


@pytest.mark.parametrize("rows", ROWS, ids=repr)
@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_a_batch_of_another_number_of_rows_is_an_error_whatever_they_use(rows, count):
    model = attach_two(Mlp())
    with veneer.use(model, rows), pytest.raises(SelectionError, match="do not hold the 4 rows"):
        model(torch.randn(count, 4))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Mlp, (torch.randn(4, 4),)),
        (lambda: nn.Embedding(5, 4), (torch.tensor([[0, 1], [2, 3], [4, 4], [0, 0]]),)),
        (lambda: nn.Conv1d(4, 4, 2), (torch.randn(4, 4, 3),)),
        (lambda: nn.LSTM(4, 4), (torch.randn(3, 4, 4),)),
        (lambda: nn.MultiheadAttention(4, 2), (torch.randn(3, 4, 4),) * 3),
        (
            lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            (torch.randn(4, 3, 4),),
        ),
        (
            lambda: nn.EmbeddingBag(5, 4),
            (torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 3, 4])),
        ),
    ],
)
@pytest.mark.parametrize("choice", ["a", None])
def test_rows_that_use_the_same_are_a_plain_call(make, inputs, choice):
    model = attach_two(make())
    with veneer.use(model, choice):
        expected = model(*inputs)
    with veneer.use(model, [choice] * 4):
        outputs = model(*inputs)
    first = expected[0] if isinstance(expected, tuple) else expected
    assert error(outputs[0] if isinstance(outputs, tuple) else outputs, first) < 1e-6
    with (
        veneer.use(model, [choice] * 6),
        pytest.raises(SelectionError, match="do not hold the 6 rows"),
    ):
        model(*inputs)


def test_a_merged_adapter_may_still_be_named_for_each_row():
    model = Mlp()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    x = torch.randn(4, 4)
    expected = model(x)
    veneer.merge(model)
    with veneer.use(model, ["default"] * 4):
        assert error(model(x), expected) < 1e-5


def lost_forms(tmp_path):
    return {
        "merge": lambda handle: handle.merge(),
        "save": lambda handle: handle.save(tmp_path / "adapter"),
        "parameters": lambda handle: handle.parameters(),
        "summary": lambda handle: handle.summary(),
        "check": lambda handle: veneer.check(handle.model, torch.randn(4, 4)),
    }


@pytest.mark.parametrize("form", ["merge", "save", "parameters", "summary", "check"])
@pytest.mark.parametrize("replacement", [lambda: nn.Linear(4, 6), nn.Identity])
def test_a_layer_that_was_replaced_after_attach_is_named(tmp_path, form, replacement):
    model = Mlp()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    weight, layer = model.down.weight.clone(), model.up
    model.up = replacement()
    with pytest.raises(SelectionError, match="'up' of adapter 'default', replaced or taken out"):
        lost_forms(tmp_path)[form](handle)
    assert torch.equal(model.down.weight, weight)
    assert not [*tmp_path.iterdir()]
    model.up = layer
    lost_forms(tmp_path)[form](handle)
    if form != "merge":
        model.up = replacement()
        veneer.detach(model)
        assert type(model.down) is nn.Linear


LAYERS = [
    (lambda: nn.Linear(4, 4), (2, 4)),
    (lambda: nn.Conv1d(4, 4, 1), (2, 4, 4)),
    (lambda: nn.Conv2d(4, 4, 1, padding_mode="circular", padding=1), (2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(4, 4, 1), (2, 4, 4)),
]


@pytest.mark.parametrize("variant", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("path", [None, "factored", "materialised"])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_an_input_of_a_dtype_that_the_layer_refuses_is_refused(variant, path, make, shape):
    model = nn.Sequential(make())
    attach_two(model, variant=variant)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        for choice in ("a", {"a": 0.5, "b": 0.5}, ["a", "b"], None):
            with veneer.use(model, choice, path=path), pytest.raises(RuntimeError, match="type"):
                model(x)
    with veneer.use(model, "a", path=path), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(shape).half()).isfinite().all()


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)


def parametrised(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())


def spectrally_normed(layer):
    parametrizations.spectral_norm(layer)


def normed_by_a_hook(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


def taken_away(layer):
    weight = layer._parameters.pop("weight")
    layer.weight = weight.detach()


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.first(x) + self.second(x) * self.third(x)


KINDS = [
    (Square, "second", torch.randn(2, 4)),
    (lambda: nn.Sequential(nn.Conv1d(4, 4, 4)), "0", torch.randn(2, 4, 5)),
    (lambda: nn.Sequential(nn.Embedding(4, 4)), "0", torch.tensor([[1, 2], [0, 3]])),
]


@pytest.mark.parametrize(
    "change",
    [pruned, parametrised, spectrally_normed, normed_by_a_hook, taken_away],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
@pytest.mark.parametrize(("make", "path", "x"), KINDS, ids=["linear", "conv", "embedding"])
def test_a_weight_that_is_kept_otherwise_after_attach_is_named(
    tmp_path, change, variant, make, path, x
):
    model = make().eval()
    if make is not Square and change is parametrised:
        model.get_submodule(path).weight.data = torch.randn(
            4, 4, *model.get_submodule(path).weight.shape[2:]
        )
    attach_two(model, variant=variant)
    handle = veneer.Handle(model, "a")
    change(model.get_submodule(path))
    match = rf"'{path}.weight' \(\w+\), pruned or parametrised"
    # layers that read the same input are computed together if it has a graph
    inputs = [x, x.clone().requires_grad_() * 1] if x.is_floating_point() else [x]
    for choice in ("a", {"a": 0.5, "b": 0.5}, ["a", "b"], ["a", "a"]):
        for way, call_input in itertools.product((None, "materialised"), inputs):
            with veneer.use(model, choice, path=way), pytest.raises(SelectionError, match=match):
                model(call_input)
    for call in (
        handle.merge,
        lambda: handle.save(tmp_path / "adapter"),
        lambda: veneer.check(model, x, "a"),
    ):
        with pytest.raises(SelectionError, match=match):
            call()
    assert not [*tmp_path.iterdir()]
    with veneer.use(model, None):
        expected = model(x)
    veneer.detach(model)
    assert not any("veneer" in name for name, _ in model.named_modules())
    assert torch.equal(model(x), expected), "the layer computes as it was changed to"
    if change in (parametrised, spectrally_normed):  # what hooks make cannot be adapted
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", variant="lora"))
        assert error(model(x), expected) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_weight_may_be_pruned_for_good(variant):
    model = attach_two(Square(), variant=variant)
    pruned(model.second)
    prune.remove(model.second, "weight")
    x = torch.randn(2, 4)
    with veneer.use(model, "a"):
        expected = model(x)
    veneer.merge(model, "a")
    with veneer.use(model, "a"):
        assert error(model(x), expected) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("choice", ["a", ["a", "b"], {"a": 0.5, "b": 0.5}], ids=repr)
@pytest.mark.parametrize("way", [None, "materialised"])
def test_a_bias_that_is_pruned_after_attach_stays_pruned(variant, choice, way):
    """The adapter does not change it."""
    model, plain, x = attach_two(Square(), variant=variant), Square(), torch.randn(2, 4)
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "veneer" not in name}
    )
    for one in (model, plain):
        prune.random_unstructured(one.second, "bias", amount=4)
    for name in ("a", "b"):  # a change of nothing
        for path, change in veneer.Handle(model, name).changes.items():
            nn.init.zeros_(change.get_parameter("B"))
            if variant == "dora":
                change.get_parameter("magnitude").data = (
                    model.get_parameter(path).detach().norm(dim=1)
                )
    with veneer.use(model, choice, path=way):
        assert error(model(x), plain(x)) < 1e-5


def pruned_bias(layer):
    prune.l1_unstructured(layer, "bias", amount=1)


def parametrised_bias(layer):
    parametrize.register_parametrization(layer, "bias", nn.Softplus())


def buffered_bias(layer):
    layer.register_buffer("bias", layer._parameters.pop("bias").detach())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("change", [pruned_bias, parametrised_bias, buffered_bias])
def test_a_bias_that_is_no_parameter_when_an_adapter_comes_is_added(variant, change):
    model, x = Square(), torch.randn(2, 4)
    change(model.second)
    attach_two(model, variant=variant)
    for choice in ("a", ["a", "b"], ["b", None], {"a": 0.5, "b": 0.5}):
        with veneer.use(model, choice, path="materialised"):
            expected = model(x)
        with veneer.use(model, choice):
            assert error(model(x), expected) < 1e-5


def test_a_bias_that_is_trained_in_full_and_pruned_is_named(tmp_path):
    model = Square()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, bias="targets"))
    prune.random_unstructured(model.second, "bias", amount=4)
    for call in (
        lambda: model(torch.randn(2, 4)),
        handle.merge,
        lambda: handle.save(tmp_path / "adapter"),
    ):
        with pytest.raises(
            SelectionError, match=r"'second.bias' \(Linear\), pruned or parametrised"
        ):
            call()
