"""What a key may use is held against what a request takes, not against what was used before it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.serve.training.test_service import TEXT, opened
from tests.support.api_server import listening, until
from tests.support.service import open_service
from tests.support.training_client import Client, Failed, Run, datum

from veneer.serve import limits
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.training.training_service import training_of

BEARER = {"authorization": "Bearer vnr-a"}


def limited(**limits):
    return Keyring((Key("a", hash_of("vnr-a"), train=True, **limits),))


def saved(run, kind, name):
    route = {
        "weights": "save_weights",
        "external": "save_weights_external",
        "sampler": "save_weights_for_sampler",
    }
    fields = {"sampling_session_seq_id": 0} if name is None else {"path": name}
    return run.client.result(run.ask(route[kind], **fields))


def used(client):
    return sum(one["size_bytes"] for one in client.get("checkpoints")["checkpoints"])


@pytest.mark.parametrize(
    ("kind", "name"), [("weights", "s"), ("external", "s"), ("sampler", "s"), ("sampler", None)]
)
def test_no_checkpoint_goes_past_the_bytes_of_its_key(base, tmp_path, kind, name):
    with opened(base, tmp_path / "size") as (url, _):
        client = Client(url)
        saved(client.run(), kind, "s")
        size = used(client)
    with opened(base, tmp_path / "runs", keys=limited(bytes=size - 100)) as (url, _):
        client = Client(url, "tml-vnr-a")
        run = client.run()
        with pytest.raises(Failed, match="bytes of key 'a'"):
            saved(run, kind, name)
        assert client.get("checkpoints")["checkpoints"] == []
        assert (
            list((tmp_path / "runs" / "runs").rglob("*.safetensors")) == []
        )  # and nothing is left of it


def test_a_checkpoint_may_take_the_room_of_the_one_that_it_replaces(base, tmp_path):
    with opened(base, tmp_path / "size") as (url, _):
        client = Client(url)
        client.run().save("a")
        size = used(client)
    with opened(base, tmp_path / "runs", keys=limited(bytes=size + 500)) as (url, _):
        client = Client(url, "tml-vnr-a")
        run = client.run()
        path = run.save("a")
        assert run.save("a", overwrite=True) == path
        with pytest.raises(Failed, match="bytes of key 'a'"):
            run.save("b")
        copied = client.send("copy_weights", source_path=path)
        assert copied.status_code == 403
        assert "bytes of key 'a'" in copied.json()["error"]["message"]
        assert used(client) <= size + 500


def test_no_pass_goes_past_the_tokens_of_its_key(base, tmp_path):
    with opened(base, tmp_path, keys=limited(tokens=40)) as (url, _):
        client = Client(url, "tml-vnr-a")
        run = client.run()
        with pytest.raises(Failed, match="0 tokens of key 'a' and 44 more"):
            run.pass_([datum(TEXT)] * 4)
        bad = {"tokens": [1, 999], "target_tokens": [1, 2]}
        with pytest.raises(Failed, match="token 999"):
            run.pass_([bad])  # which takes nothing, in the end
        asked = [run.ask_pass([datum(TEXT)]) for _ in range(4)]  # at once
        assert run.wait_for_pass(asked[0]).loss > 0
        message = run.body([datum(TEXT)], "cross_entropy")
        message.seq_id = run.number - 3
        assert run.send(message.SerializeToString()) == asked[0]  # sent again, which takes nothing
        assert all(run.wait_for_pass(promised).loss > 0 for promised in asked[:3])
        with pytest.raises(Failed, match="33 tokens of key 'a' and 11 more"):
            run.wait_for_pass(asked[3])
        assert run.pass_([datum(TEXT[:8])], backward=False).loss > 0  # what is left
        assert run.step()["metrics"]["failed_passes:sum"] == 3


def test_no_more_runs_begin_at_once_than_a_key_may_have(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path), keys=limited(runs=2))
    disk = training_of(service).index_executor
    with listening(service) as (url, _):
        client = Client(url, "tml-vnr-a")

        def begin(number):
            body = {"session_id": client.session, "model_seq_id": number, "base_model": "tiny"}
            return client.send("create_model", **body, lora_config={"rank": 2}).status_code

        with ThreadPoolExecutor(8) as pool:
            held = threading.Event()
            disk.submit(held.wait)  # nobody's run is written down before all have asked
            pending = pool.map(begin, range(8))
            until(lambda: disk._work_queue.qsize() == 8)
            held.set()
            answers = list(pending)
        assert sorted(answers) == [200, 200, *[403] * 6]
        assert begin(answers.index(200)) == 200  # asked for again
        assert len(client.get("training_runs")["training_runs"]) == 2
        assert (
            Run(client, f"{client.session}:train:{answers.index(200)}").pass_([datum(TEXT)]).loss
            > 0
        )


@pytest.mark.parametrize("route", ["asample", "completions"])
def test_samples_that_begin_at_once_stay_within_the_tokens_of_a_day(base, tmp_path, route):
    """60 calls at once drew 6,180 tokens of 50: what they take was counted when they had ended."""
    service = open_service(base, None, train=str(tmp_path), keys=limited(tokens=50))
    with listening(service) as (url, _):
        client = Client(url, "tml-vnr-a")
        path = client.run().save("x") if route == "completions" else None
        prompt = TEXT[:4]

        def call(most):
            if route == "completions":
                body = {"model": path, "prompt": prompt, "max_tokens": most, "ignore_eos": True}
                return httpx.post(f"{url}/v1/completions", json=body, headers=BEARER, timeout=60)
            sampling = {"max_tokens": most, "stop": []}
            response = client.send(
                "asample",
                base_model="tiny",
                prompt={"chunks": [{"tokens": prompt}]},
                sampling_params=sampling,
            )
            if response.status_code == 200:
                client.result(response.json(), "SampleResponse")
            return response

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(call, [8] * 60))
        assert [one.status_code for one in answers].count(200) == 4  # of 12 tokens each
        refused = next(one for one in answers if one.status_code != 200)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota")
        assert "tokens of key 'a' and 12 more" in refused.json()["error"]["message"]
        until(lambda: training_of(service).store.tokens_today("a") == 48)
        assert call(1).status_code == 403


@pytest.mark.parametrize("route", ["asample", "completions"])
def test_tokens_that_were_not_drawn_are_given_back(base, tmp_path, route):
    service = open_service(base, None, train=str(tmp_path), keys=limited(tokens=1000))
    with listening(service) as (url, _):
        client, store = Client(url, "tml-vnr-a"), training_of(service).store
        path = client.run().save("x")
        first = (
            client.sample(None, TEXT[:4], params={"max_tokens": 1, "stop": []})
            .sequences[0]
            .tokens[0]
        )
        until(lambda: store.tokens_today("a") == 5)
        if route == "asample":
            (short,) = client.sample(
                None, TEXT[:4], params={"max_tokens": 150, "stop": [first]}
            ).sequences
            assert short.tokens == [first]
            with pytest.raises(Failed, match="token 1000000"):
                client.sample(None, [10**6], params={"max_tokens": 9})
            until(lambda: store.tokens_today("a") == 10)
        else:
            answer = httpx.post(
                f"{url}/v1/completions", headers=BEARER, timeout=60,
                json={"model": path, "prompt": TEXT[:4], "max_tokens": 150, "temperature": 1},
            )  # fmt: skip
            assert answer.status_code == 200
            total = 5 + answer.json()["usage"]["total_tokens"]
            until(lambda: store.tokens_today("a") == total)
            body = {"model": path, "prompt": TEXT[:4], "response_format": {"type": "json_object"}}
            # so much waits that a schema is not compiled
            service.waiting_chars = limits.WAITING_CHARS
            busy = httpx.post(f"{url}/v1/completions", headers=BEARER, json=body, timeout=60)
            service.waiting_chars = 0
            assert busy.status_code == 429
            until(lambda: store.tokens_today("a") == total)
