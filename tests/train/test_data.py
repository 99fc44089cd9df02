"""Every file format and every shape of row, and what is said about rows that cannot be used."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tests.support.tiny import CHATML, sums, tiny_tokenizer, write_rows

from veneer.errors import ConfigError, DataError
from veneer.train import data, tokens
from veneer.train.config import make_config
from veneer.train.data import Columns
from veneer.train.evaluate import exact_match_rate
from veneer.train.generate import encode, generate
from veneer.train.prepare import Prepared, Rows, prepare, sample_prompt

TOKENIZER = tiny_tokenizer()
ROWS = sums(4)


def learnt(examples: Rows, i: int = 0) -> str:
    """The text that the loss counts in example i."""
    return TOKENIZER.decode([label for label in examples[i]["labels"] if label != tokens.IGNORED])


def _csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def _json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS))
    return path


def _parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "a.jsonl": lambda path: write_rows(path, ROWS),
    "a.json": _json,
    "a.csv": _csv,
    "a.tsv": _csv,
    "a.parquet": _parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = data.read(WRITERS[name](tmp_path / name))
    assert rows.kind == "prompt"
    assert rows.rows == ROWS  # the completion " 8" stays text


def test_the_hash_of_a_hub_data_set_is_that_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of an image is its address, which differs in each process."""
    image = pytest.importorskip("PIL.Image")
    images = [image.new("RGB", (2, 3), colour) for colour in ("red", "red", "blue")]
    images += [image.new("RGB", (3, 2), "red"), image.new("L", (6, 3), "red")]
    digests = []
    for one in images:
        rows = [{"image": one, "label": 1}]
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, rows=rows, **__: rows)
        digests.append(data.raw_rows("owner/images")[1])
    assert digests[0] == digests[1]
    assert len({*digests}) == 4


def test_the_split_to_evaluate_on_is_read_and_is_not_that_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(name: str, *_: Any, split: str, **__: Any) -> list[Any]:
        asked.append((name, split))
        return [{"chosen": f"{split} a", "rejected": "b"}] * 2

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def read(source: str, split: str) -> data.Records:
        located_rows, digest = data.raw_rows(source, split)
        return data.select_fields(located_rows, source, digest, ("chosen", "rejected"))

    def prepare_rows(**changes: Any) -> Prepared:
        fields = {"base": "b", "data": "org/rows", "output": "o", "eval_data": "org/rows"}
        config = make_config({**fields, **changes})
        return prepare(config, read, lambda records: Rows(records.rows, [1, 1], [0, 1]), 8)

    prepared = prepare_rows(eval_split="test")
    assert asked == [("org/rows", "train"), ("org/rows", "test")]
    assert prepared.evaluation is not None
    assert prepared.evaluation.rows[0]["chosen"] == "test a"
    with pytest.raises(ConfigError, match="split train, which are the training data"):
        prepare_rows()


def test_columns_of_later_rows_count() -> None:
    rows = [("1", {"chosen": "a", "rejected": "b"})]
    rows.append(("2", {"prompt": "p", "chosen": "c", "rejected": "d", "note": "n"}))

    def select(*optional: str) -> data.Records:
        return data.select_fields(rows, "s", "h", ("chosen", "rejected"), optional)

    with pytest.raises(DataError, match="1 holds nothing in 'prompt'"):
        select("prompt")
    assert select().unused == ("prompt", "note")
    sparse = data.select_fields(rows, "s", "h", ("chosen",), sparse=("note",))
    assert ["note" in row for row in sparse.rows] == [False, True]
    assert sparse.unused == ("rejected", "prompt")


def test_a_text_file_is_one_example_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\n")
    rows = data.read(tmp_path / "a.txt")
    assert rows.rows == [{"text": "one"}, {"text": "two"}]
    assert rows.locations == ["line 1", "line 3"]
    examples = tokens.tokenise(rows, TOKENIZER, max_length=10)
    assert learnt(examples) == "one<|im_end|>"


def test_completions_alone_are_learnt_unless_told_otherwise(tmp_path: Path) -> None:
    rows = data.read(
        write_rows(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd", "other": 1}])
    )
    examples = tokens.tokenise(rows, TOKENIZER, max_length=10)
    assert TOKENIZER.decode(examples[0]["input_ids"]) == "abcd<|im_end|>"
    assert learnt(examples) == "cd<|im_end|>"
    assert examples.head_token_count == 3
    assert (
        learnt(tokens.tokenise(rows, TOKENIZER, max_length=10, completion_only=False))
        == "abcd<|im_end|>"
    )


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "bye"},
]


