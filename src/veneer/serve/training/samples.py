"""Samples, and what the model says of a prompt: by the engine, from the numbers that a run
published.

    asample → promise; the engine's queue (fair, full: it waits here) → tokens with their
    log-probabilities
                        the training thread, between two batches → log-probabilities of the prompt

Log-probabilities are the model's own, before temperature, top_k and top_p, as those of a training
pass are.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.errors import DataError, VeneerError, sentence
from veneer.kernels.draws import sample_seed
from veneer.serve.requests import Busy, Piece, Request, RequestError, Sampling
from veneer.serve.training.bodies import Sample, Targets
from veneer.serve.training.wire import Sequence_, sample_output
from veneer.serve.training.worker import Answer, Worker, failure

log = logging.getLogger("veneer.serve.training")

#: samples that wait or run, and calls that are kept for their clients, so many seconds
MOST_WAITING, MOST_KEPT, KEPT_SECONDS = 16384, 4096, 1800.0
# : samples of a key in the engine, or that try for a place there, for each row of its; seconds
# between two tries
TRYING, PATIENCE = 4, 0.05


@dataclass(eq=False)
class Usage:
    """Tokens of a call that were computed: its prompt once, and its answers."""

    tokens: int = 0


@dataclass(eq=False)
class Promised:
    """A call for samples, of an owner and a session."""

    owner: str
    session: str
    count: int
    task: asyncio.Task[Answer]
    ended: float | None = None


class Samples:
    """Calls for samples by their ids; the event loop's alone."""

    def __init__(self, engine: Any, bank: Any, worker: Worker, timeout: float) -> None:
        self._engine, self._bank, self._worker, self._timeout = engine, bank, worker, timeout
        self._calls: dict[str, Promised] = {}
        self._numbers = itertools.count()
        self._gates: dict[str, asyncio.Semaphore] = {}  # by owner
        self._loop: asyncio.AbstractEventLoop | None = None

    def most_tokens(self, request: Sample) -> int:
        """Tokens that a call takes of a quota at most: its prompt, and the longest answers that it
        allows."""
        size, limit = len(request.prompt.tokens), self._engine.length
        remaining = max(0, limit - size)
        return size + request.num_samples * min(
            remaining, request.sampling_params.max_tokens or remaining
        )

    def begin(
        self,
        id: str,
        owner: str,
        session: str,
        name: str | None,
        request: Sample,
        charge: Callable[[int], None] = lambda used: None,
    ) -> None:
        """``name``: the bank's, of the adapter; None for the base. ``charge`` is called with the
        tokens of prompt and answers that were computed. ``Busy``: too many wait. The same id again
        is the same call."""
        if id in self._calls:
            charge(0)
            return
        waiting = [call for call in self._calls.values() if not call.task.done()]
        room = MOST_WAITING - sum(call.count for call in waiting)
        if owner:  # a key has at most as many as are left for others
            room = min(room, room - sum(call.count for call in waiting if call.owner == owner))
        if room < request.num_samples:
            charge(0)
            raise Busy(
                sentence(
                    "too many samples that wait",
                    f"at most {MOST_WAITING:,}",
                    "try again in a second",
                ),
                1.0,
            )
        self._loop = asyncio.get_running_loop()
        usage = Usage()
        task = self._loop.create_task(self._answer(owner, name, request, usage))
        call = self._calls[id] = Promised(owner, session, request.num_samples, task)

        def over(_: Any) -> None:
            call.ended = time.monotonic()
            charge(usage.tokens)
            self._forget()

        task.add_done_callback(over)

    def find(self, id: str, owner: str) -> asyncio.Task[Answer] | None:
        call = self._calls.get(id)
        return None if call is None or call.owner != owner else call.task

    def cancel(self, id: str, owner: str) -> None:
        if (task := self.find(id, owner)) is not None:
            task.cancel()

    def leave_soon(self, session: str) -> None:
        """``leave``, from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.leave, session)

    def leave(self, session: str) -> None:
        """The client of a session is gone."""
        for call in self._calls.values():
            if call.session == session:
                call.task.cancel()

    def _forget(self) -> None:
        old = time.monotonic() - KEPT_SECONDS
        ended = [id for id, call in self._calls.items() if call.ended is not None]
        gone = [id for id in ended if (self._calls[id].ended or 0.0) < old]
        for id in dict.fromkeys([*gone, *ended[: max(0, len(ended) - MOST_KEPT)]]):
            del self._calls[id]

    async def _answer(self, owner: str, name: str | None, request: Sample, usage: Usage) -> Answer:
        try:
            prompt, blend = request.prompt.tokens, {} if name is None else {name: 1.0}
            if not 0 < len(prompt) < self._engine.length:
                found = f"a prompt of {len(prompt)} tokens"
                raise DataError(
                    found, f"1 to {self._engine.length - 1}, and room for an answer", "shorten it"
                )
            if max(prompt) >= self._worker.vocabulary:
                found = f"token {max(prompt)} in a prompt"
                raise DataError(
                    found,
                    f"ids from 0 to {self._worker.vocabulary - 1}",
                    "use the base's tokenizer",
                )
            check_prompt(request, len(prompt))
            sequences = asyncio.gather(
                *[
                    self._sequence(owner, blend, request, i, usage)
                    for i in range(request.num_samples)
                ]
            )
            usage.tokens = len(prompt)
            scored = self._scores(name, prompt, request)
            try:
                found, scores = await asyncio.gather(sequences, scored)
            except BaseException:
                sequences.cancel()
                raise
            return Answer(sample_output(found, request.topk_sample_logprobs, scores), True)
        except VeneerError as error:
            return failure(error)
        except Exception as error:
            log.exception("a call for samples failed")
            return failure(error, own=True)

    async def _sequence(
        self, owner: str, blend: Mapping[str, float], body: Sample, number: int, usage: Usage
    ) -> Sequence_:
        """One sample. If it is cancelled, the engine stops."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        request = Request(
            body.prompt.tokens, blend, _sampling(body, number, self._engine.length), self._timeout,
            f"sample-{next(self._numbers)}", owner,
        )  # fmt: skip

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async with self._gates.setdefault(owner, asyncio.Semaphore(TRYING * self._engine.rows)):
            tokens, piece = await self._drawn(request, deliver, pieces, usage)
        if piece.finish not in ("stop", "length"):
            raise RequestError(
                piece.error or f"a sample that ended by {piece.finish}", "an answer", "try again"
            )
        top = [[(id, logprob) for id, _, logprob in token.top] for token in tokens]
        return Sequence_(
            [token.id for token in tokens],
            [token.logprob for token in tokens],
            top,
            piece.finish == "length",
        )

    async def _drawn(
        self,
        request: Request,
        deliver: Callable[[Piece], None],
        pieces: asyncio.Queue[Piece],
        usage: Usage,
    ) -> tuple[list[Any], Piece]:
        """The tokens of a sample, and the last piece of it."""
        while True:
            try:
                state = self._engine.submit(request, deliver)
                break
            except Busy:
                if not self._engine.ready:
                    raise
                await asyncio.sleep(PATIENCE)
        tokens: list[Any] = []
        try:
            while True:
                piece = await pieces.get()
                tokens += piece.tokens
                usage.tokens += len(piece.tokens)
                if piece.finish is not None:
                    return tokens, piece
        except asyncio.CancelledError:
            state.cancel()
            raise

    async def _scores(
        self, name: str | None, prompt: tuple[int, ...], request: Sample
    ) -> dict[str, Any]:
        wanted = (
            request.prompt_logprobs
            or request.topk_prompt_logprobs
            or request.target_prompt_logprobs
        )
        if not (wanted or request.prompt_alt_tokens_k):
            return {}
        if name is None:
            return await self._scored(None, prompt, request)
        leasing = self._bank.acquire(
            {name: 1.0}
        )  # before the turn at the model: see the order of locks
        try:
            lease = await asyncio.shield(asyncio.wrap_future(leasing))
        except asyncio.CancelledError:
            leasing.add_done_callback(_release)
            raise
        return await self._scored(lease, prompt, request)

    async def _scored(self, lease: Any, prompt: tuple[int, ...], request: Sample) -> dict[str, Any]:
        scored = self._worker.do(scorer(self._worker, lease, prompt, request))
        if lease is not None:
            scored.add_done_callback(lambda _: lease.release())
        return await asyncio.shield(asyncio.wrap_future(scored))


