"""Slots: whatever comes, goes and moves, each row's logits are those of its tokens alone."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.serving import make

from veneer.kernels import weight_first
from veneer.models.decode.attention import round_up
from veneer.models.decode.forward import Forward
from veneer.models.decode.slots import MIN_COLUMNS, Budget, LayerForm, Slots

CPU = torch.device("cpu")
#: of the tiny Llama in float64: 2 layers, 2 key-value heads of 8 numbers
FORM = LayerForm(2, 8, 8, torch.float64, CPU)
TOKEN = 2 * FORM.token_bytes  # bytes of a token in both layers


@functools.cache
def models_of(name: str):
    """A model in float64, and a Forward of a copy of it."""
    reference, served = make(name).double(), make(name).double()
    return reference, Forward(served)


def expected_logits(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1]


def near(logits, model, tokens) -> bool:
    """Gemma 2 has a softmax in float32."""
    return bool((logits - expected_logits(model, tokens)).abs().max() < 1e-5)


turn = st.one_of(
    st.tuples(st.just("fill"), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    st.tuples(st.just("pieces"), st.lists(st.integers(1, 60), min_size=1, max_size=4)),
    st.tuples(st.just("together"), st.lists(st.integers(1, 40), min_size=2, max_size=2)),
    st.tuples(st.just("decode"), st.integers(1, 3)),
    st.tuples(st.just("beside"), st.lists(st.integers(1, 40), min_size=1, max_size=2)),
    st.tuples(st.just("widen"), st.integers(0, 5)),
    st.tuples(st.just("release"), st.integers(0, 5)),
)


class Simulation:
    """Rows with the tokens that they should have."""

    def __init__(self, name: str) -> None:
        self.model, self.forward = models_of(name)
        self.slots = Slots(6, 256, CPU)
        self.rows: list[tuple] = []
        self.number = 0

    def fresh(self, length: int) -> list[int]:
        self.number += 1
        return [(31 * self.number + 7 * i * i) % 256 + 3 for i in range(length)]

    def fill(self, widths):
        tokens = [self.fresh(width) for width in widths]
        rows = [self.slots.allocate(width) for width in widths]
        logits = self.forward.fill(self.slots, rows, tokens)
        self.rows += zip(rows, tokens, strict=True)
        return zip(logits, tokens, strict=True)

    def pieces(self, widths):
        """One row, in several calls."""
        tokens, start = self.fresh(sum(widths)), 0
        row = self.slots.allocate(len(tokens))
        for width in widths:
            piece = tokens[start : start + width]
            logits = self.forward.fill(self.slots, [row], [piece], [start])
            start += width
        self.rows.append((row, tokens))
        return [(logits[0], tokens)]

    def together(self, widths):
        """Two rows in one call, from different columns: the first one has a beginning already."""
        tokens = [self.fresh(width + 20) for width in widths]
        rows = [self.slots.allocate(len(ids)) for ids in tokens]
        self.forward.fill(self.slots, rows[:1], [tokens[0][:20]])
        logits = self.forward.fill(self.slots, rows, [tokens[0][20:], tokens[1]], [20, 0])
        self.rows += zip(rows, tokens, strict=True)
        return zip(logits, tokens, strict=True)

    def decode(self, times):
        for _ in range(times):
            rows, tokens, last, lengths = self.next_tokens()
            logits = self.forward.decode(self.slots, rows, last, lengths)
        return zip(logits, tokens, strict=True)

    def beside(self, widths):
        """A token of each row, and new rows in the same call: the first of them from a column."""
        tokens = [self.fresh(width + 5) for width in widths]
        new = [self.slots.allocate(len(ids)) for ids in tokens]
        self.forward.fill(self.slots, new[:1], [tokens[0][:5]])
        starts = [5, 0][: len(widths)]
        pieces = [
            (row, start, ids[start:]) for row, start, ids in zip(new, starts, tokens, strict=True)
        ]
        rows, old, last, lengths = self.next_tokens()
        logits = self.forward.together(self.slots, rows, last, lengths, pieces)
        self.rows += zip(new, tokens, strict=True)
        return zip(logits, [*old, *tokens], strict=True)

    def next_tokens(self):
        """Rows with one more token each, these tokens, and the columns that they go to."""
        for row, tokens in self.rows:
            tokens.append((tokens[-1] * 17 + 5) % 256 + 3)
            assert self.slots.widen(row, len(tokens))
        self.rows.sort(key=lambda pair: pair[0].position)
        rows, tokens = zip(*self.rows, strict=True)
        return rows, tokens, [ids[-1] for ids in tokens], [len(ids) - 1 for ids in tokens]

    def release(self, index):
        row, _ = self.rows.pop(index)
        self.slots.release(row)
        return []

    def widen(self, index):
        assert self.slots.widen(self.rows[index][0], 200)
        return []


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(turn, max_size=10))
def test_rows_are_as_if_alone(name, turns):
    it = Simulation(name)
    new = {"fill": len, "pieces": lambda _: 1, "together": len, "beside": len}
    with torch.inference_mode():
        for kind, argument in turns:
            if kind in new and len(it.rows) + new[kind](argument) > it.slots.rows:
                continue
            if (kind in ("decode", "beside") and not it.rows) or (
                kind in ("widen", "release") and argument >= len(it.rows)
            ):
                continue
            for logits, tokens in getattr(it, kind)(argument):
                assert near(logits, it.model, list(tokens))
        while it.rows:
            it.release(0)
    for size_class in it.slots.classes.values():
        assert not size_class.rows
        for layer in size_class.layers:
            assert not layer.keys.abs().sum() + layer.values.abs().sum()


def test_a_long_row_lies_apart_from_short_ones():
    _, forward = models_of("llama")
    slots = Slots(16, 1000, CPU)
    short = [slots.allocate(20) for _ in range(3)]
    with torch.inference_mode():
        forward.fill(slots, short, [[5, 6]] * 3)
        before = slots.nbytes
        long = slots.allocate(700)
        forward.fill(slots, [long], [[5] * 700])
        assert [row.columns for row in short] == [MIN_COLUMNS] * 3
        assert before == 3 * MIN_COLUMNS * TOKEN
        assert slots.nbytes - before == round_up(1000) * TOKEN
        slots.release(long)
        slots.trim()
    assert slots.nbytes == before


def test_rows_are_taken_within_the_budget():
    row = MIN_COLUMNS * TOKEN
    tensor = row // 4  # of keys or values in one layer
    slots = Slots(16, 512, CPU, [FORM, FORM], Budget(4 * row + 4 * tensor))
    rows = [slots.allocate(100) for _ in range(4)]
    assert None not in rows
    assert slots.allocate(100) is None
    assert not slots.widen(rows[0], 200)
    slots.release(rows.pop())
    slots.release(rows.pop())
    assert slots.budget.row_bytes == slots.nbytes == 4 * row
    assert slots.widen(rows[0], 200)  # in the memory that the two have left
    assert slots.nbytes + slots.budget.reserved_bytes <= slots.budget.limit
    assert rows[0].columns == 2 * MIN_COLUMNS


def test_what_others_hold_is_reclaimed_before_a_row_is_refused():
    row = MIN_COLUMNS * TOKEN
    budget = Budget(2 * row)
    slots = Slots(4, 128, CPU, [FORM, FORM], budget)
    budget.prefix_bytes, requested = row, []

    def reclaim(lacking):
        requested.append(lacking)
        budget.prefix_bytes -= lacking

    slots.reclaim = reclaim
    assert slots.allocate(5) is not None
    assert requested == [row // 4]
    assert slots.allocate(5) is None
    assert len(requested) == 1  # all of it would not have been enough


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_row_may_begin_with_blocks_of_another(name):
    model, forward = models_of(name)
    slots, tokens = Slots(4, 400, CPU), [7 * i % 250 + 3 for i in range(220)]
    with torch.inference_mode():
        first, second = slots.allocate(230), slots.allocate(230)
        forward.fill(slots, [first], [tokens])
        blocks = slots.read_blocks(first, 0, 13)
        slots.release(first)
        slots.write_blocks(second, blocks)
        logits = forward.fill(slots, [second], [[*tokens[208:], 9]], [208])
    assert near(logits[0], model, [*tokens, 9])
    assert {block.untyped_storage().nbytes() for block in blocks} == {slots.block_elements * 8}


def test_rows_of_a_decode_call_are_sorted():
    _, forward = models_of("llama")
    slots = Slots(2, 64, CPU)
    rows = [slots.allocate(5), slots.allocate(5)]
    with torch.inference_mode(), pytest.raises(ValueError, match="sorted"):
        forward.decode(slots, rows[::-1], [5, 6], [0, 0])


def test_slots_are_of_no_use_outside_of_a_call():
    slots = Slots(1, 8, CPU)
    with pytest.raises(RuntimeError, match="within"):
        slots.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)


def test_a_call_that_fails_leaves_no_call_behind():
    model, forward = models_of("llama")
    slots = Slots(1, 8, CPU)
    with pytest.raises(ZeroDivisionError), slots.fill([slots.allocate(4)], [0], [4], 4):
        raise ZeroDivisionError
    assert slots.call is None
    ids = torch.tensor([[5, 6]])
    with torch.inference_mode():
        assert torch.allclose(forward.model(ids).logits, model(ids).logits)  # its own attention


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [20, 200], ids=["class that grows", "class that is made"])
def test_memory_that_runs_out_while_it_grows_leaves_rows_as_they_are(failing, length, monkeypatch):
    model, forward = models_of("llama")
    slots, tokens = Slots(4, 400, CPU), [7 * i % 250 + 3 for i in range(20)]
    with torch.inference_mode():
        row = slots.allocate(25)
        forward.fill(slots, [row], [tokens])
        sizes_made, new_zeros_of_torch = [], torch.Tensor.new_zeros

        def new_zeros(self, *sizes, **given):
            sizes_made.append(sizes)
            if len(sizes_made) > failing:
                raise torch.OutOfMemoryError("on purpose")
            return new_zeros_of_torch(self, *sizes, **given)

        monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
        with pytest.raises(torch.OutOfMemoryError):
            slots.allocate(length)
        monkeypatch.undo()
        assert near(forward.decode(slots, [row], [9], [20])[0], model, [*tokens, 9])
        second = slots.allocate(length)
        forward.fill(slots, [second], [[5] * (length - 1)])
        logits = forward.decode(slots, [row, second], [10, 11], [21, length - 1])
    assert near(logits[0], model, [*tokens, 9, 10])
    assert near(logits[1], model, [*[5] * (length - 1), 11])


def test_rows_that_begin_with_a_copy_of_another_go_on_by_themselves():
    model, forward = models_of("llama")
    slots, tokens = Slots(6, 256, CPU, [FORM, FORM]), [7 * i % 250 + 3 for i in range(20)]
    slots.reserve(40, 3)
    (size_class,) = slots.classes.values()
    assert (size_class.capacity, len(size_class.rows)) == (3, 0)
    memory = size_class.layers[0].keys
    with torch.no_grad():
        row = slots.allocate(40)
        forward.fill(slots, [row], [tokens])
        copies = [slots.allocate(40), slots.allocate(40), slots.allocate(200)]
        assert size_class.layers[0].keys is memory
        slots.copy(row, copies, len(tokens))
        slots.release(copies.pop(0))  # another row takes its place
        rows = sorted([row, *copies], key=lambda each: each.position)
        logits = forward.decode(slots, rows, [9, 10, 11], [20] * 3)
        for number, token in enumerate((9, 10, 11)):
            assert near(logits[number], model, [*tokens, token])
    for each in rows:
        slots.release(each)
    assert all(not layer.keys.any() for each in slots.classes.values() for layer in each.layers)
    slots.clear()
    assert (slots.nbytes, slots.budget.row_bytes, slots.budget.reserved_bytes) == (0, 0, 0)


def test_nothing_is_reserved_that_the_budget_does_not_hold():
    slots = Slots(8, 256, CPU, [FORM, FORM], Budget(4 * 128 * TOKEN))
    slots.reserve(100, 8)
    assert slots.nbytes == 0
    assert slots.allocate(100) is not None


@torch.inference_mode()
def test_a_few_rows_of_float32_are_decoded_weight_first(monkeypatch):
    """The logits are those of the model, and its head is as before in and after each call, since
    another thread may load an adapter for it at any time."""
    model = make("llama").eval()
    forward, calls, linear = Forward(make("llama").eval()), [], weight_first.linear
    monkeypatch.setattr(weight_first, "is_amd", lambda: True)

    def multiply(x, *rest):
        calls.append((len(x), "forward" in forward.model.lm_head.__dict__))
        return linear(x, *rest)

    monkeypatch.setattr(weight_first, "linear", multiply)
    slots, prompts = Slots(3, 32, CPU), [[3, 4, 5], [6, 7], [8]]
    rows: list = [slots.allocate(8) for _ in prompts]
    forward.fill(slots, rows, prompts)
    assert not calls
    logits = forward.decode(slots, rows, [9, 10, 11], [3, 2, 1])
    for row, prompt, token in zip(logits, prompts, [9, 10, 11], strict=True):
        assert bool((row - expected_logits(model, [*prompt, token])).abs().max() < 1e-5)
    assert calls == [(3, False)]
    forward.close()
    assert not forward.model.lm_head._forward_hooks
    assert not forward.model.lm_head._forward_pre_hooks
