"""What the page shows of runs: curves that no kill shortens, the route, samples of runs by name,
numbers."""

from __future__ import annotations

import random
from types import SimpleNamespace

import httpx
import pytest
import torch
from tests.serve.training.test_service import TEXT, crash, opened, texts
from tests.support.api_server import listening
from tests.support.service import open_service
from tests.support.training_client import Client, datum

from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.training import curve as curve_
from veneer.serve.training.curve import Curve, TokenRate
from veneer.serve.training.losses import LOSSES, Datum
from veneer.serve.training.training_service import training_of


def stepped(curve, losses):
    """Steps of one token each, with these losses; None for a step without a pass."""
    one = Datum(torch.tensor([1]), torch.tensor([2]))
    for loss in losses:
        if loss is not None:
            curve.add_pass(loss, "cross_entropy", [one])
        curve.add_step()


def seen(url, key="tml-any", **query):
    answer = httpx.get(
        f"{url}/api/v1/live", headers={"x-api-key": key}, params=query, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def completed(url, model, key="none", **fields):
    body = {"model": model, "prompt": TEXT, "max_tokens": 6, "temperature": 0.0, **fields}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(
        f"{url}/v1/completions", headers=headers, json=body, timeout=60, trust_env=False
    )


# ----------------------------------------------------------------------------------------------
# curves


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000, 5000])
def test_a_curve_is_of_means_and_bounded(count):
    draw = random.Random(count)
    losses, curve = [draw.random() for _ in range(count)], Curve()
    stepped(curve, losses)
    shown = curve.all_points()
    assert curve.steps == curve.tokens == count
    assert min(count, curve_.MAX_POINTS // 2) <= len(shown) <= curve_.MAX_POINTS
    start = 0
    for step, loss in shown:  # each step is in one point
        assert loss == pytest.approx(sum(losses[start:step]) / (step - start))
        start = step
    assert start == count


def test_a_loss_is_of_the_tokens_that_count():
    curve = Curve()
    own, rest = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 2.0])
    data = [Datum(torch.arange(4), torch.arange(4), {"weights": own})]
    curve.add_pass(6.0, "cross_entropy", data)
    curve.add_pass(
        3.0, "cross_entropy", [Datum(torch.arange(4), torch.arange(4), {"weights": rest / 2})]
    )
    curve.add_step()
    curve.add_step()  # without a pass
    curve.add_pass(
        8.0, "ppo", [Datum(torch.arange(4), torch.arange(4), {"advantages": -own, "logprobs": own})]
    )
    curve.drop_passes()  # which takes the gradients
    curve.add_step()
    curve.add_pass(
        8.0, "ppo", [Datum(torch.arange(4), torch.arange(4), {"advantages": -own, "logprobs": own})]
    )
    curve.add_step()
    assert curve.all_points() == [(1, 3.0), (4, 4.0)]
    assert curve.tokens == 16


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cross_entropy"])
def test_a_loss_with_advantages_is_of_the_tokens_that_have_one(loss):
    inputs = dict.fromkeys(LOSSES[loss].inputs, torch.ones(4))
    inputs["advantages"] = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    curve = Curve()
    curve.add_pass(8.0, loss, [Datum(torch.arange(4), torch.arange(4), inputs)])
    curve.add_step()
    assert curve.all_points() == [(1, 4.0)]


def test_a_rate_is_of_the_last_seconds():
    rate = TokenRate()
    assert rate.rate_at(100.0) == 0
    for second in range(100):
        rate.add(second, second + 1, 50)
    assert rate.rate_at(100.0) == pytest.approx(50)
    assert rate.rate_at(105.0) == pytest.approx(25)
    assert rate.rate_at(111.0) == 0
    for number in range(1000):  # more than are remembered
        rate.add(200 + number / 1000, 200 + (number + 1) / 1000, 1)
    assert len(rate.spans) == curve_.MAX_SPANS
    assert rate.rate_at(201.0) == pytest.approx(1000)


# ---------------------------------------------------------------------------------------------- the
# route


