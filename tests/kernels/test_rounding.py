"""Folding a change into a weight rounds once, whatever the path; faithful rounding keeps what was
learned."""

from __future__ import annotations

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from tests.support.forked import printed
from tests.support.rounding import HALF, exact, make_change, same_bits, ties

from veneer.errors import ConfigError
from veneer.kernels import rounding
from veneer.kernels.error_feedback import basis, find_neighbours
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import fold
from veneer.kernels.threads import map_on_threads
from veneer.lowrank import LowRank

DTYPES = (*HALF, torch.float32, torch.float64)


# ----------------------------------------------------------------------------------------------
# nearest


@pytest.mark.parametrize("target", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_nearest_is_rounded_once(dtype, target, gained, transposed):
    for shape, ratio in itertools.product(
        [(1, 300, 260), (3, 70, 9), (200, 1, 9), (1, 3, 9000), (1, 1, 1)], [1e-3, 1.0]
    ):
        weight, low = make_change(shape, ratio, dtype=dtype)
        if transposed:
            weight = weight.mT.contiguous().mT
        gain = 1 + 0.1 * torch.randn(shape[0] * shape[1]) if gained else None
        before = weight.clone()
        folded = fold(weight, low, gain, target, rounding="nearest")
        values = exact(weight, low, gain)
        assert torch.equal(folded.weight, round_once(values, target))
        assert torch.equal(weight, before)
        assert folded.finite
        assert folded.rounding == "nearest"
        change, moved = values - weight.double(), folded.weight.double() - weight.double()
        assert folded.change == pytest.approx(
            (change.norm() / weight.double().norm()).item(), rel=1e-5
        )
        retention = ((change * moved).sum() / (change * change).sum()).item()
        assert folded.retention == pytest.approx(
            retention, rel=1e-4, abs=1e-5 * (moved.norm() / change.norm()).item()
        )


@settings(max_examples=150, deadline=None)
@given(ties())
def test_ties_and_what_lies_a_hair_beside_them(case):
    weight, low = case
    expected = round_once(exact(weight, low), weight.dtype)
    for base in (weight, weight.float()):
        folded = fold(base, low, dtype=weight.dtype, rounding="nearest")
        assert torch.equal(folded.weight.nan_to_num(), expected.nan_to_num())
        assert folded.finite == expected.isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_of_the_type(dtype):
    """Zeros, subnormals and the largest, each moved by many changes from far below to far above its
    step."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    weight = every[every.isfinite()].view(1, 1, -1)
    for size in (1e-39, 1e-8, 6e-8, 1e-3, 1.0, 300.0, 65519.9, 65520.1, 1e38):
        A = torch.full_like(weight, 1, dtype=torch.float64)
        low = LowRank(A, torch.full((1, 1, 1), size, dtype=torch.float64), 1.0)
        folded = fold(weight, low, rounding="nearest")
        expected = round_once(exact(weight, low), dtype)
        assert torch.equal(folded.weight, expected), size
        assert folded.finite == bool(expected.isfinite().all())


def test_the_bound_is_needed_and_the_float32_path_is_taken(monkeypatch):
    """Without the numbers that are computed again some are wrong; with them, the definition is not
    asked for."""
    weight, low = make_change((1, 512, 512), 0.3, rank=16)
    expected = round_once(exact(weight, low), weight.dtype)
    monkeypatch.setattr(rounding, "_in_float64", None)
    assert torch.equal(fold(weight, low, rounding="nearest").weight, expected)
    monkeypatch.setattr(rounding, "_round_doubtful", lambda *_: 0.0)
    wrong = (fold(weight, low, rounding="nearest").weight != expected).sum()
    assert 0 < wrong < weight.numel() / 100


@pytest.mark.parametrize("name", ["nearest", "faithful"])
def test_defaults_of_the_caller_change_no_bit(name):
    weight, low = make_change((1, 64, 300), 1e-3)
    expected = fold(weight, low, rounding=name).weight
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(fold(weight, low, rounding=name).weight, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("low_precision", ["autocast", "products"])
def test_settings_of_the_caller_change_no_bit(low_precision):
    weight, low = make_change((1, 64, 300), 0.1)
    expected = round_once(exact(weight, low), weight.dtype)
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    try:
        if low_precision == "products":
            setting.fp32_precision = "bf16"
        with torch.autocast("cpu", enabled=low_precision == "autocast"):
            assert torch.equal(fold(weight, low, rounding="nearest").weight, expected)
    finally:
        setting.fp32_precision = before


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_torch_before_2_9_has_one_precision_for_all_devices(monkeypatch, precision):
    weight, low = make_change((1, 64, 300), 0.1)
    expected = round_once(exact(weight, low), weight.dtype)
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert torch.equal(fold(weight, low, rounding="nearest").weight, expected)


def test_sums_that_float32_cannot_hold():
    for size in (1e-25, 1e25):
        weight, low = make_change((1, 40, 50), 1e-2)
        weight = (weight.double() * size).bfloat16()
        low = LowRank(low.A, low.B, low.scale * size)
        folded = fold(weight, low, rounding="nearest")
        assert folded.change == pytest.approx(1e-2, rel=1e-2)
        assert 0.9 < folded.retention < 1.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("rounding", ["nearest", "faithful", "auto"])
def test_what_is_not_finite_is_told(value, rounding):
    weight, low = make_change((1, 30, 40))
    low.B[0, 3, 1] = value
    folded = fold(weight, low, dtype=torch.float16, rounding=rounding)
    assert not folded.finite
    assert folded.rounding == "nearest"
    assert not folded.weight[0, 3].isfinite().all()
    assert folded.weight[0, 4].isfinite().all()


def test_nothing_changes_nothing():
    weight, low = make_change((2, 30, 40))
    for rounding_ in ("nearest", "faithful", "auto"):
        folded = fold(weight, LowRank(low.A, torch.zeros_like(low.B), 1.0), rounding=rounding_)
        assert same_bits(folded.weight, weight)
        assert (folded.change, folded.retention, folded.finite) == (0.0, 1.0, True)


def test_the_result_goes_where_the_caller_says():
    weight, low = make_change((1, 100, 60))
    place = torch.empty(2, 60, 100, dtype=torch.bfloat16)
    for name in ("nearest", "faithful"):
        expected = fold(weight, low, rounding=name).weight
        assert expected.stride() == weight.stride()
        assert (
            fold(weight, low, rounding=name, out=place[1].mT[None]).weight.data_ptr()
            == place[1].data_ptr()
        )
        assert same_bits(place[1].mT[None].contiguous(), expected)


MEMORY = """
import resource, torch
from veneer.kernels import rounding
from veneer.kernels.rounding import fold
from veneer.kernels.threads import map_on_threads
from veneer.lowrank import LowRank
weight = (torch.randn(1, {out}, {in_}) * 0.02).{dtype}()
low = LowRank(torch.randn(1, 8, {in_}) * 1e-4, torch.randn(1, {out}, 8), 1.0)
made = torch.zeros_like(weight)
worth, rounding.NUMBA_MIN_ELEMENTS = rounding.NUMBA_MIN_ELEMENTS, 0  # numba's own memory is another matter
for part in (fold(weight[:, :64, :64], low.__class__(low.A[:, :, :64], low.B[:, :64], 1.0), rounding="{rounding}"),):
    pass
rounding.NUMBA_MIN_ELEMENTS = worth
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert fold(weight, low, rounding="{rounding}", out=made).rounding == "{rounding}"
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("name", "dtype"), [("nearest", "bfloat16"), ("nearest", "float"), ("faithful", "bfloat16")]
)
def test_memory_is_bounded(name, dtype):
    code = MEMORY.format(out=5000, in_=3000, rounding=name, dtype=dtype)
    assert (
        float(printed(code)) < 36
    )  # MiB, with what libraries allocate once; the weight itself is 29 or 57


