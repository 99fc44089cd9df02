"""A cache of keys and values by token prefix, in blocks of 16 tokens, for requests that begin with
the same tokens.

    namespace          adapters in memory, their weights, a salt; two namespaces share no block
      └─ block         the first 16 tokens, with their keys and values
           └─ block    the next 16 tokens
                └─ …

A block is found by its exact token ids and those of the blocks before it, not by a hash, so no two
prefixes can be confused. A namespace belongs to an adapter in memory, not to its name: an adapter
that is loaded again begins with an empty namespace, and the namespace of an evicted adapter is
dropped. The least recently used block is evicted first; the blocks that follow a block are evicted
before it.

An adapter with invocation tokens acts only from these tokens of the prompt on. The keys and values
before them are the base's, so its requests use the base's namespace. There, the adapter is part of
the keys of the blocks from the invocation on.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.models.decode.attention import BLOCK
from veneer.models.decode.slots import Budget


class Namespace:
    """Identifies the requests that may share cached prefixes: those with the same ``salt`` and the
    same ``adapters``, as (adapter in memory, weight); empty for the base. ``acts_from``: the index
    of the first token on which the adapters act; the tokens before it are computed by the base."""

    def __init__(
        self, adapters: Iterable[tuple[Any, float]], salt: Hashable, acts_from: float = 0
    ) -> None:
        used = [(adapter, weight) for adapter, weight in adapters if weight]
        # weak, so that a namespace keeps no adapter in memory
        self.references = [] if acts_from else [weakref.ref(adapter) for adapter, _ in used]
        # unlike ``id(adapter)``, a uid is never used again
        self.uses = tuple((adapter.uid, weight) for adapter, weight in used)
        self.key = () if acts_from else self.uses, salt
        self.acts_from = acts_from

    @property
    def is_gone(self) -> bool:
        """Whether one of the adapters has left memory."""
        return any(reference() is None for reference in self.references)

    def block_key(self, ids: Sequence[int], number: int) -> Hashable:
        """The key of block ``number`` of the tokens ``ids`` among the blocks that follow the same
        block: its tokens, and if adapters act on them only from ``acts_from`` on, also the adapters
        and where in the block they begin to act."""
        first = number * BLOCK
        tokens = tuple(ids[first : first + BLOCK])
        if not self.acts_from or first + BLOCK <= self.acts_from:
            return tokens
        return tokens, self.uses, max(0, self.acts_from - first)

    def shared_length(self, length: int, namespace: Namespace) -> int:
        """How many of the first ``length`` tokens have equal keys and values in both namespaces, if
        the tokens are equal."""
        if self.key != namespace.key:
            return 0
        acting, other_acting = (
            (each.uses, each.acts_from) if 0 < each.acts_from < length else None
            for each in (self, namespace)
        )
        if acting == other_acting:
            return length
        return int(min(uses[1] for uses in (acting, other_acting) if uses is not None))


class Root:
    """The root of a namespace's tree of blocks. It holds weak references to the adapters:
    ``gone(key)`` is called with the namespace's key when one of them is freed."""

    def __init__(self, namespace: Namespace, gone: Callable[[Hashable], None]) -> None:
        self.key = namespace.key
        self.children: dict[Hashable, Block] = {}
        self.references = [
            weakref.ref(adapter, lambda _: gone(self.key))
            for reference in namespace.references
            if (adapter := reference()) is not None
        ]


class Block:
    """The ``BLOCK`` tokens that follow those of ``parent``, which has this block in ``children``
    under ``key``. ``data``: their keys and values in all layers, in one dimension. ``used_at``: the
    time of the last use (``time.monotonic``)."""

    __slots__ = ("children", "data", "key", "parent", "used_at")

    def __init__(self, key: Hashable, parent: Block | Root, data: Tensor) -> None:
        self.key, self.parent, self.data, self.used_at = key, parent, data, 0.0
        self.children: dict[Hashable, Block] = {}


