"""`python -m sim capacity --slo "p99_ttft<1s"`: the highest request rate that each policy sustains under an SLO; with
`--load RATE` the fewest GPUs that hold it at that rate.

A rate holds if at least the share --confidence of --seeds runs hold every objective, keep up with their arrivals and give
nobody up. The rate is found by doubling and bisection; the answer is a bracket: the highest rate seen to hold and the
lowest seen to fail, at most --tolerance apart. It presumes that more load is never better. A seed draws adapters and
workloads anew; arrivals are the trace's, rescaled.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path

from policies.invariants import InvariantError
from policies.plan import PlanError
from policies.routing import ROUTERS
from sim.__main__ import build_parser as simulator_parser
from sim.capacity_report import render, write_json
from sim.experiment import OUTPUT_OPTIONS, check, key_of, run
from sim.parallel import in_processes
from sim.slo import Objective, judge, parse_slo
from traces.options import SuggestingParser, count, near, positive
from traces.record import duration_s, parse_goodput, summarize

POLICIES = "valora,dlora,slora,punica"
SHORTEST_SPAN_S = 1.0
"""A trace that is squeezed into less says nothing about a rate."""


@dataclass(frozen=True)
class Probe:
    """What the seeds say about one load. broken: why runs failed -> in how many; worst: key -> worst value of the seeds."""

    rate: float
    gpus: int
    held: int
    seeds: int
    holds: bool
    broken: dict[str, int]
    worst: dict[str, float | None]
    facts: dict[str, float | None]


@dataclass
class Answer:
    """The bracket of one policy: the highest load seen to hold (None: none did) and the lowest seen to fail (None: none
    did, and `remark` says why the search ended). In `--load` the gpus differ, else the rates."""

    policy: str
    router: str
    gpus: int
    low: Probe | None = None
    high: Probe | None = None
    remark: str = ""
    probes: list[Probe] = field(default_factory=list)


def build_parser() -> SuggestingParser:
    """That of a simulation, with what a search adds."""
    parser = simulator_parser()
    parser.prog = "python -m sim capacity"
    parser.description = "The highest rate each policy sustains under an SLO, or the fewest GPUs for a load."
    parser.epilog = None
    parser.conflict_handler = "resolve"  # --gpus and --router take several here
    group = parser.add_argument_group("capacity")
    add = group.add_argument
    add("--slo", required=True, metavar="METRIC<VALUE,...", help='e.g. "p99_ttft<1s,p99_tpot<50ms"; keys of the summary')
    add("--load", type=positive, metavar="RATE", help="find the fewest GPUs for this many requests/s instead")
    add("--seeds", type=count, default=5, metavar="N", help="runs a probe, from --seed on (default 5)")
    add("--confidence", type=positive, default=0.8, metavar="P", help="share of the seeds that must hold (default 0.8)")
    add("--tolerance", type=positive, default=0.02, metavar="T", help="widest bracket, relative (default 0.02)")
    add("--gpus", type=_counts, default=(1,), metavar="N,N,...", help="numbers of GPUs to compare (default 1)")
    add("--most-gpus", type=count, default=64, metavar="N", help="where --load gives up (default 64)")
    add("--router", type=_routers, default=("least-outstanding",), metavar="NAME,...", help=", ".join(sorted(ROUTERS)))
    add("--requests-per-gpu", type=count, metavar="N", help="N requests a GPU, so that all numbers of GPUs see equal spans")
    add("--jobs", type=count, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    add("--output", metavar="FILE.json", help="write brackets and probes there, for `python -m analysis figures`")
    parser.set_defaults(policy=POLICIES)
    return parser


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(count(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 GPU")
    return counts


def _routers(text: str) -> tuple[str, ...]:
    for name in text.split(","):
        if name not in ROUTERS:
            raise argparse.ArgumentTypeError(f"unknown {name!r}{near(name, ROUTERS)}; one of {', '.join(sorted(ROUTERS))}")
    return tuple(text.split(","))


def judged(args: argparse.Namespace, objectives: tuple[Objective, ...]) -> tuple:
    """(judgement, facts) of one run, in whatever process; (None, the error) where it could not be run."""
    try:
        result = run(args)
    except (ValueError, OSError, InvariantError, PlanError) as error:
        return None, f"{args.policy}: {type(error).__name__}: {error}"
    arrival_ns, server = result.requests["arrival_ns"], result.requests["server"]
    span_s = (int(arrival_ns.max()) - int(arrival_ns.min())) / 1e9
    summary = summarize(result, parse_goodput(args.goodput))
    work = [float(result.requests["generated_tokens"][server == i].sum()) for i in range(args.gpus)]
    mean = sum(work) / len(work)
    facts = {
        "span_s": span_s,
        "busiest": max(work) / mean if mean else None,  # tokens of the busiest GPU over the mean GPU's
        "adapter_loads": summary["adapter_loads"],
        "switches": summary["switches"],
    }
    return judge(summary, objectives, span_s, duration_s(result) - span_s), facts


class Search:
    """Probes for one policy and router; a probe that was made is not made again."""

    def __init__(self, args: argparse.Namespace, policy: str, router: str, objectives: tuple[Objective, ...]):
        self.args, self.policy, self.router, self.objectives = args, policy, router, objectives
        self.probes: list[Probe] = []
        self.needed = ceil(round(args.seeds * args.confidence, 9))  # 25 x 0.56 is a little more than 14 in binary

    def probe(self, rate: float, gpus: int) -> Probe:
        """Run all seeds at one load. Raises ValueError where a run cannot be made."""
        runs = []
        for seed in range(self.args.seed, self.args.seed + self.args.seeds):
            load = {"router": self.router, "gpus": gpus, "rate": rate, "seed": seed}
            if self.args.requests_per_gpu is not None:
                load["max_requests"] = self.args.requests_per_gpu * gpus
            runs.append((seed, argparse.Namespace(**vars(self.args) | load)))
        work = in_processes(partial(judged, objectives=self.objectives), min(self.args.jobs or 1, len(runs)))
        ended = [outcome for _, outcome in sorted(work(runs), key=lambda pair: pair[0])]
        for judgement, error in ended:
            if judgement is None:
                raise ValueError(error)
        judgements = [judgement for judgement, _ in ended]
        held = sum(not judgement.broken for judgement in judgements)
        worst = {}
        for objective in self.objectives:
            values = [j.values[objective.key] for j in judgements]
            pick = max if objective.sign.startswith("<") else min
            worst[objective.key] = None if None in values else pick(values)
        facts = {}
        for name in ended[0][1]:
            values = [facts_of[name] for _, facts_of in ended if facts_of[name] is not None]
            facts[name] = sum(values) / len(values) if values else None
        broken = dict(Counter(reason for judgement in judgements for reason in judgement.broken))
        found = Probe(rate, gpus, held, len(runs), held >= self.needed, broken, worst, facts)
        self.probes.append(found)
        why = "holds" if found.holds else "fails: " + ", ".join(f"{reason} ({n})" for reason, n in broken.items())
        label = f"{self.policy}, {gpus} GPU, {self.router}"
        print(f"{label}: {rate:.4g} requests/s, {held} of {len(runs)} seeds hold; {why}", file=sys.stderr, flush=True)
        return found

    def rate(self, gpus: int, requests: int) -> Answer:
        """The bracket of the rate that `gpus` GPUs sustain. requests: of the trace, which bounds a sensible rate."""
        if self.args.requests_per_gpu is not None:
            requests = min(requests, self.args.requests_per_gpu * gpus)
        ceiling = max(2.0, (requests - 1) / SHORTEST_SPAN_S)
        start = min(4.0 * gpus, ceiling)
        low, high = bracket(lambda rate: self.probe(rate, gpus), start, ceiling, start / 2**12)
        answer = Answer(self.policy, self.router, gpus, low, high, "", self.probes)
        if low is None:
            answer.remark = f"holds at no rate down to {high.rate:.3g} requests/s"
        elif high is None:
            answer.remark = f"still holds at {low.rate:.4g} requests/s, where the whole trace takes 1 s: use a longer trace"
        else:
            while answer.high.rate > answer.low.rate * (1 + self.args.tolerance):
                middle = self.probe((answer.low.rate * answer.high.rate) ** 0.5, gpus)
                answer.low, answer.high = (middle, answer.high) if middle.holds else (answer.low, middle)
        return answer

    def fewest(self, load: float, most: int) -> Answer:
        """The fewest GPUs that hold `load` requests/s, by doubling and bisection over whole numbers."""
        gpus, low, high = 1, None, None  # low: the most GPUs that fail, high: the fewest that hold
        while high is None and gpus <= most:
            probe = self.probe(load, gpus)
            low, high = (low, probe) if probe.holds else (probe, None)
            gpus = min(2 * gpus, most) if gpus < most else most + 1
        answer = Answer(self.policy, self.router, high.gpus if high else most, high, low, "", self.probes)
        if high is None:
            answer.remark = f"{most} GPUs do not hold {load:g} requests/s"
            return answer
        while low is not None and answer.low.gpus - answer.high.gpus > 1:
            middle = self.probe(load, (answer.low.gpus + answer.high.gpus) // 2)
            answer.low, answer.high = (middle, answer.high) if middle.holds else (answer.low, middle)
        answer.gpus = answer.low.gpus
        return answer


def bracket(probe: Callable[[float], Probe], start: float, ceiling: float, floor: float):
    """(the Probe of a rate that holds, that of one that fails) at most a factor of two apart; None where there is none up
    to `ceiling` or down to `floor`."""
    low, high, rate = None, None, start
    while low is None or high is None:
        found = probe(rate)
        low, high = (found, high) if found.holds else (low, found)
        if (high is None and rate >= ceiling) or (low is None and rate <= floor):
            break
        rate = min(2 * rate, ceiling) if high is None else rate / 2 if low is None else rate
    return low, high


def answers(args: argparse.Namespace, objectives: tuple[Objective, ...]) -> Iterator[Answer]:
    """One answer after another, for each policy, router and number of GPUs."""
    from sim.experiment import trace_of

    names = list(dict.fromkeys(name.strip() for name in args.policy.split(",") if name.strip()))
    singles = []
    for name in names:
        options = [pair for pair in args.policy_option if "." not in pair.partition("=")[0] or pair.startswith(f"{name}.")]
        single = argparse.Namespace(**vars(args) | {"policy": name, "policy_option": options, "gpus": 1,
                                                    "router": args.router[0], "rate": None})  # fmt: skip
        check(single)
        key_of(single)  # the trace is there
        singles.append(single)
    requests = len(trace_of(singles[0]))
    for single in singles:
        for router in args.router:
            if args.load is not None:
                yield Search(single, single.policy, router, objectives).fewest(args.load, args.most_gpus)
                continue
            for gpus in args.gpus:
                if gpus > 1 or router == args.router[0]:  # one GPU needs no router
                    yield Search(single, single.policy, router, objectives).rate(gpus, requests)


def solve(args: argparse.Namespace) -> None:
    """Everything between the command line and the exit code. Raises ValueError or OSError for bad input."""
    for name in OUTPUT_OPTIONS:
        if name not in ("output", "progress") and getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for single runs; leave it out")
    if args.rate is not None or args.time_scale is not None:
        raise ValueError("--rate and --time-scale are what is searched for; use --load for a given rate")
    if args.closed_loop:
        raise ValueError("--closed-loop has no rate that could be searched for; leave it out")
    if args.requests_per_gpu is not None and args.max_requests is not None:
        raise ValueError("--max-requests and --requests-per-gpu exclude each other")
    if args.seeds < 1 or args.confidence > 1 or args.most_gpus < 1:
        raise ValueError("--seeds and --most-gpus must be at least 1, --confidence at most 1")
    objectives = parse_slo(args.slo)
    args.output, output = None, args.output
    if output is not None and Path(output).suffix != ".json":
        raise ValueError(f"--output {output}: name a .json file")
    found = list(answers(args, objectives))
    sys.stdout.write(render(found, args))
    if output is not None:
        write_json(Path(output), found, args)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        solve(args)
    except BrokenPipeError:
        sys.stdout = None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0
