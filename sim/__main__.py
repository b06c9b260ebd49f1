"""`python -m sim --policy valora --trace azure.csv`: replay a trace through one or several policies on simulated GPUs.

The result goes to stdout, the same bytes for the same seed and inputs; progress, timing and errors go to stderr. Exit codes:
0, 2 (bad input; one line that says where and what to do), 3 (an invariant was broken: a bug, not bad input).
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from policies import PolicyError, known_policies, make_policies
from policies.invariants import InvariantError
from policies.plan import PlanError
from policies.profile import Profile, ProfileError, load_profile
from policies.routing import ROUTERS
from policies.view import Limits
from sim.cluster import SimConfig, simulate
from sim.errorbars import add_error_bars
from sim.progress import Progress
from traces.options import (
    SuggestingParser,
    add_trace_arguments,
    check_end,
    count,
    load_trace,
    names,
    near,
    not_negative,
    positive,
    with_slo,
)
from traces.publish import publish
from traces.record import parse_goodput
from traces.request import TraceError
from traces.result_files import FIGURES, ResultError, check_target

PROFILES = Path(__file__).parent / "profiles"
MOST_GPUS = 4096
MODELS = ("llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-7b")


def build_parser() -> SuggestingParser:
    parser = SuggestingParser(
        "python -m sim", description="Replay a trace through LoRA serving policies on simulated GPUs.",
        epilog=f"Other commands: python -m sim {'|'.join(COMMANDS)} --help",
    )  # fmt: skip
    add = parser.add_argument
    add("--policy", default="valora", metavar="NAME[,NAME...]",
        help="one, or several to compare: " + ", ".join(known_policies()))  # fmt: skip
    add("--policy-option", action="append", default=[], metavar="[POLICY.]KEY=VALUE",
        help="a parameter of a policy, e.g. valora.theta_s=2; may be repeated")  # fmt: skip
    add_trace_arguments(parser)
    group = parser.add_argument_group("hardware and model")
    add = group.add_argument
    add("--model", choices=MODELS, default=MODELS[0], help=f"model whose profile is used (default {MODELS[0]})")
    add("--profile", metavar="NAME|FILE", help="latency profile (default: the measured one of the model if there is one)")
    add("--operator", metavar="NAME", help="LoRA operator for every policy (default: each policy's own)")
    add("--gpus", type=count, default=1, metavar="N", help="replicas (default 1)")
    add("--router", choices=sorted(ROUTERS), default="least-outstanding", help="which replica a request goes to")
    add("--memory-share", type=positive, default=1.0, metavar="F", help="share of the memory pool to use (default 1)")
    add("--adapter-memory", type=positive, metavar="GIB",
        help="memory that holds adapters and nothing else (default: they share the pool with keys and values)")  # fmt: skip
    add("--pin", type=names, default=(), metavar="NAME[,NAME...]", help="adapters that are there from the start and stay")
    add("--closed-loop", type=count, default=0, metavar="N",
        help="N requests in flight, one arrives when one ends (default: they arrive by the trace)")  # fmt: skip
    add("--drain", type=not_negative, metavar="S",
        help="end the run S seconds after the last arrival (default: when every request has ended)")  # fmt: skip
    add("--page-tokens", type=count, default=16, metavar="N", help="KV tokens a page (default 16)")
    add("--max-batch", type=count, default=64, metavar="N", help="requests in one step, MaxBS (default 64)")
    add("--max-batch-tokens", type=count, default=2048, metavar="N", help="tokens in one step (default 2048)")
    add("--no-prefix-cache", action="store_true", help="forget prefixes when their request ends")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="SLOs, e.g. ttft:200 tpot:50; fills request_goodput")
    add("--per-adapter", action="store_true", help="a table by adapter as well")
    add("--output", metavar="DIR", help="write requests, steps, summary and a Perfetto trace there")
    add("--overwrite", action="store_true", help="replace results that --output finds there")
    add("--plot", action="store_true", help=f"draw the comparison into DIR/{FIGURES}; needs --output")
    add("--no-error-bars", action="store_true", help="do not replay at the ends of the profile's scatter (faster)")
    add("--progress", choices=("auto", "off"), default="auto", help="progress on stderr (default: on a terminal)")
    add("--check-invariants", action="store_true", help="prove the books after every step (slower)")
    add("--no-leap", action="store_true", help="decide and take every step singly; the same result, slower")
    return parser


def find_profile(name: str | None, model: str) -> Profile:
    """The profile named, by file, by name, or by the GPU that its name begins with (a100-80gb: of any model); else the
    model's measured one, else its analytic one. ProfileError for none, and for one of another model than was asked for (the
    default model is nobody's wish)."""
    profile = _named_profile(name, model)
    if model in MODELS[1:] and profile.model in MODELS and profile.model != model:
        raise ProfileError(
            f"profile {profile.name} is of {profile.model}, the model asked for is {model}; name a profile of that, or the "
            "GPU alone (h200)"
        )
    return profile


