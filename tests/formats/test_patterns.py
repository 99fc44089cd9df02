"""Regular expressions as states: what ``re`` says, in time that no expression can make long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.patterns import MAX_STATES, Ends, Pattern, literal, whole

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


@settings(max_examples=500)
@given(EXPRESSIONS, st.lists(st.text("ab.1_", max_size=7), min_size=1, max_size=8))
def test_a_pattern_says_what_re_says(source, texts):
    begins, fits = Pattern(source), Pattern(source, whole=True)
    for text in texts:
        assert begins.matches(text) == (re.match(source, text) is not None), text
        assert fits.matches(text) == (re.fullmatch(source, text) is not None), text


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
    r"^(?:.*\.)?layers\.(?:[0-9]|1[0-9])\..*", "model.layers.0.self_attn.q_proj", "",
]  # fmt: skip


@pytest.mark.parametrize("source", USED)
def test_expressions_that_people_use(source):
    for path in PATHS:
        assert whole(source).matches(path) == (re.fullmatch(source, path) is not None), path


@given(
    st.lists(
        st.sampled_from([*USED, "0", r"up_proj|q_proj", r"q_proj)|(lm_head", r"^q_proj", r"self_attn\.q_proj"]),
        max_size=5,
    )
)
def test_the_first_expression_counts_as_it_does_to_peft(sources):
    found = Ends(sources)
    for path in PATHS:
        expected = next((s for s in sources if re.match(rf"(.*\.)?({s})$", path)), None)
        assert found.first(path) == expected, path


@pytest.mark.parametrize(
    "source", [r"(a|a)*b", r"(a+)+$", r"(.*)*x", r"(a|ab|b)*c", ".*" * 300 + "x", "(a?){500}a{500}b"]
)
def test_no_expression_takes_long(source):
    pattern, start = Pattern(source, whole=True), time.process_time()
    for n in (500, 499, 498):
        pattern.matches("a" * n)
    assert time.process_time() - start < 3


def test_whole_paths_are_looked_up():
    """Veneer's own folders hold a whole path for each layer: thousands are no work, and no states."""
    paths = [f"model.layers.{n}.mlp.{name}_proj" for n in range(2000) for name in ("up", "down")]
    escaped = [re.escape(path) for path in paths]
    found, start = Ends(escaped), time.process_time()
    assert [found.first(path) for path in paths] == escaped
    assert all(map(whole("|".join(escaped)).matches, paths))
    assert time.process_time() - start < 1
    dotted = paths[:300]  # as PEFT writes them: each dot is any character
    found = Ends(dotted)
    assert [found.first(path) for path in dotted] == dotted
    assert found.first(dotted[3].replace(".", "x")) == dotted[3]
    assert sum(map(len, dotted)) > MAX_STATES


def test_what_is_a_text():
    assert literal(re.escape("a.b-c d")) == "a.b-c d"
    assert [literal(source) for source in ("a.b", "a*", r"\d", "(a)", "a|b", "^a")] == [None] * 6


@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"], r"[^.]+", r"la.*"])
@pytest.mark.parametrize("layers", [0, [0], [1, 10], []])
def test_layers_as_peft_finds_them(pattern, layers):
    """PEFT's expression for the index, with the leading part optional."""
    config = {"target_modules": ["q", "x.q"], "layers_to_transform": layers, "layers_pattern": pattern}
    paths = ["m.layers.0.q", "m.layers.1.q", "layers.10.q", "m.blocks.1.layers.0.x.q", "q", "m.layers.x.q"]
    given = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]
    expected = set()
    for path in paths:
        hits = [hit for p in given if (hit := re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", path))]
        index = int(hits[0]["idx"]) if hits else None
        if path.endswith("q") and (layers == [] or index in ([layers] if layers == 0 else layers)):
            expected.add(path)
    assert peft.expected_paths(config, paths) == expected


def test_many_states_on_many_paths_are_bounded(monkeypatch):
    """An expression within all bounds that is in thousands of states after each character, each time in others."""
    import random
    import tracemalloc

    from veneer.formats import patterns

    monkeypatch.setattr(patterns, "MAX_WORK", 2_000_000)
    chance = random.Random(0)
    pattern = Pattern("|".join(f".*[{''.join(chance.sample('abcdefgh', 4))}].{{440}}" for _ in range(10)), whole=True)
    paths = ("".join(chance.choices("abcdefgh", k=511)) + "." for _ in range(1000))
    tracemalloc.start()
    with pytest.raises(AdapterError, match="longer than any"):
        for path in paths:
            pattern.matches(path)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


def test_what_people_write_is_far_from_the_bounds():
    pattern = Pattern(r"(.*\.)?layers\.(\d+)\..*(q|k|v|o|up|down|gate)_proj", whole=True)
    for layer in range(2000):
        assert pattern.matches(f"model.layers.{layer}.self_attn.q_proj")
        assert not pattern.matches(f"model.layers.{layer}.norm")
    assert pattern._work < 2_000_000
