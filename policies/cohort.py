"""The requests that decode together, advanced by whole runs of steps in closed form.

All members get one token in every step, so one tick counter stands for all of them: a member's progress is the tick since
it joined, its end is a tick known when it joins, and the pages it needs follow from (its length - tick) modulo the page.
A run of k steps thus costs the same for any k and any number of members. Nothing here knows adapters' memory, plans or
time.
"""

from __future__ import annotations

from heapq import heappop, heappush

from policies.view import Entry


class Cohort:
    """Members by id, and their sums. page_tokens: KV tokens a page."""

    __slots__ = ("_end_of", "_ends", "_page", "_phase", "adapters", "context", "members", "tick")

    def __init__(self, page_tokens: int):
        self.members: dict[int, Entry] = {}
        self.adapters: dict[int, int] = {}  # adapter -> members
        self.context = 0  # KV tokens of all members
        self.tick = 0
        self._page = page_tokens
        self._phase = [0] * page_tokens  # members by (kv - tick) modulo the page
        self._end_of: dict[int, int] = {}  # member -> tick of its end
        self._ends: list[tuple[int, int]] = []  # heap of (tick, id); stale where `_end_of` says otherwise

    def join(self, entry: Entry, remaining: int) -> None:
        """Add a member that ends after `remaining` steps (>= 1)."""
        self.members[entry.id] = entry
        entry.tick = tick = self.tick
        self._phase[(entry.kv - tick) % self._page] += 1
        self.context += entry.kv
        adapters = self.adapters
        adapters[entry.adapter] = adapters.get(entry.adapter, 0) + 1
        self._end_of[entry.id] = tick + remaining
        heappush(self._ends, (tick + remaining, entry.id))

    def leave(self, entry: Entry) -> None:
        """Take a member out and write its progress into its entry."""
        del self.members[entry.id], self._end_of[entry.id]
        steps = self.tick - entry.tick
        before = entry.kv
        entry.kv = kv = before + steps
        entry.generated += steps
        entry.pages += -(-kv // self._page) + (-before // self._page)
        self._phase[(kv - self.tick) % self._page] -= 1
        self.context -= kv
        left = self.adapters[entry.adapter] - 1
        if left:
            self.adapters[entry.adapter] = left
        else:
            del self.adapters[entry.adapter]

    def pages_for(self, steps: int) -> int:
        """Pages that all members together take in the next `steps` steps."""
        if steps == 1:
            return self._phase[-self.tick % self._page]
        rounds, rest = divmod(steps, self._page)
        phase, first = self._phase, -self.tick % self._page
        # The phases first, first - 1, ... come due one after another and wrap around below 0.
        due = phase[max(0, first - rest + 1) : first + 1] if rest else ()
        if rest > first + 1:
            due = due + phase[first + 1 - rest :]
        return rounds * len(self.members) + sum(due)

    def steps_to_end(self) -> int:
        """Steps until the first member ends; the cohort must not be empty."""
        ends, end_of = self._ends, self._end_of
        while end_of.get(ends[0][1]) != ends[0][0]:
            heappop(ends)
        return ends[0][0] - self.tick

    def steps_within(self, free_pages: int) -> int:
        """The longest run that ends no later than the first member and fits into `free_pages`; 0 if not one step fits."""
        steps = self.steps_to_end()
        if len(self.members) * (steps // self._page + 1) <= free_pages or self.pages_for(steps) <= free_pages:
            return steps
        low, high = 0, steps  # pages_for is monotone: low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            if self.pages_for(middle) <= free_pages:
                low = middle
            else:
                high = middle
        return low

    def advance(self, steps: int) -> list[int]:
        """Run `steps` steps; the ids of the members that end with them, in order of id. They are still members."""
        self.tick = now = self.tick + steps
        self.context += steps * len(self.members)
        ended: list[int] = []
        ends, end_of = self._ends, self._end_of
        while ends and ends[0][0] <= now:
            tick, request = heappop(ends)
            if end_of.get(request) == tick:
                end_of[request] = -1  # a twin in the heap, from leaving and coming back, must not end it twice
                ended.append(request)
        return ended
