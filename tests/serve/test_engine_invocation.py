"""Requests for adapters with invocation tokens: answered as by ``generate``, and what stands before
the invocation is computed once for the base and all of them."""

from __future__ import annotations

from dataclasses import replace

import httpx
import peft
import pytest
import torch
from tests.support.api_server import listening
from tests.support.service import make_adapter, open_service
from tests.support.serving import Client, alone, asked, make, prompts
from tests.support.tiny import tiny_model, tiny_tokenizer, write_tiny

import veneer
from veneer.errors import ConfigError, SelectionError
from veneer.models.decode.attention import BLOCK
from veneer.models.decode.slots import Slots
from veneer.serve.engine import Engine

#: the adapters, and the tokens that invoke them; none for one that acts on every token
TOKENS = {"a": (7, 8), "b": (9,), "plain": ()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {}
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        model = make("llama")
        targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
        config = veneer.LoraConfig(rank=2 + seed, targets=targets, invocation_tokens=tokens)
        handle = veneer.attach(model, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        paths[name] = handle.save(tmp_path_factory.mktemp("adapters") / name)
    return paths


@pytest.fixture(scope="module")
def models(folders):
    loaded = {None: make("llama")}
    for name, path in folders.items():
        loaded[name] = make("llama")
        veneer.load(loaded[name], path)
    return loaded


@pytest.fixture
def serving(folders):
    opened = []

    def open_engine(**options):
        model = make("llama")
        bank = veneer.Bank(model)
        for name, path in folders.items():
            bank.register(name, path)
        engine = Engine(model, tiny_tokenizer(), bank, **options)
        opened.append((engine, bank))
        engine.start()
        return engine, bank

    yield open_engine
    for engine, bank in opened:
        engine.close()
        assert not any(entry.users for entry in bank.status())
        bank.close()


def invoke(prompt, start, tokens):
    """A prompt with these tokens from ``start`` on, and none of them elsewhere."""
    prompt = [token if token > 9 else token + 20 for token in prompt]
    return (*prompt[:start], *tokens, *prompt[start:])


def ask(engine, prompt, name=None, tokens=6, **fields):
    request = asked(prompt, tokens, blend={name: 1.0} if name else {})
    return Client(engine, replace(request, **fields))


@pytest.mark.parametrize("prefill", [5, 64])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_mixed_requests_are_answered_as_by_generate(serving, models, prefill, prefix_cache):
    engine, _ = serving(rows=4, prefill=prefill, prefix_cache=prefix_cache)
    asks = []
    for number, prompt in enumerate(prompts(24, 45)):
        name = [*TOKENS, None][number % 4]
        start = [0, len(prompt) // 2, len(prompt)][number % 3]
        tokens = TOKENS.get(name, ()) if number % 5 else ()
        asks.append((invoke(prompt, start, tokens), name))
    expected = [alone(models[name], prompt, 6) for prompt, name in asks]
    base = [alone(models[None], prompt, 6) for prompt, _ in asks]
    assert sum(a != b for a, b in zip(expected, base, strict=True)) > 8  # adapters show
    clients = [ask(engine, prompt, name) for prompt, name in asks]
    assert [client.wait().tokens for client in clients] == expected


def test_a_switch_of_adapter_costs_the_tokens_from_its_invocation_on(serving, models):
    engine, _ = serving()
    conversation = invoke(prompts(1, 120, seed=2)[0] * 120, 0, ())[:120]
    answer = tuple(ask(engine, conversation).wait().tokens)
    longer = (*conversation, *answer)
    before, whole = len(longer), len(longer) // BLOCK * BLOCK
    # at first in blocks, as the conversation needs a longer row now; then in the row of the last
    # turn; then also the block in which the invocation of "a" begins
    for name, cached in (("a", whole), ("b", before), (None, before), ("a", whole + BLOCK)):
        prompt = (*longer, *TOKENS.get(name, ()), 30, 31)
        client = ask(engine, prompt, name).wait()
        assert client.tokens == alone(models[name], prompt, 6), name
        assert client.pieces[-1].cached == cached, name
    # the base reads nothing of what an adapter computed, nor does an adapter of another's
    prompt = (*longer, *TOKENS["a"], *range(40, 90))
    for name, expected in (("a", before + len(TOKENS["a"])), (None, before), ("plain", 0)):
        client = ask(engine, prompt, name).wait()
        assert (client.pieces[-1].cached, client.tokens) == (
            expected, alone(models[name], prompt, 6),
        )  # fmt: skip
    client = ask(engine, prompt, "a").wait()
    assert client.pieces[-1].cached == (len(prompt) - 1) // BLOCK * BLOCK
    assert client.tokens == alone(models["a"], prompt, 6)


def test_a_switch_continues_the_row_of_the_base(serving, models, monkeypatch):
    copies, write = [], Slots.write_blocks
    monkeypatch.setattr(Slots, "write_blocks", lambda *args: copies.append(write(*args)))
    engine, _ = serving()
    prompt = invoke(range(20, 90), 60, TOKENS["a"])
    for name, cached in ((None, 0), ("a", 60)):
        client = ask(engine, prompt, name).wait()
        assert (client.tokens, client.pieces[-1].cached) == (
            alone(models[name], prompt, 6), cached,
        )  # fmt: skip
    assert len(copies) == 1  # of no block, for the base


def test_a_later_invocation_begins_anew(serving, models):
    """The same tokens from another invocation on: no block of the first is taken for them."""
    engine, _ = serving()
    first = invoke(range(20, 60), 4, TOKENS["a"])
    assert ask(engine, first, "a").wait().tokens == alone(models["a"], first, 6)
    second = (*first, *TOKENS["a"], 33)
    client = ask(engine, second, "a").wait()
    assert client.tokens == alone(models["a"], second, 6)
    assert client.pieces[-1].cached == 0
    third = (*first, 33, 34)
    client = ask(engine, third, "a").wait()
    assert client.tokens == alone(models["a"], third, 6)
    assert client.pieces[-1].cached == len(first)


def test_another_key_s_beginning_is_not_shared(serving):
    engine, _ = serving()
    prompt = invoke(range(20, 90), 70, TOKENS["a"])
    ask(engine, prompt[:70], owner="alice").wait()
    cached = [
        ask(engine, prompt, "a", owner=owner).wait().pieces[-1].cached for owner in ("bob", "alice")
    ]
    assert cached == [0, 70]
    ask(engine, prompt[:70], owner="alice", cache_salt="ours").wait()
    assert ask(engine, prompt, "b", owner="bob", cache_salt="ours").wait().pieces[-1].cached == 70


def test_a_request_waits_for_a_beginning_that_another_computes(serving, models):
    engine, _ = serving(rows=4, prefill=16)
    prompt = invoke(range(20, 100), 80, ())
    asks = [((*prompt, *TOKENS.get(name, ()), 21), name) for name in (None, "a", "b", "a")]
    clients = [ask(engine, *each) for each in asks]
    for client, (prompt, name) in zip(clients, asks, strict=True):
        assert client.wait().tokens == alone(models[name], prompt, 6)


def test_a_row_that_gives_its_memory_back_is_computed_again(serving, models):
    engine, _ = serving()
    token = sum(form.token_bytes for form in engine._forward.forms)
    engine, _ = serving(rows=3, cache_memory=token * 600, prefix_cache=False)
    asks = [(invoke(range(20, 140), start, TOKENS["a"]), "a") for start in (30, 60, 120)]
    clients = [ask(engine, prompt, name, tokens=40) for prompt, name in asks]
    for client, (prompt, name) in zip(clients, asks, strict=True):
        assert client.wait().tokens == alone(models[name], prompt, 40)


def test_scores_of_a_prompt_are_those_of_the_model(serving, models):
    engine, _ = serving()
    for start in (0, 3, 40):
        prompt = invoke(range(20, 60), start, TOKENS["a"])
        request = asked(prompt, 2, blend={"a": 1.0}, prompt_logprobs=1)
        client = Client(engine, request).wait()
        (scores,) = [piece.prompt for piece in client.pieces if piece.prompt]
        with torch.inference_mode():
            logits = models["a"](torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        assert [score.logprob for score in scores[1:]] == pytest.approx(expected, abs=1e-3)
        assert client.tokens == alone(models["a"], prompt, 2)


def test_a_blend_and_plain_rows_of_a_bank_are_refused(serving):
    engine, bank = serving()
    client = Client(engine, asked((20, 7, 8), 3, blend={"a": 0.5, "plain": 0.5})).wait()
    assert (client.finish, client.pieces[-1].error_kind) == ("error", "bad_blend")
    assert "a blend of 'a', 'plain', of which one has invocation tokens" in client.error
    ids = torch.tensor([[20, 7, 8]])
    with pytest.raises(SelectionError, match="'a' in a bank's rows, which has invocation tokens"):
        bank.generate(ids, adapters=["a"], max_new_tokens=2)
    assert ask(engine, (20, 7, 8), "a").wait().finish == "length"


@pytest.mark.filterwarnings("ignore")  # PEFT's own, and that its adapters carry no fingerprint
def test_a_server_serves_folders_of_either_library(tmp_path):
    base, adapters = write_tiny(tmp_path / "base"), tmp_path / "adapters"
    tokenizer = tiny_tokenizer()
    tokens = {name: tokenizer.encode(f"<{name}>") for name in ("ours", "theirs")}
    targets = ["q_proj", "v_proj", "down_proj"]
    make_adapter(adapters / "ours", 1, rank=2, targets=targets, invocation_tokens=tokens["ours"])
    config = peft.LoraConfig(
        target_modules=targets, task_type="CAUSAL_LM", alora_invocation_tokens=tokens["theirs"]
    )
    model = peft.get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(adapters / "theirs")
    text = "a text that is asked about more than once. "
    with listening(open_service(base, adapters)) as (url, _), httpx.Client(base_url=url) as http:

        def complete(model, prompt, **fields):
            body = {"model": model, "prompt": prompt, "max_tokens": 5, "temperature": 0, **fields}
            answer = http.post("/v1/completions", json={**body, "return_token_ids": True})
            return answer.status_code, answer.json()

        status, answer = complete("tiny", text)
        assert status == 200
        for name, ids in tokens.items():
            _, answer = complete(name, f"{text}<{name}>")
            details = answer["usage"]["prompt_tokens_details"]
            assert details["cached_tokens"] == len(text)
            alone_model = tiny_model()
            veneer.load(alone_model, adapters / name)
            prompt = tokenizer.encode(text) + ids
            assert answer["choices"][0]["token_ids"] == alone(alone_model, prompt, 5)
        blend = {"ours": 0.5, "theirs": 0.5}
        status, answer = complete("tiny", text, adapters=blend)
        assert status == 400
        assert "of which one has invocation tokens" in answer["error"]["message"]
        assert answer["error"]["param"] == "adapters"


def test_an_attached_adapter_that_is_invoked_is_refused(models):
    with pytest.raises(ConfigError, match="calls use 'default', which has invocation tokens"):
        Engine(models["a"], tiny_tokenizer())


def test_a_bank_takes_an_attached_adapter_with_its_invocation(models, folders):
    model = make("llama")
    veneer.load(model, folders["a"], name="a")
    bank = veneer.Bank(model)
    bank.put("copy", folders["a"], "a")
    with bank.acquire({"copy": 1.0}).result() as lease:
        assert lease.uses[0][0].invocation_tokens == TOKENS["a"]
        ids = torch.tensor([[*TOKENS["a"], 20, 21]])
        with torch.inference_mode(), bank.rows([lease], invoked=True):
            logits = model(ids).logits
        with torch.inference_mode():
            expected = models["a"](ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    bank.close()
