"""The KV cache of the engine's requests: it gives each request a row, caches prefixes for other
requests, and keeps both within one budget of bytes, whose default comes from the free memory.

    a request starts      it gets a row, which begins with the cached prefix of its tokens
    tokens are computed   full blocks of 16 tokens are copied to the cache of prefixes
    the request ends      its row stays for a request that continues it, or is released

A row that needs memory takes unused memory first, then that of cached prefixes. If that does not
suffice, the engine preempts a request.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.models.decode.attention import BLOCK
from veneer.models.decode.row_memory import Row
from veneer.models.decode.slots import Budget, LayerForm, Slots
from veneer.serve.prefixes import Block, Namespace, Prefixes
from veneer.serve.request_state import RequestState

log = logging.getLogger("veneer.serve")

#: a new row has room for its prompt and at least this many tokens of the answer, or for a whole
#: answer that is shorter. With less room, it would soon have to be copied to a longer row
HEADROOM_TOKENS = 32

#: the most rows that are kept after their requests have finished. One attention call of a layer
#: covers adjacent rows, so a kept row between running rows may cost one more call per layer
MAX_FINISHED_ROWS = 4

#: the number of memory pages that is assumed if the system does not report it (8 GiB)
ASSUMED_PAGES = 8 * 2**30 // mmap.PAGESIZE


class FinishedRow(NamedTuple):
    """The row of a request that ended at time ``ended_at`` (``time.monotonic``). It holds the keys
    and values of tokens ``ids``, of which the first ``prompt_length`` are the prompt. Requests of
    ``namespace`` may reuse them. ``prompt_logits`` [vocabulary]: the logits of the last prompt
    token, if known."""

    row: Row
    ids: Sequence[int]
    namespace: Namespace
    ended_at: float
    prompt_length: int
    prompt_logits: Tensor | None


class Memory:
    """The KV cache: rows of up to ``length`` tokens for at most ``rows`` requests at a time, and
    cached prefixes. Both together take at most ``limit`` bytes (None: no limit). ``forms``: the
    shape and dtype of each layer's keys and values. Without ``prefix_cache``, no request reuses
    keys and values of another.

    The rows of the requests that finished last stay in ``finished_rows``, the oldest first. A new
    request that begins with at least ``BLOCK`` tokens of such a row may take over the row, so that
    no block is copied. If it has the same prompt, no token of the prompt is computed again.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        device: torch.device,
        forms: Sequence[LayerForm],
        limit: int | None = None,
        *,
        prefix_cache: bool = True,
    ) -> None:
        self.budget = Budget(limit)
        self.slots = Slots(rows, length, device, forms, self.budget)
        self.prefixes: Prefixes | None = None
        self.finished_rows: list[FinishedRow] = []
        if prefix_cache:
            block_bytes = self.slots.block_elements * self.slots.block_dtype.itemsize
            self.prefixes = Prefixes(block_bytes, self.budget)
            self.slots.reclaim = self.prefixes.evict

    @property
    def nbytes(self) -> int:
        return self.budget.row_bytes + self.budget.prefix_bytes

    def start(self, state: RequestState) -> bool:
        """Give a request a row that begins with the cached prefix of its tokens. If the row of a
        finished request holds all of them, the request also gets the logits of its last prompt
        token. Returns False if there is no memory for a row now."""
        # finding the blocks marks them as used, so that making room for the row evicts others first
        blocks = self._cached_blocks(state)
        row_tokens = len(state.ids) + min(state.limit - state.generated, HEADROOM_TOKENS)
        if self._continue_finished_row(state, row_tokens, len(blocks) * BLOCK):
            return True
        row = self.slots.allocate(row_tokens)
        if row is None and self._release_finished_rows():
            row = self.slots.allocate(row_tokens)
        if row is None:
            return False
        state.row = row
        blocks = self._cached_blocks(state)  # again, since allocating may have evicted some
        self.slots.write_blocks(row, [block.data for block in blocks])
        state.length = len(blocks) * BLOCK
        return True

    def _continue_finished_row(
        self, state: RequestState, row_tokens: int, cached_tokens: int
    ) -> bool:
        """Give a request the row of a finished request that holds the most of its first tokens. The
        row must have as many columns as a new row for ``row_tokens`` tokens. It must hold at least
        ``BLOCK`` of the request's first tokens, and at least the ``cached_tokens`` that cached
        blocks would give. Returns False if there is no such row."""
        if state.is_scored:
            return False
        columns = self.slots.columns_for(row_tokens)
        shared_tokens, index = max(
            (
                (_shared_tokens(finished_row, state), index)
                for index, finished_row in enumerate(self.finished_rows)
                if finished_row.row.columns == columns
            ),
            default=(0, 0),
        )
        if shared_tokens < max(cached_tokens, BLOCK):
            return False
        finished_row = self.finished_rows.pop(index)
        state.row, state.length = finished_row.row, shared_tokens
        if shared_tokens == len(state.ids):
            state.prompt_logits = finished_row.prompt_logits
        return True

    def finish(self, state: RequestState) -> None:
        """Cache the computed tokens of a request that ends, and keep its row in ``finished_rows``.
        If there are more than ``MAX_FINISHED_ROWS``, release the oldest. Without ``prefix_cache``,
        do nothing."""
        self.save(state)
        if self.prefixes is None or state.row is None:
            return
        finished_row = FinishedRow(
            state.row,
            state.ids[: state.length],
            _namespace_of(state),
            time.monotonic(),
            len(state.request.prompt),
            state.prompt_logits,
        )
        self.finished_rows.append(finished_row)
        state.row = None
        if len(self.finished_rows) > MAX_FINISHED_ROWS:
            self.slots.release(self.finished_rows.pop(0).row)

    def _release_finished_rows(
        self, is_released: Callable[[FinishedRow], bool] = lambda finished_row: True
    ) -> bool:
        """Release those of ``finished_rows`` for which ``is_released`` is true, by default all;
        return whether any was released."""
        finished_rows, self.finished_rows = self.finished_rows, []
        for finished_row in finished_rows:
            if is_released(finished_row):
                self.slots.release(finished_row.row)
            else:
                self.finished_rows.append(finished_row)
        return len(self.finished_rows) < len(finished_rows)

    def waits_for(self, state: RequestState, filling: Iterable[RequestState]) -> bool:
        """Whether a request in prefill (``filling``) will soon compute at least one more block
        (``BLOCK`` tokens) of the first tokens of this request than is cached now. If so, waiting
        for the block is better than computing it twice."""
        if self.prefixes is None or state.is_scored:
            return False
        namespace, block_end = _namespace_of(state), (len(self._cached_blocks(state)) + 1) * BLOCK
        return block_end < len(state.ids) and any(
            other.length < block_end <= len(other.ids)
            and _namespace_of(other).shared_length(block_end, namespace) == block_end
            and other.ids[:block_end] == state.ids[:block_end]
            for other in filling
        )

    def save(self, state: RequestState) -> None:
        """Cache the keys and values of a request's computed tokens for other requests."""
        row = state.row
        if self.prefixes is not None and row is not None:
            self.prefixes.add(
                _namespace_of(state),
                state.ids,
                state.length,
                lambda first, stop: self.slots.read_blocks(row, first, stop),
            )

    def widen(self, state: RequestState) -> bool:
        """Make room for the next token in a request's row. Returns False if memory is lacking."""
        row, token_count = state.row, state.length + 1
        if row is None or self.slots.widen(row, token_count):
            return True
        return self._release_finished_rows() and self.slots.widen(row, token_count)

    def release(self, state: RequestState) -> None:
        """Free a request's row, if it has one."""
        row, state.row = state.row, None
        if row is not None:
            self.slots.release(row)

    def trim(self, idle_seconds: float, prefix_idle_seconds: float) -> None:
        """Release rows of requests that finished at least ``prefix_idle_seconds`` ago, or of whose
        adapters one has left memory. Free the memory that no row used for ``idle_seconds``, and the
        prefixes that no request used for ``prefix_idle_seconds``."""
        latest_end = time.monotonic() - prefix_idle_seconds
        self._release_finished_rows(
            lambda finished_row: (
                finished_row.ended_at <= latest_end or finished_row.namespace.is_gone
            )
        )
        self.slots.trim(idle_seconds)
        if self.prefixes is not None:
            self.prefixes.expire(prefix_idle_seconds)

    def expires_in(self, prefix_idle_seconds: float) -> float | None:
        """Seconds until a cached prefix or the row of a finished request has been unused for
        ``prefix_idle_seconds``; None if there is neither."""
        last_uses = [finished_row.ended_at for finished_row in self.finished_rows]
        if self.prefixes is not None and self.prefixes.oldest_use is not None:
            last_uses.append(self.prefixes.oldest_use)
        if not last_uses:
            return None
        return max(0.0, min(last_uses) + prefix_idle_seconds - time.monotonic())

    def _cached_blocks(self, state: RequestState) -> list[Block]:
        """The cached blocks of a request's first tokens; they are marked as used. Empty for a
        prompt that is scored, since all of its logits must be computed."""
        if self.prefixes is None or state.is_scored:
            return []
        return self.prefixes.find(_namespace_of(state), state.ids)