def test_a_chat_learns_each_assistant_turn_and_its_end(tmp_path: Path) -> None:
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    examples = tokens.tokenise(rows, TOKENIZER, max_length=300)
    text = TOKENIZER.decode(examples[0]["input_ids"])
    assert text == TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert learnt(examples) == "yo<|im_end|>\nbye<|im_end|>\n"


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def test_generation_marks_of_a_template_are_used(tmp_path: Path) -> None:
    marked = tiny_tokenizer()
    marked.chat_template = MARKED
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    assert learnt(tokens.tokenise(rows, marked, max_length=300)) == "yo<|im_end|>bye<|im_end|>"


def test_a_chat_whose_template_ends_by_no_end_token_learns_to_stop(tmp_path: Path) -> None:
    open_ended, marked = tiny_tokenizer(), tiny_tokenizer()
    open_ended.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    marked.chat_template = MARKED.replace(" + '<|im_end|>' }}{% endgen", " }}{% endgen").replace(
        "{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
    )
    chats = (
        ({"messages": CHAT}, (open_ended, marked)),
        ({"prompt": CHAT[:4], "completion": CHAT[4:]}, (open_ended,)),
    )
    for number, (chat, tokenizers) in enumerate(chats):
        rows = data.read(write_rows(tmp_path / f"{number}.jsonl", [chat]))
        for tokenizer in tokenizers:
            text = learnt(tokens.tokenise(rows, tokenizer, max_length=300))
            assert text.endswith("bye<|im_end|>")
            assert text.count("<|im_end|>") == 1


