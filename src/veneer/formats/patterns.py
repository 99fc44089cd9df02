"""The regular expressions of a PEFT config, evaluated as ``re`` does but with a time limit.

Configs are untrusted, and a backtracking matcher takes 2ⁿ steps for ``(a|a)*b`` on n letters,
during which ``re`` cannot be interrupted. The package ``regex`` supports a time limit. It accepts
more than ``re``, so ``re`` compiles each expression first, and the few constructs that the two
interpret differently are refused.

Rejected: a matcher in linear time (RE2), because it lacks look-around, which adapters use in their
targets; and ``re`` in another process that can be killed, because that costs each load tens of
milliseconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from math import prod
from typing import Any

from veneer.errors import AdapterError

#: the most characters of all expressions of a field, and of the expression in which counted
#: repetitions are written out
MAX_LENGTH, MAX_COPIES = 4096, 100_000
#: the most characters of an expression that is compiled, which takes ``re`` a tenth of a second
MAX_READ = 65_536
#: seconds for all expressions of a field, and additional seconds for each path
SECONDS, PER_PATH = 0.5, 1e-4

_REPEAT = re.compile(r"\{(\d*)(?:,\d*)?\}")


class TooSlowError(AdapterError):
    """Matching an expression exceeded the time limit."""


class Expressions:
    """Several expressions that share one time limit. ``ValueError``: an expression is invalid, is
    interpreted differently by ``regex`` and ``re``, or is too large. ``matching`` raises
    ``TooSlowError`` when the time is up."""

    def __init__(
        self, sources: Iterable[str], written: str = "{}", *, full_match: bool = True
    ) -> None:
        sources = tuple(sources)
        length = sum(map(len, sources))
        if length > MAX_LENGTH:
            raise ValueError(f"expressions of {length:,} characters, of {MAX_LENGTH:,} at most")
        self._matchers = [_compile(written.replace("{}", source), full_match) for source in sources]
        self._seconds_left = SECONDS

    def matching(self, text: str) -> Iterator[int]:
        """The indices of the expressions that match a text, in their order."""
        return (
            number
            for number, matcher in enumerate(self._matchers)
            if self._matches_in_time(matcher, text)
        )

    def matches(self, text: str) -> bool:
        return next(self.matching(text), None) is not None

    def _matches_in_time(self, matcher: Callable[..., Any], text: str) -> bool:
        start = time.thread_time()
        try:
            match = matcher(text, timeout=self._seconds_left)
        except TimeoutError:
            match, self._seconds_left = None, 0.0
        self._seconds_left = min(
            SECONDS, self._seconds_left + PER_PATH + start - time.thread_time()
        )
        if self._seconds_left <= PER_PATH:  # too little time for one more path
            self._seconds_left = PER_PATH
            wrong = "an expression that takes longer than any that people use"
            raise TooSlowError(
                wrong, "a plain regular expression", "name the modules by the ends of their paths"
            )
        return match is not None


def _compile(source: str, full_match: bool) -> Callable[..., Any]:
    """``fullmatch`` or ``match`` of an expression, with ``regex``."""
    import regex

    flags = readable(source)
    plain = re.sub(r"\\.", "", source, flags=re.DOTALL)
    counts = [int(count or 0) for count in _REPEAT.findall(plain)]
    if len(source) * prod(max(count, 1) for count in counts) > MAX_COPIES:
        raise ValueError("an expression that repeats too often")
    if "{" in _REPEAT.sub("", plain):
        raise ValueError("an expression with a brace that is not escaped and no repetition")
    if "[:" in plain or flags & re.VERBOSE or re.search(r"\(\?[a-z]*x", plain):
        raise ValueError("an expression with a character class by name, or with the flag x")
    try:
        compiled = regex.compile(source)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"an expression that is not supported ({error})") from error
    return compiled.fullmatch if full_match else compiled.match


def readable(source: str) -> int:
    """The flags of an expression, if ``re`` can read it; else ``ValueError``."""
    if len(source) > MAX_READ:
        raise ValueError(f"an expression of {len(source):,} characters, of {MAX_READ:,} at most")
    try:
        return re.compile(source).flags
    except (
        re.error,
        RecursionError,
        OverflowError,
        FutureWarning,
    ) as error:  # a warning, if warnings are errors
        raise ValueError(f"no regular expression ({error})") from error


@lru_cache(maxsize=256)
def matcher_of_whole_texts(source: str) -> Callable[[str], bool]:
    """A cached test for full matches of an expression. A plain list of alternatives, which Veneer
    writes if the ends of paths do not suffice, becomes a set. Raises ValueError as ``Expressions``
    does."""
    words = {literal(alternative) for alternative in source.split("|")}
    return Expressions((source,)).matches if None in words else words.__contains__


@lru_cache(maxsize=256)
def containers(sources: tuple[str, ...]) -> Expressions:
    """The expressions of ``layers_pattern``, each matched at the end of a path."""
    return Expressions(sources, r"(.*\.)?{}")


class Ends:
    r"""Find the first of several expressions that matches the end of a path, as PEFT looks up a
    rank: ``(.*\.)?(expression)$``. Most are full paths. If their dots are escaped, as Veneer writes
    them, they are looked up in a dict; if not, as PEFT writes them, they contain nothing over which
    ``re`` could backtrack."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.sources = tuple(sources)
        self._words: dict[str, int] = {}
        self._plain: list[tuple[int, Callable[[str], Any]]] = []
        self._complex: list[int] = []
        for number, source in enumerate(self.sources):
            word = literal(source)
            if word is not None:
                self._words.setdefault(word, number)
            elif _PLAIN.fullmatch(source):
                self._plain.append((number, re.compile(rf"(.*\.)?({source})$").match))
            else:
                self._complex.append(number)
        self._expressions = Expressions(
            (self.sources[n] for n in self._complex), r"(.*\.)?({})$", full_match=False
        )

    def first(self, path: str) -> str | None:
        segments = path.split(".")
        below = (".".join(segments[start:]) for start in range(len(segments)))
        indices = [self._words[end] for end in below if end in self._words]
        indices += next(([number] for number, matches in self._plain if matches(path)), [])
        indices += next(([self._complex[index]] for index in self._expressions.matching(path)), [])
        return self.sources[min(indices)] if indices else None


#: expressions without alternatives and repetitions
_PLAIN = re.compile(r"\^?(?:[\w\-/. ]|\\[.\-/ ])+")


ends = lru_cache(maxsize=16)(Ends)


def literal(source: str) -> str | None:
    """The only text that an expression matches, or None if it may match several. An unescaped dot
    matches any character, as in PEFT."""
    word = re.sub(r"\\(.)", r"\1", source)
    return word if re.escape(word) == source else None
