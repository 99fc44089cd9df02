"""The compiled loop over mixed rows equals float64 arithmetic, whatever shapes, dtypes and groups
it is given."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.banks import Linears, saved
from tests.support.compiled import needs_loop
from tests.support.forked import Program
from tests.support.toys import error

import veneer
import veneer.bank.batch_state
from veneer.kernels.compiled import mixed_rows as mixed
from veneer.kernels.compiled import switch

pytestmark = needs_loop("mixed_rows")

needs_dots = pytest.mark.skipif(
    not mixed.bf16_dot.able(), reason="the processor has no AVX512-BF16"
)
# : of the sum of all terms' magnitudes, by the dtype of the rows: in bfloat16 h is rounded, and the
# result
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2 * 2.0**-8 * 1.01}


@st.composite
def calls(draw):
    """x [N · tokens, in], out, and for each group its rows and ((A, B) or None, weight) of what
    they use."""
    dtype, factors = draw(st.sampled_from(mixed.DTYPES)), draw(st.sampled_from(mixed.DTYPES))
    in_, out = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    count, tokens = draw(st.integers(1, 9)), draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    ranks = draw(st.lists(st.integers(1, 13), min_size=1, max_size=4))
    adapters = [(numbers(rank, in_).to(factors), numbers(rank, out).to(factors)) for rank in ranks]
    used = st.tuples(st.sampled_from([None, *adapters]), st.sampled_from([1.0, 0.5, -2.0, 0.0]))
    of_row = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    groups = [
        ([row for row in range(count) if of_row[row] == g], draw(st.lists(used, max_size=3)))
        for g in set(of_row)
    ]
    return numbers(count * tokens, in_).to(dtype), out, groups, factors


def loop(x, out, groups, factors):
    rows = mixed.rows([(own, [weight for _, weight in uses]) for own, uses in groups])
    return mixed.change(
        x, out, rows, mixed.table([pair for _, uses in groups for pair, _ in uses]), factors
    )


@contextmanager
def dots(there):
    """Whether the processor's products of pairs of bfloat16 numbers are used."""
    before = mixed.bf16_dot.able
    mixed.bf16_dot.able = lambda: there
    try:
        yield
    finally:
        mixed.bf16_dot.able = before


#: with the processor's own bfloat16 products, if it has them, and without
WAYS = pytest.mark.parametrize(
    "there", [pytest.param(True, marks=needs_dots), False], ids=["dots", "widened"]
)


@WAYS
@settings(max_examples=200, deadline=None)
@given(calls())
def test_the_loop_equals_float64(there, call):
    x, out, groups, _ = call
    count = sum(len(own) for own, _ in groups)
    by_row, expected = (
        x.double().view(count, -1, x.shape[1]),
        torch.zeros(count, x.shape[0] // count, out).double(),
    )
    bound = torch.zeros_like(expected)  # the same before terms cancel
    for own, uses in groups:
        for pair, weight in uses:
            if pair is not None:
                A, B = (factor.double() for factor in pair)
                expected[own] += weight * (by_row[own] @ A.mT @ B)
                bound[own] += abs(weight) * (by_row[own].abs() @ A.abs().mT @ B.abs())
    with dots(there):
        found = loop(*call)
    assert found.dtype is x.dtype
    assert bool(
        ((found.double().view_as(expected) - expected).abs() <= CLOSE[x.dtype] * bound).all()
    )


@WAYS
@pytest.mark.parametrize("dtype", mixed.DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_not_finite_stays_in_its_token_and_its_adapter(dtype, tokens, there):
    x, sound = (
        torch.randn(3 * tokens, 20).to(dtype),
        (torch.randn(8, 20).to(dtype), torch.randn(8, 9).to(dtype)),
    )
    bad = tuple(torch.full_like(one, torch.inf) for one in sound)
    x[0] = torch.nan
    with dots(there):
        found = loop(x, 9, [([0, 1], [(sound, 1.0)]), ([2], [(bad, 1.0)])], dtype)
    expected = torch.ones(3 * tokens, dtype=torch.bool)
    expected[0] = expected[2 * tokens :] = False
    assert torch.equal(found.isfinite().all(1), expected)
    assert found[0].isnan().all()


def test_bfloat16_is_rounded_to_nearest():
    """Ties to even, as torch does it."""
    wide = torch.tensor(
        [[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.4e38, 2.0**-140]]
    )
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    found = loop(x, wide.shape[1], [([0], [((torch.ones(1, 1), wide), 1.0)])], torch.float32)
    assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("without", ["numba", "the switch", "few threads"])
def test_a_bank_without_the_loop_gives_the_same(without, tmp_path, monkeypatch):
    model = saved(Linears(), tmp_path, "a", "b")
    x, found, used = torch.randn(4, 7, 12), [], []
    change = mixed.change
    monkeypatch.setattr(mixed, "change", lambda *given: (used.append(1), change(*given))[1])
    for there in (True, False):
        if without == "numba":
            monkeypatch.setattr(switch, "has_numba", lambda there=there: there)
        elif without == "the switch":
            monkeypatch.setattr(switch, "ON", frozenset({"mixed_rows"} if there else ()))
        else:
            monkeypatch.setattr(veneer.bank.batch_state, "THREADS", 3 if there else 0)
        bank = veneer.Bank(model)
        for name in ("a", "b"):
            bank.add(tmp_path / name)
        before = len(used)
        with torch.no_grad(), bank.rows(["a", None, {"a": 0.5, "b": 2.0}, "b"]):
            found.append(model(x))
        assert (len(used) > before) is there
        bank.close()
    assert error(*found) < 1e-6


LOOPS = """
import os
from called import step
from veneer.kernels.compiled import numba_ops as kernels
kernels.sources = lambda: os.environ["SOURCES"]
def loop(x):
    return step(x)
print(kernels.compiled(loop)(1))
"""


def test_a_compiled_loop_is_kept_until_what_it_calls_changes(tmp_path):
    """numba alone looks at the loop's own file."""
    (tmp_path / "loops.py").write_text(LOOPS)
    found = []
    for number in (1, 2):
        (tmp_path / "called.py").write_text(
            f"import numba\n@numba.njit\ndef step(x):\n    return x + {number}\n"
        )
        # without bytecode: two texts of one second and one size are the same to Python
        code = "import sys; sys.dont_write_bytecode = True; import loops"
        done = Program(code, "torch", "numba", folder=tmp_path, SOURCES=str(number))
        assert done.wait() == 0, done.said
        found.append(done.said.strip())
    assert found == ["2", "3"]
    assert len(list(tmp_path.rglob("*loop_*.nbi"))) == 2
