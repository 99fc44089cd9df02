"""Every variant against its definition on dense matrices, its start, and PEFT's start where PEFT
has the same one."""

from __future__ import annotations

import gc
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.toys import calibration
from torch import nn

import veneer
from veneer.errors import ConfigError, TargetError
from veneer.lowrank import LowRank
from veneer.variants import CALIBRATION, VARIANTS, InitContext
from veneer.variants import _parts as parts
from veneer.variants import dora as dora_file
from veneer.variants.lokr import closest_factors

OWN = [variant for variant in VARIANTS if not variant.name.startswith("toy")]
every = pytest.mark.parametrize("variant", OWN, ids=lambda variant: variant.name)


def start_of(groups=1, out=6, in_=8, rank=3, dtype=torch.float32) -> InitContext:
    """A start with random calibration data of every kind."""
    W = torch.randn(groups, out, in_, dtype=dtype)
    x = torch.randn(groups, 40, in_, dtype=torch.float64)
    G = torch.randn(groups, out, in_, dtype=torch.float64)
    noisy = W.float() + 0.05 * torch.randn(groups, out, in_)
    return InitContext(
        groups, out, in_, rank, in_, lambda: W, lambda: x.mT @ x, lambda: G, lambda: noisy
    )


def trained(variant, start) -> dict[str, torch.Tensor]:
    """Numbers in float64 as training may leave them: frozen ones as they were, a mask with gaps."""
    parameters = {name: value.double() for name, value in variant.init(start).items()}
    for name, value in parameters.items():
        if name == "mask":
            parameters[name] = (torch.rand_like(value) < 0.6).double()
        elif name not in variant.frozen:
            parameters[name] = value + 0.3 * torch.randn_like(value)
    return parameters


def changed(variant, parameters, scale, W):
    """gain ⊙ (W + ΔW) [g, out, in], as a layer uses what ``resolve`` gives."""
    low, gain = variant.resolve(parameters, scale, lambda: W)
    dense = W + low.delta()
    return dense if gain is None else dense * gain.view(W.shape[0], W.shape[1], 1)


# What each paper says, for one group: (parameters of the group, scale, W) -> the changed weight.
def _product(n, s, W):
    return W + s * n["B"] @ n["A"]