# ----------------------------------------------------------------------------------------------
# faithful


def errors(folded, weight, low, gain=None, seed=1):
    """Relative errors of the change for inputs in A's rows, and for random ones."""
    values = exact(weight, low, gain)
    change, error = values - weight.double(), folded.weight.double() - values
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(weight.shape[0], weight.shape[2], 64, generator=generator, dtype=torch.float64)
    own = low.A.double().mT @ torch.randn(
        weight.shape[0], low.rank, 64, generator=generator, dtype=torch.float64
    )
    return tuple(((error @ each).norm() / (change @ each).norm()).item() for each in (own, x))


@pytest.mark.parametrize(
    ("ratio", "dtype", "bound"),
    [
        (1e-4, torch.bfloat16, 0.08),
        (1e-3, torch.bfloat16, 0.015),
        (1e-2, torch.bfloat16, 0.004),
        (1e-4, torch.float16, 0.01),
    ],
)
@pytest.mark.parametrize("shape", [(1, 384, 256), (1, 256, 384)])
def test_what_an_adapter_reads_survives(ratio, dtype, bound, shape):
    weight, low = make_change(shape, ratio, rank=4, dtype=dtype)
    near, true = (fold(weight, low, rounding=name) for name in ("nearest", "faithful"))
    assert true.rounding == "faithful"
    assert abs(true.retention - 1) < bound
    inside, outside = errors(true, weight, low)
    assert inside < bound
    if ratio < 5e-3:
        assert inside < errors(near, weight, low)[0] / 8
    stochastic = (
        1.5 * torch.finfo(dtype).eps / 2 / ratio
    )  # what rounding at random would leave for any input
    assert outside < stochastic
    values = exact(weight, low)
    moved = true.weight.double() - weight.double()
    change = values - weight.double()
    assert true.retention == pytest.approx(
        ((change * moved).sum() / (change * change).sum()).item(), abs=1e-6
    )