def _release(leasing: Future[Any]) -> None:
    if leasing.exception() is None:
        leasing.result().release()


def check_prompt(request: Sample, size: int) -> None:
    """``DataError``: what is asked of a prompt of so many tokens is none of it, or not to be had
    here."""
    last, targets = request.prompt_logprobs_last_n, request.target_prompt_logprobs
    if request.record_stability_info:
        raise DataError(
            "record_stability_info", "none: there is no stable_reinforce here", "leave it out"
        )
    if last is not None and not (request.prompt_logprobs and last < size):
        problem = f"prompt_logprobs_last_n {last} for a prompt of {size} tokens"
        raise DataError(problem, f"1 to {size - 1}, with prompt_logprobs", "change it")
    if targets is None:
        return
    rows, width = targets.shape
    crow, col = targets.sparse_crow_indices, targets.sparse_col_indices
    sound = rows == size - 1 and 0 < width <= 256
    if crow is None or col is None:
        sound = sound and crow is col is None and len(targets.data) == rows * width
    else:
        sound = sound and len(crow) == rows + 1 and len(col) == len(targets.data) and crow[0] == 0
        sound = (
            sound
            and crow[-1] == len(col)
            and sorted(crow) == crow
            and all(0 <= index < width for index in col)
        )
    if not sound:
        problem = f"target_prompt_logprobs {targets.shape} for a prompt of {size} tokens"
        raise DataError(
            problem,
            f"[{size - 1}, at most 256], dense or in CSR",
            "send a row for each token but the first",
        )


