"""The training service over HTTP, by handmade requests: what it computes, in which order, for whom;
what it refuses.

The `tinker` SDK itself, from the registry, drives it in test_tinker.py."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tests.serve.training.conftest import Local
from tests.support.api_server import listening, until
from tests.support.service import open_service
from tests.support.tiny import tiny_model
from tests.support.training_client import Client, Failed, datum

import veneer
from veneer.adapter_files.verify import verify
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.training import active_runs as active_runs_
from veneer.serve.training import worker as worker_
from veneer.serve.training.store import Store
from veneer.serve.training.training_service import training_of

TEXT = [40, 51, 62, 73, 84, 95, 106, 117, 128, 139, 150, 161]


def texts(seed, count=3):
    draw = random.Random(seed)
    return [
        datum([draw.randrange(3, 259) for _ in range(draw.randint(2, 14))]) for _ in range(count)
    ]


# ----------------------------------------------------------------------------------------------
# training


def test_a_run_ends_at_the_losses_of_the_same_run_by_hand(client):
    run, local = client.run(rank=4, seed=7), Local(rank=4, seed=7)
    for step in range(5):
        data = texts(step)
        assert run.pass_(data).loss == pytest.approx(local.pass_(data), rel=1e-4)
        run.step(0.01)
        local.step(0.01)
    passed = run.pass_([datum(TEXT)], backward=False)
    (expected,) = local.logprobs([datum(TEXT)])
    np.testing.assert_allclose(passed.logprobs[0], expected.detach(), atol=2e-4)


def test_four_clients_at_once_end_as_each_alone(it, monkeypatch):
    trainer, batch_sizes = it.training.worker.trainer, []
    run_passes = trainer._run_passes

    def note(rows, passes, keep_going):
        batch_sizes.append(len(passes))
        return run_passes(rows, passes, keep_going)

    monkeypatch.setattr(trainer, "_run_passes", note)
    ranks = (2, 4, 8, 3)
    start = threading.Barrier(4)

    def drive(number):
        run = Client(it.url).run(rank=ranks[number], seed=number)
        start.wait()
        losses = []
        for step in range(6):
            passed, stepped = run.ask_pass(texts(10 * number + step)), run.ask_step(0.02)
            losses.append(run.wait_for_pass(passed).loss)
            run.client.result(stepped)
        return losses

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(drive, range(4)))
    for number, losses in enumerate(found):
        local = Local(ranks[number], number)
        for step, loss in enumerate(losses):
            assert loss == pytest.approx(local.pass_(texts(10 * number + step)), rel=1e-3)
            local.step(0.02)
    assert max(batch_sizes) > 1


def test_parts_of_the_base_that_are_left_out(client):
    run = client.run(train_unembed=False, train_mlp=False)
    local = Local(targets=["attention"])
    for step in range(2):
        assert run.pass_(texts(step)).loss == pytest.approx(local.pass_(texts(step)), rel=1e-4)
        run.step()
        local.step()


def test_policy_losses_with_settings_and_several_targets(client):
    run = client.run()
    inputs = {"logprobs": np.full(11, -5.0), "advantages": np.linspace(-1, 1, 11)}
    for loss, settings in (
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.5}),
        ("cispo", {}),
        ("dro", {"beta": 0.1}),
    ):
        passed = run.pass_([datum(TEXT, **inputs)], loss, **settings)
        assert np.isfinite(passed.loss)
        assert passed.logprobs[0].shape == (11,)
    wide = {"tokens": TEXT[:3], "target_tokens": [[5, 6]] * 3, "weights": [[1.0, 0.0]] * 3}
    narrow = {"tokens": TEXT[:3], "target_tokens": [5] * 3}
    both = run.pass_([wide, narrow], backward=False)
    assert [one.shape for one in both.logprobs] == [(3, 2), (3,)]
    np.testing.assert_allclose(both.logprobs[0][:, 0], both.logprobs[1], atol=1e-5)
    assert both.loss == pytest.approx(-2 * both.logprobs[1].sum(), rel=1e-5)


def test_requests_are_computed_in_their_order_whenever_they_arrive(client, it):
    run, local = client.run(), Local()
    bodies = [run.body(texts(step), "cross_entropy") for step in range(2)]
    bodies[0].seq_id, bodies[1].seq_id = 1, 3
    late = run.send(bodies[1].SerializeToString())
    step = client.post("optim_step", model_id=run.id, seq_id=2, adam_params={"learning_rate": 0.01})
    time.sleep(0.1)
    assert not it.training.worker.queue.promise(run.id, 3).done()
    first = run.send(bodies[0].SerializeToString())
    again = run.send(bodies[0].SerializeToString())  # as after a connection that broke
    assert again == first
    assert run.wait_for_pass(first).loss == pytest.approx(local.pass_(texts(0)), rel=1e-4)
    client.result(step)
    local.step()
    assert run.wait_for_pass(late).loss == pytest.approx(local.pass_(texts(1)), rel=1e-4)
    assert (
        run.wait_for_pass(first).loss == run.wait_for_pass(first).loss
    )  # answers stay for who asks again


def test_a_step_without_a_pass_changes_nothing(client):
    run = client.run()
    before = run.pass_([datum(TEXT)], backward=False).logprobs[0]
    assert run.step(0.5)["metrics"]["unclipped_grad_l2:mean"] == 0
    np.testing.assert_array_equal(run.pass_([datum(TEXT)], backward=False).logprobs[0], before)


# ----------------------------------------------------------------------------------------------
# what is wrong


BAD = {
    "a token that is none": ({"tokens": [1, 999], "target_tokens": [1, 2]}, "cross_entropy", {}, "token 999"),
    "a row that is too long": (datum([5] * 300), "cross_entropy", {}, "299 tokens"),
    "weights of another length": (datum(TEXT, weights=[1.0]), "cross_entropy", {}, r"weights \[1\]"),
    "not a number": (datum(TEXT, weights=[float("nan")] * 11), "cross_entropy", {}, "no finite numbers"),
    "no advantages": (datum(TEXT, logprobs=[0.0] * 11), "ppo", {}, "no advantages"),
    "no such loss": (datum(TEXT), "stable_reinforce", {}, "the loss 'stable_reinforce'"),
    "no such setting": (datum(TEXT), "cross_entropy", {"beta": 1.0}, "the setting 'beta'"),
    "a ratio that overflows": (
        datum(TEXT, logprobs=[-1e4] * 11, advantages=[1.0] * 11), "importance_sampling", {}, "a finite number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data_fail_their_own_promise_and_nothing_else(client, name):
    one, loss, settings, words = BAD[name]
    run, other = client.run(0), client.run(1)
    local = Local()
    good = run.pass_(texts(0)).loss
    assert good == pytest.approx(local.pass_(texts(0)), rel=1e-4)
    bad, beside = (
        run.ask_pass([*texts(1, 1), one] if "policy" in name else [one], loss, **settings),
        other.ask_pass(texts(2)),
    )
    with pytest.raises(Failed, match=words) as error:
        run.wait_for_pass(bad)
    assert error.value.category == "user"
    assert other.wait_for_pass(beside).loss == pytest.approx(Local().pass_(texts(2)), rel=1e-4)
    run.step()  # along the gradients of the good pass alone
    local.step()
    assert run.pass_(texts(3)).loss == pytest.approx(local.pass_(texts(3)), rel=1e-4)


def test_settings_that_would_not_end_in_numbers(client):
    run = client.run()
    for adam in ({"learning_rate": -1}, {"beta2": 1.0}, {"eps": 0}, {"weight_decay": 1e9}):
        with pytest.raises(Failed, match="a number from"):
            client.result(run.ask("optim_step", adam_params=adam))
    with pytest.raises(Failed, match="another optimizer"):
        client.result(
            run.ask("optim_step", optimizer_params={"type": "dimuon", "learning_rate": 1.0})
        )
    assert run.step()["metrics"]


def test_what_is_not_here_is_refused_with_words(client):
    run = client.run()
    cases = [
        (
            "create_model",
            {"session_id": client.session, "model_seq_id": 9, "base_model": "other"},
            400,
            "base model 'other'",
        ),
        (
            "create_model",
            {"session_id": "none", "model_seq_id": 9, "base_model": "tiny"},
            404,
            "the session 'none'",
        ),
        (
            "create_model",
            {
                "session_id": client.session,
                "model_seq_id": 9,
                "base_model": "tiny",
                "optimizer_config": {"type": "dimuon"},
            },
            400,
            "optimizer 'dimuon'",
        ),
        (
            "create_model",
            {
                "session_id": client.session,
                "model_seq_id": 9,
                "base_model": "tiny",
                "lora_config": {
                    "rank": 4,
                    "train_attn": False,
                    "train_mlp": False,
                    "train_unembed": False,
                },
            },
            400,
            "nothing to train",
        ),
        ("create_custom_loss", {}, 400, "one that the client computes"),
        ("optim_step", {"model_id": "none:train:0", "adam_params": {}}, 404, "training run"),
        (
            "optim_step",
            {"model_id": run.id, "adam_params": {"learning_rate": "fast"}},
            400,
            "learning_rate",
        ),
        (
            "optim_step",
            {"model_id": run.id, "adam_params": {}, "sharpness": 3},
            400,
            "field 'sharpness'",
        ),
        (
            "create_sampling_session",
            {"session_id": client.session, "sampling_session_seq_id": 0},
            400,
            "weights to sample",
        ),
        (
            "create_sampling_session",
            {
                "session_id": client.session,
                "sampling_session_seq_id": 0,
                "model_path": f"tinker://{run.id}/weights/none",
            },
            404,
            "the checkpoint",
        ),
        (
            "create_sampling_session",
            {
                "session_id": client.session,
                "sampling_session_seq_id": 0,
                "model_path": "tinker://a/../b",
            },
            400,
            "the path",
        ),
        ("retrieve_future", {"request_id": f"{run.id}:99"}, 410, "send it anew"),
        ("retrieve_future", {"request_id": "x"}, 410, "send it anew"),
        ("sessions/search", {"statuses": [{"type": "active"}]}, 400, "a search by cursor"),
        ("auth/token", {}, 400, "of the hosted service"),
    ]
    for route, body, status, words in cases:
        response = client.send(route, **body)
        assert response.status_code == status, (route, body, response.text)
        assert words in response.json()["error"]["message"], (route, response.text)


def test_a_rank_that_does_not_fit_fails_its_run(client):
    promised = client.post(
        "create_model",
        session_id=client.session,
        model_seq_id=3,
        base_model="tiny",
        lora_config={"rank": 99},
    )
    with pytest.raises(Failed, match="rank"):
        client.result(promised)
    response = client.send("optim_step", model_id=promised["model_id"], seq_id=1, adam_params={})
    assert response.status_code == 410
    assert "did not begin" in response.json()["error"]["message"]


def test_no_body_is_a_bug(client):
    """Whatever is sent, the server says what is wrong with it."""
    draw, run = random.Random(5), client.run()
    whole = run.body(texts(0), "cross_entropy").SerializeToString()
    headers = {"content-type": "application/x-protobuf"}
    for _ in range(300):
        body = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(body))
            if draw.random() < 0.5:
                body[place] = draw.randrange(256)
            else:
                del body[place : place + draw.randint(1, 9)]
        assert (
            client.http.post("/forward_backward", content=bytes(body), headers=headers).status_code
            < 500
        )
    routes = [
        "create_session",
        "create_model",
        "optim_step",
        "save_weights",
        "save_weights_for_sampler",
        "load_weights",
        "asample",
        "retrieve_future",
        "weights_info",
        "copy_weights",
        "sessions/search",
        "create_sampling_session",
        "join_sampling_session",
        "cancel_future",
        "session_heartbeat",
        "get_info",
        "telemetry",
    ]
    values = [None, 0, -1, 2**70, "", "x" * 300, [], {}, [[]], True, 1e308, run.id, client.session]
    for _ in range(300):
        fields = [
            "session_id",
            "model_id",
            "model_seq_id",
            "base_model",
            "path",
            "prompt",
            "sampling_params",
            "optimizer",
            "adam_params",
            "num_samples",
            "request_id",
            "tinker_path",
            "source_path",
            "lora_config",
            "seq_id",
        ]
        body = {draw.choice(fields): draw.choice(values) for _ in range(draw.randint(0, 5))}
        response = client.send(draw.choice(routes), **body)
        assert response.status_code < 500, (body, response.text)
    assert (
        client.http.post(
            "/optim_step", content=b"{", headers={"content-type": "application/json"}
        ).status_code
        == 400
    )
    packed = client.http.post(
        "/forward_backward", content=whole, headers={**headers, "content-encoding": "zstd"}
    )
    assert packed.status_code == 415
    for page_headers in ({}, {"content-type": "text/plain"}):
        untyped = client.http.post("/forward_backward", content=whole, headers=page_headers)
        assert untyped.status_code == 415
        assert "application/x-protobuf" in untyped.json()["error"]["message"]
    assert (
        client.http.post(
            "/forward_backward", content=b"x" * (2**24 + 1), headers=headers
        ).status_code
        == 413
    )
    assert client.run(1).pass_(texts(0)).loss > 0


# ----------------------------------------------------------------------------------------------
# samples


def trained_run(client, steps=3):
    run = client.run(seed=3)
    for step in range(steps):
        run.pass_(texts(step))
        run.step(0.03)
    return run


def test_samples_are_of_the_numbers_that_train_and_agree_with_them(client):
    run = trained_run(client)
    session = run.sampler()
    (one,) = client.sample(session, TEXT[:5], params={"max_tokens": 9, "stop": []}).sequences
    assert len(one.tokens) == 9
    assert one.stop == "length"
    whole = [*TEXT[:5], *one.tokens]
    trained = run.pass_([datum(whole)], backward=False).logprobs[0]
    np.testing.assert_allclose(one.logprobs, trained[4:], atol=1e-4)
    scored = client.sample(session, whole, number=1, prompt_logprobs=True).prompt
    assert np.isnan(scored[0])
    np.testing.assert_allclose(scored[1:], trained, atol=1e-4)
    run.pass_(texts(9))
    run.step(0.3)
    again = client.sample(session, TEXT[:5], number=2, params={"max_tokens": 9, "stop": []})
    assert again.sequences[0].tokens == one.tokens  # a snapshot stays


def test_inflight_weights_follow_the_run(client):
    run = trained_run(client)
    first = run.sampler(0, kind="inflight")
    before = client.sample(first, TEXT, prompt_logprobs=True).prompt
    run.pass_(texts(9))
    run.step(0.3)
    run.sampler(1, kind="inflight")
    trained = run.pass_([datum(TEXT)], backward=False).logprobs[0]
    after = client.sample(first, TEXT, number=1, prompt_logprobs=True).prompt
    np.testing.assert_allclose(after[1:], trained, atol=1e-4)
    assert abs(after[1:] - before[1:]).max() > 1e-3


def test_samples_of_the_base_with_seeds_and_stops(client, it):
    found = client.sample(
        None, TEXT, count=3, params={"temperature": 1.0, "seed": 5, "max_tokens": 8}
    )
    again = client.sample(
        None, TEXT, count=3, params={"temperature": 1.0, "seed": 5, "max_tokens": 8}
    )
    assert [one.tokens for one in found.sequences] == [one.tokens for one in again.sequences]
    assert len({tuple(one.tokens) for one in found.sequences}) == 3
    (greedy,) = client.sample(None, TEXT, params={"max_tokens": 8, "stop": []}).sequences
    with torch.no_grad():
        expected = tiny_model(tie_word_embeddings=False).generate(
            torch.tensor([TEXT]),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert greedy.tokens == expected[0, len(TEXT) :].tolist()
    place = next(i for i in range(1, 8) if greedy.tokens[i] not in greedy.tokens[:i])
    (cut,) = client.sample(
        None, TEXT, params={"max_tokens": 8, "stop": [greedy.tokens[place]]}
    ).sequences
    assert cut.tokens == greedy.tokens[: place + 1]
    assert cut.stop == "stop"


def test_what_is_said_of_a_prompt(client):
    with torch.no_grad():
        logprobs = (
            tiny_model(tie_word_embeddings=False)(torch.tensor([TEXT]))
            .logits[0]
            .log_softmax(-1)[:-1]
            .numpy()
        )
    targets = np.full((11, 2), -1)
    targets[4], targets[7, 1] = (5, 6), 8
    sparse = {"data": [5, 6, 8], "dtype": "int64", "shape": [11, 2], "sparse_col_indices": [0, 1, 1],
              "sparse_crow_indices": [0, 0, 0, 0, 0, 2, 2, 2, 3, 3, 3, 3]}  # fmt: skip
    dense = {"data": targets.flatten().tolist(), "dtype": "int64", "shape": [11, 2]}
    found = client.sample(
        None, TEXT, prompt_logprobs=True, prompt_logprobs_last_n=4, topk_prompt_logprobs=3, topk_sample_logprobs=2,
        target_prompt_logprobs=dense, prompt_alt_tokens_k=5,
    )  # fmt: skip
    assert np.isnan(found.prompt[:8]).all()
    own = logprobs[np.arange(11), TEXT[1:]]
    np.testing.assert_allclose(found.prompt[8:], own[7:], atol=1e-5)
    top = found.message.topk_prompt_logprobs
    assert (top.length, top.k) == (12, 3)
    values = np.frombuffer(top.logprobs, "<f4").reshape(12, 3)
    assert (values[:8] == -99999).all()
    np.testing.assert_allclose(values[8:], np.sort(logprobs[7:], -1)[:, ::-1][:, :3], atol=1e-5)
    scored = np.frombuffer(found.message.target_prompt_logprobs.dense, "<f4").reshape(11, 2)
    np.testing.assert_allclose(scored[4], logprobs[4, [5, 6]], atol=1e-5)
    assert scored[7, 1] == pytest.approx(logprobs[7, 8], abs=1e-5)
    assert np.count_nonzero(scored) == 3
    alternatives = found.message.prompt_alt_tokens
    drawn = np.frombuffer(alternatives.tokens.dense, "<i8").reshape(11, 5)
    np.testing.assert_allclose(
        np.frombuffer(alternatives.logprobs.dense, "<f4").reshape(11, 5),
        np.take_along_axis(logprobs, drawn, 1),
        atol=1e-5,
    )
    assert found.sequences[0].top.k == 2
    found = client.sample(None, TEXT, target_prompt_logprobs=sparse).message.target_prompt_logprobs
    assert list(found.shape) == [11, 2]
    np.testing.assert_allclose(
        np.frombuffer(found.sparse_csr.values, "<f4"),
        [*logprobs[4, [5, 6]], logprobs[7, 8]],
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [999]}, "token 999"),
        ({"prompt": []}, "a prompt of 0 tokens"),
        ({"prompt": [5] * 300}, "a prompt of 300 tokens"),
        ({"prompt_logprobs_last_n": 3}, "with prompt_logprobs"),
        (
            {"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}},
            "a row for each token",
        ),
        (
            {"target_prompt_logprobs": {"data": [999] * 11, "dtype": "int64", "shape": [11, 1]}},
            "ids below 259",
        ),
        ({"record_stability_info": True}, "stable_reinforce"),
        (
            {
                "count": 128,
                "topk_sample_logprobs": 256,
                "params": {"max_tokens": 200},
            },
            "log-probabilities of samples in one call",
        ),
    ],
)
def test_samples_that_cannot_be_drawn(client, fields, words):
    with pytest.raises(Failed, match=words) as error:
        client.sample(None, fields.pop("prompt", TEXT), **fields)
    assert error.value.category == "user"


def test_a_sample_can_be_cancelled_and_clones_have_numbers(client):
    session = trained_run(client, 1).sampler()
    assert [
        client.post("join_sampling_session", sampling_session_id=session)["client_counter"]
        for _ in range(2)
    ] == [
        1,
        2,
    ]
    promised = client.post(
        "asample", sampling_session_id=session, seq_id=7, num_samples=1, prompt={"chunks": [{"tokens": TEXT}]},
        sampling_params={"max_tokens": 180, "stop": []},
    )  # fmt: skip
    client.post("cancel_future", request_id=promised["request_id"])
    with pytest.raises(Failed, match="cancelled"):
        client.result(promised)
    assert client.get(f"samplers/{session}")["base_model"] == "tiny"


# ----------------------------------------------------------------------------------------------
# checkpoints


def test_a_checkpoint_goes_on_with_its_optimiser(client, it):
    run = client.run(seed=2)
    for step in range(3):
        run.pass_(texts(step))
        run.step(0.02)
    path = run.save("third", user_metadata={"why": "a test"})
    after = []
    for step in range(3, 6):
        after.append(run.pass_(texts(step)).loss)
        run.step(0.02)
    asked = client.post(
        "load_weights", session_id=client.session, model_seq_id=5, path=path, optimizer=True
    )
    other = type(run)(client, client.result(asked)["model_id"])
    for step in range(3, 6):
        assert other.pass_(texts(step)).loss == pytest.approx(after[step - 3], rel=1e-5)
        other.step(0.02)
    client.result(run.ask("load_weights", path=path, optimizer=False))
    assert run.pass_(texts(3)).loss == pytest.approx(after[0], rel=1e-5)
    wider = client.run(6, rank=8)
    with pytest.raises(Failed, match="of rank 4"):
        client.result(wider.ask("load_weights", path=path, optimizer=False))
    with pytest.raises(Failed, match="which exists"):
        run.save("third")
    assert run.save("third", overwrite=True) == path
    for name, fields, words in (
        ("a/b", {}, "the name"),
        ("short", {"ttl_seconds": 3}, "in ttl_seconds"),
    ):
        with pytest.raises(Failed, match=words):
            run.save(name, **fields)


def test_checkpoints_are_listed_published_copied_and_deleted(client):
    run = trained_run(client)
    path = run.save("a", user_metadata={"x": "y"})
    sampler = client.result(run.ask("save_weights_for_sampler", path="s"))["path"]
    run.sampler()  # which has no name, and is in no list
    listed = client.get(f"training_runs/{run.id}/checkpoints")["checkpoints"]
    assert {one["tinker_path"] for one in listed} == {path, sampler}
    assert {one["checkpoint_type"] for one in listed} == {"training", "sampler"}
    (own,) = (one for one in listed if one["tinker_path"] == path)
    assert own["user_metadata"] == {"x": "y"}
    assert own["size_bytes"] > 1000
    described = client.get(f"training_runs/{run.id}")
    assert described["last_checkpoint"]["tinker_path"] == path
    assert described["lora_rank"] == 4
    assert run.id in [
        one["training_run_id"] for one in client.get("training_runs?limit=1000")["training_runs"]
    ]
    info = client.post("weights_info", tinker_path=path)
    assert info["train_unembed"] is info["train_attn"] is True
    place = f"training_runs/{run.id}/checkpoints/weights/a"
    assert client.http.put(f"/{place}/ttl", json={"ttl_seconds": 3}).status_code == 400
    assert client.http.put(f"/{place}/ttl", json={"ttl_seconds": 7200}).status_code == 204
    assert (
        client.get(f"training_runs/{run.id}/checkpoints")["checkpoints"][-1]["expires_at"]
        is not None
    )
    copied = client.post("copy_weights", source_path=path)["tinker_path"]
    assert client.http.delete(f"/{place}").status_code == 204
    assert client.send("weights_info", tinker_path=path).status_code == 404
    assert client.post("weights_info", tinker_path=copied)["lora_rank"] == 4
    session = client.post(
        "create_sampling_session",
        session_id=client.session,
        sampling_session_seq_id=4,
        model_path=copied,
    )["sampling_session_id"]
    trained = run.pass_([datum(TEXT)], backward=False).logprobs[0]
    np.testing.assert_allclose(
        client.sample(session, TEXT, prompt_logprobs=True).prompt[1:], trained, atol=1e-4
    )
    own = client.get(f"sessions/{client.session}")
    assert run.id in own["training_run_ids"]
    assert client.session in client.get("sessions?limit=1000")["sessions"]
    assert (
        client.post("sessions/search", session_id=client.session)["sessions"][0][
            "checkpoints_count"
        ]
        == 1
    )


def test_an_archive_is_an_adapter_folder_that_verify_proves(client, it, tmp_path, base):
    run = trained_run(client)
    path = client.result(run.ask("save_weights_external", path="out"))["path"]
    place = path.removeprefix(f"tinker://{run.id}/")
    urls = client.get(f"training_runs/{run.id}/checkpoints/{place}/external_weights_urls")["urls"]
    for name, url in urls.items():
        (tmp_path / name).write_bytes(client.http.get(url, headers={"x-api-key": ""}).content)
    assert verify(tmp_path, base).ok
    model = tiny_model(tie_word_embeddings=False)
    veneer.load(model, tmp_path)
    with torch.no_grad():
        logprobs = model(torch.tensor([TEXT])).logits[0].log_softmax(-1)[np.arange(11), TEXT[1:]]
    np.testing.assert_allclose(
        run.pass_([datum(TEXT)], backward=False).logprobs[0], logprobs, atol=1e-4
    )
    token = next(iter(urls.values())).split("/files/")[1].split("/")[0]
    assert client.http.get(f"/files/{token}/nothing").status_code == 404
    for name in ("../optimizer.safetensors", "/etc/hostname", ""):
        assert it.training.find_file(token, name) is None
    assert client.http.get("/files/wrong/adapter_config.json").status_code == 404


def test_a_run_that_was_unloaded_takes_nothing_more(client):
    run = trained_run(client)
    path = run.save("last")
    assert client.result(client.post("unload_model", model_id=run.id))["model_id"] == run.id
    response = client.send("optim_step", model_id=run.id, seq_id=99, adam_params={})
    assert response.status_code == 410
    assert client.post("weights_info", tinker_path=path)["lora_rank"] == 4


# ----------------------------------------------------------------------------------------------
# memory, disk, tenants


def opened(base, folder, **options):
    return listening(open_service(base, None, train=str(folder), **options))


def crash(service):
    """What a kill leaves: nothing is written any more."""
    training_of(service).worker.memory.write_state_if_due = lambda active_run: None


def test_a_server_that_was_killed_goes_on_with_every_step(base, tmp_path, monkeypatch):
    local, losses = Local(seed=1), []
    service = open_service(base, None, train=str(tmp_path))
    with listening(service) as (url, _):
        client = Client(url)
        run = client.run(seed=1)
        session = None
        for step in range(4):
            losses.append(run.pass_(texts(step)).loss)
            run.step(0.02)
            if step == 1:
                training_of(service).worker.submit(
                    lambda: training_of(service).worker.memory.write_state(
                        training_of(service).worker.active_runs[run.id]
                    )
                ).result()
                session = run.sampler()
        sampled = client.sample(session, TEXT).sequences[0].tokens
        waits = run.body(texts(4), "cross_entropy")
        waits.seq_id = run.number + 3  # whose turn it is not
        late = run.send(waits.SerializeToString())
        accepted = run.ask_pass(texts(4))
        first = run.wait_for_pass(accepted).loss
        crash(service)
    with opened(base, tmp_path) as (url, _):
        again = Client(url)
        again.session = client.session
        back = type(run)(again, run.id, run.number)
        assert back.wait_for_pass(accepted).loss == first
        assert again.sample(session, TEXT).sequences[0].tokens == sampled
        back.step(0.02)  # along the gradient of a pass from before
        loss = back.wait_for_pass(late).loss
    for step in range(4):
        assert losses[step] == pytest.approx(local.pass_(texts(step)), rel=1e-3)
        local.step(0.02)
    assert first == pytest.approx(local.pass_(texts(4)), rel=1e-3)
    local.step(0.02)
    assert loss == pytest.approx(local.pass_(texts(4)), rel=1e-3)


def test_what_a_killed_process_left_of_a_state_is_removed(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path))
    with listening(service) as (url, _):
        client = Client(url)
        run = client.run()
        run.pass_(texts(0))
        run.step(0.02)
        folder = training_of(service).store.folder_of(run.id)
        for name in (".state-0.abcd.tmp/new", "state-0"):
            (folder / name).mkdir(parents=True)
    states = [path.name for path in folder.iterdir() if "state-" in path.name]
    assert len(states) == 1
    assert states[0] not in ("state-0", ".state-0.abcd.tmp")


def test_more_runs_than_memory_holds(base, tmp_path):
    with opened(base, tmp_path, runs=2) as (url, _server):
        client = Client(url)
        runs, locals_ = (
            [client.run(number, seed=number) for number in range(5)],
            [Local(seed=n) for n in range(5)],
        )
        for step in range(3):
            for number, (run, local) in enumerate(zip(runs, locals_, strict=True)):
                assert run.pass_(texts(step + number)).loss == pytest.approx(
                    local.pass_(texts(step + number)), rel=1e-3
                )
                if step != 1:  # one is let go with a gradient that waits
                    run.step(0.02)
                    local.step(0.02)


@pytest.mark.parametrize("at", ["step", "compute"])
def test_a_run_that_could_not_come_back_is_not_there_in_part(base, tmp_path, monkeypatch, at):
    """What failed while its requests were computed again fails the one that needed it; the next
    begins anew."""
    service = open_service(base, None, train=str(tmp_path), runs=1)
    trainer = training_of(service).worker.trainer
    with listening(service) as (url, _):
        client = Client(url)
        one, other, local = client.run(0, seed=1), client.run(1, seed=2), Local(seed=1)
        one.pass_(texts(0)), one.step(0.02), one.pass_(texts(1))
        local.pass_(texts(0)), local.step(0.02), local.pass_(texts(1))
        other.pass_(texts(0))  # one is let go, with a gradient that waits
        real, failures = getattr(trainer, at), iter([1])

        def fails(first, *args):
            if next(failures, None) is None:
                return real(first, *args)
            if at == "step":
                raise RuntimeError("out of luck")
            first[0].error = RuntimeError("out of luck")
            return {}

        monkeypatch.setattr(trainer, at, fails)
        with pytest.raises(Failed, match="out of luck"):
            one.step(0.02)
        one.step(0.02)
        local.step(0.02)
        found, expected = (
            one.pass_(texts(0)).loss,
            local.pass_(texts(0)),
        )  # what a step is lost of is seen on its data
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_session_that_cannot_be_left_is_said(base, tmp_path, monkeypatch, caplog):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        client.run(seed=1).pass_(texts(0))

        def full(active_run):
            raise OSError("no space left on the device")

        monkeypatch.setattr(training.worker.memory, "evict", full)
        training.evict_session(client.session)
        training.worker.submit(lambda: None).result(30)  # which comes after
        assert "no space left on the device" in caplog.text


def test_a_disk_that_fails_for_a_while_loses_nothing(base, tmp_path, monkeypatch):
    """A step that was taken and could not be written down is taken once."""
    monkeypatch.setattr(worker_, "PAUSE_SECONDS", 0.01)
    service = open_service(base, None, train=str(tmp_path))
    store, local = training_of(service).store, Local(seed=1)
    with listening(service) as (url, _):
        run = Client(url).run(seed=1)
        for step in range(3):
            assert run.pass_(texts(step)).loss == pytest.approx(local.pass_(texts(step)), rel=1e-3)
            real, failures = store.store_answer, iter(range(2))

            def full(*args, real=real, failures=failures):
                if next(failures, None) is not None:
                    raise sqlite3.OperationalError("database or disk is full")
                return real(*args)

            monkeypatch.setattr(store, "store_answer", full)
            run.step(0.02)
            local.step(0.02)
            monkeypatch.setattr(store, "store_answer", real)

        def nowhere(*args):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(store, "add_request", nowhere)
        response = run.client.send(
            "optim_step", model_id=run.id, seq_id=run.number + 1, adam_params={}
        )
        assert response.status_code == 503
        assert "disk is full" in response.json()["error"]["message"]
        monkeypatch.undo()
        path = run.save("kept")
        monkeypatch.setattr(store, "change_checkpoint", lambda *_, **__: nowhere())
        path = path.replace("tinker://", "/training_runs/").replace(
            "/weights/", "/checkpoints/weights/"
        )
        for method, ending, body in (
            ("POST", "publish", None),
            ("DELETE", "publish", None),
            ("PUT", "ttl", {"ttl_seconds": 7200}),
        ):
            response = run.client.http.request(method, f"{path}/{ending}", json=body)
            assert response.status_code == 503


def test_a_run_has_so_many_waiting(client, monkeypatch):
    monkeypatch.setattr(active_runs_, "MAX_WAITING_REQUESTS", 3)
    run = client.run()
    bodies = [{"model_id": run.id, "seq_id": 2 + number, "adam_params": {}} for number in range(4)]
    assert [client.send("optim_step", **body).status_code for body in bodies] == [
        200,
        200,
        429,
        429,
    ]


def test_a_client_that_vanishes_frees_its_share(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client)
        before = run.pass_([datum(TEXT)], backward=False).logprobs[0]
        assert len(training.worker.trainer.runs) == 1
        training._heartbeats[client.session] -= 1000
        training.clean_up()
        until(lambda: not training.worker.trainer.runs)
        np.testing.assert_array_equal(run.pass_([datum(TEXT)], backward=False).logprobs[0], before)
        assert (
            client.http.post(
                f"/sessions/{client.session}/finish", json={"reason": {"type": "success"}}
            ).status_code
            == 204
        )
        until(lambda: not training.worker.trainer.runs)
        assert client.send("session_heartbeat", session_id=client.session).status_code == 410


def test_keys_see_their_own(base, tmp_path):
    ring = Keyring(
        tuple(Key(name, hash_of(f"vnr-{name}"), base=name != "b", train=True) for name in "ab")
    )
    with opened(base, tmp_path, keys=ring) as (url, _):
        a, b = Client(url, "tml-vnr-a"), Client(url, "tml-vnr-b")
        run = a.run()
        run.pass_(texts(0))
        path = run.save("mine")
        for route, body in (
            ("optim_step", {"model_id": run.id, "adam_params": {}}),
            ("get_info", {"model_id": run.id}),
            ("weights_info", {"tinker_path": path}),
            ("session_heartbeat", {"session_id": a.session}),
        ):
            assert b.send(route, **body).status_code == 404
        assert b.send("retrieve_future", request_id=f"{run.id}:1").status_code == 410
        assert b.get("training_runs")["training_runs"] == []
        assert b.get("checkpoints")["checkpoints"] == []
        place = f"/training_runs/{run.id}/checkpoints/weights/mine"
        assert b.http.delete(place).status_code == 404
        assert a.http.post(f"{place}/publish").status_code == 204
        assert b.post("weights_info", tinker_path=path)["lora_rank"] == 4
        assert b.http.delete(place).status_code == 404
        with pytest.raises(AssertionError, match="404"):
            b.sample(None, TEXT)  # whose key may not use the base
        a.http.headers["x-api-key"] = "tml-wrong"
        assert a.http.get("/training_runs").status_code == 401
        assert a.http.get("/healthz").status_code == 200


def test_quotas_of_a_key(base, tmp_path):
    limits: Any = {"runs": 2, "bytes": 50_000, "tokens": 60}
    ring = Keyring(
        (Key("a", hash_of("vnr-a"), train=True, **limits), Key("b", hash_of("vnr-b"), train=True))
    )
    with opened(base, tmp_path, keys=ring) as (url, _):
        client, other = Client(url, "tml-vnr-a"), Client(url, "tml-vnr-b").run()
        run = client.run(0)
        client.run(1)
        third = {"session_id": client.session, "model_seq_id": 2, "base_model": "tiny"}
        response = client.send("create_model", **third)
        assert response.status_code == 403
        assert "2 runs of key 'a'" in response.json()["error"]["message"]
        run.save("one")
        with pytest.raises(Failed, match="bytes of key 'a'"):
            run.save("two")
        run.pass_([datum([5] * 41)])
        params = {"max_tokens": 9, "stop": []}
        asked = {
            "base_model": "tiny",
            "prompt": {"chunks": [{"tokens": TEXT}]},
            "sampling_params": params,
        }
        assert (
            client.send("asample", **asked).status_code == 403
        )  # it could take 21 tokens of the 20 that are left
        client.sample(None, TEXT, params={**params, "max_tokens": 8})
        with pytest.raises(Failed, match="60 tokens of key 'a'"):
            run.pass_([datum(TEXT)])
        assert run.step()["metrics"]  # along what was accepted
        other.pass_([datum(TEXT)] * 9)


def test_a_folder_is_of_one_server_and_one_base(base, tmp_path, tmp_path_factory):
    from tests.support.tiny import write_tiny

    from veneer.errors import ConfigError

    service = open_service(base, None, train=str(tmp_path))
    try:
        with pytest.raises(ConfigError, match="which another server uses"):
            Store(tmp_path)
    finally:
        service.close()
    other = write_tiny(tmp_path_factory.mktemp("other"), seed=5, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match="runs of this base"):
        open_service(other, None, train=str(tmp_path))


def test_a_tied_head_is_said_not_to_train(tmp_path):
    from tests.support.tiny import write_tiny

    with opened(write_tiny(tmp_path / "base"), tmp_path / "runs") as (url, _):
        client = Client(url)
        said = client.post("create_session", tags=[], project_id="p")["warning_message"]
        assert "train_unembed" in said
        assert "project" in said
        run, session = client.run(), None
        run.pass_(texts(0))
        run.step(0.05)
        session = run.sampler()
        trained = run.pass_([datum(TEXT)], backward=False).logprobs[0]
        np.testing.assert_allclose(
            client.sample(session, TEXT, prompt_logprobs=True).prompt[1:], trained, atol=1e-4
        )


def test_json_of_failures_is_the_clients(monkeypatch):
    body = json.loads(worker_.failure_answer(ValueError("x"), is_bug=True).body)
    assert body == {"error": "ValueError: x", "category": "server"}
