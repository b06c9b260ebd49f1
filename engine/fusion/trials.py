"""What a search over packings knows: attempts, groups, packings, and all that has been tried so far.

An `Oracle` trains one adapter on a list of domains and says which of them it holds above their floor; `engine.fusion.search`
and `engine.fusion.grow` decide what to ask. It knows names, floors met and steps spent; no torch, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class FloorError(ValueError):
    """A floor that no attempt reached. The message names the domain, the best accuracy seen and the way out."""


@dataclass(frozen=True)
class Attempt:
    """One training: the domains in order, the accuracy of each afterwards, those held above their floor, its own steps.

    steps: optimizer steps that this attempt cost beyond what was trained before (an attempt known already costs 0).
    milestones: (steps, domains held) where it could have been stopped with more of them held than before.
    """

    order: tuple[str, ...]
    accuracies: Mapping[str, float]
    held: frozenset[str]
    steps: int
    milestones: tuple[tuple[int, frozenset[str]], ...] = ()


class Oracle(Protocol):
    """Trains and evaluates. `attempt` is a function of its arguments, and asked for the same order once.

    parts: orders attempted before, from whose adapters it may start; none: as the oracle sees fit.
    domains: in the user's order. ordered: False if the result of a set of domains does not depend on their order.
    alone: domains whose own adapters are there already and hold, so that to ask for one costs no step.
    similarity(a, b): a cheap signal of how well two domains get along, higher is better; any scale.
    """

    domains: tuple[str, ...]
    ordered: bool
    alone: frozenset[str]

    def attempt(self, order: tuple[str, ...], parts: tuple[tuple[str, ...], ...] = ()) -> Attempt: ...

    def similarity(self, a: str, b: str) -> float: ...


@dataclass(frozen=True)
class Group:
    """One adapter: the attempt that made it, and the domains it serves (all held)."""

    attempt: Attempt
    serves: frozenset[str]


@dataclass(frozen=True)
class Packing:
    """The adapters of all domains, and what finding them cost.

    steps and attempts: spent in all. steps_to: number of adapters -> steps spent when a packing that small was first known.
    proven: no packing has fewer adapters (of those that this oracle can train).
    """

    groups: tuple[Group, ...]
    steps: int
    attempts: int
    steps_to: Mapping[int, int]
    proven: bool

    def __len__(self) -> int:
        return len(self.groups)

    def first_steps(self, adapters: int) -> int:
        """Steps spent until a packing of at most `adapters` adapters was known. ValueError if there was none."""
        known = [steps for size, steps in self.steps_to.items() if size <= adapters]
        if not known:
            raise ValueError(f"no packing of {adapters} adapters was found; the smallest has {len(self)}")
        return min(known)


@dataclass
class Trials:
    """What has been trained so far. `limit`: the number of attempts after which `more` says no."""

    oracle: Oracle
    known: dict[tuple[str, ...], Attempt] = field(default_factory=dict)
    steps: int = 0
    steps_to: dict[int, int] = field(default_factory=dict)
    limit: int | None = None
    watch: Callable[[Attempt], None] | None = None

    @property
    def own_adapters(self) -> bool:
        """True where every domain's own adapter is there already."""
        return self.oracle.alone >= set(self.oracle.domains)

    def key(self, order: Iterable[str]) -> tuple[str, ...]:
        order = tuple(order)
        return order if self.oracle.ordered else tuple(d for d in self.oracle.domains if d in set(order))

    def attempt(self, order: Iterable[str], parts: Iterable[Attempt] = ()) -> Attempt:
        key = self.key(order)
        if key not in self.known:
            made = self.oracle.attempt(key, tuple(part.order for part in parts))
            if not self.known:  # nothing is packed yet: what is not held has its own adapter, or none
                for steps, held in made.milestones:
                    self.reached_by(1, set(self.oracle.domains) - held, steps)
            self.known[key] = made
            self.steps += made.steps
            if self.watch is not None:
                self.watch(made)
        return self.known[key]

    def more(self) -> bool:
        return self.limit is None or len(self.known) < self.limit

    def reached(self, groups: list[Group], rest: Iterable[str] = ()) -> None:
        """A packing is known: of these groups, and an own adapter for each of the rest."""
        self.reached_by(len(groups), set(rest), self.steps)

    def reached_by(self, groups: int, rest: set[str], steps: int) -> None:
        if self.oracle.alone >= rest:
            self.steps_to.setdefault(groups + len(rest), steps)

    def packing(self, groups: Iterable[Group], proven: bool) -> Packing:
        return Packing(tuple(groups), self.steps, len(self.known), dict(self.steps_to), proven)
