"""What a step costs: a profile's tables, interpolated, in integer picoseconds.

The simulator turns a plan's Work into time with it, and every policy predicts with the same object through `view.cost`, in
simulator and engine alike, so that both decide alike. Integers make a sum over a run of steps exact: jumping equals
stepping to the last digit. It knows no clock and no queue; where the numbers come from stands in the profile.

Tables are piecewise linear and monotone between their points. Below the first point the first value holds; beyond the last
the last slope goes on, and `outside` says of which tables that happened.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

from policies.plan import BASE, MIXTURE, UNMERGED, Work
from policies.profile import LEASE_PARTS, Profile
from traces.request import Adapter

PS_PER_US = 1_000_000

Segments = tuple[list[int], list[int], list[int]]
"""The decode attention's cost in linear pieces: context tokens where each begins (ascending from 0), ps there, ps per
further token."""


class Curve:
    """A piecewise linear function given by points (x ascending, microseconds); evaluates to picoseconds."""

    __slots__ = ("_outside", "name", "xs", "ys")

    def __init__(self, points: list[tuple[float, float]], name: str, outside: set[str]):
        self.xs = [x for x, _ in points]
        self.ys = [y * PS_PER_US for _, y in points]
        self.name = name
        self._outside = outside

    def __call__(self, x: float) -> float:
        if x > self.xs[-1] and len(self.xs) > 1:
            self._outside.add(self.name)
        return self.at(x)

    def at(self, x: float) -> float:
        """The value at x, wherever that lies."""
        xs, ys = self.xs, self.ys
        if x <= xs[0]:
            return ys[0]
        if x >= xs[-1]:
            if len(xs) == 1:
                return ys[0]
            i = len(xs) - 1
        else:
            i = bisect_right(xs, x)
        share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
        return ys[i - 1] + share * (ys[i] - ys[i - 1])


def _between(grid: list[float], x: float) -> tuple[int, int, float]:
    """Indices of the grid's neighbours of x, and the share of the upper one; clamped at both ends."""
    if x <= grid[0]:
        return 0, 0, 0.0
    if x >= grid[-1]:
        return len(grid) - 1, len(grid) - 1, 0.0
    i = bisect_right(grid, x)
    return i - 1, i, (x - grid[i - 1]) / (grid[i] - grid[i - 1])


