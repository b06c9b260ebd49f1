"""The cohort in closed form against a twin that steps every member by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cohort import Cohort
from policies.view import Entry
from traces.request import Request

PAGE = 4


def entry_of(number: int, kv: int, adapter: int) -> Entry:
    """A request that has computed `kv` tokens."""
    entry = Entry(Request(number, 0, kv, 1, adapter))
    entry.kv = kv
    entry.pages = -(-kv // PAGE)
    return entry


class Twin:
    """Members as [kv, remaining], one step at a time."""

    def __init__(self):
        self.members: dict[int, list[int]] = {}

    def pages_for(self, steps: int) -> int:
        return sum(-(-(kv + steps) // PAGE) - -(-kv // PAGE) for kv, _ in self.members.values())

    def steps_within(self, free: int) -> int:
        steps = 0
        while steps < min(left for _, left in self.members.values()) and self.pages_for(steps + 1) <= free:
            steps += 1
        return steps

    def advance(self, steps: int) -> list[int]:
        ended = []
        for _ in range(steps):
            for number, member in self.members.items():
                member[0] += 1
                member[1] -= 1
                if member[1] == 0:
                    ended.append(number)
        return sorted(ended)


MOVES = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 30), st.integers(1, 12), st.integers(-1, 1)),
    st.tuples(st.just("run"), st.integers(0, 12), st.integers(0, 40)),
    st.tuples(st.just("pause"), st.integers(0, 9)),
    st.tuples(st.just("resume"), st.integers(0, 9)),
)


@settings(max_examples=200)
@given(st.lists(MOVES, max_size=40))
def test_closed_form_equals_stepping(moves):
    cohort, twin = Cohort(PAGE), Twin()
    entries: dict[int, Entry] = {}
    paused: dict[int, list[int]] = {}
    for move, *values in moves:
        if move == "join":
            kv, remaining, adapter = values
            number = len(entries)
            entries[number] = entry_of(number, kv, adapter)
            cohort.join(entries[number], remaining)
            twin.members[number] = [kv, remaining]
        elif move == "pause" and twin.members:
            number = sorted(twin.members)[values[0] % len(twin.members)]
            paused[number] = twin.members.pop(number)
            cohort.leave(entries[number])
            assert entries[number].kv == paused[number][0]
            assert entries[number].pages == -(-entries[number].kv // PAGE)
        elif move == "resume" and paused:
            number = sorted(paused)[values[0] % len(paused)]
            twin.members[number] = paused.pop(number)
            cohort.join(entries[number], twin.members[number][1])
        elif move == "run" and twin.members:
            wanted, free = values
            assert cohort.pages_for(wanted) == twin.pages_for(wanted)
            assert cohort.steps_within(free) == twin.steps_within(free)
            steps = min(wanted, cohort.steps_to_end())
            ended = cohort.advance(steps)
            assert ended == twin.advance(steps)
            for number in ended:
                cohort.leave(entries[number])
                assert entries[number].kv == twin.members.pop(number)[0]
        assert set(cohort.members) == set(twin.members)
        assert cohort.context == sum(kv for kv, _ in twin.members.values())
        counts: dict[int, int] = {}
        for number in twin.members:
            counts[entries[number].adapter] = counts.get(entries[number].adapter, 0) + 1
        assert cohort.adapters == counts
