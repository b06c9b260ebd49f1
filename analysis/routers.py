"""What clusters sustain under an SLO by policy, router and number of GPUs, or how many GPUs a load takes: from what
`python -m sim capacity --output` wrote.

Each bar says what broke one step above it, so that a router that loses says why.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from analysis.style import GRID, HATCHES, KINDS, PALETTE, footer, save, sheet
from traces.result_files import ResultError

FORMAT = "lora-serving-capacity"
VERSION = 1


def read(path: str | Path) -> dict:
    """The document at `path`. Raises ResultError."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        raise ResultError(f"{path}: is no answer of `python -m sim capacity --output`, version {VERSION}")
    return document


def routers(paths: Sequence[str | Path], directory: str | Path) -> list[Path]:
    """The highest rate that holds the SLO, a bar an answer, with its ratio to the first of its policy and the reason that
    the next step fails; of answers to --load the fewest GPUs. Writes routers.{png,svg,csv}. Raises ResultError."""
    documents = [read(path) for path in paths]
    loads = {document["load"] for document in documents}
    if len(loads) > 1:
        raise ResultError("answers to one --load, or without it, are drawn together; draw the others for themselves")
    load = loads.pop()
    bars = [answer for document in documents for answer in document["answers"]]
    numbers: list[tuple] = []
    with sheet(10.0, 1.2 + 0.42 * len(bars)) as (figure, ((axes,),)):
        _draw_bars(axes, bars, load, numbers)
        said = dict.fromkeys(
            f"SLO {d['slo']}, in {d['confidence']:.0%} of {d['seeds']} seeds"
            f"{'' if load is not None else ', bracket ' + format(d['tolerance'], '.0%')}; {d['settings']['model']}, "
            f"{d['settings']['workload']}, profile {d['profile']['name']} "
            f"({KINDS.get(d['profile']['kind'], 'of unknown kind')})"
            for d in documents
        )
        beside = "what breaks with one GPU less" if load is not None else (
            "times its policy's first, and what breaks at the next higher rate")  # fmt: skip
        footer(figure, "; ".join((*said, f"beside a bar: {beside}")))
        header = ("policy", "router", "gpus", "rate_holds", "rate_fails", "times_first", "why_it_fails")
        return save(figure, numbers, header, Path(directory) / "routers")


def _draw_bars(axes, bars: Sequence[dict], load: float | None, numbers: list[tuple]) -> None:
    """One bar an answer, the first on top; appends a row a bar to `numbers`."""
    unit = "rate" if load is None else "gpus"
    first: dict[str, float] = {}
    for y, answer in enumerate(bars):
        low, high = answer["low"], answer["high"]
        value = low[unit] if low else 0
        base = first.setdefault(answer["policy"], value)
        ratio = value / base if base and load is None else None
        beyond = high["rate"] - value if high and low and load is None else 0.0
        several = answer["gpus"] > 1
        fill = {"color": PALETTE[0] if several else "#BBBBBB", "hatch": HATCHES[0 if several else 1]}
        axes.barh(y, value, xerr=[[0], [beyond]], edgecolor="black", linewidth=0.8, height=0.62, error_kw={"capsize": 2},
                  **fill)  # fmt: skip
        times = f"{value:.4g}" + (f"  ({ratio:.2f}x)" if ratio and ratio != 1 else "")
        axes.annotate(f"{times}   {_why(answer)}", (value + beyond, y), xytext=(5, 0), textcoords="offset points",
                      va="center", fontsize=7.5)  # fmt: skip
        fails = high["rate"] if high else ""
        numbers.append((answer["policy"], answer["router"], answer["gpus"], low["rate"] if low else 0.0, fails, ratio,
                        _why(answer)))  # fmt: skip
    axes.set_yticks(range(len(bars)), [_name(answer, load) for answer in bars])
    axes.invert_yaxis()
    top = max((answer["low"][unit] for answer in bars if answer["low"]), default=1.0)
    title = f"GPUs that hold the SLO at {load:g} requests/s" if load else "Request rate that holds the SLO (requests/s)"
    axes.set(xlim=(0, top * 2.3), xlabel=title)
    axes.grid(axis="x", **GRID)


def _name(answer: dict, load: float | None) -> str:
    if load is not None:
        return f"{answer['policy']}, {answer['router']}"
    router = f", {answer['router']}" if answer["gpus"] > 1 else ""
    return f"{answer['policy']}, {answer['gpus']} GPU{'s' * (answer['gpus'] > 1)}{router}"


def _why(answer: dict) -> str:
    """What broke first, and how uneven the GPUs were."""
    high = answer["high"]
    if high is None:
        return answer["remark"]
    reasons = ", ".join(high["broken"])
    facts = high["facts"]
    if answer["gpus"] > 1 and facts.get("busiest"):
        reasons += f"; busiest GPU {facts['busiest']:.2f}x mean, {facts['adapter_loads']:.0f} loads"
    return reasons
