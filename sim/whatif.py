"""`python -m sim whatif`: how many adapters fit beside how much KV, what a cold start costs, and which adapters to merge.

Answers in plain words, computed from the profile and the trace's own mix of adapters; nothing is simulated, so queues and
bursts are not in them: `python -m sim` answers for those. Options are those of `python -m sim` that say what is served.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from policies.cost import Cost
from policies.profile import Profile
from sim.__main__ import build_parser as simulator_parser
from sim.experiment import OUTPUT_OPTIONS, check, policy_of, profile_of, trace_of
from traces.options import SuggestingParser
from traces.request import Trace

GIB, MIB = 2**30, 2**20
MOST_NAMED = 5
"""Adapters that the answer about merging names."""
MOST_REUSES = 200_000
RUN_OPTIONS = ("gpus", "router", "pin", "closed_loop", "drain")
"""Options that say how a simulation goes, of which nothing here depends."""


class Mix(NamedTuple):
    """How a trace asks for adapters. shares: of the requests that ask for one, by adapter index; adapters: those asked for,
    the busiest first; base: share of the requests that ask for none."""

    shares: np.ndarray
    order: list[int]
    base: float


def mix_of(trace: Trace) -> Mix:
    """The mix of a trace."""
    asked = trace.adapter[trace.adapter >= 0]
    counts = np.bincount(asked, minlength=len(trace.adapters)).astype(float)
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return Mix(counts / max(1.0, counts.sum()), order, 1 - len(asked) / len(trace))


def cold_shares(trace: Trace, places: Sequence[int]) -> list[float]:
    """Share of the requests with an adapter that find it absent, for each number of adapters that stay (least recently used
    leaves first), counting each adapter's first use. From the reuse distances of the trace's first MOST_REUSES requests."""
    recent: list[int] = []
    distances = []
    for adapter in trace.adapter[trace.adapter >= 0][:MOST_REUSES].tolist():
        if adapter in recent:
            place = recent.index(adapter)
            distances.append(place)
            del recent[place]
        else:
            distances.append(math.inf)
        recent.insert(0, adapter)
    reuse = np.array(distances)
    return [float((reuse >= count).mean()) if len(reuse) else 0.0 for count in places]


def branch_us(cost: Cost, rows: float, adapters: float, rank: float) -> float:
    """The LoRA branch of one decode step, in us."""
    rows, adapters = math.ceil(rows), max(1, round(adapters))
    return cost.lora_ps(rows, min(adapters, rows), rank, "decode") / 1e6 if rows else 0.0


class Merging(NamedTuple):
    """What folding one adapter in does to a full decode batch of the trace's mix, in us a step."""

    unmerged_us: float
    mixture_us: float
    own: float  # requests of the batch that ask for it


def merging(cost: Cost, mix: Mix, shares: np.ndarray, adapter: int, batch: int, rank: float) -> Merging:
    """The branch of `batch` requests drawn from the mix: everybody on his own adapter, or `adapter` folded in and the
    others going through the branch twice."""
    present = 1 - (1 - shares) ** batch  # chance that an adapter is in the batch
    lora = batch * (1 - mix.base)
    cold = batch - lora * shares[adapter]
    others = present.sum() - present[adapter]
    unmerged = branch_us(cost, lora, present.sum(), rank)
    # A cold row goes through its own adapter and through the folded one to take it out; the base model's only the latter.
    mixture = branch_us(cost, 2 * cold - batch * mix.base, others + (cold >= 0.5), rank)
    return Merging(unmerged, mixture, lora * shares[adapter])


