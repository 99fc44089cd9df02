"""Clients: each sends one request after another over HTTP and writes down when each token came.

A server is given as OpenAI's `/v1/completions` with streamed answers. Prompts are token ids, drawn
from a seed, so that every server gets the same work; a token is one word of the answer (see
`place`), so a chunk says how many it carries.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

#: the first ids are special tokens
FIRST_WORD = 4


@dataclass
class Answer:
    """The answer to one request. Times are in seconds of `time.perf_counter`."""

    adapter: str
    client: int
    turn: int
    sent: float
    times: list[float] = field(
        default_factory=list
    )  # of each token; tokens of one chunk came at one time
    words: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    finish: str | None = None

    @property
    def first(self) -> float:
        """Time to the first token, in seconds."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [after - before for before, after in pairwise(self.times)]


class BenchmarkError(RuntimeError):
    """A server did not do the work: a rate without it would mean nothing."""


def prompt(seed: Any, shortest: int, longest: int, vocabulary: int) -> list[int]:
    """Token ids, as many as the seed says."""
    draw = random.Random(str(seed))
    return [draw.randrange(FIRST_WORD, vocabulary) for _ in range(draw.randint(shortest, longest))]


def body(adapter: str, ids: Sequence[int], tokens: int) -> dict[str, Any]:
    return {
        "model": adapter,
        "prompt": list(ids),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def session() -> httpx.AsyncClient:
    """Connections without a limit, and no timeout but the benchmark's own."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(600),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def ask(
    http: httpx.AsyncClient, url: str, request: dict[str, Any], client: int = 0, turn: int = 0
) -> Answer:
    """Send one request and read its answer to the end; asks again after a 429, and its clock goes
    on.

    Raises:
        BenchmarkError: another status, or an answer without an end.
    """
    answer = Answer(request["model"], client, turn, time.perf_counter())
    while True:
        async with http.stream("POST", f"{url}/v1/completions", json=request) as response:
            if response.status_code == 429:
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
                continue
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise BenchmarkError(f"{url} answered {response.status_code}: {text[:500]}")
            async for chunk in events(response):
                take(answer, chunk)
        break
    if answer.finish is None or not answer.times:
        raise BenchmarkError(
            f"{url} ended the answer of {answer.adapter!r} without "
            f"{'an end' if answer.times else 'text'}"
        )
    return answer


async def events(response: httpx.Response):
    """The JSON of each server-sent event."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def take(answer: Answer, chunk: dict[str, Any]) -> None:
    """Put a chunk into the answer.

    Raises:
        BenchmarkError: the chunk is an error.
    """
    if "error" in chunk:
        raise BenchmarkError(f"{answer.adapter}: {chunk['error']}")
    if chunk.get("usage"):
        answer.usage = chunk["usage"]
    for choice in chunk.get("choices", ()):
        words = (choice.get("text") or "").split()
        answer.times += [time.perf_counter()] * len(words)
        answer.words += words
        answer.finish = choice.get("finish_reason") or answer.finish


async def together(
    url_of: Callable[[str], str],
    adapters: Sequence[str],
    *,
    clients: int,
    turns: int,
    tokens: int,
    lengths: tuple[int, int],
    vocabulary: int,
) -> tuple[list[Answer], float]:
    """All clients at once, each `turns` requests one after another, for the adapter that is its
    own.

    `url_of` gives the address that serves an adapter. Returns the answers and the seconds from the
    first request to the last token."""
    async with session() as http:

        async def run_client(client: int) -> list[Answer]:
            adapter = adapters[client % len(adapters)]
            return [
                await ask(
                    http,
                    url_of(adapter),
                    body(adapter, prompt((client, turn), *lengths, vocabulary), tokens),
                    client,
                    turn,
                )
                for turn in range(turns)
            ]

        start = time.perf_counter()
        answers = [
            answer
            for answers in await asyncio.gather(*map(run_client, range(clients)))
            for answer in answers
        ]
        return answers, time.perf_counter() - start


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds.

    Raises:
        BenchmarkError: there are fewer than two.
    """
    values = list(values)
    if len(values) < 2:
        raise BenchmarkError(
            f"{len(values)} value(s) have no percentiles: ask for more requests or loads"
        )
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": round(cuts[9] * 1000, 2), "p95": round(cuts[18] * 1000, 2)}


def summary(answers: Sequence[Answer], seconds: float, tokens: int) -> dict[str, Any]:
    """Rate and latencies of a run, in tokens a second and milliseconds.

    Raises:
        BenchmarkError: an answer is shorter than what was asked for.
    """
    counts = [answer.usage.get("completion_tokens", len(answer.words)) for answer in answers]
    if wrong_counts := sorted(count for count in counts if count != tokens):
        raise BenchmarkError(
            f"{len(wrong_counts)} of {len(answers)} answers do not have {tokens} tokens: "
            f"{wrong_counts[:10]}"
        )
    return {
        "seconds": seconds,
        "rate": len(answers) * tokens / seconds,
        "first": percentiles(answer.first for answer in answers),
        "next": percentiles(gap for answer in answers for gap in answer.gaps),
    }


def alike(answers: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """The share of tokens that are the same in both runs, up to where each answer first differs."""
    texts = {(answer.client, answer.turn): answer.words for answer in reference}
    same = total = 0
    for answer in answers:
        theirs = texts[answer.client, answer.turn]
        total += len(theirs)
        for mine, word in zip(answer.words, theirs, strict=False):
            if mine != word:
                break
            same += 1
    return same / total
