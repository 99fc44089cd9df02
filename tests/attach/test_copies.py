"""Adapted models that are moved, cast, copied, averaged, shared and made on the meta device, for
every layer kind."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from tests.support.models import IDS, TinyLM
from tests.support.toys import ALL, adapt, bits, cast, error, example, flat, randomise, selected
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import veneer
from veneer.attach.layer.state import COPIES_WITHOUT_ROOT
from veneer.errors import MergeError, VeneerError
from veneer.layers import LAYERS
from veneer.variants import VARIANTS

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
examples = pytest.mark.parametrize(("kind", "number"), EXAMPLES)
kinds = pytest.mark.parametrize("kind", LAYERS.names())


@examples
def test_a_meta_model_that_gets_its_numbers_later(kind, number):
    real, args = example(kind, number)
    plain = copy.deepcopy(real)
    adapt(real, "a", "b")
    for assign in (False, True):
        other = copy.deepcopy(plain).to("meta")
        for name in ("a", "b"):
            veneer.attach(other, ALL, name)
        assert {tensor.device.type for tensor in other.state_dict().values()} == {"meta"}
        if not assign:
            other.to_empty(device="cpu")
        other.load_state_dict(real.state_dict(), assign=assign)
        for name in ("a", "b", None):
            with veneer.use(real, name), veneer.use(other, name):
                assert torch.equal(flat(other(*args)), flat(real(*args)))


@pytest.mark.parametrize("variant", [variant.name for variant in VARIANTS if not variant.needs])
def test_a_whole_model_from_the_meta_device(variant):
    config = veneer.LoraConfig(rank=2, targets="all", variant=variant, bias="targets")
    model = TinyLM(tied=True)
    with torch.device("meta"):
        other = TinyLM(tied=True)
        veneer.attach(other, config)
    real = copy.deepcopy(model)
    randomise(veneer.attach(real, config))
    other.to_empty(device="cpu")
    other.load_state_dict(real.state_dict())
    assert torch.equal(other(IDS), real(IDS))
    assert other.lm_head.weight is not other.model.embed_tokens.weight  # torch's `to_empty` unties
    with pytest.raises(
        MergeError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight'.* untied since"
    ):
        veneer.merge(other)
    other.lm_head.weight = other.model.embed_tokens.weight
    veneer.merge(other)
    assert error(other(IDS), real(IDS)) < 1e-4
    veneer.unmerge(other)
    veneer.detach(other)
    with veneer.use(real, None):
        assert torch.equal(other(IDS), real(IDS))


@kinds
@pytest.mark.parametrize("variant", ["lora", "dora", "vera", "pissa"])
def test_the_default_device_does_not_decide_where_an_adapter_lives(kind, variant):
    outputs = []
    for device in ("cpu", "meta"):
        module, args = example(kind)
        torch.manual_seed(1)
        with torch.device(device):
            veneer.attach(module, veneer.LoraConfig(rank=2, targets="all", variant=variant))
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
        randomise(veneer.Handle(module, "default"))
        with torch.device(device):
            outputs.append(flat(module(*args)))
            veneer.merge(module)
            veneer.unmerge(module)
    assert torch.equal(*outputs)


def test_128_adapters_are_copied_once_and_for_themselves(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    names = [f"a{number}" for number in range(128)]
    adapt(model, *names, config=veneer.LoraConfig(rank=4))
    x = torch.randn(3, 512)

    def outputs(of):
        return [selected(of, name, x) for name in ("a0", "a77", "a127", None)]

    expected = outputs(model)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    torch.save(model, tmp_path / "model.pt")
    pickled = pickle.dumps(model)
    copied = copy.deepcopy(model)
    assert (tmp_path / "model.pt").stat().st_size < 1.1 * size
    assert len(pickled) < 1.1 * size
    tensors = {t.data_ptr(): t.untyped_storage().nbytes() for t in _tensors(copied)}
    assert sum(tensors.values()) < 1.1 * size
    for other in (
        copied,
        pickle.loads(pickled),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert all(torch.equal(*pair) for pair in zip(outputs(other), expected, strict=True))
        for parameter in veneer.Handle(other, "a77").parameters():
            parameter.data.add_(1)
        assert not torch.equal(selected(other, "a77", x), expected[1])
        assert torch.equal(selected(other, "a127", x), expected[2])
        veneer.merge(other, "a0")
        veneer.unmerge(other)
        veneer.detach(other, "a0")
        assert all(torch.equal(*pair) for pair in zip(outputs(model), expected, strict=True))


def _tensors(model):
    for module in model.modules():
        for value in module.__dict__.values():
            yield from (
                leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)
            )


@kinds
def test_moving_casting_and_freezing_a_model(kind):
    module, args = example(kind)
    adapt(module, "a", "b")
    veneer.detach(module, "b")
    exact = flat(module(*args))
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(module).to(dtype)
        assert {p.dtype for p in other.parameters()} == {dtype}
        y = other(*cast(args, dtype))
        assert {leaf.dtype for leaf in pytree.tree_leaves(y) if leaf.is_floating_point()} == {dtype}
        assert error(flat(y), exact) < (0.05 if dtype == torch.bfloat16 else 1e-5)
        veneer.merge(other)
        veneer.unmerge(other)
    assert {p.dtype for p in copy.deepcopy(module).half().parameters()} == {torch.float16}
    away = copy.deepcopy(module).to("meta")
    assert pytree.tree_leaves(away(*pytree.tree_map(_away, args)))[0].device.type == "meta"
    module.requires_grad_(False)
    assert torch.equal(flat(module(*args)), exact)
    assert not flat(module(*args)).requires_grad
    module.share_memory()
    assert all(tensor.is_shared() for tensor in module.state_dict().values())
    assert torch.equal(flat(module(*args)), exact)


def _away(leaf):
    return leaf.to("meta") if isinstance(leaf, (torch.Tensor, PackedSequence)) else leaf


def test_state_dicts_vectors_and_averages():
    model = TinyLM(tied=True)
    checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
    adapt(model, "a", "b")
    assert [key for key in model.state_dict() if "veneer" not in key] == list(checkpoint)
    with pytest.raises(RuntimeError, match=r"Missing key.*veneer"):
        model.load_state_dict(checkpoint)  # a whole state has the adapters too
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert all("veneer" in key for key in missing)
    assert not unexpected
    handle = veneer.Handle(model, "a")
    vector = nn.utils.parameters_to_vector(handle.parameters())
    before = selected(model, "a", IDS)
    nn.utils.vector_to_parameters(vector * 2, handle.parameters())
    assert error(selected(model, "a", IDS), before) > 1e-3
    nn.utils.vector_to_parameters(vector, handle.parameters())
    assert (
        error(selected(model, "a", IDS), before) < 1e-6
    )  # elsewhere in memory, products round otherwise

    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(model)  # the first one copies
    nn.utils.vector_to_parameters(vector * 2, handle.parameters())
    average.update_parameters(model)
    nn.utils.vector_to_parameters(vector * 1.5, handle.parameters())
    assert error(selected(average, "a", IDS), selected(model, "a", IDS)) < 1e-6
    assert error(selected(average, None, IDS), selected(model, None, IDS)) < 1e-6


def two_layers():
    model = adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "default")
    return model, veneer.Handle(model, "default")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_in_the_same_model_is_one_error_of_every_operation(tmp_path, way):
    model, handle = two_layers()
    handle.save(tmp_path / "saved")
    x, before = torch.randn(3, 4), bits(model)
    expected = model(x)
    model.append(way(model[1]))
    operations = {
        "merge": handle.merge,
        "unmerge": handle.unmerge,
        "save": lambda: handle.save(tmp_path / "again"),
        "detach": handle.detach,
        "load": lambda: veneer.load(model, tmp_path / "saved", name="b"),
        "attach": lambda: veneer.attach(model, ALL, "b"),
        "check": lambda: veneer.check(model, x),
        "use": lambda: veneer.use(model, None),
        "rows": lambda: veneer.use(model, ["default", None, None]),
        "parameters": handle.parameters,
        "summary": handle.summary,
    }
    for operation in operations.values():
        with pytest.raises(
            VeneerError, match=r"another model object at 2\b.*detach before copying"
        ) as caught:
            operation()
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "again").exists()
    assert all(torch.equal(value, before[name]) for name, value in bits(model[:2]).items())
    del model[2]
    assert torch.equal(model(x), expected)
    handle.merge()
    assert error(model(x), expected) < 1e-5
    handle.unmerge()
    handle.detach()
    model.append(copy.deepcopy(model[1]))
    assert list(veneer.attach(model, ALL).layers) == ["0", "1", "2"]


def test_a_merged_model_with_a_copied_layer_is_not_unmerged_in_part():
    model, handle = two_layers()
    handle.merge()
    model.append(copy.deepcopy(model[1]))
    before = bits(model)
    for operation in (handle.unmerge, lambda: handle.detach(keep_merged=True)):
        with pytest.raises(VeneerError, match="another model object at 2"):
            operation()
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_whole_copies_and_layers_copied_out_are_free():
    """A copy of the model is known to be one as it is made, so that `use` goes on without a walk; a
    layer alone may be used anywhere but in a model with adapters of its own."""
    gc.collect()  # the models of other tests
    before = len(COPIES_WITHOUT_ROOT)
    model, _ = two_layers()
    x = torch.randn(3, 4)
    other, wrapped = copy.deepcopy(model), copy.deepcopy(nn.ModuleList([model]))[0]
    assert len(COPIES_WITHOUT_ROOT) == before
    layer = copy.deepcopy(model[1])
    assert len(COPIES_WITHOUT_ROOT) == before + 1
    for whole in (model, other, wrapped):
        assert not torch.equal(selected(whole, None, x), selected(whole, "default", x))
    assert torch.equal(layer(x), model[1](x))
    again = pickle.loads(pickle.dumps(model))
    assert len(COPIES_WITHOUT_ROOT) == before + 2
    veneer.merge(again)
    del layer
    gc.collect()
    assert len(COPIES_WITHOUT_ROOT) == before