def test_a_run_as_it_goes_on(client, it):
    run = client.run(rank=3)
    losses = []
    for step in range(4):
        data = texts(step)
        losses.append(run.pass_(data).loss / sum(len(one["target_tokens"]) for one in data))
        run.pass_(texts(9), backward=False)  # an evaluation is no point of the curve
        run.step()
    path = run.save("half")
    found = seen(it.url)
    (one,) = [one for one in found["runs"] if one["id"] == run.id]
    assert [step for step, _ in one["losses"]] == [1, 2, 3, 4]
    assert [loss for _, loss in one["losses"]] == pytest.approx(losses, rel=1e-3)
    assert (one["rank"], one["steps"], one["in_memory"], one["unloaded"]) == (3, 4, True, False)
    assert one["tokens"] == sum(len(each["tokens"]) for step in range(4) for each in texts(step))
    assert one["tokens_per_second"] > 0
    (checkpoint,) = one["checkpoints"]
    assert (checkpoint["path"], checkpoint["kind"]) == (path, "training")
    assert checkpoint["bytes"] > 1000
    assert [each["id"] for each in found["batch"]["runs"]] == [run.id]
    assert found["batch"]["others"] == 0
    numbers = httpx.get(f"{it.url}/metrics", trust_env=False).text
    said = dict(line.split() for line in numbers.splitlines() if line.startswith("veneer_training"))
    assert float(said["veneer_training_steps_total"]) >= 4
    assert float(said["veneer_training_tokens_total"]) >= one["tokens"]
    assert float(said["veneer_training_runs"]) >= float(said["veneer_training_resident_runs"]) >= 1


def test_a_kill_loses_no_point(base, tmp_path):
    """Of a run with a state in between, of one that was never written, and of one with a gradient
    that waits."""
    service = open_service(base, None, train=str(tmp_path))
    worker = training_of(service).worker
    with listening(service) as (url, _):
        client = Client(url)
        runs = [client.run(number, seed=number) for number in range(3)]
        for step in range(3):
            for run in runs:
                run.pass_(texts(step))
                run.step(0.02)
            if step == 1:
                worker.submit(
                    lambda: worker.memory.write_state(worker.active_runs[runs[0].id])
                ).result()
        runs[2].pass_(texts(7))
        before = {one["id"]: one for one in seen(url)["runs"]}
        crash(service)
    with opened(base, tmp_path) as (url, _):
        after = {one["id"]: one for one in seen(url)["runs"]}
        for id, one in after.items():
            assert one == {**before[id], "in_memory": False, "tokens_per_second": 0.0}
        again = Client(url)
        back = [type(run)(again, run.id, run.number) for run in runs]
        for run in back:
            run.pass_(texts(8))
            run.step(0.02)
        counts = {one["id"]: (one["steps"], len(one["losses"])) for one in seen(url)["runs"]}
        assert counts == dict.fromkeys(before, (4, 4))
    with opened(base, tmp_path) as (url, _):  # closed as it should be: read off the states
        assert {
            one["id"]: (one["steps"], len(one["losses"])) for one in seen(url)["runs"]
        } == counts


def test_names_and_bounds(it, client, monkeypatch):
    store = it.training.store
    titled = store.new_session("", None, "<b>sweep</b>" * 40)
    config = {"rank": 2, "targets": ["mlp"]}
    store.new_run(
        f"{titled}:train:3",
        titled,
        "",
        config,
        0,
        {str(i) * 200: {"x": "y" * 500} for i in range(9)},
    )
    store.new_run(f"{titled}:train:4", titled, "", config, 0, {"name": "wide", "lr": 0.1})
    found = seen(it.url, limit=2)["runs"]
    assert [one["name"] for one in found] == ["wide", f"{('<b>sweep</b>' * 40)[:80]} · 3"]
    assert found[0]["metadata"] == {"lr": "0.1"}
    assert len(found[1]["metadata"]) == 8
    assert all(len(word) == 80 for entry in found[1]["metadata"].items() for word in entry)
    assert seen(it.url, limit=2)["total_count"] >= 2
    for wrong in ("0", "101", "x"):
        assert httpx.get(f"{it.url}/api/v1/live?limit={wrong}", trust_env=False).status_code == 400


# ----------------------------------------------------------------------------------------------
# samples, tenants


