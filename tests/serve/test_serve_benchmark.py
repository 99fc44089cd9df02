"""benchmarks/serve.py: peers do the same work as the answers of merged models, and what is computed of what clients
saw. The servers themselves run in the slow test."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from scripts import bench_page

import serve
from serve_cases import against, client, cold, peers, place, vanish
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
    found = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return found[0, len(ids) :].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixed", "turns"])
def test_peers_answer_as_the_merged_models_do(served, name):
    engine = (peers.mixed(served, 4) if name == "mixed" else peers.turns(served, 4, 128))[0]
    engine.start()
    try:
        prompts = [client.prompt(number, 4, 20, VOCABULARY) for number in range(5)]
        blends = [{"a0": 1.0}, {"a1": 1.0}, {}, {"a1": 1.0}, {"a0": 1.0}]
        found, ends = answers(engine, [request(*pair) for pair in zip(blends, prompts, strict=True)])
        assert ends == ["length"] * 5
        for blend, ids, tokens in zip(blends, prompts, found, strict=True):
            assert tokens == alone(served / "merged" / next(iter(blend)) if blend else served / "base", ids)
        assert engine.running == engine.waiting == 0
    finally:
        engine.close()


def job(adapter="a", length=3):
    return peers.Job(request({adapter: 1.0} if adapter else {}, range(length)), lambda piece: None)


def test_a_batch_is_of_the_oldest_and_those_like_it():
    waiting = [job(length=10), job(length=90), job(length=12), job(length=9)]
    assert peers.closest(3)(waiting) == [waiting[0], waiting[3], waiting[2]]
    waiting = [job("a"), job("b"), job("a"), job("a")]
    assert peers.same(2)(waiting) == [waiting[0], waiting[2]]


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
    found = Answer("a", client_number, turn, 0.0, list(times), words.split(), {"completion_tokens": usage})
    found.finish = "length"
    return found


def test_a_chunk_counts_as_many_tokens_as_it_has_words():
    found = Answer("a", 0, 0, 0.0)
    client.take(found, {"choices": [{"text": "w5 w6", "finish_reason": None}]})
    client.take(found, {"choices": [{"text": " w7", "finish_reason": "length"}]})
    client.take(found, {"choices": [], "usage": {"completion_tokens": 3}})
    assert (found.words, found.finish, found.usage) == (["w5", "w6", "w7"], "length", {"completion_tokens": 3})
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
    assert client.alike([answer(0, ()), answer(0, (), "p q r", 1)], [answer(0, ()), answer(0, (), turn=1)]) == 0.5


def test_gaps_are_sorted_by_what_happens_in_them():
    """Steps end at each whole number; a cold request is sent at 4.5 and computed in the step that ends at 8, a warm one
    at 11.5 and 12; that step takes longer."""
    steps = [1, 2, 3, 4, 5, 6, 7, 8.5, 9.5, 10.5, 11.5, 13, 14]
    windows = {"cold": [(4.4, 8.501)], "warm": [(11.4, 12.999)]}
    found = cold.sort([answer(0, steps)], windows)
    assert found == {"none": [1, 1, 1, 1, 1, 1, 1], "loading": [1, 1, 1], "cold": [1.5], "warm": [1.5]}


def test_growth_is_of_the_second_half():
    series = [[second, 100 + max(0, second - 60) * 2, 1, 1] for second in range(0, 121, 10)]
    assert vanish.growth(series) == pytest.approx(120)
    assert vanish.growth(series[:4]) is None


def options():
    found = serve.parser().parse_args([])
    found.vocabulary, found.rounds = VOCABULARY, 2
    return found


def recorded() -> dict:
    """Cases of made-up runs, as they are written."""

    def run(rate):
        cuts = {"p50": 1.0, "p95": 2.0}
        return {"seconds": 100 / rate, "rate": rate, "first": cuts, "next": cuts, "memory": 2**30, "processes": 1,
                "alike": 1.0}  # fmt: skip

    rates = {against.FLOOR: (50, 40), against.OURS: (90, 96), against.MERGED: (60, 32), against.VLLM: (45, 64)}
    case = against.case({name: [run(rate) for rate in own] for name, own in rates.items()}, options(), dtype="float32")
    windows = {"cold": [(0.0, 0.5)] * 2, "warm": [(1.0, 1.2)] * 2}
    gaps = {"none": [0.1] * 10, "loading": [0.11] * 10, "cold": [0.15] * 10, "warm": [0.12] * 10}
    block = {"gaps": gaps, "windows": windows}
    slow = cold.case([block, block], options(), registered=1000, resident=100, memory=2**30)
    held = {"rss": 2**30, "threads": 9, "files": 8, "running": 0.0, "waiting": 0.0, "users": 0}
    storm = {"setting": {"clients": 200, "seconds": 600.0}, "before": held, "after": {**held, "threads": 10},
             "requests": {"vanished": 5, "refused": 0, "finished": 1}, "series": [], "same answer": True,
             "growth a minute": 2.0**20}  # fmt: skip
    return {"serve": case, "serve_cold": slow, "serve_vanish": storm}


def test_the_bars_are_the_rate_over_the_best_peer_of_the_round():
    bars = recorded()["serve"]["bars"]
    assert bars == {
        f"the better of {against.FLOOR} and {against.MERGED}": {"ratio": 1.95, "low": 1.5, "high": 2.4},
        "vllm": {"ratio": 1.75, "low": 1.5, "high": 2.0},
    }


def test_cold_is_told_beside_warm_and_none():
    found = recorded()["serve_cold"]
    assert {kind: row["ratio"] for kind, row in found["rows"].items()} == {
        "none": 1.0, "loading": 1.1, "cold": 1.5, "warm": 1.2
    }  # fmt: skip
    assert found["cold over warm"]["ratio"] == 1.25
    assert found["rows"]["cold"]["first"]["p50"] == 500


def test_the_pages_show_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    for name, case in recorded().items():
        {"serve": against, "serve_cold": cold, "serve_vanish": vanish}[name].show(case)
        whole = {"name": name, "cases": [case], "machine": "a machine", "versions": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(whole))
    page = bench_page.page()
    assert "| veneer | 2.06 (1.80–2.40) |" in page
    assert "peft, mixed batches and merged, in turns: 1.95 (1.50–2.40)." in page
    for name in recorded():
        assert f"## {name}\n" in page
    assert "veneer / vllm: 1.75" in capsys.readouterr().out
    assert "| **Veneer** | 93 | 1 | 2 |" in page
    assert " | 93, × 2.06 (1.80–2.40) | " in bench_page.readme()
    for text in (page, bench_page.readme()):
        lines = text.splitlines()
        for number in (number for number, line in enumerate(lines) if line.startswith("|---")):
            assert lines[number].count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")


def test_what_a_place_holds(served):
    assert {folder.name for folder in (served / "merged").iterdir()} == {"a0", "a1"}
    names = place.copies(served, ["a0", "a1"], 4)
    assert names == ["a0", "a1", "c0000", "c0001"]
    files = [served / "adapters" / name / "adapter_model.safetensors" for name in names]
    assert files[2].read_bytes() == files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("what", [[], ["--cold"], ["--vanish"]], ids=["rates", "cold", "vanish"])
def test_it_runs(what, tmp_path):
    """Real servers, on toys."""
    (case,) = serve.main(["--quick", *what, "--out", str(tmp_path)])["cases"]
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["machine"]
    if not what:
        names = [against.FLOOR, against.OURS, against.MERGED]
        assert [name for name in case["rows"] if name != against.EACH] == names
        assert {row["alike"] for row in case["rows"].values()} == {1}
    elif what == ["--cold"]:
        assert case["setting"]["resident"] < case["setting"]["registered"] == 26
        assert all(row["gaps"] for row in case["rows"].values())
    else:
        assert case["requests"]["vanished"] > 0
        assert case["same answer"]
        assert [case["after"][key] for key in ("running", "waiting", "users")] == [0, 0, 0]


def test_a_server_that_ends_says_what_it_printed(tmp_path):
    import sys

    from serve_cases import servers

    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="no such model"),
        servers.serve([sys.executable, "-c", "raise SystemExit('no such model')"], log, threads=1),
    ):
        pass


def test_merged_models_are_routed_to_one_process_each():
    group = against.ModelAdapters([SimpleNamespace(url="one"), SimpleNamespace(url="two")], ["a", "b", "c"])
    assert [group.place(name) for name in "abc"] == ["one", "two", "one"]