def cells(values, dtype):
    step, mid, half = (torch.empty_like(values) for _ in range(3))
    find_neighbours(values.clone(), dtype, step, mid, half)
    return values + mid - half.abs(), values + mid + half.abs()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gained", [False, True])
def test_only_the_two_neighbours_are_taken(dtype, gained):
    weight, low = make_change((2, 60, 70), 1e-2, dtype=dtype)
    low.B[:, 5] = 0
    gain = None if not gained else 1 + 0.01 * torch.randn(120)
    if gain is not None:
        gain.view(2, 60)[:, 5] = 1
    folded = fold(weight, low, gain, rounding="faithful")
    assert folded.rounding == "faithful"
    below, above = cells(exact(weight, low, gain), dtype)
    taken = folded.weight.double()
    assert ((taken == below) | (taken == above)).all()
    assert (taken != round_once(exact(weight, low, gain), dtype).double()).any()
    assert same_bits(folded.weight[:, 5], weight[:, 5])  # what is on the grid stays there


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_neighbours_are_those_of_the_type(dtype):
    every = torch.arange(0, 2**15, dtype=torch.int16).view(dtype).double()
    every = every[every.isfinite()]
    between = every[:-1] + (every[1:] - every[:-1]) * torch.rand(
        len(every) - 1, dtype=torch.float64
    ).clamp(0.01, 0.99)
    for sign in (1, -1):
        below, above = cells(sign * between, dtype)
        expected = (every[:-1], every[1:]) if sign == 1 else (-every[1:], -every[:-1])
        assert torch.equal(below, expected[0])
        assert torch.equal(above, expected[1])
        below, above = cells(sign * every, dtype)
        assert torch.equal(below, sign * every)
        assert torch.equal(above, sign * every)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_choice_overflows(dtype):
    largest = torch.finfo(dtype).max
    weight = torch.full((1, 8, 64), largest, dtype=dtype)
    weight[:, ::2] *= -1
    step = (
        largest
        - torch.tensor(largest, dtype=dtype).view(torch.int16).sub(1).view(dtype).double().item()
    )
    low = LowRank(torch.rand(1, 1, 64), weight[:, :, :1].sign(), 0.4 * step)
    folded = fold(weight, low, rounding="faithful")
    assert folded.finite
    assert folded.weight.isfinite().all()
    assert same_bits(folded.weight, weight)