class Prefixes:
    """The cached blocks, each of ``block_bytes``, within a budget that rows of requests share. The
    engine's thread alone calls it."""

    def __init__(self, block_bytes: int, budget: Budget) -> None:
        self.block_bytes, self.budget = block_bytes, budget
        self._roots: dict[Hashable, Root] = {}
        self._order: OrderedDict[Block, None] = OrderedDict()  # least recently used first
        self._gone: deque[Hashable] = deque()  # namespaces of adapters that have left memory

    def __len__(self) -> int:
        return len(self._order)

    def find(self, namespace: Namespace, ids: Sequence[int]) -> list[Block]:
        """The blocks of the longest cached prefix of a prompt. It never covers the last token,
        whose logits must be computed."""
        self._drop_gone()
        chain = self._walk(namespace, ids, (len(ids) - 1) // BLOCK)
        self._touch(chain)
        return chain

    def add(
        self,
        namespace: Namespace,
        ids: Sequence[int],
        count: int,
        read: Callable[[int, int], Sequence[Tensor]],
    ) -> None:
        """Cache the full blocks of the first ``count`` tokens of ``ids``. ``read(first, stop)``
        returns copies of blocks ``first`` … ``stop`` − 1 and is called for those not cached yet.
        Other cached blocks are evicted for them. If there still is no room for all, the last blocks
        are left out."""
        self._drop_gone()
        wanted = count // BLOCK
        chain = self._walk(namespace, ids, wanted)
        self._touch(chain)
        room = self._make_room(wanted - len(chain), set(chain))
        if not room:
            return
        if namespace.key not in self._roots:
            self._roots[namespace.key] = Root(namespace, self._gone.append)
        parent: Block | Root = chain[-1] if chain else self._roots[namespace.key]
        first = len(chain)
        for number, data in enumerate(read(first, first + room), first):
            block = Block(namespace.block_key(ids, number), parent, data)
            parent.children[block.key] = block
            self._order[block] = None
            self.budget.prefix_bytes += self.block_bytes
            chain.append(block)
            parent = block
        self._touch(chain)

    def evict(self, count: int) -> None:
        """Evict blocks until at least ``count`` bytes have been freed, or no block is left."""
        self._drop_gone()
        wanted = self.budget.prefix_bytes - count
        while self._order and self.budget.prefix_bytes > wanted:
            self._remove(next(iter(self._order)))

    def expire(self, seconds: float) -> None:
        """Free blocks that were not used for ``seconds``."""
        self._drop_gone()
        before = time.monotonic() - seconds
        while self._order and (oldest := next(iter(self._order))).used_at <= before:
            self._remove(oldest)

    @property
    def oldest_use(self) -> float | None:
        """When the least recently used block was used, in seconds of ``time.monotonic``."""
        return next(iter(self._order)).used_at if self._order else None

    def _walk(self, namespace: Namespace, ids: Sequence[int], max_blocks: int) -> list[Block]:
        """The cached blocks of the longest prefix of ``ids``, at most ``max_blocks``."""
        chain: list[Block] = []
        root = self._roots.get(namespace.key)
        children: Mapping[Hashable, Block] = {} if root is None else root.children
        for number in range(max_blocks):
            block = children.get(namespace.block_key(ids, number))
            if block is None:
                break
            chain.append(block)
            children = block.children
        return chain

    def _touch(self, chain: Sequence[Block]) -> None:
        """Mark the blocks of a chain as used now. Its last block will be evicted first."""
        moment = time.monotonic()
        for block in reversed(chain):
            block.used_at = moment
            self._order.move_to_end(block)

    def _make_room(self, wanted: int, spared: set[Block]) -> int:
        """Evict less recently used blocks until ``wanted`` blocks fit; return how many do."""
        while self.budget.free < wanted * self.block_bytes and self._order:
            oldest = next(iter(self._order))
            if oldest in spared:
                break
            self._remove(oldest)
        free = self.budget.free
        return (
            wanted if free >= wanted * self.block_bytes else max(0, int(free // self.block_bytes))
        )

    def _remove(self, block: Block) -> None:
        """Remove a block that has no children."""
        del self._order[block]
        del block.parent.children[block.key]
        self.budget.prefix_bytes -= self.block_bytes
        if isinstance(block.parent, Root) and not block.parent.children:
            del self._roots[block.parent.key]

    def _drop_gone(self) -> None:
        """Remove the blocks of adapters that were evicted from memory."""
        while self._gone:
            root = self._roots.pop(self._gone.popleft(), None)
            below = list(root.children.values()) if root is not None else []
            while below:
                block = below.pop()
                below += block.children.values()
                del self._order[block]
                self.budget.prefix_bytes -= self.block_bytes
