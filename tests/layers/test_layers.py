"""Every layer kind × variant × dtype: factored = materialised = merged = float64 arithmetic on W +
ΔW, and gradients too."""

from __future__ import annotations

import copy
import inspect
import itertools
import types

import pytest
import torch
from tests.support.cells import pairwise
from tests.support.toys import Squared, cast, definition, error, flat, randomise
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import veneer
from veneer import context
from veneer.layers import LAYERS, Layer
from veneer.variants import VARIANTS

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip
from tests.support.layer_reference import PATHS, _float, reference, weight_at

#: torch tells once that it has no faster kernel for projections
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
BOUNDS = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2}
#: what a variant that looks at data needs is its own test's business
PLAIN = [variant.name for variant in VARIANTS if not variant.needs]
examples = pytest.mark.parametrize(("kind", "number"), EXAMPLES)
# : every option of every kind for a variant without and one with a gain; every variant for one
# option of each kind
CASES = [
    (example, variant)
    for example in EXAMPLES
    for variant in PLAIN
    if not example[1] or variant in ("lora", "toy_scaled")
]


def cases(*axes):
    """Every case with every value of these axes; the quick suite has each pair of values."""
    return pairwise((*case, *values) for case in CASES for values in itertools.product(*axes))


def make(kind: str, number: int, dtype: torch.dtype):
    torch.manual_seed(number)
    module, args = list(LAYERS[kind].examples())[number]
    args = args if isinstance(args, tuple) else (args,)
    return module.to(dtype).eval(), cast(args, dtype)


def attached(module, variant="lora", rank=2, name="default", **fields):
    handle = veneer.attach(
        module,
        veneer.LoraConfig(rank=rank, targets="all", variant=variant, alpha=3, **fields),
        name,
    )
    randomise(handle)
    return handle


@pytest.mark.parametrize(("kind", "number", "variant", "dtype"), cases(BOUNDS))
def test_three_ways_to_compute_it_agree(kind, number, variant, dtype):
    module, args = make(kind, number, dtype)
    base = module(*args)
    handle = attached(module, variant)
    expected, _, _ = reference(handle, args)
    with torch.no_grad():
        factored = module(*args)
        with context.override(path="materialised"):
            materialised = module(*args)
        handle.merge()
        merged = module(*args)
    bound = BOUNDS[dtype] * (3 if kind == "recurrent" and dtype == torch.bfloat16 else 1)
    assert (
        flat(factored).dtype == flat(materialised).dtype == flat(merged).dtype == flat(base).dtype
    )
    assert error(flat(factored), expected) < bound
    assert error(flat(materialised), expected) < bound
    assert error(flat(merged), expected) < bound
    assert error(flat(base), expected) > 1e-3, (
        "the adapter changes nothing here, so this test would prove nothing"
    )