class Cost:
    """Costs of one model on one GPU with one LoRA operator.

    profile: the tables. operator: whose LoRA kernels run; "none" makes the branch free. switch: which way of folding
    adapters into the weights ("fused", "addmm", "peft"). adapters: for their ranks. policy: who decides, which takes time.
    Raises ProfileError, naming what exists, for an operator or switch that the profile does not have.
    """

    def __init__(self, profile: Profile, operator: str, switch: str, adapters: tuple[Adapter, ...], policy: str = ""):
        self.profile = profile
        self.operator = operator
        self.outside: set[str] = set()
        self._adapters = adapters
        self._linear = self._curve("linear", profile.linear)
        self._prefill_linear = self._linear
        if profile.prefill_linear:
            self._prefill_linear = self._curve("prefill_linear", profile.prefill_linear)
        self._vision = self._curve("vision", profile.vision)
        self._output = self._curve("output", profile.output)
        self._switch = self._curve("switch", profile.named("switch", switch))
        self._attention = {
            n: self._curve("decode_attention", points) for n, points in sorted(profile.decode_attention.items())
        }
        self._mixed_attention = {
            n: self._curve("mixed_attention", points) for n, points in sorted(profile.mixed_attention.items())
        } or self._attention
        self._prefill = {
            context: self._curve("prefill_attention", points)
            for context, points in sorted(profile.prefill_attention.items())
        }
        self._lora: dict[str, dict[int, dict[int, Curve]]] = {}
        if operator != "none":
            for phase, table in profile.named("lora", operator).items():
                self._lora[phase] = {
                    rank: {n: self._curve(f"lora {phase}", points) for n, points in sorted(by_adapters.items())}
                    for rank, by_adapters in sorted(table.items())
                }
        self._padded, self._skew = profile.pads(operator), profile.skew(operator)
        self._host_ps = round(profile.host_step_us * PS_PER_US)
        self._host_request_ps = round(profile.host_request_us * PS_PER_US)
        lease = {part: round(profile.lease_us.get(part, 0) * PS_PER_US) for part in LEASE_PARTS}
        lease["base"] += round(profile.decide_us.get(policy, 0) * PS_PER_US)
        self._lease = tuple(lease.values())
        self.has_host = any(self._lease)  # whether boundaries of leases cost anything
        # Batches repeat; memory stays bounded whatever the trace.
        self.linear_ps = lru_cache(65_536)(lambda tokens: round(self._linear(tokens)))
        self.prefill_linear_ps = lru_cache(65_536)(lambda tokens: round(self._prefill_linear(tokens)))
        self.output_ps = lru_cache(4_096)(lambda rows: round(self._output(rows)))
        self.lora_ps = lru_cache(65_536)(self._lora_ps)
        self._branch = lru_cache(4_096)(self._branch_curve)
        self.prefill_attention_ps = lru_cache(65_536)(self._prefill_attention_ps)
        self.segments = lru_cache(4_096)(self._segments)
        self._decode = lru_cache(65_536)(self._decode_fixed)

    def know(self, adapters: tuple[Adapter, ...]) -> None:
        """These are all adapters from now on; those that were keep their numbers."""
        self._adapters = adapters

    def _curve(self, name: str, points: list[tuple[float, float]]) -> Curve:
        return Curve(points, name, self.outside)

    # -- pieces, in picoseconds -----------------------------------------------------------------------------------------
    def _segments(self, decodes: int, mixed: bool = False) -> Segments:
        """The decode attention of `decodes` requests as a function of their context tokens in all; mixed: beside chunks."""
        table = self._mixed_attention if mixed else self._attention
        grid = list(table)
        low, high, share = _between(grid, decodes)
        below, above = table[grid[low]], table[grid[high]]
        # Beyond the largest measured batch attention is bandwidth-bound, so its cost grows with the batch.
        scale = decodes / grid[-1] if decodes > grid[-1] else 1.0
        if scale > 1:
            self.outside.add("decode_attention batch")
        contexts = sorted({0.0, *below.xs, *above.xs})
        starts = [int(context * decodes) for context in contexts]
        values = [round(scale * (below.at(c) + share * (above.at(c) - below.at(c)))) for c in contexts]
        slopes = [
            (values[i + 1] - values[i]) // max(1, starts[i + 1] - starts[i]) for i in range(len(starts) - 1)
        ]
        return starts, values, [*slopes, slopes[-1] if slopes else 0]

    def _prefill_attention_ps(self, tokens: int, context: int) -> int:
        grid = list(self._prefill)
        low, high, share = _between(grid, context)
        value = self._prefill[grid[low]](tokens)
        if high != low:
            value += share * (self._prefill[grid[high]](tokens) - value)
        elif context > grid[-1]:
            self.outside.add("prefill_attention context")
            value *= (context + tokens / 2) / (grid[-1] + tokens / 2)
        return round(value)

    def _lora_ps(self, tokens: int, adapters: int, rank: float, phase: str) -> int:
        if not tokens or not adapters or not self._lora:
            return 0
        return round(self._branch(adapters, rank, phase)(tokens))

    def _branch_curve(self, adapters: int, rank: float, phase: str) -> Curve:
        """The LoRA branch by tokens, for one number of adapters and one rank: between measured ones, linear in both."""
        table = self._lora[phase]
        ranks = list(table)
        low, high, share = _between(ranks, rank)
        below = self._by_adapters(table[ranks[low]], adapters)
        curve = self._mixed(below, self._by_adapters(table[ranks[high]], adapters), share) if high != low else below
        return self._beyond(curve, rank, ranks[-1], "lora rank")

    def _by_adapters(self, curves: dict[int, Curve], adapters: int) -> Curve:
        grid = list(curves)
        low, high, share = _between(grid, adapters)
        curve = self._mixed(curves[grid[low]], curves[grid[high]], share)
        return self._beyond(curve, adapters, grid[-1], "lora adapters")

    def _mixed(self, low: Curve, high: Curve, share: float) -> Curve:
        """(1 - share) low + share high, again piecewise linear: on the points of both."""
        if low is high or not share:
            return low
        last = min(low.xs[-1], high.xs[-1])  # what lies beyond either is extrapolated, and counted, by the slope up to there
        xs = [x for x in sorted({*low.xs, *high.xs}) if x <= last]
        mixed = Curve([(x, 0.0) for x in xs], low.name, self.outside)
        mixed.ys = [low(x) + share * (high(x) - low(x)) for x in xs]
        return mixed

    def _beyond(self, curve: Curve, x: float, last: float, name: str) -> Curve:
        """`curve` scaled in proportion where x lies beyond the last measured one, and counted."""
        if x <= last:
            return curve
        self.outside.add(name)
        scaled = Curve([(point, 0.0) for point in curve.xs], curve.name, self.outside)
        scaled.ys = [y * x / last for y in curve.ys]
        return scaled

    # -- a step -----------------------------------------------------------------------------------------------------
    def fixed(self, work: Work) -> tuple[int, int, int, int, int, int]:
        """(linear, prefill attention, vision, lora, host, switch) of a first step in ps: all but the decodes' attention.

        The first four and the last are the GPU's and add up; a step takes their sum or, if that is longer, the host's part.
        """
        mode, decodes, _, prefills, prefill_tokens, images, rows, adapters, rank, ranks, switch_rank, outputs, largest = work
        if not prefills and not switch_rank:
            return self._decode(decodes, rows, adapters, rank, ranks, outputs, mode == MIXTURE)
        attention = vision = 0
        for tokens, context in prefills:
            attention += self.prefill_attention_ps(tokens, context)
        if images:
            vision = round(self._vision(images))
        tokens = decodes + prefill_tokens
        linear = self.prefill_linear_ps(tokens) if prefills else self.linear_ps(tokens)
        phase = self._phase(bool(prefills), mode == MIXTURE)
        lora = self._branch_ps(rows, adapters, rank, ranks, phase, largest)
        if lora and phase == "mixture_prefill" and "mixture_few" in self._lora:
            lora = max(lora, self.lora_ps(tokens, 1, rank if self._padded else ranks / adapters, "mixture_few"))
        return (
            linear + self.output_ps(outputs),
            attention,
            vision,
            lora,
            self._host_ps + self._host_request_ps * (decodes + len(prefills)),
            round(self._switch(switch_rank)) if switch_rank else 0,
        )

    def _decode_fixed(self, decodes: int, lora_tokens: int, adapters: int, rank: int, ranks: int, outputs: int,
                      mixture: bool) -> tuple[int, int, int, int, int, int]:
        """`fixed` of a step without prefill and switch; such steps repeat, so it is worth remembering."""
        linear = self.linear_ps(decodes) + self.output_ps(outputs)
        lora = self._branch_ps(lora_tokens, adapters, rank, ranks, self._phase(False, mixture))
        return linear, 0, 0, lora, self._host_ps + self._host_request_ps * decodes, 0

    def _phase(self, prefill: bool, mixture: bool) -> str:
        phase = "prefill" if prefill else "decode"
        return f"mixture_{phase}" if mixture and f"mixture_{phase}" in self._lora else phase

    def _branch_ps(self, rows: int, adapters: int, rank: int, ranks: int, phase: str, largest: int = 0) -> int:
        """The LoRA branch of `rows` rows. Padded operators pay for the largest rank of a batch, the others for the mean.

        Tables are of rows spread evenly over adapters. Where one has twice its share or more, its rows count by themselves
        and the others' beside them, for kernels whose programs take a whole adapter each wait for the largest; in between,
        in proportion. How much of that an operator really takes is measured (`Profile.skew`).
        """
        if not rows:
            return 0
        rank = rank if self._padded else ranks / adapters
        even = self.lora_ps(rows, adapters, rank, phase)
        over = min(largest * adapters - rows, rows)
        if over <= 0:
            return even
        others = self.lora_ps(rows - largest, adapters - 1, rank, phase) - self.lora_ps(1, 1, rank, phase)  # launched once
        apart = self.lora_ps(largest, 1, rank, phase) + max(0, others)
        return even + round(self._skew * (max(0, apart - even) * over // rows))

    def step_ps(self, work: Work, number: int = 0, slow_ps: int = 0) -> int:
        """Time of step `number` of a lease (0 the first, which alone has prefills, images and a switch), without what its
        boundary costs. slow_ps: what the GPU takes longer, because of a copy under way or its clock (`boost`)."""
        linear, attention, vision, lora, host, switch = self.fixed(work)
        gpu = slow_ps + linear + lora + (0 if number else attention + vision + switch)
        if work.decodes:
            context = work.context_tokens + number * work.decodes
            gpu += self.attention_at(work.decodes, context, mixed=bool(work.prefills))
        return max(gpu, host)

    def forward_ps(self, work: Work) -> tuple[int, int]:
        """The decoder's part of a first step, without vision tower, switch and host: (products of matrices, all else)."""
        linear, attention, _, lora, _, _ = self.fixed(work)
        decodes = self.attention_at(work.decodes, work.context_tokens, mixed=bool(work.prefills)) if work.decodes else 0
        return linear + attention, lora + decodes

    def lease_ps(self, work: Work, loads: int, *, idle: bool) -> int:
        """What the host takes at the boundary before a lease, while the GPU waits: to close the books of the last one (or,
        idle, to wake up), to decide, to start `loads` copies of adapters, and to prepare the first step, beside which a
        switch and the vision tower run already."""
        base, load, wake, launch, request, prompts, chunk = self._lease
        before = base + load * loads + (wake if idle else 0)
        prepares = launch + request * work.decodes + (prompts + chunk * len(work.prefills) if work.prefills else 0)
        if work.images:
            prepares -= round(self._vision(work.images))
        if work.switch_rank:
            prepares -= round(self._switch(work.switch_rank))
        return before + max(0, prepares)

    # -- what policies ask --------------------------------------------------------------------------------------------
    def step_ns(self, decodes: int, adapters: int = 1, *, context: int = 1000, mode: int = BASE, cold: int = -1) -> int:
        """Predicted time of one decode step of `decodes` requests with `context` tokens each and `adapters` adapters.

        cold: requests that do not ask for the folded adapter, in mixture mode; all of them if it is not given.
        """
        if decodes < 1:
            return 0
        ranks = self._adapters[0].rank if self._adapters else 0
        rows = decodes if mode == UNMERGED else 2 * (decodes if cold < 0 else cold) if mode == MIXTURE else 0
        work = Work(mode, decodes, decodes * context, (), 0, 0, rows, adapters, ranks, ranks * adapters, 0, decodes)
        return self.step_ps(work) // 1000

    def attention_at(self, decodes: int, context_tokens: int, mixed: bool = False) -> int:
        """Decode attention in ps at one point; mixed: in a step that has chunks of prompts, too."""
        starts, values, slopes = self.segments(decodes, mixed)
        at = bisect_right(starts, context_tokens) - 1
        self.note_context(starts, context_tokens, mixed=mixed)
        return values[at] + slopes[at] * (context_tokens - starts[at])

    def note_context(self, starts: list[int], context_tokens: int, *, mixed: bool = False) -> None:
        """Remember that decodes of `context_tokens` in all lie beyond the last of `segments`' starts, if they do."""
        if context_tokens > starts[-1]:
            self.outside.add("mixed_attention" if mixed else "decode_attention")

    def prefill_ns(self, tokens: int, images: int = 0) -> int:
        """Predicted time of a prefill of `tokens` tokens alone, without LoRA."""
        vision = round(self._vision(images)) if images else 0
        gpu = self.prefill_linear_ps(tokens) + self.prefill_attention_ps(tokens, 0) + vision
        return max(gpu, self._host_ps + self._host_request_ps) // 1000

    def switch_ns(self, adapter: int) -> int:
        """Time to fold `adapter` into the weights, or to take it out."""
        return round(self._switch(self._adapters[adapter].rank)) // 1000

    def adapter_bytes(self, adapter: int) -> int:
        """Bytes of `adapter`'s factors."""
        return self.profile.adapter_bytes(self._adapters[adapter].rank)

    def load_ns(self, adapter: int) -> int:
        """Time of the copy of `adapter` from pinned host memory, alone on the link."""
        return self.copy_ns(self._adapters[adapter].rank)

    def copy_ns(self, rank: int) -> int:
        """`load_ns` of an adapter of `rank`."""
        return round(self.profile.load_latency_us * 1000 + self.profile.adapter_bytes(rank) / self.profile.load_gb_per_s)