def test_a_chat_of_a_base_whose_end_token_is_another_learns_to_stop(tmp_path: Path) -> None:
    """Bases of Qwen have ChatML as template, and end a text with <|endoftext|>."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    (row,) = tokens.tokenise(rows, tokenizer, max_length=300).rows
    assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
    end_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    (row,) = tokens.tokenise(rows, tokenizer, max_length=300, end_ids=end_ids).rows
    assert row["input_ids"] == TOKENIZER.apply_chat_template(CHAT)["input_ids"]


def test_a_chat_as_prompt_and_completion_learns_the_completion(tmp_path: Path) -> None:
    rows = data.read(
        write_rows(tmp_path / "a.jsonl", [{"prompt": CHAT[:4], "completion": CHAT[4:]}])
    )
    assert learnt(tokens.tokenise(rows, TOKENIZER, max_length=300)) == "bye<|im_end|>\n"


def test_the_sharegpt_form_is_understood(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    rows = data.read(write_rows(tmp_path / "a.jsonl", [row]))
    assert learnt(tokens.tokenise(rows, TOKENIZER, max_length=300)) == "yo<|im_end|>\n"


def test_tokens_that_merge_across_the_border_do_not_change_the_prompt(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE(vocab={"<|end|>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")])
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]))
    (row,) = tokens.tokenise(rows, merging, max_length=9).rows
    assert row["input_ids"] == [1, 2, 0]  # not [3, 0]


def test_a_text_that_begins_with_the_token_of_a_beginning_gets_no_second(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 0)]
    )
    texts = ("a", "<|pad|>a")
    rows = [{"text": text} for text in texts], [{"prompt": t, "completion": "b"} for t in texts]
    for number, both in enumerate(rows):
        records = data.read(write_rows(tmp_path / f"{number}.jsonl", both))
        first, second = tokens.tokenise(records, tokenizer, max_length=9).rows
        assert first == second
        assert first["input_ids"].count(0) == 1
    assert encode(texts[0], tokenizer) == encode(texts[1], tokenizer)


def test_columns_of_other_names_can_be_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"question": "a", "answer": "b", "text": "c"}])
    assert data.read(file).kind == "text"
    rows = data.read(file, Columns(prompt="question", completion="answer"))
    assert rows.rows == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(("policy", "left"), [("truncate", 2), ("drop", 1)])
def test_too_long_examples(tmp_path: Path, policy: Any, left: int) -> None:
    lines = [{"text": "a" * 5}, {"text": "b" * 50}]
    rows = data.read(write_rows(tmp_path / "a.jsonl", lines))
    with pytest.raises(
        DataError,
        match=r"1 of 2 examples .* longer than the context of 20 tokens; .*line 2, has 51",
    ):
        tokens.tokenise(rows, TOKENIZER, max_length=20)
    examples = tokens.tokenise(rows, TOKENIZER, max_length=20, too_long=policy)
    assert len(examples) == left
    assert max(examples.lengths) <= 20
    with pytest.raises(DataError, match="Nothing is left"):
        tokens.tokenise(rows, TOKENIZER, max_length=3, too_long="drop")


def test_a_row_whose_completion_is_cut_away_is_dropped(tmp_path: Path) -> None:
    rows = data.read(
        write_rows(tmp_path / "a.jsonl", [{"prompt": "a" * 50, "completion": "b"}, ROWS[0]])
    )
    examples = tokens.tokenise(rows, TOKENIZER, max_length=20, too_long="truncate")
    assert examples.record_indices == [1]
    assert examples.dropped == 1


BAD: dict[str, tuple[str, str | bytes, str]] = {
    "not JSON": ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
    "not an object": ("a.jsonl", '{"text": "a"}\n[1]\n', r"line 2 is a JSON list"),
    "a missing column": (
        "a.jsonl",
        '{"text": "a"}\n{"texts": "b"}\n',
        r"line 2 has no column 'text'; it has 'texts'",
    ),
    "wrong columns": (
        "a.jsonl",
        '{"promt": "a", "completion": "b"}\n',
        r"'promt' looks like 'prompt'.*\n.*--prompt-column promt",
    ),
    "a number": (
        "a.jsonl",
        '{"prompt": "a", "completion": 4}\n',
        r"line 1: the column 'completion' holds a number: 4",
    ),
    "null": (
        "a.jsonl",
        '{"text": "a"}\n{"text": null}\n',
        r"line 2: the column 'text' holds a null",
    ),
    "mixed": (
        "a.jsonl",
        '{"prompt": "a", "completion": [{"role": "user", "content": "x"}]}\n',
        r"Expected: all of them text",
    ),
    "a bad message": (
        "a.jsonl",
        '{"messages": [{"role": "user"}]}\n',
        r"line 1 holds a message that is not one",
    ),
    "no messages": ("a.jsonl", '{"messages": []}\n', r"line 1 holds an empty list of messages"),
    "empty": ("a.jsonl", "\n\n", r"is empty: it holds no example"),
    "an empty CSV": ("a.csv", "text\n", r"is empty"),
    "a ragged CSV": ("a.csv", "prompt,completion\na,b\nc\n", r"line 3 has 1 fields; expected 2"),
    "a long CSV row": ("a.csv", "prompt,completion\na,b,c\n", r"line 2 has 3 fields; expected 2"),
    "not UTF-8": (
        "a.jsonl",
        '{"text": "\xe9"}\n'.encode("latin1"),
        r"not UTF-8 text: byte 10 is 0xe9",
    ),
    "half a surrogate pair": (
        "a.jsonl",
        '{"text": "\\ud83d\\ude00"}\n{"text": "ok \\uD83D"}\n',
        r"a\.jsonl, line 2, with \\ud83d, one half of a surrogate pair",
    ),
    "half a surrogate pair in .json": ("a.json", r'[{"text": "\ude00"}]', r"a\.json, with \\ude00"),
    "not Parquet": ("a.parquet", "PAR1 no", r"not a readable Parquet file"),
    "an object in .json": ("a.json", '{"text": "a"}', r"holds a JSON dict; expected a list"),
    "a broken .json": ("a.json", '[\n{"text": "a"},\n', r"line 3 is not JSON"),
    "an unknown ending": ("a.docx", "x", r"Cannot tell the format"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        data.read(path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"does not exist.*\n.*train\.jsonl"):
        data.read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"is a folder.*\n.*train\.jsonl"):
        data.read(tmp_path)
    with pytest.raises(DataError, match=r"has no column 'ask'.*\n.*--prompt-column"):
        data.read(tmp_path / "train.jsonl", Columns(prompt="ask"))
    with pytest.raises(DataError, match=r"has no column 'ask'.*it has none"):
        data.read(write_rows(tmp_path / "empty.jsonl", [{}]), Columns(prompt="ask"))


def test_an_empty_completion_has_nothing_to_learn(tmp_path: Path) -> None:
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}]))
    with pytest.raises(DataError, match="line 1 has nothing to learn from"):
        tokens.tokenise(rows, TOKENIZER, max_length=9)


def test_chat_needs_a_template(tmp_path: Path) -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    with pytest.raises(DataError, match="no chat template"):
        tokens.tokenise(rows, plain, max_length=99)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    rewriting = tiny_tokenizer()
    rewriting.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokens.tokenise(rows, rewriting, max_length=99)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path, template: str) -> None:
    refusing = tiny_tokenizer()
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        f"{template}"
    )
    refusal = r"a chat that the base's chat template refuses \(no system role\)"
    for chats in (
        [{"messages": CHAT[1:]}, {"messages": CHAT}],
        [{"prompt": CHAT[start:4], "completion": CHAT[4:]} for start in (1, 0)],
    ):
        rows = data.read(write_rows(tmp_path / "a.jsonl", chats))
        with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {refusal}"):
            tokens.tokenise(rows, refusing, max_length=300)
    with pytest.raises(DataError, match=f"prompt 2: {refusal}"):
        generate(None, refusing, [CHAT[1:4], CHAT[:4]])


def test_a_prefix_without_a_question_is_not_shown_to_the_template(tmp_path: Path) -> None:
    refusing = tiny_tokenizer()
    refusing.chat_template = (
        "{% if messages | length < 2 %}{{ raise_exception('no user') }}{% endif %}" + CHATML
    )
    rows = data.read(write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    examples = tokens.tokenise(rows, refusing, max_length=300)
    assert learnt(examples) == "yo<|im_end|>\nbye<|im_end|>\n"


def test_a_chat_among_texts_is_named(tmp_path: Path) -> None:
    lines = [{"prompt": CHAT[:4], "completion": CHAT[4:]}, {"prompt": "a", "completion": "b"}]
    for rows, message in (
        (lines, "line 2 holds text, but line 1 holds lists of messages"),
        (lines[::-1], "line 2 holds lists of messages, but line 1 holds text"),
    ):
        records = data.read(write_rows(tmp_path / "a.jsonl", rows))
        with pytest.raises(DataError, match=message):
            tokens.tokenise(records, TOKENIZER, max_length=300)


def test_calls_of_tools_are_not_compared_as_text(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked, said = [{"role": "user", "content": "1 + 1?"}], {"role": "assistant", "content": "2"}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    for row in (
        {"prompt": asked, "completion": [said], "tools": [tool]},
        {"prompt": asked, "completion": [{**said, "tool_calls": [call]}]},
    ):
        rows = data.read(write_rows(tmp_path / "rows.jsonl", [row]))
        with pytest.raises(DataError, match=r"line 1: tools.*leave out --exact"):
            exact_match_rate(None, None, rows)


GREETING = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"messages": GREETING}, {"messages": []}], GREETING),
        ([{"prompt": GREETING, "completion": []}], GREETING),
        ([{"chosen": GREETING, "rejected": []}], GREETING),
        ([{"prompt": "a longer one"}, {"prompt": "short"}, {"prompt": "a\nb"}], "short"),
        ([{"prompt": "two\nlines"}, {"prompt": " \n"}], "two\nlines"),
        (
            [
                {"prompt": "a\ttab"},
                {"prompt": "a\x1b[2J"},
                {"prompt": "\ud800"},
                {"prompt": "a " * 200},
            ],
            None,
        ),
        ([{"prompt": "", "chosen": "a", "rejected": "b"}], None),
        ([{"text": "one two three four five six seven"}], "one two three four five"),
        ([{"chosen": "one two", "rejected": "three"}], "one two"),
        ([{"words": ["a"], "labels": [1]}], None),
    ],
)
def test_a_prompt_to_show_is_of_one_short_line_if_there_is_one(
    rows: list[dict[str, Any]], expected: Any
) -> None:
    assert sample_prompt(rows) == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "input": "b", "output": "c"},
         "alpaca, whose `input` belongs.*--prompt-column instruction --completion-column output would leave"),
        ({"instruction": "a", "output": "c"}, "alpaca: --prompt-column instruction --completion-column output"),
        ({"instruction": "a", "context": "", "response": "c", "category": "d"}, "dolly, whose `context` belongs"),
        ({"conversation": [{"from": "human", "value": "a"}]}, "--messages-column conversation"),
        ({"id": 1, "talk": [{"role": "user", "content": "a"}]}, "--messages-column talk"),
        ({"id": 1, "question": "a", "answer": "b"}, "--prompt-column question --completion-column answer.*check"),
        ({"id": 1, "prompt": "a", "response": "b"}, "--prompt-column prompt --completion-column response"),
        ({"id": 1, "Question": "a", "note": "b"}, "not clear which of 'id', 'note' is the completion"),
        ({"left": "a", "right": "b"}, "not clear which of 'left', 'right' is the prompt and which the completion"),
        ({"story": "a"}, "--text-column story"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "--prompt-column question --completion-column chosen"),
    ],
)  # fmt: skip
def test_the_advice_knows_usual_columns_and_says_what_is_unsure(tmp_path, row, words):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=f"(?s){words}") as caught:
        data.read(path)
    assert "--completion-column input" not in str(caught.value)


def test_the_advice_of_other_tasks_names_no_column_at_random(tmp_path):
    raw = [("line 1", {"id": 1, "sentence": "a", "intent": "b"})]
    with pytest.raises(DataError, match="--columns text=sentence,label=intent"):
        data.select_fields(raw, "rows.jsonl", "", ("text", "label"))
    with pytest.raises(DataError, match="--columns chosen=COLUMN,rejected=COLUMN"):
        data.select_fields(raw, "rows.jsonl", "", ("chosen", "rejected"))
