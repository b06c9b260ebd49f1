"""Growing a packing from own adapters: fewer steps than the paper's heuristic, on made-up domains that interfere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.fusion.search import fuse_in_order, search
from engine.fusion.trials import Attempt

FLOOR = 0.89
"""Of the own adapter's accuracy, margin included."""
CHECK_STEPS = 20


class Learner:
    """Domains whose share of their own accuracy grows as 1 - exp(-3 steps / need), to a top that company lowers.

    jointly: starts from merged adapters, each worth `retained` of itself for every other one; the neediest first, until all
    hold, or none can. In sequence: the whole need of the last domain, and those before it forget a little each time.
    """

    def __init__(self, seed, jointly, strength, forgets=0.0):
        rng = np.random.default_rng([seed, 2])
        n = int(rng.integers(7, 14))
        self.domains, self.ordered = tuple("abcdefghijklm"[:n]), not jointly
        self.alone = frozenset(self.domains)
        self.need, self.retained = rng.uniform(60, 240, n), rng.uniform(0.6, 0.95, n)
        kin = rng.integers(0, 3, n)
        self.cost = rng.uniform(0, 0.05, (n, n)) * strength * np.where(kin[:, None] == kin, 0.3, 1.0) * (1 - np.eye(n))
        self.noisy = -(self.cost + self.cost.T) * rng.uniform(0.5, 1.5, (n, n))
        self.forgotten = rng.uniform(0, 2 * forgets, n)
        self.shares = {}

    def similarity(self, a, b):
        return self.noisy[self.domains.index(a), self.domains.index(b)]

    def attempt(self, order, parts=()):
        members = [self.domains.index(d) for d in order]
        if len(members) == 1:
            steps, shares = 0, [1.0]
        elif self.ordered:
            kept = [(1 - self.forgotten[i]) ** (len(members) - 1 - place) for place, i in enumerate(members)]
            steps, shares = self.need[members[-1]], [self.top(i, members) * k for i, k in zip(members, kept, strict=True)]
        else:
            steps, shares = self.jointly(members, parts or [(d,) for d in order])
        self.shares[order] = dict(zip(members, shares, strict=True))
        told = dict(zip(order, shares, strict=True))
        return Attempt(order, told, frozenset(d for d in order if told[d] >= FLOOR), int(steps))

    def top(self, one, members):
        return max(0.0, 1.05 - self.cost[one, members].sum())

    def jointly(self, members, parts):
        known = dict.fromkeys(members, 0.0)
        for part in parts:
            for i, share in self.shares.get(part, {self.domains.index(part[0]): 1.0}).items():
                if i in known:
                    known[i] = -math.log(1 - min(0.95, share / 1.05) * self.retained[i] ** (len(parts) - 1))
        cap, step = self.need[members].mean() * (1 + len(members)) / 2, 0
        while True:
            shares = {i: self.top(i, members) * (1 - math.exp(-known[i])) for i in members}
            below = [i for i in members if shares[i] < FLOOR]
            if not below or step >= cap or any(self.top(i, members) < FLOOR for i in below if step > 3 * CHECK_STEPS):
                return step, list(shares.values())
            for i in below:
                known[i] += 3 * CHECK_STEPS / len(below) / self.need[i]
            step += CHECK_STEPS


@pytest.mark.parametrize("strength", [0.5, 1, 2, 4])
def test_half_the_steps_of_the_heuristic_for_as_few_adapters_where_it_forgets_a_little(strength):
    ratios, ours, theirs = [], 0, 0
    for seed in range(40):
        found, paper = search(Learner(seed, True, strength), retries=4), fuse_in_order(Learner(seed, False, strength, 0.06))
        assert len(found) <= len(paper)
        ours, theirs = ours + len(found), theirs + len(paper)
        ratios.append(paper.steps / max(1, found.first_steps(len(paper))))
    assert np.median(ratios) >= 2
    assert min(ratios) > 1
    assert ours < 0.7 * theirs


def test_each_success_is_a_packing_of_one_adapter_fewer_and_none_costs_nothing():
    oracle = Learner(3, True, 1)
    n, found = len(oracle.domains), search(Learner(3, True, 1), retries=0)
    assert found.steps_to[n] == 0
    assert sorted(found.steps_to) == list(range(len(found), n + 1))
    spent = [found.steps_to[size] for size in range(n, len(found) - 1, -1)]
    assert spent == sorted(spent)
    assert {d for group in found.groups for d in group.serves} == set(oracle.domains)
    assert sum(len(group.serves) for group in found.groups) == n


def test_what_a_failed_pair_holds_is_kept_if_it_is_more_than_either_group():
    """Three of four get along; the fourth keeps the adapter it had."""
    class Three(Learner):
        def attempt(self, order, parts=()):
            held = frozenset(order) - {"d"} if len(order) > 2 else frozenset(order)
            return Attempt(order, dict.fromkeys(order, 1.0), held, 10)

        def similarity(self, a, b):
            return float({a, b} in ({"a", "b"}, {"c", "d"}))

    oracle = Three(0, True, 1)
    oracle.domains, oracle.alone = tuple("abcdefg"), frozenset("abcdefg")
    found = search(oracle, retries=0)
    assert sorted(len(group.serves) for group in found.groups) == [1, 6]
    assert all(group.serves <= group.attempt.held for group in found.groups)