def _pooled(A, in_):
    size = in_ // A.shape[1]
    return torch.stack([A[:, i // size] / size * A.shape[1] for i in range(in_)], 1)


def _moved(n, s, W):
    return (W - s * n["B0"] @ n["A0"]) + s * n["B"] @ n["A"]


def _dora(n, s, W):
    V = W + s * n["B"] @ n["A"]
    return n["magnitude"].view(-1, 1) * V / V.norm(dim=1, keepdim=True)


DEFINITIONS = {
    "lora": _product,
    "rslora": _product,
    "orthogonal": _product,
    "eva": _product,
    "dora": _dora,
    "dora_rslora": _dora,
    "pissa": _moved,
    "olora": _moved,
    "lora_ga": _moved,
    "loftq": lambda n, s, W: W + n["B0"] @ n["A0"] + s * (n["B"] @ n["A"] - n["B0"] @ n["A0"]),
    "milora": _moved,
    "corda": _moved,
    "corda_kpm": _moved,
    "mica": _product,
    "qalora": lambda n, s, W: W + s * n["B"] @ _pooled(n["A1"], W.shape[1]),
    "lora_xs": lambda n, s, W: W + s * n["B"] @ n["R"] @ n["A"],
    "vera": lambda n, s, W: W + s * n["b"].diag() @ n["B"] @ n["d"].diag() @ n["A"],
    "adalora": lambda n, s, W: W + s * n["B"] @ (n["E"] * n["mask"]).diag() @ n["A"],
    "loha": lambda n, s, W: W + s * (n["B1"] @ n["A1"]) * (n["B2"] @ n["A2"]),
    "lokr": lambda n, s, W: W + s * torch.kron(n["C"], n["B2"] @ n["A2"]),
}

# : the trained parameters that have a gradient at the very start; every trained parameter has one
# after a step
FIRST = {
    "lora": {"B"},
    "rslora": {"B"},
    "eva": {"B"},
    "dora": {"B", "magnitude"},
    "dora_rslora": {"B", "magnitude"},
    "orthogonal": {"A", "B"},
    "pissa": {"A", "B"},
    "olora": {"A", "B"},
    "lora_ga": {"A", "B"},
    "loftq": {"A", "B"},
    "lora_xs": {"R"},
    "milora": {"A", "B"},
    "corda": {"A", "B"},
    "corda_kpm": {"A", "B"},
    "mica": {"A"},
    "qalora": {"B"},
    "vera": {"b"},
    "adalora": {"E"},
    "loha": {"B2"},
    "lokr": {"B2"},
}


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([1, 3]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.data(),
    st.sampled_from([1.0, 0.5, 2.0, 3.7]),
)
@every
def test_resolve_is_the_definition(variant, groups, out, in_, data, scale):
    rank = data.draw(st.integers(1, min(out, in_)))
    start = start_of(groups, out, in_, rank)
    parameters, W = trained(variant, start), start.base().double()
    actual = changed(variant, parameters, scale, W)
    whole = {
        name: value.unflatten(0, (groups, -1)) if name == "magnitude" else value
        for name, value in parameters.items()
    }
    by_group = [{name: value[g] for name, value in whole.items()} for g in range(groups)]
    expected = torch.stack(
        [DEFINITIONS[variant.name](own, scale, w) for own, w in zip(by_group, W, strict=True)]
    )
    torch.testing.assert_close(
        actual, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item()
    )


@pytest.mark.parametrize("groups", [1, 3])
@every
def test_numbers_of_a_start(variant, groups):
    start = start_of(groups)
    parameters = variant.init(start)
    assert variant.frozen <= set(parameters)
    assert variant.needs <= set(CALIBRATION)
    assert set(variant.peft_keys) <= set(parameters)
    for name, value in parameters.items():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert (
            value.untyped_storage().nbytes() == 4 * value.numel()
        )  # no view that keeps a whole SVD alive
        assert value.isfinite().all()
        assert value.shape[0] == (groups * start.out if name == "magnitude" else groups)
    low, gain = variant.resolve(parameters, 1.0, start.base)
    assert low.A.shape == (groups, low.rank, start.in_)
    assert low.B.shape == (groups, start.out, low.rank)
    assert gain is None or gain.shape == (groups * start.out,)
    assert variant.scale(variant.default_alpha, 16) > 0


@pytest.mark.parametrize("groups", [1, 3])
@every
def test_the_start_is_the_base_if_it_says_so(variant, groups):
    for dtype in (torch.float32, torch.float64):
        start = start_of(groups, dtype=dtype)
        parameters = {name: value.to(dtype) for name, value in variant.init(start).items()}
        W = start.base()
        moved = (changed(variant, parameters, 2.0, W) - W).norm() / W.norm()
        assert (moved == 0) if variant.exact_start else (moved > 1e-3)


@every
def test_the_start_stays_the_base_when_numbers_are_rounded(variant):
    if not variant.exact_start or variant.name.startswith("dora"):
        pytest.skip("DoRA's magnitude is rounded too")
    parameters = {name: value.bfloat16() for name, value in variant.init(start_of()).items()}
    low, _ = variant.resolve(parameters, 2.0, start_of().base)
    assert low.delta().abs().max() == 0


@every
def test_gradients_reach_every_trained_number(variant):
    start = start_of(3)
    W, target = start.base(), torch.randn(3, start.out, start.in_)
    parameters = {
        name: nn.Parameter(v, name not in variant.frozen) for name, v in variant.init(start).items()
    }
    learnt = {name: value for name, value in parameters.items() if name not in variant.frozen}
    optimiser = torch.optim.SGD(learnt.values(), lr=1e-2)
    reached = []
    for _ in range(2):
        optimiser.zero_grad()
        F.mse_loss(changed(variant, parameters, 1.0, W), target).backward()
        reached.append(
            {name for name, value in learnt.items() if value.grad is not None and value.grad.any()}
        )
        optimiser.step()
    assert reached == [FIRST[variant.name], set(learnt)]
    assert all(parameters[name].grad is None for name in variant.frozen)


@every
def test_resolve_compiles_in_one_piece(variant):
    start = start_of()
    parameters, W = (
        {name: value.float() for name, value in trained(variant, start).items()},
        start.base(),
    )
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda parameters: changed(variant, parameters, 0.5, W), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(parameters), changed(variant, parameters, 0.5, W))


@every
def test_a_missing_piece_of_evidence_is_named(variant):
    W = torch.randn(1, 6, 8)
    if variant.needs:
        with pytest.raises(AssertionError, match="needs"):
            variant.init(InitContext(1, 6, 8, 2, 8, lambda: W))
    else:
        variant.init(InitContext(1, 6, 8, 2, 8, lambda: W))


@every
def test_a_start_without_memory(variant):
    with torch.device("meta"):
        calibration = [torch.empty(1, *shape) for shape in ((6, 8), (8, 8), (6, 8), (6, 8))]
        W, x, G, original = (lambda value=value: value for value in calibration)
        parameters = variant.init(InitContext(1, 6, 8, 3, 8, W, x, G, original))
        low, _ = variant.resolve(parameters, 1.0, W)
    assert all(value.is_meta for value in parameters.values())
    assert low.delta().shape == (1, 6, 8)


# DoRA


def test_dora_gives_a_row_of_zeros_gain_one():
    W = torch.randn(1, 6, 8)
    W[0, 2] = 0
    parameters = {
        name: nn.Parameter(value)
        for name, value in VARIANTS["dora"].init(InitContext(1, 6, 8, 2, 8, lambda: W)).items()
    }
    low, gain = VARIANTS["dora"].resolve(parameters, 2.0, lambda: W)
    assert gain.tolist() == [1.0] * 6
    (gain.view(1, 6, 1) * (W + low.delta())).square().sum().backward()
    assert all(value.grad.isfinite().all() for value in parameters.values())
    parameters["B"].data.normal_()  # the row now has a direction, and its magnitude is still 0
    _, gain = VARIANTS["dora"].resolve(parameters, 2.0, lambda: W)
    assert gain[2] == 0
    assert gain.isfinite().all()


def test_dora_norms_do_not_cancel():
    """A row that ΔW nearly undoes keeps its norm to the last digits, and so does one across a
    boundary of chunks."""
    W = torch.randn(1, 3, 5, dtype=torch.float64)
    A, B = -W[:, :1].clone(), torch.tensor([[[1 - 1e-9], [0.5], [0.0]]], dtype=torch.float64)
    norms = dora_file.row_norms(W, LowRank(A, B, 1.0))
    assert norms[0].item() == pytest.approx(1e-9 * W[0, 0].norm().item(), rel=1e-6)
    wide = torch.randn(2, 5, dora_file.CHUNK_BYTES // 2 + 1)
    zero = LowRank(torch.zeros(2, 1, wide.shape[2]), torch.zeros(2, 5, 1), 1.0)
    torch.testing.assert_close(dora_file.row_norms(wide, zero), wide.norm(dim=2).flatten())


def test_dora_norms_ignore_autocast():
    start = start_of()
    parameters = {name: value.float() for name, value in trained(VARIANTS["dora"], start).items()}
    _, expected = VARIANTS["dora"].resolve(parameters, 2.0, start.base)
    with torch.autocast("cpu", torch.bfloat16):
        _, gain = VARIANTS["dora"].resolve(parameters, 2.0, start.base)
    assert torch.equal(gain, expected)


# PEFT's starts and arithmetic


def peft_linear(W, rank, alpha, prepare=None, **options):
    """PEFT's adapted layer around a copy of ``W`` [out, in], at its start."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(OrderedDict(fc=nn.Linear(W.shape[1], W.shape[0], bias=False)))
    model.fc.weight.data.copy_(W)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["fc"], **options)
    if prepare is not None:
        prepare(model, config)
    model = get_peft_model(model, config)
    return model, model.base_model.model.fc


def ab(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def same_up_to_signs(ours, theirs, axis, within=1e-5):
    signs = (ours * theirs).sum(axis, keepdim=True).sign()
    torch.testing.assert_close(ours * signs, theirs, rtol=1e-4, atol=within)


def test_dora_is_pefts():
    start = start_of(1, 6, 8, 3)
    W, x = start.base(), torch.randn(5, 8)
    _, layer = peft_linear(W[0], 3, 6, use_dora=True)
    parameters = {name: value.float() for name, value in trained(VARIANTS["dora"], start).items()}
    parameters = {name: nn.Parameter(value) for name, value in parameters.items()}
    theirs = {
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
    }
    torch.testing.assert_close(
        VARIANTS["dora"].init(start)["magnitude"], theirs["magnitude"].detach()
    )
    for name, value in theirs.items():
        value.data.copy_(parameters[name].data.view_as(value))
    y = F.linear(x, changed(VARIANTS["dora"], parameters, 2.0, W)[0])
    expected = layer(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, value in theirs.items():
        torch.testing.assert_close(
            parameters[name].grad.view_as(value), value.grad, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_starts_from_the_weight_are_pefts(name):
    start = start_of(1, 6, 8, 3)
    W = start.base()[0]
    _, layer = peft_linear(W, 3, 3, init_lora_weights=name)  # scale 1, the paper's
    A, B = ab(layer)
    ours = VARIANTS[name].init(start)
    same_up_to_signs(ours["A"][0], A, axis=1)
    same_up_to_signs(ours["B"][0], B, axis=0)
    residual = W - (ours["B0"] @ ours["A0"])[0]
    torch.testing.assert_close(residual, layer.base_layer.weight.data, rtol=1e-4, atol=1e-5)


def test_orthogonal_is_pefts_up_to_a_rotation_of_the_bottleneck():
    W = torch.randn(40, 60)
    _, layer = peft_linear(W, 6, 6, init_lora_weights="orthogonal")
    ours = VARIANTS["orthogonal"].init(start_of(1, 40, 60, 6))
    for A, B in (ab(layer), (ours["A"][0], ours["B"][0])):
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3
        assert (B @ A).abs().max() < 1e-6
        # three directions of length 0.1 · √in, and three of 0.1 · √out
        assert torch.linalg.svdvals(A)[:3].mean().item() == pytest.approx(0.1 * 60**0.5, rel=0.25)
        assert torch.linalg.svdvals(B)[:3].mean().item() == pytest.approx(0.1 * 40**0.5, rel=0.25)
    odd = VARIANTS["orthogonal"].init(start_of(1, 40, 60, 5))
    assert (odd["B"] @ odd["A"]).abs().max() == 0


def test_lora_ga_takes_pefts_directions_and_the_papers_scale():
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    W, x = torch.randn(12, 16), torch.randn(30, 16)
    x = x * torch.linspace(1, 3, 16)  # singular values that are well apart
    target = torch.randn(30, 12)

    def prepare(model, config):
        asked = x.clone().requires_grad_()  # PEFT's backward hook warns otherwise
        preprocess_loraga(model, config, lambda: F.mse_loss(model(asked), target).backward())

    options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    _, layer = peft_linear(W, 3, 3, prepare, **options)
    weight = W.clone().requires_grad_()
    F.mse_loss(F.linear(x, weight), target).backward()
    G = weight.grad.double()[None]
    start = InitContext(1, 12, 16, 3, 16, lambda: W[None], gradient=lambda: G)
    ours = VARIANTS["lora_ga"].init(start)
    A, B = ab(layer)
    for mine, theirs in ((ours["A"][0], A), (ours["B"][0].T, B.T)):
        same_up_to_signs(F.normalize(mine, dim=1), F.normalize(theirs, dim=1), axis=1)
        torch.testing.assert_close(mine.norm(dim=1), torch.full((3,), 12**0.25 / 4))
    assert (
        ours["B"].mT.double() @ G @ ours["A"].mT.double()
    ).abs().max() < 1e-5  # they share no singular direction


def test_lora_ga_needs_no_more_directions_than_there_are():
    ours = VARIANTS["lora_ga"].init(start_of(2, 4, 5, 3))
    assert ours["A"].shape == (2, 3, 5)
    assert torch.linalg.matrix_rank(ours["B"]).tolist() == [3, 3]


def test_eva_is_pefts_on_centred_inputs():
    from peft import EvaConfig, initialize_lora_eva_weights

    x = torch.randn(64, 8) * torch.linspace(1, 4, 8)
    x = x - x.mean(0)
    W = torch.randn(6, 8)
    with pytest.warns(UserWarning, match="low_cpu_mem_usage"):
        model, layer = peft_linear(W, 3, 3, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    initialize_lora_eva_weights(
        model,
        [x, x],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: (
            inputs[0] if isinstance(inputs, tuple) else inputs
        ),
        show_progress_bar=False,
    )
    A, B = ab(layer)
    ours = VARIANTS["eva"].init(InitContext(1, 6, 8, 3, 8, inputs=lambda: (x.T @ x).double()[None]))
    same_up_to_signs(ours["A"][0], A, axis=1, within=1e-3)  # PEFT's own SVD is incremental
    assert not B.any()
    assert not ours["B"].any()
    torch.testing.assert_close(ours["A"][0] @ ours["A"][0].T, torch.eye(3))


@pytest.mark.parametrize(("name", "method"), [("corda", "ipm"), ("corda_kpm", "kpm")])
def test_corda_is_pefts(name, method):
    """PEFT divides the inputs by their largest number: the product B₀ A₀ does not depend on
    that."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    x, W = torch.randn(64, 8) * torch.linspace(1, 4, 8), torch.randn(6, 8)

    def prepare(model, config):
        preprocess_corda(model, config, lambda: model(x))

    corda_config = CordaConfig(corda_method=method)
    _, layer = peft_linear(W, 3, 3, prepare, init_lora_weights="corda", corda_config=corda_config)
    ours = VARIANTS[name].init(
        InitContext(1, 6, 8, 3, 8, lambda: W[None], inputs=lambda: (x.T @ x).double()[None])
    )
    A, B = ab(layer)
    torch.testing.assert_close(ours["B"][0] @ ours["A"][0], B @ A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        W - ours["B"][0] @ ours["A"][0], layer.base_layer.weight.data, rtol=1e-3, atol=1e-4
    )
    ratio = (ours["A"][0].norm(dim=1) / A.norm(dim=1)).log()
    assert (ratio - ratio.mean()).abs().max() < 1e-3  # one factor between A and B


def test_corda_starts_from_inputs_that_do_not_span_the_space():
    """Fewer rows than inputs, and none but zeros: the damping makes C invertible."""
    x, W = torch.randn(1, 2, 8, dtype=torch.float64), torch.randn(1, 6, 8)
    for moment in (x.mT @ x, torch.zeros(1, 8, 8, dtype=torch.float64)):
        for name in ("corda", "corda_kpm"):
            ours = VARIANTS[name].init(
                InitContext(1, 6, 8, 3, 8, lambda: W, inputs=lambda moment=moment: moment)
            )
            assert all(value.isfinite().all() for value in ours.values())
            assert torch.linalg.matrix_rank(ours["B"]).item() == 3


def test_mica_is_pefts():
    W = torch.randn(6, 8)
    _, layer = peft_linear(W, 3, 3, init_lora_weights="mica")
    ours = VARIANTS["mica"].init(InitContext(1, 6, 8, 3, 8, lambda: W[None]))
    A, B = ab(layer)
    same_up_to_signs(ours["B"][0], B, axis=0)
    assert not A.any()
    assert not ours["A"].any()
    torch.testing.assert_close(ours["B"][0].T @ ours["B"][0], torch.eye(3))


@pytest.mark.parametrize("in_", [32, 24, 7])
def test_qalora_is_pefts(in_):
    """PEFT has it for GPTQ layers alone; here its forward runs on a layer with no more than it
    reads."""
    from types import SimpleNamespace

    from peft.tuners.lora.variants import QALoraLinearVariant

    variant = VARIANTS["qalora"]
    parameters = variant.init(InitContext(1, 6, in_, 3, in_))
    parameters["B"] = torch.randn(1, 6, 3)
    size = in_ // parameters["A1"].shape[-1]
    assert size == {32: 16, 24: 12, 7: 7}[in_]
    layer = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=parameters["A1"][0])},
        lora_B={"a": SimpleNamespace(weight=parameters["B"][0])},
        lora_dropout={"a": nn.Identity()},
        scaling={"a": 1.5},
        qalora_group_size={"a": size},
        in_features=in_,
        training=False,
    )
    x = torch.randn(2, 5, in_)
    theirs = QALoraLinearVariant.forward(layer, "a", x, torch.zeros(2, 5, 6))
    low, _ = variant.resolve(parameters, 1.5, lambda: torch.empty(0))
    torch.testing.assert_close(F.linear(x, low.delta()[0]), theirs, rtol=1e-4, atol=1e-4)


