"""Logits → tokens: greedy, the distributions of temperature, top_k and top_p, seeds, probabilities,
schemas."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny import tiny_tokenizer

from veneer.serve.grammars import MatcherFactory
from veneer.serve.requests import Grammar, GrammarLimitError, RequestError, Sampling
from veneer.serve.sampling import Sampler, sample


def sampler(matcher=None, **options) -> Sampler:
    return Sampler(Sampling(**{"max_tokens": 99, **options}), matcher)


def shares(logits, draws: int = 20_000, **options):
    """How often each token is chosen, [vocabulary]."""
    row = sampler(seed=0, **options)
    rows = logits.expand(500, -1)
    counts = torch.zeros(len(logits))
    for _ in range(draws // 500):
        for choice in sample(rows, [row] * 500):
            counts[choice.token] += 1
    return counts / draws


def nucleus(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The definition: temperature, then the k most likely, then the fewest of these with
    probability top_p."""
    chances = torch.softmax(logits.double() / temperature, -1)
    order = chances.argsort(descending=True)
    if top_k:
        chances[order[top_k:]] = 0
        chances /= chances.sum()
    before = chances[order].cumsum(0) - chances[order]
    chances[order[before >= top_p]] = 0
    return (chances / chances.sum()).float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.0001},
        {"top_k": 4, "top_p": 0.6, "temperature": 1.5},
        {"top_k": 50},
    ],
)
def test_tokens_come_as_often_as_the_definition_says(options):
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, -2.0, 1.1, 0.0])
    wanted = nucleus(logits, **options)
    found = shares(logits, **options)
    assert (found - wanted).abs().max() < 0.015
    assert not found[wanted == 0].any()


def test_a_nucleus_that_is_larger_than_what_is_sorted_at_first():
    logits = torch.zeros(5000)
    logits[:2500] = 3.0  # 95 % of the probability, evenly on half of the tokens
    rows = [sampler(top_p=0.9, seed=seed) for seed in range(400)]
    found = [choice.token for choice in sample(logits.expand(400, -1), rows)]
    assert max(found) < 2500
    assert len(set(found)) > 300
    assert max(found) > 1500


def test_greedy_rows_take_the_first_of_the_most_likely_beside_others_that_draw():
    logits = torch.randn(4, 50)
    rows = [
        sampler(temperature=0.0),
        sampler(seed=1),
        sampler(temperature=0.0),
        sampler(top_p=0.5, seed=2),
    ]
    found = [choice.token for choice in sample(logits, rows)]
    assert found[0] == int(logits[0].argmax())
    assert found[2] == int(logits[2].argmax())
    assert sample(logits[:1], [sampler(temperature=1e-9)])[0].token == found[0]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**40), others=st.integers(0, 5), place=st.integers(0, 5),
    top_p=st.sampled_from([1.0, 0.8]), top_k=st.sampled_from([0, 7]),
)  # fmt: skip
def test_the_same_seed_gives_the_same_tokens_whoever_else_is_in_the_batch(
    seed, others, place, top_p, top_k
):
    torch.manual_seed(0)
    steps = torch.randn(6, 40)
    place = min(place, others)
    alone, among = (sampler(seed=seed, top_p=top_p, top_k=top_k) for _ in range(2))
    for number, logits in enumerate(steps):
        batch = torch.randn(others + 1, 40)
        batch[place] = logits
        rows = [sampler(seed=number, top_k=i) for i in range(others + 1)]
        rows[place] = among
        assert sample(batch, rows)[place] == sample(logits[None], [alone])[0]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.95}])
def test_the_rounding_of_float32_changes_no_token(options):
    """Batches of other sizes round otherwise: by 3e-5 in the logits of a real model. Looked up in
    the sums of all probabilities, one token in fifty was another one."""
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        logits = torch.randn(16, 49152, generator=generator) * 2.5
        rounded = logits + torch.randn(logits.shape, generator=generator) * 3e-5
        rows, same = ([sampler(seed=16 * step + i, **options) for i in range(16)] for _ in range(2))
        assert [one.token for one in sample(logits, rows)] == [
            one.token for one in sample(rounded, same)
        ]


def test_without_a_seed_rows_differ():
    logits = torch.zeros(20, 1000)
    found = [choice.token for choice in sample(logits, [sampler() for _ in range(20)])]
    assert len(set(found)) > 10


