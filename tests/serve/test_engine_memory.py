"""Cached prefixes, the budget of keys and values, and prompts beside running rows: what an engine
answers is what it answers without them."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from tests.support.serving import Client, Recorder, alone, asked, make, prompts
from tests.support.tiny import tiny_tokenizer

from veneer.errors import ConfigError
from veneer.models.decode.attention import BLOCK
from veneer.models.decode.slots import MIN_COLUMNS, Slots
from veneer.serve.engine import Engine
from veneer.serve.memory import MAX_FINISHED_ROWS
from veneer.serve.prefill_budget import TOKEN_MULTIPLE
from veneer.serve.requests import RequestError
from veneer.serve.scheduler import PROMPT_TOKEN_COST

#: bytes of a token of the tiny Llama, in both layers
TOKEN = 2 * 2 * (8 + 8) * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def opened(tokenizer):
    """Makes engines, which are stepped by hand unless they are started, and closes them."""
    engines = []

    def make_engine(name="llama", *, start=False, **options) -> Engine:
        engines.append(Engine(make(name), tokenizer, **options))
        if start:
            engines[-1].start()
        return engines[-1]

    yield make_engine
    for engine in engines:
        engine.close()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def live_bytes(engine) -> int:
    """Bytes of the tensors that hold keys and values, counted one by one."""
    memory = engine._batch.memory
    layers = [layer for each in memory.slots.classes.values() for layer in each.layers]
    stored = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    blocks = [block.data for block in memory.prefixes._blocks_by_use] if memory.prefixes else []
    return sum(tensor.untyped_storage().nbytes() for tensor in (*stored, *blocks))


@torch.inference_mode()
def work_off(engine, clients, watch=lambda: None) -> None:
    """Step until all clients have their answers."""
    for _ in range(5000):
        if all(client.over.is_set() for client in clients):
            return
        engine.step()
        watch()
    raise AssertionError("the engine does not get on")


def cached_tokens(client) -> int:
    return client.pieces[-1].cached


def logprobs(client) -> list[float]:
    return [token.logprob for piece in client.pieces for token in piece.tokens]


def ids(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(3, 259) for _ in range(length))


# ----------------------------------------------------------------------------------------------
# cached prefixes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "mistral"])
def test_in_float32_answers_are_those_without_a_cache(name, opened, one_thread):
    """Bit for bit, where prompts that begin alike are asked one after the other on one thread: all
    calls for them have a multiple of 16 tokens."""
    draw, stems = random.Random(1), [ids(70, seed) for seed in range(3)]
    asks = []
    for number in range(24):
        stem, rest = draw.choice(stems)[: draw.randint(10, 70)], ids(draw.randint(1, 40), number)
        asks.append(asked((*stem, *rest), 12, logprobs=0, temperature=1.0, seed=number))
    answers, hits = {}, {}
    for prefix_cache in (False, True):
        engine = opened(name, prefix_cache=prefix_cache)
        clients = []
        for ask in asks:
            clients.append(Client(engine, ask))
            work_off(engine, clients)
        answers[prefix_cache] = [(client.tokens, logprobs(client)) for client in clients]
        hits[prefix_cache] = sum(map(cached_tokens, clients))
    assert hits[False] == 0
    assert hits[True] > 300
    for (tokens, chances), (same_tokens, same_chances) in zip(*answers.values(), strict=True):
        assert tokens == same_tokens
        assert chances == same_chances


@pytest.mark.parametrize("length", [17, 33, 100, 224])
def test_a_prompt_is_computed_once(length, opened):
    engine, prompt = opened(), ids(length)
    computed, charge = [], engine._scheduler.charge

    def charging(state, tokens):
        computed.append(tokens)
        charge(state, tokens)

    engine._scheduler.charge = charging
    first, second = (Client(engine, asked(prompt, 20)) for _ in range(2))
    work_off(engine, [first, second])
    assert second.tokens == first.tokens == alone(make("llama"), prompt, 20)
    assert (cached_tokens(first), cached_tokens(second)) == (0, (length - 1) // BLOCK * BLOCK)
    prompt_tokens = sum(computed) - len(first.tokens) - len(second.tokens)
    assert prompt_tokens == PROMPT_TOKEN_COST * (length + length - cached_tokens(second))


def test_a_conversation_goes_on_behind_its_answers(opened):
    engine, prompt = opened(), ids(50)
    for _ in range(3):
        client = Client(engine, asked(prompt, 20, ignore_eos=True))
        work_off(engine, [client])
        plain = opened(prefix_cache=False)
        wanted = Client(plain, asked(prompt, 20, ignore_eos=True))
        work_off(plain, [wanted])
        assert client.tokens == wanted.tokens
        # the last token of an answer is not computed, and 8 are new
        assert cached_tokens(client) == (0 if len(prompt) == 50 else len(prompt) - 9)
        prompt = (*prompt, *client.tokens, *ids(8, len(prompt)))


def test_choices_of_one_prompt_compute_it_once(opened):
    engine, prompt = opened(rows=8), ids(120)
    clients = [
        Client(engine, asked(prompt, 10, temperature=1.0, seed=number)) for number in range(8)
    ]
    work_off(engine, clients)
    assert [cached_tokens(client) for client in clients] == [0, *[112] * 7]


def test_no_key_sees_what_another_has_asked_unless_they_share_a_salt(opened):
    engine, prompt = opened(), ids(100)

    def ask(owner, salt=None):
        request = replace(asked(prompt, 3), owner=owner, cache_salt=salt)
        client = Client(engine, request)
        work_off(engine, [client])
        return cached_tokens(client)

    assert ask("alice") == 0
    assert ask("bob") == 0
    assert (ask("alice"), ask("bob")) == (100, 100)
    assert ask("", "alice") == ask("alice", "alice") - 100 == 0  # a salt is no key's name
    assert ask("alice", "secret") == 0
    assert ask("bob", "secret") == 100
    assert ask("bob", "other") == 0


def test_no_adapter_sees_what_another_has_computed(opened):
    bank, prompt = Recorder(), ids(100)
    engine = opened(bank=bank)

    def ask(blend):
        client = Client(engine, asked(prompt, 3, blend=blend))
        work_off(engine, [client])
        return cached_tokens(client)

    blends = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5}, {"a": 0.5, "b": 0.5}]
    assert [ask(blend) for blend in blends] == [0] * 5
    assert [ask(blend) for blend in blends] == [96] * 5  # of blocks: four other rows came after
    assert ask({"a": 0.5, "b": 0.5}) == 100
    assert ask({"a": 1.0, "b": 0.0}) == 100
    del bank.adapters["a"]  # and another one under its name
    before = engine._batch.memory.budget.prefix_bytes
    assert [ask(blend) for blend in blends[:3]] == [96, 0, 100]
    assert engine._batch.memory.budget.prefix_bytes < before


def test_what_is_not_finite_is_nobodys_beginning(opened):
    engine, prompt = opened(), ids(60)
    norm = engine._forward.model.model.layers[0].input_layernorm.weight
    sound = norm.detach().clone()
    norm.data.fill_(float("inf"))
    broken = Client(engine, asked(prompt, 3))
    work_off(engine, [broken])
    assert broken.finish == "error"
    norm.data.copy_(sound)
    client = Client(engine, asked(prompt, 3))
    work_off(engine, [client])
    assert (client.tokens, cached_tokens(client)) == (alone(make("llama"), prompt, 3), 0)


@pytest.fixture
def copied(monkeypatch):
    """The numbers of the blocks that were copied into rows."""
    counts, write = [], Slots.write_blocks

    def counting(slots, row, blocks):
        counts.append(len(blocks))
        write(slots, row, blocks)

    monkeypatch.setattr(Slots, "write_blocks", counting)
    return counts


def test_a_conversation_continues_the_row_of_its_last_turn(opened, copied):
    engine, prompt = opened(), ids(40)
    for turn in range(3):
        client = Client(engine, asked(prompt, 10, ignore_eos=True))
        work_off(engine, [client])
        assert client.tokens == alone(make("llama"), prompt, 10)
        assert (cached_tokens(client) > 0) == (turn > 0)
        prompt = (*prompt, *client.tokens, *ids(5, turn))
    assert copied == [0]  # by the first turn, for which nothing was cached
    again = Client(engine, asked(ids(40), 10, ignore_eos=True))  # behind longer rows
    work_off(engine, [again])
    assert (cached_tokens(again), copied) == (39, [0])
    assert again.tokens == alone(make("llama"), ids(40), 10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "mistral"])
def test_the_same_prompt_again_is_not_computed(name, opened, monkeypatch):
    engine, prompt, fills = opened(name), ids(70), []
    forward = engine._forward
    for call in ("fill", "together"):
        compute = getattr(forward, call)

        def counting(*args, compute=compute, **options):
            fills.append(compute)
            return compute(*args, **options)

        monkeypatch.setattr(forward, call, counting)
    sampling = {"temperature": 1.0, "seed": 5, "logprobs": 3, "presence_penalty": 0.5}
    clients = []
    for tokens in (12, 12, 1, 20):
        clients.append(Client(engine, asked(prompt, tokens, **sampling)))
        work_off(engine, clients)
    first, again, shorter, longer = clients
    assert len(fills) == 1
    assert again.tokens == first.tokens == longer.tokens[:12]
    assert logprobs(again) == logprobs(first)  # bit for bit, on any number of threads
    assert shorter.tokens == first.tokens[:1]
    assert [cached_tokens(client) for client in (first, again, shorter)] == [0, 70, 70]
    greedy = Client(engine, asked(prompt, 12))
    work_off(engine, [greedy])
    assert greedy.tokens == alone(make(name), prompt, 12)
    scored = Client(engine, asked(prompt, 12, prompt_logprobs=0))
    work_off(engine, [scored])
    assert (cached_tokens(scored), len(fills)) == (0, 2)
    plain = opened(name, prefix_cache=False)
    assert not plain._batch.memory.finished_rows
    wanted = Client(plain, asked(prompt, 12, **sampling))
    work_off(plain, [wanted])
    assert wanted.tokens == first.tokens


@torch.inference_mode()
def test_an_interrupted_answer_keeps_the_logits_behind_its_own_prompt(opened):
    """Even where another request's prompt was all that it has when it starts again."""
    engine, prompt = opened(rows=4), ids(40)
    answer = alone(make("llama"), prompt, 12)
    others = [Client(engine, asked((*prompt, *answer[:3]), 3)) for _ in range(2)]
    work_off(engine, others)
    client = Client(engine, asked(prompt, 12))
    while len(client.tokens) < 3:
        engine.step()
    (state,) = engine._batch.running
    engine._batch.remove(state)  # as where memory runs out
    state.length = 0
    engine._admission.put_back(state)
    work_off(engine, [client])
    assert client.tokens == answer
    again = Client(engine, asked(prompt, 12))
    work_off(engine, [again])
    assert (again.tokens, cached_tokens(again)) == (answer, len(prompt))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ids(60, 1)},
        {"prompt": (*ids(60), *ids(100, 1))},  # a larger row
        {"owner": "bob"},
        {"cache_salt": "secret"},
        {"blend": {"a": 1.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_request_continues_the_row_of_another_s_tokens(changes, opened, copied):
    engine = opened(bank=Recorder(), rows=4)
    request = asked(ids(60), 3)
    first = Client(engine, request)
    work_off(engine, [first])
    (finished_row,) = engine._batch.memory.finished_rows
    assert finished_row.ids == [*request.prompt, *first.tokens[:-1]]
    other = replace(request, **changes)
    client = Client(engine, other)
    work_off(engine, [client])
    assert client.tokens == alone(make("llama"), other.prompt, 3)
    assert len(copied) == len(engine._batch.memory.finished_rows) == 2


def test_rows_of_the_last_requests_stay(opened, copied):
    engine, conversations = opened(rows=4), [ids(60, seed) for seed in range(MAX_FINISHED_ROWS + 1)]
    running = Client(engine, asked(ids(20, 9), 150, ignore_eos=True))  # beside the others
    for turn, copies in enumerate((MAX_FINISHED_ROWS + 2, MAX_FINISHED_ROWS + 3)):
        for number in range(MAX_FINISHED_ROWS + 1)[:: 1 - 2 * turn]:
            client = Client(engine, asked(conversations[number], 3, ignore_eos=True))
            work_off(engine, [client])
            assert client.tokens == alone(make("llama"), conversations[number], 3)
            conversations[number] = (*conversations[number], *client.tokens, 5)
        assert len(copied) == copies  # in the second turn by the first conversation alone
    assert len(engine._batch.memory.finished_rows) == MAX_FINISHED_ROWS
    work_off(engine, [running])
    assert running.tokens == alone(make("llama"), ids(20, 9), 150)


def test_finished_rows_give_way_within_the_budget(opened):
    engine = opened(cache_memory=budget_for(3), length=250)
    for seed, length in enumerate((100, 90, 100, 200, 20)):
        client = Client(engine, asked(ids(length, seed), 30, ignore_eos=True))
        work_off(engine, [client])
        assert client.tokens == alone(make("llama"), ids(length, seed), 30)


def test_a_finished_row_holds_no_adapter_in_memory(opened):
    bank = Recorder()
    engine = opened(bank=bank)
    work_off(engine, [Client(engine, asked(ids(60), 3, blend={"a": 1.0}))])
    adapter = weakref.ref(bank.adapters.pop("a"))
    gc.collect()
    assert engine._batch.memory.finished_rows
    assert adapter() is None
    with torch.inference_mode():
        engine.step()
    assert not engine._batch.memory.finished_rows


# ----------------------------------------------------------------------------------------------
# the budget


def budget_for(rows: int) -> int:
    """Bytes that hold so many rows of the smallest class, with the tensor that is copied as they
    grow."""
    return rows * MIN_COLUMNS * TOKEN + rows * MIN_COLUMNS * TOKEN // 4


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_200_requests_over_the_budget_end_right_and_never_exceed_it(prefix_cache, opened):
    """Prompts and answers of up to twice the smallest class, many of which begin alike."""
    model, limit, draw = make("llama"), budget_for(3), random.Random(0)
    stems = [ids(90, seed) for seed in range(3)]
    asks = []
    for number in range(40):
        prompt = (*draw.choice(stems)[: draw.randint(1, 90)], *ids(draw.randint(1, 30), number))
        asks.append((prompt, draw.randint(1, 24)))
    engine = opened(
        rows=12, length=250, prefill=64, queue=1000, cache_memory=limit, prefix_cache=prefix_cache
    )
    clients = [Client(engine, asked(prompt, count)) for prompt, count in asks * 5]

    def watch():
        budget = engine._batch.memory.budget
        assert live_bytes(engine) == engine.cache_bytes == budget.row_bytes + budget.prefix_bytes
        assert live_bytes(engine) + budget.reserved_bytes <= limit

    work_off(engine, clients, watch)
    wanted = [alone(model, *ask) for ask in asks]
    assert [client.tokens for client in clients] == wanted * 5


def test_an_answer_whose_row_was_taken_goes_on_where_it_was(opened):
    """Rows that outgrow the memory that they began with: the latest gives way, and no token is
    repeated or lost, whatever its seed."""
    preempted = []

    class Observer:
        def preempted(self, blend):
            preempted.append(blend)

        def __getattr__(self, name):
            return lambda *values: None

    requests = [
        asked(ids(20, number), 150, temperature=1.0, seed=number, ignore_eos=True)
        for number in range(6)
    ]
    free = opened(rows=6, cache_memory=2**24)
    wanted = [Client(free, request) for request in requests]
    work_off(free, wanted)
    engine = opened(rows=6, cache_memory=budget_for(7), observer=Observer())
    clients = [Client(engine, request) for request in requests]
    work_off(engine, clients)
    assert len(preempted) >= 2
    assert [client.tokens for client in clients] == [client.tokens for client in wanted]
    assert [client.text for client in clients] == [client.text for client in wanted]
    assert clients[0].pieces[-1].finish == "length"


def test_the_row_that_started_first_is_never_taken(opened):
    engine = opened(rows=4, cache_memory=budget_for(4), prefix_cache=False)
    clients = [Client(engine, asked(ids(20, i), 200, ignore_eos=True)) for i in range(4)]
    over = []

    def watch():
        over.extend(c for c in clients if c.over.is_set() and c not in over)

    work_off(engine, clients, watch)
    assert over == clients


@torch.inference_mode()
def test_a_preempted_request_survives_a_failure_of_the_next_attempt(opened, monkeypatch):
    engine = opened(rows=2)
    clients = [Client(engine, asked(ids(20, number), 30)) for number in range(2)]
    while not all(client.tokens for client in clients):
        engine.step()
    outcomes = Mock(side_effect=[False, torch.OutOfMemoryError("on purpose")])
    monkeypatch.setattr(engine._batch.memory, "widen", outcomes)
    engine._step_or_restart()
    work_off(engine, clients)
    assert clients[0].error == "OutOfMemoryError: on purpose"
    assert clients[1].tokens == alone(make("llama"), ids(20, 1), 30)


def test_a_long_row_costs_short_ones_nothing(opened):
    engine = opened(rows=9, prefill=32)
    short = [Client(engine, asked(ids(10, number), 80, ignore_eos=True)) for number in range(8)]
    with torch.inference_mode():
        engine.step()
    long = Client(engine, asked(ids(240), 5))
    widths = set()

    def watch():
        for size_class in engine._batch.memory.slots.classes.values():
            widths.update((len(row.size_class.rows), row.columns) for row in size_class.rows)

    work_off(engine, [*short, long], watch)
    assert max(count for count, columns in widths if columns > MIN_COLUMNS) == 1
    assert long.tokens == alone(make("llama"), ids(240), 5)


def test_50_tiny_requests_over_the_budget(opened):
    engine = opened(rows=16, cache_memory=budget_for(2), start=True)
    asks = prompts(50, 6, seed=5)
    clients = [Client(engine, asked(ask, 3)) for ask in asks]
    model = make("llama")
    assert [client.wait().tokens for client in clients] == [alone(model, ask, 3) for ask in asks]


def test_a_request_that_never_fits_is_refused_at_once(opened, caplog):
    engine = opened(cache_memory=budget_for(1))
    assert engine.length == MIN_COLUMNS
    assert "hold rows of 128 tokens, not of 256" in caplog.text
    with pytest.raises(RequestError, match="a prompt of 130 tokens"):
        Client(engine, asked(ids(130)))
    client = Client(engine, asked(ids(120), 100, ignore_eos=True))
    work_off(engine, [client])
    assert (client.finish, len(client.tokens)) == ("length", 8)
    with pytest.raises(ConfigError, match="--cache-memory"):
        opened(cache_memory=1000)


def test_memory_goes_back_when_nobody_uses_it(opened, monkeypatch):
    from veneer.serve import engine as module

    monkeypatch.setattr(module, "IDLE_SECONDS", 0.0)
    engine = opened(rows=4)
    clients = [Client(engine, asked(ids(number * 40 + 5), 5)) for number in range(4)]
    work_off(engine, clients)
    finished_rows = engine._batch.memory.finished_rows
    in_use = [row for each in engine._batch.memory.slots.classes.values() for row in each.rows]
    assert {id(row) for row in in_use} == {id(each.row) for each in finished_rows}
    with torch.inference_mode():
        engine.step()
    assert len(finished_rows) == 4
    assert live_bytes(engine) == engine.cache_bytes > 0
    monkeypatch.setattr(module, "PREFIX_IDLE_SECONDS", 0.0)
    with torch.inference_mode():
        engine.step()
    assert live_bytes(engine) == engine.cache_bytes == 0


# ----------------------------------------------------------------------------------------------
# prompts beside running rows


def test_long_prompts_take_turns_beside_running_rows(opened):
    """Each step computes a piece of one of them, and none waits for the whole of another."""
    engine = opened(rows=8, gap=1e-9)
    running = Client(engine, asked(ids(5), 200, ignore_eos=True))
    with torch.inference_mode():
        engine.step()
    calls, together = [], engine._forward.together

    def computing(slots, rows, tokens, lengths, pieces):
        calls.append([(id(row), len(piece)) for row, _, piece in pieces])
        return together(slots, rows, tokens, lengths, pieces)

    engine._forward.together = computing
    long = [Client(engine, asked(ids(208, number), 2)) for number in range(3)]
    before = len(running.tokens)
    work_off(engine, long)
    assert all(len(call) == 1 and call[0][1] <= TOKEN_MULTIPLE for call in calls)
    assert len({call[0][0] for call in calls[:3]}) == 3
    assert len(running.tokens) - before >= len(calls)  # a token between any two of them
    model = make("llama")
    assert [c.tokens for c in long] == [alone(model, ids(208, n), 2) for n in range(3)]


def test_a_short_prompt_does_not_wait_for_a_long_one(opened):
    engine = opened(rows=8, gap=1e-9)
    Client(engine, asked(ids(5), 200, ignore_eos=True))
    with torch.inference_mode():
        engine.step()
    long, order = Client(engine, asked(ids(230), 2)), []
    with torch.inference_mode():
        engine.step()
    short = Client(engine, asked(ids(12, 1), 2))
    for name, client in (("long", long), ("short", short)):
        client.on_piece = lambda piece, name=name: order.append(name)
    work_off(engine, [long, short])
    assert order[0] == "short"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_prompts_beside_running_rows_are_answered_as_alone(name, opened):
    """Each in pieces of a size of its own, in the calls of rows that come and go."""
    model, asks = make(name), prompts(24, 120, seed=3)
    wanted = [alone(model, ask, 12) for ask in asks]
    for gap in (1e-9, 10.0, None):
        engine = opened(name, rows=6, prefill=64, gap=gap)
        clients = [Client(engine, asked(ask, 12)) for ask in asks]
        work_off(engine, clients)
        assert [client.tokens for client in clients] == wanted


def test_a_failure_of_prompts_beside_rows_is_theirs_alone(opened, caplog):
    engine = opened(rows=4, gap=10.0)
    running = Client(engine, asked(ids(5), 30, ignore_eos=True))
    with torch.inference_mode():
        engine.step()
    fill = engine._forward.fill

    def failing(slots, rows, pieces, *starts):
        if len(pieces[0]) == 12:
            raise RuntimeError("out of luck")
        return fill(slots, rows, pieces, *starts)

    def together(*args):
        raise RuntimeError("out of luck together")

    engine._forward.fill, engine._forward.together = failing, together
    sick = Client(engine, asked(ids(12, 1), 5))
    work_off(engine, [running, sick])
    assert (running.finish, sick.finish) == ("length", "error")
    assert "out of luck together" in caplog.text
    plain = opened()
    wanted = Client(plain, asked(ids(5), 30, ignore_eos=True))
    work_off(plain, [wanted])
    assert running.tokens == wanted.tokens


# ----------------------------------------------------------------------------------------------
# pieces


def test_each_token_comes_when_it_is_there(opened):
    """Also one that is a part of a character, or may be the beginning of a stop string."""
    engine = opened()
    client = Client(engine, asked(ids(9), 40, ignore_eos=True, stop=("no such text",)))
    work_off(engine, [client])
    assert [len(piece.tokens) for piece in client.pieces] == [1] * 40
    assert any(not piece.text for piece in client.pieces)
    assert client.text == tiny_tokenizer().decode(client.tokens, skip_special_tokens=True)