def test_subnormals():
    weight = (torch.randint(-40, 40, (1, 50, 60)) * 2.0**-24).half()
    low = LowRank(torch.randn(1, 2, 60), torch.randn(1, 50, 2), 2.0**-26)
    folded = fold(weight, low, rounding="faithful")
    assert abs(folded.retention - 1) < 0.05
    below, above = cells(exact(weight, low), torch.float16)
    assert ((folded.weight.double() == below) | (folded.weight.double() == above)).all()


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 5), (1, 1, 1), (1, 2, 200), (30, 1, 9), (5000, 1, 3), (1, 5000, 3), (3, 40, 33)],
)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("gained", [False, True])
def test_any_shape(shape, side, gained):
    weight, low = make_change(shape, 1e-3, rank=2)
    gain = 1 + 0.01 * torch.randn(shape[0] * shape[1]) if gained else None
    for base in (weight, weight.mT.contiguous().mT):
        folded = fold(base, low, gain, rounding="faithful", side=side)
        below, above = cells(exact(weight, low, gain), torch.bfloat16)
        assert folded.rounding == "faithful"
        assert ((folded.weight.double() == below) | (folded.weight.double() == above)).all()
        near = fold(base, low, gain, rounding="nearest", side=side)
        assert torch.equal(near.weight, round_once(exact(weight, low, gain), torch.bfloat16))


def test_the_outputs_side_protects_what_B_writes():
    weight, low = make_change((1, 300, 200), 1e-3)
    values, B = exact(weight, low), low.B[0].double()
    near, true = (
        fold(weight, low, rounding=name, side="outputs") for name in ("nearest", "faithful")
    )
    found = [((one.weight.double() - values)[0].T @ B).norm().item() for one in (near, true)]
    assert found[1] < 0.1 * found[0]
    assert abs(true.retention - 1) < 0.01


def test_a_gain_is_protected_too():
    """A gain of 1.001 is less than half a step everywhere: to nearest, nothing of it is left."""
    weight, low = make_change((1, 200, 300), 1e-4)
    gain = torch.full((200,), 1.0008)
    near, true = (fold(weight, low, gain, rounding=name) for name in ("nearest", "faithful"))
    assert near.retention < 0.3
    assert abs(true.retention - 1) < 0.03
    change = exact(weight, low, gain) - weight.double()
    moved = true.weight.double() - weight.double()
    assert true.retention == pytest.approx(
        ((change * moved).sum() / (change * change).sum()).item(), abs=1e-6
    )
    rows = (change * moved).sum(2) / (change * change).sum(2)
    assert (rows - 1).abs().max() < 0.2


def test_rows_of_A_that_depend_on_each_other():
    weight, low = make_change((2, 60, 80), 1e-3)
    low.A[0, 1], low.A[0, 2], low.A[1] = low.A[0, 0], 0, 0
    assert [int((row.norm(dim=1) > 0.5).sum()) for row in basis(low.A.double())] == [2, 0]
    folded = fold(weight, low, rounding="faithful")
    assert abs(folded.retention - 1) < 0.05
    assert same_bits(folded.weight[1], weight[1])


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_stack_of_any_width_and_type_is_rounded_faithfully(source, side):
    """Widths that are no multiple of a chunk, where the last chunk of a stack lies apart in its
    buffers."""
    weight, low = make_change((3, 45, 50))
    expected = fold(weight, low, rounding="faithful", side=side)
    folded = fold(weight.to(source), low, dtype=torch.bfloat16, rounding="faithful", side=side)
    assert folded.rounding == "faithful"
    assert same_bits(folded.weight, expected.weight)
    assert abs(folded.retention - 1) < 0.05


