"""Embeddings: texts of many calls go through an encoder in one batch, each with its own adapter.

    vector = pool over the tokens of (encoder(text)), of length 1 if the model's files say so

One thread computes. It takes one text at a time from the call whose turn it is (``scheduler``)
until the batch is full, so a call of 256 texts delays a call of one text by at most one batch.
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

from veneer.errors import sentence
from veneer.models.encoders import pool
from veneer.serve.refusal import Refusal
from veneer.serve.request_log import CURRENT
from veneer.serve.requests import Busy
from veneer.serve.scheduler import SHARE, Scheduler, counted_as, key_of

log = logging.getLogger("veneer.serve")


def as_base64(vector: Tensor) -> str:
    """A vector as little-endian float32 in base64, the format that OpenAI's client requests."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


@dataclass(eq=False)
class _Call:
    texts: Sequence[tuple[int, ...]]
    blend: Mapping[str, float]
    deadline: float
    began: float
    owner: str = ""
    types: Sequence[tuple[int, ...]] | None = None  # token types, if the model reads them
    head: bool = False  # return the logits of the classifier's head instead of vectors
    priority: int = 0
    queued: bool = False
    done: Future[list[Tensor]] = field(default_factory=Future)
    lease: Any = None
    next: int = 0
    vectors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.key, self.flow = key_of(self.blend), counted_as(self.blend)
        self.holder = (
            self.owner,
            "" if self.owner else self.flow,
        )  # the key, or adapter, that waiting texts are charged to


