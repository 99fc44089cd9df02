"""The regular expressions of a PEFT config, matched in time that grows with the length of a path alone.

A config comes from strangers, and Python's ``re`` goes back over its choices: ``(a|a)*b`` takes 2ⁿ steps on n letters,
and nothing can stop it, as it holds the interpreter all the while. So an expression is taken apart by Python's own
parser and run as a set of states, all choices at once (Thompson 1968, "Regular Expression Search Algorithm"):

    "(.*\\.)?q_proj"   →   states   →   after each character the set of states that it may be in

Each step from one set to the next is kept, so that paths with a common beginning share it. What a set of states cannot
express (looking ahead or behind, references to groups, atomic groups, flags) is refused, with the reason.

Rejected: to refuse expressions by their looks. Those that people use have four ``.*?`` in a row, which no rule lets
through that also keeps out what takes minutes. And a time limit would need a process for each load.
"""

from __future__ import annotations

import re
import re._constants as op  # pyright: ignore[reportMissingImports]
import re._parser as parser  # pyright: ignore[reportMissingImports]
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from veneer.errors import AdapterError, sentence

#: characters of one expression, and states of all expressions of a config together
MAX_LENGTH, MAX_STATES = 4096, 5000
#: states that one expression may go through in all (some seconds), and that are kept (some tens of MB)
MAX_WORK, MAX_KEPT = 20_000_000, 500_000

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_WORD = _CATEGORIES[op.CATEGORY_WORD]
#: whether an anchor holds between two characters, of which "" stands for none
_ANCHORS: dict[Any, Callable[[str, str], bool]] = {
    op.AT_BEGINNING: lambda before, after: not before,
    op.AT_BEGINNING_STRING: lambda before, after: not before,
    op.AT_END: lambda before, after: not after,
    op.AT_END_STRING: lambda before, after: not after,
    op.AT_BOUNDARY: lambda before, after: _word(before) != _word(after),
    op.AT_NON_BOUNDARY: lambda before, after: bool(before or after) and _word(before) == _word(after),
}


def _word(character: str) -> bool:
    return bool(character) and _WORD(character)


class Pattern:
    """One expression as states. ``matches`` says what ``re.match`` says, or ``re.fullmatch`` if ``whole``, of a text
    without line breaks.

    Raises:
        ValueError: it is no regular expression, or one that states cannot express.
        AdapterError: of ``matches``: many states on many paths, which together would take minutes.
    """

    def __init__(self, source: str, whole: bool = False) -> None:
        self._whole = whole
        if len(source) > MAX_LENGTH:
            raise ValueError(f"an expression of {len(source):,} characters, of {MAX_LENGTH:,} at most")
        try:
            tree = parser.parse(source)
        except (re.error, RecursionError, OverflowError, FutureWarning) as error:  # a warning, if those are errors
            raise ValueError(f"no regular expression ({error})") from error
        if tree.state.flags != re.UNICODE.value:
            raise ValueError("an expression with flags")
        # a state is (test, anchor, the states after it); one without a test takes no character
        self._states: list[tuple[Any, Any, list[int]]] = []
        self._sequences = 0
        self._end = self._add(None, None, [])
        try:
            self._start = self._sequence(tree, self._end)
        except RecursionError as error:
            raise ValueError("an expression that is nested too deeply") from error
        self._steps: dict[tuple[frozenset[int], str, str], tuple[frozenset[int], bool]] = {}
        self._work = self._kept = 0

    @property
    def size(self) -> int:
        return len(self._states)

    def matches(self, text: str) -> bool:
        current, before = frozenset((self._start,)), ""
        for character in (*text, ""):
            key = (current, before, character)
            if key not in self._steps:
                if self._kept > MAX_KEPT:
                    self._steps.clear()
                    self._kept = 0
                self._steps[key] = self._step(*key)
                self._kept += 1 + len(self._steps[key][0])
            current, ended = self._steps[key]
            if ended and (not self._whole or not character):
                return True
            before = character
        return False

    def _step(self, current: frozenset[int], before: str, character: str) -> tuple[frozenset[int], bool]:
        """(the states after one more character, whether the expression has matched before it)."""
        waiting, seen, after = list(current), set(current), set()
        if self._work > MAX_WORK:
            found = (
                f"an expression of {self.size:,} states, and paths on which it takes longer than any that people use"
            )
            raise AdapterError(sentence(found, "a plain regular expression", "name the modules by their ends"))
        while waiting:
            test, anchor, following = self._states[waiting.pop()]
            if test is not None:
                if character and test(character):
                    after.update(following)
            elif anchor is None or anchor(before, character):
                waiting += [state for state in following if state not in seen]
                seen.update(following)
        self._work += len(seen)
        return frozenset(after), self._end in seen

    def _add(self, test: Any, anchor: Any, following: list[int]) -> int:
        if len(self._states) >= MAX_STATES:
            raise ValueError(f"an expression with more than {MAX_STATES:,} states")
        self._states.append((test, anchor, following))
        return len(self._states) - 1

    def _sequence(self, items: Any, then: int) -> int:
        """The first state of a sequence that goes on with ``then``."""
        self._sequences += 1
        if self._sequences > 4 * MAX_STATES:  # repetitions of nothing, such as ((){99}){99}, make no states
            raise ValueError("an expression that repeats too often")
        for code, value in reversed(list(items)):
            then = self._item(code, value, then)
        return then

    def _item(self, code: Any, value: Any, then: int) -> int:
        test = _test(code, value)
        if test is not None:
            return self._add(test, None, [then])
        if code is op.AT and value in _ANCHORS:
            return self._add(None, _ANCHORS[value], [then])
        if code is op.BRANCH:
            return self._add(None, None, [self._sequence(branch, then) for branch in value[1]])
        if code is op.SUBPATTERN and not value[1] and not value[2]:
            return self._sequence(value[3], then)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(value[0], value[1], value[2], then)
        raise ValueError(f"an expression with {str(code).lower()}, which is not supported")

    def _repeat(self, least: int, most: Any, items: Any, then: int) -> int:
        if most is op.MAXREPEAT:
            following: list[int] = [then]
            again = self._add(None, None, following)
            following.append(self._sequence(items, again))
            then = again
        else:
            for _ in range(most - least):
                then = self._add(None, None, [then, self._sequence(items, then)])
        for _ in range(least):
            then = self._sequence(items, then)
        return then