@pytest.mark.parametrize(
    ("kind", "number", "variant", "dtype", "path"), cases([torch.float64, torch.float32], PATHS)
)
def test_gradients_equal_float64_autograd_through_the_changed_weight(
    kind, number, variant, dtype, path
):
    module, args = make(kind, number, dtype)
    handle = attached(module, variant)
    expected, leaves, args64 = reference(handle, args)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    inputs64 = [x for x in pytree.tree_leaves(args64) if _float(x)]
    wanted = torch.autograd.grad((expected * weights).sum(), [*leaves.values(), *inputs64])
    args = pytree.tree_map(lambda x: x.detach().clone().requires_grad_() if _float(x) else x, args)
    own = dict(handle.named_parameters())
    assert list(own) == list(leaves)
    with context.override(path=path):
        y = flat(module(*args))
    inputs = [x for x in pytree.tree_leaves(args) if _float(x)]
    found = torch.autograd.grad((y * weights.to(dtype)).sum(), [*own.values(), *inputs])
    assert any(gradient.abs().sum() > 0 for gradient in wanted)
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert error(gradient, expected_gradient) < (2e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(
    "fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "every entry"]
)
@examples
def test_gradcheck(kind, number, fast):
    """Fast: the Jacobian times random vectors, which an entry that is wrong changes as well."""
    module, args = make(kind, number, torch.float64)
    handle = attached(module)
    # piecewise functions have no derivative at their corners, which a difference quotient may
    # straddle
    smooth = getattr(module, "mode", "") != "max" and getattr(module, "nonlinearity", "") != "relu"
    if (
        smooth
        and getattr(module, "max_norm", None) is None
        and not getattr(module, "scale_grad_by_freq", False)
    ):
        assert torch.autograd.gradcheck(
            lambda *_: flat(module(*args)), list(handle.parameters()), fast_mode=fast
        )


def merges():
    """(kind, number, dtype, how often): what one merge leaves is seen after three, and what adds up
    is no matter of the layer; the slow suite merges each kind a thousand times."""
    for example in EXAMPLES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            thousand = example == ("linear", 0)
            yield pytest.param(*example, dtype, 1000 if thousand else 3)
            if not thousand and example[1] == 0:
                yield pytest.param(*example, dtype, 1000, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kind", "number", "dtype", "times"), list(merges()), ids=str)
def test_a_thousand_merges_leave_no_trace(kind, number, dtype, times):
    module, _ = make(kind, number, dtype)
    handle = attached(module)
    before = {
        name: value.clone() for name, value in module.state_dict().items() if "veneer" not in name
    }
    for _ in range(times):
        handle.merge()
        handle.unmerge()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    handle.merge()
    changed = [
        *handle.changes,
        *(
            f"{at}.{name}".lstrip(".")
            for at, p in handle.layers.items()
            for name in dict(p.full.named_parameters())
        ),
    ]
    assert all(not torch.equal(module.state_dict()[name], before[name]) for name in changed)


@pytest.mark.parametrize(
    ("kind", "variant", "dtype"),
    pairwise(itertools.product(LAYERS.names(), PLAIN, [torch.bfloat16, torch.float16])),
)
def test_merged_weights_are_rounded_correctly_once(kind, variant, dtype):
    """Each merged weight is one of the two 16-bit neighbours of W + ΔW, and no neighbour is
    nearer."""
    module, _ = make(kind, 0, dtype)
    handle = attached(module, variant)
    exact = {}
    for path, change in handle.changes.items():
        low, gain = change.resolve(weight_at(module, path), torch.float64)
        exact[path] = change.changed_weight(
            weight_at(module, path), low, gain, torch.float64
        ).detach()
    handle.merge(rounding="nearest")
    for path, values in exact.items():
        merged = weight_at(module, path).detach()
        distance = (merged.double() - values).abs()
        for toward in (-torch.inf, torch.inf):
            neighbour = _next(merged, toward)
            assert bool((distance <= (neighbour.double() - values).abs()).all())


def _next(values, toward):
    """The next number of a 16-bit dtype, by its bits: torch has nextafter for wider ones only."""
    bits = values.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    ordered = torch.where(bits >= 0x8000, 0x8000 - bits, bits) + (1 if toward > 0 else -1)
    back = torch.where(ordered < 0, 0x8000 - ordered, ordered)
    return back.to(torch.int32).bitwise_and(0xFFFF).to(torch.int16).view(values.dtype)


@pytest.mark.parametrize(("kind", "number", "variant", "dtype"), cases(BOUNDS))
def test_attaching_changes_no_output(kind, number, variant, dtype):
    module, args = make(kind, number, dtype)
    before = flat(module(*args))
    veneer.attach(module, veneer.LoraConfig(rank=2, targets="all", variant=variant))
    after = flat(module(*args))
    if VARIANTS[variant].exact_start:
        assert (
            error(after, before)
            < {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        )
    # A layer that runs on W + ΔW runs in float32 for a 16-bit base, and so rounds better than the
    # base does.
    if variant in ("lora", "rslora") and (
        dtype != torch.bfloat16 or module.veneer.supports_factored
    ):
        assert torch.equal(after, before)


@examples
@pytest.mark.parametrize("variant", ["lora", "toy_scaled"])
def test_dropout_is_the_same_on_both_paths_and_absent_in_eval(kind, number, variant):
    module, args = make(kind, number, torch.float64)
    handle = attached(module, variant, dropout=0.5)
    if not handle.changes:
        return  # vectors are trained in full: there is no low-rank path
    undropped, _, _ = reference(handle, args)
    assert error(flat(module(*args)), undropped) < 1e-10
    for part in handle.changes.values():
        part.train()
    outputs = []
    for path in PATHS:
        torch.manual_seed(3)
        with context.override(path=path):
            outputs.append(flat(module(*args)))
    assert error(*outputs) < 1e-10
    assert error(outputs[0], undropped) > 1e-4
    torch.manual_seed(4)
    assert error(flat(module(*args)), outputs[0]) > 1e-4, "another seed drops other inputs"


def test_dropout_on_an_embedding_drops_whole_tokens():
    module = nn.Embedding(50, 8)
    handle = attached(module, dropout=0.5)
    ids = torch.arange(50)
    with torch.no_grad():
        change = module(ids) - module.weight
        undropped = module.eval()(ids) - module.weight
    kept = change.abs().sum(-1) > 0
    assert 10 < kept.sum() < 40
    torch.testing.assert_close(change[kept], 2 * undropped[kept])
    assert handle.config.dropout == 0.5


def test_padding_row_of_an_embedding_stays_as_it_is():
    module = nn.Embedding(9, 5, padding_idx=3)
    veneer.attach(module, veneer.LoraConfig(rank=2, targets="all"))
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimiser.zero_grad()
        module(torch.tensor([0, 3, 5])).pow(2).sum().backward()
        optimiser.step()
    with torch.no_grad():
        assert torch.equal(module(torch.tensor([3])), module.weight[3:4])
        assert not torch.equal(module(torch.tensor([5])), module.weight[5:6])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_forward_of_its_own_sees_the_changed_weight(dtype):
    """A subclass need not be linear in its weight: only W + ΔW is right for it."""
    module, x = Squared(7, 5).to(dtype), torch.randn(3, 7).to(dtype)
    (change,) = attached(module).changes.values()
    low, _ = change.resolve(module.weight)
    weight = module.weight.double() + low.delta(torch.float64)[0]
    expected = x.double() @ (weight * weight.abs()).T + module.bias.double()
    assert error(module(x), expected) < BOUNDS[dtype]
    assert module(x).dtype == dtype


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "recurrent", "parameter"])
def test_a_small_change_survives_in_sixteen_bits(kind):
    """‖ΔW‖/‖W‖ = 1e-4: rounding W + ΔW to bfloat16 would lose nearly all of it; no path may."""
    module, args = make(kind, 0, torch.bfloat16)
    handle = attached(module)
    for path, change in handle.changes.items():
        weight = weight_at(module, path)
        change.scale *= (1e-4 * weight.double().norm() / change.resolve(weight)[0].norm()).item()
    for part in handle.layers.values():
        for name, parameter in part.full.named_parameters():
            parameter.data.copy_(getattr(module, name))  # vectors stay as they are
    changed, _, _ = reference(handle, args)
    with veneer.use(module, None):
        plain = copy.deepcopy(module)
    veneer.detach(plain)
    exact = changed - flat(plain.double()(*cast(args, torch.float64)))
    for path in PATHS:
        with context.override(path=path), torch.no_grad():
            wide = copy.deepcopy(
                module
            ).float()  # the same bf16 weights, outputs not rounded to bf16
            y = flat(wide(*cast(args, torch.float32)))
            with veneer.use(wide, None):
                base = flat(wide(*cast(args, torch.float32)))
        assert error(y.double() - base.double(), exact) < 2e-2
        with context.override(path=path):
            flat(module(*args)).float().square().sum().backward()
        assert all(
            p.grad.abs().sum() > 0 for name, p in handle.named_parameters() if name.endswith(".B")
        )


class Activated(nn.Module):
    """A bare parameter and a child without tensors; it keeps the dtype of the weight it reads."""

    def __init__(self):
        super().__init__()
        self.weight, self.activation = nn.Parameter(torch.randn(5, 7)), nn.GELU()

    def forward(self, x):
        self.dtype = self.weight.dtype
        return self.activation(x @ self.weight.T)


def test_a_child_without_tensors_leaves_the_changed_weight_in_float32():
    module = Activated().bfloat16()
    attached(module)
    assert module(torch.randn(3, 7).bfloat16()).dtype == torch.bfloat16
    assert module.dtype == torch.float32


def test_the_gain_of_dora_keeps_its_digits_over_a_16_bit_base():
    module = nn.Linear(64, 64, bias=False).bfloat16()
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, targets="all", variant="dora"))
    handle.changes["weight"].magnitude.data.mul_(1.003)  # bfloat16 has steps of 0.8 % above 1
    x = torch.randn(256, 64).bfloat16()
    with torch.no_grad():
        with veneer.use(module, None):
            base = module(x).double()
        for path in PATHS:
            with context.override(path=path):
                ratio = (module(x).double() * base).sum() / base.square().sum()
            assert ratio.item() == pytest.approx(1.003, abs=1e-3)


