"""The verbs that policies share: fill one step's budget of tokens, slots and memory, first come, first served.

A `Batch` holds the budget of one attempt and turns into a Plan. It reads the view and touches nothing. Memory rules: a
request starts only if its whole prompt fits beside what has started already (and a small reserve stays for the decodes'
growth); where a decode finds no page, idle adapters go first, least recently used, then the request that came last is
preempted for recomputation (vLLM's order).
"""

from __future__ import annotations

from collections.abc import Iterable

from policies.plan import MERGED, UNMERGED, Plan
from policies.view import DECODING, WAITING, Entry, View

RESERVE = 0.01
"""Share of the pool that admissions leave to the growth of running requests (vLLM's watermark)."""


class Batch:
    """What one step may still take. decodes: the requests that get a token anyway, most urgent first.

    mode, merged: of the plan; in merged mode only requests of `merged` may be added. Decodes beyond max_batch are left
    out. on_demand: load the adapter of a request when `add` reaches it.
    """

    def __init__(self, view: View, decodes: tuple[int, ...], mode: int = UNMERGED, merged: int = -1, *, on_demand: bool = True):
        self.view = view
        self.mode = mode
        self.merged = merged
        self.on_demand = on_demand
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
        self._needed: set[int] = {merged} if merged >= 0 else set()  # adapters that this plan counts on
        if len(decodes) > self.free:
            self._make_room_for_decodes()
        else:
            self.free -= view.next_pages(decodes) if view.queued else 0
        self.slots = limits.max_batch - len(self.decodes)
        self.tokens = limits.max_batch_tokens - len(self.decodes)
        self._promised = -1  # pages that started prefills still need; counted when first asked

    def _make_room_for_decodes(self) -> None:
        view = self.view
        need = view.next_pages(self.decodes)
        if need <= self.free:
            self.free -= need
            return
        for adapter in list(view.idle_adapters):
            if need <= self.free:
                break
            if adapter not in self._needed:
                self.evicts.append(adapter)
                self.free += view.adapter_pages(adapter)
        if need > self.free:
            running = [*view.prefilling, *(view.entry(request) for request in view.decoding)]
            running.sort(key=lambda entry: (entry.arrival_ns, entry.id))
            gone = set()
            while need > self.free and len(running) > 1:
                entry = running.pop()
                gone.add(entry.id)
                self.preempts.append(entry.id)
                self.free += view.held_pages(entry)
                if entry.state == DECODING:
                    self.decodes = tuple(request for request in self.decodes if request not in gone)
                    need = view.next_pages(self.decodes)
        self.free -= need

    # -- adapters -----------------------------------------------------------------------------------------------------
    def load(self, adapter: int) -> bool:
        """Start the copy of `adapter` unless it is here or on its way; evicts idle ones for it. False if nothing fits."""
        view = self.view
        if view.is_resident(adapter) or view.is_loading(adapter) or adapter in self.loads:
            return True
        pages = view.adapter_pages(adapter)
        victims, freed = [], self.free
        for idle in view.idle_adapters:
            if freed >= pages:
                break
            if idle not in self._needed and idle not in self.evicts:
                victims.append(idle)
                freed += view.adapter_pages(idle)
        if freed < pages:
            return False
        self.evicts += victims
        self.loads.append(adapter)
        self.free = freed - pages
        return True

    # -- prefills -------------------------------------------------------------------------------------------------------
    def add(self, entry: Entry) -> bool:
        """Give `entry` a prefill chunk if its adapter is here. False when the budget is spent: nothing behind it fits."""
        if self.slots < 1 or self.tokens < 1:
            return False
        view, adapter = self.view, entry.adapter
        if adapter >= 0 and adapter != self.merged:
            if not view.is_resident(adapter) or adapter in self.evicts:
                if self.on_demand:
                    self.load(adapter)
                return True  # it does not hold up those behind it
            if self.mode == MERGED:
                return True
        elif adapter < 0 and self.mode == MERGED:
            return True
        page = view.page_tokens
        if entry.state == WAITING:
            done = view.reusable_tokens(entry)
            tokens = min(entry.target - done, self.tokens)
            pages = -(-(done + tokens) // page)
            if not self._admits(-(-entry.target // page)):
                return False
            self._promised += -(-entry.target // page) - pages
        else:
            tokens = min(entry.target - entry.kv, self.tokens)
            pages = -(-(entry.kv + tokens) // page) + (-entry.kv // page)
            if pages > self.free:
                return False
        self.free -= pages
        self.slots -= 1
        self.tokens -= tokens
        self._needed.add(adapter)
        self.prefills.append((entry.id, tokens))
        return True

    def _admits(self, pages: int) -> bool:
        """True if a new request of `pages` pages fits beside the rest of the prefills under way; evicts for it if need be."""
        view = self.view
        if self._promised < 0:
            page = view.page_tokens
            self._promised = sum(-(-e.target // page) + (-e.kv // page) for e in view.prefilling)
        running = self.decodes or self.prefills or view.decoding
        need = pages + self._promised + (int(RESERVE * view.pool_pages) if running else 0)
        if need <= self.free:
            return True
        victims, freed = [], self.free
        for idle in view.idle_adapters:
            if freed >= need:
                break
            if idle not in self._needed and idle not in self.evicts:
                victims.append(idle)
                freed += view.adapter_pages(idle)
        if freed < need:
            return False
        self.evicts += victims
        self.free = freed
        return True

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


def prefetch(batch: Batch, entries: Iterable[Entry], depth: int) -> None:
    """Start the copies of the adapters of the first `depth` entries, so that they are here when their turn comes (S-LoRA)."""
    for entry, _ in zip(entries, range(depth), strict=False):
        if entry.adapter >= 0 and not batch.load(entry.adapter):
            break
