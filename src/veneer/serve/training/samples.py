"""Samples from a checkpoint of a run or from the base model, and log-probabilities of their
prompts.

    route asample → task → the engine's queue, for which a sample waits while the queue is full
                           → sampled tokens with their log-probabilities
                         → the training thread, between two batches
                           → log-probabilities of the prompt

All log-probabilities are those of the model's logits before temperature, top_k and top_p, so that
they can be compared with those of a training pass.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.errors import DataError, VeneerError, sentence
from veneer.kernels.draws import sample_seed
from veneer.serve.requests import Busy, Piece, Request, RequestError, Sampling
from veneer.serve.service import await_or_undo
from veneer.serve.training.bodies import Sample, TargetTokens
from veneer.serve.training.run_trainer import Trainer
from veneer.serve.training.wire import (
    MAX_TARGETS,
    NO_LOGPROB,
    NO_TOKEN,
    SampledSequence,
    sample_output,
)
from veneer.serve.training.worker import Answer, Worker, failure_answer

log = logging.getLogger("veneer.serve.training")

#: the largest number of samples that wait or run; the largest number of ended calls whose answers
#: are stored for their clients, the bytes of these answers for each API key, and the seconds for
#: which such an answer is stored
MAX_WAITING_SAMPLES, MAX_ANSWERED_CALLS, MAX_ANSWER_BYTES = 16384, 4096, 2**28
ANSWER_SECONDS = 1800.0
#: the largest number of log-probabilities of alternatives (``topk_sample_logprobs``) in one call
MAX_ALTERNATIVES = 2**22
#: the largest number of samples of an API key that are in the engine or try to enter its queue, as
#: a multiple of the number of sequences in the engine's batch; seconds between two tries
SAMPLES_PER_ROW, RETRY_SECONDS = 4, 0.05


@dataclass(eq=False)
class SampleCall:
    """One HTTP request for samples, and the task that computes its answer.

    Fields:
        owner: the name of the API key; "" on a server without keys.
        session_id: the id of the client's session; "" if it gave none.
        sample_count: the number of samples.
        ended: when the task ended (``time.monotonic``); None while it runs.
        token_count: how many tokens were computed so far: the prompt's (once) and the samples'.
    """

    owner: str
    session_id: str
    sample_count: int
    task: asyncio.Task[Answer] = field(init=False)
    ended: float | None = None
    token_count: int = 0


class Samples:
    """The running and recently ended calls for samples, by their ids. Only the event loop may call
    the methods, except ``cancel_session``. ``bank``: the adapters with which the engine samples;
    ``timeout``: seconds after which the engine ends a sample."""

    def __init__(self, engine: Any, bank: Any, worker: Worker, timeout: float) -> None:
        self._engine, self._bank, self._worker, self._timeout = engine, bank, worker, timeout
        self._calls: dict[str, SampleCall] = {}
        self._request_numbers = itertools.count()
        #: by API key: limits the key's samples that are in the engine or try to enter its queue
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def max_tokens(self, request: Sample) -> int:
        """The largest number of tokens that a call can use: the length of its prompt plus
        ``num_samples`` times the largest length of an answer, which ``max_tokens`` and the engine's
        context length limit."""
        prompt_length = len(request.prompt.tokens)
        max_answer = max(0, self._engine.length - prompt_length)
        return prompt_length + request.num_samples * min(
            max_answer, request.sampling_params.max_tokens or max_answer
        )

    def begin(
        self,
        call_id: str,
        owner: str,
        session_id: str,
        adapter_name: str | None,
        request: Sample,
        charge: Callable[[int], None] = lambda used: None,
    ) -> None:
        """Begin to compute a call for samples. Nothing begins if there is a call with this id.

        Args:
            owner: the name of the API key.
            session_id: the id of the client's session; "" if it gave none.
            adapter_name: the adapter's name in the bank, or None for the base model.
            charge: called when the call ends, with the number of its tokens
                (``SampleCall.token_count``); called at once with 0 if no call begins.

        Raises:
            Busy: too many samples wait.
        """
        if call_id in self._calls:
            charge(0)
            return
        waiting_calls = [call for call in self._calls.values() if not call.task.done()]
        free_places = MAX_WAITING_SAMPLES - sum(call.sample_count for call in waiting_calls)
        # A key may hold about half of the places that other keys leave, so that there is room for
        # the others. A server without keys has no owners, and one client may use all places.
        if owner:
            owner_sample_count = sum(
                call.sample_count for call in waiting_calls if call.owner == owner
            )
            free_places = min(free_places, free_places - owner_sample_count)
        if free_places < request.num_samples:
            charge(0)
            raise Busy(
                sentence(
                    "too many samples that wait",
                    f"at most {MAX_WAITING_SAMPLES:,}",
                    "try again in a second",
                ),
                1.0,
            )
        self._loop = asyncio.get_running_loop()
        call = self._calls[call_id] = SampleCall(owner, session_id, request.num_samples)
        call.task = self._loop.create_task(self._compute_answer(call, adapter_name, request))

        def finish(_: Any) -> None:
            call.ended = time.monotonic()
            charge(call.token_count)
            self._delete_old_calls()

        call.task.add_done_callback(finish)

    def find(self, call_id: str, owner: str) -> asyncio.Task[Answer] | None:
        """The task that computes the answer to a call; None if the key ``owner`` has no such
        call."""
        call = self._calls.get(call_id)
        return None if call is None or call.owner != owner else call.task

    def cancel(self, call_id: str, owner: str) -> None:
        if (task := self.find(call_id, owner)) is not None:
            task.cancel()

    def cancel_session(self, session_id: str) -> None:
        """Cancel the calls of a session whose client has left. Any thread may call this method: the
        event loop cancels the calls later."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel_calls, session_id)

    def _cancel_calls(self, session_id: str) -> None:
        for call in self._calls.values():
            if call.session_id == session_id:
                call.task.cancel()

    def _delete_old_calls(self) -> None:
        cutoff_time = time.monotonic() - ANSWER_SECONDS
        end_times = {id: call.ended for id, call in self._calls.items() if call.ended is not None}
        ended_ids = sorted(end_times, key=end_times.__getitem__)
        expired_ids = [id for id in ended_ids if end_times[id] < cutoff_time]
        excess_ids = ended_ids[: max(0, len(ended_ids) - MAX_ANSWERED_CALLS)]
        bytes_by_owner: Counter[str] = Counter()
        for id in reversed(ended_ids):
            call = self._calls[id]
            size = 0 if call.task.cancelled() else len(call.task.result().body)
            # the newest answer of a key stays, however large it is
            if 0 < bytes_by_owner[call.owner] > MAX_ANSWER_BYTES - size:
                excess_ids.append(id)
            bytes_by_owner[call.owner] += size
        for id in dict.fromkeys([*expired_ids, *excess_ids]):
            del self._calls[id]

    async def _compute_answer(
        self, call: SampleCall, adapter_name: str | None, request: Sample
    ) -> Answer:
        try:
            prompt_tokens = request.prompt.tokens
            blend = {} if adapter_name is None else {adapter_name: 1.0}
            if not 0 < len(prompt_tokens) < self._engine.length:
                raise DataError(
                    f"a prompt of {len(prompt_tokens)} tokens",
                    f"1 to {self._engine.length - 1}, and room for an answer",
                    "shorten it",
                )
            if max(prompt_tokens) >= self._worker.vocabulary_size:
                raise DataError(
                    f"token {max(prompt_tokens)} in a prompt",
                    f"ids from 0 to {self._worker.vocabulary_size - 1}",
                    "use the base's tokenizer",
                )
            check_prompt(request, len(prompt_tokens))
            sampled_count = self.max_tokens(request) - len(prompt_tokens)
            count = sampled_count * request.topk_sample_logprobs
            if count > MAX_ALTERNATIVES:
                raise DataError(
                    f"{count:,} log-probabilities of samples in one call",
                    f"at most {MAX_ALTERNATIVES:,}",
                    "ask for fewer samples, tokens or alternatives at once",
                )
            draw_tasks = [
                asyncio.create_task(self._draw_sample(call, blend, request, index))
                for index in range(request.num_samples)
            ]
            call.token_count = len(prompt_tokens)
            scoring_task = asyncio.create_task(
                self._score_prompt(adapter_name, prompt_tokens, request)
            )
            try:
                samples, scores = await asyncio.gather(asyncio.gather(*draw_tasks), scoring_task)
            except BaseException:
                # if one task fails, ``gather`` lets the others run, so cancel them here
                for task in (*draw_tasks, scoring_task):
                    task.cancel()
                raise
            return Answer(sample_output(samples, request.topk_sample_logprobs, scores), True)
        except VeneerError as error:
            return failure_answer(error)
        except Exception as error:
            log.exception("a call for samples failed")
            return failure_answer(error, is_bug=True)

    async def _draw_sample(
        self, call: SampleCall, blend: Mapping[str, float], sample_body: Sample, index: int
    ) -> SampledSequence:
        """Draw sample number ``index`` of a call. ``blend``: the weights of the bank's adapters, by
        name; empty for the base model. If this coroutine is cancelled, the engine stops generating
        the sample. ``RequestError``: the engine could not finish the sample."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        engine_request = Request(
            sample_body.prompt.tokens,
            blend,
            _sampling_settings(sample_body, index, self._engine.length),
            self._timeout,
            f"sample-{next(self._request_numbers)}",
            call.owner,
        )

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async with self._semaphores.setdefault(
            call.owner, asyncio.Semaphore(SAMPLES_PER_ROW * self._engine.rows)
        ):
            tokens, last_piece = await self._collect_tokens(call, engine_request, deliver, pieces)
        if last_piece.finish not in ("stop", "length"):
            raise RequestError(
                last_piece.error or f"a sample that ended by {last_piece.finish}",
                "an answer",
                "try again",
            )
        top_logprobs = [
            [(token_id, logprob) for token_id, _, logprob in token.top] for token in tokens
        ]
        return SampledSequence(
            [token.id for token in tokens],
            [token.logprob for token in tokens],
            top_logprobs,
            last_piece.finish == "length",
        )

    async def _collect_tokens(
        self,
        call: SampleCall,
        engine_request: Request,
        deliver: Callable[[Piece], None],
        pieces: asyncio.Queue[Piece],
    ) -> tuple[list[Any], Piece]:
        """Submit a request to the engine, again and again while its queue is full; return the
        tokens of the answer, and the last piece of the answer, which says why the answer ended.
        ``deliver``: puts each piece of the answer into ``pieces``. ``Busy``: the engine is shutting
        down."""
        while True:
            try:
                running_request = self._engine.submit(engine_request, deliver)
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
                call.token_count += len(piece.tokens)
                if piece.finish is not None:
                    return tokens, piece
        except asyncio.CancelledError:
            running_request.cancel()
            raise

    async def _score_prompt(
        self, adapter_name: str | None, prompt_tokens: tuple[int, ...], request: Sample
    ) -> dict[str, Any]:
        """The log-probabilities that a call requests for its prompt (``_prompt_scores``), computed
        in the training thread; {} if it requests none."""
        needs_scores = (
            request.prompt_logprobs
            or request.topk_prompt_logprobs
            or request.target_prompt_logprobs
            or request.prompt_alt_tokens_k
        )
        if not needs_scores:
            return {}
        lease = None
        if adapter_name is not None:
            # A lease keeps the adapter in the bank's memory. Waiting for the lease inside
            # ``score_prompt`` could deadlock, since that function holds the model lock (see
            # __init__.py), so acquire it here.
            lease_future = asyncio.wrap_future(self._bank.acquire({adapter_name: 1.0}))
            lease = await await_or_undo(lease_future, lambda lease: lease.release())
        score_function = partial(score_prompt, self._worker.trainer, lease, prompt_tokens, request)
        scores_future = self._worker.submit(score_function)
        if lease is not None:
            scores_future.add_done_callback(lambda _: lease.release())
        return await asyncio.shield(asyncio.wrap_future(scores_future))


def check_prompt(request: Sample, prompt_length: int) -> None:
    """Check which log-probabilities of the prompt's tokens a request asks for. ``DataError``: they
    do not fit a prompt of ``prompt_length`` tokens, or this server does not support them."""
    last_n, targets = request.prompt_logprobs_last_n, request.target_prompt_logprobs
    if request.record_stability_info:
        raise DataError(
            "record_stability_info", "none: there is no stable_reinforce here", "leave it out"
        )
    if last_n is not None and not (request.prompt_logprobs and last_n < prompt_length):
        raise DataError(
            f"prompt_logprobs_last_n {last_n} for a prompt of {prompt_length} tokens",
            f"1 to {prompt_length - 1}, with prompt_logprobs",
            "change it",
        )
    if targets is None:
        return
    row_count, targets_width = targets.shape
    row_pointers, column_indices = targets.sparse_crow_indices, targets.sparse_col_indices
    # test the shape first, because it bounds how long the tests of the sparse indices below take
    is_valid = row_count == prompt_length - 1 and 0 < targets_width <= MAX_TARGETS
    if row_pointers is None or column_indices is None:
        is_valid = (
            is_valid
            and row_pointers is column_indices is None
            and len(targets.data) == row_count * targets_width
        )
    else:
        is_valid = (
            is_valid
            and len(row_pointers) == row_count + 1
            and len(column_indices) == len(targets.data)
            and row_pointers[0] == 0
            and row_pointers[-1] == len(column_indices)
            and sorted(row_pointers) == row_pointers
            and all(0 <= index < targets_width for index in column_indices)
        )
    if not is_valid:
        raise DataError(
            f"target_prompt_logprobs {targets.shape} for a prompt of {prompt_length} tokens",
            f"[{prompt_length - 1}, at most {MAX_TARGETS}], dense or in CSR",
            "send a row for each token but the first",
        )


def _sampling_settings(request: Sample, index: int, max_tokens: int) -> Sampling:
    """The engine's settings for sample number ``index`` of a call. ``max_tokens``: the largest
    number of tokens if the call sets none. A call with a seed gives each of its samples a seed of
    its own."""
    sampling_params, stop = request.sampling_params, request.sampling_params.stop
    stop_entries = [stop] if isinstance(stop, str) else stop or ()
    stop_texts = [entry for entry in stop_entries if isinstance(entry, str)]
    stop_ids = frozenset(entry for entry in stop_entries if isinstance(entry, int))
    return Sampling(
        max_tokens=sampling_params.max_tokens or max_tokens,
        temperature=sampling_params.temperature,
        top_p=sampling_params.top_p,
        top_k=max(sampling_params.top_k, 0),
        seed=None if sampling_params.seed is None else sample_seed(sampling_params.seed, index),
        stop=tuple(filter(None, stop_texts)),
        logprobs=request.topk_sample_logprobs,
        ignore_eos=stop == [],
        stop_tokens=stop_ids,
    )


def score_prompt(
    trainer: Trainer, lease: Any, prompt_tokens: tuple[int, ...], request: Sample
) -> dict[str, Any]:
    """The log-probabilities that a call requests for its prompt (``_prompt_scores``). Only the
    training thread may call this function, since it uses the trainer. ``lease``: the bank's lease
    on the adapter, which keeps the adapter in memory; None for the base model."""
    prompt_ids = torch.tensor([prompt_tokens], device=trainer.device)
    with trainer.sampling([lease]) as model:
        model_output = model(input_ids=prompt_ids, use_cache=False)
        logits = model_output.logits[0, :-1]  # [n - 1, vocabulary]; row i predicts token i + 1
        wide_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _prompt_scores(wide_logits, prompt_ids[0, 1:], request)


def _prompt_scores(logits: Tensor, next_ids: Tensor, request: Sample) -> dict[str, Any]:
    """The log-probabilities that a call requests for its prompt of n tokens, as numpy arrays by
    name, for ``wire.sample_output``.

    "prompt_logprobs" and "topk_prompt_logprobs" have n rows. Row 0 is filled with padding, because
    no token precedes token 0, and so are the rows that ``prompt_logprobs_last_n`` excludes. The
    other arrays have n - 1 rows, for tokens 1 to n - 1.

    Args:
        logits: [n - 1, vocabulary]; row i predicts token i + 1. At least float32.
        next_ids: [n - 1], int64: the prompt's tokens 1 to n - 1.
    """
    scores: dict[str, Any] = {}
    log_normalizers = logits.logsumexp(-1, keepdim=True)  # [n - 1, 1]
    if not log_normalizers.isfinite().all():  # ``multinomial`` would fail, on a GPU for all clients
        raise DataError(
            "logits of the prompt that are not finite", "finite ones", "sample from other weights"
        )
    prompt_length = len(next_ids) + 1
    first_row = max(prompt_length - (request.prompt_logprobs_last_n or len(next_ids)), 1)
    if request.prompt_logprobs:
        logprobs = np.full(prompt_length, np.nan, np.float32)
        next_logprobs = (logits.gather(-1, next_ids[:, None]) - log_normalizers)[:, 0]
        logprobs[first_row:] = next_logprobs.float().cpu().numpy()[first_row - 1 :]
        scores["prompt_logprobs"] = logprobs
    if k := min(request.topk_prompt_logprobs, logits.shape[-1]):
        top_tokens = (logits - log_normalizers).topk(k)
        top_ids = np.full((prompt_length, k), NO_TOKEN, np.int32)
        top_logprobs = np.full((prompt_length, k), NO_LOGPROB, np.float32)
        top_ids[first_row:] = top_tokens.indices.cpu().numpy()[first_row - 1 :]
        top_logprobs[first_row:] = top_tokens.values.float().cpu().numpy()[first_row - 1 :]
        scores["topk_prompt_logprobs"] = top_ids, top_logprobs
    if request.target_prompt_logprobs is not None:
        scores |= _target_scores(logits, log_normalizers, request.target_prompt_logprobs)
    if k := request.prompt_alt_tokens_k:
        temperature = request.sampling_params.temperature
        probabilities = torch.softmax(logits / max(temperature, 1e-5), -1)
        generator, seed = torch.Generator(logits.device), request.sampling_params.seed
        if seed is None:
            generator.seed()
        else:  # the samples use the seeds number 0 to num_samples - 1 of the call; take the next
            generator.manual_seed(sample_seed(seed, request.num_samples))
        drawn_tokens = torch.multinomial(probabilities, k, replacement=True, generator=generator)
        token_logprobs = (logits.gather(-1, drawn_tokens) - log_normalizers).float().cpu().numpy()
        scores["prompt_alt_tokens"] = drawn_tokens.cpu().numpy().astype(np.int64), token_logprobs
    return scores


def _target_scores(
    logits: Tensor, log_normalizers: Tensor, targets: TargetTokens
) -> dict[str, Any]:
    """The log-probabilities of the token ids in ``targets``, which a client sends for each token of
    the prompt but the first, dense or in CSR. An id of -1 gets 0. ``logits``: [rows, vocabulary];
    ``log_normalizers``: [rows, 1], their logsumexp. The result has "target_prompt_logprobs", and
    "csr" if ``targets`` is sparse. ``DataError``: an id is not in the vocabulary."""
    row_count, targets_width = targets.shape
    ids = torch.tensor(targets.data, dtype=torch.long, device=logits.device)
    if len(ids) and int(ids.max()) >= logits.shape[-1]:
        raise DataError(
            "a token of target_prompt_logprobs", f"ids below {logits.shape[-1]}, or -1", "change it"
        )
    row_pointers, column_indices = targets.sparse_crow_indices, targets.sparse_col_indices
    targets_per_row = (
        targets_width
        if row_pointers is None
        else torch.tensor(row_pointers, device=logits.device).diff()
    )
    row_indices = torch.arange(row_count, device=logits.device).repeat_interleave(targets_per_row)
    logprobs = (
        torch.where(
            ids < 0, 0.0, logits[row_indices, ids.clamp(0)] - log_normalizers[row_indices, 0]
        )
        .float()
        .cpu()
        .numpy()
    )
    if row_pointers is None:
        return {"target_prompt_logprobs": logprobs.reshape(row_count, targets_width)}
    return {
        "target_prompt_logprobs": logprobs,
        "csr": (row_pointers, column_indices, targets.shape),
    }
