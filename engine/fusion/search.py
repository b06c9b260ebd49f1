"""Packing domains into the fewest adapters, when only training tells whether a set of domains gets along.

An `Oracle` trains one adapter on a list of domains and says which of them it holds above their floor. Three ways to use it:
`fuse_in_order` is the heuristic of VaLoRA (EuroSys 2025): next domain on the same adapter, roll back and open a new one
where any floor falls. `search` is ours. `exhaustive` tries everything and is the yardstick.

Ours rests on one observation: an adapter whose training failed for some of its domains still serves those that it holds.
So nothing is rolled back; the question is a cover (each domain held by some adapter), whose optimum is never worse than that
of the partition. Where many domains have own adapters, which relative floors need, `search` grows its groups from those
(`engine.fusion.grow`). Else it asks for everything at once, keeps what holds, and goes on with the rest, in smaller groups
picked by similarity where too little holds. Then it spends its retries on one adapter fewer: up to EXACT domains by a lazy
exact search, which trains only sets that an optimistic packing still hopes for and so ends at the true optimum; above,
by emptying the smallest adapter into the others, and last by replaying the heuristic for as long as it could still win.

It knows names, floors met and steps spent; no torch, no files, no clock. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations, permutations

from engine.fusion.cover import cover_of
from engine.fusion.grow import grown
from engine.fusion.trials import Attempt, FloorError, Group, Oracle, Packing, Trials

EXACT = 6
"""Up to this many domains the number of adapters is proven optimal unless the retries run out."""
MAX_EXHAUSTIVE = 8


# -- the paper's heuristic -------------------------------------------------------------------------------------------------
def fuse_in_order(oracle: Oracle, watch: Callable[[Attempt], None] | None = None) -> Packing:
    """Knowledge fusion: train the current adapter on the next domain; if a floor falls, go back and open a new adapter.

    FloorError if a domain alone misses its floor. Source: VaLoRA (EuroSys 2025), accuracy-aware adapter generation.
    """
    trials = Trials(oracle, watch=watch)
    groups = [Group(a, frozenset(a.order)) for a in _fused(trials)]
    trials.reached(groups)
    return trials.packing(groups, proven=len(groups) == 1)


def _fused(trials: Trials, most: int | None = None) -> list[Attempt] | None:
    """The heuristic's adapters. With `most`: None once there would be more, a floor is missed, or the retries run out."""
    closed: list[Attempt] = []
    current: Attempt | None = None
    alone = not trials.oracle.ordered and trials.own_adapters
    for domain in trials.oracle.domains:
        if most is not None and not trials.more():
            return None
        if current is not None:
            following = trials.attempt((*current.order, domain), (current, trials.attempt((domain,))) if alone else ())
            if following.held >= set(following.order):
                current = following
                continue
            closed.append(current)
            if most is not None and len(closed) >= most:
                return None
        if most is not None and not trials.more():
            return None
        current = trials.attempt((domain,))
        if domain not in current.held:
            if most is not None:
                return None
            raise _unreached(trials, {domain})
    return [*closed, current] if current is not None else closed


def _unreached(trials: Trials, domains: Iterable[str]) -> FloorError:
    said = []
    for domain in sorted(domains):
        best = max((a.accuracies[domain] for a in trials.known.values() if domain in a.order), default=float("nan"))
        said.append(f"{domain} (best {best:.3f})")
    return FloorError(f"no adapter reaches the floor of {', '.join(said)}; lower the floor, train longer or add data")


# -- ours ------------------------------------------------------------------------------------------------------------------
def search(oracle: Oracle, retries: int | None = None, watch: Callable[[Attempt], None] | None = None) -> Packing:
    """The fewest adapters found. retries: attempts to spend, after the first packing, on fewer; None: as many as it takes.

    With None the result is the optimum up to EXACT domains, and above it never has more adapters than `fuse_in_order`
    on the same oracle. FloorError if a domain is held by no attempt.
    """
    if len(set(oracle.domains)) != len(oracle.domains) or not oracle.domains:
        raise ValueError(f"the domains {oracle.domains} must be one or more different names")
    trials = Trials(oracle, watch=watch)
    if len(oracle.domains) > EXACT and not oracle.ordered and trials.own_adapters:
        groups, missing = grown(trials), set()
    else:
        groups, missing = _first_packing(trials)
    trials.limit = None if retries is None else len(trials.known) + retries
    if len(oracle.domains) <= EXACT:
        groups, proven = _exact(trials, None if missing else groups)
    else:
        if missing:
            groups = _rescue(trials, groups, missing)
        groups, proven = _improve(trials, groups), False
    return trials.packing(groups, proven or len(groups) == 1)


def _first_packing(trials: Trials) -> tuple[list[Group], set[str]]:
    """A packing by asking for much and keeping what holds, and the domains that nothing held, not even alone."""
    rest, groups, missing = list(trials.oracle.domains), [], set()
    guess = len(rest)
    while rest:
        group = _largest_held(trials, rest, guess)
        if group is None:
            missing.add(rest.pop(0))
            continue
        groups.append(group)
        rest = [domain for domain in rest if domain not in group.serves]
        trials.reached(groups, [*rest, *missing])
        guess = max(2 * len(group.serves), 1)
    return groups, missing