class Standardised(nn.Conv2d):
    """A convolution that is not linear in its weight, with torch's own ``forward``."""

    def _conv_forward(self, x, weight, bias):
        mean = weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight - mean * mean, bias)


def test_a_convolution_of_its_own_runs_on_the_changed_weight():
    module, x = Standardised(3, 4, 3).double(), torch.randn(2, 3, 6, 6).double()
    (change,) = attached(module).changes.values()
    delta = change.resolve(module.weight)[0].delta()[0].view_as(module.weight)
    expected = module._conv_forward(x, module.weight + delta, module.bias)
    assert error(module(x), expected) < 1e-10


@pytest.mark.parametrize("size", [8, 200])
def test_a_convolution_replaced_on_the_module_is_called(size):
    """As for seamless tiles: circular padding by a function, in place of the module's zeros."""
    module = nn.Conv2d(4, 4, 3, padding=1)

    def tile(self, x, weight, bias):
        return torch.nn.functional.conv2d(
            torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
        )

    module._conv_forward = types.MethodType(tile, module)
    (change,) = attached(module).changes.values()
    x = torch.randn(1, 4, size, size)
    delta = change.resolve(module.weight)[0].delta()[0].view_as(module.weight)
    expected = tile(module, x, module.weight + delta, module.bias)
    assert error(module(x), expected) < 1e-5