def memory_words(trace: Trace, profile: Profile, args: argparse.Namespace, merges: bool) -> list[str]:
    """How many adapters fit beside how much KV, in one pool or, with --adapter-memory, each in its own."""
    pool = int(profile.pool_bytes(golden=merges) * args.memory_share)
    room = None if args.adapter_memory is None else int(args.adapter_memory * GIB)
    if room is not None and room >= pool:
        raise ValueError(f"--adapter-memory {args.adapter_memory:g}: the memory for KV and adapters is {pool / GIB:.1f} GiB")
    page = args.page_tokens * profile.kv_bytes_per_token
    sizes = [-(-profile.adapter_bytes(adapter.rank) // page) * page for adapter in trace.adapters]
    tokens = (trace.prompt_tokens + trace.output_tokens).astype(float)
    words = [
        f"The pool for KV and adapters is {pool / GIB:.1f} GiB: of the device's {profile.device_bytes / GIB:.1f} GiB, the "
        f"weights take {profile.weights_bytes / GIB:.1f}, activations and graphs {profile.reserve_bytes / GIB:.1f}"
        + (f", the pristine copy that merging needs {profile.golden_bytes / GIB:.1f}" if merges else "")
        + (f"; of the rest {args.memory_share:.0%} is used." if args.memory_share < 1 else ".")
        + (f" Of it {room / GIB:.1f} GiB hold adapters and nothing else (--adapter-memory)." if room is not None else ""),
    ]
    if not sizes:
        return [*words, "The trace asks for no adapter."]
    mean, total, holds = sum(sizes) / len(sizes), sum(sizes), pool if room is None else room
    words.append(
        f"An adapter takes {mean / MIB:.0f} MiB on average, as much as the KV of {mean / profile.kv_bytes_per_token:.0f} "
        f"tokens; the {len(sizes)} of the trace take {total / GIB:.2f} GiB, {100 * total / holds:.1f} % of the "
        f"{'pool. Without any KV' if room is None else 'memory of adapters, in which'} {int(holds // mean):,} would fit."
    )
    for name, size in (("mean", float(tokens.mean())), ("P99", float(np.percentile(tokens, 99)))):
        need = math.ceil(size / args.page_tokens) * page
        length = f"Requests of {name} length ({size:.0f} tokens, {need / MIB:.0f} MiB of KV): "
        if room is not None:
            words.append(f"{length}{(pool - room) // need:,} of them fit in the memory of KV.")
            continue
        beside = (pool - args.max_batch * need) // mean
        whole = int((pool - total) // need) if total < pool else 0
        words.append(
            f"{length}beside a full batch of "
            f"{args.max_batch} of them " + (f"{int(beside):,} adapters fit" if beside >= 1 else "no adapter fits")
            + f"; beside all {len(sizes)} adapters {whole:,} such requests fit."
        )
    return words


def cold_words(trace: Trace, profile: Profile, cost: Cost) -> list[str]:
    """What a cold start costs, and how often the trace would meet one."""
    if not trace.adapters:
        return []
    times = [cost.load_ns(i) / 1e6 for i in range(len(trace.adapters))]
    step_ms = cost.step_ns(32, 4) / 1e6
    prefill_ms = cost.prefill_ns(int(trace.prompt_tokens.mean()), round(float(trace.images.mean()))) / 1e6
    count = len(trace.adapters)
    spread = f"{times[0]:.2f} ms" if max(times) == min(times) else f"{min(times):.2f} to {max(times):.2f} ms"
    words = [
        f"Copying an adapter from host memory takes {spread} at {profile.load_gb_per_s:g} GB/s, alone on the link: "
        f"{np.mean(times) / step_ms:.2f} decode steps of 32 requests ({step_ms:.1f} ms each), or "
        f"{100 * np.mean(times) / prefill_ms:.0f} % of the mean request's prefill ({prefill_ms:.1f} ms). A request that "
        "waits longer than that in the queue never notices it if its adapter is prefetched."
    ]
    places = sorted({max(1, count // 8), max(1, count // 4), max(1, count // 2), count})
    said = ", ".join(f"{n} stay: {100 * cold:.1f} %" for n, cold in zip(places, cold_shares(trace, places), strict=True))
    words.append(f"Requests that find their adapter absent, least recently used leaves first: {said}.")
    return words


def merge_words(trace: Trace, cost: Cost, args: argparse.Namespace) -> list[str]:
    """Which adapters to fold into the weights, and when it pays."""
    mix = mix_of(trace)
    if not mix.order:
        return []
    rank = float(np.dot(mix.shares, [adapter.rank for adapter in trace.adapters]))
    batch, context = args.max_batch, int(np.mean(trace.prompt_tokens + trace.output_tokens / 2))
    step_us = cost.step_ns(batch, context=context) / 1e3
    alone_us = branch_us(cost, batch, 1, rank)
    if not alone_us:
        return [f"Nothing to gain: with operator {cost.operator} no step pays for a LoRA branch."]
    switch_us = cost.switch_ns(mix.order[0]) / 1e3
    steps = math.ceil(switch_us / alone_us), math.ceil(2 * switch_us / alone_us)
    words = [
        f"In a full decode batch of {batch} ({step_us / 1e3:.1f} ms without LoRA at {context} tokens of context), the LoRA "
        f"branch of operator {cost.operator} costs {alone_us / 1e3:.2f} ms if all ask for one adapter. Folding it in costs "
        f"{switch_us / 1e3:.2f} ms and is paid back after {steps[0]} such steps; with taking it out again after {steps[1]}."
    ]
    worth = []
    for adapter in mix.order[:MOST_NAMED]:
        found = merging(cost, mix, mix.shares, adapter, batch, rank)
        saved = found.unmerged_us - found.mixture_us
        name = f"{trace.adapters[adapter].name} ({100 * mix.shares[adapter]:.0f} % of the requests with an adapter)"
        if saved > 0:
            worth.append(name)
            steps = math.ceil(2 * switch_us / saved)
            words.append(
                f"{name}: merge it. With the others in the same batch (mixture) a step's branch takes "
                f"{found.mixture_us / 1e3:.2f} instead of {found.unmerged_us / 1e3:.2f} ms; in and out is paid back after "
                f"{steps} steps, {steps * (step_us + found.mixture_us) / 1e6:.2f} s."
            )
        elif adapter == mix.order[0]:
            words.append(
                f"{name}: do not mix it with the others: a step's branch would take {found.mixture_us / 1e3:.2f} instead "
                f"of {found.unmerged_us / 1e3:.2f} ms. Merge it only while its own requests alone fill the batch; on "
                f"average they are {found.own:.0f} of {batch}."
            )
    if len(mix.order) > 1:
        share = _break_even(cost, mix, batch, rank)
        said = "never, however many ask for one adapter" if share is None else (
            f"from a share of {share:.0%} for the folded adapter on, the others keeping their proportions")  # fmt: skip
        words.append(f"Mixture beats unmerged {said}.")
    return words if worth else [*words, "So no adapter of this mix is worth folding in for mixed batches."]


def _break_even(cost: Cost, mix: Mix, batch: int, rank: float) -> float | None:
    """The smallest share, in whole percents, from which on the busiest adapter is worth folding in for mixed batches."""
    top = mix.order[0]
    rest = 1 - mix.shares[top]
    lowest = None
    for percent in range(99, 0, -1):
        shares = mix.shares * ((1 - percent / 100) / rest if rest else 0.0)
        shares[top] = percent / 100
        found = merging(cost, mix, shares, top, batch, rank)
        if found.mixture_us >= found.unmerged_us:
            break
        lowest = percent / 100
    return lowest


def answer(args: argparse.Namespace) -> str:
    """The whole text. Raises ValueError or OSError for bad input."""
    for name in OUTPUT_OPTIONS:
        if name != "progress" and getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for simulations; leave it out")
    for name in RUN_OPTIONS:
        if getattr(args, name) != build_parser().get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} changes nothing here, where nothing is simulated; leave it out")
    check(args)
    profile, trace = profile_of(args), trace_of(args)
    policy = policy_of(args)
    operator = args.operator or policy.operator
    cost = Cost(profile, operator, policy.switch, trace.adapters)
    kind = profile.kind if profile.kind == "measured" else f"{profile.kind}, not measured"
    parts = [
        f"{profile.model}, profile {profile.name} ({kind})",
        f"{trace.source}, {len(trace):,} requests, workload {args.workload}",
        f"policy {args.policy} with operator {operator}",
        *_section("Memory", memory_words(trace, profile, args, policy.merges)),
        *_section("Cold starts", cold_words(trace, profile, cost)),
        *_section("Merging", merge_words(trace, cost, args)),
    ]
    return "\n".join(parts) + "\n"


def _section(title: str, words: list[str]) -> list[str]:
    import textwrap

    lines = [textwrap.fill(text, 100, initial_indent="  - ", subsequent_indent="    ") for text in words]
    return ["", title, *lines] if lines else []


def build_parser() -> SuggestingParser:
    """That of a simulation."""
    parser = simulator_parser()
    parser.prog = "python -m sim whatif"
    parser.description = "How many adapters fit, what a cold start costs, which adapters to merge: an answer in words."
    parser.epilog = None
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        sys.stdout.write(answer(args))
    except BrokenPipeError:
        sys.stdout = None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0
