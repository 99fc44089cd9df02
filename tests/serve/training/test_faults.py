"""What a stranger looked for in the training service: half states, promises that never come, one
tenant in another's way."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tests.serve.training.conftest import Local
from tests.serve.training.test_service import TEXT, opened, texts, trained_run
from tests.support.api_server import listening, until
from tests.support.service import open_service
from tests.support.training_client import Client, Failed, Run, datum

from veneer.errors import DataError
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.requests import Busy, Piece
from veneer.serve.training import active_runs as active_runs_
from veneer.serve.training import run_trainer as run_trainer_
from veneer.serve.training import samples as samples_
from veneer.serve.training import store as store_
from veneer.serve.training import worker as worker_
from veneer.serve.training.bodies import Sample
from veneer.serve.training.run_memory import RunMemory
from veneer.serve.training.run_trainer import Trainer
from veneer.serve.training.samples import Samples
from veneer.serve.training.training_service import training_of
from veneer.serve.training.wire import MESSAGES, read_pass
from veneer.serve.training.worker import PASS, Worker


def test_a_disk_that_fails_for_one_run_of_a_batch_leaves_no_other_waiting(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr(worker_, "PAUSE_SECONDS", 0.01)
    service = open_service(base, None, train=str(tmp_path))
    worker, store = training_of(service).worker, training_of(service).store
    with listening(service) as (url, _):
        runs = [Client(url).run(seed=number) for number in range(3)]
        data = [[datum(TEXT[number:][:8])] for number in range(3)]  # of one length: one batch
        expected = [
            run.pass_(own, backward=False).loss for run, own in zip(runs, data, strict=True)
        ]
        real, failures = store.store_answer, iter([1])

        def full(*args):
            if next(failures, None) is not None:
                raise sqlite3.OperationalError("database or disk is full")
            return real(*args)

        monkeypatch.setattr(store, "store_answer", full)
        held = threading.Event()
        worker.submit(held.wait)  # all three wait together, and share a batch
        promised = [run.ask_pass(own) for run, own in zip(runs, data, strict=True)]
        held.set()
        ends = [worker.queue.promise(run.id, run.number) for run in runs]
        for end in ends:
            assert end.result(timeout=20).binary
        for run, asked, loss in zip(runs, promised, expected, strict=True):
            assert run.wait_for_pass(asked).loss == pytest.approx(loss, rel=1e-5)


def test_a_run_that_did_not_begin_takes_nothing_of_a_quota(base, tmp_path):
    ring = Keyring((Key("a", hash_of("vnr-a"), runs=1, train=True),))
    with opened(base, tmp_path, keys=ring) as (url, _):
        client = Client(url, "tml-vnr-a")
        with pytest.raises(Failed, match="rank"):
            client.run(0, rank=99)
        run = client.run(1)
        assert run.pass_(texts(0)).loss > 0
        response = client.send(
            "optim_step", model_id=f"{client.session}:train:0", seq_id=1, adam_params={}
        )
        assert response.status_code == 410
        assert "did not begin" in response.json()["error"]["message"]


def test_a_run_that_cannot_come_back_can_be_unloaded(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client)
        client.run(1)  # the first one is let go

        def broken(*args, **options):
            raise OSError("a state that cannot be read")

        monkeypatch.setattr(training_of(service).worker.trainer, "load", broken)
        with pytest.raises(Failed, match="cannot be read"):
            run.step()
        assert client.result(client.post("unload_model", model_id=run.id))["model_id"] == run.id


def test_a_run_whose_optimizer_could_not_be_loaded_is_not_there_in_part(
    base, tmp_path, monkeypatch
):
    real, failures = run_trainer_.load_optimizer_tensors, iter([1])

    def fails(*args):
        if next(failures, None) is not None:
            raise RuntimeError("out of luck")
        real(*args)

    monkeypatch.setattr(run_trainer_, "load_optimizer_tensors", fails)
    with opened(base, tmp_path, runs=1) as (url, _):
        client, local = Client(url), Local(seed=1)
        run = client.run(seed=1)
        for step in range(2):
            run.pass_(texts(step)), run.step(0.05)
            local.pass_(texts(step)), local.step(0.05)
        client.run(1)  # the first one is let go
        with pytest.raises(Failed, match="out of luck"):
            run.pass_(texts(2))
        run.pass_(texts(2)), run.step(0.05)
        local.pass_(texts(2)), local.step(0.05)  # with the moments of all three steps
        found = run.pass_(texts(2), backward=False).loss
        assert found == pytest.approx(local.pass_(texts(2)), rel=1e-3)


class Death(BaseException):
    """The end of the process."""


def ends_again_and_again(base, folder, monkeypatch, asked):
    """(how often the process died, what each of these passes came to) of servers that are started
    until one lasts."""
    deaths = 0
    monkeypatch.setattr(Worker, "start", lambda worker: None)  # its turns are made here
    monkeypatch.setattr(
        Worker, "close", lambda worker: None
    )  # a process that is gone writes nothing
    while deaths < 9:
        service = open_service(base, None, train=str(folder))
        worker = training_of(service).worker
        if not deaths:
            for run, data in asked.items():
                worker.queue.accept(
                    run.id, run.next(), PASS, run.body(data, "cross_entropy").SerializeToString()
                )
        try:
            while worker.queue.ready_runs():
                worker.run_once()
            return deaths, [
                training_of(service).store.request(run.id, run.number)["answer"] for run in asked
            ]
        except Death:
            deaths += 1
        finally:
            service.close()
    raise AssertionError("it died at each start")


def loss_of(answer):
    message = MESSAGES["ForwardBackwardOutput"].FromString(answer)
    return {one.key: one.value for one in message.metrics}["loss:sum"]


def test_a_request_that_ends_the_process_again_and_again_is_given_up(base, tmp_path, monkeypatch):
    with opened(base, tmp_path) as (url, _):
        good, bad = (trained_run(Client(url)) for _ in range(2))
        expected = good.pass_(texts(0), backward=False).loss
    real = Trainer.compute

    def compute(self, passes):
        if any(len(one.data) == 5 for one in passes):
            raise Death
        return real(self, passes)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute", compute)
        deaths, answers = ends_again_and_again(
            base, tmp_path, patch, {good: texts(0), bad: texts(0, count=5)}
        )
    assert deaths == 1 + 3  # of both at first, then of the bad one alone
    assert loss_of(answers[0]) == pytest.approx(expected, rel=1e-6)
    told = json.loads(answers[1])
    assert told["category"] == "user"
    assert "ended 3 times" in told["error"]
    with opened(base, tmp_path) as (url, _):
        again = Client(url)
        again.session = bad.client.session
        assert Run(again, bad.id, bad.number).pass_(texts(0)).loss == pytest.approx(
            expected, rel=1e-6
        )


def test_a_process_that_is_ended_before_a_request_is_computed_tells_nothing_of_it(
    base, tmp_path, monkeypatch
):
    with opened(base, tmp_path) as (url, _):
        run = trained_run(Client(url))
        expected = run.pass_(texts(0), backward=False).loss
    real, ends = RunMemory.ensure_loaded, iter(range(6))

    def ensure_loaded(self, active_run):
        if next(ends, None) is not None:
            raise Death
        real(self, active_run)

    with monkeypatch.context() as patch:
        patch.setattr(RunMemory, "ensure_loaded", ensure_loaded)
        deaths, answers = ends_again_and_again(base, tmp_path, patch, {run: texts(0)})
    assert deaths == 6
    assert loss_of(answers[0]) == pytest.approx(expected, rel=1e-6)


def test_a_server_that_is_closed_in_a_pass_does_not_give_it_up(base, tmp_path, monkeypatch):
    with opened(base, tmp_path) as (url, _):
        run = trained_run(Client(url))
        expected = run.pass_(texts(0), backward=False).loss
    monkeypatch.setattr(Worker, "start", lambda worker: None)  # its turns are made here

    def closing(worker):
        worker._closing = True  # as another thread says it, after the first of many batches
        return {}

    for number in range(6):
        service = open_service(base, None, train=str(tmp_path))
        worker = training_of(service).worker
        if not number:
            worker.queue.accept(
                run.id, run.next(), PASS, run.body(texts(0), "cross_entropy").SerializeToString()
            )
        if number < 5:
            monkeypatch.setattr(
                worker.trainer, "compute", lambda passes, worker=worker: closing(worker)
            )
        while worker.queue.ready_runs() and not worker._closing:
            worker.run_once()
        answer = training_of(service).store.request(run.id, run.number)["answer"]
        service.close()
    assert loss_of(answer) == pytest.approx(expected, rel=1e-6)


def test_a_copy_that_is_asked_for_again_is_the_same(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    with listening(service) as (url, _):
        client = Client(url)
        path = trained_run(client, 1).save("a")
        other = Client(url)
        asked = {"session_id": other.session, "model_seq_id": 0, "source_path": path}
        real, failures = training_of(service).operations.copy, iter([1])

        def full(source, target):
            real(source, target)
            if next(failures, None) is not None:
                raise OSError("no space left on the device")

        monkeypatch.setattr(training_of(service).operations, "copy", full)
        assert other.send("copy_weights", **asked).status_code == 503
        copied = other.post("copy_weights", **asked)
        assert other.post("copy_weights", **asked) == copied  # as after a connection that broke
        assert client.post("weights_info", tinker_path=copied["tinker_path"])["lora_rank"] == 4
        begun = other.send(
            "create_model", session_id=other.session, model_seq_id=0, base_model="tiny"
        )
        assert begun.status_code == 409
        trained = other.run(1)
        again = other.send("copy_weights", **{**asked, "model_seq_id": 1})
        assert again.status_code == 409
        assert trained.id in again.json()["error"]["message"]


def test_a_copy_of_other_weights_under_a_name_that_is_taken_is_refused(base, tmp_path):
    with opened(base, tmp_path) as (url, _):
        client, other = Client(url), Client(url)
        first, second = trained_run(client, 1).save("a"), client.run(1, seed=2).save("a")
        copied = other.post("copy_weights", session_id=other.session, source_path=first)
        refused = other.send("copy_weights", session_id=other.session, source_path=second)
        assert refused.status_code == 409
        assert copied["tinker_path"] in refused.json()["error"]["message"]


def test_saves_for_samples_keep_as_many_adapters_in_memory_as_runs(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    bank = training_of(service).bank
    with listening(service) as (url, _):
        client = Client(url)
        run, sizes = trained_run(client, 1), set()
        for number in range(3):
            client.result(run.ask("save_weights_for_sampler", path=f"s{number}"))
            sizes.add(bank.nbytes)
        assert len(sizes) == 1
        assert sizes != {0}
        session = client.post(
            "create_sampling_session",
            session_id=client.session,
            sampling_session_seq_id=0,
            model_path=f"tinker://{run.id}/sampler_weights/s0",
        )
        assert client.sample(session["sampling_session_id"], TEXT).sequences[0].tokens


def test_answers_are_kept_for_as_many_requests_as_may_wait():
    assert store_.MAX_OLD_ANSWERS >= active_runs_.MAX_WAITING_REQUESTS


def test_scores_of_a_prompt_from_logits_that_are_not_finite_are_refused():
    logits = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    with pytest.raises(DataError, match="not finite"):
        samples_._prompt_scores(logits, torch.tensor([1, 0]), Mock(Sample))


def test_weights_that_others_push_out_while_a_sample_waits_are_read_again(
    base, tmp_path, monkeypatch
):
    """With more clients than adapters that are held, each pushes out another's between its call and
    its turn."""
    service = open_service(base, None, train=str(tmp_path), runs=1)
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client)
        first = run.sampler(0)
        expected = client.sample(first, TEXT[:5], number=0).sequences[0].tokens
        run.pass_(texts(1))
        run.step(0.1)
        second = training.store.sampler(run.sampler(1))["path"]
        real = training.engine.submit

        def between(request, deliver):
            training.register_checkpoint(second)
            return real(request, deliver)

        monkeypatch.setattr(training.engine, "submit", between)
        for number in (1, 2):
            assert client.sample(first, TEXT[:5], number=number).sequences[0].tokens == expected


def test_addresses_that_are_asked_for_at_once_are_all_good(it, client):
    """Of files, by threads of the pool."""
    run = trained_run(client, 1)
    path = client.result(run.ask("save_weights_external", path="out"))["path"]
    kind, name = path.split("/")[-2:]
    folder = it.training.store.folder_of(run.id) / kind / name
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            tokens = list(pool.map(it.training.new_file_token, [folder] * 2000))
    finally:
        sys.setswitchinterval(interval)
    assert all(token in it.training._folders_by_token for token in tokens)


# ----------------------------------------------------------------------------------------------
# samples of many


@pytest.mark.parametrize(
    ("shape", "crow"),
    [
        ([11, 4], [0, 2**63 - 1, -2, *[1] * 9]),
        ([11, 4], [0, 1, 0, *[1] * 9]),
        ([11, 4], [0, *[2] * 10, 1]),
        ([1] * 70, None),
    ],
)
def test_no_tensor_of_a_request_ends_the_process(shape, crow):
    """Rows whose differences overflow were a segmentation fault, of a request that is computed
    again at each start."""
    message = MESSAGES["ForwardBackwardRequest"](model_id="x", loss_fn="cross_entropy", seq_id=1)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(11, dtype="<i4").tobytes()
    targets = datum.loss_fn_inputs.add(key="target_tokens").value
    targets.dtype = 2
    targets.shape.extend(shape)
    if crow is None:
        targets.dense = np.ones(1, "<i8").tobytes()
    else:
        targets.sparse_csr.crow_indices = np.asarray(crow, "<i8").tobytes()
        targets.sparse_csr.values = targets.sparse_csr.col_indices = np.ones(1, "<i8").tobytes()
    with pytest.raises(DataError, match="check the client"):
        read_pass(message.SerializeToString())


def asked(count=1, **fields):
    prompt = {"chunks": [{"tokens": TEXT}]}
    return Sample(num_samples=count, prompt=prompt, sampling_params={"max_tokens": 3}, **fields)  # type: ignore[arg-type]


WORKER: Any = SimpleNamespace(vocabulary_size=259)


class Full:
    """An engine without a place."""

    length, rows, ready = 200, 8, True

    def __init__(self):
        self.tries = []

    def submit(self, request, deliver):
        self.tries.append(request)
        raise Busy("Found: a full queue.", 1.0)


def test_samples_of_one_key_leave_room_for_another(monkeypatch):
    monkeypatch.setattr(samples_, "MAX_WAITING_SAMPLES", 40)

    async def main():
        samples = Samples(Full(), None, WORKER, 10.0)
        taken = 0
        with pytest.raises(Busy):
            while taken < 100:
                samples.begin(f"a{taken}", "a", "", None, asked())
                taken += 1
        assert 20 <= taken < 40
        samples.begin("b", "b", "", None, asked())
        with pytest.raises(Busy):
            samples.begin("many", "c", "", None, asked(128))  # which are 128
        for one in samples._calls.values():
            one.task.cancel()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_few_of_many_samples_try_for_a_place_at_a_time(monkeypatch):
    monkeypatch.setattr(samples_, "RETRY_SECONDS", 0.01)
    engine = Full()

    async def main():
        samples = Samples(engine, None, WORKER, 10.0)
        for number in range(8):
            samples.begin(f"a{number}", "a", "", None, asked(128))
        await asyncio.sleep(0.2)
        for one in samples._calls.values():
            one.task.cancel()
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert 0 < len({request.id for request in engine.tries}) <= 8 * samples_.SAMPLES_PER_ROW


class FailsFirst:
    """An engine that fails the first request, and goes on with each other until it is cancelled."""

    length, rows, ready = 200, 8, True

    def __init__(self):
        self.requests, self.cancelled = [], []

    def submit(self, request, deliver):
        self.requests.append(request.id)
        if len(self.requests) == 1:
            deliver(Piece("", finish="error", error="out of luck"))
        return SimpleNamespace(cancel=lambda: self.cancelled.append(request.id))


def test_a_sample_that_fails_ends_the_others_of_its_call():
    engine = FailsFirst()

    async def main():
        samples = Samples(engine, None, WORKER, 10.0)
        samples.begin("a", "", "", None, asked(3))
        answer = await samples._calls["a"].task
        await asyncio.sleep(0.05)
        return json.loads(answer.body)

    assert "out of luck" in asyncio.run(main())["error"]
    assert engine.cancelled == engine.requests[1:]
    assert len(engine.cancelled) == 2


def test_a_call_that_is_cancelled_while_its_adapter_is_read_leaves_it_free(it, client):
    """An adapter that somebody holds for ever could never be pushed out."""
    run = trained_run(client)
    session = run.sampler()
    path, bank = it.training.store.sampler(session)["path"], it.training.bank
    bank.register(
        path, it.training.store.files_of(worker_place(path)) / "adapter", replace=True
    )  # which is cold
    reads, go = threading.Event(), threading.Event()
    real = bank._acquire

    def slow(weights):
        reads.set()
        go.wait(20)
        return real(weights)

    bank._acquire = slow
    try:
        samples = it.training.samples
        body = {"sampling_session_id": session, "seq_id": 77, "prompt": {"chunks": [{"tokens": TEXT}]},
                "sampling_params": {"max_tokens": 1}, "prompt_logprobs": True}  # fmt: skip
        promised = client.post("asample", **body)
        assert reads.wait(20)
        client.post("cancel_future", request_id=promised["request_id"])
        until(samples._calls[promised["request_id"]].task.done)
    finally:
        go.set()
        bank._acquire = real
    until(lambda: bank._loader is not None and bank._loader.submit(lambda: True).result())
    until(lambda: not any(one.users for one in bank.status() if one.name == path))
    assert np.isfinite(
        client.sample(session, TEXT, number=78, prompt_logprobs=True).prompt[1:]
    ).all()


def worker_place(path):
    from veneer.serve.training.store import parse_checkpoint_path

    return parse_checkpoint_path(path)