def test_inputs_are_protected():
    weight, low = make_change((1, 200, 150), 1e-3)
    directions = torch.linalg.qr(torch.randn(150, 5, dtype=torch.float64))[0]
    x = (
        directions
        @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1]).double())
        @ torch.randn(5, 400, dtype=torch.float64)
    )
    plain, seen = (
        fold(weight, low, rounding="faithful", inputs=each) for each in (None, (x @ x.T)[None])
    )
    values = exact(weight, low)
    error = [((one.weight.double() - values)[0] @ x).norm().item() for one in (plain, seen)]
    assert error[1] < 0.2 * error[0]
    assert abs(seen.retention - 1) < 0.02


def test_auto_takes_what_is_needed():
    assert [fold(*make_change((1, 200, 300), ratio)).rounding for ratio in (1e-4, 1e-3, 1e-1)] == [
        "faithful",
        "faithful",
        "nearest",
    ]
    weight, low = make_change((1, 200, 300), 1e-3, dtype=torch.float32)
    assert fold(weight, low).rounding == "nearest"
    assert fold(weight, low, rounding="faithful").rounding == "nearest"  # float32 has no need of it
    folded = fold(
        weight, low, dtype=torch.bfloat16
    )  # from a finer base: W's own rounding would cover the change
    assert folded.rounding == "faithful"
    assert errors(folded, weight, low)[0] < 0.03
    assert errors(fold(weight, low, dtype=torch.bfloat16, rounding="nearest"), weight, low)[0] > 0.1
    assert (
        fold(weight.mul(1), LowRank(low.A, low.B, low.scale * 100), dtype=torch.bfloat16).rounding
        == "nearest"
    )


@pytest.mark.parametrize("name", ["nearest", "faithful"])
def test_threads_and_strides_change_no_bit(name):
    weight, low = make_change((1, 700, 500), 1e-3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads, base in itertools.product(
            (1, 2, 4), (weight, weight.mT.contiguous().mT, weight[:, :, :500])
        ):
            torch.set_num_threads(threads)
            results.append(fold(base, low, rounding=name))
    finally:
        torch.set_num_threads(before)
    for each in results[1:]:
        assert torch.equal(each.weight, results[0].weight)
        assert each.retention == pytest.approx(results[0].retention, abs=1e-6)


def test_another_rounding_is_an_error():
    with pytest.raises(ConfigError, match="rounding='stochastic'"):
        fold(*make_change((1, 4, 5)), rounding="stochastic")


# ----------------------------------------------------------------------------------------------
# threads


def test_work_is_spread_and_settings_stay():
    seen, before = set(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def work(item, own):
            own.append(item)
            seen.add((threading.get_ident(), torch.get_num_threads()))
            time.sleep(0.002)
            return item * item, torch.is_grad_enabled()

        assert map_on_threads(range(40), list, work, 3) == [
            (item * item, False) for item in range(40)
        ]
        assert len(seen) == 3
        assert {count for _, count in seen} == {1}
        assert torch.get_num_threads() == 3
        counts = []
        late = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        late.start()
        late.join()
        assert counts == [3]  # a thread that starts later has the caller's setting
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_failure_is_raised(threads):
    done = []

    def work(item, _):
        if item == 5:
            raise MemoryError("no room")
        done.append(item)
        time.sleep(0.001)

    before = threading.active_count()
    with pytest.raises(MemoryError, match="no room"):
        map_on_threads(range(1000), list, work, threads)
    assert len(done) < 100
    assert threading.active_count() == before


def test_a_thread_that_cannot_start_leaves_none_behind(monkeypatch):
    """The others would wait for it, and torch would give every later thread of the process one
    core."""
    before, alive, start = torch.get_num_threads(), threading.active_count(), threading.Thread.start
    started = itertools.count()

    def few(self):
        if next(started) == 2:
            raise RuntimeError("can't start new thread")
        start(self)

    torch.set_num_threads(4)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", few)
            with pytest.raises(RuntimeError, match="can't start"):
                map_on_threads(range(9), lambda: None, lambda item, _: item, 4)
        for _ in range(100):
            if threading.active_count() == alive:
                break
            time.sleep(0.05)
        assert threading.active_count() == alive
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [4]
        assert map_on_threads(range(9), lambda: None, lambda item, _: item, 4) == list(range(9))
    finally:
        torch.set_num_threads(before)
