"""From a model's text to calls: each family's notation, in pieces of any size, right and wrong."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.serve.tools.choose import PARSERS, check_parser, detect_parser
from veneer.serve.tools.deltas import Call, CallDelta, TextDelta, join_deltas, merge_deltas
from veneer.serve.tools.forced import ListedCalls, NamedCall, arguments_schema, calls_schema

WEATHER = {
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "hot": {"type": "boolean"},
        "tags": {"type": "array"},
    }
}
ARGUMENTS = {"city": 'B"e}r{n\\ [é', "days": 2}
RAW = json.dumps(ARGUMENTS, ensure_ascii=False)
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
XML = (
    "<tool_call>\n<function=f>\n<parameter=city>\nB<e>r\nn\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "<parameter=hot>\nTrue\n</parameter>\n<parameter=tags>\n[1, 2]\n</parameter>\n</function>\n</tool_call>"
)
XML_ARGUMENTS = {"city": "B<e>r\nn", "days": 2, "hot": True, "tags": [1, 2]}


def hermes(raw: str = RAW, key: str = "arguments") -> str:
    return f'<tool_call>\n{{"name": "f", "{key}": {raw}}}\n</tool_call>'


#: parser, text, and what is in it: texts and (name, arguments)
CASES = {
    "hermes": ("hermes", f"Let me see. {hermes()}", ["Let me see.", ("f", ARGUMENTS)]),
    "hermes, two": ("hermes", f"{hermes()}\n{hermes()}", [("f", ARGUMENTS)] * 2),
    "hermes, parameters": ("hermes", hermes(key="parameters"), [("f", ARGUMENTS)]),
    "hermes, text behind": ("hermes", f"{hermes()} Done.", [("f", ARGUMENTS), " Done."]),
    "hermes, text alone": ("hermes", "a < b, <tool> no \n ", ["a < b, <tool> no \n "]),
    "hermes, no end": ("hermes", hermes().partition("\n</")[0], [("f", ARGUMENTS)]),
    "hermes, arguments first": (
        "hermes", f'<tool_call>{{"arguments": {RAW}, "id": 7, "name": "f"}}</tool_call>', [("f", ARGUMENTS)],
    ),
    "hermes, arguments as a text": ("hermes", hermes(json.dumps(RAW)), [("f", ARGUMENTS)]),
    "hermes, none": ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
    "hermes, half a character as a name": (
        "hermes", r'<tool_call>{"name": "\ud83d", "arguments": {}}</tool_call>',
        [r'<tool_call>{"name": "\ud83d", "arguments": {}}</tool_call>'],
    ),
    "hermes, no JSON": ("hermes", "<tool_call>f()</tool_call>", ["<tool_call>f()</tool_call>"]),
    "hermes, no call": ("hermes", '<tool_call>{"a": 1}', ['<tool_call>{"a": 1}']),
    "llama": ("llama3_json", hermes(key="parameters").split("\n")[1], [("f", ARGUMENTS)]),
    "llama, two": (
        "llama3_json", f'<|python_tag|>{{"name": "f", "parameters": {RAW}}}; {{"name": "g", "parameters": {{}}}}',
        [("f", ARGUMENTS), ("g", {})],
    ),
    "llama, text": ("llama3_json", 'It is {"name": "f"}', ['It is {"name": "f"}']),
    "llama, other JSON": ("llama3_json", '{"a": {"b": 1}} x', ['{"a": {"b": 1}} x']),
    "llama, JSON with a name": ("llama3_json", '{"name": "Bob", "age": 3}', ['{"name": "Bob", "age": 3}']),
    "llama, JSON with a name behind a call": (
        "llama3_json", '{"name": "f"}; {"name": "Bob"}', [("f", {}), '{"name": "Bob"}'],
    ),
    "mistral": (
        "mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {RAW}}}, {{"name": "g", "arguments": {{}}}}]',
        [("f", ARGUMENTS), ("g", {})],
    ),
    "mistral, named": (
        "mistral", f"Hm.[TOOL_CALLS]f[ARGS]{RAW}[TOOL_CALLS]g{{}}", ["Hm.", ("f", ARGUMENTS), ("g", {})],
    ),
    "mistral, with an id": ("mistral", f"[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{RAW}", [("f", ARGUMENTS)]),
    "mistral, no call": ("mistral", "[TOOL_CALLS]what is it", ["[TOOL_CALLS]what is it"]),
    "pythonic": (
        "pythonic", "[f(city='B\\'e)n', days=-2, hot=true, tags=[1, {'a': (None, \"]\")}]), get-time()]",
        [("f", {"city": "B'e)n", "days": -2, "hot": True, "tags": [1, {"a": [None, "]"]}]}), ("get-time", {})],
    ),
    "pythonic, tagged": ("pythonic", "<|python_start|>[f()]<|python_end|>", [("f", {})]),
    "pythonic, text": ("pythonic", "[1, 2] is a list", ["[1, 2] is a list"]),
    "pythonic, code": ("pythonic", "[f(x=g()), 1]", ["[f(x=g()), 1]"]),
    "pythonic, cut": ("pythonic", "[f(x=1", ["[f(x=1"]),
    "pythonic, three quotes": (
        "pythonic", '[f(code="""print("Hello, world")""", b=1)]', [("f", {"code": 'print("Hello, world")', "b": 1})],
    ),
    "pythonic, a name twice": ("pythonic", "[f(x=1, x=2)]", ["[f(x=1, x=2)]"]),
    "pythonic, names that are none in Python": (
        "pythonic", '[2fa(from="a=b", in=[1, "x,)"], user-id = -3, $top={"a": 1}, max results=true, a[b]=0)]',
        [("2fa", {"from": "a=b", "in": [1, "x,)"], "user-id": -3, "$top": {"a": 1}, "max results": True, "a[b]": 0})],
    ),
    "pythonic, lines": (
        "pythonic", '[\n  f(\n    a="x"\n    "y",\n    b=2,\n  )\n]', [("f", {"a": "xy", "b": 2})],
    ),
    "pythonic, escapes": ("pythonic", r'[f(a="\ud83d\ude00 \u00e9")]', [("f", {"a": "😀 é"})]),
    "pythonic, comparison": ("pythonic", "[f(x >= 1)]", ["[f(x >= 1)]"]),
    "pythonic, no value": ("pythonic", "[f(a=)]", ["[f(a=)]"]),
    "pythonic, empty argument": ("pythonic", "[f(a=1,,)]", ["[f(a=1,,)]"]),
    "pythonic, called again": ("pythonic", "[f(a=1).g(b=2)]", ["[f(a=1).g(b=2)]"]),
    "xml": ("qwen3_coder", f"Hm. {XML}", ["Hm.", ("f", XML_ARGUMENTS)]),
    "xml, two": ("qwen3_xml", XML + XML, [("f", XML_ARGUMENTS)] * 2),
    "xml, a name with a space": (
        "qwen3_xml", "<function=f>\n<parameter=max results>\n3\n</parameter>\n</function>",
        [("f", {"max results": "3"})],
    ),
    "xml, no end tags": (
        "qwen3_xml", "<function=f>\n<parameter=days>\n2\n<parameter=city>\nx\n</function>",
        [("f", {"days": 2, "city": "x"})],
    ),
    "deepseek_v3": ("deepseek_v3", f"Hm.{BEGIN}{V3}\n{V3}{END}", ["Hm.", ("f", {}), ("f", {})]),
    "deepseek_v3, no end tag": (
        "deepseek_v3", f"{BEGIN}{V3.split('```<')[0]}```\n{V3}{END}", [("f", {}), ("f", {})],
    ),
    "deepseek_v31": ("deepseek_v31", f"{BEGIN}{V31}{V31}{END}", [("f", {}), ("f", {})]),
}  # fmt: skip


def parse(name: str, text: str, cuts=()):
    """The deltas of a text that comes in pieces."""
    parser = PARSERS[name]({"f": WEATHER})
    edges = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    deltas = []
    for start, end in pairwise(edges):
        deltas += parser.feed(text[start:end])
    return [*deltas, *parser.end()], parser


def plain(answer):
    """Texts and calls without ids."""
    return [
        (part.name, json.loads(part.arguments)) if isinstance(part, Call) else part
        for part in answer
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_notation_is_read(case):
    name, text, expected = CASES[case]
    deltas, parser = parse(name, text)
    assert plain(join_deltas(deltas)) == expected
    has_calls = any(not isinstance(part, str) for part in expected)
    assert parser.finish_reason("stop") == ("tool_calls" if has_calls else "stop")
    assert parser.finish_reason("length") == "length"


@pytest.mark.parametrize("case", CASES)
def test_single_characters_give_what_the_whole_gives(case):
    name, text, expected = CASES[case]
    deltas, _ = parse(name, text, range(len(text)))
    assert plain(join_deltas(deltas)) == expected
    calls = [delta for delta in deltas if isinstance(delta, CallDelta) and delta.name]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(PARSERS)))
def test_any_text_in_any_pieces_gives_the_same(data, name):
    """Nothing raises, and where the text is cut changes nothing."""
    words = [
        "<tool_call>", "</tool_call>", '{"name": "f"', ', "arguments": {', "}", '"', "\\", "[TOOL_CALLS]", "[", "]",
        "f(", ")", "=", ",", " ", "\n", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "[ARGS]", "a",
        "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<|python_tag|>", ";", BEGIN, END, "'", "#", "<", "1",
    ]  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=14)))
    cuts = data.draw(st.lists(st.integers(1, max(1, len(text))), max_size=6))
    texts = []
    for places in ((), cuts, range(len(text))):
        deltas, _ = parse(name, text, places)
        texts.append(
            [
                (part.name, part.arguments) if isinstance(part, Call) else part
                for part in join_deltas(deltas)
            ]
        )
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("pythonic", r'[f(a="\ud83d")]', rb'{"a": "\ud83d"}'),
        ("hermes", hermes(r'"\ud83d"'), rb'"\ud83d"'),
    ],
)
def test_half_a_surrogate_pair_stays_an_escape(name, text, arguments):
    """UTF-8 cannot encode it, so no response could have it."""
    deltas, _ = parse(name, text)
    (call,) = join_deltas(deltas)
    assert call.arguments.encode() == arguments


def test_arguments_are_passed_on_as_they_come():
    parser = PARSERS["hermes"]()
    text, call = parser.feed('Hm.\n\n<tool_call>{"name": "f", "argum')
    assert text == TextDelta("Hm.")
    assert (call.index, call.name, call.arguments) == (0, "f", "")
    assert call.id.startswith("call_")
    assert parser.feed('ents": {"city": "Be') == [CallDelta(0, arguments='{"city": "Be')]
    assert parser.feed('rn"}}</tool_') == [CallDelta(0, arguments='rn"}')]
    assert parser.feed("call>") == parser.end() == []


def test_arguments_that_are_cut_off_stay_cut_off():
    deltas, parser = parse("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, ')
    (call,) = join_deltas(deltas)
    assert (call.name, call.arguments) == ("f", '{"a": [1, ')
    assert parser.finish_reason("length") == "length"


def test_references_in_a_schema_say_what_a_text_is_to_be():
    days: dict = {"anyOf": [{"$ref": "#/$defs/Days"}, {"type": "null"}]}
    loop: dict = {"anyOf": [{"$ref": "#/$defs/Loop"}] * 40}
    schema = {
        "properties": {"days": days, "loop": loop},
        "$defs": {"Days": {"type": "integer"}, "Loop": loop},
    }
    parser = PARSERS["qwen3_coder"]({"f": schema})
    pairs = (("days", "2"), ("loop", "3"))
    texts = "".join(f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in pairs)
    deltas = [*parser.feed(f"<function=f>\n{texts}</function>"), *parser.end()]
    (call,) = join_deltas(deltas)
    assert json.loads(call.arguments) == {"days": 2, "loop": "3"}


def test_mistral_has_ids_of_its_own_kind():
    deltas, _ = parse("mistral", "[TOOL_CALLS]f{}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}")
    ids = [part.id for part in join_deltas(deltas)]
    assert len(ids[0]) == 9
    assert ids[0].isalnum()
    assert ids[1] == "abcdefghi"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>{" + '"a": [' * 4000),
        ("llama3_json", "{" * 8000),
        ("mistral", "[TOOL_CALLS]f" + " " * 8000 + "x{"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>" + " " * 8000 + "x{"),
        ("pythonic", "[f(a=" + "(" * 8000 + ")" * 8001 + "]"),
        ("qwen3_xml", "<function=f><parameter=a>" + "[" * 8000 + "</parameter>"),
        ("qwen3_xml", "<function=" + "a " * 4000),
        ("qwen3_xml", "<function=f><parameter=" + "a " * 4000),
        ("qwen3_xml", "<function=f><parameter=a" + " " * 8000),
        ("pythonic", "[f(" + "a=1," * 2000 + ")]"),
    ],
)
def test_a_text_that_is_made_to_cost_much_costs_little(name, text):
    started = time.process_time()
    parse(name, text, range(len(text)))
    assert time.process_time() - started < 2


# ---------------------------------------------------------------------------------------------------
# forced calls


def test_a_named_call_is_its_arguments():
    parser = NamedCall("f", {}, "toolu")
    begin, arguments = parser.feed('{"a": ')
    assert (begin.name, begin.arguments) == ("f", "")
    assert begin.id.startswith("toolu_")
    assert arguments == CallDelta(0, arguments='{"a": ')
    assert parser.feed("1}") == [CallDelta(0, arguments="1}")]
    assert parser.end() == []
    assert parser.finish_reason("stop") == "tool_calls"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_listed_calls(size):
    text = f'[{{"name": "f", "parameters": {RAW}}},\n{{"name": "g", "parameters": {{}}}}]'
    parser, deltas = ListedCalls(), []
    for start in range(0, len(text), size):
        deltas += parser.feed(text[start : start + size])
    assert plain(join_deltas([*deltas, *parser.end()])) == [("f", ARGUMENTS), ("g", {})]


def test_a_tool_takes_the_parameters_that_it_names():
    assert arguments_schema(None) == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }
    assert arguments_schema({}) == arguments_schema(None)
    closed = arguments_schema({"properties": {"a": {"type": "string"}}})
    assert closed["additionalProperties"] is False
    opened = {"type": "object", "properties": {}, "additionalProperties": True}
    assert arguments_schema(opened) == opened
    reference = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}
    assert arguments_schema(reference) == reference


def test_references_of_several_tools_do_not_mix():
    tools = [
        ("f", {"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}}),
        ("g", {"properties": {"b": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"const": 2}}}),
    ]
    schema = calls_schema(tools, 3)
    assert schema["$defs"]["tool_0"]["$ref"] == "#/$defs/tool_0/$defs/a"
    assert schema["$defs"]["tool_1"]["properties"]["b"]["$ref"] == "#/$defs/tool_1/$defs/a"
    assert schema["maxItems"] == 3


# ---------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"), ("<tool_call> <function=a>", "qwen3_coder"), ("[TOOL_CALLS]", "mistral"),
        ('{"name": function name, "parameters": dictionary', "llama3_json"), (BEGIN + "```json", "deepseek_v3"),
        (BEGIN, "deepseek_v31"), ({"default": "a", "tool_use": "<tool_call>"}, "hermes"), ("<|im_start|>", None),
        (None, None),
    ],
)  # fmt: skip
def test_a_template_shows_its_notation(template, name):
    assert detect_parser(template) == name


def test_a_name_that_no_parser_has_is_refused():
    check_parser(None)
    check_parser("hermes")
    with pytest.raises(ConfigError, match=r"--tool-call-parser 'herms' \(nearest: 'hermes'"):
        check_parser("herms")


def test_deltas_merge_with_their_neighbours():
    deltas = [
        TextDelta("a"), TextDelta(""), TextDelta("b"), CallDelta(0, "i", "f"), CallDelta(0),
        CallDelta(0, arguments="{"), CallDelta(0, arguments="}"), CallDelta(1, "j", "g"),
    ]  # fmt: skip
    assert merge_deltas(deltas) == [
        TextDelta("ab"), CallDelta(0, "i", "f"), CallDelta(0, arguments="{}"), CallDelta(1, "j", "g"),
    ]  # fmt: skip
