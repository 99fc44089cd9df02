"""The loop that numba compiles gives the bits of the torch path, which are those of the
definition."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.compiled import needs_loop
from tests.support.forked import printed
from tests.support.rounding import exact, make_change, same_bits, ties

from veneer.kernels import round_nearest, rounding
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import fold
from veneer.lowrank import LowRank

pytestmark = needs_loop("round_nearest")


@contextmanager
def path(name):
    """Every weight takes this path, "loop" or "torch"; yields how many numbers were in doubt in
    each slab of the loop."""
    slabs, before, compiled = [], rounding.NUMBA_MIN_ELEMENTS, round_nearest._slab

    def counted(*arguments):
        slabs.append(compiled(*arguments))
        return slabs[-1]

    rounding.NUMBA_MIN_ELEMENTS, round_nearest._slab = (0 if name == "loop" else 1 << 62), counted
    try:
        yield slabs
    finally:
        rounding.NUMBA_MIN_ELEMENTS, round_nearest._slab = before, compiled


def both(weight, low, dtype=torch.bfloat16, **options):
    """The result of the loop, compared with that of torch, and the places that were computed
    again."""
    with path("torch") as slabs:
        expected = fold(weight, low, dtype=dtype, rounding="nearest")
    assert not slabs
    with path("loop") as slabs:
        folded = fold(weight, low, dtype=dtype, rounding="nearest", **options)
    assert slabs
    whole, numbers = folded.weight, ~expected.weight.isnan()
    assert torch.equal(whole.isnan(), ~numbers)  # a NaN's own bits are nobody's
    assert same_bits(whole[numbers], expected.weight[numbers])
    assert folded.finite == expected.finite
    if folded.finite:
        for one in ("change", "retention"):
            scale = max(1.0, abs(getattr(expected, one)))
            assert getattr(folded, one) == pytest.approx(
                getattr(expected, one), rel=1e-4, abs=1e-4 * scale
            )
    return folded, sum(slabs)


@st.composite
def weights(draw):
    """A weight of some strides and a change, with numbers of every size, cancellation, and what is
    not finite."""
    shape = tuple(
        draw(
            st.tuples(
                st.integers(1, 3),
                st.integers(1, 40),
                st.sampled_from([1, 2, 7, 16, 63, 511, 513, 1100]),
            )
        )
    )
    rank, seed = draw(st.integers(1, 20)), draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    weight, low = make_change(
        shape,
        draw(st.sampled_from([1e-4, 1e-2, 1.0, 100.0])),
        rank=rank,
        dtype=torch.float32,
        seed=seed,
    )
    size = 2.0 ** draw(st.sampled_from([0, 0, -118, -128, 100]))
    weight, low = weight * size, LowRank(low.A, low.B, low.scale * size)
    if draw(st.booleans()):  # W + ΔW is nearly nothing
        weight = torch.where(
            torch.rand(shape, generator=generator) < 0.3, -low.delta(torch.float64).float(), weight
        )
    for value in draw(
        st.lists(
            st.sampled_from([0.0, -0.0, 1e-40, float("inf"), -float("inf"), float("nan")]),
            max_size=3,
        )
    ):
        weight.view(-1)[torch.randint(weight.numel(), (2,), generator=generator)] = value
    if draw(st.booleans()):
        low.B[:, 0] = 0
    weight = weight.to(draw(st.sampled_from([torch.bfloat16, torch.float32])))
    layout = draw(st.sampled_from(["dense", "transposed", "rows apart", "groups last"]))
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    elif layout == "rows apart":
        weight = torch.cat([weight, weight], 2)[:, :, : shape[2]]
    elif layout == "groups last":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    return weight, low


@settings(max_examples=120, deadline=None)
@given(weights())
def test_the_bits_are_those_of_the_other_path(case):
    both(*case)


@settings(max_examples=80, deadline=None)
@given(ties())
def test_ties_and_what_lies_a_hair_beside_them(case):
    weight, low = case
    for base in (weight.bfloat16(), weight.float()):
        folded, _ = both(base, low)
        assert torch.equal(
            folded.weight.nan_to_num(), round_once(exact(base, low), torch.bfloat16).nan_to_num()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_number_of_the_type(dtype):
    every = (
        torch.arange(-(2**15), 2**15, dtype=torch.int16)
        .view(torch.bfloat16)
        .to(dtype)
        .view(1, 1, -1)
    )
    for size in (0.0, -0.0, 1e-39, 1e-8, 1e-3, 1.0, 300.0, 1e36):
        low = LowRank(torch.ones(1, 1, every.numel()), torch.full((1, 1, 1), size), 1.0)
        folded, _ = both(every, low)
        assert torch.equal(
            folded.weight.nan_to_num(), round_once(exact(every, low), torch.bfloat16).nan_to_num()
        )


def test_a_nan_with_every_bit_set_stays_one():
    weight = torch.full((1, 2, 40), -1, dtype=torch.int32).view(torch.float32)
    low = LowRank(torch.ones(1, 1, 40), torch.ones(1, 2, 1), 1.0)
    folded, _ = both(weight, low)
    assert folded.weight.isnan().all()
    assert not folded.finite


@pytest.mark.parametrize("threads", [1, 3])
def test_several_slabs_and_threads(threads, monkeypatch):
    weight, low = make_change((2, 900, 700), 0.3, rank=9)
    monkeypatch.setattr(rounding, "SLAB_SIZE", 1 << 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        folded, again = both(weight, low)
    finally:
        torch.set_num_threads(before)
    assert 0 < again < weight.numel() / 100
    assert torch.equal(folded.weight, round_once(exact(weight, low), torch.bfloat16))


def test_what_is_in_doubt_must_be_computed_again(monkeypatch):
    weight, low = make_change((1, 512, 512), 0.3, rank=16)
    expected = round_once(exact(weight, low), torch.bfloat16)
    rounded = round_nearest.round_slab

    def unsure(old, B, A, bound, wide_B, wide_A, scale, new):
        return rounded(old, B, A, bound, wide_B, 0 * wide_A, scale, new)

    monkeypatch.setattr(round_nearest, "round_slab", unsure)
    with path("loop") as slabs:
        wrong = (fold(weight, low, rounding="nearest").weight != expected).sum()
    assert 0 < wrong <= sum(slabs)


def test_a_result_that_lies_elsewhere():
    weight, low = make_change((2, 30, 600))
    place = torch.zeros(2, 60, 700, dtype=torch.bfloat16)
    out = place[:, ::2, 50:650]
    folded, _ = both(weight, low, out=out)
    assert folded.weight.data_ptr() == out.data_ptr()
    out.zero_()
    assert not place.any()


@pytest.mark.parametrize("case", ["float16", "float64", "columns apart", "small"])
def test_what_the_loop_is_not_for_goes_through_torch(case, monkeypatch):
    weight, low = make_change(
        (1, 30, 40), dtype=torch.float64 if case == "float64" else torch.bfloat16
    )
    target = torch.float16 if case == "float16" else torch.bfloat16
    if case == "columns apart":
        weight = torch.stack([weight, weight], 3)[..., 0]
    expected = round_once(exact(weight, low), target)
    if case == "small":
        loops = []
        monkeypatch.setattr(rounding, "rounding_loop", lambda *weights: loops.append(weights))
        assert torch.equal(fold(weight, low, dtype=target, rounding="nearest").weight, expected)
    else:
        with path("loop") as loops:
            assert torch.equal(fold(weight, low, dtype=target, rounding="nearest").weight, expected)
    assert not loops


FOLD = """
import sys, torch
{before}
from veneer.kernels.rounding import fold
from veneer.lowrank import LowRank
torch.manual_seed(0)
weight, low = torch.randn(1, 1500, 1000).bfloat16(), LowRank(torch.randn(1, 2, 1000), torch.randn(1, 1500, 2), 0.1)
folded = fold(weight, low, rounding="nearest").weight
print("numba" in sys.modules, folded.view(torch.int16).long().sum().item())
"""


def test_without_numba_torch_does_it():
    absent = "import importlib.util as util; find = util.find_spec; "
    absent += "util.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)"
    (used, bits), (unused, same) = (
        printed(FOLD.format(before=one)).split() for one in ("", absent)
    )
    assert (used, unused) == ("True", "False")
    assert bits == same


def test_importing_and_folding_a_small_weight_loads_no_numba():
    code = FOLD.format(before="").replace("1500", "50")
    assert printed(code).split()[0] == "False"
    assert printed("import sys, veneer; print('numba' in sys.modules)").strip() == "False"
