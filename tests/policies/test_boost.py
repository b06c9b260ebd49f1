"""The GPU's clock under load: what it does to a step, what it forgets while it rests, and that a fit finds it again."""

from math import exp

import numpy as np
import pytest

from policies.boost import VISION_LOAD, GpuClock, factor_at
from policies.cost import PS_PER_US, Cost
from policies.plan import UNMERGED, Work
from policies.profile import Boost

TAU_US, REST_US = 40.0, 10.0
BOOST = Boost(TAU_US, REST_US, [(4.0, 0.9), (32.0, 0.7)], [(4.0, 1.1), (32.0, 1.0)], 0.8, 1.2)
PROMPT = Work(UNMERGED, 0, 0, ((32, 0),), 32, 0, 0, 0, 0, 0, 0, 1)


def test_factors_are_linear_between_sizes_and_constant_beyond():
    assert [factor_at(BOOST.rested, tokens) for tokens in (1, 4, 18, 32, 99)] == pytest.approx([0.9, 0.9, 0.8, 0.7, 0.7])


def test_a_step_after_rest_is_faster_and_many_in_a_row_are_not(tiny_profile):
    cost = Cost(tiny_profile(), "none", "fused", ())
    clock = GpuClock(BOOST)
    table = sum(cost.forward_ps(PROMPT))
    first = clock.extra_ps(cost, PROMPT, 0)
    lasts = table / PS_PER_US / TAU_US
    mean = 1 - (1 - exp(-lasts)) / lasts
    assert first == pytest.approx(table * (0.7 + 0.3 * mean - 1), abs=2)
    now = table + first
    for _ in range(40):
        now += table + clock.extra_ps(cost, PROMPT, now)
    assert clock.extra_ps(cost, PROMPT, now) == pytest.approx(0, abs=table * 1e-4), "settled: as the tables say"
    soon = GpuClock(BOOST)
    soon.ran(0, 99 * TAU_US * PS_PER_US)
    assert soon.state((99 * TAU_US + REST_US) * PS_PER_US) == pytest.approx(exp(-1)), "it rests faster than it settles"
    later = now + round(60 * REST_US * PS_PER_US)
    assert clock.extra_ps(cost, PROMPT, later) == pytest.approx(first, abs=table * 1e-4), "rested again"


def test_the_vision_tower_has_factors_of_its_own_and_heats(tiny_profile):
    cost = Cost(tiny_profile(), "none", "fused", ())
    seen, unseen = GpuClock(BOOST), GpuClock(BOOST)
    with_image = seen.extra_ps(cost, PROMPT._replace(images=1), 0)
    vision = cost.fixed(PROMPT._replace(images=1))[2]
    assert with_image > unseen.extra_ps(cost, PROMPT, 0) - 0.2 * vision, "the prompt comes after it, less rested"


def test_a_branch_keeps_its_time_and_lets_the_clock_rest(tiny_profile):
    cost = Cost(tiny_profile(), "slora", "fused", ())
    work = PROMPT._replace(lora_tokens=32, adapters=1, rank=8, lora_ranks=8)
    hard, rest = cost.forward_ps(work)
    assert (hard, rest) == (sum(cost.forward_ps(PROMPT)), cost.lora_ps(32, 1, 8, "prefill"))
    clock, now = GpuClock(BOOST), 0
    for _ in range(60):
        now += hard + rest + clock.extra_ps(cost, work, now)
    share = hard / (hard + rest)
    assert clock.extra_ps(cost, work, now) == pytest.approx(hard * (0.7 + 0.3 * share - 1), rel=1e-2)


def test_a_step_is_slowed_down_as_long_as_copies_go_on(tiny_profile):
    """A long step beside a short copy pays for the copy's time, not for its own."""
    cost, clock = Cost(tiny_profile(load_slowdown=0.25), "none", "fused", ()), GpuClock(None)
    step = cost.step_ps(PROMPT)
    slow = [clock.slow_ps(cost, PROMPT, 0, left) for left in (9 * step, step, 4_000, 0, -5)]
    assert slow == [round(step / 4), round(step / 4), 1_000, 0, 0]
    beside = GpuClock(BOOST).slow_ps(cost, PROMPT, 0, 4_000)
    assert beside == 1_000 + GpuClock(BOOST).extra_ps(cost, PROMPT, 0), "both"


