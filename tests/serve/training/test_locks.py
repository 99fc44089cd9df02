"""The order of locks that the package's page gives, held by a server that is used by all at once;
and that nobody waits for memory of the bank while another waits for them."""

from __future__ import annotations

import linecache
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import httpx
import numpy as np
import pytest
from tests.serve.training.test_service import TEXT, texts, trained_run
from tests.support.api_server import listening, until
from tests.support.service import open_service
from tests.support.training_client import Client

from veneer.attach.layer import state as state_
from veneer.serve import training
from veneer.serve.requests import Request, Sampling
from veneer.serve.training.operations import adapter_folder
from veneer.serve.training.training_service import training_of

#: the locks of a server in their order, as the page has them
ORDER = re.findall(r"^    \d+ +([\w.]+)", training.__doc__ or "", re.MULTILINE)
#: threads that others wait for: they never wait for memory, nor for who does
PROMPT = ("veneer-engine", "veneer-training", "veneer-journal", "asyncio", "veneer-sessions")


class Watch:
    """Which locks were taken while others were held, and who waited for what."""

    def __init__(self):
        self.held = threading.local()
        self.pairs, self.waits, self.takes = {}, set(), set()

    @property
    def mine(self):
        return self.held.__dict__.setdefault("names", [])

    def taken(self, name):
        for outer in self.mine:
            if outer != name:
                self.pairs.setdefault((outer, name), threading.current_thread().name)
        self.takes.add((threading.current_thread().name, name))
        self.mine.append(name)


class Watched:
    """A lock whose holders are noted."""

    def __init__(self, watch, name, lock):
        self.watch, self.name, self.lock = watch, name, lock

    def acquire(self, blocking=True, timeout=-1):
        taken = self.lock.acquire(blocking, timeout)
        if taken:
            self.watch.taken(self.name)
        return taken

    def release(self):
        names = self.watch.mine
        del names[len(names) - 1 - names[::-1].index(self.name)]
        self.lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


class WatchedAgain(Watched):
    """One that its holder may take again, as conditions do."""

    def _is_owned(self):
        return self.lock._is_owned()

    def _release_save(self):
        names = self.watch.mine
        count = names.count(self.name)
        names[:] = [name for name in names if name != self.name]
        self.watch.waits.add((threading.current_thread().name, self.name, tuple(names)))
        return count, self.lock._release_save()

    def _acquire_restore(self, state):
        count, inner = state
        self.lock._acquire_restore(inner)
        for _ in range(count):
            self.watch.taken(self.name)


@pytest.fixture
def watch(monkeypatch):
    """Of each lock that is made from now on, and the model's."""
    watch, real = (
        Watch(),
        {name: getattr(threading, name) for name in ("Lock", "RLock", "Condition")},
    )

    def named():
        frame = sys._getframe(2)
        if not re.search(r"veneer/(serve|bank)/", frame.f_code.co_filename):
            return None
        attribute = re.search(
            r"self\.(\w+)", linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        )
        return f"{type(frame.f_locals['self']).__name__}.{attribute[1]}" if attribute else None

    def lock():
        name = named()
        return real["Lock"]() if name is None else Watched(watch, name, real["Lock"]())

    def rlock():
        name = named()
        return real["RLock"]() if name is None else WatchedAgain(watch, name, real["RLock"]())

    def condition(lock=None):
        name = named()
        if lock is None and name is not None:
            lock = WatchedAgain(watch, name, real["RLock"]())
        return real["Condition"](lock)

    for name, make in (("Lock", lock), ("RLock", rlock), ("Condition", condition)):
        monkeypatch.setattr(threading, name, make)
    changing = WatchedAgain(watch, "ADAPTER_CHANGE_LOCK", state_.ADAPTER_CHANGE_LOCK)
    for module in [
        module for name, module in list(sys.modules.items()) if name.startswith("veneer.")
    ]:
        if getattr(module, "ADAPTER_CHANGE_LOCK", None) is changing.lock:
            monkeypatch.setattr(module, "ADAPTER_CHANGE_LOCK", changing)
    return watch


