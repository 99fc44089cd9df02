"""Memory for keys and values of the engine's requests: rows, cached prefixes, and their common
budget.

    request → row, which begins with the cached beginning of its tokens → computed blocks are cached
    → row released

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
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from veneer.errors import ConfigError
from veneer.models.decode.attention import BLOCK
from veneer.models.decode.slots import Budget, LayerForm, Slots
from veneer.serve.prefixes import Block, Namespace, Prefixes
from veneer.serve.request_state import RequestState

log = logging.getLogger("veneer.serve")

#: answer tokens that a new row has room for, so that few rows must move soon
HEADROOM = 32

#: memory pages of a system that does not report them: 8 GiB
UNKNOWN_PAGES = 8 * 2**30 // mmap.PAGESIZE


class Memory:
    """Rows of ``length`` tokens for at most ``rows`` requests at a time, of a model whose layers
    have ``forms``, within ``limit`` bytes. Without ``prefix_cache`` every request is computed from
    its first token on."""

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
        if prefix_cache:
            block_bytes = self.slots.block_elements * self.slots.block_dtype.itemsize
            self.prefixes = Prefixes(block_bytes, self.budget)
            self.slots.reclaim = self.prefixes.evict

    @property
    def nbytes(self) -> int:
        return self.budget.rows + self.budget.prefixes

    def start(self, state: RequestState) -> bool:
        """Give a request a row that begins with the cached prefix of its tokens. Returns False if
        there is no room now."""
        self._find(state)  # marks the prefix as used, so that another one is evicted for the row
        row = self.slots.allocate(len(state.ids) + min(state.limit - state.generated, HEADROOM))
        if row is None:
            return False
        state.row = row
        blocks = self._find(state)
        self.slots.write_blocks(row, [block.data for block in blocks])
        state.length = len(blocks) * BLOCK
        return True

    def waits_for(self, state: RequestState, filling: Iterable[RequestState]) -> bool:
        """Whether one of the requests that are ``filling`` their rows is about to compute more of
        this one's beginning than is cached."""
        if self.prefixes is None or state.is_scored:
            return False
        namespace, stop = _namespace_of(state), (len(self._find(state)) + 1) * BLOCK
        return stop < len(state.ids) and any(
            each.length < stop <= len(each.ids)
            and _namespace_of(each).is_same_until(stop, namespace)
            and each.ids[:stop] == state.ids[:stop]
            for each in filling
        )

    def save(self, state: RequestState) -> None:
        """Cache the computed tokens of a request."""
        row = state.row
        if self.prefixes is not None and row is not None:
            self.prefixes.add(
                _namespace_of(state),
                state.ids,
                state.length,
                lambda first, stop: self.slots.read_blocks(row, first, stop),
            )

    def widen(self, state: RequestState) -> bool:
        """Make room for the next token of a request. Returns False if there is none now."""
        return state.row is None or self.slots.widen(state.row, state.length + 1)

    def release(self, state: RequestState) -> None:
        """Free a request's row, if it has one."""
        row, state.row = state.row, None
        if row is not None:
            self.slots.release(row)

    def trim(self, idle: float, prefix_idle: float) -> None:
        """Free the memory of rows unused for ``idle`` seconds, and prefixes unused for
        ``prefix_idle`` seconds."""
        self.slots.trim(idle)
        if self.prefixes is not None:
            self.prefixes.expire(prefix_idle)

    def expires_in(self, prefix_idle: float) -> float | None:
        """Seconds until the first prefix has been unused for ``prefix_idle`` seconds; None without
        prefixes."""
        oldest = None if self.prefixes is None else self.prefixes.oldest
        return None if oldest is None else max(0.0, oldest + prefix_idle - time.monotonic())

    def _find(self, state: RequestState) -> list[Block]:
        if self.prefixes is None or state.is_scored:
            return []
        return self.prefixes.find(_namespace_of(state), state.ids)


def _namespace_of(state: RequestState) -> Namespace:
    """The namespace in which a request with loaded adapters shares prefixes: with requests of the
    same ``cache_salt``, or else of the same API key."""
    if state.namespace is None:
        request = state.request
        salt = ("salt", request.cache_salt) if request.cache_salt else ("key", request.owner)
        uses = getattr(state.lease, "uses", ())
        state.namespace = Namespace(uses, salt, state.acts_from)
    return state.namespace


def longest_row(forms: Sequence[LayerForm], limit: int | None, length: int) -> int:
    """The tokens of the longest row that ``limit`` bytes hold, at most ``length``. ``ConfigError``:
    they hold none."""
    token = sum(form.nbytes for form in forms) + max(form.largest for form in forms)
    if limit is None or token * -(-length // BLOCK) * BLOCK <= limit:
        return length
    tokens = limit // token // BLOCK * BLOCK
    if not tokens:
        problem = f"{limit:,} bytes for keys and values"
        expected = f"at least {token * BLOCK:,}, which {BLOCK} tokens take"
        raise ConfigError(problem, expected, "raise --cache-memory")
    log.warning(
        "%s bytes for keys and values hold rows of %d tokens, not of %d: --cache-memory sets them",
        f"{limit:,}",
        tokens,
        length,
    )
    return tokens


def free_bytes(device: torch.device) -> int:
    """The free memory of a GPU, or of this machine within the limit of its control group; half of
    all memory if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not (meminfo := Path("/proc/meminfo")).is_file():
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else UNKNOWN_PAGES
        return pages * mmap.PAGESIZE // 2
    free = _number_of("MemAvailable:", meminfo) * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        cached = _number_of("inactive_file", group / "memory.stat")  # the system frees it on demand
        used = int((group / "memory.current").read_text()) - cached
        free = min(free, max(0, int(text) - used))
    return free


def _number_of(name: str, file: Path) -> int:
    """The number after ``name`` in a line that begins with it; 0 if there is no such line."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(line[1]) for line in lines if line and line[0] == name), 0)


def give_back() -> None:
    """Make the C library return unused memory to the system, if it supports that (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
