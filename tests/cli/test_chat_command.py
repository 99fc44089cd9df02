"""`veneer chat`: what is said and done, in a pipe and at a terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.commands import refused
from tests.support.forked import LARGE, Program
from tests.support.tiny import write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer as library
from veneer.cli import chat
from veneer.errors import escape_controls


@pytest.fixture(scope="module")
def other(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter of the base."""
    torch.manual_seed(0)  # its answers must not depend on which tests ran before
    model = AutoModelForCausalLM.from_pretrained(base)
    handle = library.attach(model, library.LoraConfig(rank=2))
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return handle.save(tmp_path_factory.mktemp("other") / "other")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(
    veneer: Any, monkeypatch: pytest.MonkeyPatch, base: Path, adapter: Path, other: Path
) -> Any:
    """Say lines to a chat of both adapters, in a pipe or at a terminal."""

    def run(
        *lines: str,
        options: tuple = (),
        terminal: bool = False,
        of: Path = base,
        adapters: bool = True,
    ) -> Any:
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", Terminal(text) if terminal else io.StringIO(text))
        named = ["--adapter", f"sums={adapter}", "--adapter", other] if adapters else []
        return veneer("chat", of, *named, "--max-new-tokens", 8, "--precision", "fp32", *options)

    return run


def expected(base: Path, messages: list, choice: Any, adapter: Path, other: Path) -> str:
    """The greedy answer of transformers' own generate on a model whose weights are the blend."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, folder in (("sums", adapter), ("other", other)):
        library.load(model, folder, name=name)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with library.use(model, choice), torch.no_grad():
        output = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_answers_are_those_of_who_was_chosen_with_all_that_was_said(
    talk: Any, base: Path, adapter: Path, other: Path
) -> None:
    found = talk("/system Be short.", "1+1=", "/base", "2+2=", "/blend sums=0.5 other=-0.5", "3+3=")
    assert (found.code, found.err) == (0, "")
    messages: list[Any] = [{"role": "system", "content": "Be short."}]
    answers = []
    for text, choice in (("1+1=", "sums"), ("2+2=", None), ("3+3=", {"sums": 0.5, "other": -0.5})):
        messages.append(user(text))
        answers.append(expected(base, messages, choice, adapter, other))
        messages.append(assistant(answers[-1]))
    # control characters, which a small model may answer with, are printed as escapes
    assert found.out == "".join(escape_controls(answer) + "\n" for answer in answers)


def test_both_side_by_side_and_each_goes_on_from_its_own(
    talk: Any, base: Path, adapter: Path, other: Path, tmp_path: Path
) -> None:
    found = talk(
        "/adapter other", "/both", "1+1=", "/both", "2+2=", f"/save {tmp_path / 'chat.jsonl'}"
    )
    assert found.code == 0, found.err
    first = [expected(base, [user("1+1=")], choice, adapter, other) for choice in (None, "other")]
    for text in ("base", "other"):
        assert text in found.out
    messages = [user("1+1="), assistant(first[1]), user("2+2=")]
    answer = expected(base, messages, "other", adapter, other)
    assert found.out.endswith(escape_controls(answer) + "\n")
    (line,) = (tmp_path / "chat.jsonl").read_text().splitlines()
    assert json.loads(line) == {"messages": [*messages, assistant(answer)]}


def test_reset_forgets_and_a_saved_chat_can_be_trained_on(
    talk: Any, veneer: Any, base: Path, adapter: Path, other: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chats.jsonl"
    found = talk(
        "1+1=", f"/save {file}", "/reset", "1+1=", "//x", f"/save {file}", "/quit", "not said"
    )
    first, second, third, _ = found.out.split("\n")
    assert first == second == expected(base, [user("1+1=")], "sums", adapter, other)
    assert third == expected(
        base, [user("1+1="), assistant(first), user("/x")], "sums", adapter, other
    )
    assert [len(json.loads(line)["messages"]) for line in file.read_text().splitlines()] == [2, 4]
    run = veneer(
        "train",
        "--base",
        base,
        "--data",
        file,
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
        "--no-check",
    )
    assert run.code == 0, run.err


def test_a_base_without_a_template_continues_the_text(
    talk: Any, veneer: Any, tmp_path: Path
) -> None:
    plain = write_tiny(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    found = talk("abc", "d", f"/save {tmp_path / 'texts.jsonl'}", of=plain, adapters=False)
    assert found.code == 0, found.err
    whole = json.loads((tmp_path / "texts.jsonl").read_text())["text"]
    assert whole.startswith("abc" + found.out.split("\n")[0] + "\nd")
    refused(talk("/system Be short.", of=plain, adapters=False), "without a chat template")
    refused(talk("/both", of=plain, adapters=False), "without an adapter")
    refused(talk("abc", f"/save {plain}", of=plain, adapters=False), "a file that can be written")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adaptor sums", "/adaptor.*adapter.*/help"),
        ("/adapter sum", "no adapter 'sum'.*'sums'.*sums, other"),
        ("/blend", "/blend of nothing"),
        ("/blend sums=x", "'x' in 'sums=x'"),
        ("/blend sums sums", "'sums' in 'sums', twice"),
        ("/blend nobody=1", "'nobody' in 'nobody=1'"),
        ("/save", "a file for a conversation"),
        ("/save a.jsonl", "before anything was said"),
        ("/save 'a.jsonl", "No closing quotation"),
        ("x" * 300, r"a conversation of \d+ tokens.*fewer than 256.*/reset"),
    ],
)
def test_what_cannot_be_done_ends_a_pipe_and_not_a_conversation(
    talk: Any, line: str, message: str
) -> None:
    refused(talk(line, "1+1="), message)
    monkeypatched = talk(line, "/adapter", terminal=True)
    assert monkeypatched.code == 0
    assert "Error: " in monkeypatched.err
    assert "Adapters: sums, other. sums answers." in monkeypatched.err


def test_what_the_command_line_refuses(veneer: Any, base: Path, adapter: Path) -> None:
    refused(
        veneer("chat", base, "--adapter", adapter, "--adapter", adapter),
        "two adapters called 'adapter'",
    )
    refused(veneer("chat", base, "--adapter", "x=/nowhere"), "/nowhere")


def test_a_terminal_is_told_who_answers(talk: Any) -> None:
    found = talk("/help", "/base", "/both", "/reset", "/system x", "/system", terminal=True)
    for text in ("sums answers. /help", "/blend a=0.5 b=0.5", "base answers", "base and sums answer", "Forgotten",
                 "There is no system message"):  # fmt: skip
        assert text in found.err


def test_ctrl_c_stops_an_answer_and_not_the_program(
    talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def press(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            signal.raise_signal(
                signal.SIGINT
            )  # in this thread: a process may get it in another one, later

    monkeypatch.setattr(chat, "_print_now", press)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it
    try:
        found = talk("a b c d", "1+1=", options=("--system", "x"), terminal=True)
        assert found.code == 0
        assert "(stopped)" in found.err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


PIPED = """
import os, sys
os.dup2(os.open({lines!r}, os.O_RDONLY), 0)
os.dup2(os.open({answers!r}, os.O_WRONLY), 1)
sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
sys.argv = {command}
from veneer.cli import main
main()
"""


def test_in_a_pipe_it_streams_and_goes_on(base: Path, adapter: Path, tmp_path: Path) -> None:
    """As a program: an answer comes before the next line is said."""
    os.mkfifo(lines := tmp_path / "lines")
    os.mkfifo(answers := tmp_path / "answers")
    command = ["veneer", "chat", str(base), "--adapter", str(adapter), "--max-new-tokens", "5"]
    program = Program(PIPED.format(lines=str(lines), answers=str(answers), command=command), *LARGE)
    with lines.open("w") as said, answers.open() as answered:
        print("1+1=", file=said, flush=True)
        assert answered.readline()
        print("/base\n2+2=", file=said, flush=True)
        assert answered.readline()
        said.close()
        assert program.wait(60) == 0
    assert "Error" not in program.said
