"""Turns a plan's work into time: one step, or a whole run of decode steps in closed form.

Within a run only the decodes' context grows, by one token a request and step, so the time of a step is linear in its index
between two points of the attention table and the sum is an arithmetic series, in integer picoseconds: jumping k steps gives
exactly what k single steps give. It knows nothing of queues and policies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from policies.cost import Cost
from policies.plan import Work


class Run(NamedTuple):
    """A modelled run of steps, in picoseconds. parts: (linear, attention, vision, lora, host, switch); they sum to total_ps.

    pieces: (duration of its first step, growth per step, steps) for the steps behind the first.
    """

    steps: int
    first_ps: int
    total_ps: int
    parts: tuple[int, int, int, int, int, int]
    pieces: Sequence[tuple[int, int, int]]


def run(cost: Cost, work: Work, max_steps: int, until_ps: int) -> Run:
    """Run `work` until the first step boundary at or after `until_ps` from now, at least one and at most max_steps steps."""
    linear, attention, vision, lora, host, switch = cost.fixed(work)
    decodes = work.decodes
    if not decodes:
        total = linear + attention + vision + lora + host + switch
        return Run(1, total, total, (linear, attention, vision, lora, host, switch), ())
    starts, values, slopes = cost.segments(decodes)
    context = work.context_tokens
    at = bisect_right(starts, context) - 1
    decode_attention = values[at] + slopes[at] * (context - starts[at])
    steady = linear + lora + host  # what every step of the run repeats, beside its attention
    first = steady + attention + decode_attention + vision + switch
    if max_steps == 1 or first >= until_ps:
        return Run(1, first, first, (linear, attention + decode_attention, vision, lora, host, switch), ())
    steps, total, pieces, last = 1, first, [], len(starts) - 1
    context += decodes
    while steps < max_steps and total < until_ps:
        while at < last and starts[at + 1] <= context:
            at += 1
        step = steady + values[at] + slopes[at] * (context - starts[at])
        growth = slopes[at] * decodes
        most = max_steps - steps
        if at < last:
            most = min(most, -(-(starts[at + 1] - context) // decodes))
        count = _steps_until(step, growth, until_ps - total, most)
        pieces.append((step, growth, count))
        total += count * step + growth * (count * (count - 1) // 2)
        steps += count
        context += decodes * count
    parts = (steps * linear, total - vision - switch - steps * steady, vision, steps * lora, steps * host, switch)
    return Run(steps, first, total, parts, pieces)


def _steps_until(step: int, growth: int, wanted: int, most: int) -> int:
    """The fewest steps (1..most) of durations step, step + growth, ... that sum to at least `wanted`, or `most`."""
    if most * step + growth * (most * (most - 1) // 2) <= wanted:
        return most
    if growth:
        # growth/2 k^2 + (step - growth/2) k = wanted, solved in integers and then put right by at most a step or two
        b = 2 * step - growth
        count = (isqrt(b * b + 8 * growth * wanted) - b) // (2 * growth)
    else:
        count = wanted // step
    count = min(max(count, 1), most)
    while count > 1 and (count - 1) * step + growth * ((count - 1) * (count - 2) // 2) >= wanted:
        count -= 1
    while count < most and count * step + growth * (count * (count - 1) // 2) < wanted:
        count += 1
    return count
