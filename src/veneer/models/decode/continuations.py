"""Generate continuations of many prompts with a model in memory, by continuous batching, without a
server.

    equal prompts form a group → its prompt is computed once, into a row of the KV cache → each of
    its continuations gets a copy of that row → each step adds a token to every running row → a row
    that ends makes room for the next continuation

In each step, one call of the model computes all running rows. Prompts of groups that begin in this
step are computed in the same call if they are short, else in calls of their own. So a short answer
does not wait until a long one ends, and eight answers to one prompt compute its tokens once. All
rows use the adapter that is selected in the calling thread, with its current weights.
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

#: the most tokens of prompts, padding included, in one call that computes several prompts
MAX_PREFILL_TOKENS = 4096

#: the ``length`` of ``Forward.compare_logits`` for a model whose architecture sets no limit; the
#: trial uses nine tokens of it
TRIAL_LENGTH = 32

#: the result of each model's trial run (``open_forward``): (what the result depends on, so that a
#: changed model is tried again; a ``LayerForm`` for each layer, or the reason of a refusal)
_TRIED: weakref.WeakKeyDictionary[Any, tuple[Hashable, tuple[LayerForm, ...] | str]] = (
    weakref.WeakKeyDictionary()
)

#: a function (logits [n, vocabulary], the numbers of the n continuations) -> a token for each
Sample = Callable[[Tensor, Sequence[int]], list[int]]


def open_forward(model: Any, length: int) -> Forward:
    """A ``Forward`` of a model of transformers in eval mode, for rows of up to ``length`` tokens.
    Its ``close`` restores the model.

    The first call for a model runs a trial, which compares the logits on the KV cache with those
    of the model's own forward. The result is kept until the model's attention, dtype, device or
    autocast change. The trial runs without adapters, because a trained adapter may amplify the
    rounding errors of 16-bit numbers beyond the tolerance of the trial.

    Raises:
        ConfigError: the model cannot be called on the KV cache, or not with such long rows.
    """
    if "generate" in vars(model):  # replaced by another library; it may do more than the class's
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
                forward.compare_logits(forward.context or TRIAL_LENGTH, lambda _: _base_of(model))
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
    """A block in which calls use no adapter. An adapter that is merged stays in the weights."""
    attached = adapters_of(model)
    plain = attached is None or attached.merged is not None
    return nullcontext() if plain else use(model, None)


class _Continuation:
    """A continuation that runs. ``number``: its index among all prompts. ``token``: its last token.
    ``row`` holds the keys and values of the ``length`` tokens before that token."""

    def __init__(self, number: int, token: int, row: Row, length: int) -> None:
        self.number, self.token, self.row, self.length = number, token, row, length


class _Group:
    """The continuations of one prompt that have not begun. ``numbers``: their indices among all
    prompts. Once the prompt is computed, ``row`` holds its keys and values, and ``logits``
    [vocabulary] are those after its last token."""

    row: Row
    logits: Tensor | None = None

    def __init__(self, prompt: tuple[int, ...], numbers: Sequence[int]) -> None:
        self.prompt, self.numbers = prompt, deque(numbers)


class Continuations:
    """One continuation for each of ``prompts``, of up to ``max_new_tokens`` tokens. It ends early
    with a token in ``end_tokens``. At most ``rows`` continuations run at a time; those of the
    longest prompts begin first."""

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
        finally:  # after a failure, the traceback keeps this object; it must not keep the memory
            self.slots.clear()
        return self.answers

    def _length_of(self, group: _Group) -> int:
        """The most tokens that a row of the group holds. It does not hold the last token of an
        answer, of which no keys and values are computed."""
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
        """The groups whose continuations begin in this step, each with the number of these
        continuations. A group leaves the queue when its last continuation begins."""
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
        """Allocate memory at once for the rows of the continuations that begin, and for the row of
        a prompt if further continuations of its group follow in later steps."""
        rows = Counter[int]()
        for group, count in beginning:
            stays, computed = count < len(group.numbers), group.logits is not None
            rows[self.slots.columns_for(self._length_of(group))] += count + stays - computed
        for columns, count in rows.items():
            self.slots.reserve(columns, count)

    def _allocate(self, group: _Group) -> Row:
        row = self.slots.allocate(self._length_of(group))
        assert row is not None  # the budget has no limit
        return row

    def _compute(self, running: Sequence[_Continuation], new: Sequence[_Group]) -> Tensor | None:
        """Compute the last token of each running continuation, and the prompts of the ``new``
        groups, whose logits are stored in the groups. Returns the logits [running, vocabulary] of
        the running ones; None if none runs."""
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
        """Sample the first token of ``count`` continuations of a group. Each one that does not end
        with it gets a copy of the prompt's row; the last of the group gets that row itself."""
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
        """Add a token to an answer. Returns whether this token ends the answer."""
        self.answers[number].append(token)
        return token in self.end_tokens or len(self.answers[number]) == self.max_new_tokens


def _calls_of(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Divide groups, which are sorted by the length of their prompts, the longest first, among the
    calls that compute the prompts."""
    call: list[_Group] = []
    for group in groups:
        if call and (len(call) + 1) * len(call[0].prompt) > MAX_PREFILL_TOKENS:
            yield call
            call = []
        call.append(group)
    if call:
        yield call