# Starts that PEFT does not have


def test_milora_holds_what_is_left_of_the_best_approximation():
    start = start_of(2, 9, 7, 2)
    rest = torch.stack([w - _truncated(w, 5) for w in start.base()])
    ours = VARIANTS["milora"].init(start)
    torch.testing.assert_close(ours["B"] @ ours["A"], rest, rtol=1e-4, atol=1e-5)


def test_pissa_and_lora_xs_hold_the_best_approximation():
    start = start_of(2, 9, 7, 2)
    W = start.base()
    best = torch.stack([_truncated(w, 2) for w in W])
    pissa, xs = VARIANTS["pissa"].init(start), VARIANTS["lora_xs"].init(start)
    torch.testing.assert_close(pissa["B"] @ pissa["A"], best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(xs["B"] @ xs["A"], best, rtol=1e-4, atol=1e-5)


def _truncated(w, rank):
    U, S, Vh = torch.linalg.svd(w, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_loftq_starts_at_the_best_approximation_of_what_was_lost(scale):
    loftq, start = VARIANTS["loftq"], start_of(2, 9, 7, 2)
    lost = start.original() - start.base()
    low, _ = loftq.resolve(loftq.init(start), scale, start.base)
    torch.testing.assert_close(
        low.delta(), torch.stack([_truncated(d, 2) for d in lost]), rtol=1e-4, atol=1e-5
    )
    assert (lost - low.delta()).norm() < lost.norm()


def test_a_large_matrix_gets_nearly_its_principal_part():
    decaying = torch.randn(1100, 1100) * torch.linspace(1, 0.2, 1100)
    U, S, Vh = parts.principal_triplets(decaying[None], 8)
    exact = torch.linalg.svdvals(decaying)[:8]
    torch.testing.assert_close(S[0], exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(U[0].T @ U[0], torch.eye(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(Vh[0] @ Vh[0].T, torch.eye(8), rtol=0, atol=1e-4)


def test_vera_shares_one_pair_among_equal_sizes():
    vera = VARIANTS["vera"]
    one, two, other = (vera.init(start_of(1, 6, 8, rank)) for rank in (3, 3, 2))
    assert one["A"] is two["A"]
    assert one["B"] is two["B"]
    assert one["d"] is not two["d"]
    assert other["A"] is not one["A"]
    kept = one["A"].clone(), one["B"].clone()
    del one, two
    gc.collect()
    state = torch.get_rng_state()
    again = vera.init(start_of_size(1, 6, 8, 3))
    assert torch.equal(again["A"], kept[0])
    assert torch.equal(again["B"], kept[1])
    assert torch.equal(torch.get_rng_state(), state)
    wide = {name: value.double() if name in "bd" else value for name, value in again.items()}
    low, _ = vera.resolve(wide, 1.0, lambda: None)
    assert low.A.dtype == low.B.dtype == torch.float64


def start_of_size(groups, out, in_, rank) -> InitContext:
    return InitContext(groups, out, in_, rank, in_)


def test_veras_pair_never_changes():
    """No file holds the pair: other parameters here would be another meaning of every VeRA adapter
    that was saved."""
    parameters = VARIANTS["vera"].init(start_of_size(1, 2, 3, 2))
    A = [[-1.4142134, -1.2633338, 0.16206272], [1.0039605, 0.7309137, -1.1094493]]
    B = [[0.092341676, 1.4807701], [0.5213656, 1.4538827]]
    torch.testing.assert_close(parameters["A"][0], torch.tensor(A), rtol=3e-7, atol=0)
    torch.testing.assert_close(parameters["B"][0], torch.tensor(B), rtol=3e-7, atol=0)
    large = VARIANTS["vera"].init(start_of_size(1, 256, 512, 64))
    for part, fan_in in ((large["A"], 512), (large["B"], 64)):
        bound = (6 / fan_in) ** 0.5
        assert part.abs().max() <= bound
        assert part.mean().abs() < 0.02 * bound
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert torch.linalg.svdvals(part[0]).max() < 1.1 * part.std() * sum(
            side**0.5 for side in part[0].shape
        )


def test_adalora_prunes_without_stopping_the_gradient_of_e():
    adalora, start = VARIANTS["adalora"], start_of()
    parameters = trained(adalora, start)
    parameters["mask"] = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    E = parameters["E"].requires_grad_()
    low, _ = adalora.resolve(parameters, 1.0, start.base)
    G = torch.randn(1, 6, 8, dtype=torch.float64)
    (low.delta() * G).sum().backward()
    assert not low.B[0, :, 1].any()
    expected = torch.einsum("gor,goi,gri->gr", parameters["B"], G, parameters["A"])
    torch.testing.assert_close(E.grad, expected)


@pytest.mark.parametrize("length", [1, 2, 7, 12, 36, 127, 128, 250, 512, 768, 1024, 4096, 11008])
def test_lokr_factors_as_lycoris_does(length):
    a, b = closest_factors(length)
    assert a * b == length
    assert a <= b
    lycoris = pytest.importorskip("lycoris.functional.general")
    assert (a, b) == lycoris.factorization(length)


def test_lokr_takes_the_thinner_of_its_two_forms():
    tall = VARIANTS["lokr"].init(start_of(1, 36, 4, 2))  # l = 6, m = 2
    wide = VARIANTS["lokr"].init(start_of(1, 4, 36, 2))  # l = 2, m = 6
    for parameters in (tall, wide):
        low, _ = VARIANTS["lokr"].resolve(parameters, 1.0, lambda: None)
        assert low.rank == 2 * 2


READS_ITS_WEIGHT = {"pissa", "lora_xs", "olora", "dora", "dora_rslora", "loftq", "milora", "mica"}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", VARIANTS.names())
def test_a_start_from_numbers_that_are_not_finite_names_the_layers(name, number):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    data = calibration(model, name, (torch.randn(5, 4),))
    with torch.no_grad():
        for layer in (1, 3):
            model[layer].weight[2, 1] = number
    config = veneer.LoraConfig(rank=2, variant=name)
    if VARIANTS[name].needs & {"inputs", "gradient"} or name in READS_ITS_WEIGHT:
        before = {
            path: (type(module), sorted(module.__dict__)) for path, module in model.named_modules()
        }
        with pytest.raises(TargetError, match=f"'3.weight'.*{name!r}") as caught:
            veneer.attach(model, config, **data)
        assert "LinAlg" not in str(caught.value)
        if name in READS_ITS_WEIGHT:
            assert "2 problems" in str(caught.value)
            assert "the weight '1.weight'" in str(caught.value)
            assert "'0.weight'" not in str(caught.value)
        assert before == {
            path: (type(module), sorted(module.__dict__)) for path, module in model.named_modules()
        }
    else:
        veneer.attach(model, config, **data)


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_batches_that_are_not_finite_name_the_layers(name):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.full((5, 4), float("nan"))
    with pytest.raises(TargetError, match="2 problems") as caught:
        veneer.attach(
            model, veneer.LoraConfig(rank=2, variant=name), **calibration(model, name, (x,))
        )
    what = {"eva": "inputs", "lora_ga": "gradient"}[name]
    assert f"the {what} of '0.weight'" in str(caught.value)
    assert all(type(layer) is nn.Linear for layer in model)


def test_an_original_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    state = {
        path: torch.full_like(value, float("inf")) for path, value in model.state_dict().items()
    }
    with pytest.raises(TargetError, match=r"the original of '0\.weight'"):
        veneer.attach(model, veneer.LoraConfig(rank=2, variant="loftq"), original=state)


@pytest.mark.parametrize("as_state", [False, True], ids=["model", "state dict"])
@pytest.mark.parametrize("width", [64, 128])
def test_an_original_conv1d_is_transposed_where_its_quantised_layer_is(width, as_state):
    """transformers makes a Conv1D [in, out] a quantised linear layer [out, in]."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    original = nn.Sequential(conv1d(width, 64))
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, width, quant_type="nf4"))
    base[0].weight.data.copy_(original[0].weight.detach().T)
    base[0].source_cls = conv1d
    base = base.to("cpu")
    state = original.state_dict() if as_state else original
    config = veneer.LoraConfig(rank=2, variant="loftq")
    (change,) = veneer.attach(base, config, original=state).changes.values()
    lost = original[0].weight.detach().T - change.storage.dense(base[0].weight)
    delta = change.resolve(None)[0].delta()[0]
    torch.testing.assert_close(delta, _truncated(lost, 2), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 8), (32,), (4, 4)])
def test_an_original_of_another_shape_is_refused(shape):
    model = nn.Sequential(nn.Linear(4, 8))
    state = {"0.weight": torch.randn(shape)}
    with pytest.raises(ConfigError, match=r"'0\.weight'.* shape .* in original.*\(8, 4\)"):
        veneer.attach(model, veneer.LoraConfig(rank=2, variant="loftq"), original=state)


def test_slices_start_from_the_rows_that_they_choose():
    model = nn.Sequential(nn.Linear(4, 8))
    with torch.no_grad():
        model[0].weight[:4] = float("nan")
    config = veneer.LoraConfig(rank=2, variant="pissa", slices={"0": [False, True]})
    veneer.attach(model, config)