def test_without_a_word_of_it_tables_hold(tiny_profile):
    assert GpuClock(None).extra_ps(Cost(tiny_profile(), "none", "fused", ()), PROMPT, 0) == 0


def test_a_fit_finds_the_clock_that_made_the_steps():
    fit = pytest.importorskip("engine.profile_boost", exc_type=ImportError)
    rested, settled = [(128.0, 0.95), (512.0, 0.88), (2048.0, 0.83)], [(128.0, 1.09), (512.0, 1.02), (2048.0, 0.98)]
    truth = Boost(64_000.0, 16_000.0, rested, settled, 0.85, 1.1)
    rng, clock, now, steps = np.random.default_rng(0), GpuClock(truth), 0.0, []
    for _ in range(400):
        now += rng.choice([500.0, 500.0, 500.0, 8_000.0, 60_000.0])
        tokens, tower, delayed = int(rng.integers(64, 2048)), float(rng.choice([0.0, 3_000.0])), rng.random() < 0.1
        hard, rest = 4_000.0 + 20.0 * tokens, float(rng.choice([0.0, 1_000.0]))
        tower_us = tower
        if tower:
            mean = clock.mean(now * PS_PER_US, tower * PS_PER_US, VISION_LOAD)
            tower_us *= truth.vision_rested + (truth.vision_settled - truth.vision_rested) * mean
            clock.ran(now * PS_PER_US, tower_us * PS_PER_US, VISION_LOAD)
        start, share = now + tower_us, hard / (hard + rest)
        low, high = (factor_at(points, tokens) for points in (truth.rested, truth.settled))
        took = hard * (low + (high - low) * clock.mean(start * PS_PER_US, (hard + rest) * PS_PER_US, share)) + rest
        took += 9_000.0 if delayed else 0.0
        clock.ran(start * PS_PER_US, took * PS_PER_US, share)
        now = start + took
        fallen = 1.15 if rng.random() < 0.05 else 1.0  # a clock that falls for a moment, which no model here knows
        steps.append(fit.Step(start, took * fallen * rng.normal(1, 0.002), tokens, hard, rest, tower_us, tower, not delayed))
    found, error = fit.fit([steps])
    assert error < 0.02
    assert (found.settle_us, found.rest_us) == (pytest.approx(64_000, rel=0.5), pytest.approx(16_000, rel=0.5))
    for tokens in (300, 1000, 1800):
        assert factor_at(found.rested, tokens) == pytest.approx(factor_at(truth.rested, tokens), abs=0.03)
        assert factor_at(found.settled, tokens) == pytest.approx(factor_at(truth.settled, tokens), abs=0.03)
    assert (found.vision_rested, found.vision_settled) == pytest.approx((0.85, 1.1), abs=0.08)
    assert fit.fit([steps[:20]]) is None, "too few steps to tell"


def test_what_a_table_was_made_of_tells_of_steps_that_no_replay_had():
    fit = pytest.importorskip("engine.profile_boost", exc_type=ImportError)
    small = [fit.Step(2e5 * i, 4_000.0, 128, 4_000.0, 0.0) for i in range(60)]
    large = [fit.Step(2e5 * i, 36_000.0, 2048, 40_000.0, 0.0) for i in range(20)]  # each after a rest
    steady = [fit.Steady(2048, 40_000.0, 20) for _ in range(20)]
    alone, both = (fit.fit([small, large], known)[0] for known in ((), steady))
    assert factor_at(alone.settled, 2048) < 0.97, "nobody saw it settle"
    assert factor_at(both.settled, 2048) == pytest.approx(1.0, abs=0.02), "a table says what its own repeats took"
    assert factor_at(both.rested, 2048) < 0.97
    assert factor_at(both.rested, 128) > 0.99
