"""The ledger as a state machine: any legal plan keeps the books, any illegal one is named and changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from policies.faults import call_off, fail
from policies.invariants import check, snapshot
from policies.plan import BASE, MERGED, MIXTURE, UNMERGED, Plan, PlanError
from policies.view import DECODING, PREFILLING, WAITING, Limits
from traces.record import REQUEST_COLUMNS
from traces.request import Request

RANKS = (8, 8, 16)
LIMITS = Limits(4, 24, 60)


def legal_plan(ledger, draw):
    """A random plan that keeps the rules by construction; `room` counts pages so that it cannot run out."""
    view, pool = ledger.view(0), ledger.pool
    entries = list(ledger.entries.values())
    mode, merged = UNMERGED, -1
    if pool.resident and draw(st.booleans()):
        mode, merged = draw(st.sampled_from((MERGED, MIXTURE))), draw(st.sampled_from(list(pool.resident)))
    elif all(adapter < 0 for adapter in ledger.unfinished) and draw(st.booleans()):
        mode = BASE
    running = [entry for entry in entries if entry.state in (PREFILLING, DECODING)]
    preempts = draw(st.lists(st.sampled_from(running), max_size=2, unique=True)) if running else []
    waiting = [entry for entry in entries if entry.state == WAITING]
    aborts = draw(st.lists(st.sampled_from(waiting), max_size=1)) if waiting else []
    idle = [adapter for adapter in view.idle_adapters if adapter != merged]
    evicts = draw(st.lists(st.sampled_from(idle), max_size=2, unique=True)) if idle else []
    room = view.free_pages + sum(map(view.adapter_pages, evicts)) + sum(map(view.held_pages, preempts))
    here = lambda entry: mode != MERGED or entry.adapter == merged  # noqa: E731
    decodes, prefills, loads, tokens = [], [], [], 0
    for entry in draw(st.permutations(entries)):
        if entry in preempts or entry in aborts or len(decodes) + len(prefills) == LIMITS.max_batch or not here(entry):
            continue
        if entry.state == DECODING and room > 0 and tokens < LIMITS.max_batch_tokens and draw(st.integers(0, 3)):
            decodes.append(entry.id)
            room, tokens = room - 1, tokens + 1
        elif entry.state != DECODING and view.is_resident(entry.adapter) and entry.adapter not in evicts:
            done = entry.kv if entry.state == PREFILLING else view.reusable_tokens(entry)
            most = min(entry.target - done, LIMITS.max_batch_tokens - tokens)
            chunk = draw(st.integers(min(1, most), most))
            pages = -(-(done + chunk) // 4) - (-(-done // 4) if entry.state == PREFILLING else 0)
            if chunk and pages <= room:
                prefills.append((entry.id, chunk))
                room, tokens = room - pages, tokens + chunk
    for adapter in range(len(RANKS)):
        absent = adapter not in pool.resident and adapter not in pool.loading
        if absent and view.adapter_pages(adapter) <= room and draw(st.booleans()):
            loads.append(adapter)
            room -= view.adapter_pages(adapter)
    ids = lambda some: tuple(entry.id for entry in some)  # noqa: E731
    return Plan(mode, merged, tuple(prefills), tuple(decodes), tuple(loads), tuple(evicts), ids(preempts), ids(aborts))


def spoilt(ledger, plan):
    """name -> plan that breaks one rule, for those rules that this state lets one break."""
    pool, entries = ledger.pool, list(ledger.entries.values())
    plans = {
        "unknown decode": plan._replace(decodes=(*plan.decodes, 999)),
        "unknown prefill": plan._replace(prefills=(*plan.prefills, (999, 1))),
        "unknown preemption": plan._replace(preempts=(*plan.preempts, 999)),
        "unknown abort": plan._replace(aborts=(*plan.aborts, 999)),
        "unknown adapter": plan._replace(loads=(*plan.loads, len(RANKS))),
        "mode below": plan._replace(mode=-1, merged=-1),
        "mode above": plan._replace(mode=4),
        "merged without an adapter": plan._replace(mode=MERGED, merged=-1),
        "unmerged with an adapter": plan._replace(mode=UNMERGED, merged=0),
    }
    absent = [adapter for adapter in range(len(RANKS)) if adapter not in pool.resident]
    if absent:
        plans["fold an absent adapter"] = Plan(MERGED, absent[0])
        plans["evict an absent adapter"] = Plan(evicts=(absent[0],))
    for adapter in (*pool.resident, *pool.loading):
        plans["load twice"] = Plan(loads=(adapter,))
    for adapter in pool.users:
        plans["evict in use"] = Plan(evicts=(adapter,))
    for adapter in pool.resident:
        plans["evict what is folded in"] = Plan(MERGED, adapter, evicts=(adapter,))
        plans["evict twice"] = Plan(evicts=(adapter, adapter))
    if any(adapter >= 0 for adapter in ledger.unfinished):
        plans["base with adapters"] = Plan(BASE)
    for entry in entries:
        if entry.state == DECODING:
            plans["decode twice"] = Plan(decodes=(entry.id, entry.id))
            plans["decode and preempt"] = Plan(decodes=(entry.id,), preempts=(entry.id,))
            plans["prefill what decodes"] = Plan(prefills=((entry.id, 1),))
            plans["abort what runs"] = Plan(aborts=(entry.id,))
            plans |= {f"{entry.adapter} while {m} is merged": Plan(MERGED, m, decodes=(entry.id,))
                      for m in pool.resident if m != entry.adapter}  # fmt: skip
            continue
        done = entry.kv if entry.state == PREFILLING else ledger.reusable_tokens(entry)
        plans["a chunk too long"] = Plan(prefills=((entry.id, entry.target - done + 1),))
        plans["an empty chunk"] = Plan(prefills=((entry.id, 0),))
        plans["prefill twice"] = Plan(prefills=((entry.id, 1), (entry.id, 1)))
        plans["decode what waits"] = Plan(decodes=(entry.id,))
        if entry.state == WAITING:
            plans["preempt what waits"] = Plan(preempts=(entry.id,))
            plans["abort and prefill"] = Plan(prefills=((entry.id, 1),), aborts=(entry.id,))
            if entry.adapter in absent:
                plans["prefill without the adapter"] = Plan(prefills=((entry.id, 1),))
    runnable = [e.id for e in entries if e.state != DECODING and ledger.view(0).is_resident(e.adapter)]
    if len(runnable) > LIMITS.max_batch:
        plans["too many"] = Plan(prefills=tuple((request, 1) for request in runnable))
    if sum(len(plan) for plan in (ledger.decoding, runnable)) > LIMITS.max_batch:
        plans["too many together"] = Plan(decodes=tuple(ledger.decoding), prefills=tuple((r, 1) for r in runnable))
    return plans


class Books(RuleBasedStateMachine):
    """Requests come and fail, plans run or are called off, copies arrive; `asked` is all that was ever asked for."""

    @initialize(pages=st.sampled_from((17, 24, 60)), prefix_cache=st.booleans())
    def begin(self, pages, prefix_cache):
        self.ledger = self.make_ledger(pages, RANKS, LIMITS, prefix_cache=prefix_cache)
        self.asked = []
        self.ended = []
        self.now_ns = 0
        write = self.ledger.journal.request
        self.ledger.journal.request = lambda row: (self.ended.append(row), write(row))

    @rule(adapter=st.integers(-1, 2), prompt=st.integers(1, 30), output=st.integers(1, 9), head=st.booleans(),
          contents=st.lists(st.integers(0, 2), max_size=3))  # fmt: skip
    def arrive(self, adapter, prompt, output, head, contents):
        prefix, left = [], prompt
        for content in contents:
            if (length := (9, 4, 6)[content]) <= left:
                prefix.append((content, length))
                left -= length
        request = Request(len(self.asked), self.now_ns, prompt, 1 if head else output, adapter, 0, head, tuple(prefix))
        self.asked.append(request)
        self.ledger.enqueue(request)

    @rule(data=st.data())
    def copy_arrives(self, data):
        if self.ledger.pool.loading:
            self.ledger.loaded(data.draw(st.sampled_from(list(self.ledger.pool.loading))))

    @rule(data=st.data())
    def run(self, data):
        plan = legal_plan(self.ledger, data.draw)
        work = self.ledger.begin(plan, self.now_ns)
        assert work.decodes == len(plan.decodes)
        assert work.prefill_tokens == sum(tokens for _, tokens in plan.prefills)
        computed = [*((request, 1) for request in plan.decodes), *plan.prefills]
        asked = [self.ledger.entries[request].adapter for request, tokens in computed for _ in range(tokens)]
        rows = Counter({adapter: asked.count(adapter) for adapter in asked if adapter not in (-1, plan.merged)})
        if plan.mode == MIXTURE:  # whoever is not the folded adapter's goes through its branch too
            rows[plan.merged] = sum(adapter != plan.merged for adapter in asked)
        branches = plan.mode in (UNMERGED, MIXTURE) and plan.prefills
        assert work.largest == (max(rows.values(), default=0) if branches else 0)
        if plan.decodes or plan.prefills:
            steps = data.draw(st.integers(1, self.ledger.lease_steps()))
            first_ns = self.now_ns + 1000
            self.now_ns += 1000 * steps
            self.ledger.commit(steps, first_ns, self.now_ns)

    @rule(data=st.data())
    def call_off(self, data):
        plan = legal_plan(self.ledger, data.draw)
        self.ledger.begin(plan, self.now_ns)
        if plan.decodes or plan.prefills:
            call_off(self.ledger, self.now_ns)

    @rule(data=st.data())
    def fail(self, data):
        if self.ledger.entries:
            fail(self.ledger, data.draw(st.sampled_from(list(self.ledger.entries))), self.now_ns)

    @rule(data=st.data())
    def refuse(self, data):
        name, plan = data.draw(st.sampled_from(sorted(spoilt(self.ledger, legal_plan(self.ledger, data.draw)).items())))
        before = snapshot(self.ledger)
        with pytest.raises(PlanError):
            self.ledger.begin(plan, self.now_ns)
        assert snapshot(self.ledger) == before, name

    @invariant()
    def adds_up(self):
        ledger = self.ledger
        check(ledger, ledger.journal.ended)
        standing = len(ledger.cohort.members) + len(ledger._fresh) + len(ledger.paused)
        assert len(ledger.decoding) == standing
        ids = ledger.decoding_ids()  # the ledger's own tuple is counted by sums, any other one request by request
        assert ledger.next_pages(ids) == ledger.next_pages(ids[:1]) + ledger.next_pages(ids[1:])
        rows = [dict(zip(REQUEST_COLUMNS, row, strict=True)) for row in self.ended]
        assert sorted([row["id"] for row in rows] + list(ledger.entries)) == list(range(len(self.asked)))
        for row in rows:
            request = self.asked[row["id"]]
            assert row["output_tokens"] == request.output_tokens
            assert row["generated_tokens"] == request.output_tokens or row["status"] != 0


def test_books_stay_right(make_ledger):
    machine = type("Machine", (Books,), {"make_ledger": staticmethod(make_ledger)})
    run_state_machine_as_test(machine, settings=settings(max_examples=120, stateful_step_count=40))
