"""The vocabulary that every package shares: adapters, requests, and the trace that holds them.

A trace is columnar (one numpy array a field) so that a million requests cost tens of megabytes; `Trace.requests()`
yields one `Request` at a time. It knows nothing of policies, latencies or GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

NO_ADAPTER = -1
"""Adapter index of a request that asks for the base model."""

TASKS = ("text", "vqa", "caption", "refer", "detect", "video")
"""Task names; `Trace.task` holds indices into this tuple."""

# One number must never be able to exhaust the memory of the reader (a 2^63 in a CSV is bad input, not a request).
MAX_TOKENS = 10_000_000
MAX_IMAGES = 10_000


class TraceError(ValueError):
    """Bad input. The message names the file, line, column and value, and the way out."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as the orchestration sees it.

    name: an id (letters, digits, `._-`), never a path. rank: 1..256. digest: hash of the weights; two adapters with
    equal digests may share cached prefixes, two with equal names may not.
    """

    name: str
    rank: int = 64
    digest: str = ""

    def __post_init__(self):
        if not 1 <= self.rank <= 256:
            raise TraceError(f"adapter {self.name!r}: rank {self.rank} is outside 1..256")
        if not self.digest:
            object.__setattr__(self, "digest", f"name:{self.name}:{self.rank}")


class Request(NamedTuple):
    """One request of a trace, immutable. `id` is its position in the trace and breaks every tie.

    prompt_tokens counts all tokens of the prompt, image tokens included. prefix is the leading part of the prompt that
    other requests may share, as (content key, tokens) segments in order. head: the answer comes from a vision task head
    after the prefill, with no decode step (then output_tokens is 1).
    """

    id: int
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    adapter: int = NO_ADAPTER
    images: int = 0
    head: bool = False
    prefix: tuple[tuple[int, int], ...] = ()
    ttft_slo_ns: int = 0  # 0: none


@dataclass(frozen=True)
class Trace:
    """Requests in arrival order, one array a field, all of length n.

    arrival_ns int64 (from the start of the trace, non-decreasing) | prompt_tokens, output_tokens int64 (>= 1) | images
    int64 (>= 0) | adapter int32 (index into `adapters`, -1 the base model) | task int8 (index into TASKS) | head bool |
    prefix: None, or n tuples of (content key, tokens) | ttft_slo_ns, tpot_slo_ns: None, or int64 (0: no SLO).
    source, sha256, format say where it came from; notes are sentences for the person who reads the result (rows
    dropped, images mode, tokens clipped); settings the resolved options that made it.
    """

    arrival_ns: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    images: np.ndarray
    adapter: np.ndarray
    task: np.ndarray
    head: np.ndarray
    adapters: tuple[Adapter, ...] = ()
    prefix: tuple[tuple[tuple[int, int], ...], ...] | None = None
    ttft_slo_ns: np.ndarray | None = None
    tpot_slo_ns: np.ndarray | None = None
    source: str = ""
    sha256: str = ""
    format: str = ""
    notes: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)

    COLUMNS = ("arrival_ns", "prompt_tokens", "output_tokens", "images", "adapter", "task", "head")
    OPTIONAL = ("ttft_slo_ns", "tpot_slo_ns")

    @classmethod
    def build(cls, arrival_ns, prompt_tokens, output_tokens, **columns) -> Trace:
        """A trace from the three columns every format has; absent ones get their neutral value. Validates all of it."""
        n = len(arrival_ns)
        filled = {
            "arrival_ns": np.asarray(arrival_ns, np.int64),
            "prompt_tokens": np.asarray(prompt_tokens, np.int64),
            "output_tokens": np.asarray(output_tokens, np.int64),
            "images": np.zeros(n, np.int64),
            "adapter": np.full(n, NO_ADAPTER, np.int32),
            "task": np.zeros(n, np.int8),
            "head": np.zeros(n, bool),
        }
        trace = cls(**(filled | columns))
        trace.check()
        return trace

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def check(self) -> None:
        """Raise TraceError unless every column has n valid entries in arrival order."""
        n = len(self)
        columns = [*self.COLUMNS, *(name for name in self.OPTIONAL if getattr(self, name) is not None)]
        for name in columns:
            if getattr(self, name).shape != (n,):
                raise TraceError(f"{self.source}: column {name} has shape {getattr(self, name).shape}, expected ({n},)")
        if self.prefix is not None and len(self.prefix) != n:
            raise TraceError(f"{self.source}: {len(self.prefix)} prefixes for {n} requests")
        bounds = {
            "arrival_ns": (0, 2**62),
            "prompt_tokens": (1, MAX_TOKENS),
            "output_tokens": (1, MAX_TOKENS),
            "images": (0, MAX_IMAGES),
            "adapter": (NO_ADAPTER, len(self.adapters) - 1),
            "task": (0, len(TASKS) - 1),
        }
        for name, (low, high) in bounds.items():
            values = getattr(self, name)
            bad = np.flatnonzero((values < low) | (values > high))
            if len(bad):
                raise TraceError(f"{self.source}: request {bad[0]}: {name} {values[bad[0]]} is outside {low}..{high}")
        late = np.flatnonzero(np.diff(self.arrival_ns) < 0)
        if len(late):
            raise TraceError(f"{self.source}: request {late[0] + 1} arrives before request {late[0]}; sort the trace")

    def take(self, index: np.ndarray) -> Trace:
        """The requests at `index` (a mask or increasing positions), arrivals as they are."""
        picked = {name: getattr(self, name)[index] for name in self.COLUMNS}
        for name in self.OPTIONAL:
            if getattr(self, name) is not None:
                picked[name] = getattr(self, name)[index]
        if self.prefix is not None:
            picked["prefix"] = tuple(self.prefix[i] for i in np.arange(len(self))[index])
        return replace(self, **picked)

    def with_(self, *, note: str = "", settings: dict | None = None, **columns) -> Trace:
        """A copy with other columns, one more note and more settings."""
        notes = (*self.notes, note) if note else self.notes
        return replace(self, notes=notes, settings=self.settings | (settings or {}), **columns)

    def requests(self) -> Iterator[Request]:
        """One Request at a time, in order of (arrival, id)."""
        prefixes = self.prefix if self.prefix is not None else ((),) * len(self)
        slo = self.ttft_slo_ns.tolist() if self.ttft_slo_ns is not None else (0,) * len(self)
        columns = (self.arrival_ns, self.prompt_tokens, self.output_tokens, self.adapter, self.images, self.head)
        lists = (column.tolist() for column in columns)  # Python ints: numpy scalars are slow and never compare by `is`
        yield from map(Request._make, zip(range(len(self)), *lists, prefixes, slo, strict=True))
