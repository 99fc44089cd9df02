"""The engine: what it answers, beside transformers' own generate; who leaves when; that nothing is
left behind."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from tests.support.serving import (
    MODELS,
    OTHERS,
    SHAPE,
    Client,
    Recorder,
    alone,
    asked,
    make,
    prompts,
)
from tests.support.tiny import tiny_tokenizer

from veneer.errors import BankFullError, ConfigError
from veneer.models.decode.forward import context_limit
from veneer.serve.batch import BURST_TOKENS
from veneer.serve.engine import Engine
from veneer.serve.requests import Busy, RequestError
from veneer.serve.text import Text


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def opened(tokenizer):
    """Makes engines, and closes them."""
    made = []

    def make_engine(model=None, *, start=True, **options) -> Engine:
        engine = Engine(make("llama") if model is None else model, tokenizer, **options)
        made.append(engine)
        if start:
            engine.start()
        return engine

    yield make_engine
    for engine in made:
        engine.close()
        assert not engine.running
        assert not engine.waiting


def clean(engine) -> bool:
    """Whether the slots hold zeros, but for the rows of the requests that finished last."""
    memory = engine._batch.memory
    finished_rows = [(each.row.size_class, each.row.index) for each in memory.finished_rows]
    return all(
        not stored[index].any()
        for size_class in memory.slots.classes.values()
        for layer in size_class.layers
        for stored in (layer.keys, layer.values)
        for index in range(len(stored))
        if (size_class, index) not in finished_rows
    )


@pytest.mark.parametrize("name", MODELS)
def test_64_requests_at_once_are_answered_as_each_alone(name, opened, tokenizer):
    model = make(name)
    asks = prompts(64, 60)
    wanted = [alone(model, ask, 10) for ask in asks]
    assert len({tuple(one) for one in wanted}) > 32
    engine = opened(model, rows=7, prefill=48)
    clients = [Client(engine, asked(ask, 10)) for ask in asks]
    found = [client.wait() for client in clients]
    assert [client.tokens for client in found] == wanted
    for client in found:
        assert client.finish == ("stop" if 2 in client.tokens else "length")
        assert client.text == tokenizer.decode(client.tokens, skip_special_tokens=True)
    assert clean(engine)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_an_architecture_that_slots_do_not_know_is_refused_and_left_as_it_was(name, tokenizer):
    model = make(name)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=r"Found: .*ForCausalLM"):
        Engine(model, tokenizer)
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_architecture_whose_logits_differ_on_slots_is_refused(tokenizer, monkeypatch):
    model = make("llama")
    attention = type(model.model.layers[0].self_attn)
    own = attention.forward
    monkeypatch.setattr(  # depends on what the call was given, as an attention with a mask of its own kind would
        attention,
        "forward",
        lambda self, *a, **k: (
            own(self, *a, **k)[0] * (1 if k.get("cache") is None else 1.5),
            None,
        ),
    )
    with pytest.raises(ConfigError, match="differ by"):
        Engine(model, tokenizer)


def test_a_window_that_masks_alone_apply_is_refused_where_rows_may_exceed_it(opened, tokenizer):
    model, ask = make("qwen2_moe"), prompts(1, 60)[0]
    with pytest.raises(ConfigError, match="masks alone apply a sliding window of 16 tokens"):
        Engine(model, tokenizer)
    model.config.sliding_window = model.config.max_position_embeddings
    wanted = alone(model, ask, 8)
    assert Client(opened(model), asked(ask, 8)).wait().tokens == wanted


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("prefill", [1, 5, 16, 512])
def test_pieces_of_prompts_change_nothing(name, prefill, opened):
    model = make(name)
    asks = prompts(5, 50, seed=1)
    wanted = [alone(model, ask, 6) for ask in asks]
    engine = opened(model, rows=3, prefill=prefill)
    assert [Client(engine, asked(ask, 6)).wait().tokens for ask in asks] == wanted
    clients = [Client(engine, asked(ask, 6)) for ask in asks]
    assert [client.wait().tokens for client in clients] == wanted
    assert clean(engine)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prefill", [30, 512])
def test_a_prompt_may_fill_a_length_that_is_no_round_number(name, prefill, opened):
    model = make(name)
    limit = context_limit(model.config)
    length = 80 if limit is None else min(80, limit)
    engine = opened(model, rows=2, prefill=prefill, length=length)
    ask = tuple(range(10, 10 + length - 1))
    assert Client(engine, asked(ask, 5)).wait().tokens == alone(model, ask, 1)


def test_padding_stays_within_the_positions_that_a_model_has(opened):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=259, n_positions=75, n_embd=16, n_layer=1, n_head=2)
    ).eval()
    ask = tuple(range(10, 84))
    assert Client(opened(model), asked(ask, 5)).wait().tokens == alone(model, ask, 1)


def test_a_longer_prompt_does_not_starve_behind_shorter_ones(opened):
    engine = opened(start=False, rows=4, prefill=24)
    clients = []

    def submit():
        clients.append(Client(engine, asked((len(clients) + 5,) * 10, 1)))

    for _ in range(3):
        submit()
    long = Client(engine, asked((5,) * 20, 1))
    steps = 0
    with torch.inference_mode():
        while not long.over.is_set() and steps < 20:
            engine.step()
            steps += 1
            while sum(not client.over.is_set() for client in clients) < 3:
                submit()
    assert long.over.is_set()
    assert steps <= 4
    for client in clients:
        client.ticket.cancel()
    with torch.inference_mode():
        engine.step()


def test_a_row_waits_for_no_prompts_that_do_not_run_with_it(opened):
    """Prompts that arrive later, or whose answers are one token, are no part of a burst."""
    engine = opened(start=False, rows=4, prefill=24)
    with torch.inference_mode():
        first = Client(engine, asked((5,) * 20, 12, ignore_eos=True))
        engine.step()
        others = [Client(engine, asked((token,) * 20, 1)) for token in (6, 7, 8)]
        engine._batch.running[0].started_at -= 2
        late = Client(engine, asked((9,) * 20, 12, ignore_eos=True))
        engine.step()
        assert not engine._batch.is_burst()
        generated = engine._batch.running[0].generated
        engine.step()
        assert engine._batch.running[0].generated > generated
    engine.start()
    for client in (first, *others, late):
        client.wait()


@pytest.mark.parametrize("gap", [None, 0.001])
def test_requests_that_arrive_together_run_together(gap, opened):
    """A row of theirs waits for the prompts of the others; rows that have begun before do not."""
    engine = opened(start=False, rows=8, prefill=24, gap=gap)
    rows, decode, together = [], engine._forward.decode, engine._forward.together

    def decoding(slots, some, *args):
        rows.append(len(some))
        return decode(slots, some, *args)

    def computing(slots, some, *args):
        rows.append(len(some))
        return together(slots, some, *args)

    engine._forward.decode, engine._forward.together = decoding, computing
    asks = [(token,) * 20 for token in range(5, 11)]
    clients = [Client(engine, asked(ask, 12, ignore_eos=True)) for ask in asks]
    engine.start()
    for client in clients:
        client.wait()
    if gap is not None:
        assert min(rows) < 5
    else:
        assert rows == [6] * 11
    first, second = clients[0].tokens, alone(make("llama"), asks[0], 12)
    assert first == second


def test_no_call_is_larger_than_prefill_and_two_of_them_have_a_decode_call_between(opened):
    engine = opened(start=False, rows=8, prefill=20)
    sizes = []
    fill, decode = engine._forward.fill, engine._forward.decode

    def filling(slots, rows, some, starts):
        # requests that arrived together may have their prompts computed one after the other
        is_first = all(state.generated <= BURST_TOKENS for state in engine._batch.running)
        sizes.append(("first" if is_first else "fill", len(some) * max(map(len, some))))
        return fill(slots, rows, some, starts)

    def decoding(slots, rows, tokens, lengths):
        sizes.append(("decode", len(tokens)))
        return decode(slots, rows, tokens, lengths)

    def computing(slots, rows, tokens, lengths, pieces):
        sizes.append(("fill", sum(len(piece) for *_, piece in pieces)))
        sizes.append(("decode", len(tokens)))
        return together(slots, rows, tokens, lengths, pieces)

    together, engine._forward.together = engine._forward.together, computing
    engine._forward.fill, engine._forward.decode = filling, decoding
    clients = [
        Client(engine, asked(ask, 30, ignore_eos=True)) for ask in [(5,) * 4, *prompts(12, 60)]
    ]
    engine.start()
    for client in clients:
        client.wait()
    assert max(size for kind, size in sizes if kind != "decode") <= 20
    assert max(size for kind, size in sizes if kind == "decode") == 8
    kinds = [kind for kind, _ in sizes]
    assert not any(
        kinds[i] == kinds[i + 1] == "fill" for i in range(kinds.index("decode"), len(kinds) - 1)
    )


def test_a_row_that_is_used_again_knows_nothing_of_the_one_before(opened, tokenizer):
    """Not even where that one left infinities."""
    model = make("llama")
    engine = opened(model, rows=4)
    asks = prompts(12, 40, seed=2)
    fresh = [alone(model, ask, 8) for ask in asks]
    for _ in range(2):
        clients = [Client(engine, asked(ask, 8, timeout=30)) for ask in asks]
        assert [client.wait().tokens for client in clients] == fresh
    norm = model.model.layers[0].input_layernorm.weight
    kept = norm.detach().clone()
    norm.data.fill_(float("inf"))
    broken = [Client(engine, asked(ask, 8)) for ask in asks[:4]]
    assert all(client.wait().finish == "error" and "finite" in client.error for client in broken)
    norm.data.copy_(kept)
    clients = [Client(engine, asked(ask, 8)) for ask in asks]
    assert [client.wait().tokens for client in clients] == fresh
    assert clean(engine)


def test_16_bits_are_served(opened):
    model = make("llama").bfloat16()
    engine = opened(model, rows=4, prefill=16)
    clients = [Client(engine, asked(ask, 8)) for ask in prompts(9, 40)]
    assert all(client.wait().finish in ("stop", "length") for client in clients)


def test_the_models_own_calls_go_on_beside_it(opened):
    """generate of the same model, with padding and masks, while the engine is open."""
    model = make("gemma2")  # whose own attention is "eager", with float masks
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    options = {
        "attention_mask": (ids > 0).long(),
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    before = model.generate(ids, **options)
    engine = opened(model)
    assert torch.equal(model.generate(ids, **options), before)
    client = Client(engine, asked([5, 6, 7, 8], 5))
    assert torch.equal(model.generate(ids, **options), before)
    assert client.wait().tokens == alone(model, (5, 6, 7, 8), 5)
    engine.close()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.generate(ids, **options), before)


def test_one_engine_a_model(opened, tokenizer):
    model = make("llama")
    first = opened(model)
    with pytest.raises(ConfigError, match="that an engine serves"):
        Engine(model, tokenizer)
    assert Client(first, asked((5, 6, 7), 5)).wait().tokens == alone(make("llama"), (5, 6, 7), 5)


def test_a_model_whose_attention_is_changed_under_the_engine_answers_with_an_error(opened):
    model = make("llama")
    engine = opened(model)
    model.set_attn_implementation("eager")
    broken = Client(engine, asked((5, 6, 7), 5)).wait()
    assert broken.finish == "error"
    assert "not the slots'" in broken.error


@pytest.mark.parametrize(("kind", "limit"), [("default", 256), ("dynamic", 64), ("longrope", 64)])
def test_rotary_frequencies_that_change_with_the_longest_row_end_the_length(kind, limit):
    rope = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=rope)
    assert context_limit(config) == limit


# ----------------------------------------------------------------------------------------------
# adapters


def test_each_row_of_each_call_runs_with_its_lease(opened):
    bank = Recorder()
    engine = opened(bank=bank, rows=3, prefill=64, start=False)
    bank.calls.clear()  # of the trial
    blends = [{"a": 1.0}, {}, {"a": 0.5, "b": 0.5}]
    clients = [
        Client(engine, asked((5, 6, 7), 4, blend=blend, ignore_eos=True)) for blend in blends
    ]
    engine.start()
    for client in clients:
        assert client.wait().finish == "length"
    assert not bank.held
    seen = [blend for call in bank.calls for blend in call]
    for blend in blends:  # a prompt and three tokens behind it
        assert seen.count(blend) == 4


def test_a_request_waits_for_its_adapter_outside_of_the_rows(opened):
    bank = Recorder(slow=["cold"])
    engine = opened(bank=bank, rows=2)
    cold = [Client(engine, asked((5, 6), 3, blend={"cold": 1.0})) for _ in range(20)]
    warm = [Client(engine, asked(ask, 5, blend={"warm": 1.0})) for ask in prompts(6, 20)]
    for client in warm:
        client.wait()
    assert not any(client.pieces for client in cold)
    assert (engine.running, engine.waiting) == (0, 20)
    assert bank.pending.qsize() == 1  # one of them waits in the bank, for all
    bank.arrive()
    assert all(client.wait().finish in ("length", "stop") for client in cold)
    assert not bank.held


def test_an_adapter_that_cannot_be_had_is_an_error_of_its_request_alone(opened):
    bank = Recorder(failing={"gone": ValueError("no adapter 'gone'")})
    engine = opened(bank=bank)
    gone = Client(engine, asked((5,), blend={"gone": 1.0}))
    other = Client(engine, asked((5,), blend={"there": 1.0}))
    assert gone.wait().finish == "error"
    assert gone.error == "no adapter 'gone'"
    assert other.wait().finish in ("length", "stop")
    assert not bank.held


def test_an_adapter_for_which_there_is_no_memory_waits_for_a_lease_to_be_given_back(opened):
    class Small(Recorder):
        """Holds one blend at a time."""

        capacity = 1

        def acquire(self, blend):
            if any(lease.blend != blend for lease in self.held):
                future, error = Future(), BankFullError("no memory")
                error.needed_bytes = self.capacity
                future.set_exception(error)
                return future
            return super().acquire(blend)

        def status(self):
            return [
                SimpleNamespace(name=name, bytes=1, users=1, pinned=False)
                for lease in self.held
                for name in lease.blend
            ]

    bank = Small(failing={"huge": BankFullError("larger than all memory")})
    engine = opened(start=False, bank=bank, rows=2)
    clients = [
        Client(engine, asked((5, 6), 6, blend={name: 1.0}, ignore_eos=True)) for name in "aabbacab"
    ]
    huge = Client(engine, asked((5, 6), 6, blend={"huge": 1.0}))
    engine.start()
    assert [client.wait().finish for client in clients] == ["length"] * 8
    assert huge.wait().finish == "error"  # once nobody else holds anything
    assert huge.error == "larger than all memory"
    assert not bank.held
    for call in bank.calls:
        assert len({str(blend) for blend in call}) == 1


def test_a_load_that_waited_in_vain_waits_again_once_those_that_outlasted_it_have_ended(opened):
    """While others hold the memory without a gap, so that it fits at no time."""

    class Full(Recorder):
        capacity, blockers = 1, ()

        def acquire(self, blend):
            if "cold" not in blend or not any(lease in self.held for lease in self.blockers):
                return super().acquire(blend)
            future, error = Future(), BankFullError("no memory")
            error.needed_bytes = self.capacity
            future.set_exception(error)
            return future

        def status(self):
            return [SimpleNamespace(name="warm", bytes=1, users=1, pinned=False)]

    bank = Full()
    engine = opened(bank=bank, rows=2)
    clients, over = [], threading.Event()

    def ask():
        begun = []

        def note(piece):
            if not begun and not over.is_set() and len(clients) < 300:
                ask()  # so that one of them always holds a lease
            begun.append(piece)

        request = asked((5, 6), 12, blend={"warm": 1.0}, ignore_eos=True)
        clients.append(Client(engine, request, note))

    ask()
    assert clients[0].first.wait(30)
    bank.blockers = [*bank.held]
    cold = Client(engine, asked((5, 6), 2, blend={"cold": 1.0}, ignore_eos=True))
    assert cold.wait().finish == "length"
    over.set()
    assert len(clients) < 300
    for client in clients:
        client.wait()


def test_an_adapter_with_many_requests_does_not_starve_another(opened):
    engine = opened(start=False, bank=Recorder(), rows=2, prefill=16, queue=1000)
    order = []

    def client(name):
        def note(piece):
            if piece.finish:
                order.append(name)

        return Client(engine, asked((5, 6, 7), 6, blend={name: 1.0}, ignore_eos=True), note)

    clients = [client("many") for _ in range(100)] + [client("few") for _ in range(5)]
    engine.start()
    for one in clients:
        one.wait()
    assert order.index("few") < 4
    assert [i for i, name in enumerate(order) if name == "few"][-1] < 16


@pytest.mark.parametrize("blends", [False, True], ids=["adapters", "weights of one blend"])
def test_a_backlog_gets_its_share_beside_24_who_ask_again_when_they_are_answered(blends, opened):
    """More blends than rows and places ahead: a blend is idle for a moment between two of its
    requests."""
    engine = opened(start=False, bank=Recorder(), rows=4, prefill=64, queue=1000)
    answers, over = Counter(), threading.Event()

    def client(name, blend):
        def note(piece):
            if piece.finish and not over.is_set():
                answers[name] += 1
                if name != "busy":
                    client(name, blend)

        Client(engine, asked((5, 6, 7), 4, blend=blend, ignore_eos=True), note)

    for _ in range(300):
        client("busy", {"busy": 1.0})
    for number in range(24):
        client(number, {"a": 1.0, "b": number / 100} if blends else {f"a{number}": 1.0})
    with torch.inference_mode():
        while sum(answers.values()) < 400:
            engine.step()
    over.set()
    assert answers["busy"] >= 0.9 * 400 / (2 if blends else 25)
    if not blends:
        assert min(answers[number] for number in range(24)) >= 12


def test_a_key_with_24_adapters_gets_what_a_key_with_one_gets(opened):
    engine = opened(start=False, bank=Recorder(), rows=4, prefill=64, queue=1000)
    answers = Counter()
    for number in range(240):
        for name, blend in (("many", {f"a{number % 24}": 1.0}), ("one", {"a0": 1.0})):
            note = lambda piece, name=name: answers.update([name] if piece.finish else [])  # noqa: E731
            Client(
                engine, replace(asked((5, 6, 7), 4, blend=blend, ignore_eos=True), owner=name), note
            )
    with torch.inference_mode():
        while sum(answers.values()) < 200:
            engine.step()
    assert abs(answers["many"] - answers["one"]) <= 16


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_in_float32_a_seed_gives_the_same_answer_whoever_else_is_in_the_batch(name, opened):
    """What the docs promise, of this type alone."""
    model = make(name)
    assert model.dtype == torch.float32
    engine = opened(model, rows=24, prefill=256)
    asks = [
        asked(ask, 16, temperature=1.0, top_p=(1.0, 0.9)[seed % 2], seed=seed, ignore_eos=True)
        for seed, ask in enumerate(prompts(16, 40))
    ]
    each = [Client(engine, one).wait().tokens for one in asks]
    others = [Client(engine, asked(ask, 30, temperature=1.0)) for ask in prompts(24, 60, seed=1)]
    together = [Client(engine, one) for one in asks]
    assert [one.wait().tokens for one in together] == each
    assert len({tuple(one) for one in each}) == 16
    for one in others:
        one.wait()


# ----------------------------------------------------------------------------------------------
# ends


def test_a_schema_whose_mask_fails_ends_its_request_alone(opened, caplog):
    class Broken:
        def compute_bitmask(self):
            raise ValueError("too many items")

    engine = opened(start=False, rows=2)
    sick = Client(engine, asked((5, 6, 7), 20, ignore_eos=True))
    well = Client(engine, asked((5, 6, 7), 20, ignore_eos=True))
    sick.ticket.sampler.matcher = Broken()
    engine.start()
    assert sick.wait().finish == "error"
    assert sick.error == "ValueError: too many items"
    assert well.wait().finish == "length"


def test_a_text_that_cannot_be_ended_ends_its_request_alone(opened, monkeypatch):
    engine = opened(rows=2)
    sick = Client(engine, asked((5, 6, 7), 400, ignore_eos=True))
    well = Client(engine, asked((5, 6, 7), 40, ignore_eos=True))
    assert sick.first.wait(60)
    text = sick.ticket.text
    end = Text.end
    monkeypatch.setattr(Text, "end", lambda self: end(self) if self is not text else 1 / 0)
    sick.ticket.cancel()
    assert sick.wait(5).finish == "error"
    assert "ZeroDivisionError" in sick.error
    assert well.wait().finish == "length"
    assert engine.drain(10)


@pytest.mark.parametrize("state", ["queued", "loading", "prefilling", "decoding", "over"])
def test_a_request_is_cancelled_in_every_state(state, opened):
    bank = Recorder(slow=["cold"])
    engine = opened(bank=bank, rows=1, prefill=8, start=state != "queued")
    if state == "decoding":
        client = Client(engine, asked((5, 6, 7), 200, blend={"a": 1.0}, ignore_eos=True))
        assert client.first.wait(30)
    elif state == "prefilling":
        reached, go = threading.Event(), threading.Event()
        fill = engine._forward.fill

        def filling(*args):
            reached.set()
            assert go.wait(30)
            return fill(*args)

        engine._forward.fill = filling
        client = Client(engine, asked((5,) * 100, 5, blend={"a": 1.0}))
        assert reached.wait(30)
    elif state == "over":
        client = Client(engine, asked((5, 6), 2, blend={"a": 1.0})).wait()
    else:
        client = Client(
            engine, asked((5, 6), 2, blend={"cold" if state == "loading" else "a": 1.0})
        )
        time.sleep(0.05)
    client.ticket.cancel()
    if state == "queued":
        engine.start()
    if state == "prefilling":
        go.set()
    assert client.wait().finish == ("cancelled" if state != "over" else client.finish)
    if state == "loading":
        bank.arrive()  # too late; it is given back at once
    assert not bank.held
    assert (engine.running, engine.waiting) == (0, 0)
    assert clean(engine)
    assert Client(engine, asked((5, 6), 2, blend={"a": 1.0})).wait().finish in ("stop", "length")


def test_time_is_up_in_the_queue_while_loading_and_while_running(opened):
    bank = Recorder(slow=["cold"])
    engine = opened(bank=bank, rows=1)
    loading = Client(engine, asked((5,), blend={"cold": 1.0}, timeout=0.05))
    assert loading.wait().finish == "timeout"  # with nothing else to wake the engine
    decode = engine._forward.decode
    engine._forward.decode = lambda *a: (time.sleep(0.02), decode(*a))[1]
    running = Client(engine, asked((5,), 200, ignore_eos=True, timeout=0.3))
    queued = [Client(engine, asked((5,), timeout=0.1)) for _ in range(3)]
    assert [one.wait().finish for one in queued] == ["timeout"] * 3
    assert running.wait().finish == "timeout"
    assert 1 <= len(running.tokens) < 200
    bank.arrive()
    assert not bank.held


@pytest.mark.parametrize("call", ["fill", "decode"])
def test_an_exception_in_a_call_ends_the_requests_of_that_call_alone(call, opened, caplog):
    model = make("llama")
    engine = opened(model, bank=Recorder(), rows=2, prefill=16)
    own = getattr(engine._forward, call)
    fails = threading.Event()

    def failing(*args, **options):
        logits = own(*args, **options)  # keys and values are written
        if fails.is_set():
            fails.clear()
            raise RuntimeError("out of luck")
        return logits

    def together(*args):
        raise RuntimeError("in calls of their own it is seen whose failure it is")

    setattr(engine._forward, call, failing)
    engine._forward.together = together
    running = Client(engine, asked((5, 6), 60, ignore_eos=True))
    assert running.first.wait(30)
    fails.set()
    other = Client(engine, asked((7, 8, 9), 4))
    failed = other if call == "fill" else running
    assert failed.wait().finish == "error"
    assert "out of luck" in failed.error
    if call == "fill":
        assert (
            running.wait().tokens
            == Client(engine, asked((5, 6), 60, ignore_eos=True)).wait().tokens
        )
    assert "out of luck" in caplog.text
    assert Client(engine, asked((7, 8, 9), 4)).wait().tokens == alone(model, (7, 8, 9), 4)
    assert not engine._bank.held
    assert clean(engine)


def test_a_failure_between_calls_ends_what_ran_and_the_engine_goes_on(opened, monkeypatch):
    engine = opened(rows=2)
    monkeypatch.setattr(
        engine._batch.memory, "release", lambda *a: (_ for _ in ()).throw(RuntimeError("no memory"))
    )
    broken = Client(engine, asked((5, 6), 3))
    assert broken.wait().finish == "error"
    assert Client(engine, asked((5, 6), 3)).wait().finish in ("stop", "length")
    assert engine.running == 0


def test_a_client_that_cannot_be_given_a_piece_is_cancelled(opened, caplog):
    engine = opened(rows=2)
    seen = []

    def deliver(piece):
        seen.append(piece)
        raise OSError("gone")

    engine.submit(asked((5, 6), 100, ignore_eos=True), deliver)
    assert Client(engine, asked((7, 8), 5)).wait()
    assert engine.drain(30)
    assert [piece.finish for piece in seen][-1] == "cancelled"
    assert sum(len(piece.tokens) for piece in seen) < 100
    assert "gone" in caplog.text


def test_the_queue_is_bounded(opened):
    engine = opened(start=False, queue=8)
    clients = []
    with pytest.raises(Busy, match=r"Found: .* wait") as caught:
        for _ in range(9):
            clients.append(Client(engine, asked((5,), 2, blend={"a": 1.0})))
    assert len(clients) == 6  # a blend leaves room for others
    assert 1 <= caught.value.retry_after <= 60
    clients.append(Client(engine, asked((5,), 2)))
    engine.start()
    for client in clients:
        client.wait()


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ((), {}, "prompt of 0 tokens"),
        ((5,) * 256, {}, "prompt of 256 tokens"),
        ((5, 259), {}, "ids from 0 to 258"),
        ((-1,), {}, "ids from 0"),
        ((5,), {"tokens": 0}, "max_tokens"),
        ((5,), {"schema": {"type": "nonsense"}}, "schema"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(prompt, options, says, opened):
    engine = opened(start=False)
    with pytest.raises(RequestError, match=says):
        Client(engine, asked(prompt, **options))
    assert engine.waiting == 0


def test_an_answer_ends_where_the_length_does(opened):
    engine = opened(length=32)
    client = Client(engine, asked((5,) * 20, 100, ignore_eos=True)).wait()
    assert (client.finish, len(client.tokens)) == ("length", 12)


def test_drain_finishes_what_was_taken_and_refuses_what_comes(opened):
    engine = opened(rows=2)
    assert engine.ready
    clients = [Client(engine, asked(ask, 10)) for ask in prompts(6, 20)]
    assert engine.drain(60)
    assert not engine.ready
    assert all(client.over.is_set() for client in clients)
    with pytest.raises(Busy):
        Client(engine, asked((5,)))


def test_drain_gives_up_in_time_and_close_cancels_the_rest(opened):
    engine = opened(bank=Recorder(slow=["cold"]), rows=1)
    waits = Client(engine, asked((5,), blend={"cold": 1.0}))
    assert not engine.drain(0.05)
    engine.close()
    assert waits.wait().finish == "cancelled"
    assert not any(one.name == "veneer-engine" for one in threading.enumerate())


def test_close_before_start_ends_what_waits(opened):
    engine = opened(start=False)
    client = Client(engine, asked((5,)))
    engine.close()
    assert client.wait().finish == "cancelled"


def test_the_observer_is_told(opened):
    told = []

    class Observer:
        def __getattr__(self, name):
            return lambda *values: told.append((name, *values))

    engine = opened(observer=Observer())
    Client(engine, asked((5, 6, 7), 40, blend={"a": 1.0}, ignore_eos=True)).wait()
    assert engine.drain(10)
    engine.close()
    names = [one[0] for one in told]
    assert [
        names.index(name) for name in ("started", "looked_up", "tokens", "first_token", "finished")
    ] == [0, 1, 2, 3, len(names) - 1]
    assert ("looked_up", {"a": 1.0}, 3, 0) in told
    assert sum(one[2] for one in told if one[0] == "tokens") == 3
    assert sum(one[3] for one in told if one[0] == "tokens") == 40
    assert told[-1][1:3] == ({"a": 1.0}, "length")
    assert told[-1][3] > 0


def test_an_engine_without_work_gives_memory_back_once(opened, monkeypatch):
    from veneer.serve import engine as module

    given = []
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(module, "return_unused_memory", lambda: given.append(1))
    engine = opened()
    for count in (1, 2):
        Client(engine, asked((5,) * 3, 2)).wait()
        until = time.monotonic() + 10
        while len(given) < count and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(given) == count


def test_200_requests_that_vanish_leave_nothing(opened):
    bank = Recorder()
    engine = opened(bank=bank, rows=5, prefill=24, queue=300)
    draw = random.Random(0)
    clients = []
    for number, ask in enumerate(prompts(200, 40)):
        blend = {draw.choice("abc"): 1.0}
        clients.append(
            Client(
                engine,
                asked(ask, draw.randint(1, 30), blend=blend, ignore_eos=True, id=str(number)),
            )
        )
        if draw.random() < 0.7:
            draw.choice(clients).ticket.cancel()
        if draw.random() < 0.2:
            time.sleep(0.002)
    for client in clients:
        client.wait()
    assert {client.finish for client in clients} == {"cancelled", "length"}
    assert engine.drain(10)
    assert not bank.held
    assert (engine.running, engine.waiting) == (0, 0)
    assert clean(engine)
    assert (len(engine._scheduler._owner_shares), engine._scheduler._adapter_shares) == (0, {})
    engine.close()
    assert not any(one.name == "veneer-engine" for one in threading.enumerate())


def test_a_stop_token_is_the_last_of_its_answer(opened):
    engine = opened()
    first = Client(engine, asked((5, 6, 7), 12, ignore_eos=True)).wait()
    place = next(i for i in range(2, 12) if first.tokens[i] not in first.tokens[:i])
    cut = Client(
        engine, asked((5, 6, 7), 12, ignore_eos=True, stop_tokens=frozenset({first.tokens[place]}))
    ).wait()
    assert cut.tokens == first.tokens[: place + 1]
    assert cut.finish == "stop"


def test_a_step_is_taken_within_the_turn(opened):
    turn = threading.Lock()
    engine = opened(model_lock=turn)
    with turn:
        client = Client(engine, asked((5, 6, 7), 2))
        time.sleep(0.1)
        assert not client.pieces
    assert client.wait().tokens


def test_an_engine_that_closes_tells_those_that_run_on_slots_that_have_grown(opened):
    engine = opened(rows=4)
    running = [Client(engine, replace(asked(ask, 100), sampling=replace(asked(ask, 100).sampling, ignore_eos=True)))
               for ask in prompts(3, 4)]  # fmt: skip
    pieces = threading.Event()
    real = engine._decode

    def decode(states):
        logits = real(states)
        if all(state.length > 40 for state in states):
            pieces.set()
        return logits

    engine._decode = decode
    assert pieces.wait(60)
    engine.close()
    assert {client.wait().finish for client in running} == {"cancelled"}
