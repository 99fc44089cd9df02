"""Penalties, biases and bans of tokens: the processed logits are those of a float64 reference, row by
row, and an engine that runs obeys them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.serving import Client, asked, make
from tests.support.tiny import tiny_tokenizer

from veneer.serve.engine import Engine
from veneer.serve.processors import processors_of
from veneer.serve.requests import RequestError, Sampling
from veneer.serve.sampling import Sampler, sample

SIZE, EOS = 30, (2,)


def sampler_of(prompt=(), sampled=(), **options) -> Sampler:
    """A row that has sampled some tokens."""
    sampling = Sampling(99, **options)
    row = Sampler(sampling, None, processors_of(sampling, prompt, EOS, SIZE, torch.device("cpu")))
    for token in sampled:
        row.accept(token)
    return row


def reference(logits, prompt, sampled, sampling: Sampling) -> list[float]:
    """The definition, token by token, in Python's float64."""
    scores = [float(value) for value in logits]
    for token in range(SIZE):
        banned = sampling.allowed_tokens is not None and token not in sampling.allowed_tokens
        for word in sampling.bad_words:
            behind = len(word) - 1
            same = tuple(sampled[len(sampled) - behind :]) == word[:-1]
            banned |= word[-1] == token and behind <= len(sampled) and same
        ends = {*EOS, *sampling.stop_tokens}
        banned |= token in ends and len(sampled) < sampling.min_tokens
        score = -math.inf if banned else scores[token] + sampling.logit_bias.get(token, 0.0)
        if token in {*prompt, *sampled}:
            penalty = sampling.repetition_penalty
            score = score * penalty if score < 0 else score / penalty
        count = sampled.count(token)
        score -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        scores[token] = score
    return scores


tokens = st.integers(0, SIZE - 1)


@settings(max_examples=120, deadline=None)
@given(
    prompt=st.lists(tokens, min_size=1, max_size=8),
    sampled=st.lists(tokens, max_size=8),
    options=st.fixed_dictionaries(
        {},
        optional={
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "repetition_penalty": st.floats(0.1, 10),
            "logit_bias": st.dictionaries(tokens, st.floats(-100, 100), max_size=5),
            "min_tokens": st.integers(0, 10),
            "stop_tokens": st.frozensets(tokens, max_size=3),
            "bad_words": st.lists(
                st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4, unique=True
            ).map(tuple),
            "allowed_tokens": st.frozensets(tokens, min_size=1, max_size=20),
        },
    ),
    seed=st.integers(0, 99),
)
def test_processed_logits_are_those_of_the_definition(prompt, sampled, options, seed):
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * 4
    row = sampler_of(prompt, sampled, **options)
    wanted = torch.tensor(reference(logits, prompt, sampled, row.sampling), dtype=torch.float64)
    found = row.process(logits.clone()).double()
    assert torch.equal(found.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    assert torch.allclose(found[finite], wanted[finite], rtol=1e-5, atol=1e-4)


def test_a_row_that_asks_for_nothing_has_no_processors_and_its_own_logits():
    assert sampler_of((1, 2)).processors == []
    logits = torch.randn(3, SIZE)
    kept = logits.clone()
    changed = sampler_of((5,), presence_penalty=2.0, temperature=0.0, sampled=(3,))
    plain = sampler_of(temperature=0.0)
    chosen = sample(logits, [plain, changed, plain])
    assert [chosen[0].token, chosen[2].token] == logits[[0, 2]].argmax(-1).tolist()
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_that_are_told_are_those_before_all_this(dtype):
    logits = torch.randn(1, SIZE).to(dtype)
    row = sampler_of(allowed_tokens=frozenset({4}), logprobs=1, temperature=0.0)
    (chosen,) = sample(logits, [row])
    assert chosen.token == 4
    assert abs(chosen.logprob - float(logits[0].float().log_softmax(-1)[4])) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_leaves_tokens_with_that_share_of_the_best_ones_probability(min_p, temperature):
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)) * 2
    chances = torch.softmax(logits.double() / temperature, -1)
    wanted = {i for i in range(SIZE) if chances[i] >= min_p * chances.max()}
    rows = [sampler_of(min_p=min_p, temperature=temperature, seed=seed) for seed in range(600)]
    found = {choice.token for choice in sample(logits.expand(600, -1), rows)}
    assert found <= wanted
    likely = {i for i in wanted if chances[i] / sum(chances[list(wanted)]) > 0.02}
    assert likely <= found


