"""Continuations of many prompts, by a model as it is now: continuous batching, without a server.

    equal prompts are a group → its prompt is computed once → a copy of that row for each
    continuation → in each step a token of every running row → a row that ends frees its place

A step is one call of the model for the running rows, and prompts that begin are computed in it
where they are short, else in calls of their own. So a short answer waits for no long one, and eight
answers to a prompt cost its tokens once. All rows use the adapter that is selected in the calling
thread, with the weights that it has now.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from veneer.attach import adapters_of, use
from veneer.errors import ConfigError
from veneer.models.decode.forward import TOGETHER, Forward
from veneer.models.decode.row_memory import LayerForm, Row
from veneer.models.decode.slots import Slots

#: tokens of prompts, padding included, that are computed in one call
PREFILL = 4096

#: tokens of the trial of a model that sets no limit; it takes fewer
TRIAL = 32

#: by model: what was true of it when it was tried, and the forms of its layers, or why it cannot be
#: called on slots
_TRIED: weakref.WeakKeyDictionary[Any, tuple[Hashable, tuple[LayerForm, ...] | str]] = (
    weakref.WeakKeyDictionary()
)

#: tokens for logits [n, vocabulary], of the continuations with these numbers
Sample = Callable[[Tensor, Sequence[int]], list[int]]


def open_forward(model: Any, length: int) -> Forward:
    """A ``Forward`` of a model of transformers in eval mode, for rows of up to ``length`` tokens.
    ``close`` gives the model back as it was. Calls of the base are tried beside its own forward
    once, and again after a change of its attention, dtype or device. The
    arithmetic of adapters is no part of what is tried: a trained one may amplify the rounding of 16
    bits beyond what a trial allows.

    Raises:
        ConfigError: the model cannot be called on slots, or not with such long rows.
    """
    if "generate" in vars(model):  # somebody else's, which does more than the class's
        raise ConfigError(
            f"{type(model).__name__}, a model whose generate was replaced",
            "one that generates as its class does",
            "call its generate",
        )
    weight = next(model.parameters())
    autocast = torch.is_autocast_enabled(weight.device.type)
    state = model.config._attn_implementation, weight.dtype, weight.device, autocast
    tried_state, verdict = _TRIED.get(model, (None, ()))
    if tried_state != state:
        verdict = None
    elif isinstance(verdict, str):
        raise ConfigError(verdict)
    try:
        forward = Forward(model)
        try:
            if verdict is None:
                forward.prove(forward.context or TRIAL, lambda count: _base_of(model))
            else:
                forward.forms = verdict
        except BaseException:
            forward.close()
            raise
    except ConfigError as error:
        _TRIED[model] = state, error.problem
        raise
    _TRIED[model] = state, forward.forms
    if forward.context is not None and length > forward.context:
        forward.close()
        raise ConfigError(
            f"{type(model).__name__}, whose positions change behind {forward.context:,} tokens",
            f"rows that end there, not behind {length:,}",
            "shorten the prompts, or ask for fewer new tokens",
        )
    return forward


def _base_of(model: Any) -> AbstractContextManager[Any]:
    """A block in which calls use the base; with a merged adapter, the weights as they are."""
    attached = adapters_of(model)
    plain = attached is None or attached.merged is not None
    return nullcontext() if plain else use(model, None)


class _Continuation:
    """A continuation that runs, the ``number``-th of all: its last token, and the row that has the
    keys and values of the ``length`` tokens before it."""

    def __init__(self, number: int, token: int, row: Row, length: int) -> None:
        self.number, self.token, self.row, self.length = number, token, row, length


class _Group:
    """Continuations of one prompt that have not begun, by ``numbers``. Once the prompt is computed
    it lies in ``row``, and ``logits`` [vocabulary] follow it."""

    row: Row
    logits: Tensor | None = None

    def __init__(self, prompt: tuple[int, ...], numbers: Sequence[int]) -> None:
        self.prompt, self.numbers = prompt, deque(numbers)


class Continuations:
    """The continuations of ``prompts``: up to ``max_new_tokens`` tokens each, the last of which may
    be one of ``end_tokens``. At most ``rows`` of them run at a time; the longest prompts begin."""

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[Sequence[int]],
        sample: Sample,
        *,
        max_new_tokens: int,
        rows: int,
        end_tokens: Collection[int],
    ) -> None:
        self.forward, self.sample, self.rows = forward, sample, rows
        self.max_new_tokens, self.end_tokens = max_new_tokens, end_tokens
        self.answers: list[list[int]] = [[] for _ in prompts]
        numbers = defaultdict[tuple[int, ...], list[int]](list)
        for number, prompt in enumerate(prompts):
            numbers[tuple(prompt)].append(number)
        self.waiting = deque(
            _Group(prompt, numbers[prompt]) for prompt in sorted(numbers, key=len, reverse=True)
        )
        self.running: list[_Continuation] = []
        longest = self._length_of(self.waiting[0]) if self.waiting else 1
        self.slots = Slots(rows, longest, forward.device, forward.forms)

    @torch.no_grad()
    def run(self) -> list[list[int]]:
        """The new tokens of each prompt, in order."""
        try:
            while self.waiting or self.running:
                self._step()
        finally:  # a failure's traceback keeps this object, and must not keep the memory
            self.slots.clear()
        return self.answers

    def _length_of(self, group: _Group) -> int:
        """Tokens that a row of the group may have. Nothing is computed of a last token."""
        return len(group.prompt) + self.max_new_tokens - 1

    def _step(self) -> None:
        beginning = self._next_groups()
        self._reserve(beginning)
        new = [group for group, _ in beginning if group.logits is None]
        for group in new:
            group.row = self._allocate(group)
        running = sorted(self.running, key=lambda continuation: continuation.row.position)
        logits = self._compute(running, new)
        if logits is not None:
            self._accept(running, logits)
        for group, count in beginning:
            self._begin(group, count)

    def _next_groups(self) -> list[tuple[_Group, int]]:
        """The groups of which continuations begin now, and how many of each. A group leaves the
        queue with its last one."""
        free, groups = self.rows - len(self.running), list[tuple[_Group, int]]()
        while free and self.waiting:
            group = self.waiting[0]
            count = min(free, len(group.numbers))
            groups.append((group, count))
            free -= count
            if count == len(group.numbers):
                self.waiting.popleft()
        return groups

    def _reserve(self, beginning: Sequence[tuple[_Group, int]]) -> None:
        """Make memory for the rows of these continuations at once, and for the row of a prompt that
        stays for further ones."""
        rows = Counter[int]()
        for group, count in beginning:
            stays, computed = count < len(group.numbers), group.logits is not None
            rows[self.slots.columns_for(self._length_of(group))] += count + stays - computed
        for columns, count in rows.items():
            self.slots.reserve(columns, count)

    def _allocate(self, group: _Group) -> Row:
        row = self.slots.allocate(self._length_of(group))
        assert row is not None  # there is no budget
        return row

    def _compute(self, running: Sequence[_Continuation], new: Sequence[_Group]) -> Tensor | None:
        """Logits [running, vocabulary] behind a token of each running row; None if there is none.
        The prompts of ``new`` groups are computed, too."""
        rows = [continuation.row for continuation in running]
        tokens = [continuation.token for continuation in running]
        lengths = [continuation.length for continuation in running]
        if running and new and sum(len(group.prompt) for group in new) <= TOGETHER:
            pieces = [(group.row, 0, group.prompt) for group in new]
            logits = self.forward.together(self.slots, rows, tokens, lengths, pieces)
            for group, group_logits in zip(new, logits[len(rows) :], strict=True):
                group.logits = group_logits
            return logits[: len(rows)]
        for groups in _calls_of(new):
            prompts = [group.prompt for group in groups]
            logits = self.forward.fill(self.slots, [group.row for group in groups], prompts)
            for group, group_logits in zip(groups, logits, strict=True):
                group.logits = group_logits
        return self.forward.decode(self.slots, rows, tokens, lengths) if running else None

    def _accept(self, running: Sequence[_Continuation], logits: Tensor) -> None:
        """Give each running continuation its next token, and free the rows of those that end."""
        tokens = self.sample(logits, [continuation.number for continuation in running])
        self.running = []
        for continuation, token in zip(running, tokens, strict=True):
            continuation.token = token
            continuation.length += 1
            if self._append(continuation.number, token):
                self.slots.release(continuation.row)
            else:
                self.running.append(continuation)

    def _begin(self, group: _Group, count: int) -> None:
        """Sample the first token of so many continuations of a group. Each that goes on gets a copy
        of the prompt's row; the last of the group gets that row itself."""
        assert group.logits is not None
        numbers = [group.numbers.popleft() for _ in range(count)]
        tokens = self.sample(group.logits.expand(count, -1), numbers)
        continuing = [
            (number, token)
            for number, token in zip(numbers, tokens, strict=True)
            if not self._append(number, token)
        ]
        takes_row = bool(continuing) and not group.numbers
        copies = [self._allocate(group) for _ in range(len(continuing) - takes_row)]
        self.slots.copy(group.row, copies, len(group.prompt))
        rows = [*copies, group.row] if takes_row else copies
        self.running += [
            _Continuation(number, token, row, len(group.prompt))
            for (number, token), row in zip(continuing, rows, strict=True)
        ]
        if not group.numbers and not takes_row:
            self.slots.release(group.row)

    def _append(self, number: int, token: int) -> bool:
        """Add a token to an answer; whether that was its last one."""
        self.answers[number].append(token)
        return token in self.end_tokens or len(self.answers[number]) == self.max_new_tokens


def _calls_of(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Groups, the longest first, whose prompts are computed in one call."""
    call: list[_Group] = []
    for group in groups:
        if call and (len(call) + 1) * len(call[0].prompt) > PREFILL:
            yield call
            call = []
        call.append(group)
    if call:
        yield call