def test_keyword_inputs_and_unbatched_inputs():
    linear, convolution = nn.Linear(4, 3), nn.Conv2d(2, 3, 3)
    handle = attached(linear)
    x = torch.randn(4)
    assert torch.equal(linear(input=x), linear(x))
    with context.override(path="materialised"):
        torch.testing.assert_close(linear(input=x), linear(x))
    attached(convolution)
    image = torch.randn(2, 5, 5)
    torch.testing.assert_close(convolution(image), convolution(image[None])[0])
    assert handle.layers


@pytest.mark.parametrize("kind", LAYERS.names())
def test_autocast_keeps_the_adapter_and_the_output_dtype(kind):
    module, args = make(kind, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        base = flat(module(*args))
    handle = attached(module)
    expected, _, _ = reference(handle, args)
    with torch.autocast("cpu", torch.bfloat16):
        y = flat(module(*args))
        y.float().sum().backward()
    assert y.dtype == base.dtype
    assert error(y, expected) < 2e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.parameters())


TELLS = [kind.name for kind in LAYERS if type(kind).inputs is not Layer.inputs]


@pytest.mark.parametrize(
    ("kind", "number"), [example for example in EXAMPLES if example[0] in TELLS]
)
def test_inputs_are_the_rows_that_each_weight_multiplies(kind, number):
    """The gradient of a weight is a product with its inputs, so each of its rows is a combination
    of them; and the output of a layer with one weight is the weight times them, in some order."""
    module, args = make(kind, number, torch.float64)
    layer, y = LAYERS[kind], flat(module(*args))
    gradients = torch.autograd.grad(
        (y * torch.randn_like(y)).sum(), list(module.parameters()), allow_unused=True
    )
    gradient_of = dict(zip(dict(module.named_parameters()), gradients, strict=True))
    names = [*layer.weights(module), *(f"{child}.weight" for child in layer.below(module))]
    for name in names:
        weight, owner = module.get_parameter(name), LAYERS["linear"] if "." in name else layer
        dims = owner.dims(module, weight.shape)
        rows = layer.inputs(module, name, inputs_of(module, args))
        assert rows.shape == (dims.groups, rows.shape[1], dims.in_)
        gradient = owner.unfold(gradient_of[name].to_dense(), dims)
        assert error(gradient @ torch.linalg.pinv(rows) @ rows, gradient) < 1e-9
        bounded = (
            getattr(module, "max_norm", None) is not None or getattr(module, "mode", "") == "max"
        )
        if len(names) == 1 and not bounded:
            bias = getattr(module, "bias", None)
            linear = flat(
                definition(module, {} if bias is None else {"bias": torch.zeros_like(bias)}, args)
            )
            found = (rows @ owner.unfold(weight, dims).mT).flatten()
            assert error(found.sort().values, linear.sort().values) < 1e-10


