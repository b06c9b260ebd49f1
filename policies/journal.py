"""What happened: one row a finished request, one row a lease, and the gaps between tokens.

Written by the ledger and the driver, the same in simulator and engine; `result` turns it into the record that analysis
reads. It decides nothing and checks nothing. Rows are kept as machine integers, so that a million requests stay small.
"""

from __future__ import annotations

import json
from collections import Counter
from struct import Struct

import numpy as np

from policies.plan import Work
from traces.details import DETAIL_COLUMNS
from traces.record import MODES, PLACES, REQUEST_COLUMNS, STEP_COLUMNS, RunResult

CHUNK = 8 << 20
"""Bytes after which rows are condensed."""
_REQUEST, _STEP, _RUN = (Struct(f"{columns}q") for columns in (len(REQUEST_COLUMNS), len(STEP_COLUMNS), 5))
_DETAIL = {name: Struct(f"{len(columns)}q") for name, columns in DETAIL_COLUMNS.items()}
PS_PER_NS = 1000
PS_PER_US = 1_000_000

COUNTERS = (
    "adapter_hits", "adapter_misses", "adapter_loads", "adapter_evictions", "load_bytes", "switches", "preemptions",
    "prefix_hit_tokens", "plans", "steps",
)  # fmt: skip


class Journal:
    """Rows of one server.

    server: its number, written into every row. keep_steps: keep one row a lease (needed for steps.parquet), otherwise only
    the gaps between tokens and the sums survive.
    """

    def __init__(self, server: int = 0, *, keep_steps: bool = True):
        self.server = server
        self.keep_steps = keep_steps
        self.ended = 0  # requests written so far
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.mode_ns = [0, 0, 0, 0]
        self.where_ns = dict.fromkeys(PLACES, 0)
        self._requests = bytearray()  # rows end to end: a million tuples would cost ten times the memory
        self._steps = bytearray()
        self._step_chunks: list[np.ndarray] = []
        self._runs = bytearray()
        self._details = {name: bytearray() for name in ("leases", "chunks")}
        self._gaps: Counter[int] = Counter()  # gap in us -> how many

    def request(self, row: tuple) -> None:
        """One request that ended; `row` in the order of REQUEST_COLUMNS."""
        self.ended += 1
        self._requests += _REQUEST.pack(*row)

    def step(self, row: tuple) -> None:
        """One lease; `row` in the order of STEP_COLUMNS, but all times in picoseconds. The places sum to the duration."""
        self._steps += _STEP.pack(*row)
        if len(self._steps) >= CHUNK:
            self._flush_steps()

    def detail(self, work: Work, start_ps: int, first_ps: int, loads: int, loading: bool) -> None:
        """What else the step just written had to do, for those who hold a latency model against it. first_ps: until its
        first step's end. loads: copies of adapters begun with it; loading: one was under way."""
        if not self.keep_steps:
            return
        place = (self.server, start_ps // PS_PER_NS)
        self._details["leases"] += _DETAIL["leases"].pack(
            *place, first_ps // PS_PER_NS, work.lora_tokens, work.adapters, work.rank, work.lora_ranks, work.switch_rank,
            work.outputs, loads, loading, work.largest,
        )  # fmt: skip
        for tokens, context in work.prefills:
            self._details["chunks"] += _DETAIL["chunks"].pack(*place, tokens, context)

    def gap(self, gap_ns: int, count: int = 1) -> None:
        """`count` requests waited `gap_ns` between two of their tokens."""
        self._gaps[(gap_ns + 500) // 1000] += count

    def gap_run(self, begin_ps: int, first_ps: int, growth_ps: int, steps: int, requests: int) -> None:
        """`requests` requests got a token after each of `steps` steps, which begin at begin_ps and take first_ps, first_ps +
        growth_ps, ... one after another."""
        self._runs += _RUN.pack(begin_ps, first_ps, growth_ps, steps, requests)
        if len(self._runs) >= CHUNK:
            self._flush_runs()

    def _flush_runs(self) -> None:
        rows = _rows(self._runs, 5)
        self._runs = bytearray()
        # In blocks of about a million steps, so that long runs do not need memory in proportion to their steps.
        blocks = np.flatnonzero(np.diff(np.cumsum(rows[:, 3]) >> 20)) + 1
        for block in np.split(rows, blocks):
            self._count_gaps(block)

    def _count_gaps(self, runs: np.ndarray) -> None:
        begin, first, growth, steps, requests = runs.T
        index = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps)  # of a step in its run
        begin, first, growth = (np.repeat(column, steps) for column in (begin, first, growth))
        begin += index * first + growth * (index * (index - 1) // 2)
        # Rounded as the ledger rounds the ends of single steps, so that jumping gives the same gaps as stepping.
        gaps_ns = (begin + first + growth * index) // PS_PER_NS - begin // PS_PER_NS
        order = np.argsort(gaps_us := (gaps_ns + 500) // 1000, kind="stable")
        values, starts = np.unique(gaps_us[order], return_index=True)
        if len(values):
            counts = np.add.reduceat(np.repeat(requests, steps)[order], starts)
            self._gaps.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def _flush_steps(self) -> None:
        rows = _rows(self._steps, len(STEP_COLUMNS))
        self._steps = bytearray()
        start, duration, mode = (STEP_COLUMNS.index(name) for name in ("start_ns", "duration_ns", "mode"))
        end_ns = (rows[:, start] + rows[:, duration]) // PS_PER_NS
        rows[:, start] //= PS_PER_NS
        rows[:, duration] = end_ns - rows[:, start]
        places = slice(STEP_COLUMNS.index(f"{PLACES[0]}_ns"), None)
        rows[:, places] //= PS_PER_NS
        rows[:, places.start] += rows[:, duration] - rows[:, places].sum(axis=1)  # what rounding left over
        for number in range(len(self.mode_ns)):
            self.mode_ns[number] += int(rows[rows[:, mode] == number, duration].sum())
        for name in PLACES:
            self.where_ns[name] += int(rows[:, STEP_COLUMNS.index(f"{name}_ns")].sum())
        self.counters["plans"] += len(rows)
        self.counters["steps"] += int(rows[:, STEP_COLUMNS.index("steps")].sum())
        if self.keep_steps:
            self._step_chunks.append(rows)

    def close(self) -> None:
        """Flush everything; call once after the last row."""
        self._flush_steps()
        self._flush_runs()


    def packed(self) -> bytes:
        """All of it as bytes, for another process. Closes it."""
        self.close()
        parts = [self._requests, *(chunk.tobytes() for chunk in self._step_chunks), *self._details.values()]
        head = {
            "server": self.server, "keep_steps": self.keep_steps, "ended": self.ended, "counters": dict(self.counters),
            "mode_ns": self.mode_ns, "where_ns": self.where_ns, "gaps": sorted(self._gaps.items()),
            "details": list(self._details), "sizes": [len(part) for part in parts],
        }  # fmt: skip
        text = json.dumps(head).encode()
        return b"".join([len(text).to_bytes(8, "little"), text, *parts])

    @staticmethod
    def unpacked(packed: bytes) -> Journal:
        """The journal that `packed` gave."""
        start = 8 + int.from_bytes(packed[:8], "little")
        head = json.loads(packed[8:start])
        parts = []
        for size in head["sizes"]:
            parts.append(packed[start : start + size])
            start += size
        journal = Journal(head["server"], keep_steps=head["keep_steps"])
        journal.ended, journal.mode_ns, journal.where_ns = head["ended"], head["mode_ns"], head["where_ns"]
        journal.counters.update(head["counters"])
        journal._gaps.update(dict(head["gaps"]))
        details = len(head["details"])
        journal._requests = bytearray(parts[0])
        journal._step_chunks = [_rows(part, len(STEP_COLUMNS)) for part in parts[1 : len(parts) - details]]
        journal._details = dict(zip(head["details"], map(bytearray, parts[len(parts) - details :]), strict=True))
        return journal


def _rows(cells: bytearray, columns: int) -> np.ndarray:
    return np.frombuffer(cells, np.int64).reshape(-1, columns).copy()


def _columns(chunks: list[np.ndarray], names: tuple[str, ...], order: tuple[str, ...]) -> dict[str, np.ndarray]:
    rows = np.concatenate(chunks) if chunks else np.zeros((0, len(names)), np.int64)
    rows = rows[np.lexsort([rows[:, names.index(name)] for name in reversed(order)])]
    return {name: rows[:, i].copy() for i, name in enumerate(names)}


def result(journals: list[Journal], *, policy: str, operator: str, counters: dict, config: dict) -> RunResult:
    """The record of a run over all its servers. counters: what the driver knows beyond the journals (gpus, end_ns, pool)."""
    for journal in journals:
        journal.close()
    total: Counter[str] = Counter()
    gaps: Counter[int] = Counter()
    for journal in journals:
        total.update(journal.counters)
        gaps.update(journal._gaps)
    values = np.array(sorted(gaps), np.int64)
    counts = np.array([gaps[value] for value in values.tolist()], np.int64)
    where = {name: sum(journal.where_ns[name] for journal in journals) for name in PLACES}
    busy_ns = sum(where.values())
    where["idle"] = max(0, counters["end_ns"] * len(journals) - busy_ns)
    mode = {name: sum(j.mode_ns[i] for j in journals) for i, name in enumerate(MODES)}
    steps = [chunk for journal in journals for chunk in journal._step_chunks]
    keep = any(journal.keep_steps for journal in journals)
    details = {}
    if any(journal._details["leases"] for journal in journals):
        for name in ("leases", "chunks"):
            columns = DETAIL_COLUMNS[name]
            rows = [_rows(journal._details[name], len(columns)) for journal in journals]
            details[name] = _columns(rows, columns, ("start_ns", "server"))
    return RunResult(
        policy=policy,
        operator=operator,
        requests=_columns([_rows(j._requests, len(REQUEST_COLUMNS)) for j in journals], REQUEST_COLUMNS, ("id",)),
        steps=_columns(steps, STEP_COLUMNS, ("start_ns", "server")) if keep else None,
        itl=(values, counts),
        counters=dict(sorted(total.items())) | counters,
        time_ns={"mode": mode, "where": where},
        config=config,
        details=details,
    )
