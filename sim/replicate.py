"""`python -m sim replicate ENGINE_DIR`: simulate what an engine replayed, from the engine's own record; of one replay, or of
all in the folder of a campaign, of which only those that have no partner yet, or not of this record and profile.

Trace, window, rate, adapters, policy and its parameters, limits and the number of pages are those of the record; the trace
is read again and must be the one that the engine served, request by request. Beside each simulated run lies what the profile
says of every lease of the engine (`predicted`), with the engine's own batches: errors of the latency model by themselves. It
simulates the engine's way of folding adapters, one launch, whatever way the policy's paper has.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from policies import Policy, PolicyError, make_policy
from policies.boost import GpuClock
from policies.cost import Cost
from policies.profile import Profile, ProfileError
from policies.recorded import leases
from policies.view import Limits
from sim.__main__ import find_profile
from sim.cluster import SimConfig, simulate
from sim.errorbars import add_error_bars
from sim.latency import FOREVER_PS, run
from traces.details import DETAIL_COLUMNS
from traces.options import SAMPLE, SuggestingParser, add_trace_arguments, load_trace, with_slo
from traces.publish import publish
from traces.record import PLACES, RunResult, summarize
from traces.request import Trace, TraceError
from traces.result_files import (
    ResultError,
    check_target,
    read_results,
    read_summary,
    results_below,
    write_results,
)

PS_PER_NS = 1000
ENGINE_SWITCH = "fused"

OPTIONS = {
    "trace_format": "trace-format", "images": "images", "bad_rows": "bad-rows", "start_s": "start", "duration_s": "duration",
    "sample": "sample", "max_requests": "max-requests", "rate": "rate", "time_scale": "time-scale", "workload": "workload",
    "repeat_images": "repeat-images", "seed": "seed",
}  # fmt: skip
"""Setting of a record -> the option that sets it."""
DERIVED = ("first_stamp_ns", "image_tokens", "video_images", "max_output", "requests", "max_context", "origin", "synthetic")
"""Settings that follow from others or from the file."""


def words_of(settings: Mapping, trace: str | None = None) -> list[str]:
    """The options of `python -m sim` that make the trace of a record. trace: where its file lies now, if elsewhere.

    ResultError for a setting that the simulator does not have.
    """
    left = {name: value for name, value in settings.items() if name not in DERIVED}
    path = trace or left.get("trace")
    words = [] if path in (None, f"{SAMPLE.parent.name}/{SAMPLE.name}") else ["--trace", str(path)]
    left.pop("trace", None)
    for name, option in OPTIONS.items():
        value = left.pop(name, None)
        if value is not None and not (name in ("start_s", "repeat_images") and not value):
            words += [f"--{option}", format(value, ".17g") if isinstance(value, float) else str(value)]
    if left.pop("arrivals", "trace") != "trace":
        words += ["--arrivals", settings["arrivals"]]
    if columns := left.pop("columns", None):
        words += ["--columns", ",".join(f"{role}={name}" for role, name in columns.items())]
    if not left.pop("head", True):
        words.append("--no-head")
    if left.pop("clip", False):
        words.append("--clip")
    spec, adapters, ranks = (left.pop(name, None) for name in ("adapter_assign", "adapters", "ranks"))
    words += ["--adapter-assign", spec or "none"]
    if spec != "column":
        words += ["--adapters", str(adapters or 0)] + (["--ranks", ",".join(map(str, ranks))] if ranks else [])
    unknown = {name: value for name, value in left.items() if value not in (None, False, 0, "")}
    if unknown:
        raise ResultError(f"the simulator has no setting for {', '.join(f'{k}={v!r}' for k, v in sorted(unknown.items()))}")
    return words


def policy_of(config: Mapping) -> Policy:
    """The policy of a record with its parameters."""
    described = dict(config["policy"])
    name = described.pop("name")
    default = make_policy(name)
    known = {field.name for field in fields(default)}
    changed = {}
    for key, value in described.items():
        own = getattr(default, key, None)
        if key in known and value != own and str(value) != str(own):
            changed[key] = str(value).lower() if isinstance(value, bool) else str(value)
    return make_policy(name, changed)


def trace_of(record: RunResult, profile: Profile, limits: Limits, path: str | None) -> Trace:
    """The trace that the engine served. ResultError where it is not the same, request by request."""
    parser = SuggestingParser("python -m sim replicate")
    add_trace_arguments(parser)
    args = parser.parse_args(words_of(record.config["trace"]["settings"], path))
    trace = load_trace(args, replace(profile, max_context=limits.max_context))
    served = record.requests
    closed = record.config["engine"].get("closed_loop", 0)  # where requests arrive when others end
    for name in ("prompt_tokens", "output_tokens", "images", *(() if closed else ("arrival_ns",))):
        ours = getattr(trace, name)[: len(served["id"])]
        if len(ours) != len(served["id"]) or not np.array_equal(ours, served[name]):
            raise ResultError(
                f"the record of {record.policy} was made of other requests ({name} differs) than {trace.source} gives now; "
                "name the file that the engine read with --trace"
            )
    if len(served["id"]) < len(trace):  # the engine was interrupted
        trace = trace.take(np.arange(len(served["id"])))
    return trace


def config_of(record: RunResult) -> SimConfig:
    """The simulator's configuration for an engine's record. ResultError for a record that is no engine's."""
    engine = record.config.get("engine")
    if not engine:
        raise ResultError(f"the record of {record.policy} is no engine's; name what engine replay --output wrote")
    room = record.counters.get("adapter_room_pages")
    return SimConfig(
        limits=Limits(**engine["limits"]), operator=engine["operator"], page_tokens=engine["page_tokens"],
        prefix_cache=engine["prefix_cache"], pages=int(record.counters["pool_pages"]), switch=ENGINE_SWITCH,
        adapter_bytes=None if room is None else int(room) * int(record.counters["page_bytes"]),
        pins=tuple(engine.get("pins", ())), closed_loop=engine.get("closed_loop", 0),
        drain_s=engine.get("drain_s"),
    )  # fmt: skip


