"""Layers that other libraries keep quantised: adapted by their own forward and a product of two
thin matrices, never merged; in transformers' formats."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.support.quantised import COMPRESSED, FORMATS, IN, OUT, libraries, variants_of  # noqa: F401 (a fixture)
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.bases import BASES, storage_of, weight_of
from veneer.errors import MergeError, TargetError

CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(IN, IN), layer

    def forward(self, x):
        return self.layer(self.first(x))


def close(module: nn.Module, rounds: bool = True) -> float:
    """gptqmodel's own kernels multiply in float16. ``rounds``: what is compared goes by the x that
    w8a8 rounds."""
    if rounds and getattr(getattr(module, "quantization_scheme", None), "input_activations", None):
        return 1e-2
    return CLOSE[
        torch.float16 if type(module).__module__.startswith("gptqmodel") else torch.float32
    ]


def adapted(made, kind, real, **settings):
    torch.manual_seed(0)
    module, dense = made(kind, real=real)
    handle = veneer.attach(module, veneer.LoraConfig(rank=4, **settings))
    randomise(handle, 0.1)
    (change,) = handle.changes.values()
    return module, dense, handle, change


def bias_of(module):
    return module.bias.detach().double()


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_it_is_its_own_weight_and_reads_as_the_library_means_it(kind, real, libraries):  # noqa: F811
    module, dense = libraries(kind, real=real)
    storage = storage_of(weight_of(module, "weight"))
    assert storage is BASES["opaque"]
    assert weight_of(module, "weight") is module
    found = storage.dense(module)
    assert (found.dtype, found.shape) == (storage.dtype(module), storage.shape(module))
    assert error(found, dense) <= (2e-3 if found.dtype != torch.float32 else 1e-6)
    assert [other.name for other in BASES if other.holds(module)] == ["opaque"]


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_a_call_is_the_librarys_and_the_change(kind, real, libraries):  # noqa: F811
    module, dense, handle, change = adapted(libraries, kind, real)
    x = torch.randn(5, IN)
    low, gain = change.resolve_float64(module)
    assert gain is None
    delta = low.delta(torch.float64)[0]
    with torch.no_grad():
        expected = x.double() @ (dense + delta).mT + bias_of(module)
        assert error(module(x), expected) <= close(module)
        plain = handle.model  # the module itself
        with veneer.use(plain, None):
            base = module(x)
        assert error(base, x.double() @ dense.mT + bias_of(module)) <= close(module)
        assert error(module(x) - base, x.double() @ delta.mT) <= 10 * close(module, rounds=False)
        assert error(module(input=x) if "fp8" in kind else module(x), expected) <= close(module)


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_gradients_are_those_of_the_definition(kind, real, libraries):  # noqa: F811
    module, dense, _, change = adapted(libraries, kind, real)
    x = torch.randn(5, IN, requires_grad=True)
    weights = torch.randn(5, OUT)
    (module(x) * weights).sum().backward()
    A, B = (one.detach()[0].double().requires_grad_() for one in (change.A, change.B))
    seen = x.detach().double().requires_grad_()
    ((seen @ (dense + change.scale * B @ A).mT + bias_of(module)) * weights).sum().backward()
    for found, expected in (
        (x.grad, seen.grad),
        (change.A.grad[0], A.grad),
        (change.B.grad[0], B.grad),
    ):
        assert error(found, expected) <= 2 * close(module, rounds=False)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_the_hooks_of_accelerate_are_around_the_call(kind, real, when, libraries):  # noqa: F811
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    plain, *_ = adapted(libraries, kind, real)
    torch.manual_seed(0)
    module, _ = libraries(kind, real=real)
    if when == "before":
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
        if kind in COMPRESSED:
            with pytest.raises(TargetError, match="compressed-tensors"):
                veneer.attach(module, veneer.LoraConfig(rank=4))
            return
    handle = veneer.attach(module, veneer.LoraConfig(rank=4))
    randomise(handle, 0.1)
    if when == "after":
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    x, seen = (torch.ones(5, IN).cumsum(0).requires_grad_() for _ in range(2))
    for one, given in ((plain, x), (module, seen)):
        one(given).square().sum().backward()
    assert torch.equal(module(seen), plain(x))
    assert torch.equal(seen.grad, x.grad)
    assert torch.equal(
        storage_of(weight_of(module, "weight")).dense(module), storage_of(plain).dense(plain)
    )
    handle.detach()
    remove_hook_from_module(module)
    with veneer.use(plain, None), torch.no_grad():
        assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_a_call_without_arguments_is_the_librarys_error(kind, real, libraries):  # noqa: F811
    module, *_ = adapted(libraries, kind, real)
    with veneer.use(module, None), pytest.raises(TypeError):
        module()


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_a_merge_is_refused_with_the_way_out_and_changes_nothing(kind, real, libraries):  # noqa: F811
    module, _, handle, _ = adapted(libraries, kind, real)
    x = torch.randn(3, IN)
    with torch.no_grad():
        before = module(x)
        for rounding in ("auto", "faithful"):
            with pytest.raises(
                MergeError, match=r"Nothing was merged.*floating-point dtype \(.*merge there"
            ):
                handle.merge(rounding=rounding)
        assert torch.equal(module(x), before)


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_the_way_out_is_one(kind, real, libraries, tmp_path):  # noqa: F811
    """The folder loads on a layer in full precision, under the same names, and merges there."""
    torch.manual_seed(0)
    module, dense = libraries(kind, real=real)
    model = Net(module)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4))
    randomise(handle, 0.1)
    assert [*handle.changes] == ["first.weight", "layer.weight"]
    handle.save(tmp_path / "adapter")
    low, _ = handle.changes["layer.weight"].resolve_float64(module)
    again = veneer.load(copied(model), tmp_path / "adapter")
    x = torch.randn(3, IN)
    with torch.no_grad():
        assert torch.equal(again.model(x), model(x))
    full = Net(nn.Linear(IN, OUT))
    full.load_state_dict({"first.weight": model.first.weight, "first.bias": model.first.bias,
                          "layer.weight": dense.float(), "layer.bias": bias_of(module).float()})  # fmt: skip
    same = (
        kind in COMPRESSED
    )  # what its library makes dense are the very numbers that it meant while packed
    with nullcontext() if same else pytest.warns(veneer.UnverifiedAdapter):
        other = veneer.load(full, tmp_path / "adapter")
    other.merge()
    assert error(full.layer.weight, dense + low.delta(torch.float64)[0]) < 1e-6


def copied(model):
    """A copy without its adapters."""
    other = copy.deepcopy(model)
    veneer.detach(other)
    return other


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_check_summary_and_detach(kind, real, libraries):  # noqa: F811
    torch.manual_seed(0)
    module, _ = libraries(kind, real=real)
    model, own, state = Net(module), type(module), dict(module.__dict__)
    x = torch.randn(3, IN)
    with torch.no_grad():
        before = model(x)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4))
    report = veneer.check(model, x)
    assert "layer.weight" in report.weights
    summary = handle.summary()
    said = {
        "gptq": "GPTQ or AWQ",
        "awq": "GPTQ or AWQ",
        "hqq": "HQQ",
        "w4a16": "compressed-tensors",
    }
    said = {
        **said,
        "w8a8": said["w4a16"],
        "fp8": "FP8",
        "fp8 per tensor": "FP8",
        "fbgemm": "FP8 of fbgemm",
    }.get(kind, "FP8 of compressed-tensors")
    assert f"linear ({said}), lora" in str(summary)
    assert summary.trainable == 4 * (IN + IN) + 4 * (IN + OUT)
    randomise(handle, 0.1)
    handle.detach()
    assert type(module) is own
    assert module.__dict__.keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(("kind", "real"), variants_of())
@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_variants_that_read_the_weight_keep_the_bias(kind, real, variant, libraries):  # noqa: F811
    module, dense, _, change = adapted(libraries, kind, real, variant=variant)
    x = torch.randn(5, IN)
    low, gain = change.resolve_float64(module)
    W = dense + low.delta(torch.float64)[0]
    W = W if gain is None else W * gain[:, None]
    with torch.no_grad():
        assert error(module(x), x.double() @ W.mT + bias_of(module)) <= max(2e-3, close(module))


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_blends_and_rows_of_a_batch(kind, real, libraries):  # noqa: F811
    torch.manual_seed(0)
    module, dense = libraries(kind, real=real)
    handles = {name: veneer.attach(module, veneer.LoraConfig(rank=2), name) for name in "ab"}
    deltas = {}
    for name, handle in handles.items():
        randomise(handle, 0.1)
        (change,) = handle.changes.values()
        deltas[name] = change.resolve_float64(module)[0].delta(torch.float64)[0]
    x, tolerance = torch.randn(3, IN), max(2e-3, close(module))
    with torch.no_grad():
        with veneer.use(module, {"a": 0.5, "b": 2.0}):
            W = dense + 0.5 * deltas["a"] + 2 * deltas["b"]
            assert error(module(x), x.double() @ W.mT + bias_of(module)) <= tolerance
        with veneer.use(module, ["b", None, "a"]):
            found = module(x)
        for row, name in enumerate(("b", None, "a")):
            W = dense + (deltas[name] if name else 0)
            assert error(found[row], x[row].double() @ W.mT + bias_of(module)) <= tolerance


def test_rows_without_a_change_run_as_the_base_does(libraries):  # noqa: F811
    """W8A8 rounds the x of these rows too, and passes their gradient on."""
    model, x = Net(libraries("w8a8")[0]), torch.randn(2, IN)
    for name, target in (("a", "layer"), ("b", "first")):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=[target]), name), 0.1)
    with torch.no_grad():
        with veneer.use(model, None):
            base = model(x)
        with veneer.use(model, ["a", None]):
            assert error(model(x)[1], base[1]) < 1e-6
    grads = []
    for names in (["a", "b"], ["b", "b"]):
        model.zero_grad()
        with veneer.use(model, names):
            model(x)[1].square().sum().backward()
        grads.append([p.grad for p in veneer.Handle(model, "b").parameters()])
    for mixed, alone in zip(*grads, strict=True):
        assert error(mixed, alone) < 1e-5


@pytest.mark.parametrize(("kind", "real"), variants_of())
def test_copies_are_adapted_too(kind, real, libraries):  # noqa: F811
    module, _, _, _ = adapted(libraries, kind, real)
    other = copy.deepcopy(module)
    x = torch.randn(3, IN)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(other(x), expected)
        for parameter in module._modules["veneer"].parameters():
            parameter.zero_()
        assert torch.equal(other(x), expected)
        assert not torch.equal(module(x), expected)


def test_words_mean_these_layers_too(libraries):  # noqa: F811
    model = nn.ModuleDict(
        {"q_proj": libraries("gptq")[0], "up": libraries("hqq")[0], "norm": nn.LayerNorm(4)}
    )
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all-linear"))
    assert [*handle.changes] == ["q_proj.weight", "up.weight"]


# ----------------------------------------------------------------------------------------------
# what cannot be adapted


@pytest.mark.parametrize("targets", ["all", "experts", "experts.gate_up_proj"])
def test_experts_in_mxfp4_are_refused_with_the_way_out(targets, monkeypatch):
    """As transformers' loader leaves them: kernels' tensors in the place of parameters, biases
    beside them."""
    pytest.importorskip("transformers")
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    settings = {
        "num_local_experts": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
    }
    model = nn.ModuleDict(
        {"experts": Mxfp4GptOssExperts(GptOssConfig(**settings)), "q_proj": nn.Linear(4, 4)}
    )
    if targets == "all":
        with pytest.warns(UserWarning, match=r"MXFP4.*Mxfp4Config\(dequantize=True\)"):
            handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets))
        assert "q_proj.weight" in handle.changes
        return
    with pytest.raises(TargetError, match=r"MXFP4.*Mxfp4Config\(dequantize=True\)"):
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets))


def test_a_read_of_the_weight_leaves_the_mode_of_the_adapters(libraries):  # noqa: F811
    module, _ = libraries("gptq")
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, dropout=0.5))
    storage_of(module).dense(module)
    assert all(change.training for change in handle.changes.values())


def test_a_second_derivative_through_a_forward_without_one_is_an_error(libraries):  # noqa: F811
    module, *_ = adapted(libraries, "w8a8", False)
    x = torch.randn(2, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_product_of_torch_that_has_no_derivative_trains():
    """float8 as compressed-tensors' own class multiplies it, in torch's kernel for a CPU."""
    pytest.importorskip("transformers")
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    torch.manual_seed(0)
    weight = torch.randn(OUT, IN) * 0.1
    module = CompressedTensorsFP8Linear(IN, OUT)
    module.weight_scale.data = weight.abs().amax(1)[None] / 448
    module.weight.data = (weight / module.weight_scale.mT).to(torch.float8_e4m3fn)
    dense = module.weight.double() * module.weight_scale.double().mT
    handle = veneer.attach(module, veneer.LoraConfig(rank=2))
    randomise(handle, 0.1)
    (change,) = handle.changes.values()
    delta = change.resolve_float64(module)[0].delta(torch.float64)[0]
    x = torch.randn(5, IN, dtype=torch.bfloat16, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert error(y, x.double() @ (dense + delta).mT) < 0.05  # x in float8
    assert error(x.grad, torch.ones(5, OUT).double() @ (dense + delta)) < 0.01  # bfloat16


def test_the_gradient_is_the_same_in_pieces(libraries, monkeypatch):  # noqa: F811
    module, dense, _, change = adapted(libraries, "fbgemm", False)
    monkeypatch.setattr("veneer.bases.opaque.COLUMNS_PER_CALL", 24)
    x = torch.randn(3, 2, IN, requires_grad=True)
    module(x).sum().backward()
    low, _ = change.resolve_float64(module)
    assert (
        error(x.grad, torch.ones(3, 2, OUT).double() @ (dense + low.delta(torch.float64)[0])) < 2e-6
    )


def test_a_quantised_layer_that_nobody_knows_is_refused():
    class Strange(nn.Linear):
        def forward(self, x):
            return x

    layer = Strange(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"Strange, whose weight is stored as Parameter of torch.uint8"
    ):
        veneer.attach(nn.Sequential(layer), veneer.LoraConfig(rank=2))


def test_float8_in_another_forward_than_the_product_is_no_opaque_layer():
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import FP8GroupedLinear, FP8Linear

    assert issubclass(FP8GroupedLinear, FP8Linear)
    grouped = object.__new__(FP8GroupedLinear)
    nn.Module.__init__(grouped)
    grouped.weight = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    assert storage_of(weight_of(grouped, "weight")) is None
    with pytest.raises(TargetError, match=r"FP8.*FineGrainedFP8Config\(dequantize=True\)"):
        veneer.attach(nn.Sequential(grouped), veneer.LoraConfig(rank=2, targets="0"))


def test_training_below_experts_whose_kernels_have_no_derivative_is_an_error():
    """MXFP4's are triton's: what reached an adapter below was the gradient past the experts alone,
    silently."""
    pytest.importorskip("transformers")
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    class Experts(Mxfp4GptOssExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states.detach() * 2

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {
                "num_local_experts": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 2,
            }
            self.q_proj, self.experts = nn.Linear(32, 32), Experts(GptOssConfig(**sizes))

        def forward(self, x):
            x = self.q_proj(x)
            return x + self.experts(hidden_states=x, top_k_weights=None, top_k_index=None)

    model, x = Block(), torch.randn(3, 32)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="q_proj"))
    with torch.no_grad():
        expected = model(x)
    with pytest.raises(
        TargetError, match=r"MXFP4 kernels pass no gradient.*Mxfp4Config\(dequantize=True\)"
    ):
        model(x)
    handle.detach()
    assert type(model.experts) is Experts
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("implementation", "passes"),
    [("eager", True), ("grouped_mm", True), ("batched_mm", False), ("deepgemm", False)],
)
def test_experts_in_fp8_pass_a_gradient_in_some_implementations_alone(implementation, passes):
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import FP8Experts

    config = SimpleNamespace(
        hidden_size=32, num_experts=2, moe_intermediate_size=32, hidden_act="silu",
        _experts_implementation=None,
    )  # fmt: skip

    class Experts(FP8Experts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states * 2

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.experts = nn.Linear(32, 32), Experts(config)

        def forward(self, x):
            return self.experts(self.q_proj(x), None, None)

    model, x = Block(), torch.randn(3, 32)
    veneer.attach(model, veneer.LoraConfig(rank=2, targets="q_proj"))
    config._experts_implementation = implementation  # also if it is set later
    if passes:
        assert model(x).requires_grad
    else:
        with pytest.raises(TargetError, match="FP8 kernels pass no gradient"):
            model(x)


def test_a_library_of_that_name_without_the_class_is_no_matter(monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", ModuleType("hqq.core.quantize"))
    assert storage_of(nn.Linear(2, 2).weight) is BASES["plain"]
