"""A blend {name: weight} is W + Σ wᵢ (W′ᵢ − W) for every layer kind and variant, in a call and in
one row of it, and gradients reach each of its adapters."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tests.support.models import IDS, ConvNet, Stack, TinyLM
from tests.support.rows import EXAMPLES, ROWS, rows_of
from tests.support.tiny import tiny_model
from tests.support.toys import adapt, calibration, definition, error, example, flat, randomise
from torch import nn
from torch.utils import _pytree as pytree

import veneer
from veneer.attach.layer.state import LAYER_STATE_NAME
from veneer.errors import SelectionError
from veneer.layers import LAYERS, Layer
from veneer.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

MIX = {"a": 0.7, "b": -0.4}
CASES = [(*case, "lora") for case in EXAMPLES]
CASES += [
    (kind, number, name)
    for kind, number in EXAMPLES
    if number == 0
    for name in VARIANTS.names()
    if name != "lora"
]
CASES = [
    case
    for case in CASES
    if not ("inputs" in VARIANTS[case[2]].needs and type(LAYERS[case[0]]).inputs is Layer.inputs)
]


def bits(model):
    """Every parameter and buffer that is the base's own."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        path: value.detach().clone()
        for path, value in own.items()
        if LAYER_STATE_NAME not in path.split(".")
    }


def whole(model, name):
    """All parameters and buffers while an adapter is merged. Rows of bounded norm are renormed by
    forward, which reads the blend: so not here."""
    bounded = {
        module: module.max_norm
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
    }
    for module in bounded:
        module.max_norm = None
    veneer.merge(model, name, rounding="nearest")
    found = bits(model)
    veneer.unmerge(model)
    for module, norm in bounded.items():
        module.max_norm = norm
    return found


def mixed(model, mix):
    base, sums = bits(model), bits(model)
    for name, weight in mix.items():
        for path, value in whole(model, name).items():
            if value.is_floating_point():
                sums[path] = sums[path] + weight * (value - base[path])
    return sums


def plain(model):
    """The model without adapters, as another object."""
    other = copy.deepcopy(model)
    veneer.detach(other)
    return other


def blended_output(model, mix, args):
    with torch.no_grad():
        return flat(definition(plain(model), mixed(model, mix), args))


def with_adapters(module, args, variant):
    """Two adapters of other ranks, of which the second one also trains the biases that there
    are."""
    biased = any(own._parameters.get("bias") is not None for own in module.modules())
    for name, rank, bias in (("a", 2, "none"), ("b", 1, "all" if biased else "none")):
        config = veneer.LoraConfig(rank=rank, targets="all", alpha=3, variant=variant, bias=bias)
        randomise(veneer.attach(module, config, name, **calibration(module, variant, args)))
    return module


@pytest.mark.parametrize(("kind", "number", "variant"), CASES)
def test_a_blend_is_the_weighted_sum_of_the_changes_of_each_weight(kind, number, variant):
    module, args = example(kind, number, torch.float64)
    module(*args)  # an embedding's max_norm writes into its rows when they are first read
    with_adapters(module, args, variant)
    expected = blended_output(module, MIX, args)
    with veneer.use(module, MIX), torch.no_grad():
        blend = flat(module(*args))
    assert error(blend, expected) < 1e-9
    with veneer.use(module, "a"), torch.no_grad():
        assert error(flat(module(*args)), blend) > 1e-6


@pytest.mark.parametrize(("kind", "number"), ROWS)
def test_a_blend_in_one_row_of_a_batch_is_that_row_under_the_blend_alone(kind, number):
    module, args = example(kind, number, torch.float64)
    adapt(module, "a", "b")
    count, axis = rows_of(module, args)
    choices = [["a", MIX, None, {"b": 1}, {"a": 0}, dict(MIX)][row % 6] for row in range(count)]
    if count > 2:
        choices[-1] = MIX
    first = {}
    for choice in choices:
        with veneer.use(module, choice), torch.no_grad():
            first[str(choice)] = leaf(module(*args))
    with veneer.use(module, choices), torch.no_grad():
        together = leaf(module(*args))
    for row, choice in enumerate(choices):
        assert error(together.select(axis, row), first[str(choice)].select(axis, row)) < 1e-10


def leaf(output):
    return next(one for one in pytree.tree_leaves(output) if isinstance(one, torch.Tensor))


@functools.cache
def bent(kind, number):
    """Whether torch's own gradient of a module is not the slope of its forward."""
    module, _ = example(kind, number)
    return getattr(module, "max_norm", None) is not None or getattr(
        module, "scale_grad_by_freq", False
    )