def test_min_p_and_top_p_together():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    rows = [sampler_of(min_p=0.3, top_p=0.5, seed=seed) for seed in range(100)]
    assert {choice.token for choice in sample(logits.expand(100, -1), rows)} == {0}


def test_a_row_without_a_token_left_says_so_and_no_other_row_ends():
    logits = torch.randn(3, SIZE)
    none_left = sampler_of(allowed_tokens=frozenset({4}), bad_words=((4,),))
    found = sample(logits, [sampler_of(), none_left, sampler_of()])
    assert (found[1].token, found[1].error_kind) == (None, "no_token_left")
    assert "no token" in found[1].error
    assert None not in (found[0].token, found[2].token)
    logits[1] = torch.nan
    broken = sample(logits, [sampler_of(), none_left, sampler_of()])
    assert broken[1].error_kind is None


def test_a_processor_that_fails_ends_its_own_row_alone(caplog):
    def failing(sampled, scores):
        raise ValueError("out of luck")

    broken = sampler_of()
    broken.processors = [failing]
    logits = torch.randn(3, SIZE)
    found = sample(logits, [sampler_of(), broken, sampler_of(presence_penalty=1.0)])
    assert (found[1].token, found[1].error) == (None, "ValueError: out of luck")
    assert None not in (found[0].token, found[2].token)
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {SIZE: 1.0}},
        {"allowed_tokens": frozenset({1, SIZE})},
        {"bad_words": ((4,), (SIZE, 1))},
    ],
)
def test_a_token_that_the_model_does_not_have_is_refused(options):
    with pytest.raises(RequestError, match=f"token {SIZE} in"):
        sampler_of(**options)


# ---- in the engine


@pytest.fixture(scope="module")
def engine():
    made = Engine(make("llama"), tiny_tokenizer(), rows=4)
    made.start()
    yield made
    made.close()


def answer(engine, **options):
    return Client(engine, asked((5, 6, 7), 12, ignore_eos=True, **options)).wait()


def test_the_engine_obeys(engine):
    plain = answer(engine).tokens
    banned = answer(engine, bad_words=((plain[0],),)).tokens
    assert plain[0] not in banned
    run = tuple(plain[:2])
    without = answer(engine, bad_words=(run,)).tokens
    assert without[0] == plain[0]
    assert run not in pairwise(without)
    assert set(answer(engine, allowed_tokens=frozenset({9, 10})).tokens) <= {9, 10}
    assert answer(engine, logit_bias={77: 100.0}).tokens == [77] * 12
    fresh = answer(engine, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50.0)
    assert len(set(fresh.tokens)) == 12
    assert not {5, 6, 7} & set(fresh.tokens)


def test_nothing_ends_an_answer_before_its_fewest_tokens(engine):
    text = tiny_tokenizer().decode([77])
    options = {"logit_bias": {77: 100.0}, "min_tokens": 5}
    assert answer(engine, **options, stop=(text,)).tokens == [77] * 6
    ended = Client(engine, asked((5, 6), 12, logit_bias={2: 100.0, 77: 90.0}, min_tokens=4)).wait()
    assert ended.tokens == [77, 77, 77, 77, 2]
    assert ended.finish == "stop"
    stopped = answer(engine, **options, stop_tokens=frozenset({77}))
    assert 77 not in stopped.tokens[:5]


def test_a_request_without_a_token_left_is_its_clients_error(engine):
    failed = answer(engine, allowed_tokens=frozenset({9}), bad_words=((9, 9),))
    assert (failed.finish, failed.pieces[-1].error_kind) == ("error", "no_token_left")
    assert failed.tokens == [9]


def test_a_token_is_delivered_as_it_comes_with_or_without_text(engine):
    """Part of a character has no text yet, but who measures counts it."""
    part = tiny_tokenizer()("é")["input_ids"][0]
    client = answer(engine, allowed_tokens=frozenset({part}))
    sizes = [len(piece.tokens) for piece in client.pieces]
    assert sizes == [1] * 12
