"""The unified pool: KV pages, cached prefixes and adapters in one memory, counted in pages (S-LoRA section 5).

A page holds the keys and values of `page_tokens` tokens; an adapter takes as many pages as its bytes need, so that a
rank-128 adapter weighs twice a rank-64 one. The prefix cache shares whole pages between prompts that begin alike, keyed
by the adapter's content and the content and length of each segment (image bytes, text): a page computed under one adapter is
never read under another. It knows nothing of requests' states; the ledger calls it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from traces.request import Adapter


class Node:
    """One cached segment behind a given prefix: `pages` whole pages, in use by `users` requests and `children` nodes."""

    __slots__ = ("children", "key", "pages", "parent", "tokens", "users")

    def __init__(self, key: tuple, parent: Node | None, pages: int, tokens: int):
        self.key = key
        self.parent = parent
        self.pages = pages
        self.tokens = tokens  # of the whole prefix up to here
        self.users = 0
        self.children = 0


class Pool:
    """Pages of one GPU. The invariant: free + kv + cached + adapters == pages (`check`).

    pages: size of the pool. page_tokens: KV tokens a page. adapter_pages: what each adapter takes. prefix_cache: keep the
    prefixes of finished requests until their pages are needed. adapter_room: pages beside `pages` that hold adapters and
    nothing else, as in an engine with a memory of its own for them; None: adapters lie among `pages` (S-LoRA).
    """

    def __init__(self, pages: int, page_tokens: int, adapters: tuple[Adapter, ...], adapter_pages: tuple[int, ...],
                 *, prefix_cache: bool = True, adapter_room: int | None = None):
        self.pages = pages
        self.page_tokens = page_tokens
        self.adapters: tuple[Adapter, ...] = ()
        self.adapter_pages: tuple[int, ...] = ()
        self.uniform_rank = 0  # of all adapters, 0 where they differ
        self.extend(adapters, adapter_pages)
        self.prefix_cache = prefix_cache
        self.adapter_room = adapter_room
        self.room_left = adapter_room or 0  # of adapter_room
        self.pinned: dict[int, None] = {}  # adapters that nobody may evict
        self.unused = pages  # held by nobody
        self.kv = 0  # held by running requests alone
        self.cached = 0  # held by nodes
        self.reclaimable = 0  # part of `cached` that nobody uses
        self.peak = 0  # most pages ever in use, idle prefixes not counted
        self.resident: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.loading: dict[int, None] = {}
        self.users: dict[int, int] = {}  # adapter -> requests that hold it
        self._nodes: dict[tuple, Node] = {}
        self._idle: OrderedDict[tuple, Node] = OrderedDict()  # evictable leaves, least recently used first

    @property
    def free(self) -> int:
        """Pages that can be had without evicting an adapter or preempting a request."""
        return self.unused + self.reclaimable

    def emptied(self) -> Pool:
        """A pool of the same size and the same adapters in which nothing lies and nothing is pinned."""
        return Pool(self.pages, self.page_tokens, self.adapters, self.adapter_pages, prefix_cache=self.prefix_cache,
                    adapter_room=self.adapter_room)  # fmt: skip

    @property
    def adapter_free(self) -> int:
        """`free` for adapters: the same pages, or those of their own."""
        return self.free if self.adapter_room is None else self.room_left

    def extend(self, adapters: tuple[Adapter, ...], adapter_pages: tuple[int, ...]) -> None:
        """Know more adapters; they get the next numbers."""
        self.adapters += adapters
        self.adapter_pages += adapter_pages
        ranks = {adapter.rank for adapter in self.adapters}
        self.uniform_rank = ranks.pop() if len(ranks) == 1 else 0

    def fits(self, kv_pages: int, adapter: int) -> bool:
        """True if so many pages of keys and values and this adapter (-1: none) fit beside the pinned ones, all else gone."""
        adapters = self.adapter_pages[adapter] if adapter >= 0 and adapter not in self.pinned else 0
        if self.pinned:
            adapters += sum(self.adapter_pages[number] for number in self.pinned)
        if self.adapter_room is None:
            return kv_pages + adapters <= self.pages
        return kv_pages <= self.pages and adapters <= self.adapter_room

    # -- keys and values ------------------------------------------------------------------------------------------
    def take(self, pages: int) -> None:
        """Move `pages` from free to KV; cached prefixes that nobody uses give way, least recently used first."""
        if pages > self.unused:
            self.make_room(pages)
        self.unused -= pages
        self.kv += pages
        used = self.pages - self.unused - self.reclaimable
        self.peak = used if used > self.peak else self.peak

    def make_room(self, pages: int) -> None:
        """Drop idle prefixes until `pages` pages are unused, as `take` will: an engine needs them before the step that
        the ledger accounts for afterwards."""
        if pages > self.unused:
            self._reclaim(pages - self.unused)

    def give(self, pages: int) -> None:
        """Move `pages` from KV back to free."""
        self.kv -= pages
        self.unused += pages

    # -- prefixes ---------------------------------------------------------------------------------------------------
    def _keys(self, adapter: int, prefix: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple, int]]:
        """(key of the node, tokens up to its end) for each segment; the key holds the whole path, so no hash collides."""
        path: tuple = (self.adapters[adapter].digest if adapter >= 0 else "",)
        tokens = 0
        for content, length in prefix:
            path = (path, content, length)  # a clipped prompt cuts a segment whose key it keeps
            tokens += length
            yield path, tokens

    def match(self, adapter: int, prefix: tuple[tuple[int, int], ...], limit: int) -> Node | None:
        """The deepest cached node that is a prefix of this prompt and leaves at least one of `limit` tokens to compute."""
        if not self.prefix_cache or not prefix:
            return None
        found = None
        for key, tokens in self._keys(adapter, prefix):
            node = self._nodes.get(key)
            if node is None or tokens >= limit:
                break
            found = node
        return found

    def shared_tokens(self, node: Node | None) -> int:
        """Tokens that a request need not compute behind `node`: whole pages only."""
        return node.tokens // self.page_tokens * self.page_tokens if node else 0

    def is_live(self, node: Node) -> bool:
        """False once the node's pages were given to somebody else."""
        return self._nodes.get(node.key) is node

    def hold(self, node: Node | None) -> None:
        """A request starts to use `node`, and with it all its ancestors."""
        if node is not None:
            node.users += 1
            self._settle(node)

    def drop(self, node: Node | None) -> None:
        """A request stops using `node`."""
        if node is not None:
            node.users -= 1
            self._settle(node)

    def _settle(self, node: Node) -> None:
        """Keep `reclaimable` and the eviction order right after a change of `node`'s users.

        A node is reclaimable while neither it nor any descendant has users; `children` counts the children that are in
        use, so the walk up stops at the first ancestor whose state does not change.
        """
        while node is not None:
            in_use = node.users > 0 or node.children > 0
            was_in_use = node.key not in self._idle
            if in_use == was_in_use:
                return
            if in_use:
                del self._idle[node.key]
                self.reclaimable -= node.pages
            else:
                self._idle[node.key] = node
                self.reclaimable += node.pages
            if node.parent is not None:
                node.parent.children += 1 if in_use else -1
            node = node.parent

    def publish(self, adapter: int, prefix: tuple[tuple[int, int], ...], node: Node | None) -> Node | None:
        """After a prefill: turn the KV pages of the segments behind `node` into cached nodes, held by the same request.

        Stops at the first segment that another request published meanwhile (this one keeps its own copy). Returns the
        node that the request holds now.
        """
        if not self.prefix_cache or not prefix:
            return node
        parent, base = None, 0
        for key, tokens in self._keys(adapter, prefix):
            known = self._nodes.get(key)
            if known is None:
                pages = tokens // self.page_tokens - base // self.page_tokens
                known = Node(key, parent, pages, tokens)
                known.users = 1
                if parent is not None:
                    parent.children += 1
                self._nodes[key] = known
                self.kv -= pages
                self.cached += pages
                self.drop(node)
                node = known
            elif node is None or tokens > node.tokens:
                break
            parent, base = known, tokens
        return node

    def _reclaim(self, pages: int) -> None:
        # A node turns idle only after its descendants (`_settle` walks up), so the oldest idle node is always a leaf.
        while pages > 0:
            key, node = self._idle.popitem(last=False)
            del self._nodes[key]
            self.cached -= node.pages
            self.reclaimable -= node.pages
            self.unused += node.pages
            pages -= node.pages

    # -- adapters ---------------------------------------------------------------------------------------------------
    def start_load(self, adapter: int) -> None:
        """Reserve the pages of an adapter whose copy begins."""
        pages = self.adapter_pages[adapter]
        if self.adapter_room is None:
            self.take(pages)
            self.kv -= pages
        else:
            self.room_left -= pages
        self.loading[adapter] = None

    def finish_load(self, adapter: int) -> None:
        """The copy is complete: the adapter may be used."""
        del self.loading[adapter]
        self.resident[adapter] = None

    def evict(self, adapter: int) -> None:
        """Free the pages of a resident adapter that nobody uses."""
        del self.resident[adapter]
        if self.adapter_room is None:
            self.unused += self.adapter_pages[adapter]
        else:
            self.room_left += self.adapter_pages[adapter]

    def use(self, adapter: int) -> None:
        """A request starts to need `adapter`: it may not be evicted until `release`."""
        self.users[adapter] = self.users.get(adapter, 0) + 1
        self.resident.move_to_end(adapter)

    def release(self, adapter: int) -> None:
        """A request no longer needs `adapter`."""
        left = self.users[adapter] - 1
        if left:
            self.users[adapter] = left
        else:
            del self.users[adapter]
        self.resident.move_to_end(adapter)

    def branches(self, rows: dict[int, int], total: int, merged: int) -> tuple[int, int, int, int]:
        """(rows through the LoRA branch, distinct adapters, largest rank, sum of ranks). In mixture mode a row that does
        not ask for the folded adapter goes through that one's branch too, to take it out."""
        lora_rows, adapters, cold = total, len(rows), 0
        if -1 in rows:
            lora_rows -= rows[-1]
            adapters -= 1
        if merged >= 0:
            own = rows.get(merged, 0)
            cold = total - own
            lora_rows += cold - own
            adapters += bool(cold) - bool(own)
        rank = self.uniform_rank
        if not adapters or rank:
            return lora_rows, adapters, rank if adapters else 0, rank * adapters
        ranks = [self.adapters[adapter].rank for adapter in rows if adapter >= 0 and adapter != merged]
        if cold:
            ranks.append(self.adapters[merged].rank)
        return lora_rows, adapters, max(ranks), sum(ranks)

    # -- proof ------------------------------------------------------------------------------------------------------
    def check(self) -> list[str]:
        """Every way in which the pages do not add up, as sentences; empty when all is well. O(nodes + adapters)."""
        wrong = []
        held = sum(self.adapter_pages[adapter] for adapter in (*self.resident, *self.loading))
        if self.adapter_room is not None:
            if self.room_left + held != self.adapter_room or self.room_left < 0:
                wrong.append(f"adapter pages: {self.room_left} left + {held} held != {self.adapter_room}")
            held = 0
        if self.unused + self.kv + self.cached + held != self.pages:
            parts = f"{self.unused} unused + {self.kv} kv + {self.cached} cached + {held} adapters"
            wrong.append(f"pages: {parts} != {self.pages}")
        if min(self.unused, self.kv, self.cached, self.reclaimable) < 0:
            wrong.append(f"negative pages: unused {self.unused}, kv {self.kv}, cached {self.cached}")
        if self.cached != sum(node.pages for node in self._nodes.values()):
            wrong.append(f"cached pages {self.cached} are not the sum over the prefix nodes")
        if self.reclaimable != sum(node.pages for node in self._idle.values()):
            wrong.append(f"reclaimable pages {self.reclaimable} are not the sum over the idle prefix nodes")
        wrong += [f"prefix {node.key} is idle and in use" for node in self._idle.values() if node.users or node.children]
        wrong += [f"adapter {adapter} is in use and not resident" for adapter in self.users if adapter not in self.resident]
        return wrong
