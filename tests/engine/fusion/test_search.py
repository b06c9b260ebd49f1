"""The packing search on made-up oracles: optimal up to six domains, never worse than the paper's heuristic above."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engine.fusion.search import exhaustive, fuse_in_order, search
from engine.fusion.trials import Attempt, FloorError

STEPS = 100


class MadeUp:
    """An oracle from a function (order) -> accuracies; every floor is 0.5. Counts what it is asked."""

    def __init__(self, n, accuracies, ordered=False, similarity=None):
        self.domains = tuple("abcdefghijklmnop"[:n])
        self.ordered = ordered
        self.alone = frozenset()
        self._accuracies = accuracies
        self._similarity = similarity
        self.asked = []

    def attempt(self, order, parts=()):
        self.asked.append(order)
        found = dict(zip(order, self._accuracies([self.domains.index(d) for d in order]), strict=True))
        return Attempt(order, found, frozenset(d for d in order if found[d] >= 0.5), STEPS)

    def similarity(self, a, b):
        i, j = self.domains.index(a), self.domains.index(b)
        return self._similarity[i][j] if self._similarity is not None else 0.0


def capacity(rng, n):
    """An adapter has room; domains have sizes. Beyond it all of them fall."""
    sizes = rng.uniform(0.1, 1, n)
    room = max(1.0, rng.uniform(0.2, 1.1) * sizes.sum())
    return MadeUp(n, lambda t: [1.0 if sizes[t].sum() <= room else 0.4] * len(t))


def pairs(rng, n, low=0.0):
    """Each domain costs each other one something; below zero it helps (then more may be easier than fewer)."""
    cost = rng.uniform(low, 0.5, (n, n)) * rng.uniform(0.2, 1)
    np.fill_diagonal(cost, 0)
    return MadeUp(n, lambda t: [0.9 - cost[d, t].sum() for d in t], similarity=-(cost + cost.T))


def helpful_pairs(rng, n):
    return pairs(rng, n, low=-0.4)


def chaos(rng, n):
    """Every set has results of its own; only alone every domain is fine."""
    seed = int(rng.integers(1 << 30))
    ease = rng.uniform(0.2, 0.7)

    def accuracies(t):
        if len(t) == 1:
            return [1.0]
        return (np.random.default_rng([seed, *sorted(t)]).uniform(0, 1, n)[t] < ease).astype(float)

    return MadeUp(n, accuracies)


def forgetting(rng, n):
    """Order matters: what is trained later costs what was trained before."""
    cost = rng.uniform(-0.1, 0.4, (n, n))
    return MadeUp(n, lambda t: [0.9 - sum(cost[d, e] for e in t[i + 1 :]) for i, d in enumerate(t)], ordered=True)


def optimum(oracle):
    """The fewest adapters, found in the plainest way: unions of what every possible training holds."""
    bit = {d: 1 << i for i, d in enumerate(oracle.domains)}
    masks = set()
    for size in range(1, len(bit) + 1):
        for members in itertools.combinations(oracle.domains, size):
            for order in itertools.permutations(members) if oracle.ordered else (members,):
                masks.add(sum(bit[d] for d in oracle.attempt(order).held))
    reached, adapters = {0}, 0
    while (1 << len(bit)) - 1 not in reached:
        reached = {a | b for a in reached for b in masks}
        adapters += 1
    return adapters


def assert_sound(packing, oracle):
    served = [d for group in packing.groups for d in group.serves]
    assert set(served) == set(oracle.domains)
    assert all(group.serves <= group.attempt.held for group in packing.groups)
    assert len(oracle.asked) == len(set(oracle.asked)) == packing.attempts
    assert packing.steps == packing.attempts * STEPS
    assert packing.first_steps(len(packing)) <= packing.steps


@pytest.mark.parametrize("family", [capacity, pairs, helpful_pairs, chaos])
def test_up_to_six_domains_the_optimum_is_found_and_proven(family):
    for seed in range(120):
        rng = np.random.default_rng([seed, 7])
        n = int(rng.integers(1, 7))
        oracle = family(rng, n)
        packing = search(oracle)
        assert_sound(packing, oracle)
        assert packing.proven
        assert len(packing) == optimum(oracle)
        oracle.asked.clear()
        assert len(exhaustive(oracle)) == len(packing) <= len(fuse_in_order(oracle))


def test_where_order_matters_every_order_is_tried_before_giving_up():
    for seed in range(60):
        rng = np.random.default_rng([seed, 8])
        oracle = forgetting(rng, int(rng.integers(2, 5)))
        packing = search(oracle)
        assert_sound(packing, oracle)
        assert packing.proven
        assert len(packing) == optimum(oracle)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("family", [capacity, pairs, helpful_pairs, chaos, forgetting])
def test_above_six_domains_never_more_adapters_than_the_heuristic(family, alone):
    for seed in range(40):
        rng = np.random.default_rng([seed, 9])
        oracle = family(rng, int(rng.integers(7, 15)))
        oracle.alone = frozenset(oracle.domains) if alone else frozenset()
        packing = search(oracle)
        assert_sound(packing, oracle)
        oracle.asked.clear()
        assert len(packing) <= len(fuse_in_order(oracle))


def test_one_adapter_for_all_costs_one_attempt():
    oracle = MadeUp(12, lambda t: [1.0] * len(t))
    packing = search(oracle)
    assert (len(packing), packing.attempts, packing.proven) == (1, 1, True)
    assert fuse_in_order(oracle).attempts == 12


def test_what_a_failed_attempt_holds_is_kept():
    """Two domains fall in the company of all others: two attempts, no roll-back."""
    oracle = MadeUp(10, lambda t: [0.0 if len(t) > 2 and d > 7 else 1.0 for d in t])
    packing = search(oracle, retries=0)
    assert [sorted(g.serves) for g in packing.groups] == [list("abcdefgh"), ["i", "j"]]
    assert packing.attempts == 2


def test_own_adapters_that_are_there_complete_a_packing_at_once():
    """Six of ten held together: with four own adapters a packing of five is known after one attempt, before one of less."""
    oracle = MadeUp(10, lambda t: [0.0 if len(t) > 4 and d > 5 else 1.0 for d in t])
    assert search(oracle, retries=0).steps_to == {2: 2 * STEPS}
    oracle.alone = frozenset(oracle.domains) - {"a"}
    packing = search(oracle, retries=0)
    assert packing.steps_to == {5: STEPS, 2: 2 * STEPS}
    assert packing.first_steps(4) == 2 * STEPS
    attempt = oracle.attempt
    stops = ((30, frozenset("ac")), (70, frozenset("abc")))
    oracle.attempt = lambda order, parts=(): replace(attempt(order), milestones=stops)
    assert search(oracle, retries=0).steps_to == {9: 30, 8: 70, 5: STEPS, 2: 2 * STEPS}
    oracle.alone = frozenset("abcdefghi")
    assert search(oracle, retries=0).steps_to == {2: 2 * STEPS}


def test_heuristic_rolls_back_and_opens_a_new_adapter():
    oracle = MadeUp(4, lambda t: [1.0 if len(t) <= 2 else 0.0] * len(t), ordered=True)
    packing = fuse_in_order(oracle)
    assert [g.attempt.order for g in packing.groups] == [("a", "b"), ("c", "d")]
    assert oracle.asked == [("a",), ("a", "b"), ("a", "b", "c"), ("c",), ("c", "d")]


def test_retries_are_bounded():
    for seed in range(30):
        oracle = chaos(np.random.default_rng(seed), 12)
        first = search(oracle, retries=0).attempts
        oracle.asked.clear()
        assert search(oracle, retries=5).attempts <= first + 5


def test_a_floor_out_of_reach_is_named():
    oracle = MadeUp(3, lambda t: [0.2 if d == 1 else 1.0 for d in t])
    with pytest.raises(FloorError, match=r"b \(best 0.200\)"):
        search(oracle)
    with pytest.raises(FloorError, match="lower the floor"):
        fuse_in_order(oracle)


def test_a_domain_that_needs_company_gets_it():
    oracle = MadeUp(8, lambda t: [0.2 if d == 1 and 0 not in t else 1.0 for d in t])
    assert len(search(oracle)) == 1
    with pytest.raises(FloorError):
        fuse_in_order(MadeUp(8, lambda t: [0.2 if d == 0 and 1 not in t else 1.0 for d in t]))


def test_names_must_differ():
    oracle = MadeUp(2, lambda t: [1.0] * len(t))
    oracle.domains = ("a", "a")
    with pytest.raises(ValueError, match="different"):
        search(oracle)
    oracle.domains = tuple("abcdefghi")
    with pytest.raises(ValueError, match="at most 8"):
        exhaustive(oracle)
