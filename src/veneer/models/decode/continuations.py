"""Generate continuations of many prompts with a model in memory, by continuous batching, without a
server.

    equal prompts form a group → its prompt is computed once, into a row of the KV cache → each of
    its continuations gets a copy of that row → each step adds a token to every running row → a row
    that ends makes room for the next continuation

In each step, one call of the model computes all running rows. The prompts of the groups that begin
in the step are computed in the same call if they are short, else in calls before it. So a short
answer does not wait until a long one ends, and a prompt is computed once for all of its answers.
All rows use the adapter that is selected in the calling thread, with its current weights.
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
from veneer.models.decode.forward import MAX_TOKENS_TOGETHER, Forward
from veneer.models.decode.row_memory import LayerForm, Row
from veneer.models.decode.slots import Slots

#: the most tokens of prompts, padding included, in one call that computes several prompts
MAX_PREFILL_TOKENS = 4096

#: the ``length`` that ``open_forward`` passes to ``Forward.compare_logits`` for a model whose
#: architecture sets no limit. Any number from nine on has the same effect, because the comparison
#: uses at most nine tokens
TRIAL_LENGTH = 32

#: the result of each model's trial, which compares logits (``open_forward``): (what the result
#: depends on, so that a changed model is tried again; a ``LayerForm`` for each layer, or the reason
#: why the model was refused)
_TRIAL_RESULTS: weakref.WeakKeyDictionary[Any, tuple[Hashable, tuple[LayerForm, ...] | str]] = (
    weakref.WeakKeyDictionary()
)

#: a function (logits [n, vocabulary], the indices of n prompts) -> the next token for each prompt
Sample = Callable[[Tensor, Sequence[int]], list[int]]


def open_forward(model: Any, length: int) -> Forward:
    """A ``Forward`` of a model of transformers in eval mode, for rows of up to ``length`` tokens.
    Its ``close`` restores the model.

    The first call for a model runs a trial, which compares the logits on the KV cache with those
    of the model's own forward. The result is kept until the model's attention, dtype, device or
    autocast change. The trial runs without adapters, because a trained adapter may amplify the
    rounding errors of 16-bit numbers beyond the tolerance of the trial.

    Raises:
        ConfigError: the model cannot be called on the KV cache, or not with such long rows, or its
            ``generate`` was replaced.
    """
    if "generate" in vars(model):  # set by another library; it may do more than that of the class
        raise ConfigError(
            f"{type(model).__name__}, a model whose generate was replaced",
            "one that generates as its class does",
            "call its generate",
        )
    weight = next(model.parameters())
    autocast = torch.is_autocast_enabled(weight.device.type)
    trial_key = model.config._attn_implementation, weight.dtype, weight.device, autocast
    tried_key, trial_result = _TRIAL_RESULTS.get(model, (None, ()))
    if tried_key != trial_key:
        trial_result = None
    elif isinstance(trial_result, str):
        raise ConfigError(trial_result)
    forward = Forward(model)
    try:
        if trial_result is None:
            forward.compare_logits(
                forward.context or TRIAL_LENGTH, lambda _: _without_adapter(model)
            )
        else:
            forward.forms = trial_result
    except BaseException as error:
        forward.close()
        if isinstance(error, ConfigError):
            _TRIAL_RESULTS[model] = trial_key, error.problem
        raise
    _TRIAL_RESULTS[model] = trial_key, forward.forms
    if forward.context is not None and length > forward.context:
        forward.close()
        raise ConfigError(
            f"{type(model).__name__}, whose positions change behind {forward.context:,} tokens",
            f"rows that end there, not behind {length:,}",
            "shorten the prompts, or ask for fewer new tokens",
        )
    return forward


def _without_adapter(model: Any) -> AbstractContextManager[Any]:
    """A block in which calls of the model use no adapter. An adapter that is merged stays in the
    weights, and so in the calls."""
    model_adapters = adapters_of(model)
    uses_no_adapter = model_adapters is None or model_adapters.merged is not None
    return nullcontext() if uses_no_adapter else use(model, None)


class _Continuation:
    """A continuation that runs. ``prompt_index``: the index of its prompt in ``prompts``.
    ``token``: its last token. ``row`` holds the keys and values of the ``length`` tokens before
    ``token``."""

    def __init__(self, prompt_index: int, token: int, row: Row, length: int) -> None:
        self.prompt_index, self.token, self.row, self.length = prompt_index, token, row, length


class _Group:
    """The continuations of equal prompts that have not begun. ``prompt_indices``: the indices of
    their prompts in ``prompts``. Once the prompt is computed, ``row`` holds its keys and values,
    and ``logits`` [vocabulary] are those after its last token."""

    row: Row
    logits: Tensor | None = None

    def __init__(self, prompt: tuple[int, ...], prompt_indices: Sequence[int]) -> None:
        self.prompt, self.prompt_indices = prompt, deque(prompt_indices)


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
        indices_by_prompt = defaultdict[tuple[int, ...], list[int]](list)
        for prompt_index, prompt in enumerate(prompts):
            indices_by_prompt[tuple(prompt)].append(prompt_index)
        self.waiting = deque(
            _Group(prompt, indices_by_prompt[prompt])
            for prompt in sorted(indices_by_prompt, key=len, reverse=True)
        )
        self.running: list[_Continuation] = []
        longest_row = self._length_of(self.waiting[0]) if self.waiting else 1
        self.slots = Slots(rows, longest_row, forward.device, forward.forms)

    @torch.no_grad()
    def run(self) -> list[list[int]]:
        """The new tokens of each prompt, in order."""
        try:
            while self.waiting or self.running:
                self._step()
        finally:  # after a failure, the traceback refers to this object: free the memory of rows
            self.slots.clear()
        return self.answers

    def _length_of(self, group: _Group) -> int:
        """The most tokens that a row of the group holds. It does not hold the last token of an
        answer, of which no keys and values are computed."""
        return len(group.prompt) + self.max_new_tokens - 1

    def _step(self) -> None:
        groups_and_counts = self._next_groups()
        self._reserve(groups_and_counts)
        new_groups = [group for group, _ in groups_and_counts if group.logits is None]
        for group in new_groups:
            group.row = self._allocate(group)
        running = sorted(self.running, key=lambda continuation: continuation.row.position)
        logits = self._compute(running, new_groups)
        if logits is not None:
            self._accept(running, logits)
        for group, count in groups_and_counts:
            self._begin(group, count)

    def _next_groups(self) -> list[tuple[_Group, int]]:
        """The groups whose continuations begin in this step, each with the number of these
        continuations. A group leaves the queue when its last continuation begins."""
        free_rows, groups = self.rows - len(self.running), list[tuple[_Group, int]]()
        while free_rows and self.waiting:
            group = self.waiting[0]
            count = min(free_rows, len(group.prompt_indices))
            groups.append((group, count))
            free_rows -= count
            if count == len(group.prompt_indices):
                self.waiting.popleft()
        return groups

    def _reserve(self, groups_and_counts: Sequence[tuple[_Group, int]]) -> None:
        """Allocate memory at once for the rows of the continuations that begin in this step, and
        for the row of a prompt if further continuations of its group follow in later steps.
        ``groups_and_counts``: (group, number of continuations that begin)."""
        rows_by_columns = Counter[int]()
        for group, count in groups_and_counts:
            keeps_prompt_row, is_computed = (
                count < len(group.prompt_indices),
                group.logits is not None,
            )
            rows_by_columns[self.slots.columns_for(self._length_of(group))] += (
                count + keeps_prompt_row - is_computed
            )
        for columns, count in rows_by_columns.items():
            self.slots.reserve(columns, count)

    def _allocate(self, group: _Group) -> Row:
        row = self.slots.allocate(self._length_of(group))
        assert row is not None  # ``Slots`` were created without a limit of memory
        return row

    def _compute(
        self, running: Sequence[_Continuation], new_groups: Sequence[_Group]
    ) -> Tensor | None:
        """Call the model on the last token of each running continuation, and on the prompts of
        ``new_groups``. Store the logits of these prompts in the groups. Returns the logits
        [running, vocabulary] of the running continuations; None if there are none."""
        rows = [continuation.row for continuation in running]
        tokens = [continuation.token for continuation in running]
        lengths = [continuation.length for continuation in running]
        if (
            running
            and new_groups
            and sum(len(group.prompt) for group in new_groups) <= MAX_TOKENS_TOGETHER
        ):
            pieces = [(group.row, 0, group.prompt) for group in new_groups]
            logits = self.forward.together(self.slots, rows, tokens, lengths, pieces)
            for group, group_logits in zip(new_groups, logits[len(rows) :], strict=True):
                group.logits = group_logits
            return logits[: len(rows)]
        for groups in _split_into_calls(new_groups):
            prompts = [group.prompt for group in groups]
            logits = self.forward.fill(self.slots, [group.row for group in groups], prompts)
            for group, group_logits in zip(groups, logits, strict=True):
                group.logits = group_logits
        return self.forward.decode(self.slots, rows, tokens, lengths) if running else None

    def _accept(self, running: Sequence[_Continuation], logits: Tensor) -> None:
        """Sample the next token of each running continuation from ``logits`` [running, vocabulary],
        and free the rows of the continuations that end with it."""
        tokens = self.sample(logits, [continuation.prompt_index for continuation in running])
        self.running = []
        for continuation, token in zip(running, tokens, strict=True):
            continuation.token = token
            continuation.length += 1
            if self._append(continuation.prompt_index, token):
                self.slots.release(continuation.row)
            else:
                self.running.append(continuation)

    def _begin(self, group: _Group, count: int) -> None:
        """Sample the first token of ``count`` continuations of a group. A continuation that does
        not end with this token gets a copy of the prompt's row; the last one of the group gets the
        prompt's row itself."""
        assert group.logits is not None
        prompt_indices = [group.prompt_indices.popleft() for _ in range(count)]
        tokens = self.sample(group.logits.expand(count, -1), prompt_indices)
        unfinished = [
            (prompt_index, token)
            for prompt_index, token in zip(prompt_indices, tokens, strict=True)
            if not self._append(prompt_index, token)
        ]
        takes_row = bool(unfinished) and not group.prompt_indices
        copied_rows = [self._allocate(group) for _ in range(len(unfinished) - takes_row)]
        self.slots.copy(group.row, copied_rows, len(group.prompt))
        rows = [*copied_rows, group.row] if takes_row else copied_rows
        self.running += [
            _Continuation(prompt_index, token, row, len(group.prompt))
            for (prompt_index, token), row in zip(unfinished, rows, strict=True)
        ]
        if not group.prompt_indices and not takes_row:
            self.slots.release(group.row)

    def _append(self, prompt_index: int, token: int) -> bool:
        """Add a token to an answer. Returns whether this token ends the answer."""
        self.answers[prompt_index].append(token)
        return token in self.end_tokens or len(self.answers[prompt_index]) == self.max_new_tokens


def _split_into_calls(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Divide groups among calls of ``Forward.fill``, each of which computes the prompts of at most
    ``MAX_PREFILL_TOKENS`` tokens, padding included, or a single prompt. ``groups`` are sorted by
    the length of their prompts, the longest first, which bounds the padding."""
    call_groups: list[_Group] = []
    for group in groups:
        if call_groups and (len(call_groups) + 1) * len(call_groups[0].prompt) > MAX_PREFILL_TOKENS:
            yield call_groups
            call_groups = []
        call_groups.append(group)
    if call_groups:
        yield call_groups
