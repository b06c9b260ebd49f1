"""Fits how a GPU's clock settles under prompts (`policies.boost`) to the steps of replays: their times over the tables'.

Each replay is followed step by step, so that it is known how long ago, and for how long, prompts were computed before a
step. The time constants are those of a grid that leave the least error. The factors are linear in the tokens between a few
sizes, and leave the least absolute error of the steps and of what the tables' own rows tell, which are of the same step over
and over: squares would follow the few steps that a clock falls in for a moment, as it does after a second under load. How
much a step slows down from rested to settled may change but little from one size to the next, and to the vision tower. It
measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from policies.boost import VISION_LOAD, GpuClock
from policies.cost import PS_PER_US
from policies.profile import Boost

SIZES = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
SETTLE_US, REST_US = (tuple(float(round(1e3 * 2 ** (i / 2))) for i in steps) for steps in (range(8, 17), range(4, 12)))
"""16 to 256 ms, 4 to 45 ms."""
FEWEST = 60
"""Steps below which nothing is fitted."""
LEAST, MOST = 0.75, 3.0
"""Bounds of a factor. An H200's highest clock is 1,980 MHz; products of matrices at 700 W settle at about 1,500."""
DELAYED = 0.1
"""Relative error from which it does not matter for the time constants how much a step is off."""
TOWARDS_1, SMOOTH = 0.5, 100.0
"""Weights, in steps, of the guesses that a factor is 1, and that two neighbouring sizes slow down alike. (Each left out in
turn, the replays of three models were best predicted with 100 and more.)"""
ROUNDS = 8
REPEATS = 0.005
"""Relative error of repeats, below which a step counts in full."""


class Step(NamedTuple):
    """One step with prompts, times in us: when its forward pass began, how long it took, its rows, and what tables say of
    its products of matrices and of all else; how long the vision tower took before it, and what tables say of that. alone:
    False where something else delayed it, a copy say; then it tells nothing but that the GPU was busy."""

    start_us: float
    took_us: float
    tokens: int
    hard_us: float
    rest_us: float
    tower_us: float = 0.0
    tower_table_us: float = 0.0
    alone: bool = True


class Steady(NamedTuple):
    """What a table says of steps of so many rows: their time in the middle of `times` of them, behind a rest."""

    tokens: int
    us: float
    times: int


Way = tuple[float, float]
"""settle_us and rest_us of a Boost."""


def fit(replays: Sequence[Sequence[Step]], steady: Sequence[Steady] = ()) -> tuple[Boost, float] | None:
    """(what the profile says of the clock, mean relative error with it); None where there are too few steps."""
    steps = [step for replay in replays for step in replay]
    if sum(step.alone for step in steps) < FEWEST:
        return None
    top = max(step.tokens for step in steps)
    sizes = [size for size in SIZES if size <= top] or [SIZES[0]]
    best = None
    for way in product(SETTLE_US, REST_US):
        factors, off = _least(*_observed(replays, way, sizes), *_prior(steady, way, sizes))
        error = float(np.minimum(off, DELAYED).mean())
        if best is None or error < best[0]:
            best = error, way, factors
    error, way, factors = best
    *found, tower_rested, tower_settled = np.clip(factors, LEAST, MOST).round(4).tolist()
    pairs = [list(zip(map(float, sizes), part, strict=True)) for part in (found[: len(sizes)], found[len(sizes) :])]
    return Boost(*way, *pairs, tower_rested, tower_settled), error


def _least(matrix: np.ndarray, ratios: np.ndarray, prior: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(factors, each step's error): least squares, in which a step further off than the median weighs in proportion less."""
    weights = np.ones(len(ratios))
    for _ in range(ROUNDS):
        left, right = np.vstack([matrix * weights[:, None], prior]), np.concatenate([ratios * weights, wanted])
        factors = np.linalg.lstsq(left, right, rcond=None)[0]
        off = np.abs(matrix @ factors - ratios)
        weights = np.sqrt(np.minimum(1.0, max(float(np.median(off)), REPEATS) / np.maximum(off, 1e-12)))
    return factors, off


def _clock(way: Way) -> GpuClock:
    return GpuClock(Boost(*way, [(1.0, 1.0)], [(1.0, 1.0)]))


def _hats(tokens: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    return np.stack([np.interp(tokens, sizes, row) for row in np.eye(len(sizes))], 1)


def _rows(tokens: Sequence[float], states: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Forward passes as equations of the factors (rested by size, settled by size, the tower's two)."""
    hats = _hats(tokens, sizes)
    return np.hstack([hats * (1 - states)[:, None], hats * states[:, None], np.zeros((len(hats), 2))])


def _observed(replays: Sequence[Sequence[Step]], way: Way, sizes: Sequence[int]
              ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(equations, their sides) of all steps that were alone: of the forward passes, and of the vision towers before them."""
    steps = [step for replay in replays for step in replay]
    alone = np.array([step.alone for step in steps])
    before, during = np.concatenate([_states(replay, way) for replay in replays if replay])[alone].T
    steps = [step for step in steps if step.alone]
    seen = np.array([step.tower_table_us > 0 for step in steps])
    forward = _rows([step.tokens for step in steps], during, sizes)
    towers = np.zeros((int(seen.sum()), forward.shape[1]))
    towers[:, -2], towers[:, -1] = 1 - before[seen], before[seen]
    ratios = [(step.took_us - step.rest_us) / step.hard_us for step in steps]
    ratios += [step.tower_us / step.tower_table_us for step in steps if step.tower_table_us > 0]
    return np.vstack([forward, towers]), np.array(ratios)


def _states(replay: Sequence[Step], way: Way) -> np.ndarray:
    """[steps, 2]: the clock's mean state over each step's vision tower, and over its forward pass."""
    clock, found = _clock(way), []
    for step in replay:
        start, took, tower = (us * PS_PER_US for us in (step.start_us, step.took_us, step.tower_us))
        share = step.hard_us / (step.hard_us + step.rest_us)
        before = clock.mean(start - tower, tower, VISION_LOAD)
        if tower:
            clock.ran(start - tower, tower, VISION_LOAD)
        found.append((before, clock.mean(start, took, share)))
        clock.ran(start, took, share)
    return np.array(found)


def _prior(steady: Sequence[Steady], way: Way, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What is known or guessed of the factors before any replay, as weighted equations and their sides."""
    count = len(sizes)
    pull = np.sqrt(TOWARDS_1) * np.eye(2 * count + 2)
    slows = np.zeros((count + 1, 2 * count + 2))  # settled less rested, size by size, then the tower's
    for i in range(count):
        slows[i, i], slows[i, count + i] = -1, 1
    slows[count, -2:] = -1, 1
    same = np.sqrt(SMOOTH) * np.diff(slows, axis=0)
    left, right = [pull, same], [pull.sum(1), np.zeros(count)]
    if steady:
        states = []
        for row in steady:
            clock, us = _clock(way), row.us * PS_PER_US
            middle = row.times // 2 * us
            clock.ran(0, middle)
            states.append(clock.mean(middle, us))
        left.append(_rows([row.tokens for row in steady], np.array(states), sizes))
        right.append(np.ones(len(steady)))  # a table is what its rows took
    return np.vstack(left), np.concatenate(right)