def _largest_held(trials: Trials, rest: list[str], guess: int) -> Group | None:
    """An adapter for many of `rest`: of `guess` domains, then by bisection on how many, members by similarity.

    It stops early where what is left is no more than what is held: one more adapter may take that, and only all of it at
    once would have saved one.
    """
    best: Group | None = None
    low, high = 0, len(rest)
    size = min(guess, high)
    attempt: Attempt | None = None
    while low < high:
        attempt = trials.attempt(_members(trials.oracle, rest, size, attempt))
        held = attempt.held & set(rest)
        if best is None or len(held) > len(best.serves):
            best = Group(attempt, held) if held else best
        low = max(low, len(held))
        high = high if len(held) >= size else min(high, size - 1)
        if low and len(rest) - low <= low:
            break
        size = min(high, max(low + 1, (low + high + 1) // 2))
    return best


def _members(oracle: Oracle, rest: list[str], size: int, last: Attempt | None) -> tuple[str, ...]:
    """`size` of `rest`: those held by the last attempt, or the most typical domain, then always the most similar one."""
    if size == len(rest):
        return tuple(rest)
    chosen = [domain for domain in rest if last is not None and domain in last.held][:size]
    pool = [domain for domain in rest if domain not in chosen]
    while len(chosen) < size:
        against = chosen or pool
        # `max` takes the first of equals: the user's order breaks ties
        nearest = max(pool, key=lambda d: sum(oracle.similarity(d, other) for other in against if other != d))
        chosen.append(nearest)
        pool.remove(nearest)
    return tuple(chosen)


def _rescue(trials: Trials, groups: list[Group], missing: set[str]) -> list[Group]:
    """Domains that are not held alone may be in company: try each beside each group. FloorError if that fails too."""
    for domain in sorted(missing):
        for i, group in enumerate(groups):
            attempt = trials.attempt((*sorted(group.serves), domain))
            if attempt.held >= group.serves | {domain}:
                groups[i] = Group(attempt, group.serves | {domain})
                break
        else:
            raise _unreached(trials, {domain})
    trials.reached(groups)
    return groups


# -- fewer adapters: many domains ------------------------------------------------------------------------------------------
def _improve(trials: Trials, groups: list[Group]) -> list[Group]:
    while len(groups) > 1 and trials.more():
        fewer = _emptied(trials, groups)
        if fewer is None:
            break
        groups = fewer
        trials.reached(groups)
    if len(groups) > 1:
        attempts = _fused(trials, most=len(groups) - 1)
        if attempts is not None:
            groups = [Group(a, frozenset(a.order)) for a in attempts]
            trials.reached(groups)
    return groups


def _emptied(trials: Trials, groups: list[Group]) -> list[Group] | None:
    """The groups without the smallest one, its domains moved to the others whole or one by one; None if some fit nowhere."""
    ranked = sorted(groups, key=lambda g: (len(g.serves), sorted(g.serves)))
    smallest, others = ranked[0], ranked[1:]
    for number, other in enumerate(_by_similarity(trials.oracle, others, smallest.serves)):
        if not trials.more() or number == 2:
            break
        attempt = trials.attempt(_joined(trials.oracle, other.serves, smallest.serves), (other.attempt, smallest.attempt))
        if attempt.held >= other.serves | smallest.serves:
            return [Group(attempt, other.serves | smallest.serves), *(g for g in others if g is not other)]
    for domain in sorted(smallest.serves):
        for other in _by_similarity(trials.oracle, others, {domain}):
            if not trials.more():
                return None
            own = (other.attempt, trials.attempt((domain,))) if domain in trials.oracle.alone else ()
            attempt = trials.attempt(_joined(trials.oracle, other.serves, {domain}), own)
            if attempt.held >= other.serves | {domain}:
                others[others.index(other)] = Group(attempt, other.serves | {domain})
                break
        else:
            return None
    return others


def _by_similarity(oracle: Oracle, groups: list[Group], domains: Iterable[str]) -> list[Group]:
    wanted = sorted(domains)

    def mean(group: Group) -> float:
        return sum(oracle.similarity(a, b) for a in wanted for b in group.serves) / (len(wanted) * len(group.serves))

    return sorted(groups, key=lambda g: (-mean(g), sorted(g.serves)))


def _joined(oracle: Oracle, *parts: Iterable[str]) -> tuple[str, ...]:
    members = {domain for part in parts for domain in part}
    return tuple(domain for domain in oracle.domains if domain in members)


# -- fewer adapters: few domains, exactly ----------------------------------------------------------------------------------
def _exact(trials: Trials, groups: list[Group] | None) -> tuple[list[Group], bool]:
    """The smallest cover, and whether the retries sufficed to prove it."""
    domains = trials.oracle.domains
    most = len(groups) - 1 if groups is not None else len(domains)
    while most >= 1:
        found, exhausted = cover_of(trials, most)
        if found is None:
            if groups is None:
                held = {d for a in trials.known.values() for d in a.held}
                raise _unreached(trials, set(domains) - held or set(domains))
            return groups, exhausted
        groups = [Group(*pair) for pair in found]
        trials.reached(groups)
        most = len(groups) - 1
    assert groups is not None
    return groups, True


def exhaustive(oracle: Oracle) -> Packing:
    """The optimum, by training every set of domains (in every order, if that matters). ValueError above 8 domains."""
    if len(oracle.domains) > MAX_EXHAUSTIVE:
        raise ValueError(f"{len(oracle.domains)} domains: trying everything is for at most {MAX_EXHAUSTIVE}")
    trials = Trials(oracle)
    for size in range(1, len(oracle.domains) + 1):
        for members in combinations(oracle.domains, size):
            for order in permutations(members) if oracle.ordered else (members,):
                trials.attempt(order)
    for most in range(1, len(oracle.domains) + 1):
        found, _ = cover_of(trials, most)
        if found is not None:
            groups = [Group(*pair) for pair in found]
            trials.reached(groups)
            return trials.packing(groups, True)
    held = {d for a in trials.known.values() for d in a.held}
    raise _unreached(trials, set(oracle.domains) - held)
