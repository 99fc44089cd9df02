"""Match module paths, or their last segments, with the regular expressions of a PEFT config. The
result is that of ``re``, but matching stops with an error at a time limit.

Configs are untrusted. A backtracking matcher takes 2ⁿ steps for ``(a|a)*b`` on n letters, and
``re`` cannot be interrupted. The package ``regex`` supports a time limit. It accepts more syntax
than ``re``: therefore ``re`` compiles each expression first, and an expression with a construct
that ``re`` and ``regex`` interpret differently is refused.

Rejected: a matcher in linear time (RE2), because it lacks look-around, which the targets of real
adapters use; and ``re`` in another process that can be killed, because starting a process costs
tens of milliseconds at each load.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from math import prod
from typing import Any

from veneer.errors import AdapterError

#: the largest number of characters of all expressions of a field, and of one expression when each
#: counted repetition ``{n}`` is written out n times
MAX_FIELD_CHARS, MAX_EXPANDED_CHARS = 4096, 100_000
#: the largest number of characters of an expression that ``re`` compiles, which takes a tenth of a
#: second for an expression of this length
MAX_SOURCE_CHARS = 65_536
#: seconds for matching all expressions of a field, and further seconds for each path matched
MAX_SECONDS, SECONDS_PER_PATH = 0.5, 1e-4

#: a counted repetition, such as {3} or {2,5}
_REPEAT = re.compile(r"\{(\d*)(?:,\d*)?\}")


class TooSlowError(AdapterError):
    """Matching an expression exceeded the time limit."""


class Expressions:
    """Several regular expressions that share one time limit. The methods raise ``TooSlowError``
    when the time is up.

    Args:
        sources: the text of each expression.
        template: a text in which "{}" stands for the expression.
        full_match: whether an expression must match a whole text, not its beginning.

    Raises:
        ValueError: an expression is invalid or too large, or ``re`` and ``regex`` interpret it
            differently.
    """

    def __init__(
        self, sources: Iterable[str], template: str = "{}", *, full_match: bool = True
    ) -> None:
        sources = tuple(sources)
        length = sum(map(len, sources))
        if length > MAX_FIELD_CHARS:
            raise ValueError(
                f"expressions of {length:,} characters, of {MAX_FIELD_CHARS:,} at most"
            )
        self._matchers = [
            _compile(template.replace("{}", source), full_match) for source in sources
        ]
        self._seconds_left = MAX_SECONDS

    def matching(self, text: str) -> Iterator[int]:
        """The indices of the expressions that match a text, in ascending order."""
        return (
            index
            for index, matcher in enumerate(self._matchers)
            if self._matches_in_time(matcher, text)
        )

    def match_any(self, text: str) -> bool:
        return next(self.matching(text), None) is not None

    def _matches_in_time(self, matcher: Callable[..., Any], text: str) -> bool:
        start_seconds = time.thread_time()
        try:
            match = matcher(text, timeout=self._seconds_left)
        except TimeoutError:
            match, self._seconds_left = None, 0.0
        self._seconds_left = min(
            MAX_SECONDS, self._seconds_left + SECONDS_PER_PATH + start_seconds - time.thread_time()
        )
        if self._seconds_left <= SECONDS_PER_PATH:  # too little time to match another path
            self._seconds_left = SECONDS_PER_PATH
            raise TooSlowError(
                "an expression that takes longer than any that people use",
                "a plain regular expression",
                "name the modules by the ends of their paths",
            )
        return match is not None


def _compile(source: str, full_match: bool) -> Callable[..., Any]:
    """Compile an expression with ``regex``, and return its method ``fullmatch`` or ``match``.
    ``ValueError``: it is invalid, too large, or ``re`` and ``regex`` interpret it differently."""
    import regex

    flags = compile_flags(source)
    unescaped = re.sub(r"\\.", "", source, flags=re.DOTALL)
    repeat_counts = [int(count or 0) for count in _REPEAT.findall(unescaped)]
    if len(source) * prod(max(count, 1) for count in repeat_counts) > MAX_EXPANDED_CHARS:
        raise ValueError("an expression that repeats too often")
    if "{" in _REPEAT.sub("", unescaped):
        raise ValueError("an expression with a brace that is not escaped and no repetition")
    if "[:" in unescaped or flags & re.VERBOSE or re.search(r"\(\?[a-z]*x", unescaped):
        raise ValueError("an expression with a character class by name, or with the flag x")
    try:
        compiled = regex.compile(source)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"an expression that is not supported ({error})") from error
    return compiled.fullmatch if full_match else compiled.match


def compile_flags(source: str) -> int:
    """The flags with which ``re`` compiles an expression. ``ValueError``: ``re`` refuses it."""
    if len(source) > MAX_SOURCE_CHARS:
        raise ValueError(
            f"an expression of {len(source):,} characters, of {MAX_SOURCE_CHARS:,} at most"
        )
    try:
        return re.compile(source).flags
    # a FutureWarning of ``re`` is raised where the process turns warnings into errors
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise ValueError(f"no regular expression ({error})") from error


@lru_cache(maxsize=256)
def full_matcher(source: str) -> Callable[[str], bool]:
    """A cached function that tells whether an expression matches a whole text.

    If the expression is a plain list of alternatives, the function looks the text up in a set.
    (Veneer writes such a list as ``target_modules`` if no list of path ends would do.) Raises
    ValueError as ``Expressions`` does."""
    words = {literal(alternative) for alternative in source.split("|")}
    return Expressions((source,)).match_any if None in words else words.__contains__


@lru_cache(maxsize=256)
def layer_containers(sources: tuple[str, ...]) -> Expressions:
    """Matchers of PEFT's ``layers_pattern``: regular expressions for the modules that contain the
    numbered layers, each matched at the end of a path. Raises ValueError as ``Expressions``
    does."""
    return Expressions(sources, r"(.*\.)?{}")


class PathEndings:
    r"""Find the first of several expressions that matches the end of a path, as PEFT looks up a
    rank or alpha: ``(.*\.)?(expression)$``.

    Most of these expressions are full paths. Veneer escapes their dots, so that a dict finds them.
    PEFT writes the dots unescaped; such an expression has nothing over which ``re`` could
    backtrack, and needs no time limit."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.sources = tuple(sources)
        self._indices_by_path: dict[str, int] = {}
        self._plain_matchers: list[tuple[int, Callable[[str], Any]]] = []
        self._complex_indices: list[int] = []
        for index, source in enumerate(self.sources):
            path = literal(source)
            if path is not None:
                self._indices_by_path.setdefault(path, index)
            elif _PLAIN.fullmatch(source):
                self._plain_matchers.append((index, re.compile(rf"(.*\.)?({source})$").match))
            else:
                self._complex_indices.append(index)
        self._expressions = Expressions(
            (self.sources[index] for index in self._complex_indices),
            r"(.*\.)?({})$",
            full_match=False,
        )

    def first_match(self, path: str) -> str | None:
        """The first expression that matches the end of ``path``; None if none does."""
        segments = path.split(".")
        endings = (".".join(segments[start:]) for start in range(len(segments)))
        indices = [
            self._indices_by_path[ending] for ending in endings if ending in self._indices_by_path
        ]
        indices += next(([index] for index, matcher in self._plain_matchers if matcher(path)), [])
        indices += next(
            ([self._complex_indices[index]] for index in self._expressions.matching(path)), []
        )
        return self.sources[min(indices)] if indices else None


#: matches an expression without alternatives and repetitions, for which ``re`` cannot backtrack
_PLAIN = re.compile(r"\^?(?:[\w\-/. ]|\\[.\-/ ])+")


path_endings = lru_cache(maxsize=16)(PathEndings)


def literal(source: str) -> str | None:
    """The only text that an expression matches, or None if it may match several texts. An unescaped
    dot matches any character, so an expression that contains one may match several."""
    unescaped_text = re.sub(r"\\(.)", r"\1", source)
    return unescaped_text if re.escape(unescaped_text) == source else None
