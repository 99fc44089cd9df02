"""Tokens → text: pieces joined are the text, none ends within a character, none shows a stop
string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny import tiny_tokenizer

from veneer.serve.logprobs import chat_logprobs, shown_text, token_offsets
from veneer.serve.requests import Token
from veneer.serve.text import UNKNOWN, Detokenizer, Text

TOKENIZER = tiny_tokenizer()


def byte_fallback():
    """A tokenizer as Llama 2's: words with ▁ for their space, bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        "<s>": 0,
        **{f"<0x{i:02X}>": i + 1 for i in range(256)},
        "▁a": 257,
        "▁": 258,
        "b": 259,
        "▁ab": 260,
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", clean_up_tokenization_spaces=False
    )


FALLBACK = byte_fallback()

#: U+FFFD itself is left out: its bytes cannot be told from those of an incomplete character
CHARACTERS = st.characters(codec="utf-8", exclude_characters=UNKNOWN)


def fallback_ids(text: str) -> list[int]:
    """Token ids of a text for FALLBACK: a byte each, and a word for each space."""
    return [258 if byte == 0x20 else byte + 1 for byte in text.encode()]


def pieces(words: Detokenizer, prompt, ids, stop=()):
    """The pieces that come out, token by token and at the end; whether a stop string ended it."""
    text, out = Text(words, prompt, stop), []
    for token in ids:
        piece, stopped = text.add(token)
        out.append(piece)
        if stopped:
            return out, True
    return [*out, text.end()], False


@settings(max_examples=200, deadline=None)
@given(before=st.text(max_size=6), text=st.text(max_size=30))
def test_pieces_joined_are_the_text_and_each_is_whole(before, text):
    out, _ = pieces(
        Detokenizer(TOKENIZER), TOKENIZER(before)["input_ids"], TOKENIZER(text)["input_ids"]
    )
    assert "".join(out) == text
    assert all(UNKNOWN not in piece for piece in out) or UNKNOWN in text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(0, 60))
def test_a_prompt_may_end_within_a_character(text, cut):
    ids = TOKENIZER(text)["input_ids"]
    out, _ = pieces(Detokenizer(TOKENIZER), ids[:cut], ids[cut:])
    raw = text.encode()
    if not (cut < len(raw) and raw[cut] & 0xC0 == 0x80):
        assert "".join(out) == raw[cut:].decode()


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(3, 258), max_size=40))
def test_bytes_that_are_no_characters_come_out_as_decoding_shows_them(ids):
    out, _ = pieces(Detokenizer(TOKENIZER), (), ids)
    assert "".join(out) == TOKENIZER.decode(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 260), max_size=40))
def test_bytes_of_a_tokenizer_that_falls_back_on_them(ids):
    """What it shows for broken bytes changes with what follows; no text is lost or repeated without
    end."""
    out, _ = pieces(Detokenizer(FALLBACK), (257,), ids)
    assert len("".join(out)) <= 2 * len(ids) + len(FALLBACK.decode(ids))
    good = [token for token in ids if not 1 <= token <= 256]
    out, _ = pieces(Detokenizer(FALLBACK), (257,), good)
    assert "a" + "".join(out) == FALLBACK.decode([257, *good], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("prompt", "text"), [("a", "\n😀"), ("a", "😀😀"), ("a", "\n叫"), ("a\n", "😀")]
)
def test_bytes_do_not_change_the_text_of_bytes_before_them(prompt, text):
    out, _ = pieces(Detokenizer(FALLBACK), fallback_ids(prompt), fallback_ids(text))
    assert "".join(out) == text


@settings(max_examples=200, deadline=None)
@given(before=st.text(CHARACTERS, max_size=8), text=st.text(CHARACTERS, max_size=30))
def test_pieces_of_fallback_bytes_joined_are_the_text(before, text):
    prompt, ids = [257, *fallback_ids(before)], fallback_ids(text)
    out, _ = pieces(Detokenizer(FALLBACK), prompt, ids)
    assert f"a{before}" + "".join(out) == FALLBACK.decode([*prompt, *ids]) == f"a{before}{text}"


def test_broken_fallback_bytes_are_unknown_and_no_others():
    words, emoji = Detokenizer(FALLBACK), fallback_ids("😀")
    assert pieces(words, (257,), [*emoji, emoji[0]])[0] == ["", "", "", "😀", "", UNKNOWN]
    broken = [*fallback_ids("\n"), 0xFF + 1, 257]
    assert pieces(words, (257,), broken)[0] == ["\n", "", f"{UNKNOWN} a", ""]