@pytest.mark.parametrize(
    ("kind", "number", "variant"), [case for case in CASES if not bent(*case[:2])]
)
def test_training_through_a_blend_gives_each_adapter_its_gradient(kind, number, variant):
    """Against central differences of PyTorch's own forward on the blend of the merged weights."""
    module, args = example(kind, number, torch.float64)
    module(*args)
    with_adapters(module, args, variant)
    with torch.no_grad(), veneer.use(module, MIX):
        probe = torch.randn_like(flat(module(*args)))
    with veneer.use(module, MIX):
        (flat(module(*args)) * probe).sum().backward()
    for name in "ab":
        own = dict(veneer.Handle(module, name).named_parameters())
        assert own
        assert all(p.grad is not None and p.grad.norm() > 0 for p in own.values())
        if variant.startswith(
            "dora"
        ):  # which holds the norm fast in backward: A and B have another slope by design
            own = {key: p for key, p in own.items() if not key.endswith((".A", ".B"))}
        step = {key: torch.randn_like(p) for key, p in own.items()}
        slope = sum((p.grad * step[key]).sum() for key, p in own.items()).item()
        ends = []
        for sign in (1, -2):  # forwards, then backwards
            with torch.no_grad():
                for key, p in own.items():
                    p.add_(step[key], alpha=sign * 1e-6)
            ends.append((blended_output(module, MIX, args) * probe).sum().item())
        with torch.no_grad():
            for key, p in own.items():
                p.add_(step[key], alpha=1e-6)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("variant", [name for name in VARIANTS.names() if name != "toy_scaled"])
def test_the_gradient_through_a_blend_is_the_weight_times_the_adapters_own(variant):
    """Where the output is linear in the changed weight."""
    module, x, probe = (
        nn.Linear(6, 5, bias=False).double(),
        torch.randn(4, 6).double(),
        torch.randn(4, 5).double(),
    )
    with_adapters(module, (x,), variant)
    grads = {}
    for choice in ("a", "b", MIX):
        module.zero_grad()
        with veneer.use(module, choice):
            (module(x) * probe).sum().backward()
        for name in MIX if choice is MIX else (choice,):
            for key, p in veneer.Handle(module, name).named_parameters():
                grads[str(choice), name, key] = p.grad.clone()
    for name, weight in MIX.items():
        for key, _ in veneer.Handle(module, name).named_parameters():
            assert error(grads[str(MIX), name, key], weight * grads[name, name, key]) < 1e-10


@pytest.mark.parametrize("make_model", [TinyLM, lambda: TinyLM(tied=True), Stack, tiny_model],
                         ids=["lm", "tied", "stack", "llama"])  # fmt: skip
def test_a_blend_through_whole_models(make_model):
    model = make_model().double().eval()
    adapt(model, "a", "b")
    with torch.no_grad(), veneer.use(model, MIX):
        blend = flat(leaf(model(IDS)))
    other = plain(model)
    other.load_state_dict(mixed(model, MIX), strict=False)
    with torch.no_grad():
        assert error(blend, flat(leaf(other(IDS)))) < 1e-9


def test_a_blend_of_two_variants_of_a_tied_weight_forms_it_at_the_head():
    """There the gain of one of them scales inputs, whichever comes last."""
    model = TinyLM(tied=True)
    for name, variant in (("a", "dora"), ("b", "lora")):
        config = veneer.LoraConfig(rank=2, targets="all", variant=variant)
        randomise(veneer.attach(model, config, name))
    with veneer.use(model, MIX, path="materialised"):
        expected = model(IDS)
    with veneer.use(model, MIX):
        assert error(model(IDS), expected) < 1e-5


def test_what_one_adapter_changes_thinly_and_another_trains_in_full_is_blended_as_one():
    model = TinyLM().double()
    thin = veneer.LoraConfig(rank=2, targets=["lm_head", "q_proj"])
    adapt(model, "a", config=thin)
    adapt(model, "b", config=veneer.LoraConfig(rank=2, targets=["q_proj"], train_also=["lm_head"]))
    with torch.no_grad(), veneer.use(model, MIX):
        blend = model(IDS)
    assert error(blend.flatten(), blended_output(model, MIX, (IDS,))) < 1e-9


def test_running_statistics_blend_in_eval_mode_and_are_refused_in_training_mode():
    model, x = ConvNet().double(), torch.randn(4, 3, 9, 9).double()
    adapt(model, "a", "b")
    for name in "ab":  # which moves the statistics of each
        with veneer.use(model, name):
            model(x + torch.randn_like(x))
    before = bits(model), [value.clone() for value in model.buffers()]
    with (
        veneer.use(model, MIX),
        pytest.raises(SelectionError, match="a blend at a BatchNorm2d in training mode"),
    ):
        model(x)
    assert all(
        torch.equal(one, other) for one, other in zip(before[1], model.buffers(), strict=True)
    )
    model.eval()
    with veneer.use(model, MIX), torch.no_grad():
        blend = flat(model(x))
    assert error(blend, blended_output(model, MIX, (x,))) < 1e-9
    assert all(
        torch.equal(one, other) for one, other in zip(before[1], model.buffers(), strict=True)
    )


