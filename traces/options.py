"""The command-line options of every program that takes a trace, and `load_trace`, which applies them in order.

Knows the order and the names; the work is done by `readers`, `window`, `workload` and `assign`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from traces import assign, window, workload
from traces.readers import FORMATS, read_trace
from traces.request import Trace, TraceError
from traces.rows import BAD_ROWS, DEFAULT_RANK
from traces.suggest import SuggestingParser, near

__all__ = ["SAMPLE", "ModelShape", "SuggestingParser", "add_trace_arguments", "load_trace", "near", "open_trace"]

SAMPLE = Path(__file__).with_name("sample.csv")
"""The trace used when none is given; made by `python -m traces synth conv`, not a real one."""

ADAPTERS = 16
"""Adapters when neither the trace nor the person says; VaLoRA's evaluation has 16."""


class ModelShape(Protocol):
    """What a workload must know of the model."""

    image_tokens: int  # prompt tokens of an image
    video_images: int  # images of a video request
    max_context: int  # tokens


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def check_end(drain: float | None, closed_loop: int) -> None:
    """ValueError for a `--drain` of a closed loop."""
    if drain is not None and closed_loop:
        raise ValueError("--drain counts from the last arrival, and a --closed-loop has none of its own: drop one")


def count(text: str) -> int:
    """A whole number of at least 0, up to 10^15."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def ranks(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    return tuple(count(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names with commas between, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _columns(text: str) -> dict[str, str]:
    columns = {}
    for pair in text.split(","):
        role, equals, column = pair.partition("=")
        if not equals or not role.strip() or not column.strip():
            raise argparse.ArgumentTypeError(f"{pair!r} is not role=column, as in timestamp=my_time")
        columns[role.strip()] = column.strip()
    return columns


def _arrivals(text: str) -> int | None:
    name, _, rest = text.partition(":")
    if name == "trace" and not rest:
        return None
    if name != "valora-sample":
        hint = near(name, ("trace", "valora-sample"))
        raise argparse.ArgumentTypeError(f"unknown {text!r}{hint}; one of trace, valora-sample:R")
    return count(rest)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how a trace file is read."""
    add = parser.add_argument
    add("--trace-format", choices=FORMATS, default="auto", help="format of the file (default: found by itself)")
    add("--columns", type=_columns, default={}, metavar="ROLE=NAME,...",
        help="columns by your names, e.g. timestamp=t,prompt_tokens=in,output_tokens=out")  # fmt: skip
    add("--images", default="sqrt", metavar="raw|sqrt|cap=N",
        help="how Azure's NumImages is read (default sqrt: the column holds squares)")  # fmt: skip
    add("--bad-rows", choices=BAD_ROWS, default="stop", help="stop at a bad row, or skip and count (default stop)")


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose a part of a trace and its pace; `select` applies them."""
    add = parser.add_argument
    add("--start", type=not_negative, default=0.0, metavar="S", help="window: from S seconds on")
    add("--duration", type=positive, metavar="S", help="window: S seconds long")
    add("--arrivals", type=_arrivals, default=None, metavar="trace|valora-sample:R",
        help="replay the trace, or sample as VaLoRA's artefact does")  # fmt: skip
    add("--sample", type=positive, metavar="P", help="keep each request with probability P")
    add("--max-requests", type=count, metavar="N", help="only the first N")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=positive, metavar="R", help="rescale time to a mean of R requests/s")
    pace.add_argument("--time-scale", type=positive, metavar="X", help="multiply arrival times by X (0.5: faster)")


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which adapter a request asks for; `assigned` applies them."""
    add = parser.add_argument
    add("--adapters", type=count, metavar="N", help=f"number of adapters (default {ADAPTERS}; 0: base model)")
    add("--ranks", type=ranks, metavar="R,R,...", help=f"ranks the adapters cycle over (default {DEFAULT_RANK})")
    add("--adapter-assign", metavar="SPEC",
        help=f"{' | '.join(assign.SPECS)} (default: the trace's own adapters, else {assign.DEFAULT_SPEC})")  # fmt: skip
    add("--seed", type=count, default=0, metavar="N", help="seed of every random draw (default 0)")


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """All options that choose a trace, its part, its pace, its workload and its adapters; `load_trace` applies them."""
    group = parser.add_argument_group("trace")
    add = group.add_argument
    add("--trace", metavar="FILE", help="trace to replay, plain or gzip (default: the sample that ships)")
    add_reading_arguments(group)
    add_selection_arguments(group)
    add("--workload", choices=workload.WORKLOADS, default="trace", help="what requests ask for (default trace)")
    add("--repeat-images", type=not_negative, default=0.0, metavar="P",
        help="share of the requests whose images were seen shortly before (default 0)")  # fmt: skip
    add("--no-head", action="store_true", help="decode 7 tokens instead of a vision task head")
    add_adapter_arguments(group)
    add("--clip", action="store_true", help="shorten requests that pass the model's context")