def test_locks_are_taken_in_the_order_that_is_written_down(watch, base, tmp_path):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    with listening(service) as (url, _):
        clients = [Client(url) for _ in range(3)]
        sessions = [trained_run(client, 1).sampler() for client in clients]
        service.bank.capacity = int(1.5 * max(status.bytes for status in service.bank.status()))

        def drive(number):
            client, session = clients[number], sessions[number]
            run = client.run(1, seed=number)
            for step in range(3):
                run.pass_(texts(step)), run.step(0.01)
                client.sample(session, TEXT, number=10 * step, prompt_logprobs=True)
                client.sample(
                    run.sampler(10 * number + step + 1), TEXT, number=step, prompt_logprobs=True
                )
                run.save(f"at-{step}", overwrite=True)
                httpx.get(f"{url}/api/v1/live", trust_env=False)
                httpx.get(f"{url}/metrics", trust_env=False)
            client.send(f"sessions/{client.session}/finish", reason={"type": "client_finished"})

        with ThreadPoolExecutor(3) as pool:
            driven = [pool.submit(drive, number) for number in range(3)]
            while wait(driven, timeout=0.05).not_done:
                training_of(service).clean_up()
            for one in driven:
                one.result()
        service.bank.capacity = None
    names = {name for pair in watch.pairs for name in pair} | {name for _, name in watch.takes}
    assert names <= {*ORDER}, f"not in the order of the page: {names - {*ORDER}}"
    against = {
        pair: thread
        for pair, thread in watch.pairs.items()
        if not ORDER.index(pair[0]) < ORDER.index(pair[1])
    }
    assert not against
    assert {"Bank._loading", "FairLock._lock", "Queue.wake", "Index.lock"} <= names
    loaders = {thread for thread, name in watch.takes if name == "Bank._loading"}
    assert loaders
    assert not [thread for thread in loaders if thread.startswith(PROMPT)]
    memory = {(thread, held) for thread, name, held in watch.waits if name == "Bank._changed"}
    assert not [thread for thread, _ in memory if thread.startswith(PROMPT)]
    assert {held for _, held in memory} <= {(), ("Bank._loading",)}
    # whoever waits holds nothing that those need who would wake it
    assert {held for _, name, held in watch.waits if name != "Bank._changed"} <= {()}


def test_what_a_prompt_is_worth_and_a_sample_do_not_wait_for_each_other(
    base, tmp_path, monkeypatch
):
    """There is memory for one adapter. That of the prompt was in memory, another one pushes it out
    before its turn."""
    monkeypatch.setattr("veneer.bank.bank.MAX_WAIT_SECONDS", 20.0)
    service = open_service(base, None, train=str(tmp_path))
    engine, bank, worker = service.engine, service.bank, training_of(service).worker
    with listening(service) as (url, _):
        client = Client(url)
        sessions = [trained_run(client, 1).sampler()]
        run = client.run(1)
        run.pass_(texts(0)), run.step()
        sessions.append(run.sampler(1))
        paths = [training_of(service).store.sampler(session)["path"] for session in sessions]
        expected = client.sample(
            sessions[0], TEXT, number=5, prompt_logprobs=True, params={"max_tokens": 1}
        ).prompt
        bank.capacity = int(1.5 * max(status.bytes for status in bank.status()))
        folder = adapter_folder(training_of(service).store, paths[1])
        bank.register(paths[1], folder, replace=True)
        bank.prefetch(paths[0]).result(timeout=20)
        pieces, real, began = [], worker.submit, threading.Event()
        request = Request(
            TEXT, {paths[1]: 1.0}, Sampling(max_tokens=100, ignore_eos=True), 60.0, "other"
        )

        def submit(function, *args):
            if not began.is_set():
                began.set()
                engine.submit(request, pieces.append)
                until(lambda: pieces or bank.crowded)  # it has the memory, or waits for it
            return real(function, *args)

        monkeypatch.setattr(worker, "submit", submit)
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(
                client.sample,
                sessions[0],
                TEXT,
                number=6,
                prompt_logprobs=True,
                params={"max_tokens": 1},
            )
            found = told.result(timeout=10).prompt
        np.testing.assert_allclose(found[1:], expected[1:], atol=1e-4)
        until(lambda: pieces and pieces[-1].finish is not None)
        assert pieces[-1].finish == "length"


def test_publishing_does_not_wait_for_memory_that_samples_use(base, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.bank.bank.MAX_WAIT_SECONDS", 20.0)
    service = open_service(base, None, train=str(tmp_path))
    bank = service.bank
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client, 1)
        first = run.sampler(0)
        path = training_of(service).store.sampler(first)["path"]
        bank.capacity = int(1.5 * max(status.bytes for status in bank.status()))
        lease = bank.acquire({path: 1.0}).result(timeout=20)
        blocked = bank._loading.acquire(timeout=5)  # as while a load waits for memory
        try:
            run.pass_(texts(1)), run.step(0.1)
            with ThreadPoolExecutor(1) as pool:
                second = pool.submit(run.sampler, 1).result(timeout=10)
        finally:
            assert blocked
            bank._loading.release()
            lease.release()
        local = client.sample(second, TEXT, params={"max_tokens": 3})
        assert local.sequences[0].tokens
