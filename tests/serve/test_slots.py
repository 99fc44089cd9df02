"""Slots: whatever comes, goes and moves, each row's logits are those of its tokens alone."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.serving import make

from veneer.serve.forward import Forward
from veneer.serve.slots import BLOCK, Slots


@functools.cache
def known(name: str):
    """A model in float64, and a Forward of a copy of it."""
    own, served = make(name).double(), make(name).double()
    return own, Forward(served)


def wanted(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1]


turn = st.one_of(
    st.tuples(st.just("fill"), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    st.tuples(st.just("extend"), st.lists(st.integers(1, 8), min_size=1, max_size=4)),
    st.tuples(st.just("decode"), st.integers(1, 3)),
    st.tuples(st.just("leave"), st.integers(0, 5)),
)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(turn, max_size=10))
def test_rows_are_as_if_alone(name, turns):
    model, forward = known(name)
    slots, aside = Slots(6, 96, torch.device("cpu")), Slots(1, 96, torch.device("cpu"))
    rows: list[list[int]] = []
    number = 0

    def fresh(length: int) -> list[int]:
        nonlocal number
        number += 1
        return [(31 * number + 7 * i * i) % 256 + 3 for i in range(length)]

    with torch.inference_mode():
        for kind, what in turns:
            if kind == "fill" and len(rows) + len(what) <= slots.rows:
                new = [fresh(length) for length in what]
                logits = forward.fill(slots, len(rows), new)
                rows += new
                found = zip(logits, new, strict=True)
            elif kind == "extend" and len(rows) < slots.rows:
                whole, start = fresh(sum(what)), 0
                for width in what:
                    logits = forward.fill(aside, 0, [whole[start : start + width]], start)
                    start += width
                slots.adopt(len(rows), aside, start)
                rows.append(whole)
                found = [(logits[0], whole)]
            elif kind == "decode" and rows:
                for _ in range(what):
                    for row in rows:
                        row.append((row[-1] * 17 + 5) % 256 + 3)
                    logits = forward.decode(
                        slots, [row[-1] for row in rows], [len(row) - 1 for row in rows]
                    )
                found = zip(logits, rows, strict=True)
            elif kind == "leave" and what < len(rows):
                slots.leave(what, len(rows) - 1)
                rows[what] = rows[-1]
                rows.pop()
                found = []
            else:
                found = []
            for logits, tokens in found:
                assert (
                    logits - wanted(model, tokens)
                ).abs().max() < 1e-5  # Gemma 2 has a softmax in float32
        for row in reversed(range(len(rows))):
            slots.leave(row, row)
    for one in (slots, aside):
        assert not any(layer.keys.abs().sum() + layer.values.abs().sum() for layer in one.kept)
        assert not any(one.touched)


def test_memory_grows_with_what_is_used():
    _, forward = known("llama")
    slots = Slots(16, 1000, torch.device("cpu"))
    with torch.inference_mode():
        forward.fill(slots, 0, [[5, 6]])
        assert slots.allocated == (1, 8 * BLOCK)
        forward.fill(slots, 1, [[5, 6], [7]])
        assert slots.allocated == (3, 8 * BLOCK)
        forward.fill(slots, 3, [[5] * 130])
        assert slots.allocated == (6, 16 * BLOCK)
        assert slots.kept[0].keys.shape == (6, 2, 256, 8)
        slots.reserve(16, 1000)
    assert slots.allocated == (16, 1008)


def test_slots_are_of_no_use_outside_of_a_call():
    slots = Slots(1, 8, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="within"):
        slots.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)


def test_a_call_that_fails_leaves_no_call_behind():
    model, forward = known("llama")
    slots = Slots(1, 8, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), slots.fill(0, 1, 4):
        raise ZeroDivisionError
    assert slots.call is None
    ids = torch.tensor([[5, 6]])
    with torch.inference_mode():
        assert torch.allclose(forward.model(ids).logits, model(ids).logits)  # its own attention


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_memory_that_runs_out_while_it_grows_leaves_rows_as_they_are(failing, monkeypatch):
    model, forward = known("llama")
    slots, tokens = Slots(4, 400, torch.device("cpu")), [7 * i % 250 + 3 for i in range(20)]
    with torch.inference_mode():
        forward.fill(slots, 0, [tokens])
        made, own = [], torch.Tensor.new_zeros

        def new_zeros(self, *sizes, **given):
            made.append(sizes)
            if len(made) > failing:
                raise torch.OutOfMemoryError("on purpose")
            return own(self, *sizes, **given)

        monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
        with pytest.raises(torch.OutOfMemoryError):
            forward.fill(slots, 1, [[5] * 200])
        monkeypatch.undo()
        logits = forward.decode(slots, [9], [20])
        assert torch.allclose(logits[0], wanted(model, [*tokens, 9]))
        forward.fill(slots, 1, [[5] * 200])
        logits = forward.decode(slots, [10, 11], [21, 200])
    assert torch.allclose(logits[0], wanted(model, [*tokens, 9, 10]))
    assert torch.allclose(logits[1], wanted(model, [*[5] * 200, 11]))