@given(count=st.integers(0, 5), temperature=st.sampled_from([0.0, 0.3, 1.0]))
def test_probabilities_are_the_models_own(count, temperature):
    logits = torch.randn(3, 30)
    asking = sampler(logprobs=count, temperature=temperature, top_k=2, seed=0)
    plain, found, none = sample(logits, [sampler(), asking, sampler(temperature=0.0)])
    wanted = torch.log_softmax(logits[1], -1)
    assert abs(found.logprob - float(wanted[found.token])) < 1e-5
    assert [token for token, _ in found.top] == wanted.topk(count).indices.tolist()
    assert all(abs(logprob - float(wanted[token])) < 1e-5 for token, logprob in found.top)
    assert plain.logprob is none.logprob is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_no_numbers_has_no_token(bad, temperature):
    logits = torch.randn(3, 9)
    logits[1, 4] = bad
    rows = [sampler(temperature=temperature, logprobs=1) for _ in range(3)]
    found = sample(logits, rows)
    assert found[1].token is None
    assert None not in (found[0].token, found[2].token)


def test_bf16_logits_and_a_token_without_any_chance():
    logits = torch.full((2, 9), -torch.inf, dtype=torch.bfloat16)
    logits[:, 5] = 1.0
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        assert {choice.token for choice in sample(logits, [sampler(**options)] * 2)} == {5}


# ----------------------------------------------------------------------------------------------
# schemas

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_follows_its_schema_whatever_the_model_wants(temperature):
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    factory = MatcherFactory(tokenizer, 300, [2])  # more logits than tokens
    done = 0
    for seed in range(8):
        row, tokens = sampler(factory.matcher(SCHEMA), temperature=temperature, seed=seed), []
        free = sampler(temperature=0.0)
        torch.manual_seed(seed)
        for _ in range(400):
            logits = torch.randn(2, 300)
            logits[0, tokenizer.convert_tokens_to_ids(['"', "}"])] += (
                3  # strings and spaces end at some time
            )
            choice, other = sample(logits, [row, free])
            assert other.token == int(logits[1].argmax())
            tokens.append(choice.token)
            if row.accept(choice.token):
                break
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if row.matcher.is_stopped():
            done += 1
            value = json.loads(text)
            assert set(value) == {"name", "age"}
            assert isinstance(value["age"], int)
            assert len(value["name"]) <= 8
    assert done >= 6


@pytest.mark.parametrize(
    "theirs", [{}, {"x-guidance": {"whitespace_pattern": " +", "whitespace_flexible": True}}]
)
@pytest.mark.parametrize("schema", [SCHEMA, {"type": "object"}])
def test_a_model_that_loves_whitespace_gets_on_with_it(schema, theirs):
    """Whatever it prefers, and whatever the schema says of it, a run of whitespace ends."""
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    row, tokens = (
        sampler(MatcherFactory(tokenizer, 259, [2]).matcher({**schema, **theirs}), temperature=0.0),
        [],
    )
    logits = torch.zeros(1, 259)
    for text, liking in ((" ", 9.0), ("\t", 8.0), ("\n", 7.0), ('"', 2.0), ("}", 3.0)):
        logits[0, tokenizer(text)["input_ids"][0]] = liking
    logits[0, 2] = 9.0  # the end, where it may be
    for _ in range(200):
        tokens.append(sample(logits, [row])[0].token)
        if row.accept(tokens[-1]):
            break
    assert row.matcher.is_stopped()
    json.loads(tokenizer.decode(tokens, skip_special_tokens=True))


def test_whitespace_takes_no_more_than_its_share_of_an_answer():
    """A model that prefers it everywhere ends within 60 tokens what takes 25 without it, and the
    whitespace in its strings is its own."""
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "name": {"const": 'a   " b'}}}
    factory = MatcherFactory(tokenizer, 259, [2])
    row = Sampler(Sampling(60, temperature=0.0), factory.matcher(schema), (), factory.layout(60))
    logits, tokens = torch.zeros(1, 259), []
    for text, liking in ((" ", 9.0), ("\t", 8.0), ("\n", 7.0), ("}", 3.0)):
        logits[0, tokenizer(text)["input_ids"][0]] = liking
    logits[0, 2] = 9.5
    for _ in range(60):
        tokens.append(sample(logits, [row])[0].token)
        if row.accept(tokens[-1]):
            break
    assert row.matcher.is_stopped()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert json.loads(text)["name"] == schema["properties"]["name"]["const"]
    assert 8 <= sum(map(str.isspace, text)) - 4 <= 15