def test_samples_of_the_base_of_a_run_now_and_of_a_checkpoint(client, it):
    run = client.run()
    now = f"tinker://{run.id}/now"
    first = run.pass_([datum(TEXT)]).loss
    untrained, base = (
        completed(it.url, model).json()["choices"][0]["text"] for model in (now, "tiny")
    )
    assert untrained == base
    messages = {"messages": [{"role": "user", "content": "a"}]}
    counts = [
        httpx.post(
            f"{it.url}/v1/messages/count_tokens", json={"model": model, **messages}, trust_env=False
        )
        for model in (now, "tiny")
    ]
    assert counts[0].status_code == counts[1].status_code != 404
    assert counts[0].json() == counts[1].json()
    body = {"model": now, "prompt": "ab"}
    assert httpx.post(f"{it.url}/tokenize", json=body, trust_env=False).status_code == 200
    body["model"] = "tinker://none/now"
    assert httpx.post(f"{it.url}/tokenize", json=body, trust_env=False).status_code == 404
    run.step(0.5)
    path = run.save("one")
    for _ in range(3):
        run.pass_([datum(TEXT)])
        run.step(0.5)
    assert run.pass_([datum(TEXT)], backward=False).loss != pytest.approx(first, rel=0.01)

    def expected(session):
        tokens = client.sample(session, TEXT, params={"max_tokens": 6}).sequences[0].tokens
        return it.service.tokenizer.decode(tokens)

    answer = completed(it.url, now).json()
    assert answer["choices"][0]["text"] == expected(run.sampler())
    assert answer["model"] == now
    stored = completed(it.url, path).json()["choices"][0]["text"]
    other = client.result(
        client.post(
            "load_weights", session_id=client.session, model_seq_id=7, path=path, optimizer=False
        )
    )
    back = type(run)(client, other["model_id"])
    assert stored == expected(back.sampler(1))
    assert len({base, stored, answer["choices"][0]["text"]}) == 3


def test_a_run_on_the_disk_is_read_and_goes_back(base, tmp_path):
    with opened(base, tmp_path, runs=1) as (url, _):
        client = Client(url)
        runs = [client.run(number, seed=number) for number in range(2)]
        for run in runs:
            run.pass_([datum(TEXT)])
            run.step(0.5)
        states = {one["id"]: one["in_memory"] for one in seen(url)["runs"]}
        assert states == {runs[0].id: False, runs[1].id: True}
        text = completed(url, f"tinker://{runs[0].id}/now").json()["choices"][0]["text"]
        assert text != completed(url, "tiny").json()["choices"][0]["text"]
        assert not {one["id"]: one["in_memory"] for one in seen(url)["runs"]}[runs[0].id]


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("tinker://none/now", 404), ("tinker:///now", 400), ("tinker://", 400), ("tinker://a/b", 400),
        ("tinker://none/weights/x", 404), ("tinker://../weights/..", 400), ("tinker://copy:train:0/now", 404),
    ],
)  # fmt: skip
def test_names_that_mean_nothing(it, model, status):
    if it.training.store.run("copy:train:0") is None:  # as copy_weights makes it
        it.training.store.new_run(
            "copy:train:0", "copy", "", {"rank": 2, "targets": ["mlp"]}, 0, None
        )
    answer = completed(it.url, model)
    assert answer.status_code == status, answer.text
    assert "Expected" in answer.json()["error"]["message"]


def test_a_key_sees_its_own_and_pays_for_samples(base, tmp_path):
    keys = (
        Key("a", hash_of("vnr-a"), train=True),
        Key("b", hash_of("vnr-b"), tokens=60, train=True),
    )
    service = open_service(base, None, train=str(tmp_path), keys=Keyring(keys))
    with listening(service) as (url, _):
        own, other = Client(url, "tml-vnr-a"), Client(url, "tml-vnr-b")
        run, theirs = own.run(), other.run()
        together = SimpleNamespace(
            runs=(run.id, theirs.id, "gone"), ended=training_of(service).worker._batch_seconds
        )
        training_of(service).worker.batch = together
        found = seen(url, "tml-vnr-a")
        assert [one["id"] for one in found["runs"]] == [run.id]
        assert [one["id"] for one in found["batch"]["runs"]] == [run.id]
        assert (found["batch"]["others"], found["total_count"]) == (2, 1)
        assert theirs.id not in str(found)
        assert httpx.get(f"{url}/api/v1/live", trust_env=False).status_code == 401
        now = f"tinker://{theirs.id}/now"
        assert completed(url, now, "vnr-a").status_code == 404
        for stream in (False, True):
            assert completed(url, now, "vnr-b", stream=stream).status_code == 200
        training_of(service).index_executor.submit(lambda: None).result()
        assert training_of(service).store.tokens_today("b") == 2 * (len(TEXT) + 6)
        assert completed(url, now, "vnr-b", n=4).status_code == 403  # more than what is left
        assert completed(url, now, "vnr-b").status_code == 200
        training_of(service).index_executor.submit(lambda: None).result()
        refused = completed(url, now, "vnr-b")
        assert refused.status_code == 403
        assert "tokens of key 'b'" in refused.json()["error"]["message"]
