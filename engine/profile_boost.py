"""Fits how a GPU's clock settles under prompts (`policies.boost`) to the steps of replays: their times over the tables'.

Each replay is followed step by step, so that it is known how long ago, and for how long, prompts were computed before a
step. The time constant is the one of a grid that leaves the least error; the factors are least squares, linear in the
tokens between a few sizes, and drawn slightly towards 1, which they stay at where nothing was seen. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from policies.boost import GpuClock
from policies.cost import PS_PER_US
from policies.profile import Boost

SIZES = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
TAUS_US = tuple(float(round(1e3 * 2 ** (i / 2))) for i in range(4, 19))
"""4 to 512 ms."""
FEWEST = 60
"""Steps below which nothing is fitted."""
LEAST, MOST = 0.75, 3.0
"""Bounds of a factor. An H200's highest clock is 1,980 MHz; products of matrices at 700 W settle at about 1,500."""
DELAYED = 0.1
"""Relative error from which it does not matter for the time constant how much a step is off."""
TOWARDS_1 = 0.5
"""Weight, in steps, of the guess that a factor is 1."""


class Step(NamedTuple):
    """One step with prompts, times in us: when its forward pass began, how long it took, its rows, and what tables say of
    its products of matrices and of all else; how long the vision tower took before it, and what tables say of that."""

    start_us: float
    took_us: float
    tokens: int
    hard_us: float
    rest_us: float
    tower_us: float = 0.0
    tower_table_us: float = 0.0


def fit(replays: Sequence[Sequence[Step]]) -> tuple[Boost, float] | None:
    """(what the profile says of the clock, mean relative error with it); None where there are too few steps."""
    steps = [step for replay in replays for step in replay]
    if len(steps) < FEWEST:
        return None
    ratios = np.array([(step.took_us - step.rest_us) / step.hard_us for step in steps])
    tokens = np.array([step.tokens for step in steps], float)
    seen = np.array([step.tower_table_us > 0 for step in steps])
    towers = np.array([step.tower_us / step.tower_table_us for step in steps if step.tower_table_us > 0])
    sizes = [size for size in SIZES if size <= tokens.max()] or [SIZES[0]]
    hats = np.stack([np.interp(tokens, sizes, row) for row in np.eye(len(sizes))], 1)
    best = None
    for tau_us in TAUS_US:
        before, during = np.concatenate([_states(replay, tau_us) for replay in replays if replay]).T
        factors, off = _robust(np.hstack([hats * (1 - during)[:, None], hats * during[:, None]]), ratios)
        error = float(np.minimum(off, DELAYED).mean())
        if best is None or error < best[0]:
            tower = _robust(np.stack([1 - before, before], 1)[seen], towers)[0] if seen.any() else np.ones(2)
            best = error, tau_us, factors, tower
    error, tau_us, factors, tower = best
    rested, settled = factors.reshape(2, -1).round(4).tolist()
    pairs = [list(zip(map(float, sizes), values, strict=True)) for values in (rested, settled)]
    return Boost(tau_us, *pairs, *tower.round(4).tolist()), error


def _states(replay: Sequence[Step], tau_us: float) -> np.ndarray:
    """[steps, 2]: the clock's mean state over each step's vision tower, and over its forward pass."""
    clock, found = GpuClock(Boost(tau_us, [(1.0, 1.0)], [(1.0, 1.0)])), []
    for step in replay:
        start, took, tower = (us * PS_PER_US for us in (step.start_us, step.took_us, step.tower_us))
        share = step.hard_us / (step.hard_us + step.rest_us)
        before = clock.mean(start - tower, tower)
        if tower:
            clock.ran(start - tower, tower)
        found.append((before, clock.mean(start, took, share)))
        clock.ran(start, took, share)
    return np.array(found)


def _robust(matrix: np.ndarray, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares without the steps that something else delayed (further off than six median errors), no factor below
    LEAST; each step's error."""
    pull = np.sqrt(TOWARDS_1) * np.eye(matrix.shape[1])
    kept, factors = np.ones(len(ratios), bool), np.ones(matrix.shape[1])
    for _ in range(5):
        left, right = np.vstack([matrix[kept], pull]), np.concatenate([ratios[kept], pull.sum(1)])
        free = np.ones(len(factors), bool)
        while True:
            factors = np.full(len(free), LEAST)
            factors[free] = np.linalg.lstsq(left[:, free], right - left[:, ~free].sum(1) * LEAST, rcond=None)[0]
            if (factors >= LEAST).all():
                break
            free &= factors > LEAST
        off = np.abs(matrix @ factors - ratios)
        kept = off <= 6 * max(float(np.median(off)), 1e-6)
    return np.minimum(factors, MOST), off
