"""The case `serve` of the benchmarks: peers do the same work as the answers of merged models, and
what is computed of what clients saw. The servers themselves run in the slow test."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

import runner
from cases import serving
from serve_cases import client, peers, place
from serve_cases.client import Answer
from veneer.serve.requests import Request, Sampling

VOCABULARY, TOKENS = 96, 6


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A place with two adapters, and merged."""
    folder = tmp_path_factory.mktemp("place")
    place.make(folder, "float32", 2, tiny=True)
    return folder


def request(blend, ids, tokens=TOKENS):
    return Request(tuple(ids), blend, Sampling(tokens, temperature=0, ignore_eos=True), 60, "r")


def answers(engine, requests):
    """The tokens of each answer, and how each ended."""
    heard: list[list] = [[] for _ in requests]
    left = threading.Semaphore(0)

    def hear(pieces):
        def deliver(piece):
            pieces.append(piece)
            if piece.finish:
                left.release()

        return deliver

    for one, pieces in zip(requests, heard, strict=True):
        engine.submit(one, hear(pieces))
    for _ in requests:
        assert left.acquire(timeout=60)
    tokens = [[token.id for piece in pieces for token in piece.tokens] for pieces in heard]
    return tokens, [pieces[-1].finish for pieces in heard]


def alone(folder, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.generate(
        torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
    )
    return found[0, len(ids) :].tolist()


@pytest.mark.filterwarnings("ignore")
def test_the_peer_answers_as_the_merged_models_do(served):
    engine = peers.create_engine(served, 4)[0]
    engine.start()
    try:
        prompts = [client.prompt(number, 4, 20, VOCABULARY) for number in range(5)]
        blends = [{"a0": 1.0}, {"a1": 1.0}, {}, {"a1": 1.0}, {"a0": 1.0}]
        found, ends = answers(
            engine, [request(*pair) for pair in zip(blends, prompts, strict=True)]
        )
        assert ends == ["length"] * 5
        for blend, ids, tokens in zip(blends, prompts, found, strict=True):
            assert tokens == alone(
                served / "merged" / next(iter(blend)) if blend else served / "base", ids
            )
        assert engine.running == engine.waiting == 0
    finally:
        engine.close()


def job(adapter="a", length=3):
    return peers.Job(request({adapter: 1.0} if adapter else {}, range(length)), lambda piece: None)


def test_a_batch_is_of_the_oldest_and_those_like_it():
    waiting = [job(length=10), job(length=90), job(length=12), job(length=9)]
    assert peers.closest(3)(waiting) == [waiting[0], waiting[3], waiting[2]]


def test_batches_wait_for_company_pass_over_the_cancelled_and_survive_what_fails():
    seen, gate = [], threading.Event()

    def work(batch):
        seen.append([job.request.id for job in batch])
        gate.wait(10)
        if len(seen) == 2:
            raise RuntimeError("out of luck")
        for one in batch:
            one.end("length")

    engine = peers.Batches(list, work)
    heard: dict[str, list] = {name: [] for name in "abcd"}
    done = threading.Semaphore(0)

    def send(name):
        def deliver(piece):
            heard[name].append(piece.finish)
            done.release()

        return engine.submit(Request((1,), {}, Sampling(1), 1, name), deliver)

    engine.start()
    assert engine.ready
    send("a"), send("b")
    while not seen:
        gate.wait(0.01)
    assert engine.running == 2
    send("c")
    send("d").cancel()
    assert engine.waiting == 2
    gate.set()
    for _ in range(4):
        assert done.acquire(timeout=10)
    engine.close()
    assert seen == [["a", "b"], ["c"]]
    assert heard == {"a": ["length"], "b": ["length"], "c": ["error"], "d": ["cancelled"]}


def answer(client_number, times, words="x y z", turn=0, usage=3):
    found = Answer(
        "a", client_number, turn, 0.0, list(times), words.split(), {"completion_tokens": usage}
    )
    found.finish = "length"
    return found


def test_a_chunk_counts_as_many_tokens_as_it_has_words():
    found = Answer("a", 0, 0, 0.0)
    client.take(found, {"choices": [{"text": "w5 w6", "finish_reason": None}]})
    client.take(found, {"choices": [{"text": " w7", "finish_reason": "length"}]})
    client.take(found, {"choices": [], "usage": {"completion_tokens": 3}})
    assert (found.words, found.finish, found.usage) == (
        ["w5", "w6", "w7"],
        "length",
        {"completion_tokens": 3},
    )
    assert len(found.times) == 3
    assert found.gaps[0] == 0
    with pytest.raises(client.BenchmarkError, match="no room"):
        client.take(found, {"error": {"message": "no room"}})


def test_a_rate_is_of_whole_answers_only():
    runs = [answer(0, (1, 2, 4)), answer(1, (2, 3, 4))]
    found = client.summary(runs, 4.0, 3)
    assert found["rate"] == 1.5
    assert found["first"]["p50"] == 1500
    assert found["next"]["p50"] == 1000
    with pytest.raises(client.BenchmarkError, match="do not have 3 tokens"):
        client.summary([answer(0, (1, 2), "x y", usage=2)], 4.0, 3)


def test_answers_are_alike_up_to_where_they_first_differ():
    assert client.alike([answer(0, (), "a b c")], [answer(0, (), "a x c")]) == pytest.approx(1 / 3)
    assert (
        client.alike(
            [answer(0, ()), answer(0, (), "p q r", 1)], [answer(0, ()), answer(0, (), turn=1)]
        )
        == 0.5
    )


@pytest.mark.slow
def test_it_runs():
    """Real servers, on toys."""
    (one,) = runner.smoke(serving.SERVE, 1)["cases"]
    rounds = one["processes"][0]["rounds"]
    assert [*rounds] == [serving.FLOOR, serving.OURS, serving.MERGED]
    for (unit,) in rounds.values():
        assert unit["alike"] == 1
        assert min(unit[name] for name in ("wall", "rate", "first p50", "gap p95", "memory")) > 0


@pytest.mark.slow
def test_prompts_that_are_cached_and_prompts_beside_streams_run():
    for case, number in (
        (serving.PREFIX, "wall"),
        (serving.GAP, "gap"),
        (serving.LONG_ROW, "served"),
    ):
        (result,) = runner.smoke(case, 1)["cases"]
        rounds = result["processes"][0]["rounds"]
        assert len(rounds) == (3 if case is serving.PREFIX else 2)
        assert all(unit[number] > 0 for (unit,) in rounds.values())


def test_a_server_that_ends_says_what_it_printed(tmp_path):
    import sys

    from serve_cases import servers

    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="no such model"),
        servers.serve([sys.executable, "-c", "raise SystemExit('no such model')"], log, threads=1),
    ):
        pass


def test_an_adapter_has_one_server():
    group = serving.ServerGroup(
        [SimpleNamespace(url="one"), SimpleNamespace(url="two")], ["a", "b", "c"]
    )
    assert [group.url_of(name) for name in "abc"] == ["one", "two", "one"]
