"""The ledger: the only owner and writer of requests' states, memory and the mode of the weights.

The one loop of simulator and engine: `plan = policy.decide(ledger.view(now))`, `work = ledger.begin(plan, now)`, execute,
`ledger.commit(steps, ...)`. `begin` judges the plan first and changes nothing if a rule is broken (PlanError). Each call
costs O(1) per request touched. It knows no latencies and no clock but the times it is told; `check` proves conservation.
"""

from __future__ import annotations

from policies.cohort import Cohort
from policies.cost import Cost
from policies.journal import Journal
from policies.plan import MIXTURE, UNMERGED, Plan, Work
from policies.pool import Node, Pool
from policies.rules import judge
from policies.view import DECODING, ENDED, PREFILLING, WAITING, Entry, Limits, View
from traces.request import Request

COMPLETED, ABORTED, UNSERVABLE, FAILED, UNFINISHED = range(5)


class Ledger:
    """State of one GPU. See the module's docstring for the protocol.

    journal receives what happened; cost is what policies may ask for predictions; oracle opens the output lengths to
    the policy.
    """

    def __init__(self, pool: Pool, limits: Limits, journal: Journal, cost: Cost, *, oracle: bool = False):
        self.pool = pool
        self.limits = limits
        self.journal = journal
        self.entries: dict[int, Entry] = {}  # unfinished
        self.waiting: dict[int, Entry] = {}
        self.waiting_by: dict[int, dict[int, Entry]] = {}  # adapter -> its part of `waiting`
        self.preempted: dict[int, Entry] = {}
        self.prefilling: dict[int, Entry] = {}
        self.decoding: dict[int, Entry] = {}
        self.decoding_by: dict[int, dict[int, Entry]] = {}
        self.paused: dict[int, Entry] = {}
        self.unfinished: dict[int, int] = {}  # adapter -> requests
        self.queued = 0  # requests in waiting, preempted and prefilling
        self.mode = UNMERGED
        self.merged = -1
        self.cohort = Cohort(pool.page_tokens)
        self.injected = 0
        self._fresh: list[Entry] = []  # decoding, but neither in the cohort nor paused: they just finished a prefill
        self._asked: dict[int, Request] = {}  # holds the output lengths, which no view shows
        self._ids: tuple[int, ...] | None = ()
        self._ids_by: dict[int, tuple[int, ...]] = {}
        self._cohort_ids: tuple[int, ...] | None = None  # the plan's tuple that made the cohort, if it still is that
        self._token_ns = 0  # when the cohort's members got their last token
        self._plan = Plan()
        self._moves = False  # the plan loads, evicts, preempts or aborts
        self._view = View(self, cost, oracle=oracle)

    # -- looking ------------------------------------------------------------------------------------------------------
    def view(self, now_ns: int) -> View:
        """The window of this ledger at `now_ns`: one object, read through, valid until the next `begin`."""
        return self._view.look(now_ns)

    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.entries)

    def decoding_ids(self) -> tuple[int, ...]:
        """Ids of `decoding`; the same object until the set changes, which lets `begin` recognise it."""
        if self._ids is None:
            self._ids = tuple(self.decoding)
        return self._ids

    def decoding_ids_of(self, adapter: int) -> tuple[int, ...]:
        """Ids of one adapter's part of `decoding`."""
        ids = self._ids_by.get(adapter)
        if ids is None:
            ids = self._ids_by[adapter] = tuple(self.decoding_by.get(adapter, ()))
        return ids

    def known_ids(self, adapter: int | None) -> tuple[int, ...] | None:
        """The current tuple of `decoding_ids` (or of one adapter's part), if it was asked for since the set changed."""
        return self._ids if adapter is None else self._ids_by.get(adapter)

    def held_pages(self, entry: Entry) -> int:
        """Pages that a running request alone holds now."""
        page = self.pool.page_tokens
        return entry.pages - (-self.kv_tokens(entry) // page) + (-entry.kv // page)

    def output_tokens(self, request: int) -> int:
        """The true output length of an unfinished request."""
        return self._asked[request].output_tokens

    def kv_tokens(self, entry: Entry) -> int:
        """KV tokens held by a request now, in or out of the cohort."""
        return entry.kv + (self.cohort.tick - entry.tick if entry.id in self.cohort.members else 0)

    def next_pages(self, requests: tuple[int, ...]) -> int:
        """Pages that one decode step of `requests` takes."""
        page, entries = self.pool.page_tokens, self.entries
        if (requests is self._cohort_ids and not self._fresh) or self._is_everybody(requests):
            return self.cohort.pages_for(1) + sum(entry.kv % page == 0 for entry in self._fresh)
        return sum(self.kv_tokens(entries[request]) % page == 0 for request in requests)

    def _is_everybody(self, requests: tuple[int, ...]) -> bool:
        """True for `decoding_ids` while nobody is paused: the cohort's members and those in `_fresh` that join it next."""
        return (
            requests is self._ids and not self.paused and len(self.cohort.members) + len(self._fresh) == len(requests)
        )

    def reusable_tokens(self, entry: Entry) -> int:
        """Tokens of a waiting request's prompt that the prefix cache holds now."""
        if not entry.prefix:
            return 0
        pool = self.pool
        return pool.shared_tokens(pool.match(entry.adapter, entry.prefix, entry.target))

    def left_to_compute(self, entry: Entry) -> tuple[int, int]:
        """(tokens, images) of a waiting request that the prefix cache does not hold now."""
        node = self.pool.match(entry.adapter, entry.prefix, entry.target) if entry.prefix else None
        return entry.target - self.pool.shared_tokens(node), self._images(entry, node)

    # -- arrivals -----------------------------------------------------------------------------------------------------
    def enqueue(self, request: Request) -> bool:
        """Take a request that arrives now; False if it can never be served, which is written down and not queued."""
        pool, adapter = self.pool, request.adapter
        self.injected += 1
        total = request.prompt_tokens + request.output_tokens
        if total > self.limits.max_context or not pool.fits(-(-(total - 1) // pool.page_tokens), adapter):
            self._write(Entry(request), request, UNSERVABLE, -1)
            return False
        if adapter >= 0:
            self.journal.counters["adapter_hits" if adapter in pool.resident else "adapter_misses"] += 1
        entry = Entry(request)
        self.entries[request.id] = self.waiting[request.id] = entry
        self.waiting_by.setdefault(adapter, {})[request.id] = entry
        self._asked[request.id] = request
        self.queued += 1
        self.unfinished[adapter] = self.unfinished.get(adapter, 0) + 1
        return True

    def loaded(self, adapter: int) -> None:
        """The copy of an adapter, started by a plan, is complete."""
        self.pool.finish_load(adapter)

    # -- one lease ----------------------------------------------------------------------------------------------------
    def begin(self, plan: Plan, now_ns: int) -> Work:
        """Judge `plan`, apply it, and return what its first step has to compute.

        Raises PlanError, with nothing changed, if a rule is broken. A plan without prefills and decodes only loads,
        evicts, preempts or aborts: its Work has no tokens and there is nothing to commit.
        """
        judge(self, plan)
        mode, merged, prefills, decodes, loads, evicts, preempts, aborts, _, self._view.memo = plan
        self._plan = plan
        self._moves = bool(loads or evicts or preempts or aborts)
        if self._moves:
            self._move(plan, now_ns)
        if not decodes and not prefills:
            return Work(mode, 0, 0, (), 0, 0, 0, 0, 0, 0, 0, 0)
        switch_rank = 0
        if merged != self.merged:
            switch_rank = self.pool.adapters[merged if merged >= 0 else self.merged].rank
            self.journal.counters["switches"] += 1
        self.mode, self.merged = mode, merged
        if decodes is not self._cohort_ids or self._fresh:
            self._select(decodes)
        chunks, images = self._start_chunks(prefills, now_ns) if prefills else ((), 0)
        return self._work(prefills, chunks, images, switch_rank)

    def lease_steps(self) -> int:
        """The most steps for which the plan just begun stands if nothing arrives or loads: until a member of the batch
        ends or memory runs out. One if the plan does more than decode: what it changed may call for another one."""
        if self._moves or self._plan.prefills:
            return 1
        steps = self.cohort.steps_within(self.pool.free)
        assert steps >= 1, "judge() lets no plan pass whose first step does not fit"
        return steps

    def commit(self, steps: int, first_ns: int, end_ns: int) -> None:
        """Account for `steps` executed steps of the plan; the first ended at first_ns, the last at end_ns."""
        cohort, fresh = self.cohort, self._fresh
        members = len(cohort.members)
        if members:
            for entry in fresh:  # `_select` left those here that join with this lease
                self.journal.gap(first_ns - entry.since_ns)
            if members > len(fresh):
                self.journal.gap(first_ns - self._token_ns, members - len(fresh))
            fresh.clear()
            self.pool.take(cohort.pages_for(steps))
            for request in cohort.advance(steps):
                entry = cohort.members[request]
                cohort.leave(entry)
                self._cohort_ids = None
                self._forget_decoding(entry)
                self._end(entry, COMPLETED, end_ns)
            self._token_ns = end_ns
        for request, tokens in self._plan.prefills:
            entry = self.entries[request]
            entry.kv += tokens
            entry.since_ns = end_ns
            if entry.kv == entry.target:
                self._first_token(entry, end_ns)

    # -- parts of begin -----------------------------------------------------------------------------------------------
    def _move(self, plan: Plan, now_ns: int) -> None:
        """What a plan changes beside computing."""
        for request in plan.aborts:
            entry = self.entries[request]
            self._unqueue(entry)
            self.queued -= 1
            self._end(entry, ABORTED, now_ns)
        for request in plan.preempts:
            self._preempt(self.entries[request], now_ns)
        for adapter in plan.evicts:
            self.pool.evict(adapter)
            self.journal.counters["adapter_evictions"] += 1
        for adapter in plan.loads:
            self.pool.start_load(adapter)
            self.journal.counters["adapter_loads"] += 1

    def _select(self, decodes: tuple[int, ...]) -> None:
        """Make the cohort exactly `decodes`; those left out are paused, those that join stand in `_fresh` until commit."""
        cohort, asked = self.cohort, self._asked
        if self._is_everybody(decodes):
            joining = self._fresh
        else:
            chosen = set(decodes)
            for request in [request for request in cohort.members if request not in chosen]:
                entry = cohort.members[request]
                cohort.leave(entry)
                entry.since_ns = self._token_ns
                self.paused[request] = entry
            for entry in self._fresh:
                if entry.id not in chosen:
                    self.paused[entry.id] = entry
            joining = [self.entries[request] for request in decodes if request not in cohort.members]
            self._fresh = joining
        for entry in joining:
            self.paused.pop(entry.id, None)
            cohort.join(entry, asked[entry.id].output_tokens - entry.generated)
        self._cohort_ids = decodes

    def _start_chunks(self, prefills: tuple[tuple[int, int], ...], now_ns: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """Reserve the pages of the chunks; ((tokens, context before them) per chunk, images to encode)."""
        pool, page, chunks, images = self.pool, self.pool.page_tokens, [], 0
        for request, tokens in prefills:
            entry = self.entries[request]
            if entry.state == WAITING:
                self._unqueue(entry)
                entry.state = PREFILLING
                self.prefilling[request] = entry
                if entry.adapter >= 0:
                    pool.use(entry.adapter)
                if entry.scheduled_ns < 0:
                    entry.scheduled_ns = now_ns
                if entry.prefix:
                    self._reuse(entry)
                images += self._images(entry, entry.node)
            chunks.append((tokens, entry.kv))
            pages = -(-(entry.kv + tokens) // page) + (-entry.kv // page)
            pool.take(pages)
            entry.pages += pages
        return tuple(chunks), images

    def _reuse(self, entry: Entry) -> None:
        pool = self.pool
        entry.node = pool.match(entry.adapter, entry.prefix, entry.target)
        pool.hold(entry.node)
        entry.kv = pool.shared_tokens(entry.node)
        entry.cached_tokens = max(entry.cached_tokens, min(entry.kv, entry.prompt_tokens))
        self.journal.counters["prefix_hit_tokens"] += entry.kv

    def _images(self, entry: Entry, node: Node | None) -> int:
        """Images to encode: those whose tokens the cached prefix does not hold (images come first in a prefix)."""
        if not entry.images or not self.pool.shared_tokens(node):
            return entry.images
        shareable = sum(tokens for _, tokens in entry.prefix)
        return -(-entry.images * max(0, shareable - node.tokens) // shareable)

    def _work(self, prefills: tuple[tuple[int, int], ...], chunks: tuple[tuple[int, int], ...], images: int,
              switch_rank: int) -> Work:
        cohort, mode = self.cohort, self.mode
        decodes = outputs = len(cohort.members)
        prefill_tokens = 0
        rows = cohort.adapters  # adapter -> rows of the step
        if chunks:
            rows = dict(rows)
            for request, chunk in prefills:
                entry = self.entries[request]
                prefill_tokens += chunk
                rows[entry.adapter] = rows.get(entry.adapter, 0) + chunk
                outputs += entry.kv + chunk == entry.target and not entry.head
        lora_rows = adapters = rank = ranks = largest = 0
        if mode in (UNMERGED, MIXTURE):
            lora_rows, adapters, rank, ranks = self.pool.branches(rows, decodes + prefill_tokens, self.merged)
            if chunks:
                cold = decodes + prefill_tokens - rows.get(self.merged, 0) if self.merged >= 0 else 0
                largest = max([cold, *(rows[adapter] for adapter in rows if adapter not in (-1, self.merged))])
        return Work(mode, decodes, cohort.context + decodes, chunks, prefill_tokens, images, lora_rows, adapters,
                    rank, ranks, switch_rank, outputs, largest)

    # -- transitions ----------------------------------------------------------------------------------------------------
    def _unqueue(self, entry: Entry) -> None:
        if entry.preemptions and entry.id in self.preempted:
            del self.preempted[entry.id]
            return
        del self.waiting[entry.id]
        queue = self.waiting_by[entry.adapter]
        del queue[entry.id]
        if not queue:
            del self.waiting_by[entry.adapter]

    def _first_token(self, entry: Entry, now_ns: int) -> None:
        """The last chunk of a prefill emitted a token: the request decodes from now on, or ends."""
        del self.prefilling[entry.id]
        self.queued -= 1
        if entry.generated:
            self.journal.gap(now_ns - entry.token_ns)
        entry.generated += 1
        if entry.first_token_ns < 0:
            entry.first_token_ns = now_ns
        if entry.prefix and not entry.preemptions:
            before = entry.node.tokens // self.pool.page_tokens if entry.node else 0
            entry.node = self.pool.publish(entry.adapter, entry.prefix, entry.node)
            after = entry.node.tokens // self.pool.page_tokens if entry.node else 0
            entry.pages -= after - before
        if entry.generated == self._asked[entry.id].output_tokens:
            self._end(entry, COMPLETED, now_ns)
            return
        entry.state = DECODING
        self.decoding[entry.id] = entry
        self.decoding_by.setdefault(entry.adapter, {})[entry.id] = entry
        self._ids = None
        self._ids_by.pop(entry.adapter, None)
        self._fresh.append(entry)

    def _forget_decoding(self, entry: Entry) -> None:
        del self.decoding[entry.id]
        mates = self.decoding_by[entry.adapter]
        del mates[entry.id]
        if not mates:
            del self.decoding_by[entry.adapter]
        self._ids = None
        self._ids_by.pop(entry.adapter, None)

    def _preempt(self, entry: Entry, now_ns: int) -> None:
        """Take the memory of a running request back; it will recompute its prompt and what it has generated."""
        if entry.state == PREFILLING:
            del self.prefilling[entry.id]
        else:
            entry.token_ns = entry.since_ns
            if entry.id in self.cohort.members:
                self.cohort.leave(entry)
                self._cohort_ids = None
                entry.token_ns = self._token_ns
            self.paused.pop(entry.id, None)
            if entry in self._fresh:
                self._fresh.remove(entry)
            self._forget_decoding(entry)
            self.queued += 1
        self._return_memory(entry)
        if entry.adapter >= 0:  # it must not hold memory that those who run may need to end
            self.pool.release(entry.adapter)
        entry.state = WAITING
        entry.target = entry.prompt_tokens + entry.generated
        entry.kv = 0
        entry.preemptions += 1
        entry.since_ns = now_ns
        self.preempted[entry.id] = entry
        if len(self.preempted) > 1:  # the oldest first; rare and short, so sorting is cheap
            self.preempted = dict(sorted(self.preempted.items()))
        self.journal.counters["preemptions"] += 1

    def _return_memory(self, entry: Entry) -> None:
        self.pool.give(entry.pages)
        entry.pages = 0
        self.pool.drop(entry.node)
        entry.node = None

    def _end(self, entry: Entry, status: int, now_ns: int) -> None:
        self._return_memory(entry)
        if entry.adapter >= 0 and entry.state != WAITING:
            self.pool.release(entry.adapter)
        left = self.unfinished[entry.adapter] - 1
        if left:
            self.unfinished[entry.adapter] = left
        else:
            del self.unfinished[entry.adapter]
        del self.entries[entry.id]
        entry.state = ENDED
        self._write(entry, self._asked.pop(entry.id), status, now_ns)

    def _write(self, entry: Entry, request: Request, status: int, now_ns: int) -> None:
        self.journal.request((
            entry.id, self.journal.server, entry.adapter, 0, entry.prompt_tokens, entry.cached_tokens,
            request.output_tokens, entry.generated, entry.images, entry.arrival_ns, entry.scheduled_ns,
            entry.first_token_ns, now_ns, entry.preemptions, status,
        ))  # fmt: skip