def _sampling(request: Sample, number: int, most: int) -> Sampling:
    params, stop = request.sampling_params, request.sampling_params.stop
    stops = [stop] if isinstance(stop, str) else stop or ()
    words = [value for value in stops if isinstance(value, str)]
    ids = frozenset(value for value in stops if isinstance(value, int))
    return Sampling(
        max_tokens=params.max_tokens or most, temperature=params.temperature, top_p=params.top_p,
        top_k=max(params.top_k, 0), seed=None if params.seed is None else sample_seed(params.seed, number),
        stop=tuple(filter(None, words)),
        logprobs=request.topk_sample_logprobs, ignore_eos=stop == [], stop_tokens=ids,
    )  # fmt: skip


def scorer(
    worker: Worker, lease: Any, prompt: tuple[int, ...], request: Sample
) -> Callable[[], dict[str, Any]]:
    """The training thread's computation for a prompt. ``lease``: on the adapter; None for the base."""

    def work() -> dict[str, Any]:
        ids = torch.tensor([prompt], device=worker.trainer.device)
        with worker.trainer.sampled([lease]) as model:
            logits = model(input_ids=ids, use_cache=False).logits[
                0, :-1
            ]  # [n - 1, v]: of tokens 1 to n - 1
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return _scored(wide, ids[0, 1:], request)

    return work


def _scored(logits: Tensor, following: Tensor, asked: Sample) -> dict[str, Any]:
    """Of logits [n - 1, v] what is asked: rows of a prompt of n tokens, of which the first has
    nothing before it."""
    found: dict[str, Any] = {}
    total = logits.logsumexp(-1, keepdim=True)
    size, first = (
        len(following) + 1,
        len(following) + 1 - (asked.prompt_logprobs_last_n or len(following)),
    )
    if asked.prompt_logprobs:
        own = np.full(size, np.nan, np.float32)
        own[1:] = (logits.gather(-1, following[:, None]) - total)[:, 0].float().cpu().numpy()
        own[: max(first, 1)] = np.nan
        found["prompt_logprobs"] = own
    if k := min(asked.topk_prompt_logprobs, logits.shape[-1]):
        top = (logits - total).topk(k)
        ids, values = np.zeros((size, k), np.int32), np.full((size, k), -99999.0, np.float32)
        ids[1:], values[1:] = top.indices.cpu().numpy(), top.values.float().cpu().numpy()
        ids[: max(first, 1)], values[: max(first, 1)] = 0, -99999.0
        found["topk_prompt_logprobs"] = ids, values
    if asked.target_prompt_logprobs is not None:
        found |= _of_targets(logits, total, asked.target_prompt_logprobs)
    if k := asked.prompt_alt_tokens_k:
        temperature = asked.sampling_params.temperature
        shares = torch.softmax(logits / max(temperature, 1e-5), -1)
        draw, seed = torch.Generator(logits.device), asked.sampling_params.seed
        if seed is None:
            draw.seed()
        else:
            draw.manual_seed(sample_seed(seed, asked.num_samples))  # after those of the samples
        drawn = torch.multinomial(shares, k, replacement=True, generator=draw)
        logprobs = (logits.gather(-1, drawn) - total).float()
        found["prompt_alt_tokens"] = drawn.cpu().numpy().astype(np.int64), logprobs.cpu().numpy()
    return found


def _of_targets(logits: Tensor, total: Tensor, targets: Targets) -> dict[str, Any]:
    rows, width = targets.shape
    ids = torch.tensor(targets.data, dtype=torch.long, device=logits.device)
    if len(ids) and int(ids.max()) >= logits.shape[-1]:
        raise DataError(
            "a token of target_prompt_logprobs", f"ids below {logits.shape[-1]}, or -1", "change it"
        )
    crow, col = targets.sparse_crow_indices, targets.sparse_col_indices
    if crow is None or col is None:
        row = torch.arange(rows, device=logits.device).repeat_interleave(width)
    else:
        row = torch.arange(rows, device=logits.device).repeat_interleave(
            torch.tensor(crow, device=logits.device).diff()
        )
    values = (
        torch.where(ids < 0, 0.0, logits[row, ids.clamp(0)] - total[row, 0]).float().cpu().numpy()
    )
    if crow is None or col is None:
        return {"target_prompt_logprobs": values.reshape(rows, width)}
    return {"target_prompt_logprobs": values, "csr": (crow, col, targets.shape)}