def open_trace(path: str | Path | None, args: argparse.Namespace) -> Trace:
    """Read `path` with the options of `add_reading_arguments`; None is the sample that ships."""
    options = {"format": args.trace_format, "columns": args.columns, "images": args.images, "bad_rows": args.bad_rows}
    if path is not None:
        return read_trace(path, **options)
    name = f"{SAMPLE.parent.name}/{SAMPLE.name}"  # where the project is installed is nobody's business
    note = "no trace given: the synthetic sample that ships with the project"
    return replace(read_trace(SAMPLE, **options), source=name).with_(note=note, settings={"trace": name})


def select(trace: Trace, args: argparse.Namespace) -> Trace:
    """Window, --arrivals, --sample, --max-requests, then --rate or --time-scale; recorded in the settings."""
    if args.start or args.duration is not None:
        trace = window.window(trace, args.start, args.duration)
    if args.arrivals is not None:
        trace = window.valora_sample(trace, args.arrivals, args.seed)
    if args.sample is not None:
        trace = window.thin(trace, args.sample, args.seed)
    if args.max_requests is not None:
        trace = window.first_requests(trace, args.max_requests)
    if args.rate is not None:
        trace = window.set_rate(trace, args.rate)
    if args.time_scale is not None:
        trace = window.time_scale(trace, args.time_scale)
    arrivals = "trace" if args.arrivals is None else f"valora-sample:{args.arrivals}"
    chosen = {"start_s": args.start, "duration_s": args.duration, "arrivals": arrivals, "sample": args.sample}
    chosen |= {"max_requests": args.max_requests, "rate": args.rate, "time_scale": args.time_scale}
    return trace.with_(settings=chosen)


def load_trace(args: argparse.Namespace, model: ModelShape, trace: Trace | None = None) -> Trace:
    """The trace that the options of `add_trace_arguments` describe, for a model of this shape.

    In this order: read (`trace` is what `open_trace` gave, if the file was read before); window (--start, --duration);
    --arrivals; --sample; --max-requests; --rate or --time-scale; --workload (with --repeat-images, --no-head);
    --adapter-assign; --clip. `settings` holds every resolved value, `notes` what each step did. Raises TraceError.
    """
    trace = select(open_trace(args.trace, args) if trace is None else trace, args)
    trace = workload.apply_workload(
        trace, args.workload, image_tokens=model.image_tokens, video_images=model.video_images, seed=args.seed,
        repeat_images=args.repeat_images, head=not args.no_head,
    )  # fmt: skip
    trace = assigned(trace, args)
    if args.clip:
        trace = workload.clip(trace, model.max_context, model.image_tokens)
    return trace.with_(settings={"clip": args.clip, "seed": args.seed, "requests": len(trace)})


def assigned(trace: Trace, args: argparse.Namespace) -> Trace:
    """Adapters as asked; the trace's own where it names some and nobody asks for others."""
    asked = args.adapters is not None or args.ranks is not None
    spec = args.adapter_assign or ("column" if trace.adapters and not asked else assign.DEFAULT_SPEC)
    if spec == "column" and asked:
        raise TraceError("--adapter-assign column takes adapters and ranks from the trace: drop --adapters and --ranks")
    adapters = ADAPTERS if args.adapters is None else args.adapters
    return assign.assign_adapters(trace, spec, adapters=adapters, ranks=args.ranks or (DEFAULT_RANK,), seed=args.seed)


def with_slo(trace: Trace, goodput: dict[str, float]) -> Trace:
    """--goodput ttft:MS is also the deadline that admission control knows, unless the trace brings its own."""
    if "ttft" not in goodput or trace.ttft_slo_ns is not None:
        return trace
    return trace.with_(ttft_slo_ns=np.full(len(trace), round(goodput["ttft"] * 1e6), np.int64))