def inputs_of(module, args):
    """The arguments of a call, with the defaults of those that were not given."""
    given = inspect.signature(module.forward).bind(*args)
    given.apply_defaults()
    return given.args


def test_telling_inputs_draws_no_random_number_and_changes_nothing():
    module, args = make("attention", 1, torch.float64)
    before, state, kept = flat(module(*args)), torch.get_rng_state(), dict(module.__dict__)
    LAYERS["attention"].inputs(module, "out_proj.weight", inputs_of(module, args))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat(module(*args)), before)
    assert module.__dict__ == kept


@pytest.mark.parametrize("lengths", [[4, 2, 1], [2, 4, 1, 4], [3, 3]])
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_of_a_packed_batch_use_their_own_adapters(lengths, batch_first):
    module = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=batch_first).double()
    padded = torch.randn(max(lengths), len(lengths), 5, dtype=torch.float64)
    ordered = lengths == sorted(lengths, reverse=True)
    x = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=ordered)
    states = tuple(torch.randn(4, len(lengths), 4, dtype=torch.float64) for _ in range(2))
    attached(module, name="a")
    attached(module, name="b")
    names = ["a", None, "b", "a"][: len(lengths)]
    with torch.no_grad(), veneer.use(module, names):
        y, hidden = module(x, states)
    for row, name in enumerate(names):
        with torch.no_grad(), veneer.use(module, name):
            whole, (h, c) = module(x, states)
        found, expected = pad_packed_sequence(y)[0][:, row], pad_packed_sequence(whole)[0][:, row]
        assert error(found, expected) < 1e-12
        assert error(hidden[0][:, row], h[:, row]) < 1e-12
        assert error(hidden[1][:, row], c[:, row]) < 1e-12
    assert torch.equal(y.batch_sizes, x.batch_sizes)
    assert (y.sorted_indices is None) == (x.sorted_indices is None)
    if y.sorted_indices is not None:
        assert torch.equal(y.sorted_indices, x.sorted_indices)


@pytest.mark.parametrize(
    "module", [nn.LSTMCell(5, 4), nn.LSTM(5, 4, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=5)]
)
def test_weights_of_one_module_may_have_changes_of_different_ranks(module, tmp_path):
    """LoKr's product has a rank that depends on the sizes of the weight; a folder says it for each
    weight."""
    model = nn.Sequential(copy.deepcopy(module))
    fresh = copy.deepcopy(model)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", variant="lokr"))
    randomise(handle)
    assert len({change.resolve(None)[0].rank for change in handle.changes.values()}) > 1
    handle.save(tmp_path / "adapter")
    again = veneer.load(fresh, tmp_path / "adapter")
    loaded = dict(again.named_parameters())
    assert all(torch.equal(number, loaded[name]) for name, number in handle.named_parameters())


def test_a_kind_says_which_of_its_methods_is_missing():
    class Unfinished(Layer):
        name = "unfinished"

        def types(self):
            return ()

        def examples(self):
            return iter(())

    kind, x = Unfinished(), torch.ones(1)
    calls = {"op": (x, x, None), "update": (x, None, None), "inputs": ("weight", ())}
    for method, arguments in calls.items():
        with pytest.raises(NotImplementedError, match=rf"'unfinished'.*{method}\(\).*Unfinished"):
            getattr(kind, method)(None, *arguments)
