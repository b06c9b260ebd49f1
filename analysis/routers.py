"""What clusters sustain under an SLO, by policy, router and number of GPUs: from the JSON of `python -m sim capacity`.

Each bar says what broke one step above it, so that a router that loses says why.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from analysis.style import GRID, HATCHES, PALETTE, footer, save, sheet
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
    the next step fails. Writes routers.{png,svg,csv}."""
    documents = [read(path) for path in paths]
    bars = [(document, answer) for document in documents for answer in document["answers"]]
    if any(document["load"] is not None for document in documents):
        raise ResultError("an answer to --load has no rates to draw; search without --load")
    numbers = []
    top = max((answer["low"]["rate"] for _, answer in bars if answer["low"]), default=1.0)
    first: dict[str, float] = {}
    with sheet(10.0, 1.2 + 0.42 * len(bars)) as (figure, ((axes,),)):
        for y, (_, answer) in enumerate(bars):
            low, high = answer["low"], answer["high"]
            rate = low["rate"] if low else 0.0
            base = first.setdefault(answer["policy"], rate)
            ratio = rate / base if base else None
            why = _why(answer)
            beyond = high["rate"] - rate if high and low else 0.0
            several = answer["gpus"] > 1
            fill = {"color": PALETTE[0] if several else "#BBBBBB", "hatch": HATCHES[0 if several else 1]}
            axes.barh(y, rate, xerr=[[0], [beyond]], edgecolor="black", linewidth=0.8, height=0.62, error_kw={"capsize": 2},
                      **fill)  # fmt: skip
            times = f"{rate:.4g}" + (f"  ({ratio:.2f}x)" if ratio and ratio != 1 else "")
            axes.annotate(f"{times}   {why}", (rate + beyond, y), xytext=(5, 0),
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
            fails = high["rate"] if high else ""
            numbers.append((answer["policy"], answer["router"], answer["gpus"], rate, fails, ratio, why))
        axes.set_yticks(range(len(bars)), [_name(answer) for _, answer in bars])
        axes.invert_yaxis()
        axes.set(xlim=(0, top * 2.3), xlabel="Request rate that holds the SLO (requests/s)")
        axes.grid(axis="x", **GRID)
        said = dict.fromkeys(
            f"SLO {d['slo']}, in {d['confidence']:.0%} of {d['seeds']} seeds, bracket {d['tolerance']:.0%}; "
            f"{d['settings']['model']}, {d['settings']['workload']}, profile {d['profile']['name']} ({d['profile']['kind']})"
            for d in documents
        )
        footer(figure, "; ".join((*said, "beside a bar: times its policy's first, and what breaks at the next higher rate")))
        header = ("policy", "router", "gpus", "rate_holds", "rate_fails", "times_first", "why_it_fails")
        return save(figure, numbers, header, Path(directory) / "routers")


def _name(answer: dict) -> str:
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