def test_a_blend_in_bfloat16_is_rounded_once():
    """Also of a weight that is read past its module, where each adapter's own was rounded before it
    was blended."""
    from tests.support.models import Attention

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.below = nn.Linear(64, 64, bias=False)
            self.attention = Attention(64)

        def forward(self, x):
            return nn.functional.linear(x, self.below.weight)

    model, x = Reads().bfloat16(), torch.eye(64).bfloat16()
    adapt(model, "a", "b", config=veneer.LoraConfig(rank=2, targets=["below"]), size=0.02)
    double = copy.deepcopy(model).double()
    want = mixed(double, {"a": 0.5, "b": 0.5})["below.weight"].mT
    with torch.no_grad(), veneer.use(model, {"a": 0.5, "b": 0.5}):
        assert torch.equal(model(x), want.bfloat16())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_blend_of_plain_adapters_is_pefts_own_sum(tmp_path):
    """PEFT's add_weighted_adapter of the kind "cat" is the exact sum of plain changes."""
    import peft

    model = tiny_model()
    for name in "ab":
        adapt(
            model,
            name,
            config=veneer.LoraConfig(rank=2 if name == "a" else 5, targets="all-linear"),
        )
        veneer.save(model, tmp_path / name, name=name)
    with torch.no_grad(), veneer.use(model, {"a": 0.7, "b": 0.3}):
        blend = model(IDS).logits
    theirs = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "a"), adapter_name="a")
    theirs.load_adapter(str(tmp_path / "b"), adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mixed", combination_type="cat")
    theirs.set_adapter("mixed")
    with torch.no_grad():
        assert error(blend, theirs(IDS).logits) < 1e-5


def test_the_choices_of_a_bank_and_of_use_mean_the_same(tmp_path):
    model = adapt(TinyLM().eval(), "a", "b")
    for name in "ab":
        veneer.save(model, tmp_path / name, name=name)
    choices = ["a", MIX]
    with torch.no_grad(), veneer.use(model, choices):
        ours = model(IDS)
    veneer.detach(model)
    bank = veneer.Bank(model)
    for name in "ab":
        bank.add(tmp_path / name)
    with torch.no_grad(), bank.rows(choices):
        assert error(ours, model(IDS)) < 1e-5


def test_a_blend_that_is_one_adapter_is_that_adapter():
    model = adapt(TinyLM(), "a", "b")
    outputs = {}
    for key, choice in {
        "a": "a",
        "one": {"a": 1},
        "zero": {"a": 1.0, "b": 0},
        "none": {"a": 0.0},
        "base": None,
    }.items():
        with veneer.use(model, choice), torch.no_grad():
            outputs[key] = model(IDS)
    assert torch.equal(outputs["a"], outputs["one"])
    assert torch.equal(outputs["a"], outputs["zero"])
    assert torch.equal(outputs["base"], outputs["none"])
    veneer.merge(model, "a")
    with veneer.use(model, {"a": 1}), torch.no_grad():
        assert error(model(IDS), outputs["a"]) < 1e-5
    with veneer.use(model, MIX), pytest.raises(SelectionError, match="is merged"):
        model(IDS)


def test_a_blend_of_a_detached_adapter_is_an_error():
    model = adapt(TinyLM(), "a", "b", "c")
    with veneer.use(model, MIX), pytest.raises(SelectionError, match="'b', which was detached"):
        veneer.detach(model, "b")
        model(IDS)


def test_checkpointing_and_compiled_calls_follow_a_blend():
    model = adapt(TinyLM(), "a", "b")
    with veneer.use(model, MIX):
        plain_y = model(IDS)
        again = torch.utils.checkpoint.checkpoint(model, IDS, use_reentrant=False)
        compiled = torch.compile(model, backend="aot_eager")(IDS)
        assert error(again, plain_y) < 1e-6
        assert error(compiled, plain_y) < 1e-6
        again.square().sum().backward()
    assert all(p.grad is not None for name in "ab" for p in veneer.Handle(model, name).parameters())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "a blend of nothing"),
        ([{}], "a blend of nothing"),
        ({"a": float("nan")}, "weight nan of 'a'"),
        ({"a": 0.5, "b": float("inf")}, "weight inf of 'b'"),
        ({"a": "0.5"}, "weight '0.5' of 'a'"),
        ({"a": True}, "weight True of 'a'"),
        ({"a": None}, "weight None of 'a'"),
        ({"a": 10**400}, "weight 1000.* of 'a'"),
        ({"a": torch.tensor(0.5)}, r"weight tensor\(0.5000\) of 'a'"),
        ({"a": 0.5, "c": 0.5}, "no adapter named 'c'"),
        ({"a": 0.5, 3: 0.5}, "no adapter named 3"),
        ({"a": 0.5, None: 0.5}, "the weight of None"),
        (["a", {"c": 1.0}], "no adapter named 'c'"),
        (["a", ["b"]], "no adapter named"),
        ({"a", "b"}, "to use"),
        (3, "3 to use"),
    ],
)
def test_what_is_no_choice_is_one_clear_error(choice, message):
    model = adapt(TinyLM(), "a", "b")
    with pytest.raises(SelectionError, match=message):
        veneer.use(model, choice)