def _namespace_of(state: RequestState) -> Namespace:
    """The namespace of a request whose adapters are loaded: only requests in the same namespace
    reuse each other's keys and values. They have the same adapters (an adapter with invocation
    tokens counts as the base, see ``prefixes.py``), and the same ``cache_salt``, or none and the
    same API key."""
    if state.namespace is None:
        request = state.request
        salt = ("salt", request.cache_salt) if request.cache_salt else ("key", request.owner)
        weighted_adapters = getattr(state.lease, "uses", ())
        state.namespace = Namespace(weighted_adapters, salt, state.acts_from)
    return state.namespace


def _shared_tokens(finished_row: FinishedRow, state: RequestState) -> int:
    """The number of a request's first tokens whose keys and values the row of a finished request
    holds. The last token must be computed for its logits, so it counts only if both requests have
    the same prompt and these logits are known. A preempted request (``generated`` > 0) continues
    within its answer, for which no logits are stored."""
    length, namespace = len(state.ids), _namespace_of(state)
    token_pairs = enumerate(zip(finished_row.ids, state.ids, strict=False))
    max_length = min(len(finished_row.ids), length)
    equal_length = next(
        (index for index, (finished_token, token) in token_pairs if finished_token != token),
        max_length,
    )
    shared_length = finished_row.namespace.shared_length(equal_length, namespace)
    has_same_prompt = not state.generated and finished_row.prompt_length == length
    is_known = has_same_prompt and finished_row.prompt_logits is not None
    return shared_length if is_known else min(shared_length, length - 1)


