"""The errors that Veneer raises on purpose, as one tree of classes; its warnings; and functions
that format their messages and rank the names that they suggest.

    VeneerError
    ├── ConfigError        ValueError       a field of a config is wrong
    ├── TargetError        ValueError       the config cannot be attached to this model
    ├── SelectionError     RuntimeError     no adapter is selected, or the selection is invalid
    ├── BankFullError      MemoryError      adapters that a bank's budget cannot hold at once
    ├── MergeError         RuntimeError     a merge or an unmerge that would lose values
    ├── CheckError         RuntimeError     the model's output does not depend on an adapter
    ├── DataError          ValueError       training data that cannot be read or used
    ├── TrainingError      ArithmeticError  a run whose loss is not finite, or that lost a process
    ├── OutputExistsError  FileExistsError  an output path that already holds something
    ├── CheckpointError    ValueError       a model's files that cannot be read
    ├── MethodError        AttributeError   another library's method, called on Veneer's object
    ├── LibraryError       LookupError      an unknown or invalid adapter name, a bad index
    ├── RemoteError        OSError          a remote address that cannot be reached, read, written
    ├── ExtractError       ValueError       two models whose difference no adapter can express
    └── AdapterError       ValueError       an adapter folder that cannot be trusted or read
        └── BaseMismatchError               an intact adapter, made for another base

    UserWarning
    ├── FreshWeights      random parameters that neither the checkpoint nor the adapter holds
    ├── NotQuantized      torch's quantisation skips an adapted layer
    ├── NotTrained        an optimiser does not train the adapter
    └── SkippedLayers     targets="all" leaves layers out

Each error is also a subclass of a built-in exception, so that ``except ValueError`` works. A
message says what was found, what was expected and what to do; a function that finds several
problems collects them and raises once.
"""

from __future__ import annotations

import difflib
import sys
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Sequence

__all__ = [
    "AdapterError", "BankFullError", "BaseMismatchError", "CheckError", "CheckpointError",
    "ConfigError", "DataError", "ExtractError", "LibraryError", "MergeError", "MethodError",
    "OutputExistsError", "RemoteError", "SelectionError", "TargetError", "TrainingError",
    "VeneerError",
]  # fmt: skip


class VeneerError(Exception):
    """The base class of Veneer's errors: catch it to catch every error that Veneer raises on
    purpose. The arguments are one message, or the three texts of ``sentence``."""

    #: whether another process of the same run raised this error first, and shows it to the user
    reported_elsewhere = False

    def __init__(self, *texts: str) -> None:
        super().__init__(sentence(*texts) if len(texts) == 3 else "".join(texts))
        self.problem = texts[0] if len(texts) == 3 else str(self)

    @property
    def found(self) -> str:
        """The text of ``problem``, under the attribute's name in earlier releases."""
        return self.problem


class ConfigError(VeneerError, ValueError):
    """A field of a config is wrong.

    - Cause: a field is misspelt, or has PEFT's name (`r`, `lora_alpha`, `target_modules`). Fix: use
      the name that the message shows; `docs/from-peft.md` lists PEFT's names beside Veneer's.
    - Cause: a value is outside of its range, or two fields contradict each other. Fix: the message
      lists every such field with the values that it takes; correct them all.
    - Cause: `RankBudget` or an optimiser of `veneer.optim` met a parameter without a gradient. Fix:
      call `backward()` before `step()`.
    """


class TargetError(VeneerError, ValueError):
    """The config cannot be attached to this model. Nothing was changed.

    - Cause: no weight of the model matches a target. Fix: compare with `[name for name, _ in
      model.named_modules()]`, or use `"all-linear"`.
    - Cause: the layer cannot carry an adapter; the message says why. Fix: leave it out of
      `targets`, or train it in full with `train_also`.
    - Cause: two parameters share memory without being tied. Fix: assign one parameter to both
      names, as the message shows.
    """


class SelectionError(VeneerError, RuntimeError):
    """No adapter, an unknown adapter or a conflicting adapter is selected for a call.

    - Cause: the model has several adapters, and a call selects none. Fix: call the model within
      `with veneer.use(model, name):`; `None` is the base.
    - Cause: a name that is not attached, or not registered in the bank. Fix: check the spelling
      against the names in the message.
    - Cause: a batch has more or fewer rows than names were given. Fix: give one name or `None` for
      each row.
    """


class BankFullError(VeneerError, MemoryError):
    """A bank's budget of bytes cannot hold the adapters that are in use at once.

    - Cause: a batch and pinned adapters need more than `capacity_bytes`. Fix: give the bank more,
      unpin adapters, or use fewer in one batch.
    - Cause: all memory is leased by calls that run for long. Fix: try again; on a server, raise
      `--memory`.
    """

    #: bytes that the adapters asked for and the pinned ones need together; None if they exceed the
    #: budget, so that waiting for leases to end cannot help
    needed_bytes: int | None = None


