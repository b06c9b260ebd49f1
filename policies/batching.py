"""The verbs that policies share: fill one step's budget of tokens, slots and memory, first come, first served.

A `Batch` holds the budget of one attempt and turns into a Plan. It reads the view and touches nothing. Memory rules: a
request starts only if its whole prompt fits beside what has started already (and a small reserve stays for the decodes'
growth); where a decode finds no page, idle adapters go first, least recently used, then the request that came last is
preempted for recomputation (vLLM's order).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from policies.plan import MERGED, UNMERGED, Plan
from policies.view import DECODING, WAITING, Entry, View

RESERVE = 0.01
"""Share of the pool that admissions leave to the growth of running requests (vLLM's watermark)."""


class Batch:
    """What one step may still take. decodes: the requests that get a token anyway, most urgent first.

    mode, merged: of the plan; in merged mode only requests of `merged` may be added. Decodes beyond max_batch are left
    out. `add` loads the adapter of a request that it reaches.
    """

    __slots__ = (
        "_needed",
        "_promised",
        "aborts",
        "decodes",
        "evicts",
        "free",
        "loads",
        "merged",
        "mode",
        "preempts",
        "prefills",
        "room",
        "slots",
        "tokens",
        "view",
    )  # fmt: skip

    def __init__(self, view: View, decodes: tuple[int, ...], mode: int = UNMERGED, merged: int = -1):
        self.view = view
        self.mode = mode
        self.merged = merged
        limits = view.limits
        if len(decodes) > limits.max_batch:
            decodes = decodes[: limits.max_batch]
        self.decodes = decodes
        self.prefills: list[tuple[int, int]] = []
        self.loads: list[int] = []
        self.evicts: list[int] = []
        self.preempts: list[int] = []
        self.aborts: list[int] = []
        self.free = view.free_pages
        self.room = view.adapter_free  # `free` of adapters that lie apart; without a meaning elsewhere
        self._needed: set[int] = {merged} if merged >= 0 else set()  # adapters that this plan counts on
        need = view.next_pages(decodes) if view.queued or len(decodes) > self.free else 0
        while need > self.free and self._give_up_one():
            need = view.next_pages(self.decodes)
        if need > self.free:  # one is left, and copies under way hold the rest: it waits for them
            self.decodes, need = (), 0
        self.free -= need
        # A step that preempts admits nobody: what it freed belongs to those that stay.
        self.slots = 0 if self.preempts else limits.max_batch - len(self.decodes)
        self.tokens = limits.max_batch_tokens - len(self.decodes)
        self._promised = -1  # pages that started prefills still need; counted when first asked

    # -- memory -------------------------------------------------------------------------------------------------------
    def _victims(self, spare_wanted: bool = False) -> Iterator[int]:
        """Idle adapters that may go, least recently used first; before them those that no unfinished request wants."""
        view = self.view
        idle = [adapter for adapter in view.idle_adapters if adapter not in self._needed and adapter not in self.evicts]
        yield from (adapter for adapter in idle if adapter not in view.unfinished)
        if not spare_wanted:
            yield from (adapter for adapter in idle if adapter in view.unfinished)

    def _evict_for(self, pages: int, spare_wanted: bool = False) -> bool:
        """Evict idle adapters until `pages` are free where adapters lie; nothing if all that may go do not suffice."""
        apart = self.view.adapters_apart
        victims, free = [], self.room if apart else self.free
        if free < pages:
            for adapter in self._victims(spare_wanted):
                victims.append(adapter)
                free += self.view.adapter_pages(adapter)
                if free >= pages:
                    break
            if free < pages:
                return False
            self.evicts += victims
            if apart:
                self.room = free
            else:
                self.free = free
        return True

    def _give_up_one(self) -> bool:
        """Evict one idle adapter or, if there is none, preempt the running request that came last. False if neither."""
        view = self.view
        for adapter in self._victims() if not view.adapters_apart else ():
            self.evicts.append(adapter)
            self.free += view.adapter_pages(adapter)
            return True
        running = [view.entry(request) for request in view.decoding]
        running += view.prefilling
        running = [entry for entry in running if entry.id not in self.preempts]
        if len(running) < 2:
            return False
        last = max(running, key=lambda entry: (entry.arrival_ns, entry.id))
        self.preempts.append(last.id)
        self.free += view.held_pages(last)
        self.decodes = tuple(request for request in self.decodes if request != last.id)
        return True

    # -- adapters -----------------------------------------------------------------------------------------------------
    def load(self, adapter: int, spare_wanted: bool = False) -> bool:
        """Start the copy of `adapter` unless it is here or on its way; evicts idle ones for it. False if nothing fits.

        spare_wanted: evict none that an unfinished request asks for.
        """
        view = self.view
        if adapter in self.evicts:
            return False
        if not (view.is_resident(adapter) or view.is_loading(adapter) or adapter in self.loads):
            pages, apart = view.adapter_pages(adapter), view.adapters_apart
            if not self._evict_for(pages if apart else pages + self._promise(), spare_wanted):
                return False
            self.loads.append(adapter)
            if apart:
                self.room -= pages
            else:
                self.free -= pages
        self._needed.add(adapter)  # nobody behind may push it out again
        return True

    # -- prefills -------------------------------------------------------------------------------------------------------
    def add(self, entry: Entry) -> bool:
        """Give `entry` a prefill chunk if its adapter is here. False when the budget is spent: nothing behind it fits."""
        if self.slots < 1 or self.tokens < 1:
            return False
        view, adapter = self.view, entry.adapter
        if adapter >= 0 and adapter != self.merged:
            if not view.is_resident(adapter) or adapter in self.evicts:
                self.load(adapter)
                return True  # it does not hold up those behind it
            if self.mode == MERGED:
                return True
        elif adapter < 0 and self.mode == MERGED:
            return True
        self._needed.add(adapter)
        page = view.page_tokens
        if entry.state == WAITING:
            done = view.reusable_tokens(entry)
            tokens = min(entry.target - done, self.tokens)
            pages = -(-(done + tokens) // page)
            if not self._admits(-(-entry.target // page)):
                return self._waits_for_copies()
            self._promised += -(-entry.target // page) - pages
        else:
            tokens = min(entry.target - entry.kv, self.tokens)
            pages = -(-(entry.kv + tokens) // page) + (-entry.kv // page)
            while pages > self.free and not self.decodes and not self.prefills and entry.id not in self.preempts:
                # Nobody runs who could end and free pages: the request that started first must not starve.
                if not self._give_up_one():
                    break
            if pages > self.free or entry.id in self.preempts:
                return False
            self._promised = self._promise() - pages
        self.free -= pages
        self.slots -= 1
        self.tokens -= tokens
        self.prefills.append((entry.id, tokens))
        return True

    def _admits(self, pages: int) -> bool:
        """True if a new request of `pages` pages fits beside the prefills under way; evicts for it if need be."""
        view = self.view
        running = self.decodes or self.prefills or view.decoding
        need = pages + self._promise() + (int(RESERVE * view.pool_pages) if running else 0)
        return need <= self.free if view.adapters_apart else self._evict_for(need)

    def _promise(self) -> int:
        """Pages that prefills under way need beyond this step: neither admissions nor copies may take them."""
        if self._promised < 0:
            page = self.view.page_tokens
            self._promised = sum(-(-e.target // page) + (-e.kv // page) for e in self.view.prefilling)
        return self._promised

    def _waits_for_copies(self) -> bool:
        """True if nothing runs and copies under way hold memory: then those behind may start meanwhile."""
        if self.decodes or self.prefills:
            return False
        return bool(self.loads) or any(map(self.view.is_loading, range(len(self.view.adapters))))

    @property
    def is_empty(self) -> bool:
        """True if nothing would be computed, nor memory taken back so that it can be."""
        return not (self.decodes or self.prefills or self.preempts)

    def fill(self, entries: Iterable[Entry]) -> Batch:
        """Add entries in order until the budget is spent."""
        for entry in entries:
            if not self.add(entry):
                break
        return self

    def plan(self, *, until_ns: int | None = None, memo=None) -> Plan:
        """The batch as a plan."""
        return Plan(
            self.mode, self.merged, tuple(self.prefills), self.decodes, tuple(self.loads), tuple(self.evicts),
            tuple(self.preempts), tuple(self.aborts), until_ns, memo,
        )  # fmt: skip


def only_decode(view: View, mode: int = UNMERGED) -> Plan:
    """The plan where nobody waits for a prefill: all running requests go on (a Batch where memory or slots are short)."""
    decodes = view.decoding
    if len(decodes) <= view.limits.max_batch and len(decodes) <= view.free_pages:
        return Plan(mode, -1, (), decodes)
    return Batch(view, decodes, mode).plan()


def prefetch(batch: Batch, entries: Iterable[Entry], depth: int) -> None:
    """Start the copies of the first `depth` entries' adapters, so that they are here when their turn comes (S-LoRA).

    Spares what an unfinished request asks for: in tight memory, prefetching would push out what is needed sooner.
    """
    if batch.view.all_resident:
        return
    for entry, _ in zip(entries, range(depth), strict=False):
        if entry.adapter >= 0 and not batch.load(entry.adapter, spare_wanted=True):
            break


def starving(view: View, patience_ns: int, most: int = -1, enough: float = -1) -> tuple[list[Entry], int | None]:
    """The requests without progress for more than `patience_ns`, and when the next one joins them (None: nobody is left).

    Looks only at those that starve and at one more of each queue: the queues are in order of their last progress. Of those
    that never ran it looks at as many as a step can take, and beyond only until more than `enough` requests of other
    adapters than `most` starve: a backlog of thousands costs no more than that.
    """
    now_ns, found, next_ns, others = view.now_ns, [], None, 0
    if view.total - view.unfinished.get(most, 0) <= enough:
        enough = -1
    arrived = view.arrived
    for entries, ordered in ((view.prefilling, False), (view.preempted, False), (arrived, True), (view.paused, True)):
        for entry in entries:
            due_ns = entry.since_ns + patience_ns + 1
            if due_ns <= now_ns:
                found.append(entry)
                others += entry.adapter != most
                if entries is arrived and others > enough and len(found) > view.limits.max_batch:
                    break
            else:
                next_ns = due_ns if next_ns is None else min(next_ns, due_ns)
                if ordered:
                    break
    return found, next_ns


def most_common(view: View) -> int:
    """The adapter that most unfinished requests ask for; among equals the folded one, then the lowest. -1 if none do."""
    best, most = -1, 0
    for adapter, count in view.unfinished.items():
        if adapter >= 0 and count >= most:
            if count > most or adapter == view.merged or (best != view.merged and adapter < best):
                best = adapter
            most = count
    return best


def lease_end(batch: Batch, until_ns: int | None) -> int | None:
    """`until_ns`, or now where the plan changes the mode, pauses or resumes somebody: who starves next, and when, depends
    on that, so the policy looks again after one step."""
    view, decodes, paused = batch.view, batch.decodes, len(batch.view.paused)
    same = batch.mode == view.mode and batch.merged == view.merged and len(decodes) + paused == len(view.decoding)
    if batch.is_empty or (same and not (paused and any(map(view.is_paused, decodes)))):
        return until_ns
    return view.now_ns


def by_urgency(view: View, urgent: Collection[Entry], requests: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `requests`, which decode, that the next step takes: the urgent first, then those that ran in the last step,
    then the paused; so many that the urgent who wait for a prefill find a slot, for which none that is urgent itself makes
    room. Unchanged if all fit. In a backlog nobody makes room: it would share the slots among more requests and delay them
    all.

    Those that ran keep their places, so that a decision repeated one step later is the same decision.
    """
    most = view.limits.max_batch
    if len(requests) + view.queued > most and _are_few(view, urgent):
        most -= _could_start(view, urgent, len(requests))
    if len(requests) <= most:
        return requests
    first = {entry.id for entry in urgent}
    rank = {request: (request not in first, view.is_paused(request)) for request in requests}
    return tuple(sorted(requests, key=rank.__getitem__))[: max(most, len(first.intersection(requests)))]


def unmerged(view: View, urgent: Collection[Entry]) -> Batch:
    """An unmerged step: the urgent first, then the rest in order; in a backlog all in order, for what was begun goes on."""
    batch = Batch(view, by_urgency(view, urgent, view.decoding))
    first = {entry.id: entry for entry in urgent if entry.state != DECODING} if _are_few(view, urgent) else {}
    batch.fill(chain(first.values(), (entry for entry in view.queue() if entry.id not in first)))
    return batch if not batch.is_empty else Batch(view, view.decoding).fill(view.queue())


def _are_few(view: View, urgent: Collection[Entry]) -> bool:
    """True unless there is a backlog: more than half a batch is urgent."""
    return len(urgent) <= view.limits.max_batch / 2


def _could_start(view: View, urgent: Iterable[Entry], decodes: int) -> int:
    """How many of those that wait for a prefill one step takes up beside `decodes` others, as far as is sure beforehand:
    their adapters are here, and tokens and pages suffice without taking any from others."""
    page, limits, found = view.page_tokens, view.limits, 0
    tokens = limits.max_batch_tokens - limits.max_batch
    pages = view.free_pages - int(RESERVE * view.pool_pages) - min(decodes, limits.max_batch)
    pages -= sum(-(-entry.target // page) + (-entry.kv // page) for entry in view.prefilling)
    for entry in urgent:
        if entry.state == DECODING or not view.is_resident(entry.adapter):
            continue
        done = view.reusable_tokens(entry) if entry.state == WAITING else entry.kv
        pages -= -(-entry.target // page) if entry.state == WAITING else 0
        if tokens < 1 or pages < 0:
            break
        tokens -= entry.target - done
        found += 1
    return found
