"""Turns a plan's work into time: one step, or a whole run of decode steps in closed form.

Within a run only the decodes' context grows, by one token a request and step, so the time of a step is linear in its index
between two points of the attention table and the sum is an arithmetic series, in integer picoseconds: jumping k steps gives
exactly what k single steps give. A step takes the GPU's time or, if that is longer, the host's. It knows nothing of queues
and policies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from policies.cost import Cost
from policies.plan import Work

FOREVER_PS = 1 << 62


@dataclass(slots=True)
class Run:
    """A modelled run of steps, in picoseconds. parts: (linear, attention, vision, lora, host, switch); they sum to total_ps.

    first_ps: until the first step's end, the boundary included. last_ps: duration of the last step. pieces: (when its first
    step begins, that step's duration, growth per step, steps) for the steps behind the first.
    """

    steps: int
    first_ps: int
    last_ps: int
    total_ps: int
    parts: tuple[int, int, int, int, int, int]
    pieces: Sequence[tuple[int, int, int, int]]


def run(cost: Cost, work: Work, max_steps: int, until_ps: int, boundary_ps: int = 0, slow_ps: int = 0,
        ahead: int = 0) -> Run:
    """Run `work` until the first step boundary at or after `until_ps` from now, at least one and at most max_steps steps.

    boundary_ps: the host's time before the first step. slow_ps: added to every step's linear part, because something else
    uses the memory, or the clock is not what it was when tables were measured (then it may be below 0). ahead: steps that
    follow that boundary, because they were under way when it was reached.
    """
    linear, attention, vision, lora, floor, switch = cost.fixed(work)
    linear += slow_ps
    decodes = work.decodes
    if work.prefills or not decodes:
        if decodes:
            attention += cost.attention_at(decodes, work.context_tokens, mixed=True)
        return _single(linear, attention, vision, lora, floor, switch, boundary_ps)
    starts, values, slopes = cost.segments(decodes)
    context = work.context_tokens
    at = bisect_right(starts, context) - 1
    decode_attention = values[at] + slopes[at] * (context - starts[at])
    steady = linear + lora  # what every step of the run repeats, beside its attention
    gpu = steady + decode_attention + switch
    last = gpu if gpu > floor else floor
    first = boundary_ps + last
    if max_steps == 1 or (first >= until_ps and not ahead):
        cost.note_context(starts, context)
        return Run(1, first, last, first, (linear, decode_attention, 0, lora, first - gpu, switch), ())
    steps, total, pieces, end = 1, first, [], len(starts) - 1
    host = first - gpu  # what is neither of the GPU's
    context += decodes
    while steps < max_steps:
        most, wanted = max_steps - steps, until_ps - total
        if wanted <= 0:
            if not ahead:
                break
            most, wanted = min(most, ahead), FOREVER_PS
        while at < end and starts[at + 1] <= context:
            at += 1
        step = gpu = steady + values[at] + slopes[at] * (context - starts[at])
        growth = gpu_growth = slopes[at] * decodes
        if at < end and (piece := -((context - starts[at + 1]) // decodes)) < most:
            most = piece
        if step < floor:  # the host sets the pace, until the context has grown
            most = min(most, -(-(floor - step) // growth)) if growth > 0 else most
            step, growth = floor, 0
        elif growth < 0:
            most = min(most, (step - floor) // -growth + 1)
        count = _steps_until(step, growth, wanted, most)
        if wanted == FOREVER_PS:
            ahead -= count
        triangle = count * (count - 1) // 2
        pieces.append((total, step, growth, count))
        total += count * step + growth * triangle
        if step > gpu:
            host += count * (step - gpu) + (growth - gpu_growth) * triangle
        last = step + growth * (count - 1)
        steps += count
        context += decodes * count
    cost.note_context(starts, context - decodes)
    parts = (steps * linear, total - host - switch - steps * steady, 0, steps * lora, host, switch)
    return Run(steps, first, last, total, parts, pieces)


def _single(linear: int, attention: int, vision: int, lora: int, floor: int, switch: int, boundary_ps: int) -> Run:
    """The one step of a lease with prompts, of the parts that `Cost.fixed` tells and its decodes' attention."""
    gpu = linear + attention + vision + lora + switch
    if linear < 0:  # the vision tower was faster by more than the rest takes
        linear, vision = 0, vision + linear
    step = max(gpu, floor)
    total = boundary_ps + step
    return Run(1, total, step, total, (linear, attention, vision, lora, total - gpu, switch), ())


def _steps_until(step: int, growth: int, wanted: int, most: int) -> int:
    """The fewest steps (1..most) of durations step, step + growth, ... that sum to at least `wanted`, or `most`."""
    if most * step + growth * (most * (most - 1) // 2) <= wanted:
        return most
    if not growth:
        return -(-wanted // step)
    # The smallest k with growth k^2 + b k >= 2 wanted. The root is rounded to the side on which the integers decide alike.
    b = 2 * step - growth
    square = b * b + 8 * growth * wanted
    if growth > 0:
        return -((b - 1 - isqrt(square - 1)) // (2 * growth))
    return -((isqrt(square) - b) // (-2 * growth))
