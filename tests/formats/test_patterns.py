"""Regular expressions of a config: what ``re`` says, in time that no expression can make long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import AdapterError
from veneer.formats import peft_paths
from veneer.formats.patterns import MAX_FIELD_CHARS, Expressions, PathEndings, full_matcher, literal

ATOMS = [
    "a",
    "b",
    r"\.",
    ".",
    "[ab]",
    "[^a]",
    r"\d",
    r"\w",
    r"\W",
    r"\s",
    "^",
    "$",
    r"\b",
    "1",
    "[0-9.]",
    r"[\d_]",
    r"\A",
    r"\Z",
    "(?=a)",
    "(?!b)",
    "(?<=[a.])",
    "(?<!1)",
    "(?i:A)",
    "(?>a|ab)",
    "(a|b)",
    r"\1",
]
TIMES = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}"]
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda below: (
        st.lists(below, min_size=1, max_size=3).map("".join)
        | st.tuples(below, below).map(lambda two: f"(?:{two[0]}|{two[1]})")
        | st.tuples(below, st.sampled_from(TIMES)).map(lambda two: f"({two[0]}){two[1]}")
    ),
    max_leaves=8,
)


@settings(max_examples=250)
@given(EXPRESSIONS, st.lists(st.text("ab.1_", max_size=7), min_size=1, max_size=8))
def test_an_expression_says_what_re_says(source, texts):
    try:
        re.compile(source)
    except re.error:  # a reference to a group that is not closed
        with pytest.raises(ValueError, match="no regular expression"):
            Expressions([source])
        return
    begins, fits = Expressions([source], full_match=False), Expressions([source])
    for text in texts:
        assert begins.match_any(text) == (re.match(source, text) is not None), text
        assert fits.match_any(text) == (re.fullmatch(source, text) is not None), text


PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.mlp.up_proj",
    "q_proj",
    "xq_proj",
    "a.q_proj.b",
    "",
    "lm_head",
]
USED = [
    "q_proj", r".*\.(q_proj|v_proj)", r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj", ".*(self_attn|mlp).*proj.*",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:k_proj|v_proj|q_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention)\.(?:(?:q_proj|k_proj)))",
    r"^(?:.*\.)?layers\.(?:[0-9]|1[0-9])\..*",
    r"^(?!.*visual)(model\.layers|lm_head)(?=\.|$).*", r"(?i).*\.Q_PROJ", r".*layers\.(\d)\1?\..*", r".*\b\d{1,2}\..*",
    "model.layers.0.self_attn.q_proj", "",
]  # fmt: skip


@pytest.mark.parametrize("source", USED)
def test_expressions_that_people_use(source):
    for path in PATHS:
        assert full_matcher(source)(path) == (re.fullmatch(source, path) is not None), path


@given(
    st.lists(
        st.sampled_from(
            [
                *(s for s in USED if "(?i)" not in s),
                "0",
                r"up_proj|q_proj",
                r"q_proj)|(lm_head",
                r"^q_proj",
                r"self_attn\.q_proj",
            ]
        ),
        max_size=5,
    )
)
def test_the_first_expression_counts_as_it_does_to_peft(sources):
    found = PathEndings(sources)
    for path in PATHS:
        expected = next((s for s in sources if re.match(rf"(.*\.)?({s})$", path)), None)
        assert found.first_match(path) == expected, path


HOSTILE = [
    r"(a|a)*[^ab]", r"(a+)+[^ab]", r"(.*)*[^ab]", r"(a|ab|b)*[^ab]", ".*" * 300 + "[^ab]", "(a?){40}a{40}[^ab]",
    "(?:a|aa)*[^ab]", r"(?=(a|aa)*[^ab]).*", r"(.*?)(.*?)(.*?)(.*?)\1\2\3\4[^ab]", r"(?:\b|\B|a|.)*[^ab]",
    "(?:(?:|a|.b)+?)+?[^ab]", "(?:(a)|b)*(?(1)(?:a|aa|b)*|b)[^ab]",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE)
def test_no_expression_takes_long(source):
    """Three hundred paths: half a second in all, or one error that says so; and no more the second
    time."""
    expression, start = Expressions([source]), time.process_time()
    for _ in range(2):
        try:
            for n in range(300):
                assert not expression.match_any("ab" * (n % 100) + "a" * (500 - n % 100))
        except AdapterError as error:
            assert "longer than any that people use" in str(error)  # noqa: PT017
    assert time.process_time() - start < 3


def test_many_expressions_share_one_limit():
    slow = r"(?:\b|\B|a|.)*[^ab]"
    for many in (PathEndings([slow] * 150), PathEndings(f"{slow}|{n}" for n in range(150))):
        start = time.process_time()
        with pytest.raises(AdapterError, match="longer than any"):
            for n in range(1000):
                many.first_match("a" * (400 + n % 100))
        assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("(q", "no regular expression"),
        ("(((a{99}){99}){99}){99}", "repeats too often"),
        ("(" * 90 + "a" + "){9}" * 90, "repeats too often"),
        ("q{e<=1}", "brace"),  # regex: one letter may differ
        ("[[:alpha:]]q", "by name"),  # regex: any letter
        ("(?x) (?:ab) {9}", "flag x"),  # spaces between a group and how often it is there
        ("(?ix: a)", "flag x"),
        ("a" * 4097 + "*", "of 4,096 at most"),
    ],
)
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_what_would_be_read_otherwise_or_take_much_memory_is_refused(source, words):
    with pytest.raises(ValueError, match=words):
        Expressions([source])


def test_whole_paths_are_looked_up():
    """Veneer's own folders hold a whole path for each layer: thousands are no work, and no
    states."""
    paths = [f"model.layers.{n}.mlp.{name}_proj" for n in range(2000) for name in ("up", "down")]
    escaped = [re.escape(path) for path in paths]
    found, start = PathEndings(escaped), time.process_time()
    assert [found.first_match(path) for path in paths] == escaped
    assert all(map(full_matcher("|".join(escaped)), paths))
    assert time.process_time() - start < 1
    dotted = paths[:300]  # as PEFT writes them: each dot is any character
    found = PathEndings(dotted)
    assert [found.first_match(path) for path in dotted] == dotted
    assert found.first_match(dotted[3].replace(".", "x")) == dotted[3]
    assert sum(map(len, dotted)) > MAX_FIELD_CHARS


def test_what_is_a_text():
    assert literal(re.escape("a.b-c d")) == "a.b-c d"
    assert [literal(source) for source in ("a.b", "a*", r"\d", "(a)", "a|b", "^a")] == [None] * 6


@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"], r"[^.]+", r"la.*"])
@pytest.mark.parametrize("layers", [0, [0], [1, 10], []])
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_layers_as_peft_finds_them(pattern, layers):
    """A name that is a whole path is in any block; without a pattern, PEFT sees no blocks at the
    root of a model."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = {
        "target_modules": ["q", "x.q"],
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    paths = [
        "m.layers.0.q",
        "m.layers.1.q",
        "layers.10.q",
        "m.blocks.1.layers.0.x.q",
        "q",
        "m.layers.x.q",
        "m.q",
    ]
    theirs = LoraConfig(**config)
    assert peft_paths.expected_paths(config, paths) == {
        path for path in paths if check_target_module_exists(theirs, path)
    }


def test_what_people_write_is_far_from_the_limit():
    for source in (source for source in USED if "(?i)" not in source):
        expression = PathEndings([source])._expressions
        for layer in range(1000):
            list(expression.matching(f"model.layers.{layer}.self_attn.q_proj"))
            list(expression.matching(f"model.layers.{layer}.post_attention_layernorm"))
        assert expression._seconds_left > 0.4, source
