"""The prefix cache: attention keys and values of prompts, in blocks of 16 tokens, which requests
that begin with the same tokens reuse.

    namespace          adapters in memory, their weights, a salt; two namespaces share no block
      └─ block         the first 16 tokens, with their keys and values
           └─ block    the next 16 tokens
                └─ …

A block is found by its exact token ids and those of the blocks before it, not by a hash, so no two
prefixes can be confused. A namespace belongs to an adapter in memory, not to its name: an adapter
that is loaded again begins with an empty namespace, and the namespace of an evicted adapter is
dropped. The least recently used block is evicted first. A block can be used only after those before
it, so it is always evicted before them.

An adapter with invocation tokens (activated LoRA) acts only from the last occurrence of these
tokens in the prompt on. The keys and values before them are the base's, so its requests use the
base's namespace. There, the dictionary keys of the blocks from the invocation tokens on contain the
adapter, so that other requests do not find these blocks.
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
    """Identifies the requests that may share cached prefixes: those with equal salt and adapters.

    Args:
        adapters: pairs of an adapter in memory and its weight; empty for the base.
        salt: requests with different salts share nothing, such as those of different API keys.
        acts_from: the index of the first token on which the adapters act. The tokens before it are
            computed by the base, so they are shared with requests to the base.
    """

    def __init__(
        self, adapters: Iterable[tuple[Any, float]], salt: Hashable, acts_from: float = 0
    ) -> None:
        weighted_adapters = [(adapter, weight) for adapter, weight in adapters if weight]
        # weak references, so that a namespace does not keep an evicted adapter in memory
        self.references = (
            [] if acts_from else [weakref.ref(adapter) for adapter, _ in weighted_adapters]
        )
        # by uid, because an ``id(adapter)`` may be used again after the adapter was freed
        self.uid_weights = tuple((adapter.uid, weight) for adapter, weight in weighted_adapters)
        self.key = () if acts_from else self.uid_weights, salt
        self.acts_from = acts_from

    @property
    def is_gone(self) -> bool:
        """Whether one of its adapters has left memory, so that no request can use it again."""
        return any(reference() is None for reference in self.references)

    def block_key(self, ids: Sequence[int], number: int) -> Hashable:
        """The key of block ``number`` of the tokens ``ids`` in ``children`` of the block before it.
        The key is the block's tokens. If adapters with invocation tokens act on some of them, it
        also contains these adapters and the index in the block from which they act."""
        first_token = number * BLOCK
        tokens = tuple(ids[first_token : first_token + BLOCK])
        if not self.acts_from or first_token + BLOCK <= self.acts_from:
            return tokens
        return tokens, self.uid_weights, max(0, self.acts_from - first_token)

    def shared_length(self, length: int, namespace: Namespace) -> int:
        """How many tokens have equal keys and values for two prompts that have the same first
        ``length`` tokens, one in this namespace and one in ``namespace``."""
        if self.key != namespace.key:
            return 0
        own_acting, other_acting = (
            (compared.uid_weights, compared.acts_from) if 0 < compared.acts_from < length else None
            for compared in (self, namespace)
        )
        if own_acting == other_acting:
            return length
        return int(
            min(
                weights_and_start[1]
                for weights_and_start in (own_acting, other_acting)
                if weights_and_start is not None
            )
        )


class Root:
    """The root of a namespace's tree of blocks. It holds weak references to the adapters of the
    namespace. When one of them is freed, ``on_adapter_freed`` is called with the namespace's
    key."""

    def __init__(self, namespace: Namespace, on_adapter_freed: Callable[[Hashable], None]) -> None:
        self.key = namespace.key
        self.children: dict[Hashable, Block] = {}
        self.references = [
            weakref.ref(adapter, lambda _: on_adapter_freed(self.key))
            for reference in namespace.references
            if (adapter := reference()) is not None
        ]


class Block:
    """The ``BLOCK`` tokens that follow those of ``parent``, which has this block in its
    ``children`` under ``key``. ``data``: the keys and values of the tokens in all layers, as one
    flat tensor. ``used_at``: when a request last used the block, by ``time.monotonic``."""

    __slots__ = ("children", "data", "key", "parent", "used_at")

    def __init__(self, key: Hashable, parent: Block | Root, data: Tensor) -> None:
        self.key, self.parent, self.data, self.used_at = key, parent, data, 0.0
        self.children: dict[Hashable, Block] = {}


class Prefixes:
    """All cached blocks, each of ``block_bytes``. They and the rows of running requests take their
    memory from the same ``budget``. Only the engine's thread calls the methods."""

    def __init__(self, block_bytes: int, budget: Budget) -> None:
        self.block_bytes, self.budget = block_bytes, budget
        self._roots: dict[Hashable, Root] = {}
        self._blocks_by_use: OrderedDict[Block, None] = OrderedDict()  # least recently used first
        self._gone_keys: deque[Hashable] = deque()  # keys of namespaces with a freed adapter

    def __len__(self) -> int:
        return len(self._blocks_by_use)

    def find(self, namespace: Namespace, ids: Sequence[int]) -> list[Block]:
        """The blocks of the longest cached prefix of the prompt ``ids``. The prefix never includes
        the prompt's last token, which must be computed to get its logits."""
        self._drop_gone()
        chain = self._walk(namespace, ids, (len(ids) - 1) // BLOCK)
        self._touch(chain)
        return chain

    def add(
        self,
        namespace: Namespace,
        ids: Sequence[int],
        token_count: int,
        read_blocks: Callable[[int, int], Sequence[Tensor]],
    ) -> None:
        """Cache the full blocks of the first ``token_count`` tokens of ``ids``. Blocks that were
        used less recently are evicted to make room. If memory does not suffice for all, only the
        first blocks are cached.

        Args:
            read_blocks: ``read_blocks(first, stop)`` returns copies of the keys and values of
                blocks ``first`` … ``stop`` − 1. It is called only for blocks that are not cached.
        """
        self._drop_gone()
        block_count = token_count // BLOCK
        chain = self._walk(namespace, ids, block_count)
        self._touch(chain)
        added_count = self._make_room(block_count - len(chain), set(chain))
        if not added_count:
            return
        if namespace.key not in self._roots:
            self._roots[namespace.key] = Root(namespace, self._gone_keys.append)
        parent: Block | Root = chain[-1] if chain else self._roots[namespace.key]
        first_added = len(chain)
        for number, data in enumerate(
            read_blocks(first_added, first_added + added_count), first_added
        ):
            block = Block(namespace.block_key(ids, number), parent, data)
            parent.children[block.key] = block
            self._blocks_by_use[block] = None
            self.budget.prefix_bytes += self.block_bytes
            chain.append(block)
            parent = block
        self._touch(chain)

    def evict(self, byte_count: int) -> None:
        """Evict blocks until at least ``byte_count`` bytes are freed, or no block is left."""
        self._drop_gone()
        target_bytes = self.budget.prefix_bytes - byte_count
        while self._blocks_by_use and self.budget.prefix_bytes > target_bytes:
            self._remove(next(iter(self._blocks_by_use)))

    def expire(self, seconds: float) -> None:
        """Evict the blocks that were not used in the last ``seconds``."""
        self._drop_gone()
        latest_expired = time.monotonic() - seconds
        while (
            self._blocks_by_use
            and (oldest := next(iter(self._blocks_by_use))).used_at <= latest_expired
        ):
            self._remove(oldest)

    @property
    def oldest_use(self) -> float | None:
        """When the least recently used block was last used, by ``time.monotonic``; None if no block
        is cached."""
        return next(iter(self._blocks_by_use)).used_at if self._blocks_by_use else None

    def _walk(self, namespace: Namespace, ids: Sequence[int], max_blocks: int) -> list[Block]:
        """The first cached blocks of the tokens ``ids``, in order, up to the first block that is
        not cached, and at most ``max_blocks``."""
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
        """Mark consecutive blocks as used now. The last one counts as the least recently used of
        them, so that it is evicted before the blocks that it follows."""
        now = time.monotonic()
        for block in reversed(chain):
            block.used_at = now
            self._blocks_by_use.move_to_end(block)

    def _make_room(self, block_count: int, kept_blocks: set[Block]) -> int:
        """Evict blocks, least recently used first, until there is memory for ``block_count`` more
        or the next block to evict is in ``kept_blocks``. Returns for how many, up to
        ``block_count``, there is memory."""
        while self.budget.free < block_count * self.block_bytes and self._blocks_by_use:
            oldest = next(iter(self._blocks_by_use))
            if oldest in kept_blocks:
                break
            self._remove(oldest)
        free_bytes = self.budget.free
        return (
            block_count
            if free_bytes >= block_count * self.block_bytes
            else max(0, int(free_bytes // self.block_bytes))
        )

    def _remove(self, block: Block) -> None:
        """Remove a block that has no children, and its namespace if that is empty then."""
        del self._blocks_by_use[block]
        del block.parent.children[block.key]
        self.budget.prefix_bytes -= self.block_bytes
        if isinstance(block.parent, Root) and not block.parent.children:
            del self._roots[block.parent.key]

    def _drop_gone(self) -> None:
        """Remove all blocks of the namespaces in which an adapter was freed."""
        while self._gone_keys:
            root = self._roots.pop(self._gone_keys.popleft(), None)
            unvisited_blocks = list(root.children.values()) if root is not None else []
            while unvisited_blocks:
                block = unvisited_blocks.pop()
                unvisited_blocks += block.children.values()
                del self._blocks_by_use[block]
                self.budget.prefix_bytes -= self.block_bytes
