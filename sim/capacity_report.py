"""The answers of a search for capacity as text and as JSON. It searches nothing.

The JSON is {"format": "lora-serving-capacity", "version": 1, "slo", "confidence", "seeds", "tolerance", "load", "settings",
"answers": [{policy, router, gpus, low, high, remark, probes}]}, a probe being {rate, gpus, held, seeds, holds, broken,
worst, facts}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sim.experiment import profile_of, settings, trace_sha256
from traces.whole_file import replace_text

if TYPE_CHECKING:
    from sim.capacity import Answer, Probe

FORMAT = "lora-serving-capacity"
VERSION = 1


def render(answers: Sequence[Answer], args: argparse.Namespace) -> str:
    """One line an answer, the bracket and why the next step fails; then the verdict and what was presumed."""
    profile = profile_of(args)
    text = [
        f"slo      {args.slo}",
        f"holds    if at least {min(args.confidence, 1):.0%} of {args.seeds} seeds hold it, keep up and give nobody up",
        f"trace    {args.trace or 'the synthetic sample that ships'}, workload {args.workload}",
        f"profile  {profile.name} ({profile.kind}{'' if profile.kind == 'measured' else ', not measured'})",
        "",
    ]
    rows = [_load_row(a) if args.load is not None else _rate_row(a, answers) for a in answers]
    titles = ("policy", "router", "GPUs", "needs", "fails with", "held", "why") if args.load is not None else (
        "policy", "router", "GPUs", "sustains", "fails at", "held", "x of 1st", "req/s/GPU", "why")  # fmt: skip
    lines = [titles, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    text += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", *_verdict(answers, args)]) + "\n"


def _held(probe: Probe | None) -> str:
    return "-" if probe is None else f"{probe.held}/{probe.seeds}"


def _why(answer: Answer) -> str:
    """What breaks one step above the bracket, and what tells the routers apart."""
    if answer.high is None:
        return answer.remark
    probe = answer.high
    reasons = sorted(probe.broken.items(), key=lambda pair: -pair[1])
    why = ", ".join(f"{reason} in {n}" for reason, n in reasons)
    if probe.gpus > 1 and probe.facts.get("busiest"):
        why += f"; busiest GPU {probe.facts['busiest']:.2f}x the mean, {probe.facts['adapter_loads']:.0f} adapter loads"
    return f"{answer.remark + ': ' if answer.remark else ''}{why}"


def _rate_row(answer: Answer, answers: Sequence[Answer]) -> tuple[str, ...]:
    first = next((a for a in answers if a.policy == answer.policy and a.low), None)
    low, high = answer.low, answer.high
    ratio = "-" if low is None or first is None else f"{low.rate / first.low.rate:.2f}"
    return (
        answer.policy, answer.router if answer.gpus > 1 else "-", str(answer.gpus),
        "-" if low is None else f"{low.rate:.4g}", "-" if high is None else f"{high.rate:.4g}", _held(low), ratio,
        "-" if low is None else f"{low.rate / answer.gpus:.4g}", _why(answer),
    )  # fmt: skip


def _load_row(answer: Answer) -> tuple[str, ...]:
    low, high = answer.low, answer.high
    return (answer.policy, answer.router, str(answer.gpus), "-" if low is None else f"{low.gpus}",
            "-" if high is None else f"{high.gpus}", _held(low), _why(answer))  # fmt: skip


def _verdict(answers: Sequence[Answer], args: argparse.Namespace) -> list[str]:
    if args.load is not None:
        done = sorted((a for a in answers if a.low), key=lambda a: a.low.gpus)
        if not done:
            return [f"No policy holds {args.load:g} requests/s with {args.most_gpus} GPUs."]
        fewest = [a for a in done if a.low.gpus == done[0].low.gpus]
        names = ", ".join(dict.fromkeys(a.policy for a in fewest))
        return [f"{args.load:g} requests/s take {done[0].low.gpus} GPU{'s' * (done[0].low.gpus > 1)}: {names}."]
    text = []
    for gpus in dict.fromkeys(a.gpus for a in answers):
        done = sorted((a for a in answers if a.low and a.gpus == gpus), key=lambda a: -a.low.rate)
        if not done:
            text.append(f"On {gpus} GPU no policy holds the SLO at any rate tried.")
            continue
        best, second = done[0], next((a for a in done if a.policy != done[0].policy), None)
        lead = f", {best.low.rate / second.low.rate:.2f} times {second.policy}'s" if second else ""
        ends = f"the bracket ends at {best.high.rate:.4g}" if best.high else best.remark
        text.append(f"On {gpus} GPU {best.policy} sustains the most, {best.low.rate:.4g} requests/s{lead} ({ends}).")
    saturated = [a for a in answers if a.high is not None and "saturated" in a.high.broken]
    if saturated:
        names = ", ".join(dict.fromkeys(f"{a.policy} on {a.gpus} GPU" for a in saturated))
        text.append(f"Saturated at the bracket's end, whatever the SLO: {names}.")
    spans = [a.low.facts["span_s"] for a in answers if a.low and a.low.facts.get("span_s")]
    if spans:
        text.append(f"At these rates the trace lasts {min(spans):.0f} to {max(spans):.0f} s; a short one hides slow queues.")
    return text


def write_json(path: Path, answers: Sequence[Answer], args: argparse.Namespace) -> None:
    """Write everything, in one piece."""
    profile = profile_of(args)
    options = argparse.Namespace(**vars(args) | {"gpus": list(args.gpus), "router": list(args.router)})
    document = {
        "format": FORMAT, "version": VERSION, "slo": args.slo, "confidence": args.confidence, "seeds": args.seeds,
        "tolerance": args.tolerance, "load": args.load, "settings": settings(options),
        "trace_sha256": trace_sha256(args.trace),
        "profile": {"name": profile.name, "kind": profile.kind, "sha256": profile.sha256},
        "answers": [asdict(answer) for answer in answers],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