class MergeError(VeneerError, RuntimeError):
    """A merge or an unmerge that would lose values. Nothing was changed.

    - Cause: the base is packed in a format that cannot be written (GPTQ, AWQ, HQQ, FP8). Fix: load
      the base in a floating-point dtype, load the adapter on it and merge there.
    - Cause: merged weights were edited since the merge. Fix: undo the edit, or keep it with
      `veneer.detach(model, keep_merged=True)`.
    - Cause: adapters were merged on top of each other, and an earlier one is unmerged first. Fix:
      unmerge the last one first.
    """


class CheckError(VeneerError, RuntimeError):
    """The model's output does not depend on an attached adapter.

    - Cause: the example does not reach the layer (an expert without tokens, a branch not taken).
      Fix: check with an input that uses every adapted layer.
    - Cause: code reads the layer's weight in a way that the adapter cannot follow. Fix: leave the
      layer out of `targets`.
    """


class DataError(VeneerError, ValueError):
    """Training or evaluation data cannot be read or used.

    - Cause: rows lack the columns of the task. Fix: rename them, or map them with `columns`;
      `docs/training.md` lists each task's columns.
    - Cause: a row is longer than the context, or has nothing to learn. Fix: shorten it, or raise
      `--max-length`.
    """


class TrainingError(VeneerError, ArithmeticError):
    """A loss became infinite or not a number, or a process of the run was lost.

    - Cause: the learning rate is too high for this model and precision. Fix: lower it, lengthen the
      warm-up, or train with `--precision fp32`; the last checkpoint is intact.
    - Cause: a process or machine of the run died. Fix: start the same command again: the run
      continues from its last checkpoint.
    """


class OutputExistsError(VeneerError, FileExistsError):
    """An output path already holds something, and may not be replaced.

    - Cause: the folder holds an adapter, a model or a finished run. Fix: choose another folder, or
      pass `overwrite=True` (`--overwrite`) where the message offers it.
    - Cause: the folder holds files that Veneer did not write. Fix: choose another folder: such
      files are never replaced.
    """


class CheckpointError(VeneerError, ValueError):
    """The files of a model are missing, damaged or not understood.

    - Cause: an index names files that are not there, or a download ended early. Fix: get the whole
      model again.
    - Cause: a program wrote to the files while they were read. Fix: let it end, then start again.
    """


class MethodError(VeneerError, AttributeError):
    """A method of another library, which Veneer, a handle or an adapted model lacks.

    - Cause: code written for PEFT calls `print_trainable_parameters`, `merge_and_unload` or the
      like. Fix: call the function of Veneer that the message names.
    - Cause: a method of the model was called on the handle. Fix: call it on the model: `attach`
      works in place and returns a `Handle`.
    """


class LibraryError(VeneerError, LookupError):
    """An adapter name that a library lacks or cannot take, or a damaged index.

    - Cause: the name is not in the library. Fix: check it with `veneer list`, or add the adapter
      with `veneer add`.
    - Cause: the index of the library is damaged. Fix: run `veneer gc --rebuild`.
    """


class RemoteError(VeneerError, OSError):
    """A remote address cannot be reached, read or written.

    - Cause: no network, or the hub is unreachable. Fix: check the network, `HF_ENDPOINT` and
      `HF_HUB_OFFLINE`; a commit that was pulled before needs no network.
    - Cause: a private or gated repository. Fix: log in with `hf auth login`, and accept the terms
      on its page.
    - Cause: a package for this kind of address is missing. Fix: `pip install 'veneer[remote]'`, and
      the fsspec package that the message names.
    """


class ExtractError(VeneerError, ValueError):
    """The difference of two models cannot be written as an adapter. Nothing was written.

    - Cause: the two models are equal, or one is no fine-tune of the other. Fix: check which models
      were given.
    - Cause: weights that were asked for did not change enough. Fix: widen the targets, or keep more
      of the change.
    - Cause: a weight is not finite. Fix: get the models again.
    """


class AdapterError(VeneerError, ValueError):
    """An adapter folder is missing, damaged, altered or not understood.

    - Cause: the path is no adapter folder, or a file of it is missing. Fix: check the path; copy
      both `adapter_config.json` and `adapter_model.safetensors`.
    - Cause: the files were changed after saving, so that hashes differ. Fix: get the folder again;
      `veneer verify` lists what differs.
    - Cause: the folder holds a pickle (`adapter_model.bin`), or a tuner that Veneer does not read.
      Fix: save it as safetensors with PEFT; `docs/from-peft.md` lists the tuners.
    """


class BaseMismatchError(AdapterError):
    """An intact adapter whose base weights are not those of this model.

    - Cause: another model, revision or fine-tune was loaded. Fix: load the base that the message
      names.
    - Cause: the base is quantised, and the adapter was made for its 16-bit weights. Fix: load it
      with `load_base(…, quantize=…)`, which keeps the fingerprints of the files.
    - Cause: the base is equal in all that matters to you. Fix: pass `verify_base=False`, and
      measure the result.
    """


