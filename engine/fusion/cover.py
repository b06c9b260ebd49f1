"""The smallest cover of a few domains by what trainings hold, training only what could still matter.

A set of domains that has not been trained is taken to hold all of them: the cheapest such optimistic cover is found by
dynamic programming over subsets, its most doubtful set is trained, and so on until the cover is all fact, or not even
optimism covers everything, which proves that there is none. It assumes nothing about how domains interfere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, islice, permutations
from typing import Any, Protocol


class Trials(Protocol):
    """What has been trained (`known`: order -> attempt), and the means to train more (`engine.fusion.search`)."""

    oracle: Any
    known: dict[tuple[str, ...], Any]

    def attempt(self, order: Iterable[str]) -> Any: ...

    def more(self) -> bool: ...


def cover_of(trials: Trials, most: int) -> tuple[list[tuple[Any, frozenset[str]]] | None, bool]:
    """A cover by at most `most` adapters, each an attempt and the domains it is to serve, no domain twice.

    Trains as needed. (None, True): there is none. (None, False): out of retries before that was known.
    """
    bit = {domain: 1 << i for i, domain in enumerate(trials.oracle.domains)}
    untried = {}  # mask -> iterator over the orders not tried yet
    for size in range(1, len(bit) + 1):
        for members in combinations(trials.oracle.domains, size):
            orders = permutations(members) if trials.oracle.ordered else iter((members,))
            untried[sum(bit[d] for d in members)] = _Peekable(o for o in orders if o not in trials.known)
    while True:
        choice = _cheapest(trials, bit, untried, most)
        if choice is None:
            return None, True
        hoped = [pick for pick in choice if isinstance(pick, int)]
        if not hoped:
            return [(attempt, frozenset(d for d in bit if bit[d] & mask)) for attempt, mask in choice], True
        if not trials.more():
            return None, False
        hardest = max(hoped, key=lambda mask: (mask.bit_count(), -mask))  # the most likely to fail settles most
        trials.attempt(next(untried[hardest]))


class _Peekable:
    """An iterator that is true while something is left."""

    def __init__(self, orders: Iterator):
        self._orders, self._next = orders, list(islice(orders, 1))

    def __bool__(self) -> bool:
        return bool(self._next)

    def __next__(self):
        value, self._next = self._next[0], list(islice(self._orders, 1))
        return value


def _cheapest(trials: Trials, bit: Mapping[str, int], untried: Mapping, most: int) -> list | None:
    """A cover by at most `most` sets: (attempt, mask) where trained, a mask where it is only hoped that its training holds.

    Hopes cost 1, more where sets below it have failed; the cover with the least hope wins. Partition by dynamic programming
    over subsets; a set may be served by any training of a superset that held it. None if not even hope covers all.
    """
    full = (1 << len(bit)) - 1
    offer: list[tuple[float, object] | None] = [None] * (full + 1)
    failures = [sum(bit[d] for d in a.order) for a in trials.known.values() if len(a.held) < len(a.order)]
    for mask in untried:
        if untried[mask]:
            cost = 1 + sum(1 for failed in failures if failed & mask == failed)
            offer[mask] = (cost, mask)
    for attempt in trials.known.values():
        mask = sum(bit[d] for d in attempt.held)
        if mask:
            offer[mask] = (0, (attempt, mask))
    for place in bit.values():  # every subset of what a training holds, or may hold, is served by it
        for mask in range(full, -1, -1):
            if mask & place and offer[mask] is not None:
                below = offer[mask ^ place]
                if below is None or offer[mask][0] < below[0]:
                    offer[mask ^ place] = offer[mask]
    table: list[dict[int, tuple[float, list]]] = [{0: (0, [])}]
    for _ in range(most):
        row = dict(table[-1])
        for mask in range(1, full + 1):
            low = mask & -mask
            part = mask
            while part:  # the part with the lowest domain goes to one adapter
                if part & low and offer[part] is not None and mask ^ part in table[-1]:
                    before, picks = table[-1][mask ^ part]
                    if mask not in row or before + offer[part][0] < row[mask][0]:
                        row[mask] = (before + offer[part][0], [*picks, _pick(offer[part][1], part)])
                part = (part - 1) & mask
        table.append(row)
    return table[-1][full][1] if full in table[-1] else None


def _pick(source: object, part: int):
    return source if isinstance(source, int) else (source[0], part)
