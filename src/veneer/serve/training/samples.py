"""Samples from the published weights of a run, and log-probabilities of their prompts.

    asample → promise → the engine's queue (a sample waits here while it is full) → tokens with
    their
                        log-probabilities
                      → the training thread, between two batches → log-probabilities of the prompt

Log-probabilities are computed before temperature, top_k and top_p, like those of a training pass.
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

#: the most samples that wait or run; the most answered calls that are stored for their clients, and
#: for how many seconds
MOST_WAITING, MOST_KEPT, KEPT_SECONDS = 16384, 4096, 1800.0
#: the most samples of a key that are in the engine or try to enter it, for each row of the engine;
#: seconds between two tries
SAMPLES_A_ROW, RETRY_SECONDS = 4, 0.05


@dataclass(eq=False)
class Usage:
    """The number of computed tokens of a call: its prompt once, and its answers."""

    tokens: int = 0


@dataclass(eq=False)
class SampleCall:
    """A call for samples, of an owner and a session."""

    owner: str
    session: str
    count: int
    task: asyncio.Task[Answer]
    ended: float | None = None


class Samples:
    """Calls for samples by their ids. Only the event loop may call it, except ``leave_soon``."""

    def __init__(self, engine: Any, bank: Any, worker: Worker, timeout: float) -> None:
        self._engine, self._bank, self._worker, self._timeout = engine, bank, worker, timeout
        self._calls: dict[str, SampleCall] = {}
        self._numbers = itertools.count()
        self._gates: dict[str, asyncio.Semaphore] = {}  # by owner
        self._loop: asyncio.AbstractEventLoop | None = None

    def most_tokens(self, request: Sample) -> int:
        """The most tokens that a call can use: its prompt, and the longest answers it allows."""
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
        """Begin a call; nothing happens if there is one with this id. ``name``: the adapter's name
        in the bank; None for the base. ``charge`` is called with the number of computed tokens of
        prompt and answers. ``Busy``: too many samples wait."""
        if id in self._calls:
            charge(0)
            return
        waiting = [call for call in self._calls.values() if not call.task.done()]
        room = MOST_WAITING - sum(call.count for call in waiting)
        if owner:  # a key may use at most half of the remaining room
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
        call = self._calls[id] = SampleCall(owner, session, request.num_samples, task)

        def finish(_: Any) -> None:
            call.ended = time.monotonic()
            charge(usage.tokens)
            self._delete_old_calls()

        task.add_done_callback(finish)

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
        """Cancel the calls of a session whose client has left."""
        for call in self._calls.values():
            if call.session == session:
                call.task.cancel()

    def _delete_old_calls(self) -> None:
        limit = time.monotonic() - KEPT_SECONDS
        ended = [id for id, call in self._calls.items() if call.ended is not None]
        expired = [id for id in ended if (self._calls[id].ended or 0.0) < limit]
        for id in dict.fromkeys([*expired, *ended[: max(0, len(ended) - MOST_KEPT)]]):
            del self._calls[id]

    async def _answer(self, owner: str, name: str | None, request: Sample, usage: Usage) -> Answer:
        try:
            prompt, blend = request.prompt.tokens, {} if name is None else {name: 1.0}
            if not 0 < len(prompt) < self._engine.length:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens",
                    f"1 to {self._engine.length - 1}, and room for an answer",
                    "shorten it",
                )
            if max(prompt) >= self._worker.vocabulary:
                raise DataError(
                    f"token {max(prompt)} in a prompt",
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
            scoring = self._score_prompt(name, prompt, request)
            try:
                samples, scores = await asyncio.gather(sequences, scoring)
            except BaseException:
                sequences.cancel()
                raise
            return Answer(sample_output(samples, request.topk_sample_logprobs, scores), True)
        except VeneerError as error:
            return failure(error)
        except Exception as error:
            log.exception("a call for samples failed")
            return failure(error, is_bug=True)

    async def _sequence(
        self, owner: str, blend: Mapping[str, float], body: Sample, number: int, usage: Usage
    ) -> Sequence_:
        """Draw one sample. Cancelling it stops its request in the engine."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        request = Request(
            body.prompt.tokens,
            blend,
            _sampling(body, number, self._engine.length),
            self._timeout,
            f"sample-{next(self._numbers)}",
            owner,
        )

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async with self._gates.setdefault(
            owner, asyncio.Semaphore(SAMPLES_A_ROW * self._engine.rows)
        ):
            tokens, piece = await self._collect_tokens(request, deliver, pieces, usage)
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

    async def _collect_tokens(
        self,
        request: Request,
        deliver: Callable[[Piece], None],
        pieces: asyncio.Queue[Piece],
        usage: Usage,
    ) -> tuple[list[Any], Piece]:
        """Submit a request to the engine; return the tokens of its answer and the last piece."""
        while True:
            try:
                state = self._engine.submit(request, deliver)
                break
            except Busy:
                if not self._engine.ready:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
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

    async def _score_prompt(
        self, name: str | None, prompt: tuple[int, ...], request: Sample
    ) -> dict[str, Any]:
        needs_scores = (
            request.prompt_logprobs
            or request.topk_prompt_logprobs
            or request.target_prompt_logprobs
            or request.prompt_alt_tokens_k
        )
        if not needs_scores:
            return {}
        if name is None:
            return await self._score_on_worker(None, prompt, request)
        # take the lease before the turn at the model: see the order of locks
        leasing = self._bank.acquire({name: 1.0})
        try:
            lease = await asyncio.shield(asyncio.wrap_future(leasing))
        except asyncio.CancelledError:
            leasing.add_done_callback(_release)
            raise
        return await self._score_on_worker(lease, prompt, request)

    async def _score_on_worker(
        self, lease: Any, prompt: tuple[int, ...], request: Sample
    ) -> dict[str, Any]:
        scores = self._worker.do(scorer(self._worker, lease, prompt, request))
        if lease is not None:
            scores.add_done_callback(lambda _: lease.release())
        return await asyncio.shield(asyncio.wrap_future(scores))