class Embedder:
    """Answers calls for embeddings in its own thread. ``model``: an encoder of transformers;
    ``pad`` is the padding token. ``how``, ``normal``: see ``pool``. ``rows``, ``tokens``: the most
    texts, and tokens with padding, of a batch. ``queue``: the most waiting texts. ``observer``: as
    for the engine. ``labels``: the labels of the head, if the model is a classifier."""

    def __init__(
        self, model: Any, bank: Any, *, pad: int = 0, how: str = "mean", normal: bool = True,
        rows: int = 32, tokens: int = 8192, queue: int = 1024, observer: Any = None,
        labels: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.bank, self.pad, self.how, self.normal = model, bank, pad, how, normal
        self.rows, self.tokens, self.queue, self.observer = rows, tokens, queue, observer
        self.labels = labels
        parameters = inspect.signature(type(model).forward).parameters
        self._reads_types = "token_type_ids" in parameters
        self.width = int(model.config.hidden_size)
        self._calls: Scheduler[_Call] = Scheduler(sys.maxsize)  # texts are counted here, not calls
        self._held: Counter[tuple[str, str]] = (
            Counter()
        )  # texts that wait, by key, or by adapter where there is none
        self.running = self.waiting = 0  # calls, and texts
        self._closed = self._refuses = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="veneer-embed", daemon=True)
        self._thread.start()

    def submit(
        self,
        texts: Sequence[tuple[int, ...]],
        blend: Mapping[str, float],
        timeout: float,
        owner: str = "",
        types: Sequence[tuple[int, ...]] | None = None,
        *,
        head: bool = False,
    ) -> Future[list[Tensor]]:
        """A future of the vectors of texts, or with ``head`` of the classifier's logits. ``types``:
        the token types of each text. Cancelling the future drops the call. ``Busy``: too many texts
        wait, or too many of the same key (without keys: of the same adapter)."""
        submitted_at = time.monotonic()
        if (record := CURRENT.get()) is not None:
            record.ask(blend, sum(map(len, texts)))
        call = _Call(texts, blend, submitted_at + timeout, submitted_at, owner, types, head)
        with self._changed:
            held_calls, free_places = self._held[call.holder], self.queue - self.waiting
            crowded = self.waiting and (
                len(texts) > free_places
                or (held_calls and held_calls + len(texts) > SHARE * free_places)
            )
            if self._refuses or crowded:
                holder = "key" if owner else "adapter"
                problem = (
                    f"{self.waiting} texts that wait, {held_calls} of them of the same {holder}"
                )
                expected = f"at most {self.queue}, with room for others"
                raise Busy(sentence(problem, expected, "send it again later"), 1.0)
            self.running, self.waiting = self.running + 1, self.waiting + len(texts)
            self._held[call.holder] += len(texts)
        try:
            acquired = self.bank.acquire(blend)
        except BaseException:
            self._end(call)
            raise
        acquired.add_done_callback(lambda lease: self._queue_loaded(call, lease))
        return call.done

    def drain(self, seconds: float) -> None:
        """Refuse new calls, and wait up to ``seconds`` for the open ones."""
        with self._changed:
            self._refuses = True
            self._changed.wait_for(lambda: not self.running, seconds)

    def close(self) -> None:
        """Stop the thread. Open calls fail."""
        with self._changed:
            self._closed = self._refuses = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _queue_loaded(self, call: _Call, lease: Future[Any]) -> None:
        try:
            call.lease = lease.result()
        except BaseException as error:
            self._end(call, error)
            return
        with self._changed:
            if not self._closed:
                self._calls.add(call)
                call.queued = True
                self._changed.notify_all()
        if not call.queued:
            self._end(call, _stopping())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls.waiting or self._closed)
                if self._closed:
                    break
                batch = self._take()
            if batch:
                self._compute(batch)
            del batch  # keep no reference to a call while the thread waits
        for call in self._calls.waiting_requests():  # no call is added any more
            self._end(call, _stopping())

    def _take(self) -> list[tuple[_Call, int]]:
        batch: list[tuple[_Call, int]] = []
        longest = 0
        while (call := self._calls.take()) is not None:
            begun = any(batch_call is call for batch_call, _ in batch)
            if not begun and (call.done.cancelled() or time.monotonic() > call.deadline):
                late = Refusal(
                    504, "texts that took too long", "an answer in time", "send fewer at once"
                )
                self._end(call, late)
                continue
            length = max(longest, len(call.texts[call.next]))
            full = len(batch) == self.rows or length * (len(batch) + 1) > self.tokens
            if batch and (full or call.head != batch[0][0].head):
                self._calls.push_back(call)
                break
            longest = length
            if not call.next and self.observer is not None:
                self.observer.started(call.blend, time.monotonic() - call.began)
            batch.append((call, call.next))
            self._calls.charge(call, len(call.texts[call.next]))
            call.next += 1
            if call.next < len(call.texts):
                self._calls.go_on(call)
        return batch

    def _compute(self, batch: list[tuple[_Call, int]]) -> None:
        calls, why = [call for call, _ in batch], "the model's vectors are no finite numbers"
        try:
            vectors = self._vectors(batch)
        except Exception as error:
            log.exception("A batch of embeddings failed")
            vectors, why = (
                torch.full((len(calls), 1), torch.nan),
                f"{type(error).__name__}: {error}",
            )
        sound = torch.isfinite(vectors).all(-1).tolist()
        failed = {call for call, right in zip(calls, sound, strict=True) if not right}
        for call in failed:
            self._end(call, Refusal(500, why, code="engine_error"))
        for call, vector in zip(calls, vectors, strict=True):
            if call in failed:
                continue
            call.vectors.append(vector)
            if len(call.vectors) == len(call.texts):
                if self.observer is not None:
                    self.observer.tokens(call.blend, sum(map(len, call.texts)), 0)
                self._end(call)

    def _vectors(self, batch: list[tuple[_Call, int]]) -> Tensor:
        """The embeddings [texts, width] of a batch, or a classifier's logits [texts, labels], on
        the CPU."""
        texts, device = (
            [torch.tensor(call.texts[index]) for call, index in batch],
            self.model.device,
        )
        ids = pad_sequence(texts, batch_first=True, padding_value=self.pad).to(device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._reads_types and any(call.types is not None for call, _ in batch):
            types = [
                torch.zeros_like(text) if call.types is None else torch.tensor(call.types[index])
                for text, (call, index) in zip(texts, batch, strict=True)
            ]
            inputs["token_type_ids"] = pad_sequence(types, batch_first=True).to(device)
        head = batch[0][0].head
        model = self.model if head or not self.labels else self.model.base_model
        with torch.inference_mode(), self.bank.rows([call.lease for call, _ in batch]):
            output = model(**inputs)
            if head:
                return output.logits.float().cpu()
            return pool(output.last_hidden_state, mask, self.how, self.normal).cpu()

    def _end(self, call: _Call, error: BaseException | None = None) -> None:
        """Set the result or the error of a call, and release its adapter. Further calls do
        nothing."""
        if call.lease is not None:
            call.lease.release()
        with suppress(InvalidStateError):  # cancelled meanwhile
            if error is None and len(call.vectors) == len(call.texts):
                call.done.set_result(call.vectors)
            elif error is not None:
                call.done.set_exception(error)
        if self.observer is not None:
            reason = (
                "cancelled" if call.done.cancelled() else "error" if error is not None else "stop"
            )
            self.observer.finished(call.blend, reason, time.monotonic() - call.began)
        with self._changed:
            if call.queued and not self._calls.remove(call):
                self._calls.ended(call)
            self.running, self.waiting = self.running - 1, self.waiting - len(call.texts)
            self._held[call.holder] -= len(call.texts)
            self._held += Counter()  # without those that have none
            self._changed.notify_all()


def _stopping() -> Refusal:
    return Refusal(
        503, "a server that stops", "one that runs", "send it to another", code="draining"
    )