def test_a_stop_string_of_fallback_bytes_ends_the_answer():
    ids = fallback_ids("\n😀x")
    assert pieces(Detokenizer(FALLBACK), (257,), ids, ("😀",)) == (["\n", "", "", "", ""], True)


def test_the_space_before_the_first_word_stays():
    words = Detokenizer(FALLBACK)
    assert pieces(words, (257,), (257, 259))[0] == [" a", "b", ""]
    assert words.decode((257, 259)) == "ab"  # decoding from the start drops it
    emojis = fallback_ids("😀😀")  # more bytes than the usual context has tokens
    assert pieces(words, emojis, (257, 259))[0] == [" a", "b", ""]


def test_an_emoji_waits_for_its_last_byte():
    out, _ = pieces(Detokenizer(TOKENIZER), (), TOKENIZER("a😀b")["input_ids"])
    assert out == ["a", "", "", "", "😀", "b", ""]
    out, _ = pieces(Detokenizer(TOKENIZER), (), TOKENIZER("a😀")["input_ids"][:-1])
    assert out == ["a", "", "", "", UNKNOWN]


def test_special_tokens_have_no_text_and_a_name():
    words = Detokenizer(TOKENIZER)
    assert pieces(words, (), [2, *TOKENIZER("hi")["input_ids"], 2])[0] == ["", "h", "i", "", ""]
    assert words.text(2) == "<|im_end|>"
    assert words.text(TOKENIZER("h")["input_ids"][0]) == "h"


@pytest.mark.parametrize(
    ("tokenizer", "ids", "text"),
    [
        (TOKENIZER, TOKENIZER("a é😀")["input_ids"], "a é😀"),
        (FALLBACK, [257, 258, *fallback_ids("é 😀"), 260], " a é 😀 ab"),
    ],
    ids=["bytes", "fallback"],
)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, ids, text):
    text_of = Detokenizer(tokenizer).text
    tokens = [Token(id, text_of(id), -1.0) for id in ids]
    entries = chat_logprobs(tokens, lambda id, text: shown_text(text))
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
    names = [entry["token"] for entry in entries]
    assert "bytes:\\xf0" in names
    assert not any(UNKNOWN in name for name in names)


@pytest.mark.parametrize(
    ("text", "names", "offsets"),
    [
        ("😀b", [*(chr(0xDC00 + byte) for byte in "😀".encode()), "b"], [2, 2, 2, 2, 3]),
        ("a b", ["<s>", " a", " b"], [2, 2, 3]),
        ("", ["\udcf0"], [2]),
        ("é", ["\udca9"], [2]),  # its first byte came before
        ("\nA", ["A"], [3]),  # the line break came before, but its text was held back
        ("e\u0301 la la", ["\xe9", " la", " la"], [2, 5, 7]),  # normalised by the tokenizer
    ],
)
def test_the_offsets_of_tokens_are_those_of_the_text(text, names, offsets):
    assert token_offsets(text, [Token(0, name) for name in names], 2) == offsets


def test_a_tokenizer_without_a_backend_decodes_by_its_own_method():
    class Slow:
        def decode(self, ids, **options):
            return TOKENIZER.decode(ids, **options)

    out, _ = pieces(Detokenizer(Slow()), (), TOKENIZER("a😀b")["input_ids"])
    assert "".join(out) == "a😀b"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab.\n", max_size=30), stop=st.lists(st.text("ab.\n", min_size=1, max_size=4), max_size=3),
)  # fmt: skip
def test_no_letter_of_a_stop_string_comes_out(text, stop):
    out, stopped = pieces(Detokenizer(TOKENIZER), (), TOKENIZER(text)["input_ids"], stop)
    ends = [text.find(word) + len(word) for word in stop if word in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(out) == text
        return
    seen = text[: min(ends)]  # the token that completed the first of them
    wanted = min(seen.find(word) for word in stop if word in seen)
    assert "".join(out) == text[:wanted]


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one\n\ntwo", ("\n\n",), ["o", "n", "e", "", ""]),
        ("one\ntwo", ("\n\n",), ["o", "n", "e", "", "\nt", "w", "o", ""]),
        ("aab", ("ab",), ["", "a", ""]),
        ("x</s", ("</s>",), ["x", "", "", "", "</s"]),
        ("é!", ("!",), ["", "é", ""]),
    ],
)
def test_text_is_held_back_until_it_is_decided(text, stop, wanted):
    assert pieces(Detokenizer(TOKENIZER), (), TOKENIZER(text)["input_ids"], stop)[0] == wanted