class FreshWeights(UserWarning):
    """Warns of parameters that neither the checkpoint nor the adapter stores. They will have other
    values when the adapter is loaded again.

    transformers initialises a new head, for example, at random: the next load makes other values.
    """

    @classmethod
    def warn(
        cls, parameters: Collection[tuple[str, str]], occasion: str, *, stacklevel: int
    ) -> None:
        """Warn of ``parameters``, each (path of its module, its name), unless there are none.
        ``occasion`` begins the message: "As the adapter is saved"."""
        if parameters:
            paths = [f"{path}.{name}".lstrip(".") for path, name in parameters]
            modules = list(dict.fromkeys(path or name for path, name in parameters))
            warnings.warn(
                f"{occasion}, {len(paths)} parameters were not in the checkpoint, and the adapter"
                f" does not hold them either: {listing(paths, 4)}. They were initialised at random"
                " as the model was loaded; the next load makes others. Train them in full"
                f" (train_also={modules[:4]!r}), unless nothing that you use reads them.",
                cls,
                stacklevel=stacklevel,
            )


class NotQuantized(UserWarning):
    """Warns of adapted layers that ``torch.ao.quantization`` leaves in floating point."""


class NotTrained(UserWarning):
    """Warns that an optimiser took a step that cannot change an adapter meant to train."""


class SkippedLayers(UserWarning):
    """``targets="all"`` left out layers that cannot carry an adapter. The message gives the reason
    for each layer."""


#: the most characters of a problem in one message, and the most problems that it lists. There is a
#: limit because a problem may quote a file of any size.
MAX_PROBLEM_LENGTH, MAX_LISTED_PROBLEMS = 2000, 50


def escape_controls(text: str) -> str:
    r"""Untrusted text in a form that is safe to print: characters that control a terminal (escape
    sequences, changes of the writing direction) become ``\x1b`` and the like. Newlines and tabs
    stay."""
    return "".join(
        ascii(character)[1:-1] if _controls_terminal(character) else character for character in text
    )


def _controls_terminal(character: str) -> bool:
    if character.isprintable() or character in "\n\t":
        return False
    # format characters that do not change the writing direction, such as joiners, are harmless
    return unicodedata.category(character) != "Cf" or unicodedata.bidirectional(character) != "BN"


def sentence(problem: str, expected: str, do: str) -> str:
    """A message in the form that all errors of Veneer have: the problem, the expectation, and the
    advice ``do``."""
    if len(problem) > MAX_PROBLEM_LENGTH:
        problem = f"{problem[:MAX_PROBLEM_LENGTH]}…"
    return f"Found: {problem}. Expected: {expected}. Do: {do}."


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut after 200 characters; its class if it has no text."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 200 else line[:199] + "…"


def raise_all(error_class: type[VeneerError], summary: str, problems: Sequence[str]) -> None:
    """Raise one ``error_class`` with ``summary`` and all ``problems``, unless there are none."""
    if len(problems) == 1:
        raise error_class(f"{summary}. {problems[0]}")
    if problems:
        listed_problems = problems[:MAX_LISTED_PROBLEMS]
        lines = [f"  {number}. {problem}" for number, problem in enumerate(listed_problems, 1)]
        if len(problems) > len(listed_problems):
            lines.append(f"  … and {len(problems) - len(listed_problems)} more")
        raise error_class("\n".join([f"{summary}: {len(problems)} problems", *lines]))


def warn_caller(message: str, category: type[Warning], within: Sequence[str] = ("veneer",)) -> None:
    """Warn, and attribute the warning to the nearest line on the stack that is outside of the
    top-level packages ``within``.

    Python shows a warning once for each line to which it is attributed. If that were a line of
    Veneer, a process would show the warning only once, for the first of all its callers."""
    frame, stack_level = sys._getframe(1), 2
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in within
    ):
        frame, stack_level = frame.f_back, stack_level + 1
    warnings.warn(message, category, stacklevel=stack_level)


def nearest(word: str, candidates: Iterable[str], limit: int = 3) -> str:
    """The text `` (nearest: 'a', 'b')``, with at most ``limit`` of the ``candidates`` that are
    spelled most like ``word``, except ``word`` itself. An empty string if none is similar."""
    other_candidates = [candidate for candidate in dict.fromkeys(candidates) if candidate != word]
    similar_words = difflib.get_close_matches(word, other_candidates, n=limit, cutoff=0.5)
    return f" (nearest: {', '.join(map(repr, similar_words))})" if similar_words else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first ``limit`` names, separated by commas, and the total if there are more; "none" if
    there are no names."""
    names = list(names)
    suffix = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + suffix if names else "none"


def format_bytes(byte_count: float) -> str:
    """A number of bytes as text, in B, KiB, MiB or GiB."""
    power = next((power for power in range(3) if byte_count < 1024 ** (power + 1)), 3)
    unit = ("B", "KiB", "MiB", "GiB")[power]
    return f"{byte_count / 1024**power:,.{min(power, 1)}f} {unit}"