@pytest.mark.parametrize(
    "layout", [{"separators": (",", ":")}, {}, {"indent": 2}, {"indent": "\t"}], ids=str
)
def test_every_usual_layout_of_json_is_allowed(layout):
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    row = sampler(MatcherFactory(tokenizer, 259, [2]).matcher({"type": "object"}))
    for token in [
        *tokenizer(json.dumps({"a": [1, {"b": "c  d"}], "e": {}}, **layout))["input_ids"],
        2,
    ]:
        ended = row.accept(token)
    assert ended


def test_a_token_that_the_schema_refuses_is_an_error():
    pytest.importorskip("llguidance")
    row = sampler(MatcherFactory(tiny_tokenizer(), 259, [2]).matcher(SCHEMA))
    with pytest.raises(RequestError, match="cannot follow"):
        row.accept(tiny_tokenizer().convert_tokens_to_ids("x"))


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"minimum": "a"}, {"type": {1, 2}}]
)
def test_a_schema_that_is_not_understood_is_refused(schema):
    pytest.importorskip("llguidance")
    with pytest.raises(RequestError, match="schema that is not understood"):
        MatcherFactory(tiny_tokenizer(), 259, [2]).matcher(schema)


FORMS = [
    (Grammar("regex", "[ab]{2,4}c"), r"[ab]{2,4}c"),
    (Grammar("choice", json.dumps(["yes", 'no "x"', "naïve\n"])), r'yes|no "x"|naïve\n'),
    (Grammar("grammar", 'root ::= item ("," item)*\nitem ::= [0-9]{1,2}'), r"\d{1,2}(,\d{1,2})*"),
    (Grammar("grammar", 'start: "a" word\nword: /[xyz]+/'), r"a[xyz]+"),
]


@pytest.mark.parametrize(("grammar", "wanted"), FORMS, ids=lambda value: str(value)[:30])
def test_an_answer_follows_its_grammar(grammar, wanted):
    pytest.importorskip("llguidance")
    tokenizer = tiny_tokenizer()
    factory, texts = MatcherFactory(tokenizer, 259, [2]), set()
    for seed in range(12):
        torch.manual_seed(seed)
        row, tokens = sampler(factory.matcher(grammar), seed=seed), []
        for _ in range(60):
            logits = torch.randn(1, 259)
            logits[0, 2] += 2  # the end
            (choice,) = sample(logits, [row])
            tokens.append(choice.token)
            if row.accept(choice.token):
                break
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if row.matcher.is_stopped():
            texts.add(text)
            assert re.fullmatch(wanted, text)
    assert len(texts) >= 3


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(a"),
        Grammar("grammar", "nonsense"),
        Grammar("grammar", "root ::= other"),
        Grammar("grammar", "start: /(/"),
        Grammar("grammar", "(" * 5000),
    ],
    ids=lambda grammar: grammar.text[:20],
)
def test_a_grammar_that_is_not_understood_is_refused(grammar):
    pytest.importorskip("llguidance")
    with pytest.raises(RequestError, match="a grammar"):
        MatcherFactory(tiny_tokenizer(), 259, [2]).matcher(grammar)


def test_a_grammar_that_needs_more_than_the_limits_is_told_so():
    """And its row ends alone."""
    pytest.importorskip("llguidance")
    options = [{"type": "object", "properties": {str(i): {"type": "string"}}} for i in range(500)]
    factory = MatcherFactory(tiny_tokenizer(), 259, [2])
    try:
        row = sampler(factory.matcher({"anyOf": options}), temperature=0.0)
    except GrammarLimitError:
        return
    logits = torch.randn(2, 259)
    with pytest.raises(GrammarLimitError, match="limits"):
        for _ in range(9):
            limited, other = sample(logits, [row, sampler(temperature=0.0)])
            assert other.token == int(logits[1].argmax())
            if limited.token is None:
                assert limited.error_kind == "grammar_limit"
                raise GrammarLimitError(limited.error)
            row.accept(limited.token)


def test_without_llguidance_a_schema_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match="pip install"):
        MatcherFactory(tiny_tokenizer(), 259, [2]).matcher(SCHEMA)


def test_other_tokenizers_and_bases_without_an_end_are_refused():
    pytest.importorskip("llguidance")
    with pytest.raises(RequestError, match="fast tokenizer"):
        MatcherFactory(object(), 259, [2]).matcher(SCHEMA)
    with pytest.raises(RequestError, match="end-of-text"):
        MatcherFactory(tiny_tokenizer(), 259, []).matcher(SCHEMA)
