"""Adapters and requests across replicas, as dLoRA does it (OSDI 2024, section 5): proactive placement, and co-migration.

Placement spreads the adapters over the replicas by what was asked lately, so that a hot adapter has several homes and
everybody's expected load is alike. Co-migration repairs what prediction could not see: waiting requests move, together with
the adapters they need, from replicas that are behind to those that are ahead. Both are integer programs for HiGHS through
scipy (imported at the first use), bounded in nodes and not in time, so that equal inputs give equal answers.

Simplified: load is counted in requests, not in predicted tokens; only requests that hold no KV move; homes steer where
requests go, and adapters load when those arrive. It knows no clock: periods are counted in arrivals.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from policies.ledger import Ledger
from policies.view import WAITING
from traces.request import Request

PLACE_EVERY = 256
"""Arrivals between two placements; half of what was counted before is forgotten each time."""
MIGRATE_EVERY = 16
"""Arrivals between two looks at the balance."""
UNBALANCED = 1.25
SLACK = 4
"""Requests are moved when the fullest replica has more than UNBALANCED x the mean + SLACK unfinished requests."""
MOST_ADAPTERS = 24
"""Adapters in one integer program, the busiest; the others go to the emptiest replica."""
COPY_COST = 0.02
"""Of the mean load, what one more home of an adapter must save."""
MOVE_COST = 0.05
"""Requests of imbalance that moving one request must save, and LOAD_COST what loading an adapter for it must."""
LOAD_COST = 1.0
NODES = 200
GAP = 0.02


class Move(NamedTuple):
    """One waiting request goes from replica `source` to replica `target`."""

    request: int
    source: int
    target: int


class DLoraRouter:
    """The router: an object with a memory, made anew for each run. Adapters without a home go where least is to do."""

    def __init__(self):
        self._counts: dict[int, float] = {}
        self._homes: dict[int, tuple[int, ...]] = {}
        self._arrivals = 0

    def __call__(self, request: Request, replicas: Sequence[Ledger], routed: int) -> int:
        adapter = request.adapter
        self._arrivals += 1
        self._counts[adapter] = self._counts.get(adapter, 0.0) + 1.0
        if self._arrivals % PLACE_EVERY == 0:
            pages = replicas[0].pool.adapter_pages
            room = [max(1, _room(replica)) for replica in replicas]
            sizes = {a: pages[a] if a >= 0 else 0 for a in self._counts}
            self._homes = place(self._counts, sizes, room, self._homes)
            self._counts = {a: count / 2 for a, count in self._counts.items() if count > 0.1}
        homes = self._homes.get(adapter) or range(len(replicas))
        return min(homes, key=lambda i: (len(replicas[i].entries), i))

    def migrate(self, replicas: Sequence[Ledger]) -> list[Move]:
        """What to move now, after an arrival; mostly nothing."""
        if self._arrivals % MIGRATE_EVERY:
            return []
        loads = [len(replica.entries) for replica in replicas]
        if max(loads) <= UNBALANCED * sum(loads) / len(loads) + SLACK:
            return []
        waiting = [{a: list(queue) for a, queue in replica.waiting_by.items()} for replica in replicas]
        here = [{-1, *replica.pool.resident, *replica.pool.loading} for replica in replicas]
        return comigrate(loads, waiting, here)


def _room(replica: Ledger) -> int:
    """Pages that a replica may give to adapters: half of what they share with keys and values, or all that is theirs."""
    return replica.pool.pages // 2 if replica.pool.adapter_room is None else replica.pool.adapter_room


def place(loads: dict[int, float], pages: dict[int, int], room: Sequence[int],
          homes: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:  # fmt: skip
    """Homes (adapter -> replicas) that even out the expected load with few copies and few changes.

    loads: adapter -> requests expected. pages: of each adapter. room: pages a replica may give to adapters. homes: those
    there are. Minimises the largest load plus COPY_COST a home (half of it for one that is there already).
    """
    count = len(room)
    busiest = sorted(loads, key=lambda a: (-loads[a], a))
    chosen, rest = busiest[:MOST_ADAPTERS], busiest[MOST_ADAPTERS:]
    mean = sum(loads.values()) / count
    # Columns: share of adapter k that goes to replica r, whether it has a home there, and the largest load over the mean.
    cells = [(k, r) for k in range(len(chosen)) for r in range(count)]
    shares = {cell: i for i, cell in enumerate(cells)}
    copies = {cell: len(cells) + i for i, cell in enumerate(cells)}
    program = Program(2 * len(cells) + 1, [*copies.values()])
    program.cost[-1] = 1.0
    program.upper[: 2 * len(cells)] = [1.0] * (2 * len(cells))
    for (k, r), column in copies.items():
        program.cost[column] = COPY_COST * (0.5 if r in homes.get(chosen[k], ()) else 1.0)
        program.at_most({shares[k, r]: 1.0, column: -1.0}, 0.0)
    for k in range(len(chosen)):
        program.equal({shares[k, r]: 1.0 for r in range(count)}, 1.0)
    for r in range(count):
        load = {shares[k, r]: loads[a] / mean for k, a in enumerate(chosen)}
        program.at_most(load | {2 * len(cells): -1.0}, 0.0)
        program.at_most({copies[k, r]: pages[a] / room[r] for k, a in enumerate(chosen)}, 1.0)
    solution = program.solve()
    if solution is None:  # the busiest adapters do not fit: every replica takes what comes
        return {}
    placed = {a: tuple(r for r in range(count) if solution[copies[k, r]] > 0.5) for k, a in enumerate(chosen)}
    expected = [sum(solution[shares[k, r]] * loads[a] for k, a in enumerate(chosen)) for r in range(count)]
    for adapter in rest:
        emptiest = min(range(count), key=lambda r: (expected[r], r))
        expected[emptiest] += loads[adapter]
        placed[adapter] = (emptiest,)
    return placed


def comigrate(loads: Sequence[int], waiting: Sequence[dict[int, list[int]]], here: Sequence[set[int]]) -> list[Move]:
    """Moves that even out `loads` (unfinished requests of each replica) at the least cost.

    waiting: by replica, adapter -> ids of requests that can move, in order of arrival; the last are moved first. here: by
    replica, adapters that need no loading. Minimises the largest load plus MOVE_COST a request and LOAD_COST an adapter.
    """
    mean = sum(loads) / len(loads)
    targets = [r for r, load in enumerate(loads) if load < mean]
    queues = [(len(ids), s, a) for s, queue in enumerate(waiting) if loads[s] > mean for a, ids in queue.items()]
    queues = sorted(queues, key=lambda queue: (-queue[0], *queue[1:]))[:MOST_ADAPTERS]
    if not targets or not queues:
        return []
    cells = [(q, t) for q in range(len(queues)) for t in targets]
    moved = {cell: i for i, cell in enumerate(cells)}
    loading = {}
    for q, t in cells:
        if queues[q][2] not in here[t]:
            loading.setdefault((queues[q][2], t), len(cells) + len(loading))
    last = len(cells) + len(loading)
    program = Program(last + 1, range(last))
    program.cost[-1] = 1.0
    for (q, t), column in moved.items():
        program.cost[column] = MOVE_COST
        program.upper[column] = float(queues[q][0])
        copy = loading.get((queues[q][2], t))
        if copy is not None:
            program.cost[copy], program.upper[copy] = LOAD_COST, 1.0
            program.at_most({column: 1.0, copy: -float(queues[q][0])}, 0.0)
    for q, (count, _, _) in enumerate(queues):
        program.at_most({moved[q, t]: 1.0 for t in targets}, float(count))
    for r, load in enumerate(loads):
        change = {column: 1.0 for (_, t), column in moved.items() if t == r}
        change |= {column: -1.0 for (q, _), column in moved.items() if queues[q][1] == r}
        program.at_most(change | {last: -1.0}, -float(load))
    solution = program.solve()
    moves: list[Move] = []
    if solution is None or program.value(solution) >= max(loads):  # within the gap of the best, yet worse than to stay
        return moves
    for q, (_, source, adapter) in enumerate(queues):
        ids = list(waiting[source][adapter])
        for target in targets:
            moves += [Move(ids.pop(), source, target) for _ in range(round(solution[moved[q, target]]))]
    return moves


class Program:
    """A mixed integer program: minimise cost x, columns at least 0."""

    def __init__(self, columns: int, whole: Sequence[int]):
        self.cost = [0.0] * columns
        self.upper = [float("inf")] * columns
        self._whole = [0] * columns
        for column in whole:
            self._whole[column] = 1
        self._rows: list[dict[int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def at_most(self, row: dict[int, float], bound: float) -> None:
        """Sum of the row's coefficients times columns <= bound."""
        self._rows.append(row)
        self._low.append(float("-inf"))
        self._high.append(bound)

    def equal(self, row: dict[int, float], value: float) -> None:
        """The same, = value."""
        self.at_most(row, value)
        self._low[-1] = value

    def value(self, columns: Sequence[float]) -> float:
        """The cost of a solution, its columns rounded where they are whole."""
        rounded = (round(x) if whole else x for x, whole in zip(columns, self._whole, strict=True))
        return sum(cost * x for cost, x in zip(self.cost, rounded, strict=True))

    def solve(self) -> list[float] | None:
        """The columns of a solution within GAP of the best, or the best found in NODES nodes; None if there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        entries = [(i, column, value) for i, row in enumerate(self._rows) for column, value in row.items()]
        rows, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self._rows), len(self.cost)))
        with _stdout_kept_clean():
            found = milp(
                self.cost, integrality=self._whole, bounds=Bounds([0.0] * len(self.cost), self.upper),
                constraints=LinearConstraint(matrix, self._low, self._high),
                options={"node_limit": NODES, "mip_rel_gap": GAP},
            )  # fmt: skip
        return None if found.x is None else found.x.tolist()


@contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """HiGHS 1.12 (scipy 1.17) has a stray line on C's stdout, where results go; here it goes nowhere."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def withdraw(ledger: Ledger, request: int) -> Request:
    """Take a request that never ran out of a ledger, to enqueue it in another one. Its look-up of the adapter stays counted
    here, and is counted again there. Raises ValueError for a request that has run: its memory is here."""
    entry = ledger.entries.get(request)
    if entry is None or entry.state != WAITING or entry.preemptions:
        raise ValueError(f"request {request} cannot move to another replica: it ended, or has run here")
    ledger._unqueue(entry)
    ledger.queued -= 1
    ledger.injected -= 1
    left = ledger.unfinished[entry.adapter] - 1
    if left:
        ledger.unfinished[entry.adapter] = left
    else:
        del ledger.unfinished[entry.adapter]
    del ledger.entries[request]
    return ledger._asked.pop(request)


def put_in_order(ledger: Ledger, request: int) -> None:
    """Let a request that was just enqueued, and came to another replica first, stand where its arrival puts it: queues are
    in order of arrival, and whoever looks for the oldest or the starving relies on it. Nothing for one that was refused."""
    entry = ledger.entries.get(request)
    if entry is None:
        return
    for queue in (ledger.entries, ledger.waiting, ledger.waiting_by[entry.adapter]):
        ordered = sorted(queue.items(), key=lambda item: (item[1].arrival_ns, item[0]))
        queue.clear()
        queue.update(ordered)
