"""Compute embeddings: texts of many calls go through an encoder in one batch, each with the adapter
of its call.

    vector = pool(encoder(text)) over the tokens, scaled to length 1 if the model's files ask for it

One thread computes. It fills a batch with one text at a time, each from the call that the fair
queue (``scheduler.py``) puts first. So a call of 256 texts delays a call of one text by at most one
batch.
"""

from __future__ import annotations

import base64
import inspect
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veneer.errors import listing, sentence
from veneer.models.encoders import pool
from veneer.serve.refusal import Refusal
from veneer.serve.request_log import CURRENT_RECORD
from veneer.serve.requests import Busy
from veneer.serve.scheduler import PLACES_PER_FREE_PLACE, Scheduler, counted_as, key_of

log = logging.getLogger("veneer.serve")


def as_base64(vector: Tensor) -> str:
    """A vector as little-endian float32 in base64, the format that OpenAI's client requests."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


@dataclass(eq=False)
class _Call:
    """A call of ``Embedder.submit``, for the embeddings of some texts. Times are in seconds of
    ``time.monotonic``."""

    tokenized_texts: Sequence[tuple[int, ...]]  # the token ids of each text
    blend: Mapping[str, float]
    deadline: float
    submitted_at: float
    owner: str = ""
    token_types: Sequence[tuple[int, ...]] | None = None  # of each text; None: all 0
    with_head: bool = False  # return the logits of the classifier's head instead of vectors
    priority: int = 0
    is_queued: bool = False
    result: Future[list[Tensor]] = field(default_factory=Future)
    lease: Any = None
    next_text: int = 0  # index of the first text that is in no batch yet
    vectors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blend_key, self.counted_adapter = key_of(self.blend), counted_as(self.blend)
        # the account whose waiting texts are limited: that of the API key, or without keys, of the
        # adapter
        self.account = (self.owner, "" if self.owner else self.counted_adapter)


class Embedder:
    """Computes embeddings in a thread of its own.

    Args:
        model: an encoder of transformers.
        bank: loads the adapters and applies them.
        observer: its methods ``started``, ``tokens`` and ``finished`` are called for each call,
            with the arguments that an observer of ``Engine`` gets.
        pad_id: the token id of padding.
        pooling, normal: how the vectors of a text's tokens become one vector ("mean", "cls" or
            "max", see ``encoders.pool``), and whether it is scaled to length 1.
        rows, tokens: the most texts of a batch, and its most tokens with padding. A text with more
            tokens is a batch by itself.
        queue: the most texts that may wait, of all calls together.
        label_count: the number of labels of the model's head, if it is a classifier.
    """

    def __init__(
        self,
        model: Any,
        bank: Any,
        observer: Any,
        *,
        pad_id: int = 0,
        pooling: str = "mean",
        normal: bool = True,
        rows: int = 32,
        tokens: int = 8192,
        queue: int = 1024,
        label_count: int = 0,
    ) -> None:
        self.model, self.bank, self.pad_id = model, bank, pad_id
        self.pooling, self.normal = pooling, normal
        self.rows, self.tokens, self.queue, self.observer = rows, tokens, queue, observer
        self.label_count = label_count
        forward_parameters = inspect.signature(type(model).forward).parameters
        self._reads_token_types = "token_type_ids" in forward_parameters
        self.width = int(model.config.hidden_size)
        self._calls: Scheduler[_Call] = Scheduler(sys.maxsize)  # calls have no limit, texts have
        # number of waiting texts, by ``_Call.account``
        self._waiting_by_account: Counter[tuple[str, str]] = Counter()
        self.running = self.waiting = 0  # ``running`` counts calls, ``waiting`` texts
        self._closed = self._refuses_calls = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="veneer-embed", daemon=True)
        self._thread.start()

    def submit(
        self,
        tokenized_texts: Sequence[tuple[int, ...]],
        blend: Mapping[str, float],
        timeout: float,
        owner: str = "",
        token_types: Sequence[tuple[int, ...]] | None = None,
        *,
        with_head: bool = False,
    ) -> Future[list[Tensor]]:
        """Queue texts, as token ids. Returns a future of one vector [width] for each text, or with
        ``with_head`` of the classifier's logits [labels]. Cancelling the future drops the call.

        Args:
            timeout: seconds after which the call fails if some of its texts are in no batch yet.
            owner: the name of the client's API key; "" on a server without keys.
            token_types: for each text, a token type for each token; None for 0 everywhere.

        Raises:
            Busy: too many texts wait, in all or of the same API key (without keys: adapter), or the
                embedder is draining.
            SelectionError: an adapter is unknown.
        """
        submitted_at = time.monotonic()
        if (record := CURRENT_RECORD.get()) is not None:
            record.ask(blend, sum(map(len, tokenized_texts)))
        deadline = submitted_at + timeout
        call = _Call(tokenized_texts, blend, deadline, submitted_at, owner, token_types, with_head)
        with self._changed:
            account_waiting = self._waiting_by_account[call.account]
            free_places = self.queue - self.waiting
            is_crowded = self.waiting and (
                len(tokenized_texts) > free_places
                or (
                    account_waiting
                    and account_waiting + len(tokenized_texts) > PLACES_PER_FREE_PLACE * free_places
                )
            )
            if self._refuses_calls or is_crowded:
                account_kind = "key" if owner else "adapter"
                message = sentence(
                    f"{self.waiting} texts that wait, {account_waiting} of them of the same"
                    f" {account_kind}",
                    f"at most {self.queue}, with room for others",
                    "send it again later",
                )
                raise Busy(message, 1.0)
            self.running, self.waiting = self.running + 1, self.waiting + len(tokenized_texts)
            self._waiting_by_account[call.account] += len(tokenized_texts)
        try:
            lease_future = self.bank.acquire(blend)
        except BaseException:
            self._end_call(call)
            raise
        lease_future.add_done_callback(lambda lease_future: self._queue_loaded(call, lease_future))
        return call.result

    def drain(self, seconds: float) -> None:
        """Refuse new calls, and wait up to ``seconds`` until all earlier calls have ended."""
        with self._changed:
            self._refuses_calls = True
            self._changed.wait_for(lambda: not self.running, seconds)

    def close(self) -> None:
        """Stop the thread. Calls that have not ended fail."""
        with self._changed:
            self._closed = self._refuses_calls = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _queue_loaded(self, call: _Call, lease_future: Future[Any]) -> None:
        """Put a call into the queue, once its adapter is in memory. If loading failed, the adapter
        has invocation tokens or the thread has stopped, end the call with an error."""
        try:
            call.lease = lease_future.result()
            _refuse_invocation_tokens(call)
        except BaseException as error:
            self._end_call(call, error)
            return
        with self._changed:
            if not self._closed:
                self._calls.add(call)
                call.is_queued = True
                self._changed.notify_all()
        if not call.is_queued:
            self._end_call(call, _stopping_refusal())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls.waiting or self._closed)
                if self._closed:
                    break
                batch = self._take_batch()
            if batch:
                self._compute(batch)
            del batch  # so that ended calls are freed while the thread waits
        for call in self._calls.waiting_requests():  # no call is added any more
            self._end_call(call, _stopping_refusal())

    def _take_batch(self) -> list[tuple[_Call, int]]:
        """Take the texts of the next batch from the queue, as (call, index of the text). Calls that
        were cancelled or whose deadline has passed are ended, unless they have texts in the
        batch."""
        batch: list[tuple[_Call, int]] = []
        max_length = 0
        while (call := self._calls.take()) is not None:
            is_in_batch = any(batch_call is call for batch_call, _ in batch)
            if not is_in_batch and (call.result.cancelled() or time.monotonic() > call.deadline):
                refusal = Refusal(
                    504, "texts that took too long", "an answer in time", "send fewer at once"
                )
                self._end_call(call, refusal)
                continue
            padded_length = max(max_length, len(call.tokenized_texts[call.next_text]))
            is_full = len(batch) == self.rows or padded_length * (len(batch) + 1) > self.tokens
            if batch and (is_full or call.with_head != batch[0][0].with_head):
                self._calls.push_back(call)
                break
            max_length = padded_length
            if not call.next_text:
                self.observer.started(call.blend, time.monotonic() - call.submitted_at)
            batch.append((call, call.next_text))
            self._calls.charge(call, len(call.tokenized_texts[call.next_text]))
            call.next_text += 1
            if call.next_text < len(call.tokenized_texts):
                self._calls.requeue(call)
        return batch

    def _compute(self, batch: list[tuple[_Call, int]]) -> None:
        """Compute the vectors of a batch, and end the calls that now have all of their vectors. If
        the computation fails or gives numbers that are not finite, end the calls affected with an
        error."""
        calls, error_text = [call for call, _ in batch], "the model's vectors are no finite numbers"
        try:
            vectors = self._outputs(batch)
        except Exception as error:
            log.exception("A batch of embeddings failed")
            vectors, error_text = (
                torch.full((len(calls), 1), torch.nan),
                f"{type(error).__name__}: {error}",
            )
        are_finite = torch.isfinite(vectors).all(-1).tolist()
        failed_calls = {
            call for call, is_finite in zip(calls, are_finite, strict=True) if not is_finite
        }
        for call in failed_calls:
            self._end_call(call, Refusal(500, error_text, code="engine_error"))
        for call, vector in zip(calls, vectors, strict=True):
            if call in failed_calls:
                continue
            call.vectors.append(vector)
            if len(call.vectors) == len(call.tokenized_texts):
                self.observer.tokens(call.blend, sum(map(len, call.tokenized_texts)), 0)
                self._end_call(call)

    def _outputs(self, batch: list[tuple[_Call, int]]) -> Tensor:
        """The embeddings [texts, width] of a batch, or a classifier's logits [texts, labels], on
        the CPU."""
        id_tensors, device = (
            [torch.tensor(call.tokenized_texts[index]) for call, index in batch],
            self.model.device,
        )
        padded_ids = pad_sequence(id_tensors, batch_first=True, padding_value=self.pad_id).to(
            device
        )
        mask = pad_sequence([torch.ones_like(ids) for ids in id_tensors], batch_first=True).to(
            device
        )
        inputs = {"input_ids": padded_ids, "attention_mask": mask}
        if self._reads_token_types and any(call.token_types is not None for call, _ in batch):
            token_types = [
                torch.zeros_like(ids)
                if call.token_types is None
                else torch.tensor(call.token_types[index])
                for ids, (call, index) in zip(id_tensors, batch, strict=True)
            ]
            inputs["token_type_ids"] = pad_sequence(token_types, batch_first=True).to(device)
        with_head = batch[0][0].with_head
        model = self.model if with_head or not self.label_count else self.model.base_model
        with torch.inference_mode(), self.bank.rows([call.lease for call, _ in batch]):
            output = model(**inputs)
            if with_head:
                return output.logits.float().cpu()
            return pool(output.last_hidden_state, mask, self.pooling, self.normal).cpu()

    def _end_call(self, call: _Call, error: BaseException | None = None) -> None:
        """Release a call's adapter, and set the call's result or ``error``. Without an error and
        with vectors missing, set neither: ``submit`` itself raises the error then."""
        if call.lease is not None:
            call.lease.release()
        with suppress(InvalidStateError):  # the client cancelled the call meanwhile
            if error is None and len(call.vectors) == len(call.tokenized_texts):
                call.result.set_result(call.vectors)
            elif error is not None:
                call.result.set_exception(error)
        finish_reason = (
            "cancelled" if call.result.cancelled() else "error" if error is not None else "stop"
        )
        self.observer.finished(call.blend, finish_reason, time.monotonic() - call.submitted_at)
        with self._changed:
            if call.is_queued and not self._calls.remove(call):
                self._calls.ended(call)
            self.running, self.waiting = self.running - 1, self.waiting - len(call.tokenized_texts)
            self._waiting_by_account[call.account] -= len(call.tokenized_texts)
            self._waiting_by_account += Counter()  # drop accounts without waiting texts
            self._changed.notify_all()


def _refuse_invocation_tokens(call: _Call) -> None:
    """``Refusal``: an adapter of the call, with a weight other than 0, has invocation tokens
    (activated LoRA). It would act from these tokens on, but a batch applies its adapters to all
    tokens of a text."""
    weighted_adapters: Any = getattr(call.lease, "uses", ())
    if any(weight and adapter.invocation_tokens for adapter, weight in weighted_adapters):
        raise Refusal(
            400,
            f"invocation tokens of {listing(map(repr, call.blend))}, on an encoder",
            "adapters that act on every token",
            "ask for another adapter, or for the base",
            param="model",
        )


def _stopping_refusal() -> Refusal:
    return Refusal(
        503, "a server that stops", "one that runs", "send it to another", code="draining"
    )