def replicated(record: RunResult, profile: Profile, trace_path: str | None, goodput: Mapping[str, float], *,
               error_bars: bool = True) -> RunResult:  # fmt: skip
    """The simulation of one engine's record, with what the profile says of each of its leases."""
    config, policy = config_of(record), policy_of(record.config)
    trace = with_slo(trace_of(record, profile, config.limits, trace_path), dict(goodput))
    simulated = simulate(trace, policy, profile, config)
    if error_bars:
        add_error_bars(simulated, trace, policy, profile, config, goodput)
    simulated.details["predicted"] = predicted(record, profile, config, policy, trace)
    simulated.config["notes"] += _differences(record.config, profile)
    return simulated


def _differences(engine: Mapping, profile: Profile) -> list[str]:
    """What an error may be owed to, for the reader: another profile under the engine's policies, another card."""
    notes, theirs = [], engine["profile"]
    if theirs["sha256"] != profile.sha256:
        notes.append(f"the engine's policies predicted with the profile {theirs['name']}, these with {profile.name}")
    ran, measured = engine["engine"]["device"].get("gpu"), profile.provenance.get("gpu")
    if ran and measured and ran != measured:
        notes.append(f"the engine's GPU, {ran}, is not the profile's, {measured}: such a pair can differ by some percent")
    return notes


