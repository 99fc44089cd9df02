"""Log-probabilities of prompts: the engine's beside those of the model's own forward, in float64."""

from __future__ import annotations

import pytest
import torch
from tests.support.serving import Client, Recorder, alone, asked, make, prompts
from tests.support.tiny import tiny_tokenizer

from veneer.serve import prompt_scores
from veneer.serve.engine import Engine
from veneer.serve.prefill_budget import TOKEN_MULTIPLE
from veneer.serve.prompt_scores import PromptScore
from veneer.serve.requests import RequestError


@pytest.fixture
def opened():
    made = []

    def open_engine(model=None, *, start=True, **options) -> Engine:
        engine = Engine(model or make("llama"), tiny_tokenizer(), **options)
        made.append(engine)
        if start:
            engine.start()
        return engine

    yield open_engine
    for engine in made:
        engine.close()
        assert not engine.waiting


def reference(model, prompt):
    """log p of each token but the first, [n - 1, vocabulary], by one call in float64."""
    with torch.inference_mode():
        double = type(model)(model.config).double().eval()
        double.load_state_dict(model.state_dict())
        logits = double(torch.tensor([prompt]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1)


def scored(client):
    (tokens,) = [piece.prompt for piece in client.pieces if piece.prompt]
    return tokens


def check(model, prompt, client, alternatives=2):
    tokens = scored(client)
    assert [token.id for token in tokens] == list(prompt)
    assert (tokens[0].logprob, tokens[0].top, tokens[0].rank) == (None, (), None)
    wanted = reference(model, prompt)
    for token, row in zip(tokens[1:], wanted, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=2e-4)
        assert len(token.top) == alternatives
        best = row.topk(alternatives).values if alternatives else ()
        for (id, _, logprob), value in zip(token.top, best, strict=True):
            assert logprob == pytest.approx(float(value), abs=2e-4)
            assert logprob == pytest.approx(float(row[id]), abs=2e-4)
        assert token.rank == 1 + sum(row > row[token.id] + 1e-6) or token.rank == pytest.approx(
            1 + int(sum(row > row[token.id])), abs=1
        )
        if token.rank == 1 and alternatives:
            assert token.logprob == token.top[0][2]  # equal, not near: who asks compares them


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize("width", [16, 64])
def test_scores_are_those_of_one_call_whatever_the_pieces(name, width, opened, monkeypatch):
    monkeypatch.setattr(prompt_scores, "LOGIT_BYTES", 4 * 259 * width)
    model = make(name)
    asks = [ask for ask in prompts(6, 60, seed=3) if len(ask) > 1]
    wanted = [alone(model, ask, 5) for ask in asks]
    engine = opened(model, rows=2, prefill=48)
    clients = [Client(engine, asked(ask, 5, prompt_logprobs=2)) for ask in asks]
    beside = Client(engine, asked(asks[0], 5))
    for ask, client, tokens in zip(asks, clients, wanted, strict=True):
        assert client.wait().tokens == tokens
        check(model, ask, client)
    assert beside.wait().tokens == wanted[0]
    assert all(not piece.prompt for piece in beside.pieces)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_prompt_is_computed_once_whatever_follows(limit, opened):
    model = make("llama")
    engine = opened(model, rows=1)
    counts, fill = [], engine._forward.fill

    def counted_fill(slots, rows, pieces, *args, **options):
        counts.extend(map(len, pieces))
        return fill(slots, rows, pieces, *args, **options)

    engine._forward.fill = counted_fill
    asks = [ask for ask in prompts(8, 60) if len(ask) > 1]
    clients = [Client(engine, asked(ask, limit, prompt_logprobs=0)) for ask in asks]
    for ask, client in zip(asks, clients, strict=True):
        assert client.wait().tokens == alone(model, ask, max(1, limit))[:limit]
        assert client.finish in ("length", "stop")
        check(model, ask, client, alternatives=0)
    assert sum(counts) == sum(map(len, asks))
    assert engine.running == 0


def test_a_scored_prompt_reads_no_prefix_and_leaves_one(opened):
    model = make("llama")
    engine = opened(model)
    ask = tuple(range(5, 69))
    plain = Client(engine, asked(ask, 3)).wait()
    scored_client = Client(engine, asked(ask, 3, prompt_logprobs=0)).wait()
    assert scored_client.pieces[-1].cached == 0
    check(model, ask, scored_client, alternatives=0)
    longer = Client(engine, asked((*ask, 7, 8), 0, prompt_logprobs=0)).wait()
    again = Client(engine, asked((*ask, 7, 8), 3)).wait()
    assert longer.pieces[-1].cached == 0
    assert again.pieces[-1].cached == 64
    assert plain.tokens == scored_client.tokens == alone(model, ask, 3)


def test_the_pieces_of_a_prompt_take_the_time_that_the_gap_leaves(opened):
    engine = opened(start=False, rows=2, gap=1e-9)
    calls, fill, decode = [], engine._forward.fill, engine._forward.decode

    def counted_fill(slots, rows, pieces, *args, **options):
        calls.append(sum(map(len, pieces)))
        return fill(slots, rows, pieces, *args, **options)

    engine._forward.fill = counted_fill
    engine._forward.decode = lambda *args: (calls.append("decode"), decode(*args))[1]
    running = Client(engine, asked((5, 6), 60, ignore_eos=True))
    with torch.inference_mode():
        engine.step()
        long = Client(engine, asked(tuple(range(5, 105)), 0, prompt_logprobs=0))
        while not long.over.is_set():
            engine.step()
        running.ticket.cancel()
        engine.step()
    pieces = [call for call in calls[calls.index(TOKEN_MULTIPLE) :] if call != "decode"]
    assert pieces == [TOKEN_MULTIPLE] * 12 + [4]
    assert "8 8" not in " ".join(map(str, calls))


def test_scores_that_are_computed_again_are_taken_once():
    score = PromptScore((3, 1, 2), 1, str)
    logits = torch.eye(4)
    score.take(0, logits[:2])
    first = list(score.tokens)
    score.take(0, logits[:1])  # of a request that gave its row back
    assert (score.length, score.done, score.tokens) == (2, False, first)
    score.take(1, logits[1:3])
    assert (score.length, score.done, score.tokens) == (3, True, first)
    assert [token.id for token in score.tokens] == [3, 1, 2]


def test_a_prompt_may_fill_the_context_if_nothing_follows(opened):
    engine = opened(length=32)
    full = tuple(range(5, 37))
    client = Client(engine, asked(full, 0, prompt_logprobs=0)).wait()
    assert len(scored(client)) == 32
    with pytest.raises(RequestError, match="prompt of 32 tokens"):
        Client(engine, asked(full, 1, prompt_logprobs=0))
    with pytest.raises(RequestError, match="max_tokens"):
        Client(engine, asked((5, 6), 0))


def test_a_prompt_of_one_token_has_one_entry(opened):
    client = Client(opened(), asked((5,), 0, prompt_logprobs=3)).wait()
    (token,) = scored(client)
    assert (token.id, token.logprob) == (5, None)


def test_each_prompt_is_scored_with_its_own_adapters(opened):
    bank = Recorder()
    engine = opened(bank=bank, rows=2)
    bank.calls.clear()
    blends = [{"a": 1.0}, {}, {"b": 0.5}]
    clients = [
        Client(engine, asked((5, 6, 7), 0, blend=blend, prompt_logprobs=0)) for blend in blends
    ]
    for client in clients:
        assert client.wait().finish == "length"
    seen = [blend for call in bank.calls for blend in call]
    assert sorted(map(str, seen)) == sorted(map(str, blends))
    assert not bank.held


def test_running_rows_have_their_tokens_between_the_pieces_of_a_prompt(opened, monkeypatch):
    monkeypatch.setattr(prompt_scores, "LOGIT_BYTES", 4 * 259 * 16)
    engine = opened(start=False, rows=2)
    order = []
    fill, decode = engine._forward.fill, engine._forward.decode

    def noted_fill(*args, of_all_tokens=False, **options):
        order.extend(["score"] * of_all_tokens)
        return fill(*args, of_all_tokens=of_all_tokens, **options)

    engine._forward.fill = noted_fill
    engine._forward.decode = lambda *args: (order.append("decode"), decode(*args))[1]
    running = Client(engine, asked((5, 6), 40, ignore_eos=True))
    with torch.inference_mode():
        engine.step()
        long = Client(engine, asked(tuple(range(5, 105)), 0, prompt_logprobs=0))
        while not long.over.is_set():
            engine.step()
    assert order.count("score") >= 7
    first = order.index("score")
    assert "score score" not in " ".join(order[first:])
    running.ticket.cancel()
    with torch.inference_mode():
        engine.step()


@pytest.mark.parametrize("when", ["waiting", "between pieces"])
def test_a_request_that_is_cancelled_gives_its_adapter_back(when, opened, monkeypatch):
    monkeypatch.setattr(prompt_scores, "LOGIT_BYTES", 4 * 259 * 16)
    bank = Recorder()
    engine = opened(bank=bank, start=False)
    client = Client(engine, asked((5,) * 100, 0, blend={"a": 1.0}, prompt_logprobs=0))
    with torch.inference_mode():
        if when == "between pieces":
            engine.step()
            assert client.ticket.score.length == 16
        client.ticket.cancel()
        engine.step()
    assert client.wait().finish == "cancelled"
    assert not bank.held


def test_a_failure_ends_the_requests_of_its_call_alone(opened, caplog):
    model = make("llama")
    engine = opened(model)
    fill = engine._forward.fill

    def failing(slots, rows, pieces, *args, **options):
        if any(9 in piece for piece in pieces):
            raise RuntimeError("out of luck")
        return fill(slots, rows, pieces, *args, **options)

    engine._forward.fill = failing
    bad = Client(engine, asked((9, 9), 3, prompt_logprobs=0)).wait()
    assert bad.finish == "error"
    assert "out of luck" in bad.error
    good = Client(engine, asked((5, 6), 3, prompt_logprobs=0)).wait()
    assert good.tokens == alone(model, (5, 6), 3)


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("position", [1, 20, 39], ids=["first piece", "second", "last"])
def test_a_prompt_whose_scores_are_no_numbers_ends_with_an_error(
    position, limit, opened, monkeypatch
):
    monkeypatch.setattr(prompt_scores, "LOGIT_BYTES", 4 * 259 * 16)
    model = make("llama")
    engine = opened(model)
    fill = engine._forward.fill

    def damaged_fill(slots, rows, pieces, starts, **options):
        logits = fill(slots, rows, pieces, starts, **options)
        for row, piece, start in zip(logits, pieces, starts, strict=True):
            if 9 in piece and start <= position < start + len(piece):
                row[position - start] = torch.nan
        return logits

    engine._forward.fill = damaged_fill
    bad = Client(engine, asked((9,) * 40, limit, prompt_logprobs=0))
    good = Client(engine, asked((5, 6), limit, prompt_logprobs=0))
    assert bad.wait().finish == "error"
    assert "no finite numbers" in bad.error
    assert not any(piece.prompt for piece in bad.pieces)
    assert good.wait().tokens == alone(model, (5, 6), 3)[:limit]
    check(model, (5, 6), good, alternatives=0)
    assert engine.running == 0


def test_the_observer_counts_a_prompt_once(opened):
    told = []

    class Observer:
        def __getattr__(self, name):
            return lambda *values: told.append((name, *values))

    engine = opened(observer=Observer())
    for limit in (0, 1, 3):
        told.clear()
        options = {"prompt_logprobs": 0, "ignore_eos": True}
        Client(engine, asked((5, 6, 7), limit, **options)).wait()
        assert sum(event[2] for event in told if event[0] == "tokens") == 3
        assert sum(event[3] for event in told if event[0] == "tokens") == limit
        assert [event[0] for event in told].count("started") == 1
