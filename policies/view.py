"""What a policy may know: a read-only window on the ledger, never a copy.

Queues per adapter, counts and sums are kept up to date by the ledger, so that looking costs by the adapters and requests
touched, not by the length of the queue. Output lengths are not here: a request's `Entry` does not hold them, and
`output_tokens` answers only a policy that declared itself an oracle. A policy must not change what it is handed; with
invariant checks on, the simulator compares the ledger's state before and after every decision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from policies.plan import PeekError
from traces.request import Adapter, Request

if TYPE_CHECKING:
    from policies.cost import Cost
    from policies.ledger import Ledger

WAITING, PREFILLING, DECODING, ENDED = range(4)
STATES = ("waiting", "prefilling", "decoding", "ended")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step and of one request.

    max_batch: requests in one step (MaxBS of VaLoRA's Algorithm 1). max_batch_tokens: tokens in one step, decodes and
    prefill chunks together (Sarathi-Serve's budget). max_context: prompt plus output of one request.
    """

    max_batch: int = 64
    max_batch_tokens: int = 2048
    max_context: int = 4096

    def __post_init__(self):
        if self.max_batch < 1 or self.max_context < 2:
            raise ValueError(f"max_batch {self.max_batch} and max_context {self.max_context} must be at least 1 and 2")
        if self.max_batch_tokens <= self.max_batch:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} leaves no room for a prefill beside {self.max_batch} decodes; "
                f"raise it above {self.max_batch}"
            )


class Entry:
    """A request in the ledger, as a policy sees it. Times in ns, memory in pages.

    state: WAITING (no memory held: new, or preempted), PREFILLING, DECODING, ENDED. since_ns: when it last made progress
    (its arrival, its last chunk or token, its preemption). target: tokens to compute before its next first token (the
    prompt; after a preemption the prompt and what it had generated). kv: tokens computed so far.
    """

    __slots__ = (
        "adapter", "arrival_ns", "cached_tokens", "first_token_ns", "generated", "head", "id", "images", "kv", "node",
        "pages", "preemptions", "prefix", "prompt_tokens", "scheduled_ns", "since_ns", "state", "target", "tick",
        "token_ns", "ttft_slo_ns",
    )  # fmt: skip

    def __init__(self, request: Request):
        self.id = request.id
        self.arrival_ns = self.since_ns = request.arrival_ns
        self.adapter = request.adapter
        self.prompt_tokens = self.target = request.prompt_tokens
        self.images = request.images
        self.head = request.head
        self.prefix = request.prefix
        self.ttft_slo_ns = request.ttft_slo_ns
        self.state = WAITING
        self.kv = 0
        self.pages = 0
        self.node = None  # of the prefix cache
        self.cached_tokens = 0
        self.generated = 0
        self.tick = 0
        self.preemptions = 0
        self.scheduled_ns = self.first_token_ns = -1
        self.token_ns = -1  # of the last token before a preemption