def _test(code: Any, value: Any) -> Callable[[str], bool] | None:
    """Whether one character is meant, for what means one; else None."""
    if code is op.LITERAL:
        return chr(value).__eq__
    if code is op.NOT_LITERAL:
        return chr(value).__ne__
    if code is op.ANY:
        return lambda character: character != "\n"
    if code is not op.IN:
        return None
    negate = value[0][0] is op.NEGATE
    tests = [_member(*item) for item in value[negate:]]
    return lambda character: any(test(character) for test in tests) != negate


def _member(code: Any, value: Any) -> Callable[[str], bool]:
    if code is op.CATEGORY:
        return _CATEGORIES[value]
    if code is op.RANGE:
        return lambda character: value[0] <= ord(character) <= value[1]
    return chr(value).__eq__


class Words:
    """Whole texts, one of which is meant: what Veneer writes where the ends of paths do not suffice."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(words)

    def matches(self, text: str) -> bool:
        return text in self._words


@lru_cache(maxsize=256)
def whole(source: str) -> Pattern | Words:
    """What whole texts an expression means, made once. Raises ValueError as ``Pattern`` does."""
    words = [literal(part) for part in source.split("|")]
    if None not in words:
        return Words(word for word in words if word is not None)
    return Pattern(source, whole=True)


class Ends:
    """Which of several expressions first means a path, as PEFT looks a rank up: ``(.*\\.)?(expression)$``.

    Most are whole paths. With their dots escaped, as Veneer writes them, they are looked up. Without, as PEFT does,
    they make no choice that ``re`` could go back over."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.sources = tuple(sources)
        self._words: dict[str, int] = {}
        self._others: list[tuple[int, Callable[[str], Any]]] = []
        states = 0
        for number, source in enumerate(self.sources):
            word, expression = literal(source), rf"(.*\.)?({source})$"
            if word is not None:
                self._words.setdefault(word, number)
            elif _PLAIN.fullmatch(source):
                self._others.append((number, re.compile(expression).match))
            else:
                pattern = Pattern(expression)
                self._others.append((number, pattern.matches))
                states += pattern.size
        if states > MAX_STATES:
            raise ValueError(f"expressions with {states:,} states, of {MAX_STATES:,} at most")

    def first(self, path: str) -> str | None:
        parts = path.split(".")
        below = (".".join(parts[start:]) for start in range(len(parts)))
        found = min((self._words[end] for end in below if end in self._words), default=len(self.sources))
        for number, matches in self._others:
            if number >= found:
                break
            if matches(path):
                return self.sources[number]
        return self.sources[found] if found < len(self.sources) else None


#: what has neither a choice nor a repetition
_PLAIN = re.compile(r"\^?(?:[\w\-/. ]|\\[.\-/ ])+")


@lru_cache(maxsize=16)
def ends(sources: tuple[str, ...]) -> Ends:
    return Ends(sources)


def literal(source: str) -> str | None:
    """The one text that an expression means, or None if it may mean several. A dot that is not escaped means any
    character, as it does to PEFT."""
    word = re.sub(r"\\(.)", r"\1", source)
    return word if re.escape(word) == source else None
