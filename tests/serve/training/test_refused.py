"""A request that is refused, or never comes, leaves no number of its run out: what follows is
computed."""

from __future__ import annotations

import json
import threading
import time

import pytest
from tests.serve.training.conftest import Local
from tests.serve.training.test_from_adapters import adapter_at
from tests.serve.training.test_service import TEXT, opened, texts
from tests.support.adapters import TENSORS
from tests.support.api_server import listening
from tests.support.service import open_service
from tests.support.training_client import Client, Failed, Run, datum

from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.training import active_runs as active_runs_
from veneer.serve.training import training_service as training_
from veneer.serve.training.training_service import training_of

STEP, SAVE = "optim_step", "save_weights"
#: (route, body, words of the refusal); a text is sent as it is
REFUSED = {
    "a norm that is no number": (STEP, '"adam_params": {"grad_clip_norm": Infinity}', "no JSON"),
    "a rate that is no number": (STEP, '"adam_params": {"learning_rate": NaN}', "no JSON"),
    "a rate that is a word": (STEP, {"adam_params": {"learning_rate": "fast"}}, "learning_rate"),
    "a field that is not known": (STEP, {"adam_params": {}, "sharpness": 3}, "sharpness"),
    "a field twice": (STEP, '"adam_params": {}, "adam_params": {}', "no JSON"),
    "a long name": (SAVE, {"path": "x" * 300}, "path"),
    "much metadata": (SAVE, {"path": "a", "user_metadata": {f"k{n}": "v" for n in range(80)}}, "user_metadata"),
    "a long name of samples": ("save_weights_for_sampler", {"path": "x" * 300}, "path"),
    "no name": ("save_weights_external", {}, "path"),
    "a long path": ("load_weights", {"path": "x" * 513, "optimizer": False}, "path"),
    "a path that is none": ("load_weights", {"path": "x", "optimizer": False}, "the adapter 'x'"),
    "a checkpoint that is none": ("load_weights", {"path": "tinker://a/weights/b", "optimizer": False}, "a/weights"),
    "another base": ("load_weights", {"path": "x", "optimizer": False, "base_model": "other"}, "base model"),
    "another optimizer": (
        "load_weights", {"path": "x", "optimizer": False, "optimizer_config": {"type": "dimuon"}}, "dimuon",
    ),
}  # fmt: skip


def send(run, route, body, number):
    address = json.dumps({"model_id": run.id, "seq_id": number})[:-1]
    rest = body if isinstance(body, str) else json.dumps(body)[1:-1]
    content = f"{address}{', ' if rest else ''}{rest}}}"
    return run.client.http.post(
        f"/{route}", content=content, headers={"content-type": "application/json"}
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_the_answer_to_its_number(client, name):
    route, body, words = REFUSED[name]
    run, local = client.run(), Local()
    run.pass_(texts(0))
    refused = send(run, route, body, run.next())
    assert refused.status_code == 200, refused.text
    stepped = run.ask_step(0.02)  # which is sent before anybody looks at the refusal
    with pytest.raises(Failed, match=words) as error:
        client.result(refused.json())
    assert error.value.category == "user"
    client.result(stepped)
    local.pass_(texts(0)), local.step(0.02)
    assert run.pass_(texts(1)).loss == pytest.approx(local.pass_(texts(1)), rel=1e-3)
    assert run.save("all").endswith("/weights/all")


def test_a_damaged_adapter_is_the_failure_of_its_number(base, tmp_path):
    adapter = adapter_at(tmp_path / "adapters" / "style")
    tensors = adapter / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-9])
    service = open_service(base, tmp_path / "adapters", train=str(tmp_path / "runs"))
    with listening(service) as (url, _):
        run = Client(url).run()
        with pytest.raises(Failed, match="style"):
            run.client.result(run.ask("load_weights", path="style", optimizer=False))
        assert run.pass_(texts(0)).loss > 0


def test_what_has_no_number_of_the_keys_own_run_is_refused_as_it_is(base, tmp_path):
    ring = Keyring(tuple(Key(name, hash_of(f"vnr-{name}"), train=True) for name in "ab"))
    with opened(base, tmp_path, keys=ring) as (url, _):
        client, other = Client(url, "tml-vnr-a"), Client(url, "tml-vnr-b")
        run = client.run()
        for number in (None, "1", True, -1, 0, 2**31, 1.5):
            assert send(run, STEP, {"sharpness": 3}, number).status_code == 400
        assert client.send(STEP, sharpness=3, seq_id=1).status_code == 400
        foreign = send(Run(other, run.id), STEP, {"sharpness": 3}, 1)
        assert foreign.status_code == 400
        for id in ("\ud800", f"{run.id}\udc80"):  # halves of surrogate pairs
            assert send(Run(client, id), STEP, {"sharpness": 3}, 1).status_code == 400
        broken = client.http.post(
            "/optim_step", content=b'{"model_id": ', headers={"content-type": "application/json"}
        )
        assert broken.status_code == 400
        assert run.step(0.0)["metrics"]  # number 1 was nobody's
        client.result(client.post("unload_model", model_id=run.id))
        assert send(run, STEP, {"sharpness": 3}, 9).status_code == 400