def _release(leasing: Future[Any]) -> None:
    if leasing.exception() is None:
        leasing.result().release()


def check_prompt(request: Sample, size: int) -> None:
    """``DataError``: the requested scores do not fit a prompt of ``size`` tokens, or are not
    supported."""
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
        max_tokens=params.max_tokens or most,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        seed=None if params.seed is None else sample_seed(params.seed, number),
        stop=tuple(filter(None, words)),
        logprobs=request.topk_sample_logprobs,
        ignore_eos=stop == [],
        stop_tokens=ids,
    )


def scorer(
    worker: Worker, lease: Any, prompt: tuple[int, ...], request: Sample
) -> Callable[[], dict[str, Any]]:
    """The training thread's computation for a prompt. ``lease``: on the adapter; None for the
    base."""

    def score() -> dict[str, Any]:
        ids = torch.tensor([prompt], device=worker.trainer.device)
        with worker.trainer.sampling([lease]) as model:
            output = model(input_ids=ids, use_cache=False)
            logits = output.logits[0, :-1]  # [n - 1, v], of tokens 1 to n - 1
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return _scores(wide, ids[0, 1:], request)

    return score


def _scores(logits: Tensor, following: Tensor, request: Sample) -> dict[str, Any]:
    """The requested scores, from logits [n - 1, v] that predict tokens 1 to n - 1 of a prompt. The
    first of the n rows of each score is empty, because no token precedes it."""
    scores: dict[str, Any] = {}
    total = logits.logsumexp(-1, keepdim=True)
    size = len(following) + 1
    first = max(size - (request.prompt_logprobs_last_n or len(following)), 1)
    if request.prompt_logprobs:
        logprobs = np.full(size, np.nan, np.float32)
        logprobs[1:] = (logits.gather(-1, following[:, None]) - total)[:, 0].float().cpu().numpy()
        logprobs[:first] = np.nan
        scores["prompt_logprobs"] = logprobs
    if k := min(request.topk_prompt_logprobs, logits.shape[-1]):
        top = (logits - total).topk(k)
        ids, values = np.zeros((size, k), np.int32), np.full((size, k), -99999.0, np.float32)
        ids[1:], values[1:] = top.indices.cpu().numpy(), top.values.float().cpu().numpy()
        ids[:first], values[:first] = 0, -99999.0
        scores["topk_prompt_logprobs"] = ids, values
    if request.target_prompt_logprobs is not None:
        scores |= _target_scores(logits, total, request.target_prompt_logprobs)
    if k := request.prompt_alt_tokens_k:
        temperature = request.sampling_params.temperature
        probabilities = torch.softmax(logits / max(temperature, 1e-5), -1)
        generator, seed = torch.Generator(logits.device), request.sampling_params.seed
        if seed is None:
            generator.seed()
        else:  # a number after those of the samples
            generator.manual_seed(sample_seed(seed, request.num_samples))
        tokens = torch.multinomial(probabilities, k, replacement=True, generator=generator)
        token_logprobs = (logits.gather(-1, tokens) - total).float().cpu().numpy()
        scores["prompt_alt_tokens"] = tokens.cpu().numpy().astype(np.int64), token_logprobs
    return scores


def _target_scores(logits: Tensor, total: Tensor, targets: Targets) -> dict[str, Any]:
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