def max_row_tokens(forms: Sequence[LayerForm], limit: int, length: int) -> int:
    """The number of tokens of the longest row that ``limit`` bytes hold, at most ``length``.
    ``ConfigError``: the bytes do not hold ``BLOCK`` tokens."""
    token_bytes = sum(form.token_bytes for form in forms) + max(
        form.larger_tensor_bytes for form in forms
    )
    if token_bytes * -(-length // BLOCK) * BLOCK <= limit:
        return length
    row_tokens = limit // token_bytes // BLOCK * BLOCK
    if not row_tokens:
        raise ConfigError(
            f"{limit:,} bytes for keys and values",
            f"at least {token_bytes * BLOCK:,}, which {BLOCK} tokens take",
            "raise --cache-memory",
        )
    log.warning(
        "%s bytes for keys and values hold rows of %d tokens, not of %d: --cache-memory sets them",
        f"{limit:,}",
        row_tokens,
        length,
    )
    return row_tokens


def free_bytes(device: torch.device) -> int:
    """The bytes of free memory of a GPU, or of this machine within the limit of its control group.
    Half of all memory if the system does not report how much is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not (meminfo := Path("/proc/meminfo")).is_file():
        page_count = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else ASSUMED_PAGES
        return page_count * mmap.PAGESIZE // 2
    available_bytes = _number_of("MemAvailable:", meminfo) * 1024
    cgroup_folder = Path("/sys/fs/cgroup")
    limit_file = cgroup_folder / "memory.max"
    if limit_file.is_file() and (text := limit_file.read_text().strip()) != "max":
        # the system frees unused file pages on demand
        reclaimable_bytes = _number_of("inactive_file", cgroup_folder / "memory.stat")
        used_bytes = int((cgroup_folder / "memory.current").read_text()) - reclaimable_bytes
        available_bytes = min(available_bytes, max(0, int(text) - used_bytes))
    return available_bytes


def _number_of(name: str, file: Path) -> int:
    """The number after ``name`` in a line that begins with it; 0 if there is no such line."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(line[1]) for line in lines if line and line[0] == name), 0)


def return_unused_memory() -> None:
    """Make the C library return unused memory to the system, if it supports that (glibc)."""
    malloc_trim = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )
    if malloc_trim is not None:
        malloc_trim(0)