class View:
    """The window: what `ledger.view` noted at the look, as attributes, and queues that are read through to the ledger.

    now_ns: time of the look. mode, merged: of the last step (merged: the folded adapter, -1 for none). queued: requests
    that wait for (the rest of) their prefill. total: unfinished requests. decoding: ids of all requests that want their
    next token, in the order they finished their prefill. unfinished: adapter -> unfinished requests, for the adapters that
    have any (-1: the base model). free_pages: to be had without evicting an adapter or preempting
    anybody. adapters_apart: adapters lie in pages of their own, of which adapter_free can be had without evicting one; else
    that is free_pages. memo: what the last plan left. cost, page_tokens, pool_pages never change; limits do in an engine
    that ran out of memory (`faults.shrink`).
    """

    __slots__ = (
        "_ledger", "_oracle", "adapter_free", "adapters_apart", "cost", "decoding", "free_pages", "limits", "memo", "merged",
        "mode", "now_ns", "page_tokens", "pool_pages", "queued", "total", "unfinished",
    )  # fmt: skip

    def __init__(self, ledger: Ledger, cost: Cost, *, oracle: bool = False):
        self._ledger = ledger
        self._oracle = oracle
        self.cost = cost
        self.limits: Limits = ledger.limits
        self.page_tokens: int = ledger.pool.page_tokens
        self.pool_pages: int = ledger.pool.pages
        self.adapters_apart = ledger.pool.adapter_room is not None
        self.unfinished: dict[int, int] = ledger.unfinished
        self.memo: Any = None
        self.look(0)

    def look(self, now_ns: int) -> View:
        """Note the ledger's sums as they are now."""
        ledger = self._ledger
        pool = ledger.pool
        self.now_ns = now_ns
        self.mode = ledger.mode
        self.merged = ledger.merged
        self.queued = ledger.queued
        self.total = len(ledger.entries)
        self.decoding = ledger.decoding_ids()
        self.free_pages = pool.unused + pool.reclaimable
        self.adapter_free = pool.room_left if self.adapters_apart else self.free_pages
        return self

    # -- requests -----------------------------------------------------------------------------------------------------
    @property
    def waiting(self) -> Iterable[Entry]:
        """Requests that hold no memory: preempted ones first, then new ones in order of arrival."""
        ledger = self._ledger
        if ledger.preempted:
            return chain(ledger.preempted.values(), ledger.waiting.values())
        return ledger.waiting.values()

    @property
    def prefilling(self) -> Iterable[Entry]:
        """Requests whose prompt is partly computed, in the order they began."""
        return self._ledger.prefilling.values()

    def queue(self) -> Iterator[Entry]:
        """Everything that wants a prefill, in the order that FCFS serves it: started, preempted, new."""
        return chain(self._ledger.prefilling.values(), self.waiting)

    def queue_of(self, adapter: int) -> Iterator[Entry]:
        """`queue` for the requests of one adapter."""
        ledger = self._ledger
        started = (e for e in chain(ledger.prefilling.values(), ledger.preempted.values()) if e.adapter == adapter)
        waiting = ledger.waiting_by.get(adapter)
        return chain(started, waiting.values()) if waiting else started

    def decoding_of(self, adapter: int) -> tuple[int, ...]:
        """`decoding` for the requests of one adapter."""
        return self._ledger.decoding_ids_of(adapter)

    @property
    def paused(self) -> Collection[Entry]:
        """Decoding requests that the last step left out, the longest paused first."""
        return self._ledger.paused.values()

    def is_paused(self, request: int) -> bool:
        """True for a decoding request that the last step left out."""
        return request in self._ledger.paused

    @property
    def preempted(self) -> Iterable[Entry]:
        """Waiting requests that ran before, the first to arrive first."""
        return self._ledger.preempted.values()

    @property
    def arrived(self) -> Iterable[Entry]:
        """Waiting requests that never ran, in order of arrival."""
        return self._ledger.waiting.values()

    @property
    def oldest(self) -> Entry:
        """The unfinished request that arrived first; there must be one."""
        return next(iter(self._ledger.entries.values()))

    def entry(self, request: int) -> Entry:
        """The entry of an unfinished request."""
        return self._ledger.entries[request]

    def output_tokens(self, request: int) -> int:
        """The true output length; only for an oracle. Raises PeekError for any other policy."""
        if not self._oracle:
            raise PeekError(f"output length of request {request}: only a policy that sets `oracle = True` may see it")
        return self._ledger.output_tokens(request)

    # -- memory -------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters that can be asked for."""
        return self._ledger.pool.adapters

    def next_pages(self, requests: tuple[int, ...]) -> int:
        """Pages that one decode step of these requests takes."""
        return self._ledger.next_pages(requests)

    def held_pages(self, entry: Entry) -> int:
        """Pages that preempting a running request frees."""
        return self._ledger.held_pages(entry)

    def reusable_tokens(self, entry: Entry) -> int:
        """Prompt tokens of a waiting request that the prefix cache holds now."""
        return self._ledger.reusable_tokens(entry)

    def left_to_compute(self, entry: Entry) -> tuple[int, int]:
        """(tokens, images) of a waiting request's prompt that the prefix cache does not hold now."""
        return self._ledger.left_to_compute(entry)

    def adapter_pages(self, adapter: int) -> int:
        """Pages of one adapter."""
        return self._ledger.pool.adapter_pages[adapter]

    def is_resident(self, adapter: int) -> bool:
        """True for a usable adapter; the base model (-1) always is."""
        return adapter < 0 or adapter in self._ledger.pool.resident

    def is_loading(self, adapter: int) -> bool:
        """True while the copy of `adapter` is under way."""
        return adapter in self._ledger.pool.loading

    @property
    def all_resident(self) -> bool:
        """True if every adapter there is can be used now."""
        return len(self._ledger.pool.resident) == len(self.adapters)

    @property
    def idle_adapters(self) -> Iterator[int]:
        """Resident adapters that no running request needs and that are not pinned, least recently used first, the folded
        one last: the weights come back from their pristine copy, so its factors may go as soon as a plan runs without it."""
        pool, merged = self._ledger.pool, self._ledger.merged
        for adapter in pool.resident:
            if adapter not in pool.users and adapter != merged and adapter not in pool.pinned:
                yield adapter
        if merged in pool.resident and merged not in pool.users and merged not in pool.pinned:
            yield merged
