"""A first packing where every domain has its own adapter already: grown from those, two groups at a time.

The smallest group is joined with the one most like it. The training of both starts from their adapters, merged, so that it
has little left to learn, and each success is a packing of one adapter fewer: what is known at any moment cost few steps.
Of a pair that does not get along what it did hold is kept, if that is more than either group. A group that failed TRIES
times is left as it is.
"""

from __future__ import annotations

from collections import Counter

from engine.fusion.trials import Group, Trials

TRIES = 2


def grown(trials: Trials) -> list[Group]:
    """Groups that serve all domains, each once. The oracle's `alone` has to hold them all."""
    groups = [Group(trials.attempt((domain,)), frozenset((domain,))) for domain in trials.oracle.domains]
    trials.reached(groups)
    failures: Counter[frozenset[str]] = Counter()
    tried: set[frozenset[str]] = set()
    while (pair := _next_pair(trials, groups, failures, tried)) is not None:
        small, other = pair
        union = small.serves | other.serves
        tried.add(frozenset((small.serves, other.serves)))
        attempt = trials.attempt([d for d in trials.oracle.domains if d in union], (small.attempt, other.attempt))
        held = attempt.held & union
        rest = [group for group in groups if group not in pair]
        if held == union:
            groups = [*rest, Group(attempt, union)]
            trials.reached(groups)
            continue
        failures[small.serves] += 1
        if len(held) > max(len(small.serves), len(other.serves)):
            groups = [*rest, Group(attempt, held), *_left_over(trials, pair, union - held)]
    return groups


def _left_over(trials: Trials, pair: tuple[Group, Group], domains: frozenset[str]) -> list[Group]:
    """The adapter that held these domains before, or their own ones where they come from both groups or are one."""
    if len(domains) > 1:
        for group in pair:
            if domains <= group.serves:
                return [Group(group.attempt, domains)]
    return [Group(trials.attempt((domain,)), frozenset((domain,))) for domain in sorted(domains)]


def _next_pair(trials: Trials, groups: list[Group], failures: Counter, tried: set) -> tuple[Group, Group] | None:
    """The smallest group that has not failed TRIES times, and the most similar one it has not been tried with."""
    similarity = trials.oracle.similarity
    best, found = None, None
    for small in groups:
        if failures[small.serves] >= TRIES:
            continue
        for other in groups:
            if other is small or frozenset((small.serves, other.serves)) in tried:
                continue
            total = sum(similarity(a, b) for a in sorted(small.serves) for b in sorted(other.serves))
            mean = total / (len(small.serves) * len(other.serves))
            rank = (len(small.serves), -mean, sorted(small.serves), sorted(other.serves))
            if best is None or rank < best:
                best, found = rank, (small, other)
    return found