def _named_profile(name: str | None, model: str) -> Profile:
    if name is None:
        found = sorted(PROFILES.glob(f"h200-{model}.json"))
        return load_profile(found[0] if found else PROFILES / f"analytic-h200-{model}.json")
    if name.endswith(".json") or "/" in name:
        return load_profile(name)
    known = sorted(path.stem for path in PROFILES.glob("*.json"))
    name = f"{name}-{model}" if f"{name}-{model}" in known else name
    if name not in known:
        raise ProfileError(f"unknown profile {name!r}{near(name, known)}; known profiles are {', '.join(known)}")
    return load_profile(PROFILES / f"{name}.json")


def sim_config(args: argparse.Namespace, profile: Profile) -> SimConfig:
    """The simulator's configuration. Raises ValueError with the offending value."""
    if not 1 <= args.gpus <= MOST_GPUS or args.page_tokens < 1:
        raise ValueError(f"--gpus {args.gpus} must be 1 to {MOST_GPUS}, --page-tokens {args.page_tokens} at least 1")
    if args.memory_share > 1:
        raise ValueError(f"--memory-share {args.memory_share} is above 1")
    check_end(args.drain, args.closed_loop)
    if args.operator not in (None, "none"):
        profile.named("lora", args.operator)
    return SimConfig(
        limits=Limits(args.max_batch, args.max_batch_tokens, profile.max_context), operator=args.operator,
        page_tokens=args.page_tokens, memory_share=args.memory_share, prefix_cache=not args.no_prefix_cache,
        gpus=args.gpus, router=args.router, leap=not args.no_leap, keep_steps=args.output is not None,
        check_invariants=args.check_invariants, pins=args.pin, closed_loop=args.closed_loop, drain_s=args.drain,
        adapter_bytes=None if args.adapter_memory is None else int(args.adapter_memory * 2**30),
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Everything between the command line and the exit code."""
    began = time.perf_counter()
    policies = make_policies(args.policy, args.policy_option)
    if args.plot and not args.output:
        raise ResultError("--plot needs --output DIR")
    if args.output:
        check_target(args.output, args.overwrite)
    goodput = parse_goodput(args.goodput)
    profile = find_profile(args.profile, args.model)
    config = sim_config(args, profile)
    trace = with_slo(load_trace(args, profile), goodput)
    read = time.perf_counter()
    results, replay_s, bars_s = [], 0.0, 0.0
    for policy in policies:
        with Progress(policy.name, len(trace), args.progress) as progress:
            start = time.perf_counter()
            results.append(simulate(trace, policy, profile, config, progress.update))
            replay_s += time.perf_counter() - start
        if not args.no_error_bars:
            start = time.perf_counter()
            add_error_bars(results[-1], trace, policy, profile, config, goodput)
            bars_s += time.perf_counter() - start
    adapters = [adapter.name for adapter in trace.adapters]
    publish(results, adapters, goodput, output=args.output, overwrite=args.overwrite, with_adapters=args.per_adapter)
    if args.plot:
        figures = Path(args.output) / FIGURES
        subprocess.run([sys.executable, "-m", "analysis", "figures", "--in", args.output, "--out", figures], check=True)
    bars = f"error bars {bars_s:.2f} s, " if bars_s > 0.01 else ""
    took = time.perf_counter() - began
    print(f"read {read - began:.2f} s, replayed {replay_s:.2f} s, {bars}all {took:.2f} s", file=sys.stderr)


COMMANDS = ("sweep", "capacity", "whatif", "replicate", "extrapolate")
"""Modules of this package that are commands of their own, as the first argument."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return importlib.import_module(f"sim.{words[0]}").main(words[1:])
    try:
        parser = build_parser()
    except PolicyError as error:  # a plug-in that is no policy, even if nobody asked for it
        print(f"python -m sim: error: {error}", file=sys.stderr)
        return 2
    if words and not words[0].startswith("-"):
        known = f"commands are {', '.join(COMMANDS)}; without one, options begin with --"
        parser.error(f"unknown command {words[0]!r}{near(words[0], COMMANDS)}; {known}")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (PlanError, InvariantError) as error:
        print(f"{parser.prog}: invariant broken: {error}", file=sys.stderr)
        return 3
    except BrokenPipeError:  # the reader of stdout, `head` say, has seen enough
        sys.stdout = None
        return 0
    except (TraceError, PolicyError, ProfileError, ResultError, ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        whole = args.output and (Path(args.output) / "summary.json").exists()
        said = f"the results in {args.output} are whole, figures may be missing" if whole else "nothing was written"
        print(f"{parser.prog}: interrupted; {said}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
