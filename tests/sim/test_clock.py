"""A process that lets time pass without an event sees what it would have seen behind a Timeout."""

from __future__ import annotations

import pytest
from simpy.events import Timeout

from sim.server import Clock, at


def history(quick: bool, sleeps: tuple[tuple[int, ...], ...], actions: tuple[int, ...]) -> list[tuple]:
    """(time, what) in order of occurrence: processes that are busy for `sleeps` one after another, and actions `at` times of
    which each orders one more, two later. quick: they try pass_to first."""
    clock, told = Clock(), []

    def busy(number):
        yield Timeout(clock, 0)  # all must have begun, as servers have
        for ps in sleeps[number]:
            end_ps = clock.now + ps
            if not (quick and clock.pass_to(end_ps)):
                yield Timeout(clock, end_ps - clock.now)
            told.append((clock.now, f"process {number}"))

    def act(_):
        told.append((clock.now, "action"))
        at(clock, clock.now + 2, lambda _: told.append((clock.now, "afterwards")))

    for number in range(len(sleeps)):
        clock.process(busy(number))
    for time_ps in actions:
        at(clock, time_ps, act)
    clock.run()
    return told


@pytest.mark.parametrize("sleeps", [((5, 5, 5),), ((1, 1, 10, 1),), ((4, 3, 8), (2, 5, 8)), ((7,), (7,), (3, 4))])
@pytest.mark.parametrize("actions", [(), (3,), (5, 5, 9), (1, 2, 7, 12), (30,)])
def test_time_passes_as_behind_a_timeout(sleeps, actions):
    told = history(True, sleeps, actions)
    assert told == history(False, sleeps, actions)
    assert len(told) == sum(map(len, sleeps)) + 2 * len(actions)


def test_what_is_due_at_the_end_itself_takes_a_timeout():
    clock, told = Clock(), []
    at(clock, 4, lambda _: told.append(clock.now))
    at(clock, 9, lambda _: told.append(clock.now))
    assert clock.pass_to(3)
    assert (clock.now, told) == (3, [])
    assert not clock.pass_to(9)
    assert (clock.now, told) == (4, [4])
    assert not clock.pass_to(9)
    clock.run()
    assert clock.pass_to(12)
    assert (clock.now, told) == (12, [4, 9])