def predicted(record: RunResult, profile: Profile, config: SimConfig, policy: Policy, trace: Trace) -> dict[str, np.ndarray]:
    """What the tables say of every lease that the engine ran, as the `predicted` table of the record."""
    cost = Cost(profile, config.operator or policy.operator, ENGINE_SWITCH, trace.adapters, policy.name)
    clock, rows = GpuClock(profile.boost), []
    for lease in leases(record):
        work = lease.work
        boundary = cost.lease_ps(work, lease.loads, idle=lease.idle)
        copies = max(1, lease.loads) if lease.loading else 0  # of one that began earlier all is left
        copies_ps = copies * cost.copy_ns(work.rank) * PS_PER_NS
        slow = clock.slow_ps(cost, work, lease.free_ns * PS_PER_NS + boundary, copies_ps)
        jump = run(cost, work, lease.steps, FOREVER_PS, slow_ps=slow)
        rows.append((
            0, lease.start_ns, lease.free_ns, int(lease.known), boundary // PS_PER_NS, jump.first_ps // PS_PER_NS,
            (jump.total_ps - jump.first_ps) // PS_PER_NS, *(part // PS_PER_NS for part in jump.parts),
        ))  # fmt: skip
    names = DETAIL_COLUMNS["predicted"]
    assert len(names) == 7 + len(PLACES)
    table = np.array(rows, np.int64).reshape(-1, len(names))
    return {name: table[:, i].copy() for i, name in enumerate(names)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = SuggestingParser("python -m sim replicate", description="Simulate what an engine replayed, from its record.")
    add = parser.add_argument
    add("engine", metavar="ENGINE_DIR", help="what `python -m engine replay` or `campaign` wrote with --output")
    add("--output", metavar="DIR", help="where the simulated results go (default: ENGINE_DIR-sim)")
    add("--overwrite", action="store_true", help="replace results that --output finds there")
    add("--profile", metavar="NAME|FILE", help="latency profile (default: the measured one of the model if there is one)")
    add("--trace", metavar="FILE|DIR", help="the trace, or the folder of all, where it is not where the engine read it")
    add("--no-error-bars", action="store_true", help="do not replay at the ends of the profile's scatter (faster)")
    args = parser.parse_args(arguments)
    try:
        return replicate(args)
    except (ResultError, ProfileError, PolicyError, TraceError, ValueError, OSError) as error:
        parser.error(str(error))


def replicate(args: argparse.Namespace) -> int:
    """Everything between the command line and the exit code."""
    folders = results_below(args.engine)
    output = Path(args.output or f"{str(args.engine).rstrip('/')}-sim")
    if folders == [Path(args.engine)]:
        check_target(output, args.overwrite)
        results, document = simulated(folders[0], args)
        goodput = _goodput(document, results[-1].policy)
        publish(results, document["adapters"], goodput, output=str(output), overwrite=args.overwrite, with_adapters=False)
        print(f"wrote {output}", file=sys.stderr)
        return 0
    for folder in folders:
        target = output / folder.name
        if _there(folder, target, args):
            print(f"{target}: is there", file=sys.stderr)
            continue
        if not (args.overwrite or _ours(target)):
            check_target(target)
        results, document = simulated(folder, args)
        summaries = {run.policy: summarize(run, _goodput(document, run.policy)) for run in results}
        write_results(target, results, summaries, document["adapters"], overwrite=True)
        print(f"wrote {target}", file=sys.stderr)
    return 0


def simulated(folder: Path, args: argparse.Namespace) -> tuple[list[RunResult], dict]:
    """The simulations of all policies of one replay, and the engine's summary."""
    document, results = read_summary(folder), []
    for record in read_results(folder):
        profile = find_profile(args.profile, record.config["model"])
        trace = args.trace
        if trace and Path(trace).is_dir():
            own = Path(trace) / Path(record.config["trace"]["settings"]["trace"]).name
            trace = str(own) if own.exists() else None
        goodput = _goodput(document, record.policy)
        results.append(replicated(record, profile, trace, goodput, error_bars=not args.no_error_bars))
        results[-1].config["replicates"] = _mark(folder, profile)
        print(f"{folder.name}, {record.policy}: {len(record.requests['id'])} requests simulated", file=sys.stderr)
    return results, document


def _goodput(document: Mapping, policy: str) -> dict[str, float]:
    return document["policies"][policy]["summary"].get("goodput_slo_ms") or {}


def _mark(folder: Path, profile: Profile) -> dict[str, str]:
    """What a simulation is of: the engine's summary, and the profile."""
    summary = hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest()
    return {"summary_sha256": summary, "profile_sha256": profile.sha256}


def _ours(target: Path) -> bool:
    return (target / "summary.json").exists() and all(
        "replicates" in entry["config"] for entry in read_summary(target)["policies"].values()
    )


def _there(folder: Path, target: Path, args: argparse.Namespace) -> bool:
    """True if `target` holds the simulations of just this record by the profile that would be used now."""
    if args.overwrite or not _ours(target):
        return False
    wanted, found = read_summary(folder)["policies"], read_summary(target)["policies"]
    if wanted.keys() != found.keys():
        return False
    marks = {name: _mark(folder, find_profile(args.profile, entry["config"]["model"])) for name, entry in wanted.items()}
    return all(found[name]["config"]["replicates"] == mark for name, mark in marks.items())


if __name__ == "__main__":
    sys.exit(main())
