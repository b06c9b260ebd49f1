"""Describe a trace in lines of text: what it is, how requests arrive, how long they are, which adapters they ask for.

It knows no policy and no model, so it says nothing of what a trace will cost.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from traces.request import NO_ADAPTER, TASKS, Trace
from traces.window import mean_rate

QUANTILES = (1, 5, 25, 50, 75, 95, 99)
SECOND_NS = 1_000_000_000
MOST_ADAPTERS = 10


def describe(trace: Trace) -> Iterator[str]:
    """Lines for a person. IDC: variance over mean of the requests counted in whole windows; 1 for a Poisson process."""
    yield f"source       {trace.source}"
    yield f"format       {trace.format}"
    if trace.sha256:
        yield f"sha256       {trace.sha256}"
    for note in trace.notes:
        yield f"note         {note}"
    span_s = int(trace.arrival_ns[-1] - trace.arrival_ns[0]) / SECOND_NS
    yield f"requests     {len(trace)} in {span_s:.3f} s, {mean_rate(trace):.4g} requests/s"
    if "first_stamp_ns" in trace.settings and trace.settings["first_stamp_ns"] > 0:
        yield f"first stamp  {np.datetime64(trace.settings['first_stamp_ns'], 'ns')} UTC"
    yield from _arrivals(trace)
    yield ""
    yield f"{'':17}{'mean':>10}{'std':>10}" + "".join(f"{f'p{q}':>9}" for q in QUANTILES) + f"{'max':>10}"
    yield _row("prompt tokens", trace.prompt_tokens)
    yield _row("output tokens", trace.output_tokens)
    if trace.images.any():
        yield _row("images", trace.images)
        with_images = trace.images > 0
        yield ""
        yield f"with images  {with_images.mean():.1%} of requests, {trace.images.sum()} images"
    yield from _shares(trace)


def _arrivals(trace: Trace) -> Iterator[str]:
    gaps = np.diff(trace.arrival_ns) / SECOND_NS
    if not len(gaps) or gaps.mean() == 0:
        return
    zero = np.mean(gaps == 0)
    yield f"gaps         CV {gaps.std() / gaps.mean():.3f}, longest {gaps.max():.6g} s, {zero:.1%} are zero"
    parts = []
    for window_s in (1, 10, 60):
        counts = np.unique(trace.arrival_ns // (window_s * SECOND_NS), return_counts=True)
        whole = int(trace.arrival_ns[-1] // (window_s * SECOND_NS))  # the last window is cut short
        inside = counts[1][counts[0] < whole].astype(float)
        if whole >= 10:
            mean = inside.sum() / whole
            parts.append(f"{(np.square(inside).sum() / whole - mean**2) / mean:.3g} over {window_s} s")
    if parts:
        yield f"IDC          {', '.join(parts)}"


def _row(title: str, values: np.ndarray) -> str:
    quantiles = np.percentile(values, QUANTILES, method="inverted_cdf")
    return (
        f"{title:17}{values.mean():>10.1f}{values.std():>10.1f}"
        + "".join(f"{int(q):>9}" for q in quantiles)
        + f"{int(values.max()):>10}"
    )


def _shares(trace: Trace) -> Iterator[str]:
    n = len(trace)
    if trace.task.any():
        counts = np.bincount(trace.task, minlength=len(TASKS))
        yield "tasks        " + ", ".join(f"{name} {c / n:.1%}" for name, c in zip(TASKS, counts, strict=True) if c)
    if trace.head.any():
        yield f"task heads   {trace.head.mean():.1%} of requests"
    if trace.prefix is not None:
        yield from _sharing(trace)
    if trace.adapters:
        asked = trace.adapter[trace.adapter != NO_ADAPTER]
        counts = np.bincount(asked, minlength=len(trace.adapters))
        order = np.argsort(-counts, kind="stable")[:MOST_ADAPTERS]
        yield f"adapters     {len(trace.adapters)}, asked for by {len(asked) / n:.1%} of requests"
        for index in order.tolist():
            adapter = trace.adapters[index]
            yield f"  {adapter.name:24} rank {adapter.rank:<4} {counts[index] / n:.1%}"
        if len(trace.adapters) > MOST_ADAPTERS:
            yield f"  ... and {len(trace.adapters) - MOST_ADAPTERS} more"


def _sharing(trace: Trace) -> Iterator[str]:
    """How many prompt tokens stand in prefixes that an earlier request already had, were nothing ever evicted."""
    seen: set[tuple[int, int, int]] = set()
    total = again = 0
    for adapter, prefix in zip(trace.adapter.tolist(), trace.prefix, strict=True):
        leading = True
        for key, tokens in prefix:
            total += tokens
            leading = leading and (adapter, key, tokens) in seen
            again += tokens * leading
            seen.add((adapter, key, tokens))
    share = again / int(trace.prompt_tokens.sum())
    yield f"prefixes     {total} tokens; {again}, {share:.1%} of all prompt tokens, came before under the same adapter"
