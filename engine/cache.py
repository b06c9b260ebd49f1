"""The paged KV cache: which page ids each request and each cached prefix holds, in step with the ledger's counts.

The ledger decides how many pages anybody may hold; this hands out ids and never more than those. A cached prefix is a node
of the ledger's pool: its pages pass from the request that computed them to the node, and return when the ledger has dropped
the node. `check` proves that both count alike. It knows no policy and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.models import ModelShape
from policies.ledger import Ledger
from policies.pool import Node, Pool
from policies.view import WAITING, Entry


class PageTable:
    """The pages of one request, in order of its tokens. pages[i] is owned by the request where own[i], else by a node."""

    __slots__ = ("own", "pages")

    def __init__(self, shared: list[int]):
        self.pages = list(shared)
        self.own = [False] * len(shared)


class PageCache:
    """Keys and values [layers, pages + 1, kv_heads, page_tokens, head_dim]; the last page takes padding rows' writes."""

    def __init__(self, shape: ModelShape, pool: Pool, *, dtype: torch.dtype, device: str | torch.device):
        size = (shape.layers, pool.pages + 1, shape.kv_heads, pool.page_tokens, shape.head_dim)
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)
        self.page_tokens = pool.page_tokens
        self.dummy = pool.pages
        self.attach(pool)

    def attach(self, pool: Pool) -> None:
        """Start over for another pool of the same size: every page is free."""
        assert pool.pages == self.dummy
        assert pool.page_tokens == self.page_tokens
        self._pool = pool
        self._free = list(range(pool.pages - 1, -1, -1))
        self._nodes: dict[Node, list[int]] = {}  # by identity: a key may come back as another node

    # -- requests -----------------------------------------------------------------------------------------------------
    def start(self, entry: Entry) -> PageTable:
        """The table of a request whose prefill begins: the whole pages of the prefix that the ledger let it reuse."""
        shared: list[int] = []
        for node in _path(entry.node):
            shared += self._nodes[node]
        assert len(shared) * self.page_tokens == entry.kv
        return PageTable(shared)

    def extend(self, table: PageTable, tokens: int) -> None:
        """Pages for the first `tokens` tokens of a request; the ledger has counted them, so there are enough."""
        missing = -(-tokens // self.page_tokens) - len(table.pages)
        if missing <= 0:
            return
        if missing > len(self._free):
            self._sweep()
        assert missing <= len(self._free), "the ledger let somebody take a page that is not free"
        table.pages += [self._free.pop() for _ in range(missing)]
        table.own += [True] * missing

    def release(self, table: PageTable) -> None:
        """A request gives its own pages back."""
        self._free += [page for page, own in zip(table.pages, table.own, strict=True) if own]
        table.pages, table.own = [], []

    def trim(self, table: PageTable, tokens: int) -> None:
        """Give back what lies behind the first `tokens` tokens: a step that was prepared and called off."""
        keep = -(-tokens // self.page_tokens)
        if keep == len(table.pages):
            return
        self._free += [page for page, own in zip(table.pages[keep:], table.own[keep:], strict=True) if own]
        del table.pages[keep:], table.own[keep:]

    def publish(self, table: PageTable, node: Node | None) -> None:
        """After a prefill: the nodes on the path to `node` that are new here take over their pages of this request."""
        begin = 0
        for step in _path(node):
            end = step.tokens // self.page_tokens
            if step not in self._nodes:
                assert all(table.own[begin:end]), "a new node lies on pages that the request does not own"
                self._nodes[step] = table.pages[begin:end]
                table.own[begin:end] = [False] * (end - begin)
            begin = end

    def _sweep(self) -> None:
        """Free the pages of nodes that the ledger has dropped. Only when pages run short: it visits every node."""
        for node in [node for node in self._nodes if not self._pool.is_live(node)]:
            self._free += self._nodes.pop(node)

    # -- proof --------------------------------------------------------------------------------------------------------
    def check(self, ledger: Ledger, tables: dict[int, PageTable]) -> None:
        """AssertionError unless every page has one owner and the counts are the ledger's."""
        self._sweep()
        owned = [page for table in tables.values() for page, own in zip(table.pages, table.own, strict=True) if own]
        cached = [page for pages in self._nodes.values() for page in pages]
        every = sorted(self._free + owned + cached)
        assert every == list(range(self.dummy)), "a page is lost or has two owners"
        assert len(cached) == ledger.pool.cached, f"{len(cached)} cached pages, the ledger counts {ledger.pool.cached}"
        assert len(owned) == ledger.pool.kv, f"requests hold {len(owned)} pages, the ledger counts {ledger.pool.kv}"
        for entry in ledger.entries.values():
            held = sum(tables[entry.id].own) if entry.id in tables else 0
            assert held == ledger.held_pages(entry), f"request {entry.id}: {held} pages, not {ledger.held_pages(entry)}"
            assert entry.state != WAITING or held == 0


def _path(node: Node | None) -> Iterator[Node]:
    """From the root to `node`."""
    steps = []
    while node is not None:
        steps.append(node)
        node = node.parent
    yield from reversed(steps)
