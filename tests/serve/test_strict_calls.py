"""The grammar of answers with strict tools: text is free, a call that has begun keeps to its
schema, and whatever the grammar allows is read by the family's parser as calls that are valid."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from veneer.serve.refusal import Refusal
from veneer.serve.tools.choose import PARSERS
from veneer.serve.tools.deltas import Call, join_deltas
from veneer.serve.tools.strict import strict_grammar

llguidance = pytest.importorskip("llguidance")

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4, "pattern": "^[a-z]+$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
        "near": {"$ref": "#/$defs/Near"},
    },
    "required": ["days", "unit"],
    "$defs": {"Near": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
}
TOOLS = {"f": WEATHER, "g": {}, "get-time": {"type": "object", "properties": {}}}
STRICT = {"f", "get-time"}
ARGUMENTS = '{"city": "bern", "days": 2, "unit": "C"}'
FEW, WRONG = '{"days": 2, "unit": "F"}', '{"days": 12, "unit": "C"}'
XML = (
    "<tool_call>\n<function=f>\n<parameter=city>\nGo\n to\n</parameter>\n<parameter=days>\n{}\n"
    "</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>"
)
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"

#: parser, a text that may be written, one that may not, and the end of what of it may
CASES = {
    "hermes": (
        f'Hm {{"a.\n<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>\nOr <tool_call>'
        '{"name": "g", "arguments": {"x": [1]}}</tool_call>',
        f'Hm <tool_call>{{"name": "f", "arguments": {WRONG}}}</tool_call>', '"days": 1',
    ),
    "llama3_json": (
        f'{{"name": "f", "parameters": {FEW}}}; {{"name": "get-time", "parameters": {{}}}}',
        '{"name": "get-time", "parameters": {"x": 1}}', '"parameters": {',
    ),
    "mistral": (
        f'Hm.[TOOL_CALLS] [{{"name": "f", "arguments": {ARGUMENTS}}}, {{"name": "g", "arguments": {{}}}}]',
        '[TOOL_CALLS] [{"name": "h"', '"name": "',
    ),
    "mistral, named": (
        f"Hm.[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{ARGUMENTS}[TOOL_CALLS]g{{}}",
        f"[TOOL_CALLS]f[ARGS]{WRONG}", '"days": 1',
    ),
    "pythonic": (
        '[f(city="bern", days=2, unit="F", near=[true]), g(a=None, user-id={"c": 1}), get-time()]',
        "[f(city=\"bern\", unit='C')]", '"bern", ',
    ),
    "qwen3_coder": (f"Hm. {XML.format(2)}\n{XML.format(9)}", XML.format(12), "<parameter=days>\n1"),
    "deepseek_v3": (
        f"Hm.{BEGIN}{V3.replace('{}', ARGUMENTS)}\n{V3.replace('{}', FEW)}{END}",
        BEGIN + V3.replace("{}", WRONG), '"days": 1',
    ),
    "deepseek_v31": (
        f"{BEGIN}{V31.replace('{}', ARGUMENTS)}{END}", BEGIN + V31.replace("{}", WRONG), '"days": 1',
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return llguidance.LLTokenizer("byte")


def new_matcher(tokenizer, name, tools=TOOLS, strict=STRICT, markers=None):
    grammar = strict_grammar(PARSERS[name.partition(",")[0]], tools, strict, markers or {})
    source = llguidance.grammar_from(grammar.kind, grammar.text)
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def read(name, text, tools=TOOLS):
    parser = PARSERS[name.partition(",")[0]](tools)
    return join_deltas([*parser.feed(text), *parser.end()])


@pytest.mark.parametrize("case", CASES)
def test_a_call_that_has_begun_keeps_to_its_schema(case, tokenizer):
    right, wrong, allowed = CASES[case]
    matcher = new_matcher(tokenizer, case)
    assert matcher.try_consume_tokens(tokenizer.tokenize_str(right)) == len(right.encode())
    assert matcher.is_accepting()
    matcher = new_matcher(tokenizer, case)
    count = matcher.try_consume_tokens(tokenizer.tokenize_str(wrong))
    assert wrong.encode()[:count].decode().endswith(allowed)


@pytest.mark.parametrize("name", sorted({case.partition(",")[0] for case in CASES}))
@pytest.mark.parametrize("text", ["", "It is 1 < 2.", ' "name": "f" — ‽\n', "a <tool_cal", "x [1]"])
def test_a_text_is_free(name, text, tokenizer):
    matcher = new_matcher(tokenizer, name)
    assert matcher.try_consume_tokens(tokenizer.tokenize_str(text)) == len(text.encode())
    assert matcher.is_accepting()


#: how a call of each family begins
BEGINNINGS = {
    "hermes": "<tool_call>", "llama3_json": "{", "mistral": "[TOOL_CALLS]", "pythonic": "[",
    "qwen3_coder": "<tool_call>\n<function=", "deepseek_v3": "<｜tool▁call▁begin｜>",
    "deepseek_v31": "<｜tool▁call▁begin｜>",
}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", BEGINNINGS)
def test_whatever_may_be_written_is_read_as_valid_calls(name, seed, tokenizer):
    """A random walk through what the grammar allows, from the beginning of a call on."""
    draw = random.Random(seed)
    tools = {key: TOOLS[key] for key in ("f", "get-time")}
    if name == "qwen3_coder":  # whose texts are not held to a pattern
        plain = {**WEATHER["properties"], "city": {"type": "string"}}
        tools = {"f": {**WEATHER, "properties": plain}}
    matcher = new_matcher(tokenizer, name, tools, set(tools))
    tokens = tokenizer.tokenize_str(BEGINNINGS[name])
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    while not matcher.is_accepting():
        bits = matcher.compute_bitmask()
        allowed = [token for token in range(128) if bits[token // 8] >> token % 8 & 1]
        # tags of several bytes a letter are the one way on
        chosen = [draw.choice(allowed) if allowed else matcher.compute_ff_bytes()[0]]
        end = tokenizer.tokenize_str("</parameter>")
        if name == "qwen3_coder" and matcher.validate_tokens(end) == len(end):
            chosen = end  # a text would go on for long
        assert matcher.consume_tokens(chosen), matcher.get_error()
        tokens += chosen
        assert len(tokens) < 4000
    calls = read(name, bytes(tokens).decode(), tools)
    assert calls
    for call in calls:
        assert isinstance(call, Call)
        jsonschema.validate(json.loads(call.arguments), tools[call.name])


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_a_parameter_may_have_a_name_that_is_none_in_python(name, tokenizer):
    arguments = {"from": 1, "user-id": 2, "$top": 3, "max results": 4}
    properties = {key: {"type": "integer"} for key in arguments}
    tools = {"2fa": {"type": "object", "properties": properties, "required": [*arguments]}}
    text = f"[2fa({', '.join(f'{key}={value}' for key, value in arguments.items())})]"
    if name == "qwen3_coder":
        pairs = (f"<parameter={key}>{value}</parameter>" for key, value in arguments.items())
        text = f"<tool_call>\n<function=2fa>\n{''.join(pairs)}</function>\n</tool_call>"
    matcher = new_matcher(tokenizer, name, tools, {"2fa"})
    assert matcher.try_consume_tokens(tokenizer.tokenize_str(text)) == len(text.encode())
    assert matcher.is_accepting()
    (call,) = read(name, text, tools)
    assert (call.name, json.loads(call.arguments)) == ("2fa", arguments)


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_required_parameters_are_a_list_of_texts(name):
    def grammar(**fields):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, **fields}
        return strict_grammar(PARSERS[name], {"f": schema}, {"f"}, {}).text

    assert grammar(required=None) == grammar() == grammar(required=[]) != grammar(required=["a"])
    for required in (True, False, 5, "a", {"a": True}, ["a", 1]):
        with pytest.raises(Refusal, match=r"in 'required' of the parameters of 'f'") as caught:
            grammar(required=required)
        assert (caught.value.status, caught.value.param) == (400, "tools")


def test_tags_that_are_special_tokens_stand_by_their_ids():
    markers = {7: "[TOOL_CALLS]", 9: "[ARGS]"}
    text = strict_grammar(PARSERS["mistral"], TOOLS, STRICT, markers).text
    assert "TEXT <[7]>" in text
    assert "<[9]>" in text
    assert '"[TOOL_CALLS]"' not in text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "format": "weird"}}},
        {"type": "object", "properties": {"a": {"not": {"type": "string"}}}},
        {"type": "object", "properties": {"a": {"oneOf": [{"type": "string"}, {"const": "x"}]}}},
        {"allOf": [{"type": "object"}]},
        {},
    ],
)
@pytest.mark.parametrize("name", BEGINNINGS)
def test_no_keyword_of_a_schema_is_refused(name, schema, tokenizer):
    new_matcher(tokenizer, name, {"f": schema}, {"f"})