def test_a_number_that_does_not_come_is_answered_and_the_run_goes_on(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        run, local = client.run(), Local()
        run.pass_(texts(0))
        run.number += 2  # 2 and 3 are lost on their way
        stepped = run.ask_step(0.02)
        training.clean_up()
        training.clean_up()  # which is soon after
        assert training.worker.queue.promise(run.id, 2) is None
        monkeypatch.setattr(training_, "MISSING_SECONDS", 0.0)
        training.clean_up()
        told = client.result(stepped)["metrics"]
        assert told["missing_requests:sum"] == 2
        assert told["missing_requests:max"] == 3  # the last one
        local.pass_(texts(0)), local.step(0.02)
        assert run.pass_(texts(1)).loss == pytest.approx(local.pass_(texts(1)), rel=1e-3)
        late = client.post(STEP, model_id=run.id, seq_id=2, adam_params={"learning_rate": 1.0})
        with pytest.raises(Failed, match="no request 2"):
            client.result(late)
        assert "missing_requests:sum" not in run.step(0.0)["metrics"]


def test_numbers_that_do_not_come_are_answered_though_no_more_bytes_may_wait(
    base, tmp_path, monkeypatch
):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        run = Client(url).run()
        run.pass_(texts(0))
        run.number += 3  # 2, 3 and 4 are lost on their way
        stepped = run.ask_step(0.02)
        monkeypatch.setattr(active_runs_, "MAX_WAITING_BYTES", 1)
        monkeypatch.setattr(training_, "MISSING_SECONDS", 0.0)
        for _ in range(200):
            training.clean_up()
            if (promise := training.worker.queue.promise(run.id, 5)) and promise.done():
                break
            time.sleep(0.05)
        assert run.client.result(stepped)["metrics"]["missing_requests:sum"] == 3


def test_the_number_whose_turn_it_is_finds_room(client, it, monkeypatch):
    """However much waits for it, in numbers and in bytes."""
    run = client.run()
    bodies = [run.body(texts(number), "cross_entropy") for number in range(3)]
    for number, body in enumerate(bodies, 1):
        body.seq_id = number
    monkeypatch.setattr(active_runs_, "MAX_WAITING_BYTES", len(bodies[1].SerializeToString()))
    last = run.send(bodies[1].SerializeToString())
    headers = {"content-type": "application/x-protobuf"}

    def sent(body):
        content = body.SerializeToString()
        return client.http.post("/forward_backward", content=content, headers=headers)

    assert sent(bodies[2]).status_code == 429
    assert sent(bodies[0]).status_code == 200
    assert run.wait_for_pass(last).loss > 0
    far = send(run, STEP, {"adam_params": {}}, 2**31 - 1)  # which would be waited for, for ever
    assert far.status_code == 429
    assert "2147483647" in far.json()["error"]["message"]


def failed_passes(run, *promises):
    for promised in promises:
        with pytest.raises(Failed):
            run.wait_for_pass(promised)


def test_a_step_says_of_which_passes_it_is_not(base, tmp_path):
    bad = [datum(TEXT), {"tokens": [1, 999], "target_tokens": [1, 2]}]
    service = open_service(base, None, train=str(tmp_path))
    worker = training_of(service).worker
    with listening(service) as (url, _):
        client = Client(url)
        run, held = client.run(), threading.Event()
        worker.submit(held.wait)
        good, refused = run.ask_pass([datum(TEXT)]), run.ask_pass(bad)
        forward, stepped = run.ask_pass(bad, backward=False), run.ask_step(0.01)
        held.set()
        failed_passes(run, refused, forward)
        assert run.wait_for_pass(good).loss > 0
        metrics = client.result(stepped)["metrics"]
        assert metrics["failed_passes:sum"] == 1  # what only looked is no part of a step
        assert metrics["unclipped_grad_l2:mean"] > 0
        with pytest.raises(Failed):
            run.save("a/b")  # neither is what is no pass
        assert run.step()["metrics"] == {"unclipped_grad_l2:mean": 0.0}
        failed_passes(run, run.ask_pass(bad), run.ask_pass(bad))
        with pytest.raises(Failed):
            run.step(-1)  # which is none
        worker.submit(lambda: worker.memory.evict(worker.active_runs[run.id])).result()
    with opened(base, tmp_path) as (url, _):  # a restart forgets none
        again = Client(url)
        again.session = client.session
        assert Run(again, run.id, run.number).step()["metrics"]["failed_passes:sum"] == 2
